#include "rnn_blocks.h"
#include "rnn_step_rows.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

template <class Cell, class T>
class ForwardDirection {
  using C = Compute<T>;
  static constexpr bool kCopiesHidden = StepRows<Cell, T>::kCopiesHidden;
  static constexpr int kVectors = ForwardLayout<Cell, C>::kVectors;

 public:
  ForwardDirection(const RnnNetwork<T>& network, int64_t layer, int64_t direction, Part part, int64_t most_rows,
                   C* scratch)
      : direction_(network, layer, direction),
        network_(network),
        layout_(network, direction_.weights.input_size),
        packed_(direction_.weights.packed),
        part_(part),
        most_rows_(most_rows) {
    const int64_t sequences = part.last - part.first;
    slots_ = scratch;
    cells_ = slots_ + layout_.slots_size(most_rows);
    copies_ = cells_ + (Cell::kHasCellState ? sequences * layout_.padded() : 0);
    unprojected_ = copies_ + (kCopiesHidden ? 2 * sequences * layout_.padded() : 0);
    gathered_ = unprojected_ + (layout_.projected ? sequences * (layout_.padded() + layout_.padded_projected()) : 0);
  }

  void run(T* h_n, T* c_n) {
    const bool backwards = direction_.reverse();
    int64_t edge = backwards ? network_.steps : 0;
    while (backwards ? edge > 0 : edge < network_.steps) {
      const Block block = next_block(network_, part_, edge, backwards, most_rows_);
      edge = backwards ? block.first : block.last;
      project(block);
      int64_t local = backwards ? block.rows : 0;
      for (int64_t i = 0; i < block.last - block.first; ++i) {
        const int64_t t = backwards ? block.last - 1 - i : block.first + i;
        const int64_t rows = part_.rows(network_.step[t]);
        if (backwards) local -= rows;
        run_step(t, slots_ + local * layout_.kTileSlots);
        if (!backwards) local += rows;
        end_sequences(t, h_n, c_n);
      }
    }
  }

 private:
  // Slots of the block's rows <- x W_ih^T + biases.
  void project(Block block) {
    int64_t stride;
    const C* x = input_rows(block, &stride);
    if (!packed_) return project_unpacked(block.rows, x, stride);
    for (int64_t tile = 0; tile < layout_.tiles; ++tile) {
      multiply_panel<kVectors>(network_.rows, block.rows, layout_.input_size, x, stride,
                               packed_ + tile * layout_.kPanelWidth * layout_.input_size,
                               packed_ + layout_.bias() + tile * layout_.kPanelWidth, 0, tile_slots(tile),
                               layout_.kTileSlots);
    }
    if constexpr (Cell::kSlots > Cell::kGates) {
      for (int64_t tile = 0; tile < layout_.tiles; ++tile) {
        const Vec<C> bias = load(packed_ + layout_.hidden_bias() + tile * kLanes<C>);
        for (int64_t row = 1; row <= block.rows; ++row) {
          store(tile_slots(tile) + row * layout_.kTileSlots - kLanes<C>, bias);
        }
      }
    }
  }

  C* tile_slots(int64_t tile) const { return slots_ + tile * layout_.tile_stride(most_rows_); }

  // The same for few rows, by dot products with the weights as they are: W is (gates * hidden, depth).
  void project_unpacked(int64_t rows, const C* x, int64_t stride) {
    const RnnWeights<T>& weights = direction_.weights;
    for_slots([&](int slot, int64_t unit, int64_t count, C* slots) {
      const int64_t row = Cell::input_gate(slot) * layout_.hidden + unit;
      const bool apart = Cell::kSlots > Cell::kGates && slot == 0;
      const Vec<C> hidden_bias = load_bias(weights.bias_hh, row, count);
      Vec<C> bias = load_bias(weights.bias_ih, row, count);
      if (!apart) bias += hidden_bias;
      for (int64_t r = 0; r < rows; ++r) {
        C* to = slots + r * layout_.kTileSlots;
        store(to,
              bias + dot_rows(weights.weight_ih + row * layout_.input_size, layout_.input_size, count, x + r * stride));
        if (apart) store(to + (Cell::kSlots - 1) * kLanes<C>, hidden_bias);
      }
    });
  }

