// A mixture of experts: each token goes through the gated MLPs of the experts chosen for it. No torch: the operator in
// ops_experts.cpp checks everything and owns the memory.
//
// y[t] = sum over slots s, ascending, of weights[t, s] * down_e (act(gate_e x[t]) * (up_e x[t])), e = index[t, s]
#pragma once

#include <cstdint>
#include <vector>

#include "input.h"
#include "kernels/block.h"
#include "team.h"

namespace cpullm {

struct Experts {
  Weight gate_up, down;  // [count * n', k]: one expert after the other, n = 2 intermediate and hidden, n' whole panels
  int64_t count, hidden, intermediate;
  Act act;
  Compute compute;
};

// The arguments of one run. x and y have one type.
struct ExpertsCall {
  const void* x;
  void* y;  // [tokens, hidden]
  Float type;
  int64_t tokens, top_k, x_stride;  // x_stride: between rows
  const int64_t* index;  // [tokens, top_k], every entry in [0, count)
  const float* weights;  // [tokens, top_k]
};

// One run: rows are pairs of a token and one of its slots, sorted by expert, tokens ascending.
class ExpertsRun {
 public:
  ExpertsRun(const Experts& experts, const ExpertsCall& call, const Kernels& kernels, int64_t threads);
  // Bytes of 64-byte aligned memory that the run needs; place() hands it over before run().
  int64_t bytes() const { return bytes_; }
  void place(char* memory);
  // One member's part; all members call it with the same barrier and slices.
  void run(Member member, Barrier& barrier, Slices* slices) const;

 private:
  struct Active {
    int64_t expert, first, rows;  // its rows are [first, first + rows)
    Input x, acted;  // of its products
  };

  void carve(Arena& arena);
  void load_tokens(Member member) const;
  void load_acted(Member member) const;
  void products(const Weight& all, int64_t n, Input Active::* in, float* out, Member member, Slices* slices) const;
  void add_up(Member member) const;

  const Experts& e_;
  const ExpertsCall& c_;
  const Kernels& kernels_;
  int64_t threads_, bytes_ = 0;
  bool shared_input_;  // one token, and no expert twice: all experts read one input
  std::vector<Active> active_;
  std::vector<int64_t> token_;  // of a row
  std::vector<int64_t> row_;  // of token t, slot s: row_[t * top_k + s]
  float *up_ = nullptr, *out_ = nullptr, *zeros_ = nullptr;  // [rows, 2 intermediate], [rows, hidden], [hidden]
  char* scratch_ = nullptr;  // of the kernels, per member
};

}  // namespace cpullm
