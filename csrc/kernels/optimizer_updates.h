// How optimizers change a parameter, in the order of torch's own operations. Include only from update.cpp.
#pragma once

#include "../simd/vec.h"
#include "optimizers.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

template <class T>
FASTNN_INLINE T square_root(T x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
}

// The gradient plus weight decay. Without decay nothing is added, since 0 times an infinite parameter would be NaN.
template <class T>
FASTNN_INLINE T decayed(T gradient, T decay, T parameter) {
  return decay != 0 ? gradient + decay * parameter : gradient;
}

template <class T>
void sgd(const UpdateNumbers& n, int64_t count, const T* __restrict gradient, T* __restrict parameter,
         T* __restrict momentum) {
  const T lr = static_cast<T>(n.lr), decay = static_cast<T>(n.weight_decay), scale = static_cast<T>(n.scale);
  if (!momentum) {
    for (int64_t i = 0; i < count; ++i) parameter[i] -= lr * decayed(scale * gradient[i], decay, parameter[i]);
    return;
  }
  const T keep = n.is_first ? T(0) : static_cast<T>(n.momentum),
          add = n.is_first ? T(1) : static_cast<T>(1 - n.dampening);
  const T ahead = static_cast<T>(n.momentum);
  const bool nesterov = n.nesterov != 0;
  for (int64_t i = 0; i < count; ++i) {
    const T step = decayed(scale * gradient[i], decay, parameter[i]);
    const T kept = n.is_first ? step : keep * momentum[i] + add * step;
    momentum[i] = kept;
    parameter[i] -= lr * (nesterov ? step + ahead * kept : kept);
  }
}

template <class T, bool amsgrad>
FASTNN_INLINE void adam_loop(const UpdateNumbers& n, int64_t count, const T* __restrict gradient,
                             T* __restrict parameter, T* __restrict mean, T* __restrict square, T* __restrict largest) {
  const T scale = static_cast<T>(n.scale), eps = static_cast<T>(n.eps);
  const bool decoupled = n.decoupled_weight_decay != 0;
  const T shrink = decoupled ? static_cast<T>(1 - n.lr * n.weight_decay) : T(1);
  const T decay = decoupled ? T(0) : static_cast<T>(n.weight_decay);
  const T first = static_cast<T>(1 - n.beta1), second = static_cast<T>(n.beta2);
  const T second_add = static_cast<T>(1 - n.beta2);
  const T step = static_cast<T>(n.lr / n.first_correction);
  const T correction = static_cast<T>(1 / __builtin_sqrt(n.second_correction));
  for (int64_t i = 0; i < count; ++i) {
    const T weight = shrink * parameter[i];
    const T g = decayed(scale * gradient[i], decay, weight);
    const T m = mean[i] + first * (g - mean[i]);
    const T v = second * square[i] + second_add * g * g;
    mean[i] = m;
    square[i] = v;
    T under = v;
    if (amsgrad) {
      // NaN stays, as in torch.maximum.
      under = largest[i] > v || largest[i] != largest[i] ? largest[i] : v;
      largest[i] = under;
    }
    parameter[i] = weight - step * m / (square_root(under) * correction + eps);
  }
}

template <class T>
void adam(const UpdateNumbers& n, int64_t count, const T* gradient, T* parameter, T* mean, T* square, T* largest) {
  largest ? adam_loop<T, true>(n, count, gradient, parameter, mean, square, largest)
          : adam_loop<T, false>(n, count, gradient, parameter, mean, square, largest);
}

template <class T>
void rmsprop(const UpdateNumbers& n, int64_t count, const T* __restrict gradient, T* __restrict parameter,
             T* __restrict square, T* __restrict mean, T* __restrict momentum) {
  const T lr = static_cast<T>(n.lr), decay = static_cast<T>(n.weight_decay), scale = static_cast<T>(n.scale);
  const T alpha = static_cast<T>(n.alpha), add = static_cast<T>(1 - n.alpha), eps = static_cast<T>(n.eps);
  const T keep = static_cast<T>(n.momentum);
  for (int64_t i = 0; i < count; ++i) {
    const T g = decayed(scale * gradient[i], decay, parameter[i]);
    const T v = alpha * square[i] + add * g * g;
    square[i] = v;
    T under = v;
    if (mean) {
      mean[i] += add * (g - mean[i]);
      under = v - mean[i] * mean[i];
    }
    T step = g / (square_root(under) + eps);
    if (momentum) step = momentum[i] = keep * momentum[i] + step;
    parameter[i] -= lr * step;
  }
}

