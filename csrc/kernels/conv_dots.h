// Forward as dot products along the depth: for weights that serve too few pixels to be worth packing, and for few
// outputs of many channels. The input is read where it lies if it has long runs in common with the weight; else what is
// under each conv pixel is copied in the weight's order.
#pragma once

#include "conv_dots_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// x, negative where `negative` is -0 rather than 0.
template <class V>
FASTNN_INLINE V with_sign_of(V x, V negative) {
  typedef decltype(x < negative) Bits;
  return (V)((Bits)x | (Bits)negative);
}

// The register tile: dot products of `pixels` conv pixels by `outputs` weights -> to [pixel][lane]. `whole` steps are
// of whole vectors, the others of `rest` elements.
template <int pixels, int outputs, class E, class T, class C = Compute<T>>
FASTNN_INLINE void dots_tile(const E* input, const int64_t* offsets, const T* weight, int64_t output_step,
                             const DotStep* steps, int64_t whole, int64_t count, int rest, const C* bias, C* to) {
  const E* from[pixels];
  for (int p = 0; p < pixels; ++p) from[p] = input + offsets[p];
  // From -0, which adds nothing to -0: all that is missing in a vector is 0 by -0.
  Vec<C> total[pixels * outputs][1];
#pragma GCC unroll 16
  for (int i = 0; i < pixels * outputs; ++i) total[i][0] = -Vec<C>{};
  const auto add = [&](const Vec<C>(&value)[pixels], const Vec<C>(&factor)[outputs]) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
      for (int o = 0; o < outputs; ++o) {
        total[p * outputs + o][0] = multiply_add(value[p], factor[o], total[p * outputs + o][0]);
      }
    }
  };
  sum_in_parts(whole, total, [&](int64_t k) __attribute__((always_inline)) {
    Vec<C> value[pixels], factor[outputs];
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) value[p] = load(from[p] + steps[k].input);
#pragma GCC unroll 4
    for (int o = 0; o < outputs; ++o) factor[o] = load(weight + o * output_step + steps[k].weight);
    add(value, factor);
  });
  C lanes[kLanes<C>] = {};
  for (int i = rest; i < kLanes<C>; ++i) lanes[i] = -C(0);
  const Vec<C> missing = load(lanes);
  for (int64_t k = whole; k < count; ++k) {
    Vec<C> value[pixels], factor[outputs];
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) value[p] = load_partial<E>(from[p] + steps[k].input, rest);
#pragma GCC unroll 4
    for (int o = 0; o < outputs; ++o) {
      factor[o] = with_sign_of(load_partial<T>(weight + o * output_step + steps[k].weight, rest), missing);
    }
    add(value, factor);
  }
  constexpr int sum_count = pixels * outputs, together = kLanes<C>;
  C sums[sum_count + together];
#pragma GCC unroll 4
  for (int first = 0; first < sum_count; first += together) {
    Vec<C> rows[together] = {};
    constexpr int most = sum_count < together ? sum_count : together;
#pragma GCC unroll 16
    for (int i = 0; i < most; ++i) rows[i] = total[first + i][0];
    store(sums + first, sum_each<C>(rows));
  }
  for (int p = 0; p < pixels; ++p) {
    for (int o = 0; o < outputs; ++o) to[p * kLanes<C> + o] = sums[p * outputs + o] + bias[o];
  }
}

template <class T>
class DotsForward {
  using C = Compute<T>;

 public:
  DotsForward(const ConvPoolForward<T>& call, void* memory)
      : call_(call), g_(call.geometry), scratch_(call.geometry, call.plan, memory) {
    const bool in_place = call.plan.in_place;
    copy_is_last_ = dot_copy_is_last(g_, call.input_layout, call.weight_layout);
    copy_layout_ = dot_copy_layout(g_, copy_is_last_);
    const DotRuns runs = dot_runs(g_, in_place ? call.input_layout : copy_layout_, call.weight_layout);
    const int64_t vectors = runs.length / kLanes<C>;
    rest_ = static_cast<int>(runs.length % kLanes<C>);
    whole_ = runs.count * vectors;
    for (int64_t run = 0; run < runs.count; ++run) {
      DotStep at = {0, 0};
      for (int64_t i = 0, left = run; i < runs.outside; left /= runs.size[i++]) {
        at.input += left % runs.size[i] * runs.input[i];
        at.weight += left % runs.size[i] * runs.weight[i];
      }
      for (int64_t v = 0; v < vectors; ++v) {
        scratch_.steps[run * vectors + v] = {at.input + v * kLanes<C>, at.weight + v * kLanes<C>};
      }
      if (rest_ > 0) scratch_.steps[whole_ + run] = {at.input + vectors * kLanes<C>, at.weight + vectors * kLanes<C>};
    }
    const int64_t pixels = g_.conv[0] * g_.conv[1] * g_.conv[2];
    for (int64_t p = 0; p < scratch_.images * pixels && !in_place; ++p) scratch_.pixels[p] = p * g_.depth();
    int64_t* pixel = scratch_.pixels;
    for (int64_t image = 0; image < scratch_.images && in_place; ++image) {
      for (int64_t z = 0; z < g_.conv[0]; ++z) {
        for (int64_t y = 0; y < g_.conv[1]; ++y) {
          const int64_t row = image * call.input_layout.n + z * g_.stride[0] * call.input_layout.d[0] +
                              y * g_.stride[1] * call.input_layout.d[1];
          for (int64_t x = 0; x < g_.conv[2]; ++x) *pixel++ = row + x * g_.stride[2] * call.input_layout.d[2];
        }
      }
    }
    // All conv pixels are there when windows are looked for.
    for (int64_t i = 0; i < g_.conv[0] * g_.conv[1]; ++i) scratch_.tags[i] = i;
  }

