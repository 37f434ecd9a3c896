// A convolution that has no ReLU and no pool, for example because a batch norm follows: forward and backward. Training
// steps call the functions; torch.ops.fastnn.convolution and convolution_backward are the same for a user's model.
#include "../kernels/conv/machine.h"
#include "conv_input_gradient.h"
#include "conv_pointwise.h"
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

// The algorithm of forward: ours where fewer products are multiplied, for depthwise convolutions, for few channels and
// for signals, else torch's. Without a ReLU or a pool, whose fusion saves a pass over the output, our other algorithms
// have in float32 0.5 to 1.2 of torch's speed (measured).
template <class T>
ForwardAlgorithm choose_forward(const ConvPoolGeometry& g, bool input_channels_last, bool output_channels_last) {
  if (g.batch == 0) return ForwardAlgorithm::stock;
  const PlanKey key = plan_key<T>(conv_kernels().get<T>(), g, input_channels_last, output_channels_last, -1);
  const ForwardAlgorithm chosen = plan_for(key).algorithm;
  const bool multiplies_less = chosen == ForwardAlgorithm::winograd || chosen == ForwardAlgorithm::phases;
  // Images of one pixel are left to torch, whose result has strides of its own then.
  const bool depthwise_is_ours = is_depthwise(g) && g.pixels() > 1;
  // With a stride, torch's kernels of first layers are as fast.
  const bool few_are_ours =
      g.groups == 1 && g.in_channels < tuned::kFewChannels && !input_channels_last && g.stride[2] == 1;
  const int64_t lanes = key.machine.vector_bytes / static_cast<int64_t>(sizeof(Compute<T>));
  // torch has no convolution of float64 but a copy of all windows and a product, and no copy for kernels of one pixel.
  const bool doubles_are_ours = sizeof(T) == 8 && g.taps() > 1 && g.pixels() > 1;
  // torch has no format of signals in which channels lie together, and moves them there and back in each call. Nor has
  // it kernels for groups of fewer channels than a vector has lanes, unless the images are channels last.
  const bool signals_are_ours = g.is_signal() && !input_channels_last;
  const bool groups_are_ours =
      chosen == ForwardAlgorithm::pixels && !input_channels_last && g.has_narrow_groups(lanes) && g.pixels() > 1;
  return multiplies_less || depthwise_is_ours || few_are_ours || doubles_are_ours || signals_are_ours || groups_are_ours
             ? chosen
             : ForwardAlgorithm::stock;
}

// The algorithm of the input's gradient as a convolution of the output's gradient, by our forward kernels; or `stock`.
template <class T>
ForwardAlgorithm choose_for_input_gradient(const ConvPoolGeometry& g, bool gradient_channels_last,
                                           bool input_channels_last) {
  // Turning a weight costs as much as some hundred products of each element, unless the weight stays in L1.
  constexpr int64_t kLeastProducts = 512;
  const int64_t weight_bytes = g.groups * g.out_channels * g.depth() * static_cast<int64_t>(sizeof(T));
  if (weight_bytes > tuned::kNearBytes && g.batch * g.pixels() < kLeastProducts) return ForwardAlgorithm::stock;
  for (int d = 0; d < 3; ++d) {
    const int64_t most = g.kernel_extent(d) - 1;  // of which less is left around the gradient
    if (g.stride[d] != 1 || std::max(g.padding[d], g.padding_end[d]) > most) return ForwardAlgorithm::stock;
  }
  return choose_forward<T>(turned_around(g), gradient_channels_last, input_channels_last);
}

// The plan of backward, whose algorithm may be `stock`.
template <class T>
const ConvBackwardPlan& backward_plan(const ConvPoolProblem& problem, const Tensor& input, const Wanted& wanted) {
  BackwardKey key =
      backward_key(conv_backward_kernels().get<T>(), problem, is_channels_last(input), wanted, /*algorithm=*/-1);
  key.request.dense = true;
  return plan_for(key);
}

// The wanted gradients by the algorithm of the plan for them. Nothing where that is torch's, or where elements are not
// finite or so large that the transforms of Winograd could overflow.
template <class T>
std::optional<ConvGradients> gradients_by_plan(const ConvPoolProblem& problem, ConvBackward<T> call,
                                               const Tensor& input, const Tensor& weight, const Wanted& wanted) {
  const ConvBackwardKernels<T>& kernels = conv_backward_kernels().get<T>();
  const ConvBackwardPlan& plan = backward_plan<T>(problem, input, wanted);
  call.plan = &plan;
  const bool by_winograd = plan.algorithm == BackwardAlgorithm::winograd;
  const bool multiplies_by_zeros = plan.algorithm == BackwardAlgorithm::taps;
  if (plan.algorithm == BackwardAlgorithm::stock || (multiplies_by_zeros && !wanted.weight)) return std::nullopt;
  if ((by_winograd || multiplies_by_zeros) &&
      (!kernels.factors_are_moderate(call) || !kernels.gradient_is_moderate(call))) {
    return std::nullopt;
  }
  ConvGradients made = empty_gradients(input, weight, wanted);
  if (by_winograd) {
    gradients_by_winograd(kernels, call, problem.work, wanted, made);
  } else {
    run_backward(kernels, call, problem.work, wanted, made.input, made.weight, made.bias);
  }
  return made;
}

