// Backward by Winograd: the input's gradient is a forward call, the weight's and the bias's are made tile by tile.
#pragma once

#include "conv_stock_backward.h"

namespace fastnn {

// The output's gradient and its winners, of the same layout and without gaps: the given ones, or copies.
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

// The input's gradient, by the weight turned around.
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

// The gradients of weight and bias, of which one that is not wanted is empty.
template <class T>
void weight_gradient_by_winograd(const ConvBackwardKernels<T>& kernels, const ConvBackward<T>& call, double work,
                                 const Tensor& grad_weight, const Tensor& grad_bias) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const WinogradBackwardPlan& plan = call.plan->winograd;
  const bool weight_wanted = grad_weight.numel() > 0, bias_wanted = grad_bias.numel() > 0;
  const int64_t threads = useful_threads(work / 2), most = std::min(plan.tiles, plan.part * threads);
  const int64_t scratch_size = whole_lines(kernels.scratch_size(call)), positions = kWinogradPositions;
  const Scratch<C> inputs(positions * plan.input_step(weight_wanted ? most : 0));
  const Scratch<C> gradients(positions * plan.gradient_step(most));
  const Scratch<C> sums(positions * plan.sums_step(weight_wanted ? g.in_channels : 0));
  const Scratch<double> bias(g.groups * g.out_channels);
  const Scratch<char> scratch(checked_product(threads, scratch_size));
  std::fill_n(bias.get(), g.groups * g.out_channels, 0.0);
  for (int64_t group = 0; group < g.groups; ++group) {
    WinogradTiles<C> tiles{};
    tiles.group = group;
    tiles.inputs = inputs.get();
    tiles.gradients = gradients.get();
    tiles.sums = weight_wanted ? sums.get() : nullptr;
    tiles.bias = bias_wanted ? bias.get() + group * g.out_channels : nullptr;
    for (; tiles.first < plan.tiles; tiles.first = tiles.last) {
      tiles.last = std::min(tiles.first + most, plan.tiles);
      parallel_chunks(threads, tiles.last - tiles.first, [&](int64_t chunk, int64_t first, int64_t last) {
        kernels.transform_tiles(call, tiles, first, last, scratch.get() + chunk * scratch_size);
      });
      parallel_chunks(threads, positions * plan.blocks,
                      [&](int64_t, int64_t first, int64_t last) { kernels.multiply_tiles(call, tiles, first, last); });
    }
    if (!weight_wanted) continue;
    parallel_chunks(threads, plan.pieces, [&](int64_t, int64_t first, int64_t last) {
      kernels.write_weight_gradient(call, tiles, first, last, mutable_data<T>(grad_weight),
                                    PlainImages(grad_weight).layout);
    });
  }
  if (bias_wanted) std::copy_n(bias.get(), g.groups * g.out_channels, mutable_data<T>(grad_bias));
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
