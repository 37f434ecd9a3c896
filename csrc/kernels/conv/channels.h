// What the algorithms with output channels in the lanes share: rows of conv pixels from register tiles, and what
// becomes of them.
#pragma once

#include "copy.h"
#include "tile.h"

namespace fastnn {
namespace FASTNN_ISA {

// Output channels [first, first + count) of a group, in so many vectors.
struct Block {
  int64_t first, count;
  int vectors;
};
template <class C>
FASTNN_INLINE Block block_of(const ConvPoolGeometry& g, int64_t number) {
  constexpr int64_t size = kBlockVectors * kLanes<C>;
  const int64_t count = smaller(size, g.out_channels - number * size);
  return {number * size, count, static_cast<int>(divide_up(count, kLanes<C>))};
}
template <class C>
FASTNN_INLINE int64_t blocks_of(const ConvPoolGeometry& g) {
  return divide_up(g.out_channels, kBlockVectors * kLanes<C>);
}
// Vectors of a group's output channels before a block's.
template <class C>
FASTNN_INLINE int64_t lanes_before(const ConvPoolGeometry& g, int64_t group, const Block& block) {
  return group * round_up(g.out_channels, kLanes<C>) + block.first;
}

// Sums of `count` pixels, `step` apart, by as equal tiles as possible. The parts [first_k, last_k) of `depth` products
// each are taken one by one: long sums would round too much. The sum from 0 on begins with the bias, the others are
// added to what stands in `to`.
template <class E, class C = Compute<E>>
void sum_pixels(int vectors, const E* pixels, int64_t step, int64_t count, const int64_t* offsets, int64_t first_k,
                int64_t last_k, const E* weight, const C* bias, C* to) {
  const int64_t width = vectors * kLanes<C>, tiles = divide_up(count, kMostRows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = count * t / tiles, last = count * (t + 1) / tiles;
    const auto tile = channel_tiles<E>().at[vectors - 1][last - first - 1];
    for (int64_t k = first_k; k < last_k; k += kLongestSum) {
      tile({pixels + first * step, step, offsets + k, smaller(kLongestSum, last_k - k), weight + k * width,
            k == 0 ? bias : nullptr, to + first * width, width});
    }
  }
}

// Pools a block's conv rows into a stage and writes that out.
template <class T>
class ChannelPool {
  using C = Compute<T>;

 public:
  ChannelPool(const ConvCall<T>& call, const BandPlan& band, const RingPlan& ring, Parts& parts)
      : call_(call),
        g_(call.geometry),
        conv_columns_(band.conv[2]),
        stage_rows_(band.stage_rows),
        width_(kBlockVectors * kLanes<C>),
        ring_(ring, parts.take<C>(ring.slices * ring.rows * ring.row_size), parts.take<int64_t>(ring.slices * ring.rows)),
        outside_(parts.take<C>(ring.row_size)),
        stage_(parts.take<C>(band.stage_rows * band.columns * width_)),
        winner_stage_(parts.take<uint8_t>(band.stage_rows * band.columns * width_)),
        rows_(parts.take<const C*>(g_.pool_kernel[0] * g_.pool_kernel[1])),
        places_(parts.take<const C*>(g_.places())),
        bias_(parts.take<C>(width_)) {
    fill(outside_, ring.row_size, kMinusInfinity<C>);
  }

  const Ring<C>& ring() const { return ring_; }
  const C* bias() const { return bias_; }

  // Conv pixels of the band's rows that exist: [first, last), counted from its first.
  Inside inside(const Band& band) const { return overlap(band.conv[2], conv_columns_, g_.conv[2]); }

  // Before the conv rows of a block, of one image, are made.
  void start(const Band& band, const Block& block) {
    width_ = block.vectors * kLanes<C>;
    const int64_t channel = band.group * g_.out_channels + block.first;
    for (int64_t i = 0; i < width_; i += kLanes<C>) {
      const int64_t left = block.count - i;
      store(bias_ + i, call_.bias && left > 0 ? load_up_to<T>(call_.bias + channel + i, left) : Vec<C>{});
    }
    ring_.forget();
    const Inside columns = inside(band);
    if (columns.first == 0 && columns.last == conv_columns_) return;
    for (int64_t i = 0; i < ring_.plan().slices * ring_.plan().rows; ++i) {
      C* row = ring_.all() + i * ring_.plan().row_size;
      fill(row, columns.first * width_, kMinusInfinity<C>);
      fill(row + columns.last * width_, (conv_columns_ - columns.last) * width_, kMinusInfinity<C>);
    }
  }

  // Calls make(z, y) for each conv row that the band's windows have, of which the ring must hold all, and takes them
  // for made.
  template <class Make>
  void for_each_row(const Band& band, const Make& make) const {
    for (int64_t r = 0; r < band.rows; ++r) {
      find_rows(g_, ring_, band.slice, band.row + r, outside_, rows_, [](int64_t, int64_t) {});
    }
    for (int64_t i = 0; i < ring_.plan().slices * ring_.plan().rows; ++i) {
      const int64_t row = ring_.row(i);
      if (row >= 0) make(row / g_.conv[1], row % g_.conv[1]);
    }
  }

  // make(z, y) puts a row of conv pixels into the ring: `inside` pixels of its slot.
  template <class Make>
  void run(const Band& band, int64_t image, const Block& block, const Make& make) {
    const int64_t row_size = band.columns * width_;
    for (int64_t r = 0; r < band.rows; ++r) {
      const int64_t staged = r % stage_rows_;
      C* to = stage_ + staged * row_size;
      uint8_t* winners = call_.winners ? winner_stage_ + staged * row_size : nullptr;
      const bool any = find_rows(g_, ring_, band.slice, band.row + r, outside_, rows_, make);
      const int64_t tap = g_.pool_dilation[2] * width_, taps = g_.pool_kernel[2];
      for (int64_t i = 0; i < g_.places(); ++i) places_[i] = rows_[i / taps] + i % taps * tap;
      pool_windows<C>({places_, g_.places(), g_.pool_stride[2] * width_, width_, band.columns, block.vectors}, to, winners);
      for_each_empty(g_, band.column, band.columns, any, [&](int64_t x) {
        fill(to + x * width_, width_, kMinusInfinity<C>);
        if (winners) __builtin_memset(winners + x * width_, kDead, width_);
      });
      if (staged + 1 == stage_rows_ || r + 1 == band.rows) write(band, image, block, r - staged, staged + 1);
    }
  }

 private:
  // The staged rows, from the band's `first` on.
  void write(const Band& band, int64_t image, const Block& block, int64_t first, int64_t staged) {
    const ConvLayout& layout = call_.output_layout;
    const bool joined = band.columns == g_.output[2];  // the rows follow one another
    const int64_t rows = joined ? 1 : staged, count = joined ? staged * band.columns : band.columns;
    const int64_t channel = band.group * g_.out_channels + block.first;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = image * layout.n + channel * layout.c + band.slice * layout.d[0] +
                         (band.row + first + r) * layout.d[1] + band.column * layout.d[2];
      write_pixels(call_, at, block.count, count, stage_ + r * count * width_, winner_stage_ + r * count * width_,
                   width_);
    }
  }

  const ConvCall<T>& call_;
  const ConvPoolGeometry& g_;
  const int64_t conv_columns_, stage_rows_;
  int64_t width_;
  const Ring<C> ring_;
  C* outside_;
  C* stage_;
  uint8_t* winner_stage_;
  const C** rows_;
  const C** places_;
  C* bias_;
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
