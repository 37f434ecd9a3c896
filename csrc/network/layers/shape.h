// reshape, permute, slice, cat and pad: layers that only move elements.
#pragma once

#include <limits>

#include "../array.h"

namespace fastnn {

// The same elements with other sizes. One size may be -1: it follows from the others.
template <class T>
class ReshapeLayer : public Layer<T> {
 public:
  ReshapeLayer(const ProgramLine& line, const Weights<T>&) {
    this->inputs = {line.input("input")};
    // A size is a number; or a product of numbers and of "value.dimension", which means that dimension of another
    // value. The product may be divided by a number and is then rounded down: "0.1*0.2", "0.-1/2".
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    for (const std::string_view part : line.parts("sizes")) {
      Size size{1, {}, 1};
      const size_t slash = std::min(part.find('/'), part.size());
      if (slash < part.size()) size.divisor = line.to_integer(part.substr(slash + 1), "sizes", 1, kMost);
      const std::vector<std::string_view> factors = ProgramLine::split(part.substr(0, slash), '*');
      if (factors.empty()) line.refuse("expected a size, got \"", std::string(part), "\"");
      for (const std::string_view factor : factors) {
        const size_t dot = factor.find('.');
        if (dot == std::string_view::npos) {
          const int64_t number = line.to_integer(factor, "sizes", -1, kMost);
          if (number < 0 && part.size() != factor.size()) line.refuse("expected -1 by itself");
          size.factor = checked_product(size.factor, number);
          continue;
        }
        const auto found = line.inputs.find("like");
        if (found == line.inputs.end()) line.refuse("expected like=... for sizes of other values");
        const int64_t most = static_cast<int64_t>(found->second.size()) - 1;
        const int64_t which = line.to_integer(factor.substr(0, dot), "sizes", 0, most);
        size.dimensions.emplace_back(1 + which, line.to_integer(factor.substr(dot + 1), "sizes", -16, 15));
      }
      sizes_.push_back(std::move(size));
    }
    if (const auto found = line.inputs.find("like"); found != line.inputs.end()) {
      this->inputs.insert(this->inputs.end(), found->second.begin(), found->second.end());
      this->sizes_only = found->second.size();
    }
  }
  bool is_view(const Site<T>&) const override { return true; }

  void set_sizes(Site<T>& site) const override {
    const int64_t count = site.inputs[0].count();
    Ints& sizes = site.outputs[0].sizes;
    int64_t free = -1;
    for (const Size& size : sizes_) {
      int64_t number = size.factor;
      for (const auto& [which, dimension] : size.dimensions) {
        const Ints& other = site.sizes(static_cast<size_t>(which));
        const int64_t rank = static_cast<int64_t>(other.size());
        FASTNN_CHECK(dimension >= -rank && dimension < rank, "a value of size ", to_string(other), " has no dimension ",
                     dimension);
        number = checked_product(number, other[static_cast<size_t>(dimension < 0 ? dimension + rank : dimension)]);
      }
      number = number < 0 ? number : number / size.divisor;
      if (number < 0) {
        FASTNN_CHECK(free < 0, "only one dimension can be inferred");
        free = static_cast<int64_t>(sizes.size());
      }
      sizes.push_back(number);
    }
    if (free >= 0) {  // from what is there besides dimensions without elements
      int64_t all = 1, others = 1;
      for (const int64_t size : site.sizes(0)) all = checked_product(all, std::max<int64_t>(size, 1));
      for (const int64_t size : sizes) others = checked_product(others, std::max<int64_t>(size, 1));
      int64_t& size = sizes[static_cast<size_t>(free)];
      if (count == 0 && std::find(sizes.begin(), sizes.end(), 0) == sizes.end()) {
        size = 0;
      } else if (all % others == 0) {
        size = all / others;
      }
    }
    int64_t result = 1;
    for (const int64_t size : sizes) result = checked_product(result, std::max<int64_t>(size, 0));
    FASTNN_CHECK(result == count && (free < 0 || sizes[static_cast<size_t>(free)] >= 0), "shape '", to_string(sizes),
                 "' is invalid for input of size ", count);
  }
  void run(const LayerCall<T>&) const override {}