template <class T>
void adagrad(const UpdateNumbers& n, int64_t count, const T* __restrict gradient, T* __restrict parameter,
             T* __restrict sum) {
  const T decay = static_cast<T>(n.weight_decay), scale = static_cast<T>(n.scale), eps = static_cast<T>(n.eps);
  const T lr = static_cast<T>(n.lr / (1 + (n.step - 1) * n.lr_decay));
  for (int64_t i = 0; i < count; ++i) {
    const T g = decayed(scale * gradient[i], decay, parameter[i]);
    sum[i] += g * g;
    parameter[i] -= lr * (g / (square_root(sum[i]) + eps));
  }
}

template <class T>
void adamax(const UpdateNumbers& n, int64_t count, const T* __restrict gradient, T* __restrict parameter,
            T* __restrict mean, T* __restrict largest) {
  const T decay = static_cast<T>(n.weight_decay), scale = static_cast<T>(n.scale), eps = static_cast<T>(n.eps);
  const T first = static_cast<T>(1 - n.beta1), second = static_cast<T>(n.beta2);
  const T lr = static_cast<T>(n.lr / n.first_correction);
  for (int64_t i = 0; i < count; ++i) {
    const T g = decayed(scale * gradient[i], decay, parameter[i]);
    mean[i] += first * (g - mean[i]);
    const T before = second * largest[i], now = (g < 0 ? -g : g) + eps;
    largest[i] = before > now || before != before ? before : now;  // NaN stays, as in torch.maximum
    parameter[i] -= lr * (mean[i] / largest[i]);
  }
}

template <class T>
void nadam(const UpdateNumbers& n, int64_t count, const T* __restrict gradient, T* __restrict parameter,
           T* __restrict mean, T* __restrict square) {
  const bool decoupled = n.decoupled_weight_decay != 0 && n.weight_decay != 0;
  const T shrink = decoupled ? static_cast<T>(1 - n.lr * n.weight_decay) : T(1);
  const T decay = decoupled ? T(0) : static_cast<T>(n.weight_decay);
  const T scale = static_cast<T>(n.scale), eps = static_cast<T>(n.eps);
  const T first = static_cast<T>(1 - n.beta1), second = static_cast<T>(n.beta2);
  const T second_add = static_cast<T>(1 - n.beta2), correction = static_cast<T>(n.second_correction);
  const T of_gradient = static_cast<T>(n.lr * (1 - n.mu) / (1 - n.mu_product));
  const T of_mean = static_cast<T>(n.lr * n.next_mu / (1 - n.mu_product * n.next_mu));
  for (int64_t i = 0; i < count; ++i) {
    const T weight = shrink * parameter[i];
    const T g = decayed(scale * gradient[i], decay, weight);
    mean[i] += first * (g - mean[i]);
    square[i] = second * square[i] + second_add * g * g;
    const T under = square_root(square[i] / correction) + eps;
    parameter[i] = weight - of_gradient * (g / under) - of_mean * (mean[i] / under);
  }
}

// ---- of any kind ------------------------------------------------------------------------------------------------

// NAdam's momentum in a step.
double nadam_mu(const UpdateNumbers& n, double step) {
  return n.beta1 * (1 - 0.5 * __builtin_pow(0.96, step * n.momentum_decay));
}

// Fills in what all parameters of a group that are at the same step have in common.
void prepare(OptimizerKind kind, UpdateNumbers& n) {
  if (kind == OptimizerKind::adam || kind == OptimizerKind::adamax) {
    n.first_correction = 1 - __builtin_pow(n.beta1, n.step);
    n.second_correction = 1 - __builtin_pow(n.beta2, n.step);
  }
  if (kind == OptimizerKind::nadam) {
    n.second_correction = 1 - __builtin_pow(n.beta2, n.step);
    n.mu = nadam_mu(n, n.step);
    n.next_mu = nadam_mu(n, n.step + 1);
  }
}

template <class T>
void update(OptimizerKind kind, const UpdateNumbers& n, int64_t count, const T* gradient, T* parameter,
            T* const* states) {
  switch (kind) {
    case OptimizerKind::sgd:
      return sgd(n, count, gradient, parameter, states[0]);
    case OptimizerKind::adam:
      return adam(n, count, gradient, parameter, states[0], states[1], states[2]);
    case OptimizerKind::adagrad:
      return adagrad(n, count, gradient, parameter, states[0]);
    case OptimizerKind::adamax:
      return adamax(n, count, gradient, parameter, states[0], states[1]);
    case OptimizerKind::nadam:
      return nadam(n, count, gradient, parameter, states[0], states[1]);
    default:
      return rmsprop(n, count, gradient, parameter, states[0], states[1], states[2]);
  }
}

}  // namespace
}  // namespace FASTNN_ISA
}  // namespace fastnn
