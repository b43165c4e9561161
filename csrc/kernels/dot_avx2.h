// One segment of a tile on the 256-bit levels, one column pass (16 of a panel's 32 columns): dot products of u8 codes and
// s8 activations, exact in int32, and the step of the fp32 chain that follows (see ref.cpp).
//
// In assembly because GCC 12 spills sums kept in arrays, and so that they meet the chain in registers.
// Without VNNI (codes 0..15): a pair of products is at most 2 * 15 * 127 = 3810, so the 8 steps of a chunk stay below
// 8 * 3810 = 30480 in int16, and the first one needs no addition. Chunks of a segment but the last are added up in
// memory: a tile of 6 rows leaves no register for their int32 sums.
// Bounds of a chunk of 8 columns of a row on Zen 4: 9 multiplications on two of its four units, 4.5 cycles; 7 + 1
// additions make 17 operations on all four, 4.25 cycles; the zero point, conversion and fma of a segment (of every chunk
// at group 32) 3 more, 5 cycles. Loads come beside them: 33 of 36 instructions that a step of 6 rows can dispatch.
// Registers: ymm0-11 sums of row i in 2i and 2i + 1; with VNNI and at most 3 rows those of odd steps in 6 + 2i and 7 + 2i.
// ymm12-13 codes, ymm14 four inputs of a row, ymm15 pairs of products; in the chain ymm12-13 zero points, scales or
// minima, ymm14 a number of a row.
#pragma once

#include <immintrin.h>

#include "segment.h"

