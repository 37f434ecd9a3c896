// fastnn::rnn and its backward: checks, allocation, threads.
#include <array>
#include <tuple>

#include "operators.h"
#include "register.h"
#include "rnn_large.h"
#include "stock.h"

namespace fastnn {
namespace {

template <class T>
void run_forward(const RnnProblem& problem, const Tensor& output, const TensorList& state,
                 const OptionalTensor& reserve) {
  const RnnForwardKernels<T>& kernels = rnn_forward_kernels().get<T>();
  RnnCall<T> network(problem);
  network.output = mutable_data<T>(output);
  const bool packs = kernels.worth_packing(problem.rows);
  const bool needs_buffer = !reserve && problem.layers > 1 && problem.directions > 1;
  const ForwardParts<T> parts(network, kernels, problem.work());
  const int64_t packed_size = packs ? network.packed_size(kernels) : 0;
  Scratch<Compute<T>> scratch(checked_sum(packed_size, parts.scratch_size()));
  Scratch<T> buffer(needs_buffer ? checked_product(problem.rows, problem.width()) : 0);
  if (reserve) {
    network.set_reserve(problem, mutable_data<T>(*reserve));
  } else {
    network.hidden_outputs = buffer.get();
  }
  if (packs) network.place(kernels, scratch.get());
  T* h_n = mutable_data<T>(state[0]);
  T* c_n = state.size() > 1 ? mutable_data<T>(state[1]) : nullptr;
  parts.run(packs, h_n, c_n, scratch.get() + packed_size);
}

struct Result {
  Tensor output;
  TensorList final_state;
  OptionalTensor reserve;
};

Result forward(const RnnProblem& problem, bool save) {
  Result result{problem.new_output(), {}, {}};
  for (size_t i = 0; i < entry_of(problem.mode).states; ++i) {
    result.final_state.push_back(new_tensor(problem.state_sizes(i), problem.kind.dtype));
  }
  if (save) result.reserve = new_tensor({problem.reserve_size()}, problem.kind.dtype);
  if (problem.rows > 0) {
    with_dtype(problem.kind.dtype, [&](auto type) {
      run_forward<decltype(type)>(problem, result.output, result.final_state, result.reserve);
    });
  }
  return result;
}

std::tuple<Tensor, TensorList> rnn(const Tensor& input, const OptionalTensor& batch_sizes, const TensorList& state,
                                   const TensorList& weights, const OptionalTensor& masks, int64_t mode,
                                   int64_t num_layers, bool bidirectional, bool batch_first) {
  Result result = forward(
      check_problem("rnn", input, batch_sizes, state, weights, masks, mode, num_layers, bidirectional, batch_first),
      false);
  return {std::move(result.output), std::move(result.final_state)};
}

}  // namespace

std::tuple<Tensor, TensorList, Tensor> rnn_with_reserve(const Tensor& input, const OptionalTensor& batch_sizes,
                                                        const TensorList& state, const TensorList& weights,
                                                        const OptionalTensor& masks, int64_t mode, int64_t num_layers,
                                                        bool bidirectional, bool batch_first) {
  Result result = forward(check_problem("rnn_with_reserve", input, batch_sizes, state, weights, masks, mode, num_layers,
                                        bidirectional, batch_first),
                          true);
  return {std::move(result.output), std::move(result.final_state), std::move(*result.reserve)};
}

namespace {

// A cell's output is its final state, so this operator returns one tensor fewer than `rnn`. It takes no lists, each of
// which would cost 0.3 us.
TensorList rnn_cell(const Tensor& input, int64_t mode, const OptionalTensor& h, const OptionalTensor& c,
                    const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                    const OptionalTensor& bias_hh) {
  const char* op = "rnn_cell";
  check_plain(input, op, "input");
  FASTNN_CHECK(input.dim() == 2, op, ": expected input to be 2D (batch, features)");
  TensorList state, weights;
  state.reserve(2);
  weights.reserve(4);
  weights.push_back(weight_ih.borrow());
  weights.push_back(weight_hh.borrow());
  for (const OptionalTensor* given : {&h, &c}) {
    if (*given) state.push_back((*given)->borrow());
  }
  for (const OptionalTensor* given : {&bias_ih, &bias_hh}) {
    if (*given) weights.push_back((*given)->borrow());
  }
  const RnnProblem problem = check_problem(op, input, {}, state, weights, {}, mode, 1, false, false);
  TensorList new_state;
  for (size_t i = 0; i < entry_of(problem.mode).states; ++i) {
    new_state.push_back(new_tensor(problem.state_sizes(i), problem.kind.dtype));
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
  int64_t output_stride = 0;  // from a row of a step to the next
  int64_t h_from = 0;         // the first direction for which h has a gradient
  std::vector<OptionalTensor> state;
};

// (batch, length, width) or (length, batch, width), or packed rows -> dense, time-major.
Tensor time_major(const RnnProblem& problem, const Tensor& tensor) {
  return problem.batch_first ? dense(Tensor(torch::stable::transpose(tensor.share(), 0, 1))) : dense(tensor);
}

void check_output_like(const RnnProblem& problem, const Tensor& tensor, const char* name) {
  const char* op = problem.kind.op;
  check_same_kind(tensor, problem.kind, name);
  if (problem.packed || problem.cell) {
    check_sizes(tensor, {problem.rows, problem.width()}, op, name);
  } else if (problem.batch_first) {
    check_sizes(tensor, {problem.batch, problem.length, problem.width()}, op, name);
  } else {
    check_sizes(tensor, {problem.length, problem.batch, problem.width()}, op, name);
  }
}

// The gradient itself if its rows are dense, else a copy. Sets each step's place in it.
Tensor place_gradient(RnnProblem& problem, const Tensor& gradient, int64_t* stride) {
  const bool in_place = gradient.dim() == 3 && gradient.stride(2) == 1;
  Tensor result = in_place ? gradient.borrow() : time_major(problem, gradient);
  *stride = in_place ? gradient.stride(problem.batch_first ? 0 : 1) : problem.width();
  const int64_t step = in_place ? gradient.stride(problem.batch_first ? 1 : 0) : 0;
  for (size_t t = 0; t < problem.steps.size(); ++t) {
    problem.steps[t].gradient = in_place ? static_cast<int64_t>(t) * step : problem.steps[t].row * *stride;
  }
  return result;
}

OutputGradients check_gradients(RnnProblem& problem, const OptionalTensor& grad_output,
                                const std::vector<OptionalTensor>& grad_state) {
  const char* op = problem.kind.op;
  const size_t states = entry_of(problem.mode).states;
  FASTNN_CHECK(grad_state.size() == states, op, ": expected ", states, " grad_state, got ", grad_state.size());
  OutputGradients gradients;
  if (grad_output) {
    check_output_like(problem, *grad_output, "grad_output");
    gradients.output = place_gradient(problem, *grad_output, &gradients.output_stride);
  }
  for (size_t i = 0; i < states; ++i) {
    gradients.state.emplace_back();
    if (!grad_state[i]) continue;
    if (i == 0 && !problem.cell && grad_state[i]->defined() && grad_state[i]->dim() == 2) {
      gradients.h_from = problem.count() - 1;
      check_same_kind(*grad_state[i], problem.kind, "grad_state");
      check_sizes(*grad_state[i], {problem.batch, problem.outputs()}, op, "grad_state");
    } else {
      check_one_state(problem, *grad_state[i], i, "grad_state");
    }
    gradients.state.back() = dense(resolved(*grad_state[i], op, "grad_state"));
  }
  return gradients;
}

// What rnn_backward returns; a gradient that is not wanted is empty.
struct InputGradients {
  Tensor input;
  TensorList state, weights;
};

// Makes the weights' gradients of the sums of all chunks.
template <class T>
void finish_weights(const RnnProblem& problem, const RnnNetwork<T>& network, const RnnBackwardKernels<T>& kernels,
                    const InputGradients& wanted, const Compute<T>* sums, const std::vector<int64_t>& sums_at,
                    int64_t chunks) {
  for (int64_t i = 0; i < problem.count(); ++i) {
    const Tensor* weight = &wanted.weights[i * problem.weights_each];
    const auto bias_or_null = [&](int64_t which) {
      return problem.has_biases() ? mutable_data<T>(weight[which]) : nullptr;
    };
    kernels.finish(network, problem.input_size_of(i), sums + sums_at[i], chunks, sums_at.back(),
                   {mutable_data<T>(weight[0]), mutable_data<T>(weight[1]), bias_or_null(2), bias_or_null(3),
                    problem.projected ? mutable_data<T>(weight[problem.weights_each - 1]) : nullptr});
  }
}

template <class T>
void run_backward(const RnnProblem& problem, const OutputGradients& given, const Tensor& output, const Tensor& reserve,
                  const InputGradients& wanted, bool input_wanted) {
  using C = Compute<T>;
  const RnnBackwardKernels<T>& kernels = rnn_backward_kernels().get<T>();
  RnnCall<T> network(problem);
  network.output = const_cast<T*>(data<T>(output));
  network.set_reserve(problem, const_cast<T*>(data<T>(reserve)));
  const auto state_or_null = [&](size_t i) {
    return i < wanted.state.size() ? mutable_data<T>(wanted.state[i]) : nullptr;
  };
  const RnnGradients<T> gradients{data_or_null<T>(given.output),
                                  given.output_stride,
                                  data_or_null<T>(given.state[0]),
                                  given.h_from,
                                  given.state.size() > 1 ? data_or_null<T>(given.state[1]) : nullptr,
                                  input_wanted ? mutable_data<T>(wanted.input) : nullptr,
                                  state_or_null(0),
                                  state_or_null(1)};
  if constexpr (std::is_same_v<T, C>) {
    if (has_large_products(problem)) return backward_by_products(problem, network, gradients, wanted.weights);
  }
  const int64_t members = team_members(network);
  const int64_t chunks = members > 1 ? 1 : rnn_chunks(2 * problem.work(), problem.batch);
  const std::vector<int64_t> bounds = split_sequences(network, chunks);
  const RnnScratchSize scratch_size = kernels.scratch_size(network, longest_chunk(bounds));
  std::vector<int64_t> sums_at{0};
  for (int64_t i = 0; i < problem.count(); ++i) {
    sums_at.push_back(checked_sum(sums_at.back(), kernels.sums_size(network, problem.input_size_of(i))));
  }
  const int64_t sums_size = wanted.weights.empty() ? 0 : sums_at.back();
  const int64_t packed_size = network.packed_size(kernels);
  const int64_t layer_grads_size = problem.layers > 1 ? 2 * problem.rows * problem.width() : 0;
  const int64_t chunk_size = checked_sum(checked_sum(scratch_size.shared, scratch_size.own), sums_size);
  Scratch<C> memory(
      checked_sum(checked_sum(checked_sum(packed_size, layer_grads_size), checked_product(chunks, chunk_size)),
                  checked_product(members - 1, scratch_size.own)));
  C* layer_grads = memory.get() + packed_size;
  C* sums = layer_grads + layer_grads_size;
  C* scratch = sums + chunks * sums_size;
  network.place(kernels, memory.get());
  const auto run = [&](Member& member, int64_t chunk, C* own) {
    C* const shared = scratch + chunk * (scratch_size.shared + scratch_size.own);
    kernels.run(network, gradients, layer_grads, sums_size ? sums + chunk * sums_size : nullptr, bounds[chunk],
                bounds[chunk + 1], member, {shared, own ? own : shared + scratch_size.shared});
  };
  if (members > 1) {
    parallel_steps(network, members, 2 * problem.work(), [&](Member& member) {
      pack_weights(network, kernels, member);
      const Share share = member.share(sums_size);
      std::fill(sums + share.first, sums + share.last, C(0));
      member.end_round();
      run(member, 0, scratch + scratch_size.shared + member.index() * scratch_size.own);
    });
  } else {
    pack_weights(network, kernels, Member());
    parallel_chunks(chunks, chunks, [&](int64_t chunk, int64_t, int64_t) {
      std::fill(sums + chunk * sums_size, sums + (chunk + 1) * sums_size, C(0));
      Member itself;
      run(itself, chunk, nullptr);
    });
  }
  if (sums_size) finish_weights(problem, network, kernels, wanted, sums, sums_at, chunks);
}

}  // namespace

std::tuple<Tensor, TensorList, TensorList> rnn_backward(
    const OptionalTensor& grad_output, const std::vector<OptionalTensor>& grad_state, const Tensor& input,
    const OptionalTensor& batch_sizes, const TensorList& state, const TensorList& weights, const OptionalTensor& masks,
    const Tensor& output, const Tensor& reserve, int64_t mode, int64_t num_layers, bool bidirectional, bool batch_first,
    bool input_wanted, bool state_wanted, bool weights_wanted) {
  const char* op = "rnn_backward";
  const TensorsInKeptMemory kept;
  RnnProblem problem =
      check_problem(op, input, batch_sizes, state, weights, masks, mode, num_layers, bidirectional, batch_first);
  const OutputGradients given = check_gradients(problem, grad_output, grad_state);
  check_output_like(problem, output, "output");
  const Tensor dense_output = time_major(problem, output);
  check_same_kind(reserve, problem.kind, "reserve");
  check_sizes(reserve, {problem.reserve_size()}, op, "reserve");

  const ScalarType dtype = problem.kind.dtype;
  InputGradients wanted{new_tensor({0}, dtype), {}, {}};
  if (input_wanted) {
    const Sizes sizes = input.sizes();
    wanted.input = new_tensor(std::vector<int64_t>(sizes.begin(), sizes.end()), dtype);
  }
  for (size_t i = 0; state_wanted && i < problem.state.size(); ++i) {
    wanted.state.push_back(new_tensor(problem.state_sizes(i), dtype));
  }
  for (size_t i = 0; weights_wanted && i < problem.weights.size(); ++i) {
    const Sizes sizes = problem.weights[i].sizes();
    wanted.weights.push_back(new_tensor(std::vector<int64_t>(sizes.begin(), sizes.end()), dtype));
  }
  with_dtype(dtype, [&](auto type) {
    run_backward<decltype(type)>(problem, given, dense_output, dense(reserve), wanted, input_wanted);
  });
  return {std::move(wanted.input), std::move(wanted.state), std::move(wanted.weights)};
}

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // state: [] for zeros, [h], or for LSTM [h, c]. mode: by its number in fastnn.ops.rnn.MODES. masks: what the
  // outputs of all layers but the last are multiplied with, (layers - 1, rows, directions * hidden).
  // With a projection (an odd number of weights a direction) h has as many elements as the projection has rows.
  // An input of two dimensions without batch_sizes is one step of a cell, whose state is (batch, hidden).
  m.def(
      "rnn(Tensor input, Tensor? batch_sizes, Tensor[] state, Tensor[] weights, Tensor? masks, int mode,"
      " int num_layers, bool bidirectional, bool batch_first) -> (Tensor output, Tensor[] final_state)");
  // One step of one layer: input (batch, in), h and c (batch, hidden) -> [h] or [h, c].
  m.def(
      "rnn_cell(Tensor input, int mode, Tensor? h, Tensor? c, Tensor weight_ih, Tensor weight_hh,"
      " Tensor? bias_ih=None, Tensor? bias_hh=None) -> Tensor[]");
  // reserve: what rnn_backward needs besides the output
  m.def(
      "rnn_with_reserve(Tensor input, Tensor? batch_sizes, Tensor[] state, Tensor[] weights, Tensor? masks, int mode,"
      " int num_layers, bool bidirectional, bool batch_first)"
      " -> (Tensor output, Tensor[] final_state, Tensor reserve)");
  // A gradient that is not wanted comes back empty. On the CPU the gradient of h may be given for the last direction of
  // the last layer alone, (batch, hidden).
  m.def(
      "rnn_backward(Tensor? grad_output, Tensor?[] grad_state, Tensor input, Tensor? batch_sizes, Tensor[] state,"
      " Tensor[] weights, Tensor? masks, Tensor output, Tensor reserve, int mode, int num_layers, bool bidirectional,"
      " bool batch_first, bool input_wanted, bool state_wanted, bool weights_wanted)"
      " -> (Tensor grad_input, Tensor[] grad_state, Tensor[] grad_weights)");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("rnn", FASTNN_BOX(rnn));
  m.impl("rnn_cell", FASTNN_BOX(rnn_cell));
  m.impl("rnn_with_reserve", FASTNN_BOX(rnn_with_reserve));
  m.impl("rnn_backward", FASTNN_BOX(rnn_backward));
}

}  // namespace
}  // namespace fastnn
