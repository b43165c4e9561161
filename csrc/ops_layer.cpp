// Operators of the layer program: building one, running it on a token or a prompt, freeing it.
#include "layer_steps.h"
#include "ops.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

namespace cpullm {
namespace {

// ---- programs -------------------------------------------------------------------------------------------------------

std::mutex programs_mutex;
// Never destroyed: tensors must not be freed after torch is gone.
auto& programs = *new std::unordered_map<int64_t, std::shared_ptr<const Program>>;
int64_t next_program = 1;

constexpr const char* kCreate = "cpullm::layer_create";

// Takes the numbers of a program in their order; torch_cpullm/layer_program.py writes them.
struct Reader {
  const std::vector<Tensor>& tensors;
  const std::vector<int64_t>& ints;
  const std::vector<double>& floats;
  size_t at = 0, float_at = 0;

  int64_t next(int64_t least, int64_t most, const char* what) {
    STD_TORCH_CHECK(at < ints.size(), kCreate, ": ints ends before ", what);
    const int64_t v = ints[at++];
    STD_TORCH_CHECK(v >= least && v <= most, kCreate, ": ", what, " must lie in [", least, ", ", most, "], got ", v);
    return v;
  }
  bool flag(const char* what) { return next(0, 1, what) != 0; }
  float next_float(const char* what) {
    STD_TORCH_CHECK(float_at < floats.size(), kCreate, ": floats ends before ", what);
    return float(floats[float_at++]);
  }
  const Tensor* tensor(const char* what) {
    const int64_t i = next(-1, int64_t(tensors.size()) - 1, what);
    return i < 0 ? nullptr : &tensors[size_t(i)];
  }
  // fp32 [size], or null where absent.
  const float* vector(const char* what, int64_t size) {
    const Tensor* t = tensor(what);
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 1 && t->size(0) == size &&
                        t->is_contiguous(),
                    kCreate, ": ", what, " must be a contiguous float32 CPU tensor of shape [", size, "], got ",
                    shape_of(*t));
    return static_cast<const float*>(t->const_data_ptr());
  }
  Linear linear(const char* what, int64_t n, int64_t k) {
    const Tensor *codes = tensor(what), *scales = tensor(what), *zeros = tensor(what);
    STD_TORCH_CHECK(codes && scales, kCreate, ": ", what, " has no codes or scales");
    const int64_t group = next(1, kMostSize, "a group size");
    Linear l;
    l.w = check_weight(kCreate, *codes, *scales, zeros ? OptionalTensor(*zeros) : OptionalTensor(), n, k, group);
    l.bias = vector(what, n);
    const Tensor* order = tensor(what);
    l.order = check_order(kCreate, order ? OptionalTensor(*order) : OptionalTensor(), k);
    return l;
  }
  LayerNorm norm(const char* what, int64_t width, float eps, bool layer) {
    LayerNorm n{};
    n.present = flag(what);
    n.norm = {vector(what, width), vector(what, width), eps, layer};
    return n;
  }
};

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

int64_t layer_create(std::vector<Tensor> tensors, std::vector<int64_t> ints, std::vector<double> floats) {
  auto program = std::make_shared<Program>();
  LayerProgram& p = program->layer;
  Reader in{tensors, ints, floats};
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
  STD_TORCH_CHECK(in.at == ints.size() && in.float_at == floats.size(), kCreate, ": too many numbers");
  program->tensors = std::move(tensors);
  std::lock_guard lock(programs_mutex);
  programs.emplace(next_program, std::move(program));
  return next_program++;
}

void layer_free(int64_t program) {
  std::shared_ptr<const Program> last;  // its memory is freed after the lock
  std::lock_guard lock(programs_mutex);
  const auto it = programs.find(program);
  if (it == programs.end()) return;
  last = std::move(it->second);
  programs.erase(it);
}

// ---- runs -----------------------------------------------------------------------------------------------------------

// cos or sin [1|b, s, >= rotary_dim] into `call`.
const void* check_rope(const OptionalTensor& t, const char* name, const LayerProgram& p, LayerCall& c) {
  STD_TORCH_CHECK(t && t->is_cpu() && t->dim() == 3 && (t->size(0) == 1 || t->size(0) == c.batch) &&
                      t->size(1) == c.tokens && t->size(2) >= p.rotary_dim && t->stride(2) == 1,
                  kForward, ": ", name, " must be a CPU tensor [1 or ", c.batch, ", ", c.tokens, ", ", p.rotary_dim,
                  "] with unit last stride", t ? ", got " + shape_of(*t) : std::string());
  c.rope_type = float_type(*t, kForward, name);
  c.rope_stride[0] = t->size(0) == 1 ? 0 : t->stride(0);
  c.rope_stride[1] = t->stride(1);
  return t->const_data_ptr();
}

void check_mask(const Tensor& t, const LayerProgram& p, LayerCall& c) {
  const int64_t keys = c.length + c.tokens;
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && (t.size(0) == 1 || t.size(0) == c.batch) &&
                      (t.size(1) == 1 || t.size(1) == p.heads) && t.size(2) == c.tokens && t.size(3) == keys &&
                      (t.stride(3) == 1 || keys == 1),
                  kForward, ": mask must be a CPU tensor [1 or ", c.batch, ", 1 or ", p.heads, ", ", c.tokens, ", ",
                  keys, "] with unit last stride, got ", shape_of(t));
  c.mask_is_bool = t.scalar_type() == ScalarType::Bool;
  c.mask_type = c.mask_is_bool ? Float::f32 : float_type(t, kForward, "mask");
  c.mask = t.const_data_ptr();
  c.mask_stride[0] = t.size(0) == 1 ? 0 : t.stride(0);
  c.mask_stride[1] = t.size(1) == 1 ? 0 : t.stride(1);
  c.mask_stride[2] = t.stride(2);
}

