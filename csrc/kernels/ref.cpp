// The meaning of every kernel in plain C++. Runs on any CPU; the other levels are checked against it.
//
// int8 chain of one output (all levels, bit for bit): a segment is a run of inputs inside one weight group and one
// activation block;   acc = sum q * (code - zero), q with the input kept apart   (exact int32)
//   block = fma(float(acc), scale, block)                      segments ascending
//   block = fma(minimum, float(sum q), block)                  float-minimum form only (zero = 0)
//   y     = fma(block, activation scale, y)                    blocks ascending
#include "block.h"
#include "half.h"
#include "kernels.h"

namespace cpullm {
namespace {

// 16 floats, one at a time; what weights-inl.h is written in.
struct Lanes {
  float v[16];
  template <class F>
  static Lanes each(const F& f) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = f(i);
    return r;
  }
  static Lanes zero() { return set1(0.0f); }
  static Lanes set1(float x) {
    return each([&](int) { return x; });
  }
  static Lanes load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  static Lanes mul(const Lanes& a, const Lanes& b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
    return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
  }
  static Lanes fms(const Lanes& a, const Lanes& b, const Lanes& c) {
    return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], -c.v[i]); });
  }
  static Lanes round(const Lanes& a) {
    return each([&](int i) { return __builtin_nearbyintf(a.v[i]); });
  }
  static Lanes clamp(const Lanes& a, const Lanes& lo, const Lanes& hi) {
    return each([&](int i) { return a.v[i] < lo.v[i] ? lo.v[i] : a.v[i] > hi.v[i] ? hi.v[i] : a.v[i]; });
  }
  // Halves are added: 16 -> 8 -> 4 -> 2 -> 1 lanes.
  float sum() const {
    float t[16];
    for (int i = 0; i < 16; ++i) t[i] = v[i];
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) t[i] += t[i + width];
    return t[0];
  }
};

}  // namespace
}  // namespace cpullm

#include "weights-inl.h"

