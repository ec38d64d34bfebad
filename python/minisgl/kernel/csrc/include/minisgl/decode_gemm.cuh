// Linear layers for the tensor cores of Hopper (sm_90a): out [m, n] = x [m, k] weight [n, k]^T, made for up to 256 tokens.
//
// The weights are the tall operand of the products (64 rows for each warpgroup), the tokens the wide one, so that a
// batch of any size wastes little. One warp copies tiles of 128 bytes of k into a ring of stages with the copy engine;
// the others multiply. The weights do not depend on earlier kernels: the ring is filled with them before `pdl_wait`.
//
// Work is counted in steps: (tile of rows and tokens, 128 bytes of k). It is shared out in one of three ways:
//  - split >= 1: a cluster of `split` blocks has a tile, each a part of its k. They leave their sums in shared memory and
//    each adds up a share of the tile.
//  - split == 0 (stream-K, Osama et al. 2023, section 4): every block has the same number of consecutive steps. A block
//    that begins inside of a tile leaves its sums in `partials` before anything else; the block that began the tile
//    adds them to its own. It waits for blocks that wait for nobody before they deliver, and all are resident.
//  - split == kWaves, for many tiles: every block has whole tiles, the next of all when it is done with one.
// Either way sums are added in an order that the shape alone determines.
//
// With gate and up rows, the rows of a tile alternate, 8 gate rows, then the 8 up rows of the same outputs (the tensor
// map does that): a thread then holds both sums of an output.
//
// Compiled once per dtype (MINISGL_FP16), number of tokens (MINISGL_TOKENS) and kind of operands: of the dtype, or e4m3
// with a scale of each row and each token (MINISGL_FP8=1), or of each octet of rows, each token and 128 k
// (MINISGL_FP8=2), for which the sums of a step are scaled and added up one by one.
#pragma once

#ifndef MINISGL_TOKENS
#define MINISGL_TOKENS 128
#endif
#define WGMMA_N MINISGL_TOKENS
#if MINISGL_FP8
#define WGMMA_FP8 1
#define WGMMA_TYPE "e4m3"
#elif MINISGL_FP16
#define WGMMA_TYPE "f16"
#else
#define WGMMA_TYPE "bf16"
#endif
#include <minisgl/mma.cuh>
#include <minisgl/tma.cuh>
#include <minisgl/wgmma.cuh>

namespace minisgl {
namespace {

#if MINISGL_FP8
using Operand = uint8_t;
constexpr bool kFloat8 = true, kBlockScales = MINISGL_FP8 == 2;
#else
using Operand = T;
constexpr bool kFloat8 = false, kBlockScales = false;
#endif

#if MINISGL_FP8 || MINISGL_MANY_TOKENS
constexpr bool kManyTokens = true;         // more than one tile of them
#else
constexpr bool kManyTokens = false;
#endif
constexpr int kTokens = MINISGL_TOKENS;
constexpr int kSums = kTokens / 2;         // of a thread, for 64 rows
constexpr int kRegisters = (kBlockScales ? 2 : 1) * kSums + (kFloat8 ? 64 : 48);  // of a thread, about
constexpr int kStep = 128;                 // bytes of k in a step, as wide as the swizzle
constexpr int kK = kStep / sizeof(Operand);  // elements
constexpr int kTokenBytes = kTokens * kStep;
constexpr int kMaxStages = 24;
// Floats, of a token's 16 outputs: 20 are free of bank conflicts, 16 leave room for another stage of 256 tokens.
constexpr int kPitch = kTokens == 256 && !kFloat8 ? 16 : 20;
constexpr int kStagingBytes = 16 * kPitch * 4;  // of a warp: 16 tokens
constexpr int kMaxSplit = 8;
constexpr int kWaves = -1;
constexpr int kTokenGroup = 8;  // token tiles that many tiles of rows take one after the other, while both are in L2

struct Args {
  T* out;             // [tokens, outputs]
  const T* bias;      // [outputs] or null
  const T* residual;  // null, or `out`
  float* partials;    // [blocks, rows * kTokens], for stream-K only, like the next
  unsigned* flags;    // [blocks], zero between launches
  const float* row_scales;    // of e4m3: [rows of weights], or [octets of these, steps]
  const float* token_scales;  // [tokens], or [steps, token_pitch]
  int token_pitch;
  int tokens, outputs;
  int steps;  // of a tile
  int row_tiles, token_tiles;
  int split;
  int stages;

