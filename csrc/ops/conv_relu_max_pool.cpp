// fastnn::conv_relu_max_pool and its backward: checks, allocation, threads.
#include "../kernels/conv_relu_max_pool.h"

#include <cstring>
#include <limits>
#include <tuple>

#include "register.h"
#include "tensor.h"

namespace fastnn {
namespace {

using Ints = std::vector<int64_t>;

// check, with its words only put together where it fails.
#define FASTNN_CHECK(condition, ...)                                              \
  do {                                                                            \
    if (__builtin_expect(!(condition), false)) fastnn::check(false, __VA_ARGS__); \
  } while (false)

struct ConvPoolArguments {
  Ints stride, padding, dilation;
  int64_t groups;
  Ints pool_kernel_size, pool_stride, pool_padding, pool_dilation;
  bool ceil_mode;
};

// ---- checks: stock's words where stock has them -------------------------------------------------------------

void check_length(const Ints& values, int64_t dims, const char* name) {
  FASTNN_CHECK(static_cast<int64_t>(values.size()) == dims, "expected ", name,
               " to be a single integer value or a list of ", dims,
               " values to match the convolution dimensions, but got ", name, "=", to_string(values));
}

bool all_at_least(const Ints& values, int64_t least) {
  return std::all_of(values.begin(), values.end(), [&](int64_t v) { return v >= least; });
}

// "kT: 1 kH: 2 kW: 3", as stock's 2-d and 3-d pooling name their dimensions.
std::string by_dimension(const char* prefix, const Ints& values) {
  static const char* const names[] = {"T", "H", "W"};
  std::ostringstream text;
  for (size_t i = 0; i < values.size(); ++i) {
    text << (i ? " " : "") << prefix << names[3 - values.size() + i] << ": " << values[i];
  }
  return text.str();
}

std::string joined(const Ints& values, const char* separator) {
  std::ostringstream text;
  for (size_t i = 0; i < values.size(); ++i) text << (i ? separator : "") << values[i];
  return text.str();
}

void check_pool_1d(const ConvPoolArguments& a) {
  const int64_t kernel = a.pool_kernel_size[0], padding = a.pool_padding[0];
  FASTNN_CHECK(kernel > 0, "max_pool1d() kernel_size must be greater than zero, but got ", kernel);
  FASTNN_CHECK(a.pool_stride[0] > 0, "max_pool1d() stride must be greater than zero, but got ", a.pool_stride[0]);
  FASTNN_CHECK(padding >= 0, "max_pool1d() padding must be non-negative, but got ", padding);
  FASTNN_CHECK(padding <= kernel / 2,
               "max_pool1d() padding should be at most half of kernel size, but got padding=", padding,
               " and kernel_size=", kernel);
  FASTNN_CHECK(a.pool_dilation[0] > 0, "max_pool1d() dilation must be greater than zero, but got ", a.pool_dilation[0]);
}

void check_pool(const ConvPoolArguments& a, int64_t dims) {
  static const char* const counts[] = {"", "one int", "two ints", "three ints"};
  const auto check_count = [&](const Ints& values, const char* name) {
    FASTNN_CHECK(static_cast<int64_t>(values.size()) == dims, "max_pool", dims, "d: ", name,
                 " must either be a single int, or a tuple of ", counts[dims]);
  };
  check_count(a.pool_kernel_size, "kernel_size");
  check_count(a.pool_stride, "stride");
  check_count(a.pool_padding, "padding");
  check_count(a.pool_dilation, "dilation");
  if (dims == 1) return check_pool_1d(a);
  for (int64_t i = 0; i < dims; ++i) FASTNN_CHECK(a.pool_stride[i] != 0, "stride should not be zero");
  FASTNN_CHECK(all_at_least(a.pool_kernel_size, 1), "kernel size should be greater than zero, but got ",
               by_dimension("k", a.pool_kernel_size));
  FASTNN_CHECK(all_at_least(a.pool_stride, 1), "stride should be greater than zero, but got ",
               by_dimension("d", a.pool_stride));
  FASTNN_CHECK(all_at_least(a.pool_dilation, 1), "dilation should be greater than zero, but got ",
               by_dimension("dilation", a.pool_dilation));
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t kernel = a.pool_kernel_size[i], padding = a.pool_padding[i];
    FASTNN_CHECK(padding >= 0, "pad must be non-negative, but got pad: ", padding);
    const int64_t extent = checked_sum(checked_product(kernel - 1, a.pool_dilation[i]), 1);
    FASTNN_CHECK(padding <= extent / 2, "pad should be at most half of effective kernel size, but got pad=", padding,
                 ", kernel_size=", kernel, " and dilation=", a.pool_dilation[i]);
  }
  for (int64_t i = 0; i < dims; ++i) {
    if (a.pool_padding[i] <= a.pool_kernel_size[i] / 2) continue;
    const Ints &k = a.pool_kernel_size, &p = a.pool_padding;
    const char* words = "pad should be smaller than or equal to half of kernel size, but got ";
    FASTNN_CHECK(dims == 3, words, "padW = ", p[1], ", padH = ", p[0], ", kW = ", k[1], ", kH = ", k[0]);
    FASTNN_CHECK(false, words, "kT: ", k[0], " kW: ", k[2], " kH: ", k[1], " padT: ", p[0], " padW: ", p[2],
                 " padH: ", p[1]);
  }
}

// The types' names as stock's conv has them in this message.
const char* element_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float";
    case ScalarType::Double:
      return "double";
    default:
      return torch::headeronly::toString(dtype);
  }
}

