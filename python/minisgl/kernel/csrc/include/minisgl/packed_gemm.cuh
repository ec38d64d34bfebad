// Linear layers of many tokens with weights of 4 bits, for GPUs before Hopper: Y^T = W X^T on tensor cores (mma.sync), W
// unpacked in registers as minisgl/packed_weight.cuh explains.
//
// Weights are the MMA's A (16 rows of W), tokens its B (8 columns). The tensor cores sum integers, code - zero, times x;
// each group's sum is then scaled, in fp32, and offsets times the sum of x, from a product with ones, are added.
//
// Work is counted in steps: (token tile, tile of rows, 128 k). Every block has the same number of consecutive steps
// (stream-K, Osama et al. 2023, section 4): one that begins inside of a tile leaves its sums in `partials`, the block
// that began the tile adds them to its own. All blocks are resident, and sums are added in an order that the shape alone
// determines. W does not depend on earlier kernels: the ring is filled with it before `pdl_wait`. In gated matrices a
// thread holds both sums of an output.
#pragma once

#include "minisgl/packed_linear.cuh"

namespace minisgl {
namespace {

constexpr int kMaxShared = 99 * 1024;  // bytes of a block on sm_86
constexpr int kOctets = kTokens / 8;   // of tokens

template <int warps, int row_tiles>
struct Config {
  static constexpr int kT = row_tiles;  // of 16 rows, of a warp
  static constexpr int kThreads = warps * 32;
  static constexpr int kRowTiles = warps * row_tiles;  // of a block
  static constexpr int kWeightBytes = kRowTiles * kUnitBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kPitch;
  static constexpr int kFit = kMaxShared / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kPartial = kRowTiles * kOctets * 32;  // float4
  static_assert(kStages >= 2);
};

// The first step of a block.
template <typename C>
__device__ __forceinline__ int first_step(const Args& args, int block) {
  int64_t all = static_cast<int64_t>(args.tiles) * args.steps * ((args.tokens + kTokens - 1) / kTokens);
  return static_cast<int>(all * block / gridDim.x);
}

// A step's place.
struct Cursor {
  int step, tile, token_tile;  // step: of the tile

  __device__ __forceinline__ Cursor(const Args& args, int index) {
    step = index % args.steps;
    tile = index / args.steps % args.tiles;
    token_tile = index / args.steps / args.tiles;
  }

  __device__ __forceinline__ void advance(const Args& args) {
    if (++step < args.steps) return;
    step = 0;
    if (++tile == args.tiles) tile = 0, ++token_tile;
  }
};

template <typename C>
struct Worker {
  const Args& args;
  char* smem;
  uint32_t ring;
  int lane, warp;
  int begin, end;  // steps
  Cursor next;     // step to load
  int left, load_slot;

  __device__ __forceinline__ Worker(const Args& arguments, char* shared)
      : args(arguments),
        smem(shared),
        begin(first_step<C>(arguments, blockIdx.x)),
        end(first_step<C>(arguments, blockIdx.x + 1)),
        next(arguments, begin) {
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    ring = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
    left = end - begin;
    load_slot = C::kStages - 1;
  }

  __device__ __forceinline__ uint32_t weights_at(int slot, int t) const {
    return ring + slot * C::kStageBytes + (warp * C::kT + t) * kUnitBytes;
  }
  __device__ __forceinline__ uint32_t x_at(int slot) const { return ring + slot * C::kStageBytes + C::kWeightBytes; }

  // This warp's part of a step. Tiles beyond the matrix repeat its last rows: their sums are never written.
  __device__ __forceinline__ void load_weights(const Cursor& at, int slot) const {
#pragma unroll
    for (int t = 0; t < C::kT; ++t) {
      int row_tile = min(at.tile * C::kRowTiles + warp * C::kT + t, args.row_tiles - 1);
      const char* from = args.weight + (static_cast<int64_t>(row_tile) * args.units + at.step) * kUnitBytes + lane * 16;
      uint32_t to = weights_at(slot, t) + lane * 16;
      cp_async(to, from);
      cp_async(to + 512, from + 512);
      if (lane < kGroups * 4) cp_async(to + 1024, from + 1024);
    }
  }

