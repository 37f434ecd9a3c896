// What conv_dots.h works on: the runs that input and weight have in common, scratch memory, the plan and its cost.
#pragma once

#include "conv_direct_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kDotOutputs = 4, kDotSums = 16;   // of a register tile: most outputs; products of outputs and pixels
constexpr int64_t kDotBufferBytes = 256 << 10;  // conv pixels of the images worked on together, or copies for them
constexpr int64_t kDotImageBytes = 512 << 10;   // of an image that is copied: part of L2
constexpr int64_t kDotCopyBytes = 16 << 20;     // of what is copied from under an image's conv pixels

// The depth of the product as runs of consecutive elements, of the input as of the weight: `length` of them, the
// others' dimensions outside, the innermost last.
struct DotRuns {
  int64_t length, count;
  int64_t size[4], input[4], weight[4];  // of the dimensions outside: steps in input and weight
  int outside;
};

FASTNN_INLINE DotRuns dot_runs(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& weight) {
  const bool channels_last = weight.c == 1 && g.in_channels > 1;
  const int order[2][4] = {{0, 1, 2, 3}, {1, 2, 3, 0}};  // channels are dimension 0
  DotRuns runs = {1, 1, {}, {}, {}, 0};
  for (int i = 3; i >= 0; --i) {
    const int d = order[channels_last][i];
    const int64_t size = d == 0 ? g.in_channels : g.kernel[d - 1];
    const int64_t in = d == 0 ? input.c : input.d[d - 1] * g.dilation[d - 1];
    const int64_t of = d == 0 ? weight.c : weight.d[d - 1];
    if (size == 1) continue;
    if (runs.outside == 0 && in == runs.length && of == runs.length) {
      runs.length *= size;
      continue;
    }
    runs.count *= size;
    runs.size[runs.outside] = size;
    runs.input[runs.outside] = in;
    runs.weight[runs.outside++] = of;
  }
  return runs;
}

// A vector of the input and of the weight, from the first element of each under a conv pixel.
struct DotStep {
  int64_t input, weight;
};
// All of them: `whole` of whole vectors, the others of `rest` numbers.
struct DotSteps {
  const DotStep* steps;
  int64_t whole, count;
  int rest;
};

// A conv pixel: the first element of the input under it, and which it is.
struct DotPixel {
  int64_t input, conv;
};
// Pixels from the `first` of all images on, so many of each image, that the same taps meet.
struct DotBox {
  int64_t first, pixels;
  Range taps[3];
};

// Conv pixels [pixel, returned) along a dimension are met by the same taps.
FASTNN_INLINE int64_t past_same_taps(const ConvPoolGeometry& g, int d, int64_t pixel) {
  const Range inside = {pixels_inside(g, d, 0).first, pixels_inside(g, d, g.kernel[d] - 1).last};
  return pixel >= inside.first && pixel < inside.last ? inside.last : pixel + 1;
}
template <class Body>
void for_each_dot_box(const ConvPoolGeometry& g, const ConvPoolPlan& plan, const Body& body) {
  Range conv[3], taps[3];
  const auto set = [&](int d, int64_t pixel) {
    conv[d] = {pixel, plan.skips_padding ? past_same_taps(g, d, pixel) : g.conv[d]};
    taps[d] = plan.skips_padding ? taps_inside(g, d, pixel) : Range{0, g.kernel[d]};
    return conv[d].last;
  };
  for (int64_t z = 0; z < g.conv[0];) {
    z = set(0, z);
    for (int64_t y = 0; y < g.conv[1];) {
      y = set(1, y);
      for (int64_t x = 0; x < g.conv[2];) {
        x = set(2, x);
        body(conv, taps);
      }
    }
  }
}
FASTNN_INLINE int64_t dot_boxes(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  int64_t boxes = 1;
  for (int d = 0; d < 3 && plan.skips_padding; ++d) {
    int64_t along = 0;
    for (int64_t pixel = 0; pixel < g.conv[d]; ++along) pixel = past_same_taps(g, d, pixel);
    boxes *= along;
  }
  return boxes;
}

// What of its operands a plan has copied first.
//   in_place       the input is read where it lies, without the taps that fall into its padding
//   copies_image   or from a copy with its padding, channels last
//                  or else from copies of what is under each conv pixel, in the weight's order
//   turns_weight   the packed weight is the weight with channels last
FASTNN_INLINE ConvLayout dot_weight_layout(const ConvPoolGeometry& g, const ConvPoolPlan& plan,
                                           const ConvLayout& weight) {
  return plan.turns_weight ? dense_last(g.in_channels, g.kernel) : weight;
}
FASTNN_INLINE ConvLayout padded_image_layout(const ConvPoolGeometry& g) {
  int64_t size[3];
  for (int d = 0; d < 3; ++d) size[d] = padded_extent(g, d);
  return dense_last(g.in_channels, size);
}

