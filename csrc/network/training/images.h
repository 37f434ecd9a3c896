// conv and batch_norm in training.
#pragma once

#include <cmath>

#include "../../kernels/batch_norm.h"
#include "../../ops/conv_problem.h"
#include "elementwise.h"

namespace fastnn {

// An attribute's numbers, one for each of `dims` dimensions. One number may stand for all.
inline Ints of_each(const Ints& numbers, size_t dims, const char* name) {
  if (numbers.size() == 1) return Ints(dims, numbers[0]);
  FASTNN_CHECK(numbers.size() == dims, kTrainingStep, ": expected ", name, " to be ", dims, " numbers, got ",
               numbers.size());
  return numbers;
}

// The max-pool that the attributes of a layer describe.
struct TrainingPool {
  Ints size, stride, padding, dilation;
  bool ceil_mode;

  explicit TrainingPool(const ProgramLine& line)
      : size(line.integers("pool", 1, kMostSize)),
        stride(line.integers("pool_stride", 1, kMostSize)),
        padding(line.integers("pool_padding", 0, kMostSize)),
        dilation(line.integers("pool_dilation", 1, kMostSize)),
        ceil_mode(line.flag("ceil_mode")) {}

  bool is_there() const {
    const auto is_one = [](int64_t number) { return number == 1; };
    return !std::all_of(size.begin(), size.end(), is_one) || !std::all_of(stride.begin(), stride.end(), is_one);
  }
  // The geometry of fastnn::conv_relu_max_pool for a convolution with this pool.
  Ints geometry(const StockConvolution& c) const {
    const size_t dims = c.stride.size();
    return flat_geometry({c.stride, c.padding, c.dilation, of_each(size, dims, "pool"),
                          of_each(stride.empty() ? size : stride, dims, "pool_stride"),
                          of_each(padding, dims, "pool_padding"), of_each(dilation, dims, "pool_dilation"), c.groups,
                          ceil_mode});
  }
};

inline bool rectifies(const ProgramLine& line) {
  const Activation activation = line.activation();
  if (activation.kind == ActivationKind::relu) return true;
  if (activation.kind != ActivationKind::identity) line.refuse("in training its activation is relu or identity");
  return false;
}

inline void fail_unless_rank(const Tensor& input, int64_t rank) {
  FASTNN_CHECK(input.dim() == rank, kTrainingStep, ": expected a ", rank, "D input, got size ",
               to_string(input.sizes()));
}

// What both kinds of convolutions have: an input, a weight and perhaps a bias, and settings.
template <class T>
class AnyConvTraining : public TrainingLayer<T> {
 public:
  explicit AnyConvTraining(const ProgramLine& line)
      : stride_(line.integers("stride", 1, kMostSize)),
        padding_(line.integers("padding", 0, kMostSize)),
        dilation_(line.integers("dilation", 1, kMostSize)),
        groups_(line.integer("groups", 1, kMostSize)) {
    this->inputs = {line.input("input"), line.input("weight")};
    this->take(line, {"bias"});
  }

 protected:
  // How many dimensions the images have. Raises where input and weight do not have so many.
  size_t dims() const {
    const int64_t rank = this->given[1].dim();
    FASTNN_CHECK(rank >= 3 && rank <= 5, kTrainingStep, ": expected a convolution's weight to be 3D to 5D, got ", rank,
                 "D");
    fail_unless_rank(this->given[0], rank);
    return static_cast<size_t>(rank - 2);
  }
  StockConvolution settings(size_t dims) const {
    return {of_each(stride_, dims, "stride"), of_each(padding_, dims, "padding"), of_each(dilation_, dims, "dilation"),
            groups_};
  }
  OptionalTensor bias() const { return this->given.size() > 2 ? optional(this->given[2]) : std::nullopt; }
  bool bias_is_wanted(const bool* wanted) const { return this->given.size() > 2 && wanted[2]; }
  // Gives the gradients of the input, the weight and the bias to the inputs that want them.
  void give(std::array<Tensor, 3>& gradients, const bool* wanted, Gradient<T>* results) const {
    for (size_t i = 0; i < this->given.size(); ++i) {
      if (wanted[i]) results[i] = {std::move(gradients[i]), nullptr, true};
    }
  }

