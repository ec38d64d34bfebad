// Linear layers with weights of 4 bits, from sm_80 on: Y^T = W X^T on tensor cores (mma.sync), W unpacked in registers as
// minisgl/packed_weight.cuh explains.
//
// Weights are the MMA's A (16 rows of W), tokens its B (8 columns). The tensor cores sum integers, code - zero, times x;
// each group's sum is then scaled, in fp32, and offsets times the sum of x, from a product with ones, are added.
//
// Work is counted in steps: (token tile, tile of rows, kWarpsK * 128 k). Every block has the same number of consecutive
// steps (stream-K, Osama et al. 2023, section 4): one that begins inside of a tile leaves its sums in `partials`, the
// block that began the tile adds them to its own. All blocks are resident, and sums are added in an order that the
// shape alone determines.
//
// W does not depend on earlier kernels: the ring is filled with it before `pdl_wait`. A norm of x is applied to the sum:
// y = rstd * (x∘g) W^T. In gated matrices a thread holds both sums of an output.
#pragma once

#include "minisgl/packed_weight.cuh"

namespace minisgl {
namespace {

constexpr int kTokens = MINISGL_TOKENS;
constexpr int kMaxShared = 99 * 1024;      // bytes of a block on sm_86
constexpr int kOctets = kTokens / 8;       // of tokens
constexpr int kPitch = kUnitK * 2;         // bytes of a token's part of a unit

struct Args {
  const char* weight;
  const T* x;
  const T* norm;      // gains, or null: no norm
  const T* bias;      // null: none
  const T* residual;  // null, or equal to out
  T* out;             // [tokens, outputs]
  float4* partials;
  unsigned* flags;    // [blocks], zero between launches
  int64_t x_stride;
  float unit;         // factor of all scales and offsets
  float eps;
  int tokens, outputs, k;
  int units;          // of k
  int row_tiles;      // of 16 rows
  int tiles;          // of a block's rows
  int steps;          // of a tile
  bool gated;
};

template <int warps_m, int warps_k, int row_tiles>
struct Config {
  static constexpr int kWarpsM = warps_m;
  static constexpr int kWarpsK = warps_k;
  static constexpr int kT = row_tiles;  // of 16 rows, of a warp
  static constexpr int kThreads = warps_m * warps_k * 32;
  static constexpr int kRowTiles = warps_m * row_tiles;  // of a block
  static constexpr int kWeightBytes = warps_k * kRowTiles * kUnitBytes;
  static constexpr int kUnitX = (kTokens + 1) * kPitch;  // with the norm's gains as the last row
  static constexpr int kStageBytes = kWeightBytes + warps_k * kUnitX;
  static constexpr int kMergeBytes = warps_k == 1 ? 0 : warps_k * kRowTiles * kOctets * 512;
  static constexpr int kFixedBytes = kMergeBytes + kTokens * 4;
  static constexpr int kFit = (kMaxShared - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kSharedBytes = kStages * kStageBytes + kFixedBytes;
  static constexpr int kPartial = kRowTiles * kOctets * 32;  // float4
  static constexpr int kBlocks = kThreads * row_tiles * kOctets <= 512 ? 2 : 1;  // of an SM, for their registers
  static constexpr bool kFits = kStages >= 2;
};

// The first step of a block.
template <typename C>
__device__ __forceinline__ int first_step(const Args& args, int block) {
  int64_t all = static_cast<int64_t>(args.tiles) * args.steps * ((args.tokens + kTokens - 1) / kTokens);
  return static_cast<int>(all * block / gridDim.x);
}

// A step's place.
struct Cursor {
  int step, tile, token_tile;  // step: of the tile

  __device__ __forceinline__ Cursor(const Args& args, int index) {
    step = index % args.steps;
    tile = index / args.steps % args.tiles;
    token_tile = index / args.steps / args.tiles;
  }

  __device__ __forceinline__ void advance(const Args& args) {
    if (++step < args.steps) return;
    step = 0;
    if (++tile == args.tiles) tile = 0, ++token_tile;
  }
};

template <typename C>
struct Worker {
  const Args& args;
  char* smem;
  uint32_t ring;
  int lane, warp_m, warp_k;
  int begin, end;  // steps
  Cursor next;     // step to load
  int left, load_slot;