 private:
  struct Size {
    int64_t factor;                                       // -1: it follows from the others
    std::vector<std::pair<int64_t, int64_t>> dimensions;  // numbers of inputs, and of their dimensions
    int64_t divisor;
  };
  std::vector<Size> sizes_;
};

template <class T>
class PermuteLayer : public Layer<T> {
 public:
  PermuteLayer(const ProgramLine& line, const Weights<T>&) {
    this->inputs = {line.input("input")};
    const Ints given = line.integers("dims", 0, 15);
    std::vector<bool> seen(given.size());
    for (const int64_t d : given) {
      if (static_cast<size_t>(d) >= seen.size() || seen[static_cast<size_t>(d)]) line.refuse("dims are no permutation");
      seen[static_cast<size_t>(d)] = true;
      dims_.push_back(static_cast<size_t>(d));
    }
  }
  void set_sizes(Site<T>& site) const override {
    FASTNN_CHECK(site.sizes(0).size() == dims_.size(), "expected ", dims_.size(), " dimensions to permute, got size ",
                 to_string(site.sizes(0)));
    for (const size_t d : dims_) site.outputs[0].sizes.push_back(site.sizes(0)[d]);
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType& output = call.site.outputs[0];
    const Ints own = call.site.inputs[0].strides();
    Ints strides;
    for (const size_t d : dims_) strides.push_back(own[d]);
    copy_array(call.input(0), strides, call.output(0), output.strides(), output.sizes,
               memory_order(dims_.size(), false));
  }

 private:
  std::vector<size_t> dims_;
};

// Elements [start, stop) of a dimension, every step-th. As in Python, numbers below 0 count from the end.
template <class T>
class SliceLayer : public Layer<T> {
 public:
  SliceLayer(const ProgramLine& line, const Weights<T>&) : line_(line) {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    this->inputs = {line.input("input")};
    dim_ = line.integer("dim", -16, 15);
    start_ = line.integer("start", -kMost, kMost);
    stop_ = line.integer("stop", -kMost, kMost);
    step_ = line.integer("step", 1, kMost);
  }
  FormatRule formats() const override { return FormatRule::alike; }
  void set_sizes(Site<T>& site) const override {
    Ints sizes = site.sizes(0);
    int64_t& size = sizes[dimension_of(line_, dim_, sizes.size())];
    const int64_t first = place(start_, size), last = std::max(first, place(stop_, size));
    size = (last - first) / step_ + ((last - first) % step_ != 0);
    site.outputs[0].sizes = sizes;
  }
  double cost(const Site<T>& site) const override {
    return moving_cost<T>(site.outputs[0], dimension_of(line_, dim_, site.outputs[0].sizes.size()));
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType &input = call.site.inputs[0], &output = call.site.outputs[0];
    const size_t d = dimension_of(line_, dim_, input.sizes.size());
    Ints strides = input.strides();
    const T* const from = call.input(0) + place(start_, input.sizes[d]) * strides[d];
    if (output.sizes[d] > 1) strides[d] *= step_;
    copy_array(from, strides, call.output(0), output.strides(), output.sizes,
               memory_order(strides.size(), output.channels_last()));
  }

 private:
  static int64_t place(int64_t at, int64_t size) {
    return std::min(size, std::max<int64_t>(0, at < 0 ? at + size : at));
  }

  ProgramLine line_;
  int64_t dim_, start_, stop_, step_;
};

template <class T>
class CatLayer : public Layer<T> {
 public:
  CatLayer(const ProgramLine& line, const Weights<T>&) : line_(line), dim_(line.integer("dim", -16, 15)) {
    const auto found = line.inputs.find("inputs");
    if (found == line.inputs.end() || found->second.empty()) line.refuse("expected inputs=...");
    this->inputs = found->second;
  }
  FormatRule formats() const override { return FormatRule::alike; }
  bool joins_channels(const Site<T>& site) const override {
    return site.outputs[0].channels_last() && dimension_of(line_, dim_, site.outputs[0].sizes.size()) == 1;
  }
  void set_sizes(Site<T>& site) const override {
    Ints sizes = site.sizes(0);
    const size_t d = dimension_of(line_, dim_, sizes.size());
    for (size_t i = 1; i < site.inputs.size(); ++i) {
      Ints other = site.sizes(i);
      FASTNN_CHECK(other.size() == sizes.size(), "cat: tensors must have the same number of dimensions: got ",
                   sizes.size(), " and ", other.size());
      sizes[d] = checked_sum(sizes[d], other[d]);
      other[d] = sizes[d];
      FASTNN_CHECK(other == sizes, "cat: sizes ", to_string(site.sizes(0)), " and ", to_string(site.sizes(i)),
                   " differ in other dimensions than ", d);
    }
    site.outputs[0].sizes = sizes;
  }
  double cost(const Site<T>& site) const override {
    double cost = 0;
    for (ValueType part : site.inputs) {
      part.format = site.outputs[0].format;
      cost += moving_cost<T>(part, dimension_of(line_, dim_, part.sizes.size()));
    }
    return cost;
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType& output = call.site.outputs[0];
    const size_t d = dimension_of(line_, dim_, output.sizes.size());
    const Ints strides = output.strides();
    T* to = call.output(0);
    for (size_t i = 0; i < call.site.inputs.size(); ++i) {
      const ValueType& input = call.site.inputs[i];
      if (input.pitch == 0) {  // else the layer before has written it to its place
        copy_array(call.input(i), input.strides(), to, strides, input.sizes,
                   memory_order(strides.size(), output.channels_last()));
      }
      to += input.sizes[d] * strides[d];
    }
  }

