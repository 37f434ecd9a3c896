// What conv_depthwise.h works on: blocks of groups, the slots of its input, scratch memory, the plan and its cost.
#pragma once

#include "conv_direct_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int64_t kUnitBytes = 128 << 10;  // of an image or a slice that is transposed at once

constexpr int64_t kMostPairedTaps = 64;  // of a row of the kernel

// Groups [first, first + live) in one or two vectors.
template <class C>
struct DepthwiseBlock {
  int64_t first, live, lanes;

  DepthwiseBlock(const ConvPoolGeometry& g, const ConvPoolPlan& plan, int64_t number)
      : first(number * plan.block_groups) {
    live = smaller(plan.block_groups, g.groups - first);
    lanes = round_up(live, kLanes<C>);
  }
};

// The first of a row of taps, or of pairs of them side by side; a vector of weights for either.
template <class E>
struct DepthwiseTap {
  const E* input;  // under the first conv pixel of a row
  const Compute<E>* weight;
};

// The taps of conv pixels: some columns of `count` rows of taps or pairs, `column_step` elements apart; then of each of
// `single` rows the first of a pair. Shared taps are so many columns apart; 0 if there are none.
template <class E>
struct DepthwiseTaps {
  const DepthwiseTap<E>* rows;
  int64_t count;
  Range columns;
  int64_t column_step, shared_apart, single;
};

// Vectors of a packed weight; an odd last tap has one of its own.
FASTNN_INLINE int64_t depthwise_weights(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  return g.kernel[0] * g.kernel[1] * (plan.pairs_taps ? divide_up(g.kernel[2], 2) : g.kernel[2]);
}

// What is transposed at a time: the image if it is small, else a slice of it, else a row.
struct InputUnits {
  bool whole_image, whole_slices;  // the former implies the latter
  bool as_it_lies;                 // the memory from the unit's first element to its last
  int64_t size;                    // elements of a channel
  int64_t d[3];                    // strides in the unit
  int64_t slot_size, slot_d[3];    // the same of a slot
  int64_t slices, rows;            // slots, of which each holds a unit
  int64_t input_rows;

  int64_t slots() const { return (whole_image ? 1 : slices) * (whole_slices ? 1 : rows); }
  int64_t unit_of(int64_t z, int64_t y) const { return (whole_image ? 0 : z) * input_rows + (whole_slices ? 0 : y); }
  int64_t slot_of(int64_t z, int64_t y) const {
    return whole_image ? 0 : whole_slices ? z % slices : z % slices * rows + y % rows;
  }
};

// Where there is little between the elements, it is taken along.
FASTNN_INLINE bool lies_in_units(const ConvLayout& input) {
  constexpr int64_t kFarApart = 4;
  return input.c != 1 && input.d[2] >= 1 && input.d[2] <= kFarApart;
}

