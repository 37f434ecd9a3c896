// What conv_direct.h works on: its ring of conv rows, its scratch memory, the plan.
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
constexpr bool kHasPhases = kChannels<E> == 1 && sizeof(E) == sizeof(float);

template <class E>
constexpr ConvAlgorithm kDirectAlgorithm = kIsPair<E>       ? ConvAlgorithm::pairs
                                           : kStartsPair<E> ? ConvAlgorithm::row_pairs
                                           : kIsOfMatrix<E> ? ConvAlgorithm::matrix
                                           : kIsOfFloats<E> ? ConvAlgorithm::by_four
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

// Whether a plain row takes kernel_rows_inside alone.
FASTNN_INLINE bool skips_rows(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  return makes_plain_rows(plan) && plan.order != TapOrder::channels_first && rows_leave_input(g);
}

// Direct convolution's: where rows are short, those under a band.
template <class C>
RingShape direct_ring_shape(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  RingShape shape = ring_shape(g, plan);
  shape.together = (makes_plain_rows(plan) || plan.skips_padding) && rows_are_short<C>(shape.columns);
  if (shape.together) {
    const int64_t under_band = (plan.band - 1) * g.pool_stride[1] + g.pool_extent(1);
    shape.rows = larger(shape.rows, smaller(g.conv[1], under_band));
  }
  return shape;
}

