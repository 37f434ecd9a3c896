// Winograd's F(2, r) along the rows of the convolution, for each phase of the stride.
//
// For rows of a kernel of more than one column a stride apart, dense along the row, and enough outputs to be worth a
// transform of the input. A kernel that strides by s is s kernels of every s-th column, each of which slides by one
// over every s-th column of the input; a long one is several pieces in a row. A piece of r columns makes two
// neighbouring pixels from r + 1 products a row of the kernel and channel in place of 2 r.
//
// Costs 4 multiply-adds in place of 6 for 3 columns, 7 in place of 10 for 5, 9 in place of 14 for 7 columns of stride
// 2, and (r + 1) / 2 stores for each element of the input. Rounding errors stay at direct convolution's; NaN, infinity
// and huge values would spread over the pair, so calls that have some go to direct convolution.
#pragma once

#include "direct.h"
#include "transforms.h"

namespace fastnn {
namespace FASTNN_ISA {

// Writes the columns of an input row as runs of columns that are 2 x stride apart. The columns that a column of the
// kernel reads for one pair of pixels after another then lie side by side.
template <class C, class T>
void part_row(const T* row, Inside columns, int64_t places, int64_t run, C* to) {
  fill_zeros(to, places * run);
  if (columns.last <= columns.first) return;
  const int64_t first = columns.first % places, pair = columns.first / places;
  part_columns(row + columns.first, columns.last - columns.first, places, to, [=](int64_t i) {
    const int64_t place = first + i;
    return place < places ? place * run + pair : (place - places) * run + pair + 1;
  });
}

// Transforms `rows` rows of the kernel, of `width` output channels, into each position of the packed weight. The first
// goes to `to` in position 0, each next `to_step` elements on; positions are `position_step` apart.
template <class C>
void pack_rows(const PhasesPlan& plan, int64_t stride, int64_t rows, const C* columns, int64_t row_step,
               int64_t column_step, int64_t width, C* to, int64_t to_step, int64_t position_step) {
  for (int64_t p = 0; p < plan.pieces; ++p) {
    const KernelPiece& piece = plan.piece[p];
    with_constant<kMostTaps>(static_cast<int>(piece.taps), [&](auto taps_constant) {
      constexpr int count = decltype(taps_constant)::value;
      for (int64_t row = 0; row < rows; ++row) {
        const C* const from = columns + row * row_step + piece.first * column_step;
        for (int64_t o = 0; o < width; o += kLanes<C>) {
          Vec<C> column[count], point[count + 1];
          for (int i = 0; i < count; ++i) column[i] = load(from + i * stride * column_step + o);
          transform_weight(column, point);
          for (int i = 0; i <= count; ++i) store(to + row * to_step + piece.position[i] * position_step + o, point[i]);
        }
      }
    });
  }
}

template <class T>
void pack_phases(const ConvCall<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const PhasesPlan& plan = call.plan->phases;
  const int64_t blocks = blocks_of<C>(g), depth = plan.direct.depth;
  constexpr int64_t most = kMostPieces * kMostTaps, some = 5 * most;  // columns of a row, and those of some rows
  alignas(64) C columns[some * kBlockVectors * kLanes<C>] = {};
  const bool last = weight_is_channels_last(call);
  // Rows of the kernel that lie side by side are moved together: the rows of all channels, or one row of some channels.
  const int64_t rows = g.kernel[0] * g.kernel[1], side_by_side = last ? g.in_channels : depth;
  const int64_t together = smaller(some / g.kernel[2], side_by_side);
  for (int64_t item = first_item; item < last_item; ++item) {
    const Block block = block_of<C>(g, item % blocks);
    const int64_t width = block.vectors * kLanes<C>;
    C* const to = call.packed + lanes_before<C>(g, item / blocks, block) * depth * plan.positions;
    const T* const from = call.weight + (item / blocks * g.out_channels + block.first) * call.weight_layout.n;
    const int64_t row_step = last ? width : g.kernel[2] * width, column_step = last ? together * width : width;
    for (int64_t r = 0; r < (last ? rows : 1); ++r) {
      for (int64_t first = 0, count; first < side_by_side; first += count) {
        count = smaller(together, side_by_side - first);
        if (last) {
          for (int64_t w = 0; w < g.kernel[2]; ++w) {
            transpose_matrix(from + (r * g.kernel[2] + w) * g.in_channels + first, call.weight_layout.n, block.count,
                             count, columns + w * column_step, width);
          }
        } else {
          transpose_matrix(from + first * g.kernel[2], call.weight_layout.n, block.count, count * g.kernel[2], columns,
                           width);
        }
        const int64_t k = last ? first * rows + r : first, step = last ? rows : 1;
        pack_rows(plan, g.stride[2], count, columns, row_step, column_step, width, to + k * width, step * width,
                  depth * width);
      }
    }
  }
}

// Transforms a row of the input in channels last, and writes it as [position][pair][channel]. `pad` is a pixel of
// zeros.
template <class T, class C = Compute<T>>
void transform_pixels(const ConvCall<T>& call, const T* row, Inside columns, const T* pad, C* to) {
  const ConvPoolGeometry& g = call.geometry;
  const PhasesPlan& plan = call.plan->phases;
  const int64_t pixel = plan.direct.step[2];
  for (int64_t pair = 0; pair < plan.pairs; ++pair, to += pixel) {
    for (int64_t p = 0; p < plan.pieces; ++p) {
      const KernelPiece& piece = plan.piece[p];
      with_constant<kMostTaps>(static_cast<int>(piece.taps), [&](auto taps_constant) {
        constexpr int count = decltype(taps_constant)::value;
        const T* from[count + 1];
        for (int i = 0; i <= count; ++i) {
          const int64_t x = 2 * g.stride[2] * pair + piece.pixels[i];
          from[i] = x >= columns.first && x < columns.last ? row + x * call.input_layout.d[2] : pad;
        }
        for (int64_t c = 0; c < g.in_channels; c += kLanes<C>) {
          Vec<C> meets[count + 1], point[count + 1];
          for (int i = 0; i <= count; ++i) meets[i] = load_up_to<T>(from[i] + c, g.in_channels - c);
          transform_input(meets, point);
          for (int i = 0; i <= count; ++i) {
            store_up_to<C>(to + piece.position[i] * plan.position_step + c, point[i], g.in_channels - c);
          }
        }
      });
    }
  }
}

// Transforms a contiguous row of one channel, and writes it as [position][pair]. `memory` takes the row as part_row
// writes it.
template <class T, class C = Compute<T>>
void transform_row(const ConvCall<T>& call, const T* row, Inside columns, C* memory, C* to) {
  const PhasesPlan& plan = call.plan->phases;
  const int64_t places = 2 * call.geometry.stride[2], run = plan.column_run;
  part_row(row, columns, places, run, memory);
  for (int64_t p = 0; p < plan.pieces; ++p) {
    const KernelPiece& piece = plan.piece[p];
    with_constant<kMostTaps>(static_cast<int>(piece.taps), [&](auto taps_constant) {
      constexpr int count = decltype(taps_constant)::value;
      const C* from[count + 1];
      for (int i = 0; i <= count; ++i) from[i] = memory + piece.pixels[i] % places * run + piece.pixels[i] / places;
      for (int64_t pair = 0; pair < plan.direct.step[1]; pair += kLanes<C>) {
        Vec<C> pixel[count + 1], point[count + 1];
        for (int i = 0; i <= count; ++i) pixel[i] = load(from[i] + pair);
        transform_input(pixel, point);
        for (int i = 0; i <= count; ++i) store(to + piece.position[i] * plan.position_step + pair, point[i]);
      }
    });
  }
}

// The input under a band of one image, transformed.
template <class T, class C = Compute<T>>
void transform_band(const ConvCall<T>& call, const Band& band, int64_t image, const T* pad, C* memory, C* copy) {
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.input_layout;
  const PhasesPlan& plan = call.plan->phases;
  const DirectPlan& shape = plan.direct;
  const bool channels_last = shape.channels_last;
  const Inside columns = overlap(band.input[2], shape.band.input[2], g.input[2]);
  const T* const from = call.input + image * layout.n + band.group * g.in_channels * layout.c;
  for (int64_t c = 0; c < (channels_last ? 1 : g.in_channels); ++c) {
    for_each_input_row(g, layout, shape.band, band, [&](int64_t d, int64_t h, bool inside, int64_t at) {
      C* const to = copy + c * shape.channel_step + d * shape.step[0] + h * shape.step[1];
      const T* row = from + c * layout.c + at + band.input[2] * layout.d[2];
      if (!inside) {
        for (int64_t p = 0; p < plan.positions; ++p) fill_zeros(to + p * plan.position_step, shape.step[1]);
      } else if (channels_last) {
        transform_pixels(call, row, columns, pad, to);
      } else {
        transform_row(call, row, columns, memory, to);
      }
    });
  }
}

// Sums at each point, [point][pair][width] -> the conv pixels of a row that are inside, [pixel][width].
template <int points, class C>
void join_pairs(const C* sums, int64_t point_step, const C* bias, int vectors, Inside inside, C* to) {
  const int64_t width = vectors * kLanes<C>;
  for (int64_t pair = inside.first / 2; 2 * pair < inside.last; ++pair) {
    for (int v = 0; v < vectors; ++v) {
      const C* at = sums + pair * width + v * kLanes<C>;
      const Vec<C> start = load(bias + v * kLanes<C>);
      Vec<C> even = start + load(at), odd = start + load(at + point_step);
#pragma GCC unroll 3
      for (int p = 2; p < points; ++p) {
        const Vec<C> sum = load(at + p * point_step);
        even += sum;
        odd = multiply_add(broadcast<C>(kOddShare[p]), sum, odd);
      }
      C* pixel = to + 2 * pair * width + v * kLanes<C>;
      if (2 * pair >= inside.first) store(pixel, even);
      if (2 * pair + 1 < inside.last) store(pixel + width, odd);
    }
  }
}

template <class T>
void run_phases(const ConvCall<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const PhasesPlan& plan = call.plan->phases;
  const DirectPlan& shape = plan.direct;
  Parts parts(scratch);
  C* const copy = parts.take<C>(shape.copy_size);
  C* const parted = parts.take<C>(2 * g.stride[2] * plan.column_run);
  T* const pad = parts.take<T>(g.in_channels);
  C* const zeros = parts.take<C>(kBlockVectors * kLanes<C>);
  C* const sums = parts.take<C>(kMostPoints * plan.pairs * kBlockVectors * kLanes<C>);
  int64_t* const offsets = parts.take<int64_t>(plan.positions * shape.depth);
  ChannelPool<T> pool(call, shape.band, shape.ring, parts);
  fill_zeros(pad, g.in_channels);
  fill_zeros(zeros, kBlockVectors * kLanes<C>);
  int64_t k = 0;
  for (int64_t c = 0; c < g.in_channels; ++c) {
    for (int64_t d = 0; d < g.kernel[0]; ++d) {
      for (int64_t h = 0; h < g.kernel[1]; ++h, ++k) {
        const int64_t offset =
            c * shape.channel_step + d * g.dilation[0] * shape.step[0] + h * g.dilation[1] * shape.step[1];
        for (int64_t p = 0; p < plan.positions; ++p) offsets[p * shape.depth + k] = p * plan.position_step + offset;
      }
    }
  }
  const Runs runs = runs_of<C>(offsets, shape.depth);
  for (int64_t item = first_item; item < last_item; ++item) {
    const Band band = band_of(g, shape.band, shape.block_parts, item);
    transform_band(call, band, band.image, pad, parted, copy);
    int64_t first, last;
    part_of(blocks_of<C>(g), band.part, shape.block_parts, first, last);
    for (int64_t b = first; b < last; ++b) {
      const Block block = block_of<C>(g, b);
      const int64_t width = block.vectors * kLanes<C>, point_step = plan.pairs * width;
      const C* weight = call.packed + lanes_before<C>(g, band.group, block) * shape.depth * plan.positions;
      pool.run(band, band.image, block, [&](int64_t z, int64_t y, const Segment& segment) {
        const int64_t first_pair = (segment.conv + segment.inside.first) / 2;  // segments begin with an even pixel
        const int64_t pairs = divide_up(segment.conv + segment.inside.last, 2) - first_pair;
        if (segment.inside.last <= segment.inside.first) return;
        const C* pixels = copy + (z - band.conv[0]) * g.stride[0] * shape.step[0] +
                          (y - band.conv[1]) * g.stride[1] * shape.step[1] + first_pair * shape.step[2];
        for (int64_t point = 0; point < plan.points; ++point) {
          const int64_t at = plan.first[point] * shape.depth, depth = plan.first[point + 1] * shape.depth - at;
          sum_pixels<C>(block.vectors, pixels, shape.step[2], pairs, offsets + at, runs, 0, depth, weight + at * width,
                        zeros, sums + point * point_step);
        }
        const int64_t start = 2 * first_pair - segment.conv;  // the first pair's place in the row
        C* to = pool.ring().slot(z, y) + start * width;
        const Inside inside = {segment.inside.first - start, segment.inside.last - start};
        switch (plan.points) {
          case 2:
            return join_pairs<2>(sums, point_step, pool.bias(), block.vectors, inside, to);
          case 3:
            return join_pairs<3>(sums, point_step, pool.bias(), block.vectors, inside, to);
          case 4:
            return join_pairs<4>(sums, point_step, pool.bias(), block.vectors, inside, to);
          default:
            return join_pairs<5>(sums, point_step, pool.bias(), block.vectors, inside, to);
        }
      });
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
