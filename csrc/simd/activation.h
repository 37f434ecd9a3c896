// The activations and their derivatives on vectors. Include only from csrc/kernels.
#pragma once

#include <math.h>

#include "../kernels/mlp.h"
#include "math.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr double kLeakySlope = 0.01;  // torch.nn.LeakyReLU's default

FASTNN_INLINE float erf_of_one(float x) {
  return erff(x);
}
FASTNN_INLINE double erf_of_one(double x) {
  return erf(x);
}
template <class T>
FASTNN_INLINE Vec<T> erf_of(Vec<T> x) {
  T lanes[kLanes<T>];
  store(lanes, x);
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = erf_of_one(lanes[i]);
  return load(lanes);
}

// gelu_tanh(x) = x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3)
template <class T>
FASTNN_INLINE Vec<T> gelu_inner(Vec<T> x) {
  return T(0.79788456080286535588) * (x + T(0.044715) * x * x * x);
}

template <Activation activation, class T>
FASTNN_INLINE Vec<T> activate(Vec<T> x) {
  if constexpr (activation == Activation::relu) return relu(x);
  if constexpr (activation == Activation::tanh) return tanh_of<T>(x);
  if constexpr (activation == Activation::sigmoid) return sigmoid_of<T>(x);
  if constexpr (activation == Activation::gelu) {
    return T(0.5) * x * (T(1) + erf_of<T>(x * T(0.70710678118654752440)));
  }
  if constexpr (activation == Activation::gelu_tanh) {
    return T(0.5) * x * (T(1) + tanh_of<T>(gelu_inner<T>(x)));
  }
  if constexpr (activation == Activation::silu) return x / (T(1) + exp_of<T>(-x));
  if constexpr (activation == Activation::leaky_relu) return x < Vec<T>{} ? x * T(kLeakySlope) : x;
  return x;
}

// grad * derivative, from what backward keeps: the input where keeps_input, else the output.
template <Activation activation, class T>
FASTNN_INLINE Vec<T> activation_gradient(Vec<T> grad, Vec<T> saved) {
  const Vec<T> s = saved;
  if constexpr (activation == Activation::relu) return s <= Vec<T>{} ? Vec<T>{} : grad;
  if constexpr (activation == Activation::tanh) return grad * (T(1) - s * s);
  if constexpr (activation == Activation::sigmoid) return grad * s * (T(1) - s);
  if constexpr (activation == Activation::gelu) {
    const Vec<T> cumulative = T(0.5) * (T(1) + erf_of<T>(s * T(0.70710678118654752440)));
    const Vec<T> density = T(0.39894228040143267794) * exp_of<T>(s * s * T(-0.5));
    return grad * (cumulative + s * density);
  }
  if constexpr (activation == Activation::gelu_tanh) {
    const Vec<T> t = tanh_of<T>(gelu_inner<T>(s));
    const Vec<T> slope = T(0.79788456080286535588) * (T(1) + T(3 * 0.044715) * s * s);
    return grad * (T(0.5) * (T(1) + t) + T(0.5) * s * (T(1) - t * t) * slope);
  }
  if constexpr (activation == Activation::silu) {
    const Vec<T> gate = sigmoid_of<T>(s);
    return grad * gate * (T(1) + s * (T(1) - gate));
  }
  if constexpr (activation == Activation::leaky_relu) return s > Vec<T>{} ? grad : grad * T(kLeakySlope);
  return grad;
}

template <Activation value>
struct ActivationConstant {
  static constexpr Activation activation = value;
};

// Calls body(ActivationConstant<a>{}) for the run-time activation.
template <class Body>
FASTNN_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::relu:
      return body(ActivationConstant<Activation::relu>{});
    case Activation::tanh:
      return body(ActivationConstant<Activation::tanh>{});
    case Activation::sigmoid:
      return body(ActivationConstant<Activation::sigmoid>{});
    case Activation::gelu:
      return body(ActivationConstant<Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(ActivationConstant<Activation::gelu_tanh>{});
    case Activation::silu:
      return body(ActivationConstant<Activation::silu>{});
    case Activation::leaky_relu:
      return body(ActivationConstant<Activation::leaky_relu>{});
    default:
      return body(ActivationConstant<Activation::identity>{});
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
