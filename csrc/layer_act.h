// Gate, up and their activation. Part of layer.cpp.
#pragma once

#include "layer_input.h"

namespace cpullm {
namespace {

constexpr int64_t kPanelsAtOnce = 16;  // of gate and of up in a block of rows (layer_rows.h), before they are activated

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

// up_out [rows, intermediate] of each part (stride `width`) = act(gate) * up; or its part.h, see act_by_panels.
template <class LayerRun>
void up_and_act(LayerRun& run, int64_t rows) {
  Team& team = run.team;
  const int64_t hidden = run.hidden;
  const bool in_block = run.in_block;
  int64_t total = 0;
  bool apart = false;
  const auto halves_apart = [](const LayerProgram& p) {  // they do not begin at panels
    return p.gated && p.up_count == 1 && p.intermediate % kPanel;
  };
  for (Part& part : run) {
    const LayerProgram& p = *part.p;
    if (in_block && acts_by_panels(p)) {
      act_by_panels(team, part, rows);
      continue;
    }
    total += panels_of(p.intermediate);
    if (!halves_apart(p)) continue;
    const int64_t width = 2 * p.intermediate;
    team.each(panels_of(width), hidden, rows,
              [&](Range some) { team.product(p.up[0], part.in, part.up_out, width, some); });
    apart = true;
  }
  if (apart) team.sync();
  const auto some_panels = [&](Range some) {
    Shared shared{some};
    for (Part& part : run) {
      const LayerProgram& p = *part.p;
      if (in_block && acts_by_panels(p)) continue;
      const int64_t width = p.intermediate * (p.gated ? 2 : 1), panels = panels_of(p.intermediate);
      const Range own = shared.next(panels);
      const int64_t c0 = own.begin * kPanel, c1 = std::min(own.end * kPanel, p.intermediate);
      if (c0 >= c1) continue;
      if (!halves_apart(p)) {
        team.product(p.up[0], part.in, part.up_out, width, own);
        if (p.gated && p.up_count == 1) {
          team.product(p.up[0], part.in, part.up_out, width, {own.begin + panels, own.end + panels});
        } else if (p.gated) {
          team.product(p.up[1], part.in, part.up_out + p.intermediate, width, own);
        }
      }
      float* gate = part.up_out + c0;
      const Activation act{gate, p.gated ? gate + p.intermediate : nullptr, gate, c1 - c0, width, width, width, p.act};
      team.kernels.activation(act, {0, rows});
    }
  };
  team.each(total, 2 * hidden, rows, [&](Range own) {
    const int64_t step = in_block ? kPanelsAtOnce : total;
    for (int64_t i = own.begin; i < own.end; i += step) some_panels({i, std::min(i + step, own.end)});
  });
}

}  // namespace
}  // namespace cpullm
