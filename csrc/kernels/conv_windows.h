// Forward with consecutive windows in the vector's lanes, where windows share no conv pixel.
//
// A thread copies the input under a band of rows of windows into a tile in which elements a window's step apart lie
// side by side. So all conv pixels of a vector of windows are whole vectors, which are pooled in registers, and what
// comes out is a run of the output: nothing is transposed and no conv pixel is written. For few input channels, of
// which the copy costs little, and outputs with channels first.
#pragma once

#include "conv_windows_plan.h"

namespace fastnn {
namespace FASTNN_ISA {

// What all register tiles of a group have in common.
template <class C>
struct WindowProblem {
  const int64_t* offsets;  // [row of the window][depth]
  int64_t depth;
  int64_t rows;  // of a window, in all slices
  int64_t step;  // in the tile, from a conv pixel to its neighbour under the same window
  bool may_be_nan;
};

// The largest of the pixels of window rows from `row` on -> to [output channel][vector], larger than what is there if
// the row isn't the first.
template <bool may_be_nan, bool with_winners, bool is_first, int vectors, class C, int outputs, int pixels_of_vectors>
FASTNN_INLINE void pool_pixels(const Vec<C> (&total)[outputs][pixels_of_vectors], int64_t first_place, C* to,
                               int64_t to_step, Places<C>* winners) {
  using Place = typename IntegerOf<C>::Type;
#pragma GCC unroll 12
  for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      C* const at = to + o * to_step + v * kLanes<C>;
      // Later pixels are compared unrectified: above the rectified first one they are their own ReLU.
      Vec<C> best = is_first ? relu(total[o][v]) : load(at);
      Places<C> winner = {};
      if (with_winners && !is_first) winner = winners[o * vectors + v];
#pragma GCC unroll 4
      for (int p = 0; p < pixels_of_vectors / vectors; ++p) {
        if (is_first && p == 0) continue;
        const Vec<C> pixel = total[o][p * vectors + v];
        if (may_be_nan || with_winners) {
          const auto wins = may_be_nan ? (pixel > best) | (pixel != pixel) : pixel > best;
          best = wins ? pixel : best;
          if (with_winners) winner = wins ? Places<C>{} + static_cast<Place>(first_place + p) : winner;
        } else {
          best = larger_of(pixel, best);
        }
      }
      store(at, best);
      if (with_winners) winners[o * vectors + v] = winner;
    }
  }
}

// `tiles` register tiles of windows that follow one another: `rows` x `columns` conv pixels of each are computed
// together -> to [output channel][window]. winners may be null.
template <int rows, int columns, int outputs, class C>
FASTNN_SHARED void windows_run(const WindowProblem<C>& problem, const C* tile, const C* all_weights, const C* bias,
                               int64_t tiles, C* to, int64_t to_step, Places<C>* winners) {
  constexpr int vectors = window_vectors(rows * columns), pixels = rows * columns * vectors;
  const int64_t depth = problem.depth, step = problem.step;
  for (int64_t t = 0; t < tiles; ++t, tile += vectors * kLanes<C>, to += vectors * kLanes<C>) {
    // Where the output goes is asked for ahead: lines of several channels are more than the hardware foresees.
#pragma GCC unroll 12
    for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 2
      for (int v = 1; v <= vectors; ++v) __builtin_prefetch(to + o * to_step + v * kLanes<C> - 1, 1);
    }
    for (int64_t row = 0; row < problem.rows; row += rows) {
      const int64_t* offsets = problem.offsets + row * depth;
      const C* weight = all_weights;
      Vec<C> total[outputs][pixels];
#pragma GCC unroll 12
      for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 8
        for (int p = 0; p < pixels; ++p) total[o][p] = broadcast<C>(bias[o]);
      }
      sum_in_parts(depth, total, [&](int64_t k) __attribute__((always_inline)) {
        const auto value_of = [&](int p) __attribute__((always_inline)) {
          const C* at = tile + offsets[p / (columns * vectors) * depth + k];
          return load(at + p / vectors % columns * step + p % vectors * kLanes<C>);
        };
        if constexpr (outputs <= pixels) {
          Vec<C> factor[outputs];
#pragma GCC unroll 12
          for (int o = 0; o < outputs; ++o) factor[o] = broadcast<C>(weight[o]);
#pragma GCC unroll 8
          for (int p = 0; p < pixels; ++p) {
            const Vec<C> value = value_of(p);
#pragma GCC unroll 12
            for (int o = 0; o < outputs; ++o) total[o][p] = multiply_add(value, factor[o], total[o][p]);
          }
        } else {
          Vec<C> value[pixels];
#pragma GCC unroll 8
          for (int p = 0; p < pixels; ++p) value[p] = value_of(p);
#pragma GCC unroll 12
          for (int o = 0; o < outputs; ++o) {
            const Vec<C> factor = broadcast<C>(weight[o]);
#pragma GCC unroll 8
            for (int p = 0; p < pixels; ++p) total[o][p] = multiply_add(value[p], factor, total[o][p]);
          }
        }
        weight += outputs;
      });
      const int64_t place = row * columns;
      const auto pool = [&](auto is_first) __attribute__((always_inline)) {
        constexpr bool first = decltype(is_first)::value;
        if (winners) {
          problem.may_be_nan ? pool_pixels<true, true, first, vectors>(total, place, to, to_step, winners)
                             : pool_pixels<false, true, first, vectors>(total, place, to, to_step, winners);
        } else {
          problem.may_be_nan ? pool_pixels<true, false, first, vectors>(total, place, to, to_step, winners)
                             : pool_pixels<false, false, first, vectors>(total, place, to, to_step, winners);
        }
      };
      row == 0 ? pool(Constant<1>{}) : pool(Constant<0>{});
    }
  }
}

