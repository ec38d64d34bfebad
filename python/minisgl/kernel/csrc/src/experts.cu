// Experts in MXFP4 (minisgl/experts.cuh) for few pairs of each, on mma.sync. Compiled once per dtype (MINISGL_FP16).
#include "minisgl/experts_direct.cuh"

namespace minisgl {
namespace {

// token_tiles: of 8 pairs; tiles: of a warp; depth: units ahead.
template <bool gated_, int token_tiles, int tiles, int depth, int warps>
struct Config {
  static constexpr bool kGated = gated_;
  static constexpr int kTokens = token_tiles * 8, kTiles = tiles, kDepth = depth, kThreads = warps * 32;
  static constexpr int kUnit = kTokens * 256;  // of x
  static constexpr int kBuffer = depth * kUnit;
};

template <typename C>
__device__ __forceinline__ void multiply(const Codes (&codes)[C::kTiles], uint32_t x, int count,
                                         float (&sums)[C::kTiles][C::kTokens / 8][4]) {
  using S = Share<C::kGated, C::kTokens>;
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t a[C::kTiles][2][4];
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) unpack(codes[i], j, a[i]);
#pragma unroll
    for (int begin = 0; begin < C::kTokens / 8; begin += 2) {
      if (begin * 8 >= count) break;
#pragma unroll
      for (int n = begin; n < begin + 2 && n < C::kTokens / 8; ++n) {
        uint4 b = load_matrices(x + S::place(n * 8 + lane % 8, j * 4 + lane / 8));
#pragma unroll
        for (int i = 0; i < C::kTiles; ++i) {
          mma(sums[i][n], a[i][0][0], a[i][0][1], a[i][0][2], a[i][0][3], b.x, b.y);
          mma(sums[i][n], a[i][1][0], a[i][1][1], a[i][1][2], a[i][1][3], b.z, b.w);
        }
      }
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads) few_kernel(const __grid_constant__ Args args) {
  using S = Share<C::kGated, C::kTokens>;
  extern __shared__ __align__(1024) char smem[];
  __shared__ int rows[C::kTokens];
  // What sorted the pairs is behind the gated product, which lets the next kernel begin when it knows them.
  if (C::kGated) pdl_wait();
  pdl_trigger();
  S share(args, (blockIdx.x * (C::kThreads / 32) + threadIdx.x / 32) * C::kTiles);
  if (share.count <= 0) return pdl_wait();
  Codes codes[C::kDepth][C::kTiles];
  auto load = [&](int s, int unit) {
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) share.load(codes[s][i], unit, i);
  };
#pragma unroll
  for (int s = 0; s < C::kDepth; ++s) load(s, s);
  if (!C::kGated) pdl_wait();
  share.find_rows(rows);
  __syncthreads();
  uint32_t x = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  share.template load_x<2 * C::kDepth>(rows, x, 0);
  cp_async_commit();
  float sums[C::kTiles][C::kTokens / 8][4] = {};
  for (int unit = 0, turn = 0; unit < args.units; unit += C::kDepth, turn ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // all of x is there, and what the other buffer had was read
    if (unit + C::kDepth < args.units) {
      share.template load_x<2 * C::kDepth>(rows, x + (turn ^ 1) * C::kBuffer, 2 * (unit + C::kDepth));
    }
    cp_async_commit();
#pragma unroll
    for (int s = 0; s < C::kDepth; ++s) {
      if (unit + s >= args.units) break;
      multiply<C>(codes[s], x + turn * C::kBuffer + s * C::kUnit, share.count, sums);
      load(s, unit + s + C::kDepth);
    }
  }
#pragma unroll
  for (int i = 0; i < C::kTiles * C::kTokens / 8; ++i) {
    share.write(i / (C::kTokens / 8), i % (C::kTokens / 8), sums[i / (C::kTokens / 8)][i % (C::kTokens / 8)]);
  }
}

template <bool gated, int token_tiles, int tiles, int depth, int warps>
void run_few(const Args& args, const TensorView& x, int64_t num_blocks) {
  using C = Config<gated, token_tiles, tiles, depth, warps>;
  static bool prepared[64] = {};
  run(few_kernel<C>, args, x, num_blocks, warps * tiles, C::kThreads, 2 * C::kBuffer, prepared);
}

template <bool gated>
void dispatch(const Args& args, const TensorView& x, int64_t num_blocks, int64_t block_m) {
  switch (block_m) {
    case 4:
      return run_few<gated, 1, 1, 12, 4>(args, x, num_blocks);
    case 8:
      return run_few<gated, 1, 2, 3, 4>(args, x, num_blocks);
    case 16:
      return run_few<gated, 2, 2, 3, 4>(args, x, num_blocks);
    case 32:
      return run_few<gated, 4, 2, 2, 4>(args, x, num_blocks);
    case 64:
      return run_few<gated, 8, 2, 2, 8>(args, x, num_blocks);
  }
  TVM_FFI_THROW(ValueError) << "no blocks of " << block_m << " pairs";
}

void product(TensorView x, TensorView weight, double unit, Optional<TensorView> bias, TensorView weights,
             TensorView order, TensorView blocks, TensorView out, int64_t top_k, int64_t kind, int64_t block_m) {
  Args args = arguments(x, weight, unit, bias, weights, order, blocks, out, top_k, kind);
  if (kind > 0) return dispatch<true>(args, x, blocks.size(0), block_m);
  dispatch<false>(args, x, blocks.size(0), block_m);
}

Stack stack_of(const TensorView& weight, double unit, const Optional<TensorView>& bias, int64_t k) {
  check_weight(weight, bias, k);
  return {reinterpret_cast<const char*>(bytes_of(weight)), bias.has_value() ? data_of(*bias) : nullptr,
          static_cast<float>(unit), static_cast<int>(k), static_cast<int>((k + kUnitK - 1) / kUnitK),
          static_cast<int>(weight.size(1) / 16)};
}

template <typename Kernel>
void run_direct(Kernel kernel, const DirectArgs& args, const TensorView& x, int64_t blocks, int64_t groups, int64_t bytes,
                bool (&prepared)[64]) {
  MINISGL_CHECK(bytes <= kMostShared) << "too many k";
  allow_shared(kernel, kMostShared, x.device().device_id, prepared);
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups));
  config.block = dim3(kDirectThreads);
  config.smem = bytes;
  launch(config, current_stream(x), kernel, args);
}

