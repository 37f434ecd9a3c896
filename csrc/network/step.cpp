// fastnn::training_step: forward, loss, backward, clipping and update of a network in one call; or in two calls,
// between which the caller computes the loss, or averages the gradients over processes.
//
// Nothing is written to a parameter or a state before every check that may refuse the step has passed.
#include <cmath>

#include "../kernels/update.h"
#include "../ops/register.h"
#include "bound_step.h"
#include "forward_pass.h"
#include "loss.h"

namespace fastnn {
namespace {

constexpr const char* kOp = kTrainingStep;

// ---- numbers ------------------------------------------------------------------------------------------------

// The numbers of a step, which fastnn/training_numbers.py writes. numbers: those of the loss (kind, mean or sum,
// number, class to ignore), the optimizer's kind and max_norm; then the settings of each of the optimizer's groups, in
// the order of the optimizer's table entry. layout: two numbers for each parameter. The first is its group, or -1 where
// it is not trained. The second has a bit for each state of the table entry that the parameter has, and above them a
// bit that says that SGD's momentum begins with this step.
struct StepNumbers {
  static constexpr int64_t kOfStep = 6;

  Loss loss;
  OptimizerKind optimizer;
  double max_norm;            // of the gradient; negative where it is not clipped
  const double* settings;     // of all groups, one group behind the other
  int64_t settings_each = 0;  // how many settings a group has
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
  // The numbers with which a parameter is updated in this step.
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
  float* float_ = nullptr;  // either this or the other is set
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

// Of a loss that the program has computed.
template <class T>
Tensor gradient_of_itself(const Tensor& loss, double* value) {
  FASTNN_CHECK(loss.dim() == 0, kOp, ": expected a program that gives the loss, one number, got ",
               to_string(loss.sizes()));
  *value = data<T>(loss)[0];
  Tensor gradient = new_tensor(loss.sizes(), kDtypeOf<T>);
  mutable_data<T>(gradient)[0] = 1;
  return gradient;
}

template <class T>
Tensor loss_gradient(const Loss& loss, const Tensor& output, const Tensor& target, const OptionalTensor& weight,
                     double* value) {
  if (loss.kind == LossKind::of_program) return gradient_of_itself<T>(output, value);
  const Tensor dense_output = dense(output), dense_target = dense(target);
  const Ints sizes = sizes_of(output);
  const int64_t columns = sizes.empty() ? 1 : sizes.back();
  Tensor gradient = new_tensor(sizes, kDtypeOf<T>);
  const T* weights = nullptr;
  Tensor dense_weight;
  if (weight) {
    check_plain(*weight, kOp, "weight");
    const int64_t classes = loss.kind == LossKind::cross_entropy && sizes.size() > 1 ? sizes[1] : columns;
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
                                                      weights, columns, mutable_data<T>(gradient));
    *value = loss.mean ? sum / count : sum;
  }
  return gradient;
}

// The factor that brings the norm of the gradients down to max_norm; 1 where it is not above it.
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
    // Parameters of one group are usually at the same step. So the powers, which take a while, are computed once for
    // all.
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

// Computes the parameters' gradients from the outputs' gradients.
template <class T>
const std::vector<const T*>& backward(TrainingPass<T>& pass, const TensorList& output_gradients,
                                      const TensorList& parameters, const StepNumbers& numbers) {
  std::vector<char> wanted(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) wanted[i] = numbers.wanted(i);
  pass.backward(output_gradients, wanted, {}, true);
  const std::vector<const T*>& gradients = pass.gradients(wanted);
  for (size_t i = 0; i < parameters.size(); ++i) {
    FASTNN_CHECK(!wanted[i] || gradients[i] || parameters[i].numel() == 0, kOp,
                 ": numbers ask for the gradient of what has none");
  }
  return gradients;
}

// Copies of gradients, with zeros for parameters that are not trained.
template <class T>
TensorList copies(const StepNumbers& numbers, const TensorList& parameters, const std::vector<const T*>& gradients,
                  double scale) {
  TensorList result;
  for (size_t i = 0; i < gradients.size(); ++i) {
    result.push_back(new_tensor(sizes_of(parameters[i]), kDtypeOf<T>));
    T* const to = mutable_data<T>(result.back());
    for (int64_t j = 0, count = result.back().numel(); j < count; ++j) {
      to[j] = numbers.wanted(i) ? gradients[i][j] * static_cast<T>(scale) : T(0);
    }
  }
  return result;
}

// The rest of a step, from the outputs' gradients on. The caller commits other changes of the step, such as those of
// running statistics. Returns the parameters' gradients if they are to be kept.
template <class T>
TensorList finish(TrainingPass<T>& pass, const TensorList& output_gradients, const TensorList& parameters,
                  const std::vector<ParameterState<T>>& states, const StepNumbers& numbers, bool keep_gradients) {
  const std::vector<const T*>& gradients = backward<T>(pass, output_gradients, parameters, numbers);
  const double scale = clip_scale<T>(numbers, parameters, gradients);
  TensorList kept;
  if (keep_gradients) kept = copies<T>(numbers, parameters, gradients, scale);
  update<T>(numbers, parameters, gradients, scale, states);
  return kept;
}

// Where the caller's gradients lie, for each parameter: null for a parameter that is not trained.
template <class T>
std::vector<T*> places_of(const StepNumbers& numbers, const TensorList& parameters, const TensorList& gradients) {
  std::vector<T*> places(parameters.size());
  size_t next = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!numbers.wanted(i)) continue;
    FASTNN_CHECK(next < gradients.size(), kOp, ": there are fewer gradients than parameters that are trained");
    const Tensor& gradient = gradients[next++];
    check_like<T>(gradient, parameters[i].sizes(), parameters[i].numel(), kOp, "a gradient");
    places[i] = mutable_data<T>(gradient);
  }
  FASTNN_CHECK(next == gradients.size(), kOp, ": there are more gradients than parameters that are trained");
  return places;
}

