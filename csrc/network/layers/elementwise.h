// activation, clamp, unary, prelu, binary, where and cast: layers that compute element by element.
#pragma once

#include "../../ops/stock.h"
#include "../array.h"

namespace fastnn {

// The elements of the first input, which has the output's size: where they are, or copied to the output, if they are a
// part of another value.
template <class T>
const T* whole_input(const LayerCall<T>& call) {
  const ValueType &input = call.site.inputs[0], &output = call.site.outputs[0];
  if (input.part_strides.empty()) return call.input(0);
  copy_array(call.input(0), input.part_strides, call.output(0), output.strides(), output.sizes,
             memory_order(output.sizes.size(), output.channels_last()));
  return call.output(0);
}

// A layer of one input, of which it computes each element by itself.
template <class T>
class UnaryLayer : public Layer<T> {
 public:
  explicit UnaryLayer(const ProgramLine& line) { this->inputs = {line.input("input")}; }
  FormatRule formats() const override { return FormatRule::alike; }
  bool reads_parts() const override { return true; }
  void set_sizes(Site<T>& site) const override { site.outputs[0].sizes = site.sizes(0); }
};

template <class T>
class ActivationLayer : public UnaryLayer<T> {
 public:
  ActivationLayer(const ProgramLine& line, const Weights<T>&) : UnaryLayer<T>(line), activation_(line.activation()) {}
  void run(const LayerCall<T>& call) const override {
    activate(activation_, whole_input(call), call.site.outputs[0].count(), call.output(0));
  }

 private:
  Activation activation_;
};

// Keeps the elements between two bounds, of which either may be infinite.
template <class T>
class ClampLayer : public UnaryLayer<T> {
 public:
  ClampLayer(const ProgramLine& line, const Weights<T>&) : UnaryLayer<T>(line), bounds_(bounds_of(line)) {}
  // The bounds as an activation. Where they are in the wrong order, torch takes the larger of them for both.
  static Activation bounds_of(const ProgramLine& line) {
    const double most = line.real("max");
    return {ActivationKind::hardtanh, {std::min(line.real("min"), most), most}};
  }
  void run(const LayerCall<T>& call) const override {
    activate(bounds_, whole_input(call), call.site.outputs[0].count(), call.output(0));
  }

 private:
  Activation bounds_;
};

// The functions of an element that torch computes. X(name): torch's name of the function. But `root` is the square root
// that ends a norm: its derivative at 0 is taken to be 0.
#define FASTNN_FOR_EACH_UNARY(X) \
  X(abs) X(sqrt) X(rsqrt) X(log) X(log1p) X(expm1) X(erf) X(atan) X(sign) X(round) X(floor) X(ceil) X(root)
enum class UnaryKind : int32_t {
#define FASTNN_ENUMERATOR(name) name,
  FASTNN_FOR_EACH_UNARY(FASTNN_ENUMERATOR)
#undef FASTNN_ENUMERATOR
};
inline UnaryKind unary_kind(const ProgramLine& line) {
  const std::string_view function = line.text("function");
#define FASTNN_IF_NAMED(name) \
  if (function == #name) return UnaryKind::name;
  FASTNN_FOR_EACH_UNARY(FASTNN_IF_NAMED)
#undef FASTNN_IF_NAMED
  line.refuse("there is no function \"", std::string(function), "\"");
}
// The name of torch's operator that computes the line's function.
inline std::string stock_unary_name(const ProgramLine& line) {
  const bool is_root = unary_kind(line) == UnaryKind::root;  // Raises for a name that is none of those above.
  return "aten::" + std::string(is_root ? "sqrt" : line.text("function"));
}

template <class T>
class FunctionLayer : public UnaryLayer<T> {
 public:
  FunctionLayer(const ProgramLine& line, const Weights<T>&) : UnaryLayer<T>(line), name_(stock_unary_name(line)) {}
  void run(const LayerCall<T>& call) const override {
    const Ints one{1}, count{call.site.outputs[0].count()};
    const Tensor to = tensor_over(call.output(0), count, one);
    stock(name_.c_str(), "out", tensor_over(whole_input(call), count, one), to);
  }

 private:
  std::string name_;
};

// From the first input to the other, as far as the amount says: three values that are broadcast.
template <class T>
class LerpLayer : public Layer<T> {
 public:
  LerpLayer(const ProgramLine& line, const Weights<T>&) {
    this->inputs = {line.input("input"), line.input("other"), line.input("amount")};
  }
  void set_sizes(Site<T>& site) const override {
    for (const ValueType& input : site.inputs) {
      site.outputs[0].sizes = broadcast_sizes(site.outputs[0].sizes, input.sizes);
    }
  }
  void run(const LayerCall<T>& call) const override {
    const auto over = [&](const ValueType& type, auto* memory) {
      return tensor_over(memory, type.sizes, type.strides());
    };
    const auto& inputs = call.site.inputs;
    const Tensor to = over(call.site.outputs[0], call.output(0));
    stock("aten::lerp", "Tensor_out", over(inputs[0], call.input(0)), over(inputs[1], call.input(1)),
          over(inputs[2], call.input(2)), to);
  }
};

// The binary cross entropy of each element: -target log(x) - (1 - target) log(1 - x), where a logarithm is -100 at
// least, as in torch.nn.functional. x, target: `count` elements from 0 to 1.
template <class T>
void binary_cross_entropies(const T* x, const T* target, int64_t count, T* to) {
  bool all_between = true;
  for (int64_t i = 0; i < count; ++i) all_between &= x[i] >= 0 && x[i] <= 1 && target[i] >= 0 && target[i] <= 1;
  FASTNN_CHECK(all_between, "all elements of input and target should be between 0 and 1");
  constexpr double kTwoLogarithms = 40;  // the cost of an element, in multiply-adds
  parallel_range(count, kTwoLogarithms, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T t = target[i];
      // Targets are mostly 0 or 1, for which one of the logarithms has no part in the result.
      const T of_one = t == 0 ? T(0) : t * std::max(std::log(x[i]), T(-100));
      const T of_zero = t == 1 ? T(0) : (t - 1) * std::max(std::log1p(-x[i]), T(-100));
      to[i] = of_zero - of_one;
    }
  });
}

