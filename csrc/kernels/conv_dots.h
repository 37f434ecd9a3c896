// Forward as dot products along the depth: for weights that serve too few pixels to be worth packing, and for few
// outputs of many channels. The input is read where it lies if it has long runs in common with the weight, a box of
// conv pixels at a time that the same taps meet; else what is under each conv pixel is copied in the weight's order.
#pragma once

#include "conv_dots_tile.h"

namespace fastnn {
namespace FASTNN_ISA {

// One thread's way through its items, with products of elements E.
template <class E, class T>
class DotsForward {
  using C = Compute<T>;
  using Copied = Number<E>;

 public:
  DotsForward(const ConvPoolForward<T>& call, void* memory)
      : call_(call),
        g_(call.geometry),
        scratch_(call.geometry, call.plan, memory),
        input_(dot_input_layout(call.geometry, call.plan, call.input_layout, call.weight_layout)),
        weight_(dot_weight_layout(call.geometry, call.plan, call.weight_layout)) {
    asks_ahead_ = dots_ask_ahead<T>(g_, call.plan);
    const bool by_pixel = !call.plan.in_place && !call.plan.copies_image;
    DotPixel* pixel = scratch_.pixels;
    DotBox* box = scratch_.boxes;
    for_each_dot_box(g_, call.plan, [&](const Range(&conv)[3], const Range(&taps)[3]) {
      *box = {pixel - scratch_.pixels, 0, {taps[0], taps[1], taps[2]}};
      const int64_t step = by_pixel ? g_.depth() : g_.stride[2] * input_.d[2];
      for (int64_t image = 0; image < scratch_.images; ++image) {
        for (int64_t z = conv[0].first; z < conv[0].last; ++z) {
          for (int64_t y = conv[1].first; y < conv[1].last; ++y) {
            int64_t at = ((image * g_.conv[0] + z) * g_.conv[1] + y) * g_.conv[2] + conv[2].first;
            int64_t from = by_pixel ? at * step : image * input_.n + under_pixel(z, y, conv[2].first, taps);
            for (int64_t x = conv[2].first; x < conv[2].last; ++x, from += step) *pixel++ = {from, at++};
          }
        }
      }
      box->pixels = (pixel - scratch_.pixels - box->first) / scratch_.images;
      ++box;
    });
    box_count_ = box - scratch_.boxes;
    // All conv pixels are there when windows are looked for.
    for (int64_t i = 0; i < g_.conv[0] * g_.conv[1]; ++i) scratch_.tags[i] = i;
  }

  void run(int64_t item) {
    const int64_t blocks = divide_up(g_.out_channels, kLanes<C>), block_part = item % call_.plan.block_parts;
    item /= call_.plan.block_parts;
    const int64_t group = item % g_.groups, first_image = item / g_.groups * scratch_.images;
    const int64_t images = smaller(scratch_.images, g_.batch - first_image);
    const T* input = call_.input + first_image * call_.input_layout.n + group * g_.in_channels * call_.input_layout.c;
    for (int64_t i = 0; i < images && !call_.plan.in_place; ++i) copy_input(input + i * call_.input_layout.n, i);
    const int64_t last = blocks * (block_part + 1) / call_.plan.block_parts;
    for (int64_t b = blocks * block_part / call_.plan.block_parts; b < last; ++b) {
      const int64_t first = b * kLanes<C>, channels = smaller(kLanes<C>, g_.out_channels - first);
      const int64_t channel = group * g_.out_channels + first;
      if (call_.plan.in_place) {
        multiply(input, channel, channels, images);
      } else {
        multiply(copy(), channel, channels, images);
      }
      for (int64_t i = 0; i < images; ++i) {
        call_.winners ? pool<true>(first_image + i, i, channel, channels)
                      : pool<false>(first_image + i, i, channel, channels);
      }
    }
  }

 private:
  Copied* copy() const { return reinterpret_cast<Copied*>(scratch_.copy); }

  // The first element that taps meet under a conv pixel.
  int64_t under_pixel(int64_t z, int64_t y, int64_t x, const Range (&taps)[3]) const {
    const int64_t pixel[3] = {z, y, x};
    int64_t offset = 0;
    for (int d = 0; d < 3; ++d) {
      const int64_t padding = call_.plan.skips_padding ? g_.padding[d] : 0;
      if (taps[d].first == taps[d].last) return 0;  // none
      offset += (pixel[d] * g_.stride[d] - padding + taps[d].first * g_.dilation[d]) * input_.d[d];
    }
    return offset;
  }

