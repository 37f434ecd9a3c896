// A change of format. No program names this layer: each network has one behind each input of images, so that the layers
// may take the input in channels last where that costs less.
#pragma once

#include "../array.h"

namespace fastnn {

template <class T>
class ReformatLayer : public Layer<T> {
 public:
  ReformatLayer(int64_t input, int64_t output) {
    this->inputs = {input};
    this->outputs = {output};
  }
  FormatRule formats() const override { return FormatRule::each; }
  void set_sizes(Site<T>& site) const override { site.outputs[0].sizes = site.sizes(0); }
  bool is_view(const Site<T>& site) const override { return site.inputs[0].format == site.outputs[0].format; }

  double cost(const Site<T>& site) const override {
    const double lanes = static_cast<double>(conv_kernels().get<T>().machine.vector_bytes) / sizeof(T);
    return is_view(site) ? 0 : static_cast<double>(site.outputs[0].count()) / lanes * tuned::kTranspose;
  }

  void run(const LayerCall<T>& call) const override {
    const ValueType &input = call.site.inputs[0], &output = call.site.outputs[0];
    copy_array(call.input(0), input.strides(), call.output(0), output.strides(), output.sizes,
               memory_order(output.sizes.size(), output.channels_last()));
  }
};

}  // namespace fastnn