// `rows` runs of `count` elements, of which every `stride`-th is taken.
template <int stride, class T, class C>
FASTNN_SHARED void copy_rows(const T* from, int64_t from_step, int64_t rows, int64_t count, C* to, int64_t to_step) {
  for (int64_t i = 0; i < count; i += kLanes<C>) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* source = from + r * from_step + i * stride;
      Vec<C> value;
      if constexpr (stride == 1) {
        value = load_up_to<T>(source, count - i);
      } else {
        value = load_strided_up_to<stride>(source, (count - i - 1) * stride + 1);
      }
      store_up_to<C>(to + r * to_step + i, value, count - i);
    }
  }
}

template <class T>
class WindowsForward {
  using C = Compute<T>;

 public:
  WindowsForward(const ConvPoolForward<T>& call, void* memory)
      : call_(call),
        g_(call.geometry),
        shape_(call.geometry, call.plan.band),
        scratch_(call.geometry, call.plan, memory),
        problem_{scratch_.offsets, g_.depth(), g_.pool_kernel[0] * g_.pool_kernel[1], g_.stride[2] * shape_.column,
                 false} {
    fill_zeros(scratch_.tile, g_.in_channels * shape_.channel);
    for (int64_t row = 0; row < problem_.rows; ++row) {
      const int64_t slice = row / g_.pool_kernel[1] * g_.pool_dilation[0] * g_.stride[0];
      const int64_t height = row % g_.pool_kernel[1] * g_.pool_dilation[1] * g_.stride[1];
      for_each_tap(g_, TapOrder::channels_first, [&](int64_t k, int64_t c, int64_t d, int64_t h, int64_t w) {
        const int64_t y = height + h * g_.dilation[1];
        scratch_.offsets[row * problem_.depth + k] =
            c * shape_.channel + (slice + d * g_.dilation[0]) * shape_.slice + y % window_step(g_, 1) * shape_.phase +
            y / window_step(g_, 1) * g_.output[2] + w * g_.dilation[2] * shape_.column;
      });
    }
  }

