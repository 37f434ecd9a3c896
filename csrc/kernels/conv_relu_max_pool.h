// pool(relu(conv(input, weight) + bias)) in one to three dimensions, without the convolution's output in memory.
#pragma once

#include <stdint.h>

#include "../simd/isa.h"
#include "dtype.h"

namespace fastnn {

// The winner of a window whose output has no gradient: the largest value is not above zero, or there is none.
constexpr uint8_t kDead = 255;
// So that a winner's place fits a byte.
constexpr int64_t kMostPlaces = 254;

// Dimensions are depth, height, width; a problem of fewer has ones in front.
struct ConvPoolGeometry {
  int64_t batch, groups;
  int64_t in_channels, out_channels;  // of one group
  int64_t input[3], kernel[3], stride[3], padding[3], dilation[3];
  int64_t conv[3];  // the convolution's output
  int64_t pool_kernel[3], pool_stride[3], pool_padding[3], pool_dilation[3];
  int64_t output[3];

  int64_t pixels() const { return output[0] * output[1] * output[2]; }
  int64_t places() const { return pool_kernel[0] * pool_kernel[1] * pool_kernel[2]; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t depth() const { return in_channels * taps(); }
  // Conv pixels from a window's first to its last, along one dimension.
  int64_t pool_extent(int d) const { return (pool_kernel[d] - 1) * pool_dilation[d] + 1; }
  int64_t kernel_extent(int d) const { return (kernel[d] - 1) * dilation[d] + 1; }
};

// Where the elements of a (batch, channels, depth, height, width) tensor lie.
struct ConvLayout {
  int64_t n, c, d[3];
};

// The order of a packed weight's depth, the innermost last.
enum class TapOrder : int32_t {
  channels_first,  // channel, slice, row, column of the kernel
  channels_last,   // slice, row, column, channel
  rows_first,      // slice, row, channel, column
  columns_first,   // column, slice, row, channel
};

enum class ConvAlgorithm : int32_t {
  direct,       // conv_direct.h: output channels in the vector's lanes
  pairs,        // the same, two input channels a multiplication (bfloat16)
  row_pairs,    // the same, two numbers side by side in a row of the kernel
  by_four,      // the same, the lanes of an output channel have products with four input channels (float32)
  rows,         // conv_rows.h: consecutive pixels in the lanes
  rows_by_two,  // the same, two input channels a multiplication (bfloat16)
  lanes,        // conv_lanes.h: independent pieces of the problem in the lanes
  depthwise,    // conv_depthwise.h: groups of one channel in the lanes
  winograd,     // conv_winograd.h: fewer multiplications
  dots,         // conv_dots.h: the depth of the product in the lanes
  windows,      // conv_windows.h: consecutive windows in the lanes
  phases,       // conv_row_phases.h: direct, with fewer multiplications along a row
  matrix,       // conv_row_matrix.h: direct, by a matrix unit
};

// How a forward call is cut up: a function of the geometry, the layouts and the number of threads.
struct ConvPoolPlan {
  ConvAlgorithm algorithm;
  double cost;                    // of an image, in vector multiply-adds
  int64_t turned_images;          // if not 0: so many at a time are first brought into channels last,
  ConvLayout turned_layout;       // which is then that of the input
  int64_t items;                  // independent pieces of work
  int64_t packed_size;            // elements of the packed weight
  int64_t pack_items;             // independent pieces of packing
  int64_t scratch_size;           // bytes, a thread
  bool in_place;                  // the input is read where it lies, not from a padded copy
  bool skips_padding;             // no tap outside the input is taken
  bool blocks_first;              // conv_direct.h: a block of channels serves all images before the next one
  bool copies_image;              // conv_dots.h: a copy of a whole image is read
  bool turns_weight;              // conv_dots.h: the packed weight has its channels last
  bool pairs_taps;                // conv_depthwise.h: two taps side by side are multiplied at once
  bool pads_rows;                 // conv_depthwise.h: rows of the input are copied with their padding
  int64_t block_groups;           // conv_depthwise.h: side by side in one or two vectors
  TapOrder order;                 // of the packed weight
  int64_t columns, column_parts;  // pooled columns worked on together
  int64_t band;                   // pooled rows worked on together
  int64_t row_parts, block_parts;
  int64_t slices;        // conv_rows.h: pooled slices worked on together
  int64_t tile_groups;   // conv_rows.h: groups that are copied together
  int64_t row_pitch;     // conv_rows.h: of the input's rows that are read in place, or 0
  int64_t tile_results;  // conv_winograd.h: conv pixels of a tile along a dimension
  // conv_lanes.h
  int64_t bands;  // of an image's rows: pieces
  int lane_vectors;
};

template <class T>
struct ConvPoolForward {
  ConvPoolGeometry geometry;
  ConvPoolPlan plan;
  const T* input;
  ConvLayout input_layout;
  const T* weight;  // n is its output channel
  ConvLayout weight_layout;
  const T* bias;  // or null
  Compute<T>* packed;
  T* output;  // dense, channels first or last
  ConvLayout output_layout;
  uint8_t* winners;  // laid out as the output, or null
};

enum class ConvBackwardAlgorithm : int32_t {
  winners,    // conv_backward.h: only what has a gradient is multiplied
  depthwise,  // conv_backward_depthwise.h: channels in the lanes
  pixels,     // conv_backward_pixels.h: pixels in the lanes
  taps,       // conv_backward_taps.h: the same, of larger kernels
};

struct ConvPoolBackwardPlan {
  ConvBackwardAlgorithm algorithm;
  int64_t packed_size;   // elements of the packed weight, for the input's gradient
  int64_t weight_size;   // elements of one private weight gradient
  int64_t scratch_size;  // bytes, a thread
  int64_t blocks;        // of channels; pieces of work are (images) x (blocks)
  int axis;              // along which an image may be cut into parts
  int64_t most_parts;    // and into how many
  bool keeps_lost;       // what rounding takes from the weight's gradient is noted
  bool needs_finite;     // elements of input and weight
  bool zips_runs;        // conv_runs.h
};

// A piece of backward's work: of some images, some blocks, and one of so many parts of the conv pixels along the axis.
struct ConvPoolPiece {
  int64_t first_image, last_image;
  int64_t first_block, last_block;
  int64_t part, parts;
};

template <class T>
struct ConvPoolBackward {
  ConvPoolGeometry geometry;
  ConvPoolBackwardPlan plan;
  const T* grad_output;
  ConvLayout output_layout;
  const uint8_t* winners;
  ConvLayout winners_layout;
  const T* input;
  ConvLayout input_layout;
  const T* weight;  // of the groups before they were joined
  ConvLayout weight_layout;
  T* grad_input;  // or null
  ConvLayout grad_input_layout;
  Compute<T>* packed;  // the packed weight, or null
  int64_t joined;      // so many groups are one in the geometry
};

template <class T>
struct ConvForwardKernels {
  // `exact`: not an algorithm that large or infinite elements would spoil.
  ConvPoolPlan (*plan)(const ConvPoolGeometry&, const ConvLayout& input, const ConvLayout& weight, int64_t threads,
                       bool exact);
  // Whether the elements are such that the call's plan may be followed.
  bool (*plan_holds)(const ConvPoolForward<T>&);
  void (*pack)(const ConvPoolForward<T>&, int64_t first_item, int64_t last_item);
  void (*forward)(const ConvPoolForward<T>&, int64_t first_item, int64_t last_item, void* scratch);
  // Parts [first, last) of the images, each cut into so many, to channels last.
  void (*turn_input)(const ConvPoolForward<T>&, int64_t parts, int64_t first, int64_t last, T* to);
};

template <class T>
struct ConvBackwardKernels {
  // How many groups backward should work on as one, whose weight is zero from one to another.
  int64_t (*groups_to_join)(const ConvPoolGeometry&, const T* grad_output, const ConvLayout&);
  // `exact`: not an algorithm that needs finite elements.
  ConvPoolBackwardPlan (*plan)(const ConvPoolGeometry&, const ConvLayout& input, const ConvLayout& grad_input,
                               bool exact);
  // Whether the elements are such that a plan may be followed.
  bool (*plan_holds)(const ConvPoolBackward<T>&);
  void (*pack)(const ConvPoolBackward<T>&);
  // The gradients that a piece contributes.
  // grad_weight (weight_size) is written, grad_bias (groups x out_channels) added to; either may be null. lost: where
  // the plan says so, zeros of the weight's size, to take note of rounding; else null.
  void (*backward)(const ConvPoolBackward<T>&, const ConvPoolPiece&, Compute<T>* grad_weight, Compute<T>* lost,
                   Compute<T>* grad_bias, void* scratch);
  // A private weight gradient, given back in the weight's layout and groups.
  void (*unpack_weight)(const ConvPoolBackward<T>&, const Compute<T>* grad_weight, T* to, const ConvLayout& layout);
  void (*store)(const Compute<T>* from, int64_t count, T* to);
  // Whether each winner is a place that its window has.
  bool (*winners_are_valid)(const ConvPoolGeometry&, const uint8_t* winners, const ConvLayout&);
  // The gradient of the convolution's output (conv_spread.h), and the bytes that takes.
  int64_t (*spread_scratch_size)(const ConvPoolGeometry&);
  void (*spread)(const ConvPoolBackward<T>&, int64_t first_image, int64_t last_image, T* to, Compute<T>* grad_bias,
                 void* scratch);
  // [rows][columns] -> [columns][rows]
  void (*turn)(const T* from, int64_t rows, int64_t columns, T* to);
};

using ConvForwardTable = PerDtype<ConvForwardKernels>;
using ConvBackwardTable = PerDtype<ConvBackwardKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(ConvForwardTable, conv_forward_kernels)
FASTNN_DECLARE_KERNELS(ConvBackwardTable, conv_backward_kernels)
