// Whether saved winners are such as forward saves: backward turns them into addresses. One pass over them.
#pragma once

#include "sums.h"

namespace fastnn {
namespace FASTNN_ISA {

// Pooled pixels along one dimension whose windows are whole.
FASTNN_INLINE Range whole_windows(const ConvPoolGeometry& g, int d) {
  const int64_t first = smaller(g.output[d], divide_up(g.pool_padding[d], g.pool_stride[d]));
  const int64_t room = g.conv[d] + g.pool_padding[d] - g.pool_extent(d);
  return {first, larger(first, room < 0 ? 0 : smaller(g.output[d], room / g.pool_stride[d] + 1))};
}

// Whether every image's and channel's winner of a pooled pixel, at `winners`, is a place that its window has.
FASTNN_INLINE bool places_are_inside(const ConvPoolGeometry& g, int64_t z, int64_t y, int64_t x, const uint8_t* winners,
                                     const ConvLayout& layout) {
  const Inside slices = places_inside(g, 0, z), rows = places_inside(g, 1, y), columns = places_inside(g, 2, x);
  bool is_place[256] = {};
  is_place[kDead] = true;
  for (int64_t d = slices.first; d < slices.last; ++d) {
    for (int64_t h = rows.first; h < rows.last; ++h) {
      for (int64_t w = columns.first; w < columns.last; ++w) {
        is_place[(d * g.pool_kernel[1] + h) * g.pool_kernel[2] + w] = true;
      }
    }
  }
  bool valid = true;
  for (int64_t n = 0; n < g.batch; ++n) {
    for (int64_t c = 0; c < g.groups * g.out_channels; ++c) valid &= is_place[winners[n * layout.n + c * layout.c]];
  }
  return valid;
}

inline bool winners_are_valid(const ConvPoolGeometry& g, const uint8_t* winners, const ConvLayout& layout) {
  const int64_t size = g.groups * g.out_channels * g.pixels();
  const uint8_t limit = static_cast<uint8_t>(g.places());
  for (int64_t n = 0; n < g.batch; ++n) {
    const uint8_t* image = winners + n * layout.n;
    uint8_t wrong = 0;
    for (int64_t i = 0; i < size; ++i) wrong |= (image[i] >= limit) & (image[i] != kDead);
    if (wrong) return false;
  }
  // Windows that are not whole have fewer places.
  const Range slices = whole_windows(g, 0), rows = whole_windows(g, 1), columns = whole_windows(g, 2);
  for (int64_t z = 0; z < g.output[0]; ++z) {
    for (int64_t y = 0; y < g.output[1]; ++y) {
      const bool whole = z >= slices.first && z < slices.last && y >= rows.first && y < rows.last;
      const uint8_t* row = winners + z * layout.d[0] + y * layout.d[1];
      for (int64_t x = 0; x < g.output[2]; ++x) {
        if (whole && x == columns.first) x = columns.last;
        if (x < g.output[2] && !places_are_inside(g, z, y, x, row + x * layout.d[2], layout)) return false;
      }
    }
  }
  return true;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