void* check_cache(const Tensor& t, const char* name, const LayerProgram& p, const LayerCall& c, int64_t* stride) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && t.size(0) == c.batch && t.size(1) == p.kv_heads &&
                      t.size(3) == p.head_dim && t.stride(3) == 1,
                  kForward, ": ", name, " must be a CPU tensor [", c.batch, ", ", p.kv_heads, ", capacity, ",
                  p.head_dim, "] with unit last stride, got ", shape_of(t));
  STD_TORCH_CHECK(c.length + c.tokens <= t.size(2), kForward, ": ", name, " has room for ", t.size(2),
                  " tokens, needed are ", c.length + c.tokens);
  for (int64_t i = 0; i < 3; ++i) stride[i] = t.stride(i);
  return t.mutable_data_ptr();
}

float* check_cache_scale(const OptionalTensor& t, const char* name, const Tensor& cache, int64_t* stride) {
  STD_TORCH_CHECK(t && t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 3 &&
                      t->size(0) == cache.size(0) && t->size(1) == cache.size(1) && t->size(2) == cache.size(2) &&
                      t->stride(2) == 1,
                  kForward, ": ", name, " must be a float32 CPU tensor of the cache's first three sizes");
  stride[0] = t->stride(0);
  stride[1] = t->stride(1);
  return static_cast<float*>(t->mutable_data_ptr());
}

void check_caches(const LayerProgram& p, const OptionalTensor& k, const OptionalTensor& v,
                  const OptionalTensor& k_scale, const OptionalTensor& v_scale, LayerCall& c) {
  STD_TORCH_CHECK(bool(k) == bool(v), kForward, ": k_cache and v_cache come together");
  if (!k) {
    STD_TORCH_CHECK(c.length == 0, kForward, ": length must be 0 without a cache, got ", c.length);
    return;
  }
  STD_TORCH_CHECK(k->scalar_type() == v->scalar_type(), kForward, ": k_cache and v_cache must have one type");
  c.k_cache = check_cache(*k, "k_cache", p, c, c.k_stride);
  c.v_cache = check_cache(*v, "v_cache", p, c, c.v_stride);
  if (k->scalar_type() == ScalarType::Char) {
    c.cache_type = CacheType::i8;
    c.k_scale = check_cache_scale(k_scale, "k_scale", *k, c.k_scale_stride);
    c.v_scale = check_cache_scale(v_scale, "v_scale", *v, c.v_scale_stride);
    return;
  }
  switch (float_type(*k, kForward, "k_cache")) {
    case Float::f32: c.cache_type = CacheType::f32; break;
    case Float::bf16: c.cache_type = CacheType::bf16; break;
    case Float::f16: c.cache_type = CacheType::f16; break;
  }
}