 private:
  ProgramLine line_;
  int64_t dim_;
};

// A number before and behind the elements of each dimension: `padding` has both counts for each, the last dimension's
// first, as torch has them. Counts below 0 take elements away.
template <class T>
class PadLayer : public Layer<T> {
 public:
  PadLayer(const ProgramLine& line, const Weights<T>&) {
    this->inputs = {line.input("input")};
    padding_ = line.integers("padding", -kMostSize, kMostSize);
    if (padding_.size() % 2) line.refuse("expected two numbers a dimension");
    value_ = static_cast<T>(line.real("value"));
  }
  FormatRule formats() const override { return FormatRule::alike; }
  void set_sizes(Site<T>& site) const override {
    Ints sizes = site.sizes(0);
    FASTNN_CHECK(padding_.size() / 2 <= sizes.size(), "padding of more dimensions than ", sizes.size());
    for (size_t i = 0; i < padding_.size(); i += 2) {
      int64_t& size = sizes[sizes.size() - 1 - i / 2];
      size = checked_sum(size, padding_[i] + padding_[i + 1]);
      FASTNN_CHECK(size >= 0, "padding takes more elements away than there are in ", to_string(site.sizes(0)));
    }
    site.outputs[0].sizes = sizes;
  }
  double cost(const Site<T>& site) const override {
    const size_t rank = site.outputs[0].sizes.size();
    return rank ? moving_cost<T>(site.outputs[0], rank - 1) : 0;
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType &input = call.site.inputs[0], &output = call.site.outputs[0];
    std::fill_n(call.output(0), output.count(), value_);
    const Ints own = input.strides(), strides = output.strides();
    Ints sizes = input.sizes;
    const T* from = call.input(0);
    T* to = call.output(0);
    for (size_t i = 0; i < padding_.size(); i += 2) {
      const size_t d = sizes.size() - 1 - i / 2;
      from += std::max<int64_t>(0, -padding_[i]) * own[d];
      to += std::max<int64_t>(0, padding_[i]) * strides[d];
      sizes[d] += std::min<int64_t>(0, padding_[i]) + std::min<int64_t>(0, padding_[i + 1]);
      if (sizes[d] <= 0) return;
    }
    copy_array(from, own, to, strides, sizes, memory_order(sizes.size(), output.channels_last()));
  }

 private:
  Ints padding_;
  T value_;
};

inline LayerEntry reshape_entry() {
  return layer_entry<ReshapeLayer>("reshape", {"input", "like*"}, {{"sizes", "ints", ""}});
}
inline LayerEntry permute_entry() {
  return layer_entry<PermuteLayer>("permute", {"input"}, {{"dims", "ints", nullptr}});
}
inline LayerEntry slice_entry() {
  return layer_entry<SliceLayer>(
      "slice", {"input"},
      {{"dim", "int", nullptr}, {"start", "int", "0"}, {"stop", "int", "9223372036854775807"}, {"step", "int", "1"}});
}
inline LayerEntry cat_entry() {
  return layer_entry<CatLayer>("cat", {"inputs*"}, {{"dim", "int", "0"}});
}
inline LayerEntry pad_entry() {
  return layer_entry<PadLayer>("pad", {"input"}, {{"padding", "ints", nullptr}, {"value", "float", "0"}});
}

}  // namespace fastnn