// A whole mixture of up to 256 experts for few tokens: out [tokens, rows of down] = the sum of each token's `top_k` experts, and
// what was there if `adds`. x: [tokens, k]; logits: [tokens, experts]; gated: [tokens * top_k, k of down], for the time
// between the products.
void mixture(TensorView x, TensorView logits, TensorView gate_up, double gate_up_unit, Optional<TensorView> gate_up_bias,
             TensorView down, double down_unit, Optional<TensorView> down_bias, TensorView gated, TensorView out,
             int64_t top_k, bool renormalize, bool clamped, bool adds) {
  int64_t tokens = x.size(0), experts = gate_up.size(0), pairs = tokens * top_k, inner = gated.size(1);
  check_rows(x);
  check_matrix(logits, tokens, experts);
  if (!is_fp32(logits)) data_of(logits);
  MINISGL_CHECK(0 < top_k && top_k <= 32 && top_k <= experts && experts <= kMostExperts && pairs < 65536);
  MINISGL_CHECK(gate_up.size(1) == 2 * inner && down.size(0) == experts);
  DirectArgs args{stack_of(gate_up, gate_up_unit, gate_up_bias, x.size(1)),
                  logits.data_ptr(),
                  data_of(x),
                  const_cast<T*>(matrix_of(gated, pairs, inner)),
                  x.stride(0),
                  static_cast<int>(experts),
                  static_cast<int>(top_k),
                  is_fp32(logits),
                  renormalize,
                  clamped,
                  adds};
  static bool first[64] = {}, second[64] = {};
  int64_t blocks = (args.stack.tiles + kDirectWarps - 1) / kDirectWarps, unit = kUnitK * sizeof(T);
  run_direct(direct_gated_kernel, args, x, blocks, pairs, args.stack.units * unit, first);
  args.stack = stack_of(down, down_unit, down_bias, inner);
  args.x = args.out, args.x_stride = inner;
  args.out = const_cast<T*>(matrix_of(out, tokens, down.size(1)));
  run_direct(direct_sum_kernel, args, x, args.stack.tiles * 2, tokens, kSlotBytes + top_k * args.stack.units * unit, second);
}