thread_local Buffer workspace, between;  // of the thread that calls the operator
thread_local int64_t last_barriers = 0;

std::shared_ptr<const Program> find_program(int64_t handle) {
  std::lock_guard lock(programs_mutex);
  const auto it = programs.find(handle);
  STD_TORCH_CHECK(it != programs.end(), kForward, ": there is no program ", handle);
  return it->second;
}

// The arguments of what needs x alone.
LayerCall check_input(const LayerProgram& p, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && x.size(2) == p.hidden, kForward, ": x must be a CPU tensor [b, s, ",
                  p.hidden, "], got ", shape_of(x));
  LayerCall c{};
  c.type = float_type(x, kForward, "x");
  c.batch = x.size(0);
  c.tokens = x.size(1);
  c.x_stride = p.hidden;
  return c;
}

// The arguments of one layer, but for where it reads and writes.
LayerCall check_call(const LayerProgram& p, const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin,
                     const OptionalTensor& mask, const OptionalTensor& k_cache, const OptionalTensor& v_cache,
                     const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t length) {
  STD_TORCH_CHECK(length >= 0 && length < kMostSize, kForward, ": length must not be negative, got ", length);
  LayerCall c = check_input(p, x);
  c.length = length;
  if (p.rotary_dim) {
    c.cos = check_rope(cos, "cos", p, c);
    const Float type = c.rope_type;
    const int64_t stride[2] = {c.rope_stride[0], c.rope_stride[1]};
    c.sin = check_rope(sin, "sin", p, c);
    STD_TORCH_CHECK(type == c.rope_type && stride[0] == c.rope_stride[0] && stride[1] == c.rope_stride[1], kForward,
                    ": cos and sin must have one type and layout");
  }
  if (mask) check_mask(*mask, p, c);
  check_caches(p, k_cache, v_cache, k_scale, v_scale, c);
  return c;
}

// All groups in one parallel region, each from the output of the one before; x [b, s, hidden] -> y, of x's type or of a
// part of a layer fp32. ranks, rank_team: null where nothing is summed over all ranks, or over this one's team.
Tensor run_steps(Steps& steps, const Tensor& x, const RankMemory* ranks = nullptr,
                 const RankMemory* rank_team = nullptr) {
  const Tensor source = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const int64_t sizes[] = {x.size(0), x.size(1), x.size(2)};
  const bool whole = steps.layers[0].call.stage == Stage::whole;
  Tensor y = empty_cpu(sizes, 3, whole ? x.scalar_type() : ScalarType::Float);
  if (x.numel() == 0) return y;
  const Kernels& table = kernels();
  const int64_t threads = team_size();
  const int64_t bytes = (x.numel() * (steps.layers[0].call.type == Float::f32 ? 4 : 2) + 63) / 64 * 64;
  const size_t count = steps.groups.size();
  char* passed_on = between.get<char>(count > 1 ? 2 * bytes : 0);
  int64_t needed = 0;
  for (size_t i = 0, layer = 0; i < count; ++i) {
    for (const size_t end = layer + size_t(steps.groups[i].count); layer < end; ++layer) {
      LayerCall& c = steps.layers[layer].call;
      c.x = i ? passed_on + (i - 1) % 2 * size_t(bytes) : source.const_data_ptr();
      c.y = i + 1 < count ? passed_on + i % 2 * size_t(bytes) : y.mutable_data_ptr();
    }
    needed = std::max(needed, layer_workspace(steps.groups[i], table, threads));
  }
  char* memory = workspace.get<char>(needed);
  Barrier barrier;
  Slices* const slices = fresh_slices(threads);
  std::atomic<int64_t> barriers{0};
  using MaybeSum = std::optional<RankSum>;
  const MaybeSum all_sums = ranks ? MaybeSum(*ranks) : std::nullopt;
  const MaybeSum team_sums = rank_team ? MaybeSum(*rank_team) : std::nullopt;
  const auto part = [&](const Member& member) {
    int64_t passed = 0;
    MaybeSum all = all_sums, team = team_sums;
    const RankSums sums{all ? &*all : nullptr, team ? &*team : nullptr};
    for (size_t i = 0; i < count; ++i) {
      if (i) barrier.wait(member.count);
      passed += run_layers(steps.groups[i], table, member, threads, barrier, slices, memory, sums);
      passed += i ? 1 : 0;
      if (sums.gone()) break;  // on all threads alike
    }
    if (member.id == 0) barriers = passed;
  };
  run_team(threads, part);
  last_barriers = barriers;
  return y;
}

