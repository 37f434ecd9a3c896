// A transposed convolution as a product: each input pixel, a row of channels, times the whole kernel gives what the
// pixel adds to each output pixel under the kernel (GEMM and col2im). A row of input pixels is multiplied at a time, so
// that its products are added to the output while they are in cache.
//
// It takes as few multiplications as the phases of conv_transpose.h, in one product in place of one for each phase.
#pragma once

#include "conv.h"

namespace fastnn {

// The sizes, always of three dimensions. Positions count from the front.
struct TransposedSizes {
  int64_t batch, in_channels, out_channels;
  int64_t input[3] = {1, 1, 1}, output[3] = {1, 1, 1}, kernel[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, padding[3] = {};

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t columns() const { return taps() * out_channels; }  // of the product
};

// How many pixels come out of `input` pixels, in one dimension; below 1 where the output would be too small.
inline int64_t transposed_size(int64_t input, int64_t kernel, int64_t stride, int64_t padding, int64_t output_padding) {
  return checked_sum(checked_product(input - 1, stride), kernel + output_padding - 2 * padding);
}

// The sizes of images (batch, channels, ...) and of a weight (in_channels, out_channels, ...) in 1 to 3 dimensions.
inline TransposedSizes transposed_sizes(const Ints& input, const Ints& weight, const Ints& output, const Ints& stride,
                                        const Ints& padding) {
  TransposedSizes sizes;
  sizes.batch = input[0];
  sizes.in_channels = weight[0];
  sizes.out_channels = weight[1];
  for (size_t i = 0; i < stride.size(); ++i) {
    const size_t d = 3 - stride.size() + i;
    sizes.input[d] = input[2 + i];
    sizes.output[d] = output[2 + i];
    sizes.kernel[d] = weight[2 + i];
    sizes.stride[d] = stride[i];
    sizes.padding[d] = padding[i];
  }
  return sizes;
}

template <class T>
class TransposedProduct {
 public:
  // bias: null for none.
  TransposedProduct(const TransposedSizes& sizes, const Kernels<T>& kernels, const T* bias,
                    const Activation& activation)
      : s_(sizes), kernels_(kernels), bias_(bias), activation_(activation) {}

  int64_t weight_size() const { return s_.columns() * s_.in_channels; }
  int64_t packed_size() const { return kernels_.mlp->packed_size(s_.columns(), s_.in_channels); }
  // Writes a weight (in_channels, out_channels, kernel) as that of a linear layer, (kernel, out_channels, in_channels).
  void turn(const T* weight, T* to) const {
    for (int64_t tap = 0; tap < s_.taps(); ++tap) {
      for (int64_t out = 0; out < s_.out_channels; ++out) {
        for (int64_t in = 0; in < s_.in_channels; ++in) *to++ = weight[(in * s_.out_channels + out) * s_.taps() + tap];
      }
    }
  }
  void pack(const T* turned, T* to) const { kernels_.mlp->pack(turned, s_.columns(), s_.in_channels, 0, 1, to); }

