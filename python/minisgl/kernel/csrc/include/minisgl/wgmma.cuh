// Matrix products of a warpgroup (128 threads) with both operands in shared memory (wgmma, sm_90a).
//
// Facts: PTX ISA, "Asynchronous warpgroup level matrix instructions". Define WGMMA_N, the width of the product, and
// WGMMA_TYPE, "bf16", "f16" or, with WGMMA_FP8 too, "e4m3", first: one width per compilation, since each needs its own
// list of registers.
#pragma once

#include <cstdint>

namespace minisgl {

// A tile of rows of 128 bytes, 128-byte swizzled, 8 rows (1024 bytes) after 8 rows, at a multiple of 1024.
// Adding 2 to the descriptor moves it by 32 bytes along the rows: the hardware swizzles addresses, not offsets.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kEightRows = uint64_t(1024 >> 4) << 32;
  constexpr uint64_t kUnused = 1ull << 16;  // the leading offset means nothing in this layout
  return kSwizzle128 | kEightRows | kUnused | ((shared & 0x3FFFF) >> 4);
}

// Before the first product, and whenever registers of the sums were touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving sums while products run.
template <int n>
__device__ __forceinline__ void pin(float (&sums)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#define WGMMA_D0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_D1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_D2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_D3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_D4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_D5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_D6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_D7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_D8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_D9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_D10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_D11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_D12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_D13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_D14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_D15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_O8(i) \
  "+f"(c[i + 0]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), \
      "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])

#define WGMMA_R32 WGMMA_D0 ", " WGMMA_D1
#define WGMMA_O32 WGMMA_O8(0), WGMMA_O8(8)
#define WGMMA_R64 WGMMA_R32 ", " WGMMA_D2 ", " WGMMA_D3
#define WGMMA_O64 WGMMA_O32, WGMMA_O8(16), WGMMA_O8(24)
#define WGMMA_R128 WGMMA_R64 ", " WGMMA_D4 ", " WGMMA_D5 ", " WGMMA_D6 ", " WGMMA_D7
#define WGMMA_O128 WGMMA_O64, WGMMA_O8(32), WGMMA_O8(40), WGMMA_O8(48), WGMMA_O8(56)
#define WGMMA_R160 WGMMA_R128 ", " WGMMA_D8 ", " WGMMA_D9
#define WGMMA_O160 WGMMA_O128, WGMMA_O8(64), WGMMA_O8(72)
#define WGMMA_R192 WGMMA_R160 ", " WGMMA_D10 ", " WGMMA_D11
#define WGMMA_O192 WGMMA_O160, WGMMA_O8(80), WGMMA_O8(88)
#define WGMMA_R256 WGMMA_R192 ", " WGMMA_D12 ", " WGMMA_D13 ", " WGMMA_D14 ", " WGMMA_D15
#define WGMMA_O256 WGMMA_O192, WGMMA_O8(96), WGMMA_O8(104), WGMMA_O8(112), WGMMA_O8(120)

#if WGMMA_N == 32
#define WGMMA_REGISTERS WGMMA_R32
#define WGMMA_OPERANDS WGMMA_O32
#define WGMMA_A "%16"
#define WGMMA_B "%17"
#define WGMMA_KEEP "%18"
#define WGMMA_FOURTH "%19"
#define WGMMA_FIFTH "%20"
#define WGMMA_WIDTH "n32"
#elif WGMMA_N == 64
#define WGMMA_REGISTERS WGMMA_R64
#define WGMMA_OPERANDS WGMMA_O64
#define WGMMA_A "%32"
#define WGMMA_B "%33"
#define WGMMA_KEEP "%34"
#define WGMMA_FOURTH "%35"
#define WGMMA_FIFTH "%36"
#define WGMMA_WIDTH "n64"
#elif WGMMA_N == 128
#define WGMMA_REGISTERS WGMMA_R128
#define WGMMA_OPERANDS WGMMA_O128
#define WGMMA_A "%64"
#define WGMMA_B "%65"
#define WGMMA_KEEP "%66"
#define WGMMA_FOURTH "%67"
#define WGMMA_FIFTH "%68"
#define WGMMA_WIDTH "n128"
#elif WGMMA_N == 160
#define WGMMA_REGISTERS WGMMA_R160
#define WGMMA_OPERANDS WGMMA_O160
#define WGMMA_A "%80"
#define WGMMA_B "%81"
#define WGMMA_KEEP "%82"
#define WGMMA_FOURTH "%83"
#define WGMMA_FIFTH "%84"
#define WGMMA_WIDTH "n160"
#elif WGMMA_N == 192
#define WGMMA_REGISTERS WGMMA_R192
#define WGMMA_OPERANDS WGMMA_O192
#define WGMMA_A "%96"
#define WGMMA_B "%97"
#define WGMMA_KEEP "%98"
#define WGMMA_FOURTH "%99"
#define WGMMA_FIFTH "%100"
#define WGMMA_WIDTH "n192"
#elif WGMMA_N == 256
#define WGMMA_REGISTERS WGMMA_R256
#define WGMMA_OPERANDS WGMMA_O256
#define WGMMA_A "%128"
#define WGMMA_B "%129"
#define WGMMA_KEEP "%130"
#define WGMMA_FOURTH "%131"
#define WGMMA_FIFTH "%132"
#define WGMMA_WIDTH "n256"
#else
#error "no such width"
#endif

#if WGMMA_FP8
#define WGMMA_DEPTH "k32"
#define WGMMA_MAJOR ""
#else
#define WGMMA_DEPTH "k16"
#define WGMMA_MAJOR ", 0, 0"
#endif

// c (64 x WGMMA_N) = a (64 x d) b (WGMMA_N x d)^T, plus c where `keep`; d is 32 bytes wide. Thread t of the warpgroup holds in
// c[4j .. 4j+3] the rows r = 16 (t / 32) + t % 32 / 4, r, r + 8, r + 8 of columns q = 8j + 2 (t % 4), q + 1, q, q + 1.
__device__ __forceinline__ void wgmma(float (&c)[WGMMA_N / 2], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, " WGMMA_KEEP ", 0;\n"
      "wgmma.mma_async.sync.aligned.m64" WGMMA_WIDTH WGMMA_DEPTH ".f32." WGMMA_TYPE "." WGMMA_TYPE " {" WGMMA_REGISTERS "}, "
      WGMMA_A ", " WGMMA_B ", p, 1, 1" WGMMA_MAJOR ";\n"
      "}\n"
      : WGMMA_OPERANDS
      : "l"(a), "l"(b), "r"(keep));
}

// The same with a in registers: the four words of each thread are as mma.m16n8k16 has them, each warp with 16 rows. They
// must not change before the product is complete.
__device__ __forceinline__ void wgmma(float (&c)[WGMMA_N / 2], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64" WGMMA_WIDTH "k16.f32." WGMMA_TYPE "." WGMMA_TYPE " {" WGMMA_REGISTERS
               "}, {" WGMMA_A ", " WGMMA_B ", " WGMMA_KEEP ", " WGMMA_FOURTH "}, " WGMMA_FIFTH ", 1, 1, 1, 0;\n"
               : WGMMA_OPERANDS
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

}  // namespace minisgl
