// Log-probabilities of tokens, and the largest ones of their rows: `StepOps.logprobs` in kernel/ops.py.
//
// One block reads a row once, for the sum of exponentials and each thread's largest logit. The largest of all is one of
// these; the thread that had it looks through its own share again for the next one. Logits keep their type.
#include <minisgl/sampling_row.cuh>

namespace minisgl {

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr float kLog2e = 1.4426950408889634f;

struct LogprobArgs {
  const void* logits;      // [m, vocab], rows `stride` elements apart
  const int64_t* rows;     // [n]
  const int32_t* targets;  // [n]
  int32_t* words;          // [n, 1 + 2 * num_top]
  int64_t stride;
  int vocab, num_top;
};

// A logit and its index as one number: the larger the logit, and of equal ones the lower the index, the larger it is.
// There is no -0, and NaN is larger than all else.
using Ranked = unsigned long long;

__device__ __forceinline__ Ranked ranked(float logit, int index) {
  using L = Logit<float>;
  return Ranked(L::to_keys(L::normal(__float_as_uint(logit)))) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

__device__ __forceinline__ float logit_of(Ranked value) { return decode<float>(static_cast<uint32_t>(value >> 32)); }

__device__ __forceinline__ int index_of(Ranked value) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(value));
}

// f(logits, index of the first, how many) of this thread's vectors of a row.
template <typename T, int kLen, typename F>
__device__ __forceinline__ void visit(const T* row, int vocab, F&& f) {
#pragma unroll 4
  for (int begin = threadIdx.x * kLen; begin < vocab; begin += kThreads * kLen) {
    float logits[kLen];
    if (begin + kLen <= vocab) {
      const Vec<T, kLen> words = *reinterpret_cast<const Vec<T, kLen>*>(row + begin);
#pragma unroll
      for (int j = 0; j < kLen; ++j) logits[j] = to_float(words.data[j]);
      f(logits, begin, kLen);
    } else {
      for (int j = 0; begin + j < vocab; ++j) logits[j] = to_float(row[begin + j]);
      f(logits, begin, vocab - begin);
    }
  }
}

// The sum of exponentials of what came so far, relative to the largest of it.
struct RunningSum {
  float most, sum;

  __device__ RunningSum() { most = __uint_as_float(0xff800000u), sum = 0.0f; }

  __device__ __forceinline__ void raise(float larger) {
    if (larger > most) sum *= exp2f((most - larger) * kLog2e), most = larger;
  }

  __device__ __forceinline__ void add(float logit) { sum += exp2f((logit - most) * kLog2e); }
};

struct Shared {
  Ranked best[kWarps];
  float sums[kWarps];
};

// Of all threads of the block, in all of them.
__device__ Ranked largest(Ranked value, Shared& shared) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, d));
  __syncthreads();  // what was there before has been read
  if (threadIdx.x % 32 == 0) shared.best[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared.best[threadIdx.x % 32];
#pragma unroll
  for (int d = 16; d > 0; d /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, d));
  return value;
}

__device__ float sum_of(float value, Shared& shared) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(shared.sums[threadIdx.x % 32]);
}

