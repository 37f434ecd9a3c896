// What direct convolution costs: by this it is compared with the other algorithms, and with or without a copy.
#pragma once

#include "conv_direct_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// How many multiply-adds a vector of a block's weight takes to arrive, where it comes from beyond L1 for each of `rows`
// conv rows.
template <class E>
double weight_cost(const ConvPoolGeometry& g, const ConvPoolPlan& plan, int64_t rows) {
  constexpr double kNear = 4.5, kFar = 5.3;  // from L2; from L3
  constexpr int64_t kL1 = 24 << 10;
  const int64_t block = weight_bytes<E>(g, smaller(g.out_channels, kBlockChannels<Compute<E>>));
  if (block <= kL1) return 0;
  if (block > kNearBlock) return kFar;
  const bool stays = weight_bytes<E>(g, g.out_channels) <= kNearWeight || blocks_come_first<E>(g, plan, 1);
  if (stays) return kNear;
  return kNear + (kFar - kNear) / static_cast<double>(rows);
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
// for each multiplication.
template <class E>
double products_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan, int64_t row) {
  constexpr double kInFlight = 5.3;  // accumulators that keep the multipliers busy
  constexpr double kLoads = 0.75;    // of a tile of one vector, beside one for each pixel
  const int64_t vectors = packed_width<E>(g.out_channels) / kLanes<Compute<E>>;
  const RingShape ring = direct_ring_shape<Compute<E>>(g, plan);
  const int64_t rows = smaller(plan.band * g.pool_stride[1], g.conv[1]);
  const auto most_together = [&](int64_t fit) { return plan.skips_padding ? smaller(fit, kRowsInside) : fit; };
  const int64_t apart = plan.in_place ? input.d[2] * g.stride[2] : 1;
  const int64_t fit = pixels_of_tile<E, 2>(apart), group = pools_in_tiles<E>(g, plan) ? g.pool_kernel[2] : 1;
  const int64_t parts = divide_up(row, larger(1, fit / group) * group);
  const int64_t together =
      ring.together ? smaller(ring.slices * rows, most_together(rows_of_tile<2>(static_cast<int>(row)))) : 1;
  const double inside = plan.skips_padding ? share_inside(g, 2) : 1;  // of a row, on average
  const double pixels = inside * (together > 1 ? static_cast<double>(row * together)
                                               : static_cast<double>(row) / static_cast<double>(parts));
  const double to_be_busy = kInFlight / static_cast<double>(smaller(2, vectors)),
               to_wait = weight_cost<E>(g, plan, rows);
  const double needed = to_be_busy > to_wait ? to_be_busy : to_wait;
  const double slow = needed > pixels ? needed / pixels : 1;
  const int64_t in_run = ring.together ? row * most_together(rows_of_tile<1>(static_cast<int>(row))) : row;
  const double in_tile = static_cast<double>(in_run) / static_cast<double>(divide_up(in_run, kConvPixels<1>));
  const double single = vectors % 2 == 0 ? 1 : 1 + kLoads / (in_tile * static_cast<double>(vectors));
  const int64_t products = vectors * row * g.conv[0] * g.conv[1] * product_depth<E>(g);
  const double taken = skips_rows(g, plan) ? share_of_rows(g) : 1;
  return static_cast<double>(products) * taken * slow * single;
}

// Until an image whose channels lie apart has arrived from memory to be copied, where the images do not stay in L3 from
// call to call. (Of one that is larger than what is turned at once nothing is known.)
template <class E>
double arrival_cost(const ConvPoolGeometry& g, const ConvLayout& input, bool in_place) {
  constexpr double kByte = 0.9;
  constexpr int64_t kL3 = 36 << 20, kLarge = 8 << 20;
  if (input.c == 1 || kIsOfFloats<E> || kIsPair<E> || in_place) return 0;
  const int64_t bytes = group_size(g) * static_cast<int64_t>(sizeof(Compute<E>));
  const bool waits = g.batch * g.groups * bytes > kL3 && g.groups * bytes <= kLarge;
  return waits ? kByte * static_cast<double>(bytes) : 0;
}

// The same of a strided kernel that reads images of channels apart in place: parts of many lines at a time, too few
// products to hide how long they are on their way.
template <class E>
double strided_arrival_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan) {
  constexpr double kByte = 0.12;
  constexpr int64_t kL3 = 12 << 20;
  const int64_t bytes = group_size(g) * static_cast<int64_t>(sizeof(E));
  if (!plan.in_place || input.c == 1 || g.stride[1] == 1 || g.batch * g.groups * bytes <= kL3) return 0;
  return kByte * share_met(g, 0) * share_met(g, 1) * static_cast<double>(bytes);
}

