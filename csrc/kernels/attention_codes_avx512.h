// Attention of 3 to 8 rows over int8 caches in int8 products, where it need not be exact.
//
// Queries, and a block's probabilities times the values' scales, become 16-bit integers relative to their row's largest
// and are taken as two signed bytes, 256 high + low: off by 2^-16 of the largest, 2^-8 of it if all of a block's 256 keys
// are off the same way. Codes are unsigned, code + 128: an integer sum says what that
// adds.
//
// A block of keys and its values are turned into words of four codes once for all rows: of neighbouring head elements for
// q K^T, of neighbouring keys for p V, 32 columns (keys, or head elements) side by side. Both products are then the
// same. bf16 products of converted codes would take the same number of steps and four times the conversion.
#pragma once

namespace cpullm {
namespace {

constexpr float kLog2e = 1.44269504f;

// 2^y, and 0 for -inf: 2^floor(y) times a polynomial of y - floor(y). Relative error below 5e-6: bf16 rounds to 2e-3.
inline __m512 exp2_roughly(__m512 y) {
  using S = Simd;
  const S::F r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  S::F p = S::set1(1.35341371e-2f);
  p = S::fma(p, r, S::set1(5.20114899e-2f));
  p = S::fma(p, r, S::set1(2.41442762e-1f));
  p = S::fma(p, r, S::set1(6.93003826e-1f));
  p = S::fma(p, r, S::set1(1.00000259f));
  return _mm512_scalef_ps(p, y);  // takes the floor of y itself
}

inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

// out[i] = the largest lane of v[i], i < 4.
inline void reduce_max4(const __m512* v, float* out) {
  const __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 x = _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
}

struct CodeProducts {
  static constexpr int64_t kColumns = 32;  // of a tile of words
  static constexpr int64_t kWordBytes = 4 * kColumns;  // a word of every column
  static constexpr int64_t kTileBytes = 64 * kWordBytes;  // of values: kDirectKeys keys
  static constexpr float kMost = 127 * 256 + 127;  // of two signed bytes
  static constexpr int kMostRows = 8;
  static_assert(Simd::kDirectMost <= kMostRows, "few rows fit");

  static bool few(const Attention& a, int64_t rows) {
    return rows > 2 && a.type == CacheType::i8 && a.width % 64 == 0 && a.width <= 512;
  }

  // What the scratch holds. The regions of many rows' tiles have room: 256 keys of a byte are 64 of a float.
  struct Memory {
    int8_t* q;  // [rows, 2 padded]
    uint8_t* keys;  // [kDirectKeys / 32, words, 32 keys]
    uint8_t* values;  // [padded / 32, kDirectKeys / 4, 32 columns]
    float* scores;  // [rows, kDirectKeys]
    float* q_scale;  // [rows]
    int32_t* q_bias;  // [rows]

    explicit Memory(const AttentionScratch& m)
        : q(reinterpret_cast<int8_t*>(m.q)),
          keys(reinterpret_cast<uint8_t*>(m.keys)),
          values(reinterpret_cast<uint8_t*>(m.values)),
          scores(m.convert),  // goes on into m.scores: 16 padded + 16 kBlockKeys floats, padded >= 64
          q_scale(m.q + kMostRows * m.padded / 2),
          q_bias(reinterpret_cast<int32_t*>(q_scale + 16)) {}
  };
  static_assert(16 * 64 + 16 * kBlockKeys >= kMostRows * kDirectKeys, "scores have room");

