// How a backward call is computed: which algorithm, and how that cuts the call up. plan.cpp makes a plan, once for all
// instruction sets; the kernels read it.
#pragma once

#include "../plan.h"

namespace fastnn {

// The algorithms of backward, each with the text that fastnn.explain prints.
#define FASTNN_FOR_EACH_BACKWARD_ALGORITHM(X)                                                           \
  X(taps, "pixels fill the vector's lanes: few input channels")                                         \
  X(depthwise, "groups of one channel: channels fill the vector's lanes")                               \
  X(winograd, "3x3 kernels of stride 1, no pool: 16 multiplications in place of 36, in both gradients") \
  X(winners, "input channels fill the vector's lanes: only what has a gradient is multiplied")          \
  X(stock, "torch's own convolution")
enum class BackwardAlgorithm : int32_t { FASTNN_FOR_EACH_BACKWARD_ALGORITHM(FASTNN_ALGORITHM) };
constexpr AlgorithmEntry kBackwardEntries[] = {FASTNN_FOR_EACH_BACKWARD_ALGORITHM(FASTNN_ALGORITHM_ENTRY)};

// [first, last)
struct Range {
  int64_t first, last;
};

// How the gradient of the convolution's output is cut into bands (gradient_band.h).
struct GradientBandPlan {
  int64_t width;    // channels, in whole vectors
  int64_t size[3];  // of a band, at most
  int64_t pixels;   // of a band, in whole vectors
};

// The working copy of some channels of an image and of its gradient (image.h): padded, [z][y][x][channel]. Only a
// window of each is in memory. The window moves along `axis`, the first dimension whose size is not one.
struct ImagePlan {
  int64_t lanes;      // channels
  int64_t extent[3];  // of the whole image: the padding before it, and all that the kernel or the input reaches
  int64_t d[3];       // strides
  int axis;
  int64_t step;    // conv pixels along the axis that are computed before the window moves
  int64_t slices;  // of the window, along the axis
  int64_t size;    // elements of the window
};

// The elements of the input under a conv pixel form a few runs. A run is a row of the kernel with all channels of a
// block, or a single kernel position where dilation separates the positions of a row.
struct WinnersPlan {
  bool zips;             // elements stay bfloat16, and two runs are multiplied at once
  int64_t lanes;         // channels of a block
  int64_t blocks;        // of a group
  int64_t columns;       // of the kernel, in a run
  int64_t runs;          // under a conv pixel
  int64_t length;        // elements of a run
  int64_t vectors;       // that hold a run
  int64_t row;           // elements of all runs of one output channel
  int64_t slice_pixels;  // conv pixels whose input stays in L1
};

struct DepthwiseBackwardPlan {
  int64_t multiplier;  // output channels of a group
  int64_t taps;        // elements of the kernels of one vector of channels
};

// The weight's gradient is computed in tiles of some output channels by some elements of the depth.
struct TapsPlan {
  int64_t channels;         // output channels worked on together
  int64_t step;             // from one channel of the band to the next
  int64_t pass;             // pixels whose products are made together
  int64_t rows, row_tiles;  // output channels of a tile, and tiles
  int64_t depth, tap_tiles;
  int64_t tile_size;

  int64_t first_tap(int64_t tile) const { return depth * tile / tap_tiles; }
  int64_t size() const { return row_tiles * tap_tiles * tile_size; }
};

// The tiles of all images are numbered by image, row and column, and cut into parts, which are transformed and summed
// at once: whole rows, if that can be. A share is some parts, whose sums are added up.
struct WinogradBackwardPlan {
  int64_t rows, columns, tiles;  // of an image, and of all
  int64_t part, shares;          // tiles of a part; shares of all tiles
  int64_t together;              // tiles side by side whose rows are loaded together
  int64_t lanes, outputs;        // of a vector; output channels in whole vectors
  int64_t pitch;                 // elements from a tile's input channels to the next tile's
  int64_t blocks;                // of output channels
  int64_t items, pieces;         // groups x shares x blocks; of the weight's gradient

  // Elements of the rows under `together` tiles: of the input, and of the gradient.
  int64_t rows_size() const { return 4 * (2 * together + 2) * pitch; }
  int64_t gradient_rows_size() const { return 2 * 2 * together * outputs; }
  // Elements from a position to the next: of transformed inputs and gradients, and of sums. It ends with an unused
  // line.
  int64_t input_step() const { return part * pitch + lanes; }
  int64_t gradient_step() const { return part * outputs + lanes; }
  int64_t sums_step(int64_t channels) const { return channels * outputs + lanes; }
};
constexpr int64_t kWinogradPositions = 16;
constexpr int64_t kWinogradChannels = 16;  // input channels of a piece of the weight's gradient

struct ConvBackwardPlan {
  BackwardAlgorithm algorithm;
  int64_t packed_size;  // elements of the packed weight, for the input's gradient
  int64_t weight_size;  // elements of one private weight gradient
  int64_t blocks;       // of channels; pieces of work are (images) x (blocks)
  int64_t most_parts;   // the most parts into which an image may be cut along the window's axis
  bool keeps_lost;      // what rounding takes from the weight's gradient is summed up too
  bool in_parts;        // so much is added to the input's gradient that it is summed in parts
  GradientBandPlan band;
  ImagePlan image;  // not set for stock
  union {
    WinnersPlan winners;
    DepthwiseBackwardPlan depthwise;
    TapsPlan taps;
    WinogradBackwardPlan winograd;
  };
};

struct BackwardRequest {
  int64_t dims;
  int64_t element_bytes;  // of the input: 8 float64, 4 float32, 2 bfloat16
  bool input_channels_last;
  bool both;          // the gradients of input and weight are wanted
  bool dense;         // there are no winners, each conv pixel has a gradient: winograd, depthwise, taps or stock
  bool exact;         // elements may be infinite: no algorithm that multiplies them by zeros or transforms them
  int32_t algorithm;  // the algorithm to take, or -1 to choose one
};

// The geometry by which the input's gradient is a convolution of the output's gradient, where strides are 1 and nothing
// is pooled. Its padding may be negative.
ConvPoolGeometry turned_around(const ConvPoolGeometry&);

// Whether the algorithm can compute such a call at all.
bool algorithm_applies(BackwardAlgorithm, const ConvPoolGeometry&, const BackwardRequest&);

// The plan; `request.algorithm`, if any, applies.
ConvBackwardPlan plan_backward(const ConvPoolGeometry&, const BackwardRequest&, const Machine&);

// A tile of the weight's gradient, whose sums fill the registers, has 1, 2 or 4 output channels and at most so many
// elements of the depth.
constexpr int most_dot_taps(int64_t registers) {
  return registers == 32 ? 6 : 3;
}

}  // namespace fastnn
