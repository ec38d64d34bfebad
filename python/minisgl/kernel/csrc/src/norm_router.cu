// A norm and the router of a mixture of experts behind it, at once (Hopper). Compiled once per dtype (MINISGL_FP16).
//
// A cluster of blocks has some tokens, each block a share of their features: it finds its part of the sum of squares, and then
// of the logits, with the weights in shared memory. Both sums go through the shared memory of the cluster; each block then
// chooses the experts of its share of the tokens.
#include "minisgl/arguments.cuh"
#include "minisgl/async_copy.cuh"
#include "minisgl/routing.cuh"

namespace minisgl {
namespace {

constexpr int kRanks = 4;     // blocks of a cluster
constexpr int kTokens = 8;    // of a cluster at a time, a warp for each
constexpr int kMost = 32;     // experts
constexpr int kWarps = kTokens, kThreads = kWarps * 32;
constexpr int kMine = kTokens / kRanks;  // tokens whose experts a block chooses
constexpr int kVecs = 3;      // of 8 features, that a lane has at most
constexpr int kPitch = kMost + 4;        // of a token's logits, for the banks' sake

struct Args {
  const T* x;         // [n, hidden], rows `x_stride` apart
  const T* gain;      // [hidden]
  const T* weight;    // [num_experts, hidden]
  const T* bias;      // [num_experts], or null
  T* normed;          // [n, hidden]
  float* weights;     // [n, top_k]
  int* experts;       // [n, top_k]
  int64_t x_stride;
  float eps;
  int n, hidden, share, pitch, num_experts, top_k;  // share: features of a block; pitch: of rows in shared memory, bytes
  bool renormalize;
};

struct Scratch {
  float partial[kWarps][kTokens * kPitch];  // logits, by the warps' features
  float logits[kRanks][kMine][kMost];       // and by the blocks'
  float squares[kRanks][kTokens];
};

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// To the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ void store_at(const float* place, int rank, float x) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(place));
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

// This block's features of all experts, zeros beyond the last of either.
__device__ __forceinline__ void load_weights(const Args& args, uint32_t to, int first, int count) {
  int pieces = args.pitch / 16;
  for (int i = threadIdx.x; i < kMost * pieces; i += kThreads) {
    int expert = i / pieces, piece = i % pieces;
    bool inside = expert < args.num_experts && piece * 8 < count;
    cp_async_or_zero(to + i * 16, args.weight + (inside ? static_cast<int64_t>(expert) * args.hidden + first + piece * 8 : 0),
                     inside);
  }
  cp_async_commit();
}

// A lane's features of a token, to shared memory and, but for null, to `out`.
__device__ __forceinline__ void normalise(Vec<T, 8> (&x)[kVecs], const Vec<T, 8> (&gain)[kVecs],
                                          float scale, int count, char* shared, T* out) {
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    int at = (i * 32 + threadIdx.x % 32) * 8;
    if (at >= count) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float rounded = to_float(from_float<T>(to_float(x[i].data[j]) * scale));
      x[i].data[j] = from_float<T>(rounded * to_float(gain[i].data[j]));
    }
    *reinterpret_cast<Vec<T, 8>*>(shared + at * 2) = x[i];
    if (out != nullptr) *reinterpret_cast<Vec<T, 8>*>(out + at) = x[i];
  }
}

// A warp's steps of 32 features: sums of experts lane / 4 + {0, 0, 8, 8} and 16 more, tokens 2 (lane % 4) + {0, 1, 0, 1}.
__device__ __forceinline__ void multiply(uint32_t weights, uint32_t x, int pitch, float (&sums)[2][4]) {
  int lane = threadIdx.x % 32;
  uint32_t at = lane / 4 * pitch + lane % 4 * 16;
  for (int step = threadIdx.x / 32; step * 64 < pitch - 63; step += kWarps) {
    uint4 b = load_shared(x + at + step * 64);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint4 low = load_shared(weights + at + m * 16 * pitch + step * 64);
      uint4 high = load_shared(weights + at + (m * 16 + 8) * pitch + step * 64);
      mma(sums[m], low.x, high.x, low.y, high.y, b.x, b.y);
      mma(sums[m], low.z, high.z, low.w, high.w, b.z, b.w);
    }
  }
}

// The block's part of all logits, to who chooses: warps have parts of them.
__device__ __forceinline__ void share_logits(Scratch& scratch, const float (&sums)[2][4], int rank) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int expert = i / 4 * 16 + i % 4 / 2 * 8 + lane / 4, token = lane % 4 * 2 + i % 2;
    scratch.partial[warp][token * kPitch + expert] = sums[i / 4][i % 4];
  }
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += scratch.partial[i][warp * kPitch + lane];
  store_at(&scratch.logits[rank][warp % kMine][lane], warp / kMine, total);
}