  // body(slot, unit, count, where): each vector of gates, its first hidden unit, and how many there are.
  template <class Body>
  FASTNN_INLINE void for_slots(const Body& body) {
    for (int64_t unit = 0; unit < layout_.hidden; unit += kLanes<C>) {
      const int64_t vector = unit / kLanes<C>, tile = vector / Cell::kUnits, within = vector % Cell::kUnits;
      for (int slot = 0; slot < Cell::kGates; ++slot) {
        body(slot, unit, smaller(kLanes<C>, layout_.hidden - unit),
             tile_slots(tile) + (slot * Cell::kUnits + within) * kLanes<C>);
      }
    }
  }

  // x times each of `count` rows of a weight.
  static FASTNN_INLINE Vec<C> dot_rows(const T* weight, int64_t depth, int64_t count, const C* x) {
    return dot_tile<1>(depth, x, depth, weight, depth, count);
  }

  // The block's rows of x, in place if they are one matrix there, else gathered.
  const C* input_rows(Block block, int64_t* stride) {
    const Rows<T> rows = layer_input(network_, direction_.layer);
    const T* mask = layer_mask(network_, direction_.layer);
    if constexpr (!kCopiesHidden) {
      bool in_place = !mask;
      const T* expected = nullptr;
      for (int64_t t = block.first; in_place && t < block.last; ++t) {
        const RnnStep& step = network_.step[t];
        const T* here = rows.at(step, part_.first);
        in_place = !expected || here == expected;
        expected = here + part_.rows(step) * rows.stride;
      }
      if (in_place) {
        *stride = rows.stride;
        return rows.at(network_.step[block.first], part_.first);
      }
    }
    const int64_t count = layout_.input_size;
    for_rows(network_, part_, block, [&](const RnnStep& step, int64_t sequence, int64_t local) {
      copy_masked(rows.at(step, sequence), mask ? mask + (step.row + sequence) * count : nullptr, count,
                  gathered_ + local * count);
    });
    *stride = count;
    return gathered_;
  }

  void run_step(int64_t t, C* slots) {
    const RnnStep& step = network_.step[t];
    const int64_t running = direction_.running(t, part_), last = part_.first + part_.rows(step);
    const bool backwards = t % 2;
    if (running > part_.first) {
      const RnnStep& before = network_.step[direction_.reverse() ? t + 1 : t - 1];
      StepRows<Cell, T> rows = rows_of(step, part_.first, running, slots, backwards);
      if constexpr (kCopiesHidden) {
        rows.previous = copies_of(parity_, part_.first);
        rows.previous_stride = layout_.padded();
      } else {
        rows.previous = direction_.output(before, part_.first);
        rows.previous_stride = network_.width();
      }
      run_rows(rows);
    }
    if (last > running) {
      start_cells(running, last);
      const T* h0 = network_.h0 ? network_.h0 + direction_.h_offset(running) : nullptr;
      StepRows<Cell, T> rows = rows_of(step, running, last, slots, backwards);
      rows.previous_stride = layout_.outputs();
      if constexpr (kCopiesHidden) {
        C* copies = copies_of(parity_, running);
        copy_rows(h0, layout_.outputs(), h0 ? rows.count : 0, copies, layout_.padded());
        rows.previous = h0 ? copies : nullptr;
        rows.previous_stride = layout_.padded();
      } else {
        rows.previous = h0;
      }
      run_rows(rows);
    }
    parity_ = !parity_;
  }

