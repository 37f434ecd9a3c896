// Transposes of small matrices in registers. Include only from csrc/kernels.
#pragma once

#include "vec.h"

namespace fastnn {
namespace FASTNN_ISA {

// The lower and the upper halves of two vectors, interleaved: a0 b0 a1 b1 ...
template <int lanes>
struct Zip;
template <>
struct Zip<2> {
  template <class V>
  static FASTNN_INLINE V low(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 2);
  }
  template <class V>
  static FASTNN_INLINE V high(V a, V b) {
    return __builtin_shufflevector(a, b, 1, 3);
  }
};
template <>
struct Zip<4> {
  template <class V>
  static FASTNN_INLINE V low(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  }
  template <class V>
  static FASTNN_INLINE V high(V a, V b) {
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  }
};
template <>
struct Zip<8> {
  template <class V>
  static FASTNN_INLINE V low(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  }
  template <class V>
  static FASTNN_INLINE V high(V a, V b) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }
};
template <>
struct Zip<16> {
  template <class V>
  static FASTNN_INLINE V low(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
  template <class V>
  static FASTNN_INLINE V high(V a, V b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
};

// rows[i] lane j <-> rows[j] lane i. Each pass interleaves row i with row i + lanes/2, which moves one bit of the
// row number into the lane number.
template <int lanes, class V>
FASTNN_INLINE void transpose_square(V (&rows)[lanes]) {
  for (int pass = 1; pass < lanes; pass *= 2) {
    V next[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = Zip<lanes>::low(rows[i], rows[i + lanes / 2]);
      next[2 * i + 1] = Zip<lanes>::high(rows[i], rows[i + lanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns.
template <class From, class To>
void transpose(const From* from, int64_t from_stride, int64_t rows, int64_t columns, To* to, int64_t to_stride) {
  using C = Compute<From>;
  constexpr int lanes = kLanes<C>;
  for (int64_t r = 0; r < rows; r += lanes) {
    const int64_t rows_left = rows - r;
    for (int64_t c = 0; c < columns; c += lanes) {
      const int64_t columns_left = columns - c;
      Vec<C> block[lanes];
      const From* source = from + r * from_stride + c;
      To* target = to + c * to_stride + r;
      if (rows_left >= lanes && columns_left >= lanes) {
        for (int i = 0; i < lanes; ++i) block[i] = load(source + i * from_stride);
        transpose_square<lanes>(block);
        for (int i = 0; i < lanes; ++i) store(target + i * to_stride, block[i]);
        continue;
      }
      for (int i = 0; i < lanes; ++i) {
        block[i] = i < rows_left ? load_up_to<From>(source + i * from_stride, columns_left) : Vec<C>{};
      }
      transpose_square<lanes>(block);
      for (int i = 0; i < lanes && i < columns_left; ++i) store_up_to<To>(target + i * to_stride, block[i], rows_left);
    }
  }
}

// The same for bytes.
inline void transpose(const uint8_t* from, int64_t from_stride, int64_t rows, int64_t columns, uint8_t* to,
                      int64_t to_stride) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  for (int64_t r = 0; r < rows; r += 16) {
    const int64_t row_count = rows - r < 16 ? rows - r : 16;
    for (int64_t c = 0; c < columns; c += 16) {
      const int64_t column_count = columns - c < 16 ? columns - c : 16;
      Bytes block[16] = {};
      for (int64_t i = 0; i < row_count; ++i) {
        const uint8_t* source = from + (r + i) * from_stride + c;
        if (column_count == 16) {
          __builtin_memcpy(&block[i], source, 16);
        } else {
          __builtin_memcpy(&block[i], source, column_count);
        }
      }
      transpose_square<16>(block);
      for (int64_t i = 0; i < column_count; ++i) {
        uint8_t* target = to + (c + i) * to_stride + r;
        if (row_count == 16) {
          __builtin_memcpy(target, &block[i], 16);
        } else {
          __builtin_memcpy(target, &block[i], row_count);
        }
      }
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
