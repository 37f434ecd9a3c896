// matmul: the product of two values, or of a value and a weight, by torch.
#pragma once

#include "../../ops/stock.h"
#include "../array.h"

namespace fastnn {

template <class T>
class MatmulLayer : public Layer<T> {
 public:
  MatmulLayer(const ProgramLine& line, const Weights<T>&) { this->inputs = {line.input("input"), line.input("other")}; }
  bool reads_parts() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    const Ints &a = site.sizes(0), &b = site.sizes(1);
    FASTNN_CHECK(a.size() >= 2 && b.size() >= 2, "expected matrices, got sizes ", to_string(a), " and ", to_string(b));
    FASTNN_CHECK(a.back() == b[b.size() - 2], "mat1 and mat2 shapes cannot be multiplied (", to_string(a), " and ",
                 to_string(b), ")");
    Ints& sizes = site.outputs[0].sizes;
    sizes = broadcast_sizes(Ints(a.begin(), a.end() - 2), Ints(b.begin(), b.end() - 2));
    sizes.push_back(a[a.size() - 2]);
    sizes.push_back(b.back());
  }
  void run(const LayerCall<T>& call) const override {
    const auto tensor = [&](size_t i) {
      const ValueType& value = call.site.inputs[i];
      return tensor_over(call.input(i), value.sizes, value.strides());
    };
    const ValueType& output = call.site.outputs[0];
    const Tensor to = tensor_over(call.output(0), output.sizes, output.strides());
    stock("aten::matmul", "out", tensor(0), tensor(1), to);
  }
};

inline LayerEntry matmul_entry() {
  return layer_entry<MatmulLayer>("matmul", {"input", "other"}, {});
}

}  // namespace fastnn
