// Forward: Winograd's F(2x2, 3x3), whose output tile is exactly the window of a 2x2 max-pool.
//
// A tile of 4x4 input pixels and the 3x3 weights are transformed so that the tile's four conv pixels take 16
// multiplications a channel instead of 36 (Lavin and Gray, 2015). A thread transforms the input of a run of pooled
// pixels, multiplies it by the transformed weight of a block of output channels, one of the 16 positions after another,
// and pools while it transforms back. Error stays at direct convolution's; NaN, infinity and huge values would spread
// over a tile, so they are for direct convolution.
#pragma once

#include "conv_tile.h"
#include "conv_winograd_transforms.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kPositions = 16;                    // of a transformed tile
constexpr int kLongestWinogradSum = 128;          // shorter than elsewhere: the way back adds up sums, and their errors
constexpr int64_t kTransformedBytes = 512 << 10;  // a run's transformed input: half of L2

FASTNN_INLINE bool winograd_applies(const ConvPoolGeometry& g) {
  bool applies = g.input[0] == 1 && g.kernel[0] == 1 && g.pool_kernel[0] == 1 && g.output[0] == 1;
  for (int d = 1; d < 3; ++d) {
    applies = applies && g.kernel[d] == 3 && g.stride[d] == 1 && g.dilation[d] == 1 && g.pool_kernel[d] == 2 &&
              g.pool_stride[d] == 2 && g.pool_padding[d] == 0 && g.pool_dilation[d] == 1 &&
              2 * g.output[d] <= g.conv[d];
  }
  return applies;
}

// Whether the fewer multiplications are worth the transforms, all counted in vector operations for a pooled pixel.
template <class C>
bool winograd_pays(const ConvPoolGeometry& g) {
  if (!winograd_applies(g)) return false;
  const double in = static_cast<double>(g.in_channels), out = static_cast<double>(g.out_channels), lanes = kLanes<C>;
  const double direct = 36 * in * out / lanes;
  const double transforms = 130 * in / lanes + 90 * out / lanes + 400 * in * out / lanes / (g.batch * g.pixels());
  return 16 * in * out / lanes + transforms < 0.85 * direct;
}

template <class C>
struct WinogradScratch {
  int64_t pitch;   // of a pixel's channels
  C* rows;         // [4][column][channel]: the input under a row of tiles
  C* transformed;  // [position][tile][channel]
  C* products;     // [position][tile][output channel of the block]
  C* stage;        // [tile][output channel of the block]
  uint8_t* winner_stage;
  int64_t* offsets;
  int64_t size;

  WinogradScratch(const ConvPoolGeometry& g, const ConvPoolPlan& plan, void* memory) {
    MemoryParts parts(memory);
    // Off the powers of two, for the sake of the cache's sets.
    pitch = round_up(g.in_channels, kLanes<C>) + kLanes<C>;
    const int64_t columns = 2 * smaller(plan.columns, g.output[2]) + 2;
    rows = parts.take<C>(4 * columns * pitch);
    transformed = parts.take<C>(kPositions * plan.columns * pitch);
    products = parts.take<C>(kPositions * plan.columns * kBlockChannels<C>);
    stage = parts.take<C>(plan.columns * kBlockChannels<C>);
    winner_stage = parts.take<uint8_t>(plan.columns * kBlockChannels<C>);
    offsets = parts.take<int64_t>(g.in_channels);
    size = parts.used();
  }
};

template <class C>
ConvPoolPlan plan_winograd(const ConvPoolGeometry& g) {
  ConvPoolPlan plan = {};
  plan.algorithm = ConvAlgorithm::winograd;
  const int64_t tile_bytes = kPositions * g.in_channels * static_cast<int64_t>(sizeof(C));
  const int64_t most = larger(1, kTransformedBytes / tile_bytes / kConvPixels) * kConvPixels;
  plan.column_parts = divide_up(g.pixels(), most);
  plan.columns = divide_up(g.pixels(), plan.column_parts);
  plan.column_parts = divide_up(g.pixels(), plan.columns);
  plan.items = g.batch * g.groups * plan.column_parts;
  plan.pack_items = g.groups * divide_up(g.out_channels, kBlockChannels<C>);
  plan.packed_size = g.groups * kPositions * g.in_channels * round_up(g.out_channels, kLanes<C>);
  plan.scratch_size = WinogradScratch<C>(g, plan, nullptr).size;
  return plan;
}

