// Backward: only the winner of each window has a gradient, so the convolution's output gradient is a list of
// (value, place) entries and is never laid out in full.
//
// With L channels of the input side by side (a block), the elements under a conv pixel are a few runs, each of whole
// vectors. The weight's gradient for one output channel is the sum over its entries of value x runs of the input; the
// input's gradient at one conv pixel is the sum over its entries (one an output channel) of value x runs of the
// weight. Both sums are the same loop, with the runs accumulated in registers.
#pragma once

#include "conv_backward_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

template <class T>
class BackwardWorker {
  using C = Compute<T>;
  typedef uint8_t LaneBytes __attribute__((vector_size(kLanes<C>)));

 public:
  BackwardWorker(const ConvPoolBackward<T>& call, void* memory)
      : call_(call), g_(call.geometry), s_(run_shape<C>(call.geometry)), scratch_(call.geometry, memory) {
    for_each_run_tap(g_, s_, [&](int64_t run, int64_t element, int64_t d, int64_t h, int64_t w) {
      if (element != 0) return;
      scratch_.run_offsets[run] =
          d * g_.dilation[0] * s_.d[0] + h * g_.dilation[1] * s_.d[1] + w * g_.dilation[2] * s_.d[2];
    });
    for (int64_t i = 0; i < 256; ++i) scratch_.place_offsets[i] = 0;
    int64_t place = 0;
    for (int64_t d = 0; d < g_.pool_kernel[0]; ++d) {
      for (int64_t h = 0; h < g_.pool_kernel[1]; ++h) {
        for (int64_t w = 0; w < g_.pool_kernel[2]; ++w) {
          scratch_.place_offsets[place++] = conv_step(0, d * g_.pool_dilation[0]) +
                                            conv_step(1, h * g_.pool_dilation[1]) +
                                            conv_step(2, w * g_.pool_dilation[2]);
        }
      }
    }
  }

  // Blocks [first, last) of one group of an image.
  void run(int64_t image, int64_t group, int64_t first, int64_t last, C* grad_weight, C* grad_bias) {
    image_ = image;
    group_ = group;
    if (grad_bias && first == 0) add_bias_gradient(grad_bias + group * g_.out_channels);
    if (grad_weight) {
      for (int64_t block = first; block < last; ++block) load_image(block, scratch_.image + (block - first) * s_.image);
      C* to = grad_weight + (group * s_.blocks + first) * g_.out_channels * s_.row;
      for (int64_t p = 0; p < g_.pixels(); p += scratch_.pixels) {
        add_weight_gradient(p, smaller(p + scratch_.pixels, g_.pixels()), last - first, to);
      }
    }
    if (call_.grad_input) {
      fill_zeros(scratch_.image, (last - first) * s_.image);
      for (int64_t p = 0; p < g_.pixels(); p += scratch_.pixels) {
        add_input_gradient(p, smaller(p + scratch_.pixels, g_.pixels()), first, last);
      }
      for (int64_t block = first; block < last; ++block)
        store_image(block, scratch_.image + (block - first) * s_.image);
    }
  }

 private:
  int64_t conv_step(int d, int64_t conv) const { return conv * g_.stride[d] * s_.d[d]; }

  // Where the first tap of the first place of each window lies in the image (outside, if in the padding).
  void find_windows(int64_t first, int64_t last) {
    for (int64_t pixel = first; pixel < last; ++pixel) {
      const int64_t x = pixel % g_.output[2], y = pixel / g_.output[2] % g_.output[1];
      const int64_t z = pixel / g_.output[2] / g_.output[1];
      scratch_.window_starts[pixel - first] = conv_step(0, z * g_.pool_stride[0] - g_.pool_padding[0]) +
                                              conv_step(1, y * g_.pool_stride[1] - g_.pool_padding[1]) +
                                              conv_step(2, x * g_.pool_stride[2] - g_.pool_padding[2]);
    }
  }

