// What conv_rows.h works on: the shape of a band, its scratch memory, the plan and its cost.
#pragma once

#include "conv_tile.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kRowAccumulators = FASTNN_VECTOR_BYTES == 64 ? 24 : 12;
constexpr int kRowOutputs = kRowAccumulators / 2;  // output channels of a register tile
constexpr int64_t kRowTileBytes = 384 << 10;
constexpr int64_t kRowPixelBytes = 384 << 10;  // of a band whose input stays where it is

// Vectors of pixels of a register tile: enough accumulators to keep the multipliers busy.
constexpr int row_vectors(int outputs) {
  return kRowAccumulators / outputs < 8 ? kRowAccumulators / outputs : 8;
}

// The same where they are picked from the input; each number has its share of the build's time.
constexpr int picked_vectors(int outputs) {
  return row_vectors(outputs) < 4 ? row_vectors(outputs) : 4;
}

// One band: sizes of the tile and of the conv rows computed from it.
struct RowShape {
  int64_t conv[2];       // slices and rows of conv pixels
  int64_t margin;        // columns beside a conv row that windows reach to
  int64_t pitch;         // of a row of pixels as they are computed
  int64_t spread;        // and as windows find them, with room for their margins
  int64_t run;           // pixels of a slice, from the first to the last
  bool picks;            // every stride-th column of the input, where it lies
  bool by_rows;          // vectors begin anew with each row, or else go along the run
  int64_t vectors;       // of a slice
  int64_t phase[2];      // of rows and columns: from one plane of the tile to the next
  int64_t slice;         // from one input slice to the next
  int64_t channel;       // from one input channel to the next
  int64_t slices, rows;  // of the input, rows of one phase
  int64_t every[3];      // slice of the tile, phase of rows and of columns has taps
};

// `rows` conv rows in a slice. Along the run, vectors are computed for what lies between the rows as well.
template <class C>
void set_rows(const ConvPoolGeometry& g, int64_t rows, RowShape& s) {
  s.conv[1] = rows;
  s.run = (rows - 1) * s.pitch + g.conv[2];
  const int64_t along_run = divide_up(s.run, kLanes<C>), apart = rows * divide_up(g.conv[2], kLanes<C>);
  s.by_rows = s.picks || (g.conv[2] >= kLanes<C> && apart < along_run);
  s.vectors = s.by_rows ? apart : along_run;
}

template <class C>
RowShape row_shape(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  RowShape s;
  const int64_t pitch = plan.row_pitch;  // of rows that are read where they lie, as they follow one another, or 0
  s.picks = plan.in_place && pitch == 0;
  constexpr int64_t line = 64 / sizeof(C);
  s.conv[0] = smaller(g.conv[0], (plan.slices - 1) * g.pool_stride[0] + g.pool_extent(0));
  const int64_t past = (g.output[2] - 1) * g.pool_stride[2] - g.pool_padding[2] + g.pool_extent(2);
  s.margin = larger(g.pool_padding[2], larger(0, past - g.conv[2]));
  s.pitch = pitch > 0 ? pitch : g.conv[2] + larger((g.kernel_extent(2) - 1) / g.stride[2], s.margin);
  s.spread = larger(s.pitch, g.conv[2] + s.margin);
  set_rows<C>(g, smaller(g.conv[1], (plan.band - 1) * g.pool_stride[1] + g.pool_extent(1)), s);
  for (int d = 0; d < 3; ++d) s.every[d] = greatest_common_divisor(g.stride[d], g.dilation[d]);
  s.slices = (s.conv[0] - 1) * g.stride[0] + g.kernel_extent(0);
  s.rows = s.conv[1] + (g.kernel_extent(1) - 1) / g.stride[1];
  s.phase[1] = s.rows * s.pitch;
  s.phase[0] = s.phase[1] * smaller(g.stride[2], g.kernel_extent(2));
  s.slice = s.phase[0] * smaller(g.stride[1], g.kernel_extent(1));
  // An odd number of cache lines: a power of two would put all channels into few of the cache's sets.
  s.channel = round_up(s.slice * s.slices, 2 * line) + line;
  return s;
}

// `g` counts elements E.
template <class E>
struct RowScratch {
  using C = Compute<E>;

