// embedding: rows of a table by their numbers.
#pragma once

#include "../array.h"

namespace fastnn {

template <class T>
class EmbeddingLayer : public Layer<T> {
 public:
  EmbeddingLayer(const ProgramLine& line, const Weights<T>& weights) {
    this->inputs = {line.input("input")};
    const auto& weight = weights.of(line, "weight");
    if (weight.sizes.size() != 2) line.refuse("expected a weight of 2 dimensions");
    weight_ = weight.data;
    rows_ = weight.sizes[0];
    features_ = weight.sizes[1];
  }
  void set_sizes(Site<T>& site) const override {
    FASTNN_CHECK(site.inputs[0].is_integer, "expected an embedding's input to be int64");
    site.outputs[0].sizes = site.sizes(0);
    site.outputs[0].sizes.push_back(features_);
  }
  void run(const LayerCall<T>& call) const override {
    const int64_t* const numbers = static_cast<const int64_t*>(call.inputs[0]);
    const int64_t count = call.site.inputs[0].count();
    for (int64_t i = 0; i < count; ++i)
      FASTNN_CHECK(numbers[i] >= 0 && numbers[i] < rows_, "index out of range in self");
    parallel_range(count, kCopyWork * static_cast<double>(features_), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        // Another thread may have written to the caller's tensor since the check, so the number is kept inside the
        // bounds.
        const int64_t row = std::min(std::max<int64_t>(numbers[i], 0), rows_ - 1);
        std::copy_n(weight_ + row * features_, features_, call.output(0) + i * features_);
      }
    });
  }

 private:
  const T* weight_;
  int64_t rows_, features_;
};

inline LayerEntry embedding_entry() {
  return layer_entry<EmbeddingLayer>("embedding", {"input", "weight"}, {{"padding_idx", "int", "-1"}});
}

}  // namespace fastnn
