// e4m3 (one byte: sign, 4 bits of exponent with bias 7, 3 of mantissa) as bf16 or fp16, exactly, and back. Since sm_80:
// the conversions of sm_89 go to fp16 only.
#pragma once

#include <minisgl/common.cuh>

#include <cuda_fp8.h>

#include <type_traits>

namespace minisgl {

constexpr float kMaxFloat8 = 448.f;

// Two e4m3 in the upper bytes of halves of a word, as a pair of T. The bits are moved to where T has them, and the
// exponent's bias is made up for by a product, which also makes subnormals right. NaN becomes a number above 448.
template <typename T>
__device__ __forceinline__ uint32_t widen_pair(uint32_t pair) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  constexpr int kShift = kHalf ? 1 : 4;
  constexpr uint32_t kBits = 0x7f007f00u >> kShift;
  constexpr uint32_t kFactor = kHalf ? 0x5c005c00u : 0x7b807b80u;  // 2^8; 2^120
  pair = (pair & 0x80008000u) | (pair >> kShift & kBits);
  if constexpr (kHalf) {
    asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(kFactor));
  } else {
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(pair) : "r"(kFactor), "r"(0x80008000u));  // + -0
  }
  return pair;
}

// Bytes of four e4m3, the first in the lowest bits, as pairs: of the first two, and of the others.
template <typename T>
__device__ __forceinline__ void widen(uint32_t four, uint32_t& low, uint32_t& high) {
  low = widen_pair<T>(__byte_perm(four, 0, 0x1404));
  high = widen_pair<T>(__byte_perm(four, 0, 0x3424));
}

// As pairs: of the first and the third, and of the second and the fourth.
template <typename T>
__device__ __forceinline__ void widen_even(uint32_t four, uint32_t& even, uint32_t& odd) {
  even = widen_pair<T>(__byte_perm(four, 0, 0x2404));
  odd = widen_pair<T>(__byte_perm(four, 0, 0x3414));
}

// What `spread_even` leaves of a value: its bits are where T has them, and the bias of its exponent is e4m3's.
template <typename T>
constexpr float kSpread = std::is_same_v<T, __half> ? 0x1p-8f : 0x1p-120f;

// `widen_even` times kSpread, in fewer instructions; whoever multiplies with them makes up for it. Subnormals are right.
template <typename T>
__device__ __forceinline__ void spread_even(uint32_t four, uint32_t& even, uint32_t& odd) {
  constexpr int kShift = std::is_same_v<T, __half> ? 1 : 4;
  constexpr uint32_t kBits = 0x7f007f00u >> kShift;
  even = (four << 8 & 0x80008000u) | (four << (8 - kShift) & kBits);
  odd = (four & 0x80008000u) | (four >> kShift & kBits);
}

// Bytes of four e4m3 as pairs of fp16, exactly: of the first two, and of the others. NaN stays NaN.
__device__ __forceinline__ void to_half(uint32_t four, uint32_t& low, uint32_t& high) {
#if __CUDA_ARCH__ >= 890
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}"
      : "=r"(low), "=r"(high)
      : "r"(four));
#endif
}

// The nearest e4m3; beyond the largest, the largest. NaN stays NaN.
__device__ __forceinline__ uint8_t narrow(float x) {
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

// Of two, the first in the lower byte.
__device__ __forceinline__ uint16_t narrow(float first, float second) {
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}

}  // namespace minisgl
