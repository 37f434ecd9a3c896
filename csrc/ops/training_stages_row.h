// The stages that take rows and sequences of them: linear and recurrent layers; and those of single elements.
#pragma once

#include <memory>

#include "mlp_by_layers.h"
#include "mlp_run.h"
#include "rnn_problem.h"
#include "stock.h"
#include "training_stage.h"

namespace fastnn {

// That elements are dropped, by its bits.
inline double probability(Words& words) {
  const double drops = real_number(words);
  FASTNN_CHECK(drops >= 0 && drops <= 1, kTrainingStep, ": dropout probability has to be between 0 and 1, but got ",
               drops);
  return drops;
}

// What dropout multiplies elements by, drawn by torch, so that a seed gives the same elements as stock's. scales:
// without gaps
template <class T>
void draw_scales(double drops, const Tensor& scales) {
  T* const to = mutable_data<T>(scales);
  const int64_t count = scales.numel();
  if (drops == 1) return static_cast<void>(std::fill_n(to, count, T(0)));
  draw_ones(scales, 1 - drops);
  const T scale = static_cast<T>(1 - drops);
  for (int64_t i = 0; i < count; ++i) to[i] /= scale;
}

// "mlp layers biased activations"
template <class T>
class MlpStage : public Stage<T> {
 public:
  explicit MlpStage(Words& words) {
    layers_ = static_cast<size_t>(words.number(1, kMostLayers));
    biased_ = words.number(0, 1);
    activations_ = words.word();
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of an mlp than it should");
    FASTNN_CHECK(Activations(kTrainingStep, activations_).size() == layers_, kTrainingStep,
                 ": the program has an mlp of other activations than layers");
    this->count = layers_ * (1 + biased_);
  }

  Tensor forward(const Tensor& input, const TensorList& parameters) override {
    kept_ = new_tensor({begin(input, parameters)}, kDtypeOf<T>);
    Tensor output = place();
    PerLayer<T*> saved;
    for (int64_t i = 0; i < call_->chain.layers(); ++i) {
      saved.push_back(output_serves(call_->chain, i, call_->activations[i]) ? nullptr : const_cast<T*>(saved_[i]));
    }
    run_forward<T>(*call_, mutable_data<T>(kept_), saved);
    return output;
  }
  void save(TensorList& saved) override { saved.push_back(std::move(kept_)); }
  Tensor restore(const Tensor& input, const TensorList& parameters, SavedReader<T>& saved) override {
    kept_ = saved.take({begin(input, parameters)});
    return place();
  }

  Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, const T** gradients) override {
    const Chain& chain = call_->chain;
    const Tensor grad_output = dense(gradient);
    if (goes_by_layers(chain, true)) {
      take_gradients_by_layers(grad_output, input_wanted, wanted, gradients);
    } else {
      take_gradients(grad_output, input_wanted, wanted, gradients);
    }
    return input_wanted ? as_sizes(data<T>(grad_input_), sizes_) : Tensor();
  }

 private:
  // How many elements are kept: the output, then what each layer saves.
  int64_t begin(const Tensor& input, const TensorList& parameters) {
    sizes_ = sizes_of(input);
    FASTNN_CHECK(sizes_.size() >= 2, kTrainingStep, ": expected a linear layer's input to have a batch");
    this->hold(input, parameters);
    this->input_ = dense(input);
    rows_ = as_sizes(data<T>(this->input_), {product(sizes_, 0, sizes_.size() - 1), sizes_.back()});
    call_.emplace(kTrainingStep, rows_, this->parameters_, activations_);
    const Chain& chain = call_->chain;
    int64_t count = checked_product(chain.rows, chain.widths.back());
    for (int64_t i = 0; i < chain.layers(); ++i) {
      if (output_serves(chain, i, call_->activations[i])) continue;
      count = checked_sum(count, checked_product(chain.rows, chain.widths[i + 1]));
    }
    return count;
  }
  // Where in that memory each layer's is; returns the output.
  Tensor place() {
    const Chain& chain = call_->chain;
    const T* const output = data<T>(kept_);
    const T* next = output + chain.rows * chain.widths.back();
    for (int64_t i = 0; i < chain.layers(); ++i) {
      const bool serves = output_serves(chain, i, call_->activations[i]);
      saved_.push_back(serves ? output : next);
      if (!serves) next += chain.rows * chain.widths[i + 1];
    }
    Ints sizes = sizes_;
    sizes.back() = chain.widths.back();
    return as_sizes(output, sizes);
  }

