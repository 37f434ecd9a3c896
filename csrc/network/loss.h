// Cross entropy and its gradient, as torch.nn.functional has them. (kernels/update.h has the elementwise losses.)
#pragma once

#include <cmath>
#include <limits>

#include "../kernels/update.h"
#include "../ops/tensor.h"

namespace fastnn {

// A loss with its settings.
struct Loss {
  LossKind kind;
  bool mean;             // a mean over the elements (cross_entropy: over the samples, by their weights); else a sum
  double number;         // smooth_l1: beta; huber: delta; cross_entropy: the label smoothing
  int64_t ignore_index;  // cross_entropy
};

// The cross entropy, and its gradient. output: scores [batch][classes][places]; target: [batch][places]. weights: of
// the classes, or null. Raises if the target has a class that does not exist.
template <class T>
double class_loss(const char* op, const Loss& loss, const T* output, const int64_t* target, int64_t batch,
                  int64_t classes, int64_t places, const T* weights, T* gradient) {
  const int64_t rows = batch * places;
  double total = 0, weight_sum = 0;
  double all_weights = 0;
  for (int64_t c = 0; c < classes; ++c) all_weights += weights ? static_cast<double>(weights[c]) : 1.0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t label = target[row];
    if (label == loss.ignore_index) continue;
    FASTNN_CHECK(label >= 0 && label < classes, op, ": Target ", label, " is out of bounds.");
    weight_sum += weights ? static_cast<double>(weights[label]) : 1.0;
  }
  const double divisor = loss.mean ? weight_sum : 1.0, smooth = loss.number;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row / places * classes * places + row % places;
    const auto x = [=](int64_t c) -> T { return output[at + c * places]; };
    const auto slope = [=](int64_t c) -> T& { return gradient[at + c * places]; };
    const int64_t label = target[row];
    // Another thread may have written to the label since the check, so its bounds are checked again.
    if (label == loss.ignore_index || label < 0 || label >= classes) {
      for (int64_t c = 0; c < classes; ++c) slope(c) = 0;
      continue;
    }
    T most = -std::numeric_limits<T>::infinity();
    for (int64_t c = 0; c < classes; ++c) most = x(c) > most || x(c) != x(c) ? x(c) : most;
    if (!std::isfinite(most)) most = most != most ? most : T(0);
    T sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += slope(c) = std::exp(x(c) - most);
    const T log_sum = std::log(sum);
    // The largest score is subtracted first. Otherwise a large number that all scores have in common would cost digits.
    const auto minus_log = [=](int64_t c) -> double { return static_cast<double>((most - x(c)) + log_sum); };
    const double weight = weights ? static_cast<double>(weights[label]) : 1.0;
    double smoothed = 0;
    if (smooth > 0) {
      for (int64_t c = 0; c < classes; ++c) {
        smoothed += (weights ? static_cast<double>(weights[c]) : 1.0) * minus_log(c);
      }
    }
    const double n = static_cast<double>(classes);
    total += (1 - smooth) * weight * minus_log(label) + smooth / n * smoothed;
    const T probabilities = static_cast<T>(((1 - smooth) * weight + smooth / n * all_weights) / divisor) / sum;
    for (int64_t c = 0; c < classes; ++c) {
      slope(c) *= probabilities;
      if (smooth > 0)
        slope(c) -= static_cast<T>(smooth / n * (weights ? static_cast<double>(weights[c]) : 1.0) / divisor);
    }
    slope(label) -= static_cast<T>((1 - smooth) * weight / divisor);
  }
  return total / divisor;
}

}  // namespace fastnn
