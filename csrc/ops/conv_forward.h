// Forward of the convolution: a plan, kept for the next call of its kind, and the kernels by it.
#pragma once

#include <array>
#include <cstring>

#include "../kernels/conv/problem.h"
#include "conv_problem.h"

namespace fastnn {

// Field by field, since keys are compared byte by byte.
inline void set_machine(Machine& machine) {
  const Isa isa = active_isa();
  machine.vector_bytes = isa == Isa::baseline ? 16 : 64;
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == Isa::avx2) machine.vector_bytes = 32;
  machine.has_pairs = isa_multiplies_pairs();
  machine.has_matrix = isa_multiplies_matrices();
#endif
}

// What a plan follows from, to be compared byte by byte.
struct PlanKey {
  ConvPoolGeometry geometry;
  PlanRequest request;
  Machine machine;

  PlanKey() { std::memset(static_cast<void*>(this), 0, sizeof(*this)); }  // what lies between the fields, too
  bool operator==(const PlanKey& other) const { return std::memcmp(this, &other, sizeof(*this)) == 0; }
};

// The plans of a thread's last calls: planning takes microseconds, which small calls consist of.
inline const ConvPlan& plan_for(const PlanKey& key) {
  constexpr size_t kKept = 32;
  struct Entry {
    PlanKey key;
    ConvPlan plan;
  };
  static thread_local std::array<Entry, kKept> entries{};
  static thread_local size_t next = 0;
  for (Entry& entry : entries) {
    if (entry.key == key) return entry.plan;
  }
  Entry& entry = entries[next++ % kKept];
  entry.plan = plan_forward(key.geometry, key.request, key.machine);
  entry.key = key;
  return entry.plan;
}

// Whether each image lies without gaps, contiguous or channels last.
inline bool is_dense_image(const Tensor& tensor, bool channels_last) {
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

// A tensor as the kernels read it: each image contiguous or channels last, the strides of dimensions of one element as
// that has them.
struct PlainImages {
  bool channels_last;
  Tensor tensor;
  ConvLayout layout;

  explicit PlainImages(const Tensor& given)
      : channels_last(!is_dense_image(given, false) && is_dense_image(given, true)),
        tensor(channels_last || is_dense_image(given, false) ? given.borrow() : dense(given)) {
    const int64_t rank = tensor.dim(), channels = tensor.size(1);
    int64_t stride = channels_last ? channels : 1;
    layout.d[0] = layout.d[1] = 0;
    for (int64_t d = 2; d >= 0; --d) {
      layout.d[d] = stride;
      if (rank - 3 + d >= 2) stride *= tensor.size(rank - 3 + d);
    }
    layout.c = channels_last ? 1 : stride;
    layout.n = tensor.size(0) > 1 ? tensor.stride(0) : channels * (channels_last ? stride / channels : stride);
  }
};

template <class T>
void run_conv(ConvCall<T>& call, const ConvPlan& plan, int64_t threads, Compute<T>* packed) {
  const ConvKernels<T>& kernels = conv_kernels().get<T>();
  call.plan = &plan;
  const int64_t chunks = std::min(threads, plan.items);
  const auto lines = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const int64_t packed_bytes = packed ? 0 : lines(checked_product(plan.packed_size, sizeof(Compute<T>)));
  const int64_t scratch = lines(plan.scratch_size);
  const Scratch<char> memory(checked_sum(packed_bytes, checked_product(chunks, scratch)));
  call.packed = packed ? packed : reinterpret_cast<Compute<T>*>(memory.get());
  if (!packed) {
    constexpr int64_t kSmallWeight = 8192;  // elements, packed before a second thread has come
    parallel_chunks(plan.packed_size < kSmallWeight ? 1 : std::min(threads, plan.pack_items), plan.pack_items,
                    [&](int64_t, int64_t first, int64_t last) { kernels.pack(call, first, last); });
  }
  parallel_chunks(chunks, plan.items, [&](int64_t chunk, int64_t first, int64_t last) {
    kernels.run(call, first, last, memory.get() + packed_bytes + chunk * scratch);
  });
}

}  // namespace fastnn
