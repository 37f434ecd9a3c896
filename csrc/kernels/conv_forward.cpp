// Forward: which algorithm a call takes.
#include "conv_relu_max_pool.h"

#include "conv_depthwise.h"
#include "conv_direct.h"
#include "conv_direct_cost.h"
#include "conv_dots.h"
#include "conv_lanes.h"
#include "conv_rows.h"
#include "conv_turn.h"
#include "conv_windows.h"
#include "conv_winograd.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

template <class T>
constexpr bool kHasWinograd = sizeof(Compute<T>) == sizeof(float);

// Direct convolution, by several channels at a time or a matrix unit where that is cheaper. The weight serves `images`.
template <class T>
ConvPoolPlan plan_tiles(const ConvPoolGeometry& g, const ConvLayout& input, int64_t images, int64_t threads, bool exact,
                        double& costs) {
  using C = Compute<T>;
  ConvPoolPlan least = choose_direct<T, C>(g, input, threads, sizeof(T) == sizeof(C), costs);
  const auto take_cheaper = [&](const ConvPoolPlan& plan, double plan_costs) {
    if (plan_costs >= costs) return;
    costs = plan_costs;
    least = plan;
  };
  double element_costs;
  const auto consider_elements = [&](auto element) {
    using E = decltype(element);
    const bool lies = lies_in_elements<E>(g, input);
    const ConvLayout layout = lies ? tile_layout<E>(input) : input;
    const ConvPoolPlan plan = choose_direct<T, E>(tile_geometry<E>(g), layout, threads, lies, element_costs);
    constexpr double kPackFloats = 0.75;  // of what packing takes, which is not counted elsewhere, in addition
    if (kIsOfFloats<E>) element_costs += kPackFloats * packing_cost(g, images);
    take_cheaper(plan, element_costs);
  };
  if constexpr (kHasFloats<T>) {
    if (floats_apply(g)) consider_elements(FourFloats{});
    // For the other algorithms, whose estimates are too high where outputs are few.
    constexpr double kDoubt = 1.2;
    if (least.algorithm != ConvAlgorithm::direct) costs *= kDoubt;
  }
  if (!kHasPairs<T> || !isa_multiplies_pairs()) return least;
  consider_elements(bfloat16x2{});
  if (row_pairs_apply(g) && (!exact || !row_pairs_reach_beyond(g))) {
    const ConvPoolPlan row_pairs = choose_direct<T, FirstOfPair>(g, input, threads, false, element_costs);
    take_cheaper(row_pairs, element_costs);
  }
  if (isa_multiplies_matrices() && (!exact || elements_behind<MatrixNumber>(g) == 0)) {
    const bool stays = matrix_stays_in_place(g, input);
    const ConvPoolPlan matrix = plan_direct<T, MatrixNumber>(g, input, threads, stays, TileWay::as_it_lies);
    take_cheaper(matrix, direct_cost<MatrixNumber>(g, input, matrix));
  }
  return least;
}

// The algorithm that is cheapest, by a count of vector multiply-adds for one image and group: for a single thread,
// since the choice must not depend on their number, nor with it the order of summation. The weight serves `images`.
template <class T>
ConvPoolPlan plan_as_it_lies(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& weight,
                             int64_t images, int64_t threads, bool exact) {
  using C = Compute<T>;
  double least_costs;
  ConvPoolPlan least = plan_tiles<T>(g, input, images, threads, exact, least_costs);
  // Of equal ones the first.
  const auto consider = [&](double costs, const auto& plan) {
    if (costs >= least_costs) return;
    least_costs = costs;
    least = plan();
  };
  // Beside those of tiles, the estimates of dots and lanes, and of windows.
  constexpr double kTooHigh = 0.9, kWindowsTooHigh = 0.95;
  const double tiles_costs = least_costs;
  double costs = 0;
  ConvPoolPlan candidate;
  if (plan_dots<T>(g, input, weight, images, threads, candidate, costs)) {
    consider(kTooHigh * costs - packing_cost(g, images), [&] { return candidate; });
  }
  const bool has_pairs = kHasPairs<T> && isa_multiplies_pairs();
  if constexpr (kHasWinograd<T>) {
    // A matrix unit, which makes more products at a time than this saves, has its own way.
    if (!exact && !(has_pairs && isa_multiplies_matrices()) && winograd_applies(g)) {
      candidate = choose_winograd<T>(g, images, threads, costs);
      consider(costs - packing_cost(g, images), [&] { return candidate; });
    }
  }
  if (!exact && !has_pairs && kHasPhases<C> && phases_apply(g)) {
    candidate = plan_phases<T>(g, input, threads);
    consider(phases_cost<C>(g, input, candidate), [&] { return candidate; });
  }
  // The others, which save no products, cannot gain on what takes little else.
  const double products = static_cast<double>(g.out_channels * g.depth() * g.conv[0] * g.conv[1] * g.conv[2]);
  const int64_t together = has_pairs ? 2 * kLanes<C> : kLanes<C>;
  if (least_costs < tiles_costs || least_costs >= 1.02 * products / static_cast<double>(together)) {
    if (depthwise_applies(g)) {
      candidate = choose_depthwise<T>(g, input, threads, costs);
      consider(costs, [&] { return candidate; });
    }
    if (windows_apply<C>(g)) {
      consider(kWindowsTooHigh * windows_cost<C>(g, input, plan_windows<T>(g, 1)),
               [&] { return plan_windows<T>(g, threads); });
    }
    const auto consider_rows = [&](auto element) {
      using E = decltype(element);
      if (!rows_apply(g) || !has_row_elements<E>(g, input)) return;
      candidate = plan_rows<E, T>(g, input, 1);
      consider(rows_cost<E, T>(g, input, candidate), [&] { return plan_rows<E, T>(g, input, threads); });
    };
    consider_rows(C{});
    if constexpr (kHasPairs<T>) {
      if (has_pairs) consider_rows(bfloat16x2{});
    }
    const LanesPlan lanes = plan_lanes<C>(g, 1);
    if (lanes.useful > 0) {
      consider(kTooHigh * lanes_cost<C>(g, input, lanes), [&] { return plan_lanes<C>(g, threads).plan; });
    }
  }
  least.cost = least_costs * static_cast<double>(g.groups);
  return least;
}

