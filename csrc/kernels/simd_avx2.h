// Vector vocabulary of the avx2 level, and of avx_vnni when CPULLM_VNNI is defined. See linear_i8-inl.h.
#pragma once

#include <immintrin.h>

#include "dot_avx2.h"
#include "half.h"
#include "kernels.h"

namespace cpullm {
namespace {

struct Simd {
  using F = __m256;   // 8 floats
  using I = __m256i;  // 8 int32, or 32 bytes
  static constexpr int kLanes = 8;
  static constexpr int kHalves = 2;  // column passes over a panel: columns 0-7 and 16-23, then 8-15 and 24-31

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  static F round_float(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F clamp(F v, F lo, F hi) { return _mm256_min_ps(_mm256_max_ps(v, lo), hi); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I izero() { return _mm256_setzero_si256(); }
  static I iset1(int32_t v) { return _mm256_set1_epi32(v); }
  static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
  // acc + v * *p, 0 <= v < 2^15, and v * value: everything in int16.
  static I add_times(I acc, I v, const int32_t* p) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(v, _mm256_set1_epi32(*p)));
  }
  static I imul16(I v, int32_t value) { return _mm256_madd_epi16(v, _mm256_set1_epi32(value & 0xffff)); }
  static I max_u32(I a, I b) { return _mm256_max_epu32(a, b); }
  static I min_u32(I a, I b) { return _mm256_min_epu32(a, b); }
  static uint32_t reduce_max_u32(I v) {
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
    return uint32_t(_mm_cvtsi128_si32(m));
  }
  static uint32_t equal_lanes(I a, uint32_t v) {
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, _mm256_set1_epi32(int32_t(v))))));
  }
  // a, zero in the lanes that equal v.
  static I without_lanes(I a, uint32_t v) {
    return _mm256_andnot_si256(_mm256_cmpeq_epi32(a, _mm256_set1_epi32(int32_t(v))), a);
  }
  static I magnitude(F v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static float reduce_max(F v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
  }
  static float reduce_sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  // v * 2^n, -126 <= n <= 127.
  static F times_power_of_two(F v, I n) {
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)));
  }
  // v where x > bound or x is nan, else 0.
  static F keep_above(F x, float bound, F v) {
    return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_set1_ps(bound), _CMP_NLE_UQ), v);
  }
  static I iand(I a, I b) { return _mm256_and_si256(a, b); }
  static I ixor(I a, I b) { return _mm256_xor_si256(a, b); }
  static I load_i32(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_i32(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static bool any_not_finite(I magnitudes) {
    return _mm256_movemask_epi8(_mm256_cmpgt_epi32(magnitudes, _mm256_set1_epi32(0x7f7fffff))) != 0;
  }
  static int32_t reduce_add(I v) {
    __m128i m = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtsi128_si32(m);
  }
  static I round(F v) { return _mm256_cvtps_epi32(v); }
  static void store_i8(int8_t* p, I v) {
    const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(w, w));
  }
  static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  // The elements at even and at odd places of 16.
  static F load_bf16_even(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
  }
  static F load_bf16_odd(const uint16_t* p) {
    const I v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(int32_t(0xffff0000u))));
  }
  // Two vectors in order to even and odd places, and back.
  static void part(F& a, F& b) {
    const F low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    a = _mm256_shuffle_ps(low, high, 0x88);
    b = _mm256_shuffle_ps(low, high, 0xdd);
  }
  static void join(F& even, F& odd) {
    const F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    even = _mm256_permute2f128_ps(low, high, 0x20);
    odd = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static void store_f16(uint16_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // Round to nearest even; nan becomes a quiet nan.
  static void store_bf16(uint16_t* p, F v) {
    const I u = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const I r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const I quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const I b = _mm256_blendv_epi8(r, quiet, nan);
    const __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
  }
  static I load_u8_as_i32(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }

  static F abs(F v) { return _mm256_castsi256_ps(magnitude(v)); }
  // x < bound ? a : b; b where x is nan.
  static F select_less(F x, F bound, F a, F b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, bound, _CMP_LT_OQ)); }
  static F swap_pairs(F v) { return _mm256_permute_ps(v, 0xb1); }
  static F load_i8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // The sums of the lanes of four vectors.
  static void reduce_sum4(F a, F b, F c, F d, float* out) {
    const F v = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1));
  }
  // out[i][lane] = p[lane][i] for i in 0..3.
  static void transpose4(const float* p, int64_t stride, float* out, int64_t out_stride) {
    F v[4];
    for (int i = 0; i < 4; ++i) {  // lanes i and 4 + i
      const float* q = p + i * stride;
      v[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(q)), _mm_loadu_ps(q + 4 * stride), 1);
    }
    const F a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
    const F c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
    store(out, _mm256_shuffle_ps(a, c, 0x44));
    store(out + out_stride, _mm256_shuffle_ps(a, c, 0xee));
    store(out + 2 * out_stride, _mm256_shuffle_ps(b, d, 0x44));
    store(out + 3 * out_stride, _mm256_shuffle_ps(b, d, 0xee));
  }

  // The two vectors of column pass `half` of one block: columns 8 half .. 8 half + 7 and those 16 further on.
  static I load_packed4_raw(const uint8_t* block, int half) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 32 * half));
  }
  static void load_packed4(const uint8_t* block, int half, I& lo, I& hi) {
    const I v = load_packed4_raw(block, half);
    const I mask = _mm256_set1_epi8(15);
    lo = _mm256_and_si256(v, mask);
    hi = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
  }
  static I shift_right_signed(I v, int bits) { return _mm256_srai_epi32(v, bits); }
  static void load_u8(const uint8_t* block, int half, I& lo, I& hi) {
    lo = load_packed4_raw(block, half);
    hi = load_packed4_raw(block + 64, half);
  }
  static void unpack4(const uint8_t* block, uint8_t* out) {
    for (int half = 0; half < 2; ++half) {
      I lo, hi;
      load_packed4(block, half, lo, hi);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * half), lo);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 64 + 32 * half), hi);
    }
  }

