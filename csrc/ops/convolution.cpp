// A convolution that has no ReLU and no pool, for example because a batch norm follows: forward and backward. Training
// steps call the functions; torch.ops.fastnn.convolution and convolution_backward are the same for a user's model.
#include "../kernels/conv/machine.h"
#include "conv_forward.h"
#include "conv_winograd_backward.h"
#include "operators.h"
#include "register.h"

namespace fastnn {
namespace {

constexpr const char* kOp = "plain_convolution";

// Whether each group has one input channel.
bool is_depthwise(const ConvPoolGeometry& g) {
  return g.groups > 1 && g.in_channels == 1;
}

// The algorithm of forward: ours by Winograd, for depthwise convolutions, and for few channels, else torch's. Without a
// ReLU or a pool, whose fusion saves a pass over the output, our other algorithms have in float32 0.5 to 1.2 of torch's
// speed (measured).
template <class T>
ForwardAlgorithm choose_forward(const ConvPoolProblem& problem, const Tensor& input, bool output_channels_last) {
  const ConvPoolGeometry& g = problem.geometry;
  if (g.batch == 0) return ForwardAlgorithm::stock;
  const PlanKey key = plan_key<T>(conv_kernels().get<T>(), g, is_channels_last(input), output_channels_last, -1);
  const ForwardAlgorithm chosen = plan_for(key).algorithm;
  // Images of one pixel are left to torch, whose result has strides of its own then.
  const bool depthwise_is_ours = is_depthwise(g) && g.pixels() > 1;
  // With a stride, torch's kernels of first layers are as fast, unless fewer products are multiplied.
  const bool few_are_ours = g.groups == 1 && g.in_channels < tuned::kFewChannels && !is_channels_last(input) &&
                            (g.stride[2] == 1 || chosen == ForwardAlgorithm::phases);
  const bool is_ours = chosen == ForwardAlgorithm::winograd || depthwise_is_ours || few_are_ours;
  return is_ours ? chosen : ForwardAlgorithm::stock;
}

// The plan of backward, whose algorithm may be `stock`.
template <class T>
const ConvBackwardPlan& backward_plan(const ConvPoolProblem& problem, const Tensor& input, const Wanted& wanted) {
  BackwardKey key =
      backward_key(conv_backward_kernels().get<T>(), problem, is_channels_last(input), wanted, /*algorithm=*/-1);
  key.request.dense = true;
  return plan_for(key);
}

// The gradients by our kernels. Returns nothing where torch's are as fast, or where elements are not finite or so large
// that the transforms of Winograd could overflow.
template <class T>
std::optional<std::array<Tensor, 3>> own_backward(const ConvPoolProblem& problem, const Tensor& gradient,
                                                  const Tensor& input, const Tensor& weight, const Wanted& wanted) {
  if (problem.geometry.batch == 0) return std::nullopt;
  const ConvBackwardKernels<T>& kernels = conv_backward_kernels().get<T>();
  const ConvBackwardPlan& plan = backward_plan<T>(problem, input, wanted);
  if (plan.algorithm == BackwardAlgorithm::stock) return std::nullopt;
  const bool by_winograd = plan.algorithm == BackwardAlgorithm::winograd;
  const PlainImages images(input), taps(weight), dense(gradient);
  ConvBackward<T> call = backward_call<T>(problem.geometry, dense.tensor, images, taps);
  call.output_layout = dense.layout;
  call.plan = &plan;
  const bool by_taps = plan.algorithm == BackwardAlgorithm::taps;  // which multiplies by zeros
  if ((by_winograd || by_taps) && (!kernels.is_moderate(call) || !kernels.gradient_is_moderate(call))) {
    return std::nullopt;
  }
  ConvGradients gradients = empty_gradients(input, weight, wanted);
  if (by_winograd) {
    gradients_by_winograd(kernels, call, problem.work, wanted, gradients);
  } else {
    run_backward(kernels, call, problem.work, wanted, gradients.input, gradients.weight, gradients.bias);
  }
  return std::array<Tensor, 3>{std::move(gradients.input), std::move(gradients.weight), std::move(gradients.bias)};
}

}  // namespace

Tensor plain_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Ints& geometry) {
  const ConvPoolProblem problem = check_problem(kOp, input, weight, bias, geometry);
  const bool channels_last = output_is_channels_last(problem, input, weight);
  return with_kernel_dtype(problem.kind.dtype, [&](auto type) {
    using T = decltype(type);
    if (choose_forward<T>(problem, input, channels_last) == ForwardAlgorithm::stock) {
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
        own_backward<T>(problem, gradient, input, weight, {wanted[0], wanted[1], wanted[2]});
    if (ours) return std::move(*ours);
    // Where the gradient or the weight has another format than the input, torch would convert it one element at a time.
    const ConvBackwardKernels<T>& kernels = conv_backward_kernels().get<T>();
    // Images of one channel are the same in both formats, so that the weight's counts.
    const bool last = is_channels_last(input.size(1) == 1 ? weight : input);
    std::array<Tensor, 3> gradients =
        convolution_backward(in_format(kernels, gradient, last), input, in_format(kernels, weight, last),
                             stock_convolution(problem.geometry, problem.dims), wanted);
    if (wanted[1]) gradients[1] = in_format(kernels, gradients[1], is_channels_last(weight));
    return gradients;
  });
}

namespace {

// ---- the operators ------------------------------------------------------------------------------------------------

ConvPoolProblem check_convolution(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                  const Ints& geometry) {
  const ConvPoolProblem problem = check_problem(op, input, weight, bias, geometry);
  const ConvPoolGeometry& g = problem.geometry;
  FASTNN_CHECK(problem.kind.dtype != ScalarType::BFloat16, op, ": expected input to be float32 or float64");
  for (int d = 0; d < 3; ++d) {
    FASTNN_CHECK(g.pool_kernel[d] == 1 && g.pool_stride[d] == 1 && g.pool_padding[d] == 0, op,
                 ": expected a pool of one pixel");
  }
  return problem;
}

Tensor checked_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                           const Ints& geometry) {
  check_convolution("convolution", input, weight, bias, geometry);
  const std::optional<Tensor> own = bias ? std::optional<Tensor>(in_memory(*bias)) : std::nullopt;
  return plain_convolution(in_memory(input), in_memory(weight), own, geometry);
}

std::tuple<Tensor, Tensor, Tensor> checked_convolution_backward(const Tensor& grad_output, const Tensor& given_input,
                                                                const Tensor& given_weight, const Ints& geometry,
                                                                bool input_wanted, bool weight_wanted,
                                                                bool bias_wanted) {
  const char* op = "convolution_backward";
  const ConvPoolProblem problem = check_convolution(op, given_input, given_weight, std::nullopt, geometry);
  check_same_kind(grad_output, problem.kind, "grad_output");
  FASTNN_CHECK(sizes_of(grad_output) == output_sizes(problem), op, ": expected grad_output of size ",
               to_string(output_sizes(problem)), ", got ", to_string(grad_output.sizes()));
  const Tensor input = in_memory(given_input), weight = in_memory(given_weight), gradient = in_memory(grad_output);
  const std::array<bool, 3> wanted{input_wanted, weight_wanted, bias_wanted};
  std::array<Tensor, 3> all = plain_convolution_backward(gradient, input, weight, geometry, wanted);
  return with_kernel_dtype(problem.kind.dtype, [&](auto type) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(type);
    const Tensor* const like[2] = {&input, &weight};
    for (size_t i = 0; i < 3; ++i) {
      if (wanted[i]) continue;  // torch gives the weight's gradient where the bias's alone is wanted
      Ints sizes = i < 2 ? sizes_of(*like[i]) : Ints{0};
      sizes[0] = 0;
      all[i] = new_tensor(sizes, kDtypeOf<T>);
    }
    return {std::move(all[0]), std::move(all[1]), std::move(all[2])};
  });
}