template <class C>
InputUnits input_units(const ConvPoolGeometry& g, const ConvPoolPlan& plan, const ConvLayout& input) {
  const int64_t most = kUnitBytes / (kBlockChannels<C> * static_cast<int64_t>(sizeof(C)));
  InputUnits u = {};
  u.input_rows = g.input[1];
  u.as_it_lies = lies_in_units(input);
  const int64_t row = (g.input[2] - 1) * input.d[2] + 1, slice = (g.input[1] - 1) * input.d[1] + row;
  const int64_t image = (g.input[0] - 1) * input.d[0] + slice;
  const bool dense_slice = u.as_it_lies && input.d[1] >= row && input.d[1] < 2 * row;
  const bool dense_image = dense_slice && (g.input[0] == 1 || (input.d[0] >= slice && input.d[0] < 2 * slice));
  // What the kernel strides over is not worth bringing.
  u.whole_slices = dense_slice && slice <= most && g.stride[1] <= g.kernel_extent(1);
  u.whole_image = u.whole_slices && dense_image && image <= most && g.stride[0] <= g.kernel_extent(0);
  u.size = u.whole_image ? image : u.whole_slices ? slice : u.as_it_lies ? row : g.input[2];
  for (int d = 0; d < 3; ++d) u.slot_d[d] = u.d[d] = u.as_it_lies ? input.d[d] : 1;
  u.slot_size = u.size;
  if (plan.pads_rows) {
    u.slot_d[2] = 1;
    u.slot_d[1] = padded_extent(g, 2);
    u.slot_d[0] = u.slot_d[1] * g.input[1];
    u.slot_size = u.whole_image ? g.input[0] * u.slot_d[0] : u.whole_slices ? u.slot_d[0] : u.slot_d[1];
  }
  // As many as lie under a row of windows; of all rows, if slices are needed again and there is room.
  u.slices = smaller(g.input[0], input_extent(g, 0, 1));
  u.rows = smaller(g.input[1], input_extent(g, 1, 1));
  const bool overlap_depth = input_extent(g, 0, 2) < 2 * input_extent(g, 0, 1);
  if (g.output[0] > 1 && overlap_depth && u.slices * g.input[1] * u.slot_size <= 4 * most) u.rows = g.input[1];
  return u;
}

// A whole image with its padding, which costs a copy and products with zeros, and saves lists of taps and the pixels at
// the edges one by one.
struct PaddedImage {
  int64_t size[3], d[3];  // strides in pixels

  explicit PaddedImage(const ConvPoolGeometry& g) {
    for (int d = 2; d >= 0; --d) {
      size[d] = larger(g.padding[d] + g.input[d], (g.conv[d] - 1) * g.stride[d] + g.kernel_extent(d));
      this->d[d] = d == 2 ? 1 : this->d[d + 1] * size[d + 1];
    }
  }
  int64_t pixels() const { return size[0] * d[0]; }
};

template <class C>
struct DepthwiseScratch {
  C* tile;          // [slot][element][lane], or pairs
  void* unit;       // [element][lane], before its rows get their padding
  C* padded;        // [slice][row][column][lane]
  int32_t* places;  // where each pixel of an image lies in that, in pixels
  C* ring;          // [slot][column][lane]
  C* stage;         // [pooled pixel][lane]
  uint8_t* winner_stage;
  void* taps;
  WindowRow<C>* window_rows;
  int64_t* tags;             // which conv row each slot of the ring holds
  int64_t* unit_tags;        // which unit each slot of the tile holds
  int64_t rings, ring_size;  // a ring for each output of an item's blocks, if rows are needed again
  int64_t size;

  DepthwiseScratch(const ConvPoolGeometry& g, const ConvPoolPlan& plan, const InputUnits& units, void* memory) {
    const RingShape shape = ring_shape(g, plan);
    const int64_t slots = shape.slices * shape.rows, lanes = kBlockChannels<C>;
    const int64_t blocks = divide_up(divide_up(g.groups, plan.block_groups), plan.block_parts);
    rings = shape.persistent ? blocks * g.out_channels : 1;
    ring_size = slots * shape.columns * lanes;
    const int64_t stage_pixels = plan.band * g.output[2];
    MemoryParts parts(memory);
    const bool pads = !plan.skips_padding;
    tile = parts.take<C>(plan.in_place || pads ? 0 : units.slots() * units.slot_size * lanes);
    unit = parts.take<C>(plan.pads_rows ? units.size * lanes : 0);
    padded = parts.take<C>(pads ? PaddedImage(g).pixels() * lanes : 0);
    places = parts.take<int32_t>(pads ? g.input[0] * g.input[1] * g.input[2] : 0);
    ring = parts.take<C>(rings * ring_size);
    stage = parts.take<C>(stage_pixels * lanes);
    winner_stage = parts.take<uint8_t>(stage_pixels * lanes);
    taps = parts.take<DepthwiseTap<C>>(2 * g.kernel[0] * g.kernel[1]);
    window_rows = parts.take<WindowRow<C>>(g.pool_kernel[0] * g.pool_kernel[1]);
    tags = parts.take<int64_t>(rings * slots);
    unit_tags = parts.take<int64_t>(units.slots());
    size = parts.used();
  }
};

