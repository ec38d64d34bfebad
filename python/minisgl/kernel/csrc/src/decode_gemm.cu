// Entry points of the linear layers that minisgl/decode_gemm.cuh explains.
#include <minisgl/decode_gemm.cuh>

#include <tvm/ffi/optional.h>

namespace minisgl {
namespace {

using tvm::ffi::Optional;

constexpr int kMaxShared = 227 * 1024;  // bytes of a block

int sm_count(int device) {
  static int counts[64] = {};
  MINISGL_CHECK(device >= 0 && device < 64);
  if (counts[device] == 0) {
    int major = 0;
    MINISGL_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    MINISGL_CHECK(major == 9) << "these kernels are for sm_90a";
    MINISGL_CUDA_CHECK(cudaDeviceGetAttribute(&counts[device], cudaDevAttrMultiProcessorCount, device));
  }
  return counts[device];
}

// How the caller wants it done; minisgl/kernel/decode_gemm.py chooses.
struct Variant {
  int64_t rows;   // of weights in a tile
  int64_t split;  // see the kernel
};

struct Operands {
  const T* x;
  const T* weight;
  int64_t x_stride, k;
  int64_t workspace;  // floats in args.partials
  int64_t num_flags;
  int device;
  cudaStream_t stream;
};

template <typename C>
void run(Args args, const Operands& operands, const Variant& variant) {
  auto kernel = decode_gemm<C>;
  static bool prepared[64] = {};
  int sms = sm_count(operands.device);
  if (!prepared[operands.device]) {
    // The largest carveout, whatever this kernel needs: an SM must drain before it changes its carveout.
    MINISGL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared));
    MINISGL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                            cudaSharedmemCarveoutMaxShared));
    prepared[operands.device] = true;
  }
  uint64_t k = operands.k, half = args.outputs;
  uint64_t octet = k * sizeof(T) * 8;
  uint64_t groups = C::kGated ? args.outputs / 8 : args.outputs / 16;  // of 16 rows of a tile
  args.tiles = static_cast<int>((groups + C::kRows / 16 - 1) / (C::kRows / 16));
  args.steps = static_cast<int>(k / kK);
  args.split = static_cast<int>(variant.split);
  MINISGL_CHECK(variant.split >= 0 && variant.split <= kMaxSplit && args.split <= args.steps) << "no such split";
  int total = args.tiles * args.steps;
  int blocks = args.split > 0 ? args.tiles * args.split : (total < sms ? total : sms);
  int most = args.split > 0 ? (args.steps + args.split - 1) / args.split : (total + blocks - 1) / blocks;

  int room = kMaxShared - C::kFixedBytes;
  int least = args.split > 1 ? (C::kRows * kTokens * 4 + C::kStageBytes - 1) / C::kStageBytes : 1;
  int stages = room / C::kStageBytes < kMaxStages ? room / C::kStageBytes : kMaxStages;
  MINISGL_CHECK(stages >= 2 && stages >= least) << "the tile needs more shared memory";
  args.stages = stages < most ? stages : (most < least ? least : most);
  if (args.split == 0) {
    MINISGL_CHECK(operands.workspace >= static_cast<int64_t>(blocks) * C::kPartial && operands.num_flags >= blocks)
        << "the workspace is too small";
  }

  uint64_t sizes[4] = {k, 8, 2, groups};
  uint64_t strides[3] = {k * sizeof(T), C::kGated ? half * k * sizeof(T) : octet, C::kGated ? octet : 2 * octet};
  uint32_t box[4] = {kK, 8, 2, C::kRows / 16};
  uint64_t x_sizes[2] = {k, static_cast<uint64_t>(args.tokens)};
  uint64_t x_strides[1] = {static_cast<uint64_t>(operands.x_stride) * sizeof(T)};
  uint32_t x_box[2] = {kK, kTokens};
#if MINISGL_FP16
  constexpr bool kHalf = true;
#else
  constexpr bool kHalf = false;
#endif
  CUtensorMap weights = tensor_map<4>(operands.weight, kHalf, sizes, strides, box);
  CUtensorMap x = tensor_map<2>(operands.x, kHalf, x_sizes, x_strides, x_box);
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

const T* matrix_of(const TensorView& t, int64_t rows, int64_t columns) {
  MINISGL_CHECK(t.ndim() == 2 && t.size(0) == rows && t.size(1) == columns) << "expected " << rows << " x " << columns;
  MINISGL_CHECK(t.stride(1) == 1 && (t.stride(0) == columns || rows == 1)) << "expected a contiguous matrix";
  return data_of(t);
}

// out [m, n] = x [m, k] weight [n, k]^T + bias (+ out if `add`, rounded once); or, if `gated`, silu(gate) * up of
// [gate, up] = x weight [2n, k]^T. partials and flags: the workspace of split 0, flags zero.
void decode_linear(TensorView x, TensorView weight, Optional<TensorView> bias, TensorView out, TensorView partials,
                   TensorView flags, bool add, bool gated, int64_t rows, int64_t split) {
  MINISGL_CHECK(x.ndim() == 2 && out.ndim() == 2) << "expected matrices";
  int64_t tokens = x.size(0), k = x.size(1), outputs = out.size(1);
  if (tokens == 0) return;
  MINISGL_CHECK(tokens <= kTokens && k > 0 && k % kK == 0 && outputs > 0 && outputs % 16 == 0)
      << "unsupported shape: " << tokens << " tokens, " << outputs << " x " << k;
  MINISGL_CHECK(k < (1 << 20) && outputs < (1 << 20)) << "too large";
  MINISGL_CHECK(x.stride(1) == 1 && (x.stride(0) % 8 == 0 || tokens == 1)) << "expected rows at 16-byte boundaries";
  MINISGL_CHECK(!gated || (!add && !bias.has_value())) << "gate and up have no bias and add to nothing";
  MINISGL_CHECK(is_fp32(partials) && is_int32(flags)) << "expected fp32 and int32 workspaces";
  Args args{};
  args.out = const_cast<T*>(matrix_of(out, tokens, outputs));
  if (bias.has_value()) {
    MINISGL_CHECK((*bias).ndim() == 1 && (*bias).size(0) == outputs && (*bias).stride(0) == 1) << "not such a bias";
    args.bias = data_of(*bias);
  }
  args.residual = add ? args.out : nullptr;
  args.partials = static_cast<float*>(partials.data_ptr());
  args.flags = static_cast<unsigned*>(flags.data_ptr());
  args.tokens = static_cast<int>(tokens);
  args.outputs = static_cast<int>(outputs);
  Operands operands{data_of(x), matrix_of(weight, gated ? 2 * outputs : outputs, k), tokens == 1 ? k : x.stride(0), k,
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
