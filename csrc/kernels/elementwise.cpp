#include "elementwise.h"

#include <math.h>

#include "../simd/math.h"
#include "../simd/transpose.h"
#include "gemm.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// The numbers of a vector's lanes.
template <class T>
struct LaneNumbers {
  T lanes[kLanes<T>];
  constexpr LaneNumbers() : lanes{} {
    for (int i = 0; i < kLanes<T>; ++i) lanes[i] = static_cast<T>(i);
  }
};

template <BinaryKind kind, class T>
FASTNN_INLINE Vec<T> combine(Vec<T> x, Vec<T> y) {
  if constexpr (kind == BinaryKind::add) return x + y;
  if constexpr (kind == BinaryKind::sub) return x - y;
  if constexpr (kind == BinaryKind::mul) return x * y;
  if constexpr (kind == BinaryKind::div) return x / y;
  // If either is NaN, the result is NaN.
  if constexpr (kind == BinaryKind::maximum) return ((x > y) | (x != x)) ? x : y;
  if constexpr (kind == BinaryKind::minimum) return ((x < y) | (x != x)) ? x : y;
  const Vec<T> one = broadcast<T>(1), zero = {};
  if constexpr (kind == BinaryKind::lt) return x < y ? one : zero;
  if constexpr (kind == BinaryKind::le) return x <= y ? one : zero;
  if constexpr (kind == BinaryKind::gt) return x > y ? one : zero;
  if constexpr (kind == BinaryKind::ge) return x >= y ? one : zero;
  if constexpr (kind == BinaryKind::eq) return x == y ? one : zero;
  if constexpr (kind == BinaryKind::ne) return x != y ? one : zero;
}

template <BinaryKind kind, class T>
FASTNN_INLINE void combine_all(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t count, T* to) {
  const auto run = [&](auto left, auto right) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      store_up_to<T>(to + i, combine<kind, T>(left(i), right(i)), count - i);
    }
  };
  const auto all_of = [count](const T* from) {
    return [from, count](int64_t i) __attribute__((always_inline)) { return load_up_to<T>(from + i, count - i); };
  };
  const auto one_of = [](const T* from) {
    return [x = broadcast<T>(*from)](int64_t) __attribute__((always_inline)) { return x; };
  };
  if (count <= 0) return;
  if (a_step && b_step) return run(all_of(a), all_of(b));
  if (a_step) return run(all_of(a), one_of(b));
  if (b_step) return run(one_of(a), all_of(b));
  run(one_of(a), one_of(b));
}

template <class T>
void binary(BinaryKind kind, const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t count, T* to) {
  switch (kind) {
#define FASTNN_CASE(name) \
  case BinaryKind::name:  \
    return combine_all<BinaryKind::name>(a, a_step, b, b_step, count, to);
    FASTNN_FOR_EACH_BINARY(FASTNN_CASE)
#undef FASTNN_CASE
  }
}

template <class T>
void where(const T* condition, const T* a, const T* b, const int64_t* steps, int64_t count, T* to) {
  const auto elements = [count](const T* from, int64_t step, int64_t i) __attribute__((always_inline)) {
    return step ? load_up_to<T>(from + i, count - i) : broadcast<T>(*from);
  };
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> chooses = elements(condition, steps[0], i), zero = {};
    store_up_to<T>(to + i, chooses != zero ? elements(a, steps[1], i) : elements(b, steps[2], i), count - i);
  }
}

template <class T>
void sum_rows(const T* from, int64_t rows, int64_t step, int64_t count, T factor, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t left = count - i;
    Vec<T> all = {};
    for (int64_t first = 0; first < rows; first += kLongestSum) {
      const int64_t last = first + kLongestSum < rows ? first + kLongestSum : rows;
      Vec<T> some = {};
      for (int64_t r = first; r < last; ++r) some += load_up_to<T>(from + r * step + i, left);
      all += some;
    }
    store_up_to<T>(to + i, all * factor, left);
  }
}

template <class T>
void prelu(const T* from, const T* slopes, int64_t step, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> x = load_up_to<T>(from + i, count - i), zero = {};
    const Vec<T> slope = step ? load_up_to<T>(slopes + i, count - i) : broadcast<T>(*slopes);
    store_up_to<T>(to + i, x > zero ? x : slope * x, count - i);
  }
}

