// One layer of mlp's forward for a block of rows, in three ways: with the weight as it is, a row at a time or with the
// rows in the lanes, or packed. Which is best depends on how many rows there are to share the packing.
#pragma once

#include "../simd/activate.h"
#include "../simd/transpose.h"
#include "gemm.h"

namespace fastnn {
namespace FASTNN_ISA {

// Rows that go through all layers together: a few register tiles, so that a weight panel read from L2 is used
// several times, while the activations stay in L1.
constexpr int64_t kBlockRows = 4 * kTileRows;

// Whether a layer's tile applies the activation itself. The others cost more than another pass over a block in cache,
// and would each need a copy of the tile.
template <class T>
bool taken_with_the_tile(const MlpLayer<T>& layer) {
  const Activation& activation = layer.activation;
  const bool needs_input = layer.saved && saves_input(activation);
  return activation.kind == ActivationKind::identity || (only_bounds(activation) && !needs_input);
}

// The bounds that a layer's tile keeps its sums between.
template <class T>
FASTNN_INLINE Bounds<T> bounds_of_tile(const MlpLayer<T>& layer) {
  return taken_with_the_tile(layer) ? bounds_of<T>(layer.activation) : Bounds<T>{};
}

// output (count) <- activated, with a copy to `saved` where backward wants one
template <class T>
void activate_block(const MlpLayer<T>& layer, T* output, T* saved, int64_t count) {
  const bool input_saved = saves_input(layer.activation), taken = taken_with_the_tile(layer);
  with_activation<T>(layer.activation, [&](auto function) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const Vec<T> before = load_up_to<T>(output + i, count - i);
      const Vec<T> value = taken ? before : function(before);
      store_up_to<T>(output + i, value, count - i);
      if (saved) store_up_to<T>(saved + i, input_saved ? before : value, count - i);
    }
  });
}

// Whether a product's right operand (depth, columns) stays in L1 whatever the order of the tiles. The tiles then go
// along the rows, as the output lies in memory.
template <class T>
bool stays_in_cache(int64_t depth, int64_t columns) {
  return depth * columns <= (16 << 10) / static_cast<int64_t>(sizeof(T));
}

// ---- packed ----

// The bias comes last: added first, every partial sum would be rounded by its size.
template <int rows, int vectors, class T>
FASTNN_INLINE void packed_tile(const MlpLayer<T>& layer, const T* input, T* output, int64_t column, int last) {
  Vec<T> total[rows][vectors], bias[vectors] = {};
  multiply_tile<rows, vectors>(layer.in, input, layer.in, 1, layer.packed + column * layer.in, vectors * kLanes<T>,
                               kLanes<T>, total);
  if (layer.bias) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int64_t from = column + v * kLanes<T>;
      bias[v] = load_up_to<T>(layer.bias + from, layer.out - from);
    }
  }
  if (only_bounds(layer.activation)) {
    const Bounds<T> bounds = bounds_of_tile(layer);
    store_tile<rows, vectors, T>(total, last, output + column, layer.out,
                                 [&](Vec<T> x, int v) { return bounded(x + bias[v], bounds); });
  } else {
    store_tile<rows, vectors, T>(total, last, output + column, layer.out, [&](Vec<T> x, int v) { return x + bias[v]; });
  }
}

// input (rows, in) -> output (rows, out) by packed panels.
template <class T>
void packed_layer(const MlpLayer<T>& layer, const T* input, T* output, int64_t rows) {
  const bool rows_first = stays_in_cache<T>(layer.in, layer.out);
  for_each_tile<T>(rows, layer.out, rows_first, [&](auto count, auto vectors, int64_t row, int64_t column, int last) {
    packed_tile<decltype(count)::value, decltype(vectors)::value, T>(layer, input + row * layer.in,
                                                                     output + row * layer.out, column, last);
  });
}

// ---- dot ----

template <class T>
constexpr int64_t kLongRow = 4 * kLanes<T>;

