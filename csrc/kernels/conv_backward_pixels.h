// Backward of kernels of one element, over images whose pixels lie side by side: with pixels in the lanes nothing is
// transposed, and the products of few output channels are cheaper done for all pixels than listed for those with a
// gradient.
#pragma once

#include "conv_backward_plan.h"
#include "conv_pixel_band.h"

namespace fastnn {
namespace FASTNN_ISA {

// Conv pixels worked on together, a run of them: as many as can be added up in one go.
template <class C>
constexpr int64_t kMostPixels = kLongestSum * kLanes<C>;

template <class C>
struct PixelsScratch {
  BandShape<C> shape;
  int64_t step;  // from one channel of the band to the next: its pixels, and where gradients for others are put
  C* band;       // the gradient of the convolution's output, [output channel][pixel]
  double* bias;  // of each output channel
  int64_t size;

  PixelsScratch(const ConvPoolGeometry& g, void* memory)
      : shape(g, g.out_channels, kMostPixels<C>), step(shape.pixels + kLanes<C>) {
    MemoryParts taken(memory);
    band = taken.take<C>(g.out_channels * step);
    bias = taken.take<double>(g.out_channels);
    size = taken.used();
  }
};

template <class T>
class PixelsBackwardWorker {
  using C = Compute<T>;

 public:
  PixelsBackwardWorker(const ConvPoolBackward<T>& call, void* memory)
      : call_(call),
        g_(call.geometry),
        scratch_(call.geometry, memory),
        band_(call, g_.conv[1] * g_.conv[2], g_.conv[2], scratch_.band, scratch_.step) {}

  // A group of an image, the conv pixels `pixels` along the axis. `fresh`: there is nothing yet in grad_weight.
  void run(int64_t image, int64_t group, const Range& pixels, bool fresh, C* grad_weight, C* lost, C* grad_bias) {
    for (int64_t o = 0; o < g_.out_channels; ++o) scratch_.bias[o] = 0;
    const int64_t channel = group * g_.in_channels, at = group * g_.in_channels * g_.out_channels;
    scratch_.shape.for_each(g_, call_.plan.axis, pixels.first, pixels.last, [&](const ConvBox& box) {
      const int64_t first = band_.first_of(box), count = box.pixels();
      for (int64_t o = 0; o < g_.out_channels; ++o) {
        band_.fill(image, group * g_.out_channels + o, box, o);
        if (grad_bias) scratch_.bias[o] += band_.sum(o, count);
      }
      if (grad_weight) {
        const ConvLayout& layout = call_.input_layout;
        add_weight_gradient(call_.input + image * layout.n + channel * layout.c + first, count, fresh, grad_weight,
                            lost);
      }
      fresh = false;
      if (call_.grad_input) {
        const ConvLayout& layout = call_.grad_input_layout;
        put_input_gradient(call_.packed + at, count, call_.grad_input + image * layout.n + channel * layout.c + first);
      }
    });
    for (int64_t o = 0; grad_bias && o < g_.out_channels; ++o) {
      grad_bias[group * g_.out_channels + o] += static_cast<C>(scratch_.bias[o]);
    }
  }

 private:
  void add_weight_gradient(const T* input, int64_t pixels, bool fresh, C* to, C* lost) const {
    constexpr int choices = kLanes<C> >= 4 ? 3 : 2;  // of 1, 2 and 4 rows
    with_constant<choices>(dot_rows<C>(g_) / 2 + 1, [&](auto choice) {
      constexpr int rows = 1 << (decltype(choice)::value - 1), columns = kLanes<C> / rows;
      for (int64_t c = 0; c < g_.in_channels; c += columns) {
        for (int64_t o = 0; o < g_.out_channels; o += rows, to += kLanes<C>, lost += lost ? kLanes<C> : 0) {
          const Vec<C> total = dot_tile<rows>(pixels, band_.channel(o), scratch_.step, input + c * call_.input_layout.c,
                                              call_.input_layout.c, g_.in_channels - c, g_.out_channels - o);
          put_sums(total, fresh, to, lost);
        }
      }
    });
  }

  void put_input_gradient(const C* weight, int64_t pixels, T* to) const {
    const int64_t step = call_.grad_input_layout.c;
    for_each_tile<C>(g_.in_channels, pixels, true, [&](auto rows, auto vectors, int64_t row, int64_t column, int last) {
      Vec<C> total[decltype(rows)::value][decltype(vectors)::value];
      multiply_tile(g_.out_channels, weight + row, 1, g_.in_channels, band_.channel(0) + column, scratch_.step,
                    kLanes<C>, total);
      store_tile<decltype(rows)::value, decltype(vectors)::value, C>(total, last, to + row * step + column, step,
                                                                     [](Vec<C> x, int) { return x; });
    });
  }