template <class T>
class BinaryCrossEntropyLayer : public Layer<T> {
 public:
  BinaryCrossEntropyLayer(const ProgramLine& line, const Weights<T>&) {
    this->inputs = {line.input("input"), line.input("target")};
  }
  void set_sizes(Site<T>& site) const override {
    site.outputs[0].sizes = site.sizes(0);
    FASTNN_CHECK(site.sizes(0) == site.sizes(1), "expected a target of size ", to_string(site.sizes(0)), ", got ",
                 to_string(site.sizes(1)));
  }
  void run(const LayerCall<T>& call) const override {
    binary_cross_entropies(call.input(0), call.input(1), call.site.outputs[0].count(), call.output(0));
  }
};

// x where it is above zero, else x times a weight: one for all elements, or one for each channel (dimension 1).
template <class T>
class PreluLayer : public Layer<T> {
 public:
  PreluLayer(const ProgramLine& line, const Weights<T>&) { this->inputs = {line.input("input"), line.input("weight")}; }
  FormatRule formats() const override { return FormatRule::alike; }
  void set_sizes(Site<T>& site) const override {
    const Ints& sizes = site.sizes(0);
    check_weight(site.inputs[1].count(), sizes);
    site.outputs[0].sizes = sizes;
  }
  static void check_weight(int64_t count, const Ints& sizes) {
    const int64_t channels = sizes.size() > 1 ? sizes[1] : 1;
    FASTNN_CHECK(count == 1 || (!sizes.empty() && count == channels),
                 "Mismatch of parameter numbers and input channel size. Found parameter numbers = ", count,
                 " and channel size = ", channels, ".");
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType& output = call.site.outputs[0];
    const T *const from = call.input(0), *const slopes = call.input(1);
    T* const to = call.output(0);
    const auto prelu = elementwise_kernels().get<T>().prelu;
    const int64_t count = output.count();
    if (call.site.inputs[1].count() == 1) {
      return parallel_range(count, kCopyWork, [&](int64_t first, int64_t last) {
        prelu(from + first, slopes, 0, last - first, to + first);
      });
    }
    // The elements are rows that lie together: pixels of all channels, or else planes of one channel. Where a plane is
    // one element, as behind a linear layer, all channels are the longer row.
    const int64_t channels = output.sizes[1], plane = product(output.sizes, 2, output.sizes.size());
    const bool of_pixels = output.channels_last() || plane == 1;
    const int64_t length = of_pixels ? channels : plane;
    parallel_range(count / std::max<int64_t>(length, 1), kCopyWork * static_cast<double>(length),
                   [&](int64_t first, int64_t last) {
                     for (int64_t row = first; row < last; ++row) {
                       const T* const slope = of_pixels ? slopes : slopes + row % channels;
                       prelu(from + row * length, slope, of_pixels, length, to + row * length);
                     }
                   });
  }
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
    in_place_ = line.flag("in_place");
    of_inputs_[0] = line.activation("input_activation");
    of_inputs_[1] = line.activation("other_activation");
    for (const Activation& activation : of_inputs_) {
      if (!line.has("other") && activation.kind != ActivationKind::identity) line.refuse("expected other=...");
    }
  }
  FormatRule formats() const override { return FormatRule::alike; }
  bool reads_parts() const override { return true; }

  void set_sizes(Site<T>& site) const override {
    Ints& sizes = site.outputs[0].sizes;
    sizes = site.inputs.size() > 1 ? broadcast_sizes(site.sizes(0), site.sizes(1)) : site.sizes(0);
    FASTNN_CHECK(!in_place_ || sizes == site.sizes(0), "output with shape ", to_string(site.sizes(0)),
                 " doesn't match the broadcast shape ", to_string(sizes));
  }

  void run(const LayerCall<T>& call) const override {
    const ValueType& output = call.site.outputs[0];
    T* const to = call.output(0);
    if (call.site.inputs.size() == 1) {
      combine_with_number(kind_, whole_input(call), number_, reverses_, output.count(), to);
      if (activation_.kind != ActivationKind::identity) activate(activation_, to, output.count(), to);
    } else {
      const size_t rank = output.sizes.size(), left = reverses_ ? 1 : 0;
      const auto operand = [&](size_t i) {
        return Operand<T>{call.input(i), broadcast_strides(call.site.inputs[i], rank), of_inputs_[i]};
      };
      combine_arrays(kind_, operand(left), operand(1 - left), activation_, to, output.strides(), output.sizes,
                     memory_order(rank, output.channels_last()));
    }
  }

 private:
  BinaryKind kind_;
  T number_ = 0;
  bool reverses_;            // the second operand comes first
  bool in_place_;            // the model writes the result to the first input, which it must not outgrow
  Activation of_inputs_[2];  // of the operands, before they are combined
  Activation activation_;
};