void check_tensors(const Expected& kind, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   int64_t groups) {
  const char* type = torch::headeronly::toString(kind.dtype);
  FASTNN_CHECK(weight.defined(), kind.op, ": weight must be a tensor, got an undefined one");
  FASTNN_CHECK(weight.scalar_type() == kind.dtype, "Input type (torch.", type, "Tensor) and weight type (torch.",
               torch::headeronly::toString(weight.scalar_type()),
               "Tensor) should be the same or input should be a MKLDNN tensor and weight is a dense tensor");
  check_same_kind(weight, kind, "weight");
  FASTNN_CHECK(groups > 0, "non-positive groups is not supported");
  FASTNN_CHECK(weight.dim() == input.dim(), "Expected ", weight.dim(), "-dimensional input for ", weight.dim(),
               "-dimensional weight ", to_string(weight.sizes()), ", but got ", input.dim(),
               "-dimensional input of size ", to_string(input.sizes()), " instead");
  FASTNN_CHECK(weight.size(0) >= groups, "Given groups=", groups, ", expected weight to be at least ", groups,
               " at dimension 0, but got weight of size ", to_string(weight.sizes()), " instead");
  FASTNN_CHECK(weight.size(0) % groups == 0, "Given groups=", groups, ", expected weight to be divisible by ", groups,
               " at dimension 0, but got weight of size [", to_string(weight.sizes()), "] instead");
  FASTNN_CHECK(
      weight.size(1) <= std::numeric_limits<int64_t>::max() / groups && input.size(1) == weight.size(1) * groups,
      "Given groups=", groups, ", weight of size ", to_string(weight.sizes()), ", expected input",
      to_string(input.sizes()), " to have ", weight.size(1) * groups, " channels, but got ", input.size(1),
      " channels instead");
  FASTNN_CHECK(input.size(1) > 0,
               "expected an input of at least one channel, but got input shape: ", to_string(input.sizes()));
  for (int64_t d = 2; d < input.dim(); ++d) {
    FASTNN_CHECK(weight.size(d) > 0, "expected a kernel of at least one element, but got weight of size ",
                 to_string(weight.sizes()));
  }
  if (!bias) return;
  FASTNN_CHECK(bias->defined(), kind.op, ": bias must be a tensor, got an undefined one");
  FASTNN_CHECK(bias->scalar_type() == kind.dtype, "Input type (", element_name(kind.dtype), ") and bias type (",
               element_name(bias->scalar_type()), ") should be the same");
  check_same_kind(*bias, kind, "bias");
  FASTNN_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "Given weight of size ", to_string(weight.sizes()),
               ", expected bias to be 1-dimensional with ", weight.size(0), " elements, but got bias of size ",
               to_string(bias->sizes()), " instead");
}

