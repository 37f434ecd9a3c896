// The recurrent cells: what happens to a few vectors of hidden units (V is a Lockstep) in one step, forward and
// backward.
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

template <class T, int n>
FASTNN_INLINE Lockstep<T, n> one_minus(const Lockstep<T, n>& x) {
  return T(1) - x;
}
// `gradient` where relu(x) = h has let x pass: it is 0 at 0, 1 at NaN.
template <class T, int n>
FASTNN_INLINE Lockstep<T, n> passed_relu(const Lockstep<T, n>& h, const Lockstep<T, n>& gradient) {
  return each([](Vec<T> a, Vec<T> g) __attribute__((always_inline)) { return Vec<T>(a <= Vec<T>{} ? Vec<T>{} : g); }, h,
              gradient);
}

template <RnnMode which>
struct ElmanCell {
  static constexpr RnnMode mode = which;
  static constexpr int kGates = 1, kSlots = 1, kHiddenSlot = 0, kSaved = 0;
  static constexpr bool kHasCellState = false, kNeedsPrevious = false;
  // Hidden units of a tile, in vectors: a tile has kGates * kUnits vectors a row.
  static constexpr int kUnits = 2;
  static constexpr int input_gate(int slot) { return slot; }

  template <class V>
  static FASTNN_INLINE V forward(const V* slots, V, V&, V*) {
    return which == RnnMode::tanh ? tanh_of(slots[0]) : relu(slots[0]);
  }

  // `carry` is what of dh goes to the step before without a weight, `dc` the cell state's gradient, in and out.
  template <class V>
  static FASTNN_INLINE void backward(V dh, V h, V, V, const V*, V&, V& carry, V* gradients) {
    gradients[0] = which == RnnMode::tanh ? dh * one_minus(h * h) : passed_relu(h, dh);
    carry = V{};
  }
};

struct GruCell {
  static constexpr RnnMode mode = RnnMode::gru;
  static constexpr int kGates = 3, kSlots = 4, kHiddenSlot = 1, kSaved = 4;
  static constexpr bool kHasCellState = false, kNeedsPrevious = true;
  static constexpr int kUnits = 1;
  // torch stacks the weights of r, z, n.
  static constexpr int input_gate(int slot) { return (slot + 2) % 3; }

  template <class V>
  static FASTNN_INLINE V forward(const V* slots, V previous, V&, V* saved) {
    const V r = sigmoid_of(slots[1]), z = sigmoid_of(slots[2]);
    const V n = tanh_of(slots[0] + r * slots[3]);
    saved[0] = n, saved[1] = r, saved[2] = z, saved[3] = slots[3];
    return (previous - n) * z + n;
  }

  template <class V>
  static FASTNN_INLINE void backward(V dh, V, V previous, V, const V* saved, V&, V& carry, V* gradients) {
    const V n = saved[0], r = saved[1], z = saved[2], hidden_part = saved[3];
    const V dn = dh * one_minus(z) * one_minus(n * n);
    gradients[0] = dn;
    gradients[1] = dn * hidden_part * r * one_minus(r);
    gradients[2] = dh * (previous - n) * z * one_minus(z);
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

  template <class V>
  static FASTNN_INLINE V forward(const V* slots, V, V& c, V* saved) {
    const V i = sigmoid_of(slots[0]), g = tanh_of(slots[2]), f = sigmoid_of(slots[1]);
    c = multiply_add(f, c, i * g);
    const V o = sigmoid_of(slots[3]);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    return output(saved);
  }
  template <class V>
  static FASTNN_INLINE V output(const V* saved) {
    return saved[3] * tanh_of(saved[4]);
  }

  template <class V>
  static FASTNN_INLINE void backward(V dh, V, V, V previous_c, const V* saved, V& dc, V& carry, V* gradients) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh_of(saved[4]);
    const V dc_here = dc + dh * o * one_minus(tanh_c * tanh_c);
    gradients[0] = dc_here * g * i * one_minus(i);
    gradients[1] = dc_here * previous_c * f * one_minus(f);
    gradients[2] = dc_here * i * one_minus(g * g);
    gradients[3] = dh * tanh_c * o * one_minus(o);
    dc = dc_here * f;
    carry = V{};
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
