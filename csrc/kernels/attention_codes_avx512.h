// Attention of 3 to 8 rows over int8 caches in int8 products, where it need not be exact.
//
// Queries, and a block's probabilities times the values' scales, become 16-bit integers relative to their row's largest
// and are taken as two signed bytes, 256 high + low. A 2^-16th of the largest is no more than bf16's 2^-9th of each, in a
// block of 256 keys even if every one is off the same way. Codes are unsigned, code + 128: an integer sum says what that
// adds.
//
// A block of keys and its values are turned into words of four codes once for all rows: of neighbouring head elements for
// q K^T, of neighbouring keys for p V, 32 columns (keys, or head elements) side by side. Both products are then the
// same. bf16 products of converted codes would take the same number of steps and four times the conversion.
#pragma once

namespace cpullm {
namespace {

inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

struct CodeProducts {
  static constexpr int64_t kColumns = 32;                  // of a tile of words
  static constexpr int64_t kWordBytes = 4 * kColumns;      // a word of every column
  static constexpr int64_t kTileBytes = 64 * kWordBytes;   // of values: kDirectKeys keys
  static constexpr float kMost = 127 * 256 + 127;          // of two signed bytes
  static constexpr int kMostRows = 8;

  static bool few(const Attention& a, int64_t rows) {
    return rows > 2 && a.type == CacheType::i8 && a.width % 64 == 0 && a.width <= 512;
  }

  // What the scratch holds. The regions of many rows' tiles have room: 256 keys of a byte are 64 of a float.
  struct Memory {
    int8_t* q;          // [rows, 2 padded]
    uint8_t* keys;      // [kDirectKeys / 32, words, 32 keys]
    uint8_t* values;    // [padded / 32, kDirectKeys / 4, 32 columns]
    float* scores;      // [rows, kDirectKeys]
    float *q_scale;     // [rows]
    int32_t* q_bias;    // [rows]

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
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
    const __m512i low = _mm512_sub_epi32(x, _mm512_slli_epi32(high, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm512_cvtepi32_epi8(low));
  }

  struct Integers {
    float scale;
    int32_t bias;  // what unsigned codes add to a sum of products
  };

  // x [begin, end), multiples of 16, of which `seen` counts, as integers; to may be x.
  static Integers to_integers(const float* x, int64_t begin, int64_t end, Range seen, int8_t* to) {
    const auto load = [&](int64_t j) {
      return _mm512_maskz_loadu_ps(first_lanes(seen.end - j) & ~first_lanes(seen.begin - j), x + j);
    };
    __m512i largest = _mm512_setzero_si512();
    for (int64_t j = begin; j < end; j += 16) largest = Simd::max_u32(largest, Simd::magnitude(load(j)));
    const uint32_t bits = Simd::reduce_max_u32(largest);  // nan is above all
    float most;
    memcpy(&most, &bits, 4);
    // What is not finite makes the scale so, and with it the result.
    const __m512 inverse = Simd::set1(most > 0x1p-110f && most < __builtin_inff() ? kMost / most : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t j = begin; j < end; j += 16) {
      const __m512i integer = _mm512_cvtps_epi32(Simd::mul(load(j), inverse));
      store_bytes(to + 2 * j, integer);
      sum = _mm512_add_epi32(sum, integer);
    }
    return {most / kMost, 128 * _mm512_reduce_add_epi32(sum)};
  }

  static void load(const Attention& a, const AttentionScratch& m, const AttentionItem& at) {
    const Memory to(m);
    for (int64_t r = 0; r < at.rows.end - at.rows.begin; ++r) {
      const Integers q =
          to_integers(query_of(a, at, at.rows.begin + r), 0, a.width, {0, a.width}, to.q + 2 * r * m.padded);
      to.q_scale[r] = q.scale * a.scale;
      to.q_bias[r] = q.bias;
    }
  }

  static __m512i codes(const int8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
  }

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
      for (int i = 0; i < 2; ++i)
        finish(r, 16 * i, _mm512_add_epi32(_mm512_slli_epi32(high[r][i], 8), low[r][i]));
  }

  static __m512 to_floats(__m512i sum, int32_t bias) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(bias)));
  }

  // Rows [first, first + kRows): scores [kRows, kDirectKeys]; asks for the first `ask` of the block's values.
  template <int kRows>
  static void scores_of(const Attention& a, const AttentionScratch& m, const KeyBlock& block, int64_t first,
                        int64_t ask) {
    const Memory at(m);
    const int64_t groups = a.width / 16, ask_rows = 512 / a.width;
    int64_t asked = 0;
    for (int64_t j = 0; j < block.count; j += kColumns) {
      float* scores = at.scores + first * kDirectKeys + j;
      product<kRows>(
          at.q + 2 * first * m.padded, 2 * m.padded, at.keys + j * a.width, groups,
          [&](int64_t) {
            const int64_t end = min_of(asked + ask_rows, ask);
            for (; asked < end; ++asked) prefetch_row<CacheType::i8>(block.v, a.v_stride[2], asked, a.width);
          },
          [&](int r, int64_t c, __m512i sum) {
            Simd::store(scores + r * kDirectKeys + c,
                        Simd::mul(to_floats(sum, at.q_bias[first + r]), Simd::set1(at.q_scale[first + r])));
          });
    }
  }

  // Rows [first, first + kRows): sums = fade sums + p V; asks for the next keys.
  template <int kRows>
  static void values_of(const Attention& a, const AttentionScratch& m, int64_t begin, int64_t end, int64_t first,
                        const Integers* p, const float* fade, const KeysAhead& ahead) {
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
            const __m512 x = Simd::mul(to_floats(sum, p[first + r].bias), Simd::set1(p[first + r].scale));
            Simd::store(to, Simd::fma(Simd::load(to), Simd::set1(fade[first + r]), x));
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
    Range seen[kMostRows], any{kDirectKeys, 0};
    float fade[kMostRows];
    for (int64_t r = 0; r < rows; ++r) {
      const RowPlace row = place_of(a, item.rows.begin + r);
      seen[r] = seen_in(a, block, row.query);
      any.begin = min_of(any.begin, seen[r].begin);
      any.end = seen[r].end > any.end ? seen[r].end : any.end;
      fade[r] = soften(a, m, block, mask_offset(a, item, row) + block.first, seen[r], at.scores + r * kDirectKeys,
                       m.most[r], m.total[r]);
    }
    if (any.begin >= any.end) return;
    const int64_t begin = any.begin / 16 * 16, end = (any.end + 15) / 16 * 16;
    Integers p[kMostRows];
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = at.scores + r * kDirectKeys;
      p[r] = to_integers(scores, begin, end, seen[r], reinterpret_cast<int8_t*>(scores));
    }
    pack_values(static_cast<const int8_t*>(block.v), a.v_stride[2], begin, end, block.count, a.width, at.values);
    for_tiles(rows, [&](auto tile, int64_t first) {
      values_of<decltype(tile)::kCount>(a, m, begin, end, first, p, fade, first ? KeysAhead{ahead.k, 0} : ahead);
    });
  }
};

}  // namespace
}  // namespace cpullm
