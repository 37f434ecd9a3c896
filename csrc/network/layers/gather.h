// Layers whose elements come from other places of the input: chosen indices, the order turned around or rotated, and
// images that go on beyond their borders by their own pixels. A place may be taken several times, or not at all; its
// gradient is the sum of the gradients of the elements that came from it.
#pragma once

#include "shape.h"

namespace fastnn {

// Neighbouring places of the output along a dimension that come from neighbouring places of the input.
struct PlaceRun {
  int64_t from, to, count;
};

// Which place of the input each element of the output comes from, dimension by dimension, in the longest runs.
class Gathering {
 public:
  // places: along each dimension of the output, the places in the input; empty where they are the same.
  Gathering(const Ints& sizes, const std::vector<Ints>& places, const Ints& from_strides, const Ints& to_strides,
            const std::vector<size_t>& order) {
    for (const size_t d : order) {
      std::vector<PlaceRun> runs;
      if (places[d].empty()) {
        runs.push_back({0, 0, sizes[d]});
      } else {
        for (int64_t to = 0; to < sizes[d]; ++to) {
          const int64_t from = places[d][static_cast<size_t>(to)];
          const bool goes_on = !runs.empty() && from == runs.back().from + runs.back().count;
          goes_on ? static_cast<void>(++runs.back().count) : runs.push_back({from, to, 1});
        }
      }
      loops_.push_back({std::move(runs), from_strides[d], to_strides[d], places[d].empty()});
    }
    // Whole dimensions that lie together are one run.
    while (loops_.size() > 1 && loops_.back().is_whole && loops_.back().from_stride == length_ &&
           loops_.back().to_stride == length_) {
      length_ *= loops_.back().runs[0].count;
      loops_.pop_back();
    }
  }

  // Calls body(place in the input, place in the output, count) for runs of elements. Where the outermost dimension is
  // whole, several threads share it, and none of them meets another's places.
  template <class Body>
  void for_each_run(const Body& body) const {
    if (loops_.size() < 2 || !loops_[0].is_whole) return walk(0, 0, 0, body);
    const Loop& outer = loops_[0];
    double work = kCopyWork * static_cast<double>(length_);
    for (size_t i = 1; i < loops_.size(); ++i) work *= static_cast<double>(loops_[i].count());
    parallel_range(outer.count(), work, [&](int64_t first, int64_t last) {
      for (int64_t at = first; at < last; ++at) walk(1, at * outer.from_stride, at * outer.to_stride, body);
    });
  }

 private:
  struct Loop {
    std::vector<PlaceRun> runs;
    int64_t from_stride, to_stride;
    bool is_whole;  // every place comes from itself

    int64_t count() const { return runs.empty() ? 0 : runs.back().to + runs.back().count; }
  };

  template <class Body>
  void walk(size_t loop, int64_t from, int64_t to, const Body& body) const {
    if (loop == loops_.size()) return body(from, to, length_);
    const Loop& own = loops_[loop];
    const bool is_last = loop + 1 == loops_.size();
    for (const PlaceRun& run : own.runs) {
      const int64_t first = from + run.from * own.from_stride, first_to = to + run.to * own.to_stride;
      if (is_last && own.from_stride == length_ && own.to_stride == length_) {
        body(first, first_to, run.count * length_);
        continue;
      }
      for (int64_t i = 0; i < run.count; ++i)
        walk(loop + 1, first + i * own.from_stride, first_to + i * own.to_stride, body);
    }
  }

  std::vector<Loop> loops_;  // from the outermost dimension to the innermost
  int64_t length_ = 1;       // elements that always lie together
};

// What the layers have in common. Each says by `places` which places of the input it takes.
template <class T>
class GatherLayer : public Layer<T> {
 public:
  explicit GatherLayer(const ProgramLine& line) : line_(line) { this->inputs = {line.input("input")}; }
  FormatRule formats() const override { return FormatRule::alike; }
  bool reads_parts() const override { return true; }

