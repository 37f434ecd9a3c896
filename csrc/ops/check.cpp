#include "check.h"

#include <array>

namespace fastnn {
namespace {

Tensor call_unary(const char* name, const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

bool is_leaf(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

}  // namespace

void check_no_gradient(const Tensor& tensor, const char* op) {
  check(is_leaf(call_unary("aten::alias", tensor)), op,
        ": this operator has no gradient of its own; call it through fastnn.functional or fastnn.nn, or under "
        "torch.no_grad()");
}

}  // namespace fastnn
