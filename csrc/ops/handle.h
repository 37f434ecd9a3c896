// Tensors of libtorch as the operators hold them, and how arguments and results cross the stable ABI.
//
// libtorch's own class for this (torch::stable::Tensor) shares a tensor by a std::shared_ptr, which costs an allocation
// for each argument of each call, and its way of reading a string leaks it. Small calls consist of little else.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace fastnn {

using torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using Ints = std::vector<int64_t>;

// A tensor of libtorch. The object owns it, or borrows it from another object that lives longer.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle), owned_(true) {}
  Tensor(const torch::stable::Tensor& tensor) : Tensor(new_handle(tensor.get())) {}
  Tensor(const Tensor& other) : Tensor(other.handle_ ? new_handle(other.handle_) : nullptr) {}
  Tensor(Tensor&& other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)), owned_(std::exchange(other.owned_, false)) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(owned_, other.owned_);
    return *this;
  }
  ~Tensor() {
    if (owned_ && handle_) aoti_torch_delete_tensor_object(handle_);
  }

  Tensor borrow() const {
    Tensor result;
    result.handle_ = handle_;
    return result;
  }
  // The tensor for a call of libtorch.
  torch::stable::Tensor share() const { return torch::stable::Tensor(new_handle(handle_)); }
  // The tensor for a caller that takes ownership.
  AtenTensorHandle release() && {
    Tensor last = owned_ ? std::move(*this) : Tensor(*this);
    last.owned_ = false;
    return last.handle_;
  }

  AtenTensorHandle get() const { return handle_; }
  bool defined() const { return handle_ && read<bool>(aoti_torch_is_defined); }
  int64_t dim() const { return read<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return read<int64_t>(aoti_torch_get_numel); }
  bool is_contiguous() const { return read<bool>(aoti_torch_is_contiguous); }
  bool is_cpu() const { return read<int32_t>(aoti_torch_get_device_type) == aoti_torch_device_type_cpu(); }
  bool is_strided() const { return read<int32_t>(aoti_torch_get_layout) == aoti_torch_layout_strided(); }
  int32_t dtype_code() const { return read<int32_t>(aoti_torch_get_dtype); }  // libtorch's own number for it
  ScalarType scalar_type() const {
    return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype_code()));
  }
  size_t element_size() const { return aoti_torch_dtype_element_size(dtype_code()); }
  Sizes sizes() const { return {read<int64_t*>(aoti_torch_get_sizes), static_cast<size_t>(dim())}; }
  Sizes strides() const { return {read<int64_t*>(aoti_torch_get_strides), static_cast<size_t>(dim())}; }
  int64_t size(int64_t dimension) const {
    int64_t size;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(handle_, dimension, &size));
    return size;
  }
  int64_t stride(int64_t dimension) const {
    int64_t stride;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_stride(handle_, dimension, &stride));
    return stride;
  }
  // The whole elements that the storage has memory for: storage may be any number of bytes, for example those of a
  // file.
  int64_t storage_numel() const { return storage_bytes() / static_cast<int64_t>(element_size()); }
  int64_t storage_bytes() const { return read<int64_t>(aoti_torch_get_storage_size); }
  int64_t storage_offset() const { return read<int64_t>(aoti_torch_get_storage_offset); }
  const void* const_data_ptr() const { return read<const void*>(torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return read<void*>(torch_get_mutable_data_ptr); }

 private:
  AtenTensorHandle handle_ = nullptr;
  bool owned_ = false;

  static AtenTensorHandle new_handle(AtenTensorHandle handle) {
    AtenTensorHandle result;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &result));
    return result;
  }
  template <class Value>
  Value read(AOTITorchError (*function)(AtenTensorHandle, Value*)) const {
    Value value;
    TORCH_ERROR_CODE_CHECK(function(handle_, &value));
    return value;
  }
};

// ---- arguments ----------------------------------------------------------------------------------------------

// Takes an argument from libtorch's stack, and owns it from then on.
template <class T>
struct Argument {
  static T take(StableIValue value) { return torch::stable::detail::to<T>(value); }
};
template <>
struct Argument<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
};
template <>
struct Argument<std::optional<Tensor>> {
  static std::optional<Tensor> take(StableIValue value) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
    return handle ? std::optional<Tensor>(std::in_place, *handle) : std::nullopt;
  }
};
template <class Item>
struct Argument<std::vector<Item>> {
  static std::vector<Item> take(StableIValue value) {
    const auto list = torch::stable::detail::to<StableListHandle>(value);
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    std::vector<Item> items;
    items.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      items.push_back(Argument<Item>::take(item));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
    return items;
  }
};
template <>
struct Argument<std::string> {
  static std::string take(StableIValue value) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* text = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    std::string result(text, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return result;
  }
};

template <>
struct Argument<std::optional<std::string>> {
  static std::optional<std::string> take(StableIValue value) {
    const auto handle = torch::stable::detail::to<std::optional<StringHandle>>(value);
    if (!handle) return std::nullopt;
    return Argument<std::string>::take(torch::stable::detail::from(*handle));
  }
};

// ---- results ------------------------------------------------------------------------------------------------

// Puts a result on libtorch's stack, which owns it from then on.
template <class T>
StableIValue give(const T& value) {
  return torch::stable::detail::from(value);
}
inline StableIValue give(Tensor&& tensor) {
  return torch::stable::detail::from(std::move(tensor).release());
}
inline StableIValue give(const Tensor& tensor) {
  return give(Tensor(tensor));
}
inline StableIValue give(std::vector<Tensor>&& tensors) {
  StableListHandle list;
  TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(tensors.size(), &list));
  for (Tensor& tensor : tensors) TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, give(std::move(tensor))));
  return torch::stable::detail::from(list);
}

}  // namespace fastnn
