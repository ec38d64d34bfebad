// Gated DeltaNet (arXiv 2412.06464) between its projections, but for the products of chunks, which
// kernel/triton/delta.py computes.
//
//   tokens   a sequence's only token, all of it at once: convolution, gates, rule, norm. It is bound by reading and
//            writing states, which it does once. Of longer sequences it brings the convolution's state up to date,
//            once all else has read it.
//   convolve convolved queries, keys and values, and gates, of all tokens.
//   finish   the norm of what chunks have given, and its gate.
//
// Shapes are fixed at compile time: DELTA_DTYPE, DELTA_NUM_K and DELTA_NUM_V (heads on this rank), DELTA_DIM_K,
// DELTA_DIM_V (a multiple of 4), DELTA_WIDTH (tokens that the convolution spans). All is computed in float32.
#include <minisgl/common.cuh>

#include <algorithm>

namespace minisgl {
namespace {

#ifndef DELTA_DTYPE
#define DELTA_DTYPE __nv_bfloat16
#define DELTA_NUM_K 16
#define DELTA_NUM_V 32
#define DELTA_DIM_K 128
#define DELTA_DIM_V 128
#define DELTA_WIDTH 4
#endif

#ifndef DELTA_WARPS
#define DELTA_WARPS 8
#endif

using Element = DELTA_DTYPE;
constexpr int kNumK = DELTA_NUM_K, kNumV = DELTA_NUM_V, kDimK = DELTA_DIM_K, kDimV = DELTA_DIM_V;
constexpr int kBefore = DELTA_WIDTH - 1;  // tokens that the convolution remembers
constexpr int kGroup = kNumV / kNumK;     // heads of values that share one of keys
constexpr int kKeys = kNumK * kDimK, kValues = kNumV * kDimV, kChannels = 2 * kKeys + kValues;
static_assert(kNumV % kNumK == 0 && kDimV % 4 == 0 && kBefore > 0);

constexpr int kRows = (kDimK + 7) / 8;     // of the state, in a lane's registers
constexpr int kShares = (kDimV + 15) / 16;  // of a head's state: 16 columns, for a warp
// Warps of a block of `tokens`: as many as there are shares where there are few sequences, otherwise fewer, so that an
// SM has other blocks whose states are on their way while one computes.
constexpr unsigned kFewBlocks = 128;
constexpr int kFewWarps = std::min(kRows > 16 ? 8 : 16, kGroup * kShares), kManyWarps = std::min(DELTA_WARPS, kFewWarps);
constexpr int kLocal = 2 * kDimK + kGroup * kDimV;  // features of a query, its key and their values
constexpr int kRun = 16, kRunWarps = 4;             // of `convolve`: tokens that a warp takes after one another

struct Params {
  const Element* x;     // [num_tokens, kChannels + kValues], rows x_stride apart: queries, keys, values, gates
  const Element* ba;    // [num_tokens, 2 * kNumV], rows ba_stride apart
  const Element* conv;  // [kChannels, kBefore + 1]
  const float* a_log;   // [kNumV]
  const float* dt_bias;
  const Element* norm;  // [kDimV]
  Element* seen;        // [slots, kChannels, kBefore]
  float* memory;        // [slots, kNumV, kDimK, kDimV]
  const int* slots;     // [num_seqs]
  const int* cu_q;      // [num_seqs + 1]
  Element* out;         // [num_tokens, kValues]
  Element* qkv;         // [num_tokens, kChannels]
  float* gates;         // [2, num_tokens, kNumV]: logarithms of decays, betas
  int64_t x_stride, ba_stride;
  int num_tokens, num_seqs;
  float eps;
  bool early;  // see `delta`
};

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

struct Gates {
  float log_decay, beta;
};

__device__ __forceinline__ Gates gates_of(const Params& p, int t, int head) {
  const Element* ba = p.ba + t * p.ba_stride + head;
  float a = to_float(ba[kNumV]) + p.dt_bias[head], b = to_float(ba[0]);
  float softplus = a > 20.f ? a : log1pf(__expf(a));
  return {-__expf(p.a_log[head]) * softplus, 1.f / (1.f + __expf(-b))};
}

// What a channel's convolution has seen before a token, the newest last.
struct Window {
  float at[kBefore];

