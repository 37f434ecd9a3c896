// fastnn::training_step: forward, loss, backward, clipping and update of a chain of layers, in one call.
//
// The layers are the ops' own forward and backward, called here one after another: what a step saves is everything
// between them. Nothing is written to a parameter or a state before all that may be refused has been.
#include <array>
#include <cmath>
#include <cstring>
#include <memory>

#include "../kernels/update.h"
#include "frozen_memory.h"
#include "loss.h"
#include "operators.h"
#include "register.h"

namespace fastnn {
namespace {

constexpr const char* kOp = "training_step";

// A tensor's memory under other sizes, while that lives.
template <class T>
Tensor as_sizes(const T* memory, const Ints& sizes) {
  Ints strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return tensor_over(memory, sizes, strides);
}

Ints sizes_of(const Tensor& tensor) {
  return Ints(tensor.sizes().begin(), tensor.sizes().end());
}

TensorList borrowed(const TensorList& tensors, size_t first, size_t count) {
  TensorList result;
  result.reserve(count);
  for (size_t i = first; i < first + count; ++i) result.push_back(tensors[i].borrow());
  return result;
}

// One stage: `forward` keeps what `backward` needs, which writes the gradients of the stage's own parameters.
template <class T>
class Stage {
 public:
  virtual ~Stage() = default;
  virtual Tensor forward(const Tensor& input, const TensorList& parameters) = 0;
  // wanted: of each parameter whether its gradient is. Returns the input's gradient, if that is.
  virtual Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, TensorList& gradients) = 0;
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

// "mlp layers biased activations"
template <class T>
class MlpStage : public Stage<T> {
 public:
  explicit MlpStage(Words& words) {
    layers_ = static_cast<size_t>(words.number(1, 20));
    biased_ = words.number(0, 1);
    code_ = words.number(1, std::numeric_limits<int64_t>::max());
    FASTNN_CHECK(words.stage_ends(), kOp, ": the program has more of an mlp than it should");
    this->count = layers_ * (1 + biased_);
  }

  Tensor forward(const Tensor& input, const TensorList& parameters) override {
    sizes_ = sizes_of(input);
    FASTNN_CHECK(sizes_.size() >= 2, kOp, ": expected a linear layer's input to have a batch");
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
    FASTNN_CHECK(words.stage_ends(), kOp, ": the program has more of an rnn than it should");
    FASTNN_CHECK(!(last_ && bidirectional_), kOp, ": the last step of both directions is not supported");
  }

  Tensor forward(const Tensor& input, const TensorList& parameters) override {
    FASTNN_CHECK(input.dim() == 3, kOp, ": expected a recurrent layer's input to be 3D");
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
    FASTNN_CHECK(words.stage_ends(), kOp, ": the program has more of a flatten than it should");
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
    const int64_t bits = words.number(0, std::numeric_limits<int64_t>::max());
    std::memcpy(&drops_, &bits, sizeof(drops_));
    FASTNN_CHECK(drops_ >= 0 && drops_ <= 1, kOp, ": dropout probability has to be between 0 and 1, but got ", drops_);
    FASTNN_CHECK(words.stage_ends(), kOp, ": the program has more of a dropout than it should");
  }
  Tensor forward(const Tensor& input, const TensorList&) override {
    const Tensor dense_input = dense(input);
    scales_ = new_tensor(sizes_of(dense_input), kDtypeOf<T>);
    const std::optional<AtenTensorHandle> generator;
    std::array<StableIValue, 3> stack{give(scales_), give(1 - drops_), give(generator)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bernoulli_", "float", stack.data(), TORCH_ABI_VERSION));
    Argument<Tensor>::take(stack[0]);
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
    } else if (name == "mlp") {
      stages.push_back(std::make_unique<MlpStage<T>>(words));
    } else if (name == "rnn") {
      stages.push_back(std::make_unique<RnnStage<T>>(words));
    } else if (name == "dropout") {
      stages.push_back(std::make_unique<DropoutStage<T>>(words));
    } else {
      FASTNN_CHECK(name == "flatten", kOp, ": the program has no stage \"", name, "\"");
      stages.push_back(std::make_unique<FlattenStage<T>>(words));
    }
  }
  FASTNN_CHECK(!stages.empty(), kOp, ": expected at least one stage");
  return stages;
}

// ---- numbers ------------------------------------------------------------------------------------------------

enum class Optimizer : int64_t { sgd, adam, rmsprop, count };

// `numbers`, as fastnn/training_step.py writes them: kOfStep for the step, then kOfParameter for each parameter.
struct StepNumbers {
  static constexpr int64_t kOfStep = 6, kOfParameter = 14;

