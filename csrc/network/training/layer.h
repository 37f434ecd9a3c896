// A layer of a network in training: forward, which saves what backward needs, and backward. A layer runs the ops' own
// forward and backward, or torch's, on tensors. Each value lies in memory as it would in torch, because torch draws the
// elements of a dropout in the order of memory.
#pragma once

#include <memory>

#include "../../ops/conv_problem.h"
#include "../../ops/stock.h"
#include "../array.h"
#include "../program.h"

namespace fastnn {

constexpr const char* kTrainingStep = "training_step";

// The gradient of a layer's input. The gradient of a parameter may be plain memory that the layer keeps, since a tensor
// takes a fifth of a microsecond longer.
template <class T>
struct Gradient {
  Tensor tensor;
  const T* memory = nullptr;  // as many elements as the parameter has, in its order
  bool is_new = false;        // whether the tensor has memory of its own, which nothing else uses
};

// A layer in training. It keeps tensors from forward until `forget`.
template <class T>
class TrainingLayer {
 public:
  std::vector<int64_t> inputs, outputs;  // numbers of values; parameters are inputs like others
  TensorList given;                      // the inputs of this step, borrowed

  virtual ~TrainingLayer() = default;
  // Sets as many outputs as the line names.
  virtual void forward(Tensor* outputs) = 0;
  // gradients: those of the outputs, undefined where nothing depends on an output; at least one is defined. Sets the
  // results of the inputs that are wanted.
  virtual void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) = 0;
  // Frees what only backward needs, which has run for the last time.
  virtual void release() {}
  // Writes other results of a step than gradients, such as running statistics, when nothing can fail any more.
  virtual void commit() {}
  virtual void forget() {}
  // Takes over the work of a later layer, of whose inputs this layer's output is the one with the number `which`. No
  // other layer takes that output, and the later layer's other inputs are there before this layer runs. Returns false
  // where that cannot be.
  virtual bool absorb(const TrainingLayer&, size_t) { return false; }
  // The random numbers of the forward, in the form in which the specification takes them; undefined where there are
  // none.
  virtual Tensor drawn() const { return {}; }
  // How many of the first inputs are int64. All others have the network's dtype, except for the last ones of which the
  // layer reads only the sizes.
  virtual size_t integers() const { return 0; }
  virtual size_t inputs_for_sizes() const { return 0; }
  // The activation, where the layer is one; else empty.
  virtual std::string_view activation_text() const { return {}; }

 protected:
  // The inputs of these names that the line has, in this order.
  void take(const ProgramLine& line, std::initializer_list<const char*> names) {
    for (const char* const name : names) {
      if (line.has(name)) inputs.push_back(line.input(name));
    }
  }
};

// A layer whose outputs depend on one input alone, which is data.
template <class T>
class UnaryTraining : public TrainingLayer<T> {
 public:
  explicit UnaryTraining(const ProgramLine& line) { this->inputs = {line.input("input")}; }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    if (wanted[0]) results[0].tensor = gradient_of(gradients[0]);
  }
  virtual Tensor gradient_of(const Tensor& gradient) = 0;

 protected:
  const Tensor& input() const { return this->given[0]; }
};

// Of so many elements, or fewer, torch takes longer for a call than for the work, which one thread of ours does then.
constexpr int64_t kFewElements = 1 << 15;

// A dimension as torch counts it, from the end where it is negative.
inline int64_t wrap_dim(int64_t dim, size_t rank) {
  const int64_t count = static_cast<int64_t>(rank);
  FASTNN_CHECK(dim >= -count && dim < count, kTrainingStep, ": dimension ", dim, " of ", rank, " dimensions");
  return dim < 0 ? dim + count : dim;
}

// A tensor's memory with other sizes. It is valid while the tensor lives.
template <class T>
Tensor as_sizes(const T* memory, const Ints& sizes) {
  Ints strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return tensor_over(memory, sizes, strides);
}

// Whether a tensor lies with channels last, without gaps.
inline bool is_dense_channels_last(const Tensor& tensor) {
  if (tensor.dim() < 4) return false;
  const Sizes strides = tensor.strides();
  const Ints own = format_strides(sizes_of(tensor), true);
  return std::equal(own.begin(), own.end(), strides.begin());
}

// A new uninitialised tensor of another's sizes, and of its strides where it has no gaps.
template <class T>
Tensor new_like(const Tensor& tensor) {
  const bool contiguous = tensor.is_contiguous();
  if (!contiguous && !is_dense_channels_last(tensor)) return Tensor(torch::stable::empty_like(tensor.share()));
  return new_formatted(sizes_of(tensor), kDtypeOf<T>, !contiguous);
}

