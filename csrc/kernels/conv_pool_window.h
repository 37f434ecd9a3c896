// The pooling half: a window's largest value, ReLU and winner, from rows of conv pixels in cache.
#pragma once

#include "conv_relu_max_pool.h"
#include "../simd/transpose.h"

namespace fastnn {
namespace FASTNN_ISA {

FASTNN_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
FASTNN_INLINE int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}
FASTNN_INLINE int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Places in a window, as wide as what they are selected by.
template <class T>
using Places = Vec<typename IntegerOf<T>::Type>;

// The places of a window that lie on the convolution's output, along one dimension: [first, last).
struct PlaceRange {
  int64_t first, last;
};
FASTNN_INLINE PlaceRange places_inside(const ConvPoolGeometry& g, int d, int64_t pooled) {
  const int64_t start = pooled * g.pool_stride[d] - g.pool_padding[d];
  const int64_t step = g.pool_dilation[d];
  const int64_t first = start < 0 ? divide_up(-start, step) : 0;
  const int64_t room = g.conv[d] - start;
  const int64_t last = room <= 0 ? 0 : smaller(g.pool_kernel[d], divide_up(room, step));
  return {first, last};
}

// A row of conv pixels that a window covers, and the place of the row's first pixel in the window.
template <class C>
struct WindowRow {
  const C* pixels;
  int64_t place;
};

// The running maximum of `vectors` vectors of one window.
template <class C, int vectors, bool with_winners>
struct WindowMaximum {
  Vec<C> best[vectors];
  Places<C> winner[vectors];

  // Later pixels are compared unrectified: above the rectified first one they are their own ReLU.
  FASTNN_INLINE void start(const C* pixel, int64_t place) {
    for (int v = 0; v < vectors; ++v) {
      best[v] = relu(load(pixel + v * kLanes<C>));
      if (with_winners) winner[v] = Places<C>{} + static_cast<typename IntegerOf<C>::Type>(place);
    }
  }
  FASTNN_INLINE void add(const C* pixel, int64_t place) {
    for (int v = 0; v < vectors; ++v) {
      const Vec<C> value = load(pixel + v * kLanes<C>);
      const auto wins = (value > best[v]) | (value != value);
      best[v] = wins ? value : best[v];
      if (with_winners) {
        winner[v] = wins ? Places<C>{} + static_cast<typename IntegerOf<C>::Type>(place) : winner[v];
      }
    }
  }
  FASTNN_INLINE void write(C* to, uint8_t* winners) const {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes<C>)));
    for (int v = 0; v < vectors; ++v) {
      store(to + v * kLanes<C>, best[v]);
      if (with_winners) {
        const Places<C> dead = Places<C>{} + kDead;
        const Places<C> place = best[v] <= Vec<C>{} ? dead : winner[v];
        const Bytes bytes = __builtin_convertvector(place, Bytes);
        __builtin_memcpy(winners + v * kLanes<C>, &bytes, sizeof(bytes));
      }
    }
  }
};

template <class C, int vectors>
FASTNN_INLINE void write_empty_window(C* to, uint8_t* winners) {
  for (int i = 0; i < vectors * kLanes<C>; ++i) {
    to[i] = -static_cast<C>(__builtin_inf());
    if (winners) winners[i] = kDead;
  }
}

// One row of pooled pixels, [first, last), into `to` and `winners` (columns, vectors x lanes).
// rows[..].pixels point to the conv pixel `first_conv`.
template <class C, int vectors, bool with_winners>
void pool_row(const ConvPoolGeometry& g, const WindowRow<C>* rows, int64_t row_count, int64_t first_conv, int64_t first,
              int64_t last, C* to, uint8_t* winners) {
  constexpr int64_t pixel = vectors * kLanes<C>;
  const int64_t step = g.pool_dilation[2] * pixel;
  for (int64_t x = first; x < last; ++x, to += pixel, winners += with_winners ? pixel : 0) {
    const PlaceRange range = places_inside(g, 2, x);
    if (row_count == 0 || range.first >= range.last) {
      write_empty_window<C, vectors>(to, with_winners ? winners : nullptr);
      continue;
    }
    const int64_t start = (x * g.pool_stride[2] - g.pool_padding[2] - first_conv) * pixel;
    WindowMaximum<C, vectors, with_winners> window;
    window.start(rows[0].pixels + start + range.first * step, rows[0].place + range.first);
    for (int64_t p = range.first + 1; p < range.last; ++p) {
      window.add(rows[0].pixels + start + p * step, rows[0].place + p);
    }
    for (int64_t r = 1; r < row_count; ++r) {
      for (int64_t p = range.first; p < range.last; ++p) {
        window.add(rows[r].pixels + start + p * step, rows[r].place + p);
      }
    }
    window.write(to, winners);
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
