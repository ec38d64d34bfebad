// Experts in MXFP4 for many pairs of each, on the tensor cores of Hopper (sm_90a): what experts_wide.cu's kernel is made of.
//
// A tile of the output is 192 rows of one expert's weights and a block of its pairs. Blocks of threads stay: each takes tile
// after tile. One warpgroup copies, and is stages ahead, tiles too; three have 64 rows each, make 16-bit numbers of
// codes in registers, for the tall operand, while the products before run, and write results while the next tile is copied.
// Products are only as wide as the block's pairs want. Those that are not gated begin beside the last of the gated ones: each
// block of pairs has a count of what is written of it.
#pragma once

#include "minisgl/experts.cuh"
#include "minisgl/tma.cuh"

#define WGMMA_N MINISGL_TOKENS
#if MINISGL_FP16
#define WGMMA_TYPE "f16"
#else
#define WGMMA_TYPE "bf16"
#endif
#include "minisgl/wgmma_narrow.cuh"

namespace minisgl {
namespace {

constexpr int kTokens = MINISGL_TOKENS;  // of a block
constexpr int kWider = kTokens == 64 ? 8 : 32;  // by so many columns products differ
constexpr int kWarpgroups = 3;           // that multiply
constexpr int kMultipliers = kWarpgroups * 128;
constexpr int kThreads = kMultipliers + 128;
constexpr int kTiles = kWarpgroups * 4;  // of 16 rows
constexpr int kHalfBytes = kTokens * 128;  // 64 k of x
constexpr int kStageBytes = 2 * kHalfBytes + kTiles * kUnitBytes;
constexpr int kTogether = 32;  // tokens that a warpgroup writes together
constexpr int kMaxShared = 227 * 1024;
constexpr uint64_t kWeights = kTokens == 64 ? kEvictFirst : kEvictNormal;  // for L2: hardly an expert has two such blocks

struct Pair {
  int index;
  float weight;
};

// Of both kinds of products. Rows of outputs lie 16 bytes further apart than they are long, for the banks' sake.
template <bool gated>
struct Outputs {
  static constexpr int kTile = gated ? 8 : 16;  // that a tile of 16 rows makes
  static constexpr int kPieces = kTile / 2;     // of 16 bytes, that a warpgroup makes of a token
  static constexpr int kPitch = kPieces * 16 + 16;
  static constexpr int kBuffer = kTogether * kPitch;  // bytes; each warpgroup has two
  static constexpr int kPairs = gated ? 0 : kTokens * static_cast<int>(sizeof(Pair));
  static constexpr int kFixed = kWarpgroups * (2 * kBuffer + kPairs);
  static constexpr int kStages = (kMaxShared - kFixed - 1024) / kStageBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + kFixed;
};

// A tile of the output.
struct Work {
  int index, at, expert, first = 0, end = 0, tile;  // at: the block

  __device__ __forceinline__ Work(const Args& args, int index_) : index(index_) {
    int across = (args.tiles + kTiles - 1) / kTiles;
    at = index / across;
    if (at >= args.num_blocks) return;
    const int* block = args.blocks + at * 4;
    expert = block[0], first = block[1], end = block[2], tile = (index - at * across) * kTiles;
  }

  // Those of blocks without pairs are the last ones.
  __device__ __forceinline__ bool exists() const { return end > first; }
  __device__ __forceinline__ int count() const { return end - first; }

  // Products that are not gated: until all that the gated ones have to write of the block is there.
  __device__ __forceinline__ void wait(const Args& args) const {
    for (int there = 0; there < args.parts;) {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(args.blocks + at * 4 + 3) : "memory");
    }
  }

  // Gated products, one thread of each warpgroup when all of this wrote: its part is there.
  __device__ __forceinline__ void tell(const Args& args) const {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(args.blocks + at * 4 + 3) : "memory");
  }

  __device__ __forceinline__ Work next(const Args& args) const { return Work(args, index + gridDim.x); }
};

// Where a thread is in the ring.
template <int stages>
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Addresses in shared memory.
template <bool gated>
struct Shared {
  using O = Outputs<gated>;
  uint32_t ring, full, empty;

