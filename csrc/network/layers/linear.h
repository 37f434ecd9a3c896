// linear: a linear layer over the last dimension, with its activation. Layers that follow one another run as a chain:
// a block of rows goes through all of them while it is in cache.
#pragma once

#include "packed_layers.h"

namespace fastnn {

template <class T>
class LinearLayer : public Layer<T> {
 public:
  LinearLayer(const ProgramLine& line, const Weights<T>& weights) {
    this->inputs = {line.input("input")};
    const auto& weight = weights.of(line, "weight");
    if (weight.sizes.size() != 2) line.refuse("expected a weight of 2 dimensions");
    const int64_t out = weight.sizes[0], in = weight.sizes[1];
    const T* const bias = weights.of(line, "bias", Ints{out});
    layers_.push_back({weight.data, bias, in, out, line.activation(), nullptr, nullptr});
    count();
  }

  bool absorb(const Layer<T>& other) override {
    const auto* const next = dynamic_cast<const LinearLayer*>(&other);
    if (!next || next->layers_[0].in != layers_.back().out) return false;
    layers_.insert(layers_.end(), next->layers_.begin(), next->layers_.end());
    count();
    return true;
  }

  void set_sizes(Site<T>& site) const override {
    const Ints& input = site.sizes(0);
    FASTNN_CHECK(!input.empty() && input.back() == layers_[0].in, "expected a layer's input to have ", layers_[0].in,
                 " features, got size ", to_string(input));
    site.outputs[0].sizes = input;
    site.outputs[0].sizes.back() = layers_.back().out;
  }

  void pack(const Site<T>& site, PackedWriter& packed) const override {
    const MlpKernels<T>& kernels = *site.kernels.mlp;
    for (const MlpLayer<T>& layer : layers_) {
      T* to = packed.give<T>(0, kernels.packed_size(layer.out, layer.in));
      if (to) kernels.pack(layer.weight, layer.out, layer.in, 0, 1, to);
    }
  }

  void run(const LayerCall<T>& call) const override {
    const MlpKernels<T>& kernels = *call.site.kernels.mlp;
    std::vector<MlpLayer<T>> layers = layers_;
    const int64_t rows = product(call.site.sizes(0), 0, call.site.sizes(0).size() - 1);
    const PackedLayers<T> packed(kernels, layers.data(), layers.size(), rows, 0, call.packed);
    const int64_t chunks = std::min(useful_threads(work_ * static_cast<double>(rows)), rows);
    const int64_t scratch_size = kernels.scratch_size(widest_);
    const Scratch<T> scratch(checked_product(chunks, scratch_size));
    parallel_chunks(chunks, rows, [&](int64_t chunk, int64_t first, int64_t last) {
      kernels.forward(layers.data(), static_cast<int64_t>(layers.size()), false, call.input(0), call.output(0), first,
                      last, scratch.get() + chunk * scratch_size);
    });
  }

 private:
  void count() {
    widest_ = layers_[0].in;
    work_ = 0;
    for (const MlpLayer<T>& layer : layers_) {
      widest_ = std::max(widest_, layer.out);
      work_ += 2.0 * static_cast<double>(layer.in) * static_cast<double>(layer.out);
    }
  }

  std::vector<MlpLayer<T>> layers_;
  int64_t widest_ = 0;  // columns of the input or of a layer's output
  double work_ = 0;     // floating-point operations a row
};

inline LayerEntry linear_entry() {
  return layer_entry<LinearLayer>("linear", {"input", "weight", "bias?"}, {{"activation", "activation", "identity"}});
}

}  // namespace fastnn
