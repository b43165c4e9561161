// Attention with an online softmax, written once over Simd: no [s, t] scores, no expanded kv heads.
// Source of the online softmax: Milakov and Gimelshein, Online normalizer calculation for softmax (2018); of the order
// of the loops: Dao et al., FlashAttention (2022).
//
// An item goes through its keys in blocks. Few rows read keys and values as they are, converted in registers: kDirectKeys
// keys, meanwhile asking for their values, then these, meanwhile asking for the next keys, so that memory is never idle.
// Many rows turn a block into fp32 once, keys transposed, and take it tile by tile: kQueryRows rows x 2 vectors of sums
// in registers. What a row adds up, and in which order, depends on the cache's length and the window, which decide the
// splits, and on whether rows are few, but not on what stands in the rows beside it.
#pragma once

#include "attention_block-inl.h"

namespace cpullm {
namespace {

// ---- rows -----------------------------------------------------------------------------------------------------------

struct RowPlace {
  int64_t query, head;  // head within the group
};

static inline RowPlace place_of(const Attention& a, int64_t row) {
  const int64_t per = a.heads / a.kv_heads;
  return {row / per, row % per};
}

static inline int64_t mask_offset(const Attention& a, const AttentionItem& at, RowPlace row) {
  if (!a.mask) return 0;
  const int64_t h = at.g * (a.heads / a.kv_heads) + row.head;
  return at.b * a.mask_stride[0] + h * a.mask_stride[1] + row.query * a.mask_stride[2];
}

static inline const float* query_of(const Attention& a, const AttentionItem& at, int64_t row) {
  const RowPlace p = place_of(a, row);
  return a.q + at.b * a.q_stride[0] + p.query * a.q_stride[1] + at.g * a.q_stride[2] + p.head * a.q_stride[3];
}

// change(a, b) for every two whole vectors a, b of x.
template <class F>
static inline void for_pairs(float* x, int64_t width, const F& change) {
  using S = Simd;
  for (int64_t c = 0; c + 2 * S::kLanes <= width; c += 2 * S::kLanes) {
    S::F a = S::load(x + c), b = S::load(x + c + S::kLanes);
    change(a, b);
    S::store(x + c, a);
    S::store(x + c + S::kLanes, b);
  }
}

// Keys of the block that this query sees, counted from the block's first.
static inline Range seen_in(const Attention& a, const KeyBlock& block, int64_t query) {
  const Range keys = visible_keys(a, query);
  const int64_t begin = keys.begin - block.first, end = min_of(keys.end - block.first, block.count);
  return {begin > 0 ? begin : 0, end > 0 ? end : 0};
}

template <int kVecs>
struct Vecs {
  static constexpr int kCount = kVecs;
};

// Keys that will be read: their first row, and how many.
struct KeysAhead {
  const void* k;
  int64_t count;
};

// Scores of kRows rows from row `first` of the item on become probabilities; fade [kRows]: see soften. Returns the keys
// that any of the rows sees.
template <int kRows>
static inline Range soften_rows(const Attention& a, const AttentionScratch& m, const AttentionItem& at,
                                const KeyBlock& block, int64_t first, float* fade) {
  Range any{kDirectKeys, 0};
  for (int r = 0; r < kRows; ++r) {
    const RowPlace row = place_of(a, at.rows.begin + first + r);
    const Range seen = seen_in(a, block, row.query);
    any.begin = min_of(any.begin, seen.begin);
    any.end = seen.end > any.end ? seen.end : any.end;
    fade[r] = soften(a, m, block, mask_offset(a, at, row) + block.first, seen, m.scores + r * kDirectKeys,
                     m.most[first + r], m.total[first + r]);
  }
  return any;
}

// Up to kDirectRows rows from row `first` of the item on; ahead: what is read after the block.
template <int kRows, CacheType kType>
static inline void direct_rows(const Attention& a, const AttentionScratch& m, const AttentionItem& at,
                               const KeyBlock& block, const KeysAhead& ahead, int64_t first) {
  using S = Simd;
  static_assert(kRows * kDirectKeys <= 16 * kBlockKeys, "scores have room");
  const bool asks = first == 0;  // once is enough
  float fade[kRows];
  direct_scores<kRows, kType>(m.q + first * m.padded, m.padded, block.k, a.k_stride[2], block.v, a.v_stride[2],
                              asks ? block.count : 0, block.count, a.width, m.scores);
  const auto [begin, end] = soften_rows<kRows>(a, m, at, block, first, fade);
  float* sums = m.sums + first * m.padded;
  const auto values = [&, begin = begin, end = end](auto vecs, int64_t c) {
    direct_values<kRows, decltype(vecs)::kCount, kType>(
        m.scores, block.v, a.v_stride[2], c, a.width, begin, end, fade, sums + c, m.padded,
        static_cast<const char*>(ahead.k) + c * kCacheBytes<kType>, a.k_stride[2], asks ? ahead.count : 0);
  };
  int64_t c = 0;
  for (; c + 4 * S::kLanes <= a.width; c += 4 * S::kLanes) values(Vecs<4>{}, c);
  for (; c + 2 * S::kLanes <= a.width; c += 2 * S::kLanes) values(Vecs<2>{}, c);
  for (; c < a.width; c += S::kLanes) values(Vecs<1>{}, c);
}

// keys [width, kBlockKeys] and values [kBlockKeys, padded] of a block as fp32; zeros where there is none. ask:
// for the block's values while its keys are read, and for the next keys while its values are.
template <CacheType kType>
static inline void convert_block(const Attention& a, const AttentionScratch& m, const KeyBlock& block, bool ask) {
  using S = Simd;
  for (int64_t j = 0; j < kBlockKeys; j += S::kLanes) {
    for (int64_t i = j; ask && i < j + S::kLanes; ++i) prefetch_row<kType>(block.v, a.v_stride[2], i, a.width);
    const float* from = static_cast<const float*>(block.k) + (kType == CacheType::f32 ? j * a.k_stride[2] : 0);
    int64_t stride = a.k_stride[2];
    if (kType != CacheType::f32 || a.width % 4 || j + S::kLanes > block.count) {
      for (int64_t i = 0; i < S::kLanes; ++i)
        for (int64_t c = 0; c < a.width; c += S::kLanes)
          S::store(m.convert + i * m.padded + c,
                   j + i < block.count ? load_cache_part<kType>(block.k, (j + i) * a.k_stride[2] + c, a.width - c)
                                       : S::zero());
      from = m.convert;
      stride = m.padded;
    }
    for (int64_t c = 0; c < a.width; c += 4) S::transpose4(from + c, stride, m.keys + c * kBlockKeys + j, kBlockKeys);
  }
  for (int64_t j = 0; j < block.count; ++j) {
    if (ask) prefetch_row<kType>(block.k, a.k_stride[2], kBlockKeys + j, a.width);
    for (int64_t c = 0; c < a.width; c += S::kLanes)
      S::store(m.values + j * m.padded + c, load_cache_part<kType>(block.v, j * a.v_stride[2] + c, a.width - c));
  }
}

// Keys of the block that any of the rows [first, first + rows) of the item sees; seen [rows]: that each sees.
static inline Range seen_by_tile(const Attention& a, const AttentionItem& at, const KeyBlock& block, int64_t first,
                                 int64_t rows, Range* seen) {
  Range any{kBlockKeys, 0};
  for (int64_t r = 0; r < rows; ++r) {
    seen[r] = seen_in(a, block, place_of(a, at.rows.begin + first + r).query);
    any.begin = min_of(any.begin, seen[r].begin);
    any.end = seen[r].end > any.end ? seen[r].end : any.end;
  }
  return any;
}

// kQueryRows rows from row `first` of the item on, over the converted block; rows that do not exist are computed too.
static inline void tile_rows_of(const Attention& a, const AttentionScratch& m, const AttentionItem& at,
                                const KeyBlock& block, int64_t first) {
  using S = Simd;
  constexpr int kRows = S::kQueryRows;
  const int64_t rows = min_of(kRows, at.rows.end - at.rows.begin - first);
  Range seen[kRows];
  const auto [begin, end] = seen_by_tile(a, at, block, first, rows, seen);
  if (begin >= end) return;
  const float* q = m.q + first * m.padded;
  for (int64_t j = begin / (2 * S::kLanes) * (2 * S::kLanes); j < end; j += 2 * S::kLanes)
    tile_product<kRows, 1, kRows, 2>(q, m.keys + j, kBlockKeys, a.width, nullptr, m.scores + j, kBlockKeys);
  float fade[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    fade[r] = 1.0f;
    if (r < rows)
      fade[r] = soften(a, m, block, mask_offset(a, at, place_of(a, at.rows.begin + first + r)) + block.first, seen[r],
                       m.scores + r * kBlockKeys, m.most[first + r], m.total[first + r]);
  }
  float* sums = m.sums + first * m.padded;
  const float *p = m.scores + begin, *v = m.values + begin * m.padded;
  int64_t c = 0;
  for (; c + 2 * S::kLanes <= m.padded; c += 2 * S::kLanes)
    tile_product<kRows, int(kBlockKeys), 1, 2>(p, v + c, m.padded, end - begin, fade, sums + c, m.padded);
  if (c < m.padded)
    tile_product<kRows, int(kBlockKeys), 1, 1>(p, v + c, m.padded, end - begin, fade, sums + c, m.padded);
}

// Tiles of many rows in fp32.
struct FloatTiles {
  static constexpr bool kFew = false;  // few rows are never rounded

