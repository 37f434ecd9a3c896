// Backward of depthwise convolutions: groups of one input channel side by side in a vector's lanes (a block). The few
// products of a conv pixel, two for each tap, are cheaper done for all pixels than listed for those with a gradient.
#pragma once

#include "gradient_band.h"
#include "image.h"

namespace fastnn {
namespace FASTNN_ISA {

// Taps of a row of the kernel, and pixels, that are worked on together.
constexpr int kMostRowTaps = FASTNN_VECTOR_REGISTERS * 3 / 8;
constexpr int kPixelsTogether = 4;

// Calls body(output channel, place in the packed weight) for each output channel. The weight is packed as
// [block][output channel of a group][tap][lane].
template <class T, class Body>
void for_each_depthwise_output(const ConvBackward<T>& call, const Body& body) {
  const DepthwiseBackwardPlan& s = call.plan->depthwise;
  constexpr int lanes = kLanes<Compute<T>>;
  for (int64_t o = 0; o < call.geometry.groups * s.multiplier; ++o) {
    const int64_t group = o / s.multiplier;
    body(o, (group / lanes * s.multiplier + o % s.multiplier) * s.taps + group % lanes);
  }
}

template <class T>
void pack_depthwise(const ConvBackward<T>& call) {
  using C = Compute<T>;
  const ConvLayout& layout = call.weight_layout;
  fill_zeros(call.packed, call.plan->packed_size);
  for_each_depthwise_output(call, [&](int64_t o, int64_t at) {
    for (int64_t tap = 0; tap < call.geometry.taps(); ++tap) {
      call.packed[at + tap * kLanes<C>] = to_compute(call.weight[o * layout.n + tap * layout.d[2]]);
    }
  });
}

template <class T, class C = Compute<T>>
void unpack_depthwise(const ConvBackward<T>& call, const C* packed, T* to, const ConvLayout& layout) {
  for_each_depthwise_output(call, [&](int64_t o, int64_t at) {
    for (int64_t tap = 0; tap < call.geometry.taps(); ++tap) {
      to[o * layout.n + tap * layout.d[2]] = from_compute<T>(packed[at + tap * kLanes<C>]);
    }
  });
}

// The sums over a band's pixels, of some taps of a row of the kernel.
template <class C>
class DepthwiseSums {
 public:
  // `band`: the gradients of the pixels of a box. `origin`: where the window begins in the image.
  DepthwiseSums(const ConvPoolGeometry& g, const int64_t (&step)[3], const C* band, const ConvBox& box, int64_t origin)
      : g_(g), step_(step), band_(band), box_(box), origin_(origin) {}

  // Adds sums over about kLongestSum pixels to the weight's gradient. What rounding takes from each addition goes to
  // `lost`.
  template <int taps>
  FASTNN_SHARED void add_weight_gradient(const C* image, C* to, C* lost) const {
    const int64_t step = g_.stride[2] * kLanes<C>, tap_step = g_.dilation[2] * kLanes<C>;
    Vec<C> total[taps] = {};
    int64_t summed = 0;
    for_each_row([&](const C* gradients, int64_t start) {
      for (int64_t x = 0; x < box_.size(2);) {
        const int64_t end = smaller(box_.size(2), x + kLongestSum);
        summed += end - x;
        for (const C* from = image + start + x * step; x < end; ++x, from += step) {
          const Vec<C> gradient = load(gradients + x * kLanes<C>);
#pragma GCC unroll 12
          for (int w = 0; w < taps; ++w) total[w] = multiply_add(gradient, load(from + w * tap_step), total[w]);
        }
        if (summed < kLongestSum) continue;
        add_exactly<taps>(total, to, lost);
        summed = 0;
      }
    });
    add_exactly<taps>(total, to, lost);
  }

  template <int taps>
  FASTNN_SHARED void add_input_gradient(const C* weight, C* image) const {
    const int64_t step = g_.stride[2] * kLanes<C>, tap_step = g_.dilation[2] * kLanes<C>;
    for_each_row([&](const C* gradients, int64_t start) {
      C* to = image + start;
      int64_t x = 0;
      const auto add_together = [&](auto stride) {
        for (; x + kPixelsTogether <= box_.size(2); x += kPixelsTogether) {
          add_pixels<taps, kPixelsTogether, decltype(stride)::value>(gradients + x * kLanes<C>, weight, to + x * step);
        }
      };
      const bool dense = g_.dilation[2] == 1;
      if (dense && g_.stride[2] == 1) add_together(Constant<1>{});
      if (dense && g_.stride[2] == 2 && taps > 2) add_together(Constant<2>{});
      for (; x < box_.size(2); ++x) {
        const Vec<C> gradient = load(gradients + x * kLanes<C>);
#pragma GCC unroll 12
        for (int w = 0; w < taps; ++w) {
          C* pixel = to + x * step + w * tap_step;
          store(pixel, multiply_add(gradient, load(weight + w * kLanes<C>), load(pixel)));
        }
      }
    });
  }

 private:
  // Calls body(gradients of a row of the box, where its first pixel lies in the window) for each row.
  template <class Body>
  FASTNN_INLINE void for_each_row(const Body& body) const {
    const int64_t (&step)[3] = step_;
    const C* row = band_;
    for (int64_t z = box_.first[0]; z < box_.last[0]; ++z) {
      for (int64_t y = box_.first[1]; y < box_.last[1]; ++y, row += box_.size(2) * kLanes<C>) {
        body(row, z * g_.stride[0] * step[0] + y * g_.stride[1] * step[1] + box_.first[2] * g_.stride[2] * step[2] -
                      origin_);
      }
    }
  }

