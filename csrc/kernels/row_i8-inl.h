// One row times a panel or two, from the first segment to the last: few enough numbers for intrinsics to keep all of
// them in registers. Included by linear_i8-inl.h; the same chain as tile_i8, bit for bit.
//
// Where every block of activations is made of equal segments and none of its inputs is kept apart, its code has no
// branch: at groups of 32, ends of segments are a third of the work, and mispredicted or dependent ones stop the
// stream of codes. High nibbles are multiplied in place where the dot product takes a code times 16 without saturation
// (240 * 127 < 2^15): one shift per segment instead of one per step.
// The thin streams of scales and zero points are prefetched: the core's own prefetchers lose them beside the codes.
// Registers (avx512): 4 sums, 4 chains of a panel, codes, inputs, masks: 14 of 32; of two panels 18.
#pragma once

namespace cpullm {
namespace {

// A prefetch that stays among the loads where it is written: GCC moves the intrinsic's, a block's in front of its first
// product, and a Zen 5 then reads up to a seventh slower.
inline __attribute__((always_inline)) void ask_in_order(const uint8_t* at) {
  __asm__ volatile("prefetcht0 %0" : : "m"(*at));
}

// kAsk: asks for codes step by step, see pair_panels; else by `prefetch`.
template <Codes kCodes, Zeros kForm, Float kScale, int kPanels, bool kAsk>
struct Row {
  using S = Simd;
  using I = S::I;
  using F = S::F;
  static constexpr int H = S::kHalves, L = S::kLanes;
  static constexpr int64_t kBlockBytes = kCodes == Codes::packed4 ? 64 : 128;
  static constexpr int kHighBits = kCodes == Codes::packed4 ? S::kHighBits : 0;
  static constexpr int64_t kToL1 = kPanels == 1 ? kLoneToL1 : kPairToL1;
  static constexpr int kChains = kPanels == 1 ? S::kDotChains : 1;  // of a sum

  const uint8_t* codes;
  const int8_t* q;
  const int32_t* minus;
  const uint32_t* apart_rows;
  const uint16_t *scales, *minima;
  const uint8_t* zeros;
  bool prefetch;  // prefetch_codes
  int64_t next_codes, next_params;  // see TileArgs
  F block[kPanels][H][2];

