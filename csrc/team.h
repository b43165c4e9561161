// The threads of one parallel region and how they wait for each other. No torch.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

namespace cpullm {

// What one thread knows of its region: its number and how many there really are.
struct Member {
  int64_t id, count;
};

// The part of [0, count) that belongs to a member: contiguous, the same in every call (a thread reads the same weights).
inline void share(int64_t count, const Member& member, int64_t& begin, int64_t& end) {
  begin = count * member.id / member.count;
  end = count * (member.id + 1) / member.count;
}

// Everybody waits for everybody. Spins for about the length of a step, then yields, so that a busy neighbour costs its
// share of time and not more.
class Barrier {
 public:
  void wait(int64_t count) {
    if (count == 1) return;
    const int64_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kSpins) {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 4000;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> phase_{0};
};

// A range so long that a fair split of it tells each thread how many there are: OpenMP may give fewer than asked for,
// and one inside another region.
constexpr int64_t kTeamRange = int64_t(1) << 40;

inline Member member_of(int64_t begin, int64_t end) {
  const int64_t size = end - begin, count = (kTeamRange + size / 2) / size;
  return {(begin * count + kTeamRange / 2) / kTeamRange, count};
}

}  // namespace cpullm
