// What a drafter on the GPU does beside its layers: where the tokens stand that it is to tell, and which token is the most
// probable. Between products it is such small things that a captured step waits for.
#include <minisgl/common.cuh>
#include <minisgl/sampling_params.h>

#include <tvm/ffi/optional.h>

#include <algorithm>

namespace minisgl {

namespace {

using tvm::ffi::Optional;

constexpr int kPlanThreads = 128, kBestThreads = 256;
constexpr int kMaxRows = 8192;  // of a launch that looks for the most probable tokens
constexpr int kParts = 64;      // of a vocabulary, of which 4 bits name a token each

template <typename T>
using Chunk = Vec<T, kVecLen<T>>;

struct PlanArgs {
  const int32_t* rows;          // [n] of the tables
  const int32_t* wanted;        // [n] tokens of a draft
  const int32_t* cu_q;          // [n + 1]
  const int32_t* positions;     // [t]
  const int32_t* logit_tokens;  // [m], in order
  const int64_t* input_ids;     // [t]
  const int32_t* ids;           // [m]
  const int32_t* token_ids;     // [num_rows, max_len]
  int64_t* following;           // [t]
  int64_t* last;                // [n]
  int64_t* token;               // [n]
  int32_t* numbers;             // [3, passes, n, places]
  int32_t* kept;                // [n]
  int64_t max_len;
  int num_tokens, num_samples, passes, places, first_told, padding_row;
};

// The first of `count` numbers, in order, that is not below `value`.
__device__ __forceinline__ int first_from(const int32_t* numbers, int count, int value) {
  int begin = 0;
  while (begin < count) {
    const int middle = (begin + count) / 2;
    if (numbers[middle] < value) begin = middle + 1;
    else count = middle;
  }
  return begin;
}

// One block per request.
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const PlanArgs args) {
  __shared__ int first_wrong;
  const int req = blockIdx.x, num_reqs = gridDim.x;
  pdl_trigger();
  pdl_wait();
  const int begin = args.cu_q[req], end = args.cu_q[req + 1], row = args.rows[req], wanted = args.wanted[req];
  const int32_t* tokens = args.token_ids + row * args.max_len + 1;
  for (int i = begin + threadIdx.x; i < end; i += kPlanThreads) args.following[i] = tokens[args.positions[i]];
  const int first = first_from(args.logit_tokens, args.num_samples, begin);
  const int behind = first_from(args.logit_tokens, args.num_samples, end);
  if (threadIdx.x == 0) first_wrong = max(behind - 1, min(first, args.num_samples - 1));
  __syncthreads();
  for (int i = first + threadIdx.x; i < behind - 1; i += kPlanThreads) {
    const int next = min(args.logit_tokens[i] + 1, args.num_tokens - 1);
    if (args.ids[i] != args.input_ids[next]) atomicMin(&first_wrong, i);
  }
  __syncthreads();
  const int last = args.logit_tokens[first_wrong], position = args.positions[last];
  if (threadIdx.x == 0) {
    args.last[req] = last, args.token[req] = tokens[position];
    args.kept[req] = max(first_wrong - first, 0);
  }
  const int64_t size = int64_t(args.passes) * num_reqs * args.places;
  for (int i = threadIdx.x; i < args.passes * args.places; i += kPlanThreads) {
    const int told = args.first_told + i / args.places, place = i % args.places;
    const bool is_wanted = wanted >= max(told + 1, place);
    const int at = position + 1 - args.first_told + told;  // of the first place
    int32_t* out = args.numbers + (int64_t(i / args.places) * num_reqs + req) * args.places + place;
    out[0] = is_wanted ? row : args.padding_row;
    out[size] = is_wanted ? at + place : 0;
    out[2 * size] = is_wanted ? at + min(wanted, args.places - 1) + 1 : 1;
  }
}

struct FollowArgs {
  const int32_t* kept;     // [n]
  const int64_t* told;     // [n, longest]
  const int32_t* follows;  // [m]
  const int32_t* cu_q;     // [m + 1]
  const int32_t* rows;     // [m] of the table
  int32_t* positions;      // [t]
  int32_t* ends;           // [t]
  int32_t* seq_lens;       // [m]
  int32_t* held;           // [m]
  SamplingParams* params;  // [t]
  int32_t* token_ids;      // [num_rows, max_len]
  int64_t max_len;
  int longest;
};

// One block of a warp per request. It does not trigger: kernels behind it may read lengths before they wait.
__global__ void __launch_bounds__(32) follow_kernel(const FollowArgs args) {
  const int req = blockIdx.x;
  pdl_wait();
  const int before = args.follows[req] - 1;
  if (before < 0) return;
  const int kept = args.kept[before], begin = args.cu_q[req], end = args.cu_q[req + 1];
  int32_t* tokens = args.token_ids + args.rows[req] * args.max_len;
  for (int i = begin + threadIdx.x; i < end; i += 32) {
    const int position = args.positions[i] + kept, place = i - begin - 1;
    args.positions[i] = position, args.ends[i] = position + 1;
    args.params[i].position += kept;
    if (place >= 0 && place < args.longest) tokens[position] = args.told[int64_t(before) * args.longest + place];
  }
  if (threadIdx.x == 0) args.seq_lens[req] += kept, args.held[req] = kept;
  __threadfence();
}

// Sums over the block, of two at once. Every thread calls it, once per kernel.
__device__ __forceinline__ float2 block_sums(float a, float b) {
  __shared__ float2 partial[kBestThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  a = warp_sum(a), b = warp_sum(b);
  if (lane == 0) partial[warp] = make_float2(a, b);
  __syncthreads();
  const float2 mine = lane < kBestThreads / 32 ? partial[lane] : make_float2(0.0f, 0.0f);
  return make_float2(warp_sum(mine.x), warp_sum(mine.y));
}

template <typename T>
__device__ __forceinline__ float squares(const Chunk<T>& values) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kVecLen<T>; ++j) sum += to_float(values.data[j]) * to_float(values.data[j]);
  return sum;
}

