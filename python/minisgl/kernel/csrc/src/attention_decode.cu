// Attention of one new token per sequence over the paged cache (decode), grouped-query, bf16 or fp16, on sm_90.
//
// Shapes are fixed at compile time: ATTN_DTYPE, ATTN_HEAD_DIM (64 or 128), ATTN_NUM_KV (heads on this rank), ATTN_GROUP
// (query heads per KV head, up to 16). Two kernels share the arithmetic:
//
//   stream   for many sequences. One block per SM takes an equal share of all tiles of tokens, whatever sequence they
//            belong to (the idea of stream-K, Osama et al. 2023). A sequence that lies in several shares leaves partial
//            results in a workspace, which the last of its blocks merges.
//   cluster  for few sequences. A thread-block cluster shares out the tokens of one (sequence, KV head) and merges
//            through distributed shared memory, which takes less time than a round trip through global memory.
//
// Each warp multiplies 16 tokens with one KV head's queries, transposed so that tokens, of which there are many, fill
// the long side of the tensor-core tile: S^T = K Q^T, then O^T = V^T P^T, with a running maximum (online softmax,
// Milakov and Gimelshein 2018). Keys and values arrive through a ring in shared memory; tokens outside the sequence are
// filled with zeros there and masked, so no other request's NaN is ever multiplied.
#include <minisgl/attention_tile.cuh>

#include <algorithm>
#include <cmath>

namespace minisgl {
namespace {

// KV heads that a block of 8 warps takes: the largest power of two that divides them all.
constexpr int kStreamHeads = kNumKV % 8 == 0 ? 8 : kNumKV % 4 == 0 ? 4 : kNumKV % 2 == 0 ? 2 : 1;
using Stream = Plan<kStreamHeads, 8, kHeadDim == 128 ? 3 : 6>;
using Cluster = Plan<1, 4, kHeadDim == 128 ? 2 : 4>;

template <typename P>
struct alignas(16) Scratch {
  float2 ml[P::kWarps * kNumTiles * 8];  // maximum and sum of each warp's queries
  float4 recv[kGroup * kQuads];          // cluster: [rank][slice], what this block merges
  float2 recv_ml[kMaxCluster * kGroup];
  int scan[P::kWarps];
  int found[2];
  int is_last;
};

template <typename P>
constexpr int kSmemBytes = P::kStages * P::kStageBytes + int(sizeof(Scratch<P>)) + 128;

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

// Output elements of head h are permuted in shared memory, so that the four queries of a warp's store differ in banks.
__device__ __forceinline__ int permute_out(int head, int element) { return element ^ (head / 2 % 4 * 8); }

// To shared memory: out [kWarps, kGroup, kHeadDim], ml [kWarps, kNumTiles * 8].
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
      float* row = out + (warp * kGroup + head) * kHeadDim;
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        row[permute_out(head, step * 16 + lane / 4)] = acc.out[n][step][i];
        row[permute_out(head, step * 16 + lane / 4 + 8)] = acc.out[n][step][i + 2];
      }
    }
  }
}

// The warps of a KV head together. head: of the block's kHeads * kGroup query heads.
template <typename P>
__device__ __forceinline__ Part gather(const float* out, const float2* ml, int head, int quad) {
  int query = head % kGroup;
  Part part;
#pragma unroll
  for (int i = 0; i < P::kShare; i++) {
    int warp = head / kGroup * P::kShare + i;
    const float* from = out + (warp * kGroup + query) * kHeadDim + permute_out(query, quad * 4);
    part.add(*reinterpret_cast<const float4*>(from), ml[warp * kNumTiles * 8 + query]);
  }
  return part;
}

__device__ __forceinline__ void store_out(const Params& p, int seq, int head, int quad, const Part& part) {
  float scale = part.sum > 0 ? 1.f / part.sum : part.sum == 0 ? 0.f : part.sum;  // NaN stays visible
  Vec<Element, 4> x{from_float<Element>(part.out.x * scale), from_float<Element>(part.out.y * scale),
                    from_float<Element>(part.out.z * scale), from_float<Element>(part.out.w * scale)};
  int64_t index = (int64_t(seq) * kNumKV * kGroup + head) * kHeadDim + quad * 4;
  *reinterpret_cast<Vec<Element, 4>*>(p.out + index) = x;
}

// A block's share of the tiles [first, first + count), the sequence of its first tile, and that sequence's first tile.
struct Share {
  int size, first, count, seq, seq_first;
};

