// Tiles of the avx512 level, 2 rows and more: a run of segments of a tile is one piece of assembly, in which int32
// sums, the fp32 chain of the activation block and most of the output's never leave the registers. The chain of
// ref.cpp, bit for bit in what comes out.
//
// In assembly because GCC 12 moves and spills sums kept in arrays by intrinsics. 5 rows x 32 columns is what fits: of
// 8 rows the chains are in memory, where a store of 64 bytes takes the time of two dot products of Zen 4 and Zen 5;
// that cost 15 % at group 32.
// Two forms, by `wide_dots`. Zen 5 makes as many dot products as loads, two a cycle of 4 cycles' latency (kWide):
// inputs are broadcast to a register that both halves of the panel share, and up to 4 rows have second sums for odd
// steps. Registers are then left for the outputs' chains of 2 rows of 4 and of 4 of 5: the others change in memory
// every 128 inputs. Elsewhere inputs come from memory: on Zen 4 the other form loses 1 to 4 %, and on Intel additions
// take the dot products' ports. A lone tile of 2 or 3 rows waits for memory, and the fewer its instructions, the
// further ahead a core asks for codes: as elsewhere.
// Nibbles are parted once per tile, on units that the dot products leave free on Zen and not on Intel: the high ones
// stay where they are, 16 times the code, and their columns take a 16th of the scale: exact of scales above 2^-122.
// All tiles pass over the codes of a run, in L1, before the next run, and meanwhile each asks for its share of that
// one's.
// Bound on Zen, where dot products and fma share two units: 64 of 75 slots at group 32, 85 %; 94 % at 128.
// A block's chain starts from +0, as ref's; row_i8 and amx start from the first product: an output may differ only
// where that is -0, and sums of outputs start from +0, which takes either.
// Registers: zmm0-9 sums of row i in 2i and 2i + 1; zmm12-21 the block's chains; zmm28 the mask 15 and zmm29 inputs,
// or the fifth row's output; zmm30-31 codes of 16 columns each, zero points, scales, minima; in the rest second sums
// and the output's chains, as CPULLM_EACH lists them.
#pragma once

#include <immintrin.h>

