// The register tile of a matrix product: the one inner loop that every dense kernel is built on.
#pragma once

#include "../simd/shuffle.h"

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

// The size of a tile. Its accumulators, one row of the right operand and a broadcast fit into the registers: of 32 they
// take 12 x 2 + 2 + 1, of 16 they take 6 x 2 + 2 + 1.
constexpr int kTileRows = FASTNN_VECTOR_REGISTERS * 3 / 8;
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

// The most products that are added up in one running sum. Rounding errors grow with its length, so that longer sums are
// made in parts, which are then as accurate as stock's. Where products are rounded before they are added, there are
// half as many.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr int64_t kLongestSum = 128;
#else
constexpr int64_t kLongestSum = 64;
#endif

// The rows of a tile's left operand, whose elements are broadcast one by one, all at the same place of their rows.
template <int rows, class T>
class LeftRows {
 public:
  FASTNN_INLINE LeftRows(const T* first, int64_t step) : step_(step) {
#pragma GCC unroll 16
    for (int r = 0; r < kPointers; ++r) {
      row_[r] = first + r * step;
      if constexpr (kPointsAtRows) keep_in_register(row_[r]);
    }
  }
  // Moves on by `by` elements.
  FASTNN_INLINE void advance(int64_t by) {
    if constexpr (kPointsAtRows) {
      place_ += by;
    } else {
      row_[0] += by;
    }
  }
  // The element of row r that comes `behind` elements after the current place.
  FASTNN_INLINE T at(int r, int64_t behind = 0) const {
    return kPointsAtRows ? row_[r % kPointers][place_ + behind] : row_[0][r * step_ + behind];
  }

 private:
  static constexpr int kPointers = kPointsAtRows ? rows : 1;
  const T* row_[kPointers];
  int64_t step_, place_ = 0;
};

// earlier (+)= total, total = 0
template <int rows, int vectors, class V>
FASTNN_INLINE void set_aside(V (&total)[rows][vectors], V (&earlier)[rows][vectors], bool add) {
#pragma GCC unroll 28
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      earlier[r][v] = add ? earlier[r][v] + total[r][v] : total[r][v];
      total[r][v] = V{};
    }
  }
  __asm__ volatile("" : : "r"(&earlier) : "memory");
}

// total[r][v] = sum over k of a[r * a_row + k * a_depth] * b[k * b_depth + v-th vector]. The last vector has `last`
// columns (1 to kLanes): those beyond are not read.
template <int rows, int vectors, class A, class B, class T = Compute<A>>
FASTNN_INLINE void multiply_tile(int64_t depth, const A* a, int64_t a_row, int64_t a_depth, const B* b, int64_t b_depth,
                                 int last, Vec<T> (&total)[rows][vectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) total[r][v] = Vec<T>{};
  }
  LeftRows<rows, A> left_rows(a, a_row);
  const auto run = [&](auto load_last) __attribute__((always_inline)) {
    Vec<T> earlier[rows][vectors];  // the parts already summed, in memory: the registers are taken
    for (int64_t part = 0; part < depth; part += kLongestSum) {
      if (part > 0) set_aside(total, earlier, part > kLongestSum);
      const int64_t end = depth - part < kLongestSum ? depth - part : kLongestSum;
      for (int64_t k = 0; k < end; ++k) {
        Vec<T> right[vectors];
#pragma GCC unroll 4
        for (int v = 0; v + 1 < vectors; ++v) right[v] = load(b + v * kLanes<T>);
        right[vectors - 1] = load_last(b + (vectors - 1) * kLanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          const Vec<T> left = broadcast<T>(to_compute(left_rows.at(r)));
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) total[r][v] = multiply_add(left, right[v], total[r][v]);
        }
        left_rows.advance(a_depth);
        b += b_depth;
      }
    }
    if (depth <= kLongestSum) return;
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) total[r][v] += earlier[r][v];
    }
  };
  if (last == kLanes<T>) {
    run([](const B* from) { return load(from); });
  } else {
    run([last](const B* from) { return load_partial<B>(from, last); });
  }
}

// A tile's place among `columns`: how many vectors it spans, how many columns the last of them has.
struct TileWidth {
  int vectors;
  int last;
};
template <class T>
FASTNN_INLINE TileWidth tile_width(int64_t columns_left) {
  constexpr int lanes = kLanes<T>;
  if (columns_left >= kTileColumns<T>) return {kTileVectors, lanes};
  const int columns = static_cast<int>(columns_left), vectors = (columns + lanes - 1) / lanes;
  return {vectors, columns - (vectors - 1) * lanes};
}

// Writes a tile whose last vector has `last` columns, through finish(value, address).
template <int rows, int vectors, class T, class Out, class Finish>
FASTNN_INLINE void store_tile(const Vec<T> (&total)[rows][vectors], int last, Out* output, int64_t stride,
                              const Finish& finish) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    Out* to = output + r * stride;
