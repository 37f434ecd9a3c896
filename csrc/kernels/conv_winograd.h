// Forward: Winograd's F(2x2, 3x3), whose output tile is exactly the window of a 2x2 max-pool, or F(4x4, 3x3), of four
// windows.
//
// A tile of 4x4 input pixels and the 3x3 weights are transformed so that the tile's four conv pixels take 16
// multiplications a channel instead of 36, or one of 6x6 pixels so that its 16 take 36 instead of 144 (Lavin and Gray,
// 2015). A thread transforms the input of a run of tiles, multiplies it by the transformed weight of a block of output
// channels, one position after another, and pools while it transforms back. The smaller tile's error stays at direct
// convolution's, the larger one's only where the result has fewer digits than its sums. NaN, infinity and huge values
// would spread over a tile, so they are for direct convolution.
#pragma once

#include "conv_winograd_plan.h"
#include "conv_winograd_transforms.h"

namespace fastnn {
namespace FASTNN_ISA {

// The taps of some input channels of a block: where those of each begin, and from one tap to the next.
struct TapSteps {
  int64_t channel, tap;
};

// `from` is the first of them; [output channel][..] -> [..][output channel].
template <class T, class C>
void load_taps(const T* from, const ConvLayout& layout, int64_t channels, int64_t outputs, const TapSteps& steps,
               C* to) {
  if (steps.channel > steps.tap) {  // as they lie
    return transpose_matrix(from, layout.n, outputs, 9 * channels, to, steps.tap);
  }
  for (int64_t tap = 0; tap < 9; ++tap) {
    const T* source = from + tap / 3 * layout.d[1] + tap % 3 * layout.d[2];
    C* target = to + tap * steps.tap;
    if (layout.c == 1) {
      transpose_matrix(source, layout.n, outputs, channels, target, steps.channel);
      continue;
    }
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t o = 0; o < outputs; ++o) {
        target[i * steps.channel + o] = to_compute(source[i * layout.c + o * layout.n]);
      }
    }
  }
}

// A vector of each tap -> one of each position
template <int points, class C>
FASTNN_INLINE void transform_taps(const C* taps, int64_t tap_step, C* to, int64_t position_step) {
  Vec<C> half[points][3];
  for (int x = 0; x < 3; ++x) {
    Vec<C> column[3], result[points];
    for (int y = 0; y < 3; ++y) column[y] = load(taps + (y * 3 + x) * tap_step);
    transform_weight(column, result);
    for (int y = 0; y < points; ++y) half[y][x] = result[y];
  }
  for (int y = 0; y < points; ++y) {
    Vec<C> result[points];
    transform_weight(half[y], result);
    for (int x = 0; x < points; ++x) store(to + (y * points + x) * position_step, result[x]);
  }
}

// weight -> [group][block of channels][position][input channel][vectors x lanes]
template <int results, class T>
void pack_tiles(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  constexpr int points = results + 2;
  constexpr int64_t some = kLanes<C>, size = kBlockChannels<C>;  // input channels at a time, output channels
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.weight_layout;
  const bool taps_inside = layout.d[2] == 1 && layout.d[1] == 3 && layout.c == 9;
  const TapSteps steps = taps_inside ? TapSteps{9 * size, size} : TapSteps{size, some * size};
  const int64_t blocks = divide_up(g.out_channels, size);
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t group = item / blocks, first = item % blocks * size;
    const int64_t count = smaller(g.out_channels - first, size), width = round_up(count, kLanes<C>);
    C* to = call.packed + winograd_block<C>(g, points * points, group, item % blocks);
    C taps[9 * some * size] = {};
    for (int64_t c = 0; c < g.in_channels; c += some) {
      const int64_t channels = smaller(some, g.in_channels - c);
      load_taps(call.weight + (group * g.out_channels + first) * layout.n + c * layout.c, layout, channels, count,
                steps, taps);
      for (int64_t i = 0; i < channels; ++i) {
        for (int64_t o = 0; o < width; o += kLanes<C>) {
          transform_taps<points>(taps + i * steps.channel + o, steps.tap, to + (c + i) * width + o,
                                 winograd_position<C>(g, width));
        }
      }
    }
  }
}

template <int results, class T>
class WinogradForward {
  using C = Compute<T>;
  static constexpr int kPoints = results + 2, kPositions = kPoints * kPoints, kWindows = results / 2;

 public:
  WinogradForward(const ConvPoolForward<T>& call, void* memory)
      : call_(call), g_(call.geometry), tiles_(call.geometry, results), scratch_(call.geometry, call.plan, memory) {
    for (int64_t c = 0; c < g_.in_channels; ++c) scratch_.offsets[c] = c;
  }

