// The gradient of the convolution's output, laid out as a whole: for torch's own convolution, where that is faster at
// making the other gradients of it. Each conv pixel is written once.
#pragma once

#include "gradient_band.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class T>
class SpreadWorker {
  using C = Compute<T>;

 public:
  SpreadWorker(const ConvBackward<T>& call, Parts& memory)
      : call_(call),
        channels_(call.geometry.groups * call.geometry.out_channels),
        width_(call.plan->band.width),
        band_(call, memory) {
    bias_ = memory.take<double>(round_up(channels_, width_));
  }

  // Images [first, last) of the gradient, channels last and dense, and what they add to the bias's gradient.
  void run(int64_t first, int64_t last, T* to, double* grad_bias) {
    const ConvPoolGeometry& g = call_.geometry;
    fill_zeros(bias_, round_up(channels_, width_));
    for (int64_t image = first; image < last; ++image) {
      for (int64_t channel = 0; channel < channels_; channel += width_) {
        const int64_t count = smaller(width_, channels_ - channel);
        for_each_band(g, call_.plan->band, 2, 0, g.conv[2], [&](const ConvBox& box) {
          band_.fill(image, channel, 1, count, box);
          band_.add_pixels(box.pixels(), bias_ + channel);
          const C* from = band_.pixels();
          for (int64_t z = box.first[0]; z < box.last[0]; ++z) {
            for (int64_t y = box.first[1]; y < box.last[1]; ++y) {
              const int64_t pixel = ((image * g.conv[0] + z) * g.conv[1] + y) * g.conv[2] + box.first[2];
              T* row = to + pixel * channels_ + channel;
              for (int64_t x = 0; x < box.size(2); ++x, from += width_, row += channels_) copy_out(from, count, row);
            }
          }
        });
      }
    }
    add_bias(bias_, channels_, grad_bias);
  }

 private:
  const ConvBackward<T>& call_;
  const int64_t channels_, width_;
  GradientBand<T> band_;
  double* bias_;  // of each output channel
};

// The same where each window is one conv pixel and all tensors have the same layout: a gradient stays unless its output
// is dead.
template <class T>
void mask_dead(const T* gradient, const uint8_t* winners, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = winners[i] == kDead ? T{} : gradient[i];
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
