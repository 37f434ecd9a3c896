// How a forward call is computed: which algorithm runs, and how it cuts the call up. A plan follows from the geometry,
// the memory formats, the machine and the number of threads; plan.cpp makes it, the kernels read it.
#pragma once

#include "geometry.h"

namespace fastnn {

// The algorithms of forward, each with the text that fastnn.explain prints. Of two of equal cost, the first is taken.
#define FASTNN_FOR_EACH_FORWARD_ALGORITHM(X)                                                                        \
  X(winograd, "3x3 kernels of stride 1: 16 multiplications in place of 36 for four pixels, in bfloat16 9 for four") \
  X(phases, "rows of a kernel longer than its stride: two pixels of r positions by r + 1 multiplications")          \
  X(pixels, "few channels: pixels fill the vector's lanes")                                                         \
  X(depthwise, "groups of one channel: channels fill the vector's lanes")                                           \
  X(direct, "output channels fill the vector's lanes")                                                              \
  X(stock, "torch's own convolution, some images at a time, with ReLU and max-pool in one pass behind it")

// An algorithm of forward or backward: its name, and the text about it.
struct AlgorithmEntry {
  const char *name, *words;
};
#define FASTNN_ALGORITHM(name, words) name,
#define FASTNN_ALGORITHM_ENTRY(name, words) {#name, words},
enum class ForwardAlgorithm : int32_t { FASTNN_FOR_EACH_FORWARD_ALGORITHM(FASTNN_ALGORITHM) };
constexpr AlgorithmEntry kForwardEntries[] = {FASTNN_FOR_EACH_FORWARD_ALGORITHM(FASTNN_ALGORITHM_ENTRY)};
// What the operators compute without a plan (csrc/ops/conv_pointwise.h), so that no call can ask for it by its name.
constexpr AlgorithmEntry kPointwise = {"pointwise",
                                       "kernels of one pixel: contiguous images are multiplied as they lie"};
constexpr int kForwardAlgorithms = sizeof(kForwardEntries) / sizeof(AlgorithmEntry);

// The instruction set in use, as planning sees it.
struct Machine {
  int64_t vector_bytes, registers;  // bytes of a vector, and registers that hold one
  int64_t longest_sum;              // the most products that kernels add up in one running sum (kernels/gemm.h)
  bool multiplies_pairs;            // vectors of pairs of bfloat16
  bool multiplies_matrices;         // of bfloat16
};

// The rows of a register tile of two vectors: its sums fill all registers but three, which hold two vectors of one
// operand and a broadcast element of the other.
static constexpr int64_t most_rows_of_tile(int64_t registers) {
  return (registers - 2 - 1) / 2;
}

// Arithmetic of both planners, forward's and backward's.
namespace planner {
inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t multiple) {
  return divide_up(a, multiple) * multiple;
}
}  // namespace planner

// A band is the pooled pixels that are computed together: `rows` x `columns` of one slice of each of `images` images.
// Bands of the last row, column and image may be smaller.
struct BandPlan {
  int64_t images, rows, columns;
  int64_t segment;                               // columns whose conv pixels stay in L1 together: whole tiles, or all
  int64_t stage_rows;                            // rows that are written out together
  int64_t image_bands, row_bands, column_bands;  // how many there are
  int64_t input[3];                              // extent of the input under a band, padding included
  int64_t conv[3];                               // extent of its conv pixels, the pool's padding included
};

// Rows of conv pixels that windows still need, as a ring. Row y of slice z is in slot (z % slices) * rows + y % rows.
struct RingPlan {
  int64_t slices, rows;
  int64_t row_size;  // elements of a slot
};

// What one multiplication of direct convolution reads from the copy and the weight.
enum class Elements : int32_t {
  numbers,
  pairs,      // of bfloat16: two channels at a time
  row_pairs,  // of bfloat16: two numbers of a run at a time, where the number of channels is odd
  blocks,     // of bfloat16: blocks of runs, multiplied by a matrix unit
};

// A run is the numbers that lie side by side under a conv pixel: the channels of one kernel position, or those of all
// positions of a row of the kernel. A run is cut into equal blocks (pairs, or what a matrix unit takes). The last block
// may end beyond the run, where the weights are zero.
struct RunPlan {
  bool joins_columns;  // a run is a whole row of the kernel
  int64_t run;         // numbers
  int64_t blocks;      // of a run
  int64_t numbers;     // of a block, even
};

// Output channels are in the lanes. The copy of the band's input is [channel][slice][row][column] or channels last.
struct DirectPlan {
  BandPlan band;
  RingPlan ring;
  Elements elements;
  bool channels_last;             // in the copy
  RunPlan runs;                   // where elements are row_pairs or blocks
  int64_t channels;               // of the copy, in its elements
  int64_t channel_step, step[3];  // of the copy, in its elements
  int64_t copy_size;              // its elements
  int64_t depth;                  // products that are summed for an output
  // Whether all of a band's conv pixels are summed, a part of the depth at a time, then pooled. Channels then lie side
  // by side in the weight, and a part has some channels under one position of the kernel, or all under some.
  bool whole_band;
  int64_t block_parts;  // the items that share a band's blocks of output channels
};