  // Before token t of the sequence that starts at token `start` and has this slot.
  __device__ __forceinline__ void fill(const Params& p, int channel, int t, int start, int slot) {
    const Element* state = p.seen + (int64_t(slot) * kChannels + channel) * kBefore;
#pragma unroll
    for (int i = 0; i < kBefore; i++) {
      int from = t - kBefore + i;
      at[i] = to_float(from >= start ? p.x[from * p.x_stride + channel] : state[from - start + kBefore]);
    }
  }

  // The convolution at the token itself, after SiLU; the token is the newest afterwards.
  __device__ __forceinline__ float push(const Element* weight, float x) {
    float y = x * to_float(weight[kBefore]);
#pragma unroll
    for (int i = 0; i < kBefore; i++) y += at[i] * to_float(weight[i]);
#pragma unroll
    for (int i = 0; i < kBefore; i++) at[i] = i + 1 < kBefore ? at[i + 1] : x;
    return silu(y);
  }

  __device__ __forceinline__ void save(const Params& p, int channel, int slot) const {
    Element* state = p.seen + (int64_t(slot) * kChannels + channel) * kBefore;
#pragma unroll
    for (int i = 0; i < kBefore; i++) state[i] = from_float<Element>(at[i]);
  }
};

// Norm of a head's outputs at a token, o(e), and its gate; by a warp.
template <typename Output>
__device__ __forceinline__ void finish_head(const Params& p, int t, int head, Output o) {
  constexpr int kPer = (kDimV + 31) / 32;
  const Element* z = p.x + t * p.x_stride + kChannels + head * kDimV;
  Element* out = p.out + int64_t(t) * kValues + head * kDimV;
  float values[kPer], squares = 0;
#pragma unroll
  for (int i = 0; i < kPer; i++) {
    int e = threadIdx.x % 32 + i * 32;
    values[i] = e < kDimV ? o(e) : 0.f;
    squares += values[i] * values[i];
  }
  float scale = rsqrtf(warp_sum(squares) / kDimV + p.eps);
#pragma unroll
  for (int i = 0; i < kPer; i++) {
    int e = threadIdx.x % 32 + i * 32;
    if (e < kDimV) out[e] = from_float<Element>(values[i] * scale * to_float(p.norm[e]) * silu(to_float(z[e])));
  }
}

// A warp's share of a head's state: rows lane / 4 + 8 i, four columns from `column` on.
struct Share {
  float4 rows[kRows];
  float* memory;  // the head's
  int head, column;

  __device__ __forceinline__ bool has(int i) const {
    return (kDimV % 16 == 0 || column < kDimV) && (kDimK % 8 == 0 || int(threadIdx.x) % 32 / 4 + i * 8 < kDimK);
  }
  __device__ __forceinline__ float4* row(int i) const {
    return reinterpret_cast<float4*>(memory + (threadIdx.x % 32 / 4 + i * 8) * kDimV + column);
  }

  __device__ __forceinline__ void load(const Params& p, int slot, int key, int unit) {
    head = key * kGroup + unit / kShares;
    column = unit % kShares * 16 + threadIdx.x % 4 * 4;
    memory = p.memory + (int64_t(slot) * kNumV + head) * (kDimK * kDimV);
#pragma unroll
    for (int i = 0; i < kRows; i++) rows[i] = has(i) ? __ldcs(row(i)) : float4{0, 0, 0, 0};
  }

  __device__ __forceinline__ void store(int i) const {
    if (has(i)) __stcs(row(i), rows[i]);
  }
};

__device__ __forceinline__ void add_scaled(float4& sum, float scale, const float4& x) {
  sum.x += scale * x.x, sum.y += scale * x.y, sum.z += scale * x.z, sum.w += scale * x.w;
}

// Over the lanes that have the same columns.
__device__ __forceinline__ void sum_rows(float4& x) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    x.x += __shfl_xor_sync(0xffffffffu, x.x, offset);
    x.y += __shfl_xor_sync(0xffffffffu, x.y, offset);
    x.z += __shfl_xor_sync(0xffffffffu, x.z, offset);
    x.w += __shfl_xor_sync(0xffffffffu, x.w, offset);
  }
}

