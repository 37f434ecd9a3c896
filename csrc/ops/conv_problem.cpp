#include "conv_problem.h"

#include <limits>

namespace fastnn {
namespace {

// The product of two numbers below this one fits into 64 bits with room to spare.
constexpr int64_t kLargest = int64_t{1} << 31;

// ---- checks, with PyTorch's text where PyTorch has one ------------------------------------------------------

bool all_at_least(const Sizes& values, int64_t least) {
  return std::all_of(values.begin(), values.end(), [&](int64_t v) { return v >= least; });
}

// "kT: 1 kH: 2 kW: 3", as PyTorch's 2-d and 3-d pooling name their dimensions.
std::string by_dimension(const char* prefix, const Sizes& values) {
  static const char* const names[] = {"T", "H", "W"};
  std::ostringstream text;
  for (size_t i = 0; i < values.size(); ++i) {
    text << (i ? " " : "") << prefix << names[3 - values.size() + i] << ": " << values[i];
  }
  return text.str();
}

template <class List>
std::string joined(const List& values, const char* separator) {
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
    const Sizes &k = a.pool_kernel_size, &p = a.pool_padding;
    const char* words = "pad should be smaller than or equal to half of kernel size, but got ";
    FASTNN_CHECK(dims == 3, words, "padW = ", p[1], ", padH = ", p[0], ", kW = ", k[1], ", kH = ", k[0]);
    fail(words, "kT: ", k[0], " kW: ", k[2], " kH: ", k[1], " padT: ", p[0], " padW: ", p[2], " padH: ", p[1]);
  }
}

// The dtype's name in this error of PyTorch's convolution.
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

void check_kinds(const Expected& kind, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* type = torch::headeronly::toString(kind.dtype);
  FASTNN_CHECK(weight.defined(), kind.op, ": weight must be a tensor, got an undefined one");
  FASTNN_CHECK(weight.scalar_type() == kind.dtype, "Input type (torch.", type, "Tensor) and weight type (torch.",
               torch::headeronly::toString(weight.scalar_type()),
               "Tensor) should be the same or input should be a MKLDNN tensor and weight is a dense tensor");
  check_same_kind(weight, kind, "weight");
  if (!bias) return;
  FASTNN_CHECK(bias->defined(), kind.op, ": bias must be a tensor, got an undefined one");
  FASTNN_CHECK(bias->scalar_type() == kind.dtype, "Input type (", element_name(kind.dtype), ") and bias type (",
               element_name(bias->scalar_type()), ") should be the same");
  check_same_kind(*bias, kind, "bias");
}

void check_channels(const Sizes& input, const Sizes& weight, int64_t groups) {
  const size_t dims = weight.size(), given = input.size();
  FASTNN_CHECK(groups > 0, "non-positive groups is not supported");
  FASTNN_CHECK(dims == given, "Expected ", dims, "-dimensional input for ", dims, "-dimensional weight ",
               to_string(weight), ", but got ", given, "-dimensional input of size ", to_string(input), " instead");
  FASTNN_CHECK(weight[0] >= groups, "Given groups=", groups, ", expected weight to be at least ", groups,
               " at dimension 0, but got weight of size ", to_string(weight), " instead");
  FASTNN_CHECK(weight[0] % groups == 0, "Given groups=", groups, ", expected weight to be divisible by ", groups,
               " at dimension 0, but got weight of size [", to_string(weight), "] instead");
  FASTNN_CHECK(weight[1] <= std::numeric_limits<int64_t>::max() / groups && input[1] == weight[1] * groups,
               "Given groups=", groups, ", weight of size ", to_string(weight), ", expected input", to_string(input),
               " to have ", weight[1] * groups, " channels, but got ", input[1], " channels instead");
  FASTNN_CHECK(input[1] > 0, "expected an input of at least one channel, but got input shape: ", to_string(input));
  for (size_t d = 2; d < dims; ++d) {
    FASTNN_CHECK(weight[d] > 0, "expected a kernel of at least one element, but got weight of size ",
                 to_string(weight));
  }
}

// ---- geometry -----------------------------------------------------------------------------------------------

// What flat_geometry has made a list of.
ConvPoolArguments arguments_of(const char* op, const Ints& geometry, int64_t dims) {
  FASTNN_CHECK(static_cast<int64_t>(geometry.size()) == 7 * dims + 2, op, ": expected geometry to have ", 7 * dims + 2,
               " values, seven a dimension and two, but got ", geometry.size());
  const auto part = [&](int64_t i) { return Sizes(geometry.data() + i * dims, dims); };
  return {
      part(0), part(1), part(2), part(3), part(4), part(5), part(6), geometry[7 * dims], geometry[7 * dims + 1] != 0};
}

// The geometry of checked arguments.
ConvPoolGeometry geometry_of(const char* op, const Sizes& input, const Sizes& weight, const ConvPoolArguments& a,
                             const ConvEnds& ends) {
  ConvPoolGeometry g{};
  const int64_t dims = static_cast<int64_t>(a.stride.size());
  g.batch = input[0];
  g.groups = a.groups;
  g.in_channels = weight[1];
  g.out_channels = weight[0] / a.groups;
  for (int d = 0; d < 3; ++d) {
    const int64_t i = d - (3 - dims);
    const bool given = i >= 0;
    g.input[d] = given ? input[i + 2] : 1;
    g.kernel[d] = given ? weight[i + 2] : 1;
    FASTNN_CHECK(g.input[d] < kLargest && g.kernel[d] < kLargest, op,
                 ": a dimension is too large, expected less than 2**31");
    g.padding[d] = given ? a.padding[i] : 0;
    g.padding_end[d] = given && !ends.padding.empty() ? ends.padding[static_cast<size_t>(i)] : g.padding[d];
    g.dilation[d] = given ? a.dilation[i] : 1;
    g.pool_kernel[d] = given ? a.pool_kernel_size[i] : 1;
    g.pool_stride[d] = given ? a.pool_stride[i] : 1;
    g.pool_padding[d] = given ? a.pool_padding[i] : 0;
    g.pool_dilation[d] = given ? a.pool_dilation[i] : 1;
    // A larger stride leaves one pixel too. Kernels copy what lies between two pixels that a window of the pool covers.
    g.stride[d] = given ? std::min(a.stride[i], std::max<int64_t>(g.padded(d), 1)) : 1;
    g.conv[d] = g.whole_conv(d);
    if (given && !ends.crop.empty()) g.conv[d] = std::max<int64_t>(0, g.conv[d] - ends.crop[static_cast<size_t>(i)]);
    g.output[d] =
        pooled_size(g.conv[d], g.pool_kernel[d], g.pool_stride[d], g.pool_padding[d], g.pool_dilation[d], a.ceil_mode);
  }
  return g;
}

void check_sizes_fit(const Sizes& input, const ConvPoolGeometry& g, int64_t dims) {
  // The values of the dimensions that the tensors have, as PyTorch's errors list them.
  const auto given = [&](const auto& value_of) {
    Ints values;
    for (int64_t d = 3 - dims; d < 3; ++d) values.push_back(value_of(static_cast<int>(d)));
    return values;
  };
  const auto padded = [&](int d) { return g.padded(d); };
  for (int d = 0; d < 3; ++d) {
    FASTNN_CHECK(padded(d) >= g.kernel_extent(d), "Calculated padded input size per channel: (",
                 joined(given(padded), " x "), "). Kernel size: (",
                 joined(given([&](int i) { return g.kernel_extent(i); }), " x "),
                 "). Kernel size can't be greater than actual input size");
  }
  for (int d = 0; d < 3; ++d) {
    FASTNN_CHECK(g.input[d] > 0,
                 "Only zero batch or zero channel inputs are supported, but got input shape: ", to_string(input));
  }
  const bool pools = g.places() > 1;
  for (int d = 0; d < 3; ++d) {
    if (g.conv[d] == 0 && !pools) continue;  // all conv pixels are left out
    FASTNN_CHECK(dims != 1 || (g.output[d] > 0 && g.conv[d] > 0),
                 "max_pool1d() Invalid computed output size: ", g.output[d]);
    const int64_t channels = g.groups * g.out_channels;
    FASTNN_CHECK(g.output[d] > 0 && g.conv[d] > 0, "Given input size: (", channels, "x",
                 joined(given([&](int i) { return g.conv[i]; }), "x"), "). Calculated output size: (", channels, "x",
                 joined(given([&](int i) { return g.output[i]; }), "x"), "). Output size is too small");
  }
}

// Checks that products of sizes do not overflow. Every product that plans and kernels compute has some of these
// factors: what kernels and windows reach over (all windows `together` or each window `apart`), the channels, the
// images, and the products that are `multiplied`. Once a geometry has passed, an extent of one dimension is below 2^36.
void check_products(const char* op, const ConvPoolGeometry& g) {
  double image = 1, padded_image = 1, together = 1, apart = 1, multiplied = 1;
  for (int d = 0; d < 3; ++d) {
    const int64_t padded = g.padded(d), pooled = g.pool_extent(d) + 2 * g.pool_padding[d];
    const double reach = static_cast<double>(g.pool_extent(d) - 1) * static_cast<double>(g.stride[d]) +
                         static_cast<double>(g.kernel_extent(d));
    image *= static_cast<double>(g.input[d]);
    padded_image *= static_cast<double>(std::max(padded, g.conv[d] + 2 * g.pool_padding[d]));
    together *= static_cast<double>(padded + g.stride[d] + pooled + g.pool_stride[d]);
    apart *= static_cast<double>(g.output[d]) * reach;
    multiplied *= static_cast<double>(g.conv[d]) * static_cast<double>(g.kernel[d]);
  }
  check_product(op, std::max(together, apart), g.groups, g.in_channels + g.out_channels, g.batch);
  check_product(op, multiplied, g.groups, g.in_channels, g.out_channels, g.batch);
  // Planning iterates over pixels, and kernels may copy them, with the padding included.
  constexpr double kMostPixels = 1 << 24, kTimes = 64;
  FASTNN_CHECK(padded_image <= kMostPixels + kTimes * image, op, ": padding is too large: it makes an image of ", image,
               " pixels one of ", padded_image);
}

}  // namespace