  // All threads.
  __device__ __forceinline__ void load_x(const Cursor& cursor, int slot) const {
    int first = cursor.token_tile * kTokens, rows = min(args.tokens - first, kTokens);
    for (int i = threadIdx.x; i < rows * 16; i += C::kThreads) {
      int token = i / 16, at = cursor.step * kUnitK + i % 16 * 8;
      const T* from = args.x + (first + token) * args.x_stride + (at < args.k ? at : 0);
      cp_async_or_zero(x_piece(x_at(slot), token, i % 16), from, at < args.k);
    }
  }

  __device__ __forceinline__ void load_next() {
    if (left > 0) {
      load_weights(next, load_slot);
      load_x(next, load_slot);
      next.advance(args);
      --left;
    }
    cp_async_commit();
    load_slot = load_slot + 1 == C::kStages ? 0 : load_slot + 1;
  }

  // Before `pdl_wait` weights only. They count as part of the first group of copies, complete before the others.
  __device__ __forceinline__ void fill() {
    Cursor cursor = next;
    for (int s = 0; s + 1 < C::kStages && s < left; ++s, cursor.advance(args)) load_weights(cursor, s);
    pdl_wait();
    for (int s = 0; s + 1 < C::kStages; ++s) {
      if (left > 0) {
        load_x(next, s);
        next.advance(args);
        --left;
      }
      cp_async_commit();
    }
  }

  // B fragments of 8 tokens for the group's k.
  __device__ __forceinline__ void read_x(uint32_t x, int octet, int group, uint32_t (&b)[kFragments][2]) const {
#pragma unroll
    for (int f = 0; f < kFragments; f += 2) {
      uint4 v = load_matrices(x_piece(x, octet * 8 + lane % 8, (group * kFragments + f) * 2 + lane / 8));
      b[f][0] = v.x, b[f][1] = v.y, b[f + 1][0] = v.z, b[f + 1][1] = v.w;
    }
  }

  // The fragments of 16 rows, and what is to be done to sums of their products.
  __device__ __forceinline__ void read_weights(uint32_t unit, int group, uint32_t (&a)[kFragments][4],
                                               float (&scales)[2], float (&offsets)[2]) const {
    Integers rows[2];
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      Params params{load_shared_4(unit + kCodeBytes + o * kParamBytes + group * 32 + lane / 4 * 4)};
      rows[o].zeros = params.zeros();
      scales[o] = params.scale(), offsets[o] = params.offset();
    }
    uint32_t at = unit + lane * 16 + group * (kFragments / 2) * 4;
    uint32_t first[kFragments / 2], second[kFragments / 2];
    read_codes(at, first), read_codes(at + kOctetBytes, second);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) unpack(rows[0], rows[1], first[f / 2], second[f / 2], f % 2, a[f]);
  }

