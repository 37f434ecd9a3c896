// Layers that only move elements: views, permutations, parts of a value, repeated and joined values, and padding.
#pragma once

#include <limits>

#include "../array.h"

namespace fastnn {

constexpr int64_t kFar = int64_t{1} << 40;  // beyond every index and every shift that a line may name

// The sizes that a line asks for. A size is a number; or a product of numbers and of "value.dimension", which means
// that dimension of one of the line's values `like`. The product may be divided by a number and is then rounded down:
// "0.1*0.2", "0.-1/2". A size may be -1; what that means, the layer says. A line that names one value `like`, and no
// sizes, asks for the sizes of that value.
class AskedSizes {
 public:
  // Sets a layer's inputs: those of these names, then the values `like`.
  AskedSizes(const ProgramLine& line, std::initializer_list<const char*> names, std::vector<int64_t>& inputs) {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    for (const char* const name : names) inputs.push_back(line.input(name));
    const auto found = line.inputs.find("like");
    before_ = inputs.size();
    if (found != line.inputs.end()) {
      like_ = found->second.size();
      inputs.insert(inputs.end(), found->second.begin(), found->second.end());
    }
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
        if (like_ == 0) line.refuse("expected like=... for sizes of other values");
        const int64_t which = line.to_integer(factor.substr(0, dot), "sizes", 0, static_cast<int64_t>(like_) - 1);
        size.dimensions.emplace_back(before_ + static_cast<size_t>(which),
                                     line.to_integer(factor.substr(dot + 1), "sizes", -16, 15));
      }
      sizes_.push_back(std::move(size));
    }
  }
  size_t like() const { return like_; }  // how many values
  size_t count() const { return sizes_.size(); }
  // Whether the sizes are those of the value `like`.
  bool are_another_values() const { return sizes_.empty() && like_ == 1; }

  template <class T>
  Ints of(const Site<T>& site) const {
    if (are_another_values()) return site.sizes(before_);
    Ints sizes;
    for (const Size& size : sizes_) {
      int64_t number = size.factor;
      for (const auto& [which, dimension] : size.dimensions) {
        const Ints& other = site.sizes(which);
        const int64_t rank = static_cast<int64_t>(other.size());
        FASTNN_CHECK(dimension >= -rank && dimension < rank, "a value of size ", to_string(other), " has no dimension ",
                     dimension);
        number = checked_product(number, other[static_cast<size_t>(dimension < 0 ? dimension + rank : dimension)]);
      }
      sizes.push_back(number < 0 ? number : number / size.divisor);
    }
    return sizes;
  }

 private:
  struct Size {
    int64_t factor;                                      // or -1
    std::vector<std::pair<size_t, int64_t>> dimensions;  // numbers of inputs, and of their dimensions
    int64_t divisor;
  };
  std::vector<Size> sizes_;
  size_t before_ = 0, like_ = 0;  // how many inputs come before the values `like`, and how many those are
};

// The same elements with other sizes. One size may be -1: it follows from the others.
template <class T>
class ReshapeLayer : public Layer<T> {
 public:
  ReshapeLayer(const ProgramLine& line, const Weights<T>&) : asked_(line, {"input"}, this->inputs) {
    this->sizes_only = asked_.like();
  }
  bool is_view(const Site<T>&) const override { return true; }

  void set_sizes(Site<T>& site) const override {
    const int64_t count = site.inputs[0].count();
    Ints& sizes = site.outputs[0].sizes;
    sizes = asked_.of(site);
    FASTNN_CHECK(std::count(sizes.begin(), sizes.end(), -1) <= 1, "only one dimension can be inferred");
    const auto free = std::find(sizes.begin(), sizes.end(), -1);
    if (free != sizes.end()) {  // from what is there besides dimensions without elements
      int64_t all = 1, others = 1;
      for (const int64_t size : site.sizes(0)) all = checked_product(all, std::max<int64_t>(size, 1));
      for (const int64_t size : sizes) others = checked_product(others, std::max<int64_t>(size, 1));
      if (count == 0 && std::find(sizes.begin(), sizes.end(), 0) == sizes.end()) {
        *free = 0;
      } else if (all % others == 0) {
        *free = all / others;
      }
    }
    int64_t result = 1;
    for (const int64_t size : sizes) result = checked_product(result, std::max<int64_t>(size, 0));
    FASTNN_CHECK(result == count && (free == sizes.end() || *free >= 0), "shape '", to_string(sizes),
                 "' is invalid for input of size ", count);
  }
  void run(const LayerCall<T>&) const override {}

