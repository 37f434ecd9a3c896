// The input of some channels (a block) as backward works on it, and its gradient: padded, [z][y][x][channel]. Only a
// window of either is in memory, which moves along the first dimension that is not one.
#pragma once

#include "conv_common.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int64_t kWindowBytes = 384 << 10;  // part of L2
constexpr int64_t kPixelsAhead = 16;         // whose channels, some of many, are asked for before they are copied

struct BlockImage {
  int64_t lanes;      // channels
  int64_t phases;     // columns that many apart lie side by side
  int64_t extent[3];  // of the whole image: the padding before, and all that either the kernel or the input reaches to
  int64_t d[3];       // strides, the last one between the columns of a phase
  int64_t phase;      // stride
  int axis;           // along which the window moves
  int64_t step;       // conv pixels along the axis that the window serves at a place
  int64_t slices;     // of the window, along the axis
  int64_t size;       // elements of the window

  // A dilated kernel meets columns of one phase, so that `by_phases` makes a row of it one run. `unit`: what `step` is
  // a multiple of. `count` windows are to fit kWindowBytes if they can, and `slack` elements are to follow each.
  BlockImage(const ConvPoolGeometry& g, int64_t lanes, bool by_phases, int64_t element_bytes, const int64_t (&unit)[3],
             int64_t count, int64_t slack)
      : lanes(lanes), phases(by_phases && g.kernel[2] > 1 ? g.dilation[2] : 1), axis(2) {
    for (int i = 2; i >= 0; --i) {
      extent[i] = larger((g.conv[i] - 1) * g.stride[i] + g.kernel_extent(i), g.padding[i] + g.input[i]);
      if (extent[i] > 1) axis = i;
    }
    d[2] = lanes;
    phase = lanes * divide_up(extent[2], phases);
    d[1] = phase * phases;
    d[0] = d[1] * extent[1];
    step = g.conv[axis];
    slices = extent[axis];
    const int64_t slice_bytes = larger(1, count * d[axis] * element_bytes);
    if (moves() && slice_bytes * slices > kWindowBytes) {
      const int64_t overlap = larger(0, g.kernel_extent(axis) - g.stride[axis]);
      const int64_t fit = (kWindowBytes / slice_bytes - overlap) / g.stride[axis] / unit[axis] * unit[axis];
      step = smaller(step, larger(unit[axis], fit));
      slices = step * g.stride[axis] + overlap;
    }
    const int64_t row = phases == 1 ? slices * lanes : d[1];
    size = round_up((axis == 2 ? row : slices * d[axis]) + slack, 16);
  }

  bool moves() const { return axis < 2 || phases == 1; }
  // Conv pixels, before one on the axis, under which there are slices that begin with that one's.
  int64_t pixels_before(const ConvPoolGeometry& g) const { return (g.kernel_extent(axis) - 1) / g.stride[axis]; }

  int64_t column(int64_t x) const { return phases == 1 ? x * lanes : x % phases * phase + x / phases * lanes; }

  // Calls body(offset in the tensor, offset in the window, columns) for what of the input lies in the slices
  // [first, last) of the image, in a window that begins with the slice `origin`.
  template <class Body>
  void for_each_row(const ConvPoolGeometry& g, const ConvLayout& layout, int64_t origin, int64_t first, int64_t last,
                    const Body& body) const {
    int64_t from[3] = {}, count[3];
    for (int i = 0; i < 3; ++i) count[i] = g.input[i];
    from[axis] = larger(0, first - g.padding[axis]);
    count[axis] = smaller(g.input[axis], last - g.padding[axis]) - from[axis];
    if (count[axis] <= 0) return;
    const int64_t start = from[0] * layout.d[0] + from[1] * layout.d[1];
    const int64_t target = (from[0] + g.padding[0]) * d[0] + (from[1] + g.padding[1]) * d[1] - origin * d[axis];
    // Rows, then slices, that follow each other in both are one row.
    if (axis < 2 && phases == 1 && extent[2] == g.input[2] && layout.d[1] == layout.d[2] * g.input[2]) {
      count[2] *= count[1];
      count[1] = 1;
      if (axis == 0 && extent[1] == g.input[1] && layout.d[0] == layout.d[1] * g.input[1]) {
        count[2] *= count[0];
        count[0] = 1;
      }
    }
    for (int64_t z = 0; z < count[0]; ++z) {
      for (int64_t y = 0; y < count[1]; ++y) {
        for (int64_t f = 0; f < phases; ++f) {
          const int64_t x = from[2] + (f + phases - (from[2] + g.padding[2]) % phases) % phases;
          if (x >= from[2] + count[2]) continue;
          body(start + z * layout.d[0] + y * layout.d[1] + x * layout.d[2],
               target + z * d[0] + y * d[1] + column(x + g.padding[2]), divide_up(from[2] + count[2] - x, phases));
        }
      }
    }
  }
};