template <typename P>
__device__ Share find_share(const Params& p, Scratch<P>& scratch) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int per_thread = (p.num_seqs + P::kThreads - 1) / P::kThreads;
  int begin = min(int(threadIdx.x) * per_thread, p.num_seqs), end = min(begin + per_thread, p.num_seqs);
  int tiles = 0;
  for (int i = begin; i < end; i++) tiles += tiles_of<P>(p, p.seq_lens[i]);
  int before = tiles;  // inclusive scan of the warp, then made exclusive
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    int other = __shfl_up_sync(0xffffffffu, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == 31) scratch.scan[warp] = before;
  before -= tiles;
  __syncthreads();
  int total = 0;
#pragma unroll
  for (int i = 0; i < P::kWarps; i++) {
    if (i < warp) before += scratch.scan[i];
    total += scratch.scan[i];
  }
  Share share;
  share.size = (total + gridDim.x - 1) / gridDim.x;
  share.first = blockIdx.x * share.size;
  share.count = min(share.size, total - share.first);
  if (before <= share.first && share.first < before + tiles) {
    for (int i = begin; i < end; i++) {
      int next = before + tiles_of<P>(p, p.seq_lens[i]);
      if (share.first < next) {
        scratch.found[0] = i, scratch.found[1] = before;
        break;
      }
      before = next;
    }
  }
  __syncthreads();
  share.seq = scratch.found[0], share.seq_first = scratch.found[1];
  return share;
}

// Where a block keeps a partial result: [0] of a sequence that begins in an earlier block, [1] in this one.
template <typename P>
__device__ __forceinline__ int64_t partial_row(int block, bool begins, int head) {
  return ((int64_t(blockIdx.y) * gridDim.x + block) * 2 + begins) * (P::kHeads * kGroup) + head;
}

// The block that arrives last merges the sequence's parts, in the order of its tokens.
template <typename P>
__device__ void merge_blocks(const Params& p, Scratch<P>& scratch, int seq, int first_block, int last_block) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* counter = p.counters + blockIdx.y * p.num_seqs + seq;
    scratch.is_last = atomicAdd(counter, 1) == last_block - first_block;
    if (scratch.is_last) *counter = 0;  // for the next launch
  }
  __syncthreads();
  if (!scratch.is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i < P::kHeads * kGroup * kQuads; i += P::kThreads) {
    int head = i / kQuads, quad = i % kQuads;
    Part part;
#pragma unroll 4
    for (int block = first_block; block <= last_block; block++) {
      int64_t row = partial_row<P>(block, block == first_block, head);
      part.add(__ldcg(p.partial + row * kQuads + quad), __ldcg(p.partial_ml + row));
    }
    store_out(p, seq, blockIdx.y * P::kHeads * kGroup + head, quad, part);
  }
}

// The block has seen all its tokens of a sequence. `out`: a stage of the ring that nobody uses. All warps have passed a
// barrier since they read it, and pass another before it is filled again.
template <typename P>
__device__ void end_sequence(const Params& p, Scratch<P>& scratch, float* out, const Accumulator& acc, int seq,
                             int first_block, int last_block) {
  spill(acc, out, scratch.ml);
  __syncthreads();
  bool whole = first_block == last_block, begins = first_block == blockIdx.x;
  for (int i = threadIdx.x; i < P::kHeads * kGroup * kQuads; i += P::kThreads) {
    int head = i / kQuads, quad = i % kQuads;
    Part part = gather<P>(out, scratch.ml, head, quad);
    if (whole) {
      store_out(p, seq, blockIdx.y * P::kHeads * kGroup + head, quad, part);
    } else {
      int64_t row = partial_row<P>(blockIdx.x, begins, head);
      p.partial[row * kQuads + quad] = part.out;
      if (quad == 0) p.partial_ml[row] = {part.max, part.sum};
    }
  }
  if (!whole) merge_blocks<P>(p, scratch, seq, first_block, last_block);
  __syncthreads();
}

template <typename P>
__global__ void __launch_bounds__(P::kThreads, 1) stream_kernel(const Params p) {
  extern __shared__ __align__(128) char smem[];
  auto& scratch = *reinterpret_cast<Scratch<P>*>(smem + P::kStages * P::kStageBytes);
  if (!p.early) pdl_wait();
  pdl_trigger();
  Share share = find_share<P>(p, scratch);
  if (share.count <= 0) return pdl_wait();
  int warp = threadIdx.x / 32, kv_head = blockIdx.y * P::kHeads + warp / P::kShare, token = warp % P::kShare * 16;
  Walk walk;
  walk.enter(p, share.seq);
  walk.pos += (share.first - share.seq_first) * P::kTile;
  Loader<P> loader{walk, {}, share.count, int(blockIdx.y) * P::kHeads, smem_address(smem)};
  loader.start(p);

  Queries q;
  Accumulator acc;
  q.load(p, walk.seq, kv_head);
  acc.reset();
  for (int j = 0, stage = 0; j < share.count; j++, stage = stage + 1 == P::kStages ? 0 : stage + 1) {
    copy_wait<P::kStages - 1>();
    __syncthreads();
    uint32_t keys = loader.ring + stage * P::kStageBytes + token * P::kRowBytes + warp / P::kShare * kHeadDim * 2;
    int num_valid = walk.end - walk.pos - token;
    if (num_valid > 0) attend<P>(acc, q, keys, keys + P::kPlane, num_valid, p.scale);
    __syncthreads();
    bool ends = walk.pos + P::kTile >= walk.end, last = j + 1 == share.count;
    if (ends || last) {
      int seq_last = share.seq_first + tiles_of<P>(p, walk.len) - 1;
      end_sequence<P>(p, scratch, reinterpret_cast<float*>(smem + stage * P::kStageBytes), acc, walk.seq,
                      share.seq_first / share.size, seq_last / share.size);
      share.seq_first = seq_last + 1;
    }
    loader.refill(p, j, stage);
    if (last) break;
    walk.advance(p, P::kTile);
    if (!ends) continue;
    q.load(p, walk.seq, kv_head);
    acc.reset();
  }
}