// Whether windows may be pooled in registers; unless their pixels turn out to be not all finite.
template <class E>
bool pools_in_tiles(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  using C = Compute<E>;
  return kPoolsInTiles<C> && windows_are_apart(g) && makes_plain_rows(plan) && !direct_ring_shape<C>(g, plan).together;
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
template <class E>
int64_t tile_size(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  const int64_t channels = plan.order == TapOrder::channels_last ? tile_pixel<E>(g.in_channels) : g.in_channels;
  return channels * channel_step<Compute<E>>(g, plan) + elements_behind<E>(g);
}

// Of a band's transformed input, from one position to the next: the products at one read a single run. An odd number of
// cache lines, as above.
template <class C>
int64_t phase_step(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  constexpr int64_t line = 64 / sizeof(C);
  const PhaseShape<C> s(g, ring_shape(g, plan).columns);
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
  int64_t* ahead;         // InputAhead's
  int8_t* moderate;       // whether a block's weight and bias are, by group and block; -1 if not known
  int64_t size;

  DirectScratch(const ConvPoolGeometry& g, const ConvPoolPlan& plan, void* memory) {
    const RingShape ring_size = direct_ring_shape<C>(g, plan);
    const int64_t blocks = ring_size.persistent ? divide_up(g.out_channels, kBlockChannels<C>) : 1;
    const int64_t slots = blocks * ring_size.slices * ring_size.rows;
    const int64_t stage_pixels = plan.band * plan.columns;
    MemoryParts parts(memory);
    const bool in_phases = plan.algorithm == ConvAlgorithm::phases;
    tile = parts.take<E>(in_phases ? phase_tile_size<C>(g, plan) : plan.in_place ? 0 : tile_size<E>(g, plan));
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
    to_make = parts.take<RowToMake<E>>(kIsOfMatrix<E> || ring_size.together ? ring_size.slices * ring_size.rows : 1);
    tags = parts.take<int64_t>(slots);
    offsets = parts.take<int64_t>(depth);
    ahead = parts.take<int64_t>(depth);
    moderate = parts.take<int8_t>(g.groups * divide_up(g.out_channels, kBlockChannels<C>));
    size = parts.used();
  }
};

// Bytes of the packed weight of so many output channels of a group.
template <class E>
int64_t weight_bytes(const ConvPoolGeometry& g, int64_t channels) {
  return packed_width<E>(channels) * product_depth<E>(g) * static_cast<int64_t>(sizeof(Compute<E>));
}
// Those of a group and of a block that stay in L2.
constexpr int64_t kNearWeight = 1 << 20, kNearBlock = 512 << 10;

// Whether a block of output channels serves all images before the next one, rather than all blocks an image: where L2
// holds the weight of one but not of all. Not where each would copy the input again.
template <class E>
bool blocks_come_first(const ConvPoolGeometry& g, const ConvPoolPlan& plan, int64_t threads) {
  constexpr int64_t kEnough = 2;  // images of a thread
  const int64_t block = weight_bytes<E>(g, smaller(g.out_channels, kBlockChannels<Compute<E>>));
  return plan.in_place && weight_bytes<E>(g, g.out_channels) > kNearWeight && block <= kNearBlock &&
         g.batch >= kEnough * threads && plan.algorithm != ConvAlgorithm::matrix;
}

// How a tile of direct convolution takes its input.
enum class TileWay {
  as_it_lies,  // copied with its padding, or read in place where there is none
  inside,      // read in place, whatever its padding (conv_row_inside.h)
  turned,      // copied into channels last
};

// Whether a tile of elements E, which `g` counts, may be in either order. (Others have one that is theirs; float32
// gains nothing by it.)
template <class E>
bool can_turn_tile(const ConvPoolGeometry& g, const ConvLayout& input) {
  return kIsPair<E> && can_be_turned(input) && g.in_channels > 1;
}

// For a tile of elements E, which `g` counts. `lies`: the input consists of such elements, and its layout counts them.
template <class T, class E>
ConvPoolPlan plan_direct(const ConvPoolGeometry& g, const ConvLayout& input, int64_t threads, bool lies, TileWay way,
                         ConvAlgorithm algorithm = kDirectAlgorithm<E>) {
  using C = Compute<T>;
  ConvPoolPlan plan = {};
  plan.algorithm = algorithm;
  const bool turned = way == TileWay::turned;
  plan.skips_padding = way == TileWay::inside;
  plan.in_place = lies && !turned && (plan.skips_padding || kIsOfMatrix<E> || can_stay_in_place<E>(g, input, false));
  const bool is_last = input.c == 1 && g.in_channels > 1 && input.d[2] != 1;
  plan.order = plan.skips_padding                                   ? inside_order(g)
               : kIsOfRun<E> || kIsOfFloats<E> || is_last || turned ? TapOrder::channels_last
               : rows_leave_input(g)                                ? TapOrder::rows_first
                                                                    : TapOrder::channels_first;
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
  const int64_t image = group_size(g) * static_cast<int64_t>(sizeof(E));
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
  const bool persistent = ring_shape(g, plan).persistent;
  plan.items = g.batch * g.groups * plan.column_parts;
  plan.row_parts = parts_of_rows(plan.items, rows, persistent ? rows_again(g) : 0, threads);
  if (input.c == 1 && g.groups > 1 && !persistent) {
    // So that the groups find their input in cache.
    const int64_t bytes = image_size(g) * static_cast<int64_t>(sizeof(T));
    plan.row_parts = larger(plan.row_parts, smaller(rows, divide_up(bytes, kTileBytes)));
  }
  plan.items *= plan.row_parts;
  plan.blocks_first = blocks_come_first<E>(g, plan, threads);
  plan.block_parts = plan.blocks_first       ? blocks
                     : plan.items >= threads ? 1
                                             : smaller(blocks, divide_up(threads, plan.items));
  plan.items *= plan.block_parts;
  plan.pack_items = g.groups * blocks;
  plan.packed_size = g.groups * product_depth<E>(g) * packed_width<E>(g.out_channels);
  plan.scratch_size = DirectScratch<E>(g, plan, nullptr).size;
  return plan;
}

// The same with conv rows by phases.
template <class T, class C = Compute<T>>
ConvPoolPlan plan_phases(const ConvPoolGeometry& g, const ConvLayout& input, int64_t threads) {
  ConvPoolPlan plan = plan_direct<T, C>(g, input, threads, false, TileWay::as_it_lies, ConvAlgorithm::phases);
  plan.order = TapOrder::channels_first;
  while (plan.band > 1 && phase_tile_size<C>(g, plan) * static_cast<int64_t>(sizeof(C)) > kPhaseBytes) --plan.band;
  const PhaseShape<C> s(g, 1);
  plan.packed_size = g.groups * s.positions * s.depth * round_up(g.out_channels, kLanes<C>);
  plan.scratch_size = DirectScratch<C>(g, plan, nullptr).size;
  return plan;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
