// Operators: schemas, argument checks, allocation and the split into threads. Only ops*.cpp and ops.h include
// torch, and only its stable ABI (>= 2.10). No size or index that comes from a caller reaches a kernel unchecked.
#include "ops.h"

#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <tuple>

namespace cpullm {
namespace {

// ---- the kernel table ----------------------------------------------------------------------------------------------

std::atomic<const Kernels*> active{nullptr};

std::string reachable_levels() {
  std::string names;
  for (const Level& level : kLadder)
    if (level.supported()) names += (names.empty() ? "" : ", ") + std::string(level.name);
  return names;
}

std::string set_isa(std::string cap) {
  const char* error = nullptr;
  const Kernels* table = select_kernels(cap.c_str(), &error);
  STD_TORCH_CHECK(table, "CPULLM_ISA: '", cap, "' ", error, "; reachable here: ", reachable_levels());
  active.store(table);
  return table->isa;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = active.load(std::memory_order_acquire);
  if (!table) {
    const char* cap = std::getenv("CPULLM_ISA");
    set_isa(cap ? cap : "");
    table = active.load();
  }
  return *table;
}

namespace {

std::atomic<bool> threads_used{false}, threads_lost{false}, loss_said{false};

void after_fork_in_child() {
  if (threads_used.load(std::memory_order_relaxed)) threads_lost.store(true);
}

const int fork_watched = pthread_atfork(nullptr, nullptr, after_fork_in_child);

}  // namespace

bool may_use_threads() {
  if (threads_lost.load(std::memory_order_relaxed) || fork_watched != 0) {
    if (!loss_said.exchange(true))
      std::fputs(
          "torch_cpullm: this process was forked from one that had used threads; it runs on one thread. Use the spawn "
          "or forkserver start method to have all of them.\n",
          stderr);
    return false;
  }
  if (torch::stable::get_num_threads() > 1) threads_used.store(true, std::memory_order_relaxed);
  return true;
}

namespace {

std::string isa() { return kernels().isa; }

// Every level, lowest first, as "name:1" (reachable) or "name:0", comma-separated.
std::string isa_levels() {
  std::string out;
  for (const Level& level : kLadder)
    out += (out.empty() ? "" : ",") + std::string(level.name) + (level.supported() ? ":1" : ":0");
  return out;
}

// ---- memory --------------------------------------------------------------------------------------------------------

thread_local Buffer kernel_scratch;                              // of the thread that runs a kernel
thread_local Buffer rows_buffer, scale_buffer, minus_buffer, apart_buffer, bias_buffer;  // of the operator's caller

}  // namespace

Slices* fresh_slices(int64_t threads) {
  thread_local Buffer memory;
  return new (memory.get<Slices>(threads)) Slices[size_t(threads)];
}

namespace {

// ---- checks --------------------------------------------------------------------------------------------------------

void check_packed(const Tensor& t, const char* op, const char* name, int64_t d0, int64_t d1, int64_t d2) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == d0 && t.size(1) == d1 && t.size(2) == d2, op, ": ", name,
                  " must have shape [", d0, ", ", d1, ", ", d2, "], got ", shape_of(t));
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), op, ": ", name, " must be a contiguous CPU tensor");
}

}  // namespace