  __device__ __forceinline__ uint32_t x(int stage) const { return ring + stage * 2 * kHalfBytes; }
  __device__ __forceinline__ uint32_t weights(int stage) const {
    return ring + O::kStages * 2 * kHalfBytes + stage * kTiles * kUnitBytes;
  }
  __device__ __forceinline__ uint32_t outputs(int warpgroup) const {
    return ring + O::kStages * kStageBytes + warpgroup * 2 * O::kBuffer;
  }
  __device__ __forceinline__ uint32_t pairs(int warpgroup) const {
    return ring + O::kStages * kStageBytes + kWarpgroups * 2 * O::kBuffer + warpgroup * O::kPairs;
  }
};

// One thread: a unit of the tile's weights, zero beyond the last row.
__device__ __forceinline__ void load_weights(const CUtensorMap& weights, const Work& work, int unit, uint32_t to,
                                             uint32_t full) {
  barrier_expect(full, kTiles * kUnitBytes);
  tma_load(to, &weights, full, kWeights, 0, unit, work.tile, work.expert);
}

// The warpgroup that copies, a tile: each thread 16 bytes of `num` rows of x, which lie anywhere, and one of them the weights,
// but for the `early` units of these that it has fetched already. The multipliers wait for each instruction that it issues:
// what can be is done once for a tile.
template <int num, bool gated>
__device__ __forceinline__ void copy_tile(const Args& args, const CUtensorMap& weights, const Shared<gated>& shared,
                                          const Work& work, Cursor<Outputs<gated>::kStages>& cursor, int& early) {
  int thread = threadIdx.x - kMultipliers, piece = thread % 16, row = thread / 16, last = args.units - 1;
  uint32_t to = (piece / 8 * kTokens + row) * 128 + (piece % 8 ^ row) * 16;
  const T* rows[num];
#pragma unroll
  for (int i = 0; i < num; ++i) {
    int at = work.first + min(i * 8 + row, work.count() - 1);
    rows[i] = args.x + (gated ? args.order[at] / args.top_k : at) * args.x_stride + piece * 8;
  }
  auto copy = [&](int unit, auto copy_row) {
    uint32_t slot = shared.x(cursor.stage) + to, full = shared.full + cursor.stage * 8;
    barrier_wait(shared.empty + cursor.stage * 8, cursor.parity ^ 1);
    if (thread == 0 && early-- <= 0) load_weights(weights, work, unit, shared.weights(cursor.stage), full);
#pragma unroll
    for (int i = 0; i < num; ++i) copy_row(slot + i * 1024, rows[i]);
    cp_async_arrive(full);
    cursor.advance();
  };
  for (int unit = 0; unit < last; ++unit) {
    copy(unit, [](uint32_t to, const T* from) { cp_async(to, from); });
#pragma unroll
    for (int i = 0; i < num; ++i) rows[i] += kUnitK;
  }
  bool inside = last * kUnitK + piece * 8 < args.k;
  copy(last, [&](uint32_t to, const T* from) { cp_async_or_zero(to, inside ? from : args.x, inside); });
}

// By as few rows as the tile's pairs want.
template <int num, bool gated>
__device__ __forceinline__ void copy_few(const Args& args, const CUtensorMap& weights, const Shared<gated>& shared,
                                         const Work& work, Cursor<Outputs<gated>::kStages>& cursor, int& early) {
  if constexpr (num * 8 < kTokens) {
    if (work.count() > num * 8) return copy_few<num + 1>(args, weights, shared, work, cursor, early);
  }
  copy_tile<num>(args, weights, shared, work, cursor, early);
}