struct Scratch {
  float q[kDimK], k[kDimK], v[kGroup * kDimV];  // in this order those of `channel_of`
  float out[kGroup * kDimV];
};

// Of feature i of a key's head: its queries, keys, then values.
__device__ __forceinline__ int channel_of(int key, int i) {
  if (i < kDimK) return key * kDimK + i;
  return i < 2 * kDimK ? kKeys + (key - 1) * kDimK + i : 2 * kKeys + key * kGroup * kDimV + i - 2 * kDimK;
}

// Queries and keys become 1 long, queries then 1 / sqrt(kDimK). → their product. Each warp finds it by itself.
struct Lengths {
  float q, k, overlap;

  __device__ explicit Lengths(const Scratch& s) : q(0), k(0), overlap(0) {
    for (int d = threadIdx.x % 32; d < kDimK; d += 32) {
      q += s.q[d] * s.q[d];
      k += s.k[d] * s.k[d];
      overlap += s.q[d] * s.k[d];
    }
    q = rsqrtf(warp_sum(q) + 1e-6f) * rsqrtf(float(kDimK));
    k = rsqrtf(warp_sum(k) + 1e-6f);
    overlap = warp_sum(overlap) * q * k;
  }
};

// The rule for one token: memory *= decay; memory += k ⊗ beta (v - kᵀ memory); o = qᵀ memory, of which qᵀ k is known.
__device__ __forceinline__ void advance(Share& share, Scratch& s, const Lengths& lengths, Gates gates, int local) {
  int lane = threadIdx.x % 32;
  float decay = __expf(gates.log_decay);
  float4 told{0, 0, 0, 0}, out{0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    int d = kDimK % 8 == 0 ? lane / 4 + i * 8 : min(lane / 4 + i * 8, kDimK - 1);
    add_scaled(told, s.k[d], share.rows[i]);
    add_scaled(out, s.q[d], share.rows[i]);
  }
  sum_rows(told);
  sum_rows(out);
  int e = local * kDimV + share.column;
  bool is_there = kDimV % 16 == 0 || share.column < kDimV;
  const float4 v = is_there ? *reinterpret_cast<const float4*>(s.v + e) : float4{0, 0, 0, 0};
  float k_decay = lengths.k * decay, q_decay = lengths.q * decay, more = lengths.overlap;
  float4 added{gates.beta * (v.x - k_decay * told.x), gates.beta * (v.y - k_decay * told.y),
               gates.beta * (v.z - k_decay * told.z), gates.beta * (v.w - k_decay * told.w)};
  if (lane < 4 && is_there) {
    *reinterpret_cast<float4*>(s.out + e) = {q_decay * out.x + more * added.x, q_decay * out.y + more * added.y,
                                             q_decay * out.z + more * added.z, q_decay * out.w + more * added.w};
  }
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    int d = kDimK % 8 == 0 ? lane / 4 + i * 8 : min(lane / 4 + i * 8, kDimK - 1);
    float4& row = share.rows[i];
    row = {row.x * decay, row.y * decay, row.z * decay, row.w * decay};
    add_scaled(row, s.k[d] * lengths.k, added);
    share.store(i);
  }
}

// Grid [heads of keys, sequences].
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps) tokens_kernel(const Params p) {
  __shared__ alignas(16) Scratch s;
  if (!p.early) pdl_wait();
  int key = blockIdx.x, warp = threadIdx.x / 32, slot = p.slots[blockIdx.y];
  int start = p.cu_q[blockIdx.y], end = p.cu_q[blockIdx.y + 1];
  if (end - start > 1) {
    pdl_wait();
    for (int i = threadIdx.x; i < kLocal; i += 32 * kWarps) {
      Window window;
      window.fill(p, channel_of(key, i), end, start, slot);
      window.save(p, channel_of(key, i), slot);
    }
    return;
  }
  Share share;
  share.load(p, slot, key, warp);
  pdl_wait();
  float* features = reinterpret_cast<float*>(&s);
  for (int i = threadIdx.x; i < kLocal; i += 32 * kWarps) {
    int channel = channel_of(key, i);
    Window window;
    window.fill(p, channel, start, start, slot);
    features[i] = window.push(p.conv + channel * (kBefore + 1), to_float(p.x[start * p.x_stride + channel]));
    window.save(p, channel, slot);
  }
  __syncthreads();
  const Lengths lengths(s);
  for (int unit = warp; unit < kGroup * kShares; unit += kWarps) {
    if (unit != warp) share.load(p, slot, key, unit);
    advance(share, s, lengths, gates_of(p, start, share.head), unit / kShares);
  }
  __syncthreads();
  for (int local = warp; local < kGroup; local += kWarps) {
    finish_head(p, start, key * kGroup + local, [&](int e) { return s.out[local * kDimV + e]; });
  }
}

