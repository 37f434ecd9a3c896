// Plans of convolutions, which are cached for the next call of the same kind, and the run of our kernels by a plan.
#pragma once

#include <array>
#include <cstring>

#include "../kernels/conv/problem.h"
#include "conv_problem.h"

namespace fastnn {

// Everything that a plan follows from. Two keys are compared byte by byte.
template <class Request>
struct KeyOf {
  ConvPoolGeometry geometry;
  Request request;
  Machine machine;

  // A call reads its kernels' table once, since another thread may change the instruction set, and a plan is made for
  // the kernels of that one table.
  template <class Kernels>
  KeyOf(const ConvPoolGeometry& sizes, const Kernels& kernels) {
    std::memset(static_cast<void*>(this), 0, sizeof(*this));  // the bytes between the fields, too
    geometry = sizes;
    machine = kernels.machine;
    machine.multiplies_pairs = machine.multiplies_pairs && isa_multiplies_pairs();
    machine.multiplies_matrices = machine.multiplies_matrices && isa_multiplies_matrices();
  }
  bool operator==(const KeyOf& other) const { return std::memcmp(this, &other, sizeof(*this)) == 0; }
};
using PlanKey = KeyOf<PlanRequest>;

// The plan of a key, taken from this thread's cache or made by make(geometry, request, machine). Planning
// takes microseconds, which is as long as a small call takes. The result stays valid until this thread has asked for
// kKept other plans.
template <class Request, class Plan>
const Plan& kept_plan(const KeyOf<Request>& key,
                      Plan (*make)(const ConvPoolGeometry&, const Request&, const Machine&)) {
  constexpr size_t kKept = 32;
  struct Entry {
    std::optional<KeyOf<Request>> key;
    Plan plan;
  };
  static thread_local std::array<Entry, kKept> entries{};
  static thread_local size_t next = 0;
  for (Entry& entry : entries) {
    if (entry.key && *entry.key == key) return entry.plan;
  }
  Entry& entry = entries[next++ % kKept];
  entry.plan = make(key.geometry, key.request, key.machine);
  entry.key = key;
  return entry.plan;
}
inline const ConvPlan& plan_for(const PlanKey& key) {
  return kept_plan(key, plan_forward);
}

// The key of a call that uses these kernels and all of torch's threads. `algorithm` is the algorithm to take, or -1.
template <class T>
PlanKey plan_key(const ConvKernels<T>& kernels, const ConvPoolGeometry& geometry, bool input_channels_last,
                 bool output_channels_last, int64_t algorithm) {
  PlanKey key(geometry, kernels);
  key.request.threads = torch::stable::get_num_threads();
  key.request.element_bytes = sizeof(T);
  key.request.input_channels_last = input_channels_last;
  key.request.output_channels_last = output_channels_last;
  key.request.algorithm = static_cast<int32_t>(algorithm);
  return key;
}

// A tensor as the kernels read it: each image is contiguous or channels last, without gaps, and dimensions of one
// element have the strides of that format. The given tensor must outlive this object.
struct PlainImages {
  bool channels_last;
  Tensor tensor;
  ConvLayout layout;

  explicit PlainImages(const Tensor& given)
      : channels_last(!is_dense(given, false) && is_dense(given, true)),
        tensor(channels_last || is_dense(given, false) ? given.borrow() : dense(given)) {
    const int64_t rank = tensor.dim(), channels = tensor.size(1);
    int64_t sizes[3] = {1, 1, 1};
    for (int64_t d = 2; d < rank; ++d) sizes[d + 3 - rank] = tensor.size(d);
    layout = channels_last ? channels_last_layout(channels, sizes) : contiguous_layout(channels, sizes);
    if (tensor.size(0) > 1) layout.n = tensor.stride(0);
  }

 private:
  static bool is_dense(const Tensor& tensor, bool channels_last) {
    int64_t stride = 1;
    const auto matches = [&](int64_t d) {
      const bool same = tensor.size(d) == 1 || tensor.stride(d) == stride;
      stride *= tensor.size(d);
      return same;
    };
    bool same = !channels_last || matches(1);
    for (int64_t d = tensor.dim(); d-- > 2;) same = same && matches(d);
    return same && (channels_last || matches(1));
  }
};

// Runs a call by our kernels, as its plan says. The plan's algorithm is not `stock`. packed: the weight in the
// plan's packed format, or null to pack the weight here.
template <class T>
void run_by_plan(const ConvKernels<T>& kernels, ConvCall<T>& call, const ConvPlan& plan, const Compute<T>* packed) {
  call.plan = &plan;
  const int64_t chunks = std::min(plan.threads, plan.items);
  const auto lines = [](int64_t bytes) { return checked_sum(bytes, 63) / 64 * 64; };
  const int64_t packed_bytes = packed ? 0 : lines(checked_product(plan.packed_size, sizeof(Compute<T>)));
  const int64_t scratch = lines(plan.scratch_size);
  const Scratch<char> memory(checked_sum(packed_bytes, checked_product(chunks, scratch)));
  call.packed = packed ? const_cast<Compute<T>*>(packed) : reinterpret_cast<Compute<T>*>(memory.get());
  if (!packed) {
    constexpr int64_t kSmallWeight = 8192;  // elements; a second thread would wake too late to help
    parallel_chunks(plan.packed_size < kSmallWeight ? 1 : std::min(plan.threads, plan.pack_items), plan.pack_items,
                    [&](int64_t, int64_t first, int64_t last) { kernels.pack(call, first, last); });
  }
  parallel_chunks(chunks, plan.items, [&](int64_t chunk, int64_t first, int64_t last) {
    kernels.run(call, first, last, memory.get() + packed_bytes + chunk * scratch);
  });
}

// A number of the packed format: plans with the same number and the same packed size can share a packed weight.
inline int64_t packing_of(const ConvPlan& plan) {
  int64_t order = 0;
  if (plan.algorithm == ForwardAlgorithm::pixels) order = plan.pixels.blocks;
  if (plan.algorithm == ForwardAlgorithm::direct) order = static_cast<int64_t>(plan.direct.elements);
  return order * kForwardAlgorithms + static_cast<int64_t>(plan.algorithm);
}

}  // namespace fastnn
