// Activations in, results out: quantisation, fp32 loading, bias and rounding. Written once over Simd.
#pragma once

namespace cpullm {
namespace {

constexpr int64_t kBlockRows = 512;  // rows whose partial sums are kept while a panel's next inputs are unpacked

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

static inline Simd::F load_scale(const uint16_t* p, Float type) {
  return type == Float::f16 ? Simd::load_f16(p) : Simd::load_bf16(p);
}

// Rows per tile so that ceil(m / tile) tiles are as even as possible and none holds more than `most` rows.
static inline int64_t even_tile(int64_t m, int64_t most) {
  const int64_t tiles = (m + most - 1) / most;
  return (m + tiles - 1) / tiles;
}

// 32-input chunk of one row as floats: zero where j >= k.
static inline void load_chunk(const Rows& in, const char* row, int64_t j0, float* v) {
  constexpr int kVecs = int(kChunk) / Simd::kLanes;
  if (in.order || j0 + kChunk > in.k) {
    for (int64_t j = 0; j < kChunk; ++j)
      v[j] = j0 + j < in.k ? load_float(row, in.order ? in.order[j0 + j] : j0 + j, in.type) : 0.0f;
    return;
  }
  if (in.type == Float::f32) {
    const float* p = reinterpret_cast<const float*>(row) + j0;
    for (int i = 0; i < kVecs; ++i) Simd::store(v + i * Simd::kLanes, Simd::load(p + i * Simd::kLanes));
  } else {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(row) + j0;
    for (int i = 0; i < kVecs; ++i) Simd::store(v + i * Simd::kLanes, load_scale(p + i * Simd::kLanes, in.type));
  }
}

static inline const char* row_address(const Rows& in, int64_t r) {
  return static_cast<const char*>(in.x) + r * in.stride * (in.type == Float::f32 ? 4 : 2);
}

// scale, 1 / scale and the input kept apart (its place in v, or -1) of one block of inputs; see ref.cpp.
struct BlockParams {
  float scale, inverse;
  int32_t apart;
};

static inline BlockParams block_params(const float* v, int64_t width) {
  using S = Simd;
  S::I most = S::izero(), second = S::izero();  // magnitudes as bits: they order like the floats
  for (int64_t j = 0; j < width; j += S::kLanes) {
    const S::I x = S::magnitude(S::load(v + j));
    second = S::max_u32(second, S::min_u32(most, x));
    most = S::max_u32(most, x);
  }
  const uint32_t top = S::reduce_max_u32(most);
  const uint32_t holders = S::equal_lanes(most, top);
  uint32_t next = S::reduce_max_u32(S::max_u32(second, S::without_lanes(most, top)));
  if (holders & (holders - 1)) next = top;
  if (top >= 0x7f800000u) return {bits_to_float(0x7fc00000u), 0.0f, -1};
  const bool apart = bits_to_float(next) <= bits_to_float(top) * 0.7f;
  const float rest = bits_to_float(next) * (1.0f / 127.0f), least = bits_to_float(top) * (1.0f / float(kMostApart));
  const float scale = !apart ? bits_to_float(top) * (1.0f / 127.0f) : rest > least ? rest : least;
  if (scale < 0x1p-100f) return {0.0f, 0.0f, -1};
  int64_t at = -1;
  if (apart) {
    uint32_t lanes = 0;
    for (at = 0; !(lanes = S::equal_lanes(S::magnitude(S::load(v + at)), top)); at += S::kLanes) {
    }
    at += __builtin_ctz(lanes);
  }
  return {scale, 1.0f / scale, int32_t(at)};
}

// Codes [width] of one row, a multiple of kChunk, to their places among the rows of a tile.
static inline void interleave(const int8_t* q, int64_t width, const QuantizedRows& out, int8_t* to) {
  if (out.tile == 1) {
    memcpy(to, q, size_t(width));
  } else if (out.unit == kStep) {
    const int64_t step = kStep * out.tile;
    for (int64_t j = 0; j < width; j += 2 * kStep, to += 2 * step) {
      memcpy(to, q + j, kStep);
      memcpy(to + step, q + j + kStep, kStep);
    }
  } else {
    for (int64_t j = 0; j < width; j += out.unit) memcpy(to + j * out.tile, q + j, size_t(min_of(out.unit, width - j)));
  }
}

// q = round(x / scale) per row and block of kActBlock inputs, an outgrowing input apart. Same results as ref.cpp. A few
// blocks at a time: first all their scales, then all their codes, so that one block's reductions and division do not
// hold up the next.
[[maybe_unused]] void quantize_rows(const Rows& in, const QuantizedRows& out, Range rows) {
  using S = Simd;
  constexpr int64_t kBlocks = 8, kInputs = kBlocks * kActBlock;
  alignas(64) float v[kInputs];
  alignas(64) int8_t q[kInputs];
  BlockParams params[kBlocks];
  int32_t apart[kBlocks];
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const char* row = row_address(in, r);
    const int64_t tile = r / out.tile, lane = r % out.tile;
    const int64_t units = (out.k_padded + out.unit - 1) / out.unit;
    int8_t* row_q = out.q + (tile * units * out.tile + lane) * out.unit;
    float* row_scale = out.scale + tile * out.blocks * out.tile + lane;
    int64_t segment = tile * out.segments;
    int64_t group_end = out.group;
    if (lane == 0) memset(out.apart_rows + segment, 0, size_t(out.segments) * sizeof(uint32_t));
    for (int64_t j0 = 0; j0 < out.k_padded; j0 += kInputs) {
      const int64_t width = min_of(kInputs, out.k_padded - j0);
      for (int64_t j = 0; j < width; j += kChunk) load_chunk(in, row, j0 + j, v + j);
      for (int64_t j = 0; j < width; j += kActBlock) {
        const BlockParams p = block_params(v + j, min_of(kActBlock, width - j));
        params[j / kActBlock] = p;
        row_scale[(j0 + j) / kActBlock * out.tile] = p.scale;
        if (p.apart >= 0) {
          apart[j / kActBlock] = _mm_cvtss_si32(_mm_set_ss(v[j + p.apart] * p.inverse));
          v[j + p.apart] = 0.0f;
        }
      }
      for (int64_t j = 0; j < width; ++segment) {
        const BlockParams& p = params[j / kActBlock];
        const int64_t begin = j, block = j / kActBlock * kActBlock;
        const int64_t end = min_of(group_end - j0, min_of(block + kActBlock, width));
        if (j0 + end == group_end) group_end += out.group;
        if (p.inverse == 0.0f) {  // inf, nan or all but zero
          memset(q + j, 0, size_t(end - j));
          j = end;
          out.minus[segment * out.tile + lane] = 0;
          continue;
        }
        const S::F inverse = S::set1(p.inverse);
        S::I sums = S::izero();
        for (; j < end; j += S::kLanes) {
          const S::I n = S::round(S::mul(S::load(v + j), inverse));  // |n| <= 127: |x| <= 127 scale but for rounding
          sums = S::iadd(sums, n);
          S::store_i8(q + j, n);
        }
        int32_t sum = S::reduce_add(sums);
        const int64_t at = block + p.apart;
        if (p.apart >= 0 && at >= begin && at < end) {
          const int32_t value = apart[block / kActBlock];
          sum += value;
          out.apart[segment * out.tile + lane] = int32_t(uint32_t(value) << 8 | uint32_t(at - begin));
          out.apart_rows[segment] |= 1u << lane;
        }
        out.minus[segment * out.tile + lane] = -sum;
      }
      interleave(q, width, out, row_q + j0 * out.tile);
    }
  }
}

[[maybe_unused]] void load_rows(const Rows& in, const FloatRows& out, Range rows) {
  alignas(64) float v[kChunk];
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const char* row = row_address(in, r);
    float* tile = out.x + (r / out.tile) * out.tile * out.k_padded + r % out.tile;
    for (int64_t j = 0; j < out.k_padded; j += kChunk) {
      load_chunk(in, row, j, v);
      for (int64_t i = 0; i < kChunk; ++i) tile[(j + i) * out.tile] = v[i];
    }
  }
}

// Writes the 32 sums y of row r, panel `panel`, plus bias, rounded to the output's type.
static inline void store_panel(const Output& out, int64_t n, int64_t r, int64_t panel, const float* y) {
  const int64_t col = panel * kPanel;
  const int64_t at = r * out.stride + col;
  if (col + kPanel > n) {
    for (int64_t c = 0; c < n - col; ++c)
      store_float(out.y, at + c, out.type, out.bias ? y[c] + out.bias[col + c] : y[c]);
    return;
  }
  for (int i = 0; i < int(kPanel); i += Simd::kLanes) {
    Simd::F v = Simd::load(y + i);
    if (out.bias) v = v + Simd::load(out.bias + col + i);
    if (out.type == Float::f32) {
      Simd::store(static_cast<float*>(out.y) + at + i, v);
    } else if (out.type == Float::bf16) {
      Simd::store_bf16(static_cast<uint16_t*>(out.y) + at + i, v);
    } else {
      Simd::store_f16(static_cast<uint16_t*>(out.y) + at + i, v);
    }
  }
}

}  // namespace
}  // namespace cpullm
