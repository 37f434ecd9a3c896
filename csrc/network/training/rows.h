// linear, rnn, embedding, pick, gather_rows and add_rows in training.
#pragma once

#include "../../ops/mlp_by_layers.h"
#include "../../ops/mlp_run.h"
#include "../../ops/random.h"
#include "../../ops/rnn_problem.h"
#include "../layers/embedding.h"
#include "layer.h"

namespace fastnn {

// A linear layer with its activation. Layers that follow one another become one call of mlp's kernels.
template <class T>
class LinearTraining : public TrainingLayer<T> {
 public:
  explicit LinearTraining(const ProgramLine& line)
      : activations_(line.text("activation")), layers_(1), biased_(line.has("bias")) {
    line.activation();  // raises where no activation has that name
    this->inputs = {line.input("input"), line.input("weight")};
    this->take(line, {"bias"});
  }
  bool absorb(const TrainingLayer<T>& other, size_t which) override {
    if (which != 0) return false;
    if (const std::string_view activation = other.activation_text(); !activation.empty()) {
      const size_t last = activations_.rfind('|') + 1;  // or 0, where there is no bar
      if (activations_.compare(last, std::string::npos, "identity") != 0) return false;
      activations_.replace(last, std::string::npos, activation);
      return true;
    }
    const auto* const next = dynamic_cast<const LinearTraining*>(&other);
    if (!next || next->biased_ != biased_ || layers_ + next->layers_ > kMostLayers) return false;
    // The weights of all layers come first, then the biases of all.
    const auto at = [](std::vector<int64_t>& numbers, size_t i) { return numbers.begin() + static_cast<ptrdiff_t>(i); };
    std::vector<int64_t> theirs = next->inputs;
    if (biased_) this->inputs.insert(this->inputs.end(), at(theirs, 1 + next->layers_), theirs.end());
    this->inputs.insert(at(this->inputs, 1 + layers_), at(theirs, 1), at(theirs, 1 + next->layers_));
    activations_ += "|" + next->activations_;
    layers_ += next->layers_;
    return true;
  }

  void forward(Tensor* outputs) override {
    const Tensor& input = this->given[0];
    sizes_ = sizes_of(input);
    FASTNN_CHECK(!sizes_.empty(), kTrainingStep, ": expected a linear layer's input to have features");
    parameters_.clear();
    // Backward reads weights and biases as contiguous, and tied layers have a weight that is the transpose of another.
    for (size_t i = 1; i < this->given.size(); ++i) parameters_.push_back(dense(this->given[i]));
    input_ = dense(input);
    rows_ = rows_of(input_);
    call_.emplace(kTrainingStep, rows_, parameters_, activations_);
    const Chain& chain = call_->chain;
    int64_t count = checked_product(chain.rows, chain.widths.back());
    for (int64_t i = 0; i < chain.layers(); ++i) {
      if (output_serves(chain, i, call_->activations[i])) continue;
      count = checked_sum(count, checked_product(chain.rows, chain.widths[i + 1]));
    }
    kept_ = new_tensor({count}, kDtypeOf<T>);
    const T* const output = data<T>(kept_);
    const T* next = output + chain.rows * chain.widths.back();
    saved_ = {};
    PerLayer<T*> written;
    for (int64_t i = 0; i < chain.layers(); ++i) {
      const bool serves = output_serves(chain, i, call_->activations[i]);
      saved_.push_back(serves ? output : next);
      written.push_back(serves ? nullptr : const_cast<T*>(next));
      if (!serves) next += chain.rows * chain.widths[i + 1];
    }
    run_forward<T>(*call_, mutable_data<T>(kept_), written);
    Ints sizes = sizes_;
    sizes.back() = chain.widths.back();
    outputs[0] = as_sizes(output, sizes);
  }

  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    const Chain& chain = call_->chain;
    const Tensor grad_output = dense(gradients[0]);
    if (goes_by_layers(chain, true)) {
      take_gradients_by_layers(grad_output, wanted, results);
    } else {
      take_gradients(grad_output, wanted, results);
    }
  }
  void release() override { input_ = rows_ = kept_ = Tensor(); }
  void forget() override {
    call_.reset();
    parameters_.clear();
    release();
    own_gradients_.reset();
  }

 private:
  Tensor rows_of(const Tensor& input) const {
    return as_sizes(data<T>(input), {product(sizes_, 0, sizes_.size() - 1), sizes_.back()});
  }

