// Products of matrices that lie in memory with any strides.
#pragma once

#include <stdint.h>

#include "../simd/dtype.h"
#include "../simd/isa.h"

namespace fastnn {

// output (rows, columns) = a (rows, depth) b (depth, columns), added to what is there if `add`. Element (r, k) of `a`
// lies at a[r * a_row + k * a_depth], element (k, c) of b at b[k * b_depth + c * b_column], and element (r, c) of the
// output at output[r * output_row + c].
template <class T>
struct Product {
  int64_t rows, columns, depth;
  const T* a;
  int64_t a_row, a_depth;
  const T* b;
  int64_t b_depth, b_column;
  T* output;
  int64_t output_row;
  bool add = false;
  // For `multiply`: the tiles of a strip of rows are computed side by side before the next strip's. Otherwise those of
  // a panel of columns are computed one below the other before the next panel's.
  bool rows_first = false;
};

template <class T>
struct ProductKernels {
  // Reads both factors where they lie; b_column must be 1. It is for small factors, which stay in the nearest caches.
  void (*multiply)(const Product<T>& product);
  // Copies blocks of the factors, so that a tile reads them from start to end. `scratch` has scratch_size elements. An
  // element's terms are added up in the same order whatever part of the rows and columns a call computes, but in
  // another order than by `multiply`.
  void (*multiply_in_blocks)(const Product<T>& product, T* scratch);
  int64_t scratch_size;
  // Parts of a product that are a multiple of these fill the tiles of registers.
  int64_t tile_rows, tile_columns;
};

using ProductTable = PerWideDtype<ProductKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(ProductTable, product_kernels)
