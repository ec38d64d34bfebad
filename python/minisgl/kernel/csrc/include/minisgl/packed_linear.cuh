// What linear layers with weights of 4 bits on mma.sync are given: packed_few.cuh and packed_gemm.cuh.
#pragma once

#include "minisgl/packed_weight.cuh"

namespace minisgl {
namespace {

constexpr int kTokens = MINISGL_TOKENS;  // of a tile
constexpr int kPitch = kUnitK * 2;       // bytes of a token's part of a unit

struct Args {
  const char* weight;
  const T* x;
  const T* norm;      // gains, or null: no norm
  const T* bias;      // null: none
  const T* residual;  // null, or equal to out
  T* out;             // [tokens, outputs]
  float4* partials;
  unsigned* flags;    // [blocks], zero between launches
  int64_t x_stride;
  float unit;         // factor of all scales and offsets
  float eps;
  int tokens, outputs, k;
  int units;          // of k
  int row_tiles;      // of 16 rows
  int tiles;          // of a block's rows
  int steps;          // of a tile
  bool gated;
};

// Address of the 8 k `piece` of a token's part of a unit: pieces are permuted, so that eight tokens' lie in other banks.
__device__ __forceinline__ uint32_t x_piece(uint32_t x, int token, int piece) {
  return x + token * kPitch + (piece ^ token % 8) * 16;
}

}  // namespace
}  // namespace minisgl