// weight -> [group][block of channels][position][input channel][vectors x lanes]
template <class T>
void pack_winograd(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  constexpr int64_t some = kLanes<C>;  // input channels at a time
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.weight_layout;
  const int64_t blocks = divide_up(g.out_channels, kBlockChannels<C>);
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t group = item / blocks, first = item % blocks * kBlockChannels<C>;
    const int64_t count = smaller(g.out_channels - first, kBlockChannels<C>), width = round_up(count, kLanes<C>);
    const int64_t position_size = g.in_channels * width;
    C* to = call.packed + kPositions * g.in_channels * (group * round_up(g.out_channels, kLanes<C>) + first);
    C taps[9 * some * kBlockChannels<C>] = {};  // [tap][input channel][output channel]
    for (int64_t c = 0; c < g.in_channels; c += some) {
      const int64_t channels = smaller(some, g.in_channels - c);
      const T* from = call.weight + (group * g.out_channels + first) * layout.n + c * layout.c;
      for (int64_t tap = 0; tap < 9; ++tap) {
        const T* source = from + tap / 3 * layout.d[1] + tap % 3 * layout.d[2];
        C* target = taps + tap * some * kBlockChannels<C>;
        if (layout.c == 1) {
          transpose_matrix(source, layout.n, count, channels, target, kBlockChannels<C>);
          continue;
        }
        for (int64_t i = 0; i < channels; ++i) {
          for (int64_t o = 0; o < count; ++o) {
            target[i * kBlockChannels<C> + o] = to_compute(source[i * layout.c + o * layout.n]);
          }
        }
      }
      for (int64_t i = 0; i < channels; ++i) {
        for (int64_t o = 0; o < width; o += kLanes<C>) {
          Vec<C> half[4][3];
          for (int x = 0; x < 3; ++x) {
            Vec<C> column[3], result[4];
            for (int y = 0; y < 3; ++y) column[y] = load(taps + ((y * 3 + x) * some + i) * kBlockChannels<C> + o);
            transform_weight(column, result);
            for (int y = 0; y < 4; ++y) half[y][x] = result[y];
          }
          for (int y = 0; y < 4; ++y) {
            Vec<C> result[4];
            transform_weight(half[y], result);
            for (int x = 0; x < 4; ++x) store(to + (y * 4 + x) * position_size + (c + i) * width + o, result[x]);
          }
        }
      }
    }
  }
}

template <class T>
class WinogradForward {
  using C = Compute<T>;

 public:
  WinogradForward(const ConvPoolForward<T>& call, void* memory)
      : call_(call), g_(call.geometry), scratch_(call.geometry, call.plan, memory) {
    for (int64_t c = 0; c < g_.in_channels; ++c) scratch_.offsets[c] = c;
  }

  void run(int64_t item) {
    first_ = item % call_.plan.column_parts * call_.plan.columns;
    count_ = smaller(call_.plan.columns, g_.pixels() - first_);
    item /= call_.plan.column_parts;
    group_ = item % g_.groups;
    image_ = item / g_.groups;
    for (int64_t done = 0; done < count_;) {
      const int64_t y = (first_ + done) / g_.output[2], x = (first_ + done) % g_.output[2];
      const int64_t tiles = smaller(g_.output[2] - x, count_ - done);
      load_rows(2 * y - g_.padding[1], 2 * x - g_.padding[2], 2 * tiles + 2);
      for (int64_t t = 0; t < tiles; ++t) transform_tile(2 * t, 2 * tiles + 2, done + t);
      done += tiles;
    }
    for (int64_t first = 0; first < g_.out_channels; first += kBlockChannels<C>) {
      if (g_.out_channels - first > kLanes<C>) {
        call_.winners ? run_block<2, true>(first) : run_block<2, false>(first);
      } else {
        call_.winners ? run_block<1, true>(first) : run_block<1, false>(first);
      }
    }
  }

