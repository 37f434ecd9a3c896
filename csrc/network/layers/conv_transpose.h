// conv_transpose: a transposed convolution, without dilation. In one group it is a product (transposed_product.h). In
// several groups it runs by phases:
//
// Output pixels whose positions are equal modulo the stride use the same positions of the kernel. Such pixels are a
// phase. Each phase is a convolution of stride 1, by a part of the kernel turned around, which writes every stride-th
// pixel.
#pragma once

#include "../array.h"
#include "transposed_product.h"

namespace fastnn {

template <class T>
class ConvTransposeLayer : public Layer<T> {
 public:
  ConvTransposeLayer(const ProgramLine& line, const Weights<T>& weights) : activation_(line.activation()) {
    this->inputs = {line.input("input")};
    const auto& weight = weights.of(line, "weight");
    if (weight.sizes.size() < 3 || weight.sizes.size() > 5) line.refuse("expected a weight of 3 to 5 dimensions");
    weight_ = weight.data;
    weight_sizes_ = weight.sizes;
    groups_ = line.integer("groups", 1, kMostSize);
    if (weight.sizes[0] < 1 || weight.sizes[0] % groups_) line.refuse("expected as many input channels in each group");
    bias_ = weights.of(line, "bias", Ints{checked_product(weight.sizes[1], groups_)});
    const size_t dims = weight_sizes_.size() - 2;
    stride_ = line.integers("stride", 1, kMostSize, dims);
    padding_ = line.integers("padding", 0, kMostSize, dims);
    output_padding_ = line.integers("output_padding", 0, kMostSize, dims);
    for (const int64_t dilation : line.integers("dilation", 1, kMostSize, dims)) {
      if (dilation != 1) line.refuse("expected no dilation");
    }
    int64_t phases = 1;
    for (size_t d = 0; d < dims; ++d) {
      if (weight_sizes_[2 + d] < 1) line.refuse("expected a kernel of at least one position");
      phases = checked_product(phases, stride_[d]);
    }
    if (phases > kMostPhases) line.refuse("expected strides whose product is at most ", kMostPhases);
  }

  FormatRule formats() const override { return FormatRule::each; }
  bool writes_parts() const override { return is_product() || !takes_activation_last(); }

  void set_sizes(Site<T>& site) const override {
    const Ints& input = site.sizes(0);
    FASTNN_CHECK(input.size() == weight_sizes_.size() && input[1] == weight_sizes_[0],
                 "expected a transposed convolution's input to be ", weight_sizes_.size(), "D with ", weight_sizes_[0],
                 " channels, got size ", to_string(input));
    Ints& output = site.outputs[0].sizes;
    output = {input[0], weight_sizes_[1] * groups_};
    for (size_t d = 0; d < stride_.size(); ++d) {
      FASTNN_CHECK(input[2 + d] > 0, "expected images of at least one pixel, got size ", to_string(input));
      const int64_t size =
          transposed_size(input[2 + d], weight_sizes_[2 + d], stride_[d], padding_[d], output_padding_[d]);
      FASTNN_CHECK(size > 0, "the output of a transposed convolution would be too small for input size ",
                   to_string(input));
      output.push_back(size);
    }
    check_product("network", output[0], output[1], product(output, 2, output.size()), weight_sizes_[0],
                  product(weight_sizes_, 2, weight_sizes_.size()));
  }

  double cost(const Site<T>& site) const override {
    if (is_product()) {  // what is multiplied is the same in each format
      const double lanes = static_cast<double>(site.kernels.conv->machine.vector_bytes) / sizeof(T);
      const auto moved = [&](const ValueType& value) {
        return value.channels_last() ? 0 : tuned::kTranspose * static_cast<double>(value.count()) / lanes;
      };
      return moved(site.inputs[0]) + moved(site.outputs[0]);
    }
    const std::shared_ptr<const void> made = prepare(site);
    double cost = 0;
    for (const Phase& phase : *static_cast<const Phases*>(made.get())) cost += phase.plan.cost;
    return cost;
  }

