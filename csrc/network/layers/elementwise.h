// activation and binary: what is computed element by element.
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

// The second operand is a value or a number.
template <class T>
class BinaryLayer : public Layer<T> {
 public:
  BinaryLayer(const ProgramLine& line, const Weights<T>&) : activation_(line.activation()) {
    const std::string_view function = line.text("function");
    constexpr size_t count = sizeof(kBinaryNames) / sizeof(kBinaryNames[0]);
    size_t kind = 0;
    while (kind < count && function != kBinaryNames[kind]) ++kind;
    if (kind == count) line.refuse("there is no function \"", std::string(function), "\"");
    kind_ = static_cast<BinaryKind>(kind);
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
    const auto& kernels = elementwise_kernels().get<T>();
    const ValueType& output = call.site.outputs[0];
    T* const to = call.output(0);
    if (call.site.inputs.size() == 1) {
      const T *const from = call.input(0), *const number = &number_;
      parallel_range(output.count(), 1, [&](int64_t first, int64_t last) {
        const T* const a = reverses_ ? number : from + first;
        const T* const b = reverses_ ? from + first : number;
        kernels.binary(kind_, a, reverses_ ? 0 : 1, b, reverses_ ? 1 : 0, last - first, to + first);
      });
    } else {
      const size_t rank = output.sizes.size(), left = reverses_ ? 1 : 0;
      const T *const a = call.input(left), *const b = call.input(1 - left);
      const Loops<3> loops(output.sizes,
                           {broadcast_strides(call.site.inputs[left], rank),
                            broadcast_strides(call.site.inputs[1 - left], rank), output.strides()},
                           memory_order(rank, output.channels_last()));
      const size_t last = loops.sizes.size() - 1;
      const int64_t length = loops.sizes[last], a_step = loops.strides[0][last], b_step = loops.strides[1][last];
      loops.for_each_run(1, 1, [&](const auto& at) {
        // An operand of another format than the output lies across the run.
        const Scratch<T> a_run(a_step > 1 ? length : 0), b_run(b_step > 1 ? length : 0);
        const auto in_a_run = [length](const T* from, int64_t step, T* run) {
          if (step <= 1) return from;
          for (int64_t i = 0; i < length; ++i) run[i] = from[i * step];
          return static_cast<const T*>(run);
        };
        kernels.binary(kind_, in_a_run(a + at[0], a_step, a_run.get()), std::min<int64_t>(a_step, 1),
                       in_a_run(b + at[1], b_step, b_run.get()), std::min<int64_t>(b_step, 1), length, to + at[2]);
      });
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
