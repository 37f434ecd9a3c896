// Forward of the convolution, with ReLU, a pool or neither: by our kernels, or by torch's convolution, as the plan
// says.
#pragma once

#include "conv_plan.h"
#include "conv_stock.h"

namespace fastnn {

// The plan of direct convolution for a key. It takes calls that the chosen plan cannot compute.
inline const ConvPlan& plan_of_direct(PlanKey key, bool exact) {
  key.request.exact = exact;
  key.request.algorithm = static_cast<int32_t>(ForwardAlgorithm::direct);
  return plan_for(key);
}

// The plan of a call. `plan` is the plan that follows from the key alone. If large or infinite elements would spoil its
// sums (needs_moderate), and the call has such elements, the result is the plan of direct convolution.
// weight_is_moderate: the weight is known to be moderate. Finding that out takes as long as reading the weight.
template <class T>
const ConvPlan& plan_of_call(const ConvKernels<T>& kernels, const ConvCall<T>& call, const PlanKey& key,
                             const ConvPlan& plan, bool weight_is_moderate = false) {
  const bool fits = !plan.needs_moderate ||
                    ((weight_is_moderate || kernels.weight_is_moderate(call)) && kernels.input_is_moderate(call));
  return fits ? plan : plan_of_direct(key, true);
}

// Runs a call in which the plan and the packed weight are still missing. `given` is the plan that follows from the key
// alone. packed: the weight in that plan's packed format, which is moderate if the plan needs that; or null to pack it
// here.
template <class T>
void run_planned_conv(const ConvKernels<T>& kernels, ConvCall<T>& call, int64_t dims, const PlanKey& key,
                      const ConvPlan& given, const Compute<T>* packed) {
  const ConvPlan& plan = plan_of_call(kernels, call, key, given, packed != nullptr);
  if (plan.algorithm != ForwardAlgorithm::stock) {
    return run_by_plan(kernels, call, plan, &plan == &given ? packed : nullptr);
  }
  if (run_by_stock(kernels, call, dims)) return;
  run_by_plan<T>(kernels, call, plan_of_direct(key, key.request.exact), nullptr);
}

// A call in which bias, output and plan are still missing.
template <class T>
ConvCall<T> forward_call(const ConvPoolProblem& problem, const Activation& activation, const PlainImages& input,
                         const PlainImages& weight) {
  ConvCall<T> call{};
  call.activation = activation;
  call.geometry = problem.geometry;
  call.input = data<T>(input.tensor);
  call.input_layout = input.layout;
  call.weight = data<T>(weight.tensor);
  call.weight_layout = weight.layout;
  return call;
}

// Fills `output`, and `winners` unless that is null. activation: ReLU or the identity. `algorithm` is the algorithm to
// take, or -1 to choose one.
template <class T>
void run_conv_forward(const ConvPoolProblem& problem, const Activation& activation, const Tensor& given_input,
                      const Tensor& given_weight, const std::optional<Tensor>& bias, const Tensor& output,
                      const Tensor* winners, int64_t algorithm) {
  const Tensor dense_bias = bias ? dense(*bias) : Tensor();
  const PlainImages input(given_input), weight(given_weight), result(output);
  ConvCall<T> call = forward_call<T>(problem, activation, input, weight);
  call.bias = bias ? data<T>(dense_bias) : nullptr;
  call.output = mutable_data<T>(output);
  call.output_layout = result.layout;
  call.winners = winners ? mutable_data<uint8_t>(*winners) : nullptr;
  const ConvKernels<T>& kernels = conv_kernels().get<T>();
  const PlanKey key = plan_key<T>(kernels, call.geometry, input.channels_last, result.channels_last, algorithm);
  run_planned_conv<T>(kernels, call, problem.dims, key, plan_for(key), nullptr);
}

// Whether torch computes the convolution and nothing is pooled, so that only an activation remains to be done.
template <class T>
bool is_left_to_stock(const ConvPoolProblem& problem, const Tensor& input, bool output_channels_last,
                      int64_t algorithm) {
  const ConvPoolGeometry& g = problem.geometry;
  if (g.batch == 0 || !g.pools_nothing()) return false;
  const PlanKey key = plan_key<T>(conv_kernels().get<T>(), g, is_channels_last(input), output_channels_last, algorithm);
  return plan_for(key).algorithm == ForwardAlgorithm::stock;
}

}  // namespace fastnn
