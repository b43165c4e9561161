// Dot products of the 256-bit levels, one column pass (16 of a panel's 32 columns): u8 codes times s8 activations, exact
// in int32. In assembly because GCC 12 spills sums kept in arrays.
#pragma once

#include <immintrin.h>

#include "segment.h"

namespace cpullm {
namespace {

// clang-format off
// Codes of step `s` of an iteration to ymm12 and ymm13; ymm15 is the mask 15 of packed codes.
#define CPULLM_CODES(s)                                                                               \
  ".if %c[packed]\nvmovdqu 64*" #s "(%[codes]), %%ymm13\n"                                            \
  "vpand %%ymm15, %%ymm13, %%ymm12\nvpsrlw $4, %%ymm13, %%ymm13\nvpand %%ymm15, %%ymm13, %%ymm13\n"   \
  ".if %c[stream]\nprefetcht0 4096+64*" #s "(%[codes])\n.endif\n.else\n"                              \
  "vmovdqu 128*" #s "(%[codes]), %%ymm12\nvmovdqu 128*" #s "+64(%[codes]), %%ymm13\n"                 \
  ".if %c[stream]\nprefetcht0 4096+128*" #s "(%[codes])\nprefetcht0 4160+128*" #s "(%[codes])\n.endif\n.endif\n"
#define CPULLM_ZERO(n) "vpxor %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n"
#define CPULLM_ZERO_ALL                                                                              \
  CPULLM_ZERO(0) CPULLM_ZERO(1) CPULLM_ZERO(2) CPULLM_ZERO(3) CPULLM_ZERO(4) CPULLM_ZERO(5)          \
  CPULLM_ZERO(6) CPULLM_ZERO(7) CPULLM_ZERO(8) CPULLM_ZERO(9) CPULLM_ZERO(10) CPULLM_ZERO(11)
#define CPULLM_CLOBBERS                                                                              \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",  \
  "xmm12", "xmm13", "xmm14", "xmm15", "memory"

#ifdef CPULLM_VNNI
// Registers: ymm0-11 sums of row i in 2i and 2i + 1, or, for at most 3 rows, of odd steps in 6 + 2i and 7 + 2i.
#define CPULLM_ROW(i, a, b)                                                                                \
  ".if %c[rows] > " #i "\nvpbroadcastd 4*" #i "(%[x]), %%ymm14\n"                                          \
  "%{vex%} vpdpbusd %%ymm14, %%ymm12, %%ymm" #a "\n%{vex%} vpdpbusd %%ymm14, %%ymm13, %%ymm" #b "\n.endif\n"
#define CPULLM_ROWS \
  CPULLM_ROW(0, 0, 1) CPULLM_ROW(1, 2, 3) CPULLM_ROW(2, 4, 5) CPULLM_ROW(3, 6, 7) CPULLM_ROW(4, 8, 9) CPULLM_ROW(5, 10, 11)
#define CPULLM_ODD_ROWS ".if %c[rows] <= 3\n" CPULLM_ROW(0, 6, 7) CPULLM_ROW(1, 8, 9) CPULLM_ROW(2, 10, 11) \
  ".else\n" CPULLM_ROWS ".endif\n"
#define CPULLM_STORE(i, a, b) ".if %c[rows] > " #i "\nvmovdqa %%ymm" #a ", 64*" #i "(%[out])\n" \
  "vmovdqa %%ymm" #b ", 64*" #i "+32(%[out])\n.endif\n"

// out [R, 16], 32-byte aligned, = rows x [.., 4] (x_step bytes from step to step) times `steps` blocks of codes, steps a
// multiple of 8. packed: blocks of 64 bytes of nibbles; else 128 bytes. stream: the codes come from memory.
template <int R, bool kPacked, bool kStream>
inline void dot_tile_avx_vnni(const uint8_t* codes, const int8_t* x, int64_t x_step, int64_t steps, int32_t* out) {
  static_assert(R >= 1 && R <= 6, "12 sums fit");
  __asm__ volatile(
      CPULLM_ZERO_ALL
      ".if %c[packed]\nvmovd %k[mask], %%xmm15\nvpbroadcastd %%xmm15, %%ymm15\n.endif\n"
      ".p2align 5\n1:\n"
      CPULLM_CODES(0) CPULLM_ROWS "add %[x_step], %[x]\n"
      CPULLM_CODES(1) CPULLM_ODD_ROWS "add %[x_step], %[x]\n"
      "add $%c[bytes], %[codes]\n"
      "sub $2, %[steps]\n"
      "jnz 1b\n"
      ".if %c[rows] <= 3\n"
      "vpaddd %%ymm6, %%ymm0, %%ymm0\nvpaddd %%ymm7, %%ymm1, %%ymm1\nvpaddd %%ymm8, %%ymm2, %%ymm2\n"
      "vpaddd %%ymm9, %%ymm3, %%ymm3\nvpaddd %%ymm10, %%ymm4, %%ymm4\nvpaddd %%ymm11, %%ymm5, %%ymm5\n.endif\n"
      CPULLM_STORE(0, 0, 1) CPULLM_STORE(1, 2, 3) CPULLM_STORE(2, 4, 5)
      CPULLM_STORE(3, 6, 7) CPULLM_STORE(4, 8, 9) CPULLM_STORE(5, 10, 11)
      : [codes] "+&r"(codes), [x] "+&r"(x), [steps] "+&r"(steps)
      : [x_step] "r"(x_step), [out] "r"(out), [mask] "r"(0x0f0f0f0f), [rows] "i"(R), [packed] "i"(int(kPacked)),
        [stream] "i"(int(kStream)), [bytes] "i"(kPacked ? 128 : 256)
      : CPULLM_CLOBBERS);
}
#undef CPULLM_ROWS
#undef CPULLM_ODD_ROWS
#else
// Without VNNI. A pair of products is at most 2 * 15 * 127 = 3810, so the 8 steps of a chunk stay below 8 * 3810 = 30480
// in int16. Registers: ymm0-9 int16 sums of row i in 2i and 2i + 1, ymm10 pairs of products, ymm11 ones.
#define CPULLM_ROW(i, a, b)                                                                          \
  ".if %c[rows] > " #i "\nvpbroadcastd 4*" #i "(%[x]), %%ymm14\n"                                    \
  "vpmaddubsw %%ymm14, %%ymm12, %%ymm10\nvpaddw %%ymm10, %%ymm" #a ", %%ymm" #a "\n"                 \
  "vpmaddubsw %%ymm14, %%ymm13, %%ymm10\nvpaddw %%ymm10, %%ymm" #b ", %%ymm" #b "\n.endif\n"
#define CPULLM_STEP(s)                                                                               \
  CPULLM_CODES(s) CPULLM_ROW(0, 0, 1) CPULLM_ROW(1, 2, 3) CPULLM_ROW(2, 4, 5) CPULLM_ROW(3, 6, 7)    \
  CPULLM_ROW(4, 8, 9) "add %[x_step], %[x]\n"
#define CPULLM_WIDEN(at, a)                                                                          \
  "vpmaddwd %%ymm11, %%ymm" #a ", %%ymm" #a "\nvpaddd " #at "(%[out]), %%ymm" #a ", %%ymm" #a "\n"   \
  "vmovdqa %%ymm" #a ", " #at "(%[out])\n" CPULLM_ZERO(a)
#define CPULLM_STORE(i, a, b) \
  ".if %c[rows] > " #i "\n" CPULLM_WIDEN(64*i, a) CPULLM_WIDEN(64*i+32, b) ".endif\n"

// out [R, 16], 32-byte aligned, = rows x [.., 4] (x_step bytes from step to step) times `steps` blocks of codes 0..15,
// steps a multiple of 8. packed: blocks of 64 bytes of nibbles; else 128 bytes. stream: the codes come from memory.
template <int R, bool kPacked, bool kStream>
inline void dot_tile_avx2(const uint8_t* codes, const int8_t* x, int64_t x_step, int64_t steps, int32_t* out) {
  static_assert(R >= 1 && R <= 5, "10 sums fit");
  for (int i = 0; i < 2 * R; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(out) + i, _mm256_setzero_si256());
  __asm__ volatile(
      CPULLM_ZERO_ALL
      ".if %c[packed]\nvmovd %k[mask], %%xmm15\nvpbroadcastd %%xmm15, %%ymm15\n.endif\n"
      "vpcmpeqw %%ymm11, %%ymm11, %%ymm11\nvpsrlw $15, %%ymm11, %%ymm11\n"
      ".p2align 5\n1:\n"
      CPULLM_STEP(0) CPULLM_STEP(1) CPULLM_STEP(2) CPULLM_STEP(3)
      CPULLM_STEP(4) CPULLM_STEP(5) CPULLM_STEP(6) CPULLM_STEP(7)
      CPULLM_STORE(0, 0, 1) CPULLM_STORE(1, 2, 3) CPULLM_STORE(2, 4, 5) CPULLM_STORE(3, 6, 7) CPULLM_STORE(4, 8, 9)
      "add $%c[bytes], %[codes]\n"
      "sub $8, %[steps]\n"
      "jnz 1b\n"
      : [codes] "+&r"(codes), [x] "+&r"(x), [steps] "+&r"(steps)
      : [x_step] "r"(x_step), [out] "r"(out), [mask] "r"(0x0f0f0f0f), [rows] "i"(R), [packed] "i"(int(kPacked)),
        [stream] "i"(int(kStream)), [bytes] "i"(kPacked ? 512 : 1024)
      : CPULLM_CLOBBERS);
}
#undef CPULLM_STEP
#undef CPULLM_WIDEN
#endif
#undef CPULLM_ROW
#undef CPULLM_STORE
#undef CPULLM_CLOBBERS
#undef CPULLM_ZERO_ALL
#undef CPULLM_ZERO
#undef CPULLM_CODES
// clang-format on

}  // namespace
}  // namespace cpullm