  E* tile;     // [channel][slice][row's phase][column's phase][row][column]
  C* pixels;   // [conv slice][output channel][row][column], with margins
  C* largest;  // of each column under a row of windows
  C* stage;    // [output channel][pooled pixel]
  uint8_t* winner_stage;
  WindowRow<C>* window_rows;
  int64_t* offsets;  // of the elements under a conv pixel
  int64_t pixel_step, stage_step;
  int64_t size;

  RowScratch(const ConvPoolGeometry& g, const ConvPoolPlan& plan, void* memory) {
    const RowShape s = row_shape<C>(g, plan);
    const int64_t outputs = smaller(g.out_channels, kRowOutputs);
    const int64_t run = (s.conv[1] - 1) * s.spread + g.conv[2];
    pixel_step = round_up(run, kLanes<C>) + 2 * s.margin + kLanes<C>;
    stage_step = plan.band * g.output[2] + kLanes<C>;  // whole vectors are stored
    MemoryParts parts(memory);
    tile = parts.take<E>(plan.in_place ? 0 : plan.tile_groups * g.in_channels * s.channel + kLanes<C>);
    // A window's vector of pixels may reach a few strides past the last.
    const int64_t past = kLanes<C> * (g.pool_stride[2] + 1) + g.pool_kernel[2];
    pixels = parts.take<C>(s.conv[0] * outputs * pixel_step + past);
    largest = parts.take<C>(g.conv[2] + 2 * s.margin + past);
    stage = parts.take<C>(outputs * stage_step);
    winner_stage = parts.take<uint8_t>(outputs * stage_step);
    window_rows = parts.take<WindowRow<C>>(g.pool_kernel[0] * g.pool_kernel[1]);
    offsets = parts.take<int64_t>(g.depth());
    size = parts.used();
  }
};

// A window of dilated places may hold none but padding, which has no place here.
FASTNN_INLINE bool rows_apply(const ConvPoolGeometry& g) {
  return g.pool_dilation[0] == 1 && g.pool_dilation[1] == 1 && g.pool_dilation[2] == 1;
}

// Conv slices or rows, along dimension d, under so many pooled ones from `first` on.
FASTNN_INLINE Range conv_under(const ConvPoolGeometry& g, int d, int64_t first, int64_t pooled) {
  const int64_t last = smaller(first + pooled, g.output[d]);
  return {larger(0, first * g.pool_stride[d] - g.pool_padding[d]),
          smaller(g.conv[d], (last - 1) * g.pool_stride[d] - g.pool_padding[d] + g.pool_extent(d))};
}

// Whether the input's rows follow one another at about the pitch wanted, which a last column that no window has makes
// larger, and each band's are a vector at least.
template <class T, class E>
FASTNN_INLINE bool rows_stay_in_place(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan) {
  const int64_t lanes = kLanes<Compute<T>>, pitch = g.conv[2] + g.kernel_extent(2) - 1;
  const bool follow = input.d[2] == 1 && input.d[1] >= pitch && input.d[1] <= pitch + lanes;
  const bool strided = g.stride[0] * g.stride[1] * g.stride[2] > 1;
  const auto fills_vector = [&](int64_t first) {
    const Range rows = conv_under(g, 1, first, plan.band);
    return (rows.last - rows.first - 1) * input.d[1] + g.conv[2] >= lanes;
  };
  constexpr int64_t kTimes = kIsPair<E> ? 3 : 1;  // that each number may be read
  return can_stay_in_place<T>(g, input, g.taps() * divide_up(g.out_channels, kRowOutputs) <= kTimes) && !strided &&
         follow && fills_vector(0) && fills_vector((plan.row_parts - 1) * plan.band);
}

// Whether vectors pick the columns that the kernel strides to from where they lie, each number few times.
template <class T>
constexpr bool kPicksRows = sizeof(Compute<T>) == sizeof(float);
template <class T>
FASTNN_INLINE bool rows_are_picked(const ConvPoolGeometry& g, const ConvLayout& input) {
  constexpr int64_t kTimes = 3, kMost = 3;  // of columns that stride, each of which has its share of the build's time
  const int64_t stride = g.stride[2] * input.d[2];
  const bool padded = g.padding[0] > 0 || g.padding[1] > 0 || g.padding[2] > 0;
  return kPicksRows<T> && !padded && stride > 1 && stride <= kMost &&
         g.taps() <= kTimes * g.stride[0] * g.stride[1] * g.stride[2];
}