// ---- geometry -----------------------------------------------------------------------------------------------

int64_t pooled_size(int64_t conv, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const int64_t room = conv + 2 * padding - dilation * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  const int64_t floored = room >= 0 ? room / stride : -((stride - 1 - room) / stride);
  // With ceil_mode the last window must still begin inside the input or its left padding.
  return ceil_mode && floored * stride >= conv + padding ? floored : floored + 1;
}

struct ConvPoolProblem {
  Expected kind;
  int64_t dims;
  ConvPoolGeometry geometry;
  double work;  // floating-point operations of the convolution
};

ConvPoolProblem check_problem(const char* op, const Tensor& input, const Tensor& weight,
                              const std::optional<Tensor>& bias, const ConvPoolArguments& a) {
  // No product of a few of them comes near the end of 64 bits.
  constexpr int64_t kLargest = int64_t{1} << 31;
  const Expected kind = check_first(input, op, "input");
  const int64_t dims = input.dim() - 2;
  FASTNN_CHECK(dims >= 1 && dims <= 3, op,
               ": expected input to be 3D, 4D or 5D (batch, channels, 1 to 3 dimensions), got ", input.dim(),
               "D tensor instead");
  check_length(a.stride, dims, "stride");
  check_length(a.padding, dims, "padding");
  check_length(a.dilation, dims, "dilation");
  FASTNN_CHECK(all_at_least(a.padding, 0), "negative padding is not supported");
  FASTNN_CHECK(all_at_least(a.stride, 1), "non-positive stride is not supported");
  FASTNN_CHECK(all_at_least(a.dilation, 1), "non-positive dilation is not supported");
  check_tensors(kind, input, weight, bias, a.groups);
  check_pool(a, dims);
  for (const Ints* values :
       {&a.stride, &a.padding, &a.dilation, &a.pool_kernel_size, &a.pool_stride, &a.pool_padding, &a.pool_dilation}) {
    for (int64_t value : *values)
      FASTNN_CHECK(value < kLargest, op, ": ", value, " is too large, expected less than 2**31");
  }

  ConvPoolProblem problem{kind, dims, {}, 0};
  ConvPoolGeometry& g = problem.geometry;
  g.batch = input.size(0);
  g.groups = a.groups;
  g.in_channels = weight.size(1);
  g.out_channels = weight.size(0) / a.groups;
  Ints padded, extents, conv, output;
  for (int d = 0; d < 3; ++d) {
    const int64_t i = d - (3 - dims);
    const bool given = i >= 0;
    g.input[d] = given ? input.size(i + 2) : 1;
    g.kernel[d] = given ? weight.size(i + 2) : 1;
    FASTNN_CHECK(g.input[d] < kLargest && g.kernel[d] < kLargest, op,
                 ": a dimension is too large, expected less than 2**31");
    g.stride[d] = given ? a.stride[i] : 1;
    g.padding[d] = given ? a.padding[i] : 0;
    g.dilation[d] = given ? a.dilation[i] : 1;
    g.pool_kernel[d] = given ? a.pool_kernel_size[i] : 1;
    g.pool_stride[d] = given ? a.pool_stride[i] : 1;
    g.pool_padding[d] = given ? a.pool_padding[i] : 0;
    g.pool_dilation[d] = given ? a.pool_dilation[i] : 1;
    if (given) padded.push_back(g.input[d] + 2 * g.padding[d]);
    if (given) extents.push_back(g.kernel_extent(d));
    g.conv[d] = (g.input[d] + 2 * g.padding[d] - g.kernel_extent(d)) / g.stride[d] + 1;
  }
  for (int64_t i = 0; i < dims; ++i) {
    FASTNN_CHECK(padded[i] >= extents[i], "Calculated padded input size per channel: (", joined(padded, " x "),
                 "). Kernel size: (", joined(extents, " x "), "). Kernel size can't be greater than actual input size");
  }
  for (int d = 0; d < 3; ++d) {
    FASTNN_CHECK(g.input[d] > 0, "Only zero batch or zero channel inputs are supported, but got input shape: ",
                 to_string(input.sizes()));
  }
  for (int d = 0; d < 3; ++d) {
    g.output[d] =
        pooled_size(g.conv[d], g.pool_kernel[d], g.pool_stride[d], g.pool_padding[d], g.pool_dilation[d], a.ceil_mode);
    if (d < 3 - dims) continue;
    conv.push_back(g.conv[d]);
    output.push_back(g.output[d]);
  }
  for (int64_t size : output) {
    FASTNN_CHECK(dims != 1 || size > 0, "max_pool1d() Invalid computed output size: ", size);
    FASTNN_CHECK(size > 0, "Given input size: (", weight.size(0), "x", joined(conv, "x"),
                 "). Calculated output size: (", weight.size(0), "x", joined(output, "x"),
                 "). Output size is too small");
  }
  problem.work = 2.0 * g.batch * weight.size(0) * g.conv[0] * g.conv[1] * g.conv[2] * g.depth();
  return problem;
}