// Channels that lie apart are short runs where there is much to read at once, and no pairs: it may be cheaper to bring
// images into channels last first, while they are in cache.
template <class T>
ConvPoolPlan plan(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& weight, int64_t threads,
                  bool exact) {
  constexpr double kWorthPlanning = kHasPairs<T> ? 0 : 20'000;
  const ConvPoolPlan plan = plan_as_it_lies<T>(g, input, weight, g.batch, threads, exact);
  if (!can_turn<T>(g, input) || plan.cost * static_cast<double>(g.batch) < kWorthPlanning) return plan;
  ConvPoolGeometry some = g;
  some.batch = images_to_turn<T>(g);
  const ConvLayout layout = turned_layout<T>(g);
  // Estimates of pairs are too low by what packing takes for each lot of images.
  const int64_t packed_for = kHasPairs<T> ? some.batch : g.batch;
  ConvPoolPlan turned = plan_as_it_lies<T>(some, layout, weight, packed_for, threads, exact);
  turned.turned_images = some.batch;
  turned.turned_layout = layout;
  turned.cost += turn_cost<T>(g, input);
  return turned.cost < plan.cost ? turned : plan;
}

// Whether every element is finite, and small enough for the transforms: whether the sum of their squares, scaled so
// that no product of two such elements can overflow, is finite.
template <class T>
bool all_moderate(const T* data, int64_t outer, const ConvLayout& layout, int64_t channels, const int64_t (&size)[3]) {
  using C = Compute<T>;
  struct Dimension {
    int64_t size, step;
  };
  const Dimension channel = {channels, layout.c}, column = {size[2], layout.d[2]};
  const bool channels_inside = layout.c == 1;
  // The innermost last; those that follow one another without a gap become one.
  const Dimension all[5] = {{outer, layout.n},
                            channels_inside ? Dimension{size[0], layout.d[0]} : channel,
                            channels_inside ? Dimension{size[1], layout.d[1]} : Dimension{size[0], layout.d[0]},
                            channels_inside ? column : Dimension{size[1], layout.d[1]},
                            channels_inside ? channel : column};
  Dimension inner = all[4];
  int left = 4;
  while (left > 0 && (all[left - 1].size == 1 || all[left - 1].step == inner.size * inner.step)) {
    inner.size *= all[--left].size;
  }
  int64_t runs = 1;
  for (int i = 0; i < left; ++i) runs *= all[i].size;
  Vec<C> total = {};
  for (int64_t run = 0; run < runs; ++run) {
    const T* from = data;
    for (int64_t i = left - 1, rest = run; i >= 0; rest /= all[i--].size) from += rest % all[i].size * all[i].step;
    if (inner.step == 1) {
      total = add_squares(from, inner.size, total);
      continue;
    }
    constexpr int64_t some = 4 * kLanes<C>;
    C elements[some];
    for (int64_t first = 0; first < inner.size; first += some) {
      const int64_t here = smaller(some, inner.size - first);
      copy_run(from + first * inner.step, inner.step, here, elements);
      total = add_squares(elements, here, total);
    }
  }
  return is_finite<C>(total);
}

