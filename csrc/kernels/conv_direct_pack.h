// The weight of direct convolution, packed for its tiles, and of pairs for conv_rows.h too.
#pragma once

#include "conv_row_matrix.h"

namespace fastnn {
namespace FASTNN_ISA {

#if defined(__AVX512F__)
// The weights of `count` output channels -> to (depth, width), in pairs of input channels. `g` counts pairs, of which
// the last may have no channel.
inline void pack_pairs(const ConvPoolGeometry& g, TapOrder order, int64_t channels, const bfloat16* from,
                       const ConvLayout& layout, int64_t count, bfloat16x2* to, int64_t width) {
  constexpr int64_t some = 64, pitch = kBlockChannels<float>;  // channels or taps at a time; of a row
  float rows[2 * some * pitch] = {};
  const auto zip = [&](int64_t even, int64_t odd, int64_t c, int64_t tap) {
    bfloat16x2* target = to + tap_position(g, order, c, tap) * width;
    for (int64_t i = 0; i < width; i += kLanes<float>) {
      const Vec<float> pairs =
          zip_pairs(load(rows + even * pitch + i), odd < 0 ? Vec<float>{} : load(rows + odd * pitch + i));
      store_up_to<float>(reinterpret_cast<float*>(target + i), pairs, width - i);
    }
  };
  const int64_t taps = g.taps(), pairs = divide_up(channels, 2);
  for (int64_t tap = 0; tap < taps && pairs < g.in_channels; ++tap) {
    fill_zeros(to + tap_position(g, order, pairs, tap) * width, (g.in_channels - pairs) * width);
  }
  if (layout.c == 1) {  // runs of channels
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t first = 0; first < channels; first += some) {
        const int64_t here = smaller(some, channels - first);
        transpose_matrix(from + tap_offset(g, layout, tap) + first, layout.n, count, here, rows, pitch);
        for (int64_t c = 0; c < here; c += 2) zip(c, c + 1 < here ? c + 1 : -1, (first + c) / 2, tap);
      }
    }
    return;
  }
  const bool joined = layout.d[2] == 1 && layout.d[1] == g.kernel[2] && layout.d[0] == g.kernel[1] * g.kernel[2];
  if (joined && layout.c == taps && taps <= some) {  // runs of channels and taps
    const int64_t together = 2 * (some / taps);
    for (int64_t first = 0; first < channels; first += together) {
      const int64_t here = smaller(together, channels - first);
      transpose_matrix(from + first * taps, layout.n, count, here * taps, rows, pitch);
      for (int64_t c = 0; c < here; c += 2) {
        for (int64_t t = 0; t < taps; ++t) {
          zip(c * taps + t, c + 1 < here ? (c + 1) * taps + t : -1, (first + c) / 2, t);
        }
      }
    }
    return;
  }
  for (int64_t c = 0; c < pairs; ++c) {
    const int64_t single = smaller(2, channels - 2 * c);
    for (int64_t first = 0; first < taps; first += some) {
      const int64_t here = smaller(some, taps - first);
      for (int64_t i = 0; i < single; ++i) {
        const bfloat16* source = from + (2 * c + i) * layout.c;
        float* target = rows + i * some * pitch;
        if (joined) {
          transpose_matrix(source + first, layout.n, count, here, target, pitch);
          continue;
        }
        for (int64_t t = 0; t < here; ++t) {
          const bfloat16* element = source + tap_offset(g, layout, first + t);
          for (int64_t o = 0; o < count; ++o) target[t * pitch + o] = to_compute(element[o * layout.n]);
        }
      }
      for (int64_t t = 0; t < here; ++t) zip(t, single > 1 ? some + t : -1, c, first + t);
    }
  }
}

// The same in pairs along rows of the kernel, in each of which columns and channels are one run of so many pairs, of
// which the last may be zero.
inline void pack_row_pairs(const ConvPoolGeometry& g, int64_t pairs, const bfloat16* from, const ConvLayout& layout,
                           int64_t count, bfloat16x2* to, int64_t width) {
  float numbers[kMostRowRun * kBlockChannels<float>] = {};
  const int64_t run = row_run(g), rows = g.kernel[0] * g.kernel[1];
  const bool joined = layout.d[1] == g.kernel[2] * layout.d[2] && layout.d[0] == g.kernel[1] * layout.d[1];
  ConvPoolGeometry some = g;  // of the kernel's rows
  some.kernel[0] = 1;
  ConvLayout some_layout = layout;
  some_layout.d[1] = g.kernel[2] * layout.d[2];
  for (int64_t row = 0; row < rows; row += some.kernel[1]) {
    some.kernel[1] = joined ? smaller(kMostRowRun / run, rows - row) : 1;
    some_layout.d[0] = some.kernel[1] * some_layout.d[1];
    const bfloat16* first = from + row / g.kernel[1] * layout.d[0] + row % g.kernel[1] * layout.d[1];
    pack_taps(some, TapOrder::channels_last, first, some_layout, count, numbers, width);
    for (int64_t pair = 0; pair < some.kernel[1] * pairs; ++pair) {
      const int64_t i = 2 * (pair % pairs);
      const float* even = numbers + (pair / pairs * run + i) * width;
      for (int64_t o = 0; o < width; o += kLanes<float>, to += kLanes<float>) {
        store(to,
              zip_pairs(i < run ? load(even + o) : Vec<float>{}, i + 1 < run ? load(even + width + o) : Vec<float>{}));
      }
    }
  }
}
#endif

