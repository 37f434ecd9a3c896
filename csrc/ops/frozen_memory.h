// What a frozen network is made of: its program in words, its weights in one tensor or in many, and their packed form.
#pragma once

#include <cstring>
#include <string>

#include "../simd/isa.h"
#include "activation_text.h"
#include "tensor.h"

namespace fastnn {

// Reads a program: stages of words and non-negative numbers, separated by spaces, each stage ended by ';'.
class Words {
 public:
  explicit Words(const std::string& text) : at_(text.data()), end_(at_ + text.size()) {}

  bool ends() const { return at_ == end_; }
  // Whether the stage does: takes its mark.
  bool stage_ends() {
    if (at_ == end_ || *at_ != ';') return false;
    ++at_;
    return true;
  }
  std::string word() {
    const char* first = at_;
    while (at_ != end_ && *at_ != ' ' && *at_ != ';') ++at_;
    const std::string result(first, at_);
    skip_space();
    return result;
  }
  int64_t number(int64_t least, int64_t most) {
    int64_t value = 0;
    const char* first = at_;
    for (; at_ != end_ && *at_ >= '0' && *at_ <= '9'; ++at_) {
      value = checked_sum(checked_product(value, 10), *at_ - '0');
    }
    FASTNN_CHECK(at_ != first && value >= least && value <= most, "frozen: the program should have a number from ",
                 least, " to ", most, " where it has \"", std::string(first, std::min(end_, first + 20)), "\"");
    skip_space();
    return value;
  }
  Activation activation() {
    Activation result;
    FASTNN_CHECK(read_activation(at_, end_, result) && (at_ == end_ || *at_ == ' ' || *at_ == ';'),
                 "frozen: the program should have an activation where it does not");
    skip_space();
    return result;
  }
  int64_t size() { return number(1, int64_t{1} << 31); }

 private:
  void skip_space() {
    if (at_ != end_ && *at_ == ' ') ++at_;
  }

  const char* at_;
  const char* end_;
};

// A dense tensor of weights: where, and of what size.
template <class T>
struct WeightPiece {
  const T* data;
  Ints sizes;

  explicit WeightPiece(const Tensor& tensor) : data(fastnn::data<T>(tensor)) {
    const Sizes all = tensor.sizes();
    sizes.assign(all.begin(), all.end());
  }
  bool is(const Tensor& tensor) const {
    const Sizes all = tensor.sizes();
    return data == fastnn::data<T>(tensor) && sizes.size() == all.size() &&
           std::equal(sizes.begin(), sizes.end(), all.begin());
  }
};

inline int64_t product(const Ints& sizes, size_t first, size_t last) {
  int64_t result = 1;
  for (size_t i = first; i < last; ++i) result = checked_product(result, sizes[i]);
  return result;
}

// Hands out the weights, one after another: parts of a single piece where they are joined, else a piece each.
template <class T>
class WeightReader {
 public:
  WeightReader(const std::vector<WeightPiece<T>>& pieces, bool joined) : pieces_(pieces), joined_(joined) {}

  const T* take(const Ints& sizes) {
    FASTNN_CHECK(next_ < pieces_.size(), kTooFew);
    const WeightPiece<T>& piece = pieces_[next_];
    const T* const result = piece.data + used_;
    if (joined_) {
      const int64_t left = piece.sizes[0] - used_, count = product(sizes, 0, sizes.size());
      FASTNN_CHECK(count <= left, kTooFew);
      used_ += count;
      return result;
    }
    FASTNN_CHECK(piece.sizes == sizes, "frozen: expected weight ", next_, " of size ", to_string(sizes), ", got ",
                 to_string(piece.sizes));
    ++next_;
    return result;
  }
  bool ends() const { return joined_ ? used_ == pieces_[0].sizes[0] : next_ == pieces_.size(); }

 private:
  static constexpr const char* kTooFew = "frozen: the program asks for more weights than there are";

  const std::vector<WeightPiece<T>>& pieces_;
  const bool joined_;
  size_t next_ = 0;
  int64_t used_ = 0;  // of the single piece
};

// Packed weights are a sequence of blocks, each under a heading. They are good for one instruction set and dtype alone,
// so the first has a heading of its own that names them.
struct PackedHeading {
  int64_t key;    // a block that was packed otherwise has another
  int64_t bytes;  // of what follows
  int64_t unused[6];
};
static_assert(sizeof(PackedHeading) == 64, "blocks begin on cache lines");

inline int64_t packed_for(size_t element) {
  return (static_cast<int64_t>(active_isa()) + 1) * 16 + static_cast<int64_t>(element);
}

// Lays out packed weights; without memory, only counts its bytes.
class PackedWriter {
 public:
  PackedWriter(char* memory, size_t element) : memory_(memory) { add_heading(packed_for(element), 0); }

  int64_t bytes() const { return bytes_; }
  template <class T>
  T* give(int64_t key, int64_t count) {
    const int64_t bytes = checked_sum(checked_product(count, sizeof(T)), 63) / 64 * 64;
    add_heading(key, bytes);
    T* block = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ = checked_sum(bytes_, bytes);
    return block;
  }

 private:
  void add_heading(int64_t key, int64_t bytes) {
    if (memory_) {
      const PackedHeading heading{key, bytes, {}};
      std::memcpy(memory_ + bytes_, &heading, sizeof heading);
    }
    bytes_ = checked_sum(bytes_, sizeof(PackedHeading));
  }

  char* memory_;
  int64_t bytes_ = 0;
};

// Reads them back in the same order, trusting none.
class PackedReader {
 public:
  PackedReader(const char* memory, int64_t bytes, size_t element) : at_(memory), left_(bytes) {
    PackedHeading heading;
    if (!take_heading(heading) || heading.key != packed_for(element)) left_ = 0;
  }

  // Null where the block is not there as it is wanted.
  template <class T>
  const T* take(int64_t key, int64_t count) {
    PackedHeading heading;
    if (!take_heading(heading) || heading.bytes < 0 || heading.bytes > left_) {
      left_ = 0;
      return nullptr;
    }
    const bool fits = heading.key == key && heading.bytes / static_cast<int64_t>(sizeof(T)) >= count &&
                      reinterpret_cast<uintptr_t>(at_) % alignof(T) == 0;
    const T* block = reinterpret_cast<const T*>(at_);
    at_ += heading.bytes;
    left_ -= heading.bytes;
    return fits ? block : nullptr;
  }

 private:
  bool take_heading(PackedHeading& heading) {
    if (left_ < static_cast<int64_t>(sizeof heading)) return false;
    std::memcpy(&heading, at_, sizeof heading);
    at_ += sizeof heading;
    left_ -= sizeof heading;
    return true;
  }

  const char* at_;
  int64_t left_;
};

}  // namespace fastnn
