// Forward of the convolution where ReLU or a pool follows: by our kernels, or by torch's convolution, as the plan says.
#pragma once

#include "conv_plan.h"
#include "conv_stock.h"

namespace fastnn {

// The key's plan where ours has to compute what the chosen plan cannot: direct convolution.
inline const ConvPlan& plan_of_direct(PlanKey key, bool exact) {
  key.request.exact = exact;
  key.request.algorithm = static_cast<int32_t>(ForwardAlgorithm::direct);
  return plan_for(key);
}

// The plan of a call whose key it is. Winograd's sums overflow sooner than direct convolution's, so that a call whose
// elements are large gets the plan of direct convolution instead. `plan` is what the key alone gives.
template <class T>
const ConvPlan& plan_of_call(const ConvKernels<T>& kernels, const ConvCall<T>& call, const PlanKey& key,
                             const ConvPlan& plan) {
  return !plan.needs_moderate || kernels.is_moderate(call) ? plan : plan_of_direct(key, true);
}

// Runs a call in which the plan and the packed weight are still missing, by what the call's key alone gives as its
// plan. `packed_for(plan)` returns the weight in the plan's packed format, or null to pack it here.
template <class T, class PackedFor>
void run_planned_conv(const ConvKernels<T>& kernels, ConvCall<T>& call, int64_t dims, const PlanKey& key,
                      const ConvPlan& given, const PackedFor& packed_for) {
  const ConvPlan& plan = plan_of_call(kernels, call, key, given);
  const Compute<T>* const packed = packed_for(plan);
  if (plan.algorithm != ForwardAlgorithm::stock) return run_by_plan(kernels, call, plan, packed);
  if (run_by_stock(kernels, call, dims)) return;
  run_by_plan<T>(kernels, call, plan_of_direct(key, key.request.exact), nullptr);
}

// The same, planned here. `algorithm` is the algorithm to take, or -1 to choose one.
template <class T, class PackedFor>
void run_conv_forward(ConvCall<T>& call, int64_t dims, bool input_channels_last, bool output_channels_last,
                      int64_t algorithm, const PackedFor& packed_for) {
  const ConvKernels<T>& kernels = conv_kernels().get<T>();
  const PlanKey key = plan_key<T>(kernels, call.geometry, input_channels_last, output_channels_last, algorithm);
  run_planned_conv(kernels, call, dims, key, plan_for(key), packed_for);
}

}  // namespace fastnn
