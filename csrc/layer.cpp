#include "layer.h"

#include <algorithm>

namespace cpullm {
namespace {

constexpr int64_t kMlpRows = 1024;          // rows of an MLP at a time: bounds its memory
constexpr int64_t kPrivateInputs =
    12 * 1024;  // up to here every thread quantises all rows itself: cheaper than a barrier

struct LayerRun {
  const LayerProgram& p;
  const LayerCall& c;
  const Kernels& kernels;
  Member member;
  Barrier& barrier;
  int64_t m, keys, qkv_width = 0;
  AttentionPlan plan;
  int64_t barriers = 0;

  // Shared by the team.
  float *qkv = nullptr, *attended = nullptr, *o_out = nullptr, *residual = nullptr, *up_out = nullptr;
  float *mlp_out = nullptr, *partial = nullptr, *fresh_k = nullptr, *fresh_v = nullptr;
  char *input_a = nullptr, *input_b = nullptr;
  // Of this thread.
  char *private_a = nullptr, *private_b = nullptr;
  float *normed = nullptr, *attention_scratch = nullptr;
  char* kernel_scratch = nullptr;

  // Cuts the arena into the memory above.
  LayerRun(const LayerProgram& program, const LayerCall& call, const Kernels& table, Member who, int64_t threads,
           Barrier& shared, Arena& arena)
      : p(program), c(call), kernels(table), member(who), barrier(shared) {
    m = c.batch * c.tokens;
    keys = c.length + c.tokens;
    for (int i = 0; i < p.qkv_count; ++i) qkv_width += p.qkv[i].w.n;
    plan = plan_attention(c.batch, c.tokens, p.heads, p.kv_heads, keys, p.head_dim);
    carve(arena, threads);
  }

  int64_t input_rows() const { return std::min(m, kMlpRows); }

  int64_t input_bytes(int64_t rows, int64_t k, int64_t group) const {
    Arena arena{nullptr};
    make_input(arena, kernels, p.compute, rows, k, group);
    return arena.used;
  }

  // Never where the MLP takes its rows in parts: the last part may be small, and there is no room for it.
  bool is_private(int64_t rows, int64_t k) const {
    return member.count > 1 && m <= kMlpRows && rows * k <= kPrivateInputs;
  }

  // Everything the run needs, in the same order whether memory is counted or handed out.
  void carve(Arena& arena, int64_t threads) {
    const int64_t rows = input_rows();
    qkv = arena.take<float>(m * qkv_width);
    attended = arena.take<float>(m * p.heads * p.head_dim);
    o_out = arena.take<float>(m * p.hidden);
    residual = p.parallel ? nullptr : arena.take<float>(m * p.hidden);
    up_out = arena.take<float>(rows * p.intermediate * (p.gated ? 2 : 1));
    mlp_out = arena.take<float>(rows * p.hidden);
    partial = arena.take<float>(plan.partial);
    const int64_t fresh = c.k_cache ? 0 : c.batch * p.kv_heads * c.tokens * p.head_dim;
    fresh_k = arena.take<float>(fresh);
    fresh_v = arena.take<float>(fresh);
    // The largest input of each slot: a holds the layer's input, b whatever comes later.
    const int64_t a_bytes = input_bytes(m, p.hidden, p.qkv[0].w.group);
    const int64_t b_bytes =
        std::max({input_bytes(m, p.heads * p.head_dim, p.o.w.group), input_bytes(rows, p.hidden, p.up[0].w.group),
                  input_bytes(rows, p.intermediate, p.down.w.group)});
    input_a = arena.take<char>(a_bytes);
    input_b = arena.take<char>(b_bytes);
    const int64_t narrowest = std::min({p.hidden, p.heads * p.head_dim, p.intermediate});
    const int64_t begin = arena.used;
    char* const base = arena.base;
    Arena own{base ? base + begin : nullptr};
    const auto cut = [&](Arena& mine) {
      private_a = mine.take<char>(is_private(m, p.hidden) ? a_bytes : 0);
      private_b = mine.take<char>(is_private(m, narrowest) ? b_bytes : 0);
      normed = mine.take<float>(kMaxTile * p.hidden);
      attention_scratch = mine.take<float>(plan.scratch);
      kernel_scratch = mine.take<char>(kScratchBytes);
    };
    Arena count{nullptr};
    cut(count);
    own.base = base ? base + begin + member.id * count.used : nullptr;
    cut(own);
    arena.used = begin + threads * count.used;
  }

  void sync() {
    barrier.wait(member.count);
    ++barriers;
  }

  Range mine(int64_t count) const {
    Range r;
    share(count, member, r.begin, r.end);
    return r;
  }

