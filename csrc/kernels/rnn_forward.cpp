#include "rnn_blocks.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// Where things lie in a direction's packed weights, and in a row of slots. A tile has kUnits vectors of hidden units.
template <class Cell, class C>
struct Layout {
  static constexpr int64_t kVectors = Cell::kGates * Cell::kUnits;
  static constexpr int64_t kTileUnits = Cell::kUnits * kLanes<C>;
  static constexpr int64_t kPanelWidth = Cell::kGates * kTileUnits;
  static constexpr int64_t kTileSlots = Cell::kSlots * kTileUnits;
  int64_t hidden, input_size, tiles;

  Layout(int64_t hidden, int64_t input_size)
      : hidden(hidden), input_size(input_size), tiles(divide_up(hidden, kTileUnits)) {}

  int64_t slots() const { return tiles * kTileSlots; }
  int64_t padded() const { return tiles * kTileUnits; }
  // (tiles, input_size or hidden, gates, units) and the biases (tiles, gates, units), (tiles, units).
  int64_t hidden_panels() const { return tiles * kPanelWidth * input_size; }
  int64_t bias() const { return hidden_panels() + tiles * kPanelWidth * hidden; }
  int64_t hidden_bias() const { return bias() + tiles * kPanelWidth; }
  int64_t size() const { return hidden_bias() + padded(); }
};

template <class T>
FASTNN_INLINE Vec<Compute<T>> load_bias(const T* bias, int64_t unit, int64_t left_over) {
  return bias && left_over > 0 ? load_up_to<T>(bias + unit, left_over) : Vec<Compute<T>>{};
}

template <class Cell, class T>
void pack(int64_t hidden, const RnnWeights<T>& weights, Compute<T>* packed) {
  using C = Compute<T>;
  constexpr int lanes = kLanes<C>;
  const int64_t input_size = weights.input_size;
  const Layout<Cell, C> layout(hidden, input_size);
  for (int64_t vector = 0; vector < layout.tiles * layout.kVectors; ++vector) {
    const int64_t tile = vector / layout.kVectors, slot = vector % layout.kVectors / Cell::kUnits;
    const int64_t unit = tile * layout.kTileUnits + vector % Cell::kUnits * lanes;
    const int64_t left_over = hidden - unit, count = larger(0, smaller(left_over, lanes));
    const int64_t within = vector % layout.kVectors * lanes;
    const int64_t input_row = Cell::input_gate(static_cast<int>(slot)) * hidden + unit,
                  hidden_row = slot * hidden + unit;
    pack_rows(weights.weight_ih + input_row * input_size, input_size, count, input_size,
              packed + tile * layout.kPanelWidth * input_size + within, layout.kPanelWidth);
    pack_rows(weights.weight_hh + hidden_row * hidden, hidden, count, hidden,
              packed + layout.hidden_panels() + tile * layout.kPanelWidth * hidden + within, layout.kPanelWidth);
    Vec<C> bias = load_bias(weights.bias_ih, input_row, left_over);
    const Vec<C> hidden_bias = load_bias(weights.bias_hh, input_row, left_over);
    if (Cell::kSlots > Cell::kGates && slot == 0) {  // GRU's candidate
      store(packed + layout.hidden_bias() + unit, hidden_bias);
    } else {
      bias += hidden_bias;
    }
    store(packed + layout.bias() + vector * lanes, bias);
  }
}

template <class Cell, class T>
class ForwardDirection {
  using C = Compute<T>;
  static constexpr bool kCopiesHidden = sizeof(T) != sizeof(C);
  static constexpr int kVectors = Layout<Cell, C>::kVectors;