  Loss loss;
  Optimizer optimizer;
  double max_norm;  // of the gradient, or negative
  const double* of_parameters;

  StepNumbers(const Tensor& numbers, size_t parameters) {
    check_plain(numbers, kOp, "numbers");
    FASTNN_CHECK(numbers.scalar_type() == ScalarType::Double && numbers.is_contiguous() &&
                     numbers.numel() == kOfStep + kOfParameter * static_cast<int64_t>(parameters),
                 kOp, ": expected numbers to be Double, ", kOfStep, " and ", kOfParameter, " for each parameter");
    const double* n = data<double>(numbers);
    const auto whole = [&](double number, int64_t count) {
      FASTNN_CHECK(number >= 0 && number < static_cast<double>(count), kOp, ": numbers has one out of range");
      return static_cast<int64_t>(number);
    };
    loss.kind = static_cast<LossKind>(whole(n[0], static_cast<int64_t>(LossKind::count)));
    loss.mean = n[1] != 0;
    loss.number = n[2];
    loss.ignore_index = std::abs(n[3]) < 9e15 ? static_cast<int64_t>(n[3]) : -100;
    optimizer = static_cast<Optimizer>(whole(n[4], static_cast<int64_t>(Optimizer::count)));
    max_norm = n[5];
    of_parameters = n + kOfStep;
  }

  const double* of(size_t i) const { return of_parameters + kOfParameter * i; }
  bool wanted(size_t i) const { return of(i)[0] != 0; }
  bool has_state(size_t i, int which) const { return of(i)[11 + which] != 0; }  // of up to three beside `step`
  UpdateNumbers update(size_t i, double scale, double step) const {
    const double* n = of(i);
    UpdateNumbers u{};
    u.lr = n[1];
    u.weight_decay = n[2];
    u.scale = n[3] != 0 ? -scale : scale;
    u.momentum = n[4];
    u.dampening = n[5];
    u.nesterov = n[6] != 0;
    u.is_first = n[7] != 0;
    u.first_beta = n[8];
    u.second_beta = n[9];
    u.eps = n[10];
    u.decoupled = optimizer == Optimizer::adam && n[4] != 0;
    u.first_correction = 1 - std::pow(u.first_beta, step);
    u.second_correction = 1 - std::pow(u.second_beta, step);
    return u;
  }
};

// Where each parameter's state is: `step`, but for SGD, then up to three tensors like the parameter.
template <class T>
struct ParameterState {
  const Tensor* step = nullptr;
  T* tensors[3] = {};
};

template <class T>
std::vector<ParameterState<T>> read_state(const StepNumbers& numbers, const TensorList& parameters,
                                          const TensorList& state) {
  std::vector<ParameterState<T>> result(parameters.size());
  size_t next = 0;
  const auto take = [&]() -> const Tensor& {
    FASTNN_CHECK(next < state.size(), kOp, ": there are fewer tensors of the optimizer's state than it should have");
    check_plain(state[next], kOp, "state");
    check_memory(state[next], kOp, "state");
    FASTNN_CHECK(state[next].is_cpu() && state[next].is_contiguous(), kOp,
                 ": expected the optimizer's state to be contiguous and on the CPU");
    return state[next++];
  };
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!numbers.wanted(i)) continue;
    if (numbers.optimizer != Optimizer::sgd) {
      result[i].step = &take();
      const ScalarType dtype = result[i].step->scalar_type();
      FASTNN_CHECK(result[i].step->numel() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double), kOp,
                   ": expected step to be one number, Float or Double");
    }
    for (int which = 0; which < 3; ++which) {
      if (!numbers.has_state(i, which)) continue;
      const Tensor& tensor = take();
      FASTNN_CHECK(tensor.scalar_type() == kDtypeOf<T> && sizes_of(tensor) == sizes_of(parameters[i]), kOp,
                   ": expected a state like its parameter, of size ", to_string(parameters[i].sizes()), ", got ",
                   to_string(tensor.sizes()));
      result[i].tensors[which] = mutable_data<T>(tensor);
    }
  }
  FASTNN_CHECK(next == state.size(), kOp, ": there are more tensors of the optimizer's state than it should have");
  return result;
}