  __device__ __forceinline__ Worker(const Args& arguments, char* shared)
      : args(arguments),
        smem(shared),
        begin(first_step<C>(arguments, blockIdx.x)),
        end(first_step<C>(arguments, blockIdx.x + 1)),
        next(arguments, begin) {
    lane = threadIdx.x % 32;
    warp_m = threadIdx.x / 32 % C::kWarpsM;
    warp_k = threadIdx.x / 32 / C::kWarpsM;
    ring = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
    left = end - begin;
    load_slot = C::kStages - 1;
  }

  __device__ __forceinline__ uint32_t weights_at(int slot, int t) const {
    return ring + slot * C::kStageBytes + (warp_k * C::kRowTiles + warp_m * C::kT + t) * kUnitBytes;
  }
  __device__ __forceinline__ uint32_t x_at(int slot, int unit) const {
    return ring + slot * C::kStageBytes + C::kWeightBytes + unit * C::kUnitX;
  }

  // This warp's part of a step. Tiles beyond the matrix repeat its last rows: their sums are never written.
  __device__ __forceinline__ void load_weights(const Cursor& at, int slot) const {
    int unit = at.step * C::kWarpsK + warp_k;
    if (unit >= args.units) return;
#pragma unroll
    for (int t = 0; t < C::kT; ++t) {
      int row_tile = min(at.tile * C::kRowTiles + warp_m * C::kT + t, args.row_tiles - 1);
      const char* from = args.weight + (static_cast<int64_t>(row_tile) * args.units + unit) * kUnitBytes + lane * 16;
      uint32_t to = weights_at(slot, t) + lane * 16;
      cp_async(to, from);
      cp_async(to + 512, from + 512);
      if (lane < kGroups * 4) cp_async(to + 1024, from + 1024);
    }
  }

  // All threads; 16-byte pieces of a token's row are permuted, so that eight tokens' lie in different banks.
  __device__ __forceinline__ void load_x(const Cursor& cursor, int slot) const {
    int first = cursor.token_tile * kTokens, unit = cursor.step * C::kWarpsK;
    int rows = min(args.tokens - first, kTokens);
    for (int i = threadIdx.x; i < (kTokens + 1) * C::kWarpsK * 16; i += C::kThreads) {
      int row = i / (C::kWarpsK * 16), piece = i % (C::kWarpsK * 16);
      int at = unit * kUnitK + piece * 8;
      const T* from = row < rows ? args.x + (first + row) * args.x_stride : row == kTokens ? args.norm : nullptr;
      if (from == nullptr) continue;
      uint32_t to = x_at(slot, piece / 16) + row * kPitch + ((piece % 16) ^ (row % 8)) * 16;
      cp_async_or_zero(to, from + (at < args.k ? at : 0), at < args.k);
    }
  }

  __device__ __forceinline__ void load_next() {
    if (left > 0) {
      load_weights(next, load_slot);
      load_x(next, load_slot);
      next.advance(args);
      --left;
    }
    cp_async_commit();
    load_slot = load_slot + 1 == C::kStages ? 0 : load_slot + 1;
  }

  // Before `pdl_wait` weights only. They count as part of the first group of copies, complete before the others.
  __device__ __forceinline__ void fill() {
    Cursor cursor = next;
    for (int s = 0; s + 1 < C::kStages && s < left; ++s, cursor.advance(args)) load_weights(cursor, s);
    pdl_wait();
    for (int s = 0; s + 1 < C::kStages; ++s) {
      if (left > 0) {
        load_x(next, s);
        next.advance(args);
        --left;
      }
      cp_async_commit();
    }
  }

  // B fragments of 8 tokens for the group's k, times the norm's gains.
  __device__ __forceinline__ void read_x(uint32_t x, int octet, int group, uint32_t (&b)[kFragments][2]) const {
    int row = lane % 8;
#pragma unroll
    for (int f = 0; f < kFragments; f += 2) {
      int piece = ((group * kFragments + f) * 2 + lane / 8) ^ row;
      uint4 v = load_matrices(x + (octet * 8 + row) * kPitch + piece * 16);
      if (args.norm != nullptr) {
        int plain = (group * kFragments + f) * 2 + lane / 8;  // the last row's pieces are in order
        uint4 g = load_matrices(x + kTokens * kPitch + plain * 16);
        v = make_uint4(scale(v.x, g.x), scale(v.y, g.y), scale(v.z, g.z), scale(v.w, g.w));
      }
      b[f][0] = v.x, b[f][1] = v.y, b[f + 1][0] = v.z, b[f + 1][1] = v.w;
    }
  }

