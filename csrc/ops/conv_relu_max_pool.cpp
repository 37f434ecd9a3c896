// fastnn::conv_relu_max_pool and its backward: allocation, threads, registration.
#include <cstring>
#include <string>
#include <tuple>

#include "conv_by_stock.h"
#include "conv_stock.h"
#include "register.h"

namespace fastnn {
namespace {

void check_places(const char* op, const ConvPoolGeometry& g) {
  const int64_t places = checked_product(checked_product(g.pool_kernel[0], g.pool_kernel[1]), g.pool_kernel[2]);
  FASTNN_CHECK(places <= kMostPlaces, op, ": a winner's place is one byte, so a window may have at most ", kMostPlaces,
               " elements, got ", places);
}

// ---- forward ------------------------------------------------------------------------------------------------

// A call that lacks bias, output and plan.
template <class T>
ConvCall<T> call_of(const ConvPoolProblem& problem, const PlainImages& input, const PlainImages& weight) {
  ConvCall<T> call{};
  call.geometry = problem.geometry;
  call.input = data<T>(input.tensor);
  call.input_layout = input.layout;
  call.weight = data<T>(weight.tensor);
  call.weight_layout = weight.layout;
  return call;
}

template <class T>
void run_forward(const ConvPoolProblem& problem, const Tensor& given_input, const Tensor& given_weight,
                 const std::optional<Tensor>& bias, const Tensor& output, const Tensor* winners, int64_t algorithm) {
  const Tensor dense_bias = bias ? dense(*bias) : Tensor();
  const PlainImages input(given_input), weight(given_weight), result(output);
  ConvCall<T> call = call_of<T>(problem, input, weight);
  call.bias = bias ? data<T>(dense_bias) : nullptr;
  call.output = mutable_data<T>(output);
  call.output_layout = result.layout;
  call.winners = winners ? mutable_data<uint8_t>(*winners) : nullptr;
  run_conv(call, problem.dims, input.channels_last, result.channels_last, algorithm,
           [](const ConvPlan&) -> const Compute<T>* { return nullptr; });
}

// As stock: its float64 convolution in three dimensions knows no channels last.
bool output_is_channels_last(const ConvPoolProblem& problem, const Tensor& input, const Tensor& weight) {
  return (is_channels_last(input) || is_channels_last(weight)) &&
         !(problem.kind.dtype == ScalarType::Double && problem.dims == 3);
}

// The algorithm's number, or -1 for none.
template <class T>
int64_t algorithm_of(const char* op, const std::optional<std::string>& name, const ConvPoolProblem& problem,
                     bool input_channels_last) {
  if (!name) return -1;
  const PlanKey key = plan_key<T>(conv_kernels().get<T>(), problem.geometry, input_channels_last, false, -1);
  for (int i = 0; i < kForwardAlgorithms; ++i) {
    const ForwardAlgorithm algorithm = static_cast<ForwardAlgorithm>(i);
    if (*name != algorithm_name(algorithm)) continue;
    FASTNN_CHECK(algorithm_applies(algorithm, key.geometry, key.request, key.machine), op, ": algorithm '", *name,
                 "' does not apply to this call");
    return i;
  }
  fail(op, ": there is no algorithm '", *name, "'");
}

// winners: where to put them, or null.
Tensor forward(const char* op, const Tensor& given_input, const Tensor& given_weight, const std::optional<Tensor>& bias,
               const Ints& geometry, const std::optional<std::string>& algorithm, std::optional<Tensor>* winners) {
  const ConvPoolProblem problem = check_problem(op, given_input, given_weight, bias, geometry);
  const Tensor input = in_memory(given_input), weight = in_memory(given_weight);
  const ScalarType dtype = problem.kind.dtype;
  const bool channels_last = output_is_channels_last(problem, input, weight);
  const Ints sizes = output_sizes(problem);
  Tensor output = new_formatted(sizes, dtype, channels_last);
  if (winners) {
    check_places(op, problem.geometry);
    *winners = new_formatted(sizes, ScalarType::Byte, channels_last);
  }
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t wanted = algorithm_of<T>(op, algorithm, problem, is_channels_last(input));
    if (output.numel() == 0) return;
    run_forward<T>(problem, input, weight, bias, output, winners ? &**winners : nullptr, wanted);
  });
  return output;
}