__device__ __forceinline__ void choose(const Args& args, const Scratch& scratch, int mine, int token) {
  int lane = threadIdx.x % 32;
  uint32_t keys[1] = {0};
  if (lane < args.num_experts) {
    float logit = args.bias == nullptr ? 0.f : to_float(args.bias[lane]);
#pragma unroll
    for (int r = 0; r < kRanks; ++r) logit += scratch.logits[r][mine][lane];
    keys[0] = key_of(to_float(from_float<T>(logit)));  // as if logits were written
  }
  Choice choice = choose_by_keys<kMost>(keys, args.num_experts, args.top_k, args.renormalize);
  if (lane >= args.top_k) return;
  args.weights[token * args.top_k + lane] = choice.weight, args.experts[token * args.top_k + lane] = choice.expert;
}

__global__ void __launch_bounds__(kThreads) norm_router_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(16) char smem[];
  __shared__ Scratch scratch;
  int rank = blockIdx.x % kRanks, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int first = rank * args.share, count = max(0, min(args.share, args.hidden - first));
  uint32_t x_tile = static_cast<uint32_t>(__cvta_generic_to_shared(smem)), weights = x_tile + kTokens * args.pitch;
  cluster_arrive();
  load_weights(args, weights, first, count);
  for (int i = count / 8 + lane; i < args.pitch / 16; i += 32) {
    *reinterpret_cast<uint4*>(smem + warp * args.pitch + i * 16) = make_uint4(0, 0, 0, 0);
  }
  Vec<T, 8> gain[kVecs]{};
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    int at = (i * 32 + lane) * 8;
    if (at < count) gain[i] = load_vec(args.gain + first + at);
  }
  pdl_wait();
  pdl_trigger();
  cluster_wait();  // all blocks have begun, so that there is their shared memory
  for (int begin = blockIdx.x / kRanks * kTokens; begin < args.n; begin += gridDim.x / kRanks * kTokens) {
    int token = begin + warp;
    const T* row = args.x + token * args.x_stride + first;
    Vec<T, 8> x[kVecs]{};
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      int at = (i * 32 + lane) * 8;
      if (at >= count || token >= args.n) continue;
      x[i] = load_vec(row + at);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares += to_float(x[i].data[j]) * to_float(x[i].data[j]);
    }
    squares = warp_sum(squares);
    if (lane < kRanks) store_at(&scratch.squares[rank][warp], lane, squares);
    cluster_arrive();
    cluster_wait();
    squares = 0.f;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) squares += scratch.squares[r][warp];
    normalise(x, gain, rsqrtf(squares / args.hidden + args.eps), count, smem + warp * args.pitch,
              token < args.n ? args.normed + static_cast<int64_t>(token) * args.hidden + first : nullptr);
    cp_async_wait<0>();
    __syncthreads();
    float sums[2][4] = {};
    multiply(weights, x_tile, args.pitch, sums);
    share_logits(scratch, sums, rank);
    cluster_arrive();
    cluster_wait();
    token = begin + rank * kMine + warp;
    if (warp < kMine && token < args.n) choose(args, scratch, warp, token);
  }
}

// normed = norm(x) * gain; of each token's logits, normed weightᵀ + bias, the weights and numbers of its most probable experts,
// [n, top_k]. x: [n, hidden], rows perhaps apart; weight: [num_experts, hidden], 32 at most; hidden: a multiple of 8, 3,072
// at most.
void norm_router(TensorView x, TensorView gain, double eps, TensorView weight, Optional<TensorView> bias,
                 TensorView normed, TensorView weights, TensorView experts, bool renormalize) {
  int64_t n = x.size(0), hidden = x.size(1), num_experts = weight.size(0), top_k = weights.size(1);
  if (n == 0) return;
  check_rows(x);
  MINISGL_CHECK(hidden % 8 == 0 && hidden <= kRanks * kVecs * 256 && num_experts <= kMost && n < (1 << 26));
  MINISGL_CHECK(is_fp32(weights) && is_int32(experts) && top_k <= num_experts);
  check_matrix(weights, n, top_k);
  check_matrix(experts, n, top_k);
  int share = static_cast<int>((hidden / 8 + kRanks - 1) / kRanks * 8), units = (share + 31) / 32 * 4;
  Args args{data_of(x),
            vector_of(gain, hidden),
            matrix_of(weight, num_experts, hidden),
            vector_of(bias, num_experts),
            const_cast<T*>(matrix_of(normed, n, hidden)),
            static_cast<float*>(weights.data_ptr()),
            static_cast<int*>(experts.data_ptr()),
            x.stride(0),
            static_cast<float>(eps),
            static_cast<int>(n),
            static_cast<int>(hidden),
            share,
            (units % 8 == 0 ? units + 4 : units) * 16,
            static_cast<int>(num_experts),
            static_cast<int>(top_k),
            renormalize};
  static bool prepared[64] = {};
  int bytes = (kMost + kTokens) * args.pitch;
  allow_shared(norm_router_kernel, (kMost + kTokens) * (kVecs * 512 + 64), x.device().device_id, prepared);
  LaunchConfig config;
  int64_t clusters = (n + kTokens - 1) / kTokens, most = sm_count(x.device().device_id) * 2 / kRanks;
  config.grid = dim3(static_cast<unsigned>((clusters < most ? clusters : most) * kRanks));
  config.block = dim3(kThreads);
  config.smem = bytes;
  config.cluster = kRanks;
  launch(config, current_stream(x), norm_router_kernel, args);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_router, minisgl::norm_router);

}  // namespace minisgl
