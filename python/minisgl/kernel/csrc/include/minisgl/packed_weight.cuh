// Weights of 4 bits as the tensor cores want them, unpacked in registers.
//
// The packed matrix is a sequence of units, of 16 rows and 128 k, all k of 16 rows one after the other
// (minisgl/kernel/packed_gemm.py makes it):
//   1024 bytes of codes: [64 k][lane][word]: word s of a lane has the codes of its A fragment (mma.m16n8k16) of the s-th
//                        16 k; of fragment register p, the lower half is nibble p, the upper one nibble p + 4
//   for each group of k: [row % 8][4]: scales of the rows r and r + 8 (fp16), and what else their groups have:
//     MINISGL_MINIMA=0: zeros, as 128 + zero (bf16) or 1024 + zero (fp16), what the bits of a code under an exponent are
//     MINISGL_MINIMA=1: offsets (fp16), to be added to scale * (code - 8)
// In gated matrices gate and up rows alternate, 8 of each. Compiled once per dtype (MINISGL_FP16), and size
// (MINISGL_GROUP) and kind of groups.
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
constexpr int kCodeBytes = 1024;
constexpr int kUnitBytes = kCodeBytes + kGroups * 64;

__device__ __forceinline__ T2 pair(uint32_t bits) { return *reinterpret_cast<T2*>(&bits); }

// What a lane needs of a group, for its rows r and r + 8. zeros: with 128 or 1024 added, twice each.
struct GroupOf {
  float scales[2];
  float offsets[2];
  T2 zeros[2];

  __device__ __forceinline__ explicit GroupOf(uint2 words) {
    float2 s = __half22float2(*reinterpret_cast<__half2*>(&words.x));
    scales[0] = s.x, scales[1] = s.y;
    if constexpr (kMinima) {
      float2 o = __half22float2(*reinterpret_cast<__half2*>(&words.y));
      offsets[0] = o.x, offsets[1] = o.y;
      zeros[0] = zeros[1] = pair(kMagicEight);
    } else {
      offsets[0] = offsets[1] = 0.f;
      zeros[0] = pair(__byte_perm(words.y, 0, 0x1010)), zeros[1] = pair(__byte_perm(words.y, 0, 0x3232));
    }
  }
};

// The codes of a lane's fragments in a group of a unit in shared memory.
__device__ __forceinline__ void read_codes(uint32_t unit, int group, int lane, uint32_t (&codes)[kFragments]) {
  uint32_t at = unit + group * kFragments / 4 * 512 + lane * 16;
  if constexpr (kFragments == 2) {
    uint2 v = load_shared_8(at + group % 2 * 8);
    codes[0] = v.x, codes[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kFragments / 4; ++i) {
      uint4 v = load_shared(at + i * 512);
      codes[4 * i] = v.x, codes[4 * i + 1] = v.y, codes[4 * i + 2] = v.z, codes[4 * i + 3] = v.w;
    }
  }
}

// The fragment of 16 rows and 16 k: code - zero of each.
__device__ __forceinline__ void unpack(uint32_t codes, const T2 (&zeros)[2], uint32_t (&a)[4]) {
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    T2 value = __hsub2(pair((codes >> (4 * p) & 0x000f000f) | kMagic), zeros[p % 2]);
    a[p] = *reinterpret_cast<uint32_t*>(&value);
  }
}

// Two neighbours of a row: integers, scaled in fp32 and rounded once.
__device__ __forceinline__ T2 scaled(uint32_t integers, float scale, float offset) {
  float2 v;
#if MINISGL_FP16
  v = __half22float2(pair(integers));
  return __floats2half2_rn(fmaf(v.x, scale, offset), fmaf(v.y, scale, offset));
#else
  v = __bfloat1622float2(pair(integers));
  return __floats2bfloat162_rn(fmaf(v.x, scale, offset), fmaf(v.y, scale, offset));
#endif
}

}  // namespace
}  // namespace minisgl
