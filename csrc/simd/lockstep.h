// Several vectors in lockstep: each operation is done on all of them before the next. A chain of operations that wait
// for each other leaves the units idle, and a processor that looks ahead sees little more than one chain at a time.
//
// Include only from csrc/kernels.
#pragma once

#include "vec.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class T, int n>
struct Lockstep {
  Vec<T> part[n];
};

// As many vectors as fit into the registers together with what a formula needs for each.
constexpr int kTogether = FASTNN_VECTOR_REGISTERS / 8;

// Calls body(a vector of x, the vectors of the others at the same index) for each vector.
template <class Body, class T, int n, class... Others>
FASTNN_INLINE Lockstep<T, n> each(const Body& body, const Lockstep<T, n>& x, const Others&... others) {
  Lockstep<T, n> result;
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) result.part[i] = body(x.part[i], others.part[i]...);
  return result;
}

// Loads `rows` rows of `vectors` vectors, `stride` elements apart. Only the first `count` elements of a row exist, at
// least one of them in the last vector.
template <int rows, int vectors, class T>
FASTNN_INLINE Lockstep<Compute<T>, rows * vectors> load_rows(const T* from, int64_t stride, int64_t count) {
  Lockstep<Compute<T>, rows * vectors> result;
#pragma GCC unroll 8
  for (int i = 0; i < rows * vectors; ++i) {
    const int64_t within = i % vectors * kLanes<T>;
    result.part[i] = load_up_to<T>(from + i / vectors * stride + within, count - within);
  }
  return result;
}
template <int rows, int vectors, class T>
FASTNN_INLINE void store_rows(T* to, int64_t stride, const Lockstep<Compute<T>, rows * vectors>& x, int64_t count) {
#pragma GCC unroll 8
  for (int i = 0; i < rows * vectors; ++i) {
    const int64_t within = i % vectors * kLanes<T>;
    store_up_to<T>(to + i / vectors * stride + within, x.part[i], count - within);
  }
}

#define FASTNN_LOCKSTEP_OPERATOR(op)                                                                     \
  template <class T, int n>                                                                              \
  FASTNN_INLINE Lockstep<T, n> operator op(const Lockstep<T, n>& x, const Lockstep<T, n>& y) {           \
    return each([](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return Vec<T>(a op b); }, x, y); \
  }                                                                                                      \
  template <class T, int n>                                                                              \
  FASTNN_INLINE Lockstep<T, n> operator op(const Lockstep<T, n>& x, T y) {                               \
    return each([y](Vec<T> a) __attribute__((always_inline)) { return Vec<T>(a op y); }, x);             \
  }                                                                                                      \
  template <class T, int n>                                                                              \
  FASTNN_INLINE Lockstep<T, n> operator op(T x, const Lockstep<T, n>& y) {                               \
    return each([x](Vec<T> a) __attribute__((always_inline)) { return Vec<T>(x op a); }, y);             \
  }
FASTNN_LOCKSTEP_OPERATOR(+)
FASTNN_LOCKSTEP_OPERATOR(-)
FASTNN_LOCKSTEP_OPERATOR(*)
FASTNN_LOCKSTEP_OPERATOR(/)
#undef FASTNN_LOCKSTEP_OPERATOR

template <class T, int n>
FASTNN_INLINE Lockstep<T, n> multiply_add(const Lockstep<T, n>& x, const Lockstep<T, n>& y, const Lockstep<T, n>& z) {
  return each([](Vec<T> a, Vec<T> b, Vec<T> c) __attribute__((always_inline)) { return multiply_add(a, b, c); }, x, y,
              z);
}

template <class T, int n>
FASTNN_INLINE Lockstep<T, n> relu(const Lockstep<T, n>& x) {
  return each([](Vec<T> a) __attribute__((always_inline)) { return relu(a); }, x);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
