// Attention of one new token per sequence over the paged cache (decode), grouped-query, bf16 or fp16, on sm_90.
//
// Shapes are fixed at compile time: ATTN_DTYPE, ATTN_FP8 (1: the cache is e4m3), ATTN_HEAD_DIM (64, 128 or 256), ATTN_NUM_KV (heads on this rank), ATTN_GROUP
// (query heads per KV head, up to 16). Two kernels share the arithmetic:
//
//   stream   for many sequences. As many blocks as the GPU holds take equal shares of all tiles of tokens, whatever
//            sequence they belong to (the idea of stream-K, Osama et al. 2023). A sequence that lies in several shares
//            leaves partial results in a workspace, which the last of its blocks merges.
//   cluster  for few sequences. A thread-block cluster shares out the tokens of one (sequence, KV head) and merges
//            through distributed shared memory, which takes less time than a round trip through global memory.
//
// Each warp multiplies 16 tokens with one KV head's queries, transposed so that tokens, of which there are many, fill
// the long side of the tensor-core tile: S^T = K Q^T, then O^T = V^T P^T, with a running maximum (online softmax,
// Milakov and Gimelshein 2018). Keys and values arrive through a ring in shared memory, one for each warp, which copies
// what it will read: no barrier of the block holds back the copies of one warp while another merges. Tokens outside the
// sequence are filled with zeros there and masked, so no other request's NaN is ever multiplied.
//
// ATTN_WARPS and ATTN_BLOCKS shape the stream kernel: warps of a block, and blocks of an SM.
#include <minisgl/attention_tile.cuh>

#include <algorithm>
#include <cmath>

namespace minisgl {
namespace {

#ifndef ATTN_WARPS
#define ATTN_WARPS 8
#define ATTN_BLOCKS 1
#endif

// KV heads that a block of the stream kernel takes: the largest power of two that divides them all, up to its warps.
constexpr int kDivisor = kNumKV & -kNumKV;
constexpr int kStreamHeads = kDivisor < ATTN_WARPS ? kDivisor : ATTN_WARPS;
using Stream = Plan<kStreamHeads, ATTN_WARPS, ATTN_BLOCKS>;
using Cluster = Plan<1, 4, kHeadDim == 256 ? 1 : 2>;

// A warp's partial result in the workspace: [kNumTiles, kSteps, 8, kPairs], then stats [kNumTiles, 4].
constexpr int kPieceQuads = kNumTiles * kSteps * 8 * kPairs;
constexpr int kPartialQuads = kPieceQuads + kNumTiles * 4;
// Parts that are loaded at once, as registers allow.
constexpr int kMergeUnroll = std::max(1, (ATTN_WARPS * ATTN_BLOCKS > 8 ? 8 : kNumTiles > 1 ? 16 : 32) / (kNumTiles * kSteps));

struct alignas(16) StreamScratch {
  float4 stats[ATTN_WARPS * kNumTiles * 4];
};

struct alignas(16) ClusterScratch {
  float2 ml[Cluster::kWarps * kNumTiles * 8];  // maximum and sum of each warp's queries
  float4 recv[kGroup * kQuads];                // [rank][slice], what this block merges
  float2 recv_ml[kMaxCluster * kGroup];
};

template <typename P, typename Scratch>
constexpr int kSmemBytes = P::kWarps * P::kRingBytes + int(sizeof(Scratch));

// Output elements of head h are permuted in shared memory, so that the four queries of a warp's store differ in banks.
__device__ __forceinline__ int permute_out(int head, int element) { return element ^ (head / 2 % 4 * 8); }

// To shared memory: out [kGroup, kHeadDim] at the start of each warp's ring, ml [kWarps, kNumTiles * 8].
template <typename P>
__device__ __forceinline__ void spill(const Accumulator& acc, float* out, float2* ml) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < kNumTiles; n++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int head = n * 8 + lane % 4 * 2 + i;
      float sum = acc.sum[n][i];
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (lane < 4) ml[warp * kNumTiles * 8 + head] = {acc.max[n][i], sum};
      if (head >= kGroup) continue;
      float* row = out + warp * (P::kRingBytes / 4) + head * kHeadDim;
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        row[permute_out(head, element_of(step, lane / 4, 0))] = acc.out[n][step][i];
        row[permute_out(head, element_of(step, lane / 4, 1))] = acc.out[n][step][i + 2];
      }
    }
  }
}

