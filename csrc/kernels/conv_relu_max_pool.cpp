#include "conv_relu_max_pool.h"

#include "conv_backward.h"
#include "conv_direct.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

template <class T>
constexpr ConvPoolKernels<T> kernels() {
  return {plan_direct<Compute<T>>,   pack_direct<T>,    forward_direct<T>,
          plan_backward<Compute<T>>, pack_backward<T>,  backward<T>,
          unpack_weight<T>,          store_computed<T>, winners_are_valid<T>};
}

}  // namespace

extern const ConvPoolTable conv_relu_max_pool_kernels = {kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
