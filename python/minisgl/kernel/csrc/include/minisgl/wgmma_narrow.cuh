// Products with a in registers (minisgl/wgmma.cuh) that are narrower than WGMMA_N: where that is 64, multiples of 8
// from 16 on, where it is 128, multiples of 32.
#pragma once

#include "minisgl/wgmma.cuh"

namespace minisgl {

#define WGMMA_O4(i) "+f"(c[i + 0]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define WGMMA_R24 WGMMA_D0 ", %8, %9, %10, %11"
#define WGMMA_O24 WGMMA_O8(0), WGMMA_O4(8)
#define WGMMA_R40 WGMMA_R32 ", %16, %17, %18, %19"
#define WGMMA_O40 WGMMA_O32, WGMMA_O4(16)
#define WGMMA_R48 WGMMA_R32 ", " WGMMA_D2
#define WGMMA_O48 WGMMA_O32, WGMMA_O8(16)
#define WGMMA_R56 WGMMA_R48 ", %24, %25, %26, %27"
#define WGMMA_O56 WGMMA_O48, WGMMA_O4(24)
#define WGMMA_R96 WGMMA_R64 ", " WGMMA_D4 ", " WGMMA_D5
#define WGMMA_O96 WGMMA_O64, WGMMA_O8(32), WGMMA_O8(40)

#define WGMMA_NARROW(width, registers, operands, a0, a1, a2, a3, last)                                                 \
  __device__ __forceinline__ void wgmma(float (&c)[width / 2], const uint32_t (&a)[4], uint64_t b) {                   \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #width "k16.f32." WGMMA_TYPE "." WGMMA_TYPE " {" registers "}, {" \
                 a0 ", " a1 ", " a2 ", " a3 "}, " last ", 1, 1, 1, 0;\n"                                               \
                 : operands                                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                \
  }

#if WGMMA_N == 64
WGMMA_NARROW(16, WGMMA_D0, WGMMA_O8(0), "%8", "%9", "%10", "%11", "%12")
WGMMA_NARROW(24, WGMMA_R24, WGMMA_O24, "%12", "%13", "%14", "%15", "%16")
WGMMA_NARROW(32, WGMMA_R32, WGMMA_O32, "%16", "%17", "%18", "%19", "%20")
WGMMA_NARROW(40, WGMMA_R40, WGMMA_O40, "%20", "%21", "%22", "%23", "%24")
WGMMA_NARROW(48, WGMMA_R48, WGMMA_O48, "%24", "%25", "%26", "%27", "%28")
WGMMA_NARROW(56, WGMMA_R56, WGMMA_O56, "%28", "%29", "%30", "%31", "%32")
#elif WGMMA_N == 128
WGMMA_NARROW(32, WGMMA_R32, WGMMA_O32, "%16", "%17", "%18", "%19", "%20")
WGMMA_NARROW(64, WGMMA_R64, WGMMA_O64, "%32", "%33", "%34", "%35", "%36")
WGMMA_NARROW(96, WGMMA_R96, WGMMA_O96, "%48", "%49", "%50", "%51", "%52")
#else
#error "no such width"
#endif

}  // namespace minisgl
