// The lists of a band's winners, and the sums over them: value x run, accumulated in registers. An entry costs a load
// and a multiply-add for each vector of its runs, in each of the two gradients.
#pragma once

#include "pooled_lists.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class E>
class WinnerLists {
  using C = Compute<E>;

 public:
  WinnerLists(const ConvPoolGeometry& g, const ConvBackwardPlan& plan, Parts& memory)
      : s_(plan.winners),
        width_(plan.band.width),
        out_channels_(g.out_channels),
        window_size_(plan.image.size),
        lists_(larger(plan.band.pixels, pooled_room(g, plan)),
               larger(divide_up(plan.band.pixels, s_.slice_pixels),
                      divide_up(pooled_room(g, plan), pooled_slice(g, plan))),
               width_, memory) {
    pixel_starts_ = memory.take<int64_t>(plan.band.pixels + 1);
    run_offsets_ = memory.take<int64_t>(s_.runs);
    pixel_offsets_ = memory.take<Offset<C>>(plan.band.pixels);
    channel_offsets_ = memory.take<Offset<C>>(width_);
  }

  // Fills the tables. It is called once, when the memory is there.
  void prepare(const ConvPoolGeometry& g, const ImagePlan& image) const {
    const int64_t (&d)[3] = image.d;
    for (int64_t run = 0; run < s_.runs; ++run) {
      const int64_t tap = run * s_.columns, row = tap / g.kernel[2];
      run_offsets_[run] = row / g.kernel[1] * g.dilation[0] * d[0] + row % g.kernel[1] * g.dilation[1] * d[1] +
                          tap % g.kernel[2] * g.dilation[2] * d[2];
    }
    for (int64_t o = 0; o < width_; ++o) channel_offsets_[o] = static_cast<Offset<C>>(o * s_.row);
  }

  // Finds for each pixel of the box where its first kernel position lies in the window, which begins with the pixel
  // `origin`. The numbers that fill up the last vector belong to no pixel and have no gradient.
  void find_pixels(const ConvPoolGeometry& g, const ImagePlan& image, const ConvBox& box, int64_t origin) const {
    Offset<C>* to = pixel_offsets_;
    for (int64_t z = box.first[0]; z < box.last[0]; ++z) {
      for (int64_t y = box.first[1]; y < box.last[1]; ++y) {
        const int64_t row = place_of_row(g, image, origin, z, y);
        for (int64_t x = box.first[2]; x < box.last[2]; ++x) {
          *to++ = static_cast<Offset<C>>(row + x * g.stride[2] * image.d[2]);
        }
      }
    }
    for (; (to - pixel_offsets_) % kLanes<C> != 0; ++to) *to = 0;
  }

  // The lists of each output channel, for others to fill.
  const ChannelLists<E>& by_channel() const { return lists_; }

  // Adds the weight's gradient of the first `channels` lists, which have `slices` slices, and of `blocks` blocks, whose
  // windows begin at `images`. What a slice adds is rounded by the size of the whole sum; `lost` keeps what rounding
  // takes away.
  FASTNN_SHARED void add_weight_gradient(int64_t slices, int64_t channels, const E* images, int64_t blocks, bool fresh,
                                         C* to, C* lost) const {
    for (int64_t block = 0; block < blocks; ++block) {
      const E* image = images + block * window_size_;
      const int64_t block_at = block * out_channels_ * s_.row;
      for_each_register_block<E>(s_.runs, s_.vectors, [&](auto runs, auto vectors, int64_t run, int64_t vector) {
        for (int64_t slice = 0; slice < slices; ++slice) {
          const int64_t* starts = lists_.starts + slice * width_;
          for (int64_t o = 0; o < channels; ++o, ++starts) {
            const int64_t at = block_at + o * s_.row + (run * s_.vectors + vector) * kLanes<C>;
            bool writes = fresh && slice == 0;
            for (int64_t part = starts[0]; writes || part < starts[width_]; part += kLongestSum) {
              const int64_t entry = o * lists_.room + part;
              const GradientList<E> list = {lists_.values + entry, lists_.offsets + entry,
                                            smaller(starts[width_] - part, kLongestSum)};
              add_runs<decltype(runs)::value, decltype(vectors)::value>(
                  list, image + vector * kLanes<C>, run_offsets_ + run, writes, to + at, lost ? lost + at : nullptr);
              writes = false;
            }
          }
        }
      });
    }
  }

  FASTNN_SHARED void add_input_gradient(const C* band, int64_t pixels, const E* weight, int64_t blocks,
                                        C* gradients) const {
    list_by_pixel(band, pixels);
    for (int64_t block = 0; block < blocks; ++block) {
      const E* rows = weight + block * out_channels_ * s_.row;
      C* image = gradients + block * window_size_;
      for_each_register_block<E>(s_.runs, s_.vectors, [&](auto runs, auto vectors, int64_t run, int64_t vector) {
        for (int64_t p = 0; p < pixels; ++p) {
          const int64_t start = pixel_starts_[p], count = pixel_starts_[p + 1] - start;
          if (count == 0) continue;
          scatter_runs<decltype(runs)::value, decltype(vectors)::value>(
              {lists_.values + start, lists_.offsets + start, count}, rows + (run * s_.vectors + vector) * kLanes<C>,
              run_offsets_ + run, s_.length - vector * kLanes<C>, image + pixel_offsets_[p] + vector * kLanes<C>);
        }
      });
    }
  }

  // Makes a list for each channel: the pixels at which its gradient is not zero, slice after slice. Returns how many
  // slices there are.
  int64_t list_by_channel(const C* band, int64_t pixels) const {
    constexpr int lanes = kLanes<C>;
    for (int64_t o = 0; o < width_; o += lanes) {
      int64_t counts[lanes] = {};
      int64_t* starts = lists_.starts + o;
      E* values = lists_.values + o * lists_.room;
      Offset<C>* offsets = lists_.offsets + o * lists_.room;
      for (int64_t p = 0; p < pixels; p += lanes) {
        if (p % s_.slice_pixels == 0) {
          __builtin_memcpy(starts, counts, sizeof(counts));
          starts += width_;
        }
        const Vec<Offset<C>> places = load(pixel_offsets_ + p);
        Vec<C> square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = load(band + (p + i) * width_ + o);
        transpose<C>(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          const int64_t at = i * lists_.room + counts[i];
          counts[i] += append_nonzero(square[i], places, values + at, offsets + at);
        }
      }
      __builtin_memcpy(starts, counts, sizeof(counts));
    }
    return divide_up(pixels, s_.slice_pixels);
  }

 private:
  // A list a pixel, one after the other: of the channels that have a gradient there.
  void list_by_pixel(const C* band, int64_t pixels) const {
    int64_t count = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      pixel_starts_[p] = count;
      for (int64_t o = 0; o < width_; o += kLanes<C>) {
        count += append_nonzero(load(band + p * width_ + o), load(channel_offsets_ + o), lists_.values + count,
                                lists_.offsets + count);
      }
    }
    pixel_starts_[pixels] = count;
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

  const WinnersPlan& s_;
  const int64_t width_;  // output channels of a band
  const int64_t out_channels_, window_size_;
  const ChannelLists<E> lists_;  // their memory serves the lists of pixels, too
  int64_t* pixel_starts_;        // where each pixel's list begins
  int64_t* run_offsets_;         // in the window
  Offset<C>* pixel_offsets_;     // in the window, of each pixel of the band
  Offset<C>* channel_offsets_;   // in the packed weight, of each channel of the band
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