// The windows of some blocks of an image, one behind the other, and of their gradients.
// Those of the input consist of elements E.
template <class T, class E = Compute<T>>
class ImageWindow {
  using C = Compute<T>;

 public:
  // Without `images` or `gradients` where the one or the other is not wanted. `parts`, as large as the gradients, where
  // so much is added to each of those that it is added up in parts first; else null.
  ImageWindow(const ConvPoolBackward<T>& call, const BlockImage& shape, E* images, C* gradients, C* parts)
      : call_(call),
        g_(call.geometry),
        shape_(shape),
        images_(images),
        gradients_(gradients),
        parts_(gradients ? parts : nullptr) {}

  // `channels` of an image from the one numbered `channel` on; the windows begin with the conv pixel `pixel`. Of the
  // gradient, what belongs to the conv pixels [first, last) is written: the slices up to those of the next one.
  void open(int64_t image, int64_t channel, int64_t channels, int64_t pixel, int64_t first, int64_t last) {
    const int axis = shape_.axis;
    image_ = image;
    channel_ = channel;
    channels_ = channels;
    blocks_ = divide_up(channels, shape_.lanes);
    first_ = first == 0 ? 0 : first * g_.stride[axis];
    last_ = last == g_.conv[axis] ? shape_.extent[axis] : last * g_.stride[axis];
    origin_ = pixel * g_.stride[axis];
    additions_ = 0;
    if (parts_) fill_zeros(parts_, blocks_ * shape_.size);
    advance(origin_, 0);
  }

  // To the conv pixels from the one numbered `first` on.
  void move_to(int64_t first) {
    const int64_t origin = first * g_.stride[shape_.axis];
    if (origin == origin_) return;
    add_parts();
    store(origin_, origin);
    const int64_t kept = origin_ + shape_.slices - origin;
    advance(origin, kept);
  }

  // The gradients that are still in the window are written, and zeros where the kernel does not reach.
  void close() {
    add_parts();
    store(origin_, origin_ + shape_.slices);
    while (gradients_ && origin_ + shape_.slices < last_) {
      fill_zeros(gradients_, blocks_ * shape_.size);
      origin_ += shape_.slices;
      store(origin_, origin_ + shape_.slices);
    }
  }

  // For the conv pixels `pixels` along the axis, and those before that have a part in their gradient of the input:
  // calls body(first, last, is_before) for the conv pixels [first, last) that the windows serve at each place.
  template <class Body>
  void for_each_place(int64_t image, int64_t channel, int64_t channels, const Range& pixels, const Body& body) {
    const int64_t before = gradients_ ? shape_.pixels_before(g_) : 0, start = larger(0, pixels.first - before);
    open(image, channel, channels, start, pixels.first, pixels.last);
    for (int64_t pixel = start; pixel < pixels.first; pixel += shape_.step) {
      move_to(pixel);
      body(pixel, smaller(pixel + shape_.step, pixels.first), true);
    }
    for (int64_t pixel = pixels.first; pixel < pixels.last; pixel += shape_.step) {
      move_to(pixel);
      body(pixel, smaller(pixel + shape_.step, pixels.last), false);
    }
    close();
  }

  const E* image(int64_t block) const { return images_ + block * shape_.size; }
  // Where to add to the gradient.
  C* gradient(int64_t block) const { return (parts_ ? parts_ : gradients_) + block * shape_.size; }
  // To be told how often an element of the gradient has been added to, at most.
  void count_additions(int64_t additions) {
    additions_ += additions;
    if (additions_ >= kLongestSum) add_parts();
  }

 private:
  // Whether transposing by squares of lanes is less than moving each element.
  static bool fill_squares(int64_t channels, int64_t columns) {
    return smaller(channels, kLanes<C>) * smaller(columns, kLanes<C>) > kLanes<C> * kLanes<C> / 4;
  }

