// What backward works on: the call, a piece of its work, and the kernels of one instruction set.
#pragma once

#include "../../../simd/isa.h"
#include "../../../simd/dtype.h"
#include "plan.h"

namespace fastnn {

// Each image of every tensor except grad_output is contiguous or channels last, without gaps.
template <class T>
struct ConvBackward {
  ConvPoolGeometry geometry;
  const ConvBackwardPlan* plan;
  const T* grad_output;
  ConvLayout output_layout;
  const uint8_t* winners;  // for `winograd` and `depthwise` also null: each conv pixel has its gradient
  ConvLayout winners_layout;
  const T* input;
  ConvLayout input_layout;
  const T* weight;  // the layout's n is from an output channel to the next
  ConvLayout weight_layout;
  T* grad_input;  // or null
  ConvLayout grad_input_layout;
  Compute<T>* packed;  // the packed weight, or null
};

// A piece of work: some images, some blocks, and one of `parts` parts of the conv pixels along the window's axis.
struct ConvBackwardPiece {
  int64_t first_image, last_image;
  int64_t first_block, last_block;
  int64_t part, parts;
};

template <class T>
struct ConvBackwardKernels {
  Machine machine;  // what these kernels were compiled for
  // As in forward: whether no element is infinite, nearly infinite or NaN.
  bool (*input_is_moderate)(const ConvBackward<T>&);
  bool (*weight_is_moderate)(const ConvBackward<T>&);
  // The same of the output's gradient, whose images are contiguous or channels last.
  bool (*gradient_is_moderate)(const ConvBackward<T>&);
  bool factors_are_moderate(const ConvBackward<T>& call) const {
    return input_is_moderate(call) && weight_is_moderate(call);
  }
  // Bytes of a thread's scratch memory.
  int64_t (*scratch_size)(const ConvBackward<T>&);
  void (*pack)(const ConvBackward<T>&);
  // Computes a piece's share of the gradients. It writes grad_weight (weight_size) and adds to grad_bias (groups x
  // out_channels); either may be null. lost: zeros of the weight's size, to which what is rounded off is added, if the
  // plan keeps it; else null.
  void (*run)(const ConvBackward<T>&, const ConvBackwardPiece&, Compute<T>* grad_weight, Compute<T>* lost,
              double* grad_bias, void* scratch);
  // Writes a private weight gradient in the weight's layout.
  void (*unpack_weight)(const ConvBackward<T>&, const Compute<T>* grad_weight, T* to, const ConvLayout& layout);
  void (*store)(const Compute<T>* from, int64_t count, T* to);
  // Whether each argmax is a position that its window has.
  bool (*winners_are_valid)(const ConvPoolGeometry&, const uint8_t* winners, const ConvLayout&);
  // For `stock`: computes the gradient of the convolution's output (spread.h).
  void (*spread)(const ConvBackward<T>&, int64_t first_image, int64_t last_image, T* to, double* grad_bias,
                 void* scratch);
  // The same where windows are one pixel and all tensors have the same layout.
  void (*mask_dead)(const T* gradient, const uint8_t* winners, int64_t count, T* to);
  // For `winograd` (winograd.h): the sums of [first, last) of the plan's items, for the weight's gradient unless they
  // are null, and for the bias's; and [first, last) of the plan's pieces of the weight's gradient from all sums.
  void (*sum_tiles)(const ConvBackward<T>&, int64_t first, int64_t last, Compute<T>* sums, double* bias, void* scratch);
  void (*write_weight_gradient)(const ConvBackward<T>&, Compute<T>* sums, int64_t first, int64_t last, T* to,
                                const ConvLayout& layout);
  // [rows][columns] -> [columns][rows]
  void (*turn)(const T* from, int64_t rows, int64_t columns, T* to);
};

using ConvBackwardTable = PerDtype<ConvBackwardKernels>;

}  // namespace fastnn

// Declares conv_backward_kernels(): the table of the instruction set in use, which backward.cpp defines for each set.
FASTNN_DECLARE_KERNELS(ConvBackwardTable, conv_backward_kernels)