// The same of FourFloats, which the products do not hide: contiguous images that L2 does not hold come whole, and lines
// that groups share once for each.
template <class E>
double floats_arrival_cost(const ConvPoolGeometry& g, const ConvLayout& input) {
  constexpr double kByte = 0.07, kApartByte = 0.45;
  constexpr int64_t kNear = 1 << 20, kFar = 8 << 20;
  const int64_t bytes = group_size(g) * static_cast<int64_t>(sizeof(E));
  if (g.batch * g.groups * bytes <= kNear) return 0;
  const bool apart = input.c != 1 ? g.groups * bytes > kFar : g.groups > 1;
  const double met =
      apart && input.c != 1 ? 1 : share_met(g, 0) * share_met(g, 1) * (input.c == 1 ? share_met(g, 2) : 1);
  return (apart ? kApartByte : kByte) * met * static_cast<double>(bytes);
}

// Of a band's copy with channels last, of an input whose channels lie apart: whole rows that follow one another are one
// run.
template <class E>
double turned_band_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan) {
  const int64_t channels = kChannels<E> * g.in_channels, extent = input_extent(g, 2, plan.columns);
  const int64_t slices = input_extent(g, 0, 1), rows = input_extent(g, 1, plan.band);
  const bool joined = extent == g.input[2] && g.padding[2] == 0 && input.d[1] == extent * input.d[2];
  const int64_t runs = joined ? slices : slices * rows, columns = joined ? rows * extent : smaller(g.input[2], extent);
  return static_cast<double>(runs) * (turned_run_cost<Number<E>>(input, channels, columns) + kRunCost);
}

// The same of FourFloats' channels that lie side by side.
template <class E>
double floats_band_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan) {
  constexpr double kColumn = 2;  // that is a run of its own
  if (input.c != 1) return turned_band_cost<E>(g, input, plan);
  const int64_t channels = kChannels<E> * g.in_channels;
  const int64_t columns = smaller(g.input[2], input_extent(g, 2, plan.columns));
  const double column = kCopyCost * static_cast<double>(channels) + (input.d[2] == channels ? 0 : kColumn);
  return static_cast<double>(input_extent(g, 0, 1) * input_extent(g, 1, plan.band)) *
         (static_cast<double>(columns) * column + kRunCost);
}

// For one image and group.
template <class E, class C = Compute<E>>
double direct_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan) {
  const int64_t vectors = divide_up(g.out_channels, kLanes<C>);
  const int64_t row = smaller(g.conv[2], (g.output[2] - 1) * g.pool_stride[2] + g.pool_extent(2));
  const double products = products_cost<E>(g, input, plan, row), arrival = arrival_cost<E>(g, input, plan.in_place);
  const double multiplications = products > arrival ? products : arrival;
  const double conv_rows = static_cast<double>(g.conv[0] * g.conv[1] * divide_up(vectors, 2));
  constexpr double kItem = 400, kRow = 60, kWayOut = 8;  // of a conv row; of a vector of pooled pixels
  const double windows = static_cast<double>(vectors * g.pixels()) * (kWayOut + window_cost(g));
  constexpr double kAddUp = 3 * kChannels<E>;  // of a conv pixel's sums
  const double sums = kIsOfFloats<E> ? kAddUp * static_cast<double>(row * g.conv[0] * g.conv[1]) : 0;
  const double late = kIsOfFloats<E> ? floats_arrival_cost<E>(g, input) : strided_arrival_cost<E>(g, input, plan);
  const auto looks_at = [&](bool all) {  // numbers that might not be finite
    constexpr double kLook = 0.125;
    return all ? kLook * static_cast<double>(group_size(g)) : 0;
  };
  const double cost = kItem + kRow * conv_rows + windows + sums + late + looks_at(pools_in_tiles<E>(g, plan));
  const int64_t bands = g.output[0] * divide_up(g.output[1], plan.band) * plan.column_parts;
  const int64_t tile_rows = bands * input_extent(g, 0, 1) * input_extent(g, 1, plan.band);
  const double interleaving = static_cast<double>(tile_rows) *
                              (kRunCost + interleave_cost(g.in_channels, input_extent(g, 2, plan.columns), input));
  if (kIsOfMatrix<E>) {
    constexpr double kCall = 400;
    const double rows = static_cast<double>(g.conv[0] * g.conv[1]) * matrix_row_cost(g, plan, vectors);
    return kCall + cost + rows + (plan.in_place ? 0 : interleaving) + looks_at(elements_behind<E>(g) > 0);
  }
  if (plan.skips_padding) {
    constexpr double kPass = 30, kAdded = 1.8;  // of a pass over a conv row; of a vector of it
    constexpr double kStart = 4, kMost = 0.1;   // products that each pass's sums lose; of all, at most
    const double added = static_cast<double>(row * smaller(2, vectors)) * kAdded;
    const double lost = kStart * inside_passes(g) / static_cast<double>(g.depth());
    const double parts = 1 + (lost < kMost ? lost : kMost);
    return cost + multiplications * parts * share_inside(g) + conv_rows * inside_passes(g) * (kPass + added);
  }
  if (kStartsPair<E>) return cost + multiplications + interleaving + looks_at(row_pairs_reach_beyond(g));
  if (kIsOfFloats<E>) {
    return cost + multiplications +
           (plan.in_place ? 0 : static_cast<double>(bands) * floats_band_cost<E>(g, input, plan));
  }
  if (input.c != 1 && !plan.in_place && plan.order == TapOrder::channels_last) {
    const double lines = parted_lines_cost<Number<E>>(g, input, group_size(g) * static_cast<int64_t>(sizeof(E)));
    return cost + multiplications + static_cast<double>(bands) * turned_band_cost<E>(g, input, plan) + lines;
  }
  constexpr double kFarCopy = 1.7;  // of an element of a short run from memory
  constexpr double kColumn = 2.7;   // that is a run of its own
  constexpr int64_t kFar = 8 << 20;
  const bool far = plan.order != TapOrder::channels_last && group_size(g) * static_cast<int64_t>(sizeof(C)) > kFar;
  const double elements = static_cast<double>(g.in_channels * tile_rows * input_extent(g, 2, plan.columns));
  const bool last = plan.order == TapOrder::channels_last;
  const bool joined = !last || input.d[2] == g.in_channels || input.d[2] == kChannels<E> * g.in_channels;
  const double columns = joined ? 0 : static_cast<double>(tile_rows * input_extent(g, 2, plan.columns));
  const double runs = static_cast<double>(last ? tile_rows : tile_rows * g.in_channels);
  const double copy = elements * (far ? kFarCopy : kCopyCost) + columns * kColumn + runs * kRunCost;
  return cost + multiplications + (plan.in_place ? 0 : copy);
}