template <typename T>
struct BestArgs {
  const T* logits;       // [n, vocab], rows `stride` apart
  const T* weight;       // [vocab, hidden], or null: logits are compared as they are
  const T* x;            // [n, hidden]
  const T* norm;         // [hidden]
  const int64_t* moves;  // [vocab], or null
  int64_t* out;          // [n]
  int64_t stride, x_stride;
  int vocab, hidden, most;
  bool is_aligned;  // whether rows of logits can be read by vectors
  float eps;
};

// By row: of the parts that are done, the best one's score and token; and how many they are. Zero between launches, which
// share them: use one stream of a device at a time.
__device__ unsigned long long best_keys[kMaxRows];
__device__ unsigned int num_done[kMaxRows];

// Larger for larger scores, then for smaller tokens; least for what is not a number, and never 0.
__device__ __forceinline__ unsigned long long key_of(float score, int token) {
  const unsigned int bits = __float_as_uint(score);
  const unsigned int order = isnan(score) ? 0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(order) << 32 | (0xffffffffu - static_cast<unsigned int>(token));
}

__device__ __forceinline__ int token_of(unsigned long long key) {
  return static_cast<int>(0xffffffffu - static_cast<unsigned int>(key));
}

__device__ __forceinline__ unsigned long long block_max(unsigned long long key) {
  __shared__ unsigned long long partial[kBestThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) key = max(key, __shfl_xor_sync(0xffffffffu, key, offset));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = key;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kBestThreads / 32; ++i) key = max(key, partial[i]);
  return key;
}

