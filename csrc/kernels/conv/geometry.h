// The sizes of a convolution with its pooling, and where the elements of its tensors lie.
#pragma once

#include <stdint.h>

namespace fastnn {

// The argmax of a window whose output has no gradient: the largest value is not above zero, or there is none.
constexpr uint8_t kDead = 255;
// The most elements of a window, so that an argmax fits into a byte.
constexpr int64_t kMostPlaces = 254;

// The places [first, last) along a dimension; none if `last` is not above `first`.
struct Inside {
  int64_t first, last;
};

// Dimensions are depth, height, width. A problem of fewer dimensions gets dimensions of size 1 in front.
struct ConvPoolGeometry {
  int64_t batch, groups;
  int64_t in_channels, out_channels;  // of one group
  int64_t input[3], kernel[3], stride[3], padding[3], dilation[3];
  int64_t padding_end[3];  // zeros behind the input, where torch has as many as in front: `padding`
  int64_t conv[3];         // the convolution's output, of which the last elements may be left out
  int64_t pool_kernel[3], pool_stride[3], pool_padding[3], pool_dilation[3];
  int64_t output[3];

  int64_t pixels() const { return output[0] * output[1] * output[2]; }
  int64_t places() const { return pool_kernel[0] * pool_kernel[1] * pool_kernel[2]; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t depth() const { return in_channels * taps(); }
  // Whether there is one row, as signals have.
  bool is_signal() const { return input[0] == 1 && input[1] == 1 && kernel[0] == 1 && kernel[1] == 1; }
  // Whether there are several groups, each with fewer input and fewer output channels than a vector has lanes.
  bool has_narrow_groups(int64_t lanes) const { return groups > 1 && in_channels < lanes && out_channels < lanes; }
  // Conv pixels from a window's first to its last, along one dimension.
  int64_t pool_extent(int d) const { return (pool_kernel[d] - 1) * pool_dilation[d] + 1; }
  // Whether a conv pixel may lie in two windows.
  bool has_overlapping_windows() const {
    return pool_extent(0) > pool_stride[0] || pool_extent(1) > pool_stride[1] || pool_extent(2) > pool_stride[2];
  }
  int64_t kernel_extent(int d) const { return (kernel[d] - 1) * dilation[d] + 1; }
  int64_t padded(int d) const { return input[d] + padding[d] + padding_end[d]; }
  // What `conv` is where nothing is left out.
  int64_t whole_conv(int d) const { return (padded(d) - kernel_extent(d)) / stride[d] + 1; }
  // Whether the convolution is one of torch's: see `padding_end` and `conv`.
  bool ends_as_in_torch() const {
    bool same = true;
    for (int d = 0; d < 3; ++d) same = same && padding[d] == padding_end[d] && conv[d] == whole_conv(d);
    return same;
  }
  // Whether any conv pixel reads the input at `at`, counted from where a conv pixel's input begins. Strides may skip
  // it.
  bool meets(int d, int64_t at) const {
    if (meets_all(d)) return true;
    for (int64_t k = 0; k < kernel[d]; ++k) {
      if ((at - k * dilation[d]) % stride[d] == 0) return true;
    }
    return false;
  }
  bool meets_all(int d) const { return stride[d] == 1 || (dilation[d] == 1 && kernel[d] >= stride[d]); }
  // The conv pixels for which one of the kernel's positions [first, last) lies inside the input. Some of them may be
  // beyond `conv`.
  Inside pixels_under(int d, int64_t first, int64_t last) const {
    const int64_t before = padding[d] - (last - 1) * dilation[d], room = input[d] + padding[d] - first * dilation[d];
    return {before > 0 ? (before + stride[d] - 1) / stride[d] : 0, room > 0 ? (room + stride[d] - 1) / stride[d] : 0};
  }
  // Whether each window is a conv pixel of its own.
  bool pools_nothing() const {
    return places() == 1 && output[0] == conv[0] && output[1] == conv[1] && output[2] == conv[2];
  }
};

// Where the elements of a (batch, channels, depth, height, width) tensor lie.
struct ConvLayout {
  int64_t n, c, d[3];
};

}  // namespace fastnn
