// fastnn::training_step: forward, loss, backward, clipping and update of a chain of layers, in one call; or in two,
// with the loss between them left to the caller.
//
// A step saves everything between the stages (training_stages.h). Nothing is written to a parameter or a state before
// every check that may refuse the step has passed.
#include <cmath>

#include "../kernels/update.h"
#include "bound_step.h"
#include "loss.h"
#include "register.h"
#include "training_stages.h"

namespace fastnn {
namespace {

constexpr const char* kOp = kTrainingStep;

// ---- numbers ------------------------------------------------------------------------------------------------

// A step in numbers, as fastnn/training_numbers.py makes it. numbers: those of the loss (kind, mean or sum, number,
// class to ignore), the optimizer's kind and max_norm; then the settings of each of the optimizer's groups, in the
// order of its table entry. layout: for each parameter its group, or -1 where it is not trained, and a number of bits,
// which say which of the entry's states it has, and above them whether SGD's momentum begins.
struct StepNumbers {
  static constexpr int64_t kOfStep = 6;

  Loss loss;
  OptimizerKind optimizer;
  double max_norm;            // of the gradient; negative: it is not clipped
  const double* settings;     // of all groups, one after another
  int64_t settings_each = 0;  // of one group
  const Ints& layout;

  StepNumbers(const Tensor& numbers, const Ints& of_parameters, size_t parameters) : layout(of_parameters) {
    check_plain(numbers, kOp, "numbers");
    check_memory(numbers, kOp, "numbers");
    FASTNN_CHECK(numbers.scalar_type() == ScalarType::Double && numbers.is_contiguous() && numbers.numel() > kOfStep,
                 kOp, ": expected numbers to be Double, and more than ", kOfStep);
    const double* n = data<double>(numbers);
    const auto whole = [&](double number, int64_t count) {
      FASTNN_CHECK(number >= 0 && number < static_cast<double>(count), kOp, ": numbers has one out of range");
      return static_cast<int64_t>(number);
    };
    loss.kind = static_cast<LossKind>(whole(n[0], static_cast<int64_t>(LossKind::count)));
    loss.mean = n[1] != 0;
    loss.number = n[2];
    loss.ignore_index = std::abs(n[3]) < 9e15 ? static_cast<int64_t>(n[3]) : -100;
    optimizer = static_cast<OptimizerKind>(whole(n[4], static_cast<int64_t>(OptimizerKind::count)));
    max_norm = n[5];
    settings = n + kOfStep;
    for (const OptimizerSetting& setting : entry().settings) settings_each += setting.name != nullptr;
    const int64_t all_settings = numbers.numel() - kOfStep;
    FASTNN_CHECK(all_settings % settings_each == 0, kOp, ": expected ", settings_each, " numbers for each group of ",
                 entry().name);
    FASTNN_CHECK(layout.size() % 2 == 0 && layout.size() / 2 == parameters, kOp,
                 ": expected a layout of two numbers for each parameter");
    for (size_t i = 0; i < parameters; ++i) {
      const int64_t group = layout[2 * i], states = layout[2 * i + 1];
      FASTNN_CHECK(group >= -1 && group < all_settings / settings_each && states >= 0 && states < 2 << kMostStates, kOp,
                   ": layout has a number out of range");
    }
  }

  const OptimizerEntry& entry() const { return kOptimizers[static_cast<int64_t>(optimizer)]; }
  bool wanted(size_t i) const { return layout[2 * i] >= 0; }
  bool has_state(size_t i, int which) const { return layout[2 * i + 1] >> which & 1; }
  bool is_first(size_t i) const { return has_state(i, kMostStates); }
  // The numbers of a parameter that is about to make this step.
  UpdateNumbers update(size_t i, double scale, double step) const {
    const double* n = settings + settings_each * layout[2 * i];
    UpdateNumbers u{};
    for (const OptimizerSetting& setting : entry().settings) {
      if (setting.name) u.*setting.place = *n++;
    }
    u.step = step;
    u.scale = u.maximize != 0 ? -scale : scale;
    u.is_first = is_first(i);
    return u;
  }
};

// One number of an optimizer's state, in a tensor of its own, of float or double.
class StateNumber {
 public:
  StateNumber() = default;
  explicit StateNumber(const Tensor& tensor) {
    static const int32_t float_code = code_of(ScalarType::Float), double_code = code_of(ScalarType::Double);
    const bool is_float = is_plain_of(tensor, float_code);
    FASTNN_CHECK((is_float || is_plain_of(tensor, double_code)) && tensor.numel() == 1, kOp,
                 ": expected a number of the optimizer's state, such as step, to be one Float or Double, on the CPU");
    check_memory(tensor, kOp, "state");
    is_float ? static_cast<void>(float_ = mutable_data<float>(tensor))
             : static_cast<void>(double_ = mutable_data<double>(tensor));
  }

