// A band of the gradient of the convolution's output: the gradients of the pooled pixels, each at its winner, where
// windows overlap already summed. The whole of it is never laid out. A pooled pixel costs as many vector stores as its
// window has places in the band.
#pragma once

#include "sums.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class T>
class GradientBand {
  using C = Compute<T>;

 public:
  // `gradients` and `winners` are memory for some rows of pooled pixels.
  GradientBand(const ConvBackward<T>& call, Parts& memory)
      : call_(call), g_(call.geometry), width_(call.plan->band.width), tiled_(windows_are_tiles(g_)) {
    const int64_t row = larger(g_.output[2], kTogether) * width_;
    pixels_ = memory.take<C>(call.plan->band.pixels * width_);
    gradients_ = memory.take<C>(row);
    winners_ = memory.take<uint8_t>(row);
  }

  // Lays out `count` channels, the first of them `channel`, `step` apart. The lanes and pixels beyond are zero.
  void fill(int64_t image, int64_t channel, int64_t step, int64_t count, const ConvBox& box) {
    if (!call_.winners) return fill_dense(image, channel, step, count, box);
    // Windows that lie side by side write each pixel once, those that overlap add to it.
    bool covered = tiled_;
    for (int d = 0; d < 3; ++d) {
      covered = covered && box.last[d] + g_.pool_padding[d] <= g_.output[d] * g_.pool_stride[d];
    }
    const int64_t written = covered ? box.pixels() : 0;
    fill_zeros(pixels_ + written * width_, (round_up(box.pixels(), kLanes<C>) - written) * width_);
    if (count < width_) __builtin_memset(winners_, kDead, larger(g_.output[2], kTogether) * width_);
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
    const int64_t together = joined ? larger(1, kTogether / columns) : 1;
    for (int64_t z = first[0]; z < last[0]; ++z) {
      for (int64_t row = first[1]; row < last[1]; row += together) {
        const int64_t rows = smaller(together, last[1] - row);
        load_row(gradients + z * gl.d[0] + row * gl.d[1], gl.c * step, gl.d[2], count, rows * columns, gradients_);
        load_row(winners + z * wl.d[0] + row * wl.d[1], wl.c * step, wl.d[2], count, rows * columns, winners_);
        for (int64_t y = 0; y < rows; ++y) {
          find_rows(z, row + y, box);
          const int64_t at = y * columns * width_;
          if (tiled_) {
            put_row<false>(first[2], last[2], gradients_ + at, winners_ + at, box);
          } else {
            put_row<true>(first[2], last[2], gradients_ + at, winners_ + at, box);
          }
        }
      }
    }
  }

  // The same where nothing is pooled and each pixel has its gradient.
  void fill_dense(int64_t image, int64_t channel, int64_t step, int64_t count, const ConvBox& box) {
    const ConvLayout& layout = call_.output_layout;
    const int64_t written = count < width_ ? 0 : box.pixels(), columns = box.size(2);
    fill_zeros(pixels_ + written * width_, (round_up(box.pixels(), kLanes<C>) - written) * width_);
    // Rows that follow each other are loaded together.
    const bool joined = layout.d[1] == layout.d[2] * columns;
    const int64_t rows = joined ? box.size(1) : 1;
    C* to = pixels_;
    for (int64_t z = box.first[0]; z < box.last[0]; ++z) {
      for (int64_t y = box.first[1]; y < box.last[1]; y += rows, to += rows * columns * width_) {
        const T* const from = call_.grad_output + image * layout.n + channel * layout.c + z * layout.d[0] +
                              y * layout.d[1] + box.first[2] * layout.d[2];
        load_row(from, layout.c * step, layout.d[2], count, rows * columns, to);
      }
    }
  }

  // [pixel of the box][width]
  const C* pixels() const { return pixels_; }

  // Adds up the first `count` pixels, the longest sums of all, for each channel.
  void add_pixels(int64_t count, double* to) const {
    for (int64_t start = 0; start < count; start += kLongestSum) {
      const int64_t end = smaller(start + kLongestSum, count);
      for (int64_t c = 0; c < width_; c += kLanes<C>) {
        constexpr int chains = 4;  // sums that need not wait for each other
        Vec<C> total[chains] = {};
        int64_t p = start;
        for (; p + chains <= end; p += chains) {
          for (int i = 0; i < chains; ++i) total[i] += load(pixels_ + (p + i) * width_ + c);
        }
        for (; p < end; ++p) total[0] += load(pixels_ + p * width_ + c);
        const Vec<C> sum = (total[0] + total[1]) + (total[2] + total[3]);
        for (int i = 0; i < kLanes<C>; ++i) to[c + i] += sum[i];
      }
    }
  }

 private:
  static constexpr int64_t kTogether = 64;  // pooled pixels loaded at a time

  // A row of the box that a row of windows covers, and the window position of its first pixel.
  struct Row {
    C* pixels;
    int64_t place;
  };

  void find_rows(int64_t z, int64_t y, const ConvBox& box) {
    row_count_ = 0;
    for_each_covered_row(g_, z, y, box, [&](int64_t slice, int64_t row, int64_t place) {
      const int64_t at = (slice - box.first[0]) * box.size(1) + row - box.first[1];
      rows_[row_count_++] = {pixels_ + at * box.size(2) * width_, place};
    });
  }

  // `columns` pixels of `channels` elements to a row [column][width].
  template <class From, class To>
  void load_row(const From* from, int64_t channel_step, int64_t column_step, int64_t channels, int64_t columns,
                To* to) const {
    if (column_step == 1 && channel_step != 1)
      return transpose_matrix(from, channel_step, channels, columns, to, width_);
    for (int64_t x = 0; x < columns; ++x, from += column_step, to += width_) {
      if (channel_step == 1) {
        copy_few(from, channels, to);
      } else {
        for (int64_t c = 0; c < channels; ++c) to[c] = element(from[c * channel_step]);
      }
    }
  }
  static C element(T x) { return to_compute(x); }
  static uint8_t element(uint8_t x) { return x; }

  // Writes the gradients of a row of pooled pixels, [first, last), to the rows of the box, or adds them.
  template <bool adds>
  void put_row(int64_t first, int64_t last, const C* gradients, const uint8_t* winners, const ConvBox& box) {
    const int64_t step = g_.pool_dilation[2], size = box.size(2);
    for (int64_t x = first; x < last; ++x, gradients += width_, winners += width_) {
      const int64_t start = x * g_.pool_stride[2] - g_.pool_padding[2] - box.first[2];
      const int64_t first_place = start < 0 ? divide_up(-start, step) : 0;
      const int64_t last_place = smaller(g_.pool_kernel[2], divide_up(size - start, step));
      for (int64_t c = 0; c < width_; c += kLanes<C>) {
        const Numbers<C> winner = load_bytes_up_to<C>(winners + c, kLanes<C>);
        const Vec<C> gradient = load(gradients + c);
        for (int64_t r = 0; r < row_count_; ++r) {
          C* to = rows_[r].pixels + start * width_ + c;
          for (int64_t w = first_place; w < last_place; ++w) {
            C* pixel = to + w * step * width_;
            const Vec<C> here = winner == number<C>(rows_[r].place + w) ? gradient : Vec<C>{};
            store(pixel, adds ? load(pixel) + here : here);
          }
        }
      }
    }
  }

  const ConvBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const int64_t width_;
  const bool tiled_;
  C* pixels_;
  C* gradients_;      // some rows of pooled pixels, [column][width]
  uint8_t* winners_;  // the same
  Row rows_[kMostPlaces];
  int64_t row_count_ = 0;
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
