// fastnn::rnn and its backward: checks, allocation, threads.
#include "../kernels/rnn.h"

#include <tuple>

#include "tensor.h"

namespace fastnn {
namespace {

using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;

// The arguments that forward and backward share, checked and dense.
struct Problem {
  Expected kind;
  RnnMode mode = RnnMode::tanh;
  int64_t layers = 1, directions = 1, input_size = 0, hidden = 0, batch = 0, rows = 0;
  bool batch_first = false, packed = false;
  int64_t weights_each = 0;  // 2, or 4 with biases
  std::vector<RnnStep> steps{};
  Tensor input{};
  TensorList state{}, weights{};
  OptionalTensor masks{};

  int64_t width() const { return directions * hidden; }
  int64_t count() const { return layers * directions; }
  int64_t input_size_of(int64_t index) const { return index < directions ? input_size : width(); }
  std::vector<int64_t> state_sizes() const { return {count(), batch, hidden}; }
  // The output's sizes, and its strides: time-major in memory, whatever the order of the dimensions.
  Tensor new_output() const {
    if (packed) return new_tensor({rows, width()}, kind.dtype);
    const int64_t length = static_cast<int64_t>(steps.size()), step = std::max<int64_t>(batch, 1) * width();
    const int64_t strides[] = {batch_first ? width() : step, batch_first ? step : width(), 1};
    return new_strided_tensor(
        batch_first ? std::vector<int64_t>{batch, length, width()} : std::vector<int64_t>{length, batch, width()},
        strides, kind.dtype);
  }
  // What backward needs besides the output, in one tensor: the other layers' outputs, then what the cells keep.
  int64_t hidden_outputs_size() const { return checked_product(layers - 1, checked_product(rows, width())); }
  int64_t saved_size() const { return checked_product(count() * saved_of(mode), checked_product(rows, hidden)); }
  int64_t reserve_size() const { return checked_sum(hidden_outputs_size(), saved_size()); }
  double work() const {  // floating-point operations of one forward
    double total = 0;
    for (int64_t i = 0; i < count(); ++i) total += 2.0 * rows * gates_of(mode) * hidden * (input_size_of(i) + hidden);
    return total;
  }
};

void check_weights(Problem& problem, const TensorList& weights) {
  const char* op = problem.kind.op;
  const int64_t given = static_cast<int64_t>(weights.size());
  check(problem.layers > 0 && problem.layers <= given && (given == 2 * problem.count() || given == 4 * problem.count()),
        op, ": expected 2 weights, or 4 with biases, for each of ", problem.layers, " layers and ", problem.directions,
        " directions, got ", given);
  problem.weights_each = given / problem.count();
  check_same_kind(weights[1], problem.kind, "weights");
  check(weights[1].dim() == 2 && weights[1].size(1) > 0, op, ": expected weights[1] of size (gates * hidden, hidden)");
  problem.hidden = weights[1].size(1);
  const int64_t gates = checked_product(gates_of(problem.mode), problem.hidden);
  for (int64_t i = 0; i < given; ++i) {
    const Tensor& weight = weights[i];
    check_same_kind(weight, problem.kind, "weights");
    const int64_t which = i % problem.weights_each;
    if (which < 2) {
      const int64_t columns = which ? problem.hidden : problem.input_size_of(i / problem.weights_each);
      check_sizes(weight, {gates, columns}, op, "weights");
    } else {
      check_sizes(weight, {gates}, op, "weights");
    }
    check_no_gradients(op, weight);
    problem.weights.push_back(dense(weight));
  }
}

void set_packed_steps(Problem& problem, const Tensor& batch_sizes) {
  const char* op = problem.kind.op;
  check(batch_sizes.defined() && batch_sizes.is_cpu() && batch_sizes.scalar_type() == ScalarType::Long, op,
        ": batch_sizes should be a 1D CPU int64 tensor");
  check(batch_sizes.dim() == 1 && batch_sizes.size(0) > 0, op, ": batch_sizes should be 1D and not empty");
  const Tensor sizes = dense(batch_sizes);
  const int64_t* size = data<int64_t>(sizes);
  problem.batch = size[0];
  problem.rows = problem.input.size(0);
  int64_t row = 0;
  for (int64_t t = 0; t < sizes.size(0); ++t) {
    check(size[t] > 0 && size[t] <= (t ? size[t - 1] : problem.rows), op,
          ": batch_sizes should be positive and in decreasing order, got ", size[t], " at ", t);
    check(size[t] <= problem.rows - row, op, ": batch_sizes sum to more than the ", problem.rows, " rows of input");
    problem.steps.push_back({row * problem.input_size, row, size[t]});
    row += size[t];
  }
  check(row == problem.rows, op, ": batch_sizes sum to ", row, ", but input has ", problem.rows, " rows");
}

void set_steps(Problem& problem) {
  const bool batch_first = problem.batch_first;
  const int64_t length = problem.input.size(batch_first ? 1 : 0);
  problem.batch = problem.input.size(batch_first ? 0 : 1);
  check(length > 0, "Expected sequence length to be larger than 0 in RNN");
  problem.rows = checked_product(length, problem.batch);
  const int64_t step = batch_first ? problem.input_size : problem.batch * problem.input_size;
  for (int64_t t = 0; t < length; ++t) problem.steps.push_back({t * step, t * problem.batch, problem.batch});
}

size_t states_of(RnnMode mode) {
  return mode == RnnMode::lstm ? 2 : 1;
}

void check_state(Problem& problem, const TensorList& state, std::initializer_list<int64_t> sizes) {
  const char* op = problem.kind.op;
  check(state.empty() || state.size() == states_of(problem.mode), op, ": expected no state or ",
        states_of(problem.mode), " tensors, got ", state.size());
  for (const Tensor& tensor : state) {
    check_same_kind(tensor, problem.kind, "state");
    check_sizes(tensor, sizes, op, "state");
    check_no_gradients(op, tensor);
    problem.state.push_back(dense(tensor));
  }
}

Problem start_problem(const char* op, const Tensor& input, int64_t mode, int64_t layers, bool bidirectional) {
  check(mode >= 0 && mode < static_cast<int64_t>(RnnMode::count), op, ": mode must be between 0 and ",
        static_cast<int64_t>(RnnMode::count) - 1, ", got ", mode);
  Problem problem{check_first(input, op, "input")};
  check_no_gradients(op, input);
  problem.mode = static_cast<RnnMode>(mode);
  problem.layers = layers;
  problem.directions = bidirectional ? 2 : 1;
  problem.input = dense(input);
  problem.input_size = input.size(input.dim() - 1);
  return problem;
}

Problem check_problem(const char* op, const Tensor& input, const OptionalTensor& batch_sizes, const TensorList& state,
                      const TensorList& weights, const OptionalTensor& masks, int64_t mode, int64_t layers,
                      bool bidirectional, bool batch_first) {
  const int64_t dims = batch_sizes ? 2 : 3;
  check(input.defined() && input.dim() == dims, op, ": input must have ", dims, " dimensions");
  check(!(batch_sizes && batch_first), op, ": batch_first does not go with batch_sizes");
  Problem problem = start_problem(op, input, mode, layers, bidirectional);
  problem.batch_first = batch_first;
  problem.packed = batch_sizes.has_value();
  check_weights(problem, weights);
  problem.packed ? set_packed_steps(problem, *batch_sizes) : set_steps(problem);
  check_state(problem, state, {problem.count(), problem.batch, problem.hidden});
  if (masks) {
    check_same_kind(*masks, problem.kind, "masks");
    check_sizes(*masks, {layers - 1, problem.rows, problem.width()}, op, "masks");
    problem.masks = dense(*masks);
  }
  return problem;
}

template <class T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// Bounds of `chunks` runs of sequences, each with about as many rows as the others.
std::vector<int64_t> split_sequences(const Problem& problem, int64_t chunks) {
  std::vector<int64_t> bounds{0};
  int64_t rows = 0;
  size_t length = problem.steps.size();
  for (int64_t sequence = 0; sequence < problem.batch; ++sequence) {
    while (problem.steps[length - 1].rows <= sequence) --length;
    rows += static_cast<int64_t>(length);
    const int64_t left = problem.batch - 1 - sequence, to_come = chunks - static_cast<int64_t>(bounds.size());
    const bool full = static_cast<double>(rows) * chunks >= static_cast<double>(problem.rows) * bounds.size();
    if (to_come > 0 && left > 0 && (full || left <= to_come)) bounds.push_back(sequence + 1);
  }
  bounds.push_back(problem.batch);
  return bounds;
}

int64_t longest_chunk(const std::vector<int64_t>& bounds) {
  int64_t longest = 0;
  for (size_t i = 1; i < bounds.size(); ++i) longest = std::max(longest, bounds[i] - bounds[i - 1]);
  return longest;
}

// A network with its weights packed by `kernels`, which are those of forward or of backward.
template <class T>
struct Network : RnnNetwork<T> {
  std::vector<RnnWeights<T>> directions_;
  std::unique_ptr<Scratch<Compute<T>>> packed_;

