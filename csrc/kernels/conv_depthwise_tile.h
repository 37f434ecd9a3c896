// The register tile of conv_depthwise.h.
#pragma once

#include "conv_depthwise_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// Whether there are registers for kSharedTaps.
constexpr int kRegisters = FASTNN_VECTOR_BYTES == 64 ? 32 : 16;
template <int pixels, int vectors>
constexpr bool kSharesColumns = pixels > kSharedTaps && (pixels + kSharedTaps + 1) * vectors <= kRegisters;

// Some taps of a row of the kernel, or pairs of them: where the first of them meets the input, its weight, and from one
// weight to the next. Each tap is a pixel further than the one before, each pair two.
template <class E>
struct SharedTaps {
  const E* input;
  const Compute<E>* weight;
  int64_t weight_step;
};

// sum + the product of the first of each pair with the weight.
template <class V>
FASTNN_INLINE V add_product(V pairs, V weight, V sum) {
  return multiply_add(first_of_pairs(pairs), weight, sum);
}

// Adds what `together` of them contribute to `pixels` sums, from the first on.
template <int together, int pixels, int vectors, bool partial, class E, class V, int sums, class Multiply>
FASTNN_INLINE void add_taps(SharedTaps<E> taps, int64_t step, int last, int first, V (&total)[sums][vectors],
                            const Multiply& multiply) {
  using C = Compute<E>;
  constexpr int apart = kPixelsApart<E>;
  V weight[together][vectors];
#pragma GCC unroll 3
  for (int w = 0; w < together; ++w) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) weight[w][v] = load(taps.weight + w * taps.weight_step + v * kLanes<C>);
  }
#pragma GCC unroll 20
  for (int column = 0; column < pixels + (together - 1) * apart; ++column) {
    // Four columns are reached from one address.
    if (column > 0 && column % 4 == 0) taps.input += 4 * step;
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const E* at = taps.input + column % 4 * step + v * kLanes<C>;
      V x;
      if constexpr (partial && !kIsPair<E>) {
        x = v == vectors - 1 ? load_partial<E>(at, last) : load(at);
      } else {
        x = load(at);
      }
#pragma GCC unroll 3
      for (int w = 0; w < together; ++w) {
        const int pixel = column - w * apart;
        if (pixel < 0 || pixel >= pixels) continue;
        total[first + pixel][v] = multiply(x, weight[w][v], total[first + pixel][v]);
      }
    }
  }
}

// `pixels` conv pixels, `step` apart, of a block -> to [pixel][lane]. A block's last vector has `last` channels, if it
// is `partial`.
template <int pixels, int vectors, bool partial, class E, class C = Compute<E>>
FASTNN_INLINE void depthwise_tile(const DepthwiseTaps<E>& taps, int64_t from, int64_t step, int last,
                                  const Vec<C> (&bias)[vectors], C* to) {
  constexpr int64_t lanes = vectors * kLanes<C>;
  // A sum waits for its last product: of few pixels every second row of taps or every fourth has sums of its own.
  constexpr int chains = pixels > 2 ? 1 : 4 / pixels;
  // All loops over the registers are unrolled, or GCC would store them again after each product.
  Vec<C> total[chains * pixels][vectors];
#pragma GCC unroll 16
  for (int p = 0; p < chains * pixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) total[p][v] = p < pixels ? bias[v] : -Vec<C>{};
  }
  const int64_t apart = kSharesColumns<pixels, vectors> ? taps.shared_apart : 0;
  // `some` columns, from `column` on, of the rows `of` taps.
  const auto add = [&](auto some, const auto& of, int64_t column, const auto& multiply) __attribute__((always_inline)) {
    const int64_t place = from + column * of.column_step;
    const auto add_row = [&](const DepthwiseTap<E>& row, int chain) __attribute__((always_inline)) {
      const SharedTaps<E> shared = {row.input + place, row.weight + column * lanes, apart * lanes};
      add_taps<decltype(some)::value, pixels, vectors, partial>(shared, step, last, chain * pixels, total, multiply);
    };
    sum_in_parts(of.count / chains, total, [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int chain = 0; chain < chains; ++chain) add_row(of.rows[k * chains + chain], chain);
    });
    const int64_t rest = of.count / chains * chains;
#pragma GCC unroll 3
    for (int chain = 0; chain < chains - 1; ++chain) {
      if (rest + chain < of.count) add_row(of.rows[rest + chain], chain);
    }
  };
  const auto multiply = [](auto x, auto y, auto z) __attribute__((always_inline)) { return add_products<E>(x, y, z); };
  const auto add_first = [](auto x, auto y, auto z) __attribute__((always_inline)) { return add_product(x, y, z); };
  const int64_t others = larger(1, apart);
  for (int64_t first = 0; first < others; ++first) {
    int64_t column = taps.columns.first + first;
    if constexpr (kSharesColumns<pixels, vectors>) {
      for (; apart > 0 && column + (kSharedTaps - 1) * apart < taps.columns.last; column += kSharedTaps * apart) {
        add(Constant<kSharedTaps>{}, taps, column, multiply);
      }
    }
    for (; column < taps.columns.last; column += others) add(Constant<1>{}, taps, column, multiply);
  }
  if constexpr (kIsPair<E>) {
    const DepthwiseTaps<E> singles = {taps.rows + taps.count, taps.single, {0, 1}, 0, 0, 0};
    add(Constant<1>{}, singles, 0, add_first);
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
FASTNN_SHARED int64_t depthwise_pixels(int64_t wanted, const DepthwiseTaps<E>& taps, int64_t from, int64_t step,
                                       int last, const Vec<C> (&bias)[vectors], C* to) {
  constexpr int most = kDepthwisePixels<vectors>;
  const int64_t pixels = divide_up(wanted, divide_up(wanted, most));
  with_constant<most>(static_cast<int>(pixels), [&](auto constant) {
    depthwise_tile<decltype(constant)::value, vectors, partial>(taps, from, step, last, bias, to);
  });
  return pixels;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
