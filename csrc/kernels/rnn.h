// Recurrent networks: all layers, directions and steps of tanh and ReLU networks, GRU and LSTM.
#pragma once

#include <stdint.h>

#include "../simd/isa.h"
#include "../simd/dtype.h"
#include "team.h"

namespace fastnn {

enum class RnnMode : int32_t { tanh, relu, gru, lstm, count };

// Of each mode, in their order. fastnn/recurrent_modes.py reads this table from the extension.
struct RnnModeEntry {
  const char* name;  // that torch.nn.RNNBase has for it
  int64_t gates;     // rows of the weights for each hidden unit
  uint64_t states;   // h, and LSTM's c
  // Numbers that a step saves of each hidden unit for backward, besides the output: LSTM its gates and cell state, GRU
  // its gates and the hidden half of the candidate.
  int64_t saved;
  int64_t slots;  // gradients of each hidden unit before the activations, in an order of the kernels' own
};
constexpr RnnModeEntry kRnnModes[] = {
    {"RNN_TANH", 1, 1, 0, 1},
    {"RNN_RELU", 1, 1, 0, 1},
    {"GRU", 3, 1, 4, 4},  // its slots are those of n, r and z, and the hidden half of n
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
  const Compute<T>* packed;  // or null, where forward may do without
};

// What forward and backward share. Network of `directions` times `layers` weights, layer after layer.
template <class T>
struct RnnNetwork {
  RnnMode mode;
  int64_t layers;
  int64_t directions;
  int64_t hidden;
  int64_t projected;  // LSTM's proj_size: what h is brought down to by weight_hr; or 0
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
  bool keeps_hidden_outputs;     // for backward: each layer's in its own place
  T* output;                     // (rows, width())

  int64_t outputs() const { return projected ? projected : hidden; }  // elements of h
  int64_t width() const { return directions * outputs(); }
  // Where nothing is kept, one direction writes each step in place of the input it has used up, and two directions
  // take turns between `output` and one buffer.
  T* layer_output(int64_t layer) const {
    const int64_t above = layers - 1 - layer;
    if (above == 0) return output;
    if (keeps_hidden_outputs) return hidden_outputs + layer * rows * width();
    return directions == 1 || above % 2 == 0 ? output : hidden_outputs;
  }
};

// Elements of scratch: what a team shares, and what each of its members has of its own.
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
  int64_t h_n_from;            // the direction at which grad_h_n begins, the ones before having no gradient there
  const T* grad_c_n;           // as c0, or null
  T* grad_input;               // laid out as the input; or null
  T* grad_h0;                  // as h0, or null
  T* grad_c0;                  // as c0, or null
};

// Of one direction of one layer: all but the first two may be null.
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

  // For one direction of one layer without a projection, what `run` does but for the products of all rows, which are
  // left to the caller: the steps of the sequences [first, last). grad_output (rows, width()) is the gradient of the
  // layer's output, null for that of the last layer, which `gradients` has. gates (rows, entry_of(mode).slots * hidden)
  // takes the gradients that those products are made of. Whole rounds.
  void (*run_steps)(const RnnNetwork<T>& network, const RnnGradients<T>& gradients, int64_t layer, int64_t direction,
                    const Compute<T>* grad_output, Compute<T>* gates, int64_t first, int64_t last, Member& member,
                    RnnScratch<Compute<T>> scratch);
  // Their other factors, of the steps [first, last): the layer's input (rows, input_size), dropout included, and h of
  // the step before (rows, hidden).
  void (*gather)(const RnnNetwork<T>& network, int64_t layer, int64_t direction, int64_t first, int64_t last,
                 Compute<T>* inputs, Compute<T>* previous);
  // The product that is the gradient of the input (rows, input_size), of the steps [first, last), through the dropout:
  // to grad_below (rows, width()), or from the first layer to `gradients`. The second direction adds to what is there.
  void (*pass_down)(const RnnNetwork<T>& network, const RnnGradients<T>& gradients, int64_t layer, int64_t direction,
                    int64_t first, int64_t last, const Compute<T>* product, Compute<T>* grad_below);
};

using RnnForwardTable = PerDtype<RnnForwardKernels>;
using RnnBackwardTable = PerDtype<RnnBackwardKernels>;

}  // namespace fastnn

FASTNN_DECLARE_KERNELS(RnnForwardTable, rnn_forward_kernels)
FASTNN_DECLARE_KERNELS(RnnBackwardTable, rnn_backward_kernels)
