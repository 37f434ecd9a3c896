// Backward of the convolution: a plan, which is cached for the next call of its kind, and the run of the kernels by it.
#pragma once

#include "../kernels/conv/backward/problem.h"
#include "../kernels/elementwise.h"
#include "conv_plan.h"

namespace fastnn {

struct Wanted {
  bool input, weight, bias;
};

struct ConvGradients {
  Tensor input, weight, bias;
};

// New tensors for the gradients, each in the format of its tensor. Gradients that are not wanted are empty.
inline ConvGradients empty_gradients(const Tensor& input, const Tensor& weight, const Wanted& wanted) {
  const ScalarType dtype = input.scalar_type();
  const auto like = [&](const Tensor& tensor, bool is_wanted) {
    Ints sizes = sizes_of(tensor);
    if (!is_wanted) sizes[0] = 0;
    return new_formatted(sizes, dtype, is_channels_last(tensor));
  };
  return {like(input, wanted.input), like(weight, wanted.weight),
          new_tensor({wanted.bias ? weight.size(0) : 0}, dtype)};
}

using BackwardKey = KeyOf<BackwardRequest>;

inline const ConvBackwardPlan& plan_for(const BackwardKey& key) {
  return kept_plan(key, plan_backward);
}

// The key of a call that uses these kernels and has finite elements. `algorithm` is the algorithm to take, or -1.
template <class T>
BackwardKey backward_key(const ConvBackwardKernels<T>& kernels, const ConvPoolProblem& problem,
                         bool input_channels_last, const Wanted& wanted, int32_t algorithm) {
  BackwardKey key(problem.geometry, kernels);
  key.request.dims = problem.dims;
  key.request.element_bytes = sizeof(T);
  key.request.input_channels_last = input_channels_last;
  key.request.both = wanted.input && wanted.weight;
  key.request.algorithm = algorithm;
  return key;
}

// A call in which only the argmaxes, the plan and the results are missing. grad_output is not made dense: the gradient
// that sum() passes back is one element with strides of 0.
template <class T>
ConvBackward<T> backward_call(const ConvPoolGeometry& g, const Tensor& grad_output, const PlainImages& input,
                              const PlainImages& weight) {
  ConvBackward<T> call{};
  call.geometry = g;
  call.grad_output = data<T>(grad_output);
  call.output_layout = layout_of(grad_output);
  call.input = data<T>(input.tensor);
  call.input_layout = input.layout;
  call.weight = data<T>(weight.tensor);
  call.weight_layout = weight.layout;
  return call;
}

inline int64_t whole_lines(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

// Adds up the threads' private parts [part][size], in order, into the first part.
template <class C>
void sum_parts(C* parts, int64_t count, int64_t size, int64_t threads) {
  if (count == 1) return;
  parallel_chunks(threads, size, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t part = 1; part < count; ++part) {
      const C* from = parts + part * size;
      for (int64_t i = first; i < last; ++i) parts[i] += from[i];
    }
  });
}

// The bias's gradient, which is the sum of the threads' private parts [part][channel].
template <class T>
void store_bias_gradient(const ConvBackwardKernels<T>& kernels, double* parts, int64_t count, const Tensor& grad_bias) {
  const int64_t channels = grad_bias.numel();
  sum_parts(parts, count, channels, 1);
  const Scratch<Compute<T>> rounded(channels);
  std::copy(parts, parts + channels, rounded.get());
  kernels.store(rounded.get(), channels, mutable_data<T>(grad_bias));
}

