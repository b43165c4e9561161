// The last norm of a decoder and its output head, y = norm(x) W^T + bias, as the last steps of a team that has computed
// the layers. No torch.
#pragma once

#include "layer.h"

namespace cpullm {

struct HeadProgram {
  int64_t hidden;
  Compute compute;
  LayerNorm norm;
  Linear linear;
};

// x [rows, hidden] and y [rows, n] of one type.
struct HeadCall {
  const void* x;
  void* y;
  Float type;
  int64_t rows;
};

// Bytes of 64-byte aligned memory that a run by at most `threads` threads needs.
int64_t head_workspace(const HeadProgram& head, const HeadCall& call, const Kernels& kernels, int64_t threads);

// One thread's part, as of run_layers; x must be whole. Returns how many barriers it passed.
int64_t run_head(const HeadProgram& head, const HeadCall& call, const Kernels& kernels, Member member, int64_t threads,
                 Barrier& barrier, Slices* slices, Ahead& ahead, char* workspace);

// The thread's next run is of this head.
void expect_head(const HeadProgram& head, const Member& member, Ahead& ahead);

}  // namespace cpullm
