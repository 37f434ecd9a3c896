// What conv_direct.h works on: its ring of conv rows, its scratch memory, the plan and its cost.
#pragma once

#include "conv_pool_tile.h"
#include "conv_row_inside.h"
#include "conv_row_matrix.h"
#include "conv_row_phases.h"
#include "conv_row_short.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int64_t kTileBytes = 256 << 10;   // a band's input: part of L2, beside a block's weight
constexpr int64_t kStageBytes = 64 << 10;   // a band's output before it is transposed
constexpr int64_t kRowPixels = 128;         // conv pixels of a ring row: a few rows stay in L1
constexpr int64_t kTileRowPixels = 512;     // of a row that is pooled in registers: long runs to copy
constexpr int64_t kPhaseBytes = 384 << 10;  // a band's input, transformed

// Of elements that conv_row_phases.h is for.
template <class E>
constexpr bool kHasPhases = sizeof(E) == sizeof(float) && !kIsPair<E>;

template <class E>
constexpr ConvAlgorithm kDirectAlgorithm = kIsPair<E>       ? ConvAlgorithm::pairs
                                           : kStartsPair<E> ? ConvAlgorithm::row_pairs
                                           : kIsOfMatrix<E> ? ConvAlgorithm::matrix
                                                            : ConvAlgorithm::direct;

// Whether a row's pixels are computed one by one, from a tile or in place.
FASTNN_INLINE bool makes_plain_rows(const ConvPoolPlan& plan) {
  return !plan.skips_padding && plan.algorithm != ConvAlgorithm::phases && plan.algorithm != ConvAlgorithm::matrix;
}

// Input rows (or slices, or columns) under `pooled` consecutive windows along dimension d.
FASTNN_INLINE int64_t input_extent(const ConvPoolGeometry& g, int d, int64_t pooled) {
  const int64_t conv = (pooled - 1) * g.pool_stride[d] + g.pool_extent(d);
  return (conv - 1) * g.stride[d] + g.kernel_extent(d);
}

// Rows of conv pixels held at once: those under one window, or under a whole slice of windows where windows also
// overlap in depth.
struct RingShape {
  int64_t slices, rows, columns;
  bool persistent;  // whether the next pooled row needs some of them again
  bool together;    // whether all of a band are made before any is pooled
};
FASTNN_INLINE RingShape ring_shape(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  const bool overlap_depth = g.output[0] > 1 && g.pool_extent(0) > g.pool_stride[0];
  const bool overlap_height = g.output[1] > 1 && g.pool_extent(1) > g.pool_stride[1];
  const int64_t rows = overlap_depth ? g.conv[1] : smaller(g.conv[1], g.pool_extent(1));
  const int64_t columns = smaller(g.conv[2], (plan.columns - 1) * g.pool_stride[2] + g.pool_extent(2));
  const bool in_pairs = plan.algorithm == ConvAlgorithm::phases;
  return {smaller(g.conv[0], g.pool_extent(0)), rows, in_pairs ? round_up(columns, 2) : columns,
          overlap_depth || overlap_height, false};
}

// Direct convolution's: where rows are short, those under a band.
template <class C>
RingShape direct_ring_shape(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  RingShape shape = ring_shape(g, plan);
  shape.together = makes_plain_rows(plan) && rows_are_short<C>(shape.columns);
  if (shape.together) {
    const int64_t under_band = (plan.band - 1) * g.pool_stride[1] + g.pool_extent(1);
    shape.rows = larger(shape.rows, smaller(g.conv[1], under_band));
  }
  return shape;
}

// Elements behind a row of the tile that the last run of a pixel reaches.
template <class E>
FASTNN_INLINE int64_t elements_behind(const ConvPoolGeometry& g) {
  return kIsOfMatrix<E> ? MatrixShape(g, 1).beyond() : kStartsPair<E> ? 1 : 0;
}

// What a part of the rows computes anew of what the one before it has computed, in rows of windows.
FASTNN_INLINE double rows_again(const ConvPoolGeometry& g) {
  double again = 0, rows = 1;
  for (int d = 1; d >= 0; --d) {
    if (g.output[d] > 1)
      again += larger(0, g.pool_extent(d) - g.pool_stride[d]) * rows / static_cast<double>(g.pool_stride[d]);
    rows *= static_cast<double>(g.output[d]);
  }
  return again;
}