 private:
  AskedSizes asked_;
};

// The elements, repeated along dimensions that have one element. A size of -1 leaves the dimension as it is.
template <class T>
class ExpandLayer : public Layer<T> {
 public:
  ExpandLayer(const ProgramLine& line, const Weights<T>&) : asked_(line, {"input"}, this->inputs) {
    this->sizes_only = asked_.like();
  }
  FormatRule formats() const override { return FormatRule::each; }
  bool reads_parts() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    const Ints& own = site.sizes(0);
    Ints sizes = asked_.of(site);
    FASTNN_CHECK(sizes.size() >= own.size(), "expand: the number of sizes provided (", sizes.size(),
                 ") must be greater or equal to the number of dimensions in the tensor (", own.size(), ")");
    const size_t ahead = sizes.size() - own.size();
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == -1 && d >= ahead) sizes[d] = own[d - ahead];
      FASTNN_CHECK(sizes[d] >= 0 && (d < ahead || own[d - ahead] == 1 || own[d - ahead] == sizes[d]),
                   "The expanded size of the tensor (", sizes[d], ") must match the existing size at dimension ", d);
    }
    site.outputs[0].sizes = sizes;
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType& output = call.site.outputs[0];
    const size_t rank = output.sizes.size();
    copy_array(call.input(0), broadcast_strides(call.site.inputs[0], rank), call.output(0), output.strides(),
               output.sizes, memory_order(rank, output.channels_last()));
  }

 private:
  AskedSizes asked_;
};

// The elements, as often along each dimension as `sizes` says, which may have more dimensions than the input.
template <class T>
class RepeatLayer : public Layer<T> {
 public:
  RepeatLayer(const ProgramLine& line, const Weights<T>&) : asked_(line, {"input"}, this->inputs) {
    this->sizes_only = asked_.like();
  }
  bool reads_parts() const override { return true; }
  // How often, and how many elements are repeated, along each dimension.
  std::array<Ints, 2> times_and_sizes(const Site<T>& site) const {
    const Ints& own = site.sizes(0);
    const Ints times = asked_.of(site);
    FASTNN_CHECK(times.size() >= own.size(),
                 "Number of dimensions of repeat dims can not be smaller than number of dimensions of tensor");
    for (const int64_t time : times) FASTNN_CHECK(time >= 0, "Trying to create tensor with negative dimension ", time);
    Ints sizes(times.size() - own.size(), 1);
    sizes.insert(sizes.end(), own.begin(), own.end());
    return {times, sizes};
  }
  void set_sizes(Site<T>& site) const override {
    const auto [times, sizes] = times_and_sizes(site);
    for (size_t d = 0; d < sizes.size(); ++d) site.outputs[0].sizes.push_back(checked_product(times[d], sizes[d]));
  }
  void run(const LayerCall<T>& call) const override {
    const auto [times, sizes] = times_and_sizes(call.site);
    const Ints from = broadcast_strides(call.site.inputs[0], sizes.size()), to = call.site.outputs[0].strides();
    Ints all, from_strides, to_strides;  // two for each dimension: how often it is repeated, and its elements
    for (size_t d = 0; d < sizes.size(); ++d) {
      all.insert(all.end(), {times[d], sizes[d]});
      from_strides.insert(from_strides.end(), {0, from[d]});
      to_strides.insert(to_strides.end(), {to[d] * sizes[d], to[d]});
    }
    copy_array(call.input(0), from_strides, call.output(0), to_strides, all, memory_order(all.size(), false));
  }

 private:
  AskedSizes asked_;
};

// As many times one number as a tensor of these sizes has elements.
template <class T>
class FullLayer : public Layer<T> {
 public:
  FullLayer(const ProgramLine& line, const Weights<T>&)
      : asked_(line, {}, this->inputs), value_(static_cast<T>(line.real("value"))) {
    this->sizes_only = asked_.like();
  }
  FormatRule formats() const override { return FormatRule::alike; }
  void set_sizes(Site<T>& site) const override {
    site.outputs[0].sizes = asked_.of(site);
    for (const int64_t size : site.outputs[0].sizes) {
      FASTNN_CHECK(size >= 0, "Trying to create tensor with negative dimension ", size);
    }
  }
  T value() const { return value_; }
  bool is_like_another_value() const { return asked_.are_another_values(); }
  void run(const LayerCall<T>& call) const override {
    std::fill_n(call.output(0), call.site.outputs[0].count(), value_);
  }

