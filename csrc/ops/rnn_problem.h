// What forward and backward of fastnn::rnn share: the checked arguments, and the call in the form that the kernels
// take.
#pragma once

#include "../kernels/rnn.h"
#include "tensor.h"

namespace fastnn {

using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;

// The arguments that forward and backward share, checked and dense.
struct RnnProblem {
  Expected kind;
  RnnMode mode = RnnMode::tanh;
  int64_t layers = 1, directions = 1, input_size = 0, hidden = 0, batch = 0, rows = 0;
  int64_t projected = 0;  // LSTM's proj_size, or 0
  int64_t length = 1;     // steps, of which none are listed below where there are no rows
  bool batch_first = false;
  bool packed = false;       // rows of steps of different sizes, in two dimensions
  bool cell = false;         // one step of one layer: no dimension for time, none for layers
  int64_t weights_each = 0;  // 2, or 4 with biases, and one more with a projection
  std::vector<RnnStep> steps{};
  Tensor input{};
  TensorList state{}, weights{};
  OptionalTensor masks{};

  int64_t outputs() const { return projected ? projected : hidden; }
  int64_t width() const { return directions * outputs(); }
  bool has_biases() const { return weights_each >= 4; }
  int64_t count() const { return layers * directions; }
  int64_t input_size_of(int64_t index) const { return index < directions ? input_size : width(); }
  // The sizes of h (0) or c (1).
  std::vector<int64_t> state_sizes(size_t which) const {
    const int64_t units = which == 0 ? outputs() : hidden;
    return cell ? std::vector<int64_t>{batch, units} : std::vector<int64_t>{count(), batch, units};
  }
  // The output's sizes, and its strides: time-major in memory, whatever the order of the dimensions.
  Tensor new_output() const {
    if (packed || cell) return new_tensor({rows, width()}, kind.dtype);
    const int64_t step = checked_product(std::max<int64_t>(batch, 1), width());
    const int64_t strides[] = {batch_first ? width() : step, batch_first ? step : width(), 1};
    return new_strided_tensor(
        batch_first ? std::vector<int64_t>{batch, length, width()} : std::vector<int64_t>{length, batch, width()},
        strides, kind.dtype);
  }
  // What backward needs besides the output, in one tensor: the other layers' outputs, then what the cells keep.
  int64_t hidden_outputs_size() const { return checked_product(layers - 1, checked_product(rows, width())); }
  int64_t saved_size() const { return checked_product(count() * entry_of(mode).saved, checked_product(rows, hidden)); }
  int64_t reserve_size() const { return checked_sum(hidden_outputs_size(), saved_size()); }
  double work() const {  // floating-point operations of one forward
    double total = 0;
    for (int64_t i = 0; i < count(); ++i) {
      total += 2.0 * rows * hidden * (entry_of(mode).gates * (input_size_of(i) + outputs()) + projected);
    }
    return total;
  }
};

inline void check_weights(RnnProblem& problem, const TensorList& weights) {
  const char* op = problem.kind.op;
  const int64_t given = static_cast<int64_t>(weights.size());
  const int64_t layers = problem.layers, count = layers > 0 && layers <= given ? problem.count() : 0;
  const int64_t each = count > 0 && given % count == 0 ? given / count : 0;
  const bool projects = each % 2 == 1;
  FASTNN_CHECK(each >= 2 && each <= 5 && (!projects || problem.mode == RnnMode::lstm), op,
               ": expected 2 weights, or 4 with biases, and for LSTM one more with a projection, for each of ", layers,
               " layers and ", problem.directions, " directions, got ", given);
  problem.weights_each = each;
  check_same_kind(weights[1], problem.kind, "weights");
  FASTNN_CHECK(weights[1].dim() == 2 && weights[1].size(1) > 0, op,
               ": expected weights[1] of size (gates * hidden, outputs)");
  problem.hidden = weights[1].size(1);
  if (projects) {
    problem.projected = problem.hidden;
    check_same_kind(weights[each - 1], problem.kind, "weights");
    FASTNN_CHECK(weights[each - 1].dim() == 2 && weights[each - 1].size(1) > problem.projected, op,
                 ": expected a projection of size (outputs, hidden), with fewer outputs than hidden units");
    problem.hidden = weights[each - 1].size(1);
  }
  const int64_t gates = checked_product(entry_of(problem.mode).gates, problem.hidden);
  problem.weights.reserve(given);
  for (int64_t i = 0; i < given; ++i) {
    const Tensor& weight = weights[i];
    check_same_kind(weight, problem.kind, "weights");
    const int64_t which = i % each;
    if (which < 2) {
      const int64_t columns = which ? problem.outputs() : problem.input_size_of(i / each);
      check_sizes(weight, {gates, columns}, op, "weights");
    } else if (projects && which == each - 1) {
      check_sizes(weight, {problem.projected, problem.hidden}, op, "weights");
    } else {
      check_sizes(weight, {gates}, op, "weights");
    }
    problem.weights.push_back(dense(weight));
  }
}

inline void set_packed_steps(RnnProblem& problem, const Tensor& batch_sizes) {
  const char* op = problem.kind.op;
  FASTNN_CHECK(batch_sizes.defined() && batch_sizes.is_cpu() && batch_sizes.scalar_type() == ScalarType::Long, op,
               ": batch_sizes should be a 1D CPU int64 tensor");
  FASTNN_CHECK(batch_sizes.dim() == 1 && batch_sizes.size(0) > 0, op, ": batch_sizes should be 1D and not empty");
  check_memory(batch_sizes, op, "batch_sizes");
  const Tensor sizes = dense(batch_sizes);
  const int64_t* size = data<int64_t>(sizes);
  problem.length = sizes.size(0);
  problem.steps.reserve(problem.length);
  problem.batch = size[0];
  problem.rows = problem.input.size(0);
  int64_t row = 0;
  for (int64_t t = 0; t < problem.length; ++t) {
    FASTNN_CHECK(size[t] > 0 && size[t] <= (t ? size[t - 1] : problem.rows), op,
                 ": batch_sizes should be positive and in decreasing order, got ", size[t], " at ", t);
    FASTNN_CHECK(size[t] <= problem.rows - row, op, ": batch_sizes sum to more than the ", problem.rows,
                 " rows of input");
    problem.steps.push_back({row * problem.input_size, row, size[t]});
    row += size[t];
  }
  FASTNN_CHECK(row == problem.rows, op, ": batch_sizes sum to ", row, ", but input has ", problem.rows, " rows");
}

inline void set_steps(RnnProblem& problem) {
  const bool batch_first = problem.batch_first;
  const int64_t length = problem.length = problem.input.size(batch_first ? 1 : 0);
  problem.batch = problem.input.size(batch_first ? 0 : 1);
  FASTNN_CHECK(length > 0, "Expected sequence length to be larger than 0 in RNN");
  problem.rows = checked_product(length, problem.batch);
  if (problem.rows == 0) return;  // there may be any number of steps without rows
  problem.steps.reserve(length);
  const int64_t step = batch_first ? problem.input_size : checked_product(problem.batch, problem.input_size);
  checked_product(length, step);
  for (int64_t t = 0; t < length; ++t) problem.steps.push_back({t * step, t * problem.batch, problem.batch});
}

// Checks h (0) or c (1), or a gradient of one of them.
inline void check_one_state(const RnnProblem& problem, const Tensor& tensor, size_t which, const char* name) {
  check_same_kind(tensor, problem.kind, name);
  const int64_t units = which == 0 ? problem.outputs() : problem.hidden;
  if (problem.cell) {
    check_sizes(tensor, {problem.batch, units}, problem.kind.op, name);
  } else {
    check_sizes(tensor, {problem.count(), problem.batch, units}, problem.kind.op, name);
  }
}

inline void check_state(RnnProblem& problem, const TensorList& state) {
  const char* op = problem.kind.op;
  FASTNN_CHECK(state.empty() || state.size() == entry_of(problem.mode).states, op, ": expected no state or ",
               entry_of(problem.mode).states, " tensors, got ", state.size());
  for (size_t i = 0; i < state.size(); ++i) {
    check_one_state(problem, state[i], i, "state");
    problem.state.push_back(dense(state[i]));
  }
}

// Checks the arguments. An input of two dimensions without batch sizes belongs to a cell.
inline RnnProblem check_problem(const char* op, const Tensor& input, const OptionalTensor& batch_sizes,
                                const TensorList& state, const TensorList& weights, const OptionalTensor& masks,
                                int64_t mode, int64_t layers, bool bidirectional, bool batch_first) {
  FASTNN_CHECK(mode >= 0 && mode < static_cast<int64_t>(RnnMode::count), op, ": mode must be between 0 and ",
               static_cast<int64_t>(RnnMode::count) - 1, ", got ", mode);
  RnnProblem problem{check_first(input, op, "input")};
  const int64_t dims = input.dim();
  problem.mode = static_cast<RnnMode>(mode);
  problem.layers = layers;
  problem.directions = bidirectional ? 2 : 1;
  problem.batch_first = batch_first;
  problem.packed = batch_sizes.has_value();
  problem.cell = dims == 2 && !problem.packed;
  FASTNN_CHECK(dims == 2 || (dims == 3 && !problem.packed), op,
               ": expected input to be 3D, or 2D with batch_sizes, got ", dims, "D tensor instead");
  FASTNN_CHECK(dims == 3 || !batch_first, op, ": batch_first needs a 3D input");
  FASTNN_CHECK(!problem.cell || (layers == 1 && !bidirectional), op, ": a 2D input is one step of one layer");
  problem.input = dense(input);
  problem.input_size = input.size(dims - 1);
  check_weights(problem, weights);
  if (problem.packed) {
    set_packed_steps(problem, *batch_sizes);
  } else if (problem.cell) {
    problem.batch = problem.rows = input.size(0);
    problem.steps.push_back({0, 0, problem.rows});
  } else {
    set_steps(problem);
  }
  check_product(op, problem.count(), problem.rows, entry_of(problem.mode).gates * problem.hidden,
                problem.input_size + problem.width() + problem.hidden);
  check_state(problem, state);
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

// A call in the form that the kernels take: a network over the memory of the problem's tensors.
template <class T>
struct RnnCall : RnnNetwork<T> {
  std::vector<RnnWeights<T>> directions_;

  explicit RnnCall(const RnnProblem& problem) : RnnNetwork<T>{} {
    directions_.reserve(problem.count());
    for (int64_t i = 0; i < problem.count(); ++i) {
      const Tensor* weight = &problem.weights[i * problem.weights_each];
      const bool has_biases = problem.has_biases();
      directions_.push_back({data<T>(weight[0]), data<T>(weight[1]), has_biases ? data<T>(weight[2]) : nullptr,
                             has_biases ? data<T>(weight[3]) : nullptr,
                             problem.projected ? data<T>(weight[problem.weights_each - 1]) : nullptr,
                             problem.input_size_of(i), nullptr});
    }
    this->mode = problem.mode;
    this->layers = problem.layers;
    this->directions = problem.directions;
    this->hidden = problem.hidden;
    this->projected = problem.projected;
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
  }

  void set_reserve(const RnnProblem& problem, T* reserve) {
    this->hidden_outputs = reserve;
    this->keeps_hidden_outputs = true;
    this->saved = reserve + problem.hidden_outputs_size();
  }

  template <class Kernels>
  int64_t packed_size(const Kernels& kernels) const {
    int64_t size = 0;
    for (const RnnWeights<T>& weights : directions_) {
      size = checked_sum(size, kernels.packed_size(*this, weights.input_size));
    }
    return size;
  }

  // Makes the kernels read packed weights from `packed`.
  template <class Kernels>
  void place(const Kernels& kernels, Compute<T>* packed) {
    for (RnnWeights<T>& weights : directions_) {
      weights.packed = packed;
      packed += kernels.packed_size(*this, weights.input_size);
    }
  }
};

}  // namespace fastnn
