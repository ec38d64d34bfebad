// The memory-bound operations between the matrix products: norms, rotary embedding with the KV store, activation,
// embedding. Every access is one 16-byte vector where the layout allows it; statistics and products are in fp32.
//
// Rounding follows the torch reference (kernel/ops.py): a norm is rounded to the dtype before the weight multiplies
// it, silu before `up` does. The rotation alone keeps fp32 until its end.
#include <minisgl/float8.cuh>

#include <algorithm>

namespace minisgl {

namespace {

constexpr int kMaxThreads = 1024;

template <typename T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

template <typename T, int N>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& v) {
  *reinterpret_cast<Vec<T, N>*>(p) = v;
}

// Sum over the block. Every thread calls it, once per kernel: `partial` is not protected against a second use.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float partial[kMaxThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  x = warp_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return warp_sum(lane < num_warps ? partial[lane] : 0.0f);
}

template <typename T>
struct NormArgs {
  const T* x;         // [n, hidden], rows `x_stride` elements apart
  const T* weight;    // [hidden]
  T* out;             // [n, hidden], contiguous
  int64_t x_stride;
  int hidden;
  float eps;
  const T* late;      // [hidden], of which x becomes its sum with it once it is normalised; or null
};

// One block per row, kVecs vectors per thread, which stay in registers between the two passes.
template <typename T, int kVecs>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(const NormArgs<T> args) {
  constexpr int kLen = kVecLen<T>;
  const int64_t row = blockIdx.x;
  const int num_vecs = args.hidden / kLen;
  Vec<T, kLen> values[kVecs];
  pdl_trigger();
  pdl_wait();
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (v >= num_vecs) continue;
    values[i] = load_vec<T, kLen>(args.x + row * args.x_stride + v * kLen);
#pragma unroll
    for (int j = 0; j < kLen; ++j) squares += to_float(values[i].data[j]) * to_float(values[i].data[j]);
  }
  const float scale = rsqrtf(block_sum(squares) / args.hidden + args.eps);
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (v >= num_vecs) continue;
    const Vec<T, kLen> weight = load_vec<T, kLen>(args.weight + v * kLen);
    if (args.late != nullptr) {
      Vec<T, kLen> sum = load_vec<T, kLen>(args.late + v * kLen);
#pragma unroll
      for (int j = 0; j < kLen; ++j) sum.data[j] = from_float<T>(to_float(values[i].data[j]) + to_float(sum.data[j]));
      store_vec<T, kLen>(const_cast<T*>(args.x) + row * args.x_stride + v * kLen, sum);
    }
#pragma unroll
    for (int j = 0; j < kLen; ++j) {
      values[i].data[j] = from_float<T>(round_to<T>(to_float(values[i].data[j]) * scale) * to_float(weight.data[j]));
    }
    store_vec<T, kLen>(args.out + row * args.hidden + v * kLen, values[i]);
  }
}

template <typename T>
void launch_rms_norm(const NormArgs<T>& args, int64_t num_rows, cudaStream_t stream) {
  const int num_vecs = args.hidden / kVecLen<T>;
  // Few rows want many threads each; many rows want several loads in flight per thread.
  const int wanted = num_rows <= 512 ? kMaxThreads : 256;
  int per_thread = 1;
  while (per_thread < 4 && per_thread * wanted < num_vecs) per_thread *= 2;
  MINISGL_CHECK(per_thread * kMaxThreads >= num_vecs) << "rms_norm: hidden size " << args.hidden << " is too large";
  const int threads = ((num_vecs + per_thread - 1) / per_thread + 31) / 32 * 32;
  const LaunchConfig config{dim3(num_rows), dim3(threads)};
  if (per_thread == 1) launch(config, stream, rms_norm_kernel<T, 1>, args);
  else if (per_thread == 2) launch(config, stream, rms_norm_kernel<T, 2>, args);
  else launch(config, stream, rms_norm_kernel<T, 4>, args);
}

template <typename T>
struct NormLinearArgs {
  NormArgs<T> norm;
  const T* weight;  // [outputs, hidden]
  const T* bias;    // [outputs] or null
  T* out;           // [n, outputs]
};

