// Pools, means, upsampling, softmax and norms of rows in training: torch's own, forward and backward, but for softmax,
// of which torch takes one short row after another, and for the max-pool of contiguous images, which torch computes
// pixel by pixel.
#pragma once

#include "../../kernels/max_pool.h"
#include "../layers/normalize.h"
#include "../layers/pool.h"
#include "../layers/upsample.h"
#include "../../ops/product.h"
#include "images.h"
#include "shape.h"

namespace fastnn {

// The sums of the elements up to each one, along a dimension.
template <class T>
class CumsumTraining : public UnaryTraining<T> {
 public:
  explicit CumsumTraining(const ProgramLine& line) : UnaryTraining<T>(line), dim_(line.integer("dim", -16, 15)) {}
  void forward(Tensor* outputs) override { outputs[0] = summed_up(this->input()); }
  // An element is in the sums of all behind it, so its gradient is the sum of theirs.
  Tensor gradient_of(const Tensor& gradient) override { return turned_around(summed_up(turned_around(gradient))); }

 private:
  Tensor summed_up(const Tensor& tensor) const {
    return stock("aten::cumsum", "", tensor, dim_, std::optional<ScalarType>());
  }
  Tensor turned_around(const Tensor& tensor) const { return stock("aten::flip", "", tensor, Ints{dim_}); }
  int64_t dim_;
};

// mean: the mean or the sum over some dimensions. Of few elements that lie in order, where torch takes longer for the
// call than for the sums, each sum over the last dimensions is one call of ours.
template <class T>
class MeanTraining : public UnaryTraining<T> {
 public:
  explicit MeanTraining(const ProgramLine& line)
      : UnaryTraining<T>(line),
        dims_(line.integers("dims", -16, 15)),
        keeps_(line.flag("keepdim")),
        sums_(line.flag("sums")),
        correction_(line.real("correction")),
        rank_(line.integer("rank", 0, 16)) {}
  void forward(Tensor* outputs) override {
    const Ints sizes = sizes_of(this->input());
    ReductionLayer<T>::check_rank(rank_, sizes);
    Ints dims = dims_;
    kept_sizes_ = sizes;
    if (dims.empty()) {
      for (size_t d = 0; d < sizes.size(); ++d) dims.push_back(static_cast<int64_t>(d));
    }
    count_ = 1;
    for (const int64_t dim : dims) {
      int64_t& size = kept_sizes_[static_cast<size_t>(wrap_dim(dim, sizes.size()))];
      count_ = checked_product(count_, std::exchange(size, 1));
    }
    size_t first = sizes.size();  // of the dimensions that are summed
    for (const int64_t dim : dims) first = std::min(first, static_cast<size_t>(wrap_dim(dim, sizes.size())));
    is_of_rows_ = dims.size() == sizes.size() - first && this->input().is_contiguous() && count_ > 0 &&
                  this->input().numel() <= kFewElements;
    if (is_of_rows_) {
      Ints result = kept_sizes_;
      if (!keeps_) result.resize(first);
      outputs[0] = new_tensor(result, kDtypeOf<T>);
      const T* const from = data<T>(this->input());
      T* const to = mutable_data<T>(outputs[0]);
      for (int64_t r = 0; r < outputs[0].numel(); ++r) {
        const T sum = elementwise_kernels().get<T>().sum(from + r * count_, count_);
        to[r] = sums_ ? sum : sum / divisor();
      }
      return;
    }
    const std::optional<ScalarType> same;
    const bool is_plain_mean = !sums_ && correction_ == 0;
    outputs[0] = stock(is_plain_mean ? "aten::mean" : "aten::sum", is_plain_mean ? "dim" : "dim_IntList", this->input(),
                       std::optional<Ints>(dims), keeps_, same);
    if (!sums_ && !is_plain_mean) outputs[0] = combined<T>(BinaryKind::div, outputs[0], divisor(), false);
  }
  Tensor gradient_of(const Tensor& gradient) override {
    if (is_of_rows_) {
      const Tensor given = dense(gradient);
      Tensor result = new_tensor(sizes_of(this->input()), kDtypeOf<T>);
      T* to = mutable_data<T>(result);
      for (int64_t r = 0; r < given.numel(); ++r, to += count_) {
        const T of_row = data<T>(given)[r];
        std::fill_n(to, count_, sums_ ? of_row : of_row / divisor());
      }
      return result;
    }
    Tensor own = reshaped(gradient, kept_sizes_);
    if (!sums_) own = combined<T>(BinaryKind::div, own, divisor(), false);
    return stock("aten::expand", "", own, sizes_of(this->input()), false);
  }