namespace cpullm {
namespace {

constexpr int kRunRows = 5;  // most rows of a tile
constexpr int64_t kRunBytes = 8192;  // codes of a run: with the next ones, half of L1
// Inputs at the end that are no run of their own: sums would move for little. A run ends where blocks of activations do.
constexpr int64_t kRunTail = kActBlock;
static_assert(kRunTail % kActBlock == 0 && kRunBytes / 32 % kActBlock == 0, "runs are whole blocks");

// What a run needs besides.
struct Run {
  const BlockSegment* end;
  const float* from;  // [rows, 32], rows from_step bytes apart: sums to go on with
  float* y;  // the same, y_step bytes apart: where they go
  const uint16_t* scales;  // [groups, 32] from the run's first group on
  const void* zeros;  // the same
  int64_t bf16;  // whether scales and minima are
  uint32_t low_nibbles, high_nibbles;
  float high_scale;  // what sums of the high ones take
  int64_t from_step, y_step;
  alignas(64) float sums[kRunRows * kPanel];  // the output's chains that no registers are left for
};
static_assert(__builtin_offsetof(Run, from) == 8 && __builtin_offsetof(Run, y) == 16 &&
                  __builtin_offsetof(Run, scales) == 24 && __builtin_offsetof(Run, zeros) == 32 &&
                  __builtin_offsetof(Run, bf16) == 40 && __builtin_offsetof(Run, low_nibbles) == 48 &&
                  __builtin_offsetof(Run, high_nibbles) == 52 && __builtin_offsetof(Run, high_scale) == 56 &&
                  __builtin_offsetof(Run, from_step) == 64 && __builtin_offsetof(Run, y_step) == 72 &&
                  __builtin_offsetof(Run, sums) == 128 && __builtin_offsetof(BlockSegment, ends_block) == 4 &&
                  __builtin_offsetof(BlockSegment, ends_group) == 8 && sizeof(BlockSegment) == 16,
              "as the assembly has them");

// clang-format off
#define CPULLM_END "(%[run])"
#define CPULLM_FROM "8(%[run])"
#define CPULLM_Y "16(%[run])"
#define CPULLM_SCALES "24(%[run])"
#define CPULLM_ZEROS "32(%[run])"
#define CPULLM_BF16 "40(%[run])"
#define CPULLM_LOW "48(%[run])"
#define CPULLM_HIGH "52(%[run])"
#define CPULLM_HIGH_SCALE "56(%[run])"
#define CPULLM_FROM_STEP "64(%[run])"
#define CPULLM_Y_STEP "72(%[run])"
#define CPULLM_SUMS "128+128*"
// Row, its sums, the block's chains, the output's, second sums.
#define CPULLM_EACH(ROW) \
  ROW(0, 0, 1, 12, 13, 24, 25, 8, 9) ROW(1, 2, 3, 14, 15, 26, 27, 20, 21) ROW(2, 4, 5, 16, 17, 22, 23, 10, 11) \
  ROW(3, 6, 7, 18, 19, 10, 11, 22, 23) ROW(4, 8, 9, 20, 21, 28, 29, 28, 29)
#define CPULLM_IF(i, ...) ".if %c[rows] > " #i "\n" __VA_ARGS__ ".endif\n"
#define CPULLM_LOAD(i, a, b, c, d, e, f, g, h) \
  CPULLM_IF(i, "vmovaps (%[p]), %%zmm" #e "\nvmovaps 64(%[p]), %%zmm" #f "\nadd " CPULLM_FROM_STEP ", %[p]\n"             \
               ".if %c[kept] <= " #i "\nvmovaps %%zmm" #e ", " CPULLM_SUMS #i "(%[run])\n"                                \
               "vmovaps %%zmm" #f ", 64+" CPULLM_SUMS #i "(%[run])\n.endif\n")
#define CPULLM_KEEP(i, a, b, c, d, e, f, g, h) \
  CPULLM_IF(i, ".if %c[kept] <= " #i "\nvmovaps " CPULLM_SUMS #i "(%[run]), %%zmm" #e "\n"                                \
               "vmovaps 64+" CPULLM_SUMS #i "(%[run]), %%zmm" #f "\n.endif\n"                                            \
               "vmovups %%zmm" #e ", (%[p])\nvmovups %%zmm" #f ", 64(%[p])\nadd " CPULLM_Y_STEP ", %[p]\n")
#define CPULLM_CLEAR(i, a, b, c, d, e, f, g, h) \
  CPULLM_IF(i, "vpxord %%zmm" #c ", %%zmm" #c ", %%zmm" #c "\nvpxord %%zmm" #d ", %%zmm" #d ", %%zmm" #d "\n")
// What sums start from: minus times the zero point, in the minimum form 0.
#define CPULLM_START(i, a, b, c, d, e, f, g, h)                                                                   \
  CPULLM_IF(i, ".if %c[form] == 0\n"                                                                              \
               "vpslld $(7-4*%c[packed]), 4*" #i "(%[minus])%{1to16%}, %%zmm" #a "\n"                             \
               "vpslld $(4*%c[packed]), %%zmm" #a ", %%zmm" #b "\n.elseif %c[form] == 1\n"                        \
               "vpbroadcastd 4*" #i "(%[minus]), %%zmm" #a "\nvpmaddwd %%zmm31, %%zmm" #a ", %%zmm" #b "\n"        \
               "vpmaddwd %%zmm30, %%zmm" #a ", %%zmm" #a "\n.elseif %c[split]\n"                                  \
               "vpxord %%zmm" #a ", %%zmm" #a ", %%zmm" #a "\nvpxord %%zmm" #b ", %%zmm" #b ", %%zmm" #b "\n.endif\n" \
               ".if %c[split]\nvmovdqa64 128*" #i "(%[apart]), %%zmm" #g "\n"                                     \
               "vmovdqa64 128*" #i "+64(%[apart]), %%zmm" #h "\n.elseif %c[form] == 2\n"                          \
               "vmovdqa64 128*" #i "(%[apart]), %%zmm" #a "\nvmovdqa64 128*" #i "+64(%[apart]), %%zmm" #b           \
               "\n.else\nvpaddd 128*" #i "(%[apart]), %%zmm" #a ", %%zmm" #a                                       \
               "\nvpaddd 128*" #i "+64(%[apart]), %%zmm" #b ", %%zmm" #b "\n.endif\n")
#define CPULLM_DOT(i, a, b, c, d, e, f, g, h)                                                            \
  CPULLM_IF(i, ".if %c[wide]\nvpbroadcastd 4*" #i "(%[x]), %%zmm29\n"                    \
               "vpdpbusd %%zmm29, %%zmm30, %%zmm" #a "\nvpdpbusd %%zmm29, %%zmm31, %%zmm" #b "\n.else\n"  \
               "vpdpbusd 4*" #i "(%[x])%{1to16%}, %%zmm30, %%zmm" #a "\n"                                 \
               "vpdpbusd 4*" #i "(%[x])%{1to16%}, %%zmm31, %%zmm" #b "\n.endif\n")
#define CPULLM_DOT_OTHER(i, a, b, c, d, e, f, g, h) CPULLM_DOT(i, g, h, c, d, e, f, a, b)
#define CPULLM_JOIN(i, a, b, c, d, e, f, g, h) \
  CPULLM_IF(i, "vpaddd %%zmm" #g ", %%zmm" #a ", %%zmm" #a "\nvpaddd %%zmm" #h ", %%zmm" #b ", %%zmm" #b "\n")
#define CPULLM_CODES(s)                                                                                       \
  ".if %c[packed]\nvmovdqu64 64*" #s "(%[codes]), %%zmm31\n"                                                  \
  ".if %c[rows] <= 4 || %c[wide]\nvpandd %%zmm28, %%zmm31, %%zmm30\nvpandnd %%zmm31, %%zmm28, %%zmm31\n.else\n" \
  "vpandd " CPULLM_LOW "%{1to16%}, %%zmm31, %%zmm30\nvpandd " CPULLM_HIGH "%{1to16%}, %%zmm31, %%zmm31\n.endif\n" \
  "prefetcht0 (%[ask])\n.if %c[few]\nprefetcht1 8192(%[ask])\n.endif\nadd %[ask_step], %[ask]\n.else\n"     \
  "vmovdqu64 128*" #s "(%[codes]), %%zmm30\nvmovdqu64 128*" #s "+64(%[codes]), %%zmm31\n"                     \
  "prefetcht0 (%[ask])\nprefetcht0 (%[ask],%[ask_step])\n"                                                    \
  ".if %c[few]\nprefetcht1 8192(%[ask])\nprefetcht1 8192(%[ask],%[ask_step])\n.endif\n"                     \
  "lea (%[ask],%[ask_step],2), %[ask]\n.endif\n"
#define CPULLM_STEPS(s, t)                                                                                    \
  CPULLM_CODES(s) CPULLM_EACH(CPULLM_DOT) "add %[x_step], %[x]\n"                                             \
  CPULLM_CODES(t) ".if %c[split]\n" CPULLM_EACH(CPULLM_DOT_OTHER) ".else\n" CPULLM_EACH(CPULLM_DOT) ".endif\n" \
  "add %[x_step], %[x]\n"
#define CPULLM_FLOAT(i, a, b, c, d, e, f, g, h) \
  CPULLM_IF(i, "vcvtdq2ps %%zmm" #a ", %%zmm" #a "\nvcvtdq2ps %%zmm" #b ", %%zmm" #b "\n")
#define CPULLM_CHAIN(i, a, b, c, d, e, f, g, h) \
  CPULLM_IF(i, "vfmadd231ps %%zmm30, %%zmm" #a ", %%zmm" #c "\nvfmadd231ps %%zmm31, %%zmm" #b ", %%zmm" #d "\n")
#define CPULLM_MINIMUM(i, a, b, c, d, e, f, g, h)                                       \
  CPULLM_IF(i, "vcvtdq2ps 4*" #i "(%[minus])%{1to16%}, %%zmm" #a "\n"             \
               "vfnmadd231ps %%zmm30, %%zmm" #a ", %%zmm" #c "\nvfnmadd231ps %%zmm31, %%zmm" #a ", %%zmm" #d "\n")
#define CPULLM_BLOCK(i, a, b, c, d, e, f, g, h)                                                                   \
  CPULLM_IF(i, ".if %c[kept] > " #i "\n"                                                                           \
               "vfmadd231ps 4*" #i "(%[x_scale])%{1to16%}, %%zmm" #c ", %%zmm" #e "\n"                             \
               "vfmadd231ps 4*" #i "(%[x_scale])%{1to16%}, %%zmm" #d ", %%zmm" #f "\n.else\n"                      \
               "vbroadcastss 4*" #i "(%[x_scale]), %%zmm29\n"                                                      \
               "vfmadd213ps " CPULLM_SUMS #i "(%[run]), %%zmm29, %%zmm" #c "\n"                                    \
               "vfmadd213ps 64+" CPULLM_SUMS #i "(%[run]), %%zmm29, %%zmm" #d "\n"                                 \
               "vmovaps %%zmm" #c ", " CPULLM_SUMS #i "(%[run])\n"                                                 \
               "vmovaps %%zmm" #d ", 64+" CPULLM_SUMS #i "(%[run])\n.endif\n")
// Scales or minima of the group, from p on.
#define CPULLM_WIDEN                                                                                    \
  "cmpl $0, " CPULLM_BF16 "\nje 4f\n"                                                                   \
  "vpmovzxwd (%[p],%[at],2), %%zmm30\nvpmovzxwd 32(%[p],%[at],2), %%zmm31\n"                            \
  "vpslld $16, %%zmm30, %%zmm30\nvpslld $16, %%zmm31, %%zmm31\njmp 5f\n"                                \
  "4:\nvcvtph2ps (%[p],%[at],2), %%zmm30\nvcvtph2ps 32(%[p],%[at],2), %%zmm31\n5:\nprefetcht0 256(%[p],%[at],2)\n"

// R rows x [steps, tile, 4] times the run's codes. All pointers stand at the run's begin: minus and x_scale [.., tile].
// apart [segments, rows, 32], 64-byte aligned: inputs kept apart times their codes; added without asking, since which
// segments have some is as good as random, and a wrong guess costs a third of a segment of 32 inputs.
// ask: codes to bring to L1 meanwhile, ask_step bytes for each 64 of codes. kFew: few tiles are there, memory is what
// a run may wait for: those of the run after to L2, on whose way may be more lines than on that to L1.
template <int R, bool kWide, bool kPacked, Zeros kForm, bool kFew>
void dot_run(const uint8_t* codes, const int8_t* x, int64_t tile, const int32_t* minus, const float* x_scale,
             const BlockSegment* segment, const int32_t* apart, uintptr_t ask, int64_t ask_step, Run& run) {
  constexpr bool kSplit = kWide && R <= 4;  // two sums
  constexpr int kKept = !kWide ? R : R == 5 ? 4 : R == 4 ? 2 : R;  // rows whose outputs' chains are in registers
  static_assert(R >= 1 && R <= kRunRows, "sums and chains fit");
  static_assert(kChunk % (8 * kStep) == 0, "steps come in eights");
  const void* p;
  int64_t steps, at = 0;
  __asm__ volatile(
      "mov " CPULLM_FROM ", %[p]\n" CPULLM_EACH(CPULLM_LOAD)
      ".if %c[rows] <= 4 || %c[wide]\nvpbroadcastd " CPULLM_LOW ", %%zmm28\n.endif\n"
      "0:\n" CPULLM_EACH(CPULLM_CLEAR)
      "1:\n"
      "mov (%[segment]), %k[steps]\n"
      ".if %c[form] == 1\nmov " CPULLM_ZEROS ", %[p]\n"
      "vpmovzxbd (%[p],%[at]), %%zmm30\nvpmovzxbd 16(%[p],%[at]), %%zmm31\nprefetcht0 128(%[p],%[at])\n"
      ".if %c[packed]\nvpslld $4, %%zmm31, %%zmm31\n.endif\n.endif\n"
      CPULLM_EACH(CPULLM_START)
      "add $128*%c[rows], %[apart]\n"
      ".p2align 5\n2:\n"
      CPULLM_STEPS(0, 1) CPULLM_STEPS(2, 3) CPULLM_STEPS(4, 5) CPULLM_STEPS(6, 7)
      "add $512*(2-%c[packed]), %[codes]\n"
      "sub $8, %k[steps]\n"
      "jnz 2b\n"
      ".if %c[split]\n" CPULLM_EACH(CPULLM_JOIN) ".endif\n"
      CPULLM_EACH(CPULLM_FLOAT)
      "mov " CPULLM_SCALES ", %[p]\n" CPULLM_WIDEN
      ".if %c[packed]\nvmulps " CPULLM_HIGH_SCALE "%{1to16%}, %%zmm31, %%zmm31\n.endif\n" CPULLM_EACH(CPULLM_CHAIN)
      ".if %c[form] == 2\n"
      "mov " CPULLM_ZEROS ", %[p]\n" CPULLM_WIDEN CPULLM_EACH(CPULLM_MINIMUM) ".endif\n"
      "add %[x_step], %[minus]\n"
      "movslq 8(%[segment]), %[p]\n"
      "add %[p], %[at]\n"
      "cmpl $0, 4(%[segment])\n"
      "lea 16(%[segment]), %[segment]\n"
      "je 1b\n" CPULLM_EACH(CPULLM_BLOCK)
      "add %[x_step], %[x_scale]\n"
      "cmp " CPULLM_END ", %[segment]\n"
      "jne 0b\n"
      "mov " CPULLM_Y ", %[p]\n" CPULLM_EACH(CPULLM_KEEP)
      : [codes] "+&r"(codes), [x] "+&r"(x), [segment] "+&r"(segment), [x_scale] "+&r"(x_scale), [minus] "+&r"(minus),
        [apart] "+&r"(apart), [ask] "+&r"(ask), [at] "+&r"(at), [p] "=&r"(p), [steps] "=&r"(steps)
      : [run] "r"(&run), [x_step] "r"(tile * kStep), [ask_step] "r"(ask_step), [rows] "i"(R), [packed] "i"(int(kPacked)),
        [form] "i"(int(kForm)), [few] "i"(int(kFew)), [wide] "i"(int(kWide)), [split] "i"(int(kSplit)), [kept] "i"(kKept)
      : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24",
        "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31", "memory", "cc");
}
#undef CPULLM_END
#undef CPULLM_FROM
#undef CPULLM_Y
#undef CPULLM_SCALES
#undef CPULLM_ZEROS
#undef CPULLM_BF16
#undef CPULLM_LOW
#undef CPULLM_HIGH
#undef CPULLM_HIGH_SCALE
#undef CPULLM_FROM_STEP
#undef CPULLM_Y_STEP
#undef CPULLM_SUMS
#undef CPULLM_EACH
#undef CPULLM_IF
#undef CPULLM_LOAD
#undef CPULLM_KEEP
#undef CPULLM_CLEAR
#undef CPULLM_START
#undef CPULLM_DOT
#undef CPULLM_DOT_OTHER
#undef CPULLM_JOIN
#undef CPULLM_CODES
#undef CPULLM_STEPS
#undef CPULLM_FLOAT
#undef CPULLM_CHAIN
#undef CPULLM_MINIMUM
#undef CPULLM_BLOCK
#undef CPULLM_WIDEN
// clang-format on

constexpr int64_t kRunSegments = (kRunBytes / 16 + kRunTail) / kChunk;  // most of a run

// The inputs apart of a block of rows, run by run and tile by tile: made once, since all panels go by.
struct ApartList {
  // step, shift: where the run's codes have the input, 4 to a step; place: segment * rows + row of the tile's sums;
  // value: in the lower half.
  struct Entry {
    uint16_t step, place;
    int32_t value, shift;
  };
  static constexpr int64_t kMost = 4608;  // entries: one per block of activations of each row
  static constexpr int64_t kMostTiles = 640;  // of all runs together
  int64_t count, tiles;
  Entry entries[kMost];
  uint16_t ends[kMostTiles];

  // Whether there is room for all that rows of k inputs may have apart.
  static bool fits(int64_t rows, int64_t tiles, int64_t k, int64_t run_k) {
    return rows * ((k + kActBlock - 1) / kActBlock) <= kMost && tiles * (k / run_k + 1) <= kMostTiles;
  }

  void clear() { count = tiles = 0; }

  // Those of the next tile of a run. apart_rows, apart: from its first segment on.
  void add(const uint32_t* apart_rows, const int32_t* apart, int64_t tile, int64_t rows, const BlockSegment* segments,
           int64_t segment_count) {
    for (int64_t s = 0; s < segment_count; ++s) {
      for (uint32_t left = apart_rows[s]; left; left &= left - 1) {
        const int64_t r = __builtin_ctz(left);
        const int32_t value = apart[s * tile + r], input = segments[s].begin + (value & 255);
        entries[count++] = {uint16_t(input / kStep), uint16_t(s * rows + r), value >> 8 & 0xffff,
                            input % int32_t(kStep) * 8};
      }
    }
    ends[tiles++] = uint16_t(count);
  }
};

// sums [segments, rows, 32], zero before: inputs kept apart times their codes, as dot_run has them.
template <bool kPacked>
inline void place_apart(const ApartList::Entry* entry, const ApartList::Entry* end, const uint8_t* codes,
                        int32_t* sums) {
  for (; entry != end; ++entry) {
    const __m512i shift = _mm512_set1_epi32(entry->shift), value = _mm512_set1_epi32(entry->value);
    const uint8_t* const from = codes + entry->step * int64_t(kPacked ? 64 : 128);
    const __m512i low = _mm512_srlv_epi32(_mm512_loadu_si512(from), shift);
    const __m512i high = kPacked ? low : _mm512_srlv_epi32(_mm512_loadu_si512(from + 64), shift);
    int32_t* const at = sums + entry->place * kPanel;
    const auto store = [&](int32_t* to, __m512i codes_, int mask) {
      _mm512_store_si512(to, _mm512_madd_epi16(_mm512_and_si512(codes_, _mm512_set1_epi32(mask)), value));
    };
    store(at, low, kPacked ? 0x0f : 0xff);
    store(at + 16, high, kPacked ? 0xf0 : 0xff);
  }
}

// Zeros there again.
inline void clear_apart(const ApartList::Entry* entry, const ApartList::Entry* end, int32_t* sums) {
  for (; entry != end; ++entry) {
    int32_t* const at = sums + entry->place * kPanel;
    _mm512_store_si512(at, _mm512_setzero_si512());
    _mm512_store_si512(at + 16, _mm512_setzero_si512());
  }
}

using DotRun = void (*)(const uint8_t* codes, const int8_t* x, int64_t tile, const int32_t* minus, const float* x_scale,
                        const BlockSegment* segment, const int32_t* apart, uintptr_t ask, int64_t ask_step, Run& run);

template <bool kWide, bool kPacked, Zeros kForm, bool kFew>
DotRun dot_run_of(int64_t rows) {
  switch (rows) {
    case 1: return dot_run<1, kWide, kPacked, kForm, kFew>;
    case 2: return dot_run<2, kWide, kPacked, kForm, kFew>;
    case 3: return dot_run<3, kWide, kPacked, kForm, kFew>;
    case 4: return dot_run<4, kWide, kPacked, kForm, kFew>;
    case 5: return dot_run<5, kWide, kPacked, kForm, kFew>;
    default: __builtin_trap();  // a tile this level does not make
  }
}

template <bool kPacked, Zeros kForm>
DotRun dot_run_of(int64_t rows, int64_t tiles) {
  if (wide_dots && (tiles > 1 || rows > 3))
    return tiles <= 4 ? dot_run_of<true, kPacked, kForm, true>(rows) : dot_run_of<true, kPacked, kForm, false>(rows);
  return tiles == 1 ? dot_run_of<false, kPacked, kForm, true>(rows) : dot_run_of<false, kPacked, kForm, false>(rows);
}

struct alignas(64) RunScratch {
  int32_t apart[kRunSegments * kRunRows * kPanel];
  float zeros[kPanel];
  float y[(kBlockRows + kRunRows) * kPanel];
  ApartList list;
};
static_assert(sizeof(RunScratch) <= kScratchBytes, "scratch memory must hold it");

// Where a run from input k0 on ends.
inline int64_t run_end(const Weight& w, int64_t k0, int64_t run_k) {
  return w.k_padded - k0 <= run_k + kRunTail ? w.k_padded : k0 + run_k;
}

// All inputs apart of rows [row0, row_end).
inline void list_apart(const QuantizedRows& x, const Weight& w, int64_t run_k, int64_t row0, int64_t row_end,
                       ApartList& list) {
  BlockSegment segments[kRunSegments];
  list.clear();
  for (int64_t k0 = 0, k1 = 0, first = 0; k0 < w.k_padded; k0 = k1) {
    k1 = run_end(w, k0, run_k);
    const int64_t count = block_segments(k0, k1, w.group, segments);
    for (int64_t r = row0; r < row_end; r += x.tile) {
      const int64_t s = r * x.segments + first * x.tile;
      list.add(x.apart_rows + r / x.tile * x.segments + first, x.apart + s, x.tile, min_of(x.tile, x.m - r), segments,
               count);
    }
    first += count;
  }
}

// linear_i8 of 2 and more rows.
template <bool kPacked, Zeros kForm>
void linear_i8_runs(const Weight& w, const QuantizedRows& x, const Output& out, Range panels, void* scratch) {
  auto& mine = *static_cast<RunScratch*>(scratch);
  constexpr int64_t kBytes = kPacked ? 16 : 32;  // of an input's codes
  constexpr int64_t kRunK = kRunBytes / kBytes;
  constexpr int64_t kZeroBytes = kForm == Zeros::integer ? 1 : 2;
  const int64_t fitting = min_of(rows_per_block(x), ApartList::kMost / x.blocks) / x.tile;
  const int64_t block_rows = even_tile((x.m + x.tile - 1) / x.tile, fitting > 0 ? fitting : 1) * x.tile;
  BlockSegment segments[kRunSegments];
  Run run{};
  run.bf16 = w.scale_type == Float::bf16;
  run.low_nibbles = 0x0f0f0f0f;
  run.high_nibbles = 0xf0f0f0f0;
  run.high_scale = 1.0f / 16;
  memset(mine.zeros, 0, sizeof mine.zeros);
  memset(mine.apart, 0, size_t(min_of(kRunSegments, x.segments) * x.tile * kPanel) * 4);
  for (int64_t row0 = 0; row0 < x.m; row0 += block_rows) {
    const int64_t row_end = min_of(row0 + block_rows, x.m), tiles = (row_end - row0 + x.tile - 1) / x.tile;
    const int64_t ask_step = (63 + tiles) / tiles;
    const bool listed = ApartList::fits(row_end - row0, tiles, x.k_padded, kRunK);
    if (listed) list_apart(x, w, kRunK, row0, row_end, mine.list);
    int64_t inputs = 0, count = 0;  // of the segments
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const uint8_t* codes = w.codes + panel * w.k_padded * kBytes;
      // Sums that are outputs as they are go there at once.
      const bool plain = out.type == Float::f32 && !out.bias && (panel + 1) * kPanel <= w.n;
      float* const to = plain ? static_cast<float*>(out.y) + row0 * out.stride + panel * kPanel : mine.y;
      const int64_t to_stride = plain ? out.stride : kPanel;
      int64_t k1, at_tile = 0;
      for (int64_t k0 = 0, first = 0; k0 < w.k_padded; k0 = k1, first += count) {
        k1 = run_end(w, k0, kRunK);
        const bool begins = k0 == 0, ends = k1 == w.k_padded;
        run.from_step = begins ? 0 : kPanel * 4;
        run.y_step = (ends ? to_stride : kPanel) * 4;
        if (kRunK % w.group || k1 - k0 != inputs) count = block_segments(k0, k1, w.group, segments);
        inputs = k1 - k0;
        run.end = segments + count;
        const int64_t at = (panel * w.groups + k0 / w.group) * kPanel;
        run.scales = w.scales + at;
        if (kForm != Zeros::symmetric) run.zeros = static_cast<const char*>(w.zeros) + at * kZeroBytes;
        uintptr_t ask = reinterpret_cast<uintptr_t>(codes + inputs * kBytes);  // may end up beyond them
        for (int64_t r = row0; r < row_end; r += x.tile, ask += uintptr_t(inputs * kBytes / 64 * ask_step)) {
          const int64_t rows = min_of(x.tile, x.m - r), s = r * x.segments + first * x.tile;
          const uint32_t* apart_rows = x.apart_rows + r / x.tile * x.segments + first;
          ApartList& list = mine.list;
          if (!listed) {
            list.clear();
            list.add(apart_rows, x.apart + s, x.tile, rows, segments, count);
            at_tile = 0;
          }
          const ApartList::Entry* const apart = list.entries + (at_tile ? list.ends[at_tile - 1] : 0);
          const ApartList::Entry* const apart_end = list.entries + list.ends[at_tile++];
          place_apart<kPacked>(apart, apart_end, codes, mine.apart);
          run.from = begins ? mine.zeros : mine.y + (r - row0) * kPanel;
          run.y = ends ? to + (r - row0) * to_stride : mine.y + (r - row0) * kPanel;
          const DotRun multiply = dot_run_of<kPacked, kForm>(rows, tiles);
          multiply(codes, x.q + r * x.k_padded + k0 * x.tile, x.tile, x.minus + s,
                   x.scale + r * x.blocks + k0 / kActBlock * x.tile, segments, mine.apart, ask, ask_step, run);
          clear_apart(apart, apart_end, mine.apart);
        }
        codes += inputs * kBytes;
      }
      for (int64_t r = row0; !plain && r < row_end; ++r) store_panel(out, w.n, r, panel, mine.y + (r - row0) * kPanel);
    }
  }
}

}  // namespace
}  // namespace cpullm