// ---- memory formats -----------------------------------------------------------------------------------------

// Whether torch takes the tensor for channels last (c10::is_channels_last_strides_2d and _3d).
bool is_channels_last(const Tensor& tensor) {
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

ConvLayout layout_of(const Tensor& tensor) {
  ConvLayout layout{tensor.stride(0), tensor.stride(1), {0, 0, 0}};
  for (int64_t i = 2; i < tensor.dim(); ++i) layout.d[i + 3 - tensor.dim()] = tensor.stride(i);
  return layout;
}

Tensor new_channels_last(const Ints& sizes, ScalarType dtype) {
  Ints permuted{sizes[0]}, back{0, static_cast<int64_t>(sizes.size()) - 1};
  for (size_t i = 2; i < sizes.size(); ++i) {
    permuted.push_back(sizes[i]);
    back.push_back(static_cast<int64_t>(i) - 1);
  }
  permuted.push_back(sizes[1]);
  const Tensor tensor = new_tensor(permuted, dtype);
  Ints strides;
  for (int64_t d : back) strides.push_back(tensor.stride(d));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()),
                                                               sizes.data(), strides.data(), 0, &handle));
  return Tensor(handle);
}

Tensor new_formatted(const Ints& sizes, ScalarType dtype, bool channels_last) {
  return channels_last ? new_channels_last(sizes, dtype) : new_tensor(sizes, dtype);
}

Ints output_sizes(const ConvPoolProblem& problem) {
  const ConvPoolGeometry& g = problem.geometry;
  Ints sizes{g.batch, g.groups * g.out_channels};
  for (int64_t d = 3 - problem.dims; d < 3; ++d) sizes.push_back(g.output[d]);
  return sizes;
}

Ints sizes_of(const Tensor& tensor) {
  return Ints(tensor.sizes().begin(), tensor.sizes().end());
}

// ---- forward ------------------------------------------------------------------------------------------------