  __device__ __forceinline__ int tiles() const { return row_tiles * token_tiles; }
};

// Some rows of the weights, by some of the tokens.
struct Tile {
  int rows;         // index of the tile of rows
  int first_token;  // of all
  int tokens;       // at most kTokens

  __device__ __forceinline__ Tile(const Args& args, int index) : rows(index), first_token(0), tokens(args.tokens) {
    if constexpr (!kManyTokens) return;
    int group = index / (kTokenGroup * args.row_tiles), in_group = index - group * kTokenGroup * args.row_tiles;
    int wide = min(kTokenGroup, args.token_tiles - group * kTokenGroup);
    rows = in_group / wide;
    first_token = (group * kTokenGroup + in_group % wide) * kTokens;
    tokens = min(kTokens, args.tokens - first_token);
  }
};

template <int kWarpgroups, bool kGated_>
struct Config {
  static constexpr bool kGated = kGated_;
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kConsumers = 128 * kWarpgroups;  // threads
  static constexpr int kThreads = kConsumers + 32;
  static constexpr int kStageBytes = kRows * kStep + kTokenBytes;
  static constexpr int kFixedBytes = 1024 + kConsumers / 32 * kStagingBytes + 2 * kMaxStages * 8;  // 1024: alignment
  static constexpr int kPartial = kRows * kTokens;  // floats
  static constexpr int kBlocks = kRows <= 128 && 2 * kThreads * kRegisters <= 65536 ? 2 : 1;
  static constexpr bool kFits = kThreads * kRegisters <= 65536;
};

// Where things lie in shared memory.
template <typename C>
struct Shared {
  char* ring;
  float* staging;  // of this warp
  uint32_t full, empty;
  int stages;

  __device__ __forceinline__ Shared(char* raw, int stages_) : stages(stages_) {
    ring = raw + (1024 - shared_address(raw) % 1024) % 1024;
    char* after = ring + stages * C::kStageBytes;
    full = shared_address(after);
    empty = full + kMaxStages * 8;
    staging = reinterpret_cast<float*>(after + 2 * kMaxStages * 8 + threadIdx.x / 32 * kStagingBytes);
  }
  __device__ __forceinline__ uint32_t stage(int i) const { return shared_address(ring) + i * C::kStageBytes; }
};

// The first step of a block; with kWaves the number of steps of the blocks before, of which each has every gridDim-th
// tile.
__device__ __forceinline__ int first_step(const Args& args, int block) {
  int blocks = gridDim.x;
  if (args.split == 0) return static_cast<int>(static_cast<int64_t>(args.tiles()) * args.steps * block / blocks);
  if (kManyTokens && args.split == kWaves) return (args.tiles() / blocks * block + min(args.tiles() % blocks, block)) * args.steps;
  return block / args.split * args.steps + args.steps * (block % args.split) / args.split;
}

// The tile of a step of this block, whose first step is `begin`.
__device__ __forceinline__ int tile_of(const Args& args, int begin, int step) {
  if (kManyTokens && args.split == kWaves) return int(blockIdx.x) + (step - begin) / args.steps * int(gridDim.x);
  return step / args.steps;
}

// The warp that copies: one thread of it.
template <typename C>
__device__ __forceinline__ void produce(const Args& args, const Shared<C>& shared, const CUtensorMap* weights,
                                        const CUtensorMap* x, int begin, int end) {
  uint64_t weight_policy = args.token_tiles > 1 ? kEvictNormal : kEvictFirst;
  auto load_weights = [&](int i, int stage) {
    int step = begin + i;
    barrier_expect(shared.full + stage * 8, C::kStageBytes);
    tma_load(shared.stage(stage), weights, shared.full + stage * 8, weight_policy, step % args.steps * kK, 0, 0,
             Tile(args, tile_of(args, begin, step)).rows * (C::kRows / 16));
  };
  auto load_x = [&](int i, int stage) {
    tma_load(shared.stage(stage) + C::kRows * kStep, x, shared.full + stage * 8, kEvictNormal,
             (begin + i) % args.steps * kK, Tile(args, tile_of(args, begin, begin + i)).first_token);
  };
  int num = end - begin;
  int ahead = min(num, args.stages);
  for (int i = 0; i < ahead; ++i) load_weights(i, i);
  pdl_wait();
  for (int i = 0; i < ahead; ++i) load_x(i, i);
  int stage = 0;
  uint32_t parity = 0;
  for (int i = ahead; i < num; ++i) {
    barrier_wait(shared.empty + stage * 8, parity);
    load_weights(i, stage);
    load_x(i, stage);
    if (++stage == args.stages) stage = 0, parity ^= 1;
  }
}

// All threads that multiply.
template <typename C>
__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(C::kConsumers) : "memory");
}