  const ConvPoolBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const PixelsScratch<C> scratch_;
  const PixelBand<T> band_;
};

// Whether the pixels of an image follow each other in memory.
FASTNN_INLINE bool pixels_are_dense(const ConvPoolGeometry& g, const ConvLayout& layout) {
  int64_t step = 1;
  for (int d = 2; d >= 0; --d) {
    if (g.input[d] > 1 && layout.d[d] != step) return false;
    step *= g.input[d];
  }
  return true;
}

FASTNN_INLINE bool pixels_apply(const ConvPoolGeometry& g, const ConvLayout& input, const ConvLayout& grad_input) {
  for (int d = 0; d < 3; ++d) {
    if (g.kernel[d] != 1 || g.padding[d] != 0 || g.stride[d] != 1) return false;
  }
  return pixels_are_dense(g, input) && pixels_are_dense(g, grad_input);
}

// Products of all pixels against what transposes and lists take, of each channel in and out. Where they don't pay, nor
// do they for groups joined.
FASTNN_INLINE bool pixels_pay(const ConvPoolGeometry& g) {
  constexpr int64_t kInput = 20, kOutput = 12;  // in products, as measured
  return g.in_channels * g.out_channels <= kInput * g.in_channels + kOutput * g.out_channels;
}

template <class C>
ConvPoolBackwardPlan plan_pixels(const ConvPoolGeometry& g) {
  const PixelsScratch<C> scratch(g, nullptr);
  const int64_t rows = dot_rows<C>(g), pixels = g.conv[0] * g.conv[1] * g.conv[2];
  ConvPoolBackwardPlan plan = {};
  plan.algorithm = ConvBackwardAlgorithm::pixels;
  plan.packed_size = g.groups * g.out_channels * g.in_channels;
  plan.weight_size =
      g.groups * divide_up(g.out_channels, rows) * divide_up(g.in_channels, kLanes<C> / rows) * kLanes<C>;
  plan.scratch_size = scratch.size;
  plan.axis = g.conv[0] > 1 ? 0 : g.conv[1] > 1 ? 1 : 2;
  plan.most_parts = smaller(g.conv[plan.axis], divide_up(pixels, scratch.shape.pixels));
  plan.blocks = g.groups;
  plan.keeps_lost = g.batch * divide_up(pixels, scratch.shape.size[0] * scratch.shape.size[1] * scratch.shape.size[2]) >
                    kFewAdditions;
  return plan;
}

// weight -> [group][output channel][channel]
template <class T>
void pack_pixels(const ConvPoolBackward<T>& call) {
  const ConvPoolGeometry& g = call.geometry;
  for (int64_t o = 0; o < g.groups * g.out_channels; ++o) {
    copy_run(call.weight + o * call.weight_layout.n, call.weight_layout.c, g.in_channels,
             call.packed + o * g.in_channels);
  }
}

// From [group][tile of channels][tile of output channels][output channel][channel].
template <class T>
void unpack_pixels(const ConvPoolBackward<T>& call, const Compute<T>* from, T* to, const ConvLayout& layout) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const int64_t rows = dot_rows<C>(g), columns = kLanes<C> / rows;
  for (int64_t group = 0; group < g.groups; ++group, to += g.out_channels * layout.n) {
    for (int64_t c = 0; c < g.in_channels; c += columns) {
      for (int64_t o = 0; o < g.out_channels; o += rows, from += kLanes<C>) {
        for (int64_t r = 0; r < smaller(rows, g.out_channels - o); ++r) {
          for (int64_t i = 0; i < smaller(columns, g.in_channels - c); ++i) {
            to[(o + r) * layout.n + (c + i) * layout.c] = from_compute<T>(from[r * columns + i]);
          }
        }
      }
    }
  }
}

template <class T>
void backward_pixels(const ConvPoolBackward<T>& call, const ConvPoolPiece& piece, Compute<T>* grad_weight,
                     Compute<T>* lost, Compute<T>* grad_bias, void* scratch) {
  PixelsBackwardWorker<T> worker(call, scratch);
  backward_by_groups(worker, call, piece, grad_weight, lost, grad_bias);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
