// A network in training: the layers of its program run forward, where they save what backward needs, and backward.
#pragma once

#include <list>
#include <mutex>

#include "layer_table.h"
#include "training/layers.h"

namespace fastnn {

template <class T>
class TrainingPass {
 public:
  using Element = T;
  const std::string program;

  explicit TrainingPass(const std::string& text) : program(text) {
    const Program parsed(text);
    values_.resize(parsed.values.size());
    for (ProgramLine line : parsed.lines) {
      if (line.layer == "input") {
        check_source_line(line, kInputEntries);
        const ElementKind elements = elements_of(line);
        if (elements == ElementKind::booleans) line.refuse("a network that is trained takes no booleans");
        inputs_.push_back({line.outputs[0], elements == ElementKind::integers});
      } else if (line.layer == "weight") {
        check_source_line(line, kWeightEntries);
        parameters_.push_back(line.outputs[0]);
      } else if (line.layer == "output") {
        read_outputs(line);
      } else {
        check_layer_line(line);
        if (line.outputs.empty()) line.refuse("expected to give a value");
        if (line.outputs.size() > 1 && line.layer != "rnn" && line.layer != "split") line.refuse("it gives one value");
        layers_.push_back(training_layer<T>(line));
        layers_.back()->outputs = line.outputs;
        check_kinds(line, *layers_.back());
      }
    }
    FASTNN_CHECK(!outputs_.empty() && !layers_.empty() && !inputs_.empty(), kTrainingStep,
                 ": expected at least one input, one layer and one output");
    join_layers();
  }

  size_t parameters() const { return parameters_.size(); }
  size_t outputs() const { return outputs_.size(); }
  const Tensor& output(size_t i) const { return values_[at(outputs_[i])]; }

  // inputs, parameters: they must live until `forget`.
  void forward(const TensorList& inputs, const TensorList& parameters) {
    const TensorsInKeptMemory kept;
    FASTNN_CHECK(inputs.size() == inputs_.size(), kTrainingStep, ": expected ", inputs_.size(), " inputs, got ",
                 inputs.size());
    FASTNN_CHECK(parameters.size() == parameters_.size(), kTrainingStep, ": there are ", parameters.size(),
                 " parameters, and not as many as the program has");
    for (size_t i = 0; i < inputs.size(); ++i) {
      FASTNN_CHECK((inputs[i].scalar_type() == ScalarType::Long) == inputs_[i].is_integer, kTrainingStep,
                   ": expected input ", i, " to be ", inputs_[i].is_integer ? "int64" : "of the parameters' dtype");
      values_[at(inputs_[i].value)] = inputs[i].borrow();
    }
    for (size_t i = 0; i < parameters.size(); ++i) values_[at(parameters_[i])] = parameters[i].borrow();
    std::vector<Tensor> results;
    for (const auto& layer : layers_) {
      layer->given.clear();
      for (const int64_t input : layer->inputs) layer->given.push_back(values_[at(input)].borrow());
      results.clear();
      results.resize(layer->outputs.size());
      layer->forward(results.data());
      for (size_t i = 0; i < results.size(); ++i) {
        FASTNN_CHECK(results[i].scalar_type() == kDtypeOf<T>, kTrainingStep, ": a layer gave another dtype");
        values_[at(layer->outputs[i])] = std::move(results[i]);
      }
    }
  }