// Block (output, row), a vector for each thread: the row's norm, which the first block writes, and the output. The product
// does not wait for the sum of squares: both are added up together.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) norm_linear_kernel(const NormLinearArgs<T> args) {
  constexpr int kLen = kVecLen<T>;
  __shared__ float partial[2][kMaxThreads / 32];
  const NormArgs<T>& norm = args.norm;
  const int64_t row = blockIdx.y;
  const int output = blockIdx.x, at = threadIdx.x * kLen, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool active = at < norm.hidden;
  Vec<T, kLen> x{}, gain{}, weight{};
  if (active) {
    gain = load_vec<T, kLen>(norm.weight + at);
    weight = load_vec<T, kLen>(args.weight + static_cast<int64_t>(output) * norm.hidden + at);
  }
  const float bias = args.bias == nullptr ? 0.0f : to_float(args.bias[output]);
  pdl_trigger();
  pdl_wait();
  if (active) x = load_vec<T, kLen>(norm.x + row * norm.x_stride + at);
  float squares = 0.0f, product = 0.0f;
#pragma unroll
  for (int j = 0; j < kLen; ++j) {
    const float value = to_float(x.data[j]);
    squares += value * value;
    product += value * to_float(gain.data[j]) * to_float(weight.data[j]);
  }
  squares = warp_sum(squares), product = warp_sum(product);
  if (lane == 0) partial[0][warp] = squares, partial[1][warp] = product;
  __syncthreads();
  if (warp > 0 && output > 0) return;
  const bool summed = lane < blockDim.x / 32;
  const float scale = rsqrtf(warp_sum(summed ? partial[0][lane] : 0.0f) / norm.hidden + norm.eps);
  if (output == 0 && active) {
#pragma unroll
    for (int j = 0; j < kLen; ++j) {
      x.data[j] = from_float<T>(round_to<T>(to_float(x.data[j]) * scale) * to_float(gain.data[j]));
    }
    store_vec<T, kLen>(norm.out + row * norm.hidden + at, x);
  }
  product = warp_sum(summed ? partial[1][lane] : 0.0f) * scale + bias;
  if (threadIdx.x == 0) args.out[row * gridDim.x + output] = from_float<T>(product);
}

template <typename T>
struct RopeArgs {
  T* qkv;             // [n, num_q + 2 * num_kv, head_dim], tokens `stride` apart
  const T* weight;    // [num_q + num_kv, head_dim] or null
  const float* cos;   // [n, head_dim]
  const float* sin;   // [n, head_dim]
  void* k_cache;      // [num_slots, num_kv, head_dim] T, or e4m3 where `narrows`
  void* v_cache;
  const int64_t* slots;  // [n]
  int64_t stride;
  int num_q, num_kv, head_dim;
  float eps;
  bool narrows;
};

// One head of one token, its dimensions spread over kGroup lanes: `low` is lane's part of the first half, `high` of
// the second, so that each lane holds both ends of its rotations. Idle lanes hold zeros.
template <typename T, int kLen, int kGroup>
__device__ __forceinline__ void norm_head(float (&low)[kLen], float (&high)[kLen], const T* weight, int half,
                                          bool active, float eps) {
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kLen; ++j) squares += low[j] * low[j] + high[j] * high[j];
  const float scale = rsqrtf(warp_sum<kGroup>(squares) / (2 * half) + eps);
  if (!active) return;
  const Vec<T, kLen> weight_low = load_vec<T, kLen>(weight), weight_high = load_vec<T, kLen>(weight + half);
#pragma unroll
  for (int j = 0; j < kLen; ++j) {
    low[j] = round_to<T>(round_to<T>(low[j] * scale) * to_float(weight_low.data[j]));
    high[j] = round_to<T>(round_to<T>(high[j] * scale) * to_float(weight_high.data[j]));
  }
}

