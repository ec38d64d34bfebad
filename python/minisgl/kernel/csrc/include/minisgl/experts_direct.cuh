// A mixture of experts in MXFP4 (minisgl/experts.cuh) for so few tokens that hardly two choose the same expert: pairs are not
// sorted, and between the router's logits and the new residual stream there are two kernels. Each warp finds the
// experts of its token by itself, in less time than it takes to read what another kernel has found.
//
// Of the first product a warp has a tile and a pair. Of the second a block has eight outputs of a token, all its experts
// together, whose sum it writes: a tile of the tensor cores has these rows of one expert and of the next one, and what
// both are multiplied with takes turns as columns. Its warps share out the units of all such tiles. The second kernel
// reads its weights while the first one computes, so that little more than the arithmetic is left to it.
#pragma once

#include "minisgl/experts.cuh"
#include "minisgl/routing.cuh"

namespace minisgl {
namespace {

constexpr int kDirectThreads = 128;
constexpr int kDirectWarps = kDirectThreads / 32;
constexpr int kAhead = 5;                 // units of the first product that a warp has in registers
constexpr int kSlots = 10;                // units of the second one in shared memory, so that three blocks fit beside the first's
constexpr int kMostShared = 96 * 1024;    // bytes of a block
constexpr int kMostExperts = 256;
constexpr int kSlotBytes = kDirectWarps * kSlots * kUnitBytes;

// One of the two products.
struct Stack {
  const char* weight;
  const T* bias;  // [experts, rows], or null
  float unit;     // of all weights
  int k, units, tiles;

  // Of a tile's unit.
  __device__ __forceinline__ const char* at(int expert, int tile, int u) const {
    return weight + ((static_cast<int64_t>(expert) * tiles + tile) * units + u) * kUnitBytes;
  }