// The score of a token by all bits of its row. Every thread of the block calls it.
template <typename T>
__device__ __forceinline__ float exact_score(const BestArgs<T>& args, int64_t row, int64_t token) {
  constexpr int kLen = kVecLen<T>;
  float sum = 0.0f, product = 0.0f;
  for (int at = threadIdx.x * kLen; at < args.hidden; at += kBestThreads * kLen) {
    const Chunk<T> x = load_vec(args.x + row * args.x_stride + at), gain = load_vec(args.norm + at);
    const Chunk<T> weight = load_vec(args.weight + token * args.hidden + at);
    sum += squares<T>(x);
#pragma unroll
    for (int j = 0; j < kLen; ++j) product += to_float(x.data[j]) * to_float(gain.data[j]) * to_float(weight.data[j]);
  }
  const float2 total = block_sums(sum, product);
  return total.y * rsqrtf(total.x / args.hidden + args.eps);
}

// Block (part, row). Parts take turns, so that tokens that are alike in number, and in how probable they are, are of
// different ones.
template <typename T>
__global__ void __launch_bounds__(kBestThreads) best_kernel(const BestArgs<T> args) {
  constexpr int kLen = kVecLen<T>;
  const int row = blockIdx.y;
  const T* logits = args.logits + row * args.stride;
  pdl_trigger();
  pdl_wait();
  unsigned long long key = 0;
  for (int at = (blockIdx.x + threadIdx.x * gridDim.x) * kLen; at < args.vocab; at += kBestThreads * gridDim.x * kLen) {
    if (args.is_aligned && at + kLen <= args.vocab) {
      const Chunk<T> values = load_vec(logits + at);
#pragma unroll
      for (int j = 0; j < kLen; ++j) key = max(key, key_of(to_float(values.data[j]), at + j));
    } else {
      for (int i = at; i < min(at + kLen, args.vocab); ++i) key = max(key, key_of(to_float(logits[i]), i));
    }
  }
  key = block_max(key);
  if (key != 0 && args.weight != nullptr) key = key_of(exact_score(args, row, token_of(key)), token_of(key));
  if (threadIdx.x > 0) return;
  atomicMax(&best_keys[row], key);
  __threadfence();
  if (atomicAdd(&num_done[row], 1u) + 1 < gridDim.x) return;
  __threadfence();
  const int64_t token = token_of(atomicExch(&best_keys[row], 0ull));
  num_done[row] = 0;
  args.out[row] = args.moves == nullptr ? token : min(max(token + args.moves[token], int64_t(0)), int64_t(args.most));
}

template <typename T>
const T* numbers_of(const TensorView& t, int64_t size) {
  MINISGL_CHECK((sizeof(T) == 4 ? is_int32(t) : is_int64(t)) && t.IsContiguous() && t.numel() == size)
      << "expected " << size << " whole numbers of " << sizeof(T) << " bytes";
  return static_cast<const T*>(t.data_ptr());
}

// A matrix of as many columns whose rows are whole vectors, of x's type.
template <typename T>
const T* matrix_of(const TensorView& t, const TensorView& x, int64_t columns) {
  MINISGL_CHECK(t.ndim() == 2 && t.size(1) == columns && t.stride(1) == 1 && t.dtype().code == x.dtype().code &&
                t.dtype().bits == x.dtype().bits && columns % kVecLen<T> == 0);
  MINISGL_CHECK(t.stride(0) % kVecLen<T> == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0);
  return static_cast<const T*>(t.data_ptr());
}

template <typename T>
const T* gains_of(const TensorView& t, const TensorView& x, int64_t size) {
  MINISGL_CHECK(t.ndim() == 1 && t.size(0) == size && t.IsContiguous() && t.dtype().code == x.dtype().code &&
                t.dtype().bits == x.dtype().bits && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0);
  return static_cast<const T*>(t.data_ptr());
}

}  // namespace