Tensor layer_forward(int64_t handle, const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin,
                     const OptionalTensor& mask, const OptionalTensor& k_cache, const OptionalTensor& v_cache,
                     const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t length) {
  Steps steps;
  steps.programs.push_back(find_program(handle));
  const LayerProgram& p = steps.programs[0]->layer;
  steps.layers.push_back({&p, check_call(p, x, cos, sin, mask, k_cache, v_cache, k_scale, v_scale, length)});
  steps.group({1}, 0, {});
  return run_steps(steps, x);
}

// One part of a layer.
Tensor run_part(const std::shared_ptr<const Program>& program, const LayerCall& call, Stage stage, const Tensor& x) {
  Steps steps;
  steps.programs.push_back(program);
  steps.layers.push_back({&program->layer, call});
  steps.layers[0].call.stage = stage;
  steps.group({1}, 0, {});
  return run_steps(steps, x);
}

Tensor layer_attention(int64_t handle, const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin,
                       const OptionalTensor& mask, const OptionalTensor& k_cache, const OptionalTensor& v_cache,
                       const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t length) {
  const auto program = find_program(handle);
  const LayerProgram& p = program->layer;
  return run_part(program, check_call(p, x, cos, sin, mask, k_cache, v_cache, k_scale, v_scale, length),
                  Stage::attention, x);
}

Tensor layer_mlp(int64_t handle, const Tensor& x) {
  const auto program = find_program(handle);
  return run_part(program, check_input(program->layer, x), Stage::mlp, x);
}

// Tensor `index` of a list, none for -1.
OptionalTensor pick(const std::vector<Tensor>& list, int64_t index, const char* name) {
  STD_TORCH_CHECK(index >= -1 && index < int64_t(list.size()), "cpullm::layers_forward: ", name,
                  " must be -1 or an index below ", list.size(), ", got ", index);
  return index < 0 ? OptionalTensor() : OptionalTensor(list[size_t(index)]);
}

Tensor layers_forward(std::vector<int64_t> handles, const Tensor& x, std::vector<Tensor> tensors,
                      std::vector<int64_t> rotary, std::vector<int64_t> masks, std::vector<Tensor> caches,
                      int64_t length, std::vector<int64_t> groups, int64_t bypass, std::vector<int64_t> summed,
                      const OptionalTensor& shared, int64_t rank, int64_t ranks, double timeout_s,
                      const OptionalTensor& team_shared, int64_t team_rank, int64_t team_ranks) {
  const size_t count = handles.size();
  STD_TORCH_CHECK(count > 0 && rotary.size() == 2 * count && masks.size() == count,
                  "cpullm::layers_forward: rotary must be 2 indices and masks 1 for each of the ", count, " programs");
  STD_TORCH_CHECK(caches.empty() || caches.size() == 2 * count || caches.size() == 4 * count,
                  "cpullm::layers_forward: caches must be none, or 2 or 4 tensors for each of the ", count,
                  " programs, got ", caches.size());
  const size_t per = caches.size() / count;
  Steps steps;
  for (size_t i = 0; i < count; ++i) {
    steps.programs.push_back(find_program(handles[i]));
    const LayerProgram& p = steps.programs[i]->layer;
    const auto cache = [&](size_t j) { return j < per ? OptionalTensor(caches[i * per + j]) : OptionalTensor(); };
    steps.layers.push_back(
        {&p, check_call(p, x, pick(tensors, rotary[2 * i], "rotary"), pick(tensors, rotary[2 * i + 1], "rotary"),
                        pick(tensors, masks[i], "masks"), cache(0), cache(1), cache(2), cache(3), length)});
  }
  steps.group(groups, bypass, summed);
  STD_TORCH_CHECK(bool(shared) == !summed.empty(), "cpullm::layers_forward: summed and shared come together");
  const bool teams = std::any_of(summed.begin(), summed.end(), [](int64_t what) { return in_team(Summed(what)); });
  STD_TORCH_CHECK(bool(team_shared) || !teams, "cpullm::layers_forward: sums over a team need its memory");
  if (!shared) return run_steps(steps, x);
  LostRanks lost;
  const int64_t hidden = steps.programs[0]->layer.hidden;
  const RankMemory all = check_ranks("cpullm::layers_forward", *shared, rank, ranks, hidden, timeout_s, lost);
  std::optional<RankMemory> team;
  if (teams) {
    team = check_ranks("cpullm::layers_forward", *team_shared, team_rank, team_ranks, hidden, timeout_s, lost);
    team->which = 1;
  }
  Tensor y = run_steps(steps, x, &all, team ? &*team : nullptr);
  if (lost.any.load()) {  // the others need not find out by waiting
    all.give_up();
    if (team) team->give_up();
  }
  STD_TORCH_CHECK(!lost.any.load(), "cpullm::layers_forward: no answer in shared memory");
  return y;
}