// Of a conv row, those under which a tap falls into the padding.
FASTNN_INLINE int64_t edge_pixels(const ConvPoolGeometry& g) {
  const Range interior = {pixels_inside(g, 2, 0).first, pixels_inside(g, 2, g.kernel[2] - 1).last};
  return g.conv[2] - larger(0, interior.last - interior.first);
}

// Whether small images are copied with their padding, at what that costs and saves in a block.
template <class C>
FASTNN_INLINE bool depthwise_pads(const ConvPoolGeometry& g, const ConvLayout& input) {
  constexpr double kRow = 60, kEdge = 60, kProduct = 1.5, kCopied = 5, kPartlyCopied = 12;
  const int64_t channels = smaller(kBlockChannels<C>, g.groups), lanes = round_up(channels, kLanes<C>);
  const int64_t image = g.input[0] * g.input[1] * g.input[2];
  const bool is_dense = input.d[2] == 1 && (g.input[1] == 1 || input.d[1] == g.input[2]) &&
                        (g.input[0] == 1 || input.d[0] == g.input[1] * g.input[2]);
  if (PaddedImage(g).pixels() * lanes * static_cast<int64_t>(sizeof(C)) > kUnitBytes) return false;
  if (input.c != 1 && !is_dense) return false;
  const double edges = static_cast<double>(edge_pixels(g));
  const double row = kProduct * static_cast<double>(g.conv[2] * g.taps()) * (share_of_rows(g) - share_inside(g));
  const double saved = static_cast<double>(g.out_channels * g.conv[0] * g.conv[1]) * (kRow + kEdge * edges - row);
  // Other images are copied in any case.
  const double copied = input.c != 1 ? 0 : channels < lanes ? kPartlyCopied : kCopied;
  return saved > copied * static_cast<double>(image);
}

FASTNN_INLINE bool depthwise_applies(const ConvPoolGeometry& g) {
  return g.in_channels == 1 && g.groups > 1;
}

// Taps of a row that a tile takes at a time where one pixel meets under one of them what the pixel beside it (of pairs,
// the one after that) meets under the next: the columns of the input that they meet are loaded once.
constexpr int kSharedTaps = 3;
template <class E>
constexpr int kPixelsApart = kIsPair<E> ? 2 : 1;

// How many columns of taps or pairs such ones lie apart; 0 if there are none.
FASTNN_INLINE int64_t shared_columns_apart(const ConvPoolGeometry& g) {
  return g.stride[2] % g.dilation[2] == 0 ? g.stride[2] / g.dilation[2] : 0;
}

// What a register tile reads, weight and input, in a block of so many lanes.
template <class C>
int64_t depthwise_tile_bytes(const ConvPoolGeometry& g, const ConvPoolPlan& plan, int64_t lanes) {
  constexpr int64_t kPixels = 8;
  const int64_t under_tile = g.kernel[0] * g.kernel[1] * ((kPixels - 1) * g.stride[2] + g.kernel_extent(2));
  return (depthwise_weights(g, plan) + under_tile) * lanes * static_cast<int64_t>(sizeof(C));
}
constexpr int64_t kDepthwiseTileBytes = 32 << 10;  // of L1

// How conv rows find their input.
enum class DepthwiseRows {
  plain,   // where it lies, or in a transposed copy; small images padded
  padded,  // in a copy with the rows' padding
  pairs,   // the same, by pairs of taps
};

