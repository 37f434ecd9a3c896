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

// One stage: `forward` keeps what `backward` needs, which writes the gradients of the stage's own parameters.
template <class T>
class Stage {
 public:
  virtual ~Stage() = default;
  virtual Tensor forward(const Tensor& input, const TensorList& parameters) = 0;
  // wanted: of each parameter whether its gradient is. Returns the input's gradient, if that is.
  virtual Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, TensorList& gradients) = 0;
  // Writes what a step leaves behind besides its gradients, once nothing can fail any more.
  virtual void commit() {}
  size_t count = 0;  // of parameters

 protected:
  Tensor input_;
  TensorList parameters_;
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
    this->input_ = input.borrow();
    this->parameters_ = borrowed(parameters, 0, parameters.size());
    const OptionalTensor bias = biased_ ? OptionalTensor(parameters[1].borrow()) : std::nullopt;
    auto [output, winners] = conv_relu_max_pool_with_winners(input, parameters[0], bias, geometry_, std::nullopt);
    winners_ = std::move(winners);
    return std::move(output);
  }

  Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, TensorList& gradients) override {
    auto [input, weight, bias] =
        conv_relu_max_pool_backward(gradient, winners_, this->input_, this->parameters_[0], geometry_, input_wanted,
                                    wanted[0], biased_ && wanted[1], std::nullopt);
    gradients.push_back(std::move(weight));
    if (biased_) gradients.push_back(std::move(bias));
    return std::move(input);
  }

 private:
  bool biased_;
  Ints geometry_;
  Tensor winners_;
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
    const int64_t rank = static_cast<int64_t>(c_.stride.size()) + 2;
    FASTNN_CHECK(input.dim() == rank && parameters[0].dim() == rank, kTrainingStep, ": expected a ", rank,
                 "D input and weight, got ", input.dim(), "D and ", parameters[0].dim(), "D");
    bool is_point = true, strides = false;  // of which torch's library writes the weight's gradient where it shouldn't
    for (int64_t d = 0; d < rank - 2; ++d) {
      is_point = is_point && parameters[0].size(d + 2) == 1;
      strides = strides || c_.stride[static_cast<size_t>(d)] > 1;
    }
    FASTNN_CHECK(!is_point || !strides, kTrainingStep, ": a kernel of one pixel may not have strides here");
    this->input_ = input.borrow();
    this->parameters_ = borrowed(parameters, 0, parameters.size());
    return convolution(input, parameters[0], biased_ ? OptionalTensor(parameters[1].borrow()) : std::nullopt, c_);
  }

  Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, TensorList& gradients) override {
    auto [input, weight, bias] = convolution_backward(gradient, this->input_, this->parameters_[0], c_,
                                                      {input_wanted, wanted[0], biased_ && wanted[1]});
    gradients.push_back(std::move(weight));
    if (biased_) gradients.push_back(std::move(bias));
    return std::move(input);
  }

 private:
  bool biased_;
  StockConvolution c_;
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
    FASTNN_CHECK(input.dim() >= 3, kTrainingStep, ": expected a batch norm's input to have a batch, channels and size");
    const int64_t channels = input.size(1);
    for (const Tensor& parameter : parameters) {
      FASTNN_CHECK(parameter.dim() == 1 && parameter.size(0) == channels, kTrainingStep,
                   ": expected a batch norm's parameters to have ", channels, " elements");
    }
    elements_ = input.numel() / std::max<int64_t>(channels, 1);
    FASTNN_CHECK(elements_ > 1, kTrainingStep,
                 ": Expected more than 1 value per channel when training, got input size ", to_string(input.sizes()));
    this->input_ = input.borrow();
    this->parameters_ = borrowed(parameters, 0, parameters.size());
    auto [mean, variance] = channel_statistics(input);
    mean_ = std::move(mean);
    variance_ = std::move(variance);
    inverse_deviation_ = new_tensor({channels}, kDtypeOf<T>);
    Ints sizes(static_cast<size_t>(input.dim()), 1);
    sizes[0] = channels;
    const Tensor scale = new_tensor(sizes, kDtypeOf<T>), shift = new_tensor({channels}, kDtypeOf<T>);
    ones_ = new_tensor(sizes, kDtypeOf<T>);
    const T* const weight = weighted_ ? data<T>(parameters[2 * running_]) : nullptr;
    const T* const bias = shifted_ ? data<T>(parameters[2 * running_ + weighted_]) : nullptr;
    for (int64_t c = 0; c < channels; ++c) {
      const T inverse = T(1) / std::sqrt(data<T>(variance_)[c] + static_cast<T>(eps_));
      const T by = weight ? inverse * weight[c] : inverse;
      mutable_data<T>(inverse_deviation_)[c] = inverse;
      mutable_data<T>(scale)[c] = by;
      mutable_data<T>(shift)[c] = (bias ? bias[c] : T(0)) - data<T>(mean_)[c] * by;
      mutable_data<T>(ones_)[c] = 1;
    }
    auto [output, winners] =
        conv_relu_max_pool_with_winners(input, scale, OptionalTensor(shift.borrow()), geometry_, std::nullopt);
    winners_ = std::move(winners);
    return std::move(output);
  }

  Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, TensorList& gradients) override {
    const auto normed = conv_relu_max_pool_backward(gradient, winners_, this->input_, ones_, geometry_, true, false,
                                                    false, std::nullopt);
    const size_t first = 2 * running_;
    const OptionalTensor weight = weighted_ ? OptionalTensor(this->parameters_[first].borrow()) : std::nullopt;
    auto [input, grad_weight, grad_bias] =
        batch_norm_backward(std::get<0>(normed), this->input_, weight, mean_, inverse_deviation_, eps_,
                            {input_wanted, weighted_ && wanted[first], shifted_ && wanted[first + weighted_]});
    for (size_t i = 0; i < first; ++i) gradients.push_back(Tensor());
    if (weighted_) gradients.push_back(std::move(grad_weight));
    if (shifted_) gradients.push_back(std::move(grad_bias));
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
  bool running_, weighted_, shifted_;
  double momentum_, eps_;
  Ints geometry_;
  int64_t elements_ = 0;  // of a channel
  Tensor mean_, variance_, inverse_deviation_, ones_, winners_;
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
    this->count = layers_ * (1 + biased_);
  }

  Tensor forward(const Tensor& input, const TensorList& parameters) override {
    sizes_ = sizes_of(input);
    FASTNN_CHECK(sizes_.size() >= 2, kTrainingStep, ": expected a linear layer's input to have a batch");
    this->input_ = dense(input);
    rows_ = input.dim() == 2 ? this->input_.borrow()
                             : as_sizes(data<T>(this->input_), {product(sizes_, 0, sizes_.size() - 1), sizes_.back()});
    this->parameters_ = borrowed(parameters, 0, layers_);
    auto [output, hidden] = mlp_with_hidden(rows_, parameters, code_);
    hidden_ = std::move(hidden);
    output_ = std::move(output);
    if (sizes_.size() == 2) return output_.borrow();
    Ints sizes = sizes_;
    sizes.back() = output_.size(1);
    return as_sizes(data<T>(output_), sizes);
  }

  Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, TensorList& gradients) override {
    const bool is_flat = sizes_.size() == 2;
    const Tensor rows = is_flat ? gradient.borrow() : as_sizes(data<T>(gradient), sizes_of(output_));
    const bool weights = std::any_of(wanted, wanted + layers_, [](bool one) { return one; });
    const bool biases = biased_ && std::any_of(wanted + layers_, wanted + 2 * layers_, [](bool one) { return one; });
    auto [input, grad_weights, grad_biases] =
        mlp_backward(rows, rows_, this->parameters_, code_, output_, hidden_, input_wanted, weights, biases);
    const auto take = [&](TensorList& from, bool computed) {
      for (size_t i = 0; i < layers_; ++i) gradients.push_back(computed ? std::move(from[i]) : Tensor());
    };
    take(grad_weights, weights);
    if (biased_) take(grad_biases, biases);
    if (!input_wanted || is_flat) return std::move(input);
    kept_ = std::move(input);
    return as_sizes(data<T>(kept_), sizes_);
  }

 private:
  size_t layers_;
  bool biased_;
  int64_t code_;
  Ints sizes_;
  Tensor rows_, output_, kept_;
  TensorList hidden_;
};

