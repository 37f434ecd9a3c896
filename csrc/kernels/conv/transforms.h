// Winograd's F(2, r) in one dimension: two neighbouring results of r taps from r + 1 multiplications.
//
// (A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, 2015.) The multiplications are of r + 1
// transformed taps and as many transformed pixels, one at each of the points 0, infinity, 1, -1, 2: as many of these
// as needed. What a point's product adds to the results is the same for any r, so that products of kernels of
// different lengths may be summed up first.
#pragma once

#include "../../simd/vec.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class V>
FASTNN_INLINE void transform_weight(const V (&g)[1], V (&u)[2]) {
  u[0] = u[1] = g[0];
}
template <class V>
FASTNN_INLINE void transform_weight(const V (&g)[2], V (&u)[3]) {
  u[0] = g[0];
  u[1] = g[1];
  u[2] = g[0] + g[1];
}
template <class V>
FASTNN_INLINE void transform_weight(const V (&g)[3], V (&u)[4]) {
  const V outer = g[0] + g[2];
  u[0] = g[0];
  u[1] = g[2];
  u[2] = (outer + g[1]) * 0.5f;
  u[3] = (outer - g[1]) * 0.5f;
}
template <class V>
FASTNN_INLINE void transform_weight(const V (&g)[4], V (&u)[5]) {
  constexpr float sixth = 1.0f / 6;
  const V even = g[0] + g[2], odd = g[1] + g[3];
  u[0] = g[0] * 0.5f;
  u[1] = g[3];
  u[2] = (even + odd) * 0.5f;
  u[3] = (even - odd) * sixth;
  u[4] = (g[0] + g[1] * 2.0f + g[2] * 4.0f + g[3] * 8.0f) * sixth;
}

template <class V>
FASTNN_INLINE void transform_input(const V (&d)[2], V (&v)[2]) {
  v[0] = d[0];
  v[1] = d[1];
}
template <class V>
FASTNN_INLINE void transform_input(const V (&d)[3], V (&v)[3]) {
  v[0] = d[0] - d[1];
  v[1] = d[2] - d[1];
  v[2] = d[1];
}
template <class V>
FASTNN_INLINE void transform_input(const V (&d)[4], V (&v)[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[3] - d[1];
  v[2] = d[1] + d[2];
  v[3] = d[2] - d[1];
}
template <class V>
FASTNN_INLINE void transform_input(const V (&d)[5], V (&v)[5]) {
  const V outer = d[3] - d[1];
  v[0] = (d[0] - d[2]) * 2.0f + outer;
  v[1] = d[4] - d[2] - outer * 2.0f;
  v[2] = d[1] * 2.0f + d[2] - d[3];
  v[3] = d[2] * 3.0f - d[1] * 2.0f - d[3];
  v[4] = outer;
}

// The results of products at F(2, 3)'s points.
template <class V>
FASTNN_INLINE void transform_results(const V (&m)[4], V (&y)[2]) {
  y[0] = m[0] + m[2] + m[3];
  y[1] = m[1] + m[2] - m[3];
}
// What the product at each point adds to the second of two results; to the first it adds itself, but for point 1.
constexpr float kOddShare[] = {0, 1, 1, -1, 2};

}  // namespace FASTNN_ISA
}  // namespace fastnn