// From one channel's part of the tile to the next. An odd number of cache lines if channels come first: a power of two
// would put all channels into few of the cache's sets.
template <class C>
int64_t channel_step(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  constexpr int64_t line = 64 / sizeof(C);
  const int64_t size = input_extent(g, 0, 1) * input_extent(g, 1, plan.band) * input_extent(g, 2, plan.columns);
  return plan.order == TapOrder::channels_last || size < line ? size : round_up(size, 2 * line) + line;
}

// Of a band's transformed input, from one position to the next: the products at one read a single run. An odd number of
// cache lines, as above.
template <class C>
int64_t phase_step(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  constexpr int64_t line = 64 / sizeof(C);
  const PhaseShape<C> s(g, direct_ring_shape<C>(g, plan).columns);
  const int64_t rows = g.in_channels * input_extent(g, 0, 1) * input_extent(g, 1, plan.band);
  return round_up(rows * s.pitch, 2 * line) + line;
}
template <class C>
int64_t phase_tile_size(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  return PhaseShape<C>(g, 1).positions * phase_step<C>(g, plan);
}

// A thread's scratch, cut into its parts.
template <class E>
struct DirectScratch {
  using C = Compute<E>;

  E* tile;
  C* parted;  // conv_row_phases.h: a row of the input
  C* ring;
  C* stage;
  uint8_t* winner_stage;
  WindowRow<C>* window_rows;
  RowToMake<E>* to_make;  // by a matrix unit, or together
  int64_t* tags;          // which conv row each slot of the ring holds
  int64_t* offsets;       // of the tile's elements under a conv pixel
  int8_t* moderate;       // whether a block's weight and bias are, by group and block; -1 if not known
  int64_t size;

  DirectScratch(const ConvPoolGeometry& g, const ConvPoolPlan& plan, void* memory) {
    const RingShape ring_size = direct_ring_shape<C>(g, plan);
    const int64_t blocks = ring_size.persistent ? divide_up(g.out_channels, kBlockChannels<C>) : 1;
    const int64_t slots = blocks * ring_size.slices * ring_size.rows;
    const int64_t stage_pixels = plan.band * plan.columns;
    MemoryParts parts(memory);
    const bool in_phases = plan.algorithm == ConvAlgorithm::phases;
    tile = parts.take<E>(in_phases       ? phase_tile_size<C>(g, plan)
                         : plan.in_place ? 0
                                         : g.in_channels * channel_step<C>(g, plan) + elements_behind<E>(g));
    int64_t parted_size = 0, depth = g.depth();
    if (in_phases) {
      const PhaseShape<C> phases(g, ring_size.columns);
      parted_size = phases.places * phases.column_run;
      depth = phases.positions * phases.depth;
    }
    parted = parts.take<C>(parted_size);
    ring = parts.take<C>(slots * ring_size.columns * kBlockChannels<C>);
    stage = parts.take<C>(stage_pixels * kBlockChannels<C>);
    winner_stage = parts.take<uint8_t>(stage_pixels * kBlockChannels<C>);
    window_rows = parts.take<WindowRow<C>>(g.pool_kernel[0] * g.pool_kernel[1]);
    to_make = parts.take<RowToMake<E>>(kIsOfMatrix<E> || ring_size.together ? ring_size.slices * ring_size.rows : 0);
    tags = parts.take<int64_t>(slots);
    offsets = parts.take<int64_t>(depth);
    moderate = parts.take<int8_t>(g.groups * divide_up(g.out_channels, kBlockChannels<C>));
    size = parts.used();
  }
};

// Bytes of the packed weight: of all output channels of a group, and of a block of them.
template <class E>
int64_t weight_bytes(const ConvPoolGeometry& g, int64_t channels) {
  return divide_up(channels, kLanes<Compute<E>>) * product_depth<E>(g) * FASTNN_VECTOR_BYTES;
}
constexpr int64_t kNearWeight = 1 << 20, kNearBlock = 512 << 10;  // that stay in L2

// Whether a block of output channels serves all images before the next one, rather than all blocks an image: where L2
// holds the weight of one but not of all. Not where each would copy the input again.
template <class E>
bool blocks_come_first(const ConvPoolGeometry& g, const ConvPoolPlan& plan, int64_t threads) {
  constexpr int64_t kEnough = 2;  // images of a thread
  const int64_t block = weight_bytes<E>(g, smaller(g.out_channels, kBlockChannels<Compute<E>>));
  return plan.in_place && weight_bytes<E>(g, g.out_channels) > kNearWeight && block <= kNearBlock &&
         g.batch >= kEnough * threads && plan.algorithm != ConvAlgorithm::matrix;
}