Weight check_weight(const char* op, const Tensor& codes, const Tensor& scales, const OptionalTensor& zeros, int64_t n,
                    int64_t k, int64_t group) {
  STD_TORCH_CHECK(n > 0 && n < kMostSize, op, ": n must be positive, got ", n);
  STD_TORCH_CHECK(k > 0 && k < kMostSize, op, ": k must be positive, got ", k);
  STD_TORCH_CHECK(group > 0 && group < kMostSize && group % kChunk == 0, op,
                  ": group_size must be a positive multiple of ", kChunk, ", got ", group);
  STD_TORCH_CHECK(codes.defined(), op, ": codes must be a tensor");
  STD_TORCH_CHECK(scales.defined(), op, ": scales must be a tensor");
  Weight w;
  w.n = n;
  w.k = k;
  w.k_padded = (k + kChunk - 1) / kChunk * kChunk;
  w.group = group;
  w.groups = (k + group - 1) / group;
  const int64_t panels = (n + kPanel - 1) / kPanel;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte, op, ": codes must be uint8");
  STD_TORCH_CHECK(codes.dim() == 3 && (codes.size(2) == 64 || codes.size(2) == 128), op,
                  ": codes must have shape [panels, k/4, 64] (4 bits) or [panels, k/4, 128] (8 bits), got ",
                  shape_of(codes));
  w.bits = codes.size(2) == 64 ? 4 : 8;
  check_packed(codes, op, "codes", panels, w.k_padded / kStep, 16 * w.bits);
  check_packed(scales, op, "scales", panels, w.groups, kPanel);
  const int32_t scale_type = dtype_of(scales);
  STD_TORCH_CHECK(scale_type == aoti_torch_dtype_float16() || scale_type == aoti_torch_dtype_bfloat16(), op,
                  ": scales must be float16 or bfloat16");
  w.scale_type = scale_type == aoti_torch_dtype_float16() ? Float::f16 : Float::bf16;
  w.form = Zeros::symmetric;
  w.zeros = nullptr;
  if (zeros) {
    STD_TORCH_CHECK(w.bits == 4, op, ": zeros are supported for 4-bit codes only");
    check_packed(*zeros, op, "zeros", panels, w.groups, kPanel);
    const bool integer = zeros->scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(integer || dtype_of(*zeros) == scale_type, op,
                    ": zeros must be uint8 (zero points) or of the scales' type (minima)");
    w.form = integer ? Zeros::integer : Zeros::minimum;
    w.zeros = zeros->const_data_ptr();
  }
  w.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  w.scales = static_cast<const uint16_t*>(scales.const_data_ptr());
  return w;
}

const int32_t* check_order(const char* op, const OptionalTensor& perm, int64_t k) {
  if (!perm) return nullptr;
  STD_TORCH_CHECK(perm->is_cpu() && perm->scalar_type() == ScalarType::Int && perm->dim() == 1 && perm->size(0) == k &&
                      perm->is_contiguous(),
                  op, ": perm must be a contiguous int32 CPU tensor of shape [", k, "], got ", shape_of(*perm));
  const int32_t* order = static_cast<const int32_t*>(perm->const_data_ptr());
  for (int64_t j = 0; j < k; ++j)
    STD_TORCH_CHECK(order[j] >= 0 && order[j] < k, op, ": perm[", j, "] = ", order[j], " is outside [0, ", k, ")");
  return order;
}

namespace {

// x as rows with unit stride; `holder` keeps a contiguous copy alive where one was needed.
Rows check_rows(const char* op, const Tensor& x, std::optional<Tensor>& holder) {
  STD_TORCH_CHECK(x.defined() && x.is_cpu(), op, ": x must be a CPU tensor");
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension");
  Rows rows{};
  rows.type = float_type(x, op, "x");
  const int64_t last = x.dim() - 1;
  rows.k = x.size(last);
  STD_TORCH_CHECK(rows.k > 0, op, ": the last dimension of x must not be empty, got ", shape_of(x));
  rows.m = x.numel() / rows.k;
  rows.stride = rows.k;
  const Tensor* source = &x;
  if (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= rows.k) {
    rows.stride = x.stride(0);
  } else if (!x.is_contiguous()) {
    holder = torch::stable::contiguous(x);
    source = &*holder;
  }
  rows.x = source->const_data_ptr();
  return rows;
}

const float* check_bias(const char* op, const OptionalTensor& bias, int64_t n) {
  if (!bias) return nullptr;
  STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == n && bias->is_contiguous(), op,
                  ": bias must be a contiguous CPU tensor of shape [", n, "], got ", shape_of(*bias));
  const Float type = float_type(*bias, op, "bias");
  if (type == Float::f32) return static_cast<const float*>(bias->const_data_ptr());
  const int64_t padded = (n + kChunk - 1) / kChunk * kChunk;
  float* out = bias_buffer.get<float>(padded);
  const Rows rows{bias->const_data_ptr(), 1, n, n, type, nullptr};
  kernels().load_rows(rows, FloatRows{out, 1, padded, 1}, {0, 1});
  return out;
}

