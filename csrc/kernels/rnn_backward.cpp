#include "rnn_backward_weights.h"
#include "rnn_blocks.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// to (count) <- value, times mask if there is one, added to what is there if `adding`
template <class C, class T, class To>
FASTNN_INLINE void add_masked(const C* value, const T* mask, int64_t count, bool adding, To* to) {
  for (int64_t i = 0; i < count; i += kLanes<C>) {
    Vec<C> sum = load_up_to<C>(value + i, count - i);
    if (mask) sum *= load_up_to<T>(mask + i, count - i);
    if (adding) sum += load_up_to<To>(to + i, count - i);
    store_up_to<To>(to + i, sum, count - i);
  }
}

// h of the step before, or null for zeros. `running`: whether the sequence has run there.
template <class T>
FASTNN_INLINE const T* previous_output(const Direction<T>& direction, int64_t t, int64_t sequence, bool running) {
  const RnnNetwork<T>& network = direction.network;
  if (running) return direction.output(network.step[direction.reverse() ? t + 1 : t - 1], sequence);
  return network.h0 ? network.h0 + direction.h_offset(sequence) : nullptr;
}

// Backward of one direction of one layer. grad_output is the gradient of the layer's output: the caller's, or what the
// layer above has passed down. In a step, the members of a team share the hidden units (columns). Between blocks of
// steps they share the rows of the sums and of the input's gradient.
template <class Cell, class T, class Source>
class BackwardDirection {
  using C = Compute<T>;

 public:
  BackwardDirection(const RnnNetwork<T>& network, int64_t layer, int64_t direction, Part part, int64_t most_rows,
                    Rows<Source> grad_output, C* sums, Member& member, RnnScratch<C> scratch)
      : direction_(network, layer, direction),
        network_(network),
        layout_(network, direction_.weights.input_size),
        part_(part),
        most_rows_(most_rows),
        grad_output_(grad_output),
        sums_(sums),
        member_(member) {
    const int64_t sequences = part.last - part.first;
    gates_ = scratch.shared;
    outputs_ = gates_ + most_rows * layout_.gradients();
    grad_h_ = outputs_ + most_rows * layout_.projected;
    grad_c_ = grad_h_ + sequences * padded();
    grad_projected_ = grad_c_ + sequences * padded();
    row_ = scratch.own;
    panels_ = row_ + padded();
  }
  static RnnScratchSize scratch_size(const RnnNetwork<T>& network, int64_t sequences, int64_t most_rows,
                                     int64_t widest) {
    const BackwardLayout<Cell, C> layout(network, 0);
    const int64_t padded = layout.padded(network.hidden);
    return {most_rows * (layout.gradients() + network.projected) + 3 * sequences * padded, padded + most_rows * widest};
  }

  // Runs the steps alone. The gradients of the gates go to `gates`, at each row's place among all rows.
  void run_steps(const RnnGradients<T>& gradients, C* gates) {
    gates_ = gates;
    for (int64_t i = 0; i < network_.steps; ++i) {
      const int64_t t = direction_.reverse() ? i : network_.steps - 1 - i;
      if (part_.rows(network_.step[t]) > 0) run_step(t, network_.step[t].row + part_.first, gradients);
    }
    member_.end_round();
  }

  // `destination`, if not null, takes the gradient of the layer's input; the second direction adds to it.
  template <class To>
  void run(const RnnGradients<T>& gradients, Rows<To> destination) {
    const bool backwards = !direction_.reverse();
    int64_t edge = backwards ? network_.steps : 0;
    while (backwards ? edge > 0 : edge < network_.steps) {
      const StepBlock block = next_block(network_, part_, edge, backwards, most_rows_);
      edge = backwards ? block.first : block.last;
      int64_t local = backwards ? block.rows : 0;
      for (int64_t i = 0; i < block.last - block.first; ++i) {
        const int64_t t = backwards ? block.last - 1 - i : block.first + i;
        const int64_t rows = part_.rows(network_.step[t]);
        if (backwards) local -= rows;
        run_step(t, local, gradients);
        if (!backwards) local += rows;
      }
      if (sums_) add_to_sums(block);
      if (destination.base) pass_down(block, destination);
      member_.end_round();
    }
  }

 private:
  int64_t padded() const { return layout_.padded(layout_.hidden); }