// Of a step's n requests and t tokens, m of which sample `ids`: the token after each one (following), which token is the
// last that is kept of each request, its drafts being right so far (last), the token after that (token); and for the
// passes that tell a draft, of tokens from that one on, with masks behind it where there are several places, rows,
// positions and lengths of sequences (numbers: [3, passes, n, places]), nobody's where a request wants no more.
// rows, wanted: [n]; cu_q: [n + 1]; positions: [t]; logit_tokens, ids: [m], m > 0; input_ids, following: [t] int64;
// last, token: [n] int64; token_ids: [num_rows, tokens]; int32 unless it says so. Without samples, a request's last
// token is any. skips_last: the step itself tells the first token of a draft. kept: [n], how many tokens of its draft a
// request keeps.
void plan(TensorView rows, TensorView wanted, TensorView cu_q, TensorView positions, TensorView logit_tokens,
          TensorView input_ids, TensorView ids, TensorView token_ids, int64_t padding_row, bool skips_last,
          TensorView following, TensorView last, TensorView token, TensorView numbers, TensorView kept) {
  const int64_t n = rows.numel(), t = positions.numel(), m = ids.numel();
  if (n == 0) return;
  MINISGL_CHECK(m > 0 && token_ids.ndim() == 2 && numbers.ndim() == 4 && numbers.size(0) == 3 && numbers.size(2) == n);
  PlanArgs args{};
  args.rows = numbers_of<int32_t>(rows, n);
  args.wanted = numbers_of<int32_t>(wanted, n);
  args.cu_q = numbers_of<int32_t>(cu_q, n + 1);
  args.positions = numbers_of<int32_t>(positions, t);
  args.logit_tokens = numbers_of<int32_t>(logit_tokens, m);
  args.input_ids = numbers_of<int64_t>(input_ids, t);
  args.ids = numbers_of<int32_t>(ids, m);
  args.token_ids = numbers_of<int32_t>(token_ids, token_ids.numel());
  args.following = const_cast<int64_t*>(numbers_of<int64_t>(following, t));
  args.last = const_cast<int64_t*>(numbers_of<int64_t>(last, n));
  args.token = const_cast<int64_t*>(numbers_of<int64_t>(token, n));
  args.numbers = const_cast<int32_t*>(numbers_of<int32_t>(numbers, numbers.numel()));
  args.kept = const_cast<int32_t*>(numbers_of<int32_t>(kept, n));
  args.max_len = token_ids.size(1);
  args.num_tokens = static_cast<int>(t), args.num_samples = static_cast<int>(m);
  args.passes = static_cast<int>(numbers.size(1)), args.places = static_cast<int>(numbers.size(3));
  args.first_told = skips_last, args.padding_row = static_cast<int>(padding_row);
  launch(LaunchConfig{dim3(n), dim3(kPlanThreads)}, current_stream(rows), plan_kernel, args);
}