// The sequence that has token t.
__device__ __forceinline__ int sequence_of(const Params& p, int t) {
  int low = 0, high = p.num_seqs;  // it is in [low, high)
  while (high - low > 1) {
    int middle = (low + high) / 2;
    (p.cu_q[middle] <= t ? low : high) = middle;
  }
  return low;
}

// A warp takes kRun tokens of a head of queries, keys or values. Grid [runs, heads / kRunWarps].
__global__ void __launch_bounds__(32 * kRunWarps) convolve_kernel(const Params p) {
  constexpr int kPer = (std::max(kDimK, kDimV) + 31) / 32;
  pdl_wait();
  int lane = threadIdx.x % 32, head = blockIdx.y * kRunWarps + threadIdx.x / 32, value = head - 2 * kNumK;
  if (value >= kNumV) return;
  int first = value < 0 ? head * kDimK : 2 * kKeys + value * kDimV, dim = value < 0 ? kDimK : kDimV;
  int begin = blockIdx.x * kRun, end = min(begin + kRun, p.num_tokens), seq = sequence_of(p, begin);
  Window windows[kPer];
  for (int t = begin; t < end; t++) {
    bool is_next = t == p.cu_q[seq + 1];
    seq += is_next;
    float values[kPer], squares = 0;
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      int d = lane + i * 32, channel = first + d;
      values[i] = 0;
      if (d >= dim) continue;
      if (is_next || t == begin) windows[i].fill(p, channel, t, p.cu_q[seq], p.slots[seq]);
      values[i] = windows[i].push(p.conv + channel * (kBefore + 1), to_float(p.x[t * p.x_stride + channel]));
      squares += values[i] * values[i];
    }
    float scale = value < 0 ? rsqrtf(warp_sum(squares) + 1e-6f) * (head < kNumK ? rsqrtf(float(kDimK)) : 1.f) : 1.f;
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      int d = lane + i * 32;
      if (d < dim) p.qkv[int64_t(t) * kChannels + first + d] = from_float<Element>(values[i] * scale);
    }
    if (value < 0 || lane > 0) continue;
    Gates gates = gates_of(p, t, value);
    p.gates[int64_t(t) * kNumV + value] = gates.log_decay;
    p.gates[(int64_t(p.num_tokens) + t) * kNumV + value] = gates.beta;
  }
}

// A warp for a token's head. Grid [tokens, heads / kRunWarps].
__global__ void __launch_bounds__(32 * kRunWarps) finish_kernel(const Params p) {
  pdl_wait();
  int head = blockIdx.y * kRunWarps + threadIdx.x / 32;
  if (head >= kNumV) return;
  const Element* out = p.out + int64_t(blockIdx.x) * kValues + head * kDimV;
  finish_head(p, blockIdx.x, head, [&](int e) { return to_float(out[e]); });
}

template <typename T>
T* data_of(const TensorView& t, bool is_right_dtype, int64_t numel) {
  MINISGL_CHECK(is_right_dtype && t.numel() == numel && t.IsContiguous()) << "expected " << numel << " numbers, contiguous";
  return static_cast<T*>(t.data_ptr());
}

bool is_element(const TensorView& t) {
  return std::is_same_v<Element, float> ? is_fp32(t) : std::is_same_v<Element, __half> ? is_fp16(t) : is_bf16(t);
}

