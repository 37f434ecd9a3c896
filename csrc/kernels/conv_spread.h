// The gradient of the convolution's output, laid out as a whole: for torch's own convolution, where that is faster at
// making the other gradients of it.
#pragma once

#include "conv_backward_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class C>
struct SpreadScratch {
  BandShape<C> shape;
  char* band;    // GradientBand's
  double* bias;  // of each output channel
  int64_t size;

  SpreadScratch(const ConvPoolGeometry& g, void* memory)
      : shape(g, divide_up(channels(g), divide_up(channels(g), kMostBandChannels)), g.conv[0] * g.conv[1] * g.conv[2]) {
    MemoryParts taken(memory);
    band = taken.take<char>(GradientBand<C>::memory_size(g, shape));
    bias = taken.take<double>(round_up(channels(g), shape.width));
    size = taken.used();
  }

  static int64_t channels(const ConvPoolGeometry& g) { return g.groups * g.out_channels; }
};

template <class C>
int64_t spread_scratch_size(const ConvPoolGeometry& g) {
  return SpreadScratch<C>(g, nullptr).size;
}

// Images [first, last) of the gradient, channels last and dense, and what they add to the bias's gradient.
template <class T, class C = Compute<T>>
void spread_gradients(const ConvPoolBackward<T>& call, int64_t first, int64_t last, T* to, C* grad_bias, void* memory) {
  const ConvPoolGeometry& g = call.geometry;
  const SpreadScratch<C> scratch(g, memory);
  const int64_t channels = scratch.channels(g), width = scratch.shape.width;
  GradientBand<T> band(call, scratch.shape, scratch.band);
  fill_zeros(scratch.bias, round_up(channels, width));
  for (int64_t image = first; image < last; ++image) {
    for (int64_t channel = 0; channel < channels; channel += width) {
      const int64_t count = smaller(width, channels - channel);
      scratch.shape.for_each(g, 2, 0, g.conv[2], [&](const ConvBox& box) {
        band.fill(image, channel, 1, count, box);
        band.add_pixels(0, box.pixels(), scratch.bias + channel);
        const C* from = band.pixels();
        for (int64_t z = box.first[0]; z < box.last[0]; ++z) {
          for (int64_t y = box.first[1]; y < box.last[1]; ++y, from += box.size(2) * width) {
            const int64_t pixel = ((image * g.conv[0] + z) * g.conv[1] + y) * g.conv[2] + box.first[2];
            T* row = to + pixel * channels + channel;
            if (width == channels) {
              copy_out(from, box.size(2) * channels, row);
            } else {
              for (int64_t x = 0; x < box.size(2); ++x) copy_out(from + x * width, count, row + x * channels);
            }
          }
        }
      });
    }
  }
  for (int64_t o = 0; o < channels; ++o) grad_bias[o] += static_cast<C>(scratch.bias[o]);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
