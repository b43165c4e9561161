// What the operator files share: the active kernel table, scratch memory, checks and the split into threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>

#include "kernels/block.h"
#include "kernels/kernels.h"
#include "team.h"

namespace cpullm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The active table; the first call selects it, so an unreachable CPULLM_ISA is an error there and not at import.
const Kernels& kernels();

// A buffer that grows and is kept per thread: no allocation per call once warm.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  // 64-byte aligned, uninitialised; earlier contents are lost.
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      STD_TORCH_CHECK(data_, "torch_cpullm: cannot allocate ", bytes, " bytes of scratch memory");
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

inline Tensor empty_cpu(const int64_t* sizes, int64_t dims, int32_t dtype) {
  int64_t strides[64];
  STD_TORCH_CHECK(dims <= 64, "torch_cpullm: at most 64 dimensions are supported, got ", dims);
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_cpu(const int64_t* sizes, int64_t dims, ScalarType type) {
  return empty_cpu(sizes, dims, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)));
}

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

// torch's number of t's type; Tensor::scalar_type() asks for one type after the other, up to 13 calls.
inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

inline Float float_type(const Tensor& t, const char* op, const char* name) {
  static const int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       f16 = aoti_torch_dtype_float16();
  const int32_t type = dtype_of(t);
  if (type == f32) return Float::f32;
  if (type == bf16) return Float::bf16;
  STD_TORCH_CHECK(type == f16, op, ": ", name, " must be float32, bfloat16 or float16");
  return Float::f16;
}

inline int64_t storage_bytes(const Tensor& t) {
  int64_t bytes;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return bytes;
}

// A view whose storage was shrunk behind it is an error that names `op`.
inline void check_storage(const char* op, const char* name, const Tensor& t) {
  int64_t elements = t.numel() ? t.storage_offset() + 1 : 0;
  for (int64_t i = 0; i < t.dim() && elements; ++i) elements += (t.size(i) - 1) * t.stride(i);
  const int64_t bytes = storage_bytes(t), needed = elements * int64_t(t.element_size());
  STD_TORCH_CHECK(bytes >= needed, op, ": the storage of ", name, " must hold ", needed, " bytes, it has ", bytes);
}

constexpr int64_t kMostSize = int64_t(1) << 40;  // of n, k and a group: products stay far from overflow

// A packed matrix [n, k] from tensors of its shapes and types; anything else is an error that names `op`.
Weight check_weight(const char* op, const Tensor& codes, const Tensor& scales, const OptionalTensor& zeros, int64_t n,
                    int64_t k, int64_t group);

// perm int32 [k], whose entries lie in [0, k), or null; anything else is an error that names `op`.
const int32_t* check_order(const char* op, const OptionalTensor& perm, int64_t k);

// y = x W^T + bias, the product of cpullm::linear, in which every error names `op`.
Tensor linear_of(const char* op, const Tensor& x, const Weight& w, const OptionalTensor& bias,
                 const OptionalTensor& perm, int64_t compute);

// Rows of W of a float type, ids int64 | int32 [..] -> [.., k]; an id outside [0, n) is an error of cpullm::embedding.
Tensor rows_of(const Tensor& ids, const Weight& w, ScalarType dtype);

// The activation of this name; anything else is an error that names `op`.
Act act_of(const char* op, const std::string& name);

// The memory that ranks share for sums of rows of `width` floats; anything else is an error that names `op`.
struct RankMemory;
struct LostRanks;
RankMemory check_ranks(const char* op, const Tensor& shared, int64_t rank, int64_t ranks, int64_t width,
                       double timeout_s, LostRanks& lost);

// Whether a parallel region may begin. Not in a child that was forked after its parent had used one: the threads are gone
// there, and OpenMP would wait for them for ever. The first refusal is said on stderr.
bool may_use_threads();

// Multiply-adds that a range of a parallel region is worth at least.
constexpr int64_t kMinWork = 1 << 16;

// Splits [0, count) into at most one contiguous range per thread; a range is worth at least kMinWork multiply-adds.
template <class F>
void parallel(int64_t count, int64_t work_each, const F& f) {
  const int64_t grain = work_each >= kMinWork ? 1 : kMinWork / (work_each > 0 ? work_each : 1);
  if (count <= grain || !may_use_threads()) {
    f(0, count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

// One per member of a team of at most `threads`, for one parallel region of this thread: see divide().
Slices* fresh_slices(int64_t threads);

// How many members a team may have at most.
inline int64_t team_size() { return may_use_threads() ? torch::stable::get_num_threads() : 1; }

// Runs `part` once per member of a team of at most `threads`, in one parallel region.
template <class F>
void run_team(int64_t threads, const F& part) {
  if (threads == 1) {
    part(Member{0, 1});
  } else {
    torch::stable::parallel_for(0, kTeamRange, (kTeamRange + threads - 1) / threads,
                                [&](int64_t begin, int64_t end) { part(member_of(begin, end)); });
  }
}

// f(begin, end) for parts of a product's `panels` panels, [m, k] times [k, n]; see divide(). macs: of a panel.
template <class F>
void for_panels(int64_t panels, int64_t k, int64_t m, int64_t macs, const F& f) {
  const int64_t threads = std::min({team_size(), panels, panels * macs / kMinWork});
  if (threads <= 1) return f(int64_t(0), panels);
  Slices* const slices = fresh_slices(threads);
  run_team(threads, [&](const Member& member) { divide(panels, panel_weights(k, m), member, slices, f); });
}

}  // namespace cpullm
