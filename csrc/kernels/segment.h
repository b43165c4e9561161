// What follows the dot products of one segment of a tile: the step of the fp32 chain, see ref.cpp.
#pragma once

#include "kernels.h"

namespace cpullm {
namespace {

// For R rows and the columns of one pass: C = 2 vectors.
struct SegmentEnd {
  const void* params;  // [4, C / 2], 64-byte aligned: zero points int32 or minima fp32, two vectors; scales fp32, two
  const int32_t* minus;  // [R]: -sum of the row's activations over the segment
  const float* sums;  // [R]: the sums as floats, where the weight has minima; else null
  const float* x_scale;  // [R]
  float* block;  // [R, 32] from the pass's first column on: chain of the activation block
  float* y;  // the same of the output
  const int32_t* start;  // [R, C], 64-byte aligned: what the dot products start from; null: zero
  // [R]: what all sums of a row start from besides: `minus` times the zero point all columns share, which then is not
  // subtracted at the end; null: they have their own.
  const int32_t* begin;
  int32_t first, last;  // whether the segment is the first and the last one of its block
};

}  // namespace
}  // namespace cpullm
