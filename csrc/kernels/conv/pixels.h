// Direct convolution, pixels in the vector's lanes.
//
// For layers whose outputs would not fill vectors, or whose few inputs make little work of each pixel: the weight is
// broadcast, the input needs no transpose to come in nor the output one to go out. Columns that meet the same place of
// neighbouring windows are copied side by side, so that pooling is a maximum of vectors. Where a row has too few
// windows to fill vectors, some images share them.
//
// Costs depth multiply-adds a vector of pixels and output, at the multipliers' peak where lanes are full, and a load
// and a store for each element of the input.
#pragma once

#include "pack.h"
#include "tile.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class T>
class PixelsForward {
  using C = Compute<T>;

 public:
  PixelsForward(const ConvCall<T>& call, void* scratch)
      : call_(call),
        g_(call.geometry),
        plan_(call.plan->pixels),
        parts_(scratch),
        copy_(parts_.take<C>(plan_.copy_size)),
        offsets_(parts_.take<int64_t>((plan_.in_registers ? g_.places() : g_.pool_stride[2]) * plan_.depth)),
        ring_(plan_.ring, parts_.take<C>(plan_.ring.slices * plan_.ring.rows * plan_.ring.row_size),
              parts_.take<int64_t>(plan_.ring.slices * plan_.ring.rows)),
        outside_(parts_.take<C>(plan_.ring.row_size)),
        stage_(parts_.take<C>(plan_.block * plan_.band.stage_rows * plan_.pitch)),
        winner_stage_(parts_.take<uint8_t>(plan_.block * plan_.band.stage_rows * plan_.pitch)),
        rows_(parts_.take<const C*>(g_.pool_kernel[0] * g_.pool_kernel[1])),
        places_(parts_.take<const C*>(g_.places())),
        bias_(parts_.take<C>(plan_.block)),
        places_in_row_(parts_.take<int64_t>(plan_.band.input[2])),
        places_in_slice_(parts_.take<int64_t>(plan_.band.images > 1 ? plan_.band.input[1] * g_.input[2] : 0)) {
    for (int64_t x = 0; x < plan_.band.input[2]; ++x) places_in_row_[x] = place_of(x);
    // The tiles also sum what lies behind the runs of columns. These sums are not used, but what they read must be
    // finite.
    fill_zeros(copy_ + g_.in_channels * plan_.channel_step, plan_.copy_size - g_.in_channels * plan_.channel_step);
    fill(outside_, plan_.ring.row_size, kMinusInfinity<C>);
    if (plan_.in_registers) {
      for (int64_t place = 0; place < g_.places(); ++place) {
        const int64_t row = place / g_.pool_kernel[2];
        list_offsets(place, row / g_.pool_kernel[1] * g_.pool_dilation[0],
                     row % g_.pool_kernel[1] * g_.pool_dilation[1], place % g_.pool_kernel[2] * g_.pool_dilation[2]);
      }
    } else {
      for (int64_t residue = 0; residue < g_.pool_stride[2]; ++residue) list_offsets(residue, 0, 0, residue);
    }
  }

  void run(int64_t first_item, int64_t last_item) {
    for (int64_t item = first_item; item < last_item; ++item) {
      band_ = band_of(g_, plan_.band, 1, item);
      const int64_t pixels = plan_.pixels_of_run(g_, plan_.band, band_.rows, band_.columns);
      tiles_ = divide_up(pixels * plan_.band.images, plan_.vectors * kLanes<C>);
      copy_band();
      for (int64_t b = 0; b < plan_.blocks; ++b) {
        first_ = g_.out_channels * b / plan_.blocks;
        count_ = g_.out_channels * (b + 1) / plan_.blocks - first_;
        plan_.joins_rows ? run_joined() : plan_.in_registers ? run_windows() : run_block();
      }
    }
  }

