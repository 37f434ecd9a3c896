// Backward through PyTorch's own convolution, for the shapes at which it beats the kernels.
#pragma once

#include <tuple>

#include "conv_problem.h"

namespace fastnn {

struct Wanted {
  bool input, weight, bias;
};

// The gradients of input, weight and bias; those not wanted come back empty.
std::tuple<Tensor, Tensor, Tensor> backward_by_library(const ConvPoolProblem& problem, const Tensor& grad_output,
                                                       const Tensor& winners, const Tensor& input, const Tensor& weight,
                                                       Wanted wanted);

}  // namespace fastnn