template <class T>
bool depthwise_rows_apply(const ConvPoolGeometry& g, const ConvLayout& input, DepthwiseRows rows) {
  if (rows == DepthwiseRows::plain) return true;
  if (input.c != 1 && !lies_in_units(input)) return false;
  if (rows == DepthwiseRows::padded) return edge_pixels(g) > 0;
  // Of a row's vectors of products, an odd last tap counting as two: it is shifted first.
  const int64_t saved = g.kernel[2] / 2 - g.kernel[2] % 2;
  return kHasPairs<T> && isa_multiplies_pairs() && saved > 0 && g.kernel[2] <= kMostPairedTaps;
}

template <class T>
ConvPoolPlan plan_depthwise(const ConvPoolGeometry& g, const ConvLayout& input, int64_t threads,
                            DepthwiseRows input_rows) {
  using C = Compute<T>;
  ConvPoolPlan plan = {};
  plan.algorithm = ConvAlgorithm::depthwise;
  plan.pairs_taps = input_rows == DepthwiseRows::pairs;
  plan.pads_rows = input_rows != DepthwiseRows::plain;
  plan.skips_padding = plan.pads_rows || !depthwise_pads<C>(g, input);
  plan.in_place = input.c == 1 && plan.skips_padding && !plan.pads_rows;
  const bool wide = depthwise_tile_bytes<C>(g, plan, kBlockChannels<C>) <= kDepthwiseTileBytes;
  plan.block_groups = wide ? kBlockChannels<C> : kLanes<C>;
  plan.columns = g.output[2];
  const int64_t rows = g.output[0] * g.output[1];
  const int64_t row_bytes = g.output[2] * kBlockChannels<C> * static_cast<int64_t>(sizeof(C));
  plan.band = larger(1, smaller(rows, kStageBytes / row_bytes));
  const int64_t blocks = divide_up(g.groups, plan.block_groups);
  const int64_t wanted = threads == 1 ? 1 : 4 * threads;
  // In place, a thread has all blocks, which lie side by side in the input, as long as there is enough else to share.
  plan.block_parts = !plan.in_place ? blocks : g.batch >= wanted ? 1 : smaller(blocks, divide_up(wanted, g.batch));
  if (plan.in_place) {
    const int64_t under_row = g.groups * g.input[2] * input_extent(g, 1, 1) * input_extent(g, 0, 1);
    plan.band = larger(1, smaller(plan.band, kTileBytes / (under_row * static_cast<int64_t>(sizeof(C)))));
  }
  const int64_t others = g.batch * plan.block_parts;
  plan.row_parts = parts_of_rows(others, rows, ring_shape(g, plan).persistent ? rows_again(g) : 0, threads);
  plan.items = others * plan.row_parts;
  plan.pack_items = g.out_channels * blocks;
  plan.packed_size = g.out_channels * round_up(g.groups, kLanes<C>) * depthwise_weights(g, plan);
  plan.scratch_size = DepthwiseScratch<C>(g, plan, input_units<C>(g, plan, input), nullptr).size;
  return plan;
}