 private:
  Ints stride_, padding_, dilation_;
  int64_t groups_;
};

// With ReLU, the layer is the op conv_relu_max_pool, forward and backward. Without, it is a plain convolution.
template <class T>
class ConvTraining : public AnyConvTraining<T> {
 public:
  explicit ConvTraining(const ProgramLine& line) : AnyConvTraining<T>(line), pool_(line), fused_(rectifies(line)) {
    if (line.has("addend")) line.refuse("in training it has no addend");
    for (const char* const name : {"padding_end", "crop"}) {
      if (!line.text(name).empty()) line.refuse("in training it ends as torch's convolution");
    }
    if (!fused_ && pool_.is_there()) line.refuse("in training a pool follows only its ReLU");
  }

  void forward(Tensor* outputs) override {
    const Tensor &input = this->given[0], &weight = this->given[1];
    const size_t dims = this->dims();
    c_ = this->settings(dims);
    if (fused_) {
      geometry_ = pool_.geometry(c_);
      std::tie(output_, winners_) =
          conv_relu_max_pool_with_winners(input, weight, this->bias(), geometry_, std::nullopt);
      outputs[0] = output_.borrow();
      return;
    }
    convolved_ = input.borrow();
    steps_ = Ints();
    if (is_strided_point()) {
      steps_ = std::exchange(c_.stride, Ints(dims, 1));
      const Tensor chosen = met_by_steps(input);
      convolved_ = new_formatted(sizes_of(chosen), kDtypeOf<T>, is_channels_last(input));
      copy(chosen, convolved_);
    }
    geometry_ = pool_.geometry(c_);
    outputs[0] = plain_convolution(convolved_, weight, this->bias(), geometry_);
  }

  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    const bool bias_wanted = this->bias_is_wanted(wanted);
    std::array<Tensor, 3> all;
    if (fused_) {
      std::tie(all[0], all[1], all[2]) =
          conv_relu_max_pool_backward(gradients[0], winners_, this->given[0], this->given[1], geometry_, wanted[0],
                                      wanted[1], bias_wanted, std::nullopt);
    } else {
      all = plain_convolution_backward(gradients[0], convolved_, this->given[1], geometry_,
                                       {wanted[0], wanted[1], bias_wanted});
      if (wanted[0] && !steps_.empty()) all[0] = spread(all[0]);
    }
    this->give(all, wanted, results);
  }
  void release() override { output_ = winners_ = convolved_ = Tensor(); }
  void forget() override { release(); }

 private:
  // Whether the kernel is one pixel and has strides. For such kernels torch's library writes the weight's gradient out
  // of bounds. They are computed without strides, over the pixels that the strides choose.
  bool is_strided_point() const {
    bool strides = false;
    for (size_t d = 0; d < c_.stride.size(); ++d) {
      if (this->given[1].size(static_cast<int64_t>(d) + 2) != 1) return false;
      strides = strides || c_.stride[d] > 1;
    }
    for (const int64_t padding : c_.padding) {
      FASTNN_CHECK(!strides || padding == 0, kTrainingStep,
                   ": a kernel of one pixel may not have strides and padding here");
    }
    return strides;
  }
  // A view of the pixels that the strides choose.
  Tensor met_by_steps(const Tensor& images) const {
    Tensor result = images.borrow();
    const std::optional<int64_t> none;
    for (size_t d = 0; d < steps_.size(); ++d) {
      result = stock("aten::slice", "Tensor", result, static_cast<int64_t>(d) + 2, none, none, steps_[d]);
    }
    return result;
  }
  static void copy(const Tensor& from, const Tensor& to) { stock("aten::copy_", "", to, from, false); }
  // The gradient of the pixels that were chosen -> that of all pixels.
  Tensor spread(const Tensor& gradient) const {
    const Tensor& input = this->given[0];
    Tensor result = new_formatted(sizes_of(input), kDtypeOf<T>, is_channels_last(input));
    std::fill_n(mutable_data<T>(result), result.numel(), T(0));
    copy(gradient, met_by_steps(result));
    return result;
  }

