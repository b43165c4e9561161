// What attention-inl.h does with one block of keys: scores, softmax, weighted sum of values. Written once over Simd.
#pragma once

namespace cpullm {
namespace {

constexpr float kNever = -__builtin_inff();

template <CacheType kType>
static inline Simd::F load_cache(const void* p, int64_t i) {
  if (kType == CacheType::i8) return Simd::load_i8(static_cast<const int8_t*>(p) + i);
  return load_floats(p, i, Float(kType));
}

template <CacheType kType>
static inline Simd::F load_cache_part(const void* p, int64_t i, int64_t count) {
  if (count >= Simd::kLanes) return load_cache<kType>(p, i);
  if (kType != CacheType::i8) return load_part(p, i, count, Float(kType));
  alignas(64) float v[Simd::kLanes] = {};
  for (int64_t j = 0; j < count; ++j) v[j] = static_cast<const int8_t*>(p)[i + j];
  return Simd::load(v);
}

// One of the two vectors that 2 kLanes elements from i on make: of bf16 the elements at even or at odd places, which
// takes half the instructions; else the first or the second ones.
template <CacheType kType>
static inline Simd::F load_half(const void* p, int64_t i, int half) {
  if (kType != CacheType::bf16) return load_cache<kType>(p, i + half * Simd::kLanes);
  const uint16_t* pairs = static_cast<const uint16_t*>(p) + i;
  return half ? Simd::load_bf16_odd(pairs) : Simd::load_bf16_even(pairs);
}

// The memory of one item, cut from the caller's.
struct AttentionScratch {
  float* q;        // [rows, padded], or by tiles [padded, kQueryRows]
  float* sums;     // [rows, padded]: of probability times value, relative to most
  float* keys;     // [padded, kBlockKeys]
  float* values;   // [kBlockKeys, padded]
  float* convert;  // [kLanes, padded]
  float* scores;   // [kQueryRows, kBlockKeys] or [kDirectRows, kDirectKeys]
  float* k_scale;  // [kDirectKeys]
  float* v_scale;  // [kDirectKeys]
  float* most;     // [rows]
  float* total;    // [rows]
  int64_t padded;  // head dim, rounded up to 16

