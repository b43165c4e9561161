#include "experts.h"

#include <algorithm>

namespace cpullm {
namespace {

int64_t tiles_of(const Input& in, int64_t rows) { return (rows + in.tile - 1) / in.tile; }

// Matrix `expert` [n, k] of a stack.
Weight matrix_of(const Weight& all, int64_t expert, int64_t n) {
  Weight w = all;
  w.n = n;
  const int64_t panel = expert * panels_of(w.n), params = panel * w.groups * kPanel;
  w.codes += panel * (w.k_padded / kStep) * 16 * w.bits;
  w.scales += params;
  if (w.zeros) w.zeros = static_cast<const char*>(w.zeros) + params * (w.form == Zeros::integer ? 1 : 2);
  return w;
}

}  // namespace

ExpertsRun::ExpertsRun(const Experts& experts, const ExpertsCall& call, const Kernels& kernels, int64_t threads)
    : e_(experts), c_(call), kernels_(kernels), threads_(threads) {
  const int64_t rows = c_.tokens * c_.top_k;
  std::vector<int64_t> next(size_t(e_.count) + 1);
  for (int64_t i = 0; i < rows; ++i) ++next[size_t(c_.index[i]) + 1];
  for (int64_t e = 0; e < e_.count; ++e) {
    if (next[size_t(e) + 1]) active_.push_back({e, next[size_t(e)], next[size_t(e) + 1], {}, {}});
    next[size_t(e) + 1] += next[size_t(e)];
  }
  token_.resize(size_t(rows));
  row_.resize(size_t(rows));
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = next[size_t(c_.index[i])]++;
    row_[size_t(i)] = row;
    token_[size_t(row)] = i / c_.top_k;
  }
  shared_input_ = c_.tokens == 1 && int64_t(active_.size()) == rows;
  Arena count{nullptr};
  carve(count);
  bytes_ = count.used;
}

void ExpertsRun::place(char* memory) {
  Arena arena{memory};
  carve(arena);
}

void ExpertsRun::carve(Arena& arena) {
  const int64_t rows = c_.tokens * c_.top_k;
  up_ = arena.take<float>(rows * 2 * e_.intermediate);
  out_ = arena.take<float>(rows * e_.hidden);
  zeros_ = arena.take<float>(e_.hidden);
  for (Active& a : active_) {
    a.x = shared_input_ && &a != &active_[0]
              ? active_[0].x
              : make_input(arena, kernels_, e_.compute, a.rows, e_.hidden, e_.gate_up.group);
    a.acted = make_input(arena, kernels_, e_.compute, a.rows, e_.intermediate, e_.down.group);
  }
  scratch_ = arena.take<char>(threads_ * kScratchBytes);
}

// This member's tiles of all experts' tokens. A tile's rows come from anywhere: one by one, with a stride of 0.
void ExpertsRun::load_tokens(Member member) const {
  const size_t inputs = shared_input_ ? 1 : active_.size();
  int64_t total = 0, tile = 0;
  for (size_t i = 0; i < inputs; ++i) total += tiles_of(active_[i].x, active_[i].rows);
  Range part;
  share(total, member, part.begin, part.end);
  for (size_t i = 0; i < inputs; ++i) {
    const Active& a = active_[i];
    const int64_t tiles = tiles_of(a.x, a.rows);
    for (int64_t t = std::max<int64_t>(part.begin - tile, 0); t < std::min(part.end - tile, tiles); ++t) {
      const int64_t row0 = t * a.x.tile, rows = std::min(a.x.tile, a.rows - row0);
      const Input to = tile_of(a.x, t, rows, 0, round_up(e_.hidden, kChunk));
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t token = token_[size_t(a.first + row0 + r)];
        const Rows from{element_of(c_.x, token * c_.x_stride, c_.type), rows, e_.hidden, 0, c_.type, nullptr};
        load(kernels_, from, to, {r, r + 1});
      }
    }
    tile += tiles;
  }
  if (member.id == 0) std::fill_n(zeros_, e_.hidden, 0.0f);
}

