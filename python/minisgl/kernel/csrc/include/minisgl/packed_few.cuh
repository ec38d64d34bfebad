// Linear layers of a few tokens with weights of 4 bits: Y^T = W X^T on tensor cores, bound by the reading of W, with the
// neighbours of the layer fused: RMS norm before it, SwiGLU or the residual's sum after it.
//
// As minisgl/skinny_gemm.cuh: a block has a contiguous range of octets of rows (gated: of pairs of a gate and an up
// octet), all k of them, and takes up to kOctets at a time; its warps take turns at units of 128 k, each with a ring of
// its own, which needs no barrier and runs on into the next group of octets. W does not depend on earlier kernels: the
// ring is filled with it before `pdl_wait`.
//
// The tensor cores sum codes as they are under an exponent, times x; a group's sum is then scaled in fp32, and what the
// exponent, the zero and the offset make of the sum of x, from a product with ones, is added. A norm of x is applied to
// the sum: y = rstd * (x∘g) W^T. Sums are added in a fixed order.
#pragma once

#include "minisgl/packed_linear.cuh"

namespace minisgl {
namespace {

#ifndef MINISGL_SHARED
#define MINISGL_SHARED 113  // KiB of a block: half of an SM's, less what the system takes
#endif

constexpr int kTokenTiles = (kTokens + 7) / 8;
constexpr int kSharedBytes = MINISGL_SHARED * 1024;
constexpr int kRingBytes = kSharedBytes - 27 * 1024;  // the rest: partial sums, squares, and the gains of a norm
constexpr int kPartialBytes = 16 * 1024;
constexpr int kSteps = kUnitK / 16;  // products of a unit
constexpr int kPieces = kParamBytes / 16;  // of 16 bytes

template <bool gated, int warps, int octets>
struct Config {
  static constexpr bool kGated = gated;
  static constexpr int kWarps = warps;
  static constexpr int kThreads = warps * 32;
  static constexpr int kOctets = octets;
  static constexpr int kTiles = octets / 2;
  static constexpr int kXAt = octets * (kOctetBytes + kParamBytes);  // in a slot
  static constexpr int kSlot = kXAt + kTokens * kPitch;
  static constexpr int kFit = kRingBytes / (warps * kSlot);
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kRing = warps * kStages * kSlot;
  static constexpr int kPositions = kTiles * kTokenTiles;  // (tile, token tile)s
  static constexpr int kPassFit = kPartialBytes / (warps * 512);
  static constexpr int kPass = kPassFit < kPositions ? kPassFit : kPositions;  // that are merged at a time
  static constexpr int kPartial = warps * kPass * 512;
  static constexpr int kFixedBytes = kRing + kPartial + warps * kTokenTiles * 8 * 4;
  static constexpr bool kExists = kStages >= 2;  // shared memory holds it
};

struct Group {
  int first;   // octet of the packed matrix
  int octets;  // in this group
};

template <typename C>
struct Worker {
  const Args& args;
  char* smem;
  uint32_t ring;   // of this warp
  uint32_t gains;  // of the norm
  int warp, lane, row, quad;
  int first_octet, octets, groups;  // of this block
  int blocks;      // of k, of this warp
  int steps;       // blocks * groups
  int load_index, load_block, loaded;  // where the loads of W stand
  int load_octets;
  int64_t pitch;                       // bytes, of 16 rows
  const char* load_codes[2];           // of this lane: the group's first octet and the next, in the next unit
  const char* load_params;             // its piece of the scales
  int x_block, x_loaded;               // and of x

  __device__ __forceinline__ Worker(const Args& arguments, char* shared) : args(arguments), smem(shared) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
    ring = base + warp * C::kStages * C::kSlot;
    gains = base + C::kFixedBytes;
    constexpr int kUnit = C::kGated ? 2 : 1;
    int all = args.outputs / 8;
    int first = static_cast<int>(static_cast<int64_t>(all) * blockIdx.x / gridDim.x);
    int end = static_cast<int>(static_cast<int64_t>(all) * (blockIdx.x + 1) / gridDim.x);
    first_octet = first * kUnit, octets = (end - first) * kUnit;
    groups = (octets + C::kOctets - 1) / C::kOctets;
    blocks = (args.units - warp + C::kWarps - 1) / C::kWarps;
    steps = blocks * groups;
    pitch = static_cast<int64_t>(args.units) * kUnitBytes;
    load_index = load_block = loaded = x_block = x_loaded = 0;
    enter_group();
  }

