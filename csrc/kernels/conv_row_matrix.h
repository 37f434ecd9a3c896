// Rows of conv pixels by a matrix unit (simd/matrix.h): bfloat16 in channels last.
//
// Numbers that lie side by side under a conv pixel and in the weight are a run: those of a row of the kernel, or of
// each of its columns. A run is cut into equal blocks, and a block of 16 neighbouring pixels is a left operand as it
// lies in the tile of the input. The last block may end beyond the run, by weights of zero, so that all numbers then
// have to be finite. Sums are float32's; as in PyTorch's own kernels, denormals count as zero.
#pragma once

#include "../simd/matrix.h"
#include "conv_tile.h"

namespace fastnn {
namespace FASTNN_ISA {

// How products are cut up, for rows of `columns` conv pixels.
struct MatrixShape {
  bool joins_columns;  // a run is a row of the kernel
  int64_t runs, run;   // numbers
  int64_t blocks;      // of a run
  int64_t numbers;     // of a block, even
  int64_t pixels;      // of a tile

  MatrixShape(const ConvPoolGeometry& g, int64_t columns) {
    const int64_t row = row_run(g), row_blocks = divide_up(row, kMatrixNumbers);
    joins_columns = has_row_runs(g) && row_blocks < g.kernel[2] * divide_up(g.in_channels, kMatrixNumbers);
    run = joins_columns ? row : g.in_channels;
    runs = g.depth() / run;
    blocks = divide_up(run, kMatrixNumbers);
    numbers = 2 * divide_up(run, 2 * blocks);
    pixels = divide_up(columns, divide_up(columns, kMatrixRows));
  }

  int64_t depth() const { return runs * blocks; }  // in blocks
  int64_t beyond() const { return blocks * numbers - run; }
};

// In pairs.
template <>
FASTNN_INLINE int64_t product_depth<MatrixNumber>(const ConvPoolGeometry& g) {
  const MatrixShape s(g, 1);
  return s.depth() * s.numbers / 2;
}

// Whether an input of bfloat16 can be read where it lies.
FASTNN_INLINE bool matrix_stays_in_place(const ConvPoolGeometry& g, const ConvLayout& input) {
  const MatrixShape s(g, 1);
  const bool padded = g.padding[0] > 0 || g.padding[1] > 0 || g.padding[2] > 0;
  return !padded && input.c == 1 && s.beyond() == 0 && (!s.joins_columns || input.d[2] == g.in_channels);
}

// Rows of `count` conv pixels each, `step` elements of the tile apart; of a row a tile of pixels is written at least.
template <int vectors>
FASTNN_SHARED void conv_rows_matrix(const MatrixShape& s, const RowToMake<MatrixNumber>* rows, int64_t row_count,
                                    int64_t step, const int64_t* offsets, const bfloat16x2* weight,
                                    const Vec<float> (&bias)[vectors], int64_t count);

#if defined(__AVX512F__)
// Tiles of pixels that are worked on together and share the loads of the weight.
template <int vectors>
constexpr int kMatrixTiles = 4 / vectors;

// The register tile: `tiles` tiles of conv pixels by `vectors` vectors of output channels.
template <int tiles, int vectors>
FASTNN_INLINE void matrix_tile(const MatrixShape& s, const MatrixNumber* const (&from)[tiles], int64_t step,
                               const int64_t* offsets, const bfloat16x2* weight, const float* bias,
                               float* const (&to)[tiles]) {
  constexpr int64_t pixel = vectors * kMatrixRows * sizeof(float);  // bytes of one, and of a pair of numbers' weight
  const auto for_each_sum = [](const auto& body) __attribute__((always_inline)) {
    body(Constant<0>{}, Constant<0>{});
    if constexpr (vectors > 1) body(Constant<0>{}, Constant<1>{});
    if constexpr (tiles > 1) body(Constant<1>{}, Constant<0>{});
    if constexpr (tiles > 1 && vectors > 1) body(Constant<1>{}, Constant<1>{});
    if constexpr (tiles > 2) body(Constant<2>{}, Constant<0>{});
    if constexpr (tiles > 3) body(Constant<3>{}, Constant<0>{});
  };
  static_assert(tiles * vectors <= 4, "there are four tiles of sums");
  for_each_sum([&](auto t, auto v) __attribute__((always_inline)) {
    load_tile<t.value * vectors + v.value>(bias + v.value * kMatrixRows, 0);
  });
  for (int64_t k = 0; k < s.depth(); ++k) {
    const int64_t at = offsets[k];
    load_tile<6>(weight, pixel);
    if constexpr (vectors > 1) load_tile<7>(weight + kMatrixRows, pixel);
    for_each_sum([&](auto t, auto v) __attribute__((always_inline)) {
      if constexpr (v.value == 0) load_tile<4 + t.value % 2>(from[t.value] + at, step);
      multiply_tiles<t.value * vectors + v.value, 4 + t.value % 2, 6 + v.value>();
    });
    weight += s.numbers / 2 * vectors * kMatrixRows;
  }
  for_each_sum([&](auto t, auto v) __attribute__((always_inline)) {
    store_tile<t.value * vectors + v.value>(to[t.value] + v.value * kMatrixRows, pixel);
  });
}

template <int vectors>
FASTNN_SHARED void conv_rows_matrix(const MatrixShape& s, const RowToMake<MatrixNumber>* rows, int64_t row_count,
                                    int64_t step, const int64_t* offsets, const bfloat16x2* weight,
                                    const Vec<float> (&bias)[vectors], int64_t count) {
  alignas(64) float bias_row[vectors * kMatrixRows];
  for (int v = 0; v < vectors; ++v) store(bias_row + v * kMatrixRows, bias[v]);
  const int64_t row_tiles = divide_up(count, s.pixels), tiles = row_count * row_tiles;
  for (int64_t t = 0; t < tiles; t += kMatrixTiles<vectors>) {
    with_constant<kMatrixTiles<vectors>>(static_cast<int>(smaller(tiles - t, kMatrixTiles<vectors>)), [&](auto some) {
      constexpr int together = decltype(some)::value;
      const MatrixNumber* from[together];
      float* to[together];
      for (int i = 0; i < together; ++i) {
        const RowToMake<MatrixNumber>& row = rows[(t + i) / row_tiles];
        // A row's last tile covers what the one before it has covered already.
        const int64_t first = larger(0, smaller((t + i) % row_tiles * s.pixels, count - s.pixels));
        from[i] = row.tile + first * step;
        to[i] = row.to + first * vectors * kMatrixRows;
      }
      matrix_tile<together, vectors>(s, from, step * static_cast<int64_t>(sizeof(MatrixNumber)), offsets, weight,
                                     bias_row, to);
    });
  }
}
#endif

}  // namespace FASTNN_ISA
}  // namespace fastnn
