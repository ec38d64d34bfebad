// Experts in MXFP4 (minisgl/experts.cuh) for many pairs of each, on the tensor cores of Hopper: a warpgroup's four tiles are the
// tall operand, unpacked in registers while the products before run. Each warp has a ring for its own weights, which
// the copy engine fills. Compiled once per dtype (MINISGL_FP16) and number of pairs of a block (MINISGL_TOKENS).
#include "minisgl/experts.cuh"
#include "minisgl/tma.cuh"

#define WGMMA_N MINISGL_TOKENS
#if MINISGL_FP16
#define WGMMA_TYPE "f16"
#else
#define WGMMA_TYPE "bf16"
#endif
#include "minisgl/wgmma.cuh"

namespace minisgl {
namespace {

constexpr int kTokens = MINISGL_TOKENS;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRing = 4;                       // units of a warp's weights
constexpr int kHalves = kTokens > 64 ? 1 : 2;  // of 64 k, of a stage of x
constexpr int kStages = 3;                     // of these one is ahead
constexpr int kStageBytes = kHalves * kTokens * 128;
constexpr int kSharedBytes = kStages * kStageBytes + kWarps * kRing * kUnitBytes;
constexpr int kGroups = kTokens > 64 ? 1 : 2;  // of 32 k, that are multiplied at a time

// A warp's weights on their way through shared memory. One lane asks for them.
template <typename S>
struct Ring {
  const S& share;
  uint32_t slots, full;

  __device__ __forceinline__ Ring(const S& of, uint32_t shared, uint64_t (&barriers)[kWarps][kRing]) : share(of) {
    int warp = threadIdx.x / 32;
    slots = shared + kStages * kStageBytes + warp * kRing * kUnitBytes, full = shared_address(barriers[warp]);
    if (threadIdx.x % 32) return;
    for (int i = 0; i < kRing; ++i) barrier_init(full + i * 8, 1);
    barrier_init_fence();
    for (int i = 0; i < kRing; ++i) load(i);
  }

  __device__ __forceinline__ void load(int unit) const {
    if (unit >= share.args.units) return;
    barrier_expect(full + unit % kRing * 8, kUnitBytes);
    bulk_load(slots + unit % kRing * kUnitBytes, share.unit_at(unit, 0), kUnitBytes, full + unit % kRing * 8);
  }

  __device__ __forceinline__ Codes take(int unit) const {
    uint32_t slot = slots + unit % kRing * kUnitBytes, powers = slot + kCodeBytes + share.lane / 4 * 4;
    barrier_wait(full + unit % kRing * 8, unit / kRing % 2);
    Codes codes{{load_shared(slot + share.lane * 16), load_shared(slot + kCodeBytes / 2 + share.lane * 16)},
                {load_shared_4(powers), load_shared_4(powers + 32)}};
    __syncwarp();
    if (share.lane == 0) load(unit + kRing);
    return codes;
  }
};

template <bool gated>
__global__ void __launch_bounds__(kThreads, 2) wide_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(1024) char smem[];
  __shared__ int rows[kTokens];
  __shared__ uint64_t barriers[kWarps][kRing];
  if (gated) pdl_wait();
  pdl_trigger();
  using S = Share<gated, kTokens>;
  S share(args, blockIdx.x * kWarps + threadIdx.x / 32);
  if (share.count <= 0) return pdl_wait();
  uint32_t x = shared_address(smem);
  Ring<S> ring(share, x, barriers);
  if (!gated) pdl_wait();
  share.find_rows(rows);
  __syncthreads();
  int steps = args.units * 2 / kHalves;
  auto load_x = [&](int step) {
    if (step < steps) share.template load_x<kHalves>(rows, x + step % kStages * kStageBytes, step * kHalves);
    cp_async_commit();
  };
  load_x(0);
  float sums[kTokens / 2] = {};
  uint32_t a[2][kGroups][2][4];
  uint64_t b = 0;
  pin(sums);
  for (int unit = 0; unit < args.units; ++unit) {
    Codes codes = ring.take(unit);
#pragma unroll
    for (int j = 0; j < 4; j += kGroups) {
      if (j % (2 * kHalves) == 0) {  // the next stage of x
        int step = (unit * 4 + j) / (2 * kHalves);
        cp_async_wait<0>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();  // it is there, and all products with the one before the last are done
        load_x(step + 1);
        b = wgmma_descriptor(x + step % kStages * kStageBytes);
      }
      uint32_t(&mine)[kGroups][2][4] = a[j / kGroups % 2];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) unpack(codes, j + g, mine[g]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        int at = j * 2 + i;  // of the unit's 16 k
        wgmma(sums, mine[i / 2][i % 2], b + at / 4 % kHalves * (kTokens * 128 >> 4) + at % 4 * 2);
      }
      wgmma_commit();
      wgmma_wait<1>();  // those before: their registers are free
    }
  }
  wgmma_wait<0>();
  pin(sums);
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
    share.write(0, n, {sums[4 * n], sums[4 * n + 1], sums[4 * n + 2], sums[4 * n + 3]});
  }
}

template <bool gated>
void run_wide(const Args& args, const TensorView& x, int64_t num_blocks) {
  static bool prepared[64] = {};
  run(wide_kernel<gated>, args, x, num_blocks, kThreads / 32, kThreads, kSharedBytes, prepared);
}

void product(TensorView x, TensorView weight, double unit, Optional<TensorView> bias, TensorView weights,
             TensorView order, TensorView blocks, TensorView out, int64_t top_k, int64_t kind, int64_t block_m) {
  MINISGL_CHECK(block_m == kTokens);
  Args args = arguments(x, weight, unit, bias, weights, order, blocks, out, top_k, kind);
  if (kind) return run_wide<true>(args, x, blocks.size(0));
  run_wide<false>(args, x, blocks.size(0));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(product, minisgl::product);

}  // namespace minisgl