  __device__ __forceinline__ Group group_at(int index) const {
    constexpr int kUnit = C::kGated ? 2 : 1;
    int all = octets / kUnit, begin = all * index / groups * kUnit, end = all * (index + 1) / groups * kUnit;
    return {first_octet + begin, end - begin};
  }

  __device__ __forceinline__ void enter_group() {
    Group group = group_at(load_index);
    load_octets = group.octets;
    const char* units = args.weight + warp * kUnitBytes;
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      int octet = group.first + o;
      load_codes[o] = units + octet / 2 * pitch + octet % 2 * kOctetBytes + lane * 16;
    }
    int octet = group.first + lane / kPieces;
    load_params = units + octet / 2 * pitch + kCodeBytes + octet % 2 * kParamBytes + lane % kPieces * 16;
  }

  // The unit's rows into a slot. whole: there are kOctets of them.
  template <bool whole>
  __device__ __forceinline__ void load_unit(uint32_t slot) const {
    const char* from[2] = {load_codes[0], load_codes[1]};
#pragma unroll
    for (int o = 0; o < C::kOctets; ++o) {
      if (whole || o < load_octets) cp_async(slot + o * kOctetBytes + lane * 16, from[o % 2]);
      from[o % 2] += pitch;
    }
    const char* params = load_params;
#pragma unroll
    for (int i = 0; i < C::kOctets * kPieces; i += 32) {
      bool has = (whole || i / kPieces + lane / kPieces < load_octets) && i + lane < C::kOctets * kPieces;
      if (has) cp_async(slot + C::kOctets * kOctetBytes + (i + lane) * 16, params);
      params += 16 / kPieces * pitch;
    }
  }

  // Issue the next unit of W into a slot; nothing when all of it was.
  __device__ __forceinline__ void load_weights(uint32_t slot) {
    if (loaded == steps) return;
    if (load_octets == C::kOctets) {
      load_unit<true>(slot);
    } else {
      load_unit<false>(slot);
    }
    load_codes[0] += C::kWarps * kUnitBytes, load_codes[1] += C::kWarps * kUnitBytes;
    load_params += C::kWarps * kUnitBytes;
    ++loaded;
    if (++load_block == blocks && loaded < steps) {
      load_block = 0;
      ++load_index;
      enter_group();
    }
  }

  __device__ __forceinline__ void load_x(uint32_t slot) {
    if (x_loaded == steps) return;
    int piece = lane % 16, at = (warp + x_block * C::kWarps) * kUnitK + piece * 8;
    const T* from = args.x + (at < args.k ? at : 0);
#pragma unroll
    for (int t = 0; t < kTokens; t += 2) {
      int token = t + lane / 16;
      if (token < args.tokens) {
        cp_async_or_zero(x_piece(slot + C::kXAt, token, piece), from + token * args.x_stride, at < args.k);
      }
    }
    ++x_loaded;
    if (++x_block == blocks) x_block = 0;
  }

  // Each warp fetches the part of the gains that it uses.
  __device__ __forceinline__ void load_gains() const {
    for (int i = lane; i < blocks * 16; i += 32) {
      int at = (warp + i / 16 * C::kWarps) * kUnitK + i % 16 * 8;
      cp_async_or_zero(gains + at * sizeof(T), args.norm + (at < args.k ? at : 0), at < args.k);
    }
  }

