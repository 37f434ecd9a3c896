// The stages of a training step's chain: the ops' own forward and backward, called one after another.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "conv_problem.h"
#include "frozen_memory.h"
#include "mlp_by_layers.h"
#include "mlp_run.h"
#include "rnn_problem.h"
#include "stock.h"

namespace fastnn {

constexpr const char* kTrainingStep = "training_step";

// A tensor's memory under other sizes, while that lives.
template <class T>
Tensor as_sizes(const T* memory, const Ints& sizes) {
  Ints strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return tensor_over(memory, sizes, strides);
}

inline TensorList borrowed(const TensorList& tensors, size_t first, size_t count) {
  TensorList result;
  result.reserve(count);
  for (size_t i = first; i < first + count; ++i) result.push_back(tensors[i].borrow());
  return result;
}

// A number that is not whole, and not negative, by its bits.
inline double real_number(Words& words) {
  const int64_t bits = words.number(0, std::numeric_limits<int64_t>::max());
  double number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

inline bool same_sizes(const Tensor& one, const Tensor& other) {
  const Sizes a = one.sizes(), b = other.sizes();
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// Hands out what stages have saved, in their order.
template <class T>
class SavedReader {
 public:
  explicit SavedReader(const TensorList& saved) : saved_(saved) {}

  Tensor take() {
    FASTNN_CHECK(next_ < saved_.size(), kTrainingStep, ": there are fewer saved tensors than the program needs");
    const Tensor& tensor = saved_[next_++];
    check_plain(tensor, kTrainingStep, "saved");
    check_memory(tensor, kTrainingStep, "saved");
    return tensor.borrow();
  }
  Tensor take(const Ints& sizes) {  // contiguous, of the stages' dtype
    Tensor tensor = take();
    FASTNN_CHECK(tensor.scalar_type() == kDtypeOf<T> && tensor.is_contiguous() && sizes_of(tensor) == sizes,
                 kTrainingStep, ": expected a saved tensor of size ", to_string(sizes), ", got ",
                 to_string(tensor.sizes()));
    return tensor;
  }
  bool ends() const { return next_ == saved_.size(); }

 private:
  const TensorList& saved_;
  size_t next_ = 0;
};

// One stage of a step: forward, then backward. What backward needs lies in the stage, outputs and gradients too; `save`
// gives it away, and `restore`, in another stage of the same words, stands for the forward that it came from.
template <class T>
class Stage {
 public:
  virtual ~Stage() = default;
  virtual Tensor forward(const Tensor& input, const TensorList& parameters) = 0;
  virtual void save(TensorList& saved) = 0;
  virtual Tensor restore(const Tensor& input, const TensorList& parameters, SavedReader<T>& saved) = 0;
  // wanted: of each parameter whether its gradient is; gradients: where they are, those that there are, like their
  // parameters. Returns the input's gradient, if that is wanted.
  virtual Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, const T** gradients) = 0;
  // Writes what a step leaves behind besides its gradients, once nothing can fail any more.
  virtual void commit() {}
  size_t count = 0;  // of parameters

 protected:
  void hold(const Tensor& input, const TensorList& parameters) {
    input_ = input.borrow();
    parameters_ = borrowed(parameters, 0, parameters.size());
  }
  // Of parameter j. A convolution's gradient comes in its input's format.
  const T* keep(Tensor gradient, size_t j) {
    FASTNN_CHECK(gradient.numel() == parameters_[j].numel(), kTrainingStep, ": expected a parameter of size ",
                 to_string(gradient.sizes()), ", got ", to_string(parameters_[j].sizes()));
    gradients_.push_back(dense(std::move(gradient)));
    return data<T>(gradients_.back());
  }

  Tensor input_;
  TensorList parameters_, gradients_;
};

// "conv biased geometry..."
template <class T>
class ConvStage : public Stage<T> {
 public:
  explicit ConvStage(Words& words) {
    biased_ = words.number(0, 1);
    while (!words.stage_ends()) geometry_.push_back(words.number(0, int64_t{1} << 31));
    this->count = 1 + biased_;
  }

  Tensor forward(const Tensor& input, const TensorList& parameters) override {
    this->hold(input, parameters);
    const OptionalTensor bias = biased_ ? OptionalTensor(parameters[1].borrow()) : std::nullopt;
    std::tie(output_, winners_) = conv_relu_max_pool_with_winners(input, parameters[0], bias, geometry_, std::nullopt);
    return output_.borrow();
  }
  void save(TensorList& saved) override {
    saved.push_back(std::move(output_));
    saved.push_back(std::move(winners_));
  }
  Tensor restore(const Tensor& input, const TensorList& parameters, SavedReader<T>& saved) override {
    this->hold(input, parameters);
    output_ = saved.take();
    winners_ = saved.take();
    return output_.borrow();
  }

  Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, const T** gradients) override {
    auto [input, weight, bias] =
        conv_relu_max_pool_backward(gradient, winners_, this->input_, this->parameters_[0], geometry_, input_wanted,
                                    wanted[0], biased_ && wanted[1], std::nullopt);
    if (wanted[0]) gradients[0] = this->keep(std::move(weight), 0);
    if (biased_ && wanted[1]) gradients[1] = this->keep(std::move(bias), 1);
    return std::move(input);
  }

 private:
  bool biased_;
  Ints geometry_;
  Tensor output_, winners_;
};

// "plain_conv dims biased stride... padding... dilation... groups": torch's own, of which a batch norm takes the
// statistics before anything else may happen.
template <class T>
class PlainConvStage : public Stage<T> {
 public:
  explicit PlainConvStage(Words& words) {
    const int64_t dims = words.number(1, 3);
    biased_ = words.number(0, 1);
    for (Ints* values : {&c_.stride, &c_.padding, &c_.dilation}) {
      for (int64_t d = 0; d < dims; ++d) values->push_back(words.number(0, int64_t{1} << 31));
    }
    c_.groups = words.number(1, int64_t{1} << 31);
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of a convolution than it should");
    this->count = 1 + biased_;
  }