 private:
  // Four rows of the input from `row` on, `columns` of them from `column` on, channels innermost.
  void load_rows(int64_t row, int64_t column, int64_t columns) {
    const ConvLayout& layout = call_.input_layout;
    const int64_t left = larger(0, -column), right = larger(left, smaller(columns, g_.input[2] - column));
    for (int64_t r = 0; r < 4; ++r) {
      C* to = scratch_.rows + r * columns * scratch_.pitch;
      if (row + r < 0 || row + r >= g_.input[1]) {
        fill_zeros(to, columns * scratch_.pitch);
        continue;
      }
      fill_zeros(to, left * scratch_.pitch);
      fill_zeros(to + right * scratch_.pitch, (columns - right) * scratch_.pitch);
      const T* from = call_.input + image_ * layout.n + group_ * g_.in_channels * layout.c + (row + r) * layout.d[1] +
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
      Vec<C> half[4][4];
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        Vec<C> pixels[4], result[4];
        for (int y = 0; y < 4; ++y) pixels[y] = load(from + y * row_size + x * scratch_.pitch);
        transform_input(pixels, result);
        for (int y = 0; y < 4; ++y) half[y][x] = result[y];
      }
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) {
        Vec<C> result[4];
        transform_input(half[y], result);
        for (int x = 0; x < 4; ++x) store(to + (y * 4 + x) * position_size, result[x]);
      }
    }
  }

  template <int vectors, bool with_winners>
  void run_block(int64_t first) {
    constexpr int64_t width = vectors * kLanes<C>;
    const int64_t channel = group_ * g_.out_channels + first, channels = smaller(width, g_.out_channels - first);
    const C* weight =
        call_.packed + kPositions * g_.in_channels * (group_ * round_up(g_.out_channels, kLanes<C>) + first);
    const Vec<C> zero[vectors] = {};
    for (int64_t position = 0; position < kPositions; ++position) {
      conv_row<vectors, kLongestWinogradSum>(scratch_.transformed + position * call_.plan.columns * scratch_.pitch,
                                             scratch_.pitch, scratch_.offsets, g_.in_channels,
                                             weight + position * g_.in_channels * width, zero, count_,
                                             scratch_.products + position * call_.plan.columns * width);
    }
    for (int v = 0; v < vectors; ++v) {
      const Vec<C> bias =
          call_.bias ? load_up_to<T>(call_.bias + channel + v * kLanes<C>, channels - v * kLanes<C>) : Vec<C>{};
      for (int64_t tile = 0; tile < count_; ++tile) {
        const int64_t at = tile * width + v * kLanes<C>;
        pool_tile<with_winners>(scratch_.products + at, call_.plan.columns * width, bias, scratch_.stage + at,
                                scratch_.winner_stage + at);
      }
    }
    write_pixels(call_, image_, channel, channels, first_, count_, scratch_.stage, scratch_.winner_stage, width);
  }

  // A^T m A, then the maximum of the four conv pixels it gives.
  template <bool with_winners>
  static FASTNN_INLINE void pool_tile(const C* products, int64_t position_size, Vec<C> bias, C* to, uint8_t* winners) {
    Vec<C> upper[4], lower[4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      Vec<C> m[4];
      for (int y = 0; y < 4; ++y) m[y] = load(products + (y * 4 + x) * position_size);
      upper[x] = m[0] + m[2] + m[3];
      lower[x] = m[1] + m[2] - m[3];
    }
    WindowMaximum<C, 1, with_winners> window;
    window.start(upper[0] + upper[2] + upper[3] + bias, 0);
    window.add(upper[1] + upper[2] - upper[3] + bias, 1);
    window.add(lower[0] + lower[2] + lower[3] + bias, 2);
    window.add(lower[1] + lower[2] - lower[3] + bias, 3);
    window.write(to, winners);
  }

  const ConvPoolForward<T>& call_;
  const ConvPoolGeometry& g_;
  const WinogradScratch<C> scratch_;
  int64_t image_, group_, first_, count_;
};

template <class T>
void forward_winograd(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  WinogradForward<T> worker(call, scratch);
  for (int64_t item = first_item; item < last_item; ++item) worker.run(item);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