// The warps of a block that has one KV head, together.
template <typename P>
__device__ __forceinline__ Part gather(const float* out, const float2* ml, int query, int quad) {
  Part part;
#pragma unroll
  for (int warp = 0; warp < P::kWarps; warp++) {
    const float* from = out + warp * (P::kRingBytes / 4) + query * kHeadDim + permute_out(query, quad * 4);
    part.add(*reinterpret_cast<const float4*>(from), ml[warp * kNumTiles * 8 + query]);
  }
  return part;
}

// Of a head's sum, whose weights are relative to `max`.
__device__ __forceinline__ float reciprocal(const Params& p, int head, float max, float sum) {
  if (p.sinks != nullptr) sum += exp2f(p.sinks[head] * 1.4426950408889634f - max);
  return sum > 0 ? 1.f / sum : sum == 0 ? 0.f : sum;  // no tokens: zeros; NaN stays visible
}

__device__ __forceinline__ void store_out(const Params& p, int seq, int head, int quad, const Part& part) {
  float scale = reciprocal(p, head, part.max, part.sum);
  Vec<Element, 4> x{from_float<Element>(part.out.x * scale), from_float<Element>(part.out.y * scale),
                    from_float<Element>(part.out.z * scale), from_float<Element>(part.out.w * scale)};
  int64_t index = (int64_t(seq) * kNumKV * kGroup + head) * kHeadDim + quad * 4;
  *reinterpret_cast<Vec<Element, 4>*>(p.out + index) = x;
}

// A block's share of the tiles [first, first + count), the sequence of its first tile, and that sequence's first tile.
struct Share {
  int size, first, count, seq, seq_first;
};

__device__ __forceinline__ int inclusive_scan(int x) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    int other = __shfl_up_sync(0xffffffffu, x, offset);
    if (int(threadIdx.x % 32) >= offset) x += other;
  }
  return x;
}

// Every warp finds it by itself: first which lane's run of sequences holds the tile, then which of these. Seen from the
// launch, all this is before the first copy begins, so it is as few loads after one another as can be.
template <typename P>
__device__ Share find_share(const Params& p) {
  int lane = threadIdx.x % 32, n = p.num_seqs;
  if (lane * 32 < n) prefetch_near(p.rows + lane * 32);
  int per_lane = (n + 31) / 32, begin = min(lane * per_lane, n), end = min(begin + per_lane, n);
  int tiles = 0;
#pragma unroll 8
  for (int i = begin; i < end; i++) tiles += tiles_of<P>(p, p.seq_lens[i]);
  int after = inclusive_scan(tiles);
  int total = __shfl_sync(0xffffffffu, after, 31);
  Share share{};
  share.size = (total + int(gridDim.x) - 1) / int(gridDim.x);
  share.first = int(blockIdx.x) * share.size;
  share.count = min(share.size, total - share.first);
  if (share.count <= 0) return share;
  int found = __ffs(__ballot_sync(0xffffffffu, after > share.first)) - 1;
  share.seq = found * per_lane;
  share.seq_first = __shfl_sync(0xffffffffu, after - tiles, found);
  for (;; share.seq += 32) {
    int index = share.seq + lane;
    tiles = index < n ? tiles_of<P>(p, p.seq_lens[index]) : 0;
    after = share.seq_first + inclusive_scan(tiles);
    unsigned beyond = __ballot_sync(0xffffffffu, after > share.first);
    found = beyond ? __ffs(beyond) - 1 : 31;
    share.seq_first = __shfl_sync(0xffffffffu, beyond ? after - tiles : after, found);
    if (!beyond) continue;
    share.seq += found;
    return share;
  }
}

// The warps of a KV head together, in the first of them. `ring`: this warp's; the stage is one that it has used, and is
// free again afterwards.
template <typename P>
__device__ __forceinline__ void combine(Accumulator& acc, StreamScratch& scratch, char* ring, int stage) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* pieces = reinterpret_cast<float4*>(ring + stage * kStageBytes) + lane;
  __syncwarp();  // every lane has read the stage
  if (warp % P::kShare > 0) {
#pragma unroll
    for (int i = 0; i < kNumTiles * kSteps; i++) pieces[i * 32] = acc.piece(i / kSteps, i % kSteps);
#pragma unroll
    for (int n = 0; n < kNumTiles; n++) {
      if (lane < 4) scratch.stats[(warp * kNumTiles + n) * 4 + lane] = acc.stats(n);
    }
  }
  group_barrier<P::kShare * 32>(warp / P::kShare);
  if (warp % P::kShare == 0) {
#pragma unroll 1
    for (int i = 1; i < P::kShare; i++) {
      const float4* stats = scratch.stats + (warp + i) * kNumTiles * 4 + lane % 4;
      const float4* from = pieces + i * (P::kRingBytes / 16);
      acc.merge([&](int n) { return stats[n * 4]; }, [&](int n, int step) { return from[(n * kSteps + step) * 32]; });
    }
  }
  group_barrier<P::kShare * 32>(warp / P::kShare);
}

