// Many rows times a panel on the avx512 level: a run of activation blocks of a tile is one piece of assembly, and an fp32
// chain never leaves the registers: where every segment is a block of activations, the output's, else the block's. The
// same chain as linear_i8-inl.h, bit for bit in what comes out.
//
// The codes of kManyK inputs of the panel are first unpacked to signed bytes, zero points subtracted. Activations come as
// x + 128 (QuantizedRows::bias), so the int32 sums of every row start from the same -128 * sum of the column's bytes, in
// place of one multiplication per sum and segment; where a row has an input kept apart, from these plus its product. So
// the assembly has no branch for it: ManyRun::starts says where each row's are.
// Ranges: zero points are codes, z <= 15, so |c - z| <= 15 at 4 bits, 128 at 8; of 128 inputs
// |sum (x + 128) c| <= 128 * 255 * 128 < 2^23.
// A block's chain starts from +0 instead of the first product: an output may differ only where that is -0, and sums of
// outputs start from +0, which takes either.
// Activations come from L3 where they are many: those of the tile after the next are prefetched while a tile computes, a
// line for every two steps. So all rows share one unpacking. What else a tile reads or writes first (scales, inputs
// apart, lines of the output, codes) is prefetched too: a load that misses at the end of a segment stops the products.
// Registers: zmm0-13 int32 sums of row i in 2i and 2i + 1; zmm14-27 its chains, the output's or the block's; zmm28-29
// bytes of 16 columns each, then scales or minima; zmm30 four inputs of a row.
#pragma once

#include <immintrin.h>

