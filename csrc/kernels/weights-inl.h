// Round-to-nearest with a search for the clipped range, one group at a time; written over 16 lanes of floats so that
// every level gives the same codes. Included with a type Lanes that holds 16 floats.
//
// A candidate (scale, zero) is judged by  e = sum |scale * q - w|^p,  q = clamp(round(w / scale), low, high), with p = 2 for
// groups of 32, 3 up to 128 and 4 beyond: the longer the group, the more do squares clip the few large weights that
// matter (perplexity of SmolLM2 per channel: 49.5 with squares, 30.3 with p = 4; group 32: 22.7 and 24.0).
// Zero padding of a short group costs nothing: zero is a level of every candidate.
// After the grid, the scale that minimises the squares for the chosen codes, sum(w q) / sum(q q), is tried as well.
#pragma once

namespace cpullm {
namespace {

constexpr int kClips = 7;
constexpr float kClip[kClips] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};
constexpr int kFineClips = 15;  // symmetric: 1 - i / 40

static inline float round_scale(float s, Float type, uint16_t* bits) {
  *bits = type == Float::f16 ? float_to_f16(s) : float_to_bf16(s);
  return type == Float::f16 ? f16_to_float(*bits) : bf16_to_float(*bits);
}

struct GroupChoice {
  float error = 0.0f, scale = 0.0f;
  uint16_t bits = 0;
  int zero = 0;
  bool found = false;
};

static inline int error_power(int64_t group) { return group <= 32 ? 2 : group <= 128 ? 3 : 4; }

// Error of (scale, zero) over w [count], count a multiple of 16; levels low - zero .. high - zero.
static inline float group_error(const float* w, int64_t count, float scale, int zero, int low, int high, int power,
                                float* fit) {
  const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
  Lanes error = Lanes::zero(), wq = Lanes::zero(), qq = Lanes::zero();
  const Lanes s = Lanes::set1(scale), inv = Lanes::set1(inverse);
  const Lanes lo = Lanes::set1(float(low - zero)), hi = Lanes::set1(float(high - zero));
  for (int64_t i = 0; i < count; i += 16) {
    const Lanes x = Lanes::load(w + i);
    const Lanes q = Lanes::clamp(Lanes::round(Lanes::mul(x, inv)), lo, hi);
    const Lanes d = Lanes::fms(q, s, x);
    const Lanes d2 = Lanes::mul(d, d);
    if (power == 2) {
      error = Lanes::fma(d, d, error);
    } else if (power == 3) {
      const Lanes size = Lanes::clamp(d, Lanes::mul(d, Lanes::set1(-1.0f)), Lanes::set1(__builtin_inff()));
      error = Lanes::fma(d2, size, error);
    } else {
      error = Lanes::fma(d2, d2, error);
    }
    if (fit) {
      wq = Lanes::fma(x, q, wq);
      qq = Lanes::fma(q, q, qq);
    }
  }
  if (fit) {
    const float norm = qq.sum();
    *fit = norm > 0.0f ? wq.sum() / norm : 0.0f;
  }
  return error.sum();
}

static inline void consider(const WeightRecipe& r, const float* w, int64_t count, float scale, int zero, int low,
                            int high, GroupChoice* best) {
  uint16_t bits;
  const float rounded = round_scale(scale, r.scale_type, &bits);
  const float e = group_error(w, count, rounded, zero, low, high, error_power(r.group), nullptr);
  if (!best->found || e < best->error) *best = {e, rounded, bits, zero, true};
}

static inline int zero_point(float low, float scale) {
  if (scale == 0.0f) return 0;
  const float z = __builtin_nearbyintf(-low / scale);
  return z < 0.0f ? 0 : z > 15.0f ? 15 : int(z);
}

[[maybe_unused]] void quantize_weights(const WeightRecipe& r, const void* row, Float type, uint8_t* codes,
                                       uint16_t* scales, uint8_t* zeros, void* scratch) {
  constexpr int64_t kMost = 1 << 15;
  static_assert(kMost * 4 <= kScratchBytes, "the group must fit");
  float* buffer = static_cast<float*>(scratch);
  const int64_t groups = (r.k + r.group - 1) / r.group;
  const bool asymmetric = r.form == Zeros::integer;
  const int levels = r.bits == 8 ? 127 : 8;
  const int low = asymmetric ? 0 : r.bits == 8 ? -127 : -8;
  const int high = asymmetric ? 15 : r.bits == 8 ? 127 : 7;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * r.group, end = begin + r.group < r.k ? begin + r.group : r.k;
    // A group longer than the buffer (one scale per very long row) takes its full range.
    const int64_t width = end - begin < kMost ? end - begin : kMost;
    const int64_t count = (width + 15) / 16 * 16;
    float least = 0.0f, most = 0.0f;
    for (int64_t i = 0; i < end - begin; ++i) {
      const float v = load_float(row, begin + i, type);
      least = v < least ? v : least;
      most = v > most ? v : most;
      if (i < width) buffer[i] = v;
    }
    for (int64_t i = width; i < count; ++i) buffer[i] = 0.0f;
    GroupChoice best;
    const int clips = r.search && r.bits == 4 && width == end - begin ? (asymmetric ? kClips : kFineClips) : 1;
    if (asymmetric) {
      for (int a = 0; a < clips; ++a)
        for (int b = 0; b < clips; ++b) {
          const float lo = least * kClip[a], hi = most * kClip[b];
          const float scale = (hi - lo) * (1.0f / 15.0f);
          consider(r, buffer, count, scale, zero_point(lo, scale), low, high, &best);
        }
    } else {
      const float top = -least > most ? least : most;  // sits on the longer side: level -8
      for (int a = 0; a < clips; ++a) {
        const float scale = top * (1.0f - float(a) * 0.025f) / float(-levels);
        consider(r, buffer, count, scale, 0, low, high, &best);
        if (clips > 1) consider(r, buffer, count, -scale, 0, low, high, &best);
      }
    }
    for (int pass = 0; clips > 1 && pass < 2; ++pass) {
      float fit;
      group_error(buffer, count, best.scale, best.zero, low, high, error_power(r.group), &fit);
      consider(r, buffer, count, fit, best.zero, low, high, &best);
    }
    if (r.bits == 8 && best.scale < 0.0f) {  // keep 8-bit scales positive
      best.scale = -best.scale;
      best.bits = uint16_t(best.bits ^ 0x8000u);
    }
    scales[g] = best.bits;
    if (asymmetric) zeros[g] = uint8_t(best.zero);
    const float inverse = best.scale != 0.0f ? 1.0f / best.scale : 0.0f;
    const int offset = asymmetric ? best.zero : r.bits == 8 ? 128 : 8;
    for (int64_t i = 0; i < end - begin; ++i) {
      const float q = __builtin_nearbyintf(load_float(row, begin + i, type) * inverse);
      const float lo = float(low - best.zero), hi = float(high - best.zero);
      codes[begin + i] = uint8_t(int(q < lo ? lo : q > hi ? hi : q) + offset);
    }
  }
}

}  // namespace
}  // namespace cpullm
