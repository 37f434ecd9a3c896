// Convolutions whose kernel is one pixel, of contiguous images, forward and backward: products of matrices with each
// image as it lies, (channels, pixels). Only for the weight's gradient is one of the two factors moved.
#pragma once

#include "conv_stock_backward.h"
#include "product.h"

namespace fastnn {

// Whether each conv pixel is a product of the weight with one pixel of the input.
inline bool is_pointwise(const ConvPoolGeometry& g) {
  bool moves = g.groups > 1 || g.taps() > 1;
  for (int d = 0; d < 3; ++d) moves = moves || g.stride[d] > 1 || g.padding[d] > 0 || g.padding_end[d] > 0;
  return !moves;
}

class Pointwise {
 public:
  explicit Pointwise(const ConvPoolGeometry& g)
      : images_(g.batch), pixels_(g.pixels()), inputs_(g.in_channels), outputs_(g.out_channels) {}

  // weight (outputs, inputs); bias (outputs), or null. finish(output, first, count) is called for each run of elements
  // once they are there.
  template <class Finish>
  void forward(const float* input, const float* weight, const float* bias, float* output, const Finish& finish) const {
    multiply_images({weight, outputs_, inputs_}, bias, input, output, finish);
  }
  void input_gradient(const float* gradient, const float* weight, float* grad_input) const {
    multiply_images(Matrix<const float>(weight, outputs_, inputs_).transposed(), nullptr, gradient, grad_input,
                    [](float*, int64_t, int64_t) {});
  }

  // The pixels of all images are cut into slices, and these into parts, each of which has its own sums. Slices and
  // parts do not depend on the number of threads. Where threads are more than parts, they share the rows of a part,
  // too: each element of the sums is made in the same way for any number of them.
  void weight_gradient(const float* gradient, const float* input, float* grad_weight) const {
    constexpr int64_t kSlice = 128, kLeastSlices = 4, kMostParts = 8;
    constexpr int64_t kLeastChannels = 16;  // the lanes of the widest vector
    const int64_t in_image = planner::divide_up(pixels_, kSlice), slices = images_ * in_image;
    const int64_t parts = std::min(kMostParts, std::max<int64_t>(1, slices / kLeastSlices));
    // One factor is turned, so that its channels lie side by side: the one that has fewer channels, unless these are
    // too few to fill a vector.
    const bool inputs_are_fewer = inputs_ <= outputs_, fills = std::min(inputs_, outputs_) >= kLeastChannels;
    const bool turns_input = inputs_are_fewer == fills;
    const int64_t rows = turns_input ? outputs_ : inputs_, columns = turns_input ? inputs_ : outputs_;
    const float *const left = turns_input ? gradient : input, *const right = turns_input ? input : gradient;
    const double work = static_cast<double>(inputs_) * outputs_ * pixels_ * images_;
    const int64_t threads = useful_threads(work), splits = std::min(rows, planner::divide_up(threads, parts));
    const int64_t size = checked_product(inputs_, outputs_);
    const int64_t items = parts * splits, chunks = std::min(threads, items), longest = std::min(kSlice, pixels_);
    const Scratch<float> sums(checked_product(parts, size)), turned(checked_product(chunks * longest, columns));
    const auto& kernels = product_kernels().get<float>();
    const auto& elementwise = elementwise_kernels().get<float>();
    const auto sum_part = [&](int64_t item, float* side_by_side) {
      const int64_t part = item / splits, split = item % splits;
      const int64_t first_row = rows * split / splits, last_row = rows * (split + 1) / splits;
      const int64_t first = slices * part / parts, last = slices * (part + 1) / parts;
      for (int64_t slice = first; slice < last; ++slice) {
        const int64_t image = slice / in_image, place = slice % in_image;
        const int64_t start = pixels_ * place / in_image, count = pixels_ * (place + 1) / in_image - start;
        elementwise.transpose(right + image * columns * pixels_ + start, pixels_, columns, count, side_by_side,
                              columns);
        kernels.multiply({last_row - first_row, columns, count, left + (image * rows + first_row) * pixels_ + start,
                          pixels_, 1, side_by_side, columns, 1, sums.get() + part * size + first_row * columns, columns,
                          slice > first});
      }
    };
    parallel_chunks(chunks, items, [&](int64_t chunk, int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) sum_part(item, turned.get() + chunk * longest * columns);
    });
    sum_parts(sums.get(), parts, size, 1);
    if (turns_input) {
      std::copy_n(sums.get(), size, grad_weight);
    } else {
      elementwise.transpose(sums.get(), outputs_, inputs_, outputs_, grad_weight, inputs_);
    }
  }

