#include "rnn_blocks.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// Gate gradients of a row are kSlots times hidden, in the order of the cell's slots: the first kGates of them are
// those of x W_ih^T, the last kGates (for all but GRU the same ones) those of h W_hh^T.
template <class Cell, class C>
struct Layout {
  int64_t hidden, input_size;

  int64_t gates() const { return Cell::kGates * hidden; }
  int64_t gradients() const { return Cell::kSlots * hidden; }
  int64_t hidden_gradients() const { return Cell::kHiddenSlot * hidden; }
  static int64_t padded(int64_t columns) { return divide_up(columns, 2 * kLanes<C>) * 2 * kLanes<C>; }

  // Packed: W_ih with its gates in the order of the slots, then W_hh.
  int64_t hidden_panels() const { return column_panels_size<C>(input_size, gates()); }
  int64_t packed_size() const { return hidden_panels() + column_panels_size<C>(hidden, gates()); }
  // Sums: dW_ih and dW_hh with padded rows, then the column sums of the gate gradients.
  int64_t hidden_sums() const { return gates() * padded(input_size); }
  int64_t bias_sums() const { return hidden_sums() + gates() * padded(hidden); }
  int64_t sums_size() const { return bias_sums() + padded(gradients()); }
};

template <class Cell, class T>
void pack(int64_t hidden, const RnnWeights<T>& weights, Compute<T>* packed) {
  using C = Compute<T>;
  const int64_t input_size = weights.input_size;
  const Layout<Cell, C> layout{hidden, input_size};
  for (int64_t row = 0; row < layout.gates(); ++row) {
    const int64_t gate = Cell::input_gate(static_cast<int>(row / hidden)), unit = row % hidden;
    pack_row(weights.weight_ih + (gate * hidden + unit) * input_size, input_size, layout.gates(),
             packed + row * 2 * kLanes<C>);
    pack_row(weights.weight_hh + row * hidden, hidden, layout.gates(),
             packed + layout.hidden_panels() + row * 2 * kLanes<C>);
  }
}

// product (rows, padded columns) = a (rows, depth) times panels, or, `adding`, that much more.
template <bool transposed, class C>
void multiply(int64_t rows, int64_t depth, const C* a, int64_t a_stride, const C* panels, int64_t columns, bool adding,
              C* product, int64_t product_stride) {
  static constexpr C kZeros[2 * kLanes<C>] = {};
  for (int64_t column = 0; column < columns; column += 2 * kLanes<C>) {
    C* out = product + column;
    multiply_panel<2, transposed>(rows, depth, a, a_stride, panels + column * depth, adding ? out : kZeros,
                                  adding ? product_stride : 0, out, product_stride);
  }
}

// The gradient of a layer's output: the caller's, or what the layer after has passed down.
template <class Cell, class T, class Source>
class BackwardDirection {
  using C = Compute<T>;

 public:
  BackwardDirection(const RnnNetwork<T>& network, int64_t layer, int64_t direction, Part part, int64_t most_rows,
                    const Source* grad_output, C* sums, C* scratch)
      : direction_(network, layer, direction),
        network_(network),
        layout_{network.hidden, direction_.weights.input_size},
        part_(part),
        most_rows_(most_rows),
        grad_output_(grad_output),
        sums_(sums) {
    const int64_t sequences = part.last - part.first, padded = layout_.padded(layout_.hidden);
    gates_ = scratch;
    grad_h_ = gates_ + most_rows * layout_.gradients();
    grad_c_ = grad_h_ + sequences * padded;
    panels_ = grad_c_ + sequences * padded;
  }

