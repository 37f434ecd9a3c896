// Torch's own layers, called through its dispatcher.
#pragma once

#include <array>

#include "operators.h"

namespace fastnn {

// As torch.convolution has them, a value a dimension.
struct StockConvolution {
  Ints stride, padding, dilation;
  int64_t groups;
};

inline StableIValue give_optional(const OptionalTensor& tensor) {
  std::optional<AtenTensorHandle> handle;
  if (tensor) handle = Tensor(*tensor).release();
  return torch::stable::detail::from(handle);
}

inline Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                          const StockConvolution& c) {
  std::array<StableIValue, 9> stack{
      give(input),     give(weight),     give_optional(bias), give(c.stride),
      give(c.padding), give(c.dilation), give(false),         give(Ints(c.stride.size(), 0)),
      give(c.groups)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return Argument<Tensor>::take(stack[0]);
}

// The gradients of input, weight and bias; those that are not wanted are undefined.
inline std::array<Tensor, 3> convolution_backward(const Tensor& gradient, const Tensor& input, const Tensor& weight,
                                                  const StockConvolution& c, const std::array<bool, 3>& wanted) {
  const std::optional<Ints> bias_sizes{Ints{weight.size(0)}};
  std::array<StableIValue, 11> stack{give(gradient),
                                     give(input),
                                     give(weight),
                                     give(bias_sizes),
                                     give(c.stride),
                                     give(c.padding),
                                     give(c.dilation),
                                     give(false),
                                     give(Ints(c.stride.size(), 0)),
                                     give(c.groups),
                                     give(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), 3))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  return {Argument<Tensor>::take(stack[0]), Argument<Tensor>::take(stack[1]), Argument<Tensor>::take(stack[2])};
}

// relu_(tensor)
inline void rectify(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{give(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::relu_", "", stack.data(), TORCH_ABI_VERSION));
  Argument<Tensor>::take(stack[0]);
}

// Mean and variance (over the number of elements) of each channel.
inline std::array<Tensor, 2> channel_statistics(const Tensor& input) {
  const OptionalTensor none;
  std::array<StableIValue, 4> stack{give(input), give_optional(none), give_optional(none), give(0.0)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::batch_norm_update_stats", "", stack.data(), TORCH_ABI_VERSION));
  return {Argument<Tensor>::take(stack[0]), Argument<Tensor>::take(stack[1])};
}

// The gradients of input, weight and bias of a batch norm in training. inverse_deviation: 1 / sqrt(variance + eps)
inline std::array<Tensor, 3> batch_norm_backward(const Tensor& gradient, const Tensor& input,
                                                 const OptionalTensor& weight, const Tensor& mean,
                                                 const Tensor& inverse_deviation, double eps,
                                                 const std::array<bool, 3>& wanted) {
  const OptionalTensor none;
  std::array<StableIValue, 10> stack{give(gradient),
                                     give(input),
                                     give_optional(weight),
                                     give_optional(none),
                                     give_optional(none),
                                     give_optional(OptionalTensor(mean.borrow())),
                                     give_optional(OptionalTensor(inverse_deviation.borrow())),
                                     give(true),
                                     give(eps),
                                     give(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), 3))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::native_batch_norm_backward", "", stack.data(), TORCH_ABI_VERSION));
  return {Argument<Tensor>::take(stack[0]), Argument<Tensor>::take(stack[1]), Argument<Tensor>::take(stack[2])};
}

// Fills the tensor with ones, of this probability, and zeros, by torch's generator.
inline void draw_ones(const Tensor& tensor, double probability) {
  const std::optional<AtenTensorHandle> generator;
  std::array<StableIValue, 3> stack{give(tensor), give(probability), give(generator)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bernoulli_", "float", stack.data(), TORCH_ABI_VERSION));
  Argument<Tensor>::take(stack[0]);
}

}  // namespace fastnn
