// Linear layers of a few tokens: Y^T = W X^T on tensor cores, bound by the reading of W, with the neighbours of the
// layer fused: RMS norm before it, SwiGLU or the residual's sum after it. One module per dtype and token tile.
//
// Weights are the MMA's A (16 rows of W), tokens its B (8 columns). The order of k is free as long as A and B agree,
// so a lane takes 16 contiguous bytes of a row of W as the fragments of two MMAs, and the same bytes of a row of x.
// A lane therefore uses only what it loaded itself: the shared-memory ring that holds loads in flight needs no barrier.
//
// 8 rows of W are an octet. A CTA has a contiguous range of octets (gated: of pairs of a gate and an up octet), all k of
// them, and takes up to kOctets at a time; its warps take turns at blocks of 32 k. The ring runs on into the next group
// of octets. W does not depend on earlier kernels: the ring is filled before `pdl_wait`.
//
// Sums are in fp32 in a fixed order. The norm is applied to the sum: y = rstd * (x∘g) W^T, where the sum of squares
// comes from the x that the MMAs read.
//
// With MINISGL_FP8 weights are e4m3, 16 k of a lane; they become T in registers. A scale belongs to each row, or to each
// octet and 128 k.
#pragma once

#include "minisgl/async_copy.cuh"
#include "minisgl/float8.cuh"
#include "minisgl/mma.cuh"

namespace minisgl {
namespace {

#ifndef MINISGL_TOKENS
#define MINISGL_TOKENS 8
#endif

#if MINISGL_FP8
using Weight = uint8_t;
#else
using Weight = T;
#endif

#ifndef MINISGL_SHARED
#define MINISGL_SHARED 113
#endif

constexpr bool kFloat8 = sizeof(Weight) == 1;
constexpr int kTokenTiles = MINISGL_TOKENS / 8;
constexpr int kLane = 16 / sizeof(Weight);   // k of a lane in a step: 16 bytes of a row of W
constexpr int kVecs = kLane * sizeof(T) / 16;  // and vectors of 16 bytes of a row of x
constexpr int kBlock = 4 * kLane;            // k of one step of a warp
constexpr int kSlot = 512;                   // bytes: 16 of each lane
constexpr int kSharedBytes = MINISGL_SHARED * 1024;  // 113: half of an SM's, less what the system takes
constexpr int kRingBytes = kSharedBytes - 27 * 1024;  // with what follows at most kSharedBytes
constexpr int kApartBytes = MINISGL_SHARED == 113 ? 117 * 1024 : kSharedBytes;  // an SM has room for one such block
constexpr int kPartialBytes = 16 * 1024;
constexpr int kHead = 1 << 15;               // so many outputs take so long that it never pays to begin beside another
constexpr int kScaleBlock = 128;             // k that share a scale, where octets have them

// Of x with e4m3: what `spread_even` takes off weights would leave too little of their products in bf16, whose range
// has room for x on the other side. `kRest` is what sums have still to be multiplied with.
constexpr float kRaise = std::is_same_v<T, __half> ? 1.f : 0x1p60f;
constexpr float kRest = kFloat8 ? 1.f / (kRaise * kSpread<T>) : 1.f;

__device__ __forceinline__ uint32_t raised(uint32_t pair) {
  if constexpr (kRaise == 1.f) return pair;
  T2 y = __hmul2(*reinterpret_cast<T2*>(&pair), T2(from_float<T>(kRaise), from_float<T>(kRaise)));
  return *reinterpret_cast<uint32_t*>(&y);
}

struct Args {
  const T* x;
  int64_t x_stride;
  const Weight* weight;
  const float* row_scales;    // null: none; [rows of W]
  const float* block_scales;  // null: none; [octets of W, k / 128, rounded up]
  const T* norm_weight;  // null: no norm
  const T* bias;         // null: none
  const T* residual;     // null: none; else equal to out
  T* out;
  float eps;
  int tokens, outputs, k;
  bool apart;  // no other block on the same SM: one that has two of them would be what all wait for
};

template <bool gated, int warps, int octets>
struct Config {
  static constexpr bool kGated = gated;
  static constexpr int kWarps = warps;
  static constexpr int kThreads = warps * 32;
  static constexpr int kOctets = octets;
  static constexpr int kTiles = (octets + 1) / 2;
  static constexpr int kSlots = octets + kTokenTiles * kVecs;
  static constexpr int kStages = kRingBytes / (warps * kSlots * kSlot);
  static constexpr int kRing = warps * kStages * kSlots * kSlot;
  static constexpr int kFits = kPartialBytes / (warps * kTokenTiles * 512);
  static constexpr int kPassTiles = kFits < kTiles ? kFits : kTiles;  // tiles whose partial sums are merged at a time
  static constexpr int kPasses = (kTiles + kPassTiles - 1) / kPassTiles;
  static constexpr int kPartial = warps * kPassTiles * kTokenTiles * 512;
  static constexpr int kPositions = (kPassTiles * kTokenTiles + warps - 1) / warps;  // (tile, token tile)s of a warp
  static constexpr int kSquares = warps * kTokenTiles * 8 * 4;
  static constexpr int kFixedBytes = kRing + kPartial + kSquares;
  static constexpr bool kExists = kStages >= 2;  // shared memory holds it
};

// What one lane does to the four sums of a (tile, token tile), read early so that its latency is hidden.
struct Addend {
  T residual[4];
  T bias[2];
  float scale[2];
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
  const Weight* load_rows;
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
    load_rows = args.weight + static_cast<int64_t>(group.first * 8 + row) * args.k + warp * kBlock + quad * kLane;
  }

