// Argument checks of the operators: whatever an operator is given, it raises a Python exception and does nothing worse.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "handle.h"

namespace fastnn {

// Raises RuntimeError in Python, with the parts joined.
template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Fails unless `condition` holds. Only then is the message put together.
#define FASTNN_CHECK(condition, ...)                                      \
  do {                                                                    \
    if (__builtin_expect(!(condition), false)) fastnn::fail(__VA_ARGS__); \
  } while (false)

template <class List>
std::string to_string(const List& values) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << "]";
  return text.str();
}

// a * b and a + b, which fail on overflow: sizes come from outside.
inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t product;
  FASTNN_CHECK(!__builtin_mul_overflow(a, b, &product), "sizes ", a, " and ", b, " overflow 64 bits");
  return product;
}
inline int64_t checked_sum(int64_t a, int64_t b) {
  int64_t sum;
  FASTNN_CHECK(!__builtin_add_overflow(a, b, &sum), "sizes ", a, " and ", b, " overflow 64 bits");
  return sum;
}

// The first tensor argument of an operator, to which the others are compared.
struct Expected {
  ScalarType dtype;
  int32_t dtype_code;  // cheaper to compare with
  const char* op;
};

// Fails unless the product of the sizes, where zeros count as ones, is below 2^50. There is no memory for so many
// elements, and no time for so many multiplications; and 2^50 is so far below 2^63 that kernels and plans may multiply
// such sizes by lanes, bytes or costs without a check. The product is a double, which does not wrap.
template <class... Numbers>
void check_product(const char* op, Numbers... sizes) {
  constexpr double kMost = int64_t{1} << 50;
  const double product = (1.0 * ... * (sizes > 0 ? static_cast<double>(sizes) : 1));
  FASTNN_CHECK(product < kMost, op, ": sizes ", to_string(std::vector<double>{static_cast<double>(sizes)...}),
               " are too large together");
}

// How many elements of the storage lie between the first and the last element that a tensor's sizes and strides reach.
inline int64_t reach(const Tensor& tensor) {
  const int64_t numel = tensor.numel();
  if (numel == 0 || tensor.is_contiguous()) return numel;
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) last = checked_sum(last, checked_product(sizes[i] - 1, strides[i]));
  return checked_sum(last, 1);
}

// Checks that a tensor has the memory that its sizes need. Storage may have been freed or cut, as FSDP does with
// parameters between their uses.
inline void check_memory(const Tensor& tensor, const char* op, const char* name) {
  const int64_t reached = reach(tensor), needed = checked_sum(tensor.storage_offset(), reached);
  const int64_t elements = tensor.storage_numel();
  FASTNN_CHECK(elements >= needed || reached == 0, op, ": ", name, " needs a storage of ", needed,
               " elements, but its storage has ", elements, "; has it been freed or resized?");
}

inline void check_plain(const Tensor& tensor, const char* op, const char* name) {
  FASTNN_CHECK(tensor.defined(), op, ": ", name, " must be a tensor, got an undefined one");
  FASTNN_CHECK(tensor.is_cpu(), op, ": expected all tensors to be on the same device, the CPU, but ", name, " is not");
  FASTNN_CHECK(tensor.is_strided(), op, ": expected ", name, " to be a dense tensor");
}

inline Expected check_first(const Tensor& tensor, const char* op, const char* name) {
  check_plain(tensor, op, name);
  const ScalarType dtype = tensor.scalar_type();
  FASTNN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16, op, ": \"",
               name, "\" not implemented for '", torch::headeronly::toString(dtype),
               "'; use float32, float64 or bfloat16");
  check_memory(tensor, op, name);
  return {dtype, tensor.dtype_code(), op};
}

// A faster check_same_kind without messages. Every tensor of every call is checked by it.
inline bool is_plain_of(const Tensor& tensor, int32_t dtype) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), strided = aoti_torch_layout_strided();
  const AtenTensorHandle handle = tensor.get();
  bool defined = false;
  int32_t device, layout, code;
  return aoti_torch_is_defined(handle, &defined) == AOTI_TORCH_SUCCESS && defined &&
         aoti_torch_get_device_type(handle, &device) == AOTI_TORCH_SUCCESS && device == cpu &&
         aoti_torch_get_layout(handle, &layout) == AOTI_TORCH_SUCCESS && layout == strided &&
         aoti_torch_get_dtype(handle, &code) == AOTI_TORCH_SUCCESS && code == dtype;
}

inline void check_same_kind(const Tensor& tensor, const Expected& expected, const char* name) {
  if (is_plain_of(tensor, expected.dtype_code)) return check_memory(tensor, expected.op, name);
  check_plain(tensor, expected.op, name);
  fail(expected.op, ": expected ", name, " to have dtype ", torch::headeronly::toString(expected.dtype), ", but got ",
       torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* op, const char* name) {
  const Sizes actual = tensor.sizes();
  bool same = actual.size() == sizes.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = actual[i] == sizes.begin()[i];
  if (!same) {
    fail(op, ": expected ", name, " of size ", to_string(std::vector<int64_t>(sizes)), ", got ", to_string(actual));
  }
}

}  // namespace fastnn