 private:
  T divisor() const { return static_cast<T>(MeanLayer<T>::divisor(count_, correction_)); }

  Ints dims_, kept_sizes_;
  bool keeps_, sums_, is_of_rows_ = false;
  double correction_;
  int64_t rank_, count_ = 1;
};

template <class T>
class AmaxTraining : public UnaryTraining<T> {
 public:
  explicit AmaxTraining(const ProgramLine& line)
      : UnaryTraining<T>(line),
        dims_(line.integers("dims", -16, 15)),
        keeps_(line.flag("keepdim")),
        shares_(line.text("ties") == "even"),
        rank_(line.integer("rank", 0, 16)) {
    if (!shares_ && line.text("ties") != "first") line.refuse("expected ties=even or ties=first");
    if (!shares_ && dims_.size() != 1) line.refuse("expected one dimension, of which the first element wins");
  }
  void forward(Tensor* outputs) override {
    ReductionLayer<T>::check_rank(rank_, sizes_of(this->input()));
    if (shares_) {
      outputs[0] = stock("aten::amax", "", this->input(), dims_, keeps_);
      largest_ = outputs[0].borrow();
    } else {
      auto both = stock_results<2>("aten::max", "dim", this->input(), dims_[0], keeps_);
      outputs[0] = std::move(both[0]);
      places_ = std::move(both[1]);
    }
  }
  Tensor gradient_of(const Tensor& gradient) override {
    Ints kept = sizes_of(this->input());
    if (!shares_) {
      return stock("aten::value_selecting_reduction_backward", "", gradient, dims_[0], places_, kept, keeps_);
    }
    Ints dims = dims_;
    for (size_t d = 0; dims_.empty() && d < kept.size(); ++d) dims.push_back(static_cast<int64_t>(d));
    for (const int64_t dim : dims) {  // (A number has a dimension 0 in torch's eyes.)
      if (!kept.empty()) kept[static_cast<size_t>(wrap_dim(dim, kept.size()))] = 1;
    }
    const Tensor is_largest = stock("aten::eq", "Tensor", this->input(), reshaped(largest_, kept));
    const Tensor count = stock("aten::sum", "dim_IntList", is_largest, std::optional<Ints>(dims), true,
                               std::optional<ScalarType>(kDtypeOf<T>));
    return stock("aten::mul", "Tensor", combined<T>(BinaryKind::div, reshaped(gradient, kept), count), is_largest);
  }
  void forget() override { largest_ = places_ = Tensor(); }

