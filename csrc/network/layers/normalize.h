// batch_norm by known statistics, softmax, layer_norm and group_norm.
#pragma once

#include "../../kernels/batch_norm.h"
#include "../fold.h"
#include "elementwise.h"

namespace fastnn {

// Batch norm in inference: a factor and an addend for each channel, which every call computes from the statistics.
template <class T>
class BatchNormLayer : public Layer<T> {
 public:
  BatchNormLayer(const ProgramLine& line, const Weights<T>& weights)
      : dims_(line.integer("dims", 1, 3)), norm_(line, weights), activation_(line.activation()) {
    this->inputs = {line.input("input")};
    if (line.flag("trains")) line.refuse("a network that is not trained takes no statistics");
    for (const char* const name : {"pool", "pool_stride"}) {
      for (const int64_t size : line.integers(name, 1, kMostSize)) {
        if (size != 1) line.refuse("a pool is a layer of its own here");
      }
    }
  }
  FormatRule formats() const override { return FormatRule::alike; }
  void set_sizes(Site<T>& site) const override {
    const Ints& sizes = site.sizes(0);
    const int64_t rank = static_cast<int64_t>(sizes.size());
    FASTNN_CHECK(rank == dims_ + 2 || (rank == 2 && dims_ == 1), "expected ", dims_ + 2, "D input (got ", rank,
                 "D input)");
    FASTNN_CHECK(sizes[1] == norm_.channels(), "expected ", norm_.channels(), " channels, got size ", to_string(sizes));
    site.outputs[0].sizes = sizes;
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType &input = call.site.inputs[0], &output = call.site.outputs[0];
    const size_t rank = output.sizes.size();
    const Scratch<T> numbers(2 * norm_.channels());
    T *const scale = numbers.get(), *const shift = scale + norm_.channels(), *const to = call.output(0);
    norm_.compute(scale, shift);
    Ints each(rank, 0);
    each[1] = output.sizes[1] == 1 ? 0 : 1;
    const Ints from_strides = input.strides(), to_strides = output.strides();
    const std::vector<size_t> order = memory_order(rank, output.channels_last());
    const Ints& sizes = output.sizes;
    combine_arrays<T>(BinaryKind::mul, {call.input(0), from_strides}, {scale, each}, kIdentity, to, to_strides, sizes,
                      order);
    combine_arrays<T>(BinaryKind::add, {to, to_strides}, {shift, each}, activation_, to, to_strides, sizes, order);
  }

 private:
  int64_t dims_;
  KnownNorm<T> norm_;
  Activation activation_;
};

constexpr double kSoftmaxWork = 30;  // floating-point operations an element

// Calls of_rows(first element, rows, elements of a row), or of_columns(first element, elements of a column, columns,
// step), for parts of a contiguous array whose dimension d is that of a softmax, in parallel.
template <class OfRows, class OfColumns>
void for_parts_of_softmax(const Ints& sizes, size_t d, const OfRows& of_rows, const OfColumns& of_columns) {
  const int64_t count = sizes[d], outer = product(sizes, 0, d), inner = product(sizes, d + 1, sizes.size());
  const double work = kSoftmaxWork * static_cast<double>(count);
  if (inner == 1) {
    return parallel_range(outer, work,
                          [&](int64_t first, int64_t last) { of_rows(first * count, last - first, count); });
  }
  constexpr int64_t some = 256;  // columns of a part
  const int64_t parts = planner::divide_up(inner, some);
  parallel_range(outer * parts, work * static_cast<double>(std::min(inner, some)), [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t column = part % parts * some;
      of_columns(part / parts * count * inner + column, count, std::min(some, inner - column), inner);
    }
  });
}

