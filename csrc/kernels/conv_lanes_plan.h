// What conv_lanes.h works on: pieces of the problem, their scratch memory, the plan and its cost.
#pragma once

#include "conv_row_inside.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kLaneOutputs = FASTNN_VECTOR_BYTES == 64 ? 12 : 6;  // output channels of a register tile
constexpr int kLanePixels = 4;                                    // conv pixels of one, at most
constexpr int64_t kLaneTileBytes = 256 << 10;
// Of pieces in a register tile. In float64 always two, for the sake of the build's time.
template <class C>
constexpr int kLeastLaneVectors = sizeof(C) == sizeof(float) ? 1 : 2;

// The geometry of one piece.
FASTNN_INLINE ConvPoolGeometry piece_geometry(const ConvPoolGeometry& g, int64_t bands) {
  ConvPoolGeometry piece = g;
  if (bands > 1) {
    piece.output[1] = divide_up(g.output[1], bands);
    piece.conv[1] = (piece.output[1] - 1) * g.pool_stride[1] + g.pool_extent(1);
  }
  return piece;
}

FASTNN_INLINE int64_t piece_extent(const ConvPoolGeometry& piece, int d) {
  return (piece.conv[d] - 1) * piece.stride[d] + piece.kernel_extent(d);
}

// An odd number of cache lines: a power of two would put all planes into few of the cache's sets.
template <class C>
int64_t plane_size(int64_t elements) {
  constexpr int64_t line = 64 / sizeof(C);
  return round_up(elements, 2 * line) + line;
}

// An element of the kernel: where the tile has it under a conv pixel, and its place in the weight's depth.
struct LaneTap {
  int64_t offset, position;
};

template <class C>
struct LanesScratch {
  C* tile;   // [channel][slice][row][column][lane]
  C* ring;   // [slot][output channel][column][lane]
  C* stage;  // [output channel][pixel][lane]
  uint8_t* winner_stage;
  C* plane;  // [lane][row][column]: a slice of every piece, or pooled pixels on the way out
  uint8_t* winner_plane;
  int64_t plane_step;  // from one lane's plane of the input to the next
  WindowRow<C>* window_rows;
  int64_t* tags;
  LaneTap* taps;
  LaneTap* row_taps;  // those of a row that meet the input
  int64_t size;

  LanesScratch(const ConvPoolGeometry& piece, const ConvPoolPlan& plan, void* memory) {
    const int64_t lanes = plan.lane_vectors * kLanes<C>;
    MemoryParts parts(memory);
    const int64_t outputs = smaller(piece.out_channels, kLaneOutputs);
    const int64_t slots = smaller(piece.conv[0], piece.pool_extent(0)) * smaller(piece.conv[1], piece.pool_extent(1));
    const int64_t columns = piece_extent(piece, 2);
    const int64_t rows = piece_extent(piece, 1);
    tile = parts.take<C>(piece.in_channels * piece_extent(piece, 0) * rows * columns * lanes);
    ring = parts.take<C>(slots * outputs * piece.conv[2] * lanes);
    stage = parts.take<C>(outputs * piece.pixels() * lanes);
    winner_stage = parts.take<uint8_t>(outputs * piece.pixels() * lanes);
    plane_step = plane_size<C>(larger(columns * rows * piece.in_channels, piece.pixels()));
    plane = parts.take<C>(plane_step * lanes);
    winner_plane = parts.take<uint8_t>(piece.pixels() * lanes);
    window_rows = parts.take<WindowRow<C>>(piece.pool_kernel[0] * piece.pool_kernel[1]);
    tags = parts.take<int64_t>(slots);
    taps = parts.take<LaneTap>(piece.depth());
    row_taps = parts.take<LaneTap>(piece.depth());
    size = parts.used();
  }
};

// A plan, and the share of all multiplications that will be useful ones, copying counted in; 0 if there is no plan.
struct LanesPlan {
  ConvPoolPlan plan;
  double useful;
  double full;  // the same share without copying
};

