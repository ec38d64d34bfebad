// Tensor-core products of a warp (mma.sync, since sm_80) with 16-bit operands, and what belongs to them. Compiled once per
// dtype (MINISGL_FP16).
#pragma once

#include "minisgl/common.cuh"

namespace minisgl {
namespace {

#if MINISGL_FP16
using T = __half;
using T2 = __half2;
constexpr uint32_t kOnes = 0x3c003c00;
constexpr uint32_t kMagic = 0x64006400;      // 1024: under it, the lowest bits are units
constexpr uint32_t kMagicEight = 0x64086408;  // 1024 + 8
#else
using T = __nv_bfloat16;
using T2 = __nv_bfloat162;
constexpr uint32_t kOnes = 0x3f803f80;
constexpr uint32_t kMagic = 0x43004300;      // 128
constexpr uint32_t kMagicEight = 0x43084308;  // 128 + 8
#endif

// c += A B for 16 rows, 8 tokens and 16 k.
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
#if MINISGL_FP16
#define MINISGL_MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MINISGL_MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
  asm(MINISGL_MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same in fp16, whatever T is.
__device__ __forceinline__ void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c += A B for 16 rows of bytes, 8 columns of signed ones and 32 k.
__device__ __forceinline__ void mma_int8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float2 floats_of_pair(uint32_t x) {
#if MINISGL_FP16
  return __half22float2(*reinterpret_cast<T2*>(&x));
#else
  return __bfloat1622float2(*reinterpret_cast<T2*>(&x));
#endif
}

// x∘g of two k. fp16 has no room for large residuals times large g: clamp (NaN and infinity come back through rstd).
__device__ __forceinline__ uint32_t scale(uint32_t x, uint32_t g) {
  T2 y = __hmul2(*reinterpret_cast<T2*>(&x), *reinterpret_cast<T2*>(&g));
#if MINISGL_FP16
  y = __hmax2(__hmin2(y, __float2half2_rn(65504.f)), __float2half2_rn(-65504.f));
#endif
  return *reinterpret_cast<uint32_t*>(&y);
}

__device__ __forceinline__ float squares(uint32_t x) {
  float2 v = floats_of_pair(x);
  return v.x * v.x + v.y * v.y;
}

// 1 / the root of the mean of `k` squares.
__device__ __forceinline__ float inverse_root(float sum, int k, float eps) {
#if MINISGL_FP16
  if (sum > 3e38f) return __int_as_float(0x7fffffff);  // NaN: an infinite x, which `scale` has clamped
#endif
  return rsqrtf(sum / static_cast<float>(k) + eps);
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

}  // namespace
}  // namespace minisgl
