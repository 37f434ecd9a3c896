// Backward's other way: the gradient of the convolution's output laid out in full, for the library's convolution.
#pragma once

#include "conv_pool_window.h"

namespace fastnn {
namespace FASTNN_ISA {

// The gradient of the convolution's output of images [first_image, last_image), dense in memory, channels first or
// last.
template <class T>
class GradientScatter {
 public:
  GradientScatter(const ConvPoolBackward<T>& call, T* to, const ConvLayout& layout)
      : call_(call), g_(call.geometry), to_(to), layout_(layout) {
    int64_t place = 0;
    for (int64_t d = 0; d < g_.pool_kernel[0]; ++d) {
      for (int64_t h = 0; h < g_.pool_kernel[1]; ++h) {
        for (int64_t w = 0; w < g_.pool_kernel[2]; ++w) {
          place_offsets_[place++] = d * g_.pool_dilation[0] * layout.d[0] + h * g_.pool_dilation[1] * layout.d[1] +
                                    w * g_.pool_dilation[2] * layout.d[2];
        }
      }
    }
  }

  void run(int64_t image) const {
    const int64_t channels = g_.groups * g_.out_channels;
    T* to = to_ + image * layout_.n;
    __builtin_memset(to, 0, channels * g_.conv[0] * g_.conv[1] * g_.conv[2] * sizeof(T));
    const bool channels_inside = layout_.c == 1;
    for (int64_t outer = 0; outer < (channels_inside ? 1 : channels); ++outer) {
      for (int64_t z = 0; z < g_.output[0]; ++z) {
        for (int64_t y = 0; y < g_.output[1]; ++y) {
          for (int64_t x = 0; x < g_.output[2]; ++x) {
            const int64_t at[3] = {z, y, x};
            int64_t gradient = image * call_.output_layout.n, winner = image * call_.winners_layout.n, start = 0;
            for (int d = 0; d < 3; ++d) {
              gradient += at[d] * call_.output_layout.d[d];
              winner += at[d] * call_.winners_layout.d[d];
              start += (at[d] * g_.pool_stride[d] - g_.pool_padding[d]) * layout_.d[d];
            }
            for (int64_t c = outer; c < (channels_inside ? channels : outer + 1); ++c) {
              add(call_.winners[winner + c * call_.winners_layout.c],
                  call_.grad_output[gradient + c * call_.output_layout.c], to + start + c * layout_.c);
            }
          }
        }
      }
    }
  }

 private:
  // The dead go where nobody looks: no branch to mispredict.
  FASTNN_INLINE void add(uint8_t place, T gradient, T* window) const {
    T nowhere = {};
    T* to = place == kDead ? &nowhere : window + place_offsets_[place];
    *to = from_compute<T>(to_compute(*to) + to_compute(gradient));
  }

  const ConvPoolBackward<T>& call_;
  const ConvPoolGeometry& g_;
  T* to_;
  const ConvLayout layout_;
  int64_t place_offsets_[256] = {};
};

template <class T>
void scatter(const ConvPoolBackward<T>& call, int64_t first_image, int64_t last_image, T* grad_conv,
             const ConvLayout& layout) {
  const GradientScatter<T> worker(call, grad_conv, layout);
  for (int64_t image = first_image; image < last_image; ++image) worker.run(image);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
