// The avx2 level: AVX2, FMA and F16C; int8 products by pmaddubsw.
#define CPULLM_TILE_ROWS 6
#include "simd_avx2.h"
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
#include "tile_i8-inl.h"
//
#include "weights-inl.h"

namespace cpullm {

void use_avx2(Kernels& k) {
  k.tile_i8 = tile_rows_i8;
  k.tile_f32 = tile_rows_f32;
  k.quantize_rows = quantize_rows;
  k.load_rows = load_rows;
  k.linear_i8 = linear_i8;
  k.linear_f32 = linear_f32;
  k.quantize_weights = quantize_weights;
  k.dequantize_row = dequantize_row;
  k.norm = norm;
  k.norm_heads = norm_heads;
  k.rope = rope;
  k.append = append;
  k.activation = activation;
  k.sum = sum;
  k.attention = attention;
  k.combine_attention = combine_attention;
  k.dot_peak = dot_peak;
  k.read_memory = read_memory;
}

}  // namespace cpullm