// The same with what is waited for where pixels read in place come from memory and groups share their lines: the first
// group's products hide a part of how long they are on their way, the others find them in cache.
template <class E>
double cost_with_arrival(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan) {
  constexpr double kByte = 0.3;
  constexpr int64_t kFar = 12 << 20;
  const double cost = direct_cost<E>(g, input, plan);
  const int64_t bytes = g.groups * group_size(g) * static_cast<int64_t>(sizeof(E));
  const bool shares_lines = g.groups > 1 && g.in_channels * static_cast<int64_t>(sizeof(E)) < kLineBytes;
  if (kIsOfFloats<E> || !plan.in_place || input.c != 1 || !shares_lines || g.batch * bytes <= kFar) return cost;
  const double arrival = kByte * share_met(g, 0) * share_met(g, 1) * share_met(g, 2) * static_cast<double>(bytes);
  return arrival > cost ? cost + (arrival - cost) / static_cast<double>(g.groups) : cost;
}

// For one image and group, by phases.
template <class C>
double phases_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvPoolPlan& plan) {
  constexpr double kItem = 300, kRow = 60, kWayOut = 12, kInFlight = 10;
  constexpr double kProduct = 1;              // of direct convolution's
  constexpr double kPoint = 20, kResult = 4;  // of a register tile's sums at a point; of each of them
  constexpr double kTransformed = 5;          // of a vector of input
  constexpr double kPack = 3.2;               // of a weight, beyond what packing takes elsewhere
  const PhaseShape<C> s(g, ring_shape(g, plan).columns);
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
  const double windows = static_cast<double>(vectors * g.pixels()) * (kWayOut + window_cost(g));
  const int64_t bands = g.output[0] * divide_up(g.output[1], plan.band) * plan.column_parts;
  const double rows =
      static_cast<double>(g.in_channels * bands * input_extent(g, 0, 1) * input_extent(g, 1, plan.band));
  const double parting = static_cast<double>(s.places) * (kRunCost + copy_cost(s.places * input.d[2]) * s.pairs);
  const double transform = parting + kTransformed * static_cast<double>(s.positions * s.pitch / kLanes<C>);
  const double packing = kPack * static_cast<double>(g.out_channels * g.depth()) / static_cast<double>(g.batch);
  return kItem + conv_rows * (kRow * blocks + products + results + waits) + windows + rows * transform + packing;
}

// The cheapest way to take the input.
template <class T, class E>
ConvPoolPlan choose_direct(const ConvPoolGeometry& g, const ConvLayout& input, int64_t threads, bool lies,
                           double& costs) {
  ConvPoolPlan least = plan_direct<T, E>(g, input, threads, lies, TileWay::as_it_lies);
  costs = cost_with_arrival<E>(g, input, least);
  const auto consider = [&](TileWay way) {
    const ConvPoolPlan plan = plan_direct<T, E>(g, input, threads, lies, way);
    const double plan_costs = cost_with_arrival<E>(g, input, plan);
    if (plan_costs >= costs) return;
    costs = plan_costs;
    least = plan;
  };
  if (lies) consider(TileWay::inside);
  if (can_turn_tile<E>(g, input)) consider(TileWay::turned);
  return least;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