// A list that borrows these tensors, so that arguments can be passed on.
TensorList borrowed(const Tensor* tensors, size_t count) {
  TensorList result;
  result.reserve(count);
  for (size_t i = 0; i < count; ++i) result.push_back(tensors[i].borrow());
  return result;
}

// What all steps of one call have in common. It is checked once.
template <class T>
class Steps {
 public:
  Steps(const TensorList& parameters, const TensorList& state, const std::string& program, const OptionalTensor& weight,
        const StepNumbers& numbers)
      : parameters_(parameters),
        weight_(weight),
        numbers_(numbers),
        pass_(program),
        states_(read_state<T>(numbers, parameters, state)) {
    FASTNN_CHECK(pass_->outputs() == 1, kOp, ": the program has ", pass_->outputs(), " outputs, and a loss takes one");
  }

  // Makes a step -> the loss, and the parameters' gradients if they are to be kept.
  std::pair<double, TensorList> run(TensorList inputs, const Tensor& target, bool keep_gradients) {
    double value = 0;
    const TensorList gradient = forward(inputs, target, &value);
    TensorList gradients = finish<T>(*pass_, gradient, parameters_, states_, numbers_, keep_gradients);
    pass_->commit();
    return {value, std::move(gradients)};
  }
  // Makes a step without the update -> the loss. Writes the parameters' gradients to `places`.
  double run_to(TensorList inputs, const Tensor& target, const std::vector<T*>& places) {
    double value = 0;
    const TensorList gradient = forward(inputs, target, &value);
    const std::vector<const T*>& gradients = backward<T>(*pass_, gradient, parameters_, numbers_);
    for (size_t i = 0; i < places.size(); ++i) {
      if (places[i]) std::copy_n(gradients[i], parameters_[i].numel(), places[i]);
    }
    pass_->commit();
    return value;
  }

 private:
  // The target becomes the last input of a program that computes the loss itself. The pass borrows the inputs until its
  // backward ends.
  TensorList forward(TensorList& inputs, const Tensor& target, double* value) {
    if (numbers_.loss.kind == LossKind::of_program) {
      inputs.push_back(target.borrow());
      check_arguments(inputs.data(), inputs.size(), parameters_);
    }
    pass_->forward(inputs, parameters_);
    TensorList gradient;
    gradient.push_back(loss_gradient<T>(numbers_.loss, pass_->output(0), target, weight_, value));
    return gradient;
  }

  const TensorList& parameters_;
  const OptionalTensor& weight_;
  const StepNumbers& numbers_;
  BorrowedPass<T> pass_;
  std::vector<ParameterState<T>> states_;
};

std::tuple<Tensor, TensorList> run_step(const Tensor* inputs, size_t count, const Tensor& target,
                                        const TensorList& parameters, const TensorList& state,
                                        const std::string& program, const OptionalTensor& weight, const Ints& layout,
                                        const Tensor& numbers, bool keep_gradients) {
  const ScalarType dtype = check_arguments(inputs, count, parameters);
  check_plain(target, kOp, "target");
  check_memory(target, kOp, "target");
  const StepNumbers all(numbers, layout, parameters.size());
  return with_kernel_dtype(dtype, [&](auto type) -> std::tuple<Tensor, TensorList> {
    using T = decltype(type);
    auto [value, gradients] =
        Steps<T>(parameters, state, program, weight, all).run(borrowed(inputs, count), target, keep_gradients);
    Tensor loss = new_tensor({}, kDtypeOf<T>);
    mutable_data<T>(loss)[0] = static_cast<T>(value);
    return {std::move(loss), std::move(gradients)};
  });
}

