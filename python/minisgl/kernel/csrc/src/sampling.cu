// Logits to token ids; what is sampled is defined by kernel/sampling.py.
//
// The filters each keep a prefix of the tokens in order of (logit descending, index ascending), so that together they
// keep one prefix: all tokens with a logit above a threshold, and the first few of those that equal it. Instead of
// sorting, the threshold is looked for among the ordered bits of the logits ("keys"). Logits of 16 bits are counted by
// key, from the largest down, and equal logits weigh the same: the counts tell the masses. Where the counted keys end
// above the threshold (very many lie close to zero), and for logits of 32 bits, it is searched for: first in steps
// of doubling distance from the largest logit, then by bisection, one pass over the row for each.
//
// Masses are sums of 64-bit fixed-point numbers, which do not depend on the order of summation: a row's token depends
// on that row alone. A weight below 2^-44 of the largest counts as zero.
//
// From sm_90 a cluster of 8 blocks holds one row in shared memory, an eighth each; otherwise, and for rows too long for
// that, one block reads its row again and again, through the caches.
#include <minisgl/sampling_rules.cuh>

#include <algorithm>

namespace minisgl {

namespace {

__device__ __forceinline__ void write_token(const SampleArgs& args, int row, int token) {
  args.out[row] = token;
  if (args.board != nullptr && args.params[row].mask >= 0) {
    int32_t* told = args.board->ids + args.params[row].mask;
    asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(told), "r"(token) : "memory");
  }
  if (args.token_ids == nullptr) return;
  const int64_t position = args.params[row].position;
  // A failed row (-1) gets some valid id, which nobody will see.
  if (position < 0 || position >= args.max_len) return;
  args.token_ids[args.rows[row] * args.max_len + position] = max(token, 0);
}

// What all do once the row is staged: own_best is this thread's largest key.
template <typename T, typename Row>
__device__ void sample_row(Row& sampler, uint32_t own_best, const SampleArgs& args, int row, int rank, int num_warps) {
  // The largest key, and of the warps that have it the first.
  const uint32_t warp = rank * num_warps + threadIdx.x / 32;
  const uint64_t first_best = sampler.team.template reduce<Max>(uint64_t(own_best) << 32 | (0xffffu - warp));
  sampler.best = static_cast<uint32_t>(first_best >> 32);
  if (sampler.best == kNegInf<T> || sampler.best >= Logit<T>::kPosInf) {
    if (rank == 0 && threadIdx.x == 0) write_token(args, row, -1);
    return;
  }
  const SamplingParams& params = args.params[row];
  const float temperature = params.temperature;
  if (!(temperature > 0.0f)) {
    if (static_cast<uint32_t>(first_best) != 0xffffu - warp) return;
    const int token = sampler.arg_max();
    if (threadIdx.x % 32 == 0) write_token(args, row, token);
    return;
  }
  sampler.temperature = temperature;
  sampler.best_logit = decode<T>(sampler.best);
  sampler.rate = fminf(kLog2e / temperature, 3e38f);
  const int top_k = params.top_k > 0 && params.top_k < args.vocab ? params.top_k : 0;
  const float top_p = params.top_p, min_p = params.min_p;
  const uint64_t number = splitmix(splitmix(params.seed) ^ params.position) & ~uint64_t(0xfff);
  int token;
  if (top_k == 0 && top_p >= 1.0f && !(min_p > 0.0f)) {
    token = sampler.template pick<false>({}, number);
  } else {
    token = sampler.template pick<true>(sampler.for_warp(sampler.filter(top_k, top_p, min_p)), number);
  }
  if (token >= 0) write_token(args, row, token);
}

// rules.places: null where no row has rules; those that have some were sampled by `sample_changed_kernel`.
template <typename T, int kRanks, int kThreads, bool kStaged>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
sample_kernel(const SampleArgs args, const RuleArgs rules) {
  using Row = Sampler<T, kRanks, kThreads, kStaged>;
  using RowTeam = typename Row::RowTeam;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ typename RowTeam::Shared shared;
  const int row = blockIdx.x / kRanks, rank = blockIdx.x % kRanks;
  if constexpr (kRanks > 1) cluster_arrive(false);
  pdl_trigger();
  for (int i = threadIdx.x; i < RowTeam::kBins; i += kThreads) shared.bins[i] = 0;
  pdl_wait();
  if (rules.places != nullptr && is_ruled(args, rules, row)) {
    if constexpr (kRanks > 1) cluster_wait();
    if (rank == 0 && threadIdx.x == 0) write_token(args, row, args.out[row]);
    return;
  }
  Row sampler{{args, row, rank, memory}, {shared, static_cast<unsigned>(rank)}};
  const uint32_t own_best = sampler.tokens.stage();
  if constexpr (kRanks > 1) cluster_wait();  // no block writes to another that has not started
  sample_row<T>(sampler, own_best, args, row, rank, kThreads / 32);
}

// Samples the rows that have rules or masks now. What can be done before a mask is there is done. S: the logits' type.
template <typename S, int kRanks, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
sample_changed_kernel(const SampleArgs args, const RuleArgs rules) {
  using Row = Sampler<float, kRanks, kThreads, true>;
  using RowTeam = typename Row::RowTeam;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ typename RowTeam::Shared shared;
  __shared__ uint32_t is_ready;
  const int row = blockIdx.x / kRanks, rank = blockIdx.x % kRanks;
  pdl_trigger();
  pdl_wait();
  if (!is_ruled(args, rules, row)) return;
  const SamplingParams& params = args.params[row];
  const bool is_masked = params.mask >= 0;
  if (!is_masked) cluster_arrive(false);
  Row sampler{{args, rank, memory}, {shared, static_cast<unsigned>(rank)}};
  const auto& tokens = sampler.tokens;
  auto* counts = reinterpret_cast<uint32_t*>(tokens.staged + args.vecs * kThreads);
  const ChangedSlice<S, kThreads> slice{tokens, reinterpret_cast<float*>(tokens.staged), counts, tokens.end};
  slice.load(static_cast<const S*>(args.logits) + row * args.stride);
  __syncthreads();
  if (has_penalties(params)) {
    slice.penalize(params, rules.token_ids + args.rows[row] * args.max_len, args.max_len);
  }
  slice.add(params, Entries(args, rules, row));
  if (is_masked) {  // one thread looks for all blocks, which must not come to differ
    if (rank == 0 && threadIdx.x == 0) is_ready = wait_for_mask(rules.places->board, params.mask);
    cluster_arrive(rank == 0 && threadIdx.x < 32);
  }
  __syncthreads();
  cluster_wait();  // no block writes to another that has not started
  int first_bit = -1;
  if (is_masked) {
    if (load_remote(&is_ready, 0) == 0) {
      if (rank == 0 && threadIdx.x == 0) write_token(args, row, kNotReady);
      cluster_arrive(false);
      cluster_wait();  // the first block stays until all have looked
      return;
    }
    first_bit = slice.load_mask(rules.places->board.words + int64_t(params.mask) * ((args.vocab + 31) / 32));
  }
  const uint32_t own_best = slice.finish(first_bit);
  sample_row<float>(sampler, own_best, args, row, rank, kThreads / 32);
}

template <typename T, int kRanks, int kThreads, bool kStaged>
void launch_sample(SampleArgs args, const RuleArgs& rules, int64_t num_rows, cudaStream_t stream) {
  constexpr int kLen = 16 / sizeof(T);
  args.slice = (args.vocab + kRanks * kLen - 1) / (kRanks * kLen) * kLen;
  args.vecs = (args.slice / kLen + 1 + kThreads - 1) / kThreads;  // one more vector where the row is not aligned
  LaunchConfig config{dim3(num_rows * kRanks), dim3(kThreads)};
  config.cluster = kRanks;
  const auto kernel = sample_kernel<T, kRanks, kThreads, kStaged>;
  if (kStaged) {
    config.smem = size_t(args.vecs) * kThreads * 16;
    MINISGL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.smem)));
  }
  launch(config, stream, kernel, args, rules);
}

