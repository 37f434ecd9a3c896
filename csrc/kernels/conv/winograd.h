// Winograd's F(2x2, 3x3), in bfloat16 F(4x4, 3x3), in each slice of the image.
//
// For kernels of 3x3 (and any depth) of stride 1 with so many channels on both sides that the transforms pay. A tile
// of 4x4 input pixels and the 3x3 weights are transformed so that the tile's four conv pixels take 16 multiplications a
// channel instead of 36 (Lavin and Gray, 2015). A band's tiles are transformed, multiplied by a block of output
// channels' transformed weight, one position after another, and transformed back into the ring of conv rows, from which
// windows are pooled. With tiles of 6x6 pixels, 16 conv pixels take 36 multiplications instead of 144, but the error is
// up to 34 times as large, which only the rounding of bfloat16 hides (moderate.h).
//
// It costs 4 / 9 or 1 / 4 of direct convolution's multiply-adds, and some additions and moves (kWinogradMove) per
// position of a tile for each input and each output channel. F(2x2)'s rounding errors are no larger than direct
// convolution's. NaN, infinity and huge values would spread over a tile, so calls that have some go to direct
// convolution.
#pragma once

#include "channels.h"
#include "pack.h"
#include "transforms.h"

namespace fastnn {
namespace FASTNN_ISA {

// The conv pixels in a row of a tile, the input pixels in its row, and the multiplications of a tile.
template <class T>
constexpr int kTile = static_cast<int>(winograd_tile(sizeof(T)));
template <class T>
constexpr int kPoints = kTile<T> + 2;
template <class T>
constexpr int kPositions = kPoints<T> * kPoints<T>;

// The packed weight: the elements from one position to the next for a block `width` channels wide, and where a block
// begins. A position ends with an unused line, since steps of a power of two would fall into few of the cache's sets.
template <class C>
FASTNN_INLINE int64_t position_size(const ConvPoolGeometry& g, int64_t width) {
  return g.in_channels * g.kernel[0] * width + kLanes<C>;
}
template <class T, class C = Compute<T>>
FASTNN_INLINE int64_t weight_offset(const ConvPoolGeometry& g, int64_t group, const Block& block) {
  const int64_t number = group * blocks_of<C>(g) + block.first / (kBlockVectors * kLanes<C>);
  return kPositions<T> * (lanes_before<C>(g, group, block) * g.in_channels * g.kernel[0] + number * kLanes<C>);
}

// The nine taps of `channels` channels of a weight that is turned around, backwards: [channel][tap][width].
template <class T, class C = Compute<T>>
void pack_turned_taps(const T* from, int64_t step, int64_t channels, int64_t count, bool last, int64_t inputs, C* to,
                      int64_t width) {
  for (int64_t c = 0; c < channels; ++c, from += step, to += 9 * width) {
    if (last) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        for (int64_t o = 0; o < width; o += kLanes<C>) {
          const int64_t left = count - o;
          store(to + (8 - tap) * width + o, left > 0 ? load_up_to<T>(from + tap * inputs + o, left) : Vec<C>{});
        }
      }
    } else {
      transpose_to_places(from, 9, count, count, 9, to, [&](int64_t tap) { return (8 - tap) * width; });
    }
  }
}

// weight -> [group][block][position][channel and slice, in the weight's order][vectors x lanes]
template <class T>
void pack_winograd(const ConvCall<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const int64_t blocks = blocks_of<C>(g);
  const bool turned = call.turned;
  const bool last = weight_is_channels_last(call);
  constexpr int64_t some = 16;  // channels at a time
  constexpr int points = kPoints<T>;
  alignas(64) C taps[9 * some * kBlockVectors * kLanes<C>] = {};
  for (int64_t item = first_item; item < last_item; ++item) {
    const Block block = block_of<C>(g, item % blocks);
    const int64_t width = block.vectors * kLanes<C>;
    C* const to = call.packed + weight_offset<T>(g, item / blocks, block);
    const int64_t position = position_size<C>(g, width);
    const int64_t first_row = item / blocks * (turned ? g.in_channels : g.out_channels);
    const T* const from = turned ? call.weight + first_row * call.weight_layout.n + block.first * (last ? 1 : 9)
                                 : call.weight + (first_row + block.first) * call.weight_layout.n;
    const int64_t depth = g.in_channels * g.kernel[0];
    for (int64_t c = 0, channels; c < depth; c += channels) {
      channels = smaller(some, last ? g.in_channels - c % g.in_channels : depth - c);  // of one slice
      if (turned) {
        pack_turned_taps(from + c * call.weight_layout.n, call.weight_layout.n, channels, block.count, last,
                         g.out_channels, taps, width);
      } else if (last) {
        const T* slice = from + c / g.in_channels * 9 * g.in_channels + c % g.in_channels;
        for (int64_t tap = 0; tap < 9; ++tap) {
          transpose_matrix(slice + tap * g.in_channels, call.weight_layout.n, block.count, channels,
                           taps + tap * some * width, width);
        }
      } else {
        transpose_matrix(from + c * 9, call.weight_layout.n, block.count, 9 * channels, taps, width);
      }
      const bool by_taps = last && !turned;
      const int64_t tap_step = by_taps ? some * width : width, channel_step = by_taps ? width : 9 * width;
      for (int64_t i = 0; i < channels; ++i) {
        for (int64_t o = 0; o < width; o += kLanes<C>) {
          const C* source = taps + i * channel_step + o;
          Vec<C> half[points][3];
          for (int x = 0; x < 3; ++x) {
            Vec<C> column[3], point[points];
            for (int y = 0; y < 3; ++y) column[y] = load(source + (y * 3 + x) * tap_step);
            transform_weight(column, point);
            for (int y = 0; y < points; ++y) half[y][x] = point[y];
          }
          for (int y = 0; y < points; ++y) {
            Vec<C> point[points];
            transform_weight(half[y], point);
            for (int x = 0; x < points; ++x) {
              store(to + (y * points + x) * position + (c + i) * width + o, point[x]);
            }
          }
        }
      }
    }
  }
}

