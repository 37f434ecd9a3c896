// A row of conv pixels by Winograd's F(2, r) along the row, for each phase of the stride.
//
// A kernel that strides by s along the row is s kernels of every s-th column, each of which slides by one over every
// s-th column of the input; a long one is several in a row. Each such piece of r columns makes two neighbouring pixels
// from r + 1 products a row of the kernel and channel in place of 2 r: 7 columns with stride 2 take 9 in place of 14, 5
// with stride 1 take 7 in place of 10. The products at a point are summed up over channels, rows of the kernel and
// pieces alike, in the register tile of direct convolution. The input is transformed once and read by all rows of the
// kernel and all output channels. Error stays at direct convolution's; NaN, infinity and huge values would spread, so
// they are for direct convolution.
#pragma once

#include "conv_tile.h"
#include "conv_winograd_transforms.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int64_t kMostPhases = 4, kMostPieces = 8;

// Columns of the kernel, a stride apart.
struct KernelPiece {
  int64_t first, taps;
  int64_t position[kMostWinogradTaps + 1];  // of its product at each point
  int64_t pixels[kMostWinogradTaps + 1];    // in a parted row: those that its columns meet, and their neighbours
};

// How products along a row are counted and laid out, for rows of `columns` conv pixels.
template <class C>
struct PhaseShape {
  int64_t pieces;
  KernelPiece piece[kMostPieces];
  int64_t positions;                     // products of a pair of pixels, of all pieces, point after point
  int64_t first[kMostWinogradTaps + 2];  // position of each point
  int64_t depth;                         // sums of so many products each, of a piece: channels and rows of the kernel
  int64_t pairs, pitch;                  // of pixels in a row; elements from a position's row of pairs to the next
  int64_t places;                        // columns under a pair, from one pair's first to the next's
  int64_t column_run;  // of a row of columns that are so many apart: the last pair reaches over its own

  PhaseShape(const ConvPoolGeometry& g, int64_t columns)
      : pieces(0),
        piece{},
        positions(0),
        first{},
        depth(g.in_channels * g.kernel[0] * g.kernel[1]),
        pairs(divide_up(columns, 2)),
        pitch(round_up(pairs, kLanes<C>)),
        places(2 * g.stride[2]),
        column_run(pitch + round_up(g.kernel[2] / places + 1, kLanes<C>)) {
    for (int64_t phase = 0; phase < smaller(g.stride[2], g.kernel[2]); ++phase) {
      const int64_t taps = divide_up(g.kernel[2] - phase, g.stride[2]), parts = divide_up(taps, kMostWinogradTaps);
      for (int64_t part = 0; part < parts && pieces < kMostPieces; ++part) {
        const int64_t begin = taps * part / parts, end = taps * (part + 1) / parts;
        KernelPiece& next = piece[pieces++];
        next = {phase + begin * g.stride[2], end - begin, {}, {}};
        for (int64_t i = 0; i <= next.taps; ++i) {
          const int64_t column = next.first + i * g.stride[2];
          next.pixels[i] = column % places * column_run + column / places;
        }
      }
    }
    for (int point = 0; point <= kMostWinogradTaps; ++point) {
      for (int64_t p = 0; p < pieces; ++p) {
        if (point <= piece[p].taps) piece[p].position[point] = positions++;
      }
      first[point + 1] = positions;
    }
  }
};

FASTNN_INLINE bool phases_apply(const ConvPoolGeometry& g) {
  return g.dilation[2] == 1 && g.stride[2] <= kMostPhases && g.kernel[2] > g.stride[2] &&
         g.kernel[2] <= kMostPieces / g.stride[2] * g.stride[2] * kMostWinogradTaps;
}

