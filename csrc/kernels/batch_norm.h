// Batch norm of contiguous images in training: the sums over a channel's pixels, and its gradient. torch adds up one
// pixel after another.
#pragma once

#include <stdint.h>

#include "../simd/activation.h"
#include "../simd/dtype.h"
#include "../simd/isa.h"

namespace fastnn {

// All work on `count` elements that lie side by side, such as one channel of one image. Sums over several images are
// made by one call for each. An activation is the identity, or one that only bounds (only_bounds). `gradient` is
// the gradient of the activation's output; `output` is what `normalize` gave, and is not read for the identity.
template <class T>
struct BatchNormKernels {
  // Adds to sums[0] the sum of x - center, and to sums[1] the sum of its squares.
  void (*add_moments)(const T* x, int64_t count, T center, double* sums);
  // Let g be the gradient of the activation's input. Adds to sums[0] the sum of g, and to sums[1] that of
  // g * (x - center).
  void (*add_products)(const T* gradient, const T* output, const Activation& activation, const T* x, int64_t count,
                       T center, double* sums);
  // to = activation((x - center) * b + c + addend). addend may be null.
  void (*normalize)(const T* x, const T* addend, int64_t count, T center, T b, T c, const Activation& activation,
                    T* to);
  // to = g * a + (x - center) * b + c, with g as in add_products
  void (*combine)(const T* gradient, const T* output, const Activation& activation, const T* x, int64_t count, T center,
                  T a, T b, T c, T* to);
};

using BatchNormTable = PerWideDtype<BatchNormKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(BatchNormTable, batch_norm_kernels)
