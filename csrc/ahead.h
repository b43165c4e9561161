// What a thread asks its memory for while it waits for the others, so that its next product does not begin with a cold
// stream. No torch.
#pragma once

#include "input.h"
#include "team.h"

namespace cpullm {

inline Range share(int64_t count, const Member& member) {
  Range r;
  share(count, member, r.begin, r.end);
  return r;
}

// The codes that a thread reads first when it goes on. It asks for them only while it waits: whoever comes last, and is
// waited for, loses nothing. Callable for Barrier::wait.
struct Ahead {
  const uint8_t *at = nullptr, *end = nullptr;

  // The first of these panels are read next; called for several products in the order in which they are read, it takes the
  // first that has any. At most a quarter of the L2 cache: the inputs that are made meanwhile stay there too.
  void expect(const Linear& l, Range panels) {
    if (at != end || panels.begin >= panels.end) return;
    const int64_t panel = l.w.k_padded * kPanel * l.w.bits / 8;  // bytes, a multiple of kLine
    at = l.w.codes + panels.begin * panel;
    end = at + std::min((panels.end - panels.begin) * panel, l2_bytes / 4 / kLine * kLine);
  }

  void operator()() {
    for (int64_t i = 0; i < kLines && at != end; ++i, at += kLine) __builtin_prefetch(at, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kLines = 16;  // between two looks at the barrier: fewer do not fill a wait of a microsecond
};

}  // namespace cpullm
