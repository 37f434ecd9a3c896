// Movement between lanes: transposes and sums over several vectors at once. Include only from csrc/kernels.
#pragma once

#include "vec.h"

namespace fastnn {
namespace FASTNN_ISA {

template <int... index>
struct Indices {};
template <int count, int... index>
struct CountUp : CountUp<count - 1, count - 1, index...> {};
template <int... index>
struct CountUp<0, index...> {
  using Type = Indices<index...>;
};

// x0 y0 x1 y1 ... of the lanes from `first` on: half of each.
template <class T, int first, int... lane>
FASTNN_INLINE Vec<T> zip(Vec<T> x, Vec<T> y, Indices<lane...>) {
  constexpr int lanes = sizeof...(lane);
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, y, (first + lane / 2 + lane % 2 * lanes)...);
#else
  using Integer = typename IntegerOf<T>::Type;
  return __builtin_shuffle(x, y, Vec<Integer>{(first + lane / 2 + lane % 2 * lanes)...});
#endif
}
template <class T>
FASTNN_INLINE Vec<T> zip_low(Vec<T> x, Vec<T> y) {
  return zip<T, 0>(x, y, typename CountUp<kLanes<T>>::Type{});
}
template <class T>
FASTNN_INLINE Vec<T> zip_high(Vec<T> x, Vec<T> y) {
  return zip<T, kLanes<T> / 2>(x, y, typename CountUp<kLanes<T>>::Type{});
}

// x0 x2 ... y0 y2 ...
template <class T, int... lane>
FASTNN_INLINE Vec<T> every_second(Vec<T> x, Vec<T> y, Indices<lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, y, (2 * lane)...);
#else
  using Integer = typename IntegerOf<T>::Type;
  return __builtin_shuffle(x, y, Vec<Integer>{(2 * lane)...});
#endif
}
template <class T>
FASTNN_INLINE Vec<T> every_second(Vec<T> x, Vec<T> y) {
  return every_second<T>(x, y, typename CountUp<kLanes<T>>::Type{});
}

// Transposes a square of lanes in place: zipping row i with row i + half, log2(lanes) times over.
template <class T>
FASTNN_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int half = kLanes<T> / 2;
#pragma GCC unroll 4
  for (int round = 1; round < kLanes<T>; round *= 2) {
    Vec<T> next[kLanes<T>];
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      next[2 * i] = zip_low<T>(rows[i], rows[i + half]);
      next[2 * i + 1] = zip_high<T>(rows[i], rows[i + half]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) rows[i] = next[i];
  }
}

// Lane i of the result is the sum of the lanes of rows[i]: the transpose, added up on the way.
template <class T, int count>
FASTNN_INLINE Vec<T> sum_each(const Vec<T> (&rows)[count]) {
  if constexpr (count == 1) {
    return rows[0];
  } else {
    Vec<T> next[count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) {
      next[i] = zip_low<T>(rows[i], rows[i + count / 2]) + zip_high<T>(rows[i], rows[i + count / 2]);
    }
    return sum_each<T, count / 2>(next);
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
