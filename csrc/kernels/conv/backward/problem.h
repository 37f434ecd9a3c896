// What backward works on: the call, a piece of its work, and the kernels of one instruction set.
#pragma once

#include "../../../simd/isa.h"
#include "../../../simd/dtype.h"
#include "plan.h"

namespace fastnn {

// Each image of a tensor but grad_output is contiguous or channels last, without gaps.
template <class T>
struct ConvBackward {
  ConvPoolGeometry geometry;
  const ConvBackwardPlan* plan;
  const T* grad_output;
  ConvLayout output_layout;
  const uint8_t* winners;
  ConvLayout winners_layout;
  const T* input;
  ConvLayout input_layout;
  const T* weight;  // the layout's n is from an output channel to the next
  ConvLayout weight_layout;
  T* grad_input;  // or null
  ConvLayout grad_input_layout;
  Compute<T>* packed;  // the packed weight, or null
};

// Of some images, some blocks, and one of so many parts of the conv pixels along the window's axis.
struct ConvBackwardPiece {
  int64_t first_image, last_image;
  int64_t first_block, last_block;
  int64_t part, parts;
};

template <class T>
struct ConvBackwardKernels {
  int64_t vector_bytes, registers;  // of the instruction set
  // As forward's: whether no element of input and weight is infinite, nearly infinite or NaN.
  bool (*is_moderate)(const ConvBackward<T>&);
  // Bytes of a thread's scratch memory.
  int64_t (*scratch_size)(const ConvBackward<T>&);
  void (*pack)(const ConvBackward<T>&);
  // The gradients that a piece contributes. grad_weight (weight_size) is written, grad_bias (groups x out_channels)
  // added to; either may be null. lost: where the plan says so, zeros of the weight's size, to take note of rounding;
  // else null.
  void (*run)(const ConvBackward<T>&, const ConvBackwardPiece&, Compute<T>* grad_weight, Compute<T>* lost,
              Compute<T>* grad_bias, void* scratch);
  // A private weight gradient, in the weight's layout.
  void (*unpack_weight)(const ConvBackward<T>&, const Compute<T>* grad_weight, T* to, const ConvLayout& layout);
  void (*store)(const Compute<T>* from, int64_t count, T* to);
  // Whether each winner is a place that its window has.
  bool (*winners_are_valid)(const ConvPoolGeometry&, const uint8_t* winners, const ConvLayout&);
  // For stock: the gradient of the convolution's output (spread.h).
  void (*spread)(const ConvBackward<T>&, int64_t first_image, int64_t last_image, T* to, Compute<T>* grad_bias,
                 void* scratch);
  // The same of windows of one pixel, where all lie alike.
  void (*mask_dead)(const T* gradient, const uint8_t* winners, int64_t count, T* to);
  // [rows][columns] -> [columns][rows]
  void (*turn)(const T* from, int64_t rows, int64_t columns, T* to);
};

using ConvBackwardTable = PerDtype<ConvBackwardKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(ConvBackwardTable, conv_backward_kernels)
