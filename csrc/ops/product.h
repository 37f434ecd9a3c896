// Products of matrices that nothing is fused with, on memory that the operators hold.
#pragma once

#include <array>

#include "../kernels/mlp.h"
#include "../kernels/product.h"
#include "tensor.h"

namespace fastnn {

// Whether all sizes of a product are large, and the weight does not stay in the nearest caches. Then moving what the
// product reads and writes takes little of its time, which is all that fusing it with its neighbours could save.
inline bool is_large_product(int64_t rows, int64_t in, int64_t out) {
  constexpr int64_t kRows = 32, kWidth = 8, kWeight = 1 << 16;
  return rows >= kRows && in >= kWidth && out >= kWidth && out > (kWeight - 1) / in;
}

// Element (r, c) lies at data[r * row + c * column].
template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, row, column;

  Matrix(T* data, int64_t rows, int64_t columns) : Matrix(data, rows, columns, columns) {}
  Matrix(T* data, int64_t rows, int64_t columns, int64_t row, int64_t column = 1)
      : data(data), rows(rows), columns(columns), row(row), column(column) {}
  Matrix transposed() const { return {data, columns, rows, column, row}; }

  Tensor tensor() const { return tensor_over<std::remove_const_t<T>>(data, {rows, columns}, {row, column}); }
};

// product = a b by torch. Since the result's memory is given, autocast does not change the dtype of the computation.
template <class T>
void multiply_by_torch(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<T>& product) {
  std::array<StableIValue, 3> stack{give(a.tensor()), give(b.tensor()), give(product.tensor())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  Argument<Tensor>::take(stack[0]);
}

// Whether copying the factors in blocks pays: not for few rows, which would read each copy a few times only, nor for a
// right factor that stays in the nearest cache anyway.
template <class T>
bool goes_in_blocks(const Product<T>& p) {
  constexpr int64_t kFewRows = 32, kNearestCache = 16 << 10;
  return p.b_column != 1 || (p.rows >= kFewRows && p.depth * p.columns > kNearestCache / int64_t{sizeof(T)});
}

// Computes a product on one thread. in_blocks: what goes_in_blocks says of the whole product, of which this may be a
// part.
template <class T>
void multiply_part(const ProductKernels<T>& kernels, const Product<T>& p, bool in_blocks) {
  if (!in_blocks) return kernels.multiply(p);
  const Scratch<T> scratch(kernels.scratch_size);
  kernels.multiply_in_blocks(p, scratch.get());
}

// Computes a product on up to `most_threads` threads, which share the rows and then the columns. The result's bits are
// the same for any number of threads.
template <class T>
void multiply(const Product<T>& p, int64_t most_threads) {
  const auto& kernels = product_kernels().get<T>();
  const double work = 2.0 * static_cast<double>(p.rows) * static_cast<double>(p.columns) * static_cast<double>(p.depth);
  const int64_t threads = std::min(useful_threads(work), most_threads);
  // A part has several tiles each way, where that leaves a part to each thread.
  const auto parts_of = [](int64_t size, int64_t tile) { return std::max<int64_t>(1, size / (4 * tile)); };
  const int64_t row_parts = std::min(threads, parts_of(p.rows, kernels.tile_rows));
  const int64_t column_parts =
      std::min((threads + row_parts - 1) / row_parts, parts_of(p.columns, kernels.tile_columns));
  // The first row or column of a part, which is the first of a tile.
  const auto first_of = [](int64_t part, int64_t parts, int64_t size, int64_t tile) {
    return part == parts ? size : size * part / parts / tile * tile;
  };
  const bool in_blocks = goes_in_blocks(p);
  const int64_t parts = row_parts * column_parts;
  parallel_chunks(parts, parts, [&](int64_t part, int64_t, int64_t) {
    const auto row = [&](int64_t i) { return first_of(i, row_parts, p.rows, kernels.tile_rows); };
    const auto column = [&](int64_t i) { return first_of(i, column_parts, p.columns, kernels.tile_columns); };
    const int64_t i = part / column_parts, j = part % column_parts;
    Product<T> own = p;
    own.rows = row(i + 1) - row(i);
    own.columns = column(j + 1) - column(j);
    own.a += row(i) * p.a_row;
    own.b += column(j) * p.b_column;
    own.output += row(i) * p.output_row + column(j);
    multiply_part(kernels, own, in_blocks);
  });
}

// product = a b, where the columns of `product` lie side by side. torch multiplies bfloat16, for which processors have
// instructions of their own.
template <class T>
void multiply(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<T>& product) {
  if constexpr (sizeof(T) == 2) {
    multiply_by_torch(a, b, product);
  } else {
    multiply<T>(
        {a.rows, b.columns, a.columns, a.data, a.row, a.column, b.data, b.row, b.column, product.data, product.row},
        torch::stable::get_num_threads());
  }
}

// body(first, last) for parts of [0, count), in parallel if `work` a piece is worth it.
template <class Body>
void parallel_range(int64_t count, double work, const Body& body) {
  const int64_t chunks = std::min(useful_threads(work * static_cast<double>(count)), count);
  parallel_chunks(chunks, count, [&](int64_t, int64_t first, int64_t last) { body(first, last); });
}

// sums (columns) of a matrix's rows
template <class T>
void sum_rows(const T* matrix, int64_t rows, int64_t columns, Compute<T>* sums) {
  const Scratch<Compute<T>> lost(columns);
  const auto& elementwise = mlp_kernels().elementwise.get<T>();
  parallel_range(columns, static_cast<double>(rows), [&](int64_t first, int64_t last) {
    elementwise.sum_rows(matrix, rows, columns, first, last, sums, lost.get());
  });
}

}  // namespace fastnn
