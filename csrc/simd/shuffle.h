// Movement between lanes: transposes and sums over several vectors at once. Include only from csrc/kernels.
#pragma once

#include "vec.h"

namespace fastnn {
namespace FASTNN_ISA {

template <int... index>
struct Indices {};
template <int count, int... index>
struct CountUp : CountUp<count - 1, count - 1, index...> {};
template <int... index>
struct CountUp<0, index...> {
  using Type = Indices<index...>;
};

// x0 y0 x1 y1 ... of the lanes from `first` on: half of each.
template <class T, int first, int... lane>
FASTNN_INLINE Vec<T> zip(Vec<T> x, Vec<T> y, Indices<lane...>) {
  constexpr int lanes = sizeof...(lane);
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, y, (first + lane / 2 + lane % 2 * lanes)...);
#else
  using Integer = typename IntegerOf<T>::Type;
  return __builtin_shuffle(x, y, Vec<Integer>{(first + lane / 2 + lane % 2 * lanes)...});
#endif
}
template <class T>
FASTNN_INLINE Vec<T> zip_low(Vec<T> x, Vec<T> y) {
  return zip<T, 0>(x, y, typename CountUp<kLanes<T>>::Type{});
}
template <class T>
FASTNN_INLINE Vec<T> zip_high(Vec<T> x, Vec<T> y) {
  return zip<T, kLanes<T> / 2>(x, y, typename CountUp<kLanes<T>>::Type{});
}

// x0 x2 ... y0 y2 ... from lane `first` of each on
template <class T, int first, int... lane>
FASTNN_INLINE Vec<T> every_second(Vec<T> x, Vec<T> y, Indices<lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, y, (2 * lane + first)...);
#else
  using Integer = typename IntegerOf<T>::Type;
  return __builtin_shuffle(x, y, Vec<Integer>{(2 * lane + first)...});
#endif
}
template <class T, int first = 0>
FASTNN_INLINE Vec<T> every_second(Vec<T> x, Vec<T> y) {
  return every_second<T, first>(x, y, typename CountUp<kLanes<T>>::Type{});
}

// A vector of every second of `count` elements; those beyond are not read.
template <class T, class C = Compute<T>>
FASTNN_INLINE Vec<C> load_every_second_up_to(const T* from, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(bfloat16)) {  // the upper halves of floats
    return (Vec<float>)_mm512_slli_epi32((__m512i)load_elements(from, count), 16);
  }
#endif
  constexpr int lanes = kLanes<C>;
  const Vec<C> behind = count > lanes ? load_up_to<T>(from + lanes, count - lanes) : Vec<C>{};
  return every_second<C>(load_up_to<T>(from, count), behind);
}

// Transposes a square of lanes in place: zipping row i with row i + half, log2(lanes) times over.
template <class T>
FASTNN_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int half = kLanes<T> / 2;
#pragma GCC unroll 4
  for (int round = 1; round < kLanes<T>; round *= 2) {
    Vec<T> next[kLanes<T>];
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      next[2 * i] = zip_low<T>(rows[i], rows[i + half]);
      next[2 * i + 1] = zip_high<T>(rows[i], rows[i + half]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) rows[i] = next[i];
  }
}

#if defined(__AVX512F__)
// Zips within the quarters of vectors first, which takes half as long as zipping across them, and then moves quarters.
template <>
FASTNN_INLINE void transpose<float>(Vec<float> (&rows)[kLanes<float>]) {
  __m512 x[16], y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    x[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    x[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int row = i / 2 * 4 + i % 2;
    y[2 * i] = (__m512)_mm512_unpacklo_pd((__m512d)x[row], (__m512d)x[row + 2]);
    y[2 * i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)x[row], (__m512d)x[row + 2]);
  }
  constexpr int even = 0x88, odd = 0xdd;  // quarters of each operand
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_f32x4(y[i], y[4 + i], even);
    x[4 + i] = _mm512_shuffle_f32x4(y[i], y[4 + i], odd);
    x[8 + i] = _mm512_shuffle_f32x4(y[8 + i], y[12 + i], even);
    x[12 + i] = _mm512_shuffle_f32x4(y[8 + i], y[12 + i], odd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    rows[i] = (Vec<float>)_mm512_shuffle_f32x4(x[i], x[8 + i], even);
    rows[8 + i] = (Vec<float>)_mm512_shuffle_f32x4(x[i], x[8 + i], odd);
  }
}
#endif