template <bool gated>
__device__ __forceinline__ void produce(const Args& args, const CUtensorMap& weights, const Shared<gated>& shared) {
  constexpr int kStages = Outputs<gated>::kStages;
  Work work(args, blockIdx.x);
  int early = 0;
  if (!gated) {
    if (work.exists()) early = min(args.units, kStages);
    if (threadIdx.x == kMultipliers) {
      for (int i = 0; i < early; ++i) load_weights(weights, work, i, shared.weights(i), shared.full + i * 8);
    }
    if (!args.parts) pdl_wait();
  }
  Cursor<kStages> cursor;
  while (work.exists()) {
    Work ahead = work.next(args);
    if (!gated) work.wait(args);
    copy_few<1>(args, weights, shared, work, cursor, early);
    work = ahead;
  }
  cp_async_commit();
  cp_async_wait<0>();
}

// sums += a unit's products, `num` times 32 k. Afterwards the last of them may still run.
template <int num, int width>
__device__ __forceinline__ void multiply(const Codes& codes, uint64_t x, float (&sums)[width / 2],
                                         uint32_t (&a)[2][2][4], uint32_t last) {
#pragma unroll
  for (int j = 0; j < num; ++j) {
    unpack(codes, j, a[j % 2]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i) wgmma(sums, a[j % 2][i], x + j / 2 * (kHalfBytes >> 4) + (j % 2 * 2 + i) * 2);
    wgmma_commit();
    wgmma_wait<1>();  // those before: their registers are free
    if (j == 0 && last) barrier_arrive(last);  // and so is the stage before
  }
}

__device__ __forceinline__ Codes take(uint32_t unit) {
  uint32_t lane = threadIdx.x % 32, powers = unit + kCodeBytes + lane / 4 * 4;
  return {{load_shared(unit + lane * 16), load_shared(unit + kCodeBytes / 2 + lane * 16)},
          {load_shared_4(powers), load_shared_4(powers + 32)}};
}

__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  T2 both = {from_float<T>(low), from_float<T>(high)};
  return *reinterpret_cast<uint32_t*>(&both);
}