  // Scaled queries of an item, in tiles with the rows side by side.
  static void load(const Attention& a, const AttentionScratch& m, const AttentionItem& at) {
    constexpr int kRows = Simd::kQueryRows;
    const int64_t rows = at.rows.end - at.rows.begin;
    for (int64_t r = 0; r < rows; r += kRows) {
      const float* q[kRows];
      for (int64_t i = 0; i < kRows; ++i) q[i] = query_of(a, at, at.rows.begin + min_of(r + i, rows - 1));
      float* to = m.q + r * m.padded;
      for (int64_t c = 0; c < a.width; ++c, to += kRows)
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) to[i] = q[i][c] * a.scale;
    }
  }

  template <CacheType kType>
  static void convert(const Attention& a, const AttentionScratch& m, const KeyBlock& block, bool ask) {
    convert_block<kType>(a, m, block, ask);
  }

  static void rows_of(const Attention& a, const AttentionScratch& m, const AttentionItem& at, const KeyBlock& block,
                      int64_t first) {
    tile_rows_of(a, m, at, block, first);
  }
};

// Whether the rows of an item that reads keys and values as they are take them in bf16 products.
template <class Tiles>
static inline bool rounds_few(const Attention& a, const AttentionItem& at) {
  if constexpr (Tiles::kFew) return Tiles::few(a, at.rows.end - at.rows.begin);
  return false;
}

// Whether the rows of an item that reads codes as they are take them in int8 products.
template <class Tiles>
static inline bool takes_codes(const Attention& a, const AttentionItem& at, bool direct) {
  if constexpr (Tiles::kFew) return direct && Tiles::Codes::few(a, at.rows.end - at.rows.begin);
  return false;
}

template <int kRows, CacheType kType, class Tiles>
static inline void few_rows(const Attention& a, const AttentionScratch& m, const AttentionItem& at,
                            const KeyBlock& block, const KeysAhead& ahead, int64_t first) {
  if constexpr (kType == CacheType::bf16 && Tiles::kFew)
    if (rounds_few<Tiles>(a, at)) return Tiles::template few_rows<kRows>(a, m, at, block, ahead, first);
  direct_rows<kRows, kType>(a, m, at, block, ahead, first);
}

template <CacheType kType, class Tiles>
static inline void direct_pass(const Attention& a, const AttentionScratch& m, const AttentionItem& at,
                               const KeyBlock& block, const KeysAhead& ahead) {
  if constexpr (kType == CacheType::i8 && Tiles::kFew)
    if (takes_codes<Tiles>(a, at, true)) return Tiles::Codes::block(a, m, at, block, ahead);
  const int64_t rows = at.rows.end - at.rows.begin, most = even_tile(rows, Simd::kDirectRows);
  for (int64_t first = 0; first < rows;) {
    const int64_t n = min_of(rows - first, most);
    switch (n) {
      case 1: few_rows<1, kType, Tiles>(a, m, at, block, ahead, first); break;
      case 2: few_rows<2, kType, Tiles>(a, m, at, block, ahead, first); break;
#if CPULLM_TILE_ROWS > 6
      case 3: few_rows<3, kType, Tiles>(a, m, at, block, ahead, first); break;
      case 4: few_rows<4, kType, Tiles>(a, m, at, block, ahead, first); break;
#endif
      default: __builtin_trap();  // kDirectRows of this level
    }
    first += n;
  }
}

// Keys that any row of the item sees, from the begin of a block on.
static inline Range keys_of(const Attention& a, const AttentionItem& at) {
  const Range first = visible_keys(a, place_of(a, at.rows.begin).query);
  const Range last = visible_keys(a, place_of(a, at.rows.end - 1).query);
  const int64_t begin = first.begin > at.keys.begin ? first.begin : at.keys.begin;
  return {begin / kBlockKeys * kBlockKeys, min_of(last.end, at.keys.end)};
}

// The item's keys, block by block. next: the item after it; null: none.
template <CacheType kType, class Tiles>
static void all_blocks(const Attention& a, const AttentionScratch& m, const AttentionItem& at,
                       const AttentionItem* next, bool direct) {
  constexpr int64_t kBytes = kCacheBytes<kType>;
  const auto keys_from = [&](const AttentionItem& item, int64_t row) {
    return static_cast<const char*>(a.k) +
           (item.b * a.k_stride[0] + item.g * a.k_stride[1] + row * a.k_stride[2]) * kBytes;
  };
  const Range keys = keys_of(a, at);
  const int64_t step = direct ? kDirectKeys : kBlockKeys;
  const char* v = static_cast<const char*>(a.v) + (at.b * a.v_stride[0] + at.g * a.v_stride[1]) * kBytes;
  for (int64_t first = keys.begin; first < keys.end; first += step) {
    const int64_t count = min_of(step, keys.end - first);
    const KeyBlock block{keys_from(at, first),  v + first * a.v_stride[2] * kBytes, first, count, whole_blocks(count),
                         kType == CacheType::i8};
    if (kType == CacheType::i8) {
      const float* k_scale = a.k_scale + at.b * a.k_scale_stride[0] + at.g * a.k_scale_stride[1];
      const float* v_scale = a.v_scale + at.b * a.v_scale_stride[0] + at.g * a.v_scale_stride[1];
      for (int64_t j = 0; j < block.room; j += Simd::kLanes) {
        const int64_t rest = count > j ? count - j : 0;
        Simd::store(m.k_scale + j, load_part(k_scale, first + j, rest));
        Simd::store(m.v_scale + j, load_part(v_scale, first + j, rest));
      }
    }
    if (direct) {
      KeysAhead ahead{block.k, 0};
      if (first + step < keys.end) {
        ahead = {keys_from(at, first + step), min_of(step, keys.end - first - step)};
      } else if (next) {
        const Range after = keys_of(a, *next);
        ahead = {keys_from(*next, after.begin), min_of(step, after.end - after.begin)};
      }
      direct_pass<kType, Tiles>(a, m, at, block, ahead);
    } else {
      // Many rows find the next block in a cache: their other blocks have read it.
      Tiles::template convert<kType>(a, m, block, at.rows.end - at.rows.begin <= kFewBlockRows);
      for (int64_t row = 0; row < at.rows.end - at.rows.begin; row += Simd::kQueryRows)
        Tiles::rows_of(a, m, at, block, row);
    }
  }
}

// out of one row: sums / (total and the sink's share); zeros where there was no key.
static inline void finish_row(const Attention& a, int64_t b, int64_t g, int64_t row, const float* sums, float most,
                              float total) {
  using S = Simd;
  const RowPlace place = place_of(a, row);
  const int64_t h = g * (a.heads / a.kv_heads) + place.head;
  float factor = total == 0.0f ? 0.0f : 1.0f / total;
  if (a.sinks && total != 0.0f) {
    const float top = a.sinks[h] > most ? a.sinks[h] : most, share = exp_of(most - top);
    factor = share / (total * share + exp_of(a.sinks[h] - top));
  }
  float* out = a.out + b * a.out_stride[0] + place.query * a.out_stride[1] + h * a.out_stride[2];
  for (int64_t c = 0; c < a.width; c += S::kLanes)
    store_part(out, c, a.width - c, S::mul(S::load(sums + c), S::set1(factor)));
}

// Rows in whole tiles.
static inline int64_t round_rows(int64_t rows) {
  return (rows + Simd::kQueryRows - 1) / Simd::kQueryRows * Simd::kQueryRows;
}

// Whether q and sums are kept parted, as load_half gives keys and values to rows that read them as they are.
template <class Tiles>
static inline bool is_parted(const Attention& a, const AttentionItem& at, bool direct) {
  return direct && a.type == CacheType::bf16 && !rounds_few<Tiles>(a, at);
}

// Scaled queries and empty sums of an item's rows.
template <class Tiles>
static inline void load_queries(const Attention& a, const AttentionScratch& m, const AttentionItem& at, bool direct) {
  using S = Simd;
  const int64_t rows = at.rows.end - at.rows.begin, padded_rows = direct ? rows : round_rows(rows);
  for (int64_t r = 0; r < padded_rows; ++r) {
    m.most[r] = kNever;
    m.total[r] = 0.0f;
  }
  memset(m.sums, 0, size_t(padded_rows * m.padded) * 4);
  if (!direct) return Tiles::load(a, m, at);
  if constexpr (Tiles::kFew) {
    if (rounds_few<Tiles>(a, at)) return Tiles::load_few(a, m, at);
    if (takes_codes<Tiles>(a, at, direct)) return Tiles::Codes::load(a, m, at);
  }
  const S::F scale = S::set1(a.scale);
  for (int64_t r = 0; r < rows; ++r) {
    const float* q = query_of(a, at, at.rows.begin + r);
    for (int64_t c = 0; c < m.padded; c += S::kLanes)
      S::store(m.q + r * m.padded + c, c < a.width ? S::mul(load_part(q, c, a.width - c), scale) : S::zero());
    if (is_parted<Tiles>(a, at, direct)) for_pairs(m.q + r * m.padded, a.width, S::part);
  }
}

template <class Tiles>
static void attention_with(const Attention& a, Range items, float* scratch) {
  const AttentionPlan plan = plan_attention(a);
  const AttentionScratch m(plan, a.width, scratch);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const AttentionItem at = attention_item(a, plan, item);
    const int64_t rows = at.rows.end - at.rows.begin;
    const bool direct = plan.rows <= Simd::kDirectMost && !a.tiled;
    load_queries<Tiles>(a, m, at, direct);
    const AttentionItem after = attention_item(a, plan, item + 1 < items.end ? item + 1 : item);
    const AttentionItem* const next = item + 1 < items.end ? &after : nullptr;
    switch (a.type) {
      case CacheType::f32: all_blocks<CacheType::f32, Tiles>(a, m, at, next, direct); break;
      case CacheType::bf16: all_blocks<CacheType::bf16, Tiles>(a, m, at, next, direct); break;
      case CacheType::f16: all_blocks<CacheType::f16, Tiles>(a, m, at, next, direct); break;
      case CacheType::i8: all_blocks<CacheType::i8, Tiles>(a, m, at, next, direct); break;
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* sums = m.sums + r * m.padded;
      if (is_parted<Tiles>(a, at, direct)) for_pairs(sums, a.width, Simd::join);
      if constexpr (Tiles::kFew)
        if (takes_codes<Tiles>(a, at, direct)) Tiles::Codes::arrange(sums, a.width);
      if (plan.splits == 1) {
        finish_row(a, at.b, at.g, at.rows.begin + r, sums, m.most[r], m.total[r]);
        continue;
      }
      float* to = partial_of(a, plan, at.b, at.g, at.rows.begin + r, at.split);
      memcpy(to, sums, size_t(m.padded) * 4);
      to[m.padded] = m.most[r];
      to[m.padded + 1] = m.total[r];
    }
  }
}

