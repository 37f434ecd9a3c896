// activation, clamp, unary, prelu, binary, where, dropout and noise in training: element by element.
#pragma once

#include <numeric>

#include "../layers/elementwise.h"
#include "rows.h"

namespace fastnn {

// Returns the activated tensor, and what it was computed from: the given tensor, or a copy that has the result's
// strides.
template <class T>
std::array<Tensor, 2> activated(const Activation& activation, const Tensor& given) {
  Tensor output = new_like<T>(given);
  Tensor from = same_strides(given, output) ? given.borrow() : dense(given);
  if (!same_strides(from, output)) output = new_tensor(sizes_of(from), kDtypeOf<T>);
  activate<T>(activation, data<T>(from), output.numel(), mutable_data<T>(output));
  return {std::move(output), std::move(from)};
}

// gradient times an activation's derivative. kept: what the derivative is computed from. The result lies as `kept`
// does, if the gradient does, too.
template <class T>
Tensor activation_gradient(const Activation& activation, const Tensor& gradient, const Tensor& kept) {
  const bool alike = same_strides(gradient, kept);
  const Tensor grad_output = alike ? gradient.borrow() : dense(gradient), from = alike ? kept.borrow() : dense(kept);
  Tensor result = alike ? new_like<T>(kept) : new_tensor(sizes_of(kept), kDtypeOf<T>);
  const auto& elementwise = mlp_kernels().elementwise.template get<T>();
  parallel_range(result.numel(), kActivationWork, [&](int64_t first, int64_t last) {
    elementwise.gradient(activation, data<T>(grad_output) + first, data<T>(from) + first,
                         mutable_data<T>(result) + first, last - first);
  });
  return result;
}

// One of mlp's activations as a layer.
template <class T>
class ActivationTraining : public UnaryTraining<T> {
 public:
  explicit ActivationTraining(const ProgramLine& line)
      : UnaryTraining<T>(line), text_(line.text("activation")), activation_(line.activation()) {}
  std::string_view activation_text() const override { return text_; }
  const Activation& activation() const { return activation_; }
  void forward(Tensor* outputs) override {
    std::array<Tensor, 2> both = activated<T>(activation_, this->input());
    output_ = std::move(both[0]);
    from_ = std::move(both[1]);
    outputs[0] = output_.borrow();
  }
  Tensor gradient_of(const Tensor& gradient) override {
    return activation_gradient<T>(activation_, gradient, saves_input(activation_) ? from_ : output_);
  }
  void release() override { output_ = from_ = Tensor(); }
  void forget() override { release(); }

 private:
  std::string text_;
  Activation activation_;
  Tensor output_, from_;
};

// The gradient passes where the element lies within the bounds or at a bound. Through a hardtanh it does not pass at a
// bound.
template <class T>
class ClampTraining : public UnaryTraining<T> {
 public:
  explicit ClampTraining(const ProgramLine& line)
      : UnaryTraining<T>(line),
        bounds_(ClampLayer<T>::bounds_of(line)),
        least_(static_cast<T>(line.real("min"))),
        most_(static_cast<T>(line.real("max"))) {}
  void forward(Tensor* outputs) override {
    std::array<Tensor, 2> both = activated<T>(bounds_, this->input());
    outputs[0] = std::move(both[0]);
    from_ = std::move(both[1]);
  }
  Tensor gradient_of(const Tensor& gradient) override {
    const Tensor own = same_strides(gradient, from_) ? gradient.borrow() : dense(gradient);
    const Tensor from = same_strides(own, from_) ? from_.borrow() : dense(from_);
    Tensor result = new_like<T>(own);
    const T *const grad = data<T>(own), *const x = data<T>(from);
    T* const to = mutable_data<T>(result);
    parallel_range(result.numel(), kCopyWork, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) to[i] = x[i] >= least_ && x[i] <= most_ ? grad[i] : T(0);
    });
    return result;
  }
  void release() override { from_ = Tensor(); }
  void forget() override { release(); }

 private:
  Activation bounds_;
  T least_, most_;
  Tensor from_;
};

