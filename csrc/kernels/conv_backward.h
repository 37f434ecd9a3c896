// Backward: only the winner of each window has a gradient, so most of the convolution's output gradient is zero. It is
// laid out a band at a time, and what is not zero there listed as (value, place).
//
// With L channels of the input side by side (a block), the elements under a conv pixel are a few runs, each of whole
// vectors. The weight's gradient for one output channel is the sum over its list of value x runs of the input; the
// input's gradient at one conv pixel is the sum over its list (one entry an output channel) of value x runs of the
// weight. Both sums are the same loop, with the runs accumulated in registers. In bfloat16 two entries of a list are
// one product, where the processor has an instruction for it: their runs are zipped with each other on the way.
#pragma once

#include "conv_backward_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class T, class E>
class BackwardWorker {
  using C = Compute<T>;

 public:
  BackwardWorker(const ConvPoolBackward<T>& call, bool weight_wanted, void* memory)
      : call_(call),
        g_(call.geometry),
        s_(run_shape<E>(call.geometry)),
        scratch_(call.geometry, memory),
        window_(call, scratch_.image, weight_wanted ? scratch_.images : nullptr,
                call.grad_input ? scratch_.gradients : nullptr, scratch_.parts),
        band_(call, scratch_.shape, scratch_.band) {
    const BlockImage& image = scratch_.image;
    for (int64_t d = 0; d < g_.kernel[0]; ++d) {
      for (int64_t h = 0; h < g_.kernel[1]; ++h) {
        scratch_.run_offsets[d * g_.kernel[1] + h] = d * g_.dilation[0] * image.d[0] + h * g_.dilation[1] * image.d[1];
      }
    }
    for (int64_t o = 0; o < scratch_.shape.width; ++o) {
      scratch_.channel_offsets[o] = static_cast<Offset<C>>(o * s_.row);
    }
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
    fill_zeros(scratch_.bias, round_up(g_.out_channels, scratch_.shape.width));
    const int64_t channel = first * s_.lanes, channels = smaller(blocks_ * s_.lanes, g_.in_channels - channel);
    window_.for_each_place(image, group * g_.in_channels + channel, channels, pixels,
                           [&](int64_t pixel, int64_t past, bool is_before) {
                             if (is_before) return run_window(pixel, past, false, nullptr, nullptr, nullptr);
                             run_window(pixel, past, fresh && pixel == pixels.first, grad_weight, lost, grad_bias);
                           });
    for (int64_t o = 0; grad_bias && o < g_.out_channels; ++o) {
      grad_bias[group * g_.out_channels + o] += static_cast<C>(scratch_.bias[o]);
    }
  }

