// Rows of conv pixels from the input where it lies, without the taps that fall into the padding.
//
// Where a row is padded, different pixels have different taps: so the columns of the kernel are taken one at a time,
// each for the pixels under which it meets the input. Two short rows share a tile, for the taps that both have. For
// large kernels on small images, whose taps are mostly padding, and for inputs of which a copy would cost more than the
// product.
#pragma once

#include "conv_row_short.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kRowsInside = 2;  // short rows of a tile

// An image's channels of a group: element (0, 0, 0) and the strides.
template <class C>
struct InputSource {
  const C* data;
  int64_t d[3];
};

// The taps of conv pixel `pixel` that meet the input, along one dimension.
FASTNN_INLINE Range taps_inside(const ConvPoolGeometry& g, int d, int64_t pixel) {
  const int64_t start = pixel * g.stride[d] - g.padding[d];
  const int64_t first = start < 0 ? divide_up(-start, g.dilation[d]) : 0;
  const int64_t last = start >= g.input[d] ? 0 : smaller(g.kernel[d], divide_up(g.input[d] - start, g.dilation[d]));
  return {smaller(first, last), last};
}

// The conv pixels under which tap `tap` meets the input, along one dimension.
FASTNN_INLINE Range pixels_inside(const ConvPoolGeometry& g, int d, int64_t tap) {
  const int64_t start = tap * g.dilation[d] - g.padding[d];
  const int64_t first = start < 0 ? divide_up(-start, g.stride[d]) : 0;
  const int64_t last = start >= g.input[d] ? 0 : smaller(g.conv[d], divide_up(g.input[d] - start, g.stride[d]));
  return {smaller(first, last), last};
}

FASTNN_INLINE bool taps_leave_input(const ConvPoolGeometry& g, int d) {
  return g.padding[d] > 0;
}

// Whether some conv rows meet but a part of the kernel's rows.
FASTNN_INLINE bool rows_leave_input(const ConvPoolGeometry& g) {
  return taps_leave_input(g, 0) || taps_leave_input(g, 1);
}

// The kernel's rows, numbered slice by slice, that conv row (z, y) meets more than padding with: from the first to the
// last.
FASTNN_INLINE Range kernel_rows_inside(const ConvPoolGeometry& g, int64_t z, int64_t y) {
  const Range slices = taps_inside(g, 0, z), rows = taps_inside(g, 1, y);
  if (slices.first == slices.last || rows.first == rows.last) return {};
  return {slices.first * g.kernel[1] + rows.first, (slices.last - 1) * g.kernel[1] + rows.last};
}

FASTNN_INLINE TapOrder inside_order(const ConvPoolGeometry& g) {
  return taps_leave_input(g, 2) ? TapOrder::columns_first : TapOrder::channels_last;
}

// For the cost: which share of the products is left, along one dimension and in all, and how many passes a conv row
// takes at most.
FASTNN_INLINE double share_inside(const ConvPoolGeometry& g, int d) {
  int64_t inside = 0;
  for (int64_t tap = 0; tap < g.kernel[d]; ++tap) {
    const Range pixels = pixels_inside(g, d, tap);
    inside += pixels.last - pixels.first;
  }
  return static_cast<double>(inside) / static_cast<double>(g.kernel[d] * g.conv[d]);
}
FASTNN_INLINE double share_inside(const ConvPoolGeometry& g) {
  return share_inside(g, 0) * share_inside(g, 1) * share_inside(g, 2);
}
// The share of kernel_rows_inside.
FASTNN_INLINE double share_of_rows(const ConvPoolGeometry& g) {
  return share_inside(g, 0) - (1 - share_inside(g, 1)) / static_cast<double>(g.kernel[0]);
}
FASTNN_INLINE double inside_passes(const ConvPoolGeometry& g) {
  const int64_t slices = taps_leave_input(g, 1) ? g.kernel[0] : 1;
  return static_cast<double>(slices * (taps_leave_input(g, 2) ? g.kernel[2] : 1));
}

