#include "mlp.h"

#include "../simd/activation.h"
#include "gemm.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// Rows that go through all layers together: a few register tiles, so that a weight panel read from L2 is used
// several times, while the activations stay in L1.
constexpr int64_t kBlockRows = 4 * kTileRows;

FASTNN_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <class T>
int64_t scratch_size(int64_t widest) {
  return 2 * kBlockRows * (widest + kTileColumns<Compute<T>>);
}

// ---- forward ----------------------------------------------------------------------------------------------

// Writes one tile, with the ReLU taken on the way out: the other activations cost more than another pass over
// a block in cache, and would each need a copy of the tile.
template <bool with_relu, int rows, class T, class In, class Out>
FASTNN_INLINE void packed_tile(const MlpLayer<T>& layer, const In* input, Out* output, int64_t first_column) {
  using C = Compute<T>;
  const int64_t columns = layer.out - first_column;
  Vec<C> total[rows][kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) {
    const int64_t left_over = columns - v * kLanes<C>;
    const Vec<C> start =
        layer.bias && left_over > 0 ? load_up_to<T>(layer.bias + first_column + v * kLanes<C>, left_over) : Vec<C>{};
    for (int r = 0; r < rows; ++r) total[r][v] = start;
  }
  multiply_tile<rows, kTileVectors>(layer.in, input, layer.in, 1, layer.packed + first_column * layer.in,
                                    kTileColumns<C>, kTileColumns<C>, total);
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t left_over = columns - v * kLanes<C>;
      if (left_over <= 0) break;
      const Vec<C> value = with_relu ? relu(total[r][v]) : total[r][v];
      store_up_to<Out>(output + r * layer.out + first_column + v * kLanes<C>, value, left_over);
    }
  }
}

// output (count) <- activated, with a copy to `saved` where backward wants one
template <class T, class Out>
void activate_block(const MlpLayer<T>& layer, Out* output, T* saved, int64_t count) {
  using C = Compute<T>;
  with_activation(layer.activation, [&](auto constant) {
    constexpr Activation activation = decltype(constant)::activation;
    for (int64_t i = 0; i < count; i += kLanes<C>) {
      const Vec<C> before = load_up_to<Out>(output + i, count - i);
      const Vec<C> value = activation == Activation::relu ? before : activate<activation, C>(before);
      store_up_to<Out>(output + i, value, count - i);
      if (saved) store_up_to<T>(saved + i, keeps_input(activation) ? before : value, count - i);
    }
  });
}

// input (rows, in) -> output (rows, out) by packed panels.
template <class T, class In, class Out>
void packed_layer(const MlpLayer<T>& layer, const In* input, Out* output, int64_t rows) {
  for (int64_t column = 0; column < layer.out; column += kTileColumns<Compute<T>>) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      with_constant<kTileRows>(static_cast<int>(smaller(rows - row, kTileRows)), [&](auto tile_rows) {
        constexpr int count = decltype(tile_rows)::value;
        if (layer.activation == Activation::relu) {
          packed_tile<true, count, T>(layer, input + row * layer.in, output + row * layer.out, column);
        } else {
          packed_tile<false, count, T>(layer, input + row * layer.in, output + row * layer.out, column);
        }
      });
    }
  }
}

// The rows from `row` on that fill tiles of `tile_rows`, by dot products with the weight as it is.
template <int tile_rows, class T, class In, class Out>
FASTNN_INLINE int64_t dot_rows(const MlpLayer<T>& layer, const In* input, Out* output, int64_t row, int64_t rows) {
  using C = Compute<T>;
  constexpr int columns = kLanes<C> / tile_rows;
  const int64_t last = row + (rows - row) / tile_rows * tile_rows;
  if (last == row) return row;
  for (int64_t column = 0; column < layer.out; column += columns) {
    const int64_t columns_left = layer.out - column;
    C bias[kLanes<C>] = {};
    for (int i = 0; layer.bias && i < kLanes<C>; ++i) {
      if (i % columns < columns_left) bias[i] = to_compute(layer.bias[column + i % columns]);
    }
    for (int64_t r = row; r < last; r += tile_rows) {
      Vec<C> sums = dot_tile<tile_rows>(layer.in, input + r * layer.in, layer.in, layer.weight + column * layer.in,
                                        layer.in, columns_left);
      sums += load(bias);
      if (layer.activation == Activation::relu) sums = relu(sums);
      if (tile_rows == 1) {
        store_up_to<Out>(output + r * layer.out + column, sums, columns_left);
        continue;
      }
      Out values[kLanes<C>];
      store(values, sums);
      for (int i = 0; i < kLanes<C>; ++i) {
        if (i % columns < columns_left) output[(r + i / columns) * layer.out + column + i % columns] = values[i];
      }
    }
  }
  return last;
}

