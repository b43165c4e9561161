// y[m, n] = x[m, k] W[n, k]^T with activations and weights rounded to bf16, products and sums in fp32; for levels of 512
// bits. Codes of kBf16BlockK inputs of a panel become bf16 pairs [k/2, 32 columns, 2] (the order of vdpbf16ps and of
// an AMX B tile), then every tile of rows runs over them. Only for many rows: few rows are bound by memory, and the fp32
// kernels read the same codes.
#pragma once

namespace cpullm {
namespace {

constexpr int64_t kBf16BlockK = 512;  // 32 KiB of pairs

// bf16 of lo, then of hi; round to nearest even, subnormals are zero.
inline __m512i to_bf16(__m512 lo, __m512 hi) {
  __m512i v;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(v) : "v"(lo), "v"(hi));
  return v;
}

// Words: lane c = bf16 of lo[c], then of hi[c].
inline __m512i pack_bf16(__m512 lo, __m512 hi) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, to_bf16(lo, hi));
}

// Inputs [k0, k1) of a panel as bf16 pairs.
template <int kBits>
inline void dequantize_pairs(const Weight& w, int64_t panel, int64_t k0, int64_t k1, uint16_t* pairs) {
  using S = Simd;
  constexpr int64_t kBytes = 16 * kBits;
  const uint8_t* codes = w.codes + (panel * (w.k_padded / kStep) + k0 / kStep) * kBytes;
  for (int64_t k = k0; k < k1;) {
    const int64_t end = min_of((k / w.group + 1) * w.group, k1);
    S::F scale[2], base[2], out[2][4];
    load_affine(w, (panel * w.groups + k / w.group) * kPanel, 0, scale, base);
    for (; k < end; k += kStep, codes += kBytes, pairs += kStep * kPanel) {
      dequantize_block<kBits>(codes, 0, scale, base, out);
      for (int p = 0; p < 2; ++p)
        for (int i = 0; i < 2; ++i)
          _mm512_storeu_si512(pairs + p * 2 * kPanel + 32 * i, pack_bf16(out[i][2 * p], out[i][2 * p + 1]));
    }
  }
}

// Rows of one tile, in turns of 128 inputs: their stores share lines, which then still are in L1.
template <int64_t kUnit>
void load_tile_bf16(const Rows& in, const Bf16Rows& out, Range rows) {
  constexpr int64_t kTurn = 128;
  alignas(64) float v[kChunk];
  alignas(64) uint16_t b[kChunk];
  for (int64_t j0 = 0; j0 < out.k_padded; j0 += kTurn) {
    const int64_t j1 = min_of(j0 + kTurn, out.k_padded);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const char* row = row_address(in, r);
      uint16_t* to = out.x + r / out.tile * out.tile * out.k_padded + r % out.tile * kUnit;
      for (int64_t j = j0; j < j1; j += kChunk) {
        load_chunk(in, row, j, v);
        for (int64_t i = 0; i < kChunk; i += Simd::kLanes) Simd::store_bf16(b + i, Simd::load(v + i));
        for (int64_t i = 0; i < kChunk; i += kUnit)
          memcpy(to + (j + i) * out.tile, b + i, size_t(kUnit) * sizeof(uint16_t));
      }
    }
  }
}

template <int64_t kUnit>
void load_rows_bf16(const Rows& in, const Bf16Rows& out, Range rows) {
  for (int64_t r = rows.begin; r < rows.end;) {
    const int64_t end = min_of((r / out.tile + 1) * out.tile, rows.end);
    load_tile_bf16<kUnit>(in, out, {r, end});
    r = end;
  }
}

// Runs `block(pairs, k0, k1, row0, row_end, partial)` over all blocks of inputs of all panels, and stores the sums that
// it leaves in partial [rows, 32]. Codes are unpacked once per block_rows rows: whole tiles, at most kBlockRows and two
// tiles.
template <class F>
void for_bf16_blocks(const Weight& w, const Bf16Rows& x, const Output& out, Range panels, void* scratch,
                     int64_t block_rows, const F& block) {
  static_assert(64 * 1024 + (kBlockRows + 2 * kMaxTile) * kPanel * int64_t(sizeof(float)) <= kScratchBytes,
                "pairs and partial sums fit");
  auto* pairs = static_cast<uint16_t*>(scratch);
  float* partial = reinterpret_cast<float*>(static_cast<char*>(scratch) + 64 * 1024);
  for (int64_t row0 = 0; row0 < x.m; row0 += block_rows) {
    const int64_t row_end = min_of(row0 + block_rows, x.m);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      memset(partial, 0, size_t((row_end - row0 + x.tile - 1) / x.tile * x.tile) * kPanel * sizeof(float));
      for (int64_t k0 = 0; k0 < w.k_padded; k0 += kBf16BlockK) {
        const int64_t k1 = min_of(k0 + kBf16BlockK, w.k_padded);
        w.bits == 8 ? dequantize_pairs<8>(w, panel, k0, k1, pairs) : dequantize_pairs<4>(w, panel, k0, k1, pairs);
        block(pairs, k0, k1, row0, row_end, partial);
      }
      for (int64_t r = row0; r < row_end; ++r) store_panel(out, w.n, r, panel, partial + (r - row0) * kPanel);
    }
  }
}

}  // namespace
}  // namespace cpullm
