// The register tile: the one inner loop of forward, but for depthwise convolutions and the matrix unit.
//
// A tile adds up products over `depth` in registers and writes the sums to memory that stays in L1; pool.h pools them
// there, unless a tile pools them itself. One of the two operands is broadcast, element by element, the other is
// loaded in vectors. In a channel tile the pixels are broadcast and the vectors are output channels; in a pixel tile
// the weights are broadcast and the vectors are pixels. The packed weight is dense, the pixels are reached by a list
// of offsets, one for each k, so that any order of channels and kernel positions is the same loop.
//
// A tile takes rows x vectors multiply-adds and rows + vectors + 1 loads for each k. A processor that starts two loads
// and two multiply-adds in a cycle is then limited by multiply-adds from two vectors on. Where a multiplication takes a
// lane as it takes a vector, a channel tile loads a vector of a pixel's products at once, if they lie side by side.
#pragma once

#include "../gemm.h"
#include "winner.h"

namespace fastnn {
namespace FASTNN_ISA {

// What these kernels were compiled for. Whether the processor has pairs and matrices too is asked when planning.
constexpr Machine kMachine = {FASTNN_VECTOR_BYTES, FASTNN_VECTOR_REGISTERS, kLongestSum, kMultipliesPairs,
                              kMultipliesMatrices};

constexpr int kBlockVectors = 2;  // of a block of output channels
// The rows of a tile whose accumulators, with an operand's vectors and a broadcast, fill the registers.
constexpr int kMostRows = most_rows_of_tile(FASTNN_VECTOR_REGISTERS);

template <bool yes>
struct Yes {
  static constexpr bool value = yes;
};

// The unit of the broadcast operand's steps and offsets: its elements, but single numbers where elements are pairs,
// since a pair may begin at any number.
template <class E>
struct NumberOf {
  using Type = E;
};
template <>
struct NumberOf<bfloat16x2> {
  using Type = bfloat16;
};
template <class E>
using Number = typename NumberOf<E>::Type;

// Broadcasts an element, and adds its product with the weight to a sum.
FASTNN_INLINE Vec<float> broadcast_element(const float* x) {
  return broadcast<float>(*x);
}
FASTNN_INLINE Vec<double> broadcast_element(const double* x) {
  return broadcast<double>(*x);
}
template <class V>
FASTNN_INLINE V add_product(V x, V y, V sum, Yes<false> /* no pairs */) {
  return multiply_add(x, y, sum);
}
#if defined(FASTNN_HAS_PAIRS) && defined(__aarch64__)
// The pair stays in one lane, since the multiplication takes a lane as it takes a vector.
FASTNN_INLINE bfloat16x4_t broadcast_element(const bfloat16* x) {
  float bits;
  __builtin_memcpy(&bits, x, sizeof(bits));
  return (bfloat16x4_t)float32x2_t{bits, 0};
}
FASTNN_INLINE Vec<float> add_product(bfloat16x4_t x, Vec<float> y, Vec<float> sum, Yes<true>) {
  return (Vec<float>)vbfdotq_lane_f32((float32x4_t)sum, (bfloat16x8_t)y, x, 0);
}
#elif defined(FASTNN_HAS_PAIRS)
FASTNN_INLINE Vec<float> broadcast_element(const bfloat16* x) {
  return broadcast_pair({x[0], x[1]});
}
FASTNN_INLINE Vec<float> add_product(Vec<float> x, Vec<float> y, Vec<float> sum, Yes<true>) {
  return multiply_add_pairs(x, y, sum);
}
#endif
#if defined(__aarch64__)
// The same with the element in a lane of a vector.
template <int lane, class E, class C = Compute<E>>
FASTNN_INLINE Vec<C> add_product_of_lane(Vec<C> x, Vec<C> y, Vec<C> sum) {
#if defined(FASTNN_HAS_PAIRS)
  if constexpr (__is_same(E, bfloat16x2)) {
    return (Vec<C>)vbfdotq_laneq_f32((float32x4_t)sum, (bfloat16x8_t)y, (bfloat16x8_t)x, lane);
  }
#endif
  return multiply_add(broadcast<C>(x[lane]), y, sum);
}
#endif

// How many products of a list of offsets lie side by side under a pixel: a run. Only 64-bit ARM uses runs, because its
// multiplication can take one lane of a vector as an operand.
struct Runs {
#if defined(__aarch64__)
  int64_t length = 1, left = 1;  // of a run, and of the first one

