// The operators of a decoder layer apart from products and attention: norms, rope, activation, cache.
#include "kernels/block.h"
#include "ops.h"

namespace cpullm {

Act act_of(const char* op, const std::string& name) {
  if (name == "silu") return Act::silu;
  if (name == "gelu") return Act::gelu;
  if (name == "gelu_tanh") return Act::gelu_tanh;
  STD_TORCH_CHECK(name == "relu", op, ": act must be 'silu', 'gelu', 'gelu_tanh' or 'relu', got '", name, "'");
  return Act::relu;
}

namespace {

// [n] float32, or null.
const float* check_vector(const char* op, const OptionalTensor& t, const char* name, int64_t n) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(
      t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 1 && t->size(0) == n && t->is_contiguous(),
      op, ": ", name, " must be a contiguous float32 CPU tensor of shape [", n, "], got ", shape_of(*t));
  return static_cast<const float*>(t->const_data_ptr());
}

void check_float(const char* op, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.defined() && t.is_cpu() && t.dim() >= 1 && t.scalar_type() == ScalarType::Float, op, ": ", name,
                  " must be a float32 CPU tensor of at least one dimension");
}

Tensor empty_like_shape(const Tensor& x) {
  int64_t sizes[64];
  STD_TORCH_CHECK(x.dim() <= 64, "torch_cpullm: at most 64 dimensions are supported, got ", x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  return empty_cpu(sizes, x.dim(), ScalarType::Float);
}

Tensor normalized(const char* op, const Tensor& x, const OptionalTensor& gain, const OptionalTensor& bias, double eps,
                  bool layer) {
  STD_TORCH_CHECK(x.defined() && x.is_cpu() && x.dim() >= 1, op, ": x must be a CPU tensor of at least one dimension");
  Rows in{};
  in.type = float_type(x, op, "x");
  in.k = in.stride = x.size(x.dim() - 1);
  STD_TORCH_CHECK(in.k > 0, op, ": the last dimension of x must not be empty, got ", shape_of(x));
  in.m = x.numel() / in.k;
  const Norm n{check_vector(op, gain, "gain", in.k), check_vector(op, bias, "bias", in.k), float(eps), layer};
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  in.x = rows.const_data_ptr();
  Tensor out = empty_like_shape(x);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  parallel(in.m, 4 * in.k, [&](int64_t begin, int64_t end) { kernels().norm(n, in, to, in.k, {begin, end}); });
  return out;
}

Tensor rms_norm(const Tensor& x, const OptionalTensor& gain, double eps) {
  return normalized("cpullm::rms_norm", x, gain, OptionalTensor(), eps, false);
}

Tensor layer_norm(const Tensor& x, const OptionalTensor& gain, const OptionalTensor& bias, double eps) {
  return normalized("cpullm::layer_norm", x, gain, bias, eps, true);
}

// x [b, s, h, d], changed in place; cos and sin [1 | b, s, width].
void rope(Tensor x, const Tensor& cos, const Tensor& sin, std::string style) {
  constexpr const char* op = "cpullm::rope";
  check_float(op, x, "x");
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), op, ": x must be contiguous of shape [b, s, h, d], got ",
                  shape_of(x));
  Rope r{};
  if (style == "half") {
    r.style = RopeStyle::half;
  } else if (style == "interleaved") {
    r.style = RopeStyle::interleaved;
  } else {
    STD_TORCH_CHECK(style == "interleaved_once", op,
                    ": style must be 'half', 'interleaved' or 'interleaved_once', got '", style, "'");
    r.style = RopeStyle::interleaved_once;
  }
  STD_TORCH_CHECK(cos.defined() && sin.defined() && cos.is_cpu() && sin.is_cpu() && cos.dim() == 3 &&
                      (cos.size(0) == 1 || cos.size(0) == x.size(0)) && cos.size(1) == x.size(1) &&
                      shape_of(cos) == shape_of(sin) && cos.is_contiguous() && sin.is_contiguous() &&
                      cos.scalar_type() == sin.scalar_type(),
                  op, ": cos and sin must be contiguous CPU tensors of one dtype and shape [", x.size(0), " | 1, ",
                  x.size(1), ", width], got ", shape_of(cos), " and ", shape_of(sin));
  r.type = float_type(cos, op, "cos");
  r.width = cos.size(2) * (r.style == RopeStyle::interleaved_once ? 2 : 1);
  STD_TORCH_CHECK(r.width % 2 == 0 && r.width <= x.size(3), op, ": the rotated width must be even and at most ",
                  x.size(3), ", got ", r.width);
  r.tokens = x.size(1);
  r.stride[0] = cos.size(0) == 1 ? 0 : cos.size(1) * cos.size(2);
  r.stride[1] = cos.size(2);
  r.cos = cos.const_data_ptr();
  r.sin = sin.const_data_ptr();
  const int64_t heads = x.size(2), width = x.size(3);
  const Heads of{static_cast<float*>(x.mutable_data_ptr()), heads * width, heads, heads, 0, width, width};
  parallel(x.size(0) * x.size(1) * heads, 4 * width,
           [&](int64_t begin, int64_t end) { kernels().rope(r, of, {begin, end}); });
}

