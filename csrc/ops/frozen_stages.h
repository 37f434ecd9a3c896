// The stages of a frozen network: each one's sizes, packed weights and run, over raw memory.
#pragma once

#include <limits>
#include <memory>
#include <string>

#include "../kernels/mlp.h"
#include "conv_forward.h"
#include "frozen_memory.h"
#include "rnn_threads.h"

namespace fastnn {

template <class T>
class FrozenStage {
 public:
  virtual ~FrozenStage() = default;
  // Raises unless an input of these sizes fits.
  virtual Ints output_sizes(const Ints& input) const = 0;
  // What is to be packed: everything that `run` will ask `packed` for, in the same order.
  virtual void pack(const Ints& input, PackedWriter& packed) const = 0;
  virtual void run(const T* input, const Ints& sizes, T* output, PackedReader& packed) const = 0;
  // Whether the output is the input, under other sizes.
  virtual bool only_reshapes() const { return false; }
};

// "mlp biases in (out activation)*": a chain of linear layers over the last dimension.
template <class T>
class FrozenMlp : public FrozenStage<T> {
 public:
  FrozenMlp(Words& words, WeightReader<T>& weights) {
    const bool biases = words.number(0, 1);
    int64_t in = words.size();
    widest_ = in;
    while (!words.stage_ends()) {
      const int64_t out = words.size();
      const Activation activation = words.activation();
      const T* weight = weights.take({out, in});
      const T* bias = biases ? weights.take({out}) : nullptr;
      layers_.push_back({weight, bias, in, out, activation, nullptr, nullptr});
      widest_ = std::max(widest_, out);
      work_ += 2.0 * static_cast<double>(in) * static_cast<double>(out);
      in = out;
    }
    FASTNN_CHECK(!layers_.empty(), "frozen: mlp without layers");
  }

  Ints output_sizes(const Ints& input) const override {
    FASTNN_CHECK(input.size() >= 2 && input.back() == layers_[0].in, "frozen: expected a layer's input to have ",
                 layers_[0].in, " features, got size ", to_string(input));
    Ints output = input;
    output.back() = layers_.back().out;
    return output;
  }

  void pack(const Ints&, PackedWriter& packed) const override {
    const MlpKernels<T>& kernels = mlp_kernels().get<T>();
    for (const MlpLayer<T>& layer : layers_) {
      T* to = packed.give<T>(0, kernels.packed_size(layer.out, layer.in));
      if (to) kernels.pack(layer.weight, layer.out, layer.in, 0, 1, to);
    }
  }

  void run(const T* input, const Ints& sizes, T* output, PackedReader& packed) const override {
    const MlpKernels<T>& kernels = mlp_kernels().get<T>();
    std::vector<MlpLayer<T>> layers = layers_;
    for (MlpLayer<T>& layer : layers) layer.packed = packed.take<T>(0, kernels.packed_size(layer.out, layer.in));
    const int64_t rows = product(sizes, 0, sizes.size() - 1);
    const int64_t chunks = std::min(useful_threads(work_ * static_cast<double>(rows)), rows);
    const int64_t scratch_size = kernels.scratch_size(widest_);
    const Scratch<T> scratch(checked_product(chunks, scratch_size));
    parallel_chunks(chunks, rows, [&](int64_t chunk, int64_t first, int64_t last) {
      kernels.forward(layers.data(), static_cast<int64_t>(layers.size()), false, input, output, first, last,
                      scratch.get() + chunk * scratch_size);
    });
  }

 private:
  std::vector<MlpLayer<T>> layers_;
  int64_t widest_ = 0;  // columns of the input or of a layer's output
  double work_ = 0;     // floating-point operations a row
};

// "conv dimensions bias out in kernel... geometry...": fastnn::conv_relu_max_pool with its geometry.
template <class T>
class FrozenConv : public FrozenStage<T> {
 public:
  FrozenConv(Words& words, WeightReader<T>& weights, const Expected& kind) : kind_(kind) {
    const int64_t dims = words.number(1, 3);
    const bool has_bias = words.number(0, 1);
    for (int64_t i = 0; i < dims + 2; ++i) weight_sizes_.push_back(words.size());
    while (!words.stage_ends()) geometry_.push_back(words.number(0, int64_t{1} << 31));
    weight_ = weights.take(weight_sizes_);
    bias_ = has_bias ? weights.take({weight_sizes_[0]}) : nullptr;
  }

  Ints output_sizes(const Ints& input) const override {
    FASTNN_CHECK(input.size() == weight_sizes_.size(), "frozen: expected a convolution's input to be ",
                 weight_sizes_.size(), "D (batch, channels, ", weight_sizes_.size() - 2, " dimensions), got size ",
                 to_string(input));
    return fastnn::output_sizes(problem(input));
  }

