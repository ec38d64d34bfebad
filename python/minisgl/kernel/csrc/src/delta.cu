// Gated DeltaNet (arXiv 2412.06464) between its projections, but for the products of chunks, which
// kernel/triton/delta.py computes.
//
//   tokens   a sequence's only token, all of it at once: convolution, gates, rule, norm. It is bound by reading and
//            writing states, which it does once. Of longer sequences it brings the convolution's state up to date,
//            once all else has read it. From sm_90 on many sequences have a kernel of their own (delta_stream.cuh).
//   drafts   the same for the tokens of a sequence that ends with a draft, one after the other. Before them come those
//            of the last draft that held; behind both the state is written, and then goes on in registers alone. Of
//            longer sequences without a draft it computes what held, before all else.
//   convolve convolved queries, keys and values, and gates, of all tokens.
//   finish   the norm of what chunks have given, and its gate.
//
// Shapes are fixed at compile time: DELTA_DTYPE, DELTA_NUM_K and DELTA_NUM_V (heads on this rank), DELTA_DIM_K,
// DELTA_DIM_V (a multiple of 4), DELTA_WIDTH (tokens that the convolution spans). All is computed in float32.
#include <minisgl/delta.cuh>

#if defined(MINISGL_PDL) && DELTA_DIM_K <= 128 && DELTA_DIM_K % 8 == 0 && DELTA_DIM_V <= 128 && DELTA_DIM_V % 32 == 0
#define DELTA_STREAMS 1
#include <minisgl/delta_stream.cuh>
#endif

namespace minisgl {
namespace {

// Grid [heads of keys, sequences].
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kWarps < kFewWarps ? kBlocksPerSM : 1) tokens_kernel(const Params p) {
  __shared__ alignas(16) Scratch s;
  if (!p.early) pdl_wait();
  int key = blockIdx.x, warp = threadIdx.x / 32, slot = p.slots[blockIdx.y];
  int start = p.cu_q[blockIdx.y], end = p.cu_q[blockIdx.y + 1];
  if (p.has_draft(blockIdx.y, end - start)) return pdl_wait();  // who comes next relies on all before
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
  Gates gates = gates_of(p, start, share.head);  // all that is read, before anything waits
  Finish finish;
  if (warp < kGroup) finish.load(p, start, key * kGroup + warp);
  float* features = reinterpret_cast<float*>(&s);
  for (int i = threadIdx.x; i < kLocal; i += 32 * kWarps) {
    int channel = channel_of(key, i);
    float weight[kBefore + 1];
    load_weight(weight, p, channel);
    Window window;
    window.fill(p, channel, start, start, slot);
    features[i] = window.push(weight, to_float(p.x[start * p.x_stride + channel]));
    window.save(p, channel, slot);
  }
  __syncthreads();
  const Lengths lengths(s);
  advance(share, s, lengths, gates, warp / kShares);
  for (int unit = warp + kWarps; unit < kGroup * kShares; unit += kWarps) {
    share.load(p, slot, key, unit);
    advance(share, s, lengths, gates_of(p, start, share.head), unit / kShares);
  }
  __syncthreads();
  for (int local = warp; local < kGroup; local += kWarps) {
    if (local != warp) finish.load(p, start, key * kGroup + local);
    finish.store_row(p, start, key * kGroup + local, s.out + local * kDimV);
  }
}

// What a block of `drafts` does: a key's head of a sequence.
struct Drafts {
  int seq, slot, start, end, held, sure;  // tokens [start, end), of which the state takes in those before `sure`
  bool is_long;                           // others compute its tokens

