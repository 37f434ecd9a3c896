// Torch's own layers, called through its dispatcher.
#pragma once

#include <array>

#include "operators.h"

namespace fastnn {

// As torch.convolution has them, a value a dimension.
struct StockConvolution {
  Ints stride, padding, dilation;
  int64_t groups;
  bool transposed = false;
  Ints output_padding = {};  // of a transposed one

  Ints output_padding_of_each() const { return transposed ? output_padding : Ints(stride.size(), 0); }
};

inline StableIValue give(const OptionalTensor& tensor) {
  std::optional<AtenTensorHandle> handle;
  if (tensor) handle = Tensor(*tensor).release();
  return torch::stable::detail::from(handle);
}
inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.borrow();
}

// The first `count` results of one of torch's operators, all of which are tensors.
template <size_t count, class... Arguments>
std::array<Tensor, count> stock_results(const char* name, const char* overload, Arguments&&... arguments) {
  constexpr size_t given = sizeof...(Arguments);
  std::array<StableIValue, (given > count ? given : count)> stack{give(std::forward<Arguments>(arguments))...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, count> results;
  for (size_t i = 0; i < count; ++i) results[i] = Argument<Tensor>::take(stack[i]);
  return results;
}
template <class... Arguments>
Tensor stock(const char* name, const char* overload, Arguments&&... arguments) {
  return std::move(stock_results<1>(name, overload, std::forward<Arguments>(arguments)...)[0]);
}
template <size_t count>
torch::headeronly::HeaderOnlyArrayRef<bool> flags(const std::array<bool, count>& wanted) {
  return torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), count);
}

inline Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                          const StockConvolution& c) {
  return stock("aten::convolution", "", input, weight, bias, c.stride, c.padding, c.dilation, c.transposed,
               c.output_padding_of_each(), c.groups);
}

// The gradients of input, weight and bias; those that are not wanted are undefined.
inline std::array<Tensor, 3> convolution_backward(const Tensor& gradient, const Tensor& input, const Tensor& weight,
                                                  const StockConvolution& c, const std::array<bool, 3>& wanted) {
  const std::optional<Ints> bias_sizes{Ints{c.transposed ? weight.size(1) * c.groups : weight.size(0)}};
  return stock_results<3>("aten::convolution_backward", "", gradient, input, weight, bias_sizes, c.stride, c.padding,
                          c.dilation, c.transposed, c.output_padding_of_each(), c.groups, flags(wanted));
}

// relu_(tensor)
inline void rectify(const Tensor& tensor) {
  stock("aten::relu_", "", tensor);
}

// A copy of a tensor. It has the same strides if the tensor has no gaps.
inline Tensor copied(const Tensor& tensor) {
  return stock("aten::clone", "", tensor, std::optional<int32_t>());
}

// Makes a tensor ordinary. libtorch does this for an operator's tensors and lists of tensors, but not for lists of
// optional tensors: a view may have its sign turned lazily, as torch.func and complex numbers make them, and a gradient
// that is zero everywhere, as that of torch.sgn, may have no memory at all.
inline Tensor resolved(const Tensor& tensor, const char* op, const char* name) {
  check_memory(tensor, op, name);
  if (tensor.numel() > 0 && !tensor.const_data_ptr()) {
    return stock("aten::zero_", "", new_tensor(sizes_of(tensor), tensor.scalar_type()));
  }
  return stock("aten::resolve_neg", "", tensor);
}

inline Tensor reshaped(const Tensor& tensor, const Ints& sizes) {
  return stock("aten::reshape", "", tensor, sizes);
}

// The sum over these dimensions, each of which keeps one element.
inline Tensor sum_over(const Tensor& tensor, const Ints& dims) {
  return stock("aten::sum", "dim_IntList", tensor, std::optional<Ints>(dims), true, std::optional<ScalarType>());
}

// Mean and variance (over the number of elements) of each channel.
inline std::array<Tensor, 2> channel_statistics(const Tensor& input) {
  return stock_results<2>("aten::batch_norm_update_stats", "", input, OptionalTensor(), OptionalTensor(), 0.0);
}

// (input - mean) / sqrt(variance + eps) * weight + bias, of each channel.
inline Tensor normalized(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& mean, const Tensor& variance, double eps) {
  // (The other results are statistics that it did not take.)
  return std::move(stock_results<3>("aten::native_batch_norm", "", input, weight, bias, optional(mean),
                                    optional(variance), false, 0.0, eps)[0]);
}

// The statistics of a batch norm: in training the batch's mean and 1 / sqrt(variance + eps), in eval mode the running
// mean and variance.
struct NormStatistics {
  OptionalTensor mean, inverse_deviation, running_mean, running_variance;
};

// The gradients of input, weight and bias of a batch norm.
inline std::array<Tensor, 3> batch_norm_backward(const Tensor& gradient, const Tensor& input,
                                                 const OptionalTensor& weight, const NormStatistics& statistics,
                                                 double eps, const std::array<bool, 3>& wanted) {
  return stock_results<3>("aten::native_batch_norm_backward", "", gradient, input, weight, statistics.running_mean,
                          statistics.running_variance, statistics.mean, statistics.inverse_deviation,
                          statistics.mean.has_value(), eps, flags(wanted));
}

// The adaptive average pool of images of two or three dimensions, and its gradient.
inline Tensor adaptive_average(const Tensor& input, const Ints& parts) {
  return stock(parts.size() == 3 ? "aten::_adaptive_avg_pool3d" : "aten::_adaptive_avg_pool2d", "", input, parts);
}
inline Tensor adaptive_average_backward(const Tensor& gradient, const Tensor& input) {
  const char* const name =
      input.dim() == 5 ? "aten::_adaptive_avg_pool3d_backward" : "aten::_adaptive_avg_pool2d_backward";
  return stock(name, "", gradient, input);
}

// Fills the tensor with ones, of this probability, and zeros, by torch's generator.
inline void draw_ones(const Tensor& tensor, double probability) {
  stock("aten::bernoulli_", "float", tensor, probability, std::optional<AtenTensorHandle>());
}

}  // namespace fastnn
