// Scalar conversions between fp32 and the 16-bit types. static: every translation unit keeps its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace cpullm {

[[maybe_unused]] static inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

[[maybe_unused]] static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

[[maybe_unused]] static inline float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

// Round to nearest even; nan stays a quiet nan.
[[maybe_unused]] static inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40u);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

[[maybe_unused]] static inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, nan
  if (rest >= 0x0400u) return bits_to_float(sign | ((rest << 13) + 0x38000000u));         // normal
  const float tiny = float(rest) * 5.9604644775390625e-8f;                                // subnormal: rest * 2^-24
  return bits_to_float(sign | float_to_bits(tiny));
}

// Round to nearest even; overflow gives inf; nan stays a quiet nan.
[[maybe_unused]] static inline uint16_t float_to_f16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((mag >> 13) & 0x3ffu));
  if (mag >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // >= 65520
  if (mag < 0x38800000u) {                                  // below 2^-14: subnormal, let the fp32 adder round
    const float r = bits_to_float(mag) + 0.5f;              // 0.5 has an ulp of 2^-24, the subnormal step
    return uint16_t(sign | (float_to_bits(r) - 0x3f000000u));
  }
  const uint32_t odd = (mag >> 13) & 1u;
  return uint16_t(sign | ((mag - 0x38000000u + 0xfffu + odd) >> 13));
}

[[maybe_unused]] static inline float load_float(const void* p, int64_t i, Float type) {
  if (type == Float::f32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return type == Float::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

[[maybe_unused]] static inline void store_float(void* p, int64_t i, Float type, float v) {
  if (type == Float::f32) {
    static_cast<float*>(p)[i] = v;
  } else {
    static_cast<uint16_t*>(p)[i] = type == Float::bf16 ? float_to_bf16(v) : float_to_f16(v);
  }
}

}  // namespace cpullm
