// Forward: direct convolution with output channels in the vector's lanes.
//
// A thread copies the input that a band of pooled rows needs into a tile padded with zeros, so that the inner loop
// checks nothing. Then, a block of output channels at a time, rows of conv pixels go into a small ring, from which
// windows are pooled; a conv pixel under several windows is computed once.
#pragma once

#include "conv_pool_window.h"
#include "gemm.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kConvPixels = FASTNN_VECTOR_BYTES == 64 ? 14 : 6;
constexpr int64_t kTileBytes = 256 << 10;  // a band's input: part of L2, beside a block's weight
constexpr int64_t kStageBytes = 64 << 10;  // a band's output before it is transposed
constexpr int64_t kRowPixels = 128;        // conv pixels of a ring row: a few rows stay in L1

template <class C>
constexpr int64_t kBlockChannels = 2 * kLanes<C>;

FASTNN_INLINE int64_t round_up(int64_t a, int64_t multiple) {
  return divide_up(a, multiple) * multiple;
}

// Input rows (or slices, or columns) under `pooled` consecutive windows along dimension d.
FASTNN_INLINE int64_t input_extent(const ConvPoolGeometry& g, int d, int64_t pooled) {
  const int64_t conv = (pooled - 1) * g.pool_stride[d] + g.pool_extent(d);
  return (conv - 1) * g.stride[d] + g.kernel_extent(d);
}

// Rows of conv pixels held at once: those under one window, or under a whole slice of windows where windows also
// overlap in depth.
struct RingShape {
  int64_t slices, rows, columns;
  bool persistent;  // whether the next pooled row needs some of them again
};
FASTNN_INLINE RingShape ring_shape(const ConvPoolGeometry& g, const ConvPoolPlan& plan) {
  const bool overlap_depth = g.output[0] > 1 && g.pool_extent(0) > g.pool_stride[0];
  const bool overlap_height = g.output[1] > 1 && g.pool_extent(1) > g.pool_stride[1];
  const int64_t rows = overlap_depth ? g.conv[1] : smaller(g.conv[1], g.pool_extent(1));
  const int64_t columns = smaller(g.conv[2], (plan.columns - 1) * g.pool_stride[2] + g.pool_extent(2));
  return {smaller(g.conv[0], g.pool_extent(0)), rows, columns, overlap_depth || overlap_height};
}

// A thread's scratch, cut into its parts.
template <class C>
struct DirectScratch {
  C* tile;
  C* ring;
  C* stage;
  uint8_t* winner_stage;
  WindowRow<C>* window_rows;
  int64_t* tags;     // which conv row each slot of the ring holds
  int64_t* offsets;  // of the tile's elements under a conv pixel
  int64_t size;

  DirectScratch(const ConvPoolGeometry& g, const ConvPoolPlan& plan, void* memory) {
    const RingShape ring_size = ring_shape(g, plan);
    const int64_t blocks = ring_size.persistent ? divide_up(g.out_channels, kBlockChannels<C>) : 1;
    const int64_t slots = blocks * ring_size.slices * ring_size.rows;
    const int64_t stage_pixels = plan.band * plan.columns;
    char* base = static_cast<char*>(memory);
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
      char* part = base + used;
      used += round_up(bytes, 64);
      return part;
    };
    const int64_t tile_size =
        g.in_channels * input_extent(g, 0, 1) * input_extent(g, 1, plan.band) * input_extent(g, 2, plan.columns);
    tile = reinterpret_cast<C*>(take(tile_size * sizeof(C)));
    ring = reinterpret_cast<C*>(take(slots * ring_size.columns * kBlockChannels<C> * sizeof(C)));
    stage = reinterpret_cast<C*>(take(stage_pixels * kBlockChannels<C> * sizeof(C)));
    winner_stage = reinterpret_cast<uint8_t*>(take(stage_pixels * kBlockChannels<C>));
    window_rows = reinterpret_cast<WindowRow<C>*>(
        take(g.pool_kernel[0] * g.pool_kernel[1] * static_cast<int64_t>(sizeof(WindowRow<C>))));
    tags = reinterpret_cast<int64_t*>(take(slots * static_cast<int64_t>(sizeof(int64_t))));
    offsets = reinterpret_cast<int64_t*>(take(g.depth() * static_cast<int64_t>(sizeof(int64_t))));
    size = used;
  }
};

