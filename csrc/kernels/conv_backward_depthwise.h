// Backward of depthwise convolutions: groups of one input channel side by side in a vector's lanes (a block). The few
// products of a conv pixel are then cheaper done for all pixels than listed for those with a gradient.
#pragma once

#include "conv_backward_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// Taps of a row of the kernel, and pixels, that are worked on together.
constexpr int kMostRowTaps = FASTNN_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kPixelsTogether = 4;

struct DepthwiseShape {
  int64_t blocks;
  int64_t multiplier;  // output channels of a group
  int64_t taps;        // elements of the kernel of a block's channels
};

template <class C>
DepthwiseShape depthwise_shape(const ConvPoolGeometry& g) {
  DepthwiseShape s;
  s.blocks = divide_up(g.groups, kLanes<C>);
  s.multiplier = g.out_channels;
  s.taps = g.taps() * kLanes<C>;
  return s;
}

template <class C>
struct DepthwiseBackwardScratch {
  BandShape<C> shape;
  BlockImage image;
  C* images;  // a window of the input
  C* gradients;
  C* parts;      // ImageWindow's
  char* band;    // GradientBand's
  double* bias;  // [output channel of a group][lane]
  int64_t size;

  DepthwiseBackwardScratch(const ConvPoolGeometry& g, void* memory)
      : shape(g, kLanes<C>, g.conv[0] * g.conv[1] * g.conv[2]),
        image(g, kLanes<C>, false, sizeof(C), shape.size, 2, 0) {
    MemoryParts taken(memory);
    images = taken.take<C>(image.size);
    gradients = taken.take<C>(image.size);
    parts = g.taps() * g.out_channels > kLongestSum ? taken.take<C>(image.size) : nullptr;
    band = taken.take<char>(GradientBand<C>::memory_size(g, shape));
    bias = taken.take<double>(g.out_channels * kLanes<C>);
    size = taken.used();
  }
};

// Counted in vectors of products and of what goes with them, a conv pixel.
template <class C>
bool depthwise_pays(const ConvPoolGeometry& g) {
  if (g.in_channels != 1 || g.groups == 1) return false;
  const double together = static_cast<double>(g.taps() * g.out_channels * divide_up(g.groups, kLanes<C>));
  const RunShape s = run_shape<C>(g);
  const double conv = static_cast<double>(g.conv[0] * g.conv[1] * g.conv[2]);
  const double winners = static_cast<double>(g.pixels()) / conv;
  const double listed = static_cast<double>(g.groups) *
                        (2 + (winners < 1 ? winners : 1) * static_cast<double>(g.out_channels * s.runs * s.vectors));
  return together < listed;
}

template <class C>
ConvPoolBackwardPlan plan_depthwise_backward(const ConvPoolGeometry& g) {
  const DepthwiseShape s = depthwise_shape<C>(g);
  ConvPoolBackwardPlan plan = {};
  plan.algorithm = ConvBackwardAlgorithm::depthwise;
  plan.packed_size = s.blocks * s.multiplier * s.taps;
  plan.weight_size = plan.packed_size;
  plan.scratch_size = DepthwiseBackwardScratch<C>(g, nullptr).size;
  plan.blocks = s.blocks;
  plan.most_parts = 1;
  plan.keeps_lost = true;
  return plan;
}

// Calls body(output channel, element of the packed weight, offset of the tap) for each element of the weight. It is
// packed as [block][output channel of a group][tap][lane], with zeros in the unused lanes.
template <class C, class Body>
void for_each_depthwise_weight(const ConvPoolGeometry& g, const ConvLayout& layout, const Body& body) {
  const DepthwiseShape s = depthwise_shape<C>(g);
  for (int64_t o = 0; o < g.groups * s.multiplier; ++o) {
    const int64_t group = o / s.multiplier, block = group / kLanes<C>;
    int64_t at = (block * s.multiplier + o % s.multiplier) * s.taps + group % kLanes<C>;
    for (int64_t d = 0; d < g.kernel[0]; ++d) {
      for (int64_t h = 0; h < g.kernel[1]; ++h) {
        for (int64_t w = 0; w < g.kernel[2]; ++w, at += kLanes<C>) {
          body(o * layout.n + d * layout.d[0] + h * layout.d[1] + w * layout.d[2], at);
        }
      }
    }
  }
}