// Whether the input under a conv pixel is copied with channels last: in the weight's order. That of a kernel of one
// element has no order.
FASTNN_INLINE bool dot_copy_is_last(const ConvPoolGeometry& g, const ConvPoolPlan& plan, const ConvLayout& input,
                                    const ConvLayout& weight) {
  return dot_weight_layout(g, plan, weight).c == 1 && g.in_channels > 1 && (g.taps() > 1 || input.c == 1);
}
FASTNN_INLINE ConvLayout dot_copy_layout(const ConvPoolGeometry& g, bool is_last) {
  const int64_t pixel = is_last ? g.in_channels : 1;
  return {g.depth(), pixel > 1 ? 1 : g.taps(), {pixel * g.kernel[1] * g.kernel[2], pixel * g.kernel[2], pixel}};
}

// What products read in the input's place.
FASTNN_INLINE ConvLayout dot_input_layout(const ConvPoolGeometry& g, const ConvPoolPlan& plan, const ConvLayout& input,
                                          const ConvLayout& weight) {
  if (plan.in_place) return input;
  return plan.copies_image ? padded_image_layout(g) : dot_copy_layout(g, dot_copy_is_last(g, plan, input, weight));
}

FASTNN_INLINE DotRuns dot_runs(const ConvPoolGeometry& g, const ConvPoolPlan& plan, const ConvLayout& input,
                               const ConvLayout& weight) {
  return dot_runs(g, dot_input_layout(g, plan, input, weight), dot_weight_layout(g, plan, weight));
}

// Numbers of the input copied for one image.
FASTNN_INLINE int64_t dot_copy_size(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  if (plan.in_place) return 0;
  return plan.copies_image ? padded_image_layout(g).n : g.conv[0] * g.conv[1] * g.conv[2] * g.depth();
}

// The elements that products are made of, and those of copies.
template <class T>
bool dots_in_pairs() {
  return kHasPairs<T> && isa_multiplies_pairs();
}
template <class T>
int64_t dot_numbers() {
  return kLanes<Compute<T>> * (dots_in_pairs<T>() ? 2 : 1);
}
template <class T>
int64_t dot_copy_bytes(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  return dot_copy_size(g, plan) * static_cast<int64_t>(dots_in_pairs<T>() ? sizeof(T) : sizeof(Compute<T>));
}

template <class T>
struct DotsScratch {
  using C = Compute<T>;
  char* copy;  // [image][...]: of the input
  C* conv;     // [image][conv pixel][lane]: outputs of a vector
  C* stage;
  uint8_t* winner_stage;
  DotPixel* pixels;  // box by box, image by image
  DotBox* boxes;
  DotStep* steps;  // whole vectors of all runs, then what is left of each
  WindowRow<C>* window_rows;
  int64_t* tags;
  int64_t images;
  int64_t size;

  DotsScratch(const ConvPoolGeometry& g, const ConvPoolPlan& plan, void* memory) {
    const int64_t conv_pixels = g.conv[0] * g.conv[1] * g.conv[2];
    images = plan.band;
    MemoryParts parts(memory);
    copy = parts.take<char>(images * dot_copy_bytes<T>(g, plan));
    conv = parts.take<C>(images * conv_pixels * kLanes<C>);
    stage = parts.take<C>(g.pixels() * kLanes<C>);
    winner_stage = parts.take<uint8_t>(g.pixels() * kLanes<C>);
    pixels = parts.take<DotPixel>(images * conv_pixels);
    boxes = parts.take<DotBox>(dot_boxes(g, plan));
    steps = parts.take<DotStep>(plan.columns);
    window_rows = parts.take<WindowRow<C>>(g.pool_kernel[0] * g.pool_kernel[1]);
    tags = parts.take<int64_t>(g.conv[0] * g.conv[1]);
    size = parts.used();
  }
};

// Whether operands copied so have long enough runs in common, and the copies can be made.
template <class T>
bool dot_copies_apply(const ConvPoolGeometry& g, const ConvPoolPlan& plan, const ConvLayout& input,
                      const ConvLayout& weight) {
  constexpr int64_t kShortest = 16;
  const bool dilated = g.dilation[0] > 1 || g.dilation[1] > 1 || g.dilation[2] > 1;
  if (plan.turns_weight) {
    const bool dense = weight.d[2] == 1 && weight.d[1] == g.kernel[2] && weight.d[0] == g.kernel[1] * g.kernel[2];
    if (!dense || g.taps() == 1 || g.in_channels == 1) return false;
  }
  // Fewer taps have no runs in common but of channels.
  const bool last = dot_weight_layout(g, plan, weight).c == 1 && g.in_channels >= kShortest;
  if (plan.skips_padding && !last) return false;
  if (plan.in_place || plan.copies_image) {
    const bool has_image = (input.c == 1 || dots_in_pairs<T>()) && dot_copy_bytes<T>(g, plan) <= kDotImageBytes;
    return (plan.in_place || has_image) && dot_runs(g, plan, input, weight).length >= kShortest;
  }
  const bool is_last = dot_copy_is_last(g, plan, input, weight), fits = dot_copy_bytes<T>(g, plan) <= kDotCopyBytes;
  return fits && !dilated && (input.c == 1 || !is_last) && dot_runs(g, plan, input, weight).count == 1;
}

