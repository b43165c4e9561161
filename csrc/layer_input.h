// What a layer's steps share: a layer of the group and its memory, a thread's place in the team, and what it does with rows
// that products read. Part of layer.cpp.
#pragma once

#include <algorithm>

#include "ahead.h"
#include "input.h"
#include "layer.h"

namespace cpullm {
namespace {

constexpr int64_t kMlpRows = 1024;  // rows of an MLP at a time: bounds its memory
constexpr int64_t kPrivateInputs = 12 * 1024;  // up to here every thread quantises all rows: cheaper than a barrier

// Whether two norms compute the same.
inline bool alike(const LayerNorm& a, const LayerNorm& b, int64_t width) {
  if (!a.present || !b.present) return a.present == b.present;
  return a.norm.eps == b.norm.eps && a.norm.layer == b.norm.layer && same(a.norm.gain, b.norm.gain, width) &&
         same(a.norm.bias, b.norm.bias, width);
}

// Where a thread adds: columns of products with `hidden` outputs that it has made, or after norms of whole rows, its rows.
struct Area {
  Range rows, columns;
  int64_t hidden;
};

// One thread's place in the team, and its scratch memory.
struct Team {
  const Kernels& kernels;
  Member member;
  Barrier& barrier;
  Slices* slices;
  Ahead& ahead;
  int64_t barriers = 0;
  float *normed = nullptr, *attention_scratch = nullptr;
  char* kernel_scratch = nullptr;

  void sync() {
    barrier.wait(member.count, ahead);
    ++barriers;
  }

  Range mine(int64_t count) const { return share(count, member); }

  // f(panels) for parts of [0, count): this thread's, and what others have not come to. k inputs, `rows` rows: see divide().
  template <class F>
  void each(int64_t count, int64_t k, int64_t rows, const F& f) const {
    divide(count, panel_weights(k, rows), member, slices, [&](int64_t begin, int64_t end) { f(Range{begin, end}); });
  }

  int64_t input_bytes(Compute compute, int64_t rows, int64_t k, int64_t group) const {
    Arena arena{nullptr};
    make_input(arena, kernels, compute, rows, k, group);
    return arena.used;
  }

  // Whether every thread makes an input [rows, k] of a layer with m rows for itself. Never where the MLP takes its rows in
  // parts: the last part may be small, and there is no room for it.
  bool is_private(int64_t m, int64_t rows, int64_t k) const {
    return member.count > 1 && m <= kMlpRows && rows * k <= kPrivateInputs;
  }

  // The largest input of each slot of a layer with m rows: a holds the layer's input, b whatever comes later.
  int64_t a_bytes(const LayerProgram& p, int64_t m) const {
    return input_bytes(p.compute, m, p.hidden, p.qkv[0].w.group);
  }
  int64_t b_bytes(const LayerProgram& p, int64_t m) const {
    const int64_t rows = std::min(m, kMlpRows);
    return std::max({input_bytes(p.compute, m, p.heads * p.head_dim, p.o.w.group),
                     input_bytes(p.compute, rows, p.hidden, p.up[0].w.group),
                     input_bytes(p.compute, rows, p.intermediate, p.down.w.group)});
  }

  // Inputs that can be quantised on their own: whole blocks and whole groups.
  static int64_t quantize_unit(int64_t k_padded, int64_t group) {
    if (group >= k_padded || kActBlock % group == 0) return kActBlock;
    return group % kActBlock == 0 ? group : k_padded;
  }

  // norm(rows) (or the rows themselves) as input `in` of the next products; alone: this thread makes all of it, for
  // itself. Otherwise it is there for everybody after the next barrier.
  void fill(const Input& in, bool alone, const LayerNorm& norm, const Rows& rows, int64_t group) {
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
        from = {normed, count, rows.k, rows.k, Float::f32, rows.order};
      }
      if (in.kind == Compute::int8) {
        if (from.order) {
          from.order += k0;
        } else {
          from.x = element_of(from.x, k0, from.type);
        }
        from.k = std::min(k1, rows.k) - k0;
      }
      load(kernels, from, tile_of(in, t, count, k0, k1), {0, count});
    }
  }

  // Columns of panels `part` of one product, fp32.
  void product(const Linear& l, const Input& in, float* out, int64_t stride, Range part) const {
    cpullm::product(kernels, l, in, out, stride, part, kernel_scratch);
  }

