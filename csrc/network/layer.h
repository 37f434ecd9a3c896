// What a layer of a network is: a class that says which sizes its values have, in which formats it takes them, how it
// packs its weights, and how it runs. Each layer is one class in a file of network/layers/.
#pragma once

#include <memory>

#include "../kernels/conv/problem.h"
#include "../kernels/mlp.h"
#include "../kernels/rnn.h"
#include "../ops/tensor.h"
#include "packed.h"
#include "program.h"

namespace fastnn {

// How a value lies in memory: densely, either in torch's order of dimensions, or (images only) with the channels
// innermost.
enum class Format : int8_t { contiguous, channels_last };

// What a value holds: numbers of the network's dtype; int64, which an embedding takes; or booleans, which a cast takes.
enum class ElementKind : int8_t { numbers, integers, booleans };

// A value's sizes and where its elements lie.
struct ValueType {
  Ints sizes;
  Format format = Format::contiguous;
  ElementKind elements = ElementKind::numbers;
  // Where the value is a part of a concatenation of channels: the elements from a pixel to the next; else 0.
  int64_t pitch = 0;
  // Where the value is a part of another value that is read where it lies: the elements from one to the next along each
  // dimension; else empty.
  Ints part_strides = {};

  int64_t count() const {
    int64_t result = 1;
    for (const int64_t size : sizes) result = checked_product(result, size);
    return result;
  }
  bool channels_last() const { return format == Format::channels_last; }
  // The elements from one to the next along each dimension.
  Ints strides() const {
    if (!part_strides.empty()) return part_strides;
    const size_t rank = sizes.size();
    Ints strides(rank);
    int64_t stride = 1;
    const auto set_stride = [&](size_t d, int64_t size) {
      strides[d] = stride;
      stride = checked_product(stride, std::max<int64_t>(size, 1));
    };
    if (channels_last()) set_stride(1, pitch ? pitch : sizes[1]);
    for (size_t d = rank; d-- > 0;) {
      if (!channels_last() || d != 1) set_stride(d, sizes[d]);
    }
    return strides;
  }
};

// Whether both formats of a value are the same order of elements.
inline bool is_same_order(const Ints& sizes) {
  if (sizes.size() < 3 || sizes[1] == 1) return true;
  for (size_t d = 2; d < sizes.size(); ++d) {
    if (sizes[d] != 1) return false;
  }
  return true;
}

// The kernels that a plan is made for. The same kernels must run it, although another thread may choose another
// instruction set meanwhile.
template <class T>
struct Kernels {
  Isa isa;
  const ConvKernels<T>* conv;
  const MlpKernels<T>* mlp;
  const RnnForwardKernels<T>* rnn;

  static Kernels active() {
    Kernels kernels;
    do {
      kernels = {active_isa(), &conv_kernels().get<T>(), &mlp_kernels().get<T>(), &rnn_forward_kernels().get<T>()};
    } while (kernels.isa != active_isa());
    return kernels;
  }
};

// A layer in a network whose inputs have certain sizes. It holds what follows from these sizes, which is computed once
// and read by every call. `prepared` is what the layer itself has computed.
template <class T>
struct Site {
  Kernels<T> kernels;
  std::vector<ValueType> inputs, outputs;
  std::shared_ptr<const void> prepared;

  const Ints& sizes(size_t input) const { return inputs[input].sizes; }
  // Whether the layer has nothing to compute. Then nothing is prepared or run.
  bool is_empty() const {
    for (const ValueType& output : outputs) {
      if (output.count() != 0) return false;
    }
    return true;
  }
};

// Which formats a layer takes.
enum class FormatRule : int8_t {
  contiguous,  // all values must be contiguous
  alike,       // all values of the output's rank must have the same format
  input,       // the first input may have either format, all other values must be contiguous
  each,        // the first input may have either format, all other inputs must have the output's
};

// Where a call finds the values, in the order of the layer's inputs and outputs.
template <class T>
struct LayerCall {
  const Site<T>& site;
  const void* const* inputs;
  void* const* outputs;
  PackedReader& packed;

  const T* input(size_t i) const { return static_cast<const T*>(inputs[i]); }
  T* output(size_t i) const { return static_cast<T*>(outputs[i]); }
};

// A layer of float or double. It is immutable once it is read, and so shared by threads.
template <class T>
class Layer {
 public:
  std::vector<int64_t> inputs, outputs;  // numbers of values, without weights that the layer reads itself
  size_t sizes_only = 0;                 // how many of the last inputs are read only for their sizes

