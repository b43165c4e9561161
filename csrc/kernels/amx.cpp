// The amx level: int8 tiles for many rows; few rows stay with the avx512 kernels.
//
// One tile product: C (16 rows x 16 columns, int32) += A (16 rows x 64 inputs, s8) B (64 inputs x 16 columns, s8; a row of
// B is one k-step of the unpacked panel). Codes are unpacked as code - zero, -15..15 or -128..127, so that C needs no
// correction: |C| <= 128 * (127 * 127 + 16256) < 2^23, as at the top of linear_i8-inl.h. Segments of less than 64 inputs use
// half tiles of 32 inputs.
// A unit is 16 rows x 32 columns x one activation block of at most four segments: its tile products go to a buffer
// ([segment, column half, 16, 16] int32, at most 8 KiB), and while the fp32 chain of one unit runs, the tiles of the next
// one multiply. Per unit: tile products of 16 cycles per 64 inputs and half, 64 cycles for group 128, 128 for group 32 (half
// tiles take as long); chain 3 + 2 (segments - 1) operations per vector on two ports, 48 or 144 cycles.
#define CPULLM_TILE_ROWS 14
#include "simd_avx512.h"
//
#include "rows-inl.h"
//
#include "linear_f32-inl.h"
#include "linear_i8-inl.h"
//
#include "linear_bf16-inl.h"

