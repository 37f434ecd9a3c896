// upsample: images enlarged by whole factors, by the nearest pixel or linearly between pixels.
#pragma once

#include <cmath>

#include "../array.h"

namespace fastnn {

template <class T>
class UpsampleLayer : public Layer<T> {
 public:
  UpsampleLayer(const ProgramLine& line, const Weights<T>&) {
    this->inputs = {line.input("input")};
    factors_ = line.integers("factors", 1, 1 << 16);  // one may stand for both dimensions
    if (factors_.empty() || factors_.size() > 2) line.refuse("expected one or two factors");
    linear_ = line.flag("linear");
    aligns_ = line.flag("align_corners");
  }
  FormatRule formats() const override { return FormatRule::alike; }

  void set_sizes(Site<T>& site) const override {
    Ints sizes = site.sizes(0);
    FASTNN_CHECK(sizes.size() == factors_.size() + 2 || (sizes.size() == 4 && factors_.size() == 1 && !linear_),
                 "expected ", factors_.size() + 2, "D images, got size ", to_string(sizes));
    for (size_t d = 0; d + 2 < sizes.size(); ++d) {
      FASTNN_CHECK(sizes[2 + d] > 0, "expected images of at least one pixel, got size ", to_string(sizes));
      sizes[2 + d] = checked_product(sizes[2 + d], factors_[std::min(d, factors_.size() - 1)]);
    }
    site.outputs[0].sizes = sizes;
  }

  void run(const LayerCall<T>& call) const override {
    const ValueType& input = call.site.inputs[0];
    const size_t dims = input.sizes.size() - 2;
    const int64_t rows = dims > 1 ? input.sizes[2] : 1, columns = input.sizes[1 + dims];
    const int64_t factor_y = dims > 1 ? factors_[0] : 1, factor_x = factors_.back();
    // An image of one pixel is the same in both formats, so the output's format counts.
    const bool channels_last = call.site.outputs[0].channels_last();
    const int64_t inner = channels_last ? input.sizes[1] : 1;  // elements of a pixel that lie together
    const int64_t planes = input.sizes[0] * (channels_last ? 1 : input.sizes[1]);
    const int64_t row = columns * inner, out_row = row * factor_x;
    std::vector<Place> places;
    for (int64_t x = 0; x < columns * factor_x; ++x) places.push_back(place(x, columns, factor_x));
    const auto& kernels = elementwise_kernels().get<T>();
    parallel_range(planes * rows * factor_y, kCopyWork * static_cast<double>(out_row),
                   [&](int64_t first, int64_t last) {
                     const Scratch<T> between(linear_ && dims > 1 ? row : 0);
                     for (int64_t i = first; i < last; ++i) {
                       const int64_t y = i % (rows * factor_y);
                       const T* const image = call.input(0) + i / (rows * factor_y) * rows * row;
                       T* const to = call.output(0) + i * out_row;
                       const Place at = place(y, rows, factor_y);
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
  Place place(int64_t at, int64_t size, int64_t factor) const {
    if (!linear_ || factor == 1) return {at / factor, at / factor, 0};
    const double many = static_cast<double>(size * factor);
    const double from = aligns_ ? (many > 1 ? static_cast<double>(at) * static_cast<double>(size - 1) / (many - 1) : 0)
                                : std::max(0.0, (static_cast<double>(at) + 0.5) / static_cast<double>(factor) - 0.5);
    const int64_t first = std::min(size - 1, static_cast<int64_t>(from));
    return {first, std::min(size - 1, first + 1), from - static_cast<double>(first)};
  }

  Ints factors_;
  bool linear_, aligns_;
};

inline LayerEntry upsample_entry() {
  return layer_entry<UpsampleLayer>(
      "upsample", {"input"}, {{"factors", "ints", nullptr}, {"linear", "bool", "0"}, {"align_corners", "bool", "0"}});
}

}  // namespace fastnn