  Tensor forward(const Tensor& input, const TensorList& parameters) override {
    begin(input, parameters);
    output_ = convolution(input, parameters[0], biased_ ? OptionalTensor(parameters[1].borrow()) : std::nullopt, c_);
    return output_.borrow();
  }
  void save(TensorList& saved) override { saved.push_back(std::move(output_)); }
  Tensor restore(const Tensor& input, const TensorList& parameters, SavedReader<T>& saved) override {
    const Ints expected = begin(input, parameters);
    output_ = saved.take();
    FASTNN_CHECK(sizes_of(output_) == expected, kTrainingStep, ": expected a convolution's output of size ",
                 to_string(expected), ", got ", to_string(output_.sizes()));
    return output_.borrow();
  }

  Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, const T** gradients) override {
    auto [input, weight, bias] = convolution_backward(gradient, this->input_, this->parameters_[0], c_,
                                                      {input_wanted, wanted[0], biased_ && wanted[1]});
    if (wanted[0]) gradients[0] = this->keep(std::move(weight), 0);
    if (biased_ && wanted[1]) gradients[1] = this->keep(std::move(bias), 1);
    return std::move(input);
  }

 private:
  // The output's sizes. Torch's backward does not check all that its forward does.
  Ints begin(const Tensor& input, const TensorList& parameters) {
    const Tensor& weight = parameters[0];
    const int64_t rank = static_cast<int64_t>(c_.stride.size()) + 2;
    FASTNN_CHECK(input.dim() == rank && weight.dim() == rank, kTrainingStep, ": expected a ", rank,
                 "D input and weight, got ", input.dim(), "D and ", weight.dim(), "D");
    FASTNN_CHECK(input.size(1) == checked_product(weight.size(1), c_.groups) && weight.size(0) % c_.groups == 0,
                 kTrainingStep, ": a weight of size ", to_string(weight.sizes()), " and ", c_.groups,
                 " groups do not fit an input of size ", to_string(input.sizes()));
    Ints sizes{input.size(0), weight.size(0)};
    bool is_point = true, strides = false;  // of which torch's library writes the weight's gradient where it shouldn't
    for (int64_t d = 0; d < rank - 2; ++d) {
      const size_t i = static_cast<size_t>(d);
      const int64_t kernel = weight.size(d + 2);
      FASTNN_CHECK(kernel > 0 && c_.stride[i] > 0 && c_.dilation[i] > 0, kTrainingStep,
                   ": expected a convolution's kernel, stride and dilation to be positive");
      const int64_t span = checked_sum(checked_product(c_.dilation[i], kernel - 1), 1);
      const int64_t room = checked_sum(input.size(d + 2), 2 * c_.padding[i]) - span;
      FASTNN_CHECK(room >= 0, kTrainingStep, ": the kernel is larger than the padded input");
      sizes.push_back(room / c_.stride[i] + 1);
      is_point = is_point && kernel == 1;
      strides = strides || c_.stride[i] > 1;
    }
    FASTNN_CHECK(!is_point || !strides, kTrainingStep, ": a kernel of one pixel may not have strides here");
    this->hold(input, parameters);
    return sizes;
  }