  void run(int64_t item) {
    group_ = item % g_.groups;
    first_ = item / g_.groups * call_.plan.columns;
    count_ = smaller(call_.plan.columns, g_.batch * tiles_.count() - first_);
    for_each_row([&](int64_t image, int64_t y, int64_t x, int64_t tiles, int64_t done) {
      const int64_t columns = results * tiles + 2;
      load_rows(image, results * y - g_.padding[1], results * x - g_.padding[2], columns);
      for (int64_t t = 0; t < tiles; ++t) transform_tile(results * t, columns, done + t);
    });
    for (int64_t first = 0; first < g_.out_channels; first += kBlockChannels<C>) {
      if (g_.out_channels - first > kLanes<C>) {
        call_.winners ? run_block<2, true>(first) : run_block<2, false>(first);
      } else {
        call_.winners ? run_block<1, true>(first) : run_block<1, false>(first);
      }
    }
  }

 private:
  // Calls body(number, first, tiles, how many came before) for each run of so many tiles of which the item has some.
  template <class Body>
  void for_each_run(int64_t length, const Body& body) const {
    for (int64_t done = 0, tiles; done < count_; done += tiles) {
      const int64_t number = (first_ + done) / length, first = (first_ + done) % length;
      tiles = smaller(length - first, count_ - done);
      body(number, first, tiles, done);
    }
  }

  // The same with (image, row, first column, ..) for its rows.
  template <class Body>
  void for_each_row(const Body& body) const {
    for_each_run(tiles_.columns, [&](int64_t number, int64_t x, int64_t tiles, int64_t done) {
      body(number / tiles_.rows, number % tiles_.rows, x, tiles, done);
    });
  }

  // The rows of the input under a row of tiles, from `row` on, `columns` of them from `column` on, channels innermost.
  void load_rows(int64_t image, int64_t row, int64_t column, int64_t columns) {
    const ConvLayout& layout = call_.input_layout;
    const int64_t left = larger(0, -column), right = larger(left, smaller(columns, g_.input[2] - column));
    for (int64_t r = 0; r < kPoints; ++r) {
      C* to = scratch_.rows + r * columns * scratch_.pitch;
      if (row + r < 0 || row + r >= g_.input[1]) {
        fill_zeros(to, columns * scratch_.pitch);
        continue;
      }
      fill_zeros(to, left * scratch_.pitch);
      fill_zeros(to + right * scratch_.pitch, (columns - right) * scratch_.pitch);
      const T* from = call_.input + image * layout.n + group_ * g_.in_channels * layout.c + (row + r) * layout.d[1] +
                      (column + left) * layout.d[2];
      to += left * scratch_.pitch;
      if (layout.d[2] == 1) {
        transpose_matrix(from, layout.c, g_.in_channels, right - left, to, scratch_.pitch);
      } else {
        for (int64_t x = 0; x < right - left; ++x) {
          copy_run(from + x * layout.d[2], layout.c, g_.in_channels, to + x * scratch_.pitch);
        }
      }
    }
  }

  void transform_tile(int64_t column, int64_t columns, int64_t tile) {
    const int64_t row_size = columns * scratch_.pitch, position_size = call_.plan.columns * scratch_.pitch;
    for (int64_t c = 0; c < g_.in_channels; c += kLanes<C>) {
      const C* from = scratch_.rows + column * scratch_.pitch + c;
      C* to = scratch_.transformed + tile * scratch_.pitch + c;
      Vec<C> half[kPoints][kPoints];
#pragma GCC unroll 6
      for (int x = 0; x < kPoints; ++x) {
        Vec<C> pixels[kPoints], result[kPoints];
        for (int y = 0; y < kPoints; ++y) pixels[y] = load(from + y * row_size + x * scratch_.pitch);
        transform_input(pixels, result);
        for (int y = 0; y < kPoints; ++y) half[y][x] = result[y];
      }
#pragma GCC unroll 6
      for (int y = 0; y < kPoints; ++y) {
        Vec<C> result[kPoints];
        transform_input(half[y], result);
        for (int x = 0; x < kPoints; ++x) store(to + (y * kPoints + x) * position_size, result[x]);
      }
    }
  }