  // `destination`, if not null, takes the gradient of the layer's input; the second direction adds to it.
  template <class To>
  void run(const RnnGradients<T>& gradients, Rows<To> destination) {
    const bool backwards = !direction_.reverse();
    int64_t edge = backwards ? network_.steps : 0;
    while (backwards ? edge > 0 : edge < network_.steps) {
      const Block block = next_block(network_, part_, edge, backwards, most_rows_);
      edge = backwards ? block.first : block.last;
      int64_t local = backwards ? block.rows : 0;
      for (int64_t i = 0; i < block.last - block.first; ++i) {
        const int64_t t = backwards ? block.last - 1 - i : block.first + i;
        const int64_t rows = part_.rows(network_.step[t]);
        if (backwards) local -= rows;
        run_step(t, gates_ + local * layout_.gradients(), gradients);
        if (!backwards) local += rows;
      }
      if (sums_) add_to_sums(block);
      if (destination.base) pass_down(block, destination);
    }
  }

 private:
  int64_t padded() const { return layout_.padded(layout_.hidden); }

  void run_step(int64_t t, C* gates, const RnnGradients<T>& gradients) {
    const int64_t rows = part_.rows(network_.step[t]), last = part_.first + rows;
    for (int64_t sequence = direction_.continuing(t, part_); sequence < last; ++sequence) {
      start_gradient(gradients.grad_h_n, sequence, grad_h_);
      if (Cell::kHasCellState) start_gradient(gradients.grad_c_n, sequence, grad_c_);
    }
    const int64_t running = direction_.running(t, part_);
    for (int64_t sequence = part_.first; sequence < last; ++sequence) {
      finish_row(t, sequence, sequence < running, gates + (sequence - part_.first) * layout_.gradients());
    }
    multiply<false>(rows, layout_.gates(), gates + layout_.hidden_gradients(), layout_.gradients(),
                    direction_.weights.packed + layout_.hidden_panels(), layout_.hidden, true, grad_h_, padded());
    for (int64_t sequence = running; sequence < last; ++sequence) {
      end_gradient(gradients.grad_h0, sequence, grad_h_);
      if (Cell::kHasCellState) end_gradient(gradients.grad_c0, sequence, grad_c_);
    }
  }

  void start_gradient(const T* given, int64_t sequence, C* to) {
    C* row = to + (sequence - part_.first) * padded();
    for (int64_t i = 0; i < padded(); i += kLanes<C>) store(row + i, Vec<C>{});
    if (given) copy_masked<T, C>(given + direction_.state_offset(sequence), nullptr, layout_.hidden, row);
  }
  void end_gradient(T* wanted, int64_t sequence, const C* from) {
    if (!wanted) return;
    copy_masked<C, T>(from + (sequence - part_.first) * padded(), nullptr, layout_.hidden,
                      wanted + direction_.state_offset(sequence));
  }

  const RnnStep& step_before(int64_t t) const { return network_.step[direction_.reverse() ? t + 1 : t - 1]; }

  // h of the step before, or null for zeros.
  const T* previous_output(int64_t t, int64_t sequence, bool runs) const {
    if (runs) return direction_.output(step_before(t), sequence);
    return network_.h0 ? network_.h0 + direction_.state_offset(sequence) : nullptr;
  }
  const T* previous_cell(int64_t t, int64_t sequence, bool runs) const {
    if (runs) return direction_.template saved<Cell>(step_before(t), sequence) + (Cell::kSaved - 1) * layout_.hidden;
    return network_.c0 ? network_.c0 + direction_.state_offset(sequence) : nullptr;
  }

