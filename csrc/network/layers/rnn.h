// rnn: a recurrent network of any mode, over whole sequences, with states in and out.
#pragma once

#include "../../ops/rnn_threads.h"
#include "../layer.h"

namespace fastnn {

// The outputs are the output of all steps or of the last step, and then as many final states as the line names.
template <class T>
class RnnLayer : public Layer<T> {
 public:
  RnnLayer(const ProgramLine& line, const Weights<T>& weights)
      : batch_first_(line.flag("batch_first")), last_(line.flag("last")) {
    if (line.real("dropout") != 0) line.refuse("a network that is not trained drops nothing");
    const std::string_view mode = line.text("mode");
    int64_t number = 0;
    while (number < static_cast<int64_t>(RnnMode::count) && mode != kRnnModes[number].name) ++number;
    if (number == static_cast<int64_t>(RnnMode::count)) line.refuse("there is no mode \"", std::string(mode), "\"");
    network_.mode = static_cast<RnnMode>(number);
    network_.directions = line.flag("bidirectional") ? 2 : 1;
    states_ = entry_of(network_.mode).states;
    this->inputs = {line.input("input")};
    for (const char* const name : {"h", "c"}) {
      if (line.has(name)) this->inputs.push_back(line.input(name));
    }
    const bool given = this->inputs.size() == 1 || this->inputs.size() == 1 + states_;
    if (!given || line.has("c") != (this->inputs.size() == 3)) line.refuse("expected all of its states, or none");
    if (line.outputs.size() > 1 + states_) line.refuse("it gives an output and ", states_, " states");
    read_weights(line, weights);
  }

  void set_sizes(Site<T>& site) const override {
    const bool is_one = site.sizes(0).size() == 2;
    const Ints input = with_batch(site.sizes(0));
    FASTNN_CHECK(input.size() == 3 && input[2] == weights_[0].input_size,
                 "expected an rnn's input to be 2D or 3D with ", weights_[0].input_size, " features, got size ",
                 to_string(site.sizes(0)));
    FASTNN_CHECK(!(is_one && last_ && batch_first_), "expected a batch in front of the steps, of which one is chosen");
    FASTNN_CHECK(length(input) > 0, "Expected sequence length to be larger than 0 in RNN");
    const int64_t count = network_.layers * network_.directions, batch = this->batch(input), width = network_.width();
    const auto state = [&](int64_t features) { return is_one ? Ints{count, features} : Ints{count, batch, features}; };
    const Ints states[2] = {state(network_.outputs()), state(network_.hidden)};
    for (size_t i = 1; i < site.inputs.size(); ++i) {
      FASTNN_CHECK(site.sizes(i) == states[i - 1], "Expected hidden size ", to_string(states[i - 1]), ", got ",
                   to_string(site.sizes(i)));
    }
    Ints output = site.sizes(0);
    output.back() = width;
    if (last_) output = is_one ? Ints{width} : Ints{batch, width};
    site.outputs[0].sizes = output;
    for (size_t i = 1; i < site.outputs.size(); ++i) site.outputs[i].sizes = states[i - 1];
  }

  void pack(const Site<T>& site, PackedWriter& packed) const override {
    const RnnForwardKernels<T>& kernels = *site.kernels.rnn;
    for (const RnnWeights<T>& weights : weights_) {
      T* to = packed.give<T>(0, kernels.packed_size(network_, weights.input_size));
      if (to) kernels.pack(network_, weights, Member(), to);
    }
  }

