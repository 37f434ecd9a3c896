// embedding: rows of a table by their numbers. The numbers may be one column of the input, as of a table of categories
// that has a column for each embedding.
#pragma once

#include "shape.h"

namespace fastnn {

// Which column of its input an embedding takes; nothing where it takes all numbers.
inline std::optional<Selection> column_of(const ProgramLine& line) {
  return line.flag("selects") ? std::optional<Selection>(line) : std::nullopt;
}

template <class T>
class EmbeddingLayer : public Layer<T> {
 public:
  EmbeddingLayer(const ProgramLine& line, const Weights<T>& weights) : column_(column_of(line)) {
    this->inputs = {line.input("input")};
    const auto& weight = weights.of(line, "weight");
    if (weight.sizes.size() != 2) line.refuse("expected a weight of 2 dimensions");
    weight_ = weight.data;
    rows_ = weight.sizes[0];
    features_ = weight.sizes[1];
  }
  void set_sizes(Site<T>& site) const override {
    FASTNN_CHECK(site.inputs[0].elements == ElementKind::integers, "expected an embedding's input to be int64");
    site.outputs[0].sizes = column_ ? column_->rest(site.sizes(0)) : site.sizes(0);
    site.outputs[0].sizes.push_back(features_);
  }
  void run(const LayerCall<T>& call) const override {
    const int64_t* numbers = static_cast<const int64_t*>(call.inputs[0]);
    const Ints& sizes = call.site.sizes(0);
    int64_t count = call.site.inputs[0].count(), run = 1, step = 1;  // `run` numbers beside one another, every `step`
    if (column_) {
      const size_t dim = column_->dim(sizes);
      run = product(sizes, dim + 1, sizes.size());
      step = run * sizes[dim];
      numbers += column_->index(sizes) * run;
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
  std::optional<Selection> column_;
  const T* weight_;
  int64_t rows_, features_;
};

inline LayerEntry embedding_entry() {
  return layer_entry<EmbeddingLayer>(
      "embedding", {"input", "weight"},
      {{"padding_idx", "int", "-1"}, {"selects", "bool", "0"}, {"dim", "int", "0"}, {"index", "int", "0"}});
}

}  // namespace fastnn