template <class T>
void pack_depthwise_backward(const ConvPoolBackward<T>& call) {
  using C = Compute<T>;
  fill_zeros(call.packed, call.plan.packed_size);
  for_each_depthwise_weight<C>(call.geometry, call.weight_layout,
                               [&](int64_t from, int64_t to) { call.packed[to] = to_compute(call.weight[from]); });
}

template <class T, class C = Compute<T>>
void unpack_depthwise(const ConvPoolBackward<T>& call, const C* packed, T* to, const ConvLayout& layout) {
  for_each_depthwise_weight<C>(call.geometry, layout,
                               [&](int64_t element, int64_t from) { to[element] = from_compute<T>(packed[from]); });
}

template <class T>
class DepthwiseBackwardWorker {
  using C = Compute<T>;

 public:
  DepthwiseBackwardWorker(const ConvPoolBackward<T>& call, bool weight_wanted, void* memory)
      : call_(call),
        g_(call.geometry),
        s_(depthwise_shape<C>(call.geometry)),
        scratch_(call.geometry, memory),
        window_(call, scratch_.image, weight_wanted ? scratch_.images : nullptr,
                call.grad_input ? scratch_.gradients : nullptr, scratch_.parts),
        band_(call, scratch_.shape, scratch_.band) {}

  void run(int64_t image, int64_t block, C* grad_weight, C* lost, C* grad_bias) {
    const int64_t group = block * kLanes<C>, lanes = smaller(kLanes<C>, g_.groups - group);
    const int axis = scratch_.image.axis;
    fill_zeros(scratch_.bias, s_.multiplier * kLanes<C>);
    window_.open(image, group, lanes, 0, 0, g_.conv[axis]);
    for (int64_t first = 0; first < g_.conv[axis]; first += scratch_.image.step) {
      const int64_t last = smaller(first + scratch_.image.step, g_.conv[axis]);
      window_.move_to(first);
      origin_ = first * g_.stride[axis] * scratch_.image.d[axis];
      for (int64_t m = 0; m < s_.multiplier; ++m) {
        const int64_t at = (block * s_.multiplier + m) * s_.taps;
        scratch_.shape.for_each(g_, axis, first, last, [&](const ConvBox& box) {
          band_.fill(image, group * s_.multiplier + m, s_.multiplier, lanes, box);
          if (grad_bias) band_.add_pixels(0, box.pixels(), scratch_.bias + m * kLanes<C>);
          for_each_tap_row([&](auto taps, int64_t tap, int64_t offset) {
            constexpr int count = decltype(taps)::value;
            const int64_t element = at + tap * kLanes<C>;
            if (grad_weight) add_weight_gradient<count>(box, offset, grad_weight + element, lost + element);
            if (call_.grad_input) {
              add_input_gradient<count>(box, offset, call_.packed + element);
              window_.count_additions(smaller(box.pixels(), count));
            }
          });
        });
      }
    }
    window_.close();
    for (int64_t i = 0; grad_bias && i < lanes * s_.multiplier; ++i) {
      const int64_t lane = i / s_.multiplier, m = i % s_.multiplier;
      grad_bias[group * s_.multiplier + i] += static_cast<C>(scratch_.bias[m * kLanes<C> + lane]);
    }
  }

