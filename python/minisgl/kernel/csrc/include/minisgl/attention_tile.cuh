// What one warp of a decode attention kernel does: copy a tile of tokens into shared memory, attend to 16 of them.
//
// For `src/attention_decode.cu` alone, which see; the shapes are macros that its build defines.
#pragma once

#include <minisgl/common.cuh>

#include <type_traits>

#ifndef ATTN_DTYPE
#define ATTN_DTYPE __nv_bfloat16
#define ATTN_HEAD_DIM 128
#define ATTN_NUM_KV 8
#define ATTN_GROUP 2
#endif

namespace minisgl {
namespace {

using Element = ATTN_DTYPE;
constexpr int kHeadDim = ATTN_HEAD_DIM;
constexpr int kNumKV = ATTN_NUM_KV;
constexpr int kGroup = ATTN_GROUP;
static_assert(kHeadDim == 64 || kHeadDim == 128, "head_dim is 64 or 128");
static_assert(kGroup >= 1 && kGroup <= 16 && kNumKV >= 1, "1 to 16 query heads per KV head");

constexpr int kNumTiles = (kGroup + 7) / 8;  // tensor-core tiles are 8 queries wide
constexpr int kSteps = kHeadDim / 16;        // and 16 elements deep
constexpr int kQuads = kHeadDim / 4;         // float4s of a head's output
constexpr int kMaxCluster = 16;

struct Params {
  const Element* q;  // [num_seqs, kNumKV * kGroup, kHeadDim], tokens q_stride elements apart
  const Element* k;  // [num_slots, kNumKV, kHeadDim]
  const Element* v;
  const int* page_table;  // rows table_stride entries apart
  const int* rows;        // [num_seqs]
  const int* seq_lens;    // [num_seqs]
  Element* out;           // [num_seqs, kNumKV * kGroup, kHeadDim]
  float4* partial;        // [blocks, 2, heads of a block, kQuads]; stream only, like the next two
  float2* partial_ml;     // [blocks, 2, heads of a block]: maximum, sum
  int* counters;          // [kNumKV, num_seqs], zero between launches
  int64_t q_stride;
  int64_t table_stride;
  int num_seqs;
  int page_size;
  int window;     // tokens that a query sees, itself included; 0: all
  float scale;    // of the scores, in units of log2
  bool early;     // see `attention_decode`
};

// What a block works on: kHeads KV heads, kWarps / kHeads warps for each, a ring of kStages tiles.
template <int kHeads_, int kWarps_, int kStages_>
struct Plan {
  static constexpr int kHeads = kHeads_, kWarps = kWarps_, kStages = kStages_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kShare = kWarps / kHeads;          // warps of a KV head: each takes 16 of the tile's tokens
  static constexpr int kTile = 16 * kShare;               // tokens
  static constexpr int kRowBytes = kHeads * kHeadDim * 2;
  static constexpr int kPlane = kTile * kRowBytes;        // keys, or values, of a tile
  static constexpr int kStageBytes = 2 * kPlane;
  static constexpr int kLookups = kTile / kWarps;         // tokens that a warp copies
  static_assert(kShare * kHeads == kWarps && kLookups >= 1 && kLookups <= 32);
  static_assert(kWarps * kGroup * kHeadDim * 4 <= kStageBytes, "partial results must fit a stage");
};

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, or zeros.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
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
  int lane = threadIdx.x % 32;
  int pos = walk.pos + int(threadIdx.x / 32) * P::kLookups + lane;
  if (lane >= P::kLookups || pos >= walk.end) return {0, -1};
  return {p.page_table[walk.row * p.table_stride + pos / p.page_size], pos % p.page_size};
}

// Start copying this warp's tokens of a tile. 16-byte pieces are permuted by their token so that ldmatrix, which reads
// the same piece of eight tokens, meets eight different groups of banks.
template <typename P>
__device__ __forceinline__ void copy_tokens(const Params& p, Lookup lookup, int first_head, uint32_t stage) {
  constexpr int kPieces = P::kRowBytes / 16, kHeadPieces = kHeadDim / 8;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int slot = lookup.offset < 0 ? -1 : lookup.page * p.page_size + lookup.offset;
#pragma unroll
  for (int i = 0; i < P::kLookups * kPieces / 32; i++) {
    int local = (i * 32 + lane) / kPieces, piece = (i * 32 + lane) % kPieces;
    int from = __shfl_sync(0xffffffffu, slot, local);
    int token = warp * P::kLookups + local;
    int permuted = piece / kHeadPieces * kHeadPieces + ((piece % kHeadPieces) ^ (token % 8));
    uint32_t to = stage + token * P::kRowBytes + permuted * 16;
    int64_t offset = (int64_t(max(from, 0)) * kNumKV + first_head) * kHeadDim + piece * 8;
    copy_async(to, p.k + offset, from >= 0);
    copy_async(to + P::kPlane, p.v + offset, from >= 0);
  }
}

// The ring of tiles: `start` fills it, `refill` copies tile j + kStages over tile j, which every warp has used.
template <typename P>
struct Loader {
  Walk walk;    // of the tile that `next` belongs to
  Lookup next;  // tile kStages + (tiles used so far)
  int count, first_head;
  uint32_t ring;

