// Attention of one query token over a cache, written once over Simd: scores, softmax, weighted sum of values; fp32
// inside.
#pragma once

namespace cpullm {
namespace {

// e^x for x <= 0: 2^n * 2^r with n = round(x log2 e) and a polynomial for |r| <= 1/2 (relative error below 2^-22).
static inline Simd::F exp_negative(Simd::F x) {
  using S = Simd;
  x = S::max(S::set1(-87.0f), x);  // in this order nan stays nan
  const S::F t = S::mul(x, S::set1(1.44269504f));
  const S::F n = S::round_float(t);
  const S::F r = S::fma(x, S::set1(1.44269504f), S::mul(n, S::set1(-1.0f)));
  S::F p = S::set1(1.5353362e-4f);
  p = S::fma(p, r, S::set1(1.3398874e-3f));
  p = S::fma(p, r, S::set1(9.6184370e-3f));
  p = S::fma(p, r, S::set1(5.5503324e-2f));
  p = S::fma(p, r, S::set1(2.4022648e-1f));
  p = S::fma(p, r, S::set1(6.9314720e-1f));
  p = S::fma(p, r, S::set1(1.0f));
  return S::times_power_of_two(p, S::round(n));
}

static inline Simd::F load_floats(const void* p, int64_t i, Float type) {
  if (type == Float::f32) return Simd::load(static_cast<const float*>(p) + i);
  return load_scale(static_cast<const uint16_t*>(p) + i, type);
}

// out[0..d) = softmax(scores) V, kVecs vectors of d at a time.
template <int kVecs>
static inline void weigh_values(const void* v, int64_t stride, int64_t length, const float* weights, Float type,
                                int64_t at, float* out) {
  using S = Simd;
  S::F sum[kVecs];
  for (auto& s : sum) s = S::zero();
  for (int64_t t = 0; t < length; ++t) {
    const S::F w = S::set1(weights[t]);
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) sum[i] = S::fma(w, load_floats(v, t * stride + at + i * S::kLanes, type), sum[i]);
  }
  for (int i = 0; i < kVecs; ++i) S::store(out + at + i * S::kLanes, sum[i]);
}

[[maybe_unused]] void decode_attention(const Attention& a, Range items, float* scratch) {
  using S = Simd;
  const int64_t padded = (a.length + 15) / 16 * 16, vector_width = a.width / S::kLanes * S::kLanes;
  const int64_t bytes = a.type == Float::f32 ? 4 : 2;
  float *scores = scratch, *q = scratch + padded, *o = q + a.width;
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t b = item / a.heads, h = item % a.heads, g = h / (a.heads / a.kv_heads);
    const char* k = static_cast<const char*>(a.k) + (b * a.k_stride[0] + g * a.k_stride[1]) * bytes;
    const char* v = static_cast<const char*>(a.v) + (b * a.v_stride[0] + g * a.v_stride[1]) * bytes;
    for (int64_t i = 0; i < a.width; ++i)
      q[i] = a.scale * load_float(a.q, b * a.q_stride[0] + h * a.q_stride[1] + i, a.type);
    float most = -__builtin_inff();
    for (int64_t t = 0; t < a.length; ++t) {
      S::F sum0 = S::zero(), sum1 = S::zero();
      int64_t i = 0;
      for (; i + 2 * S::kLanes <= a.width; i += 2 * S::kLanes) {
        sum0 = S::fma(S::load(q + i), load_floats(k, t * a.k_stride[2] + i, a.type), sum0);
        sum1 = S::fma(S::load(q + i + S::kLanes), load_floats(k, t * a.k_stride[2] + i + S::kLanes, a.type), sum1);
      }
      if (i < vector_width) sum0 = S::fma(S::load(q + i), load_floats(k, t * a.k_stride[2] + i, a.type), sum0);
      float score = S::reduce_sum(sum0 + sum1);
      for (i = vector_width; i < a.width; ++i) score += q[i] * load_float(k, t * a.k_stride[2] + i, a.type);
      if (a.mask) {
        const int64_t at = b * a.mask_stride[0] + h * a.mask_stride[1] + t;
        if (!a.mask_is_bool) {
          score += load_float(a.mask, at, a.mask_type);
        } else if (!static_cast<const uint8_t*>(a.mask)[at]) {
          score = -__builtin_inff();
        }
      }
      scores[t] = score;
      most = score > most || score != score ? score : most;  // nan wins and stays
    }
    if (most == -__builtin_inff()) {  // nothing to attend to
      for (int64_t i = 0; i < a.width; ++i) store_float(a.out, item * a.width + i, a.type, 0.0f);
      continue;
    }
    for (int64_t t = a.length; t < padded; ++t) scores[t] = -__builtin_inff();
    S::F total = S::zero();
    for (int64_t t = 0; t < padded; t += S::kLanes) {
      const S::F x = S::load(scores + t);
      const S::F e = S::keep_above(x, -__builtin_inff(), exp_negative(x - S::set1(most)));  // exactly 0 where masked
      S::store(scores + t, e);
      total = total + e;
    }
    const float inverse = 1.0f / S::reduce_sum(total);
    int64_t i = 0;
    for (; i + 4 * S::kLanes <= a.width; i += 4 * S::kLanes)
      weigh_values<4>(v, a.v_stride[2], a.length, scores, a.type, i, o);
    for (; i < vector_width; i += S::kLanes) weigh_values<1>(v, a.v_stride[2], a.length, scores, a.type, i, o);
    for (; i < a.width; ++i) {
      o[i] = 0.0f;
      for (int64_t t = 0; t < a.length; ++t) o[i] += scores[t] * load_float(v, t * a.v_stride[2] + i, a.type);
    }
    for (i = 0; i < a.width; ++i) store_float(a.out, item * a.width + i, a.type, o[i] * inverse);
  }
}

}  // namespace
}  // namespace cpullm
