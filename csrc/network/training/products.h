// Products of matrices and attention in training.
#pragma once

#include "../../ops/stock.h"
#include "../layers/matmul.h"
#include "layer.h"

namespace fastnn {

// The product of matrices (..., n, m) and (..., m, k), one for each element of the dimensions in front.
template <class T>
class MatmulTraining : public TrainingLayer<T> {
 public:
  explicit MatmulTraining(const ProgramLine& line) {
    this->inputs = {line.input("input"), line.input("other")};
    if (line.flag("turns_other")) line.refuse("a product that is trained transposes nothing");
  }
  void forward(Tensor* outputs) override {
    const Matrices<const T> a(this->given[0]), b(this->given[1]);
    outputs[0] = new_tensor(sizes_of_product(a.sizes, b.sizes), kDtypeOf<T>);
    multiply_matrices<T>(a, b, mutable_data<T>(outputs[0]));
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    const Matrices<const T> a(this->given[0]), b(this->given[1]), gradient(gradients[0]);
    const auto set = [&](size_t i, const Matrices<const T>& left, const Matrices<const T>& right) {
      const Ints sizes = sizes_of(this->given[i]);
      results[i] = {new_tensor(sizes, kDtypeOf<T>), nullptr, true};
      multiply_and_sum<T>(left, right, sizes, mutable_data<T>(results[i].tensor));
    };
    if (wanted[0]) set(0, gradient, b.transposed());
    if (wanted[1]) set(1, a.transposed(), gradient);
  }
};

// Attention of queries (..., queries, features) to keys and values. With dropout, the weights of all keys are computed
// at once, as by torch, so that dropout draws the same numbers.
template <class T>
class AttentionTraining : public TrainingLayer<T> {
 public:
  explicit AttentionTraining(const ProgramLine& line)
      : is_causal_(line.flag("is_causal")),
        given_scale_(AttentionLayer<T>::scale_of(line)),
        drops_(probability(line, "dropout")) {
    this->inputs = {line.input("query"), line.input("key"), line.input("value")};
    this->take(line, {"mask"});
  }
  void forward(Tensor* outputs) override {
    const Tensor &query = this->given[0], &key = this->given[1], &value = this->given[2];
    const Ints sizes = AttentionLayer<T>::sizes_of_output(sizes_of(query), sizes_of(key), sizes_of(value));
    scale_ = AttentionLayer<T>::scale_for(given_scale_, sizes_of(query));
    if (drops_ == 0) {
      outputs[0] = new_tensor(sizes, kDtypeOf<T>);
      return with_attention([&](const Attention<T>& attention) { attention.forward(mutable_data<T>(outputs[0])); });
    }
    Tensor scores = combined<T>(BinaryKind::mul, stock("aten::matmul", "", query, turned(key)), scale_, false);
    if (is_causal_) hide_later_keys(scores);
    if (has_mask()) {
      const Ints expected = sizes_of(scores);
      scores = combined<T>(BinaryKind::add, scores, mask());
      FASTNN_CHECK(sizes_of(scores) == expected, kTrainingStep, ": a mask is larger than the scores");
    }
    // As torch has it, a query that sees no key gives 0.
    weights_ = has_mask() ? stock("aten::_safe_softmax", "", scores, int64_t{-1}, std::optional<ScalarType>())
                          : stock("aten::_softmax", "", scores, int64_t{-1}, false);
    scales_ = new_like<T>(weights_);
    draw_scales<T>(drops_, scales_);
    dropped_ = combined<T>(BinaryKind::mul, weights_, scales_);
    outputs[0] = stock("aten::matmul", "", dropped_, value);
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    const Tensor &query = this->given[0], &key = this->given[1], &value = this->given[2];
    if (drops_ == 0) {
      Tensor all[3];
      for (size_t i = 0; i < 3; ++i) all[i] = new_tensor(sizes_of(this->given[i]), kDtypeOf<T>);
      const Tensor gradient = dense(gradients[0]);
      with_attention([&](const Attention<T>& attention) {
        attention.backward(data<T>(gradient), mutable_data<T>(all[0]), mutable_data<T>(all[1]),
                           mutable_data<T>(all[2]));
      });
      for (size_t i = 0; i < 3; ++i) {
        if (wanted[i]) results[i] = {std::move(all[i]), nullptr, true};
      }
      return;
    }
    const auto product = [](const Tensor& a, const Tensor& b) { return stock("aten::matmul", "", a, b); };
    const Tensor of_weights = combined<T>(BinaryKind::mul, product(gradients[0], turned(value)), scales_);
    const Tensor of_products =
        stock("aten::_softmax_backward_data", "", of_weights, weights_, int64_t{-1}, kDtypeOf<T>);
    const Tensor of_scores = combined<T>(BinaryKind::mul, of_products, scale_, false);
    if (wanted[0]) results[0] = {product(of_scores, key), nullptr, true};
    if (wanted[1]) results[1] = {product(turned(of_scores), query), nullptr, true};
    if (wanted[2]) results[2] = {product(turned(dropped_), gradients[0]), nullptr, true};
  }
  Tensor drawn() const override { return scales_; }
  void release() override { weights_ = scales_ = dropped_ = Tensor(); }
  void forget() override { release(); }

 private:
  bool has_mask() const { return this->given.size() > 3; }
  const Tensor& mask() const { return this->given[3]; }
  // Calls body(attention) with that of this step's inputs.
  template <class Body>
  void with_attention(const Body& body) const {
    const Matrices<const T> query(this->given[0]), key(this->given[1]), value(this->given[2]);
    std::optional<Matrices<const T>> mask;
    if (has_mask()) mask.emplace(this->mask());
    body(Attention<T>(query, key, value, mask ? &*mask : nullptr, scale_, is_causal_));
  }
  // Matrices (..., n, m) transposed to (..., m, n).
  static Tensor turned(const Tensor& matrices) {
    return stock("aten::transpose", "int", matrices, int64_t{-2}, int64_t{-1});
  }
  // A query sees the keys up to its own place.
  static void hide_later_keys(const Tensor& scores) {
    const int64_t queries = scores.size(-2), keys = scores.size(-1);
    if (keys == 0) return;
    T* const to = mutable_data<T>(scores);
    for (int64_t row = 0; row < scores.numel() / keys; ++row) {
      const int64_t seen = std::min(keys, row % queries + 1);
      std::fill(to + row * keys + seen, to + (row + 1) * keys, -std::numeric_limits<T>::infinity());
    }
  }

  bool is_causal_;
  std::optional<double> given_scale_;
  double drops_;
  T scale_ = 1;
  Tensor weights_;  // of the keys, where there is dropout
  Tensor scales_, dropped_;
};

}  // namespace fastnn
