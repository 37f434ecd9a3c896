// Sums of gradients that stay accurate however many terms they have, and what is common to all algorithms of backward.
//
// Terms are added up in registers, at most kLongestSum at a time. Adding such a sum to a weight's gradient, which is
// larger, rounds away the sum's last digits. `lost`, which has as many elements as the gradient, keeps them.
#pragma once

#include "../copy.h"
#include "problem.h"

namespace fastnn {
namespace FASTNN_ISA {

// A few elements, for which a call of memcpy would be long.
template <class T, class E>
FASTNN_INLINE void copy_few(const T* from, int64_t count, E* to) {
  using C = Compute<T>;
  if constexpr (__is_same(E, C)) {
    for (int64_t i = 0; i < count; i += kLanes<C>)
      store_up_to<C>(to + i, load_up_to<T>(from + i, count - i), count - i);
  } else {
    __builtin_memcpy(to, from, count * sizeof(E));
  }
}
FASTNN_INLINE void copy_few(const uint8_t* from, int64_t count, uint8_t* to) {
  for (; count >= 16; count -= 16, from += 16, to += 16) __builtin_memcpy(to, from, 16);
  if (count > 0) store_bytes(to, load_bytes(from, count), count);
}

// to += total; what rounding takes from the sum goes to `lost`.
template <class C>
FASTNN_INLINE void add_keeping_lost(const Vec<C>& total, C* to, C* lost) {
  const Vec<C> before = load(to), sum = before + total, added = sum - before;
  store(to, sum);
  store(lost, load(lost) + ((before - (sum - added)) + (total - added)));
}

// Writes a vector of the weight's gradient, or adds to it if this is not the first part. `lost` may be null.
template <class C>
FASTNN_INLINE void put_sums(const Vec<C>& sums, bool is_first, C* to, C* lost) {
  if (is_first) {
    store(to, sums);
  } else if (lost) {
    add_keeping_lost(sums, to, lost);
  } else {
    store(to, load(to) + sums);
  }
}

// Adds what rounding took from the sums of a piece's blocks. For an infinite sum that is NaN, which is left out.
template <class T, class C = Compute<T>>
void add_lost(const ConvBackward<T>& call, const ConvBackwardPiece& piece, C* grad_weight, const C* lost) {
  const int64_t size = call.plan->weight_size / call.plan->blocks;
  for (int64_t i = piece.first_block * size; i < piece.last_block * size; ++i) {
    if (lost[i] == lost[i]) grad_weight[i] += lost[i];
  }
}

// Adds to the sums of `count` channels, `step` apart, of the bias's gradient. They are double, since each image adds to
// them, and there may be many images.
FASTNN_INLINE void add_bias(const double* from, int64_t count, double* to, int64_t step = 1) {
  for (int64_t o = 0; o < count; ++o) to[o * step] += from[o];
}

// A piece's conv pixels along the window's axis.
template <class T>
FASTNN_INLINE Range pixels_of(const ConvBackward<T>& call, const ConvBackwardPiece& piece) {
  const int64_t count = call.geometry.conv[call.plan->image.axis];
  return {count * piece.part / piece.parts, count * (piece.part + 1) / piece.parts};
}

// Part of the convolution's output: [first, last) along each dimension.
struct ConvBox {
  int64_t first[3], last[3];

  int64_t size(int d) const { return last[d] - first[d]; }
  int64_t pixels() const { return size(0) * size(1) * size(2); }
};

// Calls body(box) for each band of the conv pixels [first, last) along one dimension.
template <class Body>
FASTNN_INLINE void for_each_band(const ConvPoolGeometry& g, const GradientBandPlan& band, int axis, int64_t first,
                                 int64_t last, const Body& body) {
  ConvBox all;
  for (int d = 0; d < 3; ++d) {
    all.first[d] = d == axis ? first : 0;
    all.last[d] = d == axis ? last : g.conv[d];
  }
  const auto end = [&](int d, int64_t at) { return smaller(at + band.size[d], all.last[d]); };
  for (int64_t z = all.first[0]; z < all.last[0]; z += band.size[0]) {
    for (int64_t y = all.first[1]; y < all.last[1]; y += band.size[1]) {
      for (int64_t x = all.first[2]; x < all.last[2]; x += band.size[2]) {
        body(ConvBox{{z, y, x}, {end(0, z), end(1, y), end(2, x)}});
      }
    }
  }
}

// Whether windows share no pixel, and leave none out before the last.
FASTNN_INLINE bool windows_are_tiles(const ConvPoolGeometry& g) {
  for (int d = 0; d < 3; ++d) {
    if (g.pool_stride[d] != g.pool_kernel[d] || g.pool_dilation[d] != 1) return false;
  }
  return true;
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

// Calls body(row of the box from its first on, place of the window's first column there) for the rows of a box that a
// row of windows, (z, y), covers.
template <class Body>
FASTNN_INLINE void for_each_covered_row(const ConvPoolGeometry& g, int64_t z, int64_t y, const ConvBox& box,
                                        const Body& body) {
  for (int64_t d = 0; d < g.pool_kernel[0]; ++d) {
    const int64_t slice = z * g.pool_stride[0] - g.pool_padding[0] + d * g.pool_dilation[0];
    if (slice < box.first[0] || slice >= box.last[0]) continue;
    for (int64_t h = 0; h < g.pool_kernel[1]; ++h) {
      const int64_t row = y * g.pool_stride[1] - g.pool_padding[1] + h * g.pool_dilation[1];
      if (row < box.first[1] || row >= box.last[1]) continue;
      body(slice, row, (d * g.pool_kernel[1] + h) * g.pool_kernel[2]);
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
