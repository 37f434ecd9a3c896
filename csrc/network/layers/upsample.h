// upsample: images enlarged by whole factors, or of other sizes, by the nearest pixel or linearly between pixels.
#pragma once

#include <cmath>

#include "shape.h"

namespace fastnn {

template <class T>
class UpsampleLayer : public Layer<T> {
 public:
  UpsampleLayer(const ProgramLine& line, const Weights<T>&)
      : factors_(line.integers("factors", 1, 1 << 16)), asked_(line, {"input"}, this->inputs) {
    this->sizes_only = asked_.like();
    // One factor may stand for both dimensions.
    const size_t dims = asked_.count() ? asked_.count() : factors_.size();
    if (dims == 0 || dims > 2) line.refuse("expected one or two factors, or sizes");
    if (asked_.count() && !factors_.empty()) line.refuse("expected either factors or sizes");
    linear_ = line.flag("linear");
    aligns_ = line.flag("align_corners");
  }
  FormatRule formats() const override { return FormatRule::alike; }

  void set_sizes(Site<T>& site) const override {
    Ints sizes = site.sizes(0);
    const Ints asked = factors_.empty() ? asked_.of(site) : Ints();
    const size_t dims = asked.empty() ? factors_.size() : asked.size();
    FASTNN_CHECK(sizes.size() == dims + 2 || (sizes.size() == 4 && factors_.size() == 1 && !linear_), "expected ",
                 dims + 2, "D images, got size ", to_string(sizes));
    for (size_t d = 0; d + 2 < sizes.size(); ++d) {
      FASTNN_CHECK(sizes[2 + d] > 0, "expected images of at least one pixel, got size ", to_string(sizes));
      FASTNN_CHECK(asked.empty() || asked[d] > 0, "Input and output sizes should be greater than 0");
      sizes[2 + d] = asked.empty() ? checked_product(sizes[2 + d], factor(d)) : asked[d];
    }
    site.outputs[0].sizes = sizes;
  }
  // What torch calls the scale of a dimension: nothing, where sizes are given.
  std::optional<double> scale(size_t d) const {
    return factors_.empty() ? std::nullopt : std::optional<double>(static_cast<double>(factor(d)));
  }
  bool is_linear() const { return linear_; }
  bool aligns_corners() const { return aligns_; }

  void run(const LayerCall<T>& call) const override {
    const ValueType& input = call.site.inputs[0];
    const size_t dims = input.sizes.size() - 2;
    const int64_t rows = dims > 1 ? input.sizes[2] : 1, columns = input.sizes[1 + dims];
    const Ints& sizes = call.site.outputs[0].sizes;
    const int64_t out_rows = dims > 1 ? sizes[2] : 1, out_columns = sizes[1 + dims];
    // An image of one pixel is the same in both formats, so the format of the other counts.
    const bool channels_last = is_same_order(sizes) ? input.channels_last() : call.site.outputs[0].channels_last();
    const int64_t inner = channels_last ? input.sizes[1] : 1;  // elements of a pixel that lie together
    const int64_t planes = input.sizes[0] * (channels_last ? 1 : input.sizes[1]);
    const int64_t row = columns * inner, out_row = out_columns * inner;
    std::vector<Place> places;
    for (int64_t x = 0; x < out_columns; ++x) places.push_back(place(x, columns, out_columns, dims - 1));
    const auto& kernels = elementwise_kernels().get<T>();
    parallel_range(planes * out_rows, kCopyWork * static_cast<double>(out_row), [&](int64_t first, int64_t last) {
      const Scratch<T> between(linear_ && dims > 1 ? row : 0);
      for (int64_t i = first; i < last; ++i) {
        const int64_t y = i % out_rows;
        const T* const image = call.input(0) + i / out_rows * rows * row;
        T* const to = call.output(0) + i * out_row;
        const Place at = place(y, rows, out_rows, 0);
        const T* from = image + at.first * row;
        if (linear_ && dims > 1) {  // by a part of 0, too, which makes NaN of an infinity, as in torch
          kernels.blend(from, image + at.second * row, static_cast<T>(at.part), row, between.get());
          from = between.get();
        }
        for (size_t x = 0; x < places.size(); ++x) {
          const Place& column = places[x];
          const T *const left = from + column.first * inner, *const right = from + column.second * inner;
          T* const pixel = to + static_cast<int64_t>(x) * inner;
          if (!linear_) {
            std::copy_n(left, inner, pixel);
          } else if (inner == 1) {
            const T part = static_cast<T>(column.part);
            *pixel = *left * (1 - part) + *right * part;
          } else {
            kernels.blend(left, right, static_cast<T>(column.part), inner, pixel);
          }
        }
      }
    });
  }

 private:
  // The two pixels between which an output pixel lies, and how far it is from the first.
  struct Place {
    int64_t first, second;
    double part;
  };
  // Of `size` pixels along dimension d of images, which become `many`.
  Place place(int64_t at, int64_t size, int64_t many, size_t d) const {
    if (size == many) return {at, at, 0};
    if (!linear_) {  // torch multiplies in single precision, which counts where the product is nearly a whole number
      const float step = factors_.empty() ? static_cast<float>(size) / static_cast<float>(many)
                                          : static_cast<float>(1.0 / static_cast<double>(factor(d)));
      const int64_t nearest = std::min(size - 1, static_cast<int64_t>(static_cast<float>(at) * step));
      return {nearest, nearest, 0};
    }
    const double all = static_cast<double>(many);
    const double from = aligns_
                            ? (many > 1 ? static_cast<double>(at) * static_cast<double>(size - 1) / (all - 1) : 0)
                            : std::max(0.0, (static_cast<double>(at) + 0.5) * static_cast<double>(size) / all - 0.5);
    const int64_t first = std::min(size - 1, static_cast<int64_t>(from));
    return {first, std::min(size - 1, first + 1), from - static_cast<double>(first)};
  }
  int64_t factor(size_t d) const { return factors_[std::min(d, factors_.size() - 1)]; }

  Ints factors_;  // or sizes:
  AskedSizes asked_;
  bool linear_, aligns_;
};

inline LayerEntry upsample_entry() {
  return layer_entry<UpsampleLayer>(
      "upsample", {"input", "like*"},
      {{"factors", "ints", ""}, {"sizes", "ints", ""}, {"linear", "bool", "0"}, {"align_corners", "bool", "0"}});
}

}  // namespace fastnn
