// torch's own matrix product, on memory that the operators hold. It is for products so large that fusing gains nothing:
// there torch's library, which is tuned for each processor, is faster than our kernels.
#pragma once

#include <array>

#include "../kernels/mlp.h"
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

// product = a b. Since the result's memory is given, autocast does not change the dtype of the computation.
template <class T>
void multiply(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<T>& product) {
  std::array<StableIValue, 3> stack{give(a.tensor()), give(b.tensor()), give(product.tensor())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  Argument<Tensor>::take(stack[0]);
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