template <class T>
T sum(const T* from, int64_t count) {
  constexpr int64_t together = kLongestSum * kLanes<T>;
  Vec<T> all = {};
  for (int64_t first = 0; first < count; first += together) {
    const int64_t last = first + together < count ? first + together : count;
    Vec<T> some = {};
    for (int64_t i = first; i < last; i += kLanes<T>) some += load_up_to<T>(from + i, last - i);
    all += some;
  }
  return sum_lanes<T>(all);
}

// The first `count` lanes, and `others` in the others.
template <class T>
FASTNN_INLINE Vec<T> first_lanes_of(Vec<T> x, int64_t count, T others = 0) {
  constexpr LaneNumbers<T> numbers;
  return load(numbers.lanes) < static_cast<T>(count) ? x : broadcast<T>(others);
}

template <class T>
void largest(const T* const* places, int64_t count, int64_t step, int64_t windows, int64_t channels, T* to,
             int64_t to_step) {
  for (int64_t w = 0; w < windows; ++w) {
    for (int64_t i = 0; i < channels; i += kLanes<T>) {
      Vec<T> best = broadcast<T>(-static_cast<T>(__builtin_inf()));
      for (int64_t p = 0; p < count; ++p) {
        const Vec<T> x = load_up_to<T>(places[p] + w * step + i, channels - i);
        best = ((x > best) | (x != x)) ? x : best;
      }
      store_up_to<T>(to + w * to_step + i, best, channels - i);
    }
  }
}

template <class T>
void average(const T* const* places, int64_t count, int64_t step, int64_t windows, int64_t channels, T factor, T* to,
             int64_t to_step) {
  for (int64_t w = 0; w < windows; ++w) {
    for (int64_t i = 0; i < channels; i += kLanes<T>) {
      Vec<T> total = {};
      for (int64_t p = 0; p < count; ++p) total += load_up_to<T>(places[p] + w * step + i, channels - i);
      store_up_to<T>(to + w * to_step + i, total * factor, channels - i);
    }
  }
}

// The larger of two, or NaN if either is NaN.
template <class V>
FASTNN_INLINE V larger_or_nan(V x, V y) {
  return ((x > y) | (x != x)) ? x : y;
}

template <class T>
T softmax(const T* from, T factor, const T* added, int64_t count, bool logarithm, T* to) {
  const T lowest = -static_cast<T>(__builtin_inf());
  Vec<T> most = broadcast<T>(lowest);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t left = count - i;
    Vec<T> x = load_up_to<T>(from + i, left) * factor;
    if (added) x += load_up_to<T>(added + i, left);
    store_up_to<T>(to + i, x, left);
    most = larger_or_nan(left < kLanes<T> ? first_lanes_of<T>(x, left, lowest) : x, most);
  }
  T lanes[kLanes<T>];
  store(lanes, most);
  T highest = lanes[0];
  for (int i = 1; i < kLanes<T>; ++i) highest = lanes[i] > highest || lanes[i] != lanes[i] ? lanes[i] : highest;
  Vec<T> sums = {};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t left = count - i;
    const Vec<T> shifted = load_up_to<T>(to + i, left) - highest;
    Vec<T> power = exp_of<T>(shifted);
    store_up_to<T>(to + i, logarithm ? shifted : power, left);
    if (left < kLanes<T>) power = first_lanes_of<T>(power, left);
    sums += power;
  }
  const T total = sum_lanes<T>(sums);
  const T rest = logarithm ? static_cast<T>(log(static_cast<double>(total))) : 1 / total;
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> x = load_up_to<T>(to + i, count - i);
    store_up_to<T>(to + i, logarithm ? x - rest : x * rest, count - i);
  }
  return highest;
}