  void run(int64_t item) {
    const int64_t blocks = divide_up(g_.out_channels, kLanes<C>), block_part = item % call_.plan.block_parts;
    item /= call_.plan.block_parts;
    const int64_t group = item % g_.groups, first_image = item / g_.groups * scratch_.images;
    const int64_t images = smaller(scratch_.images, g_.batch - first_image);
    const int64_t pixels = images * g_.conv[0] * g_.conv[1] * g_.conv[2];
    const T* input = call_.input + first_image * call_.input_layout.n + group * g_.in_channels * call_.input_layout.c;
    if (!call_.plan.in_place) copy_input(input, images);
    const int64_t last = blocks * (block_part + 1) / call_.plan.block_parts;
    for (int64_t b = blocks * block_part / call_.plan.block_parts; b < last; ++b) {
      const int64_t first = b * kLanes<C>, channels = smaller(kLanes<C>, g_.out_channels - first);
      const int64_t channel = group * g_.out_channels + first;
      if (call_.plan.in_place) {
        multiply(input, channel, channels, pixels);
      } else {
        multiply(scratch_.copy, channel, channels, pixels);
      }
      for (int64_t i = 0; i < images; ++i) {
        call_.winners ? pool<true>(first_image + i, i, channel, channels)
                      : pool<false>(first_image + i, i, channel, channels);
      }
    }
  }

 private:
  void copy_input(const T* input, int64_t images) {
    const ConvLayout& to = copy_layout_;
    C* pixel = scratch_.copy;
    for (int64_t i = 0; i < images; ++i) {
      for (int64_t z = 0; z < g_.conv[0]; ++z) {
        for (int64_t y = 0; y < g_.conv[1]; ++y) {
          for (int64_t x = 0; x < g_.conv[2]; ++x, pixel += g_.depth()) {
            const InputTile<C> tile = {
                pixel,
                {z * g_.stride[0] - g_.padding[0], y * g_.stride[1] - g_.padding[1], x * g_.stride[2] - g_.padding[2]},
                {g_.kernel[0], g_.kernel[1], g_.kernel[2]},
                to.c,
                {to.d[0], to.d[1], to.d[2]}};
            fill_tile(g_, input + i * call_.input_layout.n, call_.input_layout, copy_is_last_, g_.in_channels, tile);
          }
        }
      }
    }
  }

  // The weight is read once, for all pixels. But if it stays in cache and the input does not, that is.
  template <class E>
  void multiply(const E* input, int64_t channel, int64_t channels, int64_t pixels) {
    constexpr int64_t kCache = 256 << 10, size = sizeof(T);
    const int64_t image = g_.in_channels * g_.input[0] * g_.input[1] * g_.input[2];
    const int64_t pixel = call_.plan.in_place ? divide_up(image, g_.conv[0] * g_.conv[1] * g_.conv[2]) : g_.depth();
    const bool weight_stays = channels * g_.depth() * size <= kCache;
    const int64_t some = weight_stays ? round_up(divide_up(kCache, pixel * size), kLanes<C>) : pixels;
    for (int64_t first = 0; first < pixels; first += some) {
      multiply_some(input, channel, channels, first, smaller(first + some, pixels));
    }
  }

  // Some outputs of all these pixels before the next.
  template <class E>
  void multiply_some(const E* input, int64_t channel, int64_t channels, int64_t first, int64_t past) {
    C bias[kLanes<C>] = {};
    for (int64_t o = 0; o < channels && call_.bias; ++o) bias[o] = to_compute(call_.bias[channel + o]);
    for (int64_t o = 0; o < channels;) {
      const bool many = channels - o >= kDotOutputs;
      const int64_t together = many ? kDotPixels : kLanes<C>;
      for (int64_t p = first; p < past;) {
        const bool several = past - p >= together;
        const auto tile = [&](auto pixel_count, auto output_count) {
          dots_tile<decltype(pixel_count)::value, decltype(output_count)::value>(
              input, scratch_.pixels + p, call_.weight + (channel + o) * call_.weight_layout.n, call_.weight_layout.n,
              scratch_.steps, whole_, call_.plan.columns, rest_, bias + o, scratch_.conv + p * kLanes<C> + o);
        };
        if (several) {
          many ? tile(Constant<kDotPixels>{}, Constant<kDotOutputs>{}) : tile(Constant<kLanes<C>>{}, Constant<1>{});
        } else {
          many ? tile(Constant<1>{}, Constant<kDotOutputs>{}) : tile(Constant<1>{}, Constant<1>{});
        }
        p += several ? together : 1;
      }
      o += many ? kDotOutputs : 1;
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
  const DotsScratch<C> scratch_;
  bool copy_is_last_;
  ConvLayout copy_layout_;
  int64_t whole_;  // steps of whole vectors
  int rest_;       // elements of the others
};

template <class T>
void forward_dots(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  DotsForward<T> worker(call, scratch);
  for (int64_t item = first_item; item < last_item; ++item) worker.run(item);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
