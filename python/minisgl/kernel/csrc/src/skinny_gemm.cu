// Linear layers of a few tokens: Y^T = W X^T on tensor cores, bound by the reading of W, with the neighbours of the
// layer fused: RMS norm before it, SwiGLU or the residual's sum after it. One module per dtype and token tile.
//
// Weights are the MMA's A (16 rows of W), tokens its B (8 columns). The order of k is free as long as A and B agree,
// so a lane takes 16 contiguous bytes of a row of W as the fragments of two MMAs, and the same bytes of a row of x.
// A lane therefore uses only what it loaded itself: the shared-memory ring that holds loads in flight needs no barrier.
//
// A row block is 8 rows of W ("octet"). A CTA has a contiguous range of octets (gated: pairs of a gate and an up octet),
// all k of them, and takes up to kOctets at a time; its warps take turns at blocks of 32 k. The ring runs on into the
// next group of octets. W does not depend on earlier kernels: the ring is filled before `pdl_wait`.
//
// Sums are in fp32 in a fixed order. The norm is applied to the sum: y = rstd * (x∘g) W^T, where the sum of squares
// comes from the x that the MMAs read.
#include <tvm/ffi/optional.h>

#include "minisgl/common.cuh"

namespace minisgl {
namespace {

#ifdef MINISGL_FP16
using T = __half;
using T2 = __half2;
#else
using T = __nv_bfloat16;
using T2 = __nv_bfloat162;
#endif

#ifndef MINISGL_TOKENS
#define MINISGL_TOKENS 8
#endif

constexpr int kTokenTiles = MINISGL_TOKENS / 8;
constexpr int kBlock = 32;                 // k of one step of a warp: 16 bytes of each of 4 lanes
constexpr int kSlot = 512;                 // bytes: 16 of each lane
constexpr int kRingBytes = 86 * 1024;      // with what follows at most kSharedBytes
constexpr int kPartialBytes = 16 * 1024;
constexpr int kSharedBytes = 113 * 1024;   // half of an SM's, less what the system takes

struct Args {
  const T* x;
  int64_t x_stride;
  const T* weight;
  const T* norm_weight;  // null: no norm
  const T* bias;         // null: none
  const T* residual;     // null: none; else equal to out
  T* out;
  float eps;
  int tokens, outputs, k;
};

template <bool gated, int warps, int octets>
struct Config {
  static constexpr bool kGated = gated;
  static constexpr int kWarps = warps;
  static constexpr int kThreads = warps * 32;
  static constexpr int kOctets = octets;
  static constexpr int kTiles = (octets + 1) / 2;
  static constexpr int kSlots = octets + kTokenTiles;
  static constexpr int kStages = kRingBytes / (warps * kSlots * kSlot);
  static constexpr int kRing = warps * kStages * kSlots * kSlot;
  static constexpr int kFits = kPartialBytes / (warps * kTokenTiles * 512);
  static constexpr int kPassTiles = kFits < kTiles ? kFits : kTiles;  // tiles whose partial sums are merged at a time
  static constexpr int kPasses = (kTiles + kPassTiles - 1) / kPassTiles;
  static constexpr int kPartial = warps * kPassTiles * kTokenTiles * 512;
  static constexpr int kPositions = (kPassTiles * kTokenTiles + warps - 1) / warps;  // (tile, token tile)s a warp merges
  static constexpr int kSquares = warps * kTokenTiles * 8 * 4;
  static constexpr int kFixedBytes = kRing + kPartial + kSquares;
  static_assert(kStages >= 2);
};

__device__ __forceinline__ void cp_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}

// c += A B for 16 rows, 8 tokens and 16 k.
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
#ifdef MINISGL_FP16
#define MINISGL_MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MINISGL_MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
  asm(MINISGL_MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// x∘g of two k. fp16 has no room for large residuals times large g: clamp (NaN and infinity come back through rstd).
__device__ __forceinline__ uint32_t scale(uint32_t x, uint32_t g) {
  T2 y = __hmul2(*reinterpret_cast<T2*>(&x), *reinterpret_cast<T2*>(&g));
#ifdef MINISGL_FP16
  y = __hmax2(__hmin2(y, __float2half2_rn(65504.f)), __float2half2_rn(-65504.f));
#endif
  return *reinterpret_cast<uint32_t*>(&y);
}

__device__ __forceinline__ float squares(uint32_t x) {
#ifdef MINISGL_FP16
  float2 v = __half22float2(*reinterpret_cast<T2*>(&x));
#else
  float2 v = __bfloat1622float2(*reinterpret_cast<T2*>(&x));
#endif
  return v.x * v.x + v.y * v.y;
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

// What one lane adds to the four sums of a (tile, token tile), read early so that its latency is hidden.
struct Addend {
  T residual[4];
  T bias[2];
};

struct Group {
  int first;   // octet (gated: pair) of the whole matrix
  int octets;  // in this group: a gated pair counts as two
};

template <typename C>
struct Worker {
  const Args& args;
  char* smem;
  uint32_t ring;           // this lane's slot of stage 0
  uint32_t gains;          // shared address of the norm weight
  int warp, row, quad;     // lane = 4 * row + quad: row of an octet (or token of a tile), quarter of a block
  int first_unit, units, groups;
  int blocks;              // of k, of this warp
  int steps;               // blocks * groups
  int load_group, load_block, load_octets, loaded;  // where the loads of W stand
  const T* load_rows;
  int x_block, x_loaded;   // where the loads of x stand

  __device__ __forceinline__ Worker(const Args& arguments, char* shared) : args(arguments), smem(shared) {
    int lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    row = lane / 4;
    quad = lane % 4;
    uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
    ring = base + warp * C::kStages * C::kSlots * kSlot + lane * 16;
    gains = base + C::kFixedBytes;
    int all = args.outputs / 8;
    first_unit = static_cast<int>(static_cast<int64_t>(all) * blockIdx.x / gridDim.x);
    units = static_cast<int>(static_cast<int64_t>(all) * (blockIdx.x + 1) / gridDim.x) - first_unit;
    constexpr int kMax = C::kGated ? C::kOctets / 2 : C::kOctets;
    groups = (units + kMax - 1) / kMax;
    blocks = (args.k / kBlock - warp + C::kWarps - 1) / C::kWarps;
    steps = blocks * groups;
    load_group = load_block = loaded = x_block = x_loaded = 0;
    enter_group();
  }

  __device__ __forceinline__ Group group_at(int index) const {
    int begin = units * index / groups, end = units * (index + 1) / groups;
    return {first_unit + begin, (end - begin) * (C::kGated ? 2 : 1)};
  }

  __device__ __forceinline__ void enter_group() {
    Group group = group_at(load_group);
    load_octets = group.octets;
    load_rows = args.weight + static_cast<int64_t>(group.first * 8 + row) * args.k + warp * kBlock + quad * 8;
  }

  // Issue the next block of W into the slots at `slot`; nothing when all of it was.
  __device__ __forceinline__ void load_weights(uint32_t slot) {
    if (loaded == steps) return;
    int64_t octet = static_cast<int64_t>(args.k) * 8;
    int64_t half = static_cast<int64_t>(args.k) * args.outputs;
    const T* source = load_rows + static_cast<int64_t>(load_block) * (C::kWarps * kBlock);
#pragma unroll
    for (int o = 0; o < C::kOctets; ++o) {
      if (o < load_octets) {
        const T* from = source + (C::kGated ? (o / 2) * octet + (o % 2) * half : o * octet);
        cp_async(slot + o * kSlot, from);
      }
    }
    ++loaded;
    if (++load_block == blocks && loaded < steps) {
      load_block = 0;
      ++load_group;
      enter_group();
    }
  }

  __device__ __forceinline__ void load_x(uint32_t slot) {
    if (x_loaded == steps) return;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      int token = n * 8 + row;
      if (token < args.tokens) {
        const T* from = args.x + token * args.x_stride + (warp + x_block * C::kWarps) * kBlock + quad * 8;
        cp_async(slot + (C::kOctets + n) * kSlot, from);
      }
    }
    ++x_loaded;
    if (++x_block == blocks) x_block = 0;
  }

  // Each warp fetches the part of the norm weight that it uses.
  __device__ __forceinline__ void load_gains() {
    for (int b = row; b < blocks; b += 8) {
      int k = (warp + b * C::kWarps) * kBlock + quad * 8;
      cp_async(gains + k * sizeof(T), args.norm_weight + k);
    }
  }

  __device__ __forceinline__ void read_x(uint32_t slot, int block, bool sum, uint4 (&x)[kTokenTiles],
                                         float (&square)[kTokenTiles]) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      x[n] = make_uint4(0, 0, 0, 0);
      if (n * 8 + row < args.tokens) x[n] = load_shared(slot + (C::kOctets + n) * kSlot);
    }
    if (args.norm_weight == nullptr) return;
    uint4 g = load_shared(gains + ((warp + block * C::kWarps) * kBlock + quad * 8) * sizeof(T));
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      if (sum) square[n] += (squares(x[n].x) + squares(x[n].y)) + (squares(x[n].z) + squares(x[n].w));
      x[n] = make_uint4(scale(x[n].x, g.x), scale(x[n].y, g.y), scale(x[n].z, g.z), scale(x[n].w, g.w));
    }
  }

  // Slots beyond `octets` hold stale rows: their sums are never written.
  __device__ __forceinline__ void multiply(uint32_t slot, int octets, const uint4 (&x)[kTokenTiles],
                                           float (&acc)[C::kTiles][kTokenTiles][4]) const {
#pragma unroll
    for (int tile = 0; tile < C::kTiles; ++tile) {
      if (2 * tile < octets) {
        uint4 a = load_shared(slot + 2 * tile * kSlot);
        uint4 b = make_uint4(0, 0, 0, 0);
        if (2 * tile + 1 < C::kOctets) b = load_shared(slot + (2 * tile + 1) * kSlot);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          mma(acc[tile][n], a.x, b.x, a.y, b.y, x[n].x, x[n].y);
          mma(acc[tile][n], a.z, b.z, a.w, b.w, x[n].z, x[n].w);
        }
      }
    }
  }

  // The outputs of the lane's four sums: rows `row` and `row + 8` of a tile (not gated), tokens `token` and `token + 1`.
  __device__ __forceinline__ int token_of(int n) const { return n * 8 + quad * 2; }

  __device__ __forceinline__ void read_addends(const Group& group, Addend (&addends)[C::kPasses][C::kPositions]) const {
#pragma unroll
    for (int pass = 0; pass < C::kPasses; ++pass) {
#pragma unroll
      for (int p = 0; p < C::kPositions; ++p) {
        int position = warp + p * C::kWarps;
        int tile = pass * C::kPassTiles + position / kTokenTiles;
        int token = token_of(position % kTokenTiles);
        Addend& addend = addends[pass][p];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int output = group.first * 8 + tile * 16 + half * 8 + row;
          bool inside = position < C::kPassTiles * kTokenTiles && 2 * tile + half < group.octets;
          addend.bias[half] = inside && args.bias != nullptr ? args.bias[output] : T(0.f);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            bool used = inside && args.residual != nullptr && token + i < args.tokens;
            size_t at = static_cast<size_t>(token + i) * args.outputs + output;
            addend.residual[half * 2 + i] = used ? args.residual[at] : T(0.f);
          }
        }
      }
    }
  }

  __device__ __forceinline__ float rstd(const float* square, int token) const {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) sum += square[w * kTokenTiles * 8 + token];
