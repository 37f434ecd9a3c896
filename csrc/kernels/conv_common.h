// What the forward algorithms share around their tiles: parts of work and memory, the order of the packed weight,
// whether numbers are finite, the costs of copies, the copy of a box of the input, the way out.
#pragma once

#include "conv_elements.h"
#include "conv_pool_window.h"

namespace fastnn {
namespace FASTNN_ISA {

// Conv pixels of a register tile. Of a single vector of channels many: each takes a load of its own besides the row of
// the weight, the offset and what is asked for ahead, and loads are as many as multiply-adds in a cycle.
template <int vectors>
constexpr int kConvPixels = (FASTNN_VECTOR_BYTES == 64 ? 28 : 12) / vectors;
template <class C>
constexpr int64_t kBlockChannels = 2 * kLanes<C>;

FASTNN_INLINE int64_t round_up(int64_t a, int64_t multiple) {
  return divide_up(a, multiple) * multiple;
}

// Numbers of a packed weight for each element of its depth.
template <class E>
FASTNN_INLINE int64_t packed_width(int64_t out_channels) {
  return kSums<E> * round_up(out_channels, kLanes<Compute<E>>);
}

// Into how many parts the rows of each of `others` pieces of work are cut, of which every thread has an equal share: a
// part costs its rows, and `again` that are computed for its neighbour as well.
FASTNN_INLINE int64_t parts_of_rows(int64_t others, int64_t rows, double again, int64_t threads) {
  constexpr int64_t kEvenEnough = 16;  // pieces a thread
  constexpr double kWorthwhile = 0.98;
  if (threads == 1 || others >= kEvenEnough * threads) return 1;
  int64_t best = 1;
  double least = 0;
  for (int64_t parts = 1; parts <= smaller(rows, 4 * threads); ++parts) {
    const double share = static_cast<double>(divide_up(others * parts, threads));
    const double cost = share * (static_cast<double>(divide_up(rows, parts)) + again);
    if (parts > 1 && cost >= kWorthwhile * least) continue;
    least = cost;
    best = parts;
  }
  return best;
}

// Takes parts of a block of memory, each on a cache line.
class MemoryParts {
 public:
  explicit MemoryParts(void* memory) : base_(static_cast<char*>(memory)) {}

  template <class Element>
  Element* take(int64_t count) {
    char* part = base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(Element)), 64);
    return reinterpret_cast<Element*>(part);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Where an element of the weight stands in the depth of the product.
FASTNN_INLINE int64_t tap_position(const ConvPoolGeometry& g, TapOrder order, int64_t c, int64_t d, int64_t h,
                                   int64_t w) {
  const int64_t row = d * g.kernel[1] + h;
  switch (order) {
    case TapOrder::channels_last:
      return (row * g.kernel[2] + w) * g.in_channels + c;
    case TapOrder::rows_first:
      return (row * g.in_channels + c) * g.kernel[2] + w;
    case TapOrder::columns_first:
      return (w * g.kernel[0] * g.kernel[1] + row) * g.in_channels + c;
    default:
      return c * g.taps() + row * g.kernel[2] + w;
  }
}

// The same of the kernel's element numbered `tap`, and where that lies in the weight of a channel.
FASTNN_INLINE int64_t tap_position(const ConvPoolGeometry& g, TapOrder order, int64_t c, int64_t tap) {
  return tap_position(g, order, c, tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1],
                      tap % g.kernel[2]);
}
FASTNN_INLINE int64_t tap_offset(const ConvPoolGeometry& g, const ConvLayout& weight, int64_t tap) {
  return tap / (g.kernel[1] * g.kernel[2]) * weight.d[0] + tap / g.kernel[2] % g.kernel[1] * weight.d[1] +
         tap % g.kernel[2] * weight.d[2];
}

// Calls body(k, channel, kernel position) over the depth of the product.
template <class Body>
FASTNN_INLINE void for_each_tap(const ConvPoolGeometry& g, TapOrder order, const Body& body) {
  for (int64_t c = 0; c < g.in_channels; ++c) {
    for (int64_t d = 0; d < g.kernel[0]; ++d) {
      for (int64_t h = 0; h < g.kernel[1]; ++h) {
        for (int64_t w = 0; w < g.kernel[2]; ++w) body(tap_position(g, order, c, d, h, w), c, d, h, w);
      }
    }
  }
}

// The way out of scratch.
template <class C, class T>
FASTNN_INLINE void copy_out(const C* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<C>) store_up_to<T>(to + i, load_up_to<C>(from + i, count - i), count - i);
}
FASTNN_INLINE void copy_out(const uint8_t* from, int64_t count, uint8_t* to) {
  if (count > 0) __builtin_memcpy(to, from, count);
}

