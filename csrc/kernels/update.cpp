// Losses, and the updates of torch.optim's SGD, Adam, AdamW and RMSprop, in the order of torch's own operations.
#include "update.h"

#include "../simd/vec.h"

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

// One element's loss; its slope.
template <LossKind kind, class T>
FASTNN_INLINE T loss_of_difference(T d, T limit, T* slope) {
  const T a = d < 0 ? -d : d, sign = d > 0 ? T(1) : d < 0 ? T(-1) : d;  // 0 at 0, NaN at NaN
  if constexpr (kind == LossKind::mse) {
    *slope = 2 * d;
    return d * d;
  } else if constexpr (kind == LossKind::l1) {
    *slope = d != d ? T(0) : sign;  // as torch's sign of NaN
    return a;
  } else if constexpr (kind == LossKind::smooth_l1) {
    *slope = a < limit ? d / limit : sign;
    return a < limit ? d * d / (2 * limit) : a - limit / 2;
  } else {
    *slope = a <= limit ? d : limit * sign;
    return a <= limit ? d * d / 2 : limit * (a - limit / 2);
  }
}

constexpr int64_t kBlock = 1024;  // elements of a sum in T, short enough to lose little
constexpr int64_t kSums = 16;     // side by side, so that a compiler may use vectors

template <LossKind kind, class T>
double sum_of_losses(T limit, T scale, int64_t count, const T* __restrict output, const T* __restrict target,
                     T* __restrict gradient) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = first + kBlock < count ? first + kBlock : count;
    T sums[kSums] = {};
    int64_t i = first;
    for (; i + kSums <= last; i += kSums) {
      for (int64_t j = 0; j < kSums; ++j) {
        T slope;
        sums[j] += loss_of_difference<kind>(output[i + j] - target[i + j], limit, &slope);
        gradient[i + j] = scale * slope;
      }
    }
    for (; i < last; ++i) {
      T slope;
      sums[0] += loss_of_difference<kind>(output[i] - target[i], limit, &slope);
      gradient[i] = scale * slope;
    }
    for (const T sum : sums) total += static_cast<double>(sum);
  }
  return total;
}

template <class T>
FASTNN_INLINE T exponential(T x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return __builtin_expf(x);
  } else {
    return __builtin_exp(x);
  }
}

template <class T>
double bce_with_logits(T scale, int64_t count, const T* output, const T* target, const T* weights, int64_t columns,
                       T* gradient) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T x = output[i], t = target[i], weight = weights ? weights[i % columns] : T(1);
    const T far = exponential(x < 0 ? x : -x);  // e^-|x|
    const T log_term = (x < 0 ? -x : T(0)) + static_cast<T>(__builtin_log1p(static_cast<double>(far)));
    total += static_cast<double>((1 - t) * x + (1 + (weight - 1) * t) * log_term);
    const T probability = x < 0 ? far / (1 + far) : 1 / (1 + far);
    gradient[i] = scale * ((1 - t) * probability - weight * t * (1 - probability));
  }
  return total;
}

template <class T>
double loss(LossKind kind, double number, double scale, int64_t count, const T* output, const T* target,
            const T* weights, int64_t columns, T* gradient) {
  const T limit = static_cast<T>(number), times = static_cast<T>(scale);
  switch (kind) {
    case LossKind::mse:
      return sum_of_losses<LossKind::mse>(limit, times, count, output, target, gradient);
    case LossKind::l1:
      return sum_of_losses<LossKind::l1>(limit, times, count, output, target, gradient);
    case LossKind::smooth_l1:
      return sum_of_losses<LossKind::smooth_l1>(limit, times, count, output, target, gradient);
    case LossKind::huber:
      return sum_of_losses<LossKind::huber>(limit, times, count, output, target, gradient);
    default:
      return bce_with_logits(times, count, output, target, weights, columns, gradient);
  }
}

// The gradient with weight decay in it; without, an infinite parameter adds nothing, where 0 times it is NaN.
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
  for (int64_t i = 0; i < count; ++i) {
    const T step = decayed(scale * gradient[i], decay, parameter[i]);
    const T kept = n.is_first ? step : keep * momentum[i] + add * step;
    momentum[i] = kept;
    parameter[i] -= lr * (n.nesterov ? step + ahead * kept : kept);
  }
}

template <class T, bool amsgrad>
FASTNN_INLINE void adam_loop(const UpdateNumbers& n, int64_t count, const T* __restrict gradient,
                             T* __restrict parameter, T* __restrict mean, T* __restrict square, T* __restrict largest) {
  const T scale = static_cast<T>(n.scale), eps = static_cast<T>(n.eps);
  const T shrink = n.decoupled ? static_cast<T>(1 - n.lr * n.weight_decay) : T(1);
  const T decay = n.decoupled ? T(0) : static_cast<T>(n.weight_decay);
  const T first = static_cast<T>(1 - n.first_beta), second = static_cast<T>(n.second_beta);
  const T second_add = static_cast<T>(1 - n.second_beta);
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
  const T alpha = static_cast<T>(n.second_beta), add = static_cast<T>(1 - n.second_beta), eps = static_cast<T>(n.eps);
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
double sum_of_squares(int64_t count, const T* gradient) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = first + kBlock < count ? first + kBlock : count;
    T sums[kSums] = {};
    int64_t i = first;
    for (; i + kSums <= last; i += kSums) {
      for (int64_t j = 0; j < kSums; ++j) sums[j] += gradient[i + j] * gradient[i + j];
    }
    for (; i < last; ++i) sums[0] += gradient[i] * gradient[i];
    for (const T sum : sums) total += static_cast<double>(sum);
  }
  return total;
}

template <class T>
constexpr UpdateKernels<T> kernels() {
  return {loss<T>, sgd<T>, adam<T>, rmsprop<T>, sum_of_squares<T>};
}

}  // namespace

extern const UpdateTable update_kernels = {kernels<float>(), kernels<double>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
