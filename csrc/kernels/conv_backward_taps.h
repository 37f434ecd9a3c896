// Backward of kernels of few taps and input channels: with pixels in the lanes every vector is full, and the products
// of all pixels are cheaper than what it takes to list those with a gradient.
//
// The pixels of the gradient's band are numbered as those of the padded input, so that each tap meets the input's
// pixels from a fixed distance on: those at the end of a row, which only the padded input has, have no gradient.
// Elements must be finite, since infinity times those zeros would be NaN.
#pragma once

#include "conv_backward_plan.h"
#include "conv_pixel_band.h"

namespace fastnn {
namespace FASTNN_ISA {

// Conv pixels of a band, at most: so many that sums over them are long, so few that some channels stay in L1.
template <class C>
constexpr int64_t kBandPixels = 64 * kLanes<C>;
// Taps whose dot products with dot_rows() output channels are made together.
constexpr int kMostDotTaps = FASTNN_VECTOR_BYTES == 64 ? 6 : 3;
constexpr int64_t kProductBytes = 16 << 10;  // of the products of one pass, which are then added up: half of L1

template <class C>
struct TapsScratch {
  BandShape<C> shape;
  BlockImage image;  // of one channel
  int64_t channels;  // output channels worked on together
  int64_t step;      // from one channel of the band to the next
  int64_t pass;      // pixels of one pass
  C* images;         // windows of the input's channels
  C* gradients;
  C* parts;  // ImageWindow's
  C* band;
  C* products;       // [channel of the input and tap][pixel of a pass]
  int64_t* offsets;  // of each channel and tap in the windows
  double* bias;      // of each output channel
  int64_t size;

  TapsScratch(const ConvPoolGeometry& g, void* memory)
      : shape(g, channels_together(g), kBandPixels<C>),
        image(g, 1, false, sizeof(C), shape.size, 2 * g.in_channels, kLanes<C>),
        channels(channels_together(g)) {
    const int64_t last = (shape.size[0] - 1) * image.d[0] + (shape.size[1] - 1) * image.d[1] + shape.size[2];
    step = round_up(last, kLanes<C>) + kLanes<C>;
    const int64_t fit = kProductBytes / static_cast<int64_t>(sizeof(C)) / g.depth();
    pass = larger(1, fit / kTileColumns<C>) * kTileColumns<C>;
    const bool in_parts = g.taps() * divide_up(g.out_channels, channels) > kLongestSum;
    MemoryParts taken(memory);
    images = taken.take<C>(image.size * g.in_channels);
    gradients = taken.take<C>(image.size * g.in_channels);
    parts = in_parts ? taken.take<C>(image.size * g.in_channels) : nullptr;
    band = taken.take<C>(channels * step);
    products = taken.take<C>(g.depth() * pass);
    offsets = taken.take<int64_t>(g.depth());
    bias = taken.take<double>(g.out_channels);
    size = taken.used();
  }

  static int64_t channels_together(const ConvPoolGeometry& g) {
    return divide_up(g.out_channels, divide_up(g.out_channels, kMostBandChannels));
  }
};

// The weight's gradient of a group, in tiles [output channels][taps][output channel x tap]: how many, and the taps of
// each.
struct DotTiles {
  int64_t rows, taps, row_tiles, tap_tiles, size;

  template <class C>
  static DotTiles of(const ConvPoolGeometry& g, int64_t out_channels) {
    const int64_t rows = dot_rows<C>(g), tap_tiles = divide_up(g.depth(), kMostDotTaps);
    return {rows, g.depth(), divide_up(out_channels, rows), tap_tiles,
            round_up(rows * divide_up(g.depth(), tap_tiles), kLanes<C>)};
  }

  int64_t first_tap(int64_t tile) const { return taps * tile / tap_tiles; }
  int64_t total() const { return row_tiles * tap_tiles * size; }
};

template <class T>
class TapsBackwardWorker {
  using C = Compute<T>;

