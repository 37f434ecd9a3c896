// Groups of one channel: channels in the vector's lanes, nothing to sum up but the kernel's positions.
//
// For depthwise layers, where a sum has so few products that no other algorithm fills its lanes. Costs a multiply-add
// and a load for each product of a vector of channels, which the loads bound, and a load and a store for each element
// of the input.
#pragma once

#include "channels.h"

namespace fastnn {
namespace FASTNN_ISA {

// Sums of `pixels` pixels of one vector of channels.
template <int pixels, class C>
FASTNN_INLINE void depthwise_tile(const C* from, int64_t step, const int64_t* offsets, int64_t taps, const C* weight,
                                  int64_t width, Vec<C> bias, C* to) {
  Vec<C> sums[pixels];
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) sums[p] = bias;
  for (int64_t k = 0; k < taps; ++k) {
    const C* at = from + offsets[k];
    const Vec<C> right = load(weight + k * width);
#pragma GCC unroll 8
    for (int p = 0; p < pixels; ++p) sums[p] = multiply_add(load(at + p * step), right, sums[p]);
  }
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) store(to + p * width, sums[p]);
}

// The call as one group whose output channels are the groups.
template <class T>
ConvCall<T> joined_groups(const ConvCall<T>& call) {
  ConvCall<T> joined = call;
  joined.geometry.in_channels = joined.geometry.out_channels = call.geometry.groups;
  joined.geometry.groups = 1;
  return joined;
}

// weight -> [block][kernel position][vectors x lanes]
template <class T>
void pack_depthwise(const ConvCall<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  const ConvCall<T> joined = joined_groups(call);
  const int64_t taps = call.geometry.taps();
  for (int64_t item = first_item; item < last_item; ++item) {
    const Block block = block_of<C>(joined.geometry, item);
    const int64_t width = block.vectors * kLanes<C>;
    C* to = call.packed + block.first * taps;
    fill_zeros(to, taps * width);
    transpose_matrix(call.weight + block.first * call.weight_layout.n, call.weight_layout.n, block.count, taps, to,
                     width);
  }
}

template <class T>
void run_depthwise(const ConvCall<T>& original, int64_t first_item, int64_t last_item, void* scratch) {
  using C = Compute<T>;
  const ConvCall<T> call = joined_groups(original);
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.input_layout;
  const DepthwisePlan& plan = original.plan->depthwise;
  const int64_t (&extent)[3] = plan.band.input;
  const int64_t taps = g.taps();
  Parts parts(scratch);
  C* const copy = parts.take<C>(plan.copy_size);
  int64_t* const offsets = parts.take<int64_t>(taps);
  ChannelPool<T> pool(call, plan.band, plan.ring, parts);
  for (int64_t item = first_item; item < last_item; ++item) {
    const Band band = band_of(g, plan.band, plan.block_parts, item);
    const Inside inside = overlap(band.input[2], extent[2], g.input[2]);
    int64_t first, last;
    part_of(blocks_of<C>(g), band.part, plan.block_parts, first, last);
    for (int64_t b = first; b < last; ++b) {
      const Block block = block_of<C>(g, b);
      const int64_t width = block.vectors * kLanes<C>,
                    step[] = {extent[1] * extent[2] * width, extent[2] * width, width};
      for (int64_t k = 0; k < taps; ++k) {
        offsets[k] = k / (g.kernel[1] * g.kernel[2]) * g.dilation[0] * step[0] +
                     k / g.kernel[2] % g.kernel[1] * g.dilation[1] * step[1] +
                     k % g.kernel[2] * g.dilation[2] * step[2];
      }
      if (layout.d[2] == 1 && block.count < width) fill_zeros(copy, plan.copy_size);
      const T* const from = call.input + band.image * layout.n + block.first * layout.c + band.input[2] * layout.d[2];
      for_each_input_row(g, layout, plan.band, band, [&](int64_t d, int64_t h, bool is_inside, int64_t at) {
        copy_row(is_inside, inside, extent[2], width, copy + d * step[0] + h * step[1],
                 [&](C* to, int64_t first, int64_t count) {
                   const T* pixel = from + at + first * layout.d[2];
                   if (layout.d[2] == 1) {  // contiguous, to be turned
                     return transpose_matrix(pixel, layout.c, block.count, count, to, width);
                   }
                   for (int64_t i = 0; i < count; ++i, pixel += layout.d[2], to += width) {
                     for (int64_t c = 0; c < width; c += kLanes<C>) {
                       const int64_t left = block.count - c;
                       store(to + c, left > 0 ? load_up_to<T>(pixel + c, left) : Vec<C>{});
                     }
                   }
                 });
      });
      const C* weight = call.packed + block.first * taps;
      pool.run(band, band.image, block, [&](int64_t z, int64_t y, const Segment& segment) {
        const C* from = copy + (z - band.conv[0]) * g.stride[0] * step[0] + (y - band.conv[1]) * g.stride[1] * step[1] +
                        (segment.conv + segment.inside.first) * g.stride[2] * step[2];
        C* to = pool.row(z, y, segment);
        const int64_t count = segment.inside.last - segment.inside.first, pixel = g.stride[2] * step[2];
        for (int v = 0; v < block.vectors; ++v) {
          const int64_t lane = v * kLanes<C>;
          const Vec<C> bias = load(pool.bias() + lane);
          int64_t x = 0;
          for (; x + 8 <= count; x += 8) {
            depthwise_tile<8>(from + x * pixel + lane, pixel, offsets, taps, weight + lane, width, bias,
                              to + x * width + lane);
          }
          for (; x < count; ++x) {
            depthwise_tile<1>(from + x * pixel + lane, pixel, offsets, taps, weight + lane, width, bias,
                              to + x * width + lane);
          }
        }
      });
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