  void pack(const Ints& input, PackedWriter& packed) const override {
    ConvCall<T> call = call_of(problem(input).geometry);
    const ConvKernels<T>& kernels = conv_kernels().get<T>();
    const ConvPlan& plan = plan_for(plan_key<T>(kernels, call.geometry, false, false, -1));
    call.plan = &plan;
    call.packed = packed.give<T>(packing_of(plan), plan.packed_size);
    if (call.packed) kernels.pack(call, 0, plan.pack_items);
  }

  void run(const T* input, const Ints& sizes, T* output, PackedReader& packed) const override {
    const ConvPoolProblem problem = this->problem(sizes);
    ConvCall<T> call = call_of(problem.geometry);
    call.input = input;
    call.output = output;
    run_conv_forward(call, problem.dims, false, false, -1,
                     [&](const ConvPlan& plan) { return packed.take<T>(packing_of(plan), plan.packed_size); });
  }

 private:
  ConvPoolProblem problem(const Ints& input) const { return problem_of(kind_, input, weight_sizes_, geometry_); }

  ConvCall<T> call_of(const ConvPoolGeometry& g) const {
    ConvCall<T> call{};
    call.geometry = g;
    call.input_layout = contiguous_layout(g.groups * g.in_channels, g.input);
    call.weight = weight_;
    call.weight_layout = contiguous_layout(g.in_channels, g.kernel);
    call.bias = bias_;
    call.output_layout = contiguous_layout(g.groups * g.out_channels, g.output);
    return call;
  }

  Expected kind_;
  Ints weight_sizes_, geometry_;
  const T* weight_;
  const T* bias_;
};

// "rnn mode layers directions batch_first biases last in hidden projected": fastnn::rnn from a state of zeros; of its
// output the last step, if `last`. Output as batch_first has it, dense.
template <class T>
class FrozenRnn : public FrozenStage<T> {
 public:
  FrozenRnn(Words& words, WeightReader<T>& weights) {
    network_.mode = static_cast<RnnMode>(words.number(0, static_cast<int64_t>(RnnMode::count) - 1));
    network_.layers = words.size();
    network_.directions = words.number(1, 2);
    batch_first_ = words.number(0, 1);
    const bool biases = words.number(0, 1);
    last_ = words.number(0, 1);
    int64_t in = words.size();
    network_.hidden = words.size();
    const bool projects = network_.mode == RnnMode::lstm;
    network_.projected = words.number(0, projects ? network_.hidden - 1 : 0);
    FASTNN_CHECK(words.stage_ends(), "frozen: an rnn stage has 9 numbers");
    const int64_t gates = checked_product(entry_of(network_.mode).gates, network_.hidden);
    for (int64_t layer = 0; layer < network_.layers; ++layer, in = network_.width()) {
      for (int64_t i = 0; i < network_.directions; ++i) {
        RnnWeights<T> own{};
        own.input_size = in;
        own.weight_ih = weights.take({gates, in});
        own.weight_hh = weights.take({gates, network_.outputs()});
        own.bias_ih = biases ? weights.take({gates}) : nullptr;
        own.bias_hh = biases ? weights.take({gates}) : nullptr;
        if (network_.projected) own.weight_hr = weights.take({network_.projected, network_.hidden});
        weights_.push_back(own);
        work_ +=
            2.0 * network_.hidden * (entry_of(network_.mode).gates * (in + network_.outputs()) + network_.projected);
      }
    }
  }

  Ints output_sizes(const Ints& input) const override {
    FASTNN_CHECK(input.size() == 3 && input[2] == weights_[0].input_size,
                 "frozen: expected an rnn's input to be 3D with ", weights_[0].input_size, " features, got size ",
                 to_string(input));
    FASTNN_CHECK(length(input) > 0, "Expected sequence length to be larger than 0 in RNN");
    return last_ ? Ints{batch(input), network_.width()} : Ints{input[0], input[1], network_.width()};
  }

  void pack(const Ints&, PackedWriter& packed) const override {
    const RnnForwardKernels<T>& kernels = rnn_forward_kernels().get<T>();
    for (const RnnWeights<T>& weights : weights_) {
      T* to = packed.give<T>(0, kernels.packed_size(network_, weights.input_size));
      if (to) kernels.pack(network_, weights, Member(), to);
    }
  }

