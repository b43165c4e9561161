#include "layer.h"

#include "layer_heads.h"
#include "layer_last.h"

namespace cpullm {
namespace {

// Panels of all queries, keys and values.
int64_t qkv_panels(const LayerGroup& group) {
  int64_t total = 0;
  for (int64_t i = 0; i < group.count; ++i)
    for (int j = 0; j < group.layers[i].program->qkv_count; ++j)
      total += panels_of(group.layers[i].program->qkv[j].w.n);
  return total;
}

struct LayerRun {
  const LayerGroup& g;
  Team team;
  Part parts[kMostMembers];
  int64_t m, hidden;
  bool parallel, lp;
  int64_t blocks;  // of rows, if it goes by blocks, else 0: see layer_rows.h
  bool in_block = false;  // whether this is a run of some of the rows by one thread
  int64_t first_row = 0;  // of these
  Compute compute;
  LayerCall c;  // what all members share
  bool spread;  // members on several ranks
  RankSum *parts_sum, *members_sum;  // of a cut layer, of a spread group; null where the group has none
  float* residual = nullptr;  // x + sum a, then of a spread group what its members here add to x

  LayerRun(const LayerGroup& group, const Kernels& kernels, Member who, int64_t threads, Barrier& barrier,
           Slices* slices, Ahead& ahead, Arena& arena, RankSums sums)
      : g(group),
        team{kernels, who, barrier, slices, ahead},
        c(group.layers[0].call),
        spread(is_spread(group.summed)),
        parts_sum(sums.of_parts(group.summed)),
        members_sum(spread ? sums.all : nullptr) {
    const LayerProgram& first = *g.layers[0].program;
    m = c.batch * c.tokens;
    hidden = first.hidden;
    parallel = first.parallel;
    compute = first.compute;
    lp = g.count == 1 || g.bypass == kAllMembers;
    const bool by_rows = goes_by_rows(kernels, compute, m, threads) && c.stage == Stage::whole && !c.tiled &&
                         !parallel && !parts_sum && !spread;
    blocks = by_rows ? blocks_of_rows(kernels, m, threads) : 0;
    for (int64_t i = 0; i < g.count; ++i) {
      Part& part = parts[i];
      part = {};
      part.p = g.layers[i].program;
      part.c = &g.layers[i].call;
      for (int j = 0; j < part.p->qkv_count; ++j) part.qkv_width += part.p->qkv[j].w.n;
      part.plan = plan_attention(c.batch, c.tokens, part.p->heads, part.p->kv_heads, c.length + c.tokens,
                                 part.p->head_dim, part.c->mask ? 0 : part.p->window, c.tiled);
    }
    carve(arena, threads);
  }

  Part* begin() { return parts; }
  Part* end() { return parts + g.count; }

  // Everything the run needs, in the same order whether memory is counted or handed out.
  void carve(Arena& arena, int64_t threads) {
    const int64_t block = blocks ? m / blocks : m;  // there are blocks of one more
    const int64_t most = blocks ? block + 1 : m, rows = std::min(most, kMlpRows);
    int64_t scratch = 0;
    for (Part& part : *this) {
      const LayerProgram& p = *part.p;
      part.qkv = arena.take<float>(m * part.qkv_width);
      part.attended = arena.take<float>(m * p.heads * p.head_dim);
      part.partial = arena.take<float>(part.plan.partial);
      const int64_t fresh = part.c->k_cache ? 0 : c.batch * p.kv_heads * c.tokens * p.head_dim;
      part.fresh_k = arena.take<float>(fresh);
      part.fresh_v = arena.take<float>(fresh);
      scratch = std::max(scratch, part.plan.scratch);
    }
    const auto steps = [&](Arena& at) {  // what is read by whoever has a block of rows
      residual = parallel && !spread ? nullptr : at.take<float>(most * hidden);
      for (Part& part : *this) {
        const LayerProgram& p = *part.p;
        part.o_out = at.take<float>(most * hidden);
        part.source = parallel || lp ? residual : at.take<float>(most * hidden);
        const bool by_panels = blocks && acts_by_panels(p);
        part.up_out = at.take<float>(rows * (by_panels ? kPanelsAtOnce * kPanel : p.intermediate) * (p.gated ? 2 : 1));
        part.mlp_out = at.take<float>(rows * hidden);
        part.a_bytes = std::max(team.a_bytes(p, block), team.a_bytes(p, most));
        if (by_panels)
          for (const int64_t some : {block, most})
            part.a_bytes = std::max(part.a_bytes, team.input_bytes(compute, some, p.intermediate, p.down.w.group));
        part.b_bytes = std::max(team.b_bytes(p, block), team.b_bytes(p, most));
        part.input_a = at.take<char>(part.a_bytes);
        part.input_b = at.take<char>(part.b_bytes);
      }
    };
    if (!blocks) steps(arena);
    const int64_t begin = arena.used;
    char* const base = arena.base;
    const auto cut = [&](Arena& mine) {
      if (blocks) steps(mine);
      for (Part& part : *this) {
        const int64_t narrowest = std::min({hidden, part.p->heads * part.p->head_dim, part.p->intermediate});
        part.private_a = mine.take<char>(team.is_private(m, m, hidden) ? part.a_bytes : 0);
        part.private_b = mine.take<char>(team.is_private(m, m, narrowest) ? part.b_bytes : 0);
      }
      team.normed = mine.take<float>(kMaxTile * hidden);
      team.attention_scratch = mine.take<float>(scratch);
      team.kernel_scratch = mine.take<char>(kScratchBytes);
    };
    Arena count{nullptr};
    cut(count);
    Arena own{base ? base + begin + team.member.id * count.used : nullptr};
    cut(own);
    arena.used = begin + threads * count.used;
  }

