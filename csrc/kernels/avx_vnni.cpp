// The avx_vnni level: avx2 with the 256-bit vpdpbusd of client CPUs.
#define CPULLM_TILE_ROWS 6
#define CPULLM_VNNI
#include "simd_avx2.h"
//
#include "rows-inl.h"
//
#include "limits-inl.h"
#include "tile_i8-inl.h"

namespace cpullm {

void use_avx_vnni(Kernels& k) {
  k.tile_i8 = tile_rows_i8;
  k.linear_i8 = linear_i8;
  k.dot_peak = dot_peak;
  k.read_memory = read_memory;
}

}  // namespace cpullm
