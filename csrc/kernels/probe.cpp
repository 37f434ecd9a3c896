#include "probe.h"

#include "../simd/vec.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// So many chains hide the latency of a multiply-add, and fit into 16 registers.
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
  volatile float result;  // without it the compiler could leave out the computation
  for (int c = 0; c < kChains; ++c) result = total[c][0];
  (void)result;
  return 2.0 * kChains * kLanes<float> * static_cast<double>(rounds);
}

float add_up(const float* data, int64_t count, int64_t rounds) {
  constexpr int64_t step = 8 * kLanes<float>;
  Vec<float> total[8] = {};
  for (int64_t round = 0; round < rounds; ++round) {
    for (int64_t i = 0; i + step <= count; i += step) {
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) total[v] += load(data + i + v * kLanes<float>);
    }
  }
  for (int v = 1; v < 8; ++v) total[0] += total[v];
  return sum_lanes<float>(total[0]);
}

}  // namespace

extern const ProbeKernels probe_kernels = {multiply_adds, add_up};

}  // namespace FASTNN_ISA
}  // namespace fastnn