#ifdef MINISGL_FP16
    if (sum > 3e38f) return __int_as_float(0x7fffffff);  // NaN: an infinite x, which `scale` has clamped
#endif
    return rsqrtf(sum / static_cast<float>(args.k) + args.eps);
  }

  __device__ __forceinline__ void write(const Group& group, int tile, int n, const float (&sum)[4], const Addend& addend,
                                        const float* square) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int token = token_of(n) + i;
      if (token >= args.tokens) continue;
      float factor = args.norm_weight != nullptr ? rstd(square, token) : 1.f;
      size_t at = static_cast<size_t>(token) * args.outputs;
      if constexpr (C::kGated) {
        at += (group.first + tile) * 8 + row;
        args.out[at] = from_float<T>(silu(sum[i] * factor) * (sum[2 + i] * factor));
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (2 * tile + half >= group.octets) continue;
          float y = sum[half * 2 + i] * factor + to_float(addend.bias[half]) + to_float(addend.residual[half * 2 + i]);
          args.out[at + group.first * 8 + tile * 16 + half * 8 + row] = from_float<T>(y);
        }
      }
    }
  }

  // Merge the warps' sums and write the outputs of `group`.
  __device__ __forceinline__ void finish(const Group& group, bool first, float (&acc)[C::kTiles][kTokenTiles][4],
                                         const float (&square)[kTokenTiles],
                                         const Addend (&addends)[C::kPasses][C::kPositions]) {
    float4* partial = reinterpret_cast<float4*>(smem + C::kRing);
    float* all_squares = reinterpret_cast<float*>(smem + C::kRing + C::kPartial);
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int pass = 0; pass < C::kPasses; ++pass) {
      __syncthreads();  // the sums of the pass before are read
      store_partials(pass, partial + warp * 32 + lane, acc);
      if (pass == 0 && first && args.norm_weight != nullptr) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          float sum = warp_sum<4>(square[n]);  // over the quads
          if (quad == 0) all_squares[warp * kTokenTiles * 8 + n * 8 + row] = sum;
        }
      }
      __syncthreads();