  // acc += the product of a group.
  __device__ __forceinline__ void multiply_group(int slot, int group, float (&acc)[C::kT][kOctets][4]) const {
    uint32_t a[C::kT][kFragments][4];
    float scales[C::kT][2], offsets[C::kT][2];
#pragma unroll
    for (int t = 0; t < C::kT; ++t) read_weights(weights_at(slot, t), group, a[t], scales[t], offsets[t]);
#pragma unroll
    for (int n = 0; n < kOctets; ++n) {
      uint32_t b[kFragments][2];
      read_x(x_at(slot), n, group, b);
      float sums[4] = {};
      if constexpr (kMinima) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f) mma(sums, kOnes, kOnes, kOnes, kOnes, b[f][0], b[f][1]);
      }
#pragma unroll
      for (int t = 0; t < C::kT; ++t) {
        float c[4] = {};
#pragma unroll
        for (int f = 0; f < kFragments; ++f) mma(c, a[t][f][0], a[t][f][1], a[t][f][2], a[t][f][3], b[f][0], b[f][1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[t][n][i] = fmaf(scales[t][i / 2], c[i], acc[t][n][i]);
          if constexpr (kMinima) acc[t][n][i] = fmaf(offsets[t][i / 2], sums[i], acc[t][n][i]);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(int slot, float (&acc)[C::kT][kOctets][4]) const {
#pragma unroll 1  // else registers spill
    for (int group = 0; group < kGroups; ++group) multiply_group(slot, group, acc);
  }

  __device__ __forceinline__ float4* partials_of(int block) const {
    return args.partials + static_cast<int64_t>(block) * C::kPartial + warp * (C::kT * kOctets * 32) + lane;
  }

  // Leave the sums for the block that began the tile.
  __device__ __forceinline__ void deliver(const float (&acc)[C::kT][kOctets][4]) const {
    float4* to = partials_of(blockIdx.x);
#pragma unroll
    for (int i = 0; i < C::kT * kOctets; ++i) {
      const float(&c)[4] = acc[i / kOctets][i % kOctets];
      to[i * 32] = make_float4(c[0], c[1], c[2], c[3]);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(args.flags + blockIdx.x), "r"(1) : "memory");
    }
  }

  // Add what the blocks that have the rest of a tile left, in their order. last: the step after the tile.
  __device__ __forceinline__ void collect(int last, float (&acc)[C::kT][kOctets][4]) const {
    for (int block = blockIdx.x + 1; block < gridDim.x && first_step<C>(args, block) < last; ++block) {
      if (threadIdx.x == 0) {
        unsigned ready = 0;
        while (ready == 0) {
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(ready) : "l"(args.flags + block) : "memory");
        }
        args.flags[block] = 0;  // for the next launch; nobody else reads it in this one
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < C::kT * kOctets; ++i) {
        float4 v = __ldcg(partials_of(block) + i * 32);  // not from L1, which may hold an earlier launch's
        float(&c)[4] = acc[i / kOctets][i % kOctets];
        c[0] += v.x, c[1] += v.y, c[2] += v.z, c[3] += v.w;
      }
    }
  }

  // The outputs of one token: c: sums of rows r and r + 8 of a tile.
  __device__ __forceinline__ void write(int row_tile, int token, float first, float second) const {
    if (token >= args.tokens) return;
    int at = row_tile * (args.gated ? 8 : 16) + lane / 4;
    T* out = args.out + static_cast<int64_t>(token) * args.outputs;
    first *= args.unit, second *= args.unit;
    if (args.gated) {
      if (at >= args.outputs) return;
      if (args.bias != nullptr) first += to_float(args.bias[at]), second += to_float(args.bias[args.outputs + at]);
      out[at] = from_float<T>(silu(first) * second);
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half, at += 8) {
      if (at >= args.outputs) return;
      float y = half == 0 ? first : second;
      if (args.bias != nullptr) y += to_float(args.bias[at]);
      if (args.residual != nullptr) y += to_float(args.residual[static_cast<int64_t>(token) * args.outputs + at]);
      out[at] = from_float<T>(y);
    }
  }

  __device__ __forceinline__ void emit(const Cursor& place, const float (&acc)[C::kT][kOctets][4]) const {
#pragma unroll
    for (int t = 0; t < C::kT; ++t) {
      int row_tile = place.tile * C::kRowTiles + warp * C::kT + t;
#pragma unroll
      for (int n = 0; n < kOctets; ++n) {
        int token = place.token_tile * kTokens + n * 8 + lane % 4 * 2;
        write(row_tile, token, acc[t][n][0], acc[t][n][2]);
        write(row_tile, token + 1, acc[t][n][1], acc[t][n][3]);
      }
    }
  }

  __device__ __forceinline__ void run() {
    Cursor place = next;
    fill();
    int slot = 0;
    for (int step = begin; step < end;) {
      int from = place.step, num = min(args.steps - from, end - step);
      float acc[C::kT][kOctets][4] = {};
      for (int i = 0; i < num; ++i) {
        cp_async_wait<C::kStages - 2>();
        __syncthreads();  // everybody's copies are there, and the slot of the step before is free
        load_next();
        multiply(slot, acc);
        slot = slot + 1 == C::kStages ? 0 : slot + 1;
      }
      if (from > 0) {
        deliver(acc);
      } else {
        if (num < args.steps) collect(step + args.steps, acc);
        emit(place, acc);
      }
      step += num;
      if (step < end) place = Cursor(args, step);
    }
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads) packed_gemm(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) char smem[];
  pdl_trigger();
  Worker<C>(args, smem).run();
}

}  // namespace
}  // namespace minisgl
