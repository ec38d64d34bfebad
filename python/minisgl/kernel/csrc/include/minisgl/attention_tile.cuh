// What one warp of a decode attention kernel does: copy tokens into shared memory, attend to 16 of them, merge results.
//
// For `src/attention_decode.cu` alone, which see; the shapes are macros that its build defines.
#pragma once

#include <minisgl/float8.cuh>

#include <algorithm>

#ifndef ATTN_DTYPE
#define ATTN_DTYPE __nv_bfloat16
#define ATTN_HEAD_DIM 128
#define ATTN_NUM_KV 8
#define ATTN_GROUP 2
#endif

namespace minisgl {
namespace {

using Element = ATTN_DTYPE;
#if ATTN_FP8
using Cached = uint8_t;  // e4m3
#else
using Cached = Element;
#endif
constexpr bool kFloat8 = sizeof(Cached) == 1;
constexpr int kHeadDim = ATTN_HEAD_DIM;
constexpr int kNumKV = ATTN_NUM_KV;
constexpr int kGroup = ATTN_GROUP;
static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "head_dim is 64, 128 or 256");
static_assert(kGroup >= 1 && kGroup <= 16 && kNumKV >= 1, "1 to 16 query heads per KV head");

constexpr int kNumTiles = (kGroup + 7) / 8;  // tensor-core tiles are 8 queries wide
constexpr int kSteps = kHeadDim / 16;        // and 16 elements deep
constexpr int kQuads = kHeadDim / 4;         // float4s of a head's output
constexpr int kPairs = kGroup < 8 ? (kGroup + 1) / 2 : 4;  // pairs of queries in use in a tensor-core tile
constexpr int kMaxCluster = 16;

// What a warp copies, and attends to, at a time: keys, then values, of 16 tokens of one KV head.
constexpr int kRowBytes = kHeadDim * sizeof(Cached);
constexpr int kPlane = 16 * kRowBytes;
constexpr int kStageBytes = std::max(2 * kPlane, kNumTiles * kSteps * 512);  // or a warp's result, for another to merge

struct Params {
  const Element* q;  // [num_seqs, kNumKV * kGroup, kHeadDim], tokens q_stride elements apart
  const Cached* k;  // [num_slots, kNumKV, kHeadDim]
  const Cached* v;
  const int* page_table;  // rows table_stride entries apart
  const int* rows;        // [num_seqs]
  const int* seq_lens;    // [num_seqs]
  const float* sinks;     // [kNumKV * kGroup], of each head a score of no token, which only the sum counts; or null
  Element* out;           // [num_seqs, kNumKV * kGroup, kHeadDim]
  float4* partial;        // [kNumKV, blocks, 2, kPartialQuads]; stream only, like the counters
  int* counters;          // [kNumKV, num_seqs], zero between launches
  int64_t q_stride;
  int64_t table_stride;
  int num_seqs;
  int page_size;
  int window;     // tokens that a query sees, itself included; 0: all
  float scale;    // of the scores, in units of log2
  const int* fresh;  // see `attention_decode`
};

// What a block works on: kHeads KV heads, kWarps / kHeads warps for each, kBlocks such blocks on an SM. A warp has a ring
// of its own, so that warps wait for one another only where they combine results.
template <int kHeads_, int kWarps_, int kBlocks_>
struct Plan {
  static constexpr int kHeads = kHeads_, kWarps = kWarps_, kBlocks = kBlocks_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kShare = kWarps / kHeads;  // warps of a KV head: each takes 16 of the tile's tokens
  static constexpr int kTile = 16 * kShare;       // tokens
  static constexpr int kStages = 220 * 1024 / kBlocks / (kWarps * kStageBytes);
  static constexpr int kRingBytes = kStages * kStageBytes;
  static_assert(kShare * kHeads == kWarps && kStages >= 2);
  static_assert(kGroup * kHeadDim * 4 <= kRingBytes, "a warp's result must fit its ring");
};

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, or zeros.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
// Into the L2 cache.
__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
// Into the L1 cache.
__device__ __forceinline__ void prefetch_near(const void* from) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(from));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrix(uint32_t (&a)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrix_transposed(uint32_t (&a)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

#define ATTN_MMA(TYPE)                                                                                     \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, "            \
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                             \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Element, __half>) {
    ATTN_MMA("f16");
  } else {
    ATTN_MMA("bf16");
  }
}
#undef ATTN_MMA

__device__ __forceinline__ uint32_t pack(float low, float high) {
  Vec<Element, 2> pair{from_float<Element>(low), from_float<Element>(high)};
  return *reinterpret_cast<uint32_t*>(&pair);
}

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}

