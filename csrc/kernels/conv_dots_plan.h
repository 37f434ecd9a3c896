// What conv_dots.h works on: the runs that input and weight have in common, scratch memory, the plan and its cost.
#pragma once

#include "conv_direct_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kDotPixels = 4, kDotOutputs = 4;  // of a register tile
constexpr int64_t kDotBufferBytes = 256 << 10;  // conv pixels of the images worked on together, or copies under them

// The depth of the product as runs of consecutive elements, of the input as of the weight: `length` of them, the
// others' dimensions outside, the innermost last.
struct DotRuns {
  int64_t length, count;
  int64_t size[4], input[4], weight[4];  // of the dimensions outside: steps in input and weight
  int outside;
};

FASTNN_INLINE DotRuns dot_runs(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& weight) {
  const bool channels_last = weight.c == 1 && g.in_channels > 1;
  const int order[2][4] = {{0, 1, 2, 3}, {1, 2, 3, 0}};  // channels are dimension 0
  DotRuns runs = {1, 1, {}, {}, {}, 0};
  for (int i = 3; i >= 0; --i) {
    const int d = order[channels_last][i];
    const int64_t size = d == 0 ? g.in_channels : g.kernel[d - 1];
    const int64_t in = d == 0 ? input.c : input.d[d - 1] * g.dilation[d - 1];
    const int64_t of = d == 0 ? weight.c : weight.d[d - 1];
    if (size == 1) continue;
    if (runs.outside == 0 && in == runs.length && of == runs.length) {
      runs.length *= size;
      continue;
    }
    runs.count *= size;
    runs.size[runs.outside] = size;
    runs.input[runs.outside] = in;
    runs.weight[runs.outside++] = of;
  }
  return runs;
}

// A vector of the input and of the weight, from the first element of each under a conv pixel.
struct DotStep {
  int64_t input, weight;
};

// Whether the input under a conv pixel is copied with channels last: in the weight's order. That of a kernel of one
// element has no order.
FASTNN_INLINE bool dot_copy_is_last(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& weight) {
  return weight.c == 1 && g.in_channels > 1 && (g.taps() > 1 || input.c == 1);
}
FASTNN_INLINE ConvLayout dot_copy_layout(const ConvPoolGeometry& g, bool is_last) {
  const int64_t pixel = is_last ? g.in_channels : 1;
  return {g.depth(), pixel > 1 ? 1 : g.taps(), {pixel * g.kernel[1] * g.kernel[2], pixel * g.kernel[2], pixel}};
}

template <class C>
struct DotsScratch {
  C* copy;  // [image][conv pixel][depth]
  C* conv;  // [image][conv pixel][lane]: outputs of a vector
  C* stage;
  uint8_t* winner_stage;
  int64_t* pixels;  // where each conv pixel's input begins
  DotStep* steps;   // whole vectors of all runs, then what is left of each
  WindowRow<C>* window_rows;
  int64_t* tags;
  int64_t images;
  int64_t size;

  DotsScratch(const ConvPoolGeometry& g, const ConvPoolPlan& plan, void* memory) {
    const int64_t conv_pixels = g.conv[0] * g.conv[1] * g.conv[2];
    images = plan.band;
    MemoryParts parts(memory);
    copy = parts.take<C>(plan.in_place ? 0 : images * conv_pixels * g.depth());
    conv = parts.take<C>(images * conv_pixels * kLanes<C>);
    stage = parts.take<C>(g.pixels() * kLanes<C>);
    winner_stage = parts.take<uint8_t>(g.pixels() * kLanes<C>);
    pixels = parts.take<int64_t>(images * conv_pixels);
    steps = parts.take<DotStep>(plan.columns);
    window_rows = parts.take<WindowRow<C>>(g.pool_kernel[0] * g.pool_kernel[1]);
    tags = parts.take<int64_t>(g.conv[0] * g.conv[1]);
    size = parts.used();
  }
};

