// The threads of one parallel region and how they wait for each other. No torch.
#pragma once

#include <sched.h>

#include <algorithm>
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
// share of time and not more. idle(): called in every spin.
class Barrier {
 public:
  void wait(int64_t count) {
    wait(count, [] {});
  }

  template <class F>
  void wait(int64_t count, F&& idle) {
    if (count == 1) return;
    const int64_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kSpins) {
        idle();
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

// What a team has taken of the items of a step. A member's range is the same in every step of as many items (a thread reads
// the same weights again), cut into at most kSlices slices. It takes them from the front, half of what is left at a time;
// a member that has none left takes slices from the ends of the others' ranges, also of one that has not begun.
struct alignas(64) Slices {
  static constexpr uint64_t kSlices = 16;
  // step << 16 | first slice left << 8 | end of those left. Of an older step: all are left. Of a newer one: none, since its
  // owner has seen before that nobody has any left. So a word never goes back, and steps need no barrier between them.
  std::atomic<uint64_t> word{0};
  uint64_t step = 0;  // of this member; read and written by it alone

  struct Taken {
    uint64_t begin, end;
  };

  bool none_left(uint64_t now) const {
    const uint64_t seen = word.load(std::memory_order_relaxed);
    return seen >> 16 > now || (seen >> 16 == now && (seen >> 8 & 255) == (seen & 255));
  }

  // Slices of `all` that nobody else gets; none left: begin == end. own: called by the member whose range it is.
  Taken take(uint64_t now, uint64_t all, bool own) {
    uint64_t seen = word.load(std::memory_order_relaxed);
    while (seen >> 16 <= now) {
      const bool begun = seen >> 16 == now;
      const uint64_t begin = begun ? seen >> 8 & 255 : 0, end = begun ? seen & 255 : all, left = end - begin;
      if (!left) return {0, 0};
      const uint64_t count = own ? (left + 1) / 2 : (left + 3) / 4;
      const Taken taken = own ? Taken{begin, begin + count} : Taken{end - count, end};
      const uint64_t next = now << 16 | (own ? taken.end : begin) << 8 | (own ? end : taken.begin);
      if (word.compare_exchange_weak(seen, next, std::memory_order_relaxed)) return taken;
    }
    return {0, 0};
  }
};

// Weights of a slice: about 4 us of a core's share of the memory bandwidth. Less is not worth another stream's start.
constexpr int64_t kLeastSlice = 1 << 18;

// Of a panel of k inputs and 32 columns times `rows` rows; up to kLeastCost rows, its bytes take as long as the arithmetic.
constexpr int64_t kLeastCost = 6;
inline int64_t panel_weights(int64_t k, int64_t rows) { return 32 * k * std::max(rows, kLeastCost) / kLeastCost; }

// Calls f(begin, end) for parts of [0, count) that together the team's calls cover once. Every member calls it as often as
// the others, with the same counts. weights: of an item, as many as take as long. slices: one per member, zeroed before the
// team begins. Who computes an item differs from call to call: what f writes belongs to the item, and is read after the
// next barrier. Steps that are too short to be worth it are shared as share() has it.
template <class F>
void divide(int64_t count, int64_t weights, const Member& member, Slices* slices, const F& f) {
  int64_t begin, end;
  if (member.count == 1 || count * weights < 2 * member.count * kLeastSlice) {
    share(count, member, begin, end);
    return f(begin, end);
  }
  const uint64_t step = ++slices[member.id].step;
  for (int64_t i = 0; i < member.count; ++i) {
    const int64_t id = member.id + i < member.count ? member.id + i : member.id + i - member.count;
    Slices& of = slices[id];
    if (of.none_left(step)) continue;  // most of the time, and without a division
    share(count, {id, member.count}, begin, end);
    const int64_t all = std::min({int64_t(Slices::kSlices), end - begin, 1 + (end - begin) * weights / kLeastSlice});
    for (Slices::Taken t; t = of.take(step, uint64_t(all), i == 0), t.begin != t.end;)
      f(begin + (end - begin) * int64_t(t.begin) / all, begin + (end - begin) * int64_t(t.end) / all);
  }
}

// A range so long that a fair split of it tells each thread how many there are: OpenMP may give fewer than asked for,
// and one inside another region.
constexpr int64_t kTeamRange = int64_t(1) << 40;

inline Member member_of(int64_t begin, int64_t end) {
  const int64_t size = end - begin, count = (kTeamRange + size / 2) / size;
  return {(begin * count + kTeamRange / 2) / kTeamRange, count};
}

}  // namespace cpullm
