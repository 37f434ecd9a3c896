// What the algorithms with output channels in the lanes share: they sum rows of conv pixels by register tiles, and then
// pool and write these.
#pragma once

#include "copy.h"
#include "tile.h"

namespace fastnn {
namespace FASTNN_ISA {

// Output channels [first, first + count) of a group, in `vectors` vectors.
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
// How many lanes lie before the block's lanes, where each group of output channels fills whole vectors.
template <class C>
FASTNN_INLINE int64_t lanes_before(const ConvPoolGeometry& g, int64_t group, const Block& block) {
  return group * round_up(g.out_channels, kLanes<C>) + block.first;
}

// Sums `count` pixels, `step` apart, by tiles that are as equal as possible. The products [first_k, last_k) are added
// in parts of `longest`, since long sums would round too much. The part from 0 on begins with the bias; the others
// are added to what stands in `to`. next_weight: elements from this weight to the one that is multiplied next; 0 for
// none. The first tiles bring the next weight into L2, each of them one cache line of every row, because a call of few
// pixels would wait for a weight that comes from far away.
template <class E, class C = Compute<E>>
void sum_pixels(int vectors, const Number<E>* pixels, int64_t step, int64_t count, const int64_t* offsets, Runs runs,
                int64_t first_k, int64_t last_k, const E* weight, const C* bias, C* to, int64_t longest = kLongestSum,
                int64_t next_weight = 0) {
  constexpr int64_t kLine = 64, kBytes = sizeof(E);
  const int64_t width = vectors * kLanes<C>, tiles = divide_up(count, most_rows<E>(vectors, runs));
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = count * t / tiles, last = count * (t + 1) / tiles;
    const int64_t ahead = next_weight > 0 && t * kLine < width * kBytes ? next_weight * kBytes + t * kLine : 0;
    const auto tile = channel_tiles<E>().at[vectors - 1][last - first - 1];
    for (int64_t k = first_k; k < last_k; k += longest) {
      tile({pixels + first * step, step, offsets + k, smaller(longest, last_k - k), weight + k * width,
            k == 0 ? bias : nullptr, to + first * width, width, runs.from(k), ahead});
    }
  }
}

// Columns of a band that are pooled together, so that their conv pixels stay in L1.
struct Segment {
  int64_t column, columns;  // pooled: the first, counted from the band's, and how many
  int64_t conv;             // the first conv pixel, counted from the band's
  Inside inside;            // the conv pixels that exist
};

// Pools a block's conv rows into memory of its own, the stage, and writes the stage to the output. Where nothing is
// pooled, and whoever makes the rows can do that, they are made in the stage at once.
template <class T>
class ChannelPool {
  using C = Compute<T>;

 public:
  ChannelPool(const ConvCall<T>& call, const BandPlan& band, const RingPlan& ring, Parts& parts,
              bool makes_in_stage = false)
      : call_(call),
        g_(call.geometry),
        makes_in_stage_(makes_in_stage && g_.pools_nothing() && !call.winners),
        bounds_(bounds_of(call)),
        segment_(band.segment),
        width_(kBlockVectors * kLanes<C>),
        ring_(ring, parts.take<C>(ring.slices * ring.rows * ring.row_size),
              parts.take<int64_t>(ring.slices * ring.rows)),
        outside_(parts.take<C>(ring.row_size)),
        stage_(parts.take<C>(band.rows * band.columns * width_)),
        winner_stage_(parts.take<uint8_t>(band.rows * band.columns * width_)),
        rows_(parts.take<const C*>(g_.pool_kernel[0] * g_.pool_kernel[1])),
        places_(parts.take<const C*>(g_.places())),
        bias_(parts.take<C>(width_)) {
    fill(outside_, ring.row_size, kMinusInfinity<C>);
  }

  // Makes the bias that of a block.
  void start(const Band& band, const Block& block) {
    width_ = block.vectors * kLanes<C>;
    const int64_t channel = band.group * g_.out_channels + block.first;
    for (int64_t i = 0; i < width_; i += kLanes<C>) {
      const int64_t left = block.count - i;
      store(bias_ + i, call_.bias && left > 0 ? load_up_to<T>(call_.bias + channel + i, left) : Vec<C>{});
    }
  }

  const C* bias() const { return bias_; }

  // The place for the first conv pixel of a row segment that lies inside the convolution's output.
  C* row(int64_t z, int64_t y, const Segment& segment) const {
    if (makes_in_stage_) return stage_ + ((y - first_row_) * stage_columns_ + segment.column) * width_;
    return ring_.slot(z, y) + segment.inside.first * width_;
  }
  const Ring<C>& ring() const { return ring_; }