  TrainingPool pool_;
  bool fused_;
  StockConvolution c_;
  Ints geometry_, steps_;  // steps_: those of a kernel of one pixel
  Tensor output_, winners_, convolved_;
};

// Calls body(channel, planes) for each channel of contiguous images, in parallel, where planes calls its argument with
// each image's pixels of the channel: where they begin. work: operations a pixel.
template <class Body>
void for_each_channel(const Tensor& images, double work, const Body& body) {
  const int64_t batch = images.size(0), channels = images.size(1);
  const int64_t pixels = images.numel() / std::max<int64_t>(batch * channels, 1);
  const double all = work * static_cast<double>(images.numel());
  parallel_chunks(std::min(useful_threads(all), channels), channels, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      body(c, [&](const auto& run) {
        for (int64_t n = 0; n < batch; ++n) run((n * channels + c) * pixels, pixels);
      });
    }
  });
}

// Mean and variance of each channel.
template <class T>
std::array<Tensor, 2> statistics_of(const Tensor& images) {
  if (!images.is_contiguous() || images.dim() < 3) return channel_statistics(images);
  const int64_t channels = images.size(1), batch = images.size(0);
  const double count = static_cast<double>(images.numel() / std::max<int64_t>(channels, 1));
  const auto& kernels = batch_norm_kernels().get<T>();
  const T* const from = data<T>(images);
  std::array<Tensor, 2> result{new_tensor({channels}, kDtypeOf<T>), new_tensor({channels}, kDtypeOf<T>)};
  T *const means = mutable_data<T>(result[0]), *const variances = mutable_data<T>(result[1]);
  for_each_channel(images, 6, [&](int64_t c, const auto& planes) {
    // Sums are made of differences to a number near the mean, so that nothing is lost where the mean is large: first to
    // one of the pixels, then to the mean.
    T center = batch > 0 ? from[c * (images.numel() / (batch * channels))] : T(0);
    if (!std::isfinite(center)) center = 0;
    double sums[2] = {};
    planes([&](int64_t at, int64_t pixels) { kernels.add_moments(from + at, pixels, center, sums); });
    means[c] = static_cast<T>(static_cast<double>(center) + sums[0] / count);
    sums[0] = sums[1] = 0;
    planes([&](int64_t at, int64_t pixels) { kernels.add_moments(from + at, pixels, means[c], sums); });
    const double rest = sums[0] / count;  // by which the mean was rounded
    variances[c] = static_cast<T>(std::max(sums[1] / count - rest * rest, sums[1] != sums[1] ? sums[1] : 0.0));
  });
  return result;
}

// Batch norm, with the statistics of the batch, or, where it does not train, with the running statistics. The layer
// includes the addition of a value and ReLU or hardtanh behind it, which are one pass over contiguous images. Where a
// max-pool follows, the norm is a convolution whose kernel is one pixel and whose groups have one channel each, since
// it multiplies each channel by a number and adds another.
template <class T>
class BatchNormTraining : public TrainingLayer<T> {
 public:
  explicit BatchNormTraining(const ProgramLine& line)
      : dims_(line.integer("dims", 1, 3)),
        trains_(line.flag("trains")),
        momentum_(line.real("momentum")),
        eps_(line.real("epsilon")),
        pool_(line),
        activation_(line.activation()) {
    this->inputs = {line.input("input")};
    for (size_t i = 0; i < 4; ++i) {
      static constexpr const char* names[] = {"mean", "variance", "weight", "bias"};
      if (!line.has(names[i])) continue;
      place_[i] = this->inputs.size();
      this->inputs.push_back(line.input(names[i]));
    }
    if ((place_[0] == 0) != (place_[1] == 0)) line.refuse("expected both its mean and its variance, or none");
    if (!trains_ && place_[0] == 0) line.refuse("expected its mean and its variance");
    if (!rectifies(line) && pool_.is_there()) line.refuse("in training a pool follows only its ReLU");
  }