 public:
  TapsBackwardWorker(const ConvPoolBackward<T>& call, bool weight_wanted, void* memory)
      : call_(call),
        g_(call.geometry),
        scratch_(call.geometry, memory),
        window_(call, scratch_.image, weight_wanted ? scratch_.images : nullptr,
                call.grad_input ? scratch_.gradients : nullptr, scratch_.parts),
        band_(call, scratch_.image.d[0], scratch_.image.d[1], scratch_.band, scratch_.step) {
    int64_t* to = scratch_.offsets;
    for (int64_t c = 0; c < g_.in_channels; ++c) {
      for (int64_t d = 0; d < g_.kernel[0]; ++d) {
        for (int64_t h = 0; h < g_.kernel[1]; ++h) {
          for (int64_t w = 0; w < g_.kernel[2]; ++w) {
            *to++ = c * scratch_.image.size + band_.number(d * g_.dilation[0], h * g_.dilation[1], w * g_.dilation[2]);
          }
        }
      }
    }
  }

  // A group of an image, the conv pixels `pixels` along the axis. `fresh`: there is nothing yet in grad_weight.
  void run(int64_t image, int64_t group, const Range& pixels, bool fresh, C* grad_weight, C* lost, C* grad_bias) {
    image_ = image;
    group_ = group;
    for (int64_t o = 0; o < g_.out_channels; ++o) scratch_.bias[o] = 0;
    window_.for_each_place(image, group * g_.in_channels, g_.in_channels, pixels,
                           [&](int64_t pixel, int64_t past, bool is_before) {
                             if (is_before) return run_window(pixel, past, false, nullptr, nullptr, nullptr);
                             run_window(pixel, past, fresh && pixel == pixels.first, grad_weight, lost, grad_bias);
                           });
    for (int64_t o = 0; grad_bias && o < g_.out_channels; ++o) {
      grad_bias[group * g_.out_channels + o] += static_cast<C>(scratch_.bias[o]);
    }
  }

 private:
  // The conv pixels [first, last) along the axis that the window moves along.
  void run_window(int64_t first, int64_t last, bool fresh, C* grad_weight, C* lost, C* grad_bias) {
    for (int64_t channel = 0; channel < g_.out_channels; channel += scratch_.channels) {
      const int64_t channels = smaller(scratch_.channels, g_.out_channels - channel);
      bool is_fresh = fresh;
      scratch_.shape.for_each(g_, scratch_.image.axis, first, last, [&](const ConvBox& box) {
        const int64_t count = band_.span(box), pixels = round_up(count, kLanes<C>);
        const int64_t start = band_.first_of(box) - first * scratch_.image.d[scratch_.image.axis];
        for (int64_t o = 0; o < channels; ++o) {
          band_.fill(image_, group_ * g_.out_channels + channel + o, box, o);
          if (grad_bias) scratch_.bias[channel + o] += band_.sum(o, count);
        }
        if (grad_weight) {
          const DotTiles tiles = DotTiles::of<C>(g_, scratch_.channels);
          const int64_t at = channel / scratch_.channels * tiles.total();
          add_weight_gradient(tiles, channels, window_.image(0) + start, pixels, is_fresh, grad_weight + at,
                              lost ? lost + at : nullptr);
        }
        is_fresh = false;
        if (call_.grad_input) {
          add_input_gradient(call_.packed + (group_ * g_.out_channels + channel) * g_.depth(), channels, pixels,
                             window_.gradient(0) + start);
          window_.count_additions(g_.taps());
        }
      });
    }
  }

  void add_weight_gradient(const DotTiles& tiles, int64_t channels, const C* image, int64_t pixels, bool fresh, C* to,
                           C* lost) const {
    constexpr int choices = kLanes<C> >= 4 ? 3 : 2;  // of 1, 2 and 4 rows
    with_constant<choices>(static_cast<int>(tiles.rows / 2 + 1), [&](auto choice) {
      constexpr int rows = 1 << (decltype(choice)::value - 1);
      for (int64_t o = 0; o < channels; o += rows) {
        for (int64_t tile = 0; tile < tiles.tap_tiles; ++tile) {
          const int64_t first = tiles.first_tap(tile), taps = tiles.first_tap(tile + 1) - first;
          const int64_t at = (o / rows * tiles.tap_tiles + tile) * tiles.size;
          with_constant<kMostDotTaps>(static_cast<int>(taps), [&](auto columns) {
            add_dots<rows, decltype(columns)::value>(o, channels, image, scratch_.offsets + first, pixels, fresh,
                                                     to + at, lost ? lost + at : nullptr);
          });
        }
      }
    });
  }

