// Vector vocabulary of the avx512 level (AVX-512 F/BW/DQ/VL + VNNI). See linear_i8-inl.h for how it is used.
#pragma once

// GCC 12 trips over its own intrinsics here.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <immintrin.h>

#include "half.h"
#include "kernels.h"

namespace cpullm {
namespace {

struct Simd {
  using F = __m512;   // 16 floats
  using I = __m512i;  // 16 int32, or 64 bytes
  static constexpr int kLanes = 16;
  static constexpr int kHalves = 1;  // column passes over a panel: each handles two vectors
  static constexpr const char* kName = "avx512";

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  static F round_float(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F clamp(F v, F lo, F hi) { return _mm512_min_ps(_mm512_max_ps(v, lo), hi); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I izero() { return _mm512_setzero_si512(); }
  static I iset1(int32_t v) { return _mm512_set1_epi32(v); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
  // acc + v * *p, 0 <= v < 2^15, and v * value: everything in int16.
  static I add_times(I acc, I v, const int32_t* p) { return _mm512_dpwssd_epi32(acc, v, _mm512_set1_epi32(*p)); }
  static I imul16(I v, int32_t value) { return _mm512_madd_epi16(v, _mm512_set1_epi32(value & 0xffff)); }
  static I max_u32(I a, I b) { return _mm512_max_epu32(a, b); }
  static I min_u32(I a, I b) { return _mm512_min_epu32(a, b); }
  static uint32_t reduce_max_u32(I v) { return _mm512_reduce_max_epu32(v); }
  static uint32_t equal_lanes(I a, uint32_t v) { return _mm512_cmpeq_epi32_mask(a, _mm512_set1_epi32(int32_t(v))); }
  // a, zero in the lanes that equal v.
  static I without_lanes(I a, uint32_t v) {
    return _mm512_maskz_mov_epi32(_mm512_cmpneq_epi32_mask(a, _mm512_set1_epi32(int32_t(v))), a);
  }
  static I magnitude(F v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static float reduce_max(F v) { return _mm512_reduce_max_ps(v); }
  static float reduce_sum(F v) { return _mm512_reduce_add_ps(v); }
  static F times_power_of_two(F v, I n) { return _mm512_scalef_ps(v, _mm512_cvtepi32_ps(n)); }
  // v where x > bound or x is nan, else 0.
  static F keep_above(F x, float bound, F v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_NLE_UQ), v);
  }
  static I iand(I a, I b) { return _mm512_and_si512(a, b); }
  static I ixor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I load_i32(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_i32(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static bool any_not_finite(I magnitudes) {
    return _mm512_cmpge_epu32_mask(magnitudes, _mm512_set1_epi32(0x7f800000)) != 0;
  }
  static int32_t reduce_add(I v) { return _mm512_reduce_add_epi32(v); }
  static I round(F v) { return _mm512_cvtps_epi32(v); }
  static void store_i8(int8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  // The elements at even and at odd places of 32.
  static F load_bf16_even(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
  }
  static F load_bf16_odd(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int32_t(0xffff0000u))));
  }
  // Two vectors in order to even and odd places, and back.
  static void part(F& a, F& b) {
    const I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const F first = _mm512_permutex2var_ps(a, even, b);
    b = _mm512_permutex2var_ps(a, _mm512_or_si512(even, _mm512_set1_epi32(1)), b);
    a = first;
  }
  static void join(F& even, F& odd) {
    const I low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const F first = _mm512_permutex2var_ps(even, low, odd);
    odd = _mm512_permutex2var_ps(even, _mm512_or_si512(low, _mm512_set1_epi32(8)), odd);
    even = first;
  }
  static void store_f16(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // Round to nearest even; nan becomes a quiet nan.
  static void store_bf16(uint16_t* p, F v) {
    const I u = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    I r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
  }
  static I load_u8_as_i32(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  static F abs(F v) { return _mm512_castsi512_ps(magnitude(v)); }
  // x < bound ? a : b; b where x is nan.
  static F select_less(F x, F bound, F a, F b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), b, a);
  }
  static F swap_pairs(F v) { return _mm512_permute_ps(v, 0xb1); }
  static F load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // The sums of the lanes of four vectors.
  static void reduce_sum4(F a, F b, F c, F d, float* out) {
    const F ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const F cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const F v = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
    const __m256 w = _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1);
    _mm_storeu_ps(out, _mm256_castps256_ps128(w) + _mm256_extractf128_ps(w, 1));
  }
  // out[i][lane] = p[lane][i] for i in 0..3.
  static void transpose4(const float* p, int64_t stride, float* out, int64_t out_stride) {
    F v[4];
    for (int i = 0; i < 4; ++i) {  // lanes 4j + i in quarter j
      const float* q = p + i * stride;
      v[i] = _mm512_castps128_ps512(_mm_loadu_ps(q));
      v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(q + 4 * stride), 1);
      v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(q + 8 * stride), 2);
      v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(q + 12 * stride), 3);
    }
    const F a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
    const F c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
    store(out, _mm512_shuffle_ps(a, c, 0x44));
    store(out + out_stride, _mm512_shuffle_ps(a, c, 0xee));
    store(out + 2 * out_stride, _mm512_shuffle_ps(b, d, 0x44));
    store(out + 3 * out_stride, _mm512_shuffle_ps(b, d, 0xee));
  }