  // This member's part of some columns: whole panels of two vectors.
  Share share_columns(int64_t columns) const {
    constexpr int64_t width = 2 * kLanes<C>;
    const Share panels = member_.share(divide_up(columns, width));
    return {smaller(panels.first * width, columns), smaller(panels.last * width, columns)};
  }

  void run_step(int64_t t, int64_t local, const RnnGradients<T>& gradients) {
    const int64_t rows = part_.rows(network_.step[t]), last = part_.first + rows;
    C* gates = gates_ + local * layout_.gradients();
    const int64_t outputs = layout_.outputs();
    const Share units = share_columns(layout_.hidden), columns = share_columns(outputs);
    for (int64_t sequence = direction_.continuing(t, part_); sequence < last; ++sequence) {
      const int64_t h_offset = direction_.h_offset(sequence) - gradients.h_n_from * network_.batch * outputs;
      start_gradient(h_offset < 0 ? nullptr : gradients.grad_h_n, h_offset, columns, row_of(grad_h(), sequence));
      if (Cell::kHasCellState) {
        start_gradient(gradients.grad_c_n, direction_.c_offset(sequence), units, row_of(grad_c_, sequence));
      }
    }
    if (layout_.projected) undo_projection(t, rows, columns, outputs_ + local * layout_.projected);
    const int64_t running = direction_.running(t, part_);
    const Share units_now = share_columns(layout_.hidden);
    for (int64_t sequence = part_.first; sequence < last; ++sequence) {
      finish_row(t, sequence, sequence < running, units_now, gates + (sequence - part_.first) * layout_.gradients());
    }
    member_.end_round();
    const Share columns_now = share_columns(outputs), units_after = share_columns(layout_.hidden);
    multiply_columns(rows, layout_.gates(), gates + layout_.hidden_gradients(), layout_.gradients(),
                     direction_.weights.packed + layout_.hidden_panels(), columns_now, !layout_.projected, grad_h());
    for (int64_t sequence = running; sequence < last; ++sequence) {
      end_gradient(gradients.grad_h0, direction_.h_offset(sequence), columns_now, row_of(grad_h(), sequence));
      if (Cell::kHasCellState) {
        end_gradient(gradients.grad_c0, direction_.c_offset(sequence), units_after, row_of(grad_c_, sequence));
      }
    }
  }

  // Those columns of to (rows, padded) (+)= a times packed weights.
  void multiply_columns(int64_t rows, int64_t depth, const C* a, int64_t a_stride, const C* panels, Share columns,
                        bool adding, C* to) {
    multiply_panels<false>(rows, rows, depth, a, a_stride, panels + columns.first * depth, columns.last - columns.first,
                           adding, to + columns.first, padded());
  }

  // The gradient of h as the step before passes it on: after the projection, if there is one.
  C* grad_h() const { return layout_.projected ? grad_projected_ : grad_h_; }
  C* row_of(C* rows, int64_t sequence) const { return rows + (sequence - part_.first) * padded(); }

  void start_gradient(const T* given, int64_t offset, Share columns, C* row) {
    for (int64_t i = columns.first; i < columns.last; i += kLanes<C>) store(row + i, Vec<C>{});
    if (given) copy_columns<T, C>(given + offset, columns, row);
  }
  void end_gradient(T* wanted, int64_t offset, Share columns, const C* row) {
    if (wanted) copy_columns<C, T>(row, columns, wanted + offset);
  }
  template <class From, class To>
  static void copy_columns(const From* from, Share columns, To* to) {
    copy_masked<From, To>(from + columns.first, nullptr, columns.last - columns.first, to + columns.first);
  }

  // grad_h_ <- the gradient of the projected h times W_hr. The former is saved in `arrived`, for W_hr's gradient.
  void undo_projection(int64_t t, int64_t rows, Share columns, C* arrived) {
    const int64_t projected = layout_.projected;
    for (int64_t row = 0; row < rows; ++row) {
      const Source* grad_output = output_gradient(network_.step[t], part_.first + row);
      for (int64_t i = columns.first; i < columns.last; i += kLanes<C>) {
        Vec<C> sum = load(grad_projected_ + row * padded() + i);
        if (grad_output) sum += load_up_to<Source>(grad_output + i, projected - i);
        store_up_to<C>(arrived + row * projected + i, sum, projected - i);
      }
    }
    member_.end_round();
    multiply_columns(rows, projected, arrived, projected, direction_.weights.packed + layout_.projection(),
                     share_columns(layout_.hidden), false, grad_h_);
  }

