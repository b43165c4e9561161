// Teams of 2 to 5 threads divide steps of many sizes, some of them two without a barrier between; every item must be
// computed exactly once, whoever is late. Prints
// "ok" and how many items were computed by another member than share() says. Exit status 1: an item was not, or twice.
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "team.h"

using namespace cpullm;

int main() {
  constexpr int64_t kSteps = 300, kCounts[] = {1, 3, 16, 37, 500}, kWeights[] = {1, kLeastSlice / 3, kLeastSlice * 4};
  std::atomic<int64_t> stolen{0};
  for (int64_t threads = 2; threads <= 5; ++threads) {
    const auto slices = std::make_unique<Slices[]>(size_t(threads));
    Barrier barrier;
    std::atomic<int> wrong{0};
    std::vector<std::atomic<int>> times(1000);  // of the step, and of the one right after it
    const auto run = [&](int64_t id) {
      const Member member{id, threads};
      for (int64_t step = 0; step < kSteps; ++step) {
        const int64_t count = kCounts[step % 5], weights = kWeights[step % 3];
        int64_t own_begin, own_end;
        share(count, member, own_begin, own_end);
        if (step % threads == id && step % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
        for (int64_t part = 0; part <= step % 2; ++part)
          divide(count, weights, member, slices.get(), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
              ++times[size_t(500 * part + i)];
              if (i < own_begin || i >= own_end) ++stolen;
            }
            if ((step + id) % 11 == 0) std::this_thread::yield();
          });
        barrier.wait(threads);
        if (id == 0) {
          for (int64_t i = 0; i < 1000; ++i)
            if (times[size_t(i)].exchange(0) != (i % 500 < count && i / 500 <= step % 2)) ++wrong;
        }
        barrier.wait(threads);
      }
    };
    std::vector<std::thread> team;
    for (int64_t id = 0; id < threads; ++id) team.emplace_back(run, id);
    for (auto& thread : team) thread.join();
    if (wrong) return 1;
  }
  printf("ok %lld\n", (long long)stolen.load());
}