  // Rows beyond the channels repeat the last.
  template <int rows, int columns>
  void add_dots(int64_t o, int64_t channels, const C* image, const int64_t* offsets, int64_t pixels, bool fresh, C* to,
                C* lost) const {
    constexpr int lanes = kLanes<C>, vectors = (rows * columns + lanes - 1) / lanes;
    const C* left[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) left[r] = band_.channel(smaller(o + r, channels - 1));
    const C* right[columns];
#pragma GCC unroll 6
    for (int c = 0; c < columns; ++c) right[c] = image + offsets[c];
    Vec<C> total[rows * columns] = {};
    for (int64_t p = 0; p < pixels; p += lanes) {
      Vec<C> gradient[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) gradient[r] = load(left[r] + p);
#pragma GCC unroll 6
      for (int c = 0; c < columns; ++c) {
        const Vec<C> value = load(right[c] + p);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          total[r * columns + c] = multiply_add(gradient[r], value, total[r * columns + c]);
        }
      }
    }
#pragma GCC unroll 12
    for (int v = 0; v < vectors; ++v) {
      Vec<C> part[lanes] = {};
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (v * lanes + i < rows * columns) part[i] = total[v * lanes + i];
      }
      const Vec<C> sums = sum_each<C, lanes>(part);
      put_sums(sums, fresh, to + v * lanes, lost ? lost + v * lanes : nullptr);
    }
  }

  // The products of each tap's weight, then each tap's at its distance.
  void add_input_gradient(const C* weight, int64_t channels, int64_t pixels, C* to) const {
    const int64_t depth = g_.depth(), pass = scratch_.pass;
    for (int64_t first = 0; first < pixels; first += pass) {
      const int64_t count = smaller(pass, pixels - first);
      for_each_tile<C>(depth, count, false, [&](auto rows, auto vectors, int64_t row, int64_t column, int last) {
        Vec<C> total[decltype(rows)::value][decltype(vectors)::value];
        multiply_tile(channels, weight + row, 1, depth, band_.channel(0) + first + column, scratch_.step, kLanes<C>,
                      total);
        store_tile<decltype(rows)::value, decltype(vectors)::value, C>(
            total, last, scratch_.products + row * pass + column, pass, [](Vec<C> x, int) { return x; });
      });
      for (int64_t row = 0; row < depth; ++row) {
        const C* from = scratch_.products + row * pass;
        C* target = to + first + scratch_.offsets[row];
        for (int64_t p = 0; p < count; p += kLanes<C>) store(target + p, load(target + p) + load(from + p));
      }
    }
  }

  const ConvPoolBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const TapsScratch<C> scratch_;
  ImageWindow<T> window_;
  PixelBand<T> band_;
  int64_t image_, group_;
};

template <class C>
int64_t weight_size_of_group(const ConvPoolGeometry& g) {
  const int64_t channels = TapsScratch<C>::channels_together(g);
  return divide_up(g.out_channels, channels) * DotTiles::of<C>(g, channels).total();
}

// As measured, more channels of the input lose where there are few outputs.
FASTNN_INLINE bool taps_apply(const ConvPoolGeometry& g) {
  constexpr int64_t kMostInputs = 4, kMostDepth = 128;
  if (g.in_channels > kMostInputs || g.depth() > kMostDepth) return false;
  return g.stride[0] == 1 && g.stride[1] == 1 && g.stride[2] == 1 && g.taps() > 1 && g.taps() <= kLongestSum;
}

