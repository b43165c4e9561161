// Many rows, R at a time, times unpacked codes: what tile_i8 does, arranged so that next to nothing is left to do between
// the segments. At groups of 32 a segment is some 55 cycles of the avx2 level, and tile_i8's bookkeeping of 120
// instructions took a third of the time. Included by tile_i8-inl.h; the same chain, bit for bit.
#pragma once

namespace cpullm {
namespace {

template <int R>
void tile_many_i8(const TileArgs& a) {
  using S = Simd;
  constexpr int H = S::kHalves, L = S::kLanes;
  alignas(64) float block[R * kPanel];
  alignas(64) int32_t start[R * 2 * L] = {};
  float sums[kMostSegments * S::kTileRows];
  int32_t begin[kMostSegments * S::kTileRows];
  const int64_t q_step = a.tile * kStep, numbers = a.segment_count * a.tile;
  if (a.form == Zeros::minimum)
    for (int64_t i = 0; i < numbers; ++i) sums[i] = -float(a.minus[i]);
  if (a.form == Zeros::symmetric)
    for (int64_t i = 0; i < numbers; ++i) begin[i] = a.minus[i] * kSymmetricZero<Codes::unpacked4>;
  for (int h = 0; h < H; ++h) {
    const uint8_t* codes = a.codes;
    const int8_t* q = a.q;
    SegmentEnd e{a.params + h * 4 * L, a.minus, a.form == Zeros::minimum ? sums : nullptr,    a.x_scale, block + h * L,
                 a.y + h * L,          nullptr, a.form == Zeros::symmetric ? begin : nullptr, 0,         0};
    e.last = 1;  // of what came before: a K block begins an activation block
    for (int64_t s = 0; s < a.segment_count; ++s) {
      const BlockSegment& segment = a.segments[s];
      e.first = e.last;
      e.last = segment.ends_block;
      e.start = nullptr;
      const uint32_t rows = a.apart_rows[s];
      if (rows) {
        start_apart<Codes::unpacked4>(rows, a.apart + s * a.tile, codes, h, start);
        e.start = start;
      }
      S::template segment<R, Codes::unpacked4>(codes, h, q, q_step, segment.steps, e);
      clear_start(rows, start);
      codes += segment.steps * kStep * kPanel;
      q += segment.steps * q_step;
      e.params = static_cast<const float*>(e.params) + H * 4 * L;
      e.minus += a.tile;
      if (e.sums) e.sums += a.tile;
      if (e.begin) e.begin += a.tile;
      if (segment.ends_block) e.x_scale += a.tile;
    }
  }
}

}  // namespace
}  // namespace cpullm
