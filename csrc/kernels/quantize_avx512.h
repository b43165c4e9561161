// quantize_rows of the avx512 level, the same bits as rows-inl.h. Largest and second largest of four blocks are reduced
// side by side and become scales in the lanes of one vector: nothing branches on values but for inputs kept apart, and
// nothing waits for a reduction of its own.
#pragma once

namespace cpullm {
namespace {

// The two largest magnitudes of each lane, as bits: they order like the floats. Of equal ones both count.
struct TwoLargest {
  __m512i most, second;
};
struct TwoLargest4 {
  __m128i most, second;
};

inline TwoLargest both(TwoLargest a, TwoLargest b) {
  const __m512i less = _mm512_min_epu32(a.most, b.most);
  return {_mm512_max_epu32(a.most, b.most), _mm512_max_epu32(_mm512_max_epu32(a.second, b.second), less)};
}

inline TwoLargest4 both(TwoLargest4 a, TwoLargest4 b) {
  const __m128i less = _mm_min_epu32(a.most, b.most);
  return {_mm_max_epu32(a.most, b.most), _mm_max_epu32(_mm_max_epu32(a.second, b.second), less)};
}

// Of `width` inputs, a multiple of kLanes.
inline TwoLargest two_largest(const float* x, int64_t width) {
  using S = Simd;
  TwoLargest found{S::izero(), S::izero()};
  const auto add = [&](int64_t j) {
    const S::I v = S::magnitude(S::load(x + j));
    found.second = S::max_u32(found.second, S::min_u32(found.most, v));
    found.most = S::max_u32(found.most, v);
  };
  if (width >= kActBlock) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < kActBlock; j += S::kLanes) add(j);
  } else {
    for (int64_t j = 0; j < width; j += S::kLanes) add(j);
  }
  return found;
}

// Lane i: of all lanes of v[i], i < 4.
inline TwoLargest4 reduce4(const TwoLargest* v) {
  const auto halves = [](const TwoLargest& a, const TwoLargest& b) {
    return both({_mm512_unpacklo_epi32(a.most, b.most), _mm512_unpacklo_epi32(a.second, b.second)},
                {_mm512_unpackhi_epi32(a.most, b.most), _mm512_unpackhi_epi32(a.second, b.second)});
  };
  const TwoLargest ab = halves(v[0], v[1]), cd = halves(v[2], v[3]);
  const TwoLargest x = both({_mm512_unpacklo_epi64(ab.most, cd.most), _mm512_unpacklo_epi64(ab.second, cd.second)},
                            {_mm512_unpackhi_epi64(ab.most, cd.most), _mm512_unpackhi_epi64(ab.second, cd.second)});
  const auto swapped = [](__m512i a) { return _mm512_shuffle_i32x4(a, a, 0x4e); };
  const TwoLargest y = both(x, {swapped(x.most), swapped(x.second)});
  return both({_mm512_castsi512_si128(y.most), _mm512_castsi512_si128(y.second)},
              {_mm512_extracti32x4_epi32(y.most, 1), _mm512_extracti32x4_epi32(y.second, 1)});
}

// scale [4] and inverse [4] of four blocks as block_params() has them. Returns which have an input apart.
inline uint32_t scales_of(const TwoLargest4& v, float* scale, float* inverse) {
  const __m128 top = _mm_castsi128_ps(v.most), next = _mm_castsi128_ps(v.second);
  const auto times = [](__m128 a, float b) { return _mm_mul_ps(a, _mm_set1_ps(b)); };
  const __mmask8 bad = _mm_cmpge_epu32_mask(v.most, _mm_set1_epi32(0x7f800000));
  const __mmask8 apart = _mm_cmp_ps_mask(next, times(top, 0.7f), _CMP_LE_OQ);
  const __m128 rest = _mm_max_ps(times(next, 1.0f / 127.0f), times(top, 1.0f / float(kMostApart)));
  __m128 s = _mm_mask_mov_ps(times(top, 1.0f / 127.0f), apart, rest);
  const __mmask8 used = _mm_cmp_ps_mask(s, _mm_set1_ps(0x1p-100f), _CMP_GE_OQ) & ~bad;
  _mm_storeu_ps(inverse, _mm_maskz_div_ps(used, _mm_set1_ps(1.0f), s));
  s = _mm_maskz_mov_ps(used, s);
  _mm_storeu_ps(scale, _mm_mask_mov_ps(s, bad, _mm_castsi128_ps(_mm_set1_epi32(0x7fc00000))));
  return apart & used;
}

// The place of the one input of a block that has the largest magnitude.
inline int64_t place_of_largest(const float* x, int64_t width) {
  using S = Simd;
  S::I most = S::izero();
  for (int64_t j = 0; j < width; j += S::kLanes) most = S::max_u32(most, S::magnitude(S::load(x + j)));
  const uint32_t top = S::reduce_max_u32(most);
  uint64_t found[2] = {};
  for (int64_t j = 0; j < width; j += S::kLanes)
    found[j / 64] |= uint64_t(S::equal_lanes(S::magnitude(S::load(x + j)), top)) << j % 64;
  return found[0] ? __builtin_ctzll(found[0]) : 64 + __builtin_ctzll(found[1]);
}