// A slice of an image's group. Where there are winners, pixels whose winner is dead count as zeros.
template <class T>
struct ImageSlice {
  const T* pixels;
  const uint8_t* winners;    // or null
  const ConvLayout& layout;  // of both
  int64_t at;                // the slice's first element
  int64_t channels, size[2];
};

template <class T, class C = Compute<T>>
FASTNN_INLINE Vec<C> load_alive(const T* from, const uint8_t* winners, int64_t count) {
  const Vec<C> value = load_up_to<T>(from, count);
  return load_bytes_up_to<C>(winners, count) == number<C>(kDead) ? Vec<C>{} : value;
}

// Loads `count` pixels of a row, channels innermost: [pixel][pitch].
template <class T, class C = Compute<T>>
void load_pixels(const ImageSlice<T>& slice, int64_t at, int64_t count, C* to, int64_t pitch) {
  const T* const from = slice.pixels + at;
  const ConvLayout& layout = slice.layout;
  const int64_t channels = slice.channels;
  if (layout.d[2] != 1) {
    for (int64_t x = 0; x < count; ++x, to += pitch) {
      if (!slice.winners) {
        copy_run(from + x * layout.d[2], channels, to);
        continue;
      }
      for (int64_t c = 0, pixel = x * layout.d[2]; c < channels; c += kLanes<C>) {
        store(to + c, load_alive(from + pixel + c, slice.winners + at + pixel + c, channels - c));
      }
    }
    return;
  }
  if (!slice.winners) return transpose_matrix(from, layout.c, channels, count, to, pitch);
  constexpr int64_t some = 4 * kLanes<C>;  // pixels at a time, of as many channels as a vector has lanes
  alignas(64) C alive[kLanes<C> * some];
  for (int64_t c = 0; c < channels; c += kLanes<C>) {
    const int64_t rows = smaller(kLanes<C>, channels - c);
    for (int64_t first = 0; first < count; first += some) {
      const int64_t columns = smaller(some, count - first);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = (c + i) * layout.c + first;
        for (int64_t x = 0; x < columns; x += kLanes<C>) {
          store(alive + i * some + x, load_alive(from + row + x, slice.winners + at + row + x, columns - x));
        }
      }
      transpose_matrix(alive, some, rows, columns, to + first * pitch + c, pitch);
    }
  }
}

// Loads `columns` pixels of row y from x on, with zeros beyond the slice: [column][pitch].
template <class T, class C = Compute<T>>
void load_row(const ImageSlice<T>& slice, int64_t y, int64_t x, int64_t columns, C* to, int64_t pitch) {
  copy_row(y >= 0 && y < slice.size[0], overlap(x, columns, slice.size[1]), columns, pitch, to,
           [&](C* at, int64_t first, int64_t count) {
             load_pixels(slice, slice.at + y * slice.layout.d[1] + (x + first) * slice.layout.d[2], count, at, pitch);
           });
}

// The input under a row of tiles. Rows that the next row of tiles shares are loaded once.
template <class T>
class TileRows {
  using C = Compute<T>;

 public:
  TileRows(C* memory, int64_t pitch) : memory_(memory), pitch_(pitch) {}

  // From row y and column x on. is_next: after the row of tiles above, of the same columns.
  void move_to(const ImageSlice<T>& slice, int64_t y, int64_t x, int64_t columns, bool is_next) {
    columns_ = columns;
    first_ = is_next ? (first_ + kTile<T>) % kPoints<T> : 0;
    for (int r = is_next ? kPoints<T> - kTile<T> : 0; r < kPoints<T>; ++r) {
      load_row(slice, y + r, x, columns, row(r), pitch_);
    }
  }

