// Memory of a layer's run, its team, and rows as products read them. Part of layer.cpp.
#pragma once

#include <algorithm>

#include "layer.h"

namespace cpullm {
namespace {

constexpr int64_t kMlpRows = 1024;  // rows of an MLP at a time: bounds its memory
constexpr int64_t kPrivateInputs =
    12 * 1024;  // up to here every thread quantises all rows itself: cheaper than a barrier

int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

// Cuts one block of memory into arrays; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    char* at = base ? base + used : nullptr;
    used += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(at);
  }
};

const void* row_of(const void* x, int64_t elements, Float type) {
  return static_cast<const char*>(x) + elements * (type == Float::f32 ? 4 : 2);
}

// Rows as the products read them.
struct Input {
  Compute kind;  // which of the three there is
  int64_t tile;
  QuantizedRows q;
  FloatRows f;
  Bf16Rows b;
};

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

  Input make_input(Arena& arena, Compute compute, int64_t rows, int64_t k, int64_t group) const {
    Input in{};
    const int64_t k_padded = round_up(k, kChunk);
    const TileShape bf16 = compute == Compute::bf16 ? kernels.tile_bf16(rows) : TileShape{0, 0};
    if (compute == Compute::int8) {
      const TileShape shape = kernels.tile_i8(rows, group);
      const int64_t tiles = (rows + shape.tile - 1) / shape.tile;
      QuantizedRows& q = in.q;
      q.m = rows;
      q.k_padded = k_padded;
      q.blocks = (k_padded + kActBlock - 1) / kActBlock;
      q.tile = in.tile = shape.tile;
      q.unit = shape.unit;
      q.group = group;
      q.segments = count_segments(0, k_padded, group);
      q.q = arena.take<int8_t>(tiles * q.tile * round_up(k_padded, q.unit));
      q.scale = arena.take<float>(tiles * q.tile * q.blocks);
      q.minus = arena.take<int32_t>(tiles * q.tile * q.segments);
      q.apart = arena.take<int32_t>(tiles * q.tile * q.segments);
      q.apart_rows = arena.take<uint32_t>(tiles * q.segments);
    } else if (bf16.tile) {
      in.kind = Compute::bf16;
      in.tile = bf16.tile;
      in.b = {arena.take<uint16_t>(round_up(rows, bf16.tile) * k_padded), rows, k_padded, bf16.tile, bf16.unit};
    } else {
      in.kind = Compute::fp32;
      in.tile = kernels.tile_f32(rows);
      in.f = {arena.take<float>(round_up(rows, in.tile) * k_padded), rows, k_padded, in.tile};
    }
    return in;
  }

  int64_t input_bytes(Compute compute, int64_t rows, int64_t k, int64_t group) const {
    Arena arena{nullptr};
    make_input(arena, compute, rows, k, group);
    return arena.used;
  }

  // Tile t of an int8 input, inputs [k0, k1) of it; k0 begins a block and a group.
  static QuantizedRows part_of(const QuantizedRows& whole, int64_t t, int64_t rows, int64_t k0, int64_t k1) {
    QuantizedRows part = whole;
    const int64_t row0 = t * whole.tile, first = count_segments(0, k0, whole.group);
    part.q += row0 * round_up(whole.k_padded, whole.unit) + k0 * whole.tile;
    part.scale += row0 * whole.blocks + k0 / kActBlock * whole.tile;
    part.minus += row0 * whole.segments + first * whole.tile;
    part.apart += row0 * whole.segments + first * whole.tile;
    part.apart_rows += t * whole.segments + first;
    part.m = rows;
    part.k_padded = k1 - k0;
    part.blocks = (k1 - k0 + kActBlock - 1) / kActBlock;
    part.segments = count_segments(k0, k1, whole.group);
    if (rows < whole.tile) {  // rows that do not exist must not slow the arithmetic down with subnormals or nan
      std::fill_n(part.scale, part.tile * part.blocks, 0.0f);
      std::fill_n(part.minus, part.tile * part.segments, 0);
    }
    return part;
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
      from.x = row_of(rows.x, row0 * rows.stride, rows.type);
      from.m = count;
      if (norm.present) {
        kernels.norm(norm.norm, from, normed, rows.k, {0, count});
        from = {normed, count, rows.k, rows.k, Float::f32, nullptr};
      }
      if (in.kind == Compute::int8) {
        from.x = row_of(from.x, k0, from.type);
        from.k = std::min(k1, rows.k) - k0;
        kernels.quantize_rows(from, part_of(in.q, t, count, k0, k1), {0, count});
      } else if (in.kind == Compute::bf16) {
        uint16_t* to = in.b.x + row0 * in.b.k_padded;
        if (count < tile) std::fill_n(to, tile * in.b.k_padded, uint16_t(0));
        kernels.load_rows_bf16(from, {to, count, in.b.k_padded, tile, in.b.unit}, {0, count});
      } else {
        kernels.load_rows(from, {in.f.x + row0 * in.f.k_padded, count, in.f.k_padded, tile}, {0, count});
      }
    }
  }

  // Columns of panels `part` of one product, fp32.
  void product(const Linear& l, const Input& in, float* out, int64_t stride, Range part) {
    if (part.begin >= part.end) return;
    const Output to{out, stride, Float::f32, l.bias};
    if (in.kind == Compute::int8) {
      kernels.linear_i8(l.w, in.q, to, part, kernel_scratch);
    } else if (in.kind == Compute::bf16) {
      kernels.linear_bf16(l.w, in.b, to, part, kernel_scratch);
    } else {
      kernels.linear_f32(l.w, in.f, to, part, kernel_scratch);
    }
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
