// The arguments of fastnn::conv_relu_max_pool, checked, and what follows from them.
#pragma once

#include <atomic>

#include "../kernels/conv/problem.h"
#include "tensor.h"

namespace fastnn {

// Views of numbers that must outlive them. The operators take all of them in one list, `geometry`, because the
// dispatcher takes 0.5 us for each list.
struct ConvPoolArguments {
  Sizes stride, padding, dilation, pool_kernel_size, pool_stride, pool_padding, pool_dilation;  // [dimensions]
  int64_t groups;
  bool ceil_mode;
};

// The operators' argument `geometry`: the lists one after another, then groups and ceil_mode.
Ints flat_geometry(const ConvPoolArguments& arguments);

// How a convolution differs at the end of each dimension from one of torch's. Empty lists mean: not at all.
struct ConvEnds {
  Ints padding;  // zeros behind the input, if not as many as in front
  Ints crop;     // so many of the last conv pixels are left out
};

struct ConvPoolProblem {
  Expected kind;
  int64_t dims;
  ConvPoolGeometry geometry;
  double work;  // floating-point operations of the convolution
};

// The problem that the arguments describe. Raises, with PyTorch's text where PyTorch has one, if they are not valid.
ConvPoolProblem check_problem(const char* op, const Tensor& input, const Tensor& weight,
                              const std::optional<Tensor>& bias, const Ints& geometry);

// The same for an input and a weight of which only the sizes are known.
ConvPoolProblem problem_of(const Expected& kind, const Sizes& input, const Sizes& weight, const Ints& geometry,
                           const ConvEnds& ends = {});

// How many windows of a pool fit in one dimension of `conv` pixels. Not above 0: none does.
int64_t pooled_size(int64_t conv, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode);

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

// The tensor's layout. Dimensions that the tensor lacks get the strides of a dense one, which the kernels look at.
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

inline ConvLayout channels_last_layout(int64_t channels, const int64_t (&sizes)[3]) {
  const int64_t row = checked_product(sizes[2], channels), plane = checked_product(sizes[1], row);
  return {checked_product(sizes[0], plane), 1, {plane, row, channels}};
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

// Whether torch leaves convolutions of a dtype to oneDNN, as Python says on import.
struct OneDnnDtypes {
  std::atomic<bool> float32{true}, bfloat16{true};

  bool has(ScalarType dtype) const {
    return (dtype == ScalarType::Float && float32) || (dtype == ScalarType::BFloat16 && bfloat16);
  }
};
inline OneDnnDtypes onednn_dtypes;

// The output has the format of PyTorch's output: in three dimensions, only its convolutions by oneDNN keep channels
// last.
inline bool output_is_channels_last(const ConvPoolProblem& problem, const Tensor& input, const Tensor& weight) {
  return (is_channels_last(input) || is_channels_last(weight)) &&
         (problem.dims < 3 || onednn_dtypes.has(problem.kind.dtype));
}

inline Ints output_sizes(const ConvPoolProblem& problem) {
  const ConvPoolGeometry& g = problem.geometry;
  Ints sizes;
  sizes.reserve(5);
  sizes.insert(sizes.end(), {g.batch, g.groups * g.out_channels});
  for (int64_t d = 3 - problem.dims; d < 3; ++d) sizes.push_back(g.output[d]);
  return sizes;
}

}  // namespace fastnn