 private:
  // The conv pixels [first, last) along the axis that the window moves along.
  void run_window(int64_t first, int64_t last, bool fresh, C* grad_weight, C* lost, C* grad_bias) {
    const int64_t width = scratch_.shape.width;
    for (int64_t channel = 0; channel < g_.out_channels; channel += width) {
      const int64_t channels = smaller(width, g_.out_channels - channel);
      const int64_t at = ((group_ * s_.blocks + first_) * g_.out_channels + channel) * s_.row;
      bool is_fresh = fresh;
      scratch_.shape.for_each(g_, scratch_.image.axis, first, last, [&](const ConvBox& box) {
        band_.fill(image_, group_ * g_.out_channels + channel, 1, channels, box);
        if (grad_weight || call_.grad_input) find_pixels(box, first);
        const int64_t pixels = round_up(box.pixels(), kLanes<C>);
        if (grad_bias) band_.add_pixels(0, pixels, scratch_.bias + channel);
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
    const BlockImage& image = scratch_.image;
    const int64_t before = origin * g_.stride[image.axis] * image.d[image.axis];
    Offset<C>* to = scratch_.pixel_offsets;
    for (int64_t z = box.first[0]; z < box.last[0]; ++z) {
      for (int64_t y = box.first[1]; y < box.last[1]; ++y) {
        const int64_t row = z * g_.stride[0] * image.d[0] + y * g_.stride[1] * image.d[1] - before;
        for (int64_t x = box.first[2]; x < box.last[2]; ++x) {
          *to++ = static_cast<Offset<C>>(row + image.column(x * g_.stride[2]));
        }
      }
    }
    for (; (to - scratch_.pixel_offsets) % kLanes<C> != 0; ++to) *to = 0;
  }

  // A list a channel: of the pixels in whose gradient it has a part, slice after slice.
  void list_by_channel(int64_t pixels) const {
    constexpr int lanes = kLanes<C>;
    const int64_t width = scratch_.shape.width, room = scratch_.list_room;
    for (int64_t o = 0; o < width; o += lanes) {
      int64_t counts[lanes] = {};
      int64_t* starts = scratch_.slice_starts + o;
      E* values = scratch_.values + o * room;
      Offset<C>* offsets = scratch_.offsets + o * room;
      for (int64_t p = 0; p < pixels; p += lanes) {
        if (p % scratch_.slice_pixels == 0) {
          __builtin_memcpy(starts, counts, sizeof(counts));
          starts += width;
        }
        const Vec<Offset<C>> places = load(scratch_.pixel_offsets + p);
        Vec<C> square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = load(band_.pixels() + (p + i) * width + o);
        transpose<C>(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          const int64_t at = i * room + counts[i];
          counts[i] += append_nonzero(square[i], places, values + at, offsets + at);
        }
      }
      __builtin_memcpy(starts, counts, sizeof(counts));
    }
  }

  // A list a pixel, one after the other: of the channels that have a gradient there.
  void list_by_pixel(int64_t pixels) const {
    const int64_t width = scratch_.shape.width;
    int64_t count = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      scratch_.pixel_starts[p] = count;
      for (int64_t o = 0; o < width; o += kLanes<C>) {
        count += append_nonzero(load(band_.pixels() + p * width + o), load(scratch_.channel_offsets + o),
                                scratch_.values + count, scratch_.offsets + count);
      }
    }
    scratch_.pixel_starts[pixels] = count;
  }

  // What a slice adds is rounded by the size of the whole sum: `lost` keeps what that takes away.
  void add_weight_gradient(int64_t pixels, int64_t channels, bool fresh, C* to, C* lost) {
    list_by_channel(pixels);
    const int64_t width = scratch_.shape.width, slices = divide_up(pixels, scratch_.slice_pixels);
    for (int64_t block = 0; block < blocks_; ++block) {
      const E* image = window_.image(block);
      const int64_t block_at = block * g_.out_channels * s_.row;
      for_each_register_block<E>(s_.runs, s_.vectors, [&](auto runs, auto vectors, int64_t run, int64_t vector) {
        for (int64_t slice = 0; slice < slices; ++slice) {
          const int64_t* starts = scratch_.slice_starts + slice * width;
          for (int64_t o = 0; o < channels; ++o, ++starts) {
            const int64_t at = block_at + o * s_.row + (run * s_.vectors + vector) * kLanes<C>;
            bool writes = fresh && slice == 0;
            for (int64_t part = starts[0]; writes || part < starts[width]; part += kLongestSum) {
              const int64_t entry = o * scratch_.list_room + part;
              const GradientList<E> list = {scratch_.values + entry, scratch_.offsets + entry,
                                            smaller(starts[width] - part, kLongestSum)};
              add_runs<decltype(runs)::value, decltype(vectors)::value>(list, image + vector * kLanes<C>,
                                                                        scratch_.run_offsets + run, writes, to + at,
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
          const int64_t start = scratch_.pixel_starts[p], count = scratch_.pixel_starts[p + 1] - start;
          if (count == 0) continue;
          scatter_runs<decltype(runs)::value, decltype(vectors)::value>(
              {scratch_.values + start, scratch_.offsets + start, count},
              rows + (run * s_.vectors + vector) * kLanes<C>, scratch_.run_offsets + run,
              s_.length - vector * kLanes<C>, image + scratch_.pixel_offsets[p] + vector * kLanes<C>);
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
        if constexpr (kZipsRuns<E>) {
          store(target + v * kLanes<C>, sum);
        } else {
          store_up_to<C>(target + v * kLanes<C>, sum, length - v * kLanes<C>);
        }
      }
    }
  }

  const ConvPoolBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const RunShape s_;
  const BackwardScratch<E> scratch_;
  ImageWindow<T, E> window_;
  GradientBand<T> band_;
  int64_t image_, group_, first_, blocks_;  // first: of the blocks
};

template <class E, class T>
void backward_runs(const ConvPoolBackward<T>& call, const ConvPoolPiece& piece, Compute<T>* grad_weight,
                   Compute<T>* lost, Compute<T>* grad_bias, void* scratch) {
  BackwardWorker<T, E> worker(call, grad_weight != nullptr, scratch);
  const int64_t blocks = call.plan.blocks / call.geometry.groups;
  const Range pixels = pixels_of(call, piece);
  for (int64_t image = piece.first_image; image < piece.last_image; ++image) {
    for (int64_t block = piece.first_block; block < piece.last_block;) {
      const int64_t group = block / blocks, first = block % blocks;
      const int64_t count = smaller(blocks - first, piece.last_block - block);
      worker.run(image, group, first, first + count, pixels, image == piece.first_image, grad_weight, lost, grad_bias);
      block += count;
    }
  }
  if (grad_weight && lost) add_lost(call, piece.first_block, piece.last_block, grad_weight, lost);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