template <class T>
class FunctionTraining : public UnaryTraining<T> {
 public:
  explicit FunctionTraining(const ProgramLine& line)
      : UnaryTraining<T>(line), kind_(unary_kind(line)), name_(stock_unary_name(line)) {}
  void forward(Tensor* outputs) override {
    outputs[0] = stock(name_.c_str(), "", this->input());
    output_ = outputs[0].borrow();
  }
  Tensor gradient_of(const Tensor& gradient) override {
    const Tensor& x = this->input();
    switch (kind_) {
      case UnaryKind::abs:
        return combined<T>(BinaryKind::mul, gradient, stock("aten::sgn", "", x));
      case UnaryKind::sqrt:
        return combined<T>(BinaryKind::div, gradient, combined<T>(BinaryKind::mul, output_, T(2), false));
      case UnaryKind::rsqrt: {
        const Tensor cube = combined<T>(BinaryKind::mul, combined<T>(BinaryKind::mul, output_, output_), output_);
        return combined<T>(BinaryKind::mul, combined<T>(BinaryKind::mul, gradient, T(-0.5), false), cube);
      }
      case UnaryKind::log:
        return combined<T>(BinaryKind::div, gradient, x);
      case UnaryKind::log1p:
        return combined<T>(BinaryKind::div, gradient, combined<T>(BinaryKind::add, x, T(1), false));
      case UnaryKind::expm1:
        return combined<T>(BinaryKind::mul, gradient, combined<T>(BinaryKind::add, output_, T(1), false));
      case UnaryKind::erf: {
        constexpr double kTwoOverRootPi = 1.1283791670955126;
        const Tensor bell = stock("aten::exp", "", stock("aten::neg", "", combined<T>(BinaryKind::mul, x, x)));
        return combined<T>(BinaryKind::mul, combined<T>(BinaryKind::mul, gradient, bell), T(kTwoOverRootPi), false);
      }
      case UnaryKind::atan: {
        const Tensor square = combined<T>(BinaryKind::mul, x, x);
        return combined<T>(BinaryKind::div, gradient, combined<T>(BinaryKind::add, square, T(1), false));
      }
      case UnaryKind::sign:
      case UnaryKind::round:
      case UnaryKind::floor:
      case UnaryKind::ceil: {
        Tensor zeros = new_like<T>(x);
        std::fill_n(mutable_data<T>(zeros), zeros.numel(), T(0));
        return zeros;
      }
      case UnaryKind::root: {
        const Tensor own = dense(gradient), root = dense(output_);
        Tensor result = new_tensor(sizes_of(x), kDtypeOf<T>);
        const T *const grad = data<T>(own), *const y = data<T>(root);
        T* const to = mutable_data<T>(result);
        for (int64_t i = 0; i < result.numel(); ++i) to[i] = y[i] == T(0) ? T(0) : grad[i] / (2 * y[i]);
        return result;
      }
    }
    fail("there is no such function");
  }
  void forget() override { output_ = Tensor(); }

 private:
  UnaryKind kind_;
  std::string name_;
  Tensor output_;
};

// Fails where the result of an operation in place has other sizes than what it is written to.
inline void check_fits(const Tensor& result, const Tensor& written) {
  FASTNN_CHECK(same_sizes(result, written), kTrainingStep, ": output with shape ", to_string(written.sizes()),
               " doesn't match the broadcast shape ", to_string(result.sizes()));
}

