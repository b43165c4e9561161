// Sums over the ranks of one host, through memory that they share. No torch.
#pragma once

#include <sched.h>

#include <chrono>
#include <cstdint>
#include <cstring>

#include "team.h"

namespace cpullm {

// What the threads of a rank know of lost ranks, in all the memories that it sums in. any: set when one did not come in
// time: nobody waits any more, and results are worthless. stop: of each memory, two used in turn, whether the threads
// leave before a round.
struct LostRanks {
  std::atomic<bool> any{false}, stop[2][2]{};
};

// Memory that all ranks map: a counter of 64 bytes each, then two buffers each, used in turn: a rank writes one again
// only after all others have left the round that read it. A counter holds the rounds that its rank has published, or
// kGone once it has given up: then the others give up at once, and nobody takes old numbers for new ones.
struct RankMemory {
  static constexpr int64_t kLine = 64, kGone = INT64_MIN;
  static_assert(std::atomic<int64_t>::is_always_lock_free, "counters are shared by processes");

  char* memory;
  int64_t rank, ranks;
  int64_t room;  // bytes of a buffer, the same on all ranks
  double timeout_s;
  LostRanks* lost;
  int which = 0;  // of the memories that this rank sums in

  std::atomic<int64_t>& counter(int64_t r) const {
    return *reinterpret_cast<std::atomic<int64_t>*>(memory + r * kLine);
  }
  float* buffer(int64_t r, int64_t round) const {
    return reinterpret_cast<float*>(memory + ranks * kLine + (2 * r + (round & 1)) * room);
  }

  void give_up() const {
    lost->any.store(true, std::memory_order_relaxed);
    counter(rank).store(kGone, std::memory_order_release);
  }

  // Waits until every rank has published `round`, or one is lost.
  void wait(int64_t round) const {
    if (lost->any.load(std::memory_order_relaxed)) return;
    constexpr int kSpins = 4000;  // as Barrier in team.h: about the length of a step, then yield
    constexpr int kLooks = 64;    // yields between two looks at the clock
    const auto start = std::chrono::steady_clock::now();
    for (int64_t r = 0; r < ranks; ++r) {
      int64_t published;
      for (int64_t spins = 0; (published = counter(r).load(std::memory_order_acquire)) < round; ++spins) {
        if (published == kGone) return give_up();
        if (spins < kSpins) {
#ifdef __x86_64__
          __builtin_ia32_pause();
#endif
          continue;
        }
        sched_yield();
        if (spins % kLooks) continue;
        const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
        if (waited.count() > timeout_s) give_up();
        if (lost->any.load(std::memory_order_relaxed)) return;
      }
    }
  }
};

// One thread's sums over ranks, one after the other; every thread of a rank's team has its own copy.
class RankSum {
 public:
  explicit RankSum(const RankMemory& shared)
      : shared_(shared), round_(shared.counter(shared.rank).load(std::memory_order_relaxed)) {
    if (round_ == RankMemory::kGone) shared.lost->any.store(true, std::memory_order_relaxed);
  }

  // x [rows, width] <- its sum over ranks, added in the order of ranks, so that all get the same bits. Called by every
  // thread of the team with columns of its own, [c0, c1), which it has written. Returns how many barriers it passed.
  // Rows at a time: a power of two, so that 1024 rows are the same rounds whether they come at once or in parts.
  // Gives up between two rounds once a rank is lost, and later sums at their first: then `gone()`.
  int64_t sum(float* x, int64_t rows, int64_t width, int64_t c0, int64_t c1, const Member& member, Barrier& barrier) {
    int64_t at_once = 1, barriers = 0;
    while (2 * at_once * width * int64_t(sizeof(float)) <= shared_.room && at_once < 1024) at_once *= 2;
    const size_t bytes = c1 > c0 ? size_t(c1 - c0) * sizeof(float) : 0;
    for (int64_t row0 = 0; row0 < rows; row0 += at_once, ++barriers) {
      const int64_t end = row0 + at_once < rows ? row0 + at_once : rows;
      ++round_;
      float* const own = shared_.buffer(shared_.rank, round_);
      for (int64_t row = row0; row < end && bytes; ++row)
        std::memcpy(own + (row - row0) * width + c0, x + row * width + c0, bytes);
      // All threads of a rank go on or leave together: one of them says which before the barrier, and writes that place
      // again only behind the next one, which all have then read it before.
      std::atomic<bool>& stop = shared_.lost->stop[shared_.which][round_ & 1];
      if (member.id == 0) stop.store(shared_.lost->any.load(std::memory_order_relaxed), std::memory_order_relaxed);
      barrier.wait(member.count);
      if (stop.load(std::memory_order_relaxed)) {
        gone_ = true;
        return barriers + 1;
      }
      // What any thread of this rank knew of lost ranks before the barrier, all know after it.
      // In place of the last round alone: another thread may say at this moment that the rank is gone.
      int64_t last = round_ - 1;
      if (member.id == 0)
        shared_.counter(shared_.rank).compare_exchange_strong(last, round_, std::memory_order_release);
      shared_.wait(round_);
      for (int64_t row = row0; row < end && bytes; ++row) {
        float* const to = x + row * width;
        const int64_t at = (row - row0) * width;
        std::memcpy(to + c0, shared_.buffer(0, round_) + at + c0, bytes);
        for (int64_t r = 1; r < shared_.ranks; ++r) {
          const float* const other = shared_.buffer(r, round_) + at;
          for (int64_t c = c0; c < c1; ++c) to[c] += other[c];
        }
      }
    }
    return barriers;
  }

  int64_t rank() const { return shared_.rank; }

  // Whether a rank is lost, the same on all threads of the team: nothing more needs to be computed.
  bool gone() const { return gone_; }

 private:
  RankMemory shared_;
  int64_t round_;
  bool gone_ = false;
};

}  // namespace cpullm
