// The amx level: int8 tiles for many rows; few rows stay with the avx512 kernels.
//
// One tile product: C (16 rows x 16 columns, int32) += A (16 rows x 64 inputs, s8) B (64 inputs x 16 columns, u8
// codes; a row of B is one k-step of the unpacked panel). Segments of less than 64 inputs use half tiles of 32
// inputs. Two sets of tiles (C 0 1, A 4 5, B 6 7) take turns: after every segment C goes through a 1 KiB buffer to
// the fp32 chain of linear_i8-inl.h. Registers: 16 sums y, scale, zero, and temporaries. Bound per segment of 16 x 16
// outputs: 16 vectors x 4 operations on two ports = 32 cycles against tile products of 16 cycles per 64 inputs: half of
// the tile peak for groups of 128, a third for 64, a fifth for 32, if nothing overlaps.
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
constexpr int64_t kFullTileRows = 16, kHalfTileRows = 48;

void (*few_rows)(const Weight&, const QuantizedRows&, const Output&, Range, void*);

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
  return m < least ? tile_rows_i8(m, group) : TileShape{kTile, kTileK};
}

// One segment of inputs of a panel, the same for every row.
struct Segment {
  int64_t begin, end;  // inputs, from the start of the K block
  Simd::I zero[2];  // zero points
  Simd::F scale[2], minimum[2];
  bool first, last;  // of its activation block
};

constexpr int64_t kMostSegments = kBlockK / kChunk;

// The segments of inputs [k0, k1) of a panel; returns how many.
int64_t make_segments(const Weight& w, int64_t panel, int64_t k0, int64_t k1, Segment* out) {
  using S = Simd;
  Segment* g = out;
  for (int64_t k = k0; k < k1; ++g) {
    const int64_t block_end = min_of((k / kActBlock + 1) * kActBlock, k1);
    const int64_t end = min_of((k / w.group + 1) * w.group, block_end);
    const int64_t at = (panel * w.groups + k / w.group) * kPanel;
    g->begin = k - k0;
    g->end = end - k0;
    g->first = k % kActBlock == 0;
    g->last = end == block_end;
    for (int i = 0; i < 2; ++i) {
      g->minimum[i] = S::zero();
      g->zero[i] = S::izero();
      if (w.form == Zeros::integer) {
        g->zero[i] = S::load_u8_as_i32(static_cast<const uint8_t*>(w.zeros) + at + 16 * i);
      } else if (w.form == Zeros::minimum) {
        g->minimum[i] = load_scale(static_cast<const uint16_t*>(w.zeros) + at + 16 * i, w.scale_type);
      } else {
        g->zero[i] = S::iset1(w.bits == 8 ? 128 : 8);
      }
      g->scale[i] = load_scale(w.scales + at + 16 * i, w.scale_type);
    }
    k = end;
  }
  return g - out;
}

// C = A B over the inputs of one segment, then to `acc` [16, 16]. Tile numbers must be literals: a function
// per set.
void multiply_0(const int8_t* a, const uint8_t* b, int64_t k, int64_t end, int64_t step, int32_t* acc) {
  _tile_zero(0);
  for (; k < end; k += step) {
    _tile_loadd(4, a + k / kTileK * kTile * kTileK + k % kTileK, kTileK);
    _tile_loadd(6, b + k / kStep * 128, 128);
    _tile_dpbsud(0, 4, 6);
  }
  _tile_stored(0, acc, kTile * 4);
}

void multiply_1(const int8_t* a, const uint8_t* b, int64_t k, int64_t end, int64_t step, int32_t* acc) {
  _tile_zero(1);
  for (; k < end; k += step) {
    _tile_loadd(5, a + k / kTileK * kTile * kTileK + k % kTileK, kTileK);
    _tile_loadd(7, b + k / kStep * 128, 128);
    _tile_dpbsud(1, 5, 7);
  }
  _tile_stored(1, acc, kTile * 4);
}

// acc [16, 16] += the inputs kept apart times their codes; codes: half i of the segment's unpacked blocks.
void add_apart_rows(uint32_t rows, const int32_t* apart, const uint8_t* codes, int32_t* acc) {
  using S = Simd;
  for (; rows; rows &= rows - 1) {
    const int r = __builtin_ctz(rows);
    const int j = apart[r] & 255;
    const S::I v = S::shift_right(_mm512_loadu_si512(codes + j / kStep * 128), 8 * int(j % kStep));
    const S::I product = S::imul16(S::iand(v, S::iset1(255)), apart[r] >> 8);
    S::store_i32(acc + r * kTile, S::iadd(S::load_i32(acc + r * kTile), product));
  }
}

// What a block of 16 rows brings along, at its first segment and block of inputs.
struct TileRows {
  const int8_t* q;
  const int32_t *minus, *apart;  // [segments, 16]
  const uint32_t* apart_rows;  // [segments]
  const float* x_scale;  // [blocks, 16]
};