std::tuple<Tensor, TensorList> training_step(const TensorList& inputs, const Tensor& target,
                                             const TensorList& parameters, const TensorList& state,
                                             const std::string& program, const OptionalTensor& weight,
                                             const Ints& layout, const Tensor& numbers, bool keep_gradients) {
  return run_step(inputs.data(), inputs.size(), target, parameters, state, program, weight, layout, numbers,
                  keep_gradients);
}

Tensor bind_training_step(const TensorList& parameters, const TensorList& state, const std::string& program,
                          const OptionalTensor& weight, const Ints& layout) {
  const Tensor bound = new_tensor({1}, ScalarType::Long);
  mutable_data<int64_t>(bound)[0] = BoundSteps::add({parameters, state, program, weight, layout});
  return bound;
}

Tensor run_bound(const Tensor* inputs, size_t count, const Tensor& target, const Tensor& bound, const Tensor& numbers) {
  const std::shared_ptr<const BoundStep> step = BoundSteps::find(number_of(bound, "bound"));
  return std::get<0>(run_step(inputs, count, target, step->parameters, step->state, step->program, step->weight,
                              step->layout, numbers, false));
}
Tensor bound_training_step(const Tensor& input, const Tensor& target, const Tensor& bound, const Tensor& numbers) {
  return run_bound(&input, 1, target, bound, numbers);
}
Tensor bound_training_step_of_several(const TensorList& inputs, const Tensor& target, const Tensor& bound,
                                      const Tensor& numbers) {
  return run_bound(inputs.data(), inputs.size(), target, bound, numbers);
}

// ---- in two calls, between which processes average their gradients --------------------------------------------

Tensor bound_training_gradients(const TensorList& inputs, const Tensor& target, const Tensor& bound,
                                const Tensor& numbers, const TensorList& gradients) {
  const std::shared_ptr<const BoundStep> step = BoundSteps::find(number_of(bound, "bound"));
  const ScalarType dtype = check_arguments(inputs.data(), inputs.size(), step->parameters);
  check_plain(target, kOp, "target");
  check_memory(target, kOp, "target");
  const StepNumbers all(numbers, step->layout, step->parameters.size());
  return with_kernel_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const std::vector<T*> places = places_of<T>(all, step->parameters, gradients);
    Steps<T> steps(step->parameters, step->state, step->program, step->weight, all);
    Tensor loss = new_tensor({}, kDtypeOf<T>);
    mutable_data<T>(loss)[0] = static_cast<T>(steps.run_to(borrowed(inputs.data(), inputs.size()), target, places));
    return loss;
  });
}

// Clips and updates. Returns the factor by which the gradients were multiplied.
Tensor bound_training_update(const TensorList& gradients, const Tensor& bound, const Tensor& numbers) {
  const std::shared_ptr<const BoundStep> step = BoundSteps::find(number_of(bound, "bound"));
  const ScalarType dtype = check_parameters(step->parameters).dtype;
  const StepNumbers all(numbers, step->layout, step->parameters.size());
  return with_kernel_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const std::vector<T*> places = places_of<T>(all, step->parameters, gradients);
    const std::vector<const T*> given(places.begin(), places.end());
    const auto states = read_state<T>(all, step->parameters, step->state);
    const double scale = clip_scale<T>(all, step->parameters, given);
    update<T>(all, step->parameters, given, scale, states);
    Tensor result = new_tensor({}, kDtypeOf<T>);
    mutable_data<T>(result)[0] = static_cast<T>(scale);
    return result;
  });
}

// ---- many steps -----------------------------------------------------------------------------------------------

