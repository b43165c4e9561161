// y[m, n] = x[m, k] W[n, k]^T with int8 activations, written once over Simd. Same chain as ref.cpp, bit for bit.
//
// One tile = R rows x 32 columns. Few rows read the packed nibbles directly: a panel is streamed from memory once
// per tile of R <= kPackedRows. Many rows first unpack kBlockK inputs of the panel to bytes (16 KiB, stays in L1),
// then run every tile of R <= kTileRows over it.
// Registers at R = 14 on avx512: 28 accumulators, 2 vectors of codes, 1 broadcast = 31 of 32. The fp32 chains live
// in memory (L1) and are touched once per segment.
// Zero points: sum (q - xz)(c - z) = sum q c - z sum (q - xz) - xz sum c. Both corrections are one 16-bit pair
// product: lane (z, sum c), the same for all rows, times (sum (q - xz), xz), the same for all columns.
// Ranges: one segment is at most 32 inputs: |sum q c| <= 32 * 127 * 255 < 2^23, sum c <= 32 * 255 < 2^15,
// |sum (q - xz)| <= 32 * 254 < 2^15, so every int16 factor fits and the corrected int32 result is exact in fp32.
#pragma once

namespace cpullm {
namespace {

constexpr int64_t kBlockK = 512;    // inputs unpacked at a time: a multiple of kActBlock

enum class Codes { packed4, unpacked4, u8 };

// What one tile needs to know. Pointers stand at the tile's first row, the panel and k_begin.
struct TileArgs {
  const uint8_t* codes;    // blocks
  const int32_t* sums_c;   // [chunks, 32]: code sums, of the unpacked forms
  const uint16_t* scales;  // [groups, 32] of the whole panel
  const void* zeros;       // [groups, 32] of the whole panel
  const int8_t* q;         // [.., tile, 4]
  const float* x_scale;    // [blocks, tile]
  const int32_t* minus;    // [segments, tile]
  float* y;                // [rows, 32] partial sums, read and written
  int64_t k_begin, k_end, group, tile;
  Zeros form;
  Float scale_type;
};

// kWhole: every activation block is one segment (the group is a multiple of kActBlock).
template <int R, Codes kCodes, bool kWhole>
void tile_i8(const TileArgs& a) {
  using S = Simd;
  using I = S::I;
  using F = S::F;
  constexpr int H = S::kHalves;
  constexpr int64_t kBlockBytes = kCodes == Codes::packed4 ? 64 : 128;
  constexpr int kSymmetricZero = kCodes == Codes::u8 ? S::kBias8 : 8;
  constexpr bool kSum = kCodes == Codes::packed4;  // sum the codes on the way: one more row, of ones
  constexpr int N = R + (kSum ? 1 : 0);
  constexpr bool kDotTile = S::kDotTile && !kSum;  // the dot products of a segment in one piece of assembly
  alignas(64) int32_t acc[kDotTile ? R : 1][kPanel];
  const uint8_t* codes = a.codes;
  const int8_t* q = a.q;
  const int64_t q_step = a.tile * kStep;
  const float* x_scale = a.x_scale;
  const int32_t* minus = a.minus;
  int64_t group = a.k_begin / a.group;
  int64_t group_end = (group + 1) * a.group;
  for (int64_t k = a.k_begin; k < a.k_end;) {
    const int64_t block_begin = k;
    const int64_t block_end = min_of((k / kActBlock + 1) * kActBlock, a.k_end);
    F sum[H][R][2] = {};  // dead where kWhole keeps the chain in y
    while (k < block_end) {
      const bool first = k == block_begin;
      const int64_t end = kWhole ? block_end : min_of(group_end, block_end);
      for (int h = 0; h < H; ++h) {
        typename S::template Dot<kCodes == Codes::u8> dot[N][2];
        const uint8_t* w = codes;
        const int8_t* x = q;
        if (kDotTile) {
          S::template dot_tile<R>(w, x, q_step, (end - k) / kStep, acc[0]);
        } else {
          for (int r = 0; r < N; ++r) {
            dot[r][0].clear();
            dot[r][1].clear();
          }
        }
        const auto sum_of = [&](int r, int i) { return kDotTile ? S::load_i32(acc[r] + 16 * i) : dot[r][i].result(); };
        for (int64_t c = k; !kDotTile && c < end; c += kChunk) {
#pragma GCC unroll 8
          for (int s = 0; s < 8; ++s) {
            I lo, hi;
            if (kCodes == Codes::packed4) {
              if (h == 0) _mm_prefetch(reinterpret_cast<const char*>(w) + 4096, _MM_HINT_T0);
              S::load_packed4(w, h, lo, hi);
            } else {
              S::load_u8(w, h, lo, hi);
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
              const I v = S::broadcast4(x + r * kStep);
              dot[r][0].step(lo, v);
              dot[r][1].step(hi, v);
            }
            if (kSum) {
              dot[N - 1][0].step(lo, S::iset1(0x01010101));
              dot[N - 1][1].step(hi, S::iset1(0x01010101));
            }
            w += kBlockBytes;
            x += q_step;
          }
#pragma GCC unroll 16
          for (int r = 0; r < N; ++r) {
            dot[r][0].end_chunk();
            dot[r][1].end_chunk();
          }
        }
        const int64_t c0 = group * kPanel + h * S::kLanes, c1 = c0 + 16;
        I pair0, pair1;  // low: zero point, high: sum of codes
        if (kSum) {
          pair0 = dot[N - 1][0].result();
          pair1 = dot[N - 1][1].result();
        } else {
          pair0 = pair1 = S::izero();
          for (int64_t c = (k - a.k_begin) / kChunk; c < (end - a.k_begin) / kChunk; ++c) {
            pair0 = S::iadd(pair0, S::load_i32(a.sums_c + c * kPanel + h * S::kLanes));
            pair1 = S::iadd(pair1, S::load_i32(a.sums_c + c * kPanel + h * S::kLanes + 16));
          }
        }
        pair0 = S::shift_left16(pair0);
        pair1 = S::shift_left16(pair1);
        if (a.form == Zeros::integer) {
          const uint8_t* zeros = static_cast<const uint8_t*>(a.zeros);
          pair0 = S::ior(pair0, S::load_u8_as_i32(zeros + c0));
          pair1 = S::ior(pair1, S::load_u8_as_i32(zeros + c1));
        } else if (a.form == Zeros::symmetric) {
          pair0 = S::ior(pair0, S::iset1(kSymmetricZero));
          pair1 = S::ior(pair1, S::iset1(kSymmetricZero));
        }
        const F scale0 = load_scale(a.scales + c0, a.scale_type), scale1 = load_scale(a.scales + c1, a.scale_type);
        if (a.form == Zeros::minimum) {
          const uint16_t* minima = static_cast<const uint16_t*>(a.zeros);
          const F min0 = load_scale(minima + c0, a.scale_type), min1 = load_scale(minima + c1, a.scale_type);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const F t = S::set1(-float(int16_t(minus[r])));
            const F f0 = S::to_float(S::add_pairs(sum_of(r, 0), pair0, minus + r));
            const F f1 = S::to_float(S::add_pairs(sum_of(r, 1), pair1, minus + r));
            const F s0 = first ? S::mul(f0, scale0) : S::fma(f0, scale0, sum[h][r][0]);
            const F s1 = first ? S::mul(f1, scale1) : S::fma(f1, scale1, sum[h][r][1]);
            sum[h][r][0] = S::fma(min0, t, s0);
            sum[h][r][1] = S::fma(min1, t, s1);
          }
        } else if (kWhole) {
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const F s = S::set1(x_scale[r]);
            float* y = a.y + r * kPanel + h * S::kLanes;
            const F f0 = S::to_float(S::add_pairs(sum_of(r, 0), pair0, minus + r));
            const F f1 = S::to_float(S::add_pairs(sum_of(r, 1), pair1, minus + r));
            S::store(y, S::fma(S::mul(f0, scale0), s, S::load(y)));
            S::store(y + 16, S::fma(S::mul(f1, scale1), s, S::load(y + 16)));
          }
        } else if (first) {
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            sum[h][r][0] = S::mul(S::to_float(S::add_pairs(sum_of(r, 0), pair0, minus + r)), scale0);
            sum[h][r][1] = S::mul(S::to_float(S::add_pairs(sum_of(r, 1), pair1, minus + r)), scale1);
          }
        } else {
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const F f0 = S::to_float(S::add_pairs(sum_of(r, 0), pair0, minus + r));
            const F f1 = S::to_float(S::add_pairs(sum_of(r, 1), pair1, minus + r));
            sum[h][r][0] = S::fma(f0, scale0, sum[h][r][0]);
            sum[h][r][1] = S::fma(f1, scale1, sum[h][r][1]);
          }
        }
      }
      codes += (end - k) / kStep * kBlockBytes;
      q += (end - k) / kStep * q_step;
      minus += a.tile;
      k = end;
      if (k == group_end) {
        ++group;
        group_end += a.group;
      }
    }
    if (!kWhole || a.form == Zeros::minimum) {
      for (int r = 0; r < R; ++r) {
        const F s = S::set1(x_scale[r]);
        for (int h = 0; h < H; ++h) {
          for (int i = 0; i < 2; ++i) {
            float* y = a.y + r * kPanel + h * S::kLanes + 16 * i;
            S::store(y, S::fma(sum[h][r][i], s, S::load(y)));
          }
        }
      }
    }
    x_scale += a.tile;
  }
}

