// How a forward call is computed: which algorithm, and how that cuts the call up. A plan follows from the geometry, the
// memory formats, the machine and the number of threads; plan.cpp makes it, the kernels read it.
#pragma once

#include "geometry.h"

namespace fastnn {

// The algorithms of forward, with what fastnn.explain says of each. Of two that cost the same, the first is taken.
#define FASTNN_FOR_EACH_FORWARD_ALGORITHM(X)                                                                        \
  X(winograd, "3x3 kernels of stride 1: 16 multiplications in place of 36 for four pixels, in bfloat16 9 for four") \
  X(phases, "rows of a kernel longer than its stride: two pixels of r positions by r + 1 multiplications")          \
  X(pixels, "few channels: pixels fill the vector's lanes")                                                         \
  X(depthwise, "groups of one channel: channels fill the vector's lanes")                                           \
  X(direct, "output channels fill the vector's lanes")                                                              \
  X(stock, "torch's own convolution, some images at a time, with ReLU and max-pool in one pass behind it")

// A name of one of the algorithms of forward or backward, and what is said of it.
struct AlgorithmEntry {
  const char *name, *words;
};
#define FASTNN_ALGORITHM(name, words) name,
#define FASTNN_ALGORITHM_ENTRY(name, words) {#name, words},
enum class ForwardAlgorithm : int32_t { FASTNN_FOR_EACH_FORWARD_ALGORITHM(FASTNN_ALGORITHM) };
constexpr AlgorithmEntry kForwardEntries[] = {FASTNN_FOR_EACH_FORWARD_ALGORITHM(FASTNN_ALGORITHM_ENTRY)};
constexpr int kForwardAlgorithms = sizeof(kForwardEntries) / sizeof(AlgorithmEntry);

// The instruction set in use, as planning sees it.
struct Machine {
  int64_t vector_bytes, registers;  // bytes of a vector, and registers that hold one
  bool has_pairs;                   // multiplies vectors of pairs of bfloat16
  bool has_matrix;                  // multiplies matrices of them
  // Products that kernels sum in one go (kLongestSum in kernels/gemm.h).
  int64_t longest_sum() const { return vector_bytes > 16 ? 128 : 64; }
};

// The rows of a register tile of two vectors: their sums fill the registers that one row of the other operand and a
// broadcast leave.
static constexpr int64_t most_rows_of_tile(int64_t registers) {
  return (registers - 2 - 1) / 2;
}

// What both planners, forward's and backward's, count with.
namespace planner {
inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t multiple) {
  return divide_up(a, multiple) * multiple;
}
}  // namespace planner

// A band: the pooled pixels that are computed together, `rows` x `columns` of one slice of each of `images` images,
// and what they need. Bands of the last row, column and image may be smaller.
struct BandPlan {
  int64_t images, rows, columns;
  int64_t segment;                               // columns whose conv pixels wait in L1 together; whole tiles, or all
  int64_t stage_rows;                            // rows that are written out together
  int64_t image_bands, row_bands, column_bands;  // how many there are
  int64_t input[3];                              // extent of the input under a band, padding included
  int64_t conv[3];                               // extent of its conv pixels, the pool's padding included
};

// Rows of conv pixels kept while windows need them. Row y of slice z is in slot (z % slices) * rows + y % rows.
struct RingPlan {
  int64_t slices, rows;
  int64_t row_size;  // elements of a slot
};

// What a multiplication of direct convolution takes of the copy and the weight.
enum class Elements : int32_t {
  numbers,
  pairs,      // of bfloat16: two channels at a time
  row_pairs,  // of bfloat16: two numbers of a run at a time, where channels would leave one over
  blocks,     // of bfloat16: runs, by a matrix unit
};

// Numbers that lie side by side under a conv pixel are a run: those of a row of the kernel, or of each of its columns.
// A run is cut into equal blocks (pairs, or what a matrix unit takes), the last of which may end beyond it, by weights
// of zero.
struct RunPlan {
  bool joins_columns;  // a run is a row of the kernel
  int64_t run;         // numbers
  int64_t blocks;      // of a run
  int64_t numbers;     // of a block, even
};

// Channels in the lanes. A packed copy of the band, [channel][slice][row][column] or channels last.
struct DirectPlan {
  BandPlan band;
  RingPlan ring;
  Elements elements;
  bool channels_last;             // in the copy
  RunPlan runs;                   // of row_pairs and blocks
  int64_t channels;               // of the copy, in its elements
  int64_t channel_step, step[3];  // of the copy, in its elements
  int64_t copy_size;              // its elements
  int64_t depth;                  // products of an output
  bool whole_band;                // all of a band's conv pixels are summed, a part of the depth at a time, then pooled
  int64_t block_parts;            // so many items share a band's blocks
};

