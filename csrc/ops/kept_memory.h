// Large blocks of memory that training keeps for its next step.
//
// The C library gives a large block back to the system when it is freed, and the system clears each page of the next
// block when it is first written: for a gradient of 400 MB that takes as long as computing it. A block that is kept has
// its pages. Blocks that nobody uses take a quarter of the machine's memory at most, and none once release() was
// called.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>

#include "check.h"

namespace fastnn {

// Asks the system for huge pages under a large block of memory that was not written yet. A processor remembers the
// addresses of few pages, so that a large weight is read faster from huge ones (7 % of ResNet-18's time). The advice
// covers only the huge pages that lie in the block as a whole, and so costs no memory.
void advise_huge_pages(void* block, size_t bytes);

class KeptMemory {
 public:
  // Smaller blocks are left to the C library, which keeps them itself.
  static constexpr size_t kLeastBytes = 256 << 10;

  // A block of at least so many bytes that begins on a cache line, or null where there is no memory.
  static void* take(size_t bytes);
  static void give_back(void* block, size_t bytes);
  // Frees all blocks that nobody uses.
  static void release();
  static size_t idle_bytes();
  static size_t most_idle_bytes();
};

// Uninitialised memory for so many elements, which is kept memory where it is large.
template <class T>
class KeptArray {
 public:
  explicit KeptArray(int64_t count) : bytes_(static_cast<size_t>(checked_product(count, sizeof(T)))) {
    data_ = static_cast<T*>(is_kept() ? KeptMemory::take(bytes_) : std::malloc(std::max<size_t>(bytes_, 1)));
    FASTNN_CHECK(data_ != nullptr, "out of memory: could not allocate ", bytes_, " bytes");
  }
  ~KeptArray() { is_kept() ? KeptMemory::give_back(data_, bytes_) : std::free(data_); }
  KeptArray(const KeptArray&) = delete;
  KeptArray& operator=(const KeptArray&) = delete;

  T* get() const { return data_; }

 private:
  bool is_kept() const { return bytes_ >= KeptMemory::kLeastBytes; }

  const size_t bytes_;
  T* data_;
};

// While an object of this class lives, large new tensors of this thread lie in kept memory, and give it back when torch
// frees them. They are gradients, what a training step needs, and what stretches of a model give under autograd. Their
// storage cannot be resized.
class TensorsInKeptMemory {
 public:
  TensorsInKeptMemory() : before_(is_on_) { is_on_ = true; }
  ~TensorsInKeptMemory() { is_on_ = before_; }
  TensorsInKeptMemory(const TensorsInKeptMemory&) = delete;
  TensorsInKeptMemory& operator=(const TensorsInKeptMemory&) = delete;

  static bool is_on() { return is_on_; }
  // A tensor of so many bytes; or null where that is few, where this torch (2.10) has no tensors that say when they are
  // freed, or where there is no memory.
  static AtenTensorHandle new_tensor(const Sizes& sizes, const int64_t* strides, int32_t dtype, size_t bytes);

 private:
  static thread_local bool is_on_;
  const bool before_;
};

}  // namespace fastnn
