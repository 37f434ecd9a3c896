// fastnn::mlp and its backward: checks, allocation, threads.
#include "mlp_by_layers.h"
#include "operators.h"
#include "register.h"

namespace fastnn {
namespace {

template <class Body>
auto with_kernel_dtype(ScalarType dtype, const Body& body) {
  return dtype == ScalarType::Double ? body(double{}) : body(float{});
}

// The panels of those layers whose weights are worth packing, one layer's after the other.
template <class T>
class Panels {
 public:
  Panels(const MlpKernels<T>& kernels, const Chain& chain, bool in_lanes) : kernels_(kernels) {
    for (int64_t i = 0; i < chain.layers(); ++i) {
      const int64_t in = chain.widths[i], out = chain.widths[i + 1];
      const bool packs = !in_lanes && kernels.worth_packing(chain.rows, in, out);
      sizes_.push_back(packs ? kernels.packed_size(out, in) : 0);
      size_ = checked_sum(size_, sizes_.back());
    }
  }
  int64_t size() const { return size_; }
  // Panels in another core's cache are slower to fetch than to make, so each thread packs for itself what fits into
  // its own. What doesn't is packed once.
  bool shared(int64_t chunks) const { return chunks > 1 && size_ > (1 << 20) / static_cast<int64_t>(sizeof(T)); }

  // Has the layers read their panels at `memory`.
  void place(T* memory, PerLayer<MlpLayer<T>>& layers) const {
    for (int64_t i = 0; i < layers.size(); ++i) {
      if (sizes_[i] > 0) layers[i].packed = memory;
      memory += sizes_[i];
    }
  }
  // One of `parts` parts of each.
  void pack(const PerLayer<MlpLayer<T>>& layers, T* memory, int64_t part, int64_t parts) const {
    for (int64_t i = 0; i < layers.size(); ++i) {
      if (sizes_[i] > 0) kernels_.pack(layers[i].weight, layers[i].out, layers[i].in, part, parts, memory);
      memory += sizes_[i];
    }
  }

 private:
  const MlpKernels<T>& kernels_;
  PerLayer<int64_t> sizes_;
  int64_t size_ = 0;
};

// Bytes of a weight that a member of a team reads in a round: a microsecond, some times what it waits for the others.
constexpr int64_t kBytesEach = 64 << 10;

// How many threads share out the weights of a chain of few rows, each of which is gone through so many times. With up
// to some 6 rows, reading a weight takes as long as 12 operations; a second thread pays from some 10 microseconds on.
inline int64_t team_size(const Chain& chain, double times) {
  const double parts = chain.weights() * sizeof(float) / static_cast<double>(kBytesEach * chain.layers());
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(Team::kMost, static_cast<int64_t>(parts)));
  return std::min(most, useful_threads(times * std::max(chain.work, 12 * chain.weights()) / 5));
}

inline bool all_empty(const std::vector<Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return !t.defined() || t.numel() == 0; });
}

// Into `output` (rows, out), or, for its reconstruction error, into `errors` (rows); the other is null.
template <class T>
void run_forward(const Forward& call, T* output, T* errors, const std::vector<Tensor>& saved) {
  const MlpKernels<T>& kernels = mlp_kernels().get<T>();
  const Chain& chain = call.chain;
  // Rows of no features may be any number, for they take no memory.
  if (!errors && chain.widths.back() == 0 && all_empty(saved)) return;
  const MlpPlan plan = kernels.make_plan(chain.widths.data(), chain.layers(), chain.rows);
  const int64_t units = (chain.rows + plan.unit - 1) / plan.unit;
  const int64_t chunks = plan.together ? 1 : std::min(useful_threads(chain.work), units);
  const Panels<T> panels(kernels, chain, plan.in_lanes);
  const bool shared = panels.shared(chunks);
  const int64_t block_size = kernels.scratch_size(chain.widest());
  const int64_t chunk_size = checked_sum(block_size, shared ? 0 : panels.size());
  Scratch<T> scratch(checked_sum(checked_product(chunks, chunk_size), shared ? panels.size() : 0));

  KernelInputs inputs(chain.kind.dtype);
  const T* input = inputs.data<T>(call.input);
  PerLayer<MlpLayer<T>> layers;
  for (int64_t i = 0; i < chain.layers(); ++i) {
    const T* weight = inputs.data<T>(call.weight(i));
    const T* bias = call.has_biases() ? inputs.data<T>(call.bias(i)) : nullptr;
    layers.push_back({weight, bias, chain.widths[i], chain.widths[i + 1], call.activations[i], nullptr,
                      saved.empty() || !saved[i].defined() ? nullptr : mutable_data<T>(saved[i])});
  }
  if (plan.together) {
    const int64_t members = team_size(chain, 1);
    return parallel_team(members, chain.work, 1, [&](Member& member) {
      kernels.forward_together(layers.data(), layers.size(), input, output, errors, chain.rows, members * kBytesEach,
                               scratch.get(), member);
    });
  }
  if (shared) {
    T* const memory = scratch.get() + chunks * chunk_size;
    panels.place(memory, layers);
    parallel_chunks(chunks, chunks,
                    [&](int64_t chunk, int64_t, int64_t) { panels.pack(layers, memory, chunk, chunks); });
  }
  parallel_chunks(chunks, units, [&](int64_t chunk, int64_t first, int64_t last) {
    T* const block = scratch.get() + chunk * chunk_size;
    PerLayer<MlpLayer<T>> own = layers;
    if (!shared) {
      panels.place(block + block_size, own);
      panels.pack(own, block + block_size, 0, 1);
    }
    kernels.forward(own.data(), own.size(), plan.in_lanes, input, output, errors, first * plan.unit,
                    std::min(last * plan.unit, chain.rows), block);
  });
}

