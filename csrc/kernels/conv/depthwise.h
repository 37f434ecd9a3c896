// Groups of one channel: channels in the vector's lanes, nothing to sum up but the kernel's positions.
//
// For depthwise layers, whose sums are too short for other algorithms to fill their lanes. Costs a multiply-add for
// each product of a vector of channels, with a load where columns of the input are not shared by several products, and
// a load and a store for each vector of the input.
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

// One vector of channels of a row of `count` pixels, whose sums are computed side by side.
template <class C>
struct DepthwiseRow {
  const C* from;           // the first pixel, under the kernel's first position
  int64_t step;            // from a column of the input to the next
  int64_t taps;            // positions of the kernel
  const int64_t* offsets;  // [taps]: from the first position to each
  const C* weight;         // [taps][width]
  int64_t width;
  int64_t count;
  int64_t skip_left, skip_right;  // columns under the first pixels and under the last ones that are padding
  Vec<C> bias;
};

// Sums of `pixels` neighbouring pixels from `first` on, which lie `stride` columns apart. Each column of the input is
// loaded once, and multiplied for every pixel that reads it by one of `kernel` neighbouring kernel positions.
template <int pixels, int kernel, int stride, class C>
FASTNN_INLINE void depthwise_tile(const DepthwiseRow<C>& row, int64_t first, const DepthwiseSums<C>& result,
                                  int64_t lane) {
  constexpr int columns = (pixels - 1) * stride + kernel;
  const int64_t skip_left = first == 0 ? row.skip_left : 0;
  const int64_t end = columns - (first + pixels == row.count ? row.skip_right : 0);
  Vec<C> sums[pixels];
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) sums[p] = row.bias;
  for (int64_t k = 0; k < row.taps; k += kernel) {
    const C* at = row.from + first * stride * row.step + row.offsets[k];
    Vec<C> right[kernel];
#pragma GCC unroll 5
    for (int tap = 0; tap < kernel; ++tap) right[tap] = load(row.weight + (k + tap) * row.width);
#pragma GCC unroll 20
    for (int column = 0; column < columns; ++column, at += row.step) {
      if (column < kernel - 1 && column < skip_left) continue;
      if (column > columns - kernel && column >= end) continue;
      Vec<C> left = load(at);
      if (kernel > 1) keep_in_register(left);
#pragma GCC unroll 5
      for (int tap = 0; tap < kernel; ++tap) {
        const int p = (column - tap) / stride;
        if (column < tap || p >= pixels || p * stride + tap != column) continue;
        sums[p] = multiply_add(left, right[tap], sums[p]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) result.set(first + p, lane, sums[p]);
}

// The positions of the kernel side by side that share the columns of the input, or 1 where they do not.
FASTNN_INLINE int64_t sharing_positions(const ConvPoolGeometry& g) {
  const bool share = (g.kernel[2] == 3 || g.kernel[2] == 5) && g.dilation[2] == 1 && g.stride[2] <= 2;
  return share ? g.kernel[2] : 1;
}

// Sums of the pixels of a block, side by side, in tiles that are as equal as possible. `given` is the row of the
// block's first vector, with the step between two neighbouring columns.
template <class C>
void depthwise_pixels(const ConvPoolGeometry& g, const DepthwiseRow<C>& given, const C* bias,
                      const DepthwiseSums<C>& sums) {
  const int64_t count = given.count;
  with_constant<8>(static_cast<int>(divide_up(count, larger(1, divide_up(count, 8)))), [&](auto tile) {
    constexpr int pixels = decltype(tile)::value;
    const auto run = [&](auto kernel, auto stride, int64_t step) __attribute__((always_inline)) {
      const DepthwiseSums<C> result = sums;  // A copy stays in registers: no store can change it.
      DepthwiseRow<C> row = given;
      row.step = step;
      for (int64_t lane = 0; lane < given.width; lane += kLanes<C>) {
        row.from = given.from + lane;
        row.weight = given.weight + lane;
        row.bias = load(bias + lane);
        for (int64_t next = 0; next < count; next += pixels) {
          const int64_t x = smaller(next, count - pixels);  // the last tile may begin in the one before
          depthwise_tile<pixels, decltype(kernel)::value, decltype(stride)::value>(row, x, result, lane);
        }
      }
    };
    const int64_t positions = sharing_positions(g);
    const bool dense = g.stride[2] == 1;
    if (positions == 3) {
      dense ? run(Constant<3>{}, Constant<1>{}, given.step) : run(Constant<3>{}, Constant<2>{}, given.step);
    } else if (positions == 5) {
      dense ? run(Constant<5>{}, Constant<1>{}, given.step) : run(Constant<5>{}, Constant<2>{}, given.step);
    } else {
      run(Constant<1>{}, Constant<1>{}, g.stride[2] * given.step);
    }
  });
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
  const int64_t last = first + count, positions = sharing_positions(g);
  int64_t skip_left = larger(0, g.padding[2] - first * g.stride[2]);
  int64_t skip_right = larger(0, (last - 1) * g.stride[2] - g.padding[2] + g.kernel_extent(2) - g.input[2]);
  // A tile leaves columns of padding out where positions share them. Else no position of a kernel is on the padding
  // from `begin` to `end`, and the pixels beyond are computed one by one.
  int64_t begin = first, end = last;
  if (skip_left >= positions || skip_right >= positions) {
    const int64_t reach = g.input[2] + g.padding[2] - g.kernel_extent(2);
    begin = smaller(last, larger(first, divide_up(g.padding[2], g.stride[2])));
    end = height == 0 || reach < 0 ? begin : larger(begin, smaller(last, reach / g.stride[2] + 1));
    skip_left = skip_right = 0;
  }
  if (end > begin) {
    depthwise_pixels<C>(g,
                        {input_at(begin, 0), layout.d[2], height * taps, offsets, weight, width, end - begin, skip_left,
                         skip_right, Vec<C>{}},
                        bias, result.from(begin - first));
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
        const DepthwiseRow<C> row = {from, step[2], taps, offsets, weight, block.vectors * kLanes<C>, count, 0, 0, {}};
        depthwise_pixels<C>(g, row, pool.bias(), sums);
      });
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
