// Calls the kernels of the algorithm that the plan names.
#include "depthwise.h"
#include "direct.h"
#include "moderate.h"
#include "phases.h"
#include "pixels.h"
#include "winograd.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

template <class T>
void pack(const ConvCall<T>& call, int64_t first, int64_t last) {
  constexpr bool single = sizeof(Compute<T>) == sizeof(float);
  switch (call.plan->algorithm) {
    case ForwardAlgorithm::winograd:
      return pack_winograd(call, first, last);
    case ForwardAlgorithm::phases:
      if constexpr (single) pack_phases(call, first, last);
      return;
    case ForwardAlgorithm::pixels:
      if constexpr (single) pack_pixels(call, first, last);
      return;
    case ForwardAlgorithm::depthwise:
      return pack_depthwise(call, first, last);
    case ForwardAlgorithm::direct:
#if defined(FASTNN_HAS_PAIRS)
      if constexpr (sizeof(T) == sizeof(bfloat16)) {
        if (call.plan->direct.elements != Elements::numbers) return pack_direct<bfloat16x2>(call, first, last);
      }
#endif
      return pack_direct<Compute<T>>(call, first, last);
    case ForwardAlgorithm::stock:
      return;
  }
}

template <class T>
void run(const ConvCall<T>& call, int64_t first, int64_t last, void* scratch) {
  constexpr bool single = sizeof(Compute<T>) == sizeof(float);
  switch (call.plan->algorithm) {
    case ForwardAlgorithm::winograd:
      return run_winograd(call, first, last, scratch);
    case ForwardAlgorithm::phases:
      if constexpr (single) run_phases(call, first, last, scratch);
      return;
    case ForwardAlgorithm::pixels:
      if constexpr (single) run_pixels(call, first, last, scratch);
      return;
    case ForwardAlgorithm::depthwise:
      return run_depthwise(call, first, last, scratch);
    case ForwardAlgorithm::direct:
#if defined(FASTNN_HAS_PAIRS)
      if constexpr (sizeof(T) == sizeof(bfloat16)) {
        switch (call.plan->direct.elements) {
          case Elements::pairs:
            return run_direct<bfloat16x2>(call, first, last, scratch);
          case Elements::row_pairs:
            return run_direct<bfloat16x2, bfloat16>(call, first, last, scratch);
          case Elements::blocks:
#if defined(FASTNN_HAS_MATRIX)
            return run_direct<bfloat16>(call, first, last, scratch);
#endif
          case Elements::numbers:
            break;
        }
      }
#endif
      return run_direct<Compute<T>>(call, first, last, scratch);
    case ForwardAlgorithm::stock:
      return;
  }
}

}  // namespace

extern const ConvKernelTable conv_kernels = {{kMachine, pack<float>, run<float>, input_is_moderate<float>,
                                              weight_is_moderate<float>, rectify<float>, finish_run<float>},
                                             {kMachine, pack<double>, run<double>, input_is_moderate<double>,
                                              weight_is_moderate<double>, rectify<double>, finish_run<double>},
                                             {kMachine, pack<bfloat16>, run<bfloat16>, input_is_moderate<bfloat16>,
                                              weight_is_moderate<bfloat16>, rectify<bfloat16>, finish_run<bfloat16>}};

}  // namespace FASTNN_ISA
}  // namespace fastnn