  void take_gradients(const Tensor& grad_output, bool input_wanted, const bool* wanted, const T** gradients) {
    const Chain& chain = call_->chain;
    PerLayer<const T*> weights;
    int64_t count = 0;
    for (int64_t i = 0; i < chain.layers(); ++i) {
      weights.push_back(data<T>(call_->weight(i)));
      if (wanted[i]) count = checked_sum(count, chain.widths[i] * chain.widths[i + 1]);
      if (biased_ && wanted[layers_ + i]) count = checked_sum(count, chain.widths[i + 1]);
    }
    own_gradients_.reset(new T[static_cast<size_t>(count)]);
    T* next = own_gradients_.get();
    auto layers = backward_layers<T>(chain, call_->activations, data<T>(rows_), weights, saved_);
    for (int64_t i = 0; i < chain.layers(); ++i) {
      MlpLayerBackward<T>& layer = layers[i];
      if (wanted[i]) gradients[i] = layer.grad_weight = std::exchange(next, next + layer.in * layer.out);
      if (biased_ && wanted[layers_ + i])
        gradients[layers_ + i] = layer.grad_bias = std::exchange(next, next + layer.out);
    }
    if (input_wanted) grad_input_ = new_tensor(sizes_, kDtypeOf<T>);
    run_backward<T>(chain, layers, data<T>(grad_output), input_wanted ? mutable_data<T>(grad_input_) : nullptr);
  }

  void take_gradients_by_layers(const Tensor& gradient, bool input_wanted, const bool* wanted, const T** gradients) {
    const Chain& chain = call_->chain;
    const Tensor grad_output = as_sizes(data<T>(gradient), {chain.rows, chain.widths.back()});
    TensorList saved;
    for (int64_t i = 0; i < chain.layers(); ++i)
      saved.push_back(as_sizes(saved_[i], {chain.rows, chain.widths[i + 1]}));
    const auto any = [&](const bool* first) {
      return std::any_of(first, first + layers_, [](bool one) { return one; });
    };
    const MlpWanted of_all{input_wanted, any(wanted), biased_ && any(wanted + layers_)};
    auto [input, weights, biases] = backward_by_layers<T>(
        chain, grad_output, rows_, borrowed(this->parameters_, 0, layers_), call_->activations, saved, of_all);
    for (size_t i = 0; i < layers_; ++i) {
      if (wanted[i]) gradients[i] = this->keep(std::move(weights[i]), i);
      if (biased_ && wanted[layers_ + i]) gradients[layers_ + i] = this->keep(std::move(biases[i]), layers_ + i);
    }
    grad_input_ = std::move(input);
  }

  size_t layers_;
  bool biased_;
  std::string activations_;
  Ints sizes_;  // of the input
  Tensor rows_, kept_, grad_input_;
  std::unique_ptr<T[]> own_gradients_;  // of all parameters: a tensor takes a fifth of a microsecond longer
  std::optional<MlpCall> call_;
  PerLayer<const T*> saved_;  // of each layer what backward needs
};

// "rnn weights mode layers bidirectional batch_first last dropout": the output of all steps, or the last layer's final
// h; dropout: the probability, its bits, with which elements are dropped between layers.
template <class T>
class RnnStage : public Stage<T> {
 public:
  explicit RnnStage(Words& words) {
    this->count = static_cast<size_t>(words.number(1, 1 << 16));
    mode_ = words.number(0, static_cast<int64_t>(RnnMode::count) - 1);
    layers_ = words.number(1, 1 << 16);
    bidirectional_ = words.number(0, 1);
    batch_first_ = words.number(0, 1);
    last_ = words.number(0, 1);
    drops_ = probability(words);
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of an rnn than it should");
    FASTNN_CHECK(!(last_ && bidirectional_), kTrainingStep, ": the last step of both directions is not supported");
  }