Ints flat_geometry(const ConvPoolArguments& a) {
  Ints flat;
  for (const Sizes& numbers :
       {a.stride, a.padding, a.dilation, a.pool_kernel_size, a.pool_stride, a.pool_padding, a.pool_dilation}) {
    flat.insert(flat.end(), numbers.begin(), numbers.end());
  }
  flat.push_back(a.groups);
  flat.push_back(a.ceil_mode);
  return flat;
}

int64_t pooled_size(int64_t conv, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const int64_t room = conv + 2 * padding - dilation * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  const int64_t floored = room >= 0 ? room / stride : -((stride - 1 - room) / stride);
  // With ceil_mode the last window must still begin inside the input or its left padding.
  return ceil_mode && floored * stride >= conv + padding ? floored : floored + 1;
}

ConvPoolProblem check_problem(const char* op, const Tensor& input, const Tensor& weight,
                              const std::optional<Tensor>& bias, const Ints& geometry) {
  const Expected kind = check_first(input, op, "input");
  check_kinds(kind, weight, bias);
  const ConvPoolProblem problem = problem_of(kind, input.sizes(), weight.sizes(), geometry);
  if (bias) {
    FASTNN_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "Given weight of size ",
                 to_string(weight.sizes()), ", expected bias to be 1-dimensional with ", weight.size(0),
                 " elements, but got bias of size ", to_string(bias->sizes()), " instead");
  }
  return problem;
}