  // The B fragments of a unit, times the norm's gains. Tokens beyond the last repeat it: their sums are never written.
  __device__ __forceinline__ void read_x(uint32_t slot, int block, bool sum, uint32_t (&b)[kTokenTiles][kSteps][2],
                                         float (&square)[kTokenTiles]) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      int token = min(n * 8 + lane % 8, args.tokens - 1);
#pragma unroll
      for (int f = 0; f < kSteps; f += 2) {
        uint4 v = load_matrices(x_piece(slot + C::kXAt, token, f * 2 + lane / 8));
        b[n][f][0] = v.x, b[n][f][1] = v.y, b[n][f + 1][0] = v.z, b[n][f + 1][1] = v.w;
      }
    }
    if (args.norm == nullptr) return;
    if (sum) {
#pragma unroll
      for (int i = 0; i < kTokenTiles * kSteps; ++i) {
        const uint32_t(&v)[2] = b[i / kSteps][i % kSteps];
        square[i / kSteps] += squares(v[0]) + squares(v[1]);
      }
    }
    uint32_t at = gains + ((warp + block * C::kWarps) * kUnitK + lane / 8 * 8) * sizeof(T);
#pragma unroll
    for (int f = 0; f < kSteps; f += 2) {
      uint4 g = load_matrices(at + f * 32);  // of each k all tokens'
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        uint32_t(&low)[2] = b[n][f], (&high)[2] = b[n][f + 1];
        low[0] = scale(low[0], g.x), low[1] = scale(low[1], g.y);
        high[0] = scale(high[0], g.z), high[1] = scale(high[1], g.w);
      }
    }
  }

  // Of x, by groups of k: of this lane's two tokens.
  __device__ __forceinline__ static void sum_x(const uint32_t (&b)[kTokenTiles][kSteps][2],
                                               float (&sums)[kTokenTiles][kGroups][2]) {
#pragma unroll
    for (int i = 0; i < kTokenTiles * kGroups; ++i) {
      int n = i / kGroups, g = i % kGroups;
      float c[2][4] = {};  // that do not wait for one another
#pragma unroll
      for (int f = g * kFragments; f < (g + 1) * kFragments; ++f) {
        mma(c[f % 2], kOnes, kOnes, kOnes, kOnes, b[n][f][0], b[n][f][1]);
      }
      sums[n][g][0] = c[0][0] + c[1][0], sums[n][g][1] = c[0][1] + c[1][1];
    }
  }

  // Slots beyond the group's octets hold stale rows: their sums are never written. Tiles take turns, so that products do
  // not wait for one another.
  __device__ __forceinline__ void multiply(uint32_t slot, const uint32_t (&b)[kTokenTiles][kSteps][2],
                                           float (&acc)[C::kTiles][kTokenTiles][4]) const {
    float sums[kTokenTiles][kGroups][2];
    sum_x(b, sums);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t codes[C::kOctets][kFragments / 2];
      float part[C::kTiles][kTokenTiles][4] = {};
#pragma unroll
      for (int o = 0; o < C::kOctets; ++o) {
        read_codes(slot + o * kOctetBytes + lane * 16 + g * (kFragments / 2) * 4, codes[o]);
      }
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int tile = 0; tile < C::kTiles; ++tile) {
          uint32_t a[4];
          unpack(Raised(), Raised(), codes[2 * tile][f / 2], codes[2 * tile + 1][f / 2], f % 2, a);
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) {
            const uint32_t(&x)[2] = b[n][g * kFragments + f];
            mma(part[tile][n], a[0], a[1], a[2], a[3], x[0], x[1]);
          }
        }
      }