  // An input's sizes, where dimensions that are indexed together have become one.
  virtual Ints joined(Ints sizes) const { return sizes; }
  // For an input of these sizes, the places that the output takes along each dimension that `joined` leaves; empty
  // where it takes each once and in its order. Raises where a place does not exist.
  virtual std::vector<Ints> places(const Ints& sizes) const = 0;

  void set_sizes(Site<T>& site) const override {
    Ints& sizes = site.outputs[0].sizes;
    sizes = joined(site.sizes(0));
    const std::vector<Ints> all = places(site.sizes(0));
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (!all[d].empty()) sizes[d] = static_cast<int64_t>(all[d].size());
    }
  }
  double cost(const Site<T>& site) const override {
    const size_t rank = site.outputs[0].sizes.size();
    return rank ? moving_cost<T>(site.outputs[0], rank - 1) : 0;
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType &input = call.site.inputs[0], &output = call.site.outputs[0];
    const T* const from = call.input(0);
    T* const to = call.output(0);
    gathering(input, output).for_each_run([&](int64_t of_input, int64_t of_output, int64_t count) {
      std::copy_n(from + of_input, count, to + of_output);
    });
  }
  // Adds the output's gradient to the input's, each in the format of its value. The places are those of `run`.
  void add_gradient(const ValueType& input, const ValueType& output, const T* gradient, T* to) const {
    gathering(input, output).for_each_run([&](int64_t of_input, int64_t of_output, int64_t count) {
      for (int64_t i = 0; i < count; ++i) to[of_input + i] += gradient[of_output + i];
    });
  }

 protected:
  const ProgramLine line_;

 private:
  Gathering gathering(ValueType input, const ValueType& output) const {
    const std::vector<Ints> all = places(input.sizes);
    input.sizes = joined(input.sizes);
    return {output.sizes, all, input.strides(), output.strides(),
            memory_order(output.sizes.size(), output.channels_last())};
  }
};

// Chosen indices of a dimension. Numbers below 0 count from the end. Several neighbouring dimensions become one, of
// elements that have an index in each: `index` has all indices in the first of them, then all in the second.
template <class T>
class IndexSelectLayer : public GatherLayer<T> {
 public:
  IndexSelectLayer(const ProgramLine& line, const Weights<T>&)
      : GatherLayer<T>(line),
        dim_(line.integer("dim", -16, 15)),
        dims_(static_cast<size_t>(line.integer("dims", 1, 16))),
        index_(line.integers("index", -kFar, kFar)) {
    if (index_.empty() || index_.size() % dims_) line.refuse("expected an index in each dimension");
  }
  FormatRule formats() const override { return dims_ == 1 ? FormatRule::alike : FormatRule::contiguous; }
  bool reads_parts() const override { return dims_ == 1; }

 protected:
  Ints joined(Ints sizes) const override {
    const size_t first = dimension_of(this->line_, dim_, sizes.size());
    if (first + dims_ > sizes.size()) this->line_.refuse("an index in more dimensions than there are");
    sizes[first] = product(sizes, first, first + dims_);
    sizes.erase(sizes.begin() + static_cast<ptrdiff_t>(first + 1),
                sizes.begin() + static_cast<ptrdiff_t>(first + dims_));
    return sizes;
  }
  std::vector<Ints> places(const Ints& sizes) const override {
    const size_t first = dimension_of(this->line_, dim_, sizes.size());
    std::vector<Ints> result(sizes.size() - dims_ + 1);
    Ints& all = result[first];
    all.assign(index_.size() / dims_, 0);
    for (size_t i = 0; i < index_.size(); ++i) {
      const size_t d = first + i / all.size();
      const int64_t index = index_[i] < 0 ? index_[i] + sizes[d] : index_[i];
      FASTNN_CHECK(index >= 0 && index < sizes[d], "index ", index_[i], " is out of bounds for dimension ", d,
                   " with size ", sizes[d]);
      all[i % all.size()] = all[i % all.size()] * sizes[d] + index;
    }
    return result;
  }

 private:
  int64_t dim_;
  size_t dims_;
  Ints index_;
};

