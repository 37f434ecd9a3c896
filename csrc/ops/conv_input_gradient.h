// The input's gradient where strides are 1: a convolution of the output's gradient, by our forward kernels. Its weight
// is forward's turned around: inputs and outputs have changed places, and the kernel's positions come backwards.
#pragma once

#include "conv_backward.h"
#include "conv_forward.h"

namespace fastnn {

// weight -> `turned`, in channels last: [group][input][kernel position, backwards][output].
template <class T>
void turn_weight(const ConvBackwardKernels<T>& kernels, const ConvBackward<T>& call, T* turned) {
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.weight_layout;
  const int64_t taps = g.taps(), outputs = g.out_channels;
  const Scratch<T> rows(g.depth() * outputs);  // [element of an output's weight, as it lies in memory][output]
  for (int64_t group = 0; group < g.groups; ++group) {
    kernels.turn(call.weight + group * outputs * layout.n, outputs, g.depth(), rows.get());
    for (int64_t c = 0; c < g.in_channels; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap, turned += outputs) {
        std::copy_n(rows.get() + (c * layout.c + (taps - 1 - tap) * layout.d[2]) * outputs, outputs, turned);
      }
    }
  }
}

template <class T>
void input_gradient_by_forward(const ConvBackwardKernels<T>& backward_kernels, const ConvBackward<T>& call,
                               int64_t dims, const Tensor& grad_input) {
  const ConvKernels<T>& kernels = conv_kernels().get<T>();
  const ConvPoolGeometry& g = call.geometry;
  const Scratch<T> weight(checked_product(g.groups * g.in_channels, g.out_channels * g.taps()));
  turn_weight(backward_kernels, call, weight.get());
  const PlainImages result(grad_input);
  ConvCall<T> turned{};
  turned.activation = kIdentity;
  turned.geometry = turned_around(g);
  turned.input = call.grad_output;
  turned.input_layout = call.output_layout;
  turned.weight = weight.get();
  turned.weight_layout = channels_last_layout(g.out_channels, g.kernel);
  turned.output = mutable_data<T>(grad_input);
  turned.output_layout = result.layout;
  const PlanKey key = plan_key<T>(kernels, turned.geometry, call.output_layout.d[2] != 1, result.channels_last, -1);
  run_planned_conv<T>(kernels, turned, dims, key, plan_for(key), nullptr);
}

}  // namespace fastnn