template <class C>
LanesPlan plan_lanes(const ConvPoolGeometry& g, int64_t threads) {
  LanesPlan best = {};
  // Bands have the same geometry only if no window reaches over the edge.
  const bool whole = g.pool_padding[1] == 0 && (g.output[1] - 1) * g.pool_stride[1] + g.pool_extent(1) <= g.conv[1];
  const int64_t most_bands = whole ? g.output[1] : 1;
  const double multiplications =
      static_cast<double>(g.out_channels) * g.taps() / (g.stride[0] * g.stride[1] * g.stride[2]);
  constexpr double kCopying = 16;  // what bringing a vector in and out costs, in multiplications
  for (int64_t bands = 1; bands <= most_bands; ++bands) {
    const ConvPoolGeometry piece = piece_geometry(g, bands);
    const double pieces = static_cast<double>(g.batch * bands);
    for (int vectors = kLeastLaneVectors<C>; vectors <= 2; ++vectors) {
      const int64_t lanes = vectors * kLanes<C>;
      const int64_t tile = piece.in_channels * piece_extent(piece, 0) * piece_extent(piece, 1) * piece_extent(piece, 2);
      if (tile * lanes * static_cast<int64_t>(sizeof(C)) > kLaneTileBytes) continue;
      const double halo = static_cast<double>(bands * piece_extent(piece, 1)) / piece_extent(g, 1);
      const int64_t items = divide_up(g.batch * bands, lanes) * g.groups;
      const double computed = static_cast<double>(round_up(items, threads) * lanes);
      const double full = pieces * g.groups / computed * g.output[1] / (bands * piece.output[1]);
      const double useful = full * multiplications / (multiplications + kCopying * halo) * (vectors == 1 ? 0.95 : 1);
      if (useful <= best.useful) continue;
      best.useful = useful;
      best.full = full;
      best.plan.bands = bands;
      best.plan.lane_vectors = vectors;
    }
  }
  if (best.useful == 0) return best;
  ConvPoolPlan& plan = best.plan;
  const int64_t lanes = plan.lane_vectors * kLanes<C>;
  plan.algorithm = ConvAlgorithm::lanes;
  plan.items = divide_up(g.batch * plan.bands, lanes) * g.groups;
  plan.pack_items = g.groups * divide_up(g.out_channels, kLaneOutputs);
  plan.packed_size = g.depth() * g.out_channels * g.groups;
  plan.scratch_size = LanesScratch<C>(piece_geometry(g, plan.bands), plan, nullptr).size;
  return best;
}

// For one image and group, in vector multiply-adds.
template <class C>
double lanes_cost(const ConvPoolGeometry& g, const ConvLayout& input, const LanesPlan& lanes) {
  constexpr double kPixel = 5, kRow = 100;     // of a vector; of a conv row's
  constexpr double kElement = 0.7, kRun = 16;  // of the tile, beside its copy; of a row that is copied before
  constexpr int64_t kCache = 32 << 10;
  const int64_t bands = lanes.plan.bands, width = lanes.plan.lane_vectors * kLanes<C>;
  const ConvPoolGeometry piece = piece_geometry(g, bands);
  const int64_t outputs = smaller(g.out_channels, kLaneOutputs), blocks = divide_up(g.out_channels, kLaneOutputs);
  const int64_t slots = smaller(piece.conv[0], piece.pool_extent(0)) * smaller(piece.conv[1], piece.pool_extent(1));
  const int64_t ring_bytes = slots * outputs * piece.conv[2] * width * static_cast<int64_t>(sizeof(C));
  // A vector's; that of a single output takes a load of its own, which should find its row in L1.
  const int64_t row_bytes =
      g.kernel[0] * piece.kernel_extent(1) * piece_extent(piece, 2) * width * static_cast<int64_t>(sizeof(C));
  const double product = g.out_channels > 1 ? 1.05 : row_bytes > kCache ? 1.8 : 1.4;
  const double window = (ring_bytes > kCache ? 0.8 : 0.3) * window_cost(g);
  const double pixels = static_cast<double>(g.conv[0] * g.conv[1] * g.conv[2]);
  const double output =
      product * static_cast<double>(g.depth()) * pixels + kPixel * pixels + window * static_cast<double>(g.pixels());
  const double conv_rows = static_cast<double>(piece.conv[0] * piece.conv[1] * bands * blocks);
  const int64_t rows = bands * piece_extent(piece, 0) * piece_extent(piece, 1);
  const bool together = input.c == 1 && input.d[2] == g.in_channels;  // a row's channels are one run
  const double element = kElement + copy_cost(together ? 1 : input.d[2]);
  const double elements = static_cast<double>(g.in_channels * rows * piece_extent(piece, 2));
  const double lane = output * static_cast<double>(g.out_channels) / kLanes<C> +
                      kRow * conv_rows / static_cast<double>(width) + element * elements;
  const bool dense = bands == 1 && input.d[2] == 1 && input.d[1] == g.input[2];
  const double runs = dense ? 0 : static_cast<double>(together ? rows : rows * g.in_channels);
  // Channels last, what comes out is written number by number, of some channels after those of others.
  constexpr int64_t kFewChannels = 16;
  const double way_out = input.c != 1 ? 1 : g.groups * g.out_channels <= kFewChannels ? 5 : 25;
  return lane / lanes.full + kRun * runs + way_out * static_cast<double>(g.out_channels * g.pixels());
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