  // Issue the next block of W into the slots at `slot`; nothing when all of it was.
  __device__ __forceinline__ void load_weights(uint32_t slot) {
    if (loaded == steps) return;
    int64_t octet = static_cast<int64_t>(args.k) * 8;
    int64_t half = static_cast<int64_t>(args.k) * args.outputs;
    const Weight* source = load_rows + static_cast<int64_t>(load_block) * (C::kWarps * kBlock);
#pragma unroll
    for (int o = 0; o < C::kOctets; ++o) {
      if (o < load_octets) {
        const Weight* from = source + (C::kGated ? (o / 2) * octet + (o % 2) * half : o * octet);
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
        const T* from = args.x + token * args.x_stride + (warp + x_block * C::kWarps) * kBlock + quad * kLane;
#pragma unroll
        for (int v = 0; v < kVecs; ++v) cp_async(slot + (C::kOctets + n * kVecs + v) * kSlot, from + v * 8);
      }
    }
    ++x_loaded;
    if (++x_block == blocks) x_block = 0;
  }

  // Each warp fetches the part of the norm weight that it uses.
  __device__ __forceinline__ void load_gains() {
    for (int b = row; b < blocks; b += 8) {
      int k = (warp + b * C::kWarps) * kBlock + quad * kLane;
#pragma unroll
      for (int v = 0; v < kVecs; ++v) cp_async(gains + (k + v * 8) * sizeof(T), args.norm_weight + k + v * 8);
    }
  }

  __device__ __forceinline__ void read_x(uint32_t slot, int block, bool sum, uint4 (&x)[kTokenTiles][kVecs],
                                         float (&square)[kTokenTiles]) const {
#pragma unroll
    for (int i = 0; i < kTokenTiles * kVecs; ++i) {
      x[i / kVecs][i % kVecs] = make_uint4(0, 0, 0, 0);
      if (i / kVecs * 8 + row < args.tokens) x[i / kVecs][i % kVecs] = load_shared(slot + (C::kOctets + i) * kSlot);
    }
    if (args.norm_weight != nullptr) apply_gains(block, sum, x, square);
    if constexpr (kFloat8) {
#pragma unroll
      for (int i = 0; i < kTokenTiles * kVecs; ++i) prepare(x[i / kVecs][i % kVecs]);
    }
  }

