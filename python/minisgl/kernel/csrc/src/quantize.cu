// Activations as e4m3, for products with e4m3 weights: x, or its RMS norm, over a scale of each token, of each token and
// 128 features, or one that the checkpoint knows. Norms are rounded as in elementwise.cu.
#include <minisgl/float8.cuh>

#include <tvm/ffi/optional.h>

#include <algorithm>

namespace minisgl {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kLen = 8;              // elements of a vector
constexpr int kGroup = 128 / kLen;   // lanes that share a scale
constexpr float kLeast = 1e-12f;     // the largest magnitude of a token of zeros

template <typename T>
struct Args {
  const T* x;       // [n, features], rows `x_stride` elements apart
  const T* norm;    // [features] or null
  uint8_t* out;     // [n, features], contiguous
  float* scales;    // [n], or [features / 128, pitch] with a pitch
  int64_t x_stride;
  int pitch;        // 0: a scale of each token
  int features;
  float eps;
  float input_scale;  // 0: scales are found here
};

template <typename T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

// Over the block; `partial`: of 32 floats, for one use.
template <typename F>
__device__ __forceinline__ float block_reduce(float x, float* partial, F reduce) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  x = reduce(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return reduce(lane < num_warps ? partial[lane] : 0.0f);
}

// Keeps the compiler from holding on to what it has made of a vector: it is made anew, and takes half the registers.
template <typename V>
__device__ __forceinline__ void forget(V& vec) {
  uint4& words = reinterpret_cast<uint4&>(vec);
  asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
}

template <typename T>
__device__ __forceinline__ Vec<T, kLen> load(const T* from, int v) {
  return *reinterpret_cast<const Vec<T, kLen>*>(from + v * kLen);
}

template <typename T>
__device__ __forceinline__ float largest_of(const Vec<T, kLen>& vec) {
  float largest = 0.0f;
#pragma unroll
  for (int j = 0; j < kLen; ++j) largest = fmaxf(largest, fabsf(to_float(vec.data[j])));
  return largest;
}

template <typename T>
__device__ __forceinline__ uint2 narrow_all(const Vec<T, kLen>& vec, float factor) {
  uint32_t pairs[kLen / 2];
#pragma unroll
  for (int j = 0; j < kLen / 2; ++j) {
    pairs[j] = narrow(to_float(vec.data[2 * j]) * factor, to_float(vec.data[2 * j + 1]) * factor);
  }
  return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

template <typename T>
__device__ __forceinline__ void apply_norm(Vec<T, kLen>& vec, const Vec<T, kLen>& weight, float scale) {
#pragma unroll
  for (int j = 0; j < kLen; ++j) {
    vec.data[j] = from_float<T>(round_to<T>(to_float(vec.data[j]) * scale) * to_float(weight.data[j]));
  }
}

// One block per token, kVecs vectors per thread. With so few registers an SM has two blocks for the widest tokens.
template <typename T, int kVecs>
__global__ void __maxnreg__(48) quantize_kernel(const Args<T> args) {
  __shared__ float partial[2][32];
  const int64_t row = blockIdx.x;
  const int num_vecs = args.features / kLen;
  constexpr bool kEarly = kVecs <= 2;  // few enough, read the norm's weight while the kernel ahead still runs
  Vec<T, kLen> values[kVecs]{}, weights[kVecs];  // as T, which norms are rounded to: few registers, many tokens at a time
  pdl_trigger();
#pragma unroll
  for (int i = 0; kEarly && i < kVecs; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (args.norm != nullptr && v < num_vecs) weights[i] = load(args.norm, v);
  }
  pdl_wait();
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (v < num_vecs) values[i] = load(args.x + row * args.x_stride, v);
#pragma unroll
    for (int j = 0; j < kLen; ++j) squares += to_float(values[i].data[j]) * to_float(values[i].data[j]);
    forget(values[i]);
  }
  if (args.norm != nullptr) {
    const float sum = block_reduce(squares, partial[0], [](float x) { return warp_sum(x); });
    const float scale = rsqrtf(sum / args.features + args.eps);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      if (!kEarly && v < num_vecs) weights[i] = load(args.norm, v);
      if (v < num_vecs) apply_norm(values[i], weights[i], scale);
      forget(values[i]);
    }
  }
  const bool by_group = args.pitch > 0;
  float of_all = 0.0f;
  if (!by_group && args.input_scale == 0.0f) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      of_all = fmaxf(of_all, largest_of(values[i]));
      forget(values[i]);
    }
    of_all = block_reduce(of_all, partial[1], [](float x) { return warp_max(x); });
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    float scale = args.input_scale;
    if (scale == 0.0f) {  // by whole warps, whoever has elements
      scale = fmaxf(by_group ? warp_max<kGroup>(largest_of(values[i])) : of_all, kLeast) / kMaxFloat8;
    }
    if (v >= num_vecs) continue;
    *reinterpret_cast<uint2*>(args.out + row * args.features + v * kLen) = narrow_all(values[i], 1.0f / scale);
    if (by_group && v % kGroup == 0) args.scales[static_cast<int64_t>(v / kGroup) * args.pitch + row] = scale;
    if (!by_group && v == 0) args.scales[row] = scale;
  }
}

