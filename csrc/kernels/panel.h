// Products with a matrix packed in panels, and the packing. A panel is (depth, width) of a few vectors, its rows
// one after the other, so that a product reads it from start to end.
#pragma once

#include "../simd/spread.h"
#include "gemm.h"

namespace fastnn {
namespace FASTNN_ISA {

// The rows of a tile of `vectors` vectors: its accumulators fill the registers that one row of the panel and a
// broadcast element leave.
constexpr int tile_rows(int vectors) {
  return FASTNN_VECTOR_REGISTERS == 32 ? (vectors == 4   ? 6
                                          : vectors == 3 ? 8
                                                         : 12)
                                       : (vectors == 4   ? 3
                                          : vectors == 3 ? 4
                                                         : 6);
}

// Where the left operand's element (r, k) lies: a[r * row + k * depth].
template <bool transposed>
struct Strides {
  int64_t stride;
  FASTNN_INLINE int64_t row() const { return transposed ? 1 : stride; }
  FASTNN_INLINE int64_t depth() const { return transposed ? stride : 1; }
};

// Parts of the depth that are summed at a time, for few rows: one chain of additions would wait for itself.
constexpr int parts_of(int64_t rows, int vectors) {
  return rows * vectors >= 8 ? 1 : rows * vectors >= 4 ? 2 : 4;
}

// out[r] = start[r * start_stride] + a[r] panel, for `rows` rows. For each row of the panel, `fetched` bytes from
// `fetch` on are prefetched, because large weights come from far away at every step of a recurrent network. The address
// may lie beyond the weights.
template <int rows, int vectors, int parts, int fetched, bool transposed, class C>
__attribute__((noinline)) void multiply_rows(int64_t depth, const C* a, Strides<transposed> strides, const C* panel,
                                             uintptr_t fetch, const C* start, int64_t start_stride, C* out,
                                             int64_t out_stride) {
  constexpr int lanes = kLanes<C>, width = vectors * lanes;
  // What the next product reads waits in the second cache, since the nearest one does not hold a panel.
  constexpr int kCache = fetched < width * static_cast<int>(sizeof(C)) ? 2 : 3;
  Vec<C> total[parts][rows][vectors] = {};
  const int64_t step = strides.depth();
  LeftRows<rows, C> left_rows(a, strides.row());
  const auto multiply_one = [&](int part) __attribute__((always_inline)) {
    Vec<C> right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = load(panel + part * width + v * lanes);
#pragma GCC unroll 4
    for (int byte = 0; byte < fetched; byte += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(fetch + part * fetched + byte), 0, kCache);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec<C> left = broadcast<C>(left_rows.at(r, part * step));
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) total[part][r][v] += left * right[v];
    }
  };
  int64_t k = 0;
  for (; k + parts <= depth; k += parts) {
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) multiply_one(part);
    left_rows.advance(parts * step);
    panel += parts * width;
    fetch += parts * fetched;
  }
  if constexpr (parts > 1) {
    for (; k < depth; ++k) {
      multiply_one(0);
      left_rows.advance(step);
      panel += width;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 2
      for (int apart = parts / 2; apart > 0; apart /= 2) {
#pragma GCC unroll 2
        for (int part = 0; part < apart; ++part) total[part][r][v] += total[part + apart][r][v];
      }
      // Added last: the sum of a block is rounded by its own size, not by that of all blocks before it.
      store(out + r * out_stride + v * lanes, load(start + r * start_stride + v * lanes) + total[0][r][v]);
    }
  }
}

// As many panels as one row is multiplied with at a time: the registers hold their sums.
constexpr int kPanelsOfRow = FASTNN_VECTOR_REGISTERS / 16;

// sums = start + a panel, for one row and panels `stride` apart, their starts `start_stride` apart. The panels alone
// need as many loads as multiplications take, so the row is loaded a vector at a time.
template <int vectors, int panels, class C>
FASTNN_INLINE void multiply_row(int64_t depth, const C* a, const C* panel, int64_t stride, const C* start,
                                int64_t start_stride, Vec<C> (&sums)[panels * vectors]) {
  constexpr int lanes = kLanes<C>, width = vectors * lanes, parts = parts_of(1, vectors);
  constexpr int together = lanes > parts ? lanes : parts;
  Vec<C> total[parts][panels * vectors] = {};
  const auto multiply_one = [&](int part, Vec<C> left) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < panels * vectors; ++i) {
      total[part][i] += left * load(panel + i / vectors * stride + part * width + i % vectors * lanes);
    }
  };
  int64_t k = 0;
  for (; k + together <= depth; k += together) {
    SpreadLanes<C> lefts(a + k);
#pragma GCC unroll 1
    for (int done = 0; done < together; done += parts) {
#pragma GCC unroll 4
      for (int part = 0; part < parts; ++part) multiply_one(part, lefts.next());
      panel += parts * width;
    }
  }
  for (; k < depth; ++k) {
    multiply_one(0, broadcast<C>(a[k]));
    panel += width;
  }
#pragma GCC unroll 8
  for (int i = 0; i < panels * vectors; ++i) {
#pragma GCC unroll 2
    for (int apart = parts / 2; apart > 0; apart /= 2) {
#pragma GCC unroll 2
      for (int part = 0; part < apart; ++part) total[part][i] += total[part + apart][i];
    }
    sums[i] = load(start + i / vectors * start_stride + i % vectors * lanes) + total[0][i];
  }
}

