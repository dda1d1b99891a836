// Which instructions the operators use: found out once per process, and limited by `limit_instructions` in tests.
//
// AMX needs three yeses: the processor's, the operating system's (it saves the tiles), and its leave for this process,
// which Linux gives once to all threads.

#include <torch/library.h>

#include <atomic>
#include <string>

#include "common.h"

#if HAS_X86
#include <cpuid.h>
#endif
#if HAS_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace slimpajama {

namespace {

#if HAS_X86
bool amx_is_allowed() {
#if defined(__linux__)
  constexpr unsigned TILE = 1u << 24, INT8 = 1u << 25, BF16 = 1u << 22;  // leaf 7, edx
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & (TILE | INT8 | BF16)) != (TILE | INT8 | BF16)) return false;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;  // refused where Linux saves no tiles
#else
  return false;
#endif
}
#endif

bool has_lanes() {
#if HAS_X86
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

Instructions find() {
#if HAS_X86
  const bool avx512 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (avx512) return amx_is_allowed() ? Instructions::amx : Instructions::avx512;
#endif
  return has_lanes() ? Instructions::lanes : Instructions::none;
}

std::atomic<Instructions> limit{Instructions::amx};

// "lanes", "avx512" or "amx": what is used from here on, if the processor has it. Returns what that is.
std::string limit_instructions(std::string name) {
  const std::string names[] = {"none", "lanes", "avx512", "amx"};
  const auto found = std::find(std::begin(names) + 1, std::end(names), name);
  TORCH_CHECK(found != std::end(names), "instructions are lanes, avx512 or amx, not ", name);
  limit = static_cast<Instructions>(found - std::begin(names));
  return names[static_cast<int>(instructions())];
}

}  // namespace

Instructions instructions() {
  static const Instructions best = find();
  return std::min(best, limit.load(std::memory_order_relaxed));
}

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def("limit_instructions(str name) -> str", slimpajama::limit_instructions);
  library.def("has_lanes() -> bool", [] { return slimpajama::instructions() != slimpajama::Instructions::none; });
  library.def("has_tiles() -> bool", [] { return slimpajama::instructions() == slimpajama::Instructions::amx; });
}