  double plus(double value) const {
    return float_ ? static_cast<double>(*float_ + static_cast<float>(value)) : *double_ + value;
  }
  double times(double value) const {
    return float_ ? static_cast<double>(*float_ * static_cast<float>(value)) : *double_ * value;
  }
  void set(double value) const {
    float_ ? static_cast<void>(*float_ = static_cast<float>(value)) : static_cast<void>(*double_ = value);
  }

 private:
  float* float_ = nullptr;  // one of the two is set
  double* double_ = nullptr;
};

// Where each parameter's state is.
template <class T>
struct ParameterState {
  StateNumber numbers[kMostNumbers];
  T* tensors[kMostStates] = {};
};

template <class T>
std::vector<ParameterState<T>> read_state(const StepNumbers& numbers, const TensorList& parameters,
                                          const TensorList& state) {
  const OptimizerEntry& entry = numbers.entry();
  std::vector<ParameterState<T>> result(parameters.size());
  size_t next = 0;
  const auto take = [&]() -> const Tensor& {
    FASTNN_CHECK(next < state.size(), kOp, ": there are fewer tensors of the optimizer's state than it should have");
    return state[next++];
  };
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!numbers.wanted(i)) continue;
    for (int which = 0; which < kMostNumbers && entry.numbers[which].name; ++which) {
      result[i].numbers[which] = StateNumber(take());
    }
    const Sizes sizes = parameters[i].sizes();
    const int64_t numel = parameters[i].numel();
    for (int which = 0; which < kMostStates; ++which) {
      const bool is_always_kept = entry.states[which].name && !entry.states[which].setting;
      FASTNN_CHECK(numbers.has_state(i, which) || !is_always_kept, kOp,
                   ": layout lacks a state that the optimizer cannot do without");
      FASTNN_CHECK(!numbers.has_state(i, which) || entry.states[which].name, kOp,
                   ": layout has a state that the optimizer has not");
      if (!numbers.has_state(i, which)) continue;
      const Tensor& tensor = take();
      check_like<T>(tensor, sizes, numel, kOp, "the optimizer's state");
      result[i].tensors[which] = mutable_data<T>(tensor);
    }
  }
  FASTNN_CHECK(next == state.size(), kOp, ": there are more tensors of the optimizer's state than it should have");
  return result;
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
    const int64_t classes = loss.kind == LossKind::cross_entropy && sizes.size() > 1 ? sizes[1] : sizes.back();
    FASTNN_CHECK(weight->scalar_type() == kDtypeOf<T> && weight->dim() == 1 && weight->numel() == classes, kOp,
                 ": expected a weight of ", classes, " elements, in one dimension, of the output's dtype");
    check_memory(*weight, kOp, "weight");
    dense_weight = dense(*weight);
    weights = data<T>(dense_weight);
  }
  if (loss.kind == LossKind::cross_entropy) {
    Ints expected = sizes;  // without the classes
    if (sizes.size() >= 2) expected.erase(expected.begin() + 1);
    FASTNN_CHECK(sizes.size() >= 2 && sizes_of(target) == expected, kOp,
                 ": expected an output (batch, classes, ...) and a target (batch, ...), got ",
                 to_string(output.sizes()), " and ", to_string(target.sizes()));
    FASTNN_CHECK(target.scalar_type() == ScalarType::Long, kOp, ": expected the target's classes to be Long");
    *value = class_loss(kOp, loss, data<T>(dense_output), data<int64_t>(dense_target), sizes[0], sizes[1],
                        product(sizes, 2, sizes.size()), weights, mutable_data<T>(gradient));
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

// What gradients are multiplied by so that their norm is at most max_norm.
template <class T>
double clip_scale(const StepNumbers& numbers, const TensorList& parameters, const std::vector<const T*>& gradients) {
  if (numbers.max_norm < 0) return 1;
  double squares = 0;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (numbers.wanted(i)) squares += update_kernels().get<T>().sum_of_squares(parameters[i].numel(), gradients[i]);
  }
  const double most = numbers.max_norm / (std::sqrt(squares) + 1e-6);
  return most < 1 || most != most ? most : 1;
}

