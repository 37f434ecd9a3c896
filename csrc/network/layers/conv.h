// conv: a convolution of one to three dimensions, with an addend, an activation and a max-pool.
#pragma once

#include <cmath>

#include "../../ops/conv_forward.h"
#include "packed_layers.h"

namespace fastnn {

// The layout of a value of images for the convolution's kernels.
inline ConvLayout conv_layout(const ValueType& value) {
  const size_t dims = value.sizes.size() - 2;
  int64_t sizes[3] = {1, 1, 1};
  for (size_t d = 0; d < dims; ++d) sizes[3 - dims + d] = value.sizes[2 + d];
  const int64_t channels = value.sizes[1];
  return value.channels_last() ? channels_last_layout(value.pitch ? value.pitch : channels, sizes)
                               : contiguous_layout(channels, sizes);
}

template <class T>
class ConvLayer : public Layer<T> {
 public:
  ConvLayer(const ProgramLine& line, const Weights<T>& weights) : activation_(line.activation()) {
    this->inputs = {line.input("input")};
    if (line.has("addend")) this->inputs.push_back(line.input("addend"));
    const auto& weight = weights.of(line, "weight");
    if (weight.sizes.size() < 3 || weight.sizes.size() > 5) line.refuse("expected a weight of 3 to 5 dimensions");
    weight_ = weight.data;
    weight_sizes_ = weight.sizes;
    is_packed_ = weights.are_packed;
    bias_ = weights.of(line, "bias", Ints{weight.sizes[0]});
    const size_t dims = weight_sizes_.size() - 2;
    const auto numbers = [&](const char* name, int64_t least) { return line.integers(name, least, kMostSize, dims); };
    const Ints pool = numbers("pool", 1);
    const Ints pool_stride = line.text("pool_stride").empty() ? pool : numbers("pool_stride", 1);
    geometry_ = flat_geometry({numbers("stride", 1), numbers("padding", 0), numbers("dilation", 1), pool, pool_stride,
                               numbers("pool_padding", 0), numbers("pool_dilation", 1),
                               line.integer("groups", 1, kMostSize), line.flag("ceil_mode")});
    const auto at_ends = [&](const char* name) {
      return line.text(name).empty() ? Ints{} : line.integers(name, 0, kMostSize, dims);
    };
    ends_ = {at_ends("padding_end"), at_ends("crop")};
    const bool plain = activation_.kind == ActivationKind::relu || activation_.kind == ActivationKind::identity;
    bool pools = false;
    for (size_t d = 0; d < dims; ++d) pools = pools || pool[d] > 1 || pool_stride[d] > 1;
    if (pools && (!plain || line.has("addend"))) line.refuse("no pool can follow its addend or activation");
  }

  FormatRule formats() const override { return FormatRule::each; }
  // (An addend has the output's format.)
  bool writes_parts() const override { return this->inputs.size() == 1; }

  void set_sizes(Site<T>& site) const override {
    const Ints& input = site.sizes(0);
    FASTNN_CHECK(input.size() == weight_sizes_.size(), "expected a convolution's input to be ", weight_sizes_.size(),
                 "D (batch, channels, ", weight_sizes_.size() - 2, " dimensions), got size ", to_string(input));
    site.outputs[0].sizes = fastnn::output_sizes(problem(input));
    if (site.inputs.size() > 1) {
      FASTNN_CHECK(site.sizes(1) == site.outputs[0].sizes, "expected a convolution's addend of size ",
                   to_string(site.outputs[0].sizes), ", got ", to_string(site.sizes(1)));
    }
  }

  double cost(const Site<T>& site) const override {
    const std::shared_ptr<const void> made = prepare(site);
    return static_cast<const Prepared*>(made.get())->cost;
  }

  std::shared_ptr<const void> prepare(const Site<T>& site) const override {
    const ConvKernels<T>& kernels = *site.kernels.conv;
    const ConvPoolProblem problem = this->problem(site.sizes(0));
    const ConvPoolGeometry& g = problem.geometry;
    PlanKey key = plan_key<T>(kernels, g, site.inputs[0].channels_last(), site.outputs[0].channels_last(), -1);
    key.request.is_packed = is_packed_;
    auto prepared = std::make_shared<Prepared>(Prepared{problem, key, {}, false, 0});
    if (is_product(site, g)) {
      prepared->as_product = true;
      const double lanes = static_cast<double>(kernels.machine.vector_bytes) / sizeof(T);
      const double rows = static_cast<double>(g.batch * g.pixels());
      prepared->cost =
          rows * std::ceil(static_cast<double>(g.out_channels) / lanes) * static_cast<double>(g.in_channels);
      return prepared;
    }
    prepared->plan = plan_forward(key.geometry, key.request, key.machine);
    prepared->cost = prepared->plan.cost;
    return prepared;
  }

  void pack(const Site<T>& site, PackedWriter& packed) const override {
    const Prepared& prepared = *static_cast<const Prepared*>(site.prepared.get());
    const ConvPoolGeometry& g = prepared.problem.geometry;
    if (prepared.as_product) {
      const MlpKernels<T>& kernels = *site.kernels.mlp;
      T* to = packed.give<T>(kProduct, kernels.packed_size(g.out_channels, g.in_channels));
      if (to) kernels.pack(weight_, g.out_channels, g.in_channels, 0, 1, to);
      return;
    }
    ConvCall<T> call = call_of(site, g);
    // A weight that the plan's transforms would spoil is not packed: its calls find direct convolution by themselves.
    if (prepared.plan.needs_moderate && !site.kernels.conv->weight_is_moderate(call)) return;
    call.plan = &prepared.plan;
    call.packed = packed.give<T>(packing_of(prepared.plan), prepared.plan.packed_size);
    if (call.packed) site.kernels.conv->pack(call, 0, prepared.plan.pack_items);
  }