// input (rows, in) -> output (rows, out), for the rows from `first_row` of the whole batch.
template <class T, class In, class Out>
void run_layer(const MlpLayer<T>& layer, const In* input, Out* output, int64_t first_row, int64_t rows) {
  using C = Compute<T>;
  if (layer.packed) {
    packed_layer<T>(layer, input, output, rows);
  } else {
    int64_t row = 0;
    if constexpr (kLanes<C> >= 16) row = dot_rows<4, T>(layer, input, output, row, rows);
    if constexpr (kLanes<C> >= 8) row = dot_rows<2, T>(layer, input, output, row, rows);
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

template <class T>
void forward(const MlpLayer<T>* layers, int64_t count, const T* input, T* output, int64_t first_row, int64_t last_row,
             Compute<T>* scratch) {
  using C = Compute<T>;
  int64_t widest = 0;
  for (int64_t i = 0; i < count; ++i) widest = layers[i].out > widest ? layers[i].out : widest;
  C* buffers[2] = {scratch, scratch + kBlockRows * widest};
  const MlpLayer<T>& last = layers[count - 1];
  for (int64_t row = first_row; row < last_row; row += kBlockRows) {
    const int64_t rows = smaller(last_row - row, kBlockRows);
    const T* block = input + row * layers[0].in;
    T* result = output + row * last.out;
    if (count == 1) {
      run_layer<T>(last, block, result, row, rows);
      continue;
    }
    run_layer<T>(layers[0], block, buffers[0], row, rows);
    for (int64_t i = 1; i + 1 < count; ++i) run_layer<T>(layers[i], buffers[(i - 1) % 2], buffers[i % 2], row, rows);
    run_layer<T>(last, buffers[count % 2], result, row, rows);
  }
}

// ---- backward ---------------------------------------------------------------------------------------------

// gradient (rows, out) <- source times the activation's derivative
template <class T, class Source>
void through_activation(const MlpLayerBackward<T>& layer, const Source* source, int64_t first_row, int64_t rows,
                        Compute<T>* gradient) {
  using C = Compute<T>;
  const T* saved = layer.saved + first_row * layer.out;
  with_activation(layer.activation, [&](auto constant) {
    constexpr Activation activation = decltype(constant)::activation;
    for (int64_t i = 0; i < rows * layer.out; i += kLanes<C>) {
      const int64_t left_over = rows * layer.out - i;
      const Vec<C> grad = load_up_to<Source>(source + i, left_over);
      const Vec<C> kept = activation == Activation::identity ? grad : load_up_to<T>(saved + i, left_over);
      store_up_to<C>(gradient + i, activation_gradient<activation, C>(grad, kept), left_over);
    }
  });
}

// output (m, n) [+]= sum over k of a[m * a_row + k * a_depth] * b[k * n + column]
template <bool accumulate, class A, class B, class Out>
void multiply(int64_t m, int64_t n, int64_t depth, const A* a, int64_t a_row, int64_t a_depth, const B* b,
              Out* output) {
  using C = Compute<A>;
  for (int64_t column = 0; column < n; column += kTileColumns<C>) {
    for (int64_t row = 0; row < m; row += kTileRows) {
      with_constant<kTileRows>(static_cast<int>(smaller(m - row, kTileRows)), [&](auto tile_rows) {
        constexpr int rows = decltype(tile_rows)::value;
        Vec<C> total[rows][kTileVectors] = {};
        multiply_tile<rows, kTileVectors>(depth, a + row * a_row, a_row, a_depth, b + column, n, n - column, total);
        for (int r = 0; r < rows; ++r) {
          for (int v = 0; v < kTileVectors; ++v) {
            const int64_t left_over = n - column - v * kLanes<C>;
            if (left_over <= 0) break;
            Out* to = output + (row + r) * n + column + v * kLanes<C>;
            const Vec<C> before = accumulate ? load_up_to<Out>(to, left_over) : Vec<C>{};
            store_up_to<Out>(to, accumulate ? before + total[r][v] : total[r][v], left_over);
          }
        }
      });
    }
  }
}

template <class T>
void add_rows(const Compute<T>* gradient, int64_t rows, int64_t columns, Compute<T>* total) {
  using C = Compute<T>;
  for (int64_t column = 0; column < columns; column += kLanes<C>) {
    const int64_t left_over = columns - column;
    Vec<C> sum = load_up_to<C>(total + column, left_over);
    for (int64_t r = 0; r < rows; ++r) sum += load_up_to<C>(gradient + r * columns + column, left_over);
    store_up_to<C>(total + column, sum, left_over);
  }
}

// The layer's input for a block of rows: as it was saved, or activated again from the layer before.
template <class T>
void add_weight_gradient(const MlpLayerBackward<T>* layer, const Compute<T>* gradient, int64_t first_row, int64_t rows,
                         Compute<T>* activated) {
  using C = Compute<T>;
  if (layer->input) {
    return multiply<true>(layer->out, layer->in, rows, gradient, 1, layer->out, layer->input + first_row * layer->in,
                          layer->grad_weight);
  }
  const T* saved = layer[-1].saved + first_row * layer->in;
  with_activation(layer[-1].activation, [&](auto constant) {
    for (int64_t i = 0; i < rows * layer->in; i += kLanes<C>) {
      const int64_t left_over = rows * layer->in - i;
      store_up_to<C>(activated + i, activate<decltype(constant)::activation, C>(load_up_to<T>(saved + i, left_over)),
                     left_over);
    }
  });
  multiply<true>(layer->out, layer->in, rows, gradient, 1, layer->out, activated, layer->grad_weight);
}

template <class T>
void backward(const MlpLayerBackward<T>* layers, int64_t count, const T* grad_output, T* grad_input, int64_t first_row,
              int64_t last_row, Compute<T>* scratch) {
  using C = Compute<T>;
  int64_t widest = 0;
  for (int64_t i = 0; i < count; ++i) widest = layers[i].out > widest ? layers[i].out : widest;
  C* gradient = scratch;
  C* next = scratch + kBlockRows * widest;
  for (int64_t row = first_row; row < last_row; row += kBlockRows) {
    const int64_t rows = smaller(last_row - row, kBlockRows);
    through_activation(layers[count - 1], grad_output + row * layers[count - 1].out, row, rows, gradient);
    for (int64_t i = count - 1; i >= 0; --i) {
      const MlpLayerBackward<T>& layer = layers[i];
      if (layer.grad_bias) add_rows<T>(gradient, rows, layer.out, layer.grad_bias);
      if (layer.grad_weight) add_weight_gradient(&layer, gradient, row, rows, next);
      if (i > 0) {
        multiply<false>(rows, layer.in, layer.out, gradient, layer.out, 1, layer.weight, next);
        through_activation(layers[i - 1], next, row, rows, gradient);
      } else if (grad_input) {
        multiply<false>(rows, layer.in, layer.out, gradient, layer.out, 1, layer.weight, grad_input + row * layer.in);
      }
    }
  }
}

template <class T>
constexpr MlpKernels<T> kernels() {
  return {worth_packing<T>, packed_size<Compute<T>>, pack_panels<T>, scratch_size<T>, forward<T>, backward<T>};
}

}  // namespace

extern const MlpTable mlp_kernels = {kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
