// Forward for few output channels in a group: the vector's lanes hold independent pieces of the problem instead.
//
// The pieces are bands of rows of the images, which share their weight. A thread gathers the input of a vector's pieces
// side by side; then all that direct convolution does to a number is done to a vector, with no lane idle and none to be
// moved for stride or pooling.
#pragma once

#include "conv_lanes_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// The register tile: `pixels` conv pixels of `outputs` output channels, `vectors` vectors of pieces each.
template <int pixels, int outputs, int vectors, class C>
FASTNN_INLINE void lanes_tile(const C* tile, int64_t step, const LaneTap* taps, int64_t count, const C* weight,
                              const Vec<C> (&bias)[outputs][vectors], C* to, int64_t output_step) {
  constexpr int64_t pixel = vectors * kLanes<C>;
  Vec<C> total[pixels * outputs][vectors];
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 12
    for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) total[p * outputs + o][v] = bias[o][v];
    }
  }
  sum_in_parts(count, total, [&](int64_t k) __attribute__((always_inline)) {
    const C* at = tile + taps[k].offset;
    const C* factor = weight + taps[k].position * outputs;
#pragma GCC unroll 4
    for (int p = 0; p < pixels; ++p) {
      Vec<C> value[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) value[v] = load(at + p * step + v * kLanes<C>);
#pragma GCC unroll 12
      for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) total[p * outputs + o][v] += value[v] * broadcast<C>(factor[o]);
      }
    }
  });
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 12
    for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        store(to + o * output_step + p * pixel + v * kLanes<C>, total[p * outputs + o][v]);
      }
    }
  }
}

// `count` conv pixels of a row.
template <int vectors, int outputs, class C>
FASTNN_SHARED void lanes_row(const C* tile, int64_t step, const LaneTap* taps, int64_t tap_count, const C* weight,
                             const Vec<C> (&bias)[outputs][vectors], int64_t count, C* to) {
  constexpr int most = 2 * kLaneOutputs / (outputs * vectors);  // as many accumulators in one vector as in two
  constexpr int together = most < kLanePixels ? most : kLanePixels;
  constexpr int64_t pixel = vectors * kLanes<C>;
  int64_t x = 0;
  for (; x + together <= count; x += together) {
    lanes_tile<together>(tile + x * step, step, taps, tap_count, weight, bias, to + x * pixel, count * pixel);
  }
  for (; x < count; ++x) {
    lanes_tile<1>(tile + x * step, step, taps, tap_count, weight, bias, to + x * pixel, count * pixel);
  }
}

template <class T>
class LanesForward {
  using C = Compute<T>;

 public:
  LanesForward(const ConvPoolForward<T>& call, void* memory)
      : call_(call),
        g_(call.geometry),
        piece_(piece_geometry(call.geometry, call.plan.bands)),
        lanes_(call.plan.lane_vectors * kLanes<C>),
        scratch_(piece_, call.plan, memory) {
    const ConvLayout& layout = call.input_layout;
    pixel_ = layout.c == 1 && layout.d[2] == g_.in_channels ? g_.in_channels : 1;
    step_[2] = lanes_ * pixel_;
    step_[1] = step_[2] * piece_extent(piece_, 2);
    step_[0] = step_[1] * piece_extent(piece_, 1);
    channel_step_ = pixel_ > 1 ? lanes_ : step_[0] * piece_extent(piece_, 0);
    for_each_tap(g_, TapOrder::channels_first, [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
      const int64_t offset = c * channel_step_ + d * g_.dilation[0] * step_[0] + h * g_.dilation[1] * step_[1] +
                             w * g_.dilation[2] * step_[2];
      scratch_.taps[k] = {offset, k};
    });
  }