 private:
  Ints dims_;
  bool keeps_, shares_;
  int64_t rank_;
  Tensor largest_, places_;
};

template <class T>
class SoftmaxTraining : public UnaryTraining<T> {
 public:
  explicit SoftmaxTraining(const ProgramLine& line)
      : UnaryTraining<T>(line), dim_(line.integer("dim", -16, 15)), logarithm_(line.flag("logarithm")) {}
  void forward(Tensor* outputs) override {
    const Tensor input = dense(this->input());
    outputs[0] = new_tensor(sizes_of(input), kDtypeOf<T>);
    const Ints sizes = with_dimensions(input);
    compute_softmax(data<T>(input), sizes, wrapped(sizes), logarithm_, mutable_data<T>(outputs[0]));
    output_ = outputs[0].borrow();
  }
  Tensor gradient_of(const Tensor& gradient) override {
    const Tensor given = dense(gradient);
    Tensor result = new_tensor(sizes_of(output_), kDtypeOf<T>);
    const Ints sizes = with_dimensions(output_);
    const auto& kernels = elementwise_kernels().get<T>();
    const T *const output = data<T>(output_), *const from = data<T>(given);
    T* const to = mutable_data<T>(result);
    for_parts_of_softmax(
        sizes, wrapped(sizes),
        [&](int64_t at, int64_t rows, int64_t count) {
          kernels.softmax_rows_gradient(output + at, from + at, rows, count, logarithm_, to + at);
        },
        [&](int64_t at, int64_t rows, int64_t columns, int64_t step) {
          kernels.softmax_columns_gradient(output + at, from + at, rows, columns, step, logarithm_, to + at);
        });
    return result;
  }
  void forget() override { output_ = Tensor(); }

 private:
  // A tensor's sizes. One without dimensions is one element of one dimension, as torch takes it.
  static Ints with_dimensions(const Tensor& tensor) {
    const Ints sizes = sizes_of(tensor);
    return sizes.empty() ? Ints{1} : sizes;
  }
  size_t wrapped(const Ints& sizes) const { return static_cast<size_t>(wrap_dim(dim_, sizes.size())); }

  int64_t dim_;
  bool logarithm_;
  Tensor output_;
};

// What torch's norms of rows and of groups have in common: an input, perhaps a weight and a bias, and the statistics,
// which backward needs.
template <class T>
class StockNormTraining : public TrainingLayer<T> {
 public:
  explicit StockNormTraining(const ProgramLine& line) : epsilon_(line.real("epsilon")) {
    this->inputs = {line.input("input")};
    for (size_t i = 0; i < 2; ++i) {
      static constexpr const char* names[] = {"weight", "bias"};
      if (!line.has(names[i])) continue;
      place_[i] = this->inputs.size();
      this->inputs.push_back(line.input(names[i]));
    }
  }
  void forget() override { mean_ = inverse_deviation_ = Tensor(); }

 protected:
  // The weight (0) or the bias (1); null where there is none.
  const Tensor* parameter(size_t i) const { return place_[i] ? &this->given[place_[i]] : nullptr; }
  // Which gradients are wanted: of the input, the weight and the bias.
  std::array<bool, 3> wanted_of(const bool* wanted) const {
    return {wanted[0], place_[0] && wanted[place_[0]], place_[1] && wanted[place_[1]]};
  }
  // Keeps the statistics among an operator's results, which are the output and these.
  Tensor keep(std::array<Tensor, 3> all) {
    mean_ = std::move(all[1]);
    inverse_deviation_ = std::move(all[2]);
    return std::move(all[0]);
  }
  // Gives the gradients of the input, the weight and the bias to the inputs that want them.
  void give(std::array<Tensor, 3> all, const bool* wanted, Gradient<T>* results) const {
    if (wanted[0]) results[0] = {std::move(all[0]), nullptr, true};
    for (size_t i = 0; i < 2; ++i) {
      if (place_[i] && wanted[place_[i]]) results[place_[i]] = {std::move(all[i + 1]), nullptr, true};
    }
  }

  const double epsilon_;
  Tensor mean_, inverse_deviation_;

