// The meaning of the kernels of block.h in plain C++. Runs on any CPU; the other levels are checked against it.
#include "block.h"
#include "half.h"

namespace cpullm {
namespace {

float* head_of(const Heads& x, int64_t item) {
  const int64_t r = item / x.heads, i = item % x.heads;
  return x.x + r * x.stride + i / x.per_group * x.group_stride + i % x.per_group * x.head_stride;
}

template <class Get>
void normalize(const Norm& n, int64_t width, float* out, const Get& get) {
  double mean = 0.0, square = 0.0;
  if (n.layer) {
    for (int64_t j = 0; j < width; ++j) mean += get(j);
    mean /= double(width);
  }
  for (int64_t j = 0; j < width; ++j) square += (get(j) - mean) * (get(j) - mean);
  const double factor = 1.0 / __builtin_sqrt(square / double(width) + n.eps);
  for (int64_t j = 0; j < width; ++j)
    out[j] = float((get(j) - mean) * factor * (n.gain ? n.gain[j] : 1.0f) + (n.bias ? n.bias[j] : 0.0f));
}

void norm(const Norm& n, const Rows& in, float* out, int64_t out_stride, Range rows) {
  for (int64_t r = rows.begin; r < rows.end; ++r)
    normalize(n, in.k, out + r * out_stride, [&](int64_t j) { return load_float(in.x, r * in.stride + j, in.type); });
}

void norm_heads(const Norm& n, const Heads& x, Range items) {
  for (int64_t item = items.begin; item < items.end; ++item) {
    float* head = head_of(x, item);
    normalize(n, x.width, head, [&](int64_t j) { return head[j]; });
  }
}

void rope(const Rope& r, const Heads& x, Range items) {
  const int64_t half = r.width / 2;
  for (int64_t item = items.begin; item < items.end; ++item) {
    float* head = head_of(x, item);
    const int64_t row = item / x.heads, at = row / r.tokens * r.stride[0] + row % r.tokens * r.stride[1];
    for (int64_t j = 0; j < half; ++j) {
      const int64_t first = r.style == RopeStyle::half ? j : 2 * j,
                    second = r.style == RopeStyle::half ? j + half : 2 * j + 1;
      const bool once = r.style == RopeStyle::interleaved_once;
      const int64_t c0 = at + (once ? j : first), c1 = at + (once ? j : second);
      const float a = head[first], b = head[second];
      head[first] = a * load_float(r.cos, c0, r.type) - b * load_float(r.sin, c0, r.type);
      head[second] = b * load_float(r.cos, c1, r.type) + a * load_float(r.sin, c1, r.type);
    }
  }
}

void append(const Append& a, Range items) {
  const int64_t width = a.from.width;
  for (int64_t item = items.begin; item < items.end; ++item) {
    const float* head = head_of(a.from, item);
    const int64_t row = item / a.from.heads, g = item % a.from.heads;
    const int64_t b = row / a.tokens, token = a.position + row % a.tokens;
    const int64_t to = b * a.stride[0] + g * a.stride[1] + token * a.stride[2];
    if (a.type != CacheType::i8) {
      for (int64_t j = 0; j < width; ++j) store_float(a.cache, to + j, Float(a.type), head[j]);
      continue;
    }
    float most = 0.0f;
    bool finite = true;
    for (int64_t j = 0; j < width; ++j) {
      const float size = __builtin_fabsf(head[j]);
      finite = finite && size <= 0x1.fffffep127f;
      most = size > most ? size : most;
    }
    const bool usable = finite && most >= 0x1p-100f;  // else 127 / most could overflow
    const float inverse = usable ? 127.0f / most : 0.0f;
    a.scale[b * a.scale_stride[0] + g * a.scale_stride[1] + token] = !finite  ? bits_to_float(0x7fc00000u)
                                                                     : usable ? most * (1.0f / 127.0f)
                                                                              : 0.0f;
    int8_t* q = static_cast<int8_t*>(a.cache) + to;
    for (int64_t j = 0; j < width; ++j) q[j] = usable ? int8_t(__builtin_nearbyintf(head[j] * inverse)) : int8_t(0);
  }
}

float activate(Act act, float x) {
  constexpr float kSqrtHalf = 0.70710678f, kSqrtTwoOverPi = 0.79788456f;
  switch (act) {
    case Act::silu: return x / (1.0f + __builtin_expf(-x));
    case Act::gelu: return 0.5f * x * __builtin_erfcf(-x * kSqrtHalf);
    case Act::gelu_tanh: return 0.5f * x * (1.0f + __builtin_tanhf(kSqrtTwoOverPi * (x + 0.044715f * x * x * x)));
    case Act::relu: return x < 0.0f ? 0.0f : x;
  }
  return x;
}

void activation(const Activation& a, Range rows) {
  for (int64_t r = rows.begin; r < rows.end; ++r)
    for (int64_t j = 0; j < a.width; ++j)
      a.out[r * a.out_stride + j] =
          activate(a.act, a.gate[r * a.gate_stride + j]) * (a.up ? a.up[r * a.up_stride + j] : 1.0f);
}

void sum(const Sum& s, Range rows) {
  for (int64_t r = rows.begin; r < rows.end; ++r)
    for (int64_t j = 0; j < s.width; ++j) {
      float y = load_float(s.x, r * s.x_stride + j, s.x_type);
      if (s.a) {
        const float a = s.a[r * s.a_stride + j];
        y = __builtin_fmaf(s.b ? a + s.b[r * s.b_stride + j] : a, s.scale, y);
      }
      store_float(s.y, r * s.y_stride + j, s.y_type, y);
    }
}

float cache_value(const void* p, int64_t i, CacheType type) {
  return type == CacheType::i8 ? float(static_cast<const int8_t*>(p)[i]) : load_float(p, i, Float(type));
}

// The score of one query head and key, -inf where the key is hidden.
float score(const Attention& a, int64_t b, int64_t g, int64_t i, int64_t j, int64_t t) {
  const int64_t h = g * (a.heads / a.kv_heads) + j;
  const float* q = a.q + b * a.q_stride[0] + i * a.q_stride[1] + g * a.q_stride[2] + j * a.q_stride[3];
  const int64_t k = b * a.k_stride[0] + g * a.k_stride[1] + t * a.k_stride[2];
  float x = 0.0f;
  for (int64_t c = 0; c < a.width; ++c) x += a.scale * q[c] * cache_value(a.k, k + c, a.type);
  if (a.type == CacheType::i8) x *= a.k_scale[b * a.k_scale_stride[0] + g * a.k_scale_stride[1] + t];
  if (a.softcap > 0.0f) x = a.softcap * __builtin_tanhf(x / a.softcap);
  if (!a.mask) return x;
  const int64_t m = b * a.mask_stride[0] + h * a.mask_stride[1] + i * a.mask_stride[2] + t;
  const float added = a.mask_is_bool ? static_cast<const uint8_t*>(a.mask)[m] ? 0.0f : -__builtin_inff()
                                     : load_float(a.mask, m, a.mask_type);
  return added == -__builtin_inff() ? added : x + added;
}

// out = acc / (total, and the sink's share of the denominator); zeros where there was no key.
void finish_row(const Attention& a, int64_t b, int64_t g, int64_t row, const float* acc, float most, float total) {
  const int64_t per = a.heads / a.kv_heads, h = g * per + row % per;
  float factor = total == 0.0f ? 0.0f : 1.0f / total;
  if (a.sinks && total != 0.0f) {
    const float top = a.sinks[h] > most ? a.sinks[h] : most, share = __builtin_expf(most - top);
    factor = share / (total * share + __builtin_expf(a.sinks[h] - top));
  }
  float* out = a.out + b * a.out_stride[0] + row / per * a.out_stride[1] + h * a.out_stride[2];
  for (int64_t c = 0; c < a.width; ++c) out[c] = acc[c] * factor;
}

void attention(const Attention& a, Range items, float* acc) {
  const AttentionPlan plan = plan_attention(a);
  const int64_t per = a.heads / a.kv_heads;
  for (int64_t item = items.begin; item < items.end; ++item) {
    const AttentionItem at = attention_item(a, plan, item);
    for (int64_t row = at.rows.begin; row < at.rows.end; ++row) {
      const Range seen = visible_keys(a, row / per);
      const int64_t begin = seen.begin > at.keys.begin ? seen.begin : at.keys.begin;
      const int64_t end = seen.end < at.keys.end ? seen.end : at.keys.end;
      float most = -__builtin_inff(), total = 0.0f;
      for (int64_t c = 0; c < a.width; ++c) acc[c] = 0.0f;
      for (int64_t t = begin; t < end; ++t) {
        const float x = score(a, at.b, at.g, row / per, row % per, t);
        if (x == -__builtin_inff()) continue;
        if (x > most) {
          const float factor = __builtin_expf(most - x);
          total *= factor;
          for (int64_t c = 0; c < a.width; ++c) acc[c] *= factor;
          most = x;
        }
        float p = __builtin_expf(x - most);
        total += p;
        if (a.type == CacheType::i8) p *= a.v_scale[at.b * a.v_scale_stride[0] + at.g * a.v_scale_stride[1] + t];
        const int64_t v = at.b * a.v_stride[0] + at.g * a.v_stride[1] + t * a.v_stride[2];
        for (int64_t c = 0; c < a.width; ++c) acc[c] += p * cache_value(a.v, v + c, a.type);
      }
      if (plan.splits == 1) {
        finish_row(a, at.b, at.g, row, acc, most, total);
        continue;
      }
      float* to = partial_of(a, plan, at.b, at.g, row, at.split);
      memcpy(to, acc, size_t(a.width) * 4);
      to[plan.partial_stride - 16] = most;
      to[plan.partial_stride - 15] = total;
    }
  }
}

void combine_attention(const Attention& a, Range items) {
  const AttentionPlan plan = plan_attention(a);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t row = item % plan.rows, g = item / plan.rows % a.kv_heads, b = item / plan.rows / a.kv_heads;
    float* first = partial_of(a, plan, b, g, row, 0);  // the sums end up here
    float *most = first + plan.partial_stride - 16, *total = most + 1;
    for (int64_t split = 1; split < plan.splits; ++split) {
      const float* other = first + split * plan.partial_stride;
      const float other_most = other[plan.partial_stride - 16];
      if (other[plan.partial_stride - 15] == 0.0f) continue;  // no key there
      const float top = other_most > *most ? other_most : *most;
      const float mine = *total == 0.0f ? 0.0f : __builtin_expf(*most - top), its = __builtin_expf(other_most - top);
      for (int64_t c = 0; c < a.width; ++c) first[c] = first[c] * mine + other[c] * its;
      *total = *total * mine + other[plan.partial_stride - 15] * its;
      *most = top;
    }
    finish_row(a, b, g, row, first, *most, *total);
  }
}

}  // namespace

void use_ref_block(Kernels& k) {
  k.norm = norm;
  k.norm_heads = norm_heads;
  k.rope = rope;
  k.append = append;
  k.activation = activation;
  k.sum = sum;
  k.attention = attention;
  k.combine_attention = combine_attention;
}

}  // namespace cpullm