 private:
  AskedSizes asked_;
  T value_;
};

// A power of a size, as a number without dimensions.
template <class T>
class SizeLayer : public Layer<T> {
 public:
  SizeLayer(const ProgramLine& line, const Weights<T>&) : asked_(line, {}, this->inputs), power_(line.real("power")) {
    this->sizes_only = asked_.like();
    if (asked_.count() != 1) line.refuse("expected one size");
  }
  void set_sizes(Site<T>& site) const override { site.outputs[0].sizes.clear(); }
  T value(const Site<T>& site) const {
    const int64_t size = asked_.of(site)[0];
    FASTNN_CHECK(size != 0 || power_ >= 0, "0 cannot be raised to a negative power");
    return static_cast<T>(std::pow(static_cast<double>(size), power_));
  }
  void run(const LayerCall<T>& call) const override { call.output(0)[0] = value(call.site); }

 private:
  AskedSizes asked_;
  double power_;
};

// All dimensions from one to another become one.
template <class T>
class FlattenLayer : public Layer<T> {
 public:
  FlattenLayer(const ProgramLine& line, const Weights<T>&)
      : line_(line), start_(line.integer("start_dim", -16, 15)), end_(line.integer("end_dim", -16, 15)) {
    this->inputs = {line.input("input")};
  }
  bool is_view(const Site<T>&) const override { return true; }
  void set_sizes(Site<T>& site) const override {
    const Ints& sizes = site.sizes(0);
    Ints& result = site.outputs[0].sizes;
    if (sizes.empty()) return result.push_back(1);
    const size_t first = dimension_of(line_, start_, sizes.size()), last = dimension_of(line_, end_, sizes.size());
    FASTNN_CHECK(first <= last, "flatten() has invalid args: start_dim cannot come after end_dim");
    result.assign(sizes.begin(), sizes.begin() + static_cast<ptrdiff_t>(first));
    result.push_back(product(sizes, first, last + 1));
    result.insert(result.end(), sizes.begin() + static_cast<ptrdiff_t>(last) + 1, sizes.end());
  }
  void run(const LayerCall<T>&) const override {}

 private:
  ProgramLine line_;
  int64_t start_, end_;
};

// One dimension becomes several, of which one size may be -1: it follows from the others.
template <class T>
class UnflattenLayer : public Layer<T> {
 public:
  UnflattenLayer(const ProgramLine& line, const Weights<T>&)
      : line_(line), dim_(line.integer("dim", -16, 15)), sizes_(line.integers("sizes", -1, int64_t{1} << 40)) {
    this->inputs = {line.input("input")};
    if (sizes_.empty()) line.refuse("expected sizes");
  }
  bool is_view(const Site<T>&) const override { return true; }
  void set_sizes(Site<T>& site) const override {
    const Ints& sizes = site.sizes(0);
    Ints& result = site.outputs[0].sizes;
    const size_t at = dimension_of(line_, dim_, sizes.size());
    Ints parts = sizes_;
    const int64_t free = std::count(parts.begin(), parts.end(), -1);
    int64_t known = 1;  // the product of the sizes that are given
    for (const int64_t part : parts) {
      if (part != -1) known = checked_product(known, part);
    }
    FASTNN_CHECK(free <= 1, "unflatten: only one dimension can be inferred");
    if (free == 1 && known > 0) *std::find(parts.begin(), parts.end(), -1) = sizes[at] / known;
    const bool fits = free == 1 ? known > 0 && sizes[at] % known == 0 : known == sizes[at];
    FASTNN_CHECK(fits, "unflatten: Provided sizes ", to_string(sizes_), " don't multiply up to the size of dim ", dim_,
                 " (", sizes[at], ") in the input tensor");
    result.assign(sizes.begin(), sizes.begin() + static_cast<ptrdiff_t>(at));
    result.insert(result.end(), parts.begin(), parts.end());
    result.insert(result.end(), sizes.begin() + static_cast<ptrdiff_t>(at) + 1, sizes.end());
  }
  void run(const LayerCall<T>&) const override {}