template <class T>
void update(const StepNumbers& numbers, const TensorList& parameters, const std::vector<const T*>& gradients,
            double scale, const std::vector<ParameterState<T>>& states) {
  const UpdateKernels<T>& kernels = update_kernels().get<T>();
  const OptimizerEntry& entry = numbers.entry();
  int64_t group = -1;
  UpdateNumbers of_this{};
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!numbers.wanted(i)) continue;
    const ParameterState<T>& state = states[i];
    const double step = entry.numbers[0].name ? state.numbers[0].plus(1) : 0;
    // Parameters of one group are usually at the same step, so that the powers, which take a while, are computed once.
    if (group != numbers.layout[2 * i] || step != of_this.step || of_this.is_first != numbers.is_first(i)) {
      group = numbers.layout[2 * i];
      of_this = numbers.update(i, scale, step);
      kernels.prepare(numbers.optimizer, of_this);
    }
    if (entry.numbers[1].name) of_this.mu_product = state.numbers[1].times(of_this.mu);
    const T* const gradient = gradients[i];
    T* const parameter = mutable_data<T>(parameters[i]);
    const int64_t count = parameters[i].numel();
    constexpr double kWork = 20;  // operations per element, and as many bytes
    parallel_chunks(std::min(useful_threads(kWork * static_cast<double>(count)), std::max<int64_t>(count, 1)), count,
                    [&](int64_t, int64_t first, int64_t last) {
                      T* at[kMostStates];
                      for (int j = 0; j < kMostStates; ++j)
                        at[j] = state.tensors[j] ? state.tensors[j] + first : nullptr;
                      kernels.update(numbers.optimizer, of_this, last - first, gradient + first, parameter + first, at);
                    });
    if (entry.numbers[0].name) state.numbers[0].set(step);
    if (entry.numbers[1].name) state.numbers[1].set(of_this.mu_product);
  }
}

// Runs the stages of a program forward and backward.
template <class T>
class Pass {
 public:
  Pass(const std::string& program, const Tensor& input, const TensorList& parameters)
      : stages_(read_stages<T>(program)), parameters_(parameters), gradients_(parameters.size()) {
    size_t total = 0;
    for (const auto& stage : stages_) total = std::min(total + stage->count, parameters.size() + 1);
    FASTNN_CHECK(total == parameters.size(), kOp, ": there are ", parameters.size(),
                 " parameters, and not as many as the program has");
    between_.reserve(stages_.size() + 1);
    between_.push_back(input.borrow());
  }

  const Tensor& output() const { return between_.back(); }
  const std::vector<const T*>& gradients() const { return gradients_; }

  void forward() {
    each([](Stage<T>& stage, const Tensor& input, const TensorList& own) { return stage.forward(input, own); });
  }
  TensorList save() {
    TensorList saved;
    for (const auto& stage : stages_) stage->save(saved);
    return saved;
  }
  void restore(const TensorList& saved) {
    SavedReader<T> reader(saved);
    each([&](Stage<T>& stage, const Tensor& input, const TensorList& own) {
      Tensor output = stage.restore(input, own, reader);
      FASTNN_CHECK(output.scalar_type() == kDtypeOf<T>, kOp, ": expected saved outputs of the input's dtype");
      return output;
    });
    FASTNN_CHECK(reader.ends(), kOp, ": there are more saved tensors than the program needs");
  }
  // gradient: the output's, of its size
  void backward(Tensor gradient, const StepNumbers& numbers) {
    size_t first_wanted = stages_.size(), next = 0;
    for (size_t i = 0; i < stages_.size(); next += stages_[i++]->count) {
      for (size_t j = next; j < next + stages_[i]->count; ++j) {
        if (numbers.wanted(j)) first_wanted = std::min(first_wanted, i);
      }
    }
    std::vector<Tensor> kept;
    for (size_t i = stages_.size(); i-- > 0 && i >= first_wanted;) {
      next -= stages_[i]->count;
      const std::unique_ptr<bool[]> wanted(new bool[stages_[i]->count + 1]);
      for (size_t j = 0; j < stages_[i]->count; ++j) wanted[j] = numbers.wanted(next + j);
      kept.push_back(std::move(gradient));
      gradient = stages_[i]->backward(kept.back(), i > first_wanted, wanted.get(), gradients_.data() + next);
      for (size_t j = next; j < next + stages_[i]->count; ++j) {
        FASTNN_CHECK(!numbers.wanted(j) || gradients_[j] || parameters_[j].numel() == 0, kOp,
                     ": numbers ask for the gradient of what has none");
      }
    }
  }
  void commit() {
    for (const auto& stage : stages_) stage->commit();
  }

