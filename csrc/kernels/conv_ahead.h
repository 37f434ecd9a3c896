// Lines of images whose channels come first, asked for before they are used: one of each channel is more than the
// hardware foresees.
#pragma once

#include "conv_common.h"

namespace fastnn {
namespace FASTNN_ISA {

// A row of an image.
struct RowLines {
  const char* row;                // of the first channel; null for none
  int64_t element, channel_step;  // in bytes
  int64_t channels;

  // Those that begin within pixels [first, first + count).
  template <bool to_write>
  FASTNN_INLINE void ask_for(int64_t first, int64_t count) const {
    constexpr uintptr_t line = 64;
    const char *from = row + first * element, *past = from + count * element;
    if (!row || reinterpret_cast<uintptr_t>(from) / line == reinterpret_cast<uintptr_t>(past) / line) return;
    for (int64_t c = 0; c < channels; ++c) __builtin_prefetch(past + c * channel_step, to_write, to_write ? 3 : 2);
  }
};

// Whether a conv row that is read in place asks for what the next one reads: strided kernels, and those of one tap,
// take little else to hide how long it is on its way, where the images do not stay in L2. A long row's lines the
// hardware foresees.
template <class E>
bool rows_are_asked_for(const ConvPoolGeometry& g, const ConvLayout& input) {
  constexpr int64_t kCache = 2 << 20, kFarCache = 8 << 20, kRow = 512, kMost = 512 << 10, size = sizeof(E);
  const int64_t row = g.input[2] * size, fresh = smaller(g.stride[1], g.kernel_extent(1));
  const bool single = g.taps() == 1;
  const bool hides_little = single ? g.out_channels > kLanes<Compute<E>> : g.stride[1] > 1;
  return input.c != 1 && input.d[2] == 1 && hides_little && row <= kRow &&
         g.kernel[0] * fresh * g.in_channels * row <= kMost &&
         g.batch * image_size(g) * size > (single ? kFarCache : kCache);
}
template <class E>
void ask_for_rows(const E* first, int64_t channels, int64_t channel_step, int64_t rows, int64_t row_step,
                  int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(E);
  const bool joined = row_step < columns + kLine;  // the line that a row begins in is the last of the row before it
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t row = 0; row < rows; ++row) {
      const E* from = first + c * channel_step + row * row_step;
      const int64_t in_line = reinterpret_cast<uintptr_t>(from) / sizeof(E) % kLine;
      for (int64_t x = joined && in_line > 0 ? kLine - in_line : 0; x < columns + (joined ? 0 : kLine - 1);
           x += kLine) {
        __builtin_prefetch(from + x, 0, 2);
      }
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