// Where a block keeps a partial result: [0] of a sequence that begins in an earlier block, [1] in this one.
__device__ __forceinline__ float4* partial_of(const Params& p, int kv_head, int block, bool begins) {
  return p.partial + ((int64_t(kv_head) * gridDim.x + block) * 2 + begins) * kPartialQuads;
}

__device__ __forceinline__ void store_partial(const Accumulator& acc, float4* to) {
  int lane = threadIdx.x % 32, pair = lane % 4;
  if (pair < kPairs) {
#pragma unroll
    for (int i = 0; i < kNumTiles * kSteps; i++) {
      to[(i * 8 + lane / 4) * kPairs + pair] = acc.piece(i / kSteps, i % kSteps);
    }
  }
#pragma unroll
  for (int n = 0; n < kNumTiles; n++) {
    if (lane < 4) to[kPieceQuads + n * 4 + lane] = acc.stats(n);
  }
}

__device__ __forceinline__ void merge_partial(Accumulator& acc, const float4* from) {
  int lane = threadIdx.x % 32, pair = lane % 4;
  acc.merge([&](int n) { return __ldcg(from + kPieceQuads + n * 4 + pair); },
            [&](int n, int step) {
              float4 zero{0, 0, 0, 0};
              return pair < kPairs ? __ldcg(from + ((n * kSteps + step) * 8 + lane / 4) * kPairs + pair) : zero;
            });
}

// Pairs of queries become pairs of elements by transposing, so that four lanes write 16 bytes of a row.
__device__ __forceinline__ void store_heads(const Params& p, int seq, int kv_head, const Accumulator& acc) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kNumTiles; n++) {
    int query = n * 8 + lane / 4, head = kv_head * kGroup + n * 8 + lane % 4 * 2;  // that is written, and is divided here
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; i++) scale[i] = reciprocal(p, min(head + i, kNumKV * kGroup - 1), acc.max[n][i], acc.sum[n][i]);
    Element* row = p.out + ((int64_t(seq) * kNumKV + kv_head) * kGroup + query) * kHeadDim;
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const float(&of)[4] = acc.out[n][step];
      uint32_t low = transpose_8x8(pack(of[0] * scale[0], of[1] * scale[1]));
      uint32_t high = transpose_8x8(pack(of[2] * scale[0], of[3] * scale[1]));
      if (query >= kGroup) continue;
      if constexpr (kFloat8) {  // elements 4 (lane % 4) + {0, 2} and {1, 3}
        uint2 four{__byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632)};
        *reinterpret_cast<uint2*>(row + step * 16 + lane % 4 * 4) = four;
      } else {
        *reinterpret_cast<uint32_t*>(row + step * 16 + lane % 4 * 2) = low;
        *reinterpret_cast<uint32_t*>(row + step * 16 + 8 + lane % 4 * 2) = high;
      }
    }
  }
}

// One sequence's tiles within a block's share; the blocks that hold the sequence's first and last tile.
struct Segment {
  int seq, first_block, last_block;
};

// The warp has seen all its tokens of a sequence. Of the warps that share the sequence, that which arrives last merges
// them, in the order of the tokens.
__device__ __forceinline__ void end_segment(const Params& p, Accumulator& acc, int kv_head, Segment segment) {
  int num_others = segment.last_block - segment.first_block;
  if (num_others > 0) {
    store_partial(acc, partial_of(p, kv_head, blockIdx.x, segment.first_block == blockIdx.x));
    __threadfence();
    __syncwarp();
    int* counter = p.counters + kv_head * p.num_seqs + segment.seq;
    int arrived = threadIdx.x % 32 == 0 ? atomicAdd(counter, 1) : 0;
    if (__shfl_sync(0xffffffffu, arrived, 0) != num_others) return;
    __threadfence();
    if (threadIdx.x % 32 == 0) *counter = 0;  // for the next launch
    acc.reset();
#pragma unroll kMergeUnroll
    for (int block = segment.first_block; block <= segment.last_block; block++) {
      merge_partial(acc, partial_of(p, kv_head, block, block == segment.first_block));
    }
  }
  store_heads(p, segment.seq, kv_head, acc);
}

