// The pooling half: a window's largest value, ReLU and winner, from rows of conv pixels in cache.
#pragma once

#include "conv_relu_max_pool.h"
#include "../simd/transpose.h"
#include "gemm.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kMostWindowSide = 3;        // rows, and columns, of windows that there is code for place by place
constexpr int64_t kLargestTogether = 32;  // conv pixels of a row whose largest values are kept at once

// Places in a window, as wide as what they are selected by.
template <class T>
using Places = Vec<typename IntegerOf<T>::Type>;

// [first, last)
struct Range {
  int64_t first, last;
};

// The places of a window that lie on the convolution's output, along one dimension.
FASTNN_INLINE Range places_inside(const ConvPoolGeometry& g, int d, int64_t pooled) {
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

// Rows of conv pixels, each kept until its slot is needed for another: `slices` x `rows` slots of `row_size` elements.
template <class C>
struct ConvRing {
  C* pixels;
  int64_t* tags;  // which conv row each slot holds
  int64_t slices, rows, row_size;

  void forget() const {
    for (int64_t i = 0; i < slices * rows; ++i) tags[i] = -1;
  }

  // The rows of conv pixels under a row of windows; returns how many. compute(z, y, to) is called for those that are
  // not held.
  template <class ComputeRow>
  FASTNN_INLINE int64_t find_rows(const ConvPoolGeometry& g, int64_t slice, int64_t row, WindowRow<C>* found,
                                  const ComputeRow& compute) const {
    const Range in_depth = places_inside(g, 0, slice), in_height = places_inside(g, 1, row);
    int64_t count = 0;
    for (int64_t i = in_depth.first; i < in_depth.last; ++i) {
      const int64_t z = slice * g.pool_stride[0] - g.pool_padding[0] + i * g.pool_dilation[0];
      for (int64_t j = in_height.first; j < in_height.last; ++j) {
        const int64_t y = row * g.pool_stride[1] - g.pool_padding[1] + j * g.pool_dilation[1];
        const int64_t slot = z % slices * rows + y % rows;
        C* to = pixels + slot * row_size;
        if (tags[slot] != z * g.conv[1] + y) {
          tags[slot] = z * g.conv[1] + y;
          compute(z, y, to);
        }
        found[count++] = {to, (i * g.pool_kernel[1] + j) * g.pool_kernel[2]};
      }
    }
    return count;
  }
};

// The running maximum of `vectors` vectors of one window.
template <class C, int vectors, bool with_winners>
struct WindowMaximum {
  Vec<C> best[vectors];
  Places<C> winner[vectors];

  // Later pixels are compared unrectified: above the rectified first one they are their own ReLU.
  FASTNN_INLINE void start(Vec<C> pixel, int64_t place, int v = 0) {
    best[v] = relu(pixel);
    if (with_winners) winner[v] = Places<C>{} + static_cast<typename IntegerOf<C>::Type>(place);
  }
  FASTNN_INLINE void add(Vec<C> pixel, int64_t place, int v = 0) {
    const auto wins = (pixel > best[v]) | (pixel != pixel);
    best[v] = wins ? pixel : best[v];
    if (with_winners) winner[v] = wins ? Places<C>{} + static_cast<typename IntegerOf<C>::Type>(place) : winner[v];
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

template <class C>
FASTNN_INLINE bool has_nan(Vec<C> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == sizeof(float)) {
    return _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q) != 0;
  } else {
    return _mm512_cmp_pd_mask((__m512d)x, (__m512d)x, _CMP_UNORD_Q) != 0;
  }
#else
  C lanes[kLanes<C>];
  store(lanes, x);
  bool found = false;
  for (C lane : lanes) found |= lane != lane;
  return found;
#endif
}

// `count` whole windows of rows x taps conv pixels, the first at rows[..].pixels + start, in the hope that none of
// them is NaN. Returns false, having written rubbish, when one is (or when infinities of both signs meet).
template <int row_count, int taps, class C, int vectors, bool with_winners>
bool pool_finite_windows(const WindowRow<C>* rows, int64_t start, int64_t tap_step, int64_t window_step, int64_t count,
                         C* to, uint8_t* winners) {
  constexpr int64_t pixel = vectors * kLanes<C>;
  using Place = typename IntegerOf<C>::Type;
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<C>)));
  const C* from[row_count];
  for (int r = 0; r < row_count; ++r) from[r] = rows[r].pixels + start;
  Vec<C> total[vectors] = {};  // NaN once a NaN has been seen
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const Vec<C> first = load(from[0] + v * kLanes<C>);
      Vec<C> sum = first, best = relu(first);  // of a window: windows need not wait for each other
      Places<C> winner = Places<C>{} + static_cast<Place>(rows[0].place);
