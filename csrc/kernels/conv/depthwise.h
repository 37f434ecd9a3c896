// Groups of one channel: channels in the vector's lanes, nothing to sum up but the kernel's positions.
//
// For depthwise layers, whose sums are too short for other algorithms to fill their lanes. Costs a multiply-add and a
// load for each product of a vector of channels, and a load and a store for each vector of the input.
#pragma once

#include "channels.h"

namespace fastnn {
namespace FASTNN_ISA {

// Where the sums of a block's pixels go, and what they are kept between.
template <class C>
struct DepthwiseSums {
  C* to;
  int64_t step;  // from a pixel to the next
  Bounds<C> bounds;

  FASTNN_INLINE void set(int64_t pixel, int64_t lane, Vec<C> sum) const {
    store(to + pixel * step + lane, bounded(sum, bounds));
  }
  DepthwiseSums from(int64_t pixel) const { return {to + pixel * step, step, bounds}; }
};

// One vector of channels of a row of pixels, whose sums are computed side by side.
template <class C>
struct DepthwiseRow {
  const C* from;           // the first pixel, under the kernel's first position
  int64_t step;            // from a column of the input to the next
  int64_t stride;          // columns from a pixel to the next
  int64_t taps;            // positions of the kernel, of which `offsets` says where they lie from the first one
  const int64_t* offsets;  // [taps]
  const C* weight;         // [taps][width]
  int64_t width;
  int64_t count;                 // of the pixels
  bool skips_first, skips_last;  // the first column under the first pixel, the last one under the last: it is padding
  Vec<C> bias;
};

// Sums of `pixels` pixels, from pixel `first` on.
template <int pixels, class C>
FASTNN_INLINE void depthwise_tile(const DepthwiseRow<C>& row, int64_t first, const DepthwiseSums<C>& result,
                                  int64_t lane) {
  Vec<C> sums[pixels];
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) sums[p] = row.bias;
  const int64_t step = row.stride * row.step;
  for (int64_t k = 0; k < row.taps; ++k) {
    const C* at = row.from + first * step + row.offsets[k];
    const Vec<C> right = load(row.weight + k * row.width);
#pragma GCC unroll 8
    for (int p = 0; p < pixels; ++p) sums[p] = multiply_add(load(at + p * step), right, sums[p]);
  }
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) result.set(first + p, lane, sums[p]);
}