  template <class Kernels>
  Network(const Problem& problem, const Kernels& kernels) {
    int64_t size = 0;
    for (int64_t i = 0; i < problem.count(); ++i) {
      size += kernels.packed_size(problem.mode, problem.hidden, problem.input_size_of(i));
    }
    packed_ = std::make_unique<Scratch<Compute<T>>>(size);
    Compute<T>* packed = packed_->get();
    for (int64_t i = 0; i < problem.count(); ++i) {
      const Tensor* weight = &problem.weights[i * problem.weights_each];
      const bool has_biases = problem.weights_each == 4;
      RnnWeights<T> weights{data<T>(weight[0]),
                            data<T>(weight[1]),
                            has_biases ? data<T>(weight[2]) : nullptr,
                            has_biases ? data<T>(weight[3]) : nullptr,
                            problem.input_size_of(i),
                            packed};
      kernels.pack(problem.mode, problem.hidden, weights, packed);
      packed += kernels.packed_size(problem.mode, problem.hidden, problem.input_size_of(i));
      directions_.push_back(weights);
    }
    this->mode = problem.mode;
    this->layers = problem.layers;
    this->directions = problem.directions;
    this->hidden = problem.hidden;
    this->batch = problem.batch;
    this->rows = problem.rows;
    this->steps = static_cast<int64_t>(problem.steps.size());
    this->step = problem.steps.data();
    this->weights = directions_.data();
    this->input = data<T>(problem.input);
    this->input_stride = problem.batch_first ? problem.input_size * this->steps : problem.input_size;
    this->masks = data_or_null<T>(problem.masks);
    this->h0 = problem.state.empty() ? nullptr : data<T>(problem.state[0]);
    this->c0 = problem.state.size() < 2 ? nullptr : data<T>(problem.state[1]);
    this->saved = nullptr;
    this->hidden_outputs = nullptr;
    this->kept_outputs = std::max<int64_t>(problem.layers - 1, 1);
  }