#pragma GCC unroll 3
      for (int r = 0; r < row_count; ++r) {
#pragma GCC unroll 3
        for (int t = r == 0 ? 1 : 0; t < taps; ++t) {
          const Vec<C> value = load(from[r] + t * tap_step + v * kLanes<C>);
          sum += value;
          if (with_winners) winner = value > best ? Places<C>{} + static_cast<Place>(rows[r].place + t) : winner;
          best = larger_of(value, best);
        }
      }
      total[v] += sum;
      store(to + v * kLanes<C>, best);
      if (with_winners) {
        const Places<C> place = best <= Vec<C>{} ? Places<C>{} + kDead : winner;
        const Bytes bytes = __builtin_convertvector(place, Bytes);
        __builtin_memcpy(winners + v * kLanes<C>, &bytes, sizeof(bytes));
      }
    }
#pragma GCC unroll 3
    for (int r = 0; r < row_count; ++r) from[r] += window_step;
    to += pixel;
    if (with_winners) winners += pixel;
  }
  Vec<C> all = total[0];
  for (int v = 1; v < vectors; ++v) all += total[v];
  return !has_nan<C>(all);
}

// The windows [first, last) of any number of rows, of which only the values are wanted, in the same hope: the largest
// of each column's pixels first, which serves all windows that have the column.
template <class C, int vectors>
bool pool_finite_columns(const ConvPoolGeometry& g, const WindowRow<C>* rows, int64_t row_count, int64_t first_conv,
                         int64_t first, int64_t last, C* to) {
  constexpr int64_t pixel = vectors * kLanes<C>;
  C largest[kLargestTogether * pixel];
  const int64_t stride = g.pool_stride[2], padding = g.pool_padding[2], extent = g.pool_extent(2);
  const int64_t together = (kLargestTogether - extent) / stride + 1;
  Vec<C> total[vectors] = {};  // NaN once a NaN has been seen
  for (int64_t past; first < last; first = past) {
    past = smaller(last, first + together);
    const int64_t begin = larger(0, first * stride - padding);
    const int64_t columns = smaller(g.conv[2], (past - 1) * stride - padding + extent) - begin;
    const int64_t from = (begin - first_conv) * pixel;
    for (int64_t i = 0; i < columns * pixel; i += pixel) {
      Vec<C> sum[vectors], best[vectors];
      for (int v = 0; v < vectors; ++v) {
        sum[v] = load(rows[0].pixels + from + i + v * kLanes<C>);
        best[v] = relu(sum[v]);
      }
      for (int64_t r = 1; r < row_count; ++r) {
        for (int v = 0; v < vectors; ++v) {
          const Vec<C> value = load(rows[r].pixels + from + i + v * kLanes<C>);
          sum[v] += value;
          best[v] = larger_of(value, best[v]);
        }
      }
      for (int v = 0; v < vectors; ++v) {
        total[v] += sum[v];
        store(largest + i + v * kLanes<C>, best[v]);
      }
    }
    for (int64_t x = first; x < past; ++x, to += pixel) {
      const int64_t start = x * stride - padding;
      const bool is_whole = start >= 0 && start + extent <= g.conv[2];
      const Range places = is_whole ? Range{0, g.pool_kernel[2]} : places_inside(g, 2, x);
      if (places.first >= places.last) {
        write_empty_window<C, vectors>(to, nullptr);
        continue;
      }
      for (int v = 0; v < vectors; ++v) {
        const C* column = largest + (start - begin) * pixel + v * kLanes<C>;
        const int64_t step = g.pool_dilation[2] * pixel;
        Vec<C> best = load(column + places.first * step);
        for (int64_t t = places.first + 1; t < places.last; ++t) best = larger_of(load(column + t * step), best);
        store(to + v * kLanes<C>, best);
      }
    }
  }
  Vec<C> all = total[0];
  for (int v = 1; v < vectors; ++v) all += total[v];
  return !has_nan<C>(all);
}