  // The two vectors of column pass `half` (always 0 here) of one block: columns 0..15 and 16..31.
  static void load_packed4(const uint8_t* block, int, I& lo, I& hi) {
    const I v = _mm512_loadu_si512(block);
    const I mask = _mm512_set1_epi8(15);
    lo = _mm512_and_si512(v, mask);
    hi = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
  }
  // The same for the dot product, hi times 2^kHighBits. In assembly, or GCC loads the block twice.
  static constexpr int kHighBits = 4, kDotChains = 2;
  static void load_nibbles(const uint8_t* block, int, I& lo, I& hi) {
    I v;
    __asm__("vmovdqu64 %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const I*>(block)));
    lo = _mm512_and_si512(v, _mm512_set1_epi8(15));
    hi = _mm512_and_si512(v, _mm512_set1_epi8(char(0xf0)));
  }
  static I shift_right_signed(I v, int bits) { return _mm512_srai_epi32(v, unsigned(bits)); }
  static void load_u8(const uint8_t* block, int, I& lo, I& hi) {
    lo = _mm512_loadu_si512(block);
    hi = _mm512_loadu_si512(block + 64);
  }

  // Four inputs of one row, broadcast to every lane.
  static I broadcast4(const int8_t* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
  }
  // One step of a dot product: inline assembly keeps the sums in registers.
  struct Dot {
    I acc;
    void clear() { acc = izero(); }
    void step(I codes, I x) { __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x)); }
    void end_chunk() {}
    I result() const { return acc; }
  };
  static constexpr int kBias8 = 128;  // what the int8 dot product leaves in: codes are value + 128

  // fp32 values of four consecutive inputs from packed codes: lane c, input i.
  static I shift_right(I v, int bits) { return _mm512_srli_epi32(v, unsigned(bits)); }
  static I shift_left(I v, int bits) { return _mm512_slli_epi32(v, unsigned(bits)); }
  static F code4_to_float(I v) {  // the low 4 bits of each lane
    const F table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(v, table);
  }
  static F code8_to_float(I v) { return _mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32(255))); }
  // Byte `byte` of each lane, signed, times 2^24.
  static F byte_to_float(I v, int byte) {
    const int top = byte << 24 | 0x808080;
    const I from = _mm512_set4_epi32(top + (12 << 24), top + (8 << 24), top + (4 << 24), top);
    return _mm512_cvtepi32_ps(_mm512_shuffle_epi8(v, from));
  }
  static I load_packed4_raw(const uint8_t* block, int) { return _mm512_loadu_si512(block); }

  // Rows of an fp32 tile.
  static constexpr int kFloatRows = 12;
  // Attention: rows of a tile, rows that read keys and values at a time as they are, and up to how many rows of a
  // kv head do so: the conversion of blocks would not pay.
  static constexpr int kQueryRows = 12, kDirectRows = 4, kDirectMost = 8;
};

}  // namespace
}  // namespace cpullm