// Counted as runs_cost() counts, in which a multiply-add is a half: lists take more than products.
template <class C>
bool taps_pay(const ConvPoolGeometry& g, const ConvLayout& input) {
  const TapsScratch<C> scratch(g, nullptr);
  const auto real = [](int64_t count) { return static_cast<double>(count); };
  const bool strided = input.c == 1 && g.in_channels > 1;  // windows, and the input, are read in strides
  constexpr double kSum = 20, kRow = 16;                   // of each dot product's lanes; of each row of windows
  const double conv = real(g.conv[0] * g.conv[1] * g.conv[2]);
  const double padded = real(g.conv[2] > 1 ? scratch.image.extent[2] : 1) / real(g.conv[2]) *
                        real(g.conv[0] > 1 ? scratch.image.extent[1] : g.conv[1]) / real(g.conv[1]);
  const double windows = real(g.pixels()) / conv, rows = windows / real(g.output[2]);
  const double products = padded * real(g.depth()) / kLanes<C>;
  const double sums =
      real(g.depth()) / kLanes<C> * kSum / real(smaller(scratch.shape.pixels, g.conv[0] * g.conv[1] * g.conv[2]));
  constexpr double kAddUp = 3;  // of each product, by all outputs: memory is read and written
  const double cost =
      kAddUp * products + real(g.out_channels) * (products + sums + windows * (strided ? 5 : 2.5) + rows * kRow);
  // Windows that overlap share winners, which are listed once.
  ConvPoolGeometry listed = join_groups(g, cheapest_join<C>(g));
  for (int d = 0; d < 3; ++d) listed.output[d] = smaller(g.output[d], 2 * g.conv[d] / (g.pool_kernel[d] + 1));
  return real(g.groups) * cost < runs_cost<C>(listed);
}

template <class C>
ConvPoolBackwardPlan plan_taps(const ConvPoolGeometry& g) {
  const TapsScratch<C> scratch(g, nullptr);
  ConvPoolBackwardPlan plan = {};
  plan.algorithm = ConvBackwardAlgorithm::taps;
  plan.packed_size = g.groups * g.out_channels * g.depth();
  plan.weight_size = g.groups * weight_size_of_group<C>(g);
  plan.scratch_size = scratch.size;
  plan.axis = scratch.image.axis;
  const int64_t least = 8 * (scratch.image.pixels_before(g) + 1);
  plan.most_parts = larger(1, g.conv[plan.axis] / least);
  plan.blocks = g.groups;
  const int64_t bands = divide_up(g.conv[0], scratch.shape.size[0]) * divide_up(g.conv[1], scratch.shape.size[1]) *
                        divide_up(g.conv[2], scratch.shape.size[2]);
  plan.keeps_lost = g.batch * bands > kFewAdditions;
  plan.needs_finite = true;
  return plan;
}

// weight -> [group][output channel][channel][tap]
template <class T>
void pack_taps(const ConvPoolBackward<T>& call) {
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.weight_layout;
  Compute<T>* to = call.packed;
  for (int64_t o = 0; o < g.groups * g.out_channels; ++o) {
    for_each_tap(g, TapOrder::channels_first, [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
      to[o * g.depth() + k] =
          to_compute(call.weight[o * layout.n + c * layout.c + d * layout.d[0] + h * layout.d[1] + w * layout.d[2]]);
    });
  }
}

template <class T>
void unpack_taps(const ConvPoolBackward<T>& call, const Compute<T>* from, T* to, const ConvLayout& layout) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const int64_t channels = TapsScratch<C>::channels_together(g);
  const DotTiles tiles = DotTiles::of<C>(g, channels);
  for (int64_t i = 0; i < g.groups * g.out_channels; ++i) {
    const int64_t o = i % g.out_channels;
    const C* part = from + i / g.out_channels * weight_size_of_group<C>(g) + o / channels * tiles.total();
    const int64_t row = o % channels / tiles.rows, r = o % channels % tiles.rows;
    int64_t tile = 0;
    for_each_tap(g, TapOrder::channels_first, [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
      if (k == tiles.first_tap(tile + 1)) ++tile;
      const int64_t first = tiles.first_tap(tile), count = tiles.first_tap(tile + 1) - first;
      to[i * layout.n + c * layout.c + d * layout.d[0] + h * layout.d[1] + w * layout.d[2]] =
          from_compute<T>(part[(row * tiles.tap_tiles + tile) * tiles.size + r * count + k - first]);
    });
  }
}

template <class T>
void backward_taps(const ConvPoolBackward<T>& call, const ConvPoolPiece& piece, Compute<T>* grad_weight,
                   Compute<T>* lost, Compute<T>* grad_bias, void* scratch) {
  TapsBackwardWorker<T> worker(call, grad_weight != nullptr, scratch);
  backward_by_groups(worker, call, piece, grad_weight, lost, grad_bias);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