  std::shared_ptr<const void> prepare(const Site<T>& site) const override {
    if (is_product()) return nullptr;
    auto phases = std::make_shared<Phases>();
    const size_t dims = stride_.size();
    int64_t count = 1;
    for (const int64_t stride : stride_) count *= stride;
    for (int64_t number = 0; number < count; ++number) {
      Phase phase{};
      phase.number = number;
      ConvPoolGeometry& g = phase.geometry;
      g.batch = site.sizes(0)[0];
      g.groups = groups_;
      g.in_channels = weight_sizes_[0] / groups_;
      g.out_channels = weight_sizes_[1];
      for (int d = 0; d < 3; ++d) {
        g.input[d] = g.kernel[d] = g.stride[d] = g.dilation[d] = g.conv[d] = 1;
        g.pool_kernel[d] = g.pool_stride[d] = g.pool_dilation[d] = g.output[d] = 1;
      }
      int64_t rest = number;
      bool exists = true;
      for (size_t i = dims; i-- > 0;) {
        const size_t d = 3 - dims + i;
        const int64_t stride = stride_[i], residue = rest % stride, padding = padding_[i];
        rest /= stride;
        phase.residue[d] = residue;
        // The first output pixel of the phase.
        const int64_t first = ((residue - padding) % stride + stride) % stride;
        phase.first[d] = first;
        const int64_t start = (first + padding - residue) / stride;
        const int64_t size = site.outputs[0].sizes[2 + i];
        g.kernel[d] = (weight_sizes_[2 + i] - residue + stride - 1) / stride;
        g.input[d] = site.sizes(0)[2 + i];
        g.padding[d] = g.kernel[d] - 1 - start;
        g.conv[d] = g.output[d] = (size - first + stride - 1) / stride;
        g.padding_end[d] = g.conv[d] + g.kernel[d] - 1 - g.input[d] - g.padding[d];
        exists = exists && g.conv[d] > 0;
        phase.empty = phase.empty || g.kernel[d] <= 0;
      }
      if (!exists) continue;
      if (!phase.empty) {
        phase.key = plan_key<T>(*site.kernels.conv, g, site.inputs[0].channels_last(), true, -1);
        phase.plan = plan_forward(phase.key.geometry, phase.key.request, phase.key.machine);
        if (phase.plan.algorithm == ForwardAlgorithm::stock) {  // which writes no output with gaps, as a phase is
          phase.key.request.algorithm = static_cast<int32_t>(ForwardAlgorithm::direct);
          phase.plan = plan_forward(phase.key.geometry, phase.key.request, phase.key.machine);
        }
        phase.weight_size = g.groups * g.out_channels * g.depth();
      }
      phases->push_back(phase);
    }
    return phases;
  }

  void pack(const Site<T>& site, PackedWriter& packed) const override {
    if (is_product()) {
      const TransposedProduct<T> product = product_of(site);
      T* const to = packed.give<T>(0, product.packed_size());
      if (!to) return;
      const Scratch<T> turned(product.weight_size());
      product.turn(weight_, turned.get());
      return product.pack(turned.get(), to);
    }
    for (const Phase& phase : *static_cast<const Phases*>(site.prepared.get())) {
      if (phase.empty) continue;
      T* const weight = packed.give<T>(phase.key_of_weight(), phase.weight_size);
      if (weight) turn(phase, weight);
      ConvCall<T> call = call_of(site, phase, weight);
      call.plan = &phase.plan;
      call.packed = packed.give<T>(phase.key_of_packed(), phase.plan.packed_size);
      if (call.packed) site.kernels.conv->pack(call, 0, phase.plan.pack_items);
    }
  }

  void run(const LayerCall<T>& given) const override {
    const ValueType& output = given.site.outputs[0];
    // Phases write pixels whose channels lie together.
    const bool copies = !output.channels_last();
    ValueType images = output;
    images.format = Format::channels_last;
    const Scratch<T> own(copies ? output.count() : 0);
    T* const to = copies ? own.get() : given.output(0);
    is_product() ? run_product(given, to, conv_layout(images)) : run_phases(given, to, images);
    if (copies) {
      copy_array(to, images.strides(), given.output(0), output.strides(), output.sizes,
                 memory_order(output.sizes.size(), false));
    }
  }

 private:
  static constexpr int64_t kMostPhases = 256;  // 16 x 16

  bool is_product() const { return groups_ == 1; }
  TransposedProduct<T> product_of(const Site<T>& site) const {
    const TransposedSizes sizes =
        transposed_sizes(site.sizes(0), weight_sizes_, site.outputs[0].sizes, stride_, padding_);
    return {sizes, site.kernels, bias_, activation_};
  }
  void run_product(const LayerCall<T>& given, T* to, const ConvLayout& layout) const {
    const TransposedProduct<T> product = product_of(given.site);
    const T* packed = given.packed.template take<T>(0, product.packed_size());
    const Scratch<T> own(packed ? 0 : product.weight_size() + product.packed_size());
    if (!packed) {
      product.turn(weight_, own.get());
      product.pack(own.get(), own.get() + product.weight_size());
      packed = own.get() + product.weight_size();
    }
    product.run(given.input(0), conv_layout(given.site.inputs[0]), packed, to, layout);
  }
  void run_phases(const LayerCall<T>& given, T* to, const ValueType& images) const {
    const ValueType& output = given.site.outputs[0];
    for (const Phase& phase : *static_cast<const Phases*>(given.site.prepared.get())) {
      const T* weight = phase.empty ? nullptr : given.packed.template take<T>(phase.key_of_weight(), phase.weight_size);
      const bool turns = !phase.empty && !weight;
      const Scratch<T> turned(turns ? phase.weight_size : 0);
      if (turns) {
        turn(phase, turned.get());
        weight = turned.get();
      }
      ConvCall<T> call = call_of(given.site, phase, weight);
      call.input = given.input(0);
      call.output_layout = conv_layout(images);
      int64_t at = 0;
      for (size_t d = 0; d < 3; ++d) {
        at += phase.first[d] * call.output_layout.d[d];
        if (d >= 3 - stride_.size()) call.output_layout.d[d] *= stride_[d + stride_.size() - 3];
      }
      call.output = to + at;
      if (phase.empty) {
        fill_bias(*given.site.kernels.conv, call);
        continue;
      }
      const ConvKernels<T>& kernels = *given.site.kernels.conv;
      const ConvPlan& plan = plan_of_call(kernels, call, phase.key, phase.plan);
      const T* const packed = given.packed.template take<T>(phase.key_of_packed(), phase.plan.packed_size);
      run_by_plan<T>(kernels, call, plan, &plan == &phase.plan ? packed : nullptr);
    }
    if (takes_activation_last()) {
      const ConvKernels<T>& kernels = *given.site.kernels.conv;
      parallel_range(output.count(), kCopyWork, [&](int64_t first, int64_t last) {
        kernels.finish(activation_, to + first, nullptr, last - first, to + first);
      });
    }
  }

