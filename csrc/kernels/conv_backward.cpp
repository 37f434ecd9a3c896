// Backward: which algorithm a call takes.
#include "conv_relu_max_pool.h"

#include "conv_backward.h"
#include "conv_backward_depthwise.h"
#include "conv_spread.h"
#include "conv_winners.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

template <class T>
int64_t groups_to_join(const ConvPoolGeometry& g, const T* grad_output, const ConvLayout& layout) {
  const int64_t count = depthwise_pays<Compute<T>>(g) ? 1 : cheapest_join<Compute<T>>(g);
  // Infinity times the zeros between groups would be NaN.
  return count > 1 && gradients_are_finite(g, grad_output, layout) ? count : 1;
}

template <class C>
ConvPoolBackwardPlan plan(const ConvPoolGeometry& g) {
  return depthwise_pays<C>(g) ? plan_depthwise_backward<C>(g) : plan_runs<C>(g);
}

template <class T>
bool is_depthwise(const ConvPoolBackward<T>& call) {
  return call.plan.algorithm == ConvBackwardAlgorithm::depthwise;
}

template <class T>
void pack(const ConvPoolBackward<T>& call) {
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
void turn(const T* from, int64_t rows, int64_t columns, T* to) {
  transpose_matrix(from, columns, rows, columns, to, rows);
}

template <class T>
constexpr ConvBackwardKernels<T> kernels() {
  return {groups_to_join<T>,
          plan<Compute<T>>,
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
