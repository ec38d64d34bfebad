// Linear layers of many tokens with weights of 4 bits, for the tensor cores of Hopper (sm_90a).
//
// As minisgl/decode_gemm.cuh, whose way of sharing out work (stream-K) and of writing results this takes, but the weights
// are packed (minisgl/packed_weight.cuh): a step has 128 k, and the tall operand of the products is unpacked into
// registers, scaled and rounded to 16 bits, while the products before it run.
#pragma once

#define MINISGL_MANY_TOKENS 1
#include <minisgl/decode_gemm.cuh>
#include <minisgl/packed_weight.cuh>

namespace minisgl {
namespace {

constexpr int kHalfX = kTokenBytes;  // of 64 k

// Those that multiply take registers from the last warpgroup, of which one thread copies.
template <bool kGated_, int kWarpgroups>
struct WideConfig {
  static constexpr bool kGated = kGated_;
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kRegisters = kWarpgroups == 2 ? 232 : 152;  // of a thread that multiplies
  static constexpr int kWeightBytes = kRows / 16 * kUnitBytes;
  static constexpr int kStageBytes = 2 * kHalfX + kWeightBytes;  // x of all stages lies before their weights
  static constexpr int kFixedBytes = 1024 + kConsumers / 32 * kStagingBytes + 2 * kMaxStages * 8;
  static constexpr int kPartial = kRows * kTokens;  // floats
  static constexpr bool kExists = kSums + 64 <= kRegisters;
};

template <typename C>
__device__ __forceinline__ uint32_t x_at(const Shared<C>& shared, int stage) {
  return shared_address(shared.ring) + stage * 2 * kHalfX;
}

template <typename C>
__device__ __forceinline__ uint32_t weights_at(const Shared<C>& shared, int stage) {
  return shared_address(shared.ring) + shared.stages * 2 * kHalfX + stage * C::kWeightBytes;
}

// Where the next step of a block lies.
struct Place {
  int step;  // of the tile
  int index;
  Tile tile;

  __device__ __forceinline__ Place(const Args& args, int step_)
      : step(step_ % args.steps), index(step_ / args.steps), tile(args, index) {}

  __device__ __forceinline__ void advance(const Args& args) {
    if (++step < args.steps) return;
    step = 0;
    tile = Tile(args, ++index);
  }
};

// One thread of the warp that copies. Rows beyond the matrix are zero.
template <typename C>
__device__ __forceinline__ void produce_packed(const Args& args, const Shared<C>& shared, const CUtensorMap* weights,
                                               const CUtensorMap* x, int begin, int end) {
  uint64_t policy = args.token_tiles > 1 ? kEvictNormal : kEvictFirst;
  auto load_weights = [&](const Place& place, int stage) {
    uint32_t full = shared.full + stage * 8;
    barrier_expect(full, C::kStageBytes);
    tma_load(weights_at(shared, stage), weights, full, policy, 0, place.step, place.tile.rows * (C::kRows / 16), 0);
  };
  auto load_x = [&](const Place& place, int stage) {
    uint32_t to = x_at(shared, stage), full = shared.full + stage * 8;
    tma_load(to, x, full, kEvictNormal, place.step * kUnitK, place.tile.first_token);
    tma_load(to + kHalfX, x, full, kEvictNormal, place.step * kUnitK + kK, place.tile.first_token);
  };
  int num = end - begin, ahead = min(num, args.stages);
  Place place(args, begin), x_place = place;
  for (int i = 0; i < ahead; ++i, place.advance(args)) load_weights(place, i);
  pdl_wait();
  for (int i = 0; i < ahead; ++i, x_place.advance(args)) load_x(x_place, i);
  Cursor cursor;
  for (int i = ahead; i < num; ++i, place.advance(args)) {
    barrier_wait(shared.empty + cursor.stage * 8, cursor.parity);
    load_weights(place, cursor.stage);
    load_x(place, cursor.stage);
    if (++cursor.stage == args.stages) cursor.stage = 0, cursor.parity ^= 1;
  }
}

// What this lane's two rows have in a group of a unit.
struct Rows {
  Dense low, high;

  __device__ __forceinline__ Rows(uint32_t unit, int group, float factor)
      : low({load_shared_4(at(unit, group))}, factor), high({load_shared_4(at(unit, group) + kParamBytes)}, factor) {}

