// How backward has its weights packed, and its gradients laid out.
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
void pack_backward(const RnnNetwork<T>& network, const RnnWeights<T>& weights, Compute<T>* packed) {
  using C = Compute<T>;
  const int64_t input_size = weights.input_size, hidden = network.hidden, outputs = network.outputs();
  const BackwardLayout<Cell, C> layout(network, input_size);
  for (int64_t row = 0; row < layout.gates(); ++row) {
    const int64_t gate = Cell::input_gate(static_cast<int>(row / hidden)), unit = row % hidden;
    pack_row(weights.weight_ih + (gate * hidden + unit) * input_size, input_size, layout.gates(),
             packed + row * 2 * kLanes<C>);
    pack_row(weights.weight_hh + row * outputs, outputs, layout.gates(),
             packed + layout.hidden_panels() + row * 2 * kLanes<C>);
  }
  for (int64_t row = 0; row < network.projected; ++row) {
    pack_row(weights.weight_hr + row * hidden, hidden, network.projected,
             packed + layout.projection() + row * 2 * kLanes<C>);
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
