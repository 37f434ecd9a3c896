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

inline Tensor multiplied(const Tensor& one, const Tensor& other) {
  std::array<StableIValue, 2> stack{give(one), give(other)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return Argument<Tensor>::take(stack[0]);
}

// A copy, with the tensor's strides where it has no gaps.
inline Tensor copied(const Tensor& tensor) {
  const std::optional<int32_t> memory_format;
  std::array<StableIValue, 2> stack{give(tensor), give(memory_format)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::clone", "", stack.data(), TORCH_ABI_VERSION));
  return Argument<Tensor>::take(stack[0]);
}

// Mean and variance (over the number of elements) of each channel.
inline std::array<Tensor, 2> channel_statistics(const Tensor& input) {
  const OptionalTensor none;
  std::array<StableIValue, 4> stack{give(input), give_optional(none), give_optional(none), give(0.0)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::batch_norm_update_stats", "", stack.data(), TORCH_ABI_VERSION));
  return {Argument<Tensor>::take(stack[0]), Argument<Tensor>::take(stack[1])};
}

// (input - mean) / sqrt(variance + eps) * weight + bias, of each channel.
inline Tensor normalized(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& mean, const Tensor& variance, double eps) {
  std::array<StableIValue, 8> stack{give(input),
                                    give_optional(weight),
                                    give_optional(bias),
                                    give_optional(OptionalTensor(mean.borrow())),
                                    give_optional(OptionalTensor(variance.borrow())),
                                    give(false),
                                    give(0.0),
                                    give(eps)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::native_batch_norm", "", stack.data(), TORCH_ABI_VERSION));
  for (size_t i : {1, 2}) Argument<Tensor>::take(stack[i]);  // statistics that it did not take
  return Argument<Tensor>::take(stack[0]);
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

// The adaptive average pool of images of two or three dimensions, and its gradient.
inline Tensor adaptive_average(const Tensor& input, const Ints& parts) {
  const char* const name = parts.size() == 3 ? "aten::_adaptive_avg_pool3d" : "aten::_adaptive_avg_pool2d";
  std::array<StableIValue, 2> stack{give(input), give(parts)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return Argument<Tensor>::take(stack[0]);
}
inline Tensor adaptive_average_backward(const Tensor& gradient, const Tensor& input) {
  const char* const name =
      input.dim() == 5 ? "aten::_adaptive_avg_pool3d_backward" : "aten::_adaptive_avg_pool2d_backward";
  std::array<StableIValue, 2> stack{give(gradient), give(input)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return Argument<Tensor>::take(stack[0]);
}

// Fills the tensor with ones, of this probability, and zeros, by torch's generator.
inline void draw_ones(const Tensor& tensor, double probability) {
  const std::optional<AtenTensorHandle> generator;
  std::array<StableIValue, 3> stack{give(tensor), give(probability), give(generator)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bernoulli_", "float", stack.data(), TORCH_ABI_VERSION));
  Argument<Tensor>::take(stack[0]);
}

}  // namespace fastnn
