// The register tile of a matrix product: the one inner loop that every dense kernel is built on.
#pragma once

#include "../simd/vec.h"

namespace fastnn {
namespace FASTNN_ISA {

// Tile size, so that the accumulators, one row of the right operand and a broadcast fill the register file:
// 32 registers with AVX-512 (12 x 2 + 2 + 1), 16 elsewhere (6 x 2 + 2 + 1).
constexpr int kTileRows = FASTNN_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kTileVectors = 2;
template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;

template <int n>
struct Constant {
  static constexpr int value = n;
};

// Calls body(Constant<n>) for the run-time n, 1 <= n <= most.
template <int most, class Body>
FASTNN_INLINE void with_constant(int n, const Body& body) {
  if constexpr (most > 1) {
    if (n < most) return with_constant<most - 1>(n, body);
  }
  body(Constant<most>{});
}

// total[r][v] += sum over k of a[r * a_row + k * a_depth] * b[k * b_depth + v-th vector].
// `columns` counts the columns of b that may be read; pass whole tiles (packed panels) where possible.
template <int rows, int vectors, class A, class B, class T = Compute<A>>
FASTNN_INLINE void multiply_tile(int64_t depth, const A* a, int64_t a_row, int64_t a_depth, const B* b,
                                 int64_t b_depth, int64_t columns, Vec<T> (&total)[rows][vectors]) {
  const int64_t lanes = kLanes<T>;
  if (columns >= vectors * lanes) {
    for (int64_t k = 0; k < depth; ++k) {
      Vec<T> right[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) right[v] = load(b + v * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Vec<T> left = broadcast<T>(to_compute(a[r * a_row]));
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) total[r][v] += left * right[v];
      }
      a += a_depth;
      b += b_depth;
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int64_t left_over = columns - v * lanes;
      right[v] = left_over > 0 ? load_up_to<B>(b + v * lanes, left_over) : Vec<T>{};
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec<T> left = broadcast<T>(to_compute(a[r * a_row]));
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) total[r][v] += left * right[v];
    }
    a += a_depth;
    b += b_depth;
  }
}

// Elements of a packed (columns, depth) matrix: whole tiles, in the compute type.
template <class T>
int64_t packed_size(int64_t columns, int64_t depth) {
  return (columns + kTileColumns<T> - 1) / kTileColumns<T> * kTileColumns<T> * depth;
}

// weight (columns, depth), row-major -> panels [columns / tile][depth][tile], the last one padded with zeros.
template <class T>
void pack_panels(const T* weight, int64_t columns, int64_t depth, Compute<T>* packed) {
  constexpr int64_t tile = kTileColumns<Compute<T>>;
  for (int64_t first = 0; first < columns; first += tile) {
    const int64_t count = columns - first < tile ? columns - first : tile;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t c = 0; c < count; ++c) packed[k * tile + c] = to_compute(weight[(first + c) * depth + k]);
      for (int64_t c = count; c < tile; ++c) packed[k * tile + c] = 0;
    }
    packed += tile * depth;
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