// Whether elements E can be taken together from where their channels lie: numbers of any, pairs side by side or from
// rows of their own. `g` counts single channels.
template <class E>
FASTNN_INLINE bool has_row_elements(const ConvPoolGeometry& g, const ConvLayout& input) {
  return !kIsPair<E> || (g.in_channels > 1 && (input.c != 1 || lies_in_elements<E>(g, input)));
}

// Cuts the slices and rows of windows into bands, each of which may take so many bytes: of one slice, but of several
// where these have rows of the convolution in common.
template <class Bytes>
void cut_into_bands(const ConvPoolGeometry& g, int64_t threads, int64_t most, const Bytes& bytes, ConvPoolPlan& plan) {
  int64_t others = g.batch * (g.groups / plan.tile_groups);
  const auto cut = [&](int d, int64_t other_items, int64_t& band) {
    band = 1;
    const int64_t one = bytes();
    band = 2;
    const int64_t room = larger(0, most - one), more = larger(1, bytes() - one);
    const int64_t bands = divide_up(g.output[d], smaller(g.output[d], 1 + room / more));
    const double again = static_cast<double>(larger(0, g.pool_extent(d) - g.pool_stride[d])) / g.pool_stride[d];
    const int64_t parts = bands * parts_of_rows(other_items * bands, divide_up(g.output[d], bands), again, threads);
    band = divide_up(g.output[d], smaller(g.output[d], parts));
    return divide_up(g.output[d], band);
  };
  plan.slices = 1;
  plan.row_parts = cut(1, others * g.output[0], plan.band);
  int64_t slice_parts = g.output[0];
  if (plan.row_parts == 1 && g.pool_extent(0) > g.pool_stride[0]) slice_parts = cut(0, others, plan.slices);
  plan.items = others * slice_parts * plan.row_parts;
}

// With a tile and a weight of elements E; `call` counts single channels.
template <class E, class T>
ConvPoolPlan plan_rows(const ConvPoolGeometry& call, const ConvLayout& input, int64_t threads) {
  using C = Compute<T>;
  const ConvPoolGeometry g = tile_geometry<E>(call);
  ConvPoolPlan plan = {};
  plan.algorithm = kIsPair<E> ? ConvAlgorithm::rows_by_two : ConvAlgorithm::rows;
  plan.pack_items = g.groups * divide_up(g.out_channels, kRowOutputs);
  plan.packed_size = g.groups * g.out_channels * g.depth();
  constexpr int64_t size = sizeof(C);
  plan.tile_groups = plan.slices = 1;
  const auto pixel_bytes = [&] {
    const RowShape s = row_shape<C>(g, plan);
    return s.conv[0] * smaller(g.out_channels, kRowOutputs) * s.conv[1] * s.pitch * size;
  };
  cut_into_bands(g, threads, kRowPixelBytes, pixel_bytes, plan);
  if (call.in_channels % kChannels<E> == 0) {
    plan.row_pitch = rows_stay_in_place<T, E>(g, input, plan) ? input.d[1] : 0;
    plan.in_place = plan.row_pitch > 0 || rows_are_picked<T>(g, input);
  }
  if (!plan.in_place) {
    const auto tile_bytes = [&] { return plan.tile_groups * g.in_channels * row_shape<C>(g, plan).channel * size; };
    // Groups that share the input's cache lines are transposed together if there is room.
    plan.tile_groups = input.c == 1 ? g.groups : 1;
    plan.slices = plan.band = 1;
    if (tile_bytes() > kRowTileBytes) plan.tile_groups = 1;
    cut_into_bands(g, threads, kRowTileBytes, tile_bytes, plan);
  }
  plan.scratch_size = RowScratch<E>(g, plan, nullptr).size;
  return plan;
}