  // The steps of a box's taps, as of a smaller kernel.
  DotSteps steps_of(const DotBox& box) const {
    ConvPoolGeometry g = g_;
    int64_t first = 0;
    for (int d = 0; d < 3; ++d) {
      g.kernel[d] = box.taps[d].last - box.taps[d].first;
      first += box.taps[d].first * weight_.d[d];
      if (g.kernel[d] == 0) return {scratch_.steps, 0, 0, 0};
    }
    const DotRuns runs = dot_runs(g, input_, weight_);
    const int64_t vectors = runs.length / kNumbers<E>, whole = runs.count * vectors;
    const int rest = static_cast<int>(runs.length % kNumbers<E>);
    for (int64_t run = 0; run < runs.count; ++run) {
      DotStep at = {0, first};
      for (int64_t i = 0, left = run; i < runs.outside; left /= runs.size[i++]) {
        at.input += left % runs.size[i] * runs.input[i];
        at.weight += left % runs.size[i] * runs.weight[i];
      }
      for (int64_t v = 0; v < vectors; ++v) {
        scratch_.steps[run * vectors + v] = {at.input + v * kNumbers<E>, at.weight + v * kNumbers<E>};
      }
      const int64_t last = vectors * kNumbers<E>;
      if (rest > 0) scratch_.steps[whole + run] = {at.input + last, at.weight + last};
    }
    return {scratch_.steps, whole, whole + (rest > 0 ? runs.count : 0), rest};
  }

  void copy_input(const T* input, int64_t number) {
    const ConvLayout& to = input_;
    if (call_.plan.copies_image) {
      const InputTile<Copied> tile = {copy() + number * to.n,
                                      {-g_.padding[0], -g_.padding[1], -g_.padding[2]},
                                      {padded_extent(g_, 0), padded_extent(g_, 1), padded_extent(g_, 2)},
                                      to.c,
                                      {to.d[0], to.d[1], to.d[2]}};
      return fill_tile(g_, input, call_.input_layout, true, g_.in_channels, tile);
    }
    const bool is_last = dot_copy_is_last(g_, call_.plan, call_.input_layout, call_.weight_layout);
    Copied* pixel = copy() + number * g_.conv[0] * g_.conv[1] * g_.conv[2] * g_.depth();
    for (int64_t z = 0; z < g_.conv[0]; ++z) {
      for (int64_t y = 0; y < g_.conv[1]; ++y) {
        for (int64_t x = 0; x < g_.conv[2]; ++x, pixel += g_.depth()) {
          const InputTile<Copied> tile = {
              pixel,
              {z * g_.stride[0] - g_.padding[0], y * g_.stride[1] - g_.padding[1], x * g_.stride[2] - g_.padding[2]},
              {g_.kernel[0], g_.kernel[1], g_.kernel[2]},
              to.c,
              {to.d[0], to.d[1], to.d[2]}};
          fill_tile(g_, input, call_.input_layout, is_last, g_.in_channels, tile);
        }
      }
    }
  }

  // The weight is read once, for all pixels. But if it stays in cache and the input does not, that is.
  template <class In>
  void multiply(const In* input, int64_t channel, int64_t channels, int64_t images) {
    constexpr int64_t kCache = 256 << 10, size = sizeof(T);
    const bool whole = call_.plan.in_place || call_.plan.copies_image;
    const int64_t pixel = whole ? divide_up(group_size(g_), g_.conv[0] * g_.conv[1] * g_.conv[2]) : g_.depth();
    const bool weight_stays = channels * g_.depth() * size <= kCache;
    for (int64_t b = 0; b < box_count_; ++b) {
      const DotBox& box = scratch_.boxes[b];
      const int64_t past = box.first + images * box.pixels;
      const int64_t some = weight_stays ? round_up(divide_up(kCache, pixel * size), kLanes<C>) : past;
      if (box_count_ > 1 || steps_.steps == nullptr) steps_ = steps_of(box);
      for (int64_t first = box.first; first < past; first += some) {
        multiply_some(input, channel, channels, first, smaller(first + some, past), past);
      }
    }
  }