#pragma unroll
      for (int o = 0; o < C::kOctets; ++o) {
        Params params{load_shared_4(slot + C::kOctets * kOctetBytes + o * kParamBytes + g * 32 + row * 4)};
        float scale = params.scale(), shift = params.shift();
#pragma unroll
        for (int i = 0; i < kTokenTiles * 2; ++i) {
          int n = i / 2, j = o % 2 * 2 + i % 2;
          acc[o / 2][n][j] = fmaf(scale, part[o / 2][n][j], fmaf(shift, sums[n][g][i % 2], acc[o / 2][n][j]));
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

  // A lane's four sums belong to rows `row` and `row + 8` of a tile (gated: gate and up) and to a token and the next.
  __device__ __forceinline__ void write(const Group& group, int tile, int n, const float (&sum)[4],
                                        const float* square) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int token = n * 8 + quad * 2 + i;
      if (token >= args.tokens) continue;
      float factor = args.unit * (args.norm != nullptr ? rstd(square, token) : 1.f);
      float y[2] = {sum[i] * factor, sum[2 + i] * factor};
      int64_t to = static_cast<int64_t>(token) * args.outputs;
      if constexpr (C::kGated) {
        int at = (group.first / 2 + tile) * 8 + row;
        if (args.bias != nullptr) y[0] += to_float(args.bias[at]), y[1] += to_float(args.bias[args.outputs + at]);
        args.out[to + at] = from_float<T>(silu(y[0]) * y[1]);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (2 * tile + half >= group.octets) continue;
          int at = (group.first + 2 * tile + half) * 8 + row;
          if (args.bias != nullptr) y[half] += to_float(args.bias[at]);
          if (args.residual != nullptr) y[half] += to_float(args.residual[to + at]);
          args.out[to + at] = from_float<T>(y[half]);
        }
      }
    }
  }

  // Merge the warps' sums and write the outputs of `group`.
  __device__ __forceinline__ void finish(const Group& group, bool first, const float (&acc)[C::kTiles][kTokenTiles][4],
                                         const float (&square)[kTokenTiles]) const {
    float4* partial = reinterpret_cast<float4*>(smem + C::kRing);
    float* all_squares = reinterpret_cast<float*>(smem + C::kRing + C::kPartial);
#pragma unroll
    for (int begin = 0; begin < C::kPositions; begin += C::kPass) {
      __syncthreads();  // the sums of the pass before are read
#pragma unroll
      for (int i = begin; i < begin + C::kPass && i < C::kPositions; ++i) {
        const float(&c)[4] = acc[i / kTokenTiles][i % kTokenTiles];
        partial[((i - begin) * C::kWarps + warp) * 32 + lane] = make_float4(c[0], c[1], c[2], c[3]);
      }
      if (begin == 0 && first && args.norm != nullptr) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          float sum = warp_sum<4>(square[n]);  // over the quads
          if (quad == 0) all_squares[warp * kTokenTiles * 8 + n * 8 + row] = sum;
        }
      }
      __syncthreads();
      for (int i = begin + warp; i < begin + C::kPass && i < C::kPositions; i += C::kWarps) {
        if (2 * (i / kTokenTiles) >= group.octets) break;
        float sum[4] = {};
#pragma unroll
        for (int w = 0; w < C::kWarps; ++w) {
          float4 v = partial[((i - begin) * C::kWarps + w) * 32 + lane];
          sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
        }
        write(group, i / kTokenTiles, i % kTokenTiles, sum, all_squares);
      }
    }
  }

  // Before `pdl_wait`: weights only. They count as part of the first group of copies, which is complete last of all.
  __device__ __forceinline__ void prefetch() {
    if (args.norm != nullptr) load_gains();
#pragma unroll
    for (int s = 0; s < C::kStages; ++s) load_weights(ring + s * C::kSlot);
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int s = 0; s < C::kStages; ++s) {
      load_x(ring + s * C::kSlot);
      cp_async_commit();
    }
    int stage = 0;
    float square[kTokenTiles] = {};
    for (int index = 0; index < groups; ++index) {
      Group group = group_at(index);
      float acc[C::kTiles][kTokenTiles][4] = {};
      for (int block = 0; block < blocks; ++block) {
        cp_async_wait<C::kStages - 1>();
        __syncwarp();  // what other lanes fetched
        uint32_t slot = ring + stage * C::kSlot;
        uint32_t b[kTokenTiles][kSteps][2];
        read_x(slot, block, index == 0, b, square);
        multiply(slot, b, acc);
        __syncwarp();  // all have read the slot
        load_weights(slot);
        load_x(slot);
        cp_async_commit();
        stage = stage + 1 == C::kStages ? 0 : stage + 1;
      }
      finish(group, index == 0, acc, square);
    }
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2) packed_few(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) char smem[];
  pdl_trigger();
  Worker<C> worker(args, smem);
  worker.prefetch();
  pdl_wait();
  worker.run();
}

}  // namespace
}  // namespace minisgl
