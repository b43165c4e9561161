// y[m, n] = x[m, k] W[n, k]^T with exact fp32 activations, written once over Simd.
//
// w = fma(code, scale, base), base = -zero * scale (exact) or the float minimum: the same fp32 weights as ref.cpp.
// Few rows dequantise in registers; many rows dequantise kFloatBlockK inputs of a panel to fp32 (64 KiB, stays in L2)
// and run every tile over it. The order of additions differs between the two, so results depend on m within
// 2 k eps (|x| |W|).
#pragma once

namespace cpullm {
namespace {

constexpr int64_t kFloatBlockK = 512;

// Scales and bases of the two vectors of column pass `half`, group g.
static inline void load_affine(const Weight& w, int64_t at, int half, Simd::F* scale, Simd::F* base) {
  for (int i = 0; i < 2; ++i) {
    const int64_t c = at + half * Simd::kLanes + 16 * i;
    scale[i] = load_scale(w.scales + c, w.scale_type);
    if (w.form == Zeros::minimum) {
      base[i] = load_scale(static_cast<const uint16_t*>(w.zeros) + c, w.scale_type);
    } else if (w.form == Zeros::integer) {
      const Simd::I z = Simd::load_u8_as_i32(static_cast<const uint8_t*>(w.zeros) + c);
      base[i] = Simd::mul(Simd::to_float(Simd::isub(Simd::izero(), z)), scale[i]);
    } else {
      base[i] = Simd::mul(Simd::set1(w.bits == 8 ? -128.0f : -8.0f), scale[i]);
    }
  }
}

// Four inputs of two vectors of columns as fp32 weights: out[i][j] = column vector i, input j.
template <int kBits>
static inline void dequantize_block(const uint8_t* block, int half, const Simd::F* scale, const Simd::F* base,
                                    Simd::F out[2][4]) {
  using S = Simd;
  if (kBits == 4) {
    const S::I v = S::load_packed4_raw(block, half);
    for (int j = 0; j < 4; ++j) {
      out[0][j] = S::fma(S::code4_to_float(S::shift_right(v, 8 * j)), scale[0], base[0]);
      out[1][j] = S::fma(S::code4_to_float(S::shift_right(v, 8 * j + 4)), scale[1], base[1]);
    }
  } else {
    S::I v[2];
    S::load_u8(block, half, v[0], v[1]);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 4; ++j) out[i][j] = S::fma(S::code8_to_float(S::shift_right(v[i], 8 * j)), scale[i], base[i]);
  }
}

// R rows x one panel straight from the codes. One or two rows have four partial sums per output (input mod 4), added
// pairwise at the end: more rows have chains enough, and no registers for them.
template <int R, int kBits>
void direct_f32(const Weight& w, const float* x, int64_t tile, int64_t panel, float* y) {
  using S = Simd;
  constexpr int64_t kBytes = 16 * kBits;
  constexpr int kSums = R <= 2 ? 4 : 1;
  for (int h = 0; h < S::kHalves; ++h) {
    S::F sum[R][2][kSums];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < kSums; ++j) sum[r][i][j] = S::zero();
    const uint8_t* codes = w.codes + panel * (w.k_padded / kStep) * kBytes;
    const float* p = x;
    int64_t k = 0;
    for (int64_t g = 0; g < w.groups; ++g) {
      S::F scale[2], base[2];
      load_affine(w, (panel * w.groups + g) * kPanel, h, scale, base);
      const int64_t end = min_of((g + 1) * w.group, w.k_padded);
      for (; k < end; k += kStep) {
        if (h == 0) _mm_prefetch(reinterpret_cast<const char*>(codes) + 4096, _MM_HINT_T0);
        S::F v[2][4];
        dequantize_block<kBits>(codes, h, scale, base, v);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const S::F a = S::set1(p[j * tile + r]);
            sum[r][0][j % kSums] = S::fma(a, v[0][j], sum[r][0][j % kSums]);
            sum[r][1][j % kSums] = S::fma(a, v[1][j], sum[r][1][j % kSums]);
          }
        codes += kBytes;
        p += kStep * tile;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) {
        const S::F* const s = sum[r][i];
        S::store(y + r * kPanel + h * S::kLanes + 16 * i,
                 kSums == 1 ? s[0] : (s[0] + s[1 % kSums]) + (s[2 % kSums] + s[3 % kSums]));
      }
  }
}