  void set_reserve(const Problem& problem, T* reserve) {
    this->hidden_outputs = reserve;
    this->saved = reserve + problem.hidden_outputs_size();
  }
};

int64_t chunks_of(const Problem& problem, double work) {
  return std::max<int64_t>(1, std::min(useful_threads(work), problem.batch));
}

template <class T>
void run_forward(const Problem& problem, const Tensor& output, const TensorList& state, const OptionalTensor& reserve) {
  const RnnForwardKernels<T>& kernels = rnn_forward_kernels().get<T>();
  Network<T> network(problem, kernels);
  network.output = mutable_data<T>(output);
  std::unique_ptr<Scratch<T>> hidden_outputs;
  if (reserve) {
    network.set_reserve(problem, mutable_data<T>(*reserve));
  } else {
    network.kept_outputs = std::clamp<int64_t>(problem.layers - 1, 1, 2);
    const int64_t kept = std::min<int64_t>(problem.layers - 1, 2);
    hidden_outputs = std::make_unique<Scratch<T>>(kept * problem.rows * problem.width());
    network.hidden_outputs = hidden_outputs->get();
  }
  const int64_t chunks = chunks_of(problem, problem.work());
  const std::vector<int64_t> bounds = split_sequences(problem, chunks);
  const int64_t scratch_size = kernels.scratch_size(network, longest_chunk(bounds));
  Scratch<Compute<T>> scratch(checked_product(chunks, scratch_size));
  T* h_n = mutable_data<T>(state[0]);
  T* c_n = state.size() > 1 ? mutable_data<T>(state[1]) : nullptr;
  parallel_chunks(chunks, chunks, [&](int64_t chunk, int64_t, int64_t) {
    kernels.run(network, h_n, c_n, bounds[chunk], bounds[chunk + 1], scratch.get() + chunk * scratch_size);
  });
}

std::tuple<Tensor, TensorList, OptionalTensor> forward(const char* op, const Tensor& input,
                                                       const OptionalTensor& batch_sizes, const TensorList& state,
                                                       const TensorList& weights, const OptionalTensor& masks,
                                                       int64_t mode, int64_t layers, bool bidirectional,
                                                       bool batch_first, bool save) {
  const Problem problem =
      check_problem(op, input, batch_sizes, state, weights, masks, mode, layers, bidirectional, batch_first);
  const Tensor output = problem.new_output();
  TensorList final_state;
  for (size_t i = 0; i < states_of(problem.mode); ++i) {
    final_state.push_back(new_tensor(problem.state_sizes(), problem.kind.dtype));
  }
  OptionalTensor reserve;
  if (save) reserve = new_tensor({problem.reserve_size()}, problem.kind.dtype);
  if (problem.rows > 0) {
    with_dtype(problem.kind.dtype,
               [&](auto type) { run_forward<decltype(type)>(problem, output, final_state, reserve); });
  }
  return {output, final_state, reserve};
}

std::tuple<Tensor, TensorList> rnn(const Tensor& input, const OptionalTensor& batch_sizes, const TensorList& state,
                                   const TensorList& weights, const OptionalTensor& masks, int64_t mode,
                                   int64_t num_layers, bool bidirectional, bool batch_first) {
  auto [output, final_state, reserve] =
      forward("rnn", input, batch_sizes, state, weights, masks, mode, num_layers, bidirectional, batch_first, false);
  return {output, final_state};
}

std::tuple<Tensor, TensorList, Tensor> rnn_with_reserve(const Tensor& input, const OptionalTensor& batch_sizes,
                                                        const TensorList& state, const TensorList& weights,
                                                        const OptionalTensor& masks, int64_t mode, int64_t num_layers,
                                                        bool bidirectional, bool batch_first) {
  auto [output, final_state, reserve] = forward("rnn_with_reserve", input, batch_sizes, state, weights, masks, mode,
                                                num_layers, bidirectional, batch_first, true);
  return {output, final_state, *reserve};
}

// One step of one layer: a network of length 1 whose output is its final state.
TensorList rnn_cell(const Tensor& input, const TensorList& state, const TensorList& weights, int64_t mode) {
  const char* op = "rnn_cell";
  check(input.dim() == 2, op, ": expected input to be 2D (batch, features), got ", input.dim(), "D tensor instead");
  Problem problem = start_problem(op, input, mode, 1, false);
  check_weights(problem, weights);
  problem.batch = problem.rows = input.size(0);
  problem.steps.push_back({0, 0, problem.rows});
  check_state(problem, state, {problem.batch, problem.hidden});
  TensorList new_state;
  for (size_t i = 0; i < states_of(problem.mode); ++i) {
    new_state.push_back(new_tensor({problem.batch, problem.hidden}, problem.kind.dtype));
  }
  if (problem.rows > 0) {
    with_dtype(problem.kind.dtype,
               [&](auto type) { run_forward<decltype(type)>(problem, new_state[0], new_state, {}); });
  }
  return new_state;
}

// ---- backward ---------------------------------------------------------------------------------------------

struct OutputGradients {
  OptionalTensor output;
  std::vector<OptionalTensor> state;
};

// (batch, length, width) or (length, batch, width), or packed rows -> dense, time-major.
Tensor time_major(const Problem& problem, const Tensor& tensor) {
  return dense(problem.batch_first ? torch::stable::transpose(tensor, 0, 1) : tensor);
}

Tensor check_output_like(const Problem& problem, const Tensor& tensor, const char* name) {
  const char* op = problem.kind.op;
  check_same_kind(tensor, problem.kind, name);
  const int64_t length = static_cast<int64_t>(problem.steps.size());
  if (problem.packed) {
    check_sizes(tensor, {problem.rows, problem.width()}, op, name);
  } else if (problem.batch_first) {
    check_sizes(tensor, {problem.batch, length, problem.width()}, op, name);
  } else {
    check_sizes(tensor, {length, problem.batch, problem.width()}, op, name);
  }
  return time_major(problem, tensor);
}

OutputGradients check_gradients(const Problem& problem, const OptionalTensor& grad_output,
                                const std::vector<OptionalTensor>& grad_state) {
  const char* op = problem.kind.op;
  const size_t states = states_of(problem.mode);
  check(grad_state.size() == states, op, ": expected ", states, " grad_state, got ", grad_state.size());
  OutputGradients gradients;
  if (grad_output) gradients.output = check_output_like(problem, *grad_output, "grad_output");
  for (const OptionalTensor& gradient : grad_state) {
    gradients.state.emplace_back();
    if (!gradient) continue;
    check_same_kind(*gradient, problem.kind, "grad_state");
    check_sizes(*gradient, {problem.count(), problem.batch, problem.hidden}, op, "grad_state");
    check_no_gradients(op, *gradient);
    gradients.state.back() = dense(*gradient);
  }
  return gradients;
}

// What rnn_backward returns; a gradient that is not wanted is empty.
struct InputGradients {
  Tensor input;
  TensorList state, weights;
};

template <class T>
void run_backward(const Problem& problem, const OutputGradients& given, const Tensor& output, const Tensor& reserve,
                  const InputGradients& wanted, bool input_wanted) {
  using C = Compute<T>;
  const RnnBackwardKernels<T>& kernels = rnn_backward_kernels().get<T>();
  Network<T> network(problem, kernels);
  network.output = const_cast<T*>(data<T>(output));
  network.set_reserve(problem, const_cast<T*>(data<T>(reserve)));
  const auto state_or_null = [&](size_t i) {
    return i < wanted.state.size() ? mutable_data<T>(wanted.state[i]) : nullptr;
  };
  const RnnGradients<T> gradients{data_or_null<T>(given.output),
                                  data_or_null<T>(given.state[0]),
                                  given.state.size() > 1 ? data_or_null<T>(given.state[1]) : nullptr,
                                  input_wanted ? mutable_data<T>(wanted.input) : nullptr,
                                  state_or_null(0),
                                  state_or_null(1)};
  const int64_t chunks = chunks_of(problem, 2 * problem.work());
  const std::vector<int64_t> bounds = split_sequences(problem, chunks);
  const int64_t scratch_size = kernels.scratch_size(network, longest_chunk(bounds));
  std::vector<int64_t> sums_at{0};
  for (int64_t i = 0; i < problem.count(); ++i) {
    sums_at.push_back(sums_at.back() + kernels.sums_size(problem.mode, problem.hidden, problem.input_size_of(i)));
  }
  const int64_t sums_size = wanted.weights.empty() ? 0 : sums_at.back();
  Scratch<C> scratch(checked_product(chunks, scratch_size)), sums(checked_product(chunks, sums_size));
  Scratch<C> layer_grads(problem.layers > 1 ? 2 * problem.rows * problem.width() : 0);
  parallel_chunks(chunks, chunks, [&](int64_t chunk, int64_t, int64_t) {
    C* own_sums = sums_size ? sums.get() + chunk * sums_size : nullptr;
    std::fill(own_sums, own_sums + sums_size, C(0));
    kernels.run(network, gradients, layer_grads.get(), own_sums, bounds[chunk], bounds[chunk + 1],
                scratch.get() + chunk * scratch_size);
  });
  for (int64_t i = 0; sums_size && i < problem.count(); ++i) {
    const Tensor* weight = &wanted.weights[i * problem.weights_each];
    const bool has_biases = problem.weights_each == 4;
    kernels.finish(problem.mode, problem.hidden, problem.input_size_of(i), sums.get() + sums_at[i], chunks, sums_size,
                   mutable_data<T>(weight[0]), mutable_data<T>(weight[1]),
                   has_biases ? mutable_data<T>(weight[2]) : nullptr,
                   has_biases ? mutable_data<T>(weight[3]) : nullptr);
  }
}

std::tuple<Tensor, TensorList, TensorList> rnn_backward(
    const OptionalTensor& grad_output, const std::vector<OptionalTensor>& grad_state, const Tensor& input,
    const OptionalTensor& batch_sizes, const TensorList& state, const TensorList& weights, const OptionalTensor& masks,
    const Tensor& output, const Tensor& reserve, int64_t mode, int64_t num_layers, bool bidirectional, bool batch_first,
    bool input_wanted, bool state_wanted, bool weights_wanted) {
  const char* op = "rnn_backward";
  const Problem problem =
      check_problem(op, input, batch_sizes, state, weights, masks, mode, num_layers, bidirectional, batch_first);
  const OutputGradients given = check_gradients(problem, grad_output, grad_state);
  if (grad_output) check_no_gradients(op, *grad_output);
  const Tensor dense_output = check_output_like(problem, output, "output");
  check_same_kind(reserve, problem.kind, "reserve");
  check_sizes(reserve, {problem.reserve_size()}, op, "reserve");

  const ScalarType dtype = problem.kind.dtype;
  InputGradients wanted{new_tensor({0}, dtype), {}, {}};
  if (input_wanted) {
    const Sizes sizes = input.sizes();
    wanted.input = new_tensor(std::vector<int64_t>(sizes.begin(), sizes.end()), dtype);
  }
  for (size_t i = 0; state_wanted && i < problem.state.size(); ++i) {
    wanted.state.push_back(new_tensor(problem.state_sizes(), dtype));
  }
  for (size_t i = 0; weights_wanted && i < problem.weights.size(); ++i) {
    const Sizes sizes = problem.weights[i].sizes();
    wanted.weights.push_back(new_tensor(std::vector<int64_t>(sizes.begin(), sizes.end()), dtype));
  }
  with_dtype(dtype, [&](auto type) {
    run_backward<decltype(type)>(problem, given, dense_output, dense(reserve), wanted, input_wanted);
  });
  return {wanted.input, wanted.state, wanted.weights};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // state: [] for zeros, [h], or for LSTM [h, c]. mode: by its number in fastnn.ops.rnn.MODES. masks: what the
  // outputs of all layers but the last are multiplied with, (layers - 1, rows, directions * hidden).
  m.def(
      "rnn(Tensor input, Tensor? batch_sizes, Tensor[] state, Tensor[] weights, Tensor? masks, int mode,"
      " int num_layers, bool bidirectional, bool batch_first) -> (Tensor output, Tensor[] final_state)");
  // One step of one layer: input (batch, in), state of (batch, hidden).
  m.def("rnn_cell(Tensor input, Tensor[] state, Tensor[] weights, int mode) -> Tensor[]");
  // reserve: what rnn_backward needs besides the output
  m.def(
      "rnn_with_reserve(Tensor input, Tensor? batch_sizes, Tensor[] state, Tensor[] weights, Tensor? masks, int mode,"
      " int num_layers, bool bidirectional, bool batch_first)"
      " -> (Tensor output, Tensor[] final_state, Tensor reserve)");
  // A gradient that is not wanted comes back empty.
  m.def(
      "rnn_backward(Tensor? grad_output, Tensor?[] grad_state, Tensor input, Tensor? batch_sizes, Tensor[] state,"
      " Tensor[] weights, Tensor? masks, Tensor output, Tensor reserve, int mode, int num_layers, bool bidirectional,"
      " bool batch_first, bool input_wanted, bool state_wanted, bool weights_wanted)"
      " -> (Tensor grad_input, Tensor[] grad_state, Tensor[] grad_weights)");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("rnn", TORCH_BOX(&rnn));
  m.impl("rnn_cell", TORCH_BOX(&rnn_cell));
  m.impl("rnn_with_reserve", TORCH_BOX(&rnn_with_reserve));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
}

}  // namespace
}  // namespace fastnn