#ifdef CPULLM_VNNI
  static constexpr const char* kName = "avx_vnni";
  static constexpr int kBias8 = 128;
  // Codes of a step for the dot product, hi times 2^kHighBits. In assembly, or GCC loads the block twice.
  static constexpr int kHighBits = 4, kDotChains = 2;
  static void load_nibbles(const uint8_t* block, int half, I& lo, I& hi) {
    I v;
    __asm__("vmovdqu %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const I*>(block + 32 * half)));
    lo = _mm256_and_si256(v, _mm256_set1_epi8(15));
    hi = _mm256_and_si256(v, _mm256_set1_epi8(char(0xf0)));
  }
  // Four inputs of one row, broadcast to every lane.
  static I broadcast4(const int8_t* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
  }
  // One step of a dot product.
  struct Dot {
    I acc;
    void clear() { acc = izero(); }
    void step(I codes, I x) { __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(codes), "x"(x)); }
    void end_chunk() {}
    I result() const { return acc; }
  };
#else
  static constexpr const char* kName = "avx2";
  static constexpr int kBias8 = 0;
  // Codes of a step for the dot product; high nibbles times 16 would saturate vpmaddubsw.
  static constexpr int kHighBits = 0, kDotChains = 1;
  static void load_nibbles(const uint8_t* block, int half, I& lo, I& hi) { load_packed4(block, half, lo, hi); }
  // Four inputs of one row, broadcast to every lane.
  static I broadcast4(const int8_t* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
  }
  // One step of a dot product.
  struct Dot {
    I acc, acc16;
    void clear() { acc = acc16 = izero(); }
    void step(I codes, I x) {  // in assembly: GCC 12 makes products early and spills them
      I pairs;
      __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc16), "=&x"(pairs) : "x"(codes), "x"(x));
    }
    void end_chunk() {
      acc = _mm256_add_epi32(acc, _mm256_madd_epi16(acc16, _mm256_set1_epi16(1)));
      acc16 = izero();
    }
    I result() const { return acc; }
  };
  // 8-bit codes (value + 128) without VNNI: |value| * (+-x), a pair is at most 2 * 128 * 127 = 32512 < 32768, widened at
  // every step; the bias of 128 is gone (kBias8 = 0), and the symmetric form has no other zero point.
  template <int R>
  static void dot_wide(const uint8_t* codes, const int8_t* x, int64_t x_step, int64_t steps, int32_t* out) {
    I acc[R][2];
    for (auto& row : acc) row[0] = row[1] = izero();
    for (int64_t s = 0; s < steps; ++s, codes += 128, x += x_step) {
      _mm_prefetch(reinterpret_cast<const char*>(codes) + 4096, _MM_HINT_T0);
      const I bias = _mm256_set1_epi8(char(0x80)), ones = _mm256_set1_epi16(1);
      const I lo = _mm256_xor_si256(load_packed4_raw(codes, 0), bias);
      const I hi = _mm256_xor_si256(load_packed4_raw(codes + 64, 0), bias);
      const I lo_size = _mm256_abs_epi8(lo), hi_size = _mm256_abs_epi8(hi);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const I v = broadcast4(x + kStep * r);
        acc[r][0] = iadd(acc[r][0], _mm256_madd_epi16(_mm256_maddubs_epi16(lo_size, _mm256_sign_epi8(v, lo)), ones));
        acc[r][1] = iadd(acc[r][1], _mm256_madd_epi16(_mm256_maddubs_epi16(hi_size, _mm256_sign_epi8(v, hi)), ones));
      }
    }
    for (int r = 0; r < R; ++r) {
      store_i32(out + 16 * r, acc[r][0]);
      store_i32(out + 16 * r + 8, acc[r][1]);
    }
  }
  template <int R>
  static void segment_wide(const uint8_t* codes, const int8_t* x, int64_t x_step, int64_t steps,
                           const SegmentEnd& end) {
    alignas(64) int32_t acc[R * 16];
    constexpr int kFirst = R > 4 ? R / 2 : R;  // more rows at a time would spill
    dot_wide<kFirst>(codes, x, x_step, steps, acc);
    if constexpr (R > kFirst) dot_wide<R - kFirst>(codes, x + kStep * kFirst, x_step, steps, acc + 16 * kFirst);
    for (int i = 0; i < 2; ++i) {
      const F scale = load(static_cast<const float*>(end.params) + 16 + 8 * i);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        I sum = load_i32(acc + 16 * r + 8 * i);
        if (end.start) sum = iadd(sum, load_i32(end.start + 16 * r + 8 * i));
        float *block = end.block + kPanel * r + 16 * i, *y = end.y + kPanel * r + 16 * i;
        const F f = to_float(sum), chain = end.first ? mul(f, scale) : fma(f, scale, load(block));
        end.last ? store(y, fma(chain, set1(end.x_scale[r]), load(y))) : store(block, chain);
      }
    }
  }
