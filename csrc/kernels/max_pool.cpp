#include "max_pool.h"

#include <stddef.h>

#include "../simd/shuffle.h"
#include "conv/winner.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// The columns under a row of windows, with the padding on both sides.
int64_t padded_columns(const MaxPoolSizes& s) {
  const int64_t windows = (s.output[1] - 1) * s.stride[1] + s.kernel[1], image = s.input[1] + s.padding[1];
  return windows > image ? windows : image;
}

// Vectors of windows may reach so far beyond the columns.
template <class T>
int64_t line_length(const MaxPoolSizes& s) {
  return padded_columns(s) + 4 * kLanes<T>;
}
template <class T>
int64_t scratch(const MaxPoolSizes& s) {
  return 2 * line_length<T>(s);
}

// The positions of a window that lie in the image, in one dimension: [first, last).
struct Inside {
  int64_t first, last;
};
Inside places_inside(const MaxPoolSizes& s, int d, int64_t at) {
  const int64_t start = at * s.stride[d] - s.padding[d], room = s.input[d] - start;
  return {start < 0 ? -start : 0, s.kernel[d] < room ? s.kernel[d] : room};
}

// Pools a row of windows whatever the pixels are.
template <class T>
void pool_any_row(const MaxPoolSizes& s, const T* from, int64_t y, T* to, uint8_t* winners) {
  const Inside rows = places_inside(s, 0, y);
  for (int64_t x = 0; x < s.output[1]; ++x) {
    const Inside columns = places_inside(s, 1, x);
    const T* const window = from + (y * s.stride[0] - s.padding[0]) * s.input[1] + x * s.stride[1] - s.padding[1];
    int64_t winner = rows.first * s.kernel[1] + columns.first;
    T best = window[rows.first * s.input[1] + columns.first];
    for (int64_t j = rows.first; j < rows.last; ++j) {
      for (int64_t k = columns.first; k < columns.last; ++k) {
        const T pixel = window[j * s.input[1] + k];
        if (!(pixel > best) && pixel == pixel) continue;
        best = pixel;
        winner = j * s.kernel[1] + k;
      }
    }
    to[x] = best;
    winners[x] = static_cast<uint8_t>(winner);
  }
}

// Writes, for each column under a row of windows, the largest pixel, and the number of the window position that lies in
// that pixel's row and in the window's first column. Returns false where a pixel may be NaN.
template <class T>
bool reduce_columns(const MaxPoolSizes& s, const T* from, int64_t y, T* best_of, T* number_of) {
  const Inside rows = places_inside(s, 0, y);
  const T* const first = from + (y * s.stride[0] - s.padding[0] + rows.first) * s.input[1];
  const T width = static_cast<T>(s.kernel[1]);
  Vec<T> total = {};  // NaN once a NaN has been seen
  for (int64_t x = 0; x < s.input[1]; x += kLanes<T>) {
    const int64_t left = s.input[1] - x;
    Vec<T> best = load_up_to<T>(first + x, left), sum = best;
    Vec<T> number = broadcast<T>(static_cast<T>(rows.first) * width);
    for (int64_t j = 1; j < rows.last - rows.first; ++j) {
      const Vec<T> pixel = load_up_to<T>(first + j * s.input[1] + x, left);
      const auto wins = pixel > best;
      sum += pixel;
      number = wins ? broadcast<T>(static_cast<T>(rows.first + j) * width) : number;
      best = wins ? pixel : best;
    }
    total += sum;
    store_up_to<T>(best_of + x, best, left);
    store_up_to<T>(number_of + x, number, left);
  }
  return !has_nan<T>(total);
}

// Reduces what reduce_columns has written, in which padding is minus infinity with a number above all others.
template <class T, class Load>
FASTNN_INLINE void reduce_rows(const MaxPoolSizes& s, const T* best_of, const T* number_of, T* to, uint8_t* winners,
                               const Load& load_windows) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  for (int64_t x = 0; x < s.output[1]; x += kLanes<T>) {
    const int64_t left = s.output[1] - x, at = x * s.stride[1];
    Vec<T> best = load_windows(best_of + at), number = load_windows(number_of + at), winner = number;
    for (int64_t k = 1; k < s.kernel[1]; ++k) {
      const Vec<T> pixel = load_windows(best_of + at + k), own = load_windows(number_of + at + k);
      const auto wins = (pixel > best) | ((pixel == best) & (own < number));
      best = wins ? pixel : best;
      number = wins ? own : number;
      winner = wins ? own + static_cast<T>(k) : winner;
    }
    store_up_to<T>(to + x, best, left);
    const auto whole = __builtin_convertvector(winner, Vec<typename IntegerOf<T>::Type>);
    const Bytes bytes = __builtin_convertvector(whole, Bytes);
    __builtin_memcpy(winners + x, &bytes, static_cast<size_t>(left < kLanes<T> ? left : kLanes<T>));
  }
}

template <class T>
void forward(const MaxPoolSizes& s, const T* from, T* scratch, T* to, uint8_t* winners) {
  const int64_t length = line_length<T>(s);
  T *const best_of = scratch, *const number_of = scratch + length;
  for (int64_t i = 0; i < length; ++i) {
    best_of[i] = -static_cast<T>(__builtin_inf());
    number_of[i] = static_cast<T>(s.kernel[0] * s.kernel[1]);
  }
  for (int64_t y = 0; y < s.output[0]; ++y, to += s.output[1], winners += s.output[1]) {
    // Columns further apart are not loaded as vectors.
    if (s.stride[1] > 2 || !reduce_columns(s, from, y, best_of + s.padding[1], number_of + s.padding[1])) {
      pool_any_row(s, from, y, to, winners);
    } else if (s.stride[1] == 1) {
      reduce_rows(s, best_of, number_of, to, winners,
                  [](const T* at) __attribute__((always_inline)) { return load(at); });
    } else {
      reduce_rows(s, best_of, number_of, to, winners, [](const T* at) __attribute__((always_inline)) {
        return every_second<T>(load(at), load(at + kLanes<T>));
      });
    }
  }
}

template <class T>
void backward(const MaxPoolSizes& s, const T* grad_output, const uint8_t* winners, T* grad_input) {
  int64_t offsets[MaxPoolSizes::kMostPlaces];
  for (int64_t place = 0; place < s.kernel[0] * s.kernel[1]; ++place) {
    offsets[place] = place / s.kernel[1] * s.input[1] + place % s.kernel[1];
  }
  for (int64_t y = 0; y < s.output[0]; ++y) {
    T* at = grad_input + (y * s.stride[0] - s.padding[0]) * s.input[1] - s.padding[1];
    for (int64_t x = 0; x < s.output[1]; ++x, at += s.stride[1]) at[offsets[*winners++]] += *grad_output++;
  }
}

template <class T>
constexpr MaxPoolKernels<T> kernels() {
  return {scratch<T>, forward<T>, backward<T>};
}

}  // namespace

extern const MaxPoolTable max_pool_kernels = {kernels<float>(), kernels<double>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
