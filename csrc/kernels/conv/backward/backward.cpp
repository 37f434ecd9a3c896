// Calls backward's kernels of the algorithm that the plan names.
#include "../moderate.h"
#include "check.h"
#include "depthwise.h"
#include "spread.h"
#include "taps.h"
#include "winners.h"
#include "winograd.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// In bfloat16 its errors would show.
template <class T>
constexpr bool kHasWinograd = sizeof(T) != sizeof(bfloat16);

// Calls body(element) with an element of the type that the runs of `winners` consist of.
template <class T, class Body>
auto with_run_element(const ConvBackward<T>& call, const Body& body) {
  if constexpr (kMultipliesPairs && sizeof(T) == sizeof(bfloat16)) {
    if (call.plan->winners.zips) return body(T{});
  }
  return body(Compute<T>{});
}

template <class T>
int64_t scratch_size(const ConvBackward<T>& call) {
  Parts memory(nullptr);
  switch (call.plan->algorithm) {
    case BackwardAlgorithm::taps:
      TapsWorker<T>(call, true, memory);
      break;
    case BackwardAlgorithm::depthwise:
      DepthwiseBackwardWorker<T>(call, true, memory);
      break;
    case BackwardAlgorithm::winners:
      with_run_element(call, [&](auto element) { WinnersWorker<T, decltype(element)>(call, true, memory); });
      break;
    case BackwardAlgorithm::winograd:
      if constexpr (kHasWinograd<T>) WinogradWorker<T>(call, memory);
      break;
    case BackwardAlgorithm::stock:
      SpreadWorker<T>(call, memory);
  }
  return memory.bytes_taken();
}

template <class T>
void pack(const ConvBackward<T>& call) {
  switch (call.plan->algorithm) {
    case BackwardAlgorithm::taps:
      return pack_taps(call);
    case BackwardAlgorithm::depthwise:
      return pack_depthwise(call);
    case BackwardAlgorithm::winners:
      return with_run_element(call, [&](auto element) { pack_runs<decltype(element)>(call); });
    case BackwardAlgorithm::winograd:
    case BackwardAlgorithm::stock:
      return;
  }
}

template <class T>
void run(const ConvBackward<T>& call, const ConvBackwardPiece& piece, Compute<T>* grad_weight, Compute<T>* lost,
         double* grad_bias, void* scratch) {
  switch (call.plan->algorithm) {
    case BackwardAlgorithm::taps:
      return backward_taps(call, piece, grad_weight, lost, grad_bias, scratch);
    case BackwardAlgorithm::depthwise:
      return backward_depthwise(call, piece, grad_weight, lost, grad_bias, scratch);
    case BackwardAlgorithm::winners:
      return with_run_element(call, [&](auto element) {
        backward_winners<decltype(element)>(call, piece, grad_weight, lost, grad_bias, scratch);
      });
    case BackwardAlgorithm::winograd:
    case BackwardAlgorithm::stock:
      return;
  }
}

template <class T>
void unpack_weight(const ConvBackward<T>& call, const Compute<T>* grad_weight, T* to, const ConvLayout& layout) {
  switch (call.plan->algorithm) {
    case BackwardAlgorithm::taps:
      return unpack_taps(call, grad_weight, to, layout);
    case BackwardAlgorithm::depthwise:
      return unpack_depthwise(call, grad_weight, to, layout);
    case BackwardAlgorithm::winners:
      return unpack_runs(call, grad_weight, to, layout);
    case BackwardAlgorithm::winograd:
    case BackwardAlgorithm::stock:
      return;
  }
}

template <class T>
void spread(const ConvBackward<T>& call, int64_t first, int64_t last, T* to, double* grad_bias, void* scratch) {
  Parts memory(scratch);
  SpreadWorker<T>(call, memory).run(first, last, to, grad_bias);
}

template <class T>
void sum_tiles(const ConvBackward<T>& call, int64_t first, int64_t last, Compute<T>* sums, double* bias,
               void* scratch) {
  Parts memory(scratch);
  WinogradWorker<T>(call, memory).run(first, last, sums, bias);
}

template <class T>
void turn(const T* from, int64_t rows, int64_t columns, T* to) {
  transpose_matrix(from, columns, rows, columns, to, rows);
}

template <class T>
constexpr ConvBackwardKernels<T> kernels() {
  ConvBackwardKernels<T> all{kMachine,
                             input_is_moderate<T>,
                             weight_is_moderate<T>,
                             gradient_is_moderate<T>,
                             scratch_size<T>,
                             pack<T>,
                             run<T>,
                             unpack_weight<T>,
                             copy_out<Compute<T>, T>,
                             winners_are_valid,
                             spread<T>,
                             mask_dead<T>,
                             nullptr,
                             nullptr,
                             turn<T>};
  if constexpr (kHasWinograd<T>) {
    all.sum_tiles = sum_tiles<T>;
    all.write_weight_gradient = write_weight_gradient<T>;
  }
  return all;
}

}  // namespace

extern const ConvBackwardTable conv_backward_kernels = {kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn
