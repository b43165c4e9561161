// A prompt's last layer where nobody reads its other rows: a sequential one by itself, in int8. Keys and values of all
// tokens go to the cache, and each sequence's last token alone goes through attention and the MLP. Its bits are those it
// has among all rows: products and norms take a row by itself, and attention takes it as it takes rows of a prompt. Part
// of layer.cpp.
#pragma once

#include "layer_rows.h"

namespace cpullm {
namespace {

// The layer's call for those tokens alone, once all keys and values are in the cache.
inline Layer last_of(const Layer& layer) {
  Layer tail = layer;
  LayerCall& c = tail.call;
  const int64_t skipped = c.tokens - 1;
  c.x = element_of(c.x, skipped * c.x_stride, c.type);
  c.x_stride *= c.tokens;
  c.length += skipped;
  const int64_t rows = skipped * c.mask_stride[2];
  if (c.mask) c.mask = c.mask_is_bool ? static_cast<const char*>(c.mask) + rows : element_of(c.mask, rows, c.mask_type);
  c.tokens = 1;
  c.last = false;
  c.tiled = true;
  return tail;
}

// tail: a run of last_of() the layer of `whole`, by the same thread.
template <class LayerRun>
void run_last(LayerRun& whole, LayerRun& tail) {
  whole.parts[0].a = whole.parts[0].attention();
  if (whole.blocks) {
    each_block(whole, panels_of(whole.parts[0].qkv_width), [](LayerRun& run) { run.before_attention(); });
  } else {
    whole.before_attention();
  }
  whole.team.sync();
  const int64_t tokens = whole.c.tokens, width = whole.parts[0].qkv_width;
  Attention& a = tail.parts[0].a;
  a = tail.parts[0].attention();
  a.q = whole.parts[0].qkv + (tokens - 1) * width;
  a.q_stride[0] = tokens * width;
  tail.attend();
  tail.after_attention();
  tail.after_residual();
}

}  // namespace
}  // namespace cpullm
