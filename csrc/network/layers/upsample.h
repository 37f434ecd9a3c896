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
    const ValueType &input = call.site.inputs[0], &output = call.site.outputs[0];
    // An image of one pixel is the same in both formats, so the format of the other counts.
    const bool channels_last = is_same_order(output.sizes) ? input.channels_last() : output.channels_last();
    enlarge(call.input(0), input.sizes, output.sizes, channels_last, call.output(0));
  }

  // Enlarges images (sizes) to others (out_sizes). Both lie in this format, without gaps.
  void enlarge(const T* input, const Ints& sizes, const Ints& out_sizes, bool channels_last, T* output) const {
    const Geometry g(*this, sizes, out_sizes, channels_last);
    const auto& kernels = elementwise_kernels().get<T>();
    parallel_range(g.planes * g.out_rows, kCopyWork * static_cast<double>(g.out_row), [&](int64_t first, int64_t last) {
      const Scratch<T> between(linear_ && g.dims > 1 ? g.row : 0);
      for (int64_t i = first; i < last; ++i) {
        const T* const image = input + i / g.out_rows * g.rows * g.row;
        T* const to = output + i * g.out_row;
        const Place at = place(i % g.out_rows, g.rows, g.out_rows, 0);
        const T* from = image + at.first * g.row;
        if (linear_ && g.dims > 1) {  // by a part of 0, too, which makes NaN of an infinity, as in torch
          kernels.blend(from, image + at.second * g.row, static_cast<T>(at.part), g.row, between.get());
          from = between.get();
        }
        if (linear_ && g.inner == 1) {
          for (size_t x = 0; x < g.parts.size(); ++x) {
            to[x] = from[g.firsts[x]] * (1 - g.parts[x]) + from[g.seconds[x]] * g.parts[x];
          }
          continue;
        }
        for (size_t x = 0; x < g.parts.size(); ++x) {
          const T *const left = from + g.firsts[x] * g.inner, *const right = from + g.seconds[x] * g.inner;
          T* const pixel = to + static_cast<int64_t>(x) * g.inner;
          linear_ ? kernels.blend(left, right, g.parts[x], g.inner, pixel)
                  : static_cast<void>(std::copy_n(left, g.inner, pixel));
        }
      }
    });
  }

  // The gradient of images (sizes) from that of the enlarged ones (out_sizes), each in this format, without gaps. Each
  // plane is summed by one thread. Only of linear interpolation.
  void add_back(const T* gradient, const Ints& sizes, const Ints& out_sizes, bool channels_last, T* to) const {
    const Geometry g(*this, sizes, out_sizes, channels_last);
    const double work = 2 * kCopyWork * static_cast<double>(g.out_rows * g.out_row);
    parallel_range(g.planes, work, [&](int64_t first, int64_t last) {
      const Scratch<T> between(g.row);
      T* const sums = between.get();
      for (int64_t plane = first; plane < last; ++plane) {
        T* const image = to + plane * g.rows * g.row;
        std::fill_n(image, g.rows * g.row, T(0));
        for (int64_t y = 0; y < g.out_rows; ++y) {
          const T* const from = gradient + (plane * g.out_rows + y) * g.out_row;
          std::fill_n(sums, g.row, T(0));
          for (size_t x = 0; x < g.parts.size(); ++x) {
            const T part = g.parts[x], rest = 1 - part;
            const T* const pixel = from + static_cast<int64_t>(x) * g.inner;
            T *const left = sums + g.firsts[x] * g.inner, *const right = sums + g.seconds[x] * g.inner;
            for (int64_t c = 0; c < g.inner; ++c) left[c] += pixel[c] * rest;
            for (int64_t c = 0; c < g.inner; ++c) right[c] += pixel[c] * part;
          }
          const Place at = g.dims > 1 ? place(y, g.rows, g.out_rows, 0) : Place{0, 0, 0};
          const T part = static_cast<T>(at.part), rest = 1 - part;
          T *const upper = image + at.first * g.row, *const lower = image + at.second * g.row;
          for (int64_t i = 0; i < g.row; ++i) upper[i] += sums[i] * rest;
          for (int64_t i = 0; i < g.row; ++i) lower[i] += sums[i] * part;
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
  // Rows of both images, and for each column of the larger one its place.
  struct Geometry {
    size_t dims;
    int64_t rows, out_rows, inner, planes;  // inner: elements of a pixel that lie together
    int64_t row, out_row;                   // elements of a row
    std::vector<int64_t> firsts, seconds;
    std::vector<T> parts;

    Geometry(const UpsampleLayer& layer, const Ints& sizes, const Ints& out_sizes, bool channels_last)
        : dims(sizes.size() - 2),
          rows(dims > 1 ? sizes[2] : 1),
          out_rows(dims > 1 ? out_sizes[2] : 1),
          inner(channels_last ? sizes[1] : 1),
          planes(sizes[0] * (channels_last ? 1 : sizes[1])),
          row(sizes[1 + dims] * inner),
          out_row(out_sizes[1 + dims] * inner) {
      for (int64_t x = 0; x < out_sizes[1 + dims]; ++x) {
        const Place at = layer.place(x, sizes[1 + dims], out_sizes[1 + dims], dims - 1);
        firsts.push_back(at.first);
        seconds.push_back(at.second);
        parts.push_back(static_cast<T>(at.part));
      }
    }
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