  __device__ __forceinline__ void apply_gains(int block, bool sum, uint4 (&x)[kTokenTiles][kVecs],
                                              float (&square)[kTokenTiles]) const {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      uint4 g = load_shared(gains + ((warp + block * C::kWarps) * kBlock + quad * kLane + v * 8) * sizeof(T));
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        uint4& y = x[n][v];
        if (sum) square[n] += (squares(y.x) + squares(y.y)) + (squares(y.z) + squares(y.w));
        y = make_uint4(scale(y.x, g.x), scale(y.y, g.y), scale(y.z, g.z), scale(y.w, g.w));
      }
    }
  }

  // x as `multiply_tile` takes it with e4m3: k in the order of `spread_even`, times kRaise.
  __device__ __forceinline__ static void prepare(uint4& x) {
    x = make_uint4(raised(__byte_perm(x.x, x.y, 0x5410)), raised(__byte_perm(x.x, x.y, 0x7632)),
                   raised(__byte_perm(x.z, x.w, 0x5410)), raised(__byte_perm(x.z, x.w, 0x7632)));
  }

  // 16 rows of W, of which a lane has a and b, times 8 tokens.
  __device__ __forceinline__ static void multiply_tile(uint4 a, uint4 b, const uint4 (&x)[kVecs], float (&c)[4]) {
    if constexpr (kFloat8) {
      const uint32_t lows[4] = {a.x, a.y, a.z, a.w}, highs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t even, odd, other_even, other_odd;
        spread_even<T>(lows[i], even, odd);
        spread_even<T>(highs[i], other_even, other_odd);
        const uint4 four = x[i / 2];
        mma(c, even, other_even, odd, other_odd, i % 2 ? four.z : four.x, i % 2 ? four.w : four.y);
      }
    } else {
      mma(c, a.x, b.x, a.y, b.y, x[0].x, x[0].y);
      mma(c, a.z, b.z, a.w, b.w, x[0].z, x[0].w);
    }
  }

  // Slots beyond `octets` hold stale rows: their sums are never written.
  __device__ __forceinline__ void multiply(uint32_t slot, const Group& group, int block,
                                           const uint4 (&x)[kTokenTiles][kVecs],
                                           float (&acc)[C::kTiles][kTokenTiles][4]) const {
#pragma unroll
    for (int tile = 0; tile < C::kTiles; ++tile) {
      if (2 * tile < group.octets) {
        uint4 a = load_shared(slot + 2 * tile * kSlot);
        uint4 b = make_uint4(0, 0, 0, 0);
        if (2 * tile + 1 < C::kOctets) b = load_shared(slot + (2 * tile + 1) * kSlot);
        float scales[2] = {1.f, 1.f};
        if constexpr (kFloat8) read_block_scales(group, tile, block, scales);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          if constexpr (kFloat8) {
            float part[4] = {};
            multiply_tile(a, b, x[n], part);
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[tile][n][i] += part[i] * scales[i / 2];
          } else {
            multiply_tile(a, b, x[n], acc[tile][n]);
          }
        }
      }
    }
  }

  // Of the two octets of a tile.
  __device__ __forceinline__ void read_block_scales(const Group& group, int tile, int block, float (&scales)[2]) const {
    if (args.block_scales == nullptr) return;
    int columns = (args.k + kScaleBlock - 1) / kScaleBlock, column = (warp + block * C::kWarps) * kBlock / kScaleBlock;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int octet = C::kGated ? group.first + tile + half * (args.outputs / 8) : group.first + 2 * tile + half;
      if (2 * tile + half < group.octets) scales[half] = __ldg(args.block_scales + octet * columns + column);
    }
  }

  // A lane's four sums belong to rows `row` and `row + 8` of a tile (gated: gate and up) and to this token and the next.
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
          int output = group.first * 8 + (C::kGated ? tile * 8 + half * args.outputs : tile * 16 + half * 8) + row;
          bool inside = position < C::kPassTiles * kTokenTiles && 2 * tile + half < group.octets;
          addend.scale[half] = kFloat8 && inside && args.row_scales != nullptr ? args.row_scales[output] : 1.f;
          if constexpr (C::kGated) continue;
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
    return inverse_root(sum, args.k, args.eps);
  }

  __device__ __forceinline__ void write(const Group& group, int tile, int n, const float (&sum)[4],
                                        const Addend& addend, const float* square) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int token = token_of(n) + i;
      if (token >= args.tokens) continue;
      float factor = args.norm_weight != nullptr ? rstd(square, token) : 1.f;
      float factors[2] = {factor, factor};
      if constexpr (kFloat8) factors[0] *= addend.scale[0] * kRest, factors[1] *= addend.scale[1] * kRest;
      size_t at = static_cast<size_t>(token) * args.outputs;
      if constexpr (C::kGated) {
        at += (group.first + tile) * 8 + row;
        args.out[at] = from_float<T>(silu(sum[i] * factors[0]) * (sum[2 + i] * factors[1]));
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (2 * tile + half >= group.octets) continue;
          float y = sum[half * 2 + i] * factors[half];
          y += to_float(addend.bias[half]) + to_float(addend.residual[half * 2 + i]);
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
      if constexpr (!C::kGated || kFloat8) read_addends(group, addends);
      float acc[C::kTiles][kTokenTiles][4] = {};
      for (int block = 0; block < blocks; ++block) {
        cp_async_wait<C::kStages - 1>();
        __syncwarp();  // other lanes' part of the norm weight
        uint32_t slot = ring + stage * C::kSlots * kSlot;
        uint4 x[kTokenTiles][kVecs];
        read_x(slot, block, index == 0, x, square);
        multiply(slot, group, block, x, acc);
        load_weights(slot);
        load_x(slot);
        cp_async_commit();
        stage = stage + 1 == C::kStages ? 0 : stage + 1;
      }
      finish(group, index == 0, acc, square, addends);
    }
  }
};

}  // namespace
}  // namespace minisgl