// For one image and group, in vector multiply-adds.
template <class T>
double depthwise_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan) {
  using C = Compute<T>;
  constexpr double kRow = 135, kImage = 240;                                  // of a block
  constexpr double kPixel = 1, kEdge = 21, kEdgeProduct = 1.45, kWayOut = 7;  // of a vector
  // Of a vector of the input: to arrive from L2 or from beyond, to be transposed, to be copied with its row's padding.
  constexpr double kArrives = 0.8, kArrivesLate = 1.5, kTransposed = 5.8, kPadded = 4.2;
  constexpr int64_t kNearBytes = 1 << 20;
  // What a register tile reads is read from L2 again for the next one unless it stays in L1. Of columns that taps
  // share, and of the rest.
  constexpr double kShared = 1.35, kNear = 1.7, kFar = 2.2;
  const int64_t lanes = smaller(plan.block_groups, round_up(g.groups, kLanes<C>));
  const bool near = depthwise_tile_bytes<C>(g, plan, lanes) <= kDepthwiseTileBytes;
  const double rows = static_cast<double>(g.conv[0] * g.conv[1]), pixels = rows * static_cast<double>(g.conv[2]);
  // A pair of taps counts as one; an odd last one takes a shift besides.
  const int64_t columns = plan.pairs_taps ? g.kernel[2] / 2 : g.kernel[2];
  const double single = plan.pairs_taps ? 1.3 * static_cast<double>(g.kernel[2] % 2) : 0;
  const int64_t apart = shared_columns_apart(g);
  const int64_t shared = apart > 0 ? columns / (kSharedTaps * apart) * (kSharedTaps * apart) : 0;
  const double row_of_taps =
      kShared * static_cast<double>(shared) + (near ? kNear : kFar) * (static_cast<double>(columns - shared) + single);
  const double inside = plan.pads_rows       ? share_inside(g, 0) * share_inside(g, 1)
                        : plan.skips_padding ? share_inside(g)
                                             : share_of_rows(g);
  const double products = pixels * static_cast<double>(g.kernel[0] * g.kernel[1]) * row_of_taps * inside;
  const double windows = static_cast<double>(g.pixels()) * (kWayOut + window_cost(g));
  const bool late = g.batch * image_size(g) * static_cast<int64_t>(sizeof(T)) > kNearBytes;
  const double part = static_cast<double>(g.groups) / static_cast<double>(round_up(g.groups, kLanes<C>));
  const double arrival = input.c != 1 ? kTransposed : late ? part * kArrivesLate : kArrives;
  // Pixels, or whole rows or slices, that the kernel strides over stay where they are.
  const InputUnits units = input_units<C>(g, plan, input);
  const bool leaves[3] = {!units.whole_image, !units.whole_slices, plan.in_place};
  double met = 1;
  for (int d = 0; d < 3; ++d) met *= plan.in_place || (plan.skips_padding && leaves[d]) ? share_met(g, d) : 1;
  // Rows that slices of windows share are copied for each, unless all rows of a slice have slots.
  const bool drops_rows = !plan.in_place && plan.skips_padding && !units.whole_slices && units.rows < g.input[1];
  const int64_t copies = drops_rows ? larger(g.input[0], g.output[0] * input_extent(g, 0, 1)) : g.input[0];
  const double input_rows = static_cast<double>(copies * g.input[1]);
  const double copied = arrival * met * input_rows * static_cast<double>(g.input[2]) +
                        (plan.pads_rows ? kPadded * input_rows * static_cast<double>(padded_extent(g, 2)) : 0);
  // At an edge pixels are computed one by one.
  const double edges = plan.skips_padding && !plan.pads_rows ? rows * static_cast<double>(edge_pixels(g)) : 0;
  const double edge = kEdge + kEdgeProduct * static_cast<double>(g.taps()) * inside;
  const double vector = g.out_channels * (products + edge * edges + kPixel * pixels + windows) + copied;
  const double block = g.out_channels * kRow * rows + kImage;
  return (vector * static_cast<double>(divide_up(g.groups, kLanes<C>)) +
          block * static_cast<double>(divide_up(g.groups, plan.block_groups))) /
         static_cast<double>(g.groups);
}

// The cheapest.
template <class T>
ConvPoolPlan choose_depthwise(const ConvPoolGeometry& g, const ConvLayout& input, int64_t threads, double& costs) {
  ConvPoolPlan least = plan_depthwise<T>(g, input, threads, DepthwiseRows::plain);
  costs = depthwise_cost<T>(g, input, least);
  constexpr DepthwiseRows others[] = {DepthwiseRows::padded, DepthwiseRows::pairs};
  for (const DepthwiseRows rows : others) {
    if (!depthwise_rows_apply<T>(g, input, rows)) continue;
    const ConvPoolPlan plan = plan_depthwise<T>(g, input, threads, rows);
    const double own = depthwise_cost<T>(g, input, plan);
    if (own >= costs) continue;
    costs = own;
    least = plan;
  }
  return least;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