// act(gate) * up.
Tensor activation(const Tensor& gate, const OptionalTensor& up, std::string act) {
  constexpr const char* op = "cpullm::activation";
  check_float(op, gate, "gate");
  Activation a{};
  a.act = act_of(op, act);
  const Tensor rows = gate.is_contiguous() ? gate : torch::stable::contiguous(gate);
  OptionalTensor up_rows;
  if (up) {
    check_float(op, *up, "up");
    STD_TORCH_CHECK(shape_of(*up) == shape_of(gate), op, ": up must have gate's shape ", shape_of(gate), ", got ",
                    shape_of(*up));
    up_rows = up->is_contiguous() ? *up : torch::stable::contiguous(*up);
    a.up = static_cast<const float*>(up_rows->const_data_ptr());
  }
  Tensor out = empty_like_shape(gate);
  a.gate = static_cast<const float*>(rows.const_data_ptr());
  a.out = static_cast<float*>(out.mutable_data_ptr());
  a.width = a.gate_stride = a.up_stride = a.out_stride = gate.size(gate.dim() - 1);
  if (out.numel() == 0) return out;
  parallel(out.numel() / a.width, 16 * a.width,
           [&](int64_t begin, int64_t end) { kernels().activation(a, {begin, end}); });
  return out;
}

// cache[:, :, position : position + s] = x, rounded, or quantised where the cache is int8.
void cache_append(const Tensor& x, Tensor cache, std::optional<Tensor> scale, int64_t position) {
  constexpr const char* op = "cpullm::cache_append";
  check_float(op, x, "x");
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), op, ": x must be contiguous of shape [b, s, g, d], got ",
                  shape_of(x));
  const int64_t b = x.size(0), s = x.size(1), g = x.size(2), d = x.size(3);
  STD_TORCH_CHECK(cache.defined() && cache.is_cpu() && cache.dim() == 4 && cache.size(0) == b && cache.size(1) == g &&
                      cache.size(3) == d && (cache.stride(3) == 1 || d == 1),
                  op, ": cache must be a CPU tensor of shape [", b, ", ", g, ", capacity, ", d,
                  "] with unit stride in the last dimension, got ", shape_of(cache));
  STD_TORCH_CHECK(position >= 0 && s <= cache.size(2) && position <= cache.size(2) - s, op, ": tokens [", position,
                  ", ", position, " + ", s, ") do not fit a cache of capacity ", cache.size(2));
  Append a{};
  a.type = CacheType::i8;
  if (cache.scalar_type() == ScalarType::Char) {
    STD_TORCH_CHECK(scale && scale->is_cpu() && scale->scalar_type() == ScalarType::Float && scale->dim() == 3 &&
                        scale->size(0) == b && scale->size(1) == g && scale->size(2) == cache.size(2) &&
                        (scale->stride(2) == 1 || scale->size(2) == 1),
                    op, ": an int8 cache needs scale, float32 of shape [", b, ", ", g, ", ", cache.size(2), "]");
    a.scale = static_cast<float*>(scale->mutable_data_ptr());
    for (int i = 0; i < 2; ++i) a.scale_stride[i] = scale->stride(i);
  } else {
    a.type = CacheType(float_type(cache, op, "cache"));
    STD_TORCH_CHECK(!scale, op, ": scale is for an int8 cache");
  }
  a.from = {const_cast<float*>(static_cast<const float*>(x.const_data_ptr())), g * d, g, g, 0, d, d};
  a.cache = cache.mutable_data_ptr();
  a.tokens = s;
  a.position = position;
  for (int i = 0; i < 3; ++i) a.stride[i] = cache.stride(i);
  parallel(b * s * g, 2 * d, [&](int64_t begin, int64_t end) { kernels().append(a, {begin, end}); });
}

}  // namespace
}  // namespace cpullm

STABLE_TORCH_LIBRARY_FRAGMENT(cpullm, m) {
  m.def("rms_norm(Tensor x, Tensor? gain, float eps) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor? gain, Tensor? bias, float eps) -> Tensor");
  m.def("rope(Tensor(a!) x, Tensor cos, Tensor sin, str style) -> ()");
  m.def("activation(Tensor gate, Tensor? up, str act) -> Tensor");
  m.def("cache_append(Tensor x, Tensor(a!) cache, Tensor(b!)? scale, SymInt position) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&cpullm::rms_norm));
  m.impl("layer_norm", TORCH_BOX(&cpullm::layer_norm));
  m.impl("rope", TORCH_BOX(&cpullm::rope));
  m.impl("activation", TORCH_BOX(&cpullm::activation));
  m.impl("cache_append", TORCH_BOX(&cpullm::cache_append));
}
