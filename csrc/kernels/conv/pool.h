// Pooling: a window's largest value, after ReLU or as it is, and its argmax, from conv pixels in cache.
//
// A window is a list of window positions, in the order of PyTorch's max-pool. At positions outside the convolution's
// output the conv pixels are minus infinity. The same code pools vectors of channels (the next window is one pixel-step
// away) and vectors of windows (the next one is a vector away).
#pragma once

#include "../../simd/activate.h"
#include "band.h"
#include "winner.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class C>
constexpr C kMinusInfinity = -static_cast<C>(__builtin_inf());

template <class C>
FASTNN_INLINE void fill(C* to, int64_t count, C value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// The bounds that the sums or the largest of them are kept between.
template <class T>
FASTNN_INLINE Bounds<Compute<T>> bounds_of(const ConvCall<T>& call) {
  return bounds_of<Compute<T>>(call.addend ? kIdentity : call.activation);
}

// Where the conv pixels of windows lie: position i of window w, vector v, is places[i][w * step + v * lanes].
template <class C>
struct Windows {
  const C* const* places;
  int64_t count;    // window positions
  int64_t step;     // elements from a window to the next
  int64_t to_step;  // elements from the result of a window to the next
  int64_t windows, vectors;
  Bounds<C> bounds;  // of the conv pixels, and so of the largest
};

// Pools windows, of `count` positions if that is not 0, assuming that no conv pixel is NaN. Returns false, having
// written wrong results, if one is NaN (or if infinities of both signs meet).
template <class C, int count, bool with_winners>
bool pool_finite(const Windows<C>& w, C* to, uint8_t* winners) {
  const int64_t places = count > 0 ? count : w.count;
  const Vec<C> least = broadcast<C>(w.bounds.least), most = broadcast<C>(w.bounds.most);
  Vec<C> total = {};  // NaN once a NaN has been seen
  for (int64_t window = 0; window < w.windows; ++window) {
    for (int64_t v = 0; v < w.vectors; ++v) {
      const int64_t at = window * w.step + v * kLanes<C>;
      const Vec<C> first = load(w.places[0] + at);
      // Only the first pixel is raised: a later pixel that is above it is not below the bound either.
      Vec<C> sum = first, best = larger_of(least, first);
      Numbers<C> winner = {};
#pragma GCC unroll 9
      for (int64_t i = 1; i < places; ++i) {
        const Vec<C> pixel = load(w.places[i] + at);
        sum += pixel;
        take_place<C, with_winners, false>(pixel, i, best, winner);
      }
      total += sum;
      const int64_t result = window * w.to_step + v * kLanes<C>;
      best = smaller_of(most, best);
      store(to + result, best);
      if (with_winners) store_winners<C>(best, winner, winners + result);
    }
  }
  return !has_nan<C>(total);
}

// Pools windows whatever the pixels are.
template <class C, bool with_winners>
void pool_any(const Windows<C>& w, C* to, uint8_t* winners) {
  const Vec<C> least = broadcast<C>(w.bounds.least), most = broadcast<C>(w.bounds.most);
  for (int64_t window = 0; window < w.windows; ++window) {
    for (int64_t v = 0; v < w.vectors; ++v) {
      const int64_t at = window * w.step + v * kLanes<C>;
      const int64_t result = window * w.to_step + v * kLanes<C>;
      Vec<C> best = larger_of(least, load(w.places[0] + at));
      Numbers<C> winner = {};
      for (int64_t i = 1; i < w.count; ++i) {
        take_place<C, with_winners, true>(load(w.places[i] + at), i, best, winner);
      }
      best = smaller_of(most, best);
      store(to + result, best);
      if (with_winners) store_winners<C>(best, winner, winners + result);
    }
  }
}

template <class C, bool with_winners, int64_t... counts>  // numbers of positions that have compiled instances
FASTNN_SHARED void pool_windows(const Windows<C>& w, C* to, uint8_t* winners) {
  bool done = false;
  const bool known =
      ((w.count == counts && ((done = pool_finite<C, counts, with_winners>(w, to, winners)), true)) || ...);
  if (!known) done = pool_finite<C, 0, with_winners>(w, to, winners);
  if (!done) pool_any<C, with_winners>(w, to, winners);
}

template <class C>
void pool_windows(const Windows<C>& w, C* to, uint8_t* winners) {
  winners ? pool_windows<C, true, 1, 2, 3, 4, 9>(w, to, winners)
          : pool_windows<C, false, 1, 2, 3, 4, 9>(w, to, nullptr);
}

// The positions of a window that lie on the convolution's output, along one dimension.
FASTNN_INLINE Inside places_inside(const ConvPoolGeometry& g, int d, int64_t pooled) {
  const int64_t start = pooled * g.pool_stride[d] - g.pool_padding[d], step = g.pool_dilation[d];
  const int64_t first = start < 0 ? divide_up(-start, step) : 0, room = g.conv[d] - start;
  return {first, room <= 0 ? 0 : smaller(g.pool_kernel[d], divide_up(room, step))};
}
FASTNN_INLINE bool is_empty(const ConvPoolGeometry& g, int d, int64_t pooled) {
  const Inside inside = places_inside(g, d, pooled);
  return inside.first >= inside.last;
}

// Calls body(x) for each of the windows [first, first + count) of a row that have nothing but padding. Without a conv
// row under them (`any` is false), these are all windows.
template <class Body>
FASTNN_INLINE void for_each_empty(const ConvPoolGeometry& g, int64_t first, int64_t count, bool any, const Body& body) {
  const int64_t stride = g.pool_stride[2], padding = g.pool_padding[2];
  // Windows before `inside` begin outside the row; windows from `outside` on end outside.
  const int64_t inside = any ? smaller(count, larger(0, divide_up(padding, stride) - first)) : count;
  const int64_t room = g.conv[2] + padding - g.pool_extent(2);
  const int64_t outside = larger(inside, room < 0 ? 0 : smaller(count, room / stride + 1 - first));
  for (int64_t x = 0; x < inside; ++x) {
    if (!any || is_empty(g, 2, first + x)) body(x);
  }
  for (int64_t x = outside; x < count; ++x) {
    if (is_empty(g, 2, first + x)) body(x);
  }
}

// Finds the rows of conv pixels under a row of windows, one for each slice and row of the window; where there is none,
// it is `outside`, a row of minus infinity. Calls make(z, y) for rows that the ring does not hold. Returns whether
// there is a row at all.
template <class C, class Make>
FASTNN_INLINE bool find_rows(const ConvPoolGeometry& g, const Ring<C>& ring, int64_t slice, int64_t row,
                             const C* outside, const C** rows, const Make& make) {
  const Inside in_depth = places_inside(g, 0, slice), in_height = places_inside(g, 1, row);
  bool any = false;
  for (int64_t i = 0; i < g.pool_kernel[0]; ++i) {
    const int64_t z = slice * g.pool_stride[0] - g.pool_padding[0] + i * g.pool_dilation[0];
    for (int64_t j = 0; j < g.pool_kernel[1]; ++j) {
      const int64_t y = row * g.pool_stride[1] - g.pool_padding[1] + j * g.pool_dilation[1];
      const bool inside = i >= in_depth.first && i < in_depth.last && j >= in_height.first && j < in_height.last;
      if (inside && !ring.holds(g, z, y)) {
        ring.mark(g, z, y);
        make(z, y);
      }
      rows[i * g.pool_kernel[1] + j] = inside ? ring.slot(z, y) : outside;
      any |= inside;
    }
  }
  return any;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