#if defined(FASTNN_HAS_PAIRS)
// Makes pairs of a bfloat16 of x and one of y: of those in the first half of each 16 bytes. zip_quarters_high takes
// those in the second half.
FASTNN_INLINE Vec<float> zip_quarters_low(Vec<float> x, Vec<float> y) {
#if defined(__aarch64__)
  return (Vec<float>)vzip1q_u16((uint16x8_t)x, (uint16x8_t)y);
#else
  return (Vec<float>)_mm512_unpacklo_epi16((__m512i)x, (__m512i)y);
#endif
}
FASTNN_INLINE Vec<float> zip_quarters_high(Vec<float> x, Vec<float> y) {
#if defined(__aarch64__)
  return (Vec<float>)vzip2q_u16((uint16x8_t)x, (uint16x8_t)y);
#else
  return (Vec<float>)_mm512_unpackhi_epi16((__m512i)x, (__m512i)y);
#endif
}
// Orders each vector of `count` numbers so that zip_quarters_low takes its first half in order, and zip_quarters_high
// its second.
inline void order_for_zip([[maybe_unused]] bfloat16* numbers, [[maybe_unused]] int64_t count) {
#if defined(__AVX512F__)  // elsewhere a vector has one quarter, which is in order as it is
  constexpr int lanes = 2 * kLanes<float>;
  uint16_t order[lanes];
  for (int i = 0; i < lanes; ++i) {
    order[i] = static_cast<uint16_t>(i / 8 * 4 + i % 4 + (i % 8 < 4 ? 0 : lanes / 2));
  }
  const __m512i places = _mm512_loadu_si512(order);
  for (int64_t i = 0; i < count; i += lanes) {
    _mm512_storeu_si512(numbers + i, _mm512_permutexvar_epi16(places, _mm512_loadu_si512(numbers + i)));
  }
#endif
}
#endif

// Lane i of the result is the sum of the lanes of rows[i]: the transpose, added up on the way.
template <class T, int count>
FASTNN_INLINE Vec<T> sum_each(const Vec<T> (&rows)[count]) {
  if constexpr (count == 1) {
    return rows[0];
  } else {
    Vec<T> next[count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) {
      next[i] = zip_low<T>(rows[i], rows[i + count / 2]) + zip_high<T>(rows[i], rows[i + count / 2]);
    }
    return sum_each<T, count / 2>(next);
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each subset of eight lanes, a list that begins with the lanes of the subset.
struct LaneLists {
  uint8_t lane[256][8];
  constexpr LaneLists() : lane{} {
    for (int set = 0; set < 256; ++set) {
      int count = 0;
      for (int i = 0; i < 8; ++i) {
        if (set >> i & 1) lane[set][count++] = static_cast<uint8_t>(i);
      }
    }
  }
};
static constexpr LaneLists kLaneLists;
#endif

// Appends the lanes of x that are not zero to one list, and the same lanes of y to another. Returns how many they are.
// Up to a whole vector behind the ends of the lists is overwritten.
template <class T, class Integer = typename IntegerOf<T>::Type>
FASTNN_INLINE int append_nonzero(Vec<T> x, Vec<Integer> y, T* to_x, Integer* to_y) {
  int count = 0;
  for (int i = 0; i < kLanes<T>; ++i) {
    to_x[count] = x[i];
    to_y[count] = y[i];
    count += x[i] != T(0);
  }
  return count;
}
#if defined(__AVX512F__)
template <>
FASTNN_INLINE int append_nonzero<float>(Vec<float> x, Vec<int32_t> y, float* to_x, int32_t* to_y) {
  const __mmask16 set = _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  _mm512_storeu_ps(to_x, _mm512_maskz_compress_ps(set, (__m512)x));
  _mm512_storeu_si512(to_y, _mm512_maskz_compress_epi32(set, (__m512i)y));
  return __builtin_popcount(set);
}
template <>
FASTNN_INLINE int append_nonzero<double>(Vec<double> x, Vec<int64_t> y, double* to_x, int64_t* to_y) {
  const __mmask8 set = _mm512_cmp_pd_mask((__m512d)x, _mm512_setzero_pd(), _CMP_NEQ_UQ);
  _mm512_storeu_pd(to_x, _mm512_maskz_compress_pd(set, (__m512d)x));
  _mm512_storeu_si512(to_y, _mm512_maskz_compress_epi64(set, (__m512i)y));
  return __builtin_popcount(set);
}
#elif defined(__AVX2__)
template <>
FASTNN_INLINE int append_nonzero<float>(Vec<float> x, Vec<int32_t> y, float* to_x, int32_t* to_y) {
  const int set = _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_NEQ_UQ));
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneLists.lane[set])));
  _mm256_storeu_ps(to_x, _mm256_permutevar8x32_ps((__m256)x, lanes));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_y), _mm256_permutevar8x32_epi32((__m256i)y, lanes));
  return __builtin_popcount(static_cast<unsigned>(set));
}
#endif

#if defined(FASTNN_HAS_PAIRS)
// The same for two lists of which the first is bfloat16: the lanes of x must be numbers that bfloat16 has.
FASTNN_INLINE int append_nonzero(Vec<float> x, Vec<int32_t> y, bfloat16* to_x, int32_t* to_y) {
#if defined(__AVX512F__)
  const __mmask16 set = _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  const __m512i bits = _mm512_maskz_compress_epi32(set, (__m512i)x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_x), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  _mm512_storeu_si512(to_y, _mm512_maskz_compress_epi32(set, (__m512i)y));
  return __builtin_popcount(set);
#else
  int count = 0;
  for (int i = 0; i < kLanes<float>; ++i) {
    to_x[count] = from_compute<bfloat16>(x[i]);
    to_y[count] = y[i];
    count += x[i] != 0.0f;
  }
  return count;
#endif
}
#endif

}  // namespace FASTNN_ISA
}  // namespace fastnn