 private:
  // Writes the offsets of the input elements that the conv pixel (slice, row, column) of the band reads, into list
  // `list`.
  void list_offsets(int64_t list, int64_t slice, int64_t row, int64_t column) {
    for_each_tap(g_, g_.in_channels, weight_is_channels_last(call_),
                 [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
                   offsets_[list * plan_.depth + k] = c * plan_.channel_step +
                                                      (slice * g_.stride[0] + d * g_.dilation[0]) * plan_.step[0] +
                                                      (row * g_.stride[1] + h * g_.dilation[1]) * plan_.step[1] +
                                                      place_of(column * g_.stride[2] + w * g_.dilation[2]);
                 });
  }

  // Where a column of the band stands in its row.
  int64_t place_of(int64_t column) const {
    if (plan_.residues == 1) return column * plan_.band.images;  // without a division, of which there are many
    return column % plan_.residues * plan_.run + column / plan_.residues * plan_.band.images;
  }

  // Writes zeros where a row of the copy has no input: beside the input's columns, and, unless the row is filled with
  // them as it is copied, for images beyond the last one.
  void fill_beside(Inside columns, C* row, bool fills_images) const {
    const int64_t places = plan_.step[1] / plan_.band.images, images = plan_.band.images;
    const int64_t before = smaller(columns.first, places), behind = larger(columns.last, 0);
    if (plan_.residues == 1) {
      fill_zeros(row, before * images);
      fill_zeros(row + behind * images, (places - behind) * images);
    } else {
      for (int64_t x = 0; x < before; ++x) fill_zeros(row + place_of(x), images);
      for (int64_t x = behind; x < places; ++x) fill_zeros(row + place_of(x), images);
    }
    if (band_.images == images || fills_images) return;
    for (int64_t x = columns.first; x < columns.last; ++x) {
      fill_zeros(row + place_of(x) + band_.images, images - band_.images);
    }
  }

  void copy_band() {
    const ConvLayout& layout = call_.input_layout;
    const Inside columns = overlap(band_.input[2], plan_.band.input[2], g_.input[2]);
    const int64_t count = columns.last - columns.first, images = plan_.band.images;
    const T* const from = call_.input + band_.image * layout.n + band_.group * g_.in_channels * layout.c +
                          (band_.input[2] + columns.first) * layout.d[2];
    const int64_t channels = g_.in_channels;
    // The zeros beside the rows are written anew only if this band's padding differs from the last band's.
    const bool alike = columns.first == zeroed_.first && columns.last == zeroed_.last && band_.images == zeroed_images_;
    zeroed_ = columns;
    zeroed_images_ = band_.images;
    // Rows of images that follow each other are transposed as one, so that few transposes have columns to spare.
    const bool are_joined =
        images > 1 && count == g_.input[2] && layout.d[2] == 1 && layout.d[1] == count && g_.meets_all(1);
    const Inside rows = overlap(band_.input[1], plan_.band.input[1], g_.input[1]);
    if (are_joined && columns.first != joined_column_) {
      joined_column_ = columns.first;
      int64_t* next = places_in_slice_;
      for (int64_t h = 0; h < plan_.band.input[1]; ++h) {
        for (int64_t x = 0; x < count; ++x) *next++ = h * plan_.step[1] + places_in_row_[columns.first + x];
      }
    }
    for_each_input_row(g_, layout, plan_.band, band_, [&](int64_t d, int64_t h, bool is_inside, int64_t place) {
      C* const to = copy_ + d * plan_.step[0] + h * plan_.step[1];
      if (!is_inside || count <= 0) {
        for (int64_t c = 0; c < channels; ++c) fill_zeros(to + c * plan_.channel_step, plan_.step[1]);
        return;
      }
      for (int64_t c = 0; c < channels && !alike; ++c)
        fill_beside(columns, to + c * plan_.channel_step, layout.d[2] == 1);
      const T* row = from + place;
      const int64_t* const places = places_in_row_ + columns.first;
      if (layout.d[2] != 1) {  // channels last: a pixel of many images, or pixels that lie side by side in the copy
        const int64_t apart = images > 1 ? 1 : plan_.residues;
        for (int64_t x = 0; x < (images > 1 ? count : smaller(apart, count)); ++x) {
          if (!g_.meets(2, columns.first + x)) continue;
          transpose_matrix(row + x * layout.d[2], images > 1 ? layout.n : apart * layout.d[2],
                           images > 1 ? band_.images : divide_up(count - x, apart), channels, to + places[x],
                           plan_.channel_step);
        }
        return;
      }
      const auto transpose_images = [&](int64_t pixels, const int64_t* at) {
        for (int64_t c = 0; c < channels; ++c) {
          transpose_to_places(row + c * layout.c, layout.n, band_.images, images, pixels, to + c * plan_.channel_step,
                              [=](int64_t x) __attribute__((always_inline)) { return at[x]; });
        }
      };
      if (are_joined && h > rows.first) return;  // which the slice's first row took along
      if (images > 1)
        return transpose_images(are_joined ? (rows.last - h) * count : count, are_joined ? places_in_slice_ : places);
      for (int64_t c = 0; c < channels; ++c, row += layout.c) {
        part_columns(row, count, plan_.residues, to + c * plan_.channel_step,
                     [=](int64_t x) __attribute__((always_inline)) { return places[x]; });
      }
    });
  }

