// Lines of images asked for before they are used. Where channels come first, one of each channel is more than the
// hardware foresees; where they come last, that ends at the channels of a group, at the columns that a stride skips and
// at each page.
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

// Whether a conv row that is read in place asks for what the next one reads: strided kernels take little else to hide
// how long it is on its way, where the images do not stay in the cache. A long row's lines the hardware foresees.
template <class E>
bool rows_are_asked_for(const ConvPoolGeometry& g, const ConvLayout& input) {
  constexpr int64_t kCache = 12 << 20, kRow = 512, kMost = 128 << 10, size = sizeof(E);
  const int64_t row = g.input[2] * size, fresh = smaller(g.stride[1], g.kernel_extent(1));
  return input.c != 1 && input.d[2] == 1 && g.stride[1] > 1 && row <= kRow && g.batch * image_size(g) * size > kCache &&
         fresh * g.in_channels * row <= kMost;
}
template <class E>
void ask_for_rows(const E* first, int64_t channels, int64_t channel_step, int64_t rows, int64_t row_step,
                  int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(E);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t row = 0; row < rows; ++row) {
      const E* from = first + c * channel_step + row * row_step;
      for (int64_t x = 0; x < columns + kLine - 1; x += kLine) __builtin_prefetch(from + x, 0, 2);
    }
  }
}

// Rows of an image with channels last that the next conv row reads and this one does not.
template <class E>
struct RowsAhead {
  const E* row;  // under the first tap of the conv row's first pixel
  int64_t row_step, rows;
  int64_t pixel_step, pixel;  // from a conv pixel to the next; elements that it reads of a row and those before do not

  // Under conv pixels [first, first + count).
  FASTNN_INLINE void ask_for(int64_t first, int64_t count) const {
    constexpr int64_t line = 64 / sizeof(E);
    for (int64_t r = 0; r < rows; ++r) {
      const E* from = row + r * row_step + first * pixel_step;
      for (int64_t p = 0; p < count; ++p, from += pixel_step) {
        for (int64_t i = 0; i < pixel; i += line) __builtin_prefetch(from + i, 0, 2);
      }
    }
  }
};

// Those to be asked for while a conv row is made whose first tap is `corner`; none for images that stay in cache or
// whose pixels are less than a line.
template <class E>
RowsAhead<E> rows_ahead(const ConvPoolGeometry& g, const E* corner, int64_t channel_step, const int64_t (&step)[3]) {
  constexpr int64_t kLine = 64, kCache = 1 << 20, size = sizeof(E);
  const int64_t pixels = g.batch * g.input[0] * g.input[1] * g.input[2];
  if (channel_step != 1 || step[2] * size < kLine || pixels * step[2] * size <= kCache) return {};
  const int64_t extent = g.kernel_extent(1), fresh = smaller(g.stride[1], extent);
  const int64_t columns = smaller(g.stride[2], g.kernel_extent(2));
  return {corner + (g.stride[1] + extent - fresh) * step[1], step[1], fresh, g.stride[2] * step[2],
          (columns - 1) * step[2] + g.in_channels};
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