  // Inputs that can be quantised on their own: whole blocks and whole groups.
  static int64_t quantize_unit(int64_t k_padded, int64_t group) {
    if (group >= k_padded || kActBlock % group == 0) return kActBlock;
    return group % kActBlock == 0 ? group : k_padded;
  }

  // norm(rows) (or the rows themselves) as input of the next products. Ends with everything visible to this thread.
  Input input(char* shared, char* own, const LayerNorm& norm, const Rows& rows, int64_t group) {
    const bool alone = member.count == 1 || is_private(rows.m, rows.k);
    Arena arena{is_private(rows.m, rows.k) ? own : shared};
    const Input in = make_input(arena, kernels, p.compute, rows.m, rows.k, group);
    const int64_t tile = in.tile;
    const int64_t tiles = (rows.m + tile - 1) / tile;
    const bool split_k =
        in.kind == Compute::int8 && !alone && tiles == 1;  // few rows: every thread takes some inputs of all of them
    const Range part = alone || split_k ? Range{0, tiles} : mine(tiles);
    int64_t k0 = 0, k1 = round_up(rows.k, kChunk);
    if (split_k) {
      const int64_t k_padded = k1, unit = quantize_unit(k_padded, group);
      const Range units = mine((k_padded + unit - 1) / unit);
      k0 = units.begin * unit;
      k1 = std::min(units.end * unit, k_padded);
    }
    for (int64_t t = part.begin; t < part.end && k0 < k1; ++t) {
      const int64_t row0 = t * tile, count = std::min(tile, rows.m - row0);
      Rows from = rows;
      from.x = element_of(rows.x, row0 * rows.stride, rows.type);
      from.m = count;
      if (norm.present) {
        kernels.norm(norm.norm, from, normed, rows.k, {0, count});
        from = {normed, count, rows.k, rows.k, Float::f32, nullptr};
      }
      from.x = element_of(from.x, k0, from.type);
      from.k = std::min(k1, rows.k) - k0;
      load(kernels, from, tile_of(in, t, count, k0, k1), {0, count});
    }
    if (!alone) sync();
    return in;
  }

  void product(const Linear& l, const Input& in, float* out, int64_t stride, Range part) {
    cpullm::product(kernels, l, in, out, stride, part, kernel_scratch);
  }

  // This thread's columns of products that share an input and stand side by side in `out`.
  void products(const Linear* linears, int count, const Input& in, float* out, int64_t stride) {
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += panels_of(linears[i].w);
    const Range part = mine(total);
    int64_t first = 0, column = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t panels = panels_of(linears[i].w);
      const Range own{std::max<int64_t>(part.begin - first, 0), std::min(part.end - first, panels)};
      product(linears[i], in, out + column, stride, own);
      first += panels;
      column += linears[i].w.n;
    }
  }

  Heads heads_of(int64_t start, int64_t heads, int64_t per_group, int64_t group_stride) const {
    return {qkv + start, qkv_width, heads, per_group, group_stride, p.head_dim, p.head_dim};
  }

  // Norm and rope of queries and keys, keys and values to the cache: per row and head.
  void place_heads(const Append& to_k, const Append& to_v) {
    const Heads q = heads_of(0, p.heads, p.layout.q_per_group, p.layout.group_stride);
    const Heads k = heads_of(p.layout.k_start, p.kv_heads, 1, p.layout.kv_stride);
    if (p.qk_norm_whole) {  // over all heads of a row: the layout has them side by side
      const Range rows = mine(m);
      const auto whole = [&](const LayerNorm& norm, float* x, int64_t width) {
        const Rows in{x, m, width, qkv_width, Float::f32, nullptr};
        if (norm.present) kernels.norm(norm.norm, in, x, qkv_width, rows);
      };
      whole(p.q_norm, q.x, p.heads * p.head_dim);
      whole(p.k_norm, k.x, p.kv_heads * p.head_dim);
      sync();
    }
    const Range q_items = mine(m * p.heads), k_items = mine(m * p.kv_heads);
    if (!p.qk_norm_whole) {
      if (p.q_norm.present) kernels.norm_heads(p.q_norm.norm, q, q_items);
      if (p.k_norm.present) kernels.norm_heads(p.k_norm.norm, k, k_items);
    }
    if (p.rotary_dim) {
      const Rope rope{
          c.cos, c.sin, c.rope_type, p.rope_style, p.rotary_dim, c.tokens, {c.rope_stride[0], c.rope_stride[1]}};
      kernels.rope(rope, q, q_items);
      kernels.rope(rope, k, k_items);
    }
    kernels.append(to_k, k_items);
    kernels.append(to_v, k_items);
  }

