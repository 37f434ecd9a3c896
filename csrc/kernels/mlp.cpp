#include "mlp.h"

#include "../simd/activation.h"
#include "gemm.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// Rows that go through all layers together: a few register tiles, so that a weight panel read from L2 is used
// several times, while the activations stay in L1.
constexpr int64_t kBlockRows = 4 * kTileRows;

template <class T>
int64_t scratch_size(int64_t widest) {
  return 2 * kBlockRows * (widest + kTileColumns<T>);
}

// ---- forward ----------------------------------------------------------------------------------------------

// One tile, with the ReLU taken on the way out: the other activations cost more than another pass over a block in
// cache, and would each need a copy of the tile.
// The bias comes last: added first, every partial sum would be rounded by its size.
template <int rows, int vectors, class T>
FASTNN_INLINE void packed_tile(const MlpLayer<T>& layer, const T* input, T* output, int64_t column, int last) {
  Vec<T> total[rows][vectors], bias[vectors] = {};
  multiply_tile<rows, vectors>(layer.in, input, layer.in, 1, layer.packed + column * layer.in, vectors * kLanes<T>,
                               kLanes<T>, total);
  if (layer.bias) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int64_t from = column + v * kLanes<T>;
      bias[v] = load_up_to<T>(layer.bias + from, layer.out - from);
    }
  }
  if (layer.activation == Activation::relu) {
    store_tile<rows, vectors, T>(total, last, output + column, layer.out,
                                 [&](Vec<T> x, int v) { return relu(x + bias[v]); });
  } else {
    store_tile<rows, vectors, T>(total, last, output + column, layer.out, [&](Vec<T> x, int v) { return x + bias[v]; });
  }
}

// output (count) <- activated, with a copy to `saved` where backward wants one
template <class T>
void activate_block(const MlpLayer<T>& layer, T* output, T* saved, int64_t count) {
  with_activation(layer.activation, [&](auto constant) {
    constexpr Activation activation = decltype(constant)::activation;
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const Vec<T> before = load_up_to<T>(output + i, count - i);
      const Vec<T> value = activation == Activation::relu ? before : activate<activation, T>(before);
      store_up_to<T>(output + i, value, count - i);
      if (saved) store_up_to<T>(saved + i, keeps_input(activation) ? before : value, count - i);
    }
  });
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

// input (rows, in) -> output (rows, out) by packed panels.
template <class T>
void packed_layer(const MlpLayer<T>& layer, const T* input, T* output, int64_t rows) {
  for_each_tile<T>(rows, layer.out, false, [&](auto count, auto vectors, int64_t row, int64_t column, int last) {
    packed_tile<decltype(count)::value, decltype(vectors)::value, T>(layer, input + row * layer.in,
                                                                     output + row * layer.out, column, last);
  });
}

// The rows from `row` on that fill tiles of `tile_rows`, by dot products with the weight as it is.
template <int tile_rows, class T>
FASTNN_INLINE int64_t dot_rows(const MlpLayer<T>& layer, const T* input, T* output, int64_t row, int64_t rows) {
  constexpr int columns = kLanes<T> / tile_rows;
  const int64_t last = row + (rows - row) / tile_rows * tile_rows;
  if (last == row) return row;
  for (int64_t column = 0; column < layer.out; column += columns) {
    const int64_t columns_left = layer.out - column;
    T bias[kLanes<T>] = {};
    for (int i = 0; layer.bias && i < kLanes<T>; ++i) {
      if (i % columns < columns_left) bias[i] = to_compute(layer.bias[column + i % columns]);
    }
    for (int64_t r = row; r < last; r += tile_rows) {
      Vec<T> sums = dot_tile<tile_rows>(layer.in, input + r * layer.in, layer.in, layer.weight + column * layer.in,
                                        layer.in, columns_left);
      sums += load(bias);
      if (layer.activation == Activation::relu) sums = relu(sums);
      if (tile_rows == 1) {
        store_up_to<T>(output + r * layer.out + column, sums, columns_left);
        continue;
      }
      T values[kLanes<T>];
      store(values, sums);
      for (int i = 0; i < kLanes<T>; ++i) {
        if (i % columns < columns_left) output[(r + i / columns) * layer.out + column + i % columns] = values[i];
      }
    }
  }
  return last;
}