 private:
  // Calls body(Constant<taps>, first tap, where it lies in the image) for each part of a row of the kernel.
  template <class Body>
  FASTNN_INLINE void for_each_tap_row(const Body& body) const {
    const int64_t (&step)[3] = scratch_.image.d;
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

  // Calls body(gradients of a row of the box, where its first pixel lies in the window) for each row.
  template <class Body>
  FASTNN_INLINE void for_each_row(const ConvBox& box, const Body& body) const {
    const int64_t (&step)[3] = scratch_.image.d;
    const C* row = band_.pixels();
    for (int64_t z = box.first[0]; z < box.last[0]; ++z) {
      for (int64_t y = box.first[1]; y < box.last[1]; ++y, row += box.size(2) * kLanes<C>) {
        body(row,
             z * g_.stride[0] * step[0] + y * g_.stride[1] * step[1] + box.first[2] * g_.stride[2] * step[2] - origin_);
      }
    }
  }

  // Sums of some kLongestSum pixels, which what they add to, longer ones, would round off: `lost` keeps that.
  template <int taps>
  void add_weight_gradient(const ConvBox& box, int64_t offset, C* to, C* lost) const {
    const int64_t step = g_.stride[2] * kLanes<C>, tap_step = g_.dilation[2] * kLanes<C>;
    Vec<C> total[taps] = {};
    int64_t summed = 0;
    for_each_row(box, [&](const C* gradients, int64_t start) {
      for (int64_t x = 0; x < box.size(2);) {
        const int64_t end = smaller(box.size(2), x + kLongestSum);
        summed += end - x;
        for (const C* from = scratch_.images + start + offset + x * step; x < end; ++x, from += step) {
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
  FASTNN_INLINE static void add_exactly(Vec<C> (&total)[taps], C* to, C* lost) {
    for (int w = 0; w < taps; ++w) {
      add_keeping_lost(total[w], to + w * kLanes<C>, lost + w * kLanes<C>);
      total[w] = Vec<C>{};
    }
  }

  template <int taps>
  void add_input_gradient(const ConvBox& box, int64_t offset, const C* weight) const {
    const int64_t step = g_.stride[2] * kLanes<C>, tap_step = g_.dilation[2] * kLanes<C>;
    for_each_row(box, [&](const C* gradients, int64_t start) {
      C* to = scratch_.gradients + start + offset;
      int64_t x = 0;
      const auto add_together = [&](auto stride) {
        for (; x + kPixelsTogether <= box.size(2); x += kPixelsTogether) {
          add_pixels<taps, kPixelsTogether, decltype(stride)::value>(gradients + x * kLanes<C>, weight, to + x * step);
        }
      };
      const bool dense = g_.dilation[2] == 1;
      if (dense && g_.stride[2] == 1) add_together(Constant<1>{});
      if (dense && g_.stride[2] == 2 && taps > 2) add_together(Constant<2>{});
      for (; x < box.size(2); ++x) {
        const Vec<C> gradient = load(gradients + x * kLanes<C>);
#pragma GCC unroll 12
        for (int w = 0; w < taps; ++w) {
          C* pixel = to + x * step + w * tap_step;
          store(pixel, multiply_add(gradient, load(weight + w * kLanes<C>), load(pixel)));
        }
      }
    });
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

  const ConvPoolBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const DepthwiseShape s_;
  const DepthwiseBackwardScratch<C> scratch_;
  ImageWindow<T> window_;
  GradientBand<T> band_;
  int64_t origin_;  // of the window in the image
};

template <class T>
void backward_depthwise(const ConvPoolBackward<T>& call, const ConvPoolPiece& piece, Compute<T>* grad_weight,
                        Compute<T>* lost, Compute<T>* grad_bias, void* scratch) {
  DepthwiseBackwardWorker<T> worker(call, grad_weight != nullptr, scratch);
  const int64_t block_size = call.plan.weight_size / call.plan.blocks;
  if (grad_weight)
    fill_zeros(grad_weight + piece.first_block * block_size, (piece.last_block - piece.first_block) * block_size);
  for (int64_t image = piece.first_image; image < piece.last_image; ++image) {
    for (int64_t block = piece.first_block; block < piece.last_block; ++block) {
      worker.run(image, block, grad_weight, lost, grad_bias);
    }
  }
  if (grad_weight) add_lost(call, piece.first_block, piece.last_block, grad_weight, lost);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
