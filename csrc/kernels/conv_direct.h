// Forward: direct convolution with output channels in the vector's lanes.
//
// A thread copies the input that a band of pooled rows needs into a tile padded with zeros, so that the inner loop
// checks nothing. Then, a block of output channels at a time, windows that share no pixel are pooled in registers
// (conv_pool_tile.h). Elsewhere rows of conv pixels go into a small ring, from which windows are pooled; a conv pixel
// under several windows is computed once. Such rows may also be computed several at a time (conv_row_short.h), without
// a copy (conv_row_inside.h), with fewer multiplications (conv_row_phases.h) or by a matrix unit (conv_row_matrix.h).
#pragma once

#include "conv_direct_pack.h"
#include "conv_direct_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// One thread's way through its items, with a tile and a weight of elements E.
template <class E, class T>
class DirectForward {
  using C = Compute<T>;
  static constexpr bool kPoolsThem = kPoolsInTiles<C> && !kIsOfMatrix<E>;  // windows, in registers

 public:
  DirectForward(const ConvPoolForward<T>& call, void* memory)
      : call_(call),
        g_(tile_geometry<E>(call.geometry)),
        plan_(call.plan),
        ring_shape_(direct_ring_shape<C>(g_, call.plan)),
        pools_in_tiles_(pools_in_tiles<E>(g_, call.plan)),
        phases_(g_, ring_shape_.columns),
        matrix_(g_, ring_shape_.columns),
        depth_(product_depth<E>(g_)),
        skips_rows_(skips_rows(g_, plan_)),
        scratch_(g_, call.plan, memory),
        ahead_(g_, call.input_layout, !call.plan.in_place, scratch_.ahead, E()) {
    if (in_phases()) {
      position_step_ = phase_step<C>(g_, plan_);
      step_[1] = phases_.pitch;
      step_[0] = step_[1] * input_extent(g_, 1, plan_.band);
      channel_step_ = step_[0] * input_extent(g_, 0, 1);
      step_[2] = 0;  // the columns of the kernel are none of the sum's
    } else if (plan_.in_place) {
      const ConvLayout layout = tile_layout<E>(call.input_layout);
      for (int d = 0; d < 3; ++d) step_[d] = layout.d[d];
      channel_step_ = layout.c;
    } else {
      step_[2] = channels_inside() ? tile_pixel<E>(g_.in_channels) : 1;
      step_[1] = step_[2] * input_extent(g_, 2, plan_.columns);
      step_[0] = step_[1] * input_extent(g_, 1, plan_.band);
      channel_step_ = channels_inside() ? 1 : channel_step<C>(g_, plan_);
    }
    for (int64_t i = 0; i < g_.groups * divide_up(g_.out_channels, kBlockChannels<C>); ++i) scratch_.moderate[i] = -1;
    for_each_tap(g_, plan_.order, [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
      if (kIsOfMatrix<E>) {  // the numbers that begin a block
        const int64_t number = k % matrix_.run;
        if (number % matrix_.numbers != 0) return;
        k = k / matrix_.run * matrix_.blocks + number / matrix_.numbers;
      }
      if (kStartsPair<E>) {  // the run's numbers, every second of which begins a pair
        const int64_t run = row_run(g_), number = k % run;
        if (number % 2 != 0) return;
        k = k / run * divide_up(run, 2) + number / 2;
      }
      const int64_t offset = c * channel_step_ + d * g_.dilation[0] * step_[0] + h * g_.dilation[1] * step_[1] +
                             w * g_.dilation[2] * step_[2];
      if (!in_phases()) {
        scratch_.offsets[k] = offset;
        ahead_.add_product(k, c, d, h, w);
      }
      for (int64_t p = 0; in_phases() && w == 0 && p < phases_.positions; ++p) {
        scratch_.offsets[p * phases_.depth + k / g_.kernel[2]] = offset + p * position_step_;
      }
    });
  }

  const MatrixShape& matrix() const { return matrix_; }

