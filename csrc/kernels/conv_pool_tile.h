// Windows side by side, which share no pixel: pooled while the conv pixels under them are in registers. None of these
// may be NaN.
#pragma once

#include "conv_tile.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kMostTileTaps = 4;  // consecutive pixels of a window
// Not in float64: its share of the build's time would be more than it is worth.
template <class C>
constexpr bool kPoolsInTiles = sizeof(C) == sizeof(float);

// Whether every window lies on the convolution's output whole, and beside the others.
FASTNN_INLINE bool windows_are_apart(const ConvPoolGeometry& g) {
  bool apart = g.pool_kernel[2] > 1 && g.pool_kernel[2] <= kMostTileTaps && g.pool_dilation[2] == 1 &&
               g.pool_stride[2] == g.pool_kernel[2];
  for (int d = 0; d < 3; ++d) {
    apart = apart && g.pool_padding[d] == 0 && g.pool_stride[d] >= g.pool_extent(d) &&
            (g.output[d] - 1) * g.pool_stride[d] + g.pool_extent(d) <= g.conv[d];
  }
  return apart;
}

// Whether no conv pixel can be NaN for the sake of the tile's elements, of which `tile` is that under the first tap of
// the first pixel; false as well where it would take too long to know.
template <class E>
bool box_is_moderate(const ConvPoolGeometry& g, bool in_place, const E* tile, const InputTile<E>& box) {
  using C = Compute<E>;
  constexpr int64_t kShort = 64;
  const bool inside = box.c == 1;
  // In place, the last columns and rows may lie beyond the input. In a copy, rows follow one another.
  const int64_t columns = in_place ? smaller(box.size[2], g.input[2] - box.first[2]) : box.size[2];
  const int64_t rows = in_place ? smaller(box.size[1], g.input[1] - box.first[1]) : 1;
  const int64_t pixels = in_place ? columns : columns * box.size[1];
  const int64_t length = inside ? pixels * box.d[2] : pixels, runs = inside ? 1 : g.in_channels;
  const bool joined = box.d[2] == (inside ? g.in_channels : 1);
  if (in_place && (!joined || length < kShort)) return false;
  Vec<C> total = {};
  for (int64_t d = 0; d < box.size[0]; ++d) {
    for (int64_t h = 0; h < rows; ++h) {
      for (int64_t r = 0; r < runs; ++r) {
        total = add_squares(tile + d * box.d[0] + h * box.d[1] + r * box.c, length, total);
      }
    }
  }
  return is_finite<C>(total);
}

// A row of windows on its way, row after row of conv pixels.
template <class C, int taps, int vectors, bool with_winners>
struct PooledRow {
  C* best;             // (windows, vectors x lanes)
  Places<C>* winners;  // the same, or null
  int64_t place;       // of the row's first pixel in its window
  bool is_first;       // row of the window

  // The conv pixels of some windows from the one numbered `first` on.
  template <int pixels>
  FASTNN_INLINE void add(int64_t first, const Vec<C> (&conv)[pixels][vectors]) {
    is_first ? add<true>(first, conv) : add<false>(first, conv);
  }

 private:
  template <bool starts, int pixels>
  FASTNN_INLINE void add(int64_t first, const Vec<C> (&conv)[pixels][vectors]) {
    using Place = typename IntegerOf<C>::Type;
#pragma GCC unroll 28
    for (int w = 0; w < pixels / taps; ++w) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = (first + w) * vectors + v;
        Vec<C> value = starts ? relu(conv[w * taps][v]) : load(best + at * kLanes<C>);
        Places<C> winner = {};
        if (with_winners) winner = starts ? Places<C>{} + static_cast<Place>(place) : winners[at];
#pragma GCC unroll 4
        for (int t = 0; t < taps; ++t) {
          const Vec<C> pixel = conv[w * taps + t][v];
          if (starts && t == 0) continue;
          if (with_winners) winner = pixel > value ? Places<C>{} + static_cast<Place>(place + t) : winner;
          value = larger_of(pixel, value);
        }
        store(best + at * kLanes<C>, value);
        if (with_winners) winners[at] = winner;
      }
    }
  }
};

// A row of conv pixels, pooled into the windows that it belongs to.
template <int taps, int vectors, bool with_winners, class E, class Ahead, class C = Compute<E>>
FASTNN_SHARED void pool_conv_row(const E* tile, int64_t step, const Ahead& ahead, const int64_t* offsets, int64_t depth,
                                 const Weight<E>* weight, const Vec<C> (&bias)[vectors], int64_t windows,
                                 const RowLines& output, PooledRow<C, taps, vectors, with_winners> pooled) {
  conv_groups<taps, vectors>(tile, step, ahead, offsets, depth, weight, bias, windows,
                             [&](int64_t first, const auto& conv) __attribute__((always_inline)) {
                               constexpr int64_t pixels = sizeof(conv) / sizeof(conv[0]);
                               if (pooled.is_first) output.ask_for(first, pixels / taps);
                               pooled.add(first, conv);
                             });
}

// Places in windows -> bytes, with the mark of those without a gradient.
template <class C>
void write_winners(const C* best, const Places<C>* winners, int64_t vectors, uint8_t* to) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<C>)));
  for (int64_t i = 0; i < vectors; ++i) {
    const Places<C> dead = Places<C>{} + kDead;
    const Bytes bytes = __builtin_convertvector(load(best + i * kLanes<C>) <= Vec<C>{} ? dead : winners[i], Bytes);
    __builtin_memcpy(to + i * kLanes<C>, &bytes, sizeof(bytes));
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