// Four 8 x 8 matrices as fragments of products have them: lane 8i + j gives the address of column j of matrix i.
__device__ __forceinline__ void store_columns(uint32_t shared, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// What a lane needs of a tile to write it, fetched before the products: the biases of its two rows, and a pair.
template <bool gated>
struct Finish {
  using O = Outputs<gated>;
  T bias[2] = {};
  Pair pair = {};
  int feature;  // the warpgroup's first

  __device__ __forceinline__ Finish(const Args& args, const Work& work) {
    int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, outputs = args.tiles * O::kTile;
    feature = (work.tile + warpgroup * 4) * O::kTile;
    int at = feature + thread / 32 * O::kTile + thread % 32 / 4;
    if (args.bias != nullptr && at < outputs) {
      const T* from = args.bias + static_cast<int64_t>(work.expert) * args.tiles * 16 + at;
      bias[0] = from[0], bias[1] = from[gated ? outputs : 8];
    }
    if (!gated && thread < work.count()) pair.index = args.order[work.first + thread];
  }

  // A while later, since the pair's place has to be there.
  __device__ __forceinline__ void fetch(const Args& args) {
    if (!gated) pair.weight = args.weights[pair.index];
  }

  // A fragment of 8 tokens: of the gated outputs, or of those of the lower or the upper rows.
  template <int width>
  __device__ __forceinline__ uint32_t fragment(const Args& args, const float (&sums)[width / 2], int n, int upper,
                                               const float (&weights)[2]) const {
    float y[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if constexpr (gated) {
        float gate = sums[4 * n + j] * args.unit + to_float(bias[0]);
        y[j] = swiglu(gate, sums[4 * n + 2 + j] * args.unit + to_float(bias[1]), args.clamped);
      } else {
        y[j] = (sums[4 * n + 2 * upper + j] * args.unit + to_float(bias[upper])) * weights[j];
      }
    }
    return pack_two(y[0], y[1]);
  }

  template <int width>
  __device__ __forceinline__ void stage(const Args& args, const float (&sums)[width / 2], int begin, uint32_t pairs,
                                        uint32_t buffer) const {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    if constexpr (gated) {
      uint32_t v[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if ((begin + i) * 8 < width) v[i] = fragment<width>(args, sums, begin + i, 0, {});
      }
      store_columns(buffer + lane * O::kPitch + warp * 16, v);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        if ((begin + i) * 8 >= width) break;
        uint32_t v[4] = {};
#pragma unroll
        for (int j = 0; j < 2 && (begin + i + j) * 8 < width; ++j) {
          uint4 two = load_shared(pairs + ((begin + i + j) * 8 + lane % 4 * 2) * 8);
          float weights[2] = {__uint_as_float(two.y), __uint_as_float(two.w)};
          v[2 * j] = fragment<width>(args, sums, begin + i + j, 0, weights);
          v[2 * j + 1] = fragment<width>(args, sums, begin + i + j, 1, weights);
        }
        store_columns(buffer + (i * 8 + lane / 16 * 8 + lane % 8) * O::kPitch + warp * 32 + lane / 8 % 2 * 16, v);
      }
    }
  }

  template <int width>
  __device__ __forceinline__ void write(const Args& args, const Shared<gated>& shared, const Work& work,
                                        const float (&sums)[width / 2]) const {
    int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, outputs = args.tiles * O::kTile;
    uint32_t pairs = shared.pairs(warpgroup), buffers = shared.outputs(warpgroup);
    warpgroup_sync(warpgroup);  // the tile before is written
    if (!gated && thread < kTokens) {
      store_shared(pairs + thread * 8, pair.index), store_shared(pairs + thread * 8 + 4, __float_as_uint(pair.weight));
    }
    if (!gated) warpgroup_sync(warpgroup);
#pragma unroll
    for (int begin = 0; begin < width; begin += kTogether) {
      if (begin >= work.count()) break;
      uint32_t buffer = buffers + begin / kTogether % 2 * O::kBuffer;
      stage<width>(args, sums, begin / 8, pairs, buffer);
      warpgroup_sync(warpgroup);
#pragma unroll
      for (int i = thread; i < kTogether * O::kPieces; i += 128) {
        int token = i / O::kPieces, piece = i % O::kPieces, at = feature + piece * 8;
        if (begin + token >= work.count() || at >= outputs) continue;
        int row = gated ? work.first + begin + token : static_cast<int>(load_shared_4(pairs + (begin + token) * 8));
        uint4 v = load_shared(buffer + token * O::kPitch + piece * 16);
        *reinterpret_cast<uint4*>(args.out + static_cast<int64_t>(row) * outputs + at) = v;
      }
    }
  }
};

// A tile whose pairs `width` columns hold.
template <int width, bool gated>
__device__ __forceinline__ void compute(const Args& args, const Shared<gated>& shared, const Work& work,
                                        Cursor<Outputs<gated>::kStages>& cursor) {
  Finish<gated> finish(args, work);
  bool leader = threadIdx.x % 32 == 0, is_short = (args.k - 1) % kUnitK < kUnitK / 2;  // the last unit
  uint32_t mine = threadIdx.x / 32 * kUnitBytes, last = 0, a[2][2][4];
  float sums[width / 2] = {};
  pin(sums);
  auto step = [&](auto num) {
    barrier_wait(shared.full + cursor.stage * 8, cursor.parity);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // what threads copied, the tensor cores see too
    Codes codes = take(shared.weights(cursor.stage) + mine);
    multiply<decltype(num)::value, width>(codes, wgmma_descriptor(shared.x(cursor.stage)), sums, a, last);
    if (leader) last = shared.empty + cursor.stage * 8;
    cursor.advance();
  };
  for (int unit = 0; unit < args.units - is_short; ++unit) {
    if (unit == 1) finish.fetch(args);
    step(std::integral_constant<int, 4>());
  }
  if (is_short) step(std::integral_constant<int, 2>());
  if (args.units - is_short < 2) finish.fetch(args);
  wgmma_wait<0>();
  pin(sums);
  if (leader) barrier_arrive(last);
  finish.template write<width>(args, shared, work, sums);
  if constexpr (gated) {
    warpgroup_sync(threadIdx.x / 128);
    if (threadIdx.x % 128 == 0) work.tell(args);
  }
}

}  // namespace
}  // namespace minisgl