  void start_block() {
    const int64_t output = band_.group * g_.out_channels + first_;
    for (int64_t o = 0; o < count_; ++o) bias_[o] = call_.bias ? to_compute(call_.bias[output + o]) : C(0);
  }

  // Computes all conv pixels of the band as if they were one row. Pixels that lie between the ends of two rows are
  // computed too, and are not used.
  void run_joined() {
    start_block();
    C* const sums = ring_.all();
    const C* const weight = call_.packed + (band_.group * g_.out_channels + first_) * plan_.depth;
    const C* rectified = sums;
    if (call_.winners) {
      sum_run(copy_, offsets_, weight, {}, sums);
      places_[0] = sums;
      const int64_t vectors = tiles_ * plan_.vectors;
      pool_windows<C>({places_, 1, plan_.conv_run, plan_.pitch, count_, vectors, bounds_of(call_)}, stage_,
                      winner_stage_);
      rectified = stage_;
    } else {
      sum_run(copy_, offsets_, weight, bounds_of(call_), sums);
    }
    for (int64_t r = 0; r < band_.rows; ++r) {
      const int64_t row = r * plan_.step[1];
      write_rows(call_, output_at(r), count_, band_.columns, rectified + row, winner_stage_ + row, plan_.pitch);
    }
  }

  // Where the pooled row r of the band begins in the output, of the block's first output.
  int64_t output_at(int64_t r) const {
    const ConvLayout& layout = call_.output_layout;
    return band_.image * layout.n + (band_.group * g_.out_channels + first_) * layout.c + band_.slice * layout.d[0] +
           (band_.row + r) * layout.d[1] + band_.column * layout.d[2];
  }

  // A run of conv pixels of each of the block's outputs, within bounds.
  void sum_run(const C* pixels, const int64_t* offsets, const C* weight, const Bounds<C>& bounds, C* to) const {
    const auto tile = pixel_tiles_f32.at[plan_.vectors == 8 ? 3 : plan_.vectors / 2][count_ - 1];
    for (int64_t k = 0; k < plan_.depth; k += kLongestSum) {
      tile({tiles_, pixels, offsets + k, smaller(kLongestSum, plan_.depth - k), weight + k * count_, count_,
            k == 0 ? bias_ : nullptr, k + kLongestSum >= plan_.depth ? bounds : Bounds<C>{}, to, plan_.conv_run});
    }
  }