constexpr int kClusterRanks = 8, kChangedThreads = 512;  // of a row

// Bytes of shared memory that a block takes for its part of a row, at most, and what else it has there.
template <typename T>
int64_t staged_bytes(int64_t vocab) {
  return vocab / kClusterRanks * int64_t(sizeof(T)) + (1024 + 2) * 16 + 10240;
}

int shared_limit(int device) {
  int limit = 0;
  MINISGL_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return limit;
}

template <typename T>
void choose_sample(const SampleArgs& args, const RuleArgs& rules, int64_t num_rows, int device, cudaStream_t stream) {
#ifdef MINISGL_PDL  // set from sm_90 on, which has clusters too
  int num_sms = 0;
  MINISGL_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  // Always 8 blocks, in which sums of vectors are the same, with as many threads as lets all blocks run at once.
  constexpr int kRanks = kClusterRanks;
  if (staged_bytes<T>(args.vocab) <= shared_limit(device)) {
    if (num_rows * kRanks <= num_sms) return launch_sample<T, kRanks, 1024, true>(args, rules, num_rows, stream);
    if (num_rows * kRanks <= 2 * num_sms) return launch_sample<T, kRanks, 512, true>(args, rules, num_rows, stream);
    return launch_sample<T, kRanks, 256, true>(args, rules, num_rows, stream);
  }
#endif
  launch_sample<T, 1, 1024, false>(args, rules, num_rows, stream);
}

template <typename S>
void launch_changed(SampleArgs args, const RuleArgs& rules, int64_t num_rows, cudaStream_t stream) {
#ifdef MINISGL_PDL
  constexpr int kRanks = kClusterRanks, kThreads = kChangedThreads, kLen = 4;
  args.token_ids = nullptr;  // ids are stored when all rows have been looked at: histories hold drafts
  args.board = &rules.places->board;
  args.slice = (args.vocab + kRanks * kLen - 1) / (kRanks * kLen) * kLen;
  args.vecs = (args.slice / kLen + kThreads - 1) / kThreads;
  LaunchConfig config{dim3(num_rows * kRanks), dim3(kThreads)};
  config.cluster = kRanks;
  config.smem = size_t(args.vecs) * kThreads * 16 + kNumCounts * sizeof(uint32_t);
  const auto kernel = sample_changed_kernel<S, kRanks, kThreads>;
  MINISGL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.smem)));
  launch(config, stream, kernel, args, rules);