  // Writes images with channels last, from images in either format.
  void run(const T* from, const ConvLayout& layout, const T* packed, T* to, const ConvLayout& to_layout) const {
    const MlpLayer<T> layer{nullptr, nullptr, s_.in_channels, s_.columns(), kIdentity, packed, nullptr};
    const double work = 2.0 * static_cast<double>(weight_size()) * static_cast<double>(s_.input[1] * s_.input[2]);
    const int64_t slices = s_.batch * s_.output[0];
    const int64_t threads = useful_threads(work * static_cast<double>(s_.batch * s_.input[0]));
    // Where there are fewer slices than threads, each slice is cut into bands of output rows.
    const int64_t bands = std::min(s_.output[1], slices < threads ? (threads + slices - 1) / slices : 1);
    parallel_chunks(std::min(threads, slices * bands), slices * bands, [&](int64_t, int64_t first, int64_t last) {
      const int64_t pixels = std::max(block(), s_.input[2]);
      const Scratch<T> products(block() * s_.columns()), turned(pixels * s_.in_channels);
      const Scratch<T> scratch(kernels_.mlp->scratch_size(std::max(s_.in_channels, s_.columns())));
      for (int64_t i = first; i < last; ++i) {
        const int64_t slice = i / bands, band = i % bands;
        const int64_t y = s_.output[1] * band / bands, end = s_.output[1] * (band + 1) / bands;
        const int64_t n = slice / s_.output[0], z = slice % s_.output[0];
        T* const image = to + n * to_layout.n + z * to_layout.d[0];
        begin_rows(image, to_layout, y, end);
        for_each_under(0, z, [&](int64_t from_z, int64_t tap_z) {
          add_rows(layer, from + n * layout.n + from_z * layout.d[0], layout, tap_z, image, to_layout, y, end,
                   products.get(), turned.get(), scratch.get());
        });
        finish_rows(image, to_layout, y, end);
      }
    });
  }

