// Tiles of the 256-bit levels: R rows x 32 columns. Few rows (kPackedRows) read the packed nibbles directly. Many rows
// first unpack kBlockK inputs of the panel to bytes (16 KiB, stays in L1), then run every tile over it. The fp32 chains
// live in memory (L1).
#pragma once

#include "linear_i8-inl.h"

namespace cpullm {
namespace {

// start [rows, 2 vectors] = the inputs kept apart times their codes.
template <Codes kCodes>
inline void start_apart(uint32_t rows, const int32_t* apart, const uint8_t* codes, int h, int32_t* start) {
  using S = Simd;
  for (; rows; rows &= rows - 1) {
    const int r = __builtin_ctz(rows);
    S::I lo, hi;
    code_column<kCodes>(codes, apart[r] & 255, h, lo, hi);
    S::store_i32(start + r * 2 * S::kLanes, S::imul16(lo, apart[r] >> 8));
    S::store_i32(start + r * 2 * S::kLanes + S::kLanes, S::imul16(hi, apart[r] >> 8));
  }
}

inline void clear_start(uint32_t rows, int32_t* start) {
  using S = Simd;
  for (; rows; rows &= rows - 1) {
    int32_t* row = start + __builtin_ctz(rows) * 2 * S::kLanes;
    S::store_i32(row, S::izero());
    S::store_i32(row + S::kLanes, S::izero());
  }
}

// SegmentEnd::params of pass h of a group.
template <Codes kCodes>
inline void group_params(const TileArgs& a, int64_t group, int h, float* out) {
  using S = Simd;
  constexpr int L = S::kLanes;
  const int64_t c0 = group * kPanel + h * L, c1 = c0 + 16;
  if (a.form == Zeros::minimum) {
    const uint16_t* minima = static_cast<const uint16_t*>(a.zeros);
    S::store(out, load_scale(minima + c0, a.scale_type));
    S::store(out + L, load_scale(minima + c1, a.scale_type));
  } else {
    const uint8_t* zeros = static_cast<const uint8_t*>(a.zeros);
    auto* to = reinterpret_cast<int32_t*>(out);
    S::store_i32(to, zeros ? S::load_u8_as_i32(zeros + c0) : S::iset1(kSymmetricZero<kCodes>));
    S::store_i32(to + L, zeros ? S::load_u8_as_i32(zeros + c1) : S::iset1(kSymmetricZero<kCodes>));
  }
  S::store(out + 2 * L, load_scale(a.scales + c0, a.scale_type));
  S::store(out + 3 * L, load_scale(a.scales + c1, a.scale_type));
}

// The same for all segments of [a.k_begin, a.k_end): many tiles share them.
template <Codes kCodes>
inline void block_params(const TileArgs& a, float* out) {
  constexpr int H = Simd::kHalves, L = Simd::kLanes;
  int64_t group = a.k_begin / a.group, group_end = (group + 1) * a.group;
  for (int64_t k = a.k_begin; k < a.k_end; out += H * 4 * L) {
    for (int h = 0; h < H; ++h) group_params<kCodes>(a, group, h, out + h * 4 * L);
    k = min_of(group_end, min_of((k / kActBlock + 1) * kActBlock, a.k_end));
    if (k == group_end) {
      ++group;
      group_end += a.group;
    }
  }
}

}  // namespace
}  // namespace cpullm

#include "tile_many_i8-inl.h"