 private:
  size_t place_[2] = {};  // of the weight and the bias among the inputs; 0 where there is none
};

// Layer norm over the last dimensions: `features` elements make a row.
template <class T>
class LayerNormTraining : public StockNormTraining<T> {
 public:
  explicit LayerNormTraining(const ProgramLine& line)
      : StockNormTraining<T>(line), features_(line.integer("features", 1, int64_t{1} << 40)) {}
  void forward(Tensor* outputs) override {
    const Ints sizes = sizes_of(this->given[0]);
    row_.clear();
    int64_t features = 1;
    for (size_t d = sizes.size(); d-- > 0 && (features < features_ || row_.empty());) {
      features = checked_product(features, sizes[d]);
      row_.insert(row_.begin(), sizes[d]);
    }
    FASTNN_CHECK(features == features_, kTrainingStep, ": expected ", features_, " features to normalize, got size ",
                 to_string(sizes));
    for (const size_t i : {0, 1}) {
      const Tensor* const given = this->parameter(i);
      FASTNN_CHECK(!given || given->numel() == features_, kTrainingStep, ": expected ", features_,
                   " weights of a layer norm");
    }
    outputs[0] = this->keep(
        stock_results<3>("aten::native_layer_norm", "", this->given[0], row_, of_row(0), of_row(1), this->epsilon_));
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    const std::array<bool, 3> flags_of_all = this->wanted_of(wanted);
    this->give(stock_results<3>("aten::native_layer_norm_backward", "", gradients[0], this->given[0], row_, this->mean_,
                                this->inverse_deviation_, of_row(0), of_row(1), flags(flags_of_all)),
               wanted, results);
  }

 private:
  OptionalTensor of_row(size_t i) const {
    const Tensor* const given = this->parameter(i);
    return given ? OptionalTensor(reshaped(*given, row_)) : std::nullopt;
  }

  int64_t features_;
  Ints row_;
};

template <class T>
class GroupNormTraining : public StockNormTraining<T> {
 public:
  explicit GroupNormTraining(const ProgramLine& line)
      : StockNormTraining<T>(line), groups_(line.integer("groups", 0, kMostSize)), dims_(line.integer("dims", 0, 3)) {
    if (line.activation("activation").kind != ActivationKind::identity) {
      line.refuse("in training it has no activation");
    }
  }
  void forward(Tensor* outputs) override {
    const Tensor& given = this->given[0];
    GroupNormLayer<T>::check_sizes(sizes_of(given), groups_, dims_);
    const int64_t channels = given.size(1), pixels = product(sizes_of(given), 2, given.dim());
    for (const size_t i : {0, 1}) {
      const Tensor* const of = this->parameter(i);
      FASTNN_CHECK(!of || (of->dim() == 1 && of->size(0) == channels), kTrainingStep, ": expected ", channels,
                   " weights of a group norm");
    }
    // torch's instance norm gives contiguous images, its group norm images that lie as the input does.
    input_ = groups_ != 0 && is_dense_channels_last(given) ? given.borrow() : dense(given);
    sizes_ = {given.size(0), channels, pixels, groups_ == 0 ? channels : groups_};
    outputs[0] = this->keep(stock_results<3>("aten::native_group_norm", "", input_, weight(0), weight(1), sizes_[0],
                                             sizes_[1], sizes_[2], sizes_[3], this->epsilon_));
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    std::array<bool, 3> flags_of_all = this->wanted_of(wanted);
    // With channels last, torch's kernel writes the input's gradient even if that is not asked for, and would crash.
    flags_of_all[0] = flags_of_all[0] || !input_.is_contiguous();
    Tensor gradient = gradients[0].borrow();
    if (!same_strides(gradient, input_)) {  // Torch's kernel reads the gradient in the input's order of memory.
      gradient = new_like<T>(input_);
      stock("aten::copy_", "", gradient, gradients[0], false);
    }
    this->give(stock_results<3>("aten::native_group_norm_backward", "", gradient, input_, this->mean_,
                                this->inverse_deviation_, weight(0), sizes_[0], sizes_[1], sizes_[2], sizes_[3],
                                flags(flags_of_all)),
               wanted, results);
  }
  void forget() override {
    StockNormTraining<T>::forget();
    input_ = Tensor();
  }

 private:
  // The weight (0) or the bias (1), contiguous, since torch's kernels do not look at the strides.
  OptionalTensor weight(size_t i) const {
    const Tensor* const given = this->parameter(i);
    return given ? OptionalTensor(dense(*given)) : std::nullopt;
  }