  void run(int64_t item) {
    first_ = item % call_.plan.row_parts * call_.plan.band;
    item /= call_.plan.row_parts;
    count_ = smaller(call_.plan.band, g_.output[1] - first_) * g_.output[2];
    slice_ = item % g_.output[0];
    item /= g_.output[0];
    group_ = item % g_.groups;
    image_ = item / g_.groups;
    problem_.may_be_nan = !load_tile() || !weight_is_moderate();
    const auto run_all = [&](auto rows, auto columns) {
      constexpr int most = window_outputs(decltype(rows)::value * decltype(columns)::value);
      const int64_t blocks = divide_up(g_.out_channels, most);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = g_.out_channels * b / blocks, last = g_.out_channels * (b + 1) / blocks;
        with_constant<most>(static_cast<int>(last - first), [&](auto outputs) {
          run_block<decltype(rows)::value, decltype(columns)::value, decltype(outputs)::value>(first);
        });
      }
    };
    if (rows_together(g_) == 2) return run_all(Constant<2>{}, Constant<2>{});
    if (g_.pool_kernel[2] == 2) return run_all(Constant<1>{}, Constant<2>{});
    g_.pool_kernel[2] == 3 ? run_all(Constant<1>{}, Constant<3>{}) : run_all(Constant<1>{}, Constant<4>{});
  }

 private:
  // Returns whether all elements are moderate.
  bool load_tile() {
    const ConvLayout& layout = call_.input_layout;
    const T* image = call_.input + image_ * layout.n + group_ * g_.in_channels * layout.c;
    Vec<C> squares = {};
    for (int64_t c = 0; c < g_.in_channels; ++c) {
      for (int64_t d = 0; d < window_reach(g_, 0); ++d) {
        const int64_t z = slice_ * window_step(g_, 0) + d - g_.padding[0];
        const bool inside = z >= 0 && z < g_.input[0];
        C* to = scratch_.tile + c * shape_.channel + d * shape_.slice;
        for (int64_t phase = 0; phase < shape_.phases; ++phase, to += shape_.phase) {
          load_rows(inside ? image + c * layout.c + z * layout.d[0] : nullptr, phase, to);
          squares = add_squares(to, smaller(window_step(g_, 2), window_reach(g_, 2)) * shape_.column, squares);
        }
      }
    }
    return is_finite<C>(squares);
  }

  // Of an input slice, the rows that are `phase` from the first one under a window. Zeros for null.
  void load_rows(const T* slice, int64_t phase, C* to) {
    const ConvLayout& layout = call_.input_layout;
    const int64_t step = window_step(g_, 2), row_step = window_step(g_, 1), windows = g_.output[2];
    // Rows [top, bottom) of the tile are inside the input.
    const int64_t start = first_ * row_step + phase - g_.padding[1], room = g_.input[1] - start;
    const int64_t top =
        slice == nullptr ? shape_.rows : smaller(shape_.rows, start < 0 ? divide_up(-start, row_step) : 0);
    const int64_t bottom = larger(top, smaller(shape_.rows, room <= 0 ? 0 : divide_up(room, row_step)));
    for (int64_t place = 0; place < window_reach(g_, 2); ++place, to += shape_.column) {
      fill_zeros(to, top * windows);
      fill_zeros(to + bottom * windows, (shape_.rows - bottom) * windows);
      // So are windows [left, right) with what they find at this place. Beside them there are zeros since the
      // beginning.
      const int64_t first = place - g_.padding[2], columns = g_.input[2] - first;
      const int64_t left = smaller(windows, first < 0 ? divide_up(-first, step) : 0);
      const int64_t right = columns <= 0 ? left : larger(left, smaller(windows, divide_up(columns, step)));
      if (top == bottom || left == right) continue;
      const T* from = slice + (start + top * row_step) * layout.d[1] + (left * step + first) * layout.d[2];
      C* const target = to + top * windows + left;
      const int64_t stride = step * layout.d[2];
      const auto copy = [&](auto stride) {
        copy_rows<decltype(stride)::value>(from, row_step * layout.d[1], bottom - top, right - left, target, windows);
      };
      if (stride >= 1 && stride <= kMostStride) {
        with_constant<kMostStride>(static_cast<int>(stride), copy);
        continue;
      }
      for (int64_t r = 0; r < bottom - top; ++r) {
        copy_run(from + r * row_step * layout.d[1], stride, right - left, target + r * windows);
      }
    }
  }

  // The same of the group's weight and bias.
  bool weight_is_moderate() const {
    const int64_t first = group_ * g_.out_channels;
    Vec<C> squares = add_squares(call_.packed + first * problem_.depth, g_.out_channels * problem_.depth, Vec<C>{});
    if (call_.bias) squares = add_squares(call_.bias + first, g_.out_channels, squares);
    return is_finite<C>(squares);
  }

  template <int rows, int columns, int outputs>
  void run_block(int64_t first) {
    constexpr int64_t windows = window_vectors(rows * columns) * kLanes<C>;
    const int64_t channel = group_ * g_.out_channels + first;
    C bias[outputs] = {};
    for (int o = 0; o < outputs && call_.bias; ++o) bias[o] = to_compute(call_.bias[channel + o]);
    const C* weight = call_.packed + channel * problem_.depth;
    const ConvLayout& layout = call_.output_layout;
    const int64_t to = image_ * layout.n + channel * layout.c + slice_ * layout.d[0] + first_ * layout.d[1];
    int64_t done = 0;
    if constexpr (sizeof(T) == sizeof(C)) {
      if (layout.d[2] == 1 && !call_.winners) {
        const int64_t whole = count_ / windows;
        windows_run<rows, columns, outputs>(problem_, scratch_.tile, weight, bias, whole, call_.output + to, layout.c,
                                            nullptr);
        done = whole * windows;
      }
    }
    for (; done < count_; done += windows) {
      windows_run<rows, columns, outputs>(problem_, scratch_.tile + done, weight, bias, 1, scratch_.best, windows,
                                          call_.winners ? scratch_.winners : nullptr);
      const int64_t left = smaller(windows, count_ - done), at = to + done * layout.d[2];
      write(scratch_.best, windows, outputs, left, call_.output + at);
      if (!call_.winners) continue;
      write_winners(scratch_.best, scratch_.winners, outputs * windows / kLanes<C>, scratch_.winner_bytes);
      write(scratch_.winner_bytes, windows, outputs, left, call_.winners + at);
    }
  }

  // [output channel][window] of a register tile -> where they belong, `count` windows of each
  template <class From, class To>
  void write(const From* from, int64_t from_step, int64_t outputs, int64_t count, To* to) const {
    const ConvLayout& layout = call_.output_layout;
    if (layout.d[2] != 1) return transpose_matrix(from, from_step, outputs, count, to, layout.d[2]);
    for (int64_t o = 0; o < outputs; ++o) copy_out(from + o * from_step, count, to + o * layout.c);
  }

  const ConvPoolForward<T>& call_;
  const ConvPoolGeometry& g_;
  const WindowTile<C> shape_;
  const WindowScratch<C> scratch_;
  WindowProblem<C> problem_;
  int64_t image_, group_, slice_, first_, count_;  // of windows: the band's slice, its first row, all of them
};

template <class T>
void forward_windows(const ConvPoolForward<T>& call, int64_t first_item, int64_t last_item, void* scratch) {
  WindowsForward<T> worker(call, scratch);
  for (int64_t item = first_item; item < last_item; ++item) worker.run(item);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
