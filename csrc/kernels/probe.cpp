#include "probe.h"

#include "../simd/vec.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// Enough chains to hide the latency of a multiply-add, few enough for 16 registers.
constexpr int kChains = 12;

double multiply_adds(int64_t rounds) {
  float start[kChains * kLanes<float>];
  for (int i = 0; i < kChains * kLanes<float>; ++i) start[i] = 1.0f + static_cast<float>(i);
  Vec<float> total[kChains];
  for (int c = 0; c < kChains; ++c) total[c] = load(start + c * kLanes<float>);
  const Vec<float> factor = broadcast(0.5f), term = broadcast(1.0f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) total[c] = total[c] * factor + term;
  }
  volatile float result;  // or none of this would have to be computed
  for (int c = 0; c < kChains; ++c) result = total[c][0];
  (void)result;
  return 2.0 * kChains * kLanes<float> * static_cast<double>(rounds);
}

}  // namespace

extern const ProbeKernels probe_kernels = {multiply_adds};

}  // namespace FASTNN_ISA
}  // namespace fastnn
