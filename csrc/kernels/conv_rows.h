// Forward with consecutive conv pixels in the vector's lanes: for few output channels, and for short rows.
//
// A thread copies the input under a band of pooled rows into a tile padded with zeros, in which the conv rows of one
// slice follow one another at one pitch, a plane for each phase of the stride: so that the whole slice is one run of
// pixels that a register tile goes along, and the pixels under a tap are consecutive whatever the stride. What it
// computes between the end of a row and the start of the next is not used. Contiguous images are read where they lie
// instead if each number is read once or, of every second or third column, few times.
#pragma once

#include "conv_direct_pack.h"
#include "conv_rows_tile.h"

namespace fastnn {
namespace FASTNN_ISA {

// weight -> [group][block of at most so many output channels][depth][channel], in elements E
template <class E, class T>
void pack_blocks(const ConvPoolForward<T>& call, int64_t most, int64_t first_item, int64_t last_item) {
  const ConvPoolGeometry g = tile_geometry<E>(call.geometry);
  const ConvLayout& layout = call.weight_layout;
  const int64_t blocks = divide_up(g.out_channels, most), depth = g.depth();
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t group = item / blocks, block = item % blocks;
    const int64_t first = g.out_channels * block / blocks, count = g.out_channels * (block + 1) / blocks - first;
    const T* from = call.weight + (group * g.out_channels + first) * layout.n;
    E* to = reinterpret_cast<E*>(call.packed) + (group * g.out_channels + first) * depth;
    if constexpr (kIsPair<E>) {
      pack_pairs(g, TapOrder::channels_first, call.geometry.in_channels, from, layout, count, to, count);
    } else {
      pack_taps(g, TapOrder::channels_first, from, layout, count, to, count);
    }
  }
}

// A vector of every `stride`-th element; a fixed stride of 0 stands for one known only at run time.
template <int fixed_stride, class C>
FASTNN_INLINE Vec<C> load_strided(const C* from, int64_t stride) {
  if constexpr (fixed_stride == 1) {
    return load(from);
  } else if constexpr (fixed_stride > 1) {
    return load_strided_up_to<fixed_stride>(from, fixed_stride * kLanes<C>);
  } else {
    C lanes[kLanes<C>];
    for (int i = 0; i < kLanes<C>; ++i) lanes[i] = from[i * stride];
    return load(lanes);
  }
}

// One thread's way through its items, with a weight of elements E and a tile of them.
template <class E, class T>
class RowsForward {
  using C = Compute<T>;

 public:
  RowsForward(const ConvPoolForward<T>& call, void* memory)
      : call_(call),
        g_(tile_geometry<E>(call.geometry)),
        s_(row_shape<C>(g_, call.plan)),
        scratch_(g_, call.plan, memory) {
    // More channels than the hardware foresees, each in pages of its own.
    constexpr int64_t kCache = 1 << 20, kPage = 4096, kMany = 32, size = sizeof(T);
    asks_ahead_ = call.plan.in_place && call.geometry.in_channels >= kMany && call.input_layout.c * size >= kPage &&
                  call.geometry.batch * image_size(call.geometry) * size > kCache;
    const ConvLayout& layout = call.input_layout;
    if (call.plan.in_place) {
      s_.channel = kChannels<E> * layout.c;
      s_.slice = layout.d[0];
    }
    for_each_tap(g_, TapOrder::channels_first, [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
      const int64_t row = h * g_.dilation[1], column = w * g_.dilation[2];
      if (call.plan.in_place) {
        scratch_.offsets[k] =
            c * s_.channel + d * g_.dilation[0] * layout.d[0] + row * layout.d[1] + column * layout.d[2];
        return;
      }
      scratch_.offsets[k] = c * s_.channel + d * g_.dilation[0] * s_.slice + row % g_.stride[1] * s_.phase[0] +
                            row / g_.stride[1] * s_.pitch + column % g_.stride[2] * s_.phase[1] + column / g_.stride[2];
    });
  }