 public:
  ForwardDirection(const RnnNetwork<T>& network, int64_t layer, int64_t direction, Part part, int64_t most_rows,
                   C* scratch)
      : direction_(network, layer, direction),
        network_(network),
        layout_(network.hidden, direction_.weights.input_size),
        packed_(direction_.weights.packed),
        part_(part),
        most_rows_(most_rows) {
    const int64_t sequences = part.last - part.first;
    slots_ = scratch;
    cells_ = slots_ + most_rows * layout_.slots();
    copies_ = cells_ + (Cell::kHasCellState ? sequences * layout_.padded() : 0);
    gathered_ = copies_ + (kCopiesHidden ? 2 * sequences * layout_.padded() : 0);
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
        run_step(t, slots_ + local * layout_.slots());
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
      multiply_panel<kVectors>(block.rows, layout_.input_size, x, stride,
                               packed_ + tile * layout_.kPanelWidth * layout_.input_size,
                               packed_ + layout_.bias() + tile * layout_.kPanelWidth, 0,
                               slots_ + tile * layout_.kTileSlots, layout_.slots());
    }
    if constexpr (Cell::kSlots > Cell::kGates) {
      for (int64_t row = 0; row < block.rows; ++row) {
        for (int64_t tile = 0; tile < layout_.tiles; ++tile) {
          store(slots_ + row * layout_.slots() + (tile + 1) * layout_.kTileSlots - kLanes<C>,
                load(packed_ + layout_.hidden_bias() + tile * kLanes<C>));
        }
      }
    }
  }

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
        C* to = slots + r * layout_.slots();
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
             slots_ + tile * layout_.kTileSlots + (slot * Cell::kUnits + within) * kLanes<C>);
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
    const int64_t running = direction_.running(t, part_), last = part_.first + part_.rows(network_.step[t]);
    if (running > part_.first) {
      const RnnStep& before = network_.step[direction_.reverse() ? t + 1 : t - 1];
      const T* h = direction_.output(before, part_.first);
      run_rows(t, part_.first, running, slots, previous_rows(h, network_.width(), part_.first), previous_stride());
    }
    if (last > running) {
      start_cells(running, last);
      const T* h0 = network_.h0 ? network_.h0 + direction_.state_offset(running) : nullptr;
      C* own_slots = slots + (running - part_.first) * layout_.slots();
      if constexpr (kCopiesHidden) {
        C* copies = copies_of(parity_, running);
        for (int64_t i = 0; h0 && i < last - running; ++i) {
          copy_masked<T, C>(h0 + i * layout_.hidden, nullptr, layout_.hidden, copies + i * layout_.padded());
        }
        run_rows(t, running, last, own_slots, h0 ? copies : nullptr, layout_.padded());
      } else {
        run_rows(t, running, last, own_slots, h0, layout_.hidden);
      }
    }
    parity_ = !parity_;
  }

  // In the compute type: the output itself, or the copies that bfloat16 keeps.
  const C* previous_rows(const T* output, int64_t, int64_t sequence) {
    if constexpr (kCopiesHidden) {
      return copies_of(parity_, sequence);
    } else {
      return output;
    }
  }
  int64_t previous_stride() const { return kCopiesHidden ? layout_.padded() : network_.width(); }
  C* copies_of(bool parity, int64_t sequence) {
    const int64_t sequences = part_.last - part_.first;
    return copies_ + ((parity ? sequences : 0) + sequence - part_.first) * layout_.padded();
  }

  void start_cells(int64_t first, int64_t last) {
    if constexpr (Cell::kHasCellState) {
      for (int64_t sequence = first; sequence < last; ++sequence) {
        C* cell = cells_ + (sequence - part_.first) * layout_.padded();
        for (int64_t i = 0; i < layout_.padded(); i += kLanes<C>) store(cell + i, Vec<C>{});
        if (network_.c0) {
          copy_masked<T, C>(network_.c0 + direction_.state_offset(sequence), nullptr, layout_.hidden, cell);
        }
      }
    }
  }

  // Sequences [first, last) of step t, whose h of the step before is `previous`, or null for zeros.
  void run_rows(int64_t t, int64_t first, int64_t last, C* slots, const C* previous, int64_t stride) {
    const int64_t rows = last - first;
    if (!packed_ && previous) {
      for_slots([&](int slot, int64_t unit, int64_t count, C* base) {
        const T* weight = direction_.weights.weight_hh + (slot * layout_.hidden + unit) * layout_.hidden;
        for (int64_t r = 0; r < rows; ++r) {
          C* sums = slots + (base - slots_) + r * layout_.slots() + Cell::kHiddenSlot * kLanes<C>;
          store(sums, load(sums) + dot_rows(weight, layout_.hidden, count, previous + r * stride));
        }
      });
    }
    for (int64_t i = 0; i < layout_.tiles; ++i) {
      // Backwards at every other step, so that the panels used last are still in the nearest cache.
      const int64_t tile = t % 2 ? layout_.tiles - 1 - i : i;
      C* tile_slots = slots + tile * layout_.kTileSlots;
      if (previous && packed_) {
        C* sums = tile_slots + Cell::kHiddenSlot * kLanes<C>;
        multiply_panel<kVectors>(rows, layout_.hidden, previous, stride,
                                 packed_ + layout_.hidden_panels() + tile * layout_.kPanelWidth * layout_.hidden, sums,
                                 layout_.slots(), sums, layout_.slots());
      }
      for (int64_t row = 0; row < rows; ++row) {
        finish_units(t, first + row, tile * layout_.kTileUnits, tile_slots + row * layout_.slots(),
                     previous ? previous + row * stride : nullptr);
      }
    }
  }

  // The cell itself, for the units of a tile.
  FASTNN_INLINE void finish_units(int64_t t, int64_t sequence, int64_t first_unit, const C* slots, const C* previous) {
    const RnnStep& step = network_.step[t];
    T* output = direction_.output(step, sequence);
#pragma GCC unroll 2
    for (int v = 0; v < Cell::kUnits; ++v) {
      const int64_t unit = first_unit + v * kLanes<C>, left_over = layout_.hidden - unit;
      if (left_over <= 0) return;
      Vec<C> sums[Cell::kSlots], saved[Cell::kSaved + 1], c = {}, before = {};
      for (int s = 0; s < Cell::kSlots; ++s) sums[s] = load(slots + (s * Cell::kUnits + v) * kLanes<C>);
      if (Cell::kNeedsPrevious && previous) before = load_up_to<C>(previous + unit, left_over);
      C* cell = cells_ + (sequence - part_.first) * layout_.padded() + unit;
      if (Cell::kHasCellState) c = load(cell);
      const Vec<C> h = Cell::template forward<C>(sums, before, c, saved);
      if (Cell::kHasCellState) store(cell, c);
      store_up_to<T>(output + unit, h, left_over);
      if constexpr (kCopiesHidden) {
        // As it was stored: the next step sees what the caller sees.
        store(copies_of(!parity_, sequence) + unit, load_up_to<T>(output + unit, left_over));
      }
      if (Cell::kSaved > 0 && network_.saved) {
        T* kept = direction_.template saved<Cell>(step, sequence) + unit;
        for (int s = 0; s < Cell::kSaved; ++s) store_up_to<T>(kept + s * layout_.hidden, saved[s], left_over);
      }
    }
  }

  void end_sequences(int64_t t, T* h_n, T* c_n) {
    const RnnStep& step = network_.step[t];
    const int64_t last = part_.first + part_.rows(step);
    for (int64_t sequence = direction_.continuing(t, part_); sequence < last; ++sequence) {
      const int64_t to = direction_.state_offset(sequence);
      copy_masked<T, T>(direction_.output(step, sequence), nullptr, layout_.hidden, h_n + to);
      if (Cell::kHasCellState) {
        copy_masked<C, T>(cells_ + (sequence - part_.first) * layout_.padded(), nullptr, layout_.hidden, c_n + to);
      }
    }
  }

  const Direction<T> direction_;
  const RnnNetwork<T>& network_;
  const Layout<Cell, C> layout_;
  const C* packed_;
  const Part part_;
  const int64_t most_rows_;
  C* slots_;     // (block rows, slots)
  C* cells_;     // (sequences, padded): c
  C* copies_;    // (2, sequences, padded): h of the step before and of this one, for bfloat16
  C* gathered_;  // (block rows, input_size)
  bool parity_ = false;
};