// The names of the algorithms of both, "stock" where they are torch's own.
std::tuple<std::string, std::string> convolution_algorithm(const Tensor& input, const Tensor& weight,
                                                           const OptionalTensor& bias, const Ints& geometry) {
  const ConvPoolProblem problem = check_convolution("convolution_algorithm", input, weight, bias, geometry);
  if (problem.geometry.batch == 0) return {"none", "none"};
  return with_kernel_dtype(problem.kind.dtype, [&](auto type) -> std::tuple<std::string, std::string> {
    using T = decltype(type);
    const bool channels_last = output_is_channels_last(problem, input, weight);
    const Wanted all{true, true, true};
    return {kForwardEntries[static_cast<int>(choose_forward<T>(problem, input, channels_last))].name,
            kBackwardEntries[static_cast<int>(backward_plan<T>(problem, input, all).algorithm)].name};
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // geometry: that of conv_relu_max_pool, with a pool of one pixel
  m.def("convolution(Tensor input, Tensor weight, Tensor? bias, int[] geometry) -> Tensor");
  // A gradient that is not wanted comes back empty.
  m.def(
      "convolution_backward(Tensor grad_output, Tensor input, Tensor weight, int[] geometry, bool input_wanted,"
      " bool weight_wanted, bool bias_wanted) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "convolution_algorithm(Tensor input, Tensor weight, Tensor? bias, int[] geometry)"
      " -> (str forward, str backward)");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("convolution", FASTNN_BOX(checked_convolution));
  m.impl("convolution_backward", FASTNN_BOX(checked_convolution_backward));
  m.impl("convolution_algorithm", FASTNN_BOX(convolution_algorithm));
}

}  // namespace
}  // namespace fastnn