// How many multiply-adds a vector of a block's weight takes to arrive, where it comes from beyond L1 for each of `rows`
// conv rows.
template <class E>
double weight_cost(const ConvPoolGeometry& g, const ConvPoolPlan& plan, int64_t rows) {
  constexpr double kNear = 4.5, kFar = 6.5;  // from L2; from L3
  constexpr int64_t kL1 = 24 << 10;
  const int64_t block = weight_bytes<E>(g, smaller(g.out_channels, kBlockChannels<Compute<E>>));
  if (block <= kL1) return 0;
  if (block > kNearBlock) return kFar;
  const bool stays = weight_bytes<E>(g, g.out_channels) <= kNearWeight || blocks_come_first<E>(g, plan, 1);
  if (stays) return kNear;
  return kNear + (kFar - kNear) / static_cast<double>(rows);
}

// For a tile of elements E, which `g` counts. `lies`: the input consists of such elements, and its layout counts them.
// `skips_padding`: it is read in place, whatever its padding.
template <class T, class E>
ConvPoolPlan plan_direct(const ConvPoolGeometry& g, const ConvLayout& input, int64_t threads, bool lies,
                         bool skips_padding, ConvAlgorithm algorithm = kDirectAlgorithm<E>) {
  using C = Compute<T>;
  ConvPoolPlan plan = {};
  plan.algorithm = algorithm;
  plan.skips_padding = skips_padding;
  plan.in_place = lies && (skips_padding || kIsOfMatrix<E> || can_stay_in_place<E>(g, input, false));
  const bool channels_last = kIsOfRun<E> || (input.c == 1 && g.in_channels > 1 && input.d[2] != 1);
  plan.order = skips_padding ? inside_order(g) : channels_last ? TapOrder::channels_last : TapOrder::channels_first;
  const int64_t row = smaller(g.conv[2], (g.output[2] - 1) * g.pool_stride[2] + g.pool_extent(2));
  const int64_t column = g.in_channels * input_extent(g, 0, 1) * input_extent(g, 1, 1) * g.stride[2];
  const int64_t room = smaller(kTileRowPixels, kTileBytes / 2 / (column * static_cast<int64_t>(sizeof(E))));
  const int64_t row_pixels = windows_are_apart(g) && makes_plain_rows(plan) ? larger(kRowPixels, room) : kRowPixels;
  plan.column_parts = row <= row_pixels * 5 / 4 ? 1 : smaller(g.output[2], divide_up(row, row_pixels));
  plan.columns = divide_up(g.output[2], plan.column_parts);
  plan.column_parts = divide_up(g.output[2], plan.columns);
  // Tiles of pixels may reach beyond a part that is smaller than the others.
  if (kIsOfMatrix<E> && plan.column_parts > 1) plan.in_place = false;

  // What lies there is read from memory for each block of channels anew, should it not stay in cache until the next.
  constexpr int64_t kStays = 8 << 20;
  const int64_t image = g.in_channels * g.input[0] * g.input[1] * g.input[2] * static_cast<int64_t>(sizeof(E));
  const bool stays = plan.in_place && (g.out_channels <= kBlockChannels<C> || image <= kStays);
  const int64_t slice = g.in_channels * input_extent(g, 0, 1) * input_extent(g, 2, plan.columns);
  plan.band = 1;
  while (plan.band < g.output[1] &&
         (stays || slice * input_extent(g, 1, plan.band + 1) * static_cast<int64_t>(sizeof(E)) <= kTileBytes) &&
         (plan.band + 1) * plan.columns * kBlockChannels<C> * static_cast<int64_t>(sizeof(C)) <= kStageBytes) {
    ++plan.band;
  }
  // Whole images where there are enough of them; else parts of their rows, and last of their channels.
  const int64_t rows = g.output[0] * g.output[1];
  const int64_t blocks = divide_up(g.out_channels, kBlockChannels<C>);
  const bool persistent = direct_ring_shape<C>(g, plan).persistent;
  plan.items = g.batch * g.groups * plan.column_parts;
  plan.row_parts = parts_of_rows(plan.items, rows, persistent ? rows_again(g) : 0, threads);
  if (input.c == 1 && g.groups > 1 && !persistent) {
    // So that the groups find their input in cache.
    const int64_t bytes =
        g.groups * g.in_channels * g.input[0] * g.input[1] * g.input[2] * static_cast<int64_t>(sizeof(T));
    plan.row_parts = larger(plan.row_parts, smaller(rows, divide_up(bytes, kTileBytes)));
  }
  plan.items *= plan.row_parts;
  plan.blocks_first = blocks_come_first<E>(g, plan, threads);
  plan.block_parts = plan.blocks_first       ? blocks
                     : plan.items >= threads ? 1
                                             : smaller(blocks, divide_up(threads, plan.items));
  plan.items *= plan.block_parts;
  plan.pack_items = g.groups * blocks;
  plan.packed_size = g.groups * product_depth<E>(g) * round_up(g.out_channels, kLanes<C>);
  plan.scratch_size = DirectScratch<E>(g, plan, nullptr).size;
  return plan;
}

