// The arguments of fastnn::conv_relu_max_pool, checked, and what follows from them.
#pragma once

#include "../kernels/conv_relu_max_pool.h"
#include "tensor.h"

namespace fastnn {

// The operators' `geometry`, which outlives this: one list, since the dispatcher takes 0.5 us for each.
struct ConvPoolArguments {
  Sizes stride, padding, dilation, pool_kernel_size, pool_stride, pool_padding, pool_dilation;  // [dimensions]
  int64_t groups;
  bool ceil_mode;
};

struct ConvPoolProblem {
  Expected kind;
  int64_t dims;
  ConvPoolGeometry geometry;
  double work;  // floating-point operations of the convolution
};

// Raises, in stock's words where stock has them, unless the arguments make a problem.
ConvPoolProblem check_problem(const char* op, const Tensor& input, const Tensor& weight,
                              const std::optional<Tensor>& bias, const Ints& geometry);

// The same of an input and a weight of these sizes.
ConvPoolProblem problem_of(const Expected& kind, const Sizes& input, const Sizes& weight, const Ints& geometry);

// Plans alike in this and in packed_size take the same packed weight.
inline int64_t packing_of(const ConvPoolPlan& plan) {
  return static_cast<int64_t>(plan.algorithm) * 4 + static_cast<int64_t>(plan.order);
}

// A kernel of one element that strides over the input: the same over a view of what it meets.
inline void skip_unused_input(ConvPoolGeometry& g, ConvLayout& input) {
  for (int d = 0; d < 3; ++d) {
    if (g.kernel[d] != 1 || g.padding[d] != 0) continue;
    g.input[d] = g.conv[d];
    input.d[d] *= g.stride[d];
    g.stride[d] = 1;
  }
}

// Nor are conv pixels beyond the last window of use to forward.
inline void skip_unused(ConvPoolGeometry& g, ConvLayout& input) {
  for (int d = 0; d < 3; ++d) {
    const int64_t used = (g.output[d] - 1) * g.pool_stride[d] - g.pool_padding[d] + g.pool_extent(d);
    g.conv[d] = std::max<int64_t>(1, std::min(g.conv[d], used));
  }
  skip_unused_input(g, input);
}

// Decides how a call, whose unused pixels have been left out, is done by so many threads, by its sizes, and where large
// elements would spoil the result by those.
template <class T>
void choose_plan(const ConvForwardKernels<T>& kernels, ConvPoolForward<T>& call, int64_t threads) {
  call.plan = kernels.plan(call.geometry, call.input_layout, call.weight_layout, threads, false);
  if (!kernels.plan_holds(call)) {
    call.plan = kernels.plan(call.geometry, call.input_layout, call.weight_layout, threads, true);
  }
}

// The same of any call, for as many threads as are worth starting, and returns how many these are. Half of the
// operations count, for small ones are fast, and numbers that are brought in or pooled as some more; where all
// operations would ask for more threads, the plan's cost for one decides.
template <class T>
int64_t choose_plan_and_threads(const ConvForwardKernels<T>& kernels, ConvPoolForward<T>& call, double work) {
  constexpr double kNumber = 4, kPacked = 2, kCostPerThread = 12e3;
  skip_unused(call.geometry, call.input_layout);
  const ConvPoolGeometry& g = call.geometry;
  const auto numbers = [&](int64_t channels, const int64_t (&sizes)[3]) {
    return static_cast<double>(g.batch * g.groups * channels * sizes[0] * sizes[1] * sizes[2]);
  };
  const double moved = numbers(g.in_channels, g.input) + numbers(g.out_channels, g.conv);
  const int64_t most = useful_threads(work);
  int64_t threads = useful_threads(work / 2 + kNumber * moved);
  if (threads < most) {
    choose_plan(kernels, call, 1);
    const double cost =
        call.plan.cost * static_cast<double>(g.batch) + kPacked * static_cast<double>(call.plan.packed_size);
    threads = std::max(threads, std::min(most, static_cast<int64_t>(cost / kCostPerThread)));
    if (threads == 1) return 1;
  }
  choose_plan(kernels, call, threads);
  return threads;
}

// Runs a call that lacks but plan and packed weight. packed_for(plan) is the latter, or null to have it packed.
template <class T, class Packed>
void run_conv_pool(ConvPoolForward<T>& call, double work, const Packed& packed_for) {
  // Read once: another thread may change the instruction set, and plans are for the kernels of their own.
  const ConvForwardKernels<T>& kernels = conv_forward_kernels().get<T>();
  const int64_t threads = choose_plan_and_threads(kernels, call, work);
  const ConvPoolPlan& plan = call.plan;
  const Compute<T>* packed = packed_for(plan);
  const int64_t chunks = std::min(threads, plan.items);
  const auto lines = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const int64_t scratch_size = lines(plan.scratch_size);
  const int64_t packed_bytes = packed ? 0 : lines(checked_product(plan.packed_size, sizeof(Compute<T>)));
  const int64_t turned_bytes =
      lines(checked_product(checked_product(plan.turned_images, plan.turned_layout.n), sizeof(T)));
  const Scratch<char> memory(
      checked_sum(checked_sum(packed_bytes, turned_bytes), checked_product(chunks, scratch_size)));
  T* turned = reinterpret_cast<T*>(memory.get() + packed_bytes);
  char* scratch = memory.get() + packed_bytes + turned_bytes;
  call.packed = packed ? const_cast<Compute<T>*>(packed) : reinterpret_cast<Compute<T>*>(memory.get());
  if (!packed) {
    constexpr int64_t kSmallWeight = 8192;  // packed before a second thread has come
    const int64_t most = plan.packed_size < kSmallWeight ? 1 : threads;
    parallel_chunks(std::min(most, plan.pack_items), plan.pack_items,
                    [&](int64_t, int64_t first, int64_t last) { kernels.pack(call, first, last); });
  }
  const auto forward = [&](const ConvPoolForward<T>& images) {
    parallel_chunks(chunks, plan.items, [&](int64_t chunk, int64_t first, int64_t last) {
      kernels.forward(images, first, last, scratch + chunk * scratch_size);
    });
  };
  if (plan.turned_images == 0) return forward(call);
  ConvPoolForward<T> some = call;  // of the images that are turned together, once they are
  some.geometry.batch = plan.turned_images;
  some.input = turned;
  some.input_layout = plan.turned_layout;
  for (int64_t image = 0; image < call.geometry.batch; image += plan.turned_images) {
    const int64_t parts = std::min(threads, plan.turned_images) == threads ? 1 : threads;
    parallel_chunks(threads, plan.turned_images * parts, [&](int64_t, int64_t first, int64_t last) {
      kernels.turn_input(call, parts, first, last, turned);
    });
    forward(some);
    call.input += plan.turned_images * call.input_layout.n;
    some.output += plan.turned_images * call.output_layout.n;
    if (some.winners) some.winners += plan.turned_images * call.output_layout.n;
  }
}

// ---- memory formats -----------------------------------------------------------------------------------------

// Whether torch takes the tensor for channels last (c10::is_channels_last_strides_2d and _3d).
inline bool is_channels_last(const Tensor& tensor) {
  const int64_t rank = tensor.dim();
  if (rank < 4 || tensor.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t d = i == 0 ? 1 : i == rank - 1 ? 0 : rank - i;  // channels, width, height, ..., batch
    if (tensor.size(d) == 0 || tensor.stride(d) < least) return false;
    if (d == 0 && least == tensor.stride(1)) return false;
    least = tensor.stride(d) * std::max<int64_t>(tensor.size(d), 1);
  }
  return true;
}

// Dimensions that the tensor lacks have the strides of a dense one, by which kernels know such tensors.
inline ConvLayout layout_of(const Tensor& tensor) {
  const int64_t outer = tensor.stride(2) * tensor.size(2);
  ConvLayout layout{tensor.stride(0), tensor.stride(1), {outer, outer, outer}};
  for (int64_t i = 2; i < tensor.dim(); ++i) layout.d[i + 3 - tensor.dim()] = tensor.stride(i);
  return layout;
}

inline ConvLayout contiguous_layout(int64_t channels, const int64_t (&sizes)[3]) {
  const int64_t row = sizes[2], plane = checked_product(sizes[1], row), image = checked_product(sizes[0], plane);
  return {checked_product(channels, image), image, {plane, row, 1}};
}

inline Ints format_strides(const Ints& sizes, bool channels_last) {
  const size_t rank = sizes.size();
  Ints strides(rank);
  int64_t stride = 1;
  const auto set_stride = [&](size_t d) {
    strides[d] = stride;
    stride = checked_product(stride, std::max<int64_t>(sizes[d], 1));
  };
  if (channels_last) set_stride(1);
  for (size_t d = rank; d-- > 2;) set_stride(d);
  if (!channels_last) set_stride(1);
  set_stride(0);
  return strides;
}

inline Tensor new_formatted(const Ints& sizes, ScalarType dtype, bool channels_last) {
  if (!channels_last) return new_tensor(sizes, dtype);
  return new_strided_tensor(sizes, format_strides(sizes, true).data(), dtype);
}

inline Ints output_sizes(const ConvPoolProblem& problem) {
  const ConvPoolGeometry& g = problem.geometry;
  Ints sizes;
  sizes.reserve(5);
  sizes.insert(sizes.end(), {g.batch, g.groups * g.out_channels});
  for (int64_t d = 3 - problem.dims; d < 3; ++d) sizes.push_back(g.output[d]);
  return sizes;
}

inline Ints sizes_of(const Tensor& tensor) {
  return Ints(tensor.sizes().begin(), tensor.sizes().end());
}

}  // namespace fastnn