// The weights of `count` output channels -> to (depth, outputs, channels of an element), zeros where there is none. `g`
// counts elements, of which the last may lack some channels.
inline void pack_floats(const ConvPoolGeometry& g, TapOrder order, int64_t channels, const float* from,
                        const ConvLayout& layout, int64_t count, float* to) {
  constexpr int some = kChannels<FourFloats>;
  constexpr int64_t kRow = kSums<FourFloats> * kLanes<float>, kTaps = 64;  // numbers of a step; taps at a time
  const int64_t taps = g.taps();
  const auto copy_channels = [&](const float* source, int64_t c, float* target) __attribute__((always_inline)) {
    if (layout.c == 1 && channels - c >= some) {
      __builtin_memcpy(target, source, sizeof(FourFloats));
    } else {
      for (int64_t i = 0; i < some && i < channels - c; ++i) target[i] = source[i * layout.c];
    }
  };
  const bool joined = layout.d[2] == 1 && layout.d[1] == g.kernel[2] && layout.d[0] == g.kernel[1] * g.kernel[2];
  if (layout.c == 1 || taps == 1 || !joined) {
    if (count * some < kRow || channels % some != 0) fill_zeros(to, g.depth() * kRow);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const float* source = from + tap_offset(g, layout, tap);
      float* target = to + tap_position(g, order, 0, tap) * kRow;
      for (int64_t c = 0; c < channels; c += some, target += kRow) {
        for (int64_t o = 0; o < count; ++o) {
          copy_channels(source + o * layout.n + c * layout.c, c, target + o * some);
        }
      }
    }
    return;
  }
  FourFloats numbers[kRow / some][kTaps] = {};  // of an element's channels
  for (int64_t first = 0; first < taps; first += kTaps) {
    const int64_t here = smaller(kTaps, taps - first);
    int64_t places[kTaps];
    for (int64_t t = 0; t < here; ++t) places[t] = tap_position(g, order, 0, first + t) * kRow;
    for (int64_t c = 0; c < channels; c += some) {
      const int64_t left = smaller(some, channels - c);
      if (left < some) fill_zeros(numbers[0], count * kTaps);
      for (int64_t o = 0; o < count; ++o) {
        const float* source = from + o * layout.n + c * layout.c + first;
        transpose_matrix(source, layout.c, left, here, numbers[o]->channel, some);
      }
      for (int64_t t = 0; t < here; ++t) {
        float* target = to + places[t] + c / some * kRow;
        for (int64_t o = 0; o < kRow / some; ++o) {
          __builtin_memcpy(target + o * some, &numbers[o][t], sizeof(numbers[o][t]));
        }
      }
    }
  }
}

// weight -> [group][block of channels][depth][vectors x lanes], zeros where a block has fewer channels
template <class E, class T>
void pack_direct(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  const ConvPoolGeometry g = tile_geometry<E>(call.geometry);
  const ConvLayout& layout = call.weight_layout;
  const int64_t blocks = divide_up(g.out_channels, kBlockChannels<C>);
  const int64_t depth = product_depth<E>(g);
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t group = item / blocks, first = item % blocks * kBlockChannels<C>;
    const int64_t count = smaller(g.out_channels - first, kBlockChannels<C>);
    const int64_t width = round_up(count, kLanes<C>);
    const T* from = call.weight + (group * g.out_channels + first) * layout.n;
    Weight<E>* to =
        reinterpret_cast<Weight<E>*>(call.packed) + group * depth * packed_width<E>(g.out_channels) + first * depth;
    if constexpr (kIsOfFloats<E>) {
      pack_floats(g, call.plan.order, call.geometry.in_channels, from, layout, count, to);
      continue;
    }
    if (count < width) {
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t c = count; c < width; ++c) to[k * width + c] = {};
      }
    }
    if constexpr (kIsPair<E>) {
      pack_pairs(g, call.plan.order, call.geometry.in_channels, from, layout, count, to, width);
    } else if constexpr (kStartsPair<E>) {
      pack_row_pairs(g, divide_up(row_run(g), 2), from, layout, count, to, width);
    } else if constexpr (kIsOfMatrix<E>) {
      const MatrixShape shape(g, 1);
      const int64_t pairs = shape.blocks * shape.numbers / 2;
      if (shape.joins_columns) {
        pack_row_pairs(g, pairs, from, layout, count, to, width);
        continue;
      }
      ConvPoolGeometry in_pairs = g;
      in_pairs.in_channels = pairs;
      pack_pairs(in_pairs, TapOrder::channels_last, g.in_channels, from, layout, count, to, width);
    } else {
      pack_taps(g, call.plan.order, from, layout, count, to, width);
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
