// embedding: rows of a table by their numbers. The numbers may be one column of the input, as of a table of categories
// that has a column for each embedding.
#pragma once

#include "../array.h"

namespace fastnn {

// Which numbers of its input an embedding takes: all, or those at one place of a dimension, without the dimension.
class ChosenNumbers {
 public:
  explicit ChosenNumbers(const ProgramLine& line)
      : line_(line), chooses_(line.flag("selects")), dim_(line.integer("dim", -16, 15)) {
    constexpr int64_t kFar = int64_t{1} << 40;
    index_ = line.integer("index", -kFar, kFar);
  }
  bool is_all() const { return !chooses_; }
  size_t dim(const Ints& sizes) const { return dimension_of(line_, dim_, sizes.size()); }
  // The place in the dimension.
  int64_t index(const Ints& sizes) const {
    const int64_t size = sizes[dim(sizes)];
    FASTNN_CHECK(index_ >= -size && index_ < size, "select(): index ", index_, " out of range for tensor of size ",
                 to_string(sizes), " at dimension ", dim(sizes));
    return index_ < 0 ? index_ + size : index_;
  }

 private:
  ProgramLine line_;
  bool chooses_;
  int64_t dim_, index_;
};

template <class T>
class EmbeddingLayer : public Layer<T> {
 public:
  EmbeddingLayer(const ProgramLine& line, const Weights<T>& weights) : chosen_(line) {
    this->inputs = {line.input("input")};
    const auto& weight = weights.of(line, "weight");
    if (weight.sizes.size() != 2) line.refuse("expected a weight of 2 dimensions");
    weight_ = weight.data;
    rows_ = weight.sizes[0];
    features_ = weight.sizes[1];
  }
  void set_sizes(Site<T>& site) const override {
    FASTNN_CHECK(site.inputs[0].is_integer, "expected an embedding's input to be int64");
    Ints& sizes = site.outputs[0].sizes;
    sizes = site.sizes(0);
    if (!chosen_.is_all()) {
      chosen_.index(sizes);  // raises
      sizes.erase(sizes.begin() + static_cast<ptrdiff_t>(chosen_.dim(sizes)));
    }
    sizes.push_back(features_);
  }
  void run(const LayerCall<T>& call) const override {
    const int64_t* numbers = static_cast<const int64_t*>(call.inputs[0]);
    const Ints& sizes = call.site.sizes(0);
    int64_t count = call.site.inputs[0].count(), run = 1, step = 1;  // `run` numbers beside one another, every `step`
    if (!chosen_.is_all()) {
      const size_t dim = chosen_.dim(sizes);
      run = product(sizes, dim + 1, sizes.size());
      step = run * sizes[dim];
      numbers += chosen_.index(sizes) * run;
      count /= sizes[dim];
    }
    const auto number = [&](int64_t i) { return numbers[run == 1 ? i * step : i / run * step + i % run]; };
    for (int64_t i = 0; i < count; ++i) FASTNN_CHECK(number(i) >= 0 && number(i) < rows_, "index out of range in self");
    parallel_range(count, kCopyWork * static_cast<double>(features_), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        // Another thread may have written to the caller's tensor since the check, so the number is kept inside the
        // bounds.
        const int64_t row = std::min(std::max<int64_t>(number(i), 0), rows_ - 1);
        std::copy_n(weight_ + row * features_, features_, call.output(0) + i * features_);
      }
    });
  }

 private:
  ChosenNumbers chosen_;
  const T* weight_;
  int64_t rows_, features_;
};

inline LayerEntry embedding_entry() {
  return layer_entry<EmbeddingLayer>(
      "embedding", {"input", "weight"},
      {{"padding_idx", "int", "-1"}, {"selects", "bool", "0"}, {"dim", "int", "0"}, {"index", "int", "0"}});
}

}  // namespace fastnn
