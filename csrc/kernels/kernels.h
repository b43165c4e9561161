// The contract between operators and kernels: plain structs and one table of function pointers.
//
// Kernels know nothing of torch, the STL or threads. They work on a range of rows and panels; the caller splits.
// Letters: m rows, n output columns, k inputs. Sizes are in elements unless the name says otherwise.
#pragma once

#include <cstdint>

namespace cpullm {

constexpr int64_t kPanel = 32;      // output columns of one panel
constexpr int64_t kStep = 4;        // inputs of one block of codes (one lane of a 4-way dot product)
constexpr int64_t kChunk = 32;      // k is padded to a multiple of it, and so is every group
constexpr int64_t kActBlock = 128;   // inputs that share one activation scale, for every group, m and level
constexpr int32_t kMostApart = 16256;  // largest quantised magnitude of an input kept apart (128 * 127)
constexpr int64_t kMaxTile = 16;    // most rows any level interleaves

enum class Float : int { f32, bf16, f16 };                      // element type of activations, outputs, scales
enum class Zeros : int { symmetric = 0, integer, minimum };     // what Weight::zeros holds

// What activations are rounded to in a product. bf16 rounds the weights too, where the level has such products and the
// rows are many; else it is fp32, which rounds nothing.
enum class Compute : int { int8 = 0, fp32 = 1, bf16 = 2 };

// Where a kernel finds codes: packed nibbles, nibbles unpacked to bytes (scratch memory), or 8-bit codes.
enum class Codes { packed4, unpacked4, u8 };

// A packed matrix W [n, k]; W = scale * (code - zero), or scale * code + minimum.
struct Weight {
  const uint8_t* codes;    // [panels, k_padded/4, 16 * bits]; 4 bits: byte 4c+i = column c | c+16 << 4, input i
  const uint16_t* scales;  // [panels, groups, 32] fp16 or bf16
  const void* zeros;       // null; or uint8 [panels, groups, 32]; or minima of the scales' type, same shape
  int64_t n, k, k_padded;  // k_padded = k rounded up to kChunk
  int64_t group, groups;   // inputs per group (a multiple of kChunk), ceil(k / group)
  int bits;                // 4 or 8
  Zeros form;              // integer and minimum need bits = 4
  Float scale_type;        // f16 or bf16
};

// Rows to be read: x [m, k] with unit stride in k, optionally gathered: input j is x[row, order[j]].
struct Rows {
  const void* x;
  int64_t m, k, stride;  // stride: elements between rows
  Float type;
  const int32_t* order;  // null or [k], every entry checked by the caller to lie in [0, k)
};

// int8 activations: x[row, j] ~ q * scale, scale [row, j / kActBlock]. Where one input of a block outgrows the others
// it is kept apart: q is 0 there and its value, on the same scale but up to kMostApart, stands in `apart`. A block with
// inf or nan gets scale nan. Rows are interleaved in tiles of `tile` rows, `unit` inputs at a time (tile 1: plain
// row-major); the last tile may be short: its missing rows exist in memory with scale and minus zero.
// A segment is a run of inputs inside one weight group and one activation block; segments(..) counts them.
struct QuantizedRows {
  int8_t* q;             // [tiles, ceil(k_padded/unit), tile, unit], -127..127; 0 where j >= k
  float* scale;          // [tiles, blocks, tile], blocks = ceil(k_padded / kActBlock)
  int32_t* minus;        // [tiles, segments, tile]: -sum of the segment's values, the one apart included; fits int16
  int32_t* apart;  // [tiles, segments, tile]: value << 8 | input - segment's begin; only where apart_rows says so
  uint32_t* apart_rows;  // [tiles, segments]: bit r = row r of the tile has an input apart in this segment
  int64_t m, k_padded, blocks, tile, unit;
  int64_t group;  // of the weights to come
  int64_t segments;
};

// How a level wants the rows of a product interleaved: 1..kMaxTile rows, kStep or 64 inputs at a time.
struct TileShape {
  int64_t tile, unit;
};

// fp32 activations, interleaved: x is [ceil(m/tile), k_padded, tile]; zero where j >= k.
struct FloatRows {
  float* x;
  int64_t m, k_padded, tile;
};

// bf16 activations: [ceil(m/tile), k_padded/unit, tile, unit], rounded to nearest even; zero where j >= k. The rows that
// a short last tile lacks exist in memory and are zero.
struct Bf16Rows {
  uint16_t* x;
  int64_t m, k_padded, tile, unit;
};

// y [m, n] = result + bias.
struct Output {
  void* y;
  int64_t stride;  // elements between rows
  Float type;
  const float* bias;  // null or [n]
};

// How to quantise one row of a float matrix, group by group.
struct WeightRecipe {
  int64_t k, group;
  int bits;  // 8: symmetric only
  Zeros form;  // symmetric or integer
  Float scale_type;  // scales are rounded to it before the codes are chosen
  bool search;  // look for the clipped range with the least error; else the full range
};

// Arguments of a decoder layer's other kernels: block.h.
struct Norm;
struct Heads;
struct Rope;
struct Append;
struct Activation;
struct Sum;
struct Attention;

struct Range {
  int64_t begin, end;
};

// Segments of the inputs [begin, end): one more than multiples of a group or a block between them. group: a multiple of
// kChunk, so that a block and a group have a power of two in common; most are one, and take no division. Not inlined: its
// divisions would take registers from the loops around its callers.
[[maybe_unused]] __attribute__((noinline)) static int64_t count_segments(int64_t begin, int64_t end, int64_t group) {
  if (begin >= end) return 0;
  const int64_t power = group & -group;
  if (power == group) {
    const int shift = __builtin_ctzll(uint64_t(group < kActBlock ? group : kActBlock));
    return 1 + ((end - 1) >> shift) - (begin >> shift);
  }
  const int64_t both = power < kActBlock ? group / power * kActBlock : group;
  const auto between = [=](int64_t step) { return (end - 1) / step - begin / step; };
  return 1 + between(group) + between(kActBlock) - between(both);
}

struct Kernels {
  const char* isa;
  // The interleaving for a product of m rows with weights of this group; fp32 rows have unit 1.
  TileShape (*tile_i8)(int64_t m, int64_t group);
  int64_t (*tile_f32)(int64_t m);
  TileShape (*tile_bf16)(int64_t m);  // tile 0: the fp32 kernels serve bf16 compute
  // Fills the tiles that hold rows [rows.begin, rows.end). Rows of a tile may come in several calls, in order: the first
  // row of a tile clears what its rows share.
  void (*quantize_rows)(const Rows& in, const QuantizedRows& out, Range rows);
  void (*load_rows)(const Rows& in, const FloatRows& out, Range rows);
  // All m rows times the columns of panels [panels.begin, panels.end). scratch: kScratchBytes, 64-byte aligned.
  void (*linear_i8)(const Weight& w, const QuantizedRows& x, const Output& out, Range panels, void* scratch);
  // Rows that linear_i8 takes no less time for than for the same among many more; 0: all of a call share an unpacking of
  // the codes, so that more rows take less each.
  int64_t block_rows;
  void (*linear_f32)(const Weight& w, const FloatRows& x, const Output& out, Range panels, void* scratch);
  // bf16 products; only called where tile_bf16 gives a tile.
  void (*load_rows_bf16)(const Rows& in, const Bf16Rows& out, Range rows);
  void (*linear_bf16)(const Weight& w, const Bf16Rows& x, const Output& out, Range panels, void* scratch);
  // Codes [k], scales and zeros [groups] of one finite row w [k]; the symmetric form leaves zeros alone.
  void (*quantize_weights)(const WeightRecipe& recipe, const void* w, Float type, uint8_t* codes, uint16_t* scales,
                           uint8_t* zeros, void* scratch);
  // Limits of this level: see limits-inl.h.
  int64_t (*dot_peak)(int64_t rounds, int32_t* sink);
  int32_t (*read_memory)(const void* data, int64_t bytes);
  // out[k] = row `row` of W, exact.
  void (*dequantize_row)(const Weight& w, int64_t row, void* out, Float type);
  // Rows of `in` (its order is ignored) into fp32 rows of out; out may be in's memory where that is fp32.
  void (*norm)(const Norm& n, const Rows& in, float* out, int64_t out_stride, Range rows);
  // In place, per head. Items: see Heads.
  void (*norm_heads)(const Norm& n, const Heads& x, Range items);
  void (*rope)(const Rope& r, const Heads& x, Range items);
  // Items of Append::from.
  void (*append)(const Append& a, Range items);
  void (*activation)(const Activation& a, Range rows);
  void (*sum)(const Sum& s, Range rows);
  // Items and scratch: see AttentionPlan. Where the plan has splits, combine_attention comes after all items.
  void (*attention)(const Attention& a, Range items, float* scratch);
  void (*combine_attention)(const Attention& a, Range items);
};

// Bytes of private memory a linear kernel may use: unpacked codes of one K block and partial sums of one row block.
constexpr int64_t kScratchBytes = 64 * 1024 + 512 * kPanel * 4 + 16 * 1024;

bool cpu_has_avx512_bf16();  // vdpbf16ps and vcvtne2ps2bf16

extern const int64_t l2_bytes;  // of one core's L2 cache, read when the library is loaded
// Whether one row's kernel asks for codes ahead of their use. Intel's cores reach their memory's speed only with it, and
// in two steps: a core waits for at most 16 lines on their way to L1 and 48 to L2. AMD's Zen 4 reads 15 % less with it:
// its own prefetchers follow one stream better when no others stand in their queue.
extern const bool prefetch_codes;
constexpr int64_t kCodesToL2 = 16 * 1024, kCodesToL1 = 2 * 1024;  // how far ahead, bytes
// Whether that kernel asks for codes step by step, and on avx512 multiplies two panels at a time. Zen 5 (AMD's family 26)
// loses a stream of codes that is not asked for beside those of scales and inputs, and reads two faster than one.
extern const bool pair_panels;
constexpr int64_t kPairToL1 = 3 * 1024;  // how far ahead of each of two panels, bytes
constexpr int64_t kLoneToL1 = 6 * 1024;  // the same of one: on the 256-bit levels, or left over
// Whether a core makes two 64-byte dot products a cycle beside other vector work: AMD from Zen 5 on, but for its laptops,
// where the form for it was not measured.
extern const bool wide_dots;

// Levels fill the table from the slowest to the fastest; each overwrites what it does better.
void use_ref(Kernels& k);
#ifndef CPULLM_REF_ONLY
void use_avx2(Kernels& k);
void use_avx_vnni(Kernels& k);
void use_avx512(Kernels& k);
void use_amx(Kernels& k);
#endif

struct Level {
  const char* name;
  bool (*supported)();  // CPUID and operating-system state
  void (*use)(Kernels& k);
};

constexpr int kLevels =
#ifdef CPULLM_REF_ONLY
    1;
#else
    5;
#endif
extern const Level kLadder[kLevels];

// The table of the highest reachable level not above `cap` (null or empty: no cap). Returns null and points *error at
// a static text when `cap` is unknown or unreachable here.
const Kernels* select_kernels(const char* cap, const char** error);

}  // namespace cpullm
