// Packed weights of a network: written once, read by every call.
#pragma once

#include <cstring>

#include "../ops/check.h"
#include "../simd/isa.h"

namespace fastnn {

// Packed weights are a sequence of blocks, each behind a heading. They fit only one instruction set and dtype, which a
// heading in front of all blocks names.
struct PackedHeading {
  int64_t key;    // blocks that are packed in different ways have different keys
  int64_t bytes;  // of the block behind the heading
  int64_t step;   // the number of the network's step whose weights these are
  int64_t unused[5];
};
static_assert(sizeof(PackedHeading) == 64, "blocks begin on cache lines");

inline int64_t packed_for(Isa isa, size_t element) {
  return (static_cast<int64_t>(isa) + 1) * 16 + static_cast<int64_t>(element);
}

// Lays out packed weights; without memory, only counts its bytes.
class PackedWriter {
 public:
  PackedWriter(char* memory, Isa isa, size_t element) : memory_(memory) { add_heading(packed_for(isa, element), 0); }

  int64_t bytes() const { return bytes_; }
  void begin_step(size_t number) { step_ = static_cast<int64_t>(number); }
  template <class T>
  T* give(int64_t key, int64_t count) {
    const int64_t bytes = checked_sum(checked_product(count, sizeof(T)), 63) / 64 * 64;
    add_heading(key, bytes);
    T* block = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    if (block && bytes > 0)
      std::memset(memory_ + bytes_ + bytes - 64, 0, 64);  // what the block leaves of its last line
    bytes_ = checked_sum(bytes_, bytes);
    return block;
  }

 private:
  void add_heading(int64_t key, int64_t bytes) {
    if (memory_) {
      const PackedHeading heading{key, bytes, step_, {}};
      std::memcpy(memory_ + bytes_, &heading, sizeof heading);
    }
    bytes_ = checked_sum(bytes_, sizeof(PackedHeading));
  }

  char* memory_;
  int64_t bytes_ = 0, step_ = 0;
};

// Reads packed weights back in the same order. It trusts nothing that it reads. A step may leave some of its blocks
// unread.
class PackedReader {
 public:
  PackedReader(const char* memory, int64_t bytes, Isa isa, size_t element) : at_(memory), left_(bytes) {
    PackedHeading heading;
    if (!read_heading(heading) || heading.key != packed_for(isa, element)) {
      left_ = 0;
    } else {
      skip(sizeof heading);
    }
  }

  void begin_step(size_t number) {
    step_ = static_cast<int64_t>(number);
    PackedHeading heading;
    while (read_heading(heading) && heading.step < step_) skip(static_cast<int64_t>(sizeof heading) + heading.bytes);
  }

  // The step's next block with this key; null where there is none of the wanted size.
  template <class T>
  const T* take(int64_t key, int64_t count) {
    PackedHeading heading;
    while (read_heading(heading) && heading.step == step_) {
      skip(sizeof heading);
      const T* const block = reinterpret_cast<const T*>(at_);
      const bool fits = heading.bytes / static_cast<int64_t>(sizeof(T)) >= count &&
                        reinterpret_cast<uintptr_t>(at_) % alignof(T) == 0;
      skip(heading.bytes);
      if (heading.key == key) return fits ? block : nullptr;
    }
    return nullptr;
  }

 private:
  // Reads the next heading, if the heading and its whole block are there. Else nothing is read from then on.
  bool read_heading(PackedHeading& heading) {
    if (left_ < static_cast<int64_t>(sizeof heading)) return false;
    std::memcpy(&heading, at_, sizeof heading);
    if (heading.bytes >= 0 && heading.bytes <= left_ - static_cast<int64_t>(sizeof heading)) return true;
    left_ = 0;
    return false;
  }
  void skip(int64_t bytes) {
    at_ += bytes;
    left_ -= bytes;
  }

  const char* at_;
  int64_t left_, step_ = 0;
};

}  // namespace fastnn
