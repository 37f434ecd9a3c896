// The register tile of conv_dots.h.
#pragma once

#include "conv_dots_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// x, negative where `negative` is -0 rather than 0.
template <class V>
FASTNN_INLINE V with_sign_of(V x, V negative) {
  typedef decltype(x < negative) Bits;
  return (V)((Bits)x | (Bits)negative);
}

// The register tile: dot products of `pixels` conv pixels by `outputs` weights -> to [conv pixel][lane], by vectors of
// elements E. Input that lies `ahead` elements behind what is read is asked for, if `asks`.
template <int pixels, int outputs, bool asks, class E, class In, class T, class C = Compute<T>>
FASTNN_INLINE void dots_tile(const In* input, const DotPixel* at, int64_t ahead, const T* weight, int64_t output_step,
                             const DotSteps& of, const C* bias, C* to) {
  const DotStep* const steps = of.steps;
  const int64_t whole = of.whole, count = of.count;
  const int rest = of.rest;
  const In* from[pixels];
  for (int p = 0; p < pixels; ++p) from[p] = input + at[p].input;
  // From -0, which adds nothing to -0: all that is missing in a vector is 0 by -0.
  Vec<C> total[pixels * outputs][1];
#pragma GCC unroll 16
  for (int i = 0; i < pixels * outputs; ++i) total[i][0] = -Vec<C>{};
  const auto add = [&](const Vec<C>(&value)[pixels], const Vec<C>(&factor)[outputs]) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
      for (int o = 0; o < outputs; ++o) {
        total[p * outputs + o][0] = add_products<E>(value[p], factor[o], total[p * outputs + o][0]);
      }
    }
  };
  sum_in_parts(whole, total, [&](int64_t k) __attribute__((always_inline)) {
    Vec<C> value[pixels], factor[outputs];
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) {
      value[p] = load_numbers<E>(from[p] + steps[k].input);
      if (asks) __builtin_prefetch(from[p] + steps[k].input + ahead);
    }
#pragma GCC unroll 4
    for (int o = 0; o < outputs; ++o) factor[o] = load_numbers<E>(weight + o * output_step + steps[k].weight);
    add(value, factor);
  });
  const Vec<C> missing = negative_zeros_beyond<E>(rest);
  for (int64_t k = whole; k < count; ++k) {
    Vec<C> value[pixels], factor[outputs];
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) value[p] = load_numbers<E>(from[p] + steps[k].input, rest);
#pragma GCC unroll 4
    for (int o = 0; o < outputs; ++o) {
      factor[o] = with_sign_of(load_numbers<E>(weight + o * output_step + steps[k].weight, rest), missing);
    }
    add(value, factor);
  }
  constexpr int sum_count = pixels * outputs, together = kLanes<C>;
  C sums[sum_count + together];
#pragma GCC unroll 4
  for (int first = 0; first < sum_count; first += together) {
    Vec<C> rows[together] = {};
    constexpr int most = sum_count < together ? sum_count : together;
#pragma GCC unroll 16
    for (int i = 0; i < most; ++i) {
      if (first + i < sum_count) rows[i] = total[first + i][0];
    }
    store(sums + first, sum_each<C>(rows));
  }
  const int64_t first = at[0].conv;
  const bool consecutive = at[pixels - 1].conv == first + pixels - 1;
  for (int p = 0; p < pixels; ++p) {
    for (int o = 0; o < outputs; ++o)
      to[(consecutive ? first + p : at[p].conv) * kLanes<C> + o] = sums[p * outputs + o] + bias[o];
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
