// fastnn::network runs a whole network in one call, for inference. It takes the network's program, its weights and the
// packed weights. fastnn::network_of_parameters takes the parameters themselves, and packs them at every call.
#include <memory>

#include "../ops/register.h"
#include "plan.h"

namespace fastnn {
namespace {

Expected check_kind(const char* op, const Tensor& first, const char* name) {
  const Expected kind = check_first(first, op, name);
  FASTNN_CHECK(kind.dtype != ScalarType::BFloat16, op, ": not implemented for BFloat16; use float32 or float64");
  return kind;
}

Expected check_weights(const char* op, const Tensor& weights) {
  const Expected kind = check_kind(op, weights, "weights");
  FASTNN_CHECK(weights.dim() == 1 && weights.is_contiguous(), op, ": expected weights to be 1D and contiguous");
  return kind;
}

// The format in which an input is given. One that has neither is copied to be contiguous.
Format format_of(const Tensor& input) {
  if (input.is_contiguous() || input.dim() < 3) return Format::contiguous;
  const Ints sizes = sizes_of(input), dense = ValueType{sizes, Format::channels_last}.strides();
  const Sizes strides = input.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && strides[d] != dense[d]) return Format::contiguous;
  }
  return Format::channels_last;
}

// The tensor if it lies as the value's type says, else a copy that does; valid while the given tensor lives.
template <class T>
Tensor in_format(const Tensor& given, const ValueType& value) {
  if (value.channels_last() || given.is_contiguous()) return given.borrow();
  if (format_of(given) == Format::contiguous || given.scalar_type() != kDtypeOf<T>) return dense(given);
  const Tensor copy = new_tensor(value.sizes, kDtypeOf<T>);
  const Ints from = ValueType{value.sizes, Format::channels_last}.strides();
  copy_array(data<T>(given), from, mutable_data<T>(copy), value.strides(), value.sizes,
             memory_order(value.sizes.size(), false));
  return copy;
}

// A network, bound to weights, and its plans for the sizes of the last calls.
template <class T>
struct Bound {
  std::string program;
  std::vector<WeightPiece<T>> weights;
  bool joined;
  Network<T> network;

  Bound(const Tensor* first, size_t count, bool joined, const std::string& program)
      : program(program), weights(first, first + count), joined(joined), network(program, weights, joined) {}

  bool is_of(const Tensor* first, size_t count, bool joined, const std::string& program) const {
    if (this->joined != joined || weights.size() != count || this->program != program) return false;
    return std::equal(weights.begin(), weights.end(), first,
                      [](const auto& piece, const Tensor& tensor) { return piece.is(tensor); });
  }

  struct Planned {
    std::vector<InputShape> inputs;
    Isa isa;
    int64_t threads;
    Plan<T> plan;
  };
  std::vector<std::unique_ptr<Planned>> planned;  // the one that was used last is in front

  const Plan<T>& plan_for(const Tensor* inputs, const Kernels<T>& kernels) {
    constexpr size_t kKept = 16;
    const int64_t threads = torch::stable::get_num_threads();
    for (size_t i = 0; i < planned.size(); ++i) {
      if (planned[i]->isa != kernels.isa || planned[i]->threads != threads || !has_shapes(planned[i]->inputs, inputs))
        continue;
      std::rotate(planned.begin(), planned.begin() + static_cast<ptrdiff_t>(i),
                  planned.begin() + static_cast<ptrdiff_t>(i) + 1);
      return planned[0]->plan;
    }
    std::vector<InputShape> shapes;
    for (size_t i = 0; i < network.inputs.size(); ++i) {
      network.inputs[i].check(inputs[i].sizes(), i);
      shapes.push_back({sizes_of(inputs[i]), format_of(inputs[i])});
    }
    auto made = std::make_unique<Planned>(Planned{shapes, kernels.isa, threads, Plan<T>(network, shapes, kernels)});
    if (planned.size() >= kKept) planned.pop_back();
    planned.insert(planned.begin(), std::move(made));
    return planned[0]->plan;
  }

 private:
  static bool has_shapes(const std::vector<InputShape>& known, const Tensor* inputs) {
    for (size_t i = 0; i < known.size(); ++i) {
      const Sizes sizes = inputs[i].sizes();
      const Ints& own = known[i].sizes;
      if (sizes.size() != own.size() || !std::equal(sizes.begin(), sizes.end(), own.begin()) ||
          format_of(inputs[i]) != known[i].format)
        return false;
    }
    return true;
  }
};

constexpr int64_t kMostFolded = 128 << 20;  // bytes

