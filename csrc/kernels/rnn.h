// Recurrent networks: all layers, directions and steps of tanh and ReLU networks, GRU and LSTM.
#pragma once

#include <stdint.h>

#include "../simd/isa.h"
#include "../simd/dtype.h"
#include "team.h"

namespace fastnn {

enum class RnnMode : int32_t { tanh, relu, gru, lstm, count };

// One row of the table of modes. fastnn/recurrent_modes.py reads the table from the extension.
struct RnnModeEntry {
  const char* name;  // that torch.nn.RNNBase has for it
  int64_t gates;     // rows of the weights for each hidden unit
  uint64_t states;   // h, and LSTM's c
  // How many numbers a step saves for backward, for each hidden unit, besides the output: LSTM saves its gates and the
  // cell state, GRU its gates and the hidden half of the candidate.
  int64_t saved;
  int64_t slots;  // gradients of each hidden unit before the activations, in an order of the kernels' own
};
constexpr RnnModeEntry kRnnModes[] = {
    {"RNN_TANH", 1, 1, 0, 1},
    {"RNN_RELU", 1, 1, 0, 1},
    {"GRU", 3, 1, 4, 4},  // its slots are n, r, z, and the hidden half of n
    {"LSTM", 4, 2, 5, 4},
};
static_assert(sizeof(kRnnModes) / sizeof(RnnModeEntry) == static_cast<uint64_t>(RnnMode::count));
static inline const RnnModeEntry& entry_of(RnnMode mode) {
  return kRnnModes[static_cast<int32_t>(mode)];
}

// One time step. Sequences are sorted by length, so that the ones still running are the first `rows`.
struct RnnStep {
  int64_t input;  // where the step's first row starts in the network's input, in elements
  int64_t row;    // the same in output and everything else that is kept time-major: rows of the steps before
  int64_t rows;
  int64_t gradient = 0;  // the same as `input` in the gradient of the output
};

// One direction of one layer.
template <class T>
struct RnnWeights {
  const T* weight_ih;  // (gates * hidden, input_size)
  const T* weight_hh;  // (gates * hidden, outputs)
  const T* bias_ih;    // (gates * hidden), or null
  const T* bias_hh;    // (gates * hidden), or null
  const T* weight_hr;  // (projected, hidden), or null
  int64_t input_size;
  const Compute<T>* packed;  // or null, where forward does not need packed weights
};

// What forward and backward share. The network has `layers` times `directions` weights, layer after layer.
template <class T>
struct RnnNetwork {
  RnnMode mode;
  int64_t layers;
  int64_t directions;
  int64_t hidden;
  int64_t projected;  // LSTM's proj_size, the elements of h after weight_hr; or 0
  int64_t batch;
  int64_t rows;  // of all steps together
  int64_t steps;
  const RnnStep* step;           // (steps)
  const RnnWeights<T>* weights;  // (layers * directions)
  const T* input;                // (rows, weights[0].input_size) by RnnStep::input
  int64_t input_stride;          // from a row of a step to the next
  const T* masks;                // (layers - 1, rows, width()): the dropout between layers, or null
  const T* h0;                   // (layers * directions, batch, outputs()), or null for zeros
  const T* c0;                   // (layers * directions, batch, hidden), or null; LSTM alone
  T* saved;                      // (layers * directions, rows, entry_of(mode).saved, hidden), or null
  T* hidden_outputs;             // (layers - 1 or fewer, rows, width()): see layer_output
  bool keeps_hidden_outputs;     // whether each layer's output has its own place, for backward
  T* output;                     // (rows, width())