  __device__ __forceinline__ Drafts(const Params& p, int seq)
      : seq(seq), slot(p.slots[seq]), start(p.cu_q[seq]), end(p.cu_q[seq + 1]), held(p.held[seq]) {
    is_long = !p.has_draft(seq, end - start);
    if (is_long) end = start;
    end = min(end, start + 1 + p.longest + p.longest);  // nobody's may be longer
    sure = end - min(min(p.tried[seq], p.longest), end - start);
  }
  __device__ __forceinline__ Element* kept(const Params& p, int i) const {
    return p.kept + (int64_t(slot) * p.longest + i) * kKept;
  }
  // Inputs of token t, of those before `start` as they were kept.
  __device__ __forceinline__ const Element* x(const Params& p, int t) const {
    return t < start ? kept(p, t - start + held) : p.x + t * p.x_stride;
  }
  __device__ __forceinline__ const Element* ba(const Params& p, int t) const {
    return t < start ? kept(p, t - start + held) + kChannels + kValues : p.ba + t * p.ba_stride;
  }
};

// Heads of values that a block of so many warps at most takes at once.
constexpr int heads_at_once(int warps) { return std::max(1, std::min(kGroup, warps / kShares)); }

constexpr int kPrepared = std::max(1, std::min(8, 40960 / int(sizeof(Scratch))));  // tokens that `drafts` prepares at once

// What is known of tokens before any of them changes a state, and what comes of them. No warp waits between two tokens.
struct Ahead {
  Scratch tokens[kPrepared];
  float lengths[kPrepared][sizeof(Lengths) / sizeof(float)];
  Gates gates[kPrepared][kGroup];

  // Of `num` tokens from `begin` on, by a block of kThreads; keeps: for the step after this one.
  template <int kThreads, int kEach>
  __device__ __forceinline__ void prepare(const Params& p, const Drafts& d, int key, Window (&windows)[kEach], int begin, int num, bool keeps) {
    Element x[kEach][kPrepared];  // all are on their way at the same time
    float weights[kEach][kBefore + 1];
#pragma unroll
    for (int j = 0; j < kEach; j++) {
      int channel = channel_of(key, min(int(threadIdx.x) + j * kThreads, kLocal - 1));
      load_weight(weights[j], p, channel);
#pragma unroll
      for (int n = 0; n < kPrepared; n++) x[j][n] = n < num ? d.x(p, begin + n)[channel] : Element();
    }
    for (int i = threadIdx.x; i < num * kGroup; i += kThreads) {
      gates[i / kGroup][i % kGroup] = gates_of(p, d.ba(p, begin + i / kGroup), key * kGroup + i % kGroup);
    }
#pragma unroll
    for (int j = 0; j < kEach; j++) {
      int i = threadIdx.x + j * kThreads, channel = channel_of(key, min(i, kLocal - 1));
      if (i >= kLocal) continue;
#pragma unroll
      for (int n = 0; n < kPrepared; n++) {
        int t = begin + n;
        if (n >= num) continue;
        reinterpret_cast<float*>(&tokens[n])[i] = windows[j].push(weights[j], to_float(x[j][n]));
        if (keeps && t + 1 == d.sure) windows[j].save(p, channel, d.slot);
        if (keeps && t >= d.sure) d.kept(p, t - d.sure)[channel] = x[j][n];
      }
    }
    __syncthreads();
    for (int n = threadIdx.x / 32; n < num; n += kThreads / 32) {
      const Lengths found(tokens[n]);
      if (threadIdx.x % 32 == 0) *reinterpret_cast<Lengths*>(lengths[n]) = found;
    }
    for (int i = threadIdx.x; keeps && i < num * 2 * kGroup; i += kThreads) {
      int t = begin + i / (2 * kGroup), at = i / kGroup % 2 * kNumV + key * kGroup + i % kGroup;
      if (t >= d.sure) d.kept(p, t - d.sure)[kChannels + kValues + at] = d.ba(p, t)[at];
    }
    __syncthreads();
  }
};

// Grid [heads of keys, sequences]. A block goes through the tokens as often as there are values beyond kHeads.
template <int kHeads>
__global__ void __launch_bounds__(32 * kShares * kHeads, kShares * kHeads <= 4 ? 2 : 1) drafts_kernel(const Params p) {
  constexpr int kWarps = kShares * kHeads, kThreads = 32 * kWarps, kEach = (kLocal + kThreads - 1) / kThreads;
  constexpr int kRowsEach = (kPrepared + kShares - 1) / kShares;
  __shared__ alignas(16) Ahead s;
  if (!p.early) pdl_wait();
  int key = blockIdx.x, warp = threadIdx.x / 32;
  const Drafts d(p, blockIdx.y);
  if (d.is_long && d.held == 0) return pdl_wait();
  for (int first = 0; first < kGroup; first += kHeads) {
    int local = min(first + warp / kShares, kGroup - 1);  // twice the last one, at worst
    Share share;
    share.load(p, d.slot, key, local * kShares + warp % kShares);
    if (first == 0) pdl_wait();
    Window windows[kEach];
#pragma unroll
    for (int j = 0; j < kEach; j++) {
      windows[j].fill(p, channel_of(key, min(int(threadIdx.x) + j * kThreads, kLocal - 1)), d.start, d.start, d.slot);
    }
    for (int begin = d.start - d.held; begin < d.end; begin += kPrepared) {
      int num = min(kPrepared, d.end - begin), head = first + warp % kHeads, token = warp / kHeads;  // of its rows of results
      s.prepare<kThreads>(p, d, key, windows, begin, num, first + kHeads >= kGroup);
      auto ends = [&](int n) { return n < num && begin + n >= d.start && head < kGroup; };
      Finish finish[kRowsEach];
#pragma unroll
      for (int i = 0; i < kRowsEach; i++) {
        if (int n = token + i * kShares; ends(n)) finish[i].load(p, begin + n, key * kGroup + head);
      }
      for (int n = 0; n < num; n++) {
        advance<false>(share, s.tokens[n], *reinterpret_cast<const Lengths*>(s.lengths[n]), s.gates[n][local], local);
        if (begin + n + 1 == d.sure) share.store();
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRowsEach; i++) {
        if (int n = token + i * kShares; ends(n)) finish[i].store_row(p, begin + n, key * kGroup + head, s.tokens[n].out + head * kDimV);
      }
    }
  }
  for (int t = d.end; t < p.cu_q[d.seq + 1] && !d.is_long; t++) {  // nobody's: what it has must be numbers
    for (int i = threadIdx.x; i < kGroup * kDimV; i += kThreads) p.out[int64_t(t) * kValues + key * kGroup * kDimV + i] = from_float<Element>(0.f);
  }
}

// The sequence that a token belongs to, where a warp takes tokens one after the other.
struct Sequence {
  int index, start, end;