Tensor mlp(const Tensor& input, const std::vector<Tensor>& parameters, int64_t activations) {
  const Forward call("mlp", input, parameters, activations);
  if (goes_by_layers(call.chain, false)) return std::get<0>(forward_by_layers(call, false));
  const ScalarType dtype = call.chain.kind.dtype;
  Tensor output = new_tensor({call.chain.rows, call.chain.widths.back()}, widened(dtype));
  with_kernel_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    run_forward<T>(call, mutable_data<T>(output), nullptr, {});
  });
  return narrowed(std::move(output), dtype);
}

Tensor mlp_reconstruction_error(const Tensor& input, const std::vector<Tensor>& parameters, int64_t activations) {
  const Forward call("mlp_reconstruction_error", input, parameters, activations);
  const auto& widths = call.chain.widths;
  FASTNN_CHECK(widths.back() == widths[0], call.chain.kind.op,
               ": expected as many outputs of the last layer as features of ", "the input, ", widths[0], ", got ",
               widths.back());
  if (goes_by_layers(call.chain, false)) return errors_by_layers(call);
  const ScalarType dtype = call.chain.kind.dtype;
  Tensor errors = new_tensor({call.chain.rows}, widened(dtype));
  with_kernel_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    run_forward<T>(call, nullptr, mutable_data<T>(errors), {});
  });
  return narrowed(std::move(errors), dtype);
}

std::vector<Tensor> all_narrowed(std::vector<Tensor> tensors, ScalarType dtype) {
  for (Tensor& tensor : tensors) tensor = narrowed(std::move(tensor), dtype);
  return tensors;
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> mlp_with_hidden(const Tensor& input, const std::vector<Tensor>& parameters,
                                                        int64_t activations) {
  const Forward call("mlp_with_hidden", input, parameters, activations);
  if (goes_by_layers(call.chain, false)) return forward_by_layers(call, true);
  const Chain& chain = call.chain;
  const ScalarType dtype = chain.kind.dtype;
  Tensor output = new_tensor({chain.rows, chain.widths.back()}, widened(dtype));
  std::vector<Tensor> saved, hidden;
  for (int64_t i = 0; i < chain.layers(); ++i) {
    if (output_serves(chain, i, call.activations[i])) {
      saved.emplace_back();
    } else {
      hidden.push_back(new_tensor({chain.rows, chain.widths[i + 1]}, widened(dtype)));
      saved.push_back(hidden.back().borrow());
    }
  }
  with_kernel_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    run_forward<T>(call, mutable_data<T>(output), nullptr, saved);
  });
  return {narrowed(std::move(output), dtype), all_narrowed(std::move(hidden), dtype)};
}

namespace {

// ---- backward ---------------------------------------------------------------------------------------------

// The saved tensors, one a layer, with `output` standing in where it serves.
std::vector<Tensor> check_saved(const Chain& chain, const Activations& activations, const Tensor& output,
                                const std::vector<Tensor>& hidden) {
  const char* op = chain.kind.op;
  check_plain(output, op, "output");  // even where it does not serve
  std::vector<Tensor> saved;
  size_t next = 0;
  for (int64_t i = 0; i < chain.layers(); ++i) {
    const bool serves = output_serves(chain, i, activations[i]);
    FASTNN_CHECK(serves || next < hidden.size(), op, ": expected more hidden tensors than ", hidden.size());
    const Tensor& tensor = serves ? output : hidden[next++];
    check_same_kind(tensor, chain.kind, serves ? "output" : "hidden");
    check_sizes(tensor, {chain.rows, chain.widths[i + 1]}, op, serves ? "output" : "hidden");
    saved.push_back(tensor.borrow());
  }
  FASTNN_CHECK(next == hidden.size(), op, ": expected ", next, " hidden tensors, got ", hidden.size());
  return saved;
}

// The gradient of one parameter: the chunks' parts of it, summed in their order. The first chunk writes its part
// into the result itself.
template <class T>
class ParameterGradient {
 public:
  ParameterGradient(const Sizes& sizes, ScalarType dtype, int64_t chunks)
      : result_(new_tensor(sizes, dtype)), count_(result_.numel()), chunks_(chunks) {}

