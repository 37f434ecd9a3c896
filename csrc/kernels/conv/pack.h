// The weight, packed: for each product of the depth, output channels side by side.
#pragma once

#include "copy.h"

namespace fastnn {
namespace FASTNN_ISA {

// The weight is dense: [output][channel][kernel position], or channels last.
template <class T>
FASTNN_INLINE bool weight_is_channels_last(const ConvCall<T>& call) {
  return call.geometry.in_channels > 1 && call.weight_layout.c == 1 && call.geometry.taps() > 1;
}

// Calls body(k, channel, slice, row, column of the kernel) in the order in which the weight lies, of `channels` of them
// (pairs of channels count as one).
template <class Body>
FASTNN_INLINE void for_each_tap(const ConvPoolGeometry& g, int64_t channels, bool channels_last, const Body& body) {
  int64_t k = 0;
  for (int64_t outer = 0; outer < (channels_last ? 1 : channels); ++outer) {
    for (int64_t d = 0; d < g.kernel[0]; ++d) {
      for (int64_t h = 0; h < g.kernel[1]; ++h) {
        for (int64_t w = 0; w < g.kernel[2]; ++w) {
          for (int64_t inner = 0; inner < (channels_last ? channels : 1); ++inner) body(k++, outer + inner, d, h, w);
        }
      }
    }
  }
}

// Outputs [output, output + count) -> to [depth][width], of which the first `count` elements of a row are written, and
// zeros behind them.
template <class E, class T>
void pack_outputs(const ConvCall<T>& call, int64_t output, int64_t count, E* to, int64_t width) {
  const ConvPoolGeometry& g = call.geometry;
  const int64_t row = g.depth();
  const T* from = call.weight + output * call.weight_layout.n;
  if constexpr (__is_same(E, Compute<E>)) {
    if (count < width) fill_zeros(to, row * width);
    transpose_matrix(from, call.weight_layout.n, count, row, to, width);
  } else {
    const bool last = weight_is_channels_last(call);
    const int64_t channels = divide_up(g.in_channels, 2), taps = g.taps();
    fill_zeros(to, channels * taps * width);
    for_each_tap(g, channels, last, [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
      const int64_t tap = (d * g.kernel[1] + h) * g.kernel[2] + w;
      const T* even = from + (last ? tap * g.in_channels + 2 * c : 2 * c * taps + tap);
      const T* odd = 2 * c + 1 < g.in_channels ? even + (last ? 1 : taps) : nullptr;
      for (int64_t o = 0; o < count; ++o) {
        to[k * width + o].even = even[o * call.weight_layout.n];
        if (odd) to[k * width + o].odd = odd[o * call.weight_layout.n];
      }
    });
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
