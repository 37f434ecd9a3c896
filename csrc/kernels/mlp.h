// A chain of linear layers, each with its activation: y = act(x W^T + b), layer after layer.
#pragma once

#include <stdint.h>

#include "../simd/activation.h"
#include "../simd/isa.h"
#include "../simd/dtype.h"
#include "team.h"

namespace fastnn {

// Whether a layer saves its activation's input for backward, rather than its output.
static inline bool saves_input(const Activation& activation) {
  return derived_from(activation) == DerivedFrom::input;
}

// How forward computes. Either rows stay row-major, and each layer takes dot products along the weight's rows or packs
// the weight in panels; or each lane has a row, so that weights are read as they are.
struct MlpPlan {
  bool in_lanes;
  bool together;  // few rows, whose weights threads share out rather than the rows
  int64_t unit;   // rows that are computed together: threads take whole units, so that results don't depend on them
};

template <class T>
struct MlpLayer {
  const T* weight;  // (out, in)
  const T* bias;    // (out), or null
  int64_t in;
  int64_t out;
  Activation activation;
  const T* packed;  // weight in panels, or null for dot products
  T* saved;         // (rows, out) saved for backward, or null
};

template <class T>
struct MlpLayerBackward {
  const T* weight;  // (out, in)
  const T* input;   // (rows, in), or null: computed again from the layer before, which saved its input
  const T* saved;   // (rows, out)
  int64_t in;
  int64_t out;
  Activation activation;
  T* grad_weight;  // (out, in), of these rows alone; or null
  T* grad_bias;    // (out), of these rows alone; or null
  T* lost;         // (out) of scratch, beside grad_bias
};

template <class T>
struct MlpKernels {
  // The fastest plan for layers of these widths (the input's, then each layer's output).
  MlpPlan (*make_plan)(const int64_t* widths, int64_t layers, int64_t rows);
  // Whether a layer that is not taken in lanes should have its weight packed.
  bool (*worth_packing)(int64_t rows, int64_t in, int64_t out);
  int64_t (*packed_size)(int64_t out, int64_t in);
  // Packs one of `parts` parts of the weight.
  void (*pack)(const T* weight, int64_t out, int64_t in, int64_t part, int64_t parts, T* packed);
  // Elements of scratch that forward needs for layers of at most `widest` columns.
  int64_t (*scratch_size)(int64_t widest);
  // input (rows, layers[0].in) -> output (rows, layers[count - 1].out), the rows [first_row, last_row).
  void (*forward)(const MlpLayer<T>* layers, int64_t count, bool in_lanes, const T* input, T* output, int64_t first_row,
                  int64_t last_row, T* scratch);
  // The same for all rows by a team, where the plan says so. Each member reads only its part of the weights. In a round
  // all members together read `round_bytes`.
  void (*forward_together)(const MlpLayer<T>* layers, int64_t count, const T* input, T* output, int64_t rows,
                           int64_t round_bytes, T* scratch, Member& member);
  int64_t (*backward_scratch_size)(int64_t widest);
  // grad_output (rows, layers[count - 1].out) -> grad_input (rows, layers[0].in), or null. Up to `few_rows` rows may be
  // taken by a team of several members, in one call.
  int64_t few_rows;
  void (*backward)(const MlpLayerBackward<T>* layers, int64_t count, const T* grad_output, T* grad_input,
                   int64_t first_row, int64_t last_row, T* scratch, Member& member);
};

// What our kernels compute where torch computes the matrix products.
template <class T>
struct MlpElementwise {
  void (*activate)(const Activation& activation, const T* input, T* output, int64_t count);
  // saved: the activation's input or output, as saves_input says
  void (*gradient)(const Activation& activation, const T* gradient, const T* saved, T* output, int64_t count);
  // The sums of the columns [first, last) over all rows, into `sums` (columns).
  void (*sum_rows)(const T* matrix, int64_t rows, int64_t columns, int64_t first, int64_t last, Compute<T>* sums,
                   Compute<T>* lost);
};

struct MlpTable : PerWideDtype<MlpKernels> {
  PerDtype<MlpElementwise> elementwise;
};

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(MlpTable, mlp_kernels)
