// Backward: which algorithm a call takes.
#include "conv_relu_max_pool.h"

#include "conv_backward.h"
#include "conv_backward_depthwise.h"
#include "conv_winners.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

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
void backward(const ConvPoolBackward<T>& call, int64_t first_image, int64_t last_image, int64_t first_block,
              int64_t last_block, Compute<T>* grad_weight, Compute<T>* lost, Compute<T>* grad_bias, void* scratch) {
  return (is_depthwise(call) ? backward_depthwise<T> : backward_runs<T>)(call, first_image, last_image, first_block,
                                                                         last_block, grad_weight, lost, grad_bias,
                                                                         scratch);
}

template <class T>
void unpack_weight(const ConvPoolBackward<T>& call, const Compute<T>* grad_weight, T* to, const ConvLayout& layout) {
  return is_depthwise(call) ? unpack_depthwise(call, grad_weight, to, layout)
                            : unpack_runs(call, grad_weight, to, layout);
}

template <class T>
constexpr ConvBackwardKernels<T> kernels() {
  return {plan<Compute<T>>, pack<T>, backward<T>, unpack_weight<T>, store_computed<T>, winners_are_valid<T>};
}

}  // namespace

extern const ConvBackwardTable conv_backward_kernels = {kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