ConvPoolProblem problem_of(const Expected& kind, const Sizes& input, const Sizes& weight, const Ints& geometry,
                           const ConvEnds& ends) {
  const char* op = kind.op;
  const int64_t dims = static_cast<int64_t>(input.size()) - 2;
  FASTNN_CHECK(dims >= 1 && dims <= 3, op,
               ": expected input to be 3D, 4D or 5D (batch, channels, 1 to 3 dimensions), got ", input.size(),
               "D tensor instead");
  const ConvPoolArguments a = arguments_of(op, geometry, dims);
  FASTNN_CHECK(all_at_least(a.padding, 0), "negative padding is not supported");
  FASTNN_CHECK(all_at_least(a.stride, 1), "non-positive stride is not supported");
  FASTNN_CHECK(all_at_least(a.dilation, 1), "non-positive dilation is not supported");
  check_channels(input, weight, a.groups);
  check_pool(a, dims);
  for (size_t i = 0; i + 2 < geometry.size(); ++i)
    FASTNN_CHECK(geometry[i] < kLargest, op, ": ", geometry[i], " is too large, expected less than 2**31");
  const ConvPoolGeometry g = geometry_of(op, input, weight, a, ends);
  check_sizes_fit(input, g, dims);
  check_products(op, g);
  const double work = 2.0 * g.batch * g.groups * g.out_channels * g.conv[0] * g.conv[1] * g.conv[2] * g.depth();
  return {kind, dims, g, work};
}

}  // namespace fastnn
