// Backward for any convolution: only the winner of each window has a gradient, so most of the gradient of the
// convolution's output is zero. It is laid out a band at a time, and what is not zero there listed as (value, place). A
// winner costs twice the depth in multiply-adds, whatever the number of conv pixels.
//
// With some channels of the input side by side (a block), the elements under a conv pixel are a few runs, each of whole
// vectors. The weight's gradient for one output channel is the sum over its list of value x runs of the input; the
// input's gradient at one conv pixel is the sum over its list (one entry an output channel) of value x runs of the
// weight. Both sums are the same loop, with the runs accumulated in registers.
#pragma once

#include "gradient_band.h"
#include "runs.h"

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
        list_room_(call.plan->band.pixels + kLanes<C>),
        window_(call, s_.blocks, weight_wanted, memory),
        band_(call, memory) {
    const int64_t pixels = call.plan->band.pixels;
    values_ = memory.take<E>(list_room_ * width_);
    offsets_ = memory.take<Offset<C>>(list_room_ * width_);
    slice_starts_ = memory.take<int64_t>((divide_up(pixels, s_.slice_pixels) + 1) * width_);
    pixel_starts_ = memory.take<int64_t>(pixels + 1);
    run_offsets_ = memory.take<int64_t>(s_.runs);
    pixel_offsets_ = memory.take<Offset<C>>(pixels);
    channel_offsets_ = memory.take<Offset<C>>(width_);
    bias_ = memory.take<double>(round_up(g_.out_channels, width_));
  }

  // Once the memory is there.
  void prepare() {
    const int64_t(&d)[3] = call_.plan->image.d;
    for (int64_t run = 0; run < s_.runs; ++run) {
      const int64_t tap = run * s_.columns, row = tap / g_.kernel[2];
      run_offsets_[run] = row / g_.kernel[1] * g_.dilation[0] * d[0] + row % g_.kernel[1] * g_.dilation[1] * d[1] +
                          tap % g_.kernel[2] * g_.dilation[2] * d[2];
    }
    for (int64_t o = 0; o < width_; ++o) channel_offsets_[o] = static_cast<Offset<C>>(o * s_.row);
  }

  // Blocks [first, last) of one group of an image, the conv pixels `pixels` along the axis. The gradients are null
  // where they are not wanted. `fresh`: there is nothing yet in grad_weight.
  void run(int64_t image, int64_t group, int64_t first, int64_t last, const Range& pixels, bool fresh, C* grad_weight,
           C* lost, C* grad_bias) {
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
  void run_window(int64_t first, int64_t last, bool fresh, C* grad_weight, C* lost, C* grad_bias) {
    for (int64_t channel = 0; channel < g_.out_channels; channel += width_) {
      const int64_t channels = smaller(width_, g_.out_channels - channel);
      const int64_t at = ((group_ * s_.blocks + first_) * g_.out_channels + channel) * s_.row;
      bool is_fresh = fresh;
      for_each_band(g_, call_.plan->band, call_.plan->image.axis, first, last, [&](const ConvBox& box) {
        band_.fill(image_, group_ * g_.out_channels + channel, 1, channels, box);
        if (grad_weight || call_.grad_input) find_pixels(box, first);
        const int64_t pixels = round_up(box.pixels(), kLanes<C>);
        if (grad_bias) band_.add_pixels(pixels, bias_ + channel);
        if (grad_weight) add_weight_gradient(pixels, channels, is_fresh, grad_weight + at, lost ? lost + at : nullptr);
        is_fresh = false;
        if (call_.grad_input) {
          add_input_gradient(pixels, reinterpret_cast<const E*>(call_.packed) + at);
          window_.count_additions(smaller(pixels, g_.taps()));
        }
      });
    }
  }

  // Where the first tap of each of the box's pixels lies in the window, which begins with the pixel `origin`. Those
  // that fill up the last vector have no gradient.
  void find_pixels(const ConvBox& box, int64_t origin) {
    const ImagePlan& image = call_.plan->image;
    const int64_t before = origin * g_.stride[image.axis] * image.d[image.axis];
    Offset<C>* to = pixel_offsets_;
    for (int64_t z = box.first[0]; z < box.last[0]; ++z) {
      for (int64_t y = box.first[1]; y < box.last[1]; ++y) {
        const int64_t row = z * g_.stride[0] * image.d[0] + y * g_.stride[1] * image.d[1] - before;
        for (int64_t x = box.first[2]; x < box.last[2]; ++x) {
          *to++ = static_cast<Offset<C>>(row + x * g_.stride[2] * image.d[2]);
        }
      }
    }
    for (; (to - pixel_offsets_) % kLanes<C> != 0; ++to) *to = 0;
  }

  // A list a channel: of the pixels in whose gradient it has a part, slice after slice.
  void list_by_channel(int64_t pixels) const {
    constexpr int lanes = kLanes<C>;
    for (int64_t o = 0; o < width_; o += lanes) {
      int64_t counts[lanes] = {};
      int64_t* starts = slice_starts_ + o;
      E* values = values_ + o * list_room_;
      Offset<C>* offsets = offsets_ + o * list_room_;
      for (int64_t p = 0; p < pixels; p += lanes) {
        if (p % s_.slice_pixels == 0) {
          __builtin_memcpy(starts, counts, sizeof(counts));
          starts += width_;
        }
        const Vec<Offset<C>> places = load(pixel_offsets_ + p);
        Vec<C> square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = load(band_.pixels() + (p + i) * width_ + o);
        transpose<C>(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          const int64_t at = i * list_room_ + counts[i];
          counts[i] += append_nonzero(square[i], places, values + at, offsets + at);
        }
      }
      __builtin_memcpy(starts, counts, sizeof(counts));
    }
  }

  // A list a pixel, one after the other: of the channels that have a gradient there.
  void list_by_pixel(int64_t pixels) const {
    int64_t count = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      pixel_starts_[p] = count;
      for (int64_t o = 0; o < width_; o += kLanes<C>) {
        count += append_nonzero(load(band_.pixels() + p * width_ + o), load(channel_offsets_ + o),
                                values_ + count, offsets_ + count);
      }
    }
    pixel_starts_[pixels] = count;
  }

  // What a slice adds is rounded by the size of the whole sum: `lost` keeps what that takes away.
  void add_weight_gradient(int64_t pixels, int64_t channels, bool fresh, C* to, C* lost) {
    list_by_channel(pixels);
    const int64_t slices = divide_up(pixels, s_.slice_pixels);
    for (int64_t block = 0; block < blocks_; ++block) {
      const E* image = window_.image(block);
      const int64_t block_at = block * g_.out_channels * s_.row;
      for_each_register_block<E>(s_.runs, s_.vectors, [&](auto runs, auto vectors, int64_t run, int64_t vector) {
        for (int64_t slice = 0; slice < slices; ++slice) {
          const int64_t* starts = slice_starts_ + slice * width_;
          for (int64_t o = 0; o < channels; ++o, ++starts) {
            const int64_t at = block_at + o * s_.row + (run * s_.vectors + vector) * kLanes<C>;
            bool writes = fresh && slice == 0;
            for (int64_t part = starts[0]; writes || part < starts[width_]; part += kLongestSum) {
              const int64_t entry = o * list_room_ + part;
              const GradientList<E> list = {values_ + entry, offsets_ + entry,
                                            smaller(starts[width_] - part, kLongestSum)};
              add_runs<decltype(runs)::value, decltype(vectors)::value>(list, image + vector * kLanes<C>,
                                                                        run_offsets_ + run, writes, to + at,
                                                                        lost ? lost + at : nullptr);
              writes = false;
            }
          }
        }
      });
    }
  }

  template <int runs, int vectors>
  FASTNN_INLINE void add_runs(const GradientList<E>& list, const E* image, const int64_t* run_offsets, bool writes,
                              C* to, C* lost) const {
    const E* from[runs];
    Vec<C> total[runs][vectors] = {};
    for (int r = 0; r < runs; ++r) from[r] = image + run_offsets[r];
    accumulate_runs<runs, vectors>(list, from, total);
#pragma GCC unroll 4
    for (int r = 0; r < runs; ++r) {
#pragma GCC unroll 6
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = (r * s_.vectors + v) * kLanes<C>;
        put_sums(total[r][v], writes, to + at, lost ? lost + at : nullptr);
      }
    }
  }

  void add_input_gradient(int64_t pixels, const E* weight) {
    list_by_pixel(pixels);
    for (int64_t block = 0; block < blocks_; ++block) {
      const E* rows = weight + block * g_.out_channels * s_.row;
      C* image = window_.gradient(block);
      for_each_register_block<E>(s_.runs, s_.vectors, [&](auto runs, auto vectors, int64_t run, int64_t vector) {
        for (int64_t p = 0; p < pixels; ++p) {
          const int64_t start = pixel_starts_[p], count = pixel_starts_[p + 1] - start;
          if (count == 0) continue;
          scatter_runs<decltype(runs)::value, decltype(vectors)::value>(
              {values_ + start, offsets_ + start, count},
              rows + (run * s_.vectors + vector) * kLanes<C>, run_offsets_ + run,
              s_.length - vector * kLanes<C>, image + pixel_offsets_[p] + vector * kLanes<C>);
        }
      });
    }
  }

  // `length`: the elements of a run from the first vector on.
  template <int runs, int vectors>
  FASTNN_INLINE void scatter_runs(const GradientList<E>& list, const E* weight, const int64_t* run_offsets,
                                  int64_t length, C* to) const {
    const E* from[runs];
    Vec<C> total[runs][vectors] = {};
    for (int r = 0; r < runs; ++r) from[r] = weight + r * s_.vectors * kLanes<C>;
    accumulate_runs<runs, vectors>(list, from, total);
#pragma GCC unroll 4
    for (int r = 0; r < runs; ++r) {
      C* target = to + run_offsets[r];
#pragma GCC unroll 6
      for (int v = 0; v < vectors; ++v) {
        // The unused lanes are left alone: infinity times their zeros is NaN.
        const Vec<C> sum = load(target + v * kLanes<C>) + total[r][v];
        if constexpr (kZips<E>) {
          store(target + v * kLanes<C>, sum);
        } else {
          store_up_to<C>(target + v * kLanes<C>, sum, length - v * kLanes<C>);
        }
      }
    }
  }

  const ConvBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const WinnersPlan& s_;
  const int64_t width_;      // output channels of a band
  const int64_t list_room_;  // of one channel's list
  ImageWindow<T, E> window_;
  GradientBand<T> band_;
  E* values_;  // of the lists of a band
  Offset<C>* offsets_;
  int64_t* slice_starts_;                   // where in each channel's list each slice begins
  int64_t* pixel_starts_;                   // where each pixel's list begins
  int64_t* run_offsets_;                    // in the window
  Offset<C>* pixel_offsets_;                // in the window, of each pixel of the band
  Offset<C>* channel_offsets_;              // in the packed weight, of each channel of the band
  double* bias_;                            // of each output channel
  int64_t image_, group_, first_, blocks_;  // first: of the blocks
};

template <class E, class T>
void backward_winners(const ConvBackward<T>& call, const ConvBackwardPiece& piece, Compute<T>* grad_weight,
                      Compute<T>* lost, Compute<T>* grad_bias, void* scratch) {
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
