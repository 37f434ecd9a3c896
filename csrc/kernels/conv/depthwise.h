// Groups of one channel: channels in the vector's lanes, nothing to sum up but the kernel's positions.
//
// For depthwise layers, whose sums are too short for other algorithms to fill their lanes. Costs a multiply-add and a
// load for each product of a vector of channels, and a load and a store for each vector of the input.
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
  constexpr int64_t most = kBlockVectors * kLanes<C>;  // of a block's channels
  const int64_t step[] = {extent[1] * extent[2] * most, extent[2] * most, most};
  Parts parts(scratch);
  C* const copies = parts.take<C>(plan.together * plan.copy_size);
  int64_t* const offsets = parts.take<int64_t>(taps);
  ChannelPool<T> pool(call, plan.band, plan.ring, parts);
  for (int64_t k = 0; k < taps; ++k) {
    offsets[k] = k / (g.kernel[1] * g.kernel[2]) * g.dilation[0] * step[0] +
                 k / g.kernel[2] % g.kernel[1] * g.dilation[1] * step[1] + k % g.kernel[2] * g.dilation[2] * step[2];
  }
  // A transpose leaves the lanes beyond the last channel as they are.
  if (layout.d[2] == 1 && g.out_channels % most) fill_zeros(copies, plan.together * plan.copy_size);
  // All rows of some blocks' channels, row by row: each is a single stream from memory.
  const auto copy_blocks = [&](const Band& band, int64_t first_block, int64_t last_block) {
    const Inside inside = overlap(band.input[2], extent[2], g.input[2]);
    const T* const image = call.input + band.image * layout.n + band.input[2] * layout.d[2];
    for_each_input_row(g, layout, plan.band, band, [&](int64_t d, int64_t h, bool is_inside, int64_t at) {
      C* const copy = copies + d * step[0] + h * step[1];
      for (int64_t b = first_block; b < last_block; ++b) {
        const Block block = block_of<C>(g, b);
        copy_row(is_inside, inside, extent[2], most, copy + (b - first_block) * plan.copy_size,
                 [&](C* to, int64_t first, int64_t count) {
                   if (layout.d[2] != 1) return;
                   transpose_matrix(image + at + block.first * layout.c + first, layout.c, block.count, count, to,
                                    most);
                 });
      }
      if (!is_inside || layout.d[2] == 1) return;
      for (int64_t x = inside.first; x < inside.last; ++x) {
        const T* const pixel = image + at + x * layout.d[2];
        C* to = copy + x * most;
        for (int64_t b = first_block; b < last_block; ++b, to += plan.copy_size) {
          const Block block = block_of<C>(g, b);
          for (int64_t c = 0; c < block.vectors * kLanes<C>; c += kLanes<C>) {
            const int64_t left = block.count - c;
            store(to + c, left > 0 ? load_up_to<T>(pixel + block.first + c, left) : Vec<C>{});
          }
        }
      }
    });
  };
  for (int64_t item = first_item; item < last_item; ++item) {
    const Band band = band_of(g, plan.band, plan.block_parts, item);
    int64_t first, last;
    part_of(blocks_of<C>(g), band.part, plan.block_parts, first, last);
    for (int64_t b = first; b < last; ++b) {
      const int64_t place = (b - first) % plan.together;
      if (place == 0) copy_blocks(band, b, smaller(b + plan.together, last));
      const Block block = block_of<C>(g, b);
      const int64_t width = block.vectors * kLanes<C>;
      const C* const copy = copies + place * plan.copy_size;
      const C* weight = call.packed + block.first * taps;
      pool.run(band, band.image, block, [&](int64_t z, int64_t y, const Segment& segment) {
        const C* from = copy + (z - band.conv[0]) * g.stride[0] * step[0] + (y - band.conv[1]) * g.stride[1] * step[1] +
                        (segment.conv + segment.inside.first) * g.stride[2] * step[2];
        C* to = pool.row(z, y, segment);
        const int64_t count = segment.inside.last - segment.inside.first, pixel = g.stride[2] * step[2];
        for (int v = 0; v < block.vectors; ++v) {
          const int64_t lane = v * kLanes<C>;
          const Vec<C> bias = load(pool.bias() + lane);
          with_constant<8>(static_cast<int>(divide_up(count, larger(1, divide_up(count, 8)))), [&](auto tile) {
            constexpr int pixels = decltype(tile)::value;
            for (int64_t next = 0; next < count; next += pixels) {
              const int64_t x = smaller(next, count - pixels);  // the last tile may begin in the one before
              depthwise_tile<pixels>(from + x * pixel + lane, pixel, offsets, taps, weight + lane, width, bias,
                                     to + x * width + lane);
            }
          });
        }
      });
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
