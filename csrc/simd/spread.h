// Elements spread over vectors, one after the other. Include only from csrc/kernels.
#pragma once

#include "vec.h"

namespace fastnn {
namespace FASTNN_ISA {

// Elements that lie side by side; next() returns the next one in all lanes.
template <class T>
class SpreadLanes {
 public:
  explicit FASTNN_INLINE SpreadLanes(const T* from) : from_(from) {}
  FASTNN_INLINE Vec<T> next() { return broadcast<T>(*from_++); }

 private:
  const T* from_;
};

#if defined(__AVX512F__)
// The elements are loaded as one vector and spread from register to register. next() may not go beyond this vector.
template <>
class SpreadLanes<float> {
 public:
  explicit FASTNN_INLINE SpreadLanes(const float* from) : lanes_(load(from)) {}
  FASTNN_INLINE Vec<float> next() {
    const Vec<float> spread = (Vec<float>)_mm512_permutexvar_ps((__m512i)lane_, (__m512)lanes_);
    lane_ += 1;
    return spread;
  }

 private:
  const Vec<float> lanes_;
  Vec<int32_t> lane_ = {};
};
#endif

}  // namespace FASTNN_ISA
}  // namespace fastnn