  // gradients: those of the outputs, undefined where there is none. wanted: for each parameter, whether its gradient is
  // wanted; inputs_wanted: the same for each input. last: whether backward will not run again after this forward, so
  // that what was saved is freed as soon as it has been used.
  void backward(const TensorList& gradients, const std::vector<char>& wanted, const std::vector<char>& inputs_wanted,
                bool last) {
    const TensorsInKeptMemory kept;
    std::vector<char> needed(values_.size());
    for (size_t i = 0; i < parameters_.size(); ++i) needed[at(parameters_[i])] = wanted[i];
    for (size_t i = 0; i < inputs_wanted.size(); ++i) needed[at(inputs_[i].value)] = inputs_wanted[i];
    for (const auto& layer : layers_) {
      bool any = false;
      for (const int64_t input : layer->inputs) any = any || needed[at(input)];
      for (const int64_t output : layer->outputs) needed[at(output)] = any;
    }
    of_values_.clear();
    of_values_.resize(values_.size());
    for (size_t i = 0; i < outputs_.size(); ++i) {
      if (gradients[i].defined()) add(outputs_[i], {gradients[i].borrow()});
    }
    std::vector<Tensor> given;
    std::vector<Gradient<T>> results;
    std::unique_ptr<bool[]> flags(new bool[most_inputs_ + 1]);
    for (size_t k = layers_.size(); k-- > 0;) {
      TrainingLayer<T>& layer = *layers_[k];
      given.clear();
      bool any = false;
      for (const int64_t output : layer.outputs) {
        const Gradient<T>& own = of_values_[at(output)];
        given.push_back(own.tensor.defined() || own.memory ? as_tensor(output, own) : Tensor());
        any = any || given.back().defined();
      }
      if (!any || !needed[at(layer.outputs[0])]) {
        finish(layer, last);
        continue;
      }
      results.clear();
      results.resize(layer.inputs.size());
      for (size_t i = 0; i < layer.inputs.size(); ++i) flags[i] = needed[at(layer.inputs[i])];
      layer.backward(given.data(), flags.get(), results.data());
      for (size_t i = 0; i < layer.inputs.size(); ++i) {
        if (flags[i] && (results[i].tensor.defined() || results[i].memory)) {
          add(layer.inputs[i], std::move(results[i]));
        }
      }
      finish(layer, last);
    }
  }
  // The gradients of the parameters for which they are wanted, each in the order of the parameter's elements; null for
  // the other parameters, and where nothing depends on a parameter. They are valid until the next backward.
  const std::vector<const T*>& gradients(const std::vector<char>& wanted) {
    gradients_.clear();
    for (size_t i = 0; i < parameters_.size(); ++i) {
      gradients_.push_back(wanted[i] ? gradient_in_order(parameters_[i]) : nullptr);
    }
    return gradients_;
  }
  // The gradient of an input or a parameter, as a tensor with memory of its own; undefined where nothing depends on it.
  Tensor take_input_gradient(size_t i) { return take_gradient(inputs_[i].value); }
  Tensor take_parameter_gradient(size_t i) { return take_gradient(parameters_[i]); }

  // What the layers have drawn in forward, in their order.
  TensorList drawn() const {
    TensorList result;
    for (const auto& layer : layers_) {
      if (Tensor some = layer->drawn(); some.defined()) result.push_back(std::move(some));
    }
    return result;
  }

  void commit() {
    for (const auto& layer : layers_) layer->commit();
  }
  // Drops all that belongs to one step.
  void forget() {
    for (const auto& layer : layers_) layer->forget();
    for (Tensor& value : values_) value = Tensor();
    of_values_.clear();
    gradients_.clear();
  }

 private:
  struct Input {
    int64_t value;
    bool is_integer;
  };

  static size_t at(int64_t value) { return static_cast<size_t>(value); }

  void check_kinds(const ProgramLine& line, const TrainingLayer<T>& layer) const {
    for (size_t i = 0; i + layer.inputs_for_sizes() < layer.inputs.size(); ++i) {
      bool is_integer = false;
      for (const Input& input : inputs_)
        is_integer = is_integer || (input.is_integer && input.value == layer.inputs[i]);
      if (is_integer != (i < layer.integers())) {
        line.refuse(is_integer ? "it takes no int64" : "its first inputs should be of int64");
      }
    }
  }
  void read_outputs(const ProgramLine& line) {
    const auto found = line.inputs.find("input");
    if (!outputs_.empty() || !line.outputs.empty() || !line.attributes.empty() || line.inputs.size() != 1 ||
        found == line.inputs.end())
      line.refuse("a program has one line of outputs, output input=...");
    outputs_ = found->second;
    for (const int64_t output : outputs_) {
      bool is_made = false;
      for (const auto& layer : layers_) {
        is_made = is_made || std::find(layer->outputs.begin(), layer->outputs.end(), output) != layer->outputs.end();
      }
      if (!is_made) line.refuse("an output is what a layer gives");
    }
  }

  // Lets layers take over the work of the layers behind them, where they can.
  void join_layers() {
    std::vector<int64_t> uses(values_.size());
    for (const auto& layer : layers_) {
      for (const int64_t input : layer->inputs) ++uses[at(input)];
    }
    for (const int64_t output : outputs_) ++uses[at(output)];
    std::vector<std::unique_ptr<TrainingLayer<T>>> kept;
    std::vector<size_t> maker(values_.size(), SIZE_MAX);  // for each value, the kept layer that makes it
    // Whether a kept layer has taken over the layer.
    const auto is_absorbed = [&](const TrainingLayer<T>& layer) {
      for (size_t which = 0; which < layer.inputs.size(); ++which) {
        const size_t before = uses[at(layer.inputs[which])] == 1 ? maker[at(layer.inputs[which])] : SIZE_MAX;
        if (before == SIZE_MAX || kept[before]->outputs.size() != 1) continue;
        bool others_are_there = true;
        for (size_t i = 0; i < layer.inputs.size(); ++i) {
          const size_t other = maker[at(layer.inputs[i])];
          others_are_there = others_are_there && (i == which || other == SIZE_MAX || other < before);
        }
        if (!others_are_there || !kept[before]->absorb(layer, which)) continue;
        kept[before]->outputs = layer.outputs;
        maker[at(layer.outputs[0])] = before;
        return true;
      }
      return false;
    };
    for (auto& layer : layers_) {
      if (is_absorbed(*layer)) continue;
      for (const int64_t output : layer->outputs) maker[at(output)] = kept.size();
      kept.push_back(std::move(layer));
    }
    layers_ = std::move(kept);
    for (const auto& layer : layers_) most_inputs_ = std::max(most_inputs_, layer->inputs.size());
  }

