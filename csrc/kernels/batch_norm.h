// Batch norm of contiguous images in training: the sums over a channel's pixels, and its gradient. torch adds up one
// pixel after another.
#pragma once

#include <stdint.h>

#include "../simd/dtype.h"
#include "../simd/isa.h"

namespace fastnn {

// All work on `count` elements that lie side by side, such as one channel of one image. Sums over several images are
// made by one call for each.
template <class T>
struct BatchNormKernels {
  // Adds to sums[0] the sum of x - center, and to sums[1] the sum of its squares.
  void (*add_moments)(const T* x, int64_t count, T center, double* sums);
  // Adds to sums[0] the sum of the gradient, and to sums[1] that of gradient * (x - center). output: null, or what
  // `normalize` gave; then the gradient of each element that is not between the bounds counts as zero.
  void (*add_products)(const T* gradient, const T* output, const T* x, int64_t count, T center, T least, T most,
                       double* sums);
  // to = (x - center) * b + c + addend, kept between two bounds. addend may be null. A bound that is NaN is none.
  void (*normalize)(const T* x, const T* addend, int64_t count, T center, T b, T c, T least, T most, T* to);
  // to = gradient * a + (x - center) * b + c, with the gradient as in add_products
  void (*combine)(const T* gradient, const T* output, const T* x, int64_t count, T center, T a, T b, T c, T least,
                  T most, T* to);
};

using BatchNormTable = PerWideDtype<BatchNormKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(BatchNormTable, batch_norm_kernels)