// Whether input and weight have long enough runs in common.
FASTNN_INLINE bool dots_stay_in_place(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& weight) {
  constexpr int64_t kShortest = 16;
  const bool padded = g.padding[0] > 0 || g.padding[1] > 0 || g.padding[2] > 0;
  return !padded && dot_runs(g, input, weight).length >= kShortest;
}

// Otherwise, whether the weight of an output is one run, and a copy of what is under a conv pixel can be made.
FASTNN_INLINE bool dots_apply(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& weight) {
  const bool dilated = g.dilation[0] > 1 || g.dilation[1] > 1 || g.dilation[2] > 1;
  const bool is_last = dot_copy_is_last(g, input, weight);
  return dots_stay_in_place(g, input, weight) ||
         (!dilated && (input.c == 1 || !is_last) && dot_runs(g, dot_copy_layout(g, is_last), weight).count == 1);
}

// Here `columns` counts the vectors of the depth, `band` the images worked on together.
template <class T>
ConvPoolPlan plan_dots(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& weight, int64_t threads) {
  using C = Compute<T>;
  ConvPoolPlan plan = {};
  plan.algorithm = ConvAlgorithm::dots;
  plan.in_place = dots_stay_in_place(g, input, weight);
  const DotRuns runs = dot_runs(g, input, weight);
  plan.columns = plan.in_place ? runs.count * divide_up(runs.length, kLanes<C>) : divide_up(g.depth(), kLanes<C>);
  const int64_t pixels = g.conv[0] * g.conv[1] * g.conv[2], pixel = plan.in_place ? kLanes<C> : g.depth();
  const int64_t blocks = divide_up(g.out_channels, kLanes<C>);
  plan.band = smaller(g.batch, larger(1, kDotBufferBytes / (pixels * pixel * static_cast<int64_t>(sizeof(C)))));
  // Threads share the outputs, so that each reads but its part of the weight, then the images.
  plan.block_parts = smaller(blocks, divide_up(threads, g.groups));
  if (g.groups * plan.block_parts < threads) {
    plan.band = smaller(plan.band, divide_up(g.batch * g.groups * plan.block_parts, threads));
  }
  plan.items = divide_up(g.batch, plan.band) * g.groups * plan.block_parts;
  plan.scratch_size = DotsScratch<C>(g, plan, nullptr).size;
  return plan;
}

// Of packing the weight, which this saves, for one image and group.
template <class C>
double packing_cost(const ConvPoolGeometry& g) {
  constexpr double kPack = 2;  // an element
  return kPack * static_cast<double>(g.out_channels * g.depth()) / static_cast<double>(g.batch);
}

// For one image and group.
template <class T>
double dots_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& weight,
                 const ConvPoolPlan& plan) {
  using C = Compute<T>;
  constexpr double kSum = 12, kWayOut = 12;  // of the sum of a vector's lanes; of pooled pixels
  // Of a product's vector. Each tile widens what it loads, for as many products as it has outputs or pixels.
  constexpr double kStep = 1.2, kWiden = sizeof(T) < sizeof(C) ? 3 : 0;
  const double inputs = plan.in_place ? 1 / static_cast<double>(smaller(g.out_channels, kDotOutputs)) : 0;
  const double step = kStep + kWiden * (inputs + 1.0 / kDotPixels);
  const int64_t pixels = g.conv[0] * g.conv[1] * g.conv[2], blocks = divide_up(g.out_channels, kLanes<C>);
  const double dots = static_cast<double>(round_up(pixels * plan.band, kDotPixels) / plan.band * g.out_channels);
  const double windows =
      static_cast<double>(blocks * g.pixels()) * (kWayOut + place_cost(g) * static_cast<double>(g.places()));
  constexpr double kCopiedRun = 15;
  const int64_t runs = (dot_copy_is_last(g, input, weight) ? 1 : g.in_channels) * g.kernel[0] * g.kernel[1];
  const double copy = static_cast<double>(pixels) * (kCopiedRun * runs + kCopyCost * static_cast<double>(g.depth()));
  return dots * (step * static_cast<double>(plan.columns) + kSum) + windows + (plan.in_place ? 0 : copy);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
