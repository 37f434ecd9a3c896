// Passes that have run forward and wait for backward: the operators that run a network forward keep them under numbers.
#pragma once

#include <unordered_map>

#include "../ops/operators.h"
#include "train.h"

namespace fastnn {

// ---- checks of what all operators that train take -------------------------------------------------------------

inline Expected kind_of(const Tensor& tensor, const char* name) {
  const Expected kind = check_first(tensor, kTrainingStep, name);
  FASTNN_CHECK(kind.dtype != ScalarType::BFloat16, kTrainingStep,
               ": not implemented for BFloat16; use float32 or float64");
  return kind;
}

// Checks that there is at least one parameter, and returns what all have in common. any_format: whether those of images
// may lie in any order, such as channels last. An update of parameters goes through their elements as they lie.
inline Expected check_parameters(const TensorList& parameters, bool any_format = false) {
  FASTNN_CHECK(!parameters.empty(), kTrainingStep, ": expected at least one parameter");
  const Expected kind = kind_of(parameters[0], "parameters");
  for (const Tensor& parameter : parameters) {
    check_same_kind(parameter, kind, "parameters");
    FASTNN_CHECK(parameter.is_contiguous() || (any_format && parameter.dim() > 2), kTrainingStep,
                 ": expected parameters to be contiguous");
  }
  return kind;
}

// Checks the inputs and parameters, which all operators here take: they have one dtype, except for inputs of int64.
inline ScalarType check_arguments(const Tensor* inputs, size_t count, const TensorList& parameters,
                                  bool any_format = false) {
  FASTNN_CHECK(count > 0, kTrainingStep, ": expected at least one input");
  Expected kind{ScalarType::Float, 0, kTrainingStep};
  bool is_set = !parameters.empty();
  if (is_set) kind = check_parameters(parameters, any_format);
  for (size_t i = 0; i < count; ++i) {
    check_plain(inputs[i], kTrainingStep, "input");
    if (inputs[i].scalar_type() == ScalarType::Long) {
      check_memory(inputs[i], kTrainingStep, "input");
    } else {
      if (!is_set) kind = kind_of(inputs[i], "input");
      is_set = true;
      check_same_kind(inputs[i], kind, "input");
    }
    FASTNN_CHECK(inputs[i].numel() > 0, kTrainingStep, ": expected an input that is not empty");
  }
  FASTNN_CHECK(is_set, kTrainingStep, ": expected a parameter, or an input of floating-point numbers");
  return kind.dtype;
}

// The number in a tensor that has one int64.
inline int64_t number_of(const Tensor& tensor, const char* name) {
  check_plain(tensor, kTrainingStep, name);
  check_memory(tensor, kTrainingStep, name);
  FASTNN_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.numel() == 1, kTrainingStep, ": expected ", name,
               " to be one Long");
  return data<int64_t>(tensor)[0];
}

// ---- passes ---------------------------------------------------------------------------------------------------

// A pass that is borrowed for one call. It goes back to the idle passes when the call ends.
template <class T>
class BorrowedPass {
 public:
  explicit BorrowedPass(const std::string& program) : pass_(TrainingPasses<T>::take(program)) {}
  ~BorrowedPass() {
    if (pass_) TrainingPasses<T>::give_back(std::move(pass_));
  }
  BorrowedPass(const BorrowedPass&) = delete;
  BorrowedPass& operator=(const BorrowedPass&) = delete;
  TrainingPass<T>* operator->() const { return pass_.get(); }
  TrainingPass<T>& operator*() const { return *pass_; }

 private:
  std::unique_ptr<TrainingPass<T>> pass_;
};

// A pass that has run forward, with the tensors that it holds.
struct ForwardPass {
  virtual ~ForwardPass() = default;
};

template <class T>
struct ForwardPassOf : ForwardPass {
  using Element = T;
  TensorList inputs, parameters;
  std::vector<Ints> sizes;  // of both
  BorrowedPass<T> pass;