// dot_tile for long rows of the weight that lie one after the other. It takes two columns at a time, which share what
// is loaded of `a`. It takes no more, since the weight comes from L2 or further, and few streams that are fetched ahead
// of time come faster than a stream for each column.
template <int rows, class T>
FASTNN_INLINE Vec<T> dot_stream(int64_t depth, const T* a, const T* weight, int64_t columns_left) {
  constexpr int lanes = kLanes<T>, columns = lanes / rows, streams = columns > 1 ? 2 : 1, parts = 2;
  constexpr int kAhead = 1024 / sizeof(T);
  Vec<T> sums[lanes] = {};
  for (int c = 0; c < columns && c < columns_left; c += streams) {
    // A last column without a second one goes twice.
    const T* const of_column[2] = {weight, weight + (c + 1 < columns_left ? depth : 0)};
    Vec<T> total[rows][streams][parts] = {};
    const auto multiply = [&](int part, int64_t k, auto load_part) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int s = 0; s < streams; ++s) {
        const Vec<T> right = load_part(of_column[s] + k);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          total[r][s][part] = multiply_add(load_part(a + r * depth + k), right, total[r][s][part]);
        }
      }
    };
    const auto whole = [](const T* from) __attribute__((always_inline)) { return load(from); };
    int64_t k = 0;
    for (; k + parts * lanes <= depth; k += parts * lanes) {
#pragma GCC unroll 2
      for (int part = 0; part < parts; ++part) {
        const int64_t at = k + part * lanes;
#pragma GCC unroll 2
        for (int s = 0; s < streams; ++s) __builtin_prefetch(of_column[s] + at + kAhead);
        multiply(part, at, whole);
      }
    }
    for (; k + lanes <= depth; k += lanes) multiply(0, k, whole);
    if (k < depth) {
      const int rest = static_cast<int>(depth - k);
      multiply(1, k, [rest](const T* from) __attribute__((always_inline)) { return load_partial<T>(from, rest); });
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int s = 0; s < streams; ++s) sums[r * columns + c + s] = total[r][s][0] + total[r][s][1];
    }
    weight += streams * depth;
  }
  return sum_each<T, lanes>(sums);
}

// Rows of a tile of dot products: as many as make it about square.
template <class T>
constexpr int kDotRows = kLanes<T> >= 16  ? 4
                         : kLanes<T> >= 8 ? 2
                                          : 1;

// Computes `rows` rows in tiles of `tile_rows`, by dot products with those rows of the unpacked weight that `which`
// says.
template <int tile_rows, class T>
FASTNN_INLINE void dot_tiles(const MlpLayer<T>& layer, const T* input, T* output, int64_t rows, Share which) {
  constexpr int columns = kLanes<T> / tile_rows;
  const Bounds<T> bounds = bounds_of_tile(layer);
  for (int64_t column = which.first; column < which.last; column += columns) {
    const int64_t columns_left = smaller(which.last - column, columns);
    T bias[kLanes<T>] = {};
    for (int i = 0; layer.bias && i < kLanes<T>; ++i) {
      if (i % columns < columns_left) bias[i] = layer.bias[column + i % columns];
    }
    for (int64_t row = 0; row < rows; row += tile_rows) {
      const T *from = input + row * layer.in, *weight = layer.weight + column * layer.in;
      Vec<T> sums;
      if (tile_rows <= 2 && layer.in >= kLongRow<T>) {
        sums = dot_stream<tile_rows>(layer.in, from, weight, columns_left);
      } else {
        sums = dot_tile<tile_rows>(layer.in, from, layer.in, weight, layer.in, columns_left, rows - row);
      }
      sums += load(bias);
      if (only_bounds(layer.activation)) sums = bounded(sums, bounds);
      T values[kLanes<T>];
      store(values, sums);
      for (int r = 0; r < tile_rows && row + r < rows; ++r) {
        T* to = output + (row + r) * layer.out + column;
        if (columns_left == columns) {
          __builtin_memcpy(to, values + r * columns, columns * sizeof(T));
        } else {
          __builtin_memcpy(to, values + r * columns, columns_left * sizeof(T));
        }
      }
    }
  }
}