namespace cpullm {
namespace {

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

TileShape plain_rows(int64_t, int64_t) { return {1, kStep}; }

int64_t one_row(int64_t) { return 1; }

TileShape no_tile(int64_t) { return {}; }

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

// One block of one row: q = round(x / scale), the largest magnitude at 127. If the others need at most 0.7 of that
// range, the largest is kept apart and they decide the scale.
struct BlockParams {
  float scale, inverse;
  bool apart;
};

BlockParams block_params(float most, float second, bool finite) {
  if (!finite) return {bits_to_float(0x7fc00000u), 0.0f, false};
  const bool apart = second <= most * 0.7f;
  const float rest = second * (1.0f / 127.0f), least = most * (1.0f / float(kMostApart));
  const float scale = !apart ? most * (1.0f / 127.0f) : rest > least ? rest : least;
  if (scale < 0x1p-100f) return {0.0f, 0.0f, false};  // 1 / scale could overflow
  return {scale, 1.0f / scale, apart};
}

int32_t clamp_to(int32_t v, int32_t most) { return v < -most ? -most : v > most ? most : v; }

void quantize_rows(const Rows& in, const QuantizedRows& out, Range rows) {
  const auto at = [&](int64_t r, int64_t j) {
    return load_float(in.x, r * in.stride + (in.order ? in.order[j] : j), in.type);
  };
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const int64_t tile = r / out.tile, lane = r % out.tile;
    const int64_t units = (out.k_padded + out.unit - 1) / out.unit;
    int8_t* to = out.q + (tile * units * out.tile + lane) * out.unit;
    int64_t segment = 0;
    for (int64_t b = 0; b < out.blocks; ++b) {
      const int64_t begin = b * kActBlock, end = min64(begin + kActBlock, out.k_padded);
      uint32_t most = 0, second = 0;  // magnitudes: bits of non-negative floats order like the floats
      int64_t largest = begin;
      for (int64_t j = begin; j < min64(end, in.k); ++j) {
        const uint32_t v = float_to_bits(at(r, j)) & 0x7fffffffu;
        if (v > most) largest = j;
        second = v > most ? most : v > second ? v : second;
        most = v > most ? v : most;
      }
      const BlockParams p = block_params(bits_to_float(most), bits_to_float(second), most < 0x7f800000u);
      out.scale[(tile * out.blocks + b) * out.tile + lane] = p.scale;
      for (int64_t j = begin; j < end; ++segment) {
        const int64_t segment_begin = j, segment_end = min64((j / out.group + 1) * out.group, end);
        const int64_t i = tile * out.segments + segment;
        uint32_t& apart_rows = out.apart_rows[i];
        if (lane == 0) apart_rows = 0;
        int32_t sum = 0;
        for (; j < segment_end; ++j) {
          int32_t q = 0;
          if (j < in.k && p.inverse != 0.0f) q = int32_t(__builtin_nearbyintf(at(r, j) * p.inverse));
          const bool apart = p.apart && j == largest;
          q = clamp_to(q, apart ? kMostApart : 127);
          sum += q;
          if (apart) {
            out.apart[i * out.tile + lane] = int32_t(uint32_t(q) << 8 | uint32_t(j - segment_begin));
            apart_rows |= 1u << lane;
            q = 0;
          }
          to[(j / out.unit) * out.tile * out.unit + j % out.unit] = int8_t(q);
        }
        out.minus[i * out.tile + lane] = -sum;
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
  const int64_t col_end = min64(panels.end * kPanel, w.n);
  for (int64_t r = 0; r < x.m; ++r) {
    const int64_t tile = r / x.tile, lane = r % x.tile;
    const int8_t* q = x.q + tile * x.tile * x.k_padded + lane * kStep;
    for (int64_t col = panels.begin * kPanel; col < col_end; ++col) {
      float y = 0.0f;
      int64_t segment = tile * x.segments;
      for (int64_t b = 0; b < x.blocks; ++b) {
        float block = 0.0f;
        const int64_t block_end = min64((b + 1) * kActBlock, w.k_padded);
        for (int64_t j = b * kActBlock; j < block_end; ++segment) {
          const int64_t g = j / w.group, begin = j;
          const int64_t end = min64((g + 1) * w.group, block_end);
          const GroupParams p = group_params(w, col, g);
          const int32_t minus = x.minus[segment * x.tile + lane];
          int32_t acc = 0;
          for (; j < end; ++j) acc += q[(j / kStep) * x.tile * kStep + j % kStep] * code_at(w, col, j);
          if (x.apart_rows[segment] >> lane & 1) {
            const int32_t apart = x.apart[segment * x.tile + lane];
            acc += (apart >> 8) * code_at(w, col, begin + (apart & 255));
          }
          block = __builtin_fmaf(float(acc + p.zero * minus), p.scale, block);
          if (w.form == Zeros::minimum) block = __builtin_fmaf(p.minimum, float(-minus), block);
        }
        y = __builtin_fmaf(block, x.scale[(tile * x.blocks + b) * x.tile + lane], y);
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

int64_t dot_peak(int64_t rounds, int32_t* sink) {
  volatile int8_t a = 3, b = 5;
  int32_t sum = 0;
  for (int64_t i = 0; i < rounds; ++i) sum += a * b;
  *sink = sum;
  return 2 * rounds;
}

int32_t read_memory(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  uint32_t sum = 0;
  for (int64_t i = 0; i + 4 <= bytes; i += 4) {
    uint32_t v;
    memcpy(&v, p + i, 4);
    sum += v;
  }
  return int32_t(sum);
}

}  // namespace

void use_ref(Kernels& k) {
  k = {};
  k.isa = "ref";
  k.tile_i8 = plain_rows;
  k.tile_f32 = one_row;
  k.tile_bf16 = no_tile;
  k.quantize_rows = quantize_rows;
  k.load_rows = load_rows;
  k.linear_i8 = linear_i8;
  k.linear_f32 = linear_f32;
  k.quantize_weights = quantize_weights;
  k.dot_peak = dot_peak;
  k.read_memory = read_memory;
  k.dequantize_row = dequantize_row;
  use_ref_block(k);
}

}  // namespace cpullm