  void run(int64_t item) {
    const int64_t blocks = divide_up(g_.out_channels, kBlockChannels<C>);
    const int64_t parts = plan_.items / plan_.block_parts;  // of the input
    const int64_t block_part = plan_.blocks_first ? item / parts : item % plan_.block_parts;
    item = plan_.blocks_first ? item % parts : item / plan_.block_parts;
    // Groups first where they share the input's cache lines.
    const bool groups_first = call_.input_layout.c == 1;
    if (groups_first) group_ = item % g_.groups;
    if (groups_first) item /= g_.groups;
    const int64_t row_part = item % plan_.row_parts;
    item /= plan_.row_parts;
    first_column_ = item % plan_.column_parts * plan_.columns;
    last_column_ = smaller(first_column_ + plan_.columns, g_.output[2]);
    item /= plan_.column_parts;
    if (!groups_first) group_ = item % g_.groups;
    image_ = groups_first ? item : item / g_.groups;
    const int64_t rows = g_.output[0] * g_.output[1];
    const int64_t last_row = rows * (row_part + 1) / plan_.row_parts;
    for (int64_t b = 0; ring_shape_.persistent && b < blocks; ++b) ring(b).forget();
    for (int64_t row = rows * row_part / plan_.row_parts; row < last_row;) {
      const int64_t slice = row / g_.output[1], first = row % g_.output[1];
      const int64_t last = smaller(smaller(first + plan_.band, g_.output[1]), first + last_row - row);
      load_band(slice, first, last);
      start_ahead(slice, {first, last});
      for (int64_t b = blocks * block_part / plan_.block_parts; b < blocks * (block_part + 1) / plan_.block_parts;
           ++b) {
        run_block(b, slice, first, last);
      }
      row += last - first;
    }
  }

 private:
  bool channels_inside() const { return plan_.order == TapOrder::channels_last; }
  bool in_phases() const { return plan_.algorithm == ConvAlgorithm::phases; }

  ConvRing<C> ring(int64_t block) const {
    const int64_t slots = ring_shape_.slices * ring_shape_.rows, row = ring_shape_.columns * kBlockChannels<C>;
    const int64_t first = ring_shape_.persistent ? block * slots : 0;
    return {scratch_.ring + first * row, scratch_.tags + first, ring_shape_.slices, ring_shape_.rows, row};
  }

  void load_band(int64_t slice, int64_t first, int64_t last) {
    const int64_t pooled[3] = {slice, first, first_column_};
    const ConvLayout& layout = call_.input_layout;
    const T* input = call_.input + image_ * layout.n + group_ * call_.geometry.in_channels * layout.c;
    const int64_t extent[3] = {input_extent(g_, 0, 1), input_extent(g_, 1, last - first),
                               input_extent(g_, 2, plan_.columns)};
    InputTile<E> used{scratch_.tile, {}, {}, channel_step_, {}};
    for (int d = 0; d < 3; ++d) {
      first_conv_[d] = larger(0, pooled[d] * g_.pool_stride[d] - g_.pool_padding[d]);
      used.first[d] = first_conv_[d] * g_.stride[d] - g_.padding[d];
      used.size[d] = extent[d];
      used.d[d] = step_[d];
    }
    const int64_t past = (last_column_ - 1) * g_.pool_stride[2] - g_.pool_padding[2] + g_.pool_extent(2);
    conv_columns_ = larger(0, smaller(past, g_.conv[2]) - first_conv_[2]);
    if (plan_.in_place) {
      // Of such elements, or the plan would not be to leave it there.
      source_ = {reinterpret_cast<const E*>(input), {step_[0], step_[1], step_[2]}};
      if (!plan_.skips_padding) {
        tile_ = source_.data + used.first[0] * step_[0] + used.first[1] * step_[1] + used.first[2] * step_[2];
      }
    } else {
      tile_ = used.data;
      for (int64_t d = 0; kIsOfRun<E> && d < extent[0]; ++d) {  // what the last run ends with
        fill_zeros(used.data + d * step_[0] + extent[1] * step_[1], elements_behind<E>(call_.geometry));
      }
      if (in_phases()) {
        if constexpr (kHasPhases<E>) fill_phases(g_, phases_, input, layout, used, position_step_, scratch_.parted);
      } else {
        fill_tile(call_.geometry, input, layout, channels_inside(), channels_inside() ? step_[2] : g_.in_channels,
                  used);
      }
    }
    tile_is_moderate_ = false;
    if constexpr (kPoolsThem) tile_is_moderate_ = pools_in_tiles_ && box_is_moderate(g_, plan_.in_place, tile_, used);
  }

