// The lists of winners by output channel (ChannelLists), read from the pooled pixels themselves, where windows do not
// overlap: the gradient of the convolution's output need not be laid out for them. A pooled pixel costs a comparison
// for each position of its window, and is one entry at most.
#pragma once

#include "runs.h"

namespace fastnn {
namespace FASTNN_ISA {

// The most pooled pixels whose windows reach into a band, in whole vectors. (A vector has the most lanes for float.)
inline int64_t pooled_room(const ConvPoolGeometry& g, const ConvBackwardPlan& plan) {
  int64_t pixels = 1;
  for (int d = 0; d < 3; ++d) {
    pixels *= smaller(g.output[d], (plan.band.size[d] + g.pool_extent(d) - 2) / g.pool_stride[d] + 1);
  }
  return round_up(pixels, kLanes<float>);
}

// The pooled pixels of a slice: about as many as have their windows in a slice of conv pixels.
inline int64_t pooled_slice(const ConvPoolGeometry& g, const ConvBackwardPlan& plan) {
  const int64_t pixels = plan.winners.slice_pixels / (g.pool_stride[0] * g.pool_stride[1] * g.pool_stride[2]);
  return larger(kLanes<float>, pixels / kLanes<float> * kLanes<float>);
}

template <class T, class E>
class PooledLists {
  using C = Compute<T>;

 public:
  PooledLists(const ConvBackward<T>& call, Parts& memory)
      : call_(call), g_(call.geometry), room_(pooled_room(g_, *call.plan)), slice_(pooled_slice(g_, *call.plan)) {
    places_ = memory.take<Offset<C>>(g_.places() * room_);
    gradients_ = memory.take<T>(call.plan->band.width * room_);
    winners_ = memory.take<uint8_t>(call.plan->band.width * room_);
  }

  // Makes the lists of `channels` output channels, the first of them `channel`, of an image's box of conv pixels.
  // `origin` is the conv pixel that the window of the input begins with. Adds each channel's sum to `bias`, unless that
  // is null. Returns how many slices the lists have.
  int64_t make(int64_t image, int64_t channel, int64_t channels, const ConvBox& box, int64_t origin,
               const ChannelLists<E>& lists, double* bias) {
    const ConvBox windows = windows_of(g_, box);
    for (int d = 0; d < 3; ++d) {
      if (windows.size(d) <= 0) return lists.make_empty();
    }
    const int64_t count = windows.pixels(), slices = divide_up(count, slice_);
    find_places(windows, box, origin);
    const auto gradients =
        rows_of(call_.grad_output, call_.output_layout, image, channel, channels, windows, gradients_);
    const auto winners = rows_of(call_.winners, call_.winners_layout, image, channel, channels, windows, winners_);
    for (int64_t o = 0; o < channels; ++o) {
      const T* const gradient = gradients.first + o * gradients.step;
      const uint8_t* const winner = winners.first + o * winners.step;
      int64_t entries = 0, *starts = lists.starts + o;
      double sum = 0;
      for (int64_t start = 0; start < count; start += slice_, starts += lists.width) {
        *starts = entries;
        const Listed listed =
            list_slice({gradient, winner, start, smaller(start + slice_, count), count},
                       lists.values + o * lists.room + entries, lists.offsets + o * lists.room + entries);
        entries += listed.entries;
        sum += sum_lanes<C>(listed.total);
      }
      *starts = entries;
      if (bias) bias[o] += sum;
    }
    return slices;
  }

 private:
  // The pooled pixels [first, last) of a channel's row of `count`.
  struct Slice {
    const T* gradients;
    const uint8_t* winners;
    int64_t first, last, count;
  };

  // How many entries a slice has in a list, and the sum of their gradients in each lane.
  struct Listed {
    int64_t entries;
    Vec<C> total;
  };

  // Lists the pooled pixels of a slice that have a winner in the box and a gradient.
  FASTNN_INLINE Listed list_slice(const Slice& slice, E* values, Offset<C>* offsets) const {
    const int64_t window = g_.places(), room = room_;
    const Offset<C>* const places = places_;
    int64_t entries = 0;
    Vec<C> total = {};
    for (int64_t p = slice.first; p < slice.last; p += kLanes<C>) {
      const Numbers<C> winner = load_bytes_up_to<C>(slice.winners + p, slice.count - p);
      Vec<Offset<C>> place = Vec<Offset<C>>{} - 1;
      for (int64_t i = 0; i < window; ++i) place = winner == number<C>(i) ? load(places + i * room + p) : place;
      const Vec<C> value = place >= 0 ? load_up_to<T>(slice.gradients + p, slice.count - p) : Vec<C>{};
      total += value;
      entries += append_nonzero(value, place, values + entries, offsets + entries);
    }
    return {entries, total};
  }

