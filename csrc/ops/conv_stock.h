// Forward by torch's own convolution, a few images at a time so that its output stays in cache, and our ReLU and
// max-pool of that in one pass.
#pragma once

#include "conv_forward.h"

namespace fastnn {

// torch.convolution(input, weight, bias, ...)
inline Tensor stock_convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                const ConvPoolProblem& problem) {
  const ConvPoolGeometry& g = problem.geometry;
  const auto given = [&](const int64_t (&values)[3]) { return Ints(values + 3 - problem.dims, values + 3); };
  std::array<StableIValue, 9> stack{give(input),
                                    give(weight),
                                    bias ? torch::stable::detail::from(std::optional<AtenTensorHandle>(Tensor(*bias).release()))
                                         : torch::stable::detail::from(std::optional<AtenTensorHandle>()),
                                    give(given(g.stride)),
                                    give(given(g.padding)),
                                    give(given(g.dilation)),
                                    give(false),
                                    give(Ints(problem.dims, 0)),
                                    give(g.groups)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return Argument<Tensor>::take(stack[0]);
}

// Images [first, first + count) of a tensor, without a copy.
inline Tensor narrow_images(const Tensor& tensor, int64_t first, int64_t count) {
  if (first == 0 && count == tensor.size(0)) return tensor;
  std::array<StableIValue, 4> stack{give(tensor), give(int64_t{0}), give(first), give(count)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::narrow", "", stack.data(), TORCH_ABI_VERSION));
  return Argument<Tensor>::take(stack[0]);
}

// max_pool(relu(input * scale + shift)), of which scale and shift are one number a channel or null: a convolution whose
// groups are the channels. `input` is dense; geometry's `conv` sizes and pooling count.
template <class T>
void relu_max_pool(const ConvPoolGeometry& pool, const T* input, const ConvLayout& layout, const T* scale,
                   const T* shift, T* output, const ConvLayout& output_layout, uint8_t* winners) {
  const int64_t channels = pool.groups * pool.out_channels;
  PlanKey key;
  ConvPoolGeometry& g = key.geometry;
  g = pool;
  g.groups = channels;
  g.in_channels = g.out_channels = 1;
  for (int d = 0; d < 3; ++d) {
    g.input[d] = g.conv[d];
    g.kernel[d] = g.stride[d] = g.dilation[d] = 1;
    g.padding[d] = 0;
  }
  const double work = 20.0 * static_cast<double>(g.batch * channels) * static_cast<double>(g.conv[0] * g.conv[1] * g.conv[2]);
  key.request.threads = useful_threads(work);
  key.request.element_bytes = sizeof(T);
  key.request.input_channels_last = layout.c == 1 && layout.d[2] != 1;
  key.request.output_channels_last = output_layout.c == 1 && output_layout.d[2] != 1;
  key.request.exact = true;
  set_machine(key.machine);
  const ForwardAlgorithm algorithm = key.request.input_channels_last ? ForwardAlgorithm::depthwise
                                     : sizeof(T) == sizeof(double)   ? ForwardAlgorithm::direct
                                                                     : ForwardAlgorithm::pixels;
  key.request.algorithm = static_cast<int32_t>(algorithm);
  const Scratch<T> numbers(2 * channels);
  T* const ones = numbers.get();
  T* const zeros = ones + channels;
  T one, zero;
  if constexpr (sizeof(T) == sizeof(bfloat16)) {
    one = {0x3f80};
    zero = {0x8000};
  } else {
    one = 1;
    zero = -T(0);  // which leaves each number as it is, -0 too
  }
  std::fill_n(ones, channels, one);
  std::fill_n(zeros, channels, zero);
  ConvCall<T> call{};
  call.geometry = g;
  call.input = input;
  call.input_layout = layout;
  call.weight = scale ? scale : ones;
  call.weight_layout = {1, 1, {1, 1, 1}};
  call.bias = shift ? shift : zeros;
  call.output = output;
  call.output_layout = output_layout;
  call.winners = winners;
  run_conv(call, plan_for(key), key.request.threads, static_cast<Compute<T>*>(nullptr));
}

// relu_(input)
inline void rectify(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{give(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::relu_", "", stack.data(), TORCH_ABI_VERSION));
  Argument<Tensor>::take(stack[0]);
}

inline bool pools_nothing(const ConvPoolGeometry& g) {
  for (int d = 0; d < 3; ++d) {
    if (g.pool_kernel[d] != 1 || g.pool_stride[d] != 1 || g.pool_padding[d] != 0) return false;
  }
  return true;
}

template <class T>
void run_stock(const ConvPoolProblem& problem, const Tensor& input, const Tensor& weight,
               const std::optional<Tensor>& bias, const Tensor& output, const Tensor* winners) {
  const ConvPoolGeometry& g = problem.geometry;
  constexpr int64_t kBytes = 1 << 20;  // of the convolution's output at a time: what L2 holds
  const int64_t conv = g.groups * g.out_channels * g.conv[0] * g.conv[1] * g.conv[2] * static_cast<int64_t>(sizeof(T));
  const int64_t weights = g.groups * g.out_channels * g.depth() * static_cast<int64_t>(sizeof(T));
  // The library brings the weight into an order of its own at each call.
  const int64_t images = std::min(g.batch, std::max<int64_t>(1, std::max(kBytes, 4 * weights) / std::max<int64_t>(1, conv)));
  const ConvLayout layout = PlainImages(output).layout;
  for (int64_t first = 0; first < g.batch; first += images) {
    const int64_t count = std::min(images, g.batch - first);
    const Tensor convolved = stock_convolution(narrow_images(input, first, count), weight, bias, problem);
    const PlainImages plain(convolved);
    ConvPoolGeometry pool = g;
    pool.batch = count;
    relu_max_pool<T>(pool, data<T>(plain.tensor), plain.layout, nullptr, nullptr,
                     mutable_data<T>(output) + first * layout.n, layout,
                     winners ? mutable_data<uint8_t>(*winners) + first * layout.n : nullptr);
  }
}

}  // namespace fastnn
