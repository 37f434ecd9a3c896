// A row of conv pixels by Winograd's F(2, r) along the row, for each phase of the stride.
//
// A kernel that strides by s along the row is s kernels of every s-th column, each of which slides by one over every
// s-th column of the input. One of r columns makes two neighbouring pixels from r + 1 products a row of the kernel and
// channel in place of 2 r: 7 columns with stride 2 take 9 in place of 14, 3 columns 4 in place of 6. The products at a
// point are summed up over channels, rows of the kernel and phases alike, in the register tile of direct convolution.
// The input is transformed once and read by all rows of the kernel and all output channels. Error stays at direct
// convolution's; NaN, infinity and huge values would spread, so they are for direct convolution.
#pragma once

#include "conv_tile.h"
#include "conv_winograd_transforms.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int64_t kMostPhases = 4;

// The columns of the kernel that belong to a phase.
FASTNN_INLINE int64_t phase_taps(const ConvPoolGeometry& g, int64_t phase) {
  return divide_up(g.kernel[2] - phase, g.stride[2]);
}

// How products along a row are counted and laid out, for rows of `columns` conv pixels.
template <class C>
struct PhaseShape {
  int64_t phases, positions;             // products of a pair of pixels, of all phases, point by point
  int64_t first[kMostWinogradTaps + 2];  // position of each point; a point's phases are the first ones
  int64_t depth;         // sums of so many products each, but for phases: channels and rows of the kernel
  int64_t pairs, pitch;  // of pixels in a row; elements from a position's row of pairs to the next
  int64_t places;        // columns under a pair, from one pair's first to the next's

  PhaseShape(const ConvPoolGeometry& g, int64_t columns)
      : phases(smaller(g.stride[2], g.kernel[2])),
        positions(g.kernel[2] + phases),
        first{},
        depth(g.in_channels * g.kernel[0] * g.kernel[1]),
        pairs(divide_up(columns, 2)),
        pitch(round_up(pairs, kLanes<C>)),
        places(2 * g.stride[2]) {
    for (int point = 0; point <= kMostWinogradTaps; ++point) {
      first[point + 1] = first[point];
      for (int64_t phase = 0; phase < phases; ++phase) first[point + 1] += phase_taps(g, phase) >= point;
    }
  }

  // Of a row of input columns that are `places` apart: the last pair reaches over its own.
  int64_t column_run() const { return pitch + kLanes<C>; }
};

FASTNN_INLINE bool phases_apply(const ConvPoolGeometry& g) {
  const int64_t taps = phase_taps(g, 0);
  return g.dilation[2] == 1 && g.stride[2] <= kMostPhases && taps > 1 && taps <= kMostWinogradTaps;
}

// The columns of a row of the kernel, [column][output channel] -> its part of [position][depth][output channel]
template <class C>
void pack_phase_row(const ConvPoolGeometry& g, const PhaseShape<C>& s, const C* columns, int64_t width, C* to) {
  const int64_t step = s.depth * width;
  for (int64_t phase = 0; phase < s.phases; ++phase) {
    with_constant<kMostWinogradTaps>(static_cast<int>(phase_taps(g, phase)), [&](auto taps_constant) {
      constexpr int taps = decltype(taps_constant)::value;
      for (int64_t o = 0; o < width; o += kLanes<C>) {
        Vec<C> column[taps], result[taps + 1];
        for (int i = 0; i < taps; ++i) {
          column[i] = load(columns + (phase + i * g.stride[2]) * kBlockChannels<C> + o);
        }
        transform_weight(column, result);
        for (int i = 0; i <= taps; ++i) store(to + (s.first[i] + phase) * step + o, result[i]);
      }
    });
  }
}

