// Entry points of the linear layers that minisgl/decode_gemm.cuh explains.
#include <minisgl/decode_gemm.cuh>

#include <minisgl/arguments.cuh>

namespace minisgl {
namespace {

constexpr int kMaxShared = 227 * 1024;  // bytes of a block
#if MINISGL_FP8
constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_UINT8;
#elif MINISGL_FP16
constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
#else
constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
#endif

// How the caller wants it done; minisgl/kernel/decode_gemm.py chooses.
struct Variant {
  int64_t rows;   // of weights in a tile
  int64_t split;  // see the kernel
};

struct Operands {
  const Operand* x;
  const Operand* weight;
  int64_t x_stride, k;
  int64_t workspace;  // floats in args.partials
  int64_t num_flags;
  int device;
  cudaStream_t stream;
};

// How the work is shared out: the grid, and the stages of its blocks' rings.
template <typename C>
int share_out(Args& args, const Operands& operands, const Variant& variant, int sms) {
  uint64_t groups = C::kGated ? args.outputs / 8 : args.outputs / 16;  // of 16 rows of a tile
  args.row_tiles = static_cast<int>((groups + C::kRows / 16 - 1) / (C::kRows / 16));
  args.token_tiles = (args.tokens + kTokens - 1) / kTokens;
  args.steps = static_cast<int>((operands.k + kK - 1) / kK);
  args.split = static_cast<int>(variant.split);
  MINISGL_CHECK(kManyTokens || (args.tokens <= kTokens && variant.split != kWaves)) << "too many tokens";
  MINISGL_CHECK(variant.split >= kWaves && variant.split <= kMaxSplit && args.split <= args.steps) << "no such split";
  int tiles = args.row_tiles * args.token_tiles, total = tiles * args.steps;
  int blocks = total < sms ? total : sms, most = (total + blocks - 1) / blocks;
  if (args.split > 0) blocks = tiles * args.split, most = (args.steps + args.split - 1) / args.split;
  if (args.split == kWaves) blocks = tiles < sms ? tiles : sms, most = (tiles + blocks - 1) / blocks * args.steps;

  int room = kMaxShared - C::kFixedBytes;
  int least = args.split > 1 ? (C::kRows * kTokens * 4 + C::kStageBytes - 1) / C::kStageBytes : 1;
  int stages = room / C::kStageBytes < kMaxStages ? room / C::kStageBytes : kMaxStages;
  MINISGL_CHECK(stages >= 2 && stages >= least) << "the tile needs more shared memory";
  args.stages = stages < most ? stages : (most < least ? least : most);
  if (args.split == 0) {
    MINISGL_CHECK(operands.workspace >= static_cast<int64_t>(blocks) * C::kPartial && operands.num_flags >= blocks)
        << "the workspace is too small";
  }
  return blocks;
}

template <typename C>
void run(Args args, const Operands& operands, const Variant& variant) {
  auto kernel = decode_gemm<C>;
  static bool prepared[64] = {};
  int sms = sm_count(operands.device);
  allow_shared(kernel, kMaxShared, operands.device, prepared);
  int blocks = share_out<C>(args, operands, variant, sms);
  uint64_t k = operands.k, half = args.outputs, row = k * sizeof(Operand), octet = row * 8;
  uint64_t sizes[4] = {k, 8, 2, C::kGated ? half / 8 : half / 16};
  uint64_t strides[3] = {row, C::kGated ? half * row : octet, C::kGated ? octet : 2 * octet};
  uint32_t box[4] = {kK, 8, 2, C::kRows / 16};
  uint64_t x_sizes[2] = {k, static_cast<uint64_t>(args.tokens)};
  uint64_t x_strides[1] = {static_cast<uint64_t>(operands.x_stride) * sizeof(Operand)};
  uint32_t x_box[2] = {kK, kTokens};
  CUtensorMap weights = tensor_map<4>(operands.weight, kMapType, sizes, strides, box);
  CUtensorMap x = tensor_map<2>(operands.x, kMapType, x_sizes, x_strides, x_box);
  LaunchConfig config;
  config.grid = dim3(blocks);
  config.block = dim3(C::kThreads);
  config.smem = C::kFixedBytes + static_cast<size_t>(args.stages) * C::kStageBytes;
  config.cluster = args.split > 1 ? args.split : 1;
  launch(config, operands.stream, kernel, weights, x, args);
}

template <int kWarpgroups, bool kGated>
void try_run(const Args& args, const Operands& operands, const Variant& variant) {
  using C = Config<kWarpgroups, kGated>;
  if constexpr (C::kFits) {
    run<C>(args, operands, variant);
  } else {
    TVM_FFI_THROW(ValueError) << "too many rows for " << kTokens << " tokens: " << variant.rows;
  }
}

template <bool kGated>
void dispatch(const Args& args, const Operands& operands, const Variant& variant) {
  switch (variant.rows) {
    case 64:
      return try_run<1, kGated>(args, operands, variant);
    case 128:
      return try_run<2, kGated>(args, operands, variant);
    case 192:
      return try_run<3, kGated>(args, operands, variant);
  }
  TVM_FFI_THROW(ValueError) << "no such number of rows: " << variant.rows;
}

const Operand* operand_of(const TensorView& t) {
#if MINISGL_FP8
  return bytes_of(t);
#else
  return data_of(t);
#endif
}

// Those of e4m3, of `rows` rows of weights; others have none.
void set_scales(Args& args, const Optional<TensorView>& of_rows, const Optional<TensorView>& of_tokens, int64_t rows,
                int64_t k) {
  MINISGL_CHECK(of_rows.has_value() == kFloat8 && of_tokens.has_value() == kFloat8) << "scales are for e4m3";
  if (!kFloat8) return;
  TensorView weights = *of_rows, tokens = *of_tokens;
  if (!kBlockScales) {
    args.row_scales = floats_of(weights, rows);
    args.token_scales = floats_of(tokens, args.tokens);
    return;
  }
  int64_t steps = (k + kK - 1) / kK;
  check_matrix(weights, rows / 8, steps);
  MINISGL_CHECK(is_fp32(weights) && is_fp32(tokens)) << "expected fp32 scales";
  MINISGL_CHECK(tokens.ndim() == 2 && tokens.size(0) == steps && tokens.size(1) >= args.tokens &&
                tokens.stride(0) % kTokens == 0 && tokens.stride(1) == 1)
      << "expected scales of each 128 k, then of tokens, with room for whole tiles of " << kTokens;
  args.token_pitch = static_cast<int>(tokens.stride(0));
  args.row_scales = static_cast<const float*>(weights.data_ptr());
  args.token_scales = static_cast<const float*>(tokens.data_ptr());
}

// out [m, n] = x [m, k] weight [n, k]^T + bias (+ out if `add`, rounded once); or, if `gated`, silu(gate) * up of
// [gate, up] = x weight [2n, k]^T. partials and flags: the workspace of split 0, flags zero.
void decode_linear(TensorView x, TensorView weight, Optional<TensorView> bias, TensorView out, TensorView partials,
                   TensorView flags, Optional<TensorView> row_scales, Optional<TensorView> token_scales, bool add,
                   bool gated, int64_t rows, int64_t split) {
  MINISGL_CHECK(x.ndim() == 2 && out.ndim() == 2) << "expected matrices";
  int64_t tokens = x.size(0), k = x.size(1), outputs = out.size(1);
  if (tokens == 0) return;
  constexpr int kMultiple = kFloat8 ? 16 : kK;  // what is missing of a step reads as zero
  MINISGL_CHECK(tokens < (1 << 20) && k > 0 && k % kMultiple == 0 && outputs > 0 && outputs % 16 == 0)
      << "unsupported shape: " << tokens << " tokens, " << outputs << " x " << k;
  MINISGL_CHECK(k < (1 << 20) && outputs < (1 << 20)) << "too large";
  check_rows(x);
  MINISGL_CHECK(!gated || (!add && !bias.has_value())) << "gate and up have no bias and add to nothing";
  MINISGL_CHECK(is_fp32(partials) && is_int32(flags)) << "expected fp32 and int32 workspaces";
  Args args{};
  args.out = const_cast<T*>(matrix_of(out, tokens, outputs));
  args.bias = vector_of(bias, outputs);
  args.residual = add ? args.out : nullptr;
  args.partials = static_cast<float*>(partials.data_ptr());
  args.flags = static_cast<unsigned*>(flags.data_ptr());
  args.tokens = static_cast<int>(tokens);
  args.outputs = static_cast<int>(outputs);
  int64_t weight_rows = gated ? 2 * outputs : outputs;
  check_matrix(weight, weight_rows, k);
  set_scales(args, row_scales, token_scales, weight_rows, k);
  Operands operands{operand_of(x), operand_of(weight), tokens == 1 ? k : x.stride(0), k,
                    partials.size(0), flags.size(0), x.device().device_id, current_stream(x)};
  Variant variant{rows, split};
  if (gated) {
    dispatch<true>(args, operands, variant);
  } else {
    dispatch<false>(args, operands, variant);
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_linear, minisgl::decode_linear);

}  // namespace minisgl
