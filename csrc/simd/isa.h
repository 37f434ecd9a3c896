// The instruction sets that kernels are compiled for, and the one in use.
//
// Every file of csrc/kernels but team.cpp and both plan.cpp is compiled once per instruction set, into the namespace
// fastnn::<set>, with FASTNN_ISA naming the set and the compiler's flags for it. Kernel files keep everything they
// define in that namespace and include no C++ library header: an inline function outside it could be emitted with one
// set's instructions and linked for all.
//
// X(set, the set whose kernels it runs, ...), the one that every processor has first, the best last. avx512_bf16 and
// amx_bf16 run the kernels of avx512, which ask (isa_multiplies_pairs, isa_multiplies_matrices) before they use
// instructions beyond it.
#pragma once

#if defined(__x86_64__)
#define FASTNN_FOR_EACH_ISA(X, ...)   \
  X(baseline, baseline, __VA_ARGS__)  \
  X(avx2, avx2, __VA_ARGS__)          \
  X(avx512, avx512, __VA_ARGS__)      \
  X(avx512_bf16, avx512, __VA_ARGS__) \
  X(amx_bf16, avx512, __VA_ARGS__)
#elif defined(__aarch64__)
#define FASTNN_FOR_EACH_ISA(X, ...) \
  X(neon, neon, __VA_ARGS__)        \
  X(neon_bf16, neon_bf16, __VA_ARGS__)
#else
#define FASTNN_FOR_EACH_ISA(X, ...) X(baseline, baseline, __VA_ARGS__)
#endif

namespace fastnn {

enum class Isa {
#define FASTNN_ENUMERATOR(name, ...) name,
  FASTNN_FOR_EACH_ISA(FASTNN_ENUMERATOR)
#undef FASTNN_ENUMERATOR
};

Isa active_isa();
// Whether the instruction set in use multiplies vectors of pairs of bfloat16.
bool isa_multiplies_pairs();
// Whether the instruction set in use multiplies matrices of bfloat16 too.
bool isa_multiplies_matrices();
const char* isa_name(Isa isa);
bool isa_is_supported(Isa isa);
// Returns false, changing nothing, when `name` is no instruction set that this machine can run.
bool use_isa(const char* name);

}  // namespace fastnn

// Declares the table `name` of type `Table` in each set's namespace, where that set's kernel files define it, and
// fastnn::name(), the table of the set in use.
#define FASTNN_DECLARE_IN_ISA(isa, kernels, Table, name) \
  namespace kernels {                                    \
  extern const Table name;                               \
  }
#define FASTNN_CASE_OF_ISA(isa, kernels, Table, name) \
  case Isa::isa:                                      \
    return kernels::name;
#define FASTNN_DECLARE_KERNELS(Table, name)                                        \
  namespace fastnn {                                                               \
  FASTNN_FOR_EACH_ISA(FASTNN_DECLARE_IN_ISA, Table, name)                          \
  static inline const Table& name() {                                              \
    switch (active_isa()) { FASTNN_FOR_EACH_ISA(FASTNN_CASE_OF_ISA, Table, name) } \
    __builtin_unreachable();                                                       \
  }                                                                                \
  }