struct PackArgs {
  const uint8_t* blocks;  // [rows, groups of 32 k, 17]: a power of two, and codes i and i + 16 in a byte
  uint8_t* out;
  int rows, groups, units, base;
  bool gated;
};

// A thread has one lane's words of an octet of a unit, and one of its powers.
__global__ void pack_kernel(const __grid_constant__ PackArgs args) {
  pdl_trigger();
  pdl_wait();
  int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, at = thread / 64;  // of (tile, unit)
  int lane = thread % 32, octet = thread / 32 % 2, row = lane / 4, quad = lane % 4;
  int tile = static_cast<int>(at / args.units), unit = static_cast<int>(at % args.units);
  if (tile * 16 >= args.rows) return;
  int from = args.gated ? octet * (args.rows / 2) + tile * 8 + row : tile * 16 + octet * 8 + row;
  uint8_t* out = args.out + at * kUnitBytes;
  uint32_t words[4] = {};
  constexpr int kTurned[2][4] = {{0, 4, -6, 8}, {2, 6, -4, -2}};  // to the right, by `unpack`
  for (int j = 0; j < 4; ++j) {
    if (unit * 4 + j >= args.groups) break;
    const uint8_t* block = args.blocks + (static_cast<int64_t>(from) * args.groups + unit * 4 + j) * 17;
    for (int p = 0; p < 4; ++p) {
      uint32_t bits = 0;
      for (int half = 0; half < 2; ++half) {
        uint32_t code = block[1 + p % 2 * 8 + quad * 2 + half] >> (p / 2 * 4) & 15;
        bits |= (code >> 3 << 15 | (code & 7) << 6) << (16 * half);
      }
      bits = turn(bits, -kTurned[j % 2][p]);
      if (p < 3) words[j] |= bits;
      else words[j & 2] |= bits & kLeft, words[j | 1] |= bits & ~kLeft;
    }
    if (j == quad) out[kCodeBytes + (octet * 8 + row) * 4 + j] = min(max(block[0] + args.base, 0), 255);
  }
  if (unit * 4 + quad >= args.groups) out[kCodeBytes + (octet * 8 + row) * 4 + quad] = 0;
  reinterpret_cast<uint4*>(out + octet * (kCodeBytes / 2))[lane] = make_uint4(words[0], words[1], words[2], words[3]);
}

// blocks: [rows, groups * 17], of gated ones gate's rows first → out: [rows, bytes]. base: what exponents are to be more.
void pack(TensorView blocks, TensorView out, bool gated, int64_t base) {
  int64_t rows = blocks.size(0), groups = blocks.size(1) / 17, units = (groups + 3) / 4;
  check_matrix(blocks, rows, groups * 17);
  check_matrix(out, rows, units * kUnitBytes / 16);
  PackArgs args{bytes_of(blocks), const_cast<uint8_t*>(bytes_of(out)), static_cast<int>(rows), static_cast<int>(groups),
                static_cast<int>(units), static_cast<int>(base), gated};
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>((rows / 16 * units * 64 + 255) / 256));
  config.block = dim3(256);
  launch(config, current_stream(out), pack_kernel, args);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack, minisgl::pack);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mixture, minisgl::mixture);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(product, minisgl::product);

}  // namespace minisgl