  // norm(rows) as the input of products with `reader`, in one of the part's slots. Returns whether the others must be
  // waited for.
  bool input(Input& in, char* shared, char* own, const LayerNorm& norm, Rows rows, const Linear& reader) {
    const int64_t group = reader.w.group;
    rows.order = reader.order;
    const bool mine = team.is_private(m, rows.m, rows.k), alone = team.member.count == 1 || mine;
    Arena arena{mine ? own : shared};
    in = make_input(arena, team.kernels, compute, rows.m, rows.k, group);
    team.fill(in, alone, norm, rows, group);
    return !alone;
  }

  // The next products are those with `hidden` outputs.
  void expect_hidden(Linear LayerProgram::* next) {
    team.ahead = {};
    team.ahead.expect(parts[0].p->*next, team.mine(panels_of(hidden)));
  }

  // The next products are those of up_and_act().
  void expect_up() {
    team.ahead = {};
    int64_t total = 0;
    for (const Part& part : *this) total += panels_of(part.p->intermediate);
    Shared shared{team.mine(total)};
    for (const Part& part : *this) team.ahead.expect(part.p->up[0], shared.next(panels_of(part.p->intermediate)));
  }

  // All queries, keys and values.
  void project() {
    team.each(qkv_panels(g), hidden, m, [&](Range panels) {
      Shared shared{panels};
      for (Part& part : *this) {
        int64_t column = 0;
        for (int i = 0; i < part.p->qkv_count; ++i) {
          const Linear& l = part.p->qkv[i];
          float* const to = part.qkv + first_row * part.qkv_width + column;
          team.product(l, part.h, to, part.qkv_width, shared.next(panels_of(l.w.n)));
          column += l.w.n;
        }
      }
    });
  }

  // Queries, keys and values as attention reads them.
  void place() {
    bool whole = false;
    for (Part& part : *this) {
      if (part.p->qk_norm_whole) norm_whole_rows(team, part, first_row, m);
      whole |= part.p->qk_norm_whole;
    }
    if (whole) team.sync();
    for (const Part& part : *this) place_heads(team, part, first_row, m);
  }

  void attend() {
    int64_t items = 0, combine_items = 0;
    for (Part& part : *this) {
      items += part.plan.items;
      combine_items += part.plan.combine_items;
    }
    Shared shared{team.mine(items)};
    for (const Part& part : *this) team.kernels.attention(part.a, shared.next(part.plan.items), team.attention_scratch);
    team.sync();
    if (!combine_items) return;
    Shared combined{team.mine(combine_items)};
    for (const Part& part : *this) {
      if (part.plan.combine_items) team.kernels.combine_attention(part.a, combined.next(part.plan.combine_items));
    }
    team.sync();
  }

  Area columns_of(Range panels, int64_t rows) const {
    return {{0, rows}, {panels.begin * kPanel, std::min(panels.end * kPanel, hidden)}, hidden};
  }