  __device__ __forceinline__ static uint32_t at(uint32_t unit, int group) {
    return unit + kCodeBytes + group * 32 + threadIdx.x % 32 / 4 * 4;
  }
};

// The fragments of this warp's 16 rows and 64 k. rows: of groups that hold more than these.
__device__ __forceinline__ void unpack_half(uint32_t unit, int half, float factor, const Rows& rows, uint32_t (&a)[4][4]) {
  uint32_t at = unit + threadIdx.x % 32 * 16 + half * 8;
  uint2 first = load_shared_8(at), second = load_shared_8(at + kOctetBytes);
  if constexpr (kGroups == 1) {
#pragma unroll
    for (int f = 0; f < 4; ++f) unpack(rows.low, rows.high, f < 2 ? first.x : first.y, f < 2 ? second.x : second.y, f % 2, a[f]);
  } else {
#pragma unroll
    for (int g = 0; g < kGroups / 2; ++g) {
      Rows mine(unit, half * (kGroups / 2) + g, factor);
#pragma unroll
      for (int f = g * kFragments; f < (g + 1) * kFragments; ++f) {
        unpack(mine.low, mine.high, f < 2 ? first.x : first.y, f < 2 ? second.x : second.y, f % 2, a[f]);
      }
    }
  }
}

// sums += the products of the next `num` steps (at least 1).
template <typename C>
__device__ __forceinline__ void multiply_packed(const Shared<C>& shared, Cursor& cursor, int num, float factor,
                                                float (&sums)[kSums]) {
  bool leader = threadIdx.x % 32 == 0;
  int last = -1;
  uint32_t a[2][4][4];
  pin(sums);
  for (int i = 0; i < num; ++i) {
    barrier_wait(shared.full + cursor.stage * 8, cursor.parity);
    uint32_t x = x_at(shared, cursor.stage);
    uint32_t unit = weights_at(shared, cursor.stage) + threadIdx.x / 32 * kUnitBytes;
    Rows rows(unit, 0, factor);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unpack_half(unit, half, factor, rows, a[half]);
      uint64_t b = wgmma_descriptor(x + half * kHalfX);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma(sums, a[half][k], b + 2 * k);
      wgmma_commit();
      wgmma_wait<1>();  // the half before this one: its registers are free
      if (half == 0 && leader && last >= 0) barrier_arrive(shared.empty + last * 8);
    }
    last = cursor.stage;
    if (++cursor.stage == shared.stages) cursor.stage = 0, cursor.parity ^= 1;
  }
  wgmma_wait<0>();
  pin(sums);
  if (leader) barrier_arrive(shared.empty + last * 8);
}

template <typename C>
__device__ __forceinline__ void consume_packed(const Args& args, float unit, const Shared<C>& shared, int begin, int end) {
  pdl_wait();
  Cursor cursor;
  for (int step = begin; step < end;) {
    int tile = step / args.steps;
    int from = step - tile * args.steps, to = min(args.steps, end - tile * args.steps);
    float sums[kSums] = {};
    multiply_packed<C>(shared, cursor, to - from, unit, sums);
    finish<C>(args, shared, tile, from, to, sums);
    step = tile * args.steps + to;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    packed_wide(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap x,
                const __grid_constant__ Args args, float unit) {
  extern __shared__ __align__(1024) char raw[];
  Shared<C> shared(raw, args.stages);
  pdl_trigger();
  if (threadIdx.x == C::kConsumers) {
    tma_prefetch(&weights);
    tma_prefetch(&x);
    for (int i = 0; i < args.stages; ++i) {
      barrier_init(shared.full + i * 8, 1);
      barrier_init(shared.empty + i * 8, C::kConsumers / 32);
    }
    barrier_init_fence();
  }
  __syncthreads();
  int begin = first_step(args, blockIdx.x), end = first_step(args, blockIdx.x + 1);
  if (threadIdx.x < C::kConsumers) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kRegisters));
    consume_packed<C>(args, unit, shared, begin, end);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == C::kConsumers) produce_packed<C>(args, shared, &weights, &x, begin, end);
  }
}

}  // namespace
}  // namespace minisgl
