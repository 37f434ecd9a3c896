// The convolution that is being rebuilt, beside the one in use.
#include <tuple>

#include "conv_stock.h"
#include "register.h"

namespace fastnn {
namespace {

template <class T>
void run_new(const ConvPoolProblem& problem, const Tensor& given_input, const Tensor& given_weight,
             const std::optional<Tensor>& bias, const Tensor& output, const Tensor* winners, int64_t algorithm,
             std::string* chosen) {
  if (algorithm == static_cast<int64_t>(ForwardAlgorithm::stock)) {
    return run_stock<T>(problem, given_input, given_weight, bias, output, winners);
  }
  const PlainImages input(given_input), weight(given_weight), result(output);
  const Tensor dense_bias = bias ? dense(*bias) : Tensor();
  ConvCall<T> call{};
  call.geometry = problem.geometry;
  call.input = data<T>(input.tensor);
  call.input_layout = input.layout;
  call.weight = data<T>(weight.tensor);
  call.weight_layout = weight.layout;
  call.bias = bias ? data<T>(dense_bias) : nullptr;
  call.output = mutable_data<T>(output);
  call.output_layout = result.layout;
  call.winners = winners ? mutable_data<uint8_t>(*winners) : nullptr;
  PlanKey key;
  key.geometry = problem.geometry;
  key.request.threads = useful_threads(problem.work);
  key.request.element_bytes = sizeof(T);
  key.request.input_channels_last = input.channels_last;
  key.request.output_channels_last = result.channels_last;
  key.request.algorithm = static_cast<int32_t>(algorithm);
  set_machine(key.machine);
  FASTNN_CHECK(algorithm < kForwardAlgorithms, "no algorithm ", algorithm);
  FASTNN_CHECK(algorithm < 0 || algorithm_applies(static_cast<ForwardAlgorithm>(algorithm), key.geometry, key.request,
                                                  key.machine),
               "the algorithm does not apply");
  const ConvPlan* plan = &plan_for(key);
  if (plan->needs_moderate && !conv_kernels().get<T>().is_moderate(call)) {
    key.request.exact = true;
    if (algorithm != static_cast<int64_t>(ForwardAlgorithm::direct)) key.request.algorithm = -1;
    plan = &plan_for(key);
  }
  if (chosen) {
    *chosen = algorithm_name(plan->algorithm);
    return;
  }
  run_conv(call, *plan, key.request.threads, static_cast<Compute<T>*>(nullptr));
}

std::tuple<Tensor, Tensor> conv_new(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                    const Ints& geometry, int64_t algorithm, bool with_winners) {
  const ConvPoolProblem problem = check_problem("conv_new", input, weight, bias, geometry);
  const ScalarType dtype = problem.kind.dtype;
  const bool channels_last =
      (is_channels_last(input) || is_channels_last(weight)) && !(dtype == ScalarType::Double && problem.dims == 3);
  const Ints sizes = output_sizes(problem);
  Tensor output = new_formatted(sizes, dtype, channels_last);
  Tensor winners = new_formatted(with_winners ? sizes : Ints(sizes.size(), 0), ScalarType::Byte, channels_last);
  if (output.numel() > 0) {
    with_dtype(dtype, [&](auto type) {
      run_new<decltype(type)>(problem, input, weight, bias, output, with_winners ? &winners : nullptr, algorithm, nullptr);
    });
  }
  return {std::move(output), std::move(winners)};
}

std::string conv_new_algorithm(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                               const Ints& geometry) {
  const ConvPoolProblem problem = check_problem("conv_new", input, weight, bias, geometry);
  const Tensor output = new_formatted(output_sizes(problem), problem.kind.dtype, is_channels_last(input));
  std::string chosen;
  with_dtype(problem.kind.dtype, [&](auto type) {
    run_new<decltype(type)>(problem, input, weight, bias, output, nullptr, -1, &chosen);
  });
  return chosen;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("conv_new(Tensor input, Tensor weight, Tensor? bias, int[] geometry, int algorithm, bool winners) -> (Tensor, Tensor)");
  m.def("conv_new_algorithm(Tensor input, Tensor weight, Tensor? bias, int[] geometry) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("conv_new", FASTNN_BOX(conv_new));
  m.impl("conv_new_algorithm", FASTNN_BOX(conv_new_algorithm));
}

}  // namespace
}  // namespace fastnn
