// Argument checks of the operators: whatever an operator is given, a Python exception and nothing worse.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fastnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Raises RuntimeError in Python, with the parts joined, unless `condition`.
template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (__builtin_expect(condition, true)) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// check, with its words only put together where it fails.
#define FASTNN_CHECK(condition, ...)                                              \
  do {                                                                            \
    if (__builtin_expect(!(condition), false)) fastnn::check(false, __VA_ARGS__); \
  } while (false)

template <class List>
std::string to_string(const List& values) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << "]";
  return text.str();
}

// a * b, a + b in checked arithmetic: sizes come from outside.
inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t product;
  check(!__builtin_mul_overflow(a, b, &product), "sizes ", a, " and ", b, " overflow 64 bits");
  return product;
}
inline int64_t checked_sum(int64_t a, int64_t b) {
  int64_t sum;
  check(!__builtin_add_overflow(a, b, &sum), "sizes ", a, " and ", b, " overflow 64 bits");
  return sum;
}

// The first tensor argument of an operator, to which the others are compared.
struct Expected {
  ScalarType dtype;
  int32_t dtype_code;  // libtorch's own number for it, cheap to read off another tensor
  const char* op;
};

inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

inline bool is_strided(const Tensor& tensor) {
  int32_t layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  return layout == aoti_torch_layout_strided();
}

inline void check_plain(const Tensor& tensor, const char* op, const char* name) {
  check(tensor.defined(), op, ": ", name, " must be a tensor, got an undefined one");
  check(tensor.is_cpu(), op, ": expected all tensors to be on the same device, the CPU, but ", name, " is not");
  check(is_strided(tensor), op, ": expected ", name, " to be a dense tensor");
}

inline Expected check_first(const Tensor& tensor, const char* op, const char* name) {
  check_plain(tensor, op, name);
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16, op, ": \"", name,
        "\" not implemented for '", torch::headeronly::toString(dtype), "'; use float32, float64 or bfloat16");
  return {dtype, dtype_code(tensor), op};
}

inline void check_same_kind(const Tensor& tensor, const Expected& expected, const char* name) {
  check_plain(tensor, expected.op, name);
  if (dtype_code(tensor) == expected.dtype_code) return;
  check(false, expected.op, ": expected ", name, " to have dtype ", torch::headeronly::toString(expected.dtype),
        ", but got ", torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* op, const char* name) {
  const Sizes actual = tensor.sizes();
  bool same = actual.size() == sizes.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = actual[i] == sizes.begin()[i];
  // Not through check: its arguments would be put into words on every call.
  if (!same) {
    check(false, op, ": expected ", name, " of size ", to_string(std::vector<int64_t>(sizes)), ", got ",
          to_string(actual));
  }
}

}  // namespace fastnn
