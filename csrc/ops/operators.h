// The operators whose functions the layers of a network in training call directly, without the dispatcher.
#pragma once

#include <array>
#include <tuple>

#include "tensor.h"

namespace fastnn {

using TensorList = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> conv_relu_max_pool_with_winners(const Tensor& input, const Tensor& weight,
                                                           const OptionalTensor& bias, const Ints& geometry,
                                                           const std::optional<std::string>& algorithm);
std::tuple<Tensor, Tensor, Tensor> conv_relu_max_pool_backward(const Tensor& grad_output, const Tensor& winners,
                                                               const Tensor& input, const Tensor& weight,
                                                               const Ints& geometry, bool input_wanted,
                                                               bool weight_wanted, bool bias_wanted,
                                                               const std::optional<std::string>& algorithm);

// A convolution that nothing follows, and its gradients, of which one that is not wanted is empty or undefined: by
// our kernels where those are faster, else by torch's own. geometry: as that of conv_relu_max_pool, whose pool is one
// pixel.
Tensor plain_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Ints& geometry);
std::array<Tensor, 3> plain_convolution_backward(const Tensor& gradient, const Tensor& input, const Tensor& weight,
                                                 const Ints& geometry, const std::array<bool, 3>& wanted);

std::tuple<Tensor, TensorList, Tensor> rnn_with_reserve(const Tensor& input, const OptionalTensor& batch_sizes,
                                                        const TensorList& state, const TensorList& weights,
                                                        const OptionalTensor& masks, int64_t mode, int64_t num_layers,
                                                        bool bidirectional, bool batch_first);
std::tuple<Tensor, TensorList, TensorList> rnn_backward(
    const OptionalTensor& grad_output, const std::vector<OptionalTensor>& grad_state, const Tensor& input,
    const OptionalTensor& batch_sizes, const TensorList& state, const TensorList& weights, const OptionalTensor& masks,
    const Tensor& output, const Tensor& reserve, int64_t mode, int64_t num_layers, bool bidirectional, bool batch_first,
    bool input_wanted, bool state_wanted, bool weights_wanted);

}  // namespace fastnn