template <class T>
void run_forward(const ConvPoolProblem& problem, const Tensor& input, const Tensor& weight,
                 const std::optional<Tensor>& bias, const Tensor& output, const Tensor& winners) {
  const ConvPoolKernels<T>& kernels = conv_relu_max_pool_kernels().get<T>();
  const int64_t threads = useful_threads(problem.work);
  ConvPoolForward<T> call{problem.geometry,
                          kernels.plan(problem.geometry, layout_of(input), threads, false),
                          data<T>(input),
                          layout_of(input),
                          data<T>(weight),
                          layout_of(weight),
                          bias ? data<T>(*bias) : nullptr,
                          nullptr,
                          mutable_data<T>(output),
                          layout_of(output),
                          winners.defined() ? mutable_data<uint8_t>(winners) : nullptr};
  if (!kernels.plan_holds(call)) call.plan = kernels.plan(problem.geometry, call.input_layout, threads, true);
  const ConvPoolPlan& plan = call.plan;
  const int64_t chunks = std::min(threads, plan.items);
  const int64_t scratch_size = (plan.scratch_size + 63) / 64 * 64;
  const int64_t packed_bytes = (checked_product(plan.packed_size, sizeof(Compute<T>)) + 63) / 64 * 64;
  const Scratch<char> memory(checked_sum(packed_bytes, checked_product(chunks, scratch_size)));
  char* scratch = memory.get() + packed_bytes;
  call.packed = reinterpret_cast<Compute<T>*>(memory.get());
  parallel_chunks(std::min(threads, plan.pack_items), plan.pack_items,
                  [&](int64_t, int64_t first, int64_t last) { kernels.pack(call, first, last); });
  parallel_chunks(chunks, plan.items, [&](int64_t chunk, int64_t first, int64_t last) {
    kernels.forward(call, first, last, scratch + chunk * scratch_size);
  });
}

std::tuple<Tensor, Tensor> forward(const char* op, const Tensor& input, const Tensor& weight,
                                   const std::optional<Tensor>& bias, const ConvPoolArguments& arguments,
                                   bool with_winners) {
  const ConvPoolProblem problem = check_problem(op, input, weight, bias, arguments);
  const int64_t places =
      checked_product(checked_product(problem.geometry.pool_kernel[0], problem.geometry.pool_kernel[1]),
                      problem.geometry.pool_kernel[2]);
  FASTNN_CHECK(!with_winners || places <= kMostPlaces, op,
               ": a winner's place is one byte, so a window may have at most ", kMostPlaces, " elements, got ", places);
  const ScalarType dtype = problem.kind.dtype;
  // As stock: its float64 convolution in three dimensions knows no channels last.
  const bool channels_last =
      (is_channels_last(input) || is_channels_last(weight)) && !(dtype == ScalarType::Double && problem.dims == 3);
  const Ints sizes = output_sizes(problem);
  const Tensor output = new_formatted(sizes, dtype, channels_last);
  const Tensor winners = with_winners ? new_formatted(sizes, ScalarType::Byte, channels_last) : Tensor();
  if (output.numel() > 0) {
    std::optional<Tensor> dense_bias;
    if (bias) dense_bias = dense(*bias);
    with_dtype(dtype,
               [&](auto type) { run_forward<decltype(type)>(problem, input, weight, dense_bias, output, winners); });
  }
  return {output, winners};
}

Tensor conv_relu_max_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                          const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                          const Ints& pool_kernel_size, const Ints& pool_stride, const Ints& pool_padding,
                          const Ints& pool_dilation, bool ceil_mode) {
  return std::get<0>(forward(
      "conv_relu_max_pool", input, weight, bias,
      {stride, padding, dilation, groups, pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode},
      false));
}

std::tuple<Tensor, Tensor> conv_relu_max_pool_with_winners(const Tensor& input, const Tensor& weight,
                                                           const std::optional<Tensor>& bias, const Ints& stride,
                                                           const Ints& padding, const Ints& dilation, int64_t groups,
                                                           const Ints& pool_kernel_size, const Ints& pool_stride,
                                                           const Ints& pool_padding, const Ints& pool_dilation,
                                                           bool ceil_mode) {
  return forward(
      "conv_relu_max_pool_with_winners", input, weight, bias,
      {stride, padding, dilation, groups, pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode}, true);
}

// ---- backward -----------------------------------------------------------------------------------------------

struct Wanted {
  bool input, weight, bias;
};

// Private parts [part][size], summed in order into the first.
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

