#include "rnn_blocks.h"
#include "rnn_step_rows.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// Forward of one direction of one layer. Each member of a team computes the tiles of its share, into shared memory.
template <class Cell, class T>
class ForwardDirection {
  using C = Compute<T>;
  static constexpr bool kWidens = sizeof(T) != sizeof(C);
  static constexpr int kVectors = ForwardLayout<Cell, C>::kVectors;

 public:
  ForwardDirection(const RnnNetwork<T>& network, int64_t layer, int64_t direction, Part part, int64_t most_rows,
                   Member& member, RnnScratch<C> scratch)
      : direction_(network, layer, direction),
        network_(network),
        layout_(network, direction_.weights.input_size),
        packed_(direction_.weights.packed),
        part_(part),
        most_rows_(most_rows),
        single_near_rows_(network.batch == 1 && packed_ &&
                          stay_near(layout_.tiles * layout_.kPanelWidth * layout_.outputs())),
        member_(member) {
    const int64_t sequences = part.last - part.first;
    slots_ = scratch.shared;
    cells_ = slots_ + layout_.slots_size(most_rows);
    unprojected_ = cells_ + sequences * layout_.padded();
    projected_ = unprojected_ + sequences * layout_.padded();
    widened_ = scratch.own;
    gathered_ = widened_ + sequences * layout_.padded();
  }
  static RnnScratchSize scratch_size(const RnnNetwork<T>& network, int64_t sequences, int64_t most_rows,
                                     int64_t widest_input) {
    const ForwardLayout<Cell, C> layout(network, 0);
    return {layout.slots_size(most_rows) + sequences * (2 * layout.padded() + layout.padded_projected()),
            sequences * layout.padded() + most_rows * widest_input};
  }

  void run(T* h_n, T* c_n) {
    const bool backwards = direction_.reverse();
    int64_t edge = backwards ? network_.steps : 0;
    while (backwards ? edge > 0 : edge < network_.steps) {
      const StepBlock block = next_block(network_, part_, edge, backwards, most_rows_);
      edge = backwards ? block.first : block.last;
      // This is a separate round, since the steps write over the input that they have used: see layer_output.
      project(block, member_.share(layout_.tiles));
      member_.end_round();
      int64_t local = backwards ? block.rows : 0;
      for (int64_t i = 0; i < block.last - block.first; ++i) {
        const int64_t t = backwards ? block.last - 1 - i : block.first + i;
        const int64_t rows = part_.rows(network_.step[t]);
        if (backwards) local -= rows;
        C* slots = slots_ + local * layout_.kTileSlots;
        if (!run_row(t, slots)) run_step(t, slots);
        member_.end_round();
        if (!backwards) local += rows;
        end_sequences(t, h_n, c_n);
      }
    }
  }

