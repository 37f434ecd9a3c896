// The activations and their derivatives on vectors. Include only from csrc/kernels.
#pragma once

#include <math.h>

#include "../kernels/mlp.h"
#include "math.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr double kLeakySlope = 0.01;  // torch.nn.LeakyReLU's default

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

template <Activation activation, class T>
FASTNN_INLINE Vec<T> activate(Vec<T> x) {
  if constexpr (activation == Activation::relu) return relu(x);
  if constexpr (activation == Activation::tanh) return tanh_of<T>(x);
  if constexpr (activation == Activation::sigmoid) return sigmoid_of<T>(x);
  if constexpr (activation == Activation::gelu) {
    return T(0.5) * x * (T(1) + erf_of(x * T(0.70710678118654752440)));
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
    const Vec<T> cumulative = T(0.5) * (T(1) + erf_of(s * T(0.70710678118654752440)));
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