  int64_t groups_, dims_;
  std::array<int64_t, 4> sizes_{};  // images, channels, pixels and groups
  Tensor input_;
};

// max_pool and avg_pool. Torch pools a single dimension as the second of two.
template <class T, bool averages>
class PoolTraining : public UnaryTraining<T> {
 public:
  explicit PoolTraining(const ProgramLine& line)
      : UnaryTraining<T>(line), kernel_(line.integers("kernel", 1, kMostSize)) {
    const size_t dims = kernel_.size();
    if (dims < 1 || dims > 3) line.refuse("expected a kernel of 1 to 3 dimensions");
    stride_ = line.text("stride").empty() ? kernel_ : line.integers("stride", 1, kMostSize, dims);
    padding_ = line.integers("padding", 0, kMostSize, dims);
    bool pads = false;
    for (size_t d = 0; d < dims; ++d) {
      if (padding_[d] > kernel_[d] / 2) line.refuse("pad should be at most half of kernel size");
      pads = pads || padding_[d] > 0;
    }
    if constexpr (averages) {
      counts_padding_ = line.flag("count_include_pad");
    } else {
      dilation_ = line.integers("dilation", 1, kMostSize, dims);
      ceil_mode_ = line.flag("ceil_mode");
      for (const int64_t dilation : dilation_) {  // of such windows torch's backward writes out of bounds
        if (pads && dilation > 1) line.refuse("in training a window may not be all padding");
      }
    }
    flat_ = dims == 1;
    if (flat_) {
      for (Ints* const numbers : {&kernel_, &stride_, &dilation_}) numbers->insert(numbers->begin(), 1);
      padding_.insert(padding_.begin(), 0);
    }
  }
  void forward(Tensor* outputs) override {
    fail_unless_rank(this->input(), static_cast<int64_t>(kernel_.size()) + (flat_ ? 1 : 2));
    own_ = !averages && has_own_kernel();
    if (own_) return pool(outputs);
    images_ = flat_ ? stock("aten::unsqueeze", "", this->input(), int64_t{2}) : this->input().borrow();
    const bool cube = kernel_.size() == 3;
    if constexpr (averages) {
      output_ = stock(cube ? "aten::avg_pool3d" : "aten::avg_pool2d", "", images_, kernel_, stride_, padding_, false,
                      counts_padding_, std::optional<int64_t>());
    } else {
      auto both = stock_results<2>(cube ? "aten::max_pool3d_with_indices" : "aten::max_pool2d_with_indices", "",
                                   images_, kernel_, stride_, padding_, dilation_, ceil_mode_);
      output_ = std::move(both[0]);
      places_ = std::move(both[1]);
    }
    outputs[0] = flat_ ? stock("aten::squeeze", "dim", output_, int64_t{2}) : output_.borrow();
  }
  Tensor gradient_of(const Tensor& gradient) override {
    if (own_) return spread(gradient);
    const Tensor own = flat_ ? stock("aten::unsqueeze", "", gradient, int64_t{2}) : gradient.borrow();
    const bool cube = kernel_.size() == 3;
    Tensor result;
    if constexpr (averages) {
      result = stock(cube ? "aten::avg_pool3d_backward" : "aten::avg_pool2d_backward", "", own, images_, kernel_,
                     stride_, padding_, false, counts_padding_, std::optional<int64_t>());
    } else {
      result = stock(cube ? "aten::max_pool3d_with_indices_backward" : "aten::max_pool2d_with_indices_backward", "",
                     own, images_, kernel_, stride_, padding_, dilation_, ceil_mode_, places_);
    }
    return flat_ ? stock("aten::squeeze", "dim", result, int64_t{2}) : std::move(result);
  }
  void release() override { images_ = output_ = places_ = winners_ = Tensor(); }
  void forget() override { release(); }