// ---- work ----------------------------------------------------------------------------------------------------------

QuantizedRows quantize(const Kernels& table, const Rows& rows, TileShape shape, int64_t group) {
  const int64_t tile = shape.tile;
  QuantizedRows q;
  q.m = rows.m;
  q.k_padded = (rows.k + kChunk - 1) / kChunk * kChunk;
  q.blocks = (q.k_padded + kActBlock - 1) / kActBlock;
  q.tile = tile;
  q.unit = shape.unit;
  q.group = group;
  q.segments = count_segments(0, q.k_padded, group);
  const int64_t tiles = (rows.m + tile - 1) / tile;
  q.q = rows_buffer.get<int8_t>(tiles * tile * ((q.k_padded + q.unit - 1) / q.unit * q.unit));
  q.scale = scale_buffer.get<float>(tiles * tile * q.blocks);
  q.minus = minus_buffer.get<int32_t>(tiles * tile * q.segments);
  q.apart = apart_buffer.get<int32_t>(tiles * (tile + 1) * q.segments);
  q.apart_rows = reinterpret_cast<uint32_t*>(q.apart + tiles * tile * q.segments);
  if (tiles * tile > rows.m) {  // rows that do not exist must not slow the arithmetic down with subnormals or nan
    std::fill_n(q.scale + (tiles - 1) * tile * q.blocks, tile * q.blocks, 0.0f);
    std::fill_n(q.minus + (tiles - 1) * tile * q.segments, tile * q.segments, 0);
  }
  parallel(tiles, 8 * tile * q.k_padded, [&](int64_t begin, int64_t end) {
    table.quantize_rows(rows, q, {begin * tile, std::min(end * tile, rows.m)});
  });
  return q;
}

}  // namespace

Tensor linear_of(const char* op, const Tensor& x, const Weight& w, const OptionalTensor& bias,
                 const OptionalTensor& perm, int64_t compute) {
  const int64_t n = w.n, k = w.k;
  std::optional<Tensor> holder;
  Rows rows = check_rows(op, x, holder);
  STD_TORCH_CHECK(rows.k == k, op, ": the last dimension of x must be k = ", k, ", got ", shape_of(x));
  rows.order = check_order(op, perm, k);
  STD_TORCH_CHECK(compute >= int64_t(Compute::int8) && compute <= int64_t(Compute::bf16), op,
                  ": compute must be 0 (int8), 1 (fp32) or 2 (bf16), got ", compute);
  int64_t sizes[64];
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims <= 64, op, ": x has too many dimensions: ", dims);
  for (int64_t i = 0; i + 1 < dims; ++i) sizes[i] = x.size(i);
  sizes[dims - 1] = n;
  Tensor y = empty_cpu(sizes, dims, dtype_of(x));
  const Kernels& table = kernels();
  const Output out{y.mutable_data_ptr(), n, rows.type, check_bias(op, bias, n)};
  if (rows.m == 0) return y;
  const int64_t panels = (n + kPanel - 1) / kPanel;
  const int64_t work = rows.m * w.k_padded * kPanel;
  const TileShape bf16 = compute == int64_t(Compute::bf16) ? table.tile_bf16(rows.m) : TileShape{0, 0};
  const auto scratch = [] { return kernel_scratch.get<char>(kScratchBytes); };
  if (compute == int64_t(Compute::int8)) {
    const QuantizedRows q = quantize(table, rows, table.tile_i8(rows.m, w.group), w.group);
    for_panels(panels, k, rows.m, work,
               [&](int64_t begin, int64_t end) { table.linear_i8(w, q, out, {begin, end}, scratch()); });
    return y;
  }
  const int64_t tile = bf16.tile ? bf16.tile : table.tile_f32(rows.m);
  const int64_t tiles = (rows.m + tile - 1) / tile;
  const auto load = [&](const auto& kernel, const auto& to) {
    parallel(tiles, tile * w.k_padded,
             [&](int64_t begin, int64_t end) { kernel(rows, to, {begin * tile, std::min(end * tile, rows.m)}); });
  };
  if (bf16.tile) {
    const Bf16Rows b{rows_buffer.get<uint16_t>(tiles * tile * w.k_padded), rows.m, w.k_padded, tile, bf16.unit};
    std::fill_n(b.x + (tiles - 1) * tile * w.k_padded, tile * w.k_padded, uint16_t(0));  // rows that do not exist
    load(table.load_rows_bf16, b);
    for_panels(panels, k, rows.m, 2 * work,
               [&](int64_t begin, int64_t end) { table.linear_bf16(w, b, out, {begin, end}, scratch()); });
  } else {
    const FloatRows f{rows_buffer.get<float>(tiles * tile * w.k_padded), rows.m, w.k_padded, tile};
    load(table.load_rows, f);
    for_panels(panels, k, rows.m, 4 * work,
               [&](int64_t begin, int64_t end) { table.linear_f32(w, f, out, {begin, end}, scratch()); });
  }
  return y;
}

