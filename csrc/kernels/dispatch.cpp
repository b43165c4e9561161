// Which kernels this CPU and operating system can run, and which the user asked for (CPULLM_ISA).
#include <cstring>

#include "kernels.h"

#include <unistd.h>

#ifndef CPULLM_REF_ONLY
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace cpullm {
namespace {

bool always() { return true; }

#ifndef CPULLM_REF_ONLY
// Register state the operating system saves: bit 1 SSE, 2 AVX, 5-7 AVX-512, 17-18 AMX tiles.
uint64_t saved_state() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  unsigned lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return uint64_t(hi) << 32 | lo;
}

constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xe6, kAmxState = 0x60000;

struct Leaf7 {
  unsigned ebx = 0, ecx = 0, edx = 0, eax1 = 0;  // eax1: sub-leaf 1
};

Leaf7 leaf7() {
  Leaf7 f;
  unsigned a = 0;
  if (__get_cpuid_count(7, 0, &a, &f.ebx, &f.ecx, &f.edx) && a >= 1) {
    unsigned b, c, d;
    __get_cpuid_count(7, 1, &f.eax1, &b, &c, &d);
  }
  return f;
}

bool has_avx2() {
  unsigned a, b, c, d;
  if ((saved_state() & kAvxState) != kAvxState || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  return (c & bit_FMA) && (c & bit_F16C) && (c & bit_AVX) && (leaf7().ebx & bit_AVX2);
}

bool has_avx_vnni() { return has_avx2() && (leaf7().eax1 & (1u << 4)); }

bool has_avx512() {
  const unsigned need = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  const Leaf7 f = leaf7();
  return has_avx2() && (saved_state() & kAvx512State) == kAvx512State && (f.ebx & need) == need &&
         (f.ecx & (1u << 11));  // AVX512_VNNI
}

// AMX needs the CPU's bits, saved tile state and, on Linux, a permission asked for once per process.
bool has_amx() {
  const Leaf7 f = leaf7();
  const unsigned need = 1u << 24 | 1u << 25 | 1u << 22;  // AMX-TILE, AMX-INT8, AMX-BF16
  if (!has_avx512() || (f.edx & need) != need || (saved_state() & kAmxState) != kAmxState) return false;
  constexpr long kArchReqXcompPerm = 0x1023, kXTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXTileData) == 0;
}
#endif

}  // namespace

const Level kLadder[kLevels] = {
    {"ref", always, use_ref},
#ifndef CPULLM_REF_ONLY
    {"avx2", has_avx2, use_avx2},       {"avx_vnni", has_avx_vnni, use_avx_vnni},
    {"avx512", has_avx512, use_avx512}, {"amx", has_amx, use_amx},
#endif
};

namespace {

int64_t read_l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes >= 128 * 1024) return bytes;
#endif
  return 512 * 1024;  // unknown: what the smallest servers of ten years have
}

// AMD's family of cores, 25: Zen 3 and 4, 26: Zen 5; 0: not AMD's.
unsigned amd_family() {
#ifdef CPULLM_REF_ONLY
  return 0;
#else
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || !__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const unsigned family = a >> 8 & 15;
  return family < 15 ? family : family + (a >> 20 & 255);
#endif
}

// One table per level, built once and never written again: other threads may be reading it.
struct Tables {
  Kernels level[kLevels];
  Tables() {
    Kernels table{};
    for (int i = 0; i < kLevels; ++i) {
      if (kLadder[i].supported()) {  // improves on every supported level below it; a CPU may lack one in between
        kLadder[i].use(table);
        table.isa = kLadder[i].name;
      }
      level[i] = table;
    }
  }
};

const Tables tables;  // when the library is loaded: nothing here can fail

}  // namespace

bool cpu_has_avx512_bf16() {
#ifndef CPULLM_REF_ONLY
  return has_avx512() && (leaf7().eax1 & (1u << 5));
#else
  return false;
#endif
}

const int64_t l2_bytes = read_l2_bytes();
const bool prefetch_codes = amd_family() == 0;
const bool pair_panels = amd_family() >= 26;
const bool wide_dots = amd_family() >= 26;

const Kernels* select_kernels(const char* cap, const char** error) {
  int top = kLevels - 1;
  if (cap && *cap) {
    while (top >= 0 && strcmp(kLadder[top].name, cap) != 0) --top;
    if (top < 0) {
      *error = "is not a known level";
      return nullptr;
    }
    if (!kLadder[top].supported()) {
      *error = "is not reachable on this machine";
      return nullptr;
    }
  }
  return &tables.level[top];
}

}  // namespace cpullm
