// matmul and attention, by torch: the product of two values, or of a value and a weight; and values that are weighted
// by the softmax of products of queries and keys.
#pragma once

#include "../../ops/stock.h"
#include "../array.h"

namespace fastnn {

template <class T>
class MatmulLayer : public Layer<T> {
 public:
  MatmulLayer(const ProgramLine& line, const Weights<T>&) : turns_(line.flag("turns_other")) {
    this->inputs = {line.input("input"), line.input("other")};
  }
  bool reads_parts() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    const Ints &a = site.sizes(0), b = turned(site.sizes(1));
    FASTNN_CHECK(a.size() >= 2 && b.size() >= 2, "expected matrices, got sizes ", to_string(a), " and ", to_string(b));
    FASTNN_CHECK(a.back() == b[b.size() - 2], "mat1 and mat2 shapes cannot be multiplied (", to_string(a), " and ",
                 to_string(b), ")");
    Ints& sizes = site.outputs[0].sizes;
    sizes = broadcast_sizes(Ints(a.begin(), a.end() - 2), Ints(b.begin(), b.end() - 2));
    sizes.push_back(a[a.size() - 2]);
    sizes.push_back(b.back());
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType &a = call.site.inputs[0], &b = call.site.inputs[1], &output = call.site.outputs[0];
    const Tensor to = tensor_over(call.output(0), output.sizes, output.strides());
    stock("aten::matmul", "out", tensor_over(call.input(0), a.sizes, a.strides()),
          tensor_over(call.input(1), turned(b.sizes), turned(b.strides())), to);
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
// torch's scaled_dot_product_attention. A mask is added to the products of queries and keys. Torch multiplies long
// sequences block by block, so that the products of all queries and keys need no memory.
template <class T>
class AttentionLayer : public Layer<T> {
 public:
  AttentionLayer(const ProgramLine& line, const Weights<T>&)
      : is_causal_(line.flag("is_causal")), scale_(scale_of(line)) {
    this->inputs = {line.input("query"), line.input("key"), line.input("value")};
    if (line.has("mask")) this->inputs.push_back(line.input("mask"));
    if (line.real("dropout") != 0) line.refuse("a network that is not trained drops nothing");
  }
  // What the products of queries and keys are multiplied by; torch's 1 / sqrt(features) where nothing is given.
  static std::optional<double> scale_of(const ProgramLine& line) {
    return line.text("scale").empty() ? std::nullopt : std::optional<double>(line.real("scale"));
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
    const auto tensor = [&](size_t i) {
      const ValueType& type = call.site.inputs[i];
      return tensor_over(call.input(i), type.sizes, type.strides());
    };
    const ValueType& output = call.site.outputs[0];
    const Tensor found = stock("aten::scaled_dot_product_attention", "", tensor(0), tensor(1), tensor(2),
                               call.site.inputs.size() > 3 ? OptionalTensor(tensor(3)) : OptionalTensor(), 0.0,
                               is_causal_, scale_, false);
    stock("aten::copy_", "", tensor_over(call.output(0), output.sizes, output.strides()), found, false);
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