template <class T>
class BinaryTraining : public TrainingLayer<T> {
 public:
  explicit BinaryTraining(const ProgramLine& line)
      : kind_(binary_kind(line)), reverses_(line.flag("reverses")), in_place_(line.flag("in_place")) {
    this->inputs = {line.input("input")};
    this->take(line, {"other"});
    if (this->inputs.size() == 1) number_ = static_cast<T>(line.real("number"));
    if (is_extreme() && this->inputs.size() == 1) line.refuse("it is a clamp in training");
    for (const char* const name : {"activation", "input_activation", "other_activation"}) {
      if (line.activation(name).kind != ActivationKind::identity) line.refuse("in training it has no activation");
    }
  }
  // Whether the layer is the sum of two values, and which of them comes first.
  bool adds() const { return kind_ == BinaryKind::add && this->inputs.size() == 2; }
  size_t left() const { return reverses_ ? 1 : 0; }
  // Whether the model writes the result to the first input, which it must not outgrow.
  bool in_place() const { return in_place_; }
  void forward(Tensor* outputs) override {
    outputs[0] = this->given.size() == 1 ? combined<T>(kind_, this->given[0], number_, reverses_)
                                         : combined<T>(kind_, first(), second());
    if (in_place_) check_fits(outputs[0], this->given[0]);
    output_ = outputs[0].borrow();
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    if (is_comparison(kind_)) return;  // The derivative is 0.
    const Tensor& gradient = gradients[0];
    if (this->given.size() == 1) {
      if (wanted[0]) results[0].tensor = of_input_beside_number(gradient);
      return;
    }
    const size_t left = reverses_ ? 1 : 0, right = 1 - left;
    if (is_extreme()) return of_extreme(gradient, left, wanted, results);
    const Ints first_sizes = sizes_of(first()), second_sizes = sizes_of(second());
    if (wanted[left]) {
      Tensor own = kind_ == BinaryKind::mul   ? combined<T>(BinaryKind::mul, gradient, second())
                   : kind_ == BinaryKind::div ? combined<T>(BinaryKind::div, gradient, second())
                                              : Tensor(gradient);
      results[left].tensor = reduced(std::move(own), first_sizes);
    }
    if (wanted[right]) {
      Tensor own =
          kind_ == BinaryKind::mul ? combined<T>(BinaryKind::mul, gradient, first())
          : kind_ == BinaryKind::div
              ? negated(combined<T>(BinaryKind::div, combined<T>(BinaryKind::mul, gradient, output_), second()))
          : kind_ == BinaryKind::sub ? negated(gradient)
                                     : Tensor(gradient);
      results[right].tensor = reduced(std::move(own), second_sizes);
    }
  }
  void forget() override { output_ = Tensor(); }

 private:
  const Tensor& first() const { return this->given[reverses_ ? 1 : 0]; }
  const Tensor& second() const { return this->given[reverses_ ? 0 : 1]; }
  bool is_extreme() const { return kind_ == BinaryKind::maximum || kind_ == BinaryKind::minimum; }
  // The gradient passes to the operand that was taken; where they are equal, half of it passes to each.
  void of_extreme(const Tensor& gradient, size_t left, const bool* wanted, Gradient<T>* results) const {
    const Tensor equal = combined<T>(BinaryKind::eq, first(), second()), none;
    const Tensor shared = chosen<T>(equal, combined<T>(BinaryKind::mul, gradient, T(0.5), false), gradient, T(0));
    for (size_t i = 0; i < 2; ++i) {
      if (!wanted[i]) continue;
      const bool is_smaller = (i == left) == (kind_ == BinaryKind::maximum);
      const Tensor loses = combined<T>(is_smaller ? BinaryKind::lt : BinaryKind::gt, first(), second());
      results[i].tensor = reduced(chosen<T>(loses, none, shared, T(0)), sizes_of(this->given[i]));
    }
  }
  static Tensor negated(const Tensor& tensor) { return combined<T>(BinaryKind::mul, tensor, T(-1), false); }
  Tensor of_input_beside_number(const Tensor& gradient) const {
    switch (kind_) {
      case BinaryKind::mul:
        return combined<T>(BinaryKind::mul, gradient, number_, false);
      case BinaryKind::div:
        if (!reverses_) return combined<T>(BinaryKind::div, gradient, number_, false);
        return negated(combined<T>(BinaryKind::div, combined<T>(BinaryKind::mul, gradient, output_), this->given[0]));
      default:
        return kind_ == BinaryKind::sub && reverses_ ? negated(gradient) : Tensor(gradient);
    }
  }

  BinaryKind kind_;
  T number_ = 0;
  bool reverses_;  // the second operand comes first
  bool in_place_;
  Tensor output_;
};

// The gradient passes to the operand that was chosen; the other's is 0.
template <class T>
class WhereTraining : public TrainingLayer<T> {
 public:
  explicit WhereTraining(const ProgramLine& line) : operands_(line) { this->inputs = operands_.values; }
  void forward(Tensor* outputs) override {
    outputs[0] = chosen<T>(this->given[0], operand(1), operand(2), static_cast<T>(operands_.number));
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    const Tensor &condition = this->given[0], none;
    for (size_t i = 1; i < this->given.size(); ++i) {
      if (!wanted[i]) continue;
      const bool is_first = i == 1 && operands_.of_number != 1;
      Tensor own = is_first ? chosen<T>(condition, gradients[0], none, 0) : chosen<T>(condition, none, gradients[0], 0);
      results[i].tensor = reduced(std::move(own), sizes_of(this->given[i]));
    }
  }

