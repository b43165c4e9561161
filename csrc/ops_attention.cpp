// The attention operator.
#include "kernels/block.h"
#include "ops.h"

namespace cpullm {
namespace {

constexpr const char* op = "cpullm::attention";

thread_local Buffer attention_scratch;                          // of the thread that runs a kernel
thread_local Buffer query_buffer, result_buffer, split_buffer;  // of the thread that calls the operator

void check_heads(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.defined() && t.is_cpu() && t.dim() == 4 && (t.stride(3) == 1 || t.size(3) == 1), op, ": ", name,
                  " must be a 4-D CPU tensor with unit stride in the last dimension");
}

// Scales of an int8 cache [b, g, capacity].
const float* check_scale(const OptionalTensor& scale, const Tensor& cache, const char* name, int64_t* stride) {
  STD_TORCH_CHECK(scale.has_value() && scale->defined(), op, ": an int8 cache needs ", name);
  STD_TORCH_CHECK(scale->is_cpu() && scale->scalar_type() == ScalarType::Float && scale->dim() == 3 &&
                      scale->size(0) == cache.size(0) && scale->size(1) == cache.size(1) &&
                      scale->size(2) == cache.size(2) && (scale->stride(2) == 1 || scale->size(2) == 1),
                  op, ": ", name, " must be a float32 CPU tensor of shape [", cache.size(0), ", ", cache.size(1), ", ",
                  cache.size(2), "] with unit stride in the last dimension, got ", shape_of(*scale));
  for (int i = 0; i < 2; ++i) stride[i] = scale->stride(i);
  return static_cast<const float*>(scale->const_data_ptr());
}

void check_cache(Attention& a, const Tensor& k, const Tensor& v, const OptionalTensor& k_scale,
                 const OptionalTensor& v_scale) {
  STD_TORCH_CHECK(v.scalar_type() == k.scalar_type(), op, ": k and v must have one dtype");
  STD_TORCH_CHECK(k.size(0) == a.batch && k.size(3) == a.width, op, ": k must have shape [", a.batch, ", g, t, ",
                  a.width, "], got ", shape_of(k));
  STD_TORCH_CHECK(shape_of(v) == shape_of(k), op, ": v must have k's shape ", shape_of(k), ", got ", shape_of(v));
  if (k.scalar_type() == ScalarType::Char) {
    a.type = CacheType::i8;
    a.k_scale = check_scale(k_scale, k, "k_scale", a.k_scale_stride);
    a.v_scale = check_scale(v_scale, v, "v_scale", a.v_scale_stride);
  } else {
    a.type = CacheType(float_type(k, op, "k"));
    STD_TORCH_CHECK(!k_scale && !v_scale, op, ": k_scale and v_scale are for an int8 cache");
  }
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  for (int i = 0; i < 3; ++i) {
    a.k_stride[i] = k.stride(i);
    a.v_stride[i] = v.stride(i);
  }
}

// `holder` keeps a contiguous copy alive where one was needed.
void check_mask(Attention& a, const Tensor& mask, OptionalTensor& holder) {
  STD_TORCH_CHECK(mask.is_cpu() && mask.dim() == 4 && (mask.size(0) == a.batch || mask.size(0) == 1) &&
                      (mask.size(1) == a.heads || mask.size(1) == 1) &&
                      (mask.size(2) == a.queries || mask.size(2) == 1) && mask.size(3) == a.length,
                  op, ": mask must have shape [", a.batch, " | 1, ", a.heads, " | 1, ", a.queries, " | 1, ", a.length,
                  "], got ", shape_of(mask));
  a.mask_is_bool = mask.scalar_type() == ScalarType::Bool;
  if (!a.mask_is_bool) a.mask_type = float_type(mask, op, "mask");
  holder = a.length == 1 || mask.stride(3) == 1 ? mask : torch::stable::contiguous(mask);
  a.mask = holder->const_data_ptr();
  for (int i = 0; i < 3; ++i) a.mask_stride[i] = holder->size(i) == 1 ? 0 : holder->stride(i);
}

// q as float32: as it is, or converted into [b, h, s, d].
void load_query(Attention& a, const Tensor& q) {
  const int64_t per = a.heads / a.kv_heads;
  int64_t batch_stride = q.stride(0), head_stride = q.stride(1), token_stride = q.stride(2);
  a.q = static_cast<const float*>(q.const_data_ptr());
  if (q.scalar_type() != ScalarType::Float) {
    Sum s{};
    s.x_type = float_type(q, op, "q");
    s.y_type = Float::f32;
    s.width = s.y_stride = a.width;
    s.x_stride = token_stride;
    float* to = query_buffer.get<float>(q.numel());
    for (int64_t i = 0; i < a.batch * a.heads; ++i) {
      s.x = static_cast<const uint16_t*>(q.const_data_ptr()) + i / a.heads * batch_stride + i % a.heads * head_stride;
      s.y = to + i * a.queries * a.width;
      kernels().sum(s, {0, a.queries});
    }
    a.q = to;
    token_stride = a.width;
    head_stride = a.queries * token_stride;
    batch_stride = a.heads * head_stride;
  }
  const int64_t strides[] = {batch_stride, token_stride, per * head_stride, head_stride};
  for (int i = 0; i < 4; ++i) a.q_stride[i] = strides[i];
}

// out[b, i, h] = softmax(mask(cap(q[b, h, i] K[b, g]^T scale))) V[b, g], g = h / (heads / kv heads).
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale,
                 double softcap, int64_t window, const OptionalTensor& sinks, const OptionalTensor& k_scale,
                 const OptionalTensor& v_scale, std::optional<int64_t> some, bool exact) {
  check_heads(q, "q");
  check_heads(k, "k");
  check_heads(v, "v");
  const Float type = float_type(q, op, "q");
  Attention a{};
  a.batch = q.size(0);
  a.heads = q.size(1);
  a.queries = q.size(2);
  a.width = q.size(3);
  a.kv_heads = k.size(1);
  const int64_t length = a.length = some ? *some : k.size(2);
  STD_TORCH_CHECK(a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.width > 0, op,
                  ": heads must be a multiple of kv heads and the head dim not empty, got q ", shape_of(q), ", k ",
                  shape_of(k));
  STD_TORCH_CHECK(length > 0 && length <= k.size(2), op, ": length must be in [1, ", k.size(2), "], got ", length);
  STD_TORCH_CHECK(mask || a.queries <= length, op, ": without a mask q may hold at most length = ", length,
                  " tokens, got ", shape_of(q));
  STD_TORCH_CHECK(softcap >= 0.0, op, ": softcap must not be negative, got ", softcap);
  STD_TORCH_CHECK(window >= 0, op, ": window must not be negative, got ", window);
  check_cache(a, k, v, k_scale, v_scale);
  OptionalTensor holder;
  if (mask) check_mask(a, *mask, holder);
  if (sinks) {
    STD_TORCH_CHECK(sinks->is_cpu() && sinks->scalar_type() == ScalarType::Float && sinks->dim() == 1 &&
                        sinks->size(0) == a.heads && sinks->is_contiguous(),
                    op, ": sinks must be a contiguous float32 CPU tensor of shape [", a.heads, "], got ",
                    shape_of(*sinks));
    a.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  a.scale = float(scale);
  a.softcap = float(softcap);
  a.window = window;
  a.exact = exact;
  const int64_t sizes[] = {a.batch, a.queries, a.heads, a.width};
  Tensor out = empty_cpu(sizes, 4, q.scalar_type());
  if (out.numel() == 0) return out;
  load_query(a, q);
  a.out = type == Float::f32 ? static_cast<float*>(out.mutable_data_ptr()) : result_buffer.get<float>(out.numel());
  a.out_stride[2] = a.width;
  a.out_stride[1] = a.heads * a.width;
  a.out_stride[0] = a.queries * a.out_stride[1];

  const Kernels& table = kernels();
  const AttentionPlan plan = plan_attention(a);
  a.partial = split_buffer.get<float>(plan.partial);
  const int64_t keys = plan.splits > 1 ? plan.split_keys : a.length - plan.first_key;
  parallel(plan.items, 2 * plan.block_rows * keys * a.width, [&](int64_t begin, int64_t end) {
    table.attention(a, {begin, end}, attention_scratch.get<float>(plan.scratch));
  });
  if (plan.combine_items)
    parallel(plan.combine_items, plan.splits * a.width,
             [&](int64_t begin, int64_t end) { table.combine_attention(a, {begin, end}); });
  if (type != Float::f32) {
    Sum s{};
    s.x = a.out;
    s.y = out.mutable_data_ptr();
    s.x_type = Float::f32;
    s.y_type = type;
    s.width = s.x_stride = s.y_stride = a.heads * a.width;
    table.sum(s, {0, a.batch * a.queries});
  }
  return out;
}

}  // namespace
}  // namespace cpullm

STABLE_TORCH_LIBRARY_FRAGMENT(cpullm, m) {
  // q [b, h, s, d], k and v [b, g, capacity, d], of which the first `length` tokens (none: all) are read; any strides but a unit
  // last one. k and v of one float type, or int8 with scales float32 [b, g, capacity]. mask bool (true: attend) or float
  // (added), [b | 1, h | 1, s | 1, length]; none: causal, aligned to the last key, and limited to `window` keys if that
  // is not 0. softcap 0: none. sinks float32 [h]. Not exact: over bf16 and int8 caches q and the
  // probabilities may be rounded to bf16. Returns [b, s, h, d] of q's type.
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float softcap, int window, Tensor? sinks, "
      "Tensor? k_scale, Tensor? v_scale, SymInt? length, bool exact=True) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CPU, m) { m.impl("attention", TORCH_BOX(&cpullm::attention)); }