// Dimensions whose elements are rotated: each moves `shifts` places on, and those that leave come in at the other end.
template <class T>
class RollLayer : public GatherLayer<T> {
 public:
  RollLayer(const ProgramLine& line, const Weights<T>&)
      : GatherLayer<T>(line), shifts_(line.integers("shifts", -kFar, kFar)), dims_(line.integers("dims", -16, 15)) {
    if (shifts_.size() != dims_.size()) line.refuse("expected as many shifts as dimensions");
  }
  std::vector<Ints> places(const Ints& sizes) const override {
    std::vector<Ints> result(sizes.size());
    for (size_t i = 0; i < dims_.size(); ++i) {
      const size_t d = dimension_of(this->line_, dims_[i], sizes.size());
      const Ints before = std::exchange(result[d], Ints());  // where the dimension was named before: shifts add up
      for (int64_t at = 0; at < sizes[d]; ++at) {
        const int64_t from = ((at - shifts_[i]) % sizes[d] + sizes[d]) % sizes[d];
        result[d].push_back(before.empty() ? from : before[static_cast<size_t>(from)]);
      }
    }
    return result;
  }

 private:
  Ints shifts_, dims_;
};

// Images whose channels, in `groups` groups, are dealt out: the first of each group, then the second of each.
template <class T>
class ChannelShuffleLayer : public GatherLayer<T> {
 public:
  ChannelShuffleLayer(const ProgramLine& line, const Weights<T>&)
      : GatherLayer<T>(line), groups_(line.integer("groups", 1, kMostSize)) {}
  std::vector<Ints> places(const Ints& sizes) const override {
    FASTNN_CHECK(sizes.size() > 2, "channel_shuffle expects input with > 2 dims, but got input with sizes ",
                 to_string(sizes));
    FASTNN_CHECK(sizes[1] % groups_ == 0, "Number of channels must be divisible by groups. Got ", sizes[1],
                 " channels and ", groups_, " groups.");
    std::vector<Ints> result(sizes.size());
    for (int64_t at = 0; at < sizes[1]; ++at) result[1].push_back(at % groups_ * (sizes[1] / groups_) + at / groups_);
    return result;
  }

 private:
  int64_t groups_;
};

// Dimensions in the reverse order.
template <class T>
class FlipLayer : public GatherLayer<T> {
 public:
  FlipLayer(const ProgramLine& line, const Weights<T>&) : GatherLayer<T>(line), dims_(line.integers("dims", -16, 15)) {}
  std::vector<Ints> places(const Ints& sizes) const override {
    std::vector<Ints> result(sizes.size());
    for (const int64_t dim : dims_) {
      const size_t d = dimension_of(this->line_, dim, sizes.size());
      FASTNN_CHECK(result[d].empty(), "dim ", d, " appears multiple times in the list of dims");
      for (int64_t at = sizes[d]; at-- > 0;) result[d].push_back(at);
    }
    return result;
  }

 private:
  Ints dims_;
};

// Windows of `size` neighbouring elements of a dimension, each `step` elements behind the one before. They come one
// behind the other in that dimension. Elements behind the last whole window are in none.
template <class T>
class WindowsLayer : public GatherLayer<T> {
 public:
  WindowsLayer(const ProgramLine& line, const Weights<T>&)
      : GatherLayer<T>(line),
        dim_(line.integer("dim", -16, 15)),
        size_(line.integer("size", 1, kMostSize)),
        step_(line.integer("step", 1, kMostSize)) {}
  std::vector<Ints> places(const Ints& sizes) const override {
    const size_t d = dimension_of(this->line_, dim_, sizes.size());
    FASTNN_CHECK(size_ <= sizes[d], "maximum size for tensor at dimension ", d, " is ", sizes[d], " but size is ",
                 size_);
    const int64_t count = (sizes[d] - size_) / step_ + 1;
    FASTNN_CHECK(checked_product(count, size_) <= kMostPlaces, "network: ", count, " windows of ", size_,
                 " elements are more than a network takes");
    std::vector<Ints> result(sizes.size());
    for (int64_t window = 0; window < count; ++window) {
      for (int64_t i = 0; i < size_; ++i) result[d].push_back(window * step_ + i);
    }
    return result;
  }

