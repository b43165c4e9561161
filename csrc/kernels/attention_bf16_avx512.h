// Attention in bf16 products, of many rows and of 3 to 8 over bf16 caches, for CPUs with AVX512_BF16: queries and
// probabilities are rounded to bf16, keys and values are bf16 or int8 codes, which bf16 holds exactly. Sums, maxima and
// totals are fp32.
//
// Words are pairs of bf16: of neighbouring head elements for q K^T, of neighbouring keys for p V. The memory is that of
// the fp32 tiles: q [tiles, words, kQueryRows], keys [words, kBlockKeys], values [kBlockKeys / 2, padded]. The softmax of
// a tile is done across its rows: one exponential for what all rows' sums shrink by, and reductions four rows at a time.
//
// Few rows read keys and values as they are: words of four keys are transposed, values of two interleaved, for all rows at
// once. One Zen 4 core, 1024 keys: 8 rows take .73 of the fp32 kernel's time, 4 rows .81, 3 rows .77 to .94, 2 rows 1.
#pragma once

namespace cpullm {
namespace {

struct Bf16Products {
  static __m512 step(__m512 x, __m512 v, __m512 sum) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(v));
    return sum;
  }
};

// `lanes` of 16 elements from element i on as bf16 in the low halves of words; zero elsewhere.
template <CacheType kType>
inline __m512i load_low(const void* p, int64_t i, __mmask16 lanes) {
  if (kType == CacheType::bf16)
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(p) + i));
  const __m128i codes = _mm_maskz_loadu_epi8(lanes, static_cast<const int8_t*>(p) + i);
  return _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))), 16);
}

struct Bf16Tiles {
  static constexpr int kRows = Simd::kQueryRows;
  static_assert(kRows % 4 == 0 && kRows <= 16, "rows are reduced by four and fit one vector");

  static constexpr bool kFew = true;

  // Whether few rows are rounded as well. One or two would gain nothing.
  static bool few(const Attention& a, int64_t rows) {
    return rows > 2 && a.type == CacheType::bf16 && a.width % 32 == 0;
  }

  using Codes = CodeProducts;  // for few rows over int8 caches

  // Rows of a kv head as direct_scores wants them: of every 32 elements four vectors, vector t of them the t-th word of
  // every quarter, four times. Where the keys of a block are put for many rows: [width / 32, rows, 64], so that one
  // pointer leads to all rows.
  static void load_few(const Attention& a, const AttentionScratch& m, const AttentionItem& at) {
    using S = Simd;
    const S::F scale = S::set1(a.scale);
    const int64_t rows = at.rows.end - at.rows.begin;
    for (int64_t r = 0; r < rows; ++r) {
      const float* q = query_of(a, at, at.rows.begin + r);
      float* to = m.keys + 64 * r;
      for (int64_t c = 0; c < a.width; c += 32, to += 64 * rows) {
        const __m512i x = to_bf16(S::mul(S::load(q + c), scale), S::mul(S::load(q + c + 16), scale));
        _mm512_storeu_si512(to, _mm512_shuffle_epi32(x, _MM_PERM_AAAA));
        _mm512_storeu_si512(to + 16, _mm512_shuffle_epi32(x, _MM_PERM_BBBB));
        _mm512_storeu_si512(to + 32, _mm512_shuffle_epi32(x, _MM_PERM_CCCC));
        _mm512_storeu_si512(to + 48, _mm512_shuffle_epi32(x, _MM_PERM_DDDD));
      }
    }
  }