// The windows [first, last) of a row, whatever they hold and wherever they lie.
template <class C, int vectors, bool with_winners>
void pool_any_windows(const ConvPoolGeometry& g, const WindowRow<C>* rows, int64_t row_count, int64_t first_conv,
                      int64_t first, int64_t last, C* to, uint8_t* winners) {
  constexpr int64_t pixel = vectors * kLanes<C>;
  const int64_t step = g.pool_dilation[2] * pixel;
  for (int64_t x = first; x < last; ++x, to += pixel, winners += with_winners ? pixel : 0) {
    const Range range = places_inside(g, 2, x);
    if (row_count == 0 || range.first >= range.last) {
      write_empty_window<C, vectors>(to, with_winners ? winners : nullptr);
      continue;
    }
    const int64_t start = (x * g.pool_stride[2] - g.pool_padding[2] - first_conv) * pixel;
    WindowMaximum<C, vectors, with_winners> window;
    for (int v = 0; v < vectors; ++v) {
      const int64_t lane = start + v * kLanes<C>;
      window.start(load(rows[0].pixels + lane + range.first * step), rows[0].place + range.first, v);
      for (int64_t r = 0; r < row_count; ++r) {
        for (int64_t p = range.first + (r == 0); p < range.last; ++p) {
          window.add(load(rows[r].pixels + lane + p * step), rows[r].place + p, v);
        }
      }
    }
    window.write(to, winners);
  }
}

// Whether windows of `row_count` rows are pooled column by column: where that takes fewer steps than place by place, or
// there is no code for so many places.
FASTNN_INLINE int64_t column_steps(const ConvPoolGeometry& g, int64_t row_count) {
  return row_count * g.pool_stride[2] + g.pool_kernel[2] + 1;
}
FASTNN_INLINE bool pools_columns(const ConvPoolGeometry& g, int64_t row_count) {
  if (g.pool_extent(2) > kLargestTogether || g.pool_stride[2] > g.pool_extent(2)) return false;
  const int64_t taps = g.pool_kernel[2];
  return row_count > kMostWindowSide || taps > kMostWindowSide || column_steps(g, row_count) < row_count * taps;
}

// One row of pooled pixels, [first, last), into `to` and `winners` (columns, vectors x lanes).
// rows[..].pixels point to the conv pixel `first_conv`.
template <class C, int vectors, bool with_winners>
FASTNN_SHARED void pool_row(const ConvPoolGeometry& g, const WindowRow<C>* rows, int64_t row_count, int64_t first_conv,
                            int64_t first, int64_t last, C* to, uint8_t* winners) {
  constexpr int64_t pixel = vectors * kLanes<C>;
  const int64_t stride = g.pool_stride[2], padding = g.pool_padding[2];
  // Windows that lie on the convolution's output whole.
  const int64_t room = g.conv[2] + padding - g.pool_extent(2);
  const int64_t whole_first = smaller(last, larger(first, divide_up(padding, stride)));
  const int64_t whole_last = smaller(last, larger(whole_first, room < 0 ? 0 : room / stride + 1));
  const int64_t at = (whole_first - first) * pixel;
  const int64_t start = (whole_first * stride - padding - first_conv) * pixel, whole = whole_last - whole_first;
  bool done = false;
  if (!with_winners && row_count >= 1 && pools_columns(g, row_count)) {
    if (pool_finite_columns<C, vectors>(g, rows, row_count, first_conv, first, last, to)) return;
  } else if (row_count >= 1 && row_count <= kMostWindowSide && g.pool_kernel[2] <= kMostWindowSide && whole > 0) {
    with_constant<kMostWindowSide>(static_cast<int>(row_count), [&](auto rows_constant) {
      with_constant<kMostWindowSide>(static_cast<int>(g.pool_kernel[2]), [&](auto taps_constant) {
        done = pool_finite_windows<decltype(rows_constant)::value, decltype(taps_constant)::value, C, vectors,
                                   with_winners>(rows, start, g.pool_dilation[2] * pixel, stride * pixel, whole,
                                                 to + at, winners + (with_winners ? at : 0));
      });
    });
  }
  if (!done)
    return pool_any_windows<C, vectors, with_winners>(g, rows, row_count, first_conv, first, last, to, winners);
  const int64_t rest = (whole_last - first) * pixel;
  pool_any_windows<C, vectors, with_winners>(g, rows, row_count, first_conv, first, whole_first, to, winners);
  pool_any_windows<C, vectors, with_winners>(g, rows, row_count, first_conv, whole_last, last, to + rest,
                                             winners + (with_winners ? rest : 0));
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