namespace cpullm {
namespace {

// clang-format off
// Codes of step `s` of a chunk to ymm12 (columns 0-7 of the pass) and ymm13.
#define CPULLM_CODES(s)                                                                               \
  ".if %c[packed]\nvmovdqu 64*" #s "(%[codes]), %%ymm13\n"                                            \
  "vpand %[mask], %%ymm13, %%ymm12\nvpsrlw $4, %%ymm13, %%ymm13\nvpand %[mask], %%ymm13, %%ymm13\n"   \
  "prefetcht0 4096+64*" #s "(%[codes])\n.else\n"                                                      \
  "vmovdqu 128*" #s "(%[codes]), %%ymm12\nvmovdqu 128*" #s "+64(%[codes]), %%ymm13\n"                 \
  ".if %c[stream]\nprefetcht0 4096+128*" #s "(%[codes])\nprefetcht0 4160+128*" #s "(%[codes])\n.endif\n.endif\n"
#define CPULLM_IF(i, ...) ".if %c[rows] > " #i "\n" __VA_ARGS__ ".endif\n"
// `ROW` once per row, with the row's number and its two sums.
#define CPULLM_EACH(ROW) ROW(0, 0, 1) ROW(1, 2, 3) ROW(2, 4, 5) ROW(3, 6, 7) ROW(4, 8, 9) ROW(5, 10, 11)
#define CPULLM_FOUR(i, at) "vpbroadcastd 4*" #i at ", %%ymm14\n"
// Eight steps; the inputs of a step are %[x_step] bytes further on.
#define CPULLM_STEPS(FIRST, EVEN, ODD)                                                                \
  CPULLM_CODES(0) FIRST("(%[x])") CPULLM_CODES(1) ODD("(%[x],%[x_step])")                             \
  CPULLM_CODES(2) EVEN("(%[x],%[x_step],2)") CPULLM_CODES(3) ODD("(%[x],%[x_step_3])")                \
  "lea (%[x],%[x_step],4), %[x]\n"                                                                    \
  CPULLM_CODES(4) EVEN("(%[x])") CPULLM_CODES(5) ODD("(%[x],%[x_step])")                              \
  CPULLM_CODES(6) EVEN("(%[x],%[x_step],2)") CPULLM_CODES(7) ODD("(%[x],%[x_step_3])")                \
  "lea (%[x],%[x_step],4), %[x]\n"                                                                    \
  "add $%c[bytes], %[codes]\n"                                                                        \
  "sub $8, %[steps]\n"
#define CPULLM_ADD_BEGIN(i, a, b)                                     \
  CPULLM_IF(i, "vpbroadcastd 4*" #i "(%[begin]), %%ymm14\n"           \
               "vpaddd %%ymm14, %%ymm" #a ", %%ymm" #a "\nvpaddd %%ymm14, %%ymm" #b ", %%ymm" #b "\n")

#ifdef CPULLM_VNNI
#define CPULLM_DOT(i, at, a, b)                                                                          \
  CPULLM_IF(i, CPULLM_FOUR(i, at) "%{vex%} vpdpbusd %%ymm14, %%ymm12, %%ymm" #a "\n"                     \
               "%{vex%} vpdpbusd %%ymm14, %%ymm13, %%ymm" #b "\n")
#define CPULLM_EVEN(at) CPULLM_DOT(0, at, 0, 1) CPULLM_DOT(1, at, 2, 3) CPULLM_DOT(2, at, 4, 5) \
  CPULLM_DOT(3, at, 6, 7) CPULLM_DOT(4, at, 8, 9) CPULLM_DOT(5, at, 10, 11)
#define CPULLM_ODD(at)                                                                                    \
  ".if %c[rows] > 3\n" CPULLM_EVEN(at) ".else\n"                                                          \
  CPULLM_DOT(0, at, 6, 7) CPULLM_DOT(1, at, 8, 9) CPULLM_DOT(2, at, 10, 11) ".endif\n"
#define CPULLM_START(i, a, b) \
  CPULLM_IF(i, "vmovdqa 64*" #i "(%[start]), %%ymm" #a "\nvmovdqa 64*" #i "+32(%[start]), %%ymm" #b "\n")
#define CPULLM_BEGIN(i, a, b) \
  CPULLM_IF(i, "vpbroadcastd 4*" #i "(%[begin]), %%ymm" #a "\nvmovdqa %%ymm" #a ", %%ymm" #b "\n")
#define CPULLM_ZERO(n) "vpxor %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n"
#define CPULLM_ZEROS(i, a, b) CPULLM_IF(i, CPULLM_ZERO(a) CPULLM_ZERO(b))
// Sums start where the segment does, and end in registers.
#define CPULLM_DOTS                                                                              \
  ".if %c[rows] <= 3\n" CPULLM_ZERO(6) CPULLM_ZERO(7) CPULLM_ZERO(8) CPULLM_ZERO(9)              \
  CPULLM_ZERO(10) CPULLM_ZERO(11) ".endif\n"                                                     \
  "test %[start], %[start]\njnz 2f\n"                                                            \
  "test %[begin], %[begin]\njz 1f\n" CPULLM_EACH(CPULLM_BEGIN) "jmp 3f\n"                        \
  "1:\n" CPULLM_EACH(CPULLM_ZEROS) "jmp 3f\n"                                                    \
  "2:\n" CPULLM_EACH(CPULLM_START)                                                               \
  "test %[begin], %[begin]\njz 3f\n" CPULLM_EACH(CPULLM_ADD_BEGIN)                               \
  ".p2align 5\n3:\n" CPULLM_STEPS(CPULLM_EVEN, CPULLM_EVEN, CPULLM_ODD) "jnz 3b\n"               \
  ".if %c[rows] <= 3\n"                                                                          \
  "vpaddd %%ymm6, %%ymm0, %%ymm0\nvpaddd %%ymm7, %%ymm1, %%ymm1\nvpaddd %%ymm8, %%ymm2, %%ymm2\n"\
  "vpaddd %%ymm9, %%ymm3, %%ymm3\nvpaddd %%ymm10, %%ymm4, %%ymm4\nvpaddd %%ymm11, %%ymm5, %%ymm5\n.endif\n"
#else
#define CPULLM_DOT_FIRST(i, at, a, b)                                                                     \
  CPULLM_IF(i, CPULLM_FOUR(i, at) "vpmaddubsw %%ymm14, %%ymm12, %%ymm" #a "\nvpmaddubsw %%ymm14, %%ymm13, %%ymm" #b "\n")
#define CPULLM_DOT(i, at, a, b)                                                                           \
  CPULLM_IF(i, CPULLM_FOUR(i, at)                                                                         \
            "vpmaddubsw %%ymm14, %%ymm12, %%ymm15\nvpmaddubsw %%ymm14, %%ymm13, %%ymm14\n"            \
            "vpaddw %%ymm15, %%ymm" #a ", %%ymm" #a "\nvpaddw %%ymm14, %%ymm" #b ", %%ymm" #b "\n")
#define CPULLM_FIRST_STEP(at) CPULLM_DOT_FIRST(0, at, 0, 1) CPULLM_DOT_FIRST(1, at, 2, 3) CPULLM_DOT_FIRST(2, at, 4, 5) \
  CPULLM_DOT_FIRST(3, at, 6, 7) CPULLM_DOT_FIRST(4, at, 8, 9) CPULLM_DOT_FIRST(5, at, 10, 11)
#define CPULLM_NEXT_STEP(at) CPULLM_DOT(0, at, 0, 1) CPULLM_DOT(1, at, 2, 3) CPULLM_DOT(2, at, 4, 5) \
  CPULLM_DOT(3, at, 6, 7) CPULLM_DOT(4, at, 8, 9) CPULLM_DOT(5, at, 10, 11)
#define CPULLM_WIDEN(i, a, b) \
  CPULLM_IF(i, "vpmaddwd %[ones], %%ymm" #a ", %%ymm" #a "\nvpmaddwd %[ones], %%ymm" #b ", %%ymm" #b "\n")
#define CPULLM_ADD(i, a, b)                                                \
  CPULLM_IF(i, "vpaddd 64*" #i "(%[sums]), %%ymm" #a ", %%ymm" #a "\n"     \
               "vpaddd 64*" #i "+32(%[sums]), %%ymm" #b ", %%ymm" #b "\n")
#define CPULLM_ADD_START(i, a, b)                                          \
  CPULLM_IF(i, "vpaddd 64*" #i "(%[start]), %%ymm" #a ", %%ymm" #a "\n"    \
               "vpaddd 64*" #i "+32(%[start]), %%ymm" #b ", %%ymm" #b "\n")
#define CPULLM_PUT(i, a, b) \
  CPULLM_IF(i, "vmovdqa %%ymm" #a ", 64*" #i "(%[sums])\nvmovdqa %%ymm" #b ", 64*" #i "+32(%[sums])\n")
// Chunk after chunk, each but the last one to memory; then what the segment starts from.
#define CPULLM_DOTS                                                                                        \
  ".p2align 5\n1:\n" CPULLM_STEPS(CPULLM_FIRST_STEP, CPULLM_NEXT_STEP, CPULLM_NEXT_STEP)                   \
  CPULLM_EACH(CPULLM_WIDEN)                                                                                \
  "test %[more], %[more]\njz 2f\n" CPULLM_EACH(CPULLM_ADD)                                                 \
  "2:\nmov $1, %k[more]\n"                                                                                 \
  "test %[steps], %[steps]\njz 3f\n" CPULLM_EACH(CPULLM_PUT) "jmp 1b\n"                                    \
  "3:\ntest %[start], %[start]\njz 4f\n" CPULLM_EACH(CPULLM_ADD_START)                                     \
  "4:\ntest %[begin], %[begin]\njz 5f\n" CPULLM_EACH(CPULLM_ADD_BEGIN) "5:\n"
#endif

#define CPULLM_MINUS(i, a, b)                                                                             \
  CPULLM_IF(i, "vpbroadcastd 4*" #i "(%[x]), %%ymm14\n"                                                   \
            "vpmaddwd %%ymm14, %%ymm12, %%ymm15\nvpaddd %%ymm15, %%ymm" #a ", %%ymm" #a "\n"              \
            "vpmaddwd %%ymm14, %%ymm13, %%ymm15\nvpaddd %%ymm15, %%ymm" #b ", %%ymm" #b "\n")
#define CPULLM_FLOAT(i, a, b) CPULLM_IF(i, "vcvtdq2ps %%ymm" #a ", %%ymm" #a "\nvcvtdq2ps %%ymm" #b ", %%ymm" #b "\n")
#define CPULLM_FIRST(i, a, b) \
  CPULLM_IF(i, "vmulps %%ymm12, %%ymm" #a ", %%ymm" #a "\nvmulps %%ymm13, %%ymm" #b ", %%ymm" #b "\n")
#define CPULLM_NEXT(i, a, b) CPULLM_IF(i, "vfmadd213ps 128*" #i "(%[x]), %%ymm12, %%ymm" #a "\n" \
  "vfmadd213ps 128*" #i "+64(%[x]), %%ymm13, %%ymm" #b "\n")
#define CPULLM_MINIMUM(i, a, b)                                                                      \
  CPULLM_IF(i, "vbroadcastss 4*" #i "(%[codes]), %%ymm14\n"                                          \
            "vfmadd231ps %%ymm14, %%ymm12, %%ymm" #a "\nvfmadd231ps %%ymm14, %%ymm13, %%ymm" #b "\n")
#define CPULLM_KEEP(i, a, b) \
  CPULLM_IF(i, "vmovaps %%ymm" #a ", 128*" #i "(%[x])\nvmovaps %%ymm" #b ", 128*" #i "+64(%[x])\n")
#define CPULLM_LAST(i, a, b)                                                                         \
  CPULLM_IF(i, "vbroadcastss 4*" #i "(%[codes]), %%ymm14\n"                                          \
            "vfmadd213ps 128*" #i "(%[x]), %%ymm14, %%ymm" #a "\nvfmadd213ps 128*" #i "+64(%[x]), %%ymm14, %%ymm" #b "\n" \
            "vmovaps %%ymm" #a ", 128*" #i "(%[x])\nvmovaps %%ymm" #b ", 128*" #i "+64(%[x])\n")

// Rows x [.., 4] (x_step bytes from step to step) times `steps` blocks of codes, steps a multiple of 8, then `end`, whose
// block and y stand at the pass's first column in [R, 32]. packed: blocks of 64 bytes of nibbles; else 128 bytes.
// stream: the codes come from memory.
template <int R, bool kPacked, bool kStream>
inline void segment_256(const uint8_t* codes, const int8_t* x, int64_t x_step, int64_t steps, const SegmentEnd& end) {
  static_assert(R >= 1 && R <= 6, "12 sums fit");
  alignas(32) static constexpr uint8_t kMask[32] = {15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15,
                                                    15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15};
  alignas(32) static constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  alignas(32) int32_t sums[R * 16];
  int64_t more = 0;
  __asm__ volatile(
      CPULLM_DOTS
      "mov %c[params](%[end]), %[x]\n"
      "mov %c[sums_at](%[end]), %[codes]\n"  // only the minimum form has them
      "test %[codes], %[codes]\n"
      "jnz 1f\n"
      "test %[begin], %[begin]\n"
      "jnz 1f\n"
      "vmovdqa (%[x]), %%ymm12\nvmovdqa 32(%[x]), %%ymm13\n"
      "mov %c[minus](%[end]), %[x]\n" CPULLM_EACH(CPULLM_MINUS)
      "mov %c[params](%[end]), %[x]\n"
      "1:\n" CPULLM_EACH(CPULLM_FLOAT)
      "vmovaps 64(%[x]), %%ymm12\nvmovaps 96(%[x]), %%ymm13\n"
      "mov %c[block](%[end]), %[x]\n"
      "cmpl $0, %c[first](%[end])\n"
      "jz 2f\n" CPULLM_EACH(CPULLM_FIRST)
      "jmp 3f\n"
      "2:\n" CPULLM_EACH(CPULLM_NEXT)
      "3:\n"
      "test %[codes], %[codes]\n"
      "jz 4f\n"
      "mov %c[params](%[end]), %[x]\n"
      "vmovaps (%[x]), %%ymm12\nvmovaps 32(%[x]), %%ymm13\n" CPULLM_EACH(CPULLM_MINIMUM)
      "mov %c[block](%[end]), %[x]\n"
      "4:\n"
      "cmpl $0, %c[last](%[end])\n"
      "jnz 5f\n" CPULLM_EACH(CPULLM_KEEP)
      "jmp 6f\n"
      "5:\n"
      "mov %c[x_scale](%[end]), %[codes]\n"
      "mov %c[y](%[end]), %[x]\n" CPULLM_EACH(CPULLM_LAST)
      "6:\n"
      : [codes] "+&r"(codes), [x] "+&r"(x), [steps] "+&r"(steps), [more] "+&r"(more)
      : [x_step] "r"(x_step), [x_step_3] "r"(3 * x_step), [start] "r"(end.start), [begin] "r"(end.begin), [sums] "r"(sums),
        [mask] "m"(kMask), [ones] "m"(kOnes), [rows] "i"(R), [packed] "i"(int(kPacked)), [stream] "i"(int(kStream)),
        [bytes] "i"(kPacked ? 512 : 1024), [end] "r"(&end), [params] "i"(__builtin_offsetof(SegmentEnd, params)),
        [minus] "i"(__builtin_offsetof(SegmentEnd, minus)), [sums_at] "i"(__builtin_offsetof(SegmentEnd, sums)),
        [x_scale] "i"(__builtin_offsetof(SegmentEnd, x_scale)), [block] "i"(__builtin_offsetof(SegmentEnd, block)),
        [y] "i"(__builtin_offsetof(SegmentEnd, y)), [first] "i"(__builtin_offsetof(SegmentEnd, first)),
        [last] "i"(__builtin_offsetof(SegmentEnd, last))
      : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15", "memory", "cc");
}
#undef CPULLM_CODES
#undef CPULLM_IF
#undef CPULLM_EACH
#undef CPULLM_FOUR
#undef CPULLM_STEPS
#undef CPULLM_START
#undef CPULLM_ADD_BEGIN
#undef CPULLM_DOT
#undef CPULLM_EVEN
#undef CPULLM_ODD
#undef CPULLM_BEGIN
#undef CPULLM_ZERO
#undef CPULLM_ZEROS
#undef CPULLM_DOTS
#undef CPULLM_DOT_FIRST
#undef CPULLM_FIRST_STEP
#undef CPULLM_NEXT_STEP
#undef CPULLM_WIDEN
#undef CPULLM_ADD
#undef CPULLM_PUT
#undef CPULLM_ADD_START
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
