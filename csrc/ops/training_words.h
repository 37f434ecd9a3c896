// The program of a training step, in words.
#pragma once

#include <string>

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
    FASTNN_CHECK(at_ != first && value >= least && value <= most, "the program should have a number from ", least,
                 " to ", most, " where it has \"", std::string(first, std::min(end_, first + 20)), "\"");
    skip_space();
    return value;
  }
  Activation activation() {
    Activation result;
    FASTNN_CHECK(read_activation(at_, end_, result) && (at_ == end_ || *at_ == ' ' || *at_ == ';'),
                 "the program should have an activation where it does not");
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

inline int64_t product(const Ints& sizes, size_t first, size_t last) {
  int64_t result = 1;
  for (size_t i = first; i < last; ++i) result = checked_product(result, sizes[i]);
  return result;
}

}  // namespace fastnn