namespace cpullm {
namespace {

template <int R, Codes kCodes>
void tile_i8(const TileArgs& a) {
  if constexpr (kCodes == Codes::unpacked4) return tile_many_i8<R>(a);
  using S = Simd;
  constexpr int H = S::kHalves, L = S::kLanes;
  constexpr int64_t kBlockBytes = kCodes == Codes::packed4 ? 64 : 128;
  alignas(64) float params[4 * L];
  alignas(64) float block[R * kPanel];
  alignas(64) int32_t start[R * 2 * L];
  float sums[R];
  int32_t begin[R];
  bool start_is_zero = false;
  const float* ready = a.params;
  const uint8_t* codes = a.codes;
  const int8_t* q = a.q;
  const int64_t q_step = a.tile * kStep;
  const int32_t* apart = a.apart;
  const uint32_t* apart_rows = a.apart_rows;
  SegmentEnd e{params, a.minus, a.form == Zeros::minimum ? sums : nullptr,    a.x_scale, block,
               a.y,    nullptr, a.form == Zeros::symmetric ? begin : nullptr, 0,         0};
  int64_t group = a.k_begin / a.group;
  int64_t group_end = (group + 1) * a.group;
  for (int64_t k = a.k_begin; k < a.k_end;) {
    const int64_t block_end = min_of((k / kActBlock + 1) * kActBlock, a.k_end);
    e.first = 1;
    while (k < block_end) {
      const int64_t end = min_of(group_end, block_end);
      e.last = end == block_end;
      if (e.sums)
        for (int r = 0; r < R; ++r) sums[r] = -float(e.minus[r]);
      if (e.begin)
        for (int r = 0; r < R; ++r) begin[r] = e.minus[r] * kSymmetricZero<kCodes>;
      const uint32_t rows = *apart_rows;
      if (rows && !start_is_zero) {
        memset(start, 0, sizeof start);
        start_is_zero = true;
      }
      e.start = rows ? start : nullptr;
      for (int h = 0; h < H; ++h) {
        if (a.params) {
          e.params = ready;
          ready += 4 * L;
        } else {
          group_params<kCodes>(a, group, h, params);
        }
        if (rows) start_apart<kCodes>(rows, apart, codes, h, start);
        e.block = block + h * L;
        e.y = a.y + h * L;
        S::template segment<R, kCodes>(codes, h, q, q_step, (end - k) / kStep, e);
      }
      clear_start(rows, start);
      codes += (end - k) / kStep * kBlockBytes;
      q += (end - k) / kStep * q_step;
      e.minus += a.tile;
      e.first = 0;
      apart += a.tile;
      ++apart_rows;
      k = end;
      if (k == group_end) {
        ++group;
        group_end += a.group;
      }
    }
    e.x_scale += a.tile;
  }
}

template <Codes kCodes>
void run_tile(int64_t rows, const TileArgs& a) {
  switch (rows) {
    case 1: return tile_i8<1, kCodes>(a);
    case 2: return tile_i8<2, kCodes>(a);
    case 3: return tile_i8<3, kCodes>(a);
    case 4: return tile_i8<4, kCodes>(a);
    case 5: return tile_i8<5, kCodes>(a);
    case 6: return tile_i8<6, kCodes>(a);
    default: __builtin_trap();  // a tile this level does not make
  }
}

// Packed codes of k inputs of a panel to bytes.
inline void unpack_block(const uint8_t* codes, int64_t k, uint8_t* bytes) {
  for (int64_t s = 0; s < k / kStep; ++s) Simd::unpack4(codes + 64 * s, bytes + 128 * s);
}

TileShape tile_rows_i8(int64_t m, int64_t) { return {even_tile(m, Simd::kTileRows), kStep}; }

void linear_i8(const Weight& w, const QuantizedRows& x, const Output& out, Range panels, void* scratch) {
  if (x.m == 1 && takes_row(w)) return linear_row_i8(w, x, out, panels);
  const bool unpack = w.bits == 4 && x.m > Simd::kPackedRows;
  uint8_t* bytes = static_cast<uint8_t*>(scratch);
  float* params = reinterpret_cast<float*>(bytes + 32 * kBlockK);
  float* partial = reinterpret_cast<float*>(bytes + 64 * 1024);
  const int64_t block_bytes = 16 * w.bits;
  const bool many = x.m > 2 * x.tile;
  const int64_t block_rows = unpack ? kBlockRows / x.tile * x.tile : rows_per_block(x);
  const int64_t block_k = x.m <= x.tile ? w.k_padded : kBlockK;  // one tile: the stream of codes must not pause
  BlockSegment segments[kMostSegments];
  TileArgs a;
  a.segments = segments;
  a.group = w.group;
  a.tile = x.tile;
  a.form = w.form;
  a.scale_type = w.scale_type;
  for (int64_t row0 = 0; row0 < x.m; row0 += block_rows) {
    const int64_t row_end = min_of(row0 + block_rows, x.m);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      at_panel(w, panel, a);
      const uint8_t* panel_codes = a.codes;
      memset(partial, 0, size_t(row_end - row0) * kPanel * sizeof(float));
      int64_t segment = 0;
      for (int64_t k0 = 0; k0 < w.k_padded; k0 += block_k) {
        a.k_begin = k0;
        a.k_end = min_of(k0 + block_k, w.k_padded);
        a.codes = panel_codes + k0 / kStep * block_bytes;
        if (unpack) {
          unpack_block(a.codes, a.k_end - k0, bytes);
          a.segment_count = block_segments(k0, a.k_end, w.group, segments);
          a.codes = bytes;
        }
        a.params = many ? params : nullptr;
        if (many) w.bits == 8 ? block_params<Codes::u8>(a, params) : block_params<Codes::packed4>(a, params);
        for (int64_t r = row0; r < row_end; r += x.tile) {
          a.q = x.q + r * x.k_padded + k0 * x.tile;
          a.x_scale = x.scale + r * x.blocks + k0 / kActBlock * x.tile;
          a.minus = x.minus + r * x.segments + segment * x.tile;
          a.apart = x.apart + r * x.segments + segment * x.tile;
          a.apart_rows = x.apart_rows + r / x.tile * x.segments + segment;
          a.y = partial + (r - row0) * kPanel;
          const int64_t rows = min_of(x.tile, x.m - r);
          if (w.bits == 8) {
            run_tile<Codes::u8>(rows, a);
          } else if (unpack) {
            run_tile<Codes::unpacked4>(rows, a);
          } else {
            run_tile<Codes::packed4>(rows, a);
          }
        }
        segment += count_segments(k0, a.k_end, w.group);
      }
      for (int64_t r = row0; r < row_end; ++r) store_panel(out, w.n, r, panel, partial + (r - row0) * kPanel);
    }
  }
}

}  // namespace
}  // namespace cpullm