template <class T>
void softmax_columns(const T* from, int64_t rows, int64_t columns, int64_t step, bool logarithm, T* to) {
  for (int64_t c = 0; c < columns; c += kLanes<T>) {
    const int64_t left = columns - c;
    Vec<T> most = broadcast<T>(-static_cast<T>(__builtin_inf()));
    for (int64_t r = 0; r < rows; ++r) most = larger_or_nan(load_up_to<T>(from + r * step + c, left), most);
    Vec<T> total = {};
    for (int64_t first = 0; first < rows; first += kLongestSum) {
      const int64_t last = first + kLongestSum < rows ? first + kLongestSum : rows;
      Vec<T> some = {};
      for (int64_t r = first; r < last; ++r) {
        const Vec<T> shifted = load_up_to<T>(from + r * step + c, left) - most, power = exp_of<T>(shifted);
        store_up_to<T>(to + r * step + c, logarithm ? shifted : power, left);
        some += power;
      }
      total += some;
    }
    const Vec<T> rest = logarithm ? log_from_one<T>(total) : T(1) / total;
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> x = load_up_to<T>(to + r * step + c, left);
      store_up_to<T>(to + r * step + c, logarithm ? x - rest : x * rest, left);
    }
  }
}

// Rows that fill few vectors are turned into columns, some rows at a time: one vector then holds an element of each of
// these rows, no lane is empty, and no sum goes across lanes.
template <class T>
struct TurnedRows {
  static constexpr int64_t rows = kLanes<T>, longest = 4 * rows;
  alignas(64) T columns[longest * rows];

  void load(const T* from, int64_t some, int64_t count) { transpose_matrix(from, count, some, count, columns, rows); }
  void store(int64_t some, int64_t count, T* to) const { transpose_matrix(columns, rows, count, some, to, count); }
};

template <class T>
void softmax_rows(const T* from, int64_t rows, int64_t count, bool logarithm, T* to) {
  using Turned = TurnedRows<T>;
  if (count > Turned::longest) {
    for (int64_t r = 0; r < rows; ++r) softmax<T>(from + r * count, T(1), nullptr, count, logarithm, to + r * count);
    return;
  }
  Turned turned;
  for (int64_t r = 0; r < rows; r += Turned::rows) {
    const int64_t some = rows - r < Turned::rows ? rows - r : Turned::rows;
    turned.load(from + r * count, some, count);
    softmax_columns(turned.columns, count, some, Turned::rows, logarithm, turned.columns);
    turned.store(some, count, to + r * count);
  }
}

template <class T>
void softmax_gradient(const T* softmax, const T* gradient, T factor, int64_t count, T* to) {
  Vec<T> sums = {};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t left = count - i;
    sums += load_up_to<T>(softmax + i, left) * load_up_to<T>(gradient + i, left);
  }
  const T sum = sum_lanes<T>(sums);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t left = count - i;
    const Vec<T> difference = load_up_to<T>(gradient + i, left) - sum;
    store_up_to<T>(to + i, load_up_to<T>(softmax + i, left) * difference * factor, left);
  }
}

template <class T>
void softmax_columns_gradient(const T* output, const T* gradient, int64_t rows, int64_t columns, int64_t step,
                              bool logarithm, T* to) {
  for (int64_t c = 0; c < columns; c += kLanes<T>) {
    const int64_t left = columns - c;
    const auto output_at = [=](int64_t r) { return load_up_to<T>(output + r * step + c, left); };
    const auto gradient_at = [=](int64_t r) { return load_up_to<T>(gradient + r * step + c, left); };
    Vec<T> total = {};
    for (int64_t first = 0; first < rows; first += kLongestSum) {
      const int64_t last = first + kLongestSum < rows ? first + kLongestSum : rows;
      Vec<T> some = {};
      for (int64_t r = first; r < last; ++r) some += logarithm ? gradient_at(r) : gradient_at(r) * output_at(r);
      total += some;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> y = output_at(r), dy = gradient_at(r);
      store_up_to<T>(to + r * step + c, logarithm ? dy - exp_of<T>(y) * total : (dy - total) * y, left);
    }
  }
}

