// Weights of 4 bits as the tensor cores want them, unpacked in registers.
//
// The packed matrix is a sequence of units, of 16 rows (two octets) and 128 k, all k of 16 rows one after the other
// (minisgl/kernel/packed_gemm.py makes it):
//   [octet][lane][4 words]: word w of a lane has the codes of its row of the octet (lane / 4), as the (2w)-th and the
//                           next 16 k of its A fragments (mma.m16n8k16) want them: pair p (p / 2-th 16 k, their lower or
//                           upper 8) is nibbles p and p + 4
//   [octet][group of k][row]: its scale (fp16), and what else the group has:
//     MINISGL_MINIMA=0: a zero, as 128 + zero (bf16) or 1024 + zero (fp16), what the bits of a code under an exponent are
//     MINISGL_MINIMA=1: an offset (fp16), to be added to scale * (code - 8)
// In gated matrices gate and up octets alternate. Compiled once per dtype (MINISGL_FP16), and size (MINISGL_GROUP) and
// kind of groups.
#pragma once

#include "minisgl/async_copy.cuh"
#include "minisgl/mma.cuh"

namespace minisgl {
namespace {

#ifndef MINISGL_GROUP
#define MINISGL_GROUP 128
#endif
#ifndef MINISGL_MINIMA
#define MINISGL_MINIMA 0
#endif

constexpr int kUnitK = 128;
constexpr int kGroup = MINISGL_GROUP;     // k with one scale
constexpr int kGroups = kUnitK / kGroup;  // of a unit
constexpr int kFragments = kGroup / 16;   // of k, in a group
constexpr bool kMinima = MINISGL_MINIMA;
constexpr int kOctetBytes = 512;              // of codes
constexpr int kCodeBytes = 2 * kOctetBytes;
constexpr int kParamBytes = kGroups * 32;     // of an octet
constexpr int kUnitBytes = kCodeBytes + 2 * kParamBytes;

constexpr float kRaise = std::is_same_v<T, __half> ? 1024.f : 128.f;  // of codes under the exponent
constexpr uint32_t kNibbles = 0x0f0f0f0fu, kUnits = 0x01010101u;  // bytes

__device__ __forceinline__ T2 pair(uint32_t bits) { return *reinterpret_cast<T2*>(&bits); }
__device__ __forceinline__ uint32_t bits_of(T2 values) { return *reinterpret_cast<uint32_t*>(&values); }

// Pair p of a word of codes, under the exponent: 128 + code (bf16) or 1024 + code (fp16).
struct Raised {
  __device__ __forceinline__ uint32_t operator()(uint32_t word, int p) const {
    uint32_t bits;  // (word >> 4p & 0x000f000f) | kMagic, of which the compiler would make two instructions
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(bits) : "r"(word >> (4 * p)), "r"(0x000f000f), "r"(kMagic));
    return bits;
  }
};

// What a row has in a group.
struct Params {
  uint32_t bits;

  __device__ __forceinline__ float scale() const { return __half2float(__ushort_as_half(bits & 0xffff)); }
  // To be added to scale * (code - 8).
  __device__ __forceinline__ float offset() const { return __half2float(__ushort_as_half(bits >> 16)); }
  // What is to be subtracted from raised codes.
  __device__ __forceinline__ T2 zeros() const {
    return pair(kMinima ? kMagicEight : __byte_perm(bits, 0, 0x3232));
  }
  // To be added to scale * code.
  __device__ __forceinline__ float plain_shift() const {
    return kMinima ? fmaf(-8.f, scale(), offset()) : (kRaise - to_float(zeros().x)) * scale();
  }
  // To be added to scale * (raised code).
  __device__ __forceinline__ float shift() const {
    float raise = to_float(zeros().x);
    return kMinima ? fmaf(-raise, scale(), offset()) : -raise * scale();
  }
};

// A row's pairs of k as T, scaled and rounded once.
struct Dense {
  T2 zeros;
#if MINISGL_MINIMA
  float scale, offset;
#else
  T2 high, low;  // their sum is the scale
#endif

  // factor: of all scales.
  __device__ __forceinline__ Dense(Params params, float factor) : zeros(params.zeros()) {
    float s = params.scale() * factor;
#if MINISGL_MINIMA
    scale = s, offset = params.offset() * factor;
#else
    T rounded = from_float<T>(s), rest = from_float<T>(s - to_float(rounded));
    high = T2(rounded, rounded), low = T2(rest, rest);
#endif
  }

  __device__ __forceinline__ uint32_t operator()(uint32_t word, int p) const {
    T2 value = __hsub2(pair(Raised()(word, p)), zeros);
#if !MINISGL_MINIMA
    return bits_of(__hfma2(value, high, __hmul2(value, low)));
#elif MINISGL_FP16
    float2 v = __half22float2(value);
    return bits_of(__floats2half2_rn(fmaf(v.x, scale, offset), fmaf(v.y, scale, offset)));
#else
    float2 v = __bfloat1622float2(value);
    return bits_of(__floats2bfloat162_rn(fmaf(v.x, scale, offset), fmaf(v.y, scale, offset)));
#endif
  }
};

// A lane's words of a group, of an octet in shared memory.
__device__ __forceinline__ void read_codes(uint32_t at, uint32_t (&words)[kFragments / 2]) {
  if constexpr (kFragments == 2) {
    words[0] = load_shared_4(at);
  } else if constexpr (kFragments == 4) {
    uint2 v = load_shared_8(at);
    words[0] = v.x, words[1] = v.y;
  } else {
    uint4 v = load_shared(at);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
}

// A row's pairs of k as integers.
struct Integers {
  T2 zeros;

  __device__ __forceinline__ uint32_t operator()(uint32_t word, int p) const {
    return bits_of(__hsub2(pair(Raised()(word, p)), zeros));
  }
};

// A fragment: of the s-th 16 k of a word of each octet, whose rows become values by `low` and `high`.
template <typename Values>
__device__ __forceinline__ void unpack(const Values& low, const Values& high, uint32_t first, uint32_t second, int s,
                                       uint32_t (&a)[4]) {
  a[0] = low(first, 2 * s), a[1] = high(second, 2 * s);
  a[2] = low(first, 2 * s + 1), a[3] = high(second, 2 * s + 1);
}

}  // namespace
}  // namespace minisgl
