#include "register.h"

#include <array>

namespace fastnn {
namespace {

template <class Result, size_t count>
Result call(const char* name, std::array<StableIValue, count> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Result>(stack[0]);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("refuse_gradient(Tensor(a) output, Tensor input) -> Tensor(a)");
}

}  // namespace

// The stable ABI has no requires_grad(), but a view of a tensor that requires grad is no leaf, any other is one.
bool requires_gradient(const Tensor& tensor) {
  using torch::stable::detail::from;
  return !call<bool>("aten::is_leaf", std::array{from(call<Tensor>("aten::alias", std::array{from(tensor)}))});
}

Tensor refuse_gradient(const Tensor& output, const Tensor& input) {
  using torch::stable::detail::from;
  return call<Tensor>("fastnn::refuse_gradient", std::array{from(output), from(input)});
}

}  // namespace fastnn
