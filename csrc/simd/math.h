// Packed exp, tanh and sigmoid, for float and double, on one vector or several in lockstep; and sin, cos and some
// logarithms on one vector. Include only from csrc/kernels.
//
// float: at most 4 ULP, over all 2^32 arguments (benchmarks/sweep_math.py). NaN in, NaN out.
#pragma once

#include <math.h>

#include "lockstep.h"

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

// exp(x) = 2^n (1 + fraction), |fraction| < 0.42; n is what `shifted` is above round_to_integer.
template <class T, int count>
struct ExpParts {
  Lockstep<T, count> shifted, fraction;
};

template <class T, int count>
FASTNN_INLINE ExpParts<T, count> exp_parts(const Lockstep<T, count>& x) {
  using K = ExpConstants<T>;
  const Lockstep<T, count> shifted = x * T(1.4426950408889634074) + K::round_to_integer;
  const Lockstep<T, count> n = shifted - K::round_to_integer;
  const Lockstep<T, count> rest = (x - n * K::ln2_high) - n * K::ln2_low;
  Lockstep<T, count> value = rest * K::polynomial[0] + K::polynomial[1];
#pragma GCC unroll 16
  for (int i = 2; i < K::terms; ++i) value = value * rest + K::polynomial[i];
  return {shifted, value * (rest * rest) + rest};
}

// 2^n, where n is in the normal range of exponents; and x times 2^n, where n is any that exp can have.
#if defined(__AVX512F__)
FASTNN_INLINE Vec<float> times_power_of_two(Vec<float> x, Vec<float> shifted) {
  return (Vec<float>)_mm512_scalef_ps((__m512)x, (__m512)(shifted - ExpConstants<float>::round_to_integer));
}
FASTNN_INLINE Vec<double> times_power_of_two(Vec<double> x, Vec<double> shifted) {
  return (Vec<double>)_mm512_scalef_pd((__m512d)x, (__m512d)(shifted - ExpConstants<double>::round_to_integer));
}
template <class T>
FASTNN_INLINE Vec<T> power_of_two(Vec<T> shifted) {
  return times_power_of_two(broadcast<T>(1), shifted);
}
#else
template <class T>
using IntegersOf = Vec<typename ExpConstants<T>::Integer>;
template <class T>
FASTNN_INLINE IntegersOf<T> exponent_of(Vec<T> shifted) {
  return (IntegersOf<T>)shifted - (IntegersOf<T>)broadcast<T>(ExpConstants<T>::round_to_integer);
}
template <class T>
FASTNN_INLINE Vec<T> with_exponent(IntegersOf<T> n) {
  return (Vec<T>)((n + ExpConstants<T>::bias) << ExpConstants<T>::mantissa_bits);
}
template <class T>
FASTNN_INLINE Vec<T> power_of_two(Vec<T> shifted) {
  return with_exponent<T>(exponent_of<T>(shifted));
}
template <class T>
FASTNN_INLINE Vec<T> times_power_of_two_of(Vec<T> x, Vec<T> shifted) {
  // Two factors, since n itself may lie outside the exponents of normal numbers.
  const IntegersOf<T> n = exponent_of<T>(shifted), half = n >> 1;
  return x * with_exponent<T>(half) * with_exponent<T>(n - half);
}
FASTNN_INLINE Vec<float> times_power_of_two(Vec<float> x, Vec<float> shifted) {
  return times_power_of_two_of<float>(x, shifted);
}
FASTNN_INLINE Vec<double> times_power_of_two(Vec<double> x, Vec<double> shifted) {
  return times_power_of_two_of<double>(x, shifted);
}
#endif

// x limited to [low, high]. NaN stays.
template <class V, class T>
FASTNN_INLINE V at_least(V x, T low) {
  return larger_of(broadcast<T>(low), x);
}
template <class V, class T>
FASTNN_INLINE V at_most(V x, T high) {
  return smaller_of(broadcast<T>(high), x);
}

template <class T, int n>
FASTNN_INLINE Lockstep<T, n> bounded(const Lockstep<T, n>& x, T low, T high) {
  return each([=](Vec<T> a) __attribute__((always_inline)) { return at_most(at_least(a, low), high); }, x);
}

