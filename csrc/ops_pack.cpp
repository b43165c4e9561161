// From rows of codes, scales and zeros to the panels that kernels read: packing.PackedWeight says how those look.
#include <cstring>

#include "ops.h"

namespace cpullm {
namespace {

constexpr int64_t kRun = 512;  // inputs of a row that are read together: several cache lines, for the prefetchers

// The codes of 32 inputs of column c and, for two to a byte, of column c + 16, as the bytes of c in eight blocks.
inline void join_rows(const uint8_t* __restrict a, const uint8_t* __restrict b, int64_t stored,
                      uint8_t* __restrict to) {
  if (stored == 8) {
    for (int64_t i = 0; i < 32; ++i) to[i] = uint8_t(a[i] | b[i] << 4);
    return;
  }
  for (int64_t i = 0; i < 16; ++i) {
    to[2 * i] = uint8_t((a[i] & 15) | b[i] << 4);
    to[2 * i + 1] = uint8_t(a[i] >> 4 | (b[i] & 240));
  }
}

// One panel: `rows` rows (at most 32) of `width` bytes that hold codes of `stored` bits, into blocks of `bits` bits.
template <int64_t bits>
void pack_panel(const uint8_t* codes, int64_t rows, int64_t width, int64_t k_padded, int64_t stored, uint8_t* out) {
  constexpr int64_t kColumns = 4 * bits;  // words of a block
  alignas(64) uint8_t run[kPanel][kRun];
  alignas(64) uint32_t words[kColumns][kChunk / kStep];
  const int64_t run_bytes = kRun * stored / 8, chunk_bytes = kChunk * stored / 8;
  for (int64_t first = 0; first < k_padded; first += kRun) {
    const int64_t at = first * stored / 8, own = std::clamp(width - at, int64_t(0), run_bytes);
    for (int64_t r = 0; r < kPanel; ++r) {
      const int64_t size = r < rows ? own : 0;
      if (size) std::memcpy(run[r], codes + r * width + at, size_t(size));
      if (size < run_bytes) std::memset(run[r] + size, 0, size_t(run_bytes - size));
    }
    for (int64_t chunk = 0; chunk < std::min(kRun, k_padded - first); chunk += kChunk) {
      const int64_t from = chunk / kChunk * chunk_bytes;
      for (int64_t c = 0; c < kColumns; ++c) {
        if constexpr (bits == 4)
          join_rows(run[c] + from, run[c + 16] + from, stored, reinterpret_cast<uint8_t*>(words[c]));
        else
          std::memcpy(words[c], run[c] + from, kChunk);
      }
      auto* __restrict to = reinterpret_cast<uint32_t*>(out + (first + chunk) / kStep * kColumns * 4);
      for (int64_t block = 0; block < kChunk / kStep; ++block)
        for (int64_t c = 0; c < kColumns; ++c) to[block * kColumns + c] = words[c][block];
    }
  }
}

void pack_codes(Tensor out, const Tensor& codes, int64_t k, int64_t bits, int64_t stored) {
  constexpr const char* op = "cpullm::pack_codes";
  STD_TORCH_CHECK((bits == 4 || bits == 8) && (stored == 8 || stored == bits), op,
                  ": bits must be 4 or 8, and stored 8 or the same, got ", bits, " and ", stored);
  STD_TORCH_CHECK(k > 0 && k < kMostSize, op, ": k must lie in [1, 2^40), got ", k);
  const int64_t width = (k * stored + 7) / 8, k_padded = (k + kChunk - 1) / kChunk * kChunk;
  STD_TORCH_CHECK(codes.is_cpu() && codes.scalar_type() == ScalarType::Byte && codes.dim() == 2 && codes.size(0) > 0 &&
                      codes.size(1) == width && codes.is_contiguous(),
                  op, ": codes must be a contiguous uint8 CPU matrix [n, ", width, "], got ", shape_of(codes));
  const int64_t n = codes.size(0), panels = (n + kPanel - 1) / kPanel;
  STD_TORCH_CHECK(out.is_cpu() && out.scalar_type() == ScalarType::Byte && out.dim() == 3 && out.size(0) == panels &&
                      out.size(1) == k_padded / kStep && out.size(2) == 16 * bits && out.is_contiguous(),
                  op, ": out must be a contiguous uint8 CPU tensor [", panels, ", ", k_padded / kStep, ", ", 16 * bits,
                  "], got ", shape_of(out));
  const auto* from = static_cast<const uint8_t*>(codes.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const auto pack = bits == 4 ? pack_panel<4> : pack_panel<8>;
  parallel(panels, kPanel * k_padded, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      pack(from + p * kPanel * width, std::min(kPanel, n - p * kPanel), width, k_padded, stored,
           to + p * kPanel * k_padded * bits / 8);
  });
}

// out[p, g, c] = x[32 p + c, g], zero beyond the rows of x.
template <class T>
void transpose_panels(const T* __restrict x, int64_t n, int64_t groups, int64_t begin, int64_t end, T* __restrict out) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t rows = std::min(kPanel, n - p * kPanel);
    for (int64_t g = 0; g < groups; ++g) {
      T* to = out + (p * groups + g) * kPanel;
      for (int64_t c = 0; c < rows; ++c) to[c] = x[(p * kPanel + c) * groups + g];
      std::fill(to + rows, to + kPanel, T(0));
    }
  }
}

void pack_columns(Tensor out, const Tensor& x) {
  constexpr const char* op = "cpullm::pack_columns";
  const int32_t type = dtype_of(x);
  const bool byte = type == aoti_torch_dtype_uint8();
  STD_TORCH_CHECK(byte || type == aoti_torch_dtype_float16() || type == aoti_torch_dtype_bfloat16(), op,
                  ": x must be uint8, float16 or bfloat16");
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.numel() > 0 && x.is_contiguous(), op,
                  ": x must be a contiguous non-empty CPU matrix [n, groups], got ", shape_of(x));
  const int64_t n = x.size(0), groups = x.size(1), panels = (n + kPanel - 1) / kPanel;
  STD_TORCH_CHECK(out.is_cpu() && dtype_of(out) == type && out.dim() == 3 && out.size(0) == panels &&
                      out.size(1) == groups && out.size(2) == kPanel && out.is_contiguous(),
                  op, ": out must be a contiguous CPU tensor of x's type [", panels, ", ", groups, ", 32], got ",
                  shape_of(out));
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  parallel(panels, 8 * kPanel * groups, [&](int64_t begin, int64_t end) {
    if (byte)
      transpose_panels(static_cast<const uint8_t*>(from), n, groups, begin, end, static_cast<uint8_t*>(to));
    else
      transpose_panels(static_cast<const uint16_t*>(from), n, groups, begin, end, static_cast<uint16_t*>(to));
  });
}

}  // namespace
}  // namespace cpullm

STABLE_TORCH_LIBRARY_FRAGMENT(cpullm, m) {
  // codes uint8 [n, width], codes of `stored` bits (4: the even input low) -> out uint8 [ceil(n/32), k'/4, 16 bits].
  m.def("pack_codes(Tensor(a!) out, Tensor codes, int k, int bits, int stored) -> ()");
  // Scales or zeros x [n, groups] -> out [ceil(n/32), groups, 32].
  m.def("pack_columns(Tensor(a!) out, Tensor x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CPU, m) {
  m.impl("pack_codes", TORCH_BOX(&cpullm::pack_codes));
  m.impl("pack_columns", TORCH_BOX(&cpullm::pack_columns));
}
