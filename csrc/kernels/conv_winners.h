// Checks of what backward is given: of saved winners, which it turns into addresses, and of what must be finite.
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

// Whether every image's and channel's winner of one pooled pixel, at `winners`, is a place that its window has: given
// the places along each dimension.
FASTNN_INLINE bool places_are_inside(const ConvPoolGeometry& g, const Range (&inside)[3], const uint8_t* winners,
                                     const ConvLayout& layout) {
  bool is_place[256] = {};
  is_place[kDead] = true;
  for (int64_t d = inside[0].first; d < inside[0].last; ++d) {
    for (int64_t h = inside[1].first; h < inside[1].last; ++h) {
      for (int64_t w = inside[2].first; w < inside[2].last; ++w) {
        is_place[(d * g.pool_kernel[1] + h) * g.pool_kernel[2] + w] = true;
      }
    }
  }
  bool valid = true;
  for (int64_t n = 0; n < g.batch; ++n) {
    const uint8_t* image = winners + n * layout.n;
    for (int64_t c = 0; c < g.groups * g.out_channels; ++c) valid &= is_place[image[c * layout.c]];
  }
  return valid;
}

template <class T>
bool winners_are_valid(const ConvPoolGeometry& g, const uint8_t* winners, const ConvLayout& layout) {
  const int64_t channels = g.groups * g.out_channels, step = layout.d[2];
  const uint8_t limit = static_cast<uint8_t>(g.places());
  const bool joined = (g.output[1] == 1 || layout.d[1] == step * g.output[2]) &&
                      (g.output[0] == 1 || layout.d[0] == layout.d[1] * g.output[1]);
  const bool dense = layout.n == channels * g.pixels() &&
                     ((step == 1 && (layout.c == g.pixels() || channels == 1)) || (layout.c == 1 && step == channels));
  if (joined && dense) {
    if (!places_are_below(winners, 1, g.batch * layout.n, limit)) return false;
  } else {
    for (int64_t i = 0; i < g.batch * channels * g.output[0] * g.output[1]; ++i) {
      const int64_t y = i % g.output[1], z = i / g.output[1] % g.output[0], plane = i / g.output[1] / g.output[0];
      const uint8_t* row = winners + plane / channels * layout.n + plane % channels * layout.c;
      if (!places_are_below(row + z * layout.d[0] + y * layout.d[1], step, g.output[2], limit)) return false;
    }
  }
  // Windows that are not whole have fewer places.
  const auto is_whole = [&](int d, const Range& range) { return range.first == 0 && range.last == g.pool_kernel[d]; };
  int64_t first = 0, last = g.output[2];  // the columns whose windows are whole
  while (first < last && !is_whole(2, places_inside(g, 2, first))) ++first;
  while (last > first && !is_whole(2, places_inside(g, 2, last - 1))) --last;
  for (int64_t z = 0; z < g.output[0]; ++z) {
    for (int64_t y = 0; y < g.output[1]; ++y) {
      const Range slices = places_inside(g, 0, z), rows = places_inside(g, 1, y);
      const bool whole = is_whole(0, slices) && is_whole(1, rows);
      for (int64_t x = 0; x < g.output[2]; ++x) {
        if (whole && x == first && first < last) x = last;
        if (x == g.output[2]) break;
        const Range inside[3] = {slices, rows, places_inside(g, 2, x)};
        if (!places_are_inside(g, inside, winners + z * layout.d[0] + y * layout.d[1] + x * step, layout)) return false;
      }
    }
  }
  return true;
}

// Of a tensor (batch, channels, size).
template <class T>
bool elements_are_finite(int64_t batch, int64_t channels, const int64_t (&size)[3], const T* elements,
                         const ConvLayout& layout) {
  using C = Compute<T>;
  const bool channels_inside = layout.c == 1;
  const int64_t runs = channels_inside ? size[2] : channels, length = channels_inside ? channels : size[2];
  const int64_t run_step = channels_inside ? layout.d[2] : layout.c, step = channels_inside ? 1 : layout.d[2];
  Vec<C> total = {};  // of zeros, which infinity and NaN alone spoil
  C single = 0;
  for (int64_t i = 0; i < batch * size[0] * size[1] * runs; ++i) {
    const int64_t row = i / runs, slice = row / size[1];
    const T* from = elements + slice / size[0] * layout.n + slice % size[0] * layout.d[0] +
                    row % size[1] * layout.d[1] + i % runs * run_step;
    if (step == 1) {
      for (int64_t at = 0; at < length; at += kLanes<C>) total += load_up_to<T>(from + at, length - at) * C(0);
    } else {
      for (int64_t at = 0; at < length; ++at) single += to_compute(from[at * step]) * C(0);
    }
  }
  return sum_lanes<C>(total) + single == 0;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