template <class C, class T>
FASTNN_INLINE void copy_one(C from, T* to) {
  *to = from_compute<T>(from);
}
FASTNN_INLINE void copy_one(uint8_t from, uint8_t* to) {
  *to = from;
}

// The weights of `count` output channels -> to (depth, width), the first `count` elements of each row.
template <class T>
void pack_taps(const ConvPoolGeometry& g, TapOrder order, const T* from, const ConvLayout& layout, int64_t count,
               Compute<T>* to, int64_t width) {
  constexpr int64_t numbers = 512, least = 8;  // of each output, at a time; outputs that are worth a transpose
  int64_t places[numbers];
  const int64_t taps = g.taps();
  const bool joined = layout.d[1] == layout.d[2] * g.kernel[2] && layout.d[0] == layout.d[1] * g.kernel[1];
  if (joined && layout.c == 1 && order == TapOrder::channels_last && layout.d[2] == g.in_channels) {
    return transpose_matrix(from, layout.n, count, g.depth(), to, width);
  }
  if (joined && layout.d[2] == 1 && order == TapOrder::channels_first && layout.c == taps) {
    return transpose_matrix(from, layout.n, count, g.depth(), to, width);
  }
  if (layout.c == 1 && (order == TapOrder::channels_last || order == TapOrder::columns_first)) {  // runs of channels
    // Short ones that follow one another, and leave a part of a vector over, some together.
    const bool shares = joined && layout.d[2] == g.in_channels && g.in_channels % kLanes<Compute<T>> != 0;
    const int64_t together = shares ? numbers / g.in_channels : 1;
    for (int64_t first = 0; first < taps; first += larger(together, 1)) {
      const T* run = from + tap_offset(g, layout, first);
      if (together <= 1) {
        transpose_matrix(run, layout.n, count, g.in_channels, to + tap_position(g, order, 0, first) * width, width);
        continue;
      }
      int64_t here = 0;
      for (int64_t tap = first; tap < smaller(first + together, taps); ++tap) {
        const int64_t position = tap_position(g, order, 0, tap);
        for (int64_t c = 0; c < g.in_channels; ++c) places[here++] = (position + c) * width;
      }
      transpose_to_places(run, layout.n, count, here, to, [&](int64_t number) { return places[number]; });
    }
    return;
  }
  if (joined && layout.d[2] == 1 && count >= least) {  // runs of taps, of all channels that follow one another
    const int64_t together = layout.c == taps ? g.in_channels : 1, run = together * taps;
    const int64_t size[4] = {g.in_channels, g.kernel[0], g.kernel[1], g.kernel[2]};
    for (int64_t c = 0; c < g.in_channels; c += together) {
      int64_t at[4] = {c};  // channel and tap
      for (int64_t first = 0; first < run; first += numbers) {
        const int64_t here = smaller(numbers, run - first);
        for (int64_t i = 0; i < here; ++i) {
          places[i] = tap_position(g, order, at[0], at[1], at[2], at[3]) * width;
          for (int d = 3; d >= 0 && ++at[d] == size[d] && d > 0; --d) at[d] = 0;
        }
        transpose_to_places(from + c * layout.c + first, layout.n, count, here, to,
                            [&](int64_t number) { return places[number]; });
      }
    }
    return;
  }
  for_each_tap(g, order, [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
    const T* element = from + c * layout.c + d * layout.d[0] + h * layout.d[1] + w * layout.d[2];
    for (int64_t o = 0; o < count; ++o) to[k * width + o] = to_compute(element[o * layout.n]);
  });
}