 private:
  bool has_own_kernel() const {
    int64_t places = 1;
    for (const int64_t size : kernel_) places = checked_product(places, size);
    const auto is_one = [](int64_t dilation) { return dilation == 1; };
    return kernel_.size() == 2 && places <= MaxPoolSizes::kMostPlaces && this->input().is_contiguous() &&
           std::all_of(dilation_.begin(), dilation_.end(), is_one);
  }
  // Sets the sizes -> how many planes there are.
  int64_t set_sizes() {
    const Ints sizes = sizes_of(this->input());
    for (size_t d = 0; d < 2; ++d) {
      const bool is_there = d > 0 || !flat_;
      const int64_t size = is_there ? sizes[sizes.size() - 2 + d] : 1;
      const int64_t count = pooled_size(size, kernel_[d], stride_[d], padding_[d], 1, ceil_mode_);
      FASTNN_CHECK(size > 0 && count > 0, kTrainingStep, ": a pool's output would be too small for an input of size ",
                   to_string(sizes));
      pool_.input[d] = size;
      pool_.output[d] = count;
      pool_.kernel[d] = kernel_[d];
      pool_.stride[d] = stride_[d];
      pool_.padding[d] = padding_[d];
    }
    return checked_product(sizes[0], sizes[1]);
  }
  double work() const {
    return static_cast<double>(pool_.output[0] * pool_.output[1]) *
           static_cast<double>(pool_.kernel[0] * pool_.kernel[1]);
  }
  void pool(Tensor* outputs) {
    const int64_t planes = set_sizes();
    Ints sizes = sizes_of(this->input());
    for (size_t d = flat_ ? 1 : 0; d < 2; ++d) sizes[sizes.size() - 2 + d] = pool_.output[d];
    output_ = new_tensor(sizes, kDtypeOf<T>);
    winners_ = new_tensor(sizes, ScalarType::Byte);
    const auto& kernels = max_pool_kernels().get<T>();
    const T* const from = data<T>(this->input());
    T* const to = mutable_data<T>(output_);
    uint8_t* const winners = mutable_data<uint8_t>(winners_);
    const int64_t in = pool_.input[0] * pool_.input[1], out = pool_.output[0] * pool_.output[1];
    parallel_range(planes, work(), [&](int64_t first, int64_t last) {
      const Scratch<T> scratch(kernels.scratch(pool_));
      for (int64_t i = first; i < last; ++i) {
        kernels.forward(pool_, from + i * in, scratch.get(), to + i * out, winners + i * out);
      }
    });
    outputs[0] = output_.borrow();
  }
  Tensor spread(const Tensor& gradient) const {
    const Tensor own = dense(gradient);
    Tensor result = new_tensor(sizes_of(this->input()), kDtypeOf<T>);
    const auto& kernels = max_pool_kernels().get<T>();
    const int64_t in = pool_.input[0] * pool_.input[1], out = pool_.output[0] * pool_.output[1];
    const T* const from = data<T>(own);
    const uint8_t* const winners = data<uint8_t>(winners_);
    T* const to = mutable_data<T>(result);
    parallel_range(result.numel() / in, work(), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        std::fill_n(to + i * in, in, T(0));
        kernels.backward(pool_, from + i * out, winners + i * out, to + i * in);
      }
    });
    return result;
  }

  Ints kernel_, stride_, padding_, dilation_;
  bool ceil_mode_ = false, counts_padding_ = true, flat_, own_ = false;
  MaxPoolSizes pool_;
  Tensor images_, output_, places_, winners_;
};
template <class T>
using MaxPoolTraining = PoolTraining<T, false>;
template <class T>
using AvgPoolTraining = PoolTraining<T, true>;