 private:
  static constexpr int64_t kMostPlaces = 1 << 20;  // places are listed, which takes memory
  int64_t dim_, size_, step_;
};

// Pixels before and behind each dimension of images, made of the images themselves: mirrored at the border without the
// border's own pixels ("reflect"), the border's pixels ("replicate"), or those of the other end ("circular").
// `padding` has both counts for each dimension, the last dimension's first, as torch has them.
template <class T>
class BorderLayer : public GatherLayer<T> {
 public:
  BorderLayer(const ProgramLine& line, const Weights<T>&)
      : GatherLayer<T>(line), padding_(line.integers("padding", 0, kMostPadding)), mode_(line.text("mode")) {
    if (padding_.empty() || padding_.size() % 2) line.refuse("expected two numbers a dimension");
    if (mode_ != "reflect" && mode_ != "replicate" && mode_ != "circular") line.refuse("unknown mode ", mode_);
  }
  std::vector<Ints> places(const Ints& sizes) const override {
    std::vector<Ints> result(sizes.size());
    const size_t dims = padding_.size() / 2, rank = sizes.size();
    const bool has_batch = rank == dims + 2;
    FASTNN_CHECK(has_batch || rank == dims + 1, "expected images of ", dims,
                 " dimensions, with or without a batch, got size ", to_string(sizes));
    for (size_t d = has_batch; d < rank && mode_ != "circular"; ++d) {
      FASTNN_CHECK(
          sizes[d] > 0, "Expected ", dims + 1, "D or ", dims + 2,
          "D (batch mode) tensor with possibly 0 batch size and other non-zero dimensions for input, but got: ",
          to_string(sizes));
    }
    for (size_t i = 0; i < padding_.size(); i += 2) {
      const size_t d = sizes.size() - 1 - i / 2;
      const int64_t size = sizes[d], before = padding_[i], behind = padding_[i + 1], most = std::max(before, behind);
      FASTNN_CHECK(mode_ == "replicate" ? size > 0
                   : mode_ == "reflect" ? most < size
                                        : most <= size,
                   "Padding size should be less than the corresponding input dimension, but got: padding (", before,
                   ", ", behind, ") at dimension ", d, " of input ", to_string(sizes));
      for (int64_t at = -before; at < size + behind; ++at) result[d].push_back(place(at, size));
    }
    return result;
  }

 private:
  static constexpr int64_t kMostPadding = 1 << 16;  // places are listed, which takes memory
  int64_t place(int64_t at, int64_t size) const {
    if (at >= 0 && at < size) return at;
    if (mode_ == "replicate") return at < 0 ? 0 : size - 1;
    if (mode_ == "circular") return at < 0 ? at + size : at - size;
    return at < 0 ? -at : 2 * (size - 1) - at;
  }
  Ints padding_;
  std::string mode_;
};

inline LayerEntry index_select_entry() {
  return layer_entry<IndexSelectLayer>("index_select", {"input"},
                                       {{"dim", "int", nullptr}, {"dims", "int", "1"}, {"index", "ints", nullptr}});
}
inline LayerEntry roll_entry() {
  return layer_entry<RollLayer>("roll", {"input"}, {{"shifts", "ints", nullptr}, {"dims", "ints", nullptr}});
}
inline LayerEntry flip_entry() {
  return layer_entry<FlipLayer>("flip", {"input"}, {{"dims", "ints", nullptr}});
}
inline LayerEntry channel_shuffle_entry() {
  return layer_entry<ChannelShuffleLayer>("channel_shuffle", {"input"}, {{"groups", "int", nullptr}});
}
inline LayerEntry border_entry() {
  return layer_entry<BorderLayer>("border", {"input"}, {{"padding", "ints", nullptr}, {"mode", "text", nullptr}});
}
inline LayerEntry windows_entry() {
  return layer_entry<WindowsLayer>("windows", {"input"},
                                   {{"dim", "int", nullptr}, {"size", "int", nullptr}, {"step", "int", nullptr}});
}

}  // namespace fastnn