#endif

  template <int R, Codes kCodes>
  static void segment(const uint8_t* codes, int half, const int8_t* x, int64_t x_step, int64_t steps,
                      const SegmentEnd& end) {
#ifndef CPULLM_VNNI
    if (kCodes == Codes::u8) return segment_wide<R>(codes + 32 * half, x, x_step, steps, end);
#endif
    segment_256<R, kCodes == Codes::packed4, kCodes == Codes::u8>(codes + 32 * half, x, x_step, steps, end);
  }

  static I shift_right(I v, int bits) { return _mm256_srli_epi32(v, bits); }
  static I shift_left(I v, int bits) { return _mm256_slli_epi32(v, bits); }
  static F code4_to_float(I v) { return _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(15))); }
  static F code8_to_float(I v) { return _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(255))); }
  // Byte `byte` of each lane, signed, times 2^24.
  static F byte_to_float(I v, int byte) {
    const int top = byte << 24 | 0x808080;
    const __m128i from = _mm_setr_epi32(top, top + (4 << 24), top + (8 << 24), top + (12 << 24));
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(from)));
  }

  // Rows per tile, and up to how many rows int8 products read the packed codes instead of unpacking them first.
  static constexpr int kTileRows = 6, kPackedRows = 12, kFloatRows = 4;
  // Attention: rows of a tile, rows that read keys and values at a time as they are, and up to how many rows of a
  // kv head do so: the conversion of blocks would not pay.
  static constexpr int kQueryRows = 6, kDirectRows = 2, kDirectMost = 4;
};

}  // namespace
}  // namespace cpullm
