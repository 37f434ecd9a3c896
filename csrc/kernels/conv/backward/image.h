// Some channels of an image (blocks of them) and of its gradient as backward works on them: padded, [z][y][x][channel].
// Only a window of either is in memory, which moves along an axis. Each element is moved in once, and out once.
#pragma once

#include "sums.h"

namespace fastnn {
namespace FASTNN_ISA {

// The input is copied in elements E. bfloat16 stays bfloat16 where two of them are multiplied at once.
template <class T, class E = Compute<T>>
class ImageWindow {
  using C = Compute<T>;

 public:
  // Windows of up to `blocks` blocks; of the input only where `images_wanted`.
  ImageWindow(const ConvBackward<T>& call, int64_t blocks, bool images_wanted, Parts& memory)
      : call_(call), g_(call.geometry), plan_(call.plan->image) {
    const int64_t size = blocks * plan_.size;
    images_ = images_wanted ? memory.take<E>(size) : nullptr;
    gradients_ = call.grad_input ? memory.take<C>(size) : nullptr;
    parts_ = call.grad_input && call.plan->in_parts ? memory.take<C>(size) : nullptr;
    // The rows of a slice; where the window moves along the rows, those that it holds.
    const int64_t rows = plan_.axis == 1 ? smaller(g_.input[1], plan_.slices) : g_.input[1];
    rows_ = may_join_rows() ? memory.take<C>(rows * g_.input[2] * plan_.lanes) : nullptr;
  }

  // Goes along the axis over the conv pixels `pixels` of an image, for `channels` channels from `channel` on, and over
  // those before them that add to the same gradient of the input. Calls body(first, last, is_before) for the conv
  // pixels [first, last) that the windows serve at each place. Afterwards the gradient of the input's slices is
  // written, from the slice of the first conv pixel up to that of the next conv pixel behind `pixels`.
  template <class Body>
  void for_each_place(int64_t image, int64_t channel, int64_t channels, const Range& pixels, const Body& body) {
    const int axis = plan_.axis;
    const int64_t stride = g_.stride[axis];
    const int64_t before = gradients_ ? (g_.kernel_extent(axis) - 1) / stride : 0;
    const int64_t start = larger(0, pixels.first - before);
    image_ = image;
    channel_ = channel;
    channels_ = channels;
    blocks_ = divide_up(channels, plan_.lanes);
    written_ = {pixels.first * stride, pixels.last == g_.conv[axis] ? plan_.extent[axis] : pixels.last * stride};
    origin_ = start * stride;
    additions_ = 0;
    if (parts_) fill_zeros(parts_, blocks_ * plan_.size);
    advance(origin_, 0);
    for (int64_t pixel = start; pixel < pixels.first; pixel += plan_.step) {
      move_to(pixel * stride);
      body(pixel, smaller(pixel + plan_.step, pixels.first), true);
    }
    for (int64_t pixel = pixels.first; pixel < pixels.last; pixel += plan_.step) {
      move_to(pixel * stride);
      body(pixel, smaller(pixel + plan_.step, pixels.last), false);
    }
    close();
  }

  const E* image(int64_t block) const { return images_ + block * plan_.size; }
  // The memory that a block's part of the gradient is added to.
  C* gradient(int64_t block) const { return (parts_ ? parts_ : gradients_) + block * plan_.size; }
  // The caller says by this how often an element of the gradient has been added to, at most, since it said so last.
  void count_additions(int64_t additions) {
    additions_ += additions;
    if (additions_ >= kLongestSum) add_parts();
  }

 private:
  void add_parts() {
    if (parts_ && additions_ > 0) {
      for (int64_t i = 0; i < blocks_ * plan_.size; ++i) gradients_[i] += parts_[i];
      fill_zeros(parts_, blocks_ * plan_.size);
    }
    additions_ = 0;
  }

  // Windows that begin with the slice `origin`.
  void move_to(int64_t origin) {
    if (origin == origin_) return;
    add_parts();
    store(origin_, origin);
    advance(origin, origin_ + plan_.slices - origin);
  }

  // The gradients that are still in the window are written, and zeros where the kernel does not reach.
  void close() {
    add_parts();
    store(origin_, origin_ + plan_.slices);
    while (gradients_ && origin_ + plan_.slices < written_.last) {
      fill_zeros(gradients_, blocks_ * plan_.size);
      origin_ += plan_.slices;
      store(origin_, origin_ + plan_.slices);
    }
  }

  // The last `kept` slices become the first, those beyond are new.
  void advance(int64_t origin, int64_t kept) {
    const int64_t slice = plan_.d[plan_.axis], from = (origin - origin_) * slice, count = kept * slice;
    origin_ = origin;
    // A window that holds the whole image has the last image's elements where this one's go, and zeros beside them,
    // which zipping would have moved.
    const bool is_clean =
        __is_same(E, C) && kept <= 0 && channels_ == loaded_ && plan_.slices >= plan_.extent[plan_.axis];
    if (images_ && !is_clean) move_windows(images_, from, count);
    loaded_ = channels_;
    if (gradients_) move_windows(gradients_, from, count);
    if (images_) load(origin + kept, origin + plan_.slices);
  }
  template <class Element>
  void move_windows(Element* windows, int64_t from, int64_t count) const {
    for (int64_t block = 0; block < blocks_; ++block) {
      Element* window = windows + block * plan_.size;
      if (count > 0) __builtin_memmove(window, window + from, count * sizeof(Element));
      fill_zeros(window + count, plan_.size - count);
    }
  }