  // Some outputs of pixels [first, last) of the box, which ends at `past`, before the next.
  template <class In>
  void multiply_some(const In* input, int64_t channel, int64_t channels, int64_t first, int64_t last, int64_t past) {
    C bias[kLanes<C>] = {};
    for (int64_t o = 0; o < channels && call_.bias; ++o) bias[o] = to_compute(call_.bias[channel + o]);
    const T* weight = call_.plan.turns_weight ? reinterpret_cast<const T*>(call_.packed) : call_.weight;
    for (int64_t o = 0; o < channels;) {
      with_constant<kDotOutputs>(static_cast<int>(smaller(channels - o, kDotOutputs)), [&](auto output_count) {
        constexpr int outputs = decltype(output_count)::value, together = kDotSums / outputs;
        const auto tile = [&](auto count, auto with_asking, int64_t p) {
          const DotPixel* const at = scratch_.pixels + p;
          const int64_t next = smaller(p + together, past - 1);
          dots_tile<decltype(count)::value, outputs, decltype(with_asking)::value != 0, E>(
              input, at, scratch_.pixels[next].input - at->input, weight + (channel + o) * weight_.n, weight_.n, steps_,
              bias + o, scratch_.conv + o);
        };
        int64_t p = first;
        const bool asks = asks_ahead_ && o == 0;
        for (; p + together <= last; p += together) {
          asks ? tile(Constant<together>{}, Constant<1>{}, p) : tile(Constant<together>{}, Constant<0>{}, p);
        }
        const auto some = [&](auto count) {
          constexpr int pixels = decltype(count)::value;
          if constexpr (pixels < together) {
            for (; p + pixels <= last; p += pixels) tile(count, Constant<0>{}, p);
          }
        };
        some(Constant<8>{});
        some(Constant<4>{});
        some(Constant<2>{});
        some(Constant<1>{});
        o += outputs;
      });
    }
  }

  template <bool with_winners>
  void pool(int64_t image, int64_t number, int64_t channel, int64_t channels) {
    const int64_t row_size = g_.conv[2] * kLanes<C>;
    const ConvRing<C> ring = {scratch_.conv + number * g_.conv[0] * g_.conv[1] * row_size, scratch_.tags, g_.conv[0],
                              g_.conv[1], row_size};
    for (int64_t z = 0; z < g_.output[0]; ++z) {
      for (int64_t y = 0; y < g_.output[1]; ++y) {
        const int64_t at = (z * g_.output[1] + y) * g_.output[2] * kLanes<C>;
        const int64_t count = ring.find_rows(g_, z, y, scratch_.window_rows, [](int64_t, int64_t, C*) {});
        pool_row<C, 1, with_winners>(g_, scratch_.window_rows, count, 0, 0, g_.output[2], scratch_.stage + at,
                                     scratch_.winner_stage + at);
      }
    }
    write_pixels(call_, image, channel, channels, 0, g_.pixels(), scratch_.stage, scratch_.winner_stage, kLanes<C>);
  }

  const ConvPoolForward<T>& call_;
  const ConvPoolGeometry& g_;
  const DotsScratch<T> scratch_;
  const ConvLayout input_, weight_;  // as they are read
  int64_t box_count_;
  DotSteps steps_ = {};  // of the box at hand
  bool asks_ahead_;
};

// The weight with channels last, where the plan has it turned.
template <class T>
void pack_dots(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item) {
  const ConvPoolGeometry& g = call.geometry;
  for (int64_t o = first_item; o < last_item; ++o) {
    transpose_matrix(call.weight + o * call.weight_layout.n, call.weight_layout.c, g.in_channels, g.taps(),
                     reinterpret_cast<T*>(call.packed) + o * g.depth(), g.in_channels);
  }
}

template <class T>
void forward_dots(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  const auto run = [&](auto&& worker) {
    for (int64_t item = first_item; item < last_item; ++item) worker.run(item);
  };
  if constexpr (kHasPairs<T>) {
    if (dots_in_pairs<T>()) return run(DotsForward<bfloat16x2, T>(call, scratch));
  }
  run(DotsForward<Compute<T>, T>(call, scratch));
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