#pragma unroll
      for (int p = 0; p < C::kPositions; ++p) {
        int position = warp + p * C::kWarps;
        int tile = pass * C::kPassTiles + position / kTokenTiles;
        if (position >= C::kPassTiles * kTokenTiles || 2 * tile >= group.octets) continue;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int w = 0; w < C::kWarps; ++w) {
          float4 v = partial[(position * C::kWarps + w) * 32 + lane];
          sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
        }
        write(group, tile, position % kTokenTiles, sum, addends[pass][p], all_squares);
      }
    }
  }

  __device__ __forceinline__ void store_partials(int pass, float4* partial,
                                                 const float (&acc)[C::kTiles][kTokenTiles][4]) const {
#pragma unroll
    for (int i = 0; i < C::kPassTiles * kTokenTiles; ++i) {
      int tile = pass * C::kPassTiles + i / kTokenTiles;
      if (tile < C::kTiles) {
        const float(&c)[4] = acc[tile][i % kTokenTiles];
        partial[i * C::kWarps * 32] = make_float4(c[0], c[1], c[2], c[3]);
      }
    }
  }

  // Before `pdl_wait`: weights only.
  __device__ __forceinline__ void prefetch() {
    if (args.norm_weight != nullptr) load_gains();
#pragma unroll
    for (int s = 0; s < C::kStages; ++s) load_weights(ring + s * C::kSlots * kSlot);
  }

  __device__ __forceinline__ void run() {
    // The weights were not committed: they count as part of the first group, which is complete last of all.
#pragma unroll
    for (int s = 0; s < C::kStages; ++s) {
      load_x(ring + s * C::kSlots * kSlot);
      cp_async_commit();
    }
    int stage = 0;
    float square[kTokenTiles] = {};
    for (int index = 0; index < groups; ++index) {
      Group group = group_at(index);
      Addend addends[C::kPasses][C::kPositions];
      if constexpr (!C::kGated) read_addends(group, addends);
      float acc[C::kTiles][kTokenTiles][4] = {};
      for (int block = 0; block < blocks; ++block) {
        cp_async_wait<C::kStages - 1>();
        __syncwarp();  // other lanes' part of the norm weight
        uint32_t slot = ring + stage * C::kSlots * kSlot;
        uint4 x[kTokenTiles];
        read_x(slot, block, index == 0, x, square);
        multiply(slot, group.octets, x, acc);
        load_weights(slot);
        load_x(slot);
        cp_async_commit();
        stage = stage + 1 == C::kStages ? 0 : stage + 1;
      }
      finish(group, index == 0, acc, square, addends);
    }
  }
};

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
void launch_config(const Args& args, const TensorView& x) {
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
  }
  TVM_FFI_THROW(ValueError) << "no such variant: " << variant;
}

