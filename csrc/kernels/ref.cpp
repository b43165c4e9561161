// The meaning of every kernel in plain C++. Runs on any CPU; the other levels are checked against it.
//
// int8 chain of one output (all levels, bit for bit): a segment is a run of inputs inside one weight group and one
// activation block;   acc = sum q * code - zero * sum q   (exact int32)
//   block = fma(float(acc), scale, block)                 segments ascending
//   block = fma(minimum, float(sum q), block)             float-minimum form only
//   y     = fma(block, activation scale, y)               blocks ascending
#include "half.h"
#include "kernels.h"

namespace cpullm {
namespace {

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t one_row(int64_t) { return 1; }

int code_at(const Weight& w, int64_t col, int64_t j) {
  const int64_t c = col % kPanel;
  const int64_t block = (col / kPanel) * (w.k_padded / kStep) + j / kStep;
  if (w.bits == 8) return w.codes[block * 128 + c * 4 + j % kStep];
  const int byte = w.codes[block * 64 + (c % 16) * 4 + j % kStep];
  return c < 16 ? byte & 15 : byte >> 4;
}

// Group parameters of column col: w = scale * (code - zero) or scale * code + minimum.
struct GroupParams {
  float scale, minimum;
  int zero;
};

GroupParams group_params(const Weight& w, int64_t col, int64_t g) {
  const int64_t i = ((col / kPanel) * w.groups + g) * kPanel + col % kPanel;
  GroupParams p{load_float(w.scales, i, w.scale_type), 0.0f, 0};
  if (w.form == Zeros::symmetric) p.zero = w.bits == 8 ? 128 : 8;
  if (w.form == Zeros::integer) p.zero = static_cast<const uint8_t*>(w.zeros)[i];
  if (w.form == Zeros::minimum) p.minimum = load_float(w.zeros, i, w.scale_type);
  return p;
}

void quantize_rows(const Rows& in, const QuantizedRows& out, Range rows) {
  const int64_t chunks = out.k_padded / kChunk;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    int8_t* tile = out.q + (r / out.tile) * out.tile * out.k_padded + (r % out.tile) * kStep;
    for (int64_t c = 0; c < chunks; ++c) out.sums[r * chunks + c] = 0;
    for (int64_t b = 0; b < out.blocks; ++b) {
      const int64_t end = min64((b + 1) * kActBlock, out.k_padded);
      uint32_t amax = 0;  // of the magnitudes' bit patterns: inf and nan order above every number
      for (int64_t j = b * kActBlock; j < min64(end, in.k); ++j) {
        const float v = load_float(in.x, r * in.stride + (in.order ? in.order[j] : j), in.type);
        const uint32_t u = float_to_bits(v) & 0x7fffffffu;
        amax = u > amax ? u : amax;
      }
      const bool finite = amax < 0x7f800000u;
      const float top = bits_to_float(amax);
      const bool tiny = top < 0x1p-100f;  // quantised to zero: 127 / top could overflow
      const float inverse = finite && !tiny ? 127.0f / top : 0.0f;
      out.scale[r * out.blocks + b] = !finite ? bits_to_float(0x7fc00000u) : tiny ? 0.0f : top * (1.0f / 127.0f);
      for (int64_t j = b * kActBlock; j < end; ++j) {
        int q = 0;
        if (j < in.k && finite) {
          const float v = load_float(in.x, r * in.stride + (in.order ? in.order[j] : j), in.type);
          q = int(__builtin_nearbyintf(v * inverse));
        }
        tile[(j / kStep) * out.tile * kStep + j % kStep] = int8_t(q);
        out.sums[r * chunks + j / kChunk] = int16_t(out.sums[r * chunks + j / kChunk] + q);
      }
    }
  }
}

void load_rows(const Rows& in, const FloatRows& out, Range rows) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    float* tile = out.x + (r / out.tile) * out.tile * out.k_padded + r % out.tile;
    for (int64_t j = 0; j < out.k_padded; ++j) {
      const int64_t at = r * in.stride + (in.order && j < in.k ? in.order[j] : j);
      tile[j * out.tile] = j < in.k ? load_float(in.x, at, in.type) : 0.0f;
    }
  }
}

void linear_i8(const Weight& w, const QuantizedRows& x, const Output& out, Range panels, void*) {
  const int64_t chunks = x.k_padded / kChunk;
  const int64_t col_end = min64(panels.end * kPanel, w.n);
  for (int64_t r = 0; r < x.m; ++r) {
    const int8_t* tile = x.q + (r / x.tile) * x.tile * x.k_padded + (r % x.tile) * kStep;
    for (int64_t col = panels.begin * kPanel; col < col_end; ++col) {
      float y = 0.0f;
      for (int64_t b = 0; b < x.blocks; ++b) {
        float block = 0.0f;
        const int64_t block_end = min64((b + 1) * kActBlock, w.k_padded);
        for (int64_t j = b * kActBlock; j < block_end;) {
          const int64_t g = j / w.group;
          const int64_t end = min64((g + 1) * w.group, block_end);
          const GroupParams p = group_params(w, col, g);
          int32_t acc = 0, sum = 0;
          for (int64_t c = j / kChunk; c < end / kChunk; ++c) sum += x.sums[r * chunks + c];
          for (; j < end; ++j) acc += tile[(j / kStep) * x.tile * kStep + j % kStep] * code_at(w, col, j);
          block = __builtin_fmaf(float(acc - p.zero * sum), p.scale, block);
          if (w.form == Zeros::minimum) block = __builtin_fmaf(p.minimum, float(sum), block);
        }
        y = __builtin_fmaf(block, x.scale[r * x.blocks + b], y);
      }
      store_float(out.y, r * out.stride + col, out.type, out.bias ? y + out.bias[col] : y);
    }
  }
}

float weight_at(const Weight& w, int64_t col, int64_t j) {
  const GroupParams p = group_params(w, col, j / w.group);
  // Without a minimum both products are exact in fp32 (11 + 8 bits), so this is scale * (code - zero) exactly.
  const float base = w.form == Zeros::minimum ? p.minimum : -float(p.zero) * p.scale;
  return __builtin_fmaf(float(code_at(w, col, j)), p.scale, base);
}

void linear_f32(const Weight& w, const FloatRows& x, const Output& out, Range panels, void*) {
  const int64_t col_end = min64(panels.end * kPanel, w.n);
  for (int64_t r = 0; r < x.m; ++r) {
    const float* tile = x.x + (r / x.tile) * x.tile * x.k_padded + r % x.tile;
    for (int64_t col = panels.begin * kPanel; col < col_end; ++col) {
      float y = 0.0f;
      for (int64_t j = 0; j < w.k_padded; ++j) y = __builtin_fmaf(tile[j * x.tile], weight_at(w, col, j), y);
      store_float(out.y, r * out.stride + col, out.type, out.bias ? y + out.bias[col] : y);
    }
  }
}

void dequantize_row(const Weight& w, int64_t row, void* out, Float type) {
  for (int64_t j = 0; j < w.k; ++j) store_float(out, j, type, weight_at(w, row, j));
}

}  // namespace

void use_ref(Kernels& k) {
  k = {"ref", one_row, one_row, quantize_rows, load_rows, linear_i8, linear_f32, dequantize_row};
}

}  // namespace cpullm