  __device__ __forceinline__ float bias_of(int expert, int row) const {
    return bias == nullptr ? 0.f : to_float(__ldg(bias + static_cast<int64_t>(expert) * tiles * 16 + row));
  }
};

struct DirectArgs {
  Stack stack;
  const void* logits;  // [tokens, experts], float if `wide`, else T
  const T* x;          // [tokens, k]; of the second product [pairs, k]
  T* out;              // [pairs, rows / 2]; of the second product [tokens, rows]
  int64_t x_stride;
  int experts, top_k;
  bool wide, renormalize, clamped, adds;
};

// Of a token, by all lanes of a warp.
__device__ __forceinline__ Choice choice_of(const DirectArgs& args, int token) {
  int64_t at = static_cast<int64_t>(token) * args.experts;
  if (!args.wide) {
    const T* logits = static_cast<const T*>(args.logits) + at;
    return choose_experts<kMostExperts>(logits, args.experts, args.top_k, args.renormalize);
  }
  const float* logits = static_cast<const float*>(args.logits) + at;
  return choose_experts<kMostExperts>(logits, args.experts, args.top_k, args.renormalize);
}

// All of a tile's unit, times the columns at `x`: of a lane, the piece of 8 k that `ldmatrix` wants of it. Two sums take
// turns, so that products wait less for one another.
__device__ __forceinline__ void multiply_unit(const Codes& codes, uint32_t x, float (&sums)[2][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t a[2][4];
    unpack(codes, j, a);
    uint4 b = load_matrices(x + j * 64);
    mma(sums[0], a[0][0], a[0][1], a[0][2], a[0][3], b.x, b.y);
    mma(sums[1], a[1][0], a[1][1], a[1][2], a[1][3], b.z, b.w);
  }
}

// Fetch `rows` rows of x from row `first` on, each filled with zeros to whole units, by all threads.
__device__ __forceinline__ void load_rows(const DirectArgs& args, uint32_t to, int first, int rows) {
  int pieces = args.stack.units * (kUnitK / 8);
  const T* x = args.x + first * args.x_stride;
  for (int row = 0; row < rows; ++row, x += args.x_stride, to += pieces * 16) {
    for (int i = threadIdx.x; i < pieces; i += kDirectThreads) {
      bool inside = i * 8 < args.stack.k;
      cp_async_or_zero(to + i * 16, x + (inside ? i * 8 : 0), inside);
    }
  }
}

// Block (four tiles, pair): SwiGLU of the pair.
__global__ void __launch_bounds__(kDirectThreads, 4) direct_gated_kernel(const __grid_constant__ DirectArgs args) {
  extern __shared__ __align__(128) char bytes[];
  const Stack& stack = args.stack;
  int lane = threadIdx.x % 32, pair = blockIdx.y, token = pair / args.top_k;
  int tile = blockIdx.x * kDirectWarps + threadIdx.x / 32, row = tile * 8 + lane / 4, outputs = stack.tiles * 8;
  uint32_t x = static_cast<uint32_t>(__cvta_generic_to_shared(bytes));
  pdl_wait();
  pdl_trigger();
  load_rows(args, x, token, 1);
  cp_async_commit();
  int expert = __shfl_sync(0xffffffffu, choice_of(args, token).expert, pair % args.top_k);
  const char* from = stack.at(expert, min(tile, stack.tiles - 1), 0);
  Codes codes[kAhead];
  auto load = [&](Codes& to, int unit) {
    if (unit >= stack.units) return;
    const char* at = from + unit * kUnitBytes;
    to.octets[0] = load_once(at + lane * 16), to.octets[1] = load_once(at + kCodeBytes / 2 + lane * 16);
    const uint32_t* powers = reinterpret_cast<const uint32_t*>(at + kCodeBytes) + lane / 4;
    to.powers[0] = __ldg(powers), to.powers[1] = __ldg(powers + 8);
  };
#pragma unroll
  for (int s = 0; s < kAhead; ++s) load(codes[s], s);
  float gate_bias = 0.f, up_bias = 0.f, sums[2][4] = {};
  if (tile < stack.tiles) gate_bias = stack.bias_of(expert, row), up_bias = stack.bias_of(expert, outputs + row);
  cp_async_wait<0>();
  __syncthreads();
  x += lane / 8 * 16;
  for (int unit = 0; unit < stack.units; unit += kAhead) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (unit + s >= stack.units) break;
      multiply_unit(codes[s], x + (unit + s) * (kUnitK * 2), sums);
      load(codes[s], unit + s + kAhead);
    }
  }
  if (tile >= stack.tiles || lane % 4) return;
  float gate = (sums[0][0] + sums[1][0]) * stack.unit + gate_bias, up = (sums[0][2] + sums[1][2]) * stack.unit + up_bias;
  args.out[static_cast<int64_t>(pair) * outputs + row] = from_float<T>(swiglu(gate, up, args.clamped));
}

// What a warp of the second product has: some of the units of the block's rows, of the token's experts two by two.
struct Sum {
  const DirectArgs& args;
  Choice choice;
  int lane, tile, octet, first, end;
  uint32_t slots;
  float total;  // of row lane / 4

  __device__ __forceinline__ Sum(const DirectArgs& arguments, uint32_t shared) : args(arguments) {
    int warp = threadIdx.x / 32, units = (args.top_k + 1) / 2 * args.stack.units;
    lane = threadIdx.x % 32, tile = blockIdx.x / 2, octet = blockIdx.x % 2, total = 0.f;
    first = units * warp / kDirectWarps, end = units * (warp + 1) / kDirectWarps;
    slots = shared + warp * kSlots * kUnitBytes;
    choice = choice_of(args, blockIdx.y);
  }

  __device__ __forceinline__ uint32_t slot(int index) const { return slots + (index - first) % kSlots * kUnitBytes; }