 private:
  ProgramLine line_;
  int64_t dim_;
  Ints sizes_;
};

// squeeze and unsqueeze: take out a dimension if it has one element, or every dimension that has; or put one in.
template <class T, bool adds>
class SingleDimLayer : public Layer<T> {
 public:
  SingleDimLayer(const ProgramLine& line, const Weights<T>&)
      : line_(line), every_(!adds && line.flag("every")), dim_(every_ ? 0 : line.integer("dim", -16, 15)) {
    this->inputs = {line.input("input")};
  }
  bool is_view(const Site<T>&) const override { return true; }
  void set_sizes(Site<T>& site) const override {
    Ints& result = site.outputs[0].sizes;
    result = site.sizes(0);
    if (every_) {
      result.erase(std::remove(result.begin(), result.end(), 1), result.end());
      return;
    }
    const auto place = result.begin() + static_cast<ptrdiff_t>(dimension_of(line_, dim_, result.size() + adds));
    if constexpr (adds) {
      result.insert(place, 1);
    } else if (*place == 1) {
      result.erase(place);
    }
  }
  void run(const LayerCall<T>&) const override {}

 private:
  ProgramLine line_;
  bool every_;
  int64_t dim_;
};
template <class T>
using SqueezeLayer = SingleDimLayer<T, false>;
template <class T>
using UnsqueezeLayer = SingleDimLayer<T, true>;

// Elements in the order in which they are. Formats are the network's own affair, so that there is nothing to do.
template <class T>
class ContiguousLayer : public Layer<T> {
 public:
  ContiguousLayer(const ProgramLine& line, const Weights<T>&) { this->inputs = {line.input("input")}; }
  FormatRule formats() const override { return FormatRule::alike; }
  bool is_view(const Site<T>&) const override { return true; }
  void set_sizes(Site<T>& site) const override { site.outputs[0].sizes = site.sizes(0); }
  void run(const LayerCall<T>&) const override {}
};

// A value through which no gradient passes back.
template <class T>
using DetachLayer = ContiguousLayer<T>;

// A value that must have these sizes; without sizes, those of the one value `like`. A size may be -1: then any is
// right.
template <class T>
class CheckSizesLayer : public Layer<T> {
 public:
  CheckSizesLayer(const ProgramLine& line, const Weights<T>&) : asked_(line, {"input"}, this->inputs) {
    this->sizes_only = asked_.like();
    if (asked_.count() == 0 && !asked_.are_another_values()) line.refuse("expected sizes");
  }
  FormatRule formats() const override { return FormatRule::alike; }
  bool is_view(const Site<T>&) const override { return true; }
  void set_sizes(Site<T>& site) const override {
    const Ints &own = site.sizes(0), asked = asked_.of(site);
    bool fits = own.size() == asked.size();
    for (size_t d = 0; d < own.size() && fits; ++d) fits = asked[d] == -1 || asked[d] == own[d];
    FASTNN_CHECK(fits, "expected size ", to_string(asked), ", got ", to_string(own));
    site.outputs[0].sizes = own;
  }
  void run(const LayerCall<T>&) const override {}

 private:
  AskedSizes asked_;
};

// Dimensions in another order.
template <class T>
class ReorderLayer : public Layer<T> {
 public:
  explicit ReorderLayer(const ProgramLine& line) : line_(line) { this->inputs = {line.input("input")}; }
  bool reads_parts() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    for (const size_t d : order(site.sizes(0).size())) site.outputs[0].sizes.push_back(site.sizes(0)[d]);
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType& output = call.site.outputs[0];
    const Ints own = call.site.inputs[0].strides();
    Ints strides;
    for (const size_t d : order(own.size())) strides.push_back(own[d]);
    copy_array(call.input(0), strides, call.output(0), output.strides(), output.sizes,
               memory_order(strides.size(), false));
  }

 protected:
  // The dimensions of the input in the order of the output.
  virtual std::vector<size_t> order(size_t rank) const = 0;
  const ProgramLine line_;
};

template <class T>
class PermuteLayer : public ReorderLayer<T> {
 public:
  PermuteLayer(const ProgramLine& line, const Weights<T>&) : ReorderLayer<T>(line) {
    for (const int64_t dim : line.integers("dims", -16, 15)) dims_.push_back(dim);
    std::vector<bool> seen(dims_.size());
    for (const size_t d : order(dims_.size())) seen[d] = true;
    if (std::find(seen.begin(), seen.end(), false) != seen.end()) line.refuse("dims are no permutation");
  }

