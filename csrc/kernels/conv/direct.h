// Direct convolution, output channels in the vector's lanes.
//
// For layers with enough output channels to fill vectors, where no algorithm needs fewer multiplications: strided and
// dilated kernels, bfloat16 in pairs. A thread copies the input under a band of pooled rows with its padding, so that
// the register tile checks no bounds. Then, for one block of output channels after another, rows of conv pixels go into
// a ring in L1, from which windows are pooled. Each conv pixel is computed once, even where windows overlap.
//
// It costs depth / lanes multiply-adds per output channel and conv pixel, at 0.9 of the multipliers' peak, and a load
// and a store for each element of the input (a band of few rows copies some of them twice). Deep kernels skip the
// products with padding.
#pragma once

#include "matrix.h"
#include "pack.h"

namespace fastnn {
namespace FASTNN_ISA {

// Whether the channels under a position of the kernel lie side by side in the packed weight. Else its order is the
// weight's own.
template <class T>
FASTNN_INLINE bool packs_channels_together(const ConvCall<T>& call) {
  return call.plan->direct.whole_band || weight_is_channels_last(call);
}

// Lists for each product k, in the packed weight's order, the offset in the copy of what it multiplies, relative to the
// first product. An element of the copy counts as `numbers`.
template <class T>
void list_offsets(const ConvCall<T>& call, const DirectPlan& plan, int64_t numbers, int64_t* offsets) {
  const ConvPoolGeometry& g = call.geometry;
  for_each_tap(g, plan.channels, packs_channels_together(call),
               [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
                 offsets[k] = numbers * (c * plan.channel_step + d * g.dilation[0] * plan.step[0] +
                                         h * g.dilation[1] * plan.step[1] + w * g.dilation[2] * plan.step[2]);
               });
}

// The offset in the weight of number n of a packed weight of channel pairs; -1 where that number is zero.
template <class T>
FASTNN_INLINE int64_t pair_source(const ConvCall<T>& call, int64_t n) {
  const ConvPoolGeometry& g = call.geometry;
  const int64_t k = n / 2, pairs = divide_up(g.in_channels, 2), taps = g.taps();
  const bool together = packs_channels_together(call);
  const int64_t channel = 2 * (together ? k % pairs : k / taps) + n % 2, tap = together ? k / pairs : k % taps;
  if (channel >= g.in_channels) return -1;
  return weight_is_channels_last(call) ? tap * g.in_channels + channel : channel * taps + tap;
}

// The same for a weight that is packed by runs: block by block, the last block of each run filled up with zeros.
template <class T>
FASTNN_INLINE int64_t run_source(const ConvCall<T>& call, int64_t n) {
  const ConvPoolGeometry& g = call.geometry;
  const RunPlan& plan = call.plan->direct.runs;
  const int64_t padded = plan.blocks * plan.numbers, in_run = n % padded, run = n / padded;
  if (in_run >= plan.run) return -1;
  const int64_t channel = in_run % g.in_channels;
  const int64_t tap = plan.joins_columns ? run * g.kernel[2] + in_run / g.in_channels : run;
  return weight_is_channels_last(call) ? tap * g.in_channels + channel : channel * g.taps() + tap;
}

// Lists the offset in the copy at which each block begins, relative to the first.
template <class T>
void list_blocks(const ConvCall<T>& call, int64_t* offsets) {
  const ConvPoolGeometry& g = call.geometry;
  const DirectPlan& plan = call.plan->direct;
  const int64_t columns = plan.runs.joins_columns ? 1 : g.kernel[2];
  int64_t k = 0;
  for (int64_t d = 0; d < g.kernel[0]; ++d) {
    for (int64_t h = 0; h < g.kernel[1]; ++h) {
      for (int64_t w = 0; w < columns; ++w) {
        for (int64_t b = 0; b < plan.runs.blocks; ++b) {
          offsets[k++] = d * g.dilation[0] * plan.step[0] + h * g.dilation[1] * plan.step[1] +
                         w * g.dilation[2] * plan.step[2] + b * plan.runs.numbers;
        }
      }
    }
  }
}

template <class E, class T>
void pack_direct(const ConvCall<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const DirectPlan& plan = call.plan->direct;
  const int64_t blocks = blocks_of<C>(g);
  for (int64_t item = first_item; item < last_item; ++item) {
    const Block block = block_of<C>(g, item % blocks);
    const int64_t output = item / blocks * g.out_channels + block.first, width = block.vectors * kLanes<C>;
    const int64_t before = lanes_before<C>(g, item / blocks, block);
    if constexpr (__is_same(E, C)) {
      C* const to = call.packed + before * plan.depth;
      if (packs_channels_together(call) && !weight_is_channels_last(call)) {
        pack_channels_together(call, output, block.count, to, width);
      } else {
        pack_outputs(call, output, block.count, to, width);
      }
#if defined(FASTNN_HAS_PAIRS)
    } else if (plan.elements == Elements::pairs) {
      pack_pairs(
          call, output, block.count, plan.depth, [&](int64_t n) { return pair_source(call, n); },
          reinterpret_cast<bfloat16x2*>(call.packed) + before * plan.depth, width);
    } else {
      const int64_t pairs = plan.depth * plan.runs.numbers / 2;
      pack_pairs(
          call, output, block.count, pairs, [&](int64_t n) { return run_source(call, n); },
          reinterpret_cast<bfloat16x2*>(call.packed) + before * pairs, width);
#endif
    }
  }
}

// A part of the depth, products [first_k, last_k), and the conv pixels for which it does not lie in padding alone.
struct KernelPart {
  int64_t first_k, last_k;
  Inside slices, rows, columns;

