// What stands between a layer's first products and attention. Part of layer.cpp.
#pragma once

#include "layer_input.h"

namespace cpullm {
namespace {

// Norms over all heads of a row, rows [row0, row0 + m): the layout has them side by side.
inline void norm_whole_rows(const Team& team, const Part& part, int64_t row0, int64_t m) {
  const auto whole = [&](const LayerNorm& norm, float* x, int64_t width) {
    const Rows in{x, m, width, part.qkv_width, Float::f32, nullptr};
    if (norm.present) team.kernels.norm(norm.norm, in, x, part.qkv_width, team.mine(m));
  };
  float* const qkv = part.qkv + row0 * part.qkv_width;
  whole(part.p->q_norm, qkv, part.p->heads * part.p->head_dim);
  whole(part.p->k_norm, qkv + part.p->layout.k_start, part.p->kv_heads * part.p->head_dim);
}

// Norm and rope of queries and keys, keys and values to the cache: per row and head of rows [row0, row0 + m).
inline void place_heads(const Team& team, const Part& part, int64_t row0, int64_t m) {
  const LayerProgram& p = *part.p;
  const LayerCall& call = *part.c;
  const Kernels& kernels = team.kernels;
  const Heads q = part.queries(), k = part.keys(p.layout.k_start);
  const auto items = [&](int64_t heads) {
    const Range own = team.mine(m * heads);
    return Range{row0 * heads + own.begin, row0 * heads + own.end};
  };
  const Range q_items = items(p.heads), k_items = items(p.kv_heads);
  if (!p.qk_norm_whole) {
    if (p.q_norm.present) kernels.norm_heads(p.q_norm.norm, q, q_items);
    if (p.k_norm.present) kernels.norm_heads(p.k_norm.norm, k, k_items);
  }
  if (p.rotary_dim) {
    const Rope rope{call.cos,
                    call.sin,
                    call.rope_type,
                    p.rope_style,
                    p.rotary_dim,
                    call.tokens,
                    {call.rope_stride[0], call.rope_stride[1]}};
    kernels.rope(rope, q, q_items);
    kernels.rope(rope, k, k_items);
  }
  const Attention& a = part.a;
  const auto append = [&](const Heads& from, const void* cache, const float* scale, const int64_t* stride,
                          const int64_t* scale_stride) {
    const Append to{
        from,        const_cast<void*>(cache),          const_cast<float*>(scale),         a.type, call.tokens,
        call.length, {stride[0], stride[1], stride[2]}, {scale_stride[0], scale_stride[1]}};
    kernels.append(to, k_items);
  };
  append(k, a.k, a.k_scale, a.k_stride, a.k_scale_stride);
  append(part.keys(p.layout.v_start), a.v, a.v_scale, a.v_stride, a.v_scale_stride);
}

}  // namespace
}  // namespace cpullm
