// pool(relu(conv(input, weight) + bias)) in one to three dimensions, without the convolution's output in memory.
#pragma once

#include "../simd/isa.h"
#include "conv/backward/problem.h"
#include "conv/geometry.h"
#include "dtype.h"

namespace fastnn {

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

using ConvForwardTable = PerDtype<ConvForwardKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(ConvForwardTable, conv_forward_kernels)
