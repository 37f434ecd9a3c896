// A product of matrices, tile by tile, where both factors lie.
#pragma once

#include "gemm.h"
#include "product.h"

namespace fastnn {
namespace FASTNN_ISA {

// So few rows of a product's left factor do not fill a tile's registers.
constexpr int kFewRows = 4;

// Writes one tile of a product, or adds it to what is there. The last vector has `loaded` columns in b and `stored` in
// the output. A block is summed by itself and then added to the others, since rounding errors grow with a sum's length.
template <int rows, int vectors, class T>
FASTNN_INLINE void product_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth,
                                int loaded, T* to, int64_t to_row, int stored, bool add) {
  Vec<T> total[rows][vectors];
  multiply_tile<rows, vectors>(depth, a, a_row, a_depth, b, b_depth, loaded, total);
  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        total[r][v] += load_up_to<T>(to + r * to_row + v * kLanes<T>, v + 1 < vectors ? kLanes<T> : stored);
      }
    }
  }
  store_tile<rows, vectors, T>(total, stored, to, to_row, [](Vec<T> x, int) { return x; });
}

template <class T>
void multiply(const Product<T>& p) {
  const int64_t m = p.rows, n = p.columns;
  const auto tile = [&](auto count, auto width, int64_t row, int64_t column, int last) {
    product_tile<decltype(count)::value, decltype(width)::value, T>(
        p.depth, p.a + row * p.a_row, p.a_row, p.a_depth, p.b + column, p.b_depth, last,
        p.output + row * p.output_row + column, p.output_row, last, p.add);
  };
  // A tile goes down the rows of `b`, which may be a page each. Few rows of `a` leave registers for wider tiles.
  int64_t column = 0;
  if (m > 0 && m <= kFewRows) {
    with_constant<kFewRows>(static_cast<int>(m), [&](auto count) {
      constexpr int spare = kTileRows / decltype(count)::value, vectors = spare > 4 ? 4 : spare;
      for (; column + vectors * kLanes<T> <= n; column += vectors * kLanes<T>) {
        tile(count, Constant<vectors>{}, 0, column, kLanes<T>);
      }
    });
  }
  for_each_tile<T>(m, n - column, p.rows_first, [&](auto count, auto width, int64_t row, int64_t right, int last) {
    tile(count, width, row, column + right, last);
  });
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
