// A layer of many rows, some rows at a time: a thread takes a block of them from the layer's input to attention's, and from
// attention's output to the layer's. What it makes for the next step of its block stays in its L2 cache (inputs of
// products, gate and up, sums), and others are waited for at attention alone, which reads the keys of all rows.
// Panels of weights pass by once per block: 64 rows hide the reading behind their arithmetic. Part of layer.cpp.
#pragma once

#include "layer_act.h"

namespace cpullm {
namespace {

// Blocks of a layer with m rows, of kernels whose products have a block size: as many for each of the threads asked for.
inline int64_t blocks_of_rows(const Kernels& kernels, int64_t m, int64_t threads) {
  const int64_t least = (m + kernels.block_rows - 1) / kernels.block_rows;
  return (least + threads - 1) / threads * threads;
}

// Whether there are enough of them: two for each thread.
inline bool goes_by_rows(const Kernels& kernels, Compute compute, int64_t m, int64_t threads) {
  return compute == Compute::int8 && kernels.block_rows && m >= 2 * kernels.block_rows * threads;
}

// Rows [begin, end) of `whole` as a run of their own, by this thread alone.
template <class LayerRun>
LayerRun block_of(const LayerRun& whole, int64_t begin, int64_t end) {
  LayerRun run(whole);
  run.team.member = {0, 1};
  run.in_block = true;
  run.first_row = begin;
  run.m = end - begin;
  run.c.x = element_of(whole.c.x, begin * whole.c.x_stride, whole.c.type);
  run.c.y = const_cast<void*>(element_of(whole.c.y, begin * whole.hidden, whole.c.type));
  return run;
}

// f(run) for every block of rows, by the thread that has it. panels: of all products in f, of `hidden` inputs each, about.
template <class LayerRun, class F>
void each_block(const LayerRun& whole, int64_t panels, const F& f) {
  const int64_t m = whole.m, blocks = whole.blocks;
  whole.team.each(blocks, whole.hidden * panels, m / blocks, [&](Range some) {
    for (int64_t i = some.begin; i < some.end; ++i) {
      LayerRun run = block_of(whole, m * i / blocks, m * (i + 1) / blocks);
      f(run);
    }
  });
}

template <class LayerRun>
void run_by_rows(LayerRun& whole) {
  const auto& first = whole.parts[0];
  each_block(whole, panels_of(first.qkv_width), [](LayerRun& run) { run.before_attention(); });
  whole.team.sync();
  whole.attend();
  each_block(whole, panels_of(3 * first.p->intermediate), [](LayerRun& run) {
    run.after_attention();
    run.mlp(0, run.m);
  });
}

}  // namespace
}  // namespace cpullm
