// Backward of small kernels over few input channels, without strides: with pixels in the lanes every vector is full,
// and the products of all pixels, two for each element of the depth, are cheaper than what it takes to list those with
// a gradient.
//
// The pixels of the gradient's band are numbered as those of the padded input, so that each tap meets the input's
// pixels from a fixed distance on: those at the end of a row, which only the padded input has, have no gradient.
// Elements must be finite, since infinity times those zeros would be NaN.
#pragma once

#include "image.h"
#include "pixel_band.h"

namespace fastnn {
namespace FASTNN_ISA {

// The sums over a band's pixels, [output channel][pixel].
template <class C>
class TapSums {
 public:
  TapSums(const TapsPlan& plan, Parts& memory) : s_(plan) {
    products_ = memory.take<C>(s_.depth * s_.pass);
    offsets_ = memory.take<int64_t>(s_.depth);
  }

  int64_t* offsets() const { return offsets_; }

  FASTNN_SHARED void add_weight_gradient(const C* band, int64_t channels, const C* image, int64_t pixels, bool fresh,
                                         C* to, C* lost) const {
    constexpr int choices = kLanes<C> >= 4 ? 3 : 2;  // of 1, 2 and 4 rows
    with_constant<choices>(static_cast<int>(s_.rows / 2 + 1), [&](auto choice) {
      constexpr int rows = 1 << (decltype(choice)::value - 1);
      for (int64_t o = 0; o < channels; o += rows) {
        for (int64_t tile = 0; tile < s_.tap_tiles; ++tile) {
          const int64_t first = s_.first_tap(tile), taps = s_.first_tap(tile + 1) - first;
          const int64_t at = (o / rows * s_.tap_tiles + tile) * s_.tile_size;
          with_constant<most_dot_taps(FASTNN_VECTOR_REGISTERS)>(static_cast<int>(taps), [&](auto columns) {
            add_dots<rows, decltype(columns)::value>(band, o, channels, image, offsets_ + first, pixels, fresh, to + at,
                                                     lost ? lost + at : nullptr);
          });
        }
      }
    });
  }

  // Multiplies the output's gradients by each tap's weights, and adds the products, which are summed over the output
  // channels, to the input's gradient at the tap's offset.
  FASTNN_SHARED void add_input_gradient(const C* band, const C* weight, int64_t channels, int64_t pixels, C* to) const {
    const int64_t depth = s_.depth, pass = s_.pass;
    for (int64_t first = 0; first < pixels; first += pass) {
      const int64_t count = smaller(pass, pixels - first);
      for_each_tile<C>(depth, count, false, [&](auto rows, auto vectors, int64_t row, int64_t column, int last) {
        Vec<C> total[decltype(rows)::value][decltype(vectors)::value];
        multiply_tile(channels, weight + row, 1, depth, band + first + column, s_.step, kLanes<C>, total);
        store_tile<decltype(rows)::value, decltype(vectors)::value, C>(total, last, products_ + row * pass + column,
                                                                       pass, [](Vec<C> x, int) { return x; });
      });
      for (int64_t row = 0; row < depth; ++row) {
        const C* from = products_ + row * pass;
        C* target = to + first + offsets_[row];
        for (int64_t p = 0; p < count; p += kLanes<C>) store(target + p, load(target + p) + load(from + p));
      }
    }
  }

 private:
  // Rows beyond the channels repeat the last.
  template <int rows, int columns>
  void add_dots(const C* band, int64_t o, int64_t channels, const C* image, const int64_t* offsets, int64_t pixels,
                bool fresh, C* to, C* lost) const {
    constexpr int lanes = kLanes<C>, vectors = (rows * columns + lanes - 1) / lanes;
    const C* left[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) left[r] = band + smaller(o + r, channels - 1) * s_.step;
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

  const TapsPlan& s_;
  C* products_;       // [channel of the input and tap][pixel of a pass]
  int64_t* offsets_;  // of each channel and tap in the windows
};

template <class T>
class TapsWorker {
  using C = Compute<T>;

 public:
  TapsWorker(const ConvBackward<T>& call, bool weight_wanted, Parts& memory)
      : call_(call),
        g_(call.geometry),
        s_(call.plan->taps),
        window_(call, g_.in_channels, weight_wanted, memory),
        band_(call, memory.take<C>(s_.channels * s_.step)),
        sums_(s_, memory) {
    bias_ = memory.take<double>(g_.out_channels);
  }

  // Computes the offset of each tap. It is called once the scratch memory exists.
  void prepare() {
    for (int64_t k = 0; k < s_.depth; ++k) {
      const int64_t tap = k % g_.taps(), row = tap / g_.kernel[2];
      sums_.offsets()[k] = k / g_.taps() * call_.plan->image.size +
                           band_.number_of(row / g_.kernel[1] * g_.dilation[0], row % g_.kernel[1] * g_.dilation[1],
                                           tap % g_.kernel[2] * g_.dilation[2]);
    }
  }