// total + the squares of a run's elements, scaled so that the sum is finite if and only if no element is NaN, infinite
// or so large that products of two such elements could add up to infinity.
template <class T, class C = Compute<T>>
FASTNN_INLINE Vec<C> add_squares(const T* run, int64_t count, Vec<C> total) {
  constexpr C scale = 1e4f;
  constexpr int64_t chains = 4;  // sums that need not wait for each other
  int64_t i = 0;
  if (count >= chains * kLanes<C>) {
    Vec<C> part[chains] = {};
    for (; i + chains * kLanes<C> <= count; i += chains * kLanes<C>) {
      for (int64_t p = 0; p < chains; ++p) {
        const Vec<C> value = load(run + i + p * kLanes<C>) * scale;
        part[p] = multiply_add(value, value, part[p]);
      }
    }
    total += (part[0] + part[1]) + (part[2] + part[3]);
  }
  for (; i < count; i += kLanes<C>) {
    const Vec<C> value = load_up_to<T>(run + i, count - i) * scale;
    total = multiply_add(value, value, total);
  }
  return total;
}
FASTNN_INLINE Vec<float> add_squares(const bfloat16x2* run, int64_t count, Vec<float> total) {
  return add_squares(reinterpret_cast<const bfloat16*>(run), 2 * count, total);
}
FASTNN_INLINE Vec<float> add_squares(const FourFloats* run, int64_t count, Vec<float> total) {
  return add_squares(run->channel, 4 * count, total);
}
FASTNN_INLINE Vec<float> add_squares(const FirstOfPair* run, int64_t count, Vec<float> total) {
  return add_squares(reinterpret_cast<const bfloat16*>(run), count, total);
}
template <class C>
FASTNN_INLINE bool is_finite(Vec<C> x) {
  const C sum = sum_lanes<C>(x);
  return sum - sum == 0;
}

// Whether the input's channels all fall into the same few sets of the cache.
FASTNN_INLINE bool channels_are_crowded(const ConvPoolGeometry& g, const ConvLayout& input, int64_t element) {
  constexpr int64_t kSetsApart = 2048, kFewChannels = 8;
  return input.c * element % kSetsApart == 0 && g.in_channels > kFewChannels;
}

// Whether a tile is of use: not where there is no padding, unless the input is read more than once, and widened each
// time or from few sets of the cache.
template <class T>
FASTNN_INLINE bool can_stay_in_place(const ConvPoolGeometry& g, const ConvLayout& input, bool read_once) {
  const bool padded = g.padding[0] > 0 || g.padding[1] > 0 || g.padding[2] > 0;
  const bool crowded = channels_are_crowded(g, input, sizeof(T));
  return !padded && (read_once || (sizeof(T) == sizeof(Compute<T>) && !crowded));
}

// What of L3, which processors and processes share, many images can count on.
constexpr int64_t kShareOfL3 = 6 << 20;

// What the cost rules count: vector multiply-adds. Copying the input into a tile costs this much an element, copied as
// it lies, with a small stride or one by one, and this much a run.
constexpr double kCopyCost = 0.25, kStridedCost = 0.6, kSingleCost = 2, kRunCost = 40;
FASTNN_INLINE double copy_cost(int64_t stride) {
  return stride == 1 ? kCopyCost : stride <= kMostStride ? kStridedCost : kSingleCost;
}

// Whether channels lie apart, in columns that vectors can pick.
FASTNN_INLINE bool can_be_turned(const ConvLayout& input) {
  return input.c != 1 && input.d[2] >= 1 && input.d[2] <= kMostStride;
}

