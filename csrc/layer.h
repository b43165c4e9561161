// The layer program: a decoder layer, or a group of layers that read one input, as a list of steps that a team of threads
// runs in one parallel region, with barriers between steps. No torch: the operators in ops_layer.cpp check everything and
// own the memory.
//
// x -> h = norm(x); q, k, v = h Wq, h Wk, h Wv; norm and rope of q and k; k, v to the cache; a = attention Wo;
// sequential: r = x + norm(a), y = r + norm(MLP(norm(r)));  parallel: y = x + a + MLP(norm(x) or h).
// A group: y = x + sum a_l + sum MLP_l(norm(f_l)), f_l = x + a_l + the a_j of `bypass` members before l, or of all.
// Its down projections are one product [z_1 .. z_p] [W_1; ..; W_p] over all members' inputs, whose segments are packed
// apart: one phase, in which a thread has the same columns of all of them and adds in the order of the members.
// A layer that is cut among ranks has a share of the heads and of the MLP: a Wo and the MLP are sums over ranks. They go
// through memory that the ranks share, or the layer is run in two parts, with the caller's sum after each. Of a group
// that is spread over ranks, each has some members, and sum a_l + sum MLP_l is one sum over ranks; or a team of ranks has
// them, each cut among the team: then each a_l is a sum over the team, since MLP_l reads it.
// b batch, s tokens of this call, m = b s rows.
#pragma once

#include "ahead.h"
#include "kernels/block.h"
#include "ranks.h"
#include "team.h"

namespace cpullm {

// Where head vectors stand in a row of qkv: query head i begins at (i / q_per_group) * group_stride + (i % q_per_group) *
// head_dim, key head j at k_start + j * kv_stride, value head j at v_start + j * kv_stride.
struct QkvLayout {
  int64_t q_per_group, group_stride, k_start, v_start, kv_stride;
};

struct LayerNorm {
  bool present;
  Norm norm;
};

struct LayerProgram {
  int64_t hidden, heads, kv_heads, head_dim, intermediate;
  Compute compute;  // of every product
  int qkv_count, up_count;  // 3 or 1; 2, or 1
  Linear qkv[3], o, up[2], down;  // up: gate and up; one [gate | up]; or up alone
  bool gated, parallel;
  QkvLayout layout;
  LayerNorm input_norm, post_attention_norm, mlp_norm, post_mlp_norm, q_norm, k_norm;
  bool qk_norm_whole;  // over all heads of a row at once
  int64_t rotary_dim;
  RopeStyle rope_style;
  Act act;
  int64_t window;
  const float* sinks;
  float scale, softcap, residual_scale;
};

// What a run computes: y = the layer; y = a Wo; y = MLP(norm(x)), or of a parallel layer without a norm for its MLP,
// MLP(h). y of a part is fp32.
enum class Stage { whole, attention, mlp };

// A layer's keys and values, [b, g, capacity, d]; k_cache null: none.
struct CacheMemory {
  void *k_cache, *v_cache;
  float *k_scale, *v_scale;
  CacheType cache_type;
  int64_t k_stride[3], v_stride[3], k_scale_stride[2], v_scale_stride[2];
};

// The arguments of one run. The cache holds `length` tokens already.
struct LayerCall : CacheMemory {
  const void* x;
  void* y;
  Float type;
  int64_t batch, tokens, x_stride;  // x_stride: between rows
  const void *cos, *sin;
  Float rope_type;
  int64_t rope_stride[2];  // b, token
  const void* mask;  // null: causal
  Float mask_type;
  bool mask_is_bool;
  int64_t mask_stride[3];  // b, h, s
  int64_t length;
  Stage stage;
  bool last;  // y is of each sequence's last token alone: see layer_last.h
  bool tiled;  // of attention: see there
};

// A layer and its part of a run.
struct Layer {
  const LayerProgram* program;
  LayerCall call;
};

constexpr int64_t kMostMembers = 8;  // of a group
constexpr int64_t kAllMembers = -1;

// What of a group is summed over ranks: nothing, it is whole on every rank; what Wo and the MLP of its one layer give; or
// what its members add to x. Over all ranks, or for the parts over a team of them: a rank of another one has other
// members, or the same layer. Of cut members both: Wo over the team, what all ranks' members add over all.
enum class Summed { nothing, parts, members, team_parts, cut_members };

constexpr bool is_spread(Summed what) { return what == Summed::members || what == Summed::cut_members; }
constexpr bool in_team(Summed what) { return what == Summed::team_parts || what == Summed::cut_members; }

// A thread's sums over all ranks, and over the team of this one; null where there are none.
struct RankSums {
  RankSum *all = nullptr, *team = nullptr;

  RankSum* of_parts(Summed what) const { return what == Summed::parts ? all : in_team(what) ? team : nullptr; }
  bool gone() const { return (all && all->gone()) || (team && team->gone()); }
};

// Layers of one hidden size, compute and `parallel` that read one x; their calls share x, y, type, batch, tokens and
// length. One layer is a group of one. bypass: members before one whose attention its MLP reads as well, or kAllMembers.
struct LayerGroup {
  const Layer* layers;
  int64_t count, bypass;
  Summed summed = Summed::nothing;
};

// Bytes of 64-byte aligned memory that a run by at most `threads` threads needs.
int64_t layer_workspace(const LayerGroup& group, const Kernels& kernels, int64_t threads);

// One thread's part; all threads of the team call it with the same arguments but their own `member` and `sums`. Returns
// how many barriers it passed, which for a group are no more than for its layers each, and one more per sum over ranks
// (of many rows: per part). Once one of `sums` is gone() the rest is left out. slices: see divide(). ahead: of this thread.
int64_t run_layers(const LayerGroup& group, const Kernels& kernels, Member member, int64_t threads, Barrier& barrier,
                   Slices* slices, Ahead& ahead, char* workspace, RankSums sums);

// The thread's next run is of this group.
void expect_layers(const LayerGroup& group, const Member& member, Ahead& ahead);

}  // namespace cpullm
