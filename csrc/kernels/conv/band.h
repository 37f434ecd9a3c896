// A band, the piece of output that a thread works on at a time, and the scratch memory it takes.
#pragma once

#include "../gemm.h"
#include "problem.h"

namespace fastnn {
namespace FASTNN_ISA {

FASTNN_INLINE int64_t round_up(int64_t a, int64_t multiple) {
  return divide_up(a, multiple) * multiple;
}

// Hands out parts of a block of memory, each of which begins on a cache line.
class Parts {
 public:
  explicit Parts(void* memory) : begin_(reinterpret_cast<uintptr_t>(memory)), next_(begin_) {}
  template <class Element>
  Element* take(int64_t count) {
    Element* part = reinterpret_cast<Element*>(next_);
    next_ += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(Element)), 64));
    return part;
  }
  int64_t bytes_taken() const { return static_cast<int64_t>(next_ - begin_); }

 private:
  // Addresses as numbers, since null, which stands for memory that is only measured, has no bytes behind it.
  const uintptr_t begin_;
  uintptr_t next_;
};

// A part of the output that is computed at a time, and the parts of the convolution and the input under it.
struct Band {
  int64_t image, images;  // the first, and how many
  int64_t group;
  int64_t slice;              // pooled
  int64_t row, rows;          // pooled: the first, and how many
  int64_t column, columns;    // pooled
  int64_t part;               // of the output channels
  int64_t conv[3], input[3];  // the first conv pixel and input pixel, which may be padding
};

// The item'th band of the plan: images outermost, parts of the output channels innermost.
inline Band band_of(const ConvPoolGeometry& g, const BandPlan& plan, int64_t parts, int64_t item) {
  Band band;
  const auto next = [&](int64_t count) {
    const int64_t at = item % count;
    item /= count;
    return at;
  };
  band.part = next(parts);
  const int64_t column_band = next(plan.column_bands), row_band = next(plan.row_bands);
  band.slice = next(g.output[0]);
  band.group = next(g.groups);
  band.image = item * plan.images;
  band.images = smaller(plan.images, g.batch - band.image);
  band.row = row_band * plan.rows;
  band.rows = smaller(plan.rows, g.output[1] - band.row);
  band.column = column_band * plan.columns;
  band.columns = smaller(plan.columns, g.output[2] - band.column);
  const int64_t first[3] = {band.slice, band.row, band.column};
  for (int d = 0; d < 3; ++d) {
    band.conv[d] = first[d] * g.pool_stride[d] - g.pool_padding[d];
    band.input[d] = band.conv[d] * g.stride[d] - g.padding[d];
  }
  return band;
}

// Sets [first, last) to the share of `count` blocks that belongs to part `part` of `parts`.
FASTNN_INLINE void part_of(int64_t count, int64_t part, int64_t parts, int64_t& first, int64_t& last) {
  first = count * part / parts;
  last = count * (part + 1) / parts;
}

// The conv rows that windows still need, in a ring buffer (RingPlan).
template <class C>
class Ring {
 public:
  Ring(const RingPlan& plan, C* memory, int64_t* tags) : plan_(plan), memory_(memory), tags_(tags) {}

  void forget() const {
    for (int64_t i = 0; i < plan_.slices * plan_.rows; ++i) tags_[i] = -1;
  }
  C* slot(int64_t z, int64_t y) const { return memory_ + index(z, y) * plan_.row_size; }
  bool holds(const ConvPoolGeometry& g, int64_t z, int64_t y) const { return tags_[index(z, y)] == z * g.conv[1] + y; }
  void mark(const ConvPoolGeometry& g, int64_t z, int64_t y) const { tags_[index(z, y)] = z * g.conv[1] + y; }
  int64_t row(int64_t slot) const { return tags_[slot]; }  // z * conv[1] + y of the row it holds, or -1
  C* all() const { return memory_; }
  const RingPlan& plan() const { return plan_; }

 private:
  int64_t index(int64_t z, int64_t y) const { return z % plan_.slices * plan_.rows + y % plan_.rows; }

  const RingPlan& plan_;
  C* memory_;
  int64_t* tags_;
};

}  // namespace FASTNN_ISA
}  // namespace fastnn