template <class C>
ConvPoolPlan plan_direct(const ConvPoolGeometry& g, const ConvLayout& input, int64_t threads) {
  ConvPoolPlan plan = {};
  plan.channels_last = input.c == 1 && g.in_channels > 1 && input.d[2] != 1;
  const int64_t row = smaller(g.conv[2], (g.output[2] - 1) * g.pool_stride[2] + g.pool_extent(2));
  plan.column_parts = row <= kRowPixels * 5 / 4 ? 1 : smaller(g.output[2], divide_up(row, kRowPixels));
  plan.columns = divide_up(g.output[2], plan.column_parts);
  plan.column_parts = divide_up(g.output[2], plan.columns);

  const int64_t slice = g.in_channels * input_extent(g, 0, 1) * input_extent(g, 2, plan.columns);
  plan.band = 1;
  while (plan.band < g.output[1] &&
         slice * input_extent(g, 1, plan.band + 1) * static_cast<int64_t>(sizeof(C)) <= kTileBytes &&
         (plan.band + 1) * plan.columns * kBlockChannels<C> * static_cast<int64_t>(sizeof(C)) <= kStageBytes) {
    ++plan.band;
  }
  // Whole images where there are enough of them; else parts of their rows, and last of their channels.
  const int64_t wanted = threads == 1 ? 1 : 4 * threads;
  const int64_t rows = g.output[0] * g.output[1];
  const int64_t blocks = divide_up(g.out_channels, kBlockChannels<C>);
  plan.items = g.batch * g.groups * plan.column_parts;
  plan.row_parts = plan.items >= wanted ? 1 : smaller(rows, divide_up(wanted, plan.items));
  plan.items *= plan.row_parts;
  plan.block_parts = plan.items >= wanted ? 1 : smaller(blocks, divide_up(wanted, plan.items));
  plan.items *= plan.block_parts;
  plan.pack_items = g.groups * blocks;
  plan.packed_size = g.groups * g.depth() * round_up(g.out_channels, kLanes<C>);
  plan.scratch_size = DirectScratch<C>(g, plan, nullptr).size;
  return plan;
}

// Calls body(k, channel, kernel position) over the depth of the product, in the order of the tile's memory.
template <class Body>
FASTNN_INLINE void for_each_tap(const ConvPoolGeometry& g, bool channels_last, const Body& body) {
  int64_t k = 0;
  const int64_t outer = channels_last ? 1 : g.in_channels, inner = channels_last ? g.in_channels : 1;
  for (int64_t co = 0; co < outer; ++co) {
    for (int64_t d = 0; d < g.kernel[0]; ++d) {
      for (int64_t h = 0; h < g.kernel[1]; ++h) {
        for (int64_t w = 0; w < g.kernel[2]; ++w) {
          for (int64_t ci = 0; ci < inner; ++ci) body(k++, co + ci, d, h, w);
        }
      }
    }
  }
}