 protected:
  std::vector<size_t> order(size_t rank) const override {
    FASTNN_CHECK(rank == dims_.size(), "expected ", dims_.size(), " dimensions to permute, got ", rank);
    std::vector<size_t> result;
    for (const int64_t dim : dims_) result.push_back(dimension_of(this->line_, dim, rank));
    return result;
  }

 private:
  Ints dims_;
};

template <class T>
class TransposeLayer : public ReorderLayer<T> {
 public:
  TransposeLayer(const ProgramLine& line, const Weights<T>&)
      : ReorderLayer<T>(line), first_(line.integer("first", -16, 15)), second_(line.integer("second", -16, 15)) {}

 protected:
  std::vector<size_t> order(size_t rank) const override {
    std::vector<size_t> result(rank);
    for (size_t d = 0; d < rank; ++d) result[d] = d;
    std::swap(result[dimension_of(this->line_, first_, rank)], result[dimension_of(this->line_, second_, rank)]);
    return result;
  }

 private:
  int64_t first_, second_;
};

// Elements [start, stop) of a dimension, every step-th. As in Python, numbers below 0 count from the end.
template <class T>
class SliceLayer : public Layer<T> {
 public:
  SliceLayer(const ProgramLine& line, const Weights<T>&) : line_(line), asked_(line, {"input"}, this->inputs) {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    this->sizes_only = asked_.like();
    if (asked_.count() > 1 || (asked_.like() && !asked_.count())) line.refuse("expected one size, which is the stop");
    dim_ = line.integer("dim", -16, 15);
    start_ = line.integer("start", -kMost, kMost);
    stop_ = line.integer("stop", -kMost, kMost);
    step_ = line.integer("step", 1, kMost);
    fits_ = line.flag("fits");
  }
  FormatRule formats() const override { return FormatRule::alike; }
  void set_sizes(Site<T>& site) const override {
    Ints sizes = site.sizes(0);
    int64_t& size = sizes[dimension_of(line_, dim_, sizes.size())];
    const int64_t stop = this->stop(site);
    FASTNN_CHECK(!fits_ || stop <= size, "index out of range in self");
    const int64_t first = place(start_, size), last = std::max(first, place(stop, size));
    size = (last - first) / step_ + ((last - first) % step_ != 0);
    site.outputs[0].sizes = sizes;
  }
  double cost(const Site<T>& site) const override {
    return moving_cost<T>(site.outputs[0], dimension_of(line_, dim_, site.outputs[0].sizes.size()));
  }
  bool reads_parts() const override { return true; }
  int64_t offset_in_input(const Site<T>& site, size_t) const override {
    const size_t d = dimension_of(line_, dim_, site.sizes(0).size());
    return step_ == 1 ? checked_product(place(start_, site.sizes(0)[d]), site.inputs[0].strides()[d]) : -1;
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
  int64_t dim() const { return dim_; }
  int64_t start() const { return start_; }
  int64_t step() const { return step_; }
  // The stop that the line names, or the size that it asks for in its place.
  int64_t stop(const Site<T>& site) const { return asked_.count() ? asked_.of(site)[0] : stop_; }

 private:
  static int64_t place(int64_t at, int64_t size) {
    return std::min(size, std::max<int64_t>(0, at < 0 ? at + size : at));
  }

  ProgramLine line_;
  AskedSizes asked_;
  int64_t dim_, start_, stop_, step_;
  bool fits_;  // whether the stop must lie within the input
};

// Which element of which dimension a line selects.
class Selection {
 public:
  explicit Selection(const ProgramLine& line)
      : line_(line), dim_(line.integer("dim", -16, 15)), index_(line.integer("index", -kFar, kFar)) {}
  size_t dim(const Ints& sizes) const { return dimension_of(line_, dim_, sizes.size()); }
  // The number of the element, counted from the dimension's first.
  int64_t index(const Ints& sizes) const {
    const int64_t size = sizes[dim(sizes)];
    FASTNN_CHECK(index_ >= -size && index_ < size, "select(): index ", index_, " out of range for tensor of size ",
                 to_string(sizes), " at dimension ", dim(sizes));
    return index_ < 0 ? index_ + size : index_;
  }
  // The sizes without the dimension.
  Ints rest(Ints sizes) const {
    index(sizes);  // Raises where the element does not exist.
    sizes.erase(sizes.begin() + static_cast<ptrdiff_t>(dim(sizes)));
    return sizes;
  }

