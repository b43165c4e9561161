// y[m, n] = x[m, k] W[n, k]^T with int8 activations, same chain as ref.cpp, bit for bit: what the levels have in common,
// and one row. More rows: tile_i8-inl.h, dot_run_avx512.h, amx.cpp.
//
// Zero points: sum q (c - z) = sum q c - z sum q: one multiplication of the row's sum, counted by quantize_rows.
// Ranges: a segment is at most 128 inputs, 127 of them |q| <= 127 and one kept apart |q| <= 16256: |sum q c| <= 255 *
// (127 * 127 + 16256) < 2^23, |sum q| < 2^15, so sum q and z fit int16 and the corrected int32 result is exact in fp32.
#pragma once

namespace cpullm {
namespace {

constexpr int64_t kBlockK = 512;  // inputs unpacked at a time: a multiple of kActBlock
constexpr int64_t kMostSegments = kBlockK / kChunk;

// A segment of some inputs: inputs / 4, a multiple of 8; whether it is the last one of its activation block; kPanel if it
// is of its group, else 0; its first input, counted from those.
struct BlockSegment {
  int32_t steps, ends_block, ends_group, begin;
};

// The segments of inputs [k0, k1): all tiles share them. Returns their count.
inline int64_t block_segments(int64_t k0, int64_t k1, int64_t group, BlockSegment* out) {
  const BlockSegment* const first = out;
  int64_t group_end = (k0 / group + 1) * group;
  for (int64_t k = k0; k < k1; ++out) {
    const int64_t block_end = min_of((k / kActBlock + 1) * kActBlock, k1), end = min_of(group_end, block_end);
    *out = {int32_t((end - k) / kStep), end == block_end, end == group_end ? int32_t(kPanel) : 0, int32_t(k - k0)};
    k = end;
    if (k == group_end) group_end += group;
  }
  return out - first;
}

// What one tile needs to know. Pointers stand at the tile's first row, the panel and k_begin.
struct TileArgs {
  const uint8_t* codes;  // blocks
  const uint16_t* scales;  // [groups, 32] of the whole panel
  const void* zeros;  // [groups, 32] of the whole panel
  const int8_t* q;  // [.., tile, 4]
  const float* x_scale;  // [blocks, tile]
  const int32_t *minus, *apart;  // [segments, tile]
  const uint32_t* apart_rows;  // [segments]
  const float* params;  // [segments, passes, 4 vectors], see SegmentEnd; null: made on the way
  float* y;  // [rows, 32] partial sums, read and written
  int64_t k_begin, k_end, group, tile;
  Zeros form;
  Float scale_type;
  int64_t next_codes, next_params;  // bytes and elements to those of the second panel, where a kernel takes two
  // Only of many rows:
  const BlockSegment* segments;
  int64_t segment_count;
};

// Moves to a panel's first input.
inline void at_panel(const Weight& w, int64_t panel, TileArgs& a) {
  const int64_t at = panel * w.groups * kPanel;
  a.codes = w.codes + panel * w.k_padded * kPanel * w.bits / 8;
  a.scales = w.scales + at;
  a.zeros = w.zeros ? static_cast<const char*>(w.zeros) + at * (w.form == Zeros::minimum ? 2 : 1) : nullptr;
}

// The codes of input j for the columns of pass h, one per lane.
template <Codes kCodes>
inline void code_column(const uint8_t* codes, int64_t j, int h, Simd::I& lo, Simd::I& hi) {
  using S = Simd;
  const int bits = 8 * int(j % kStep);
  if (kCodes == Codes::packed4) {
    const S::I v = S::load_packed4_raw(codes + j / kStep * 64, h);
    lo = S::iand(S::shift_right(v, bits), S::iset1(15));
    hi = S::iand(S::shift_right(v, bits + 4), S::iset1(15));
  } else {
    S::load_u8(codes + j / kStep * 128, h, lo, hi);
    const S::I bias = S::iset1(kCodes == Codes::u8 && S::kBias8 == 0 ? 128 : 0);
    lo = S::isub(S::iand(S::shift_right(lo, bits), S::iset1(255)), bias);
    hi = S::isub(S::iand(S::shift_right(hi, bits), S::iset1(255)), bias);
  }
}

// The zero point of the symmetric form, as the dot products see it.
template <Codes kCodes>
constexpr int kSymmetricZero = kCodes == Codes::u8 ? Simd::kBias8 : 8;

// Rows whose activations stay in half of the L2 cache while the panels pass by; at most kBlockRows.
inline int64_t rows_per_block(const QuantizedRows& x) {
  const int64_t rows = min_of(l2_bytes / 2 / x.k_padded, kBlockRows);
  return rows < x.tile ? x.tile : rows / x.tile * x.tile;
}

}  // namespace
}  // namespace cpullm

#include "row_i8-inl.h"

namespace cpullm {
namespace {

// Whether row_i8 takes these weights.
inline bool takes_row(const Weight& w) { return w.bits == 4 || Simd::kBias8 != 0; }

// One panel of one row. kAsk: see row_i8.
template <bool kAsk>
inline void one_panel(const Weight& w, const TileArgs& a) {
  if constexpr (Simd::kBias8 != 0)
    if (w.bits == 8) return row_i8<Codes::u8, 1, kAsk>(a);
  row_i8<Codes::packed4, 1, kAsk>(a);
}

// linear_i8 of one row.
inline void linear_row_i8(const Weight& w, const QuantizedRows& x, const Output& out, Range panels) {
  alignas(64) float y[2 * kPanel];
  TileArgs a{};
  a.q = x.q;
  a.x_scale = x.scale;
  a.minus = x.minus;
  a.apart = x.apart;
  a.apart_rows = x.apart_rows;
  a.y = y;
  a.k_end = w.k_padded;
  a.group = w.group;
  a.tile = 1;
  a.form = w.form;
  a.scale_type = w.scale_type;
  int64_t panel = panels.begin;
  if constexpr (Simd::kHalves == 1) {
    const int64_t half = pair_panels ? (panels.end - panels.begin) / 2 : 0;  // of a pair: each is a stream of its own
    a.next_codes = half * w.k_padded * kPanel * w.bits / 8;
    a.next_params = half * w.groups * kPanel;
    for (; panel < panels.begin + half; ++panel) {
      at_panel(w, panel, a);
      memset(y, 0, sizeof y);
      w.bits == 8 ? row_i8<Codes::u8, 2, true>(a) : row_i8<Codes::packed4, 2, true>(a);
      store_panel(out, w.n, 0, panel, y);
      store_panel(out, w.n, 0, panel + half, y + kPanel);
    }
    panel += half;
  }
  for (; panel < panels.end; ++panel) {
    at_panel(w, panel, a);
    memset(y, 0, kPanel * sizeof(float));
    pair_panels ? one_panel<true>(w, a) : one_panel<false>(w, a);
    store_panel(out, w.n, 0, panel, y);
  }
}

}  // namespace
}  // namespace cpullm
