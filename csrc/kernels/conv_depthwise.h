// Forward of depthwise convolutions: groups of one input channel side by side in the vector's lanes (a block).
//
// With channels innermost the input is read where it lies; else rows of it, or whole slices and images if these are
// small, are transposed when a conv row first needs them, into slots that are used again as rows are left behind. Taps
// outside the input are left out; but small images are copied with their padding. Conv rows go into a ring, from which
// windows are pooled.
#pragma once

#include "conv_depthwise_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// weight -> [output channel of a group][block][tap][lane], zeros in lanes without a group
template <class T>
void pack_depthwise(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const int64_t blocks = divide_up(g.groups, kBlockChannels<C>);
  ConvLayout layout = call.weight_layout;
  layout.n *= g.out_channels;
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t output = item / blocks, first = item % blocks * kBlockChannels<C>;
    const DepthwiseBlock<C> block(g, first);
    C* to = call.packed + (output * round_up(g.groups, kLanes<C>) + first) * g.taps();
    if (block.live < block.lanes) fill_zeros(to, block.lanes * g.taps());
    pack_taps(g, TapOrder::channels_first, call.weight + (first * g.out_channels + output) * call.weight_layout.n,
              layout, block.live, to, block.lanes);
  }
}

// `pixels` conv pixels, `step` apart, of a block -> to [pixel][lane]. A block's last vector has `last` channels, if it
// is `partial`.
template <int pixels, int vectors, bool partial, class C>
FASTNN_INLINE void depthwise_tile(const DepthwiseTap<C>* taps, int64_t count, int64_t from, int64_t step, int last,
                                  const Vec<C> (&bias)[vectors], C* to) {
  // All loops over the registers are unrolled, or GCC would store them again after each product.
  Vec<C> total[pixels][vectors];
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) total[p][v] = bias[v];
  }
  sum_in_parts(count, total, [&](int64_t k) __attribute__((always_inline)) {
    const C* at = taps[k].input + from;
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const Vec<C> weight = load(taps[k].weight + v * kLanes<C>);
#pragma GCC unroll 8
      for (int p = 0; p < pixels; ++p) {
        const C* pixel = at + p * step + v * kLanes<C>;
        const Vec<C> value = partial && v == vectors - 1 ? load_partial<C>(pixel, last) : load(pixel);
        total[p][v] = multiply_add(value, weight, total[p][v]);
      }
    }
  });
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(to + (p * vectors + v) * kLanes<C>, total[p][v]);
  }
}

// Conv pixels of a register tile: many where there are registers for them, since a tile reads all of the weight.
constexpr int kDepthwisePixels = FASTNN_VECTOR_BYTES == 64 ? 8 : 4;

// At most as many pixels as wanted; returns how many.
template <int vectors, bool partial, class C>
FASTNN_SHARED int64_t depthwise_pixels(int64_t wanted, const DepthwiseTap<C>* taps, int64_t count, int64_t from,
                                       int64_t step, int last, const Vec<C> (&bias)[vectors], C* to) {
  const int64_t pixels = smaller(wanted, kDepthwisePixels);
  with_constant<kDepthwisePixels>(static_cast<int>(pixels), [&](auto constant) {
    depthwise_tile<decltype(constant)::value, vectors, partial>(taps, count, from, step, last, bias, to);
  });
  return pixels;
}

template <class T>
class DepthwiseForward {
  using C = Compute<T>;

 public:
  DepthwiseForward(const ConvPoolForward<T>& call, void* memory)
      : call_(call),
        g_(call.geometry),
        plan_(call.plan),
        units_(input_units<C>(call.geometry, call.input_layout)),
        padded_(call.geometry),
        scratch_(call.geometry, call.plan, units_, memory),
        ring_(ring(0)),
        block_(call.geometry, 0) {
    if (!plan_.skips_padding) {
      int32_t* place = scratch_.places;
      for (int64_t z = 0; z < g_.input[0]; ++z) {
        for (int64_t y = 0; y < g_.input[1]; ++y) {
          const int64_t row = (z + g_.padding[0]) * padded_.d[0] + (y + g_.padding[1]) * padded_.d[1] + g_.padding[2];
          for (int64_t x = 0; x < g_.input[2]; ++x) *place++ = static_cast<int32_t>(row + x);
        }
      }
    }
    interior_ = {pixels_inside(g_, 2, 0).first, pixels_inside(g_, 2, g_.kernel[2] - 1).last};
  }

