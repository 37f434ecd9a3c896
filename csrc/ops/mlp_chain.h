// The arguments of mlp's operators, checked.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../kernels/mlp.h"
#include "activation_text.h"
#include "tensor.h"

namespace fastnn {

// The most layers of one call. What a call needs for each layer is held without an allocation.
constexpr int64_t kMostLayers = 20;

// One item per layer, or one more, held without an allocation.
template <class T>
class PerLayer {
 public:
  void push_back(const T& item) { items_[size_++] = item; }
  T& operator[](int64_t i) { return items_[i]; }
  const T& operator[](int64_t i) const { return items_[i]; }
  const T& back() const { return items_[size_ - 1]; }
  const T* begin() const { return items_.data(); }
  const T* end() const { return items_.data() + size_; }
  T* data() { return items_.data(); }
  const T* data() const { return items_.data(); }
  int64_t size() const { return size_; }

 private:
  std::array<T, kMostLayers + 1> items_;
  int64_t size_ = 0;
};

// The activations of one call, one per layer, read from their text.
class Activations {
 public:
  Activations(const char* op, const std::string& text) {
    const char *at = text.data(), *const end = at + text.size();
    while (true) {
      FASTNN_CHECK(size_ < kMostLayers, op, ": expected the activations of at most ", kMostLayers, " layers, got \"",
                   text, "\"");
      FASTNN_CHECK(read_activation(at, end, activations_[size_]) && (at == end || *at == '|'), op,
                   ": expected an activation a layer, such as relu|leaky_relu(0.2)|identity, got \"", text, "\"");
      ++size_;
      if (at == end) return;
      ++at;
    }
  }
  size_t size() const { return static_cast<size_t>(size_); }
  const Activation& operator[](int64_t layer) const { return activations_[layer]; }

 private:
  std::array<Activation, kMostLayers> activations_;
  int64_t size_ = 0;
};

struct Chain {
  Expected kind;
  int64_t rows;
  PerLayer<int64_t> widths;  // the input's, then each layer's
  double work = 0;           // floating-point operations of one forward

  int64_t layers() const { return widths.size() - 1; }
  int64_t widest() const { return *std::max_element(widths.begin(), widths.end()); }
  double weights() const {  // elements of all weights
    double count = 0;
    for (int64_t i = 0; i < layers(); ++i) count += static_cast<double>(widths[i]) * static_cast<double>(widths[i + 1]);
    return count;
  }
  int64_t outputs() const { return std::accumulate(widths.begin() + 1, widths.end(), int64_t{0}); }  // of all layers
};

inline Chain check_chain(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                         const Activations& activations) {
  const Expected kind = check_first(input, op, "input");
  FASTNN_CHECK(input.dim() == 2, op, ": expected input to be 2D (rows, features), got ", input.dim(),
               "D tensor instead");
  const size_t layers = activations.size();
  FASTNN_CHECK(weights.size() >= layers, op, ": expected ", layers, " weights, one an activation, got ",
               weights.size());
  Chain chain{kind, input.size(0), {}};
  chain.widths.push_back(input.size(1));
  for (size_t i = 0; i < layers; ++i) {
    check_same_kind(weights[i], kind, "weights");
    const Sizes sizes = weights[i].sizes();
    FASTNN_CHECK(sizes.size() == 2, op, ": expected weights[", i, "] to be 2D (out, in), got ", sizes.size(),
                 "D tensor instead");
    FASTNN_CHECK(sizes[1] == chain.widths.back(), op, ": mat1 and mat2 shapes cannot be multiplied (", chain.rows, "x",
                 chain.widths.back(), " and ", sizes[1], "x", sizes[0], ")");
    chain.widths.push_back(sizes[0]);
    check_product(op, chain.rows, sizes[1], sizes[0]);
    chain.work += 2.0 * chain.rows * chain.widths[i] * chain.widths[i + 1];
  }
  return chain;
}

// The arguments of every forward operator, checked. parameters: the weights, then the biases, or no biases at all.
struct MlpCall {
  Activations activations;
  Chain chain;
  const Tensor& input;
  const std::vector<Tensor>& parameters;

  MlpCall(const char* op, const Tensor& input, const std::vector<Tensor>& parameters, const std::string& text)
      : activations(op, text),
        chain(check_chain(op, input, parameters, activations)),
        input(input),
        parameters(parameters) {
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
};

// Whether what a layer saves for backward is the output itself, which the caller has anyway.
inline bool output_serves(const Chain& chain, int64_t layer, const Activation& activation) {
  return layer + 1 == chain.layers() && !saves_input(activation);
}

struct MlpWanted {
  bool input, weights, biases;
};

// What mlp_backward returns; a gradient that is not wanted is empty.
using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>;

}  // namespace fastnn