  // acc += the product of a group.
  __device__ __forceinline__ void multiply_group(int slot, int group, float (&acc)[C::kT][kOctets][4]) const {
    uint32_t a[C::kT][kFragments][4];
    float scales[C::kT][2], offsets[C::kT][2];
#pragma unroll
    for (int t = 0; t < C::kT; ++t) {
      uint32_t unit = weights_at(slot, t);
      GroupOf params(load_shared_8(unit + kCodeBytes + group * 64 + lane / 4 * 8));
      uint32_t codes[kFragments];
      read_codes(unit, group, lane, codes);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) unpack(codes[f], params.zeros, a[t][f]);
#pragma unroll
      for (int i = 0; i < 2; ++i) scales[t][i] = params.scales[i], offsets[t][i] = params.offsets[i];
    }
    uint32_t x = x_at(slot, warp_k);
#pragma unroll
    for (int n = 0; n < kOctets; ++n) {
      uint32_t b[kFragments][2];
      read_x(x, n, group, b);
      float sums[4] = {};
      if constexpr (kMinima) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f) mma(sums, kOnes, kOnes, kOnes, kOnes, b[f][0], b[f][1]);
      }
#pragma unroll
      for (int t = 0; t < C::kT; ++t) {
        float c[4] = {};
#pragma unroll
        for (int f = 0; f < kFragments; ++f) mma(c, a[t][f][0], a[t][f][1], a[t][f][2], a[t][f][3], b[f][0], b[f][1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[t][n][i] = fmaf(scales[t][i / 2], c[i], acc[t][n][i]);
          if constexpr (kMinima) acc[t][n][i] = fmaf(offsets[t][i / 2], sums[i], acc[t][n][i]);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(int step, int slot, float (&acc)[C::kT][kOctets][4]) const {
    if (step * C::kWarpsK + warp_k >= args.units) return;
#pragma unroll(kOctets >= 4 ? 1 : kGroups)  // else registers spill
    for (int group = 0; group < kGroups; ++group) multiply_group(slot, group, acc);
  }

  // Add up the sums of the warps that shared the k of a step; the first of them get the result.
  __device__ __forceinline__ void merge(float (&acc)[C::kT][kOctets][4]) const {
    if constexpr (C::kWarpsK > 1) {
      float4* all = reinterpret_cast<float4*>(smem + C::kStages * C::kStageBytes);
      constexpr int kEach = C::kT * kOctets * 32;
      float4* mine = all + threadIdx.x / 32 * kEach + lane;
#pragma unroll
      for (int i = 0; i < C::kT * kOctets; ++i) {
        const float(&c)[4] = acc[i / kOctets][i % kOctets];
        mine[i * 32] = make_float4(c[0], c[1], c[2], c[3]);
      }
      __syncthreads();
      if (warp_k == 0) {
        for (int k = 1; k < C::kWarpsK; ++k) add(mine + k * C::kWarpsM * kEach, acc);
      }
      // The next merge comes after a barrier of the main loop.
    }
  }

  // sums: [kT * kOctets][32], at this lane's.
  template <bool global = false>
  __device__ __forceinline__ void add(const float4* sums, float (&acc)[C::kT][kOctets][4]) const {
#pragma unroll
    for (int i = 0; i < C::kT * kOctets; ++i) {
      float4 v = global ? __ldcg(sums + i * 32) : sums[i * 32];  // not from L1, which may hold an earlier launch's
      float(&c)[4] = acc[i / kOctets][i % kOctets];
      c[0] += v.x, c[1] += v.y, c[2] += v.z, c[3] += v.w;
    }
  }

  __device__ __forceinline__ float4* partials_of(int block) const {
    return args.partials + static_cast<int64_t>(block) * C::kPartial + warp_m * (C::kT * kOctets * 32) + lane;
  }

  // Leave the sums for the block that began the tile.
  __device__ __forceinline__ void deliver(const float (&acc)[C::kT][kOctets][4]) const {
    if (warp_k == 0) {
      float4* to = partials_of(blockIdx.x);
#pragma unroll
      for (int i = 0; i < C::kT * kOctets; ++i) {
        const float(&c)[4] = acc[i / kOctets][i % kOctets];
        to[i * 32] = make_float4(c[0], c[1], c[2], c[3]);
      }
      __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(args.flags + blockIdx.x), "r"(1) : "memory");
    }
  }

  // Add what the blocks that have the rest of a tile left, in their order. last: the step after the tile.
  __device__ __forceinline__ void collect(int last, float (&acc)[C::kT][kOctets][4]) const {
    for (int block = blockIdx.x + 1; block < gridDim.x && first_step<C>(args, block) < last; ++block) {
      if (threadIdx.x == 0) {
        unsigned ready = 0;
        while (ready == 0) {
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(ready) : "l"(args.flags + block) : "memory");
        }
        args.flags[block] = 0;  // for the next launch; nobody else reads it in this one
      }
      __syncthreads();
      if (warp_k == 0) add<true>(partials_of(block), acc);
    }
  }

  __device__ __forceinline__ float* rstd() const {
    return reinterpret_cast<float*>(smem + C::kStages * C::kStageBytes + C::kMergeBytes);
  }

  // Of all tokens, of which there is one tile. A barrier of the main loop comes before it is used.
  __device__ __forceinline__ void find_rstd() const {
    for (int token = threadIdx.x / 32; token < args.tokens; token += C::kThreads / 32) {
      const T* row = args.x + token * args.x_stride;
      float sum = 0.f;
      for (int at = lane * 8; at < args.k; at += 256) {
        uint4 v = *reinterpret_cast<const uint4*>(row + at);
        sum += (squares(v.x) + squares(v.y)) + (squares(v.z) + squares(v.w));
      }
      sum = warp_sum(sum);
      if (lane == 0) rstd()[token] = inverse_root(sum, args.k, args.eps);
    }
  }

  // The outputs of one token: c: sums of rows r and r + 8 of a tile.
  __device__ __forceinline__ void write(int row_tile, int token, float first, float second) const {
    if (token >= args.tokens) return;
    float factor = args.unit * (args.norm != nullptr ? rstd()[token] : 1.f);
    int at = row_tile * (args.gated ? 8 : 16) + lane / 4;
    T* out = args.out + static_cast<int64_t>(token) * args.outputs;
    first *= factor, second *= factor;
    if (args.gated) {
      if (at >= args.outputs) return;
      if (args.bias != nullptr) first += to_float(args.bias[at]), second += to_float(args.bias[args.outputs + at]);
      out[at] = from_float<T>(silu(first) * second);
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half, at += 8) {
      if (at >= args.outputs) return;
      float y = half == 0 ? first : second;
      if (args.bias != nullptr) y += to_float(args.bias[at]);
      if (args.residual != nullptr) y += to_float(args.residual[static_cast<int64_t>(token) * args.outputs + at]);
      out[at] = from_float<T>(y);
    }
  }

  __device__ __forceinline__ void emit(const Cursor& place, const float (&acc)[C::kT][kOctets][4]) const {
#pragma unroll
    for (int t = 0; t < C::kT; ++t) {
      int row_tile = place.tile * C::kRowTiles + warp_m * C::kT + t;
#pragma unroll
      for (int n = 0; n < kOctets; ++n) {
        int token = place.token_tile * kTokens + n * 8 + lane % 4 * 2;
        write(row_tile, token, acc[t][n][0], acc[t][n][2]);
        write(row_tile, token + 1, acc[t][n][1], acc[t][n][3]);
      }
    }
  }

  __device__ __forceinline__ void run() {
    Cursor place = next;
    fill();
    if (args.norm != nullptr) find_rstd();
    int slot = 0;
    for (int step = begin; step < end;) {
      int from = place.step, num = min(args.steps - from, end - step);
      float acc[C::kT][kOctets][4] = {};
      for (int i = 0; i < num; ++i) {
        cp_async_wait<C::kStages - 2>();
        __syncthreads();  // everybody's copies are there, and the slot of the step before is free
        load_next();
        multiply(from + i, slot, acc);
        slot = slot + 1 == C::kStages ? 0 : slot + 1;
      }
      merge(acc);
      if (from > 0) {
        deliver(acc);
      } else {
        if (num < args.steps) collect(step + args.steps, acc);
        if (warp_k == 0) emit(place, acc);
      }
      step += num;
      if (step < end) place = Cursor(args, step);
    }
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) packed_gemm(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) char smem[];
  pdl_trigger();
  Worker<C>(args, smem).run();
}

}  // namespace
}  // namespace minisgl