// act(gate) * up of this member's tiles, in place of the gate, and as input of the products with down.
void ExpertsRun::load_acted(Member member) const {
  const int64_t width = e_.intermediate, stride = 2 * width;
  int64_t total = 0, tile = 0;
  for (const Active& a : active_) total += tiles_of(a.acted, a.rows);
  Range part;
  share(total, member, part.begin, part.end);
  for (const Active& a : active_) {
    const int64_t tiles = tiles_of(a.acted, a.rows);
    for (int64_t t = std::max<int64_t>(part.begin - tile, 0); t < std::min(part.end - tile, tiles); ++t) {
      const int64_t row0 = t * a.acted.tile, rows = std::min(a.acted.tile, a.rows - row0);
      float* gate = up_ + (a.first + row0) * stride;
      kernels_.activation({gate, gate + width, gate, width, stride, stride, stride, e_.act}, {0, rows});
      const Rows from{gate, rows, width, stride, Float::f32, nullptr};
      load(kernels_, from, tile_of(a.acted, t, rows, 0, round_up(width, kChunk)), {0, rows});
    }
    tile += tiles;
  }
}

// out [rows, n]: the active experts' panels stand one after the other, weighted by their cost, and are divided.
void ExpertsRun::products(const Weight& all, int64_t n, Input Active::* in, float* out, Member member,
                          Slices* slices) const {
  const int64_t panels = panels_of(n);
  const auto cost = [](const Active& a) { return std::max(a.rows, kLeastCost); };
  int64_t total = 0;
  for (const Active& a : active_) total += panels * cost(a);
  divide(total, panel_weights(all.k_padded, 1) / kLeastCost, member, slices, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Active& a : active_) {
      // The panels that begin inside of the part.
      const auto panel_at = [&](int64_t at) { return (std::max<int64_t>(at - first, 0) + cost(a) - 1) / cost(a); };
      const Range own{panel_at(begin), std::min(panel_at(end), panels)};
      product(kernels_, {matrix_of(all, a.expert, n), nullptr, nullptr}, a.*in, out + a.first * n, n, own,
              scratch_ + member.id * kScratchBytes);
      first += panels * cost(a);
    }
  });
}

// y: this member's tokens, or its columns where the tokens are few. The sum stands in the first slot's row.
void ExpertsRun::add_up(Member member) const {
  const bool by_token = c_.tokens >= member.count;
  Range tokens{0, c_.tokens}, panels{0, panels_of(e_.hidden)};
  by_token ? share(c_.tokens, member, tokens.begin, tokens.end) : share(panels.end, member, panels.begin, panels.end);
  const int64_t c0 = panels.begin * kPanel, width = std::min(panels.end * kPanel, e_.hidden) - c0;
  if (width <= 0) return;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const int64_t* rows = &row_[size_t(t * c_.top_k)];
    float* sum = out_ + rows[0] * e_.hidden + c0;
    void* y = const_cast<void*>(element_of(c_.y, t * e_.hidden + c0, c_.type));
    for (int64_t s = 0; s < c_.top_k; ++s) {
      const bool last = s + 1 == c_.top_k;
      const float* row = out_ + rows[s] * e_.hidden + c0;
      const float scale = c_.weights[t * c_.top_k + s];
      kernels_.sum({s ? sum : zeros_, row, nullptr, last ? y : sum, scale, Float::f32, last ? c_.type : Float::f32,
                    width, 0, 0, 0, 0},
                   {0, 1});
    }
  }
}

void ExpertsRun::run(Member member, Barrier& barrier, Slices* slices) const {
  load_tokens(member);
  barrier.wait(member.count);
  products(e_.gate_up, 2 * e_.intermediate, &Active::x, up_, member, slices);
  barrier.wait(member.count);
  load_acted(member);
  barrier.wait(member.count);
  products(e_.down, e_.hidden, &Active::acted, out_, member, slices);
  barrier.wait(member.count);
  add_up(member);
}

}  // namespace cpullm