constexpr int kMostTaps = 4, kMostPoints = kMostTaps + 1;  // of a piece of a kernel's row
constexpr int kMostPieces = 8;

// A piece of a row of the kernel: `taps` columns from `first` on, a stride apart.
struct KernelPiece {
  int64_t first, taps;
  int64_t position[kMostPoints];  // of the piece's product at each point
  int64_t pixels[kMostPoints];    // input columns that the piece reads, relative to the first of a pair
};

// Direct convolution over a copy that is transformed along its rows: [position][channel][slice][row][pair of conv
// pixels] or [position][slice][row][pair][channel]. `direct.depth` counts the products of one position.
struct PhasesPlan {
  DirectPlan direct;
  int64_t pieces;
  KernelPiece piece[kMostPieces];
  int64_t points;
  int64_t first[kMostPoints + 1];  // the position of each point's first product; the products of a point add up
  int64_t positions;               // products for a pair of conv pixels, per row of the kernel and channel
  int64_t position_step;           // elements of the copy
  int64_t pairs;                   // of a row
  int64_t column_run;              // elements from one run of columns that are 2 strides apart to the next
};

// The conv pixels in a row of a Winograd tile. (The rounding of bfloat16 hides the larger errors of F(4x4).)
constexpr int64_t winograd_tile(int64_t element_bytes) {
  return element_bytes == 2 ? 4 : 2;
}
// In each slice of an image, a band has tile_rows x tile_columns tiles.
struct WinogradPlan {
  BandPlan band;
  RingPlan ring;
  int64_t tile_rows, tile_columns;
  int64_t pitch;  // elements from a tile's channels to the next tile's
  int64_t block_parts;
};

// Pixels are in the lanes. The copy is [channel][slice][row][residue][place][image]: columns that are conv stride x
// pool stride apart lie side by side, each beside the same column of the other images of the band. Conv pixels lie
// likewise: a ring's slot is [residue of the pool's stride][output of a block][window][image].
struct PixelsPlan {
  BandPlan band;
  RingPlan ring;
  int64_t residues;               // conv stride x pool stride, or the columns of a band
  int64_t run;                    // elements of a run of columns, of all images
  int64_t conv_run;               // elements of a run of conv pixels, of all images
  int64_t conv_pixels;            // of a run, of one image
  int64_t pitch;                  // elements of a row of pooled pixels
  int64_t channel_step, step[2];  // of the copy, elements
  int64_t copy_size;
  int64_t depth;
  int64_t block, blocks;  // output channels that are computed together, and the number of such blocks
  bool joins_rows;        // no stride and no pooling: a band's rows are computed as one, with the columns between them
  bool in_registers;      // windows do not overlap and are whole: they are pooled in registers, without a ring
  int64_t vectors;        // of a tile: 1, 2, 4 or 8; conv_run is a multiple of this many vectors

  // The conv pixels of a run, of one image, where a band like `like` has so many pooled rows and columns.
  int64_t pixels_of_run(const ConvPoolGeometry& g, const BandPlan& like, int64_t rows, int64_t columns) const {
    return joins_rows ? (rows - 1) * like.input[2] + columns : columns + (g.pool_extent(2) - 1) / g.pool_stride[2];
  }
};

// Groups of one channel: channels are in the lanes, and the copy is channels last.
struct DepthwisePlan {
  BandPlan band;
  RingPlan ring;
  int64_t block_parts;
  int64_t together;   // blocks that are copied together
  int64_t copy_size;  // elements of a block's copy
};

struct ConvPlan {
  ForwardAlgorithm algorithm;
  int64_t threads;       // threads that are worth starting
  int64_t items;         // independent pieces of work
  int64_t pack_items;    // independent pieces of work in packing the weight
  int64_t packed_size;   // elements of the packed weight
  int64_t scratch_size;  // bytes per thread
  double cost;           // in vector multiply-adds that take as long
  bool needs_moderate;   // if input and weight are not moderate, the plan of an `exact` request is used instead
  union {
    DirectPlan direct;
    PhasesPlan phases;
    WinogradPlan winograd;
    PixelsPlan pixels;
    DepthwisePlan depthwise;
  };
};

struct PlanRequest {
  int64_t threads;        // available
  int64_t element_bytes;  // of the input: 8 float64, 4 float32, 2 bfloat16
  bool input_channels_last, output_channels_last;
  bool exact;         // elements may not be moderate, so no transforms
  bool is_packed;     // the weight is packed ahead of the call
  int32_t algorithm;  // the algorithm to take, or -1 to choose one
};

// Whether the algorithm can compute such a call at all.
bool algorithm_applies(ForwardAlgorithm, const ConvPoolGeometry&, const PlanRequest&);

// The plan; `request.algorithm`, if any, applies.
ConvPlan plan_forward(const ConvPoolGeometry&, const PlanRequest&, const Machine&);

}  // namespace fastnn