// "rnn weights mode layers bidirectional batch_first last": the output of all steps, or the last layer's final h.
template <class T>
class RnnStage : public Stage<T> {
 public:
  explicit RnnStage(Words& words) {
    this->count = static_cast<size_t>(words.number(1, 1 << 16));
    mode_ = words.number(0, 16);
    layers_ = words.number(1, 1 << 16);
    bidirectional_ = words.number(0, 1);
    batch_first_ = words.number(0, 1);
    last_ = words.number(0, 1);
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of an rnn than it should");
    FASTNN_CHECK(!(last_ && bidirectional_), kTrainingStep, ": the last step of both directions is not supported");
  }

  Tensor forward(const Tensor& input, const TensorList& parameters) override {
    FASTNN_CHECK(input.dim() == 3, kTrainingStep, ": expected a recurrent layer's input to be 3D");
    this->input_ = input.borrow();
    this->parameters_ = borrowed(parameters, 0, parameters.size());
    auto [output, state, reserve] = rnn_with_reserve(input, std::nullopt, {}, parameters, std::nullopt, mode_, layers_,
                                                     bidirectional_, batch_first_);
    output_ = std::move(output);
    state_ = std::move(state);
    reserve_ = std::move(reserve);
    if (!last_) return output_.borrow();
    const int64_t batch = state_[0].size(1), width = state_[0].size(2);
    return as_sizes(data<T>(state_[0]) + (layers_ - 1) * batch * width, {batch, width});
  }

  Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, TensorList& gradients) override {
    std::vector<OptionalTensor> grad_state(state_.size());
    OptionalTensor grad_output;
    (last_ ? grad_state[0] : grad_output) = gradient.borrow();
    const bool any = std::any_of(wanted, wanted + this->count, [](bool one) { return one; });
    auto [input, state, weights] =
        rnn_backward(grad_output, grad_state, this->input_, std::nullopt, {}, this->parameters_, std::nullopt, output_,
                     reserve_, mode_, layers_, bidirectional_, batch_first_, input_wanted, false, any);
    for (size_t i = 0; i < this->count; ++i) gradients.push_back(any ? std::move(weights[i]) : Tensor());
    return std::move(input);
  }

 private:
  int64_t mode_, layers_;
  bool bidirectional_, batch_first_, last_;
  Tensor output_, reserve_;
  TensorList state_;
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
    return as_sizes(data<T>(this->input_), {sizes_[0], product(sizes_, 1, sizes_.size())});
  }
  Tensor backward(const Tensor& gradient, bool, const bool*, TensorList&) override {
    kept_ = gradient.borrow();
    return gradient.defined() ? as_sizes(data<T>(gradient), sizes_) : Tensor();
  }

 private:
  Ints sizes_;
  Tensor kept_;
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
    return times(dense_input);
  }
  Tensor backward(const Tensor& gradient, bool input_wanted, const bool*, TensorList&) override {
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
  Tensor scales_;
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
