#include "batch_norm.h"

#include "../simd/activate.h"
#include "../simd/shuffle.h"
#include "gemm.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// Adds to sums[0] and sums[1] the sums of what `body` gives for each vector: two vectors, given where the vector begins
// and how many of its lanes count. Lanes beyond must be zero.
template <class T, class Body>
FASTNN_INLINE void add_two_sums(int64_t count, double* sums, const Body& body) {
  constexpr int64_t chains = 4, together = kLongestSum * kLanes<T>;
  for (int64_t first = 0; first < count; first += together) {
    const int64_t last = first + together < count ? first + together : count;
    Vec<T> one[chains] = {}, other[chains] = {};
    int64_t i = first;
    for (; i + chains * kLanes<T> <= last; i += chains * kLanes<T>) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < chains; ++c) body(i + c * kLanes<T>, kLanes<T>, one[c], other[c]);
    }
    for (; i < last; i += kLanes<T>) body(i, last - i, one[0], other[0]);
    sums[0] += sum_lanes<T>((one[0] + one[1]) + (one[2] + one[3]));
    sums[1] += sum_lanes<T>((other[0] + other[1]) + (other[2] + other[3]));
  }
}

// x - center, with zeros beyond the first `count` lanes.
template <class T>
FASTNN_INLINE Vec<T> deviation(const T* x, int64_t count, Vec<T> center) {
  if (count >= kLanes<T>) return load(x) - center;
  T lanes[kLanes<T>] = {};
  store_up_to<T>(lanes, load_up_to<T>(x, count) - center, count);
  return load(lanes);
}

template <class T>
void add_moments(const T* x, int64_t count, T center, double* sums) {
  const Vec<T> middle = broadcast<T>(center);
  add_two_sums<T>(count, sums,
                  [=](int64_t i, int64_t left, Vec<T>& sum, Vec<T>& squares) __attribute__((always_inline)) {
                    const Vec<T> d = deviation<T>(x + i, left, middle);
                    sum += d;
                    squares += d * d;
                  });
}

// Calls body(function) with the activation as an ActivationFunction. It knows only those that batch norm takes over,
// since each further one would be an instance of every kernel that nobody calls.
template <class T, class Body>
FASTNN_INLINE void with_bounds(const Activation& activation, const Body& body) {
  const auto [least, most] = bounds_of<T>(activation);
  if (activation.kind == ActivationKind::relu) return body(ActivationFunction<ActivationKind::relu, T>{});
  if (activation.kind == ActivationKind::hardtanh) {
    return body(ActivationFunction<ActivationKind::hardtanh, T>{least, most});
  }
  body(ActivationFunction<ActivationKind::identity, T>{});
}

// Returns the gradient of the activation's input, from the gradient of its output.
template <class T, class Function>
FASTNN_INLINE Vec<T> gradient_before(const Function& function, const T* gradient, const T* output, int64_t left) {
  const Vec<T> behind = load_up_to<T>(gradient, left);
  if constexpr (Function::kind == ActivationKind::identity) {
    return behind;
  } else {
    return function.gradient(behind, load_up_to<T>(output, left));
  }
}

template <class T>
void add_products(const T* gradient, const T* output, const Activation& activation, const T* x, int64_t count, T center,
                  double* sums) {
  const Vec<T> middle = broadcast<T>(center);
  with_bounds<T>(activation, [&](auto function) __attribute__((always_inline)) {
    add_two_sums<T>(count, sums,
                    [=](int64_t i, int64_t left, Vec<T>& sum, Vec<T>& products) __attribute__((always_inline)) {
                      const Vec<T> g = gradient_before(function, gradient + i, output + i, left);
                      sum += g;
                      products += g * deviation<T>(x + i, left, middle);
                    });
  });
}

template <class T>
void normalize(const T* x, const T* addend, int64_t count, T center, T b, T c, const Activation& activation, T* to) {
  const Vec<T> middle = broadcast<T>(center), shift = broadcast<T>(c);
  with_bounds<T>(activation, [&](auto function) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const int64_t left = count - i;
      Vec<T> y = (load_up_to<T>(x + i, left) - middle) * b + shift;
      if (addend) y += load_up_to<T>(addend + i, left);
      store_up_to<T>(to + i, function(y), left);
    }
  });
}

template <class T>
void combine(const T* gradient, const T* output, const Activation& activation, const T* x, int64_t count, T center, T a,
             T b, T c, T* to) {
  const Vec<T> middle = broadcast<T>(center), shift = broadcast<T>(c);
  with_bounds<T>(activation, [&](auto function) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const int64_t left = count - i;
      const Vec<T> d = load_up_to<T>(x + i, left) - middle;
      const Vec<T> g = gradient_before(function, gradient + i, output + i, left);
      store_up_to<T>(to + i, g * a + (d * b + shift), left);
    }
  });
}

template <class T>
constexpr BatchNormKernels<T> kernels() {
  return {add_moments<T>, add_products<T>, normalize<T>, combine<T>};
}

}  // namespace

extern const BatchNormTable batch_norm_kernels = {kernels<float>(), kernels<double>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
