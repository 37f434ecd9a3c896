// Which algorithm computes a backward call, and how it cuts the call up. Compiled once: the instruction set is data.
#include "plan.h"

#include <algorithm>
#include <cmath>

#include "../machine.h"

namespace fastnn {
namespace {

using planner::divide_up;
using planner::round_up;

double real(int64_t count) {
  return static_cast<double>(count);
}

struct Planner {
  const ConvPoolGeometry& g;
  const BackwardRequest& request;
  const Machine& machine;
  int64_t compute_bytes = std::max<int64_t>(4, request.element_bytes);
  int64_t lanes = machine.vector_bytes / compute_bytes;
  int64_t longest_sum = machine.longest_sum;
  int64_t conv = g.conv[0] * g.conv[1] * g.conv[2];
};

// ---- bands of the gradient, windows of the image --------------------------------------------------------------------

// Plans a band of the gradient of `channels` channels, with at most `most` pixels if that can be.
GradientBandPlan plan_band(const Planner& p, int64_t channels, int64_t most) {
  const ConvPoolGeometry& g = p.g;
  GradientBandPlan band{};
  band.width = round_up(channels, p.lanes);
  int64_t room = std::max(p.lanes, std::min(most, tuned::kGradientBandBytes / (band.width * p.compute_bytes)));
  for (int d = 2; d >= 0; --d) {
    band.size[d] = std::max<int64_t>(1, std::min(g.conv[d], room));
    // No window should lie across two bands without need.
    if (band.size[d] < g.conv[d] && band.size[d] > g.pool_stride[d]) band.size[d] -= band.size[d] % g.pool_stride[d];
    room = band.size[d] < g.conv[d] ? 1 : room / band.size[d];
  }
  band.pixels = round_up(band.size[0] * band.size[1] * band.size[2], p.lanes);
  return band;
}

// Plans windows of the image of `lanes` channels, so that `count` of them fit into the cache, with `slack` elements
// behind each. At each place the windows serve whole bands.
ImagePlan plan_image(const Planner& p, int64_t lanes, const GradientBandPlan& band, int64_t count, int64_t slack) {
  const ConvPoolGeometry& g = p.g;
  ImagePlan image{};
  image.lanes = lanes;
  image.axis = 2;
  for (int d = 2; d >= 0; --d) {
    image.extent[d] = std::max((g.conv[d] - 1) * g.stride[d] + g.kernel_extent(d), g.padding[d] + g.input[d]);
    if (image.extent[d] > 1) image.axis = d;
  }
  image.d[2] = lanes;
  image.d[1] = image.d[2] * image.extent[2];
  image.d[0] = image.d[1] * image.extent[1];
  const int axis = image.axis;
  image.step = g.conv[axis];
  image.slices = image.extent[axis];
  const int64_t slice_bytes = std::max<int64_t>(1, count * image.d[axis] * p.compute_bytes);
  if (slice_bytes * image.slices > tuned::kWindowBytes) {
    const int64_t overlap = std::max<int64_t>(0, g.kernel_extent(axis) - g.stride[axis]);
    const int64_t fit = (tuned::kWindowBytes / slice_bytes - overlap) / g.stride[axis] / band.size[axis];
    image.step = std::min(image.step, std::max<int64_t>(1, fit) * band.size[axis]);
    image.slices = image.step * g.stride[axis] + overlap;
  }
  image.size = round_up(image.slices * image.d[axis] + slack, 16);
  return image;
}

// The pixels that two neighbouring parts of an image both work on should be few.
int64_t most_parts(const Planner& p, const ImagePlan& image) {
  const int64_t shared = (p.g.kernel_extent(image.axis) - 1) / p.g.stride[image.axis];
  return std::max<int64_t>(1, p.g.conv[image.axis] / (tuned::kPartPixels * (shared + 1)));
}

int64_t channels_together(int64_t channels) {
  return divide_up(channels, divide_up(channels, tuned::kBandChannels));
}

// ---- winners --------------------------------------------------------------------------------------------------------

WinnersPlan plan_runs(const Planner& p, bool zips) {
  const ConvPoolGeometry& g = p.g;
  WinnersPlan s{};
  s.zips = zips;
  s.columns = g.dilation[2] == 1 ? g.kernel[2] : 1;
  s.runs = g.taps() / s.columns;
  const int64_t least = (zips ? 2 : 1) * p.lanes;
  const int64_t together = s.columns < g.kernel[2] ? s.columns : g.taps();
  const int64_t enough = divide_up(tuned::kEnoughVectors, std::min(tuned::kEnoughVectors, together));
  const int64_t parts = divide_up(g.in_channels, std::max(least, p.lanes * enough));
  s.lanes = parts == 1 && !zips ? g.in_channels : round_up(divide_up(g.in_channels, parts), least);
  s.blocks = divide_up(g.in_channels, s.lanes);
  s.length = s.lanes * s.columns;
  s.vectors = divide_up(s.length, p.lanes);
  s.row = s.runs * s.vectors * p.lanes;
  return s;
}

double winners_cost(const Planner& p, bool zips) {
  const ConvPoolGeometry& g = p.g;
  const WinnersPlan s = plan_runs(p, zips);
  // Windows that overlap share winners, which are listed once. Half of the pixels are not positive.
  double winners = 1 - std::exp2(-real(g.places()));
  for (int d = 0; d < 3; ++d) winners *= real(std::min(g.output[d], divide_up(2 * g.conv[d], g.pool_kernel[d] + 1)));
  const double input = real(g.input[0] * g.input[1] * g.input[2]);
  const double image = tuned::kImageVector * input * real(s.blocks * divide_up(s.lanes, p.lanes));
  const double band = tuned::kListed * real(p.conv * divide_up(g.out_channels, p.lanes));
  const double product = zips ? tuned::kZippedProduct : tuned::kListProduct;
  const double vectors = real(s.blocks * s.runs * s.vectors);
  const double each = tuned::kPixelVector * real(p.conv) + product * winners * real(g.out_channels);
  return real(g.groups) * (band + image + vectors * each);
}

// Gradients of windows that overlap are sums, which zipping would have to round.
bool zipping_pays(const Planner& p) {
  if (p.request.element_bytes != 2 || !p.machine.multiplies_pairs || p.g.has_overlapping_windows()) return false;
  return winners_cost(p, true) < winners_cost(p, false);
}

ConvBackwardPlan plan_winners(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  ConvBackwardPlan plan{};
  plan.algorithm = BackwardAlgorithm::winners;
  WinnersPlan& s = plan.winners;
  s = plan_runs(p, zipping_pays(p));
  const int64_t element = s.zips ? p.request.element_bytes : p.compute_bytes;
  // As many output channels as have their weights stay in L1.
  const int64_t near = std::max<int64_t>(1, tuned::kNearBytes / (s.row * element) / p.lanes) * p.lanes;
  const int64_t width = divide_up(g.out_channels, divide_up(g.out_channels, std::min(tuned::kBandChannels, near)));
  // A band has as many conv pixels as keep their input and its gradient in L2. It has all of them where the weight, its
  // gradient and what rounding took from that do not fit, since each band goes through all of those.
  const int64_t weight = 3 * s.blocks * g.out_channels * s.row, room = tuned::kWindowBytes / p.compute_bytes;
  const int64_t under_pixel = s.lanes * g.stride[0] * g.stride[1] * g.stride[2];
  plan.band = plan_band(p, width, weight > room / 2 ? p.conv : room / (2 * s.blocks * under_pixel));
  plan.image = plan_image(p, s.lanes, plan.band, 2 * s.blocks, s.vectors * p.lanes);
  const int64_t slice = tuned::kNearBytes / 2 / (under_pixel * element) / p.lanes * p.lanes;
  s.slice_pixels = std::min({plan.band.pixels, tuned::kSlicePixels, std::max(tuned::kSlicePixels / 2, slice)});
  plan.packed_size = g.groups * s.blocks * g.out_channels * s.row;
  plan.weight_size = plan.packed_size;
  plan.blocks = g.groups * s.blocks;
  plan.most_parts = most_parts(p, plan.image);
  plan.keeps_lost = g.batch * divide_up(p.conv, s.slice_pixels) > tuned::kFewAdditions;
  plan.in_parts = g.taps() * divide_up(g.out_channels, plan.band.width) > p.longest_sum;
  return plan;
}

// ---- depthwise ------------------------------------------------------------------------------------------------------

// Compares, for a conv pixel, the vectors of products and of what goes with them: those of a vector of groups at once,
// with those of a list for each group.
bool depthwise_pays(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  if (g.groups == 1) return false;
  const WinnersPlan s = plan_runs(p, false);
  const double together = real(g.taps() * g.out_channels * divide_up(g.groups, p.lanes));
  const double winners = std::min(1.0, real(g.pixels()) / real(p.conv));
  return together < real(g.groups) * (2 + winners * real(g.out_channels * s.runs * s.vectors));
}

// Whether our kernels pay where each pixel has a gradient. Torch's own convolution is as fast for small kernels in
// channels last, and slower elsewhere (measured).
bool dense_depthwise_pays(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  const bool is_stock_fast = p.request.input_channels_last && g.taps() <= tuned::kStockTaps;
  return g.groups > 1 && g.in_channels == 1 && !is_stock_fast;
}

ConvBackwardPlan plan_depthwise(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  ConvBackwardPlan plan{};
  plan.algorithm = BackwardAlgorithm::depthwise;
  plan.depthwise = {g.out_channels, g.taps() * p.lanes};
  plan.blocks = divide_up(g.groups, p.lanes);
  plan.packed_size = plan.blocks * g.out_channels * plan.depthwise.taps;
  plan.weight_size = plan.packed_size;
  plan.band = plan_band(p, p.lanes, p.conv);
  plan.image = plan_image(p, p.lanes, plan.band, 2, 0);
  plan.most_parts = 1;
  plan.keeps_lost = true;
  plan.in_parts = g.taps() * g.out_channels > p.longest_sum;
  return plan;
}

// ---- taps -----------------------------------------------------------------------------------------------------------

bool taps_apply(const ConvPoolGeometry& g) {
  if (g.in_channels > tuned::kTapsInputs || g.depth() > tuned::kTapsDepth) return false;
  return g.stride[0] == 1 && g.stride[1] == 1 && g.stride[2] == 1;
}

ConvBackwardPlan plan_taps(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  ConvBackwardPlan plan{};
  plan.algorithm = BackwardAlgorithm::taps;
  TapsPlan& s = plan.taps;
  s.channels = channels_together(g.out_channels);
  // So many pixels that sums over them are long, so few that some channels stay in L1.
  plan.band = plan_band(p, s.channels, p.lanes * tuned::kBandChannels);
  plan.image = plan_image(p, 1, plan.band, 2 * g.in_channels, p.lanes);
  const int64_t (&size)[3] = plan.band.size;
  s.step = p.lanes + round_up((size[0] - 1) * plan.image.d[0] + (size[1] - 1) * plan.image.d[1] + size[2], p.lanes);
  const int64_t tile = 2 * p.lanes;  // columns of gemm.h's
  s.pass = std::max<int64_t>(1, tuned::kProductBytes / p.compute_bytes / g.depth() / tile) * tile;
  s.depth = g.depth();
  s.rows = g.out_channels == 3 ? 4 : std::min<int64_t>(g.out_channels, 4);
  s.rows = std::min(s.rows, p.lanes);
  s.row_tiles = divide_up(s.channels, s.rows);
  s.tap_tiles = divide_up(s.depth, most_dot_taps(p.machine.registers));
  s.tile_size = round_up(s.rows * divide_up(s.depth, s.tap_tiles), p.lanes);
  plan.packed_size = g.groups * g.out_channels * s.depth;
  plan.weight_size = g.groups * divide_up(g.out_channels, s.channels) * s.size();
  plan.blocks = g.groups;
  plan.most_parts = most_parts(p, plan.image);
  const int64_t bands = divide_up(g.conv[0], size[0]) * divide_up(g.conv[1], size[1]) * divide_up(g.conv[2], size[2]);
  plan.keeps_lost = g.batch * bands > tuned::kFewAdditions;
  plan.in_parts = g.taps() * divide_up(g.out_channels, s.channels) > p.longest_sum;
  return plan;
}

// Compares the products of all pixels, a row's padding too, with the products of the argmaxes and the cost of listing
// these.
bool taps_pay(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  const ConvBackwardPlan plan = plan_taps(p);
  const int64_t columns = g.conv[2] > 1 ? plan.image.extent[2] : 1;
  const double pixels = real(g.conv[0] * (g.conv[0] > 1 ? plan.image.extent[1] : g.conv[1]) * columns);
  const double products = pixels * real(g.depth()) / real(p.lanes), bands = divide_up(p.conv, plan.band.pixels);
  const bool strided = p.request.input_channels_last && g.in_channels > 1;
  const double put = tuned::kPutWinner * (strided ? 2 : 1);
  const double image = real(g.in_channels * g.input[0] * g.input[1] * g.input[2]) *
                       (strided ? tuned::kSingle : tuned::kImageVector / real(p.lanes));
  const double windows = real(g.pixels()), rows = windows / real(g.output[2]);
  const double each =
      products + bands * tuned::kSumLanes * real(g.depth()) / real(p.lanes) + put * windows + tuned::kPutRow * rows;
  const double cost = real(g.groups) * (image + tuned::kAddProduct * products + real(g.out_channels) * each);
  return cost < winners_cost(p, false);
}

// Whether they pay where each pixel has a gradient. Torch's library works with blocks of channels. It is slow for the
// gradient of images of fewer channels. For the weight's alone it has kernels of its own, except where output channels
// fill no vector, or where a row of the kernel is longer than one. Signals, and groups of few channels, it moves into
// blocks and back: there the weight's gradient pays as long as its sums stay in L1.
bool dense_taps_pay(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  if (p.request.input_channels_last || p.request.exact) return false;
  if (g.groups == 1 && g.in_channels < tuned::kFewChannels && taps_apply(g)) {
    return p.request.both || g.out_channels < p.lanes || std::max(g.kernel[1], g.kernel[2]) > p.lanes;
  }
  if (p.request.both || g.taps() == 1 || g.stride[0] * g.stride[1] * g.stride[2] > 1) return false;
  return (g.is_signal() || g.has_narrow_groups(p.lanes)) &&
         channels_together(g.out_channels) * g.depth() * p.compute_bytes <= tuned::kNearBytes;
}

// ---- winograd -------------------------------------------------------------------------------------------------------

bool winograd_applies(const ConvPoolGeometry& g, const BackwardRequest& request) {
  bool applies = g.pools_nothing() && request.element_bytes != 2 && !request.exact;
  for (int d = 0; d < 3; ++d) {
    applies = applies && g.kernel[d] == (d == 0 ? 1 : 3) && g.stride[d] == 1 && g.dilation[d] == 1;
  }
  return applies && g.input[0] == 1 && g.padding[0] == 0;
}

ConvBackwardPlan plan_winograd(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  ConvBackwardPlan plan{};
  plan.algorithm = BackwardAlgorithm::winograd;
  WinogradBackwardPlan& w = plan.winograd;
  w.rows = divide_up(g.conv[1], 2);
  w.columns = divide_up(g.conv[2], 2);
  w.tiles = g.batch * w.rows * w.columns;
  w.lanes = p.lanes;
  w.outputs = round_up(g.out_channels, p.lanes);
  // An odd number of vectors: tiles a power of two apart would fall into few of the cache's sets.
  w.pitch = (divide_up(g.in_channels, p.lanes) | 1) * p.lanes;
  // Half of the longest sum, so that less of what is transformed leaves the cache; but no second part without need.
  w.part = w.tiles <= p.longest_sum ? w.tiles : p.longest_sum / 2;
  if (w.columns <= w.part) w.part -= w.part % w.columns;
  w.together = std::min(w.part, w.columns);
  // Shares for threads, of so many parts that adding up their sums at the end costs little.
  const int64_t sums = g.groups * kWinogradPositions * w.sums_step(g.in_channels) * p.compute_bytes;
  w.shares = std::min(w.tiles / (tuned::kShareParts * w.part), tuned::kSharedSums / sums);
  w.shares = std::max<int64_t>(1, w.shares);
  w.blocks = divide_up(g.out_channels, 2 * p.lanes);
  w.items = g.groups * w.shares * w.blocks;
  w.pieces = g.groups * w.blocks * divide_up(g.in_channels, kWinogradChannels);
  return plan;
}

bool stock_pays(const Planner& p);

// Compares vector multiply-adds of both gradients: where there are argmaxes, with theirs, which half of the pixels
// have; else with those of direct convolution at its peak, where torch's is at or near it.
bool winograd_pays(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  const WinogradBackwardPlan w = plan_winograd(p).winograd;
  PlanRequest request{};
  request.threads = 1;
  request.element_bytes = p.request.element_bytes;
  request.input_channels_last = request.output_channels_last = p.request.input_channels_last;
  request.is_packed = true;  // the weight is counted below
  request.algorithm = static_cast<int32_t>(ForwardAlgorithm::winograd);
  const ConvPlan input = plan_forward(turned_around(g), request, p.machine);
  if (input.packed_size * p.compute_bytes > tuned::kMostPackedBytes) return false;
  const double in = real(divide_up(g.in_channels, p.lanes)), out = real(divide_up(g.out_channels, p.lanes));
  const double products = real(kWinogradPositions * g.in_channels) * out;
  const double parts = real(divide_up(w.tiles, w.part));
  const double move = kWinogradPositions * tuned::kWinogradGradientMove + 4 * tuned::kTranspose;
  const double weight = real(w.tiles) * (products + move * (in + out)) + products * parts * tuned::kStoreSum;
  // The weight is packed for the input's gradient, and its own gradient is brought back from what was summed.
  const double packed = real(g.depth()) * out * tuned::kTransformPack * tuned::kPackWeight;
  // In both: what is transformed leaves L1 and is read again, and the gradient of four pixels is masked.
  const double masked = p.request.dense ? 0 : 4 * out;
  const double both = 2 * real(w.tiles) * tuned::kCopy * (kWinogradPositions * (in + out) + masked);
  const double direct = real(p.conv * g.taps()) * (real(g.in_channels) * out + real(g.out_channels) * in);
  const double own = real(g.groups) * (weight + packed + both) + input.cost;
  if (!p.request.dense) {
    return own < real(g.batch) * (stock_pays(p) ? real(g.groups) * direct : winners_cost(p, false));
  }
  // Torch, too, brings the weight into the order of its products, writes sums, and brings these back.
  const double moved = real(g.taps() * g.in_channels) * out * (tuned::kPackWeight + tuned::kStoreSum);
  return own < real(g.groups) * (real(g.batch) * direct + moved);
}

// ---- stock ----------------------------------------------------------------------------------------------------------

// Strides are excluded, since torch's library then writes out of bounds.
bool stock_applies(const ConvPoolGeometry& g, const BackwardRequest& request) {
  return request.both && g.stride[0] == 1 && g.stride[1] == 1 && g.stride[2] == 1;
}

bool stock_pays(const Planner& p) {
  const ConvPoolGeometry& g = p.g;
  if (!stock_applies(g, p.request) || p.request.dims == 1 || g.in_channels == 1 || p.request.element_bytes == 8) {
    return false;
  }
  // A weight that leaves the cache with each image, for the sake of few winners.
  const int64_t weight = g.groups * g.out_channels * g.depth();
  const bool few = g.batch >= tuned::kFewImages && std::min(g.pixels(), p.conv) <= tuned::kFewWinners;
  if (weight > tuned::kLargeWeight && few) return true;
  // Without pooling half of the pixels have a gradient, and a kernel of one element has too few products to pay for the
  // lists of these pixels: where the pixels' runs are short, where there are half as many registers for the sums, or
  // where the images lie as torch's library wants them.
  const bool lists_cost_more = g.in_channels <= tuned::kShortRuns * p.lanes || p.machine.vector_bytes < 64;
  if (g.pools_nothing() && g.taps() == 1 && g.groups == 1 && (p.request.input_channels_last || lists_cost_more))
    return true;
  if (p.request.element_bytes != 2) return false;
  // Many products of bfloat16 for each number that has to be brought there: a matrix unit makes those of all pixels
  // sooner than we those of the winners.
  const double products = 2 * real(g.batch * g.pixels() * weight);
  const double inputs = real(g.groups * g.in_channels * g.input[0] * g.input[1] * g.input[2]);
  const double numbers = real(g.batch) * (inputs + real(g.groups * g.out_channels * p.conv));
  return p.machine.multiplies_matrices && products > tuned::kManyProducts &&
         products > tuned::kProductsANumber * numbers;
}

ConvBackwardPlan plan_stock(const Planner& p) {
  ConvBackwardPlan plan{};
  plan.algorithm = BackwardAlgorithm::stock;
  plan.band = plan_band(p, channels_together(p.g.groups * p.g.out_channels), p.conv);
  return plan;
}

}  // namespace

ConvPoolGeometry turned_around(const ConvPoolGeometry& g) {
  ConvPoolGeometry turned = g;
  turned.in_channels = g.out_channels;
  turned.out_channels = g.in_channels;
  for (int d = 0; d < 3; ++d) {
    turned.input[d] = g.conv[d];
    turned.conv[d] = turned.output[d] = g.input[d];
    turned.padding[d] = g.kernel_extent(d) - 1 - g.padding[d];
    turned.padding_end[d] = g.kernel_extent(d) - 1 - g.padding_end[d];
    turned.pool_kernel[d] = turned.pool_stride[d] = turned.pool_dilation[d] = 1;
    turned.pool_padding[d] = 0;
  }
  return turned;
}

bool algorithm_applies(BackwardAlgorithm algorithm, const ConvPoolGeometry& g, const BackwardRequest& request) {
  switch (algorithm) {
    case BackwardAlgorithm::taps:
      return taps_apply(g) && !request.exact;
    case BackwardAlgorithm::depthwise:
      return g.in_channels == 1;
    case BackwardAlgorithm::stock:
      return stock_applies(g, request);
    case BackwardAlgorithm::winograd:
      return winograd_applies(g, request);
    default:
      return true;
  }
}

ConvBackwardPlan plan_backward(const ConvPoolGeometry& g, const BackwardRequest& request, const Machine& machine) {
  const Planner p{g, request, machine};
  const auto takes = [&](BackwardAlgorithm algorithm, bool pays) {
    return request.algorithm < 0 ? pays : request.algorithm == static_cast<int32_t>(algorithm);
  };
  if (takes(BackwardAlgorithm::winograd, winograd_applies(g, request) && winograd_pays(p))) return plan_winograd(p);
  if (takes(BackwardAlgorithm::depthwise, request.dense && dense_depthwise_pays(p))) return plan_depthwise(p);
  if (request.dense && request.algorithm < 0 && dense_taps_pay(p)) return plan_taps(p);
  if (takes(BackwardAlgorithm::stock, request.dense || stock_pays(p))) return plan_stock(p);
  if (takes(BackwardAlgorithm::depthwise, g.in_channels == 1 && depthwise_pays(p))) return plan_depthwise(p);
  if (takes(BackwardAlgorithm::taps, taps_apply(g) && !request.exact && taps_pay(p))) return plan_taps(p);
  return plan_winners(p);
}

}  // namespace fastnn
