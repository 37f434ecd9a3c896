// Sums of conv pixels by a matrix unit (simd/matrix.h): bfloat16, channels last.
//
// A block of numbers of neighbouring pixels is the left operand, as it lies in the copy of the input. The right operand
// is the pairs of the weight for as many outputs as a vector has lanes. A multiplication makes up to 16 x 16 x 32
// products. Sums are in float32; as in PyTorch's own kernels, denormals count as zero.
#pragma once

#include "../../simd/matrix.h"
#include "channels.h"

namespace fastnn {
namespace FASTNN_ISA {

#if defined(FASTNN_HAS_MATRIX)
// The pixels of a register tile in rows of `count` pixels.
FASTNN_INLINE int64_t matrix_pixels(int64_t count) {
  return divide_up(count, divide_up(count, kMatrixRows));
}

// Sums `tiles` tiles of conv pixels by `vectors` vectors of output channels: four tiles of sums at most.
template <int tiles, int vectors>
FASTNN_INLINE void matrix_tile(const DirectPlan& plan, const bfloat16* const (&from)[tiles], int64_t step,
                               const int64_t* offsets, const bfloat16x2* weight, const float* bias,
                               float* const (&to)[tiles]) {
  constexpr int64_t pixel = vectors * kMatrixRows * sizeof(float);  // bytes of one pixel, and of the weights of a pair
  const auto for_each_sum = [](const auto& body) __attribute__((always_inline)) {
    body(Constant<0>{}, Constant<0>{});
    if constexpr (vectors > 1) body(Constant<0>{}, Constant<1>{});
    if constexpr (tiles > 1) body(Constant<1>{}, Constant<0>{});
    if constexpr (tiles > 1 && vectors > 1) body(Constant<1>{}, Constant<1>{});
  };
  static_assert(tiles <= 2 && vectors <= 2, "there are four tiles of sums");
  for_each_sum([&](auto t, auto v) __attribute__((always_inline)) {
    load_tile<t.value * vectors + v.value>(bias + v.value * kMatrixRows, 0);
  });
  for (int64_t k = 0; k < plan.depth; ++k) {
    load_tile<6>(weight, pixel);
    if constexpr (vectors > 1) load_tile<7>(weight + kMatrixRows, pixel);
    for_each_sum([&](auto t, auto v) __attribute__((always_inline)) {
      if constexpr (v.value == 0) load_tile<4 + t.value>(from[t.value] + offsets[k], step);
      multiply_tiles<t.value * vectors + v.value, 4 + t.value, 6 + v.value>();
    });
    weight += plan.runs.numbers / 2 * vectors * kMatrixRows;
  }
  for_each_sum([&](auto t, auto v) __attribute__((always_inline)) {
    store_tile<t.value * vectors + v.value>(to[t.value] + v.value * kMatrixRows, pixel);
  });
}

template <int vectors>
void sum_pixels_by_matrix(const DirectPlan& plan, const bfloat16* pixels, int64_t step, int64_t count,
                          const int64_t* offsets, const bfloat16x2* weight, const float* bias, float* to) {
  const int64_t size = matrix_pixels(count), tiles = divide_up(count, size);
  // The last tile overlaps the one before.
  const auto first = [&](int64_t t) { return smaller(t * size, count - size); };
  const int64_t bytes = step * static_cast<int64_t>(sizeof(bfloat16));
  constexpr int64_t width = vectors * kMatrixRows;
  int64_t t = 0;
  for (; t + 2 <= tiles; t += 2) {
    const bfloat16* const from[2] = {pixels + first(t) * step, pixels + first(t + 1) * step};
    float* const sums[2] = {to + first(t) * width, to + first(t + 1) * width};
    matrix_tile<2, vectors>(plan, from, bytes, offsets, weight, bias, sums);
  }
  if (t == tiles) return;
  const bfloat16* const from[1] = {pixels + first(t) * step};
  float* const sums[1] = {to + first(t) * width};
  matrix_tile<1, vectors>(plan, from, bytes, offsets, weight, bias, sums);
}

// Sums `count` pixels, `step` apart, over the whole depth.
FASTNN_INLINE void sum_pixels_by_matrix(const DirectPlan& plan, int vectors, const bfloat16* pixels, int64_t step,
                                        int64_t count, const int64_t* offsets, const bfloat16x2* weight,
                                        const float* bias, float* to) {
  if (vectors == 2) return sum_pixels_by_matrix<2>(plan, pixels, step, count, offsets, weight, bias, to);
  sum_pixels_by_matrix<1>(plan, pixels, step, count, offsets, weight, bias, to);
}
#endif

}  // namespace FASTNN_ISA
}  // namespace fastnn
