// The vector type: the widest vector of the instruction set in use, by the compiler's vector extension, so that
// arithmetic is written with operators and works on any target that the compiler knows.
//
// Include only from csrc/kernels (see isa.h for the rules there).
#pragma once

#include <stdint.h>

#include "dtype.h"

#ifndef FASTNN_ISA
#error "compile kernel files with -DFASTNN_ISA=<instruction set>"
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Whether kernels are compiled that multiply pairs, or matrices, of bfloat16. Those of avx512 ask the processor first.
#if defined(__AVX512F__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define FASTNN_HAS_PAIRS
#endif
#if defined(__AVX512F__)
#define FASTNN_HAS_MATRIX
#endif

// The bytes of a vector, and the number of registers that hold one.
#if defined(__AVX512F__)
#define FASTNN_VECTOR_BYTES 64
#define FASTNN_VECTOR_REGISTERS 32
#elif defined(__AVX2__)
#define FASTNN_VECTOR_BYTES 32
#define FASTNN_VECTOR_REGISTERS 16
#elif defined(__aarch64__)
#define FASTNN_VECTOR_BYTES 16
#define FASTNN_VECTOR_REGISTERS 32
#else
#define FASTNN_VECTOR_BYTES 16
#define FASTNN_VECTOR_REGISTERS 16
#endif

#define FASTNN_INLINE inline __attribute__((always_inline))
// For large templates that several callers share: they are compiled once.
#if defined(__clang__)
#define FASTNN_SHARED __attribute__((noinline))
#else
#define FASTNN_SHARED __attribute__((noinline, noclone))
#endif

namespace fastnn {

namespace FASTNN_ISA {

#if defined(FASTNN_HAS_PAIRS)
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = false;
#endif
#if defined(FASTNN_HAS_MATRIX)
constexpr bool kMultipliesMatrices = true;
#else
constexpr bool kMultipliesMatrices = false;
#endif
// Whether there are general registers for a pointer to each row of a tile. Elsewhere rows are reached from one pointer.
#if defined(__aarch64__)
constexpr bool kPointsAtRows = true;
#else
constexpr bool kPointsAtRows = false;
#endif

template <class T>
struct VectorOf;
#define FASTNN_VECTOR_OF(T)                                                                               \
  template <>                                                                                             \
  struct VectorOf<T> {                                                                                    \
    typedef T Type __attribute__((vector_size(FASTNN_VECTOR_BYTES)));                                     \
    typedef T Unaligned __attribute__((vector_size(FASTNN_VECTOR_BYTES), aligned(sizeof(T)), may_alias)); \
  };
FASTNN_VECTOR_OF(float)
FASTNN_VECTOR_OF(double)
FASTNN_VECTOR_OF(int32_t)
FASTNN_VECTOR_OF(int64_t)
FASTNN_VECTOR_OF(uint32_t)
FASTNN_VECTOR_OF(uint64_t)
#undef FASTNN_VECTOR_OF

template <class T>
using Vec = typename VectorOf<T>::Type;

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using Type = int32_t;
};
template <>
struct IntegerOf<double> {
  using Type = int64_t;
};

// Elements of T in a vector. bfloat16 is held as float once loaded, so it counts as float.
template <class T>
constexpr int kLanes = FASTNN_VECTOR_BYTES / sizeof(T);
template <>
inline constexpr int kLanes<bfloat16> = FASTNN_VECTOR_BYTES / sizeof(float);

FASTNN_INLINE float to_compute(float x) {
  return x;
}
FASTNN_INLINE double to_compute(double x) {
  return x;
}
FASTNN_INLINE float to_compute(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class T>
FASTNN_INLINE T from_compute(Compute<T> x) {
  return x;
}
template <>
FASTNN_INLINE bfloat16 from_compute<bfloat16>(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// x - 0, not x + 0: the latter would turn -0 into 0.
template <class T>
FASTNN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
FASTNN_INLINE Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(from);
}
FASTNN_INLINE Vec<float> load(const bfloat16* from) {
#if defined(__AVX512F__)
  // Written as intrinsics, since the compiler widens halves and puts them together.
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#elif defined(__aarch64__)
  return (Vec<float>)vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from)), 16);