// The warps that share a KV head of the block.
template <int kThreads>
__device__ __forceinline__ void group_barrier(int head) {
  asm volatile("bar.sync %0, %1;" ::"r"(head + 1), "n"(kThreads) : "memory");
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t remote_address(const void* pointer, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_address(pointer)), "r"(rank));
  return address;
}
__device__ __forceinline__ void store_remote(uint32_t to, float4 x) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_remote(uint32_t to, float2 x) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x.x), "f"(x.y) : "memory");
}

// A place in a sequence: the tile of tokens that starts at `pos` and ends before `end`.
struct Walk {
  int seq, row, pos, end, len;

  __device__ void enter(const Params& p, int index) {
    seq = index;
    row = p.rows[index];
    end = len = p.seq_lens[index];
    pos = p.window > 0 ? max(0, len - p.window) : 0;
  }
  // To the next tile, if need be the first one of the next sequence. An empty sequence has one (empty) tile.
  __device__ void advance(const Params& p, int tile) {
    pos += tile;
    if (pos >= end && seq + 1 < p.num_seqs) enter(p, seq + 1);
  }
};

template <typename P>
__device__ int tiles_of(const Params& p, int len) {
  int visible = p.window > 0 ? min(len, p.window) : len;
  return max(1, (visible + P::kTile - 1) / P::kTile);
}

// Lane i's token of those that this warp copies; its page is still on its way. offset < 0: no such token.
struct Lookup {
  int page, offset;
};

template <typename P>
__device__ __forceinline__ Lookup look_up(const Params& p, const Walk& walk) {
  constexpr int kAhead = 32;  // entries: a cache line. A miss in L2 takes longer than the tile that hides this load.
  int lane = threadIdx.x % 32;
  int pos = walk.pos + int(threadIdx.x / 32) % P::kShare * 16 + lane;
  if (lane >= 16 || pos >= walk.end) return {0, -1};
  int index = pos / p.page_size;
  const int* entry = p.page_table + walk.row * p.table_stride + index;
  if (lane == 0 && index + kAhead < p.table_stride) prefetch(entry + kAhead);
  return {*entry, pos - index * p.page_size};
}

// Where a 16-byte piece of a token's row lies in it: permuted by the token, so that ldmatrix, which reads the same piece
// of eight tokens, meets eight different groups of banks; with e4m3 also four pieces of two tokens.
__device__ __forceinline__ int permute_piece(int token, int piece) {
  if constexpr (!kFloat8) return piece ^ (token % 8);
  int turn = token / 2 % 4;
  return piece ^ (kHeadDim >= 128 ? token % 2 * 4 + turn : turn);
}

// Start copying 16 tokens of a KV head.
__device__ __forceinline__ void copy_tokens(const Params& p, Lookup lookup, int kv_head, uint32_t stage) {
  constexpr int kPieces = kRowBytes / 16;
  int lane = threadIdx.x % 32;
  int slot = lookup.offset < 0 ? -1 : lookup.page * p.page_size + lookup.offset;
#pragma unroll
  for (int i = 0; i < kPieces / 2; i++) {
    int token = (i * 32 + lane) / kPieces, piece = lane % kPieces;
    int from = __shfl_sync(0xffffffffu, slot, token);
    uint32_t to = stage + token * kRowBytes + permute_piece(token, piece) * 16;
    int64_t offset = (int64_t(max(from, 0)) * kNumKV + kv_head) * kHeadDim + piece * int(16 / sizeof(Cached));
    copy_async(to, p.k + offset, from >= 0);
    copy_async(to + kPlane, p.v + offset, from >= 0);
  }
}

// A warp's ring of tiles: `start` fills it, `refill` copies tile j + kStages over tile j, which the warp has used.
template <typename P>
struct Loader {
  Walk walk;    // of the tile that `next` belongs to
  Lookup next;  // tile kStages + (tiles used so far)
  int count, kv_head;
  uint32_t ring;

  // Before pdl_wait (where there is p.fresh) only tiles without so many newest tokens of their sequence are read.
  __device__ void start(const Params& p) {
    Lookup lookups[P::kStages];
    bool newest[P::kStages];
    const int num_fresh = p.fresh == nullptr ? 0 : *p.fresh;
#pragma unroll
    for (int s = 0; s < P::kStages; s++) {
      lookups[s] = {0, -1};
      newest[s] = false;
      if (s >= count) continue;
      lookups[s] = look_up<P>(p, walk);
      newest[s] = walk.pos + P::kTile + num_fresh > walk.len;
      if (s + 1 < count) walk.advance(p, P::kTile);
    }
    next = {0, -1};
    if (count > P::kStages) next = look_up<P>(p, walk);
#pragma unroll
    for (int s = 0; s < P::kStages; s++) {
      if (newest[s]) pdl_wait();
      if (s < count) copy_tokens(p, lookups[s], kv_head, ring + s * kStageBytes);
      copy_commit();
    }
    pdl_wait();
  }