  void take_gradients(const Tensor& grad_output, const bool* wanted, Gradient<T>* results) {
    const Chain& chain = call_->chain;
    PerLayer<const T*> weights;
    int64_t count = 0;
    for (size_t i = 0; i < layers_; ++i) {
      const int64_t at = static_cast<int64_t>(i), weight = chain.widths[at] * chain.widths[at + 1];
      weights.push_back(data<T>(call_->weight(at)));
      if (wanted[1 + i] && weight < kLarge) count = checked_sum(count, weight);
      if (biased_ && wanted[1 + layers_ + i]) count = checked_sum(count, chain.widths[at + 1]);
    }
    own_gradients_.emplace(count);
    T* next = own_gradients_->get();
    const Tensor input = dense(input_);  // whose memory its owner may have exchanged since forward
    auto layers = backward_layers<T>(chain, call_->activations, data<T>(input), weights, saved_);
    for (size_t i = 0; i < layers_; ++i) {
      MlpLayerBackward<T>& layer = layers[static_cast<int64_t>(i)];
      if (wanted[1 + i] && layer.in * layer.out >= kLarge) {
        results[1 + i] = {new_tensor({layer.out, layer.in}, kDtypeOf<T>), nullptr, true};
        layer.grad_weight = mutable_data<T>(results[1 + i].tensor);
      } else if (wanted[1 + i]) {
        results[1 + i].memory = layer.grad_weight = std::exchange(next, next + layer.in * layer.out);
      }
      if (biased_ && wanted[1 + layers_ + i]) {
        results[1 + layers_ + i].memory = layer.grad_bias = std::exchange(next, next + layer.out);
      }
    }
    Tensor grad_input;
    if (wanted[0]) grad_input = new_tensor(sizes_, kDtypeOf<T>);
    run_backward<T>(chain, layers, data<T>(grad_output), wanted[0] ? mutable_data<T>(grad_input) : nullptr);
    if (wanted[0]) results[0] = {std::move(grad_input), nullptr, true};
  }

  void take_gradients_by_layers(const Tensor& gradient, const bool* wanted, Gradient<T>* results) {
    const Chain& chain = call_->chain;
    const Tensor grad_output = as_sizes(data<T>(gradient), {chain.rows, chain.widths.back()});
    TensorList saved, weights;
    for (int64_t i = 0; i < chain.layers(); ++i) {
      saved.push_back(as_sizes(saved_[i], {chain.rows, chain.widths[i + 1]}));
      weights.push_back(parameters_[static_cast<size_t>(i)].borrow());
    }
    const auto any = [&](const bool* first) {
      return std::any_of(first, first + layers_, [](bool one) { return one; });
    };
    const MlpWanted of_all{wanted[0], any(wanted + 1), biased_ && any(wanted + 1 + layers_)};
    const Tensor input = dense(input_);  // whose memory its owner may have exchanged since forward
    auto [grad_input, grad_weights, grad_biases] =
        backward_by_layers<T>(chain, grad_output, rows_of(input), weights, call_->activations, saved, of_all);
    for (size_t i = 0; i < layers_; ++i) {
      if (wanted[1 + i]) results[1 + i] = {std::move(grad_weights[i]), nullptr, true};
      if (biased_ && wanted[1 + layers_ + i]) results[1 + layers_ + i] = {std::move(grad_biases[i]), nullptr, true};
    }
    if (wanted[0]) results[0] = {reshaped(grad_input, sizes_), nullptr, true};
  }

  // The elements from which on a weight's gradient is a tensor of its own, which a caller gets without a copy.
  static constexpr int64_t kLarge = 4096;

  std::string activations_;
  size_t layers_;
  bool biased_;
  Ints sizes_;  // of the input
  TensorList parameters_;
  Tensor input_, kept_;
  Tensor rows_;                                // the input as forward reads it
  std::optional<KeptArray<T>> own_gradients_;  // of all parameters
  std::optional<MlpCall> call_;
  PerLayer<const T*> saved_;  // of each layer what backward needs
};

// The probability with which elements are dropped.
inline double probability(const ProgramLine& line, const char* name) {
  const double drops = line.real(name);
  if (!(drops >= 0 && drops <= 1)) line.refuse("dropout probability has to be between 0 and 1, but got ", drops);
  return drops;
}

// Draws the numbers by which dropout multiplies elements, as torch draws them: a seed gives the same elements as
// stock's. scales: a tensor without gaps.
template <class T>
void draw_scales(double drops, const Tensor& scales) {
  T* const to = mutable_data<T>(scales);
  const int64_t count = scales.numel();
  if (drops == 1) return static_cast<void>(std::fill_n(to, count, T(0)));
  const T scale = static_cast<T>(1 - drops);
  if (draw_as_torch<T>(1 - drops, T(1) / scale, count, to)) return;
  draw_ones(scales, 1 - drops);
  parallel_range(count, kCopyWork, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) to[i] /= scale;
  });
}