  void run(int64_t item) {
    group_ = item % g_.groups;
    first_piece_ = item / g_.groups * lanes_;
    live_ = smaller(lanes_, g_.batch * call_.plan.bands - first_piece_);
    for (int64_t i = 0; i < live_; ++i) {
      const int64_t piece = first_piece_ + i, bands = call_.plan.bands;
      pieces_[i] = {piece / bands, piece % bands * piece_.output[1]};
    }
    load_tile();
    if (call_.plan.lane_vectors == 2) return run_blocks<2>();
    if constexpr (kLeastLaneVectors<C> == 1) run_blocks<1>();
  }

 private:
  // A lane's image and first pooled row.
  struct Lane {
    int64_t image, row;
  };
  void load_tile() {
    const ConvLayout& layout = call_.input_layout;
    const int64_t rows = piece_extent(piece_, 1), columns = piece_extent(piece_, 2);
    const int64_t left = smaller(g_.padding[2], columns), count = larger(0, smaller(g_.input[2], columns - left));
    const int64_t row_size = columns * pixel_, plane = rows * row_size;
    const bool dense_images = call_.plan.bands == 1 && pixel_ == 1 && layout.d[2] == 1 && layout.d[1] == g_.input[2];
    // The padding, and lanes without a piece.
    if (!dense_images) fill_zeros(scratch_.plane, lanes_ * scratch_.plane_step);
    for (int64_t c = 0; c < (pixel_ > 1 ? 1 : g_.in_channels); ++c) {
      for (int64_t d = 0; d < piece_extent(piece_, 0); ++d) {
        const int64_t z = d - g_.padding[0];
        C* to = scratch_.tile + c * channel_step_ + d * step_[0];
        if (z < 0 || z >= g_.input[0]) {
          fill_zeros(to, plane * lanes_);
          continue;
        }
        if (dense_images) {
          const Lane& lane = pieces_[0];
          load_images(call_.input + lane.image * layout.n + (group_ * g_.in_channels + c) * layout.c + z * layout.d[0],
                      to);
          continue;
        }
        for (int64_t i = 0; i < live_; ++i) {
          const Lane& lane = pieces_[i];
          const T* from =
              call_.input + lane.image * layout.n + (group_ * g_.in_channels + c) * layout.c + z * layout.d[0];
          const int64_t first = lane.row * g_.pool_stride[1] * g_.stride[1] - g_.padding[1];
          for (int64_t h = 0; h < rows; ++h) {
            C* row = scratch_.plane + i * scratch_.plane_step + h * row_size + left * pixel_;
            if (first + h < 0 || first + h >= g_.input[1]) {
              fill_zeros(row, count * pixel_);
            } else {
              copy_run(from + (first + h) * layout.d[1], pixel_ > 1 ? 1 : layout.d[2], count * pixel_, row);
            }
          }
        }
        transpose_matrix(scratch_.plane, scratch_.plane_step, lanes_, plane, to, lanes_);
      }
    }
  }

  // A slice of whole images, dense in memory: transposed in one run of all its rows, each pixel's lanes stored where
  // its row and column lie between the padding.
  void load_images(const T* from, C* to) {
    constexpr int64_t width = kLanes<C>;
    const int64_t columns = piece_extent(piece_, 2), rows = piece_extent(piece_, 1);
    const int64_t used_rows = larger(0, smaller(g_.input[1], rows - g_.padding[1]));
    const int64_t pixels = used_rows * g_.input[2], columns_left = columns - g_.padding[2];
    const int64_t top = smaller(g_.padding[1], rows), left = smaller(g_.padding[2], columns);
    const int64_t used_columns = smaller(g_.input[2], columns_left > 0 ? columns_left : 0);
    fill_zeros(to, top * columns * lanes_);
    fill_zeros(to + (top + used_rows) * columns * lanes_, (rows - top - used_rows) * columns * lanes_);
    for (int64_t row = 0; row < used_rows; ++row) {
      C* padding = to + (top + row) * columns * lanes_;
      fill_zeros(padding, left * lanes_);
      fill_zeros(padding + (left + used_columns) * lanes_, (columns - left - used_columns) * lanes_);
    }
    C* const first = to + (top * columns + left) * lanes_;
    const int64_t stride = call_.input_layout.n;
    for (int64_t v = 0; v * width < lanes_; ++v) {
      const T* lanes = from + v * width * stride;
      int64_t row = 0, column = 0;
      for (int64_t pixel = 0; pixel < pixels; pixel += width) {
        const int64_t left_over = pixels - pixel;
        Vec<C> block[width];
        for (int64_t i = 0; i < width; ++i) {
          const T* source = lanes + i * stride + pixel;
          block[i] = v * width + i < live_ ? load_up_to<T>(source, left_over) : Vec<C>{};
        }
        transpose<C>(block);
        for (int64_t i = 0; i < width && i < left_over; ++i) {
          if (column < columns_left) store(first + (row * columns + column) * lanes_ + v * width, block[i]);
          if (++column == g_.input[2]) {
            column = 0;
            ++row;
          }
        }
      }
    }
  }

