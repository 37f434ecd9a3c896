// Backward by torch's own convolution, from the gradient of the convolution's output. It multiplies all pixels of that
// gradient, which can cost less than our products for the argmaxes alone. It needs memory for that gradient and, unless
// nothing is pooled, for the input in channels last if the input is not.
#pragma once

#include "conv_backward.h"
#include "conv_stock.h"

namespace fastnn {

// [items][rows][columns] -> [items][columns][rows]
template <class T>
void turn_each(const ConvBackwardKernels<T>& kernels, const T* from, int64_t items, int64_t rows, int64_t columns,
               T* to) {
  const int64_t size = rows * columns;
  parallel_chunks(std::min(useful_threads(10.0 * items * size), items), items,
                  [&](int64_t, int64_t first, int64_t last) {
                    for (int64_t i = first; i < last; ++i) kernels.turn(from + i * size, rows, columns, to + i * size);
                  });
}

// The tensor with its channels last, or contiguous.
template <class T>
Tensor in_format(const ConvBackwardKernels<T>& kernels, const Tensor& tensor, bool channels_last) {
  if (channels_last ? is_channels_last(tensor) : tensor.is_contiguous()) return tensor;
  if (tensor.numel() == 0) return new_formatted(sizes_of(tensor), tensor.scalar_type(), channels_last);
  const int64_t items = tensor.size(0), channels = tensor.size(1), pixels = tensor.numel() / (items * channels);
  // Whether it is dense in channels last, as torch's convolution makes its gradients.
  const bool is_last = !channels_last && is_channels_last(tensor) && tensor.stride(0) == channels * pixels;
  if (!channels_last && !is_last) return dense(Tensor(tensor));
  const Tensor source = is_last ? tensor : dense(Tensor(tensor));
  Tensor result = new_formatted(sizes_of(tensor), tensor.scalar_type(), channels_last);
  turn_each(kernels, data<T>(source), items, channels_last ? channels : pixels, channels_last ? pixels : channels,
            mutable_data<T>(result));
  return result;
}

// The same tensor, but its dimensions of one element have the strides that they would have in a new tensor.
inline Tensor with_strides(Tensor tensor, bool channels_last) {
  const Ints sizes = sizes_of(tensor), strides = format_strides(sizes, channels_last);
  const Sizes own = tensor.strides();
  if (std::equal(own.begin(), own.end(), strides.begin())) return tensor;
  const std::optional<int64_t> offset;
  std::array<StableIValue, 4> stack{give(tensor), give(sizes), give(strides), give(offset)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::as_strided", "", stack.data(), TORCH_ABI_VERSION));
  return Argument<Tensor>::take(stack[0]);
}

// Returns the gradient of the convolution's output in channels last, and fills grad_bias unless that is empty.
template <class T>
Tensor spread_gradient(const ConvBackwardKernels<T>& kernels, const ConvPoolProblem& problem,
                       const ConvBackward<T>& call, const Tensor& grad_bias) {
  const ConvPoolGeometry& g = problem.geometry;
  const int64_t channels = g.groups * g.out_channels, pixels = g.conv[0] * g.conv[1] * g.conv[2];
  Ints sizes = {g.batch, channels};
  for (int64_t d = 3 - problem.dims; d < 3; ++d) sizes.push_back(g.conv[d]);
  Tensor grad_conv = new_formatted(sizes, problem.kind.dtype, true);
  const int64_t threads = std::min(useful_threads(10.0 * g.batch * pixels * channels), g.batch);
  const int64_t scratch_size = whole_lines(kernels.scratch_size(call));
  const Scratch<char> scratch(checked_product(threads, scratch_size));
  const Scratch<double> bias_parts(checked_product(threads, channels));
  std::fill(bias_parts.get(), bias_parts.get() + threads * channels, 0.0);
  parallel_chunks(threads, g.batch, [&](int64_t chunk, int64_t first, int64_t last) {
    kernels.spread(call, first, last, mutable_data<T>(grad_conv), bias_parts.get() + chunk * channels,
                   scratch.get() + chunk * scratch_size);
  });
  if (grad_bias.numel() > 0) store_bias_gradient(kernels, bias_parts.get(), threads, grad_bias);
  return grad_conv;
}

// The same gradient where all tensors are contiguous and nothing is pooled.
template <class T>
Tensor masked_gradient(const ConvBackwardKernels<T>& kernels, const Tensor& grad_output, const Tensor& winners) {
  Tensor grad_conv = new_tensor(sizes_of(grad_output), grad_output.scalar_type());
  const int64_t count = grad_output.numel();
  parallel_chunks(std::min(useful_threads(2.0 * count), std::max<int64_t>(count, 1)), count,
                  [&](int64_t, int64_t first, int64_t last) {
                    kernels.mask_dead(data<T>(grad_output) + first, data<uint8_t>(winners) + first, last - first,
                                      mutable_data<T>(grad_conv) + first);
                  });
  return grad_conv;
}

// The gradients of input and weight, and the gradient of the bias where it is wanted.
template <class T>
ConvGradients gradients_by_stock(const ConvBackwardKernels<T>& kernels, const ConvPoolProblem& problem,
                                 const ConvBackward<T>& call, const Tensor& grad_output, const Tensor& winners,
                                 const Tensor& input, const Tensor& weight, bool bias_wanted) {
  const ConvPoolGeometry& g = problem.geometry;
  const ScalarType dtype = problem.kind.dtype;
  ConvGradients result;
  const bool as_they_lie =
      g.pools_nothing() && grad_output.is_contiguous() && winners.is_contiguous() && input.is_contiguous();
  const bool their_bias = as_they_lie && bias_wanted;
  if (!their_bias) result.bias = new_tensor({bias_wanted ? weight.size(0) : 0}, dtype);
  const Tensor grad_conv = as_they_lie ? masked_gradient(kernels, grad_output, winners)
                                       : spread_gradient(kernels, problem, call, result.bias);
  // Torch would convert the formats itself, one element at a time.
  const Tensor given_input = in_format(kernels, input, !as_they_lie);
  const Tensor given_weight = in_format(kernels, weight, !as_they_lie);
  auto [grad_input, grad_weight, grad_bias] = convolution_backward(
      grad_conv, given_input, given_weight, stock_convolution(g, problem.dims), {true, true, their_bias});
  if (their_bias) result.bias = std::move(grad_bias);
  const bool input_last = is_channels_last(input), weight_last = is_channels_last(weight);
  result.input = with_strides(in_format(kernels, grad_input, input_last), input_last);
  result.weight = with_strides(in_format(kernels, grad_weight, weight_last), weight_last);
  return result;
}

}  // namespace fastnn