  // scores [kRows, kDirectKeys] = q K^T of pairs, eight keys at a time: transposed by four in quarters, which all rows
  // share, so that a sum has four quarters of four keys. Asks for the first `ask` of the block's values.
  template <int kRows>
  static void direct_scores(const float* q, int64_t q_step, const void* k, int64_t k_stride, const void* v,
                            int64_t v_stride, int64_t ask, int64_t count, int64_t width, float* scores) {
    const auto* keys = static_cast<const uint16_t*>(k);
    for (int64_t j = 0; j < count; j += 16) {
      for (int64_t i = j; i < j + 16 && i < ask; ++i) prefetch_row<CacheType::bf16>(v, v_stride, i, width);
      __m512 half[2][kRows];  // of both groups of four keys: fewer registers than sums
      const auto halves = [](__m512 a, __m512 b) {
        return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
      };
#pragma GCC unroll 2
      for (int g = 0; g < 4; g += 2) {
        __m512 sum[2][kRows];
        const uint16_t* row[8];
        for (int i = 0; i < 8; ++i) row[i] = keys + min_of(j + 4 * g + i, count - 1) * k_stride;  // hidden later
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[0][r] = sum[1][r] = Simd::zero();
        const float* x = q;
        for (int64_t c = 0; c < width; c += 32, x += q_step) {
          __m512 words[2][4];
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            const auto load = [&](int i) { return _mm512_loadu_ps(row[4 * h + i] + c); };
            const __m512 w0 = load(0), w1 = load(1), w2 = load(2), w3 = load(3);
            const auto twice = [](__m512 y) { return _mm512_castps_pd(y); };
            const __m512d a = twice(_mm512_unpacklo_ps(w0, w1)), b = twice(_mm512_unpackhi_ps(w0, w1));
            const __m512d d = twice(_mm512_unpacklo_ps(w2, w3)), e = twice(_mm512_unpackhi_ps(w2, w3));
            words[h][0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, d));
            words[h][1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, d));
            words[h][2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, e));
            words[h][3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, e));
          }