// The same for any number of rows, in tiles as even as can be. `all_rows` is the number of rows of the whole product,
// of which these are a thread's part. It decides how sums are made, so that they are the same for any number of
// threads. `next` is the panel that is read after this one.
template <int vectors, bool transposed = false, class C>
void multiply_panel(int64_t all_rows, int64_t rows, int64_t depth, const C* a, int64_t a_stride, const C* panel,
                    const C* next, const C* start, int64_t start_stride, C* out, int64_t out_stride) {
  constexpr int most = tile_rows(vectors), kRowBytes = vectors * sizeof(Vec<C>);
  const Strides<transposed> strides{a_stride};
  if (all_rows == 1 && rows == 1) {  // a product so short that the choices below take a tenth of its time
    return multiply_rows<1, vectors, parts_of(1, vectors), 0>(depth, a, strides, panel, 0, start, start_stride, out,
                                                              out_stride);
  }
  const int64_t tiles = divide_up(rows, most);
  const int parts = parts_of(all_rows, vectors);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
    with_constant<most>(static_cast<int>(count), [&](auto constant) {
      constexpr int tile_rows = decltype(constant)::value;
      const auto run_parts = [&](auto chosen, auto fetched, uintptr_t fetch) {
        multiply_rows<tile_rows, vectors, decltype(chosen)::value, decltype(fetched)::value>(
            depth, a + first * strides.row(), strides, panel, fetch, start + first * start_stride, start_stride,
            out + first * out_stride, out_stride);
      };
      const auto run = [&](auto fetched, uintptr_t fetch) {
        if constexpr (parts_of(tile_rows, vectors) > 2) {
          if (parts > 2) return run_parts(Constant<4>{}, fetched, fetch);
        }
        if constexpr (parts_of(tile_rows, vectors) > 1) {
          if (parts > 1) return run_parts(Constant<2>{}, fetched, fetch);
        }
        run_parts(Constant<1>{}, fetched, fetch);
      };
      // Several tiles fetch the next panel together, at an even pace: the first one alone would have to wait for all
      // of its own.
      if constexpr (2 * tile_rows >= most) {
        if (tiles > 1) {
          return run(Constant<kRowBytes / 2>{},
                     reinterpret_cast<uintptr_t>(next) + depth * kRowBytes * tile / tiles / 64 * 64);
        }
      }
      // A tile of few rows has no time to spare for that between its loads.
      constexpr int kAhead = 2048;
      run(Constant<(2 * tile_rows > most ? kRowBytes : 0)>{}, reinterpret_cast<uintptr_t>(panel) + kAhead);
    });
  }
}

// A matrix (depth, columns) in panels of two vectors, the last one filled up with zeros.
template <class C>
constexpr int64_t padded_columns(int64_t columns) {
  return divide_up(columns, 2 * kLanes<C>) * 2 * kLanes<C>;
}

// product (rows, padded columns) = a (rows, depth) times such panels; with `adding`, the product is added to it.
template <bool transposed, class C>
void multiply_panels(int64_t all_rows, int64_t rows, int64_t depth, const C* a, int64_t a_stride, const C* panels,
                     int64_t columns, bool adding, C* product, int64_t product_stride) {
  static constexpr C kZeros[2 * kLanes<C>] = {};
  for (int64_t column = 0; column < columns; column += 2 * kLanes<C>) {
    C* out = product + column;
    const C* panel = panels + column * depth;
    multiply_panel<2, transposed>(all_rows, rows, depth, a, a_stride, panel, panel + 2 * kLanes<C> * depth,
                                  adding ? out : kZeros, adding ? product_stride : 0, out, product_stride);
  }
}

// weight (columns, depth), row-major -> the panels of its transpose.
template <class T>
void pack_transposed(const T* weight, int64_t columns, int64_t depth, Compute<T>* panels) {
  using C = Compute<T>;
  for (int64_t column = 0; column < padded_columns<C>(columns); column += kLanes<C>) {
    const int64_t count = larger(0, smaller(columns - column, kLanes<C>)), within = column % (2 * kLanes<C>);
    pack_rows<T>(weight + smaller(column, columns - 1) * depth, depth, count, depth,
                 panels + (column - within) * depth + within, 2 * kLanes<C>);
  }
}

// One row of the matrix, into panels of `depth` rows.
template <class T>
FASTNN_INLINE void pack_row(const T* row, int64_t columns, int64_t depth, Compute<T>* panels) {
  using C = Compute<T>;
  constexpr int64_t width = 2 * kLanes<C>;
  for (int64_t column = 0; column < columns; column += width) {
    const int64_t left_over = columns - column;
    store(panels, load_up_to<T>(row + column, left_over));
    const bool second = left_over > kLanes<C>;
    store(panels + kLanes<C>, second ? load_up_to<T>(row + column + kLanes<C>, left_over - kLanes<C>) : Vec<C>{});
    panels += width * depth;
  }
}

// Packs a row times a mask, which may be null.
template <class T>
void pack_masked_row(const T* row, const T* mask, int64_t columns, int64_t depth, Compute<T>* panels) {
  using C = Compute<T>;
  if (!mask) return pack_row(row, columns, depth, panels);
  for (int64_t column = 0; column < columns; column += kLanes<C>) {
    const int64_t vector = column / kLanes<C>;
    store(panels + (vector / 2 * depth * 2 + vector % 2) * kLanes<C>,
          load_up_to<T>(row + column, columns - column) * load_up_to<T>(mask + column, columns - column));
  }
  if (divide_up(columns, kLanes<C>) % 2) {
    store(panels + (columns / kLanes<C> / 2 * depth * 2 + 1) * kLanes<C>, Vec<C>{});
  }
}

// One row of zeros.
template <class C>
void clear_row(int64_t columns, int64_t depth, C* panels) {
  for (int64_t column = 0; column < columns; column += 2 * kLanes<C>) {
    store(panels + column * depth, Vec<C>{});
    store(panels + column * depth + kLanes<C>, Vec<C>{});
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
