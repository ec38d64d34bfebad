// A mixture of experts in MXFP4 (minisgl/experts.cuh) for so few tokens that hardly two choose the same expert: pairs are not
// sorted, and between the router's logits and the new residual stream there are two kernels. Each warp finds the
// experts of its token by itself, in less time than it takes to read what another kernel has found.
//
// Of the first product a warp has a tile, or a part of its k, and a pair. Of the second a block has eight outputs of a token, all its experts
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
#ifndef MINISGL_PARTS
#define MINISGL_PARTS 1
#define MINISGL_AHEAD 4
#define MINISGL_RESIDENT 5
#define MINISGL_SLOTS 4
#endif
constexpr int kParts = MINISGL_PARTS;        // warps that share a tile's k in the first product
constexpr int kAhead = MINISGL_AHEAD;        // units of it that a warp has in registers
constexpr int kResident = MINISGL_RESIDENT;  // blocks of it that an SM has room for
constexpr int kSlots = MINISGL_SLOTS;        // units of the second one that a warp has in shared memory
constexpr int kMostShared = 96 * 1024;  // bytes of a block
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

// What x is multiplied with, for codes as they are are too small for sums of their products.
constexpr float kRaise = std::is_same_v<T, __half> ? 1.f : 0x1p60f;

// The power of the j-th 32 k of a row.
__device__ __forceinline__ float power_of(uint32_t powers, int j) {
  uint32_t power = __byte_perm(powers, 0, 0x4440 | j);
#if MINISGL_FP16
  if (power == 0) return 0.f;
  power += 112;
#endif
  return __uint_as_float(power << 23);
}

// All of a tile's unit, times the columns at `x`, raised: of a lane, the piece of 8 k that `ldmatrix` wants of it. The powers are
// left to the sums of 32 k. sums: of row lane / 4 with an even column, and of that + 8 with it (`second` = 2) or the next.
template <int second>
__device__ __forceinline__ void multiply_unit(const Codes& codes, uint32_t x, float (&sums)[2]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t a[2][4];
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
      const uint4& v = codes.octets[octet];
      uint32_t word = j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
      a[0][octet] = bits_of<0>(word), a[0][2 + octet] = bits_of<1>(word);
      a[1][octet] = bits_of<2>(word), a[1][2 + octet] = bits_of<3>(word);
    }
    uint4 b = load_matrices(x + j * 64);
    float part[4] = {};
    mma(part, a[0][0], a[0][1], a[0][2], a[0][3], b.x, b.y);
    mma(part, a[1][0], a[1][1], a[1][2], a[1][3], b.z, b.w);
    sums[0] += part[0] * power_of(codes.powers[0], j);
    sums[1] += part[second] * power_of(codes.powers[1], j);
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

__device__ __forceinline__ uint32_t raised(uint32_t pair) {
  T2 y = __hmul2(*reinterpret_cast<T2*>(&pair), T2(from_float<T>(kRaise), from_float<T>(kRaise)));
  return *reinterpret_cast<uint32_t*>(&y);
}

// Block (some tiles, pair): SwiGLU of the pair, raised.
__global__ void __launch_bounds__(kDirectThreads, kResident) direct_gated_kernel(const __grid_constant__ DirectArgs args) {
  extern __shared__ __align__(128) char bytes[];
  __shared__ float2 rest[kDirectWarps][8];
  const Stack& stack = args.stack;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % kParts, pair = blockIdx.y, token = pair / args.top_k;
  int tile = (blockIdx.x * kDirectWarps + warp) / kParts, row = tile * 8 + lane / 4, outputs = stack.tiles * 8;
  int begin = stack.units * part / kParts, end = stack.units * (part + 1) / kParts;
  uint32_t x = static_cast<uint32_t>(__cvta_generic_to_shared(bytes));
  pdl_wait();
  pdl_trigger();
  load_rows(args, x, token, 1);
  cp_async_commit();
  int expert = __shfl_sync(0xffffffffu, choice_of(args, token).expert, pair % args.top_k);
  const char* from = stack.at(expert, min(tile, stack.tiles - 1), 0);
  Codes codes[kAhead];
  auto load = [&](Codes& to, int unit) {
    if (unit >= end) return;
    const char* at = from + unit * kUnitBytes;
    to.octets[0] = load_once(at + lane * 16), to.octets[1] = load_once(at + kCodeBytes / 2 + lane * 16);
    const uint32_t* powers = reinterpret_cast<const uint32_t*>(at + kCodeBytes) + lane / 4;
    to.powers[0] = __ldg(powers), to.powers[1] = __ldg(powers + 8);
  };
#pragma unroll
  for (int s = 0; s < kAhead; ++s) load(codes[s], begin + s);
  float gate_bias = 0.f, up_bias = 0.f, sums[2] = {};
  if (tile < stack.tiles) gate_bias = stack.bias_of(expert, row), up_bias = stack.bias_of(expert, outputs + row);
  cp_async_wait<0>();
  for (int i = threadIdx.x; kRaise > 1.f && i < stack.units * (kUnitK / 8); i += kDirectThreads) {  // what it has fetched
    uint4* place = reinterpret_cast<uint4*>(bytes) + i;
    *place = make_uint4(raised(place->x), raised(place->y), raised(place->z), raised(place->w));
  }
  __syncthreads();
  x += lane / 8 * 16;
  for (int unit = begin; unit < end; unit += kAhead) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (unit + s >= end) break;
      multiply_unit<2>(codes[s], x + (unit + s) * (kUnitK * 2), sums);
      load(codes[s], unit + s + kAhead);
    }
  }
  if (kParts > 1) {
    if (part > 0 && lane % 4 == 0) rest[warp][lane / 4] = make_float2(sums[0], sums[1]);
    __syncthreads();
    for (int i = 1; i < kParts; ++i) sums[0] += rest[warp - part + i][lane / 4].x, sums[1] += rest[warp - part + i][lane / 4].y;
  }
  if (tile >= stack.tiles || part > 0 || lane % 4) return;
  float unit = stack.unit / kRaise, y = swiglu(sums[0] * unit + gate_bias, sums[1] * unit + up_bias, args.clamped);
  args.out[static_cast<int64_t>(pair) * outputs + row] = from_float<T>(y * kRaise);
}