  void run(int64_t item) {
    first_ = item % call_.plan.row_parts * call_.plan.band;
    last_ = smaller(first_ + call_.plan.band, g_.output[1]);
    item /= call_.plan.row_parts;
    const int64_t slice_parts = divide_up(g_.output[0], call_.plan.slices);
    first_slice_ = item % slice_parts * call_.plan.slices;
    item /= slice_parts;
    const int64_t parts = g_.groups / call_.plan.tile_groups;
    group_ = item % parts * call_.plan.tile_groups;
    image_ = item / parts;
    const Range slices = conv_under(g_, 0, first_slice_, call_.plan.slices);
    first_conv_[0] = slices.first;
    slices_ = slices.last - slices.first;
    const Range rows = conv_under(g_, 1, first_, call_.plan.band);
    first_conv_[1] = rows.first;
    set_rows<C>(g_, rows.last - rows.first, s_);
    const ConvLayout& layout = call_.input_layout;
    const T* image = call_.input + image_ * layout.n + group_ * call_.geometry.in_channels * layout.c;
    if (call_.plan.in_place) {
      run_groups(image + first_conv_[0] * g_.stride[0] * layout.d[0] + first_conv_[1] * g_.stride[1] * layout.d[1]);
    } else {
      load_tile(image);
      run_groups(static_cast<const E*>(scratch_.tile));
    }
  }

