// mlp a layer at a time with torch's own matrix products: for bfloat16, which they multiply by instructions made for it
// where our kernels widen it to float.
#pragma once

#include "mlp_chain.h"

namespace fastnn {

// In microseconds, as measured: what our kernels lose to torch's by widening and by slower products, against what
// torch's calls cost.
inline bool goes_by_layers(const Chain& chain, bool backward) {
  if (chain.kind.dtype != ScalarType::BFloat16) return false;
  const double layers = static_cast<double>(chain.layers());
  const double values = static_cast<double>(chain.rows) * static_cast<double>(chain.widths[0] + chain.outputs());
  return backward ? values / 2000 + chain.weights() / 1000 + chain.work / 235e3 > 20 * layers
                  : values / 4000 + chain.weights() / 12000 + chain.work / 470e3 > 9 * layers;
}

// What a call of torch's returned, as the kernels read it. An autocast in force reaches such calls too, and may have
// another dtype in mind.
inline Tensor settled(Tensor result) {
  if (result.scalar_type() != ScalarType::BFloat16) result = torch::stable::to(result.share(), ScalarType::BFloat16);
  return dense(std::move(result));
}

// bias: may be null
inline Tensor linear(const Tensor& input, const Tensor& weight, const Tensor* bias) {
  std::optional<torch::stable::Tensor> given_bias;
  if (bias) given_bias.emplace(bias->share());
  std::array<StableIValue, 3> stack{give(input), give(weight), give(given_bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return settled(Argument<Tensor>::take(stack[0]));
}

inline Tensor product(const Tensor& a, const Tensor& b) {
  return settled(torch::stable::matmul(a.share(), b.share()));
}

// body(first, last) for parts of [0, count), in parallel if `work` a piece is worth it.
template <class Body>
void parallel_range(int64_t count, double work, const Body& body) {
  const int64_t chunks = std::min(useful_threads(work * static_cast<double>(count)), count);
  parallel_chunks(chunks, count, [&](int64_t, int64_t first, int64_t last) { body(first, last); });
}

constexpr double kActivationWork = 20;

// activation(input), into `output`, which may be `input`.
inline void activate(Activation activation, const Tensor& input, const Tensor& output) {
  const bfloat16* const from = data<bfloat16>(input);
  bfloat16* const to = mutable_data<bfloat16>(output);
  parallel_range(input.numel(), kActivationWork, [&](int64_t first, int64_t last) {
    mlp_kernels().elementwise.activate(activation, from + first, to + first, last - first);
  });
}

// The output, and the hidden tensors of mlp_with_hidden.
inline std::tuple<Tensor, std::vector<Tensor>> forward_by_layers(const Forward& call, bool saves) {
  Tensor current = call.input.borrow();
  std::vector<Tensor> hidden;
  for (int64_t i = 0; i < call.chain.layers(); ++i) {
    const Activation activation = call.activations[i];
    const Tensor before = linear(current, call.weight(i), call.has_biases() ? &call.bias(i) : nullptr);
    const bool kept = saves && keeps_input(activation);
    current = kept ? new_tensor({call.chain.rows, call.chain.widths[i + 1]}, ScalarType::BFloat16) : before;
    if (activation != Activation::identity) activate(activation, before, current);
    if (saves && !output_serves(call.chain, i, activation)) hidden.push_back(before);
  }
  return {std::move(current), std::move(hidden)};
}

inline Tensor errors_by_layers(const Forward& call) {
  const Tensor output = std::get<0>(forward_by_layers(call, false)), input = dense(call.input);
  const int64_t columns = call.chain.widths[0];
  const Tensor errors = new_tensor({call.chain.rows}, ScalarType::BFloat16);
  const bfloat16 *const before = data<bfloat16>(input), *const after = data<bfloat16>(output);
  bfloat16* const to = mutable_data<bfloat16>(errors);
  parallel_range(call.chain.rows, 3.0 * static_cast<double>(columns), [&](int64_t first, int64_t last) {
    mlp_kernels().elementwise.mean_squared_errors(before + first * columns, after + first * columns, last - first,
                                                  columns, to + first);
  });
  return errors;
}

// saved: one a layer, as check_saved returns them
inline Gradients backward_by_layers(const Chain& chain, const Tensor& grad_output, const Tensor& input,
                                    const std::vector<Tensor>& weights, const Activations& activations,
                                    const std::vector<Tensor>& saved, Wanted wanted) {
  const size_t layers = weights.size();
  std::vector<Tensor> grad_weights(wanted.weights ? layers : 0), grad_biases(wanted.biases ? layers : 0);
  Tensor gradient = dense(grad_output);
  for (size_t i = layers; i-- > 0;) {
    const Activation activation = activations[i];
    if (activation != Activation::identity) {
      const Tensor kept = dense(saved[i]), before = new_tensor({chain.rows, chain.widths[i + 1]}, ScalarType::BFloat16);
      const bfloat16 *const after = data<bfloat16>(gradient), *const known = data<bfloat16>(kept);
      bfloat16* const to = mutable_data<bfloat16>(before);
      parallel_range(before.numel(), kActivationWork, [&](int64_t first, int64_t last) {
        mlp_kernels().elementwise.gradient(activation, after + first, known + first, to + first, last - first);
      });
      gradient = before;
    }
    if (wanted.biases) {
      const int64_t rows = 0;
      grad_biases[i] = settled(torch::stable::sum(gradient.share(), Sizes(&rows, 1)));
    }
    if (wanted.weights) {
      Tensor layer_input = i > 0 ? saved[i - 1] : input;
      if (i > 0 && keeps_input(activations[i - 1])) {
        layer_input = new_tensor({chain.rows, chain.widths[i]}, ScalarType::BFloat16);
        activate(activations[i - 1], dense(saved[i - 1]), layer_input);
      }
      grad_weights[i] = product(torch::stable::transpose(gradient.share(), 0, 1), layer_input);
    }
    if (i > 0 || wanted.input) gradient = product(gradient, weights[i]);
  }
  if (!wanted.input) gradient = new_tensor({0, chain.widths[0]}, ScalarType::BFloat16);
  return {std::move(gradient), std::move(grad_weights), std::move(grad_biases)};
}

}  // namespace fastnn
