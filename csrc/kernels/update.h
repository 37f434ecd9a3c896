// The elementwise ends of a training step: losses, as torch.nn.functional has them, and how optimizers move a
// parameter, as torch.optim has it.
#pragma once

#include <stdint.h>

#include "../simd/isa.h"
#include "../simd/dtype.h"

namespace fastnn {

enum class LossKind : int64_t { mse, l1, smooth_l1, huber, bce_with_logits, cross_entropy, count };

// Of one parameter: its group's numbers, and what they come to at this step.
struct UpdateNumbers {
  double lr, weight_decay;
  double scale;                // of the gradient: -1 to maximize, and what clipping makes of it
  double momentum, dampening;  // SGD, RMSprop
  double first_beta, second_beta, eps;
  double first_correction, second_correction;  // Adam: 1 - beta^step
  bool nesterov;                               // SGD
  bool decoupled;                              // AdamW: weight decay beside the gradient
  bool is_first;                               // SGD: momentum begins with the gradient itself
};

template <class T>
struct UpdateKernels {
  // The sum of a loss over `count` elements, and its gradient times `scale`; any kind but cross_entropy. number: beta
  // of smooth_l1, delta of huber. weights: of bce_with_logits' positive elements, one of the `columns` elements of a
  // row, or null.
  double (*loss)(LossKind kind, double number, double scale, int64_t count, const T* output, const T* target,
                 const T* weights, int64_t columns, T* gradient);
  // All of `count` elements. A state that the optimizer was not asked to keep is null.
  void (*sgd)(const UpdateNumbers&, int64_t count, const T* gradient, T* parameter, T* momentum);
  void (*adam)(const UpdateNumbers&, int64_t count, const T* gradient, T* parameter, T* mean, T* square, T* largest);
  void (*rmsprop)(const UpdateNumbers&, int64_t count, const T* gradient, T* parameter, T* square, T* mean,
                  T* momentum);
  double (*sum_of_squares)(int64_t count, const T* gradient);
};

using UpdateTable = PerWideDtype<UpdateKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(UpdateTable, update_kernels)