  __device__ __forceinline__ Sequence(const Params& p, int t) {
    int low = 0, high = p.num_seqs;  // it is in [low, high)
    while (high - low > 1) {
      int middle = (low + high) / 2;
      (p.cu_q[middle] <= t ? low : high) = middle;
    }
    index = low, start = p.cu_q[low], end = p.cu_q[low + 1];
  }
  // That of token t, which is the next one. → whether it is another.
  __device__ __forceinline__ bool reach(const Params& p, int t) {
    if (t < end) return false;
    start = end, end = p.cu_q[++index + 1];
    return true;
  }
  // Whether it is computed in chunks.
  __device__ __forceinline__ bool is_long(const Params& p) const { return end - start > 1 && !p.has_draft(index, end - start); }
};

// Of a warp's channels at kAtOnce tokens; 0 where there are none. They are read together, not one behind the other.
template <int kPer>
__device__ __forceinline__ void load_tokens(float (&x)[kAtOnce][kPer], const Element* from, int64_t stride, int count, int dim) {
#pragma unroll
  for (int j = 0; j < kAtOnce; j++) {
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      int d = threadIdx.x % 32 + i * 32;
      x[j][i] = j < count && d < dim ? to_float(from[j * stride + d]) : 0.f;
    }
  }
}

// A warp takes kRun tokens of a head of queries, keys or values. Grid [runs, heads / kRunWarps].
__global__ void __launch_bounds__(32 * kRunWarps) convolve_kernel(const Params p) {
  constexpr int kPer = (std::max(kDimK, kDimV) + 31) / 32;
  pdl_wait();
  int lane = threadIdx.x % 32, head = blockIdx.y * kRunWarps + threadIdx.x / 32, value = head - 2 * kNumK;
  if (value >= kNumV) return;
  int first = value < 0 ? head * kDimK : 2 * kKeys + value * kDimV, dim = value < 0 ? kDimK : kDimV;
  int begin = blockIdx.x * kRun, end = min(begin + kRun, p.num_tokens);
  Sequence seq(p, begin);
  Window windows[kPer];
  float weights[kPer][kBefore + 1], x[kAtOnce][kPer];
#pragma unroll
  for (int i = 0; i < kPer; i++) {
    if (lane + i * 32 < dim) load_weight(weights[i], p, first + lane + i * 32);
  }
  for (int low = begin; low < end; low += kAtOnce) {
    load_tokens(x, p.x + low * p.x_stride + first, p.x_stride, end - low, dim);
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      int t = low + j;
      if (t >= end) break;
      bool is_new = seq.reach(p, t) || t == begin;
      if (!seq.is_long(p)) continue;
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kPer; i++) {
        int d = lane + i * 32;
        if (d >= dim) continue;
        if (is_new) windows[i].fill(p, first + d, t, seq.start, p.slots[seq.index]);
        x[j][i] = windows[i].push(weights[i], x[j][i]);
        squares += x[j][i] * x[j][i];
      }
      float scale = value < 0 ? rsqrtf(warp_sum(squares) + 1e-6f) * (head < kNumK ? rsqrtf(float(kDimK)) : 1.f) : 1.f;
#pragma unroll
      for (int i = 0; i < kPer; i++) {
        int d = lane + i * 32;
        if (d < dim) p.qkv[int64_t(t) * kChannels + first + d] = from_float<Element>(x[j][i] * scale);
      }
    }
  }
  int t = begin + lane;
  if (value < 0 || t >= end) return;
  Gates gates = gates_of(p, t, value);
  p.gates[int64_t(t) * kNumV + value] = gates.log_decay;
  p.gates[(int64_t(p.num_tokens) + t) * kNumV + value] = gates.beta;
}

