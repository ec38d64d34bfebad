// Entry point of the linear layers with weights of 4 bits on mma.sync: of up to 16 tokens minisgl/packed_few.cuh explains
// them, of more minisgl/packed_gemm.cuh. Compiled once per dtype (MINISGL_FP16), tile of tokens (MINISGL_TOKENS), and size
// (MINISGL_GROUP) and kind (MINISGL_MINIMA) of groups.
#if MINISGL_TOKENS <= 16
#include "minisgl/packed_few.cuh"
#else
#include "minisgl/packed_gemm.cuh"
#endif

#include "minisgl/arguments.cuh"

namespace minisgl {
namespace {

struct Workspace {
  int64_t floats, flags;
};

// Of a device, once its shared memory is at the largest carveout, whatever the kernel needs: an SM must drain before it
// changes its carveout, and then two kernels could not share it.
template <typename Kernel>
int prepare(Kernel kernel, int device, int bytes) {
  int sms = 0;
  MINISGL_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  MINISGL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  MINISGL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  return sms;
}

#if MINISGL_TOKENS <= 16
template <typename C>
void run_existing(const Args& args, const TensorView& x, int per_sm) {
  static int counts[64] = {};
  int device = x.device().device_id;
  MINISGL_CHECK(device >= 0 && device < 64);
  if (counts[device] == 0) counts[device] = prepare(packed_few<C>, device, kSharedBytes);
  LaunchConfig config;
  int blocks = per_sm * counts[device];
  config.grid = dim3(args.outputs / 8 < blocks ? args.outputs / 8 : blocks);
  config.block = dim3(C::kThreads);
  config.smem = C::kFixedBytes + (args.norm != nullptr ? args.units * kPitch : 0);
  MINISGL_CHECK(config.smem <= kSharedBytes) << "k is too large for a fused norm: " << args.k;
  launch(config, current_stream(x), packed_few<C>, args);
}

template <int warps, int octets>
void try_run(const Args& args, const TensorView& x, int per_sm = 1) {
  if constexpr (!Config<false, warps, octets>::kExists) {
    TVM_FFI_THROW(ValueError) << "this variant needs more shared memory";
  } else if (args.gated) {
    run_existing<Config<true, warps, octets>>(args, x, per_sm);
  } else {
    run_existing<Config<false, warps, octets>>(args, x, per_sm);
  }
}

// Warps and octets of each variant, and blocks of a multiprocessor; minisgl/kernel/packed_gemm.py chooses.
void dispatch(const Args& args, const TensorView& x, const Workspace&, int64_t variant) {
  MINISGL_CHECK(args.tokens <= kTokens) << "at most " << kTokens << " tokens";
  switch (variant) {
    case 0:
      return try_run<8, 4>(args, x);
    case 1:
      return try_run<8, 8>(args, x);
    case 2:
      return try_run<8, 4>(args, x, 2);
    case 3:
      return try_run<4, 8>(args, x, 2);
  }
  TVM_FFI_THROW(ValueError) << "no such variant: " << variant;
}
#else
// Eight warps, each with 32 rows.
void dispatch(Args args, const TensorView& x, const Workspace& workspace, int64_t) {
  using C = Config<8, 2>;
  static int counts[64] = {};
  int device = x.device().device_id;
  MINISGL_CHECK(device >= 0 && device < 64);
  if (counts[device] == 0) counts[device] = prepare(packed_gemm<C>, device, C::kSharedBytes);
  MINISGL_CHECK(args.norm == nullptr) << "a norm of more than 16 tokens";
  args.tiles = (args.row_tiles + C::kRowTiles - 1) / C::kRowTiles;
  args.steps = args.units;
  int64_t total = static_cast<int64_t>(args.tiles) * args.steps * ((args.tokens + kTokens - 1) / kTokens);
  MINISGL_CHECK(total < (1 << 30)) << "too large";
  int blocks = counts[device] < total ? counts[device] : static_cast<int>(total);
  MINISGL_CHECK(workspace.floats >= static_cast<int64_t>(blocks) * C::kPartial * 4 && workspace.flags >= blocks)
      << "the workspace is too small";
  LaunchConfig config;
  config.grid = dim3(blocks);
  config.block = dim3(C::kThreads);
  config.smem = C::kSharedBytes;
  launch(config, current_stream(x), packed_gemm<C>, args);
}
#endif

// out [m, n] = rms_norm(x [m, k]) W^T + bias (+ out if `add`, rounded once), without the norm where there are no gains; or,
// if `gated`, silu(gate) * up of [gate, up] = rms_norm(x) W^T + bias. weight: packed [row tiles, units, bytes], of which
// all scales are to be multiplied by `unit`. partials and flags: the workspace, flags zero.
void packed_linear(TensorView x, Optional<TensorView> norm, double eps, TensorView weight, double unit,
                   Optional<TensorView> bias, TensorView out, TensorView partials, TensorView flags, bool add,
                   bool gated, int64_t variant) {
  MINISGL_CHECK(x.ndim() == 2 && out.ndim() == 2 && weight.ndim() == 3) << "expected matrices";
  int64_t tokens = x.size(0), k = x.size(1), outputs = out.size(1);
  if (tokens == 0) return;
  MINISGL_CHECK(out.size(0) == tokens && out.stride(1) == 1 && (tokens == 1 || out.stride(0) == outputs));
  MINISGL_CHECK(k > 0 && k % 8 == 0 && outputs > 0 && outputs % 8 == 0 && k < (1 << 24) && outputs < (1 << 24))
      << "unsupported shape: " << tokens << " tokens, " << outputs << " x " << k;
  check_rows(x);
  int64_t row_tiles = gated ? outputs / 8 : (outputs + 15) / 16;
  MINISGL_CHECK(is_dtype(weight, kDLUInt, 8) && weight.size(0) == row_tiles && weight.size(2) == kUnitBytes &&
                weight.size(1) == (k + kUnitK - 1) / kUnitK && weight.stride(2) == 1 &&
                weight.stride(1) == kUnitBytes && weight.stride(0) == weight.size(1) * kUnitBytes)
      << "not such a packed weight";
  MINISGL_CHECK(is_fp32(partials) && is_int32(flags)) << "expected fp32 and int32 workspaces";
  MINISGL_CHECK(!gated || !add) << "gate and up add to nothing";
  Args args{};
  args.weight = static_cast<const char*>(weight.data_ptr());
  args.x = data_of(x);
  args.norm = vector_of(norm, k);
  args.bias = vector_of(bias, gated ? 2 * outputs : outputs);
  args.out = const_cast<T*>(data_of(out));
  args.residual = add ? args.out : nullptr;
  args.partials = static_cast<float4*>(partials.data_ptr());
  args.flags = static_cast<unsigned*>(flags.data_ptr());
  args.x_stride = x.stride(0);
  args.unit = static_cast<float>(unit);
  args.eps = static_cast<float>(eps);
  args.tokens = static_cast<int>(tokens);
  args.outputs = static_cast<int>(outputs);
  args.k = static_cast<int>(k);
  args.units = static_cast<int>(weight.size(1));
  args.row_tiles = static_cast<int>(row_tiles);
  args.gated = gated;
  dispatch(args, x, {partials.size(0), flags.size(0)}, variant);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_linear, minisgl::packed_linear);

}  // namespace minisgl