  void run(const T* input, const Ints& sizes, T* output, PackedReader& packed) const override {
    const RnnForwardKernels<T>& kernels = rnn_forward_kernels().get<T>();
    std::vector<RnnWeights<T>> weights = weights_;
    int64_t unpacked = 0;
    for (RnnWeights<T>& own : weights) {
      const int64_t count = kernels.packed_size(network_, own.input_size);
      own.packed = packed.take<T>(0, count);
      if (!own.packed) unpacked = checked_sum(unpacked, count);
    }
    const Scratch<T> packed_here(unpacked);
    T* next = packed_here.get();
    for (RnnWeights<T>& own : weights) {
      if (own.packed) continue;
      kernels.pack(network_, own, Member(), next);
      own.packed = next;
      next += kernels.packed_size(network_, own.input_size);
    }

    const int64_t length = this->length(sizes), batch = this->batch(sizes), in = weights_[0].input_size;
    const int64_t step = batch_first_ ? in : checked_product(batch, in);
    std::vector<RnnStep> steps;
    steps.reserve(length);
    for (int64_t t = 0; t < length; ++t) steps.push_back({t * step, t * batch, batch});
    RnnNetwork<T> network = network_;
    network.batch = batch;
    network.rows = checked_product(length, batch);
    network.steps = length;
    network.step = steps.data();
    network.weights = weights.data();
    network.input = input;
    network.input_stride = batch_first_ ? checked_product(length, in) : in;
    const int64_t width = network.width();
    const bool writes_output = !batch_first_ && !last_;
    const Scratch<T> all_steps(writes_output ? 0 : checked_product(network.rows, width));
    network.output = writes_output ? output : all_steps.get();
    run_network(network, kernels);
    if (last_) {
      std::copy_n(all_steps.get() + (network.rows - batch) * width, batch * width, output);
    } else if (batch_first_) {
      for (int64_t row = 0; row < network.rows; ++row) {
        std::copy_n(all_steps.get() + row * width, width, output + (row % batch * length + row / batch) * width);
      }
    }
  }

 private:
  void run_network(RnnNetwork<T>& network, const RnnForwardKernels<T>& kernels) const {
    const bool needs_between = network.layers > 1 && network.directions > 1;
    const Scratch<T> between(needs_between ? checked_product(network.rows, network.width()) : 0);
    network.hidden_outputs = between.get();
    const ForwardParts<T> parts(network, kernels, work_ * network.rows);
    const int64_t state_size = checked_product(checked_product(network.layers, network.directions),
                                               checked_product(network.batch, network.hidden));
    const Scratch<T> state(checked_product(2, state_size)), scratch(parts.scratch_size());
    T* const c_n = network.mode == RnnMode::lstm ? state.get() + state_size : nullptr;
    parts.run(false, state.get(), c_n, scratch.get());
  }

  int64_t length(const Ints& input) const { return input[batch_first_ ? 1 : 0]; }
  int64_t batch(const Ints& input) const { return input[batch_first_ ? 0 : 1]; }

  RnnNetwork<T> network_{};
  std::vector<RnnWeights<T>> weights_;
  double work_ = 0;  // floating-point operations a row
  bool batch_first_, last_;
};

// "input (least most)*": what the input's sizes may be; a most of 0 stands for no limit.
template <class T>
class FrozenInput : public FrozenStage<T> {
 public:
  explicit FrozenInput(Words& words) {
    constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
    while (!words.stage_ends()) {
      const int64_t least = words.number(0, kAny), most = words.number(0, kAny);
      ranges_.push_back({least, most == 0 ? kAny : most});
    }
  }

  Ints output_sizes(const Ints& input) const override {
    bool fits = input.size() == ranges_.size();
    for (size_t i = 0; fits && i < ranges_.size(); ++i)
      fits = ranges_[i].least <= input[i] && input[i] <= ranges_[i].most;
    if (!fits) {
      std::vector<std::string> expected;
      for (const Range& range : ranges_) expected.push_back(range.words());
      fail("frozen: expected an input of size ", to_string(expected), ", got ", to_string(input));
    }
    return input;
  }
  void pack(const Ints&, PackedWriter&) const override {}
  void run(const T*, const Ints&, T*, PackedReader&) const override {}
  bool only_reshapes() const override { return true; }

 private:
  struct Range {
    int64_t least, most;

    std::string words() const {
      if (least == most) return std::to_string(least);
      const bool limited = most != std::numeric_limits<int64_t>::max();
      if (least == 0 && !limited) return "any";
      return std::to_string(least) + (limited ? " to " + std::to_string(most) : " or more");
    }
  };

  std::vector<Range> ranges_;
};

// "flatten", or "flatten features": all dimensions but the first become one, of that size if it is given.
template <class T>
class FrozenFlatten : public FrozenStage<T> {
 public:
  explicit FrozenFlatten(Words& words) {
    if (words.stage_ends()) return;
    features_ = words.size();
    FASTNN_CHECK(words.stage_ends(), "frozen: flatten has one number");
  }

  Ints output_sizes(const Ints& input) const override {
    FASTNN_CHECK(!input.empty(), "frozen: expected an input to flatten");
    const int64_t features = product(input, 1, input.size());
    FASTNN_CHECK(features_ == 0 || features == features_, "frozen: expected ", features_,
                 " elements a sample to flatten, got size ", to_string(input));
    return {input[0], features};
  }
  void pack(const Ints&, PackedWriter&) const override {}
  void run(const T*, const Ints&, T*, PackedReader&) const override {}
  bool only_reshapes() const override { return true; }

 private:
  int64_t features_ = 0;  // 0: any
};

}  // namespace fastnn
