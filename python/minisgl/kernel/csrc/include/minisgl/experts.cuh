// A product of a mixture of experts whose weights are floats of 4 bits (MXFP4 of the OCP's MX 1.0), of (token, choice)
// pairs that were sorted by expert: Y^T = W X^T on tensor cores. What all ways to compute it share.
//
// Packed weights (minisgl/kernel/experts.py): [expert][tile of 16 rows][unit of 128 k], of a unit
//   [octet of rows][lane][4 words]: word j has codes of row lane / 4 of the octet, of the j-th 32 k: pair p is those that
//                                   A fragments (mma.m16n8k16) want of the p / 2-th 16 k, their lower or upper 8, its first
//                                   code in the lower half; where its bits lie, `unpack` says
//   [row][4 bytes]: the powers of two of these 32 k each, as the exponent of a T that makes numbers of what `floats` finds
// Gated: octets of gate and of up alternate.
//
// Few pairs (`Share`; many: experts_wide.cuh): a block of threads has a block of pairs and some tiles, all k of them. A warp
// has tiles of its own: it waits for no other one's weights, the next of which its lanes hold in registers. The pairs' x
// goes through shared memory, in rows of 64 k, 128-byte swizzled, a few units at a time while the next ones are fetched.
#pragma once

#include "minisgl/arguments.cuh"
#include "minisgl/async_copy.cuh"

namespace minisgl {
namespace {

constexpr int kUnitK = 128;
constexpr int kCodeBytes = 1024;  // of a unit
constexpr int kUnitBytes = kCodeBytes + 64;
constexpr uint32_t kLeft = 0x60306030;  // bits of words of even j for last pairs (`unpack`)
constexpr int kMantissa = std::is_same_v<T, __half> ? 10 : 7;  // bits

struct Args {
  const T* x;
  const char* weight;
  const T* bias;         // [experts, rows], or null
  const float* weights;  // of pairs
  const int* order;
  int* blocks;  // [blocks, 4]: expert, first and end index into order, how much of the gated outputs is there
  T* out;
  int64_t x_stride;
  float unit;  // of all weights
  int k, units, tiles, top_k, num_blocks;
  int parts;  // of its x that a block waits for; 0: all wait for what was launched before
  bool clamped;
};

struct Codes {
  uint4 octets[2];
  uint32_t powers[2];
};

__device__ __forceinline__ uint4 load_once(const char* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// Two codes lie in bits 15 and 8 to 6 of `bits`' halves, where a bf16 has its sign and the lowest bits of its exponent.
__device__ __forceinline__ uint32_t floats(uint32_t bits, T2 power) {
  bits &= 0x81c081c0u;
#if MINISGL_FP16
  bits = (bits & 0x80008000u) | (bits << 3 & 0x0e000e00u);
#endif
  T2 product = __hmul2(*reinterpret_cast<T2*>(&bits), power);
  return *reinterpret_cast<uint32_t*>(&product);
}

// Twice the power of the j-th 32 k: products take a half in place of both, so that this costs next to nothing.
__device__ __forceinline__ T2 power_of(uint32_t powers, int j) {
  uint32_t bits = (powers >> (j % 2 * 8) & 0x00ff00ffu) << kMantissa;
  T2 two = *reinterpret_cast<T2*>(&bits);
#if MINISGL_FP16
  return j / 2 ? __high2half2(two) : __low2half2(two);
#else
  return j / 2 ? __high2bfloat162(two) : __low2bfloat162(two);
#endif
}

__device__ __forceinline__ uint32_t turn(uint32_t word, int right) { return __funnelshift_r(word, word, right); }

// The A fragments of the j-th 32 k of a unit. Pairs of codes lie where turning a word brings their bits to where `floats` wants
// them. No four such places fill a half, but eight fill two: words of an even and an odd j have three each, and what they
// leave, together, has the last pair of both.
__device__ __forceinline__ void unpack(const Codes& codes, int j, uint32_t (&a)[2][4]) {
#pragma unroll
  for (int octet = 0; octet < 2; ++octet) {
    const uint4& v = codes.octets[octet];
    uint32_t even = j < 2 ? v.x : v.z, odd = j < 2 ? v.y : v.w, left;  // (even & kLeft) | (odd & ~kLeft)
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(left) : "r"(kLeft), "r"(even), "r"(odd));
    T2 power = power_of(codes.powers[octet], j);
    a[0][octet] = floats(j % 2 ? turn(odd, 2) : even, power);
    a[0][2 + octet] = floats(j % 2 ? turn(odd, 6) : turn(even, 4), power);
    a[1][octet] = floats(j % 2 ? odd << 4 : even << 6, power);
    a[1][2 + octet] = floats(j % 2 ? left << 2 : turn(left, 8), power);
  }
}

__device__ __forceinline__ float swiglu(float gate, float up, bool clamped) {
  if (!clamped) return silu(gate) * up;
  gate = fminf(gate, 7.f);
  return gate / (1.f + __expf(-1.702f * gate)) * (fminf(fmaxf(up, -7.f), 7.f) + 1.f);
}

// What a warp has to do. tokens: of a block at most.
template <bool gated, int tokens>
struct Share {
  const Args& args;
  int lane, expert, first, count, tile;
  const char* from;  // the expert's

