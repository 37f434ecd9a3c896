// Checks of saved winners, which backward turns into addresses.
#pragma once

#include "conv_pool_window.h"

namespace fastnn {
namespace FASTNN_ISA {

// Whether all of them are below `limit` or dead.
FASTNN_INLINE bool places_are_below(const uint8_t* winners, int64_t step, int64_t count, uint8_t limit) {
  uint8_t wrong = 0;
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) wrong |= (winners[i] >= limit) & (winners[i] != kDead);
  } else {
    for (int64_t i = 0; i < count; ++i) wrong |= (winners[i * step] >= limit) & (winners[i * step] != kDead);
  }
  return !wrong;
}

FASTNN_INLINE bool is_inside(const ConvPoolGeometry& g, int64_t place, int64_t z, int64_t y, int64_t x) {
  const int64_t at[3] = {place / (g.pool_kernel[1] * g.pool_kernel[2]), place / g.pool_kernel[2] % g.pool_kernel[1],
                         place % g.pool_kernel[2]};
  const int64_t pooled[3] = {z, y, x};
  for (int d = 0; d < 3; ++d) {
    const PlaceRange range = places_inside(g, d, pooled[d]);
    if (at[d] < range.first || at[d] >= range.last) return false;
  }
  return true;
}

template <class T>
bool winners_are_valid(const ConvPoolGeometry& g, const uint8_t* winners, const ConvLayout& layout) {
  const int64_t channels = g.groups * g.out_channels;
  const uint8_t places = static_cast<uint8_t>(g.places());
  const auto is_whole = [&](int d, int64_t pooled) {
    const PlaceRange range = places_inside(g, d, pooled);
    return range.first == 0 && range.last == g.pool_kernel[d];
  };
  bool all_whole = true;
  for (int d = 0; d < 3; ++d) all_whole = all_whole && is_whole(d, 0) && is_whole(d, g.output[d] - 1);
  const bool joined = layout.d[1] == layout.d[2] * g.output[2] && layout.d[0] == layout.d[1] * g.output[1];
  if (all_whole && joined && layout.c == 1 && layout.d[2] == channels && layout.n == channels * g.pixels()) {
    return places_are_below(winners, 1, g.batch * layout.n, places);
  }
  // Columns whose windows are whole: the others are looked at one by one.
  int64_t first = 0, last = g.output[2];
  while (first < last && !is_whole(2, first)) ++first;
  while (last > first && !is_whole(2, last - 1)) --last;
  for (int64_t n = 0; n < g.batch; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      const uint8_t* plane = winners + n * layout.n + c * layout.c;
      if (all_whole && joined) {
        if (!places_are_below(plane, layout.d[2], g.pixels(), places)) return false;
        continue;
      }
      for (int64_t z = 0; z < g.output[0]; ++z) {
        for (int64_t y = 0; y < g.output[1]; ++y) {
          const uint8_t* row = plane + z * layout.d[0] + y * layout.d[1];
          const bool whole_row = is_whole(0, z) && is_whole(1, y);
          const int64_t from = whole_row ? first : 0, to = whole_row ? last : 0;
          if (!places_are_below(row + from * layout.d[2], layout.d[2], to - from, places)) return false;
          for (int64_t x = 0; x < g.output[2]; ++x) {
            if (x == from && x < to) x = to;
            if (x == g.output[2]) break;
            const uint8_t place = row[x * layout.d[2]];
            if (place != kDead && !is_inside(g, place, z, y, x)) return false;
          }
        }
      }
    }
  }
  return true;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