  // The oldest tile, copied and seen by every lane.
  __device__ __forceinline__ void wait() const {
    copy_wait<P::kStages - 1>();
    __syncwarp();
  }

  __device__ void refill(const Params& p, int used, int stage) {
    int tile = used + P::kStages;
    __syncwarp();  // every lane has read what is copied over
    if (tile < count) {
      copy_tokens(p, next, kv_head, ring + stage * kStageBytes);
      if (tile + 1 < count) {
        walk.advance(p, P::kTile);
        next = look_up<P>(p, walk);
      }
    }
    copy_commit();  // an empty group too: copy_wait counts them
  }
};

// The order of elements is free as long as keys have the same: e4m3 keys are read 16 of a lane at a time, for 4 steps.
struct Queries {
  uint32_t data[kNumTiles][kSteps][2];

  __device__ void load(const Params& p, int seq, int kv_head) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kNumTiles; n++) {
      int head = n * 8 + lane / 4;
      const Element* row = p.q + seq * p.q_stride + (kv_head * kGroup + head) * kHeadDim + lane % 4 * (kFloat8 ? 16 : 2);
#pragma unroll
      for (int i = 0; i < kSteps * 2; i++) {
        const Element* from = row + (kFloat8 ? i / 8 * 64 + i % 8 * 2 : i * 8);
        data[n][i / 2][i % 2] = head < kGroup ? *reinterpret_cast<const uint32_t*>(from) : 0;
      }
    }
  }
};

// Of the queries 8n + 2 (lane % 4) + {0, 1}: maximum, this lane's part of the sum (all of it once `add_up` was called),
// and output elements element_of(i, lane / 4, {0, 1}), not yet divided by the sum.
__device__ __forceinline__ int element_of(int step, int row, int half) {
  return step * 16 + (kFloat8 ? row * 2 + half : row + half * 8);
}

struct Accumulator {
  float max[kNumTiles][2];
  float sum[kNumTiles][2];
  float out[kNumTiles][kSteps][4];

  __device__ void reset() {
#pragma unroll
    for (int n = 0; n < kNumTiles; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) max[n][i] = -INFINITY, sum[n][i] = 0;
#pragma unroll
      for (int i = 0; i < kSteps * 4; i++) out[n][i / 4][i % 4] = 0;
    }
  }

  __device__ void add_up() {
#pragma unroll
    for (int n = 0; n < kNumTiles; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) sum[n][i] += __shfl_xor_sync(0xffffffffu, sum[n][i], offset);
      }
    }
  }

  // This lane's maxima and sums of a tile of queries, and its elements of a step.
  __device__ float4 stats(int n) const { return {max[n][0], sum[n][0], max[n][1], sum[n][1]}; }
  __device__ float4 piece(int n, int step) const {
    return {out[n][step][0], out[n][step][1], out[n][step][2], out[n][step][3]};
  }

  // Another accumulator over other tokens, given by functions like `stats` and `piece`. Both are added up.
  template <typename Stats, typename Piece>
  __device__ __forceinline__ void merge(Stats other_stats, Piece other_piece) {
#pragma unroll
    for (int n = 0; n < kNumTiles; n++) {
      float4 other = other_stats(n);
      float other_max[2] = {other.x, other.z}, other_sum[2] = {other.y, other.w}, mine[2], theirs[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float top = fmaxf(max[n][i], other_max[i]);
        mine[i] = max[n][i] == -INFINITY ? 0.f : exp2f(max[n][i] - top);
        theirs[i] = other_max[i] == -INFINITY ? 0.f : exp2f(other_max[i] - top);
        sum[n][i] = sum[n][i] * mine[i] + other_sum[i] * theirs[i];
        max[n][i] = top;
      }
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        float4 x = other_piece(n, step);
        float(&to)[4] = out[n][step];
        to[0] = to[0] * mine[0] + x.x * theirs[0], to[1] = to[1] * mine[1] + x.y * theirs[1];
        to[2] = to[2] * mine[0] + x.z * theirs[0], to[3] = to[3] * mine[1] + x.w * theirs[1];
      }
    }
  }
};

// Of e4m3 keys, 4 steps from `step` on: a lane has 16 bytes of two tokens.
__device__ __forceinline__ void score_bytes(float (&halves)[2][kNumTiles][4], const Queries& q, uint32_t keys, int step) {
  int token = threadIdx.x % 32 / 4, piece = step + threadIdx.x % 4;
  uint4 low = load_shared(keys + token * kRowBytes + permute_piece(token, piece) * 16);
  uint4 high = load_shared(keys + (token + 8) * kRowBytes + permute_piece(token, piece) * 16);
  uint32_t lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t a[4];
    widen<Element>(lows[i], a[0], a[2]);
    widen<Element>(highs[i], a[1], a[3]);
#pragma unroll
    for (int n = 0; n < kNumTiles; n++) mma(halves[i % 2][n], a, q.data[n][step + i]);
  }
}

