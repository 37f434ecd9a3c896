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
  // A sum waits for its last product: of few pixels every second tap or every fourth has sums of its own.
  constexpr int chains = pixels > 2 ? 1 : 4 / pixels;
  // All loops over the registers are unrolled, or GCC would store them again after each product.
  Vec<C> total[chains * pixels][vectors];
#pragma GCC unroll 16
  for (int p = 0; p < chains * pixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) total[p][v] = p < pixels ? bias[v] : -Vec<C>{};
  }
  const auto add_tap = [&](const DepthwiseTap<E>& tap, int chain, const auto& multiply) __attribute__((always_inline)) {
    const E* at = tap.input + from;
    Vec<C> weight[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) weight[v] = load(tap.weight + v * kLanes<C>);
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) {
      // Four pixels are reached from one address.
      if (p > 0 && p % 4 == 0) at += 4 * step;
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const E* pixel = at + p % 4 * step + v * kLanes<C>;
        Vec<C>& sum = total[chain * pixels + p][v];
        if constexpr (partial && !kIsPair<E>) {
          sum = multiply(v == vectors - 1 ? load_partial<E>(pixel, last) : load(pixel), weight[v], sum);
        } else {
          sum = multiply(load(pixel), weight[v], sum);
        }
      }
    }
  };
  const auto add = [&](const DepthwiseTap<E>* tap, int64_t all, const auto& multiply) __attribute__((always_inline)) {
    sum_in_parts(all / chains, total, [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int chain = 0; chain < chains; ++chain) add_tap(tap[k * chains + chain], chain, multiply);
    });
    for (int64_t k = all / chains * chains; k < all; ++k) add_tap(tap[k], 0, multiply);
  };
  add(taps, count,
      [](Vec<C> x, Vec<C> y, Vec<C> z) __attribute__((always_inline)) { return add_products<E>(x, y, z); });
  if constexpr (kIsPair<E>) {
    add(taps + count, single, [](Vec<C> x, Vec<C> y, Vec<C> z) __attribute__((always_inline)) {
      return multiply_add(first_of_pairs(x), y, z);
    });
  }
#pragma GCC unroll 16
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      Vec<C> sum = total[p][v];
#pragma GCC unroll 4
      for (int chain = 1; chain < chains; ++chain) sum += total[chain * pixels + p][v];
      store(to + (p * vectors + v) * kLanes<C>, sum);
    }
  }
}

// Conv pixels of a register tile: many where there are registers for them, since a tile reads all of the weight.
template <int vectors>
constexpr int kDepthwisePixels = FASTNN_VECTOR_BYTES == 64 ? (vectors == 1 ? 16 : 12) : 8 / vectors;

// At most as many pixels as wanted, which tiles share evenly; returns how many.
template <int vectors, bool partial, class E, class C = Compute<E>>
FASTNN_SHARED int64_t depthwise_pixels(int64_t wanted, const DepthwiseTap<E>* taps, int64_t count, int64_t single,
                                       int64_t from, int64_t step, int last, const Vec<C> (&bias)[vectors], C* to) {
  constexpr int most = kDepthwisePixels<vectors>;
  const int64_t pixels = divide_up(wanted, divide_up(wanted, most));
  with_constant<most>(static_cast<int>(pixels), [&](auto constant) {
    depthwise_tile<decltype(constant)::value, vectors, partial>(taps, count, single, from, step, last, bias, to);
  });
  return pixels;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