  // 16 integers as four words of high bytes, then four of low ones.
  static void store_bytes(int8_t* to, __m512i x) {
    // Adding 128 rounds the high byte and leaves the low one without its sign.
    const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(x, _mm512_set1_epi32(128)), _mm512_set1_epi32(128));
    const __m512i words = _mm512_shuffle_epi8(
        bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(1, 5, 9, 13, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1)));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, words)));
  }

  // What takes `largest` to kMost; 0 where it is nothing or not finite.
  static __m512 inverse_of(__m512 largest) {
    const __mmask16 some = _mm512_cmp_ps_mask(largest, Simd::set1(0x1p-110f), _CMP_GT_OQ) &
                           _mm512_cmp_ps_mask(largest, Simd::set1(__builtin_inff()), _CMP_LT_OQ);
    return _mm512_maskz_div_ps(some, Simd::set1(kMost), largest);
  }

  static void load(const Attention& a, const AttentionScratch& m, const AttentionItem& at) {
    const Memory to(m);
    for (int64_t r = 0; r < at.rows.end - at.rows.begin; ++r) {
      const float* q = query_of(a, at, at.rows.begin + r);
      __m512i top = _mm512_setzero_si512(), sum = _mm512_setzero_si512();  // of magnitudes as integers nan is largest
      for (int64_t c = 0; c < a.width; c += 16) top = Simd::max_u32(top, Simd::magnitude(Simd::load(q + c)));
      const __m512 largest = _mm512_castsi512_ps(_mm512_set1_epi32(int(Simd::reduce_max_u32(top))));
      const __m512 inverse = inverse_of(largest);
      const __mmask16 some = _mm512_cmp_ps_mask(inverse, _mm512_setzero_ps(), _CMP_NEQ_OQ);
      for (int64_t c = 0; c < a.width; c += 16) {
        const __m512i integer = _mm512_maskz_cvtps_epi32(some, Simd::mul(Simd::load(q + c), inverse));
        store_bytes(to.q + 2 * (r * m.padded + c), integer);
        sum = _mm512_add_epi32(sum, integer);
      }
      to.q_scale[r] = largest[0] / kMost * a.scale;  // not finite: and so is the result
      to.q_bias[r] = 128 * _mm512_reduce_add_epi32(sum);
    }
  }

  static __m512i codes(const int8_t* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }

  // to [tiles, words, 32 keys]: words of 16 keys at a time, transposed by four in quarters, then by quarters.
  static void pack_keys(const int8_t* k, int64_t stride, int64_t count, int64_t width, uint8_t* to) {
    for (int64_t j = 0; j < count; j += 16) {
      uint8_t* tile = to + j / kColumns * kColumns * width + j % kColumns * 4;
      for (int64_t c = 0; c < width; c += 64, tile += 16 * kWordBytes) {
        __m512i x[4][4];
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
          __m512i y[4];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) y[i] = codes(k + min_of(j + 4 * g + i, count - 1) * stride + c);  // hidden later
          const __m512i a = _mm512_unpacklo_epi32(y[0], y[1]), b = _mm512_unpackhi_epi32(y[0], y[1]);
          const __m512i d = _mm512_unpacklo_epi32(y[2], y[3]), e = _mm512_unpackhi_epi32(y[2], y[3]);
          x[g][0] = _mm512_unpacklo_epi64(a, d);
          x[g][1] = _mm512_unpackhi_epi64(a, d);
          x[g][2] = _mm512_unpacklo_epi64(b, e);
          x[g][3] = _mm512_unpackhi_epi64(b, e);
        }
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) {
          const __m512i a = _mm512_shuffle_i32x4(x[0][t], x[1][t], 0x44);
          const __m512i b = _mm512_shuffle_i32x4(x[0][t], x[1][t], 0xee);
          const __m512i d = _mm512_shuffle_i32x4(x[2][t], x[3][t], 0x44);
          const __m512i e = _mm512_shuffle_i32x4(x[2][t], x[3][t], 0xee);
          const auto store = [&](int64_t quarter, __m512i word) {
            _mm512_storeu_si512(tile + (4 * quarter + t) * kWordBytes, word);
          };
          store(0, _mm512_shuffle_i32x4(a, d, 0x88));
          store(1, _mm512_shuffle_i32x4(a, d, 0xdd));
          store(2, _mm512_shuffle_i32x4(b, e, 0x88));
          store(3, _mm512_shuffle_i32x4(b, e, 0xdd));
        }
      }
    }
  }

  // to [tiles, kDirectKeys / 4 words, 32 columns] of keys [begin, end), multiples of 4. Of 64 elements the i-th vector
  // holds the i-th four of every 16.
  static void pack_values(const int8_t* v, int64_t stride, int64_t begin, int64_t end, int64_t count, int64_t width,
                          uint8_t* to) {
    for (int64_t j = begin; j < end; j += 4) {
      uint8_t* tile = to + j / 4 * kWordBytes;
      for (int64_t c = 0; c < width; c += 64, tile += 2 * kTileBytes) {
        __m512i y[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) y[i] = codes(v + min_of(j + i, count - 1) * stride + c);  // times 0
        const __m512i a = _mm512_unpacklo_epi8(y[0], y[1]), b = _mm512_unpackhi_epi8(y[0], y[1]);
        const __m512i d = _mm512_unpacklo_epi8(y[2], y[3]), e = _mm512_unpackhi_epi8(y[2], y[3]);
        _mm512_storeu_si512(tile, _mm512_unpacklo_epi16(a, d));
        _mm512_storeu_si512(tile + 64, _mm512_unpackhi_epi16(a, d));
        _mm512_storeu_si512(tile + kTileBytes, _mm512_unpacklo_epi16(b, e));
        _mm512_storeu_si512(tile + kTileBytes + 64, _mm512_unpackhi_epi16(b, e));
      }
    }
  }

  static __m512 natural(const float* sums, int quarter) {
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(sums + 4 * quarter));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(sums + 16 + 4 * quarter), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(sums + 32 + 4 * quarter), 2);
    return _mm512_insertf32x4(x, _mm_loadu_ps(sums + 48 + 4 * quarter), 3);
  }

  // sums [width], as pack_values arranges them, in order.
  static void arrange(float* sums, int64_t width) {
    for (int64_t c = 0; c < width; c += 64) {
      const __m512 x[4] = {natural(sums + c, 0), natural(sums + c, 1), natural(sums + c, 2), natural(sums + c, 3)};
      for (int i = 0; i < 4; ++i) Simd::store(sums + c + 16 * i, x[i]);
    }
  }

  static void step(__m512i& sum, __m512i code, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(code), "v"(x));
  }

  // finish(row, 16 columns, sum) of integer rows a [kRows] times a tile b of `groups` times four words. ask(group): what
  // is to be read next.
  template <int kRows, class Ask, class Finish>
  static void product(const int8_t* a, int64_t a_stride, const uint8_t* b, int64_t groups, const Ask& ask,
                      const Finish& finish) {
    __m512i high[kRows][2], low[kRows][2];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) high[r][i] = low[r][i] = _mm512_setzero_si512();
    for (int64_t g = 0; g < groups; ++g, a += 32, b += 4 * kWordBytes) {
      ask(g);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        const __m512i x = _mm512_loadu_si512(b + t * kWordBytes), y = _mm512_loadu_si512(b + t * kWordBytes + 64);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512i h = Simd::broadcast4(a + r * a_stride + 4 * t);
          step(high[r][0], x, h);
          step(high[r][1], y, h);
          const __m512i l = Simd::broadcast4(a + r * a_stride + 4 * t + 16);
          step(low[r][0], x, l);
          step(low[r][1], y, l);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) finish(r, 16 * i, _mm512_add_epi32(_mm512_slli_epi32(high[r][i], 8), low[r][i]));
  }

  static __m512 to_floats(__m512i sum, int32_t bias) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(bias)));
  }

  struct Softened {
    alignas(64) float fade[16], scale[16];  // by which a row's sums shrink; of its integers
    alignas(64) int32_t bias[16];  // what unsigned codes add to a sum of products
  };

  // As reduce_max4 of floats, of magnitudes as integers, which keep nan.
  static void reduce_max4(const __m512i* v, int32_t* out) {
    const auto max = [](__m512i x, __m512i y) { return _mm512_max_epi32(x, y); };
    const __m512i ab = max(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i cd = max(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    const __m512i x = max(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i y = _mm256_max_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
  }

  // Scores of keys [begin, end), multiples of 16, of all rows become probabilities times the values' scales, as
  // integers. As soften_tile.
  static void soften_codes(const Attention& a, const AttentionScratch& m, const AttentionItem& item,
                           const KeyBlock& block, int64_t rows, const Range* seen, int64_t begin, int64_t end,
                           Softened& p) {
    using S = Simd;
    constexpr int kGroups = kDirectKeys / 16;
    const Memory at(m);
    alignas(64) float tops[16] = {}, from[16], sums[16] = {};
    alignas(64) int32_t largest[16] = {};
    __m512 top[kMostRows], sum[kMostRows];
    __m512i most[kMostRows];
    __mmask16 masks[kMostRows][kGroups];  // of keys that count
    const __mmask16* counts[kMostRows];
    KeyBlock scaled = block;
    scaled.scaled = false;  // scores are, by now
    for (int64_t r = 0; r < kMostRows; ++r) {
      top[r] = S::set1(kNever);
      sum[r] = S::zero();
      most[r] = _mm512_setzero_si512();
      if (r >= rows) continue;
      float* scores = at.scores + r * kDirectKeys;
      if (a.mask || a.softcap > 0.0f)
        adjust_scores(a, m, scaled, mask_offset(a, item, place_of(a, item.rows.begin + r)) + block.first, seen[r],
                      scores);
      if (r && seen[r].begin == seen[r - 1].begin && seen[r].end == seen[r - 1].end) {
        counts[r] = counts[r - 1];
      } else {
        counts[r] = masks[r];
        for (int64_t j = begin; j < end; j += 16)
          masks[r][j / 16] = first_lanes(seen[r].end - j) & ~first_lanes(seen[r].begin - j);
      }
      for (int64_t j = begin; j < end; j += 16)
        top[r] = _mm512_mask_max_ps(top[r], counts[r][j / 16], top[r], S::load(scores + j));
    }
    for (int r = 0; r < kMostRows; r += 4) cpullm::reduce_max4(top + r, tops + r);
    const __mmask16 all = first_lanes(rows);
    const __m512 old = _mm512_maskz_loadu_ps(all, m.most), next = S::max(S::load(tops), old);
    const __m512 log2e = S::set1(kLog2e), never = S::set1(kNever);
    const __m512 least = _mm512_maskz_mov_ps(~_mm512_cmpeq_ps_mask(next, never), S::mul(next, log2e));
    const __m512 shrink =
        _mm512_mask_mov_ps(exp2_roughly(S::fms(old, log2e, least)), _mm512_cmpeq_ps_mask(next, old), S::set1(1.0f));
    S::store(from, least);
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = at.scores + r * kDirectKeys;
      const __m512 subtract = S::set1(from[r]);
      for (int64_t j = begin; j < end; j += 16) {
        const __mmask16 keys = counts[r][j / 16];
        const __m512 x = _mm512_maskz_mov_ps(keys, exp2_roughly(S::fms(S::load(scores + j), log2e, subtract)));
        sum[r] = sum[r] + x;
        const __m512 y = _mm512_maskz_mul_ps(keys, x, S::load(m.v_scale + j));
        most[r] = S::max_u32(most[r], S::magnitude(y));  // nan is largest
        S::store(scores + j, y);
      }
    }
    for (int r = 0; r < kMostRows; r += 4) {
      S::reduce_sum4(sum[r], sum[r + 1], sum[r + 2], sum[r + 3], sums + r);
      reduce_max4(most + r, largest + r);
    }
    _mm512_mask_storeu_ps(m.most, all, next);
    _mm512_mask_storeu_ps(m.total, all, S::fma(_mm512_maskz_loadu_ps(all, m.total), shrink, S::load(sums)));
    S::store(p.fade, shrink);
    const __m512 range = _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(all, largest));
    S::store(p.scale, S::mul(range, S::set1(1.0f / kMost)));
    S::store(from, inverse_of(range));
    for (int64_t r = 0; r < kMostRows; ++r) {
      float* scores = at.scores + r * kDirectKeys;
      const __m512 inverse = S::set1(from[r]);
      __m512i integers = _mm512_setzero_si512();
      for (int64_t j = begin; r < rows && j < end; j += 16) {
        const __m512i x = _mm512_cvtps_epi32(S::mul(S::load(scores + j), inverse));
        store_bytes(reinterpret_cast<int8_t*>(scores) + 2 * j, x);  // scores up to there have been read
        integers = _mm512_add_epi32(integers, x);
      }
      sum[r] = _mm512_cvtepi32_ps(integers);  // exact, and so are sums of 256
    }
    for (int r = 0; r < kMostRows; r += 4) S::reduce_sum4(sum[r], sum[r + 1], sum[r + 2], sum[r + 3], sums + r);
    _mm512_store_si512(p.bias, _mm512_slli_epi32(_mm512_cvtps_epi32(S::load(sums)), 7));
  }

  // Rows [first, first + kRows): scores [kRows, kDirectKeys]; asks for the first `ask` of the block's values.
  template <int kRows>
  [[gnu::noinline]] static void scores_of(const Attention& a, const AttentionScratch& m, const KeyBlock& block,
                                          int64_t first, int64_t ask) {
    const Memory at(m);
    const int64_t groups = a.width / 16, ask_rows = 512 / a.width;
    int64_t asked = 0;
    for (int64_t j = 0; j < block.count; j += kColumns) {
      float* scores = at.scores + first * kDirectKeys + j;
      const float* scale = m.k_scale + j;
      product<kRows>(
          at.q + 2 * first * m.padded, 2 * m.padded, at.keys + j * a.width, groups,
          [&](int64_t) {
            const int64_t end = min_of(asked + ask_rows, ask);
            for (; asked < end; ++asked) prefetch_row<CacheType::i8>(block.v, a.v_stride[2], asked, a.width);
          },
          [&](int r, int64_t c, __m512i sum) {
            const __m512 x = Simd::mul(to_floats(sum, at.q_bias[first + r]), Simd::set1(at.q_scale[first + r]));
            Simd::store(scores + r * kDirectKeys + c, Simd::mul(x, Simd::load(scale + c)));
          });
    }
  }

  // Rows [first, first + kRows): sums = fade sums + p V; asks for the next keys.
  template <int kRows>
  [[gnu::noinline]] static void values_of(const Attention& a, const AttentionScratch& m, int64_t begin, int64_t end,
                                          int64_t first, const Softened& p, const KeysAhead& ahead) {
    const Memory at(m);
    const int64_t ask_rows = 512 / a.width;
    int64_t asked = 0;
    for (int64_t c = 0; c < a.width; c += kColumns) {
      float* sums = m.sums + first * m.padded + c;
      product<kRows>(
          reinterpret_cast<const int8_t*>(at.scores + first * kDirectKeys) + 2 * begin, 4 * kDirectKeys,
          at.values + c / kColumns * kTileBytes + begin / 4 * kWordBytes, (end - begin) / 16,
          [&](int64_t) {
            const int64_t stop = min_of(asked + ask_rows, ahead.count);
            for (; asked < stop; ++asked) prefetch_row<CacheType::i8>(ahead.k, a.k_stride[2], asked, a.width);
          },
          [&](int r, int64_t i, __m512i sum) {
            float* to = sums + r * m.padded + i;
            const __m512 x = Simd::mul(to_floats(sum, p.bias[first + r]), Simd::set1(p.scale[first + r]));
            Simd::store(to, Simd::fma(Simd::load(to), Simd::set1(p.fade[first + r]), x));
          });
    }
  }

  template <class Change>
  static void for_tiles(int64_t rows, const Change& change) {
    const int64_t most = even_tile(rows, 4);
    for (int64_t first = 0; first < rows; first += most) {
      switch (min_of(rows - first, most)) {
        case 1: change(Vecs<1>{}, first); break;
        case 2: change(Vecs<2>{}, first); break;
        case 3: change(Vecs<3>{}, first); break;
        default: change(Vecs<4>{}, first); break;
      }
    }
  }

  // A block of keys for all rows of an item.
  static void block(const Attention& a, const AttentionScratch& m, const AttentionItem& item, const KeyBlock& block,
                    const KeysAhead& ahead) {
    const Memory at(m);
    const int64_t rows = item.rows.end - item.rows.begin;
    pack_keys(static_cast<const int8_t*>(block.k), a.k_stride[2], block.count, a.width, at.keys);
    for_tiles(rows, [&](auto tile, int64_t first) {
      scores_of<decltype(tile)::kCount>(a, m, block, first, first ? 0 : block.count);
    });
    Range seen[kMostRows];
    const Range any = seen_by_tile(a, item, block, 0, rows, seen);
    if (any.begin >= any.end) return;
    const int64_t begin = any.begin / 16 * 16, end = (any.end + 15) / 16 * 16;
    Softened p;
    soften_codes(a, m, item, block, rows, seen, begin, end, p);
    pack_values(static_cast<const int8_t*>(block.v), a.v_stride[2], begin, end, block.count, a.width, at.values);
    for_tiles(rows, [&](auto tile, int64_t first) {
      values_of<decltype(tile)::kCount>(a, m, begin, end, first, p, first ? KeysAhead{ahead.k, 0} : ahead);
    });
  }
};

}  // namespace
}  // namespace cpullm
