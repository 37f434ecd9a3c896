// Elements of the tile and the weight that are several channels.
//
// FourFloats: where output channels would not fill half a vector, each has lanes for the products with four of the
// input's channels, added up in the end.
//
// Pairs: for bfloat16 where one instruction multiplies two. An odd last channel has a zero beside it. Or a row of the
// kernel is one run of columns and channels, side by side in a tile of single numbers, and each pair begins with any of
// these: fewer products where channels are odd. An odd run's last pair ends with a number beyond the row, by a weight
// of zero, so that all numbers have to be finite. Sums are float32's; as in PyTorch's own kernels, denormals count as
// zero.
#pragma once

#include "../simd/transpose.h"
#include "conv_relu_max_pool.h"
#include "gemm.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class E>
constexpr bool kIsPair = false;
template <>
constexpr bool kIsPair<bfloat16x2> = true;
template <class E>
constexpr bool kStartsPair = false;
template <>
constexpr bool kStartsPair<FirstOfPair> = true;
template <class E>
constexpr bool kIsOfMatrix = false;
template <>
constexpr bool kIsOfMatrix<MatrixNumber> = true;
template <class E>
constexpr bool kIsOfFloats = false;
template <>
constexpr bool kIsOfFloats<FourFloats> = true;
// Channels of an element.
template <class E>
constexpr int kChannels = kIsOfFloats<E> ? 4
                          : kIsPair<E>   ? 2
                                         : 1;
// Vectors of a tile's sums, and of the weight, that make a vector of output channels.
template <class E>
constexpr int kSums = kIsOfFloats<E> ? 2 : 1;
// Whether the tile has single numbers, channels last, that are multiplied in runs.
template <class E>
constexpr bool kIsOfRun = kStartsPair<E> || kIsOfMatrix<E>;

// The weight's elements that those of a tile are multiplied by.
template <class E>
struct WeightOf {
  using Type = E;
};
template <>
struct WeightOf<FirstOfPair> {
  using Type = bfloat16x2;
};
template <>
struct WeightOf<MatrixNumber> {
  using Type = bfloat16x2;
};
template <>
struct WeightOf<FourFloats> {
  using Type = float;
};
template <class E>
using Weight = typename WeightOf<E>::Type;

// Whether there are FourFloats for inputs of type T: where vectors are long enough. And whether outputs fit into their
// sums.
template <class T>
constexpr bool kHasFloats = false;
template <>
constexpr bool kHasFloats<float> = FASTNN_VECTOR_BYTES > 16;
FASTNN_INLINE bool floats_apply(const ConvPoolGeometry& g) {
  using E = FourFloats;
  return g.out_channels <= kSums<E> * kLanes<float> / kChannels<E> && g.in_channels > kChannels<E> / 2;
}

// Whether inputs of type T can be multiplied in pairs, as far as the compiler knows; isa_multiplies_pairs knows the
// rest.
template <class T>
constexpr bool kHasPairs = false;
template <>
constexpr bool kHasPairs<bfloat16> = kMultipliesPairs;

// Backward's runs of bfloat16 are zipped with each other where pairs are multiplied: else they are widened.
template <class T, bool has_pairs = kHasPairs<T>>
struct ElementOfRuns {
  using Type = Compute<T>;
};
template <class T>
struct ElementOfRuns<T, true> {
  using Type = T;
};
template <class T>
using RunElement = typename ElementOfRuns<T>::Type;
template <class E>
constexpr bool kZipsRuns = kHasPairs<E>;
// Vectors of sums that belong to a vector of a run.
template <class E>
constexpr int kSumVectors = kZipsRuns<E> ? 2 : 1;

// The problem as a tile of elements E has it.
template <class E>
FASTNN_INLINE ConvPoolGeometry tile_geometry(ConvPoolGeometry g) {
  g.in_channels = divide_up(g.in_channels, kChannels<E>);
  return g;
}

// Numbers in a row of the kernel.
FASTNN_INLINE int64_t row_run(const ConvPoolGeometry& g) {
  return g.kernel[2] * g.in_channels;
}
// How many products make an output. `g` counts elements E.
template <class E>
FASTNN_INLINE int64_t product_depth(const ConvPoolGeometry& g) {
  return kStartsPair<E> ? g.kernel[0] * g.kernel[1] * divide_up(row_run(g), 2) : g.depth();
}

// Whether a row of the kernel, of more than one column, is one run of numbers.
constexpr int64_t kMostRowRun = 256;
FASTNN_INLINE bool has_row_runs(const ConvPoolGeometry& g) {
  return g.kernel[2] > 1 && g.dilation[2] == 1 && row_run(g) <= kMostRowRun;
}
// Where rows of the kernel take fewer products in pairs than channels do.
FASTNN_INLINE bool row_pairs_apply(const ConvPoolGeometry& g) {
  return g.in_channels % 2 != 0 && has_row_runs(g);
}