  AttentionScratch(const AttentionPlan& p, int64_t width, float* at) {
    padded = (width + 15) / 16 * 16;
    const int64_t rows = padded_rows(p);
    const auto take = [&](int64_t count) {
      float* taken = at;
      at += count;
      return taken;
    };
    q = take(rows * padded);
    sums = take(rows * padded);
    keys = take(padded * kBlockKeys);
    values = take(padded * kBlockKeys);
    convert = take(16 * padded);
    scores = take(16 * kBlockKeys);
    k_scale = take(kDirectKeys);
    v_scale = take(kDirectKeys);
    most = take(rows);
    total = take(rows);
  }
};

// A block of keys of one kv head: rows of k and v from the first key on.
struct KeyBlock {
  const void *k, *v;
  int64_t first, count;  // key index, keys that exist here
  int64_t room;          // count, rounded up to kBlockKeys: scores that are computed
  bool scaled;           // int8: k_scale and v_scale of the scratch hold
};

// ---- scores ---------------------------------------------------------------------------------------------------------

template <CacheType kType>
constexpr int64_t kCacheBytes = kType == CacheType::f32  ? 4
                                : kType == CacheType::i8 ? 1
                                                         : 2;

// Asks for row `row` of keys or values, which is needed soon, to L2: blocks do not fit L1. The address may lie beyond the
// cache.
template <CacheType kType>
static inline void prefetch_row(const void* p, int64_t stride, int64_t row, int64_t width) {
  constexpr int64_t kBytes = kCacheBytes<kType>;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + uintptr_t(row * stride * kBytes);
  for (int64_t i = 0; i < width * kBytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(at + i), _MM_HINT_T1);
}

// scores [kRows, kDirectKeys] = q K^T, four keys at a time. Asks for the first `ask` of the block's values.
template <int kRows, CacheType kType>
static inline void direct_scores(const float* q, int64_t padded, const void* k, int64_t k_stride, const void* v,
                                 int64_t v_stride, int64_t ask, int64_t count, int64_t width, float* scores) {
  using S = Simd;
  for (int64_t j = 0; j < count; j += 4) {
    for (int i = 0; i < 4 && j < ask; ++i) prefetch_row<kType>(v, v_stride, j + i, width);
    int64_t at[4];
    for (int i = 0; i < 4; ++i) at[i] = min_of(j + i, count - 1) * k_stride;  // the last one again: hidden later
    S::F sum[kRows][4];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[r][i] = S::zero();
    int64_t c = 0;
    for (; c + 2 * S::kLanes <= width; c += 2 * S::kLanes) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        S::F key[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) key[i] = load_half<kType>(k, at[i] + c, half);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const S::F x = S::load(q + r * padded + c + half * S::kLanes);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sum[r][i] = S::fma(x, key[i], sum[r][i]);
        }
      }
    }
    for (; c < width; c += S::kLanes) {  // unrolled, or the sums would be kept in memory
      S::F key[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) key[i] = load_cache_part<kType>(k, at[i] + c, width - c);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const S::F x = S::load(q + r * padded + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[r][i] = S::fma(x, key[i], sum[r][i]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      S::reduce_sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kDirectKeys + j);
  }
}

struct FloatProducts {
  static Simd::F step(Simd::F x, Simd::F v, Simd::F sum) { return Simd::fma(x, v, sum); }
};

// out [kRows, 2 vectors] = (fade out) + a b: element (r, j) of a at r * kRow + j * kColumn. fade null: out = a b.
// Registers: 2 kRows sums, 2 vectors of b; a is broadcast from memory.
template <int kRows, int kRow, int kColumn, int kVecs, class Products = FloatProducts>
static inline void tile_product(const float* a, const float* b, int64_t b_stride, int64_t count, const float* fade,
                                float* out, int64_t out_stride) {
  using S = Simd;
  S::F sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < kVecs; ++i)
      sum[r][i] = fade ? S::mul(S::load(out + r * out_stride + i * S::kLanes), S::set1(fade[r])) : S::zero();
  for (int64_t j = 0; j < count; ++j) {
    S::F v[kVecs];
#pragma GCC unroll 2
    for (int i = 0; i < kVecs; ++i) v[i] = S::load(b + i * S::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const S::F x = S::set1(a[r * kRow]);
#pragma GCC unroll 2
      for (int i = 0; i < kVecs; ++i) sum[r][i] = Products::step(x, v[i], sum[r][i]);
    }
    a += kColumn;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < kVecs; ++i) S::store(out + r * out_stride + i * S::kLanes, sum[r][i]);
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// added [block.room] = the mask of one row: 0 or -inf, or what a float mask adds.
static inline void load_mask(const Attention& a, int64_t at, const KeyBlock& block, float* added) {
  using S = Simd;
  const int64_t count = block.count;
  for (int64_t j = 0; j < block.room; j += S::kLanes) {
    if (!a.mask_is_bool) {
      S::store(added + j, count > j ? load_part(a.mask, at + j, count - j, a.mask_type) : S::zero());
      continue;
    }
    uint8_t bytes[S::kLanes] = {};
    if (count > j) memcpy(bytes, static_cast<const uint8_t*>(a.mask) + at + j, size_t(min_of(S::kLanes, count - j)));
    S::store(added + j,
             S::select_less(S::to_float(S::load_u8_as_i32(bytes)), S::set1(0.5f), S::set1(kNever), S::zero()));
  }
}

alignas(64) const float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// One row of scores [block.room] after the keys' scales, softcap and mask; -inf outside of [seen.begin, seen.end).
static inline void adjust_scores(const Attention& a, const AttentionScratch& m, const KeyBlock& block, int64_t mask_at,
                                 Range seen, float* scores) {
  using S = Simd;
  alignas(64) float added[kDirectKeys];
  if (a.mask) load_mask(a, mask_at, block, added);
  const S::F begin = S::set1(float(seen.begin)), end = S::set1(float(seen.end)), never = S::set1(kNever);
  const S::F cap = S::set1(a.softcap), inverse_cap = S::set1(a.softcap > 0.0f ? 1.0f / a.softcap : 0.0f);
  for (int64_t j = 0; j < block.room; j += S::kLanes) {
    S::F x = S::load(scores + j);
    if (block.scaled) x = S::mul(x, S::load(m.k_scale + j));
    if (a.softcap > 0.0f) x = S::mul(cap, tanh_of(S::mul(x, inverse_cap)));
    if (a.mask) {
      const S::F plus = S::load(added + j);
      x = S::select_less(plus, S::set1(-0x1.fffffep127f), never, x + plus);
    }
    const S::F index = S::load(kIota) + S::set1(float(j));
    S::store(scores + j, S::select_less(index, begin, never, S::select_less(index, end, x, never)));
  }
}

// One row of scores [block.room], of which [seen.begin, seen.end) count, becomes probabilities relative to the row's new
// maximum, times the values' scales. Returns what the sums so far shrink by.
static inline float soften(const Attention& a, const AttentionScratch& m, const KeyBlock& block, int64_t mask_at,
                           Range seen, float* scores, float& most, float& total) {
  using S = Simd;
  constexpr int kVecs = int(kBlockKeys) / S::kLanes;
  const bool adjust = seen.begin > 0 || seen.end < block.room || a.mask || a.softcap > 0.0f;
  if (adjust) adjust_scores(a, m, block, mask_at, seen, scores);
  S::F top = S::set1(kNever);
  const auto for_all = [&](const auto& change) {
    for (int64_t j = 0; j < block.room; j += kBlockKeys)
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) change(j + i * S::kLanes);
  };
  for_all([&](int64_t j) {
    S::F x = S::load(scores + j);
    if (block.scaled && !adjust) S::store(scores + j, x = S::mul(x, S::load(m.k_scale + j)));
    top = S::max(top, x);
  });
  const float new_top = S::reduce_max(top), new_most = new_top > most ? new_top : most;
  const S::F from = S::set1(new_most == kNever ? 0.0f : new_most);
  S::F sum = S::zero();
  for_all([&](int64_t j) {
    const S::F x = S::load(scores + j);
    S::F p = S::keep_above(x, kNever, exp_negative(x - from));  // exactly 0 where hidden
    sum = sum + p;
    if (block.scaled) p = S::mul(p, S::load(m.v_scale + j));
    S::store(scores + j, p);
  });
  const float fade = new_most == most ? 1.0f : exp_negative(S::set1(most - new_most))[0];
  most = new_most;
  total = total * fade + S::reduce_sum(sum);
  return fade;
}