  // Frees the gradients of a layer's outputs, and what the layer has saved.
  void finish(TrainingLayer<T>& layer, bool last) {
    for (const int64_t output : layer.outputs) {
      of_values_[at(output)] = {};
      if (last) values_[at(output)] = Tensor();
    }
    if (last) layer.release();
  }

  void add(int64_t value, Gradient<T> gradient) {
    Gradient<T>& own = of_values_[at(value)];
    if (!own.tensor.defined() && !own.memory) {
      own = std::move(gradient);
      return;
    }
    own = {combined<T>(BinaryKind::add, as_tensor(value, own), as_tensor(value, gradient)), nullptr, true};
  }
  Tensor as_tensor(int64_t value, const Gradient<T>& gradient) const {
    if (gradient.memory) return as_sizes(gradient.memory, sizes_of(values_[at(value)]));
    return gradient.tensor.borrow();
  }
  void check_count(int64_t value, const Gradient<T>& own) const {
    FASTNN_CHECK(own.tensor.numel() == values_[at(value)].numel(), kTrainingStep, ": expected a gradient of size ",
                 to_string(values_[at(value)].sizes()), ", got ", to_string(own.tensor.sizes()));
  }
  // A convolution's gradient comes in its input's format.
  const T* gradient_in_order(int64_t value) {
    Gradient<T>& own = of_values_[at(value)];
    if (own.memory) return own.memory;
    if (!own.tensor.defined()) return nullptr;
    check_count(value, own);
    own.tensor = dense(std::move(own.tensor));
    return data<T>(own.tensor);
  }
  Tensor take_gradient(int64_t value) {
    Gradient<T> own = std::move(of_values_[at(value)]);
    of_values_[at(value)] = {};
    if (own.tensor.defined()) {
      check_count(value, own);
      if (own.is_new && same_sizes(own.tensor, values_[at(value)])) return std::move(own.tensor);
    } else if (!own.memory) {
      return {};
    }
    const Tensor in_order = own.memory ? Tensor() : dense(own.tensor);
    Tensor result = new_tensor(sizes_of(values_[at(value)]), kDtypeOf<T>);
    std::copy_n(own.memory ? own.memory : data<T>(in_order), result.numel(), mutable_data<T>(result));
    return result;
  }

  std::vector<Input> inputs_;
  std::vector<int64_t> parameters_, outputs_;  // numbers of values
  std::vector<std::unique_ptr<TrainingLayer<T>>> layers_;
  size_t most_inputs_ = 0;
  TensorList values_;
  std::vector<Gradient<T>> of_values_;
  std::vector<const T*> gradients_;
};

// The passes that no call is using. They are kept so that a program is not read anew at every step. Threads share them.
template <class T>
class TrainingPasses {
 public:
  using Pass = std::unique_ptr<TrainingPass<T>>;

  static Pass take(const std::string& program) {
    TrainingPasses& all = instance();
    {
      const std::lock_guard<std::mutex> lock(all.mutex_);
      for (auto place = all.idle_.begin(); place != all.idle_.end(); ++place) {
        if ((*place)->program != program) continue;
        Pass pass = std::move(*place);
        all.idle_.erase(place);
        return pass;
      }
    }
    return std::make_unique<TrainingPass<T>>(program);
  }
  static void give_back(Pass pass) {
    constexpr size_t kKept = 256;  // a loop of so many steps over one network needs as many at once
    pass->forget();
    Pass last;  // declared first: it is freed after the lock is released
    TrainingPasses& all = instance();
    const std::lock_guard<std::mutex> lock(all.mutex_);
    all.idle_.push_front(std::move(pass));
    if (all.idle_.size() <= kKept) return;
    last = std::move(all.idle_.back());
    all.idle_.pop_back();
  }

 private:
  static TrainingPasses& instance() {
    static TrainingPasses& all = *new TrainingPasses;  // never destroyed, because libtorch may be destroyed before
    return all;
  }
  std::mutex mutex_;
  std::list<Pass> idle_;  // the one that was used last is in front
};

}  // namespace fastnn
