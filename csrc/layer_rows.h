// A layer of many rows, some rows at a time: a thread takes a block of them from the layer's input to attention's, and from
// attention's output to the layer's. What it makes for the next step of its block stays in its L2 cache (inputs of
// products, gate and up, sums), and others are waited for at attention alone, which reads the keys of all rows.
// Panels of weights pass by once per block: 64 rows hide the reading behind their arithmetic. Part of layer.cpp.
#pragma once

#include "layer_input.h"

namespace cpullm {
namespace {

constexpr int64_t kPanelsAtOnce = 16;  // of gate and of up in such a block, before they are activated

// Blocks of a layer with m rows, of kernels whose products have a block size: as many for each of the threads asked for.
inline int64_t blocks_of_rows(const Kernels& kernels, int64_t m, int64_t threads) {
  const int64_t least = (m + kernels.block_rows - 1) / kernels.block_rows;
  return (least + threads - 1) / threads * threads;
}

// Whether there are enough of them: two for each thread.
inline bool goes_by_rows(const Kernels& kernels, Compute compute, int64_t m, int64_t threads) {
  return compute == Compute::int8 && kernels.block_rows && m >= 2 * kernels.block_rows * threads;
}

// Whether a block's down projection can have its input while gate and up are made, kPanelsAtOnce panels at a time: they
// are whole blocks and groups of inputs, in their own order, and the halves of one weight begin at panels.
inline bool acts_by_panels(const LayerProgram& p) {
  const int64_t unit = Team::quantize_unit(round_up(p.intermediate, kChunk), p.down.w.group);
  return !p.down.order && kPanelsAtOnce * kPanel % unit == 0 &&
         !(p.gated && p.up_count == 1 && p.intermediate % kPanel);
}

// part.h = act(gate) * up, the input of `down`; up_out holds gate and up of some panels, so that they stay in L2.
inline void act_by_panels(const Team& team, Part& part, int64_t rows) {
  const LayerProgram& p = *part.p;
  const int64_t panels = panels_of(p.intermediate), width = kPanelsAtOnce * kPanel,
                stride = p.gated ? 2 * width : width;
  Arena arena{part.input_a};
  part.h = make_input(arena, team.kernels, p.compute, rows, p.intermediate, p.down.w.group);
  const int64_t tile = part.h.tile;
  for (int64_t first = 0; first < panels; first += kPanelsAtOnce) {
    const Range own{first, std::min(first + kPanelsAtOnce, panels)};
    const int64_t c0 = own.begin * kPanel, c1 = std::min(own.end * kPanel, p.intermediate);
    float* const at = part.up_out - c0;  // where column 0 would be
    team.product(p.up[0], part.in, at, stride, own);
    if (p.gated && p.up_count == 1) {
      team.product(p.up[0], part.in, at + width - p.intermediate, stride, {own.begin + panels, own.end + panels});
    } else if (p.gated) {
      team.product(p.up[1], part.in, at + width, stride, own);
    }
    const int64_t k1 = own.end == panels ? round_up(p.intermediate, kChunk) : c1;
    for (int64_t row0 = 0; row0 < rows; row0 += tile) {
      float* const gate = part.up_out + row0 * stride;
      const int64_t count = std::min(tile, rows - row0);
      team.kernels.activation({gate, p.gated ? gate + width : nullptr, gate, c1 - c0, stride, stride, stride, p.act},
                              {0, count});
      load(team.kernels, {gate, count, c1 - c0, stride, Float::f32, nullptr},
           tile_of(part.h, row0 / tile, count, c0, k1), {0, count});
    }
  }
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