  // A group of an image, the conv pixels `pixels` along the axis. `fresh`: there is nothing yet in grad_weight.
  void run(int64_t image, int64_t group, const Range& pixels, bool fresh, C* grad_weight, C* lost, double* grad_bias) {
    image_ = image;
    group_ = group;
    fill_zeros(bias_, g_.out_channels);
    window_.for_each_place(image, group * g_.in_channels, g_.in_channels, pixels,
                           [&](int64_t pixel, int64_t past, bool is_before) {
                             if (is_before) return run_window(pixel, past, false, nullptr, nullptr, nullptr);
                             run_window(pixel, past, fresh && pixel == pixels.first, grad_weight, lost, grad_bias);
                           });
    if (grad_bias) add_bias(bias_, g_.out_channels, grad_bias + group * g_.out_channels);
  }

 private:
  // The conv pixels [first, last) along the axis that the window moves along.
  void run_window(int64_t first, int64_t last, bool fresh, C* grad_weight, C* lost, double* grad_bias) {
    for (int64_t channel = 0; channel < g_.out_channels; channel += s_.channels) {
      const int64_t channels = smaller(s_.channels, g_.out_channels - channel);
      bool is_fresh = fresh;
      for_each_band(g_, call_.plan->band, call_.plan->image.axis, first, last, [&](const ConvBox& box) {
        const int64_t count = band_.span(box), pixels = round_up(count, kLanes<C>);
        const int64_t start = band_.first_of(box) - first * call_.plan->image.d[call_.plan->image.axis];
        for (int64_t o = 0; o < channels; ++o) {
          band_.fill(image_, group_ * g_.out_channels + channel + o, box, o);
          if (grad_bias) bias_[channel + o] += band_.sum(o, count);
        }
        if (grad_weight) {
          const int64_t at = channel / s_.channels * s_.size();
          sums_.add_weight_gradient(band_.channel(0), channels, window_.image(0) + start, pixels, is_fresh,
                                    grad_weight + at, lost ? lost + at : nullptr);
        }
        is_fresh = false;
        if (call_.grad_input) {
          const C* weight = call_.packed + (group_ * g_.out_channels + channel) * g_.depth();
          sums_.add_input_gradient(band_.channel(0), weight, channels, pixels, window_.gradient(0) + start);
          window_.count_additions(g_.taps());
        }
      });
    }
  }

  const ConvBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const TapsPlan& s_;
  ImageWindow<T> window_;
  PixelBand<T> band_;
  const TapSums<C> sums_;
  double* bias_;  // of each output channel
  int64_t image_, group_;
};

// Calls body(place in the depth, where that lies in the weight of an output channel).
template <class Body>
FASTNN_INLINE void for_each_weight(const ConvPoolGeometry& g, const ConvLayout& layout, const Body& body) {
  for (int64_t c = 0; c < g.in_channels; ++c) {
    for (int64_t tap = 0; tap < g.taps(); ++tap) body(c * g.taps() + tap, c * layout.c + tap * layout.d[2]);
  }
}

// weight -> [group][output channel][channel][tap]
template <class T>
void pack_taps(const ConvBackward<T>& call) {
  const ConvPoolGeometry& g = call.geometry;
  for (int64_t o = 0; o < g.groups * g.out_channels; ++o) {
    for_each_weight(g, call.weight_layout, [&](int64_t k, int64_t at) {
      call.packed[o * g.depth() + k] = to_compute(call.weight[o * call.weight_layout.n + at]);
    });
  }
}

template <class T>
void unpack_taps(const ConvBackward<T>& call, const Compute<T>* from, T* to, const ConvLayout& layout) {
  const ConvPoolGeometry& g = call.geometry;
  const TapsPlan& s = call.plan->taps;
  const int64_t group_size = call.plan->weight_size / g.groups;
  for (int64_t i = 0; i < g.groups * g.out_channels; ++i) {
    const int64_t o = i % g.out_channels, row = o % s.channels / s.rows, r = o % s.channels % s.rows;
    const Compute<T>* part = from + i / g.out_channels * group_size + o / s.channels * s.size();
    int64_t tile = 0;
    for_each_weight(g, layout, [&](int64_t k, int64_t at) {
      if (k == s.first_tap(tile + 1)) ++tile;
      const int64_t first = s.first_tap(tile), count = s.first_tap(tile + 1) - first;
      to[i * layout.n + at] = from_compute<T>(part[(row * s.tap_tiles + tile) * s.tile_size + r * count + k - first]);
    });
  }
}

template <class T>
void backward_taps(const ConvBackward<T>& call, const ConvBackwardPiece& piece, Compute<T>* grad_weight,
                   Compute<T>* lost, double* grad_bias, void* scratch) {
  Parts memory(scratch);
  TapsWorker<T> worker(call, grad_weight != nullptr, memory);
  worker.prepare();
  const int64_t size = call.plan->weight_size / call.plan->blocks;
  const Range pixels = pixels_of(call, piece);
  for (int64_t image = piece.first_image; image < piece.last_image; ++image) {
    for (int64_t group = piece.first_block; group < piece.last_block; ++group) {
      worker.run(image, group, pixels, image == piece.first_image, grad_weight ? grad_weight + group * size : nullptr,
                 lost ? lost + group * size : nullptr, grad_bias);
    }
  }
  if (grad_weight && lost) add_lost(call, piece, grad_weight, lost);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