// The same with conv rows by phases.
template <class T, class C = Compute<T>>
ConvPoolPlan plan_phases(const ConvPoolGeometry& g, const ConvLayout& input, int64_t threads) {
  ConvPoolPlan plan = plan_direct<T, C>(g, input, threads, false, false, ConvAlgorithm::phases);
  plan.order = TapOrder::channels_first;
  while (plan.band > 1 && phase_tile_size<C>(g, plan) * static_cast<int64_t>(sizeof(C)) > kPhaseBytes) --plan.band;
  const PhaseShape<C> s(g, 1);
  plan.packed_size = g.groups * s.positions * s.depth * round_up(g.out_channels, kLanes<C>);
  plan.scratch_size = DirectScratch<C>(g, plan, nullptr).size;
  return plan;
}

// Of a row of the input, each of whose columns' channels are brought side by side.
FASTNN_INLINE double interleave_cost(int64_t channels, int64_t columns, const ConvLayout& input) {
  constexpr double kColumn = 6;             // whose channels are one run
  constexpr double kZip = 24, kBlock = 70;  // of 32 columns of three channels; of 8 of up to 32
  constexpr double kApart = 5;              // of a number on its own
  if (channels == 1) return static_cast<double>(columns) * copy_cost(input.d[2]);
  if (input.c == 1 && input.d[2] == channels) return static_cast<double>(columns * channels) * kCopyCost;
  if (input.c == 1) return kColumn * static_cast<double>(columns);
  if (input.d[2] != 1) return kApart * static_cast<double>(columns * channels);
  if (channels == 3) return kZip * static_cast<double>(divide_up(columns, 32));
  return kBlock * static_cast<double>(divide_up(columns, 8) * divide_up(channels, 32));
}

// Of a conv row.
FASTNN_INLINE double matrix_row_cost(const ConvPoolGeometry& g, const ConvPoolPlan& plan, int64_t vectors) {
  constexpr double kProduct = 16, kTile = 60;
  const int64_t columns = ring_shape(g, plan).columns;
  const MatrixShape shape(g, columns);
  const int64_t tiles = plan.column_parts * divide_up(columns, shape.pixels) * vectors;
  return static_cast<double>(tiles) * (kTile + kProduct * static_cast<double>(shape.depth()));
}

// Of the products of a group, `row` pixels of each conv row: its output channels may not fill its vectors, and a short
// row's tile neither the multipliers' pipelines nor the time that its weight takes. A tile of one vector takes a load
// for each multiplication, and has pixels enough to crowd the sets in which they meet.
template <class E>
double products_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan, int64_t row) {
  constexpr double kInFlight = 8;               // accumulators that keep the multipliers busy
  constexpr double kLoads = 3, kCrowded = 1.2;  // of a tile of one vector, beside one for each pixel
  const int64_t vectors = divide_up(g.out_channels, kLanes<Compute<E>>);
  const RingShape ring = direct_ring_shape<Compute<E>>(g, plan);
  const int64_t rows = smaller(plan.band * g.pool_stride[1], g.conv[1]);
  const int64_t together = ring.together ? smaller(ring.slices * rows, rows_of_tile<2>(static_cast<int>(row))) : 1;
  const double inside = plan.skips_padding ? share_inside(g, 2) : 1;  // of a row, on average
  const double pixels = inside * static_cast<double>(smaller(row * together, kConvPixels<2>));
  const double to_be_busy = kInFlight / static_cast<double>(smaller(2, vectors)),
               to_wait = weight_cost<E>(g, plan, rows);
  const double needed = to_be_busy > to_wait ? to_be_busy : to_wait;
  const double slow = needed > pixels ? needed / pixels : 1;
  const int64_t in_run = ring.together ? row * rows_of_tile<1>(static_cast<int>(row)) : row;
  const double in_tile = static_cast<double>(in_run) / static_cast<double>(divide_up(in_run, kConvPixels<1>));
  const double single = vectors % 2 == 0 ? 1 : 1 + kLoads / (in_tile * static_cast<double>(vectors));
  const double crowded = vectors == 1 && plan.in_place && pixels_meet<E>(input.d[2] * g.stride[2]) ? kCrowded : 1;
  const int64_t products = vectors * row * g.conv[0] * g.conv[1] * product_depth<E>(g);
  return static_cast<double>(products) * slow * single * crowded;
}

