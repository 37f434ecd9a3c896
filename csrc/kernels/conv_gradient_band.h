// A band of the gradient of the convolution's output: the gradients of the pooled pixels, each at its winner, where
// windows overlap already summed. The whole of it is never laid out.
#pragma once

#include "conv_common.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int64_t kBandBytes = 128 << 10;  // part of L2
constexpr int64_t kColumnsTogether = 64;   // pooled pixels loaded at a time

// Part of the convolution's output: [first, last) along each dimension.
struct ConvBox {
  int64_t first[3], last[3];

  int64_t size(int d) const { return last[d] - first[d]; }
  int64_t pixels() const { return size(0) * size(1) * size(2); }
};

// Whether windows share no pixel, and leave none out before the last.
FASTNN_INLINE bool windows_are_tiles(const ConvPoolGeometry& g, int d) {
  return g.pool_stride[d] == g.pool_kernel[d] && g.pool_dilation[d] == 1;
}

// The pooled pixels whose windows reach into a box; along some dimension there may be none.
FASTNN_INLINE ConvBox windows_of(const ConvPoolGeometry& g, const ConvBox& box) {
  ConvBox windows;
  for (int d = 0; d < 3; ++d) {
    const int64_t reach = box.first[d] + g.pool_padding[d] - g.pool_extent(d) + 1;
    windows.first[d] = reach > 0 ? divide_up(reach, g.pool_stride[d]) : 0;
    windows.last[d] = smaller(g.output[d], (box.last[d] - 1 + g.pool_padding[d]) / g.pool_stride[d] + 1);
  }
  return windows;
}

// How the convolution's output is cut into bands that hold `width` channels and, if that can be, at most `most` pixels.
template <class C>
struct BandShape {
  int64_t width;    // channels, in whole vectors
  int64_t size[3];  // of a band, at most
  int64_t pixels;   // of a band, in whole vectors

  BandShape(const ConvPoolGeometry& g, int64_t channels, int64_t most) : width(round_up(channels, kLanes<C>)) {
    const int64_t fit = kBandBytes / (larger(width, 1) * static_cast<int64_t>(sizeof(C)));
    int64_t room = larger(kLanes<C>, smaller(fit, most));
    for (int d = 2; d >= 0; --d) {
      size[d] = larger(1, smaller(g.conv[d], room));
      // No window should lie across two bands without need.
      if (size[d] < g.conv[d] && size[d] > g.pool_stride[d]) size[d] -= size[d] % g.pool_stride[d];
      room = size[d] < g.conv[d] ? 1 : room / size[d];
    }
    pixels = round_up(size[0] * size[1] * size[2], kLanes<C>);
  }

  // Calls body(box) for each band of the conv pixels [first, last) along one dimension.
  template <class Body>
  void for_each(const ConvPoolGeometry& g, int axis, int64_t first, int64_t last, const Body& body) const {
    ConvBox all;
    for (int d = 0; d < 3; ++d) {
      all.first[d] = d == axis ? first : 0;
      all.last[d] = d == axis ? last : g.conv[d];
    }
    for (int64_t z = all.first[0]; z < all.last[0]; z += size[0]) {
      for (int64_t y = all.first[1]; y < all.last[1]; y += size[1]) {
        for (int64_t x = all.first[2]; x < all.last[2]; x += size[2]) {
          body(ConvBox{{z, y, x},
                       {smaller(z + size[0], all.last[0]), smaller(y + size[1], all.last[1]),
                        smaller(x + size[2], all.last[2])}});
        }
      }
    }
  }
};

template <class T>
class GradientBand {
  using C = Compute<T>;

 public:
  // The bytes of `memory` that it needs.
  static int64_t memory_size(const ConvPoolGeometry& g, const BandShape<C>& shape) {
    const int64_t row = larger(g.output[2], kColumnsTogether) * shape.width;
    return round_up((shape.pixels * shape.width + row) * static_cast<int64_t>(sizeof(C)), 64) + round_up(row, 64);
  }

  GradientBand(const ConvPoolBackward<T>& call, const BandShape<C>& shape, void* memory)
      : call_(call), g_(call.geometry), width_(shape.width), pixels_(static_cast<C*>(memory)) {
    const int64_t row = larger(g_.output[2], kColumnsTogether) * width_;
    gradients_ = pixels_ + shape.pixels * width_;
    winners_ = reinterpret_cast<uint8_t*>(pixels_) +
               round_up((shape.pixels * width_ + row) * static_cast<int64_t>(sizeof(C)), 64);
  }