  // Before pdl_wait (where p.early) only tiles without their sequence's newest token are read.
  __device__ void start(const Params& p) {
    Lookup lookups[P::kStages];
    bool newest[P::kStages];
#pragma unroll
    for (int s = 0; s < P::kStages; s++) {
      lookups[s] = {0, -1};
      newest[s] = false;
      if (s >= count) continue;
      lookups[s] = look_up<P>(p, walk);
      newest[s] = walk.pos + P::kTile >= walk.len;
      if (s + 1 < count) walk.advance(p, P::kTile);
    }
    next = {0, -1};
    if (count > P::kStages) next = look_up<P>(p, walk);
#pragma unroll
    for (int s = 0; s < P::kStages; s++) {
      if (newest[s]) pdl_wait();
      if (s < count) copy_tokens<P>(p, lookups[s], first_head, ring + s * P::kStageBytes);
      copy_commit();
    }
    pdl_wait();
  }

  __device__ void refill(const Params& p, int used, int stage) {
    int tile = used + P::kStages;
    if (tile < count) {
      copy_tokens<P>(p, next, first_head, ring + stage * P::kStageBytes);
      if (tile + 1 < count) {
        walk.advance(p, P::kTile);
        next = look_up<P>(p, walk);
      }
    }
    copy_commit();  // an empty group too: copy_wait counts them
  }
};

struct Queries {
  uint32_t data[kNumTiles][kSteps][2];

  __device__ void load(const Params& p, int seq, int kv_head) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kNumTiles; n++) {
      int head = n * 8 + lane / 4;
      const Element* row = p.q + seq * p.q_stride + (kv_head * kGroup + head) * kHeadDim + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kSteps * 2; i++) {
        data[n][i / 2][i % 2] = head < kGroup ? *reinterpret_cast<const uint32_t*>(row + i * 8) : 0;
      }
    }
  }
};

// Of the queries 8n + 2 (lane % 4) + {0, 1}: maximum, this lane's part of the sum, and output elements
// 16i + lane / 4 + {0, 8}, not yet divided by the sum.
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
};

// scores[n]: tokens lane / 4 + {0, 0, 8, 8}, queries 8n + 2 (lane % 4) + {0, 1, 0, 1}, in units of log2.
template <typename P>
__device__ __forceinline__ void score(float (&scores)[kNumTiles][4], const Queries& q, uint32_t keys, float scale) {
  int lane = threadIdx.x % 32;
  uint32_t row = keys + lane % 16 * P::kRowBytes;
  float halves[2][kNumTiles][4] = {};  // two chains, for the latency of mma
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    uint32_t a[4];
    load_matrix(a, row + ((step * 2 + lane / 16) ^ (lane % 8)) * 16);
#pragma unroll
    for (int n = 0; n < kNumTiles; n++) mma(halves[step % 2][n], a, q.data[n][step]);
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
template <typename P>
__device__ __forceinline__ void attend(Accumulator& acc, const Queries& q, uint32_t keys, uint32_t values,
                                       int num_valid, float scale) {
  float scores[kNumTiles][4];
  score<P>(scores, q, keys, scale);
  soften(scores, acc, num_valid);
  uint32_t weights[kNumTiles][2];
#pragma unroll
  for (int n = 0; n < kNumTiles; n++) {
    weights[n][0] = transpose_8x8(pack(scores[n][0], scores[n][1]));
    weights[n][1] = transpose_8x8(pack(scores[n][2], scores[n][3]));
  }
  int lane = threadIdx.x % 32;
  uint32_t row = values + (lane % 8 + lane / 16 * 8) * P::kRowBytes;
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    uint32_t a[4];
    load_matrix_transposed(a, row + ((step * 2 + lane / 8 % 2) ^ (lane % 8)) * 16);
#pragma unroll
    for (int n = 0; n < kNumTiles; n++) mma(acc.out[n][step], a, weights[n]);
  }
}

}  // namespace
}  // namespace minisgl
