// The attention operator.
#include "ops.h"

namespace cpullm {
namespace {

thread_local Buffer scores_buffer;

// o[b, 0, h] = softmax(q[b, h, 0] K[b, g]^T scale + mask) V[b, g], g = h / (heads / kv heads).
Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale) {
  constexpr const char* op = "cpullm::decode_attention";
  const auto check = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.defined() && t.is_cpu() && t.dim() == 4 && t.stride(3) == 1, op, ": ", name,
                    " must be a 4-D CPU tensor with unit stride in the last dimension");
    STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), op, ": q, k and v must have one dtype");
  };
  check(q, "q");
  check(k, "k");
  check(v, "v");
  Attention a{};
  a.type = float_type(q, op, "q");
  a.batch = q.size(0);
  a.heads = q.size(1);
  a.width = q.size(3);
  a.kv_heads = k.size(1);
  a.length = k.size(2);
  STD_TORCH_CHECK(q.size(2) == 1, op, ": q must hold one token per row [b, h, 1, d], got ", shape_of(q));
  STD_TORCH_CHECK(a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.width > 0 && a.length > 0, op,
                  ": heads must be a multiple of kv heads and no size empty, got q ", shape_of(q), ", k ", shape_of(k));
  STD_TORCH_CHECK(k.size(0) == a.batch && k.size(3) == a.width, op, ": k must have shape [", a.batch, ", g, t, ",
                  a.width, "], got ", shape_of(k));
  STD_TORCH_CHECK(shape_of(v) == shape_of(k), op, ": v must have k's shape ", shape_of(k), ", got ", shape_of(v));
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  for (int i = 0; i < 2; ++i) a.q_stride[i] = q.stride(i);
  for (int i = 0; i < 3; ++i) {
    a.k_stride[i] = k.stride(i);
    a.v_stride[i] = v.stride(i);
  }
  a.scale = float(scale);
  if (mask) {
    const Tensor& m = *mask;
    STD_TORCH_CHECK(m.is_cpu() && m.dim() == 4 && (m.size(0) == a.batch || m.size(0) == 1) &&
                        (m.size(1) == a.heads || m.size(1) == 1) && m.size(2) == 1 && m.size(3) == a.length,
                    op, ": mask must have shape [", a.batch, " | 1, ", a.heads, " | 1, 1, ", a.length, "], got ",
                    shape_of(m));
    STD_TORCH_CHECK(a.length == 1 || m.stride(3) == 1, op, ": mask must have unit stride in the last dimension");
    a.mask = m.const_data_ptr();
    a.mask_is_bool = m.scalar_type() == ScalarType::Bool;
    if (!a.mask_is_bool) a.mask_type = float_type(m, op, "mask");
    for (int i = 0; i < 2; ++i) a.mask_stride[i] = m.size(i) == 1 ? 0 : m.stride(i);
  }
  const int64_t sizes[] = {a.batch, 1, a.heads, a.width};
  Tensor out = empty_cpu(sizes, 4, q.scalar_type());
  a.out = out.mutable_data_ptr();
  const Kernels& table = kernels();
  parallel(a.batch * a.heads, 2 * a.length * a.width, [&](int64_t begin, int64_t end) {
    table.decode_attention(a, {begin, end}, scores_buffer.get<float>((a.length + 15) / 16 * 16 + 2 * a.width));
  });
  return out;
}

}  // namespace
}  // namespace cpullm

STABLE_TORCH_LIBRARY_FRAGMENT(cpullm, m) {
  // One query token per row: q [b, h, 1, d], k, v [b, g, t, d] of one dtype (fp32 | bf16 | fp16), any strides but a
  // unit last one; mask bool (true: attend) or float (added), [b | 1, h | 1, 1, t]. Returns [b, 1, h, d].
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CPU, m) { m.impl("decode_attention", TORCH_BOX(&cpullm::decode_attention)); }