 private:
  ProgramLine line_;
  int64_t dim_, index_;
};

// One element of a dimension, without the dimension.
template <class T>
class SelectLayer : public Layer<T> {
 public:
  SelectLayer(const ProgramLine& line, const Weights<T>&) : selection_(line) { this->inputs = {line.input("input")}; }
  bool is_view(const Site<T>& site) const override { return site.sizes(0)[selection_.dim(site.sizes(0))] == 1; }
  bool reads_parts() const override { return true; }
  void set_sizes(Site<T>& site) const override { site.outputs[0].sizes = selection_.rest(site.sizes(0)); }
  void run(const LayerCall<T>& call) const override {
    const ValueType &input = call.site.inputs[0], &output = call.site.outputs[0];
    const size_t d = selection_.dim(input.sizes);
    Ints strides = input.strides();
    const T* const from = call.input(0) + selection_.index(input.sizes) * strides[d];
    strides.erase(strides.begin() + static_cast<ptrdiff_t>(d));
    copy_array(from, strides, call.output(0), output.strides(), output.sizes, memory_order(strides.size(), false));
  }

 private:
  Selection selection_;
};

// Splits a dimension into parts: into as many as torch.chunk makes ("chunks"), parts of one size ("size"), parts of
// several sizes ("sizes"), or single elements without the dimension ("unbind").
template <class T>
class SplitLayer : public Layer<T> {
 public:
  SplitLayer(const ProgramLine& line, const Weights<T>&)
      : line_(line),
        dim_(line.integer("dim", -16, 15)),
        chunks_(line.integer("chunks", 0, kMostSize)),
        size_(line.integer("size", 0, int64_t{1} << 40)),
        sizes_(line.integers("sizes", 0, int64_t{1} << 40)),
        unbinds_(line.flag("unbind")),
        count_(line.outputs.size()) {
    this->inputs = {line.input("input")};
  }
  FormatRule formats() const override { return unbinds_ ? FormatRule::contiguous : FormatRule::alike; }
  bool unbinds() const { return unbinds_; }
  size_t dimension(size_t rank) const { return dimension_of(line_, dim_, rank); }
  // The elements of each part along the dimension, of which there are `whole`.
  Ints parts(int64_t whole) const {
    Ints result = sizes_;
    if (result.empty()) {
      const int64_t each = std::max<int64_t>(unbinds_ ? 1 : chunks_ ? (whole + chunks_ - 1) / chunks_ : size_, 1);
      const auto count = static_cast<int64_t>(count_);
      FASTNN_CHECK(whole / each <= count, "a dimension of ", whole, " elements has more than ", count, " such parts");
      for (int64_t first = 0; first < whole; first += each) result.push_back(std::min(each, whole - first));
    }
    int64_t sum = 0;
    for (const int64_t part : result) sum = checked_sum(sum, part);
    FASTNN_CHECK(sum == whole && result.size() == count_, "a dimension of ", whole, " elements does not split into ",
                 count_, " such parts");
    return result;
  }
  void set_sizes(Site<T>& site) const override {
    Ints sizes = site.sizes(0);
    const size_t d = dimension(sizes.size());
    const Ints parts = this->parts(sizes[d]);
    if (unbinds_) sizes.erase(sizes.begin() + static_cast<ptrdiff_t>(d));
    for (size_t i = 0; i < count_; ++i) {
      if (!unbinds_) sizes[d] = parts[i];
      site.outputs[i].sizes = sizes;
    }
  }
  bool reads_parts() const override { return true; }
  int64_t offset_in_input(const Site<T>& site, size_t which) const override {
    if (unbinds_) return -1;
    const size_t d = dimension(site.sizes(0).size());
    int64_t first = 0;
    for (size_t i = 0; i < which; ++i) first += site.outputs[i].sizes[d];
    return checked_product(first, site.inputs[0].strides()[d]);
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType& input = call.site.inputs[0];
    const size_t d = dimension(input.sizes.size());
    Ints strides = input.strides();
    const T* from = call.input(0);
    const int64_t step = strides[d];
    if (unbinds_) strides.erase(strides.begin() + static_cast<ptrdiff_t>(d));
    for (size_t i = 0; i < count_; ++i) {
      const ValueType& output = call.site.outputs[i];
      copy_array(from, strides, call.output(i), output.strides(), output.sizes,
                 memory_order(strides.size(), output.channels_last()));
      from += step * (unbinds_ ? 1 : output.sizes[d]);
    }
  }

