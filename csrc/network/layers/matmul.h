// matmul and attention: the product of two values, or of a value and a weight; and values that are weighted by the
// softmax of products of queries and keys.
#pragma once

#include "../products.h"

namespace fastnn {

template <class T>
class MatmulLayer : public Layer<T> {
 public:
  MatmulLayer(const ProgramLine& line, const Weights<T>&) : turns_(line.flag("turns_other")) {
    this->inputs = {line.input("input"), line.input("other")};
  }
  bool reads_parts() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    site.outputs[0].sizes = sizes_of_product(site.sizes(0), turned(site.sizes(1)));
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType &a = call.site.inputs[0], &b = call.site.inputs[1];
    multiply_matrices<T>({call.input(0), a.sizes, a.strides()}, {call.input(1), turned(b.sizes), turned(b.strides())},
                         call.output(0));
  }

 private:
  // Sizes or strides of the other operand as it is multiplied.
  Ints turned(Ints numbers) const {
    if (turns_ && numbers.size() >= 2) std::swap(numbers.back(), numbers[numbers.size() - 2]);
    return numbers;
  }
  bool turns_;  // whether the other operand's matrices are transposed, as a linear layer's weight is
};

// Query (..., queries, features), key (..., keys, features), value (..., keys, outputs) -> (..., queries, outputs), as
// torch's scaled_dot_product_attention. A mask is added to the products of queries and keys.
template <class T>
class AttentionLayer : public Layer<T> {
 public:
  AttentionLayer(const ProgramLine& line, const Weights<T>&)
      : is_causal_(line.flag("is_causal")), scale_(scale_of(line)) {
    this->inputs = {line.input("query"), line.input("key"), line.input("value")};
    if (line.has("mask")) this->inputs.push_back(line.input("mask"));
    if (line.real("dropout") != 0) line.refuse("a network that is not trained drops nothing");
  }
  // What the products of queries and keys are multiplied by, where it is given.
  static std::optional<double> scale_of(const ProgramLine& line) {
    return line.text("scale").empty() ? std::nullopt : std::optional<double>(line.real("scale"));
  }
  // The same for queries of these sizes: torch's 1 / sqrt(features) where nothing is given.
  static T scale_for(const std::optional<double>& given, const Ints& query) {
    return static_cast<T>(given ? *given : 1 / std::sqrt(static_cast<double>(query.back())));
  }
  bool reads_parts() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    site.outputs[0].sizes = sizes_of_output(site.sizes(0), site.sizes(1), site.sizes(2));
  }
  static Ints sizes_of_output(const Ints& query, const Ints& key, const Ints& value) {
    const size_t rank = query.size();
    FASTNN_CHECK(rank >= 2 && key.size() == rank && value.size() == rank,
                 "expected values of one number of dimensions");
    for (size_t d = 0; d + 2 < rank; ++d) {
      FASTNN_CHECK(key[d] == query[d] && value[d] == query[d], "expected values of one batch, got sizes ",
                   to_string(query), ", ", to_string(key), " and ", to_string(value));
    }
    FASTNN_CHECK(key[rank - 1] == query[rank - 1] && value[rank - 2] == key[rank - 2], "sizes ", to_string(query), ", ",
                 to_string(key), " and ", to_string(value), " do not go together");
    Ints sizes = query;
    sizes.back() = value.back();
    return sizes;
  }
  void run(const LayerCall<T>& call) const override {
    const auto matrices = [&](size_t i) {
      const ValueType& type = call.site.inputs[i];
      return Matrices<const T>(call.input(i), type.sizes, type.strides());
    };
    const Matrices<const T> query = matrices(0), key = matrices(1), value = matrices(2);
    std::optional<Matrices<const T>> mask;
    if (call.site.inputs.size() > 3) mask = matrices(3);
    Attention<T>(query, key, value, mask ? &*mask : nullptr, scale_for(scale_, query.sizes), is_causal_)
        .forward(call.output(0));
  }

 private:
  bool is_causal_;
  std::optional<double> scale_;
};

inline LayerEntry attention_entry() {
  return layer_entry<AttentionLayer>("attention", {"query", "key", "value", "mask?"},
                                     {{"is_causal", "bool", "0"}, {"scale", "text", ""}, {"dropout", "float", "0"}});
}
inline LayerEntry matmul_entry() {
  return layer_entry<MatmulLayer>("matmul", {"input", "other"}, {{"turns_other", "bool", "0"}});
}

}  // namespace fastnn