// The rows of a data set, a batch at a time. Rows that follow one another are read where they lie. Others are copied
// into memory that this object has.
class Rows {
 public:
  Rows(const Tensor& all, const char* name) : sizes_(sizes_of(all)), dtype_(all.scalar_type()) {
    check_plain(all, kOp, name);
    check_memory(all, kOp, name);
    FASTNN_CHECK(!sizes_.empty() && all.is_contiguous(), kOp, ": expected ", name,
                 " to have rows, and to be contiguous");
    FASTNN_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::Double || dtype_ == ScalarType::Long, kOp,
                 ": expected ", name, " to be Float, Double or Long");
    row_bytes_ = checked_product(product(sizes_, 1, sizes_.size()), static_cast<int64_t>(all.element_size()));
    from_ = static_cast<const char*>(all.const_data_ptr());
  }
  int64_t count() const { return sizes_[0]; }
  Tensor between(int64_t first, int64_t last) { return over(from_ + first * row_bytes_, last - first); }
  // Copies `count` rows, by their numbers.
  Tensor chosen(const int64_t* numbers, int64_t count) {
    own_.resize(static_cast<size_t>(checked_product(count, row_bytes_)));
    constexpr double kWorkEach = 8;  // what a row costs in addition to its bytes
    parallel_range(count, kWorkEach + static_cast<double>(row_bytes_), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        // Another thread may have written to the numbers since they were checked, so each is kept inside the bounds.
        const int64_t row = std::min(std::max<int64_t>(numbers[i], 0), this->count() - 1);
        std::memcpy(own_.data() + i * row_bytes_, from_ + row * row_bytes_, static_cast<size_t>(row_bytes_));
      }
    });
    return over(own_.data(), count);
  }

 private:
  Tensor over(const char* memory, int64_t count) const {
    Ints sizes = sizes_;
    sizes[0] = count;
    return dtype_ == ScalarType::Float    ? as_sizes(reinterpret_cast<const float*>(memory), sizes)
           : dtype_ == ScalarType::Double ? as_sizes(reinterpret_cast<const double*>(memory), sizes)
                                          : as_sizes(reinterpret_cast<const int64_t*>(memory), sizes);
  }

  Ints sizes_;
  ScalarType dtype_;
  int64_t row_bytes_;
  const char* from_;
  std::vector<char> own_;
};

// Makes a step for each batch of the rows [first, last), or of the rows whose numbers `order` has at [first, last) ->
// the losses. Where a step is refused, there are only the losses of the steps before, which were made as a whole.
Tensor bound_training_epoch(const TensorList& inputs, const Tensor& target, const OptionalTensor& order, int64_t first,
                            int64_t last, int64_t batch_size, const Tensor& bound, const Tensor& numbers) {
  const std::shared_ptr<const BoundStep> step = BoundSteps::find(number_of(bound, "bound"));
  const ScalarType dtype = check_arguments(inputs.data(), inputs.size(), step->parameters);
  const StepNumbers all(numbers, step->layout, step->parameters.size());
  std::vector<Rows> input_rows;
  for (const Tensor& input : inputs) input_rows.emplace_back(input, "input");
  Rows target_rows(target, "target");
  // An autoencoder's target is its input, whose rows are copied once.
  const auto is_target = [&](const Tensor& input) {
    return input.const_data_ptr() == target.const_data_ptr() && input.scalar_type() == target.scalar_type() &&
           same_sizes(input, target);
  };
  const size_t same = static_cast<size_t>(std::find_if(inputs.begin(), inputs.end(), is_target) - inputs.begin());
  const int64_t rows = target_rows.count();
  for (const Rows& own : input_rows) {
    FASTNN_CHECK(own.count() == rows, kOp, ": expected as many rows in each tensor, got ", own.count(), " and ", rows);
  }
  const int64_t* places = nullptr;
  if (order) {
    check_plain(*order, kOp, "order");
    check_memory(*order, kOp, "order");
    FASTNN_CHECK(order->scalar_type() == ScalarType::Long && order->dim() == 1 && order->is_contiguous(), kOp,
                 ": expected order to be Long, 1D and contiguous");
    places = data<int64_t>(*order);
  }
  const int64_t most = order ? order->numel() : rows;
  FASTNN_CHECK(0 <= first && first < last && last <= most && batch_size > 0, kOp, ": expected rows from 0 to ", most,
               " and a batch of at least 1, got ", first, " to ", last, " and ", batch_size);
  for (int64_t i = first; places && i < last; ++i) {
    FASTNN_CHECK(places[i] >= 0 && places[i] < rows, kOp, ": order has a row that is not there: ", places[i]);
  }
  return with_kernel_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    Steps<T> steps(step->parameters, step->state, step->program, step->weight, all);
    std::vector<T> losses;
    for (int64_t at = first; at < last;) {
      const int64_t end = last - at > batch_size ? at + batch_size : last;
      const auto batch_of = [&](Rows& own) {
        return places ? own.chosen(places + at, end - at) : own.between(at, end);
      };
      try {
        TensorList batch;
        for (Rows& own : input_rows) batch.push_back(batch_of(own));
        Tensor targets = same < inputs.size() ? batch[same].borrow() : batch_of(target_rows);
        losses.push_back(static_cast<T>(steps.run(std::move(batch), std::move(targets), false).first));
      } catch (const std::runtime_error&) {
        if (losses.empty()) throw;
        break;
      }
      at = end;
    }
    Tensor result = new_tensor({static_cast<int64_t>(losses.size())}, kDtypeOf<T>);
    std::copy(losses.begin(), losses.end(), mutable_data<T>(result));
    return result;
  });
}

