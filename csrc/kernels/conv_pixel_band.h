// A band of the gradient of the convolution's output with pixels in the lanes: [output channel][pixel], and zeros where
// no window has its winner.
#pragma once

#include "conv_gradient_band.h"

namespace fastnn {
namespace FASTNN_ISA {

// The rows of a product with the weight's gradient that are made together (output channels).
template <class C>
int dot_rows(const ConvPoolGeometry& g) {
  const int64_t most = smaller(4, kLanes<C>);
  return static_cast<int>(g.out_channels >= most ? most : g.out_channels == 3 ? 4 : g.out_channels);
}

template <class T>
class PixelBand {
  using C = Compute<T>;

 public:
  // Numbers the pixels so that a row lies `row` behind the one before, a slice `slice`. Of each channel `memory` has
  // `step` elements: the pixels of a band, and a vector more, where gradients for others are put.
  PixelBand(const ConvPoolBackward<T>& call, int64_t slice, int64_t row, C* memory, int64_t step)
      : call_(call), g_(call.geometry), slice_(slice), row_(row), memory_(memory), step_(step) {
    tiled_ = true;
    for (int d = 0; d < 3; ++d) tiled_ = tiled_ && windows_are_tiles(g_, d);
    // Beyond every pixel.
    for (int64_t& place : places_) place = int64_t{1} << 40;
    for (int64_t place = 0; place < g_.places(); ++place) {
      const int64_t w = place % g_.pool_kernel[2], h = place / g_.pool_kernel[2] % g_.pool_kernel[1];
      const int64_t d = place / g_.pool_kernel[2] / g_.pool_kernel[1];
      places_[place] = number(d * g_.pool_dilation[0], h * g_.pool_dilation[1], w * g_.pool_dilation[2]);
    }
  }

  int64_t number(int64_t z, int64_t y, int64_t x) const { return z * slice_ + y * row_ + x; }
  int64_t first_of(const ConvBox& box) const { return number(box.first[0], box.first[1], box.first[2]); }
  // From a box's first pixel to behind its last one: boxes of several rows have whole ones, of slices too.
  int64_t span(const ConvBox& box) const { return number(box.size(0) - 1, box.size(1) - 1, box.size(2) - 1) + 1; }

  const C* channel(int64_t o) const { return memory_ + o * step_; }

  // The pixels of a box, in whole vectors, of the output channel numbered `channel`, to the band's `o`.
  void fill(int64_t image, int64_t channel, const ConvBox& box, int64_t o) const {
    const int64_t first = first_of(box), count = span(box);
    C* to = memory_ + o * step_;
    fill_zeros(to, round_up(count, kLanes<C>));
    const ConvBox windows = windows_of(g_, box);
    const ConvLayout& gl = call_.output_layout;
    const ConvLayout& wl = call_.winners_layout;
    const T* gradients = call_.grad_output + image * gl.n + channel * gl.c;
    const uint8_t* winners = call_.winners + image * wl.n + channel * wl.c;
    for (int64_t z = windows.first[0]; z < windows.last[0]; ++z) {
      for (int64_t y = windows.first[1]; y < windows.last[1]; ++y) {
        const int64_t start = number(z * g_.pool_stride[0] - g_.pool_padding[0],
                                     y * g_.pool_stride[1] - g_.pool_padding[1], -g_.pool_padding[2]);
        const T* from = gradients + z * gl.d[0] + y * gl.d[1];
        const uint8_t* winner = winners + z * wl.d[0] + y * wl.d[1];
        if (tiled_) {
          put_row<false>(from, winner, windows.first[2], windows.last[2], start - first, count, to);
        } else {
          put_row<true>(from, winner, windows.first[2], windows.last[2], start - first, count, to);
        }
      }
    }
  }

  C sum(int64_t o, int64_t count) const {
    const C* from = channel(o);
    Vec<C> total = {};
    for (int64_t p = 0; p < count; p += kLanes<C>) total += load(from + p);
    return sum_lanes<C>(total);
  }

 private:
  // Without a branch, which dead windows would make a costly one: what is not for these pixels goes behind them.
  template <bool adds>
  void put_row(const T* gradients, const uint8_t* winners, int64_t first, int64_t last, int64_t start, int64_t count,
               C* to) const {
    const int64_t gradient_step = call_.output_layout.d[2], winner_step = call_.winners_layout.d[2];
    for (int64_t x = first; x < last; ++x) {
      const int64_t pixel = start + x * g_.pool_stride[2] + places_[winners[x * winner_step]];
      const int64_t elsewhere = step_ - kLanes<C> + (x & (kLanes<C> - 1));
      const int64_t is_here = -static_cast<int64_t>(static_cast<uint64_t>(pixel) < static_cast<uint64_t>(count));
      C* at = to + (elsewhere ^ ((elsewhere ^ pixel) & is_here));
      const C gradient = to_compute(gradients[x * gradient_step]);
      *at = adds ? *at + gradient : gradient;
    }
  }

  const ConvPoolBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const int64_t slice_, row_;
  C* const memory_;
  const int64_t step_;
  bool tiled_;           // windows lie side by side, so that a pixel has one gradient
  int64_t places_[256];  // of a window: how many pixels each lies behind the first
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