  // Whether rows are so short that those that follow each other in a tensor are transposed as one: of a transpose for
  // one row, most would be wasted. Windows of bfloat16 are ordered row by row (order_for_zip), so that they are left
  // out.
  bool may_join_rows() const { return __is_same(E, C) && plan_.axis < 2 && plan_.lanes > 1 && g_.input[2] < kLanes<C>; }
  // Whether that is so, and the rows of this tensor follow each other.
  bool joins_rows(const ConvLayout& layout) const {
    return rows_ && layout.d[2] == 1 && layout.c != 1 && layout.d[1] == g_.input[2];
  }

  // Calls body(offset in the tensor, offset in the windows, rows, columns) for the rows of the input in the slices
  // [first, last) of the image: for each, or once for those of a slice if they are joined.
  template <class Body>
  void for_each_row(const ConvLayout& layout, int64_t first, int64_t last, const Body& body) const {
    const int axis = plan_.axis;
    int64_t from[3] = {}, count[3] = {g_.input[0], g_.input[1], g_.input[2]};
    from[axis] = larger(0, first - g_.padding[axis]);
    count[axis] = smaller(g_.input[axis], last - g_.padding[axis]) - from[axis];
    if (count[axis] <= 0) return;
    int64_t start = 0, target = -origin_ * plan_.d[axis];
    for (int d = 0; d < 3; ++d) {
      start += from[d] * layout.d[d];
      target += (from[d] + g_.padding[d]) * plan_.d[d];
    }
    // Rows, then slices, without padding between them are one row.
    if (axis < 2 && plan_.extent[2] == g_.input[2]) {
      count[2] *= count[1];
      count[1] = 1;
      if (axis == 0 && plan_.extent[1] == g_.input[1]) {
        count[2] *= count[0];
        count[0] = 1;
      }
    }
    const int64_t rows = joins_rows(layout) ? count[1] : 1;
    for (int64_t z = 0; z < count[0]; ++z) {
      for (int64_t y = 0; y < count[1]; y += rows) {
        body(start + z * layout.d[0] + y * layout.d[1], target + z * plan_.d[0] + y * plan_.d[1], rows, count[2]);
      }
    }
  }

  // Calls body(block, its channels, offset of the first in the tensor) for each block.
  template <class Body>
  void for_each_block(const ConvLayout& layout, const Body& body) const {
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t first = block * plan_.lanes;
      body(block, smaller(plan_.lanes, channels_ - first), image_ * layout.n + (channel_ + first) * layout.c);
    }
  }

  void load(int64_t first, int64_t last) const {
    const ConvLayout& layout = call_.input_layout;
    const int64_t lanes = plan_.lanes;
    for_each_block(layout, [&](int64_t block, int64_t channels, int64_t start) {
      for_each_row(layout, first, last, [&](int64_t at, int64_t offset, int64_t rows, int64_t columns) {
        const T* from = call_.input + start + at;
        E* to = images_ + block * plan_.size + offset;
        if (rows > 1) {
          if (channels < lanes) fill_zeros(rows_, rows * columns * lanes);
          transpose_matrix(from, layout.c, channels, rows * columns, rows_, lanes);
          for (int64_t y = 0; y < rows; ++y)
            copy_run(rows_ + y * columns * lanes, columns * lanes, to + y * plan_.d[1]);
        } else if (layout.c != 1 && lanes > 1) {
          transpose_matrix(from, layout.c, channels, columns, to, lanes);
        } else if (layout.d[2] == lanes && channels == lanes) {
          copy_run(from, columns * lanes, to);
        } else if (lanes == 1) {
          for (int64_t x = 0; x < columns; ++x) to[x] = from_compute<E>(to_compute(from[x * layout.d[2]]));
        } else {
          for (int64_t x = 0; x < columns; ++x) copy_few(from + x * layout.d[2], channels, to + x * lanes);
        }
        if constexpr (!__is_same(E, C)) order_for_zip(to, columns * lanes);
      });
    });
  }

  void store(int64_t first, int64_t last) const {
    first = larger(first, written_.first);
    last = smaller(last, written_.last);
    if (!gradients_ || first >= last) return;
    const ConvLayout& layout = call_.grad_input_layout;
    const int64_t lanes = plan_.lanes;
    for_each_block(layout, [&](int64_t block, int64_t channels, int64_t start) {
      for_each_row(layout, first, last, [&](int64_t at, int64_t offset, int64_t rows, int64_t columns) {
        const C* from = gradients_ + block * plan_.size + offset;
        T* to = call_.grad_input + start + at;
        if (rows > 1) {
          for (int64_t y = 0; y < rows; ++y) {
            copy_run(from + y * plan_.d[1], columns * lanes, rows_ + y * columns * lanes);
          }
          transpose_matrix(rows_, lanes, rows * columns, channels, to, layout.c);
        } else if (layout.c != 1 && lanes > 1) {
          transpose_matrix(from, lanes, columns, channels, to, layout.c);
        } else if (layout.d[2] == lanes && channels == lanes) {
          copy_out(from, columns * lanes, to);
        } else if (lanes == 1) {
          for (int64_t x = 0; x < columns; ++x) to[x * layout.d[2]] = from_compute<T>(from[x]);
        } else {
          for (int64_t x = 0; x < columns; ++x) copy_out(from + x * lanes, channels, to + x * layout.d[2]);
        }
      });
    });
  }

  const ConvBackward<T>& call_;
  const ConvPoolGeometry& g_;
  const ImagePlan& plan_;
  E* images_;
  C* gradients_;
  C* rows_;   // of a slice's channels, [row][column][lane], where rows may be joined; or null
  C* parts_;  // as large as the gradients, where so much is added to these that it is added up in parts first; or null
  int64_t image_, channel_, channels_, blocks_, origin_;  // origin: the slice that the windows begin with
  Range written_;                                         // slices of the gradient that are written
  int64_t loaded_ = 0;                                    // channels that the windows of the input have
  int64_t additions_;                                     // to an element of the parts
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
