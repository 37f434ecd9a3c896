// The cell of forward, applied to the rows of a step once their products are summed up.
#pragma once

#include "rnn_forward_weights.h"

namespace fastnn {
namespace FASTNN_ISA {

// Sequences of one step that are computed together, and where their data lie.
template <class Cell, class T>
struct StepRows {
  using C = Compute<T>;

  const ForwardLayout<Cell, C>& layout;
  int64_t all;  // all sequences of the step, including those of other threads
  int64_t count;
  bool backwards;  // whether the tiles are taken from the last to the first
  C* slots;        // the slots of the first sequence in the first tile
  C* cells;        // (count, padded): c
  C* unprojected;  // (count, padded): h before its projection; or null
  T* output;       // (count, output_stride)
  int64_t output_stride;
  T* kept;            // (count, kSaved, hidden), or null
  const C* previous;  // (count, outputs): h of the step before, or null for zeros
  int64_t previous_stride;

  // Applies the cell to the hidden units of a tile, whose slots are given.
  void finish_tile(int64_t first_unit, const C* tile_slots) const {
    if (Cell::kSaved > 0 && kept) return finish_tile_as<true>(first_unit, tile_slots);
    finish_tile_as<false>(first_unit, tile_slots);
  }

 private:
  // keeps: whether what the cell saves is written for backward. It goes to rows of many vectors, so that several rows
  // at once would be slower to write.
  template <bool keeps>
  FASTNN_INLINE void finish_tile_as(int64_t first_unit, const C* tile_slots) const {
    constexpr int together = keeps || Cell::kUnits > 1 ? 1 : kTogether;
    constexpr int64_t before_last = (Cell::kUnits - 1) * kLanes<C>;
    if (first_unit + before_last >= layout.hidden) {  // a tile without its last vector
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t within = 0; first_unit + within < layout.hidden; within += kLanes<C>) {
          finish_units<1, 1, keeps>(row, first_unit + within, tile_slots + row * layout.kTileSlots + within);
        }
      }
      return;
    }
    int64_t row = 0;
    for (; row + together <= count; row += together) {
      finish_units<together, Cell::kUnits, keeps>(row, first_unit, tile_slots + row * layout.kTileSlots);
    }
    for (; row < count; ++row) {
      finish_units<1, Cell::kUnits, keeps>(row, first_unit, tile_slots + row * layout.kTileSlots);
    }
  }

  // Applies the cell to some vectors of units in some rows, in lockstep. The last vector may go beyond the units that
  // exist.
  template <int rows, int vectors, bool keeps>
  FASTNN_INLINE void finish_units(int64_t row, int64_t unit, const C* row_slots) const {
    using V = Lockstep<C, rows * vectors>;
    constexpr int64_t whole = kLanes<C> * vectors;
    const int64_t left_over = layout.hidden - unit, padded = layout.padded();
    V sums[Cell::kSlots], saved[Cell::kSaved + 1], c = {}, before = {};
    for (int s = 0; s < Cell::kSlots; ++s) {
      sums[s] = load_rows<rows, vectors>(row_slots + s * Cell::kUnits * kLanes<C>, layout.kTileSlots, whole);
    }
    if (Cell::kNeedsPrevious && previous) {
      before = load_rows<rows, vectors>(previous + row * previous_stride + unit, previous_stride, left_over);
    }
    C* row_cells = cells + row * padded + unit;
    if (Cell::kHasCellState) c = load_rows<rows, vectors>(row_cells, padded, whole);
    const V h = Cell::forward(sums, before, c, saved);
    if (Cell::kHasCellState) store_rows<rows, vectors>(row_cells, padded, c, whole);
    if constexpr (keeps) {
      const int64_t stride = Cell::kSaved * layout.hidden;
      T* row_kept = kept + row * stride + unit;
      for (int s = 0; s < Cell::kSaved; ++s) {
        store_rows<rows, vectors>(row_kept + s * layout.hidden, stride, saved[s], left_over);
      }
    }
    if (unprojected) return store_rows<rows, vectors>(unprojected + row * padded + unit, padded, h, whole);
    store_rows<rows, vectors>(output + row * output_stride + unit, output_stride, h, left_over);
  }
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