// Neither kernel triggers the next one before it ends. Blocks of a product that start beside these find some SMs full
// and others empty, and those that share an SM then read their weights at half the speed, while other SMs idle: 12 % of
// a step of a 14B model (docs/performance-log.md).
template <typename P>
__global__ void __launch_bounds__(P::kThreads, P::kBlocks) stream_kernel(const Params p) {
  extern __shared__ __align__(128) char smem[];
  auto& scratch = *reinterpret_cast<StreamScratch*>(smem + P::kWarps * P::kRingBytes);
  if (p.fresh == nullptr) pdl_wait();
  Share share = find_share<P>(p);
  if (share.count <= 0) return pdl_wait();
  int warp = threadIdx.x / 32, kv_head = blockIdx.y * P::kHeads + warp / P::kShare, token = warp % P::kShare * 16;
  Walk walk;
  walk.enter(p, share.seq);
  walk.pos += (share.first - share.seq_first) * P::kTile;
  char* ring = smem + warp * P::kRingBytes;
  Loader<P> loader{walk, {}, share.count, kv_head, smem_address(ring)};
  loader.start(p);

  Queries q;
  Accumulator acc;
  q.load(p, walk.seq, kv_head);
  acc.reset();
  for (int j = 0, stage = 0;; j++, stage = stage + 1 == P::kStages ? 0 : stage + 1) {
    loader.wait();
    uint32_t keys = loader.ring + stage * kStageBytes;
    int num_valid = walk.end - walk.pos - token;
    if (num_valid > 0) attend(acc, q, keys, keys + kPlane, num_valid, p.scale);
    bool last = j + 1 == share.count, ends = last || walk.pos + P::kTile >= walk.end;
    if (ends) {
      acc.add_up();
      if constexpr (P::kShare > 1) combine<P>(acc, scratch, ring, stage);
    }
    loader.refill(p, j, stage);
    if (!ends) {
      walk.pos += P::kTile;
      continue;
    }
    int seq_end = share.seq_first + tiles_of<P>(p, walk.len);
    Segment segment{walk.seq, share.seq_first / share.size, (seq_end - 1) / share.size};
    if (!last) {
      walk.advance(p, P::kTile);
      q.load(p, walk.seq, kv_head);
    }
    if (token == 0) end_segment(p, acc, kv_head, segment);
    if (last) break;
    share.seq_first = seq_end;
    acc.reset();
  }
}

// Each block sends every block of its cluster a slice of its result; each merges the slices it gets.
template <typename P>
__device__ void merge_cluster(const Params& p, ClusterScratch& scratch, const float* out, int rank, int num_ranks) {
  int slice = kGroup * kQuads / num_ranks;
  cluster_wait();  // every block has begun, so its shared memory exists
  for (int i = threadIdx.x; i < kGroup * kQuads; i += P::kThreads) {
    Part part = gather<P>(out, scratch.ml, i / kQuads, i % kQuads);
    store_remote(remote_address(&scratch.recv[rank * slice + i % slice], i / slice), part.out);
  }
  for (int i = threadIdx.x; i < kGroup * num_ranks; i += P::kThreads) {
    Part part = gather<P>(out, scratch.ml, i % kGroup, 0);
    store_remote(remote_address(&scratch.recv_ml[rank * kGroup + i % kGroup], i / kGroup),
                 make_float2(part.max, part.sum));
  }
  cluster_arrive();
  cluster_wait();
  for (int i = threadIdx.x; i < slice; i += P::kThreads) {
    int head = (rank * slice + i) / kQuads, quad = (rank * slice + i) % kQuads;
    Part part;
#pragma unroll 4
    for (int r = 0; r < num_ranks; r++) part.add(scratch.recv[r * slice + i], scratch.recv_ml[r * kGroup + head]);
    store_out(p, blockIdx.z, blockIdx.y * kGroup + head, quad, part);
  }
}