  ForwardPassOf(const std::string& program, const TensorList& inputs, const TensorList& parameters)
      : inputs(inputs), parameters(parameters), pass(program) {
    for (const TensorList* const list : {&this->inputs, &this->parameters}) {
      for (const Tensor& tensor : *list) sizes.push_back(sizes_of(tensor));
    }
    pass->forward(this->inputs, this->parameters);
  }
  // Checks that the tensors still have the sizes that they had before the loss, which may have done anything. given:
  // the parameters for backward.
  void check_unchanged(const TensorList& given, bool any_format) const {
    check_arguments(inputs.data(), inputs.size(), given, any_format);
    FASTNN_CHECK(given.size() == parameters.size(), kTrainingStep, ": expected the ", parameters.size(),
                 " parameters of the forward, got ", given.size());
    for (size_t i = 0; i < given.size(); ++i) {
      FASTNN_CHECK(same_sizes(given[i], parameters[i]), kTrainingStep, ": expected a parameter of size ",
                   to_string(parameters[i].sizes()), ", got ", to_string(given[i].sizes()));
    }
    size_t next = 0;
    for (const TensorList* const list : {&inputs, &parameters}) {
      for (const Tensor& tensor : *list) {
        check_memory(tensor, kTrainingStep, "an input or a parameter");
        FASTNN_CHECK(sizes_of(tensor) == sizes[next++], kTrainingStep,
                     ": an input or a parameter has another size than before");
      }
    }
  }
};

// The passes that wait for backward, by numbers. Each is here until it is taken or forgotten.
class ForwardPasses {
 public:
  static int64_t add(std::unique_ptr<ForwardPass> pass) {
    ForwardPasses& all = instance();
    const std::lock_guard<std::mutex> lock(all.mutex_);
    all.passes_.emplace(++all.last_, std::move(pass));
    return all.last_;
  }
  // Null where there is none of this number, or another thread is using it.
  static std::unique_ptr<ForwardPass> take(int64_t number) {
    ForwardPasses& all = instance();
    const std::lock_guard<std::mutex> lock(all.mutex_);
    const auto found = all.passes_.find(number);
    if (found == all.passes_.end()) return nullptr;
    std::unique_ptr<ForwardPass> pass = std::move(found->second);
    all.passes_.erase(found);
    return pass;
  }
  // Makes a pass that was taken available again.
  static void put_back(int64_t number, std::unique_ptr<ForwardPass> pass) {
    ForwardPasses& all = instance();
    const std::lock_guard<std::mutex> lock(all.mutex_);
    all.passes_.emplace(number, std::move(pass));
  }

 private:
  static ForwardPasses& instance();  // never destroyed, because libtorch may be destroyed before
  std::mutex mutex_;
  std::unordered_map<int64_t, std::unique_ptr<ForwardPass>> passes_;
  int64_t last_ = 0;
};

// Checks the gradients of the outputs -> the same, with the output's strides or contiguous.
template <class T>
TensorList check_output_gradients(const TrainingPass<T>& pass, const std::vector<OptionalTensor>& gradients) {
  FASTNN_CHECK(gradients.size() == pass.outputs(), kTrainingStep, ": expected ", pass.outputs(), " gradients, got ",
               gradients.size());
  TensorList result;
  for (size_t i = 0; i < gradients.size(); ++i) {
    result.emplace_back();
    if (!gradients[i]) continue;
    check_plain(*gradients[i], kTrainingStep, "gradient");
    Tensor gradient = resolved(*gradients[i], kTrainingStep, "gradient");
    FASTNN_CHECK(gradient.scalar_type() == kDtypeOf<T> && same_sizes(gradient, pass.output(i)), kTrainingStep,
                 ": expected a gradient like the output, of size ", to_string(pass.output(i).sizes()), ", got ",
                 to_string(gradient.sizes()));
    result.back() = same_strides(gradient, pass.output(i)) ? std::move(gradient) : dense(std::move(gradient));
  }
  return result;
}

// Takes the pass of this number. When the object goes, the pass is put back if it is to be kept, and else forgotten.
class TakenPass {
 public:
  TakenPass(const Tensor& number, bool keeps)
      : keeps_(keeps), number_(number_of(number, "number")), pass_(ForwardPasses::take(number_)) {
    FASTNN_CHECK(pass_, kTrainingStep, ": there is no forward of this number, or its backward is running");
  }
  ~TakenPass() {
    if (keeps_) ForwardPasses::put_back(number_, std::move(pass_));
  }
  TakenPass(const TakenPass&) = delete;
  TakenPass& operator=(const TakenPass&) = delete;

  // Calls run(pass) with the ForwardPassOf<T> that it is.
  template <class Run>
  TensorList with_dtype(const Run& run) const {
    if (auto* const of_float = dynamic_cast<ForwardPassOf<float>*>(pass_.get())) return run(*of_float);
    return run(dynamic_cast<ForwardPassOf<double>&>(*pass_));
  }

 private:
  bool keeps_;
  int64_t number_;
  std::unique_ptr<ForwardPass> pass_;
};

}  // namespace fastnn