// The results are the output of all steps or of the last step, and then as many final states as the line names.
template <class T>
class RnnTraining : public TrainingLayer<T> {
 public:
  explicit RnnTraining(const ProgramLine& line)
      : bidirectional_(line.flag("bidirectional")),
        batch_first_(line.flag("batch_first")),
        last_(line.flag("last")),
        drops_(probability(line, "dropout")) {
    const std::string_view mode = line.text("mode");
    while (mode_ < static_cast<int64_t>(RnnMode::count) && mode != kRnnModes[mode_].name) ++mode_;
    if (mode_ == static_cast<int64_t>(RnnMode::count)) line.refuse("there is no mode \"", std::string(mode), "\"");
    const size_t states = entry_of(static_cast<RnnMode>(mode_)).states;
    this->inputs = {line.input("input")};
    this->take(line, {"h", "c"});
    states_ = this->inputs.size() - 1;
    if ((states_ != 0 && states_ != states) || line.has("c") != (states_ == 2))
      line.refuse("expected all of its states, or none");
    if (line.outputs.size() > 1 + states) line.refuse("it gives an output and ", states, " states");
    if (last_ && bidirectional_) line.refuse("the last step of both directions is not supported in training");
    const auto found = line.inputs.find("weights");
    if (found == line.inputs.end()) line.refuse("expected weights=...");
    this->inputs.insert(this->inputs.end(), found->second.begin(), found->second.end());
    const size_t each = static_cast<size_t>(2 + 2 * line.flag("bias") + line.flag("projected")) * (1 + bidirectional_);
    if (found->second.size() % each) line.refuse("expected ", each, " weights a layer, got ", found->second.size());
    layers_ = static_cast<int64_t>(found->second.size() / each);
    gives_ = line.outputs.size();
  }

  void forward(Tensor* outputs) override {
    const int64_t rank = this->given[0].dim();
    is_one_ = rank == 2;  // a sequence by itself, without a batch
    FASTNN_CHECK(rank == 3 || (is_one_ && !(last_ && batch_first_)), kTrainingStep,
                 ": expected a recurrent layer's input to be 3D");
    input_ = as_batch(this->given[0], batch_dim());
    state_in_.clear();
    weights_.clear();
    for (size_t i = 1; i < this->given.size(); ++i) {
      if (i <= states_) {
        state_in_.push_back(as_batch(this->given[i], 1));
      } else {
        weights_.push_back(this->given[i].borrow());
      }
    }
    draw_masks();
    std::tie(output_, state_, reserve_) = rnn_with_reserve(input_, std::nullopt, state_in_, weights_, masks_, mode_,
                                                           layers_, bidirectional_, batch_first_);
    outputs[0] = last_ ? without_batch(last_step(), 0) : without_batch(output_, batch_dim());
    for (size_t i = 1; i < gives_; ++i) outputs[i] = without_batch(state_[i - 1], 1);
  }

  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    std::vector<OptionalTensor> grad_state(entry_of(static_cast<RnnMode>(mode_)).states);
    for (size_t i = 1; i < gives_; ++i) {
      if (gradients[i].defined()) grad_state[i - 1] = as_batch(gradients[i], 1);
    }
    OptionalTensor grad_output;
    if (gradients[0].defined()) {
      const Tensor given = as_batch(gradients[0], last_ ? 0 : batch_dim());
      if (!last_) {
        grad_output = given;
      } else if (gives_ == 1) {
        grad_state[0] = given;
      } else {  // it is the last layer's final h, too
        grad_output = of_last_step(given);
      }
    }
    const bool state_wanted = std::any_of(wanted + 1, wanted + 1 + states_, [](bool one) { return one; });
    const bool any = std::any_of(wanted + 1 + states_, wanted + this->given.size(), [](bool one) { return one; });
    auto [input, states, weights] =
        rnn_backward(grad_output, grad_state, input_, std::nullopt, state_in_, weights_, masks_, output_, reserve_,
                     mode_, layers_, bidirectional_, batch_first_, wanted[0], state_wanted, any);
    if (wanted[0]) results[0].tensor = without_batch(input, batch_dim());
    for (size_t i = 1; i < this->given.size(); ++i) {
      if (!wanted[i]) continue;
      if (i <= states_) {
        results[i].tensor = without_batch(states[i - 1], 1);
      } else {
        results[i] = {std::move(weights[i - 1 - states_]), nullptr, true};
      }
    }
  }
  Tensor drawn() const override { return masks_ ? *masks_ : Tensor(); }
  void release() override {
    input_ = output_ = reserve_ = Tensor();
    masks_.reset();
  }
  void forget() override {
    release();
    state_in_.clear();
    state_.clear();
  }

 private:
  int64_t batch_dim() const { return batch_first_ ? 0 : 1; }
  Tensor as_batch(const Tensor& tensor, int64_t dim) const {
    return is_one_ ? stock("aten::unsqueeze", "", tensor, dim) : tensor.borrow();
  }
  Tensor without_batch(const Tensor& tensor, int64_t dim) const {
    return is_one_ ? stock("aten::squeeze", "dim", tensor, dim) : Tensor(tensor);
  }
  // Draws the masks as fastnn/ops/rnn.py does, so that a seed gives the same elements.
  void draw_masks() {
    masks_.reset();
    if (drops_ == 0 || layers_ < 2) return;
    const Tensor& recurrent = weights_[std::min<size_t>(1, weights_.size() - 1)];
    FASTNN_CHECK(recurrent.dim() == 2, kTrainingStep, ": expected a recurrent layer's weights to be 2D");
    const int64_t rows = checked_product(input_.size(0), input_.size(1));
    const int64_t width = recurrent.size(1) * (bidirectional_ ? 2 : 1);
    masks_ = new_tensor({layers_ - 1, rows, width}, kDtypeOf<T>);
    T* const masks = mutable_data<T>(*masks_);
    for (int64_t layer = 0; layer < layers_ - 1; ++layer) {
      draw_scales<T>(drops_, as_sizes(masks + layer * rows * width, {rows, width}));
    }
  }
  // The last layer's final h.
  Tensor last_step() const {
    const Tensor& h = state_[0];
    const int64_t batch = h.size(1), width = h.size(2);
    return as_sizes(data<T>(h) + (layers_ - 1) * batch * width, {batch, width});
  }
  // The gradient of all steps, made of the last step's: it is zero for the others.
  Tensor of_last_step(const Tensor& gradient) const {
    const int64_t dim = batch_first_ ? 1 : 0;
    return stock("aten::select_backward", "", gradient, sizes_of(output_), dim, output_.size(dim) - 1);
  }

  int64_t mode_ = 0, layers_;
  bool bidirectional_, batch_first_, last_, is_one_ = false;
  double drops_;
  size_t states_, gives_;  // states that it takes, and results that it gives
  TensorList state_in_, weights_, state_;
  Tensor input_, output_, reserve_;
  OptionalTensor masks_;
};

