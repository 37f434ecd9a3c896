// What conv_backward.h works on: its scratch memory, the plan, and when the library's convolution is better.
#pragma once

#include "conv_runs.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int64_t kEntryBytes = 256 << 10;  // the entries of one pass: part of L2
constexpr int64_t kSliceBytes = 32 << 10;   // what the inner loop returns to: most of L1

// Entries summed by themselves before they join the weight's gradient: keeps the sum's rounding error down.
constexpr int64_t kMostSlicePixels = 128;

template <class C>
struct BackwardScratch {
  C* image;  // the input's padded image, of one block; or its gradient's, of all blocks
  GradientEntry<C>* entries;
  int32_t* starts;         // where each bucket of entries begins, and one past the last
  int64_t* run_offsets;    // in the image
  int64_t* place_offsets;  // in the image, of each place of a window
  int64_t* window_starts;  // in the image, of each pooled pixel of the pass
  int64_t pixels;          // pooled pixels of one pass
  int64_t channels;        // output channels of one bucket of the input's gradient
  int64_t slice_pixels;    // pooled pixels of one bucket of the weight's gradient
  int64_t size;

  BackwardScratch(const ConvPoolGeometry& g, void* memory) {
    const RunShape s = run_shape<C>(g);
    const int64_t entry = sizeof(GradientEntry<C>);
    pixels = smaller(g.pixels(), larger(8, kEntryBytes / (entry * larger(g.out_channels, 1))));
    channels = smaller(g.out_channels, larger(16, kSliceBytes / (s.row * static_cast<int64_t>(sizeof(C)))));
    const int64_t under_pixel = s.lanes * static_cast<int64_t>(sizeof(C)) * g.pool_stride[0] * g.stride[0] *
                                g.pool_stride[1] * g.stride[1] * g.pool_stride[2] * g.stride[2];
    slice_pixels = smaller(smaller(pixels, kMostSlicePixels), larger(16, kSliceBytes / 2 / under_pixel));
    const int64_t buckets = larger(divide_up(g.out_channels, larger(channels, 1)) * pixels * (g.places() + 1),
                                   g.out_channels * divide_up(pixels, slice_pixels));
    char* base = static_cast<char*>(memory);
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
      char* part = base + used;
      used += round_up(bytes, 64);
      return part;
    };
    image = reinterpret_cast<C*>(take(s.image * s.blocks * static_cast<int64_t>(sizeof(C))));
    entries = reinterpret_cast<GradientEntry<C>*>(take((pixels * g.out_channels + 1) * entry));
    starts = reinterpret_cast<int32_t*>(take((buckets + 1) * static_cast<int64_t>(sizeof(int32_t))));
    run_offsets = reinterpret_cast<int64_t*>(take(s.runs * static_cast<int64_t>(sizeof(int64_t))));
    place_offsets = reinterpret_cast<int64_t*>(take(256 * static_cast<int64_t>(sizeof(int64_t))));
    window_starts = reinterpret_cast<int64_t*>(take(pixels * static_cast<int64_t>(sizeof(int64_t))));
    size = used;
  }
};

template <class C>
ConvPoolBackwardPlan plan_backward(const ConvPoolGeometry& g) {
  const RunShape s = run_shape<C>(g);
  ConvPoolBackwardPlan plan = {};
  plan.packed_size = g.groups * s.blocks * g.out_channels * s.row;
  plan.weight_size = plan.packed_size;
  plan.scratch_size = BackwardScratch<C>(g, nullptr).size;
  plan.channel_blocks = s.blocks;
  plan.lanes = s.lanes;
  return plan;
}

// Whether a dense convolution of the library's is faster, although most of its gradient is zeros: where windows overlap
// so much that few are, or where the runs leave most of their vectors empty. Rules by measurement
// (benchmarks/sweep.py).
template <class C>
bool library_pays(const ConvPoolGeometry& g, bool channels_last) {
  constexpr double kLeastWork = 1e5, kMostlyWinners = 0.7;
  const RunShape s = run_shape<C>(g);
  const double gradients = static_cast<double>(g.batch * g.groups * g.out_channels);
  const double winners = static_cast<double>(g.pixels()) / static_cast<double>(g.conv[0] * g.conv[1] * g.conv[2]);
  const double sparse = gradients * static_cast<double>(g.pixels() * s.blocks * s.runs * s.vectors);
  const double dense = gradients * static_cast<double>(g.pixels() * g.depth()) / winners / kLanes<C>;
  if (2 * sparse < kLeastWork || sparse < 0.8 * dense) return false;
  const bool dilated = g.dilation[0] * g.dilation[1] * g.dilation[2] > 1;
  if (g.in_channels == 1 && g.groups > 1) return channels_last && (!dilated || winners > kMostlyWinners);
  return sparse >= dense && (channels_last || winners > kMostlyWinners);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