// What a warp of the second product has: some of the units of the block's rows, of the token's experts two by two.
struct Sum {
  const DirectArgs& args;
  Choice choice;
  int lane, tile, octet, unit, pair;  // the last two: where it begins
  int left, next_unit, next_pair;     // of units to fetch
  const char *first, *second;         // the next unit of both experts
  uint32_t slots, slot;               // the first, and that of the next unit
  float total;                        // of row lane / 4

  __device__ __forceinline__ Sum(const DirectArgs& arguments, uint32_t shared) : args(arguments) {
    int warp = threadIdx.x / 32, units = (args.top_k + 1) / 2 * args.stack.units, begin = units * warp / kDirectWarps;
    lane = threadIdx.x % 32, tile = blockIdx.x / 2, octet = blockIdx.x % 2, total = 0.f;
    left = units * (warp + 1) / kDirectWarps - begin;
    next_unit = unit = begin % args.stack.units, next_pair = pair = begin / args.stack.units;
    slot = slots = shared + warp * kSlots * kUnitBytes;
    choice = choice_of(args, blockIdx.y);
    find_experts();
  }

  __device__ __forceinline__ const char* place_of(int c) const {
    int expert = __shfl_sync(0xffffffffu, choice.expert, min(c, args.top_k - 1));
    return args.stack.at(expert, tile, next_unit) + octet * (kCodeBytes / 2);
  }

  __device__ __forceinline__ void find_experts() { first = place_of(2 * next_pair), second = place_of(2 * next_pair + 1); }

  __device__ __forceinline__ uint32_t after(uint32_t place) const {
    return place == slots + (kSlots - 1) * kUnitBytes ? slots : place + kUnitBytes;
  }

  // The octet of both experts; of powers half a row's octet by each of four lanes.
  __device__ __forceinline__ void load() {
    if (left == 0) return;
    cp_async(slot + lane * 16, first + lane * 16);
    cp_async(slot + kCodeBytes / 2 + lane * 16, second + lane * 16);
    if (lane < 4) {
      const char* powers = (lane < 2 ? first : second) + kCodeBytes - octet * (kCodeBytes / 2 - 32);
      cp_async(slot + kCodeBytes + lane * 16, powers + lane % 2 * 16);
    }
    first += kUnitBytes, second += kUnitBytes;
    slot = after(slot);
    --left;
    if (++next_unit < args.stack.units || left == 0) return;
    next_unit = 0, ++next_pair;
    find_experts();
  }

  __device__ __forceinline__ Codes take(uint32_t place) const {
    uint32_t powers = place + kCodeBytes + lane / 4 * 4;
    return {{load_shared(place + lane * 16), load_shared(place + kCodeBytes / 2 + lane * 16)},
            {load_shared_4(powers), load_shared_4(powers + 32)}};
  }

  // Even columns belong to the first of two experts, which has the upper rows, odd ones to the second.
  __device__ __forceinline__ void add(int pair, float (&sums)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int c = 2 * pair + i;
      float weight = __shfl_sync(0xffffffffu, choice.weight, min(c, args.top_k - 1)) * (args.stack.unit / kRaise);
      if (c < args.top_k) total += weight * sums[i];
      sums[i] = 0.f;
    }
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
__global__ void __launch_bounds__(kDirectThreads, 8) direct_sum_kernel(const __grid_constant__ DirectArgs args) {
  extern __shared__ __align__(128) char bytes[];
  pdl_trigger();
  uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(bytes)), x = shared + kSlotBytes;
  Sum sum(args, shared);
  int num = sum.left, units = args.stack.units;
  for (int i = 0; i < kSlots; ++i) {
    sum.load();
    cp_async_commit();
  }
  int lane = sum.lane, token = blockIdx.y;
  T* place = args.out + static_cast<int64_t>(token) * args.stack.tiles * 16 + blockIdx.x * 8 + lane / 4;
  float addend = threadIdx.x < 32 ? sum.addend(place) : 0.f, sums[2] = {};
  pdl_wait();
  load_rows(args, x, token * args.top_k, args.top_k);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t codes_at = sum.slots;
  for (int i = 0, unit = sum.unit, pair = sum.pair; i < num; ++i) {
    cp_async_wait<kSlots - 1>();
    __syncwarp();
    Codes codes = sum.take(codes_at);
    codes_at = sum.after(codes_at);
    int choice = min(2 * pair + lane % 2, args.top_k - 1);
    multiply_unit<3>(codes, x + ((choice * units + unit) * (kUnitK / 8) + lane / 8) * 16, sums);
    __syncwarp();  // all of the slot was read
    sum.load();
    cp_async_commit();
    if (++unit < units && i + 1 < num) continue;
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