  // out = x + a * scale (b null), or x + (a + b) * scale, inside `area`; strides in elements.
  void add(const Area& area, float scale, const void* x, Float x_type, int64_t x_stride, const float* a, const float* b,
           void* out, Float out_type) const {
    const int64_t c0 = area.columns.begin, c1 = area.columns.end, stride = area.hidden;
    if (c0 >= c1 || area.rows.begin >= area.rows.end) return;
    const Sum s{element_of(x, c0, x_type),
                a + c0,
                b ? b + c0 : nullptr,
                const_cast<void*>(element_of(out, c0, out_type)),
                scale,
                x_type,
                out_type,
                c1 - c0,
                x_stride,
                stride,
                stride,
                stride};
    kernels.sum(s, area.rows);
  }
};

// A range of the items that several layers have, one layer's after the other's: asked for layer by layer.
struct Shared {
  Range part;
  int64_t first = 0;
  // The part of the next layer's `count` items.
  Range next(int64_t count) {
    const Range own{std::max<int64_t>(part.begin - first, 0), std::min(part.end - first, count)};
    first += count;
    return own.begin < own.end ? own : Range{0, 0};
  }
};

// One layer of the group: what it is, and the memory that its steps share. All but `private_*` is the team's.
struct Part {
  const LayerProgram* p;
  const LayerCall* c;
  AttentionPlan plan;
  Attention a;
  int64_t qkv_width, a_bytes, b_bytes;
  float *qkv, *attended, *o_out, *source, *up_out, *mlp_out, *partial, *fresh_k, *fresh_v;
  char *input_a, *input_b, *private_a, *private_b;
  Input h, in;  // the layer's input; the input of the step at hand

  Heads heads_of(int64_t start, int64_t heads, int64_t per_group, int64_t group_stride) const {
    return {qkv + start, qkv_width, heads, per_group, group_stride, p->head_dim, p->head_dim};
  }
  Heads queries() const { return heads_of(0, p->heads, p->layout.q_per_group, p->layout.group_stride); }
  Heads keys(int64_t start) const { return heads_of(start, p->kv_heads, 1, p->layout.kv_stride); }

  // Attention over what qkv holds once keys and values are placed.
  Attention attention() const {
    const LayerCall& call = *c;
    const int64_t d = p->head_dim, g = p->kv_heads, per = p->heads / g;
    const bool cached = call.k_cache != nullptr;
    const int64_t fresh[3] = {g * call.tokens * d, call.tokens * d, d};
    Attention a{};
    a.q = qkv;
    a.k = cached ? call.k_cache : fresh_k;
    a.v = cached ? call.v_cache : fresh_v;
    a.k_scale = call.k_scale;
    a.v_scale = call.v_scale;
    a.mask = call.mask;
    a.sinks = p->sinks;
    a.out = attended;
    a.partial = partial;
    a.batch = call.batch;
    a.queries = call.tokens;
    a.heads = p->heads;
    a.kv_heads = g;
    a.length = call.length + call.tokens;
    a.width = d;
    // Query head i of kv head c is head c * per + i; q_per_group is heads, per or 1.
    const QkvLayout& l = p->layout;
    const int64_t head_stride = l.q_per_group == 1 ? l.group_stride : d;
    const int64_t q_stride[4] = {call.tokens * qkv_width, qkv_width,
                                 l.q_per_group == per && per > 1 ? l.group_stride : per * head_stride, head_stride};
    std::copy_n(q_stride, 4, a.q_stride);
    std::copy_n(cached ? call.k_stride : fresh, 3, a.k_stride);
    std::copy_n(cached ? call.v_stride : fresh, 3, a.v_stride);
    if (cached) {
      std::copy_n(call.k_scale_stride, 2, a.k_scale_stride);
      std::copy_n(call.v_scale_stride, 2, a.v_scale_stride);
    }
    std::copy_n(call.mask_stride, 3, a.mask_stride);
    const int64_t out_stride[3] = {call.tokens * p->heads * d, p->heads * d, d};
    std::copy_n(out_stride, 3, a.out_stride);
    a.scale = p->scale;
    a.softcap = p->softcap;
    a.window = p->window;
    a.type = cached ? call.cache_type : CacheType::f32;
    a.mask_type = call.mask_type;
    a.mask_is_bool = call.mask_is_bool;
    a.exact = p->compute == Compute::fp32;
    a.tiled = call.tiled;
    return a;
  }
};

}  // namespace
}  // namespace cpullm