template <class T>
void run_backward(const ConvPoolProblem& problem, const Tensor& grad_output, const Tensor& winners, const Tensor& input,
                  const Tensor& weight, Wanted wanted, const Tensor& grad_input, const Tensor& grad_weight,
                  const Tensor& grad_bias) {
  using C = Compute<T>;
  const ConvPoolKernels<T>& kernels = conv_relu_max_pool_kernels().get<T>();
  const ConvPoolGeometry& g = problem.geometry;
  FASTNN_CHECK(kernels.winners_are_valid(g, data<uint8_t>(winners), layout_of(winners)), problem.kind.op,
               ": winners has a place that its window doesn't have");
  const ConvPoolBackwardPlan plan = kernels.plan_backward(g);
  // Images first; where they are fewer than threads, each thread has some of the channels.
  const int64_t threads = useful_threads(problem.work / 2);
  const int64_t image_parts = std::min(threads, g.batch);
  const int64_t blocks = g.groups * plan.channel_blocks;
  const int64_t block_parts = std::min(std::max<int64_t>(threads / image_parts, 1), blocks);
  const int64_t bias_size = g.groups * g.out_channels;
  const int64_t scratch_size = (plan.scratch_size + 63) / 64 * 64;
  const int64_t weight_size = wanted.weight ? plan.weight_size : 0;
  Scratch<C> packed(wanted.input ? plan.packed_size : 0);
  Scratch<C> weight_parts(checked_product(image_parts, weight_size));
  Scratch<C> bias_parts(checked_product(image_parts, bias_size));
  Scratch<char> scratch(checked_product(image_parts * block_parts, scratch_size));
  const ConvPoolBackward<T> call{g,
                                 plan,
                                 data<T>(grad_output),
                                 layout_of(grad_output),
                                 data<uint8_t>(winners),
                                 layout_of(winners),
                                 data<T>(input),
                                 layout_of(input),
                                 data<T>(weight),
                                 layout_of(weight),
                                 wanted.input ? mutable_data<T>(grad_input) : nullptr,
                                 layout_of(grad_input),
                                 packed.get()};
  if (wanted.input) kernels.pack_backward(call);
  std::fill(bias_parts.get(), bias_parts.get() + image_parts * bias_size, C(0));
  parallel_chunks(image_parts * block_parts, image_parts * block_parts, [&](int64_t chunk, int64_t, int64_t) {
    const int64_t image_part = chunk / block_parts, block_part = chunk % block_parts;
    const int64_t first_block = blocks * block_part / block_parts, last_block = blocks * (block_part + 1) / block_parts;
    C* weight_part = weight_parts.get() + image_part * weight_size;
    const int64_t block_size = plan.weight_size / blocks;
    if (wanted.weight) std::fill(weight_part + first_block * block_size, weight_part + last_block * block_size, C(0));
    C* bias_part = bias_parts.get() + image_part * bias_size;
    kernels.backward(call, g.batch * image_part / image_parts, g.batch * (image_part + 1) / image_parts, first_block,
                     last_block, wanted.weight ? weight_part : nullptr, wanted.bias ? bias_part : nullptr,
                     scratch.get() + chunk * scratch_size);
  });
  sum_parts(weight_parts.get(), image_parts, weight_size, threads);
  sum_parts(bias_parts.get(), image_parts, bias_size, 1);
  if (wanted.weight) {
    kernels.unpack_weight(call, weight_parts.get(), mutable_data<T>(grad_weight), layout_of(grad_weight));
  }
  if (wanted.bias) kernels.store(bias_parts.get(), bias_size, mutable_data<T>(grad_bias));
}

