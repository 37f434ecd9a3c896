// Measures the most that the processor can do, with which the other kernels are compared.
#pragma once

#include <stdint.h>

#include "../simd/isa.h"

namespace fastnn {

struct ProbeKernels {
  // Does `rounds` rounds of independent float32 multiply-adds in registers; returns how many operations that was, a
  // multiply-add counted as two.
  double (*multiply_adds)(int64_t rounds);
  // Adds up data (count), `rounds` times.
  float (*add_up)(const float* data, int64_t count, int64_t rounds);
};

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(ProbeKernels, probe_kernels)