  void run(const LayerCall<T>& call) const override {
    const RnnForwardKernels<T>& kernels = *call.site.kernels.rnn;
    std::vector<RnnWeights<T>> weights = weights_;
    int64_t unpacked = 0;
    for (RnnWeights<T>& own : weights) {
      const int64_t count = kernels.packed_size(network_, own.input_size);
      own.packed = call.packed.template take<T>(0, count);
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

    const Ints sizes = with_batch(call.site.sizes(0));
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
    network.input = call.input(0);
    network.input_stride = batch_first_ ? checked_product(length, in) : in;
    network.h0 = call.site.inputs.size() > 1 ? call.input(1) : nullptr;
    network.c0 = call.site.inputs.size() > 2 ? call.input(2) : nullptr;
    const int64_t width = network.width();
    // With one step, or one sequence, both orders of dimensions are the same in memory.
    const bool writes_output = length == 1 || (!last_ && (!batch_first_ || batch == 1));
    const Scratch<T> all_steps(writes_output ? 0 : checked_product(network.rows, width));
    network.output = writes_output ? call.output(0) : all_steps.get();
    run_network(network, kernels, call);
    if (writes_output) return;
    if (last_) {
      std::copy_n(all_steps.get() + (network.rows - batch) * width, batch * width, call.output(0));
    } else {
      for (int64_t row = 0; row < network.rows; ++row) {
        std::copy_n(all_steps.get() + row * width, width,
                    call.output(0) + (row % batch * length + row / batch) * width);
      }
    }
  }

 private:
  void read_weights(const ProgramLine& line, const Weights<T>& weights) {
    const bool biased = line.flag("bias");
    const int64_t projected = line.flag("projected");
    const auto found = line.inputs.find("weights");
    if (found == line.inputs.end()) line.refuse("expected weights=...");
    const std::vector<int64_t>& given = found->second;
    const size_t each = 2 + (biased ? 2 : 0) + (projected ? 1 : 0);
    if (given.empty() || given.size() % (each * network_.directions)) {
      line.refuse("expected ", each * network_.directions, " weights a layer, got ", given.size());
    }
    network_.layers = static_cast<int64_t>(given.size() / (each * network_.directions));
    size_t next = 0;
    const auto take = [&](const Ints& sizes) {
      const auto& weight = weights.of(line, "weights", given[next++]);
      if (weight.sizes != sizes) {
        line.refuse("expected weight ", next - 1, " of size ", to_string(sizes), ", got ", to_string(weight.sizes));
      }
      return weight.data;
    };
    // The sizes follow from the first two weights.
    const auto& first = weights.of(line, "weights", given[0]);
    const auto& second = weights.of(line, "weights", given[1]);
    if (first.sizes.size() != 2 || second.sizes.size() != 2) line.refuse("expected weights of 2 dimensions");
    const int64_t gates = first.sizes[0];
    network_.hidden = gates / entry_of(network_.mode).gates;
    if (gates == 0 || gates % entry_of(network_.mode).gates) line.refuse("expected whole gates, got ", gates, " rows");
    network_.projected = projected ? second.sizes[1] : 0;
    if (projected && (network_.mode != RnnMode::lstm || network_.projected >= network_.hidden)) {
      line.refuse("only LSTM has a projection, to fewer than its ", network_.hidden, " units");
    }
    int64_t in = first.sizes[1];
    if (in < 1 || network_.outputs() < 1) line.refuse("expected an input and an output of at least one feature");
    for (int64_t layer = 0; layer < network_.layers; ++layer, in = network_.width()) {
      for (int64_t i = 0; i < network_.directions; ++i) {
        RnnWeights<T> own{};
        own.input_size = in;
        own.weight_ih = take({gates, in});
        own.weight_hh = take({gates, network_.outputs()});
        own.bias_ih = biased ? take({gates}) : nullptr;
        own.bias_hh = biased ? take({gates}) : nullptr;
        if (projected) own.weight_hr = take({network_.projected, network_.hidden});
        weights_.push_back(own);
        work_ += 2.0 * static_cast<double>(network_.hidden) *
                 static_cast<double>(entry_of(network_.mode).gates * (in + network_.outputs()) + network_.projected);
      }
    }
  }

  void run_network(RnnNetwork<T>& network, const RnnForwardKernels<T>& kernels, const LayerCall<T>& call) const {
    const bool needs_between = network.layers > 1 && network.directions > 1;
    const Scratch<T> between(needs_between ? checked_product(network.rows, network.width()) : 0);
    network.hidden_outputs = between.get();
    const ForwardParts<T> parts(network, kernels, work_ * static_cast<double>(network.rows));
    const size_t given = call.site.outputs.size();
    const int64_t state_size = checked_product(checked_product(network.layers, network.directions),
                                               checked_product(network.batch, network.hidden));
    const Scratch<T> state(checked_product(2, state_size)), scratch(parts.scratch_size());
    T* const h = given > 1 ? call.output(1) : state.get();
    T* const c = given > 2 ? call.output(2) : state.get() + state_size;
    parts.run(false, h, network.mode == RnnMode::lstm ? c : nullptr, scratch.get());
  }

  // The sizes of an input. A sequence by itself, of two dimensions, gets a batch of one.
  Ints with_batch(Ints sizes) const {
    if (sizes.size() == 2) sizes.insert(sizes.begin() + (batch_first_ ? 0 : 1), 1);
    return sizes;
  }
  int64_t length(const Ints& input) const { return input[batch_first_ ? 1 : 0]; }
  int64_t batch(const Ints& input) const { return input[batch_first_ ? 0 : 1]; }

  RnnNetwork<T> network_{};
  std::vector<RnnWeights<T>> weights_;
  double work_ = 0;  // floating-point operations a row
  bool batch_first_, last_;
  size_t states_ = 0;
};

inline LayerEntry rnn_entry() {
  return layer_entry<RnnLayer>("rnn", {"input", "h?", "c?", "weights*"},
                               {{"mode", "text", nullptr},
                                {"bidirectional", "bool", "0"},
                                {"batch_first", "bool", "0"},
                                {"bias", "bool", "1"},
                                {"projected", "bool", "0"},
                                {"last", "bool", "0"},
                                {"dropout", "float", "0"}});
}

}  // namespace fastnn