constexpr int kMostTaps = 4, kMostPoints = kMostTaps + 1;  // of a piece of a kernel's row
constexpr int kMostPieces = 8;

// Columns of the kernel, a stride apart.
struct KernelPiece {
  int64_t first, taps;
  int64_t position[kMostPoints];  // of its product at each point
  int64_t pixels[kMostPoints];    // of the input that it meets: columns behind the first of a pair
};

// Direct, over a copy that is transformed along its rows: [position][channel][slice][row][pair of conv pixels], or
// [position][slice][row][pair][channel]. `depth` is that of one position.
struct PhasesPlan {
  DirectPlan direct;
  int64_t pieces;
  KernelPiece piece[kMostPieces];
  int64_t points;
  int64_t first[kMostPoints + 1];  // the position of each point's first product; those of a point add up
  int64_t positions;               // products of a pair of pixels, a row of the kernel and channel
  int64_t position_step;           // elements of the copy
  int64_t pairs;                   // of a row
  int64_t column_run;              // elements from a run of columns that are 2 strides apart to the next
};

// Conv pixels of a row of a tile of Winograd's. (F(4x4)'s errors are hidden by bfloat16's rounding.)
constexpr int64_t winograd_tile(int64_t element_bytes) {
  return element_bytes == 2 ? 4 : 2;
}
// A band has rows x columns of tiles of each image.
struct WinogradPlan {
  BandPlan band;
  RingPlan ring;
  int64_t tile_rows, tile_columns;
  int64_t pitch;  // elements from a tile's channels to the next tile's
  int64_t block_parts;
};

// Pixels in the lanes. The copy is [channel][slice][row][residue][place][image]: columns that are conv stride x pool
// stride apart lie side by side, and of the images of a band the same column. Conv pixels likewise: a ring's slot is
// [residue of the pool's stride][output of a block][window][image].
struct PixelsPlan {
  BandPlan band;
  RingPlan ring;
  int64_t residues;               // conv stride x pool stride, or the columns of a band
  int64_t run;                    // elements of a run of columns, of all images
  int64_t conv_run;               // elements of a run of conv pixels, of all images
  int64_t conv_places;            // conv pixels of a run
  int64_t pitch;                  // elements of a row of pooled pixels
  int64_t channel_step, step[2];  // of the copy, elements
  int64_t copy_size;
  int64_t depth;
  int64_t block, blocks;  // outputs computed together, and how often
  bool joins_rows;        // nothing strides or pools: a band's rows are one, with the columns between them
  bool in_registers;      // windows do not overlap and are whole: they are pooled there, and no ring is kept
  int64_t vectors;        // and vectors: 1, 2, 4 or 8, of which a run of conv pixels is a multiple
};

// Groups of one channel in the lanes, channels last.
struct DepthwisePlan {
  BandPlan band;
  RingPlan ring;
  int64_t block_parts;
  int64_t together;   // blocks that are copied together
  int64_t copy_size;  // elements of a block's copy
};

struct ConvPlan {
  ForwardAlgorithm algorithm;
  int64_t threads;       // worth starting
  int64_t items;         // independent pieces of work
  int64_t pack_items;    // and of packing the weight
  int64_t packed_size;   // elements of the packed weight
  int64_t scratch_size;  // bytes, a thread
  double cost;           // vector multiply-adds that take as long
  bool needs_moderate;   // input and weight: else the plan of an `exact` request is to be taken
  union {
    DirectPlan direct;
    PhasesPlan phases;
    WinogradPlan winograd;
    PixelsPlan pixels;
    DepthwisePlan depthwise;
  };
};

struct PlanRequest {
  int64_t threads;        // at hand
  int64_t element_bytes;  // of the input: 8 float64, 4 float32, 2 bfloat16
  bool input_channels_last, output_channels_last;
  bool exact;         // elements are not moderate: no transforms
  int32_t algorithm;  // the one to take, or -1
};

// Whether the algorithm can compute such a call at all.
bool algorithm_applies(ForwardAlgorithm, const ConvPoolGeometry&, const PlanRequest&);

// The plan; `request.algorithm`, if any, applies.
ConvPlan plan_forward(const ConvPoolGeometry&, const PlanRequest&, const Machine&);

}  // namespace fastnn