double next_step(const Tensor& step) {
  return step.scalar_type() == ScalarType::Float ? static_cast<double>(data<float>(step)[0] + 1.0f)
                                                 : data<double>(step)[0] + 1;
}
void set_step(const Tensor& step, double value) {
  if (step.scalar_type() == ScalarType::Float) {
    mutable_data<float>(step)[0] = static_cast<float>(value);
  } else {
    mutable_data<double>(step)[0] = value;
  }
}

// ---- the step -------------------------------------------------------------------------------------------------

template <class T>
Tensor loss_gradient(const Loss& loss, const Tensor& output, const Tensor& target, const OptionalTensor& weight,
                     double* value) {
  const Tensor dense_output = dense(output), dense_target = dense(target);
  const Ints sizes = sizes_of(output);
  Tensor gradient = new_tensor(sizes, kDtypeOf<T>);
  const T* weights = nullptr;
  Tensor dense_weight;
  if (weight) {
    check_plain(*weight, kOp, "weight");
    FASTNN_CHECK(weight->scalar_type() == kDtypeOf<T> && weight->numel() == sizes.back(), kOp,
                 ": expected a weight of ", sizes.back(), " elements of the output's dtype");
    check_memory(*weight, kOp, "weight");
    dense_weight = dense(*weight);
    weights = data<T>(dense_weight);
  }
  if (loss.kind == LossKind::cross_entropy) {
    FASTNN_CHECK(sizes.size() == 2 && target.dim() == 1 && target.size(0) == sizes[0], kOp,
                 ": expected an output (batch, classes) and a target (batch), got ", to_string(output.sizes()), " and ",
                 to_string(target.sizes()));
    FASTNN_CHECK(target.scalar_type() == ScalarType::Long, kOp, ": expected the target's classes to be Long");
    *value = class_loss(kOp, loss, data<T>(dense_output), data<int64_t>(dense_target), sizes[0], sizes[1], weights,
                        mutable_data<T>(gradient));
  } else {
    FASTNN_CHECK(sizes_of(target) == sizes && target.scalar_type() == kDtypeOf<T>, kOp,
                 ": expected a target like the output, of size ", to_string(output.sizes()), ", got ",
                 to_string(target.sizes()));
    const double count = static_cast<double>(output.numel());
    const double sum = update_kernels().get<T>().loss(loss.kind, loss.number, loss.mean ? 1 / count : 1.0,
                                                      output.numel(), data<T>(dense_output), data<T>(dense_target),
                                                      weights, sizes.back(), mutable_data<T>(gradient));
    *value = loss.mean ? sum / count : sum;
  }
  return gradient;
}

template <class T>
void update(const StepNumbers& numbers, const TensorList& parameters, const TensorList& gradients,
            const std::vector<ParameterState<T>>& states) {
  const UpdateKernels<T>& kernels = update_kernels().get<T>();
  double scale = 1;
  if (numbers.max_norm >= 0) {
    double squares = 0;
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (numbers.wanted(i)) squares += kernels.sum_of_squares(gradients[i].numel(), data<T>(gradients[i]));
    }
    const double most = numbers.max_norm / (std::sqrt(squares) + 1e-6);
    scale = most < 1 || most != most ? most : 1;
  }
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!numbers.wanted(i)) continue;
    const ParameterState<T>& state = states[i];
    const double step = state.step ? next_step(*state.step) : 0;
    const UpdateNumbers of_this = numbers.update(i, scale, step);
    const T* const gradient = data<T>(gradients[i]);
    T* const parameter = mutable_data<T>(parameters[i]);
    const int64_t count = parameters[i].numel();
    constexpr double kWork = 20;  // operations an element, and as many bytes
    parallel_chunks(std::min(useful_threads(kWork * static_cast<double>(count)), std::max<int64_t>(count, 1)), count,
                    [&](int64_t, int64_t first, int64_t last) {
                      T* at[3];
                      for (int j = 0; j < 3; ++j) at[j] = state.tensors[j] ? state.tensors[j] + first : nullptr;
                      const int64_t some = last - first;
                      if (numbers.optimizer == Optimizer::sgd) {
                        kernels.sgd(of_this, some, gradient + first, parameter + first, at[0]);
                      } else if (numbers.optimizer == Optimizer::adam) {
                        kernels.adam(of_this, some, gradient + first, parameter + first, at[0], at[1], at[2]);
                      } else {
                        kernels.rmsprop(of_this, some, gradient + first, parameter + first, at[0], at[1], at[2]);
                      }
                    });
    if (state.step) set_step(*state.step, step);
  }
}