template <Codes kCodes, bool kWhole>
void run_tile(int64_t rows, const TileArgs& a) {
  switch (rows) {
    case 1: return tile_i8<1, kCodes, kWhole>(a);
    case 2: return tile_i8<2, kCodes, kWhole>(a);
    case 3: return tile_i8<3, kCodes, kWhole>(a);
    case 4: return tile_i8<4, kCodes, kWhole>(a);
    default: break;
  }
  if constexpr (kCodes != Codes::packed4) {  // never more than kPackedRows
    switch (rows) {
      case 5: return tile_i8<5, kCodes, kWhole>(a);
#if CPULLM_TILE_ROWS > 5
      case 6: return tile_i8<6, kCodes, kWhole>(a);
      case 7: return tile_i8<7, kCodes, kWhole>(a);
      case 8: return tile_i8<8, kCodes, kWhole>(a);
      case 9: return tile_i8<9, kCodes, kWhole>(a);
      case 10: return tile_i8<10, kCodes, kWhole>(a);
      case 11: return tile_i8<11, kCodes, kWhole>(a);
      case 12: return tile_i8<12, kCodes, kWhole>(a);
      case 13: return tile_i8<13, kCodes, kWhole>(a);
      case 14: return tile_i8<14, kCodes, kWhole>(a);
#endif
      default: break;
    }
  }
  __builtin_trap();  // a tile this level does not make
}

