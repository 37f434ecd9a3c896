// The weight's gradient of 3x3 kernels of stride 1 by Winograd's F(3x3, 2x2), where each conv pixel has a gradient.
//
// dw = G^T [sum over tiles of (B^T d B) * (A dy A^T)] G, with forward's matrices: d is a tile of 4x4 input pixels, dy
// the gradients of its 2x2 conv pixels. Sixteen multiplications take the place of 36. Some tiles at a time are
// transformed, in memory that all threads share, and then multiplied: at each of the 16 positions a product of
// matrices, input channels x tiles by tiles x output channels, which is added to sums of the weight's size. At the end
// these are transformed into taps. The input is transformed again, rather than kept from forward: that would write and
// read four times its bytes. ReLU's mask is taken where gradients are loaded, and the position at which a tile's
// gradients are summed gives the bias's gradient.
//
// Which thread does what changes no sum: tiles are transformed each for itself, and a position's sums of a block of
// output channels are all made by one thread, in the order of the tiles. The input's gradient is winograd forward, of
// the same gradients by the weight turned around (conv_winograd_backward.h in csrc/ops).
#pragma once

#include "../winograd.h"
#include "sums.h"

namespace fastnn {
namespace FASTNN_ISA {

// Where the transformed tiles and the sums of a group lie: [position][block of outputs][tile or channel][width], and
// the inputs [position][tile][pitch]. A position ends with an unused line.
template <class T, class C = Compute<T>>
struct WinogradSums {
  const ConvBackward<T>& call;
  const WinogradTiles<C>& tiles;
  const ConvPoolGeometry& g = call.geometry;
  const WinogradBackwardPlan& plan = call.plan->winograd;
  const int64_t count = tiles.last - tiles.first;

  C* input(int64_t position) const { return tiles.inputs + position * plan.input_step(count); }
  C* gradient(int64_t position, const Block& block) const {
    return tiles.gradients + position * plan.gradient_step(count) + count * block.first;
  }
  C* sums(int64_t position, const Block& block) const {
    return tiles.sums + position * plan.sums_step(g.in_channels) + g.in_channels * block.first;
  }
};

// Transforms the tiles [first, last), counted from the first of `tiles`.
template <class T, class C = Compute<T>>
void transform_tiles(const ConvBackward<T>& call, const WinogradTiles<C>& tiles, int64_t first, int64_t last,
                     void* scratch) {
  const WinogradSums<T> at{call, tiles};
  const ConvPoolGeometry& g = call.geometry;
  const WinogradBackwardPlan& plan = call.plan->winograd;
  const int64_t gradient_step = plan.gradient_step(at.count);
  C* const memory = static_cast<C*>(scratch);
  TileRows<T> inputs(memory, plan.pitch);
  C* const rows = memory + plan.rows_size();
  const ConvLayout &il = call.input_layout, &ol = call.output_layout;
  if (g.out_channels < plan.outputs) fill_zeros(rows, plan.gradient_rows_size());
  int64_t before = -1;  // the row of tiles that was loaded last, as a whole
  for (int64_t i = first, count; i < last; i += count) {
    const int64_t tile = tiles.first + i, column = tile % plan.columns, number = tile / plan.columns;
    const int64_t row = number % plan.rows, image = number / plan.rows;
    count = smaller(smaller(plan.together, plan.columns - column), last - i);
    if (tiles.sums) {
      inputs.move_to({call.input,
                      nullptr,
                      il,
                      image * il.n + tiles.group * g.in_channels * il.c,
                      g.in_channels,
                      {g.input[1], g.input[2]}},
                     2 * row - g.padding[1], 2 * column - g.padding[2], 2 * count + 2,
                     count == plan.columns && row > 0 && before == number - 1);
      before = count == plan.columns ? number : -1;
      for (int64_t t = 0; t < count; ++t) {
        inputs.transform(t, g.in_channels, at.input(0) + (i + t) * plan.pitch, plan.input_step(at.count));
      }
    }
    const int64_t columns = 2 * count;
    for (int64_t y = 0; y < 2; ++y) {
      load_row<T>({call.grad_output,
                   call.winners,
                   ol,
                   image * ol.n + tiles.group * g.out_channels * ol.c,
                   g.out_channels,
                   {g.conv[1], g.conv[2]}},
                  2 * row + y, 2 * column, columns, rows + y * columns * plan.outputs, plan.outputs);
    }
    for (int64_t b = 0; b < blocks_of<C>(g); ++b) {
      const Block block = block_of<C>(g, b);
      C* to = at.gradient(0, block) + i * block.vectors * kLanes<C>;
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t v = 0; v < block.vectors; ++v, to += kLanes<C>) {
          const C* from = rows + 2 * t * plan.outputs + block.first + v * kLanes<C>;
          Vec<C> half[4][2];
          for (int x = 0; x < 2; ++x, from += plan.outputs) {
            const Vec<C> pixels[2] = {load(from), load(from + columns * plan.outputs)};
            Vec<C> point[4];
            transform_gradient(pixels, point);
            for (int y = 0; y < 4; ++y) half[y][x] = point[y];
          }
          for (int y = 0; y < 4; ++y) {
            Vec<C> point[4];
            transform_gradient(half[y], point);
            for (int x = 0; x < 4; ++x) store(to + (y * 4 + x) * gradient_step, point[x]);
          }
        }
      }
    }
  }
}

