// The recurrent cells: what happens to one vector of hidden units in one step, forward and backward.
//
// For a hidden unit a step adds up `kGates` products, x W_ih^T + h W_hh^T, in `kSlots` places. They differ for GRU
// alone, whose candidate n = tanh(x part + r * (hidden part)) needs its two halves apart: its slots are n's x part,
// r, z, n's hidden part, so that both products write kGates slots side by side.
// `kGradients` are the gradients of these slots, in the same order.
#pragma once

#include "../simd/math.h"
#include "rnn.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class T>
FASTNN_INLINE Vec<T> one_minus(Vec<T> x) {
  return T(1) - x;
}

template <RnnMode which>
struct ElmanCell {
  static constexpr RnnMode mode = which;
  static constexpr int kGates = 1, kSlots = 1, kHiddenSlot = 0, kSaved = 0;
  static constexpr bool kHasCellState = false, kNeedsPrevious = false;
  // Hidden units of a tile, in vectors: a tile has kGates * kUnits vectors a row.
  static constexpr int kUnits = 2;
  static constexpr int input_gate(int slot) { return slot; }

  template <class T>
  static FASTNN_INLINE Vec<T> forward(const Vec<T>* slots, Vec<T>, Vec<T>&, Vec<T>*) {
    return which == RnnMode::tanh ? tanh_of<T>(slots[0]) : relu(slots[0]);
  }

  // `carry` is what of dh goes to the step before without a weight, `dc` the cell state's gradient, in and out.
  template <class T>
  static FASTNN_INLINE void backward(Vec<T> dh, Vec<T> h, Vec<T>, Vec<T>, const Vec<T>*, Vec<T>&, Vec<T>& carry,
                                     Vec<T>* gradients) {
    gradients[0] = which == RnnMode::tanh ? dh * one_minus<T>(h * h) : (h <= Vec<T>{} ? Vec<T>{} : dh);
    carry = Vec<T>{};
  }
};

struct GruCell {
  static constexpr RnnMode mode = RnnMode::gru;
  static constexpr int kGates = 3, kSlots = 4, kHiddenSlot = 1, kSaved = 4;
  static constexpr bool kHasCellState = false, kNeedsPrevious = true;
  static constexpr int kUnits = 1;
  // torch stacks the weights of r, z, n.
  static constexpr int input_gate(int slot) { return (slot + 2) % 3; }

  template <class T>
  static FASTNN_INLINE Vec<T> forward(const Vec<T>* slots, Vec<T> previous, Vec<T>&, Vec<T>* saved) {
    const Vec<T> r = sigmoid_of<T>(slots[1]), z = sigmoid_of<T>(slots[2]);
    const Vec<T> n = tanh_of<T>(slots[0] + r * slots[3]);
    saved[0] = n, saved[1] = r, saved[2] = z, saved[3] = slots[3];
    return (previous - n) * z + n;
  }

  template <class T>
  static FASTNN_INLINE void backward(Vec<T> dh, Vec<T>, Vec<T> previous, Vec<T>, const Vec<T>* saved, Vec<T>&,
                                     Vec<T>& carry, Vec<T>* gradients) {
    const Vec<T> n = saved[0], r = saved[1], z = saved[2], hidden_part = saved[3];
    const Vec<T> dn = dh * one_minus<T>(z) * one_minus<T>(n * n);
    gradients[0] = dn;
    gradients[1] = dn * hidden_part * r * one_minus<T>(r);
    gradients[2] = dh * (previous - n) * z * one_minus<T>(z);
    gradients[3] = dn * r;
    carry = dh * z;
  }
};

struct LstmCell {
  static constexpr RnnMode mode = RnnMode::lstm;
  static constexpr int kGates = 4, kSlots = 4, kHiddenSlot = 0, kSaved = 5;
  static constexpr bool kHasCellState = true, kNeedsPrevious = false;
  static constexpr int kUnits = 1;
  static constexpr int input_gate(int slot) { return slot; }

  template <class T>
  static FASTNN_INLINE Vec<T> forward(const Vec<T>* slots, Vec<T>, Vec<T>& c, Vec<T>* saved) {
    const Vec<T> i = sigmoid_of<T>(slots[0]), f = sigmoid_of<T>(slots[1]);
    const Vec<T> g = tanh_of<T>(slots[2]), o = sigmoid_of<T>(slots[3]);
    c = f * c + i * g;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    return output<T>(saved);
  }
  template <class T>
  static FASTNN_INLINE Vec<T> output(const Vec<T>* saved) {
    return saved[3] * tanh_of<T>(saved[4]);
  }

  template <class T>
  static FASTNN_INLINE void backward(Vec<T> dh, Vec<T>, Vec<T>, Vec<T> previous_c, const Vec<T>* saved, Vec<T>& dc,
                                     Vec<T>& carry, Vec<T>* gradients) {
    const Vec<T> i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const Vec<T> tanh_c = tanh_of<T>(saved[4]);
    const Vec<T> dc_here = dc + dh * o * one_minus<T>(tanh_c * tanh_c);
    gradients[0] = dc_here * g * i * one_minus<T>(i);
    gradients[1] = dc_here * previous_c * f * one_minus<T>(f);
    gradients[2] = dc_here * i * one_minus<T>(g * g);
    gradients[3] = dh * tanh_c * o * one_minus<T>(o);
    dc = dc_here * f;
    carry = Vec<T>{};
  }
};

// body(Cell{}) for the run-time mode.
template <class Body>
FASTNN_INLINE auto with_cell(RnnMode mode, const Body& body) {
  switch (mode) {
    case RnnMode::relu:
      return body(ElmanCell<RnnMode::relu>{});
    case RnnMode::gru:
      return body(GruCell{});
    case RnnMode::lstm:
      return body(LstmCell{});
    default:
      return body(ElmanCell<RnnMode::tanh>{});
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
