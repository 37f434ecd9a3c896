// softmax and layer_norm: rows of the last dimension, each by itself.
#pragma once

#include "../array.h"

namespace fastnn {

constexpr double kSoftmaxWork = 30;  // floating-point operations an element

template <class T>
class SoftmaxLayer : public Layer<T> {
 public:
  SoftmaxLayer(const ProgramLine& line, const Weights<T>&) : logarithm_(line.flag("logarithm")) {
    this->inputs = {line.input("input")};
    if (line.integer("dim", -16, 15) != -1) line.refuse("expected its last dimension");
  }
  void set_sizes(Site<T>& site) const override {
    FASTNN_CHECK(!site.sizes(0).empty(), "softmax of a value without dimensions");
    site.outputs[0].sizes = site.sizes(0);
  }
  void run(const LayerCall<T>& call) const override {
    const auto& kernels = elementwise_kernels().get<T>();
    const int64_t count = call.site.sizes(0).back(), rows = call.site.inputs[0].count() / std::max<int64_t>(count, 1);
    parallel_range(rows, kSoftmaxWork * static_cast<double>(count), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        kernels.softmax(call.input(0) + row * count, count, logarithm_, call.output(0) + row * count);
      }
    });
  }

 private:
  bool logarithm_;
};

template <class T>
class LayerNormLayer : public Layer<T> {
 public:
  LayerNormLayer(const ProgramLine& line, const Weights<T>& weights) : epsilon_(line.real("epsilon")) {
    this->inputs = {line.input("input")};
    features_ = line.integer("features", 1, int64_t{1} << 40);
    weight_ = weights.of(line, "weight", Ints{features_});
    bias_ = weights.of(line, "bias", Ints{features_});
  }
  // The features may take several dimensions, the last ones.
  void set_sizes(Site<T>& site) const override {
    const Ints& sizes = site.sizes(0);
    int64_t features = sizes.empty() ? 0 : sizes.back();
    for (size_t d = sizes.size(); d-- > 1 && features < features_;) features = checked_product(features, sizes[d - 1]);
    FASTNN_CHECK(features == features_, "expected ", features_, " features to normalize, got size ", to_string(sizes));
    site.outputs[0].sizes = sizes;
  }
  void run(const LayerCall<T>& call) const override {
    const auto& kernels = elementwise_kernels().get<T>();
    const int64_t rows = call.site.inputs[0].count() / features_;
    parallel_range(rows, 6.0 * static_cast<double>(features_), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        kernels.layer_norm(call.input(0) + row * features_, weight_, bias_, features_, epsilon_,
                           call.output(0) + row * features_);
      }
    });
  }

 private:
  double epsilon_;
  int64_t features_;
  const T *weight_, *bias_;
};

inline LayerEntry softmax_entry() {
  return layer_entry<SoftmaxLayer>("softmax", {"input"}, {{"logarithm", "bool", "0"}, {"dim", "int", "-1"}});
}
inline LayerEntry layer_norm_entry() {
  return layer_entry<LayerNormLayer>("layer_norm", {"input", "weight?", "bias?"},
                                     {{"features", "int", nullptr}, {"epsilon", "float", "1e-05"}});
}

}  // namespace fastnn
