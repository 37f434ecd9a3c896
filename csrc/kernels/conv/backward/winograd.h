// The weight's gradient of 3x3 kernels of stride 1 by Winograd's F(3x3, 2x2), where each conv pixel has a gradient.
//
// dw = G^T [sum over tiles of (B^T d B) * (A dy A^T)] G, with forward's matrices: d is a tile of 4x4 input pixels, dy
// the gradients of its 2x2 conv pixels. Sixteen multiplications take the place of 36. A part of the tiles is
// transformed, so few that they stay in cache, and multiplied: at each of the 16 positions a product of matrices, input
// channels x tiles by tiles x output channels, which is added to sums of the weight's size. At the end these are
// transformed into taps. The input is transformed again, rather than kept from forward: that would write and read four
// times its bytes. ReLU's mask is taken where gradients are loaded, and the position at which a tile's gradients are
// summed gives the bias's gradient.
//
// The tiles are cut into shares, as many as the sizes of the call say, and each share has sums of its own for each
// block of output channels. So the number of threads, which share these pairs, changes no sum. The input's gradient is
// winograd forward, of the same gradients by the weight turned around (conv_winograd_backward.h in csrc/ops).
#pragma once

#include "../winograd.h"
#include "sums.h"

namespace fastnn {
namespace FASTNN_ISA {

// The sums of a share of a group's tiles at a position, for a block of outputs: [channel][width].
template <class C>
FASTNN_INLINE C* winograd_sums(const WinogradBackwardPlan& plan, C* sums, int64_t share, int64_t position,
                               int64_t channels, const Block& block) {
  return sums + (share * kWinogradPositions + position) * plan.sums_step(channels) + channels * block.first;
}

template <class T>
class WinogradWorker {
  using C = Compute<T>;

 public:
  WinogradWorker(const ConvBackward<T>& call, Parts& memory)
      : call_(call),
        g_(call.geometry),
        plan_(call.plan->winograd),
        input_rows_(memory.take<C>(plan_.rows_size()), plan_.pitch),
        rows_(memory.take<C>(plan_.gradient_rows_size())),
        inputs_(memory.take<C>(kWinogradPositions * plan_.input_step())),
        gradients_(memory.take<C>(kWinogradPositions * plan_.gradient_step())) {}

  // Items [first, last), each a share of a group's tiles and a block. Writes `sums`, unless they are null, and `bias`,
  // [share of a group][output].
  void run(int64_t first, int64_t last, C* sums, double* bias) {
    for (int64_t k = 0; k < kLongestSum; ++k) offsets_[k] = k * plan_.pitch;
    if (g_.out_channels < plan_.outputs) fill_zeros(rows_, plan_.gradient_rows_size());
    for (int64_t item = first, end; item < last; item = end) {
      const int64_t share = item / plan_.blocks, number = share % plan_.shares, group = share / plan_.shares;
      end = smaller(last, (share + 1) * plan_.blocks);
      const Range blocks = {item - share * plan_.blocks, end - share * plan_.blocks};
      fill_zeros(bias + share * g_.out_channels + blocks.first * kBlock, channels_of(blocks));
      const int64_t parts = divide_up(plan_.tiles, plan_.part);
      const Range tiles = {parts * number / plan_.shares * plan_.part,
                           parts * (number + 1) / plan_.shares * plan_.part};
      for (int64_t tile = tiles.first; tile < smaller(tiles.last, plan_.tiles); tile += plan_.part) {
        const int64_t count = smaller(plan_.part, plan_.tiles - tile);
        transform(group, tile, count, blocks, sums != nullptr);
        if (sums) multiply(count, blocks, sums, share, tile == tiles.first);
        add_gradients(count, blocks, bias + share * g_.out_channels);
      }
    }
  }

 private:
  static constexpr int64_t kBlock = kBlockVectors * kLanes<C>;

  int64_t channels_of(const Range& blocks) const {
    return smaller(g_.out_channels, blocks.last * kBlock) - blocks.first * kBlock;
  }
  // Where a block's transformed gradients are: [tile][width].
  C* gradients(int64_t position, const Block& block) const {
    return gradients_ + position * plan_.gradient_step() + plan_.part * block.first;
  }

  void transform(int64_t group, int64_t first, int64_t tiles, const Range& blocks, bool input_wanted) {
    const ConvLayout &il = call_.input_layout, &ol = call_.output_layout;
    int64_t before = -1;  // the row of tiles that was loaded last, as a whole
    for (int64_t i = 0, count; i < tiles; i += count) {
      const int64_t column = (first + i) % plan_.columns, number = (first + i) / plan_.columns;
      const int64_t row = number % plan_.rows, image = number / plan_.rows;
      count = smaller(smaller(plan_.together, plan_.columns - column), tiles - i);
      if (input_wanted) {
        const int64_t at = image * il.n + group * g_.in_channels * il.c;
        const bool whole = count == plan_.columns;
        input_rows_.move_to({call_.input, nullptr, il, at, g_.in_channels, {g_.input[1], g_.input[2]}},
                            2 * row - g_.padding[1], 2 * column - g_.padding[2], 2 * count + 2,
                            whole && row > 0 && before == number - 1);
        before = whole ? number : -1;
        for (int64_t t = 0; t < count; ++t) {
          input_rows_.transform(t, g_.in_channels, inputs_ + (i + t) * plan_.pitch, plan_.input_step());
        }
      }
      const int64_t channel = blocks.first * kBlock;
      const int64_t at = image * ol.n + (group * g_.out_channels + channel) * ol.c;
      for (int64_t y = 0; y < 2; ++y) {
        load_row<T>({call_.grad_output, call_.winners, ol, at, channels_of(blocks), {g_.conv[1], g_.conv[2]}},
                    2 * row + y, 2 * column, 2 * count, rows_ + y * 2 * count * plan_.outputs, plan_.outputs);
      }
      for (int64_t b = blocks.first; b < blocks.last; ++b) {
        const Block block = block_of<C>(g_, b);
        transform_gradients(rows_ + block.first - channel, count, block.vectors,
                            gradients(0, block) + i * block.vectors * kLanes<C>);
      }
    }
  }