// Divides each dimension into so many parts and averages each part, as torch's adaptive pools do.
template <class T>
class AdaptiveAverageTraining : public UnaryTraining<T> {
 public:
  explicit AdaptiveAverageTraining(const ProgramLine& line)
      : UnaryTraining<T>(line), parts_(line.integers("sizes", 1, kMostSize)) {
    if (parts_.empty() || parts_.size() > 3) line.refuse("expected one to three sizes");
    flat_ = parts_.size() == 1;
    if (flat_) parts_.insert(parts_.begin(), 1);
  }
  void forward(Tensor* outputs) override {
    fail_unless_rank(this->input(), static_cast<int64_t>(parts_.size()) + (flat_ ? 1 : 2));
    images_ = flat_ ? stock("aten::unsqueeze", "", this->input(), int64_t{2}) : this->input().borrow();
    output_ = adaptive_average(images_, parts_);
    outputs[0] = flat_ ? stock("aten::squeeze", "dim", output_, int64_t{2}) : output_.borrow();
  }
  Tensor gradient_of(const Tensor& gradient) override {
    if (!flat_) return adaptive_average_backward(gradient, images_);
    const Tensor own = stock("aten::unsqueeze", "", gradient, int64_t{2});
    return stock("aten::squeeze", "dim", adaptive_average_backward(own, images_), int64_t{2});
  }
  void forget() override { images_ = output_ = Tensor(); }

 private:
  Ints parts_;
  bool flat_;
  Tensor images_, output_;
};

// Images enlarged by whole factors, or of other sizes: by the nearest pixels by torch, and linearly by ourselves.
template <class T>
class UpsampleTraining : public SizedTraining<T, UpsampleLayer> {
 public:
  using SizedTraining<T, UpsampleLayer>::SizedTraining;
  void forward(Tensor* outputs) override {
    sizes_ = this->output_sizes();
    const UpsampleLayer<T>& layer = this->layer_;
    const Tensor& input = this->given[0];
    const Ints size(sizes_.begin() + 2, sizes_.end());
    const std::optional<double> first = layer.scale(0), second = layer.scale(1);
    if (layer.is_linear()) {
      last_ = is_channels_last(input);
      outputs[0] = new_formatted(sizes_, kDtypeOf<T>, last_);
      const Tensor images = in_order(input);
      layer.enlarge(data<T>(images), sizes_of(input), sizes_, last_, mutable_data<T>(outputs[0]));
    } else if (size.size() == 1) {
      outputs[0] = stock("aten::upsample_nearest1d", "", input, size, first);
    } else {
      outputs[0] = stock("aten::upsample_nearest2d", "", input, size, first, second);
    }
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    if (!wanted[0]) return;
    const UpsampleLayer<T>& layer = this->layer_;
    const Tensor& gradient = gradients[0];
    const Ints own = sizes_of(this->given[0]), size(sizes_.begin() + 2, sizes_.end());
    const std::optional<double> first = layer.scale(0), second = layer.scale(1);
    if (layer.is_linear()) {
      Tensor result = new_formatted(own, kDtypeOf<T>, last_);
      const Tensor images = in_order(gradient);
      layer.add_back(data<T>(images), own, sizes_, last_, mutable_data<T>(result));
      results[0] = {std::move(result), nullptr, true};
    } else if (size.size() == 1) {
      results[0].tensor = stock("aten::upsample_nearest1d_backward", "", gradient, size, own, first);
    } else {
      results[0].tensor = stock("aten::upsample_nearest2d_backward", "", gradient, size, own, first, second);
    }
  }

 private:
  // The images as they are, or a copy whose elements lie without gaps in this layer's format.
  Tensor in_order(const Tensor& images) const {
    const Ints strides = format_strides(sizes_of(images), last_);
    const Sizes own = images.strides();
    if (std::equal(own.begin(), own.end(), strides.begin())) return images.borrow();
    Tensor copy = new_formatted(sizes_of(images), kDtypeOf<T>, last_);
    stock("aten::copy_", "", copy, images, false);
    return copy;
  }

  Ints sizes_;         // of the output
  bool last_ = false;  // channels last
};

}  // namespace fastnn