constexpr const char* kEmbedding = "cpullm::embedding";

Tensor rows_of(const Tensor& ids, const Weight& w, ScalarType dtype) {
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(ids.is_cpu() && (wide || ids.scalar_type() == ScalarType::Int), kEmbedding,
                  ": ids must be an int64 or int32 CPU tensor");
  check_storage(kEmbedding, "ids", ids);
  const Float type = dtype == ScalarType::Float ? Float::f32 : dtype == ScalarType::Half ? Float::f16 : Float::bf16;
  const Tensor flat = ids.is_contiguous() ? ids : torch::stable::contiguous(ids);
  const void* p = flat.const_data_ptr();
  const int64_t count = ids.numel();
  const auto id_at = [&](int64_t i) {
    return wide ? static_cast<const int64_t*>(p)[i] : int64_t(static_cast<const int32_t*>(p)[i]);
  };
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(id_at(i) >= 0 && id_at(i) < w.n, kEmbedding, ": id ", id_at(i), " is outside [0, ", w.n, ")");
  int64_t sizes[64];
  const int64_t dims = ids.dim() + 1;
  STD_TORCH_CHECK(dims <= 64, kEmbedding, ": ids has too many dimensions: ", dims - 1);
  for (int64_t i = 0; i + 1 < dims; ++i) sizes[i] = ids.size(i);
  sizes[dims - 1] = w.k;
  Tensor out = empty_cpu(sizes, dims, dtype);
  char* y = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = w.k * (type == Float::f32 ? 4 : 2);
  const Kernels& table = kernels();
  parallel(count, 8 * w.k, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) table.dequantize_row(w, id_at(i), y + i * row_bytes, type);
  });
  return out;
}

namespace {

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const OptionalTensor& zeros,
              const OptionalTensor& bias, const OptionalTensor& perm, int64_t n, int64_t k, int64_t group_size,
              int64_t compute) {
  constexpr const char* op = "cpullm::linear";
  return linear_of(op, x, check_weight(op, codes, scales, zeros, n, k, group_size), bias, perm, compute);
}

std::tuple<Tensor, Tensor> quantize_activations(const Tensor& x) {
  std::optional<Tensor> holder;
  const Rows rows = check_rows("cpullm::quantize_activations", x, holder);
  const QuantizedRows q = quantize(kernels(), rows, {1, kStep}, kActBlock);  // plain rows, one segment per block
  const int64_t q_size[] = {q.m, q.k_padded}, s_size[] = {q.m, q.blocks};
  Tensor values = empty_cpu(q_size, 2, ScalarType::Int), scale = empty_cpu(s_size, 2, ScalarType::Float);
  auto* to = static_cast<int32_t*>(values.mutable_data_ptr());
  std::copy_n(q.q, q.m * q.k_padded, to);
  for (int64_t i = 0; i < q.m * q.blocks; ++i)
    if (q.apart_rows[i])
      to[i / q.blocks * q.k_padded + i % q.blocks * kActBlock + (q.apart[i] & 255)] = q.apart[i] >> 8;
  std::copy_n(q.scale, q.m * q.blocks, static_cast<float*>(scale.mutable_data_ptr()));
  return {values, scale};
}