  void run_block(int64_t block, int64_t slice, int64_t first, int64_t last) {
    const int64_t channels = smaller(g_.out_channels - block * kBlockChannels<C>, kBlockChannels<C>);
    if (!ring_shape_.persistent) ring(block).forget();
    if constexpr (!kIsOfFloats<E>) {
      if (channels > kLanes<C>) {
        return call_.winners ? run_band<2, true>(block, channels, slice, first, last)
                             : run_band<2, false>(block, channels, slice, first, last);
      }
    }
    call_.winners ? run_band<1, true>(block, channels, slice, first, last)
                  : run_band<1, false>(block, channels, slice, first, last);
  }

  template <int vectors, bool with_winners>
  void run_band(int64_t block, int64_t channels, int64_t slice, int64_t first, int64_t last) {
    const int64_t channel = group_ * g_.out_channels + block * kBlockChannels<C>;
    Vec<C> bias[vectors] = {};
    for (int v = 0; v < vectors && call_.bias; ++v) {
      bias[v] = load_up_to<T>(call_.bias + channel + v * kLanes<C>, channels - v * kLanes<C>);
    }
    const bool in_tiles = pools_in_tiles_ && tile_is_moderate_ && block_is_moderate<vectors>(block, bias);
    const int64_t columns = last_column_ - first_column_;
    constexpr int64_t pixel = vectors * kLanes<C>;
    if (ring_shape_.together) make_together<vectors>(block, slice, first, last, bias);
    for (int64_t row = first; row < last; ++row) {
      C* to = scratch_.stage + (row - first) * columns * pixel;
      uint8_t* winners = scratch_.winner_stage + (row - first) * columns * pixel;
      if (in_tiles) {
        pool_in_tiles<vectors, with_winners>(block, channels, slice, row, bias, to, winners);
        continue;
      }
      const int64_t count = window_rows<vectors>(block, slice, row, bias);
      pool_row<C, vectors, with_winners>(g_, scratch_.window_rows, count, first_conv_[2], first_column_, last_column_,
                                         to, winners);
    }
    write_band<vectors>(channel, channels, slice, first, last);
  }

  // Whether no conv pixel can be NaN for the sake of a block's weight and bias.
  template <int vectors>
  bool block_is_moderate(int64_t block, const Vec<C> (&bias)[vectors]) const {
    int8_t& known = scratch_.moderate[group_ * divide_up(g_.out_channels, kBlockChannels<C>) + block];
    if (known < 0) {
      Vec<C> total = add_squares(block_weight(block), depth_ * vectors * kSums<E> * kLanes<C>, Vec<C>{});
      for (int v = 0; v < vectors; ++v) total += bias[v] * bias[v];
      known = is_finite<C>(total);
    }
    return known;
  }

  const Weight<E>* block_weight(int64_t block) const {
    const int64_t depth = in_phases() ? phases_.positions * phases_.depth : depth_;
    return reinterpret_cast<const Weight<E>*>(call_.packed) +
           depth * (group_ * packed_width<E>(g_.out_channels) + block * kBlockChannels<C>);
  }

  // The tile's element under the first tap of a conv row's first pixel.
  const E* conv_corner(int64_t z, int64_t y) const {
    return tile_ + (z - first_conv_[0]) * g_.stride[0] * step_[0] + (y - first_conv_[1]) * g_.stride[1] * step_[1];
  }

  // The products of a conv row: a part of the depth, from the one numbered `first` on.
  struct Products {
    int64_t first, count;
    const int64_t* offsets;
    const Weight<E>* weight;

    bool operator==(const Products& other) const { return first == other.first && count == other.count; }
  };
  template <int vectors>
  Products products(int64_t block, int64_t z, int64_t y) const {
    const int64_t rows = g_.kernel[0] * g_.kernel[1], of_row = depth_ / rows;
    const Range taken = skips_rows_ ? kernel_rows_inside(g_, z, y) : Range{0, rows};
    const int64_t first = taken.first * of_row;
    return {first, taken.last * of_row - first, scratch_.offsets + first,
            block_weight(block) + first * vectors * kSums<E> * kLanes<C>};
  }

  // A row of the output from pixel `at` on; without lines to ask for where channels come last.
  RowLines output_lines(int64_t block, int64_t channels, int64_t at) const {
    const ConvLayout& layout = call_.output_layout;
    const int64_t size = sizeof(T), channel = group_ * g_.out_channels + block * kBlockChannels<C>;
    const T* row = call_.output + image_ * layout.n + channel * layout.c + at;
    return {layout.d[2] == 1 ? reinterpret_cast<const char*>(row) : nullptr, size, layout.c * size, channels};
  }

