#include "register.h"

#include <array>

namespace fastnn {
namespace {

template <class Result, size_t count>
Result call(const char* name, std::array<StableIValue, count> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return Argument<Result>::take(stack[0]);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("refuse_gradient(Tensor(a) output, Tensor input) -> Tensor(a)");
}

}  // namespace

// The stable ABI has no requires_grad(), but a view of a tensor that requires grad is no leaf, any other is one.
bool requires_gradient(const Tensor& tensor) {
  return !call<bool>("aten::is_leaf", std::array{give(call<Tensor>("aten::alias", std::array{give(tensor)}))});
}

Tensor refuse_gradient(const Tensor& output, const Tensor& input) {
  return call<Tensor>("fastnn::refuse_gradient", std::array{give(output), give(input)});
}

}  // namespace fastnn
