// The stages that take images: convolutions, batch norm, pools.
#pragma once

#include <cmath>

#include "conv_problem.h"
#include "stock.h"
#include "training_stage.h"

namespace fastnn {

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

// "batch_norm running weighted shifted momentum eps geometry...": batch norm with the statistics of the batch, and
// where there is a geometry, ReLU and max-pool: each channel is multiplied by a number, another is added, which is a
// convolution of one pixel and groups of one channel. Parameters: running mean and variance, weight, bias, those that
// there are.
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
    if (geometry_.empty()) {
      for (int64_t c = 0; c < channels; ++c) mutable_data<T>(inverse_deviation_)[c] = inverse_of(c);
      output_ = normalized(input, optional(weighted_, 2 * running_), optional(shifted_, 2 * running_ + weighted_),
                           mean_, variance_, eps_);
      return output_.borrow();
    }
    const Tensor scale = new_tensor(sizes_of(ones_), kDtypeOf<T>), shift = new_tensor({channels}, kDtypeOf<T>);
    const T* const weight = weighted_ ? data<T>(parameters[2 * running_]) : nullptr;
    const T* const bias = shifted_ ? data<T>(parameters[2 * running_ + weighted_]) : nullptr;
    for (int64_t c = 0; c < channels; ++c) {
      const T inverse = inverse_of(c);
      const T by = is_constant(c) ? T(0) : weight ? inverse * weight[c] : inverse;
      mutable_data<T>(inverse_deviation_)[c] = inverse;
      mutable_data<T>(scale)[c] = by;
      mutable_data<T>(shift)[c] = (bias ? bias[c] : T(0)) - data<T>(mean_)[c] * by;
    }
    std::tie(output_, winners_) =
        conv_relu_max_pool_with_winners(input, scale, OptionalTensor(shift.borrow()), geometry_, std::nullopt);
    return output_.borrow();
  }
  void save(TensorList& saved) override {
    saved.push_back(std::move(output_));
    if (!geometry_.empty()) saved.push_back(std::move(winners_));
    for (Tensor* tensor : {&mean_, &variance_, &inverse_deviation_}) saved.push_back(std::move(*tensor));
  }
  Tensor restore(const Tensor& input, const TensorList& parameters, SavedReader<T>& saved) override {
    const int64_t channels = begin(input, parameters);
    output_ = geometry_.empty() ? saved.take(sizes_of(input)) : saved.take();
    if (!geometry_.empty()) winners_ = saved.take();
    for (Tensor* tensor : {&mean_, &variance_, &inverse_deviation_}) *tensor = saved.take({channels});
    return output_.borrow();
  }

  Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, const T** gradients) override {
    const Tensor normed = geometry_.empty()
                              ? gradient.borrow()
                              : std::get<0>(conv_relu_max_pool_backward(gradient, winners_, this->input_, ones_,
                                                                        geometry_, true, false, false, std::nullopt));
    const size_t first = 2 * running_;
    auto [input, grad_weight, grad_bias] =
        batch_norm_backward(normed, this->input_, optional(weighted_, first), mean_, inverse_deviation_, eps_,
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
  OptionalTensor optional(bool is_there, size_t i) const {
    return is_there ? OptionalTensor(this->parameters_[i].borrow()) : std::nullopt;
  }
  T inverse_of(int64_t channel) const { return T(1) / std::sqrt(data<T>(variance_)[channel] + static_cast<T>(eps_)); }
  // Whether a channel has one value but for the mean's rounding. It is the bias exactly then: by its scale, which is
  // large, it would lie beside the bias by a rounding error, and ReLU decides by that.
  bool is_constant(int64_t channel) const {
    constexpr T kLimit = 16 * std::numeric_limits<T>::epsilon() * std::numeric_limits<T>::epsilon();
    const T mean = data<T>(mean_)[channel];
    return data<T>(variance_)[channel] <= mean * mean * kLimit;
  }
  // How many channels there are.
  int64_t begin(const Tensor& input, const TensorList& parameters) {
    FASTNN_CHECK(input.dim() >= (geometry_.empty() ? 2 : 3), kTrainingStep,
                 ": expected a batch norm's input to have a batch and channels, and to be pooled a size");
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

// "average dims size...": each dimension averaged in so many parts, as torch's adaptive pools do it.
template <class T>
class AverageStage : public Stage<T> {
 public:
  explicit AverageStage(Words& words) {
    const int64_t dims = words.number(1, 3);
    for (int64_t d = 0; d < dims; ++d) parts_.push_back(words.number(1, int64_t{1} << 31));
    FASTNN_CHECK(words.stage_ends(), kTrainingStep, ": the program has more of an average than it should");
  }
  Tensor forward(const Tensor& input, const TensorList&) override {
    begin(input);
    output_ = adaptive_average(viewed_, as_image(parts_, 0));
    return result();
  }
  void save(TensorList& saved) override { saved.push_back(std::move(output_)); }
  Tensor restore(const Tensor& input, const TensorList&, SavedReader<T>& saved) override {
    begin(input);
    Ints sizes{input.size(0), input.size(1)};
    sizes.insert(sizes.end(), parts_.begin(), parts_.end());
    output_ = saved.take_strided(as_image(sizes, 2));
    return result();
  }
  Tensor backward(const Tensor& gradient, bool input_wanted, const bool*, const T**) override {
    if (!input_wanted) return Tensor();
    if (parts_.size() > 1) return adaptive_average_backward(gradient, viewed_);
    const Tensor grad_output = dense(gradient);
    this->gradients_.push_back(
        dense(adaptive_average_backward(as_sizes(data<T>(grad_output), sizes_of(output_)), viewed_)));
    return as_sizes(data<T>(this->gradients_.back()), sizes_of(this->input_));
  }

 private:
  // Sizes whose dimensions begin at `first`; torch averages a single one as the second of two.
  Ints as_image(Ints sizes, std::ptrdiff_t first) const {
    if (parts_.size() == 1) sizes.insert(sizes.begin() + first, 1);
    return sizes;
  }
  void begin(const Tensor& input) {
    FASTNN_CHECK(input.dim() == static_cast<int64_t>(parts_.size()) + 2, kTrainingStep,
                 ": expected what is averaged to be ", parts_.size() + 2, "D, got ", input.dim(), "D");
    this->input_ = parts_.size() > 1 ? input.borrow() : dense(input);
    viewed_ = parts_.size() > 1 ? input.borrow() : as_sizes(data<T>(this->input_), as_image(sizes_of(input), 2));
  }
  Tensor result() {
    if (parts_.size() > 1) return output_.borrow();
    output_ = dense(std::move(output_));
    Ints sizes = sizes_of(output_);
    sizes.erase(sizes.begin() + 2);
    return as_sizes(data<T>(output_), sizes);
  }

  Ints parts_;
  Tensor viewed_, output_;
};

}  // namespace fastnn
