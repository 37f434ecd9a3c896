#include "batch_norm.h"

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

// A gradient, zero where the output lies on a bound or beyond. `output` may be null. Comparisons to NaN fail, so that
// NaN is no bound, and an output that is NaN lets the gradient pass.
template <class T>
struct MaskedGradient {
  const T *gradient, *output;
  Vec<T> least, most;

  MaskedGradient(const T* gradient, const T* output, T least, T most)
      : gradient(gradient), output(output), least(broadcast<T>(least)), most(broadcast<T>(most)) {}
  FASTNN_INLINE Vec<T> at(int64_t i, int64_t left) const {
    const Vec<T> g = load_up_to<T>(gradient + i, left);
    if (!output) return g;
    const Vec<T> y = load_up_to<T>(output + i, left), above = y <= least ? Vec<T>{} : g;
    return y >= most ? Vec<T>{} : above;
  }
};

template <class T>
void add_products(const T* gradient, const T* output, const T* x, int64_t count, T center, T least, T most,
                  double* sums) {
  const Vec<T> middle = broadcast<T>(center);
  const MaskedGradient<T> masked(gradient, output, least, most);
  add_two_sums<T>(count, sums,
                  [=](int64_t i, int64_t left, Vec<T>& sum, Vec<T>& products) __attribute__((always_inline)) {
                    const Vec<T> g = masked.at(i, left);
                    sum += g;
                    products += g * deviation<T>(x + i, left, middle);
                  });
}

template <class T>
void normalize(const T* x, const T* addend, int64_t count, T center, T b, T c, T least, T most, T* to) {
  const Vec<T> middle = broadcast<T>(center), shift = broadcast<T>(c);
  const Vec<T> low = broadcast<T>(least), high = broadcast<T>(most);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t left = count - i;
    Vec<T> y = (load_up_to<T>(x + i, left) - middle) * b + shift;
    if (addend) y += load_up_to<T>(addend + i, left);
    y = y < low ? low : y;
    store_up_to<T>(to + i, y > high ? high : y, left);
  }
}

template <class T>
void combine(const T* gradient, const T* output, const T* x, int64_t count, T center, T a, T b, T c, T least, T most,
             T* to) {
  const Vec<T> middle = broadcast<T>(center), shift = broadcast<T>(c);
  const MaskedGradient<T> masked(gradient, output, least, most);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t left = count - i;
    const Vec<T> d = load_up_to<T>(x + i, left) - middle;
    store_up_to<T>(to + i, masked.at(i, left) * a + (d * b + shift), left);
  }
}

template <class T>
constexpr BatchNormKernels<T> kernels() {
  return {add_moments<T>, add_products<T>, normalize<T>, combine<T>};
}

}  // namespace

extern const BatchNormTable batch_norm_kernels = {kernels<float>(), kernels<double>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