#else
  typedef uint16_t Half __attribute__((vector_size(FASTNN_VECTOR_BYTES / 2), aligned(2), may_alias));
  return (Vec<float>)(__builtin_convertvector(*reinterpret_cast<const Half*>(from), Vec<uint32_t>) << 16);
#endif
}

template <class T>
FASTNN_INLINE void store(T* to, Vec<T> x) {
  *reinterpret_cast<typename VectorOf<T>::Unaligned*>(to) = x;
}
typedef uint16_t Halves __attribute__((vector_size(FASTNN_VECTOR_BYTES / 2)));
// Rounded to nearest, ties to even; a NaN stays one.
FASTNN_INLINE Halves to_bfloat16(Vec<float> x) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (Halves)vcvt_bf16_f32((float32x4_t)x);
#else
  const Vec<uint32_t> bits = (Vec<uint32_t>)x;
  const Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vec<uint32_t> nan = (bits >> 16) | 0x40;
  const Vec<uint32_t> result = x == x ? rounded : nan;
  return __builtin_convertvector(result, Halves);
#endif
}
FASTNN_INLINE void store(bfloat16* to, Vec<float> x) {
  typedef uint16_t HalvesTo __attribute__((vector_size(FASTNN_VECTOR_BYTES / 2), aligned(2), may_alias));
  *reinterpret_cast<HalvesTo*>(to) = to_bfloat16(x);
}

template <class T>
FASTNN_INLINE bool has_nan(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q) != 0;
  } else {
    return _mm512_cmp_pd_mask((__m512d)x, (__m512d)x, _CMP_UNORD_Q) != 0;
  }
#else
  T lanes[kLanes<T>];
  store(lanes, x);
  bool found = false;
  for (T lane : lanes) found |= lane != lane;
  return found;
#endif
}

// The first `count` lanes (0 < count < kLanes); the others are zero.
template <class T>
FASTNN_INLINE Vec<Compute<T>> load_partial(const T* from, int count) {
  T lanes[kLanes<T>] = {};
  for (int i = 0; i < count && i < kLanes<T> - 1; ++i) lanes[i] = from[i];  // bounded for the compiler, which warns
  return load(lanes);
}
template <class T>
FASTNN_INLINE void store_partial(T* to, Vec<Compute<T>> x, int count) {
  T lanes[kLanes<T>];
  store(lanes, x);
  for (int i = 0; i < kLanes<T> && i < count; ++i) to[i] = lanes[i];
}

