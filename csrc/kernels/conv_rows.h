// Forward with consecutive conv pixels in the vector's lanes: for few output channels, and for short rows.
//
// A thread copies the input under a band of pooled rows into a tile padded with zeros, in which the conv rows of one
// slice follow one another at one pitch, a plane for each phase of the stride: so that the whole slice is one run of
// pixels that a register tile goes along, and the pixels under a tap are consecutive whatever the stride. What it
// computes between the end of a row and the start of the next is not used. Contiguous images are read where they lie
// instead if each number is read once or, of every second or third column, few times.
#pragma once

#include "conv_rows_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// weight -> [group][block of at most so many output channels][depth][channel]
template <class T>
void pack_blocks(const ConvPoolForward<T>& call, int64_t most, int64_t first_item, int64_t last_item) {
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.weight_layout;
  const int64_t blocks = divide_up(g.out_channels, most), depth = g.depth();
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t group = item / blocks, block = item % blocks;
    const int64_t first = g.out_channels * block / blocks, count = g.out_channels * (block + 1) / blocks - first;
    const T* from = call.weight + (group * g.out_channels + first) * layout.n;
    Compute<T>* to = call.packed + (group * g.out_channels + first) * depth;
    pack_taps(g, TapOrder::channels_first, from, layout, count, to, count);
  }
}

// Vectors of pixels: their elements of the input, `stride` apart, and where they go, from `pixels` on.
template <class E, int vectors>
struct RowVectors {
  const E* from[vectors];
  int64_t pixels[vectors];
  int64_t count;  // pixels of each vector
};

// The register tile: vectors of pixels of each of `outputs` channels. `asks`: for what lies ahead, the same channel's
// next pixels, or where the kernel strides, so that these lie elsewhere, the next channels' pixels.
template <int outputs, int vectors, int stride, bool asks, class E, int most, class C = Compute<E>>
FASTNN_INLINE void rows_tile(const RowVectors<E, most>& row, const int64_t* offsets, int64_t depth, const C* weight,
                             const C* bias, C* to, int64_t to_step) {
  const E* from[vectors];
#pragma GCC unroll 16
  for (int v = 0; v < vectors; ++v) from[v] = row.from[v];
  const int64_t elements = (row.count - 1) * stride + 1;
  const auto load_pixels = [&](const E* at) __attribute__((always_inline)) {
    if constexpr (stride == 1) return load(at);
    return load_strided_up_to<stride>(at, elements);
  };
  Vec<C> total[outputs][vectors];
#pragma GCC unroll 16
  for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) total[o][v] = broadcast<C>(bias[o]);
  }
  OffsetsAhead ahead(offsets, depth);
  sum_in_parts(depth, total, [&](int64_t k) __attribute__((always_inline)) {
    const int64_t offset = ahead.take(k);
    if constexpr (asks) {
      constexpr int64_t kProductsAhead = 8;
      const int64_t next = stride == 1 ? offset + vectors * kLanes<C> : offsets[smaller(k + kProductsAhead, depth - 1)];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) __builtin_prefetch(from[v] + next);
    }
    if constexpr (outputs <= vectors) {
      Vec<C> factor[outputs];
#pragma GCC unroll 16
      for (int o = 0; o < outputs; ++o) factor[o] = broadcast<C>(weight[o]);
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) {
        Vec<C> value = load_pixels(from[v] + offset);
        if (outputs > 1) keep_in_register(value);  // or each output would load it again
#pragma GCC unroll 16
        for (int o = 0; o < outputs; ++o) total[o][v] += value * factor[o];
      }
    } else {
      Vec<C> value[vectors];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) value[v] = load_pixels(from[v] + offset);
#pragma GCC unroll 16
      for (int o = 0; o < outputs; ++o) {
        const Vec<C> factor = broadcast<C>(weight[o]);
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) total[o][v] += value[v] * factor;
      }
    }
    weight += outputs;
  });
#pragma GCC unroll 16
  for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) store(to + o * to_step + row.pixels[v], total[o][v]);
  }
}