  int64_t scratch_size() const { return checked_product(chunks_ - 1, count_); }
  void use_scratch(T* scratch) { scratch_ = scratch; }
  T* part(int64_t chunk) const { return chunk == 0 ? mutable_data<T>(result_) : scratch_ + (chunk - 1) * count_; }
  // Adds up one of `pieces` pieces of it.
  void sum(int64_t piece, int64_t pieces) const {
    T* to = part(0);
    const int64_t first = count_ * piece / pieces, last = count_ * (piece + 1) / pieces;
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      const T* from = part(chunk);
      for (int64_t i = first; i < last; ++i) to[i] += from[i];
    }
  }
  // Where there is no output at all.
  void set_to_zero() const { std::fill_n(part(0), count_, T(0)); }
  Tensor release() && { return std::move(result_); }

 private:
  Tensor result_;
  int64_t count_;
  int64_t chunks_;
  T* scratch_ = nullptr;
};

// The layers of one chunk, with that chunk's parts of the gradients still to be filled in.
template <class T>
PerLayer<MlpLayerBackward<T>> backward_layers(const Chain& chain, const Tensor& input,
                                              const std::vector<Tensor>& weights, const Activations& activations,
                                              const std::vector<Tensor>& saved, KernelInputs& inputs) {
  PerLayer<MlpLayerBackward<T>> layers;
  const T* layer_input = inputs.data<T>(input);
  for (int64_t i = 0; i < chain.layers(); ++i) {
    const Activation activation = activations[i];
    const T* kept = inputs.data<T>(saved[i]);
    layers.push_back({inputs.data<T>(weights[i]), layer_input, kept, chain.widths[i], chain.widths[i + 1], activation,
                      nullptr, nullptr, nullptr});
    layer_input = keeps_input(activation) ? nullptr : kept;
  }
  return layers;
}

template <class T>
Gradients run_backward(const Chain& chain, const Tensor& grad_output, const PerLayer<MlpLayerBackward<T>>& layers,
                       KernelInputs& inputs, Wanted wanted) {
  const MlpKernels<T>& kernels = mlp_kernels().get<T>();
  const ScalarType dtype = widened(chain.kind.dtype);
  const int64_t rows = chain.widths.back() > 0 ? chain.rows : 0;  // that have a gradient
  const bool together = rows > 0 && rows <= kernels.few_rows;
  const int64_t chunks = together ? 1 : std::max<int64_t>(1, std::min(useful_threads(2 * chain.work), rows));
  const int64_t block_size = kernels.backward_scratch_size(chain.widest());
  const int64_t chunk_size = checked_sum(block_size, chain.outputs());
  std::vector<ParameterGradient<T>> grad_weights, grad_biases;
  int64_t scratch_size = checked_product(chunks, chunk_size);
  for (int64_t i = 0; i < chain.layers(); ++i) {
    if (wanted.weights) grad_weights.emplace_back(Sizes{chain.widths[i + 1], chain.widths[i]}, dtype, chunks);
    if (wanted.biases) grad_biases.emplace_back(Sizes{chain.widths[i + 1]}, dtype, chunks);
  }
  for (auto* gradients : {&grad_weights, &grad_biases}) {
    for (const auto& gradient : *gradients) scratch_size = checked_sum(scratch_size, gradient.scratch_size());
  }
  Scratch<T> scratch(scratch_size);
  T* next = scratch.get() + chunks * chunk_size;
  for (auto* gradients : {&grad_weights, &grad_biases}) {
    for (auto& gradient : *gradients) {
      gradient.use_scratch(next);
      next += gradient.scratch_size();
    }
  }
  Tensor grad_input = new_tensor({wanted.input ? chain.rows : 0, chain.widths[0]}, dtype);
  const T* grad_output_data = inputs.data<T>(grad_output);
  T* grad_input_data = wanted.input ? mutable_data<T>(grad_input) : nullptr;
  if (rows == 0 && wanted.input) std::fill_n(grad_input_data, grad_input.numel(), T(0));
  const auto run_chunk = [&](int64_t chunk, int64_t first, int64_t last, Member& member) {
    PerLayer<MlpLayerBackward<T>> own = layers;
    T* const block = scratch.get() + chunk * chunk_size;
    T* lost = block + block_size;
    for (int64_t i = 0; i < own.size(); ++i) {
      own[i].lost = lost;
      lost += own[i].out;
      if (wanted.weights) own[i].grad_weight = grad_weights[i].part(chunk);
      if (wanted.biases) own[i].grad_bias = grad_biases[i].part(chunk);
    }
    kernels.backward(own.data(), chain.layers(), grad_output_data, grad_input_data, first, last, block, member);
  };
  if (together) {
    parallel_team(team_size(chain, 3), 3 * chain.work, 1, [&](Member& member) { run_chunk(0, 0, rows, member); });
  } else {
    parallel_chunks(rows > 0 ? chunks : 0, rows, [&](int64_t chunk, int64_t first, int64_t last) {
      Member alone;
      run_chunk(chunk, first, last, alone);
    });
  }
  // The threads' parts are added up by as many threads, if that is worth waking them.
  const int64_t pieces = chunks == 1 ? 0 : std::min(chunks, useful_threads(4 * chain.weights()));
  parallel_chunks(rows > 0 ? pieces : 0, pieces, [&](int64_t piece, int64_t, int64_t) {
    for (auto* gradients : {&grad_weights, &grad_biases}) {
      for (const auto& gradient : *gradients) gradient.sum(piece, pieces);
    }
  });
  const auto finished = [&](std::vector<ParameterGradient<T>>& gradients) {
    std::vector<Tensor> result;
    result.reserve(gradients.size());
    for (auto& gradient : gradients) {
      if (rows == 0) gradient.set_to_zero();
      result.push_back(narrowed(std::move(gradient).release(), chain.kind.dtype));
    }
    return result;
  };
  return {narrowed(std::move(grad_input), chain.kind.dtype), finished(grad_weights), finished(grad_biases)};
}

}  // namespace