namespace cpullm {
namespace {

constexpr int kManyRows = 7;  // most rows of a tile
constexpr int64_t kManyK = 512;  // inputs unpacked at a time: 16 KiB, half of L1

// What the chain needs of one segment of a panel.
struct alignas(64) ManySegment {
  int32_t start[kPanel];  // -128 * sum of the column's bytes
  float scale[kPanel];
  float minimum[kPanel];  // only the minimum form's
  int32_t steps;  // inputs / 4, a multiple of 8
  int32_t ends_block;  // whether it is the last one of its activation block
  int32_t begin;  // where its bytes begin
};

// A run of segments of one tile, whole activation blocks.
struct ManyRun {
  const ManySegment *segments, *end;
  const int32_t* const (*starts)[8];  // [segments, rows]: the 32 sums to start from, 64-byte aligned
  const float* sums;  // [segments, kManyRows]: sums of the activations; null but for the minimum form
  const float* x_scale;  // [blocks, tile]
  float* y;  // [rows, 32], 64-byte aligned: chain of the output
  int64_t ahead;  // from the run's activations to those of the next one, bytes
};

// clang-format off
#define CPULLM_EACH(ROW) ROW(0, 0, 1, 14, 15) ROW(1, 2, 3, 16, 17) ROW(2, 4, 5, 18, 19) ROW(3, 6, 7, 20, 21) \
  ROW(4, 8, 9, 22, 23) ROW(5, 10, 11, 24, 25) ROW(6, 12, 13, 26, 27)
#define CPULLM_IF(i, ...) ".if %c[rows] > " #i "\n" __VA_ARGS__ ".endif\n"
#define CPULLM_AHEAD(i, a, b, c, d) CPULLM_IF(i, "prefetcht0 128*" #i "(%[p])\nprefetcht0 128*" #i "+64(%[p])\n")
#define CPULLM_CLEAR(i, a, b, c, d) \
  CPULLM_IF(i, "vpxord %%zmm" #c ", %%zmm" #c ", %%zmm" #c "\nvpxord %%zmm" #d ", %%zmm" #d ", %%zmm" #d "\n")
#define CPULLM_START(i, a, b, c, d) \
  CPULLM_IF(i, "mov 8*" #i "(%[starts]), %[p]\nvmovdqa64 (%[p]), %%zmm" #a "\nvmovdqa64 64(%[p]), %%zmm" #b "\n")
#define CPULLM_DOT(i, a, b, c, d)                                                            \
  CPULLM_IF(i, "vpbroadcastd 4*" #i "(%[x]), %%zmm30\nvpdpbusd %%zmm28, %%zmm30, %%zmm" #a   \
               "\nvpdpbusd %%zmm29, %%zmm30, %%zmm" #b "\n")
#define CPULLM_STEP(s)                                                                                            \
  ".ifeq " #s " & 1\nprefetcht0 (%[x],%[ahead],2)\n.endif\n"                                                     \
  "vmovdqa64 128*" #s "(%[codes]), %%zmm28\nvmovdqa64 128*" #s "+64(%[codes]), %%zmm29\n" CPULLM_EACH(CPULLM_DOT) \
  "add %[x_step], %[x]\n"
#define CPULLM_CHAIN(i, a, b, c, d)                                                                        \
  CPULLM_IF(i, "vcvtdq2ps %%zmm" #a ", %%zmm" #a "\nvcvtdq2ps %%zmm" #b ", %%zmm" #b "\n"                  \
               "vfmadd231ps %%zmm28, %%zmm" #a ", %%zmm" #c "\nvfmadd231ps %%zmm29, %%zmm" #b ", %%zmm" #d "\n")
#define CPULLM_MINIMUM(i, a, b, c, d)                                           \
  CPULLM_IF(i, "vfmadd231ps 4*" #i "(%[p])%{1to16%}, %%zmm28, %%zmm" #c "\n"    \
               "vfmadd231ps 4*" #i "(%[p])%{1to16%}, %%zmm29, %%zmm" #d "\n")
// The same where a segment is a block: its chain is the product itself, in a and b.
#define CPULLM_PRODUCT(i, a, b, c, d)                                                      \
  CPULLM_IF(i, "vcvtdq2ps %%zmm" #a ", %%zmm" #a "\nvcvtdq2ps %%zmm" #b ", %%zmm" #b "\n"  \
               "vmulps %%zmm28, %%zmm" #a ", %%zmm" #a "\nvmulps %%zmm29, %%zmm" #b ", %%zmm" #b "\n")
#define CPULLM_OF_PRODUCT(i, a, b, c, d) CPULLM_MINIMUM(i, c, d, a, b)
#define CPULLM_ADD(i, a, b, c, d)                                                        \
  CPULLM_IF(i, "vfmadd231ps 4*" #i "(%[x_scale])%{1to16%}, %%zmm" #a ", %%zmm" #c "\n"   \
               "vfmadd231ps 4*" #i "(%[x_scale])%{1to16%}, %%zmm" #b ", %%zmm" #d "\n")
#define CPULLM_LOAD(i, a, b, c, d) \
  CPULLM_IF(i, "vmovaps 128*" #i "(%[p]), %%zmm" #c "\nvmovaps 128*" #i "+64(%[p]), %%zmm" #d "\n")
#define CPULLM_KEEP(i, a, b, c, d) \
  CPULLM_IF(i, "vmovaps %%zmm" #c ", 128*" #i "(%[p])\nvmovaps %%zmm" #d ", 128*" #i "+64(%[p])\n")
#define CPULLM_OUT(i, a, b, c, d)                                                                  \
  CPULLM_IF(i, "vbroadcastss 4*" #i "(%[x_scale]), %%zmm28\n"                                      \
               "vfmadd213ps 128*" #i "(%[p]), %%zmm28, %%zmm" #c "\n"                              \
               "vfmadd213ps 128*" #i "+64(%[p]), %%zmm28, %%zmm" #d "\n"                           \
               "vmovaps %%zmm" #c ", 128*" #i "(%[p])\nvmovaps %%zmm" #d ", 128*" #i "+64(%[p])\n")

// R rows x [steps, tile, 4] times the run's bytes [steps, 32, 4]. kBlocks: every segment is a block of activations.
template <int R, bool kBlocks>
inline void many_run(const int8_t* codes, const int8_t* x, int64_t tile, const ManyRun& run) {
  static_assert(R >= 1 && R <= kManyRows && kChunk % (8 * kStep) == 0, "sums and chains fit, steps come in eights");
  const ManySegment* segment = run.segments;
  const float* x_scale = run.x_scale;
  const int32_t* const (*starts)[8] = run.starts;
  const float* sums = run.sums;
  const void* p;
  int64_t steps;
  __asm__ volatile(
      "mov %c[y](%[run]), %[p]\n"
      ".if %c[blocks]\n" CPULLM_EACH(CPULLM_LOAD) ".else\n" CPULLM_EACH(CPULLM_AHEAD) ".endif\n"
      "0:\n"
      ".if !%c[blocks]\n" CPULLM_EACH(CPULLM_CLEAR) ".endif\n"
      "1:\n"
      "mov %c[steps_at](%[segment]), %k[steps]\n" CPULLM_EACH(CPULLM_START)
      "add $64, %[starts]\n"
      ".p2align 5\n3:\n"
      CPULLM_STEP(0) CPULLM_STEP(1) CPULLM_STEP(2) CPULLM_STEP(3)
      CPULLM_STEP(4) CPULLM_STEP(5) CPULLM_STEP(6) CPULLM_STEP(7)
      "add $1024, %[codes]\n"
      "sub $8, %k[steps]\n"
      "jnz 3b\n"
      "vmovaps %c[scale](%[segment]), %%zmm28\nvmovaps %c[scale]+64(%[segment]), %%zmm29\n"
      ".if %c[blocks]\n" CPULLM_EACH(CPULLM_PRODUCT) ".else\n" CPULLM_EACH(CPULLM_CHAIN) ".endif\n"
      "mov %[sums], %[p]\n"
      "test %[p], %[p]\n"
      "jz 4f\n"
      "vmovaps %c[minimum](%[segment]), %%zmm28\nvmovaps %c[minimum]+64(%[segment]), %%zmm29\n"
      ".if %c[blocks]\n" CPULLM_EACH(CPULLM_OF_PRODUCT) ".else\n" CPULLM_EACH(CPULLM_MINIMUM) ".endif\n"
      "add $%c[sums_bytes], %[sums]\n"
      "4:\n"
      ".if %c[blocks]\n" CPULLM_EACH(CPULLM_ADD)
      "add $%c[segment_bytes], %[segment]\n"
      ".else\n"
      "cmpl $0, %c[ends_block](%[segment])\n"
      "lea %c[segment_bytes](%[segment]), %[segment]\n"
      "je 1b\n"
      "mov %c[y](%[run]), %[p]\n" CPULLM_EACH(CPULLM_OUT)
      ".endif\n"
      "add %[x_step], %[x_scale]\n"
      "cmp %c[end](%[run]), %[segment]\n"
      "jne 0b\n"
      ".if %c[blocks]\nmov %c[y](%[run]), %[p]\n" CPULLM_EACH(CPULLM_KEEP) ".endif\n"
      : [codes] "+&r"(codes), [x] "+&r"(x), [segment] "+&r"(segment), [x_scale] "+&r"(x_scale), [starts] "+&r"(starts),
        [sums] "+&r"(sums), [p] "=&r"(p), [steps] "=&r"(steps)
      : [x_step] "r"(tile * kStep), [ahead] "r"(run.ahead), [run] "r"(&run), [rows] "i"(R), [blocks] "i"(int(kBlocks)),
        [scale] "i"(__builtin_offsetof(ManySegment, scale)),
        [minimum] "i"(__builtin_offsetof(ManySegment, minimum)), [steps_at] "i"(__builtin_offsetof(ManySegment, steps)),
        [segment_bytes] "i"(sizeof(ManySegment)), [ends_block] "i"(__builtin_offsetof(ManySegment, ends_block)),
        [sums_bytes] "i"(kManyRows * sizeof(float)), [y] "i"(__builtin_offsetof(ManyRun, y)),
        [end] "i"(__builtin_offsetof(ManyRun, end))
      : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24",
        "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "memory", "cc");
}
#undef CPULLM_EACH
#undef CPULLM_IF
#undef CPULLM_AHEAD
#undef CPULLM_CLEAR
#undef CPULLM_START
#undef CPULLM_DOT
#undef CPULLM_STEP
#undef CPULLM_CHAIN
#undef CPULLM_MINIMUM
#undef CPULLM_PRODUCT
#undef CPULLM_OF_PRODUCT
#undef CPULLM_ADD
#undef CPULLM_LOAD
#undef CPULLM_KEEP
#undef CPULLM_OUT
// clang-format on

// Panel `panel` of w, inputs [k0, k1): signed bytes [steps, 32, 4] and one ManySegment per segment. Returns their count.
[[gnu::noinline]] int64_t unpack_many(const Weight& w, int64_t panel, int64_t k0, int64_t k1, int8_t* bytes,
                                      ManySegment* segments) {
  using S = Simd;
  const __m512i low = _mm512_set1_epi8(15), top = _mm512_set1_epi8(char(128));
  const int64_t block_bytes = 16 * w.bits;
  const uint8_t* codes = w.codes + (panel * (w.k_padded / kStep) + k0 / kStep) * block_bytes;
  ManySegment* s = segments;
  for (int64_t k = k0; k < k1; ++s) {
    const int64_t group = k / w.group, at = (panel * w.groups + group) * kPanel;
    const int64_t end = min_of(min_of((group + 1) * w.group, (k / kActBlock + 1) * kActBlock), k1);
    __m512i zero[2] = {_mm512_set1_epi8(8), _mm512_set1_epi8(8)};
    for (int i = 0; i < 2; ++i) {
      S::store(s->scale + 16 * i, load_scale(w.scales + at + 16 * i, w.scale_type));
      if (w.form == Zeros::minimum) {
        S::store(s->minimum + 16 * i, load_scale(static_cast<const uint16_t*>(w.zeros) + at + 16 * i, w.scale_type));
        zero[i] = _mm512_setzero_si512();
      } else if (w.form == Zeros::integer) {
        const __m512i z = S::load_u8_as_i32(static_cast<const uint8_t*>(w.zeros) + at + 16 * i);
        zero[i] = _mm512_mullo_epi32(z, _mm512_set1_epi32(0x01010101));
      }
    }
    s->steps = int32_t((end - k) / kStep);
    s->ends_block = end % kActBlock == 0 || end == k1;
    s->begin = int32_t((k - k0) * kPanel);
    __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (; k < end; k += kStep, codes += block_bytes, bytes += 128) {
      __m512i v[2] = {_mm512_loadu_si512(codes), {}};
      if (w.bits == 4) {
        v[1] = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(v[0], 4), low), zero[1]);
        v[0] = _mm512_sub_epi8(_mm512_and_si512(v[0], low), zero[0]);
      } else {
        v[1] = _mm512_xor_si512(_mm512_loadu_si512(codes + 64), top);
        v[0] = _mm512_xor_si512(v[0], top);
      }
      for (int i = 0; i < 2; ++i) {
        _mm512_store_si512(bytes + 64 * i, v[i]);
        sum[i] = _mm512_dpbusd_epi32(sum[i], top, v[i]);
      }
    }
    for (int i = 0; i < 2; ++i) S::store_i32(s->start + 16 * i, _mm512_sub_epi32(_mm512_setzero_si512(), sum[i]));
  }
  return s - segments;
}

// Asks for count numbers that are to be in L1.
template <class T>
inline void fetch(const T* p, int64_t count) {
  for (int64_t at = 0; at < count * int64_t(sizeof(T)) + 63; at += 64)
    _mm_prefetch(reinterpret_cast<const char*>(p) + at, _MM_HINT_T0);
}

// A bit per row of a tile and segment, 8 rows to a segment, 8 segments to a word.
struct ManyApart {
  uint64_t rows[2];
};

inline ManyApart many_apart(const uint32_t* apart_rows, int64_t count) {
  const __m512i words = _mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), apart_rows);
  ManyApart out;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out.rows), _mm512_cvtepi32_epi8(words));
  return out;
}

// to [32] = start of the segment plus an input kept apart times its bytes.
inline void start_apart(const ManySegment& segment, int32_t apart, const int8_t* bytes, int32_t* to) {
  const int64_t j = apart & 255;
  const __m512i value = _mm512_set1_epi32(apart >> 8 & 0xffff);  // int16 beside 0: one product a lane
  const __m128i up = _mm_cvtsi32_si128(int(24 - 8 * (j % kStep)));
  for (int i = 0; i < 2; ++i) {
    const __m512i v = _mm512_load_si512(bytes + segment.begin + j / kStep * 128 + 64 * i);
    const __m512i code = _mm512_srai_epi32(_mm512_sll_epi32(v, up), 24);
    _mm512_store_si512(to + 16 * i, _mm512_dpwssd_epi32(_mm512_load_si512(segment.start + 16 * i), code, value));
  }
}

template <bool kBlocks>
void many_run(int64_t rows, const int8_t* codes, const int8_t* x, int64_t tile, const ManyRun& run) {
  switch (rows) {
    case 1: return many_run<1, kBlocks>(codes, x, tile, run);
    case 2: return many_run<2, kBlocks>(codes, x, tile, run);
    case 3: return many_run<3, kBlocks>(codes, x, tile, run);
    case 4: return many_run<4, kBlocks>(codes, x, tile, run);
    case 5: return many_run<5, kBlocks>(codes, x, tile, run);
    case 6: return many_run<6, kBlocks>(codes, x, tile, run);
    case 7: return many_run<7, kBlocks>(codes, x, tile, run);
    default: __builtin_trap();  // a tile this level does not make
  }
}

struct alignas(64) ManyScratch {
  static constexpr int64_t kSegments = kManyK / kChunk;
  int8_t bytes[kManyK * kPanel];
  ManySegment segments[kSegments];
  int32_t apart[kManyK / kActBlock * kManyRows][kPanel];  // one per row and block of activations at most
  const int32_t* starts[kSegments][8];
  float partial[(kBlockRows + kManyRows) * kPanel];
};
static_assert(sizeof(ManyScratch) <= kScratchBytes, "scratch memory must hold it");

// Rows `rows` times the unpacked inputs from k0 on: `count` segments from `first` on. Meanwhile the codes that are to be
// unpacked next, which follow these in memory, come to L2, and the lines of the output that the last inputs write to L1.
inline void many_rows(const Weight& w, const QuantizedRows& x, const Output& out, Range rows, int64_t panel, int64_t k0,
                      int64_t first, int64_t count, ManyScratch& mine) {
  const bool blocks = w.group % kActBlock == 0 || w.groups == 1, last = k0 + kManyK >= w.k_padded;
  const int64_t element = out.type == Float::f32 ? 4 : 2, codes_bytes = kManyK * kPanel * w.bits / 8;
  const uint8_t* next = w.codes + (panel * w.k_padded + k0 + kManyK) * kPanel * w.bits / 8;
  const int64_t share = (codes_bytes * x.tile / (rows.end - rows.begin) + 63) / 64 * 64;
  float sums[ManyScratch::kSegments * kManyRows];
  for (int64_t r = rows.begin; r < rows.end; r += x.tile) {
    const int64_t many = min_of(x.tile, x.m - r), at = r / x.tile * x.segments + first;
    const float* x_scale = x.scale + r * x.blocks + k0 / kActBlock * x.tile;
    const bool more = r + x.tile < rows.end;
    for (int64_t i = 0; i < share; i += 64, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    if (more) {
      fetch(x_scale + x.blocks * x.tile, kManyK / kActBlock * x.tile);
      fetch(x.apart_rows + at + x.segments, count);
      fetch(x.apart + (at + x.segments) * x.tile, count * x.tile);
    }
    for (int64_t i = 0; last && i < many; ++i)
      fetch(static_cast<const char*>(out.y) + ((r + i) * out.stride + panel * kPanel) * element, kPanel * element);
    const ManyApart apart = many_apart(x.apart_rows + at, count);
    int32_t (*to)[kPanel] = mine.apart;
    for (int64_t h = 0; h < (count + 7) / 8; ++h)
      for (uint64_t bits = apart.rows[h]; bits; bits &= bits - 1, ++to) {
        const int64_t s = h * 8 + __builtin_ctzll(bits) / 8, i = __builtin_ctzll(bits) % 8;
        start_apart(mine.segments[s], x.apart[(at + s) * x.tile + i], mine.bytes, *to);
        mine.starts[s][i] = *to;
      }
    if (w.form == Zeros::minimum)
      for (int64_t s = 0; s < count; ++s)
        for (int64_t i = 0; i < many; ++i) sums[s * kManyRows + i] = -float(x.minus[(at + s) * x.tile + i]);
    const ManyRun run{mine.segments,
                      mine.segments + count,
                      mine.starts,
                      w.form == Zeros::minimum ? sums : nullptr,
                      x_scale,
                      mine.partial + (r - rows.begin) * kPanel,
                      more ? x.tile * x.k_padded : (rows.begin - r) * x.k_padded};
    const int8_t* q = x.q + r * x.k_padded + k0 * x.tile;
    blocks ? many_run<true>(many, mine.bytes, q, x.tile, run) : many_run<false>(many, mine.bytes, q, x.tile, run);
    for (int64_t i = 0; last && i < many; ++i) store_panel(out, w.n, r + i, panel, run.y + i * kPanel);
    for (int64_t h = 0; h < (count + 7) / 8; ++h)
      for (uint64_t bits = apart.rows[h]; bits; bits &= bits - 1) {
        const int64_t s = h * 8 + __builtin_ctzll(bits) / 8;
        mine.starts[s][__builtin_ctzll(bits) % 8] = mine.segments[s].start;
      }
  }
}

// linear_i8 for rows with a bias.
void linear_i8_many(const Weight& w, const QuantizedRows& x, const Output& out, Range panels, void* scratch) {
  auto& mine = *static_cast<ManyScratch*>(scratch);
  // Blocks of rows are even: a last one of a few rows would unpack all codes once more for them.
  const int64_t tiles = (x.m + x.tile - 1) / x.tile, most = (kBlockRows + kManyRows) / x.tile;
  const int64_t block_rows = even_tile(tiles, most) * x.tile;
  for (int64_t s = 0; s < ManyScratch::kSegments; ++s)
    for (const int32_t*& start : mine.starts[s]) start = mine.segments[s].start;
  for (int64_t row0 = 0; row0 < x.m; row0 += block_rows) {
    const int64_t row_end = min_of(row0 + block_rows, x.m);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      memset(mine.partial, 0, size_t(row_end - row0) * kPanel * sizeof(float));
      int64_t first = 0;  // segment
      for (int64_t k0 = 0, count; k0 < w.k_padded; k0 += kManyK, first += count) {
        count = unpack_many(w, panel, k0, min_of(k0 + kManyK, w.k_padded), mine.bytes, mine.segments);
        many_rows(w, x, out, {row0, row_end}, panel, k0, first, count, mine);
      }
    }
  }
}

}  // namespace
}  // namespace cpullm
