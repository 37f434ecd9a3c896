// Backward for any convolution: only the winner of each window has a gradient, so most of the gradient of the
// convolution's output is zero. What is not zero is listed as (value, place): where the input's gradient is wanted,
// from a band of it that is laid out, and otherwise from the pooled pixels. A winner costs twice the depth in
// multiply-adds, whatever the number of conv pixels.
//
// With some channels of the input side by side (a block), the elements under a conv pixel are a few runs, each of whole
// vectors. The weight's gradient for one output channel is the sum over its list of value x runs of the input; the
// input's gradient at one conv pixel is the sum over its list (one entry an output channel) of value x runs of the
// weight. Both sums are the same loop, with the runs accumulated in registers.
#pragma once

#include "gradient_band.h"
#include "lists.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class T, class E>
class WinnersWorker {
  using C = Compute<T>;

 public:
  WinnersWorker(const ConvBackward<T>& call, bool weight_wanted, Parts& memory)
      : call_(call),
        g_(call.geometry),
        s_(call.plan->winners),
        width_(call.plan->band.width),
        window_(call, s_.blocks, weight_wanted, memory),
        band_(call, memory),
        lists_(g_, *call.plan, memory),
        pooled_(call, memory),
        lists_band_(g_.has_overlapping_windows()) {
    bias_ = memory.take<double>(round_up(g_.out_channels, width_));
  }

  // Once the memory is there.
  void prepare() const { lists_.prepare(g_, call_.plan->image); }

  // Blocks [first, last) of one group of an image, the conv pixels `pixels` along the axis. The gradients are null
  // where they are not wanted. `fresh`: there is nothing yet in grad_weight.
  void run(int64_t image, int64_t group, int64_t first, int64_t last, const Range& pixels, bool fresh, C* grad_weight,
           C* lost, double* grad_bias) {
    image_ = image;
    group_ = group;
    blocks_ = last - first;
    first_ = first;
    grad_bias = first == 0 ? grad_bias : nullptr;
    fill_zeros(bias_, round_up(g_.out_channels, width_));
    const int64_t channel = first * s_.lanes, channels = smaller(blocks_ * s_.lanes, g_.in_channels - channel);
    window_.for_each_place(image, group * g_.in_channels + channel, channels, pixels,
                           [&](int64_t pixel, int64_t past, bool is_before) {
                             if (is_before) return run_window(pixel, past, false, nullptr, nullptr, nullptr);
                             run_window(pixel, past, fresh && pixel == pixels.first, grad_weight, lost, grad_bias);
                           });
    if (grad_bias) add_bias(bias_, g_.out_channels, grad_bias + group * g_.out_channels);
  }

 private:
  // The conv pixels [first, last) along the axis that the window moves along.
  void run_window(int64_t first, int64_t last, bool fresh, C* grad_weight, C* lost, double* grad_bias) {
    for (int64_t channel = 0; channel < g_.out_channels; channel += width_) {
      const int64_t channels = smaller(width_, g_.out_channels - channel);
      const int64_t at = ((group_ * s_.blocks + first_) * g_.out_channels + channel) * s_.row;
      bool is_fresh = fresh;
      for_each_band(g_, call_.plan->band, call_.plan->image.axis, first, last, [&](const ConvBox& box) {
        const int64_t of_all = group_ * g_.out_channels + channel, pixels = round_up(box.pixels(), kLanes<C>);
        if (call_.grad_input || lists_band_) {
          band_.fill(image_, of_all, 1, channels, box);
          lists_.find_pixels(g_, call_.plan->image, box, first);
        }
        int64_t slices = 0;
        if (grad_weight || grad_bias) {
          double* const bias = grad_bias ? bias_ + channel : nullptr;
          if (lists_band_ && bias) band_.add_pixels(pixels, bias);
          slices = lists_band_ ? lists_.list_by_channel(band_.pixels(), pixels)
                               : pooled_.make(image_, of_all, channels, box, first, lists_.by_channel(), bias);
        }
        if (grad_weight) {
          lists_.add_weight_gradient(slices, channels, window_.image(0), blocks_, is_fresh, grad_weight + at,
                                     lost ? lost + at : nullptr);
        }
        is_fresh = false;
        if (call_.grad_input) {
          const E* weight = reinterpret_cast<const E*>(call_.packed) + at;
          lists_.add_input_gradient(band_.pixels(), pixels, weight, blocks_, window_.gradient(0));
          window_.count_additions(smaller(pixels, g_.taps()));
        }
      });
    }
  }

  const ConvBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const WinnersPlan& s_;
  const int64_t width_;  // output channels of a band
  ImageWindow<T, E> window_;
  GradientBand<T> band_;
  const WinnerLists<E> lists_;
  PooledLists<T, E> pooled_;
  const bool lists_band_;                   // whether the lists by channel are made from the band, too
  double* bias_;                            // of each output channel
  int64_t image_, group_, first_, blocks_;  // first: of the blocks
};

template <class E, class T>
void backward_winners(const ConvBackward<T>& call, const ConvBackwardPiece& piece, Compute<T>* grad_weight,
                      Compute<T>* lost, double* grad_bias, void* scratch) {
  Parts memory(scratch);
  WinnersWorker<T, E> worker(call, grad_weight != nullptr, memory);
  worker.prepare();
  const int64_t blocks = call.plan->winners.blocks;
  const Range pixels = pixels_of(call, piece);
  for (int64_t image = piece.first_image; image < piece.last_image; ++image) {
    for (int64_t block = piece.first_block; block < piece.last_block;) {
      const int64_t group = block / blocks, first = block % blocks;
      const int64_t count = smaller(blocks - first, piece.last_block - block);
      worker.run(image, group, first, first + count, pixels, image == piece.first_image, grad_weight, lost, grad_bias);
      block += count;
    }
  }
  if (grad_weight && lost) add_lost(call, piece, grad_weight, lost);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