// The gradients that our kernels give; the others are empty: torch's are as fast for those.
template <class T>
ConvGradients own_gradients(const ConvPoolProblem& problem, const Tensor& gradient, const Tensor& input,
                            const Tensor& weight, const Wanted& wanted) {
  const ConvPoolGeometry& g = problem.geometry;
  if (g.batch == 0) return {};
  if (is_product_of_images(problem, input, weight)) return gradients_by_products(g, gradient, input, weight, wanted);
  const ConvBackwardKernels<T>& kernels = conv_backward_kernels().get<T>();
  const PlainImages images(input), taps(weight), dense(gradient);
  ConvBackward<T> call = backward_call<T>(g, dense.tensor, images, taps);
  call.output_layout = dense.layout;
  if (auto all = gradients_by_plan<T>(problem, call, input, weight, wanted)) return std::move(*all);
  ConvGradients gradients;
  const bool last = is_channels_last(input);
  // (The zeros around the gradient are multiplied: an infinite weight would make NaN of them.)
  if (wanted.input && choose_for_input_gradient<T>(g, dense.channels_last, last) != ForwardAlgorithm::stock &&
      kernels.factors_are_moderate(call)) {
    gradients.input = new_formatted(sizes_of(input), kDtypeOf<T>, last);
    input_gradient_by_forward(kernels, call, problem.dims, gradients.input);
  }
  if (wanted.input && wanted.weight) {
    if (auto others = gradients_by_plan<T>(problem, call, input, weight, {false, true, wanted.bias})) {
      gradients.weight = std::move(others->weight);
      gradients.bias = std::move(others->bias);
    }
  }
  // torch adds up the bias's gradient less exactly where the input's is not wanted (on ARM).
  if constexpr (sizeof(T) > 2) {
    if (wanted.bias && gradients.input.defined() && !gradients.bias.defined()) {
      const Tensor as_input = in_format(kernels, gradient, last);  // the same bits for a gradient in either format
      const PlainImages plain(as_input);
      gradients.bias = bias_gradient(g, plain.layout, data<T>(plain.tensor));
    }
  }
  return gradients;
}

}  // namespace

Tensor plain_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Ints& geometry) {
  const ConvPoolProblem problem = check_problem(kOp, input, weight, bias, geometry);
  const bool channels_last = output_is_channels_last(problem, input, weight);
  if (is_product_of_images(problem, input, weight)) {
    return product_of_images(problem, input, weight, bias, [](float*, int64_t, int64_t) {});
  }
  return with_kernel_dtype(problem.kind.dtype, [&](auto type) {
    using T = decltype(type);
    if (choose_forward<T>(problem.geometry, is_channels_last(input), channels_last) == ForwardAlgorithm::stock) {
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
    ConvGradients ours = own_gradients<T>(problem, gradient, input, weight, {wanted[0], wanted[1], wanted[2]});
    const std::array<Tensor*, 3> own{&ours.input, &ours.weight, &ours.bias};
    std::array<bool, 3> missing = wanted;
    for (size_t i = 0; i < 3; ++i) missing[i] = wanted[i] && !own[i]->defined();
    const auto with_ours = [&](std::array<Tensor, 3> gradients) {
      for (size_t i = 0; i < 3; ++i) {
        if (own[i]->defined()) gradients[i] = std::move(*own[i]);
      }
      return gradients;
    };
    if (!missing[0] && !missing[1] && !missing[2]) return with_ours({});
    // Where the gradient or the weight has another format than the input, torch would convert it one element at a time.
    const ConvBackwardKernels<T>& kernels = conv_backward_kernels().get<T>();
    // Images of one channel are the same in both formats, so that the weight's counts.
    const bool last = is_channels_last(input.size(1) == 1 ? weight : input);
    std::array<Tensor, 3> gradients =
        convolution_backward(in_format(kernels, gradient, last), input, in_format(kernels, weight, last),
                             stock_convolution(problem.geometry, problem.dims), missing);
    if (missing[1]) gradients[1] = in_format(kernels, gradients[1], is_channels_last(weight));
    return with_ours(std::move(gradients));
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

// The names of the algorithms of both, "stock" where they are torch's own. Where backward's gradients have an algorithm
// each, these are the input's and the weight's.
std::tuple<std::string, std::string> convolution_algorithm(const Tensor& given_input, const Tensor& given_weight,
                                                           const OptionalTensor& bias, const Ints& geometry) {
  const ConvPoolProblem problem = check_convolution("convolution_algorithm", given_input, given_weight, bias, geometry);
  const Tensor input = in_memory(given_input), weight = in_memory(given_weight);
  if (problem.geometry.batch == 0) return {"none", "none"};
  if (is_product_of_images(problem, input, weight)) {
    const std::string name = kPointwise.name;
    return {name, problem.geometry.out_channels > 1 ? name : name + ", stock"};
  }
  return with_kernel_dtype(problem.kind.dtype, [&](auto type) -> std::tuple<std::string, std::string> {
    using T = decltype(type);
    const bool last = is_channels_last(input), output_last = output_is_channels_last(problem, input, weight);
    const auto forward_name = [](ForwardAlgorithm algorithm) {
      return std::string(kForwardEntries[static_cast<int>(algorithm)].name);
    };
    const auto backward_name = [&](const Wanted& wanted) {
      return std::string(kBackwardEntries[static_cast<int>(backward_plan<T>(problem, input, wanted).algorithm)].name);
    };
    std::string backward = backward_name({true, true, true});
    if (backward == "stock") {
      const std::string of_input = forward_name(choose_for_input_gradient<T>(problem.geometry, output_last, last));
      const std::string of_weight = backward_name({false, true, true});
      if (of_input != of_weight) backward = of_input + ", " + of_weight;
    }
    return {forward_name(choose_forward<T>(problem.geometry, last, output_last)), backward};
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