// The elements of the input where the condition is not 0, and those of `other` elsewhere. A number stands for either.
template <class T>
class WhereLayer : public Layer<T> {
 public:
  WhereLayer(const ProgramLine& line, const Weights<T>&) : operands_(line) { this->inputs = operands_.values; }
  FormatRule formats() const override { return FormatRule::alike; }
  bool reads_parts() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    for (const ValueType& input : site.inputs) {
      site.outputs[0].sizes = broadcast_sizes(site.outputs[0].sizes, input.sizes);
    }
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType& output = call.site.outputs[0];
    const size_t rank = output.sizes.size();
    const T number = static_cast<T>(operands_.number);
    std::array<const T*, 3> from;
    std::array<Ints, 3> strides;
    for (size_t i = 0, next = 0; i < 3; ++i) {
      const bool is_number = i == operands_.of_number;
      from[i] = is_number ? &number : call.input(next);
      strides[i] = is_number ? Ints(rank, 0) : broadcast_strides(call.site.inputs[next], rank);
      next += is_number ? 0 : 1;
    }
    choose_arrays(from, strides, call.output(0), output.strides(), output.sizes,
                  memory_order(rank, output.channels_last()));
  }

  // What a line names: of condition, input and other, the values that it takes, and which of the three is a number.
  struct Operands {
    static constexpr size_t kNone = 3;
    std::vector<int64_t> values;
    size_t of_number = kNone;
    double number;

    explicit Operands(const ProgramLine& line) : values{line.input("condition")}, number(line.real("number")) {
      for (const char* const name : {"input", "other"}) {
        if (line.has(name)) {
          values.push_back(line.input(name));
        } else if (of_number != kNone) {
          line.refuse("expected input=... or other=...");
        } else {
          of_number = values.size();
        }
      }
    }
  };

 private:
  Operands operands_;
};

// Booleans as numbers: 1 for true, 0 for false.
template <class T>
class CastLayer : public Layer<T> {
 public:
  CastLayer(const ProgramLine& line, const Weights<T>&) { this->inputs = {line.input("input")}; }
  bool takes_other_elements() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    FASTNN_CHECK(site.inputs[0].elements == ElementKind::booleans, "expected a cast's input to be bool");
    site.outputs[0].sizes = site.sizes(0);
  }
  void run(const LayerCall<T>& call) const override {
    const auto* const from = static_cast<const uint8_t*>(call.inputs[0]);
    for (int64_t i = 0; i < call.site.outputs[0].count(); ++i) call.output(0)[i] = from[i] ? T(1) : T(0);
  }
};

inline LayerEntry activation_entry() {
  return layer_entry<ActivationLayer>("activation", {"input"}, {{"activation", "activation", nullptr}});
}
inline LayerEntry clamp_entry() {
  return layer_entry<ClampLayer>("clamp", {"input"}, {{"min", "float", "-inf"}, {"max", "float", "inf"}});
}
inline LayerEntry unary_entry() {
  return layer_entry<FunctionLayer>("unary", {"input"}, {{"function", "text", nullptr}});
}
inline LayerEntry prelu_entry() {
  return layer_entry<PreluLayer>("prelu", {"input", "weight"}, {});
}
inline LayerEntry binary_entry() {
  return layer_entry<BinaryLayer>("binary", {"input", "other?"},
                                  {{"function", "text", nullptr},
                                   {"number", "float", "0"},
                                   {"reverses", "bool", "0"},
                                   {"in_place", "bool", "0"},
                                   {"input_activation", "activation", "identity"},
                                   {"other_activation", "activation", "identity"},
                                   {"activation", "activation", "identity"}});
}
inline LayerEntry cast_entry() {
  return layer_entry<CastLayer>("cast", {"input"}, {});
}
inline LayerEntry lerp_entry() {
  return layer_entry<LerpLayer>("lerp", {"input", "other", "amount"}, {});
}
inline LayerEntry binary_cross_entropy_entry() {
  return layer_entry<BinaryCrossEntropyLayer>("binary_cross_entropy", {"input", "target"}, {});
}
inline LayerEntry where_entry() {
  return layer_entry<WhereLayer>("where", {"condition", "input?", "other?"}, {{"number", "float", "0"}});
}

}  // namespace fastnn
