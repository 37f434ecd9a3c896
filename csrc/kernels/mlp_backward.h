// mlp's backward for a block of rows, layer by layer from the last.
#pragma once

#include "mlp_layer.h"
#include "product_tiles.h"

namespace fastnn {
namespace FASTNN_ISA {

// So many rows are taken together: as many as one sum may have, so that a weight's gradient is read and written as few
// times as possible.
constexpr int64_t kGradientRows = kLongestSum;

// This member's part of `count` things. It is whole vectors.
template <class T>
Share share_vectors(const Member& member, int64_t count) {
  const Share share = member.share(divide_up(count, kLanes<T>));
  return {share.first * kLanes<T>, smaller(share.last * kLanes<T>, count)};
}

// The gradient (rows, out) before the activation, from the gradient after it, `source`. It is written to `buffer`,
// which may be `source`; where the activation changes nothing, it is `source` itself.
template <class T>
const T* through_activation(const MlpLayerBackward<T>& layer, const T* source, int64_t first_row, int64_t rows,
                            T* buffer, Member& member) {
  if (layer.activation.kind == ActivationKind::identity) return source;
  const T* saved = layer.saved + first_row * layer.out;
  const Share which = share_vectors<T>(member, rows * layer.out);
  with_activation<T>(layer.activation, [&](auto function) {
    for (int64_t i = which.first; i < which.last; i += kLanes<T>) {
      const int64_t left_over = which.last - i;
      const Vec<T> grad = load_up_to<T>(source + i, left_over), kept = load_up_to<T>(saved + i, left_over);
      store_up_to<T>(buffer + i, function.gradient(grad, kept), left_over);
    }
  });
  member.end_round();
  return buffer;
}

// total (columns) = the sum of the rows, for the columns `which`, added to what is there if `add`. `lost` (columns) is
// what rounding has lost so far (Kahan). Stock's sums are as accurate.
template <class T>
void sum_rows(const T* gradient, int64_t rows, int64_t columns, Compute<T>* total, Compute<T>* lost, bool add,
              Share which) {
  using C = Compute<T>;
  constexpr int chains = 4, kWide = kTileRows / 3;
  const auto sum_columns = [&](auto width, int64_t column) {
    constexpr int vectors = decltype(width)::value;
    const int64_t left_over = which.last - column;  // less than a vector only where it is a single one
    Vec<C> sums[chains][vectors] = {};
    for (int64_t row = 0; row < rows; row += chains) {
#pragma GCC unroll 4
      for (int c = 0; c < chains; ++c) {
        if (row + c >= rows) continue;
        const T* const from = gradient + (row + c) * columns + column;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[c][v] += load_up_to<T>(from + v * kLanes<C>, left_over);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = column + v * kLanes<C>;
      const Vec<C> sum = (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]);
      const Vec<C> before = add ? load_up_to<C>(total + at, left_over) : Vec<C>{};
      const Vec<C> term = add ? sum - load_up_to<C>(lost + at, left_over) : sum;
      const Vec<C> after = before + term;
      store_up_to<C>(total + at, after, left_over);
      store_up_to<C>(lost + at, add ? (after - before) - term : Vec<C>{}, left_over);
    }
  };
  int64_t column = which.first;
  for (; column + kWide * kLanes<C> <= which.last; column += kWide * kLanes<C>) sum_columns(Constant<kWide>{}, column);
  for (; column < which.last; column += kLanes<C>) sum_columns(Constant<1>{}, column);
}

// Whether a layer has so few inputs that they fill few lanes of a tile. Transposed, it has the outputs in the lanes.
template <class T>
bool is_narrow(const MlpLayerBackward<T>& layer) {
  return layer.in <= kLanes<T> / 2 && layer.out > layer.in;
}
// Elements of scratch for a narrow layer that is transposed.
template <class T>
int64_t turned_size(int64_t widest) {
  return kLanes<T> / 2 * widest;
}

template <class T>
int64_t backward_scratch_size(int64_t widest) {
  return 3 * kGradientRows * widest + turned_size<T>(widest);
}

// From so many rows on, it pays to take the input's columns in panels that stay in L1, although each row of the
// weight's gradient then touches a page of its own.
constexpr int64_t kRowsForPanels = 32;

// grad_weight (out, in) = the gradient (rows, out), transposed, times input (rows, in).
template <class T>
void multiply_by_input(const MlpLayerBackward<T>& layer, const T* gradient, const T* input, int64_t rows, T* turned,
                       bool add, const Member& member) {
  if (!is_narrow(layer)) {
    const Share which = member.share(layer.out);
    return multiply<T>({which.last - which.first, layer.in, rows, gradient + which.first, 1, layer.out, input, layer.in,
                        1, layer.grad_weight + which.first * layer.in, layer.in, add, rows < kRowsForPanels});
  }
  if (member.share(1).empty()) return;
  multiply<T>({layer.in, layer.out, rows, input, 1, layer.in, gradient, layer.out, 1, turned, layer.out});
  for (int64_t o = 0; o < layer.out; ++o) {
    for (int64_t i = 0; i < layer.in; ++i) {
      T& to = layer.grad_weight[o * layer.in + i];
      to = add ? to + turned[i * layer.out + o] : turned[i * layer.out + o];
    }
  }
}

// output (rows, in) = the gradient (rows, out) times the weight (out, in). The weight is read from start to end, some
// of its rows together. A tile of few rows would read it down its columns, where each row may lie in another page.
template <int rows, class T>
void multiply_along_weight(const MlpLayerBackward<T>& layer, const T* gradient, T* output, Share which) {
  constexpr int kTogether = 8;
  int64_t o = 0;
  do {  // runs once if the weight has no rows, too: the sums are zeros
    const auto add_rows = [&](int64_t count) __attribute__((always_inline)) {
      for (int64_t i = which.first; i < which.last; i += kLanes<T>) {
        const int64_t left_over = which.last - i;
        Vec<T> total[rows] = {};
#pragma GCC unroll 8
        for (int64_t k = 0; k < count; ++k) {
          const Vec<T> weight = load_up_to<T>(layer.weight + (o + k) * layer.in + i, left_over);
#pragma GCC unroll 4
          for (int r = 0; r < rows; ++r) {
            total[r] = multiply_add(broadcast<T>(gradient[r * layer.out + o + k]), weight, total[r]);
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          T* const to = output + r * layer.in + i;
          store_up_to<T>(to, o == 0 ? total[r] : load_up_to<T>(to, left_over) + total[r], left_over);
        }
      }
    };
    if (layer.out - o >= kTogether) {
      add_rows(kTogether);
    } else {
      add_rows(layer.out - o);
    }
    o += kTogether;
  } while (o < layer.out);
}

// output (rows, in) = the gradient (rows, out) times the weight (out, in)
template <class T>
void multiply_by_weight(const MlpLayerBackward<T>& layer, const T* gradient, int64_t rows, T* output, T* turned,
                        const Member& member) {
  if (!is_narrow(layer)) {
    if (rows > kFewRows) {  // a team of several members never has so many rows
      return multiply<T>({rows, layer.in, layer.out, gradient, layer.out, 1, layer.weight, layer.in, 1, output,
                          layer.in, false, stays_in_cache<T>(layer.out, layer.in)});
    }
    return with_constant<kFewRows>(static_cast<int>(rows), [&](auto constant) {
      multiply_along_weight<decltype(constant)::value>(layer, gradient, output, share_vectors<T>(member, layer.in));
    });
  }
  if (member.share(1).empty()) return;
  transpose_matrix(layer.weight, layer.in, layer.out, layer.in, turned, layer.out);
  dot_layer<T>({turned, nullptr, layer.out, layer.in, kIdentity, nullptr, nullptr}, gradient, output, rows,
               {0, layer.in});
}

// The layer's input for a block of rows. It was saved, or the layer before saved its activation's input: then it is
// activated again, into `buffer`.
template <class T>
const T* layer_input(const MlpLayerBackward<T>* layer, int64_t first_row, int64_t rows, T* buffer, Member& member) {
  if (layer->input) return layer->input + first_row * layer->in;
  const T* saved = layer[-1].saved + first_row * layer->in;
  const Share which = share_vectors<T>(member, rows * layer->in);
  with_activation<T>(layer[-1].activation, [&](auto function) {
    for (int64_t i = which.first; i < which.last; i += kLanes<T>) {
      const int64_t left_over = which.last - i;
      store_up_to<T>(buffer + i, function(load_up_to<T>(saved + i, left_over)), left_over);
    }
  });
  member.end_round();
  return buffer;
}

// A team of several members has at most kFewRows rows. The members share out the weights, whose gradients are then
// complete.
template <class T>
void backward(const MlpLayerBackward<T>* layers, int64_t count, const T* grad_output, T* grad_input, int64_t first_row,
              int64_t last_row, T* scratch, Member& member) {
  int64_t widest = layers[0].in;
  for (int64_t i = 0; i < count; ++i) widest = larger(widest, layers[i].out);
  T* buffers[2] = {scratch, scratch + kGradientRows * widest};  // for the gradient of a layer, and of the one before it
  T *const activated = scratch + 2 * kGradientRows * widest, *const turned = activated + kGradientRows * widest;
  for (int64_t row = first_row; row < last_row; row += kGradientRows) {
    const int64_t rows = smaller(last_row - row, kGradientRows);
    const bool add = row > first_row;
    const T* source = grad_output + row * layers[count - 1].out;
    for (int64_t i = count - 1; i >= 0; --i) {
      const MlpLayerBackward<T>& layer = layers[i];
      const T* gradient = through_activation(layer, source, row, rows, buffers[(i + 1) % 2], member);
      if (layer.grad_bias) {
        sum_rows<T>(gradient, rows, layer.out, layer.grad_bias, layer.lost, add, share_vectors<T>(member, layer.out));
      }
      if (layer.grad_weight) {
        const T* const input = layer_input(&layer, row, rows, activated, member);
        multiply_by_input(layer, gradient, input, rows, turned, add, member);
      }
      T* const next = buffers[i % 2];
      T* grad_layer_input = i > 0 ? next : grad_input ? grad_input + row * layer.in : nullptr;
      if (grad_layer_input) multiply_by_weight(layer, gradient, rows, grad_layer_input, turned, member);
      member.end_round();
      source = next;
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