  // Rows of pooled pixels: of the first channel, and the elements from a channel's row to the next channel's.
  template <class Element>
  struct Rows {
    const Element* first;
    int64_t step;
  };

  // The rows of a box of pooled pixels: where they lie in the tensor if they do, and otherwise copied to `staged`.
  template <class Element>
  Rows<Element> rows_of(const Element* tensor, const ConvLayout& layout, int64_t image, int64_t channel,
                        int64_t channels, const ConvBox& windows, Element* staged) const {
    const Element* from = tensor + image * layout.n + channel * layout.c;
    int64_t size[3], run = 1;
    bool are_joined = true;  // the pixels from dimension d + 1 on follow each other
    for (int d = 2; d >= 0; --d) {
      from += windows.first[d] * layout.d[d];
      size[d] = windows.size(d);
      are_joined = are_joined && (size[d] == 1 || d == 2 || layout.d[d] == run * layout.d[2]);
      if (!are_joined) continue;
      run *= size[d];
      size[d] = 1;
    }
    if (run == windows.pixels() && (layout.d[2] == 1 || run == 1)) return {from, layout.c};
    Element* to = staged;
    for (int64_t z = 0; z < size[0]; ++z) {
      for (int64_t y = 0; y < size[1]; ++y, to += run) {
        copy_rows(from + z * layout.d[0] + y * layout.d[1], layout, channels, run, to);
      }
    }
    return {staged, room_};
  }

  template <class Element>
  void copy_rows(const Element* from, const ConvLayout& layout, int64_t channels, int64_t pixels, Element* to) const {
    if (layout.c == 1 && layout.d[2] != 1) return transpose_matrix(from, layout.d[2], pixels, channels, to, room_);
    for (int64_t o = 0; o < channels; ++o, from += layout.c, to += room_) {
      if (layout.d[2] == 1) {
        __builtin_memcpy(to, from, pixels * sizeof(Element));
      } else {
        for (int64_t p = 0; p < pixels; ++p) to[p] = from[p * layout.d[2]];
      }
    }
  }

  // Finds for each position of each pooled pixel's window where the elements under that conv pixel begin in the window
  // of the input, or -1 where the conv pixel lies outside the box. The next image's are the same.
  void find_places(const ConvBox& windows, const ConvBox& box, int64_t origin) {
    if (origin == found_origin_ && __builtin_memcmp(&box, &found_box_, sizeof(box)) == 0) return;
    found_origin_ = origin;
    found_box_ = box;
    const ImagePlan& image = call_.plan->image;
    const int64_t step = g_.stride[2] * image.d[2];
    for (int64_t i = 0; i < g_.places(); ++i) {
      const int64_t row = i / g_.pool_kernel[2];
      const int64_t at[3] = {row / g_.pool_kernel[1], row % g_.pool_kernel[1], i % g_.pool_kernel[2]};
      const auto conv_pixel = [&](int d, int64_t pooled) {
        return pooled * g_.pool_stride[d] - g_.pool_padding[d] + at[d] * g_.pool_dilation[d];
      };
      const auto is_inside = [&](int d, int64_t pixel) { return pixel >= box.first[d] && pixel < box.last[d]; };
      Offset<C>* to = places_ + i * room_;
      for (int64_t z = windows.first[0]; z < windows.last[0]; ++z) {
        const int64_t slice = conv_pixel(0, z);
        for (int64_t y = windows.first[1]; y < windows.last[1]; ++y) {
          const int64_t conv_row = conv_pixel(1, y);
          const bool row_is_inside = is_inside(0, slice) && is_inside(1, conv_row);
          const int64_t start = place_of_row(g_, image, origin, slice, conv_row);
          for (int64_t x = windows.first[2]; x < windows.last[2]; ++x) {
            const int64_t column = conv_pixel(2, x), place = start + column * step;
            *to++ = static_cast<Offset<C>>(row_is_inside && is_inside(2, column) ? place : -1);
          }
        }
      }
      for (; (to - places_) % kLanes<C> != 0; ++to) *to = -1;
    }
  }

  const ConvBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const int64_t room_;   // pooled pixels of a box, in whole vectors
  const int64_t slice_;  // pooled pixels of a slice
  Offset<C>* places_;    // [position of a window][pooled pixel of the box]
  T* gradients_;         // [channel][pooled pixel], where they lie in another way
  uint8_t* winners_;     // the same
  ConvBox found_box_ = {};
  int64_t found_origin_ = -1;  // of the places
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
