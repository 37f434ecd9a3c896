// Layers that only move elements, in training. Outputs are views where torch's are.
#pragma once

#include "../layers/gather.h"
#include "layer.h"

namespace fastnn {

// A layer whose output's sizes are computed by its counterpart of inference, from the sizes of inputs of which it reads
// some for their sizes alone.
template <class T, template <class> class Kind>
class SizedTraining : public TrainingLayer<T> {
 public:
  explicit SizedTraining(const ProgramLine& line) : layer_(line, Weights<T>()) { this->inputs = layer_.inputs; }
  size_t inputs_for_sizes() const override { return layer_.sizes_only; }

 protected:
  // The layer of inference for the inputs of this step.
  Site<T> site() const {
    Site<T> site;
    for (const Tensor& tensor : this->given) site.inputs.push_back({sizes_of(tensor)});
    site.outputs.resize(1);
    layer_.set_sizes(site);
    return site;
  }
  Ints output_sizes() const { return site().outputs[0].sizes; }

  Kind<T> layer_;
};

// reshape, flatten, squeeze, unsqueeze, check_sizes: the same elements, mostly with other sizes.
template <class T, template <class> class Kind>
class ViewTraining : public SizedTraining<T, Kind> {
 public:
  using SizedTraining<T, Kind>::SizedTraining;
  void forward(Tensor* outputs) override { outputs[0] = under(this->given[0], this->output_sizes()); }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    if (!wanted[0]) return;
    kept_ = gradients[0];
    results[0].tensor = under(kept_, sizes_of(this->given[0]));
  }
  void forget() override { kept_ = Tensor(); }

 private:
  static Tensor under(const Tensor& tensor, const Ints& sizes) {
    // (Faster than torch's own where the elements lie in their order.)
    return tensor.is_contiguous() ? as_sizes(data<T>(tensor), sizes) : reshaped(tensor, sizes);
  }
  Tensor kept_;
};
template <class T>
using ReshapeTraining = ViewTraining<T, ReshapeLayer>;
template <class T>
using FlattenTraining = ViewTraining<T, FlattenLayer>;
template <class T>
using UnflattenTraining = ViewTraining<T, UnflattenLayer>;
template <class T>
using SqueezeTraining = ViewTraining<T, SqueezeLayer>;
template <class T>
using UnsqueezeTraining = ViewTraining<T, UnsqueezeLayer>;
template <class T>
using CheckSizesTraining = ViewTraining<T, CheckSizesLayer>;

template <class T>
class ExpandTraining : public SizedTraining<T, ExpandLayer> {
 public:
  using SizedTraining<T, ExpandLayer>::SizedTraining;
  void forward(Tensor* outputs) override {
    outputs[0] = stock("aten::expand", "", this->given[0], this->output_sizes(), false);
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    if (wanted[0]) results[0].tensor = reduced(gradients[0], sizes_of(this->given[0]));
  }
};

template <class T>
class RepeatTraining : public SizedTraining<T, RepeatLayer> {
 public:
  using SizedTraining<T, RepeatLayer>::SizedTraining;
  void forward(Tensor* outputs) override {
    outputs[0] = stock("aten::repeat", "", this->given[0], this->layer_.times_and_sizes(this->site())[0]);
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    if (!wanted[0]) return;
    const auto [times, sizes] = this->layer_.times_and_sizes(this->site());
    Ints both, dims;  // two for each dimension: how often it is repeated, and its elements
    for (size_t d = 0; d < sizes.size(); ++d) {
      dims.push_back(static_cast<int64_t>(both.size()));
      both.insert(both.end(), {times[d], sizes[d]});
    }
    results[0].tensor = reshaped(sum_over(reshaped(gradients[0], both), dims), sizes_of(this->given[0]));
  }
};