inline bool same_sizes(const Tensor& one, const Tensor& other) {
  const Sizes a = one.sizes(), b = other.sizes();
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}
inline bool same_strides(const Tensor& one, const Tensor& other) {
  const Sizes a = one.strides(), b = other.strides();
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

inline Ints broadcast_strides(const Tensor& tensor, size_t rank) {
  return broadcast_strides(tensor.strides(), tensor.sizes(), rank);
}

// The dimensions from the outermost in memory to the innermost.
inline std::vector<size_t> order_of(const Ints& strides) {
  std::vector<size_t> order(strides.size());
  for (size_t d = 0; d < order.size(); ++d) order[d] = d;
  std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return strides[x] > strides[y]; });
  return order;
}

// a op b, for any strides. The result has the strides of the first operand that has the result's sizes.
template <class T>
Tensor combined(BinaryKind kind, const Tensor& a, const Tensor& b) {
  const Ints a_sizes = sizes_of(a), b_sizes = sizes_of(b);
  const Ints sizes = a_sizes == b_sizes ? a_sizes : broadcast_sizes(a_sizes, b_sizes);
  Tensor result = a_sizes == sizes   ? new_like<T>(a)
                  : b_sizes == sizes ? new_like<T>(b)
                                     : new_tensor(sizes, kDtypeOf<T>);
  const int64_t count = result.numel();
  if (count == 0) return result;
  T* const to = mutable_data<T>(result);
  if (a_sizes == b_sizes && same_strides(a, result) && same_strides(b, result)) {
    const auto& kernels = elementwise_kernels().get<T>();
    parallel_range(count, kCopyWork, [&](int64_t first, int64_t last) {
      kernels.binary(kind, data<T>(a) + first, 1, data<T>(b) + first, 1, last - first, to + first);
    });
    return result;
  }
  const Ints to_strides = broadcast_strides(result, sizes.size());
  combine_arrays<T>(kind, {data<T>(a), broadcast_strides(a, sizes.size())},
                    {data<T>(b), broadcast_strides(b, sizes.size())}, kIdentity, to, to_strides, sizes,
                    order_of(to_strides));
  return result;
}

// a op number, or number op a.
template <class T>
Tensor combined(BinaryKind kind, const Tensor& a, T number, bool reverses) {
  Tensor result = new_like<T>(a);
  const Tensor alike = same_strides(a, result) ? a.borrow() : dense(a);
  if (!same_strides(alike, result)) result = new_tensor(sizes_of(a), kDtypeOf<T>);
  combine_with_number(kind, data<T>(alike), number, reverses, result.numel(), mutable_data<T>(result));
  return result;
}

// condition is not 0 ? a : b, for any strides. An undefined operand stands for the number. The result has the strides
// of the first of a and b that has the result's sizes.
template <class T>
Tensor chosen(const Tensor& condition, const Tensor& a, const Tensor& b, T number) {
  const Tensor* const operands[3] = {&condition, &a, &b};
  Ints sizes;
  for (const Tensor* operand : operands) {
    if (operand->defined()) sizes = broadcast_sizes(sizes, sizes_of(*operand));
  }
  const auto has_all = [&](const Tensor& tensor) { return tensor.defined() && sizes_of(tensor) == sizes; };
  Tensor result = has_all(a) ? new_like<T>(a) : has_all(b) ? new_like<T>(b) : new_tensor(sizes, kDtypeOf<T>);
  std::array<const T*, 3> from;
  std::array<Ints, 3> strides;
  for (size_t i = 0; i < 3; ++i) {
    const bool is_number = !operands[i]->defined();
    from[i] = is_number ? &number : data<T>(*operands[i]);
    strides[i] = is_number ? Ints(sizes.size(), 0) : broadcast_strides(*operands[i], sizes.size());
  }
  const Ints to_strides = broadcast_strides(result, sizes.size());
  choose_arrays(from, strides, mutable_data<T>(result), to_strides, sizes, order_of(to_strides));
  return result;
}

// The gradient of a broadcast operand of these sizes: it is summed over what was broadcast.
inline Tensor reduced(Tensor gradient, const Ints& sizes) {
  const Ints own = sizes_of(gradient);
  if (own == sizes) return gradient;
  const size_t ahead = own.size() - sizes.size();
  Ints dims;
  for (size_t d = 0; d < own.size(); ++d) {
    if (d < ahead || (sizes[d - ahead] == 1 && own[d] != 1)) dims.push_back(static_cast<int64_t>(d));
  }
  if (!dims.empty()) gradient = sum_over(gradient, dims);
  return reshaped(gradient, sizes);
}

}  // namespace fastnn