std::tuple<Tensor, Tensor, Tensor> quantize_weights(const Tensor& weight, int64_t bits, int64_t group_size, bool sym,
                                                    bool search, ScalarType scale_dtype) {
  constexpr const char* op = "cpullm::quantize_weights";
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.is_contiguous() && weight.numel() > 0, op,
                  ": weight must be a contiguous non-empty CPU matrix [n, k], got ", shape_of(weight));
  STD_TORCH_CHECK(bits == 4 || bits == 8, op, ": bits must be 4 or 8, got ", bits);
  STD_TORCH_CHECK(group_size > 0 && group_size < kMostSize && group_size % kChunk == 0, op,
                  ": group_size must be a positive multiple of ", kChunk, ", got ", group_size);
  STD_TORCH_CHECK(scale_dtype == ScalarType::Half || scale_dtype == ScalarType::BFloat16, op,
                  ": scale_dtype must be float16 or bfloat16");
  const Float type = float_type(weight, op, "weight");
  const int64_t n = weight.size(0), k = weight.size(1), groups = (k - 1) / group_size + 1;
  WeightRecipe recipe;
  recipe.k = k;
  recipe.group = group_size;
  recipe.bits = int(bits);
  recipe.form = sym || bits == 8 ? Zeros::symmetric : Zeros::integer;
  recipe.scale_type = scale_dtype == ScalarType::Half ? Float::f16 : Float::bf16;
  recipe.search = search;
  const int64_t codes_size[] = {n, k}, scales_size[] = {n, groups};
  Tensor codes = empty_cpu(codes_size, 2, ScalarType::Byte), scales = empty_cpu(scales_size, 2, scale_dtype),
         zeros = empty_cpu(scales_size, 2, ScalarType::Byte);
  const char* w = static_cast<const char*>(weight.const_data_ptr());
  auto* c = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* s = static_cast<uint16_t*>(scales.mutable_data_ptr());
  auto* z = static_cast<uint8_t*>(zeros.mutable_data_ptr());
  const Kernels& table = kernels();
  parallel(n, 256 * k, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      table.quantize_weights(recipe, w + row * k * (type == Float::f32 ? 4 : 2), type, c + row * k, s + row * groups,
                             z + row * groups, kernel_scratch.get<char>(kScratchBytes));
  });
  return {codes, scales, zeros};
}

Tensor dequantize(const Tensor& codes, const Tensor& scales, const OptionalTensor& zeros, int64_t n, int64_t k,
                  int64_t group_size) {
  const Weight w = check_weight("cpullm::dequantize", codes, scales, zeros, n, k, group_size);
  const int64_t sizes[] = {n, k};
  Tensor out = empty_cpu(sizes, 2, ScalarType::Float);
  float* y = static_cast<float*>(out.mutable_data_ptr());
  const Kernels& table = kernels();
  parallel(n, 8 * k, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) table.dequantize_row(w, row, y + row * k, Float::f32);
  });
  return out;
}

Tensor embedding(const Tensor& ids, const Tensor& codes, const Tensor& scales, const OptionalTensor& zeros, int64_t n,
                 int64_t k, int64_t group_size, ScalarType dtype) {
  const Weight w = check_weight(kEmbedding, codes, scales, zeros, n, k, group_size);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kEmbedding,
                  ": dtype must be float32, bfloat16 or float16");
  return rows_of(ids, w, dtype);
}

// ---- limits of the machine, for benchmarks --------------------------------------------------------------------------

// Every thread runs `rounds` rounds of the level's dot products on registers; returns the operations of all threads.
int64_t dot_peak(int64_t rounds) {
  STD_TORCH_CHECK(rounds > 0, "cpullm::dot_peak: rounds must be positive, got ", rounds);
  const Kernels& table = kernels();
  std::atomic<int64_t> total{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    int32_t sink;
    for (int64_t i = begin; i < end; ++i) total += table.dot_peak(rounds, &sink);
  });
  return total;
}

