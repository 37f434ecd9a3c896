// Which algorithm computes a call, and how it cuts the call up. Compiled once: the instruction set is data.
#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>

#include "machine.h"

namespace fastnn {
namespace {

using planner::divide_up;
using planner::round_up;

// What every algorithm's plan is made from.
struct Planner {
  const ConvPoolGeometry& g;
  const PlanRequest& request;
  const Machine& machine;
  int64_t compute_bytes = std::max<int64_t>(4, request.element_bytes);
  int64_t lanes = machine.vector_bytes / compute_bytes;
  int64_t most_rows = most_rows_of_tile(machine.registers);
  int64_t block = 2 * lanes;  // the output channels of a block
  int64_t longest_sum = machine.longest_sum;

  double conv_pixels() const {  // of all images
    return static_cast<double>(g.batch) * g.conv[0] * g.conv[1] * g.conv[2];
  }
  // Pixels of the input in slices and rows (with `dims` 3, columns) that strides do not skip.
  double inputs_met(int dims) const {
    double met = static_cast<double>(g.batch) * g.input[0] * g.input[1] * g.input[2];
    for (int d = 0; d < dims; ++d) {
      const int64_t places = g.stride[d] / std::gcd(g.stride[d], g.dilation[d]);  // at most, for a long kernel
      met *= static_cast<double>(std::min(g.kernel[d], places)) / static_cast<double>(g.stride[d]);
    }
    return met;
  }
};

struct Memory {  // as `Parts` gives it out
  int64_t bytes = 0;
  Memory& take(int64_t count, int64_t element) {
    bytes += round_up(count * element, 64);
    return *this;
  }
};

// ---- bands --------------------------------------------------------------------------------------------------------

void set_extents(const ConvPoolGeometry& g, BandPlan& band) {
  const int64_t size[3] = {1, band.rows, band.columns};
  for (int d = 0; d < 3; ++d) {
    band.conv[d] = (size[d] - 1) * g.pool_stride[d] + g.pool_extent(d);
    band.input[d] = (band.conv[d] - 1) * g.stride[d] + g.kernel_extent(d);
  }
}

// How often a conv pixel is computed along a dimension cut into `bands`: windows that overlap have some in common with
// the next band's.
double times_computed(const ConvPoolGeometry& g, int d, int64_t bands) {
  const double beyond = static_cast<double>(std::max<int64_t>(0, g.pool_extent(d) - g.pool_stride[d]));
  const double own = static_cast<double>(g.output[d] * g.pool_stride[d]);
  return (own + static_cast<double>(bands) * beyond) / (own + beyond);
}
double times_computed(const ConvPoolGeometry& g, const BandPlan& band) {
  return times_computed(g, 0, g.output[0]) * times_computed(g, 1, divide_up(g.output[1], band.rows)) *
         times_computed(g, 2, divide_up(g.output[2], band.columns));
}

int64_t bands_of(const ConvPoolGeometry& g, const BandPlan& band) {
  return band.image_bands * g.groups * g.output[0] * band.row_bands * band.column_bands;
}

// The rows of the input that are read by the thread which has most bands: a measure of the time of all threads.
double longest_share(const Planner& p, const BandPlan& band) {
  return static_cast<double>(divide_up(bands_of(p.g, band), p.request.threads) * band.input[1]);
}

// Chooses a band of `images` images: as many columns of a row as `fits` admits, then as many such rows. It takes fewer
// columns and more rows where windows would need more conv rows than the band has, and so many fewer rows that
// `time(band)`, the time of several threads, is least. If there are several bands of rows, each of them but the last
// has a multiple of `unit` rows.
template <class Fits, class Time>
BandPlan choose_band(const Planner& p, int64_t images, const Fits& fits, const Time& time, int64_t unit = 1) {
  const ConvPoolGeometry& g = p.g;
  BandPlan band{};
  band.images = images;
  const auto admits = [&](int64_t rows, int64_t columns) {
    band.rows = rows;
    band.columns = columns;
    set_extents(g, band);
    return fits(band);
  };
  const auto largest = [&](int64_t most, const auto& fits_so_many) {  // by halving the range
    int64_t least = 1;
    while (least < most) {
      const int64_t middle = least + (most - least + 1) / 2;
      if (fits_so_many(middle)) {
        least = middle;
      } else {
        most = middle - 1;
      }
    }
    return least;
  };
  const int64_t widest = largest(g.output[2], [&](int64_t n) { return admits(1, n); });
  int64_t rows = 1, columns = 1;
  double fewest = INFINITY;
  for (int64_t parts = divide_up(g.output[2], widest); parts <= g.output[2]; parts *= 2) {
    const int64_t width = divide_up(g.output[2], parts);
    const int64_t height = largest(g.output[1], [&](int64_t n) { return admits(n, width); });
    admits(height, width);
    if (const double times = times_computed(g, band); times < fewest) {
      fewest = times;
      rows = height;
      columns = width;
    }
    if (height * g.pool_stride[1] >= g.pool_extent(1)) break;
  }
  band.image_bands = divide_up(g.batch, images);
  band.columns = divide_up(g.output[2], divide_up(g.output[2], columns));
  band.column_bands = divide_up(g.output[2], band.columns);
  const auto set_rows = [&](int64_t most) {  // the bands get as many rows as each other
    band.rows = divide_up(g.output[1], divide_up(g.output[1], most));
    if (band.rows < g.output[1]) band.rows = round_up(band.rows, unit);
    band.row_bands = divide_up(g.output[1], band.rows);
    set_extents(g, band);
    return time(band);
  };
  int64_t best = rows;
  if (p.request.threads > 1) {
    double least = set_rows(rows);
    for (int64_t n = rows - 1; n > 0; --n) {
      if (const double one = set_rows(n); one < least) {
        least = one;
        best = n;
      }
    }
  }
  set_rows(best);
  band.stage_rows = band.rows;
  return band;
}

// The same where output channels are in the lanes: rows that wait to be pooled stay in L2, segments of conv pixels in
// L1. `waits` is the number of conv rows in the ring, or 0 where a segment has all columns. The number of a segment's
// columns is a multiple of `tile` too.
template <class Fits, class Time>
BandPlan choose_channel_band(const Planner& p, int64_t waits, const Fits& fits, const Time& time, int64_t tile = 2,
                             int64_t unit = 1) {
  const ConvPoolGeometry& g = p.g;
  const int64_t pixel = p.block * p.compute_bytes;
  const auto fits_stage = [&](const BandPlan& candidate) {
    return candidate.rows * candidate.columns * pixel <= tuned::kStageBytes && fits(candidate);
  };
  BandPlan band = choose_band(p, 1, fits_stage, time, unit);
  band.segment = band.columns;
  if (waits == 0) return band;
  const int64_t pixels = tuned::kRingBytes / (waits * pixel);  // of a conv row
  const int64_t most = std::max<int64_t>(2, (pixels - g.pool_extent(2)) / g.pool_stride[2] + 1);
  if (most < band.columns) {
    band.segment = std::min(band.columns, round_up(divide_up(band.columns, divide_up(band.columns, most)), tile));
  }
  return band;
}

template <class Fits>
BandPlan choose_channel_band(const Planner& p, int64_t waits, const Fits& fits) {
  return choose_channel_band(p, waits, fits, [&](const BandPlan& band) { return longest_share(p, band); });
}

// Conv pixels of a row of a segment, those for its last windows included.
int64_t segment_conv(const ConvPoolGeometry& g, const BandPlan& band) {
  return (band.segment - 1) * g.pool_stride[2] + g.pool_extent(2);
}

// Parts of the output channels' blocks, where there are fewer bands than threads.
int64_t block_parts(const Planner& p, int64_t bands, int64_t blocks) {
  return bands >= p.request.threads ? 1 : std::min(blocks, divide_up(p.request.threads, bands));
}

RingPlan ring_of(const ConvPoolGeometry& g, const BandPlan& band, int64_t pixel) {
  return {g.pool_extent(0), g.pool_extent(1), segment_conv(g, band) * pixel};
}

// What ChannelPool takes.
void take_pool(const Planner& p, const BandPlan& band, const RingPlan& ring, Memory& memory) {
  const ConvPoolGeometry& g = p.g;
  const int64_t stage = band.rows * band.columns * p.block, pointer = sizeof(void*);
  memory.take(ring.slices * ring.rows * ring.row_size, p.compute_bytes)
      .take(ring.slices * ring.rows, 8)
      .take(ring.row_size, p.compute_bytes)
      .take(stage, p.compute_bytes)
      .take(stage, 1)
      .take(g.pool_kernel[0] * g.pool_kernel[1], pointer)
      .take(g.places(), pointer)
      .take(p.block, p.compute_bytes);
}

// ---- costs --------------------------------------------------------------------------------------------------------

// The cost of the register tiles of one row of `pixels` pixels and `outputs` channels, for each product of the depth.
double channel_tiles(const Planner& p, int64_t pixels, int64_t outputs) {
  const int64_t tiles = divide_up(pixels, p.most_rows), vectors = divide_up(outputs, p.lanes);
  const double rows = static_cast<double>(pixels) / tiles;
  const auto tile = [&](double width) {
    return std::max({width * rows, rows + width + 1, tuned::kInFlight});  // products, loads, or their latency
  };
  return tiles * (vectors / 2 * tile(2) + vectors % 2 * tile(1));
}

// The cost of all that is done to conv pixels beside the products, for all images of one group.
double channel_rest(const Planner& p) {
  const double vectors = divide_up(p.g.out_channels, p.lanes);
  const double write = p.request.output_channels_last ? tuned::kCopy : tuned::kWriteOut;
  return vectors * (p.conv_pixels() * (tuned::kStoreSum + tuned::kPoolPixel) +
                    static_cast<double>(p.g.batch * p.g.pixels()) * write);
}

// The cost of a copy of the input in its own order. It consists of runs of channels, which fill no vector where groups
// are narrow, or of rows of columns.
double copy_cost(const Planner& p) {
  const double channels = static_cast<double>(p.g.in_channels) / p.lanes;
  return tuned::kCopy * p.inputs_met(2) * (p.request.input_channels_last ? std::ceil(channels) : channels);
}
// factor: how much longer a vector takes than one that is only transposed.
double packing_cost(const Planner& p, double depth, double factor = 1) {
  if (p.request.is_packed) return 0;
  return factor * tuned::kPackWeight * depth * divide_up(p.g.out_channels, p.lanes);
}

// The share of the products of all conv pixels that are not with padding.
double share_inside(const ConvPoolGeometry& g) {
  double share = 1;
  for (int d = 0; d < 3; ++d) {
    int64_t inside = 0;
    for (int64_t tap = 0; tap < g.kernel[d]; ++tap) {
      const Inside pixels = g.pixels_under(d, tap, tap + 1);
      inside += std::max<int64_t>(0, std::min(g.conv[d], pixels.last) - pixels.first);
    }
    share *= static_cast<double>(inside) / static_cast<double>(std::max<int64_t>(1, g.conv[d] * g.kernel[d]));
  }
  return share;
}

// ---- direct -------------------------------------------------------------------------------------------------------

void set_copy(DirectPlan& plan, int64_t element) {
  const int64_t (&input)[3] = plan.band.input;
  if (plan.channels_last) {
    plan.step[2] = plan.channels;
    if (plan.elements != Elements::blocks && plan.step[2] * element % tuned::kMeetingBytes == 0) {
      plan.step[2] += 64 / element;
    }
    plan.channel_step = 1;
  } else {
    plan.step[2] = 1;
  }
  plan.step[1] = input[2] * plan.step[2];
  plan.step[0] = input[1] * plan.step[1];
  plan.copy_size = input[0] * plan.step[0];
  if (!plan.channels_last) {
    plan.channel_step = plan.copy_size;
    plan.copy_size *= plan.channels;
  }
}

// numbers: of a multiplication's depth, even
RunPlan runs_of(const ConvPoolGeometry& g, int64_t numbers) {
  constexpr int64_t kMostRun = 256;  // across columns
  const int64_t row = g.kernel[2] * g.in_channels, columns_blocks = g.kernel[2] * divide_up(g.in_channels, numbers);
  RunPlan r{};
  r.joins_columns =
      g.kernel[2] > 1 && g.dilation[2] == 1 && row <= kMostRun && divide_up(row, numbers) < columns_blocks;
  r.run = r.joins_columns ? row : g.in_channels;
  r.blocks = divide_up(r.run, numbers);
  r.numbers = 2 * divide_up(r.run, 2 * r.blocks);
  return r;
}

ConvPlan plan_direct_of(const Planner& p, Elements elements) {
  const ConvPoolGeometry& g = p.g;
  ConvPlan plan{};
  plan.algorithm = ForwardAlgorithm::direct;
  DirectPlan& d = plan.direct;
  d.elements = elements;
  const bool by_runs = elements == Elements::row_pairs || elements == Elements::blocks;
  d.channels = elements == Elements::pairs ? divide_up(g.in_channels, 2) : g.in_channels;
  const int64_t element = by_runs ? 2 : p.compute_bytes;
  d.depth = d.channels * g.taps();
  // A block's weight would leave L1 between two tiles: of a part of it, all pixels of a larger band are summed.
  d.whole_band = !by_runs && d.depth > 2 * p.longest_sum;
  d.channels_last = p.request.input_channels_last || (g.in_channels > 1 && (by_runs || d.whole_band));
  int64_t weight_pairs = d.depth;  // elements of an output's packed weight
  if (by_runs) {
    d.runs = runs_of(g, elements == Elements::blocks ? 32 : 2);
    d.depth = g.taps() / (d.runs.joins_columns ? g.kernel[2] : 1) * d.runs.blocks;
    weight_pairs = d.depth * d.runs.numbers / 2;
    plan.needs_moderate = d.runs.blocks * d.runs.numbers > d.runs.run;
  }
  const int64_t waits = d.whole_band ? 0 : g.pool_extent(0) * g.pool_extent(1);
  d.band = choose_channel_band(p, waits, [&](const BandPlan& band) {
    const int64_t copy = band.input[0] * band.input[1] * band.input[2] * d.channels * element;
    const int64_t sums = band.conv[0] * band.conv[1] * band.conv[2] * p.block * p.compute_bytes;
    return d.whole_band ? copy + sums <= tuned::kDeepBandBytes : copy <= tuned::kBandBytes;
  });
  set_copy(d, element);
  if (by_runs) d.copy_size += d.runs.numbers;  // which the last run may end beyond
  d.ring = ring_of(g, d.band, p.block);
  if (d.whole_band) {
    d.ring.slices = d.band.conv[0];
    d.ring.rows = d.band.conv[1];
  }
  const int64_t blocks = divide_up(g.out_channels, p.block), bands = bands_of(g, d.band);
  d.block_parts = block_parts(p, bands, blocks);
  plan.items = bands * d.block_parts;
  plan.pack_items = g.groups * blocks;
  plan.packed_size = g.groups * round_up(g.out_channels, p.lanes) * weight_pairs;
  Memory memory;
  memory.take(d.copy_size, element).take(d.depth, 8);
  take_pool(p, d.band, d.ring, memory);
  plan.scratch_size = memory.bytes;
  const double rows = p.conv_pixels() / g.conv[2];
  double sums = channel_tiles(p, g.conv[2], g.out_channels) * d.depth;
  double copy = copy_cost(p);
  if (d.whole_band) sums *= share_inside(g);
  if (elements == Elements::blocks) {
    // A multiplication of a tile takes as long as 16 of vectors.
    sums = d.depth * static_cast<double>(divide_up(g.conv[2], 16) * divide_up(g.out_channels, p.lanes)) *
           tuned::kMatrixProduct;
  }
  if (d.channels_last && !p.request.input_channels_last) copy *= tuned::kTranspose / tuned::kCopy;
  plan.cost = g.groups * (times_computed(g, d.band) * rows * sums + channel_rest(p) + copy +
                          packing_cost(p, static_cast<double>(weight_pairs)));
  return plan;
}

ConvPlan plan_direct(const Planner& p) {
  const bool halves = p.request.element_bytes == 2;
  ConvPlan best = plan_direct_of(p, halves && p.machine.multiplies_pairs ? Elements::pairs : Elements::numbers);
  const auto consider = [&](Elements elements) {
    const ConvPlan plan = plan_direct_of(p, elements);
    if (plan.cost < best.cost && !(p.request.exact && plan.needs_moderate)) best = plan;
  };
  if (halves && p.machine.multiplies_pairs && p.g.in_channels % 2 != 0) consider(Elements::row_pairs);
  if (halves && p.machine.multiplies_matrices) consider(Elements::blocks);
  return best;
}

// ---- phases -------------------------------------------------------------------------------------------------------

bool phases_apply(const ConvPoolGeometry& g) {
  const int64_t taps = divide_up(g.kernel[2], g.stride[2]);  // of the first phase
  return g.dilation[2] == 1 && g.kernel[2] > g.stride[2] && g.stride[2] <= 4 && g.conv[2] > 1 &&
         divide_up(taps, kMostTaps) * g.stride[2] <= kMostPieces;
}

ConvPlan plan_phases(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  ConvPlan plan{};
  plan.algorithm = ForwardAlgorithm::phases;
  plan.needs_moderate = true;
  PhasesPlan& f = plan.phases;
  DirectPlan& d = f.direct;
  for (int64_t phase = 0; phase < g.stride[2]; ++phase) {
    const int64_t taps = divide_up(g.kernel[2] - phase, g.stride[2]), parts = divide_up(taps, kMostTaps);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = taps * part / parts, end = taps * (part + 1) / parts;
      KernelPiece& piece = f.piece[f.pieces++];
      piece.first = phase + begin * g.stride[2];
      piece.taps = end - begin;
      for (int64_t i = 0; i <= piece.taps; ++i) piece.pixels[i] = piece.first + i * g.stride[2];
      f.points = std::max(f.points, piece.taps + 1);
    }
  }
  for (int point = 0; point < kMostPoints; ++point) {
    for (int64_t i = 0; i < f.pieces; ++i) {
      if (point <= f.piece[i].taps) f.piece[i].position[point] = f.positions++;
    }
    f.first[point + 1] = f.positions;
  }
  d.channels = g.in_channels;
  d.depth = g.in_channels * g.kernel[0] * g.kernel[1];
  const bool channels_last = d.channels_last = p.request.input_channels_last;
  const auto pairs_of = [](const BandPlan& band) { return divide_up(band.conv[2], 2); };
  const auto pitch_of = [&](const BandPlan& band) {  // of a row of pairs of one channel
    return channels_last ? pairs_of(band) : round_up(pairs_of(band), p.lanes);
  };
  d.band = choose_channel_band(p, g.pool_extent(0) * g.pool_extent(1), [&](const BandPlan& band) {
    return f.positions * g.in_channels * band.input[0] * band.input[1] * pitch_of(band) * 4 <= tuned::kTransformedBytes;
  });
  f.pairs = pairs_of(d.band);
  d.step[2] = channels_last ? g.in_channels : 1;
  if (channels_last && d.step[2] * 4 % tuned::kMeetingBytes == 0) d.step[2] += p.lanes;
  d.step[1] = pitch_of(d.band) * d.step[2];
  d.step[0] = d.band.input[1] * d.step[1];
  const int64_t plane = d.band.input[0] * d.step[0];
  d.channel_step = channels_last ? 1 : plane;
  f.position_step = channels_last ? plane : plane * g.in_channels;
  d.copy_size = f.positions * f.position_step + p.lanes;
  const int64_t places = 2 * g.stride[2];
  // A vector beyond the last pair, and the columns that its kernel reaches.
  f.column_run = round_up(f.pairs, p.lanes) + p.lanes + round_up(divide_up(g.kernel[2] + g.stride[2], places), p.lanes);
  d.ring = ring_of(g, d.band, p.block);
  const int64_t blocks = divide_up(g.out_channels, p.block), bands = bands_of(g, d.band);
  d.block_parts = block_parts(p, bands, blocks);
  plan.items = bands * d.block_parts;
  plan.pack_items = g.groups * blocks;
  plan.packed_size = g.groups * round_up(g.out_channels, p.lanes) * d.depth * f.positions;
  Memory memory;
  memory.take(d.copy_size, 4)
      .take(places * f.column_run, 4)
      .take(g.in_channels, p.request.element_bytes)
      .take(p.block, 4)
      .take(kMostPoints * f.pairs * p.block, 4)
      .take(f.positions * d.depth, 8);
  take_pool(p, d.band, d.ring, memory);
  plan.scratch_size = memory.bytes;
  const double rows = p.conv_pixels() / g.conv[2], vectors = divide_up(g.out_channels, p.lanes);
  const double pairs = divide_up(g.conv[2], 2);
  const double sums = channel_tiles(p, static_cast<int64_t>(pairs), g.out_channels) * d.depth * f.positions +
                      pairs * vectors * f.points * (tuned::kStoreSum + 1);
  const double row_vectors = channels_last ? pairs * divide_up(g.in_channels, p.lanes)
                                           : static_cast<double>(g.in_channels * divide_up(g.conv[2], 2 * p.lanes));
  // Each input row: the columns parted, one by one where the stride is more than 1; then each piece is transformed.
  const double part = channels_last      ? 0
                      : g.stride[2] == 1 ? 2 * tuned::kCopy
                                         : tuned::kTranspose * p.lanes;  // squares of 2 x stride columns
  // Slices and rows under several bands are transformed for each.
  const double input_rows = static_cast<double>(d.band.input[0] * d.band.input[1]) / (d.band.conv[0] * d.band.conv[1]);
  const double transform = input_rows * row_vectors * (part + tuned::kPhasesIn * f.positions);
  plan.cost = g.groups * (times_computed(g, d.band) * rows * (sums + transform) + channel_rest(p) +
                          packing_cost(p, static_cast<double>(g.depth()), tuned::kTransformPack));
  return plan;
}

// ---- winograd -----------------------------------------------------------------------------------------------------

bool winograd_applies(const ConvPoolGeometry& g) {
  bool applies = true;
  for (int d = 1; d < 3; ++d) applies = applies && g.kernel[d] == 3 && g.stride[d] == 1 && g.dilation[d] == 1;
  return applies;
}

ConvPlan plan_winograd(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  const int64_t tile = winograd_tile(p.request.element_bytes), points = tile + 2, positions = points * points;
  ConvPlan plan{};
  plan.algorithm = ForwardAlgorithm::winograd;
  plan.needs_moderate = true;
  WinogradPlan& w = plan.winograd;
  // An odd number of vectors: tiles a power of two apart would fall into few of the cache's sets.
  w.pitch = (divide_up(g.in_channels, p.lanes) | 1) * p.lanes;
  const int64_t width = std::min(p.block, round_up(g.out_channels, p.lanes));
  const auto slice_tiles = [&](const BandPlan& band) {
    return divide_up(band.conv[1], tile) * divide_up(band.conv[2], tile);
  };
  const auto tile_bytes = [&](const BandPlan& band) {
    return slice_tiles(band) * positions * (w.pitch * band.input[0] + width * band.conv[0]) * p.compute_bytes;
  };
  // A row of tiles fills as many slots as it has conv rows, of which no window needs what was there before.
  const int64_t ring_rows = round_up(g.pool_extent(1) + tile - 1, tile);
  const auto fits = [&](const BandPlan& band) {
    return slice_tiles(band) * band.conv[0] <= 2 * tuned::kLeastTiles || tile_bytes(band) <= tuned::kTransformedBytes;
  };
  const int64_t blocks = divide_up(g.out_channels, p.block);
  // Each part of the output channels transforms the band's tiles again, and each band reads its weight again.
  const auto time = [&](const BandPlan& band) {
    const int64_t bands = bands_of(g, band), parts = block_parts(p, bands, blocks);
    const int64_t in_tiles = band.images * slice_tiles(band) * band.input[0];
    const int64_t tiles = band.images * slice_tiles(band) * band.conv[0];
    const int64_t outputs = std::min(g.out_channels, divide_up(blocks, parts) * p.block);
    const double read = tuned::kReadWeight * divide_up(outputs, p.lanes);
    const double transform =
        tuned::kWinogradMove * (in_tiles * divide_up(g.in_channels, p.lanes) + tiles * divide_up(outputs, p.lanes));
    const double products = g.in_channels * g.kernel[0] * (channel_tiles(p, tiles, outputs) + read);
    return divide_up(bands * parts, p.request.threads) * (transform + products);
  };
  // Every band begins with the same row of a tile: the number of bands depends on the number of threads, and sums must
  // not depend on it.
  const int64_t unit = tile / std::gcd(tile, g.pool_stride[1]);
  w.band = choose_channel_band(p, g.pool_extent(0) * ring_rows, fits, time, tile, unit);
  if (w.band.row_bands == 1 && w.band.column_bands == 1) {  // small images: some together, for each use of the weight
    const int64_t most =
        std::max({int64_t{1}, tuned::kTransformedBytes / tile_bytes(w.band), tuned::kLeastTiles / slice_tiles(w.band)});
    BandPlan some = w.band;
    for (int64_t images = 2; images <= std::min(most, g.batch); ++images) {
      some.images = images;
      some.image_bands = divide_up(g.batch, images);
      if (time(some) < time(w.band)) w.band = some;
    }
  }
  w.tile_rows = divide_up(w.band.conv[1], tile);
  w.tile_columns = divide_up(w.band.conv[2], tile);
  w.ring = {g.pool_extent(0), ring_rows, segment_conv(g, w.band) * p.block};
  const int64_t bands = bands_of(g, w.band);
  w.block_parts = block_parts(p, bands, blocks);
  plan.items = bands * w.block_parts;
  plan.pack_items = g.groups * blocks;
  plan.packed_size =
      positions * g.groups * (round_up(g.out_channels, p.lanes) * g.in_channels * g.kernel[0] + blocks * p.lanes);
  const int64_t tiles = w.band.images * w.tile_rows * w.tile_columns;
  Memory memory;
  memory.take(points * (tile * w.tile_columns + 2) * w.pitch, p.compute_bytes)
      .take(positions * (tiles * w.band.input[0] * w.pitch + p.lanes), p.compute_bytes)
      .take(positions * (tiles * w.band.conv[0] * p.block + p.lanes), p.compute_bytes)
      .take(p.block, p.compute_bytes)
      .take(g.in_channels * g.kernel[0], 8);
  take_pool(p, w.band, w.ring, memory);
  plan.scratch_size = memory.bytes;
  const double all = static_cast<double>(g.batch) * g.output[0] * w.band.row_bands * w.tile_rows * w.band.column_bands *
                     w.tile_columns;
  const double sums = channel_tiles(p, tiles, g.out_channels) / tiles * positions;
  const double vectors = divide_up(g.out_channels, p.lanes), in = divide_up(g.in_channels, p.lanes);
  const double conv_slices = w.band.conv[0], in_slices = w.band.input[0];
  plan.cost =
      g.groups * (all * (conv_slices * (sums * g.in_channels * g.kernel[0] +
                                        positions * vectors * (tuned::kStoreSum + tuned::kWinogradMove)) +
                         in_slices * (positions * tuned::kWinogradMove + tile * tile * tuned::kTranspose) * in) +
                  channel_rest(p) + packing_cost(p, static_cast<double>(g.depth()), tuned::kTransformPack));
  return plan;
}

// ---- pixels -------------------------------------------------------------------------------------------------------

int64_t most_outputs(const Planner& p, int64_t vectors) {
  return std::min(p.most_rows, (p.machine.registers - 1 - vectors) / vectors);
}

// Whether windows are pooled in registers: two places at a time, each with sums that are short.
bool pools_in_registers(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  bool whole = g.places() % 2 == 0 && g.depth() <= p.longest_sum;
  for (int d = 0; d < 3; ++d) {
    const int64_t past = (g.output[d] - 1) * g.pool_stride[d] + g.pool_extent(d);
    whole = whole && g.pool_padding[d] == 0 && past <= g.conv[d] && g.pool_stride[d] >= g.pool_kernel[d];
  }
  return whole;
}

// Whether the rows of a plane may be taken for one: each conv pixel lies where its input does.
bool rows_join(const ConvPoolGeometry& g) {
  bool join = true;
  for (int d = 1; d < 3; ++d) join = join && g.stride[d] == 1 && g.pool_stride[d] == 1 && g.pool_kernel[d] == 1;
  return join && g.pool_kernel[0] == 1 && g.pool_padding[0] == 0 && g.pool_padding[1] == 0 && g.pool_padding[2] == 0;
}

// tile_vectors: of a pixel tile; 0 pools in registers.
// parts: that each band's columns are cut into, besides.
ConvPlan plan_pixels_of(const Planner& p, int64_t images, int64_t tile_vectors, int64_t parts) {
  const ConvPoolGeometry& g = p.g;
  ConvPlan plan{};
  plan.algorithm = ForwardAlgorithm::pixels;
  PixelsPlan& x = plan.pixels;
  x.depth = g.depth();
  x.in_registers = tile_vectors == 0;
  x.joins_rows = images == 1 && rows_join(g);
  x.vectors = std::max<int64_t>(1, tile_vectors);
  const int64_t tile_width = p.lanes * x.vectors;
  const auto set_runs = [&](const BandPlan& band) {
    x.residues = std::min(g.stride[2] * g.pool_stride[2], band.input[2]);
    x.conv_pixels = x.pixels_of_run(g, band, band.rows, band.columns);
    x.conv_run = round_up(x.conv_pixels * images, tile_width);
    x.run = divide_up(band.input[2], x.residues) * images;
    x.step[1] = x.residues * x.run;
    x.step[0] = band.input[1] * x.step[1];
    x.channel_step = band.input[0] * x.step[0];
    if (x.channel_step * 4 % tuned::kMeetingBytes == 0) x.channel_step += p.lanes;
    // The last run is read as far as a row of conv pixels is computed.
    x.copy_size = g.in_channels * x.channel_step + x.conv_run + x.residues * images + p.lanes;
    x.pitch = x.joins_rows ? x.conv_run : round_up(band.columns * images, p.lanes);
  };
  x.blocks = divide_up(g.out_channels, x.in_registers ? p.most_rows : most_outputs(p, x.vectors));
  x.block = divide_up(g.out_channels, x.blocks);
  const int64_t used = std::min(g.pool_stride[2], g.pool_extent(2));
  const auto set_ring = [&] {
    x.ring = {g.pool_extent(0), g.pool_extent(1), used * x.block * x.conv_run};
    if (x.in_registers) x.ring = {0, 0, 0};
  };
  const auto fits = [&](const BandPlan& band) {
    set_runs(band);
    set_ring();
    return x.ring.slices * x.ring.rows * x.ring.row_size * 4 <= tuned::kRingBytes &&
           x.copy_size * 4 <= tuned::kBandBytes;
  };
  x.band = choose_band(p, images, fits, [&](const BandPlan& band) { return longest_share(p, band); });
  const auto cut_columns = [&](int64_t columns) {
    x.band.columns = columns;
    x.band.column_bands = divide_up(g.output[2], columns);
    set_extents(g, x.band);
  };
  if (parts > 1) cut_columns(divide_up(g.output[2], std::min(g.output[2], x.band.column_bands * parts)));
  // Bands get so many columns that all but the last fill their tiles, since a tile costs the same however many of its
  // pixels are used.
  if (x.band.column_bands > 1 && !x.in_registers) {
    const BandPlan even = x.band;
    const int64_t beyond = x.pixels_of_run(g, even, 1, 0), step = std::max<int64_t>(1, tile_width / images);
    cut_columns(std::max<int64_t>(1, round_up(even.columns + beyond, step) - beyond));
    if (!fits(x.band)) x.band = even;
  }
  set_runs(x.band);
  set_ring();
  x.band.stage_rows =
      x.joins_rows ? 1 : std::min(x.band.rows, std::max<int64_t>(1, tuned::kStageBytes / (x.block * x.pitch * 4)));
  plan.items = bands_of(g, x.band);
  plan.pack_items = g.groups * x.blocks;
  plan.packed_size = g.groups * g.out_channels * x.depth;
  const int64_t pointer = sizeof(void*);
  Memory memory;
  memory.take(x.copy_size, 4)
      .take((x.in_registers ? g.places() : g.pool_stride[2]) * x.depth, 8)
      .take(x.ring.slices * x.ring.rows * x.ring.row_size, 4)
      .take(x.ring.slices * x.ring.rows, 8)
      .take(x.ring.row_size, 4)
      .take(x.block * x.band.stage_rows * x.pitch, 4)
      .take(x.block * x.band.stage_rows * x.pitch, 1)
      .take(g.pool_kernel[0] * g.pool_kernel[1], pointer)
      .take(g.places(), pointer)
      .take(x.block, 4)
      .take(x.band.input[2], 8)
      .take(images > 1 ? x.band.input[1] * g.input[2] : 0, 8);
  plan.scratch_size = memory.bytes;
  // The last band of the images costs as much as the others, however few images it has. That of columns has fewer
  // tiles.
  const double image_bands = static_cast<double>(x.band.image_bands);
  const double rows = image_bands * g.conv[0] * (x.joins_rows ? x.band.row_bands : g.conv[1]);
  const int64_t last_columns = g.output[2] - (x.band.column_bands - 1) * x.band.columns;
  const int64_t last_pixels = x.pixels_of_run(g, x.band, x.band.rows, last_columns);
  const int64_t all_runs = (x.band.column_bands - 1) * x.conv_run + round_up(last_pixels * images, tile_width);
  const double row_vectors = static_cast<double>(all_runs / p.lanes * used);
  const double together = x.in_registers ? 2 : static_cast<double>(x.vectors), outputs = static_cast<double>(x.block);
  // Loads of vectors mostly cross lines, and then count twice.
  const double tile = std::max({outputs * together, outputs + 2 * together + 1, tuned::kInFlight}) / together;
  // The cost of moving one element into the copy: rows are copied, or squares are transposed, which have images or
  // pixels on one side and channels, columns or residues on the other.
  const bool turned = p.request.input_channels_last;
  const int64_t square_rows = std::min(p.lanes, images > 1 ? images : x.run);
  const int64_t columns = std::min(p.lanes, turned ? g.in_channels : images > 1 ? x.band.input[2] : x.residues);
  const bool transposed = turned || images > 1 || x.residues > 2;
  const double move = transposed ? tuned::kTranspose * p.lanes / static_cast<double>(square_rows * columns)
                                 : tuned::kCopy * static_cast<double>(x.residues) / p.lanes;
  const double moves =
      p.inputs_met(turned ? 3 : 2) * g.in_channels * move * image_bands * images / static_cast<double>(g.batch);
  const double out_rows =
      image_bands * g.output[0] * x.band.column_bands * (x.joins_rows ? x.band.row_bands : g.output[1]);
  const double times = times_computed(g, 0, g.output[0]) * times_computed(g, 1, x.band.row_bands);
  const double per_sum = x.in_registers ? tuned::kPoolSum : tuned::kStoreSum + tuned::kPoolPixel;
  const double sums = x.in_registers ? out_rows * (x.pitch / p.lanes) * g.places() : times * rows * row_vectors;
  plan.cost =
      g.groups * (sums * (x.blocks * tile * x.depth + g.out_channels * per_sum) +
                  out_rows * (x.pitch / p.lanes) * g.out_channels * (images == 1 ? tuned::kCopy : tuned::kWriteOut) +
                  moves + packing_cost(p, static_cast<double>(x.depth)));
  return plan;
}

ConvPlan plan_pixels(const Planner& p) {
  ConvPlan best{};
  int64_t best_images = 1, best_vectors = 1;
  best.cost = INFINITY;
  for (const int64_t images : {int64_t{1}, p.lanes / 2, p.lanes, 2 * p.lanes}) {
    if (images >= 2 * p.g.batch) continue;
    for (const int64_t vectors : {0, 1, 2, 4, 8}) {
      if (vectors == 0 ? !pools_in_registers(p) : most_outputs(p, vectors) < 1) continue;  // too few registers
      const ConvPlan plan = plan_pixels_of(p, images, vectors, 1);
      if (plan.cost >= best.cost) continue;
      best = plan;
      best_images = images;
      best_vectors = vectors;
    }
  }
  // Signals have a single row: where there are fewer bands than threads, columns are shared out. (What is chosen must
  // not depend on the threads, so the cost stays.)
  const int64_t parts = divide_up(p.request.threads, best.items);
  if (parts > 1 && !best.pixels.joins_rows) {
    const double cost = best.cost;
    best = plan_pixels_of(p, best_images, best_vectors, parts);
    best.cost = cost;
  }
  return best;
}

// ---- depthwise ----------------------------------------------------------------------------------------------------

bool depthwise_applies(const ConvPoolGeometry& g) {
  return g.in_channels == 1 && g.out_channels == 1 && g.groups > 1;
}

ConvPlan plan_depthwise(const Planner& p) {
  ConvPoolGeometry g = p.g;
  g.out_channels = g.groups;  // as the kernel has it
  g.groups = 1;
  const Planner joined{g, p.request, p.machine};
  ConvPlan plan{};
  plan.algorithm = ForwardAlgorithm::depthwise;
  DepthwisePlan& d = plan.depthwise;
  const int64_t blocks = divide_up(g.out_channels, p.block);
  const bool streams = p.request.input_channels_last;
  d.together = streams ? std::min(blocks, tuned::kStreamBytes / (p.block * p.compute_bytes)) : 1;
  d.band = choose_channel_band(joined, g.pool_extent(0) * g.pool_extent(1), [&](const BandPlan& band) {
    const int64_t pixels = band.input[0] * band.input[1] * band.input[2];
    return pixels * d.together * p.block * p.compute_bytes <= (streams ? tuned::kTransformedBytes : tuned::kBandBytes);
  });
  d.copy_size = d.band.input[0] * d.band.input[1] * d.band.input[2] * p.block;
  d.ring = ring_of(g, d.band, p.block);
  const int64_t bands = bands_of(g, d.band);
  d.block_parts = block_parts(p, bands, blocks);
  plan.items = bands * d.block_parts;
  plan.pack_items = blocks;
  plan.packed_size = round_up(g.out_channels, p.lanes) * g.taps();
  Memory memory;
  memory.take(d.together * d.copy_size, p.compute_bytes).take(g.taps(), 8);
  take_pool(joined, d.band, d.ring, memory);
  plan.scratch_size = memory.bytes;
  const double vectors = divide_up(g.out_channels, p.lanes);
  const double move = streams ? tuned::kCopy : tuned::kTranspose;
  plan.cost = vectors * (times_computed(g, d.band) * p.conv_pixels() * g.taps() * tuned::kDepthwiseProduct +
                         p.inputs_met(2) * move) +
              channel_rest(joined);
  return plan;
}

// ---- the choice ---------------------------------------------------------------------------------------------------

bool transforms(ForwardAlgorithm algorithm) {
  return algorithm == ForwardAlgorithm::winograd || algorithm == ForwardAlgorithm::phases;
}

ConvPlan plan_of(ForwardAlgorithm algorithm, const Planner& p) {
  switch (algorithm) {
    case ForwardAlgorithm::winograd:
      return plan_winograd(p);
    case ForwardAlgorithm::phases:
      return plan_phases(p);
    case ForwardAlgorithm::pixels:
      return plan_pixels(p);
    case ForwardAlgorithm::depthwise:
      return plan_depthwise(p);
    case ForwardAlgorithm::direct:
      return plan_direct(p);
    case ForwardAlgorithm::stock:
      break;
  }
  ConvPlan plan{};
  plan.algorithm = ForwardAlgorithm::stock;
  return plan;
}

}  // namespace