  // One segment of `chunks` chunks; kApart: an input may be kept apart, and `apart` is of this segment.
  template <bool kApart>
  inline __attribute__((always_inline)) void segment(bool first, int64_t chunks, const int32_t* apart) {
#pragma GCC unroll 2
    for (int64_t p = 0; p < kPanels; ++p) {
      const int64_t at = p * next_params;
      _mm_prefetch(reinterpret_cast<const char*>(scales + at) + 256, _MM_HINT_T0);
      if (kForm == Zeros::integer) _mm_prefetch(reinterpret_cast<const char*>(zeros + at) + 128, _MM_HINT_T0);
      if (kForm == Zeros::minimum) _mm_prefetch(reinterpret_cast<const char*>(minima + at) + 256, _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) {
      typename S::Dot dot[kPanels][kChains][2];
#pragma GCC unroll 4
      for (auto& chains : dot)
#pragma GCC unroll 2
        for (auto& chain : chains)
          for (auto& d : chain) d.clear();
      const uint8_t* w = codes;
      const int8_t* x = q;
      for (int64_t c = 0; c < chunks; ++c) {
        if (!kAsk && h == 0 && prefetch)
#pragma GCC unroll 16
          for (int64_t at = 0; at < 8 * kBlockBytes; at += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(w) + kCodesToL2 + at, _MM_HINT_T1);
            if (kCodes == Codes::packed4) _mm_prefetch(reinterpret_cast<const char*>(w) + kCodesToL1 + at, _MM_HINT_T0);
          }
#pragma GCC unroll 8
        for (int s = 0; s < 8; ++s) {
          const I four = S::broadcast4(x + kStep * s);
#pragma GCC unroll 2
          for (int p = 0; p < kPanels; ++p) {
            const uint8_t* const step = w + p * next_codes + kBlockBytes * s;
            if (kAsk && h == 0) {
              ask_in_order(step + kToL1);
              if (kCodes == Codes::u8) ask_in_order(step + kToL1 + 64);
            }
            I lo, hi;
            if (kCodes == Codes::packed4) {
              S::load_nibbles(step, h, lo, hi);
            } else {
              if (!kAsk) _mm_prefetch(reinterpret_cast<const char*>(step) + 4096 + 64 * h, _MM_HINT_T0);
              if (!kAsk && H == 1) _mm_prefetch(reinterpret_cast<const char*>(step) + 4160, _MM_HINT_T0);
              S::load_u8(step, h, lo, hi);
            }
            dot[p][s % kChains][0].step(lo, four);
            dot[p][s % kChains][1].step(hi, four);
          }
        }
        for (auto& chains : dot)
          for (auto& chain : chains)
            for (auto& d : chain) d.end_chunk();
        w += 8 * kBlockBytes;
        x += kChunk;
      }
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        I sum[2] = {dot[p][0][0].result(), dot[p][0][1].result()};
        if (kChains == 2)
          for (int i = 0; i < 2; ++i) sum[i] = S::iadd(sum[i], dot[p][kChains - 1][i].result());
        if (kHighBits) sum[1] = S::shift_right_signed(sum[1], kHighBits);
        if (kApart && *apart_rows) {
          I lo, hi;
          code_column<kCodes>(codes + p * next_codes, *apart & 255, h, lo, hi);
          sum[0] = S::iadd(sum[0], S::imul16(lo, *apart >> 8));
          sum[1] = S::iadd(sum[1], S::imul16(hi, *apart >> 8));
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int64_t at = p * next_params + h * L + 16 * i;
          if (kForm == Zeros::integer) {
            sum[i] = S::add_times(sum[i], S::load_u8_as_i32(zeros + at), minus);
          } else if (kForm == Zeros::symmetric) {
            sum[i] = S::add_times(sum[i], S::iset1(kSymmetricZero<kCodes>), minus);
          }
          const F f = S::to_float(sum[i]), scale = load_scale(scales + at, kScale);
          F chain = first ? S::mul(f, scale) : S::fma(f, scale, block[p][h][i]);
          if (kForm == Zeros::minimum) chain = S::fma(load_scale(minima + at, kScale), S::set1(-float(*minus)), chain);
          block[p][h][i] = chain;
        }
      }
    }
    codes += chunks * 8 * kBlockBytes;
    q += chunks * kChunk;
    ++minus;
    ++apart_rows;
  }