// One parallel region in which the team waits for each other `count` times; returns the members of the team.
int64_t team_barriers(int64_t count) {
  STD_TORCH_CHECK(count >= 0, "cpullm::team_barriers: count must not be negative, got ", count);
  Barrier barrier;
  int64_t members = 0;
  run_team(team_size(), [&](const Member& member) {
    for (int64_t i = 0; i < count; ++i) barrier.wait(member.count);
    if (member.id == 0) members = member.count;
  });
  return members;
}

// All threads together read x once, each its own contiguous part; returns the bytes read.
int64_t read_memory(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Byte,
                  "cpullm::read_memory: x must be a contiguous uint8 CPU tensor");
  constexpr int64_t kUnit = 1 << 16;
  const auto* data = static_cast<const char*>(x.const_data_ptr());
  const int64_t units = x.numel() / kUnit;
  const Kernels& table = kernels();
  std::atomic<int32_t> sink{0};
  parallel(units, kUnit,
           [&](int64_t begin, int64_t end) { sink += table.read_memory(data + begin * kUnit, (end - begin) * kUnit); });
  return units * kUnit;
}

}  // namespace
}  // namespace cpullm

STABLE_TORCH_LIBRARY(cpullm, m) {
  // y = x W^T + bias, W [n, k]. x [.., k] fp32 | bf16 | fp16; codes uint8 [ceil(n/32), k'/4, 64 | 128], k' = k rounded
  // up to 32; scales fp16 | bf16 [ceil(n/32), groups, 32]; zeros none | uint8 | the scales' type, of the scales' shape;
  // bias [n]; perm int32 [k]: input j is x[.., perm[j]]; compute 0 = int8 activations, 1 = fp32, 2 = bf16. Returns [.., n], x's
  // type.
  m.def(
      "linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? perm, int n, int k, "
      "int group_size, int compute) -> Tensor");
  // Rows of the same packed matrix: ids int64 | int32 [..] -> [.., k] of dtype.
  m.def(
      "embedding(Tensor ids, Tensor codes, Tensor scales, Tensor? zeros, int n, int k, int group_size, "
      "ScalarType dtype) -> Tensor");
  m.def("dequantize(Tensor codes, Tensor scales, Tensor? zeros, int n, int k, int group_size) -> Tensor");
  // Round to nearest of a finite matrix [n, k] -> codes uint8 [n, k], scales [n, groups], zeros uint8 [n, groups] (not
  // filled when symmetric). search: least error over clipped ranges.
  m.def(
      "quantize_weights(Tensor weight, int bits, int group_size, bool sym, bool search, ScalarType scale_dtype) -> "
      "(Tensor, Tensor, Tensor)");
  // What the int8 kernels see of x [.., k]: q int32 [m, k'], the inputs kept apart in their places, and scale fp32
  // [m, ceil(k'/128)].
  m.def("quantize_activations(Tensor x) -> (Tensor, Tensor)");
  m.def("dot_peak(int rounds) -> int");
  m.def("team_barriers(int count) -> int");
  m.def("read_memory(Tensor x) -> int");
  m.def("isa() -> str");
  m.def("set_isa(str cap) -> str");
  m.def("isa_levels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CPU, m) {
  m.impl("linear", TORCH_BOX(&cpullm::linear));
  m.impl("embedding", TORCH_BOX(&cpullm::embedding));
  m.impl("dequantize", TORCH_BOX(&cpullm::dequantize));
  m.impl("read_memory", TORCH_BOX(&cpullm::read_memory));
  m.impl("quantize_weights", TORCH_BOX(&cpullm::quantize_weights));
  m.impl("quantize_activations", TORCH_BOX(&cpullm::quantize_activations));
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CompositeExplicitAutograd, m) {
  m.impl("dot_peak", TORCH_BOX(&cpullm::dot_peak));
  m.impl("team_barriers", TORCH_BOX(&cpullm::team_barriers));
  m.impl("isa", TORCH_BOX(&cpullm::isa));
  m.impl("set_isa", TORCH_BOX(&cpullm::set_isa));
  m.impl("isa_levels", TORCH_BOX(&cpullm::isa_levels));
}