  void run(int64_t item) {
    const int64_t blocks = divide_up(g_.groups, kBlockChannels<C>), block_part = item % plan_.block_parts;
    item /= plan_.block_parts;
    const int64_t row_part = item % plan_.row_parts, rows = g_.output[0] * g_.output[1];
    image_ = item / plan_.row_parts;
    const int64_t first = blocks * block_part / plan_.block_parts;
    const int64_t last = blocks * (block_part + 1) / plan_.block_parts;
    const int64_t last_row = rows * (row_part + 1) / plan_.row_parts;
    for (int64_t i = 0; i < scratch_.rings; ++i) ring(i).forget();
    for (int64_t row = rows * row_part / plan_.row_parts; row < last_row; row += plan_.band) {
      for (int64_t b = first; b < last; ++b) run_block(b, b - first, row, smaller(row + plan_.band, last_row));
    }
  }

 private:
  ConvRing<C> ring(int64_t number) const {
    const RingShape shape = ring_shape(g_, plan_);
    const int64_t slots = shape.slices * shape.rows;
    return {scratch_.ring + number * scratch_.ring_size, scratch_.tags + number * slots, shape.slices, shape.rows,
            shape.columns * kBlockChannels<C>};
  }

  void run_block(int64_t number, int64_t place, int64_t first_row, int64_t last_row) {
    const ConvLayout& layout = call_.input_layout;
    block_ = DepthwiseBlock<C>(g_, number * kBlockChannels<C>);
    input_ = call_.input + image_ * layout.n + block_.first * layout.c;
    for (int d = 0; d < 3; ++d) step_[d] = plan_.in_place ? layout.d[d] : units_.d[d] * block_.lanes;
    if (loaded_image_ != image_ || loaded_block_ != number) {
      loaded_image_ = image_;
      loaded_block_ = number;
      for (int64_t i = 0; i < units_.slots(); ++i) scratch_.unit_tags[i] = -1;
      // Lanes without a channel are computed with as well.
      if (!plan_.in_place && plan_.skips_padding && block_.live < block_.lanes) {
        fill_zeros(scratch_.tile, units_.size * units_.slots() * block_.lanes);
      }
      if (!plan_.skips_padding) pad_image();
    }
    const bool partial = plan_.in_place && block_.live < block_.lanes;
    for (int64_t o = 0; o < g_.out_channels; ++o) {
      ring_ = ring(scratch_.rings == 1 ? 0 : place * g_.out_channels + o);
      if (scratch_.rings == 1) ring_.forget();
      if (block_.lanes > kLanes<C>) {
        partial ? run_output<2, true>(o, first_row, last_row) : run_output<2, false>(o, first_row, last_row);
      } else {
        partial ? run_output<1, true>(o, first_row, last_row) : run_output<1, false>(o, first_row, last_row);
      }
    }
  }

  template <int vectors, bool partial>
  void run_output(int64_t output, int64_t first_row, int64_t last_row) {
    call_.winners ? run_rows<vectors, partial, true>(output, first_row, last_row)
                  : run_rows<vectors, partial, false>(output, first_row, last_row);
  }

  template <int vectors, bool partial, bool with_winners>
  void run_rows(int64_t output, int64_t first_row, int64_t last_row) {
    Vec<C> bias[vectors] = {};
    if (call_.bias) {
      C lanes[vectors * kLanes<C>] = {};
      for (int64_t i = 0; i < block_.live; ++i) {
        lanes[i] = to_compute(call_.bias[(block_.first + i) * g_.out_channels + output]);
      }
      for (int v = 0; v < vectors; ++v) bias[v] = load(lanes + v * kLanes<C>);
    }
    const C* weight = call_.packed + (output * round_up(g_.groups, kLanes<C>) + block_.first) * g_.taps();
    if (!plan_.skips_padding) list_taps(weight);
    for (int64_t row = first_row; row < last_row; ++row) {
      const int64_t at = (row - first_row) * g_.output[2] * block_.lanes;
      const int64_t count = ring_.find_rows(g_, row / g_.output[1], row % g_.output[1], scratch_.window_rows,
                                            [&](int64_t z, int64_t y, C* to) {
                                              plan_.skips_padding ? conv_row<vectors, partial>(z, y, weight, bias, to)
                                                                  : padded_row<vectors>(z, y, bias, to);
                                            });
      pool_row<C, vectors, with_winners>(g_, scratch_.window_rows, count, 0, 0, g_.output[2], scratch_.stage + at,
                                         scratch_.winner_stage + at);
    }
    const int64_t first = first_row * g_.output[2], count = (last_row - first_row) * g_.output[2];
    write(output, first, count, scratch_.stage, call_.output);
    if (with_winners) write(output, first, count, scratch_.winner_stage, call_.winners);
  }