  const RnnStep& step_before(int64_t t) const { return network_.step[direction_.reverse() ? t + 1 : t - 1]; }

  // The direction's own columns of a row, or null.
  const Source* output_gradient(const RnnStep& step, int64_t sequence) const {
    if (!grad_output_.base) return nullptr;
    return grad_output_.at(step, sequence) + direction_.direction * layout_.outputs();
  }
  const T* previous_cell(int64_t t, int64_t sequence, bool runs) const {
    if (runs) return direction_.template saved<Cell>(step_before(t), sequence) + (Cell::kSaved - 1) * layout_.hidden;
    return network_.c0 ? network_.c0 + direction_.c_offset(sequence) : nullptr;
  }

  // The cell's own backward, for some units of a row.
  void finish_row(int64_t t, int64_t sequence, bool runs, Share units, C* gates) {
    const RnnStep& step = network_.step[t];
    const T* output = direction_.output(step, sequence);
    const T* before = Cell::kNeedsPrevious ? previous_output(direction_, t, sequence, runs) : nullptr;
    const T* cell_before = Cell::kHasCellState ? previous_cell(t, sequence, runs) : nullptr;
    const T* kept = Cell::kSaved > 0 ? direction_.template saved<Cell>(step, sequence) : nullptr;
    const Source* grad_output = layout_.projected ? nullptr : output_gradient(step, sequence);
    using V = Lockstep<C, 1>;  // reading what was saved takes most time, so several in lockstep are no faster
    C* grad_h = row_of(grad_h_, sequence);
    C* grad_c = row_of(grad_c_, sequence);
    for (int64_t unit = units.first; unit < units.last; unit += kLanes<C>) {
      const int64_t left_over = layout_.hidden - unit;
      const auto load_units = [&](const auto* from) { return V{{load_up_to(from + unit, left_over)}}; };
      V saved[Cell::kSaved + 1], grads[Cell::kSlots], carry, dc = {}, h = {}, h_before = {}, c_before = {};
      for (int s = 0; s < Cell::kSaved; ++s) saved[s] = load_units(kept + s * layout_.hidden);
      V dh{{load(grad_h + unit)}};
      if (grad_output) dh = dh + load_units(grad_output);
      if (Cell::kSaved == 0) h = load_units(output);
      if (Cell::kNeedsPrevious && before) h_before = load_units(before);
      if (Cell::kHasCellState && cell_before) c_before = load_units(cell_before);
      if (Cell::kHasCellState) dc = {{load(grad_c + unit)}};
      Cell::backward(dh, h, h_before, c_before, saved, dc, carry, grads);
      store(grad_h + unit, carry.part[0]);
      if (Cell::kHasCellState) store(grad_c + unit, dc.part[0]);
      for (int s = 0; s < Cell::kSlots; ++s) {
        store_up_to<C>(gates + s * layout_.hidden + unit, grads[s].part[0], left_over);
      }
    }
  }

  // dW_ih += dgates^T x, dW_hh += dgates^T h of the step before, and the column sums for the biases: some rows each.
  void add_to_sums(StepBlock block) {
    const Share gates = member_.share(layout_.gates());
    const int64_t input_size = layout_.input_size, outputs = layout_.outputs();
    const Rows<T> rows = layer_input(network_, direction_.layer);
    const T* mask = layer_mask(network_, direction_.layer);
    add_rows(block.rows);
    if (gates.empty()) return;
    for_rows(network_, part_, block, [&](const RnnStep& step, int64_t sequence, int64_t local) {
      pack_masked_row(rows.at(step, sequence), mask ? mask + (step.row + sequence) * input_size : nullptr, input_size,
                      block.rows, panels_ + local * 2 * kLanes<C>);
    });
    add_products(gates, layout_.gates(), block.rows, gates_, layout_.gradients(), input_size, sums_);
    for_rows(network_, part_, block, [&](const RnnStep& step, int64_t sequence, int64_t local) {
      const int64_t t = &step - network_.step;
      const T* before = previous_output(direction_, t, sequence, sequence < direction_.running(t, part_));
      C* panel = panels_ + local * 2 * kLanes<C>;
      if (before) {
        pack_row(before, outputs, block.rows, panel);
      } else {
        clear_row<C>(outputs, block.rows, panel);
      }
    });
    add_products(gates, layout_.gates(), block.rows, gates_ + layout_.hidden_gradients(), layout_.gradients(), outputs,
                 sums_ + layout_.hidden_sums());
    if constexpr (Cell::kHasCellState) {
      if (layout_.projected) add_projection(block);
    }
  }