  Area own_columns(int64_t rows) const { return columns_of(team.mine(panels_of(hidden)), rows); }

  // f(panels) for products with `hidden` outputs; where sums over ranks follow, each thread has its own columns.
  template <class F>
  void hidden_panels(int64_t k, int64_t rows, const F& f) const {
    const int64_t panels = panels_of(hidden);
    parts_sum || spread ? f(team.mine(panels)) : team.each(panels, g.count * k, rows, f);
  }

  bool any_has(LayerNorm LayerProgram::* norm) const {
    return std::any_of(parts, parts + g.count, [&](const Part& part) { return (part.p->*norm).present; });
  }

  // x [rows, hidden] <- its sum over ranks; every thread has its own columns, before and after. False: a rank is lost.
  bool sum_ranks(RankSum* sum, float* x, int64_t rows) {
    if (!sum) return true;
    const Range own = own_columns(rows).columns;
    team.barriers += sum->sum(x, rows, hidden, own.begin, own.end, team.member, team.barrier);
    return !sum->gone();
  }

  // `out` of each part <- its sum over the ranks that cut the layers.
  bool sum_parts(float* Part::* out, int64_t rows) {
    return std::all_of(parts, parts + g.count, [&](const Part& part) { return sum_ranks(parts_sum, part.*out, rows); });
  }

  // The area for adding what each part left in `out`, after a norm in place of those that have one.
  Area finish(LayerNorm LayerProgram::* norm, float* Part::* out, int64_t rows) {
    if (!any_has(norm)) return own_columns(rows);
    team.sync();
    const Area area{team.mine(rows), {0, hidden}, hidden};
    for (Part& part : *this) {
      const Rows in{part.*out, rows, hidden, hidden, Float::f32, nullptr};
      if ((part.p->*norm).present) team.kernels.norm((part.p->*norm).norm, in, part.*out, hidden, area.rows);
    }
    return area;
  }

  // residual = x + sum a_l, and what each MLP reads where that is something else. Out of place: nothing else that an MLP
  // reads gets into the residual.
  void add_attention(const Area& area) {
    const auto onto = [&](float* to, bool first, const Part& part) {
      const void* from = first ? c.x : to;
      team.add(area, part.p->residual_scale, from, first ? c.type : Float::f32, first ? c.x_stride : hidden, part.o_out,
               nullptr, to, Float::f32);
    };
    for (int64_t i = 0; i < g.count; ++i) {
      onto(residual, i == 0, parts[i]);
      if (lp) continue;
      onto(parts[i].source, true, parts[i]);
      for (int64_t j = std::max<int64_t>(i - g.bypass, 0); j < i; ++j) onto(parts[i].source, false, parts[j]);
    }
  }

  // Rows [row0, row0 + rows) of what the MLP of a part reads.
  Rows source_rows(const Part& part, int64_t row0, int64_t rows) const {
    if (!parallel && c.stage == Stage::whole)
      return {part.source + row0 * hidden, rows, hidden, hidden, Float::f32, nullptr};
    return {element_of(c.x, row0 * c.x_stride, c.type), rows, hidden, c.x_stride, c.type, nullptr};
  }

  // Rows [row0, row0 + rows) of y = x + the sum over ranks of what the members here add to x. False: a rank is lost.
  bool sum_members(int64_t row0, int64_t rows) {
    const bool normed = any_has(&LayerProgram::post_mlp_norm), first = !parts_sum || parts_sum->rank() == 0;
    if (normed && !sum_parts(&Part::mlp_out, rows)) return false;
    const Area area = finish(&LayerProgram::post_mlp_norm, &Part::mlp_out, rows), own = own_columns(rows);
    float* const added = residual + row0 * hidden;  // no MLP reads these rows any more
    for (int64_t row = area.rows.begin; row < area.rows.end; ++row)
      std::fill(added + row * hidden + area.columns.begin, added + row * hidden + area.columns.end, 0.0f);
    for (const Part& part : *this) {
      // What all ranks of a team have whole by now, the first one adds.
      const float* const a = first || parallel ? part.o_out + row0 * hidden : nullptr;
      const float* const mlp = first || !normed ? part.mlp_out : nullptr;
      if (a || mlp)
        team.add(area, part.p->residual_scale, added, Float::f32, hidden, a ? a : mlp, a ? mlp : nullptr, added,
                 Float::f32);
    }
    if (normed) team.sync();
    if (!sum_ranks(members_sum, added, rows)) return false;
    team.add(own, 1.0f, element_of(c.x, row0 * c.x_stride, c.type), c.type, c.x_stride, added, nullptr,
             const_cast<void*>(element_of(c.y, row0 * hidden, c.type)), c.type);
    return true;
  }

