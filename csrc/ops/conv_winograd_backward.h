// Backward by Winograd: the input's gradient is a forward call, the weight's and the bias's are made tile by tile.
#pragma once

#include "conv_stock_backward.h"

namespace fastnn {

// The output's gradient and the argmaxes, in the same layout and without gaps: the given tensors, or copies of them.
template <class T>
struct AlikeGradient {
  Tensor gradient, winners;
  ConvLayout layout;

  AlikeGradient(const ConvBackwardKernels<T>& kernels, const Tensor& grad_output, const Tensor& saved) {
    PlainImages given(grad_output), places(saved);
    layout = places.layout;
    winners = std::move(places.tensor);
    gradient = std::move(given.tensor);
    if (same_layout(given.layout, layout)) return;
    gradient = in_format(kernels, gradient, places.channels_last);
    if (same_layout(PlainImages(gradient).layout, layout)) return;
    gradient = dense(std::move(gradient));
    winners = dense(std::move(winners));
    layout = PlainImages(gradient).layout;
  }
  void give_to(ConvBackward<T>& call) const {
    call.grad_output = data<T>(gradient);
    call.winners = data<uint8_t>(winners);
    call.output_layout = call.winners_layout = layout;
  }
};

// The input's gradient: a forward call with the weight turned around.
template <class T>
void input_gradient_by_winograd(const ConvBackward<T>& call, const Tensor& grad_input) {
  const ConvKernels<T>& kernels = conv_kernels().get<T>();
  const PlainImages result(grad_input);
  ConvCall<T> turned{};
  turned.activation = kIdentity;
  turned.geometry = turned_around(call.geometry);
  turned.turned = true;
  turned.input = call.grad_output;
  turned.input_layout = call.output_layout;
  turned.input_winners = call.winners;
  turned.weight = call.weight;
  turned.weight_layout = call.weight_layout;
  turned.output = mutable_data<T>(grad_input);
  turned.output_layout = result.layout;
  const PlanKey key = plan_key<T>(kernels, turned.geometry, call.output_layout.d[2] != 1, result.channels_last,
                                  static_cast<int64_t>(ForwardAlgorithm::winograd));
  run_by_plan<T>(kernels, turned, plan_for(key), nullptr);
}

// The gradients of weight and bias. A gradient that is not wanted is empty.
template <class T>
void weight_gradient_by_winograd(const ConvBackwardKernels<T>& kernels, const ConvBackward<T>& call, double work,
                                 const Tensor& grad_weight, const Tensor& grad_bias) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const WinogradBackwardPlan& plan = call.plan->winograd;
  const int64_t threads = useful_threads(work / 2), chunks = std::min(threads, plan.items);
  const int64_t scratch_size = whole_lines(kernels.scratch_size(call)), shares = g.groups * plan.shares;
  const bool weight_wanted = grad_weight.numel() > 0;
  const Scratch<double> bias(shares * g.out_channels);
  const Scratch<C> sums(weight_wanted ? shares * kWinogradPositions * plan.sums_step(g.in_channels) : 0);
  const Scratch<char> scratch(checked_product(chunks, scratch_size));
  parallel_chunks(chunks, plan.items, [&](int64_t chunk, int64_t first, int64_t last) {
    kernels.sum_tiles(call, first, last, weight_wanted ? sums.get() : nullptr, bias.get(),
                      scratch.get() + chunk * scratch_size);
  });
  if (weight_wanted) {
    const ConvLayout layout = PlainImages(grad_weight).layout;
    parallel_chunks(std::min(threads, plan.pieces), plan.pieces, [&](int64_t, int64_t first, int64_t last) {
      kernels.write_weight_gradient(call, sums.get(), first, last, mutable_data<T>(grad_weight), layout);
    });
  }
  for (int64_t channel = 0; channel < grad_bias.numel(); ++channel) {
    const double* from = bias.get() + channel / g.out_channels * plan.shares * g.out_channels;
    double total = 0;
    for (int64_t i = 0; i < plan.shares; ++i) total += from[i * g.out_channels + channel % g.out_channels];
    mutable_data<T>(grad_bias)[channel] = static_cast<T>(total);
  }
}

// Gradients that are not wanted are empty.
template <class T>
void gradients_by_winograd(const ConvBackwardKernels<T>& kernels, const ConvBackward<T>& call, double work,
                           const Wanted& wanted, const ConvGradients& gradients) {
  if constexpr (sizeof(T) != 2) {
    if (wanted.input) input_gradient_by_winograd(call, gradients.input);
    if (wanted.weight || wanted.bias) {
      weight_gradient_by_winograd(kernels, call, work, gradients.weight, gradients.bias);
    }
  }
}

}  // namespace fastnn
