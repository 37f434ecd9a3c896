// The elementwise parts of a training step: losses, computed as in torch.nn.functional, and how optimizers change a
// parameter, as in torch.optim.
#pragma once

#include <stdint.h>

#include "../simd/dtype.h"
#include "../simd/isa.h"
#include "optimizers.h"

namespace fastnn {

// of_program: the program computes the loss itself, as its output.
enum class LossKind : int64_t { mse, l1, smooth_l1, huber, bce_with_logits, cross_entropy, of_program, count };

// One entry per kind but the last, in their order: the loss's name in torch.nn.functional, and the names of its number
// and weights.
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
static_assert(sizeof(kLosses) / sizeof(LossEntry) == static_cast<uint64_t>(LossKind::of_program));

template <class T>
struct UpdateKernels {
  // Returns the sum of a loss over `count` elements, and writes its gradient times `scale`. The loss is any kind before
  // cross_entropy. number: beta of smooth_l1, delta of huber. weights: for bce_with_logits, the weights of the positive
  // elements, one for each of the `columns` elements of a row; or null.
  double (*loss)(LossKind kind, double number, double scale, int64_t count, const T* output, const T* target,
                 const T* weights, int64_t columns, T* gradient);
  // Fills in what all parameters of a group that are at the same step have in common.
  void (*prepare)(OptimizerKind kind, UpdateNumbers& numbers);
  // Updates `count` elements of a parameter. states: a pointer for each state of the entry, null where it is not kept.
  void (*update)(OptimizerKind kind, const UpdateNumbers& numbers, int64_t count, const T* gradient, T* parameter,
                 T* const* states);
  double (*sum_of_squares)(int64_t count, const T* gradient);
};

using UpdateTable = PerWideDtype<UpdateKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(UpdateTable, update_kernels)