  Tensor forward(const Tensor& input, const TensorList& parameters) override {
    FASTNN_CHECK(input.dim() == 3, kTrainingStep, ": expected a recurrent layer's input to be 3D");
    this->hold(input, parameters);
    draw_masks();
    auto [output, state, reserve] =
        rnn_with_reserve(input, std::nullopt, {}, parameters, masks_, mode_, layers_, bidirectional_, batch_first_);
    output_ = std::move(output);
    final_h_ = std::move(state[0]);
    reserve_ = std::move(reserve);
    return result();
  }
  void save(TensorList& saved) override {
    saved.push_back(std::move(output_));
    saved.push_back(std::move(reserve_));
    if (last_) saved.push_back(std::move(final_h_));
    if (masks_) saved.push_back(std::move(*masks_));
  }
  Tensor restore(const Tensor& input, const TensorList& parameters, SavedReader<T>& saved) override {
    FASTNN_CHECK(input.dim() == 3, kTrainingStep, ": expected a recurrent layer's input to be 3D");
    this->hold(input, parameters);
    output_ = saved.take();
    FASTNN_CHECK(output_.dim() == 3, kTrainingStep, ": expected a recurrent layer's output to be 3D");
    reserve_ = saved.take();
    if (last_) final_h_ = saved.take({layers_, output_.size(batch_first_ ? 0 : 1), output_.size(2)});
    if (has_masks()) masks_ = saved.take();
    return result();
  }

  Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, const T** gradients) override {
    std::vector<OptionalTensor> grad_state(entry_of(static_cast<RnnMode>(mode_)).states);
    OptionalTensor grad_output;
    (last_ ? grad_state[0] : grad_output) = gradient.borrow();
    const bool any = std::any_of(wanted, wanted + this->count, [](bool one) { return one; });
    auto [input, state, weights] =
        rnn_backward(grad_output, grad_state, this->input_, std::nullopt, {}, this->parameters_, masks_, output_,
                     reserve_, mode_, layers_, bidirectional_, batch_first_, input_wanted, false, any);
    for (size_t i = 0; i < this->count; ++i) {
      if (wanted[i]) gradients[i] = this->keep(std::move(weights[i]), i);
    }
    return std::move(input);
  }

 private:
  bool has_masks() const { return drops_ > 0 && layers_ > 1; }
  // As fastnn/ops/rnn.py draws them, so that a seed gives the same elements.
  void draw_masks() {
    if (!has_masks()) return;
    const Tensor& recurrent = this->parameters_[std::min<size_t>(1, this->count - 1)];
    FASTNN_CHECK(recurrent.dim() == 2, kTrainingStep, ": expected a recurrent layer's weights to be 2D");
    const int64_t rows = checked_product(this->input_.size(0), this->input_.size(1));
    const int64_t width = recurrent.size(1) * (bidirectional_ ? 2 : 1);
    masks_ = new_tensor({layers_ - 1, rows, width}, kDtypeOf<T>);
    T* const masks = mutable_data<T>(*masks_);
    for (int64_t layer = 0; layer < layers_ - 1; ++layer) {
      draw_scales<T>(drops_, as_sizes(masks + layer * rows * width, {rows, width}));
    }
  }
  Tensor result() const {
    if (!last_) return output_.borrow();
    const int64_t batch = final_h_.size(1), width = final_h_.size(2);
    return as_sizes(data<T>(final_h_) + (layers_ - 1) * batch * width, {batch, width});
  }

  int64_t mode_, layers_;
  bool bidirectional_, batch_first_, last_;
  double drops_;
  Tensor output_, final_h_, reserve_;
  OptionalTensor masks_;
};

// "last batch_first": the last step of a recurrent layer's output.
template <class T>
class LastStage : public Stage<T> {
 public:
  explicit LastStage(Words& words) {
    batch_first_ = words.number(0, 1);
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of a last step than it should");
  }
  Tensor forward(const Tensor& input, const TensorList&) override {
    FASTNN_CHECK(input.dim() == 3, kTrainingStep, ": expected what the last step is taken of to be 3D");
    this->input_ = input.stride(2) == 1 ? input.borrow() : dense(input);
    const int64_t batch = input.size(1 - steps_dim()), width = input.size(2);
    FASTNN_CHECK(input.size(steps_dim()) > 0, kTrainingStep, ": expected a recurrent layer's output to have steps");
    output_ = new_tensor({batch, width}, kDtypeOf<T>);
    for (int64_t i = 0; i < batch; ++i) {
      std::copy_n(data<T>(this->input_) + place(this->input_, i), width, mutable_data<T>(output_) + i * width);
    }
    return output_.borrow();
  }
  void save(TensorList&) override {}
  Tensor restore(const Tensor& input, const TensorList& none, SavedReader<T>&) override { return forward(input, none); }
  Tensor backward(const Tensor& gradient, bool input_wanted, const bool*, const T**) override {
    if (!input_wanted) return Tensor();
    const Tensor grad_output = dense(gradient);
    Tensor result = new_tensor(sizes_of(this->input_), kDtypeOf<T>);
    std::fill_n(mutable_data<T>(result), result.numel(), T(0));
    const int64_t width = output_.size(1);
    for (int64_t i = 0; i < output_.size(0); ++i) {
      std::copy_n(data<T>(grad_output) + i * width, width, mutable_data<T>(result) + place(result, i));
    }
    return result;
  }

 private:
  int64_t steps_dim() const { return batch_first_ ? 1 : 0; }
  // Where a sequence's last step begins.
  int64_t place(const Tensor& steps, int64_t sequence) const {
    return sequence * steps.stride(1 - steps_dim()) + (steps.size(steps_dim()) - 1) * steps.stride(steps_dim());
  }

  bool batch_first_;
  Tensor output_;
};

