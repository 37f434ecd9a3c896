// The register tile of a matrix product: the one inner loop that every dense kernel is built on.
#pragma once

#include "../simd/shuffle.h"

namespace fastnn {
namespace FASTNN_ISA {

// Tile size, so that the accumulators, one row of the right operand and a broadcast fill the register file:
// 32 registers with AVX-512 (12 x 2 + 2 + 1), 16 elsewhere (6 x 2 + 2 + 1).
constexpr int kTileRows = FASTNN_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kTileVectors = 2;
template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;

template <int n>
struct Constant {
  static constexpr int value = n;
};

// Calls body(Constant<n>) for the run-time n, 1 <= n <= most.
template <int most, class Body>
FASTNN_INLINE void with_constant(int n, const Body& body) {
  if constexpr (most > 1) {
    if (n < most) return with_constant<most - 1>(n, body);
  }
  body(Constant<most>{});
}

// total[r][v] += sum over k of a[r * a_row + k * a_depth] * b[k * b_depth + v-th vector].
// `columns` counts the columns of b that may be read; pass whole tiles (packed panels) where possible.
template <int rows, int vectors, class A, class B, class T = Compute<A>>
FASTNN_INLINE void multiply_tile(int64_t depth, const A* a, int64_t a_row, int64_t a_depth, const B* b, int64_t b_depth,
                                 int64_t columns, Vec<T> (&total)[rows][vectors]) {
  const int64_t lanes = kLanes<T>;
  if (columns >= vectors * lanes) {
    for (int64_t k = 0; k < depth; ++k) {
      Vec<T> right[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) right[v] = load(b + v * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Vec<T> left = broadcast<T>(to_compute(a[r * a_row]));
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) total[r][v] += left * right[v];
      }
      a += a_depth;
      b += b_depth;
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int64_t left_over = columns - v * lanes;
      right[v] = left_over > 0 ? load_up_to<B>(b + v * lanes, left_over) : Vec<T>{};
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec<T> left = broadcast<T>(to_compute(a[r * a_row]));
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) total[r][v] += left * right[v];
    }
    a += a_depth;
    b += b_depth;
  }
}

// Elements of a packed (columns, depth) matrix: whole tiles, in the compute type.
template <class T>
int64_t packed_size(int64_t columns, int64_t depth) {
  return (columns + kTileColumns<T> - 1) / kTileColumns<T> * kTileColumns<T> * depth;
}

// weight (columns, depth), row-major -> panels [columns / tile][depth][tile], the last one padded with zeros.
template <class T>
void pack_panels(const T* weight, int64_t columns, int64_t depth, Compute<T>* packed) {
  using C = Compute<T>;
  constexpr int64_t tile = kTileColumns<C>, lanes = kLanes<C>;
  for (int64_t first = 0; first < columns; first += tile, packed += tile * depth) {
    for (int64_t k = 0; k < depth; k += lanes) {
      const int64_t depth_left = depth - k < lanes ? depth - k : lanes;
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t columns_left = columns - first - v * lanes;
        const T* from = weight + (first + v * lanes) * depth + k;
        Vec<C> square[lanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) {
          square[i] = i < columns_left ? load_up_to<T>(from + i * depth, depth_left) : Vec<C>{};
        }
        transpose<C>(square);
        for (int64_t i = 0; i < depth_left; ++i) store(packed + (k + i) * tile + v * lanes, square[i]);
      }
    }
  }
}

// Sums over the depth of a[r] * b[c] for `rows` rows of a and lanes / rows columns of b, both contiguous along the
// depth: the product for a matrix that is used too few times to be worth packing. Lane r * columns + c of the
// result is the sum of row r and column c. Columns from `columns_left` on repeat the last.
template <int rows, class A, class B, class T = Compute<A>>
FASTNN_INLINE Vec<T> dot_tile(int64_t depth, const A* a, int64_t a_row, const B* b, int64_t b_column,
                              int64_t columns_left) {
  constexpr int lanes = kLanes<T>, columns = lanes / rows;
  const B* right[columns];
#pragma GCC unroll 16
  for (int c = 0; c < columns; ++c) right[c] = b + (c < columns_left ? c : columns_left - 1) * b_column;
  Vec<T> total[lanes] = {};
  int64_t k = 0;
  for (; k + lanes <= depth; k += lanes) {
    Vec<T> left[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) left[r] = load(a + r * a_row + k);
#pragma GCC unroll 16
    for (int c = 0; c < columns; ++c) {
      const Vec<T> value = load(right[c] + k);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) total[r * columns + c] += left[r] * value;
    }
  }
  if (k < depth) {
    const int rest = static_cast<int>(depth - k);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      total[i] += load_partial<A>(a + i / columns * a_row + k, rest) * load_partial<B>(right[i % columns] + k, rest);
    }
  }
  return sum_each<T, lanes>(total);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