 private:
  // Input pixels whose products fit in L1. They are some whole rows, or a part of one.
  int64_t block() const {
    constexpr int64_t kElements = 6144;
    const int64_t pixels = std::max<int64_t>(1, kElements / s_.columns()), columns = s_.input[2];
    return pixels < columns ? pixels : std::min(s_.input[1], pixels / columns) * columns;
  }
  // Calls body(input position, position of the kernel) for each that reaches an output position, in one dimension.
  template <class Body>
  void for_each_under(int d, int64_t at, const Body& body) const {
    for (int64_t tap = 0; tap < s_.kernel[d]; ++tap) {
      const int64_t from = at + s_.padding[d] - tap;
      if (from >= 0 && from % s_.stride[d] == 0 && from / s_.stride[d] < s_.input[d]) body(from / s_.stride[d], tap);
    }
  }
  void begin_rows(T* image, const ConvLayout& layout, int64_t y, int64_t end) const {
    for (; y < end; ++y) {
      T* const row = image + y * layout.d[1];
      if (layout.d[2] == s_.out_channels && (!bias_ || s_.out_channels == 1)) {
        std::fill_n(row, s_.output[2] * s_.out_channels, bias_ ? *bias_ : T(0));
        continue;
      }
      for (int64_t x = 0; x < s_.output[2]; ++x) {
        T* const pixel = row + x * layout.d[2];
        bias_ ? static_cast<void>(std::copy_n(bias_, s_.out_channels, pixel))
              : static_cast<void>(std::fill_n(pixel, s_.out_channels, T(0)));
      }
    }
  }
  void finish_rows(T* image, const ConvLayout& layout, int64_t y, int64_t end) const {
    if (activation_.kind == ActivationKind::identity) return;
    const bool together = layout.d[2] == s_.out_channels;
    const int64_t pixels = together ? 1 : s_.output[2],
                  count = together ? s_.output[2] * s_.out_channels : s_.out_channels;
    for (; y < end; ++y) {
      for (int64_t x = 0; x < pixels; ++x) {
        T* const some = image + y * layout.d[1] + x * layout.d[2];
        kernels_.conv->finish(activation_, some, nullptr, count, some);
      }
    }
  }
  // Adds a slice of the input to the rows [y, end) of a slice of the output.
  void add_rows(const MlpLayer<T>& layer, const T* slice, const ConvLayout& layout, int64_t tap_z, T* image,
                const ConvLayout& to_layout, int64_t y, int64_t end, T* products, T* pixels, T* scratch) const {
    const int64_t columns = s_.input[2], rows = std::max<int64_t>(1, block() / columns);
    // The rows of the input that reach them.
    const int64_t reach = y + s_.padding[1] - s_.kernel[1] + 1;
    const int64_t first = reach > 0 ? (reach + s_.stride[1] - 1) / s_.stride[1] : 0;
    const int64_t last = std::min(s_.input[1], (end - 1 + s_.padding[1]) / s_.stride[1] + 1);
    for (int64_t row = first; row < last; row += rows) {
      const int64_t some = std::min(rows, last - row);
      const T* from = slice + row * layout.d[1];
      if (layout.c != 1 || layout.d[2] != s_.in_channels) {
        for (int64_t r = 0; r < some; ++r) {
          elementwise_kernels().get<T>().transpose(from + r * layout.d[1], layout.c, s_.in_channels, columns,
                                                   pixels + r * columns * s_.in_channels, s_.in_channels);
        }
        from = pixels;
      }
      const int64_t all = some * columns;
      for (int64_t at = 0; at < all; at += block()) {
        const int64_t count = std::min(block(), all - at);
        kernels_.mlp->forward(&layer, 1, false, from + at * s_.in_channels, products, 0, count, scratch);
        for (int64_t done = 0; done < count;) {
          const int64_t x = (at + done) % columns, run = std::min(columns - x, count - done);
          const int64_t start = (row + (at + done) / columns) * s_.stride[1] - s_.padding[1];
          for (int64_t tap = std::max<int64_t>(0, y - start); tap < std::min(s_.kernel[1], end - start); ++tap) {
            const int64_t place = (tap_z * s_.kernel[1] + tap) * s_.kernel[2] * s_.out_channels;
            add_products(products + done * s_.columns() + place, x, run, image + (start + tap) * to_layout.d[1],
                         to_layout.d[2]);
          }
          done += run;
        }
      }
    }
  }
  // Adds the products of the input pixels [x, x + count) with a row of the kernel to a row of the output. Where the
  // output's pixels lie together, so do all positions of the row that an input pixel reaches: they are one run, whose
  // vectors are full even if there are few channels. Pixels whose runs overlap are taken one after another, with all
  // others between them, so that no sum is loaded right after it was stored.
  void add_products(const T* products, int64_t x, int64_t count, T* to, int64_t pixel) const {
    const auto& elementwise = elementwise_kernels().get<T>();
    const int64_t taps = pixel == s_.out_channels ? s_.kernel[2] : 1, step = s_.stride[2];
    const int64_t overlapping = (taps + step - 1) / step;
    for (int64_t tap = 0; tap < s_.kernel[2]; tap += taps, products += taps * s_.out_channels) {
      const int64_t at = tap - s_.padding[2];  // input pixel i is added to the pixels from i * step + at on
      const auto add = [&](int64_t first, int64_t last, int64_t every, int64_t skipped, int64_t taken) {
        const int64_t from = (first - x) * s_.columns() + skipped * s_.out_channels;
        elementwise.add_runs(products + from, every * s_.columns(), (last - first + every - 1) / every,
                             (taken - skipped) * s_.out_channels, to + (first * step + at + skipped) * pixel,
                             every * step * pixel);
      };
      // The input pixels whose whole run lies in the output.
      const int64_t room = s_.output[2] - taps - at, most = room < 0 ? 0 : room / step + 1;
      const int64_t first = std::clamp(at < 0 ? (-at + step - 1) / step : 0, x, x + count);
      const int64_t last = std::clamp(most, first, x + count);
      for (int64_t i = first; i < std::min(first + overlapping, last); ++i) add(i, last, overlapping, 0, taps);
      const auto add_clipped = [&](int64_t i) {
        const int64_t skipped = std::max<int64_t>(0, -(i * step + at));
        const int64_t taken = std::min(taps, s_.output[2] - i * step - at);
        if (skipped < taken) add(i, i + 1, 1, skipped, taken);
      };
      for (int64_t i = x; i < first; ++i) add_clipped(i);
      for (int64_t i = last; i < x + count; ++i) add_clipped(i);
    }
  }

  TransposedSizes s_;
  Kernels<T> kernels_;
  const T* bias_;
  Activation activation_;
};

}  // namespace fastnn
