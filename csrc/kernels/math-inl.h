// Elementary functions over Simd, and loads and stores of vectors that may be cut short. Polynomials: least squares
// with weights raised where the error is largest, on Chebyshev nodes (all but equal ripple).
#pragma once

namespace cpullm {
namespace {

// 2^(r + n) for |r| <= 1/2 and a whole n.
static inline Simd::F power_of_two(Simd::F r, Simd::F n) {
  using S = Simd;
  S::F p = S::set1(1.54697023e-4f);
  p = S::fma(p, r, S::set1(1.33908676e-3f));
  p = S::fma(p, r, S::set1(9.61803087e-3f));
  p = S::fma(p, r, S::set1(5.55035710e-2f));
  p = S::fma(p, r, S::set1(2.40226511e-1f));
  p = S::fma(p, r, S::set1(6.93147188e-1f));
  p = S::fma(p, r, S::set1(1.0f));
  return S::times_power_of_two(p, S::round(n));
}

// e^x = 2^n 2^r, n = round(x log2 e) with log2 e in two parts, |r| <= 1/2. x is clamped to [-87, 88]; nan stays nan.
// Relative error below 2e-7: the polynomial's 5.3e-9 and the rounding of its last steps.
static inline Simd::F exp_of(Simd::F x) {
  using S = Simd;
  x = S::min(S::set1(88.0f), S::max(S::set1(-87.0f), x));  // in this order nan stays nan
  const S::F n = S::round_float(S::mul(x, S::set1(1.44269502f)));
  S::F r = S::fms(x, S::set1(1.44269502f), n);
  r = S::fma(x, S::set1(1.92596299e-8f), r);
  return power_of_two(r, n);
}

// e^x for x <= 0 as softmax needs it: as exp_of, but log2 e in one part. The relative error grows with |x|, to 2e-6 at
// -87, where e^x is nothing beside the sum's 1.
static inline Simd::F exp_negative(Simd::F x) {
  using S = Simd;
  x = S::max(S::set1(-87.0f), x);
  const S::F n = S::round_float(S::mul(x, S::set1(1.44269502f)));
  const S::F r = S::fms(x, S::set1(1.44269502f), n);
  return power_of_two(r, n);
}

[[maybe_unused]] static inline float exp_of(float x) { return exp_of(Simd::set1(x))[0]; }

// tanh x: x + x^3 P(x^2) below 0.6, else 1 - 2 / (e^2|x| + 1) with the sign of x. Relative error below 4e-7.
static inline Simd::F tanh_of(Simd::F x) {
  using S = Simd;
  const S::F size = S::abs(x), one = S::set1(1.0f), square = S::mul(x, x);
  S::F p = S::set1(-6.2836402e-3f);
  p = S::fma(p, square, S::set1(2.1121438e-2f));
  p = S::fma(p, square, S::set1(-5.3876314e-2f));
  p = S::fma(p, square, S::set1(1.3332932e-1f));
  p = S::fma(p, square, S::set1(-3.3333331e-1f));
  const S::F small = S::fma(S::mul(p, square), x, x);
  const S::F large = one - S::set1(2.0f) / (exp_of(size + size) + one);
  return S::select_less(size, S::set1(0.6f), small, S::select_less(x, S::zero(), S::zero() - large, large));
}

// x Phi(x) = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2. Source of erfc: Abramowitz and Stegun, Handbook of Mathematical
// Functions, 7.1.26, absolute error below 1.5e-7; of the result below 6e-7.
static inline Simd::F gelu_of(Simd::F x) {
  using S = Simd;
  const S::F z = S::mul(S::abs(x), S::set1(0.707106781f)), one = S::set1(1.0f);
  const S::F t = one / S::fma(z, S::set1(0.3275911f), one);
  S::F p = S::set1(1.061405429f);
  p = S::fma(p, t, S::set1(-1.453152027f));
  p = S::fma(p, t, S::set1(1.421413741f));
  p = S::fma(p, t, S::set1(-0.284496736f));
  p = S::fma(p, t, S::set1(0.254829592f));
  const S::F half_erfc = S::mul(S::mul(p, t), S::mul(exp_of(S::zero() - S::mul(z, z)), S::set1(0.5f)));
  // An infinite x has an erfc that is not quite 0 here.
  const S::F less = S::select_less(z, S::set1(9.0f), S::mul(S::abs(x), half_erfc), S::zero());
  return S::max(S::zero(), x) - less;  // in this order nan stays nan
}

// x / (1 + e^-x). Absolute and relative error below 1e-6 for x > -87; -inf gives -0 or a number below 1e-36.
static inline Simd::F silu_of(Simd::F x) {
  using S = Simd;
  const S::F kept = S::max(S::set1(-1000.0f), x);  // -inf / inf would be nan
  return kept / (S::set1(1.0f) + exp_of(S::zero() - kept));
}

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 = x / (1 + e^-2u).
static inline Simd::F gelu_tanh_of(Simd::F x) {
  using S = Simd;
  const S::F kept = S::max(S::set1(-1000.0f), x);
  const S::F cubic = S::fma(S::mul(S::mul(kept, kept), kept), S::set1(0.044715f), kept);
  return kept / (S::set1(1.0f) + exp_of(S::mul(cubic, S::set1(-2.0f * 0.797884561f))));
}

static inline Simd::F load_floats(const void* p, int64_t i, Float type) {
  if (type == Float::f32) return Simd::load(static_cast<const float*>(p) + i);
  return load_scale(static_cast<const uint16_t*>(p) + i, type);
}

// Elements [i, i + count), at most a vector of them, then zeros.
static inline Simd::F load_part(const void* p, int64_t i, int64_t count, Float type) {
  if (count >= Simd::kLanes) return load_floats(p, i, type);
  alignas(64) float v[Simd::kLanes] = {};
  for (int64_t j = 0; j < count; ++j) v[j] = load_float(p, i + j, type);
  return Simd::load(v);
}

static inline void store_part(void* p, int64_t i, int64_t count, Float type, Simd::F x) {
  if (count >= Simd::kLanes) {
    if (type == Float::f32) return Simd::store(static_cast<float*>(p) + i, x);
    uint16_t* to = static_cast<uint16_t*>(p) + i;
    return type == Float::bf16 ? Simd::store_bf16(to, x) : Simd::store_f16(to, x);
  }
  alignas(64) float v[Simd::kLanes];
  Simd::store(v, x);
  for (int64_t j = 0; j < count; ++j) store_float(p, i + j, type, v[j]);
}

static inline Simd::F load_part(const float* p, int64_t i, int64_t count) { return load_part(p, i, count, Float::f32); }

static inline void store_part(float* p, int64_t i, int64_t count, Simd::F x) { store_part(p, i, count, Float::f32, x); }

}  // namespace
}  // namespace cpullm