template <class T>
class FullTraining : public SizedTraining<T, FullLayer> {
 public:
  using SizedTraining<T, FullLayer>::SizedTraining;
  void forward(Tensor* outputs) override {
    outputs[0] = this->layer_.is_like_another_value() ? new_like<T>(this->given[0])
                                                      : new_tensor(this->output_sizes(), kDtypeOf<T>);
    std::fill_n(mutable_data<T>(outputs[0]), outputs[0].numel(), this->layer_.value());
  }
  // The output depends on sizes alone.
  void backward(const Tensor*, const bool*, Gradient<T>*) override {}
};

template <class T>
class SizeTraining : public SizedTraining<T, SizeLayer> {
 public:
  using SizedTraining<T, SizeLayer>::SizedTraining;
  void forward(Tensor* outputs) override {
    outputs[0] = new_tensor(this->output_sizes(), kDtypeOf<T>);
    mutable_data<T>(outputs[0])[0] = this->layer_.value(this->site());
  }
  // The output depends on sizes alone.
  void backward(const Tensor*, const bool*, Gradient<T>*) override {}
};

template <class T>
class PermuteTraining : public UnaryTraining<T> {
 public:
  explicit PermuteTraining(const ProgramLine& line) : UnaryTraining<T>(line), dims_(line.integers("dims", -16, 15)) {
    back_.resize(dims_.size());
    for (size_t i = 0; i < dims_.size(); ++i) {
      back_[dimension_of(line, dims_[i], dims_.size())] = static_cast<int64_t>(i);
    }
  }
  void forward(Tensor* outputs) override { outputs[0] = stock("aten::permute", "", this->input(), dims_); }
  Tensor gradient_of(const Tensor& gradient) override { return stock("aten::permute", "", gradient, back_); }

 private:
  Ints dims_, back_;
};

template <class T>
class TransposeTraining : public UnaryTraining<T> {
 public:
  explicit TransposeTraining(const ProgramLine& line)
      : UnaryTraining<T>(line), first_(line.integer("first", -16, 15)), second_(line.integer("second", -16, 15)) {}
  void forward(Tensor* outputs) override { outputs[0] = turned(this->input()); }
  Tensor gradient_of(const Tensor& gradient) override { return turned(gradient); }

 private:
  Tensor turned(const Tensor& tensor) const { return stock("aten::transpose", "int", tensor, first_, second_); }
  int64_t first_, second_;
};

template <class T>
class ContiguousTraining : public UnaryTraining<T> {
 public:
  using UnaryTraining<T>::UnaryTraining;
  void forward(Tensor* outputs) override { outputs[0] = dense(this->input()); }
  Tensor gradient_of(const Tensor& gradient) override { return gradient; }
};

template <class T>
class DetachTraining : public TrainingLayer<T> {
 public:
  explicit DetachTraining(const ProgramLine& line) { this->inputs = {line.input("input")}; }
  void forward(Tensor* outputs) override { outputs[0] = this->given[0].borrow(); }
  void backward(const Tensor*, const bool*, Gradient<T>*) override {}
};

template <class T>
class SelectTraining : public UnaryTraining<T> {
 public:
  explicit SelectTraining(const ProgramLine& line)
      : UnaryTraining<T>(line), dim_(line.integer("dim", -16, 15)), index_(line.integer("index", -kFar, kFar)) {}
  void forward(Tensor* outputs) override { outputs[0] = stock("aten::select", "int", this->input(), dim_, index_); }
  Tensor gradient_of(const Tensor& gradient) override {
    return stock("aten::select_backward", "", gradient, sizes_of(this->input()), dim_, index_);
  }

 private:
  int64_t dim_, index_;
};

template <class T>
class SliceTraining : public SizedTraining<T, SliceLayer> {
 public:
  using SizedTraining<T, SliceLayer>::SizedTraining;
  void forward(Tensor* outputs) override {
    const SliceLayer<T>& layer = this->layer_;
    stop_ = layer.stop(this->site());
    outputs[0] = stock("aten::slice", "Tensor", this->given[0], layer.dim(), std::optional<int64_t>(layer.start()),
                       std::optional<int64_t>(stop_), layer.step());
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    const SliceLayer<T>& layer = this->layer_;
    if (!wanted[0]) return;
    results[0].tensor = stock("aten::slice_backward", "", gradients[0], sizes_of(this->given[0]), layer.dim(),
                              layer.start(), stop_, layer.step());
  }

