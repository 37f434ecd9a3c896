// The input of some channels (a block) as backward works on it: padded, [z][y][x][channel].
#pragma once

#include "conv_tile.h"

namespace fastnn {
namespace FASTNN_ISA {

// Fills in the image's strides, and returns how many elements it has: the padding before, and all that either the
// kernel or the input reaches to.
FASTNN_INLINE int64_t lay_out_image(const ConvPoolGeometry& g, int64_t lanes, int64_t (&d)[3]) {
  int64_t stride = lanes;
  for (int i = 2; i >= 0; --i) {
    d[i] = stride;
    stride *= larger((g.conv[i] - 1) * g.stride[i] + g.kernel_extent(i), g.padding[i] + g.input[i]);
  }
  return stride;
}

// Calls body(offset in the tensor, offset in the image) for the input's rows.
template <class Body>
FASTNN_INLINE void for_each_image_row(const ConvPoolGeometry& g, const ConvLayout& layout, const int64_t (&d)[3],
                                      const Body& body) {
  for (int64_t z = 0; z < g.input[0]; ++z) {
    for (int64_t y = 0; y < g.input[1]; ++y) {
      body(z * layout.d[0] + y * layout.d[1],
           (z + g.padding[0]) * d[0] + (y + g.padding[1]) * d[1] + g.padding[2] * d[2]);
    }
  }
}

// The block's `channels`, which begin at `input`. Padding and unused lanes are left alone.
template <class T>
void load_block(const ConvPoolGeometry& g, const T* input, const ConvLayout& layout, int64_t channels,
                const int64_t (&d)[3], Compute<T>* image) {
  const int64_t lanes = d[2];
  for_each_image_row(g, layout, d, [&](int64_t from, int64_t to) {
    if (lanes == 1) {
      copy_run(input + from, layout.d[2], g.input[2], image + to);
    } else if (layout.d[2] == 1 && layout.c != 1) {
      transpose_matrix(input + from, layout.c, channels, g.input[2], image + to, lanes);
    } else {
      for (int64_t w = 0; w < g.input[2]; ++w) {
        copy_run(input + from + w * layout.d[2], layout.c, channels, image + to + w * lanes);
      }
    }
  });
}

template <class T, class C = Compute<T>>
void store_block(const ConvPoolGeometry& g, const C* image, const int64_t (&d)[3], int64_t channels, T* output,
                 const ConvLayout& layout) {
  const int64_t lanes = d[2];
  for_each_image_row(g, layout, d, [&](int64_t to, int64_t from) {
    if (lanes == 1 && layout.d[2] == 1) {
      copy_out(image + from, g.input[2], output + to);
    } else if (layout.c == 1) {
      for (int64_t w = 0; w < g.input[2]; ++w) {
        copy_out(image + from + w * lanes, channels, output + to + w * layout.d[2]);
      }
    } else {
      transpose_matrix(image + from, lanes, g.input[2], channels, output + to, layout.c);
    }
  });
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