// scores[n]: tokens lane / 4 + {0, 0, 8, 8}, queries 8n + 2 (lane % 4) + {0, 1, 0, 1}, in units of log2.
__device__ __forceinline__ void score(float (&scores)[kNumTiles][4], const Queries& q, uint32_t keys, float scale) {
  int lane = threadIdx.x % 32;
  float halves[2][kNumTiles][4] = {};  // two chains, for the latency of mma
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    if constexpr (kFloat8) {
      if (step % 4 == 0) score_bytes(halves, q, keys, step);
    } else {
      uint32_t a[4];
      load_matrix(a, keys + lane % 16 * kRowBytes + permute_piece(lane % 8, step * 2 + lane / 16) * 16);
#pragma unroll
      for (int n = 0; n < kNumTiles; n++) mma(halves[step % 2][n], a, q.data[n][step]);
    }
  }
#pragma unroll
  for (int n = 0; n < kNumTiles; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) scores[n][i] = (halves[0][n][i] + halves[1][n][i]) * scale;
  }
}

// Scores become weights relative to the new maximum; what was accumulated is scaled to it.
__device__ __forceinline__ void soften(float (&scores)[kNumTiles][4], Accumulator& acc, int num_valid) {
  int token = threadIdx.x % 32 / 4;
#pragma unroll
  for (int n = 0; n < kNumTiles; n++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float& low = scores[n][i];
      float& high = scores[n][i + 2];
      if (token >= num_valid) low = -INFINITY;
      if (token + 8 >= num_valid) high = -INFINITY;
      float top = fmaxf(acc.max[n][i], fmaxf(low, high));
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
      float shrink = exp2f(acc.max[n][i] - top);
      acc.max[n][i] = top;
      low = exp2f(low - top);
      high = exp2f(high - top);
      acc.sum[n][i] = acc.sum[n][i] * shrink + low + high;
#pragma unroll
      for (int step = 0; step < kSteps; step++) acc.out[n][step][i] *= shrink, acc.out[n][step][i + 2] *= shrink;
    }
  }
}

// num_valid of the 16 tokens at `keys` and `values` (shared memory, one KV head) belong to the sequence; at least one.
__device__ __forceinline__ void attend(Accumulator& acc, const Queries& q, uint32_t keys, uint32_t values,
                                       int num_valid, float scale) {
  float scores[kNumTiles][4];
  score(scores, q, keys, scale);
  soften(scores, acc, num_valid);
  uint32_t weights[kNumTiles][2];
#pragma unroll
  for (int n = 0; n < kNumTiles; n++) {
    weights[n][0] = transpose_8x8(pack(scores[n][0], scores[n][1]));
    weights[n][1] = transpose_8x8(pack(scores[n][2], scores[n][3]));
  }
  int lane = threadIdx.x % 32;
  uint32_t row = values + (lane % 8 + (kFloat8 ? lane / 8 % 2 : lane / 16) * 8) * kRowBytes;
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    uint32_t a[4], pairs[4];
    if constexpr (kFloat8) {  // a matrix of 2-byte units of two elements, for two steps: 8 tokens, 8 more, and again
      if (step % 2 == 0) load_matrix_transposed(pairs, row + permute_piece(lane % 8, step + lane / 16) * 16);
      widen_even<Element>(pairs[step % 2 * 2], a[0], a[1]);
      widen_even<Element>(pairs[step % 2 * 2 + 1], a[2], a[3]);
    } else {
      load_matrix_transposed(a, row + permute_piece(lane % 8, step * 2 + lane / 8 % 2) * 16);
    }
#pragma unroll
    for (int n = 0; n < kNumTiles; n++) mma(acc.out[n][step], a, weights[n]);
  }
}

// One query's result over some of the tokens, four elements of it: out / sum is attention over those tokens.
struct Part {
  float4 out{0, 0, 0, 0};
  float max = -INFINITY, sum = 0;

  __device__ void add(float4 other_out, float2 other_ml) {
    float top = fmaxf(max, other_ml.x);
    float mine = max == -INFINITY ? 0.f : exp2f(max - top);
    float other = other_ml.x == -INFINITY ? 0.f : exp2f(other_ml.x - top);
    out.x = out.x * mine + other_out.x * other;
    out.y = out.y * mine + other_out.y * other;
    out.z = out.z * mine + other_out.z * other;
    out.w = out.w * mine + other_out.w * other;
    sum = sum * mine + other_ml.y * other;
    max = top;
  }
};

}  // namespace
}  // namespace minisgl
