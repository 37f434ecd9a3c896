// The register tile of conv_depthwise.h.
#pragma once

#include "conv_depthwise_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// `pixels` conv pixels, `step` apart, of a block -> to [pixel][lane]. `count` taps or pairs, then `single` first ones
// of pairs. A block's last vector has `last` channels, if it is `partial`.
template <int pixels, int vectors, bool partial, class E, class C = Compute<E>>
FASTNN_INLINE void depthwise_tile(const DepthwiseTap<E>* taps, int64_t count, int64_t single, int64_t from,
                                  int64_t step, int last, const Vec<C> (&bias)[vectors], C* to) {
  // All loops over the registers are unrolled, or GCC would store them again after each product.
  Vec<C> total[pixels][vectors];
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) total[p][v] = bias[v];
  }
  const auto add = [&](const DepthwiseTap<E>* tap, int64_t tap_count,
                       const auto& multiply) __attribute__((always_inline)) {
    sum_in_parts(tap_count, total, [&](int64_t k) __attribute__((always_inline)) {
      const E* at = tap[k].input + from;
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const Vec<C> weight = load(tap[k].weight + v * kLanes<C>);
#pragma GCC unroll 8
        for (int p = 0; p < pixels; ++p) {
          const E* pixel = at + p * step + v * kLanes<C>;
          if constexpr (partial && !kIsPair<E>) {
            total[p][v] = multiply(v == vectors - 1 ? load_partial<E>(pixel, last) : load(pixel), weight, total[p][v]);
          } else {
            total[p][v] = multiply(load(pixel), weight, total[p][v]);
          }
        }
      }
    });
  };
  add(taps, count,
      [](Vec<C> x, Vec<C> y, Vec<C> z) __attribute__((always_inline)) { return add_products<E>(x, y, z); });
  if constexpr (kIsPair<E>) {
    add(taps + count, single, [](Vec<C> x, Vec<C> y, Vec<C> z) __attribute__((always_inline)) {
      return multiply_add(first_of_pairs(x), y, z);
    });
  }
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(to + (p * vectors + v) * kLanes<C>, total[p][v]);
  }
}

// Conv pixels of a register tile: many where there are registers for them, since a tile reads all of the weight.
constexpr int kDepthwisePixels = FASTNN_VECTOR_BYTES == 64 ? 8 : 4;

// At most as many pixels as wanted; returns how many.
template <int vectors, bool partial, class E, class C = Compute<E>>
FASTNN_SHARED int64_t depthwise_pixels(int64_t wanted, const DepthwiseTap<E>* taps, int64_t count, int64_t single,
                                       int64_t from, int64_t step, int last, const Vec<C> (&bias)[vectors], C* to) {
  const int64_t pixels = smaller(wanted, kDepthwisePixels);
  with_constant<kDepthwisePixels>(static_cast<int>(pixels), [&](auto constant) {
    depthwise_tile<decltype(constant)::value, vectors, partial>(taps, count, single, from, step, last, bias, to);
  });
  return pixels;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
