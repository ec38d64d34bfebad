// Linear layers of up to 256 tokens with weights of 4 bits, for the tensor cores of Hopper (sm_90a).
//
// As minisgl/decode_gemm.cuh, whose way of sharing out work (stream-K) and of writing results this takes, but the weights
// are packed (minisgl/packed_weight.cuh): a step has 128 k, and the tall operand of the products is unpacked into
// registers, scaled and rounded to 16 bits, while the products before it run.
#pragma once

#include <minisgl/decode_gemm.cuh>
#include <minisgl/packed_weight.cuh>

namespace minisgl {
namespace {

constexpr int kHalfX = kTokenBytes;  // of 64 k

template <int kWarpgroups, bool kGated_>
struct WideConfig {
  static constexpr bool kGated = kGated_;
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr bool kUneven = kWarpgroups == 2;  // those that multiply take registers from the one that copies
  static constexpr int kThreads = kConsumers + (kUneven ? 128 : 32);
  static constexpr int kWeightBytes = (kRows / 16 * kUnitBytes + 1023) / 1024 * 1024;
  static constexpr int kStageBytes = 2 * kHalfX + kWeightBytes;
  static constexpr int kFixedBytes = 1024 + kConsumers / 32 * kStagingBytes + 2 * kMaxStages * 8;
  static constexpr int kPartial = kRows * kTokens;  // floats
};

struct PackedArgs {
  const char* weight;
  int row_tiles;  // of 16 rows; tiles of a block beyond them repeat the last: their sums are never written
  float unit;
};

// One thread of the warp that copies.
template <typename C>
__device__ __forceinline__ void produce_packed(const Args& args, const PackedArgs& packed, const Shared<C>& shared,
                                               const CUtensorMap* x, int begin, int end) {
  auto load_weights = [&](int i, int stage) {
    int tile = (begin + i) / args.steps, unit = (begin + i) % args.steps;
    uint32_t to = shared.stage(stage) + 2 * kHalfX, full = shared.full + stage * 8;
    barrier_expect(full, 2 * kHalfX + C::kRows / 16 * kUnitBytes);
    for (int t = 0; t < C::kRows / 16; ++t) {
      int row_tile = min(tile * (C::kRows / 16) + t, packed.row_tiles - 1);
      const char* from = packed.weight + (static_cast<int64_t>(row_tile) * args.steps + unit) * kUnitBytes;
      bulk_load(to + t * kUnitBytes, from, kUnitBytes, full, kEvictFirst);
    }
  };
  auto load_x = [&](int i, int stage) {
    int k = (begin + i) % args.steps * kUnitK;
    uint32_t to = shared.stage(stage), full = shared.full + stage * 8;
    tma_load(to, x, full, kEvictNormal, k, 0);
    tma_load(to + kHalfX, x, full, kEvictNormal, k + kK, 0);
  };
  int num = end - begin;
  int ahead = min(num, args.stages);
  for (int i = 0; i < ahead; ++i) load_weights(i, i);
  pdl_wait();
  for (int i = 0; i < ahead; ++i) load_x(i, i);
  Cursor cursor;
  for (int i = ahead; i < num; ++i) {
    barrier_wait(shared.empty + cursor.stage * 8, cursor.parity);
    load_weights(i, cursor.stage);
    load_x(i, cursor.stage);
    if (++cursor.stage == args.stages) cursor.stage = 0, cursor.parity ^= 1;
  }
}

// The fragments of this warp's 16 rows and 64 k.
__device__ __forceinline__ void unpack_half(uint32_t unit, int half, float factor, uint32_t (&a)[4][4]) {
  int lane = threadIdx.x % 32;
  uint4 v = load_shared(unit + half * 512 + lane * 16);
  uint32_t codes[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int f = 0; f < 4; ++f) {
    int k = half * 64 + f * 16;
    GroupOf group(load_shared_8(unit + kCodeBytes + k / kGroup * 64 + lane / 4 * 8));
    unpack(codes[f], group.zeros, a[f]);
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      T2 value = scaled(a[f][p], factor * group.scales[p % 2], factor * group.offsets[p % 2]);
      a[f][p] = *reinterpret_cast<uint32_t*>(&value);
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
    uint32_t base = shared.stage(cursor.stage);
    uint32_t unit = base + 2 * kHalfX + threadIdx.x / 32 * kUnitBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unpack_half(unit, half, factor, a[half]);
      uint64_t b = wgmma_descriptor(base + half * kHalfX);
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
__device__ __forceinline__ void consume_packed(const Args& args, const PackedArgs& packed, const Shared<C>& shared,
                                               int begin, int end) {
  pdl_wait();
  Cursor cursor;
  for (int step = begin; step < end;) {
    int tile = step / args.steps;
    int from = step - tile * args.steps, to = min(args.steps, end - tile * args.steps);
    float sums[kSums] = {};
    multiply_packed<C>(shared, cursor, to - from, packed.unit, sums);
    finish<C>(args, shared, tile, from, to, sums);
    step = tile * args.steps + to;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    packed_wide(const __grid_constant__ CUtensorMap x, const __grid_constant__ Args args,
                const __grid_constant__ PackedArgs packed) {
  extern __shared__ __align__(1024) char raw[];
  Shared<C> shared(raw, args.stages);
  pdl_trigger();
  if (threadIdx.x == C::kConsumers) {
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
    if constexpr (C::kUneven) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume_packed<C>(args, packed, shared, begin, end);
  } else {
    if constexpr (C::kUneven) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == C::kConsumers) produce_packed<C>(args, packed, shared, &x, begin, end);
  }
}

}  // namespace
}  // namespace minisgl
