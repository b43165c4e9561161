// What this level can do at best, for benchmarks: its dot sequence on registers, and streaming reads.
#pragma once

namespace cpullm {
namespace {

// Without VNNI a step is vpmaddubsw and vpaddw, a chunk ends by vpmaddwd and vpaddd: 18 operations. The kernel's first
// step adds nothing, so it needs 17 of them and could pass this peak by a twentieth.
// `rounds` rounds of 8-step chunks on independent accumulators, as many as stay in registers beside the operands; returns
// the multiplications and additions done.
int64_t dot_peak(int64_t rounds, int32_t* sink) {
  using S = Simd;
  constexpr int kDots = sizeof(S::Dot) == sizeof(S::I) ? 12 : 5;  // without VNNI a dot product has two sums
  S::Dot dot[kDots];
#pragma GCC unroll 12
  for (auto& d : dot) d.clear();
  S::I codes = S::iset1(0x01020304), x = S::iset1(0x02020202);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) {
#pragma GCC unroll 12
      for (auto& d : dot) {
        d.step(codes, x);
        __asm__ volatile("" : "+x"(codes));  // or the product would be computed once for all
      }
    }
#pragma GCC unroll 12
    for (auto& d : dot) d.end_chunk();
  }
  S::I total = S::izero();
#pragma GCC unroll 12
  for (auto& d : dot) total = S::iadd(total, d.result());
  *sink = S::reduce_add(total);
  return rounds * 8 * kDots * S::kLanes * 4 * 2;
}

// Reads bytes [0, bytes) once, bytes a multiple of 512; returns a sum that keeps the loads alive.
int32_t read_memory(const void* data, int64_t bytes) {
  using S = Simd;
  constexpr int64_t kVec = 4 * S::kLanes;
  const int32_t* p = static_cast<const int32_t*>(data);
  S::I sum[4];
  for (auto& s : sum) s = S::izero();
  for (int64_t i = 0; i < bytes / 4; i += 128) {
#pragma GCC unroll 8
    for (int64_t line = 0; line < 512; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(p + i) + 4096 + line, _MM_HINT_T0);
#pragma GCC unroll 16
    for (int64_t j = 0; j < 512 / kVec; ++j) sum[j % 4] = S::iadd(sum[j % 4], S::load_i32(p + i + j * S::kLanes));
  }
  return S::reduce_add(S::iadd(S::iadd(sum[0], sum[1]), S::iadd(sum[2], sum[3])));
}

}  // namespace
}  // namespace cpullm
