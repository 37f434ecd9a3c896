// Direct convolution, output channels in the vector's lanes.
//
// For layers with enough output channels to fill vectors, where fewer multiplications are not to be had: strided and
// dilated kernels, bfloat16 in pairs. A thread copies the input under a band of pooled rows, padding and all, so that
// the tile checks nothing; then, block of output channels by block, rows of conv pixels go into a ring in L1, from
// which windows are pooled. Each conv pixel is computed once, however windows overlap.
//
// Costs depth / lanes multiply-adds an output channel and conv pixel, at 0.9 of the multipliers' peak, and a load and a
// store for each element of the input (a band of few rows copies some of them twice).
#pragma once

#include "channels.h"
#include "pack.h"

namespace fastnn {
namespace FASTNN_ISA {

// Where the product number k begins, relative to the first: in the weight's own order.
template <class T>
void list_offsets(const ConvCall<T>& call, const DirectPlan& plan, int64_t* offsets) {
  const ConvPoolGeometry& g = call.geometry;
  for_each_tap(g, plan.channels, weight_is_channels_last(call), [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
    offsets[k] = c * plan.channel_step + d * g.dilation[0] * plan.step[0] + h * g.dilation[1] * plan.step[1] +
                 w * g.dilation[2] * plan.step[2];
  });
}

template <class E, class T>
void pack_direct(const ConvCall<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const int64_t blocks = blocks_of<C>(g), depth = call.plan->direct.depth;
  for (int64_t item = first_item; item < last_item; ++item) {
    const Block block = block_of<C>(g, item % blocks);
    E* to = reinterpret_cast<E*>(call.packed) + lanes_before<C>(g, item / blocks, block) * depth;
    pack_outputs<E>(call, item / blocks * g.out_channels + block.first, block.count, to, block.vectors * kLanes<C>);
  }
}

template <class E, class T>
void run_direct(const ConvCall<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const DirectPlan& plan = call.plan->direct;
  Parts parts(scratch);
  E* const copy = parts.take<E>(plan.copy_size);
  int64_t* const offsets = parts.take<int64_t>(plan.depth);
  ChannelPool<T> pool(call, plan.band, plan.ring, parts);
  list_offsets(call, plan, offsets);
  for (int64_t item = first_item; item < last_item; ++item) {
    const Band band = band_of(g, plan.band, plan.block_parts, item);
    copy_band<E>(call, plan, band, band.image, copy);
    const Inside columns = pool.inside(band);
    int64_t first, last;
    part_of(blocks_of<C>(g), band.part, plan.block_parts, first, last);
    for (int64_t b = first; b < last; ++b) {
      const Block block = block_of<C>(g, b);
      const E* weight = reinterpret_cast<const E*>(call.packed) + lanes_before<C>(g, band.group, block) * plan.depth;
      const auto sum_row = [&](int64_t z, int64_t y, int64_t first_k, int64_t last_k) {
        const E* pixels = copy + (z - band.conv[0]) * g.stride[0] * plan.step[0] +
                          (y - band.conv[1]) * g.stride[1] * plan.step[1] +
                          columns.first * g.stride[2] * plan.step[2];
        sum_pixels<E>(block.vectors, pixels, g.stride[2] * plan.step[2], columns.last - columns.first, offsets, first_k,
                      last_k, weight, pool.bias(), pool.ring().slot(z, y) + columns.first * block.vectors * kLanes<C>);
      };
      pool.start(band, block);
      for (int64_t k = 0; plan.whole_band && k < plan.depth; k += kLongestSum) {
        pool.for_each_row(band, [&](int64_t z, int64_t y) { sum_row(z, y, k, smaller(k + kLongestSum, plan.depth)); });
      }
      pool.run(band, band.image, block, [&](int64_t z, int64_t y) { sum_row(z, y, 0, plan.depth); });
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
