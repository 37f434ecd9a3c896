// A convolution in training that has no ReLU and no pool, for example because a batch norm follows: forward and
// backward.
#include "conv_forward.h"
#include "conv_winograd_backward.h"
#include "operators.h"

namespace fastnn {
namespace {

constexpr const char* kOp = "plain_convolution";

// Whether Winograd computes forward; else torch does. Without a ReLU or a pool, whose fusion saves a pass over the
// output, our other algorithms have in float32 0.5 to 1.2 of torch's speed (measured). In float64 Winograd is never
// chosen.
template <class T>
bool is_by_winograd(const ConvPoolProblem& problem, const Tensor& input, bool output_channels_last) {
  const PlanKey key =
      plan_key<T>(conv_kernels().get<T>(), problem.geometry, is_channels_last(input), output_channels_last, -1);
  return plan_for(key).algorithm == ForwardAlgorithm::winograd;
}

// The gradients by Winograd. Returns nothing where Winograd does not pay, or where elements are so large that its
// transforms could overflow.
template <class T>
std::optional<std::array<Tensor, 3>> backward_by_winograd(const ConvPoolProblem& problem, const Tensor& gradient,
                                                          const Tensor& input, const Tensor& weight,
                                                          const Wanted& wanted) {
  const ConvBackwardKernels<T>& kernels = conv_backward_kernels().get<T>();
  BackwardKey key = backward_key(kernels, problem, is_channels_last(input), wanted, -1);
  key.request.dense = true;
  const ConvBackwardPlan& plan = plan_for(key);
  if (problem.geometry.batch == 0 || plan.algorithm != BackwardAlgorithm::winograd) return std::nullopt;
  const PlainImages images(input), taps(weight), dense(gradient);
  ConvBackward<T> call = backward_call<T>(problem.geometry, dense.tensor, images, taps);
  call.output_layout = dense.layout;
  call.plan = &plan;
  if (!kernels.is_moderate(call) || !kernels.gradient_is_moderate(call)) return std::nullopt;
  ConvGradients gradients = empty_gradients(input, weight, wanted);
  gradients_by_winograd(kernels, call, problem.work, wanted, gradients);
  return std::array<Tensor, 3>{std::move(gradients.input), std::move(gradients.weight), std::move(gradients.bias)};
}

}  // namespace

Tensor plain_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Ints& geometry) {
  const ConvPoolProblem problem = check_problem(kOp, input, weight, bias, geometry);
  const bool channels_last = output_is_channels_last(problem, input, weight);
  return with_kernel_dtype(problem.kind.dtype, [&](auto type) {
    using T = decltype(type);
    if (problem.geometry.batch == 0 || !is_by_winograd<T>(problem, input, channels_last)) {
      return convolution(input, weight, bias, stock_convolution(problem.geometry, problem.dims));
    }
    Tensor output = new_formatted(output_sizes(problem), problem.kind.dtype, channels_last);
    run_conv_forward<T>(problem, kIdentity, input, weight, bias, output, nullptr, -1);
    return output;
  });
}

std::array<Tensor, 3> plain_convolution_backward(const Tensor& gradient, const Tensor& input, const Tensor& weight,
                                                 const Ints& geometry, const std::array<bool, 3>& wanted) {
  const TensorsInKeptMemory kept;
  const ConvPoolProblem problem = check_problem(kOp, input, weight, std::nullopt, geometry);
  return with_kernel_dtype(problem.kind.dtype, [&](auto type) {
    using T = decltype(type);
    std::optional<std::array<Tensor, 3>> ours =
        backward_by_winograd<T>(problem, gradient, input, weight, {wanted[0], wanted[1], wanted[2]});
    if (ours) return std::move(*ours);
    // Where the gradient or the weight has another format than the input, torch would convert it one element at a time.
    const ConvBackwardKernels<T>& kernels = conv_backward_kernels().get<T>();
    const bool last = is_channels_last(input);
    std::array<Tensor, 3> gradients =
        convolution_backward(in_format(kernels, gradient, last), input, in_format(kernels, weight, last),
                             stock_convolution(problem.geometry, problem.dims), wanted);
    if (wanted[1]) gradients[1] = in_format(kernels, gradients[1], is_channels_last(weight));
    return gradients;
  });
}

}  // namespace fastnn