template <class T>
bool plan_holds(const ConvPoolForward<T>& call) {
  const ConvPoolGeometry& g = call.geometry;
  const ConvAlgorithm algorithm = call.plan.algorithm;
  const bool transforms = algorithm == ConvAlgorithm::winograd || algorithm == ConvAlgorithm::phases;
  const bool reaches_beyond = (algorithm == ConvAlgorithm::row_pairs && row_pairs_reach_beyond(g)) ||
                              (algorithm == ConvAlgorithm::matrix && elements_behind<MatrixNumber>(g) > 0);
  if (!transforms && !reaches_beyond) return true;
  if (!all_moderate(call.input, g.batch, call.input_layout, g.groups * g.in_channels, g.input)) return false;
  return !transforms ||
         all_moderate(call.weight, g.groups * g.out_channels, call.weight_layout, g.in_channels, g.kernel);
}

template <class T>
void pack(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item) {
  switch (call.plan.algorithm) {
    case ConvAlgorithm::direct:
      return pack_direct<Compute<T>>(call, first_item, last_item);
    case ConvAlgorithm::pairs:
      if constexpr (kHasPairs<T>) pack_direct<bfloat16x2>(call, first_item, last_item);
      return;
    case ConvAlgorithm::row_pairs:
      if constexpr (kHasPairs<T>) pack_direct<FirstOfPair>(call, first_item, last_item);
      return;
    case ConvAlgorithm::matrix:
      if constexpr (kHasPairs<T>) pack_direct<MatrixNumber>(call, first_item, last_item);
      return;
    case ConvAlgorithm::by_four:
      if constexpr (kHasFloats<T>) pack_direct<FourFloats>(call, first_item, last_item);
      return;
    case ConvAlgorithm::rows:
      return pack_blocks<Compute<T>>(call, kRowOutputs, first_item, last_item);
    case ConvAlgorithm::rows_by_two:
      if constexpr (kHasPairs<T>) pack_blocks<bfloat16x2>(call, kRowOutputs, first_item, last_item);
      return;
    case ConvAlgorithm::windows:
      return pack_blocks<Compute<T>>(call, window_outputs(pixels_together(call.geometry)), first_item, last_item);
    case ConvAlgorithm::lanes:
      return pack_blocks<Compute<T>>(call, kLaneOutputs, first_item, last_item);
    case ConvAlgorithm::depthwise:
      return pack_depthwise(call, first_item, last_item);
    case ConvAlgorithm::winograd:
      if constexpr (kHasWinograd<T>) pack_winograd(call, first_item, last_item);
      return;
    case ConvAlgorithm::phases:
      if constexpr (kHasWinograd<T>) pack_phases(call, first_item, last_item);
      return;
    case ConvAlgorithm::dots:
      return pack_dots(call, first_item, last_item);
  }
}

template <class T>
void forward(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  switch (call.plan.algorithm) {
    case ConvAlgorithm::direct:
    case ConvAlgorithm::phases:
      return forward_direct<Compute<T>>(call, first_item, last_item, scratch);
    case ConvAlgorithm::pairs:
      if constexpr (kHasPairs<T>) forward_direct<bfloat16x2>(call, first_item, last_item, scratch);
      return;
    case ConvAlgorithm::row_pairs:
      if constexpr (kHasPairs<T>) forward_direct<FirstOfPair>(call, first_item, last_item, scratch);
      return;
    case ConvAlgorithm::matrix:
      if constexpr (kHasPairs<T>) forward_direct<MatrixNumber>(call, first_item, last_item, scratch);
      return;
    case ConvAlgorithm::by_four:
      if constexpr (kHasFloats<T>) forward_direct<FourFloats>(call, first_item, last_item, scratch);
      return;
    case ConvAlgorithm::rows:
      return forward_rows<Compute<T>>(call, first_item, last_item, scratch);
    case ConvAlgorithm::rows_by_two:
      if constexpr (kHasPairs<T>) forward_rows<bfloat16x2>(call, first_item, last_item, scratch);
      return;
    case ConvAlgorithm::windows:
      if constexpr (kPoolsInTiles<Compute<T>>) forward_windows(call, first_item, last_item, scratch);
      return;
    case ConvAlgorithm::lanes:
      return forward_lanes(call, first_item, last_item, scratch);
    case ConvAlgorithm::depthwise:
      return forward_depthwise(call, first_item, last_item, scratch);
    case ConvAlgorithm::winograd:
      if constexpr (kHasWinograd<T>) forward_winograd(call, first_item, last_item, scratch);
      return;
    case ConvAlgorithm::dots:
      return forward_dots(call, first_item, last_item, scratch);
  }
}

template <class T>
void turn_input(const ConvPoolForward<T>& call, int64_t parts, int64_t first, int64_t last, T* to) {
  if constexpr (kTurns<T>) turn_images(call, parts, first, last, to);
}

template <class T>
constexpr ConvForwardKernels<T> kernels() {
  return {plan<T>, plan_holds<T>, pack<T>, forward<T>, turn_input<T>};
}

}  // namespace

extern const ConvForwardTable conv_forward_kernels = {kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