  template <int vectors, bool with_winners>
  void run_block(int64_t first) {
    constexpr int64_t width = vectors * kLanes<C>;
    const int64_t channel = group_ * g_.out_channels + first, channels = smaller(width, g_.out_channels - first);
    const C* weight = call_.packed + winograd_block<C>(g_, kPositions, group_, first / kBlockChannels<C>);
    const Vec<C> zero[vectors] = {};
    for (int64_t position = 0; position < kPositions; ++position) {
      conv_row<vectors>(scratch_.transformed + position * call_.plan.columns * scratch_.pitch, scratch_.pitch,
                        NothingAhead{}, scratch_.offsets, g_.in_channels,
                        weight + position * winograd_position<C>(g_, width), zero, count_,
                        scratch_.products + position * call_.plan.columns * width);
    }
    for (int v = 0; v < vectors; ++v) {
      const Vec<C> bias =
          call_.bias ? load_up_to<T>(call_.bias + channel + v * kLanes<C>, channels - v * kLanes<C>) : Vec<C>{};
      for_each_row([&](int64_t, int64_t, int64_t, int64_t tiles, int64_t done) {
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t at = kWindows * (kWindows * done + t) * width + v * kLanes<C>;
          pool_tile<with_winners>(scratch_.products + (done + t) * width + v * kLanes<C>, call_.plan.columns * width,
                                  bias, scratch_.stage + at, scratch_.winner_stage + at, width,
                                  kWindows * tiles * width);
        }
      });
    }
    const auto write = [&](int64_t image, int64_t pixel, int64_t count, int64_t window) {
      write_pixels(call_, image, channel, channels, pixel, count, scratch_.stage + window * width,
                   scratch_.winner_stage + window * width, width);
    };
    if (kWindows == 1) return for_each_run(tiles_.count(), write);  // whose rows follow one another, here as there
    for_each_row([&](int64_t image, int64_t y, int64_t x, int64_t tiles, int64_t done) {
      const int64_t rows = smaller(kWindows, g_.output[1] - kWindows * y);
      const int64_t columns = smaller(kWindows * tiles, g_.output[2] - kWindows * x);
      for (int64_t row = 0; row < rows; ++row) {
        write(image, (kWindows * y + row) * g_.output[2] + kWindows * x, columns,
              kWindows * (kWindows * done + row * tiles));
      }
    });
  }

  // A^T m A, then the maximum of each window of the conv pixels it gives. From a window to the next there are `column`
  // or `row` elements.
  template <bool with_winners>
  static FASTNN_INLINE void pool_tile(const C* products, int64_t position_size, Vec<C> bias, C* to, uint8_t* winners,
                                      int64_t column, int64_t row) {
    Vec<C> half[results][kPoints];
#pragma GCC unroll 6
    for (int x = 0; x < kPoints; ++x) {
      Vec<C> m[kPoints], result[results];
      for (int y = 0; y < kPoints; ++y) m[y] = load(products + (y * kPoints + x) * position_size);
      transform_results(m, result);
      for (int y = 0; y < results; ++y) half[y][x] = result[y];
    }
#pragma GCC unroll 2
    for (int y = 0; y < kWindows; ++y) {
      Vec<C> pixels[2][results];
      for (int i = 0; i < 2; ++i) transform_results(half[2 * y + i], pixels[i]);
#pragma GCC unroll 2
      for (int x = 0; x < kWindows; ++x) {
        WindowMaximum<C, 1, with_winners> window;
        window.start(pixels[0][2 * x] + bias, 0);
        for (int place = 1; place < 4; ++place) window.add(pixels[place / 2][2 * x + place % 2] + bias, place);
        window.write(to + y * row + x * column, winners + y * row + x * column);
      }
    }
  }

  const ConvPoolForward<T>& call_;
  const ConvPoolGeometry& g_;
  const WinogradTiles tiles_;
  const WinogradScratch<C> scratch_;
  int64_t group_, first_, count_;  // tiles, counted through the images
};

// Calls body(Constant<results of a tile>) for the call's.
template <class T, class Body>
FASTNN_INLINE void with_tile_results(const ConvPoolForward<T>& call, const Body& body) {
  if constexpr (kHasLargeTiles<T>) {
    if (call.plan.tile_results == 4) return body(Constant<4>{});
  }
  body(Constant<2>{});
}

template <class T>
void pack_winograd(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item) {
  with_tile_results(call, [&](auto results) { pack_tiles<decltype(results)::value>(call, first_item, last_item); });
}

template <class T>
void forward_winograd(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  with_tile_results(call, [&](auto results) {
    WinogradForward<decltype(results)::value, T> worker(call, scratch);
    for (int64_t item = first_item; item < last_item; ++item) worker.run(item);
  });
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