  // A row of windows that share no pixel, none of which is NaN.
  template <int vectors, bool with_winners>
  void pool_in_tiles(int64_t block, int64_t channels, int64_t slice, int64_t row, const Vec<C> (&bias)[vectors], C* to,
                     uint8_t* winners) {
    const int64_t windows = last_column_ - first_column_;
    const int64_t at = (slice * g_.output[1] + row) * g_.output[2] + first_column_;
    const RowLines lines = output_lines(block, channels, at);
    with_constant<kMostTileTaps>(static_cast<int>(g_.pool_kernel[2]), [&](auto taps_constant) {
      constexpr int taps = decltype(taps_constant)::value;
      if constexpr (taps > 1 && kPoolsThem) {
        // The ring's memory, not used otherwise.
        PooledRow<C, taps, vectors, with_winners> pooled = {to, reinterpret_cast<Places<C>*>(scratch_.ring), 0, true};
        for (int64_t i = 0; i < g_.pool_kernel[0]; ++i) {
          const int64_t z = slice * g_.pool_stride[0] + i * g_.pool_dilation[0];
          for (int64_t j = 0; j < g_.pool_kernel[1]; ++j) {
            const int64_t y = row * g_.pool_stride[1] + j * g_.pool_dilation[1];
            const Products taken = products<vectors>(block, z, y);
            const auto pool = [&](const auto& ahead) {
              pool_conv_row(conv_corner(z, y), g_.stride[2] * step_[2], ahead, taken.offsets, taken.count, taken.weight,
                            bias, windows, lines, pooled);
            };
            // Not in training: its share of the build's time would be more than it is worth.
            with_winners ? pool(NothingAhead{}) : with_row_ahead(block, z, y, taken.first, pool);
            pooled.is_first = false;
            pooled.place += taps;
          }
        }
        if (with_winners) write_winners(to, pooled.winners, windows * vectors, winners);
      }
    });
  }

  // So many of the rows to be made, without the padding.
  template <int vectors>
  void make_inside(int64_t block, int64_t rows, const Vec<C> (&bias)[vectors]) {
    if constexpr (!kIsOfRun<E>) {  // whose input never lies in the tile's order
      with_steps_ahead(block, [&](const auto& ahead) {
        conv_rows_inside<vectors>(g_, source_, ahead, scratch_.offsets, block_weight(block), bias, scratch_.to_make,
                                  rows, first_conv_[2], conv_columns_);
      });
    }
  }

  // The conv rows of a band that are not there yet.
  template <int vectors>
  void make_together(int64_t block, int64_t slice, int64_t first, int64_t last, const Vec<C> (&bias)[vectors]) {
    int64_t waiting = 0;
    for (int64_t row = first; row < last; ++row) {
      ring(block).find_rows(g_, slice, row, scratch_.window_rows, [&](int64_t z, int64_t y, C* to) {
        scratch_.to_make[waiting++] = {plan_.skips_padding ? nullptr : conv_corner(z, y), to, z, y, ahead_.next(z, y)};
      });
    }
    if (plan_.skips_padding) return make_inside<vectors>(block, waiting, bias);
    if constexpr (!kIsOfMatrix<E> && kMakesTogether<C>) {
      with_steps_ahead(block, [&](const auto& ahead) {
        for (int64_t first = 0, past = 0; first < waiting; first = past) {  // of the same products
          const RowToMake<E>* rows = scratch_.to_make;
          const Products taken = products<vectors>(block, rows[first].z, rows[first].y);
          do {
            ++past;
          } while (past < waiting && products<vectors>(block, rows[past].z, rows[past].y) == taken);
          conv_rows_short<vectors>(rows + first, past - first, g_.stride[2] * step_[2], ahead, taken.first,
                                   taken.offsets, taken.count, taken.weight, bias, conv_columns_);
        }
      });
    }
  }