// input (rows, in) -> output (rows, out), for the rows from `first_row` of the whole batch.
template <class T>
void run_layer(const MlpLayer<T>& layer, const T* input, T* output, int64_t first_row, int64_t rows) {
  if (layer.packed) {
    packed_layer<T>(layer, input, output, rows);
  } else {
    int64_t row = 0;
    if constexpr (kLanes<T> >= 16) row = dot_rows<4, T>(layer, input, output, row, rows);
    if constexpr (kLanes<T> >= 8) row = dot_rows<2, T>(layer, input, output, row, rows);
    dot_rows<1, T>(layer, input, output, row, rows);
  }
  T* saved = layer.saved ? layer.saved + first_row * layer.out : nullptr;
  if (saved || (layer.activation != Activation::relu && layer.activation != Activation::identity)) {
    activate_block<T>(layer, output, saved, rows * layer.out);
  }
}

// Packing costs about a quarter of a cycle an element of the weight, what dot products cost over packed tiles is
// some two cycles an element of the output.
template <class T>
bool worth_packing(int64_t rows, int64_t in) {
  return rows * 8 >= in;
}

// errors (rows) = the mean over the columns of (output - input)^2
template <class T>
void mean_squared_errors(const T* input, const T* output, int64_t rows, int64_t columns, T* errors) {
  for (int64_t r = 0; r < rows; ++r) {
    Vec<T> total = {};
    for (int64_t i = 0; i < columns; i += kLanes<T>) {
      const int64_t from = r * columns + i, left_over = columns - i;
      const Vec<T> difference = load_up_to<T>(output + from, left_over) - load_up_to<T>(input + from, left_over);
      total += difference * difference;
    }
    errors[r] = sum_lanes<T>(total) / static_cast<T>(columns);
  }
}

template <class T>
void forward(const MlpLayer<T>* layers, int64_t count, const T* input, T* output, T* errors, int64_t first_row,
             int64_t last_row, T* scratch) {
  int64_t widest = 0;
  for (int64_t i = 0; i < count; ++i) widest = layers[i].out > widest ? layers[i].out : widest;
  T* buffers[2] = {scratch, scratch + kBlockRows * widest};
  for (int64_t row = first_row; row < last_row; row += kBlockRows) {
    const int64_t rows = smaller(last_row - row, kBlockRows);
    const T* block = input + row * layers[0].in;
    const T* from = block;
    for (int64_t i = 0; i < count; ++i) {
      T* to = output && i + 1 == count ? output + row * layers[i].out : buffers[i % 2];
      run_layer<T>(layers[i], from, to, row, rows);
      from = to;
    }
    if (errors) mean_squared_errors(block, from, rows, layers[0].in, errors + row);
  }
}

// ---- backward ---------------------------------------------------------------------------------------------

// gradient (rows, out) <- source times the activation's derivative
template <class T>
void through_activation(const MlpLayerBackward<T>& layer, const T* source, int64_t first_row, int64_t rows,
                        T* gradient) {
  const T* saved = layer.saved + first_row * layer.out;
  with_activation(layer.activation, [&](auto constant) {
    constexpr Activation activation = decltype(constant)::activation;
    for (int64_t i = 0; i < rows * layer.out; i += kLanes<T>) {
      const int64_t left_over = rows * layer.out - i;
      const Vec<T> grad = load_up_to<T>(source + i, left_over);
      const Vec<T> kept = activation == Activation::identity ? grad : load_up_to<T>(saved + i, left_over);
      store_up_to<T>(gradient + i, activation_gradient<activation, T>(grad, kept), left_over);
    }
  });
}

// output (m, n) = sum over k of a[m * a_row + k * a_depth] * b[k * n + column], added to what is there if `add`.
template <class T>
void multiply(int64_t m, int64_t n, int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b, T* output,
              bool rows_first, bool add) {
  for_each_tile<T>(m, n, rows_first, [&](auto count, auto width, int64_t row, int64_t column, int last) {
    constexpr int rows = decltype(count)::value, vectors = decltype(width)::value;
    T* to = output + row * n + column;
    Vec<T> total[rows][vectors];
    multiply_tile<rows, vectors>(depth, a + row * a_row, a_row, a_depth, b + column, n, last, total);
    // A block is summed on its own before it joins the others: rounding errors grow with the length of a sum.
    if (add) {
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          total[r][v] += load_up_to<T>(to + r * n + v * kLanes<T>, v + 1 < vectors ? kLanes<T> : last);
        }
      }
    }
    store_tile<rows, vectors, T>(total, last, to, n, [](Vec<T> x, int) { return x; });
  });
}