// Rows of so many features, perhaps apart.
const Element* rows_of(const TensorView& t, int64_t num_rows, int64_t features) {
  MINISGL_CHECK(is_element(t) && t.ndim() == 2 && t.size(0) == num_rows && t.size(1) == features && t.stride(1) == 1)
      << "expected [" << num_rows << ", " << features << "] in the type of the kernel";
  return static_cast<const Element*>(t.data_ptr());
}

// qkv and gates: only where chunks are computed; otherwise empty.
Params params_of(TensorView x, TensorView ba, TensorView conv, TensorView a_log, TensorView dt_bias, TensorView norm,
                 TensorView seen, TensorView memory, TensorView slots, TensorView cu_q, TensorView out, TensorView qkv,
                 TensorView gates) {
  int64_t num_tokens = x.size(0), num_seqs = slots.numel(), num_slots = memory.size(0);
  bool has_chunks = num_tokens > num_seqs;
  Params p{};
  p.x = rows_of(x, num_tokens, kChannels + kValues), p.x_stride = x.stride(0);
  p.ba = rows_of(ba, num_tokens, 2 * kNumV), p.ba_stride = ba.stride(0);
  p.conv = data_of<Element>(conv, is_element(conv), kChannels * (kBefore + 1));
  p.a_log = data_of<float>(a_log, is_fp32(a_log), kNumV);
  p.dt_bias = data_of<float>(dt_bias, is_fp32(dt_bias), kNumV);
  p.norm = data_of<Element>(norm, is_element(norm), kDimV);
  p.seen = data_of<Element>(seen, is_element(seen), num_slots * kChannels * kBefore);
  p.memory = data_of<float>(memory, is_fp32(memory), num_slots * kNumV * kDimK * kDimV);
  p.slots = data_of<int>(slots, is_int32(slots), num_seqs);
  p.cu_q = data_of<int>(cu_q, is_int32(cu_q), num_seqs + 1);
  p.out = data_of<Element>(out, is_element(out), num_tokens * kValues);
  p.qkv = data_of<Element>(qkv, is_element(qkv), has_chunks ? num_tokens * kChannels : 0);
  p.gates = data_of<float>(gates, is_fp32(gates), has_chunks ? 2 * num_tokens * kNumV : 0);
  p.num_tokens = static_cast<int>(num_tokens), p.num_seqs = static_cast<int>(num_seqs);
  MINISGL_CHECK(reinterpret_cast<uintptr_t>(p.memory) % 16 == 0);
  return p;
}

enum Stage { kConvolve, kFinish, kTokens };

// stage: a number of `Stage`. early: slots, cu_q and the states of single tokens were written before the last launch
// without PDL, so `tokens` may read them while the kernels before this one still run.
void delta(int64_t stage, TensorView x, TensorView ba, TensorView conv, TensorView a_log, TensorView dt_bias,
           TensorView norm, TensorView seen, TensorView memory, TensorView slots, TensorView cu_q, TensorView out,
           TensorView qkv, TensorView gates, double eps, bool early) {
  Params p = params_of(x, ba, conv, a_log, dt_bias, norm, seen, memory, slots, cu_q, out, qkv, gates);
  p.eps = static_cast<float>(eps), p.early = early;
  unsigned num_tokens = p.num_tokens, num_seqs = p.num_seqs, runs = (num_tokens + kRun - 1) / kRun;
  if (num_seqs == 0) return;
  cudaStream_t stream = current_stream(x);
  constexpr unsigned kAll = (2 * kNumK + kNumV + kRunWarps - 1) / kRunWarps, kHalf = (kNumV + kRunWarps - 1) / kRunWarps;
  if (stage == kConvolve) launch(LaunchConfig{dim3(runs, kAll), dim3(32 * kRunWarps)}, stream, convolve_kernel, p);
  if (stage == kFinish) launch(LaunchConfig{dim3(num_tokens, kHalf), dim3(32 * kRunWarps)}, stream, finish_kernel, p);
  if (stage != kTokens) return;
  bool is_few = num_seqs * kNumK <= kFewBlocks;
  launch(LaunchConfig{dim3(kNumK, num_seqs), dim3(32 * (is_few ? kFewWarps : kManyWarps))}, stream,
         is_few ? tokens_kernel<kFewWarps> : tokens_kernel<kManyWarps>, p);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(delta, minisgl::delta);

}  // namespace minisgl
