// How forward packs its weights and lays out its slots.
#pragma once

#include "panel.h"
#include "rnn_cells.h"

namespace fastnn {
namespace FASTNN_ISA {

// Where things lie in a direction's packed weights, and in a row of slots. A tile has kUnits vectors of hidden units.
template <class Cell, class C>
struct ForwardLayout {
  static constexpr int64_t kVectors = Cell::kGates * Cell::kUnits;
  static constexpr int64_t kTileUnits = Cell::kUnits * kLanes<C>;
  static constexpr int64_t kPanelWidth = Cell::kGates * kTileUnits;
  static constexpr int64_t kTileSlots = Cell::kSlots * kTileUnits;
  int64_t hidden, projected, input_size, tiles;

  template <class T>
  ForwardLayout(const RnnNetwork<T>& network, int64_t input_size)
      : hidden(network.hidden),
        projected(network.projected),
        input_size(input_size),
        tiles(divide_up(hidden, kTileUnits)) {}

  int64_t slots() const { return tiles * kTileSlots; }
  // Slots lie tile by tile, so that those of a tile are side by side: rows a power of two apart would share few sets of
  // the cache. For the same reason tiles are an odd vector apart.
  static int64_t tile_stride(int64_t rows) { return rows * kTileSlots + kLanes<C>; }
  int64_t slots_size(int64_t rows) const { return tiles * tile_stride(rows); }
  int64_t padded() const { return tiles * kTileUnits; }
  int64_t outputs() const { return projected ? projected : hidden; }
  int64_t padded_projected() const { return padded_columns<C>(projected); }
  // (tiles, input_size or outputs, gates, units), the biases (tiles, gates, units), (tiles, units), and weight_hr in
  // panels of its own.
  int64_t hidden_panels() const { return tiles * kPanelWidth * input_size; }
  int64_t bias() const { return hidden_panels() + tiles * kPanelWidth * outputs(); }
  int64_t hidden_bias() const { return bias() + tiles * kPanelWidth; }
  int64_t projection() const { return hidden_bias() + padded(); }
  int64_t size() const { return projection() + padded_projected() * hidden; }
};

template <class T>
FASTNN_INLINE Vec<Compute<T>> load_bias(const T* bias, int64_t unit, int64_t left_over) {
  return bias && left_over > 0 ? load_up_to<T>(bias + unit, left_over) : Vec<Compute<T>>{};
}

// Those of some tiles.
template <class Cell, class T>
void pack_forward(const RnnNetwork<T>& network, const RnnWeights<T>& weights, Share tiles, Compute<T>* packed) {
  using C = Compute<T>;
  constexpr int lanes = kLanes<C>;
  const int64_t input_size = weights.input_size, hidden = network.hidden, outputs = network.outputs();
  const ForwardLayout<Cell, C> layout(network, input_size);
  if (network.projected && tiles.first == 0 && !tiles.empty()) {
    pack_transposed(weights.weight_hr, network.projected, hidden, packed + layout.projection());
  }
  for (int64_t vector = tiles.first * layout.kVectors; vector < tiles.last * layout.kVectors; ++vector) {
    const int64_t tile = vector / layout.kVectors, slot = vector % layout.kVectors / Cell::kUnits;
    const int64_t unit = tile * layout.kTileUnits + vector % Cell::kUnits * lanes;
    const int64_t left_over = hidden - unit, count = larger(0, smaller(left_over, lanes));
    const int64_t within = vector % layout.kVectors * lanes;
    const int64_t input_row = Cell::input_gate(static_cast<int>(slot)) * hidden + unit,
                  hidden_row = slot * hidden + unit;
    pack_rows<T>(weights.weight_ih + input_row * input_size, input_size, count, input_size,
                 packed + tile * layout.kPanelWidth * input_size + within, layout.kPanelWidth);
    pack_rows<T>(weights.weight_hh + hidden_row * outputs, outputs, count, outputs,
                 packed + layout.hidden_panels() + tile * layout.kPanelWidth * outputs + within, layout.kPanelWidth);
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

}  // namespace FASTNN_ISA
}  // namespace fastnn
