// The avx512 level: AVX-512 F, BW, DQ, VL and VNNI.
#define CPULLM_TILE_ROWS 14
#include "simd_avx512.h"
//
#include "rows-inl.h"
//
#include "block.h"
#include "math-inl.h"
//
#include "attention-inl.h"
#include "block-inl.h"
#include "linear_f32-inl.h"
#include "lanes-inl.h"
#include "limits-inl.h"
#include "linear_i8-inl.h"
#include "dot_run_avx512.h"
#include "quantize_avx512.h"
//
#include "dot_bf16_avx512.h"
#include "linear_bf16-inl.h"
//
#include "attention_codes_avx512.h"
//
#include "attention_bf16_avx512.h"
//
#include "weights-inl.h"

namespace cpullm {
namespace {

constexpr int64_t kBf16Tile = 14, kBf16Least = 8;  // rows of a tile; fewer rows are faster in fp32
constexpr int64_t kBf16Unit = 2;  // inputs of a row side by side

TileShape tile_rows_bf16(int64_t m) {
  return m < kBf16Least ? TileShape{} : TileShape{even_tile(m, kBf16Tile), kBf16Unit};
}

void bf16_tile(int64_t rows, const uint16_t* w, const uint16_t* x, int64_t x_step, int64_t next, int64_t pairs,
               float* y) {
  switch (rows) {
    case 1: return dot_tile_bf16<1>(w, x, x_step, next, pairs, y);
    case 2: return dot_tile_bf16<2>(w, x, x_step, next, pairs, y);
    case 3: return dot_tile_bf16<3>(w, x, x_step, next, pairs, y);
    case 4: return dot_tile_bf16<4>(w, x, x_step, next, pairs, y);
    case 5: return dot_tile_bf16<5>(w, x, x_step, next, pairs, y);
    case 6: return dot_tile_bf16<6>(w, x, x_step, next, pairs, y);
    case 7: return dot_tile_bf16<7>(w, x, x_step, next, pairs, y);
    case 8: return dot_tile_bf16<8>(w, x, x_step, next, pairs, y);
    case 9: return dot_tile_bf16<9>(w, x, x_step, next, pairs, y);
    case 10: return dot_tile_bf16<10>(w, x, x_step, next, pairs, y);
    case 11: return dot_tile_bf16<11>(w, x, x_step, next, pairs, y);
    case 12: return dot_tile_bf16<12>(w, x, x_step, next, pairs, y);
    case 13: return dot_tile_bf16<13>(w, x, x_step, next, pairs, y);
    default: return dot_tile_bf16<14>(w, x, x_step, next, pairs, y);
  }
}

// As many rows as there are sums for share one unpacking, in even blocks: unpacking again costs more than activations
// that come from L3, since a tile prefetches the next one's.
void linear_bf16(const Weight& w, const Bf16Rows& x, const Output& out, Range panels, void* scratch) {
  const int64_t tiles = (x.m + x.tile - 1) / x.tile, blocks = (x.m + kBlockRows - 1) / kBlockRows;
  const int64_t block_rows = (tiles + blocks - 1) / blocks * x.tile;
  for_bf16_blocks(w, x, out, panels, scratch, block_rows,
                  [&](const uint16_t* pairs, int64_t k0, int64_t k1, int64_t row0, int64_t row_end, float* partial) {
                    for (int64_t r = row0; r < row_end; r += x.tile)
                      bf16_tile(min_of(x.tile, x.m - r), pairs, x.x + r * x.k_padded + k0 * x.tile, 4 * x.tile,
                                2 * x.tile * x.k_padded, (k1 - k0) / 2, partial + (r - row0) * kPanel);
                  });
}

TileShape tile_rows_i8(int64_t m, int64_t) { return {even_tile(m, kRunRows), kStep}; }

void linear_i8(const Weight& w, const QuantizedRows& x, const Output& out, Range panels, void* scratch) {
  if (x.m == 1) return linear_row_i8(w, x, out, panels);
  if (w.bits == 8) return linear_i8_runs<false, Zeros::symmetric>(w, x, out, panels, scratch);
  switch (w.form) {
    case Zeros::symmetric: return linear_i8_runs<true, Zeros::symmetric>(w, x, out, panels, scratch);
    case Zeros::integer: return linear_i8_runs<true, Zeros::integer>(w, x, out, panels, scratch);
    default: return linear_i8_runs<true, Zeros::minimum>(w, x, out, panels, scratch);
  }
}

}  // namespace

void use_avx512(Kernels& k) {
  k.tile_i8 = tile_rows_i8;
  k.tile_f32 = tile_rows_f32;
  k.quantize_rows = quantize_rows_avx512;
  k.load_rows = load_rows;
  k.linear_i8 = linear_i8;
  k.block_rows = 64;
  k.linear_f32 = linear_f32;
  if (cpu_has_avx512_bf16()) {
    k.tile_bf16 = tile_rows_bf16;
    k.load_rows_bf16 = load_rows_bf16<kBf16Unit>;
    k.linear_bf16 = linear_bf16;
  }
  k.quantize_weights = quantize_weights;
  k.dequantize_row = dequantize_row;
  k.norm = norm;
  k.norm_heads = norm_heads;
  k.rope = rope;
  k.append = append;
  k.activation = activation;
  k.sum = sum;
  k.attention = cpu_has_avx512_bf16() ? attention_bf16 : attention;
  k.combine_attention = combine_attention;
  k.dot_peak = dot_peak;
  k.read_memory = read_memory;
}

}  // namespace cpullm