// q [64] = round(x * inverse), zero beyond `width` and where inverse is 0. Returns sums of q + 128, eight at a time.
inline __m512i codes_of(const float* x, int64_t width, float inverse, int8_t* q) {
  using S = Simd;
  const S::F factor = S::set1(inverse);
  const auto round = [&](int64_t j) { return j < width ? S::round(S::mul(S::load(x + j), factor)) : S::izero(); };
  // Packing takes quarters in turn; an input apart saturates here and is taken out later.
  const S::I packed =
      _mm512_packs_epi16(_mm512_packs_epi32(round(0), round(16)), _mm512_packs_epi32(round(32), round(48)));
  const S::I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const S::I codes = _mm512_maskz_permutexvar_epi32(inverse != 0.0f ? __mmask16(0xffff) : __mmask16(0), order, packed);
  _mm512_store_si512(q, codes);
  return _mm512_sad_epu8(_mm512_xor_si512(codes, _mm512_set1_epi8(char(0x80))), S::izero());
}

// out [4] = the sums of the codes of 32 inputs each, from those of codes_of() for twice 64.
inline void reduce_chunks(__m512i a, __m512i b, int32_t* out) {
  const auto pairs = [](__m512i v) {
    return _mm256_hadd_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  };
  const __m256i v = _mm256_hadd_epi32(pairs(a), pairs(b));
  const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_sub_epi32(sums, _mm_set1_epi32(128 * kChunk)));
}

void quantize_rows_avx512(const Rows& in, const QuantizedRows& out, Range rows) {
  constexpr int64_t kBlocks = 8, kInputs = kBlocks * kActBlock, kChunks = kInputs / kChunk;
  alignas(64) float v[kInputs];
  alignas(64) int8_t q[kInputs];
  float scale[kBlocks], inverse[kBlocks];
  int32_t sums[kChunks], apart[kBlocks], apart_at[kBlocks];  // sums: of kChunk inputs; apart_at: -1 if none
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const char* row = row_address(in, r);
    const int64_t tile = r / out.tile, lane = r % out.tile;
    const int64_t units = (out.k_padded + out.unit - 1) / out.unit;
    int8_t* row_q = out.q + (tile * units * out.tile + lane) * out.unit;
    float* row_scale = out.scale + tile * out.blocks * out.tile + lane;
    int64_t segment = tile * out.segments, group_end = out.group;
    if (lane == 0) memset(out.apart_rows + segment, 0, size_t(out.segments) * sizeof(uint32_t));
    for (int64_t j0 = 0; j0 < out.k_padded; j0 += kInputs) {
      const int64_t width = min_of(kInputs, out.k_padded - j0), blocks = (width + kActBlock - 1) / kActBlock;
      const float* x = reinterpret_cast<const float*>(row) + j0;
      if (in.type != Float::f32 || in.order || j0 + width > in.k) {
        for (int64_t j = 0; j < width; j += kChunk) load_chunk(in, row, j0 + j, v + j);
        x = v;
      }
      uint32_t with_apart = 0;
      for (int64_t b = 0; b < blocks; b += 4) {
        TwoLargest found[4];
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) found[i] = two_largest(x + (b + i) * kActBlock, width - (b + i) * kActBlock);
        with_apart |= scales_of(reduce4(found), scale + b, inverse + b) << b;
      }
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t j = b * kActBlock;
        row_scale[(j0 / kActBlock + b) * out.tile] = scale[b];
        apart_at[b] = -1;
        reduce_chunks(codes_of(x + j, width - j, inverse[b], q + j),
                      codes_of(x + j + 64, width - j - 64, inverse[b], q + j + 64), sums + j / kChunk);
      }
      for (; with_apart; with_apart &= with_apart - 1) {
        const int64_t b = __builtin_ctz(with_apart), j = b * kActBlock;
        const int64_t at = j + place_of_largest(x + j, min_of(kActBlock, width - j));
        apart[b] = _mm_cvtss_si32(_mm_set_ss(x[at] * inverse[b]));
        apart_at[b] = int32_t(at);
        sums[at / kChunk] += apart[b] - q[at];
        q[at] = 0;
      }
      for (int64_t j = 0; j < width; ++segment) {
        const int64_t begin = j, block = j / kActBlock;
        const int64_t end = min_of(group_end - j0, min_of((block + 1) * kActBlock, width));
        if (j0 + end == group_end) group_end += out.group;
        int32_t sum = 0;
        for (; j < end; j += kChunk) sum += sums[j / kChunk];
        if (apart_at[block] >= begin && apart_at[block] < end) {
          out.apart[segment * out.tile + lane] =
              int32_t(uint32_t(apart[block]) << 8 | uint32_t(apart_at[block] - begin));
          out.apart_rows[segment] |= 1u << lane;
        }
        out.minus[segment * out.tile + lane] = -sum;
      }
      interleave(q, width, out, row_q + j0 * out.tile);
    }
  }
}

}  // namespace
}  // namespace cpullm