// A place in the ring.
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;
};

// Start the products of one step: sums, or with `keep` added to them.
template <typename C>
__device__ __forceinline__ void start_products(const Shared<C>& shared, int stage, float (&sums)[kSums], int keep) {
  uint32_t base = shared.stage(stage);
  uint64_t a = wgmma_descriptor(base + threadIdx.x / 128 * 64 * kStep);
  uint64_t b = wgmma_descriptor(base + C::kRows * kStep);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kStep / 32; ++k) wgmma(sums, a + 2 * k, b + 2 * k, keep || k > 0);
  wgmma_commit();
}

// sums += the products of the next `num` steps (at least 1).
template <typename C>
__device__ __forceinline__ void multiply(const Shared<C>& shared, Cursor& cursor, int num, float (&sums)[kSums]) {
  bool leader = threadIdx.x % 32 == 0;
  int last = -1;
  pin(sums);
  for (int i = 0; i < num; ++i) {
    barrier_wait(shared.full + cursor.stage * 8, cursor.parity);
    start_products(shared, cursor.stage, sums, 1);
    wgmma_wait<1>();  // the step before this one
    if (leader && last >= 0) barrier_arrive(shared.empty + last * 8);
    last = cursor.stage;
    if (++cursor.stage == shared.stages) cursor.stage = 0, cursor.parity ^= 1;
  }
  wgmma_wait<0>();
  pin(sums);
  if (leader) barrier_arrive(shared.empty + last * 8);
}

// This thread's two rows of the weights (of a gated tile: of gate and up): r and r + 8 of the warp's 16.
template <typename C>
__device__ __forceinline__ int2 rows_of(const Args& args, const Tile& tile) {
  int sixteen = tile.rows * (C::kRows / 16) + threadIdx.x / 32, row = threadIdx.x % 32 / 4;
  int most = args.outputs - 8 + row;  // rows beyond the last tile's are not written
  if (C::kGated) return make_int2(min(sixteen * 8 + row, most), args.outputs + min(sixteen * 8 + row, most));
  return make_int2(min(sixteen * 16 + row, most), min(sixteen * 16 + 8 + row, most));
}

// `multiply` with scales of steps; `step`: the first of them, within the tile.
template <typename C>
__device__ __forceinline__ void multiply_scaled(const Args& args, const Shared<C>& shared, Cursor& cursor,
                                                const Tile& tile, int step, int num, float (&sums)[kSums]) {
  int2 rows = rows_of<C>(args, tile);
  const float* low = args.row_scales + rows.x / 8 * args.steps + step;
  const float* high = args.row_scales + rows.y / 8 * args.steps + step;
  const float* tokens = args.token_scales + static_cast<int64_t>(step) * args.token_pitch + tile.first_token +
                        threadIdx.x % 4 * 2;
  float part[kSums];
  for (int i = 0; i < num; ++i, tokens += args.token_pitch) {
    float of_low = low[i], of_high = high[i];
    barrier_wait(shared.full + cursor.stage * 8, cursor.parity);
    pin(part);
    start_products(shared, cursor.stage, part, 0);
    wgmma_wait<0>();
    pin(part);
    if (threadIdx.x % 32 == 0) barrier_arrive(shared.empty + cursor.stage * 8);
    if (++cursor.stage == shared.stages) cursor.stage = 0, cursor.parity ^= 1;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      float2 scales = __ldg(reinterpret_cast<const float2*>(tokens + j * 8));
      sums[4 * j] += part[4 * j] * (of_low * scales.x);
      sums[4 * j + 1] += part[4 * j + 1] * (of_low * scales.y);
      sums[4 * j + 2] += part[4 * j + 2] * (of_high * scales.x);
      sums[4 * j + 3] += part[4 * j + 3] * (of_high * scales.y);
    }
  }
}

