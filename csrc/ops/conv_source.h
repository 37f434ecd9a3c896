// What forward reads: its arguments, or copies with channels last where these cost less than they save.
#pragma once

#include "conv_by_stock.h"

namespace fastnn {

struct ConvSource {
  Tensor input, weight;
};

// In vector multiply-adds, for all images; 0 if it is not known.
template <class T>
double planned_cost(ConvPoolGeometry g, ConvLayout input, const ConvLayout& weight) {
  constexpr double kPack = 2;  // an element of the weight: plans that need not pack it have it subtracted
  skip_unused(g, input);
  const ConvPoolPlan plan = conv_forward_kernels().get<T>().plan(g, input, weight, 1, false);
  if (plan.cost == 0) return 0;
  return plan.cost * static_cast<double>(g.batch) + kPack * static_cast<double>(g.groups * g.out_channels * g.depth());
}

// Of a copy, in the same.
inline double turn_cost(const Tensor& tensor) {
  constexpr double kCopy = 5000, kTurn = 0.8, kFromMemory = 2;  // at all, and an element
  constexpr int64_t kCache = 2 << 20;
  const int64_t elements = tensor.numel();
  const double element = elements * tensor.element_size() <= kCache ? kTurn : kFromMemory;
  return kCopy + element * static_cast<double>(elements);
}

// Contiguous images of many channels have short runs where there is much to read at once. So both are planned for, the
// weight as it is and channels last.
template <class T>
ConvSource cheapest_source(const ConvPoolProblem& problem, const Tensor& input, const Tensor& weight) {
  constexpr double kWorthPlanning = 50'000, kGain = 0.86;
  constexpr int64_t kManyChannels = 16;
  const ConvPoolGeometry& g = problem.geometry;
  ConvSource source = {input.borrow(), weight.borrow()};
  const int64_t channels = g.groups * g.in_channels;
  const int64_t pixels = g.input[0] * g.input[1] * g.input[2];
  if (!input.is_contiguous() || g.in_channels < kManyChannels || pixels == 1) return source;
  const ConvLayout input_last = dense_last(channels, g.input), weight_layout = layout_of(weight);
  const double as_it_is = planned_cost<T>(g, layout_of(input), weight_layout);
  if (as_it_is < kWorthPlanning) return source;
  const double turn = turn_cost(input);
  const double turned = turn + planned_cost<T>(g, input_last, weight_layout);
  const double both =
      !weight.is_contiguous() || g.taps() == 1
          ? turned
          : turn + turn_cost(weight) + planned_cost<T>(g, input_last, dense_last(g.in_channels, g.kernel));
  if (std::min(turned, both) > kGain * as_it_is) return source;
  source.input = in_format(input, true);
  if (both < turned) source.weight = in_format(weight, true);
  return source;
}

}  // namespace fastnn
