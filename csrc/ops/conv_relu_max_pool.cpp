// The operators fastnn::conv_relu_max_pool and its backward: argument checks, allocation and registration.
#include <cstring>
#include <string>
#include <tuple>

#include "conv_forward.h"
#include "conv_pointwise.h"
#include "conv_winograd_backward.h"
#include "operators.h"
#include "register.h"

namespace fastnn {
namespace {

void check_places(const char* op, const ConvPoolGeometry& g) {
  const int64_t places = checked_product(checked_product(g.pool_kernel[0], g.pool_kernel[1]), g.pool_kernel[2]);
  FASTNN_CHECK(places <= kMostPlaces, op, ": a winner's place is one byte, so a window may have at most ", kMostPlaces,
               " elements, got ", places);
}

// Whether a call is computed as products of images, backward too. A weight of a single row is left to the planner,
// since gradients_by_products does not give its gradient.
bool is_by_products(const ConvPoolProblem& problem, const Tensor& input, const Tensor& weight) {
  return is_product_of_images(problem, input, weight) && problem.geometry.out_channels > 1;
}

// ---- forward ------------------------------------------------------------------------------------------------

// The number of the algorithm with this name among `entries`. Raises where there is none, or where it does not apply to
// the key's call.
template <class Algorithm, class Key, size_t count>
int64_t algorithm_of(const char* op, const std::string& name, const AlgorithmEntry (&entries)[count], const Key& key) {
  for (size_t i = 0; i < count; ++i) {
    const Algorithm algorithm = static_cast<Algorithm>(i);
    if (name != entries[i].name) continue;
    FASTNN_CHECK(algorithm_applies(algorithm, key.geometry, key.request), op, ": algorithm '", name,
                 "' does not apply to this call");
    return static_cast<int64_t>(i);
  }
  fail(op, ": there is no algorithm '", name, "'");
}

// The number of the forward algorithm with this name, or -1 where no name is given.
template <class T>
int64_t forward_algorithm(const char* op, const std::optional<std::string>& name, const ConvPoolProblem& problem,
                          bool input_channels_last) {
  if (!name) return -1;
  return algorithm_of<ForwardAlgorithm>(
      op, *name, kForwardEntries,
      plan_key<T>(conv_kernels().get<T>(), problem.geometry, input_channels_last, false, -1));
}

// Checks the arguments and computes the output. Each window's argmax goes to `winners` unless that is null.
Tensor checked_forward(const char* op, const Tensor& given_input, const Tensor& given_weight,
                       const std::optional<Tensor>& bias, const Ints& geometry,
                       const std::optional<std::string>& algorithm, std::optional<Tensor>* winners) {
  const ConvPoolProblem problem = check_problem(op, given_input, given_weight, bias, geometry);
  const Tensor input = in_memory(given_input), weight = in_memory(given_weight);
  const ScalarType dtype = problem.kind.dtype;
  const bool channels_last = output_is_channels_last(problem, input, weight);
  const Ints sizes = output_sizes(problem);
  if (winners) {
    check_places(op, problem.geometry);
    *winners = new_formatted(sizes, ScalarType::Byte, channels_last);
  }
  if (!algorithm && is_by_products(problem, input, weight)) {
    uint8_t* const places = winners ? mutable_data<uint8_t>(**winners) : nullptr;
    const auto& kernels = conv_kernels().get<float>();
    return product_of_images(problem, input, weight, bias, [&](float* made, int64_t first, int64_t count) {
      kernels.rectify(made + first, count, made + first, places ? places + first : nullptr);
    });
  }
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t number = forward_algorithm<T>(op, algorithm, problem, is_channels_last(input));
    if (!winners && is_left_to_stock<T>(problem, input, channels_last, number)) {
      const Tensor result = convolution(input, weight, bias, stock_convolution(problem.geometry, problem.dims));
      if (result.scalar_type() == dtype) {
        rectify(result);
        return with_strides(in_format<T>(conv_backward_kernels().get<T>(), result, channels_last), channels_last);
      }
    }
    Tensor output = new_formatted(sizes, dtype, channels_last);
    if (output.numel() > 0) {
      run_conv_forward<T>(problem, kRelu, input, weight, bias, output, winners ? &**winners : nullptr, number);
    }
    return output;
  });
}

Tensor conv_relu_max_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                          const Ints& geometry, const std::optional<std::string>& algorithm) {
  return checked_forward("conv_relu_max_pool", input, weight, bias, geometry, algorithm, nullptr);
}

}  // namespace

std::tuple<Tensor, Tensor> conv_relu_max_pool_with_winners(const Tensor& input, const Tensor& weight,
                                                           const std::optional<Tensor>& bias, const Ints& geometry,
                                                           const std::optional<std::string>& algorithm) {
  std::optional<Tensor> winners;
  Tensor output =
      checked_forward("conv_relu_max_pool_with_winners", input, weight, bias, geometry, algorithm, &winners);
  return {std::move(output), std::move(*winners)};
}