// Here `columns` counts the vectors of the depth, at most, `band` the images worked on together.
template <class T>
void cut_dots(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& weight, int64_t threads,
              ConvPoolPlan& plan) {
  using C = Compute<T>;
  const DotRuns runs = dot_runs(g, plan, input, weight);
  plan.columns = runs.count * divide_up(runs.length, dot_numbers<T>());
  // Fewer taps may have shorter runs in common.
  if (plan.skips_padding) plan.columns = g.taps() * divide_up(g.in_channels, dot_numbers<T>());
  const int64_t conv_bytes = g.conv[0] * g.conv[1] * g.conv[2] * kLanes<C> * static_cast<int64_t>(sizeof(C));
  const int64_t blocks = divide_up(g.out_channels, kLanes<C>);
  // What is read again for other outputs, unless the weight takes more room than that.
  const int64_t size = static_cast<int64_t>(sizeof(T)), weight_bytes = g.out_channels * g.depth() * size;
  const bool again = plan.in_place && g.out_channels > kDotOutputs && weight_bytes <= kDotBufferBytes;
  const int64_t image = again ? group_size(g) * size : 0;
  const int64_t bytes = larger(conv_bytes, larger(dot_copy_bytes<T>(g, plan), image));
  plan.band = smaller(g.batch, larger(1, kDotBufferBytes / bytes));
  // Threads share the outputs, so that each reads but its part of the weight, then the images.
  plan.block_parts = smaller(blocks, divide_up(threads, g.groups));
  if (g.groups * plan.block_parts < threads) {
    plan.band = smaller(plan.band, divide_up(g.batch * g.groups * plan.block_parts, threads));
  }
  plan.items = divide_up(g.batch, plan.band) * g.groups * plan.block_parts;
  if (plan.turns_weight) {
    plan.pack_items = g.groups * g.out_channels;
    plan.packed_size = divide_up(g.groups * weight_bytes, static_cast<int64_t>(sizeof(C)));
  }
  plan.scratch_size = DotsScratch<T>(g, plan, nullptr).size;
}

// Whether a tile of pixels asks for the next one's input: large images of which each element meets one tap at most, and
// whose pixels are too long for the hardware to follow all of a tile's, or lie apart.
template <class T>
bool dots_ask_ahead(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  constexpr int64_t kCache = 1 << 20, kPixel = 256, kLongPixel = 512;
  const int64_t bytes = g.batch * image_size(g) * static_cast<int64_t>(sizeof(T));
  const int64_t steps = g.stride[0] * g.stride[1] * g.stride[2];
  const bool all = g.taps() == 1 && steps == 1;  // pixels, one after the other
  const bool long_pixels = g.in_channels * static_cast<int64_t>(sizeof(T)) >= (all ? kLongPixel : kPixel);
  return plan.in_place && long_pixels && bytes > kCache && g.taps() <= steps;
}

// Of packing the weight, which this saves, for one of so many images and one group.
FASTNN_INLINE double packing_cost(const ConvPoolGeometry& g, int64_t images) {
  constexpr double kPack = 0.8;  // an element
  return kPack * static_cast<double>(g.out_channels * g.depth()) / static_cast<double>(images);
}

