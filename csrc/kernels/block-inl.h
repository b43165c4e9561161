// The row-wise kernels of block.h, written once over Simd. Meanings: ref_block.cpp.
#pragma once

namespace cpullm {
namespace {

static inline float* head_of(const Heads& x, int64_t item) {
  const int64_t r = item / x.heads, i = item % x.heads;
  return x.x + r * x.stride + i / x.per_group * x.group_stride + i % x.per_group * x.head_stride;
}

// One vector of `width` elements; out may be x. Three passes at most: sum, sum of squares, result.
static inline void normalize(const Norm& n, const void* x, int64_t at, Float type, int64_t width, float* out) {
  using S = Simd;
  S::F mean = S::zero();
  if (n.layer) {
    S::F total = S::zero();
    for (int64_t j = 0; j < width; j += S::kLanes) total = total + load_part(x, at + j, width - j, type);
    mean = S::set1(S::reduce_sum(total) / float(width));
  }
  S::F even = S::zero(), odd = S::zero();
  for (int64_t j = 0; j < width; j += 2 * S::kLanes) {
    S::F v = load_part(x, at + j, width - j, type) - mean;
    store_part(out, j, width - j, v);
    if (width - j < S::kLanes) v = load_part(out, j, width - j);  // the lanes beyond are not -mean but 0
    even = S::fma(v, v, even);
    const int64_t k = j + S::kLanes;
    if (k >= width) break;
    v = load_part(x, at + k, width - k, type) - mean;
    store_part(out, k, width - k, v);
    if (width - k < S::kLanes) v = load_part(out, k, width - k);
    odd = S::fma(v, v, odd);
  }
  const S::F factor = S::set1(1.0f / __builtin_sqrtf(S::reduce_sum(even + odd) / float(width) + n.eps));
  for (int64_t j = 0; j < width; j += S::kLanes) {
    S::F y = S::mul(load_part(out, j, width - j), factor);
    if (n.gain) y = S::mul(y, load_part(n.gain, j, width - j));
    if (n.bias) y = y + load_part(n.bias, j, width - j);
    store_part(out, j, width - j, y);
  }
}

void norm(const Norm& n, const Rows& in, float* out, int64_t out_stride, Range rows) {
  for (int64_t r = rows.begin; r < rows.end; ++r)
    normalize(n, in.x, r * in.stride, in.type, in.k, out + r * out_stride);
}

void norm_heads(const Norm& n, const Heads& x, Range items) {
  for (int64_t item = items.begin; item < items.end; ++item) {
    float* head = head_of(x, item);
    normalize(n, head, 0, Float::f32, x.width, head);
  }
}

// The elements of one head; cos and sin begin at element `at`.
static inline void rotate_halves(const Rope& r, int64_t at, float* head) {
  using S = Simd;
  const int64_t half = r.width / 2;
  for (int64_t j = 0; j < half; j += S::kLanes) {
    const int64_t n = half - j;
    const S::F a = load_part(head, j, n), b = load_part(head, half + j, n);
    const S::F cos0 = load_part(r.cos, at + j, n, r.type), cos1 = load_part(r.cos, at + half + j, n, r.type);
    const S::F sin0 = load_part(r.sin, at + j, n, r.type), sin1 = load_part(r.sin, at + half + j, n, r.type);
    store_part(head, j, n, S::fms(a, cos0, S::mul(b, sin0)));
    store_part(head, half + j, n, S::fma(b, cos1, S::mul(a, sin1)));
  }
}

static inline void rotate_pairs(const Rope& r, int64_t at, float* head) {
  using S = Simd;
  alignas(64) float sign[S::kLanes], twice[2][S::kLanes];
  for (int i = 0; i < S::kLanes; ++i) sign[i] = i % 2 ? 1.0f : -1.0f;
  const bool once = r.style == RopeStyle::interleaved_once;
  for (int64_t j = 0; j < r.width; j += S::kLanes) {
    const int64_t n = r.width - j;
    S::F cos, sin;
    if (once) {
      for (int64_t i = 0; i < S::kLanes; ++i) {
        const bool inside = i < n;
        twice[0][i] = inside ? load_float(r.cos, at + (j + i) / 2, r.type) : 0.0f;
        twice[1][i] = inside ? load_float(r.sin, at + (j + i) / 2, r.type) : 0.0f;
      }
      cos = S::load(twice[0]);
      sin = S::load(twice[1]);
    } else {
      cos = load_part(r.cos, at + j, n, r.type);
      sin = load_part(r.sin, at + j, n, r.type);
    }
    const S::F x = load_part(head, j, n);
    store_part(head, j, n, S::fma(x, cos, S::mul(S::swap_pairs(x), S::mul(sin, S::load(sign)))));
  }
}

void rope(const Rope& r, const Heads& x, Range items) {
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t row = item / x.heads, at = row / r.tokens * r.stride[0] + row % r.tokens * r.stride[1];
    if (r.style == RopeStyle::half) {
      rotate_halves(r, at, head_of(x, item));
    } else {
      rotate_pairs(r, at, head_of(x, item));
    }
  }
}

// q [width] and the scale of one vector.
static inline float quantize_head(const float* x, int64_t width, int8_t* q) {
  using S = Simd;
  S::F most = S::zero();
  S::I top_bits = S::izero();
  for (int64_t j = 0; j < width; j += S::kLanes) {
    const S::F v = load_part(x, j, width - j);
    most = S::max(most, S::abs(v));
    top_bits = S::max_u32(top_bits, S::magnitude(v));
  }
  const bool finite = !S::any_not_finite(top_bits);
  const float top = S::reduce_max(most);
  if (!finite || top < 0x1p-100f) {
    memset(q, 0, size_t(width));
    return finite ? 0.0f : bits_to_float(0x7fc00000u);
  }
  const S::F inverse = S::set1(127.0f / top);
  for (int64_t j = 0; j < width; j += S::kLanes) {
    alignas(64) int8_t codes[S::kLanes];
    S::store_i8(codes, S::round(S::mul(load_part(x, j, width - j), inverse)));
    memcpy(q + j, codes, size_t(min_of(S::kLanes, width - j)));
  }
  return top * (1.0f / 127.0f);
}

void append(const Append& a, Range items) {
  for (int64_t item = items.begin; item < items.end; ++item) {
    const float* head = head_of(a.from, item);
    const int64_t row = item / a.from.heads, g = item % a.from.heads;
    const int64_t b = row / a.tokens, token = a.position + row % a.tokens;
    const int64_t to = b * a.stride[0] + g * a.stride[1] + token * a.stride[2];
    if (a.type == CacheType::i8) {
      a.scale[b * a.scale_stride[0] + g * a.scale_stride[1] + token] =
          quantize_head(head, a.from.width, static_cast<int8_t*>(a.cache) + to);
    } else {
      for (int64_t j = 0; j < a.from.width; j += Simd::kLanes)
        store_part(a.cache, to + j, a.from.width - j, Float(a.type), load_part(head, j, a.from.width - j));
    }
  }
}

template <Act kAct>
static inline void activate_row(const float* gate, const float* up, float* out, int64_t width) {
  using S = Simd;
  for (int64_t j = 0; j < width; j += S::kLanes) {
    const S::F x = load_part(gate, j, width - j);
    S::F y = kAct == Act::silu        ? silu_of(x)
             : kAct == Act::gelu      ? gelu_of(x)
             : kAct == Act::gelu_tanh ? gelu_tanh_of(x)
                                      : S::max(S::zero(), x);
    if (up) y = S::mul(y, load_part(up, j, width - j));
    store_part(out, j, width - j, y);
  }
}

void activation(const Activation& a, Range rows) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const float *gate = a.gate + r * a.gate_stride, *up = a.up ? a.up + r * a.up_stride : nullptr;
    float* out = a.out + r * a.out_stride;
    switch (a.act) {
      case Act::silu: activate_row<Act::silu>(gate, up, out, a.width); break;
      case Act::gelu: activate_row<Act::gelu>(gate, up, out, a.width); break;
      case Act::gelu_tanh: activate_row<Act::gelu_tanh>(gate, up, out, a.width); break;
      case Act::relu: activate_row<Act::relu>(gate, up, out, a.width); break;
    }
  }
}

void sum(const Sum& s, Range rows) {
  using S = Simd;
  const S::F scale = S::set1(s.scale);
  for (int64_t r = rows.begin; r < rows.end; ++r)
    for (int64_t j = 0; j < s.width; j += S::kLanes) {
      const int64_t n = s.width - j;
      S::F y = load_part(s.x, r * s.x_stride + j, n, s.x_type);
      if (s.a) {
        S::F a = load_part(s.a, r * s.a_stride + j, n);
        if (s.b) a = a + load_part(s.b, r * s.b_stride + j, n);
        y = S::fma(a, scale, y);
      }
      store_part(s.y, r * s.y_stride + j, n, s.y_type, y);
    }
}

}  // namespace
}  // namespace cpullm