  bool has_all(const ConvPoolGeometry& g) const {
    return slices.first == 0 && slices.last >= g.conv[0] && rows.first == 0 && rows.last >= g.conv[1] &&
           columns.first == 0 && columns.last >= g.conv[2];
  }
};

// Of conv pixels, those among `inside`, which count from the pixel `first`.
FASTNN_INLINE Inside overlap_of(Inside pixels, Inside inside, int64_t first) {
  return {larger(pixels.first - first, inside.first), smaller(pixels.last - first, inside.last)};
}

// Calls body(part) for parts of the depth of at most kLongestSum products, in the packed weight's order.
template <class Body>
void for_each_part(const ConvPoolGeometry& g, int64_t channels, const Body& body) {
  const int64_t cuts = divide_up(channels, kLongestSum), together = cuts > 1 ? 1 : kLongestSum / channels;
  int64_t k = 0;
  for (int64_t z = 0; z < g.kernel[0]; ++z) {
    for (int64_t y = 0; y < g.kernel[1]; ++y) {
      for (int64_t x = 0; x < g.kernel[2]; x += together) {
        const int64_t last = smaller(x + together, g.kernel[2]), depth = (last - x) * channels;
        for (int64_t cut = 0; cut < cuts; ++cut) {
          body(KernelPart{k + depth * cut / cuts, k + depth * (cut + 1) / cuts, g.pixels_under(0, z, z + 1),
                          g.pixels_under(1, y, y + 1), g.pixels_under(2, x, last)});
        }
        k += depth;
      }
    }
  }
}

// E is the type that is multiplied, or bfloat16 for a matrix unit. In is the type of the copy's elements.
template <class E, class In = E, class T>
void run_direct(const ConvCall<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  using C = Compute<T>;
  constexpr bool by_matrix = __is_same(E, bfloat16), by_runs = __is_same(In, bfloat16);
  constexpr int64_t numbers = sizeof(In) / sizeof(Number<E>);  // of an element of the copy
  const ConvPoolGeometry& g = call.geometry;
  const DirectPlan& plan = call.plan->direct;
  Parts parts(scratch);
  In* const copy = parts.take<In>(plan.copy_size);
  int64_t* const offsets = parts.take<int64_t>(plan.depth);
  ChannelPool<T> pool(call, plan.band, plan.ring, parts, !by_matrix && !plan.whole_band);
  const int64_t depth = by_matrix ? plan.depth * plan.runs.numbers / 2 : plan.depth;  // of the weight
  if constexpr (by_runs) {
    list_blocks(call, offsets);
    fill_zeros(copy, plan.copy_size);  // what lies beyond the end of a run is multiplied by zero and must be finite
  } else {
    list_offsets(call, plan, numbers, offsets);
  }
  const Runs runs = runs_of<E>(offsets, plan.depth);
  for (int64_t item = first_item; item < last_item; ++item) {
    const Band band = band_of(g, plan.band, plan.block_parts, item);
    copy_band<In>(call, plan, band, band.image, copy);
    const int64_t step = g.stride[2] * plan.step[2];
    int64_t first, last;
    part_of(blocks_of<C>(g), band.part, plan.block_parts, first, last);
    for (int64_t b = first; b < last; ++b) {
      const Block block = block_of<C>(g, b);
      const C* weight = call.packed + lanes_before<C>(g, band.group, block) * depth;
      // Adds the products [first_k, last_k) to the conv pixels `inside` of a row, which count from the segment's first.
      const auto sum_row = [&](int64_t z, int64_t y, const Segment& segment, Inside inside, int64_t first_k,
                               int64_t last_k, const C* bias) {
        const In* pixels = copy + (z - band.conv[0]) * g.stride[0] * plan.step[0] +
                           (y - band.conv[1]) * g.stride[1] * plan.step[1] + (segment.conv + inside.first) * step;
        const int64_t count = inside.last - inside.first;
        if (count <= 0) return;
        C* to = pool.row(z, y, segment) + (inside.first - segment.inside.first) * block.vectors * kLanes<C>;
        if constexpr (by_matrix) {
#if defined(FASTNN_HAS_MATRIX)
          const MatrixUnit unit(matrix_pixels(count), plan.runs.numbers);
          sum_pixels_by_matrix(plan, block.vectors, pixels, step, count, offsets,
                               reinterpret_cast<const bfloat16x2*>(weight), bias, to);
#endif
        } else {
          sum_pixels<E>(block.vectors, reinterpret_cast<const Number<E>*>(pixels), numbers * step, count, offsets, runs,
                        first_k, last_k, reinterpret_cast<const E*>(weight), bias, to);
        }
      };
      const auto sum_whole_band = [&](const Segment& segment) {
        if (!plan.whole_band) return;
        for_each_part(g, plan.channels, [&](const KernelPart& part) {
          // The first part writes the sums, with the bias, if it reaches every conv pixel. Else rows begin as the bias.
          const C* const bias = part.first_k == 0 && part.has_all(g) ? pool.bias() : nullptr;
          if (part.first_k == 0 && !bias) {
            pool.for_each_row(band, [&](int64_t z, int64_t y) { pool.start_row(z, y, segment); });
          }
          const Inside inside = overlap_of(part.columns, segment.inside, band.conv[2] + segment.conv);
          pool.for_each_row(band, [&](int64_t z, int64_t y) {
            if (part.slices.first <= z && z < part.slices.last && part.rows.first <= y && y < part.rows.last) {
              sum_row(z, y, segment, inside, part.first_k, part.last_k, bias);
            }
          });
        });
      };
      // `pool` asks for each conv row that its windows need.
      pool.run(band, band.image, block, sum_whole_band, [&](int64_t z, int64_t y, const Segment& segment) {
        sum_row(z, y, segment, segment.inside, 0, plan.depth, pool.bias());
      });
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