// Softmax, or its logarithm, along dimension d of a contiguous array.
template <class T>
void compute_softmax(const T* from, const Ints& sizes, size_t d, bool logarithm, T* to) {
  const auto& kernels = elementwise_kernels().get<T>();
  for_parts_of_softmax(
      sizes, d,
      [&](int64_t at, int64_t rows, int64_t count) {
        kernels.softmax_rows(from + at, rows, count, logarithm, to + at);
      },
      [&](int64_t at, int64_t rows, int64_t columns, int64_t step) {
        kernels.softmax_columns(from + at, rows, columns, step, logarithm, to + at);
      });
}

template <class T>
class SoftmaxLayer : public Layer<T> {
 public:
  SoftmaxLayer(const ProgramLine& line, const Weights<T>&)
      : line_(line), dim_(line.integer("dim", -16, 15)), logarithm_(line.flag("logarithm")) {
    this->inputs = {line.input("input")};
  }
  void set_sizes(Site<T>& site) const override {
    FASTNN_CHECK(!site.sizes(0).empty(), "softmax of a value without dimensions");
    dimension_of(line_, dim_, site.sizes(0).size());
    site.outputs[0].sizes = site.sizes(0);
  }
  void run(const LayerCall<T>& call) const override {
    const Ints& sizes = call.site.sizes(0);
    compute_softmax(call.input(0), sizes, dimension_of(line_, dim_, sizes.size()), logarithm_, call.output(0));
  }

 private:
  ProgramLine line_;
  int64_t dim_;
  bool logarithm_;
};

