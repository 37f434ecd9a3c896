// Images of bfloat16 brought into channels last before they are read.
#pragma once

#include "conv_tile.h"

namespace fastnn {
namespace FASTNN_ISA {

// As many images at a time as stay in L2 with what they are turned from, and divide the batch; 0 where even one is
// written to memory beyond it, and more.
FASTNN_INLINE int64_t images_to_turn(const ConvPoolGeometry& g, const ConvLayout& input) {
  constexpr int64_t kTurnedBytes = 256 << 10, kLargest = 2 << 20;
  if (input.d[2] < 1 || input.d[2] > kMostStride) return 0;
  const int64_t image = g.groups * g.in_channels * g.input[0] * g.input[1] * g.input[2] * 2;
  if (image > kLargest) return 0;
  int64_t images = smaller(g.batch, larger(1, kTurnedBytes / image));
  while (g.batch % images != 0) --images;
  return images;
}

// An image as runs of columns that follow each other: rows where the kernel strides over others, if they are long.
struct TurnRuns {
  int64_t slices, rows, columns;
};
FASTNN_INLINE TurnRuns turn_runs(const ConvPoolGeometry& g, const ConvLayout& input) {
  constexpr int64_t kLongRow = 64;
  TurnRuns runs = {g.input[0], g.input[1], g.input[2]};
  const bool strides = g.stride[1] > g.kernel_extent(1) && runs.columns >= kLongRow;
  if (strides || input.d[1] != g.input[2] * input.d[2]) return runs;
  runs = {g.input[0], 1, g.input[1] * g.input[2]};
  const bool skips = g.stride[0] > g.kernel_extent(0) && runs.columns >= kLongRow;
  if (skips || input.d[0] != g.input[1] * input.d[1]) return runs;
  return {1, 1, g.input[0] * runs.columns};
}

// Of an image, in vector multiply-adds: blocks of 32 channels and 8 columns, some of which are not full. One that
// leaves the cache waits for memory.
FASTNN_INLINE double turn_cost(const ConvPoolGeometry& g, const ConvLayout& input) {
  constexpr double kBlock = 110, kPart = 100, kFar = 3;
  constexpr int64_t kNear = 512 << 10;
  const int64_t bytes = g.groups * g.in_channels * g.input[0] * g.input[1] * g.input[2] * 2;
  const TurnRuns runs = turn_runs(g, input);
  const double blocks = static_cast<double>(divide_up(runs.columns, 8)) + (runs.columns % 8 != 0 ? kPart / kBlock : 0);
  const double bands = static_cast<double>(divide_up(g.groups * g.in_channels, 32));
  return static_cast<double>(runs.slices * runs.rows) * kBlock * blocks * bands * (bytes > kNear ? kFar : 1);
}

#if defined(__AVX512F__)
// Parts [first, last) of the images, each cut into `parts` by its channels. Runs that the kernel strides over become
// zeros.
inline void turn_images(const ConvPoolForward<bfloat16>& call, int64_t parts, int64_t first, int64_t last,
                        bfloat16* to) {
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.input_layout;
  const TurnRuns runs = turn_runs(g, layout);
  const int64_t channels = g.groups * g.in_channels;
  const auto is_met = [&](int d, int64_t i) { return (i + g.padding[d]) % g.stride[d] < g.kernel_extent(d); };
  for (int64_t part = first; part < last; ++part) {
    const int64_t image = part / parts, begin = round_up(channels * (part % parts) / parts, 32);
    const int64_t count = smaller(channels, round_up(channels * (part % parts + 1) / parts, 32)) - begin;
    if (count <= 0) continue;
    const bfloat16* from = call.input + image * layout.n + begin * layout.c;
    bfloat16* target = to + image * g.input[0] * g.input[1] * g.input[2] * channels + begin;
    for (int64_t z = 0; z < runs.slices; ++z) {
      for (int64_t y = 0; y < runs.rows; ++y, target += runs.columns * channels) {
        if ((runs.slices == 1 || is_met(0, z)) && (runs.rows == 1 || is_met(1, y))) {
          turn_columns(from + z * layout.d[0] + y * layout.d[1], layout, count, runs.columns, target, channels);
        } else {
          for (int64_t x = 0; x < runs.columns; ++x) fill_zeros(target + x * channels, count);
        }
      }
    }
  }
}
#endif

}  // namespace FASTNN_ISA
}  // namespace fastnn