Tensor conv_relu_max_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                          const Ints& geometry, const std::optional<std::string>& algorithm) {
  return forward("conv_relu_max_pool", input, weight, bias, geometry, algorithm, nullptr);
}

std::tuple<Tensor, Tensor> conv_relu_max_pool_with_winners(const Tensor& input, const Tensor& weight,
                                                           const std::optional<Tensor>& bias, const Ints& geometry,
                                                           const std::optional<std::string>& algorithm) {
  std::optional<Tensor> winners;
  Tensor output = forward("conv_relu_max_pool_with_winners", input, weight, bias, geometry, algorithm, &winners);
  return {std::move(output), std::move(*winners)};
}

// ---- what is chosen ------------------------------------------------------------------------------------------

std::string algorithm_name(ConvBackwardAlgorithm algorithm) {
  switch (algorithm) {
    case ConvBackwardAlgorithm::winners:
      return "winners";
    case ConvBackwardAlgorithm::depthwise:
      return "depthwise";
    case ConvBackwardAlgorithm::pixels:
      return "pixels";
    case ConvBackwardAlgorithm::taps:
      return "taps";
  }
  return "";
}

std::tuple<std::string, std::string> conv_relu_max_pool_algorithm(const Tensor& given_input, const Tensor& given_weight,
                                                                  const std::optional<Tensor>& bias,
                                                                  const Ints& geometry,
                                                                  const std::optional<std::string>& algorithm) {
  const char* op = "conv_relu_max_pool_algorithm";
  const ConvPoolProblem problem = check_problem(op, given_input, given_weight, bias, geometry);
  const Tensor input = in_memory(given_input), weight = in_memory(given_weight);
  return with_dtype(problem.kind.dtype, [&](auto type) -> std::tuple<std::string, std::string> {
    using T = decltype(type);
    const ConvKernels<T>& kernels = conv_kernels().get<T>();
    const int64_t wanted = algorithm_of<T>(op, algorithm, problem, is_channels_last(input));
    if (problem.geometry.batch == 0) return {"none", "none"};
    const PlainImages images(input), weights(weight);
    const bool channels_last = output_is_channels_last(problem, input, weight);
    const ConvPlan& forward =
        plan_of_call(kernels, call_of<T>(problem, images, weights),
                     plan_key<T>(kernels, problem.geometry, images.channels_last, channels_last, wanted));
    ConvPoolGeometry g = problem.geometry;  // as backward takes it
    ConvLayout layout = layout_of(input);
    skip_unused_input(g, layout);
    const ConvPoolBackwardPlan backward = conv_backward_kernels().get<T>().plan(g, layout, layout, false);
    const bool by_stock = goes_by_stock(problem, is_channels_last(input));
    return {algorithm_name(forward.algorithm), by_stock ? "stock" : algorithm_name(backward.algorithm)};
  });
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
void run_backward(const ConvBackwardKernels<T>& kernels, const ConvPoolProblem& problem, const Tensor& grad_output,
                  const Tensor& winners, const Tensor& input, const Tensor& weight, Wanted wanted,
                  const Tensor& grad_input, const Tensor& grad_weight, const Tensor& grad_bias) {
  using C = Compute<T>;
  ConvPoolGeometry g = problem.geometry, same = problem.geometry;
  ConvLayout input_layout = layout_of(input), grad_input_layout = layout_of(grad_input);
  skip_unused_input(g, input_layout);
  skip_unused_input(same, grad_input_layout);
  if (wanted.input && !std::equal(g.input, g.input + 3, problem.geometry.input)) {
    std::memset(grad_input.mutable_data_ptr(), 0, grad_input.numel() * grad_input.element_size());
  }
  ConvPoolBackward<T> call{g,
                           kernels.plan(g, input_layout, grad_input_layout, false),
                           data<T>(grad_output),
                           layout_of(grad_output),
                           data<uint8_t>(winners),
                           layout_of(winners),
                           data<T>(input),
                           input_layout,
                           data<T>(weight),
                           layout_of(weight),
                           wanted.input ? mutable_data<T>(grad_input) : nullptr,
                           grad_input_layout,
                           nullptr,
                           1};
  ConvPoolBackwardPlan& plan = call.plan;
  if (!kernels.plan_holds(call)) plan = kernels.plan(g, input_layout, grad_input_layout, true);
  const int64_t joined = plan.algorithm == ConvBackwardAlgorithm::winners
                             ? kernels.groups_to_join(g, data<T>(grad_output), layout_of(grad_output))
                             : 1;
  if (joined > 1) {
    g.groups /= joined;
    g.in_channels *= joined;
    g.out_channels *= joined;
    plan = kernels.plan(g, input_layout, grad_input_layout, true);
    call.geometry = g;
    call.joined = joined;
  }
  // Images first; where they are fewer than threads, each thread has some of the channels, or of the pixels.
  const int64_t threads = useful_threads(problem.work / 2);
  const int64_t image_parts = std::min(threads, g.batch);
  const int64_t blocks = plan.blocks;
  const int64_t block_parts = std::min(std::max<int64_t>(threads / image_parts, 1), blocks);
  const int64_t pixel_parts = std::min(std::max<int64_t>(threads / (image_parts * block_parts), 1), plan.most_parts);
  const int64_t parts = image_parts * pixel_parts;  // of which each has a weight gradient of its own
  const int64_t bias_size = g.groups * g.out_channels;
  const int64_t scratch_size = (plan.scratch_size + 63) / 64 * 64;
  const int64_t weight_size = wanted.weight ? plan.weight_size : 0;
  Scratch<C> packed(wanted.input ? plan.packed_size : 0);
  Scratch<C> weight_parts(checked_product(parts, weight_size));
  Scratch<C> weight_lost(plan.keeps_lost ? checked_product(parts, weight_size) : 0);
  Scratch<C> bias_parts(checked_product(parts, bias_size));
  Scratch<char> scratch(checked_product(parts * block_parts, scratch_size));
  call.packed = packed.get();
  if (wanted.input) kernels.pack(call);
  std::fill(bias_parts.get(), bias_parts.get() + parts * bias_size, C(0));
  parallel_chunks(parts * block_parts, parts * block_parts, [&](int64_t chunk, int64_t, int64_t) {
    const int64_t part = chunk / block_parts, image_part = part / pixel_parts, block_part = chunk % block_parts;
    const int64_t first_block = blocks * block_part / block_parts, last_block = blocks * (block_part + 1) / block_parts;
    const ConvPoolPiece piece = {g.batch * image_part / image_parts,
                                 g.batch * (image_part + 1) / image_parts,
                                 first_block,
                                 last_block,
                                 part % pixel_parts,
                                 pixel_parts};
    C* weight_part = weight_parts.get() + part * weight_size;
    const int64_t block_size = plan.weight_size / blocks;
    C* lost_part = plan.keeps_lost ? weight_lost.get() + part * weight_size : nullptr;
    if (wanted.weight && lost_part) {
      std::fill(lost_part + first_block * block_size, lost_part + last_block * block_size, C(0));
    }
    C* bias_part = bias_parts.get() + part * bias_size;
    kernels.backward(call, piece, wanted.weight ? weight_part : nullptr, lost_part, wanted.bias ? bias_part : nullptr,
                     scratch.get() + chunk * scratch_size);
  });
  sum_parts(weight_parts.get(), parts, weight_size, threads);
  sum_parts(bias_parts.get(), parts, bias_size, 1);
  if (wanted.weight) {
    kernels.unpack_weight(call, weight_parts.get(), mutable_data<T>(grad_weight), layout_of(grad_weight));
  }
  if (wanted.bias) kernels.store(bias_parts.get(), bias_size, mutable_data<T>(grad_bias));
}

void check_size(const Tensor& tensor, const Ints& sizes, const char* op, const char* name) {
  FASTNN_CHECK(sizes_of(tensor) == sizes, op, ": expected ", name, " of size ", to_string(sizes), ", got ",
               to_string(tensor.sizes()));
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_max_pool_backward(const Tensor& given_gradient,
                                                               const Tensor& given_winners, const Tensor& given_input,
                                                               const Tensor& given_weight, const Ints& geometry,
                                                               bool input_wanted, bool weight_wanted,
                                                               bool bias_wanted) {
  const char* op = "conv_relu_max_pool_backward";
  const ConvPoolProblem problem = check_problem(op, given_input, given_weight, std::nullopt, geometry);
  const ConvPoolGeometry& g = problem.geometry;
  check_places(op, g);
  check_same_kind(given_gradient, problem.kind, "grad_output");
  check_size(given_gradient, output_sizes(problem), op, "grad_output");
  check_plain(given_winners, op, "winners");
  FASTNN_CHECK(given_winners.scalar_type() == ScalarType::Byte, op, ": expected winners to have dtype Byte, but got ",
               torch::headeronly::toString(given_winners.scalar_type()));
  check_memory(given_winners, op, "winners");
  check_size(given_winners, output_sizes(problem), op, "winners");
  const Tensor grad_output = in_memory(given_gradient), winners = in_memory(given_winners);
  const Tensor input = in_memory(given_input), weight = in_memory(given_weight);
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
  const Wanted wanted{input_wanted, weight_wanted, bias_wanted};
  return with_dtype(dtype, [&](auto type) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(type);
    const ConvBackwardKernels<T>& kernels = conv_backward_kernels().get<T>();  // read once: see run_conv_pool
    const bool is_empty = g.batch == 0;
    FASTNN_CHECK(is_empty || kernels.winners_are_valid(g, data<uint8_t>(winners), layout_of(winners)), op,
                 ": winners has a place that its window doesn't have");
    if (!is_empty && input_wanted && weight_wanted && goes_by_stock(problem, is_channels_last(input))) {
      ConvGradients gradients = gradients_by_stock(kernels, problem, grad_output, winners, input, weight, bias_wanted);
      return {std::move(gradients.input), std::move(gradients.weight), std::move(gradients.bias)};
    }
    Tensor grad_input = new_formatted(sizes_if(input_wanted, sizes_of(input)), dtype, is_channels_last(input));
    Tensor grad_weight = new_formatted(sizes_if(weight_wanted, sizes_of(weight)), dtype, is_channels_last(weight));
    Tensor grad_bias = new_tensor({bias_wanted ? weight.size(0) : 0}, dtype);
    if (is_empty) {
      std::fill_n(mutable_data<T>(grad_weight), grad_weight.numel(), T{});
      std::fill_n(mutable_data<T>(grad_bias), grad_bias.numel(), T{});
    } else {
      run_backward(kernels, problem, grad_output, winners, input, weight, wanted, grad_input, grad_weight, grad_bias);
    }
    return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // geometry: stride, padding, dilation, pool_kernel_size, pool_stride, pool_padding, pool_dilation, one value a
  // dimension each, then groups and ceil_mode (fastnn.ops.conv_relu_max_pool.Geometry)
  // algorithm: of csrc/kernels/conv/plan.h, by name, for tests; None leaves the choice to the planner
  m.def("conv_relu_max_pool(Tensor input, Tensor weight, Tensor? bias, int[] geometry, str? algorithm=None) -> Tensor");
  // winners: uint8 of the output's size, each window's winner by its place in the window, 255 where the output has
  // no gradient. A window may have at most 254 elements.
  m.def(
      "conv_relu_max_pool_with_winners(Tensor input, Tensor weight, Tensor? bias, int[] geometry, str? algorithm=None)"
      " -> (Tensor output, Tensor winners)");
  // The names of csrc/kernels/conv's algorithms for such a call and for its backward; "none" if there
  // is nothing to compute.
  m.def(
      "conv_relu_max_pool_algorithm(Tensor input, Tensor weight, Tensor? bias, int[] geometry, str? algorithm=None)"
      " -> (str forward, str backward)");
  // A gradient that is not wanted comes back empty.
  m.def(
      "conv_relu_max_pool_backward(Tensor grad_output, Tensor winners, Tensor input, Tensor weight, int[] geometry,"
      " bool input_wanted, bool weight_wanted, bool bias_wanted)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("conv_relu_max_pool", FASTNN_BOX(conv_relu_max_pool));
  m.impl("conv_relu_max_pool_with_winners", FASTNN_BOX(conv_relu_max_pool_with_winners));
  m.impl("conv_relu_max_pool_algorithm", FASTNN_BOX(conv_relu_max_pool_algorithm));
  m.impl("conv_relu_max_pool_backward", FASTNN_BOX(conv_relu_max_pool_backward));
}

}  // namespace
}  // namespace fastnn