  // Lays out `count` channels, the first of them `channel`, `step` apart. The lanes and pixels beyond are zero.
  void fill(int64_t image, int64_t channel, int64_t step, int64_t count, const ConvBox& box) {
    // Windows that lie side by side write each pixel once, those that overlap add to it.
    bool tiled = true, covered = true;
    for (int d = 0; d < 3; ++d) {
      tiled = tiled && windows_are_tiles(g_, d);
      covered = covered && box.last[d] + g_.pool_padding[d] <= g_.output[d] * g_.pool_stride[d];
    }
    const int64_t written = tiled && covered ? box.pixels() : 0;
    fill_zeros(pixels_ + written * width_, (round_up(box.pixels(), kLanes<C>) - written) * width_);
    if (count < width_) __builtin_memset(winners_, kDead, larger(g_.output[2], kColumnsTogether) * width_);
    const ConvBox windows = windows_of(g_, box);
    const int64_t (&first)[3] = windows.first, (&last)[3] = windows.last;
    if (first[2] >= last[2]) return;
    const ConvLayout& gl = call_.output_layout;
    const ConvLayout& wl = call_.winners_layout;
    const T* gradients = call_.grad_output + image * gl.n + channel * gl.c + first[2] * gl.d[2];
    const uint8_t* winners = call_.winners + image * wl.n + channel * wl.c + first[2] * wl.d[2];
    // Short rows that follow each other are loaded together.
    const int64_t columns = last[2] - first[2];
    const bool joined = gl.d[1] == gl.d[2] * columns && wl.d[1] == wl.d[2] * columns;
    const int64_t together = joined ? larger(1, kColumnsTogether / columns) : 1;
    for (int64_t z = first[0]; z < last[0]; ++z) {
      for (int64_t row = first[1]; row < last[1]; row += together) {
        const int64_t rows = smaller(together, last[1] - row);
        load_row(gradients + z * gl.d[0] + row * gl.d[1], gl.c * step, gl.d[2], count, rows * columns, gradients_);
        load_row(winners + z * wl.d[0] + row * wl.d[1], wl.c * step, wl.d[2], count, rows * columns, winners_);
        for (int64_t y = 0; y < rows; ++y) {
          find_rows(z, row + y, box);
          const int64_t at = y * columns * width_;
          if (tiled) {
            put_row<false>(first[2], last[2], gradients_ + at, winners_ + at, box);
          } else {
            put_row<true>(first[2], last[2], gradients_ + at, winners_ + at, box);
          }
        }
      }
    }
  }

  // [pixel of the box][width]
  const C* pixels() const { return pixels_; }

  // Adds up the pixels [first, last), the longest sums of all, for each channel.
  void add_pixels(int64_t first, int64_t last, double* to) const {
    for (int64_t start = first; start < last; start += kLongestSum) {
      const int64_t end = smaller(start + kLongestSum, last);
      for (int64_t c = 0; c < width_; c += kLanes<C>) {
        Vec<C> total = {};
        for (int64_t p = start; p < end; ++p) total += load(pixels_ + p * width_ + c);
        for (int i = 0; i < kLanes<C>; ++i) to[c + i] += total[i];
      }
    }
  }

 private:
  // A row of the box that a row of windows covers, and the place of its first pixel in them.
  struct Row {
    C* pixels;
    int64_t place;
  };

  void find_rows(int64_t z, int64_t y, const ConvBox& box) {
    row_count_ = 0;
    for (int64_t d = 0; d < g_.pool_kernel[0]; ++d) {
      const int64_t slice = z * g_.pool_stride[0] - g_.pool_padding[0] + d * g_.pool_dilation[0];
      if (slice < box.first[0] || slice >= box.last[0]) continue;
      for (int64_t h = 0; h < g_.pool_kernel[1]; ++h) {
        const int64_t row = y * g_.pool_stride[1] - g_.pool_padding[1] + h * g_.pool_dilation[1];
        if (row < box.first[1] || row >= box.last[1]) continue;
        const int64_t at = (slice - box.first[0]) * box.size(1) + row - box.first[1];
        rows_[row_count_++] = {pixels_ + at * box.size(2) * width_, (d * g_.pool_kernel[1] + h) * g_.pool_kernel[2]};
      }
    }
  }

  // `columns` pixels of `channels` elements to a row [column][width].
  template <class From, class To>
  void load_row(const From* from, int64_t channel_step, int64_t column_step, int64_t channels, int64_t columns,
                To* to) const {
    if (column_step == 1 && channel_step != 1) {
      transpose_matrix(from, channel_step, channels, columns, to, width_);
    } else {
      for (int64_t x = 0; x < columns; ++x)
        copy_channels(from + x * column_step, channel_step, channels, to + x * width_);
    }
  }
  static void copy_channels(const T* from, int64_t step, int64_t count, C* to) { copy_run(from, step, count, to); }
  static void copy_channels(const uint8_t* from, int64_t step, int64_t count, uint8_t* to) {
    if (step == 1) {
      __builtin_memcpy(to, from, count);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
    }
  }

  // Writes the gradients of a row of pooled pixels, [first, last), to the rows of the box, or adds them.
  template <bool adds>
  void put_row(int64_t first, int64_t last, const C* gradients, const uint8_t* winners, const ConvBox& box) {
    const int64_t step = g_.pool_dilation[2], size = box.size(2);
    for (int64_t x = first; x < last; ++x, gradients += width_, winners += width_) {
      const int64_t start = x * g_.pool_stride[2] - g_.pool_padding[2] - box.first[2];
      const int64_t first_place = start < 0 ? divide_up(-start, step) : 0;
      const int64_t last_place = smaller(g_.pool_kernel[2], divide_up(size - start, step));
      for (int64_t c = 0; c < width_; c += kLanes<C>) {
        const Places<C> winner = load_bytes_up_to<C>(winners + c, kLanes<C>);
        const Vec<C> gradient = load(gradients + c);
        for (int64_t r = 0; r < row_count_; ++r) {
          C* to = rows_[r].pixels + start * width_ + c;
          for (int64_t w = first_place; w < last_place; ++w) {
            const Places<C> place = Places<C>{} + static_cast<typename IntegerOf<C>::Type>(rows_[r].place + w);
            C* pixel = to + w * step * width_;
            const Vec<C> here = winner == place ? gradient : Vec<C>{};
            store(pixel, adds ? load(pixel) + here : here);
          }
        }
      }
    }
  }

  const ConvPoolBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const int64_t width_;
  C* pixels_;
  C* gradients_;      // some rows of pooled pixels, [column][width]
  uint8_t* winners_;  // the same
  Row rows_[kMostPlaces];
  int64_t row_count_ = 0;
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