template <class T>
class EmbeddingTraining : public TrainingLayer<T> {
 public:
  explicit EmbeddingTraining(const ProgramLine& line)
      : column_(column_of(line)), padding_(line.integer("padding_idx", -1, std::numeric_limits<int64_t>::max())) {
    this->inputs = {line.input("input"), line.input("weight")};
  }
  void forward(Tensor* outputs) override {
    const Tensor &numbers = this->given[0], &weight = this->given[1];
    FASTNN_CHECK(numbers.scalar_type() == ScalarType::Long && weight.dim() == 2, kTrainingStep,
                 ": expected an embedding's input to be int64 and its weight to be 2D");
    const Ints sizes = sizes_of(numbers);
    // Nobody else can change a copy before backward.
    numbers_ = copied(column_ ? stock("aten::select", "int", numbers, static_cast<int64_t>(column_->dim(sizes)),
                                      column_->index(sizes))
                              : numbers.borrow());
    check_numbers();
    outputs[0] = stock("aten::embedding", "", weight, numbers_, padding_, false, false);
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    if (wanted[1]) {
      results[1] = {
          stock("aten::embedding_dense_backward", "", gradients[0], numbers_, this->given[1].size(0), padding_, false),
          nullptr, true};
    }
  }
  void forget() override { numbers_ = Tensor(); }
  size_t integers() const override { return 1; }

 private:
  void check_numbers() const {
    const Tensor all = dense(numbers_);
    const int64_t rows = this->given[1].size(0);
    for (int64_t i = 0, count = all.numel(); i < count; ++i) {
      const int64_t number = data<int64_t>(all)[i];
      FASTNN_CHECK(number >= 0 && number < rows, kTrainingStep, ": index out of range in self");
    }
  }

  std::optional<Selection> column_;
  int64_t padding_;
  Tensor numbers_;
};

