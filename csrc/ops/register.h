// Registration of an operator that has no gradient of its own: FASTNN_BOX(function) in place of TORCH_BOX.
//
// Autograd does not record the operator, so that in grad mode a tensor that requires grad would lose its gradient
// silently. In grad mode, therefore, each output becomes the result of fastnn::refuse_gradient
// (fastnn/ops/_raw_operator.py), whose backward raises.
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
template <class Other>
const Tensor* find_gradient(const Other&) {
  return nullptr;
}
template <class Item>
const Tensor* find_gradient(const std::vector<Item>& items) {
  for (const Item& item : items) {
    if (const Tensor* found = find_gradient(item)) return found;
  }
  return nullptr;
}

inline void refuse_gradients(Tensor& output, const Tensor& input) {
  if (output.scalar_type() != ScalarType::Byte) output = refuse_gradient(output, input);
}
template <class Other>
void refuse_gradients(Other&, const Tensor&) {}
inline void refuse_gradients(std::vector<Tensor>& outputs, const Tensor& input) {
  for (Tensor& output : outputs) refuse_gradients(output, input);
}
template <class... Parts>
void refuse_gradients(std::tuple<Parts...>& outputs, const Tensor& input) {
  std::apply([&](Parts&... parts) { (refuse_gradients(parts, input), ...); }, outputs);
}

// The function that libtorch calls. The stack holds the arguments at first, and the results at the end.
template <auto function>
struct Boxed;
template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    FASTNN_CHECK(arguments == sizeof...(Arguments) && results == result_count(static_cast<Result*>(nullptr)),
                 "the schema has ", arguments, " arguments and ", results, " results, the function others");
    run(stack, std::index_sequence_for<Arguments...>());
  }

 private:
  template <size_t... i>
  static void run(StableIValue* stack, std::index_sequence<i...>) {
    const std::tuple<std::decay_t<Arguments>...> arguments{Argument<std::decay_t<Arguments>>::take(stack[i])...};
    Result result = function(std::get<i>(arguments)...);
    if (aoti_torch_grad_mode_is_enabled()) {
      const Tensor* found = nullptr;
      ((found = found ? found : find_gradient(std::get<i>(arguments))), ...);
      if (found) refuse_gradients(result, *found);
    }
    put(stack, std::move(result));
  }

  template <class... Parts>
  static constexpr size_t result_count(std::tuple<Parts...>*) {
    return sizeof...(Parts);
  }
  static constexpr size_t result_count(void*) { return 1; }

  template <class... Parts>
  static void put(StableIValue* stack, std::tuple<Parts...>&& results) {
    std::apply([&](Parts&... parts) { ((*stack++ = give(std::move(parts))), ...); }, results);
  }
  template <class One>
  static void put(StableIValue* stack, One&& result) {
    *stack = give(std::move(result));
  }
};

}  // namespace fastnn

#define FASTNN_BOX(function) (&fastnn::Boxed<function>::call)
