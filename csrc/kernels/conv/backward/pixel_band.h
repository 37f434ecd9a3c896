// A band of the gradient of the convolution's output with pixels in the lanes: [output channel][pixel], and zeros where
// no window has its winner. A pooled pixel costs a scalar store. Where nothing is pooled, each pixel has its gradient.
#pragma once

#include "sums.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class T>
class PixelBand {
  using C = Compute<T>;

 public:
  // Pixels have the numbers that they have in the window of the image. `memory` has the plan's step for each channel:
  // the pixels of a band, and one vector more, which takes the gradients that belong to other pixels.
  PixelBand(const ConvBackward<T>& call, C* memory)
      : call_(call), g_(call.geometry), memory_(memory), step_(call.plan->taps.step) {
    tiled_ = windows_are_tiles(g_);
    paired_ = tiled_ && g_.pool_kernel[2] == 2 && call.output_layout.d[2] == 1 && call.winners_layout.d[2] == 1;
    // Beyond every pixel.
    for (int64_t& place : places_) place = int64_t{1} << 40;
    for (int64_t place = 0; place < g_.places(); ++place) {
      const int64_t w = place % g_.pool_kernel[2], h = place / g_.pool_kernel[2] % g_.pool_kernel[1];
      const int64_t d = place / g_.pool_kernel[2] / g_.pool_kernel[1];
      places_[place] = number_of(d * g_.pool_dilation[0], h * g_.pool_dilation[1], w * g_.pool_dilation[2]);
    }
  }

  int64_t number_of(int64_t z, int64_t y, int64_t x) const {
    return z * call_.plan->image.d[0] + y * call_.plan->image.d[1] + x;
  }
  int64_t first_of(const ConvBox& box) const { return number_of(box.first[0], box.first[1], box.first[2]); }
  // How many numbers there are from a box's first pixel to behind its last one. A box of several rows has whole rows,
  // and a box of several slices has whole slices.
  int64_t span(const ConvBox& box) const { return number_of(box.size(0) - 1, box.size(1) - 1, box.size(2) - 1) + 1; }

  const C* channel(int64_t o) const { return memory_ + o * step_; }

  // The pixels of a box, in whole vectors, of the output channel numbered `channel`, to the band's `o`.
  void fill(int64_t image, int64_t channel, const ConvBox& box, int64_t o) const {
    const int64_t first = first_of(box), count = span(box);
    C* to = memory_ + o * step_;
    fill_zeros(to, round_up(count, kLanes<C>));
    const ConvLayout& gl = call_.output_layout;
    if (!call_.winners) return fill_dense(call_.grad_output + image * gl.n + channel * gl.c, box, to - first);
    const ConvBox windows = windows_of(g_, box);
    const ConvLayout& wl = call_.winners_layout;
    const T* gradients = call_.grad_output + image * gl.n + channel * gl.c;
    const uint8_t* winners = call_.winners + image * wl.n + channel * wl.c;
    for (int64_t z = windows.first[0]; z < windows.last[0]; ++z) {
      for (int64_t y = windows.first[1]; y < windows.last[1]; ++y) {
        const int64_t start = number_of(z * g_.pool_stride[0] - g_.pool_padding[0],
                                        y * g_.pool_stride[1] - g_.pool_padding[1], -g_.pool_padding[2]);
        const T* from = gradients + z * gl.d[0] + y * gl.d[1];
        const uint8_t* winner = winners + z * wl.d[0] + y * wl.d[1];
        if (tiled_) {
          // Windows that do not lie in the box as a whole are put one by one.
          const Range whole = paired_ ? whole_pairs(box) : Range{windows.first[2], windows.first[2]};
          put_row<false>(from, winner, windows.first[2], whole.first, start - first, count, to);
          put_pairs(from, winner, whole, z, y, box, to - first);
          put_row<false>(from, winner, whole.last, windows.last[2], start - first, count, to);
        } else {
          put_row<true>(from, winner, windows.first[2], windows.last[2], start - first, count, to);
        }
      }
    }
  }

  C sum(int64_t o, int64_t count) const {
    const C* from = channel(o);
    constexpr int chains = 4;  // sums that need not wait for each other
    Vec<C> total[chains] = {};
    for (int64_t p = 0; p < count; p += chains * kLanes<C>) {
      for (int i = 0; i < chains && p + i * kLanes<C> < count; ++i) total[i] += load(from + p + i * kLanes<C>);
    }
    return sum_lanes<C>((total[0] + total[1]) + (total[2] + total[3]));
  }

 private:
  // The same where nothing is pooled. `to` is where pixel 0 would be.
  void fill_dense(const T* gradients, const ConvBox& box, C* to) const {
    const ConvLayout& layout = call_.output_layout;
    for (int64_t z = box.first[0]; z < box.last[0]; ++z) {
      for (int64_t y = box.first[1]; y < box.last[1]; ++y) {
        const T* const from = gradients + z * layout.d[0] + y * layout.d[1] + box.first[2] * layout.d[2];
        C* const row = to + number_of(z, y, box.first[2]);
        if (layout.d[2] == 1) {
          copy_run(from, box.size(2), row);
        } else {
          for (int64_t x = 0; x < box.size(2); ++x) row[x] = to_compute(from[x * layout.d[2]]);
        }
      }
    }
  }

  // The windows of a row, which have two columns each, of which both columns lie in the box.
  Range whole_pairs(const ConvBox& box) const {
    const int64_t first = larger(0, divide_up(box.first[2] + g_.pool_padding[2], 2));
    return {first, larger(first, smaller(g_.output[2], (box.last[2] + g_.pool_padding[2]) / 2))};
  }

  // A vector of windows at a time: what each column of theirs gets, zipped. `to` is where pixel 0 would be.
  void put_pairs(const T* gradients, const uint8_t* winners, const Range& windows, int64_t z, int64_t y,
                 const ConvBox& box, C* to) const {
    for_each_covered_row(g_, z, y, box, [&](int64_t slice, int64_t row, int64_t place) {
      const Numbers<C> even_place = number<C>(place), odd_place = number<C>(place + 1);
      C* target = to + number_of(slice, row, 2 * windows.first - g_.pool_padding[2]);
      for (int64_t x = windows.first; x < windows.last; x += kLanes<C>, target += 2 * kLanes<C>) {
        const int64_t left = windows.last - x;
        const Numbers<C> winner = load_bytes_up_to<C>(winners + x, left);
        const Vec<C> gradient = load_up_to<T>(gradients + x, left);
        const Vec<C> even = winner == even_place ? gradient : Vec<C>{};
        const Vec<C> odd = winner == odd_place ? gradient : Vec<C>{};
        store_up_to<C>(target, zip_low<C>(even, odd), 2 * left);
        if (2 * left > kLanes<C>) {
          store_up_to<C>(target + kLanes<C>, zip_high<C>(even, odd), 2 * left - kLanes<C>);
        }
      }
    });
  }

  // There is no branch, since dead windows would make it hard to predict. What belongs to other pixels goes behind the
  // band's.
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

  const ConvBackward<T>& call_;
  const ConvPoolGeometry& g_;
  C* const memory_;
  const int64_t step_;
  bool tiled_;           // windows lie side by side, so that a pixel has one gradient
  bool paired_;          // and columns of windows, two pixels wide, in memory
  int64_t places_[256];  // of a window: how many pixels each lies behind the first
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