void attention(const Attention& a, Range items, float* scratch) { attention_with<FloatTiles>(a, items, scratch); }

void combine_attention(const Attention& a, Range items) {
  using S = Simd;
  const AttentionPlan plan = plan_attention(a);
  const int64_t padded = plan.partial_stride - 16;
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t row = item % plan.rows, g = item / plan.rows % a.kv_heads, b = item / plan.rows / a.kv_heads;
    float* sums = partial_of(a, plan, b, g, row, 0);  // the result ends up here
    float most = sums[padded], total = sums[padded + 1];
    for (int64_t split = 1; split < plan.splits; ++split) {
      const float* other = sums + split * plan.partial_stride;
      if (other[padded + 1] == 0.0f) continue;  // no key there
      const float top = other[padded] > most ? other[padded] : most;
      const float mine = total == 0.0f ? 0.0f : exp_of(most - top), its = exp_of(other[padded] - top);
      for (int64_t c = 0; c < padded; c += S::kLanes)
        S::store(sums + c, S::fma(S::load(other + c), S::set1(its), S::mul(S::load(sums + c), S::set1(mine))));
      total = total * mine + other[padded + 1] * its;
      most = top;
    }
    finish_row(a, b, g, row, sums, most, total);
  }
}

}  // namespace
}  // namespace cpullm