  bool biased_;
  StockConvolution c_;
  Tensor output_;
};

// "batch_norm running weighted shifted momentum eps geometry...": batch norm with the statistics of the batch, ReLU and
// max-pool. Each channel is multiplied by a number, another is added: a convolution of one pixel and groups of one
// channel, whose geometry this is. Parameters: running mean and variance, weight, bias, those that there are.
template <class T>
class BatchNormStage : public Stage<T> {
 public:
  explicit BatchNormStage(Words& words) {
    for (bool* is_there : {&running_, &weighted_, &shifted_}) *is_there = words.number(0, 1);
    momentum_ = real_number(words);
    eps_ = real_number(words);
    while (!words.stage_ends()) geometry_.push_back(words.number(0, int64_t{1} << 31));
    this->count = 2 * running_ + weighted_ + shifted_;
  }

  Tensor forward(const Tensor& input, const TensorList& parameters) override {
    const int64_t channels = begin(input, parameters);
    auto [mean, variance] = channel_statistics(input);
    mean_ = std::move(mean);
    variance_ = std::move(variance);
    inverse_deviation_ = new_tensor({channels}, kDtypeOf<T>);
    const Tensor scale = new_tensor(sizes_of(ones_), kDtypeOf<T>), shift = new_tensor({channels}, kDtypeOf<T>);
    const T* const weight = weighted_ ? data<T>(parameters[2 * running_]) : nullptr;
    const T* const bias = shifted_ ? data<T>(parameters[2 * running_ + weighted_]) : nullptr;
    for (int64_t c = 0; c < channels; ++c) {
      const T inverse = T(1) / std::sqrt(data<T>(variance_)[c] + static_cast<T>(eps_));
      const T by = weight ? inverse * weight[c] : inverse;
      mutable_data<T>(inverse_deviation_)[c] = inverse;
      mutable_data<T>(scale)[c] = by;
      mutable_data<T>(shift)[c] = (bias ? bias[c] : T(0)) - data<T>(mean_)[c] * by;
    }
    std::tie(output_, winners_) =
        conv_relu_max_pool_with_winners(input, scale, OptionalTensor(shift.borrow()), geometry_, std::nullopt);
    return output_.borrow();
  }
  void save(TensorList& saved) override {
    for (Tensor* tensor : {&output_, &winners_, &mean_, &variance_, &inverse_deviation_}) {
      saved.push_back(std::move(*tensor));
    }
  }
  Tensor restore(const Tensor& input, const TensorList& parameters, SavedReader<T>& saved) override {
    const int64_t channels = begin(input, parameters);
    output_ = saved.take();
    winners_ = saved.take();
    for (Tensor* tensor : {&mean_, &variance_, &inverse_deviation_}) *tensor = saved.take({channels});
    return output_.borrow();
  }

  Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, const T** gradients) override {
    const auto normed = conv_relu_max_pool_backward(gradient, winners_, this->input_, ones_, geometry_, true, false,
                                                    false, std::nullopt);
    const size_t first = 2 * running_;
    const OptionalTensor weight = weighted_ ? OptionalTensor(this->parameters_[first].borrow()) : std::nullopt;
    auto [input, grad_weight, grad_bias] =
        batch_norm_backward(std::get<0>(normed), this->input_, weight, mean_, inverse_deviation_, eps_,
                            {input_wanted, weighted_ && wanted[first], shifted_ && wanted[first + weighted_]});
    if (weighted_ && wanted[first]) gradients[first] = this->keep(std::move(grad_weight), first);
    if (shifted_ && wanted[first + weighted_])
      gradients[first + weighted_] = this->keep(std::move(grad_bias), first + weighted_);
    return std::move(input);
  }

  void commit() override {
    if (!running_) return;
    T* const running_mean = mutable_data<T>(this->parameters_[0]);
    T* const running_variance = mutable_data<T>(this->parameters_[1]);
    const T momentum = static_cast<T>(momentum_);
    const T unbiased = static_cast<T>(elements_) / static_cast<T>(elements_ - 1);
    for (int64_t c = 0; c < mean_.numel(); ++c) {
      running_mean[c] = momentum * data<T>(mean_)[c] + (1 - momentum) * running_mean[c];
      running_variance[c] = momentum * (data<T>(variance_)[c] * unbiased) + (1 - momentum) * running_variance[c];
    }
  }

 private:
  // How many channels there are.
  int64_t begin(const Tensor& input, const TensorList& parameters) {
    FASTNN_CHECK(input.dim() >= 3, kTrainingStep, ": expected a batch norm's input to have a batch, channels and size");
    const int64_t channels = input.size(1);
    for (const Tensor& parameter : parameters) {
      FASTNN_CHECK(parameter.dim() == 1 && parameter.size(0) == channels, kTrainingStep,
                   ": expected a batch norm's parameters to have ", channels, " elements");
    }
    elements_ = input.numel() / std::max<int64_t>(channels, 1);
    FASTNN_CHECK(elements_ > 1, kTrainingStep,
                 ": Expected more than 1 value per channel when training, got input size ", to_string(input.sizes()));
    this->hold(input, parameters);
    Ints sizes(static_cast<size_t>(input.dim()), 1);
    sizes[0] = channels;
    ones_ = new_tensor(sizes, kDtypeOf<T>);
    std::fill_n(mutable_data<T>(ones_), channels, T(1));
    return channels;
  }

  bool running_, weighted_, shifted_;
  double momentum_, eps_;
  Ints geometry_;
  int64_t elements_ = 0;  // of a channel
  Tensor output_, winners_, mean_, variance_, inverse_deviation_, ones_;
};

