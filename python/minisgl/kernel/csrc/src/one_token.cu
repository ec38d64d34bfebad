// Entry point of the linear layers of one token with weights of few bits, which minisgl/one_token.cuh explains. Compiled
// once per dtype (MINISGL_FP16), and for e4m3 (MINISGL_FP8) or size (MINISGL_GROUP) and kind (MINISGL_MINIMA) of groups.
#include "minisgl/one_token.cuh"

#include "minisgl/arguments.cuh"

namespace minisgl {
namespace {

constexpr int kFewSteps = 6144 / kStepK, kManySteps = 17408 / kStepK;

template <typename C>
void run(const Args& args, const TensorView& x) {
  if constexpr (C::kExists) {
    static bool prepared[64] = {};
    int device = x.device().device_id, sms = sm_count(device);
    allow_shared(one_token<C>, kSharedBytes, device, prepared);
    LaunchConfig config;
    config.grid = dim3(args.outputs / 8 < sms ? args.outputs / 8 : sms);
    config.block = dim3(C::kThreads);
    config.smem = C::kBytes;
    launch(config, current_stream(x), one_token<C>, args);
  } else {
    TVM_FFI_THROW(ValueError) << "this variant needs more shared memory";
  }
}

template <int warps, int octets>
void try_run(const Args& args, const TensorView& x, bool gated) {
  if (args.steps <= kFewSteps) {
    if (gated) run<Config<true, warps, octets, kFewSteps>>(args, x);
    else run<Config<false, warps, octets, kFewSteps>>(args, x);
  } else {
    if (gated) run<Config<true, warps, octets, kManySteps>>(args, x);
    else run<Config<false, warps, octets, kManySteps>>(args, x);
  }
}

// Fast variants on an H200, for weights of Qwen3-14B's shapes (docs/performance-log.md). Of e4m3 it counts how many octets
// a multiprocessor has, of 4 bits that many steps are in flight.
int64_t choose(const Args& args, bool gated, int sms) {
  int octets = (args.outputs / 8 + sms - 1) / sms;
  if (!kFloat8) return 0;
  if (gated || octets == 6) return 2;
  return octets <= 4 ? 0 : octets == 5 ? 1 : 3;
}

// Warps and octets of each variant. variant: -1: by choice.
void dispatch(const Args& args, const TensorView& x, bool gated, int64_t variant) {
  switch (variant < 0 ? choose(args, gated, sm_count(x.device().device_id)) : variant) {
    case 0:
      return try_run<8, 4>(args, x, gated);
    case 1:
      return try_run<8, 5>(args, x, gated);
    case 2:
      return try_run<8, 6>(args, x, gated);
    case 3:
      return try_run<12, 4>(args, x, gated);
  }
  TVM_FFI_THROW(ValueError) << "no such variant: " << variant;
}

// scales: of e4m3, [rows of W] or [octets of W, k / 128].
void set_weight(Args& args, const TensorView& weight, const Optional<TensorView>& scales, int64_t rows, bool gated) {
  args.steps = (args.k + kStepK - 1) / kStepK;
  args.weight = reinterpret_cast<const char*>(bytes_of(weight));
#if MINISGL_FP8
  check_matrix(weight, rows, args.k);
  MINISGL_CHECK(args.k % kScaleBlock == 0) << "k must be a multiple of 128, not " << args.k;
  MINISGL_CHECK(scales.has_value() && is_fp32(*scales)) << "expected fp32 scales";
  if ((*scales).ndim() == 1) {
    args.row_scales = floats_of(*scales, rows);
  } else {
    check_matrix(*scales, rows / 8, args.k / kScaleBlock);
    args.block_scales = static_cast<const float*>((*scales).data_ptr());
  }
#else
  MINISGL_CHECK(!scales.has_value()) << "these weights have no scales beside them";
  MINISGL_CHECK(weight.ndim() == 3 && weight.size(0) == (rows + 15) / 16 && weight.size(1) == args.steps &&
                weight.size(2) == kUnitBytes && weight.IsContiguous())
      << "not such a packed weight";
#endif
}

// out [1, n] = rms_norm(x [1, k]) W^T + bias (+ out if `add`, rounded once), without the norm where there are no gains; or,
// if `gated`, silu(gate) * up of [gate, up] = rms_norm(x) W^T + bias. weight: [rows, k] e4m3, gate rows first; or packed
// [row tiles, units, bytes], of which all scales are to be multiplied by `unit`.
void one_token_linear(TensorView x, Optional<TensorView> norm, double eps, TensorView weight, Optional<TensorView> scales,
                      double unit, Optional<TensorView> bias, TensorView out, bool add, bool gated, int64_t variant) {
  MINISGL_CHECK(x.ndim() == 2 && x.size(0) == 1 && x.stride(1) == 1 && out.ndim() == 2) << "expected one token";
  int64_t k = x.size(1), outputs = out.size(1), rows = gated ? 2 * outputs : outputs;
  MINISGL_CHECK(k > 0 && k % 8 == 0 && k <= kManySteps * kStepK && outputs > 0 && outputs % 8 == 0 && rows < (1 << 24))
      << "unsupported shape: " << outputs << " x " << k;
  MINISGL_CHECK(!gated || !add) << "gate and up add to nothing";
  Args args{};
  args.x = data_of(x);
  args.norm = vector_of(norm, k);
  args.bias = vector_of(bias, rows);
  args.out = const_cast<T*>(matrix_of(out, 1, outputs));
  args.residual = add ? args.out : nullptr;
  args.unit = static_cast<float>(unit);
  args.eps = static_cast<float>(eps);
  args.outputs = static_cast<int>(outputs);
  args.k = static_cast<int>(k);
  set_weight(args, weight, scales, rows, gated);
  dispatch(args, x, gated, variant);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(one_token_linear, minisgl::one_token_linear);

}  // namespace minisgl
