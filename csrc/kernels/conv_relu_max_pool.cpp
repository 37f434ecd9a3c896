#include "conv_relu_max_pool.h"

#include "conv_backward.h"
#include "conv_direct.h"
#include "conv_lanes.h"
#include "conv_winners.h"
#include "conv_winograd.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// The share of direct convolution's multiplications that are useful ones: a group's output channels may not fill its
// vectors, and a short row's tile not the multipliers' pipelines.
template <class C>
double direct_useful(const ConvPoolGeometry& g) {
  constexpr double kInFlight = 8;  // accumulators that keep the multipliers busy
  const double lanes = static_cast<double>(g.out_channels) / round_up(g.out_channels, kLanes<C>);
  const int64_t row = smaller(g.conv[2], (g.output[2] - 1) * g.pool_stride[2] + g.pool_extent(2));
  const double accumulators = static_cast<double>(row * smaller(2, divide_up(g.out_channels, kLanes<C>)));
  return accumulators < kInFlight ? lanes * accumulators / kInFlight : lanes;
}

template <class C>
ConvPoolPlan plan(const ConvPoolGeometry& g, const ConvLayout& input, int64_t threads, bool exact) {
  if (!exact && sizeof(C) == sizeof(float) && winograd_pays<C>(g)) return plan_winograd<C>(g);
  const double direct = direct_useful<C>(g);
  if (direct < 1) {
    const LanesPlan lanes = plan_lanes<C>(g);
    if (lanes.useful > direct) return lanes.plan;
  }
  return plan_direct<C>(g, input, threads);
}

template <class T>
bool plan_holds(const ConvPoolForward<T>& call) {
  if (call.plan.algorithm != ConvAlgorithm::winograd) return true;
  const ConvPoolGeometry& g = call.geometry;
  return all_moderate(call.input, g.batch, call.input_layout, g.groups * g.in_channels, g.input) &&
         all_moderate(call.weight, g.groups * g.out_channels, call.weight_layout, g.in_channels, g.kernel);
}

template <class T>
void pack(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item) {
  switch (call.plan.algorithm) {
    case ConvAlgorithm::direct:
      return pack_direct(call, first_item, last_item);
    case ConvAlgorithm::lanes:
      return pack_lanes(call);
    case ConvAlgorithm::winograd:
      return pack_winograd(call, first_item, last_item);
  }
}

template <class T>
void forward(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  switch (call.plan.algorithm) {
    case ConvAlgorithm::direct:
      return forward_direct(call, first_item, last_item, scratch);
    case ConvAlgorithm::lanes:
      return forward_lanes(call, first_item, last_item, scratch);
    case ConvAlgorithm::winograd:
      return forward_winograd(call, first_item, last_item, scratch);
  }
}

template <class T>
constexpr ConvPoolKernels<T> kernels() {
  return {plan<Compute<T>>, plan_holds<T>, pack<T>,          forward<T>,        plan_backward<Compute<T>>,
          pack_backward<T>, backward<T>,   unpack_weight<T>, store_computed<T>, winners_are_valid<T>};
}

}  // namespace

extern const ConvPoolTable conv_relu_max_pool_kernels = {kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