// Grid [blocks of a cluster, KV heads, sequences].
template <typename P>
__global__ void __launch_bounds__(P::kThreads, P::kBlocks) cluster_kernel(const Params p) {
  extern __shared__ __align__(128) char smem[];
  auto& scratch = *reinterpret_cast<ClusterScratch*>(smem + P::kWarps * P::kRingBytes);
  if (p.fresh == nullptr) pdl_wait();
  if (gridDim.x > 1) cluster_arrive();
  int warp = threadIdx.x / 32;
  Walk walk;
  walk.enter(p, blockIdx.z);
  int units = (walk.len - walk.pos + 15) / 16;  // as even as multiples of 16 tokens can be
  int per_rank = (units + int(gridDim.x) - 1) / int(gridDim.x) * 16;
  walk.pos += blockIdx.x * per_rank;
  walk.end = min(walk.len, walk.pos + per_rank);
  int count = max(0, (walk.end - walk.pos + P::kTile - 1) / P::kTile);
  Loader<P> loader{walk, {}, count, int(blockIdx.y), smem_address(smem) + warp * P::kRingBytes};
  loader.start(p);

  Queries q;
  Accumulator acc;
  q.load(p, walk.seq, blockIdx.y);
  acc.reset();
  for (int j = 0, stage = 0; j < count; j++, stage = stage + 1 == P::kStages ? 0 : stage + 1) {
    loader.wait();
    uint32_t keys = loader.ring + stage * kStageBytes;
    int num_valid = walk.end - walk.pos - warp * 16;
    if (num_valid > 0) attend(acc, q, keys, keys + kPlane, num_valid, p.scale);
    loader.refill(p, j, stage);
    walk.pos += P::kTile;
  }
  float* out = reinterpret_cast<float*>(smem);  // the rings are empty
  spill<P>(acc, out, scratch.ml);
  __syncthreads();
  if (gridDim.x > 1) return merge_cluster<P>(p, scratch, out, blockIdx.x, gridDim.x);
  for (int i = threadIdx.x; i < kGroup * kQuads; i += P::kThreads) {
    int head = i / kQuads, quad = i % kQuads;
    store_out(p, walk.seq, blockIdx.y * kGroup + head, quad, gather<P>(out, scratch.ml, head, quad));
  }
}

void check_inputs(TensorView q, TensorView k_cache, TensorView v_cache, TensorView page_table, TensorView rows,
                  TensorView seq_lens, TensorView out) {
  constexpr int kBits = 16, kCode = std::is_same_v<Element, __half> ? kDLFloat : kDLBfloat;
  for (const TensorView& t : {k_cache, v_cache}) {
    MINISGL_CHECK(kFloat8 ? t.dtype().bits == 8 : is_dtype(t, kCode, kBits)) << "the caches have another dtype";
  }
  MINISGL_CHECK(is_dtype(q, kCode, kBits) && is_dtype(out, kCode, kBits)) << "q and out have another dtype";
  for (const TensorView& t : {q, k_cache, v_cache, out}) {
    // The stride of a dimension of size 1 may be anything.
    MINISGL_CHECK(t.ndim() == 3 && t.size(2) == kHeadDim && t.stride(2) == 1 &&
                  (t.size(1) == 1 || t.stride(1) == kHeadDim))
        << "q, the caches and out are [n, heads, " << kHeadDim << "], dense but for q's first dimension";
    MINISGL_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0) << "unaligned tensor";
  }
  for (const TensorView& t : {k_cache, v_cache}) {
    MINISGL_CHECK(t.size(1) == kNumKV && (t.size(0) == 1 || t.stride(0) == kNumKV * kHeadDim))
        << "the caches are [num_slots, " << kNumKV << ", " << kHeadDim << "]";
  }
  int64_t n = q.size(0);
  MINISGL_CHECK(q.size(1) == kNumKV * kGroup && (n < 2 || q.stride(0) % 2 == 0));
  MINISGL_CHECK(out.size(0) == n && out.size(1) == q.size(1) && (n < 2 || out.stride(0) == q.size(1) * kHeadDim));
  MINISGL_CHECK(is_int32(page_table) && page_table.ndim() == 2 && page_table.stride(1) == 1);
  for (const TensorView& t : {rows, seq_lens}) {
    MINISGL_CHECK(is_int32(t) && t.ndim() == 1 && t.size(0) >= n && t.stride(0) == 1) << "rows, seq_lens: [n] int32";
  }
}

void allow_shared_memory(void (*kernel)(Params), int num_bytes) {
  MINISGL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes));
  MINISGL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
}

