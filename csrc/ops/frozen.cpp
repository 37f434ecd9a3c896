// fastnn::frozen: a whole network in one call, from a program, its weights and their packed form; and the same from a
// network's own parameters, which are packed at every call.
#include <memory>

#include "frozen_stages.h"
#include "register.h"

namespace fastnn {
namespace {

template <class T>
struct FrozenNetwork {
  std::vector<std::unique_ptr<FrozenStage<T>>> stages;

  FrozenNetwork(const Expected& kind, const std::vector<WeightPiece<T>>& weights, bool joined,
                const std::string& program) {
    WeightReader<T> reader(weights, joined);
    Words words(program);
    while (!words.ends()) {
      const std::string name = words.word();
      if (name == "mlp") {
        stages.push_back(std::make_unique<FrozenMlp<T>>(words, reader));
      } else if (name == "conv") {
        stages.push_back(std::make_unique<FrozenConv<T>>(words, reader, kind));
      } else if (name == "rnn") {
        stages.push_back(std::make_unique<FrozenRnn<T>>(words, reader));
      } else if (name == "input") {
        stages.push_back(std::make_unique<FrozenInput<T>>(words));
      } else {
        FASTNN_CHECK(name == "flatten", "frozen: the program has no stage \"", name, "\"");
        stages.push_back(std::make_unique<FrozenFlatten<T>>(words));
      }
    }
    FASTNN_CHECK(!stages.empty(), "frozen: expected at least one stage");
    FASTNN_CHECK(reader.ends(), "frozen: there are more weights than the program asks for");
  }

  // An input's sizes, and those of each stage's output. Raises unless the input fits, and so does every tensor's number
  // of bytes into 64 bits.
  std::vector<Ints> sizes_from(Ints input) const {
    std::vector<Ints> sizes;
    sizes.reserve(stages.size() + 1);
    const auto add = [&](Ints next) {
      checked_product(product(next, 0, next.size()), sizeof(T));
      sizes.push_back(std::move(next));
    };
    add(std::move(input));
    for (const auto& stage : stages) {
      try {
        add(stage->output_sizes(sizes.back()));
      } catch (const std::runtime_error& error) {
        if (sizes.size() == 1) throw;
        // In the caller's terms too, who knows nothing of the sizes inside of the network.
        fail("frozen: an input of size ", to_string(sizes[0]), " does not fit the network: ", error.what());
      }
    }
    return sizes;
  }

  void pack(const std::vector<Ints>& sizes, PackedWriter& packed) const {
    for (size_t i = 0; i < stages.size(); ++i) stages[i]->pack(sizes[i], packed);
  }
};

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

template <class Body>
auto with_frozen_dtype(ScalarType dtype, const Body& body) {
  return dtype == ScalarType::Double ? body(double{}) : body(float{});
}

// A network and what follows from an input's sizes. A thread keeps its last, so that a small network is not read anew
// at every call.
template <class T>
struct Plan {
  std::string program;
  std::vector<WeightPiece<T>> weights;
  bool joined;
  FrozenNetwork<T> network;
  std::vector<Ints> sizes{};  // of the input and of each stage's output
  int64_t largest = 0;        // elements of a stage's output, whole cache lines
  size_t last = 0;            // the last stage that computes

  Plan(const Expected& kind, const Tensor* first, size_t count, bool joined, const std::string& program)
      : program(program), weights(first, first + count), joined(joined), network(kind, weights, joined, program) {}

  bool is_of(const Tensor* first, size_t count, bool joined, const std::string& program) const {
    if (this->joined != joined || weights.size() != count || this->program != program) return false;
    return std::equal(weights.begin(), weights.end(), first,
                      [](const auto& piece, const Tensor& tensor) { return piece.is(tensor); });
  }

