// The contract of a decoder layer's kernels apart from its products: norm, rope, cache, attention, activation, sums.
// Arithmetic is fp32. Kernels work on a range of items, which the caller splits as it likes: no result depends on it.
// Letters: b batch, s queries, h query heads, g kv heads, t keys, d head dim. Strides are in elements.
#pragma once

#include "kernels.h"

namespace cpullm {

// y = x * rsqrt(mean(x^2) + eps) * gain, or layer: y = (x - mean) * rsqrt(variance + eps) * gain + bias.
struct Norm {
  const float* gain;  // null (1) or [width]
  const float* bias;  // null or [width]
  float eps;
  bool layer;
};

// Head vectors inside fp32 rows: head i of row r begins at
// x + r * stride + (i / per_group) * group_stride + (i % per_group) * head_stride. Items are r * heads + i.
struct Heads {
  float* x;
  int64_t stride, heads, per_group, group_stride, head_stride, width;
};

enum class RopeStyle : int {
  half,            // pairs (j, j + width / 2); cos[j], sin[j] of the element's own index
  interleaved,     // pairs (2j, 2j + 1); cos and sin of the element's own index (each value twice in a row)
  interleaved_once  // pairs (2j, 2j + 1); cos[j], sin[j]
};

// Rotates the first `width` elements of a head: y = x * cos + x' * sin, x' the pair (-second, first).
struct Rope {
  const void *cos, *sin;    // rows of at least width (interleaved_once: width / 2) elements
  Float type;
  RopeStyle style;
  int64_t width;            // even, at most the heads' width
  int64_t tokens;           // s: row r is token r % s of sequence r / s
  int64_t stride[2];        // of cos and sin: sequence (0 if shared), token
};

enum class CacheType : int { f32, bf16, f16, i8 };

// Keys or values of new tokens into a cache [b, g, capacity, d]. int8: value = q * scale, scale = absmax / 127 per
// token and head, q rounded to nearest even; a vector with inf or nan gets scale nan.
struct Append {
  Heads from;               // rows are b * s + token, heads are kv heads
  void* cache;
  float* scale;             // int8 only: [b, g, capacity], the last unit-strided
  CacheType type;
  int64_t tokens, position;  // token i of a sequence goes to position + i
  int64_t stride[3];        // of cache: b, g, token
  int64_t scale_stride[2];  // b, g
};

enum class Act : int { silu, gelu, gelu_tanh, relu };

// out[r, j] = act(gate[r, j]) * up[r, j]; up null: act(gate). out may be gate or up.
struct Activation {
  const float *gate, *up;
  float* out;
  int64_t width, gate_stride, up_stride, out_stride;
  Act act;
};

// y = x + (a + b) * scale, by row; a and b fp32. b null: x + a * scale, both null: x. y may be the memory of x, a or b
// where the types are the same.
struct Sum {
  const void* x;
  const float *a, *b;
  void* y;
  float scale;
  Float x_type, y_type;
  int64_t width, x_stride, a_stride, b_stride, y_stride;
};

// out = softmax(mask(cap(q K^T scale))) V, cap(x) = softcap tanh(x / softcap). Query i stands at position t - s + i.
// Query head j of kv head c is head c * (h / g) + j. A row without any key gives zeros. int8 caches: the key's scale
// multiplies the dot product, the value's scale the probability.
struct Attention {
  const float* q;           // [b, s, g, h / g, d]
  const void *k, *v;        // [b, g, t, d]
  const float *k_scale, *v_scale;  // int8 only: [b, g, t], the last unit-strided
  const void* mask;  // null: keys j <= position, and j > position - window if window > 0; else it alone decides:
  // [b, h, s, t] bool (true: attend) or float (added), the last unit-strided
  const float* sinks;  // null or [h]: a logit that takes part in the denominator only
  float* out;  // [b, s, h, d]
  float* partial;  // AttentionPlan::partial floats where splits > 1; combine_attention reads it
  int64_t batch, queries, heads, kv_heads, length, width;
  int64_t q_stride[4];  // b, s, g, head within the group
  int64_t k_stride[3], v_stride[3];  // b, g, t
  int64_t k_scale_stride[2], v_scale_stride[2];  // b, g
  int64_t mask_stride[3];  // b, h, s; 0 where broadcast
  int64_t out_stride[3];  // b, s, h
  float scale, softcap;  // softcap 0: none
  int64_t window;  // 0: none
  CacheType type;
  Float mask_type;
  bool mask_is_bool;
  // Not exact: where a level has bf16 products and a kv head more than two rows, queries and probabilities may be rounded
  // to bf16 over caches whose values bf16 holds; of 3 to 8 rows over int8 caches to 16-bit integers.
  bool exact;
  bool tiled;  // rows go in tiles however few they are: their bits are those they have in a prompt of many
};

// How attention is cut into items; a function of the shapes and the window alone. The rows of a kv head are its queries
// times its query heads, query by query: row i * (h / g) + j.
struct AttentionPlan {
  int64_t rows;  // of one kv head
  int64_t block_rows;  // rows of one item
  int64_t blocks;  // ceil(rows / block_rows)
  int64_t first_key;  // that any row sees, rounded down to kBlockKeys; 0 where a mask decides
  int64_t
      splits;  // runs of split_keys keys from first_key on; 1: the kernel writes out itself, else combine_attention does
  int64_t split_keys;  // a multiple of kBlockKeys
  int64_t items;  // of attention: ((b * kv_heads + g) * blocks + block) * splits + split
  int64_t combine_items;  // of combine_attention: (b * kv_heads + g) * rows + row; 0 where splits is 1
  int64_t partial;  // floats of Attention::partial
  int64_t partial_stride;  // floats per row and split: acc [d], padded to 16, then max and sum, padded to 16
  int64_t scratch;  // floats per thread, 64-byte aligned
};

constexpr int64_t kSplitKeys = 256;  // most keys of one split where few rows read a long cache
constexpr int64_t kLeastSplitKeys = 128;
constexpr int64_t kSplitItems = 12;  // of a sequence, if splits are not to be smaller than that: for few kv heads
constexpr int64_t kBlockKeys = 64;  // keys whose scores are held at a time
constexpr int64_t kDirectKeys = 256;  // the same of few rows, which read keys and values as they are: longer streams
constexpr int64_t kFewRows = 96;  // up to here the length is split and blocks are small
constexpr int64_t kFewBlockRows = 24;  // rows of a block then
constexpr int64_t kManyBlockRows = 96;

// Rows that a block has room for: whole tiles of every level, none of which has more than 12 rows.
static inline int64_t padded_rows(const AttentionPlan& p) { return (p.block_rows + 11) / 12 * 12; }

static inline int64_t whole_blocks(int64_t keys) { return (keys + kBlockKeys - 1) / kBlockKeys * kBlockKeys; }

static inline AttentionPlan plan_attention(int64_t batch, int64_t queries, int64_t heads, int64_t kv_heads,
                                           int64_t length, int64_t width, int64_t window, bool tiled) {
  AttentionPlan p{};
  if (window > 0 && length - queries + 1 > window)
    p.first_key = (length - queries + 1 - window) / kBlockKeys * kBlockKeys;
  length -= p.first_key;
  const int64_t padded = (width + 15) / 16 * 16;
  p.rows = heads / kv_heads * queries;
  const bool few = p.rows <= kFewRows;
  p.block_rows = few ? (p.rows < kFewBlockRows ? p.rows : kFewBlockRows) : kManyBlockRows;
  p.blocks = (p.rows + p.block_rows - 1) / p.block_rows;
  int64_t splits = (kSplitItems + kv_heads - 1) / kv_heads;
  if (splits > length / kLeastSplitKeys) splits = length / kLeastSplitKeys;
  if (splits * kSplitKeys < length) splits = (length + kSplitKeys - 1) / kSplitKeys;
  if (!few || tiled || splits < 1) splits = 1;
  p.split_keys = whole_blocks((length + splits - 1) / splits);
  p.splits = splits > 1 ? (length + p.split_keys - 1) / p.split_keys : 1;
  p.items = batch * kv_heads * p.blocks * p.splits;
  p.combine_items = p.splits > 1 ? batch * kv_heads * p.rows : 0;
  p.partial_stride = padded + 16;
  p.partial = p.combine_items * p.splits * p.partial_stride;
  const int64_t rows = padded_rows(p);
  // queries and sums of the block; keys and values of kBlockKeys; 16 rows being converted; scores of a tile; rest
  p.scratch = padded * (2 * rows + 2 * kBlockKeys + 16) + 16 * kBlockKeys + 4 * rows + 2 * kDirectKeys + 64;
  return p;
}

static inline AttentionPlan plan_attention(const Attention& a) {
  return plan_attention(a.batch, a.queries, a.heads, a.kv_heads, a.length, a.width, a.mask ? 0 : a.window, a.tiled);
}

// What an item works on: rows [rows.begin, rows.end) of kv head g of sequence b, keys [keys.begin, keys.end). Blocks are
// taken from both ends in turn: causal ones cost more the later they are, and a run of items should not.
struct AttentionItem {
  int64_t b, g;
  Range rows, keys;
  int64_t split;
};

static inline AttentionItem attention_item(const Attention& a, const AttentionPlan& p, int64_t item) {
  AttentionItem at;
  at.split = item % p.splits;
  const int64_t turn = item / p.splits % p.blocks, block = turn % 2 ? p.blocks - 1 - turn / 2 : turn / 2;
  at.g = item / (p.splits * p.blocks) % a.kv_heads;
  at.b = item / (p.splits * p.blocks * a.kv_heads);
  const int64_t row_end = (block + 1) * p.block_rows;
  at.rows = {block * p.block_rows, row_end < p.rows ? row_end : p.rows};
  const int64_t key_begin = p.first_key + at.split * p.split_keys, key_end = key_begin + p.split_keys;
  at.keys = {key_begin, p.splits > 1 && key_end < a.length ? key_end : a.length};
  return at;
}

// Keys that query i may see where no mask decides.
static inline Range visible_keys(const Attention& a, int64_t i) {
  if (a.mask) return {0, a.length};
  const int64_t end = a.length - a.queries + i + 1, begin = a.window > 0 ? end - a.window : 0;
  return {begin > 0 ? begin : 0, end > 0 ? end : 0};
}

// Where attention leaves the split sums of a row for combine_attention.
static inline float* partial_of(const Attention& a, const AttentionPlan& p, int64_t b, int64_t g, int64_t row,
                                int64_t split) {
  return a.partial + (((b * a.kv_heads + g) * p.rows + row) * p.splits + split) * p.partial_stride;
}

// Adds the plain C++ forms of these kernels to the table of the lowest level.
void use_ref_block(Kernels& k);

}  // namespace cpullm