  void run_windows() {
    start_block();
    const C* const weight = call_.packed + (band_.group * g_.out_channels + first_) * plan_.depth;
    const auto tile = (call_.winners ? window_tiles_f32.winners : window_tiles_f32.values)[count_ - 1];
    const ConvLayout& layout = call_.output_layout;
    // Rows of whole vectors go where they belong at once.
    const bool in_place =
        sizeof(T) == sizeof(C) && plan_.band.images == 1 && layout.d[2] == 1 && band_.columns == plan_.pitch;
    for (int64_t r = 0; r < band_.rows; ++r) {
      const int64_t staged = r % plan_.band.stage_rows;
      WindowTile<C> call = {plan_.pitch / kLanes<C>,
                            copy_ + r * g_.pool_stride[1] * g_.stride[1] * plan_.step[1],
                            offsets_,
                            g_.places() / 2,
                            plan_.depth,
                            weight,
                            count_,
                            bias_,
                            bounds_of(call_).least,
                            stage_ + staged * plan_.pitch,
                            plan_.band.stage_rows * plan_.pitch,
                            winner_stage_ + staged * plan_.pitch};
      if (in_place) {
        call.to = reinterpret_cast<C*>(call_.output) + output_at(r);
        call.winners = call_.winners ? call_.winners + output_at(r) : nullptr;
        call.to_step = layout.c;
      }
      tile(call);
      if (in_place) continue;
      if (staged + 1 == plan_.band.stage_rows || r + 1 == band_.rows) write(r - staged, staged + 1);
    }
  }

  void run_block() {
    start_block();
    ring_.forget();
    const int64_t images = plan_.band.images, vectors = divide_up(band_.columns * images, kLanes<C>);
    for (int64_t r = 0; r < band_.rows; ++r) {
      const int64_t staged = r % plan_.band.stage_rows;
      C* to = stage_ + staged * plan_.pitch;
      uint8_t* winners = call_.winners ? winner_stage_ + staged * plan_.pitch : nullptr;
      const bool any = find_rows(g_, ring_, band_.slice, band_.row + r, outside_, rows_,
                                 [&](int64_t z, int64_t y) { make_row(z, y); });
      for (int64_t i = 0; i < g_.places(); ++i) {
        const int64_t column = i % g_.pool_kernel[2] * g_.pool_dilation[2];
        places_[i] = rows_[i / g_.pool_kernel[2]] + column % g_.pool_stride[2] * plan_.block * plan_.conv_run +
                     column / g_.pool_stride[2] * images;
      }
      const int64_t result = plan_.band.stage_rows * plan_.pitch;
      pool_windows<C>({places_, g_.places(), plan_.conv_run, result, count_, vectors, bounds_of(call_)}, to, winners);
      for_each_empty(g_, band_.column, band_.columns, any, [&](int64_t x) {
        for (int64_t o = 0; o < count_; ++o) {
          fill(to + o * result + x * images, images, kMinusInfinity<C>);
          if (winners) __builtin_memset(winners + o * result + x * images, kDead, images);
        }
      });
      if (staged + 1 == plan_.band.stage_rows || r + 1 == band_.rows) write(r - staged, staged + 1);
    }
  }

  void make_row(int64_t z, int64_t y) {
    C* const slot = ring_.slot(z, y);
    const C* const pixels =
        copy_ + (z - band_.conv[0]) * g_.stride[0] * plan_.step[0] + (y - band_.conv[1]) * g_.stride[1] * plan_.step[1];
    const C* const weight = call_.packed + (band_.group * g_.out_channels + first_) * plan_.depth;
    const int64_t images = plan_.band.images, stride = g_.pool_stride[2];
    const int64_t used = smaller(stride, g_.pool_extent(2));
    for (int64_t residue = 0; residue < used; ++residue) {
      C* const to = slot + residue * plan_.block * plan_.conv_run;
      const int64_t* offsets = offsets_ + residue * plan_.depth;
      sum_run(pixels, offsets, weight, {}, to);
      // Conv column conv[2] + residue + stride * place does not exist before `first` and from `last` on: there the
      // maximum must not be taken, so that minus infinity is written.
      const int64_t start = band_.conv[2] + residue;
      const int64_t first = start < 0 ? smaller(plan_.conv_pixels, divide_up(-start, stride)) : 0;
      const int64_t room = g_.conv[2] - start;
      const int64_t last = room <= 0 ? first : larger(first, smaller(plan_.conv_pixels, divide_up(room, stride)));
      if (first == 0 && last == plan_.conv_pixels) continue;
      for (int64_t o = 0; o < count_; ++o) {
        fill(to + o * plan_.conv_run, first * images, kMinusInfinity<C>);
        fill(to + o * plan_.conv_run + last * images, (plan_.conv_pixels - last) * images, kMinusInfinity<C>);
      }
    }
  }