  // Some of the rows of sums (all, padded columns) += a (depth, all)^T times the panels.
  void add_products(Share rows, int64_t all, int64_t depth, const C* a, int64_t a_stride, int64_t columns, C* sums) {
    const int64_t stride = layout_.padded(columns);
    multiply_panels<true>(all, rows.last - rows.first, depth, a + rows.first, a_stride, panels_, columns, true,
                          sums + rows.first * stride, stride);
  }

  // dW_hr += (gradient of the projected h)^T h. h before its projection is computed again from what the cell has saved.
  void add_projection(StepBlock block) {
    const int64_t hidden = layout_.hidden, projected = layout_.projected;
    for_rows(network_, part_, block, [&](const RnnStep& step, int64_t sequence, int64_t local) {
      const T* kept = direction_.template saved<Cell>(step, sequence);
      for (int64_t unit = 0; unit < hidden; unit += kLanes<C>) {
        Lockstep<C, 1> saved[Cell::kSaved];
        for (int s = 0; s < Cell::kSaved; ++s)
          saved[s].part[0] = load_up_to<T>(kept + s * hidden + unit, hidden - unit);
        store(row_ + unit, Cell::output(saved).part[0]);
      }
      pack_row(row_, hidden, block.rows, panels_ + local * 2 * kLanes<C>);
    });
    add_products(member_.share(projected), projected, block.rows, outputs_, projected, hidden,
                 sums_ + layout_.projection_sums());
  }

  void add_rows(int64_t rows) {
    C* total = sums_ + layout_.bias_sums();
    const int64_t columns = layout_.gradients();
    const Share share = share_columns(columns);
    for (int64_t column = share.first; column < share.last; column += kLanes<C>) {
      const int64_t left_over = columns - column;
      Vec<C> sum = {};
      for (int64_t row = 0; row < rows; ++row) sum += load_up_to<C>(gates_ + row * columns + column, left_over);
      store_up_to<C>(total + column, load_up_to<C>(total + column, left_over) + sum, left_over);
    }
  }

  // The gradient of the layer's input = dgates W_ih, times the dropout mask.
  template <class To>
  void pass_down(StepBlock block, Rows<To> destination) {
    const int64_t columns = layout_.input_size, stride = layout_.padded(columns);
    const T* mask = layer_mask(network_, direction_.layer);
    const Share share = member_.share(block.rows);
    multiply_panels<false>(block.rows, share.last - share.first, layout_.gates(),
                           gates_ + share.first * layout_.gradients(), layout_.gradients(), direction_.weights.packed,
                           columns, false, panels_ + share.first * stride, stride);
    for_rows(network_, part_, block, [&](const RnnStep& step, int64_t sequence, int64_t local) {
      if (local < share.first || local >= share.last) return;
      add_masked(panels_ + local * stride, mask ? mask + (step.row + sequence) * columns : nullptr, columns,
                 direction_.direction > 0, const_cast<To*>(destination.at(step, sequence)));
    });
  }

  const Direction<T> direction_;
  const RnnNetwork<T>& network_;
  const BackwardLayout<Cell, C> layout_;
  const Part part_;
  const int64_t most_rows_;
  const Rows<Source> grad_output_;  // (rows, width), or null
  C* sums_;
  Member& member_;
  // Shared:
  C* gates_;           // (block rows, gradients)
  C* outputs_;         // (block rows, projected): what arrives at the projected h
  C* grad_h_;          // (sequences, padded): what the step after passes back
  C* grad_c_;          // (sequences, padded)
  C* grad_projected_;  // (sequences, padded): in place of grad_h_, where there is a projection
  // The member's own:
  C* row_;     // (padded): h before its projection
  C* panels_;  // a block of x or h in panels, or of the input's gradient
};

