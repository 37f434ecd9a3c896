// Lines of images asked for before they are used.
#pragma once

#include "conv_common.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int64_t kLineBytes = 64;

// Where the numbers lie that products take, and from one to the next, in bytes: where channels lie apart, or come last.
template <bool last>
struct StepsAhead {
  const int64_t* offsets;  // of each product of an output
  int64_t pixel, channel;
};

// What a register tile of so many rows asks for while it is computed: with each product what the same one takes of
// pixels to come. More lines than can be on their way at once would be waited for.
template <int rows, bool last>
struct LinesAhead {
  StepsAhead<last> steps;  // from the tile's first product on
  const char* from[rows];  // each row's first pixel to come

  void start(int row, const char* pixel) { from[row] = pixel; }
  LinesAhead after(int64_t pixels) const {
    LinesAhead lines = *this;
    for (int r = 0; r < rows; ++r) lines.from[r] += pixels * steps.pixel;
    return lines;
  }

  // Of so many pixels the first and the last; where channels come last, whose line serves many products, one or two
  // after the other. Without branches, for which the compiler would keep sums in memory.
  template <int pixels, int channels>
  FASTNN_INLINE void ask_for(int64_t k) const {
    constexpr int products = kLineBytes / sizeof(float);  // of a line
    const int64_t first = last ? smaller(k % products, pixels - 1) : 0;
    const int64_t other = last ? pixels - products : pixels - 1;  // pixels further
    const int64_t offset = steps.offsets[k] + first * steps.pixel;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < (last ? 1 : channels); ++c) {
        const char* at = from[r] + offset + c * steps.channel;
        __builtin_prefetch(at, 0, 2);
        if (other > 0) __builtin_prefetch(at + other * steps.pixel, 0, 2);
      }
    }
  }
};
template <int rows, bool last>
LinesAhead<rows, last> lines_ahead(const StepsAhead<last>& steps, int64_t product) {
  return {{steps.offsets + product, steps.pixel, steps.channel}, {}};
}

// The same of a tile that asks for nothing.
struct NothingAhead {
  void start(int, const char*) {}
  NothingAhead after(int64_t) const { return *this; }
  template <int pixels, int channels>
  FASTNN_INLINE void ask_for(int64_t) const {}
};
template <int rows>
FASTNN_INLINE NothingAhead lines_ahead(NothingAhead, int64_t) {
  return {};
}

// Tiles of these elements may ask. Each kind has its share of the build's time.
template <class E>
constexpr bool kAsksAhead = false;
template <>
constexpr bool kAsksAhead<float> = true;
template <>
constexpr bool kAsksAhead<bfloat16x2> = true;

// The input that is next to be read, or copied, where a conv row has read: under the next windows. It is asked for
// where images do not stay in cache and there are not so many products that they hide how long it is on its way: of
// channels that lie apart, more of them than the hardware follows; of pixels, which it follows well, with few products.
template <class T>
class InputAhead {
 public:
  // Of a tile of elements E, which copies the input or leaves it in place; keeps its offsets in `memory`.
  template <class E>
  InputAhead(const ConvPoolGeometry& g, const ConvLayout& layout, bool copies, int64_t* memory, E)
      : g_(g), layout_(layout), copies_(copies), offsets_(memory), channels_(kChannels<E>) {
    constexpr int64_t kFar = 6 << 20, kMany = 32, kFarPixels = 12 << 20, kFew = 18;
    const int64_t vectors = smaller(2, divide_up(g.out_channels, kLanes<Compute<E>>));
    const int64_t products = vectors * g.taps() / (g.stride[0] * g.stride[1] * g.stride[2]);
    const int64_t bytes = g.batch * image_size(g) * channels_ * kSize;
    const bool asks = layout.c == 1 ? layout.d[2] * kSize >= kLineBytes && bytes > kFarPixels && products <= kFew
                                    : bytes > kFar && products <= kMany;
    asks_ = kAsksAhead<E> && asks;
  }

  bool asks() const { return asks_; }
  bool asks_for_pixels() const { return layout_.c == 1; }
  template <bool last>
  StepsAhead<last> steps() const {
    return {offsets_, g_.stride[2] * layout_.d[2] * kSize, layout_.c * kSize};
  }

  // Product k takes element c of a pixel under tap (d, h, w).
  void add_product(int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) const {
    if (!asks_) return;
    offsets_[k] = kSize * (c * channels_ * layout_.c + d * g_.dilation[0] * layout_.d[0] +
                           h * g_.dilation[1] * layout_.d[1] + w * g_.dilation[2] * layout_.d[2]);
  }

  // A band of windows of a slice. The first of its columns lies under conv row (0, 0) at `part`; from there it is so
  // far to the next columns, or the next image's.
  void start(const T* part, int64_t next_part, int64_t slice, Range band) {
    part_ = part;
    next_part_ = next_part;
    slice_ = slice;
    band_ = band;
  }

  // What is next where conv row (z, y) of the band has read; null if it is not asked for.
  const char* next(int64_t z, int64_t y) const {
    if (!asks_) return nullptr;
    const int64_t step = g_.pool_stride[1];
    // Conv rows that are taken before the next ones in their stead, and where the last such begin.
    int64_t first = band_.first * step, rows = (band_.last - band_.first) * step, last = (g_.output[1] - 1) * step;
    if (!copies_ && g_.pool_kernel[0] == 1) {  // one after the other
      first = y;
      rows = 1;
      last += g_.pool_extent(1) - 1;
    } else if (!copies_) {
      first = smaller(y / step * step, last);
      rows = step;
    }
    const int64_t next_slice = g_.pool_stride[0] * g_.stride[0] * layout_.d[0], row = g_.stride[1] * layout_.d[1];
    const int64_t further = first + rows <= last        ? rows * row
                            : slice_ + 1 < g_.output[0] ? next_slice - first * row
                                                        : next_part_ - slice_ * next_slice - first * row;
    return reinterpret_cast<const char*>(part_ + z * g_.stride[0] * layout_.d[0] + y * row + further);
  }

 private:
  static constexpr int64_t kSize = sizeof(T);
  const ConvPoolGeometry& g_;  // of the tile
  const ConvLayout& layout_;
  const bool copies_;
  int64_t* const offsets_;
  const int64_t channels_;  // of an element
  bool asks_;
  const T* part_ = nullptr;
  int64_t next_part_ = 0, slice_ = 0;
  Range band_ = {};  // rows of windows
};

// A row of an image that is about to be written.
struct RowLines {
  const char* row;                // of the first channel; null for none
  int64_t element, channel_step;  // in bytes
  int64_t channels;

  // Those that begin within pixels [first, first + count).
  FASTNN_INLINE void ask_for(int64_t first, int64_t count) const {
    const char *from = row + first * element, *past = from + count * element;
    if (!row || reinterpret_cast<uintptr_t>(from) / kLineBytes == reinterpret_cast<uintptr_t>(past) / kLineBytes)
      return;
    for (int64_t c = 0; c < channels; ++c) __builtin_prefetch(past + c * channel_step, 1, 3);
  }
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