  // tile: the warp's first one. In place of those beyond the last this is computed again, and not written.
  __device__ __forceinline__ Share(const Args& arguments, int tile_)
      : args(arguments), lane(threadIdx.x % 32), tile(tile_) {
    const int* block = args.blocks + blockIdx.y * 4;
    expert = block[0], first = block[1], count = block[2] - first;
    from = args.weight + static_cast<int64_t>(expert) * args.tiles * args.units * kUnitBytes;
  }

  // i: of the warp's tiles.
  __device__ __forceinline__ const char* unit_at(int unit, int i) const {
    return from + (static_cast<int64_t>(min(tile + i, args.tiles - 1)) * args.units + unit) * kUnitBytes;
  }

  __device__ __forceinline__ void load(Codes& codes, int unit, int i) const {
    if (unit >= args.units) return;
    const char* at = unit_at(unit, i);
    codes.octets[0] = load_once(at + lane * 16), codes.octets[1] = load_once(at + kCodeBytes / 2 + lane * 16);
    const uint32_t* powers = reinterpret_cast<const uint32_t*>(at + kCodeBytes) + lane / 4;
    codes.powers[0] = __ldg(powers), codes.powers[1] = __ldg(powers + 8);
  }

  // Of x, of the block's pairs.
  __device__ __forceinline__ void find_rows(int* rows) const {
    if (threadIdx.x < count) rows[threadIdx.x] = gated ? args.order[first + threadIdx.x] / args.top_k : first + threadIdx.x;
  }

  // Where the c-th 8 k lie.
  __device__ __forceinline__ static uint32_t place(int token, int c) {
    return (c / 8 * tokens + token) * 128 + (c % 8 ^ token % 8) * 16;
  }

  // Fetch x of `num` times 64 k, the first of which is `first_half`, by all threads.
  template <int num>
  __device__ __forceinline__ void load_x(const int* rows, uint32_t buffer, int first_half) const {
    constexpr int kPieces = num * 8;
    for (int i = threadIdx.x; i < count * kPieces; i += blockDim.x) {
      int token = i / kPieces, piece = i % kPieces, k = first_half * 64 + piece * 8;
      const T* source = args.x + rows[token] * args.x_stride + (k < args.k ? k : 0);
      cp_async_or_zero(buffer + place(token, piece), source, k < args.k);
    }
  }

