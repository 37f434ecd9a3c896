// What forward and backward of the recurrent op share: steps taken in blocks, and the rows of a block.
#pragma once

#include "panel.h"
#include "rnn_cells.h"

namespace fastnn {
namespace FASTNN_ISA {

// Steps that are worked on together: the products that need no earlier step are made for all rows of a block at
// once, and the block stays in cache until its steps have used them.
constexpr int64_t kBlockElements = 48 * 1024;

// The rows of a block. `row_elements`: how many elements a block holds for a row.
inline int64_t block_rows(int64_t sequences, int64_t total_rows, int64_t row_elements) {
  const int64_t rows = kBlockElements / row_elements / 12 * 12;
  return larger(sequences, smaller(total_rows, larger(rows, 24)));
}

// Some of the sequences, [first, last). In a step only those count that still run.
struct Part {
  int64_t first, last;

  FASTNN_INLINE int64_t rows(const RnnStep& step) const { return larger(0, smaller(step.rows, last) - first); }
};

// Consecutive steps [first, last) in time; rows of a part, counted from the block's first.
struct StepBlock {
  int64_t first, last, rows;
};

// The block of at most `most` rows that begins (or, backwards in time, ends) at `edge`.
template <class T>
StepBlock next_block(const RnnNetwork<T>& network, Part part, int64_t edge, bool backwards, int64_t most) {
  StepBlock block{edge, edge, 0};
  while (backwards ? block.first > 0 : block.last < network.steps) {
    const int64_t rows = part.rows(network.step[backwards ? block.first - 1 : block.last]);
    if (block.rows + rows > most) break;
    block.rows += rows;
    backwards ? --block.first : ++block.last;
  }
  return block;
}

// Rows of a matrix that are dense in a step but may lie anywhere from step to step.
template <class T>
struct Rows {
  using Element = T;
  const T* base;
  int64_t stride;
  int64_t RnnStep::* start = nullptr;  // where a step's first row is in the caller's layout; null: time first

  FASTNN_INLINE const T* at(const RnnStep& step, int64_t sequence) const {
    return start ? base + step.*start + sequence * stride : base + (step.row + sequence) * stride;
  }
};

// The input of layer `layer`, without the dropout mask.
template <class T>
Rows<T> layer_input(const RnnNetwork<T>& network, int64_t layer) {
  if (layer == 0) return {network.input, network.input_stride, &RnnStep::input};
  return {network.layer_output(layer - 1), network.width()};
}

template <class T>
const T* layer_mask(const RnnNetwork<T>& network, int64_t layer) {
  if (layer == 0 || !network.masks) return nullptr;
  return network.masks + (layer - 1) * network.rows * network.width();
}

// body(step, sequence, local): every row of the block, in time order.
template <class T, class Body>
FASTNN_INLINE void for_rows(const RnnNetwork<T>& network, Part part, StepBlock block, const Body& body) {
  int64_t local = 0;
  for (int64_t t = block.first; t < block.last; ++t) {
    const RnnStep& step = network.step[t];
    const int64_t last = part.first + part.rows(step);
    for (int64_t sequence = part.first; sequence < last; ++sequence) body(step, sequence, local++);
  }
}

// to (count) <- from, times mask if there is one
template <class T, class To>
FASTNN_INLINE void copy_masked(const T* from, const T* mask, int64_t count, To* to) {
  using C = Compute<T>;
  for (int64_t i = 0; i < count; i += kLanes<C>) {
    Vec<C> value = load_up_to<T>(from + i, count - i);
    if (mask) value *= load_up_to<T>(mask + i, count - i);
    store_up_to<To>(to + i, value, count - i);
  }
}

// One direction of one layer, as its time loop sees it.
template <class T>
struct Direction {
  const RnnNetwork<T>& network;
  int64_t layer;
  int64_t direction;
  const RnnWeights<T>& weights;
  int64_t index;  // of the direction among all of the network's

  Direction(const RnnNetwork<T>& network, int64_t layer, int64_t direction)
      : network(network),
        layer(layer),
        direction(direction),
        weights(network.weights[layer * network.directions + direction]),
        index(layer * network.directions + direction) {}

  bool reverse() const { return direction == 1; }

  // The direction's own columns of the layer's output, at a step's row of a sequence.
  FASTNN_INLINE T* output(const RnnStep& step, int64_t sequence) const {
    return network.layer_output(layer) + (step.row + sequence) * network.width() + direction * network.outputs();
  }
  // What the cell saves for a row: (kSaved, hidden).
  template <class Cell>
  FASTNN_INLINE T* saved(const RnnStep& step, int64_t sequence) const {
    return network.saved + (index * network.rows + step.row + sequence) * Cell::kSaved * network.hidden;
  }
  // Where a sequence's h and c lie among the states.
  FASTNN_INLINE int64_t h_offset(int64_t sequence) const {
    return (index * network.batch + sequence) * network.outputs();
  }
  FASTNN_INLINE int64_t c_offset(int64_t sequence) const { return (index * network.batch + sequence) * network.hidden; }

  // Sequences of `part` that the step before (in the direction's order) has run already; the others start here.
  FASTNN_INLINE int64_t running(int64_t t, Part part) const {
    const int64_t before = reverse() ? t + 1 : t - 1;
    if (before < 0 || before >= network.steps) return part.first;
    return part.first + smaller(part.rows(network.step[t]), part.rows(network.step[before]));
  }
  // Sequences of `part` that the step after will run; the others end here.
  FASTNN_INLINE int64_t continuing(int64_t t, Part part) const {
    const int64_t after = reverse() ? t - 1 : t + 1;
    if (after < 0 || after >= network.steps) return part.first;
    return part.first + smaller(part.rows(network.step[t]), part.rows(network.step[after]));
  }
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