// 16 rows x 16 columns (half i of the panel) over all segments of a K block. y [16, 32] stays in 16 registers; while
// the chain of one segment runs, the tiles of the next one multiply.
template <bool kWhole, bool kMinimum>
void tile_block(const Segment* segments, int64_t count, int i, const TileRows& rows, const uint8_t* b, int64_t step,
                float* y_out, int32_t* buffer) {
  using S = Simd;
  const int8_t* a = rows.q;
  const int32_t* minus = rows.minus;
  const float* x_scale = rows.x_scale;
  S::F y[kTile];
  S::F sum[kTile];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) {
    y[r] = S::load(y_out + r * kPanel);
    sum[r] = S::zero();
  }
  multiply_0(a, b, segments[0].begin, segments[0].end, step, buffer);
  for (int64_t s = 0; s < count; ++s) {
    const Segment& g = segments[s];
    int32_t* acc = buffer + (s & 1) * kTile * kTile;
    if (s + 1 < count) {
      const Segment& next = segments[s + 1];
      int32_t* to = buffer + (~s & 1) * kTile * kTile;
      s & 1 ? multiply_0(a, b, next.begin, next.end, step, to) : multiply_1(a, b, next.begin, next.end, step, to);
    }
    if (rows.apart_rows[s]) add_apart_rows(rows.apart_rows[s], rows.apart + s * kTile, b + g.begin / kStep * 128, acc);
    const S::I zero = g.zero[i];
    const S::F scale = g.scale[i];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      const S::F f = S::to_float(S::add_times(S::load_i32(acc + r * kTile), zero, minus + r));
      if (kWhole) {
        y[r] = S::fma(S::mul(f, scale), S::set1(x_scale[r]), y[r]);
      } else {
        sum[r] = S::fma(f, scale, sum[r]);
        if (kMinimum) sum[r] = S::fma(g.minimum[i], S::set1(-float(minus[r])), sum[r]);
        if (g.last) {
          y[r] = S::fma(sum[r], S::set1(x_scale[r]), y[r]);
          sum[r] = S::zero();
        }
      }
    }
    minus += kTile;
    if (g.last) x_scale += kTile;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) S::store(y_out + r * kPanel, y[r]);
}

void linear_i8_amx(const Weight& w, const QuantizedRows& x, const Output& out, Range panels, void* scratch) {
  if (x.unit != kTileK) return few_rows(w, x, out, panels, scratch);
  uint8_t* bytes = static_cast<uint8_t*>(scratch);
  float* partial = reinterpret_cast<float*>(bytes + 64 * 1024);
  int32_t* buffer = reinterpret_cast<int32_t*>(bytes + 64 * 1024 + kBlockRows * kPanel * 4);  // 2 x [16, 16]
  Segment segments[kMostSegments];
  const bool minimum = w.form == Zeros::minimum;
  const auto run = minimum                    ? tile_block<false, true>
                   : w.group % kActBlock == 0 ? tile_block<true, false>
                                              : tile_block<false, false>;
  const int64_t block_bytes = 16 * w.bits;
  const int64_t step = w.group % kTileK ? kChunk : kTileK;
  const int64_t row_stride = (w.k_padded + kTileK - 1) / kTileK * kTileK;  // bytes of one row of q
  configure(step);
  const int64_t block_rows = rows_per_block(x);
  for (int64_t row0 = 0; row0 < x.m; row0 += block_rows) {
    const int64_t row_end = min_of(row0 + block_rows, x.m);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const uint8_t* panel_codes = w.codes + panel * (w.k_padded / kStep) * block_bytes;
      memset(partial, 0, size_t((row_end - row0 + kTile - 1) / kTile * kTile) * kPanel * sizeof(float));
      int64_t first_segment = 0;
      for (int64_t k0 = 0; k0 < w.k_padded; k0 += kBlockK) {
        const int64_t k1 = min_of(k0 + kBlockK, w.k_padded);
        const uint8_t* codes = panel_codes + k0 / kStep * block_bytes;
        const uint8_t* block = bytes;
        if (w.bits == 4) {
          unpack_block(codes, k1 - k0, bytes);
        } else if ((k1 - k0) % kTileK == 0 || step == kChunk) {
          block = codes;
        } else {
          memcpy(bytes, codes, size_t(k1 - k0) / kStep * 128);
        }
        if ((k1 - k0) % kTileK && block == bytes) memset(bytes + (k1 - k0) / kStep * 128, 0, kChunk / kStep * 128);
        publish(block);
        const int64_t count = make_segments(w, panel, k0, k1, segments);
        for (int64_t r = row0; r < row_end; r += kTile) {
          const int64_t first = r * x.segments + first_segment * kTile;
          const TileRows rows{x.q + r * row_stride + k0 * kTile, x.minus + first, x.apart + first,
                              x.apart_rows + r / kTile * x.segments + first_segment,
                              x.scale + r * x.blocks + k0 / kActBlock * kTile};
          for (int i = 0; i < 2; ++i)
            run(segments, count, i, rows, block + 64 * i, step, partial + (r - row0) * kPanel + 16 * i, buffer);
        }
        first_segment += count;
      }
      for (int64_t r = row0; r < row_end; ++r) store_panel(out, w.n, r, panel, partial + (r - row0) * kPanel);
    }
  }
  _tile_release();
}

// ---- bf16 ----------------------------------------------------------------------------------------------------------

constexpr int64_t kBf16K = 32;  // inputs of a tile
constexpr int64_t kBf16Least = 16;  // fewer rows are faster in fp32

TileShape tile_rows_bf16(int64_t m) { return m < kBf16Least ? TileShape{0, 0} : TileShape{kTile, kBf16K}; }

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
  for_bf16_blocks(w, x, out, panels, scratch,
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
  k.tile_i8 = tile_rows;
  k.linear_i8 = linear_i8_amx;
  k.tile_bf16 = tile_rows_bf16;
  k.load_rows_bf16 = load_rows_bf16;
  k.linear_bf16 = linear_bf16_amx;
  k.dot_peak = dot_peak_amx;
}

}  // namespace cpullm
