// Forward by torch's own convolution, a few images at a time so that its output stays in cache. Our ReLU and max-pool
// take that output in one pass.
#pragma once

#include "conv_plan.h"
#include "stock.h"

namespace fastnn {

// A tensor over existing memory, with `dims` dimensions besides batch and channels.
template <class T>
Tensor images_over(const T* memory, int64_t batch, int64_t channels, const int64_t (&sizes)[3],
                   const ConvLayout& layout, int64_t dims) {
  Ints all{batch, channels}, strides{layout.n, layout.c};
  for (int64_t d = 3 - dims; d < 3; ++d) {
    all.push_back(sizes[d]);
    strides.push_back(layout.d[d]);
  }
  return tensor_over(memory, all, strides);
}

// The part of a geometry that torch's convolution takes.
inline StockConvolution stock_convolution(const ConvPoolGeometry& g, int64_t dims) {
  const auto given = [&](const int64_t (&values)[3]) { return Ints(values + 3 - dims, values + 3); };
  return {given(g.stride), given(g.padding), given(g.dilation), g.groups};
}

inline bool same_layout(const ConvLayout& one, const ConvLayout& other) {
  return one.n == other.n && one.c == other.c && std::equal(one.d, one.d + 3, other.d);
}

// Pools what torch's convolution has computed, or any other dense images, as the call says, into the call's output. Of
// the call's geometry, only the sizes of `conv` and of the pooling count.
template <class T>
void pool_images(const ConvKernels<T>& kernels, const ConvCall<T>& call, const T* images, const ConvLayout& layout) {
  const ConvPoolGeometry& pool = call.geometry;
  if (pool.pools_nothing() && same_layout(layout, call.output_layout)) {
    const int64_t count = pool.batch * pool.groups * pool.out_channels * pool.pixels();
    return parallel_chunks(std::min(useful_threads(2.0 * count), std::max<int64_t>(count, 1)), count,
                           [&](int64_t, int64_t first, int64_t last) {
                             const T* const from = images + first;
                             T* const to = call.output + first;
                             if (call.winners) {
                               kernels.rectify(from, last - first, to, call.winners + first);
                             } else {
                               const T* const addend = call.addend ? call.addend + first : nullptr;
                               kernels.finish(call.activation, from, addend, last - first, to);
                             }
                           });
  }
  // A convolution by a kernel of one element of weight 1, with a group for each channel.
  ConvCall<T> unit = call;
  ConvPoolGeometry& g = unit.geometry;
  g.groups = pool.groups * pool.out_channels;
  g.in_channels = g.out_channels = 1;
  for (int d = 0; d < 3; ++d) {
    g.input[d] = g.conv[d];
    g.kernel[d] = g.stride[d] = g.dilation[d] = 1;
    g.padding[d] = g.padding_end[d] = 0;
  }
  const bool channels_last = layout.c == 1 && layout.d[2] != 1;
  const ForwardAlgorithm algorithm = channels_last                 ? ForwardAlgorithm::depthwise
                                     : sizeof(T) == sizeof(double) ? ForwardAlgorithm::direct
                                                                   : ForwardAlgorithm::pixels;
  PlanKey key = plan_key<T>(kernels, g, channels_last, call.output_layout.c == 1 && call.output_layout.d[2] != 1,
                            static_cast<int64_t>(algorithm));
  key.request.exact = true;
  const Scratch<T> numbers(checked_product(2, g.groups));
  T one, zero;
  if constexpr (sizeof(T) == sizeof(bfloat16)) {
    one = {0x3f80};
    zero = {0x8000};
  } else {
    one = 1;
    zero = -T(0);  // adding -0 changes no number, not even -0
  }
  std::fill_n(numbers.get(), g.groups, one);
  std::fill_n(numbers.get() + g.groups, g.groups, zero);
  unit.input = images;
  unit.input_layout = layout;
  unit.weight = numbers.get();
  unit.weight_layout = {1, 1, {1, 1, 1}};
  unit.bias = numbers.get() + g.groups;
  run_by_plan<T>(kernels, unit, plan_for(key), nullptr);
}

// Whether the kernel has one position and its strides skip pixels of the input.
inline bool skips_pixels(const ConvPoolGeometry& g) {
  bool strides = false, pads = false;
  for (int d = 0; d < 3; ++d) {
    strides = strides || g.stride[d] > 1;
    pads = pads || g.padding[d] > 0;
  }
  return g.taps() == 1 && strides && !pads;
}

// Copies the pixels that a strided kernel of one position reads from contiguous images into images of their own, and
// changes `g` and `layout` to those of the copy. Torch's convolution would copy all pixels, also those that are
// skipped.
template <class T>
Tensor met_pixels(const T* images, ConvPoolGeometry& g, ConvLayout& layout) {
  const int64_t planes = g.batch * g.groups * g.in_channels, pixels = g.conv[0] * g.conv[1] * g.conv[2];
  Tensor met = new_tensor({planes, pixels}, kDtypeOf<T>);
  T* const to = mutable_data<T>(met);
  parallel_chunks(std::min(useful_threads(4.0 * planes * pixels), planes), planes,
                  [&](int64_t, int64_t first, int64_t last) {
                    T* next = to + first * pixels;
                    for (int64_t plane = first; plane < last; ++plane) {
                      for (int64_t row = 0; row < g.conv[0] * g.conv[1]; ++row) {
                        const T* from = images + plane * layout.c + row / g.conv[1] * g.stride[0] * layout.d[0] +
                                        row % g.conv[1] * g.stride[1] * layout.d[1];
                        for (int64_t x = 0; x < g.conv[2]; ++x) *next++ = from[x * g.stride[2]];
                      }
                    }
                  });
  for (int d = 0; d < 3; ++d) {
    g.stride[d] = 1;
    g.input[d] = g.conv[d];
  }
  layout = {g.groups * g.in_channels * pixels, pixels, {g.conv[1] * g.conv[2], g.conv[2], 1}};
  return met;
}

// Runs a call by torch's convolution. Returns false, having written nothing, where autocast is on and would have the
// convolution round its result to another dtype.
template <class T>
bool run_by_stock(const ConvKernels<T>& kernels, const ConvCall<T>& call, int64_t dims) {
  ConvPoolGeometry g = call.geometry;
  ConvLayout layout = call.input_layout;
  const T* from = call.input;
  Tensor met;
  if (layout.d[2] == 1 && skips_pixels(g)) {
    met = met_pixels<T>(from, g, layout);
    from = data<T>(met);
  }
  // The convolution's output is computed in pieces of at most so many bytes, which the threads' L2 caches hold.
  const int64_t bytes = int64_t{torch::stable::get_num_threads()} << 20;
  const int64_t size = sizeof(T), channels = g.groups * g.out_channels;
  const int64_t conv = channels * g.conv[0] * g.conv[1] * g.conv[2] * size, weights = channels * g.depth() * size;
  // The library reorders the weight in each call, which would take most of the time of a call for few images.
  const int64_t images = std::min(g.batch, std::max<int64_t>(1, std::max(bytes, 4 * weights) / conv));
  const Tensor weight = images_over(call.weight, channels, g.in_channels, g.kernel, call.weight_layout, dims);
  std::optional<Tensor> bias;
  if (call.bias) bias = tensor_over(call.bias, {channels}, {1});
  for (int64_t first = 0; first < g.batch; first += images) {
    ConvPoolGeometry some = g;
    some.batch = std::min(images, g.batch - first);
    const Tensor input =
        images_over(from + first * layout.n, some.batch, g.groups * g.in_channels, g.input, layout, dims);
    const Tensor result = convolution(input, weight, bias, stock_convolution(g, dims));
    if (result.scalar_type() != kDtypeOf<T>) return false;
    const PlainImages convolved(result);
    const int64_t to = first * call.output_layout.n;
    ConvCall<T> pooling = call;
    pooling.geometry = some;
    pooling.output = call.output + to;
    pooling.winners = call.winners ? call.winners + to : nullptr;
    pooling.addend = call.addend ? call.addend + to : nullptr;
    pool_images<T>(kernels, pooling, data<T>(convolved.tensor), convolved.layout);
  }
  return true;
}

}  // namespace fastnn
