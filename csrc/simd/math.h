// Packed exp, tanh and sigmoid, for float and double. Include only from csrc/kernels.
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
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  // exp(r) on |r| <= ln2/2, Taylor with the last terms adjusted (Cephes expf).
  static constexpr int degree = 7;
  static constexpr float polynomial[] = {1.9875691500e-4f,
                                         1.3981999507e-3f,
                                         8.3334519073e-3f,
                                         4.1665795894e-2f,
                                         1.6666665459e-1f,
                                         5.0000001201e-1f,
                                         1.0f,
                                         1.0f};
};
template <>
struct ExpConstants<double> {
  using Integer = int64_t;
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double smallest = -746.0, largest = 710.0;
  static constexpr double ln2_high = 0.69314718036912381649, ln2_low = 1.90821492927058770002e-10;
  static constexpr double round_to_integer = 6755399441055744.0;
  // exp(r) on |r| <= ln2/2: Taylor to the 13th power is below half an ulp there.
  static constexpr int degree = 13;
  static constexpr double polynomial[] = {1.0 / 6227020800.0,
                                          1.0 / 479001600.0,
                                          1.0 / 39916800.0,
                                          1.0 / 3628800.0,
                                          1.0 / 362880.0,
                                          1.0 / 40320.0,
                                          1.0 / 5040.0,
                                          1.0 / 720.0,
                                          1.0 / 120.0,
                                          1.0 / 24.0,
                                          1.0 / 6.0,
                                          0.5,
                                          1.0,
                                          1.0};
};

// 2^n for a vector of integers held as T, n in the normal range of exponents.
template <class T>
FASTNN_INLINE Vec<T> power_of_two(Vec<typename ExpConstants<T>::Integer> n) {
  using K = ExpConstants<T>;
  return (Vec<T>)((n + K::bias) << K::mantissa_bits);
}

template <class T>
FASTNN_INLINE Vec<T> exp_of(Vec<T> x) {
  using K = ExpConstants<T>;
  using Integer = typename K::Integer;
  const Vec<T> low = broadcast<T>(K::smallest), high = broadcast<T>(K::largest);
  Vec<T> bounded = x < low ? low : x;  // NaN stays
  bounded = bounded > high ? high : bounded;
  const Vec<T> shifted = bounded * T(1.4426950408889634074) + K::round_to_integer;
  const Vec<T> whole = shifted - K::round_to_integer;
  const Vec<T> rest = (bounded - whole * K::ln2_high) - whole * K::ln2_low;
  Vec<T> value = broadcast<T>(K::polynomial[0]);
#pragma GCC unroll 16
  for (int i = 1; i <= K::degree; ++i) value = value * rest + K::polynomial[i];
  const Vec<Integer> n = (Vec<Integer>)shifted - (Vec<Integer>)broadcast<T>(K::round_to_integer);
  // Two factors, since n itself may lie outside the exponents of normal numbers.
  const Vec<Integer> half = n >> 1;
  return value * power_of_two<T>(half) * power_of_two<T>(n - half);
}

template <class T>
FASTNN_INLINE Vec<T> sigmoid_of(Vec<T> x) {
  return T(1) / (T(1) + exp_of<T>(-x));
}

// Near 0 the odd Taylor series, elsewhere 1 - 2 / (exp(2|x|) + 1): the latter cancels near 0.
template <class T>
FASTNN_INLINE Vec<T> tanh_of(Vec<T> x) {
  const Vec<T> magnitude = x < Vec<T>{} ? -x : x;
  const Vec<T> far = T(1) - T(2) / (exp_of<T>(magnitude + magnitude) + T(1));
  const Vec<T> signed_far = x < Vec<T>{} ? -far : far;
  const Vec<T> s = x * x;
  if constexpr (sizeof(T) == sizeof(float)) {
    // Minimax on [-0.625, 0.625] (Cephes tanhf).
    const Vec<T> p =
        ((((s * -5.70498872745e-3f + 2.06390887954e-2f) * s - 5.37397155531e-2f) * s + 1.33314422036e-1f) * s -
         3.33332819422e-1f);
    const Vec<T> near = p * s * x + x;
    return magnitude < broadcast<T>(0.625f) ? near : signed_far;
  } else {
    // Rational on [-0.625, 0.625] (Cephes tanh).
    const Vec<T> p = (s * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * s - 1.61468768441708447952e3;
    const Vec<T> q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3;
    const Vec<T> near = x * s * (p / q) + x;
    return magnitude < broadcast<T>(0.625) ? near : signed_far;
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
