// Operators with the arguments and results of fastnn's that do nothing but make their results: what a call costs before
// any work. Compiled and loaded by benchmarks/overhead.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

Tensor empty() {
  const int64_t one = 1;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &one, &one, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor mlp(const Tensor&, const Tensors&, const std::string&) {
  return empty();
}

Tensor conv_relu_max_pool(const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::vector<int64_t>&,
                          const std::optional<std::string>&) {
  return empty();
}

std::tuple<Tensor, Tensors> rnn(const Tensor&, const std::optional<Tensor>&, const Tensors& state, const Tensors&,
                                const std::optional<Tensor>&, int64_t, int64_t, bool, bool) {
  Tensors final_state;
  for (size_t i = 0; i < state.size(); ++i) final_state.push_back(empty());
  return {empty(), final_state};
}

Tensors rnn_cell(const Tensor&, int64_t, const std::optional<Tensor>&, const std::optional<Tensor>& c, const Tensor&,
                 const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&) {
  return c ? Tensors{empty(), empty()} : Tensors{empty()};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn_bare, m) {
  m.def("mlp(Tensor input, Tensor[] parameters, str activations) -> Tensor");
  m.def("conv_relu_max_pool(Tensor input, Tensor weight, Tensor? bias, int[] geometry, str? algorithm=None) -> Tensor");
  m.def(
      "rnn(Tensor input, Tensor? batch_sizes, Tensor[] state, Tensor[] weights, Tensor? masks, int mode,"
      " int num_layers, bool bidirectional, bool batch_first) -> (Tensor output, Tensor[] final_state)");
  m.def(
      "rnn_cell(Tensor input, int mode, Tensor? h, Tensor? c, Tensor weight_ih, Tensor weight_hh,"
      " Tensor? bias_ih=None, Tensor? bias_hh=None) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn_bare, CPU, m) {
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("conv_relu_max_pool", TORCH_BOX(&conv_relu_max_pool));
  m.impl("rnn", TORCH_BOX(&rnn));
  m.impl("rnn_cell", TORCH_BOX(&rnn_cell));
}
