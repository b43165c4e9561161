// Rows as products read them, the memory that they stand in, and the products. No torch.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/kernels.h"

namespace cpullm {

inline int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

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

struct Linear {
  Weight w;
  const float* bias;  // null or [n]
  const int32_t* order;  // null or [k]: the weight's input j is input order[j] of the rows
};

// Whether two vectors are the same.
template <class T>
bool same(const T* a, const T* b, int64_t count) {
  return a == b || (a && b && !std::memcmp(a, b, size_t(count) * sizeof(T)));
}

// Whether products with two weights of one k can read the same Input.
inline bool read_alike(const Linear& a, const Linear& b) {
  return a.w.group == b.w.group && same(a.order, b.order, a.w.k);
}

inline int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }

// Rows as the products read them.
struct Input {
  Compute kind;  // which of the three there is
  int64_t tile;
  QuantizedRows q;
  FloatRows f;
  Bf16Rows b;
};

// Memory for `rows` rows of k inputs, for products with weights of this group.
inline Input make_input(Arena& arena, const Kernels& kernels, Compute compute, int64_t rows, int64_t k, int64_t group) {
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

// Tile t of `whole`, of which `rows` rows exist, as an input of its own to be loaded; int8: inputs [k0, k1) of it, k0
// begins a block and a group. What does not exist is zero, so that subnormals or nan do not slow the arithmetic down.
inline Input tile_of(const Input& whole, int64_t t, int64_t rows, int64_t k0, int64_t k1) {
  Input part = whole;
  const int64_t tile = whole.tile, row0 = t * tile;
  if (whole.kind == Compute::int8) {
    QuantizedRows& q = part.q;
    const int64_t first = count_segments(0, k0, q.group);
    q.q += row0 * round_up(q.k_padded, q.unit) + k0 * tile;
    q.scale += row0 * q.blocks + k0 / kActBlock * tile;
    q.minus += row0 * q.segments + first * tile;
    q.apart += row0 * q.segments + first * tile;
    q.apart_rows += t * q.segments + first;
    q.m = rows;
    q.k_padded = k1 - k0;
    q.blocks = (q.k_padded + kActBlock - 1) / kActBlock;
    q.segments = count_segments(k0, k1, q.group);
    if (rows < tile) {
      std::fill_n(q.scale, tile * q.blocks, 0.0f);
      std::fill_n(q.minus, tile * q.segments, 0);
    }
  } else if (whole.kind == Compute::bf16) {
    part.b.x += row0 * whole.b.k_padded;
    part.b.m = rows;
    if (rows < tile) std::fill_n(part.b.x, tile * whole.b.k_padded, uint16_t(0));
  } else {
    part.f.x += row0 * whole.f.k_padded;
    part.f.m = rows;
  }
  return part;
}

inline void load(const Kernels& kernels, const Rows& from, const Input& to, Range rows) {
  if (to.kind == Compute::int8) {
    kernels.quantize_rows(from, to.q, rows);
  } else if (to.kind == Compute::bf16) {
    kernels.load_rows_bf16(from, to.b, rows);
  } else {
    kernels.load_rows(from, to.f, rows);
  }
}

// Columns of panels `part` of one product.
inline void product(const Kernels& kernels, const Linear& l, const Input& in, void* out, int64_t stride, Range part,
                    char* scratch, Float type = Float::f32) {
  if (part.begin >= part.end) return;
  const Output to{out, stride, type, l.bias};
  if (in.kind == Compute::int8) {
    kernels.linear_i8(l.w, in.q, to, part, scratch);
  } else if (in.kind == Compute::bf16) {
    kernels.linear_bf16(l.w, in.b, to, part, scratch);
  } else {
    kernels.linear_f32(l.w, in.f, to, part, scratch);
  }
}

// Element `elements` of x.
inline const void* element_of(const void* x, int64_t elements, Float type) {
  return static_cast<const char*>(x) + elements * (type == Float::f32 ? 4 : 2);
}

}  // namespace cpullm