  void set_sizes(const Sizes& input) {
    if (!sizes.empty() && input.size() == sizes[0].size() && std::equal(input.begin(), input.end(), sizes[0].begin())) {
      return;
    }
    // All that follows from the sizes changes together, once no stage has refused them.
    std::vector<Ints> accepted = network.sizes_from(Ints(input.begin(), input.end()));
    int64_t most = 0;
    size_t computes = 0;
    for (size_t i = 0; i < network.stages.size(); ++i) {
      if (!network.stages[i]->only_reshapes()) computes = i;
      most = std::max(most, product(accepted[i + 1], 0, accepted[i + 1].size()));
    }
    constexpr int64_t line = 64 / sizeof(T);
    largest = checked_sum(most, line - 1) / line * line;
    last = computes;
    sizes = std::move(accepted);
  }
};

template <class T>
const Plan<T>& plan_of(const Expected& kind, const Tensor* first, size_t count, bool joined, const std::string& program,
                       const Sizes& input) {
  static thread_local std::unique_ptr<Plan<T>> kept;
  if (!kept || !kept->is_of(first, count, joined, program)) {
    kept.reset();
    kept = std::make_unique<Plan<T>>(kind, first, count, joined, program);
  }
  kept->set_sizes(input);
  return *kept;
}

template <class T>
Tensor run(const Plan<T>& plan, const Tensor& input, PackedReader reader) {
  Tensor output = new_tensor(plan.sizes.back(), input.scalar_type());
  if (output.numel() == 0) return output;
  const auto& stages = plan.network.stages;
  const Scratch<T> between(plan.last > 0 ? checked_product(2, plan.largest) : 0);
  const T* from = data<T>(input);
  int64_t next = 0;
  for (size_t i = 0; i <= plan.last; ++i) {
    if (stages[i]->only_reshapes()) continue;
    T* to = i == plan.last ? mutable_data<T>(output) : between.get() + plan.largest * (next++ % 2);
    stages[i]->run(from, plan.sizes[i], to, reader);
    from = to;
  }
  if (stages[plan.last]->only_reshapes()) std::memcpy(mutable_data<T>(output), from, output.numel() * sizeof(T));
  return output;
}

Tensor frozen(const Tensor& input, const Tensor& weights, const Tensor& packed, const std::string& program) {
  const char* op = "frozen";
  const Expected kind = check_weights(op, weights);
  check_same_kind(input, kind, "input");
  check_plain(packed, op, "packed");
  check_memory(packed, op, "packed");
  FASTNN_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(), op,
               ": expected packed to be uint8, 1D and contiguous");
  const Tensor dense_input = dense(input);
  return with_frozen_dtype(kind.dtype, [&](auto type) {
    using T = decltype(type);
    const Plan<T>& plan = plan_of<T>(kind, &weights, 1, true, program, dense_input.sizes());
    return run(plan, dense_input, PackedReader(data<char>(packed), packed.numel(), sizeof(T)));
  });
}

// parameters: in the program's order, as their layers have them.
Tensor frozen_unpacked(const Tensor& input, const std::vector<Tensor>& parameters, const std::string& program) {
  const char* op = "frozen_unpacked";
  const Expected kind = check_kind(op, input, "input");
  std::vector<Tensor> weights;
  weights.reserve(parameters.size());
  for (const Tensor& parameter : parameters) {
    check_same_kind(parameter, kind, "parameters");
    weights.push_back(dense(parameter));
  }
  const Tensor dense_input = dense(input);
  return with_frozen_dtype(kind.dtype, [&](auto type) {
    using T = decltype(type);
    const Plan<T>& plan = plan_of<T>(kind, weights.data(), weights.size(), false, program, dense_input.sizes());
    return run(plan, dense_input, PackedReader(nullptr, 0, sizeof(T)));
  });
}

// sizes: an input's, for which the packing is best.
Tensor frozen_packed(const Tensor& weights, const std::string& program, const Ints& sizes) {
  const char* op = "frozen_packed";
  const Expected kind = check_weights(op, weights);
  FASTNN_CHECK(std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size > 0; }), op,
               ": expected sizes of at least 1, got ", to_string(sizes));
  return with_frozen_dtype(kind.dtype, [&](auto type) {
    using T = decltype(type);
    const FrozenNetwork<T> network(kind, {WeightPiece<T>(weights)}, true, program);
    const std::vector<Ints> all_sizes = network.sizes_from(sizes);
    PackedWriter counted(nullptr, sizeof(T));
    network.pack(all_sizes, counted);
    Tensor packed = new_tensor({counted.bytes()}, ScalarType::Byte);
    PackedWriter written(mutable_data<char>(packed), sizeof(T));
    network.pack(all_sizes, written);
    return packed;
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // program: see frozen_stages.h; fastnn/frozen.py writes it. packed: of frozen_packed; one that does not fit this
  // machine, dtype or input costs time and nothing else.
  m.def("frozen(Tensor input, Tensor weights, Tensor packed, str program) -> Tensor");
  m.def("frozen_packed(Tensor weights, str program, int[] sizes) -> Tensor");
  m.def("frozen_unpacked(Tensor input, Tensor[] parameters, str program) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("frozen", FASTNN_BOX(frozen));
  m.impl("frozen_packed", FASTNN_BOX(frozen_packed));
  m.impl("frozen_unpacked", FASTNN_BOX(frozen_unpacked));
}

}  // namespace
}  // namespace fastnn
