// Forward of depthwise convolutions: groups of one input channel side by side in the vector's lanes (a block).
//
// With channels innermost the input is read where it lies; else rows of it, or whole slices and images if these are
// small, are transposed when a conv row first needs them, into slots that are used again as rows are left behind. Taps
// outside the input are left out; but small images are copied with their padding. Conv rows go into a ring, from which
// windows are pooled.
//
// Where many taps of a row fall into its padding, rows get that in the slots: the pixels at the edges, each with taps
// of its own, would be computed one by one.
//
// Where bfloat16 is multiplied in pairs, these are of taps side by side: each column of the slots, which are padded so,
// has the one that the next tap meets beside it. An odd last tap is multiplied alone: a neighbour that its window does
// not have may be NaN.
#pragma once

#include "conv_depthwise_pack.h"
#include "conv_depthwise_tile.h"

namespace fastnn {
namespace FASTNN_ISA {

// One thread's way through its items, reading elements E: those of the input where they lie, or of the slots.
template <class E, class T>
class DepthwiseForward {
  using C = Compute<T>;
  static constexpr int64_t kLine = 64 / sizeof(T);
  static constexpr bool kMayPad = sizeof(E) == sizeof(C) && !kIsPair<E>;

 public:
  DepthwiseForward(const ConvPoolForward<T>& call, void* memory)
      : call_(call),
        g_(call.geometry),
        plan_(call.plan),
        units_(input_units<C>(call.geometry, call.plan, call.input_layout)),
        padded_(call.geometry),
        scratch_(call.geometry, call.plan, units_, memory),
        ring_(ring(0)),
        block_(call.geometry, call.plan, 0) {
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
    if (plan_.pads_rows) interior_ = {0, g_.conv[2]};
    // More pixels than the hardware follows, which come from memory later than their products are through.
    constexpr int64_t kFar = 8 << 20, kMany = 12;
    comes_from_afar_ = g_.batch * image_size(g_) * static_cast<int64_t>(sizeof(T)) > kFar;
    asks_ = plan_.in_place && comes_from_afar_ && g_.taps() <= kMany * g_.stride[0] * g_.stride[1] * g_.stride[2];
    taps_ = static_cast<DepthwiseTap<E>*>(scratch_.taps);
    shared_apart_ = shared_columns_apart(g_);
  }