// Moves a step of m requests and t tokens, all of which sample, to where the step before has got: its request i - 1 has
// kept kept[i - 1] tokens of its draft, and told[i - 1] is the next one, where follows[req] is i; 0: it is where it is to
// be. Positions, ends and lengths, the positions of the records (params: [t, words]) and what states are to take in
// (held: the first m) are so many more, and the tokens of drafts are written to the table. kept: [n]; told: [n, longest]
// int64; follows, rows, seq_lens: [m]; cu_q: [m + 1]; positions, ends: [t]; token_ids: [num_rows, tokens]; int32.
void follow(TensorView kept, TensorView told, TensorView follows, TensorView cu_q, TensorView rows,
            TensorView positions, TensorView ends, TensorView seq_lens, TensorView held, TensorView params,
            TensorView token_ids) {
  const int64_t m = follows.numel(), t = positions.numel();
  if (m == 0) return;
  MINISGL_CHECK(told.ndim() == 2 && told.size(0) == kept.numel() && token_ids.ndim() == 2 && held.numel() >= m);
  FollowArgs args{};
  args.kept = numbers_of<int32_t>(kept, kept.numel());
  args.told = numbers_of<int64_t>(told, told.numel());
  args.follows = numbers_of<int32_t>(follows, m);
  args.cu_q = numbers_of<int32_t>(cu_q, m + 1);
  args.rows = numbers_of<int32_t>(rows, m);
  args.positions = const_cast<int32_t*>(numbers_of<int32_t>(positions, t));
  args.ends = const_cast<int32_t*>(numbers_of<int32_t>(ends, t));
  args.seq_lens = const_cast<int32_t*>(numbers_of<int32_t>(seq_lens, m));
  args.held = const_cast<int32_t*>(numbers_of<int32_t>(held, held.numel()));
  const int32_t* words = numbers_of<int32_t>(params, t * int64_t(sizeof(SamplingParams) / sizeof(int32_t)));
  MINISGL_CHECK(reinterpret_cast<uintptr_t>(words) % alignof(SamplingParams) == 0);
  args.params = reinterpret_cast<SamplingParams*>(const_cast<int32_t*>(words));
  args.token_ids = const_cast<int32_t*>(numbers_of<int32_t>(token_ids, token_ids.numel()));
  args.max_len = token_ids.size(1), args.longest = static_cast<int>(told.size(1));
  const LaunchConfig config{dim3(m), dim3(32), 0, false};
  launch(config, current_stream(follows), follow_kernel, args);
}

// out [n] int64: the token of each row of logits [n, vocab] whose logit is the largest; with a weight [vocab, hidden]:
// of the best ones of the parts of the vocabulary, the one whose row is most like norm(x), x: [n, hidden]. moves: [vocab]
// int64, what is added to each token then, for tokens up to `most`; or empty.
void best(TensorView logits, Optional<TensorView> weight, TensorView x, TensorView norm, double eps,
          TensorView moves, int64_t most, TensorView out) {
  const int64_t n = logits.size(0), vocab = logits.size(1);
  if (n == 0) return;
  MINISGL_CHECK(logits.ndim() == 2 && logits.stride(1) == 1 && vocab > 0 && x.size(0) == n);
  by_type(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    BestArgs<T> args{};
    args.logits = static_cast<const T*>(logits.data_ptr()), args.stride = logits.stride(0);
    args.is_aligned = reinterpret_cast<uintptr_t>(args.logits) % 16 == 0 && args.stride % kVecLen<T> == 0;
    if (weight.has_value()) {
      args.hidden = static_cast<int>(x.size(1)), args.x_stride = x.stride(0), args.eps = static_cast<float>(eps);
      args.x = matrix_of<T>(x, logits, args.hidden), args.norm = gains_of<T>(norm, logits, args.hidden);
      args.weight = matrix_of<T>(*weight, logits, args.hidden);
      MINISGL_CHECK((*weight).IsContiguous() && (*weight).size(0) >= vocab);
    }
    args.moves = moves.numel() > 0 ? numbers_of<int64_t>(moves, vocab) : nullptr;
    args.vocab = static_cast<int>(vocab), args.most = static_cast<int>(most);
    const int64_t some_parts = vocab / (2 * kBestThreads * kVecLen<T>);
    const int64_t parts = weight.has_value() ? kParts : std::clamp<int64_t>(some_parts, 1, kParts);
    int64_t* ids = const_cast<int64_t*>(numbers_of<int64_t>(out, n));
    for (int64_t begin = 0; begin < n; begin += kMaxRows) {
      BestArgs<T> some = args;
      some.logits += begin * args.stride, some.x += begin * args.x_stride, some.out = ids + begin;
      const LaunchConfig config{dim3(parts, std::min<int64_t>(kMaxRows, n - begin)), dim3(kBestThreads)};
      launch(config, current_stream(logits), best_kernel<T>, some);
    }
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan, minisgl::plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(follow, minisgl::follow);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(best, minisgl::best);

}  // namespace minisgl
