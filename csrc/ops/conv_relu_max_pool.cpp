// fastnn::conv_relu_max_pool and its backward: allocation, threads, registration.
#include <cstring>
#include <string>
#include <tuple>

#include "conv_stock_backward.h"
#include "register.h"

namespace fastnn {
namespace {

void check_places(const char* op, const ConvPoolGeometry& g) {
  const int64_t places = checked_product(checked_product(g.pool_kernel[0], g.pool_kernel[1]), g.pool_kernel[2]);
  FASTNN_CHECK(places <= kMostPlaces, op, ": a winner's place is one byte, so a window may have at most ", kMostPlaces,
               " elements, got ", places);
}

// ---- forward ------------------------------------------------------------------------------------------------

template <class T>
void run_forward(const ConvPoolProblem& problem, const Tensor& input, const Tensor& weight,
                 const std::optional<Tensor>& bias, const Tensor& output, const Tensor* winners) {
  const Tensor dense_bias = bias ? dense(*bias) : Tensor();
  ConvPoolForward<T> call{};
  call.geometry = problem.geometry;
  call.input = data<T>(input);
  call.input_layout = layout_of(input);
  call.weight = data<T>(weight);
  call.weight_layout = layout_of(weight);
  call.bias = bias ? data<T>(dense_bias) : nullptr;
  call.output = mutable_data<T>(output);
  call.output_layout = layout_of(output);
  call.winners = winners ? mutable_data<uint8_t>(*winners) : nullptr;
  run_conv_pool(call, problem.work, [](const ConvPoolPlan&) -> const Compute<T>* { return nullptr; });
}

// winners: where to put them, or null.
Tensor forward(const char* op, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const Ints& geometry, std::optional<Tensor>* winners) {
  const ConvPoolProblem problem = check_problem(op, input, weight, bias, geometry);
  const ScalarType dtype = problem.kind.dtype;
  // As stock: its float64 convolution in three dimensions knows no channels last.
  const bool channels_last =
      (is_channels_last(input) || is_channels_last(weight)) && !(dtype == ScalarType::Double && problem.dims == 3);
  const Ints sizes = output_sizes(problem);
  Tensor output = new_formatted(sizes, dtype, channels_last);
  if (winners) {
    check_places(op, problem.geometry);
    *winners = new_formatted(sizes, ScalarType::Byte, channels_last);
  }
  if (output.numel() > 0) {
    with_dtype(dtype, [&](auto type) {
      run_forward<decltype(type)>(problem, input, weight, bias, output, winners ? &**winners : nullptr);
    });
  }
  return output;
}

Tensor conv_relu_max_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                          const Ints& geometry) {
  return forward("conv_relu_max_pool", input, weight, bias, geometry, nullptr);
}

std::tuple<Tensor, Tensor> conv_relu_max_pool_with_winners(const Tensor& input, const Tensor& weight,
                                                           const std::optional<Tensor>& bias, const Ints& geometry) {
  std::optional<Tensor> winners;
  Tensor output = forward("conv_relu_max_pool_with_winners", input, weight, bias, geometry, &winners);
  return {std::move(output), std::move(*winners)};
}

// ---- what is chosen ------------------------------------------------------------------------------------------

std::string algorithm_name(ConvAlgorithm algorithm) {
  switch (algorithm) {
    case ConvAlgorithm::direct:
      return "direct";
    case ConvAlgorithm::rows:
      return "rows";
    case ConvAlgorithm::rows_by_two:
      return "rows_by_two";
    case ConvAlgorithm::lanes:
      return "lanes";
    case ConvAlgorithm::pairs:
      return "pairs";
    case ConvAlgorithm::row_pairs:
      return "row_pairs";
    case ConvAlgorithm::by_four:
      return "by_four";
    case ConvAlgorithm::depthwise:
      return "depthwise";
    case ConvAlgorithm::winograd:
      return "winograd";
    case ConvAlgorithm::dots:
      return "dots";
    case ConvAlgorithm::windows:
      return "windows";
    case ConvAlgorithm::phases:
      return "phases";
    case ConvAlgorithm::matrix:
      return "matrix";
  }
  return "";
}

std::tuple<std::string, std::string> conv_relu_max_pool_algorithm(const Tensor& input, const Tensor& weight,
                                                                  const std::optional<Tensor>& bias,
                                                                  const Ints& geometry) {
  const ConvPoolProblem problem = check_problem("conv_relu_max_pool_algorithm", input, weight, bias, geometry);
  if (problem.geometry.batch == 0) return {"none", "none"};
  return with_dtype(problem.kind.dtype, [&](auto type) -> std::tuple<std::string, std::string> {
    using T = decltype(type);
    ConvPoolForward<T> call{};
    call.geometry = problem.geometry;
    call.input = data<T>(input);
    call.input_layout = layout_of(input);
    call.weight = data<T>(weight);
    call.weight_layout = layout_of(weight);
    skip_unused(call.geometry, call.input_layout);
    choose_plan(call, 1);
    const BackwardKey backward = backward_key(problem, PlainImages(input).channels_last, {true, true, true}, -1);
    return {algorithm_name(call.plan.algorithm), algorithm_name(plan_for(backward).algorithm)};
  });
}

// ---- backward -----------------------------------------------------------------------------------------------

void check_size(const Tensor& tensor, const Ints& sizes, const char* op, const char* name) {
  FASTNN_CHECK(sizes_of(tensor) == sizes, op, ": expected ", name, " of size ", to_string(sizes), ", got ",
               to_string(tensor.sizes()));
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_max_pool_backward(const Tensor& grad_output, const Tensor& winners,
                                                               const Tensor& input, const Tensor& weight,
                                                               const Ints& geometry, bool input_wanted,
                                                               bool weight_wanted, bool bias_wanted,
                                                               int64_t algorithm) {
  const char* op = "conv_relu_max_pool_backward";
  const ConvPoolProblem problem = check_problem(op, input, weight, std::nullopt, geometry);
  const ConvPoolGeometry& g = problem.geometry;
  check_places(op, g);
  check_same_kind(grad_output, problem.kind, "grad_output");
  check_size(grad_output, output_sizes(problem), op, "grad_output");
  FASTNN_CHECK(
      winners.defined() && winners.is_cpu() && winners.is_strided() && winners.scalar_type() == ScalarType::Byte, op,
      ": expected winners to be a dense uint8 tensor on the CPU");
  check_size(winners, output_sizes(problem), op, "winners");
  int64_t image = 1;  // elements of a padded image, which the kernels number with 32 bits
  for (int d = 0; d < 3; ++d) image = checked_product(image, g.input[d] + 2 * g.padding[d] + g.kernel_extent(d));
  FASTNN_CHECK(checked_product(image, 64) < (int64_t{1} << 31) &&
                   checked_product(g.out_channels, checked_product(g.taps(), 64)) < (int64_t{1} << 31),
               op, ": input or weight too large");

  const ScalarType dtype = problem.kind.dtype;
  const auto sizes_if = [](bool condition, Ints sizes) {
    if (!condition) sizes[0] = 0;
    return sizes;
  };
  const Wanted wanted{input_wanted, weight_wanted, bias_wanted};
  const auto empty_gradients = [&] {
    return ConvGradients{
        new_formatted(sizes_if(input_wanted, sizes_of(input)), dtype, is_channels_last(input)),
        new_formatted(sizes_if(weight_wanted, sizes_of(weight)), dtype, is_channels_last(weight)),
        new_tensor({bias_wanted ? weight.size(0) : 0}, dtype),
    };
  };
  ConvGradients gradients;
  if (g.batch == 0) {
    gradients = empty_gradients();
    std::memset(gradients.weight.mutable_data_ptr(), 0, gradients.weight.numel() * gradients.weight.element_size());
    std::memset(gradients.bias.mutable_data_ptr(), 0, gradients.bias.numel() * gradients.bias.element_size());
    return {std::move(gradients.input), std::move(gradients.weight), std::move(gradients.bias)};
  }
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const ConvBackwardKernels<T>& kernels = conv_backward_kernels().get<T>();
    const PlainImages plain_winners(winners), plain_input(input), plain_weight(weight);
    ConvBackward<T> call = backward_call<T>(g, grad_output, plain_winners, plain_input, plain_weight);
    FASTNN_CHECK(kernels.winners_are_valid(g, call.winners, call.winners_layout), op,
                 ": winners has a place that its window doesn't have");
    BackwardKey key = backward_key(problem, plain_input.channels_last, wanted, algorithm);
    FASTNN_CHECK(algorithm < kBackwardAlgorithms, op, ": no algorithm ", algorithm);
    FASTNN_CHECK(algorithm < 0 || algorithm_applies(static_cast<BackwardAlgorithm>(algorithm), g, key.request), op,
                 ": the algorithm does not apply");
    call.plan = &plan_for(key);
    if (call.plan->algorithm == BackwardAlgorithm::taps && !kernels.is_finite(call)) {
      key.request.exact = true;
      key.request.algorithm = -1;
      call.plan = &plan_for(key);
    }
    if (call.plan->algorithm == BackwardAlgorithm::stock) {
      gradients = gradients_by_stock(problem, call, input, weight, bias_wanted);
    } else {
      gradients = empty_gradients();
      run_backward(call, problem.work, wanted, gradients.input, gradients.weight, gradients.bias);
    }
  });
  return {std::move(gradients.input), std::move(gradients.weight), std::move(gradients.bias)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // geometry: stride, padding, dilation, pool_kernel_size, pool_stride, pool_padding, pool_dilation, one value a
  // dimension each, then groups and ceil_mode (fastnn.ops.conv_relu_max_pool.Geometry)
  m.def("conv_relu_max_pool(Tensor input, Tensor weight, Tensor? bias, int[] geometry) -> Tensor");
  // winners: uint8 of the output's size, each window's winner by its place in the window, 255 where the output has
  // no gradient. A window may have at most 254 elements.
  m.def(
      "conv_relu_max_pool_with_winners(Tensor input, Tensor weight, Tensor? bias, int[] geometry)"
      " -> (Tensor output, Tensor winners)");
  // The names of csrc/kernels' algorithms for such a call (conv_relu_max_pool.h) and for its backward; "none" if there
  // is nothing to compute.
  m.def(
      "conv_relu_max_pool_algorithm(Tensor input, Tensor weight, Tensor? bias, int[] geometry)"
      " -> (str forward, str backward)");
  // A gradient that is not wanted comes back empty. algorithm: the BackwardAlgorithm to take, for tests.
  m.def(
      "conv_relu_max_pool_backward(Tensor grad_output, Tensor winners, Tensor input, Tensor weight, int[] geometry,"
      " bool input_wanted, bool weight_wanted, bool bias_wanted, int algorithm=-1)"
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