// Of so many columns' channels brought into channels last: blocks of columns and channels, of which some are not full.
template <class T>
double turned_run_cost(const ConvLayout& input, int64_t channels, int64_t columns) {
  constexpr bool narrow = sizeof(T) == sizeof(bfloat16);
  constexpr int64_t kColumns = narrow ? 8 : kLanes<float>, kChannels = narrow ? 32 : kLanes<float>;
  constexpr double kPart = narrow ? 60 : 65;
  const double element = input.d[2] == 1 ? 0.45 : 0.7;  // picked from its run
  const double block = narrow ? 110 : element * kColumns * kChannels;
  const double blocks =
      static_cast<double>(divide_up(columns, kColumns)) * block + (columns % kColumns != 0 ? kPart : 0);
  return blocks * static_cast<double>(divide_up(channels, kChannels));
}

// Of `bytes` of an image whose columns lie apart: lines come of which parts are used, row by row.
template <class T>
double parted_lines_cost(const ConvPoolGeometry& g, const ConvLayout& input, int64_t bytes) {
  constexpr double kByte = sizeof(T) == sizeof(bfloat16) ? 0 : 0.12, kFarByte = 0.4;
  constexpr int64_t kNear = 4 << 20;
  const int64_t lines = bytes * input.d[2];
  if (input.d[2] == 1) return 0;
  return (kByte + (g.batch * lines > kNear ? kFarByte : 0)) * static_cast<double>(lines);
}

// Of a vector of windows, by the way that pool_row takes where only the values are wanted.
FASTNN_INLINE double window_cost(const ConvPoolGeometry& g) {
  constexpr double kPlace = 4, kAnyPlace = 12, kColumnStep = 3.5;
  const int64_t rows = g.pool_kernel[0] * g.pool_kernel[1];
  if (pools_columns(g, rows)) return kColumnStep * static_cast<double>(column_steps(g, rows));
  const bool few = rows <= kMostWindowSide && g.pool_kernel[2] <= kMostWindowSide;
  return (few ? kPlace : kAnyPlace) * static_cast<double>(g.places());
}

// A kernel's or an image's elements, dense with channels last.
FASTNN_INLINE ConvLayout dense_last(int64_t channels, const int64_t (&size)[3]) {
  const int64_t row = size[2] * channels, slice = size[1] * row;
  return {size[0] * slice, 1, {slice, row, channels}};
}

// Numbers of an image, of a group of its channels and of all.
FASTNN_INLINE int64_t group_size(const ConvPoolGeometry& g) {
  return g.in_channels * g.input[0] * g.input[1] * g.input[2];
}
FASTNN_INLINE int64_t image_size(const ConvPoolGeometry& g) {
  return g.groups * group_size(g);
}

FASTNN_INLINE int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// Of the input's pixels along one dimension, those that the kernel does not stride over.
FASTNN_INLINE double share_met(const ConvPoolGeometry& g, int d) {
  const int64_t apart = g.stride[d] / greatest_common_divisor(g.stride[d], g.dilation[d]);
  return static_cast<double>(smaller(apart, g.kernel[d])) / static_cast<double>(g.stride[d]);
}

// Of the input with its padding, along one dimension.
FASTNN_INLINE int64_t padded_extent(const ConvPoolGeometry& g, int d) {
  return g.input[d] + 2 * g.padding[d];
}

// A box of the input, zeros where it reaches beyond: [channel][slice][row][column], or with the channel innermost.
template <class C>
struct InputTile {
  C* data;
  int64_t first[3];  // the input's coordinates of its corner, possibly negative
  int64_t size[3];
  int64_t c, d[3];  // its strides
};

template <int stride, class T, class C>
FASTNN_SHARED void copy_strided(const T* from, int64_t count, C* to) {
  for (int64_t i = 0; i < count; i += kLanes<C>) {
    store_up_to<C>(to + i, load_strided_up_to<stride>(from + i * stride, (count - i - 1) * stride + 1), count - i);
  }
}
template <class T, class C>
FASTNN_INLINE void copy_run(const T* from, int64_t stride, int64_t count, C* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; i += kLanes<C>)
      store_up_to<C>(to + i, load_up_to<T>(from + i, count - i), count - i);
  } else if (stride == 2) {
    copy_strided<2>(from, count, to);
  } else if (stride == 3) {
    copy_strided<3>(from, count, to);
  } else if (stride == 4) {
    copy_strided<4>(from, count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = to_compute(from[i * stride]);
  }
}