  template <int vectors>
  int64_t window_rows(int64_t block, int64_t slice, int64_t row, const Vec<C> (&bias)[vectors]) {
    int64_t waiting = 0;  // rows that a matrix unit makes together
    const int64_t count = ring(block).find_rows(g_, slice, row, scratch_.window_rows, [&](int64_t z, int64_t y, C* to) {
      if (plan_.skips_padding) {
        scratch_.to_make[0] = {nullptr, to, z, y, ahead_.next(z, y)};
        make_inside<vectors>(block, 1, bias);
      } else if (in_phases()) {
        if constexpr (kHasPhases<E>) {
          conv_row_phases<vectors>(phases_, conv_corner(z, y), scratch_.offsets, block_weight(block), bias, to);
        }
      } else if constexpr (kIsOfMatrix<E>) {
        scratch_.to_make[waiting++] = {conv_corner(z, y), to, z, y, nullptr};
      } else {
        const Products taken = products<vectors>(block, z, y);
        with_row_ahead(block, z, y, taken.first, [&](const auto& ahead) {
          conv_row<vectors>(conv_corner(z, y), g_.stride[2] * step_[2], ahead, taken.offsets, taken.count, taken.weight,
                            bias, conv_columns_, to);
        });
      }
    });
    if constexpr (kIsOfMatrix<E>) {
      conv_rows_matrix<vectors>(matrix_, scratch_.to_make, waiting, g_.stride[2] * step_[2], scratch_.offsets,
                                block_weight(block), bias, conv_columns_);
    }
    return count;
  }

  // A first block of channels finds what is next to be read far away. Rows that are made together do not ask for
  // pixels, nor do blocks that each go through all images.
  bool asks_ahead(int64_t block) const {
    if (ahead_.asks_for_pixels() && (ring_shape_.together || plan_.blocks_first)) return false;
    return ahead_.asks() && (block == 0 || plan_.blocks_first);
  }

  // Calls body(how conv rows ask for what is ahead).
  template <class Body>
  void with_steps_ahead(int64_t block, const Body& body) const {
    if constexpr (kAsksAhead<E>) {
      if (asks_ahead(block)) {
        return ahead_.asks_for_pixels() ? body(ahead_.template steps<true>()) : body(ahead_.template steps<false>());
      }
    }
    body(NothingAhead{});
  }

  // Calls body(what conv row (z, y) asks for), from that product on.
  template <class Body>
  void with_row_ahead(int64_t block, int64_t z, int64_t y, int64_t product, const Body& body) const {
    with_steps_ahead(block, [&](const auto& steps) {
      auto lines = lines_ahead<1>(steps, product);
      lines.start(0, ahead_.next(z, y));
      body(lines);
    });
  }

  // Next come more columns, or those of another group or image.
  void start_ahead(int64_t slice, Range band) {
    const ConvLayout& layout = call_.input_layout;
    const int64_t group = call_.geometry.in_channels * layout.c, column = g_.stride[2] * layout.d[2];
    const T* part = call_.input + image_ * layout.n + group_ * group + first_conv_[2] * column;
    for (int d = 0; d < 3; ++d) part -= g_.padding[d] * layout.d[d];
    const int64_t next = group_ + 1 < g_.groups ? group : layout.n - group_ * group;
    const bool is_last = last_column_ == g_.output[2];
    ahead_.start(part, is_last ? next - first_conv_[2] * column : plan_.columns * g_.pool_stride[2] * column, slice,
                 band);
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
  const ConvPoolGeometry g_;  // of the tile
  const ConvPoolPlan& plan_;
  const RingShape ring_shape_;
  const bool pools_in_tiles_;
  const PhaseShape<C> phases_;
  const MatrixShape matrix_;
  const int64_t depth_;  // products of an output
  const bool skips_rows_;
  const DirectScratch<E> scratch_;
  const E* tile_;  // the band's first conv pixel, first tap
  InputSource<E> source_;
  bool tile_is_moderate_;
  InputAhead<T> ahead_;
  int64_t step_[3], channel_step_;
  int64_t position_step_;  // phase_step
  int64_t image_, group_, first_column_, last_column_, conv_columns_;
  int64_t first_conv_[3];
};

template <class E, class T>
void forward_direct(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  DirectForward<E, T> worker(call, scratch);
  const auto run = [&] {
    for (int64_t item = first_item; item < last_item; ++item) worker.run(item);
  };
#if defined(__AVX512F__)
  if constexpr (kIsOfMatrix<E>) {
    const MatrixUnit unit(worker.matrix().pixels, worker.matrix().numbers);
    return run();
  }
#endif
  run();
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
