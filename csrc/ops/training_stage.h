// One stage of a training step's chain: what the operator asks of every layer (training_stages.h).
#pragma once

#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "training_words.h"
#include "operators.h"

namespace fastnn {

constexpr const char* kTrainingStep = "training_step";

// A tensor's memory under other sizes, while that lives.
template <class T>
Tensor as_sizes(const T* memory, const Ints& sizes) {
  Ints strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return tensor_over(memory, sizes, strides);
}

inline TensorList borrowed(const TensorList& tensors, size_t first, size_t count) {
  TensorList result;
  result.reserve(count);
  for (size_t i = first; i < first + count; ++i) result.push_back(tensors[i].borrow());
  return result;
}

// A number that is not whole, and not negative, by its bits.
inline double real_number(Words& words) {
  const int64_t bits = words.number(0, std::numeric_limits<int64_t>::max());
  double number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

// A new uninitialised tensor of another's sizes, and of its strides where it has no gaps.
template <class T>
Tensor new_like(const Tensor& tensor) {
  return tensor.is_contiguous() ? new_tensor(sizes_of(tensor), kDtypeOf<T>)
                                : Tensor(torch::stable::empty_like(tensor.share()));
}

inline bool same_sizes(const Tensor& one, const Tensor& other) {
  const Sizes a = one.sizes(), b = other.sizes();
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// Hands out what stages have saved, in their order.
template <class T>
class SavedReader {
 public:
  explicit SavedReader(const TensorList& saved) : saved_(saved) {}

  Tensor take() {
    FASTNN_CHECK(next_ < saved_.size(), kTrainingStep, ": there are fewer saved tensors than the program needs");
    const Tensor& tensor = saved_[next_++];
    check_plain(tensor, kTrainingStep, "saved");
    check_memory(tensor, kTrainingStep, "saved");
    return tensor.borrow();
  }
  Tensor take_strided(const Ints& sizes) {  // of the stages' dtype
    Tensor tensor = take();
    FASTNN_CHECK(tensor.scalar_type() == kDtypeOf<T> && sizes_of(tensor) == sizes, kTrainingStep,
                 ": expected a saved tensor of size ", to_string(sizes), ", got ", to_string(tensor.sizes()));
    return tensor;
  }
  Tensor take(const Ints& sizes) {  // contiguous
    Tensor tensor = take_strided(sizes);
    FASTNN_CHECK(tensor.is_contiguous(), kTrainingStep, ": expected a saved tensor to be contiguous");
    return tensor;
  }
  bool ends() const { return next_ == saved_.size(); }

 private:
  const TensorList& saved_;
  size_t next_ = 0;
};

// One stage of a step: forward, then backward. What backward needs lies in the stage, outputs and gradients too; `save`
// gives it away, and `restore`, in another stage of the same words, stands for the forward that it came from.
template <class T>
class Stage {
 public:
  virtual ~Stage() = default;
  virtual Tensor forward(const Tensor& input, const TensorList& parameters) = 0;
  virtual void save(TensorList& saved) = 0;
  virtual Tensor restore(const Tensor& input, const TensorList& parameters, SavedReader<T>& saved) = 0;
  // wanted: of each parameter whether its gradient is; gradients: where they are, those that there are, like their
  // parameters. Returns the input's gradient, if that is wanted.
  virtual Tensor backward(const Tensor& gradient, bool input_wanted, const bool* wanted, const T** gradients) = 0;
  // Writes what a step leaves behind besides its gradients, once nothing can fail any more.
  virtual void commit() {}
  size_t count = 0;  // of parameters

 protected:
  void hold(const Tensor& input, const TensorList& parameters) {
    input_ = input.borrow();
    parameters_ = borrowed(parameters, 0, parameters.size());
  }
  // Of parameter j. A convolution's gradient comes in its input's format.
  const T* keep(Tensor gradient, size_t j) {
    FASTNN_CHECK(gradient.numel() == parameters_[j].numel(), kTrainingStep, ": expected a parameter of size ",
                 to_string(gradient.sizes()), ", got ", to_string(parameters_[j].sizes()));
    gradients_.push_back(dense(std::move(gradient)));
    return data<T>(gradients_.back());
  }

  Tensor input_;
  TensorList parameters_, gradients_;
};

}  // namespace fastnn