// ---- in two calls ---------------------------------------------------------------------------------------------

// Takes the same parameters as the forward, which may not have changed their sizes. The pass is not used again.
TensorList training_step_backward(const std::vector<OptionalTensor>& gradients, const Tensor& number,
                                  const TensorList& parameters, const TensorList& state, const Ints& layout,
                                  const Tensor& numbers, bool keep_gradients) {
  return TakenPass(number, false).with_dtype([&](auto& taken) {
    using T = typename std::decay_t<decltype(taken)>::Element;
    taken.check_unchanged(parameters, false);
    const StepNumbers all(numbers, layout, parameters.size());
    const auto states = read_state<T>(all, parameters, state);
    return finish<T>(*taken.pass, check_output_gradients<T>(*taken.pass, gradients), parameters, states, all,
                     keep_gradients);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // program: see program.h; parameters: its weights, in order. state: the optimizer's, for each parameter that is
  // trained: step (but for SGD), then what the optimizer keeps. layout, numbers: see StepNumbers. weight: the loss's
  // weights of classes. target: of a program that computes the loss itself, its last input.
  m.def(
      "training_step(Tensor[] inputs, Tensor target, Tensor(a!)[] parameters, Tensor(b!)[] state, str program,"
      " Tensor? weight, int[] layout, Tensor numbers, bool keep_gradients) -> (Tensor loss, Tensor[] gradients)");
  // The same without gradients, where all that stays the same from step to step has been bound before (bound_step.h).
  // It changes the tensors that `bound` stands for. The schema can only say that of `bound` itself.
  m.def("bind_training_step(Tensor[] parameters, Tensor[] state, str program, Tensor? weight, int[] layout) -> Tensor");
  m.def("bound_training_step(Tensor input, Tensor target, Tensor(a!) bound, Tensor numbers) -> Tensor loss");
  m.def(
      "bound_training_step_of_several(Tensor[] inputs, Tensor target, Tensor(a!) bound, Tensor numbers)"
      " -> Tensor loss");
  // The same in two calls, for processes that average their gradients in between. The first call writes the gradients
  // of the parameters that are trained, and changes running statistics. The second clips and updates, and returns the
  // factor by which the gradients were multiplied.
  m.def(
      "bound_training_gradients(Tensor[] inputs, Tensor target, Tensor(a!) bound, Tensor numbers,"
      " Tensor(b!)[] gradients) -> Tensor loss");
  m.def("bound_training_update(Tensor[] gradients, Tensor(a!) bound, Tensor numbers) -> Tensor scale");
  // Many such steps, on batches of the rows [first, last), or of the rows whose numbers `order` has at [first, last).
  m.def(
      "bound_training_epoch(Tensor[] inputs, Tensor target, Tensor? order, int first, int last, int batch_size,"
      " Tensor(a!) bound, Tensor numbers) -> Tensor losses");
  // The rest of a step whose forward fastnn::network_with_pass has run, from the outputs' gradients on. It takes the
  // same parameters.
  m.def(
      "training_step_backward(Tensor?[] gradients, Tensor number, Tensor(a!)[] parameters, Tensor(b!)[] state,"
      " int[] layout, Tensor numbers, bool keep_gradients) -> Tensor[] gradients");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("training_step", FASTNN_BOX(training_step));
  m.impl("bind_training_step", FASTNN_BOX(bind_training_step));
  m.impl("bound_training_step", FASTNN_BOX(bound_training_step));
  m.impl("bound_training_step_of_several", FASTNN_BOX(bound_training_step_of_several));
  m.impl("bound_training_gradients", FASTNN_BOX(bound_training_gradients));
  m.impl("bound_training_update", FASTNN_BOX(bound_training_update));
  m.impl("bound_training_epoch", FASTNN_BOX(bound_training_epoch));
  m.impl("training_step_backward", FASTNN_BOX(training_step_backward));
}

}  // namespace

BoundSteps& BoundSteps::instance() {
  static BoundSteps& all = *new BoundSteps;
  return all;
}

}  // namespace fastnn