// What the kernel's rows `taps` add to conv pixels [first, first + count) of rows of one slice, one or, of short rows,
// some together. Offsets and weight are those of inside_order.
template <int together, int vectors, class E, class Ahead, class C = Compute<E>>
FASTNN_SHARED void add_taps_inside(const ConvPoolGeometry& g, const InputSource<E>& input, const Ahead& steps,
                                   const int64_t* offsets, const Weight<E>* weight, const RowToMake<E>* rows,
                                   Range taps, int64_t first, int64_t count) {
  constexpr int64_t width = vectors * kLanes<C>;
  if (taps.first >= taps.last) return;
  const int64_t z = rows[0].z;
  const Range slices = taps_inside(g, 0, z);
  const bool all_taps = taps.last - taps.first == g.kernel[1];
  const bool by_columns = taps_leave_input(g, 2);
  const int64_t passes = by_columns ? g.kernel[2] : 1;
  const int64_t run = g.in_channels * g.kernel[2] / passes;  // of the depth: a row of the kernel in one pass
  const int64_t step = g.stride[2] * input.d[2];
  const E* corners[together];
  for (int r = 0; r < together; ++r) {
    corners[r] = input.data + (z * g.stride[0] - g.padding[0]) * input.d[0] +
                 (rows[r].y * g.stride[1] - g.padding[1]) * input.d[1] - g.padding[2] * input.d[2];
  }
  const Vec<C> zero[vectors] = {};
  for (int64_t pass = 0; pass < passes; ++pass) {
    Range pixels = {first, first + count};
    if (by_columns) {
      const Range inside = pixels_inside(g, 2, pass);
      pixels = {larger(first, inside.first), smaller(first + count, inside.last)};
    }
    if (pixels.first >= pixels.last) continue;
    const auto add = [&](int64_t from, const auto& total) __attribute__((always_inline)) {
      constexpr int64_t pixel_count = sizeof(total) / sizeof(total[0]), of_row = pixel_count / together;
      C* to[together];  // known here, or each store might have changed it
      for (int r = 0; r < together; ++r) to[r] = rows[r].to + (pixels.first - first + from) * width;
#pragma GCC unroll 28
      for (int p = 0; p < pixel_count; ++p) {
        C* at = to[p / of_row] + p % of_row * width;
        for (int v = 0; v < vectors; ++v) store(at + v * kLanes<C>, load(at + v * kLanes<C>) + total[p][v]);
      }
    };
    for (int64_t d = slices.first; d < slices.last; d = all_taps ? slices.last : d + 1) {
      const int64_t k = ((pass * g.kernel[0] + d) * g.kernel[1] + taps.first) * run;
      const int64_t depth = (all_taps ? slices.last - d : 1) * (taps.last - taps.first) * run;
      const Weight<E>* from_weight = weight + k * width * kSums<E>;
      auto lines = lines_ahead<together>(steps, k);
      for (int r = 0; r < together; ++r) lines.start(r, rows[r].ahead);
      if constexpr (together == 1) {
        conv_groups<1, vectors>(corners[0] + pixels.first * step, step, lines.after(pixels.first), offsets + k, depth,
                                from_weight, zero, pixels.last - pixels.first, add);
      } else {
        with_constant<kShortRow>(static_cast<int>(pixels.last - pixels.first), [&](auto columns) {
          const E* from[together];
          for (int r = 0; r < together; ++r) from[r] = corners[r] + pixels.first * step;
          conv_tile<together, decltype(columns)::value, vectors>(
              from, step, lines.after(pixels.first), offsets + k, depth, from_weight, zero,
              [&](const auto& total) __attribute__((always_inline)) { add(0, total); });
        });
      }
    }
  }
}

// Conv pixels [first, first + count) of rows -> to (count, vectors x lanes) of each. Short ones two together as far as
// they meet the same rows of the kernel; and alone, where the other is not there, in the same order of summation.
template <int vectors, class E, class Ahead, class C = Compute<E>>
FASTNN_SHARED void conv_rows_inside(const ConvPoolGeometry& g, const InputSource<E>& input, const Ahead& steps_ahead,
                                    const int64_t* offsets, const Weight<E>* weight, const Vec<C> (&bias)[vectors],
                                    const RowToMake<E>* rows, int64_t row_count, int64_t first, int64_t count) {
  for (int64_t r = 0; r < row_count; ++r) {
    for (int64_t x = 0; x < count * vectors; ++x) store(rows[r].to + x * kLanes<C>, bias[x % vectors]);
  }
  const auto add_alone = [&](const RowToMake<E>* row, Range taps) {
    add_taps_inside<1, vectors>(g, input, steps_ahead, offsets, weight, row, taps, first, count);
  };
  for (int64_t r = 0; r < row_count; ++r) {
    const RowToMake<E>* row = rows + r;
    const int64_t other = row->y ^ 1;
    const bool has_other = rows_are_short<C>(count) && other < g.conv[1];
    const Range taps = taps_inside(g, 1, row->y), others = has_other ? taps_inside(g, 1, other) : Range{};
    const Range common = {larger(taps.first, others.first), smaller(taps.last, others.last)};
    if (common.first >= common.last) {
      add_alone(row, taps);
      continue;
    }
    const bool both = r + 1 < row_count && row[1].y == other && row[1].z == row->z;
    if constexpr (kMakesTogether<C>) {
      both ? add_taps_inside<kRowsInside, vectors>(g, input, steps_ahead, offsets, weight, row, common, first, count)
           : add_alone(row, common);
    }
    for (int i = 0; i <= both; ++i) {
      const Range own = i == 0 ? taps : others;
      add_alone(row + i, {own.first, common.first});
      add_alone(row + i, {common.last, own.last});
    }
    r += both;
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
