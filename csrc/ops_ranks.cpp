// Sums over the ranks of one host, through memory that they share.
#include "ops.h"

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstring>

namespace cpullm {
namespace {

constexpr const char* kSum = "cpullm::shared_sum";
constexpr int64_t kLine = 64;         // one counter per cache line
constexpr int64_t kMostRanks = 64, kMostFloats = int64_t(1) << 24;
constexpr int kSpins = 4000;          // as Barrier in team.h: about the length of a step, then yield
constexpr int kLooks = 64;            // yields between two looks at the clock

static_assert(std::atomic<int64_t>::is_always_lock_free, "counters are shared by processes");

// Whether every rank's counter has reached `round` before the deadline.
bool all_reached(char* shared, int64_t ranks, int64_t round, double timeout_s) {
  const auto start = std::chrono::steady_clock::now();
  for (int64_t r = 0; r < ranks; ++r) {
    const auto* counter = reinterpret_cast<const std::atomic<int64_t>*>(shared + r * kLine);
    for (int64_t spins = 0; counter->load(std::memory_order_acquire) < round; ++spins) {
      if (spins < kSpins) {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
        continue;
      }
      sched_yield();
      if (spins % kLooks == 0 &&
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > timeout_s)
        return false;
    }
  }
  return true;
}

// x <- the sum of every rank's x, added in the order of ranks, so that all get the same bits. Two buffers per rank, in
// turn: a rank writes one again only after all others have left the round that read it.
bool shared_sum(Tensor x, Tensor shared, int64_t rank, int64_t ranks, int64_t round, double timeout_s) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float, kSum,
                  ": x must be a contiguous float32 CPU tensor");
  STD_TORCH_CHECK(ranks >= 1 && ranks <= kMostRanks && rank >= 0 && rank < ranks && round >= 1, kSum,
                  ": rank must lie in [0, ranks), ranks in [1, ", kMostRanks, "], round must be positive, got ", rank,
                  ", ", ranks, ", ", round);
  STD_TORCH_CHECK(x.numel() <= kMostFloats, kSum, ": x has ", x.numel(), " elements, more than ", kMostFloats);
  STD_TORCH_CHECK(shared.is_cpu() && shared.is_contiguous() && shared.scalar_type() == ScalarType::Byte, kSum,
                  ": shared must be a contiguous uint8 CPU tensor");
  // Room of one buffer, the same on all ranks whatever their x.
  const int64_t room = (shared.numel() - ranks * kLine) / (2 * ranks) / kLine * kLine;
  const int64_t count = x.numel(), bytes = count * int64_t(sizeof(float));
  char* memory = static_cast<char*>(shared.mutable_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(memory) % kLine == 0, kSum, ": shared must be aligned to 64 bytes");
  STD_TORCH_CHECK(room >= bytes, kSum, ": shared has room for ", room, " bytes per rank, x has ", bytes);
  char* const buffers = memory + ranks * kLine;
  const auto buffer = [&](int64_t r) { return buffers + (2 * r + round % 2) * room; };
  auto* sum = static_cast<float*>(x.mutable_data_ptr());
  if (bytes) std::memcpy(buffer(rank), sum, size_t(bytes));
  reinterpret_cast<std::atomic<int64_t>*>(memory + rank * kLine)->store(round, std::memory_order_release);
  if (!all_reached(memory, ranks, round, timeout_s)) return false;
  for (int64_t r = 0; r < ranks; ++r) {
    const auto* other = reinterpret_cast<const float*>(buffer(r));
    if (r == 0) {
      if (bytes) std::memcpy(sum, other, size_t(bytes));
    } else {
      for (int64_t i = 0; i < count; ++i) sum[i] += other[i];
    }
  }
  return true;
}

}  // namespace
}  // namespace cpullm

STABLE_TORCH_LIBRARY_FRAGMENT(cpullm, m) {
  // x float32 <- its sum over ranks, in place. shared: uint8, the same zeroed memory on all ranks: a counter of 64
  // bytes per rank, then two buffers per rank. round: 1, 2, .. with every call. False: a rank did not come in time.
  m.def("shared_sum(Tensor(a!) x, Tensor(b!) shared, int rank, int ranks, int round, float timeout_s) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CPU, m) { m.impl("shared_sum", TORCH_BOX(&cpullm::shared_sum)); }