// Both parts of a head, to element `at` of a cache.
template <typename T, int N>
__device__ __forceinline__ void store_head(void* cache, int64_t at, int half, const Vec<T, N>& low,
                                           const Vec<T, N>& high, bool narrows) {
  if (!narrows) {
    store_vec<T, N>(static_cast<T*>(cache) + at, low);
    store_vec<T, N>(static_cast<T*>(cache) + at + half, high);
    return;
  }
  Vec<uint8_t, N> bytes[2];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    bytes[0].data[j] = narrow(to_float(low.data[j]));
    bytes[1].data[j] = narrow(to_float(high.data[j]));
  }
  store_vec<uint8_t, N>(static_cast<uint8_t*>(cache) + at, bytes[0]);
  store_vec<uint8_t, N>(static_cast<uint8_t*>(cache) + at + half, bytes[1]);
}

// One block per token; kGroup lanes (a power of two) per head, of which head_dim / 2 / kLen work.
template <typename T, int kLen, int kGroup>
__global__ void __maxnreg__(96) rope_kernel(const RopeArgs<T> args) {
  const int64_t token = blockIdx.x;
  const int half = args.head_dim / 2, num_heads = args.num_q + 2 * args.num_kv;
  const int offset = (threadIdx.x % kGroup) * kLen;  // within each half
  const bool active = offset < half;
  const int num_groups = blockDim.x / kGroup;
  pdl_trigger();
  pdl_wait();
  Vec<float, 4> rotation[4][kLen / 4];  // cos of the low half, of the high half, sin of the low, of the high
  const float* tables[2] = {args.cos + token * args.head_dim + offset, args.sin + token * args.head_dim + offset};
  if (active) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int j = 0; j < kLen / 4; ++j) rotation[t][j] = load_vec<float, 4>(tables[t / 2] + (t % 2) * half + j * 4);
    }
  }
  const int64_t slot = args.slots[token];
  // The bound is the same for all lanes of a warp, which reduce together.
  const int rounds = (num_heads + num_groups - 1) / num_groups;
  for (int round = 0; round < rounds; ++round) {
    const int head = round * num_groups + threadIdx.x / kGroup;
    const bool works = active && head < num_heads;
    T* source = args.qkv + token * args.stride + head * args.head_dim + offset;
    Vec<T, kLen> low_in{}, high_in{};
    if (works) {
      low_in = load_vec<T, kLen>(source);
      high_in = load_vec<T, kLen>(source + half);
    }
    const bool is_value = head >= args.num_q + args.num_kv;
    float low[kLen], high[kLen];
#pragma unroll
    for (int j = 0; j < kLen; ++j) low[j] = to_float(low_in.data[j]), high[j] = to_float(high_in.data[j]);
    if (args.weight != nullptr) {
      norm_head<T, kLen, kGroup>(low, high, args.weight + int64_t(head) * args.head_dim + offset, half,
                                 works && !is_value, args.eps);
    }
    if (!works) continue;
    if (!is_value) {
#pragma unroll
      for (int j = 0; j < kLen; ++j) {
        const float a = low[j], b = high[j];
        low_in.data[j] = from_float<T>(a * rotation[0][j / 4].data[j % 4] + b * rotation[2][j / 4].data[j % 4]);
        high_in.data[j] = from_float<T>(b * rotation[1][j / 4].data[j % 4] + a * rotation[3][j / 4].data[j % 4]);
      }
    }
    if (head < args.num_q) {  // queries stay where they are
      store_head<T, kLen>(source, 0, half, low_in, high_in, false);
    } else if (slot >= 0) {
      const int kv_head = head - args.num_q - (is_value ? args.num_kv : 0);
      const int64_t at = (slot * args.num_kv + kv_head) * args.head_dim + offset;
      store_head<T, kLen>(is_value ? args.v_cache : args.k_cache, at, half, low_in, high_in, args.narrows);
    }
  }
}

template <typename T, int kLen, int kGroup>
void launch_rope(const RopeArgs<T>& args, int64_t num_tokens, cudaStream_t stream) {
  const int num_heads = args.num_q + 2 * args.num_kv;
  const int most = num_tokens <= 512 ? 512 : 256;
  const int threads = std::min(most, (num_heads * kGroup + 31) / 32 * 32);
  launch(LaunchConfig{dim3(num_tokens), dim3(threads)}, stream, rope_kernel<T, kLen, kGroup>, args);
}