// The networks that this thread used last. They are kept so that a program is not read anew at every call, the older
// ones only while the weights that all have computed take less than kMostFolded.
template <class T>
Bound<T>& bound_network(const Tensor* first, size_t count, bool joined, const std::string& program) {
  constexpr size_t kKept = 16;
  static thread_local std::vector<std::unique_ptr<Bound<T>>> kept;
  for (size_t i = 0; i < kept.size(); ++i) {
    if (!kept[i]->is_of(first, count, joined, program)) continue;
    std::rotate(kept.begin(), kept.begin() + static_cast<ptrdiff_t>(i), kept.begin() + static_cast<ptrdiff_t>(i) + 1);
    return *kept[0];
  }
  auto made = std::make_unique<Bound<T>>(first, count, joined, program);
  kept.insert(kept.begin(), std::move(made));
  int64_t folded = 0;
  size_t fitting = 0;
  while (fitting < std::min(kept.size(), kKept)) {
    for (const Fold<T>& fold : kept[fitting]->network.folds) folded = checked_sum(folded, fold.bytes());
    if (fitting > 0 && folded > kMostFolded) break;
    ++fitting;
  }
  kept.resize(fitting);
  return *kept[0];
}

ScalarType dtype_of(ElementKind elements, ScalarType numbers) {
  return elements == ElementKind::integers   ? ScalarType::Long
         : elements == ElementKind::booleans ? ScalarType::Bool
                                             : numbers;
}

template <class T>
std::vector<Tensor> run(Bound<T>& bound, const Tensor* inputs, size_t count, const Expected& kind, const char* packed,
                        int64_t packed_bytes) {
  const Network<T>& network = bound.network;
  FASTNN_CHECK(count == network.inputs.size(), kind.op, ": expected ", network.inputs.size(), " inputs, got ", count);
  for (size_t i = 0; i < count; ++i) {
    const ScalarType dtype = dtype_of(network.inputs[i].elements, kind.dtype);
    if (dtype == kind.dtype) {
      check_same_kind(inputs[i], kind, "input");
      continue;
    }
    check_plain(inputs[i], kind.op, "input");
    check_memory(inputs[i], kind.op, "input");
    FASTNN_CHECK(inputs[i].scalar_type() == dtype, kind.op, ": expected input ", i, " to be ",
                 dtype == ScalarType::Bool ? "bool" : "int64");
  }
  const Kernels<T> kernels = Kernels<T>::active();
  PackedReader reader(packed, packed_bytes, kernels.isa, sizeof(T));
  const Plan<T>& plan = bound.plan_for(inputs, kernels);
  std::vector<Tensor> dense_inputs, outputs;
  dense_inputs.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const ValueType& value = plan.values[static_cast<size_t>(network.inputs[i].value)];
    dense_inputs.push_back(in_format<T>(inputs[i], value));
  }
  for (const int64_t output : network.outputs) {
    const ValueType& value = plan.values[static_cast<size_t>(output)];
    outputs.push_back(new_tensor(value.sizes, dtype_of(value.elements, kind.dtype)));
  }
  const Scratch<T> memory(plan.memory);
  constexpr size_t kFew = 64;
  void* few[kFew];
  std::vector<void*> many(plan.values.size() > kFew ? plan.values.size() : 0);
  void** const at = many.empty() ? few : many.data();
  for (size_t value = 0; value < plan.values.size(); ++value) {
    const Place& place = plan.places[value];
    switch (place.kind) {
      case Place::input:
        at[value] = const_cast<void*>(dense_inputs[static_cast<size_t>(place.index)].const_data_ptr());
        at[value] = static_cast<T*>(at[value]) + place.offset;
        break;
      case Place::output:
        at[value] = static_cast<T*>(outputs[static_cast<size_t>(place.index)].mutable_data_ptr()) + place.offset;
        break;
      case Place::weight:
        at[value] = const_cast<T*>(network.weights[place.index].data) + place.offset;
        break;
      case Place::memory:
        at[value] = memory.get() + place.offset;
        break;
      case Place::nowhere:
        at[value] = nullptr;
    }
  }
  std::vector<void*> given;
  std::vector<Fold<T>>& folds = bound.network.folds;
  size_t next_fold = 0;
  for (size_t i = 0; i < network.steps.size(); ++i) {
    if (plan.is_idle[i]) continue;
    const Layer<T>& layer = *network.steps[i].layer;
    // A fold runs just before the layer that takes its weights, which are in cache then.
    for (; next_fold < folds.size() && folds[next_fold].line() < network.steps[i].line; ++next_fold) {
      folds[next_fold].run();
    }
    reader.begin_step(i);
    given.clear();
    for (const int64_t value : layer.inputs) given.push_back(at[value]);
    for (const int64_t value : layer.outputs) given.push_back(at[value]);
    layer.run({plan.sites[i], given.data(), given.data() + layer.inputs.size(), reader});
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!plan.copied[i]) continue;
    const size_t bytes = static_cast<size_t>(outputs[i].numel()) * outputs[i].element_size();
    if (bytes) std::memcpy(outputs[i].mutable_data_ptr(), at[network.outputs[i]], bytes);
  }
  return outputs;
}