  int64_t outputs() const { return projected ? projected : hidden; }  // elements of h
  int64_t width() const { return directions * outputs(); }
  // Where outputs are not kept, a layer of one direction writes each step over the input that it has used, and layers
  // of two directions write to `output` and to one buffer in turn.
  T* layer_output(int64_t layer) const {
    const int64_t above = layers - 1 - layer;
    if (above == 0) return output;
    if (keeps_hidden_outputs) return hidden_outputs + layer * rows * width();
    return directions == 1 || above % 2 == 0 ? output : hidden_outputs;
  }
};

// Elements of scratch: memory that a team shares, and memory that each of its members has for itself.
struct RnnScratchSize {
  int64_t shared, own;
};
template <class C>
struct RnnScratch {
  C *shared, *own;
};

template <class T>
struct RnnForwardKernels {
  // Whether a network that sees `rows` rows should have its weights packed.
  bool (*worth_packing)(int64_t rows);
  int64_t (*packed_size)(const RnnNetwork<T>& network, int64_t input_size);
  // The member's share of a round.
  void (*pack)(const RnnNetwork<T>& network, const RnnWeights<T>& weights, const Member& member, Compute<T>* packed);
  RnnScratchSize (*scratch_size)(const RnnNetwork<T>& network, int64_t sequences);
  // The sequences [first, last) in one direction of one layer, after all directions of the layer below. h_n and c_n are
  // as h0 and c0; c_n may be null but for LSTM. Whole rounds: the members of a team share the hidden units.
  void (*run)(const RnnNetwork<T>& network, int64_t layer, int64_t direction, T* h_n, T* c_n, int64_t first,
              int64_t last, Member& member, RnnScratch<Compute<T>> scratch);
};

template <class T>
struct RnnGradients {
  const T* grad_output;        // (rows, width()) by RnnStep::gradient, or null
  int64_t grad_output_stride;  // from a row of a step to the next
  const T* grad_h_n;           // as h0, or null
  int64_t h_n_from;            // the first direction for which grad_h_n has a gradient
  const T* grad_c_n;           // as c0, or null
  T* grad_input;               // laid out as the input; or null
  T* grad_h0;                  // as h0, or null
  T* grad_c0;                  // as c0, or null
};

// The gradients of one direction of one layer. All but the first two may be null.
template <class T>
struct RnnWeightGradients {
  T* weight_ih;
  T* weight_hh;
  T* bias_ih;
  T* bias_hh;
  T* weight_hr;
};

template <class T>
struct RnnBackwardKernels {
  int64_t (*packed_size)(const RnnNetwork<T>& network, int64_t input_size);
  // The member's share of a round.
  void (*pack)(const RnnNetwork<T>& network, const RnnWeights<T>& weights, const Member& member, Compute<T>* packed);
  // The same without weight_ih, which run_steps does not read.
  void (*pack_hidden)(const RnnNetwork<T>& network, const RnnWeights<T>& weights, const Member& member,
                      Compute<T>* packed);
  RnnScratchSize (*scratch_size)(const RnnNetwork<T>& network, int64_t sequences);
  // Elements of the sums below for one direction of one layer.
  int64_t (*sums_size)(const RnnNetwork<T>& network, int64_t input_size);
  // The sequences [first, last). layer_grads (2, rows, width()) is scratch for all sequences. `sums`, or
  // null, are the weights' gradients added up over the sequences, one direction of one layer after the other. Whole
  // rounds.
  void (*run)(const RnnNetwork<T>& network, const RnnGradients<T>& gradients, Compute<T>* layer_grads, Compute<T>* sums,
              int64_t first, int64_t last, Member& member, RnnScratch<Compute<T>> scratch);
  // Adds up `parts` such sums, `stride` apart, of one direction of one layer. The biases' gradients may be null.
  void (*finish)(const RnnNetwork<T>& network, int64_t input_size, const Compute<T>* sums, int64_t parts,
                 int64_t stride, const RnnWeightGradients<T>& gradients);

  // Does the same as `run` for the steps of the sequences [first, last) in one direction of one layer without a
  // projection, except for the products over all rows, which the caller computes. grad_output (rows, width()) is the
  // gradient of the layer's output; null for the last layer, whose gradient is in `gradients`. The gradients that are
  // factors of those products go to `gates` (rows, entry_of(mode).slots * hidden). Whole rounds.
  void (*run_steps)(const RnnNetwork<T>& network, const RnnGradients<T>& gradients, int64_t layer, int64_t direction,
                    const Compute<T>* grad_output, Compute<T>* gates, int64_t first, int64_t last, Member& member,
                    RnnScratch<Compute<T>> scratch);
  // Gathers the other factors of those products for the steps [first, last): the layer's input (rows, input_size),
  // after dropout, and h of the step before (rows, hidden).
  void (*gather)(const RnnNetwork<T>& network, int64_t layer, int64_t direction, int64_t first, int64_t last,
                 Compute<T>* inputs, Compute<T>* previous);
  // Takes the product that is the gradient of the input (rows, input_size), for the steps [first, last), through the
  // dropout to grad_below (rows, width()), or for the first layer to `gradients`. The second direction adds to what is
  // there.
  void (*pass_down)(const RnnNetwork<T>& network, const RnnGradients<T>& gradients, int64_t layer, int64_t direction,
                    int64_t first, int64_t last, const Compute<T>* product, Compute<T>* grad_below);
};

using RnnForwardTable = PerDtype<RnnForwardKernels>;
using RnnBackwardTable = PerDtype<RnnBackwardKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(RnnForwardTable, rnn_forward_kernels)
FASTNN_DECLARE_KERNELS(RnnBackwardTable, rnn_backward_kernels)