// A warp takes kRun tokens of a head of values. Grid [runs, heads / kRunWarps].
__global__ void __launch_bounds__(32 * kRunWarps) finish_kernel(const Params p) {
  pdl_wait();
  int head = blockIdx.y * kRunWarps + threadIdx.x / 32;
  if (head >= kNumV) return;
  int begin = blockIdx.x * kRun, end = min(begin + kRun, p.num_tokens);
  Sequence seq(p, begin);
  for (int low = begin; low < end; low += kAtOnce) {
    float values[kAtOnce][Finish::kPer];
    Finish finish[kAtOnce];
    load_tokens(values, p.out + int64_t(low) * kValues + head * kDimV, kValues, end - low, kDimV);
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) finish[j].load(p, min(low + j, end - 1), head);
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      if (low + j >= end) break;
      seq.reach(p, low + j);
      if (seq.is_long(p)) finish[j].store(p, low + j, head, values[j]);
    }
  }
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
                 TensorView seen, TensorView memory, TensorView kept, TensorView slots, TensorView cu_q,
                 tvm::ffi::Optional<TensorView> held, tvm::ffi::Optional<TensorView> tried, TensorView out, TensorView qkv, TensorView gates) {
  int64_t num_tokens = x.size(0), num_seqs = slots.numel(), num_slots = memory.size(0);
  bool has_chunks = qkv.numel() > 0;
  Params p{};
  p.x = rows_of(x, num_tokens, kChannels + kValues), p.x_stride = x.stride(0);
  p.ba = rows_of(ba, num_tokens, 2 * kNumV), p.ba_stride = ba.stride(0);
  p.conv = data_of<Element>(conv, is_element(conv), kChannels * (kBefore + 1));
  p.a_log = data_of<float>(a_log, is_fp32(a_log), kNumV);
  p.dt_bias = data_of<float>(dt_bias, is_fp32(dt_bias), kNumV);
  p.norm = data_of<Element>(norm, is_element(norm), kDimV);
  p.seen = data_of<Element>(seen, is_element(seen), num_slots * kChannels * kBefore);
  p.memory = data_of<float>(memory, is_fp32(memory), num_slots * kNumV * kDimK * kDimV);
  p.kept = data_of<Element>(kept, is_element(kept) || kept.numel() == 0, kept.numel());
  p.longest = static_cast<int>(kept.numel() / (num_slots * kKept));
  if (held.has_value()) p.held = data_of<int>(held.value(), is_int32(held.value()), num_seqs);
  if (tried.has_value()) p.tried = data_of<int>(tried.value(), is_int32(tried.value()), num_seqs);
  p.slots = data_of<int>(slots, is_int32(slots), num_seqs);
  p.cu_q = data_of<int>(cu_q, is_int32(cu_q), num_seqs + 1);
  p.out = data_of<Element>(out, is_element(out), num_tokens * kValues);
  p.qkv = data_of<Element>(qkv, is_element(qkv), has_chunks ? num_tokens * kChannels : 0);
  p.gates = data_of<float>(gates, is_fp32(gates), has_chunks ? 2 * num_tokens * kNumV : 0);
  p.num_tokens = static_cast<int>(num_tokens), p.num_seqs = static_cast<int>(num_seqs);
  MINISGL_CHECK(reinterpret_cast<uintptr_t>(p.memory) % 16 == 0);
  return p;
}

