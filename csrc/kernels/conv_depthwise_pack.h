// The weight as conv_depthwise.h reads it.
#pragma once

#include "conv_depthwise_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// The weight of a block's groups -> [row of the kernel][pair of taps or a single one][lane]
template <class C, class T>
void pack_tap_pairs(ConvPoolGeometry g, const T* from, ConvLayout layout, const DepthwiseBlock<C>& block, C* to) {
#if defined(__AVX512F__)
  const int64_t slices = g.kernel[0], rows = g.kernel[1], columns = g.kernel[2], lanes = block.lanes;
  C row[kMostPairedTaps * kBlockChannels<C>] = {};
  const int64_t slice_step = layout.d[0], row_step = layout.d[1];
  g.kernel[0] = g.kernel[1] = 1;
  layout.c = layout.d[0] = layout.d[1] = columns * layout.d[2];
  for (int64_t d = 0; d < slices; ++d) {
    for (int64_t h = 0; h < rows; ++h) {
      pack_taps(g, TapOrder::channels_first, from + d * slice_step + h * row_step, layout, block.live, row, lanes);
      for (int64_t w = 0; w < columns; w += 2, to += lanes) {
        for (int64_t i = 0; i < lanes; i += kLanes<C>) {
          const Vec<C> tap = load(row + w * lanes + i);
          store(to + i, w + 1 < columns ? zip_pairs(tap, load(row + (w + 1) * lanes + i)) : tap);
        }
      }
    }
  }
#endif
}

// weight -> [output channel of a group][block][tap or pair][lane], zeros in lanes without a group
template <class T>
void pack_depthwise(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const int64_t blocks = divide_up(g.groups, call.plan.block_groups);
  ConvLayout layout = call.weight_layout;
  layout.n *= g.out_channels;
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t output = item / blocks;
    const DepthwiseBlock<C> block(g, call.plan, item % blocks);
    const int64_t first = block.first;
    const T* from = call.weight + (first * g.out_channels + output) * call.weight_layout.n;
    C* to = call.packed + (output * round_up(g.groups, kLanes<C>) + first) * depthwise_weights(g, call.plan);
    if constexpr (kHasPairs<T>) {
      if (call.plan.pairs_taps) {
        pack_tap_pairs<C>(g, from, layout, block, to);
        continue;
      }
    }
    if (block.live < block.lanes) fill_zeros(to, block.lanes * g.taps());
    pack_taps(g, TapOrder::channels_first, from, layout, block.live, to, block.lanes);
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