// Until an image whose channels lie apart has arrived from memory, where the images do not stay in L3 from call to
// call. (Of one that is larger than what is turned at once nothing is known.)
template <class C>
double arrival_cost(const ConvPoolGeometry& g, const ConvLayout& input) {
  constexpr double kByte = 0.9;
  constexpr int64_t kL3 = 36 << 20, kLarge = 8 << 20;
  const int64_t bytes = g.in_channels * g.input[0] * g.input[1] * g.input[2] * static_cast<int64_t>(sizeof(C));
  const bool waits = input.c != 1 && g.batch * g.groups * bytes > kL3 && g.groups * bytes <= kLarge;
  return waits ? kByte * static_cast<double>(bytes) : 0;
}

// For one image and group.
template <class E, class C = Compute<E>>
double direct_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan) {
  const int64_t vectors = divide_up(g.out_channels, kLanes<C>);
  const int64_t row = smaller(g.conv[2], (g.output[2] - 1) * g.pool_stride[2] + g.pool_extent(2));
  const double products = products_cost<E>(g, input, plan, row), arrival = arrival_cost<C>(g, input);
  const double multiplications = products > arrival ? products : arrival;
  const double conv_rows = static_cast<double>(g.conv[0] * g.conv[1] * divide_up(vectors, 2));
  constexpr double kItem = 300, kRow = 60, kWayOut = 12;  // of a conv row; of a vector of pooled pixels
  const double windows =
      static_cast<double>(vectors * g.pixels()) * (kWayOut + place_cost(g) * static_cast<double>(g.places()));
  const double cost = kItem + kRow * conv_rows + windows;
  const int64_t tile_rows = g.output[0] * divide_up(g.output[1], plan.band) * plan.column_parts *
                            input_extent(g, 0, 1) * input_extent(g, 1, plan.band);
  const auto looks_at = [&](bool all) {  // numbers that might not be finite
    constexpr double kLook = 0.125;
    return all ? kLook * static_cast<double>(g.in_channels * g.input[0] * g.input[1] * g.input[2]) : 0;
  };
  const double interleaving = static_cast<double>(tile_rows) *
                              (kRunCost + interleave_cost(g.in_channels, input_extent(g, 2, plan.columns), input));
  if (kIsOfMatrix<E>) {
    constexpr double kCall = 400;
    const double rows = static_cast<double>(g.conv[0] * g.conv[1]) * matrix_row_cost(g, plan, vectors);
    return kCall + cost + rows + (plan.in_place ? 0 : interleaving) + looks_at(elements_behind<E>(g) > 0);
  }
  if (plan.skips_padding) {
    constexpr double kPass = 20, kAdded = 2;  // of a pass over a conv row; of a vector of it
    constexpr double kStart = 28;             // products that each pass's sums lose
    const double added = static_cast<double>(row * smaller(2, vectors)) * kAdded;
    const double parts = 1 + kStart * inside_passes(g) / static_cast<double>(g.depth());
    const bool again = g.taps() > g.stride[0] * g.stride[1] * g.stride[2];  // lines are read
    const double crowded = channels_are_crowded(g, input, sizeof(C)) && again ? 1.6 : 1;
    return cost + multiplications * parts * share_inside(g) * crowded + conv_rows * inside_passes(g) * (kPass + added);
  }
  if (kStartsPair<E>) return cost + multiplications + interleaving + looks_at(row_pairs_reach_beyond(g));
  constexpr double kFarCopy = 2.5;  // of an element of a short run from beyond L3's share
  constexpr int64_t kFar = 8 << 20;
  const bool far = plan.order != TapOrder::channels_last &&
                   g.in_channels * g.input[0] * g.input[1] * g.input[2] * static_cast<int64_t>(sizeof(C)) > kFar;
  const double elements = static_cast<double>(g.in_channels * tile_rows * input_extent(g, 2, plan.columns));
  const double runs =
      static_cast<double>(plan.order == TapOrder::channels_last ? tile_rows : tile_rows * g.in_channels);
  return cost + multiplications + (plan.in_place ? 0 : elements * (far ? kFarCopy : kCopyCost) + runs * kRunCost);
}

