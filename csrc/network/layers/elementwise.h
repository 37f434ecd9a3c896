// activation and binary: layers that compute element by element.
#pragma once

#include "../../ops/mlp_by_layers.h"
#include "../array.h"

namespace fastnn {

template <class T>
class ActivationLayer : public Layer<T> {
 public:
  ActivationLayer(const ProgramLine& line, const Weights<T>&) : activation_(line.activation()) {
    this->inputs = {line.input("input")};
  }
  FormatRule formats() const override { return FormatRule::alike; }
  void set_sizes(Site<T>& site) const override { site.outputs[0].sizes = site.sizes(0); }
  void run(const LayerCall<T>& call) const override {
    activate(activation_, call.input(0), call.site.outputs[0].count(), call.output(0));
  }

 private:
  Activation activation_;
};

inline BinaryKind binary_kind(const ProgramLine& line) {
  const std::string_view function = line.text("function");
  constexpr size_t count = sizeof(kBinaryNames) / sizeof(kBinaryNames[0]);
  size_t kind = 0;
  while (kind < count && function != kBinaryNames[kind]) ++kind;
  if (kind == count) line.refuse("there is no function \"", std::string(function), "\"");
  return static_cast<BinaryKind>(kind);
}

// The second operand is a value or a number.
template <class T>
class BinaryLayer : public Layer<T> {
 public:
  BinaryLayer(const ProgramLine& line, const Weights<T>&) : activation_(line.activation()) {
    kind_ = binary_kind(line);
    this->inputs = {line.input("input")};
    if (line.has("other")) {
      this->inputs.push_back(line.input("other"));
    } else {
      number_ = static_cast<T>(line.real("number"));
    }
    reverses_ = line.flag("reverses");
  }
  FormatRule formats() const override { return FormatRule::alike; }

  void set_sizes(Site<T>& site) const override {
    site.outputs[0].sizes = site.inputs.size() > 1 ? broadcast_sizes(site.sizes(0), site.sizes(1)) : site.sizes(0);
  }

  void run(const LayerCall<T>& call) const override {
    const ValueType& output = call.site.outputs[0];
    T* const to = call.output(0);
    if (call.site.inputs.size() == 1) {
      combine_with_number(kind_, call.input(0), number_, reverses_, output.count(), to);
    } else {
      const size_t rank = output.sizes.size(), left = reverses_ ? 1 : 0;
      combine_arrays(kind_, call.input(left), broadcast_strides(call.site.inputs[left], rank), call.input(1 - left),
                     broadcast_strides(call.site.inputs[1 - left], rank), to, output.strides(), output.sizes,
                     memory_order(rank, output.channels_last()));
    }
    if (activation_.kind != ActivationKind::identity) activate(activation_, to, output.count(), to);
  }

 private:
  BinaryKind kind_;
  T number_ = 0;
  bool reverses_;  // the second operand comes first
  Activation activation_;
};

inline LayerEntry activation_entry() {
  return layer_entry<ActivationLayer>("activation", {"input"}, {{"activation", "activation", nullptr}});
}
inline LayerEntry binary_entry() {
  return layer_entry<BinaryLayer>("binary", {"input", "other?"},
                                  {{"function", "text", nullptr},
                                   {"number", "float", "0"},
                                   {"reverses", "bool", "0"},
                                   {"activation", "activation", "identity"}});
}

}  // namespace fastnn