#if defined(__AVX512F__)
template <>
FASTNN_INLINE Vec<float> load_partial<float>(const float* from, int count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
template <>
FASTNN_INLINE Vec<double> load_partial<double>(const double* from, int count) {
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
}
template <>
FASTNN_INLINE void store_partial<float>(float* to, Vec<float> x, int count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)x);
}
template <>
FASTNN_INLINE void store_partial<double>(double* to, Vec<double> x, int count) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), (__m512d)x);
}
template <>
FASTNN_INLINE Vec<float> load_partial<bfloat16>(const bfloat16* from, int count) {
  const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
template <>
FASTNN_INLINE void store_partial<bfloat16>(bfloat16* to, Vec<float> x, int count) {
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), (__m256i)to_bfloat16(x));
}
#elif defined(__AVX2__)
FASTNN_INLINE __m256i first_lanes_32(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTNN_INLINE __m256i first_lanes_64(int count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
template <>
FASTNN_INLINE Vec<float> load_partial<float>(const float* from, int count) {
  return (Vec<float>)_mm256_maskload_ps(from, first_lanes_32(count));
}
template <>
FASTNN_INLINE Vec<double> load_partial<double>(const double* from, int count) {
  return (Vec<double>)_mm256_maskload_pd(from, first_lanes_64(count));
}
template <>
FASTNN_INLINE void store_partial<float>(float* to, Vec<float> x, int count) {
  _mm256_maskstore_ps(to, first_lanes_32(count), (__m256)x);
}
template <>
FASTNN_INLINE void store_partial<double>(double* to, Vec<double> x, int count) {
  _mm256_maskstore_pd(to, first_lanes_64(count), (__m256d)x);
}
#endif

// `count` may be anything from 1 upwards: at least a whole vector, or only the first part of one.
template <class T>
FASTNN_INLINE Vec<Compute<T>> load_up_to(const T* from, int64_t count) {
  return count >= kLanes<T> ? load(from) : load_partial<T>(from, static_cast<int>(count));
}
template <class T>
FASTNN_INLINE void store_up_to(T* to, Vec<Compute<T>> x, int64_t count) {
  if (count >= kLanes<T>) {
    store(to, x);
  } else {
    store_partial<T>(to, x, static_cast<int>(count));
  }
}

// The first `count` bytes, at most one for each lane of T, widened to integers as wide as T; zeros in the other lanes.
template <class T, class Integer = typename IntegerOf<T>::Type>
FASTNN_INLINE Vec<Integer> load_bytes_up_to(const uint8_t* from, int64_t count) {
#if defined(__AVX512F__)
  // Written as intrinsics, since the compiler widens them one by one.
  const uint32_t inside = count >= kLanes<T> ? 0xffff : (1u << count) - 1;
  const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>(inside & ((1u << kLanes<T>)-1)), from);
  if constexpr (sizeof(T) == 4) {
    return (Vec<Integer>)_mm512_cvtepu8_epi32(bytes);
  } else {
    return (Vec<Integer>)_mm512_cvtepu8_epi64(bytes);
  }
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  Bytes bytes = {};
  if (count >= kLanes<T>) {
    __builtin_memcpy(&bytes, from, kLanes<T>);
  } else {
    __builtin_memcpy(&bytes, from, count);
  }
  return __builtin_convertvector(bytes, Vec<Integer>);
#endif
}

// x * y + z, rounded once where there is an instruction for it. Written as intrinsics where results must not
// depend on which instance of a template computed them: on its own, the compiler uses two instructions in some.
template <class V>
FASTNN_INLINE V multiply_add(V x, V y, V z) {
  return x * y + z;
}
#if defined(__AVX512F__)
FASTNN_INLINE Vec<float> multiply_add(Vec<float> x, Vec<float> y, Vec<float> z) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
}
FASTNN_INLINE Vec<double> multiply_add(Vec<double> x, Vec<double> y, Vec<double> z) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
}
#elif defined(__AVX2__)
FASTNN_INLINE Vec<float> multiply_add(Vec<float> x, Vec<float> y, Vec<float> z) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
}
FASTNN_INLINE Vec<double> multiply_add(Vec<double> x, Vec<double> y, Vec<double> z) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
}
#elif defined(__aarch64__)
FASTNN_INLINE Vec<float> multiply_add(Vec<float> x, Vec<float> y, Vec<float> z) {
  return (Vec<float>)vfmaq_f32((float32x4_t)z, (float32x4_t)y, (float32x4_t)x);
}
FASTNN_INLINE Vec<double> multiply_add(Vec<double> x, Vec<double> y, Vec<double> z) {
  return (Vec<double>)vfmaq_f64((float64x2_t)z, (float64x2_t)y, (float64x2_t)x);
}
#endif

#if defined(FASTNN_HAS_PAIRS)
// With the instruction sets avx512_bf16 and neon_bf16, a vector of pairs of bfloat16 multiplied by another: both
// products of a pair are added to its lane. A vector of them is held as one of float.
FASTNN_INLINE Vec<float> load(const bfloat16x2* from) {
  return load(reinterpret_cast<const float*>(from));
}
FASTNN_INLINE void store(bfloat16x2* to, Vec<float> pairs) {
  store(reinterpret_cast<float*>(to), pairs);
}
FASTNN_INLINE Vec<float> broadcast_pair(bfloat16x2 x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return (Vec<float>)(Vec<int32_t>{} + bits);
}
FASTNN_INLINE Vec<float> zip_pairs(Vec<float> even, Vec<float> odd) {
  return (Vec<float>)(((Vec<uint32_t>)even >> 16) | (Vec<uint32_t>)odd);
}
FASTNN_INLINE Vec<float> multiply_add_pairs(Vec<float> x, Vec<float> y, Vec<float> z) {
#if defined(__aarch64__)
  return (Vec<float>)vbfdotq_f32((float32x4_t)z, (bfloat16x8_t)y, (bfloat16x8_t)x);
#else
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(z) : "v"(x), "v"(y));
  return z;
#endif
}
#endif