// Runs backward by the plan of `call`, whose algorithm is not `stock`. Gradients that are not wanted are empty.
template <class T>
void run_backward(const ConvBackwardKernels<T>& kernels, ConvBackward<T>& call, double work, const Wanted& wanted,
                  const Tensor& grad_input, const Tensor& grad_weight, const Tensor& grad_bias) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const ConvBackwardPlan& plan = *call.plan;
  if (wanted.input) {
    call.grad_input = mutable_data<T>(grad_input);
    call.grad_input_layout = PlainImages(grad_input).layout;
  }
  // Threads share the images. If there are more threads than images, they also share the blocks, then the pixels.
  const int64_t threads = useful_threads(work / 2), blocks = plan.blocks;
  const int64_t image_parts = std::min(threads, g.batch);
  const int64_t block_parts = std::min(std::max<int64_t>(threads / image_parts, 1), blocks);
  const int64_t pixel_parts = std::min(std::max<int64_t>(threads / (image_parts * block_parts), 1), plan.most_parts);
  const int64_t parts = image_parts * pixel_parts;  // each part has its own gradient of the weight
  const int64_t bias_size = g.groups * g.out_channels;
  const int64_t scratch_size = whole_lines(kernels.scratch_size(call));
  const int64_t weight_size = wanted.weight ? plan.weight_size : 0;
  Scratch<C> packed(wanted.input ? plan.packed_size : 0);
  Scratch<C> weight_parts(checked_product(parts, weight_size));
  Scratch<C> weight_lost(plan.keeps_lost ? checked_product(parts, weight_size) : 0);
  const Scratch<double> bias_parts(checked_product(parts, bias_size));
  Scratch<char> scratch(checked_product(parts * block_parts, scratch_size));
  call.packed = packed.get();
  if (wanted.input) kernels.pack(call);
  std::fill(bias_parts.get(), bias_parts.get() + parts * bias_size, 0.0);
  parallel_chunks(parts * block_parts, parts * block_parts, [&](int64_t chunk, int64_t, int64_t) {
    const int64_t part = chunk / block_parts, image_part = part / pixel_parts, block_part = chunk % block_parts;
    const int64_t first_block = blocks * block_part / block_parts, last_block = blocks * (block_part + 1) / block_parts;
    const ConvBackwardPiece piece = {g.batch * image_part / image_parts,
                                     g.batch * (image_part + 1) / image_parts,
                                     first_block,
                                     last_block,
                                     part % pixel_parts,
                                     pixel_parts};
    const int64_t block_size = plan.weight_size / blocks;
    C* weight_part = wanted.weight ? weight_parts.get() + part * weight_size : nullptr;
    C* lost_part = wanted.weight && plan.keeps_lost ? weight_lost.get() + part * weight_size : nullptr;
    if (lost_part) std::fill(lost_part + first_block * block_size, lost_part + last_block * block_size, C(0));
    double* bias_part = bias_parts.get() + part * bias_size;
    kernels.run(call, piece, weight_part, lost_part, wanted.bias ? bias_part : nullptr,
                scratch.get() + chunk * scratch_size);
  });
  sum_parts(weight_parts.get(), parts, weight_size, threads);
  if (wanted.weight) {
    kernels.unpack_weight(call, weight_parts.get(), mutable_data<T>(grad_weight), PlainImages(grad_weight).layout);
  }
  if (wanted.bias) store_bias_gradient(kernels, bias_parts.get(), parts, grad_bias);
}

// The bias's gradient: sums of the output's gradient, whose images lie as `layout` says. Where a channel's pixels lie
// together, at most `kLongest` of them are added up in T, and these sums in double, since errors grow with a sum's
// length.
template <class T>
Tensor bias_gradient(const ConvPoolGeometry& g, const ConvLayout& layout, const T* gradient) {
  constexpr int64_t kLongest = 128;
  const int64_t channels = g.groups * g.out_channels, pixels = g.conv[0] * g.conv[1] * g.conv[2];
  const auto& kernels = elementwise_kernels().get<T>();
  std::vector<double> totals(static_cast<size_t>(channels));
  const Scratch<T> of_image(channels);
  for (int64_t n = 0; n < g.batch; ++n) {
    const T* const image = gradient + n * layout.n;
    const bool pixels_lie_together = layout.d[2] == 1 || channels == 1;
    if (!pixels_lie_together) kernels.sum_rows(image, pixels, channels, channels, T(1), of_image.get());
    for (int64_t c = 0; c < channels; ++c) {
      double& total = totals[static_cast<size_t>(c)];
      if (!pixels_lie_together) total += of_image.get()[c];
      for (int64_t p = 0; pixels_lie_together && p < pixels; p += kLongest) {
        total += kernels.sum(image + c * pixels + p, std::min(kLongest, pixels - p));
      }
    }
  }
  Tensor result = new_tensor({channels}, kDtypeOf<T>);
  std::copy(totals.begin(), totals.end(), mutable_data<T>(result));
  return result;
}

}  // namespace fastnn