// The conv pixels of a slice, whose rows have `columns` and begin `row_step` elements apart. Where vectors may not read
// beyond the run, its last one ends with it, as a row's does.
template <int outputs, int stride, bool asks, class E, class C = Compute<E>>
FASTNN_SHARED void rows_slice(const RowShape& s, int64_t columns, int64_t row_step, bool within_run, const E* tile,
                              const int64_t* offsets, int64_t depth, const C* weight, const C* bias, C* to,
                              int64_t to_step) {
  constexpr int most = stride == 1 ? row_vectors(outputs) : picked_vectors(outputs);
  const int64_t last = s.by_rows ? columns : within_run ? s.run : s.vectors * kLanes<C>;
  const int64_t in_row = s.by_rows ? divide_up(last, kLanes<C>) : s.vectors;
  const int64_t tiles = divide_up(s.vectors, most);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = s.vectors * t / tiles, count = s.vectors * (t + 1) / tiles - begin;
    RowVectors<E, most> vectors;
    vectors.count = smaller(last, kLanes<C>);
    for (int64_t v = 0; v < count; ++v) {
      const int64_t row = (begin + v) / in_row;
      const int64_t column = smaller((begin + v) % in_row * kLanes<C>, last - vectors.count);
      vectors.from[v] = tile + row * row_step + column * stride;
      vectors.pixels[v] = row * s.pitch + column;
    }
    with_constant<most>(static_cast<int>(count), [&](auto some) {
      rows_tile<outputs, decltype(some)::value, stride, asks>(vectors, offsets, depth, weight, bias, to, to_step);
    });
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

template <class T>
class RowsForward {
  using C = Compute<T>;

 public:
  RowsForward(const ConvPoolForward<T>& call, void* memory)
      : call_(call),
        g_(call.geometry),
        s_(row_shape<C>(call.geometry, call.plan, call.plan.band)),
        scratch_(call.geometry, call.plan, memory) {
    // More channels than the hardware foresees, each in pages of its own.
    constexpr int64_t kCache = 1 << 20, kPage = 4096, kChannels = 32, size = sizeof(T);
    const int64_t bytes = g_.batch * g_.groups * g_.in_channels * g_.input[0] * g_.input[1] * g_.input[2] * size;
    asks_ahead_ =
        call.plan.in_place && g_.in_channels >= kChannels && call.input_layout.c * size >= kPage && bytes > kCache;
    const ConvLayout& layout = call.input_layout;
    if (call.plan.in_place) {
      s_.channel = layout.c;
      s_.slice = layout.d[0];
    }
    for_each_tap(g_, TapOrder::channels_first, [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
      const int64_t row = h * g_.dilation[1], column = w * g_.dilation[2];
      if (call.plan.in_place) {
        scratch_.offsets[k] =
            c * layout.c + d * g_.dilation[0] * layout.d[0] + row * layout.d[1] + column * layout.d[2];
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
    slice_ = item % g_.output[0];
    item /= g_.output[0];
    const int64_t parts = g_.groups / call_.plan.tile_groups;
    group_ = item % parts * call_.plan.tile_groups;
    image_ = item / parts;
    first_conv_[0] = larger(0, slice_ * g_.pool_stride[0] - g_.pool_padding[0]);
    const Range rows = rows_under_band(g_, first_, call_.plan.band);
    first_conv_[1] = rows.first;
    set_rows<C>(g_, rows.last - rows.first, s_);
    const ConvLayout& layout = call_.input_layout;
    const T* image = call_.input + image_ * layout.n + group_ * g_.in_channels * layout.c;
    if (call_.plan.in_place) {
      run_groups(image + first_conv_[0] * g_.stride[0] * layout.d[0] + first_conv_[1] * g_.stride[1] * layout.d[1]);
    } else {
      load_tile(image);
      run_groups(static_cast<const C*>(scratch_.tile));
    }
  }

 private:
  // From a tile, or an image, of elements E: its band's first conv pixel, first tap.
  template <class E>
  void run_groups(const E* tile) {
    const int64_t blocks = divide_up(g_.out_channels, kRowOutputs);
    for (int64_t i = 0; i < call_.plan.tile_groups; ++i, ++group_, tile += g_.in_channels * s_.channel) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = g_.out_channels * b / blocks, last = g_.out_channels * (b + 1) / blocks;
        with_constant<kRowOutputs>(static_cast<int>(last - first),
                                   [&](auto outputs) { make_pixels<decltype(outputs)::value>(tile, first); });
        pool(last - first);
        write(group_ * g_.out_channels + first, last - first);
      }
    }
  }

  void load_tile(const T* image) {
    const ConvLayout& layout = call_.input_layout;
    const int64_t channels = call_.plan.tile_groups * g_.in_channels;
    const bool channels_inside = layout.c == 1 && channels > 1;
    const int64_t row_phases = smaller(g_.stride[1], g_.kernel_extent(1));
    for (int64_t c = 0; c < (channels_inside ? 1 : channels); ++c) {
      for (int64_t d = 0; d < s_.slices; ++d) {
        const int64_t z = first_conv_[0] * g_.stride[0] - g_.padding[0] + d;
        for (int64_t phase = 0; phase < row_phases; ++phase) {
          for (int64_t r = 0; r < s_.rows; ++r) {
            const int64_t y = (first_conv_[1] + r) * g_.stride[1] - g_.padding[1] + phase;
            C* to = scratch_.tile + c * s_.channel + d * s_.slice + phase * s_.phase[0] + r * s_.pitch;
            const bool inside = z >= 0 && z < g_.input[0] && y >= 0 && y < g_.input[1];
            load_row(inside ? image + c * layout.c + z * layout.d[0] + y * layout.d[1] : nullptr, channels_inside, to);
          }
        }
      }
    }
  }

  // A row of one channel, or of all where they lie inside the pixels; zeros for null.
  void load_row(const T* from, bool channels_inside, C* to) {
    const ConvLayout& layout = call_.input_layout;
    const int64_t phases = smaller(g_.stride[2], g_.kernel_extent(2)), stride = g_.stride[2];
    const int64_t channels = channels_inside ? call_.plan.tile_groups * g_.in_channels : 1;
    for (int64_t phase = 0; phase < phases; ++phase, to += s_.phase[1]) {
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
      const T* source = from + (left * stride - offset) * layout.d[2];
      if (channels_inside) {
        transpose_matrix(source, layout.d[2] * stride, right - left, channels, to + left, s_.channel);
      } else {
        copy_run(source, layout.d[2] * stride, right - left, to + left);
      }
    }
  }

  // The conv pixels of a block of outputs, of which it is the first.
  template <int outputs, class E>
  void make_pixels(const E* tile, int64_t first) {
    C bias[outputs] = {};
    for (int o = 0; o < outputs && call_.bias; ++o) {
      bias[o] = to_compute(call_.bias[group_ * g_.out_channels + first + o]);
    }
    const C* weight = call_.packed + (group_ * g_.out_channels + first) * g_.depth();
    const int64_t slices = smaller(s_.conv[0], g_.conv[0] - first_conv_[0]);
    for (int64_t z = 0; z < slices; ++z) {
      C* to = pixels(z, 0, outputs);
      make_slice<outputs>(tile + z * g_.stride[0] * s_.slice, weight, bias, to);
      for (int o = 0; o < outputs; ++o) spread_rows(to + o * scratch_.pixel_step);
    }
  }

  // A slice of the block's conv pixels -> to.
  template <int outputs, class E>
  void make_slice(const E* tile, const C* weight, const C* bias, C* to) {
    const int64_t row_step = s_.picks ? g_.stride[1] * call_.input_layout.d[1] : s_.pitch;
    const auto run = [&](auto stride, auto asks) {
      rows_slice<outputs, decltype(stride)::value, decltype(asks)::value>(s_, g_.conv[2], row_step, call_.plan.in_place,
                                                                          tile, scratch_.offsets, g_.depth(), weight,
                                                                          bias, to, scratch_.pixel_step);
    };
    if constexpr (sizeof(E) == sizeof(T) && kPicksRows<T>) {
      const int64_t stride = g_.stride[2] * call_.input_layout.d[2];
      if (s_.picks) return stride == 2 ? run(Constant<2>{}, Constant<1>{}) : run(Constant<3>{}, Constant<1>{});
    }
    asks_ahead_ ? run(Constant<1>{}, Constant<1>{}) : run(Constant<1>{}, Constant<0>{});
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
  const ConvPoolGeometry& g_;
  RowShape s_;
  const RowScratch<C> scratch_;
  int64_t image_, group_, slice_, first_, last_;
  int64_t first_conv_[2];
  bool asks_ahead_;
};

template <class T>
void forward_rows(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  RowsForward<T> worker(call, scratch);
  for (int64_t item = first_item; item < last_item; ++item) worker.run(item);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
