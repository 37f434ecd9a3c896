// The register tile of direct convolution: conv pixels by vectors of output channels.
#pragma once

#include "conv_ahead.h"

namespace fastnn {
namespace FASTNN_ISA {

// Calls add(k) for each k < depth, which adds to `total`. Long sums are taken in parts, for the sake of their error.
template <int rows, int vectors, class V, class Add>
FASTNN_INLINE void sum_in_parts(int64_t depth, V (&total)[rows][vectors], const Add& add) {
  V earlier[rows][vectors];  // in memory: the registers are taken
  bool has_earlier = false;
  for (int64_t k = 0; k < depth;) {
    if (k > 0) {
      set_aside(total, earlier, has_earlier);
      has_earlier = true;
    }
    for (const int64_t end = smaller(k + kLongestSum, depth); k < end; ++k) add(k);
  }
  if (!has_earlier) return;
#pragma GCC unroll 28
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) total[r][v] += earlier[r][v];
  }
}

// Offsets, each read a step before it is used: the oldest loads come first, so that one behind a tile's loads would
// keep the next step's waiting for their address.
class OffsetsAhead {
 public:
  FASTNN_INLINE OffsetsAhead(const int64_t* offsets, int64_t count)
      : offsets_(offsets), last_(count - 1), next_(count > 0 ? offsets[0] : 0) {}

  // The k-th; to be called for each k in turn.
  FASTNN_INLINE int64_t take(int64_t k) {
    const int64_t offset = next_;
    next_ = offsets_[smaller(k + 1, last_)];
    asm volatile("" : "+r"(next_));  // here, not where the compiler would rather have it
    return offset;
  }

 private:
  const int64_t* offsets_;
  int64_t last_, next_;
};

constexpr int64_t kRowsAhead = 96;  // of the weight, asked for before they are multiplied by

// The register tile: `pixels` conv pixels, `step` apart, of each of `rows` rows by `vectors` vectors of output
// channels. Meanwhile it asks for what is `ahead`. finish(total) takes what comes out.
template <int rows, int pixels, int vectors, class E, class Ahead, class Finish, class C = Compute<E>>
FASTNN_INLINE void conv_tile(const E* const (&tile)[rows], int64_t step, const Ahead& ahead, const int64_t* offsets,
                             int64_t depth, const Weight<E>* weight, const Vec<C> (&bias)[vectors],
                             const Finish& finish) {
  constexpr int sums = vectors * kSums<E>;
  Vec<C> total[rows * pixels][sums];
#pragma GCC unroll 28
  for (int p = 0; p < rows * pixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < sums; ++v) total[p][v] = kIsOfFloats<E> ? -Vec<C>{} : bias[v % vectors];
  }
  OffsetsAhead next_offsets(offsets, depth);
  sum_in_parts(depth, total, [&](int64_t k) __attribute__((always_inline)) {
    const int64_t offset = next_offsets.take(k);
    ahead.template ask_for<pixels, kChannels<E>>(k);
    Vec<C> right[sums];
    for (int v = 0; v < sums; ++v) {
      right[v] = load(weight + v * kLanes<C>);
      keep_in_register(right[v]);  // or few pixels would each load it again
    }
    // Two multiply-adds a cycle are through with a row of the weight before the next one comes from L2 or beyond.
    for (int v = 0; v < sums; ++v) __builtin_prefetch(weight + (kRowsAhead * sums + v) * kLanes<C>);
    weight += sums * kLanes<C>;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const E* from = tile[r] + offset;
#pragma GCC unroll 28
      for (int p = 0; p < pixels; ++p) {
        // Four pixels are reached from one address.
        if (p > 0 && p % 4 == 0) from += 4 * step;
        const Vec<C> left = broadcast_element(from + p % 4 * step);
        for (int v = 0; v < sums; ++v) {
          total[r * pixels + p][v] = add_products<E>(left, right[v], total[r * pixels + p][v]);
        }
      }
    }
  });
  if constexpr (kIsOfFloats<E>) {
    static_assert(vectors == 1 && sums == 2);
    Vec<C> all[rows * pixels][1];
#pragma GCC unroll 28
    for (int p = 0; p < rows * pixels; ++p) all[p][0] = add_channels(total[p][0], total[p][1]) + bias[0];
    finish(all);
  } else {
    finish(total);
  }
}

// A row of conv pixels to be made.
template <class E>
struct RowToMake {
  const E* tile;      // the element under the first tap of its first pixel
  Compute<E>* to;     // (pixels, vectors x lanes)
  int64_t z, y;       // conv_row_inside.h: slice and row
  const char* ahead;  // what it asks for: LinesAhead's `from`
};

// Whether pixels that many elements apart share so many of the cache's sets. Two have room for those of two vectors'
// tile, one for half as many.
template <class E, int sets = 2>
FASTNN_INLINE bool pixels_meet(int64_t step) {
  return step * static_cast<int64_t>(sizeof(E)) % (4096 / sets) == 0;
}

// How many pixels of a register tile, that many elements apart, stay in cache until all of their channels are taken.
template <class E, int sums>
FASTNN_INLINE int pixels_of_tile(int64_t step) {
  return pixels_meet<E, 1>(step) ? kConvPixels<2> / 2 : pixels_meet<E>(step) ? kConvPixels<2> : kConvPixels<sums>;
}

// `count` groups of `taps` consecutive conv pixels of a row, a register tile of some at a time. finish(first, total)
// takes the pixels of the groups from the first on.
template <int taps, int vectors, class E, class Ahead, class Finish, class C = Compute<E>>
FASTNN_INLINE void conv_groups(const E* tile, int64_t step, const Ahead& ahead, const int64_t* offsets, int64_t depth,
                               const Weight<E>* weight, const Vec<C> (&bias)[vectors], int64_t count,
                               const Finish& finish) {
  constexpr int sums = vectors * kSums<E>, most = kConvPixels<sums> / taps;
  const int64_t tiles = divide_up(count, smaller(most, larger(1, pixels_of_tile<E, sums>(step) / taps)));
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = count * t / tiles, last = count * (t + 1) / tiles;
    with_constant<most>(static_cast<int>(last - first), [&](auto groups) __attribute__((noinline)) {
      const E* const from[1] = {tile + first * taps * step};
      conv_tile<1, decltype(groups)::value * taps, vectors>(
          from, step, ahead.after(first * taps), offsets, depth, weight, bias,
          [&](const auto& total) __attribute__((always_inline)) { finish(first, total); });
    });
  }
}

// `count` conv pixels of a row -> to (count, vectors x lanes)
template <int vectors, class E, class Ahead, class C = Compute<E>>
FASTNN_SHARED void conv_row(const E* tile, int64_t step, const Ahead& ahead, const int64_t* offsets, int64_t depth,
                            const Weight<E>* weight, const Vec<C> (&bias)[vectors], int64_t count, C* to) {
  const auto store_all = [&](int64_t first, const auto& total) __attribute__((always_inline)) {
    C* target = to + first * vectors * kLanes<C>;
#pragma GCC unroll 28
    for (const auto& pixel : total) {
      for (int v = 0; v < vectors; ++v, target += kLanes<C>) store(target, pixel[v]);
    }
  };
  conv_groups<1, vectors>(tile, step, ahead, offsets, depth, weight, bias, count, store_all);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
