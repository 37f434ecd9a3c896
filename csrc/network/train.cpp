// A network under autograd: forward in one call, backward in another.
#include "../ops/product.h"
#include "../ops/register.h"
#include "forward_pass.h"

namespace fastnn {
namespace {

template <class T>
Tensor copy_of(const Tensor& tensor) {
  if (!tensor.is_contiguous() && !is_dense_channels_last(tensor)) return copied(tensor);
  Tensor copy = new_like<T>(tensor);
  const T* const from = data<T>(tensor);
  T* const to = mutable_data<T>(copy);
  parallel_range(copy.numel(), kCopyWork,
                 [&](int64_t first, int64_t last) { std::copy(from + first, from + last, to + first); });
  return copy;
}

std::tuple<TensorList, Tensor> network_with_pass(const TensorList& inputs, const TensorList& parameters,
                                                 const std::string& program) {
  const ScalarType dtype = check_arguments(inputs.data(), inputs.size(), parameters, true);
  return with_kernel_dtype(dtype, [&](auto type) -> std::tuple<TensorList, Tensor> {
    using T = decltype(type);
    auto forward = std::make_unique<ForwardPassOf<T>>(program, inputs, parameters);
    TrainingPass<T>& pass = *forward->pass;
    pass.commit();  // before the loss, which may read the model's new statistics
    // The outputs are copies, since the layers keep their own. The copies have the same strides, because what follows
    // may draw random numbers in the order of memory.
    const TensorsInKeptMemory kept;
    TensorList outputs;
    for (size_t i = 0; i < pass.outputs(); ++i) outputs.push_back(copy_of<T>(pass.output(i)));
    const Tensor number = new_tensor({1}, ScalarType::Long);
    mutable_data<int64_t>(number)[0] = ForwardPasses::add(std::move(forward));
    return {std::move(outputs), number};
  });
}

TensorList network_backward(const std::vector<OptionalTensor>& gradients, const Tensor& number,
                            const TensorList& inputs, const TensorList& parameters, const Ints& wanted, bool last) {
  const size_t first = inputs.size(), count = first + parameters.size();
  std::vector<char> of_inputs(first), of_parameters(parameters.size());
  for (size_t i = 0; i < wanted.size(); ++i) {
    FASTNN_CHECK(wanted[i] >= 0 && wanted[i] < static_cast<int64_t>(count) && (i == 0 || wanted[i - 1] < wanted[i]),
                 kTrainingStep, ": expected numbers of inputs and parameters in ascending order");
    const size_t place = static_cast<size_t>(wanted[i]);
    (place < first ? of_inputs[place] : of_parameters[place - first]) = 1;
  }
  return TakenPass(number, !last).with_dtype([&](auto& taken) {
    using T = typename std::decay_t<decltype(taken)>::Element;
    FASTNN_CHECK(inputs.size() == taken.inputs.size(), kTrainingStep, ": expected the ", taken.inputs.size(),
                 " inputs of the forward, got ", inputs.size());
    for (size_t i = 0; i < first; ++i) {
      FASTNN_CHECK(inputs[i].scalar_type() == taken.inputs[i].scalar_type() && same_sizes(inputs[i], taken.inputs[i]),
                   kTrainingStep, ": expected the inputs of the forward");
    }
    taken.check_unchanged(parameters, true);
    TrainingPass<T>& run = *taken.pass;
    run.backward(check_output_gradients<T>(run, gradients), of_parameters, of_inputs, last);
    TensorList result;
    for (const int64_t one : wanted) {
      const size_t place = static_cast<size_t>(one);
      Tensor gradient = place < first ? run.take_input_gradient(place) : run.take_parameter_gradient(place - first);
      result.push_back(gradient.defined() ? std::move(gradient) : new_tensor({0}, kDtypeOf<T>));
    }
    return result;
  });
}

TensorList network_draws(const Tensor& number) {
  TensorList copies;
  TakenPass(number, true).with_dtype([&](auto& taken) {
    for (const Tensor& some : taken.pass->drawn()) copies.push_back(copied(some));
    return TensorList();
  });
  return copies;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // program: see program.h; parameters: its weights, in order, of which running statistics change. number: that under
  // which backward finds what forward has saved, until the extension's forget_pass forgets it.
  m.def(
      "network_with_pass(Tensor[] inputs, Tensor(a!)[] parameters, str program) -> (Tensor[] outputs, Tensor number)");
  // gradients: those of the outputs. inputs, parameters: those of the forward. wanted: the numbers of those whose
  // gradients are returned, in ascending order, the inputs' first. A gradient on which no output depends has no
  // elements and one dimension. last: forget the pass.
  m.def(
      "network_backward(Tensor?[] gradients, Tensor number, Tensor[] inputs, Tensor[] parameters, int[] wanted,"
      " bool last) -> Tensor[] gradients");
  // The random numbers that the forward of this number has drawn, a tensor for each layer that has drawn some.
  m.def("network_draws(Tensor number) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("network_with_pass", FASTNN_BOX(network_with_pass));
  m.impl("network_backward", FASTNN_BOX(network_backward));
  m.impl("network_draws", FASTNN_BOX(network_draws));
}

}  // namespace

void forget_pass(int64_t number) {
  ForwardPasses::take(number);
}

ForwardPasses& ForwardPasses::instance() {
  static ForwardPasses& all = *new ForwardPasses;
  return all;
}

}  // namespace fastnn