// Each block sends every block of its cluster a slice of its result; each merges the slices it gets.
template <typename P>
__device__ void merge_cluster(const Params& p, Scratch<P>& scratch, const float* out, int rank, int num_ranks) {
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
__global__ void __launch_bounds__(P::kThreads) cluster_kernel(const Params p) {
  extern __shared__ __align__(128) char smem[];
  auto& scratch = *reinterpret_cast<Scratch<P>*>(smem + P::kStages * P::kStageBytes);
  if (!p.early) pdl_wait();
  pdl_trigger();
  if (gridDim.x > 1) cluster_arrive();
  int token = threadIdx.x / 32 * 16;
  Walk walk;
  walk.enter(p, blockIdx.z);
  int units = (walk.len - walk.pos + 15) / 16;  // as even as multiples of 16 tokens can be
  int per_rank = (units + int(gridDim.x) - 1) / int(gridDim.x) * 16;
  walk.pos += blockIdx.x * per_rank;
  walk.end = min(walk.len, walk.pos + per_rank);
  int count = max(0, (walk.end - walk.pos + P::kTile - 1) / P::kTile);
  Loader<P> loader{walk, {}, count, int(blockIdx.y), smem_address(smem)};
  loader.start(p);

  Queries q;
  Accumulator acc;
  q.load(p, walk.seq, blockIdx.y);
  acc.reset();
  for (int j = 0, stage = 0; j < count; j++, stage = stage + 1 == P::kStages ? 0 : stage + 1) {
    copy_wait<P::kStages - 1>();
    __syncthreads();
    uint32_t keys = loader.ring + stage * P::kStageBytes + token * P::kRowBytes;
    int num_valid = walk.end - walk.pos - token;
    if (num_valid > 0) attend<P>(acc, q, keys, keys + P::kPlane, num_valid, p.scale);
    __syncthreads();
    loader.refill(p, j, stage);
    walk.pos += P::kTile;
  }
  float* out = reinterpret_cast<float*>(smem);  // the ring is empty
  spill(acc, out, scratch.ml);
  __syncthreads();
  if (gridDim.x > 1) return merge_cluster<P>(p, scratch, out, blockIdx.x, gridDim.x);
  for (int i = threadIdx.x; i < kGroup * kQuads; i += P::kThreads) {
    store_out(p, walk.seq, blockIdx.y * kGroup + i / kQuads, i % kQuads, gather<P>(out, scratch.ml, i / kQuads, i % kQuads));
  }
}

void check_inputs(TensorView q, TensorView k_cache, TensorView v_cache, TensorView page_table, TensorView rows,
                  TensorView seq_lens, TensorView out) {
  constexpr int kBits = 16, kCode = std::is_same_v<Element, __half> ? kDLFloat : kDLBfloat;
  for (const TensorView& t : {q, k_cache, v_cache, out}) {
    MINISGL_CHECK(is_dtype(t, kCode, kBits)) << "q, the caches and out must have the dtype of this build";
    MINISGL_CHECK(t.ndim() == 3 && t.size(2) == kHeadDim && t.stride(2) == 1 && t.stride(1) == kHeadDim)
        << "q, the caches and out are [n, heads, " << kHeadDim << "], dense but for q's first dimension";
    MINISGL_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0) << "unaligned tensor";
  }
  for (const TensorView& t : {k_cache, v_cache}) {
    MINISGL_CHECK(t.size(1) == kNumKV && t.stride(0) == kNumKV * kHeadDim) << "the caches have " << kNumKV << " heads";
  }
  int64_t n = q.size(0);
  MINISGL_CHECK(q.size(1) == kNumKV * kGroup && q.stride(0) % 2 == 0);
  MINISGL_CHECK(out.size(0) == n && out.size(1) == q.size(1) && (n < 2 || out.stride(0) == q.size(1) * kHeadDim));
  MINISGL_CHECK(is_int32(page_table) && page_table.ndim() == 2 && page_table.stride(1) == 1);
  for (const TensorView& t : {rows, seq_lens}) {
    MINISGL_CHECK(is_int32(t) && t.ndim() == 1 && t.size(0) >= n && t.stride(0) == 1) << "rows, seq_lens: [n] int32";
  }
}