// Whether the last of them end beyond the row.
FASTNN_INLINE bool row_pairs_reach_beyond(const ConvPoolGeometry& g) {
  return row_run(g) % 2 != 0;
}

// Whether an element's channels lie side by side, to be read there, and their strides. `g` counts single channels.
template <class E>
FASTNN_INLINE bool lies_in_elements(const ConvPoolGeometry& g, const ConvLayout& input) {
  const auto is_whole = [](int64_t channels) { return channels % kChannels<E> == 0; };
  return input.c == 1 && is_whole(g.in_channels) && is_whole(input.n) && is_whole(input.d[0]) && is_whole(input.d[1]) &&
         is_whole(input.d[2]);
}
template <class E>
FASTNN_INLINE ConvLayout tile_layout(const ConvLayout& input) {
  constexpr int64_t count = kChannels<E>;
  return {input.n / count, input.c, {input.d[0] / count, input.d[1] / count, input.d[2] / count}};
}

// An element of the tile by a vector of the weight's.
template <class C>
FASTNN_INLINE Vec<C> broadcast_element(const C* x) {
  return broadcast<C>(*x);
}
template <class E>
FASTNN_INLINE Vec<Compute<E>> add_products(Vec<Compute<E>> x, Vec<Compute<E>> y, Vec<Compute<E>> z) {
  return multiply_add(x, y, z);
}

#if defined(__AVX2__)
FASTNN_INLINE Vec<float> broadcast_element(const FourFloats* x) {
  const __m128 four = _mm_loadu_ps(x->channel);
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_broadcast_f32x4(four);
#else
  return (Vec<float>)_mm256_set_m128(four, four);
#endif
}
#endif

// The sums of each output's four lanes, in half of the vector.
template <class V>
FASTNN_INLINE V add_channels(V x, V y) {
  const V sums = every_second<float>(x, y) + every_second<float, 1>(x, y);
  return every_second<float>(sums, sums) + every_second<float, 1>(sums, sums);
}

// What elements E consist of, and how many of these a vector has.
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
template <class E>
constexpr int kNumbers = kIsPair<E> ? 2 * kLanes<Compute<E>> : kLanes<Compute<E>>;

// The operands of dot products: a vector's `count` first numbers, the others zero, or -0 where they are to add nothing
// to -0.
template <class E, class T>
FASTNN_INLINE Vec<Compute<E>> load_numbers(const T* from) {
  return load(from);
}
template <class E, class T>
FASTNN_INLINE Vec<Compute<E>> load_numbers(const T* from, int count) {
  return load_partial<T>(from, count);
}
template <class E>
FASTNN_INLINE Vec<Compute<E>> negative_zeros_beyond(int count) {
  using C = Compute<E>;
  C lanes[kLanes<C>] = {};
  for (int i = count; i < kLanes<C>; ++i) lanes[i] = -C(0);
  return load(lanes);
}

// From one pixel to the next, where channels come last. Pixels whole kilobytes apart would meet in few of the cache's
// sets: these get a line in between.
template <class E>
FASTNN_INLINE int64_t spread_pixel(int64_t elements) {
  constexpr int64_t kCrowded = 1024, kLine = 64, size = sizeof(E);
  return elements + (elements * size % kCrowded == 0 ? kLine / size : 0);
}
template <class E>
FASTNN_INLINE int64_t tile_pixel(int64_t elements) {
  return kIsOfRun<E> || kIsOfMatrix<E> ? elements : spread_pixel<E>(elements);
}

// `count` columns' channels -> to, `pitch` numbers for each, zeros behind them.
template <class T>
void bring_channels_together(const T* from, const ConvLayout& layout, int64_t channels, int64_t count, T* to,
                             int64_t pitch) {
  const int64_t bytes = channels * static_cast<int64_t>(sizeof(T));
  if (count <= 0) return;
  const bool apart = channels > 1 && layout.c != 1;
  if (!apart && layout.d[2] == channels && pitch == channels) {
    __builtin_memcpy(to, from, count * bytes);
    return;
  }
  if constexpr (sizeof(T) == sizeof(float)) {  // as many instructions as vectors
    for (; !apart && count > 0; --count, from += layout.d[2], to += pitch) {
      for (int64_t c = 0; c < pitch; c += kLanes<T>) {
        store_up_to<T>(to + c, c < channels ? load_up_to<T>(from + c, channels - c) : Vec<T>{}, pitch - c);
      }
    }
  }
  for (int64_t c = channels; c < pitch; ++c) {
    for (int64_t w = 0; w < count; ++w) to[w * pitch + c] = {};
  }
  if (apart) return transpose_strided(from, layout.c, layout.d[2], channels, count, to, pitch);
  for (int64_t w = 0; w < count; ++w) __builtin_memcpy(to + w * pitch, from + w * layout.d[2], bytes);
}
// conv_common.h has these for elements that are single channels.
inline void copy_columns(const float* from, const ConvLayout& layout, int64_t channels, bool, int64_t, int64_t count,
                         FourFloats* to, int64_t pixel) {
  bring_channels_together(from, layout, channels, count, to->channel, kChannels<FourFloats> * pixel);
}

