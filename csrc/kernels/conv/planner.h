// What both planners, forward's and backward's, count with. Nothing here depends on an instruction set.
#pragma once

#include "machine.h"
#include "plan.h"

namespace fastnn {

namespace planner {

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t multiple) {
  return divide_up(a, multiple) * multiple;
}

// Products that kernels sum in one go (kLongestSum in kernels/gemm.h).
inline int64_t longest_sum(const Machine& machine) {
  return machine.vector_bytes > 16 ? 128 : 64;
}

}  // namespace planner
}  // namespace fastnn
