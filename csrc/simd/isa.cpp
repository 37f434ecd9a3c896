#include "isa.h"

#include <atomic>
#include <cstring>

namespace fastnn {
namespace {

struct IsaName {
  Isa isa;
  const char* name;
};

constexpr IsaName kIsas[] = {
#define FASTNN_ROW(name) {Isa::name, #name},
    FASTNN_FOR_EACH_ISA(FASTNN_ROW)
#undef FASTNN_ROW
};

Isa best_isa() {
  Isa best = Isa::baseline;
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
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  switch (isa) {
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
#else
  return isa == Isa::baseline;
#endif
}

Isa active_isa() {
  return current_isa().load(std::memory_order_relaxed);
}

bool isa_multiplies_pairs() {
#if defined(__x86_64__) || defined(_M_X64)
  return active_isa() == Isa::avx512_bf16;
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
