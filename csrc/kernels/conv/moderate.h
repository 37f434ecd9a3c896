// Whether elements are so small that algorithms may transform them.
#pragma once

#include "band.h"

namespace fastnn {
namespace FASTNN_ISA {

// total + the squares of `count` elements side by side. They are scaled so that, if their sum is finite, no transform
// of such elements and no product of two transforms overflows.
template <class T, class C = Compute<T>>
Vec<C> add_squares(const T* from, int64_t count, Vec<C> total) {
  constexpr C scale = 1e4f;
  constexpr int chains = 4;  // sums that need not wait for each other
  Vec<C> part[chains] = {total};
  int64_t i = 0;
  for (; i + chains * kLanes<C> <= count; i += chains * kLanes<C>) {
    for (int p = 0; p < chains; ++p) {
      const Vec<C> value = load(from + i + p * kLanes<C>) * scale;
      part[p] = multiply_add(value, value, part[p]);
    }
  }
  for (; i < count; i += kLanes<C>) {
    const Vec<C> value = load_up_to<T>(from + i, count - i) * scale;
    part[0] = multiply_add(value, value, part[0]);
  }
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// The same for `count` parts of `size` elements, `step` apart.
template <class T, class C = Compute<T>>
Vec<C> add_squares_of_parts(const T* from, int64_t count, int64_t size, int64_t step, Vec<C> total) {
  if (step == size) return add_squares(from, count * size, total);
  for (int64_t i = 0; i < count; ++i) total = add_squares(from + i * step, size, total);
  return total;
}

// Whether no element of the input is so large that bfloat16's F(4x4) would carry errors into windows beside it.
// Transforms add up the pixels of a tile and subtract them again, which leaves 3e-7 of the largest (measured; F(2x2)
// leaves none): for 1e4 that is below the rounding of a bfloat16 number about 1.
template <class T>
bool is_small(const T* from, int64_t count, int64_t size, int64_t step) {
  using C = Compute<T>;
  constexpr C most = 1e4f;
  Vec<C> largest = {};
  for (int64_t part = 0; part < count; ++part) {
    for (int64_t i = 0; i < size; i += kLanes<C>) {
      const Vec<C> value = load_up_to<T>(from + part * step + i, size - i);
      largest = larger_of(largest, larger_of(value, -value));
    }
  }
  alignas(64) C lanes[kLanes<C>];
  store(lanes, largest);
  bool small = true;
  for (const C lane : lanes) small = small && lane <= most;
  return small;
}

// Whether `count` parts of `size` elements, `step` apart, are moderate: finite, and so small that transforms cannot
// make infinities of them.
template <class T>
bool are_moderate(const T* from, int64_t count, int64_t size, int64_t step) {
  using C = Compute<T>;
  const C sum = sum_lanes<C>(add_squares_of_parts(from, count, size, step, Vec<C>{}));
  return sum - sum == 0;
}

// Whether the input of a call, forward or backward, is moderate.
template <class T, template <class> class Call>
bool input_is_moderate(const Call<T>& call) {
  const ConvPoolGeometry& g = call.geometry;
  const int64_t image = g.groups * g.in_channels * g.input[0] * g.input[1] * g.input[2];
  return are_moderate(call.input, g.batch, image, call.input_layout.n) &&
         (sizeof(T) != sizeof(bfloat16) || is_small(call.input, g.batch, image, call.input_layout.n));
}

template <class T, template <class> class Call>
bool weight_is_moderate(const Call<T>& call) {
  const ConvPoolGeometry& g = call.geometry;
  return are_moderate(call.weight, g.groups * g.out_channels, g.depth(), call.weight_layout.n);
}

// The gradient of the output has images without gaps.
template <class T, template <class> class Call>
bool gradient_is_moderate(const Call<T>& call) {
  const ConvPoolGeometry& g = call.geometry;
  return are_moderate(call.grad_output, g.batch, g.groups * g.out_channels * g.pixels(), call.output_layout.n);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