  template <int vectors>
  void run_blocks() {
    const int64_t blocks = divide_up(g_.out_channels, kLaneOutputs);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = g_.out_channels * b / blocks, last = g_.out_channels * (b + 1) / blocks;
      with_constant<kLaneOutputs>(static_cast<int>(last - first),
                                  [&](auto outputs) { run_block<vectors, decltype(outputs)::value>(first); });
    }
  }

  template <int vectors, int outputs>
  void run_block(int64_t first) {
    Vec<C> bias[outputs][vectors] = {};
    for (int o = 0; o < outputs && call_.bias; ++o) {
      const C value = to_compute(call_.bias[group_ * g_.out_channels + first + o]);
      for (int v = 0; v < vectors; ++v) bias[o][v] = broadcast<C>(value);
    }
    const int64_t pixel = vectors * kLanes<C>, plane = piece_.conv[2] * pixel;
    const ConvRing<C> ring = {scratch_.ring, scratch_.tags, smaller(piece_.conv[0], piece_.pool_extent(0)),
                              smaller(piece_.conv[1], piece_.pool_extent(1)), outputs * plane};
    ring.forget();
    const C* weight = call_.packed + (group_ * g_.out_channels + first) * g_.depth();
    const bool skips_padding = may_skip_padding(first, outputs);
    const auto compute = [&](int64_t z, int64_t y, C* to) {
      const C* tile = scratch_.tile + z * g_.stride[0] * step_[0] + y * g_.stride[1] * step_[1];
      const LaneTap* taps = scratch_.taps;
      const int64_t count = skips_padding ? find_taps(z, y, taps) : g_.depth();
      lanes_row(tile, g_.stride[2] * step_[2], taps, count, weight, bias, piece_.conv[2], to);
    };
    for (int64_t z = 0; z < piece_.output[0]; ++z) {
      for (int64_t y = 0; y < piece_.output[1]; ++y) {
        const int64_t count = ring.find_rows(piece_, z, y, scratch_.window_rows, compute);
        for (int o = 0; o < outputs; ++o) {
          const int64_t at = (o * piece_.pixels() + (z * piece_.output[1] + y) * piece_.output[2]) * pixel;
          if (call_.winners) {
            pool_row<C, vectors, true>(piece_, scratch_.window_rows, count, 0, 0, piece_.output[2], scratch_.stage + at,
                                       scratch_.winner_stage + at);
          } else {
            pool_row<C, vectors, false>(piece_, scratch_.window_rows, count, 0, 0, piece_.output[2],
                                        scratch_.stage + at, nullptr);
          }
          for (int64_t r = 0; r < count; ++r) scratch_.window_rows[r].pixels += plane;
        }
      }
    }
    write(first, outputs, scratch_.stage, scratch_.plane, call_.output);
    if (call_.winners) write(first, outputs, scratch_.winner_stage, scratch_.winner_plane, call_.winners);
  }

  // Whether sums are the same without the rows of taps in the padding, whose products are zeros: whether the weight is
  // finite, no bias is -0 and sums are not taken in parts. Bands, of which each has another padding, have all rows.
  bool may_skip_padding(int64_t first, int64_t outputs) const {
    if (call_.plan.bands > 1 || (g_.padding[0] == 0 && g_.padding[1] == 0) || g_.depth() > kLongestSum) return false;
    const int64_t channel = group_ * g_.out_channels + first;
    for (int64_t o = 0; o < outputs && call_.bias; ++o) {
      const C bias = to_compute(call_.bias[channel + o]);
      if (bias == 0 && __builtin_signbit(bias)) return false;
    }
    return is_finite<C>(add_squares(call_.packed + channel * g_.depth(), outputs * g_.depth(), Vec<C>{}));
  }

  // The taps of a conv row without those rows: how many.
  int64_t find_taps(int64_t z, int64_t y, const LaneTap*& found) const {
    const Range slices = taps_inside(g_, 0, z), rows = taps_inside(g_, 1, y);
    if ((slices.last - slices.first) * (rows.last - rows.first) == g_.kernel[0] * g_.kernel[1]) return g_.depth();
    int64_t count = 0;
    for_each_tap(g_, TapOrder::channels_first, [&](int64_t k, int64_t, int64_t d, int64_t h, int64_t) {
      const bool inside = d >= slices.first && d < slices.last && h >= rows.first && h < rows.last;
      if (inside) scratch_.row_taps[count++] = scratch_.taps[k];
    });
    found = scratch_.row_taps;
    return count;
  }

  // Pooled pixels [output channel][pixel][lane], of output channels from `first` on, to where each lane's belong.
  template <class From, class To>
  void write(int64_t first, int64_t outputs, const From* from, From* rows, To* tensor) {
    const ConvLayout& layout = call_.output_layout;
    const int64_t pixels = piece_.pixels();
    To* const to = tensor + (group_ * g_.out_channels + first) * layout.c;
    const bool runs = call_.plan.bands == 1 && layout.c == pixels;  // all of a lane's are one
    if (runs) return transpose_matrix(from, lanes_, outputs * pixels, live_, to + first_piece_ * layout.n, layout.n);
    for (int64_t o = 0; o < outputs; ++o) {
      transpose_matrix(from + o * pixels * lanes_, lanes_, pixels, lanes_, rows, pixels);
      for (int64_t i = 0; i < live_; ++i) {
        write_rows(pieces_[i], rows + i * pixels, to + o * layout.c + pieces_[i].image * layout.n);
      }
    }
  }

  // The same of one lane and output channel.
  template <class From, class To>
  void write_rows(const Lane& lane, const From* from, To* to) {
    const ConvLayout& layout = call_.output_layout;
    const int64_t count = smaller(piece_.output[1], g_.output[1] - lane.row) * g_.output[2];
    for (int64_t z = 0; z < g_.output[0] && count > 0; ++z) {
      const From* source = from + z * piece_.output[1] * piece_.output[2];
      To* target = to + z * layout.d[0] + lane.row * layout.d[1];
      if (layout.d[2] == 1) {
        copy_out(source, count, target);
      } else {
        for (int64_t x = 0; x < count; ++x) copy_one(source[x], target + x * layout.d[2]);
      }
    }
  }

  const ConvPoolForward<T>& call_;
  const ConvPoolGeometry& g_;
  const ConvPoolGeometry piece_;
  const int64_t lanes_;
  const LanesScratch<C> scratch_;
  int64_t pixel_;  // elements of the input that are copied as one run with a column's: its channels, or 1
  int64_t step_[3], channel_step_;
  int64_t first_piece_, group_, live_;
  Lane pieces_[2 * kLanes<C>];
};

template <class T>
void forward_lanes(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  LanesForward<T> worker(call, scratch);
  for (int64_t item = first_item; item < last_item; ++item) worker.run(item);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