#pragma GCC unroll 4
    for (int v = 0; v + 1 < vectors; ++v) store(to + v * kLanes<T>, finish(total[r][v], v));
    store_up_to<Out>(to + (vectors - 1) * kLanes<T>, finish(total[r][vectors - 1], vectors - 1), last);
  }
}

// body(rows, vectors, row, column, last) for every tile of an (m, n) matrix, rows and vectors as Constants. A panel of
// columns is gone through before the next, or, if `rows_first`, a strip of rows.
template <class T, class Body>
FASTNN_INLINE void for_each_tile(int64_t m, int64_t n, bool rows_first, const Body& body) {
  const auto tile = [&](int64_t row, int64_t column) {
    const TileWidth width = tile_width<T>(n - column);
    with_constant<kTileVectors>(width.vectors, [&](auto vectors) {
      with_constant<kTileRows>(static_cast<int>(smaller(m - row, kTileRows)),
                               [&](auto rows) { body(rows, vectors, row, column, width.last); });
    });
  };
  if (rows_first) {
    for (int64_t row = 0; row < m; row += kTileRows) {
      for (int64_t column = 0; column < n; column += kTileColumns<T>) tile(row, column);
    }
  } else {
    for (int64_t column = 0; column < n; column += kTileColumns<T>) {
      for (int64_t row = 0; row < m; row += kTileRows) tile(row, column);
    }
  }
}

// Elements of a packed (columns, depth) matrix: whole vectors, in the compute type.
template <class T>
int64_t packed_size(int64_t columns, int64_t depth) {
  return (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T> * depth;
}

// weight (count <= kLanes, depth), `stride` apart -> one vector of a panel: panel[k * width + row], zeros in the other
// lanes.
template <class T>
FASTNN_INLINE void pack_rows(const T* weight, int64_t stride, int64_t count, int64_t depth, Compute<T>* panel,
                             int64_t width) {
  using C = Compute<T>;
  constexpr int lanes = kLanes<C>;
  int64_t k = 0;
  for (; count >= lanes && k + lanes <= depth; k += lanes) {
    Vec<C> square[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) square[i] = load(weight + i * stride + k);
    transpose<C>(square);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) store(panel + (k + i) * width, square[i]);
  }
  for (; k < depth; k += lanes) {
    const int64_t depth_left = depth - k;
    Vec<C> square[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      square[i] = i < count ? load_up_to<T>(weight + i * stride + k, depth_left) : Vec<C>{};
    }
    transpose<C>(square);
    for (int i = 0; i < lanes && i < depth_left; ++i) store(panel + (k + i) * width, square[i]);
  }
}

// weight (columns, depth), row-major -> panels [columns / tile][depth][tile]. The last panel is as many vectors wide
// as it has columns for, padded with zeros.
template <class T>
void pack_panels(const T* weight, int64_t columns, int64_t depth, Compute<T>* packed) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t first = 0; first < columns; first += kTileColumns<Compute<T>>) {
    const int64_t width = tile_width<Compute<T>>(columns - first).vectors * lanes;
    for (int64_t v = 0; v < width; v += lanes) {
      pack_rows<T>(weight + (first + v) * depth, depth, columns - first - v, depth, packed + v, width);
    }
    packed += width * depth;
  }
}

// Sums over the depth of a[r] * b[c] for `rows` rows of a and lanes / rows columns of b, both contiguous along the
// depth: the product for a matrix that is used too few times to be worth packing. Lane r * columns + c of the
// result is the sum of row r and column c. Rows and columns from `rows_left` and `columns_left` on repeat the last.
template <int rows, class A, class B, class T = Compute<A>>
FASTNN_INLINE Vec<T> dot_tile(int64_t depth, const A* a, int64_t a_row, const B* b, int64_t b_column,
                              int64_t columns_left, int64_t rows_left = rows) {
  constexpr int lanes = kLanes<T>, columns = lanes / rows;
  const A* left_rows[rows];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) left_rows[r] = a + (r < rows_left ? r : rows_left - 1) * a_row;
  const B* right[columns];
#pragma GCC unroll 16
  for (int c = 0; c < columns; ++c) right[c] = b + (c < columns_left ? c : columns_left - 1) * b_column;
  Vec<T> total[lanes] = {};
  int64_t k = 0;
  for (; k + lanes <= depth; k += lanes) {
    Vec<T> left[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) left[r] = load(left_rows[r] + k);
#pragma GCC unroll 16
    for (int c = 0; c < columns; ++c) {
      const Vec<T> value = load(right[c] + k);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) total[r * columns + c] = multiply_add(left[r], value, total[r * columns + c]);
    }
  }
  if (k < depth) {
    const int rest = static_cast<int>(depth - k);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      total[i] = multiply_add(load_partial<A>(left_rows[i / columns] + k, rest),
                              load_partial<B>(right[i % columns] + k, rest), total[i]);
    }
  }
  return sum_each<T, lanes>(total);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