// "mlp layers biased activations"
template <class T>
class MlpStage : public Stage<T> {
 public:
  explicit MlpStage(Words& words) {
    layers_ = static_cast<size_t>(words.number(1, 20));
    biased_ = words.number(0, 1);
    code_ = words.number(1, std::numeric_limits<int64_t>::max());
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of an mlp than it should");
    FASTNN_CHECK(Activations(kTrainingStep, code_).size() == layers_, kTrainingStep,
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
    run_forward<T>(*call_, mutable_data<T>(kept_), nullptr, saved);
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
    call_.emplace(kTrainingStep, rows_, this->parameters_, code_);
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
  int64_t code_;
  Ints sizes_;  // of the input
  Tensor rows_, kept_, grad_input_;
  std::unique_ptr<T[]> own_gradients_;  // of all parameters: a tensor takes a fifth of a microsecond longer
  std::optional<Forward> call_;
  PerLayer<const T*> saved_;  // of each layer what backward needs
};

// "rnn weights mode layers bidirectional batch_first last": the output of all steps, or the last layer's final h.
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
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of an rnn than it should");
    FASTNN_CHECK(!(last_ && bidirectional_), kTrainingStep, ": the last step of both directions is not supported");
  }

  Tensor forward(const Tensor& input, const TensorList& parameters) override {
    FASTNN_CHECK(input.dim() == 3, kTrainingStep, ": expected a recurrent layer's input to be 3D");
    this->hold(input, parameters);
    auto [output, state, reserve] = rnn_with_reserve(input, std::nullopt, {}, parameters, std::nullopt, mode_, layers_,
                                                     bidirectional_, batch_first_);
    output_ = std::move(output);
    final_h_ = std::move(state[0]);
    reserve_ = std::move(reserve);
    return result();
  }
  void save(TensorList& saved) override {
    saved.push_back(std::move(output_));
    saved.push_back(std::move(reserve_));
    if (last_) saved.push_back(std::move(final_h_));
  }
  Tensor restore(const Tensor& input, const TensorList& parameters, SavedReader<T>& saved) override {
    FASTNN_CHECK(input.dim() == 3, kTrainingStep, ": expected a recurrent layer's input to be 3D");
    this->hold(input, parameters);
    output_ = saved.take();
    FASTNN_CHECK(output_.dim() == 3, kTrainingStep, ": expected a recurrent layer's output to be 3D");
    reserve_ = saved.take();
    if (last_) final_h_ = saved.take({layers_, output_.size(batch_first_ ? 0 : 1), output_.size(2)});
    return result();
  }

  Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, const T** gradients) override {
    std::vector<OptionalTensor> grad_state(states_of(static_cast<RnnMode>(mode_)));
    OptionalTensor grad_output;
    (last_ ? grad_state[0] : grad_output) = gradient.borrow();
    const bool any = std::any_of(wanted, wanted + this->count, [](bool one) { return one; });
    auto [input, state, weights] =
        rnn_backward(grad_output, grad_state, this->input_, std::nullopt, {}, this->parameters_, std::nullopt, output_,
                     reserve_, mode_, layers_, bidirectional_, batch_first_, input_wanted, false, any);
    for (size_t i = 0; i < this->count; ++i) {
      if (wanted[i]) gradients[i] = this->keep(std::move(weights[i]), i);
    }
    return std::move(input);
  }

 private:
  Tensor result() const {
    if (!last_) return output_.borrow();
    const int64_t batch = final_h_.size(1), width = final_h_.size(2);
    return as_sizes(data<T>(final_h_) + (layers_ - 1) * batch * width, {batch, width});
  }

  int64_t mode_, layers_;
  bool bidirectional_, batch_first_, last_;
  Tensor output_, final_h_, reserve_;
};