  // Transforms a tile: its channels at position p go to to[p * position_step].
  void transform(int64_t tile, int64_t channels, C* to, int64_t position_step) const {
    constexpr int points = kPoints<T>;
    const C* rows[points];
    for (int y = 0; y < points; ++y) rows[y] = row(y) + kTile<T> * tile * pitch_;
    for (int64_t c = 0; c < channels; c += kLanes<C>) {
      Vec<C> half[points][points];
#pragma GCC unroll 6
      for (int x = 0; x < points; ++x) {
        Vec<C> pixels[points], point[points];
        for (int y = 0; y < points; ++y) pixels[y] = load(rows[y] + x * pitch_ + c);
        transform_input(pixels, point);
        for (int y = 0; y < points; ++y) half[y][x] = point[y];
      }
#pragma GCC unroll 6
      for (int y = 0; y < points; ++y) {
        Vec<C> point[points];
        transform_input(half[y], point);
        for (int x = 0; x < points; ++x) store(to + (y * points + x) * position_step + c, point[x]);
      }
    }
  }

 private:
  C* row(int r) const { return memory_ + (first_ + r) % kPoints<T> * columns_ * pitch_; }

  C* const memory_;
  const int64_t pitch_;
  int64_t columns_ = 0;
  int first_ = 0;
};

template <class T>
class WinogradForward {
  using C = Compute<T>;
  static constexpr int tile_ = kTile<T>, points_ = kPoints<T>, positions_ = kPositions<T>;

 public:
  WinogradForward(const ConvCall<T>& call, void* scratch)
      : call_(call),
        g_(call.geometry),
        plan_(call.plan->winograd),
        depth_(call.geometry.in_channels * call.geometry.kernel[0]),
        parts_(scratch) {
    const int64_t tiles = plan_.band.images * plan_.band.input[0] * plan_.tile_rows * plan_.tile_columns;
    rows_ = parts_.take<C>(points_ * (tile_ * plan_.tile_columns + 2) * plan_.pitch);
    transformed_ = parts_.take<C>(positions_ * (tiles * plan_.pitch + kLanes<C>));
    const int64_t sums = tiles / plan_.band.input[0] * plan_.band.conv[0] * kBlockVectors * kLanes<C>;
    sums_ = parts_.take<C>(positions_ * (sums + kLanes<C>));
    zeros_ = parts_.take<C>(kBlockVectors * kLanes<C>);
    offsets_ = parts_.take<int64_t>(g_.in_channels * g_.kernel[0]);
    fill_zeros(zeros_, kBlockVectors * kLanes<C>);
  }

  void run(int64_t first_item, int64_t last_item) {
    ChannelPool<T> pool(call_, plan_.band, plan_.ring, parts_);
    for (int64_t item = first_item; item < last_item; ++item) {
      const Band band = band_of(g_, plan_.band, plan_.block_parts, item);
      const int64_t tile_rows = divide_up((band.rows - 1) * g_.pool_stride[1] + g_.pool_extent(1), tile_);
      const int64_t in_slices = plan_.band.input[0], conv_slices = plan_.band.conv[0];
      const int64_t slice_tiles = tile_rows * plan_.tile_columns;
      const int64_t tiles = band.images * conv_slices * slice_tiles;
      const int64_t input_step = band.images * in_slices * slice_tiles * plan_.pitch + kLanes<C>;  // of positions
      for (int64_t i = 0; i < band.images * in_slices; ++i) {
        transform_slice(band, band.image + i / in_slices, band.input[0] + i % in_slices, tile_rows, input_step,
                        i * slice_tiles);
      }
      const bool slices_first = weight_is_channels_last(call_);
      for (int64_t k = 0; k < depth_; ++k) {
        const int64_t c = slices_first ? k % g_.in_channels : k / g_.kernel[0];
        const int64_t d = slices_first ? k / g_.in_channels : k % g_.kernel[0];
        offsets_[k] = c + d * g_.dilation[0] * slice_tiles * plan_.pitch;
      }
      const Runs runs = runs_of<C>(offsets_, depth_);
      // With sums of kLongestSum products, the error of the input's gradient would be up to 2.5 times stock's. With
      // sums of half as many it is at most 1.6 times stock's (measured).
      const int64_t longest = call_.turned ? kLongestSum / 2 : kLongestSum;
      // Where each slice of input makes one slice of conv pixels, the slices lie together and are summed at once.
      const int64_t together = in_slices == conv_slices ? band.images * conv_slices : 1;
      int64_t first, last;
      part_of(blocks_of<C>(g_), band.part, plan_.block_parts, first, last);
      for (int64_t b = first; b < last; ++b) {
        const Block block = block_of<C>(g_, b);
        const int64_t width = block.vectors * kLanes<C>, sums_step = tiles * width + kLanes<C>;
        const C* weight = call_.packed + weight_offset<T>(g_, band.group, block);
        for (int64_t position = 0; position < positions_; ++position) {
          for (int64_t i = 0; i < band.images * conv_slices; i += together) {
            const int64_t slice = i / conv_slices * in_slices + i % conv_slices * g_.stride[0];
            sum_pixels<C>(block.vectors, transformed_ + position * input_step + slice * slice_tiles * plan_.pitch,
                          plan_.pitch, together * slice_tiles, offsets_, runs, 0, depth_,
                          weight + position * position_size<C>(g_, width), zeros_,
                          sums_ + position * sums_step + i * slice_tiles * width, longest, position_size<C>(g_, width));
          }
        }
        for (int64_t i = 0; i < band.images; ++i) {
          pool.run(band, band.image + i, block, [&](int64_t z, int64_t y, const Segment& segment) {
            const int64_t row = (y - band.conv[1]) / tile_, tile = segment.conv / tile_;  // segments are whole tiles
            const int64_t slice = i * conv_slices + z - band.conv[0];
            const C* sums = sums_ + (slice * slice_tiles + row * plan_.tile_columns + tile) * width;
            make_rows(pool, z, band.conv[1] + tile_ * row, sums, sums_step, block.vectors, segment.inside);
          });
        }
      }
    }
  }

