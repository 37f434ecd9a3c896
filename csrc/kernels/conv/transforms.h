// Winograd's F(2, r) in one dimension: two neighbouring results of r taps from r + 1 multiplications; and F(4, 3), four
// of three taps from six.
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

// Computes the two results of F(2, 3) from the products at its four points.
template <class V>
FASTNN_INLINE void transform_results(const V (&m)[4], V (&y)[2]) {
  y[0] = m[0] + m[2] + m[3];
  y[1] = m[1] + m[2] - m[3];
}

// The transposes of the two functions above, for the gradient of the kernel. This one goes from the gradients of two
// results to the four points; the next one goes from sums of products at the points to three kernel positions.
template <class V>
FASTNN_INLINE void transform_gradient(const V (&y)[2], V (&m)[4]) {
  m[0] = y[0];
  m[1] = y[1];
  m[2] = y[0] + y[1];
  m[3] = y[0] - y[1];
}
template <class V>
FASTNN_INLINE void transform_sums(const V (&u)[4], V (&g)[3]) {
  const V even = (u[2] + u[3]) * 0.5f;
  g[0] = u[0] + even;
  g[1] = (u[2] - u[3]) * 0.5f;
  g[2] = u[1] + even;
}

// F(4, 3), at the points 0, 1, -1, 2, -2 and infinity.
template <class V>
FASTNN_INLINE void transform_weight(const V (&g)[3], V (&u)[6]) {
  constexpr float sixth = 1.0f / 6;
  const V near = g[0] + g[2], far = g[0] + g[2] * 4.0f, middle = g[1] * 2.0f;
  u[0] = g[0] * 0.25f;
  u[1] = (near + g[1]) * -sixth;
  u[2] = (near - g[1]) * -sixth;
  u[3] = (far + middle) * (sixth / 4);
  u[4] = (far - middle) * (sixth / 4);
  u[5] = g[2];
}
template <class V>
FASTNN_INLINE void transform_input(const V (&d)[6], V (&v)[6]) {
  const V even = d[4] - d[2] * 4.0f, odd = d[3] - d[1] * 4.0f;
  const V far_even = d[4] - d[2], far_odd = (d[3] - d[1]) * 2.0f;
  v[0] = d[0] * 4.0f - d[2] * 5.0f + d[4];
  v[1] = even + odd;
  v[2] = even - odd;
  v[3] = far_even + far_odd;
  v[4] = far_even - far_odd;
  v[5] = d[1] * 4.0f - d[3] * 5.0f + d[5];
}
template <class V>
FASTNN_INLINE void transform_results(const V (&m)[6], V (&y)[4]) {
  const V even = m[1] + m[2], odd = m[1] - m[2], far_even = m[3] + m[4], far_odd = m[3] - m[4];
  y[0] = m[0] + even + far_even;
  y[1] = odd + far_odd * 2.0f;
  y[2] = even + far_even * 4.0f;
  y[3] = odd + far_odd * 8.0f + m[5];
}

// The factor by which the product at each point counts in the second of two results. In the first result each product
// counts once, except the one at point 1.
constexpr float kOddShare[] = {0, 1, 1, -1, 2};

}  // namespace FASTNN_ISA
}  // namespace fastnn