  // Of the products from number k of the list on.
  Runs from(int64_t k) const { return {length, length - k % length}; }
#else
  static constexpr int64_t length = 1;
  Runs from(int64_t) const { return {}; }
#endif
};

// The runs of a list that was made by nested loops: the first one is as long as the others.
template <class E>
FASTNN_INLINE Runs runs_of([[maybe_unused]] const int64_t* offsets, [[maybe_unused]] int64_t depth) {
  Runs runs;
#if defined(__aarch64__)
  constexpr int64_t numbers = sizeof(E) / sizeof(Number<E>);
  while (runs.length < depth && offsets[runs.length] == offsets[0] + runs.length * numbers) ++runs.length;
#endif
  return runs;
}

// The products of a run that a channel tile takes together, a vector of each pixel, and the most rows of such a tile:
// the weight's vectors of all these products, and those of two pixels, take registers too.
template <class E>
constexpr int kLoadedTogether = kLanes<Compute<E>>;
template <class E>
constexpr int most_rows_of_runs(int vectors) {
  const int most = (FASTNN_VECTOR_REGISTERS - 2) / vectors - kLoadedTogether<E>;
  return most < kMostRows ? most : kMostRows;
}
template <class E>
FASTNN_INLINE int64_t most_rows(int vectors, Runs runs) {
  return runs.length < kLoadedTogether<E> ? kMostRows : most_rows_of_runs<E>(vectors);
}

// Sums of a channel tile: to[p * to_step + lane] (+)= sum over k of pixels[p * step + offsets[k]] * weight[k][lane].
template <class E>
struct ChannelTile {
  using C = Compute<E>;
  const Number<E>* pixels;  // the first pixel, under the kernel's first position
  int64_t step;             // numbers from a pixel to the next
  const int64_t* offsets;   // [depth]
  int64_t depth;
  const E* weight;  // [depth][vectors x lanes]
  const C* bias;    // [vectors x lanes], added to the sums; null: the sums are added to what stands in `to`
  C* to;
  int64_t to_step;
  Runs runs;
  int64_t ahead;  // bytes from the weight's row to a line that is brought into L2 when the row is read; 0 for none
};

// Sums of `tiles` pixel tiles side by side: to[o * to_step + lane] (+)= sum over k of weight[k][o] *
// pixels[offsets[k] + lane].
template <class C>
struct PixelTile {
  int64_t tiles;
  const C* pixels;
  const int64_t* offsets;  // [depth]
  int64_t depth;
  const C* weight;  // [depth][weight_step], of which the first outputs of each row are multiplied
  int64_t weight_step;
  const C* bias;     // [outputs]; null: the sums are added to what stands in `to`
  Bounds<C> bounds;  // of the sums
  C* to;
  int64_t to_step;
};

// Windows that are pooled in registers: for `tiles` vectors of windows side by side, the largest of the values at 2 x
// pairs window positions and of a bound, and its position. The value at a window position is sum over k of
// weight[k][o] * pixels[offsets[place][k] + lane] + bias.
template <class C>
struct WindowTile {
  int64_t tiles;
  const C* pixels;
  const int64_t* offsets;  // [place][depth]
  int64_t pairs, depth;
  const C* weight;  // [depth][weight_step], of which the first outputs of each row are multiplied
  int64_t weight_step;
  const C* bias;  // [outputs]
  C least;        // of the values
  C* to;          // [output][to_step]
  int64_t to_step;
  uint8_t* winners;  // laid out as `to`, or null
};

// Starts the sums with -0, which changes nothing that is added to it: a sum of only -0 stays -0.
template <int rows, int vectors, class C>
FASTNN_INLINE void start_sums(Vec<C> (&sums)[rows][vectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sums[r][v] = -Vec<C>{};
  }
}

// sums[r][v] += left[r] x right[v]
template <int rows, int vectors, class C>
FASTNN_INLINE void add_products(const C* left, const Vec<C> (&right)[vectors], Vec<C> (&sums)[rows][vectors]) {
  const auto add_row = [&](int r, C x) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sums[r][v] = multiply_add(broadcast<C>(x), right[v], sums[r][v]);
  };
#if defined(__aarch64__)
  // A multiplication takes a lane there as it takes a vector, so that one load brings four elements, or two.
  typedef C Two __attribute__((vector_size(2 * sizeof(C)), aligned(sizeof(C)), may_alias));
  constexpr int by_vectors = rows / kLanes<C> * kLanes<C>, by_twos = rows / 2 * 2;
#pragma GCC unroll 4
  for (int r = 0; r < by_vectors; r += kLanes<C>) {
    const Vec<C> some = load(left + r);
#pragma GCC unroll 4
    for (int i = 0; i < kLanes<C>; ++i) add_row(r + i, some[i]);
  }
  if constexpr (by_twos > by_vectors) {
    const Two some = *reinterpret_cast<const Two*>(left + by_vectors);
    add_row(by_vectors, some[0]);
    add_row(by_vectors + 1, some[1]);
  }
  if constexpr (rows > by_twos) add_row(by_twos, left[by_twos]);
#else
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) add_row(r, left[r]);
#endif
}