 private:
  void transform_slice(const Band& band, int64_t image, int64_t z, int64_t tile_rows, int64_t position_step,
                       int64_t tile) {
    const int64_t columns = tile_ * plan_.tile_columns + 2, pitch = plan_.pitch;
    const ConvLayout& layout = call_.input_layout;
    const int64_t at = image * layout.n + band.group * g_.in_channels * layout.c + z * layout.d[0];
    const bool inside = z >= 0 && z < g_.input[0];
    const ImageSlice<T> slice = {call_.input,    call_.turned ? call_.input_winners : nullptr, layout, at,
                                 g_.in_channels, {inside ? g_.input[1] : 0, g_.input[2]}};
    TileRows<T> rows(rows_, pitch);
    for (int64_t row = 0; row < tile_rows; ++row) {
      rows.move_to(slice, band.input[1] + tile_ * row, band.input[2], columns, row > 0);
      for (int64_t x = 0; x < plan_.tile_columns; ++x, ++tile) {
        rows.transform(x, g_.in_channels, transformed_ + tile * pitch, position_step);
      }
    }
  }

  // Transforms the sums of a row of tiles into rows of conv pixels, as far as these are in its output.
  void make_rows(const ChannelPool<T>& pool, int64_t z, int64_t y, const C* sums, int64_t position_step, int vectors,
                 Inside columns) const {
    const int64_t width = vectors * kLanes<C>;
    C* rows[tile_];
    for (int i = 0; i < tile_; ++i) {
      const bool inside = y + i >= 0 && y + i < g_.conv[1];
      rows[i] = inside ? pool.ring().slot(z, y + i) : nullptr;
      if (inside) pool.ring().mark(g_, z, y + i);
    }
    for (int64_t tile = columns.first / tile_; tile_ * tile < columns.last; ++tile) {
      for (int v = 0; v < vectors; ++v) {
        const C* from = sums + tile * width + v * kLanes<C>;
        const Vec<C> bias = load(pool.bias() + v * kLanes<C>);
        Vec<C> half[tile_][points_];
#pragma GCC unroll 6
        for (int x = 0; x < points_; ++x) {
          Vec<C> m[points_], result[tile_];
          for (int i = 0; i < points_; ++i) m[i] = load(from + (i * points_ + x) * position_step);
          transform_results(m, result);
          for (int i = 0; i < tile_; ++i) half[i][x] = result[i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < tile_; ++i) {
          if (!rows[i]) continue;
          Vec<C> pixel[tile_];
          transform_results(half[i], pixel);
          C* to = rows[i] + tile_ * tile * width + v * kLanes<C>;
#pragma GCC unroll 4
          for (int x = 0; x < tile_; ++x) {
            const int64_t column = tile_ * tile + x;
            if (column >= columns.first && column < columns.last) store(to + x * width, pixel[x] + bias);
          }
        }
      }
    }
  }

  const ConvCall<T>& call_;
  const ConvPoolGeometry& g_;
  const WinogradPlan& plan_;
  const int64_t depth_;  // products of a position's sum
  Parts parts_;
  C *rows_, *transformed_, *sums_, *zeros_;
  int64_t* offsets_;
};

template <class T>
void run_winograd(const ConvCall<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  WinogradForward<T>(call, scratch).run(first_item, last_item);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