  // The image with its padding, which stays as it is from one image to the next.
  void pad_image() {
    const ConvLayout& layout = call_.input_layout;
    const int64_t lanes = block_.lanes, pixels = g_.input[0] * g_.input[1] * g_.input[2];
    if (padded_channels_ != block_.live) fill_zeros(scratch_.padded, padded_.pixels() * lanes);
    padded_channels_ = block_.live;
    if (layout.c != 1) {
      transpose_to_places(input_, layout.c, block_.live, pixels, scratch_.padded,
                          [&](int64_t pixel) { return scratch_.places[pixel] * lanes; });
      return;
    }
    const int32_t* place = scratch_.places;
    for (int64_t z = 0; z < g_.input[0]; ++z) {
      for (int64_t y = 0; y < g_.input[1]; ++y) {
        const T* from = input_ + z * layout.d[0] + y * layout.d[1];
        for (int64_t x = 0; x < g_.input[2]; ++x, from += layout.d[2]) {
          C* to = scratch_.padded + *place++ * lanes;
          if (block_.live < lanes) {
            copy_run(from, 1, block_.live, to);
            continue;
          }
          for (int64_t lane = 0; lane < lanes; lane += kLanes<C>) store(to + lane, load(from + lane));
        }
      }
    }
  }

  // The taps of an output under the first conv pixel of a padded image.
  void list_taps(const C* weight) {
    DepthwiseTap<C>* tap = scratch_.taps;
    for (int64_t d = 0; d < g_.kernel[0]; ++d) {
      for (int64_t h = 0; h < g_.kernel[1]; ++h) {
        for (int64_t w = 0; w < g_.kernel[2]; ++w, weight += block_.lanes) {
          const int64_t pixel =
              d * g_.dilation[0] * padded_.d[0] + h * g_.dilation[1] * padded_.d[1] + w * g_.dilation[2];
          *tap++ = {scratch_.padded + pixel * block_.lanes, weight};
        }
      }
    }
  }

  template <int vectors>
  void padded_row(int64_t z, int64_t y, const Vec<C> (&bias)[vectors], C* to) {
    constexpr int64_t lanes = vectors * kLanes<C>;
    const int64_t from = (z * g_.stride[0] * padded_.d[0] + y * g_.stride[1] * padded_.d[1]) * lanes;
    const int64_t step = g_.stride[2] * lanes;
    for (int64_t x = 0; x < g_.conv[2];) {
      x += depthwise_pixels<vectors, false>(g_.conv[2] - x, scratch_.taps, g_.taps(), from + x * step, step, 0, bias,
                                            to + x * lanes);
    }
  }

  template <int vectors, bool partial>
  void conv_row(int64_t z, int64_t y, const C* weight, const Vec<C> (&bias)[vectors], C* to) {
    constexpr int64_t lanes = vectors * kLanes<C>;
    const Range slices = taps_inside(g_, 0, z), rows = taps_inside(g_, 1, y);
    int64_t count = 0;  // taps of the kernel's rows that meet the input
    for (int64_t d = slices.first; d < slices.last; ++d) {
      for (int64_t h = rows.first; h < rows.last; ++h) {
        const C* row = input_row(z * g_.stride[0] - g_.padding[0] + d * g_.dilation[0],
                                 y * g_.stride[1] - g_.padding[1] + h * g_.dilation[1]);
        const C* factor = weight + (d * g_.kernel[1] + h) * g_.kernel[2] * lanes;
        for (int64_t w = 0; w < g_.kernel[2]; ++w) {
          scratch_.taps[count++] = {row + (w * g_.dilation[2] - g_.padding[2]) * step_[2], factor + w * lanes};
        }
      }
    }
    const int64_t step = g_.stride[2] * step_[2];
    const int last = static_cast<int>(block_.live - (vectors - 1) * kLanes<C>);
    for (int64_t x = 0; x < g_.conv[2];) {
      if (x < interior_.first || x >= interior_.last) {
        edge_pixel<vectors, partial>(count, x, step, last, bias, to + x * lanes);
        ++x;
        continue;
      }
      // A whole last vector reaches into the next pixel, as long as there is one.
      const int64_t wanted = smaller(kDepthwisePixels, interior_.last - x);
      const int64_t past = (x + wanted - 1) * g_.stride[2] - g_.padding[2] + g_.kernel_extent(2);
      x += partial && (past >= g_.input[2] || step_[2] < kLanes<C>)
               ? depthwise_pixels<vectors, partial>(wanted, scratch_.taps, count, x * step, step, last, bias,
                                                    to + x * lanes)
               : depthwise_pixels<vectors, false>(wanted, scratch_.taps, count, x * step, step, last, bias,
                                                  to + x * lanes);
    }
  }