#if defined(__aarch64__)
// Adds the products of a run that are taken together, which begin at an offset and with a row of the weight.
template <int rows, int vectors, class E, class C = Compute<E>>
FASTNN_INLINE void add_together(const Number<E>* const (&pixels)[rows], int64_t offset, const E* weight,
                                Vec<C> (&sums)[rows][vectors]) {
  Vec<C> right[kLoadedTogether<E>][vectors];
#pragma GCC unroll 4
  for (int i = 0; i < kLoadedTogether<E>; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      right[i][v] = load(weight + (i * vectors + v) * kLanes<C>);
      keep_in_register(right[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    Vec<C> left;
    __builtin_memcpy(&left, pixels[r] + offset, sizeof(left));
    const auto add_lane = [&](auto lane) __attribute__((always_inline)) {
      constexpr int i = decltype(lane)::value;
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[r][v] = add_product_of_lane<i, E>(left, right[i][v], sums[r][v]);
    };
    add_lane(Constant<0>{});
    add_lane(Constant<1>{});
    if constexpr (kLoadedTogether<E> == 4) {
      add_lane(Constant<2>{});
      add_lane(Constant<3>{});
    }
  }
}
#endif

template <int rows, int vectors, class E>
void channel_tile(const ChannelTile<E>& call) {
  using C = Compute<E>;
  constexpr Yes<__is_same(E, bfloat16x2)> kPairs;
  Vec<C> sums[rows][vectors];
  start_sums<rows, vectors, C>(sums);
  const int64_t step = call.step;
  const int64_t* offsets = call.offsets;
  const int64_t* const end = offsets + call.depth;
  const Number<E>* pixels[kPointsAtRows ? rows : 1];
#pragma GCC unroll 16
  for (int r = 0; r < (kPointsAtRows ? rows : 1); ++r) {
    pixels[r] = call.pixels + r * step;
    if constexpr (kPointsAtRows) keep_in_register(pixels[r]);
  }
  const E* weight = call.weight;
  [[maybe_unused]] const int64_t ahead = call.ahead;
  [[maybe_unused]] Runs runs = call.runs;
  const int64_t* stop;
  do {
    stop = end;
#if defined(__aarch64__)
    if constexpr (rows <= most_rows_of_runs<E>(vectors)) {
      constexpr int together = kLoadedTogether<E>;
      if (runs.length >= together) {
        stop = offsets + smaller(runs.left, end - offsets);
        runs.left = runs.length;
        for (; stop - offsets >= together; offsets += together, weight += together * vectors * kLanes<C>) {
          add_together<rows, vectors>(pixels, *offsets, weight, sums);
        }
      }
    }
#endif
    for (; offsets != stop; ++offsets) {
      const int64_t offset = *offsets;
      const Number<E>* from = pixels[0] + offset;
      Vec<C> right[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        right[v] = load(weight + v * kLanes<C>);
        keep_in_register(right[v]);
      }
#if !defined(__aarch64__)  // where this was not measured
      __builtin_prefetch(reinterpret_cast<const char*>(weight) + ahead, 0, 2);
#endif
      weight += vectors * kLanes<C>;
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        if (r > 0 && r % 4 == 0) from += 4 * step;  // four pixels are reached from one address
        const auto left = broadcast_element(kPointsAtRows ? pixels[r % rows] + offset : from + r % 4 * step);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sums[r][v] = add_product(left, right[v], sums[r][v], kPairs);
      }
    }
  } while (stop != end);
  C* to = call.to;
  const C* add = call.bias ? call.bias : to;
  const int64_t add_step = call.bias ? 0 : call.to_step;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r, to += call.to_step, add += add_step) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(to + v * kLanes<C>, sums[r][v] + load(add + v * kLanes<C>));
  }
}