  // The octet of both experts; of powers half a row's octet by each of four lanes.
  __device__ __forceinline__ void load(int index) const {
    int unit = index % args.stack.units, c = index / args.stack.units * 2;
    int experts[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) experts[i] = __shfl_sync(0xffffffffu, choice.expert, min(c + i, args.top_k - 1));
    if (index >= end) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const char* from = args.stack.at(experts[i], tile, unit);
      uint32_t to = slot(index);
      cp_async(to + i * (kCodeBytes / 2) + lane * 16, from + octet * (kCodeBytes / 2) + lane * 16);
      if (lane / 2 == i) {
        int part = lane % 2 * 16;
        cp_async(to + kCodeBytes + i * 32 + part, from + kCodeBytes + octet * 32 + part);
      }
    }
  }

  __device__ __forceinline__ Codes take(int index) const {
    uint32_t from = slot(index), powers = from + kCodeBytes + lane / 4 * 4;
    return {{load_shared(from + lane * 16), load_shared(from + kCodeBytes / 2 + lane * 16)},
            {load_shared_4(powers), load_shared_4(powers + 32)}};
  }

  // Even columns belong to the first of two experts, which has the upper rows, odd ones to the second.
  __device__ __forceinline__ void add(int pair, float (&sums)[2][4]) {
    float weights[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) weights[i] = __shfl_sync(0xffffffffu, choice.weight, min(2 * pair + i, args.top_k - 1));
    total += weights[0] * args.stack.unit * (sums[0][0] + sums[1][0]);
    if (2 * pair + 1 < args.top_k) total += weights[1] * args.stack.unit * (sums[0][3] + sums[1][3]);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = 0.f;
  }

  // What is added to the products: weighted biases, and what is there.
  __device__ __forceinline__ float addend(const T* place) const {
    float sum = 0.f;
    for (int c = 0; c < args.top_k; ++c) {
      float weight = __shfl_sync(0xffffffffu, choice.weight, c);
      sum += weight * args.stack.bias_of(__shfl_sync(0xffffffffu, choice.expert, c), tile * 16 + octet * 8 + lane / 4);
    }
    return sum + (args.adds ? to_float(__ldcg(place)) : 0.f);
  }
};

// Block (eight outputs, token). What is launched directly before must have waited for who wrote `logits` and `out` before it
// triggered: they are read early.
__global__ void __launch_bounds__(kDirectThreads, 4) direct_sum_kernel(const __grid_constant__ DirectArgs args) {
  extern __shared__ __align__(128) char bytes[];
  pdl_trigger();
  uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(bytes)), x = shared + kSlotBytes;
  Sum sum(args, shared);
  for (int i = 0; i < kSlots; ++i) {
    sum.load(sum.first + i);
    cp_async_commit();
  }
  int lane = sum.lane, token = blockIdx.y;
  T* place = args.out + static_cast<int64_t>(token) * args.stack.tiles * 16 + blockIdx.x * 8 + lane / 4;
  float addend = threadIdx.x < 32 ? sum.addend(place) : 0.f, sums[2][4] = {};
  pdl_wait();
  load_rows(args, x, token * args.top_k, args.top_k);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  int units = args.stack.units, unit = sum.first % units, pair = sum.first / units;
  for (int index = sum.first; index < sum.end; ++index) {
    cp_async_wait<kSlots - 1>();
    __syncwarp();
    Codes codes = sum.take(index);
    int choice = min(2 * pair + lane % 2, args.top_k - 1);
    multiply_unit(codes, x + ((choice * units + unit) * (kUnitK / 8) + lane / 8) * 16, sums);
    __syncwarp();  // all of the slot was read
    if (index + kSlots < sum.end) sum.load(index + kSlots);
    cp_async_commit();
    if (++unit < units && index + 1 < sum.end) continue;
    sum.add(pair++, sums);
    unit = 0;
  }
  constexpr int kWarpFloats = kSlots * kUnitBytes / 4;  // of its slots, which it has read
  float* totals = reinterpret_cast<float*>(bytes) + lane / 4;
  if (lane % 4 == 0) totals[threadIdx.x / 32 * kWarpFloats] = sum.total;
  __syncthreads();
  if (threadIdx.x >= 32 || lane % 4) return;
#pragma unroll
  for (int warp = 0; warp < kDirectWarps; ++warp) addend += totals[warp * kWarpFloats];
  *place = from_float<T>(addend);
}

}  // namespace
}  // namespace minisgl