template <class T>
class LayerNormLayer : public Layer<T> {
 public:
  LayerNormLayer(const ProgramLine& line, const Weights<T>& weights) : epsilon_(line.real("epsilon")) {
    this->inputs = {line.input("input")};
    features_ = line.integer("features", 1, int64_t{1} << 40);
    weight_ = of_features(line, weights, "weight");
    bias_ = of_features(line, weights, "bias");
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
  const T* of_features(const ProgramLine& line, const Weights<T>& weights, const char* name) const {
    if (!line.has(name)) return nullptr;
    const auto& weight = weights.of(line, name);
    if (product(weight.sizes, 0, weight.sizes.size()) != features_) {
      line.refuse("expected its ", name, " to have ", features_, " elements, got size ", to_string(weight.sizes));
    }
    return weight.data;
  }

  double epsilon_;
  int64_t features_;
  const T *weight_, *bias_;
};

// Normalizes each group of an image's channels by its own mean and variance. With groups=0 each channel is a group, as
// of an instance norm. dims: how many dimensions an image has; 0: any number.
template <class T>
class GroupNormLayer : public Layer<T> {
 public:
  GroupNormLayer(const ProgramLine& line, const Weights<T>& weights)
      : groups_(line.integer("groups", 0, kMostSize)),
        dims_(line.integer("dims", 0, 3)),
        epsilon_(line.real("epsilon")),
        activation_(line.activation()) {
    this->inputs = {line.input("input")};
    weight_ = of_channels(line, weights, "weight");
    bias_ = of_channels(line, weights, "bias");
  }
  void set_sizes(Site<T>& site) const override {
    const Ints& sizes = site.sizes(0);
    check_sizes(sizes, groups_, dims_);
    FASTNN_CHECK(channels_ == -1 || channels_ == sizes[1], "expected ", channels_, " channels, got size ",
                 to_string(sizes));
    site.outputs[0].sizes = sizes;
  }
  // Raises unless images of these sizes can be normalized so.
  static void check_sizes(const Ints& sizes, int64_t groups, int64_t dims) {
    FASTNN_CHECK(dims == 0 ? sizes.size() >= 2 : sizes.size() == static_cast<size_t>(dims) + 2, "expected ",
                 dims == 0 ? "at least 2" : std::to_string(dims + 2), " dimensions, got size ", to_string(sizes));
    FASTNN_CHECK(groups == 0 || sizes[1] % groups == 0,
                 "Expected number of channels in input to be divisible by num_groups, but got input of shape ",
                 to_string(sizes), " and num_groups=", groups);
    FASTNN_CHECK(groups != 0 || product(sizes, 2, sizes.size()) != 1,
                 "Expected more than 1 spatial element when training, got input size ", to_string(sizes));
  }
  void run(const LayerCall<T>& call) const override {
    const auto& kernels = batch_norm_kernels().get<T>();
    const Ints& sizes = call.site.sizes(0);
    const int64_t groups = groups_ == 0 ? sizes[1] : groups_, channels = sizes[1] / groups;  // of a group
    const int64_t pixels = product(sizes, 2, sizes.size()), count = channels * pixels;
    const Activation in_pass = only_bounds(activation_) ? activation_ : kIdentity;
    parallel_range(sizes[0] * groups, 6.0 * static_cast<double>(count), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T* const from = call.input(0) + i * count;
        T* const to = call.output(0) + i * count;
        double sums[2] = {0, 0};  // of x - center and of its square, with the first element as the center
        kernels.add_moments(from, count, from[0], sums);
        const double many = static_cast<double>(count), offset = sums[0] / many;
        const double mean = static_cast<double>(from[0]) + offset;
        double variance = std::max(0.0, sums[1] / many - offset * offset);
        if (sizeof(T) == sizeof(double)) {  // The difference above has lost digits that a double shows.
          double again[2] = {0, 0};
          kernels.add_moments(from, count, static_cast<T>(mean), again);
          variance = again[1] / many;
        }
        const double inverse = 1 / std::sqrt(variance + epsilon_);
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t channel = i % groups * channels + c;
          const T scale = static_cast<T>(weight_ ? inverse * static_cast<double>(weight_[channel]) : inverse);
          kernels.normalize(from + c * pixels, nullptr, pixels, static_cast<T>(mean), scale,
                            bias_ ? bias_[channel] : T(0), in_pass, to + c * pixels);
        }
      }
    });
    if (!only_bounds(activation_) && activation_.kind != ActivationKind::identity) {
      activate(activation_, call.output(0), call.site.outputs[0].count(), call.output(0));
    }
  }

 private:
  const T* of_channels(const ProgramLine& line, const Weights<T>& weights, const char* name) {
    if (!line.has(name)) return nullptr;
    const auto& weight = weights.of(line, name);
    if (weight.sizes.size() != 1) line.refuse("expected a ", name, " of 1 dimension");
    if (channels_ != -1 && channels_ != weight.sizes[0]) line.refuse("weight and bias differ in size");
    channels_ = weight.sizes[0];
    return weight.data;
  }

  int64_t groups_, dims_, channels_ = -1;  // channels_: of the weight and the bias, if there are such
  double epsilon_;
  Activation activation_;
  const T *weight_ = nullptr, *bias_ = nullptr;
};

inline LayerEntry group_norm_entry() {
  return layer_entry<GroupNormLayer>("group_norm", {"input", "weight?", "bias?"},
                                     {{"groups", "int", nullptr},
                                      {"dims", "int", "0"},
                                      {"epsilon", "float", "1e-05"},
                                      {"activation", "activation", "identity"}});
}
inline LayerEntry batch_norm_entry() {
  return layer_entry<BatchNormLayer>("batch_norm", {"input", "mean?", "variance?", "weight?", "bias?"},
                                     with_activation_and_pool({{"dims", "int", nullptr},
                                                               {"trains", "bool", "1"},
                                                               {"momentum", "float", "0.1"},
                                                               {"epsilon", "float", "1e-05"}}));
}
inline LayerEntry softmax_entry() {
  return layer_entry<SoftmaxLayer>("softmax", {"input"}, {{"logarithm", "bool", "0"}, {"dim", "int", "-1"}});
}
inline LayerEntry layer_norm_entry() {
  return layer_entry<LayerNormLayer>("layer_norm", {"input", "weight?", "bias?"},
                                     {{"features", "int", nullptr}, {"epsilon", "float", "1e-05"}});
}

}  // namespace fastnn