 private:
  // output (a.rows, pixels) = a times input (a.columns, pixels), and the bias of each row, for each image. Images are
  // cut into runs of pixels whose input stays in the cache, and where threads are more than runs, into rows, too.
  template <class Finish>
  void multiply_images(const Matrix<const float>& a, const float* bias, const float* input, float* output,
                       const Finish& finish) const {
    constexpr int64_t kElements = 1 << 14, kFewest = 128, kMost = 1024;  // of a run's input; of its pixels
    const int64_t run_pixels = std::min(kMost, std::max(kFewest, kElements / a.columns / kFewest * kFewest));
    const int64_t in_image = planner::divide_up(pixels_, run_pixels), runs = images_ * in_image;
    const double work = static_cast<double>(a.rows) * a.columns * pixels_ * images_;
    const int64_t threads = useful_threads(work), splits = std::min(a.rows, planner::divide_up(threads, runs));
    const auto& kernels = product_kernels().get<float>();
    const auto multiply_run = [&](int64_t item) {
      const int64_t image = item / splits / in_image, start = item / splits % in_image * run_pixels;
      const int64_t count = std::min(run_pixels, pixels_ - start), split = item % splits;
      const int64_t first = a.rows * split / splits, rows = a.rows * (split + 1) / splits - first;
      float* const to = output + (image * a.rows + first) * pixels_ + start;
      for (int64_t r = 0; bias && r < rows; ++r) std::fill_n(to + r * pixels_, count, bias[first + r]);
      kernels.multiply({rows, count, a.columns, a.data + first * a.row, a.row, a.column,
                        input + image * a.columns * pixels_ + start, pixels_, 1, to, pixels_, bias != nullptr, true});
      for (int64_t r = 0; r < rows; ++r) finish(output, to - output + r * pixels_, count);
    };
    const int64_t items = runs * splits;
    parallel_chunks(std::min(threads, items), items, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) multiply_run(item);
    });
  }

  const int64_t images_, pixels_, inputs_, outputs_;
};

// Whether a convolution is computed so. Where the weight is large, the copies that torch makes of what it multiplies
// take little of its time. Few pixels leave a tile's vectors empty, and one channel is left to the algorithms for few.
inline bool is_product_of_images(const ConvPoolProblem& problem, const Tensor& input, const Tensor& weight) {
  constexpr int64_t kLeastPixels = 32;
  const ConvPoolGeometry& g = problem.geometry;
  return problem.kind.dtype == ScalarType::Float && is_pointwise(g) && g.pools_nothing() && g.batch > 0 &&
         g.pixels() >= kLeastPixels && g.in_channels > 1 && g.out_channels > 0 &&
         !is_large_product(g.pixels(), g.in_channels, g.out_channels) && input.is_contiguous() &&
         weight.is_contiguous() && !output_is_channels_last(problem, input, weight);
}

template <class Finish>
Tensor product_of_images(const ConvPoolProblem& problem, const Tensor& input, const Tensor& weight,
                         const OptionalTensor& bias, const Finish& finish) {
  Tensor output = new_tensor(output_sizes(problem), ScalarType::Float);
  const Tensor added = bias ? dense(*bias) : Tensor();
  Pointwise(problem.geometry)
      .forward(data<float>(input), data<float>(weight), bias ? data<float>(added) : nullptr,
               mutable_data<float>(output), finish);
  return output;
}

// The gradients that are wanted, from the gradient of the convolution's output. The weight's is left empty where the
// weight is a single row: torch is faster there.
inline ConvGradients gradients_by_products(const ConvPoolGeometry& g, const Tensor& given_gradient, const Tensor& input,
                                           const Tensor& weight, const Wanted& wanted) {
  const Pointwise pointwise(g);
  const Tensor gradient = in_format(conv_backward_kernels().get<float>(), given_gradient, false);
  ConvGradients made;
  if (wanted.input) {
    made.input = new_tensor(sizes_of(input), ScalarType::Float);
    pointwise.input_gradient(data<float>(gradient), data<float>(weight), mutable_data<float>(made.input));
  }
  if (wanted.weight && g.out_channels > 1) {
    made.weight = new_tensor(sizes_of(weight), ScalarType::Float);
    pointwise.weight_gradient(data<float>(gradient), data<float>(input), mutable_data<float>(made.weight));
  }
  if (wanted.bias) made.bias = bias_gradient(g, PlainImages(gradient).layout, data<float>(gradient));
  return made;
}

}  // namespace fastnn