 private:
  template <class Body>
  void each(const Body& body) {
    size_t next = 0;
    for (const auto& stage : stages_) {
      between_.push_back(body(*stage, between_.back(), borrowed(parameters_, next, stage->count)));
      next += stage->count;
    }
  }

  std::vector<std::unique_ptr<Stage<T>>> stages_;
  const TensorList& parameters_;
  std::vector<Tensor> between_;      // the input, and what each stage made of the one before
  std::vector<const T*> gradients_;  // of the parameters, where the stages keep them
};

// The rest of a step, from the output's gradient on. What else a step changes, such as running statistics, the caller
// commits. Returns the parameters' gradients if they are to be kept, with zeros for parameters that are not trained.
template <class T>
TensorList finish(Pass<T>& pass, Tensor gradient, const TensorList& parameters,
                  const std::vector<ParameterState<T>>& states, const StepNumbers& numbers, bool keep_gradients) {
  pass.backward(std::move(gradient), numbers);
  const std::vector<const T*>& gradients = pass.gradients();
  const double scale = clip_scale<T>(numbers, parameters, gradients);
  TensorList kept;
  for (size_t i = 0; keep_gradients && i < gradients.size(); ++i) {
    kept.push_back(new_tensor(sizes_of(parameters[i]), kDtypeOf<T>));
    T* const to = mutable_data<T>(kept.back());
    for (int64_t j = 0, count = kept.back().numel(); j < count; ++j) {
      to[j] = numbers.wanted(i) ? gradients[i][j] * static_cast<T>(scale) : T(0);
    }
  }
  update<T>(numbers, parameters, gradients, scale, states);
  return kept;
}

// The arguments that all operators here have.
ScalarType check_arguments(const Tensor& input, const TensorList& parameters) {
  const Expected kind = check_first(input, kOp, "input");
  FASTNN_CHECK(kind.dtype != ScalarType::BFloat16, kOp, ": not implemented for BFloat16; use float32 or float64");
  FASTNN_CHECK(input.numel() > 0, kOp, ": expected an input that is not empty");
  for (const Tensor& parameter : parameters) {
    check_same_kind(parameter, kind, "parameters");
    FASTNN_CHECK(parameter.is_contiguous(), kOp, ": expected parameters to be contiguous");
  }
  return kind.dtype;
}

std::tuple<Tensor, TensorList> training_step(const Tensor& input, const Tensor& target, const TensorList& parameters,
                                             const TensorList& state, const std::string& program,
                                             const OptionalTensor& weight, const Ints& layout, const Tensor& numbers,
                                             bool keep_gradients) {
  const ScalarType dtype = check_arguments(input, parameters);
  check_plain(target, kOp, "target");
  check_memory(target, kOp, "target");
  const StepNumbers all(numbers, layout, parameters.size());
  return with_kernel_dtype(dtype, [&](auto type) -> std::tuple<Tensor, TensorList> {
    using T = decltype(type);
    Pass<T> pass(program, input, parameters);
    const auto states = read_state<T>(all, parameters, state);
    pass.forward();
    double value = 0;
    Tensor gradient = loss_gradient<T>(all.loss, pass.output(), target, weight, &value);
    Tensor loss = new_tensor({}, kDtypeOf<T>);
    mutable_data<T>(loss)[0] = static_cast<T>(value);
    TensorList gradients = finish<T>(pass, std::move(gradient), parameters, states, all, keep_gradients);
    pass.commit();
    return {std::move(loss), std::move(gradients)};
  });
}

Tensor bind_training_step(const TensorList& parameters, const TensorList& state, const std::string& program,
                          const OptionalTensor& weight, const Ints& layout) {
  const Tensor bound = new_tensor({1}, ScalarType::Long);
  mutable_data<int64_t>(bound)[0] = BoundSteps::add({parameters, state, program, weight, layout});
  return bound;
}

