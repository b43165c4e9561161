// Runs one kernel on small data instruction by instruction (the CPU's trap flag: no debugger, no emulator, so every level
// that the CPU has) and prints "address count" in hexadecimal and decimal for every instruction of this program that ran,
// of shared libraries none.
//
//   count_instructions LEVEL KERNEL M K N GROUP BITS     KERNEL: int8, fp32, bf16 (products), quantize
//
// Linked at a fixed address with the kernels' objects, so that addresses are those of a disassembly.
#include <signal.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "input.h"

using namespace cpullm;

extern "C" const char __executable_start, etext;

namespace {

uint32_t* counts;  // per byte of this program's text

void count_one(int, siginfo_t*, void* context) {
  const auto at = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] - greg_t(&__executable_start);
  if (at >= 0 && at < &etext - &__executable_start) ++counts[at];
}

template <class T>
T* memory(int64_t count) {
  void* at = aligned_alloc(64, size_t(round_up(count * int64_t(sizeof(T)), 64)));
  memset(at, 1, size_t(round_up(count * int64_t(sizeof(T)), 64)));
  return static_cast<T*>(at);
}

template <class F>
__attribute__((noinline)) void step_through(const F& f) {
  asm volatile("sub $128, %%rsp\npushfq\norq $256, (%%rsp)\npopfq\nadd $128, %%rsp" ::: "memory", "cc");
  f();
  asm volatile("sub $128, %%rsp\npushfq\nandq $-257, (%%rsp)\npopfq\nadd $128, %%rsp" ::: "memory", "cc");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) return 2;
  const char* error = nullptr;
  const Kernels* kernels = select_kernels(argv[1], &error);
  if (!kernels) {
    fprintf(stderr, "%s %s\n", argv[1], error);
    return 2;
  }
  const char* kernel = argv[2];
  const int64_t m = atol(argv[3]), k = atol(argv[4]), n = atol(argv[5]), group = atol(argv[6]);
  const int bits = atoi(argv[7]);
  const Compute compute = !strcmp(kernel, "fp32")   ? Compute::fp32
                          : !strcmp(kernel, "bf16") ? Compute::bf16
                                                    : Compute::int8;
  const int64_t panels = panels_of(n), groups = (k + group - 1) / group;
  const Weight w{memory<uint8_t>(panels * k / kStep * 16 * bits),
                 memory<uint16_t>(panels * groups * kPanel),
                 nullptr,
                 n,
                 k,
                 round_up(k, kChunk),
                 group,
                 groups,
                 bits,
                 Zeros::symmetric,
                 Float::f16};
  float* x = memory<float>(m * k);
  for (int64_t i = 0; i < m * k; ++i) x[i] = float(i % 255 - 127);  // nothing outgrows the others
  Arena count{nullptr};
  make_input(count, *kernels, compute, m, k, group);
  Arena arena{memory<char>(count.used)};
  const Input in = make_input(arena, *kernels, compute, m, k, group);
  float* y = memory<float>(m * n);
  char* scratch = memory<char>(kScratchBytes);
  counts = static_cast<uint32_t*>(calloc(size_t(&etext - &__executable_start), sizeof(uint32_t)));
  struct sigaction action{};
  action.sa_sigaction = count_one;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGTRAP, &action, nullptr);
  const auto fill = [&] {
    for (int64_t row = 0; row < m; row += in.tile) {
      const int64_t count = std::min(in.tile, m - row);
      const Rows from{x + row * k, count, k, k, Float::f32, nullptr};
      load(*kernels, from, tile_of(in, row / in.tile, count, 0, round_up(k, kChunk)), {0, count});
    }
  };
  if (!strcmp(kernel, "quantize")) {
    step_through(fill);
  } else {
    fill();
    step_through([&] { product(*kernels, {w, nullptr}, in, y, n, {0, panels}, scratch); });
  }
  for (int64_t i = 0; i < &etext - &__executable_start; ++i)
    if (counts[i]) printf("%llx %u\n", (unsigned long long)(&__executable_start + i), counts[i]);
  return 0;
}