// Barriers that the last run started by this thread passed.
int64_t layer_barriers() { return last_barriers; }

}  // namespace
}  // namespace cpullm

STABLE_TORCH_LIBRARY_FRAGMENT(cpullm, m) {
  // A decoder layer from its packed weights and numbers, in the order of torch_cpullm/layer_program.py; returns a handle.
  m.def("layer_create(Tensor[] tensors, int[] ints, float[] floats) -> int");
  m.def("layer_free(int program) -> ()");
  // x [b, s, hidden] -> the same shape and type. cos, sin [1|b, s, rotary_dim]; mask [1|b, 1|h, s, length + s] bool or
  // added, none: causal. Caches [b, g, capacity, d] fp32 | bf16 | fp16, or int8 with fp32 scales [b, g, capacity]: hold
  // `length` tokens, the new ones are written behind them. No cache: attention over the s tokens.
  m.def(
      "layer_forward(int program, Tensor x, Tensor? cos, Tensor? sin, Tensor? mask, Tensor(a!)? k_cache, "
      "Tensor(b!)? v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, int length) -> Tensor");
  // The parts of a layer that is cut among ranks, this rank's summand of each, float32: of attention's output, and of the
  // MLP's, which reads the layer's x and the sum of attention's outputs, or of a parallel layer x alone.
  m.def(
      "layer_attention(int program, Tensor x, Tensor? cos, Tensor? sin, Tensor? mask, Tensor(a!)? k_cache, "
      "Tensor(b!)? v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, int length) -> Tensor");
  m.def("layer_mlp(int program, Tensor x) -> Tensor");
  // Several layers in one parallel region. groups: sizes of runs of layers that read one input, each run from the output
  // of the one before; bypass: members of a group before one whose attention its MLP reads as well, -1: all. rotary: cos
  // and sin of every layer, masks: its mask, as indices into `tensors`, -1 for none. caches: none, or k and v of every
  // layer, or k, v and their scales; all hold `length` tokens. summed: what of each group is summed over the ranks of one
  // host: 0 nothing, 1 attention's output and the MLP's of a layer that is cut, 2 what the group's members here add to x,
  // 3 as 1 over a team of the ranks, 4 as 2 of members that are cut among a team, over which attention's output is summed;
  // shared, rank, ranks, timeout_s: as of shared_sum, an error where a rank did not come in time; team: of the team.
  m.def(
      "layers_forward(int[] programs, Tensor x, Tensor[] tensors, int[] rotary, int[] masks, Tensor(a!)[] caches, int "
      "length, int[] groups, int bypass, int[] summed=[], Tensor(b!)? shared=None, int rank=0, int ranks=1, float "
      "timeout_s=0., Tensor(c!)? team_shared=None, int team_rank=0, int team_ranks=1) -> Tensor");
  m.def("layer_barriers() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&cpullm::layer_forward));
  m.impl("layers_forward", TORCH_BOX(&cpullm::layers_forward));
  m.impl("layer_attention", TORCH_BOX(&cpullm::layer_attention));
  m.impl("layer_mlp", TORCH_BOX(&cpullm::layer_mlp));
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CompositeExplicitAutograd, m) {
  m.impl("layer_create", TORCH_BOX(&cpullm::layer_create));
  m.impl("layer_free", TORCH_BOX(&cpullm::layer_free));
  m.impl("layer_barriers", TORCH_BOX(&cpullm::layer_barriers));
}