Gradients mlp_backward(const Tensor& grad_output, const Tensor& input, const std::vector<Tensor>& weights,
                       int64_t activation_code, const Tensor& output, const std::vector<Tensor>& hidden,
                       bool input_wanted, bool weights_wanted, bool biases_wanted) {
  const char* op = "mlp_backward";
  const Activations activations(op, activation_code);
  const Chain chain = check_chain(op, input, weights, activations);
  FASTNN_CHECK(weights.size() == activations.size(), op, ": expected ", activations.size(), " weights, got ",
               weights.size());
  check_same_kind(grad_output, chain.kind, "grad_output");
  check_sizes(grad_output, {chain.rows, chain.widths.back()}, op, "grad_output");
  const std::vector<Tensor> saved = check_saved(chain, activations, output, hidden);
  const Wanted wanted{input_wanted, weights_wanted, biases_wanted};
  if (goes_by_layers(chain, true)) {
    return with_dtype(chain.kind.dtype, [&](auto type) {
      return backward_by_layers<decltype(type)>(chain, grad_output, input, weights, activations, saved, wanted);
    });
  }
  return with_kernel_dtype(chain.kind.dtype, [&](auto type) {
    using T = decltype(type);
    KernelInputs inputs(chain.kind.dtype);
    return run_backward<T>(chain, grad_output, backward_layers<T>(chain, input, weights, activations, saved, inputs),
                           inputs, wanted);
  });
}

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // parameters: the weights (out, in), then the biases (out), or no biases at all.
  // activations: an octal digit a layer, its place in fastnn.ops.mlp.ACTIVATION_NAMES, after a leading 1
  m.def("mlp(Tensor input, Tensor[] parameters, int activations) -> Tensor");
  // One a row: the mean squared difference between the output and the input.
  m.def(
      "mlp_reconstruction_error(Tensor input, Tensor[] parameters, int activations)"
      " -> Tensor");
  // hidden: what mlp_backward needs of each layer
  m.def(
      "mlp_with_hidden(Tensor input, Tensor[] parameters, int activations)"
      " -> (Tensor output, Tensor[] hidden)");
  // A gradient that is not wanted comes back empty.
  m.def(
      "mlp_backward(Tensor grad_output, Tensor input, Tensor[] weights, int activations, Tensor output,"
      " Tensor[] hidden, bool input_wanted, bool weights_wanted, bool biases_wanted)"
      " -> (Tensor grad_input, Tensor[] grad_weights, Tensor[] grad_biases)");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("mlp", FASTNN_BOX(mlp));
  m.impl("mlp_reconstruction_error", FASTNN_BOX(mlp_reconstruction_error));
  m.impl("mlp_with_hidden", FASTNN_BOX(mlp_with_hidden));
  m.impl("mlp_backward", FASTNN_BOX(mlp_backward));
}

}  // namespace
}  // namespace fastnn
