// Pairs of channels as elements of the tile and of the weight, for bfloat16 where one instruction multiplies two.
//
// An odd last channel has a zero beside it. Sums are float32's; as in PyTorch's own kernels, denormals count as zero.
#pragma once

#include "conv_relu_max_pool.h"
#include "gemm.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class E>
constexpr bool kIsPair = false;
template <>
constexpr bool kIsPair<bfloat16x2> = true;

// Whether inputs of type T can be multiplied in pairs, as far as the compiler knows; isa_multiplies_pairs knows the
// rest.
template <class T>
constexpr bool kHasPairs = false;
template <>
constexpr bool kHasPairs<bfloat16> = kMultipliesPairs;

// The problem as a tile of elements E has it.
template <class E>
FASTNN_INLINE ConvPoolGeometry tile_geometry(ConvPoolGeometry g) {
  if (kIsPair<E>) g.in_channels = divide_up(g.in_channels, 2);
  return g;
}

// Whether the input's pairs lie side by side, to be read there, and their strides. `g` counts single channels.
FASTNN_INLINE bool lies_in_pairs(const ConvPoolGeometry& g, const ConvLayout& input) {
  return input.c == 1 && g.in_channels % 2 == 0 && input.n % 2 == 0 && input.d[0] % 2 == 0 && input.d[1] % 2 == 0 &&
         input.d[2] % 2 == 0;
}
template <class E>
FASTNN_INLINE ConvLayout tile_layout(const ConvLayout& input) {
  if (!kIsPair<E>) return input;
  return {input.n / 2, input.c, {input.d[0] / 2, input.d[1] / 2, input.d[2] / 2}};
}

// An element of the tile by a vector of the weight's.
template <class C>
FASTNN_INLINE Vec<C> broadcast_element(C x) {
  return broadcast<C>(x);
}
template <class E>
FASTNN_INLINE Vec<Compute<E>> add_products(Vec<Compute<E>> x, Vec<Compute<E>> y, Vec<Compute<E>> z) {
  return multiply_add(x, y, z);
}

#if defined(__AVX512F__)
FASTNN_INLINE Vec<float> broadcast_element(bfloat16x2 x) {
  return broadcast_pair(x);
}
template <>
FASTNN_INLINE Vec<float> add_products<bfloat16x2>(Vec<float> x, Vec<float> y, Vec<float> z) {
  return multiply_add_pairs(x, y, z);
}

// `odd` may be null.
inline void zip_runs(const bfloat16* even, const bfloat16* odd, int64_t stride, int64_t count, bfloat16x2* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      const int64_t left = count - i;
      const Vec<float> second = odd ? load_up_to<bfloat16>(odd + i, left) : Vec<float>{};
      store_up_to<float>(reinterpret_cast<float*>(to + i), zip_pairs(load_up_to<bfloat16>(even + i, left), second),
                         left);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = {even[i * stride], odd ? odd[i * stride] : bfloat16{}};
}

// conv_tile.h has the same for single channels.
inline void copy_columns(const bfloat16* from, const ConvLayout& layout, int64_t channels, bool channels_last,
                         int64_t c, int64_t count, bfloat16x2* to) {
  if (!channels_last) {
    const bfloat16* even = from + 2 * c * layout.c;
    return zip_runs(even, 2 * c + 1 < channels ? even + layout.c : nullptr, layout.d[2], count, to);
  }
  const int64_t pairs = divide_up(channels, 2), bytes = channels * static_cast<int64_t>(sizeof(bfloat16));
  if (channels % 2 == 0 && layout.d[2] == channels) {
    if (count > 0) __builtin_memcpy(to, from, count * bytes);
    return;
  }
  for (int64_t w = 0; w < count; ++w) {
    to[w * pairs + pairs - 1].odd = {};
    __builtin_memcpy(to + w * pairs, from + w * layout.d[2], bytes);
  }
}
#endif

}  // namespace FASTNN_ISA
}  // namespace fastnn