// Once per device, before the first launch and outside of graph capture.
void attention_decode_prepare() {
  MINISGL_CUDA_CHECK(
      cudaFuncSetAttribute(stream_kernel<Stream>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes<Stream>));
  MINISGL_CUDA_CHECK(
      cudaFuncSetAttribute(cluster_kernel<Cluster>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes<Cluster>));
  MINISGL_CUDA_CHECK(cudaFuncSetAttribute(cluster_kernel<Cluster>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

// q [n, heads, head_dim] may be strided in its first dimension; caches [num_slots, kNumKV, head_dim]; page_table
// [requests, pages] int32; rows, seq_lens [n] int32, tokens including the new one; out [n, heads, head_dim], zeros where
// seq_lens is 0. partial (float32) and counters (int32, zero) are workspaces of the stream kernel. window: tokens that
// a query sees, itself included; 0 for all. cluster: blocks that share a sequence's KV head (a power of two up to 16),
// or 0 for the stream kernel with num_blocks blocks.
//
// early: rows, seq_lens, page_table and the cache but for each sequence's newest token were written before the last
// launch without PDL, so they may be read while the kernels before this one still run.
void attention_decode(TensorView q, TensorView k_cache, TensorView v_cache, TensorView page_table, TensorView rows,
                      TensorView seq_lens, TensorView out, TensorView partial, TensorView counters, int64_t page_size,
                      int64_t window, int64_t cluster, int64_t num_blocks, bool early) {
  check_inputs(q, k_cache, v_cache, page_table, rows, seq_lens, out);
  int num_seqs = static_cast<int>(q.size(0));
  MINISGL_CHECK(page_size > 0 && window >= 0);
  MINISGL_CHECK(cluster >= 0 && cluster <= kMaxCluster && (cluster & (cluster - 1)) == 0) << "cluster: " << cluster;
  if (num_seqs == 0) return;
  Params p{};
  p.q = static_cast<const Element*>(q.data_ptr());
  p.k = static_cast<const Element*>(k_cache.data_ptr());
  p.v = static_cast<const Element*>(v_cache.data_ptr());
  p.page_table = static_cast<const int*>(page_table.data_ptr());
  p.rows = static_cast<const int*>(rows.data_ptr());
  p.seq_lens = static_cast<const int*>(seq_lens.data_ptr());
  p.out = static_cast<Element*>(out.data_ptr());
  p.q_stride = q.stride(0), p.table_stride = page_table.stride(0);
  p.num_seqs = num_seqs, p.page_size = static_cast<int>(page_size), p.window = static_cast<int>(window);
  p.scale = 1.4426950408889634f / sqrtf(float(kHeadDim));
  p.early = early;
  cudaStream_t stream = current_stream(q);
  if (cluster > 0) {
    LaunchConfig config{dim3(cluster, kNumKV, num_seqs), dim3(Cluster::kThreads), size_t(kSmemBytes<Cluster>)};
    config.cluster = static_cast<unsigned>(cluster);
    return launch(config, stream, cluster_kernel<Cluster>, p);
  }
  constexpr int kHeadBlocks = kNumKV / kStreamHeads;
  int64_t columns = std::max<int64_t>(1, num_blocks / kHeadBlocks), rows_of_block = kStreamHeads * kGroup;
  int64_t partial_rows = columns * kHeadBlocks * 2 * rows_of_block;
  MINISGL_CHECK(is_fp32(partial) && partial.ndim() == 1 && partial.size(0) >= partial_rows * (kHeadDim + 2))
      << "the workspace is too small";
  MINISGL_CHECK(is_int32(counters) && counters.ndim() == 1 && counters.size(0) >= kHeadBlocks * num_seqs);
  p.partial = static_cast<float4*>(partial.data_ptr());
  p.partial_ml = reinterpret_cast<float2*>(p.partial + partial_rows * kQuads);
  p.counters = static_cast<int*>(counters.data_ptr());
  LaunchConfig config{dim3(columns, kHeadBlocks), dim3(Stream::kThreads), size_t(kSmemBytes<Stream>)};
  launch(config, stream, stream_kernel<Stream>, p);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_decode, minisgl::attention_decode);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_decode_prepare, minisgl::attention_decode_prepare);

}  // namespace minisgl