bool algorithm_applies(ForwardAlgorithm algorithm, const ConvPoolGeometry& g, const PlanRequest& request) {
  if (request.exact && transforms(algorithm)) return false;
  const bool is_double = request.element_bytes == 8;
  switch (algorithm) {
    case ForwardAlgorithm::winograd:
      return !is_double && winograd_applies(g);
    case ForwardAlgorithm::phases:
      return !is_double && phases_apply(g);
    case ForwardAlgorithm::pixels:
      return !is_double;
    case ForwardAlgorithm::depthwise:
      return depthwise_applies(g);
    case ForwardAlgorithm::direct:
    case ForwardAlgorithm::stock:
      return true;
  }
  return false;
}

namespace {

// Where none of ours has fewer multiplications, fewer bytes or fuller lanes, torch's convolution is at or near the peak
// of whatever machine this is: kernels of one position over many channels of signals and images, which do nothing but
// multiply matrices; deep kernels whose weight, read again for each slice, comes from far away, and those of pairs,
// which multiply twice as fast as it comes; windows that overlap so far that bands compute many conv pixels again, over
// channels enough for its vectors; and groups of so few channels, among others at the same pixel, that neither channels
// nor pixels fill a vector.
bool stock_wins(const Planner& p, const ConvPlan& best) {
  const ConvPoolGeometry& g = p.g;
  if (p.request.element_bytes == 8 || best.cost < tuned::kSmallCall || !g.ends_as_in_torch()) return false;
  if (g.groups > 1 && p.request.input_channels_last && g.in_channels * g.out_channels < p.lanes) {
    return best.algorithm != ForwardAlgorithm::depthwise;
  }
  const bool is_direct = best.algorithm == ForwardAlgorithm::direct;
  const bool is_pixels = best.algorithm == ForwardAlgorithm::pixels;
  const double times = is_direct || is_pixels ? times_computed(g, is_direct ? best.direct.band : best.pixels.band) : 0;
  if (times > tuned::kMostTimesComputed && g.in_channels >= 2 * p.lanes) return true;
  const bool has_pairs = is_direct && best.direct.elements == Elements::pairs;
  if ((g.kernel[0] > 1 || has_pairs) && best.packed_size * p.compute_bytes > tuned::kFarWeightBytes) return true;
  if (g.taps() > 1 || g.in_channels < 4 * p.lanes) return false;
  // Of so few outputs, the copy costs more than the products.
  if (is_pixels) return best.pixels.joins_rows && g.out_channels < tuned::kCopy;
  return is_direct && (g.input[0] == 1 || g.stride[2] > 1 || !p.request.input_channels_last);
}

// By a single thread: the choice must not depend on the number of threads, nor with it the order of sums.
ConvPlan choose(const Planner& one) {
  const ConvPoolGeometry& g = one.g;
  ConvPlan best{};
  best.cost = INFINITY;
  for (int i = 0; i < kForwardAlgorithms; ++i) {
    const ForwardAlgorithm algorithm = static_cast<ForwardAlgorithm>(i);
    if (algorithm == ForwardAlgorithm::stock || !algorithm_applies(algorithm, g, one.request)) continue;
    const ConvPlan plan = plan_of(algorithm, one);
    if (plan.cost >= best.cost) continue;
    // Winograd's is four times the weight in bfloat16, of elements twice as large.
    if (transforms(algorithm) && plan.packed_size * one.compute_bytes > tuned::kMostPackedBytes) continue;
    if (algorithm == ForwardAlgorithm::phases) {
      // Each row reads all of a block's weight, which has to be near; and enough products have to be saved.
      const int64_t block_weight = plan.packed_size / plan.pack_items * one.compute_bytes;
      const double products = static_cast<double>(plan.phases.positions) / static_cast<double>(2 * g.kernel[2]);
      if (block_weight > tuned::kBlockWeightBytes || products > tuned::kMostProducts) continue;
    }
    best = plan;
  }
  if (!stock_wins(one, best)) return best;
  ConvPlan stock = plan_of(ForwardAlgorithm::stock, one);
  stock.cost = best.cost;  // at most
  return stock;
}

}  // namespace

ConvPlan plan_forward(const ConvPoolGeometry& g, const PlanRequest& request, const Machine& machine) {
  PlanRequest alone = request;
  alone.threads = 1;
  const Planner one{g, alone, machine};
  ConvPlan plan = request.algorithm >= 0 ? plan_of(static_cast<ForwardAlgorithm>(request.algorithm), one) : choose(one);
  const double worth = plan.cost / tuned::kCostPerThread;
  const int64_t threads =
      worth >= request.threads ? request.threads : std::max<int64_t>(1, static_cast<int64_t>(worth));
  if (threads > 1 && plan.algorithm != ForwardAlgorithm::stock) {
    alone.threads = threads;
    plan = plan_of(plan.algorithm, Planner{g, alone, machine});
  }
  plan.threads = threads;
  return plan;
}

}  // namespace fastnn