  // The cell's own backward, for all units of a row.
  void finish_row(int64_t t, int64_t sequence, bool runs, C* gates) {
    const RnnStep& step = network_.step[t];
    const T* output = direction_.output(step, sequence);
    const T* before = Cell::kNeedsPrevious ? previous_output(t, sequence, runs) : nullptr;
    const T* cell_before = Cell::kHasCellState ? previous_cell(t, sequence, runs) : nullptr;
    const T* kept = Cell::kSaved > 0 ? direction_.template saved<Cell>(step, sequence) : nullptr;
    const Source* grad_output =
        grad_output_ ? grad_output_ + (step.row + sequence) * network_.width() + direction_.direction * layout_.hidden
                     : nullptr;
    C* grad_h = grad_h_ + (sequence - part_.first) * padded();
    C* grad_c = grad_c_ + (sequence - part_.first) * padded();
    for (int64_t unit = 0; unit < layout_.hidden; unit += kLanes<C>) {
      const int64_t left_over = layout_.hidden - unit;
      Vec<C> saved[Cell::kSaved + 1], grads[Cell::kSlots], carry, dc = {}, h = {}, h_before = {}, c_before = {};
      for (int s = 0; s < Cell::kSaved; ++s) saved[s] = load_up_to<T>(kept + s * layout_.hidden + unit, left_over);
      Vec<C> dh = load(grad_h + unit);
      if (grad_output) dh += load_up_to<Source>(grad_output + unit, left_over);
      if (Cell::kSaved == 0) h = load_up_to<T>(output + unit, left_over);
      if (Cell::kNeedsPrevious && before) h_before = load_up_to<T>(before + unit, left_over);
      if (Cell::kHasCellState && cell_before) c_before = load_up_to<T>(cell_before + unit, left_over);
      if (Cell::kHasCellState) dc = load(grad_c + unit);
      Cell::template backward<C>(dh, h, h_before, c_before, saved, dc, carry, grads);
      store(grad_h + unit, carry);
      if (Cell::kHasCellState) store(grad_c + unit, dc);
      for (int s = 0; s < Cell::kSlots; ++s) store_up_to<C>(gates + s * layout_.hidden + unit, grads[s], left_over);
    }
  }

  // dW_ih += dgates^T x, dW_hh += dgates^T h of the step before, and the column sums for the biases.
  void add_to_sums(Block block) {
    const int64_t input_size = layout_.input_size, hidden = layout_.hidden;
    const Rows<T> rows = layer_input(network_, direction_.layer);
    const T* mask = layer_mask(network_, direction_.layer);
    for_rows(network_, part_, block, [&](const RnnStep& step, int64_t sequence, int64_t local) {
      pack_masked_row(rows.at(step, sequence), mask ? mask + (step.row + sequence) * input_size : nullptr, input_size,
                      block.rows, panels_ + local * 2 * kLanes<C>);
    });
    multiply<true>(layout_.gates(), block.rows, gates_, layout_.gradients(), panels_, input_size, true, sums_,
                   layout_.padded(input_size));
    for_rows(network_, part_, block, [&](const RnnStep& step, int64_t sequence, int64_t local) {
      const int64_t t = &step - network_.step;
      const T* before = previous_output(t, sequence, sequence < direction_.running(t, part_));
      C* panel = panels_ + local * 2 * kLanes<C>;
      if (before) {
        pack_row(before, hidden, block.rows, panel);
      } else {
        clear_row(hidden, block.rows, panel);
      }
    });
    multiply<true>(layout_.gates(), block.rows, gates_ + layout_.hidden_gradients(), layout_.gradients(), panels_,
                   hidden, true, sums_ + layout_.hidden_sums(), padded());
    add_rows(block.rows);
  }

  static void pack_masked_row(const T* row, const T* mask, int64_t columns, int64_t depth, C* panels) {
    if (!mask) return pack_row(row, columns, depth, panels);
    for (int64_t column = 0; column < columns; column += kLanes<C>) {
      const int64_t vector = column / kLanes<C>;
      store(panels + (vector / 2 * depth * 2 + vector % 2) * kLanes<C>,
            load_up_to<T>(row + column, columns - column) * load_up_to<T>(mask + column, columns - column));
    }
    if (divide_up(columns, kLanes<C>) % 2) {
      store(panels + (columns / kLanes<C> / 2 * depth * 2 + 1) * kLanes<C>, Vec<C>{});
    }
  }
  static void clear_row(int64_t columns, int64_t depth, C* panels) {
    for (int64_t column = 0; column < columns; column += 2 * kLanes<C>) {
      store(panels + column * depth, Vec<C>{});
      store(panels + column * depth + kLanes<C>, Vec<C>{});
    }
  }