template <class T>
int64_t widest(const RnnNetwork<T>& network) {
  const int64_t inner = network.layers > 1 ? larger(network.width(), network.hidden) : network.hidden;
  return padded_columns<Compute<T>>(larger(network.weights[0].input_size, inner));
}

template <class Cell, class T>
int64_t most_rows(const RnnNetwork<T>& network, int64_t sequences) {
  return block_rows(sequences, network.rows, Cell::kSlots * network.hidden + network.projected + widest(network));
}

template <class T>
int64_t packed_size(const RnnNetwork<T>& network, int64_t input_size) {
  return with_cell(network.mode, [&](auto cell) {
    return BackwardLayout<decltype(cell), Compute<T>>(network, input_size).packed_size();
  });
}

template <class T>
void pack_weights(const RnnNetwork<T>& network, const RnnWeights<T>& weights, const Member& member,
                  Compute<T>* packed) {
  with_cell(network.mode, [&](auto cell) { pack_backward<decltype(cell), T>(network, weights, true, member, packed); });
}

template <class T>
void pack_hidden_weights(const RnnNetwork<T>& network, const RnnWeights<T>& weights, const Member& member,
                         Compute<T>* packed) {
  with_cell(network.mode,
            [&](auto cell) { pack_backward<decltype(cell), T>(network, weights, false, member, packed); });
}

template <class T>
RnnScratchSize scratch_size(const RnnNetwork<T>& network, int64_t sequences) {
  return with_cell(network.mode, [&](auto cell) {
    using Cell = decltype(cell);
    return BackwardDirection<Cell, T, T>::scratch_size(network, sequences, most_rows<Cell>(network, sequences),
                                                       widest(network));
  });
}

template <class T>
int64_t sums_size(const RnnNetwork<T>& network, int64_t input_size) {
  return with_cell(network.mode, [&](auto cell) {
    return BackwardLayout<decltype(cell), Compute<T>>(network, input_size).sums_size();
  });
}

template <class Cell, class T, class Source>
void run_layer(const RnnNetwork<T>& network, const RnnGradients<T>& gradients, int64_t layer, Rows<Source> grad_output,
               Compute<T>* grad_below, Compute<T>* sums, Part part, Member& member, RnnScratch<Compute<T>> scratch) {
  using C = Compute<T>;
  const int64_t rows = most_rows<Cell>(network, part.last - part.first);
  for (int64_t direction = 0; direction < network.directions; ++direction) {
    BackwardDirection<Cell, T, Source> pass(network, layer, direction, part, rows, grad_output, sums, member, scratch);
    if (layer == 0) {
      pass.run(gradients, Rows<T>{gradients.grad_input, network.input_stride, &RnnStep::input});
    } else {
      pass.run(gradients, Rows<C>{grad_below, network.width()});
    }
    if (sums) {
      sums += BackwardLayout<Cell, C>(network, network.weights[layer * network.directions].input_size).sums_size();
    }
  }
}

template <class T>
void run(const RnnNetwork<T>& network, const RnnGradients<T>& gradients, Compute<T>* layer_grads, Compute<T>* sums,
         int64_t first, int64_t last, Member& member, RnnScratch<Compute<T>> scratch) {
  using C = Compute<T>;
  with_cell(network.mode, [&](auto cell) {
    using Cell = decltype(cell);
    const auto sums_of = [&](int64_t layer) -> C* {
      C* at = sums;
      for (int64_t i = 0; at && i < layer; ++i) {
        at += network.directions *
              BackwardLayout<Cell, C>(network, network.weights[i * network.directions].input_size).sums_size();
      }
      return at;
    };
    const auto buffer = [&](int64_t layer) { return layer_grads + layer % 2 * network.rows * network.width(); };
    const int64_t top = network.layers - 1;
    const Rows<T> given{gradients.grad_output, gradients.grad_output_stride, &RnnStep::gradient};
    run_layer<Cell>(network, gradients, top, given, buffer(top), sums_of(top), {first, last}, member, scratch);
    for (int64_t layer = top - 1; layer >= 0; --layer) {
      run_layer<Cell>(network, gradients, layer, Rows<C>{buffer(layer + 1), network.width()}, buffer(layer),
                      sums_of(layer), {first, last}, member, scratch);
    }
  });
}