template <typename T, int kLen>
__global__ void __launch_bounds__(kThreads) logprob_kernel(const LogprobArgs args) {
  __shared__ Shared shared;
  const int64_t number = blockIdx.x;
  pdl_trigger();
  pdl_wait();
  const T* row = static_cast<const T*>(args.logits) + args.rows[number] * args.stride;
  RunningSum part;
  Ranked own = 0;
  visit<T, kLen>(row, args.vocab, [&](const float (&logits)[kLen], int begin, int count) {
    for (int j = 0; j < kLen; ++j) {
      if (j < count) own = max(own, ranked(logits[j], begin + j));
    }
    part.raise(logit_of(own));
    if (__float_as_uint(part.most) == 0xff800000u) return;
    for (int j = 0; j < kLen; ++j) {
      if (j < count) part.add(logits[j]);
    }
  });
  Ranked best = largest(own, shared);
  const float most = logit_of(best), infinity = __uint_as_float(0x7f800000u);
  const bool is_finite = most > -infinity && most < infinity;
  part.raise(is_finite ? most : part.most);
  const float total = sum_of(part.sum, shared);
  const float log_total = is_finite ? logf(total) : __uint_as_float(0x7fffffffu);  // NaN
  int32_t* words = args.words + number * (1 + 2 * args.num_top);
  if (threadIdx.x == 0) words[0] = __float_as_int(to_float(row[max(args.targets[number], 0)]) - most - log_total);
  for (int i = 0; i < args.num_top; ++i) {
    if (threadIdx.x == 0) {
      words[2 * i + 1] = is_finite ? index_of(best) : 0;
      words[2 * i + 2] = __float_as_int(logit_of(best) - most - log_total);
    }
    if (i + 1 == args.num_top || !is_finite) continue;
    if (own == best) {  // only one thread's
      own = 0;
      visit<T, kLen>(row, args.vocab, [&](const float (&logits)[kLen], int begin, int count) {
        for (int j = 0; j < kLen; ++j) {
          const Ranked value = j < count ? ranked(logits[j], begin + j) : 0;
          if (value < best) own = max(own, value);
        }
      });
    }
    best = largest(own, shared);
  }
}

template <typename T>
void launch_logprobs(const LogprobArgs& args, int64_t count, cudaStream_t stream) {
  constexpr int kLen = 16 / sizeof(T);
  const LaunchConfig config{dim3(count), dim3(kThreads)};
  const bool is_aligned = reinterpret_cast<uintptr_t>(args.logits) % 16 == 0 && args.stride % kLen == 0;
  launch(config, stream, is_aligned ? logprob_kernel<T, kLen> : logprob_kernel<T, 1>, args);
}

template <typename T>
T* column(const TensorView& t, bool is_right_type, int64_t size) {
  MINISGL_CHECK(is_right_type && t.IsContiguous() && t.numel() == size);
  return static_cast<T*>(t.data_ptr());
}

}  // namespace

// logits: [m, vocab] bf16, fp16 or fp32, any row stride; rows: [n] int64 of them; targets: [n] int32, negative ones
// count as 0; words: [n, 1 + 2k] int32, of each row the target's log-probability (float32), and then id and
// log-probability of the k largest by turns, in descending order, of equal ones the first. Log-probabilities are NaN,
// and ids 0, where a row's largest logit is not finite.
void log_probabilities(TensorView logits, TensorView rows, TensorView targets, TensorView words) {
  MINISGL_CHECK(logits.ndim() == 2 && words.ndim() == 2 && logits.size(1) > 0 && words.size(1) % 2 == 1);
  const int64_t count = rows.numel(), num_top = words.size(1) / 2;
  MINISGL_CHECK(num_top <= logits.size(1));
  if (count == 0) return;
  MINISGL_CHECK(logits.stride(1) == 1 || logits.size(1) == 1);
  const LogprobArgs args{logits.data_ptr(),
                         column<const int64_t>(rows, is_int64(rows), count),
                         column<const int32_t>(targets, is_int32(targets), count),
                         column<int32_t>(words, is_int32(words), count * (1 + 2 * num_top)),
                         logits.stride(0),
                         static_cast<int>(logits.size(1)),
                         static_cast<int>(num_top)};
  const cudaStream_t stream = current_stream(logits);
  if (is_bf16(logits)) launch_logprobs<__nv_bfloat16>(args, count, stream);
  else if (is_fp16(logits)) launch_logprobs<__half>(args, count, stream);
  else if (is_fp32(logits)) launch_logprobs<float>(args, count, stream);
  else TVM_FFI_THROW(TypeError) << "log_probabilities: expected logits in bfloat16, float16 or float32";
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(log_probabilities, minisgl::log_probabilities);

}  // namespace minisgl