template <typename T, int kLen>
void choose_rope(const RopeArgs<T>& args, int64_t num_tokens, cudaStream_t stream) {
  const int lanes = args.head_dim / 2 / kLen;
  MINISGL_CHECK(lanes <= 32) << "qk_norm_rope_store: head_dim " << args.head_dim << " is too large";
  if (lanes <= 4) launch_rope<T, kLen, 4>(args, num_tokens, stream);
  else if (lanes <= 8) launch_rope<T, kLen, 8>(args, num_tokens, stream);
  else if (lanes <= 16) launch_rope<T, kLen, 16>(args, num_tokens, stream);
  else launch_rope<T, kLen, 32>(args, num_tokens, stream);
}

// Grid: (rows, vectors of a row / threads).
template <typename T>
__global__ void __launch_bounds__(256) silu_and_mul_kernel(const T* gate_up, T* out, int64_t row_stride, int inner) {
  constexpr int kLen = kVecLen<T>;
  const int64_t row = blockIdx.x;
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * kLen;
  pdl_trigger();
  pdl_wait();
  if (column >= inner) return;
  const Vec<T, kLen> gate = load_vec<T, kLen>(gate_up + row * row_stride + column);
  const Vec<T, kLen> up = load_vec<T, kLen>(gate_up + row * row_stride + inner + column);
  Vec<T, kLen> result;
#pragma unroll
  for (int j = 0; j < kLen; ++j) {
    const float x = to_float(gate.data[j]);
    result.data[j] = from_float<T>(round_to<T>(x / (1.0f + __expf(-x))) * to_float(up.data[j]));
  }
  store_vec<T, kLen>(out + row * inner + column, result);
}

// One block per token. Ids outside [first, first + count) belong to other ranks and give zeros.
template <typename T>
__global__ void __launch_bounds__(256)
embedding_kernel(const int64_t* ids, const T* weight, int64_t first, int64_t count, T* out, int hidden) {
  constexpr int kLen = kVecLen<T>;
  const int64_t token = blockIdx.x;
  pdl_trigger();
  pdl_wait();
  const int64_t id = ids[token] - first;
  const bool here = id >= 0 && id < count;
  for (int v = threadIdx.x; v < hidden / kLen; v += blockDim.x) {
    Vec<T, kLen> value{};
    if (here) value = load_vec<T, kLen>(weight + id * hidden + v * kLen);
    store_vec<T, kLen>(out + token * hidden + v * kLen, value);
  }
}

bool aligned(const TensorView& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }

bool same_dtype(const TensorView& a, const TensorView& b) {
  return a.dtype().code == b.dtype().code && a.dtype().bits == b.dtype().bits;
}

// x: [n, hidden] with any row stride that keeps rows 16-byte aligned.
void check_rows(const TensorView& x, int64_t num_rows, int64_t hidden, const TensorView& like) {
  MINISGL_CHECK(x.ndim() == 2 && x.size(0) == num_rows && x.size(1) == hidden && same_dtype(x, like));
  const int64_t bytes = x.dtype().bits / 8;
  MINISGL_CHECK(hidden * bytes % 16 == 0 && aligned(x)) << "rows must be whole 16-byte vectors";
  MINISGL_CHECK(x.stride(1) == 1 && (num_rows <= 1 || x.stride(0) * bytes % 16 == 0));
}

// x: [n, hidden], row stride allowed; weight: [hidden]; out: [n, hidden].
template <typename T>
NormArgs<T> norm_args(const TensorView& x, const TensorView& weight, double eps, const TensorView& out) {
  const int64_t hidden = x.size(1);
  check_rows(x, x.size(0), hidden, x);
  check_rows(out, x.size(0), hidden, x);
  MINISGL_CHECK(out.IsContiguous() && weight.IsContiguous() && aligned(weight) && same_dtype(weight, x));
  MINISGL_CHECK(weight.ndim() == 1 && weight.size(0) == hidden);
  return {static_cast<const T*>(x.data_ptr()),
          static_cast<const T*>(weight.data_ptr()),
          static_cast<T*>(out.data_ptr()),
          x.stride(0),
          static_cast<int>(hidden),
          static_cast<float>(eps)};
}

}  // namespace