std::vector<Tensor> run_packed(const Tensor* inputs, size_t count, const Tensor& weights, const Tensor& packed,
                               const std::string& program) {
  const char* op = "network";
  const Expected kind = check_weights(op, weights);
  check_plain(packed, op, "packed");
  check_memory(packed, op, "packed");
  FASTNN_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(), op,
               ": expected packed to be uint8, 1D and contiguous");
  return with_kernel_dtype(kind.dtype, [&](auto type) {
    using T = decltype(type);
    Bound<T>& bound = bound_network<T>(&weights, 1, true, program);
    return run(bound, inputs, count, kind, data<char>(packed), packed.numel());
  });
}

std::vector<Tensor> network(const std::vector<Tensor>& inputs, const Tensor& weights, const Tensor& packed,
                            const std::string& program) {
  return run_packed(inputs.data(), inputs.size(), weights, packed, program);
}

// The same for one input and one output. Lists of them would take a microsecond.
Tensor network_of_one(const Tensor& input, const Tensor& weights, const Tensor& packed, const std::string& program) {
  std::vector<Tensor> outputs = run_packed(&input, 1, weights, packed, program);
  FASTNN_CHECK(outputs.size() == 1, "network_of_one: the program has ", outputs.size(), " outputs");
  return std::move(outputs[0]);
}

// parameters: in the program's order, each as its layer's parameter in torch. They are read anew at every call.
std::vector<Tensor> network_of_parameters(const std::vector<Tensor>& inputs, const std::vector<Tensor>& parameters,
                                          const std::string& program) {
  const char* op = "network_of_parameters";
  FASTNN_CHECK(!inputs.empty() && !parameters.empty(), op, ": expected at least one input and one parameter");
  const Expected kind = check_kind(op, parameters[0], "parameters");
  for (const Tensor& parameter : parameters) {
    check_same_kind(parameter, kind, "parameters");
    FASTNN_CHECK(parameter.is_contiguous(), op, ": expected parameters to be contiguous");
  }
  return with_kernel_dtype(kind.dtype, [&](auto type) {
    using T = decltype(type);
    Bound<T>& bound = bound_network<T>(parameters.data(), parameters.size(), false, program);
    return run(bound, inputs.data(), inputs.size(), kind, nullptr, 0);
  });
}

// sizes: the sizes of all inputs, one input behind the other. channels_last: the numbers of the inputs that lie
// channels last. The weights are packed for such inputs.
Tensor pack_network(const Tensor& weights, const std::string& program, const Ints& sizes, const Ints& channels_last) {
  const char* op = "pack_network";
  const Expected kind = check_weights(op, weights);
  FASTNN_CHECK(std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size > 0; }), op,
               ": expected sizes of at least 1, got ", to_string(sizes));
  return with_kernel_dtype(kind.dtype, [&](auto type) {
    using T = decltype(type);
    const Network<T> network(program, {WeightPiece<T>(weights)}, true);
    std::vector<InputShape> shapes;
    size_t next = 0;
    for (const NetworkInput& input : network.inputs) {
      const size_t rank = input.ranges.size();
      FASTNN_CHECK(sizes.size() - next >= rank, op, ": expected more sizes than ", sizes.size());
      const auto first = sizes.begin() + static_cast<ptrdiff_t>(next);
      shapes.push_back({Ints(first, first + static_cast<ptrdiff_t>(rank))});
      input.check(shapes.back().sizes, shapes.size() - 1);
      next += rank;
    }
    FASTNN_CHECK(next == sizes.size(), op, ": expected ", next, " sizes, got ", sizes.size());
    for (const int64_t input : channels_last) {
      FASTNN_CHECK(input >= 0 && input < static_cast<int64_t>(shapes.size()), op, ": there is no input ", input);
      shapes[static_cast<size_t>(input)].format = Format::channels_last;
    }
    const Kernels<T> kernels = Kernels<T>::active();
    const Plan<T> plan(network, shapes, kernels);
    PackedWriter counted(nullptr, kernels.isa, sizeof(T));
    plan.pack(counted);
    Tensor packed = new_tensor({counted.bytes()}, ScalarType::Byte);
    char* const memory = mutable_data<char>(packed);
    advise_huge_pages(memory, static_cast<size_t>(counted.bytes()));
    PackedWriter written(memory, kernels.isa, sizeof(T));
    plan.pack(written);
    return packed;
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // program: see program.h; fastnn/network_program.py writes it. packed: the result of pack_network. If it does not
  // fit this machine, dtype or input, the weights are packed again, which costs time and nothing else.
  m.def("network(Tensor[] inputs, Tensor weights, Tensor packed, str program) -> Tensor[]");
  m.def("network_of_one(Tensor input, Tensor weights, Tensor packed, str program) -> Tensor");
  m.def("pack_network(Tensor weights, str program, int[] sizes, int[] channels_last=[]) -> Tensor");
  m.def("network_of_parameters(Tensor[] inputs, Tensor[] parameters, str program) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("network", FASTNN_BOX(network));
  m.impl("network_of_one", FASTNN_BOX(network_of_one));
  m.impl("pack_network", FASTNN_BOX(pack_network));
  m.impl("network_of_parameters", FASTNN_BOX(network_of_parameters));
}

}  // namespace
}  // namespace fastnn