// The codes of four inputs of two vectors of columns, less the symmetric zero point: a byte per input, of 4-bit codes 16
// times that.
template <int kBits>
static inline void signed_bytes(const uint8_t* block, int half, Simd::I v[2]) {
  using S = Simd;
  const S::I zero = S::iset1(int(0x80808080)), high = S::iset1(int(0xf0f0f0f0));
  if (kBits == 4) {
    const S::I both = S::load_packed4_raw(block, half);
    v[0] = S::ixor(S::iand(S::shift_left(both, 4), high), zero);
    v[1] = S::ixor(S::iand(both, high), zero);
  } else {
    S::load_u8(block, half, v[0], v[1]);
    for (int i = 0; i < 2; ++i) v[i] = S::ixor(v[i], zero);
  }
}

// One or two rows times a panel of the symmetric form. A group's inputs times whole numbers are summed first and scaled
// once: a byte moves to the top of its lane and is converted, so a weight costs three operations instead of five, and on
// two cores codes of 8 bits come as fast as memory gives them. The sums are up to 2^28 times too large: see fits_symmetric_f32.
// Registers of one row: 4 sums, 2 totals, 4 shuffles.
template <int R, int kBits>
void symmetric_f32(const Weight& w, const float* x, int64_t tile, int64_t panel, float* y) {
  using S = Simd;
  constexpr int64_t kBytes = 16 * kBits;
  const S::F unit = S::set1(kBits == 4 ? 0x1p-28f : 0x1p-24f);  // of what the converted bytes are multiples of
  for (int h = 0; h < S::kHalves; ++h) {
    S::F total[R][2];
    for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = S::zero();
    const uint8_t* codes = w.codes + panel * (w.k_padded / kStep) * kBytes;
    const float* p = x;
    int64_t k = 0;
    for (int64_t g = 0; g < w.groups; ++g) {
      S::F sum[R][2][2];  // of even and of odd inputs
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2; ++i) sum[r][i][0] = sum[r][i][1] = S::zero();
      const int64_t end = min_of((g + 1) * w.group, w.k_padded);
      for (; k < end; k += kStep) {
        if (h == 0)
          for (int64_t at = 0; at < kBytes; at += 64)
            _mm_prefetch(reinterpret_cast<const char*>(codes) + 4096 + at, _MM_HINT_T0);
        S::I v[2];
        signed_bytes<kBits>(codes, h, v);
#pragma GCC unroll 4
        for (int j = 0; j < kStep; ++j)
          for (int i = 0; i < 2; ++i) {
            const S::F code = S::byte_to_float(v[i], j);
            for (int r = 0; r < R; ++r) sum[r][i][j % 2] = S::fma(S::set1(p[j * tile + r]), code, sum[r][i][j % 2]);
          }
        codes += kBytes;
        p += kStep * tile;
      }
      const uint16_t* const scales = w.scales + (panel * w.groups + g) * kPanel + h * S::kLanes;
      for (int i = 0; i < 2; ++i) {
        const S::F scale = load_scale(scales + 16 * i, w.scale_type);
        for (int r = 0; r < R; ++r) total[r][i] = S::fma(S::mul(sum[r][i][0] + sum[r][i][1], unit), scale, total[r][i]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) S::store(y + r * kPanel + h * S::kLanes + 16 * i, total[r][i]);
  }
}

// Whether symmetric_f32 takes these rows: at most two, and none so large (or not finite) that its sums overflow where
// the outputs do not. With inputs below 2^64, whose squares are finite, and at most 2^24 of them a sum is below 2^120.
inline bool fits_symmetric_f32(const Weight& w, const FloatRows& x) {
  using S = Simd;
  if (w.form != Zeros::symmetric || x.m > 2 || w.k_padded > int64_t(1) << 24) return false;
  S::F squares[2] = {S::zero(), S::zero()};
  for (int64_t i = 0; i < w.k_padded * x.tile; i += 2 * S::kLanes)  // k_padded is a multiple of 32
    for (int j = 0; j < 2; ++j) {
      const S::F v = S::load(x.x + i + j * S::kLanes);
      squares[j] = S::fma(v, v, squares[j]);
    }
  return S::reduce_sum(squares[0] + squares[1]) < __builtin_inff();  // of nan: not
}

// panel [k, 32] fp32 from the codes of inputs [k0, k1).
template <int kBits>
void dequantize_panel(const Weight& w, int64_t panel, int64_t k0, int64_t k1, float* out) {
  using S = Simd;
  constexpr int64_t kBytes = 16 * kBits;
  const uint8_t* codes = w.codes + (panel * (w.k_padded / kStep) + k0 / kStep) * kBytes;
  for (int64_t k = k0; k < k1;) {
    const int64_t g = k / w.group;
    const int64_t end = min_of((g + 1) * w.group, k1);
    S::F scale[S::kHalves][2], base[S::kHalves][2];
    for (int h = 0; h < S::kHalves; ++h) load_affine(w, (panel * w.groups + g) * kPanel, h, scale[h], base[h]);
    for (; k < end; k += kStep, codes += kBytes)
      for (int h = 0; h < S::kHalves; ++h) {
        S::F v[2][4];
        dequantize_block<kBits>(codes, h, scale[h], base[h], v);
        for (int i = 0; i < 2; ++i)
          for (int j = 0; j < 4; ++j) S::store(out + (k - k0 + j) * kPanel + h * S::kLanes + 16 * i, v[i][j]);
      }
  }
}

template <int R>
void tile_f32(const float* w, const float* x, int64_t tile, int64_t k, float* y, bool first) {
  using S = Simd;
  for (int h = 0; h < S::kHalves; ++h) {
    S::F sum[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) sum[r][i] = first ? S::zero() : S::load(y + r * kPanel + h * S::kLanes + 16 * i);
    const float* p = w + h * S::kLanes;
    for (int64_t j = 0; j < k; ++j) {
      const S::F w0 = S::load(p + j * kPanel), w1 = S::load(p + j * kPanel + 16);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const S::F a = S::set1(x[j * tile + r]);
        sum[r][0] = S::fma(a, w0, sum[r][0]);
        sum[r][1] = S::fma(a, w1, sum[r][1]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) S::store(y + r * kPanel + h * S::kLanes + 16 * i, sum[r][i]);
  }
}

void run_tile_f32(int64_t rows, const float* w, const float* x, int64_t tile, int64_t k, float* y, bool first) {
  switch (rows) {
    case 1: return tile_f32<1>(w, x, tile, k, y, first);
    case 2: return tile_f32<2>(w, x, tile, k, y, first);
    case 3: return tile_f32<3>(w, x, tile, k, y, first);
    case 4: return tile_f32<4>(w, x, tile, k, y, first);
#if CPULLM_TILE_ROWS > 6
    case 5: return tile_f32<5>(w, x, tile, k, y, first);
    case 6: return tile_f32<6>(w, x, tile, k, y, first);
    case 7: return tile_f32<7>(w, x, tile, k, y, first);
    case 8: return tile_f32<8>(w, x, tile, k, y, first);
    case 9: return tile_f32<9>(w, x, tile, k, y, first);
    case 10: return tile_f32<10>(w, x, tile, k, y, first);
    case 11: return tile_f32<11>(w, x, tile, k, y, first);
    case 12: return tile_f32<12>(w, x, tile, k, y, first);
#endif
    default: __builtin_trap();  // a tile this level does not make
  }
}

template <int kBits>
void run_direct_f32(int64_t rows, const Weight& w, const float* x, int64_t tile, int64_t panel, bool symmetric,
                    float* y) {
  if (symmetric)
    return rows == 1 ? symmetric_f32<1, kBits>(w, x, tile, panel, y) : symmetric_f32<2, kBits>(w, x, tile, panel, y);
  switch (rows) {
    case 1: return direct_f32<1, kBits>(w, x, tile, panel, y);
    case 2: return direct_f32<2, kBits>(w, x, tile, panel, y);
#if CPULLM_TILE_ROWS > 6
    case 3: return direct_f32<3, kBits>(w, x, tile, panel, y);
    case 4: return direct_f32<4, kBits>(w, x, tile, panel, y);
    case 5: return direct_f32<5, kBits>(w, x, tile, panel, y);
    case 6: return direct_f32<6, kBits>(w, x, tile, panel, y);
    case 7: return direct_f32<7, kBits>(w, x, tile, panel, y);
    case 8: return direct_f32<8, kBits>(w, x, tile, panel, y);
#endif
    default: __builtin_trap();  // a tile this level does not make
  }
}

// out[k] = row `row` of W: one 4-byte lane of every block.
[[maybe_unused]] void dequantize_row(const Weight& w, int64_t row, void* out, Float type) {
  using S = Simd;
  const int64_t column = row % kPanel, block_bytes = 16 * w.bits;
  const bool high = w.bits == 4 && column >= 16;
  const int64_t lane = w.bits == 4 ? column % 16 : column;
  const uint64_t mask = w.bits == 4 ? 0x0f0f0f0f0f0f0f0full : ~0ull;
  const uint8_t* codes = w.codes + row / kPanel * (w.k_padded / kStep) * block_bytes + 4 * lane;
  const int64_t first = row / kPanel * w.groups * kPanel + column;
  for (int64_t k = 0; k < w.k_padded; k += kChunk) {
    const int64_t at = first + k / w.group * kPanel;
    const float scale = load_float(w.scales, at, w.scale_type);
    const float base = w.form == Zeros::minimum   ? load_float(w.zeros, at, w.scale_type)
                       : w.form == Zeros::integer ? -float(static_cast<const uint8_t*>(w.zeros)[at]) * scale
                                                  : (w.bits == 8 ? -128.0f : -8.0f) * scale;
    alignas(64) uint8_t bytes[kChunk];
    for (int s = 0; s < 8; ++s) memcpy(bytes + 4 * s, codes + s * block_bytes, 4);
    codes += 8 * block_bytes;
    for (int s = 0; s < 4; ++s) {
      uint64_t v;
      memcpy(&v, bytes + 8 * s, 8);
      v = (high ? v >> 4 : v) & mask;
      memcpy(bytes + 8 * s, &v, 8);
    }
    alignas(64) float values[kChunk];
    const S::F scales = S::set1(scale), bases = S::set1(base);
    for (int64_t i = 0; i < kChunk; i += S::kLanes)
      S::store(values + i, S::fma(S::to_float(S::load_u8_as_i32(bytes + i)), scales, bases));
    const int64_t count = min_of(kChunk, w.k - k);
    if (type == Float::f32) {
      memcpy(static_cast<float*>(out) + k, values, size_t(count) * 4);
    } else if (count < kChunk) {
      for (int64_t i = 0; i < count; ++i) store_float(out, k + i, type, values[i]);
    } else {
      uint16_t* to = static_cast<uint16_t*>(out) + k;
      for (int64_t i = 0; i < kChunk; i += S::kLanes)
        type == Float::bf16 ? S::store_bf16(to + i, S::load(values + i)) : S::store_f16(to + i, S::load(values + i));
    }
  }
}

constexpr int64_t kDirectFloatRows = CPULLM_TILE_ROWS > 6 ? 8 : 2;  // with 32 registers, or with 16

[[maybe_unused]] int64_t tile_rows_f32(int64_t m) {
  return even_tile(m, m <= kDirectFloatRows ? kDirectFloatRows : Simd::kFloatRows);
}

[[maybe_unused]] void linear_f32(const Weight& w, const FloatRows& x, const Output& out, Range panels, void* scratch) {
  float* weights = static_cast<float*>(scratch);
  float* partial = weights + kFloatBlockK * kPanel;
  const int64_t block_rows = kBlockRows / x.tile * x.tile;
  const bool symmetric = fits_symmetric_f32(w, x);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    if (x.m <= kDirectFloatRows) {
      if (w.bits == 4) {
        run_direct_f32<4>(x.m, w, x.x, x.tile, panel, symmetric, partial);
      } else {
        run_direct_f32<8>(x.m, w, x.x, x.tile, panel, symmetric, partial);
      }
      for (int64_t r = 0; r < x.m; ++r) store_panel(out, w.n, r, panel, partial + r * kPanel);
      continue;
    }
    for (int64_t row0 = 0; row0 < x.m; row0 += block_rows) {
      const int64_t row_end = min_of(row0 + block_rows, x.m);
      for (int64_t k0 = 0; k0 < w.k_padded; k0 += kFloatBlockK) {
        const int64_t k1 = min_of(k0 + kFloatBlockK, w.k_padded);
        if (w.bits == 4) {
          dequantize_panel<4>(w, panel, k0, k1, weights);
        } else {
          dequantize_panel<8>(w, panel, k0, k1, weights);
        }
        for (int64_t r = row0; r < row_end; r += x.tile)
          run_tile_f32(min_of(x.tile, x.m - r), weights, x.x + r * x.k_padded + k0 * x.tile, x.tile, k1 - k0,
                       partial + (r - row0) * kPanel, k0 == 0);
      }
      for (int64_t r = row0; r < row_end; ++r) store_panel(out, w.n, r, panel, partial + (r - row0) * kPanel);
    }
  }
}

}  // namespace
}  // namespace cpullm