#if defined(__AVX512F__)
// Selects the first `count` elements of a vector that has two in each lane; loads set the others to zero.
FASTNN_INLINE __mmask32 first_elements(int64_t count) {
  return count >= 2 * kLanes<float> ? ~__mmask32{0} : static_cast<__mmask32>((1u << count) - 1);
}
FASTNN_INLINE Vec<float> load_elements(const bfloat16* from, int64_t count) {
  return (Vec<float>)_mm512_maskz_loadu_epi16(first_elements(count), from);
}
FASTNN_INLINE void store_elements(bfloat16* to, Vec<float> pairs, int64_t count) {
  _mm512_mask_storeu_epi16(to, first_elements(count), (__m512i)pairs);
}
#endif

// Keeps a vector in a register where the compiler would load it again for each use, or a pointer where it would
// compute it again.
template <class T>
FASTNN_INLINE void keep_in_register(T*& x) {
  __asm__("" : "+r"(x));
}
template <class V>
FASTNN_INLINE void keep_in_register(V& x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
}

// x where it is larger, else y. This is one instruction. If x is NaN, the result is y.
template <class V>
FASTNN_INLINE V larger_of(V x, V y) {
  return x > y ? x : y;
}
#if defined(__AVX512F__)
// Written as intrinsics: where masks have registers of their own, the compiler may compute and keep a mask instead.
FASTNN_INLINE Vec<float> larger_of(Vec<float> x, Vec<float> y) {
  return (Vec<float>)_mm512_max_ps((__m512)x, (__m512)y);
}
FASTNN_INLINE Vec<double> larger_of(Vec<double> x, Vec<double> y) {
  return (Vec<double>)_mm512_max_pd((__m512d)x, (__m512d)y);
}
#endif

template <class V>
FASTNN_INLINE V smaller_of(V x, V y) {
  return x < y ? x : y;
}
#if defined(__AVX512F__)
FASTNN_INLINE Vec<float> smaller_of(Vec<float> x, Vec<float> y) {
  return (Vec<float>)_mm512_min_ps((__m512)x, (__m512)y);
}
FASTNN_INLINE Vec<double> smaller_of(Vec<double> x, Vec<double> y) {
  return (Vec<double>)_mm512_min_pd((__m512d)x, (__m512d)y);
}
#endif

// Bounds between which numbers are kept.
template <class T>
struct Bounds {
  T least = -static_cast<T>(__builtin_inf()), most = static_cast<T>(__builtin_inf());
};

// NaN stays NaN, and a zero that equals a bound keeps its sign.
template <class T>
FASTNN_INLINE Vec<T> bounded(Vec<T> x, const Bounds<T>& bounds) {
  return smaller_of(broadcast(bounds.most), larger_of(broadcast(bounds.least), x));
}

// max(x, 0) as torch has it: NaN stays NaN, -0 stays -0.
template <class V>
FASTNN_INLINE V relu(V x) {
  return larger_of(V{}, x);
}

// The sum of `count` lanes, a power of two. Halves are added to halves: few sums wait for each other, and rounding
// errors stay small.
template <int count, class T>
FASTNN_INLINE T sum_halves(const T* lanes) {
  if constexpr (count == 1) {
    return lanes[0];
  } else {
    typedef T Half __attribute__((vector_size(count / 2 * sizeof(T))));
    Half low, high;
    __builtin_memcpy(&low, lanes, sizeof(Half));
    __builtin_memcpy(&high, lanes + count / 2, sizeof(Half));
    low += high;
    T halves[count / 2];
    __builtin_memcpy(halves, &low, sizeof(Half));
    return sum_halves<count / 2>(halves);
  }
}
template <class T>
FASTNN_INLINE T sum_lanes(Vec<T> x) {
#if defined(__AVX512F__)
  // The halves are taken in registers: GCC would take them by way of memory.
  typedef T Half __attribute__((vector_size(sizeof(Vec<T>) / 2)));
  const Half sums = (Half)_mm512_castpd512_pd256((__m512d)x) + (Half)_mm512_extractf64x4_pd((__m512d)x, 1);
  T lanes[kLanes<T> / 2];
  __builtin_memcpy(lanes, &sums, sizeof(sums));
  return sum_halves<kLanes<T> / 2>(lanes);
#else
  T lanes[kLanes<T>];
  store(lanes, x);
  return sum_halves<kLanes<T>>(lanes);
#endif
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