// A thread's sums of its two rows and of the tokens `token` and the next, as their e4m3 stand for.
template <typename C>
__device__ __forceinline__ float4 scaled(const Args& args, const Tile& tile, int token, float4 v) {
  int2 rows = rows_of<C>(args, tile);
  float low = args.row_scales[rows.x], high = args.row_scales[rows.y];
  float first = args.token_scales[min(token, args.tokens - 1)], second = args.token_scales[min(token + 1, args.tokens - 1)];
  return make_float4(v.x * (low * first), v.y * (low * second), v.z * (high * first), v.w * (high * second));
}

__device__ __forceinline__ float silu_times(float gate, float up) { return gate / (1.f + __expf(-gate)) * up; }

// Four consecutive outputs of a token.
template <typename C>
__device__ __forceinline__ void write(const Args& args, int token, int output, float4 v) {
  if (token >= args.tokens || output >= args.outputs) return;
  using Four = Vec<T, 4>;
  float y[4] = {v.x, v.y, v.z, v.w};
  size_t at = static_cast<size_t>(token) * args.outputs + output;
  if (!C::kGated && args.bias != nullptr) {
    Four bias = *reinterpret_cast<const Four*>(args.bias + output);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] += to_float(bias.data[i]);
  }
  if (!C::kGated && args.residual != nullptr) {
    Four residual = *reinterpret_cast<const Four*>(args.residual + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] += to_float(residual.data[i]);
  }
  Four out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.data[i] = from_float<T>(y[i]);
  *reinterpret_cast<Four*>(args.out + at) = out;
}

// Write the warp's outputs for 16 tokens from the tile's `token` on. a and b: the thread's sums (see `wgmma`) for the
// first and the second 8 of them; they are transposed in shared memory.
template <typename C>
__device__ __forceinline__ void emit(const Args& args, float* staging, const Tile& tile, int token, float4 a, float4 b) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int row = lane / 4, column = lane % 4 * 2;
  int sixteen = tile.rows * (C::kRows / 16) + warp;  // index of the warp's 16 rows
  token += tile.first_token;
  if constexpr (kFloat8 && !kBlockScales) {
    a = scaled<C>(args, tile, token + column, a), b = scaled<C>(args, tile, token + 8 + column, b);
  }
  if constexpr (C::kGated) {
    constexpr int kHalfPitch = 12;
    staging[column * kHalfPitch + row] = silu_times(a.x, a.z);
    staging[(column + 1) * kHalfPitch + row] = silu_times(a.y, a.w);
    staging[(column + 8) * kHalfPitch + row] = silu_times(b.x, b.z);
    staging[(column + 9) * kHalfPitch + row] = silu_times(b.y, b.w);
    __syncwarp();
    float4 v = *reinterpret_cast<const float4*>(staging + lane / 2 * kHalfPitch + lane % 2 * 4);
    write<C>(args, token + lane / 2, sixteen * 8 + lane % 2 * 4, v);
  } else {
    float* to = staging + column * kPitch + row;
    to[0] = a.x, to[kPitch] = a.y, to[8] = a.z, to[kPitch + 8] = a.w;
    to += 8 * kPitch;
    to[0] = b.x, to[kPitch] = b.y, to[8] = b.z, to[kPitch + 8] = b.w;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int of = half * 8 + lane / 4;
      float4 v = *reinterpret_cast<const float4*>(staging + of * kPitch + lane % 4 * 4);
      write<C>(args, token + of, sixteen * 16 + lane % 4 * 4, v);
    }
  }
  __syncwarp();  // read before the next call writes
}

__device__ __forceinline__ float4 four(const float (&sums)[kSums], int j) {
  return make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
}

// The sums of a block as an array of float4: [kTokens / 8][kConsumers].
template <typename C>
__device__ __forceinline__ int partial_index(int j) {
  return j * C::kConsumers + threadIdx.x;
}

template <typename C>
__device__ __forceinline__ void store_partials(int tokens, float4* to, const float (&sums)[kSums]) {
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    if (j / 2 * 16 < tokens) to[partial_index<C>(j)] = four(sums, j);
  }
}

// Leave the sums for the block that began the tile.
template <typename C>
__device__ __forceinline__ void deliver(const Args& args, int tokens, const float (&sums)[kSums]) {
  float* slot = args.partials + static_cast<size_t>(blockIdx.x) * C::kPartial;
  store_partials<C>(tokens, reinterpret_cast<float4*>(slot), sums);
  __threadfence();
  consumers_sync<C>();
  if (threadIdx.x == 0) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(args.flags + blockIdx.x), "r"(1) : "memory");
  }
}

