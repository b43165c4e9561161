// Operators that build programs from tensors and numbers, and free them.
#include "numbers.h"
#include "program.h"

namespace cpullm {
namespace {

auto& programs = *new Numbered<Program>;

std::shared_ptr<const Program> make(Program::Any (*read)(const Source&), Source from) {
  Program::Any what = read(from);
  std::vector<Place> places;
  for (const Tensor& t : from.tensors) {
    STD_TORCH_CHECK(t.is_cpu(), "cpullm::layer_create, head_create, embedding_create: every tensor must be on the CPU");
    places.push_back({t.const_data_ptr(), storage_bytes(t)});
  }
  return std::make_shared<const Program>(Program{what, read, std::move(from), std::move(places)});
}

// Takes the numbers of a program in their order; torch_cpullm/layer_program.py writes them.
struct Reader {
  const char* op;
  const std::vector<Tensor>& tensors;
  const std::vector<int64_t>& ints;
  const std::vector<double>& floats;
  size_t at = 0, float_at = 0;

  int64_t next(int64_t least, int64_t most, const char* what) {
    STD_TORCH_CHECK(at < ints.size(), op, ": ints ends before ", what);
    const int64_t v = ints[at++];
    STD_TORCH_CHECK(v >= least && v <= most, op, ": ", what, " must lie in [", least, ", ", most, "], got ", v);
    return v;
  }
  bool flag(const char* what) { return next(0, 1, what) != 0; }
  float next_float(const char* what) {
    STD_TORCH_CHECK(float_at < floats.size(), op, ": floats ends before ", what);
    return float(floats[float_at++]);
  }
  void check_end() const { STD_TORCH_CHECK(at == ints.size() && float_at == floats.size(), op, ": too many numbers"); }
  const Tensor* tensor(const char* what) {
    const int64_t i = next(-1, int64_t(tensors.size()) - 1, what);
    if (i < 0) return nullptr;
    const Tensor& t = tensors[size_t(i)];
    if (!t.is_contiguous()) return &t;  // which no caller takes
    check_storage(op, (std::string("a tensor of ") + what).c_str(), t);
    return &t;
  }
  // fp32 [size], or null where absent.
  const float* vector(const char* what, int64_t size) {
    const Tensor* t = tensor(what);
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 1 && t->size(0) == size &&
                        t->is_contiguous(),
                    op, ": ", what, " must be a contiguous float32 CPU tensor of shape [", size, "], got ",
                    shape_of(*t));
    return static_cast<const float*>(t->const_data_ptr());
  }
  Weight weight(const char* what, int64_t n, int64_t k) {
    const Tensor *codes = tensor(what), *scales = tensor(what), *zeros = tensor(what);
    STD_TORCH_CHECK(codes && scales, op, ": ", what, " has no codes or scales");
    const int64_t group = next(1, kMostSize, "a group size");
    return check_weight(op, *codes, *scales, zeros ? OptionalTensor(*zeros) : OptionalTensor(), n, k, group);
  }
  Linear linear(const char* what, int64_t n, int64_t k) {
    Linear l;
    l.w = weight(what, n, k);
    l.bias = vector(what, n);
    const Tensor* order = tensor(what);
    l.order = check_order(op, order ? OptionalTensor(*order) : OptionalTensor(), k);
    return l;
  }
  LayerNorm norm(const char* what, int64_t width, float eps, bool layer) {
    LayerNorm n{};
    n.present = flag(what);
    n.norm = {vector(what, width), vector(what, width), eps, layer};
    return n;
  }
};

constexpr const char* kCreate = "cpullm::layer_create";
constexpr int64_t kMost = int64_t(1) << 24;  // of every size: products stay far from overflow

void check_read_alike(const Linear& a, const Linear& b, const char* what) {
  STD_TORCH_CHECK(read_alike(a, b), kCreate, ": ", what, " must have their inputs in one order and group size");
}

void read_attention(Reader& in, LayerProgram& p) {
  p.layout = {in.next(1, kMost, "q_per_group"), in.next(0, kMost, "group_stride"), in.next(0, kMost, "k_start"),
              in.next(0, kMost, "v_start"), in.next(0, kMost, "kv_stride")};
  const QkvLayout& l = p.layout;
  const int64_t d = p.head_dim, per = p.heads / p.kv_heads;
  STD_TORCH_CHECK(l.q_per_group == p.heads || l.q_per_group == per || l.q_per_group == 1, kCreate,
                  ": q_per_group must be the heads, the heads of a kv head, or 1, got ", l.q_per_group);
  p.qkv_count = int(in.next(1, 3, "the number of qkv products"));
  STD_TORCH_CHECK(p.qkv_count != 2, kCreate, ": qkv must be one product or three");
  const int64_t q_width = p.heads * d, kv_width = p.kv_heads * d, width = q_width + 2 * kv_width;
  const auto last = [&](int64_t start, int64_t count, int64_t stride) { return start + (count - 1) * stride + d; };
  const int64_t groups = (p.heads + l.q_per_group - 1) / l.q_per_group;
  STD_TORCH_CHECK(last((l.q_per_group - 1) * d, groups, l.group_stride) <= width &&
                      last(l.k_start, p.kv_heads, l.kv_stride) <= width &&
                      last(l.v_start, p.kv_heads, l.kv_stride) <= width,
                  kCreate, ": the layout leaves the ", width, " columns of qkv");
  if (p.qkv_count == 1) {
    p.qkv[0] = in.linear("qkv", width, p.hidden);
  } else {
    p.qkv[0] = in.linear("q", q_width, p.hidden);
    p.qkv[1] = in.linear("k", kv_width, p.hidden);
    p.qkv[2] = in.linear("v", kv_width, p.hidden);
  }
  for (int i = 1; i < p.qkv_count; ++i) check_read_alike(p.qkv[i], p.qkv[0], "q, k and v");
  p.o = in.linear("o", p.hidden, q_width);
}

void read_mlp(Reader& in, LayerProgram& p) {
  p.gated = in.flag("gated");
  p.up_count = int(in.next(1, p.gated ? 2 : 1, "the number of up products"));
  for (int i = 0; i < p.up_count; ++i)
    p.up[i] = in.linear("up", p.intermediate * (p.gated && p.up_count == 1 ? 2 : 1), p.hidden);
  if (p.up_count == 2) check_read_alike(p.up[1], p.up[0], "gate and up");
  p.down = in.linear("down", p.hidden, p.intermediate);
}

void read_norms(Reader& in, LayerProgram& p) {
  const bool layer = in.flag("the kind of norm");
  const float eps = in.next_float("eps");
  p.input_norm = in.norm("input_norm", p.hidden, eps, layer);
  p.post_attention_norm = in.norm("post_attention_norm", p.hidden, eps, layer);
  p.mlp_norm = in.norm("mlp_norm", p.hidden, eps, layer);
  p.post_mlp_norm = in.norm("post_mlp_norm", p.hidden, eps, layer);
  p.qk_norm_whole = in.flag("qk_norm_whole");
  const bool whole = p.qk_norm_whole;
  p.q_norm = in.norm("q_norm", whole ? p.heads * p.head_dim : p.head_dim, eps, false);
  p.k_norm = in.norm("k_norm", whole ? p.kv_heads * p.head_dim : p.head_dim, eps, false);
  const bool side_by_side = p.layout.q_per_group == p.heads && (p.kv_heads == 1 || p.layout.kv_stride == p.head_dim);
  STD_TORCH_CHECK(!whole || side_by_side, kCreate, ": norms over all heads need them side by side");
}

Program::Any read_layer(const Source& from) {
  LayerProgram p{};
  Reader in{kCreate, from.tensors, from.ints, from.floats};
  p.hidden = in.next(1, kMost, "hidden");
  p.heads = in.next(1, 65536, "heads");
  p.kv_heads = in.next(1, p.heads, "kv_heads");
  p.head_dim = in.next(1, 65536, "head_dim");
  p.intermediate = in.next(1, kMost, "intermediate");
  STD_TORCH_CHECK(p.heads % p.kv_heads == 0, kCreate, ": heads must be a multiple of kv_heads");
  STD_TORCH_CHECK(p.heads * p.head_dim <= kMost, kCreate, ": heads x head_dim is too large");
  p.compute = Compute(in.next(0, 2, "compute"));
  p.parallel = in.flag("parallel");
  read_attention(in, p);
  read_mlp(in, p);
  read_norms(in, p);
  STD_TORCH_CHECK(!p.parallel || !(p.post_attention_norm.present || p.post_mlp_norm.present), kCreate,
                  ": a parallel layer has no norms after attention or MLP");
  if (p.parallel && !p.mlp_norm.present) check_read_alike(p.up[0], p.qkv[0], "products that share an input");
  p.rotary_dim = in.next(0, p.head_dim, "rotary_dim");
  STD_TORCH_CHECK(p.rotary_dim % 2 == 0, kCreate, ": rotary_dim must be even");
  p.rope_style = in.flag("interleaved") ? RopeStyle::interleaved : RopeStyle::half;
  p.act = Act(in.next(0, 3, "act"));
  p.window = in.next(0, int64_t(1) << 40, "window");
  p.sinks = in.vector("sinks", p.heads);
  p.scale = in.next_float("scale");
  p.softcap = in.next_float("softcap");
  p.residual_scale = in.next_float("residual_scale");
  in.check_end();
  return p;
}

// y = norm(x) W^T + bias.
Program::Any read_head(const Source& from) {
  constexpr const char* op = "cpullm::head_create";
  HeadProgram p{};
  Reader in{op, from.tensors, from.ints, from.floats};
  p.hidden = in.next(1, kMost, "hidden");
  const int64_t vocab = in.next(1, kMost, "the number of logits");
  p.compute = Compute(in.next(0, 2, "compute"));
  const bool layer = in.flag("the kind of norm");
  p.norm = in.norm("norm", p.hidden, in.next_float("eps"), layer);
  p.linear = in.linear("head", vocab, p.hidden);
  in.check_end();
  return p;
}

Program::Any read_embedding(const Source& from) {
  constexpr const char* op = "cpullm::embedding_create";
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  Reader in{op, from.tensors, from.ints, from.floats};
  const int64_t k = in.next(1, kMost, "hidden"), n = in.next(1, kMost, "the number of rows");
  const ScalarType type = types[in.next(0, 2, "dtype")];
  EmbeddingProgram p{in.weight("table", n, k), type};
  in.check_end();
  return p;
}

int64_t layer_create(std::vector<Tensor> tensors, std::vector<int64_t> ints, std::vector<double> floats) {
  return programs.keep(make(read_layer, {std::move(tensors), std::move(ints), std::move(floats)}));
}

int64_t head_create(std::vector<Tensor> tensors, std::vector<int64_t> ints, std::vector<double> floats) {
  return programs.keep(make(read_head, {std::move(tensors), std::move(ints), std::move(floats)}));
}

int64_t embedding_create(std::vector<Tensor> tensors, std::vector<int64_t> ints) {
  return programs.keep(make(read_embedding, {std::move(tensors), std::move(ints), {}}));
}

void layer_free(int64_t program) { programs.free(program); }

}  // namespace

