// Entry point of the linear layers that minisgl/packed_wide.cuh explains. Compiled once per dtype (MINISGL_FP16), number of
// tokens (MINISGL_TOKENS), and size (MINISGL_GROUP) and kind (MINISGL_MINIMA) of groups.
#include <minisgl/packed_wide.cuh>

#include <minisgl/arguments.cuh>

namespace minisgl {
namespace {

constexpr int kMaxShared = 227 * 1024;  // bytes of a block
constexpr auto kMapType = MINISGL_FP16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

struct Operands {
  const void* weight;
  int64_t row_tiles;  // of 16 rows
  float unit;
  const T* x;
  int64_t x_stride, k;
  int64_t workspace, num_flags;  // floats in args.partials, and flags
  int device;
  cudaStream_t stream;
};

template <typename C>
void run(Args args, const Operands& operands) {
  auto kernel = packed_wide<C>;
  static int counts[64] = {};
  MINISGL_CHECK(operands.device >= 0 && operands.device < 64);
  int& sms = counts[operands.device];
  if (sms == 0) {
    // The largest carveout, whatever this kernel needs: an SM must drain before it changes its carveout.
    MINISGL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared));
    MINISGL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                            cudaSharedmemCarveoutMaxShared));
    MINISGL_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, operands.device));
  }
  args.row_tiles = static_cast<int>((operands.row_tiles + C::kRows / 16 - 1) / (C::kRows / 16));
  args.token_tiles = (args.tokens + kTokens - 1) / kTokens;
  int64_t total = static_cast<int64_t>(args.row_tiles) * args.token_tiles * args.steps;
  MINISGL_CHECK(total < (1 << 30)) << "too large";
  int blocks = total < sms ? static_cast<int>(total) : sms;
  int stages = (kMaxShared - C::kFixedBytes) / C::kStageBytes;
  args.stages = stages < kMaxStages ? stages : kMaxStages;
  MINISGL_CHECK(args.stages >= 2) << "the tile needs more shared memory";
  MINISGL_CHECK(operands.workspace >= static_cast<int64_t>(blocks) * C::kPartial && operands.num_flags >= blocks)
      << "the workspace is too small";
  uint64_t sizes[2] = {static_cast<uint64_t>(operands.k), static_cast<uint64_t>(args.tokens)};
  uint64_t strides[1] = {static_cast<uint64_t>(operands.x_stride) * sizeof(T)};
  uint32_t box[2] = {kK, kTokens};
  CUtensorMap x = tensor_map<2>(operands.x, kMapType, sizes, strides, box);
  // 8 bytes at a time, since a box has at most 256 elements a side.
  uint64_t units[4] = {kUnitBytes / 8, static_cast<uint64_t>(args.steps), static_cast<uint64_t>(operands.row_tiles), 1};
  uint64_t pitches[3] = {kUnitBytes, units[1] * kUnitBytes, units[1] * units[2] * kUnitBytes};
  uint32_t unit_box[4] = {kUnitBytes / 8, 1, C::kRows / 16, 1};
  CUtensorMap weights = tensor_map<4>(operands.weight, CU_TENSOR_MAP_DATA_TYPE_INT64, units, pitches, unit_box,
                                      CU_TENSOR_MAP_SWIZZLE_NONE);
  LaunchConfig config;
  config.grid = dim3(blocks);
  config.block = dim3(C::kThreads);
  config.smem = C::kFixedBytes + static_cast<size_t>(args.stages) * C::kStageBytes;
  launch(config, operands.stream, kernel, weights, x, args, operands.unit);
}

// warpgroups: that multiply 64 rows each.
template <bool kGated>
void dispatch(const Args& args, const Operands& operands, int64_t warpgroups) {
  if constexpr (WideConfig<kGated, 3>::kExists) {
    if (warpgroups == 3) return run<WideConfig<kGated, 3>>(args, operands);
  }
  MINISGL_CHECK(warpgroups == 2) << "no such variant: " << warpgroups;
  run<WideConfig<kGated, 2>>(args, operands);
}

// out [m, n] = x [m, k] W^T + bias (+ out if `add`, rounded once); or, if `gated`, silu(gate) * up of [gate, up] = x W^T.
// weight: packed [row tiles, units, bytes], with factor `unit`. partials and flags: the workspace, flags zero.
void packed_wide_linear(TensorView x, TensorView weight, double unit, Optional<TensorView> bias, TensorView out,
                        TensorView partials, TensorView flags, bool add, bool gated,
                        int64_t warpgroups) {
  MINISGL_CHECK(x.ndim() == 2 && out.ndim() == 2 && weight.ndim() == 3) << "expected matrices";
  int64_t tokens = x.size(0), k = x.size(1), outputs = out.size(1);
  if (tokens == 0) return;
  MINISGL_CHECK(out.size(0) == tokens && out.stride(1) == 1 && (tokens == 1 || out.stride(0) == outputs));
  MINISGL_CHECK(tokens < (1 << 16) && k > 0 && k % 8 == 0 && outputs > 0 && outputs % 8 == 0 && outputs < (1 << 20))
      << "unsupported shape: " << tokens << " tokens, " << outputs << " x " << k;
  check_rows(x);
  int64_t row_tiles = gated ? outputs / 8 : (outputs + 15) / 16, units = (k + kUnitK - 1) / kUnitK;
  MINISGL_CHECK(is_dtype(weight, kDLUInt, 8) && weight.size(0) == row_tiles && weight.size(1) == units &&
                weight.size(2) == kUnitBytes && weight.is_contiguous())
      << "not such a packed weight";
  MINISGL_CHECK(!gated || (!add && !bias.has_value())) << "gate and up have no bias and add to nothing";
  MINISGL_CHECK(is_fp32(partials) && is_int32(flags)) << "expected fp32 and int32 workspaces";
  Args args{};
  args.out = const_cast<T*>(data_of(out));
  args.bias = vector_of(bias, outputs);
  args.residual = add ? args.out : nullptr;
  args.partials = static_cast<float*>(partials.data_ptr());
  args.flags = static_cast<unsigned*>(flags.data_ptr());
  args.tokens = static_cast<int>(tokens);
  args.outputs = static_cast<int>(outputs);
  args.steps = static_cast<int>(units);
  Operands operands{weight.data_ptr(),
                    row_tiles,
                    static_cast<float>(unit),
                    data_of(x),
                    tokens == 1 ? k : x.stride(0),
                    k,
                    partials.size(0),
                    flags.size(0),
                    x.device().device_id,
                    current_stream(x)};
  if (gated) {
    dispatch<true>(args, operands, warpgroups);
  } else {
    dispatch<false>(args, operands, warpgroups);
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_wide_linear, minisgl::packed_wide_linear);

}  // namespace minisgl