 private:
  // Of condition, input and other, the operand with this number; undefined where it is the line's number.
  Tensor operand(size_t which) const {
    if (which == operands_.of_number) return {};
    return this->given[which > operands_.of_number ? which - 1 : which].borrow();
  }
  typename WhereLayer<T>::Operands operands_;
};

// lerp: from the first input to the other, as far as the amount says.
template <class T>
class LerpTraining : public TrainingLayer<T> {
 public:
  explicit LerpTraining(const ProgramLine& line) { this->take(line, {"input", "other", "amount"}); }
  void forward(Tensor* outputs) override {
    outputs[0] = stock("aten::lerp", "Tensor", this->given[0], this->given[1], this->given[2]);
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    const Tensor &start = this->given[0], &end = this->given[1], &amount = this->given[2];
    const auto set = [&](size_t i, const Tensor& factor) {
      results[i].tensor = reduced(combined<T>(BinaryKind::mul, gradients[0], factor), sizes_of(this->given[i]));
    };
    if (wanted[0]) set(0, combined<T>(BinaryKind::sub, amount, T(1), true));
    if (wanted[1]) set(1, amount);
    if (wanted[2]) set(2, combined<T>(BinaryKind::sub, end, start));
  }
};

// The derivative by x is (x - target) / (x (1 - x)), where torch has a divisor of 1e-12 at least, and that by the
// target is log(1 - x) - log(x).
template <class T>
class BinaryCrossEntropyTraining : public TrainingLayer<T> {
 public:
  explicit BinaryCrossEntropyTraining(const ProgramLine& line) { this->take(line, {"input", "target"}); }
  void forward(Tensor* outputs) override {
    FASTNN_CHECK(same_sizes(this->given[0], this->given[1]), kTrainingStep, ": expected a target of size ",
                 to_string(this->given[0].sizes()), ", got ", to_string(this->given[1].sizes()));
    const Tensor x = dense(this->given[0]), target = dense(this->given[1]);
    outputs[0] = new_tensor(sizes_of(x), kDtypeOf<T>);
    binary_cross_entropies(data<T>(x), data<T>(target), x.numel(), mutable_data<T>(outputs[0]));
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    const Tensor input = dense(this->given[0]);
    if (wanted[0]) {
      const Tensor wanted_of = dense(this->given[1]), gradient = dense(gradients[0]);
      const T *const x = data<T>(input), *const target = data<T>(wanted_of), *const of = data<T>(gradient);
      Tensor result = new_tensor(sizes_of(input), kDtypeOf<T>);
      T* const to = mutable_data<T>(result);
      parallel_range(result.numel(), kActivationWork, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          to[i] = of[i] * (x[i] - target[i]) / std::max((1 - x[i]) * x[i], T(1e-12));
        }
      });
      results[0] = {std::move(result), nullptr, true};
    }
    if (wanted[1]) {
      const Tensor of_zero = stock("aten::log1p", "", combined<T>(BinaryKind::mul, input, T(-1), false));
      const Tensor logits = combined<T>(BinaryKind::sub, of_zero, stock("aten::log", "", input));
      results[1].tensor = combined<T>(BinaryKind::mul, gradients[0], logits);
    }
  }
};

