// fold: a convolution's weights with the batch norm behind it, computed anew at every call, because a model's
// parameters may change between two calls in ways that nothing notes.
#pragma once

#include <cmath>

#include "../ops/product.h"
#include "layer.h"

namespace fastnn {

// A batch norm whose statistics are known: y = x * scale + shift for each channel.
template <class T>
class KnownNorm {
 public:
  KnownNorm(const ProgramLine& line, const Weights<T>& weights) : epsilon_(line.real("epsilon")) {
    const auto& mean = weights.of(line, "mean");
    if (mean.sizes.size() != 1) line.refuse("expected a mean of 1 dimension");
    channels_ = mean.sizes[0];
    mean_ = mean.data;
    variance_ = weights.of(line, "variance", mean.sizes);
    if (!variance_) line.refuse("expected its variance");
    weight_ = weights.of(line, "weight", mean.sizes);
    bias_ = weights.of(line, "bias", mean.sizes);
  }
  int64_t channels() const { return channels_; }
  void compute(T* scale, T* shift) const {
    for (int64_t c = 0; c < channels_; ++c) {
      const T inverse = T(1) / std::sqrt(variance_[c] + static_cast<T>(epsilon_));
      scale[c] = weight_ ? inverse * weight_[c] : inverse;
      shift[c] = (bias_ ? bias_[c] : T(0)) - mean_[c] * scale[c];
    }
  }

 private:
  double epsilon_;
  int64_t channels_;
  const T *mean_, *variance_, *weight_, *bias_;
};

// A line that gives a convolution's weight and bias which include the norm behind the convolution.
template <class T>
class Fold {
 public:
  // Adds the line's two results to the weights. They have values after `run`.
  Fold(const ProgramLine& line, Weights<T>& weights)
      : line_(line.number), norm_(line, weights), transposed_(line.flag("transposed")) {
    if (line.outputs.size() != 2) line.refuse("expected to give a weight and a bias");
    const auto& weight = weights.of(line, "conv_weight");
    sizes_ = weight.sizes;
    from_ = weight.data;
    groups_ = line.integer("groups", 1, kMostSize);
    if (sizes_.size() < 3) line.refuse("expected a convolution's weight");
    const int64_t outputs = transposed_ ? checked_product(sizes_[1], groups_) : sizes_[0];
    if (outputs != norm_.channels() || sizes_[0] % groups_ != 0) {
      line.refuse("a norm of ", norm_.channels(), " channels does not fit a weight of size ", to_string(sizes_));
    }
    bias_ = weights.of(line, "conv_bias", Ints{norm_.channels()});
    const int64_t count = product(sizes_, 0, sizes_.size());
    weight_memory_.reset(new T[static_cast<size_t>(count)]);
    norm_memory_.reset(new T[static_cast<size_t>(checked_product(2, norm_.channels()))]);
    weights.add(line.outputs[0], weight_memory_.get(), sizes_);
    weights.add(line.outputs[1], norm_memory_.get() + norm_.channels(), {norm_.channels()});
  }

  int64_t line() const { return line_; }  // its number in the program
  int64_t bytes() const { return (product(sizes_, 0, sizes_.size()) + 2 * norm_.channels()) * int64_t{sizeof(T)}; }
  void run() {
    T *const scale = norm_memory_.get(), *const shift = scale + norm_.channels();
    norm_.compute(scale, shift);
    for (int64_t c = 0; bias_ && c < norm_.channels(); ++c) shift[c] += bias_[c] * scale[c];
    const int64_t inner = product(sizes_, transposed_ ? 2 : 1, sizes_.size());  // elements with one factor
    const int64_t outputs = transposed_ ? sizes_[1] : 1, of_group = sizes_[0] / groups_;
    parallel_range(sizes_[0] * outputs, static_cast<double>(inner), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T factor = scale[transposed_ ? i / outputs / of_group * outputs + i % outputs : i];
        const T* const from = from_ + i * inner;
        T* const to = weight_memory_.get() + i * inner;
        for (int64_t k = 0; k < inner; ++k) to[k] = from[k] * factor;
      }
    });
  }

 private:
  int64_t line_;
  KnownNorm<T> norm_;
  bool transposed_;
  int64_t groups_;
  Ints sizes_;
  const T *from_, *bias_;
  std::unique_ptr<T[]> weight_memory_, norm_memory_;
};

inline LayerEntry fold_entry() {
  return {
      "fold",
      {"conv_weight", "conv_bias?", "mean", "variance", "weight?", "bias?"},
      {{"epsilon", "float", "1e-05"}, {"transposed", "bool", "0"}, {"groups", "int", "1"}, {nullptr, nullptr, nullptr}},
      nullptr,
      nullptr};
}

}  // namespace fastnn