#if defined(__AVX512F__)
template <>
FASTNN_INLINE Vec<float> load_numbers<bfloat16x2, bfloat16>(const bfloat16* from) {
  return load(reinterpret_cast<const float*>(from));
}
template <>
FASTNN_INLINE Vec<float> load_numbers<bfloat16x2, bfloat16>(const bfloat16* from, int count) {
  return load_elements(from, count);
}
template <>
FASTNN_INLINE Vec<float> negative_zeros_beyond<bfloat16x2>(int count) {
  return (Vec<float>)_mm512_maskz_set1_epi16(~first_elements(count), static_cast<int16_t>(0x8000));
}
FASTNN_INLINE Vec<float> broadcast_element(const bfloat16x2* x) {
  return broadcast_pair(*x);
}
FASTNN_INLINE Vec<float> broadcast_element(const FirstOfPair* x) {
  bfloat16x2 pair;
  __builtin_memcpy(&pair, x, sizeof(pair));
  return broadcast_pair(pair);
}
template <>
FASTNN_INLINE Vec<float> add_products<bfloat16x2>(Vec<float> x, Vec<float> y, Vec<float> z) {
  return multiply_add_pairs(x, y, z);
}
template <>
FASTNN_INLINE Vec<float> add_products<FirstOfPair>(Vec<float> x, Vec<float> y, Vec<float> z) {
  return multiply_add_pairs(x, y, z);
}

// The first of each pair.
FASTNN_INLINE Vec<float> first_of_pairs(Vec<float> pairs) {
  return (Vec<float>)((Vec<uint32_t>)pairs << 16);
}

template <int stride>
void zip_strided(const bfloat16* even, const bfloat16* odd, int64_t count, bfloat16x2* to) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const int64_t read = (count - i - 1) * stride + 1;
    const Vec<float> first = load_strided_up_to<stride>(even + i * stride, read);
    const Vec<float> second = odd ? load_strided_up_to<stride>(odd + i * stride, read) : Vec<float>{};
    store_up_to<float>(reinterpret_cast<float*>(to + i), zip_pairs(first, second), count - i);
  }
}
// Every `stride`-th number of two rows, as pairs; `odd` may be null.
inline void zip_runs(const bfloat16* even, const bfloat16* odd, int64_t stride, int64_t count, bfloat16x2* to) {
  switch (stride) {
    case 1:
      return zip_strided<1>(even, odd, count, to);
    case 2:
      return zip_strided<2>(even, odd, count, to);
    case 3:
      return zip_strided<3>(even, odd, count, to);
    case 4:
      return zip_strided<4>(even, odd, count, to);
    default:
      for (int64_t i = 0; i < count; ++i) to[i] = {even[i * stride], odd ? odd[i * stride] : bfloat16{}};
  }
}

// conv_common.h has these for elements that are widened.
inline void copy_run(const bfloat16* from, int64_t stride, int64_t count, bfloat16* to) {
  if (stride == 1) {
    __builtin_memcpy(to, from, count * static_cast<int64_t>(sizeof(bfloat16)));
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
}
inline void copy_columns(const bfloat16* from, const ConvLayout& layout, int64_t channels, bool channels_last,
                         int64_t c, int64_t count, bfloat16* to, int64_t pixel) {
  const int64_t run = channels_last ? channels : 1;
  bring_channels_together(channels_last ? from : from + c * layout.c, layout, run, count, to, pixel);
}
inline void copy_columns(const bfloat16* from, const ConvLayout& layout, int64_t channels, bool channels_last,
                         int64_t c, int64_t count, bfloat16x2* to, int64_t pixel) {
  if (!channels_last) {
    const bfloat16* even = from + 2 * c * layout.c;
    return zip_runs(even, 2 * c + 1 < channels ? even + layout.c : nullptr, layout.d[2], count, to);
  }
  bring_channels_together(from, layout, channels, count, reinterpret_cast<bfloat16*>(to), 2 * pixel);
}
inline void copy_columns(const bfloat16* from, const ConvLayout& layout, int64_t channels, bool channels_last,
                         int64_t c, int64_t count, FirstOfPair* to, int64_t pixel) {
  copy_columns(from, layout, channels, channels_last, c, count, reinterpret_cast<bfloat16*>(to), pixel);
}
inline void copy_columns(const bfloat16* from, const ConvLayout& layout, int64_t channels, bool channels_last,
                         int64_t c, int64_t count, MatrixNumber* to, int64_t pixel) {
  copy_columns(from, layout, channels, channels_last, c, count, reinterpret_cast<bfloat16*>(to), pixel);
}
#endif

}  // namespace FASTNN_ISA
}  // namespace fastnn
