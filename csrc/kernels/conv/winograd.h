// Winograd's F(2x2, 3x3), in bfloat16 F(4x4, 3x3), in each slice of the image.
//
// For kernels of 3x3 (and any depth) of stride 1 with so many channels on both sides that the transforms pay. A tile
// of 4x4 input pixels and the 3x3 weights are transformed so that the tile's four conv pixels take 16 multiplications a
// channel instead of 36 (Lavin and Gray, 2015). A band's tiles are transformed, multiplied by a block of output
// channels' transformed weight, one position after another, and transformed back into the ring of conv rows, from which
// windows are pooled. With tiles of 6x6 pixels, 16 conv pixels take 36 multiplications instead of 144, but the error is
// up to 34 times as large, which only the rounding of bfloat16 hides (moderate.h).
//
// It costs 4 / 9 or 1 / 4 of direct convolution's multiply-adds, and some 5 additions and moves per position of a tile
// for each input and each output channel. F(2x2)'s rounding errors are no larger than direct convolution's. NaN,
// infinity and huge values would spread over a tile, so calls that have some go to direct convolution.
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

// weight -> [group][block][position][channel and slice, in the weight's order][vectors x lanes]
template <class T>
void pack_winograd(const ConvCall<T>& call, int64_t first_item, int64_t last_item) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const int64_t blocks = blocks_of<C>(g);
  const bool last = weight_is_channels_last(call);
  constexpr int64_t some = 16;  // channels at a time
  constexpr int points = kPoints<T>;
  alignas(64) C taps[9 * some * kBlockVectors * kLanes<C>] = {};
  for (int64_t item = first_item; item < last_item; ++item) {
    const Block block = block_of<C>(g, item % blocks);
    const int64_t width = block.vectors * kLanes<C>;
    C* const to = call.packed + weight_offset<T>(g, item / blocks, block);
    const int64_t position = position_size<C>(g, width);
    const T* const from = call.weight + (item / blocks * g.out_channels + block.first) * call.weight_layout.n;
    const int64_t depth = g.in_channels * g.kernel[0];
    for (int64_t c = 0, channels; c < depth; c += channels) {
      channels = smaller(some, last ? g.in_channels - c % g.in_channels : depth - c);  // of one slice
      if (last) {
        const T* slice = from + c / g.in_channels * 9 * g.in_channels + c % g.in_channels;
        for (int64_t tap = 0; tap < 9; ++tap) {
          transpose_matrix(slice + tap * g.in_channels, call.weight_layout.n, block.count, channels,
                           taps + tap * some * width, width);
        }
      } else {
        transpose_matrix(from + c * 9, call.weight_layout.n, block.count, 9 * channels, taps, width);
      }
      const int64_t tap_step = last ? some * width : width, channel_step = last ? width : 9 * width;
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
    transformed_ = parts_.take<C>(positions_ * tiles * plan_.pitch);
    sums_ = parts_.take<C>(positions_ * tiles / plan_.band.input[0] * plan_.band.conv[0] * kBlockVectors * kLanes<C>);
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
      const int64_t in_tiles = band.images * in_slices * slice_tiles, tiles = band.images * conv_slices * slice_tiles;
      for (int64_t i = 0; i < band.images * in_slices; ++i) {
        transform_slice(band, band.image + i / in_slices, band.input[0] + i % in_slices, tile_rows, in_tiles,
                        i * slice_tiles);
      }
      const bool slices_first = weight_is_channels_last(call_);
      for (int64_t k = 0; k < depth_; ++k) {
        const int64_t c = slices_first ? k % g_.in_channels : k / g_.kernel[0];
        const int64_t d = slices_first ? k / g_.in_channels : k % g_.kernel[0];
        offsets_[k] = c + d * g_.dilation[0] * slice_tiles * plan_.pitch;
      }
      // Where each slice of input makes one slice of conv pixels, the slices lie together and are summed at once.
      const int64_t together = in_slices == conv_slices ? band.images * conv_slices : 1;
      int64_t first, last;
      part_of(blocks_of<C>(g_), band.part, plan_.block_parts, first, last);
      for (int64_t b = first; b < last; ++b) {
        const Block block = block_of<C>(g_, b);
        const int64_t width = block.vectors * kLanes<C>;
        const C* weight = call_.packed + weight_offset<T>(g_, band.group, block);
        for (int64_t position = 0; position < positions_; ++position) {
          for (int64_t i = 0; i < band.images * conv_slices; i += together) {
            const int64_t slice = i / conv_slices * in_slices + i % conv_slices * g_.stride[0];
            sum_pixels<C>(block.vectors, transformed_ + (position * in_tiles + slice * slice_tiles) * plan_.pitch,
                          plan_.pitch, together * slice_tiles, offsets_, 0, depth_,
                          weight + position * position_size<C>(g_, width), zeros_,
                          sums_ + (position * tiles + i * slice_tiles) * width);
          }
        }
        for (int64_t i = 0; i < band.images; ++i) {
          pool.run(band, band.image + i, block, [&](int64_t z, int64_t y, const Segment& segment) {
            const int64_t row = (y - band.conv[1]) / tile_, tile = segment.conv / tile_;  // segments are whole tiles
            const int64_t slice = i * conv_slices + z - band.conv[0];
            const C* sums = sums_ + (slice * slice_tiles + row * plan_.tile_columns + tile) * width;
            make_rows(pool, z, band.conv[1] + tile_ * row, sums, tiles * width, block.vectors, segment.inside);
          });
        }
      }
    }
  }

 private:
  // Loads the input under a row of tiles, channels innermost: [row][column][pitch].
  void load_rows(const Band& band, int64_t image, int64_t z, int64_t row, int64_t columns) {
    const ConvLayout& layout = call_.input_layout;
    const Inside inside = overlap(band.input[2], columns, g_.input[2]);
    for (int64_t r = 0; r < points_; ++r) {
      const int64_t y = row + r;
      copy_row(z >= 0 && z < g_.input[0] && y >= 0 && y < g_.input[1], inside, columns, plan_.pitch,
               rows_ + r * columns * plan_.pitch, [&](C* to, int64_t first, int64_t count) {
                 const T* from = call_.input + image * layout.n + band.group * g_.in_channels * layout.c +
                                 z * layout.d[0] + y * layout.d[1] + (band.input[2] + first) * layout.d[2];
                 if (layout.d[2] == 1) {
                   transpose_matrix(from, layout.c, g_.in_channels, count, to, plan_.pitch);
                 } else {
                   for (int64_t x = 0; x < count; ++x) {
                     copy_run(from + x * layout.d[2], g_.in_channels, to + x * plan_.pitch);
                   }
                 }
               });
    }
  }

  void transform_slice(const Band& band, int64_t image, int64_t z, int64_t tile_rows, int64_t tiles, int64_t tile) {
    const int64_t columns = tile_ * plan_.tile_columns + 2;
    for (int64_t row = 0; row < tile_rows; ++row) {
      load_rows(band, image, z, band.input[1] + tile_ * row, columns);
      for (int64_t x = 0; x < plan_.tile_columns; ++x, ++tile) {
        transform_tile(rows_ + tile_ * x * plan_.pitch, columns * plan_.pitch, transformed_ + tile * plan_.pitch,
                       tiles * plan_.pitch);
      }
    }
  }

  void transform_tile(const C* from, int64_t row_step, C* to, int64_t position_step) const {
    for (int64_t c = 0; c < g_.in_channels; c += kLanes<C>) {
      Vec<C> half[points_][points_];
#pragma GCC unroll 6
      for (int x = 0; x < points_; ++x) {
        Vec<C> pixels[points_], point[points_];
        for (int y = 0; y < points_; ++y) pixels[y] = load(from + y * row_step + x * plan_.pitch + c);
        transform_input(pixels, point);
        for (int y = 0; y < points_; ++y) half[y][x] = point[y];
      }
#pragma GCC unroll 6
      for (int y = 0; y < points_; ++y) {
        Vec<C> point[points_];
        transform_input(half[y], point);
        for (int x = 0; x < points_; ++x) store(to + (y * points_ + x) * position_step + c, point[x]);
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