  void add_parts() {
    if (parts_ && additions_ > 0) {
      for (int64_t i = 0; i < blocks_ * shape_.size; ++i) gradients_[i] += parts_[i];
      fill_zeros(parts_, blocks_ * shape_.size);
    }
    additions_ = 0;
  }

  // The last `kept` slices become the first, those beyond are new.
  void advance(int64_t origin, int64_t kept) {
    const int64_t slice = shape_.d[shape_.axis], from = (origin - origin_) * slice, count = kept * slice;
    origin_ = origin;
    if (images_) move_windows(images_, from, count);
    if (gradients_) move_windows(gradients_, from, count);
    if (images_) load(origin + kept, origin + shape_.slices);
  }
  template <class Element>
  void move_windows(Element* windows, int64_t from, int64_t count) const {
    for (int64_t block = 0; block < blocks_; ++block) {
      Element* window = windows + block * shape_.size;
      if (count > 0) __builtin_memmove(window, window + from, count * sizeof(Element));
      fill_zeros(window + count, shape_.size - count);
    }
  }

  void load(int64_t first, int64_t last) const {
    const ConvLayout& layout = call_.input_layout;
    const int64_t step = layout.d[2] * shape_.phases, lanes = shape_.lanes;
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t channels = smaller(lanes, channels_ - block * lanes);
      const T* input = call_.input + image_ * layout.n + (channel_ + block * lanes) * layout.c;
      shape_.for_each_row(g_, layout, origin_, first, last, [&](int64_t at, int64_t offset, int64_t columns) {
        const T* from = input + at;
        E* to = images_ + block * shape_.size + offset;
        if (lanes == 1) {
          copy_run(from, step, columns, to);
        } else if (layout.c == 1 && step == lanes && channels == lanes) {
          copy_run(from, 1, columns * lanes, to);
        } else if (layout.c != 1 && (step == 1 || (step <= kMostStride && fill_squares(channels, columns)))) {
          transpose_strided(from, layout.c, step, channels, columns, to, lanes);
        } else {
          for (int64_t x = 0; x < columns; ++x) {
            __builtin_prefetch(from + (x + kPixelsAhead) * step);
            copy_run(from + x * step, layout.c, channels, to + x * lanes);
          }
        }
        if constexpr (kZipsRuns<E>) order_for_zip(to, columns * lanes);
      });
    }
  }

  void store(int64_t first, int64_t last) const {
    first = larger(first, first_);
    last = smaller(last, last_);
    if (!gradients_ || first >= last) return;
    const ConvLayout& layout = call_.grad_input_layout;
    const int64_t step = layout.d[2] * shape_.phases, lanes = shape_.lanes;
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t channels = smaller(lanes, channels_ - block * lanes);
      T* output = call_.grad_input + image_ * layout.n + (channel_ + block * lanes) * layout.c;
      shape_.for_each_row(g_, layout, origin_, first, last, [&](int64_t at, int64_t offset, int64_t columns) {
        const C* from = gradients_ + block * shape_.size + offset;
        T* to = output + at;
        if (lanes == 1 && step == 1) {
          copy_out(from, columns, to);
        } else if (layout.c == 1 && step == lanes && channels == lanes) {
          copy_out(from, columns * lanes, to);
        } else if (layout.c == 1) {
          for (int64_t x = 0; x < columns; ++x) {
            __builtin_prefetch(to + (x + kPixelsAhead) * step, 1);
            copy_out(from + x * lanes, channels, to + x * step);
          }
        } else if (step == 1) {
          transpose_matrix(from, lanes, columns, channels, to, layout.c);
        } else if (step == 2 && fill_squares(channels, columns)) {
          transpose_to_every_second(from, lanes, columns, channels, to, layout.c);
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            for (int64_t x = 0; x < columns; ++x) to[c * layout.c + x * step] = from_compute<T>(from[x * lanes + c]);
          }
        }
      });
    }
  }

  const ConvPoolBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const BlockImage& shape_;
  E* images_;
  C* gradients_;
  C* parts_;
  int64_t image_, channel_, channels_, blocks_, origin_;  // origin: the slice that the windows begin with
  int64_t first_, last_;                                  // slices of the gradient that are written
  int64_t additions_;                                     // to an element of the parts
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