// "flatten": all dimensions but the batch become one.
template <class T>
class FlattenStage : public Stage<T> {
 public:
  explicit FlattenStage(Words& words) {
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of a flatten than it should");
  }
  Tensor forward(const Tensor& input, const TensorList&) override {
    this->input_ = dense(input);
    sizes_ = sizes_of(this->input_);
    FASTNN_CHECK(!sizes_.empty(), kTrainingStep, ": expected what is flattened to have a batch");
    return as_sizes(data<T>(this->input_), {sizes_[0], product(sizes_, 1, sizes_.size())});
  }
  void save(TensorList&) override {}
  Tensor restore(const Tensor& input, const TensorList& none, SavedReader<T>&) override { return forward(input, none); }
  Tensor backward(const Tensor& gradient, bool input_wanted, const bool*, const T**) override {
    if (!input_wanted) return Tensor();
    this->gradients_.push_back(dense(gradient));
    return as_sizes(data<T>(this->gradients_.back()), sizes_);
  }

 private:
  Ints sizes_;
};

// "dropout probability", its bits: torch's own mask, so that a seed gives the same elements as stock's.
template <class T>
class DropoutStage : public Stage<T> {
 public:
  explicit DropoutStage(Words& words) {
    drops_ = real_number(words);
    FASTNN_CHECK(drops_ >= 0 && drops_ <= 1, kTrainingStep, ": dropout probability has to be between 0 and 1, but got ",
                 drops_);
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of a dropout than it should");
  }
  Tensor forward(const Tensor& input, const TensorList&) override {
    const Tensor dense_input = dense(input);
    scales_ = new_tensor(sizes_of(dense_input), kDtypeOf<T>);
    draw_ones(scales_, 1 - drops_);
    T* const scales = mutable_data<T>(scales_);
    const T scale = static_cast<T>(1 - drops_);
    for (int64_t i = 0, count = scales_.numel(); drops_ < 1 && i < count; ++i) scales[i] /= scale;
    output_ = times(dense_input);
    return output_.borrow();
  }
  void save(TensorList& saved) override {
    saved.push_back(std::move(output_));
    saved.push_back(std::move(scales_));
  }
  Tensor restore(const Tensor& input, const TensorList&, SavedReader<T>& saved) override {
    output_ = saved.take(sizes_of(input));
    scales_ = saved.take(sizes_of(input));
    return output_.borrow();
  }
  Tensor backward(const Tensor& gradient, bool input_wanted, const bool*, const T**) override {
    return input_wanted ? times(dense(gradient)) : Tensor();
  }

 private:
  Tensor times(const Tensor& tensor) const {
    Tensor result = new_tensor(sizes_of(tensor), kDtypeOf<T>);
    const T *from = data<T>(tensor), *scales = data<T>(scales_);
    T* const to = mutable_data<T>(result);
    for (int64_t i = 0, count = result.numel(); i < count; ++i) to[i] = from[i] * scales[i];
    return result;
  }

  double drops_;
  Tensor output_, scales_;
};

template <class T>
std::vector<std::unique_ptr<Stage<T>>> read_stages(const std::string& program) {
  std::vector<std::unique_ptr<Stage<T>>> stages;
  Words words(program);
  while (!words.ends()) {
    const std::string name = words.word();
    if (name == "conv") {
      stages.push_back(std::make_unique<ConvStage<T>>(words));
    } else if (name == "plain_conv") {
      stages.push_back(std::make_unique<PlainConvStage<T>>(words));
    } else if (name == "batch_norm") {
      stages.push_back(std::make_unique<BatchNormStage<T>>(words));
    } else if (name == "mlp") {
      stages.push_back(std::make_unique<MlpStage<T>>(words));
    } else if (name == "rnn") {
      stages.push_back(std::make_unique<RnnStage<T>>(words));
    } else if (name == "dropout") {
      stages.push_back(std::make_unique<DropoutStage<T>>(words));
    } else {
      FASTNN_CHECK(name == "flatten", kTrainingStep, ": the program has no stage \"", name, "\"");
      stages.push_back(std::make_unique<FlattenStage<T>>(words));
    }
  }
  FASTNN_CHECK(!stages.empty(), kTrainingStep, ": expected at least one stage");
  return stages;
}

}  // namespace fastnn
