// The amx level: int8 tiles for many rows; few rows stay with the avx512 kernels.
//
// One step multiplies 32 rows x 32 columns: C00 C01 C10 C11 (16 x 16 int32) += A0 A1 (16 rows x 64 inputs, s8) times
// B0 B1 (64 inputs x 16 columns, u8 codes; a row of B is one k-step of the unpacked panel). Tiles 0-3 hold C, 4-5 A, 6-7 B.
// Groups that are no multiple of 64 use half tiles of 32 inputs. After every segment C goes through a 4 KiB buffer to the
// fp32 chain of linear_i8-inl.h; the chain of one segment runs while the tiles of the next one multiply.
// Bound at g128: per segment 8 tile products of 16 cycles, and 64 vectors x (correction, convert, 2 multiply-adds, 2 stores).
#define CPULLM_TILE_ROWS 14
#include "simd_avx512.h"
//
#include "rows-inl.h"
//
#include "linear_i8-inl.h"

namespace cpullm {
namespace {

constexpr int64_t kTile = 16;      // rows of a tile
constexpr int64_t kTileK = 64;     // inputs of a full tile
constexpr int64_t kAmxRows = 12;   // from this many rows on tiles are faster (benchmarks/results)

void (*few_rows)(const Weight&, const QuantizedRows&, const Output&, Range, void*);

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
  _tile_loadconfig(&c);
}

TileShape tile_rows(int64_t m) { return m < kAmxRows ? tile_rows_i8(m) : TileShape{kTile, kTileK}; }

// The fp32 chain of one segment for `tiles` (1 or 2) row tiles.
struct Segment {
  const int32_t* acc;      // [tiles * 16, 32]
  const int32_t* minus;    // [16], next row tile at minus_stride
  const float* x_scale;    // [16], next row tile at scale_stride
  int64_t minus_stride, scale_stride;
  const uint16_t* scales;  // [32]
  const void* zeros;       // [32]
  const int32_t* sums_c;   // [chunks, 32]
  int64_t chunks;
  float* y;                // [tiles * 16, 32]
  bool first, last;        // of its activation block
};

void finish(const Segment& g, int tiles, Zeros form, Float scale_type, int symmetric_zero, Simd::F (*sum)[2]) {
  using S = Simd;
  S::I pair[2];
  S::F scale[2], minimum[2];
  for (int i = 0; i < 2; ++i) {
    pair[i] = S::izero();
    for (int64_t c = 0; c < g.chunks; ++c) pair[i] = S::iadd(pair[i], S::load_i32(g.sums_c + c * kPanel + 16 * i));
    pair[i] = S::shift_left16(pair[i]);
    if (form == Zeros::integer)
      pair[i] = S::ior(pair[i], S::load_u8_as_i32(static_cast<const uint8_t*>(g.zeros) + 16 * i));
    if (form == Zeros::symmetric) pair[i] = S::ior(pair[i], S::iset1(symmetric_zero));
    scale[i] = load_scale(g.scales + 16 * i, scale_type);
    minimum[i] = form == Zeros::minimum ? load_scale(static_cast<const uint16_t*>(g.zeros) + 16 * i, scale_type)
                                        : S::zero();
  }
  const bool whole = g.first && g.last && form != Zeros::minimum;
  for (int t = 0; t < tiles; ++t) {
    const int32_t* minus = g.minus + t * g.minus_stride;
    const float* x_scale = g.x_scale + t * g.scale_stride;
    for (int r = 0; r < kTile; ++r) {
      const int row = t * int(kTile) + r;
      const int32_t* acc = g.acc + row * kPanel;
      float* y = g.y + row * kPanel;
      const S::F s = S::set1(x_scale[r]);
      for (int i = 0; i < 2; ++i) {
        const S::F f = S::to_float(S::add_pairs(S::load_i32(acc + 16 * i), pair[i], minus + r));
        if (whole) {
          S::store(y + 16 * i, S::fma(S::mul(f, scale[i]), s, S::load(y + 16 * i)));
          continue;
        }
        S::F b = g.first ? S::mul(f, scale[i]) : S::fma(f, scale[i], sum[row][i]);
        if (form == Zeros::minimum) b = S::fma(minimum[i], S::set1(-float(int16_t(minus[r]))), b);
        if (g.last) {
          S::store(y + 16 * i, S::fma(b, s, S::load(y + 16 * i)));
        } else {
          sum[row][i] = b;
        }
      }
    }
  }
}

// C = A B over one segment of inputs [k, end), counted from k_begin of the block.
void multiply(const int8_t* a0, const int8_t* a1, const uint8_t* b, int64_t k, int64_t end, int64_t step) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (; k < end; k += step) {
    const int64_t at = k / kTileK * kTile * kTileK + k % kTileK;
    _tile_loadd(6, b + k / kStep * 128, 128);
    _tile_loadd(4, a0 + at, kTileK);
    _tile_loadd(7, b + k / kStep * 128 + 64, 128);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (a1) {
      _tile_loadd(5, a1 + at, kTileK);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
}

void linear_i8_amx(const Weight& w, const QuantizedRows& x, const Output& out, Range panels, void* scratch) {
  if (x.unit != kTileK) return few_rows(w, x, out, panels, scratch);
  using S = Simd;
  uint8_t* bytes = static_cast<uint8_t*>(scratch);
  int32_t* sums_c = reinterpret_cast<int32_t*>(bytes + 32 * kBlockK);
  float* partial = reinterpret_cast<float*>(bytes + 64 * 1024);
  int32_t* buffer = reinterpret_cast<int32_t*>(bytes + 64 * 1024 + 512 * kPanel * 4);  // two of [32, 32]
  alignas(64) S::F sum[2 * kTile][2];
  const int64_t block_bytes = 16 * w.bits;
  const int64_t step = w.group % kTileK ? kChunk : kTileK;
  const int64_t row_stride = (w.k_padded + kTileK - 1) / kTileK * kTileK;  // bytes of one row of q
  const int symmetric_zero = w.bits == 8 ? 128 : 8;
  configure(step);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const uint8_t* panel_codes = w.codes + panel * (w.k_padded / kStep) * block_bytes;
    const uint16_t* scales = w.scales + panel * w.groups * kPanel;
    for (int64_t row0 = 0; row0 < x.m; row0 += kBlockRows) {
      const int64_t row_end = min_of(row0 + kBlockRows, x.m);
      memset(partial, 0, size_t((row_end - row0 + kTile - 1) / kTile * kTile) * kPanel * sizeof(float));
      int64_t first_segment = 0;
      for (int64_t k0 = 0; k0 < w.k_padded; k0 += kBlockK) {
        const int64_t k1 = min_of(k0 + kBlockK, w.k_padded);
        const uint8_t* codes = panel_codes + k0 / kStep * block_bytes;
        const uint8_t* block = bytes;
        if (w.bits == 4) {
          prepare_block<Codes::unpacked4>(codes, k1 - k0, bytes, sums_c);
        } else {
          prepare_block<Codes::u8>(codes, k1 - k0, nullptr, sums_c);
          if ((k1 - k0) % kTileK == 0 || step == kChunk) {
            block = codes;
          } else {
            memcpy(bytes, codes, size_t(k1 - k0) / kStep * 128);
          }
        }
        if ((k1 - k0) % kTileK && block == bytes) memset(bytes + (k1 - k0) / kStep * 128, 0, kChunk / kStep * 128);
        __asm__ volatile("" ::: "memory");  // the tile loads below do not say what they read
        for (int64_t r = row0; r < row_end; r += 2 * kTile) {
          const int tiles = r + kTile < x.m ? 2 : 1;
          const int8_t* a0 = x.q + r * row_stride + k0 * kTile;
          const int8_t* a1 = tiles == 2 ? a0 + kTile * row_stride : nullptr;
          Segment pending;
          bool waiting = false;
          int64_t segment = first_segment;
          for (int64_t k = k0; k < k1; ++segment) {
            const int64_t block_end = min_of((k / kActBlock + 1) * kActBlock, k1);
            const int64_t g = k / w.group;
            const int64_t end = min_of((g + 1) * w.group, block_end);
            multiply(a0, a1, block, k - k0, end - k0, step);
            if (waiting) finish(pending, tiles, w.form, w.scale_type, symmetric_zero, sum);
            int32_t* acc = buffer + (segment & 1) * 2 * kTile * kPanel;
            _tile_stored(0, acc, kPanel * 4);
            _tile_stored(1, acc + 16, kPanel * 4);
            if (tiles == 2) {
              _tile_stored(2, acc + kTile * kPanel, kPanel * 4);
              _tile_stored(3, acc + kTile * kPanel + 16, kPanel * 4);
            }
            pending.acc = acc;
            pending.minus_stride = x.segments * kTile;
            pending.scale_stride = x.blocks * kTile;
            pending.minus = x.minus + r * x.segments + segment * kTile;
            pending.x_scale = x.scale + r * x.blocks + k / kActBlock * kTile;
            pending.scales = scales + g * kPanel;
            const int64_t at = (panel * w.groups + g) * kPanel;
            pending.zeros = w.form == Zeros::integer ? static_cast<const void*>(static_cast<const uint8_t*>(w.zeros) + at)
                            : w.form == Zeros::minimum
                                ? static_cast<const void*>(static_cast<const uint16_t*>(w.zeros) + at)
                                : nullptr;
            pending.sums_c = sums_c + (k - k0) / kChunk * kPanel;
            pending.chunks = (end - k) / kChunk;
            pending.y = partial + (r - row0) * kPanel;
            pending.first = k % kActBlock == 0;
            pending.last = end == block_end;
            waiting = true;
            k = end;
          }
          finish(pending, tiles, w.form, w.scale_type, symmetric_zero, sum);
        }
        first_segment += count_segments(k0, k1, w.group);
      }
      for (int64_t r = row0; r < row_end; ++r) store_panel(out, w.n, r, panel, partial + (r - row0) * kPanel);
    }
  }
  _tile_release();
}

}  // namespace

void use_amx(Kernels& k) {
  few_rows = k.linear_i8;
  k.tile_i8 = tile_rows;
  k.linear_i8 = linear_i8_amx;
}

}  // namespace cpullm