  virtual ~Layer() = default;
  // Sets the sizes of the site's outputs. Raises unless inputs of such sizes fit.
  virtual void set_sizes(Site<T>& site) const = 0;
  virtual FormatRule formats() const { return FormatRule::contiguous; }
  // The part of the layer's time that depends on the formats, in multiply-adds of vectors.
  virtual double cost(const Site<T>&) const { return 0; }
  // Computes what a call needs in addition to sizes and formats: it becomes Site::prepared.
  virtual std::shared_ptr<const void> prepare(const Site<T>&) const { return nullptr; }
  // Packs everything that `run` will ask `packed` for, in the same order.
  virtual void pack(const Site<T>&, PackedWriter&) const {}
  virtual void run(const LayerCall<T>& call) const = 0;
  // Whether the output is the input's memory, seen with other sizes. Then `run` is not called.
  virtual bool is_view(const Site<T>&) const { return false; }
  // If an output is a part of the first input and has the input's strides, returns how many elements of the input lie
  // before the output. Otherwise returns -1.
  virtual int64_t offset_in_input(const Site<T>&, size_t) const { return -1; }
  // Whether the layer checks by itself what its inputs hold. All others take numbers of the network's dtype.
  virtual bool takes_other_elements() const { return false; }
  // Whether the layer reads its inputs by their strides, so that they may be parts of other values.
  virtual bool reads_parts() const { return false; }
  // Whether the output is the inputs' channels one behind the other, channels last.
  virtual bool joins_channels(const Site<T>&) const { return false; }
  // Whether the layer can write an output that is a part of a concatenation: see ValueType::pitch.
  virtual bool writes_parts() const { return false; }
  // Takes over the work of the next layer, whose only input is this layer's output, which no other layer takes. Returns
  // false where that cannot be.
  virtual bool absorb(const Layer&) { return false; }
};

// The weights of a network, by their numbers among all values.
template <class T>
class Weights {
 public:
  bool are_packed = false;  // ahead of the calls, by Layer::pack

  struct Weight {
    const T* data = nullptr;  // null only where there is no weight
    Ints sizes;
  };

  void add(int64_t value, const T* data, const Ints& sizes) {
    static const T nothing{};  // the memory of tensors without elements
    if (static_cast<size_t>(value) >= all_.size()) all_.resize(value + 1);
    all_[value] = {data ? data : &nothing, sizes};
  }
  bool holds(int64_t value) const { return static_cast<size_t>(value) < all_.size() && all_[value].data; }
  const Weight& operator[](int64_t value) const { return all_[value]; }
  // The weight that is this input of a line. Raises where the input is no weight.
  const Weight& of(const ProgramLine& line, const char* name) const { return of(line, name, line.input(name)); }
  const Weight& of(const ProgramLine& line, const char* name, int64_t value) const {
    if (!holds(value)) line.refuse("its ", name, " is no weight");
    return all_[value];
  }
  // The data of such a weight, which must have these sizes; null where the line has no input of that name.
  const T* of(const ProgramLine& line, const char* name, const Ints& sizes) const {
    if (!line.has(name)) return nullptr;
    const Weight& weight = of(line, name);
    if (weight.sizes != sizes) {
      line.refuse("expected its ", name, " to be of size ", to_string(sizes), ", got ", to_string(weight.sizes));
    }
    return weight.data;
  }

 private:
  std::vector<Weight> all_;
};

// A kind of layer: its name in programs, its inputs and attributes, and how one is made.
struct LayerEntry {
  const char* name;
  std::vector<const char*> inputs;         // by name; "?" behind it: may be missing, "*": any number
  std::vector<AttributeEntry> attributes;  // ended by one without a name
  std::unique_ptr<Layer<float>> (*make_float)(const ProgramLine&, const Weights<float>&);
  std::unique_ptr<Layer<double>> (*make_double)(const ProgramLine&, const Weights<double>&);
};

template <template <class> class Kind>
LayerEntry layer_entry(const char* name, std::vector<const char*> inputs, std::vector<AttributeEntry> attributes) {
  attributes.push_back({nullptr, nullptr, nullptr});
  return {name, std::move(inputs), std::move(attributes),
          [](const ProgramLine& line, const Weights<float>& weights) -> std::unique_ptr<Layer<float>> {
            return std::make_unique<Kind<float>>(line, weights);
          },
          [](const ProgramLine& line, const Weights<double>& weights) -> std::unique_ptr<Layer<double>> {
            return std::make_unique<Kind<double>>(line, weights);
          }};
}

// The attributes of a layer that may include the activation and the max-pool behind it.
inline std::vector<AttributeEntry> with_activation_and_pool(std::vector<AttributeEntry> attributes) {
  const AttributeEntry more[] = {{"activation", "activation", "identity"},
                                 {"pool", "ints", "1"},
                                 {"pool_stride", "ints", ""},
                                 {"pool_padding", "ints", "0"},
                                 {"pool_dilation", "ints", "1"},
                                 {"ceil_mode", "bool", "0"}};
  attributes.insert(attributes.end(), std::begin(more), std::end(more));
  return attributes;
}

inline int64_t product(const Ints& sizes, size_t first, size_t last) {
  int64_t result = 1;
  for (size_t i = first; i < last; ++i) result = checked_product(result, sizes[i]);
  return result;
}

// A dimension as Python counts it: from the end where the number is negative.
inline size_t dimension_of(const ProgramLine& line, int64_t given, size_t rank) {
  const int64_t count = static_cast<int64_t>(rank);
  if (given < -count || given >= count) line.refuse("dimension ", given, " of ", count, " dimensions");
  return static_cast<size_t>(given < 0 ? given + count : given);
}

}  // namespace fastnn
