// What conv_winograd.h works on: its tiles, scratch memory, the plan and its cost.
#pragma once

#include "conv_tile.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int64_t kTransformedBytes = 512 << 10;  // an item's transformed input: half of L2

// Tiles of results x results conv pixels, of which each holds whole windows.
struct WinogradTiles {
  int64_t results, windows;  // along a dimension
  int64_t rows, columns;     // of an image
  int64_t positions;         // of a transformed tile

  WinogradTiles(const ConvPoolGeometry& g, int64_t size)
      : results(size),
        windows(size / 2),
        rows(divide_up(g.output[1], windows)),
        columns(divide_up(g.output[2], windows)),
        positions((size + 2) * (size + 2)) {}
  int64_t count() const { return rows * columns; }
};

// F(4x4, 3x3) loses more digits than direct convolution; not more than rounding to T does.
template <class T>
constexpr bool kHasLargeTiles = sizeof(T) < sizeof(float);

FASTNN_INLINE bool winograd_applies(const ConvPoolGeometry& g) {
  bool applies = g.input[0] == 1 && g.kernel[0] == 1 && g.pool_kernel[0] == 1 && g.output[0] == 1;
  for (int d = 1; d < 3; ++d) {
    applies = applies && g.kernel[d] == 3 && g.stride[d] == 1 && g.dilation[d] == 1 && g.pool_kernel[d] == 2 &&
              g.pool_stride[d] == 2 && g.pool_padding[d] == 0 && g.pool_dilation[d] == 1 &&
              2 * g.output[d] <= g.conv[d];
  }
  return applies;
}

// Of the packed weight: from one position of a block of `width` output channels to the next, a line off the powers of
// two for the sake of the cache's sets, and where a block begins.
template <class C>
FASTNN_INLINE int64_t winograd_position(const ConvPoolGeometry& g, int64_t width) {
  return g.in_channels * width + kLanes<C>;
}
template <class C>
FASTNN_INLINE int64_t winograd_block(const ConvPoolGeometry& g, int64_t positions, int64_t group, int64_t block) {
  const int64_t blocks = group * divide_up(g.out_channels, kBlockChannels<C>) + block;
  const int64_t channels = group * round_up(g.out_channels, kLanes<C>) + block * kBlockChannels<C>;
  return positions * (g.in_channels * channels + kLanes<C> * blocks);
}

// For one image and group, the weight serving `images`, in vector multiply-adds.
template <class C>
double winograd_cost(const ConvPoolGeometry& g, int64_t results, int64_t images) {
  // Of a position of a tile; of a vector of its products, its input and its output; of one of the weight.
  constexpr double kTile = 8, kProduct = 1.05, kIn = 8, kOut = 6, kWeight = 8;
  constexpr double kPart = 10;     // of a last vector of input that is not full
  constexpr double kInFlight = 8;  // accumulators that keep the multipliers busy
  const WinogradTiles tiles(g, results);
  const int64_t in = divide_up(g.in_channels, kLanes<C>), out = divide_up(g.out_channels, kLanes<C>);
  const double accumulators = static_cast<double>(smaller(2, out) * smaller(kConvPixels<2>, g.batch * tiles.count()));
  const double slow = accumulators < kInFlight ? kInFlight / accumulators : 1;
  const double products = static_cast<double>(g.in_channels * out);
  const double part = g.in_channels % kLanes<C> == 0 ? 0 : kPart;
  const double tile = kTile + slow * kProduct * products + kIn * in + part + kOut * out;
  // More memory than the allocator keeps, so that it comes in fresh pages.
  constexpr int64_t kMostKept = 32 << 20;
  constexpr double kFreshByte = 4;
  const int64_t bytes = winograd_block<C>(g, tiles.positions, g.groups, 0) * static_cast<int64_t>(sizeof(C));
  const double fresh = bytes > kMostKept ? kFreshByte * static_cast<double>(bytes) / g.groups : 0;
  const double weight = kWeight * products * tiles.positions + fresh;
  return static_cast<double>(tiles.positions * tiles.count()) * tile + weight / static_cast<double>(images);
}

template <class C>
struct WinogradScratch {
  int64_t pitch;   // of a pixel's channels
  C* rows;         // [results + 2][column][channel]: the input under a row of tiles
  C* transformed;  // [position][tile][channel]
  C* products;     // [position][tile][output channel of the block]
  C* stage;        // [row of tiles][row of windows][window][output channel of the block]
  uint8_t* winner_stage;
  int64_t* offsets;
  int64_t size;

  WinogradScratch(const ConvPoolGeometry& g, const ConvPoolPlan& plan, void* memory) {
    MemoryParts parts(memory);
    const WinogradTiles tiles(g, plan.tile_results);
    // Off the powers of two, for the sake of the cache's sets.
    pitch = round_up(g.in_channels, kLanes<C>) + kLanes<C>;
    const int64_t columns = tiles.results * smaller(plan.columns, tiles.columns) + 2;
    const int64_t windows = plan.columns * tiles.windows * tiles.windows;
    rows = parts.take<C>((tiles.results + 2) * columns * pitch);
    transformed = parts.take<C>(tiles.positions * plan.columns * pitch);
    products = parts.take<C>(tiles.positions * plan.columns * kBlockChannels<C>);
    stage = parts.take<C>(windows * kBlockChannels<C>);
    winner_stage = parts.take<uint8_t>(windows * kBlockChannels<C>);
    offsets = parts.take<int64_t>(g.in_channels);
    size = parts.used();
  }
};

// Here `columns` counts the tiles of an item.
template <class C>
ConvPoolPlan plan_winograd(const ConvPoolGeometry& g, int64_t results, int64_t threads) {
  ConvPoolPlan plan = {};
  plan.algorithm = ConvAlgorithm::winograd;
  plan.tile_results = results;
  const WinogradTiles tiles(g, results);
  const int64_t tile_bytes = tiles.positions * g.in_channels * static_cast<int64_t>(sizeof(C));
  const int64_t most = larger(1, kTransformedBytes / tile_bytes / kConvPixels<2>) * kConvPixels<2>;
  const int64_t all = g.batch * tiles.count();
  plan.columns = divide_up(all, larger(divide_up(all, most), smaller(divide_up(threads, g.groups), all)));
  plan.items = g.groups * divide_up(all, plan.columns);
  plan.pack_items = g.groups * divide_up(g.out_channels, kBlockChannels<C>);
  plan.packed_size = winograd_block<C>(g, tiles.positions, g.groups, 0);
  plan.scratch_size = WinogradScratch<C>(g, plan, nullptr).size;
  return plan;
}

// The tiles that cost least.
template <class T, class C = Compute<T>>
ConvPoolPlan choose_winograd(const ConvPoolGeometry& g, int64_t images, int64_t threads, double& costs) {
  // Against pairs the gain has to be more than both estimates may be wrong by.
  constexpr double kDoubt = 1.2;
  const double small = winograd_cost<C>(g, 2, images), large = winograd_cost<C>(g, 4, images);
  const bool takes_large = kHasLargeTiles<T> && large < small;
  costs = takes_large ? kDoubt * large : small;
  return plan_winograd<C>(g, takes_large ? 4 : 2, threads);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