// prelu: forward by torch, whose backward takes four times as long as this one.
template <class T>
class PreluTraining : public TrainingLayer<T> {
 public:
  explicit PreluTraining(const ProgramLine& line) { this->inputs = {line.input("input"), line.input("weight")}; }
  void forward(Tensor* outputs) override { outputs[0] = stock("aten::_prelu_kernel", "", this->given[0], weight()); }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    const Tensor& given = this->given[0];
    // The gradient and x lie alike, without gaps: as x does, or else contiguous.
    const bool alike = same_strides(given, new_like<T>(given)) && same_strides(given, gradients[0]);
    const Tensor x = alike ? given.borrow() : dense(given), slopes = dense(this->given[1]);
    const Tensor gradient = alike ? gradients[0].borrow() : dense(gradients[0]);
    Tensor of_input = new_like<T>(x), of_slopes = new_tensor(sizes_of(this->given[1]), kDtypeOf<T>);
    const int64_t channels = slopes.numel(), count = x.numel();
    const Elements all{data<T>(gradient), data<T>(x), mutable_data<T>(of_input)};
    std::vector<double> sums(static_cast<size_t>(channels));
    if (channels > 1 && x.stride(1) == 1 && x.size(1) > 1) {
      of_pixels(all, count, data<T>(slopes), sums);
    } else {
      constexpr int64_t kPiece = 4096;  // of the elements that have one slope
      of_planes(all, count, channels > 1 ? count / std::max<int64_t>(x.size(0) * channels, 1) : kPiece, data<T>(slopes),
                sums);
    }
    std::copy(sums.begin(), sums.end(), mutable_data<T>(of_slopes));
    if (wanted[0]) results[0] = {std::move(of_input), nullptr, true};
    if (wanted[1]) results[1].tensor = std::move(of_slopes);
  }

 private:
  struct Elements {
    const T *gradient, *x;
    T* of_input;
  };
  // The elements are pixels of all channels. Adds the gradients of the slopes to `sums`.
  static void of_pixels(const Elements& all, int64_t count, const T* slopes, std::vector<double>& sums) {
    // The pixels that are summed in T, which is quick, before the sums are added in double: few, so that rounding
    // errors stay small, and the pieces do not depend on the number of threads.
    constexpr int64_t kPiece = 256;
    const int64_t channels = static_cast<int64_t>(sums.size()), pixels = count / channels;
    const int64_t pieces = (pixels + kPiece - 1) / kPiece;
    std::vector<T> of_piece(static_cast<size_t>(pieces * channels));
    parallel_range(pieces, kActivationWork * static_cast<double>(kPiece * channels), [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) {
        T* const piece_sums = of_piece.data() + piece * channels;
        for (int64_t pixel = piece * kPiece; pixel < std::min(pixels, (piece + 1) * kPiece); ++pixel) {
          const T *const x = all.x + pixel * channels, *const gradient = all.gradient + pixel * channels;
          T* const of_input = all.of_input + pixel * channels;
          for (int64_t c = 0; c < channels; ++c) {
            const T scaled = slopes[c] * gradient[c], part = x[c] * gradient[c];
            of_input[c] = x[c] > 0 ? gradient[c] : scaled;
            piece_sums[c] += x[c] > 0 ? T(0) : part;
          }
        }
      }
    });
    for (int64_t i = 0; i < pieces * channels; ++i) {
      sums[static_cast<size_t>(i % channels)] += of_piece[static_cast<size_t>(i)];
    }
  }
  // The same for planes of one channel each, of `inner` elements.
  static void of_planes(const Elements& all, int64_t count, int64_t inner, const T* slopes, std::vector<double>& sums) {
    constexpr int64_t kTogether = 16;  // sums side by side, which the compiler keeps in vectors
    const int64_t channels = static_cast<int64_t>(sums.size());
    const int64_t planes = inner > 0 ? (count + inner - 1) / inner : 0;
    std::vector<double> of_plane(static_cast<size_t>(planes));
    parallel_range(planes, kActivationWork * static_cast<double>(inner), [&](int64_t first, int64_t last) {
      for (int64_t plane = first; plane < last; ++plane) {
        const T slope = slopes[plane % channels];
        const int64_t end = std::min(count, (plane + 1) * inner);
        T lanes[kTogether] = {};
        for (int64_t i = plane * inner; i < end; i += kTogether) {
          for (int64_t l = 0; l < std::min(kTogether, end - i); ++l) {
            const T x = all.x[i + l], gradient = all.gradient[i + l];
            all.of_input[i + l] = x > 0 ? gradient : slope * gradient;
            lanes[l] += x > 0 ? T(0) : x * gradient;
          }
        }
        of_plane[static_cast<size_t>(plane)] = std::accumulate(lanes, lanes + kTogether, 0.0);
      }
    });
    for (int64_t plane = 0; plane < planes; ++plane) {
      sums[static_cast<size_t>(plane % channels)] += of_plane[static_cast<size_t>(plane)];
    }
  }
  // The weight with as many dimensions as the input, so that torch broadcasts it.
  Tensor weight() const {
    const Tensor& weight = this->given[1];
    PreluLayer<T>::check_weight(weight.numel(), sizes_of(this->given[0]));
    Ints sizes(static_cast<size_t>(this->given[0].dim()), 1);
    if (sizes.size() > 1) sizes[1] = weight.numel();
    return reshaped(weight, sizes);
  }
};