#pragma GCC unroll 4
          for (int t = 0; t < 4; ++t)
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              const __m512 y = Simd::load(x + 64 * r + 16 * t);
              sum[0][r] = Bf16Products::step(y, words[0][t], sum[0][r]);
              sum[1][r] = Bf16Products::step(y, words[1][t], sum[1][r]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) half[g / 2][r] = halves(sum[0][r], sum[1][r]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512 a = half[0][r], b = half[1][r];
        Simd::store(scores + r * kDirectKeys + j, _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd));
      }
    }
  }

  // sums [kRows, 2 kPairs vectors] = fade sums + p V, two keys at a time; p as bf16, see direct_values of fp32.
  template <int kRows, int kPairs>
  static void direct_values(const float* p, const uint16_t* v, int64_t v_stride, int64_t begin, int64_t end,
                            const float* fade, float* sums, int64_t padded, const void* next, int64_t next_stride,
                            int64_t ask) {
    alignas(64) static const uint16_t kNothing[32 * kPairs] = {};
    // What unpacking by quarters makes of two vectors, and back.
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const __m512i high = _mm512_or_si512(low, _mm512_set1_epi32(4));
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_or_si512(first, _mm512_set1_epi32(8));
    __m512 sum[kRows][2 * kPairs];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < kPairs; ++i) {
        const float* from = sums + r * padded + 32 * i;
        const __m512 a = Simd::mul(Simd::load(from), Simd::set1(fade[r]));
        const __m512 b = Simd::mul(Simd::load(from + 16), Simd::set1(fade[r]));
        sum[r][2 * i] = _mm512_permutex2var_ps(a, low, b);
        sum[r][2 * i + 1] = _mm512_permutex2var_ps(a, high, b);
      }
    for (int64_t j = begin / 2 * 2; j < end; j += 2) {
      for (int64_t i = j; i < j + 2 && i < ask; ++i) prefetch_row<CacheType::bf16>(next, next_stride, i, 32 * kPairs);
      const uint16_t* even = j < begin ? kNothing : v + j * v_stride;
      const uint16_t* odd = j + 1 < end ? v + (j + 1) * v_stride : kNothing;
      __m512 x[2 * kPairs];
#pragma GCC unroll 2
      for (int i = 0; i < kPairs; ++i) {
        const __m512i a = _mm512_loadu_si512(even + 32 * i), b = _mm512_loadu_si512(odd + 32 * i);
        x[2 * i] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
        x[2 * i + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512 w = Simd::set1(p[r * kDirectKeys + j / 2]);
#pragma GCC unroll 4
        for (int i = 0; i < 2 * kPairs; ++i) sum[r][i] = Bf16Products::step(w, x[i], sum[r][i]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < kPairs; ++i) {
        float* to = sums + r * padded + 32 * i;
        Simd::store(to, _mm512_permutex2var_ps(sum[r][2 * i], first, sum[r][2 * i + 1]));
        Simd::store(to + 16, _mm512_permutex2var_ps(sum[r][2 * i], second, sum[r][2 * i + 1]));
      }
  }

  // direct_rows in bf16 products.
  template <int kRows>
  static void few_rows(const Attention& a, const AttentionScratch& m, const AttentionItem& at, const KeyBlock& block,
                       const KeysAhead& ahead, int64_t first) {
    const bool asks = first == 0;
    direct_scores<kRows>(m.keys + 64 * first, 64 * (at.rows.end - at.rows.begin), block.k, a.k_stride[2], block.v,
                         a.v_stride[2], asks ? block.count : 0, block.count, a.width, m.scores);
    float fade[kRows];
    const Range seen = soften_rows<kRows>(a, m, at, block, first, fade);
    for (int r = 0; r < kRows; ++r) {
      float* p = m.scores + r * kDirectKeys;
      for (int64_t j = 0; j < block.room; j += 32)
        _mm512_storeu_si512(p + j / 2, to_bf16(Simd::load(p + j), Simd::load(p + j + 16)));
    }
    float* sums = m.sums + first * m.padded;
    const auto values = [&](auto pairs, int64_t c) {
      direct_values<kRows, decltype(pairs)::kCount>(
          m.scores, static_cast<const uint16_t*>(block.v) + c, a.v_stride[2], seen.begin, seen.end, fade, sums + c,
          m.padded, static_cast<const uint16_t*>(ahead.k) + c, a.k_stride[2], asks ? ahead.count : 0);
    };
    int64_t c = 0;
    for (; c + 64 <= a.width; c += 64) values(Vecs<2>{}, c);
    if (c < a.width) values(Vecs<1>{}, c);
  }

  // Words that hold a head's elements; a multiple of 4, as transpose4 wants it.
  static int64_t words_of(const Attention& a) { return (a.width + 7) / 8 * 4; }

  static void load(const Attention& a, const AttentionScratch& m, const AttentionItem& at) {
    using S = Simd;
    const int64_t rows = at.rows.end - at.rows.begin, words = words_of(a);
    const S::F scale = S::set1(a.scale);
    uint32_t* const row = reinterpret_cast<uint32_t*>(m.convert);  // [kRows, padded]
    for (int64_t r = 0; r < rows; r += kRows) {
      for (int64_t i = 0; i < kRows; ++i) {
        const float* q = query_of(a, at, at.rows.begin + min_of(r + i, rows - 1));
        const auto part = [&](int64_t c) {
          return c < a.width ? S::mul(load_part(q, c, a.width - c), scale) : S::zero();
        };
        for (int64_t c = 0; c < 2 * words; c += 2 * S::kLanes)
          _mm512_storeu_si512(row + i * m.padded + c / 2, to_bf16(part(c), part(c + S::kLanes)));
      }
      uint32_t* to = reinterpret_cast<uint32_t*>(m.q) + r * m.padded;
      for (int64_t c = 0; c < words; ++c, to += kRows)
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) to[i] = row[i * m.padded + c];
    }
  }

  template <CacheType kType>
  static void convert(const Attention& a, const AttentionScratch& m, const KeyBlock& block, bool ask) {
    if constexpr (kType == CacheType::bf16 || kType == CacheType::i8) {
      using S = Simd;
      const int64_t words = words_of(a);
      const bool whole = kType == CacheType::bf16 && a.width % 8 == 0 && a.k_stride[2] % 2 == 0;
      for (int64_t j = 0; j < block.count; j += S::kLanes) {
        for (int64_t i = j; ask && i < j + S::kLanes; ++i) prefetch_row<kType>(block.v, a.v_stride[2], i, a.width);
        const float* from = reinterpret_cast<const float*>(static_cast<const uint16_t*>(block.k) + j * a.k_stride[2]);
        int64_t stride = a.k_stride[2] / 2;
        if (!whole || j + S::kLanes > block.count) {
          for (int64_t i = 0; i < S::kLanes; ++i)
            for (int64_t c = 0; c < 2 * words; c += S::kLanes) {
              const __mmask16 lanes = j + i < block.count ? first_lanes(a.width - c) : __mmask16(0);
              _mm256_storeu_si256(reinterpret_cast<__m256i*>(m.convert + i * m.padded + c / 2),
                                  _mm512_cvtepi32_epi16(load_low<kType>(block.k, (j + i) * a.k_stride[2] + c, lanes)));
            }
          from = m.convert;
          stride = m.padded;
        }
        for (int64_t c = 0; c < words; c += 4) S::transpose4(from + c, stride, m.keys + c * kBlockKeys + j, kBlockKeys);
      }
      // Element i of the first key, then of the second: words 0..15 and 16..31 of both.
      const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i low_pairs =
          _mm512_add_epi32(_mm512_mullo_epi32(steps, _mm512_set1_epi32(0x10001)), _mm512_set1_epi32(32 << 16));
      const __m512i high_pairs = _mm512_add_epi16(low_pairs, _mm512_set1_epi16(16));
      for (int64_t j = 0; j < block.count; j += 2) {
        for (int64_t i = j; ask && i < j + 2; ++i) prefetch_row<kType>(block.k, a.k_stride[2], kBlockKeys + i, a.width);
        int64_t c = 0;
        if (kType == CacheType::bf16 && j + 1 < block.count)  // whole vectors of both keys
          for (const auto* v = static_cast<const uint16_t*>(block.v) + j * a.v_stride[2]; c + 32 <= a.width; c += 32) {
            const __m512i even = _mm512_loadu_si512(v + c), odd = _mm512_loadu_si512(v + a.v_stride[2] + c);
            _mm512_storeu_si512(m.values + j / 2 * m.padded + c, _mm512_permutex2var_epi16(even, low_pairs, odd));
            _mm512_storeu_si512(m.values + j / 2 * m.padded + c + 16, _mm512_permutex2var_epi16(even, high_pairs, odd));
          }
        for (; c < m.padded; c += S::kLanes) {
          const __mmask16 lanes = first_lanes(a.width - c);
          const __m512i even = load_low<kType>(block.v, j * a.v_stride[2] + c, lanes);
          const __m512i odd =
              load_low<kType>(block.v, (j + 1) * a.v_stride[2] + c, j + 1 < block.count ? lanes : __mmask16(0));
          _mm512_storeu_si512(m.values + j / 2 * m.padded + c, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
      }
    } else {
      __builtin_trap();  // attention_bf16 takes no such cache
    }
  }

  // Scores of [begin, end), multiples of 32, of a tile become probabilities in bf16: row r at scores + r * kBlockKeys,
  // key j the j-th of its halves of words. fade [kRows]: what the rows' sums so far shrink by.
  static void soften_tile(const Attention& a, const AttentionScratch& m, const AttentionItem& at, const KeyBlock& block,
                          int64_t first, int64_t rows, const Range* seen, int64_t begin, int64_t end, float* fade) {
    using S = Simd;
    alignas(64) float tops[16] = {}, from[16], sums[16] = {};
    uint64_t keys[kRows];  // bit j: key j of the block counts
    S::F top[kRows], sum[kRows];
    const auto below = [](int64_t j) { return j >= 64 ? ~uint64_t(0) : (uint64_t(1) << j) - 1; };
    for (int64_t r = 0; r < kRows; ++r) {
      float* scores = m.scores + r * kBlockKeys;
      keys[r] = r < rows ? below(seen[r].end) & ~below(seen[r].begin) : 0;
      if (r < rows && (block.scaled || a.mask || a.softcap > 0.0f))
        adjust_scores(a, m, block, mask_offset(a, at, place_of(a, at.rows.begin + first + r)) + block.first, seen[r],
                      scores);
      top[r] = S::set1(kNever);
      for (int64_t j = begin; j < end; j += S::kLanes)
        top[r] = _mm512_mask_max_ps(top[r], __mmask16(keys[r] >> j), top[r], S::load(scores + j));
    }
    for (int r = 0; r < kRows; r += 4) reduce_max4(top + r, tops + r);
    const __mmask16 all = first_lanes(kRows);
    const S::F most = S::load(m.most + first), next = S::max(S::load(tops), most), never = S::set1(kNever);
    const __mmask16 none = _mm512_cmpeq_ps_mask(next, never), same = _mm512_cmpeq_ps_mask(next, most);
    const S::F log2e = S::set1(kLog2e), least = _mm512_maskz_mov_ps(~none, S::mul(next, log2e));
    const S::F shrink = _mm512_mask_mov_ps(exp2_roughly(S::fms(most, log2e, least)), same, S::set1(1.0f));
    S::store(from, least);
    for (int r = 0; r < kRows; ++r) {
      float* scores = m.scores + r * kBlockKeys;
      auto* to = reinterpret_cast<uint16_t*>(scores);
      const S::F subtract = S::set1(from[r]);
      sum[r] = S::zero();
      for (int64_t j = begin; j < end; j += 2 * S::kLanes) {
        S::F p[2];
        for (int i = 0; i < 2; ++i) {
          const int64_t at_key = j + i * S::kLanes;
          const S::F y = S::fms(S::load(scores + at_key), log2e, subtract);
          p[i] = _mm512_maskz_mov_ps(__mmask16(keys[r] >> at_key), exp2_roughly(y));
          sum[r] = sum[r] + p[i];
          if (block.scaled) p[i] = S::mul(p[i], S::load(m.v_scale + at_key));
        }
        _mm512_storeu_si512(to + j, to_bf16(p[0], p[1]));  // scores up to here have been read
      }
    }
    for (int r = 0; r < kRows; r += 4) S::reduce_sum4(sum[r], sum[r + 1], sum[r + 2], sum[r + 3], sums + r);
    _mm512_mask_storeu_ps(m.most + first, all, next);
    _mm512_mask_storeu_ps(m.total + first, all, S::fma(S::load(m.total + first), shrink, S::load(sums)));
    _mm512_mask_storeu_ps(fade, all, shrink);
  }

  static void rows_of(const Attention& a, const AttentionScratch& m, const AttentionItem& at, const KeyBlock& block,
                      int64_t first) {
    constexpr int64_t kStepKeys = 2 * Simd::kLanes;
    const int64_t rows = min_of(kRows, at.rows.end - at.rows.begin - first);
    Range seen[kRows];
    const Range keys = seen_by_tile(a, at, block, first, rows, seen);
    if (keys.begin >= keys.end) return;
    const int64_t begin = keys.begin / kStepKeys * kStepKeys, end = (keys.end + kStepKeys - 1) / kStepKeys * kStepKeys;
    for (int64_t j = begin; j < end; j += kStepKeys)
      tile_product<kRows, 1, kRows, 2, Bf16Products>(m.q + first * m.padded, m.keys + j, kBlockKeys, words_of(a),
                                                     nullptr, m.scores + j, kBlockKeys);
    float fade[kRows];
    soften_tile(a, m, at, block, first, rows, seen, begin, end, fade);
    const int64_t word = keys.begin / 2, words = (keys.end + 1) / 2 - word;
    float* sums = m.sums + first * m.padded;
    const float *p = m.scores + word, *v = m.values + word * m.padded;
    int64_t c = 0;
    for (; c + 2 * Simd::kLanes <= m.padded; c += 2 * Simd::kLanes)
      tile_product<kRows, int(kBlockKeys), 1, 2, Bf16Products>(p, v + c, m.padded, words, fade, sums + c, m.padded);
    if (c < m.padded)
      tile_product<kRows, int(kBlockKeys), 1, 1, Bf16Products>(p, v + c, m.padded, words, fade, sums + c, m.padded);
  }
};

// What attention does where it need not be exact.
void attention_bf16(const Attention& a, Range items, float* scratch) {
  const bool rounds = !a.exact && (a.type == CacheType::bf16 || a.type == CacheType::i8);
  rounds ? attention_with<Bf16Tiles>(a, items, scratch) : attention(a, items, scratch);
}

}  // namespace
}  // namespace cpullm
