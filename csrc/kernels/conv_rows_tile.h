// The register tile of conv_rows.h: vectors of conv pixels by output channels.
#pragma once

#include "conv_rows_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// Vectors of pixels: their elements of a tile, or numbers of the input, `stride` apart, and where they go, from
// `pixels` on.
template <class S, int vectors>
struct RowVectors {
  const S* from[vectors];
  int64_t pixels[vectors];
  int64_t count;   // pixels of each vector
  int64_t second;  // from one of a pair's channels to the other, where these lie apart
};

// Whether elements E are put together from numbers S of two channels.
template <class E, class S>
constexpr bool kZipsChannels = kIsPair<E> && !kIsPair<S>;

// A vector's elements, from `at` on.
template <int stride, class E, class S, int vectors>
FASTNN_INLINE Vec<Compute<E>> load_pixels(const RowVectors<S, vectors>& row, const S* at) {
  const auto numbers = [&](const S* from) __attribute__((always_inline)) {
    if constexpr (stride == 1) {
      return load(from);
    } else {
      return load_strided_up_to<stride>(from, (row.count - 1) * stride + 1);
    }
  };
  if constexpr (kZipsChannels<E, S>) return zip_pairs(numbers(at), numbers(at + row.second));
  return numbers(at);
}

// The register tile: vectors of pixels of each of `outputs` channels. `asks`: for what lies ahead, the same channel's
// next pixels, or where the kernel strides, so that these lie elsewhere, the next channels' pixels.
template <class E, int outputs, int vectors, int stride, bool asks, class S, int most, class C = Compute<E>>
FASTNN_INLINE void rows_tile(const RowVectors<S, most>& row, const int64_t* offsets, int64_t depth, const E* weight,
                             const C* bias, C* to, int64_t to_step) {
  const S* from[vectors];
#pragma GCC unroll 16
  for (int v = 0; v < vectors; ++v) from[v] = row.from[v];
  Vec<C> total[outputs][vectors];
#pragma GCC unroll 16
  for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) total[o][v] = broadcast<C>(bias[o]);
  }
  OffsetsAhead ahead(offsets, depth);
  sum_in_parts(depth, total, [&](int64_t k) __attribute__((always_inline)) {
    const int64_t offset = ahead.take(k);
    if constexpr (asks) {
      constexpr int64_t kProductsAhead = 8;
      const int64_t next = stride == 1 ? offset + vectors * kLanes<C> : offsets[smaller(k + kProductsAhead, depth - 1)];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) {
        __builtin_prefetch(from[v] + next);
        if (kZipsChannels<E, S>) __builtin_prefetch(from[v] + row.second + next);
      }
    }
    if constexpr (outputs <= vectors) {
      Vec<C> factor[outputs];
#pragma GCC unroll 16
      for (int o = 0; o < outputs; ++o) factor[o] = broadcast_element(weight + o);
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) {
        Vec<C> value = load_pixels<stride, E>(row, from[v] + offset);
        if (outputs > 1) keep_in_register(value);  // or each output would load it again
#pragma GCC unroll 16
        for (int o = 0; o < outputs; ++o) total[o][v] = add_products<E>(value, factor[o], total[o][v]);
      }
    } else {
      Vec<C> value[vectors];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) value[v] = load_pixels<stride, E>(row, from[v] + offset);
#pragma GCC unroll 16
      for (int o = 0; o < outputs; ++o) {
        const Vec<C> factor = broadcast_element(weight + o);
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) total[o][v] = add_products<E>(value[v], factor, total[o][v]);
      }
    }
    weight += outputs;
  });
#pragma GCC unroll 16
  for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) store(to + o * to_step + row.pixels[v], total[o][v]);
  }
}

// The conv pixels of a slice, whose rows have `columns` and begin `row_step` elements apart. Where vectors may not read
// beyond the run, its last one ends with it, as a row's does.
template <class E, int outputs, int stride, bool asks, class S, class C = Compute<E>>
FASTNN_SHARED void rows_slice(const RowShape& s, int64_t columns, int64_t row_step, bool within_run, const S* tile,
                              const int64_t* offsets, int64_t depth, const E* weight, const C* bias, C* to,
                              int64_t to_step) {
  constexpr int most = stride == 1 ? row_vectors(outputs) : picked_vectors(outputs);
  const int64_t last = s.by_rows ? columns : within_run ? s.run : s.vectors * kLanes<C>;
  const int64_t in_row = s.by_rows ? divide_up(last, kLanes<C>) : s.vectors;
  const int64_t tiles = divide_up(s.vectors, most);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = s.vectors * t / tiles, count = s.vectors * (t + 1) / tiles - begin;
    RowVectors<S, most> vectors;
    vectors.second = s.channel / 2;
    vectors.count = smaller(last, kLanes<C>);
    for (int64_t v = 0; v < count; ++v) {
      const int64_t row = (begin + v) / in_row;
      const int64_t column = smaller((begin + v) % in_row * kLanes<C>, last - vectors.count);
      vectors.from[v] = tile + row * row_step + column * stride;
      vectors.pixels[v] = row * s.pitch + column;
    }
    with_constant<most>(static_cast<int>(count), [&](auto some) {
      rows_tile<E, outputs, decltype(some)::value, stride, asks>(vectors, offsets, depth, weight, bias, to, to_step);
    });
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