// The same for kernels of three neighbouring columns: a column of the input is loaded once for all pixels that it is
// under, which takes half as many loads.
template <int pixels, int stride, class C>
FASTNN_INLINE void depthwise_tile_of_threes(const DepthwiseRow<C>& row, int64_t first, const DepthwiseSums<C>& result,
                                            int64_t lane) {
  constexpr int columns = (pixels - 1) * stride + 3;
  const bool skips_first = row.skips_first && first == 0;
  const bool skips_last = row.skips_last && first + pixels == row.count;
  Vec<C> sums[pixels];
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) sums[p] = row.bias;
  for (int64_t k = 0; k < row.taps; k += 3) {
    const C* at = row.from + first * stride * row.step + row.offsets[k];
    const C* const weight = row.weight + k * row.width;
    const Vec<C> right[3] = {load(weight), load(weight + row.width), load(weight + 2 * row.width)};
#pragma GCC unroll 18
    for (int column = 0; column < columns; ++column, at += row.step) {
      if ((column == 0 && skips_first) || (column == columns - 1 && skips_last)) continue;
      Vec<C> left = load(at);
      keep_in_register(left);
#pragma GCC unroll 3
      for (int tap = 0; tap < 3; ++tap) {
        const int p = (column - tap) / stride;
        if (column >= tap && p < pixels && p * stride + tap == column)
          sums[p] = multiply_add(left, right[tap], sums[p]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) result.set(first + p, lane, sums[p]);
}

// Sums of the pixels of a block, side by side, in tiles that are as equal as possible. `given` is the row of the
// block's first vector. threes: the kernel has three neighbouring columns, and the stride is 1 or 2.
template <class C>
void depthwise_pixels(const DepthwiseRow<C>& given, bool threes, const C* bias, const DepthwiseSums<C>& sums) {
  const int64_t count = given.count;
  with_constant<8>(static_cast<int>(divide_up(count, larger(1, divide_up(count, 8)))), [&](auto tile) {
    constexpr int pixels = decltype(tile)::value;
    const DepthwiseSums<C> result = sums;  // in registers: what is written could otherwise change it
    DepthwiseRow<C> row = given;
    const auto run = [&](int64_t lane, const auto& one) __attribute__((always_inline)) {
      for (int64_t next = 0; next < count; next += pixels) {
        one(smaller(next, count - pixels), lane);  // the last tile may begin in the one before
      }
    };
    for (int64_t lane = 0; lane < row.width; lane += kLanes<C>) {
      row.from = given.from + lane;
      row.weight = given.weight + lane;
      row.bias = load(bias + lane);
      if (threes && row.stride == 1) {
        run(lane, [&](int64_t x, int64_t at)
                      __attribute__((always_inline)) { depthwise_tile_of_threes<pixels, 1>(row, x, result, at); });
      } else if (threes) {
        run(lane, [&](int64_t x, int64_t at)
                      __attribute__((always_inline)) { depthwise_tile_of_threes<pixels, 2>(row, x, result, at); });
      } else {
        run(lane,
            [&](int64_t x, int64_t at) __attribute__((always_inline)) { depthwise_tile<pixels>(row, x, result, at); });
      }
    }
  });
}

FASTNN_INLINE bool has_threes(const ConvPoolGeometry& g) {
  return g.kernel[2] == 3 && g.dilation[2] == 1 && g.stride[2] <= 2;
}

// The kernel positions along a dimension that lie on the input, for the conv pixel `at`.
FASTNN_INLINE Inside taps_inside(const ConvPoolGeometry& g, int d, int64_t at) {
  const int64_t start = at * g.stride[d] - g.padding[d], room = g.input[d] - start;
  const int64_t first = start < 0 ? divide_up(-start, g.dilation[d]) : 0;
  return {smaller(first, g.kernel[d]), room <= 0 ? 0 : smaller(g.kernel[d], divide_up(room, g.dilation[d]))};
}

// Sums of conv pixels [first, first + count) of row y, from an image that is channels last, without a copy of it:
// positions on the padding are left out.
template <class C>
void depthwise_row(const ConvPoolGeometry& g, const ConvLayout& layout, const C* image, int64_t y, int64_t first,
                   int64_t count, const int64_t* offsets, const C* weight, int vectors, const C* bias,
                   const DepthwiseSums<C>& result) {
  const int64_t width = vectors * kLanes<C>, taps = g.kernel[2];
  const Inside rows = taps_inside(g, 1, y);
  const int64_t height = larger(0, rows.last - rows.first);
  const auto input_at = [&](int64_t x, int64_t tap) {
    return image + (y * g.stride[1] - g.padding[1] + rows.first * g.dilation[1]) * layout.d[1] +
           (x * g.stride[2] - g.padding[2] + tap * g.dilation[2]) * layout.d[2];
  };
  weight += rows.first * taps * width;
  // From `begin` to `end`, no position of the kernel is on the padding.
  const int64_t reach = g.input[2] + g.padding[2] - g.kernel_extent(2), last = first + count;
  int64_t begin = smaller(last, larger(first, divide_up(g.padding[2], g.stride[2])));
  int64_t end = height == 0 || reach < 0 ? begin : larger(begin, smaller(last, reach / g.stride[2] + 1));
  // Kernels of three columns skip one column of padding on each side.
  const Inside left = taps_inside(g, 2, first), right = taps_inside(g, 2, last - 1);
  const bool threes = has_threes(g);
  const bool skips = threes && left.first <= 1 && right.last >= 2 && begin - first <= 1 && last - end <= 1;
  if (skips) {
    begin = first;
    end = last;
  }
  if (end > begin) {
    depthwise_pixels<C>({input_at(begin, 0), layout.d[2], g.stride[2], height * taps, offsets, weight, width,
                         end - begin, skips && left.first > 0, skips && right.last < 3, Vec<C>{}},
                        threes, bias, result.from(begin - first));
  }
  for (int64_t x = begin > first ? first : end; x < last; x = x + 1 == begin ? end : x + 1) {
    const Inside columns = taps_inside(g, 2, x);
    Vec<C> sums[kBlockVectors] = {};
    for (int v = 0; v < vectors; ++v) sums[v] = load(bias + v * kLanes<C>);
    for (int64_t h = 0; h < height; ++h) {
      for (int64_t w = columns.first; w < columns.last; ++w) {
        const C* const at = input_at(x, w) + h * g.dilation[1] * layout.d[1];
        const C* const right = weight + (h * taps + w) * width;
#pragma GCC unroll 2
        for (int v = 0; v < kBlockVectors; ++v) {
          const int64_t lane = v * kLanes<C>;
          if (v < vectors) sums[v] = multiply_add(load(at + lane), load(right + lane), sums[v]);
        }
      }
    }
    for (int v = 0; v < vectors; ++v) result.set(x - first, v * kLanes<C>, sums[v]);
  }
}

// The call as one group whose output channels are the groups.
template <class T>
ConvCall<T> joined_groups(const ConvCall<T>& call) {
  ConvCall<T> joined = call;
  joined.geometry.in_channels = joined.geometry.out_channels = call.geometry.groups;
  joined.geometry.groups = 1;
  return joined;
}

// weight -> [block][kernel position][vectors x lanes]
template <class T>
void pack_depthwise(const ConvCall<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  const ConvCall<T> joined = joined_groups(call);
  const int64_t taps = call.geometry.taps();
  for (int64_t item = first_item; item < last_item; ++item) {
    const Block block = block_of<C>(joined.geometry, item);
    const int64_t width = block.vectors * kLanes<C>;
    C* to = call.packed + block.first * taps;
    fill_zeros(to, taps * width);
    transpose_matrix(call.weight + block.first * call.weight_layout.n, call.weight_layout.n, block.count, taps, to,
                     width);
  }
}

template <class T>
void run_depthwise(const ConvCall<T>& original, int64_t first_item, int64_t last_item, void* scratch) {
  using C = Compute<T>;
  const ConvCall<T> call = joined_groups(original);
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.input_layout;
  const DepthwisePlan& plan = original.plan->depthwise;
  const int64_t (&extent)[3] = plan.band.input;
  const int64_t taps = g.taps();
  constexpr int64_t most = kBlockVectors * kLanes<C>;  // of a block's channels
  const int64_t step[] = {extent[1] * extent[2] * most, extent[2] * most, most};
  Parts parts(scratch);
  C* const copies = parts.take<C>(plan.together * plan.copy_size);
  int64_t* const offsets = parts.take<int64_t>(taps);
  ChannelPool<T> pool(call, plan.band, plan.ring, parts, true);
  const bool is_flat = g.input[0] == 1 && g.kernel[0] == 1 && g.conv[0] == 1 && g.padding[0] == 0;
  const bool in_place = is_flat && sizeof(T) == sizeof(C) && layout.d[2] != 1 && g.out_channels % kLanes<C> == 0;
  const ConvLayout& out = call.output_layout;
  const bool writes_at_once = g.pools_nothing() && !call.winners && out.d[2] != 1;
  for (int64_t k = 0; k < taps; ++k) {
    const int64_t (&steps)[3] = in_place ? layout.d : step;
    offsets[k] = k / (g.kernel[1] * g.kernel[2]) * g.dilation[0] * steps[0] +
                 k / g.kernel[2] % g.kernel[1] * g.dilation[1] * steps[1] + k % g.kernel[2] * g.dilation[2] * steps[2];
  }
  // A transpose leaves the lanes beyond the last channel as they are.
  if (layout.d[2] == 1 && g.out_channels % most) fill_zeros(copies, plan.together * plan.copy_size);
  // All rows of some blocks' channels, row by row: each is a single stream from memory.
  const auto copy_blocks = [&](const Band& band, int64_t first_block, int64_t last_block) {
    const Inside inside = overlap(band.input[2], extent[2], g.input[2]);
    const T* const image = call.input + band.image * layout.n + band.input[2] * layout.d[2];
    for_each_input_row(g, layout, plan.band, band, [&](int64_t d, int64_t h, bool is_inside, int64_t at) {
      C* const copy = copies + d * step[0] + h * step[1];
      for (int64_t b = first_block; b < last_block; ++b) {
        const Block block = block_of<C>(g, b);
        copy_row(is_inside, inside, extent[2], most, copy + (b - first_block) * plan.copy_size,
                 [&](C* to, int64_t first, int64_t count) {
                   if (layout.d[2] != 1) return;
                   transpose_matrix(image + at + block.first * layout.c + first, layout.c, block.count, count, to,
                                    most);
                 });
      }
      if (!is_inside || layout.d[2] == 1) return;
      for (int64_t x = inside.first; x < inside.last; ++x) {
        const T* const pixel = image + at + x * layout.d[2];
        C* to = copy + x * most;
        for (int64_t b = first_block; b < last_block; ++b, to += plan.copy_size) {
          const Block block = block_of<C>(g, b);
          for (int64_t c = 0; c < block.vectors * kLanes<C>; c += kLanes<C>) {
            const int64_t left = block.count - c;
            store(to + c, left > 0 ? load_up_to<T>(pixel + block.first + c, left) : Vec<C>{});
          }
        }
      }
    });
  };
  for (int64_t item = first_item; item < last_item; ++item) {
    const Band band = band_of(g, plan.band, plan.block_parts, item);
    int64_t first, last;
    part_of(blocks_of<C>(g), band.part, plan.block_parts, first, last);
    for (int64_t b = first; b < last; ++b) {
      const int64_t place = (b - first) % plan.together;
      if (place == 0 && !in_place) copy_blocks(band, b, smaller(b + plan.together, last));
      const Block block = block_of<C>(g, b);
      const C* const copy = copies + place * plan.copy_size;
      const C* weight = call.packed + block.first * taps;
      const C* const image = reinterpret_cast<const C*>(call.input) + band.image * layout.n + block.first;
      if (in_place && writes_at_once) {
        pool.start(band, block);
        for (int64_t r = 0; r < band.rows; ++r) {
          const int64_t at = band.image * out.n + block.first + (band.row + r) * out.d[1] + band.column * out.d[2];
          depthwise_row<C>(g, layout, image, band.row + r, band.column, band.columns, offsets, weight, block.vectors,
                           pool.bias(), {reinterpret_cast<C*>(call.output) + at, out.d[2], bounds_of(call)});
          finish_rows(call, at, block.count, band.columns);
        }
        continue;
      }
      pool.run(band, band.image, block, [&](int64_t z, int64_t y, const Segment& segment) {
        const int64_t count = segment.inside.last - segment.inside.first;
        const int64_t column = segment.conv + segment.inside.first;
        const DepthwiseSums<C> sums = {pool.row(z, y, segment), block.vectors * kLanes<C>, {}};
        if (in_place) {
          return depthwise_row(g, layout, image, y, band.conv[2] + column, count, offsets, weight, block.vectors,
                               pool.bias(), sums);
        }
        const C* from = copy + (z - band.conv[0]) * g.stride[0] * step[0] + (y - band.conv[1]) * g.stride[1] * step[1] +
                        column * g.stride[2] * step[2];
        depthwise_pixels<C>({from, step[2], g.stride[2], taps, offsets, weight, block.vectors * kLanes<C>, count, false,
                             false, Vec<C>{}},
                            has_threes(g), pool.bias(), sums);
      });
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
