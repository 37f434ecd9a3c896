// Registration of an operator that has no gradient of its own: FASTNN_BOX(function) in place of TORCH_BOX.
//
// Autograd passes through it without a trace, so in grad mode a tensor that requires grad would lose its gradient
// without a word. There, each output becomes the result of fastnn::refuse_gradient (fastnn/ops/_raw_operator.py), whose
// backward raises.
#pragma once

#include "check.h"

namespace fastnn {

bool requires_gradient(const Tensor& tensor);
Tensor refuse_gradient(const Tensor& output, const Tensor& input);

inline const Tensor* find_gradient(const Tensor& tensor) {
  return tensor.defined() && requires_gradient(tensor) ? &tensor : nullptr;
}
inline const Tensor* find_gradient(const std::optional<Tensor>& tensor) {
  return tensor ? find_gradient(*tensor) : nullptr;
}
inline const Tensor* find_gradient(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    if (const Tensor* found = find_gradient(tensor)) return found;
  }
  return nullptr;
}
template <class Other>
const Tensor* find_gradient(const Other&) {
  return nullptr;
}

inline void refuse_gradients(Tensor& output, const Tensor& input) {
  if (output.scalar_type() != ScalarType::Byte) output = refuse_gradient(output, input);
}
inline void refuse_gradients(std::vector<Tensor>& outputs, const Tensor& input) {
  for (Tensor& output : outputs) refuse_gradients(output, input);
}
template <class... Parts>
void refuse_gradients(std::tuple<Parts...>& outputs, const Tensor& input) {
  std::apply([&](Parts&... parts) { (refuse_gradients(parts, input), ...); }, outputs);
}

template <auto function>
struct WithoutGradient;
template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct WithoutGradient<function> {
  static Result call(Arguments... arguments) {
    Result result = function(arguments...);
    if (!aoti_torch_grad_mode_is_enabled()) return result;
    const Tensor* found = nullptr;
    ((found = found ? found : find_gradient(arguments)), ...);
    if (found) refuse_gradients(result, *found);
    return result;
  }
};

}  // namespace fastnn

#define FASTNN_BOX(function) TORCH_BOX(&(fastnn::WithoutGradient<function>::call))