  // A lane's four sums belong to rows lane / 4 and + 8 of the tile (gated: of gate and up), and to a token and the next.
  __device__ __forceinline__ void write(int i, int n, const float (&sums)[4]) const {
    if (tile + i >= args.tiles) return;
    int outputs = args.tiles * (gated ? 8 : 16), at = (tile + i) * (gated ? 8 : 16) + lane / 4;
    int other = gated ? outputs + at : at + 8;
    const T* bias = args.bias == nullptr ? nullptr : args.bias + static_cast<int64_t>(expert) * args.tiles * 16;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int token = n * 8 + lane % 4 * 2 + j;
      if (token >= count) continue;
      float y[2] = {sums[j] * args.unit, sums[2 + j] * args.unit};
      if (bias != nullptr) y[0] += to_float(bias[at]), y[1] += to_float(bias[other]);
      if constexpr (gated) {
        args.out[static_cast<int64_t>(first + token) * outputs + at] = from_float<T>(swiglu(y[0], y[1], args.clamped));
      } else {
        int pair = args.order[first + token];
        T* to = args.out + static_cast<int64_t>(pair) * outputs;
        to[at] = from_float<T>(y[0] * args.weights[pair]), to[other] = from_float<T>(y[1] * args.weights[pair]);
      }
    }
  }
};

inline void check_weight(const TensorView& weight, const Optional<TensorView>& bias, int64_t k) {
  int64_t units = (k + kUnitK - 1) / kUnitK;
  MINISGL_CHECK(weight.ndim() == 3 && weight.is_contiguous() && weight.size(1) % 16 == 0 && k % 8 == 0 &&
                weight.size(2) * 16 == units * kUnitBytes)
      << "not such a packed weight";
  if (bias.has_value()) check_matrix(*bias, weight.size(0), weight.size(1));
}

// Arguments of `product`. What is launched directly before one that is not gated must not write `order` and `blocks`, and must
// have waited for who did before it triggered: they are read early. weight: [experts, rows, bytes]; bias: [experts, rows].
// kind: 0 not gated, 1 SwiGLU, 2 clamped, -1 not gated and x is what a gated product of the same module and `blocks` writes,
// which was launched directly before. out: gated [pairs, rows / 2] in the order of `order`, of tokens x; otherwise [pairs, rows] by pair, of rows x in that order, times
// `weights`.
inline Args arguments(const TensorView& x, const TensorView& weight, double unit, const Optional<TensorView>& bias,
                      const TensorView& weights, const TensorView& order, const TensorView& blocks,
                      const TensorView& out, int64_t top_k, int64_t kind) {
  int64_t rows = weight.size(1), k = x.size(1), units = (k + kUnitK - 1) / kUnitK;
  check_rows(x);
  check_matrix(out, order.size(0), kind > 0 ? rows / 2 : rows);
  check_weight(weight, bias, k);
  MINISGL_CHECK(is_int32(order) && is_int32(blocks) && is_fp32(weights) && blocks.is_contiguous() &&
                order.is_contiguous() && weights.is_contiguous());
  return {data_of(x),
          reinterpret_cast<const char*>(bytes_of(weight)),
          bias.has_value() ? data_of(*bias) : nullptr,
          static_cast<const float*>(weights.data_ptr()),
          static_cast<const int*>(order.data_ptr()),
          static_cast<int*>(blocks.data_ptr()),
          const_cast<T*>(data_of(out)),
          x.stride(0),
          static_cast<float>(unit),
          static_cast<int>(k),
          static_cast<int>(units),
          static_cast<int>(rows / 16),
          static_cast<int>(top_k),
          static_cast<int>(blocks.size(0)),
          0,
          kind == 2};
}

template <typename Kernel>
void run(Kernel kernel, const Args& args, const TensorView& x, int64_t num_blocks, int tiles, int threads, int bytes,
         bool (&prepared)[64]) {
  allow_shared(kernel, bytes, x.device().device_id, prepared);
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>((args.tiles + tiles - 1) / tiles), static_cast<unsigned>(num_blocks));
  config.block = dim3(threads);
  config.smem = bytes;
  launch(config, current_stream(x), kernel, args);
}

}  // namespace
}  // namespace minisgl
