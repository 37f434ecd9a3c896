// The element types that kernels are compiled for.
#pragma once

#include <stdint.h>

namespace fastnn {

// Storage only: kernels compute in float (see simd/vec.h).
struct bfloat16 {
  uint16_t bits;
};

// The elements of two channels, side by side, which one instruction multiplies and adds up (see simd/vec.h).
struct bfloat16x2 {
  bfloat16 even, odd;
};

// One kernel table per type: PerDtype<MlpKernels>{...}.get<float>() is MlpKernels<float>.
template <template <class> class Kernels>
struct PerDtype {
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<bfloat16> bf16;

  template <class T>
  const Kernels<T>& get() const {
    if constexpr (sizeof(T) == sizeof(double)) {
      return f64;
    } else if constexpr (sizeof(T) == sizeof(float)) {
      return f32;
    } else {
      return bf16;
    }
  }
};

// The same for an op that widens bfloat16 to float before its kernels see it.
template <template <class> class Kernels>
struct PerWideDtype {
  Kernels<float> f32;
  Kernels<double> f64;

  template <class T>
  const Kernels<T>& get() const {
    if constexpr (sizeof(T) == sizeof(double)) {
      return f64;
    } else {
      return f32;
    }
  }
};

// The type that T is computed in.
template <class T>
struct ComputeOf {
  using Type = T;
};
template <>
struct ComputeOf<bfloat16> {
  using Type = float;
};
template <>
struct ComputeOf<bfloat16x2> {
  using Type = float;
};
template <class T>
using Compute = typename ComputeOf<T>::Type;

}  // namespace fastnn