 private:
  int64_t stop_ = 0;
};

template <class T>
class SplitTraining : public TrainingLayer<T> {
 public:
  explicit SplitTraining(const ProgramLine& line) : layer_(line, Weights<T>()) {
    this->inputs = layer_.inputs;
    count_ = line.outputs.size();
  }

  void forward(Tensor* outputs) override {
    const Tensor& input = this->given[0];
    place_ = static_cast<int64_t>(layer_.dimension(static_cast<size_t>(input.dim())));
    parts_ = layer_.parts(input.size(place_));
    int64_t first = 0;
    for (size_t i = 0; i < count_; ++i) {
      outputs[i] = layer_.unbinds() ? stock("aten::select", "int", input, place_, first)
                                    : stock("aten::narrow", "", input, place_, first, parts_[i]);
      first += parts_[i];
    }
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    if (!wanted[0]) return;
    TensorList parts;
    Ints sizes = sizes_of(this->given[0]);
    for (size_t i = 0; i < count_; ++i) {
      sizes[static_cast<size_t>(place_)] = parts_[i];
      if (gradients[i].defined()) {
        parts.push_back(layer_.unbinds() ? stock("aten::unsqueeze", "", gradients[i], place_) : Tensor(gradients[i]));
      } else {
        parts.push_back(new_tensor(sizes, kDtypeOf<T>));
        std::fill_n(mutable_data<T>(parts.back()), parts.back().numel(), T(0));
      }
    }
    results[0].tensor = stock("aten::cat", "", std::move(parts), place_);
  }

 private:
  SplitLayer<T> layer_;
  size_t count_;
  int64_t place_ = 0;  // the dimension, counted from the first
  Ints parts_;
};

template <class T>
class CatTraining : public TrainingLayer<T> {
 public:
  explicit CatTraining(const ProgramLine& line) : dim_(line.integer("dim", -16, 15)) {
    const auto found = line.inputs.find("inputs");
    if (found == line.inputs.end() || found->second.empty()) line.refuse("expected inputs=...");
    this->inputs = found->second;
  }
  void forward(Tensor* outputs) override {
    TensorList all;
    for (const Tensor& tensor : this->given) {
      FASTNN_CHECK(tensor.dim() == this->given[0].dim(), kTrainingStep,
                   ": tensors must have the same number of dimensions: got ", this->given[0].dim(), " and ",
                   tensor.dim());
      all.emplace_back(tensor);
    }
    outputs[0] = stock("aten::cat", "", std::move(all), dim_);
  }
  void backward(const Tensor* gradients, const bool* wanted, Gradient<T>* results) override {
    int64_t first = 0;
    const int64_t dim = wrap_dim(dim_, static_cast<size_t>(gradients[0].dim()));
    for (size_t i = 0; i < this->given.size(); ++i) {
      const int64_t size = this->given[i].size(dim);
      if (wanted[i]) results[i].tensor = stock("aten::narrow", "", gradients[0], dim, first, size);
      first += size;
    }
  }

 private:
  int64_t dim_;
};

// Runs a layer of inference, which has one input and no weight, on tensors.
template <class T>
void run_layer(const Layer<T>& layer, const Site<T>& site, const Tensor& from, const Tensor& to) {
  PackedReader nothing(nullptr, 0, active_isa(), sizeof(T));
  const void* const read[] = {data<T>(from)};
  void* const written[] = {mutable_data<T>(to)};
  layer.run({site, read, written, nothing});
}