template <Codes kCodes>
void run_tile(int64_t rows, const TileArgs& a) {
  constexpr bool kAlwaysWhole = kChunk % kActBlock == 0;
  if (kAlwaysWhole || a.group % kActBlock == 0) {
    run_tile<kCodes, true>(rows, a);
  } else if constexpr (!kAlwaysWhole) {
    run_tile<kCodes, false>(rows, a);
  }
}

// Codes of one K block of a panel to bytes (4 bits; 8-bit codes are bytes already), and their sums per chunk, column.
template <Codes kCodes>
void prepare_block(const uint8_t* codes, int64_t k, uint8_t* bytes, int32_t* sums) {
  using S = Simd;
  for (int64_t c = 0; c < k / kChunk; ++c) {
    const uint8_t* block = codes;
    if (kCodes == Codes::unpacked4) {
      for (int s = 0; s < 8; ++s) S::unpack4(codes + 64 * s, bytes + 128 * s);
      block = bytes;
      codes += 8 * 64;
      bytes += 8 * 128;
    } else {
      codes += 8 * 128;
    }
    for (int h = 0; h < S::kHalves; ++h) {
      typename S::template Dot<kCodes == Codes::u8> dot[2];
      dot[0].clear();
      dot[1].clear();
      for (int s = 0; s < 8; ++s) {
        S::I lo, hi;
        S::load_u8(block + 128 * s, h, lo, hi);
        dot[0].step(lo, S::iset1(0x01010101));
        dot[1].step(hi, S::iset1(0x01010101));
      }
      dot[0].end_chunk();
      dot[1].end_chunk();
      S::store_i32(sums + c * kPanel + h * S::kLanes, dot[0].result());
      S::store_i32(sums + c * kPanel + h * S::kLanes + 16, dot[1].result());
    }
  }
}

