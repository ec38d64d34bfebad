// Experts in MXFP4 for many pairs of each, on the tensor cores of Hopper (minisgl/experts_wide.cuh). Compiled once per dtype
// (MINISGL_FP16) and number of pairs of a block (MINISGL_TOKENS).
#include "minisgl/experts_wide.cuh"

namespace minisgl {
namespace {

// In the narrowest products that hold the tile's pairs, of `width` columns and more.
template <int width, bool gated>
__device__ __forceinline__ void compute_narrow(const Args& args, const Shared<gated>& shared, const Work& work,
                                               Cursor<Outputs<gated>::kStages>& cursor) {
  if constexpr (width < kTokens) {
    if (work.count() > width) return compute_narrow<width + kWider>(args, shared, work, cursor);
  }
  compute<width>(args, shared, work, cursor);
}

template <bool gated>
__device__ __forceinline__ void consume(const Args& args, Shared<gated> shared) {
  if (!gated && !args.parts) pdl_wait();
  asm volatile("" : "+r"(shared.full), "+r"(shared.empty));  // else each use finds the window of shared memory anew
  Cursor<Outputs<gated>::kStages> cursor;
  Work work(args, blockIdx.x);
  while (work.exists()) {
    Work ahead = work.next(args);
    compute_narrow<kTokens / 4>(args, shared, work, cursor);
    work = ahead;
  }
}

template <bool gated>
__global__ void __launch_bounds__(kThreads, 1)
    wide_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ Args args) {
  extern __shared__ __align__(1024) char smem[];
  __shared__ uint64_t barriers[2][Outputs<gated>::kStages];
  if (gated) pdl_wait();
  pdl_trigger();
  Shared<gated> shared{shared_address(smem), shared_address(barriers[0]), shared_address(barriers[1])};
  if (threadIdx.x == 0) {
    tma_prefetch(&weights);
    for (int i = 0; i < Outputs<gated>::kStages; ++i) {
      barrier_init(shared.full + i * 8, 129);  // who copies, and who says how much the copy engine brings
      barrier_init(shared.empty + i * 8, kMultipliers / 32);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kMultipliers) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 144;");
    consume<gated>(args, shared);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 80;");
    produce<gated>(args, weights, shared);
  }
  if (!gated && args.parts) pdl_wait();  // so that whoever waits for this kernel has waited for the one before too
}

template <bool gated>
void run_wide(const Args& args, const TensorView& x, int64_t num_experts) {
  using O = Outputs<gated>;
  static bool prepared[64] = {};
  allow_shared(wide_kernel<gated>, O::kSharedBytes, x.device().device_id, prepared);
  int64_t tiles = (args.tiles + kTiles - 1) / kTiles * static_cast<int64_t>(args.num_blocks);
  MINISGL_CHECK(tiles < (1 << 30)) << "too large";
  // 8 bytes at a time, since a box has at most 256 elements a side.
  uint64_t sizes[4] = {kUnitBytes / 8, static_cast<uint64_t>(args.units), static_cast<uint64_t>(args.tiles),
                       static_cast<uint64_t>(num_experts)};
  uint64_t strides[3] = {kUnitBytes, sizes[1] * kUnitBytes, sizes[1] * sizes[2] * kUnitBytes};
  uint32_t box[4] = {kUnitBytes / 8, 1, kTiles, 1};
  CUtensorMap weights =
      tensor_map<4>(args.weight, CU_TENSOR_MAP_DATA_TYPE_INT64, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_NONE);
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(min(tiles, static_cast<int64_t>(sm_count(x.device().device_id)))));
  config.block = dim3(kThreads);
  config.smem = O::kSharedBytes;
  launch(config, current_stream(x), wide_kernel<gated>, weights, args);
}

void product(TensorView x, TensorView weight, double unit, Optional<TensorView> bias, TensorView weights,
             TensorView order, TensorView blocks, TensorView out, int64_t top_k, int64_t kind, int64_t block_m) {
  MINISGL_CHECK(block_m == kTokens);
  Args args = arguments(x, weight, unit, bias, weights, order, blocks, out, top_k, kind);
  if (kind > 0) return run_wide<true>(args, x, weight.size(0));
  if (kind < 0) args.parts = (args.k / 8 + kTiles - 1) / kTiles * kWarpgroups;
  run_wide<false>(args, x, weight.size(0));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(product, minisgl::product);

}  // namespace minisgl
