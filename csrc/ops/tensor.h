// Tensors and scratch memory for the operators, and the way from a dtype to a kernel.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "../simd/dtype.h"
#include "../kernels/team.h"
#include "check.h"
#include "kept_memory.h"
#include "team_balance.h"

namespace fastnn {

// libtorch's own number for a dtype of ours.
inline int32_t code_of(ScalarType dtype) {
  return dtype == ScalarType::Float    ? aoti_torch_dtype_float32()
         : dtype == ScalarType::Double ? aoti_torch_dtype_float64()
         : dtype == ScalarType::Byte   ? aoti_torch_dtype_uint8()
         : dtype == ScalarType::Long   ? aoti_torch_dtype_int64()
         : dtype == ScalarType::Bool   ? aoti_torch_dtype_bool()
                                       : aoti_torch_dtype_bfloat16();
}
// The dtype of the kernels' type.
template <class T>
constexpr ScalarType kDtypeOf = std::is_same_v<T, double>     ? ScalarType::Double
                                : std::is_same_v<T, bfloat16> ? ScalarType::BFloat16
                                : std::is_same_v<T, int64_t>  ? ScalarType::Long
                                                              : ScalarType::Float;

// A new uninitialised CPU tensor. The strides leave no gaps.
inline Tensor new_strided_tensor(const Sizes& sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  if (TensorsInKeptMemory::is_on()) {
    int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(code_of(dtype)));
    for (const int64_t size : sizes) bytes = checked_product(bytes, size);
    handle = TensorsInKeptMemory::new_tensor(sizes, strides, code_of(dtype), static_cast<size_t>(bytes));
    if (handle) return Tensor(handle);
  }
  const AOTITorchError error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                        code_of(dtype), aoti_torch_device_type_cpu(), 0, &handle);
  FASTNN_CHECK(error == AOTI_TORCH_SUCCESS, "out of memory: could not allocate a tensor of size ", to_string(sizes));
  return Tensor(handle);
}

// The same, contiguous.
inline Tensor new_tensor(const Sizes& sizes, ScalarType dtype) {
  int64_t strides[16];
  const size_t rank = sizes.size();
  FASTNN_CHECK(rank <= 16, "tensors of more than 16 dimensions are not supported");
  int64_t stride = 1;
  for (size_t i = rank; i-- > 0;) {
    strides[i] = stride;
    stride = checked_product(stride, std::max<int64_t>(sizes[i], 1));
  }
  return new_strided_tensor(sizes, strides, dtype);
}

// Existing memory as a tensor for torch, valid while the memory lives. The tensor records no gradient.
template <class T>
Tensor tensor_over(const T* memory, const Sizes& sizes, const Sizes& strides) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<T*>(memory), static_cast<int64_t>(sizes.size()),
                                                            sizes.data(), strides.data(), 0, code_of(kDtypeOf<T>),
                                                            aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Fails unless the tensor is contiguous, on the CPU, of this dtype and of these sizes, whose product is numel.
template <class T>
void check_like(const Tensor& tensor, const Sizes& sizes, int64_t numel, const char* op, const char* name) {
  static const int32_t code = code_of(kDtypeOf<T>);
  if (!is_plain_of(tensor, code)) check_same_kind(tensor, {kDtypeOf<T>, code, op}, name);
  const Sizes actual = tensor.sizes();
  FASTNN_CHECK(actual.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), actual.begin()), op,
               ": expected ", name, " of size ", to_string(sizes), ", got ", to_string(actual));
  FASTNN_CHECK(tensor.is_contiguous(), op, ": expected ", name, " to be contiguous");
  if (tensor.storage_bytes() / static_cast<int64_t>(sizeof(T)) - tensor.storage_offset() < numel) {
    check_memory(tensor, op, name);
  }
}

inline Ints sizes_of(const Tensor& tensor) {
  const Sizes sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// The tensor if it is contiguous, else a contiguous copy; valid while the given tensor lives.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor.borrow() : Tensor(torch::stable::contiguous(tensor.share()));
}
inline Tensor dense(Tensor&& tensor) {
  return tensor.is_contiguous() ? std::move(tensor) : Tensor(torch::stable::contiguous(tensor.share()));
}

// The tensor; or a copy, if it has more elements than its memory has, as after expand(). So an operator's time is
// bounded by memory that the caller has allocated.
inline Tensor in_memory(const Tensor& tensor) {
  return tensor.numel() <= tensor.storage_numel() ? tensor.borrow() : dense(tensor);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// For operators whose kernels have no bfloat16 and take float instead: the dtype in which such a kernel computes, and
// the tensor in that dtype.
inline ScalarType widened(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? ScalarType::Float : dtype;
}
// Both conversions are written here, since a call of torch::stable::to takes three microseconds.
inline Tensor widened(const Tensor& tensor) {
  const Tensor source = dense(tensor);
  const Sizes sizes = source.sizes();
  const Tensor result = new_tensor({sizes.begin(), sizes.end()}, ScalarType::Float);
  const uint16_t* from = data<uint16_t>(source);
  uint32_t* to = mutable_data<uint32_t>(result);
  for (int64_t i = 0, count = source.numel(); i < count; ++i) to[i] = static_cast<uint32_t>(from[i]) << 16;
  return result;
}
// Rounds a tensor to bfloat16: to the nearest number, ties to even. A NaN stays a NaN.
inline Tensor narrowed(Tensor tensor, ScalarType dtype) {
  if (dtype != ScalarType::BFloat16) return tensor;
  const Sizes sizes = tensor.sizes();
  const Tensor result = new_tensor({sizes.begin(), sizes.end()}, dtype);
  const uint32_t* from = data<uint32_t>(tensor);
  uint16_t* to = mutable_data<uint16_t>(result);
  for (int64_t i = 0, count = tensor.numel(); i < count; ++i) {
    const uint32_t bits = from[i], rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i] = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40 : rounded);
  }
  return result;
}

