// The elementwise ends of a training step: losses, as torch.nn.functional has them, and how optimizers move a
// parameter, as torch.optim has it.
#pragma once

#include <stdint.h>

#include "../simd/dtype.h"
#include "../simd/isa.h"
#include "optimizers.h"

namespace fastnn {

enum class LossKind : int64_t { mse, l1, smooth_l1, huber, bce_with_logits, cross_entropy, count };

// Of each kind, in their order: torch.nn.functional's name, and those of its number and of its tensor of weights.
struct LossEntry {
  const char* name;
  const char* number;  // or null
  double value;        // torch's default
  const char* weight;  // or null
};
constexpr LossEntry kLosses[] = {
    {"mse_loss", nullptr, 0, nullptr},
    {"l1_loss", nullptr, 0, nullptr},
    {"smooth_l1_loss", "beta", 1, nullptr},
    {"huber_loss", "delta", 1, nullptr},
    {"binary_cross_entropy_with_logits", nullptr, 0, "pos_weight"},
    {"cross_entropy", "label_smoothing", 0, "weight"},
};

template <class T>
struct UpdateKernels {
  // The sum of a loss over `count` elements, and its gradient times `scale`; any kind but cross_entropy. number: beta
  // of smooth_l1, delta of huber. weights: of bce_with_logits' positive elements, one of the `columns` elements of a
  // row, or null.
  double (*loss)(LossKind kind, double number, double scale, int64_t count, const T* output, const T* target,
                 const T* weights, int64_t columns, T* gradient);
  // Fills in what all parameters of a group that are at the same step have in common.
  void (*prepare)(OptimizerKind kind, UpdateNumbers& numbers);
  // Moves `count` elements of a parameter. states: one a row of the table, null where it is not kept.
  void (*update)(OptimizerKind kind, const UpdateNumbers& numbers, int64_t count, const T* gradient, T* parameter,
                 T* const* states);
  double (*sum_of_squares)(int64_t count, const T* gradient);
};

using UpdateTable = PerWideDtype<UpdateKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(UpdateTable, update_kernels)