template <class C>
FASTNN_INLINE void fill_zeros(C* to, int64_t count) {
  if (count > 0) __builtin_memset(to, 0, count * sizeof(C));
}

// `count` columns of a row of the input -> the tile's element `c` of each, or all elements where they lie inside, where
// it is `pixel` elements from one column to the next.
template <class T, class C>
FASTNN_INLINE void copy_columns(const T* from, const ConvLayout& layout, int64_t channels, bool channels_last,
                                int64_t c, int64_t count, C* to, int64_t pixel) {
  if (!channels_last) return copy_run(from + c * layout.c, layout.d[2], count, to);
  if (layout.d[2] == channels && pixel == channels) return copy_run(from, 1, count * channels, to);
  for (int64_t w = 0; w < count; ++w, to += pixel) {
    copy_run(from + w * layout.d[2], 1, channels, to);
    fill_zeros(to + channels, pixel - channels);
  }
}

// `from` is the input's (channel, slice, row, column) = 0 of the image and group, `elements` the tile's of a
// pixel, up to the next one.
template <class T, class C>
void fill_tile(const ConvPoolGeometry& g, const T* from, const ConvLayout& layout, bool channels_last, int64_t elements,
               const InputTile<C>& tile) {
  const int64_t left = smaller(tile.size[2], larger(0, -tile.first[2]));
  const int64_t right = larger(left, smaller(tile.size[2], g.input[2] - tile.first[2]));
  const int64_t runs = channels_last ? 1 : elements;
  const int64_t pixel = channels_last ? elements : 1;
  // Whole rows that follow one another, here as there, are one run.
  const bool joined = left == 0 && right == tile.size[2] && right == g.input[2] && tile.d[1] == right * pixel &&
                      layout.d[1] == right * layout.d[2];
  for (int64_t c = 0; c < runs; ++c) {
    for (int64_t d = 0; d < tile.size[0]; ++d) {
      for (int64_t h = 0; h < tile.size[1]; ++h) {
        C* to = tile.data + c * tile.c + d * tile.d[0] + h * tile.d[1];
        const int64_t slice = tile.first[0] + d, row = tile.first[1] + h;
        if (slice < 0 || slice >= g.input[0] || row < 0 || row >= g.input[1]) {
          fill_zeros(to, tile.size[2] * pixel);
          continue;
        }
        fill_zeros(to, left * pixel);
        fill_zeros(to + right * pixel, (tile.size[2] - right) * pixel);
        const T* source = from + slice * layout.d[0] + row * layout.d[1] + (tile.first[2] + left) * layout.d[2];
        if (joined) {
          const int64_t rows = smaller(tile.size[1] - h, g.input[1] - row);
          copy_columns(source, layout, g.in_channels, channels_last, c, rows * right, to, pixel);
          h += rows - 1;
          continue;
        }
        copy_columns(source, layout, g.in_channels, channels_last, c, right - left, to + left * pixel, pixel);
      }
    }
  }
}

// [pixel][pitch] -> `count` pooled pixels of an image from the one numbered `first` on, channels `channel` onwards
template <class T, class C>
void write_pixels(const ConvPoolForward<T>& call, int64_t image, int64_t channel, int64_t channels, int64_t first,
                  int64_t count, const C* from, const uint8_t* winners, int64_t pitch) {
  const ConvLayout& layout = call.output_layout;
  const int64_t to = image * layout.n + channel * layout.c + first * layout.d[2];
  if (layout.d[2] == 1) {
    transpose_matrix(from, pitch, count, channels, call.output + to, layout.c);
    if (call.winners) transpose_matrix(winners, pitch, count, channels, call.winners + to, layout.c);
    return;
  }
  for (int64_t x = 0; x < count; ++x) {
    copy_out(from + x * pitch, channels, call.output + to + x * layout.d[2]);
    if (call.winners) copy_out(winners + x * pitch, channels, call.winners + to + x * layout.d[2]);
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