// ---- values ---------------------------------------------------------------------------------------------------------

// sums [kRows, kVecs vectors] = fade sums + p V. Asks for these columns of the first `ask` rows from `next` on.
template <int kRows, int kVecs, CacheType kType>
static inline void direct_values(const float* p, const void* v, int64_t v_stride, int64_t at, int64_t width,
                                 int64_t begin, int64_t end, const float* fade, float* sums, int64_t padded,
                                 const void* next, int64_t next_stride, int64_t ask) {
  using S = Simd;
  S::F sum[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) sum[r][i] = S::mul(S::load(sums + r * padded + i * S::kLanes), S::set1(fade[r]));
  for (int64_t j = begin; j < end; ++j) {
    if (j < ask) prefetch_row<kType>(next, next_stride, j, kVecs * S::kLanes);
    S::F x[kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i)
      x[i] = kVecs == 1 ? load_cache_part<kType>(v, j * v_stride + at, width - at)
                        : load_half<kType>(v, j * v_stride + at + i / 2 * 2 * S::kLanes, i % 2);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const S::F w = S::set1(p[r * kDirectKeys + j]);
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) sum[r][i] = S::fma(w, x[i], sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) S::store(sums + r * padded + i * S::kLanes, sum[r][i]);
}

}  // namespace
}  // namespace cpullm