namespace {

// ---- what is chosen ------------------------------------------------------------------------------------------

std::tuple<std::string, std::string> conv_relu_max_pool_algorithm(const Tensor& given_input, const Tensor& given_weight,
                                                                  const std::optional<Tensor>& bias,
                                                                  const Ints& geometry,
                                                                  const std::optional<std::string>& algorithm) {
  const char* op = "conv_relu_max_pool_algorithm";
  const ConvPoolProblem problem = check_problem(op, given_input, given_weight, bias, geometry);
  const Tensor input = in_memory(given_input), weight = in_memory(given_weight);
  return with_dtype(problem.kind.dtype, [&](auto type) -> std::tuple<std::string, std::string> {
    using T = decltype(type);
    const ConvKernels<T>& kernels = conv_kernels().get<T>();
    const int64_t wanted = forward_algorithm<T>(op, algorithm, problem, is_channels_last(input));
    if (problem.geometry.batch == 0) return {"none", "none"};
    if (!algorithm && is_by_products(problem, input, weight)) return {kPointwise.name, kPointwise.name};
    const PlainImages images(input), weights(weight);
    const bool channels_last = output_is_channels_last(problem, input, weight);
    const PlanKey key = plan_key<T>(kernels, problem.geometry, images.channels_last, channels_last, wanted);
    const ConvPlan& forward =
        plan_of_call(kernels, forward_call<T>(problem, kRelu, images, weights), key, plan_for(key));
    const BackwardKey backward =
        backward_key(conv_backward_kernels().get<T>(), problem, images.channels_last, {true, true, true}, -1);
    return {kForwardEntries[static_cast<int>(forward.algorithm)].name,
            kBackwardEntries[static_cast<int>(plan_for(backward).algorithm)].name};
  });
}

// ---- backward -----------------------------------------------------------------------------------------------

void check_size(const Tensor& tensor, const Ints& sizes, const char* op, const char* name) {
  FASTNN_CHECK(sizes_of(tensor) == sizes, op, ": expected ", name, " of size ", to_string(sizes), ", got ",
               to_string(tensor.sizes()));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv_relu_max_pool_backward(const Tensor& given_gradient,
                                                               const Tensor& given_winners, const Tensor& given_input,
                                                               const Tensor& given_weight, const Ints& geometry,
                                                               bool input_wanted, bool weight_wanted, bool bias_wanted,
                                                               const std::optional<std::string>& algorithm) {
  const char* op = "conv_relu_max_pool_backward";
  const TensorsInKeptMemory kept;
  const ConvPoolProblem problem = check_problem(op, given_input, given_weight, std::nullopt, geometry);
  const ConvPoolGeometry& g = problem.geometry;
  check_places(op, g);
  check_same_kind(given_gradient, problem.kind, "grad_output");
  check_size(given_gradient, output_sizes(problem), op, "grad_output");
  check_plain(given_winners, op, "winners");
  FASTNN_CHECK(given_winners.scalar_type() == ScalarType::Byte, op, ": expected winners to have dtype Byte, but got ",
               torch::headeronly::toString(given_winners.scalar_type()));
  check_memory(given_winners, op, "winners");
  check_size(given_winners, output_sizes(problem), op, "winners");
  // A gradient made by expand(), as that of sum(), is not copied: it has no more elements than the winners in memory.
  const Tensor grad_output = given_gradient.borrow(), winners = in_memory(given_winners);
  const Tensor input = in_memory(given_input), weight = in_memory(given_weight);
  int64_t image = 1;  // elements of a padded image, which the kernels number with 32 bits
  for (int d = 0; d < 3; ++d) image = checked_product(image, g.input[d] + 2 * g.padding[d] + g.kernel_extent(d));
  FASTNN_CHECK(checked_product(image, 64) < (int64_t{1} << 31) &&
                   checked_product(g.out_channels, checked_product(g.taps(), 64)) < (int64_t{1} << 31),
               op, ": input or weight too large");

  const ScalarType dtype = problem.kind.dtype;
  const Wanted wanted{input_wanted, weight_wanted, bias_wanted};
  return with_dtype(dtype, [&](auto type) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(type);
    const ConvBackwardKernels<T>& kernels = conv_backward_kernels().get<T>();  // read once, see KeyOf
    ConvGradients gradients;
    if (g.batch == 0) {
      gradients = empty_gradients(input, weight, wanted);
      std::fill_n(mutable_data<T>(gradients.weight), gradients.weight.numel(), T{});
      std::fill_n(mutable_data<T>(gradients.bias), gradients.bias.numel(), T{});
      return {std::move(gradients.input), std::move(gradients.weight), std::move(gradients.bias)};
    }
    const PlainImages plain_winners(winners), plain_input(input), plain_weight(weight);
    ConvBackward<T> call = backward_call<T>(g, grad_output, plain_input, plain_weight);
    call.winners = data<uint8_t>(plain_winners.tensor);
    call.winners_layout = plain_winners.layout;
    FASTNN_CHECK(kernels.winners_are_valid(g, call.winners, call.winners_layout), op,
                 ": winners has a place that its window doesn't have");
    if constexpr (std::is_same_v<T, float>) {
      if (!algorithm && is_by_products(problem, input, weight)) {
        const Tensor masked = masked_gradient(kernels, dense(grad_output), dense(winners));
        ConvGradients made = gradients_by_products(g, masked, input, weight, wanted);
        gradients = empty_gradients(input, weight, {false, false, false});
        if (wanted.input) gradients.input = std::move(made.input);
        if (wanted.weight) gradients.weight = std::move(made.weight);
        if (wanted.bias) gradients.bias = std::move(made.bias);
        return {std::move(gradients.input), std::move(gradients.weight), std::move(gradients.bias)};
      }
    }
    BackwardKey key = backward_key(kernels, problem, plain_input.channels_last, wanted, -1);
    if (algorithm) {
      key.request.algorithm =
          static_cast<int32_t>(algorithm_of<BackwardAlgorithm>(op, *algorithm, kBackwardEntries, key));
    }
    call.plan = &plan_for(key);
    std::optional<AlikeGradient<T>> alike;  // for winograd
    if (call.plan->algorithm == BackwardAlgorithm::winograd) {
      alike.emplace(kernels, grad_output, winners);
      alike->give_to(call);
    }
    const bool is_winograd = alike.has_value();
    if ((is_winograd || call.plan->algorithm == BackwardAlgorithm::taps) &&
        !(kernels.factors_are_moderate(call) && (!is_winograd || kernels.gradient_is_moderate(call)))) {
      key.request.exact = true;
      key.request.algorithm = -1;
      call.plan = &plan_for(key);
    }
    if (call.plan->algorithm == BackwardAlgorithm::stock) {
      gradients = gradients_by_stock(kernels, problem, call, grad_output, winners, input, weight, bias_wanted);
    } else if (call.plan->algorithm == BackwardAlgorithm::winograd) {
      gradients = empty_gradients(input, weight, wanted);
      gradients_by_winograd(kernels, call, problem.work, wanted, gradients);
    } else {
      gradients = empty_gradients(input, weight, wanted);
      run_backward(kernels, call, problem.work, wanted, gradients.input, gradients.weight, gradients.bias);
    }
    return {std::move(gradients.input), std::move(gradients.weight), std::move(gradients.bias)};
  });
}

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // geometry: stride, padding, dilation, pool_kernel_size, pool_stride, pool_padding, pool_dilation, one value
  // per dimension each, then groups and ceil_mode (Geometry.flat of fastnn/reference/conv_relu_max_pool.py)
  // algorithm: a name in csrc/kernels/conv/plan.h, for tests; None leaves the choice to the planner
  m.def("conv_relu_max_pool(Tensor input, Tensor weight, Tensor? bias, int[] geometry, str? algorithm=None) -> Tensor");
  // winners: uint8 of the output's size, the position of each window's argmax in the window, 255 where the output has
  // no gradient. A window may have at most 254 elements.
  m.def(
      "conv_relu_max_pool_with_winners(Tensor input, Tensor weight, Tensor? bias, int[] geometry, str? algorithm=None)"
      " -> (Tensor output, Tensor winners)");
  // The names of the algorithms (of csrc/kernels/conv) that compute such a call and its backward; "none" if there
  // is nothing to compute.
  m.def(
      "conv_relu_max_pool_algorithm(Tensor input, Tensor weight, Tensor? bias, int[] geometry, str? algorithm=None)"
      " -> (str forward, str backward)");
  // A gradient that is not wanted comes back empty. algorithm: a name in csrc/kernels/conv/backward/plan.h
  m.def(
      "conv_relu_max_pool_backward(Tensor grad_output, Tensor winners, Tensor input, Tensor weight, int[] geometry,"
      " bool input_wanted, bool weight_wanted, bool bias_wanted, str? algorithm=None)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("conv_relu_max_pool", FASTNN_BOX(conv_relu_max_pool));
  m.impl("conv_relu_max_pool_with_winners", FASTNN_BOX(conv_relu_max_pool_with_winners));
  m.impl("conv_relu_max_pool_algorithm", FASTNN_BOX(conv_relu_max_pool_algorithm));
  m.impl("conv_relu_max_pool_backward", FASTNN_BOX(conv_relu_max_pool_backward));
}

}  // namespace
}  // namespace fastnn
