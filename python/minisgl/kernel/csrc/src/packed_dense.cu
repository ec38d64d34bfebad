// Packed weights of 4 bits (minisgl/packed_weight.cuh) as 16-bit matrices, for products of so many rows
// that the library's are faster. Compiled once per dtype, and size and kind of groups.
#include "minisgl/packed_weight.cuh"

namespace minisgl {
namespace {

constexpr int kWarps = 8;
constexpr int kRowPitch = kUnitK + 8;  // elements: rows lie in different banks

struct DenseArgs {
  const char* weight;
  T* out;  // [rows, k]
  float unit;
  int64_t all;  // units to unpack
  int units, rows, k;
  bool gated;  // rows are gate's, then up's; `rows` counts both
};

// A lane's part of a unit, into shared memory as 16 rows.
__device__ __forceinline__ void unpack_unit(const DenseArgs& args, const char* unit, T (*rows)[kRowPitch]) {
  int lane = threadIdx.x % 32;
  uint4 first = *reinterpret_cast<const uint4*>(unit + lane * 16);
  uint4 second = *reinterpret_cast<const uint4*>(unit + kOctetBytes + lane * 16);
  uint32_t codes[2][4] = {{first.x, first.y, first.z, first.w}, {second.x, second.y, second.z, second.w}};
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const char* params = unit + kCodeBytes + g * 32 + lane / 4 * 4;
    Dense low({*reinterpret_cast<const uint32_t*>(params)}, args.unit);
    Dense high({*reinterpret_cast<const uint32_t*>(params + kParamBytes)}, args.unit);
#pragma unroll
    for (int f = g * kFragments; f < (g + 1) * kFragments; ++f) {
      uint32_t a[4];
      unpack(low, high, codes[0][f / 2], codes[1][f / 2], f % 2, a);
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        *reinterpret_cast<uint32_t*>(&rows[lane / 4 + p % 2 * 8][f * 16 + p / 2 * 8 + lane % 4 * 2]) = a[p];
      }
    }
  }
}

__global__ void __launch_bounds__(kWarps * 32) packed_dense(const __grid_constant__ DenseArgs args) {
  __shared__ __align__(16) T staging[kWarps][16][kRowPitch];
  pdl_trigger();
  pdl_wait();  // what is written here, an earlier kernel may still read
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp; i < args.all; i += gridDim.x * kWarps) {
    unpack_unit(args, args.weight + i * kUnitBytes, staging[warp]);
    __syncwarp();
    int tile = static_cast<int>(i / args.units), k = static_cast<int>(i % args.units) * kUnitK + lane % 16 * 8;
#pragma unroll
    for (int r = lane / 16; r < 16; r += 2) {
      int row = args.gated ? tile * 8 + r % 8 + r / 8 * (args.rows / 2) : tile * 16 + r;
      if (row < args.rows && k < args.k) {
        uint4 v = *reinterpret_cast<const uint4*>(&staging[warp][r][lane % 16 * 8]);
        *reinterpret_cast<uint4*>(args.out + static_cast<int64_t>(row) * args.k + k) = v;
      }
    }
    __syncwarp();
  }
}

// out [rows, k] = the matrix packed in weight [row tiles, units, bytes], with factor `unit`. gated: of which gate and up rows
// alternate; out has gate's first.
void dequantize(TensorView weight, double unit, TensorView out, bool gated) {
  int64_t rows = out.size(0), k = out.size(1);
  MINISGL_CHECK(out.ndim() == 2 && weight.ndim() == 3 && out.is_contiguous() && weight.is_contiguous());
  MINISGL_CHECK(is_dtype(weight, kDLUInt, 8) && weight.size(2) == kUnitBytes &&
                weight.size(1) == (k + kUnitK - 1) / kUnitK && weight.size(0) == (rows + 15) / 16 &&
                k % 8 == 0 && (!gated || rows % 16 == 0))
      << "not such a packed weight";
#if MINISGL_FP16
  MINISGL_CHECK(is_fp16(out)) << "expected fp16";
#else
  MINISGL_CHECK(is_bf16(out)) << "expected bf16";
#endif
  DenseArgs args{static_cast<const char*>(weight.data_ptr()),
                 static_cast<T*>(out.data_ptr()),
                 static_cast<float>(unit),
                 weight.size(0) * weight.size(1),
                 static_cast<int>(weight.size(1)),
                 static_cast<int>(rows),
                 static_cast<int>(k),
                 gated};
  if (args.all == 0) return;
  LaunchConfig config;
  int64_t blocks = (args.all + kWarps - 1) / kWarps;
  config.grid = dim3(static_cast<unsigned>(blocks < 4096 ? blocks : 4096));
  config.block = dim3(kWarps * 32);
  launch(config, current_stream(out), packed_dense, args);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(dequantize, minisgl::dequantize);

}  // namespace minisgl