  // Calls body(channel, pixel, winner, gradient) for a box of output channels and pooled pixels.
  template <class Body>
  FASTNN_INLINE void for_each_gradient(int64_t first_channel, int64_t last_channel, int64_t first, int64_t last,
                                       const Body& body) const {
    const ConvLayout& gl = call_.output_layout;
    const ConvLayout& wl = call_.winners_layout;
    for (int64_t o = first_channel; o < last_channel; ++o) {
      const int64_t channel = group_ * g_.out_channels + o;
      const T* gradients = call_.grad_output + image_ * gl.n + channel * gl.c;
      const uint8_t* winners = call_.winners + image_ * wl.n + channel * wl.c;
      for (int64_t pixel = first; pixel < last;) {
        const int64_t row = pixel / g_.output[2], x = pixel % g_.output[2];
        const int64_t y = row % g_.output[1], z = row / g_.output[1];
        const int64_t count = smaller(last - pixel, g_.output[2] - x);
        const T* from = gradients + z * gl.d[0] + y * gl.d[1] + x * gl.d[2];
        const uint8_t* winner = winners + z * wl.d[0] + y * wl.d[1] + x * wl.d[2];
        for (int64_t i = 0; i < count; ++i) {
          body(o, pixel + i, winner[i * wl.d[2]], to_compute(from[i * gl.d[2]]));
        }
        pixel += count;
      }
    }
  }

  void add_bias_gradient(C* to) const {
    const ConvLayout& gl = call_.output_layout;
    const ConvLayout& wl = call_.winners_layout;
    for (int64_t o = 0; o < g_.out_channels; ++o) {
      const int64_t channel = group_ * g_.out_channels + o;
      double total = 0;  // the longest sum of all
      for (int64_t row = 0; row < g_.output[0] * g_.output[1]; ++row) {
        const int64_t y = row % g_.output[1], z = row / g_.output[1];
        const T* from = call_.grad_output + image_ * gl.n + channel * gl.c + z * gl.d[0] + y * gl.d[1];
        const uint8_t* winner = call_.winners + image_ * wl.n + channel * wl.c + z * wl.d[0] + y * wl.d[1];
        Vec<C> lanes = {};
        C single = 0;
        int64_t x = 0;
        if (gl.d[2] == 1 && wl.d[2] == 1) {
          for (; x + kLanes<C> <= g_.output[2]; x += kLanes<C>) {
            LaneBytes bytes;
            __builtin_memcpy(&bytes, winner + x, sizeof(bytes));
            const Places<C> places = __builtin_convertvector(bytes, Places<C>);
            lanes += places == Places<C>{} + kDead ? Vec<C>{} : load(from + x);
          }
        }
        for (; x < g_.output[2]; ++x) {
          const C value = to_compute(from[x * gl.d[2]]);
          single += winner[x * wl.d[2]] == kDead ? C(0) : value;
        }
        total += single + sum_lanes<C>(lanes);
      }
      to[o] += static_cast<C>(total);
    }
  }

  void add_weight_gradient(int64_t first, int64_t last, int64_t blocks, C* to) {
    const int64_t slices = divide_up(last - first, scratch_.slice_pixels);
    // One bucket a (slice, channel), in that order.
    int32_t* starts = scratch_.starts;
    int32_t next = 0;
    find_windows(first, last);
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t from = first + slice * scratch_.slice_pixels;
      for (int64_t o = 0; o < g_.out_channels; ++o) {
        *starts++ = next;
        for_each_gradient(o, o + 1, from, smaller(from + scratch_.slice_pixels, last),
                          [&](int64_t, int64_t pixel, uint8_t place, C value) {
                            // Dead ones are written over: no branch to mispredict.
                            const int64_t offset =
                                scratch_.window_starts[pixel - first] + scratch_.place_offsets[place];
                            scratch_.entries[next] = {value, static_cast<int32_t>(offset)};
                            next += place != kDead;
                          });
      }
    }
    *starts = next;