  Append append_to(int64_t start, void* cache, float* scale, const int64_t* stride, const int64_t* scale_stride) const {
    return {heads_of(start, p.kv_heads, 1, p.layout.kv_stride),
            cache,
            scale,
            c.k_cache ? c.cache_type : CacheType::f32,
            c.tokens,
            c.length,
            {stride[0], stride[1], stride[2]},
            {scale_stride[0], scale_stride[1]}};
  }

  void attend() {
    const int64_t d = p.head_dim, g = p.kv_heads;
    const int64_t fresh_stride[3] = {g * c.tokens * d, c.tokens * d, d}, no_scale[2] = {0, 0};
    const bool cached = c.k_cache != nullptr;
    void *k = cached ? c.k_cache : fresh_k, *v = cached ? c.v_cache : fresh_v;
    const int64_t *k_stride = cached ? c.k_stride : fresh_stride, *v_stride = cached ? c.v_stride : fresh_stride;
    const int64_t *ks = cached ? c.k_scale_stride : no_scale, *vs = cached ? c.v_scale_stride : no_scale;
    place_heads(append_to(p.layout.k_start, k, c.k_scale, k_stride, ks),
                append_to(p.layout.v_start, v, c.v_scale, v_stride, vs));
    sync();
    const int64_t per = p.heads / g;
    Attention a{};
    a.q = qkv;
    a.k = k;
    a.v = v;
    a.k_scale = c.k_scale;
    a.v_scale = c.v_scale;
    a.mask = c.mask;
    a.sinks = p.sinks;
    a.out = attended;
    a.partial = partial;
    a.batch = c.batch;
    a.queries = c.tokens;
    a.heads = p.heads;
    a.kv_heads = g;
    a.length = keys;
    a.width = d;
    // Query head i of kv head c is head c * per + i; q_per_group is heads, per or 1.
    const QkvLayout& l = p.layout;
    const int64_t head_stride = l.q_per_group == 1 ? l.group_stride : d;
    const int64_t q_stride[4] = {c.tokens * qkv_width, qkv_width,
                                 l.q_per_group == per && per > 1 ? l.group_stride : per * head_stride, head_stride};
    std::copy_n(q_stride, 4, a.q_stride);
    std::copy_n(k_stride, 3, a.k_stride);
    std::copy_n(v_stride, 3, a.v_stride);
    std::copy_n(ks, 2, a.k_scale_stride);
    std::copy_n(vs, 2, a.v_scale_stride);
    std::copy_n(c.mask_stride, 3, a.mask_stride);
    const int64_t out_stride[3] = {c.tokens * p.heads * d, p.heads * d, d};
    std::copy_n(out_stride, 3, a.out_stride);
    a.scale = p.scale;
    a.softcap = p.softcap;
    a.window = p.window;
    a.type = cached ? c.cache_type : CacheType::f32;
    a.mask_type = c.mask_type;
    a.mask_is_bool = c.mask_is_bool;
    kernels.attention(a, mine(plan.items), attention_scratch);
    sync();
    if (plan.combine_items) {
      kernels.combine_attention(a, mine(plan.combine_items));
      sync();
    }
  }

  // out = x + a * scale (b null), or x + (a + b) * scale, for `rows` and columns [c0, c1); strides in elements.
  void add(const void* x, Float x_type, int64_t x_stride, const float* a, const float* b, void* out, Float out_type,
           int64_t out_stride, Range rows, int64_t c0, int64_t c1) {
    if (c0 >= c1 || rows.begin >= rows.end) return;
    const Sum s{element_of(x, c0, x_type),
                a + c0,
                b ? b + c0 : nullptr,
                const_cast<void*>(element_of(out, c0, out_type)),
                p.residual_scale,
                x_type,
                out_type,
                c1 - c0,
                x_stride,
                p.hidden,
                p.hidden,
                out_stride};
    kernels.sum(s, rows);
  }

  // This thread's columns of a product with `hidden` outputs.
  Range hidden_columns() const {
    const Range part = mine((p.hidden + kPanel - 1) / kPanel);
    return {part.begin * kPanel, std::min(part.end * kPanel, p.hidden)};
  }

  // out = norm(a) in place where there is a norm, then x + a; whole rows after a norm, this thread's columns without.
  void finish(const LayerNorm& norm, float* a, int64_t rows, const void* x, Float x_type, int64_t x_stride, void* out,
              Float out_type, int64_t out_stride) {
    if (!norm.present) {
      const Range columns = hidden_columns();
      add(x, x_type, x_stride, a, nullptr, out, out_type, out_stride, {0, rows}, columns.begin, columns.end);
      return;
    }
    sync();
    const Range part = mine(rows);
    const Rows in{a, rows, p.hidden, p.hidden, Float::f32, nullptr};
    kernels.norm(norm.norm, in, a, p.hidden, part);
    add(x, x_type, x_stride, a, nullptr, out, out_type, out_stride, part, 0, p.hidden);
  }