#else
  TVM_FFI_THROW(RuntimeError) << "rules need clusters";
#endif
}

template <typename T>
const T* column(const TensorView& t, bool is_right_type, int64_t size) {
  MINISGL_CHECK(is_right_type && t.IsContiguous() && t.numel() == size);
  return static_cast<const T*>(t.data_ptr());
}

using MaybeView = tvm::ffi::Optional<TensorView>;

struct Arguments {
  SampleArgs sample{};
  RuleArgs rules{};
  int64_t num_rows;

  Arguments(const TensorView& logits, const TensorView& params, const TensorView& out) : num_rows(logits.size(0)) {
    const int64_t vocab = logits.size(1);
    MINISGL_CHECK(vocab > 0 && vocab <= kMaxVocab && (logits.stride(1) == 1 || vocab == 1));
    MINISGL_CHECK(reinterpret_cast<uintptr_t>(params.data_ptr()) % alignof(SamplingParams) == 0);
    const int64_t words = num_rows * int64_t(sizeof(SamplingParams) / 4);
    sample.logits = logits.data_ptr();
    sample.params = reinterpret_cast<const SamplingParams*>(column<int32_t>(params, is_int32(params), words));
    sample.out = const_cast<int32_t*>(column<int32_t>(out, is_int32(out), num_rows));
    sample.stride = logits.stride(0);
    sample.vocab = static_cast<int>(vocab);
  }

  void set_store(const TensorView& token_ids, const TensorView& rows) {
    MINISGL_CHECK(token_ids.ndim() == 2);
    rules.token_ids = column<int32_t>(token_ids, is_int32(token_ids), token_ids.numel());
    rules.num_rows = token_ids.size(0);
    sample.token_ids = const_cast<int32_t*>(rules.token_ids);
    sample.max_len = token_ids.size(1);
    sample.rows = column<int32_t>(rows, is_int32(rows), num_rows);
  }

  void set_rules(const TensorView& places) {
    MINISGL_CHECK(sample.rows != nullptr);
    static_assert(sizeof(Places) == 5 * sizeof(int64_t));
    const auto* found = column<int64_t>(places, is_int64(places), sizeof(Places) / sizeof(int64_t));
    rules.places = reinterpret_cast<Places*>(const_cast<int64_t*>(found));
  }
};

// f(a value of the logits' type)
template <typename F>
void for_type_of(const TensorView& logits, F&& f) {
  if (is_bf16(logits)) f(__nv_bfloat16{});
  else if (is_fp16(logits)) f(__half{});
  else if (is_fp32(logits)) f(float{});
  else TVM_FFI_THROW(TypeError) << "sample: expected logits in bfloat16, float16 or float32";
}

}  // namespace

// logits: [b, vocab] bf16, fp16 or fp32, any row stride; params: [b, words] int32, records; out: [b] int32, -1 where the
// largest logit is not finite. With token_ids [num_rows, max_len] int32 and rows [b] int32, the token also goes to
// token_ids[rows[i], position[i]]. With places [5] int64 (see `Places`), for up to `most_ruled` tokens, logits are
// changed by penalties, entries and masks before; -2: the row's mask is not ready, or was not within a second.
void sample(TensorView logits, TensorView params, TensorView out, MaybeView token_ids, MaybeView rows, MaybeView places) {
  MINISGL_CHECK(logits.ndim() == 2 && token_ids.has_value() == rows.has_value());
  if (logits.size(0) == 0) return;
  Arguments args(logits, params, out);
  if (token_ids.has_value()) args.set_store(token_ids.value(), rows.value());
  if (places.has_value()) args.set_rules(places.value());
  const cudaStream_t stream = current_stream(logits);
  for_type_of(logits, [&](auto zero) {
    if (places.has_value()) launch_changed<decltype(zero)>(args.sample, args.rules, args.num_rows, stream);
    choose_sample<decltype(zero)>(args.sample, args.rules, args.num_rows, logits.device().device_id, stream);
  });
}

// Tokens of the largest vocabulary whose rows fit where they can be changed; 0: there is no such place.
int64_t most_ruled(int64_t device) {
#ifdef MINISGL_PDL
  const int64_t room = shared_limit(device) - staged_bytes<float>(0) - int64_t(kNumCounts * sizeof(uint32_t));
  return std::clamp<int64_t>(room / int64_t(sizeof(float)) * kClusterRanks, 0, kMaxVocab);
#else
  return 0;
#endif
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample, minisgl::sample);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(most_ruled, minisgl::most_ruled);

}  // namespace minisgl