// Makes tensors contiguous and widened, as such a kernel reads them. The object holds the copies that this needs.
class KernelInputs {
 public:
  explicit KernelInputs(ScalarType dtype) : widens_(dtype == ScalarType::BFloat16) {}

  template <class T>
  const T* data(const Tensor& tensor) {
    if (!widens_ && tensor.is_contiguous()) return fastnn::data<T>(tensor);
    copies_.push_back(widens_ ? widened(tensor) : dense(tensor));
    return fastnn::data<T>(copies_.back());
  }

 private:
  bool widens_;
  std::vector<Tensor> copies_;
};

// Calls body(T{}) for the type T in which such an operator computes.
template <class Body>
auto with_kernel_dtype(ScalarType dtype, const Body& body) {
  return dtype == ScalarType::Double ? body(double{}) : body(float{});
}

// Calls body(T{}) for the element type T of `dtype`, which check_first has accepted.
template <class Body>
auto with_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    default:
      return body(float{});
  }
}

// A thread's own block of scratch memory. It is kept, so that a small call pays neither for malloc nor for new pages.
struct ThreadScratch {
  static constexpr size_t kBytes = 64 << 20;      // of address space; only what has been used takes memory
  static constexpr size_t kSmallPages = 2 << 20;  // at the beginning, all that most calls use
  char* data = nullptr;
  size_t used = 0;  // bytes; the block is used as a stack

  ThreadScratch() = default;
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;
  ~ThreadScratch() { std::free(data); }

  void reserve() {
    data = static_cast<char*>(std::aligned_alloc(64, kBytes));
    if (data) advise_huge_pages(data + kSmallPages, kBytes - kSmallPages);
  }

  static ThreadScratch& of_this_thread() {
    static thread_local ThreadScratch scratch;
    return scratch;
  }
};

// Uninitialised memory that begins on a cache line. The thread that took it gives it back, in the opposite order.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : kept_(ThreadScratch::of_this_thread()) {
    const int64_t wanted = checked_product(std::max<int64_t>(count, 1), sizeof(T));
    bytes_ = (static_cast<size_t>(wanted) + 63) / 64 * 64;
    borrowed_ = bytes_ <= ThreadScratch::kBytes - kept_.used;
    if (borrowed_ && !kept_.data) kept_.reserve();
    data_ = !borrowed_ ? KeptMemory::take(bytes_) : kept_.data ? kept_.data + kept_.used : nullptr;
    FASTNN_CHECK(data_ != nullptr, "out of memory: could not allocate ", wanted, " bytes of scratch");
    if (borrowed_) kept_.used += bytes_;
  }
  ~Scratch() {
    if (borrowed_) {
      kept_.used -= bytes_;
    } else {
      KeptMemory::give_back(data_, bytes_);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() const { return static_cast<T*>(data_); }

 private:
  ThreadScratch& kept_;
  size_t bytes_;
  void* data_;
  bool borrowed_;
};

// How many threads are worth starting for `work` floating-point operations. Below the threshold, waking a second thread
// costs more than it saves.
inline int64_t useful_threads(double work) {
  constexpr double kWorkPerThread = 100e3;
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min<int64_t>(threads, static_cast<int64_t>(work / kWorkPerThread)));
}

// Calls body(chunk, first, last) for `chunks` even parts of [0, count), in parallel. The parts depend on `chunks` alone
// and never on timing, so that results repeat bit for bit.
template <class Body>
void parallel_chunks(int64_t chunks, int64_t count, const Body& body) {
  const auto run = [&](int64_t chunk) { body(chunk, count * chunk / chunks, count * (chunk + 1) / chunks); };
  if (chunks <= 1) return chunks == 1 ? run(0) : void();
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) run(chunk);
  });
}

// Calls body(member) on as many of `most` threads as arrive in time: see Team. The call costs `steps` times `work`
// operations. The result must not depend on which member does what, so that timing changes no result.
template <class Body>
void parallel_team(int64_t most, double work, double steps, const Body& body) {
  Member one;
  if (most <= 1) return body(one);
  TeamBalance& balance = TeamBalance::of(work);
  const bool alone = balance.prefers_one();
  const double start = now_in_nanoseconds();
  if (alone) {
    body(one);
  } else {
    Team team(most);
    most = std::min(most, Team::kMost);
    torch::stable::parallel_for(0, most, 1, [&](int64_t first, int64_t last) {
      // If there are fewer threads than members, each thread has the places of several members.
      Member member(team, (most + last - first - 1) / (last - first));
      if (member.joined()) body(member);
    });
  }
  const double time = now_in_nanoseconds() - start;
  alone ? balance.add_one(steps, time) : balance.add_team(steps, time);
}

}  // namespace fastnn