// input (rows, in) -> output (rows, out), those columns of it that `which` says
template <class T>
void dot_layer(const MlpLayer<T>& layer, const T* input, T* output, int64_t rows, Share which) {
  constexpr int most = kDotRows<T>;
  // Three rows that are left over go as four, of which one is computed twice.
  const int64_t left_over = rows % most, whole = left_over > most / 2 ? rows : rows - left_over;
  if (whole > 0) dot_tiles<most, T>(layer, input, output, whole, which);
  if (whole == rows) return;
  input += whole * layer.in;
  output += whole * layer.out;
  if (most == 4 && left_over == 2) {
    dot_tiles<2, T>(layer, input, output, left_over, which);
  } else {
    dot_tiles<1, T>(layer, input, output, left_over, which);
  }
}

// dot_layer by a team, with the activation. In each round the team takes `round_bytes` of the weight, and each member
// whole vectors of columns. Members that came since join after the round.
template <class T>
void dot_layer_together(const MlpLayer<T>& layer, const T* input, T* output, int64_t rows, int64_t round_bytes,
                        Member& member) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t vectors = divide_up(layer.out, lanes), vector_bytes = lanes * larger(layer.in, 1) * sizeof(T);
  const int64_t rounds = larger(1, vectors * vector_bytes / round_bytes);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t begin = vectors * round / rounds, end = vectors * (round + 1) / rounds;
    const Share share = member.share(end - begin);
    const Share columns = {(begin + share.first) * lanes, smaller((begin + share.last) * lanes, layer.out)};
    if (!share.empty()) {
      dot_layer<T>(layer, input, output, rows, columns);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = r * layer.out + columns.first;
        T* const saved = layer.saved ? layer.saved + at : nullptr;
        if (!saved && taken_with_the_tile(layer)) break;
        activate_block<T>(layer, output + at, saved, columns.last - columns.first);
      }
    }
    member.end_round();
  }
}

// ---- rows in the lanes ----

// Panels of `vectors` vectors of a row a lane that are taken together, so that a weight that comes from far is read
// once for all of them.
template <class T>
constexpr int64_t kLaneRows = 2 * kTileColumns<T>;

// Rows of features, row-major, -> panels of (features, width).
template <int vectors, class T>
void into_lanes(const T* input, int64_t rows, int64_t features, T* panels) {
  constexpr int64_t width = vectors * kLanes<T>;
  for (int64_t row = 0; row < rows; row += width) {
#pragma GCC unroll 2
    for (int64_t lane = 0; lane < width; lane += kLanes<T>) {
      pack_rows<T>(input + (row + lane) * features, features, smaller(rows - row - lane, kLanes<T>), features,
                   panels + row * features + lane, width);
    }
  }
}
template <int vectors, class T>
void out_of_lanes(const T* panels, int64_t rows, int64_t features, T* output) {
  constexpr int64_t width = vectors * kLanes<T>;
  for (int64_t row = 0; row < rows; row += width) {
    transpose_matrix(panels + row * features, width, features, smaller(rows - row, width), output + row * features,
                     features);
  }
}

// Panels of (in, width) -> panels of (out, width). The weight takes the place of a tile's rows, so that it is read as
// it is.
template <int vectors, class T>
void lanes_layer(const MlpLayer<T>& layer, const T* input, T* output, int64_t rows) {
  constexpr int64_t width = vectors * kLanes<T>;
  const bool bounds_wanted = only_bounds(layer.activation);
  const Bounds<T> bounds = bounds_of_tile(layer);
  for (int64_t column = 0; column < layer.out; column += kTileRows) {
    with_constant<kTileRows>(static_cast<int>(smaller(layer.out - column, kTileRows)), [&](auto constant) {
      constexpr int columns = decltype(constant)::value;
      for (int64_t row = 0; row < rows; row += width) {
        Vec<T> total[columns][vectors];
        multiply_tile<columns, vectors>(layer.in, layer.weight + column * layer.in, layer.in, 1, input + row * layer.in,
                                        width, kLanes<T>, total);
        T* const to = output + row * layer.out + column * width;
#pragma GCC unroll 16
        for (int c = 0; c < columns; ++c) {
          const Vec<T> bias = layer.bias ? broadcast(layer.bias[column + c]) : Vec<T>{};
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            const Vec<T> value = total[c][v] + bias;
            store(to + c * width + v * kLanes<T>, bounds_wanted ? bounded(value, bounds) : value);
          }
        }
      }
    });
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
