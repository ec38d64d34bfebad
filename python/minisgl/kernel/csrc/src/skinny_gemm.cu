// Kernel and entry points of the fused linear layers that minisgl/skinny_gemm.cuh explains. Compiled once per dtype
// (MINISGL_FP16), for e4m3 weights or such as x (MINISGL_FP8), and tile of tokens (MINISGL_TOKENS).
#include "minisgl/skinny_gemm.cuh"

#include "minisgl/arguments.cuh"

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

template <typename C>
void launch_existing(const Args& args, const TensorView& x) {
  static bool prepared[64] = {};
  int device = x.device().device_id, sms = sm_count(device);
  allow_shared(skinny_gemm<C>, kApartBytes, device, prepared);
  LaunchConfig config;
  config.grid = dim3(args.outputs / 8 < sms ? args.outputs / 8 : sms);
  config.block = dim3(C::kThreads);
  config.smem = C::kFixedBytes + (args.norm_weight != nullptr ? args.k * sizeof(T) : 0);
  MINISGL_CHECK(config.smem <= kSharedBytes) << "k is too large for a fused norm: " << args.k;
  if (args.apart) config.smem = kApartBytes;
  launch(config, current_stream(x), skinny_gemm<C>, args);
}

template <typename C>
void launch_config(const Args& args, const TensorView& x) {
  if constexpr (C::kExists) launch_existing<C>(args, x);
  else TVM_FFI_THROW(ValueError) << "this variant needs more shared memory";
}

// The variant for a shape: as many rows at once as a block has, up to where shared memory holds too few steps.
template <bool gated>
int choose(const Args& args, int sms) {
  int octets = (args.outputs / 8 + sms - 1) / sms * (gated ? 2 : 1);  // of rows that a block has
  if (octets <= 4) {
    bool fits = octets > 2 ? Config<gated, 8, 4>::kExists : octets > 1 ? Config<gated, 8, 2>::kExists : Config<gated, 8, 1>::kExists;
    return fits ? octets > 2 ? 2 : octets > 1 ? 1 : 0 : 4;
  }
  bool sixth = kTokenTiles < 4 && Config<gated, 8, 6>::kExists;
  if (MINISGL_FP8 == 1 && args.tokens <= 8) return sixth ? 3 : 4;  // to make 16 bits of e4m3 takes many warps
  if (octets <= 6) return sixth && args.k <= 4096 && args.tokens <= 16 ? 3 : 4;
  if (octets <= 8 || args.tokens <= 8) return Config<gated, 4, 8>::kExists ? 5 : 4;
  return Config<gated, 4, 16>::kExists ? 6 : 5;
}

// Warps and octets of each variant; -1: `choose`. Several pairs of octets at once share reads of x; more warps share the
// latency of a short k.
template <bool gated>
void dispatch(const Args& args, const TensorView& x, int64_t variant) {
  switch (variant) {
    case -1:
      return dispatch<gated>(args, x, choose<gated>(args, sm_count(x.device().device_id)));
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
  }
  TVM_FFI_THROW(ValueError) << "no such variant: " << variant;
}

// With e4m3, scales are [rows of W] or [octets of W, k / 128, rounded up].
void set_weight(Args& args, const TensorView& weight, const Optional<TensorView>& scales, int64_t rows) {
  check_matrix(weight, rows, args.k);
#if MINISGL_FP8
  args.weight = bytes_of(weight);
  MINISGL_CHECK(scales.has_value() && is_fp32(*scales)) << "expected fp32 scales";
  if ((*scales).ndim() == 1) {
    args.row_scales = floats_of(*scales, rows);
  } else {
    check_matrix(*scales, rows / 8, (args.k + kScaleBlock - 1) / kScaleBlock);
    args.block_scales = static_cast<const float*>((*scales).data_ptr());
  }
#else
  MINISGL_CHECK(!scales.has_value()) << "these weights have no scales";
  args.weight = data_of(weight);
#endif
}

// out [m, n] = rms_norm(x [m, k]) weight[n, k]^T + bias (+ out if `add`, rounded once), without the norm where there is no
// weight of it; or, if `gated`, silu(gate) * up of [gate, up] = rms_norm(x) weight[2n, k]^T, gate rows first. apart: two blocks
// never share an SM, where they would be what all others wait for; of the next such product none begins beside them.
void skinny_linear(TensorView x, Optional<TensorView> norm, double eps, TensorView weight, Optional<TensorView> scales,
                   Optional<TensorView> bias, TensorView out, bool add, bool gated, bool apart, int64_t variant) {
  MINISGL_CHECK(x.ndim() == 2 && out.ndim() == 2) << "expected matrices";
  int64_t tokens = x.size(0), k = x.size(1), outputs = out.size(1), rows = gated ? 2 * outputs : outputs;
  if (tokens == 0) return;
  MINISGL_CHECK(tokens <= MINISGL_TOKENS && k % kBlock == 0 && k > 0 && outputs % 8 == 0 && outputs > 0)
      << "unsupported shape: " << tokens << " tokens, " << outputs << " x " << k;
  MINISGL_CHECK(k < (1 << 24) && rows < (1 << 24)) << "too large";
  MINISGL_CHECK(!gated || (!add && !bias.has_value())) << "gate and up have no bias and add to nothing";
  check_rows(x);
  Args args{};
  args.x = data_of(x);
  args.x_stride = x.stride(0);
  args.norm_weight = vector_of(norm, k);
  args.bias = vector_of(bias, outputs);
  args.out = const_cast<T*>(matrix_of(out, tokens, outputs));
  args.residual = add ? args.out : nullptr;
  args.eps = static_cast<float>(eps);
  args.apart = apart || outputs >= kHead;
  args.tokens = static_cast<int>(tokens);
  args.outputs = static_cast<int>(outputs);
  args.k = static_cast<int>(k);
  set_weight(args, weight, scales, rows);
  if (gated) dispatch<true>(args, x, variant);
  else dispatch<false>(args, x, variant);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(skinny_linear, minisgl::skinny_linear);

}  // namespace minisgl