// total (columns) = the sum of the rows, added to what is there if `add`; `lost` (columns) is what rounding has kept
// from it so far (Kahan). Stock's sums are as accurate.
template <class T>
void sum_rows(const T* gradient, int64_t rows, int64_t columns, T* total, T* lost, bool add) {
  constexpr int chains = 4;
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    const int64_t left_over = columns - column;
    Vec<T> sums[chains] = {};
    for (int64_t row = 0; row < rows; row += chains) {
#pragma GCC unroll 4
      for (int c = 0; c < chains; ++c) {
        if (row + c < rows) sums[c] += load_up_to<T>(gradient + (row + c) * columns + column, left_over);
      }
    }
    const Vec<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (!add) {
      store_up_to<T>(total + column, sum, left_over);
      store_up_to<T>(lost + column, Vec<T>{}, left_over);
      continue;
    }
    const Vec<T> before = load_up_to<T>(total + column, left_over);
    const Vec<T> term = sum - load_up_to<T>(lost + column, left_over);
    const Vec<T> after = before + term;
    store_up_to<T>(total + column, after, left_over);
    store_up_to<T>(lost + column, (after - before) - term, left_over);
  }
}

// The layer's input for a block of rows is as it was saved, or activated again from the layer before.
template <class T>
void weight_gradient(const MlpLayerBackward<T>* layer, const T* gradient, int64_t first_row, int64_t rows, T* activated,
                     bool add) {
  if (layer->input) {
    return multiply(layer->out, layer->in, rows, gradient, 1, layer->out, layer->input + first_row * layer->in,
                    layer->grad_weight, true, add);
  }
  const T* saved = layer[-1].saved + first_row * layer->in;
  with_activation(layer[-1].activation, [&](auto constant) {
    for (int64_t i = 0; i < rows * layer->in; i += kLanes<T>) {
      const int64_t left_over = rows * layer->in - i;
      store_up_to<T>(activated + i, activate<decltype(constant)::activation, T>(load_up_to<T>(saved + i, left_over)),
                     left_over);
    }
  });
  multiply(layer->out, layer->in, rows, gradient, 1, layer->out, activated, layer->grad_weight, true, add);
}

template <class T>
void backward(const MlpLayerBackward<T>* layers, int64_t count, const T* grad_output, T* grad_input, int64_t first_row,
              int64_t last_row, T* scratch) {
  int64_t widest = 0;
  for (int64_t i = 0; i < count; ++i) widest = layers[i].out > widest ? layers[i].out : widest;
  T* gradient = scratch;
  T* next = scratch + kBlockRows * widest;
  for (int64_t row = first_row; row < last_row; row += kBlockRows) {
    const int64_t rows = smaller(last_row - row, kBlockRows);
    through_activation(layers[count - 1], grad_output + row * layers[count - 1].out, row, rows, gradient);
    for (int64_t i = count - 1; i >= 0; --i) {
      const MlpLayerBackward<T>& layer = layers[i];
      const bool add = row > first_row;
      if (layer.grad_bias) sum_rows<T>(gradient, rows, layer.out, layer.grad_bias, layer.lost, add);
      if (layer.grad_weight) weight_gradient(&layer, gradient, row, rows, next, add);
      if (i > 0) {
        multiply(rows, layer.in, layer.out, gradient, layer.out, 1, layer.weight, next, false, false);
        through_activation(layers[i - 1], next, row, rows, gradient);
      } else if (grad_input) {
        multiply(rows, layer.in, layer.out, gradient, layer.out, 1, layer.weight, grad_input + row * layer.in, false,
                 false);
      }
    }
  }
}

template <class T>
constexpr MlpKernels<T> kernels() {
  return {worth_packing<T>, packed_size<T>, pack_panels<T>, scratch_size<T>, forward<T>, backward<T>};
}

}  // namespace

extern const MlpTable mlp_kernels = {kernels<float>(), kernels<double>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
