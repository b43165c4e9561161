// vdpbf16ps tiles, for CPUs with AVX512_BF16: sums [R, 32] += rows x [.., 2] times pairs of bf16 weights. In assembly for
// the reason that dot_run_avx512.h gives. Registers: zmm0-27 sums of row i in 2i and 2i + 1, zmm28-29 weights, zmm30 two
// inputs of a row; general ones: 6 operands.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace cpullm {
namespace {

// clang-format off
#define CPULLM_EACH_ROW(ROW)                                                                              \
  ROW(0, 0, 1) ROW(1, 2, 3) ROW(2, 4, 5) ROW(3, 6, 7) ROW(4, 8, 9) ROW(5, 10, 11) ROW(6, 12, 13)          \
  ROW(7, 14, 15) ROW(8, 16, 17) ROW(9, 18, 19) ROW(10, 20, 21) ROW(11, 22, 23) ROW(12, 24, 25) ROW(13, 26, 27)
#define CPULLM_LOAD(i, a, b)                                                                              \
  ".if %c[rows] > " #i "\nvmovups 128*" #i "(%[y]), %%zmm" #a "\nvmovups 128*" #i "+64(%[y]), %%zmm" #b "\n.endif\n"
#define CPULLM_STORE(i, a, b)                                                                             \
  ".if %c[rows] > " #i "\nvmovups %%zmm" #a ", 128*" #i "(%[y])\nvmovups %%zmm" #b ", 128*" #i "+64(%[y])\n.endif\n"
#define CPULLM_ROW(i, a, b)                                                                               \
  ".if %c[rows] > " #i "\nvpbroadcastd 4*" #i "(%[x]), %%zmm30\n"                                         \
  "vdpbf16ps %%zmm30, %%zmm28, %%zmm" #a "\nvdpbf16ps %%zmm30, %%zmm29, %%zmm" #b "\n.endif\n"
#define CPULLM_PAIR(at)                                                                                   \
  "prefetcht0 (%[x], %[next])\n"                                                                           \
  "vmovups " #at "(%[w]), %%zmm28\nvmovups " #at "+64(%[w]), %%zmm29\n" CPULLM_EACH_ROW(CPULLM_ROW) "add %[x_step], %[x]\n"

// `pairs` is even and positive; x_step: bytes from pair to pair; next: from these rows to those to come (prefetched).
template <int R>
inline void dot_tile_bf16(const uint16_t* w, const uint16_t* x, int64_t x_step, int64_t next, int64_t pairs, float* y) {
  static_assert(R >= 1 && R <= 14, "28 sums fit");
  __asm__ volatile(
      CPULLM_EACH_ROW(CPULLM_LOAD)
      ".p2align 5\n1:\n"
      CPULLM_PAIR(0) CPULLM_PAIR(128)
      "add $256, %[w]\n"
      "sub $2, %[pairs]\n"
      "jnz 1b\n"
      CPULLM_EACH_ROW(CPULLM_STORE)
      : [w] "+&r"(w), [x] "+&r"(x), [pairs] "+&r"(pairs)
      : [x_step] "r"(x_step), [next] "r"(next), [y] "r"(y), [rows] "i"(R)
      : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24",
        "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "memory", "cc");
}
#undef CPULLM_EACH_ROW
#undef CPULLM_LOAD
#undef CPULLM_STORE
#undef CPULLM_ROW
#undef CPULLM_PAIR
// clang-format on

}  // namespace
}  // namespace cpullm