// Up to this many rows read the packed codes directly, in tiles of at most kPackedRows.
constexpr int64_t kDirectRows = 2 * Simd::kPackedRows;

TileShape tile_rows_i8(int64_t m, int64_t) {
  return {even_tile(m, m <= kDirectRows ? Simd::kPackedRows : Simd::kTileRows), kStep};
}

[[maybe_unused]] void linear_i8(const Weight& w, const QuantizedRows& x, const Output& out, Range panels,
                                void* scratch) {
  const bool unpack = w.bits == 4 && x.m > kDirectRows;
  uint8_t* bytes = static_cast<uint8_t*>(scratch);
  int32_t* sums_c = reinterpret_cast<int32_t*>(bytes + 32 * kBlockK);
  float* partial = reinterpret_cast<float*>(bytes + 64 * 1024);
  const int64_t block_bytes = 16 * w.bits;
  const int64_t block_rows = kBlockRows / x.tile * x.tile;
  // Few rows on a wide level go through the whole of k at once: nothing is unpacked, the stream must not pause.
  const int64_t block_k = unpack || w.bits == 8 || Simd::kHalves > 1 ? kBlockK : w.k_padded;
  TileArgs a;
  a.sums_c = sums_c;
  a.group = w.group;
  a.tile = x.tile;
  a.form = w.form;
  a.scale_type = w.scale_type;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const uint8_t* panel_codes = w.codes + panel * (w.k_padded / kStep) * block_bytes;
    a.scales = w.scales + panel * w.groups * kPanel;
    a.zeros = w.form == Zeros::integer ? static_cast<const uint8_t*>(w.zeros) + panel * w.groups * kPanel
              : w.form == Zeros::minimum
                  ? static_cast<const void*>(static_cast<const uint16_t*>(w.zeros) + panel * w.groups * kPanel)
                  : nullptr;
    for (int64_t row0 = 0; row0 < x.m; row0 += block_rows) {
      const int64_t row_end = min_of(row0 + block_rows, x.m);
      memset(partial, 0, size_t(row_end - row0) * kPanel * sizeof(float));
      int64_t segment = 0;
      for (int64_t k0 = 0; k0 < w.k_padded; k0 += block_k) {
        a.k_begin = k0;
        a.k_end = min_of(k0 + block_k, w.k_padded);
        a.codes = panel_codes + k0 / kStep * block_bytes;
        if (unpack) {
          prepare_block<Codes::unpacked4>(a.codes, a.k_end - k0, bytes, sums_c);
          a.codes = bytes;
        } else if (w.bits == 8) {
          prepare_block<Codes::u8>(a.codes, a.k_end - k0, nullptr, sums_c);
        }
        for (int64_t r = row0; r < row_end; r += x.tile) {
          a.q = x.q + r * x.k_padded + k0 * x.tile;
          a.x_scale = x.scale + r * x.blocks + k0 / kActBlock * x.tile;
          a.minus = x.minus + r * x.segments + segment * x.tile;
          a.y = partial + (r - row0) * kPanel;
          const int64_t rows = min_of(x.tile, x.m - r);
          if (w.bits == 8) {
            run_tile<Codes::u8>(rows, a);
          } else if (unpack) {
            run_tile<Codes::unpacked4>(rows, a);
          } else {
            run_tile<Codes::packed4>(rows, a);
          }
        }
        segment += count_segments(k0, a.k_end, w.group);
      }
      for (int64_t r = row0; r < row_end; ++r) store_panel(out, w.n, r, panel, partial + (r - row0) * kPanel);
    }
  }
}

}  // namespace
}  // namespace cpullm