  void add_rows(int64_t rows) {
    C* total = sums_ + layout_.bias_sums();
    const int64_t columns = layout_.gradients();
    for (int64_t column = 0; column < columns; column += kLanes<C>) {
      const int64_t left_over = columns - column;
      Vec<C> sum = {};
      for (int64_t row = 0; row < rows; ++row) sum += load_up_to<C>(gates_ + row * columns + column, left_over);
      store_up_to<C>(total + column, load_up_to<C>(total + column, left_over) + sum, left_over);
    }
  }

  // The gradient of the layer's input = dgates W_ih, times the dropout mask.
  template <class To>
  void pass_down(Block block, Rows<To> destination) {
    const int64_t columns = layout_.input_size, stride = layout_.padded(columns);
    const T* mask = layer_mask(network_, direction_.layer);
    multiply<false>(block.rows, layout_.gates(), gates_, layout_.gradients(), direction_.weights.packed, columns, false,
                    panels_, stride);
    for_rows(network_, part_, block, [&](const RnnStep& step, int64_t sequence, int64_t local) {
      To* to = const_cast<To*>(destination.at(step, sequence));
      const T* row_mask = mask ? mask + (step.row + sequence) * columns : nullptr;
      for (int64_t i = 0; i < columns; i += kLanes<C>) {
        Vec<C> value = load(panels_ + local * stride + i);
        if (row_mask) value *= load_up_to<T>(row_mask + i, columns - i);
        if (direction_.direction > 0) value += load_up_to<To>(to + i, columns - i);
        store_up_to<To>(to + i, value, columns - i);
      }
    });
  }

  const Direction<T> direction_;
  const RnnNetwork<T>& network_;
  const Layout<Cell, C> layout_;
  const Part part_;
  const int64_t most_rows_;
  const Source* grad_output_;  // (rows, directions * hidden), or null
  C* sums_;
  C* gates_;   // (block rows, gradients)
  C* grad_h_;  // (sequences, padded): what the step after passes back
  C* grad_c_;  // (sequences, padded)
  C* panels_;  // a block of x or h in panels, or of the input's gradient
};

template <class T>
int64_t widest(const RnnNetwork<T>& network) {
  const int64_t inner = network.layers > 1 ? network.width() : network.hidden;
  return Layout<LstmCell, Compute<T>>::padded(larger(network.weights[0].input_size, inner));
}

template <class Cell, class T>
int64_t most_rows(const RnnNetwork<T>& network, int64_t sequences) {
  return block_rows(sequences, network.rows, Cell::kSlots * network.hidden + widest(network));
}

template <class T>
int64_t packed_size(RnnMode mode, int64_t hidden, int64_t input_size) {
  return with_cell(mode,
                   [&](auto cell) { return Layout<decltype(cell), Compute<T>>{hidden, input_size}.packed_size(); });
}

template <class T>
void pack_weights(RnnMode mode, int64_t hidden, const RnnWeights<T>& weights, Compute<T>* packed) {
  with_cell(mode, [&](auto cell) { pack<decltype(cell), T>(hidden, weights, packed); });
}

template <class T>
int64_t scratch_size(const RnnNetwork<T>& network, int64_t sequences) {
  return with_cell(network.mode, [&](auto cell) {
    using Cell = decltype(cell);
    const Layout<Cell, Compute<T>> layout{network.hidden, 0};
    const int64_t rows = most_rows<Cell>(network, sequences);
    return rows * (layout.gradients() + widest(network)) + 2 * sequences * layout.padded(network.hidden);
  });
}

template <class T>
int64_t sums_size(RnnMode mode, int64_t hidden, int64_t input_size) {
  return with_cell(mode, [&](auto cell) { return Layout<decltype(cell), Compute<T>>{hidden, input_size}.sums_size(); });
}

