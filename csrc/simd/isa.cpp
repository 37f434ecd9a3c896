#include "isa.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fastnn {
namespace {

struct IsaName {
  Isa isa;
  const char* name;
};

constexpr IsaName kIsas[] = {
#define FASTNN_ROW(name, ...) {Isa::name, #name},
    FASTNN_FOR_EACH_ISA(FASTNN_ROW)
#undef FASTNN_ROW
};

#if defined(__x86_64__)
// Whether the processor has a matrix unit for bfloat16 and the system lets this process use it: Linux has to be asked,
// once, for all threads.
bool has_matrix_unit() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of leaf 7
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  static const bool is_permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return is_permitted;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
// Whether the processor has the instructions for bfloat16 (FEAT_BF16), as the system says.
bool has_bfloat16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers do not name
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof(found);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) == 0 && found != 0;
#else
  return false;
#endif
}
#endif

Isa best_isa() {
  Isa best = kIsas[0].isa;
  for (const IsaName& row : kIsas) {
    if (isa_is_supported(row.isa)) best = row.isa;
  }
  return best;
}

std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

bool isa_is_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::amx_bf16:
      return isa_is_supported(Isa::avx512_bf16) && has_matrix_unit();
    case Isa::avx512_bf16:
      return isa_is_supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default:
      return true;
  }
#elif defined(__aarch64__)
  return isa == Isa::neon || has_bfloat16();
#else
  return isa == Isa::baseline;
#endif
}

Isa active_isa() {
  return current_isa().load(std::memory_order_relaxed);
}

bool isa_multiplies_pairs() {
#if defined(__x86_64__)
  return active_isa() == Isa::avx512_bf16 || active_isa() == Isa::amx_bf16;
#elif defined(__aarch64__)
  return active_isa() == Isa::neon_bf16;
#else
  return false;
#endif
}

bool isa_multiplies_matrices() {
#if defined(__x86_64__)
  return active_isa() == Isa::amx_bf16;
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  for (const IsaName& row : kIsas) {
    if (row.isa == isa) return row.name;
  }
  return "unknown";
}

bool use_isa(const char* name) {
  for (const IsaName& row : kIsas) {
    if (std::strcmp(row.name, name) == 0 && isa_is_supported(row.isa)) {
      current_isa().store(row.isa, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace fastnn
