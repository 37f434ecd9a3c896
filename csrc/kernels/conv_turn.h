// Images brought into channels last before they are read.
#pragma once

#include "conv_common.h"

namespace fastnn {
namespace FASTNN_ISA {

// What gains by it: float64 is for checks, and bfloat16 is else widened on the way to where it is read.
template <class T>
constexpr bool kTurns = kHasPairs<T>;
template <>
constexpr bool kTurns<float> = true;

// Channels last.
template <class T>
ConvLayout turned_layout(const ConvPoolGeometry& g) {
  const int64_t pixel = spread_pixel<T>(g.groups * g.in_channels);
  const int64_t row = g.input[2] * pixel, slice = g.input[1] * row;
  return {g.input[0] * slice, 1, {slice, row, pixel}};
}

template <class T>
bool can_turn(const ConvPoolGeometry& g, const ConvLayout& input) {
  if (!kTurns<T> || !can_be_turned(input)) return false;
  return kHasPairs<T> ? isa_multiplies_pairs() && g.in_channels % 2 == 0 : g.in_channels > 1;
}

// As many images at a time as stay in L2 with what they are turned from, and divide the batch, or a single one.
template <class T>
int64_t images_to_turn(const ConvPoolGeometry& g) {
  constexpr int64_t kTurnedBytes = 256 << 10;
  int64_t images =
      smaller(g.batch, larger(1, kTurnedBytes / (turned_layout<T>(g).n * static_cast<int64_t>(sizeof(T)))));
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

// Of an image, in vector multiply-adds. What does not stay in L2 from call to call, or from being turned to being used,
// is waited for.
template <class T>
double turn_cost(const ConvPoolGeometry& g, const ConvLayout& input) {
  constexpr bool narrow = sizeof(T) == sizeof(bfloat16);
  constexpr double kNearByte = narrow ? 0.14 : 0, kLostByte = narrow ? 0.1 : 0.04, kFarByte = narrow ? 0.1 : 0.08;
  constexpr double kFurtherByte = narrow ? 0.3 : 0.45, kFurthestByte = narrow ? 0.6 : 0.45;
  constexpr double kMappedByte = 4;  // whose pages are fresh at each call
  constexpr int64_t kNear = 1 << 20, kFar = 8 << 20, kFarOfMany = 5 << 19, kMapped = 32 << 20;
  const TurnRuns runs = turn_runs(g, input);
  const int64_t channels = g.groups * g.in_channels;
  const int64_t bytes = image_size(g) * static_cast<int64_t>(sizeof(T));
  const bool far = bytes > kFar || (narrow && bytes > kFarOfMany && g.batch * bytes > kShareOfL3);
  const double byte = bytes > kMapped           ? kMappedByte
                      : bytes > kFar            ? kFurthestByte
                      : far                     ? kFurtherByte
                      : bytes > kNear           ? kFarByte
                      : g.batch * bytes > kNear ? kLostByte
                                                : kNearByte;
  const double waits = byte * static_cast<double>(bytes) + parted_lines_cost<T>(g, input, bytes);
  return static_cast<double>(runs.slices * runs.rows) * turned_run_cost<T>(input, channels, runs.columns) + waits;
}

// Parts [first, last) of the images, each cut into `parts` by its channels. Runs that the kernel strides over become
// zeros.
template <class T>
void turn_images(const ConvPoolForward<T>& call, int64_t parts, int64_t first, int64_t last, T* to) {
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.input_layout;
  const TurnRuns runs = turn_runs(g, layout);
  const int64_t channels = g.groups * g.in_channels, pixel = call.plan.turned_layout.d[2];
  const auto is_met = [&](int d, int64_t i) { return (i + g.padding[d]) % g.stride[d] < g.kernel_extent(d); };
  for (int64_t part = first; part < last; ++part) {
    const int64_t image = part / parts, begin = round_up(channels * (part % parts) / parts, 32);
    const int64_t count = smaller(channels, round_up(channels * (part % parts + 1) / parts, 32)) - begin;
    if (count <= 0) continue;
    const T* from = call.input + image * layout.n + begin * layout.c;
    T* target = to + image * call.plan.turned_layout.n + begin;
    for (int64_t z = 0; z < runs.slices; ++z) {
      for (int64_t y = 0; y < runs.rows; ++y, target += runs.columns * pixel) {
        if ((runs.slices == 1 || is_met(0, z)) && (runs.rows == 1 || is_met(1, y))) {
          transpose_strided(from + z * layout.d[0] + y * layout.d[1], layout.c, layout.d[2], count, runs.columns,
                            target, pixel);
        } else if (count == channels) {
          fill_zeros(target, runs.columns * pixel - (pixel - channels));
        } else {
          for (int64_t x = 0; x < runs.columns; ++x) fill_zeros(target + x * pixel, count);
        }
      }
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