// Once per device, before the first launch and outside of graph capture.
void attention_decode_prepare() {
  allow_shared_memory(stream_kernel<Stream>, kSmemBytes<Stream, StreamScratch>);
  allow_shared_memory(cluster_kernel<Cluster>, kSmemBytes<Cluster, ClusterScratch>);
  auto* kernel = cluster_kernel<Cluster>;
  MINISGL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

// Blocks along x of the stream kernel: num_blocks is how many the GPU is to hold.
int64_t num_columns(int64_t num_blocks) { return std::max<int64_t>(1, num_blocks / (kNumKV / kStreamHeads)); }

// Elements of `partial` that the stream kernel needs.
int64_t attention_decode_workspace(int64_t num_blocks) {
  return num_columns(num_blocks) * kNumKV * 2 * kPartialQuads * 4;
}

// q [n, heads, head_dim] may be strided in its first dimension; caches [num_slots, kNumKV, head_dim]; page_table
// [requests, pages] int32; rows, seq_lens [n] int32, the new token counted; out [n, heads, head_dim], zeros where
// seq_lens is 0. partial (float32) and counters (int32, zero) are workspaces of the stream kernel. window: tokens that
// a query sees, itself included; 0 for all. cluster: blocks that share a sequence's KV head (a power of two up to 16),
// or 0 for the stream kernel with num_blocks blocks. sinks: [heads] float32, scores of no token.
//
// fresh: [1] int32: it, rows, seq_lens, page_table and the cache but for so many newest tokens of each sequence were written
// before the last launch without PDL, so they may be read while the kernels before this one still run; none: they were not.
void attention_decode(TensorView q, TensorView k_cache, TensorView v_cache, TensorView page_table, TensorView rows,
                      TensorView seq_lens, TensorView out, TensorView partial, TensorView counters, int64_t page_size,
                      int64_t window, tvm::ffi::Optional<TensorView> sinks, int64_t cluster, int64_t num_blocks,
                      tvm::ffi::Optional<TensorView> fresh) {
  check_inputs(q, k_cache, v_cache, page_table, rows, seq_lens, out);
  int num_seqs = static_cast<int>(q.size(0));
  MINISGL_CHECK(page_size > 0 && window >= 0);
  MINISGL_CHECK(!sinks.has_value() || (is_fp32(sinks.value()) && sinks.value().numel() == kNumKV * kGroup));
  MINISGL_CHECK(cluster >= 0 && cluster <= kMaxCluster && (cluster & (cluster - 1)) == 0) << "cluster: " << cluster;
  if (num_seqs == 0) return;
  Params p{};
  p.q = static_cast<const Element*>(q.data_ptr());
  p.k = static_cast<const Cached*>(k_cache.data_ptr());
  p.v = static_cast<const Cached*>(v_cache.data_ptr());
  p.page_table = static_cast<const int*>(page_table.data_ptr());
  p.rows = static_cast<const int*>(rows.data_ptr());
  p.seq_lens = static_cast<const int*>(seq_lens.data_ptr());
  p.out = static_cast<Element*>(out.data_ptr());
  p.q_stride = q.stride(0), p.table_stride = page_table.stride(0);
  p.num_seqs = num_seqs, p.page_size = static_cast<int>(page_size), p.window = static_cast<int>(window);
  p.scale = 1.4426950408889634f / sqrtf(float(kHeadDim));
  MINISGL_CHECK(!fresh.has_value() || (is_int32(fresh.value()) && fresh.value().numel() == 1));
  if (fresh.has_value()) p.fresh = static_cast<const int*>(fresh.value().data_ptr());
  if (sinks.has_value()) p.sinks = static_cast<const float*>(sinks.value().data_ptr());
  cudaStream_t stream = current_stream(q);
  if (cluster > 0) {
    LaunchConfig config{dim3(cluster, kNumKV, num_seqs), dim3(Cluster::kThreads), size_t(kSmemBytes<Cluster, ClusterScratch>)};
    config.cluster = static_cast<unsigned>(cluster);
    return launch(config, stream, cluster_kernel<Cluster>, p);
  }
  MINISGL_CHECK(is_fp32(partial) && partial.ndim() == 1 && partial.size(0) >= attention_decode_workspace(num_blocks))
      << "the workspace is too small";
  MINISGL_CHECK(is_int32(counters) && counters.ndim() == 1 && counters.size(0) >= int64_t(kNumKV) * num_seqs);
  p.partial = static_cast<float4*>(partial.data_ptr());
  p.counters = static_cast<int*>(counters.data_ptr());
  dim3 grid(static_cast<unsigned>(num_columns(num_blocks)), kNumKV / kStreamHeads);
  LaunchConfig config{grid, dim3(Stream::kThreads), size_t(kSmemBytes<Stream, StreamScratch>)};
  launch(config, stream, stream_kernel<Stream>, p);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_decode, minisgl::attention_decode);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_decode_workspace, minisgl::attention_decode_workspace);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_decode_prepare, minisgl::attention_decode_prepare);

}  // namespace minisgl