 private:
  // From a tile, or an image of numbers: its band's first conv pixel, first tap.
  template <class S>
  void run_groups(const S* tile) {
    const int64_t blocks = divide_up(g_.out_channels, kRowOutputs);
    for (int64_t i = 0; i < call_.plan.tile_groups; ++i, ++group_, tile += g_.in_channels * s_.channel) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = g_.out_channels * b / blocks, last = g_.out_channels * (b + 1) / blocks;
        with_constant<kRowOutputs>(static_cast<int>(last - first),
                                   [&](auto outputs) { make_pixels<decltype(outputs)::value>(tile, first); });
        const int64_t last_slice = smaller(first_slice_ + call_.plan.slices, g_.output[0]);
        for (slice_ = first_slice_; slice_ < last_slice; ++slice_) {
          pool(last - first);
          write(group_ * g_.out_channels + first, last - first);
        }
      }
    }
  }

  void load_tile(const T* image) {
    const ConvLayout& layout = call_.input_layout;
    const int64_t channels = call_.plan.tile_groups * g_.in_channels;
    const bool channels_inside = layout.c == 1 && channels > 1;
    const int64_t row_phases = smaller(g_.stride[1], g_.kernel_extent(1));
    for (int64_t c = 0; c < (channels_inside ? 1 : channels); ++c) {
      for (int64_t d = 0; d < s_.slices; d += s_.every[0]) {
        const int64_t z = first_conv_[0] * g_.stride[0] - g_.padding[0] + d;
        for (int64_t phase = 0; phase < row_phases; phase += s_.every[1]) {
          for (int64_t r = 0; r < s_.rows; ++r) {
            const int64_t y = (first_conv_[1] + r) * g_.stride[1] - g_.padding[1] + phase;
            E* to = scratch_.tile + c * s_.channel + d * s_.slice + phase * s_.phase[0] + r * s_.pitch;
            const bool inside = z >= 0 && z < g_.input[0] && y >= 0 && y < g_.input[1];
            load_row(inside ? image + z * layout.d[0] + y * layout.d[1] : nullptr, channels_inside, c, to);
          }
        }
      }
    }
  }

  // A row of an element of channels, or of all where they lie inside the pixels; zeros for null.
  void load_row(const T* from, bool channels_inside, int64_t element, E* to) {
    ConvLayout layout = call_.input_layout;
    const int64_t phases = smaller(g_.stride[2], g_.kernel_extent(2)), stride = g_.stride[2];
    const int64_t channels = channels_inside ? call_.plan.tile_groups * g_.in_channels : 1;
    for (int64_t phase = 0; phase < phases; phase += s_.every[2], to += s_.every[2] * s_.phase[1]) {
      // Columns [left, right) of the tile are inside the input.
      const int64_t offset = g_.padding[2] - phase, room = g_.input[2] + offset;
      const int64_t left = smaller(s_.pitch, offset > 0 ? divide_up(offset, stride) : 0);
      const int64_t right =
          from == nullptr || room <= 0 ? left : larger(left, smaller(s_.pitch, divide_up(room, stride)));
      for (int64_t c = 0; c < channels; ++c) {
        fill_zeros(to + c * s_.channel, left);
        fill_zeros(to + c * s_.channel + right, s_.pitch - right);
      }
      if (right == left) continue;
      const T* source = from + (left * stride - offset) * call_.input_layout.d[2];
      layout.d[2] = call_.input_layout.d[2] * stride;
      if (!channels_inside) {
        copy_columns(source, layout, call_.geometry.in_channels, false, element, right - left, to + left, 1);
      } else if constexpr (kIsPair<E>) {
        transpose_matrix(reinterpret_cast<const float*>(source), layout.d[2] / 2, right - left, channels,
                         reinterpret_cast<float*>(to + left), s_.channel);
      } else {
        transpose_matrix(source, layout.d[2], right - left, channels, to + left, s_.channel);
      }
    }
  }

  // The conv pixels of a block of outputs, of which it is the first.
  template <int outputs, class S>
  void make_pixels(const S* tile, int64_t first) {
    C bias[outputs] = {};
    for (int o = 0; o < outputs && call_.bias; ++o) {
      bias[o] = to_compute(call_.bias[group_ * g_.out_channels + first + o]);
    }
    const E* weight = reinterpret_cast<const E*>(call_.packed) + (group_ * g_.out_channels + first) * g_.depth();
    for (int64_t z = 0; z < slices_; ++z) {
      C* to = pixels(z, 0, outputs);
      make_slice<outputs>(tile + z * g_.stride[0] * s_.slice, weight, bias, to);
      for (int o = 0; o < outputs; ++o) spread_rows(to + o * scratch_.pixel_step);
    }
  }

  // A slice of the block's conv pixels -> to.
  template <int outputs, class S>
  void make_slice(const S* tile, const E* weight, const C* bias, C* to) {
    const int64_t row_step = s_.picks ? g_.stride[1] * call_.input_layout.d[1] : s_.pitch;
    const auto run = [&](auto stride, auto asks) {
      rows_slice<E, outputs, decltype(stride)::value, decltype(asks)::value>(
          s_, g_.conv[2], row_step, call_.plan.in_place, tile, scratch_.offsets, g_.depth(), weight, bias, to,
          scratch_.pixel_step);
    };
    if constexpr (sizeof(S) == sizeof(T) && kPicksRows<T>) {
      const int64_t stride = g_.stride[2] * call_.input_layout.d[2];
      if (s_.picks) return stride == 2 ? run(Constant<2>{}, Constant<1>{}) : run(Constant<3>{}, Constant<1>{});
    }
    if constexpr (sizeof(S) == sizeof(T)) {
      if (asks_ahead_) return run(Constant<1>{}, Constant<1>{});
    }
    run(Constant<1>{}, Constant<0>{});
  }

  // Those that have been made -> the stage.
  void pool(int64_t outputs) {
    for (int64_t y = first_; y < last_; ++y) {
      const int64_t count = find_rows(y, outputs);
      for (int64_t o = 0; o < outputs; ++o) {
        const int64_t at = o * scratch_.stage_step + (y - first_) * g_.output[2];
        const int64_t shift = o * scratch_.pixel_step;
        if (count > 1 && !call_.winners) {
          const WindowRow<C> largest = find_largest(count, shift);
          pool_row(&largest, 1, 0, scratch_.stage + at, nullptr);
        } else {
          pool_row(scratch_.window_rows, count, shift, scratch_.stage + at, scratch_.winner_stage + at);
        }
      }
    }
  }

  // The first pixel of a slice's channel; margins lie before and behind each row.
  C* pixels(int64_t z, int64_t o, int64_t outputs) {
    return scratch_.pixels + s_.margin + (z * outputs + o) * scratch_.pixel_step;
  }

  // Makes room between the rows of one channel for what windows find beside them.
  void spread_rows(C* row) {
    constexpr C lowest = -static_cast<C>(__builtin_inf());
    for (int64_t r = s_.conv[1] - 1; r > 0 && s_.spread > s_.pitch; --r) {
      __builtin_memmove(row + r * s_.spread, row + r * s_.pitch, g_.conv[2] * sizeof(C));
    }
    for (int64_t r = 0; r < s_.conv[1] && s_.margin > 0; ++r, row += s_.spread) {
      for (int64_t i = 0; i < s_.margin; ++i) row[-1 - i] = row[g_.conv[2] + i] = lowest;
    }
  }

  // The conv rows of the block's first channel under a row of windows: how many.
  int64_t find_rows(int64_t row, int64_t outputs) {
    const Range slices = places_inside(g_, 0, slice_), rows = places_inside(g_, 1, row);
    int64_t count = 0;
    for (int64_t i = slices.first; i < slices.last; ++i) {
      const int64_t z = slice_ * g_.pool_stride[0] - g_.pool_padding[0] + i - first_conv_[0];
      for (int64_t j = rows.first; j < rows.last; ++j) {
        const int64_t y = row * g_.pool_stride[1] - g_.pool_padding[1] + j - first_conv_[1];
        const C* first = pixels(z, 0, outputs) + y * s_.spread - g_.pool_padding[2];
        scratch_.window_rows[count++] = {first, (i * g_.pool_kernel[1] + j) * g_.pool_kernel[2]};
      }
    }
    return count;
  }

  // Of one channel, the largest pixel of each column, which then stands for all: where only the values are wanted.
  WindowRow<C> find_largest(int64_t count, int64_t shift) {
    const WindowRow<C>* rows = scratch_.window_rows;
    const int64_t past = (g_.output[2] - 1) * g_.pool_stride[2] + g_.pool_extent(2);
    for (int64_t x = 0; x < past; x += kLanes<C>) {
      WindowMaximum<C, 1, false> column;
      column.start(load(rows[0].pixels + shift + x), 0);
      for (int64_t r = 1; r < count; ++r) column.add(load(rows[r].pixels + shift + x), 0);
      column.write(scratch_.largest + x, nullptr);
    }
    return {scratch_.largest, 0};
  }

  // One channel's row of windows; its pixels lie `shift` behind those of the rows.
  void pool_row(const WindowRow<C>* rows, int64_t count, int64_t shift, C* to, uint8_t* winners) {
    const auto run = [&](auto stride) {
      constexpr int fixed = decltype(stride)::value;
      call_.winners ? pool_windows<fixed, true>(rows, count, shift, to, winners)
                    : pool_windows<fixed, false>(rows, count, shift, to, winners);
    };
    switch (g_.pool_stride[2]) {
      case 1:
        return run(Constant<1>{});
      case 2:
        return run(Constant<2>{});
      case 3:
        return run(Constant<3>{});
      case 4:
        return run(Constant<4>{});
      default:
        return run(Constant<0>{});
    }
  }

  template <int stride, bool with_winners>
  void pool_windows(const WindowRow<C>* rows, int64_t count, int64_t shift, C* to, uint8_t* winners) {
    for (int64_t x = 0; x < g_.output[2]; x += kLanes<C>) {
      const int64_t at = shift + x * g_.pool_stride[2];
      WindowMaximum<C, 1, with_winners> window;
      window.start(load_strided<stride>(rows[0].pixels + at, g_.pool_stride[2]), rows[0].place);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t p = r == 0; p < g_.pool_kernel[2]; ++p) {
          window.add(load_strided<stride>(rows[r].pixels + at + p, g_.pool_stride[2]), rows[r].place + p);
        }
      }
      window.write(to + x, winners + x);
    }
  }

  void write(int64_t channel, int64_t outputs) {
    const ConvLayout& layout = call_.output_layout;
    const int64_t count = (last_ - first_) * g_.output[2];
    const int64_t to = image_ * layout.n + channel * layout.c + slice_ * layout.d[0] + first_ * layout.d[1];
    if (layout.d[2] != 1) {
      transpose_matrix(scratch_.stage, scratch_.stage_step, outputs, count, call_.output + to, layout.d[2]);
      if (call_.winners) {
        transpose_matrix(scratch_.winner_stage, scratch_.stage_step, outputs, count, call_.winners + to, layout.d[2]);
      }
      return;
    }
    for (int64_t o = 0; o < outputs; ++o) {
      copy_out(scratch_.stage + o * scratch_.stage_step, count, call_.output + to + o * layout.c);
      if (call_.winners) {
        copy_out(scratch_.winner_stage + o * scratch_.stage_step, count, call_.winners + to + o * layout.c);
      }
    }
  }

  const ConvPoolForward<T>& call_;
  const ConvPoolGeometry g_;  // whose channels are elements
  RowShape s_;
  const RowScratch<E> scratch_;
  int64_t image_, group_, first_slice_, slice_, first_, last_;
  int64_t first_conv_[2], slices_;  // of conv pixels, the first slice and row, and how many slices
  bool asks_ahead_;
};

template <class E, class T>
void forward_rows(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  RowsForward<E, T> worker(call, scratch);
  for (int64_t item = first_item; item < last_item; ++item) worker.run(item);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