// For one image and group.
template <class C>
double phases_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan) {
  constexpr double kItem = 300, kRow = 60, kWayOut = 12, kInFlight = 10;
  constexpr double kProduct = 1.1;
  constexpr double kPoint = 20, kResult = 4;  // of a register tile's sums at a point; of each of them
  constexpr double kTransformed = 5;          // of a vector of input
  constexpr double kPack = 4;                 // of a weight, beyond what packing takes elsewhere
  const PhaseShape<C> s(g, direct_ring_shape<C>(g, plan).columns);
  const int64_t vectors = divide_up(g.out_channels, kLanes<C>), tiles = divide_up(s.pairs, kConvPixels<2>);
  const int64_t blocks = divide_up(vectors, 2);
  const double conv_rows = static_cast<double>(g.conv[0] * g.conv[1] * plan.column_parts);
  // Few sums do not keep the multipliers busy.
  const double accumulators = static_cast<double>(divide_up(s.pairs, tiles) * smaller(2, vectors));
  const double slow = accumulators < kInFlight ? kInFlight / accumulators : 1;
  int64_t points = 0;
  for (int point = 0; point <= kMostWinogradTaps; ++point) points += s.first[point + 1] > s.first[point];
  const double products = kProduct * slow * static_cast<double>(vectors * s.pairs * s.positions * s.depth);
  const double results = static_cast<double>(points) * (kPoint * static_cast<double>(tiles * blocks) +
                                                        kResult * static_cast<double>(vectors * s.pairs));
  // Each conv row reads a block's weight, which is larger than direct convolution's: not from beyond L2.
  constexpr int64_t kNear = 1 << 20;
  constexpr double kFarByte = 0.15;
  const int64_t bytes = s.positions * s.depth * smaller(2, vectors) * FASTNN_VECTOR_BYTES;
  const bool far = bytes + phase_tile_size<C>(g, plan) * static_cast<int64_t>(sizeof(C)) > kNear;
  const double waits = far ? kFarByte * static_cast<double>(blocks * bytes) : 0;
  const double windows =
      static_cast<double>(vectors * g.pixels()) * (kWayOut + place_cost(g) * static_cast<double>(g.places()));
  const int64_t bands = g.output[0] * divide_up(g.output[1], plan.band) * plan.column_parts;
  const double rows =
      static_cast<double>(g.in_channels * bands * input_extent(g, 0, 1) * input_extent(g, 1, plan.band));
  const double parting = static_cast<double>(s.places) * (kRunCost + copy_cost(s.places * input.d[2]) * s.pairs);
  const double transform = parting + kTransformed * static_cast<double>(s.positions * s.pitch / kLanes<C>);
  const double packing = kPack * static_cast<double>(g.out_channels * g.depth()) / static_cast<double>(g.batch);
  return kItem + conv_rows * (kRow * blocks + products + results + waits) + windows + rows * transform + packing;
}

// With or without a padded copy of the input, whichever is cheaper.
template <class T, class E>
ConvPoolPlan choose_direct(const ConvPoolGeometry& g, const ConvLayout& input, int64_t threads, bool lies,
                           double& costs) {
  const ConvPoolPlan padded = plan_direct<T, E>(g, input, threads, lies, false);
  costs = direct_cost<E>(g, input, padded);
  if (padded.in_place || !lies) return padded;
  const ConvPoolPlan inside = plan_direct<T, E>(g, input, threads, lies, true);
  const double inside_costs = direct_cost<E>(g, input, inside);
  if (inside_costs >= costs) return padded;
  costs = inside_costs;
  return inside;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