template <class T>
std::tuple<Tensor, TensorList> run(const Tensor& input, const Tensor& target, const TensorList& parameters,
                                   const TensorList& state, const std::string& program, const OptionalTensor& weight,
                                   const StepNumbers& numbers, bool keep_gradients) {
  const auto stages = read_stages<T>(program);
  size_t total = 0, first_wanted = stages.size();
  for (size_t i = 0; i < stages.size(); ++i) {
    FASTNN_CHECK(stages[i]->count <= parameters.size() - total, kOp,
                 ": there are fewer parameters than the program has");
    for (size_t j = total; j < total + stages[i]->count; ++j) {
      if (numbers.wanted(j)) first_wanted = std::min(first_wanted, i);
    }
    total += stages[i]->count;
  }
  FASTNN_CHECK(total == parameters.size(), kOp, ": there are more parameters than the program has");
  const std::vector<ParameterState<T>> states = read_state<T>(numbers, parameters, state);
  Tensor x = dense(input);
  const Tensor kept_input = x.borrow();
  std::vector<Tensor> between;  // what a stage borrows of the one before
  size_t next = 0;
  for (const auto& stage : stages) {
    between.push_back(std::move(x));
    x = stage->forward(between.back(), borrowed(parameters, next, stage->count));
    next += stage->count;
  }
  double value = 0;
  Tensor gradient = loss_gradient<T>(numbers.loss, x, target, weight, &value);
  TensorList gradients(parameters.size());
  std::vector<Tensor> kept;
  for (size_t i = stages.size(); i-- > 0;) {
    next -= stages[i]->count;
    if (i < first_wanted) continue;
    const std::unique_ptr<bool[]> wanted(new bool[stages[i]->count + 1]);
    for (size_t j = 0; j < stages[i]->count; ++j) wanted[j] = numbers.wanted(next + j);
    TensorList own;
    kept.push_back(std::move(gradient));
    gradient = stages[i]->backward(kept.back(), i > first_wanted, wanted.get(), own);
    for (size_t j = 0; j < own.size(); ++j) {
      // A convolution's comes in its input's format.
      if (wanted[j]) gradients[next + j] = dense(std::move(own[j]));
    }
  }
  update<T>(numbers, parameters, gradients, states);
  Tensor loss = new_tensor({}, kDtypeOf<T>);
  mutable_data<T>(loss)[0] = static_cast<T>(value);
  TensorList returned;
  for (size_t i = 0; keep_gradients && i < gradients.size(); ++i) {
    returned.push_back(numbers.wanted(i) ? std::move(gradients[i]) : new_tensor({0}, kDtypeOf<T>));
  }
  return {std::move(loss), std::move(returned)};
}

std::tuple<Tensor, TensorList> training_step(const Tensor& input, const Tensor& target, const TensorList& parameters,
                                             const TensorList& state, const std::string& program,
                                             const OptionalTensor& weight, const Tensor& numbers, bool keep_gradients) {
  const Expected kind = check_first(input, kOp, "input");
  FASTNN_CHECK(kind.dtype != ScalarType::BFloat16, kOp, ": not implemented for BFloat16; use float32 or float64");
  FASTNN_CHECK(input.numel() > 0, kOp, ": expected an input that is not empty");
  check_plain(target, kOp, "target");
  check_memory(target, kOp, "target");
  FASTNN_CHECK(target.is_cpu(), kOp, ": expected target to be on the CPU");
  for (const Tensor& parameter : parameters) {
    check_same_kind(parameter, kind, "parameters");
    FASTNN_CHECK(parameter.is_contiguous(), kOp, ": expected parameters to be contiguous");
  }
  const StepNumbers all(numbers, parameters.size());
  if (kind.dtype == ScalarType::Double) {
    return run<double>(input, target, parameters, state, program, weight, all, keep_gradients);
  }
  return run<float>(input, target, parameters, state, program, weight, all, keep_gradients);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // program: the chain's stages (above); parameters: theirs, in order. state: the optimizer's, of each parameter that
  // is trained: step (but for SGD), then what the optimizer keeps. numbers: see StepNumbers. weight: the loss's, of
  // classes.
  m.def(
      "training_step(Tensor input, Tensor target, Tensor(a!)[] parameters, Tensor(b!)[] state, str program,"
      " Tensor? weight, Tensor numbers, bool keep_gradients) -> (Tensor loss, Tensor[] gradients)");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("training_step", FASTNN_BOX(training_step));
}

}  // namespace
}  // namespace fastnn