  // Rows [row0, row0 + rows) of the MLPs and of the group's output. False: a rank is lost.
  bool mlp(int64_t row0, int64_t rows) {
    bool wait = false;
    for (Part& part : *this) {
      const LayerProgram& p = *part.p;
      const LayerProgram& first = *parts[0].p;
      const LayerNorm& norm = parallel && !p.mlp_norm.present ? p.input_norm : p.mlp_norm;
      const LayerNorm& other = parallel && !first.mlp_norm.present ? first.input_norm : first.mlp_norm;
      if (parallel && !p.mlp_norm.present && rows == m && c.stage == Stage::whole) {
        part.in = part.h;
      } else if (&part != parts && (parallel || lp) && read_alike(p.up[0], first.up[0]) && alike(norm, other, hidden)) {
        part.in = parts[0].in;
      } else {
        wait |= input(part.in, part.input_b, part.private_b, norm, source_rows(part, row0, rows), p.up[0]);
      }
    }
    if (wait) team.sync();
    up_and_act(*this, rows);
    expect_hidden(&LayerProgram::down);
    team.sync();
    wait = false;
    for (Part& part : *this) {
      const LayerProgram& p = *part.p;
      if (in_block && acts_by_panels(p)) {
        part.in = part.h;
        continue;
      }
      const Rows acted{part.up_out, rows, p.intermediate, p.intermediate * (p.gated ? 2 : 1), Float::f32, nullptr};
      wait |= input(part.in, part.input_b, part.private_b, {}, acted, p.down);
    }
    if (wait) team.sync();
    team.ahead = {};  // what follows is for the caller to say
    const int64_t width = parts[0].p->intermediate;
    if (c.stage == Stage::mlp) {
      float* const to = static_cast<float*>(c.y) + row0 * hidden;
      hidden_panels(width, rows, [&](Range some) { team.product(parts[0].p->down, parts[0].in, to, hidden, some); });
      return true;
    }
    const bool at_once = !parts_sum && !spread && !any_has(&LayerProgram::post_mlp_norm);
    hidden_panels(width, rows, [&](Range some) {
      for (Part& part : *this) team.product(part.p->down, part.in, part.mlp_out, hidden, some);
      if (at_once) add_mlp(columns_of(some, rows), row0, parallel);
    });
    if (at_once) return true;
    if (spread) return sum_members(row0, rows);
    const bool added = parallel && parts_sum;  // a and m of a parallel layer are one sum over ranks
    if (added) {
      float* const own = parts[0].mlp_out;
      team.add(own_columns(rows), 1.0f, own, Float::f32, hidden, parts[0].o_out + row0 * hidden, nullptr, own,
               Float::f32);
    }
    if (!sum_parts(&Part::mlp_out, rows)) return false;
    add_mlp(finish(&LayerProgram::post_mlp_norm, &Part::mlp_out, rows), row0, parallel && !added);
    return true;
  }

  // The group's output from the MLPs', both: and attention's, in the order of the members. Sums between are fp32: in the
  // residual, or where the first MLP's output was.
  void add_mlp(const Area& area, int64_t row0, bool both) {
    const void* from = parallel ? element_of(c.x, row0 * c.x_stride, c.type) : residual + row0 * hidden;
    Float type = parallel ? c.type : Float::f32;
    int64_t stride = parallel ? c.x_stride : hidden;
    for (Part& part : *this) {
      const bool last = &part + 1 == end();
      float* const between = parallel ? parts[0].mlp_out : residual + row0 * hidden;
      void* const to = last ? const_cast<void*>(element_of(c.y, row0 * hidden, c.type)) : between;
      const float* const own = part.mlp_out;
      const float* const first = both ? part.o_out + row0 * hidden : own;
      team.add(area, part.p->residual_scale, from, type, stride, first, both ? own : nullptr, to,
               last ? c.type : Float::f32);
      from = to;
      type = Float::f32;
      stride = hidden;
    }
  }