  // up_out [rows, intermediate] (stride `width`) = act(gate) * up; this thread's columns.
  void up_and_act(const Input& in, int64_t rows, int64_t width) {
    const int64_t panels = (p.intermediate + kPanel - 1) / kPanel;
    const Range part = mine(panels);
    float *gate = up_out, *up = p.gated ? up_out + p.intermediate : nullptr;
    int64_t c0 = part.begin * kPanel, c1 = std::min(part.end * kPanel, p.intermediate);
    if (p.gated && p.up_count == 1 && p.intermediate % kPanel) {  // halves do not begin at panels
      products(p.up, 1, in, up_out, width);
      sync();
    } else if (p.gated && p.up_count == 1) {
      product(p.up[0], in, up_out, width, part);
      product(p.up[0], in, up_out, width, {part.begin + panels, part.end + panels});
    } else {
      product(p.up[0], in, gate, width, part);
      if (p.gated) product(p.up[1], in, up, width, part);
    }
    if (c0 >= c1) return;
    const Activation act{gate + c0, up ? up + c0 : nullptr, gate + c0, c1 - c0, width, width, width, p.act};
    kernels.activation(act, {0, rows});
  }

  // Rows [row0, row0 + rows) of the MLP of `source` (or of a ready input) and of the layer's output.
  void mlp(const Input* ready, const Rows& source, int64_t row0) {
    const int64_t rows = source.m, width = p.intermediate * (p.gated ? 2 : 1);
    const Input in = ready ? *ready : input(input_b, private_b, p.mlp_norm, source, p.up[0].w.group);
    up_and_act(in, rows, width);
    sync();
    const Rows acted{up_out, rows, p.intermediate, width, Float::f32, nullptr};
    const Input down_in = input(input_b, private_b, {}, acted, p.down.w.group);
    products(&p.down, 1, down_in, mlp_out, p.hidden);
    void* y = const_cast<void*>(element_of(c.y, row0 * p.hidden, c.type));
    const void* x = element_of(c.x, row0 * c.x_stride, c.type);
    if (p.parallel) {
      const Range columns = hidden_columns();
      add(x, c.type, c.x_stride, o_out + row0 * p.hidden, mlp_out, y, c.type, p.hidden, {0, rows}, columns.begin,
          columns.end);
    } else {
      finish(p.post_mlp_norm, mlp_out, rows, residual + row0 * p.hidden, Float::f32, p.hidden, y, c.type, p.hidden);
    }
  }

  void run() {
    const Rows x{c.x, m, p.hidden, c.x_stride, c.type, nullptr};
    const Input h = input(input_a, private_a, p.input_norm, x, p.qkv[0].w.group);
    products(p.qkv, p.qkv_count, h, qkv, qkv_width);
    sync();
    attend();
    const Rows attended_rows{attended, m, p.heads * p.head_dim, p.heads * p.head_dim, Float::f32, nullptr};
    const Input a = input(input_b, private_b, {}, attended_rows, p.o.w.group);
    products(&p.o, 1, a, o_out, p.hidden);
    if (!p.parallel) finish(p.post_attention_norm, o_out, m, c.x, c.type, c.x_stride, residual, Float::f32, p.hidden);
    sync();  // the residual is whole, and nobody reads input b any more
    const bool reuse = p.parallel && !p.mlp_norm.present;
    if (reuse && m <= kMlpRows) return mlp(&h, x, 0);
    for (int64_t row0 = 0; row0 < m; row0 += kMlpRows) {
      const int64_t rows = std::min(kMlpRows, m - row0);
      Rows source = p.parallel ? x : Rows{residual, m, p.hidden, p.hidden, Float::f32, nullptr};
      source.x = element_of(source.x, row0 * source.stride, source.type);
      source.m = rows;
      if (row0) sync();  // the chunk before is done with the shared buffers
      if (reuse) {
        const Input again = input(input_b, private_b, p.input_norm, source, p.up[0].w.group);
        mlp(&again, source, row0);
      } else {
        mlp(nullptr, source, row0);
      }
    }
  }
};

}  // namespace

int64_t layer_workspace(const LayerProgram& program, const LayerCall& call, const Kernels& kernels, int64_t threads) {
  Barrier barrier;
  Arena arena{nullptr};
  LayerRun(program, call, kernels, {0, threads}, threads, barrier, arena);
  return arena.used;
}

int64_t run_layer(const LayerProgram& program, const LayerCall& call, const Kernels& kernels, Member member,
                  int64_t threads, Barrier& barrier, char* workspace) {
  Arena arena{workspace};
  LayerRun run(program, call, kernels, member, threads, barrier, arena);
  run.run();
  return run.barriers;
}

}  // namespace cpullm