namespace cpullm {
namespace {

constexpr int64_t kTile = 16;  // rows of a tile
constexpr int64_t kTileK = 64;  // inputs of a full tile
// From this many rows on tiles are faster, for groups of full and of half tiles (measured on 16 cores, 4096 x 4096).
constexpr int64_t kFullTileRows = kTile + 1, kHalfTileRows = 3 * kTile;

void (*few_rows)(const Weight&, const QuantizedRows&, const Output&, Range, void*);
TileShape (*few_rows_tile)(int64_t m, int64_t group);

// The tile intrinsics do not tell the compiler what they read: without this it may drop the stores before them.
void publish(const void* data) { __asm__ volatile("" : : "r"(data) : "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure(int64_t step) {
  TileConfig c;
  for (int i = 0; i < 8; ++i) {
    c.rows[i] = uint8_t(i < 6 ? kTile : step / kStep);
    c.column_bytes[i] = uint16_t(i == 4 || i == 5 ? step : 64);
  }
  publish(&c);
  _tile_loadconfig(&c);
}

TileShape tile_rows(int64_t m, int64_t group) {
  const int64_t least = group % kTileK ? kHalfTileRows : kFullTileRows;
  return m < least ? few_rows_tile(m, group) : TileShape{kTile, kTileK};
}

// One segment of inputs of a panel, the same for every row.
struct Segment {
  int64_t begin, end;  // inputs, from the start of the K block
  Simd::F scale[2], minimum[2];
};

constexpr int64_t kUnitSegments = kActBlock / kChunk;
constexpr int64_t kSegmentSums = 2 * kTile * kTile;  // int32 of one segment of a unit

// Inputs [k0, k1) of a panel: their segments and, in `bytes`, code - zero (the code in the minimum form) as signed bytes
// [k/4, 32, 4]. first[b]: the first segment of activation block b. Returns the number of segments.
int64_t unpack_signed(const Weight& w, int64_t panel, int64_t k0, int64_t k1, Segment* segments, int64_t* first,
                      uint8_t* bytes) {
  using S = Simd;
  const int64_t block_bytes = 16 * w.bits;
  const uint8_t* codes = w.codes + (panel * w.k_padded + k0) / kStep * block_bytes;
  const S::I spread = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);  // byte 0 of each lane, four times
  Segment* g = segments;
  for (int64_t k = k0; k < k1; ++g) {
    if (k % kActBlock == 0) *first++ = g - segments;
    const int64_t end = min_of((k / w.group + 1) * w.group, min_of((k / kActBlock + 1) * kActBlock, k1));
    const int64_t at = (panel * w.groups + k / w.group) * kPanel;
    g->begin = k - k0;
    g->end = end - k0;
    S::I zero[2];
    for (int i = 0; i < 2; ++i) {
      g->scale[i] = load_scale(w.scales + at + 16 * i, w.scale_type);
      zero[i] = _mm512_set1_epi8(char(w.bits == 8 ? 128 : 8));
      if (w.form == Zeros::integer) {
        zero[i] = _mm512_shuffle_epi8(S::load_u8_as_i32(static_cast<const uint8_t*>(w.zeros) + at + 16 * i), spread);
      } else if (w.form == Zeros::minimum) {
        g->minimum[i] = load_scale(static_cast<const uint16_t*>(w.zeros) + at + 16 * i, w.scale_type);
        zero[i] = S::izero();
      }
    }
    for (; k < end; k += kStep, codes += block_bytes, bytes += 128) {
      S::I lo, hi;
      w.bits == 4 ? S::load_packed4(codes, 0, lo, hi) : S::load_u8(codes, 0, lo, hi);
      _mm512_storeu_si512(bytes, _mm512_sub_epi8(lo, zero[0]));
      _mm512_storeu_si512(bytes + 64, _mm512_sub_epi8(hi, zero[1]));
    }
  }
  if ((k1 - k0) % kTileK) memset(bytes, 0, kChunk / kStep * 128);  // a full tile reads on
  *first = g - segments;
  return g - segments;
}

// C = A B over the inputs of one segment, both halves of its columns, then to `acc` [2, 16, 16]. Tile numbers must be
// literals: a function per set.
#define CPULLM_PRODUCT(name, c0, c1)                                                                        \
  inline void name(const int8_t* a, const uint8_t* b, int64_t k, int64_t end, int64_t step, int32_t* acc) { \
    _tile_zero(c0);                                                                                         \
    _tile_zero(c1);                                                                                         \
    for (; k < end; k += step) {                                                                            \
      _tile_loadd(4, a + k / kTileK * kTile * kTileK + k % kTileK, kTileK);                                 \
      _tile_loadd(6, b + k / kStep * 128, 128);                                                             \
      _tile_dpbssd(c0, 4, 6);                                                                               \
      _tile_loadd(7, b + k / kStep * 128 + 64, 128);                                                        \
      _tile_dpbssd(c1, 4, 7);                                                                               \
    }                                                                                                       \
    _tile_stored(c0, acc, kTile * 4);                                                                       \
    _tile_stored(c1, acc + kTile * kTile, kTile * 4);                                                       \
  }
CPULLM_PRODUCT(multiply_even, 0, 1)
CPULLM_PRODUCT(multiply_odd, 2, 3)
#undef CPULLM_PRODUCT

// acc [2, 16, 16] += the inputs kept apart times their weights; bytes: the segment's.
void add_apart_rows(uint32_t rows, const int32_t* apart, const uint8_t* bytes, int32_t* acc) {
  for (; rows; rows &= rows - 1) {
    const int r = __builtin_ctz(rows);
    const int j = apart[r] & 255;
    const __m128i up = _mm_cvtsi32_si128(24 - 8 * (j % int(kStep)));
    const Simd::I value = _mm512_set1_epi32((apart[r] >> 8) & 0xffff);
    for (int i = 0; i < 2; ++i) {
      const Simd::I w = _mm512_sll_epi32(_mm512_loadu_si512(bytes + j / kStep * 128 + 64 * i), up);
      int32_t* sum = acc + i * kTile * kTile + r * kTile;
      Simd::store_i32(sum, _mm512_dpwssd_epi32(Simd::load_i32(sum), _mm512_srai_epi32(w, 24), value));
    }
  }
}

// The fp32 chain of a unit of N segments: y [16, 32] += x_scale * sum of scale * acc (+ minimum * sum of the inputs).
template <int N, bool kMinimum>
void chain(const Segment* g, const int32_t* acc, const int32_t* minus, const float* x_scale, float* y) {
  using S = Simd;
  for (int r = 0; r < kTile; ++r) {
    const S::F xs = S::set1(x_scale[r]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int32_t* from = acc + i * kTile * kTile + r * kTile;
      S::F sum = S::mul(S::to_float(S::load_i32(from)), g[0].scale[i]);
      if (kMinimum) sum = S::fma(g[0].minimum[i], S::set1(-float(minus[r])), sum);
#pragma GCC unroll 4
      for (int s = 1; s < N; ++s) {
        sum = S::fma(S::to_float(S::load_i32(from + s * kSegmentSums)), g[s].scale[i], sum);
        if (kMinimum) sum = S::fma(g[s].minimum[i], S::set1(-float(minus[s * kTile + r])), sum);
      }
      float* to = y + r * kPanel + 16 * i;
      S::store(to, S::fma(sum, xs, S::load(to)));
    }
  }
}

template <bool kMinimum>
void chain_of(int64_t n, const Segment* g, const int32_t* acc, const int32_t* minus, const float* x_scale, float* y) {
  switch (n) {
    case 1: return chain<1, kMinimum>(g, acc, minus, x_scale, y);
    case 2: return chain<2, kMinimum>(g, acc, minus, x_scale, y);
    case 3: return chain<3, kMinimum>(g, acc, minus, x_scale, y);
    default: return chain<4, kMinimum>(g, acc, minus, x_scale, y);
  }
}

// What a tile of 16 rows brings along, at the first segment and block of a K block.
struct TileRows {
  const int8_t* q;
  const int32_t *minus, *apart;  // [segments, 16]
  const uint32_t* apart_rows;  // [segments]
  const float* x_scale;  // [blocks, 16]
};

// The tile products of segments [begin, end) to `acc`.
inline void multiply_unit(const Segment* g, int64_t begin, int64_t end, const int8_t* a, const uint8_t* b, int64_t step,
                          int32_t* acc) {
  for (int64_t s = begin; s < end; s += 2) {
    multiply_even(a, b, g[s].begin, g[s].end, step, acc);
    if (s + 1 < end) multiply_odd(a, b, g[s + 1].begin, g[s + 1].end, step, acc + kSegmentSums);
    acc += 2 * kSegmentSums;
  }
}

void linear_i8_amx(const Weight& w, const QuantizedRows& x, const Output& out, Range panels, void* scratch) {
  if (x.unit != kTileK) return few_rows(w, x, out, panels, scratch);
  uint8_t* bytes = static_cast<uint8_t*>(scratch);
  int32_t* sums = reinterpret_cast<int32_t*>(bytes + 32 * 1024);  // of two units
  float* partial = reinterpret_cast<float*>(bytes + 64 * 1024);
  static_assert(2 * kUnitSegments * kSegmentSums * 4 <= 32 * 1024 && (kBlockK + kChunk) * kPanel <= 32 * 1024,
                "they fit");
  Segment segments[kMostSegments];
  int64_t first[kBlockK / kActBlock + 1];
  const auto run_chain = w.form == Zeros::minimum ? chain_of<true> : chain_of<false>;
  const int64_t step = w.group % kTileK ? kChunk : kTileK;
  const int64_t row_stride = (w.k_padded + kTileK - 1) / kTileK * kTileK;  // bytes of one row of q
  configure(step);
  const int64_t block_rows = rows_per_block(x);
  for (int64_t row0 = 0; row0 < x.m; row0 += block_rows) {
    const int64_t row_end = min_of(row0 + block_rows, x.m);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      memset(partial, 0, size_t((row_end - row0 + kTile - 1) / kTile * kTile) * kPanel * sizeof(float));
      int64_t done = 0;  // segments
      for (int64_t k0 = 0; k0 < w.k_padded; k0 += kBlockK) {
        const int64_t k1 = min_of(k0 + kBlockK, w.k_padded);
        const int64_t count = unpack_signed(w, panel, k0, k1, segments, first, bytes);
        const int64_t blocks = (k1 - k0 + kActBlock - 1) / kActBlock;
        publish(bytes);
        const auto rows_at = [&](int64_t r) {
          const int64_t at = r * x.segments + done * kTile;
          return TileRows{x.q + r * row_stride + k0 * kTile, x.minus + at, x.apart + at,
                          x.apart_rows + r / kTile * x.segments + done,
                          x.scale + r * x.blocks + k0 / kActBlock * kTile};
        };
        TileRows rows = rows_at(row0), next_rows = rows;
        multiply_unit(segments, first[0], first[1], rows.q, bytes, step, sums);
        int64_t parity = 0;
        for (int64_t r = row0; r < row_end; r += kTile, rows = next_rows) {
          float* y = partial + (r - row0) * kPanel;
          for (int64_t block = 0; block < blocks; ++block, parity ^= 1) {
            int32_t* acc = sums + parity * kUnitSegments * kSegmentSums;
            int32_t* other = sums + (parity ^ 1) * kUnitSegments * kSegmentSums;
            if (block + 1 < blocks) {
              multiply_unit(segments, first[block + 1], first[block + 2], rows.q, bytes, step, other);
            } else if (r + kTile < row_end) {
              next_rows = rows_at(r + kTile);
              multiply_unit(segments, first[0], first[1], next_rows.q, bytes, step, other);
            }
            for (int64_t s = first[block]; s < first[block + 1]; ++s)
              if (rows.apart_rows[s])
                add_apart_rows(rows.apart_rows[s], rows.apart + s * kTile, bytes + segments[s].begin / kStep * 128,
                               acc + (s - first[block]) * kSegmentSums);
            run_chain(first[block + 1] - first[block], segments + first[block], acc, rows.minus + first[block] * kTile,
                      rows.x_scale + block * kTile, y);
          }
        }
        done += count;
      }
      for (int64_t r = row0; r < row_end; ++r) store_panel(out, w.n, r, panel, partial + (r - row0) * kPanel);
    }
  }
  _tile_release();
}

// ---- bf16 ----------------------------------------------------------------------------------------------------------

constexpr int64_t kBf16K = 32;  // inputs of a tile
constexpr int64_t kLeastBlockRows = 128;
constexpr int64_t kBf16Least = 16;  // fewer rows are faster in fp32

TileShape tile_rows_bf16(int64_t m) { return m < kBf16Least ? TileShape{} : TileShape{kTile, kBf16K}; }

// 32 rows x 32 columns: sums in tiles 0-3, rows in 4 and 5, pairs of weights in 6 and 7.
void bf16_two(const uint16_t* a, const uint16_t* b, int64_t a_tile, int64_t k, float* y) {
  _tile_loadd(0, y, kPanel * 4);
  _tile_loadd(1, y + 16, kPanel * 4);
  _tile_loadd(2, y + kTile * kPanel, kPanel * 4);
  _tile_loadd(3, y + kTile * kPanel + 16, kPanel * 4);
  for (int64_t j = 0; j < k; j += kBf16K) {
    _tile_loadd(4, a + j * kTile, 64);
    _tile_loadd(6, b + j * kPanel, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + j * kPanel + 32, 128);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + a_tile + j * kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, y, kPanel * 4);
  _tile_stored(1, y + 16, kPanel * 4);
  _tile_stored(2, y + kTile * kPanel, kPanel * 4);
  _tile_stored(3, y + kTile * kPanel + 16, kPanel * 4);
}

void bf16_one(const uint16_t* a, const uint16_t* b, int64_t k, float* y) {
  _tile_loadd(0, y, kPanel * 4);
  _tile_loadd(1, y + 16, kPanel * 4);
  for (int64_t j = 0; j < k; j += kBf16K) {
    _tile_loadd(4, a + j * kTile, 64);
    _tile_loadd(6, b + j * kPanel, 128);
    _tile_loadd(7, b + j * kPanel + 32, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, y, kPanel * 4);
  _tile_stored(1, y + 16, kPanel * 4);
}

void linear_bf16_amx(const Weight& w, const Bf16Rows& x, const Output& out, Range panels, void* scratch) {
  configure(kTileK);  // 16 rows of 64 bytes everywhere
  // Activations that stay in L2 while the panels pass by, but enough rows to make up for unpacking the panels again.
  const int64_t fit = min_of(l2_bytes / 4 / w.k_padded, kBlockRows);
  const int64_t block_rows = (fit < kLeastBlockRows ? kLeastBlockRows : fit) / kTile * kTile;
  for_bf16_blocks(w, x, out, panels, scratch, block_rows,
                  [&](const uint16_t* pairs, int64_t k0, int64_t k1, int64_t row0, int64_t row_end, float* partial) {
                    publish(pairs);
                    for (int64_t r = row0; r < row_end; r += 2 * kTile) {
                      const uint16_t* a = x.x + r * x.k_padded + k0 * kTile;
                      float* y = partial + (r - row0) * kPanel;
                      if (r + kTile < row_end) {
                        bf16_two(a, pairs, kTile * x.k_padded, k1 - k0, y);
                      } else {
                        bf16_one(a, pairs, k1 - k0, y);
                      }
                    }
                    publish(partial);
                  });
  _tile_release();
}

// `rounds` rounds of 16 tile products on four sums; returns the multiplications and additions done.
int64_t dot_peak_amx(int64_t rounds, int32_t* sink) {
  alignas(64) int32_t out[kTile * kTile];
  configure(kTileK);
  for (int i = 0; i < kTile * kTile; ++i) out[i] = 0;
  publish(out);
  _tile_loadd(4, out, 64);
  _tile_loadd(5, out, 64);
  _tile_loadd(6, out, 64);
  _tile_loadd(7, out, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, out, 64);
  _tile_release();
  *sink = out[0];
  return rounds * 16 * 2 * kTile * kTile * kTileK;
}

}  // namespace

void use_amx(Kernels& k) {
  few_rows = k.linear_i8;
  few_rows_tile = k.tile_i8;
  k.tile_i8 = tile_rows;
  k.block_rows = 0;
  k.linear_i8 = linear_i8_amx;
  k.tile_bf16 = tile_rows_bf16;
  k.load_rows_bf16 = load_rows_bf16<kBf16K>;
  k.linear_bf16 = linear_bf16_amx;
  k.dot_peak = dot_peak_amx;
}

}  // namespace cpullm
