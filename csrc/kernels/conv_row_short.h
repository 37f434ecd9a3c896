// Rows of conv pixels too short to fill a register tile, several of them in one: so that a vector of the weight serves
// more pixels, and sums that do not wait for each other keep the multipliers busy.
#pragma once

#include "conv_tile.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kShortRow = 7, kShortRows = 4;  // pixels of such a row; rows of a tile

// Not in float64: its share of the build's time would be more than it is worth.
template <class C>
constexpr bool kMakesTogether = sizeof(C) == sizeof(float);

// How many rows of `pixels`, of so many sums each, a register tile holds.
template <int sums>
FASTNN_INLINE constexpr int rows_of_tile(int pixels) {
  const int fit = kConvPixels<sums> / pixels;
  return fit < 1 ? 1 : fit < kShortRows ? fit : kShortRows;
}

template <class C>
FASTNN_INLINE bool rows_are_short(int64_t pixels) {
  return kMakesTogether<C> && pixels <= kShortRow && 2 * pixels <= kConvPixels<2>;
}

// Rows of `count` conv pixels, `step` elements of the tile apart. They ask from that product on.
template <int vectors, class E, class Ahead, class C = Compute<E>>
FASTNN_SHARED void conv_rows_short(const RowToMake<E>* rows, int64_t row_count, int64_t step, const Ahead& ahead,
                                   int64_t first_product, const int64_t* offsets, int64_t depth,
                                   const Weight<E>* weight, const Vec<C> (&bias)[vectors], int64_t count) {
  with_constant<kShortRow>(static_cast<int>(count), [&](auto columns) {
    constexpr int pixels = decltype(columns)::value, sums = vectors * kSums<E>, most = rows_of_tile<sums>(pixels);
    const int64_t tiles = divide_up(row_count, pixels_meet<E>(step) ? smaller(most, rows_of_tile<4>(pixels)) : most);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = row_count * t / tiles, last = row_count * (t + 1) / tiles;
      with_constant<most>(static_cast<int>(last - first), [&](auto some) {
        constexpr int together = decltype(some)::value;
        const E* from[together];
        C* to[together];  // known here, or each store might have changed it
        auto lines = lines_ahead<together>(ahead, first_product);
        for (int r = 0; r < together; ++r) {
          from[r] = rows[first + r].tile;
          to[r] = rows[first + r].to;
          lines.start(r, rows[first + r].ahead);
        }
        const auto store_rows = [&](const auto& total) __attribute__((always_inline)) {
#pragma GCC unroll 28
          for (int p = 0; p < together * pixels; ++p) {
            C* at = to[p / pixels] + p % pixels * vectors * kLanes<C>;
            for (int v = 0; v < vectors; ++v) store(at + v * kLanes<C>, total[p][v]);
          }
        };
        conv_tile<together, pixels, vectors>(from, step, lines, offsets, depth, weight, bias, store_rows);
      });
    }
  });
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