// For one image and group.
template <class T>
double dots_cost(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& weight, const ConvPoolPlan& plan,
                 int64_t images) {
  using C = Compute<T>;
  constexpr double kSum = 12, kWayOut = 15;  // of the sum of a vector's lanes; of pooled pixels
  constexpr double kListed = 10;             // of a step of a box
  // Of a product's vector. Each tile widens what it loads, for as many products as it has outputs or pixels.
  constexpr double kStep = 1.06, kFarStep = 1.12, kWiden = 3;  // weights of a tile that are in L1, or not
  constexpr int64_t kL1 = 40 << 10;
  const bool widens = sizeof(T) < sizeof(C) && !dots_in_pairs<T>();
  const int64_t outputs = smaller(g.out_channels, kDotOutputs), together = kDotSums / outputs;
  const double inputs = plan.in_place ? 1 / static_cast<double>(outputs) : 0;
  const bool near = outputs * g.depth() * static_cast<int64_t>(sizeof(T)) <= kL1;
  const double step = (near ? kStep : kFarStep) + (widens ? kWiden * (inputs + 1 / static_cast<double>(together)) : 0);
  const int64_t pixels = g.conv[0] * g.conv[1] * g.conv[2], blocks = divide_up(g.out_channels, kLanes<C>);
  const double boxes = static_cast<double>(dot_boxes(g, plan)) / static_cast<double>(plan.band);  // of an image
  // Of each box some pixels are left, for smaller tiles.
  const double left = 0.35 * static_cast<double>(together) * boxes;
  const double dots = (static_cast<double>(pixels) + left) * static_cast<double>(g.out_channels);
  const double vectors = (plan.skips_padding ? share_inside(g) : 1) * static_cast<double>(plan.columns);
  const double lists = plan.skips_padding ? kListed * boxes * static_cast<double>(blocks) * vectors : 0;
  const double windows = static_cast<double>(blocks * g.pixels()) * (kWayOut + window_cost(g));
  constexpr double kCopiedRun = 24, kGatheredRun = 45, kTurned = 0.5;  // of a number that is moved on its own
  constexpr double kTurnedWeight = 0.6;                                // of what packing takes
  const bool is_last = dot_copy_is_last(g, plan, input, weight);
  const int64_t runs = (is_last ? 1 : g.in_channels) * g.kernel[0] * g.kernel[1];
  const double run = is_last || input.d[2] == 1 ? kCopiedRun : kGatheredRun;
  // From beyond L2, and back to there.
  constexpr double kFarCopy = 1.5, kFarImage = 0.3, kNearImage = 0.06;
  constexpr int64_t kNear = 5 << 19;
  const int64_t bytes = group_size(g) * static_cast<int64_t>(sizeof(T));
  const double number = dot_copy_bytes<T>(g, plan) > 2 * kNear ? kFarCopy : kCopyCost;
  const double copy = static_cast<double>(pixels) * (run * runs + number * static_cast<double>(g.depth()));
  const double of_image = input.c != 1 ? kTurned : images * bytes > kNear ? kFarImage : kNearImage;
  const double image = static_cast<double>(dot_copy_size(g, plan)) * of_image;
  // Few taps fill but a part of the squares that are transposed. Pairs are packed as slowly then.
  const double square = dots_in_pairs<T>() ? 1 : static_cast<double>(round_up(g.taps(), kLanes<C>)) / g.taps();
  const double turned = plan.turns_weight ? kTurnedWeight * square * packing_cost(g, images) : 0;
  // What comes from beyond L2, of strided kernels a part; again for each conv row, where L2 does not hold the rows that
  // one reads.
  constexpr double kLateByte = 0.1, kFarByte = 0.45;
  const int64_t under_row = g.kernel[0] * g.kernel[1] * g.input[2] * g.in_channels * static_cast<int64_t>(sizeof(T));
  const bool again = plan.in_place && under_row > kNear / 2 && bytes > kNear;
  const double byte = again ? kFarByte : images * bytes * g.groups > kNear ? kLateByte : 0;
  double arrival = byte * static_cast<double>(bytes);
  for (int d = 0; d < 3; ++d) {
    arrival *= again && d == 1 ? static_cast<double>(g.kernel[d]) / static_cast<double>(g.stride[d]) : share_met(g, d);
  }
  const double copied = turned + arrival + (plan.in_place ? 0 : plan.copies_image ? image : copy);
  // Where pairs do not gain, the estimate has to be less by more than it may be wrong by.
  const double doubt = (plan.copies_image || plan.turns_weight) && !dots_in_pairs<T>() ? 1.05 : 1;
  return (dots * (step * vectors + kSum) + lists + windows + copied) * doubt;
}

// The cheapest, for so many images with one weight; false if there is none. Chosen as for a single thread.
template <class T>
bool plan_dots(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& weight, int64_t images,
               int64_t threads, ConvPoolPlan& best, double& costs) {
  bool found = false;
  for (int copies = 0; copies < 6; ++copies) {
    ConvPoolPlan plan = {};
    plan.algorithm = ConvAlgorithm::dots;
    plan.in_place = copies % 3 == 0;
    plan.copies_image = copies % 3 == 1;
    plan.turns_weight = copies >= 3;
    plan.skips_padding = plan.in_place && (g.padding[0] > 0 || g.padding[1] > 0 || g.padding[2] > 0);
    if (!dot_copies_apply<T>(g, plan, input, weight)) continue;
    cut_dots<T>(g, input, weight, 1, plan);
    const double own = dots_cost<T>(g, input, weight, plan, images);
    if (found && own >= costs) continue;
    found = true;
    costs = own;
    best = plan;
  }
  if (found && threads > 1) cut_dots<T>(g, input, weight, threads, best);
  return found;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