template <class T, int n>
FASTNN_INLINE Lockstep<T, n> assemble(const ExpParts<T, n>& parts) {
  return each([](Vec<T> a, Vec<T> shifted) __attribute__((always_inline)) { return times_power_of_two(a, shifted); },
              parts.fraction + T(1), parts.shifted);
}

template <class T>
FASTNN_INLINE Vec<T> exp_of(Vec<T> x) {
  using K = ExpConstants<T>;
  return assemble(exp_parts(bounded(Lockstep<T, 1>{{x}}, K::smallest, K::largest))).part[0];
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
template <class T>
FASTNN_INLINE Vec<T> with_sign_of(Vec<T> magnitude, Vec<T> x) {
  using Bits = Vec<typename ExpConstants<T>::Integer>;
  return (Vec<T>)((Bits)magnitude | ((Bits)x & (Bits)sign_bit<T>()));
}

// e / (1 + e) with e = exp(x): small results keep their relative accuracy.
template <class T, int n>
FASTNN_INLINE Lockstep<T, n> sigmoid_of(const Lockstep<T, n>& x) {
  using K = ExpConstants<T>;
  const Lockstep<T, n> e = assemble(exp_parts(bounded(x, K::smallest, K::sigmoid_is_one)));
  return e / (e + T(1));
}
template <class T>
FASTNN_INLINE Vec<T> sigmoid_of(Vec<T> x) {
  return sigmoid_of(Lockstep<T, 1>{{x}}).part[0];
}

// With m = exp(2|x|) - 1: m / (m + 2) below 1/2, which keeps its relative accuracy towards 0, and 1 - 2 / (m + 2)
// above, which keeps that of 1 - tanh(x)^2.
template <class T, int n>
FASTNN_INLINE Lockstep<T, n> tanh_of(const Lockstep<T, n>& x) {
  using K = ExpConstants<T>;
  constexpr T half = T(0.5493);  // its tanh is 1/2
  const auto size =
      each([](Vec<T> a) __attribute__((always_inline)) { return at_most(magnitude_of<T>(a), K::tanh_is_one); }, x);
  const ExpParts<T, n> parts = exp_parts(size + size);
  const auto scale = each([](Vec<T> a) __attribute__((always_inline)) { return power_of_two<T>(a); }, parts.shifted);
  const Lockstep<T, n> m = parts.fraction * scale + (scale - T(1));
  const auto dividend =
      each([](Vec<T> a, Vec<T> s)
               __attribute__((always_inline)) { return Vec<T>(s < broadcast<T>(half) ? a : broadcast<T>(2)); },
           m, size);
  const Lockstep<T, n> quotient = dividend / (m + T(2));
  return each([](Vec<T> q, Vec<T> s, Vec<T> a)
                  __attribute__((always_inline)) { return with_sign_of<T>(s < broadcast<T>(half) ? q : T(1) - q, a); },
              quotient, size, x);
}
template <class T>
FASTNN_INLINE Vec<T> tanh_of(Vec<T> x) {
  return tanh_of(Lockstep<T, 1>{{x}}).part[0];
}

// An angle x as `quarters` quarter turns and a rest of at most pi/4: x = quarters * pi/2 + rest. |x| is at most
// kLargestAngle, so that quarters times the first part of pi/2 is exact. A float's rest is computed in double, where
// two parts of pi/2 leave no error that a float could show; a double's rest takes three parts.
constexpr double kLargestAngle = 1e5;
template <class T>
struct QuarterTurns {
  Vec<T> rest;
  Vec<typename ExpConstants<T>::Integer> quarters;
};
FASTNN_INLINE QuarterTurns<float> quarter_turns_of(Vec<float> x) {
  typedef double Wide __attribute__((vector_size(2 * FASTNN_VECTOR_BYTES)));
  constexpr double shift = ExpConstants<double>::round_to_integer;
  const Wide angle = __builtin_convertvector(x, Wide);
  const Wide n = (angle * 0.63661977236758134308 + shift) - shift;
  const Wide rest = (angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
  return {__builtin_convertvector(rest, Vec<float>), __builtin_convertvector(n, Vec<int32_t>)};
}
FASTNN_INLINE QuarterTurns<double> quarter_turns_of(Vec<double> x) {
  constexpr double shift = ExpConstants<double>::round_to_integer;
  const Vec<double> shifted = x * 0.63661977236758134308 + shift, n = shifted - shift;
  const Vec<double> rest = ((x - n * 1.57079632673412561417) - n * 6.07710050630396597660e-11);
  // The lowest bits of `shifted` are those of the integer n.
  return {rest - n * 2.02226624879595063154e-21, (Vec<int64_t>)shifted};
}

// sin(x + quarters * pi/2) by the C library, a lane at a time: for the angles that quarter_turns_of does not take.
template <class T>
FASTNN_SHARED Vec<T> sin_of_any(Vec<T> x, int quarters) {
  T lanes[kLanes<T>];
  store(lanes, x);
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = static_cast<T>(quarters ? cos(lanes[i]) : sin(lanes[i]));
  return load(lanes);
}

// sin(x + quarters * pi/2), quarters 0 or 1: sin or cos of x. Of the rest, by Taylor: the next power is below half an
// ulp.
template <class T>
FASTNN_INLINE Vec<T> sin_of(Vec<T> x, int quarters) {
  constexpr int terms = sizeof(T) == sizeof(double) ? 8 : 4;
  // (sin(r) - r) / r^3 and (cos(r) - 1 + r^2 / 2) / r^4, lowest power first.
  constexpr T odd_terms[] = {
      T(-1.0 / 6),        T(1.0 / 120),        T(-1.0 / 5040),          T(1.0 / 362880),
      T(-1.0 / 39916800), T(1.0 / 6227020800), T(-1.0 / 1307674368000), T(1.0 / 355687428096000)};
  constexpr T even_terms[] = {
      T(1.0 / 24),        T(-1.0 / 720),         T(1.0 / 40320),          T(-1.0 / 3628800),
      T(1.0 / 479001600), T(-1.0 / 87178291200), T(1.0 / 20922789888000), T(-1.0 / 6402373705728000)};
  const Vec<T> angle = magnitude_of<T>(x) <= broadcast(T(kLargestAngle)) ? x : broadcast(T(NAN));
  if (has_nan<T>(angle)) return sin_of_any<T>(x, quarters);
  const QuarterTurns<T> turns = quarter_turns_of(x);
  const Vec<T> rest = turns.rest, square = rest * rest;
  Vec<T> odd = broadcast(odd_terms[terms - 1]), even = broadcast(even_terms[terms - 1]);
#pragma GCC unroll 8
  for (int i = terms - 2; i >= 0; --i) {
    odd = odd * square + odd_terms[i];
    even = even * square + even_terms[i];
  }
  const Vec<T> sine = with_sign_of<T>(magnitude_of<T>(odd * (square * rest) + rest), rest);  // so that -0 stays
  const Vec<T> cosine = T(1) + square * (even * square - T(0.5));
  const auto quarter = turns.quarters + quarters;
  const Vec<T> value = (quarter & 1) == 0 ? sine : cosine;
  return (quarter & 2) == 0 ? value : -value;
}

// log(1 + x) for x from 0 to 1: 2 atanh(s) of s = x / (2 + x), which is at most 1/3, by its series.
template <class T>
FASTNN_INLINE Vec<T> log1p_of(Vec<T> x) {
  constexpr int terms = sizeof(T) == sizeof(double) ? 16 : 7;  // the next one is below half an ulp
  const Vec<T> s = x / (T(2) + x), square = s * s;
  Vec<T> sum = broadcast<T>(T(1) / (2 * terms + 1));
#pragma GCC unroll 16
  for (int i = terms - 1; i > 0; --i) sum = sum * square + T(1) / (2 * i + 1);
  return T(2) * (s + s * square * sum);
}

// log(x) for finite x from 1 on: the exponent times log(2), and the mantissa's logarithm. NaN in, NaN out.
template <class T>
FASTNN_INLINE Vec<T> log_from_one(Vec<T> x) {
  using K = ExpConstants<T>;
  using Integer = typename K::Integer;
  using Integers = Vec<Integer>;
  constexpr Integer mantissa = (Integer{1} << K::mantissa_bits) - 1;
  const Integers bits = (Integers)x;
  const Vec<T> from_one_to_two = (Vec<T>)((bits & mantissa) | (Integers)broadcast<T>(1));
  const Vec<T> n = __builtin_convertvector((bits >> K::mantissa_bits) - Integer{K::bias}, Vec<T>);
  const Vec<T> logarithm = n * K::ln2_high + (n * K::ln2_low + log1p_of<T>(from_one_to_two - T(1)));
  return x != x ? x : logarithm;
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