template <class Cell, class T, class Source>
void run_layer(const RnnNetwork<T>& network, const RnnGradients<T>& gradients, int64_t layer, const Source* grad_output,
               Compute<T>* grad_below, Compute<T>* sums, Part part, Compute<T>* scratch) {
  using C = Compute<T>;
  const int64_t rows = most_rows<Cell>(network, part.last - part.first);
  for (int64_t direction = 0; direction < network.directions; ++direction) {
    BackwardDirection<Cell, T, Source> pass(network, layer, direction, part, rows, grad_output, sums, scratch);
    if (layer == 0) {
      pass.run(gradients, Rows<T>{gradients.grad_input, network.input_stride, true});
    } else {
      pass.run(gradients, Rows<C>{grad_below, network.width(), false});
    }
    if (sums) {
      sums += Layout<Cell, C>{network.hidden, network.weights[layer * network.directions].input_size}.sums_size();
    }
  }
}

template <class T>
void run(const RnnNetwork<T>& network, const RnnGradients<T>& gradients, Compute<T>* layer_grads, Compute<T>* sums,
         int64_t first, int64_t last, Compute<T>* scratch) {
  using C = Compute<T>;
  with_cell(network.mode, [&](auto cell) {
    using Cell = decltype(cell);
    const auto sums_of = [&](int64_t layer) -> C* {
      C* at = sums;
      for (int64_t i = 0; at && i < layer; ++i) {
        at += network.directions *
              Layout<Cell, C>{network.hidden, network.weights[i * network.directions].input_size}.sums_size();
      }
      return at;
    };
    const auto buffer = [&](int64_t layer) { return layer_grads + layer % 2 * network.rows * network.width(); };
    const int64_t top = network.layers - 1;
    run_layer<Cell>(network, gradients, top, gradients.grad_output, buffer(top), sums_of(top), {first, last}, scratch);
    for (int64_t layer = top - 1; layer >= 0; --layer) {
      run_layer<Cell>(network, gradients, layer, static_cast<const C*>(buffer(layer + 1)), buffer(layer),
                      sums_of(layer), {first, last}, scratch);
    }
  });
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

template <class T>
void finish(RnnMode mode, int64_t hidden, int64_t input_size, const Compute<T>* sums, int64_t parts, int64_t stride,
            T* grad_weight_ih, T* grad_weight_hh, T* grad_bias_ih, T* grad_bias_hh) {
  using C = Compute<T>;
  with_cell(mode, [&](auto cell) {
    using Cell = decltype(cell);
    const Layout<Cell, C> layout{hidden, input_size};
    const C* biases = sums + layout.bias_sums();
    for (int slot = 0; slot < Cell::kGates; ++slot) {
      const int64_t gate = Cell::input_gate(slot);
      add_parts<T>(sums + slot * hidden * layout.padded(input_size), parts, stride, hidden, input_size,
                   layout.padded(input_size), grad_weight_ih + gate * hidden * input_size);
      if (grad_bias_ih) {
        add_parts<T>(biases + slot * hidden, parts, stride, 1, hidden, hidden, grad_bias_ih + gate * hidden);
      }
    }
    add_parts<T>(sums + layout.hidden_sums(), parts, stride, layout.gates(), hidden, layout.padded(hidden),
                 grad_weight_hh);
    if (grad_bias_hh) {
      add_parts<T>(biases + layout.hidden_gradients(), parts, stride, 1, layout.gates(), layout.gates(), grad_bias_hh);
    }
  });
}

template <class T>
constexpr RnnBackwardKernels<T> kernels() {
  return {packed_size<T>, pack_weights<T>, scratch_size<T>, sums_size<T>, run<T>, finish<T>};
}

}  // namespace

extern const RnnBackwardTable rnn_backward_kernels = {kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