  void next_group() {
    scales += kPanel;
    if (kForm == Zeros::integer) zeros += kPanel;
    if (kForm == Zeros::minimum) minima += kPanel;
  }
};

// kChunks: chunks of every segment of a full block; 0: segments of any length. Not inlined: a caller's numbers would take
// registers from its loops.
template <Codes kCodes, Zeros kForm, Float kScale, int kPanels, bool kAsk, int kChunks>
[[gnu::noinline]] void row_i8(const TileArgs& a) {
  using S = Simd;
  using R = Row<kCodes, kForm, kScale, kPanels, kAsk>;
  constexpr int H = R::H, L = R::L;
  const int64_t column = a.k_begin / a.group * kPanel;
  R row{a.codes,      a.q,           a.minus, a.apart_rows, a.scales + column, nullptr, nullptr, prefetch_codes,
        a.next_codes, a.next_params, {}};
  if (kForm == Zeros::integer) row.zeros = static_cast<const uint8_t*>(a.zeros) + column;
  if (kForm == Zeros::minimum) row.minima = static_cast<const uint16_t*>(a.zeros) + column;
  int64_t group_end = (a.k_begin / a.group + 1) * a.group;
  const float* x_scale = a.x_scale;
  typename S::F y[kPanels][H][2];
  for (int p = 0; p < kPanels; ++p)
    for (int h = 0; h < H; ++h)
      for (int i = 0; i < 2; ++i) y[p][h][i] = S::load(a.y + p * kPanel + h * L + 16 * i);
  for (int64_t k = a.k_begin; k < a.k_end;) {
    const int64_t block_end = min_of((k / kActBlock + 1) * kActBlock, a.k_end);
    constexpr int kSegments = kChunks ? int(kActBlock / kChunk) / kChunks : 1;
    const bool full = kChunks && block_end - k == kActBlock;
    uint32_t apart = 0;
    for (int s = 0; full && s < kSegments; ++s) {
      apart |= row.apart_rows[s];
      __asm__("" : "+r"(apart));  // or GCC makes a vector of them, and parts it on the stack
    }
    if (full && !apart) {
#pragma GCC unroll 4
      for (int s = 0; s < kSegments; ++s) {
        row.template segment<false>(s == 0, kChunks, nullptr);
        if (kSegments > 1) row.next_group();
      }
      k = block_end;
      if (kSegments == 1 && k == group_end) {
        row.next_group();
        group_end += a.group;
      }
    } else {
      for (bool first = true; k < block_end; first = false) {
        const int64_t end = min_of(group_end, block_end);
        row.template segment<true>(first, (end - k) / kChunk, a.apart + (row.minus - a.minus));
        k = end;
        if (k == group_end) {
          row.next_group();
          group_end += a.group;
        }
      }
    }
    if (kSegments > 1) group_end = k + a.group;  // blocks end where groups do
    const typename S::F s = S::set1(*x_scale++);
    for (int p = 0; p < kPanels; ++p)
      for (int h = 0; h < H; ++h)
        for (int i = 0; i < 2; ++i) y[p][h][i] = S::fma(row.block[p][h][i], s, y[p][h][i]);
  }
  for (int p = 0; p < kPanels; ++p)
    for (int h = 0; h < H; ++h)
      for (int i = 0; i < 2; ++i) S::store(a.y + p * kPanel + h * L + 16 * i, y[p][h][i]);
}

template <Codes kCodes, Zeros kForm, Float kScale, int kPanels, bool kAsk>
void row_i8(const TileArgs& a) {
  if (a.k_begin % kActBlock == 0 && a.group == 32) return row_i8<kCodes, kForm, kScale, kPanels, kAsk, 1>(a);
  if (a.k_begin % kActBlock == 0 && a.group == 64) return row_i8<kCodes, kForm, kScale, kPanels, kAsk, 2>(a);
  if (a.k_begin % kActBlock == 0 && a.group % kActBlock == 0) return row_i8<kCodes, kForm, kScale, kPanels, kAsk, 4>(a);
  row_i8<kCodes, kForm, kScale, kPanels, kAsk, 0>(a);
}

template <Codes kCodes, Zeros kForm, int kPanels, bool kAsk>
void row_i8(const TileArgs& a) {
  a.scale_type == Float::f16 ? row_i8<kCodes, kForm, Float::f16, kPanels, kAsk>(a)
                             : row_i8<kCodes, kForm, Float::bf16, kPanels, kAsk>(a);
}

template <Codes kCodes, int kPanels, bool kAsk>
void row_i8(const TileArgs& a) {
  if (a.form == Zeros::symmetric) return row_i8<kCodes, Zeros::symmetric, kPanels, kAsk>(a);
  if (kCodes == Codes::u8) __builtin_unreachable();  // 8-bit codes are symmetric
  a.form == Zeros::integer ? row_i8<kCodes, Zeros::integer, kPanels, kAsk>(a)
                           : row_i8<kCodes, Zeros::minimum, kPanels, kAsk>(a);
}

}  // namespace
}  // namespace cpullm