// weight -> [group][block of channels][depth][vectors x lanes], zeros where a block has fewer channels
template <class T>
void pack_direct(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.weight_layout;
  const int64_t blocks = divide_up(g.out_channels, kBlockChannels<C>);
  const int64_t depth = g.depth();
  // In memory the depth is one run, for either order.
  const bool in_order = call.plan.channels_last
                            ? layout.c == 1 && layout.d[2] == g.in_channels &&
                                  layout.d[1] == layout.d[2] * g.kernel[2] && layout.d[0] == layout.d[1] * g.kernel[1]
                            : layout.d[2] == 1 && layout.d[1] == g.kernel[2] &&
                                  layout.d[0] == layout.d[1] * g.kernel[1] && layout.c == g.taps();
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t group = item / blocks, first = item % blocks * kBlockChannels<C>;
    const int64_t count = smaller(g.out_channels - first, kBlockChannels<C>);
    const int64_t width = round_up(count, kLanes<C>);
    const T* from = call.weight + (group * g.out_channels + first) * layout.n;
    C* to = call.packed + group * depth * round_up(g.out_channels, kLanes<C>) + first * depth;
    if (count < width) {
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t c = count; c < width; ++c) to[k * width + c] = 0;
      }
    }
    if (in_order) {
      transpose_matrix(from, layout.n, count, depth, to, width);
      continue;
    }
    for_each_tap(g, call.plan.channels_last, [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
      const T* element = from + c * layout.c + d * layout.d[0] + h * layout.d[1] + w * layout.d[2];
      for (int64_t o = 0; o < count; ++o) to[k * width + o] = to_compute(element[o * layout.n]);
    });
  }
}

// A box of the input, zeros where it reaches beyond: [channel][slice][row][column], or with the channel innermost.
template <class C>
struct InputTile {
  C* data;
  int64_t first[3];  // the input's coordinates of its corner, possibly negative
  int64_t size[3];
  int64_t c, d[3];  // its strides
};

template <class T, class C>
FASTNN_INLINE void copy_run(const T* from, int64_t stride, int64_t count, C* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; i += kLanes<C>)
      store_up_to<C>(to + i, load_up_to<T>(from + i, count - i), count - i);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = to_compute(from[i * stride]);
  }
}

// The way out of scratch.
template <class C, class T>
FASTNN_INLINE void copy_out(const C* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<C>) store_up_to<T>(to + i, load_up_to<C>(from + i, count - i), count - i);
}
FASTNN_INLINE void copy_out(const uint8_t* from, int64_t count, uint8_t* to) {
  __builtin_memcpy(to, from, count);
}

template <class C>
FASTNN_INLINE void fill_zeros(C* to, int64_t count) {
  if (count > 0) __builtin_memset(to, 0, count * sizeof(C));
}

// `from` is the input's (channel, slice, row, column) = 0 of the image and group.
template <class T, class C>
void fill_tile(const ConvPoolGeometry& g, const T* from, const ConvLayout& layout, bool channels_last,
               const InputTile<C>& tile) {
  const int64_t left = smaller(tile.size[2], larger(0, -tile.first[2]));
  const int64_t right = larger(left, smaller(tile.size[2], g.input[2] - tile.first[2]));
  const int64_t runs = channels_last ? 1 : g.in_channels;
  const int64_t pixel = channels_last ? g.in_channels : 1;
  for (int64_t c = 0; c < runs; ++c) {
    for (int64_t d = 0; d < tile.size[0]; ++d) {
      for (int64_t h = 0; h < tile.size[1]; ++h) {
        C* to = tile.data + c * tile.c + d * tile.d[0] + h * tile.d[1];
        const int64_t slice = tile.first[0] + d, row = tile.first[1] + h;
        if (slice < 0 || slice >= g.input[0] || row < 0 || row >= g.input[1]) {
          fill_zeros(to, tile.size[2] * pixel);
          continue;
        }
        fill_zeros(to, left * pixel);
        fill_zeros(to + right * pixel, (tile.size[2] - right) * pixel);
        const T* source =
            from + c * layout.c + slice * layout.d[0] + row * layout.d[1] + (tile.first[2] + left) * layout.d[2];
        if (!channels_last) {
          copy_run(source, layout.d[2], right - left, to + left);
        } else if (layout.d[2] == g.in_channels) {
          copy_run(source, 1, (right - left) * pixel, to + left * pixel);
        } else {
          for (int64_t w = left; w < right; ++w) copy_run(source + (w - left) * layout.d[2], 1, pixel, to + w * pixel);
        }
      }
    }
  }
}

