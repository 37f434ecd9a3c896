// What every algorithm of the convolution works on: the call, and the kernels of one instruction set.
#pragma once

#include "../../simd/activation.h"
#include "../../simd/isa.h"
#include "../../simd/dtype.h"
#include "geometry.h"
#include "plan.h"

namespace fastnn {

// max_pool(activation(conv(input, weight) + bias + addend)) over raw memory.
template <class T>
struct ConvCall {
  ConvPoolGeometry geometry;
  const ConvPlan* plan;
  const T* input;  // contiguous or channels last
  ConvLayout input_layout;
  const T* weight;  // dense, contiguous or channels last; the layout's n is from an output channel to the next
  ConvLayout weight_layout;
  // For the input's gradient, which is the convolution of the output's gradient by the weight turned around: the weight
  // is that of the convolution forward, [input][output], and input elements whose winner is dead count as zeros. Only
  // winograd can do that.
  bool turned;
  const uint8_t* input_winners;  // laid out as the input
  const T* bias;                 // [groups x out_channels], or null
  Compute<T>* packed;            // the weight, as the plan's algorithm reads it
  T* output;                     // dense, contiguous or channels last
  ConvLayout output_layout;
  uint8_t* winners;  // laid out as the output, or null
  // ReLU or the identity; without winners and where each window is a conv pixel, any.
  Activation activation;
  const T* addend;  // laid out as the output, where each window is a conv pixel; or null

  // Whether the activation is taken with the sums or with the pool.
  bool bounds_sums() const { return !addend && only_bounds(activation); }
  // Whether the output is changed once more where it has been written: see `finish` in copy.h.
  bool finishes() const { return addend || (!bounds_sums() && activation.kind != ActivationKind::identity); }
};

template <class T>
struct ConvKernels {
  Machine machine;  // what these kernels were compiled for
  // Items [first, last) of plan.pack_items: call.weight -> call.packed.
  void (*pack)(const ConvCall<T>&, int64_t first, int64_t last);
  // Items [first, last) of plan.items, with a thread's own scratch memory.
  void (*run)(const ConvCall<T>&, int64_t first, int64_t last, void* scratch);
  // Whether all elements of the input, or of the weight, are finite and so small that transforms cannot make infinities
  // of them.
  bool (*input_is_moderate)(const ConvCall<T>&);
  bool (*weight_is_moderate)(const ConvCall<T>&);
  // ReLU and argmaxes of conv pixels, in any order, where each conv pixel is a window.
  void (*rectify)(const T* from, int64_t count, T* to, uint8_t* winners);
  // to = activation(from + addend), element by element. addend may be null, and `from` may be `to`.
  void (*finish)(const Activation& activation, const T* from, const T* addend, int64_t count, T* to);
};

using ConvKernelTable = PerDtype<ConvKernels>;

}  // namespace fastnn

// Declares conv_kernels(): the table of the instruction set in use, which forward.cpp defines for each set.
FASTNN_DECLARE_KERNELS(ConvKernelTable, conv_kernels)