  bool absorb(const TrainingLayer<T>& other, size_t which) override {
    if (activates() || pool_.is_there()) return false;
    if (const auto* const activation = dynamic_cast<const ActivationTraining<T>*>(&other)) {
      if (!only_bounds(activation->activation())) return false;
      activation_ = activation->activation();
      return true;
    }
    const auto* const sum = dynamic_cast<const BinaryTraining<T>*>(&other);
    if (!sum || !sum->adds() || addend_) return false;
    addend_ = this->inputs.size();
    addend_comes_first_ = sum->left() != which;
    adds_in_place_ = sum->in_place();
    this->inputs.push_back(sum->inputs[1 - which]);
    return true;
  }

  void forward(Tensor* outputs) override {
    const int64_t channels = begin(this->given[0]);
    const Tensor& input = images();
    const bool in_order = lies_in_order(input);
    if (way_ == Way::apart && trains_ && !in_order) {
      normalize_by_torch(outputs);
      return finish(outputs);
    }
    if (trains_) {
      auto [mean, variance] = statistics_of<T>(input);
      mean_ = std::move(mean);
      variance_ = std::move(variance);
    } else {
      mean_ = this->given[place_[0]].borrow();
      variance_ = this->given[place_[1]].borrow();
    }
    inverse_deviation_ = new_tensor({channels}, kDtypeOf<T>);
    T* const inverse = mutable_data<T>(inverse_deviation_);
    for (int64_t c = 0; c < channels; ++c) inverse[c] = T(1) / std::sqrt(data<T>(variance_)[c] + static_cast<T>(eps_));
    if (way_ == Way::in_one_pass) {
      outputs[0] = normalized_images(input, addend_ ? data<T>(this->given[addend_]) : nullptr, activation_);
      if (turned_.defined()) {
        output_ = std::move(outputs[0]);
        outputs[0] = turned(output_, input.size(1), sizes_of(this->given[0]));
      } else if (activates()) {
        output_ = outputs[0].borrow();
      }
      return;
    }
    if (way_ == Way::apart) {
      outputs[0] = in_order ? normalized_images(input, nullptr, kIdentity)
                            : normalized(input, parameter(2), parameter(3), mean_, variance_, eps_);
      return finish(outputs);
    }
    const Tensor scale = new_tensor(sizes_of(ones_), kDtypeOf<T>), shift = new_tensor({channels}, kDtypeOf<T>);
    const T* const bias = place_[3] ? data<T>(this->given[place_[3]]) : nullptr;
    for (int64_t c = 0; c < channels; ++c) {
      const T by = factor(c);
      mutable_data<T>(scale)[c] = by;
      mutable_data<T>(shift)[c] = (bias ? bias[c] : T(0)) - data<T>(mean_)[c] * by;
    }
    std::tie(output_, winners_) =
        conv_relu_max_pool_with_winners(input, scale, optional(shift), geometry_, std::nullopt);
    outputs[0] = output_.borrow();
  }

  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    const Tensor& input = images();
    const auto is_wanted = [&](size_t i) { return place_[i] && wanted[place_[i]]; };
    const bool addend_wanted = addend_ && wanted[addend_];
    const bool is_own = trains_ && lies_in_order(input);
    Tensor gradient = gradients[0].borrow();
    if (turned_.defined()) gradient = turned(dense(gradient), this->given[0].size(0), sizes_of(turned_));
    // Whether the norm's backward includes the activation's. It cannot where the addend's gradient is wanted, which is
    // the gradient of the activation's input.
    const bool both = way_ == Way::in_one_pass && is_own && !addend_wanted && gradient.is_contiguous();
    if (way_ == Way::by_pool) {
      gradient = std::get<0>(
          conv_relu_max_pool_backward(gradient, winners_, input, ones_, geometry_, true, false, false, std::nullopt));
    } else if (activates() && !both) {
      gradient = activation_gradient<T>(activation_, gradient, output_);
    }
    if (addend_) {
      if (addend_wanted) results[addend_].tensor = reduced(Tensor(gradient), sizes_of(this->given[addend_]));
      gradient = reduced(std::move(gradient), sizes_of(input));
    }
    if (is_own && gradient.is_contiguous()) {
      take_gradients(gradient, both ? activation_ : kIdentity, wanted, results);
      if (turned_.defined() && wanted[0]) {
        results[0].tensor = turned(results[0].tensor, input.size(1), sizes_of(this->given[0]));
      }
      return;
    }
    NormStatistics statistics;
    (trains_ ? statistics.mean : statistics.running_mean) = optional(mean_);
    (trains_ ? statistics.inverse_deviation : statistics.running_variance) =
        optional(trains_ ? inverse_deviation_ : variance_);
    std::array<Tensor, 3> all =
        batch_norm_backward(gradient, input, parameter(2), statistics, eps_, {wanted[0], is_wanted(2), is_wanted(3)});
    if (wanted[0]) results[0] = {std::move(all[0]), nullptr, true};
    for (size_t i : {2, 3}) {
      if (is_wanted(i)) results[place_[i]] = {std::move(all[i - 1]), nullptr, true};
    }
  }

  void commit() override {
    if (!place_[0] || !trains_) return;
    T* const running_mean = mutable_data<T>(this->given[place_[0]]);
    T* const running_variance = mutable_data<T>(this->given[place_[1]]);
    // What another norm, or this one at an earlier call, has written meanwhile is kept in part, too.
    const T momentum = static_cast<T>(momentum_), kept = 1 - momentum;
    if (added_statistics_[0].defined()) {
      for (int64_t c = 0; c < mean_.numel(); ++c) {
        running_mean[c] = data<T>(added_statistics_[0])[c] + kept * running_mean[c];
        running_variance[c] = data<T>(added_statistics_[1])[c] + kept * running_variance[c];
      }
      return;
    }
    const T unbiased = static_cast<T>(elements_) / static_cast<T>(elements_ - 1);
    for (int64_t c = 0; c < mean_.numel(); ++c) {
      running_mean[c] = momentum * data<T>(mean_)[c] + kept * running_mean[c];
      running_variance[c] = momentum * (data<T>(variance_)[c] * unbiased) + kept * running_variance[c];
    }
  }
  void release() override { output_ = winners_ = Tensor(); }
  void forget() override {
    for (Tensor* tensor : {&output_, &winners_, &mean_, &variance_, &inverse_deviation_, &turned_}) *tensor = Tensor();
    for (Tensor& statistic : added_statistics_) statistic = Tensor();
  }

 private:
  // torch's own batch norm goes well through vectors of channels. It adds its part of the running statistics to zeros,
  // and `commit` adds that part to the model's.
  void normalize_by_torch(Tensor* outputs) {
    OptionalTensor running[2];
    for (size_t i = 0; i < 2; ++i) {
      if (!place_[i]) continue;
      added_statistics_[i] = new_like<T>(this->given[place_[i]]);
      std::fill_n(mutable_data<T>(added_statistics_[i]), added_statistics_[i].numel(), T(0));
      running[i] = optional(added_statistics_[i]);
    }
    auto all = stock_results<3>("aten::native_batch_norm", "", this->given[0], parameter(2), parameter(3), running[0],
                                running[1], true, momentum_, eps_);
    outputs[0] = std::move(all[0]);
    mean_ = std::move(all[1]);
    inverse_deviation_ = std::move(all[2]);
  }
  // Adds and activates what has been normalized.
  void finish(Tensor* outputs) {
    Tensor& output = outputs[0];
    if (addend_) {
      const Tensor& addend = this->given[addend_];
      output = addend_comes_first_ ? combined<T>(BinaryKind::add, addend, output)
                                   : combined<T>(BinaryKind::add, output, addend);
      if (adds_in_place_) check_fits(output, addend_comes_first_ ? addend : this->given[0]);
    }
    if (!activates()) return;
    output_ = std::move(activated<T>(activation_, output)[0]);
    output = output_.borrow();
  }
  bool activates() const { return activation_.kind != ActivationKind::identity; }
  // Whether a tensor holds images whose channels' pixels lie together, as our kernels take them.
  static bool lies_in_order(const Tensor& tensor) { return tensor.is_contiguous() && tensor.dim() > 2; }
  // What a channel is multiplied by. Where all values of the channel are equal, but for the rounding of their mean, the
  // result is exactly the bias: the rounding error times the channel's scale, which is large, would move the result
  // away from the bias, perhaps to the other side of ReLU's 0.
  T factor(int64_t channel) const {
    constexpr T kLimit = 16 * std::numeric_limits<T>::epsilon() * std::numeric_limits<T>::epsilon();
    const T mean = data<T>(mean_)[channel], inverse = data<T>(inverse_deviation_)[channel];
    if (activates() && trains_ && data<T>(variance_)[channel] <= mean * mean * kLimit) return 0;
    return place_[2] ? inverse * data<T>(this->given[place_[2]])[channel] : inverse;
  }
  // activation(the normalized input + addend). addend: as many elements as the input has, or null.
  Tensor normalized_images(const Tensor& input, const T* addend, const Activation& activation) const {
    Tensor result = new_tensor(sizes_of(input), kDtypeOf<T>);
    const auto& kernels = batch_norm_kernels().get<T>();
    const T* const from = data<T>(input);
    T* const to = mutable_data<T>(result);
    const T* const bias = place_[3] ? data<T>(this->given[place_[3]]) : nullptr;
    for_each_channel(input, 4, [&](int64_t c, const auto& planes) {
      planes([&](int64_t at, int64_t pixels) {
        kernels.normalize(from + at, addend ? addend + at : nullptr, pixels, data<T>(mean_)[c], factor(c),
                          bias ? bias[c] : T(0), activation, to + at);
      });
    });
    return result;
  }
  // The gradients of contiguous images that were normalized by their own statistics, and of weight and bias, from the
  // gradient of the activation's output.
  void take_gradients(const Tensor& gradient, const Activation& activation, const bool* wanted, Gradient<T>* results) {
    const Tensor& input = images();
    const auto& kernels = batch_norm_kernels().get<T>();
    const T *const x = data<T>(input), *const g = data<T>(gradient), *const means = data<T>(mean_);
    const T* const y = activation.kind != ActivationKind::identity ? data<T>(output_) : g;  // g in place of any memory
    const T* const weight = place_[2] ? data<T>(this->given[place_[2]]) : nullptr;
    T* of[4] = {};  // the gradients of the input, and of weight and bias at their places
    const auto make = [&](size_t place, size_t which, const Ints& sizes) {
      results[place] = {new_tensor(sizes, kDtypeOf<T>), nullptr, true};
      of[which] = mutable_data<T>(results[place].tensor);
    };
    if (wanted[0]) make(0, 0, sizes_of(input));
    for (const size_t i : {2, 3}) {
      if (place_[i] && wanted[place_[i]]) make(place_[i], i, {input.size(1)});
    }
    const double count = static_cast<double>(elements_);
    for_each_channel(input, 8, [&](int64_t c, const auto& planes) {
      double sums[2] = {};
      planes([&](int64_t at, int64_t pixels) {
        kernels.add_products(g + at, y + at, activation, x + at, pixels, means[c], sums);
      });
      const double inverse = static_cast<double>(data<T>(inverse_deviation_)[c]);
      if (of[2]) of[2][c] = static_cast<T>(sums[1] * inverse);
      if (of[3]) of[3][c] = static_cast<T>(sums[0]);
      if (!of[0]) return;
      const double scale = inverse * (weight ? static_cast<double>(weight[c]) : 1.0);
      const T a = static_cast<T>(scale), b = static_cast<T>(-scale * inverse * inverse * sums[1] / count);
      const T shift = static_cast<T>(-scale * sums[0] / count);
      planes([&](int64_t at, int64_t pixels) {
        kernels.combine(g + at, y + at, activation, x + at, pixels, means[c], a, b, shift, of[0] + at);
      });
    });
  }
  // What is normalized: the input, or, where it has few rows, a copy whose channels' elements lie together, since torch
  // takes longer for its calls than we for copying.
  const Tensor& images() const { return turned_.defined() ? turned_ : this->given[0]; }
  // A matrix of so many rows, turned, as a tensor of these sizes.
  static Tensor turned(const Tensor& matrix, int64_t rows, const Ints& sizes) {
    Tensor result = new_tensor(sizes, kDtypeOf<T>);
    const int64_t columns = matrix.numel() / std::max<int64_t>(rows, 1);
    elementwise_kernels().get<T>().transpose(data<T>(matrix), columns, rows, columns, mutable_data<T>(result), rows);
    return result;
  }
  OptionalTensor parameter(size_t i) const { return place_[i] ? optional(this->given[place_[i]]) : std::nullopt; }
  // Chooses how to run -> the number of channels.
  int64_t begin(const Tensor& input) {
    const int64_t rank = input.dim();
    FASTNN_CHECK(rank == dims_ + 2 || (rank == 2 && dims_ == 1 && !pool_.is_there()), kTrainingStep, ": expected ",
                 dims_ + 2, "D input (got ", rank, "D input)");
    const int64_t channels = input.size(1);
    for (const size_t place : place_) {
      if (place == 0) continue;
      const Tensor& own = this->given[place];
      FASTNN_CHECK(own.dim() == 1 && own.size(0) == channels, kTrainingStep,
                   ": expected a batch norm's parameters to have ", channels, " elements");
    }
    elements_ = input.numel() / std::max<int64_t>(channels, 1);
    FASTNN_CHECK(!trains_ || elements_ > 1, kTrainingStep,
                 ": Expected more than 1 value per channel when training, got input size ", to_string(input.sizes()));
    const bool is_small = rank == 2 && trains_ && !addend_ && input.is_contiguous() && input.numel() <= kFewElements;
    turned_ = is_small ? turned(input, elements_, {1, channels, elements_}) : Tensor();
    const bool in_order = lies_in_order(images()), rectifies = activation_.kind == ActivationKind::relu;
    const bool fits = !addend_ || (same_sizes(this->given[addend_], input) && this->given[addend_].is_contiguous());
    const bool by_pool = pool_.is_there() || (rectifies && !in_order && !addend_ && rank > 2);
    way_ = by_pool ? Way::by_pool : in_order && fits ? Way::in_one_pass : Way::apart;
    if (!by_pool) return channels;
    Ints sizes(static_cast<size_t>(rank), 1);
    sizes[0] = channels;
    if (!ones_.defined() || sizes_of(ones_) != sizes) {
      ones_ = new_tensor(sizes, kDtypeOf<T>);
      std::fill_n(mutable_data<T>(ones_), channels, T(1));
      const size_t dims = sizes.size() - 2;
      geometry_ = pool_.geometry({Ints(dims, 1), Ints(dims, 0), Ints(dims, 1), channels});
    }
    return channels;
  }

  int64_t dims_;
  bool trains_;
  double momentum_, eps_;
  TrainingPool pool_;
  Activation activation_;  // none, ReLU or hardtanh
  // How this step runs: as a convolution with a pool, in one pass, or the norm and what follows it one by one.
  enum class Way { by_pool, in_one_pass, apart } way_ = Way::apart;
  size_t addend_ = 0;  // which of the inputs is added to what is normalized; 0 where none is
  bool addend_comes_first_ = false, adds_in_place_ = false;
  size_t place_[4] = {};  // of mean, variance, weight and bias among the inputs; 0 where there is none
  Ints geometry_;
  int64_t elements_ = 0;  // of a channel
  Tensor output_, winners_, mean_, variance_, inverse_deviation_, ones_, added_statistics_[2], turned_;
};

}  // namespace fastnn