  StepRows<Cell, T> rows_of(const RnnStep& step, int64_t first, int64_t last, C* slots, bool backwards) {
    const int64_t before = first - part_.first;
    return {layout_,
            step.rows,
            last - first,
            backwards,
            slots + before * layout_.kTileSlots,
            cells_ + before * layout_.padded(),
            copies_of(!parity_, first),
            layout_.projected ? unprojected_ : nullptr,
            direction_.output(step, first),
            network_.width(),
            Cell::kSaved > 0 && network_.saved ? direction_.template saved<Cell>(step, first) : nullptr,
            nullptr,
            0};
  }
  C* copies_of(bool parity, int64_t sequence) {
    const int64_t sequences = part_.last - part_.first;
    return copies_ + ((parity ? sequences : 0) + sequence - part_.first) * layout_.padded();
  }
  // Rows of h.
  template <class From, class To>
  void copy_rows(const From* from, int64_t from_stride, int64_t rows, To* to, int64_t to_stride) {
    for (int64_t row = 0; row < rows; ++row) {
      copy_masked<From, To>(from + row * from_stride, nullptr, layout_.outputs(), to + row * to_stride);
    }
  }

  void start_cells(int64_t first, int64_t last) {
    if constexpr (Cell::kHasCellState) {
      for (int64_t sequence = first; sequence < last; ++sequence) {
        C* cell = cells_ + (sequence - part_.first) * layout_.padded();
        for (int64_t i = 0; i < layout_.padded(); i += kLanes<C>) store(cell + i, Vec<C>{});
        if (network_.c0) {
          copy_masked<T, C>(network_.c0 + direction_.c_offset(sequence), nullptr, layout_.hidden, cell);
        }
      }
    }
  }

  void run_rows(const StepRows<Cell, T>& rows) {
    const C* panels = packed_ ? packed_ + layout_.hidden_panels() : nullptr;
    const int64_t panel_size = layout_.kPanelWidth * layout_.outputs();
    if (!packed_ && rows.previous) multiply_unpacked(rows);
    for (int64_t i = 0; i < layout_.tiles; ++i) {
      const int64_t tile = rows.backwards && !panels_stay() ? layout_.tiles - 1 - i : i;
      C* slots = rows.slots + tile * layout_.tile_stride(most_rows_);
      if (rows.previous && packed_) {
        C* sums = slots + Cell::kHiddenSlot * kLanes<C>;
        multiply_panel<kVectors>(rows.all, rows.count, layout_.outputs(), rows.previous, rows.previous_stride,
                                 panels + tile * panel_size, sums, layout_.kTileSlots, sums, layout_.kTileSlots);
      }
      rows.finish_tile(tile * layout_.kTileUnits, slots);
    }
    if (layout_.projected) project_outputs(rows);
  }

  // Whether the recurrent weights stay in the nearest cache from step to step. Those that don't are walked backwards at
  // every other step, so that the ones used last are still there; those that do always forwards, so that a step begins
  // with the units that the step before finished first.
  bool panels_stay() const {
    constexpr int64_t kNearestCache = 32 * 1024;
    return layout_.tiles * layout_.kPanelWidth * layout_.outputs() * static_cast<int64_t>(sizeof(C)) <= kNearestCache;
  }

  void multiply_unpacked(const StepRows<Cell, T>& rows) {
    const int64_t depth = layout_.outputs();
    for_slots([&](int slot, int64_t unit, int64_t count, C* base) {
      const T* weight = direction_.weights.weight_hh + (slot * layout_.hidden + unit) * depth;
      for (int64_t r = 0; r < rows.count; ++r) {
        C* sums = rows.slots + (base - slots_) + r * layout_.kTileSlots + Cell::kHiddenSlot * kLanes<C>;
        store(sums, load(sums) + dot_rows(weight, depth, count, rows.previous + r * rows.previous_stride));
      }
    });
  }

  // h <- h W_hr^T
  void project_outputs(const StepRows<Cell, T>& rows) {
    C* projected = unprojected_ + (part_.last - part_.first) * layout_.padded();
    const int64_t stride = layout_.padded_projected(), hidden = layout_.hidden;
    if (packed_) {
      multiply_panels<false>(rows.all, rows.count, hidden, unprojected_, layout_.padded(),
                             packed_ + layout_.projection(), layout_.projected, false, projected, stride);
    } else {
      for (int64_t i = 0; i < layout_.projected; i += kLanes<C>) {
        const int64_t count = smaller(kLanes<C>, layout_.projected - i);
        for (int64_t row = 0; row < rows.count; ++row) {
          store(projected + row * stride + i, dot_rows(direction_.weights.weight_hr + i * hidden, hidden, count,
                                                       unprojected_ + row * layout_.padded()));
        }
      }
    }
    copy_rows(projected, stride, rows.count, rows.output, network_.width());
    if constexpr (kCopiesHidden) {
      copy_rows(rows.output, network_.width(), rows.count, rows.copies, layout_.padded());
    }
  }

