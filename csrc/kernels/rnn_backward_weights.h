// How backward packs its weights, lays out its gradients, and puts the gradients of the weights together.
#pragma once

#include "panel.h"
#include "rnn_cells.h"

namespace fastnn {
namespace FASTNN_ISA {

// Gate gradients of a row are kSlots times hidden, in the order of the cell's slots: the first kGates of them are
// those of x W_ih^T, the last kGates (for all but GRU the same ones) those of h W_hh^T.
template <class Cell, class C>
struct BackwardLayout {
  int64_t hidden, projected, input_size;

  template <class T>
  BackwardLayout(const RnnNetwork<T>& network, int64_t input_size)
      : hidden(network.hidden), projected(network.projected), input_size(input_size) {}

  int64_t outputs() const { return projected ? projected : hidden; }
  int64_t gates() const { return Cell::kGates * hidden; }
  int64_t gradients() const { return Cell::kSlots * hidden; }
  int64_t hidden_gradients() const { return Cell::kHiddenSlot * hidden; }
  static int64_t padded(int64_t columns) { return padded_columns<C>(columns); }

  // Packed: W_ih with its gates in the order of the slots, W_hh, W_hr.
  int64_t hidden_panels() const { return padded(input_size) * gates(); }
  int64_t projection() const { return hidden_panels() + padded(outputs()) * gates(); }
  int64_t packed_size() const { return projection() + padded(hidden) * projected; }
  // Sums: dW_ih, dW_hh and dW_hr with padded rows, then the column sums of the gate gradients.
  int64_t hidden_sums() const { return gates() * padded(input_size); }
  int64_t projection_sums() const { return hidden_sums() + gates() * padded(outputs()); }
  int64_t bias_sums() const { return projection_sums() + projected * padded(hidden); }
  int64_t sums_size() const { return bias_sums() + padded(gradients()); }
};

template <class Cell, class T>
void pack_backward(const RnnNetwork<T>& network, const RnnWeights<T>& weights, bool weight_ih, const Member& member,
                   Compute<T>* packed) {
  using C = Compute<T>;
  const int64_t input_size = weights.input_size, hidden = network.hidden, outputs = network.outputs();
  const BackwardLayout<Cell, C> layout(network, input_size);
  const Share gates = member.share(layout.gates()), projected = member.share(network.projected);
  for (int64_t row = gates.first; row < gates.last; ++row) {
    const int64_t gate = Cell::input_gate(static_cast<int>(row / hidden)), unit = row % hidden;
    if (weight_ih) {
      pack_row(weights.weight_ih + (gate * hidden + unit) * input_size, input_size, layout.gates(),
               packed + row * 2 * kLanes<C>);
    }
    pack_row(weights.weight_hh + row * outputs, outputs, layout.gates(),
             packed + layout.hidden_panels() + row * 2 * kLanes<C>);
  }
  for (int64_t row = projected.first; row < projected.last; ++row) {
    pack_row(weights.weight_hr + row * hidden, hidden, network.projected,
             packed + layout.projection() + row * 2 * kLanes<C>);
  }
}

// to (rows, columns) <- the sum of `parts` matrices with padded rows
template <class T>
void add_parts(const Compute<T>* sums, int64_t parts, int64_t stride, int64_t rows, int64_t columns, int64_t padded,
               T* to) {
  using C = Compute<T>;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; i += kLanes<C>) {
      Vec<C> value = load_up_to<C>(sums + row * padded + i, columns - i);
      for (int64_t part = 1; part < parts; ++part) {
        value += load_up_to<C>(sums + part * stride + row * padded + i, columns - i);
      }
      store_up_to<T>(to + row * columns + i, value, columns - i);
    }
  }
}

template <class Cell, class T>
void finish_sums(const RnnNetwork<T>& network, int64_t input_size, const Compute<T>* sums, int64_t parts,
                 int64_t stride, const RnnWeightGradients<T>& gradients) {
  using C = Compute<T>;
  const BackwardLayout<Cell, C> layout(network, input_size);
  const int64_t hidden = network.hidden, outputs = network.outputs(), projected = network.projected;
  const C* biases = sums + layout.bias_sums();
  for (int slot = 0; slot < Cell::kGates; ++slot) {
    const int64_t gate = Cell::input_gate(slot);
    add_parts<T>(sums + slot * hidden * layout.padded(input_size), parts, stride, hidden, input_size,
                 layout.padded(input_size), gradients.weight_ih + gate * hidden * input_size);
    if (gradients.bias_ih) {
      add_parts<T>(biases + slot * hidden, parts, stride, 1, hidden, hidden, gradients.bias_ih + gate * hidden);
    }
  }
  add_parts<T>(sums + layout.hidden_sums(), parts, stride, layout.gates(), outputs, layout.padded(outputs),
               gradients.weight_hh);
  if (gradients.bias_hh) {
    add_parts<T>(biases + layout.hidden_gradients(), parts, stride, 1, layout.gates(), layout.gates(),
                 gradients.bias_hh);
  }
  if (projected) {
    add_parts<T>(sums + layout.projection_sums(), parts, stride, projected, hidden, layout.padded(hidden),
                 gradients.weight_hr);
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
