// A max-pool of contiguous images that no convolution comes before, in training: forward, which saves the argmax of
// each window, and backward.
#pragma once

#include <stdint.h>

#include "../simd/dtype.h"
#include "../simd/isa.h"

namespace fastnn {

// The sizes of a pool of planes: rows and columns. Each window has a pixel that is no padding.
struct MaxPoolSizes {
  int64_t input[2], output[2], kernel[2], stride[2], padding[2];

  static constexpr int64_t kMostPlaces = 256;  // of a window, since its argmax is saved in a byte
};

template <class T>
struct MaxPoolKernels {
  // How many elements of scratch forward needs.
  int64_t (*scratch)(const MaxPoolSizes& sizes);
  // Pools a plane. winners: of each window, the number of the position that holds the largest pixel: the first of equal
  // ones, and the last NaN if there is one.
  void (*forward)(const MaxPoolSizes& sizes, const T* from, T* scratch, T* to, uint8_t* winners);
  // Adds the gradients of a plane's windows to the pixels that won them. grad_input: zeros.
  void (*backward)(const MaxPoolSizes& sizes, const T* grad_output, const uint8_t* winners, T* grad_input);
};

using MaxPoolTable = PerWideDtype<MaxPoolKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(MaxPoolTable, max_pool_kernels)