// Add what the blocks that have the rest of a tile left, in their order. `end`: the step after the tile.
template <typename C>
__device__ __forceinline__ void collect(const Args& args, int tokens, int end, float (&sums)[kSums]) {
  for (int block = blockIdx.x + 1; block < gridDim.x && first_step(args, block) < end; ++block) {
    if (threadIdx.x == 0) {
      unsigned ready = 0;
      while (ready == 0) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(ready) : "l"(args.flags + block) : "memory");
      }
      args.flags[block] = 0;  // for the next launch; nobody else reads it in this one
    }
    consumers_sync<C>();
    const float* slot = args.partials + static_cast<size_t>(block) * C::kPartial;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      if (j / 2 * 16 >= tokens) continue;
      // Not from L1, which may hold an earlier launch's.
      float4 v = __ldcg(reinterpret_cast<const float4*>(slot) + partial_index<C>(j));
      sums[4 * j] += v.x, sums[4 * j + 1] += v.y, sums[4 * j + 2] += v.z, sums[4 * j + 3] += v.w;
    }
  }
}

// After the steps [begin, end) of the tile of that index, without a cluster.
template <typename C>
__device__ __forceinline__ void finish(const Args& args, const Shared<C>& shared, int index, int begin, int end,
                                       float (&sums)[kSums]) {
  Tile tile(args, index);
  if (begin > 0) return deliver<C>(args, tile.tokens, sums);
  if (end < args.steps) collect<C>(args, tile.tokens, (index + 1) * args.steps, sums);
#pragma unroll
  for (int j = 0; j < kTokens / 8; j += 2) {
    if (j * 8 < tile.tokens) emit<C>(args, shared.staging, tile, j * 8, four(sums, j), four(sums, j + 1));
  }
}

// This block's share of a tile, from the sums of all blocks of the cluster.
template <typename C>
__device__ __forceinline__ void reduce(const Args& args, const Shared<C>& shared, const Tile& tile, int rank) {
  int groups = (tile.tokens + 15) / 16;
  for (int group = groups * rank / args.split; group < groups * (rank + 1) / args.split; ++group) {
    uint32_t at = shared_address(shared.ring) + partial_index<C>(group * 2) * 16;
    float4 a = make_float4(0.f, 0.f, 0.f, 0.f), b = a;
#pragma unroll 4
    for (int r = 0; r < args.split; ++r) {
      float4 v = load_remote(at, r), w = load_remote(at + C::kConsumers * 16, r);
      a.x += v.x, a.y += v.y, a.z += v.z, a.w += v.w;
      b.x += w.x, b.y += w.y, b.z += w.z, b.w += w.w;
    }
    emit<C>(args, shared.staging, tile, group * 16, a, b);
  }
}

template <typename C>
__device__ __forceinline__ void consume(const Args& args, const Shared<C>& shared, int begin, int end) {
  pdl_wait();
  Cursor cursor;
  for (int step = begin; step < end;) {
    int from = step % args.steps, to = min(args.steps, from + end - step), index = tile_of(args, begin, step);
    float sums[kSums] = {};
    if constexpr (kBlockScales) {
      multiply_scaled<C>(args, shared, cursor, Tile(args, index), from, to - from, sums);
    } else {
      multiply<C>(shared, cursor, to - from, sums);
    }
    if (args.split > 1) {
      consumers_sync<C>();  // the ring is not read any more
      store_partials<C>(Tile(args, index).tokens, reinterpret_cast<float4*>(shared.ring), sums);
    } else {
      finish<C>(args, shared, index, from, to, sums);
    }
    step += to - from;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    decode_gemm(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap x,
                const __grid_constant__ Args args) {
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
    consume<C>(args, shared, begin, end);
  } else if (threadIdx.x == C::kConsumers) {
    produce<C>(args, shared, &weights, &x, begin, end);
  }
  if (args.split <= 1) return;
  __syncwarp();
  cluster_sync();
  if (threadIdx.x < C::kConsumers) reduce<C>(args, shared, Tile(args, begin / args.steps), blockIdx.x % args.split);
  __syncwarp();
  cluster_sync();  // others read this block's shared memory
}

}  // namespace
}  // namespace minisgl