// out = norm(x) * weight, and then x += late. x: [n, hidden], row stride allowed; weight, late: [hidden]; out: [n, hidden], may
// be x where nothing is late.
void rms_norm(TensorView x, TensorView weight, double eps, TensorView out, tvm::ffi::Optional<TensorView> late) {
  if (x.size(0) == 0) return;
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto args = norm_args<T>(x, weight, eps, out);
    if (late.has_value()) {
      const TensorView& vector = late.value();
      MINISGL_CHECK(vector.IsContiguous() && aligned(vector) && same_dtype(vector, x) && vector.numel() == x.size(1));
      MINISGL_CHECK(out.data_ptr() != x.data_ptr());
      args.late = static_cast<const T*>(vector.data_ptr());
    }
    launch_rms_norm<T>(args, x.size(0), current_stream(x));
  });
}

// normed = norm(x) * gain, and out = normed weight^T + bias. x, normed: [n, hidden], of up to 1,024 vectors of 16 bytes;
// gain: [hidden]; weight: [outputs, hidden]; bias: [outputs]; out: [n, outputs].
void norm_linear(TensorView x, TensorView gain, double eps, TensorView weight, tvm::ffi::Optional<TensorView> bias,
                 TensorView normed, TensorView out) {
  const int64_t num_rows = x.size(0), outputs = weight.size(0), vecs = x.size(1) * x.dtype().bits / 128;
  if (num_rows == 0) return;
  check_rows(weight, outputs, x.size(1), x);
  MINISGL_CHECK(weight.IsContiguous() && out.IsContiguous() && same_dtype(out, x) && out.ndim() == 2);
  MINISGL_CHECK(out.size(0) == num_rows && out.size(1) == outputs && vecs <= kMaxThreads && num_rows < 65536);
  if (bias.has_value()) {
    MINISGL_CHECK((*bias).IsContiguous() && (*bias).numel() == outputs && same_dtype(*bias, x));
  }
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const NormLinearArgs<T> args{norm_args<T>(x, gain, eps, normed), static_cast<const T*>(weight.data_ptr()),
                                 static_cast<const T*>(bias.has_value() ? (*bias).data_ptr() : nullptr),
                                 static_cast<T*>(out.data_ptr())};
    const LaunchConfig config{dim3(outputs, num_rows), dim3((vecs + 31) / 32 * 32)};
    launch(config, current_stream(x), norm_linear_kernel<T>, args);
  });
}