  void run(int64_t item) {
    const int64_t blocks = divide_up(g_.groups, plan_.block_groups), block_part = item % plan_.block_parts;
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
    block_ = DepthwiseBlock<C>(g_, plan_, number);
    input_ = call_.input + image_ * layout.n + block_.first * layout.c;
    for (int d = 0; d < 3; ++d) step_[d] = plan_.in_place ? layout.d[d] : units_.slot_d[d] * block_.lanes;
    if (loaded_image_ != image_ || loaded_block_ != number) {
      loaded_image_ = image_;
      loaded_block_ = number;
      for (int64_t i = 0; i < units_.slots(); ++i) scratch_.unit_tags[i] = -1;
      // Lanes without a channel are computed with as well.
      if (!plan_.in_place && plan_.skips_padding && block_.live < block_.lanes) {
        if (plan_.pads_rows) {
          fill_zeros(static_cast<T*>(scratch_.unit), units_.size * block_.lanes);
        } else {
          fill_zeros(scratch_.tile, units_.size * units_.slots() * block_.lanes);
        }
      }
      if constexpr (kMayPad) {
        if (!plan_.skips_padding) pad_image();
      }
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
    const C* weight =
        call_.packed + (output * round_up(g_.groups, kLanes<C>) + block_.first) * depthwise_weights(g_, plan_);
    if (!plan_.skips_padding) list_rows(weight);
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
    // The next block's, which comes next but lies apart for the hardware.
    const int64_t ahead = smaller(block_.live, g_.groups - block_.first - block_.live);
    for (int64_t z = 0; z < g_.input[0]; ++z) {
      for (int64_t y = 0; y < g_.input[1]; ++y) {
        const T* from = input_ + z * layout.d[0] + y * layout.d[1];
        for (int64_t x = 0; x < g_.input[2]; ++x, from += layout.d[2]) {
          for (int64_t i = 0; i < ahead; i += kLine) __builtin_prefetch(from + block_.live + i);
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

  // The kernel's rows of an output under the first conv pixel of a padded image.
  void list_rows(const C* weight) {
    DepthwiseTap<E>* tap = taps_;
    for (int64_t d = 0; d < g_.kernel[0]; ++d) {
      for (int64_t h = 0; h < g_.kernel[1]; ++h, weight += g_.kernel[2] * block_.lanes) {
        const int64_t pixel = d * g_.dilation[0] * padded_.d[0] + h * g_.dilation[1] * padded_.d[1];
        *tap++ = {reinterpret_cast<const E*>(scratch_.padded) + pixel * block_.lanes, weight};
      }
    }
  }

  template <int vectors>
  void padded_row(int64_t z, int64_t y, const Vec<C> (&bias)[vectors], C* to) {
    constexpr int64_t lanes = vectors * kLanes<C>;
    const int64_t from = (z * g_.stride[0] * padded_.d[0] + y * g_.stride[1] * padded_.d[1]) * lanes;
    const int64_t step = g_.stride[2] * lanes;
    const Range rows = kernel_rows_inside(g_, z, y);
    const DepthwiseTaps<E> taps = {taps_ + rows.first,     rows.last - rows.first, {0, g_.kernel[2]},
                                   g_.dilation[2] * lanes, shared_apart_,          0};
    for (int64_t x = 0; x < g_.conv[2];) {
      x += depthwise_pixels<vectors, false>(g_.conv[2] - x, taps, from + x * step, step, 0, bias, to + x * lanes);
    }
  }

  template <int vectors, bool partial>
  void conv_row(int64_t z, int64_t y, const C* weight, const Vec<C> (&bias)[vectors], C* to) {
    constexpr int64_t lanes = vectors * kLanes<C>;
    const Range slices = taps_inside(g_, 0, z), rows = taps_inside(g_, 1, y);
    // The kernel's rows that meet the input: taps or pairs, then what these leave of each row.
    const int64_t columns = kIsPair<E> ? g_.kernel[2] / 2 : g_.kernel[2], all = depthwise_weights(g_, plan_);
    const int64_t in_row = all / (g_.kernel[0] * g_.kernel[1]);
    const int64_t count = (slices.last - slices.first) * (rows.last - rows.first);
    const int64_t column_step = (kIsPair<E> ? 2 : 1) * g_.dilation[2] * step_[2];
    const DepthwiseTaps<E> taps = {taps_,       count,         {0, columns},
                                   column_step, shared_apart_, columns < in_row ? count : 0};
    DepthwiseTap<E>* tap = taps_;
    const int64_t first_column = plan_.pads_rows ? 0 : -g_.padding[2] * step_[2];
    for (int64_t d = slices.first; d < slices.last; ++d) {
      for (int64_t h = rows.first; h < rows.last; ++h, ++tap) {
        const E* row = input_row(z * g_.stride[0] - g_.padding[0] + d * g_.dilation[0],
                                 y * g_.stride[1] - g_.padding[1] + h * g_.dilation[1]);
        const C* factor = weight + (d * g_.kernel[1] + h) * in_row * lanes;
        tap[0] = {row + first_column, factor};
        if (taps.single > 0) tap[count] = {tap->input + columns * column_step, factor + columns * lanes};
      }
    }
    const int64_t step = g_.stride[2] * step_[2];
    const int last = static_cast<int>(block_.live - (vectors - 1) * kLanes<C>);
    for (int64_t x = 0; x < g_.conv[2];) {
      if (x < interior_.first || x >= interior_.last) {
        DepthwiseTaps<E> inside = taps;
        inside.columns = taps_inside(g_, 2, x);
        depthwise_pixels<vectors, partial>(1, inside, x * step, step, last, bias, to + x * lanes);
        ++x;
        continue;
      }
      // A whole last vector reaches into the next pixel, as long as there is one.
      const int64_t wanted = interior_.last - x;
      const int64_t past =
          (x + smaller(kDepthwisePixels<vectors>, wanted) - 1) * g_.stride[2] - g_.padding[2] + g_.kernel_extent(2);
      const int64_t pixels =
          partial && (past >= g_.input[2] || step_[2] < kLanes<C>)
              ? depthwise_pixels<vectors, partial>(wanted, taps, x * step, step, last, bias, to + x * lanes)
              : depthwise_pixels<vectors, false>(wanted, taps, x * step, step, last, bias, to + x * lanes);
      if (asks_) ask_for_next_row(slices.last - slices.first, rows.last - rows.first, x * step, pixels, step);
      x += pixels;
    }
  }

  // What is new under the same pixels of the next conv row, which has the same taps: of slices and rows the last.
  void ask_for_next_row(int64_t slices, int64_t rows, int64_t from, int64_t pixels, int64_t step) const {
    const int64_t next_row = g_.stride[1] * step_[1];
    for (int64_t d = larger(0, slices - g_.stride[0]); d < slices; ++d) {
      for (int64_t h = larger(0, rows - g_.stride[1]); h < rows; ++h) {
        for (int64_t w = 0; w < smaller(g_.stride[2], g_.kernel[2]); ++w) {
          const E* at = taps_[d * rows + h].input + w * g_.dilation[2] * step_[2] + from + next_row;
          for (int64_t p = 0; p < pixels; ++p, at += step) {
            for (int64_t i = 0; i < block_.live; i += kLine) __builtin_prefetch(at + i, 0, 2);
          }
        }
      }
    }
  }

  // A row of the input, the block's channels innermost.
  const E* input_row(int64_t z, int64_t y) {
    // Of elements E, or the plan would not be to leave it there.
    if (plan_.in_place) return reinterpret_cast<const E*>(input_) + z * step_[0] + y * step_[1];
    const int64_t unit = units_.unit_of(z, y), slot = units_.slot_of(z, y);
    C* tile = scratch_.tile + slot * units_.slot_size * block_.lanes;
    if (scratch_.unit_tags[slot] != unit) {
      scratch_.unit_tags[slot] = unit;
      plan_.pads_rows ? load_padded(z, y, tile) : load_unit(z, y, tile);
    }
    return reinterpret_cast<const E*>(tile) + (units_.whole_image ? z * step_[0] : 0) +
           (units_.whole_slices ? y * step_[1] : 0);
  }

  // The first element of what fills a slot.
  const T* unit_at(int64_t z, int64_t y) const {
    const ConvLayout& layout = call_.input_layout;
    return input_ + (units_.whole_image ? 0 : z * layout.d[0]) + (units_.whole_slices ? 0 : y * layout.d[1]);
  }

  // The row that the kernel meets next.
  int64_t next_row(int64_t y) const {
    const int64_t left = g_.kernel_extent(1) - 1 - (y + g_.padding[1]) % g_.stride[1];
    return left > 0 ? y + 1 : y + 1 + g_.stride[1] - g_.kernel_extent(1);
  }

  template <class To>
  void transpose_unit(int64_t z, int64_t y, To* to) {
    const ConvLayout& layout = call_.input_layout;
    const T* from = unit_at(z, y);
    const int64_t next = next_row(y);
    if (!units_.whole_slices && next < g_.input[1]) ask_for_run(from + (next - y) * layout.d[1], units_.size);
    // Long ones in parts, each of which asks for the next: more channels than the hardware follows.
    const int64_t part = units_.whole_slices && comes_from_afar_ ? 2 * kLine : units_.size;
    for (int64_t x = 0; x < units_.size; x += part) {
      const int64_t left = units_.size - x;
      if (left > part) ask_for_run(from + x + part, smaller(part, left - part));
      transpose_matrix(from + x, layout.c, block_.live, smaller(part, left), to + x * block_.lanes, block_.lanes);
    }
  }

  void load_unit(int64_t z, int64_t y, C* to) {
    const ConvLayout& layout = call_.input_layout;
    if (layout.c != 1 && units_.as_it_lies) return transpose_unit(z, y, to);
    const T* from = unit_at(z, y);
    for (int64_t x = 0; x < g_.input[2]; ++x) {
      copy_run(from + x * layout.d[2], layout.c, block_.live, to + x * block_.lanes);
    }
  }

  // A run of each channel of the block: more lines, far apart, than the hardware foresees.
  void ask_for_run(const T* run, int64_t count) const {
    for (int64_t c = 0; c < block_.live; ++c) {
      for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(run + c * call_.input_layout.c + i, 0, 2);
    }
  }

  // A unit with zeros in its rows' padding.
  void load_padded(int64_t z, int64_t y, C* to) {
    const ConvLayout& layout = call_.input_layout;
    if (layout.c == 1) {
      const T* row = unit_at(z, y);
      const bool asks = y + 1 < g_.input[1];
      for (int64_t x = 0; x < g_.input[2] && asks; ++x) __builtin_prefetch(row + layout.d[1] + x * layout.d[2], 0, 2);
      return pad_row(row, layout.d[2], block_.live, to);
    }
    T* const unit = static_cast<T*>(scratch_.unit);
    transpose_unit(z, y, unit);
    const int64_t slices = units_.whole_image ? g_.input[0] : 1, rows = units_.whole_slices ? g_.input[1] : 1;
    for (int64_t i = 0; i < slices; ++i) {
      for (int64_t j = 0; j < rows; ++j, to += units_.slot_d[1] * block_.lanes) {
        pad_row(unit + (i * units_.d[0] + j * units_.d[1]) * block_.lanes, units_.d[2] * block_.lanes, block_.lanes,
                to);
      }
    }
  }

  void pad_row(const T* row, int64_t step, int64_t live, C* to) const {
    const int64_t padding = g_.padding[2], past = padding + g_.input[2];
    const auto part = [&](const T* from, int64_t i) __attribute__((always_inline)) {
      return live - i >= kLanes<C> ? load(from + i) : load_up_to<T>(from + i, live - i);
    };
    if constexpr (kIsPair<E>) {  // each column gets the one beside it that the next tap meets
      const int64_t beside = g_.dilation[2];
      for (int64_t i = 0; i < block_.lanes; i += kLanes<C>) {
        const auto column = [&](int64_t at) __attribute__((always_inline)) {
          return at < padding || at >= past ? Vec<C>{} : part(row + (at - padding) * step, i);
        };
        C* target = to + i;
        Vec<C> next = column(0);
        for (int64_t x = 0; x < units_.slot_d[1]; ++x, target += block_.lanes) {
          const Vec<C> first = beside == 1 ? next : column(x);
          next = column(x + beside);
          store(target, zip_pairs(first, next));
        }
      }
      return;
    }
    fill_zeros(to, padding * block_.lanes);
    to += padding * block_.lanes;
    for (int64_t x = 0; x < g_.input[2]; ++x, row += step) {
      for (int64_t i = 0; i < block_.lanes; i += kLanes<C>, to += kLanes<C>) store(to, part(row, i));
    }
    fill_zeros(to, padding * block_.lanes);
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
  DepthwiseTap<E>* taps_;
  int64_t shared_apart_;
  bool comes_from_afar_, asks_;
  Range interior_;  // conv columns at which the whole kernel meets the input, or its slot
  const T* input_;  // the image's first channel of the block
  int64_t step_[3], image_, loaded_image_ = -1, loaded_block_ = -1, padded_channels_ = -1;
};

template <class T>
void forward_depthwise(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  const auto run = [&](auto&& worker) {
    for (int64_t item = first_item; item < last_item; ++item) worker.run(item);
  };
  if constexpr (kHasPairs<T>) {
    if (call.plan.pairs_taps) return run(DepthwiseForward<bfloat16x2, T>(call, scratch));
  }
  if constexpr (sizeof(T) != sizeof(Compute<T>)) {
    if (call.plan.in_place) return run(DepthwiseForward<T, T>(call, scratch));
  }
  run(DepthwiseForward<Compute<T>, T>(call, scratch));
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
