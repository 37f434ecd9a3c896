// Losses, and the updates of optimizers.
#include "update.h"

#include "optimizer_updates.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// Returns the loss of one element, and sets its slope.
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

constexpr int64_t kBlock = 1024;  // so few elements are summed in T that little precision is lost
constexpr int64_t kSums = 16;     // so many sums side by side let the compiler use vectors

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
  return {loss<T>, prepare, update<T>, sum_of_squares<T>};
}

}  // namespace

extern const UpdateTable update_kernels = {kernels<float>(), kernels<double>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
