#include "head.h"

#include "layer_input.h"

namespace cpullm {
namespace {

// Few rows are loaded by every thread for itself, which takes no barrier.
bool is_private(const HeadProgram& head, int64_t rows, int64_t threads) {
  return threads == 1 || rows * head.hidden <= kPrivateInputs;
}

// Memory of one run, in the same order whether it is counted or handed out.
Input carve(Arena& arena, const HeadProgram& head, int64_t rows, int64_t threads, Team& team) {
  const int64_t group = head.linear.w.group;
  const auto input = [&](Arena& from) {
    return make_input(from, team.kernels, head.compute, rows, head.hidden, group);
  };
  Input in;
  const bool mine = is_private(head, rows, threads);
  if (!mine) in = input(arena);
  const int64_t begin = arena.used;
  char* const base = arena.base;
  const auto cut = [&](Arena& own) {
    if (mine) in = input(own);
    team.normed = own.take<float>(kMaxTile * head.hidden);
    team.kernel_scratch = own.take<char>(kScratchBytes);
  };
  Arena count{nullptr};
  cut(count);
  Arena own{base ? base + begin + team.member.id * count.used : nullptr};
  cut(own);
  arena.used = begin + threads * count.used;
  return in;
}

}  // namespace

int64_t head_workspace(const HeadProgram& head, const HeadCall& call, const Kernels& kernels, int64_t threads) {
  Barrier barrier;
  Arena arena{nullptr};
  Ahead ahead;
  Team team{kernels, {0, threads}, barrier, nullptr, ahead};
  carve(arena, head, call.rows, threads, team);
  return arena.used;
}

int64_t run_head(const HeadProgram& head, const HeadCall& call, const Kernels& kernels, Member member, int64_t threads,
                 Barrier& barrier, Slices* slices, Ahead& ahead, char* workspace) {
  Arena arena{workspace};
  Team team{kernels, member, barrier, slices, ahead};
  const Weight& w = head.linear.w;
  const Input in = carve(arena, head, call.rows, threads, team);
  const bool alone = is_private(head, call.rows, threads);
  const Rows x{call.x, call.rows, head.hidden, head.hidden, call.type, head.linear.order};
  team.fill(in, alone, head.norm, x, w.group);
  if (!alone) team.sync();
  team.each(panels_of(w.n), w.k, call.rows, [&](Range panels) {
    product(kernels, head.linear, in, call.y, w.n, panels, team.kernel_scratch, call.type);
  });
  return team.barriers;
}

void expect_head(const HeadProgram& head, const Member& member, Ahead& ahead) {
  ahead = {};
  ahead.expect(head.linear, share(panels_of(head.linear.w.n), member));
}

}  // namespace cpullm