template <typename T>
void run(const Args<T>& args, int64_t num_rows, cudaStream_t stream) {
  const int num_vecs = args.features / kLen, wanted = num_rows <= 512 ? kMaxThreads : 256;
  int per_thread = 1;
  while (per_thread < 4 && per_thread * wanted < num_vecs) per_thread *= 2;
  MINISGL_CHECK(per_thread * kMaxThreads >= num_vecs) << "too many features: " << args.features;
  const int threads = ((num_vecs + per_thread - 1) / per_thread + 31) / 32 * 32;
  const LaunchConfig config{dim3(num_rows), dim3(threads)};
  if (per_thread == 1) launch(config, stream, quantize_kernel<T, 1>, args);
  else if (per_thread == 2) launch(config, stream, quantize_kernel<T, 2>, args);
  else launch(config, stream, quantize_kernel<T, 4>, args);
}

bool aligned(const TensorView& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }

template <typename T>
void quantize_as(const TensorView& x, const tvm::ffi::Optional<TensorView>& norm, double eps, double input_scale,
                 const TensorView& out, const TensorView& scales) {
  Args<T> args{};
  args.x = static_cast<const T*>(x.data_ptr());
  args.norm = norm.has_value() ? static_cast<const T*>((*norm).data_ptr()) : nullptr;
  args.out = static_cast<uint8_t*>(out.data_ptr());
  args.scales = static_cast<float*>(scales.data_ptr());
  args.x_stride = x.stride(0);
  args.pitch = scales.ndim() == 2 ? static_cast<int>(scales.stride(0)) : 0;
  args.features = static_cast<int>(x.size(1));
  args.eps = static_cast<float>(eps);
  args.input_scale = static_cast<float>(input_scale);
  run(args, x.size(0), current_stream(x));
}

}  // namespace

// x [n, features] bf16 or fp16, or its norm where there is a weight → out [n, features] e4m3 and scales: [n], or [features
// / 128 rounded up, at least n]. input_scale: 0, or the scale that all get.
void quantize(TensorView x, tvm::ffi::Optional<TensorView> norm, double eps, double input_scale, TensorView out,
              TensorView scales) {
  MINISGL_CHECK(x.ndim() == 2 && out.ndim() == 2) << "expected matrices";
  const int64_t n = x.size(0), features = x.size(1);
  if (n == 0) return;
  MINISGL_CHECK(is_bf16(x) || is_fp16(x)) << "expected bf16 or fp16";
  MINISGL_CHECK(features % kLen == 0 && x.stride(1) == 1 && (n == 1 || x.stride(0) % kLen == 0) && aligned(x));
  MINISGL_CHECK(out.dtype().bits == 8 && out.size(0) == n && out.size(1) == features && out.IsContiguous() && aligned(out));
  MINISGL_CHECK(is_fp32(scales) && scales.stride(scales.ndim() - 1) == 1);
  if (scales.ndim() == 2) {
    MINISGL_CHECK(scales.size(0) == (features + 127) / 128 && scales.size(1) >= n) << "expected a scale of each group";
  } else {
    MINISGL_CHECK(scales.ndim() == 1 && scales.size(0) == n) << "expected a scale of each token";
  }
  if (norm.has_value()) {
    const TensorView w = *norm;
    MINISGL_CHECK(w.ndim() == 1 && w.size(0) == features && w.IsContiguous() && aligned(w) &&
                  w.dtype().code == x.dtype().code && w.dtype().bits == x.dtype().bits);
  }
  if (is_bf16(x)) quantize_as<__nv_bfloat16>(x, norm, eps, input_scale, out, scales);
  else quantize_as<__half>(x, norm, eps, input_scale, out, scales);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize, minisgl::quantize);

}  // namespace minisgl
