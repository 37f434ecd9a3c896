#include "conv_relu_max_pool.h"

#include "conv_backward.h"
#include "conv_direct.h"
#include "conv_lanes.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// The algorithm with the larger share of useful multiplications: direct convolution idles the lanes that a group's
// output channels don't fill.
template <class C>
ConvPoolPlan plan(const ConvPoolGeometry& g, const ConvLayout& input, int64_t threads) {
  const double direct = static_cast<double>(g.out_channels) / round_up(g.out_channels, kLanes<C>);
  if (direct < 1) {
    const LanesPlan lanes = plan_lanes<C>(g);
    if (lanes.useful > direct) return lanes.plan;
  }
  return plan_direct<C>(g, input, threads);
}

template <class T>
void pack(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item) {
  if (call.plan.algorithm == ConvAlgorithm::lanes) return pack_lanes(call);
  pack_direct(call, first_item, last_item);
}

template <class T>
void forward(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  if (call.plan.algorithm == ConvAlgorithm::lanes) return forward_lanes(call, first_item, last_item, scratch);
  forward_direct(call, first_item, last_item, scratch);
}

template <class T>
constexpr ConvPoolKernels<T> kernels() {
  return {plan<Compute<T>>, pack<T>,          forward<T>,        plan_backward<Compute<T>>, pack_backward<T>,
          backward<T>,      unpack_weight<T>, store_computed<T>, winners_are_valid<T>};
}

}  // namespace

extern const ConvPoolTable conv_relu_max_pool_kernels = {kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
