// Operators that run layer programs on a token or a prompt.
#include "layer_steps.h"
#include "numbers.h"

#include <algorithm>
#include <optional>

namespace cpullm {
namespace {

// cos or sin of the tokens, or of more positions, of which they are those from `first` on: [1|b, s, >= rotary_dim]
// into `call`.
const void* check_rope(const OptionalTensor& t, const char* name, const LayerProgram& p, int64_t first, LayerCall& c) {
  STD_TORCH_CHECK(t && t->is_cpu() && t->dim() == 3 && (t->size(0) == 1 || t->size(0) == c.batch) &&
                      (first < 0 ? t->size(1) == c.tokens : c.tokens <= t->size(1) - first) &&
                      t->size(2) >= p.rotary_dim && t->stride(2) == 1,
                  kForward, ": ", name, " must be a CPU tensor [1 or ", c.batch, ", ", c.tokens, ", ", p.rotary_dim,
                  "] with unit last stride", first < 0 ? "" : " from position " + std::to_string(first) + " on",
                  t ? ", got " + shape_of(*t) : std::string());
  check_storage(kForward, name, *t);
  c.rope_type = float_type(*t, kForward, name);
  c.rope_stride[0] = t->size(0) == 1 ? 0 : t->stride(0);
  c.rope_stride[1] = t->stride(1);
  const int64_t skipped = std::max<int64_t>(first, 0) * t->stride(1) * (c.rope_type == Float::f32 ? 4 : 2);
  return static_cast<const char*>(t->const_data_ptr()) + skipped;
}

void check_mask(const Tensor& t, const LayerProgram& p, LayerCall& c) {
  const int64_t keys = c.length + c.tokens;
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && (t.size(0) == 1 || t.size(0) == c.batch) &&
                      (t.size(1) == 1 || t.size(1) == p.heads) && t.size(2) == c.tokens && t.size(3) == keys &&
                      (t.stride(3) == 1 || keys == 1),
                  kForward, ": mask must be a CPU tensor [1 or ", c.batch, ", 1 or ", p.heads, ", ", c.tokens, ", ",
                  keys, "] with unit last stride, got ", shape_of(t));
  check_storage(kForward, "mask", t);
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
  check_storage(kForward, name, t);
  for (int64_t i = 0; i < 3; ++i) stride[i] = t.stride(i);
  return t.mutable_data_ptr();
}

float* check_cache_scale(const OptionalTensor& t, const char* name, const Tensor& cache, int64_t* stride) {
  STD_TORCH_CHECK(t && t->is_cpu() && dtype_of(*t) == aoti_torch_dtype_float32() && t->dim() == 3 &&
                      t->size(0) == cache.size(0) && t->size(1) == cache.size(1) && t->size(2) == cache.size(2) &&
                      t->stride(2) == 1,
                  kForward, ": ", name, " must be a float32 CPU tensor of the cache's first three sizes");
  check_storage(kForward, name, *t);
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
  const int32_t type = dtype_of(*k);
  STD_TORCH_CHECK(type == dtype_of(*v), kForward, ": k_cache and v_cache must have one type");
  c.k_cache = check_cache(*k, "k_cache", p, c, c.k_stride);
  c.v_cache = check_cache(*v, "v_cache", p, c, c.v_stride);
  if (type == aoti_torch_dtype_int8()) {
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

const LayerProgram& layer_of(const std::shared_ptr<const Program>& program, int64_t handle) {
  return program->as<LayerProgram>(kForward, handle, "layer");
}

// The arguments of what needs x alone.
LayerCall check_input(const LayerProgram& p, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && x.size(2) == p.hidden, kForward, ": x must be a CPU tensor [b, s, ",
                  p.hidden, "], got ", shape_of(x));
  check_storage(kForward, "x", x);
  LayerCall c{};
  c.type = float_type(x, kForward, "x");
  c.batch = x.size(0);
  c.tokens = x.size(1);
  c.x_stride = p.hidden;
  return c;
}

// The arguments of one layer, but for its cache and where it reads and writes. first: see check_rope().
LayerCall check_inputs(const LayerProgram& p, const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin,
                       const OptionalTensor& mask, int64_t length, int64_t first = -1) {
  STD_TORCH_CHECK(length >= 0 && length < kMostSize, kForward, ": length must not be negative, got ", length);
  LayerCall c = check_input(p, x);
  c.length = length;
  if (p.rotary_dim) {
    c.cos = check_rope(cos, "cos", p, first, c);
    const Float type = c.rope_type;
    const int64_t stride[2] = {c.rope_stride[0], c.rope_stride[1]};
    c.sin = check_rope(sin, "sin", p, first, c);
    STD_TORCH_CHECK(type == c.rope_type && stride[0] == c.rope_stride[0] && stride[1] == c.rope_stride[1], kForward,
                    ": cos and sin must have one type and layout");
  }
  if (mask) check_mask(*mask, p, c);
  return c;
}

// The arguments of one layer, but for where it reads and writes.
LayerCall check_call(const LayerProgram& p, const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin,
                     const OptionalTensor& mask, const OptionalTensor& k_cache, const OptionalTensor& v_cache,
                     const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t length) {
  LayerCall c = check_inputs(p, x, cos, sin, mask, length);
  check_caches(p, k_cache, v_cache, k_scale, v_scale, c);
  return c;
}

// All groups in one parallel region, each from the output of the one before; x [b, s, hidden] -> y, of x's type or of a
// part of a layer fp32; or with a head its logits [b, s, n]. ranks, rank_team: null where nothing is summed over all
// ranks, or over this one's team.
Tensor run_steps(Steps& steps, const Tensor& x, const RankMemory* ranks = nullptr,
                 const RankMemory* rank_team = nullptr, const HeadProgram* head = nullptr) {
  const Tensor source = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const LayerCall& first = steps.layers[0].call;
  const int64_t sizes[] = {x.size(0), first.last ? 1 : x.size(1), head ? head->linear.w.n : x.size(2)};
  const bool whole = first.stage == Stage::whole;
  Tensor y = empty_cpu(sizes, 3, whole ? x.scalar_type() : ScalarType::Float);
  if (x.numel() == 0) return y;
  const Kernels& table = kernels();
  const int64_t threads = team_size();
  const int64_t bytes = (x.numel() * (steps.layers[0].call.type == Float::f32 ? 4 : 2) + 63) / 64 * 64;
  const size_t count = steps.groups.size();
  char* passed_on = between.get<char>(count > 1 || head ? 2 * bytes : 0);
  const HeadCall tail{passed_on + (count - 1) % 2 * size_t(bytes), y.mutable_data_ptr(), steps.layers[0].call.type,
                      sizes[0] * sizes[1]};
  int64_t needed = head ? head_workspace(*head, tail, table, threads) : 0;
  for (size_t i = 0, layer = 0; i < count; ++i) {
    for (const size_t end = layer + size_t(steps.groups[i].count); layer < end; ++layer) {
      LayerCall& c = steps.layers[layer].call;
      c.x = i ? passed_on + (i - 1) % 2 * size_t(bytes) : source.const_data_ptr();
      c.y = i + 1 < count || head ? passed_on + i % 2 * size_t(bytes) : y.mutable_data_ptr();
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
    Ahead ahead;
    MaybeSum all = all_sums, team = team_sums;
    const RankSums sums{all ? &*all : nullptr, team ? &*team : nullptr};
    for (size_t i = 0; i < count; ++i) {
      if (i) barrier.wait(member.count, ahead);
      passed += run_layers(steps.groups[i], table, member, threads, barrier, slices, ahead, memory, sums);
      passed += i ? 1 : 0;
      if (sums.gone()) break;  // on all threads alike
      if (i + 1 < count) expect_layers(steps.groups[i + 1], member, ahead);
    }
    if (head && !sums.gone()) {
      expect_head(*head, member, ahead);
      barrier.wait(member.count, ahead);
      passed += 1 + run_head(*head, tail, table, member, threads, barrier, slices, ahead, memory);
    }
    if (member.id == 0) barriers = passed;
  };
  run_team(threads, part);
  last_barriers = barriers;
  return y;
}

Tensor layer_forward(int64_t handle, const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin,
                     const OptionalTensor& mask, const OptionalTensor& k_cache, const OptionalTensor& v_cache,
                     const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t length, bool last) {
  Steps steps;
  steps.programs.push_back(find_program(kForward, handle));
  const LayerProgram& p = layer_of(steps.programs[0], handle);
  steps.layers.push_back({&p, check_call(p, x, cos, sin, mask, k_cache, v_cache, k_scale, v_scale, length)});
  LayerCall& call = steps.layers[0].call;
  call.last = last;
  STD_TORCH_CHECK(!last || (p.compute == Compute::int8 && !p.parallel && call.k_cache &&
                            call.tokens * (p.heads / p.kv_heads) > kFewRows),
                  kForward,
                  ": the last token alone is of a sequential layer in int8 with a cache and a prompt of more than ",
                  kFewRows, " rows per key and value head, got ", call.tokens, " tokens");
  steps.group({1}, 0, {});
  return run_steps(steps, x);
}

// One part of a layer.
Tensor run_part(const LayerProgram& program, const LayerCall& call, Stage stage, const Tensor& x) {
  Steps steps;
  steps.layers.push_back({&program, call});
  steps.layers[0].call.stage = stage;
  steps.group({1}, 0, {});
  return run_steps(steps, x);
}

Tensor layer_attention(int64_t handle, const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin,
                       const OptionalTensor& mask, const OptionalTensor& k_cache, const OptionalTensor& v_cache,
                       const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t length) {
  const auto program = find_program(kForward, handle);
  const LayerProgram& p = layer_of(program, handle);
  return run_part(p, check_call(p, x, cos, sin, mask, k_cache, v_cache, k_scale, v_scale, length), Stage::attention, x);
}

Tensor layer_mlp(int64_t handle, const Tensor& x) {
  const auto program = find_program(kForward, handle);
  const LayerProgram& p = layer_of(program, handle);
  return run_part(p, check_input(p, x), Stage::mlp, x);
}

// Tensor `index` of a list, none for -1.
OptionalTensor pick(const std::vector<Tensor>& list, int64_t index, const char* name) {
  STD_TORCH_CHECK(index >= -1 && index < int64_t(list.size()), "cpullm::layers_forward: ", name,
                  " must be -1 or an index below ", list.size(), ", got ", index);
  return index < 0 ? OptionalTensor() : OptionalTensor(list[size_t(index)]);
}

// Whether a layer's checked inputs are those of the one before. rotary: its two indices, behind those of the other.
bool same_inputs(const LayerProgram& p, const LayerProgram& before, const int64_t* rotary) {
  return p.hidden == before.hidden && p.heads == before.heads && p.rotary_dim == before.rotary_dim &&
         rotary[0] == rotary[-2] && rotary[1] == rotary[-1];
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
  steps.programs.reserve(count);
  steps.layers.reserve(count);
  LayerCall call{};  // a layer's, but for its cache: mostly that of the layer before
  for (size_t i = 0; i < count; ++i) {
    steps.programs.push_back(find_program(kForward, handles[i]));
    const LayerProgram& p = layer_of(steps.programs[i], handles[i]);
    if (i == 0 || !same_inputs(p, *steps.layers[i - 1].program, &rotary[2 * i]) || masks[i] != masks[i - 1])
      call = check_inputs(p, x, pick(tensors, rotary[2 * i], "rotary"), pick(tensors, rotary[2 * i + 1], "rotary"),
                          pick(tensors, masks[i], "masks"), length);
    steps.layers.push_back({&p, call});
    const auto cache = [&](size_t j) { return j < per ? OptionalTensor(caches[i * per + j]) : OptionalTensor(); };
    check_caches(p, cache(0), cache(1), cache(2), cache(3), steps.layers[i].call);
  }
  steps.group(groups, bypass, summed);
  STD_TORCH_CHECK(bool(shared) == !summed.empty(), "cpullm::layers_forward: summed and shared come together");
  const bool teams = std::any_of(summed.begin(), summed.end(), [](int64_t what) { return in_team(Summed(what)); });
  STD_TORCH_CHECK(bool(team_shared) || !teams, "cpullm::layers_forward: sums over a team need its memory");
  if (!shared) return run_steps(steps, x);
  LostRanks lost;
  const int64_t hidden = steps.layers[0].program->hidden;
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

// Layers with their caches, checked once: what the decode steps of a generation run again and again. A list of 36 layers'
// caches alone costs 30 us to hand over and to check.
struct Stack {
  std::vector<int64_t> handles, groups, rotary;
  int64_t bypass;
  std::vector<Tensor> caches;
  // What was made of them, good as long as take() says so. The caches outlive a model whose weights the programs keep.
  std::vector<std::weak_ptr<const Program>> programs = {};
  std::vector<CacheMemory> memory = {};
  std::vector<Place> places = {};  // of the caches
  int64_t batch = 0, room = 0;  // of the caches: sequences, and tokens each

  // All programs, to be kept while they run; false where one is gone or memory has moved.
  bool take(std::vector<std::shared_ptr<const Program>>& into) const {
    for (size_t i = 0; i < caches.size(); ++i)
      if (!places[i].is_of(caches[i])) return false;
    into.clear();
    for (const auto& program : programs) {
      into.push_back(program.lock());
      if (!into.back() || !into.back()->in_place()) return false;
    }
    return true;
  }
};

// Its programs and caches, looked at (again).
std::shared_ptr<const Stack> made(Stack s) {
  constexpr const char* op = "cpullm::stack_create";
  const size_t count = s.handles.size(), per = count ? s.caches.size() / count : 0;
  STD_TORCH_CHECK(count > 0 && s.rotary.size() == 2 * count, op, ": rotary must be 2 indices for each of the ", count,
                  " programs");
  STD_TORCH_CHECK(s.caches.size() == per * count && (per == 0 || per == 2 || per == 4), op,
                  ": caches must be none, or 2 or 4 tensors for each of the ", count, " programs, got ",
                  s.caches.size());
  s.programs.clear();
  s.memory.clear();
  s.places.clear();
  s.batch = per && s.caches[0].dim() ? s.caches[0].size(0) : 0;
  s.room = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto program = find_program(kForward, s.handles[i]);
    s.programs.push_back(program);
    LayerCall call{};
    call.batch = s.batch;
    const auto cache = [&](size_t j) { return j < per ? OptionalTensor(s.caches[i * per + j]) : OptionalTensor(); };
    check_caches(layer_of(program, s.handles[i]), cache(0), cache(1), cache(2), cache(3), call);
    s.memory.push_back(call);
    for (size_t j = 0; j < per; ++j) {
      const Tensor& t = s.caches[i * per + j];
      s.room = i + j ? std::min(s.room, t.size(2)) : t.size(2);
      s.places.push_back({t.const_data_ptr(), storage_bytes(t)});
    }
  }
  return std::make_shared<const Stack>(std::move(s));
}

auto& stacks = *new Numbered<Stack>;

int64_t stack_create(std::vector<int64_t> handles, std::vector<Tensor> caches, std::vector<int64_t> rotary,
                     std::vector<int64_t> groups, int64_t bypass) {
  return stacks.keep(made({std::move(handles), std::move(groups), std::move(rotary), bypass, std::move(caches)}));
}

void stack_free(int64_t stack) { stacks.free(stack); }

Tensor stack_forward(int64_t stack, const Tensor& x_or_ids, std::vector<Tensor> angles, const OptionalTensor& mask,
                     int64_t length, int64_t head, int64_t embedding, int64_t first) {
  constexpr const char* op = "cpullm::stack_forward";
  std::shared_ptr<const Stack> s = stacks.find(stack);
  STD_TORCH_CHECK(s, op, ": there is no stack ", stack);
  const size_t count = s->handles.size();
  Steps steps;
  steps.programs.reserve(count + 1);
  steps.layers.reserve(count);
  while (!s->take(steps.programs)) {  // an error once one is gone
    s = made(*s);
    stacks.replace(stack, s);
  }
  const auto rows = [&] {
    const auto table = find_program(op, embedding);
    const auto& e = table->as<EmbeddingProgram>(op, embedding, "embedding");
    return rows_of(x_or_ids, e.table, e.type);
  };
  const Tensor x = embedding ? rows() : x_or_ids;
  LayerCall call{};
  for (size_t i = 0; i < count; ++i) {
    const LayerProgram& p = layer_of(steps.programs[i], s->handles[i]);
    const int64_t* const rotary = &s->rotary[2 * i];
    if (i == 0 || !same_inputs(p, *steps.layers[i - 1].program, rotary))
      call =
          check_inputs(p, x, pick(angles, rotary[0], "rotary"), pick(angles, rotary[1], "rotary"), mask, length, first);
    static_cast<CacheMemory&>(call) = s->memory[i];
    steps.layers.push_back({&p, call});
  }
  if (s->caches.empty()) {
    STD_TORCH_CHECK(length == 0, op, ": length must be 0 without caches, got ", length);
  } else {
    STD_TORCH_CHECK(call.batch == s->batch, op, ": the caches are of ", s->batch, " sequences, x has ", call.batch);
    STD_TORCH_CHECK(call.tokens <= s->room - length, op, ": the caches have room for ", s->room, " tokens, needed are ",
                    length + call.tokens);
  }
  steps.group(s->groups, s->bypass, {});
  if (!head) return run_steps(steps, x);
  steps.programs.push_back(find_program(op, head));
  const HeadProgram& last = steps.programs.back()->as<HeadProgram>(op, head, "head");
  STD_TORCH_CHECK(last.hidden == x.size(2), op, ": the head reads rows of ", last.hidden, ", x has ", shape_of(x));
  return run_steps(steps, x, nullptr, nullptr, &last);
}

// Barriers that the last run started by this thread passed.
int64_t layer_barriers() { return last_barriers; }

}  // namespace
}  // namespace cpullm

STABLE_TORCH_LIBRARY_FRAGMENT(cpullm, m) {
  // x [b, s, hidden] -> the same shape and type. cos, sin [1|b, s, rotary_dim]; mask [1|b, 1|h, s, length + s] bool or
  // added, none: causal. Caches [b, g, capacity, d] fp32 | bf16 | fp16, or int8 with fp32 scales [b, g, capacity]: hold
  // `length` tokens, the new ones are written behind them. No cache: attention over the s tokens. last: the result is
  // [b, 1, hidden], of the last token; of prompts whose attention does not count as that of few rows.
  m.def(
      "layer_forward(int program, Tensor x, Tensor? cos, Tensor? sin, Tensor? mask, Tensor(a!)? k_cache, "
      "Tensor(b!)? v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, int length, bool last=False) -> Tensor");
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
  // Several layers with what stays the same from token to token: programs, caches, rotary, groups and bypass as of
  // layers_forward; the number is good until stack_free, and the caches are kept as long. Their shapes and strides must
  // stay what they were; their memory may move.
  m.def("stack_create(int[] programs, Tensor[] caches, int[] rotary, int[] groups, int bypass) -> int");
  m.def("stack_free(int stack) -> ()");
  // rotary's indices point into angles; mask: of every layer. The caches of the stack take the new tokens. head: of
  // head_create, 0 for none: the result is what it makes of the last layer's, [b, s, n]. embedding: of embedding_create:
  // x is its rows of these ids [b, s]. first: -1, or angles are of many positions and the tokens' are those from it on.
  m.def(
      "stack_forward(int stack, Tensor x, Tensor[] angles, Tensor? mask, int length, int head=0, int embedding=0, "
      "int first=-1) -> Tensor");
  m.def("layer_barriers() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&cpullm::layer_forward));
  m.impl("layers_forward", TORCH_BOX(&cpullm::layers_forward));
  m.impl("layer_attention", TORCH_BOX(&cpullm::layer_attention));
  m.impl("layer_mlp", TORCH_BOX(&cpullm::layer_mlp));
  m.impl("stack_forward", TORCH_BOX(&cpullm::stack_forward));
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CompositeExplicitAutograd, m) {
  m.impl("layer_barriers", TORCH_BOX(&cpullm::layer_barriers));
  m.impl("stack_create", TORCH_BOX(&cpullm::stack_create));
  m.impl("stack_free", TORCH_BOX(&cpullm::stack_free));
}
