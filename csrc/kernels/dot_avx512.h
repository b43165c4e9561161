// One segment of a tile on the avx512 level: dot products of u8 codes and s8 activations, exact in int32, and the step of
// the fp32 chain that follows (see ref.cpp).
//
// In assembly because GCC 12 moves and spills sums kept in arrays by intrinsics (58 % of the dot product's peak became
// 94 %), and so that the int32 sums never go through memory (a store of 64 bytes takes two cycles on Zen 4).
// Registers: zmm0-27 sums of row i in 2i and 2i + 1, or, for at most 4 rows, of even steps there and of odd steps in
// 16 + 2i and 17 + 2i (two chains hide the latency); zmm28-29 codes, zmm30 four inputs of a row, zmm31 the mask 15; in the
// chain zmm28-29 zero points or minima, then a row's scale; zmm30-31 the group's scales.
#pragma once

#include <immintrin.h>

#include "segment.h"

namespace cpullm {
namespace {

// clang-format off
#define CPULLM_ZERO(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n"
#define CPULLM_ROW(i, a, b)                                                                \
  ".if %c[rows] > " #i "\nvpbroadcastd 4*" #i "(%[x]), %%zmm30\n"                          \
  "vpdpbusd %%zmm30, %%zmm28, %%zmm" #a "\nvpdpbusd %%zmm30, %%zmm29, %%zmm" #b "\n.endif\n"
#define CPULLM_ODD_ROWS                                                                        \
  ".if %c[rows] <= 4\n"                                                                        \
  CPULLM_ROW(0, 16, 17) CPULLM_ROW(1, 18, 19) CPULLM_ROW(2, 20, 21) CPULLM_ROW(3, 22, 23)      \
  ".else\n" CPULLM_EACH_ROW(CPULLM_ROW) ".endif\n"
// Codes of step `s` of an iteration to zmm28 (columns 0-15) and zmm29 (16-31).
#define CPULLM_CODES(s)                                                                               \
  ".if %c[packed]\nvmovdqu64 64*" #s "(%[codes]), %%zmm29\n"                                          \
  "vpandd %%zmm31, %%zmm29, %%zmm28\nvpsrlw $4, %%zmm29, %%zmm29\nvpandd %%zmm31, %%zmm29, %%zmm29\n" \
  "prefetcht0 4096+64*" #s "(%[codes])\n.else\n"                                                      \
  "vmovdqu64 128*" #s "(%[codes]), %%zmm28\nvmovdqu64 128*" #s "+64(%[codes]), %%zmm29\n"             \
  "prefetcht0 4096+128*" #s "(%[codes])\nprefetcht0 4160+128*" #s "(%[codes])\n.endif\n"
// `text` once per row, with the row's number and its two sums.
#define CPULLM_EACH_ROW(ROW)                                                                              \
  ROW(0, 0, 1) ROW(1, 2, 3) ROW(2, 4, 5) ROW(3, 6, 7) ROW(4, 8, 9) ROW(5, 10, 11) ROW(6, 12, 13)          \
  ROW(7, 14, 15) ROW(8, 16, 17) ROW(9, 18, 19) ROW(10, 20, 21) ROW(11, 22, 23) ROW(12, 24, 25) ROW(13, 26, 27)
#define CPULLM_TWO(i, first, second) ".if %c[rows] > " #i "\n" first "\n" second "\n.endif\n"
#define CPULLM_START(i, a, b) \
  CPULLM_TWO(i, "vmovdqa64 128*" #i "(%[start]), %%zmm" #a, "vmovdqa64 128*" #i "+64(%[start]), %%zmm" #b)
#define CPULLM_ZEROS(i, a, b) \
  CPULLM_TWO(i, "vpxord %%zmm" #a ", %%zmm" #a ", %%zmm" #a, "vpxord %%zmm" #b ", %%zmm" #b ", %%zmm" #b)
#define CPULLM_BEGIN(i, a, b) \
  CPULLM_TWO(i, "vpbroadcastd 4*" #i "(%[begin]), %%zmm" #a, "vmovdqa64 %%zmm" #a ", %%zmm" #b)
#define CPULLM_ADD_BEGIN(i, a, b)                                                  \
  CPULLM_TWO(i, "vpaddd 4*" #i "(%[begin])%{1to16%}, %%zmm" #a ", %%zmm" #a,       \
                "vpaddd 4*" #i "(%[begin])%{1to16%}, %%zmm" #b ", %%zmm" #b)
#define CPULLM_MINUS(i, a, b) \
  CPULLM_TWO(i, "vpdpwssd 4*" #i "(%[x])%{1to16%}, %%zmm28, %%zmm" #a, "vpdpwssd 4*" #i "(%[x])%{1to16%}, %%zmm29, %%zmm" #b)
#define CPULLM_FLOAT(i, a, b) \
  CPULLM_TWO(i, "vcvtdq2ps %%zmm" #a ", %%zmm" #a, "vcvtdq2ps %%zmm" #b ", %%zmm" #b)
#define CPULLM_FIRST(i, a, b) \
  CPULLM_TWO(i, "vmulps %%zmm30, %%zmm" #a ", %%zmm" #a, "vmulps %%zmm31, %%zmm" #b ", %%zmm" #b)
#define CPULLM_NEXT(i, a, b)                                             \
  CPULLM_TWO(i, "vfmadd213ps 128*" #i "(%[x]), %%zmm30, %%zmm" #a,       \
                "vfmadd213ps 128*" #i "+64(%[x]), %%zmm31, %%zmm" #b)
#define CPULLM_MINIMUM(i, a, b)                                                \
  CPULLM_TWO(i, "vfmadd231ps 4*" #i "(%[x])%{1to16%}, %%zmm28, %%zmm" #a,      \
                "vfmadd231ps 4*" #i "(%[x])%{1to16%}, %%zmm29, %%zmm" #b)
#define CPULLM_KEEP(i, a, b)                                             \
  CPULLM_TWO(i, "vmovaps %%zmm" #a ", 128*" #i "(%[x])", "vmovaps %%zmm" #b ", 128*" #i "+64(%[x])")
#define CPULLM_LAST(i, a, b)                                                                      \
  CPULLM_TWO(i, "vbroadcastss 4*" #i "(%[codes]), %%zmm28",                                       \
                "vfmadd213ps 128*" #i "(%[x]), %%zmm28, %%zmm" #a)                                \
  CPULLM_TWO(i, "vfmadd213ps 128*" #i "+64(%[x]), %%zmm28, %%zmm" #b,                             \
                "vmovaps %%zmm" #a ", 128*" #i "(%[x])\nvmovaps %%zmm" #b ", 128*" #i "+64(%[x])")

// Rows x [.., 4] (x_step bytes from step to step) times `steps` blocks of codes, steps a multiple of 8, then `end`.
// packed: blocks of 64 bytes of nibbles; else 128 bytes.
template <int R, bool kPacked>
inline void segment_avx512(const uint8_t* codes, const int8_t* x, int64_t x_step, int64_t steps, const SegmentEnd& end) {
  static_assert(R >= 1 && R <= 14 && kChunk % (2 * kStep) == 0, "28 sums fit, steps are even");
  const int32_t* start = end.start;
  __asm__ volatile(
      ".if %c[rows] <= 4\n"
      CPULLM_ZERO(16) CPULLM_ZERO(17) CPULLM_ZERO(18) CPULLM_ZERO(19) CPULLM_ZERO(20) CPULLM_ZERO(21) CPULLM_ZERO(22)
      CPULLM_ZERO(23) ".endif\n"
      "test %[start], %[start]\n"
      "jnz 2f\n"
      "test %[begin], %[begin]\n"
      "jz 1f\n" CPULLM_EACH_ROW(CPULLM_BEGIN)
      "jmp 3f\n"
      "1:\n" CPULLM_EACH_ROW(CPULLM_ZEROS)
      "jmp 3f\n"
      "2:\n" CPULLM_EACH_ROW(CPULLM_START)
      "test %[begin], %[begin]\n"
      "jz 3f\n" CPULLM_EACH_ROW(CPULLM_ADD_BEGIN)
      "3:\n"
      ".if %c[packed]\nvpbroadcastd %k[mask], %%zmm31\n.endif\n"
      ".p2align 5\n1:\n"
      CPULLM_CODES(0) CPULLM_EACH_ROW(CPULLM_ROW) "add %[x_step], %[x]\n"
      CPULLM_CODES(1) CPULLM_ODD_ROWS "add %[x_step], %[x]\n"
      "add $%c[bytes], %[codes]\n"
      "sub $2, %[steps]\n"
      "jnz 1b\n"
      ".if %c[rows] <= 4\n"
      "vpaddd %%zmm16, %%zmm0, %%zmm0\nvpaddd %%zmm17, %%zmm1, %%zmm1\nvpaddd %%zmm18, %%zmm2, %%zmm2\n"
      "vpaddd %%zmm19, %%zmm3, %%zmm3\nvpaddd %%zmm20, %%zmm4, %%zmm4\nvpaddd %%zmm21, %%zmm5, %%zmm5\n"
      "vpaddd %%zmm22, %%zmm6, %%zmm6\nvpaddd %%zmm23, %%zmm7, %%zmm7\n.endif\n"
      "mov %c[params](%[end]), %[x]\n"
      "vmovaps (%[x]), %%zmm28\nvmovaps 64(%[x]), %%zmm29\nvmovaps 128(%[x]), %%zmm30\nvmovaps 192(%[x]), %%zmm31\n"
      "mov %c[sums](%[end]), %[codes]\n"  // only the minimum form has them
      "test %[codes], %[codes]\n"
      "jnz 4f\n"
      "test %[begin], %[begin]\n"
      "jnz 4f\n"
      "mov %c[minus](%[end]), %[x]\n" CPULLM_EACH_ROW(CPULLM_MINUS)
      "4:\n" CPULLM_EACH_ROW(CPULLM_FLOAT)
      "mov %c[block](%[end]), %[x]\n"
      "cmpl $0, %c[first](%[end])\n"
      "jz 5f\n" CPULLM_EACH_ROW(CPULLM_FIRST)
      "jmp 6f\n"
      "5:\n" CPULLM_EACH_ROW(CPULLM_NEXT)
      "6:\n"
      "test %[codes], %[codes]\n"
      "jz 7f\n"
      "mov %[codes], %[x]\n" CPULLM_EACH_ROW(CPULLM_MINIMUM)
      "mov %c[block](%[end]), %[x]\n"
      "7:\n"
      "cmpl $0, %c[last](%[end])\n"
      "jnz 8f\n" CPULLM_EACH_ROW(CPULLM_KEEP)
      "jmp 9f\n"
      "8:\n"
      "mov %c[x_scale](%[end]), %[codes]\n"
      "mov %c[y](%[end]), %[x]\n" CPULLM_EACH_ROW(CPULLM_LAST)
      "9:\n"
      : [codes] "+&r"(codes), [x] "+&r"(x), [steps] "+&r"(steps)
      : [x_step] "r"(x_step), [start] "r"(start), [begin] "r"(end.begin), [mask] "r"(0x0f0f0f0f), [rows] "i"(R), [packed] "i"(int(kPacked)),
        [bytes] "i"(kPacked ? 128 : 256), [end] "r"(&end), [params] "i"(__builtin_offsetof(SegmentEnd, params)),
        [minus] "i"(__builtin_offsetof(SegmentEnd, minus)), [sums] "i"(__builtin_offsetof(SegmentEnd, sums)),
        [x_scale] "i"(__builtin_offsetof(SegmentEnd, x_scale)), [block] "i"(__builtin_offsetof(SegmentEnd, block)),
        [y] "i"(__builtin_offsetof(SegmentEnd, y)), [first] "i"(__builtin_offsetof(SegmentEnd, first)), [last] "i"(__builtin_offsetof(SegmentEnd, last))
      : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24",
        "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31", "memory", "cc");
}
#undef CPULLM_ZERO
#undef CPULLM_ROW
#undef CPULLM_ODD_ROWS
#undef CPULLM_CODES
#undef CPULLM_EACH_ROW
#undef CPULLM_TWO
#undef CPULLM_START
#undef CPULLM_ZEROS
#undef CPULLM_BEGIN
#undef CPULLM_ADD_BEGIN
#undef CPULLM_MINUS
#undef CPULLM_FLOAT
#undef CPULLM_FIRST
#undef CPULLM_NEXT
#undef CPULLM_MINIMUM
#undef CPULLM_KEEP
#undef CPULLM_LAST
// clang-format on

}  // namespace
}  // namespace cpullm