 private:
  ProgramLine line_;
  int64_t dim_, chunks_, size_;
  Ints sizes_;
  bool unbinds_;
  size_t count_;
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
  bool reads_parts() const override { return true; }
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
  bool reads_parts() const override { return true; }
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
inline LayerEntry expand_entry() {
  return layer_entry<ExpandLayer>("expand", {"input", "like*"}, {{"sizes", "ints", ""}});
}
inline LayerEntry repeat_entry() {
  return layer_entry<RepeatLayer>("repeat", {"input", "like*"}, {{"sizes", "ints", nullptr}});
}
inline LayerEntry size_entry() {
  return layer_entry<SizeLayer>("size", {"like*"}, {{"sizes", "ints", nullptr}, {"power", "float", "1"}});
}
inline LayerEntry full_entry() {
  return layer_entry<FullLayer>("full", {"like*"}, {{"sizes", "ints", ""}, {"value", "float", nullptr}});
}
inline LayerEntry flatten_entry() {
  return layer_entry<FlattenLayer>("flatten", {"input"}, {{"start_dim", "int", "0"}, {"end_dim", "int", "-1"}});
}
inline LayerEntry unflatten_entry() {
  return layer_entry<UnflattenLayer>("unflatten", {"input"}, {{"dim", "int", nullptr}, {"sizes", "ints", nullptr}});
}
constexpr const char* kNoDimension = "-17";  // which no value has: where it is the default, a line has to say another
inline LayerEntry squeeze_entry() {
  return layer_entry<SqueezeLayer>("squeeze", {"input"}, {{"dim", "int", kNoDimension}, {"every", "bool", "0"}});
}
inline LayerEntry unsqueeze_entry() {
  return layer_entry<UnsqueezeLayer>("unsqueeze", {"input"}, {{"dim", "int", nullptr}});
}
inline LayerEntry contiguous_entry() {
  return layer_entry<ContiguousLayer>("contiguous", {"input"}, {});
}
inline LayerEntry detach_entry() {
  return layer_entry<DetachLayer>("detach", {"input"}, {});
}
inline LayerEntry check_sizes_entry() {
  return layer_entry<CheckSizesLayer>("check_sizes", {"input", "like*"}, {{"sizes", "ints", nullptr}});
}
inline LayerEntry permute_entry() {
  return layer_entry<PermuteLayer>("permute", {"input"}, {{"dims", "ints", nullptr}});
}
inline LayerEntry transpose_entry() {
  return layer_entry<TransposeLayer>("transpose", {"input"}, {{"first", "int", nullptr}, {"second", "int", nullptr}});
}
inline LayerEntry select_entry() {
  return layer_entry<SelectLayer>("select", {"input"}, {{"dim", "int", nullptr}, {"index", "int", nullptr}});
}
inline LayerEntry split_entry() {
  return layer_entry<SplitLayer>("split", {"input"},
                                 {{"dim", "int", "0"},
                                  {"chunks", "int", "0"},
                                  {"size", "int", "0"},
                                  {"sizes", "ints", ""},
                                  {"unbind", "bool", "0"}});
}
inline LayerEntry slice_entry() {
  return layer_entry<SliceLayer>("slice", {"input", "like*"},
                                 {{"dim", "int", nullptr},
                                  {"start", "int", "0"},
                                  {"stop", "int", "9223372036854775807"},
                                  {"step", "int", "1"},
                                  {"sizes", "ints", ""},
                                  {"fits", "bool", "0"}});
}
inline LayerEntry cat_entry() {
  return layer_entry<CatLayer>("cat", {"inputs*"}, {{"dim", "int", "0"}});
}
inline LayerEntry pad_entry() {
  return layer_entry<PadLayer>("pad", {"input"}, {{"padding", "ints", nullptr}, {"value", "float", "0"}});
}

}  // namespace fastnn