    for (int64_t slice = 0; slice < slices; ++slice) {
      for (int64_t block = 0; block < blocks; ++block) {
        const C* image = scratch_.image + block * s_.image;
        C* block_to = to + block * g_.out_channels * s_.row;
        for_each_register_block(s_.runs, s_.vectors, [&](auto runs, auto vectors, int64_t run, int64_t vector) {
          for (int64_t o = 0; o < g_.out_channels; ++o) {
            const int32_t* bounds = scratch_.starts + slice * g_.out_channels + o;
            if (bounds[0] == bounds[1]) continue;
            add_runs<decltype(runs)::value, decltype(vectors)::value>(
                scratch_.entries + bounds[0], scratch_.entries + bounds[1], image + vector * kLanes<C>,
                scratch_.run_offsets + run, block_to + o * s_.row + (run * s_.vectors + vector) * kLanes<C>);
          }
        });
      }
    }
  }

  template <int runs, int vectors>
  FASTNN_INLINE void add_runs(const GradientEntry<C>* first, const GradientEntry<C>* last, const C* image,
                              const int64_t* run_offsets, C* to) const {
    const C* from[runs];
    Vec<C> total[runs][vectors] = {};
    for (int r = 0; r < runs; ++r) from[r] = image + run_offsets[r];
    accumulate_runs<runs, vectors>(first, last, from, total);
    for (int r = 0; r < runs; ++r) {
      for (int v = 0; v < vectors; ++v) {
        C* target = to + (r * s_.vectors + v) * kLanes<C>;
        store(target, load(target) + total[r][v]);
      }
    }
  }

  // Counting sort of the entries by (bucket of output channels, pixel, place), with one more place for
  // the dead ones: no branch to mispredict.
  void sort_entries(int64_t first, int64_t last) {
    const int64_t places = g_.places() + 1, pixels = last - first;
    const int64_t buckets = divide_up(g_.out_channels, scratch_.channels), keys = buckets * pixels * places;
    int32_t* starts = scratch_.starts;
    for (int64_t i = 0; i <= keys; ++i) starts[i] = 0;
    const auto for_each_key = [&](const auto& body) {
      for (int64_t bucket = 0; bucket < buckets; ++bucket) {
        int32_t* own = starts + bucket * pixels * places;
        const int64_t channel = bucket * scratch_.channels;
        for_each_gradient(channel, smaller(channel + scratch_.channels, g_.out_channels), first, last,
                          [&](int64_t o, int64_t pixel, uint8_t place, C value) {
                            const int64_t key = place == kDead ? places - 1 : place;
                            body(own[(pixel - first) * places + key], o, value);
                          });
      }
    };
    for_each_key([](int32_t& start, int64_t, C) { ++start; });
    int32_t total = 0;
    for (int64_t i = 0; i < keys; ++i) {
      const int32_t count = starts[i];
      starts[i] = total;
      total += count;
    }
    for_each_key([&](int32_t& start, int64_t o, C value) {
      scratch_.entries[start++] = {value, static_cast<int32_t>(o * s_.row)};
    });
    // Each start has moved to the next one's.
    for (int64_t i = keys; i > 0; --i) starts[i] = starts[i - 1];
    starts[0] = 0;
  }

  void add_input_gradient(int64_t first, int64_t last, int64_t first_block, int64_t last_block) {
    find_windows(first, last);
    sort_entries(first, last);
    const int64_t places = g_.places() + 1, pixels = last - first;
    for (int64_t bucket = 0; bucket < divide_up(g_.out_channels, scratch_.channels); ++bucket) {
      for (int64_t block = first_block; block < last_block; ++block) {
        const C* weight = call_.packed + (group_ * s_.blocks + block) * g_.out_channels * s_.row;
        C* image = scratch_.image + (block - first_block) * s_.image;
        for_each_register_block(s_.runs, s_.vectors, [&](auto runs, auto vectors, int64_t run, int64_t vector) {
          const int32_t* bounds = scratch_.starts + bucket * pixels * places;
          for (int64_t pixel = 0; pixel < pixels; ++pixel) {
            const int64_t start = scratch_.window_starts[pixel] + vector * kLanes<C>;
            for (int64_t place = 0; place < places; ++place, ++bounds) {
              if (place == places - 1 || bounds[0] == bounds[1]) continue;
              scatter_runs<decltype(runs)::value, decltype(vectors)::value>(
                  scratch_.entries + bounds[0], scratch_.entries + bounds[1],
                  weight + (run * s_.vectors + vector) * kLanes<C>, scratch_.run_offsets + run,
                  s_.length - vector * kLanes<C>, image + start + scratch_.place_offsets[place]);
            }
          }
        });
      }
    }
  }

  // `length`: the elements of a run from the first vector on.
  template <int runs, int vectors>
  FASTNN_INLINE void scatter_runs(const GradientEntry<C>* first, const GradientEntry<C>* last, const C* weight,
                                  const int64_t* run_offsets, int64_t length, C* to) const {
    const C* from[runs];
    Vec<C> total[runs][vectors] = {};
    for (int r = 0; r < runs; ++r) from[r] = weight + r * s_.vectors * kLanes<C>;
    accumulate_runs<runs, vectors>(first, last, from, total);
    for (int r = 0; r < runs; ++r) {
      C* target = to + run_offsets[r];
      for (int v = 0; v < vectors; ++v) {
        // The unused lanes are left alone: infinity times their zeros is NaN.
        const Vec<C> sum = load(target + v * kLanes<C>) + total[r][v];
        store_up_to<C>(target + v * kLanes<C>, sum, length - v * kLanes<C>);
      }
    }
  }

  void load_image(int64_t block, C* image) const {
    const int64_t first = block * s_.lanes, channels = smaller(s_.lanes, g_.in_channels - first);
    const ConvLayout& layout = call_.input_layout;
    const T* input = call_.input + image_ * layout.n + (group_ * g_.in_channels + first) * layout.c;
    fill_zeros(image, s_.image);
    for_each_image_row(layout, [&](int64_t from, int64_t to, int64_t count) {
      if (s_.lanes == 1) {
        copy_run(input + from, layout.d[2], count, image + to);
      } else if (layout.c == 1) {
        for (int64_t w = 0; w < count; ++w) {
          copy_run(input + from + w * layout.d[2], 1, channels, image + to + w * s_.lanes);
        }
      } else if (layout.d[2] == 1) {
        transpose_matrix(input + from, layout.c, channels, count, image + to, s_.lanes);
      } else {
        for (int64_t w = 0; w < count; ++w) {
          copy_run(input + from + w * layout.d[2], layout.c, channels, image + to + w * s_.lanes);
        }
      }
    });
  }

  void store_image(int64_t block, const C* image) const {
    const int64_t first = block * s_.lanes, channels = smaller(s_.lanes, g_.in_channels - first);
    const ConvLayout& layout = call_.grad_input_layout;
    T* output = call_.grad_input + image_ * layout.n + (group_ * g_.in_channels + first) * layout.c;
    for_each_image_row(layout, [&](int64_t to, int64_t from, int64_t count) {
      if (s_.lanes == 1 && layout.d[2] == 1) {
        copy_out(image + from, count, output + to);
      } else if (layout.c == 1) {
        for (int64_t w = 0; w < count; ++w) {
          for (int64_t c = 0; c < channels; c += kLanes<C>) {
            const Vec<C> value = load(image + from + w * s_.lanes + c);
            store_up_to<T>(output + to + w * layout.d[2] + c, value, channels - c);
          }
        }
      } else {
        transpose_matrix(image + from, s_.lanes, count, channels, output + to, layout.c);
      }
    });
  }

  // Calls body(offset in the tensor, offset in the image, columns) for the input's rows.
  template <class Body>
  FASTNN_INLINE void for_each_image_row(const ConvLayout& layout, const Body& body) const {
    const int64_t* first = g_.padding;
    for (int64_t z = 0; z < g_.input[0]; ++z) {
      for (int64_t y = 0; y < g_.input[1]; ++y) {
        body(z * layout.d[0] + y * layout.d[1],
             (z + first[0]) * s_.d[0] + (y + first[1]) * s_.d[1] + first[2] * s_.d[2], g_.input[2]);
      }
    }
  }

  const ConvPoolBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const RunShape s_;
  const BackwardScratch<C> scratch_;
  int64_t image_, group_;
};

template <class T>
void backward(const ConvPoolBackward<T>& call, int64_t first_image, int64_t last_image, int64_t first_block,
              int64_t last_block, Compute<T>* grad_weight, Compute<T>* grad_bias, void* scratch) {
  BackwardWorker<T> worker(call, scratch);
  const int64_t blocks = call.plan.channel_blocks;
  for (int64_t image = first_image; image < last_image; ++image) {
    for (int64_t block = first_block; block < last_block;) {
      const int64_t group = block / blocks, first = block % blocks;
      const int64_t count = smaller(blocks - first, last_block - block);
      worker.run(image, group, first, first + count, grad_weight, grad_bias);
      block += count;
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