template <class T>
void finish(const RnnNetwork<T>& network, int64_t input_size, const Compute<T>* sums, int64_t parts, int64_t stride,
            const RnnWeightGradients<T>& gradients) {
  with_cell(network.mode,
            [&](auto cell) { finish_sums<decltype(cell), T>(network, input_size, sums, parts, stride, gradients); });
}

template <class T>
void run_steps(const RnnNetwork<T>& network, const RnnGradients<T>& gradients, int64_t layer, int64_t direction,
               const Compute<T>* grad_output, Compute<T>* gates, int64_t first, int64_t last, Member& member,
               RnnScratch<Compute<T>> scratch) {
  using C = Compute<T>;
  with_cell(network.mode, [&](auto cell) {
    using Cell = decltype(cell);
    const auto run = [&](auto rows_of_gradient) {
      const int64_t rows = most_rows<Cell>(network, last - first);
      BackwardDirection<Cell, T, typename decltype(rows_of_gradient)::Element>(
          network, layer, direction, {first, last}, rows, rows_of_gradient, nullptr, member, scratch)
          .run_steps(gradients, gates);
    };
    if (grad_output) {
      run(Rows<C>{grad_output, network.width()});
    } else {
      run(Rows<T>{gradients.grad_output, gradients.grad_output_stride, &RnnStep::gradient});
    }
  });
}

// body(step, t, sequence): every row of the steps [first, last).
template <class T, class Body>
void for_rows_of_steps(const RnnNetwork<T>& network, int64_t first, int64_t last, const Body& body) {
  for (int64_t t = first; t < last; ++t) {
    const RnnStep& step = network.step[t];
    for (int64_t sequence = 0; sequence < step.rows; ++sequence) body(step, t, sequence);
  }
}

template <class T>
void gather(const RnnNetwork<T>& network, int64_t layer, int64_t direction, int64_t first, int64_t last,
            Compute<T>* inputs, Compute<T>* previous) {
  using C = Compute<T>;
  const Direction<T> here(network, layer, direction);
  const int64_t input_size = here.weights.input_size, outputs = network.outputs();
  const Rows<T> rows = layer_input(network, layer);
  const T* mask = layer_mask(network, layer);
  for_rows_of_steps(network, first, last, [&](const RnnStep& step, int64_t t, int64_t sequence) {
    const int64_t row = step.row + sequence;
    copy_masked(rows.at(step, sequence), mask ? mask + row * input_size : nullptr, input_size,
                inputs + row * input_size);
    const T* before = previous_output(here, t, sequence, sequence < here.running(t, {0, network.batch}));
    C* const to = previous + row * outputs;
    if (before) {
      copy_masked<T, C>(before, nullptr, outputs, to);
    } else {
      for (int64_t i = 0; i < outputs; i += kLanes<C>) store_up_to<C>(to + i, Vec<C>{}, outputs - i);
    }
  });
}

template <class T>
void pass_down(const RnnNetwork<T>& network, const RnnGradients<T>& gradients, int64_t layer, int64_t direction,
               int64_t first, int64_t last, const Compute<T>* product, Compute<T>* grad_below) {
  const int64_t input_size = network.weights[layer * network.directions].input_size;
  const T* mask = layer_mask(network, layer);
  const Rows<T> given{gradients.grad_input, network.input_stride, &RnnStep::input};
  for_rows_of_steps(network, first, last, [&](const RnnStep& step, int64_t, int64_t sequence) {
    const int64_t row = step.row + sequence;
    const auto pass = [&](auto* to) {
      add_masked(product + row * input_size, mask ? mask + row * input_size : nullptr, input_size, direction > 0, to);
    };
    if (layer == 0) {
      pass(const_cast<T*>(given.at(step, sequence)));
    } else {
      pass(grad_below + row * network.width());
    }
  });
}

template <class T>
constexpr RnnBackwardKernels<T> kernels() {
  return {packed_size<T>, pack_weights<T>, pack_hidden_weights<T>, scratch_size<T>, sums_size<T>,
          run<T>,         finish<T>,       run_steps<T>,           gather<T>,       pass_down<T>};
}

}  // namespace

extern const RnnBackwardTable rnn_backward_kernels = {kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