  struct Phase {
    ConvPoolGeometry geometry;
    PlanKey key{ConvPoolGeometry{}, conv_kernels().get<T>()};
    ConvPlan plan;
    int64_t residue[3], first[3];  // of the kernel's positions; the first output pixel
    bool empty;                    // whether these pixels use no position of the kernel
    int64_t weight_size, number;

    // The phases depend on the sizes of the input, so each phase has packed blocks of its own.
    int64_t key_of_weight() const { return -2 - number; }
    int64_t key_of_packed() const { return packing_of(plan) + (number + 1) * 4096; }
  };
  using Phases = std::vector<Phase>;

  // The pixels of a phase do not lie together. So an activation other than ReLU runs last, over all pixels in one pass.
  bool takes_activation_last() const {
    return activation_.kind != ActivationKind::relu && activation_.kind != ActivationKind::identity;
  }

  // Writes the phase's part of the weight, turned around, as the weight of a convolution: (out, in, kernel).
  void turn(const Phase& phase, T* to) const {
    const ConvPoolGeometry& g = phase.geometry;
    const size_t dims = stride_.size();
    int64_t kernel[3] = {1, 1, 1}, stride[3] = {1, 1, 1};
    for (size_t d = 0; d < dims; ++d) {
      kernel[3 - dims + d] = weight_sizes_[2 + d];
      stride[3 - dims + d] = stride_[d];
    }
    const int64_t taps = kernel[0] * kernel[1] * kernel[2];
    for (int64_t group = 0; group < g.groups; ++group) {
      for (int64_t out = 0; out < g.out_channels; ++out) {
        for (int64_t in = 0; in < g.in_channels; ++in) {
          const T* const from = weight_ + ((group * g.in_channels + in) * g.out_channels + out) * taps;
          for (int64_t z = g.kernel[0]; z-- > 0;) {
            for (int64_t y = g.kernel[1]; y-- > 0;) {
              for (int64_t x = g.kernel[2]; x-- > 0;) {
                const int64_t place[3] = {phase.residue[0] + stride[0] * z, phase.residue[1] + stride[1] * y,
                                          phase.residue[2] + stride[2] * x};
                *to++ = from[(place[0] * kernel[1] + place[1]) * kernel[2] + place[2]];
              }
            }
          }
        }
      }
    }
  }

  ConvCall<T> call_of(const Site<T>& site, const Phase& phase, const T* weight) const {
    ConvCall<T> call{};
    call.geometry = phase.geometry;
    call.input_layout = conv_layout(site.inputs[0]);
    call.weight = weight;
    call.weight_layout = contiguous_layout(phase.geometry.in_channels, phase.geometry.kernel);
    call.bias = bias_;
    call.activation = takes_activation_last() ? kIdentity : activation_;
    return call;
  }

  void fill_bias(const ConvKernels<T>& kernels, const ConvCall<T>& call) const {
    const ConvPoolGeometry& g = call.geometry;
    const ConvLayout& layout = call.output_layout;
    const int64_t channels = g.groups * g.out_channels;
    const std::vector<T> zeros(bias_ ? 0 : static_cast<size_t>(channels));
    const T* const bias = bias_ ? bias_ : zeros.data();
    for (int64_t pixel = 0; pixel < g.batch * g.pixels(); ++pixel) {
      const int64_t x = pixel % g.output[2], y = pixel / g.output[2] % g.output[1];
      const int64_t z = pixel / (g.output[2] * g.output[1]) % g.output[0], n = pixel / g.pixels();
      T* const to = call.output + n * layout.n + z * layout.d[0] + y * layout.d[1] + x * layout.d[2];
      kernels.finish(call.activation, bias, nullptr, channels, to);
    }
  }

  const T *weight_, *bias_;
  Ints weight_sizes_, stride_, padding_, output_padding_;
  int64_t groups_;
  Activation activation_;
};

inline LayerEntry conv_transpose_entry() {
  return layer_entry<ConvTransposeLayer>("conv_transpose", {"input", "weight", "bias?"},
                                         {{"stride", "ints", "1"},
                                          {"padding", "ints", "0"},
                                          {"output_padding", "ints", "0"},
                                          {"dilation", "ints", "1"},
                                          {"groups", "int", "1"},
                                          {"activation", "activation", "identity"}});
}

}  // namespace fastnn
