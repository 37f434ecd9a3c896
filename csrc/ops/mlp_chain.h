// The arguments of mlp's operators, checked.
#pragma once

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../kernels/mlp.h"
#include "tensor.h"

namespace fastnn {

struct Chain {
  Expected kind;
  int64_t rows;
  std::vector<int64_t> widths;  // the input's, then each layer's
  double work = 0;              // floating-point operations of one forward

  int64_t layers() const { return static_cast<int64_t>(widths.size()) - 1; }
  int64_t widest() const { return *std::max_element(widths.begin(), widths.end()); }
  double weights() const {  // elements of all
    double count = 0;
    for (int64_t i = 0; i < layers(); ++i) count += static_cast<double>(widths[i]) * static_cast<double>(widths[i + 1]);
    return count;
  }
  int64_t outputs() const { return std::accumulate(widths.begin() + 1, widths.end(), int64_t{0}); }  // of all layers
};

// Operators take activations as a string, a digit a layer: the dispatcher passes a list of numbers 0.1 us slower.
inline Activation activation_of(char digit) {
  return static_cast<Activation>(digit - '0');
}

inline Chain check_chain(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                         const std::string& activations) {
  const Expected kind = check_first(input, op, "input");
  FASTNN_CHECK(input.dim() == 2, op, ": expected input to be 2D (rows, features), got ", input.dim(),
               "D tensor instead");
  const size_t layers = activations.size();
  FASTNN_CHECK(layers > 0, op, ": expected at least one layer");
  FASTNN_CHECK(weights.size() >= layers, op, ": expected ", layers, " weights, one an activation, got ",
               weights.size());
  Chain chain{kind, input.size(0), {}};
  chain.widths.reserve(layers + 1);
  chain.widths.push_back(input.size(1));
  for (size_t i = 0; i < layers; ++i) {
    check_same_kind(weights[i], kind, "weights");
    const Sizes sizes = weights[i].sizes();
    FASTNN_CHECK(sizes.size() == 2, op, ": expected weights[", i, "] to be 2D (out, in), got ", sizes.size(),
                 "D tensor instead");
    FASTNN_CHECK(sizes[1] == chain.widths.back(), op, ": mat1 and mat2 shapes cannot be multiplied (", chain.rows, "x",
                 chain.widths.back(), " and ", sizes[1], "x", sizes[0], ")");
    const char first = '0', last = '0' + static_cast<char>(Activation::count) - 1;
    FASTNN_CHECK(activations[i] >= first && activations[i] <= last, op, ": activations must be digits from ", first,
                 " to ", last, ", got \"", activations, "\"");
    chain.widths.push_back(sizes[0]);
    chain.work += 2.0 * chain.rows * chain.widths[i] * chain.widths[i + 1];
  }
  return chain;
}

// The arguments of every forward operator, checked. parameters: the weights, then the biases, or no biases at all.
struct Forward {
  Chain chain;
  const Tensor& input;
  const std::vector<Tensor>& parameters;
  const std::string& activations;

  Forward(const char* op, const Tensor& input, const std::vector<Tensor>& parameters, const std::string& activations)
      : chain(check_chain(op, input, parameters, activations)),
        input(input),
        parameters(parameters),
        activations(activations) {
    const size_t layers = activations.size();
    FASTNN_CHECK(parameters.size() == layers || parameters.size() == 2 * layers, op, ": expected ", layers,
                 " weights and ", layers, " or no biases, got ", parameters.size(), " parameters");
    for (size_t i = layers; i < parameters.size(); ++i) {
      check_same_kind(parameters[i], chain.kind, "biases");
      check_sizes(parameters[i], {chain.widths[i - layers + 1]}, op, "biases");
    }
  }

  bool has_biases() const { return parameters.size() > activations.size(); }
  const Tensor& weight(int64_t layer) const { return parameters[layer]; }
  const Tensor& bias(int64_t layer) const { return parameters[activations.size() + layer]; }
  Activation activation(int64_t layer) const { return activation_of(activations[layer]); }
};

// The layers whose `saved` is the output itself, which is at hand anyway.
inline bool output_serves(const Chain& chain, int64_t layer, Activation activation) {
  return layer + 1 == chain.layers() && !keeps_input(activation);
}

struct Wanted {
  bool input, weights, biases;
};

// What mlp_backward returns; a gradient that is not wanted is empty.
using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>;

}  // namespace fastnn