template <class T>
class PickTraining : public TrainingLayer<T> {
 public:
  explicit PickTraining(const ProgramLine& line) : wraps_(line.flag("wraps")), keepdim_(line.flag("keepdim")) {
    this->take(line, {"rows", "places", "input"});
  }
  void forward(Tensor* outputs) override {
    const Tensor from = dense(input());
    const Ints sizes = sizes_of(from);
    const Tensor places = dense(this->given[integers() - 1]), rows = integers() > 1 ? dense(this->given[0]) : Tensor();
    FASTNN_CHECK(integers() == 1 || same_sizes(rows, places), kTrainingStep, ": expected rows of indices of one size");
    const Ints results = picked_sizes(sizes_of(places), sizes, keepdim_);
    picked_.emplace(integers() > 1 ? data<int64_t>(rows) : nullptr, data<int64_t>(places), places.numel(), sizes,
                    wraps_);
    inner_ = product(sizes, 2, sizes.size());
    outputs[0] = new_tensor(results, kDtypeOf<T>);
    T* to = mutable_data<T>(outputs[0]);
    for (const int64_t place : picked_->places()) to = std::copy_n(data<T>(from) + place * inner_, inner_, to);
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    if (!wanted[integers()]) return;
    const Tensor gradient = dense(gradients[0]);
    Tensor result = new_tensor(sizes_of(input()), kDtypeOf<T>);
    T* const to = mutable_data<T>(result);
    std::fill_n(to, result.numel(), T(0));
    const T* from = data<T>(gradient);
    for (const int64_t place : picked_->places()) {  // A place may have been taken several times.
      for (int64_t i = 0; i < inner_; ++i) to[place * inner_ + i] += *from++;
    }
    results[integers()] = {std::move(result), nullptr, true};
  }
  void forget() override { picked_.reset(); }
  size_t integers() const override { return this->inputs.size() - 1; }

 private:
  const Tensor& input() const { return this->given.back(); }
  bool wraps_, keepdim_;
  std::optional<Picked> picked_;
  int64_t inner_ = 0;
};

template <class T>
class GatherRowsTraining : public TrainingLayer<T> {
 public:
  explicit GatherRowsTraining(const ProgramLine& line) : rank_(line.integer("rank", 0, 16)) {
    this->take(line, {"places", "input"});
  }
  size_t integers() const override { return 1; }
  void forward(Tensor* outputs) override {
    const Tensor places = dense(this->given[0]), from = dense(this->given[1]);
    sizes_ = sizes_of(from);
    outputs[0] = new_tensor(gathered_sizes(sizes_of(places), sizes_, rank_), kDtypeOf<T>);
    numbers_.emplace(data<int64_t>(places), places.numel(), sizes_[0]);
    numbers_->gather(data<T>(from), product(sizes_, 1, sizes_.size()), mutable_data<T>(outputs[0]));
  }
  // A row may have been taken several times.
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    if (!wanted[1]) return;
    const Tensor gradient = dense(gradients[0]);
    Tensor result = new_tensor(sizes_, kDtypeOf<T>);
    std::fill_n(mutable_data<T>(result), result.numel(), T(0));
    numbers_->add(data<T>(gradient), product(sizes_, 1, sizes_.size()), mutable_data<T>(result));
    results[1] = {std::move(result), nullptr, true};
  }
  void forget() override { numbers_.reset(); }

 private:
  int64_t rank_;
  std::optional<RowNumbers> numbers_;
  Ints sizes_;
};

template <class T>
class AddRowsTraining : public TrainingLayer<T> {
 public:
  explicit AddRowsTraining(const ProgramLine& line) { this->take(line, {"places", "input", "source"}); }
  size_t integers() const override { return 1; }
  void forward(Tensor* outputs) override {
    const Tensor places = dense(this->given[0]), to = dense(this->given[1]), source = dense(this->given[2]);
    sizes_ = sizes_of(to);
    source_sizes_ = sizes_of(source);
    check_added_sizes(sizes_of(places), sizes_, source_sizes_);
    numbers_.emplace(data<int64_t>(places), places.numel(), sizes_[0]);
    outputs[0] = new_tensor(sizes_, kDtypeOf<T>);
    std::copy_n(data<T>(to), to.numel(), mutable_data<T>(outputs[0]));
    numbers_->add(data<T>(source), product(sizes_, 1, sizes_.size()), mutable_data<T>(outputs[0]));
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    if (wanted[1]) results[1].tensor = gradients[0];
    if (!wanted[2]) return;
    const Tensor gradient = dense(gradients[0]);
    Tensor result = new_tensor(source_sizes_, kDtypeOf<T>);
    numbers_->gather(data<T>(gradient), product(sizes_, 1, sizes_.size()), mutable_data<T>(result));
    results[2] = {std::move(result), nullptr, true};
  }
  void forget() override { numbers_.reset(); }

 private:
  std::optional<RowNumbers> numbers_;
  Ints sizes_, source_sizes_;
};

}  // namespace fastnn