void qk_norm_rope_store(TensorView qkv, int64_t num_q, int64_t num_kv, tvm::ffi::Optional<TensorView> norm_weight,
                        double eps, TensorView cos, TensorView sin, TensorView k_cache, TensorView v_cache,
                        TensorView slots) {
  const int64_t num_tokens = qkv.size(0), head_dim = qkv.size(2), stride = qkv.stride(0);
  if (num_tokens == 0) return;
  MINISGL_CHECK(qkv.ndim() == 3 && qkv.stride(1) == head_dim && qkv.stride(2) == 1 && stride % 8 == 0 && aligned(qkv));
  MINISGL_CHECK(qkv.size(1) == num_q + 2 * num_kv && head_dim % 8 == 0 && head_dim <= 256);
  MINISGL_CHECK(is_fp32(cos) && cos.IsContiguous() && cos.numel() == num_tokens * head_dim && aligned(cos));
  MINISGL_CHECK(is_fp32(sin) && sin.IsContiguous() && sin.numel() == num_tokens * head_dim && aligned(sin));
  MINISGL_CHECK(k_cache.ndim() == 3 && k_cache.size(1) == num_kv && k_cache.size(2) == head_dim);
  MINISGL_CHECK(v_cache.ndim() == 3 && v_cache.size(1) == num_kv && v_cache.size(2) == head_dim);
  const bool narrows = k_cache.dtype().bits == 8;
  MINISGL_CHECK(k_cache.IsContiguous() && aligned(k_cache) && (narrows || same_dtype(k_cache, qkv)));
  MINISGL_CHECK(v_cache.IsContiguous() && aligned(v_cache) && same_dtype(v_cache, k_cache));
  MINISGL_CHECK(is_int64(slots) && slots.IsContiguous() && slots.numel() == num_tokens);
  const void* weight = nullptr;
  if (norm_weight.has_value()) {
    const TensorView w = norm_weight.value();
    MINISGL_CHECK(w.IsContiguous() && aligned(w) && same_dtype(w, qkv) && w.numel() == (num_q + num_kv) * head_dim);
    weight = w.data_ptr();
  }
  by_type(qkv, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    RopeArgs<T> args{static_cast<T*>(qkv.data_ptr()),
                     static_cast<const T*>(weight),
                     static_cast<const float*>(cos.data_ptr()),
                     static_cast<const float*>(sin.data_ptr()),
                     k_cache.data_ptr(),
                     v_cache.data_ptr(),
                     static_cast<const int64_t*>(slots.data_ptr()),
                     stride,
                     static_cast<int>(num_q),
                     static_cast<int>(num_kv),
                     static_cast<int>(head_dim),
                     static_cast<float>(eps),
                     narrows};
    const cudaStream_t stream = current_stream(qkv);
    // Each half of a head must be whole vectors: 16 bytes, or 8 where head_dim is an odd multiple of 8.
    if (kVecLen<T> == 8 && head_dim % 16 == 0) choose_rope<T, kVecLen<T>>(args, num_tokens, stream);
    else choose_rope<T, 4>(args, num_tokens, stream);
  });
}

void silu_and_mul(TensorView gate_up, TensorView out) {
  const int64_t num_rows = out.size(0), inner = out.size(1);
  if (num_rows == 0) return;
  check_rows(out, num_rows, inner, gate_up);
  check_rows(gate_up, num_rows, 2 * inner, out);
  MINISGL_CHECK(out.IsContiguous());
  by_type(out, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int num_vecs = static_cast<int>(inner) / kVecLen<T>;
    const int threads = std::min(256, (num_vecs + 31) / 32 * 32);
    const LaunchConfig config{dim3(num_rows, (num_vecs + threads - 1) / threads), dim3(threads)};
    launch(config, current_stream(out), silu_and_mul_kernel<T>, static_cast<const T*>(gate_up.data_ptr()),
           static_cast<T*>(out.data_ptr()), gate_up.stride(0), static_cast<int>(inner));
  });
}

// ids: [n] int64; weight: [count, hidden], the rows of ids first .. first + count - 1; out: [n, hidden].
void embedding(TensorView ids, TensorView weight, int64_t first, int64_t count, TensorView out) {
  const int64_t num_tokens = ids.numel(), hidden = weight.size(1);
  if (num_tokens == 0) return;
  MINISGL_CHECK(is_int64(ids) && ids.IsContiguous() && weight.IsContiguous() && out.IsContiguous());
  MINISGL_CHECK(count <= weight.size(0));
  check_rows(out, num_tokens, hidden, weight);
  check_rows(weight, weight.size(0), hidden, out);
  by_type(out, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int num_vecs = static_cast<int>(hidden) / kVecLen<T>;
    const int threads = std::min(256, (num_vecs + 31) / 32 * 32);
    launch(LaunchConfig{dim3(num_tokens), dim3(threads)}, current_stream(out), embedding_kernel<T>,
           static_cast<const int64_t*>(ids.data_ptr()), static_cast<const T*>(weight.data_ptr()), first, count,
           static_cast<T*>(out.data_ptr()), static_cast<int>(hidden));
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, minisgl::rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_linear, minisgl::norm_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(qk_norm_rope_store, minisgl::qk_norm_rope_store);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_and_mul, minisgl::silu_and_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(embedding, minisgl::embedding);

}  // namespace minisgl