std::shared_ptr<const Program> find_program(const char* op, int64_t handle) {
  std::shared_ptr<const Program> program = programs.find(handle);
  STD_TORCH_CHECK(program, op, ": there is no program ", handle);
  if (program->in_place()) return program;
  auto moved = make(program->read, program->from);  // with every check
  programs.replace(handle, moved);
  return moved;
}

}  // namespace cpullm

STABLE_TORCH_LIBRARY_FRAGMENT(cpullm, m) {
  // A decoder layer from its packed weights and numbers, in the order of torch_cpullm/layer_program.py; returns a handle.
  m.def("layer_create(Tensor[] tensors, int[] ints, float[] floats) -> int");
  // A last norm and output head, in the order of torch_cpullm/layer_program.py; returns a handle.
  m.def("head_create(Tensor[] tensors, int[] ints, float[] floats) -> int");
  // A packed table of which stack_forward takes rows: [hidden, rows, dtype (float32, bfloat16, float16), codes, scales,
  // zeros, group]; returns a handle.
  m.def("embedding_create(Tensor[] tensors, int[] ints) -> int");
  m.def("layer_free(int program) -> ()");  // of any kind
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CompositeExplicitAutograd, m) {
  m.impl("layer_create", TORCH_BOX(&cpullm::layer_create));
  m.impl("head_create", TORCH_BOX(&cpullm::head_create));
  m.impl("embedding_create", TORCH_BOX(&cpullm::embedding_create));
  m.impl("layer_free", TORCH_BOX(&cpullm::layer_free));
}
