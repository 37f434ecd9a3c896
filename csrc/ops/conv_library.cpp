#include "conv_library.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace fastnn {
namespace {

// Gradients are not recorded while it lives.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

// The gradient of the convolution's output: that of each pooled pixel at its winner, zero elsewhere.
Tensor scatter_gradient(const ConvPoolProblem& problem, const Tensor& grad_output, const Tensor& winners,
                        bool channels_last) {
  const ConvPoolGeometry& g = problem.geometry;
  Ints sizes{g.batch, g.groups * g.out_channels};
  for (int64_t d = 3 - problem.dims; d < 3; ++d) sizes.push_back(g.conv[d]);
  const Tensor grad_conv = new_formatted(sizes, problem.kind.dtype, channels_last);
  with_dtype(problem.kind.dtype, [&](auto type) {
    using T = decltype(type);
    ConvPoolBackward<T> call = {};
    call.geometry = g;
    call.grad_output = data<T>(grad_output);
    call.output_layout = layout_of(grad_output);
    call.winners = data<uint8_t>(winners);
    call.winners_layout = layout_of(winners);
    const int64_t threads = std::min(useful_threads(10.0 * grad_conv.numel()), g.batch);
    parallel_chunks(threads, g.batch, [&](int64_t, int64_t first, int64_t last) {
      conv_relu_max_pool_kernels().get<T>().scatter(call, first, last, mutable_data<T>(grad_conv),
                                                    layout_of(grad_conv));
    });
  });
  return grad_conv;
}

// In the memory format that the operator promises.
Tensor as_promised(AtenTensorHandle handle, bool wanted, const Tensor& like) {
  Tensor gradient(handle);
  Ints sizes = sizes_of(like);
  if (!wanted) sizes[0] = 0;
  const bool channels_last = is_channels_last(like);
  if (wanted && (channels_last ? is_channels_last(gradient) : gradient.is_contiguous())) return gradient;
  Tensor result = new_formatted(sizes, like.scalar_type(), channels_last);
  if (wanted) {
    torch::stable::Tensor target = result.share();
    torch::stable::copy_(target, gradient.share());
  }
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> backward_by_library(const ConvPoolProblem& problem, const Tensor& grad_output,
                                                       const Tensor& winners, const Tensor& input, const Tensor& weight,
                                                       Wanted wanted) {
  const NoGrad guard;
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);
  const Tensor grad_conv = scatter_gradient(problem, grad_output, winners, channels_last);
  const ConvPoolGeometry& g = problem.geometry;
  const int64_t dims = problem.dims, unused = 3 - dims, channels = weight.size(0);
  const int64_t* bias_sizes = &channels;
  const Ints no_padding(dims, 0);
  const int32_t mask[3] = {wanted.input, wanted.weight, wanted.bias};
  AtenTensorHandle input_gradient, weight_gradient, bias_gradient;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
      grad_conv.get(), input.get(), weight.get(), &bias_sizes, 1, g.stride + unused, dims, g.padding + unused, dims,
      g.dilation + unused, dims, false, no_padding.data(), dims, g.groups, mask, 3, &input_gradient, &weight_gradient,
      &bias_gradient));
  const Tensor bias(bias_gradient);
  return {as_promised(input_gradient, wanted.input, input), as_promised(weight_gradient, wanted.weight, weight),
          wanted.bias ? bias : new_tensor({0}, problem.kind.dtype)};
}

}  // namespace fastnn
