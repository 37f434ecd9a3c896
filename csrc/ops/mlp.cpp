// fastnn::mlp and its backward: checks, allocation, threads.
#include "mlp_by_layers.h"
#include "mlp_run.h"
#include "register.h"

namespace fastnn {
namespace {

Tensor mlp(const Tensor& input, const std::vector<Tensor>& parameters, const std::string& activations) {
  const MlpCall call("mlp", input, parameters, activations);
  if (goes_by_layers(call.chain, false)) return std::get<0>(forward_by_layers(call, false));
  const ScalarType dtype = call.chain.kind.dtype;
  Tensor output = new_tensor({call.chain.rows, call.chain.widths.back()}, widened(dtype));
  with_kernel_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    run_forward<T>(call, mutable_data<T>(output), {});
  });
  return narrowed(std::move(output), dtype);
}

std::vector<Tensor> all_narrowed(std::vector<Tensor> tensors, ScalarType dtype) {
  for (Tensor& tensor : tensors) tensor = narrowed(std::move(tensor), dtype);
  return tensors;
}

std::tuple<Tensor, std::vector<Tensor>> mlp_with_hidden(const Tensor& input, const std::vector<Tensor>& parameters,
                                                        const std::string& activations) {
  const MlpCall call("mlp_with_hidden", input, parameters, activations);
  if (goes_by_layers(call.chain, false)) return forward_by_layers(call, true);
  const Chain& chain = call.chain;
  const ScalarType dtype = chain.kind.dtype;
  Tensor output = new_tensor({chain.rows, chain.widths.back()}, widened(dtype));
  std::vector<Tensor> hidden;
  with_kernel_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    PerLayer<T*> saved;
    for (int64_t i = 0; i < chain.layers(); ++i) {
      const bool serves = output_serves(chain, i, call.activations[i]);
      if (!serves) hidden.push_back(new_tensor({chain.rows, chain.widths[i + 1]}, widened(dtype)));
      saved.push_back(serves ? nullptr : mutable_data<T>(hidden.back()));
    }
    run_forward<T>(call, mutable_data<T>(output), saved);
  });
  return {narrowed(std::move(output), dtype), all_narrowed(std::move(hidden), dtype)};
}

// ---- backward ---------------------------------------------------------------------------------------------

// The saved tensors, one for each layer. Where a layer saved nothing because `output` serves, `output` takes its place.
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

Gradients mlp_backward(const Tensor& grad_output, const Tensor& input, const std::vector<Tensor>& weights,
                       const std::string& activation_text, const Tensor& output, const std::vector<Tensor>& hidden,
                       bool input_wanted, bool weights_wanted, bool biases_wanted) {
  const char* op = "mlp_backward";
  const TensorsInKeptMemory kept;
  const Activations activations(op, activation_text);
  const Chain chain = check_chain(op, input, weights, activations);
  FASTNN_CHECK(weights.size() == activations.size(), op, ": expected ", activations.size(), " weights, got ",
               weights.size());
  check_same_kind(grad_output, chain.kind, "grad_output");
  check_sizes(grad_output, {chain.rows, chain.widths.back()}, op, "grad_output");
  const std::vector<Tensor> saved = check_saved(chain, activations, output, hidden);
  const MlpWanted wanted{input_wanted, weights_wanted, biases_wanted};
  if (goes_by_layers(chain, true)) {
    return with_dtype(chain.kind.dtype, [&](auto type) {
      return backward_by_layers<decltype(type)>(chain, grad_output, input, weights, activations, saved, wanted);
    });
  }
  const ScalarType dtype = chain.kind.dtype;
  Tensor grad_input = new_tensor({wanted.input ? chain.rows : 0, chain.widths[0]}, widened(dtype));
  std::vector<Tensor> grad_weights, grad_biases;
  with_kernel_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    KernelInputs inputs(dtype);
    PerLayer<const T*> weight_data, saved_data;
    for (int64_t i = 0; i < chain.layers(); ++i) {
      weight_data.push_back(inputs.data<T>(weights[i]));
      saved_data.push_back(inputs.data<T>(saved[i]));
    }
    auto layers = backward_layers<T>(chain, activations, inputs.data<T>(input), weight_data, saved_data);
    for (int64_t i = 0; i < chain.layers(); ++i) {
      MlpLayerBackward<T>& layer = layers[i];
      const auto place = [&](std::vector<Tensor>& gradients, const Sizes& sizes) {
        gradients.push_back(new_tensor(sizes, widened(dtype)));
        return mutable_data<T>(gradients.back());
      };
      if (wanted.weights) layer.grad_weight = place(grad_weights, {layer.out, layer.in});
      if (wanted.biases) layer.grad_bias = place(grad_biases, {layer.out});
    }
    run_backward<T>(chain, layers, inputs.data<T>(grad_output), wanted.input ? mutable_data<T>(grad_input) : nullptr);
  });
  return {narrowed(std::move(grad_input), dtype), all_narrowed(std::move(grad_weights), dtype),
          all_narrowed(std::move(grad_biases), dtype)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // parameters: the weights (out, in), then the biases (out), or no biases at all.
  // activations: one a layer, with bars between them: see activation_text.h.
  m.def("mlp(Tensor input, Tensor[] parameters, str activations) -> Tensor");
  // hidden: what mlp_backward needs of each layer
  m.def(
      "mlp_with_hidden(Tensor input, Tensor[] parameters, str activations)"
      " -> (Tensor output, Tensor[] hidden)");
  // A gradient that is not wanted comes back empty.
  m.def(
      "mlp_backward(Tensor grad_output, Tensor input, Tensor[] weights, str activations, Tensor output,"
      " Tensor[] hidden, bool input_wanted, bool weights_wanted, bool biases_wanted)"
      " -> (Tensor grad_input, Tensor[] grad_weights, Tensor[] grad_biases)");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("mlp", FASTNN_BOX(mlp));
  m.impl("mlp_with_hidden", FASTNN_BOX(mlp_with_hidden));
  m.impl("mlp_backward", FASTNN_BOX(mlp_backward));
}

}  // namespace
}  // namespace fastnn