// The columns of a row of the kernel, [column][output channel] -> its part of [position][depth][output channel]
template <class C>
void pack_phase_row(const ConvPoolGeometry& g, const PhaseShape<C>& s, const C* columns, int64_t width, C* to) {
  for (int64_t p = 0; p < s.pieces; ++p) {
    const KernelPiece& piece = s.piece[p];
    with_constant<kMostWinogradTaps>(static_cast<int>(piece.taps), [&](auto taps_constant) {
      constexpr int taps = decltype(taps_constant)::value;
      for (int64_t o = 0; o < width; o += kLanes<C>) {
        Vec<C> column[taps], result[taps + 1];
        for (int i = 0; i < taps; ++i) {
          column[i] = load(columns + (piece.first + i * g.stride[2]) * kBlockChannels<C> + o);
        }
        transform_weight(column, result);
        for (int i = 0; i <= taps; ++i) store(to + piece.position[i] * s.depth * width + o, result[i]);
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
    static_assert(some >= kMostPieces * kMostWinogradTaps);
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

// The columns of input rows from one on, as `places` runs of those that are so many apart, one after another.
template <class C>
struct PartedRow {
  C* data;
  int64_t places;
  struct {
    int64_t column, to, count;  // inside the input
  } run[2 * kMostPhases];

  PartedRow(const ConvPoolGeometry& g, const PhaseShape<C>& s, int64_t first, C* memory)
      : data(memory), places(s.places), run{} {
    const int64_t length = s.column_run;
    for (int64_t place = 0; place < places; ++place) {
      const int64_t column = first + place, room = g.input[2] - column;
      const int64_t left = smaller(length, column < 0 ? divide_up(-column, places) : 0);
      const int64_t right = room <= 0 ? left : larger(left, smaller(length, divide_up(room, places)));
      run[place] = {column + left * places, place * length + left, right - left};
    }
    fill_zeros(data, places * length);
  }

  // The next row, `step` from one column to the next. Beside what is inside the input there are zeros.
  template <class T>
  void take(const T* row, int64_t step) const {
    for (int64_t place = 0; place < places; ++place) {
      const auto& r = run[place];
      if (r.count > 0) copy_run(row + r.column * step, places * step, r.count, data + r.to);
    }
  }
};

// Such a parted row -> [position][pair], `step` from one position to the next
template <class C>
void transform_row(const PhaseShape<C>& s, const C* parted, C* to, int64_t step) {
  for (int64_t p = 0; p < s.pieces; ++p) {
    const KernelPiece& piece = s.piece[p];
    with_constant<kMostWinogradTaps>(static_cast<int>(piece.taps), [&](auto taps_constant) {
      constexpr int taps = decltype(taps_constant)::value;
      for (int64_t pair = 0; pair < s.pitch; pair += kLanes<C>) {
        Vec<C> pixels[taps + 1], result[taps + 1];
        for (int i = 0; i <= taps; ++i) pixels[i] = load(parted + piece.pixels[i] + pair);
        transform_input(pixels, result);
        for (int i = 0; i <= taps; ++i) store(to + piece.position[i] * step + pair, result[i]);
      }
    });
  }
}

// A tile's rows, transformed, each position `step` from the one before. `from` is the group's channel, slice, row and
// column 0; `memory` is for a row of the input.
template <class T, class C>
void fill_phases(const ConvPoolGeometry& g, const PhaseShape<C>& s, const T* from, const ConvLayout& layout,
                 const InputTile<C>& tile, int64_t step, C* memory) {
  const PartedRow<C> parted(g, s, tile.first[2], memory);
  for (int64_t c = 0; c < g.in_channels; ++c) {
    for (int64_t d = 0; d < tile.size[0]; ++d) {
      for (int64_t h = 0; h < tile.size[1]; ++h) {
        const int64_t z = tile.first[0] + d, y = tile.first[1] + h;
        C* to = tile.data + c * tile.c + d * tile.d[0] + h * tile.d[1];
        if (z < 0 || z >= g.input[0] || y < 0 || y >= g.input[1]) {
          for (int64_t p = 0; p < s.positions; ++p) fill_zeros(to + p * step, s.pitch);
          continue;
        }
        parted.take(from + c * layout.c + z * layout.d[0] + y * layout.d[1], layout.d[2]);
        transform_row(s, parted.data, to, step);
      }
    }
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
#pragma GCC unroll 28
        for (const auto& pair : total) {
          for (int v = 0; v < vectors; ++v) {
            C* result = at + v * kLanes<C>;
            store(result, starts ? pair[v] : multiply_add(pair[v], broadcast<C>(share), load(result)));
          }
          at += 2 * width;
        }
      }
    };
    conv_groups<1, vectors>(tile, 1, NothingAhead{}, offsets + k, depth, weight + k * width, starts ? bias : zero,
                            s.pairs, add);
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