// weight -> [group][block of channels][position][depth][vectors x lanes]
template <class T>
void pack_phases(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.weight_layout;
  const PhaseShape<C> s(g, 1);
  const int64_t blocks = divide_up(g.out_channels, kBlockChannels<C>);
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t group = item / blocks, first = item % blocks * kBlockChannels<C>;
    const int64_t count = smaller(g.out_channels - first, kBlockChannels<C>), width = round_up(count, kLanes<C>);
    C* const packed = call.packed + s.positions * s.depth * (group * round_up(g.out_channels, kLanes<C>) + first);
    // [column of the kernel, of some rows][output channel]
    constexpr int64_t some = 64;
    static_assert(some >= kMostPhases * kMostWinogradTaps);
    C columns[some * kBlockChannels<C>] = {};
    const bool joined = layout.d[2] == 1 && (g.kernel[1] == 1 || layout.d[1] == g.kernel[2]) &&
                        (g.kernel[0] == 1 || layout.d[0] == g.kernel[1] * g.kernel[2]) &&
                        (g.in_channels == 1 || layout.c == g.taps());
    const int64_t rows_together = joined ? some / g.kernel[2] : 1;
    for (int64_t k = 0; k < s.depth; ++k) {
      const int64_t h = k % g.kernel[1], d = k / g.kernel[1] % g.kernel[0], c = k / (g.kernel[1] * g.kernel[0]);
      if (k % rows_together == 0) {
        const int64_t rows = smaller(rows_together, s.depth - k);
        const T* from = call.weight + (group * g.out_channels + first) * layout.n + c * layout.c + d * layout.d[0] +
                        h * layout.d[1];
        for (int64_t w = 0; w < (joined ? 1 : g.kernel[2]); ++w) {
          transpose_matrix(from + w * layout.d[2], layout.n, count, joined ? rows * g.kernel[2] : 1,
                           columns + w * kBlockChannels<C>, kBlockChannels<C>);
        }
      }
      const C* row = columns + k % rows_together * g.kernel[2] * kBlockChannels<C>;
      pack_phase_row(g, s, row, width, packed + k * width);
    }
  }
}

// Columns of an input row from `first` on, `places` runs of those that are so many apart, one after another; zeros
// where the row has none, or for null.
template <class T, class C = Compute<T>>
void part_row(const ConvPoolGeometry& g, const PhaseShape<C>& s, const T* row, int64_t step, int64_t first, C* to) {
  const int64_t run = s.column_run();
  fill_zeros(to, s.places * run);
  if (row == nullptr) return;
  for (int64_t place = 0; place < s.places; ++place, to += run) {
    const int64_t column = first + place, room = g.input[2] - column;
    const int64_t left = smaller(run, column < 0 ? divide_up(-column, s.places) : 0);
    const int64_t right = room <= 0 ? left : larger(left, smaller(run, divide_up(room, s.places)));
    if (left < right) copy_run(row + (column + left * s.places) * step, s.places * step, right - left, to + left);
  }
}

// Such a parted row -> [position][pair]
template <class C>
void transform_row(const ConvPoolGeometry& g, const PhaseShape<C>& s, const C* parted, C* to) {
  for (int64_t phase = 0; phase < s.phases; ++phase) {
    with_constant<kMostWinogradTaps>(static_cast<int>(phase_taps(g, phase)), [&](auto taps_constant) {
      constexpr int taps = decltype(taps_constant)::value;
      const C* from[taps + 1];
      for (int i = 0; i <= taps; ++i) {
        const int64_t column = phase + i * g.stride[2];
        from[i] = parted + column % s.places * s.column_run() + column / s.places;
      }
      for (int64_t pair = 0; pair < s.pitch; pair += kLanes<C>) {
        Vec<C> pixels[taps + 1], result[taps + 1];
        for (int i = 0; i <= taps; ++i) pixels[i] = load(from[i] + pair);
        transform_input(pixels, result);
        for (int i = 0; i <= taps; ++i) store(to + (s.first[i] + phase) * s.pitch + pair, result[i]);
      }
    });
  }
}

// The pairs of a conv row -> to (2 x pairs, vectors x lanes)
template <int vectors, class C>
FASTNN_SHARED void conv_row_phases(const PhaseShape<C>& s, const C* tile, const int64_t* offsets, const C* weight,
                                   const Vec<C> (&bias)[vectors], C* to) {
  constexpr int64_t width = vectors * kLanes<C>;
  const Vec<C> zero[vectors] = {};
  for (int point = 0; point <= kMostWinogradTaps; ++point) {
    const int64_t k = s.first[point] * s.depth, depth = s.first[point + 1] * s.depth - k;
    if (depth == 0) return;
    const bool starts = point < 2;  // the only ones of one result each
    const auto add = [&](int64_t first, const auto& total) __attribute__((always_inline)) {
      for (int which = 0; which < 2; ++which) {
        const C share = kWinogradResults[point][which];
        if (share == 0) continue;
        C* at = to + (2 * first + which) * width;
#pragma GCC unroll 16
        for (const auto& pair : total) {
          for (int v = 0; v < vectors; ++v) {
            C* result = at + v * kLanes<C>;
            store(result, starts ? pair[v] : multiply_add(pair[v], broadcast<C>(share), load(result)));
          }
          at += 2 * width;
        }
      }
    };
    conv_groups<1, vectors, kLongestSum>(tile, 1, offsets + k, depth, weight + k * width, starts ? bias : zero, s.pairs,
                                         add);
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