// The register tile: `pixels` consecutive conv pixels by `vectors` vectors of output channels.
// A step of 0 stands for one known only at run time.
template <int pixels, int vectors, int fixed_step, class C>
FASTNN_INLINE void conv_tile(const C* tile, int64_t step, const int64_t* offsets, int64_t depth, const C* weight,
                             const Vec<C> (&bias)[vectors], C* to) {
  // Pixels a fixed step apart need but one pointer.
  const C* from[fixed_step ? 1 : pixels];
  for (int p = 0; p < (fixed_step ? 1 : pixels); ++p) from[p] = tile + p * step;
  Vec<C> total[pixels][vectors];
#pragma GCC unroll 16
  for (int p = 0; p < pixels; ++p) {
    for (int v = 0; v < vectors; ++v) total[p][v] = bias[v];
  }
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t offset = offsets[k];
    Vec<C> right[vectors];
    for (int v = 0; v < vectors; ++v) right[v] = load(weight + v * kLanes<C>);
    weight += vectors * kLanes<C>;
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) {
      const Vec<C> left = broadcast<C>(fixed_step ? from[0][offset + p * fixed_step] : from[p][offset]);
      for (int v = 0; v < vectors; ++v) total[p][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < pixels; ++p) {
    for (int v = 0; v < vectors; ++v) store(to + (p * vectors + v) * kLanes<C>, total[p][v]);
  }
}

// `count` conv pixels of a row -> to (count, vectors x lanes)
template <int vectors, class C>
void conv_row(const C* tile, int64_t step, const int64_t* offsets, int64_t depth, const C* weight,
              const Vec<C> (&bias)[vectors], int64_t count, C* to) {
  const int64_t tiles = divide_up(count, kConvPixels);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = count * t / tiles, last = count * (t + 1) / tiles;
    with_constant<kConvPixels>(static_cast<int>(last - first), [&](auto constant) {
      constexpr int pixels = decltype(constant)::value;
      const C* from = tile + first * step;
      C* target = to + first * vectors * kLanes<C>;
      if (step == 1) {
        conv_tile<pixels, vectors, 1>(from, step, offsets, depth, weight, bias, target);
      } else if (step == 2) {
        conv_tile<pixels, vectors, 2>(from, step, offsets, depth, weight, bias, target);
      } else {
        conv_tile<pixels, vectors, 0>(from, step, offsets, depth, weight, bias, target);
      }
    });
  }
}

// [pixel][pitch] -> `count` pooled pixels of an image from the one numbered `first` on, channels `channel` onwards
template <class T, class C>
void write_pixels(const ConvPoolForward<T>& call, int64_t image, int64_t channel, int64_t channels, int64_t first,
                  int64_t count, const C* from, const uint8_t* winners, int64_t pitch) {
  const ConvLayout& layout = call.output_layout;
  const int64_t to = image * layout.n + channel * layout.c + first * layout.d[2];
  if (layout.d[2] == 1) {
    transpose_matrix(from, pitch, count, channels, call.output + to, layout.c);
    if (call.winners) transpose_matrix(winners, pitch, count, channels, call.winners + to, layout.c);
    return;
  }
  for (int64_t x = 0; x < count; ++x) {
    copy_out(from + x * pitch, channels, call.output + to + x * layout.d[2]);
    if (call.winners) copy_out(winners + x * pitch, channels, call.winners + to + x * layout.d[2]);
  }
}

// One thread's way through its items.
template <class T>
class DirectForward {
  using C = Compute<T>;