using tvm::ffi::Optional;

const T* data_of(const TensorView& t) {
#ifdef MINISGL_FP16
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

const T* matrix_of(const TensorView& t, int64_t rows, int64_t columns) {
  MINISGL_CHECK(t.ndim() == 2 && t.size(0) == rows && t.size(1) == columns) << "expected " << rows << " x " << columns;
  MINISGL_CHECK(t.stride(1) == 1 && (t.stride(0) == columns || rows == 1)) << "expected a contiguous matrix";
  return data_of(t);
}

Args arguments(const TensorView& x, const TensorView& weight, const TensorView& out, int64_t weight_rows) {
  MINISGL_CHECK(x.ndim() == 2 && out.ndim() == 2) << "expected matrices";
  int64_t tokens = x.size(0), k = x.size(1), outputs = out.size(1);
  MINISGL_CHECK(tokens <= MINISGL_TOKENS && k % kBlock == 0 && k > 0 && outputs % 8 == 0 && outputs > 0)
      << "unsupported shape: " << tokens << " tokens, " << outputs << " x " << k;
  MINISGL_CHECK(k < (1 << 24) && weight_rows < (1 << 24)) << "too large";
  MINISGL_CHECK(x.stride(1) == 1 && (x.stride(0) % 8 == 0 || tokens == 1)) << "expected rows at 16-byte boundaries";
  Args args{};
  args.x = data_of(x);
  args.x_stride = x.stride(0);
  args.weight = matrix_of(weight, weight_rows, k);
  args.out = const_cast<T*>(matrix_of(out, tokens, outputs));
  args.tokens = static_cast<int>(tokens);
  args.outputs = static_cast<int>(outputs);
  args.k = static_cast<int>(k);
  return args;
}

}  // namespace