  // Begins the sums of a row segment with the bias.
  void start_row(int64_t z, int64_t y, const Segment& segment) const {
    C* to = row(z, y, segment);
    for (int64_t i = segment.inside.first; i < segment.inside.last; ++i, to += width_) {
      for (int64_t o = 0; o < width_; o += kLanes<C>) store(to + o, load(bias_ + o));
    }
  }

  // Calls make(z, y) for each conv row under the band's windows, and marks the row as made. The ring must have room for
  // all of these rows.
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

  // Pools and writes the band of an image and block. make(z, y, segment) puts a row of conv pixels into the ring;
  // before(segment) may have put all of them there.
  template <class Before, class Make>
  void run(const Band& band, int64_t image, const Block& block, const Before& before, const Make& make) {
    start(band, block);
    first_row_ = band.row;
    stage_columns_ = band.columns;
    for (int64_t first = 0; first < band.columns; first += segment_) {
      Segment segment = {first, smaller(segment_, band.columns - first), first * g_.pool_stride[2], {}};
      const int64_t extent = (segment.columns - 1) * g_.pool_stride[2] + g_.pool_extent(2);
      segment.inside = overlap(band.conv[2] + segment.conv, extent, g_.conv[2]);
      if (makes_in_stage_) {
        for (int64_t r = 0; r < band.rows; ++r) make(band.slice, band.row + r, segment);
        continue;
      }
      start(segment, extent);
      before(segment);
      for (int64_t r = 0; r < band.rows; ++r) {
        const bool any = find_rows(g_, ring_, band.slice, band.row + r, outside_, rows_,
                                   [&](int64_t z, int64_t y) { make(z, y, segment); });
        pool_row(band, block, segment, r * band.columns + first, any);
      }
    }
    write(band, image, block);
  }
  template <class Make>
  void run(const Band& band, int64_t image, const Block& block, const Make& make) {
    run(band, image, block, [](const Segment&) {}, make);
  }

 private:
  void start(const Segment& segment, int64_t extent) const {
    ring_.forget();
    if (segment.inside.first == 0 && segment.inside.last == extent) return;
    for (int64_t i = 0; i < ring_.plan().slices * ring_.plan().rows; ++i) {
      C* row = ring_.all() + i * ring_.plan().row_size;
      fill(row, segment.inside.first * width_, kMinusInfinity<C>);
      fill(row + segment.inside.last * width_, (extent - segment.inside.last) * width_, kMinusInfinity<C>);
    }
  }

  // Pools the windows over the rows that were found, into the stage from the pixel `at` on.
  void pool_row(const Band& band, const Block& block, const Segment& segment, int64_t at, bool any) const {
    C* to = stage_ + at * width_;
    uint8_t* winners = call_.winners ? winner_stage_ + at * width_ : nullptr;
    const int64_t tap = g_.pool_dilation[2] * width_, taps = g_.pool_kernel[2];
    for (int64_t i = 0; i < g_.places(); ++i) places_[i] = rows_[i / taps] + i % taps * tap;
    pool_windows<C>({places_, g_.places(), g_.pool_stride[2] * width_, width_, segment.columns, block.vectors, bounds_},
                    to, winners);
    for_each_empty(g_, band.column + segment.column, segment.columns, any, [&](int64_t x) {
      fill(to + x * width_, width_, kMinusInfinity<C>);
      if (winners) __builtin_memset(winners + x * width_, kDead, width_);
    });
  }

  void write(const Band& band, int64_t image, const Block& block) const {
    const ConvLayout& layout = call_.output_layout;
    // Whether the rows follow one another.
    const bool joined = band.columns == g_.output[2] && layout.d[1] == band.columns * layout.d[2];
    const int64_t rows = joined ? 1 : band.rows, count = joined ? band.rows * band.columns : band.columns;
    const int64_t channel = band.group * g_.out_channels + block.first;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = image * layout.n + channel * layout.c + band.slice * layout.d[0] +
                         (band.row + r) * layout.d[1] + band.column * layout.d[2];
      write_pixels(call_, at, block.count, count, stage_ + r * count * width_, winner_stage_ + r * count * width_,
                   width_, makes_in_stage_ ? &bounds_ : nullptr);
    }
  }

  const ConvCall<T>& call_;
  const ConvPoolGeometry& g_;
  const bool makes_in_stage_;
  const Bounds<C> bounds_;
  const int64_t segment_;
  int64_t first_row_ = 0, stage_columns_ = 0;  // of the stage
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