  template <int taps>
  FASTNN_INLINE static void add_exactly(Vec<C> (&total)[taps], C* to, C* lost) {
    for (int w = 0; w < taps; ++w) {
      add_keeping_lost(total[w], to + w * kLanes<C>, lost + w * kLanes<C>);
      total[w] = Vec<C>{};
    }
  }

  // Neighbours, whose taps meet the same pixels of the image: these are read and written once.
  template <int taps, int pixels, int stride>
  FASTNN_INLINE static void add_pixels(const C* gradients, const C* weight, C* to) {
    constexpr int met = (pixels - 1) * stride + taps;
    Vec<C> total[met];
#pragma GCC unroll 18
    for (int i = 0; i < met; ++i) total[i] = load(to + i * kLanes<C>);
#pragma GCC unroll 4
    for (int i = 0; i < pixels; ++i) {
      const Vec<C> gradient = load(gradients + i * kLanes<C>);
#pragma GCC unroll 12
      for (int w = 0; w < taps; ++w) {
        Vec<C>& sum = total[i * stride + w];
        sum = multiply_add(gradient, load(weight + w * kLanes<C>), sum);
      }
    }
#pragma GCC unroll 18
    for (int i = 0; i < met; ++i) store(to + i * kLanes<C>, total[i]);
  }

  const ConvPoolGeometry& g_;
  const int64_t (&step_)[3];  // of the image
  const C* band_;
  const ConvBox& box_;
  const int64_t origin_;
};

template <class T>
class DepthwiseBackwardWorker {
  using C = Compute<T>;

 public:
  DepthwiseBackwardWorker(const ConvBackward<T>& call, bool weight_wanted, Parts& memory)
      : call_(call),
        g_(call.geometry),
        s_(call.plan->depthwise),
        window_(call, 1, weight_wanted, memory),
        band_(call, memory) {
    bias_ = memory.take<double>(s_.multiplier * kLanes<C>);
  }

  void run(int64_t image, int64_t block, C* grad_weight, C* lost, double* grad_bias) {
    const int64_t group = block * kLanes<C>, lanes = smaller(kLanes<C>, g_.groups - group);
    const int axis = call_.plan->image.axis;
    fill_zeros(bias_, s_.multiplier * kLanes<C>);
    window_.for_each_place(image, group, lanes, {0, g_.conv[axis]}, [&](int64_t first, int64_t last, bool) {
      const int64_t origin = first * g_.stride[axis] * call_.plan->image.d[axis];
      for (int64_t m = 0; m < s_.multiplier; ++m) {
        const int64_t at = (block * s_.multiplier + m) * s_.taps;
        for_each_band(g_, call_.plan->band, axis, first, last, [&](const ConvBox& box) {
          band_.fill(image, group * s_.multiplier + m, s_.multiplier, lanes, box);
          if (grad_bias) band_.add_pixels(box.pixels(), bias_ + m * kLanes<C>);
          const DepthwiseSums<C> sums(g_, call_.plan->image.d, band_.pixels(), box, origin);
          for_each_tap_row([&](auto taps, int64_t tap, int64_t offset) {
            constexpr int count = decltype(taps)::value;
            const int64_t element = at + tap * kLanes<C>;
            if (grad_weight) {
              sums.template add_weight_gradient<count>(window_.image(0) + offset, grad_weight + element,
                                                       lost + element);
            }
            if (call_.grad_input) {
              sums.template add_input_gradient<count>(call_.packed + element, window_.gradient(0) + offset);
              window_.count_additions(smaller(box.pixels(), count));
            }
          });
        });
      }
    });
    for (int64_t m = 0; grad_bias && m < s_.multiplier; ++m) {
      add_bias(bias_ + m * kLanes<C>, lanes, grad_bias + group * s_.multiplier + m, s_.multiplier);
    }
  }

 private:
  // Calls body(Constant<taps>, first tap, where it lies in the image) for each part of a row of the kernel.
  template <class Body>
  FASTNN_INLINE void for_each_tap_row(const Body& body) const {
    const int64_t (&step)[3] = call_.plan->image.d;
    for (int64_t d = 0; d < g_.kernel[0]; ++d) {
      for (int64_t h = 0; h < g_.kernel[1]; ++h) {
        const int64_t row = d * g_.dilation[0] * step[0] + h * g_.dilation[1] * step[1];
        for (int64_t w = 0; w < g_.kernel[2]; w += kMostRowTaps) {
          with_constant<kMostRowTaps>(static_cast<int>(smaller(kMostRowTaps, g_.kernel[2] - w)), [&](auto taps) {
            body(taps, (d * g_.kernel[1] + h) * g_.kernel[2] + w, row + w * g_.dilation[2] * step[2]);
          });
        }
      }
    }
  }

  const ConvBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const DepthwiseBackwardPlan& s_;
  ImageWindow<T> window_;
  GradientBand<T> band_;
  double* bias_;  // [output channel of a group][lane]
};

template <class T>
void backward_depthwise(const ConvBackward<T>& call, const ConvBackwardPiece& piece, Compute<T>* grad_weight,
                        Compute<T>* lost, double* grad_bias, void* scratch) {
  Parts memory(scratch);
  DepthwiseBackwardWorker<T> worker(call, grad_weight != nullptr, memory);
  const int64_t size = call.plan->weight_size / call.plan->blocks, blocks = piece.last_block - piece.first_block;
  if (grad_weight) fill_zeros(grad_weight + piece.first_block * size, blocks * size);
  for (int64_t image = piece.first_image; image < piece.last_image; ++image) {
    for (int64_t block = piece.first_block; block < piece.last_block; ++block) {
      worker.run(image, block, grad_weight, lost, grad_bias);
    }
  }
  if (grad_weight) add_lost(call, piece, grad_weight, lost);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