#if DELTA_STREAMS
// As many blocks as a device has multiprocessors; 0 where these have too little shared memory.
int stream_blocks(int device) {
  static int found[64];  // one more
  MINISGL_CHECK(device >= 0 && device < 64);
  if (found[device] > 0) return found[device] - 1;
  constexpr int kBytes = sizeof(Stream);
  int most = 0, sms = 0;
  MINISGL_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (kBytes <= most) {
    MINISGL_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    MINISGL_CUDA_CHECK(cudaFuncSetAttribute(stream_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    MINISGL_CUDA_CHECK(
        cudaFuncSetAttribute(stream_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  }
  found[device] = sms + 1;
  return sms;
}
#endif

// `tokens` of many sequences. → false: there is no kernel for them.
bool stream_tokens(const Params& p, int device, cudaStream_t stream) {
#if DELTA_STREAMS
  constexpr int64_t kLarge = 64 << 20;  // bytes of states, from which on they should stay in the L2 cache until written
  unsigned items = p.num_seqs * kNumK, blocks = 0;
  bool fits = items >= kFewBlocks && p.x_stride % kVec == 0;
  for (const Element* from : {p.x, p.conv, p.norm, static_cast<const Element*>(p.seen)}) {
    fits = fits && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  }
  if (fits) blocks = std::min<unsigned>(items, stream_blocks(device));
  if (blocks == 0) return false;
  uint64_t policy = int64_t(p.num_seqs) * kNumV * kStateBytes < kLarge ? kEvictNormal : kEvictLast;
  launch(LaunchConfig{dim3(blocks), dim3(kStreamThreads), sizeof(Stream)}, stream, stream_kernel, p, policy);
  return true;
#else
  return false;
#endif
}

enum Stage { kConvolve, kFinish, kTokens, kDrafts };

// stage: a number of `Stage`. early: all that is of sequences, and their states, was written before the last launch
// without PDL, so `tokens` and `drafts` may read it while the kernels before this one still run: it is captured. What is
// captured has no prompts, so where drafts are `drafts` computes all.
void delta(int64_t stage, TensorView x, TensorView ba, TensorView conv, TensorView a_log, TensorView dt_bias,
           TensorView norm, TensorView seen, TensorView memory, TensorView kept, TensorView slots, TensorView cu_q,
           tvm::ffi::Optional<TensorView> held, tvm::ffi::Optional<TensorView> tried, TensorView out, TensorView qkv, TensorView gates,
           double eps, bool early) {
  Params p = params_of(x, ba, conv, a_log, dt_bias, norm, seen, memory, kept, slots, cu_q, held, tried, out, qkv, gates);
  p.eps = static_cast<float>(eps), p.early = early, p.all = early && p.held != nullptr;
  MINISGL_CHECK(stage != kDrafts || (p.held != nullptr && p.tried != nullptr)) << "drafts of which sequences?";
  unsigned num_seqs = p.num_seqs, runs = (p.num_tokens + kRun - 1) / kRun;
  if (num_seqs == 0) return;
  cudaStream_t stream = current_stream(x);
  constexpr unsigned kAll = (2 * kNumK + kNumV + kRunWarps - 1) / kRunWarps, kHalf = (kNumV + kRunWarps - 1) / kRunWarps;
  if (stage == kConvolve) launch(LaunchConfig{dim3(runs, kAll), dim3(32 * kRunWarps)}, stream, convolve_kernel, p);
  if (stage == kFinish) launch(LaunchConfig{dim3(runs, kHalf), dim3(32 * kRunWarps)}, stream, finish_kernel, p);
  bool is_few = num_seqs * kNumK <= kFewBlocks;
  if (stage == kDrafts) {
    constexpr int kFew = heads_at_once(8), kMany = heads_at_once(4);
    launch(LaunchConfig{dim3(kNumK, num_seqs), dim3(32 * kShares * (is_few ? kFew : kMany))}, stream,
           is_few ? drafts_kernel<kFew> : drafts_kernel<kMany>, p);
  }
  if (stage != kTokens || p.all || stream_tokens(p, x.device().device_id, stream)) return;
  launch(LaunchConfig{dim3(kNumK, num_seqs), dim3(32 * (is_few ? kFewWarps : kManyWarps))}, stream,
         is_few ? tokens_kernel<kFewWarps> : tokens_kernel<kManyWarps>, p);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(delta, minisgl::delta);

}  // namespace minisgl