  // A conv pixel at which not all columns of the kernel meet the input.
  template <int vectors, bool partial>
  void edge_pixel(int64_t count, int64_t x, int64_t step, int last, const Vec<C> (&bias)[vectors], C* to) {
    const Range columns = taps_inside(g_, 2, x);
    int64_t inside = 0;
    for (int64_t k = 0; k < count; k += g_.kernel[2]) {
      for (int64_t w = columns.first; w < columns.last; ++w) scratch_.edge_taps[inside++] = scratch_.taps[k + w];
    }
    depthwise_pixels<vectors, partial>(1, scratch_.edge_taps, inside, x * step, step, last, bias, to);
  }

  // A row of the input, the block's channels innermost.
  const C* input_row(int64_t z, int64_t y) {
    // Of the type computed in, or the plan would not be to leave it there.
    if (plan_.in_place) return reinterpret_cast<const C*>(input_) + z * step_[0] + y * step_[1];
    const int64_t unit = units_.unit_of(z, y), slot = units_.slot_of(z, y);
    C* tile = scratch_.tile + slot * units_.size * block_.lanes;
    if (scratch_.unit_tags[slot] != unit) {
      scratch_.unit_tags[slot] = unit;
      load_unit(z, y, tile);
    }
    return tile + (units_.whole_image ? z * step_[0] : 0) + (units_.whole_slices ? y * step_[1] : 0);
  }

  void load_unit(int64_t z, int64_t y, C* to) {
    const ConvLayout& layout = call_.input_layout;
    const T* from = input_ + (units_.whole_image ? 0 : z * layout.d[0]) + (units_.whole_slices ? 0 : y * layout.d[1]);
    if (layout.c == 1) {
      for (int64_t x = 0; x < g_.input[2]; ++x) copy_run(from + x * layout.d[2], 1, block_.live, to + x * block_.lanes);
    } else if (units_.as_it_lies) {
      transpose_matrix(from, layout.c, block_.live, units_.size, to, block_.lanes);
    } else {
      for (int64_t x = 0; x < g_.input[2]; ++x) {
        copy_run(from + x * layout.d[2], layout.c, block_.live, to + x * block_.lanes);
      }
    }
  }

  // `count` pooled pixels [pixel][lane] to where they belong.
  template <class From, class To>
  void write(int64_t output, int64_t first, int64_t count, const From* from, To* tensor) {
    const ConvLayout& layout = call_.output_layout;
    const int64_t m = g_.out_channels;
    To* to = tensor + image_ * layout.n + (block_.first * m + output) * layout.c + first * layout.d[2];
    if (layout.d[2] == 1) {
      transpose_matrix(from, block_.lanes, count, block_.live, to, m * layout.c);
      return;
    }
    for (int64_t x = 0; x < count; ++x, from += block_.lanes, to += layout.d[2]) {
      if (m == 1) {
        copy_out(from, block_.live, to);
      } else {
        for (int64_t i = 0; i < block_.live; ++i) copy_one(from[i], to + i * m);
      }
    }
  }

  const ConvPoolForward<T>& call_;
  const ConvPoolGeometry& g_;
  const ConvPoolPlan& plan_;
  const InputUnits units_;
  const PaddedImage padded_;
  const DepthwiseScratch<C> scratch_;
  ConvRing<C> ring_;
  DepthwiseBlock<C> block_;
  Range interior_;  // conv columns at which the whole kernel meets the input
  const T* input_;  // the image's first channel of the block
  int64_t step_[3], image_, loaded_image_ = -1, loaded_block_ = -1, padded_channels_ = -1;
};

template <class T>
void forward_depthwise(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  DepthwiseForward<T> worker(call, scratch);
  for (int64_t item = first_item; item < last_item; ++item) worker.run(item);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