  // norm(x) Wq, Wk, Wv; norm and rope; keys and values to the cache.
  void before_attention() {
    const Rows x{c.x, m, hidden, c.x_stride, c.type, nullptr};
    bool wait = false;
    for (Part& part : *this) {
      const LayerProgram& p = *part.p;
      const LayerProgram& first = *parts[0].p;
      if (&part != parts && read_alike(p.qkv[0], first.qkv[0]) && alike(p.input_norm, first.input_norm, hidden)) {
        part.h = parts[0].h;
      } else {
        wait |= input(part.h, part.input_a, part.private_a, p.input_norm, x, p.qkv[0]);
      }
    }
    if (wait) team.sync();
    project();
    expect_hidden(&LayerProgram::o);
    team.sync();
    place();
  }

  // a Wo of each part, in its o_out or, where that is all, in y; the residual. False: a rank is lost.
  bool after_attention() {
    bool wait = false;
    for (Part& part : *this) {
      const int64_t width = part.p->heads * part.p->head_dim;
      const Rows attended{part.attended + first_row * width, m, width, width, Float::f32, nullptr};
      wait |= input(part.in, part.input_b, part.private_b, {}, attended, part.p->o);
    }
    if (wait) team.sync();
    const bool add = c.stage == Stage::whole && !parallel;
    const bool at_once = add && !parts_sum && !spread && !any_has(&LayerProgram::post_attention_norm);
    hidden_panels(parts[0].p->heads * parts[0].p->head_dim, m, [&](Range some) {
      for (Part& part : *this) {
        float* const to = c.stage == Stage::attention ? static_cast<float*>(c.y) : part.o_out;
        team.product(part.p->o, part.in, to, hidden, some);
      }
      if (at_once) add_attention(columns_of(some, m));
    });
    expect_up();
    if (!add || at_once) return true;
    if (!sum_parts(&Part::o_out, m)) return false;
    add_attention(finish(&LayerProgram::post_attention_norm, &Part::o_out, m));
    return true;
  }

  bool attention() {
    before_attention();
    team.sync();
    attend();
    return after_attention();
  }

  void run() {
    for (Part& part : *this) part.a = part.attention();
    if (blocks) return run_by_rows(*this);
    if (c.stage != Stage::mlp && !attention()) return;
    if (c.stage != Stage::attention) after_residual();
  }

  // The MLPs.
  void after_residual() {
    if (c.stage == Stage::whole) team.sync();  // the residual is whole, and nobody reads input b any more
    for (int64_t row0 = 0; row0 < m; row0 += kMlpRows) {
      if (row0) team.sync();  // the rows before are done with the shared buffers
      if (!mlp(row0, std::min(kMlpRows, m - row0))) return;
    }
  }
};

}  // namespace

int64_t layer_workspace(const LayerGroup& group, const Kernels& kernels, int64_t threads) {
  Barrier barrier;
  Arena arena{nullptr};
  Ahead ahead;
  const auto count = [&](const LayerGroup& g) {
    LayerRun(g, kernels, {0, threads}, threads, barrier, nullptr, ahead, arena, {});
  };
  count(group);
  if (!group.layers[0].call.last) return arena.used;
  const Layer last = last_of(group.layers[0]);
  count({&last, 1, group.bypass});
  return arena.used;
}

int64_t run_layers(const LayerGroup& group, const Kernels& kernels, Member member, int64_t threads, Barrier& barrier,
                   Slices* slices, Ahead& ahead, char* workspace, RankSums sums) {
  Arena arena{workspace};
  LayerRun run(group, kernels, member, threads, barrier, slices, ahead, arena, sums);
  if (!group.layers[0].call.last) {
    run.run();
    return run.team.barriers;
  }
  const Layer last = last_of(group.layers[0]);
  const LayerGroup alone{&last, 1, group.bypass};
  LayerRun tail(alone, kernels, member, threads, barrier, slices, ahead, arena, {});
  run_last(run, tail);
  return run.team.barriers + tail.team.barriers;
}

void expect_layers(const LayerGroup& group, const Member& member, Ahead& ahead) {
  ahead = {};
  Shared shared{share(qkv_panels(group), member)};
  for (int64_t i = 0; i < group.count; ++i) {
    const LayerProgram& p = *group.layers[i].program;
    for (int j = 0; j < p.qkv_count; ++j) ahead.expect(p.qkv[j], shared.next(panels_of(p.qkv[j].w.n)));
  }
}

}  // namespace cpullm