 public:
  DirectForward(const ConvPoolForward<T>& call, void* memory)
      : call_(call),
        g_(call.geometry),
        plan_(call.plan),
        ring_(ring_shape(call.geometry, call.plan)),
        scratch_(call.geometry, call.plan, memory) {
    tile_.data = scratch_.tile;
    tile_.size[0] = input_extent(g_, 0, 1);
    tile_.size[1] = input_extent(g_, 1, plan_.band);
    tile_.size[2] = input_extent(g_, 2, plan_.columns);
    tile_.d[2] = plan_.channels_last ? g_.in_channels : 1;
    tile_.d[1] = tile_.d[2] * tile_.size[2];
    tile_.d[0] = tile_.d[1] * tile_.size[1];
    tile_.c = plan_.channels_last ? 1 : tile_.d[0] * tile_.size[0];
    for_each_tap(g_, plan_.channels_last, [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
      scratch_.offsets[k] = c * tile_.c + d * g_.dilation[0] * tile_.d[0] + h * g_.dilation[1] * tile_.d[1] +
                            w * g_.dilation[2] * tile_.d[2];
    });
  }

  void run(int64_t item) {
    const int64_t blocks = divide_up(g_.out_channels, kBlockChannels<C>);
    const int64_t block_part = item % plan_.block_parts;
    item /= plan_.block_parts;
    const int64_t row_part = item % plan_.row_parts;
    item /= plan_.row_parts;
    first_column_ = item % plan_.column_parts * plan_.columns;
    last_column_ = smaller(first_column_ + plan_.columns, g_.output[2]);
    item /= plan_.column_parts;
    group_ = item % g_.groups;
    image_ = item / g_.groups;
    const int64_t rows = g_.output[0] * g_.output[1];
    const int64_t last_row = rows * (row_part + 1) / plan_.row_parts;
    forget_rows(blocks);
    for (int64_t row = rows * row_part / plan_.row_parts; row < last_row;) {
      const int64_t slice = row / g_.output[1], first = row % g_.output[1];
      const int64_t last = smaller(smaller(first + plan_.band, g_.output[1]), first + last_row - row);
      load_band(slice, first, last);
      for (int64_t b = blocks * block_part / plan_.block_parts; b < blocks * (block_part + 1) / plan_.block_parts;
           ++b) {
        run_block(b, slice, first, last);
      }
      row += last - first;
    }
  }

 private:
  void forget_rows(int64_t blocks) {
    const int64_t slots = (ring_.persistent ? blocks : 1) * ring_.slices * ring_.rows;
    for (int64_t i = 0; i < slots; ++i) scratch_.tags[i] = -1;
  }

  void load_band(int64_t slice, int64_t first, int64_t last) {
    const int64_t pooled[3] = {slice, first, first_column_};
    for (int d = 0; d < 3; ++d) {
      first_conv_[d] = larger(0, pooled[d] * g_.pool_stride[d] - g_.pool_padding[d]);
      tile_.first[d] = first_conv_[d] * g_.stride[d] - g_.padding[d];
    }
    const int64_t past = (last_column_ - 1) * g_.pool_stride[2] - g_.pool_padding[2] + g_.pool_extent(2);
    conv_columns_ = larger(0, smaller(past, g_.conv[2]) - first_conv_[2]);
    InputTile<C> used = tile_;
    used.size[1] = input_extent(g_, 1, last - first);
    fill_tile(g_, call_.input + image_ * call_.input_layout.n + group_ * g_.in_channels * call_.input_layout.c,
              call_.input_layout, plan_.channels_last, used);
  }

  void run_block(int64_t block, int64_t slice, int64_t first, int64_t last) {
    const int64_t channels = smaller(g_.out_channels - block * kBlockChannels<C>, kBlockChannels<C>);
    if (!ring_.persistent) forget_rows(1);
    if (channels > kLanes<C>) {
      call_.winners ? run_band<2, true>(block, channels, slice, first, last)
                    : run_band<2, false>(block, channels, slice, first, last);
    } else {
      call_.winners ? run_band<1, true>(block, channels, slice, first, last)
                    : run_band<1, false>(block, channels, slice, first, last);
    }
  }