template <class T>
void softmax_rows_gradient(const T* output, const T* gradient, int64_t rows, int64_t count, bool logarithm, T* to) {
  using Turned = TurnedRows<T>;
  if (count > Turned::longest) {
    for (int64_t r = 0; r < rows; ++r, output += count, gradient += count, to += count) {
      if (!logarithm) {
        softmax_gradient(output, gradient, T(1), count, to);
        continue;
      }
      const T total = sum(gradient, count);
      for (int64_t i = 0; i < count; i += kLanes<T>) {
        const Vec<T> y = load_up_to<T>(output + i, count - i), dy = load_up_to<T>(gradient + i, count - i);
        store_up_to<T>(to + i, dy - exp_of<T>(y) * total, count - i);
      }
    }
    return;
  }
  Turned outputs, gradients;
  for (int64_t r = 0; r < rows; r += Turned::rows) {
    const int64_t some = rows - r < Turned::rows ? rows - r : Turned::rows;
    outputs.load(output + r * count, some, count);
    gradients.load(gradient + r * count, some, count);
    softmax_columns_gradient(outputs.columns, gradients.columns, count, some, Turned::rows, logarithm,
                             gradients.columns);
    gradients.store(some, count, to + r * count);
  }
}

template <class T>
void layer_norm(const T* from, const T* weight, const T* bias, int64_t count, double epsilon, T* to) {
  const T mean = sum(from, count) / static_cast<T>(count);
  Vec<T> squares = {};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t left = count - i;
    Vec<T> x = load_up_to<T>(from + i, left) - mean;
    if (left < kLanes<T>) x = first_lanes_of<T>(x, left);
    squares += x * x;
  }
  const double variance = static_cast<double>(sum_lanes<T>(squares)) / static_cast<double>(count);
  const T scale = static_cast<T>(1 / sqrt(variance + epsilon));
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t left = count - i;
    Vec<T> x = (load_up_to<T>(from + i, left) - mean) * scale;
    if (weight) x *= load_up_to<T>(weight + i, left);
    if (bias) x += load_up_to<T>(bias + i, left);
    store_up_to<T>(to + i, x, left);
  }
}

template <class T>
void blend(const T* x, const T* y, T part, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> first = load_up_to<T>(x + i, count - i) * (1 - part);  // so that infinities do not meet
    store_up_to<T>(to + i, first + load_up_to<T>(y + i, count - i) * part, count - i);
  }
}

template <class T>
void copy_runs(const T* from, int64_t from_step, int64_t runs, int64_t length, T* to, int64_t to_step) {
  for (int64_t r = 0; r < runs; ++r) {
    for (int64_t i = 0; i < length; i += kLanes<T>) {
      store_up_to<T>(to + r * to_step + i, load_up_to<T>(from + r * from_step + i, length - i), length - i);
    }
  }
}

// The rest of a run, which fills no vector, is added four values at a time, and then one by one. There is no mask,
// because a processor takes a masked access for one of the whole vector: the loads of a short run would wait for the
// stores of the run before it.
template <class T>
void add_runs(const T* from, int64_t from_step, int64_t runs, int64_t length, T* to, int64_t to_step) {
  for (int64_t r = 0; r < runs; ++r, from += from_step, to += to_step) {
    int64_t i = 0;
    for (; i + kLanes<T> <= length; i += kLanes<T>) store<T>(to + i, load<T>(to + i) + load<T>(from + i));
    for (; i + 4 <= length; i += 4) {
      T sums[4];
      for (int j = 0; j < 4; ++j) sums[j] = to[i + j] + from[i + j];
      for (int j = 0; j < 4; ++j) to[i + j] = sums[j];
    }
    for (; i < length; ++i) to[i] += from[i];
  }
}

template <class T>
constexpr ElementwiseKernels<T> kernels() {
  return {binary<T>,
          sum_rows<T>,
          where<T>,
          prelu<T>,
          sum<T>,
          largest<T>,
          average<T>,
          copy_runs<T>,
          add_runs<T>,
          softmax<T>,
          softmax_rows<T>,
          softmax_columns<T>,
          softmax_gradient<T>,
          softmax_rows_gradient<T>,
          softmax_columns_gradient<T>,
          layer_norm<T>,
          blend<T>,
          transpose_matrix<T, T>};
}

}  // namespace

extern const ElementwiseTable elementwise_kernels = {kernels<float>(), kernels<double>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