  void run(const LayerCall<T>& given) const override {
    const Prepared& prepared = *static_cast<const Prepared*>(given.site.prepared.get());
    const ConvPoolGeometry& g = prepared.problem.geometry;
    if (prepared.as_product) return run_product(given, g);
    ConvCall<T> call = call_of(given.site, g);
    call.input = given.input(0);
    call.output = given.output(0);
    call.addend = given.site.inputs.size() > 1 ? given.input(1) : nullptr;
    run_planned_conv<T>(*given.site.kernels.conv, call, prepared.problem.dims, prepared.key, prepared.plan,
                        given.packed.template take<T>(packing_of(prepared.plan), prepared.plan.packed_size));
  }

 private:
  static constexpr int64_t kProduct = -1;  // the number of a packing that no plan has

  struct Prepared {
    ConvPoolProblem problem;
    PlanKey key;
    ConvPlan plan;
    bool as_product;
    double cost;
  };

  ConvPoolProblem problem(const Ints& input) const {
    return problem_of({kDtypeOf<T>, 0, "network"}, input, weight_sizes_, geometry_, ends_);
  }

  // Whether the convolution is a product of two matrices: the pixels, whose channels lie together, and the weight.
  static bool is_product(const Site<T>& site, const ConvPoolGeometry& g) {
    const auto has_rows = [](const ValueType& value) {
      return value.channels_last() || product(value.sizes, 2, value.sizes.size()) == 1;
    };
    bool plain = g.taps() == 1 && g.groups == 1 && g.pools_nothing() && g.ends_as_in_torch();
    for (int d = 0; d < 3; ++d) plain = plain && g.stride[d] == 1 && g.padding[d] == 0;
    return plain && has_rows(site.inputs[0]) && has_rows(site.outputs[0]);
  }

  void run_product(const LayerCall<T>& given, const ConvPoolGeometry& g) const {
    const MlpKernels<T>& kernels = *given.site.kernels.mlp;
    const T* const addend = given.site.inputs.size() > 1 ? given.input(1) : nullptr;
    MlpLayer<T> layer{weight_, bias_,  g.in_channels, g.out_channels, addend ? kIdentity : activation_,
                      nullptr, nullptr};
    const int64_t rows = g.batch * g.pixels();
    const PackedLayers<T> packed(kernels, &layer, 1, rows, kProduct, given.packed);
    const double work = 2.0 * static_cast<double>(rows) * static_cast<double>(g.in_channels * g.out_channels);
    const int64_t chunks = std::min(useful_threads(work), rows);
    const int64_t scratch_size = kernels.scratch_size(std::max(g.in_channels, g.out_channels));
    const Scratch<T> scratch(checked_product(chunks, scratch_size));
    constexpr int64_t kTogether = 48;  // so few rows at a time are still in cache when they are finished or moved
    const int64_t pitch = given.site.outputs[0].pitch, out = g.out_channels;
    const Scratch<T> blocks(pitch ? checked_product(chunks, kTogether * out) : 0);
    parallel_chunks(chunks, rows, [&](int64_t chunk, int64_t first, int64_t last) {
      T* const own = scratch.get() + chunk * scratch_size;
      if (!addend && !pitch)
        return kernels.forward(&layer, 1, false, given.input(0), given.output(0), first, last, own);
      for (int64_t row = first; row < last; row += kTogether) {
        const int64_t count = std::min(kTogether, last - row);
        const T* const from = given.input(0) + row * g.in_channels;
        T* const to = pitch ? blocks.get() + chunk * kTogether * out : given.output(0) + row * out;
        kernels.forward(&layer, 1, false, from, to, 0, count, own);
        if (addend) given.site.kernels.conv->finish(activation_, to, addend + row * out, count * out, to);
        for (int64_t r = 0; pitch && r < count; ++r) {
          std::copy_n(to + r * out, out, given.output(0) + (row + r) * pitch);
        }
      }
    });
  }

  ConvCall<T> call_of(const Site<T>& site, const ConvPoolGeometry& g) const {
    ConvCall<T> call{};
    call.geometry = g;
    call.input_layout = conv_layout(site.inputs[0]);
    call.weight = weight_;
    call.weight_layout = contiguous_layout(g.in_channels, g.kernel);
    call.bias = bias_;
    call.output_layout = conv_layout(site.outputs[0]);
    call.activation = activation_;
    return call;
  }

  const T* weight_;
  bool is_packed_;
  const T* bias_;
  Ints weight_sizes_, geometry_;
  ConvEnds ends_;
  Activation activation_;
};

inline LayerEntry conv_entry() {
  return layer_entry<ConvLayer>("conv", {"input", "weight", "bias?", "addend?"},
                                with_activation_and_pool({{"stride", "ints", "1"},
                                                          {"padding", "ints", "0"},
                                                          {"padding_end", "ints", ""},
                                                          {"crop", "ints", ""},
                                                          {"dilation", "ints", "1"},
                                                          {"groups", "int", "1"}}));
}

}  // namespace fastnn
