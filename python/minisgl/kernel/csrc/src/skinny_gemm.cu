// Kernel and entry points of the fused linear layers that minisgl/skinny_gemm.cuh explains. Compiled once per dtype
// (MINISGL_FP16), for e4m3 weights or such as x (MINISGL_FP8), and tile of tokens (MINISGL_TOKENS).
#include "minisgl/skinny_gemm.cuh"

#include <tvm/ffi/optional.h>

namespace minisgl {
namespace {

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2) skinny_gemm(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) char smem[];
  pdl_trigger();
  Worker<C> worker(args, smem);
  worker.prefetch();
  pdl_wait();
  worker.run();
}

int sm_count(int device) {
  static int counts[64] = {};
  MINISGL_CHECK(device >= 0 && device < 64);
  if (counts[device] == 0) {
    MINISGL_CUDA_CHECK(cudaDeviceGetAttribute(&counts[device], cudaDevAttrMultiProcessorCount, device));
  }
  return counts[device];
}

template <typename C>
void launch_existing(const Args& args, const TensorView& x) {
  int device = x.device().device_id;
  static bool prepared[64] = {};
  int sms = sm_count(device);
  if (!prepared[device]) {
    // The largest carveout, whatever this kernel needs: an SM must drain before it changes its carveout, and then
    // two kernels could not share it.
    MINISGL_CUDA_CHECK(cudaFuncSetAttribute(skinny_gemm<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    MINISGL_CUDA_CHECK(cudaFuncSetAttribute(skinny_gemm<C>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                            cudaSharedmemCarveoutMaxShared));
    prepared[device] = true;
  }
  LaunchConfig config;
  config.grid = dim3(args.outputs / 8 < sms ? args.outputs / 8 : sms);
  config.block = dim3(C::kThreads);
  config.smem = C::kFixedBytes + (args.norm_weight != nullptr ? args.k * sizeof(T) : 0);
  MINISGL_CHECK(config.smem <= kSharedBytes) << "k is too large for a fused norm: " << args.k;
  launch(config, current_stream(x), skinny_gemm<C>, args);
}

template <typename C>
void launch_config(const Args& args, const TensorView& x) {
  if constexpr (C::kExists) launch_existing<C>(args, x);
  else TVM_FFI_THROW(ValueError) << "this variant needs more shared memory";
}

// Warps and octets of each variant; minisgl/kernel/skinny.py chooses. Several pairs of octets at once share reads of x;
// more warps share the latency of a short k.
template <bool gated>
void dispatch(const Args& args, const TensorView& x, int64_t variant) {
  switch (variant) {
    case 0:
      if constexpr (!gated) return launch_config<Config<gated, 8, 1>>(args, x);
      break;
    case 1:
      return launch_config<Config<gated, 8, 2>>(args, x);
    case 2:
      return launch_config<Config<gated, 8, 4>>(args, x);
    case 3:
      if constexpr (kTokenTiles < 4) return launch_config<Config<gated, 8, 6>>(args, x);  // else registers spill
      break;
    case 4:
      return launch_config<Config<gated, 4, 6>>(args, x);
    case 5:
      return launch_config<Config<gated, 4, 8>>(args, x);
    case 6:
      return launch_config<Config<gated, 4, 16>>(args, x);
    case 7:
      if constexpr (kTokenTiles < 4) return launch_config<Config<gated, 8, 8>>(args, x);
      break;
  }
  TVM_FFI_THROW(ValueError) << "no such variant: " << variant;
}

using tvm::ffi::Optional;

const T* data_of(const TensorView& t) {
#if MINISGL_FP16
  MINISGL_CHECK(is_fp16(t)) << "expected fp16";
#else
  MINISGL_CHECK(is_bf16(t)) << "expected bf16";
#endif
  MINISGL_CHECK(t.device().device_type == kDLCUDA) << "expected a CUDA tensor";
  MINISGL_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0) << "expected 16-byte alignment";
  return static_cast<const T*>(t.data_ptr());
}

// A vector of `size` elements, or null.
const T* vector_of(const Optional<TensorView>& t, int64_t size) {
  if (!t.has_value()) return nullptr;
  MINISGL_CHECK((*t).ndim() == 1 && (*t).size(0) == size && (*t).stride(0) == 1) << "expected a vector of " << size;
  return data_of(*t);
}

void check_matrix(const TensorView& t, int64_t rows, int64_t columns) {
  MINISGL_CHECK(t.ndim() == 2 && t.size(0) == rows && t.size(1) == columns) << "expected " << rows << " x " << columns;
  MINISGL_CHECK(t.stride(1) == 1 && (t.stride(0) == columns || rows == 1)) << "expected a contiguous matrix";
}

const T* matrix_of(const TensorView& t, int64_t rows, int64_t columns) {
  check_matrix(t, rows, columns);
  return data_of(t);
}

// With e4m3, scales are [rows of W] or [octets of W, k / 128, rounded up].
void set_weight(Args& args, const TensorView& weight, const Optional<TensorView>& scales, int64_t rows) {
  check_matrix(weight, rows, args.k);
#if MINISGL_FP8
  MINISGL_CHECK(weight.dtype().bits == 8 && reinterpret_cast<uintptr_t>(weight.data_ptr()) % 16 == 0);
  args.weight = static_cast<const uint8_t*>(weight.data_ptr());
  MINISGL_CHECK(scales.has_value() && is_fp32(*scales)) << "expected fp32 scales";
  if ((*scales).ndim() == 1) {
    MINISGL_CHECK((*scales).size(0) == rows && (*scales).stride(0) == 1) << "expected a scale of each row";
    args.row_scales = static_cast<const float*>((*scales).data_ptr());
  } else {
    check_matrix(*scales, rows / 8, (args.k + kScaleBlock - 1) / kScaleBlock);
    args.block_scales = static_cast<const float*>((*scales).data_ptr());
  }
#else
  MINISGL_CHECK(!scales.has_value()) << "these weights have no scales";
  args.weight = data_of(weight);
#endif
}

Args arguments(const TensorView& x, const TensorView& weight, const Optional<TensorView>& scales,
               const TensorView& out, int64_t weight_rows) {
  MINISGL_CHECK(x.ndim() == 2 && out.ndim() == 2) << "expected matrices";
  int64_t tokens = x.size(0), k = x.size(1), outputs = out.size(1);
  MINISGL_CHECK(tokens <= MINISGL_TOKENS && k % kBlock == 0 && k > 0 && outputs % 8 == 0 && outputs > 0)
      << "unsupported shape: " << tokens << " tokens, " << outputs << " x " << k;
  MINISGL_CHECK(k < (1 << 24) && weight_rows < (1 << 24)) << "too large";
  MINISGL_CHECK(x.stride(1) == 1 && (x.stride(0) % 8 == 0 || tokens == 1)) << "expected rows at 16-byte boundaries";
  Args args{};
  args.x = data_of(x);
  args.x_stride = x.stride(0);
  args.out = const_cast<T*>(matrix_of(out, tokens, outputs));
  args.tokens = static_cast<int>(tokens);
  args.outputs = static_cast<int>(outputs);
  args.k = static_cast<int>(k);
  set_weight(args, weight, scales, weight_rows);
  return args;
}

// out [m, n] = rms_norm(x [m, k]) weight[n, k]^T + bias; no norm without a norm weight.
void norm_linear(TensorView x, Optional<TensorView> norm_weight, double eps, TensorView weight,
                 Optional<TensorView> scales, Optional<TensorView> bias, TensorView out, int64_t variant) {
  if (x.size(0) == 0) return;
  Args args = arguments(x, weight, scales, out, out.size(1));
  args.norm_weight = vector_of(norm_weight, args.k);
  args.bias = vector_of(bias, args.outputs);
  args.eps = static_cast<float>(eps);
  dispatch<false>(args, x, variant);
}

// out [m, n] = silu(gate) * up of [gate, up] = rms_norm(x [m, k]) weight[2n, k]^T, gate rows first.
void norm_gate_up(TensorView x, Optional<TensorView> norm_weight, double eps, TensorView weight,
                  Optional<TensorView> scales, TensorView out, int64_t variant) {
  if (x.size(0) == 0) return;
  Args args = arguments(x, weight, scales, out, 2 * out.size(1));
  args.norm_weight = vector_of(norm_weight, args.k);
  args.eps = static_cast<float>(eps);
  dispatch<true>(args, x, variant);
}

// residual [m, n] += x [m, k] weight[n, k]^T + bias, rounded once.
void linear_add(TensorView x, TensorView weight, Optional<TensorView> scales, Optional<TensorView> bias,
                TensorView residual, int64_t variant) {
  if (x.size(0) == 0) return;
  Args args = arguments(x, weight, scales, residual, residual.size(1));
  args.bias = vector_of(bias, args.outputs);
  args.residual = args.out;
  dispatch<false>(args, x, variant);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_linear, minisgl::norm_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_gate_up, minisgl::norm_gate_up);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_add, minisgl::linear_add);

}  // namespace minisgl