// "activation name": one of mlp's, on its own.
template <class T>
class ActivationStage : public Stage<T> {
 public:
  explicit ActivationStage(Words& words) {
    activation_ = words.activation();
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of an activation than it should");
  }
  // With the input's strides, where it has no gaps, since a dropout draws in the order in which elements lie.
  Tensor forward(const Tensor& input, const TensorList&) override {
    output_ = new_like<T>(input);
    const bool alike = input.is_contiguous() || same_strides(input, output_);
    this->input_ = alike ? input.borrow() : dense(input);
    if (!alike) output_ = new_tensor(sizes_of(input), kDtypeOf<T>);
    activate<T>(activation_, data<T>(this->input_), output_.numel(), mutable_data<T>(output_));
    return output_.borrow();
  }
  void save(TensorList& saved) override { saved.push_back(std::move(output_)); }
  Tensor restore(const Tensor& input, const TensorList&, SavedReader<T>& saved) override {
    this->input_ = input.borrow();
    output_ = saved.take_strided(sizes_of(input));
    return output_.borrow();
  }
  Tensor backward(const Tensor& gradient, bool input_wanted, const bool*, const T**) override {
    if (!input_wanted) return Tensor();
    const Tensor grad_output = dense(gradient), kept = dense(saves_input(activation_) ? this->input_ : output_);
    Tensor result = new_tensor(sizes_of(output_), kDtypeOf<T>);
    const auto& elementwise = mlp_kernels().elementwise.template get<T>();
    parallel_range(result.numel(), kActivationWork, [&](int64_t first, int64_t last) {
      elementwise.gradient(activation_, data<T>(grad_output) + first, data<T>(kept) + first,
                           mutable_data<T>(result) + first, last - first);
    });
    return result;
  }

 private:
  static bool same_strides(const Tensor& one, const Tensor& other) {
    const Sizes a = one.strides(), b = other.strides();
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }

  Activation activation_;
  Tensor output_;
};

// "flatten": all dimensions but the batch become one; "flatten features": rows of so many elements, as by view(-1, n).
template <class T>
class FlattenStage : public Stage<T> {
 public:
  explicit FlattenStage(Words& words) {
    if (words.stage_ends()) return;
    features_ = words.size();
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of a flatten than it should");
  }
  Tensor forward(const Tensor& input, const TensorList&) override {
    this->input_ = dense(input);
    sizes_ = sizes_of(this->input_);
    FASTNN_CHECK(!sizes_.empty(), kTrainingStep, ": expected what is flattened to have a batch");
    if (features_ == 0) return as_sizes(data<T>(this->input_), {sizes_[0], product(sizes_, 1, sizes_.size())});
    const int64_t count = this->input_.numel();
    FASTNN_CHECK(count % features_ == 0, kTrainingStep, ": shape '[-1, ", features_, "]' is invalid for input of size ",
                 count);
    return as_sizes(data<T>(this->input_), {count / features_, features_});
  }
  void save(TensorList&) override {}
  Tensor restore(const Tensor& input, const TensorList& none, SavedReader<T>&) override { return forward(input, none); }
  Tensor backward(const Tensor& gradient, bool input_wanted, const bool*, const T**) override {
    if (!input_wanted) return Tensor();
    this->gradients_.push_back(dense(gradient));
    return as_sizes(data<T>(this->gradients_.back()), sizes_);
  }

 private:
  int64_t features_ = 0;
  Ints sizes_;
};

// "dropout probability"
template <class T>
class DropoutStage : public Stage<T> {
 public:
  explicit DropoutStage(Words& words) {
    drops_ = probability(words);
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of a dropout than it should");
  }
  Tensor forward(const Tensor& input, const TensorList&) override {
    // Of the input's strides, since stock draws in the order in which elements lie.
    scales_ = new_like<T>(input);
    draw_scales<T>(drops_, scales_);
    output_ = times(input);
    return output_.borrow();
  }
  void save(TensorList& saved) override {
    saved.push_back(std::move(output_));
    saved.push_back(std::move(scales_));
  }
  Tensor restore(const Tensor& input, const TensorList&, SavedReader<T>& saved) override {
    output_ = saved.take_strided(sizes_of(input));
    scales_ = saved.take_strided(sizes_of(input));
    return output_.borrow();
  }
  Tensor backward(const Tensor& gradient, bool input_wanted, const bool*, const T**) override {
    return input_wanted ? times(gradient) : Tensor();
  }

 private:
  Tensor times(const Tensor& tensor) const {
    if (!tensor.is_contiguous() || !scales_.is_contiguous()) return multiplied(tensor, scales_);
    Tensor result = new_tensor(sizes_of(tensor), kDtypeOf<T>);
    const T *from = data<T>(tensor), *scales = data<T>(scales_);
    T* const to = mutable_data<T>(result);
    for (int64_t i = 0, count = result.numel(); i < count; ++i) to[i] = from[i] * scales[i];
    return result;
  }

  double drops_;
  Tensor output_, scales_;
};

}  // namespace fastnn