 private:
  // Slots of the block's rows <- x W_ih^T + biases.
  void project(StepBlock block, Share tiles) {
    if (tiles.empty()) return;
    int64_t stride;
    const C* x = input_rows(block, &stride);
    if (!packed_) return project_unpacked(block.rows, x, stride, tiles);
    const int64_t panel_size = layout_.kPanelWidth * layout_.input_size;
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      const C* panel = packed_ + tile * panel_size;
      multiply_panel<kVectors>(network_.rows, block.rows, layout_.input_size, x, stride, panel, panel + panel_size,
                               packed_ + layout_.bias() + tile * layout_.kPanelWidth, 0, tile_slots(tile),
                               layout_.kTileSlots);
    }
    if constexpr (Cell::kSlots > Cell::kGates) {
      for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
        const Vec<C> bias = load(packed_ + layout_.hidden_bias() + tile * kLanes<C>);
        for (int64_t row = 1; row <= block.rows; ++row) {
          store(tile_slots(tile) + row * layout_.kTileSlots - kLanes<C>, bias);
        }
      }
    }
  }

  C* tile_slots(int64_t tile) const { return slots_ + tile * layout_.tile_stride(most_rows_); }

  // The same for few rows, by dot products with the weights as they are: W is (gates * hidden, depth).
  void project_unpacked(int64_t rows, const C* x, int64_t stride, Share tiles) {
    const RnnWeights<T>& weights = direction_.weights;
    for_slots(tiles, [&](int slot, int64_t unit, int64_t count, C* slots) {
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
  FASTNN_INLINE void for_slots(Share tiles, const Body& body) {
    const int64_t end = smaller(tiles.last * layout_.kTileUnits, layout_.hidden);
    for (int64_t unit = tiles.first * layout_.kTileUnits; unit < end; unit += kLanes<C>) {
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
  const C* input_rows(StepBlock block, int64_t* stride) {
    const Rows<T> rows = layer_input(network_, direction_.layer);
    const T* mask = layer_mask(network_, direction_.layer);
    if constexpr (!kWidens) {
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
    const Share tiles = member_.share(layout_.tiles);
    const bool backwards = t % 2;
    if (running > part_.first) {
      const RnnStep& before = network_.step[direction_.reverse() ? t + 1 : t - 1];
      StepRows<Cell, T> rows = rows_of(step, part_.first, running, slots, backwards);
      set_previous(rows, direction_.output(before, part_.first), network_.width());
      run_rows(rows, tiles);
    }
    if (last > running) {
      start_cells(running, last, tiles);
      StepRows<Cell, T> rows = rows_of(step, running, last, slots, backwards);
      if (network_.h0) set_previous(rows, network_.h0 + direction_.h_offset(running), layout_.outputs());
      run_rows(rows, tiles);
    }
  }

  // Runs a step of a single row after the first step, if its weights stay in the nearest cache and its cell needs
  // nothing but the sums. The sums then go from the product to the cell in registers. Returns false, having done
  // nothing, for any other step. It is not inlined: inside the loop over steps the sums would not stay in registers.
  __attribute__((noinline)) bool run_row(int64_t t, const C* slots) {
    if constexpr (Cell::kSlots == 1 && !kWidens) {
      const int64_t before = direction_.reverse() ? t + 1 : t - 1;
      if (!single_near_rows_ || before < 0 || before >= network_.steps) return false;
      const T* previous = direction_.output(network_.step[before], 0);
      T* output = direction_.output(network_.step[t], 0);
      const Share tiles = member_.share(layout_.tiles);
      int64_t tile = tiles.first;
      for (; tile + kPanelsOfRow <= tiles.last; tile += kPanelsOfRow) {
        run_row_tiles<kPanelsOfRow>(tile, previous, slots, output);
      }
      for (; tile < tiles.last; ++tile) run_row_tiles<1>(tile, previous, slots, output);
      return true;
    }
    return false;
  }
  template <int tiles>
  FASTNN_INLINE void run_row_tiles(int64_t tile, const C* previous, const C* slots, C* output) const {
    constexpr int vectors = tiles * kVectors;
    const int64_t panel_size = layout_.kPanelWidth * layout_.outputs(), apart = layout_.tile_stride(most_rows_);
    Lockstep<C, vectors> sums, none = {};
    multiply_row<kVectors, tiles>(layout_.outputs(), previous, packed_ + layout_.hidden_panels() + tile * panel_size,
                                  panel_size, slots + tile * apart, apart, sums.part);
    const Lockstep<C, vectors> h = Cell::forward(&sums, none, none, &none);
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
      const int64_t unit = tile * layout_.kTileUnits + i * kLanes<C>;
      if (unit < layout_.hidden) store_up_to<C>(output + unit, h.part[i], layout_.hidden - unit);
    }
  }

  StepRows<Cell, T> rows_of(const RnnStep& step, int64_t first, int64_t last, C* slots, bool backwards) {
    const int64_t before = first - part_.first;
    return {layout_,
            step.rows,
            last - first,
            backwards,
            slots + before * layout_.kTileSlots,
            cells_ + before * layout_.padded(),
            layout_.projected ? unprojected_ + before * layout_.padded() : nullptr,
            direction_.output(step, first),
            network_.width(),
            Cell::kSaved > 0 && network_.saved ? direction_.template saved<Cell>(step, first) : nullptr,
            nullptr,
            0};
  }

  // h of the step before, in the compute type.
  void set_previous(StepRows<Cell, T>& rows, const T* h, int64_t stride) {
    if constexpr (kWidens) {
      for (int64_t row = 0; row < rows.count; ++row) {
        copy_masked<T, C>(h + row * stride, nullptr, layout_.outputs(), widened_ + row * layout_.padded());
      }
      rows.previous = widened_;
      rows.previous_stride = layout_.padded();
    } else {
      rows.previous = h;
      rows.previous_stride = stride;
    }
  }

  // Sets c for the hidden units of these tiles.
  void start_cells(int64_t first, int64_t last, Share tiles) {
    if constexpr (Cell::kHasCellState) {
      const int64_t unit = tiles.first * layout_.kTileUnits, end = tiles.last * layout_.kTileUnits;
      for (int64_t sequence = first; sequence < last; ++sequence) {
        C* cell = cells_ + (sequence - part_.first) * layout_.padded();
        for (int64_t i = unit; i < end; i += kLanes<C>) store(cell + i, Vec<C>{});
        if (network_.c0) {
          copy_masked<T, C>(network_.c0 + direction_.c_offset(sequence) + unit, nullptr,
                            smaller(end, layout_.hidden) - unit, cell + unit);
        }
      }
    }
  }

  void run_rows(const StepRows<Cell, T>& rows, Share tiles) {
    const C* panels = packed_ ? packed_ + layout_.hidden_panels() : nullptr;
    const int64_t panel_size = layout_.kPanelWidth * layout_.outputs();
    const bool backwards = rows.backwards && !stay_near((tiles.last - tiles.first) * panel_size);
    if (!packed_ && rows.previous) multiply_unpacked(rows, tiles);
    for (int64_t i = 0; i < tiles.last - tiles.first; ++i) {
      const int64_t tile = backwards ? tiles.last - 1 - i : tiles.first + i;
      C* slots = rows.slots + tile * layout_.tile_stride(most_rows_);
      if (rows.previous && packed_) {
        C* sums = slots + Cell::kHiddenSlot * kLanes<C>;
        const C* panel = panels + tile * panel_size;
        multiply_panel<kVectors>(rows.all, rows.count, layout_.outputs(), rows.previous, rows.previous_stride, panel,
                                 backwards ? panel - panel_size : panel + panel_size, sums, layout_.kTileSlots, sums,
                                 layout_.kTileSlots);
      }
      rows.finish_tile(tile * layout_.kTileUnits, slots);
    }
    if (layout_.projected) {
      member_.end_round();
      project_outputs(rows, member_.share(layout_.padded_projected() / (2 * kLanes<C>)));
    }
  }

  // Whether so many elements stay in the nearest cache from step to step. Weights that do not are read backwards at
  // every other step, so that those which were used last are still in the cache. Weights that do are always read
  // forwards, so that a step begins with the units that the step before finished first.
  static bool stay_near(int64_t elements) {
    constexpr int64_t kNearestCache = 32 * 1024;
    return elements * static_cast<int64_t>(sizeof(C)) <= kNearestCache;
  }

  void multiply_unpacked(const StepRows<Cell, T>& rows, Share tiles) {
    const int64_t depth = layout_.outputs();
    for_slots(tiles, [&](int slot, int64_t unit, int64_t count, C* base) {
      const T* weight = direction_.weights.weight_hh + (slot * layout_.hidden + unit) * depth;
      for (int64_t r = 0; r < rows.count; ++r) {
        C* sums = rows.slots + (base - slots_) + r * layout_.kTileSlots + Cell::kHiddenSlot * kLanes<C>;
        store(sums, load(sums) + dot_rows(weight, depth, count, rows.previous + r * rows.previous_stride));
      }
    });
  }

  // h <- h W_hr^T, for some pairs of vectors of the outputs.
  void project_outputs(const StepRows<Cell, T>& rows, Share pairs) {
    const int64_t stride = layout_.padded_projected(), hidden = layout_.hidden;
    const int64_t first = pairs.first * 2 * kLanes<C>,
                  count = smaller(pairs.last * 2 * kLanes<C>, layout_.projected) - first;
    const C* h = rows.unprojected;
    C* projected = projected_ + first + (h - unprojected_) / layout_.padded() * stride;
    if (packed_) {
      multiply_panels<false>(rows.all, rows.count, hidden, h, layout_.padded(),
                             packed_ + layout_.projection() + first * hidden, count, false, projected, stride);
    } else {
      for (int64_t i = 0; i < count; i += kLanes<C>) {
        for (int64_t row = 0; row < rows.count; ++row) {
          store(projected + row * stride + i, dot_rows(direction_.weights.weight_hr + (first + i) * hidden, hidden,
                                                       smaller(kLanes<C>, count - i), h + row * layout_.padded()));
        }
      }
    }
    for (int64_t row = 0; row < rows.count; ++row) {
      copy_masked<C, T>(projected + row * stride, nullptr, count, rows.output + first + row * network_.width());
    }
  }

  void end_sequences(int64_t t, T* h_n, T* c_n) {
    const RnnStep& step = network_.step[t];
    const int64_t first = direction_.continuing(t, part_);
    const Share share = member_.share(part_.first + part_.rows(step) - first);
    for (int64_t sequence = first + share.first; sequence < first + share.last; ++sequence) {
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
  const bool single_near_rows_;
  Member& member_;
  // Shared:
  C* slots_;        // (tiles, block rows, a tile's slots): tile_slots
  C* cells_;        // (sequences, padded): c
  C* unprojected_;  // (sequences, padded): h of this step before its projection
  C* projected_;    // (sequences, padded_projected): after
  // The member's own:
  C* widened_;   // (sequences, padded): h of the step before, for bfloat16
  C* gathered_;  // (block rows, input_size)
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
void pack_weights(const RnnNetwork<T>& network, const RnnWeights<T>& weights, const Member& member,
                  Compute<T>* packed) {
  with_cell(network.mode, [&](auto cell) {
    const ForwardLayout<decltype(cell), Compute<T>> layout(network, weights.input_size);
    pack_forward<decltype(cell), T>(network, weights, member.share(layout.tiles), packed);
  });
}

template <class T>
RnnScratchSize scratch_size(const RnnNetwork<T>& network, int64_t sequences) {
  return with_cell(network.mode, [&](auto cell) {
    const int64_t rows = most_rows<decltype(cell)>(network, sequences);
    return ForwardDirection<decltype(cell), T>::scratch_size(network, sequences, rows, widest_input(network));
  });
}

template <class T>
void run(const RnnNetwork<T>& network, int64_t layer, int64_t direction, T* h_n, T* c_n, int64_t first, int64_t last,
         Member& member, RnnScratch<Compute<T>> scratch) {
  with_cell(network.mode, [&](auto cell) {
    const int64_t rows = most_rows<decltype(cell)>(network, last - first);
    ForwardDirection<decltype(cell), T>(network, layer, direction, {first, last}, rows, member, scratch).run(h_n, c_n);
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
