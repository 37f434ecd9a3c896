// Packed exp, tanh and sigmoid, for float and double. Include only from csrc/kernels.
//
// float: at most 4 ULP, over all 2^32 arguments (benchmarks/sweep_math.py). NaN in, NaN out.
#pragma once

#include "vec.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Integer = int32_t;
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float smallest = -104.0f, largest = 89.0f;
  static constexpr float tanh_is_one = 9.1f, sigmoid_is_one = 18.0f;  // from here on they round to 1
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  // (exp(r) - 1 - r) / r^2 on |r| <= ln2/2, minimax in the relative error of exp(r) - 1, highest power first.
  static constexpr int terms = 5;
  static constexpr float polynomial[] = {1.388251628e-3f, 8.366547139e-3f, 4.166720071e-2f, 1.666654342e-1f,
                                         4.999999815e-1f};
};
template <>
struct ExpConstants<double> {
  using Integer = int64_t;
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double smallest = -746.0, largest = 710.0;
  static constexpr double tanh_is_one = 19.1, sigmoid_is_one = 38.0;
  static constexpr double ln2_high = 0.69314718036912381649, ln2_low = 1.90821492927058770002e-10;
  static constexpr double round_to_integer = 6755399441055744.0;
  // The same by Taylor: the power left out is below half an ulp.
  static constexpr int terms = 12;
  static constexpr double polynomial[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                                          1.0 / 362880.0,     1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,
                                          1.0 / 120.0,        1.0 / 24.0,        1.0 / 6.0,        0.5};
};

// exp(x) = 2^n (1 + fraction), |fraction| < 0.42
template <class T>
struct ExpParts {
  Vec<T> n;
  Vec<typename ExpConstants<T>::Integer> n_as_integer;
  Vec<T> fraction;
};

template <class T>
FASTNN_INLINE ExpParts<T> exp_parts(Vec<T> x) {
  using K = ExpConstants<T>;
  using Integer = typename K::Integer;
  const Vec<T> shifted = x * T(1.4426950408889634074) + K::round_to_integer;
  const Vec<T> n = shifted - K::round_to_integer;
  const Vec<T> rest = (x - n * K::ln2_high) - n * K::ln2_low;
  Vec<T> value = broadcast<T>(K::polynomial[0]);
#pragma GCC unroll 16
  for (int i = 1; i < K::terms; ++i) value = value * rest + K::polynomial[i];
  return {n, (Vec<Integer>)shifted - (Vec<Integer>)broadcast<T>(K::round_to_integer), value * (rest * rest) + rest};
}

// 2^n (n in the normal range of exponents), and 2^n (1 + fraction), n anything that exp has.
#if defined(__AVX512F__)
FASTNN_INLINE Vec<float> power_of_two(const ExpParts<float>& parts) {
  return (Vec<float>)_mm512_scalef_ps(_mm512_set1_ps(1), (__m512)parts.n);
}
FASTNN_INLINE Vec<double> power_of_two(const ExpParts<double>& parts) {
  return (Vec<double>)_mm512_scalef_pd(_mm512_set1_pd(1), (__m512d)parts.n);
}
FASTNN_INLINE Vec<float> assemble(const ExpParts<float>& parts) {
  return (Vec<float>)_mm512_scalef_ps((__m512)(parts.fraction + 1.0f), (__m512)parts.n);
}
FASTNN_INLINE Vec<double> assemble(const ExpParts<double>& parts) {
  return (Vec<double>)_mm512_scalef_pd((__m512d)(parts.fraction + 1.0), (__m512d)parts.n);
}
#else
template <class T>
FASTNN_INLINE Vec<T> power_of_two(Vec<typename ExpConstants<T>::Integer> n) {
  using K = ExpConstants<T>;
  return (Vec<T>)((n + K::bias) << K::mantissa_bits);
}
template <class T>
FASTNN_INLINE Vec<T> power_of_two(const ExpParts<T>& parts) {
  return power_of_two<T>(parts.n_as_integer);
}
template <class T>
FASTNN_INLINE Vec<T> assemble(const ExpParts<T>& parts) {
  // Two factors, since n itself may lie outside the exponents of normal numbers.
  const auto half = parts.n_as_integer >> 1;
  return (parts.fraction + T(1)) * power_of_two<T>(half) * power_of_two<T>(parts.n_as_integer - half);
}
#endif

// x, but not below `low` or above `high`. NaN stays.
#if defined(__AVX512F__)
// Where masks have registers of their own, the compiler sees no minimum in a comparison and a choice.
FASTNN_INLINE Vec<float> at_least(Vec<float> x, float low) {
  return (Vec<float>)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
}
FASTNN_INLINE Vec<float> at_most(Vec<float> x, float high) {
  return (Vec<float>)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x);
}
FASTNN_INLINE Vec<double> at_least(Vec<double> x, double low) {
  return (Vec<double>)_mm512_max_pd(_mm512_set1_pd(low), (__m512d)x);
}
FASTNN_INLINE Vec<double> at_most(Vec<double> x, double high) {
  return (Vec<double>)_mm512_min_pd(_mm512_set1_pd(high), (__m512d)x);
}
#else
template <class V, class T>
FASTNN_INLINE V at_least(V x, T low) {
  return x < broadcast<T>(low) ? broadcast<T>(low) : x;
}
template <class V, class T>
FASTNN_INLINE V at_most(V x, T high) {
  return x > broadcast<T>(high) ? broadcast<T>(high) : x;
}
#endif

template <class T>
FASTNN_INLINE Vec<T> exp_of(Vec<T> x) {
  using K = ExpConstants<T>;
  return assemble(exp_parts<T>(at_most(at_least(x, K::smallest), K::largest)));
}

template <class T>
FASTNN_INLINE Vec<T> sign_bit() {
  return broadcast<T>(T(-0.0));
}
template <class T>
FASTNN_INLINE Vec<T> magnitude_of(Vec<T> x) {
  using Bits = Vec<typename ExpConstants<T>::Integer>;
  return (Vec<T>)((Bits)x & ~(Bits)sign_bit<T>());
}

// e / (1 + e) with e = exp(x): small results keep their relative accuracy.
template <class T>
FASTNN_INLINE Vec<T> sigmoid_of(Vec<T> x) {
  using K = ExpConstants<T>;
  const Vec<T> e = assemble(exp_parts<T>(at_most(at_least(x, K::smallest), K::sigmoid_is_one)));
  return e / (e + T(1));
}

// With m = exp(2|x|) - 1: m / (m + 2) below 1/2, which keeps its relative accuracy towards 0, and 1 - 2 / (m + 2)
// above, which keeps that of 1 - tanh(x)^2.
template <class T>
FASTNN_INLINE Vec<T> tanh_of(Vec<T> x) {
  using K = ExpConstants<T>;
  using Bits = Vec<typename K::Integer>;
  const Vec<T> bounded = at_most(magnitude_of<T>(x), K::tanh_is_one);
  const ExpParts<T> parts = exp_parts<T>(bounded + bounded);
  const Vec<T> scale = power_of_two(parts);
  const Vec<T> m = parts.fraction * scale + (scale - T(1));
  const auto below_half = bounded < broadcast<T>(T(0.5493));
  const Vec<T> quotient = (below_half ? m : broadcast<T>(2)) / (m + T(2));
  const Vec<T> value = below_half ? quotient : T(1) - quotient;
  return (Vec<T>)((Bits)value | ((Bits)x & (Bits)sign_bit<T>()));
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
