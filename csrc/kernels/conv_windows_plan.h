// What conv_windows.h works on: the shape of its tile, its scratch memory, the plan and its cost.
#pragma once

#include "conv_pool_tile.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kWindowAccumulators = FASTNN_VECTOR_BYTES == 64 ? 24 : 12;
constexpr int64_t kWindowTileBytes = 128 << 10;

// A register tile has some conv pixels of each of a few vectors of windows, and some output channels.
constexpr int window_vectors(int pixels) {
  return pixels > 2 ? 1 : 2;
}
constexpr int window_outputs(int pixels) {
  return kWindowAccumulators / (pixels * window_vectors(pixels));
}

// Rows of a window whose pixels are computed together.
FASTNN_INLINE int64_t rows_together(const ConvPoolGeometry& g) {
  return g.pool_kernel[2] == 2 && g.pool_kernel[0] * g.pool_kernel[1] % 2 == 0 ? 2 : 1;
}
FASTNN_INLINE int pixels_together(const ConvPoolGeometry& g) {
  return static_cast<int>(rows_together(g) * g.pool_kernel[2]);
}

// Input elements from one window to the next, along one dimension, and from a window's first to its last.
FASTNN_INLINE int64_t window_step(const ConvPoolGeometry& g, int d) {
  return g.pool_stride[d] * g.stride[d];
}
FASTNN_INLINE int64_t window_reach(const ConvPoolGeometry& g, int d) {
  return (g.pool_extent(d) - 1) * g.stride[d] + g.kernel_extent(d);
}

// The input under a band of rows of windows, from one of them to the next: [channel][slice][row's place under the
// window, up to the step][column's place][row][window]. Windows of one row after another are one run, with nothing
// between.
template <class C>
struct WindowTile {
  int64_t rows;    // of windows, and what lies under the last ones beyond a step
  int64_t phases;  // of rows
  int64_t column, phase, slice, channel;

  WindowTile(const ConvPoolGeometry& g, int64_t band) {
    constexpr int64_t line = 64 / sizeof(C);
    rows = band + (window_reach(g, 1) - 1) / window_step(g, 1);
    phases = smaller(window_step(g, 1), window_reach(g, 1));
    column = rows * g.output[2];
    phase = column * window_reach(g, 2);
    slice = phase * phases;
    // An odd number of cache lines: a power of two would put all channels into few of the cache's sets.
    channel = round_up(slice * window_reach(g, 0), 2 * line) + line;
  }
};

template <class C>
struct WindowScratch {
  C* tile;
  C* best;  // [output channel][window] of a register tile
  Places<C>* winners;
  uint8_t* winner_bytes;
  int64_t* offsets;  // [row of the window][element under a conv pixel]
  int64_t size;

  WindowScratch(const ConvPoolGeometry& g, const ConvPoolPlan& plan, void* memory) {
    constexpr int64_t most = kWindowAccumulators * kLanes<C>;
    MemoryParts parts(memory);
    // Whole vectors are read.
    tile = parts.take<C>(g.in_channels * WindowTile<C>(g, plan.band).channel + 2 * kLanes<C>);
    best = parts.take<C>(most);
    winners = parts.take<Places<C>>(kWindowAccumulators);
    winner_bytes = parts.take<uint8_t>(most);
    offsets = parts.take<int64_t>(g.pool_kernel[0] * g.pool_kernel[1] * g.depth());
    size = parts.used();
  }
};

template <class C>
FASTNN_INLINE bool windows_apply(const ConvPoolGeometry& g) {
  constexpr int64_t kMostBytes = 640 << 10;  // of a row's input, that should stay in L2
  return kPoolsInTiles<C> && windows_are_apart(g) &&
         g.in_channels * WindowTile<C>(g, 1).channel * static_cast<int64_t>(sizeof(C)) <= kMostBytes;
}

template <class T>
ConvPoolPlan plan_windows(const ConvPoolGeometry& g, int64_t threads) {
  using C = Compute<T>;
  ConvPoolPlan plan = {};
  plan.algorithm = ConvAlgorithm::windows;
  const auto tile_bytes = [&](int64_t band) {
    return g.in_channels * WindowTile<C>(g, band).channel * static_cast<int64_t>(sizeof(C));
  };
  const int64_t room = larger(0, kWindowTileBytes - tile_bytes(1)), more = larger(1, tile_bytes(2) - tile_bytes(1));
  plan.band = smaller(g.output[1], 1 + room / more);
  const int64_t bands = divide_up(g.output[1], plan.band);
  const int64_t others = g.batch * g.groups * g.output[0];
  plan.row_parts = smaller(g.output[1], bands * parts_of_rows(others * bands, plan.band, 0, threads));
  plan.band = divide_up(g.output[1], plan.row_parts);
  plan.row_parts = divide_up(g.output[1], plan.band);
  plan.items = others * plan.row_parts;
  plan.pack_items = g.groups * divide_up(g.out_channels, window_outputs(pixels_together(g)));
  plan.packed_size = g.groups * g.out_channels * g.depth();
  plan.scratch_size = WindowScratch<C>(g, plan, nullptr).size;
  return plan;
}

// For one image and group.
template <class C>
double windows_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan) {
  constexpr double kItem = 300, kBlock = 40, kPass = 15, kProduct = 1.03, kInFlight = 5;
  constexpr double kPlace = 48, kRow = 6;        // of a copy: of the rows at one place, of one of them
  const double way_out = input.c == 1 ? 50 : 2;  // with channels last, in pieces of a block
  const int pixels = pixels_together(g), most = window_outputs(pixels);
  const int64_t bands = g.output[0] * plan.row_parts, blocks = divide_up(g.out_channels, most);
  const int64_t tiles = divide_up(divide_up(plan.band * g.output[2], kLanes<C>), window_vectors(pixels));
  const int64_t passes = tiles * blocks * g.places() / pixels;
  // Few accumulators do not keep the multipliers busy.
  const double accumulators = static_cast<double>(pixels * window_vectors(pixels) * g.out_channels) / blocks;
  const double slow = accumulators < kInFlight ? kInFlight / accumulators : 1;
  const double outputs = static_cast<double>(g.out_channels * tiles * window_vectors(pixels));  // vectors
  const double products = outputs * static_cast<double>(g.depth() * g.places()) * slow;
  const double pooling = outputs * (way_out + static_cast<double>(g.places()));
  const WindowTile<C> tile(g, plan.band);
  // Each block of outputs reads the tile again.
  constexpr int64_t kNear = 32 << 10;
  constexpr double kFarByte = 1.0 / 64;
  const int64_t bytes = g.in_channels * tile.channel * static_cast<int64_t>(sizeof(C));
  const double waits = bytes > kNear ? kFarByte * static_cast<double>(blocks * bytes) : 0;
  const double places = static_cast<double>(g.in_channels * window_reach(g, 0) * tile.phases * window_reach(g, 2));
  const double element = copy_cost(input.d[2] * window_step(g, 2));
  const double copy = places * (kPlace + static_cast<double>(tile.rows) * kRow + element * tile.column);
  const double block = kBlock * blocks + kPass * passes + kProduct * products + waits;
  return static_cast<double>(bands) * (kItem + block + pooling + copy);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