template <int rows, int vectors, class C>
void pixel_tile(const PixelTile<C>& call) {
  const int64_t* const end = call.offsets + call.depth;
  const int64_t weight_step = call.weight_step;
  const C* pixels = call.pixels;
  C* first = call.to;
  for (int64_t t = 0; t < call.tiles; ++t, pixels += vectors * kLanes<C>, first += vectors * kLanes<C>) {
    Vec<C> sums[rows][vectors];
    start_sums<rows, vectors, C>(sums);
    const C* weight = call.weight;
    for (const int64_t* offset = call.offsets; offset != end; ++offset, weight += weight_step) {
      const C* from = pixels + *offset;
      Vec<C> right[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        right[v] = load(from + v * kLanes<C>);
        keep_in_register(right[v]);
      }
      add_products<rows, vectors>(weight, right, sums);
    }
    C* to = first;
    const Vec<C> least = broadcast<C>(call.bounds.least), most = broadcast<C>(call.bounds.most);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r, to += call.to_step) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const Vec<C> add = call.bias ? broadcast<C>(call.bias[r]) : load(to + v * kLanes<C>);
        store(to + v * kLanes<C>, smaller_of(most, larger_of(least, sums[r][v] + add)));  // NaN stays
      }
    }
  }
}

template <int rows, bool with_winners, class C>
void window_tile(const WindowTile<C>& call) {
  const int64_t depth = call.depth, weight_step = call.weight_step;
  const C* pixels = call.pixels;
  const Vec<C> least = broadcast<C>(call.least);
  for (int64_t t = 0; t < call.tiles; ++t, pixels += kLanes<C>) {
    for (int64_t pair = 0; pair < call.pairs; ++pair) {
      const int64_t *first = call.offsets + 2 * pair * depth, *second = first + depth;
      Vec<C> sums[rows][2];
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) sums[r][0] = sums[r][1] = broadcast<C>(call.bias[r]);
      const C* weight = call.weight;
      for (int64_t k = 0; k < depth; ++k, weight += weight_step) {
        Vec<C> right[2] = {load(pixels + first[k]), load(pixels + second[k])};
        keep_in_register(right[0]);
        keep_in_register(right[1]);
        add_products<rows, 2>(weight, right, sums);
      }
      Vec<C> total = {};  // NaN if a sum is
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) total += sums[r][0] + sums[r][1];
      C* to = call.to + t * kLanes<C>;
      uint8_t* winners = with_winners ? call.winners + t * kLanes<C> : nullptr;
      const auto pool = [&](auto careful) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          // Raised once, for -0 to stay: later sums are compared as they are.
          Vec<C> best = pair > 0 ? load(to + r * call.to_step) : larger_of(least, sums[r][0]);
          Numbers<C> winner = {};
          if (with_winners && pair > 0) winner = load_bytes_up_to<C>(winners + r * call.to_step, kLanes<C>);
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            take_place<C, with_winners, decltype(careful)::value>(sums[r][i], 2 * pair + i, best, winner);
          }
          store(to + r * call.to_step, best);
          if (with_winners) store_winners<C>(best, winner, winners + r * call.to_step);
        }
      };
      has_nan<C>(total) ? pool(Yes<true>{}) : pool(Yes<false>{});
    }
  }
}

// ---- the manifest of instances (tiles.cpp) ----------------------------------------------------------------------

template <class E>
using ChannelTileFunction = void (*)(const ChannelTile<E>&);
template <class C>
using WindowTileFunction = void (*)(const WindowTile<C>&);
template <class C>
using PixelTileFunction = void (*)(const PixelTile<C>&);

// [vectors - 1][rows - 1]
template <class E>
struct ChannelTiles {
  ChannelTileFunction<E> at[kBlockVectors][kMostRows];
};
// [which number of vectors][outputs - 1]: 1, 2, 4 and 8 vectors; null where they would not fit the registers.
template <class C>
struct PixelTiles {
  PixelTileFunction<C> at[4][kMostRows];
};
// [outputs - 1]
template <class C>
struct WindowTiles {
  WindowTileFunction<C> values[kMostRows], winners[kMostRows];
};
// The most output channels of a pixel tile of `vectors` vectors.
constexpr int most_outputs(int vectors) {
  const int most = (FASTNN_VECTOR_REGISTERS - 1 - vectors) / vectors;
  return most < kMostRows ? most : kMostRows;
}

extern const ChannelTiles<float> channel_tiles_f32;
extern const ChannelTiles<double> channel_tiles_f64;
extern const PixelTiles<float> pixel_tiles_f32;
extern const WindowTiles<float> window_tiles_f32;
#if defined(FASTNN_HAS_PAIRS)
extern const ChannelTiles<bfloat16x2> channel_tiles_pairs;
#endif

template <class E>
FASTNN_INLINE const ChannelTiles<E>& channel_tiles() {
  if constexpr (sizeof(E) == sizeof(double)) {
    return channel_tiles_f64;
#if defined(FASTNN_HAS_PAIRS)
  } else if constexpr (sizeof(Compute<E>) == sizeof(float) && !__is_same(E, float)) {
    return channel_tiles_pairs;
#endif
  } else {
    return channel_tiles_f32;
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
