#include "conv_relu_max_pool.h"

#include "conv_backward.h"
#include "conv_backward_depthwise.h"
#include "conv_depthwise.h"
#include "conv_direct.h"
#include "conv_lanes.h"
#include "conv_rows.h"
#include "conv_winners.h"
#include "conv_winograd.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// The algorithm that is cheapest, by a count of vector multiply-adds for one image and group: for a single thread,
// since the choice must not depend on their number, nor with it the order of summation.
template <class T>
ConvPoolPlan plan(const ConvPoolGeometry& g, const ConvLayout& input, int64_t threads, bool exact) {
  using C = Compute<T>;
  const bool has_pairs = kHasPairs<T> && isa_multiplies_pairs();
  if (!exact && !has_pairs && sizeof(C) == sizeof(float) && winograd_pays<C>(g)) return plan_winograd<C>(g);
  ConvPoolPlan direct = plan_direct<T>(g, input, threads);
  const double least = static_cast<double>(g.out_channels * g.depth() * g.conv[0] * g.conv[1] * g.conv[2]) / kLanes<C>;
  double direct_costs = direct_cost<C>(g, input, direct);
  if (has_pairs) {
    const ConvPoolGeometry in_pairs = tile_geometry<bfloat16x2>(g);
    const ConvPoolPlan pairs = plan_direct<T, bfloat16x2>(in_pairs, input, threads, false);
    const double pairs_costs = direct_cost<C>(in_pairs, input, pairs);
    if (pairs_costs < direct_costs) direct = pairs;
    direct_costs = pairs_costs < direct_costs ? pairs_costs : direct_costs;
  }
  if (direct_costs < 1.02 * least) return direct;
  const LanesPlan lanes = plan_lanes<C>(g);
  const double lanes_costs = lanes.useful > 0 ? lanes_cost<C>(g, input, lanes) : direct_costs;
  const double rows_costs = rows_apply(g) ? rows_cost<C>(g, input, plan_rows<T>(g, input, 1)) : direct_costs;
  const ConvPoolPlan depthwise = depthwise_applies(g) ? plan_depthwise<T>(g, input, threads) : direct;
  const double depthwise_costs = depthwise_applies(g) ? depthwise_cost<C>(g, depthwise) : direct_costs;
  if (depthwise_costs < direct_costs && depthwise_costs < rows_costs && depthwise_costs < lanes_costs) return depthwise;
  if (rows_costs < direct_costs && rows_costs < lanes_costs) return plan_rows<T>(g, input, threads);
  return lanes_costs < direct_costs ? lanes.plan : direct;
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
      return pack_direct<Compute<T>>(call, first_item, last_item);
    case ConvAlgorithm::pairs:
      if constexpr (kHasPairs<T>) pack_direct<bfloat16x2>(call, first_item, last_item);
      return;
    case ConvAlgorithm::rows:
      return pack_rows(call, first_item, last_item);
    case ConvAlgorithm::lanes:
      return pack_lanes(call);
    case ConvAlgorithm::depthwise:
      return pack_depthwise(call, first_item, last_item);
    case ConvAlgorithm::winograd:
      return pack_winograd(call, first_item, last_item);
  }
}

template <class T>
void forward(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  switch (call.plan.algorithm) {
    case ConvAlgorithm::direct:
      return forward_direct<Compute<T>>(call, first_item, last_item, scratch);
    case ConvAlgorithm::pairs:
      if constexpr (kHasPairs<T>) forward_direct<bfloat16x2>(call, first_item, last_item, scratch);
      return;
    case ConvAlgorithm::rows:
      return forward_rows(call, first_item, last_item, scratch);
    case ConvAlgorithm::lanes:
      return forward_lanes(call, first_item, last_item, scratch);
    case ConvAlgorithm::depthwise:
      return forward_depthwise(call, first_item, last_item, scratch);
    case ConvAlgorithm::winograd:
      return forward_winograd(call, first_item, last_item, scratch);
  }
}

template <class T>
int64_t groups_to_join(const ConvPoolGeometry& g, const T* grad_output, const ConvLayout& layout) {
  const int64_t count = depthwise_pays<Compute<T>>(g) ? 1 : cheapest_join<Compute<T>>(g);
  // Infinity times the zeros between groups would be NaN.
  return count > 1 && gradients_are_finite(g, grad_output, layout) ? count : 1;
}

template <class C>
ConvPoolBackwardPlan plan_backward(const ConvPoolGeometry& g) {
  return depthwise_pays<C>(g) ? plan_depthwise_backward<C>(g) : plan_runs<C>(g);
}

template <class T>
bool is_depthwise(const ConvPoolBackward<T>& call) {
  return call.plan.algorithm == ConvBackwardAlgorithm::depthwise;
}

template <class T>
void pack_backward(const ConvPoolBackward<T>& call) {
  return is_depthwise(call) ? pack_depthwise_backward(call) : pack_runs(call);
}

template <class T>
void backward(const ConvPoolBackward<T>& call, const ConvPoolPiece& piece, Compute<T>* grad_weight, Compute<T>* lost,
              Compute<T>* grad_bias, void* scratch) {
  return (is_depthwise(call) ? backward_depthwise<T> : backward_runs<T>)(call, piece, grad_weight, lost, grad_bias,
                                                                         scratch);
}

template <class T>
void unpack_weight(const ConvPoolBackward<T>& call, const Compute<T>* grad_weight, T* to, const ConvLayout& layout) {
  return is_depthwise(call) ? unpack_depthwise(call, grad_weight, to, layout)
                            : unpack_runs(call, grad_weight, to, layout);
}

template <class T>
constexpr ConvPoolKernels<T> kernels() {
  return {plan<T>,           plan_holds<T>,       pack<T>,
          forward<T>,        groups_to_join<T>,   plan_backward<Compute<T>>,
          pack_backward<T>,  backward<T>,         unpack_weight<T>,
          store_computed<T>, winners_are_valid<T>};
}

}  // namespace

extern const ConvPoolTable conv_relu_max_pool_kernels = {kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
