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

// The register tile: dot products of `pixels` conv pixels by `outputs` weights -> to [pixel][lane], by vectors of
// elements E. `whole` steps are of whole vectors, the others of `rest` numbers.
template <int pixels, int outputs, class E, class In, class T, class C = Compute<T>>
FASTNN_INLINE void dots_tile(const In* input, const int64_t* offsets, const T* weight, int64_t output_step,
                             const DotStep* steps, int64_t whole, int64_t count, int rest, const C* bias, C* to) {
  const In* from[pixels];
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
        total[p * outputs + o][0] = add_products<E>(value[p], factor[o], total[p * outputs + o][0]);
      }
    }
  };
  sum_in_parts(whole, total, [&](int64_t k) __attribute__((always_inline)) {
    Vec<C> value[pixels], factor[outputs];
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) value[p] = load_numbers<E>(from[p] + steps[k].input);
#pragma GCC unroll 4
    for (int o = 0; o < outputs; ++o) factor[o] = load_numbers<E>(weight + o * output_step + steps[k].weight);
    add(value, factor);
  });
  const Vec<C> missing = negative_zeros_beyond<E>(rest);
  for (int64_t k = whole; k < count; ++k) {
    Vec<C> value[pixels], factor[outputs];
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) value[p] = load_numbers<E>(from[p] + steps[k].input, rest);
#pragma GCC unroll 4
    for (int o = 0; o < outputs; ++o) {
      factor[o] = with_sign_of(load_numbers<E>(weight + o * output_step + steps[k].weight, rest), missing);
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
    set_steps(dot_runs(g_, input_, weight_));
    const int64_t pixels = g_.conv[0] * g_.conv[1] * g_.conv[2];
    const bool by_pixel = !call.plan.in_place && !call.plan.copies_image;
    for (int64_t p = 0; p < scratch_.images * pixels && by_pixel; ++p) scratch_.pixels[p] = p * g_.depth();
    int64_t* pixel = scratch_.pixels;
    for (int64_t image = 0; image < scratch_.images && !by_pixel; ++image) {
      for (int64_t z = 0; z < g_.conv[0]; ++z) {
        for (int64_t y = 0; y < g_.conv[1]; ++y) {
          const int64_t row = image * input_.n + z * g_.stride[0] * input_.d[0] + y * g_.stride[1] * input_.d[1];
          for (int64_t x = 0; x < g_.conv[2]; ++x) *pixel++ = row + x * g_.stride[2] * input_.d[2];
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
    for (int64_t i = 0; i < images && !call_.plan.in_place; ++i) copy_input(input + i * call_.input_layout.n, i);
    const int64_t last = blocks * (block_part + 1) / call_.plan.block_parts;
    for (int64_t b = blocks * block_part / call_.plan.block_parts; b < last; ++b) {
      const int64_t first = b * kLanes<C>, channels = smaller(kLanes<C>, g_.out_channels - first);
      const int64_t channel = group * g_.out_channels + first;
      if (call_.plan.in_place) {
        multiply(input, channel, channels, pixels);
      } else {
        multiply(copy(), channel, channels, pixels);
      }
      for (int64_t i = 0; i < images; ++i) {
        call_.winners ? pool<true>(first_image + i, i, channel, channels)
                      : pool<false>(first_image + i, i, channel, channels);
      }
    }
  }

 private:
  Copied* copy() const { return reinterpret_cast<Copied*>(scratch_.copy); }

  void set_steps(const DotRuns& runs) {
    const int64_t vectors = runs.length / kNumbers<E>;
    rest_ = static_cast<int>(runs.length % kNumbers<E>);
    whole_ = runs.count * vectors;
    for (int64_t run = 0; run < runs.count; ++run) {
      DotStep at = {0, 0};
      for (int64_t i = 0, left = run; i < runs.outside; left /= runs.size[i++]) {
        at.input += left % runs.size[i] * runs.input[i];
        at.weight += left % runs.size[i] * runs.weight[i];
      }
      for (int64_t v = 0; v < vectors; ++v) {
        scratch_.steps[run * vectors + v] = {at.input + v * kNumbers<E>, at.weight + v * kNumbers<E>};
      }
      const int64_t last = vectors * kNumbers<E>;
      if (rest_ > 0) scratch_.steps[whole_ + run] = {at.input + last, at.weight + last};
    }
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
  void multiply(const In* input, int64_t channel, int64_t channels, int64_t pixels) {
    constexpr int64_t kCache = 256 << 10, size = sizeof(T);
    const int64_t image = g_.in_channels * g_.input[0] * g_.input[1] * g_.input[2];
    const bool whole = call_.plan.in_place || call_.plan.copies_image;
    const int64_t pixel = whole ? divide_up(image, g_.conv[0] * g_.conv[1] * g_.conv[2]) : g_.depth();
    const bool weight_stays = channels * g_.depth() * size <= kCache;
    const int64_t some = weight_stays ? round_up(divide_up(kCache, pixel * size), kLanes<C>) : pixels;
    for (int64_t first = 0; first < pixels; first += some) {
      multiply_some(input, channel, channels, first, smaller(first + some, pixels));
    }
  }

  // Some outputs of all these pixels before the next.
  template <class In>
  void multiply_some(const In* input, int64_t channel, int64_t channels, int64_t first, int64_t past) {
    C bias[kLanes<C>] = {};
    for (int64_t o = 0; o < channels && call_.bias; ++o) bias[o] = to_compute(call_.bias[channel + o]);
    const T* weight = call_.plan.turns_weight ? reinterpret_cast<const T*>(call_.packed) : call_.weight;
    for (int64_t o = 0; o < channels;) {
      const int64_t left = channels - o;
      const auto tiles = [&](auto pixel_count, auto output_count) {
        constexpr int together = decltype(pixel_count)::value, outputs = decltype(output_count)::value;
        const auto tile = [&](auto count, int64_t p) {
          dots_tile<decltype(count)::value, outputs, E>(input, scratch_.pixels + p, weight + (channel + o) * weight_.n,
                                                        weight_.n, scratch_.steps, whole_, call_.plan.columns, rest_,
                                                        bias + o, scratch_.conv + p * kLanes<C> + o);
        };
        int64_t p = first;
        for (; p + together <= past; p += together) tile(Constant<together>{}, p);
        for (; p < past; ++p) tile(Constant<1>{}, p);
        o += outputs;
      };
      if (left >= kDotOutputs) {
        tiles(Constant<kDotPixels>{}, Constant<kDotOutputs>{});
      } else {
        tiles(Constant<kLanes<C>>{}, Constant<1>{});
      }
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
  int64_t whole_;                    // steps of whole vectors
  int rest_;                         // numbers of the others
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
