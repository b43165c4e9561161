// The sum over ranks as an operator, and the check of the memory that they share.
#include "ops.h"
#include "ranks.h"

namespace cpullm {

RankMemory check_ranks(const char* op, const Tensor& shared, int64_t rank, int64_t ranks, int64_t width,
                       double timeout_s, LostRanks& lost) {
  constexpr int64_t kMostRanks = 64, kLine = RankMemory::kLine;
  STD_TORCH_CHECK(ranks >= 1 && ranks <= kMostRanks && rank >= 0 && rank < ranks, op,
                  ": rank must lie in [0, ranks), ranks in [1, ", kMostRanks, "], got ", rank, ", ", ranks);
  STD_TORCH_CHECK(shared.is_cpu() && shared.is_contiguous() && shared.scalar_type() == ScalarType::Byte, op,
                  ": shared must be a contiguous uint8 CPU tensor");
  STD_TORCH_CHECK(timeout_s > 0 && timeout_s <= 86400, op, ": timeout_s must lie in (0, 86400] seconds, got ",
                  timeout_s);
  const int64_t room = (shared.numel() - ranks * kLine) / (2 * ranks) / kLine * kLine;
  char* memory = static_cast<char*>(shared.mutable_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(memory) % kLine == 0, op, ": shared must be aligned to 64 bytes");
  STD_TORCH_CHECK(width <= room / int64_t(sizeof(float)) && room > 0, op, ": shared has room for ", room,
                  " bytes per rank, a row has ", width * int64_t(sizeof(float)));
  return {memory, rank, ranks, room, timeout_s, &lost};
}

namespace {

// x <- the sum of every rank's x, row by row; false: a rank did not come in time.
bool shared_sum(Tensor x, Tensor shared, int64_t rank, int64_t ranks, double timeout_s) {
  constexpr const char* op = "cpullm::shared_sum";
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.dim() >= 1, op,
                  ": x must be a contiguous float32 CPU tensor of at least one dimension");
  const int64_t width = x.size(x.dim() - 1);
  LostRanks lost;
  RankSum sum(check_ranks(op, shared, rank, ranks, width, timeout_s, lost));
  Barrier alone;
  const int64_t rows = width ? x.numel() / width : 0;
  sum.sum(static_cast<float*>(x.mutable_data_ptr()), rows, width, 0, width, {0, 1}, alone);
  return !lost.any.load();
}

}  // namespace
}  // namespace cpullm

STABLE_TORCH_LIBRARY_FRAGMENT(cpullm, m) {
  // x float32 [.., n] <- its sum over ranks, in place. shared: uint8, the same memory on all ranks, zeroed before the
  // first sum: a counter of 64 bytes per rank, then two buffers per rank. False: a rank did not come in time.
  m.def("shared_sum(Tensor(a!) x, Tensor(b!) shared, int rank, int ranks, float timeout_s) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CPU, m) { m.impl("shared_sum", TORCH_BOX(&cpullm::shared_sum)); }