  // The staged rows, from the band's `first` on.
  void write(int64_t first, int64_t staged) {
    const ConvLayout& layout = call_.output_layout;
    const int64_t images = plan_.band.images;
    const int64_t result = plan_.band.stage_rows * plan_.pitch;
    const bool joined = band_.columns * images == plan_.pitch && band_.columns == g_.output[2] &&
                        layout.d[1] == band_.columns * layout.d[2];
    const int64_t rows = joined ? 1 : staged, columns = joined ? staged * band_.columns : band_.columns;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = output_at(first + r);
      const C* from = stage_ + r * plan_.pitch;
      const uint8_t* winners = winner_stage_ + r * plan_.pitch;
      if (images == 1) {
        write_rows(call_, at, count_, columns, from, winners, result);
        continue;
      }
      const auto finish_images = [&] {
        for (int64_t i = 0; i < band_.images; ++i) finish_rows(call_, at + i * layout.n, count_, columns);
      };
      if (layout.d[2] == 1) {  // of each output [pixel][image]
        for (int64_t o = 0; o < count_; ++o) {
          transpose_matrix(from + o * result, images, columns, band_.images, call_.output + at + o * layout.c,
                           layout.n);
          if (!call_.winners) continue;
          transpose_matrix(winners + o * result, images, columns, band_.images, call_.winners + at + o * layout.c,
                           layout.n);
        }
        finish_images();
        continue;
      }
      for (int64_t x = 0; x < columns; ++x) {  // of each pixel [output][image]
        transpose_matrix(from + x * images, result, count_, band_.images, call_.output + at + x * layout.d[2],
                         layout.n);
        if (!call_.winners) continue;
        transpose_matrix(winners + x * images, result, count_, band_.images, call_.winners + at + x * layout.d[2],
                         layout.n);
      }
      finish_images();
    }
  }

  const ConvCall<T>& call_;
  const ConvPoolGeometry& g_;
  const PixelsPlan& plan_;
  Parts parts_;
  C* copy_;
  int64_t* offsets_;
  const Ring<C> ring_;
  C *outside_, *stage_;
  uint8_t* winner_stage_;
  const C **rows_, **places_;
  C* bias_;
  int64_t* places_in_row_;    // place_of each of the band's columns
  int64_t* places_in_slice_;  // the same of all columns of rows that follow each other, where images share vectors
  Band band_;
  int64_t tiles_;          // of a run of the band's conv pixels
  int64_t first_, count_;  // outputs of the block
  Inside zeroed_ = {-1, -1};
  int64_t zeroed_images_ = 0;
  int64_t joined_column_ = -1;  // of a row of the band: where the input begins that the places in a slice are for
};

template <class T>
void run_pixels(const ConvCall<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  PixelsForward<T>(call, scratch).run(first_item, last_item);
}

// weight -> [group][block][depth][outputs of the block]
template <class T>
void pack_pixels(const ConvCall<T>& call, int64_t first_item, int64_t last_item) {
  const ConvPoolGeometry& g = call.geometry;
  const PixelsPlan& plan = call.plan->pixels;
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t group = item / plan.blocks, b = item % plan.blocks;
    const int64_t first = g.out_channels * b / plan.blocks, count = g.out_channels * (b + 1) / plan.blocks - first;
    const int64_t output = group * g.out_channels + first;
    pack_outputs(call, output, count, call.packed + output * plan.depth, count);
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