// What is waited for, for one image and group: from beyond L2; of large images from memory, every channel on a page of
// its own. In place each block of outputs reads it again. `g` counts single channels.
template <class T>
double rows_arrival_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan) {
  constexpr int64_t kNear = 1 << 20, kFar = 8 << 20;
  constexpr double kLateByte = 0.01, kFarByte = 0.45, kStridedByte = 1, kPlaceByte = 0.12, kLastByte = 0.06;
  const int64_t bytes = group_size(g) * static_cast<int64_t>(sizeof(T)), all = g.batch * g.groups * bytes;
  const double met = share_met(g, 0) * share_met(g, 1) * static_cast<double>(bytes);
  if (plan.in_place && all > kFar) {
    return kPlaceByte * met * static_cast<double>(bytes > kNear ? divide_up(g.out_channels, kRowOutputs) : 1);
  }
  if (input.c == 1) return all > kFar ? kLastByte * met : 0;
  const bool far = !plan.in_place && g.groups * bytes > kFar;
  return met * (far ? (g.stride[2] > 1 ? kStridedByte : kFarByte) : all > kNear ? kLateByte : 0);
}

// For one image and group.
template <class E, class T, class C = Compute<T>>
double rows_cost(const ConvPoolGeometry& call, const ConvLayout& input, const ConvPoolPlan& plan) {
  const ConvPoolGeometry g = tile_geometry<E>(call);
  const RowShape s = row_shape<C>(g, plan);
  const double bands = static_cast<double>(divide_up(g.output[0], plan.slices) * plan.row_parts);
  const double multiplications = static_cast<double>(g.out_channels * g.depth() * s.conv[0] * s.vectors);
  int64_t lines = divide_up(s.slices, s.every[0]) * s.rows;  // of the tile that are filled
  for (int d = 1; d < 3; ++d) lines *= divide_up(smaller(g.stride[d], g.kernel_extent(d)), s.every[d]);
  const double runs = static_cast<double>(lines), elements = static_cast<double>(lines * s.pitch);
  const double channels = static_cast<double>(g.in_channels);
  constexpr double kCopied = kIsPair<E> ? 0.4 : 1.2, kRun = 24;  // an element, of others' cost; a line of a channel
  double copy = channels * (elements * kCopied * copy_cost(input.d[2] * g.stride[2]) + runs * kChannels<E> * kRun);
  const int64_t together = plan.tile_groups * g.in_channels;
  // Whole squares are transposed, of which a short row fills but a part; channels that do not fill one take half of it.
  if (input.c == 1 && together > 1) {
    const int64_t part = together % kLanes<C>;
    constexpr double kTransposed = 0.53, kRunOfAll = 18;
    const int64_t whole = together - part + (part > 0 ? kLanes<C> / 2 : 0);
    const double squares = static_cast<double>(round_up(s.pitch, kLanes<C>) * whole);
    copy = runs * (squares * kTransposed + kRunOfAll) / static_cast<double>(plan.tile_groups);
  }
  constexpr double kItem = 490, kTile = 180;  // per band; of a register tile
  // On multiplications: of a single output each takes a load of its own, across lines but for those that begin a row.
  const double begin = plan.in_place ? 0 : 1 / static_cast<double>(divide_up(g.kernel[2], g.stride[2]));
  // Of a vector, once for all outputs of a tile.
  constexpr double kWidened = kIsPair<E> ? 1.3 : 0.7, kPicked = sizeof(T) == sizeof(C) ? 2.5 : kIsPair<E> ? 2.7 : 0.6;
  const double once = s.picks ? kPicked : plan.in_place && sizeof(T) != sizeof(C) ? kWidened : 0;
  const double overhead = 1 + (g.out_channels == 1 ? 0.66 * (1 - begin) : 0) +
                          once / static_cast<double>(smaller(g.out_channels, kRowOutputs));
  const double place = g.pool_stride[2] > kMostStride ? 60 : 5;  // of a vector of windows
  const double windows =
      static_cast<double>(g.out_channels * plan.slices * plan.band * divide_up(g.output[2], kLanes<C>) * g.places());
  const double waits = rows_arrival_cost<T>(call, input, plan);
  const int64_t outputs = smaller(g.out_channels, kRowOutputs), tile = outputs * row_vectors(static_cast<int>(outputs));
  const double tiles = static_cast<double>(g.out_channels * s.conv[0] * s.vectors) / static_cast<double>(tile);
  return bands * (kItem + kTile * tiles + overhead * multiplications + (plan.in_place ? 0 : copy) + place * windows) +
         waits;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