// Drops elements, or all elements of a channel together.
template <class T>
class DropoutTraining : public UnaryTraining<T> {
 public:
  explicit DropoutTraining(const ProgramLine& line)
      : UnaryTraining<T>(line), drops_(probability(line, "p")), dims_(line.integer("channels_of", 0, 3)) {}
  void forward(Tensor* outputs) override {
    if (dims_ == 0) {
      scales_ = new_like<T>(this->input());  // has the input's strides, since stock draws in the order of memory
    } else {
      Ints sizes = sizes_of(this->input());
      FASTNN_CHECK(this->input().dim() == dims_ + 2, kTrainingStep, ": expected a batch of ", dims_,
                   "d images, got size ", to_string(sizes));
      std::fill(sizes.begin() + 2, sizes.end(), 1);
      scales_ = new_tensor(sizes, kDtypeOf<T>);
    }
    draw_scales<T>(drops_, scales_);
    outputs[0] = combined<T>(BinaryKind::mul, this->input(), scales_);
  }
  Tensor gradient_of(const Tensor& gradient) override { return combined<T>(BinaryKind::mul, gradient, scales_); }
  Tensor drawn() const override { return scales_; }
  void release() override { scales_ = Tensor(); }
  void forget() override { release(); }

 private:
  double drops_;
  int64_t dims_;  // of the images whose channels are dropped as a whole; 0 where elements are
  Tensor scales_;
};

// Random numbers, drawn by torch: normal ones, uniform ones from 0 to 1, or ones of the probability `p` among zeros.
// The sizes are those that the line asks for. Where they are another value's, so are the strides, because torch draws
// in the order of memory; or only the first `keeps` sizes are that value's, and the others are 1.
template <class T>
class NoiseTraining : public TrainingLayer<T> {
 public:
  explicit NoiseTraining(const ProgramLine& line)
      : asked_(line, {}, this->inputs),
        keeps_(line.integer("keeps", -1, 16)),
        distribution_(line.text("distribution")),
        p_(line.real("p")) {
    if (keeps_ >= 0 && !asked_.are_another_values()) line.refuse("expected keeps with the sizes of another value");
    if (distribution_ != "normal" && distribution_ != "uniform" && distribution_ != "bernoulli") {
      line.refuse("there is no distribution \"", distribution_, "\"");
    }
    if (!(p_ >= 0 && p_ <= 1)) line.refuse("expected p from 0 to 1, got ", p_);
  }
  size_t inputs_for_sizes() const override { return asked_.like(); }
  void forward(Tensor* outputs) override {
    if (asked_.are_another_values() && keeps_ < 0) {
      noise_ = new_like<T>(this->given[0]);
    } else {
      Site<T> site;
      for (const Tensor& tensor : this->given) site.inputs.push_back({sizes_of(tensor)});
      Ints sizes = asked_.of(site);
      for (const int64_t size : sizes) {
        FASTNN_CHECK(size >= 0, "Trying to create tensor with negative dimension ", size, ": ", to_string(sizes));
      }
      if (keeps_ >= 0) {
        FASTNN_CHECK(static_cast<size_t>(keeps_) <= sizes.size(), "expected at least ", keeps_,
                     " dimensions, got size ", to_string(sizes));
        std::fill(sizes.begin() + keeps_, sizes.end(), 1);
      }
      noise_ = new_tensor(sizes, kDtypeOf<T>);
    }
    const std::optional<AtenTensorHandle> generator;
    if (distribution_ == "normal") {
      stock("aten::normal_", "", noise_, 0.0, 1.0, generator);
    } else if (distribution_ == "uniform") {
      stock("aten::uniform_", "", noise_, 0.0, 1.0, generator);
    } else {
      draw_ones(noise_, p_);
    }
    outputs[0] = noise_.borrow();
  }
  void backward(const Tensor*, const bool*, Gradient<T>*) override {}  // the noise depends on sizes alone
  Tensor drawn() const override { return noise_; }
  void forget() override { noise_ = Tensor(); }

 private:
  AskedSizes asked_;
  int64_t keeps_;
  std::string distribution_;
  double p_;
  Tensor noise_;
};

}  // namespace fastnn