  void end_sequences(int64_t t, T* h_n, T* c_n) {
    const RnnStep& step = network_.step[t];
    const int64_t last = part_.first + part_.rows(step);
    for (int64_t sequence = direction_.continuing(t, part_); sequence < last; ++sequence) {
      copy_masked<T, T>(direction_.output(step, sequence), nullptr, layout_.outputs(),
                        h_n + direction_.h_offset(sequence));
      if (Cell::kHasCellState) {
        copy_masked<C, T>(cells_ + (sequence - part_.first) * layout_.padded(), nullptr, layout_.hidden,
                          c_n + direction_.c_offset(sequence));
      }
    }
  }

  const Direction<T> direction_;
  const RnnNetwork<T>& network_;
  const ForwardLayout<Cell, C> layout_;
  const C* packed_;
  const Part part_;
  const int64_t most_rows_;
  C* slots_;        // (tiles, block rows, a tile's slots): tile_slots
  C* cells_;        // (sequences, padded): c
  C* copies_;       // (2, sequences, padded): h of the step before and of this one, for bfloat16
  C* unprojected_;  // (sequences, padded): h of this step before its projection; (sequences, padded_projected): after
  C* gathered_;     // (block rows, input_size)
  bool parity_ = false;
};

template <class T>
int64_t widest_input(const RnnNetwork<T>& network) {
  return network.layers > 1 ? larger(network.weights[0].input_size, network.width()) : network.weights[0].input_size;
}

template <class Cell, class T>
int64_t most_rows(const RnnNetwork<T>& network, int64_t sequences) {
  const ForwardLayout<Cell, Compute<T>> layout(network, 0);
  return block_rows(sequences, network.rows, layout.slots() + widest_input(network));
}

bool worth_packing(int64_t rows) {
  return rows >= 8;
}

template <class T>
int64_t packed_size(const RnnNetwork<T>& network, int64_t input_size) {
  return with_cell(network.mode,
                   [&](auto cell) { return ForwardLayout<decltype(cell), Compute<T>>(network, input_size).size(); });
}

template <class T>
void pack_weights(const RnnNetwork<T>& network, const RnnWeights<T>& weights, Compute<T>* packed) {
  with_cell(network.mode, [&](auto cell) { pack_forward<decltype(cell), T>(network, weights, packed); });
}

template <class T>
int64_t scratch_size(const RnnNetwork<T>& network, int64_t sequences) {
  return with_cell(network.mode, [&](auto cell) {
    const ForwardLayout<decltype(cell), Compute<T>> layout(network, 0);
    const int64_t rows = most_rows<decltype(cell)>(network, sequences);
    return layout.slots_size(rows) + rows * widest_input(network) +
           sequences * (4 * layout.padded() + layout.padded_projected());
  });
}

template <class T>
void run(const RnnNetwork<T>& network, int64_t layer, int64_t direction, T* h_n, T* c_n, int64_t first, int64_t last,
         Compute<T>* scratch) {
  with_cell(network.mode, [&](auto cell) {
    const int64_t rows = most_rows<decltype(cell)>(network, last - first);
    ForwardDirection<decltype(cell), T>(network, layer, direction, {first, last}, rows, scratch).run(h_n, c_n);
  });
}

template <class T>
constexpr RnnForwardKernels<T> kernels() {
  return {worth_packing, packed_size<T>, pack_weights<T>, scratch_size<T>, run<T>};
}

}  // namespace

extern const RnnForwardTable rnn_forward_kernels = {kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