Tensor bound_training_step(const Tensor& input, const Tensor& target, const Tensor& bound, const Tensor& numbers) {
  check_plain(bound, kOp, "bound");
  check_memory(bound, kOp, "bound");
  FASTNN_CHECK(bound.scalar_type() == ScalarType::Long && bound.numel() == 1, kOp, ": expected bound to be one Long");
  const std::shared_ptr<const BoundStep> step = BoundSteps::find(data<int64_t>(bound)[0]);
  return std::get<0>(training_step(input, target, step->parameters, step->state, step->program, step->weight,
                                   step->layout, numbers, false));
}

std::tuple<Tensor, TensorList> training_step_forward(const Tensor& input, const TensorList& parameters,
                                                     const std::string& program) {
  return with_kernel_dtype(check_arguments(input, parameters), [&](auto type) -> std::tuple<Tensor, TensorList> {
    using T = decltype(type);
    Pass<T> pass(program, input, parameters);
    pass.forward();
    pass.commit();  // before the loss, which may look at what the model has become
    // A copy, since the stages keep their own. It has the same strides, since a loss may draw numbers in memory order.
    Tensor output = copied(pass.output());
    return {std::move(output), pass.save()};
  });
}

TensorList training_step_backward(const Tensor& gradient, const Tensor& input, const TensorList& parameters,
                                  const TensorList& state, const TensorList& saved, const std::string& program,
                                  const Ints& layout, const Tensor& numbers, bool keep_gradients) {
  const ScalarType dtype = check_arguments(input, parameters);
  const StepNumbers all(numbers, layout, parameters.size());
  return with_kernel_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    Pass<T> pass(program, input, parameters);
    const auto states = read_state<T>(all, parameters, state);
    pass.restore(saved);
    check_plain(gradient, kOp, "gradient");
    check_memory(gradient, kOp, "gradient");
    FASTNN_CHECK(gradient.scalar_type() == dtype && same_sizes(gradient, pass.output()), kOp,
                 ": expected a gradient like the output, of size ", to_string(pass.output().sizes()), ", got ",
                 to_string(gradient.sizes()));
    return finish<T>(pass, dense(gradient), parameters, states, all, keep_gradients);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // program: the chain's stages (training_stages.h); parameters: theirs, in order. state: the optimizer's, for each
  // parameter that is trained: step (but for SGD), then what the optimizer keeps. layout, numbers: see StepNumbers.
  // weight: the loss's weights of classes.
  m.def(
      "training_step(Tensor input, Tensor target, Tensor(a!)[] parameters, Tensor(b!)[] state, str program,"
      " Tensor? weight, int[] layout, Tensor numbers, bool keep_gradients) -> (Tensor loss, Tensor[] gradients)");
  // The same, with what stays the same from step to step bound before (bound_step.h), and without gradients. It
  // changes the tensors that `bound` stands for, which the schema says of `bound` itself.
  m.def("bind_training_step(Tensor[] parameters, Tensor[] state, str program, Tensor? weight, int[] layout) -> Tensor");
  m.def("bound_training_step(Tensor input, Tensor target, Tensor(a!) bound, Tensor numbers) -> Tensor loss");
  // The same in two calls: up to the output, and from its gradient on. saved: what the second needs from the first.
  m.def("training_step_forward(Tensor input, Tensor(a!)[] parameters, str program) -> (Tensor output, Tensor[] saved)");
  m.def(
      "training_step_backward(Tensor gradient, Tensor input, Tensor(a!)[] parameters, Tensor(b!)[] state,"
      " Tensor[] saved, str program, int[] layout, Tensor numbers, bool keep_gradients) -> Tensor[] gradients");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("training_step", FASTNN_BOX(training_step));
  m.impl("bind_training_step", FASTNN_BOX(bind_training_step));
  m.impl("bound_training_step", FASTNN_BOX(bound_training_step));
  m.impl("training_step_forward", FASTNN_BOX(training_step_forward));
  m.impl("training_step_backward", FASTNN_BOX(training_step_backward));
}

}  // namespace

BoundSteps& BoundSteps::instance() {
  static BoundSteps& all = *new BoundSteps;
  return all;
}

}  // namespace fastnn