// out [m, n] = rms_norm(x [m, k]) weight[n, k]^T + bias; no norm without a norm weight.
void norm_linear(TensorView x, Optional<TensorView> norm_weight, double eps, TensorView weight,
                 Optional<TensorView> bias, TensorView out, int64_t variant) {
  if (x.size(0) == 0) return;
  Args args = arguments(x, weight, out, out.size(1));
  args.norm_weight = vector_of(norm_weight, args.k);
  args.bias = vector_of(bias, args.outputs);
  args.eps = static_cast<float>(eps);
  dispatch<false>(args, x, variant);
}

// out [m, n] = silu(gate) * up of [gate, up] = rms_norm(x [m, k]) weight[2n, k]^T, gate rows first.
void norm_gate_up(TensorView x, Optional<TensorView> norm_weight, double eps, TensorView weight, TensorView out,
                  int64_t variant) {
  if (x.size(0) == 0) return;
  Args args = arguments(x, weight, out, 2 * out.size(1));
  args.norm_weight = vector_of(norm_weight, args.k);
  args.eps = static_cast<float>(eps);
  dispatch<true>(args, x, variant);
}

// residual [m, n] += x [m, k] weight[n, k]^T + bias, rounded once.
void linear_add(TensorView x, TensorView weight, Optional<TensorView> bias, TensorView residual, int64_t variant) {
  if (x.size(0) == 0) return;
  Args args = arguments(x, weight, residual, residual.size(1));
  args.bias = vector_of(bias, args.outputs);
  args.residual = args.out;
  dispatch<false>(args, x, variant);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_linear, minisgl::norm_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_gate_up, minisgl::norm_gate_up);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_add, minisgl::linear_add);

}  // namespace minisgl