void check_size(const Tensor& tensor, const Ints& sizes, const char* op, const char* name) {
  FASTNN_CHECK(sizes_of(tensor) == sizes, op, ": expected ", name, " of size ", to_string(sizes), ", got ",
               to_string(tensor.sizes()));
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_max_pool_backward(
    const Tensor& grad_output, const Tensor& winners, const Tensor& input, const Tensor& weight, const Ints& stride,
    const Ints& padding, const Ints& dilation, int64_t groups, const Ints& pool_kernel_size, const Ints& pool_stride,
    const Ints& pool_padding, const Ints& pool_dilation, bool ceil_mode, bool input_wanted, bool weight_wanted,
    bool bias_wanted) {
  const char* op = "conv_relu_max_pool_backward";
  const ConvPoolProblem problem = check_problem(
      op, input, weight, std::nullopt,
      {stride, padding, dilation, groups, pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode});
  const ConvPoolGeometry& g = problem.geometry;
  FASTNN_CHECK(g.pool_kernel[0] <= kMostPlaces && g.pool_kernel[1] <= kMostPlaces && g.pool_kernel[2] <= kMostPlaces &&
                   g.places() <= kMostPlaces,
               op, ": a window may have at most ", kMostPlaces, " elements");
  check_same_kind(grad_output, problem.kind, "grad_output");
  check_size(grad_output, output_sizes(problem), op, "grad_output");
  FASTNN_CHECK(winners.defined() && winners.is_cpu() && winners.layout() == torch::headeronly::Layout::Strided &&
                   winners.scalar_type() == ScalarType::Byte,
               op, ": expected winners to be a dense uint8 tensor on the CPU");
  check_size(winners, output_sizes(problem), op, "winners");
  int64_t image = 1;  // elements of a padded image, which the kernels number with 32 bits
  for (int d = 0; d < 3; ++d) image = checked_product(image, g.input[d] + 2 * g.padding[d] + g.kernel_extent(d));
  FASTNN_CHECK(checked_product(image, 64) < (int64_t{1} << 31) &&
                   checked_product(g.out_channels, checked_product(g.taps(), 64)) < (int64_t{1} << 31),
               op, ": input or weight too large");

  const ScalarType dtype = problem.kind.dtype;
  const auto sizes_if = [](bool condition, Ints sizes) {
    if (!condition) sizes[0] = 0;
    return sizes;
  };
  const bool is_empty = g.batch == 0;
  const Tensor grad_input = new_formatted(sizes_if(input_wanted, sizes_of(input)), dtype, is_channels_last(input));
  const Tensor grad_weight = new_formatted(sizes_if(weight_wanted, sizes_of(weight)), dtype, is_channels_last(weight));
  const Tensor grad_bias = new_tensor({bias_wanted ? weight.size(0) : 0}, dtype);
  if (is_empty) {
    std::memset(grad_weight.mutable_data_ptr(), 0, grad_weight.numel() * grad_weight.element_size());
    std::memset(grad_bias.mutable_data_ptr(), 0, grad_bias.numel() * grad_bias.element_size());
  } else {
    with_dtype(dtype, [&](auto type) {
      run_backward<decltype(type)>(problem, grad_output, winners, input, weight,
                                   {input_wanted, weight_wanted, bias_wanted}, grad_input, grad_weight, grad_bias);
    });
  }
  return {grad_input, grad_weight, grad_bias};
}

#define FASTNN_CONV_POOL_GEOMETRY                                                                       \
  "int[] stride, int[] padding, int[] dilation, int groups, int[] pool_kernel_size, int[] pool_stride," \
  " int[] pool_padding, int[] pool_dilation, bool ceil_mode"

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("conv_relu_max_pool(Tensor input, Tensor weight, Tensor? bias, " FASTNN_CONV_POOL_GEOMETRY ") -> Tensor");
  // winners: uint8 of the output's size, each window's winner by its place in the window, 255 where the output has
  // no gradient. A window may have at most 254 elements.
  m.def("conv_relu_max_pool_with_winners(Tensor input, Tensor weight, Tensor? bias, " FASTNN_CONV_POOL_GEOMETRY
        ") -> (Tensor output, Tensor winners)");
  // A gradient that is not wanted comes back empty.
  m.def(
      "conv_relu_max_pool_backward(Tensor grad_output, Tensor winners, Tensor input, Tensor weight,"
      " " FASTNN_CONV_POOL_GEOMETRY
      ", bool input_wanted, bool weight_wanted, bool bias_wanted)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

#undef FASTNN_CONV_POOL_GEOMETRY

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("conv_relu_max_pool", FASTNN_BOX(conv_relu_max_pool));
  m.impl("conv_relu_max_pool_with_winners", FASTNN_BOX(conv_relu_max_pool_with_winners));
  m.impl("conv_relu_max_pool_backward", FASTNN_BOX(conv_relu_max_pool_backward));
}

}  // namespace
}  // namespace fastnn