// Puts a number around the elements: see PadLayer, which fills and copies.
template <class T>
class PadTraining : public UnaryTraining<T> {
 public:
  explicit PadTraining(const ProgramLine& line)
      : UnaryTraining<T>(line), layer_(line, Weights<T>()), padding_(line.integers("padding", 0, kMostSize)) {}
  void forward(Tensor* outputs) override {
    const Tensor from = dense(this->input());
    Site<T> site;
    site.inputs.push_back({sizes_of(from)});
    site.outputs.resize(1);
    layer_.set_sizes(site);
    outputs[0] = new_tensor(site.outputs[0].sizes, kDtypeOf<T>);
    run_layer(layer_, site, from, outputs[0]);
  }
  Tensor gradient_of(const Tensor& gradient) override {
    Tensor result = gradient;
    for (size_t i = 0; i < padding_.size(); i += 2) {
      const int64_t dim = result.dim() - 1 - static_cast<int64_t>(i / 2);
      result = stock("aten::narrow", "", result, dim, padding_[i], this->input().size(dim));
    }
    return result;
  }

 private:
  PadLayer<T> layer_;
  Ints padding_;
};

// index_select, flip, roll, channel_shuffle and border: the layers of inference gather, and the gradient goes back
// along their ways. keeps_format: whether a result of images lies with channels last where the input does, as torch's
// does.
template <class T, template <class> class Kind, bool keeps_format>
class GatherTraining : public UnaryTraining<T> {
 public:
  explicit GatherTraining(const ProgramLine& line) : UnaryTraining<T>(line), layer_(line, Weights<T>()) {}
  void forward(Tensor* outputs) override {
    const bool last = keeps_format && is_dense_channels_last(this->input());
    const Tensor from = last ? this->input().borrow() : dense(this->input());
    site_ = Site<T>();
    site_.inputs.push_back({sizes_of(from), last ? Format::channels_last : Format::contiguous});
    site_.outputs.resize(1);
    layer_.set_sizes(site_);
    site_.outputs[0].format = site_.inputs[0].format;
    outputs[0] = new_formatted(site_.outputs[0].sizes, kDtypeOf<T>, last);
    if (site_.is_empty()) return;
    run_layer(layer_, site_, from, outputs[0]);
  }
  Tensor gradient_of(const Tensor& gradient) override {
    const ValueType& input = site_.inputs[0];
    ValueType output = site_.outputs[0];
    const bool last = keeps_format && is_dense_channels_last(gradient);
    output.format = last ? Format::channels_last : Format::contiguous;
    const Tensor from = last ? gradient.borrow() : dense(gradient);
    Tensor result = new_formatted(input.sizes, kDtypeOf<T>, input.channels_last());
    T* const to = mutable_data<T>(result);
    std::fill_n(to, result.numel(), T(0));
    if (!site_.is_empty()) layer_.add_gradient(input, output, data<T>(from), to);
    return result;
  }

 private:
  Kind<T> layer_;
  Site<T> site_;
};
template <class T>
using IndexSelectTraining = GatherTraining<T, IndexSelectLayer, false>;
// The result lies in memory as the input does, as torch's.
template <class T>
class FlipTraining : public GatherTraining<T, FlipLayer, true> {
 public:
  using GatherTraining<T, FlipLayer, true>::GatherTraining;
  void forward(Tensor* outputs) override {
    GatherTraining<T, FlipLayer, true>::forward(outputs);
    Tensor alike = new_like<T>(this->input());
    if (same_strides(alike, outputs[0])) return;
    stock("aten::copy_", "", alike, outputs[0], false);
    outputs[0] = std::move(alike);
  }
};
template <class T>
using RollTraining = GatherTraining<T, RollLayer, false>;
template <class T>
using ChannelShuffleTraining = GatherTraining<T, ChannelShuffleLayer, false>;
template <class T>
using BorderTraining = GatherTraining<T, BorderLayer, true>;
template <class T>
using WindowsTraining = GatherTraining<T, WindowsLayer, false>;

}  // namespace fastnn
