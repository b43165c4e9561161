// The 16-lane type of weights-inl.h over Simd.
#pragma once

namespace cpullm {
namespace {

// 16 floats as 16 / kLanes vectors; what weights-inl.h is written in. Sums add halves, as in ref.cpp.
struct Lanes {
  static constexpr int kVecs = 16 / Simd::kLanes;
  Simd::F v[kVecs];
  static Lanes zero() { return set1(0.0f); }
  static Lanes set1(float x) {
    Lanes r;
    for (int i = 0; i < kVecs; ++i) r.v[i] = Simd::set1(x);
    return r;
  }
  static Lanes load(const float* p) {
    Lanes r;
    for (int i = 0; i < kVecs; ++i) r.v[i] = Simd::load(p + i * Simd::kLanes);
    return r;
  }
  static Lanes mul(const Lanes& a, const Lanes& b) {
    Lanes r;
    for (int i = 0; i < kVecs; ++i) r.v[i] = Simd::mul(a.v[i], b.v[i]);
    return r;
  }
  static Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
    Lanes r;
    for (int i = 0; i < kVecs; ++i) r.v[i] = Simd::fma(a.v[i], b.v[i], c.v[i]);
    return r;
  }
  static Lanes fms(const Lanes& a, const Lanes& b, const Lanes& c) {
    Lanes r;
    for (int i = 0; i < kVecs; ++i) r.v[i] = Simd::fms(a.v[i], b.v[i], c.v[i]);
    return r;
  }
  static Lanes round(const Lanes& a) {
    Lanes r;
    for (int i = 0; i < kVecs; ++i) r.v[i] = Simd::round_float(a.v[i]);
    return r;
  }
  static Lanes clamp(const Lanes& a, const Lanes& lo, const Lanes& hi) {
    Lanes r;
    for (int i = 0; i < kVecs; ++i) r.v[i] = Simd::clamp(a.v[i], lo.v[i], hi.v[i]);
    return r;
  }
  float sum() const {
    float t[16];
    for (int i = 0; i < kVecs; ++i) Simd::store(t + i * Simd::kLanes, v[i]);
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) t[i] += t[i + width];
    return t[0];
  }
};

}  // namespace
}  // namespace cpullm
