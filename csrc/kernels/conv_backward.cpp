// Backward: which algorithm a call takes.
#include "conv_relu_max_pool.h"

#include "conv_backward.h"
#include "conv_backward_depthwise.h"
#include "conv_backward_pixels.h"
#include "conv_backward_taps.h"
#include "conv_spread.h"
#include "conv_winners.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

template <class T>
int64_t groups_to_join(const ConvPoolGeometry& g, const T* grad_output, const ConvLayout& layout) {
  const int64_t count = cheapest_join<Compute<T>>(g);
  // Infinity times the zeros between groups would be NaN.
  return count > 1 && elements_are_finite(g.batch, g.groups * g.out_channels, g.output, grad_output, layout) ? count
                                                                                                             : 1;
}

template <class T, class C = Compute<T>>
ConvPoolBackwardPlan plan(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& grad_input,
                          bool exact) {
  if (depthwise_pays<C>(g)) return plan_depthwise_backward<C>(g);
  if (!exact && taps_apply(g) && taps_pay<C>(g, input)) return plan_taps<C>(g);
  if (pixels_apply(g, input, grad_input) && pixels_pay(g)) return plan_pixels<C>(g);
  return zipping_pays<T>(g) ? plan_runs<RunElement<T>>(g) : plan_runs<C>(g);
}

template <class T>
bool plan_holds(const ConvPoolBackward<T>& call) {
  const ConvPoolGeometry& g = call.geometry;
  const int64_t channels = g.groups * g.out_channels;
  return !call.plan.needs_finite ||
         (elements_are_finite(g.batch, g.groups * g.in_channels, g.input, call.input, call.input_layout) &&
          elements_are_finite(channels, g.in_channels, g.kernel, call.weight, call.weight_layout));
}

template <class T>
void pack(const ConvPoolBackward<T>& call) {
  switch (call.plan.algorithm) {
    case ConvBackwardAlgorithm::winners:
      return call.plan.zips_runs ? pack_runs<RunElement<T>>(call) : pack_runs<Compute<T>>(call);
    case ConvBackwardAlgorithm::depthwise:
      return pack_depthwise_backward(call);
    case ConvBackwardAlgorithm::pixels:
      return pack_pixels(call);
    case ConvBackwardAlgorithm::taps:
      return pack_taps(call);
  }
}

template <class T>
void backward(const ConvPoolBackward<T>& call, const ConvPoolPiece& piece, Compute<T>* grad_weight, Compute<T>* lost,
              Compute<T>* grad_bias, void* scratch) {
  switch (call.plan.algorithm) {
    case ConvBackwardAlgorithm::winners:
      return call.plan.zips_runs ? backward_runs<RunElement<T>>(call, piece, grad_weight, lost, grad_bias, scratch)
                                 : backward_runs<Compute<T>>(call, piece, grad_weight, lost, grad_bias, scratch);
    case ConvBackwardAlgorithm::depthwise:
      return backward_depthwise(call, piece, grad_weight, lost, grad_bias, scratch);
    case ConvBackwardAlgorithm::pixels:
      return backward_pixels(call, piece, grad_weight, lost, grad_bias, scratch);
    case ConvBackwardAlgorithm::taps:
      return backward_taps(call, piece, grad_weight, lost, grad_bias, scratch);
  }
}

template <class T>
void unpack_weight(const ConvPoolBackward<T>& call, const Compute<T>* grad_weight, T* to, const ConvLayout& layout) {
  switch (call.plan.algorithm) {
    case ConvBackwardAlgorithm::winners:
      return call.plan.zips_runs ? unpack_runs<RunElement<T>>(call, grad_weight, to, layout)
                                 : unpack_runs<Compute<T>>(call, grad_weight, to, layout);
    case ConvBackwardAlgorithm::depthwise:
      return unpack_depthwise(call, grad_weight, to, layout);
    case ConvBackwardAlgorithm::pixels:
      return unpack_pixels(call, grad_weight, to, layout);
    case ConvBackwardAlgorithm::taps:
      return unpack_taps(call, grad_weight, to, layout);
  }
}

template <class T>
void turn(const T* from, int64_t rows, int64_t columns, T* to) {
  transpose_matrix(from, columns, rows, columns, to, rows);
}

template <class T>
constexpr ConvBackwardKernels<T> kernels() {
  return {groups_to_join<T>,
          plan<T>,
          plan_holds<T>,
          pack<T>,
          backward<T>,
          unpack_weight<T>,
          store_computed<T>,
          winners_are_valid<T>,
          spread_scratch_size<Compute<T>>,
          spread_gradients<T>,
          turn<T>};
}

}  // namespace

extern const ConvBackwardTable conv_backward_kernels = {kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
