// conv_transpose in training: torch's, or forward the product that frozen models have (layers/transposed_product.h).
#pragma once

#include "../../ops/conv_stock_backward.h"
#include "../layers/transposed_product.h"
#include "images.h"

namespace fastnn {

template <class T>
class ConvTransposeTraining : public AnyConvTraining<T> {
 public:
  explicit ConvTransposeTraining(const ProgramLine& line)
      : AnyConvTraining<T>(line), output_padding_(line.integers("output_padding", 0, kMostSize)) {
    if (line.activation().kind != ActivationKind::identity) line.refuse("in training its activation is identity");
  }

  void forward(Tensor* outputs) override {
    const Tensor &input = this->given[0], &weight = this->given[1];
    const size_t dims = this->dims();
    c_ = this->settings(dims);
    c_.transposed = true;
    c_.output_padding = of_each(output_padding_, dims, "output_padding");
    FASTNN_CHECK(input.size(1) == weight.size(0) && weight.size(0) % c_.groups == 0, kTrainingStep,
                 ": a weight of size ", to_string(weight.sizes()), " and ", c_.groups,
                 " groups do not fit an input of size ", to_string(input.sizes()));
    const Kernels<T> kernels = Kernels<T>::active();
    outputs[0] = is_product(kernels) ? convolved_by_product(kernels) : convolution(input, weight, this->bias(), c_);
  }

  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    std::array<Tensor, 3> all = convolution_backward(gradients[0], this->given[0], this->given[1], c_,
                                                     {wanted[0], wanted[1], this->bias_is_wanted(wanted)});
    this->give(all, wanted, results);
  }

 private:
  // Whether our product is faster than torch's, which goes well through vectors of output channels that lie together.
  bool is_product(const Kernels<T>& kernels) const {
    const Tensor &input = this->given[0], &weight = this->given[1];
    const int64_t lanes = kernels.conv->machine.vector_bytes / static_cast<int64_t>(sizeof(T));
    const bool has_few_channels = weight.size(1) <= (is_channels_last(input) ? lanes / 2 : 2 * lanes);
    if (c_.groups != 1 || !has_few_channels || input.numel() == 0 || weight.numel() == 0) return false;
    for (size_t d = 0; d < c_.stride.size(); ++d) {
      if (c_.dilation[d] != 1 || c_.output_padding[d] >= c_.stride[d]) return false;
    }
    return true;
  }

  Tensor convolved_by_product(const Kernels<T>& kernels) const {
    const PlainImages input(this->given[0]);
    const Tensor weight = dense(this->given[1]);
    const Ints input_sizes = sizes_of(input.tensor), weight_sizes = sizes_of(weight);
    Ints output_sizes{input_sizes[0], weight_sizes[1]};
    for (size_t d = 0; d < c_.stride.size(); ++d) {
      output_sizes.push_back(
          transposed_size(input_sizes[2 + d], weight_sizes[2 + d], c_.stride[d], c_.padding[d], c_.output_padding[d]));
      FASTNN_CHECK(output_sizes.back() > 0, kTrainingStep,
                   ": the output of a transposed convolution would be too small");
    }
    const TransposedSizes sizes = transposed_sizes(input_sizes, weight_sizes, output_sizes, c_.stride, c_.padding);
    check_product(kTrainingStep, sizes.batch, product(output_sizes, 1, output_sizes.size()), sizes.in_channels,
                  sizes.taps());
    const bool has_bias = this->given.size() > 2;
    const Tensor bias = has_bias ? dense(this->given[2]) : Tensor();
    FASTNN_CHECK(!has_bias || (bias.dim() == 1 && bias.numel() == sizes.out_channels), kTrainingStep,
                 ": expected a bias of ", sizes.out_channels, " elements");
    const TransposedProduct<T> product_of(sizes, kernels, has_bias ? data<T>(bias) : nullptr, kIdentity);
    const Scratch<T> packed(product_of.weight_size() + product_of.packed_size());
    product_of.turn(data<T>(weight), packed.get());
    product_of.pack(packed.get(), packed.get() + product_of.weight_size());
    // The product writes pixels whose channels lie together.
    Tensor output = new_formatted(output_sizes, kDtypeOf<T>, true);
    product_of.run(data<T>(input.tensor), input.layout, packed.get() + product_of.weight_size(),
                   mutable_data<T>(output), channels_last_layout(sizes.out_channels, sizes.output));
    const bool last = is_channels_last(this->given[0]) || is_channels_last(this->given[1]);  // as torch's
    return with_strides(in_format(conv_backward_kernels().get<T>(), output, last), last);
  }

  Ints output_padding_;
  StockConvolution c_;
};

}  // namespace fastnn