  // Transforms the gradients of `count` tiles, which lie in two rows [column][outputs].
  void transform_gradients(const C* rows, int64_t count, int64_t vectors, C* to) const {
    for (int64_t t = 0; t < count; ++t, rows += 2 * plan_.outputs) {
      for (int64_t v = 0; v < vectors; ++v, to += kLanes<C>) {
        const C* from = rows + v * kLanes<C>;
        Vec<C> half[4][2];
        for (int x = 0; x < 2; ++x, from += plan_.outputs) {
          const Vec<C> pixels[2] = {load(from), load(from + 2 * count * plan_.outputs)};
          Vec<C> point[4];
          transform_gradient(pixels, point);
          for (int y = 0; y < 4; ++y) half[y][x] = point[y];
        }
        for (int y = 0; y < 4; ++y) {
          Vec<C> point[4];
          transform_gradient(half[y], point);
          for (int x = 0; x < 4; ++x) store(to + (y * 4 + x) * plan_.gradient_step(), point[x]);
        }
      }
    }
  }

  void multiply(int64_t tiles, const Range& blocks, C* sums, int64_t share, bool is_first) const {
    alignas(64) const C zeros[kBlock] = {};
    for (int64_t position = 0; position < kWinogradPositions; ++position) {
      for (int64_t b = blocks.first; b < blocks.last; ++b) {
        const Block block = block_of<C>(g_, b);
        sum_pixels<C>(block.vectors, inputs_ + position * plan_.input_step(), 1, g_.in_channels, offsets_, {}, 0, tiles,
                      gradients(position, block), is_first ? zeros : nullptr,
                      winograd_sums(plan_, sums, share, position, g_.in_channels, block));
      }
    }
  }

  void add_gradients(int64_t tiles, const Range& blocks, double* bias) const {
    constexpr int64_t position = 2 * 4 + 2;  // where transform_gradient adds up all of a tile
    for (int64_t b = blocks.first; b < blocks.last; ++b) {
      const Block block = block_of<C>(g_, b);
      const int64_t width = block.vectors * kLanes<C>;
      for (int64_t o = 0; o < width; o += kLanes<C>) {
        Vec<C> total = {};
        for (int64_t t = 0; t < tiles; ++t) total += load(gradients(position, block) + t * width + o);
        for (int64_t i = 0; i < kLanes<C> && o + i < block.count; ++i) bias[block.first + o + i] += total[i];
      }
    }
  }

  const ConvBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const WinogradBackwardPlan& plan_;
  TileRows<T> input_rows_;
  C* rows_;       // of the gradient: [row][column][output]
  C* inputs_;     // transformed: [position][tile][pitch]
  C* gradients_;  // transformed: [position][block][tile][width]
  int64_t offsets_[kLongestSum];
};

// Writes the pieces [first, last) of the weight's gradient, each some input channels of a block of a group's outputs.
template <class T, class C = Compute<T>>
void write_weight_gradient(const ConvBackward<T>& call, C* sums, int64_t first, int64_t last, T* to,
                           const ConvLayout& layout) {
  const ConvPoolGeometry& g = call.geometry;
  const WinogradBackwardPlan& plan = call.plan->winograd;
  const bool is_last = g.in_channels > 1 && layout.c == 1 && layout.d[2] != 1;
  constexpr int64_t some = kWinogradChannels;
  alignas(64) C taps[9 * some * kBlockVectors * kLanes<C>];
  const int64_t position_step = plan.sums_step(g.in_channels), share_size = kWinogradPositions * position_step;
  const int64_t pieces = divide_up(g.in_channels, some);
  for (int64_t item = first; item < last; ++item) {
    const int64_t group = item / pieces / plan.blocks, c = item % pieces * some;
    const Block block = block_of<C>(g, item / pieces % plan.blocks);
    const int64_t width = block.vectors * kLanes<C>, channels = smaller(some, g.in_channels - c);
    const int64_t tap_step = is_last ? some * width : width, channel_step = is_last ? width : 9 * width;
    const C* const begin = winograd_sums(plan, sums, group * plan.shares, 0, g.in_channels, block) + c * width;
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t o = 0; o < width; o += kLanes<C>) {
        Vec<C> half[3][4];
        for (int x = 0; x < 4; ++x) {
          Vec<C> point[4], column[3];
          for (int y = 0; y < 4; ++y) {
            const C* from = begin + (y * 4 + x) * position_step + i * width + o;
            point[y] = load(from);
            for (int64_t share = 1; share < plan.shares; ++share) point[y] += load(from + share * share_size);
          }
          transform_sums(point, column);
          for (int y = 0; y < 3; ++y) half[y][x] = column[y];
        }
        for (int y = 0; y < 3; ++y) {
          Vec<C> row[3];
          transform_sums(half[y], row);
          for (int x = 0; x < 3; ++x) store(taps + i * channel_step + (y * 3 + x) * tap_step + o, row[x]);
        }
      }
    }
    T* const output = to + (group * g.out_channels + block.first) * layout.n;
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
