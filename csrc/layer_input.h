// A thread's place in a layer's team, and what it does with rows that products read. Part of layer.cpp.
#pragma once

#include <algorithm>
#include <cstring>

#include "input.h"
#include "layer.h"

namespace cpullm {
namespace {

constexpr int64_t kMlpRows = 1024;  // rows of an MLP at a time: bounds its memory
constexpr int64_t kPrivateInputs =
    12 * 1024;  // up to here every thread quantises all rows itself: cheaper than a barrier

// Whether two vectors, or two norms, are the same.
template <class T>
bool same(const T* a, const T* b, int64_t count) {
  return a == b || (a && b && !std::memcmp(a, b, size_t(count) * sizeof(T)));
}

// Whether products with two weights of one k can read the same Input.
inline bool read_alike(const Linear& a, const Linear& b) {
  return a.w.group == b.w.group && same(a.order, b.order, a.w.k);
}

inline bool same(const LayerNorm& a, const LayerNorm& b, int64_t width) {
  if (!a.present || !b.present) return a.present == b.present;
  return a.norm.eps == b.norm.eps && a.norm.layer == b.norm.layer && same(a.norm.gain, b.norm.gain, width) &&
         same(a.norm.bias, b.norm.bias, width);
}

// One thread's place in the team, and its scratch memory.
struct Team {
  const Kernels& kernels;
  Member member;
  Barrier& barrier;
  int64_t barriers = 0;
  float *normed = nullptr, *attention_scratch = nullptr;
  char* kernel_scratch = nullptr;

  void sync() {
    barrier.wait(member.count);
    ++barriers;
  }

  Range mine(int64_t count) const {
    Range r;
    share(count, member, r.begin, r.end);
    return r;
  }

  int64_t input_bytes(Compute compute, int64_t rows, int64_t k, int64_t group) const {
    Arena arena{nullptr};
    make_input(arena, kernels, compute, rows, k, group);
    return arena.used;
  }

  // Inputs that can be quantised on their own: whole blocks and whole groups.
  static int64_t quantize_unit(int64_t k_padded, int64_t group) {
    if (group >= k_padded || kActBlock % group == 0) return kActBlock;
    return group % kActBlock == 0 ? group : k_padded;
  }

  // norm(rows) (or the rows themselves) as input `in` of the next products; alone: this thread makes all of it, for
  // itself. Otherwise it is there for everybody after the next barrier.
  void fill(const Input& in, bool alone, const LayerNorm& norm, const Rows& rows, int64_t group) {
    const int64_t tile = in.tile;
    const int64_t tiles = (rows.m + tile - 1) / tile;
    const bool split_k =
        in.kind == Compute::int8 && !alone && tiles == 1;  // few rows: every thread takes some inputs of all of them
    const Range part = alone || split_k ? Range{0, tiles} : mine(tiles);
    int64_t k0 = 0, k1 = round_up(rows.k, kChunk);
    if (split_k) {
      const int64_t k_padded = k1, unit = quantize_unit(k_padded, group);
      const Range units = mine((k_padded + unit - 1) / unit);
      k0 = units.begin * unit;
      k1 = std::min(units.end * unit, k_padded);
    }
    for (int64_t t = part.begin; t < part.end && k0 < k1; ++t) {
      const int64_t row0 = t * tile, count = std::min(tile, rows.m - row0);
      Rows from = rows;
      from.x = element_of(rows.x, row0 * rows.stride, rows.type);
      from.m = count;
      if (norm.present) {
        kernels.norm(norm.norm, from, normed, rows.k, {0, count});
        from = {normed, count, rows.k, rows.k, Float::f32, rows.order};
      }
      if (in.kind == Compute::int8) {
        if (from.order) {
          from.order += k0;
        } else {
          from.x = element_of(from.x, k0, from.type);
        }
        from.k = std::min(k1, rows.k) - k0;
      }
      load(kernels, from, tile_of(in, t, count, k0, k1), {0, count});
    }
  }

  // Columns of panels `part` of one product, fp32.
  void product(const Linear& l, const Input& in, float* out, int64_t stride, Range part) const {
    cpullm::product(kernels, l, in, out, stride, part, kernel_scratch);
  }
};

// One thread's share of items that several layers have, one layer's after the other's: asked for layer by layer.
struct Shared {
  Range mine;
  int64_t first = 0;
  // The part of the next layer's `count` items.
  Range next(int64_t count) {
    const Range own{std::max<int64_t>(mine.begin - first, 0), std::min(mine.end - first, count)};
    first += count;
    return own.begin < own.end ? own : Range{0, 0};
  }
};

}  // namespace
}  // namespace cpullm