template <class T>
int64_t widest_input(const RnnNetwork<T>& network) {
  return network.layers > 1 ? larger(network.weights[0].input_size, network.width()) : network.weights[0].input_size;
}

template <class Cell, class T>
int64_t most_rows(const RnnNetwork<T>& network, int64_t sequences) {
  const Layout<Cell, Compute<T>> layout(network.hidden, 0);
  return block_rows(sequences, network.rows, layout.slots() + widest_input(network));
}

bool worth_packing(int64_t rows) {
  return rows >= 8;
}

template <class T>
int64_t packed_size(RnnMode mode, int64_t hidden, int64_t input_size) {
  return with_cell(mode, [&](auto cell) { return Layout<decltype(cell), Compute<T>>(hidden, input_size).size(); });
}

template <class T>
void pack_weights(RnnMode mode, int64_t hidden, const RnnWeights<T>& weights, Compute<T>* packed) {
  with_cell(mode, [&](auto cell) { pack<decltype(cell), T>(hidden, weights, packed); });
}

template <class T>
int64_t scratch_size(const RnnNetwork<T>& network, int64_t sequences) {
  return with_cell(network.mode, [&](auto cell) {
    const Layout<decltype(cell), Compute<T>> layout(network.hidden, 0);
    const int64_t rows = most_rows<decltype(cell)>(network, sequences);
    return rows * (layout.slots() + widest_input(network)) + 3 * sequences * layout.padded();
  });
}

template <class T>
void run(const RnnNetwork<T>& network, T* h_n, T* c_n, int64_t first, int64_t last, Compute<T>* scratch) {
  with_cell(network.mode, [&](auto cell) {
    const int64_t rows = most_rows<decltype(cell)>(network, last - first);
    for (int64_t layer = 0; layer < network.layers; ++layer) {
      for (int64_t direction = 0; direction < network.directions; ++direction) {
        ForwardDirection<decltype(cell), T>(network, layer, direction, {first, last}, rows, scratch).run(h_n, c_n);
      }
    }
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
