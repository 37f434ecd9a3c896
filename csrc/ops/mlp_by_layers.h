// Computes mlp a layer at a time, by products of whole matrices. Backward goes this way where the products are so large
// that fusing them gains nothing. bfloat16 goes this way by torch's products, which have instructions made for it,
// while our kernels widen it to float.
#pragma once

#include "mlp_chain.h"
#include "product.h"

namespace fastnn {

// Whether most of backward's work is large products. (In forward our fused kernels are as fast.)
inline bool has_large_products(const Chain& chain) {
  double large = 0;
  for (int64_t i = 0; i < chain.layers(); ++i) {
    const int64_t in = chain.widths[i], out = chain.widths[i + 1];
    if (is_large_product(chain.rows, in, out)) large += 2.0 * chain.rows * in * out;
  }
  return large > chain.work / 2;
}

// Whether torch's products are faster for bfloat16. It compares, in measured microseconds, what our kernels lose by
// widening and by slower products with what torch's calls cost.
inline bool goes_by_layers(const Chain& chain, bool backward) {
  if (backward && has_large_products(chain)) return true;
  if (chain.kind.dtype != ScalarType::BFloat16) return false;
  const double layers = static_cast<double>(chain.layers());
  const double values = static_cast<double>(chain.rows) * static_cast<double>(chain.widths[0] + chain.outputs());
  return backward ? values / 2000 + chain.weights() / 1000 + chain.work / 235e3 > 20 * layers
                  : values / 4000 + chain.weights() / 12000 + chain.work / 470e3 > 9 * layers;
}

// The result of a call of torch's in the form that the kernels read. If autocast is on, it may have changed the dtype.
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

constexpr double kActivationWork = 20;

// to (count) <- activation(from). `to` may be `from`.
template <class T>
void activate(const Activation& activation, const T* from, int64_t count, T* to) {
  const auto& elementwise = mlp_kernels().elementwise.get<T>();
  parallel_range(count, kActivationWork, [&](int64_t first, int64_t last) {
    elementwise.activate(activation, from + first, to + first, last - first);
  });
}

// The output, and the hidden tensors of mlp_with_hidden.
inline std::tuple<Tensor, std::vector<Tensor>> forward_by_layers(const MlpCall& call, bool saves) {
  Tensor current = call.input.borrow();
  std::vector<Tensor> hidden;
  for (int64_t i = 0; i < call.chain.layers(); ++i) {
    const Activation& activation = call.activations[i];
    const Tensor before = linear(current, call.weight(i), call.has_biases() ? &call.bias(i) : nullptr);
    const bool kept = saves && saves_input(activation);
    current = kept ? new_tensor({call.chain.rows, call.chain.widths[i + 1]}, ScalarType::BFloat16) : before;
    if (activation.kind != ActivationKind::identity) {
      activate(activation, data<bfloat16>(before), before.numel(), mutable_data<bfloat16>(current));
    }
    if (saves && !output_serves(call.chain, i, activation)) hidden.push_back(before);
  }
  return {std::move(current), std::move(hidden)};
}

// The sums of a matrix's rows.
template <class T>
Tensor sums_of_rows(const T* matrix, int64_t rows, int64_t columns, ScalarType dtype) {
  Tensor sums = new_tensor({columns}, widened(dtype));
  sum_rows(matrix, rows, columns, mutable_data<Compute<T>>(sums));
  return narrowed(std::move(sums), dtype);
}

// saved: one a layer, as check_saved returns them
template <class T>
Gradients backward_by_layers(const Chain& chain, const Tensor& grad_output, const Tensor& input,
                             const std::vector<Tensor>& weights, const Activations& activations,
                             const std::vector<Tensor>& saved, MlpWanted wanted) {
  const ScalarType dtype = chain.kind.dtype;
  const int64_t rows = chain.rows, size = checked_product(rows, chain.widest());
  const Scratch<T> buffers(checked_product(3, size));
  T *own = buffers.get(), *other = own + size, *const activated = other + size;
  const auto& elementwise = mlp_kernels().elementwise.get<T>();
  Tensor grad_input = new_tensor({wanted.input ? rows : 0, chain.widths[0]}, dtype);
  std::vector<Tensor> grad_weights, grad_biases;
  const Tensor dense_output = dense(grad_output);
  const T* gradient = data<T>(dense_output);  // of the layer's output; in `own`, but for the last layer's
  for (int64_t i = chain.layers() - 1; i >= 0; --i) {
    const int64_t in = chain.widths[i], out = chain.widths[i + 1];
    if (activations[i].kind != ActivationKind::identity) {
      const Tensor kept = dense(saved[i]);
      parallel_range(rows * out, kActivationWork, [&](int64_t first, int64_t last) {
        elementwise.gradient(activations[i], gradient + first, data<T>(kept) + first, own + first, last - first);
      });
      gradient = own;
    }
    const Matrix<const T> before(gradient, rows, out);
    if (wanted.biases) grad_biases.push_back(sums_of_rows(gradient, rows, out, dtype));
    if (wanted.weights) {
      const Tensor kept = dense(i > 0 ? saved[i - 1] : input);
      const T* layer_input = data<T>(kept);
      if (i > 0 && saves_input(activations[i - 1])) {
        activate(activations[i - 1], layer_input, rows * in, activated);
        layer_input = activated;
      }
      grad_weights.push_back(new_tensor({out, in}, dtype));
      multiply<T>(before.transposed(), {layer_input, rows, in}, {mutable_data<T>(grad_weights.back()), out, in});
    }
    if (i > 0 || wanted.input) {
      const Tensor weight = dense(weights[i]);
      T* const to = i > 0 ? other : mutable_data<T>(grad_input);
      multiply<T>(before, {data<T>(weight), out, in}, {to, rows, in});
      gradient = other;
      std::swap(own, other);
    }
  }
  std::reverse(grad_weights.begin(), grad_weights.end());
  std::reverse(grad_biases.begin(), grad_biases.end());
  return {std::move(grad_input), std::move(grad_weights), std::move(grad_biases)};
}

}  // namespace fastnn
