// Packing of the weight: for each product of the depth, output channels lie side by side.
#pragma once

#include "copy.h"
#include "tile.h"

namespace fastnn {
namespace FASTNN_ISA {

// The weight is dense: [output][channel][kernel position], or channels last.
template <class T>
FASTNN_INLINE bool weight_is_channels_last(const ConvCall<T>& call) {
  const int64_t channels = call.turned ? call.geometry.out_channels : call.geometry.in_channels;
  return channels > 1 && call.weight_layout.c == 1 && call.weight_layout.d[2] != 1;
}

// Calls body(k, channel, slice, row, column of the kernel) in the order of the weight in memory, for `channels`
// channels (pairs of channels count as one).
template <class Body>
FASTNN_INLINE void for_each_tap(const ConvPoolGeometry& g, int64_t channels, bool channels_last, const Body& body) {
  int64_t k = 0;
  for (int64_t outer = 0; outer < (channels_last ? 1 : channels); ++outer) {
    for (int64_t d = 0; d < g.kernel[0]; ++d) {
      for (int64_t h = 0; h < g.kernel[1]; ++h) {
        for (int64_t w = 0; w < g.kernel[2]; ++w) {
          for (int64_t inner = 0; inner < (channels_last ? channels : 1); ++inner) body(k++, outer + inner, d, h, w);
        }
      }
    }
  }
}

// Packs outputs [output, output + count) as [depth][width], in the weight's own order, with zeros behind the first
// `count` elements of a row.
template <class T>
void pack_outputs(const ConvCall<T>& call, int64_t output, int64_t count, Compute<T>* to, int64_t width) {
  const int64_t depth = call.geometry.depth();
  if (count < width) fill_zeros(to, depth * width);
  transpose_matrix(call.weight + output * call.weight_layout.n, call.weight_layout.n, count, depth, to, width);
}

// The same of a weight in which the kernel's positions lie side by side. In the result, channels do.
template <class T>
void pack_channels_together(const ConvCall<T>& call, int64_t output, int64_t count, Compute<T>* to, int64_t width) {
  using C = Compute<T>;
  constexpr int64_t some = 128;  // products at a time
  alignas(64) C rows[some * kBlockVectors * kLanes<C>] = {};
  const ConvPoolGeometry& g = call.geometry;
  const int64_t depth = g.depth(), taps = g.taps();
  int64_t channel = 0, tap = 0;
  for (int64_t first = 0; first < depth; first += some) {
    const int64_t here = smaller(some, depth - first);
    transpose_matrix(call.weight + output * call.weight_layout.n + first, call.weight_layout.n, count, here, rows,
                     width);
    for (int64_t i = 0; i < here; ++i) {
      C* const row = to + (tap * g.in_channels + channel) * width;
      for (int64_t o = 0; o < width; o += kLanes<C>) store(row + o, load(rows + i * width + o));
      if (++tap == taps) {
        tap = 0;
        ++channel;
      }
    }
  }
}

// The same in `pairs` pairs of numbers; numbers 2 i and 2 i + 1 are a pair. source(n) is the offset of number n in an
// output's weight, or -1 for a zero.
template <class T, class Source>
void pack_pairs(const ConvCall<T>& call, int64_t output, int64_t count, int64_t pairs, const Source& source,
                bfloat16x2* to, int64_t width) {
  constexpr int64_t some = 256, most = kBlockVectors * kLanes<float>;  // pairs at a time, and outputs
  alignas(64) bfloat16x2 rows[most * some];
  int64_t places[2 * some];
  const T* from = call.weight + output * call.weight_layout.n;
  if (count < width) fill_zeros(to, pairs * width);
  for (int64_t first = 0; first < pairs; first += some) {
    const int64_t here = smaller(some, pairs - first);
    for (int64_t n = 0; n < 2 * here; ++n) places[n] = source(2 * first + n);
    for (int64_t o = 0; o < count; ++o) {
      T* row = reinterpret_cast<T*>(rows + o * some);
      const T* weight = from + o * call.weight_layout.n;
      for (int64_t n = 0; n < 2 * here; ++n) row[n] = places[n] < 0 ? T{} : weight[places[n]];
    }
    transpose_matrix(reinterpret_cast<const float*>(rows), some, count, here,
                     reinterpret_cast<float*>(to + first * width), width);
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