// Adds the products of all tiles to the sums of items [first, last), each a position of a block of outputs.
template <class T, class C = Compute<T>>
void multiply_tiles(const ConvBackward<T>& call, const WinogradTiles<C>& tiles, int64_t first, int64_t last) {
  const WinogradSums<T> at{call, tiles};
  const ConvPoolGeometry& g = call.geometry;
  const WinogradBackwardPlan& plan = call.plan->winograd;
  constexpr int64_t position_of_sums = 2 * 4 + 2;  // where transform_gradient adds up all of a tile
  alignas(64) const C zeros[kBlockVectors * kLanes<C>] = {};
  int64_t offsets[kLongestSum];
  for (int64_t k = 0; k < kLongestSum; ++k) offsets[k] = k * plan.pitch;
  for (int64_t item = first; item < last; ++item) {
    const int64_t position = item / blocks_of<C>(g);
    const Block block = block_of<C>(g, item % blocks_of<C>(g));
    const int64_t width = block.vectors * kLanes<C>;
    for (int64_t k = 0, count; k < at.count; k += count) {
      count = smaller(plan.part, at.count - k);
      const C* gradients = at.gradient(position, block) + k * width;
      if (tiles.sums) {
        const C* start = tiles.first + k == 0 ? zeros : nullptr;
        sum_pixels<C>(block.vectors, at.input(position) + k * plan.pitch, 1, g.in_channels, offsets, 0, count,
                      gradients, start, at.sums(position, block));
      }
      if (position != position_of_sums || !tiles.bias) continue;
      for (int64_t o = 0; o < width; o += kLanes<C>) {
        Vec<C> total = {};
        for (int64_t t = 0; t < count; ++t) total += load(gradients + t * width + o);
        for (int64_t i = 0; i < kLanes<C> && o + i < block.count; ++i) tiles.bias[block.first + o + i] += total[i];
      }
    }
  }
}

// Writes the pieces [first, last) of the group's gradient, each some input channels of a block of outputs.
template <class T, class C = Compute<T>>
void write_weight_gradient(const ConvBackward<T>& call, const WinogradTiles<C>& tiles, int64_t first, int64_t last,
                           T* to, const ConvLayout& layout) {
  const WinogradSums<T> at{call, tiles};
  const ConvPoolGeometry& g = call.geometry;
  const WinogradBackwardPlan& plan = call.plan->winograd;
  const bool is_last = g.in_channels > 1 && layout.c == 1 && layout.d[2] != 1;
  constexpr int64_t some = kWinogradChannels;
  alignas(64) C taps[9 * some * kBlockVectors * kLanes<C>];
  const int64_t pieces = divide_up(g.in_channels, some);
  for (int64_t item = first; item < last; ++item) {
    const Block block = block_of<C>(g, item / pieces);
    const int64_t width = block.vectors * kLanes<C>, c = item % pieces * some;
    const int64_t channels = smaller(some, g.in_channels - c);
    const int64_t tap_step = is_last ? some * width : width, channel_step = is_last ? width : 9 * width;
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t o = 0; o < width; o += kLanes<C>) {
        const C* from = at.sums(0, block) + (c + i) * width + o;
        C* const taps_of = taps + i * channel_step + o;
        Vec<C> half[3][4];
        for (int x = 0; x < 4; ++x) {
          Vec<C> point[4], column[3];
          for (int y = 0; y < 4; ++y) point[y] = load(from + (y * 4 + x) * plan.sums_step(g.in_channels));
          transform_sums(point, column);
          for (int y = 0; y < 3; ++y) half[y][x] = column[y];
        }
        for (int y = 0; y < 3; ++y) {
          Vec<C> row[3];
          transform_sums(half[y], row);
          for (int x = 0; x < 3; ++x) store(taps_of + (y * 3 + x) * tap_step, row[x]);
        }
      }
    }
    T* const output = to + (tiles.group * g.out_channels + block.first) * layout.n;
    if (!is_last) {
      transpose_matrix(taps, width, 9 * channels, block.count, output + 9 * c, layout.n);
      continue;
    }
    for (int64_t tap = 0; tap < 9; ++tap) {
      transpose_matrix(taps + tap * tap_step, width, channels, block.count, output + tap * g.in_channels + c, layout.n);
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
