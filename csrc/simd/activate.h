// The formulas of the activations and of their derivatives, on vectors. Include only from csrc/kernels.
#pragma once

#include <math.h>

#include "activation.h"
#include "math.h"

namespace fastnn {
namespace FASTNN_ISA {

// The error function. In float erf(x) = x P(x^2) below 1 (minimax, 1.2e-9), above it 1 - exp(P(x)) with P the minimax
// polynomial of log erfc(x) on [1, 4]; erf(4) rounds to 1. In double the C library's, a lane at a time.
FASTNN_INLINE Vec<float> erf_of(Vec<float> x) {
  constexpr float near_terms[] = {7.889122814e-05f, -8.020842263e-04f, 5.189535450e-03f, -2.685444465e-02f,
                                  1.128360018e-01f, -3.761262714e-01f, 1.128379166e+00f};
  constexpr float far_terms[] = {1.855740694e-04f,  -2.939607872e-03f, 2.180532054e-02f, -1.030373732e-01f,
                                 -6.382256722e-01f, -1.127040039e+00f, -3.537187812e-04f};
  const Vec<float> square = x * x, size = x < Vec<float>{} ? -x : x;
  const Vec<float> bounded = size > broadcast(4.0f) ? broadcast(4.0f) : size;
  Vec<float> near = broadcast(near_terms[0]), log_rest = broadcast(far_terms[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 7; ++i) {
    near = near * square + near_terms[i];
    log_rest = log_rest * bounded + far_terms[i];
  }
  const Vec<float> far = 1.0f - exp_of<float>(log_rest);
  return size < broadcast(1.0f) ? near * x : x < Vec<float>{} ? -far : far;
}
FASTNN_INLINE Vec<double> erf_of(Vec<double> x) {
  double lanes[kLanes<double>];
  store(lanes, x);
  for (int i = 0; i < kLanes<double>; ++i) lanes[i] = erf(lanes[i]);
  return load(lanes);
}

// gelu_tanh(x) = x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3)
template <class T>
FASTNN_INLINE Vec<T> gelu_inner(Vec<T> x) {
  return T(0.79788456080286535588) * (x + T(0.044715) * x * x * x);
}

// exp(x) - 1 for x up to 0, as 2t / (1 - t) with t = tanh(x / 2), which cancels nowhere.
template <class T>
FASTNN_INLINE Vec<T> expm1_below_0(Vec<T> x) {
  const Vec<T> t = tanh_of<T>(x * T(0.5));
  return T(2) * t / (T(1) - t);
}

// SELU's factors, from the paper of Klambauer and others (2017), with as many digits as torch has.
constexpr double kSeluScale = 1.0507009873554804934193349852946, kSeluAlpha = 1.6732632423543772848170429916717;

// tanh(log(1 + exp(x))), mish's gate: (e^2 + 2e) / (e^2 + 2e + 2) with e = exp(x).
template <class T>
FASTNN_INLINE Vec<T> mish_gate(Vec<T> x) {
  const Vec<T> e = exp_of<T>(at_most(x, ExpConstants<T>::sigmoid_is_one)), dividend = e * (e + T(2));
  return dividend / (dividend + T(2));
}

// An activation with its parameters in the kernel's type.
template <ActivationKind kind_, class T>
struct ActivationFunction {
  static constexpr ActivationKind kind = kind_;
  T first, second;  // the parameters, in the table's order

  FASTNN_INLINE Vec<T> operator()(Vec<T> x) const {
    if constexpr (kind == ActivationKind::relu) return relu(x);
    if constexpr (kind == ActivationKind::tanh) return tanh_of<T>(x);
    if constexpr (kind == ActivationKind::sigmoid) return sigmoid_of<T>(x);
    if constexpr (kind == ActivationKind::gelu) {
      return T(0.5) * x * (T(1) + erf_of(x * T(0.70710678118654752440)));
    }
    if constexpr (kind == ActivationKind::gelu_tanh) {
      return T(0.5) * x * (T(1) + tanh_of<T>(gelu_inner<T>(x)));
    }
    if constexpr (kind == ActivationKind::silu) return x / (T(1) + exp_of<T>(-x));
    if constexpr (kind == ActivationKind::leaky_relu) return x > Vec<T>{} ? x : x * first;
    if constexpr (kind == ActivationKind::elu) return x > Vec<T>{} ? x : first * expm1_below_0<T>(x);
    // A division by six would take as long as all the rest. Six times a sixth is one in both types.
    if constexpr (kind == ActivationKind::hardswish) return x * (at_most(at_least(x + T(3), T(0)), T(6)) * T(1.0 / 6));
    if constexpr (kind == ActivationKind::softplus) {
      const Vec<T> scaled = first * x;  // log(1 + exp(a)) = max(a, 0) + log(1 + exp(-|a|))
      const Vec<T> value = (at_least(scaled, T(0)) + log1p_of<T>(exp_of<T>(-magnitude_of<T>(scaled)))) / first;
      return scaled > broadcast(second) ? x : value;
    }
    if constexpr (kind == ActivationKind::hardtanh) return at_most(at_least(x, first), second);
    if constexpr (kind == ActivationKind::selu) {
      return x > Vec<T>{} ? T(kSeluScale) * x : T(kSeluScale * kSeluAlpha) * expm1_below_0<T>(x);
    }
    if constexpr (kind == ActivationKind::mish) return x * mish_gate<T>(x);
    if constexpr (kind == ActivationKind::exp) return exp_of<T>(x);
    if constexpr (kind == ActivationKind::sin) return sin_of<T>(x, 0);
    if constexpr (kind == ActivationKind::cos) return sin_of<T>(x, 1);
    return x;
  }

  // grad times the derivative. `s` is what the table says that the derivative is computed from.
  FASTNN_INLINE Vec<T> gradient(Vec<T> grad, Vec<T> s) const {
    if constexpr (kind == ActivationKind::relu) return s <= Vec<T>{} ? Vec<T>{} : grad;
    if constexpr (kind == ActivationKind::tanh) return grad * (T(1) - s * s);
    if constexpr (kind == ActivationKind::sigmoid) return grad * s * (T(1) - s);
    if constexpr (kind == ActivationKind::gelu) {
      const Vec<T> cumulative = T(0.5) * (T(1) + erf_of(s * T(0.70710678118654752440)));
      const Vec<T> density = T(0.39894228040143267794) * exp_of<T>(s * s * T(-0.5));
      return grad * (cumulative + s * density);
    }
    if constexpr (kind == ActivationKind::gelu_tanh) {
      const Vec<T> t = tanh_of<T>(gelu_inner<T>(s));
      const Vec<T> slope = T(0.79788456080286535588) * (T(1) + T(3 * 0.044715) * s * s);
      return grad * (T(0.5) * (T(1) + t) + T(0.5) * s * (T(1) - t * t) * slope);
    }
    if constexpr (kind == ActivationKind::silu) {
      const Vec<T> gate = sigmoid_of<T>(s);
      return grad * gate * (T(1) + s * (T(1) - gate));
    }
    if constexpr (kind == ActivationKind::leaky_relu) return s > Vec<T>{} ? grad : grad * first;
    if constexpr (kind == ActivationKind::elu) return s <= Vec<T>{} ? grad * first * exp_of<T>(s) : grad;
    if constexpr (kind == ActivationKind::hardswish) {
      const Vec<T> inner = s < broadcast<T>(3) ? grad * (s * T(1.0 / 3) + T(0.5)) : grad;
      return s <= broadcast<T>(-3) ? Vec<T>{} : inner;
    }
    if constexpr (kind == ActivationKind::softplus) {
      const Vec<T> scaled = first * s;
      return scaled > broadcast(second) ? grad : grad * sigmoid_of<T>(scaled);
    }
    if constexpr (kind == ActivationKind::hardtanh) {
      const Vec<T> above = s <= broadcast(first) ? Vec<T>{} : grad;
      return s >= broadcast(second) ? Vec<T>{} : above;
    }
    if constexpr (kind == ActivationKind::selu) {
      return grad * (s <= Vec<T>{} ? T(kSeluScale * kSeluAlpha) * exp_of<T>(s) : broadcast(T(kSeluScale)));
    }
    if constexpr (kind == ActivationKind::mish) {
      const Vec<T> gate = mish_gate<T>(s);
      return grad * (gate + s * sigmoid_of<T>(s) * (T(1) - gate * gate));
    }
    if constexpr (kind == ActivationKind::exp) return grad * s;
    if constexpr (kind == ActivationKind::sin) return grad * sin_of<T>(s, 1);
    if constexpr (kind == ActivationKind::cos) return -grad * sin_of<T>(s, 0);
    return grad;
  }
};

// The bounds of an activation that does no more than to keep numbers between them; infinities for the others.
template <class T>
FASTNN_INLINE Bounds<T> bounds_of(const Activation& activation) {
  if (activation.kind == ActivationKind::relu) return {T(0)};
  if (activation.kind != ActivationKind::hardtanh) return {};
  return {static_cast<T>(activation.parameters[0]), static_cast<T>(activation.parameters[1])};
}

// Calls body(function) with the run-time activation as an ActivationFunction.
template <class T, class Body>
FASTNN_INLINE void with_activation(const Activation& activation, const Body& body) {
  const T first = static_cast<T>(activation.parameters[0]), second = static_cast<T>(activation.parameters[1]);
  switch (activation.kind) {
#define FASTNN_CASE(name, ...) \
  case ActivationKind::name:   \
    return body(ActivationFunction<ActivationKind::name, T>{first, second});
    FASTNN_FOR_EACH_ACTIVATION(FASTNN_CASE)
#undef FASTNN_CASE
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
