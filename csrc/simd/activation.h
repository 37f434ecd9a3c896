// The table of activations: what each is called, which parameters it has, and what its derivative is computed from.
//
// An activation is added in four places: a row here, its formulas in activate.h, its formulas for the GPU in
// fastnn/kernels/_activation.py, and its names in torch in fastnn/activations.py, which reads this table from the
// extension.
#pragma once

#include <stdint.h>

namespace fastnn {

// What backward needs in order to compute an activation's derivative. PyTorch saves the same tensor, so that a user may
// change the other one in place between forward and backward.
enum class DerivedFrom : int32_t { nothing, output, input };

struct ActivationParameter {
  const char* name;  // torch's name of it, in functions, modules and ATen alike
  double value;      // torch's default
};
constexpr int kMostActivationParameters = 2;

struct ActivationEntry {
  const char* name;
  uint64_t length;  // of the name, which small calls would take long to count
  DerivedFrom derived_from;
  ActivationParameter parameters[kMostActivationParameters];  // those without a name do not exist
};

// X(name, DerivedFrom, {"parameter", default}...)
#define FASTNN_FOR_EACH_ACTIVATION(X)                                  \
  X(identity, DerivedFrom::nothing, {})                                \
  X(relu, DerivedFrom::output, {})                                     \
  X(tanh, DerivedFrom::output, {})                                     \
  X(sigmoid, DerivedFrom::output, {})                                  \
  X(gelu, DerivedFrom::input, {})                                      \
  X(gelu_tanh, DerivedFrom::input, {})                                 \
  X(silu, DerivedFrom::input, {})                                      \
  X(leaky_relu, DerivedFrom::input, {"negative_slope", 0.01})          \
  X(elu, DerivedFrom::input, {"alpha", 1.0})                           \
  X(hardswish, DerivedFrom::input, {})                                 \
  X(softplus, DerivedFrom::input, {"beta", 1.0}, {"threshold", 20.0})  \
  X(hardtanh, DerivedFrom::input, {"min_val", -1.0}, {"max_val", 1.0}) \
  X(selu, DerivedFrom::input, {})                                      \
  X(mish, DerivedFrom::input, {})                                      \
  X(exp, DerivedFrom::output, {})                                      \
  X(sin, DerivedFrom::input, {})                                       \
  X(cos, DerivedFrom::input, {})

enum class ActivationKind : int32_t {
#define FASTNN_ENUMERATOR(name, ...) name,
  FASTNN_FOR_EACH_ACTIVATION(FASTNN_ENUMERATOR)
#undef FASTNN_ENUMERATOR
};

// One entry per kind, in the order of the kinds.
constexpr ActivationEntry kActivations[] = {
#define FASTNN_ENTRY(name, derived_from, ...) {#name, sizeof(#name) - 1, derived_from, {__VA_ARGS__}},
    FASTNN_FOR_EACH_ACTIVATION(FASTNN_ENTRY)
#undef FASTNN_ENTRY
};

// One layer's activation, in the form that the kernels take.
struct Activation {
  ActivationKind kind;
  double parameters[kMostActivationParameters];
};

constexpr Activation kIdentity{ActivationKind::identity, {}}, kRelu{ActivationKind::relu, {}};

// Whether the activation does no more than to keep numbers between two bounds: see bounds_of in activate.h.
static inline bool only_bounds(const Activation& activation) {
  return activation.kind == ActivationKind::relu || activation.kind == ActivationKind::hardtanh;
}

static inline DerivedFrom derived_from(const Activation& activation) {
  return kActivations[static_cast<int32_t>(activation.kind)].derived_from;
}

}  // namespace fastnn
