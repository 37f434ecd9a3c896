// Operations on the values of a network that are not part of a convolution, product or recurrence: arithmetic, sums,
// softmax, layer norm and transposition, over runs of elements that lie side by side.
#pragma once

#include <stdint.h>

#include "../simd/dtype.h"
#include "../simd/isa.h"

namespace fastnn {

// X(name): torch's name of the function, for float tensors. Comparisons give 1 where they are true, else 0.
#define FASTNN_FOR_EACH_BINARY(X) X(add) X(sub) X(mul) X(div) X(maximum) X(minimum) X(lt) X(le) X(gt) X(ge) X(eq) X(ne)
enum class BinaryKind : int32_t {
#define FASTNN_ENUMERATOR(name) name,
  FASTNN_FOR_EACH_BINARY(FASTNN_ENUMERATOR)
#undef FASTNN_ENUMERATOR
};
constexpr const char* kBinaryNames[] = {
#define FASTNN_NAME(name) #name,
    FASTNN_FOR_EACH_BINARY(FASTNN_NAME)
#undef FASTNN_NAME
};
constexpr bool is_comparison(BinaryKind kind) {
  return kind >= BinaryKind::lt;
}

template <class T>
struct ElementwiseKernels {
  // to[i] = a[i * a_step] op b[i * b_step]; each step is 0 or 1.
  void (*binary)(BinaryKind kind, const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t count, T* to);
  // to[i] = factor * sum over r of from[r * step + i], for `count` sums of `rows` rows.
  void (*sum_rows)(const T* from, int64_t rows, int64_t step, int64_t count, T factor, T* to);
  // to[i] = condition[i * steps[0]] is not 0 ? a[i * steps[1]] : b[i * steps[2]]; each step is 0 or 1.
  void (*where)(const T* condition, const T* a, const T* b, const int64_t* steps, int64_t count, T* to);
  // to[i] = x where x is above 0, else x * slopes[i * step], with x = from[i]; the step is 0 or 1.
  void (*prelu)(const T* from, const T* slopes, int64_t step, int64_t count, T* to);
  // The sum of `count` elements.
  T (*sum)(const T* from, int64_t count);
  // Pools windows that lie `step` apart. A window has `count` positions, and each position and result has `channels`
  // elements: to[w * to_step + i] = the largest of places[p][w * step + i], or -inf without positions. NaN gives NaN.
  void (*largest)(const T* const* places, int64_t count, int64_t step, int64_t windows, int64_t channels, T* to,
                  int64_t to_step);
  // The same with factor * the sum of the positions.
  void (*average)(const T* const* places, int64_t count, int64_t step, int64_t windows, int64_t channels, T factor,
                  T* to, int64_t to_step);
  // Copies runs of `length` elements that lie `from_step` and `to_step` apart.
  void (*copy_runs)(const T* from, int64_t from_step, int64_t runs, int64_t length, T* to, int64_t to_step);
  // Adds runs of `length` elements that lie `from_step` and `to_step` apart: to[r * to_step + i] += from[r * from_step
  // + i] for r < runs.
  void (*add_runs)(const T* from, int64_t from_step, int64_t runs, int64_t length, T* to, int64_t to_step);
  // Softmax of one row, from * factor + added, or its logarithm. `added` may be null. Returns the row's largest
  // element, which is NaN if any element is; -inf for no elements.
  T (*softmax)(const T* from, T factor, const T* added, int64_t count, bool logarithm, T* to);
  // Softmax, or its logarithm, of each of `rows` rows of `count` elements, which lie one behind the other.
  void (*softmax_rows)(const T* from, int64_t rows, int64_t count, bool logarithm, T* to);
  // The same of each of `columns` columns of `rows` elements, which lie `step` apart, in `from` and in `to`.
  void (*softmax_columns)(const T* from, int64_t rows, int64_t columns, int64_t step, bool logarithm, T* to);
  // The gradient of softmax's input, times the factor, from the softmax and its gradient: to = factor * softmax *
  // (gradient - sum(softmax * gradient)).
  void (*softmax_gradient)(const T* softmax, const T* gradient, T factor, int64_t count, T* to);
  // The gradients of the inputs of softmax_rows and softmax_columns, from their outputs and the outputs' gradients.
  void (*softmax_rows_gradient)(const T* output, const T* gradient, int64_t rows, int64_t count, bool logarithm, T* to);
  void (*softmax_columns_gradient)(const T* output, const T* gradient, int64_t rows, int64_t columns, int64_t step,
                                   bool logarithm, T* to);
  // (from - mean) / sqrt(variance + epsilon) * weight + bias of one row. weight and bias (count) may be null.
  void (*layer_norm)(const T* from, const T* weight, const T* bias, int64_t count, double epsilon, T* to);
  // to[i] = x[i] * (1 - part) + y[i] * part
  void (*blend)(const T* x, const T* y, T part, int64_t count, T* to);
  // from (rows, columns), its rows `step` apart -> to (columns, rows), its rows `to_step` apart.
  void (*transpose)(const T* from, int64_t step, int64_t rows, int64_t columns, T* to, int64_t to_step);
};

using ElementwiseTable = PerWideDtype<ElementwiseKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(ElementwiseTable, elementwise_kernels)