  template <int vectors, bool with_winners>
  void run_band(int64_t block, int64_t channels, int64_t slice, int64_t first, int64_t last) {
    const int64_t channel = group_ * g_.out_channels + block * kBlockChannels<C>;
    Vec<C> bias[vectors] = {};
    for (int v = 0; v < vectors && call_.bias; ++v) {
      bias[v] = load_up_to<T>(call_.bias + channel + v * kLanes<C>, channels - v * kLanes<C>);
    }
    const int64_t columns = last_column_ - first_column_;
    constexpr int64_t pixel = vectors * kLanes<C>;
    for (int64_t row = first; row < last; ++row) {
      const int64_t count = window_rows<vectors>(block, slice, row, bias);
      const int64_t at = (row - first) * columns * pixel;
      pool_row<C, vectors, with_winners>(g_, scratch_.window_rows, count, first_conv_[2], first_column_, last_column_,
                                         scratch_.stage + at, scratch_.winner_stage + at);
    }
    write_band<vectors>(channel, channels, slice, first, last);
  }

  // The rows of conv pixels under a row of windows, computed where the ring doesn't hold them.
  template <int vectors>
  int64_t window_rows(int64_t block, int64_t slice, int64_t row, const Vec<C> (&bias)[vectors]) {
    const PlaceRange slices = places_inside(g_, 0, slice), rows = places_inside(g_, 1, row);
    const int64_t first_slot = ring_.persistent ? block * ring_.slices * ring_.rows : 0;
    const C* weight = call_.packed + group_ * g_.depth() * round_up(g_.out_channels, kLanes<C>) +
                      block * kBlockChannels<C> * g_.depth();
    int64_t count = 0;
    for (int64_t i = slices.first; i < slices.last; ++i) {
      const int64_t z = slice * g_.pool_stride[0] - g_.pool_padding[0] + i * g_.pool_dilation[0];
      for (int64_t j = rows.first; j < rows.last; ++j) {
        const int64_t y = row * g_.pool_stride[1] - g_.pool_padding[1] + j * g_.pool_dilation[1];
        const int64_t slot = first_slot + z % ring_.slices * ring_.rows + y % ring_.rows;
        C* pixels = scratch_.ring + slot * ring_.columns * kBlockChannels<C>;
        if (scratch_.tags[slot] != z * g_.conv[1] + y) {
          scratch_.tags[slot] = z * g_.conv[1] + y;
          const C* corner = tile_.data + (z - first_conv_[0]) * g_.stride[0] * tile_.d[0] +
                            (y - first_conv_[1]) * g_.stride[1] * tile_.d[1];
          conv_row<vectors>(corner, g_.stride[2] * tile_.d[2], scratch_.offsets, g_.depth(), weight, bias,
                            conv_columns_, pixels);
        }
        scratch_.window_rows[count++] = {pixels, (i * g_.pool_kernel[1] + j) * g_.pool_kernel[2]};
      }
    }
    return count;
  }

  template <int vectors>
  void write_band(int64_t channel, int64_t channels, int64_t slice, int64_t first, int64_t last) {
    constexpr int64_t pixel = vectors * kLanes<C>;
    const int64_t columns = last_column_ - first_column_;
    const bool joined = columns == g_.output[2];  // the rows follow one another
    const int64_t rows = joined ? 1 : last - first, count = joined ? (last - first) * columns : columns;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (slice * g_.output[1] + first + r) * g_.output[2] + first_column_;
      write_pixels(call_, image_, channel, channels, at, count, scratch_.stage + r * count * pixel,
                   scratch_.winner_stage + r * count * pixel, pixel);
    }
  }

  const ConvPoolForward<T>& call_;
  const ConvPoolGeometry& g_;
  const ConvPoolPlan& plan_;
  const RingShape ring_;
  const DirectScratch<C> scratch_;
  InputTile<C> tile_;
  int64_t image_, group_, first_column_, last_column_, conv_columns_;
  int64_t first_conv_[3];
};

template <class T>
void forward_direct(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  DirectForward<T> worker(call, scratch);
  for (int64_t item = first_item; item < last_item; ++item) worker.run(item);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
