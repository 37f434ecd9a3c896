// Arrays of any strides: arithmetic, copies and reductions go through the dimensions of values in the longest runs that
// the formats allow.
#pragma once

#include <array>
#include <cmath>
#include <cstring>

#include "../kernels/conv/machine.h"
#include "../kernels/conv/problem.h"
#include "../kernels/elementwise.h"
#include "../ops/mlp_by_layers.h"
#include "../ops/product.h"
#include "layer.h"

namespace fastnn {

// The sizes and the strides of `count` arrays, from the outermost dimension to the innermost. Neighbouring dimensions
// that can be treated as one are joined.
template <size_t count>
struct Loops {
  Ints sizes;
  std::array<Ints, count> strides;

  // `order`: the dimensions from the outermost to the innermost.
  Loops(const Ints& all_sizes, const std::array<Ints, count>& all_strides, const std::vector<size_t>& order) {
    for (const size_t d : order) {
      if (all_sizes[d] == 1) continue;
      bool joins = !sizes.empty();
      for (size_t a = 0; a < count && joins; ++a) joins = strides[a].back() == all_strides[a][d] * all_sizes[d];
      if (joins) {
        sizes.back() *= all_sizes[d];
        for (size_t a = 0; a < count; ++a) strides[a].back() = all_strides[a][d];
      } else {
        sizes.push_back(all_sizes[d]);
        for (size_t a = 0; a < count; ++a) strides[a].push_back(all_strides[a][d]);
      }
    }
    if (sizes.empty()) {
      sizes.push_back(1);
      for (size_t a = 0; a < count; ++a) strides[a].push_back(1);
    }
  }

  // Calls body(offsets) for each run of the innermost `inner` dimensions, in parallel where `work` operations an
  // element make that worth it.
  template <class Body>
  void for_each_run(size_t inner, double work, const Body& body) const {
    const size_t outer = sizes.size() - inner;
    int64_t runs = 1, length = 1;
    for (size_t d = 0; d < sizes.size(); ++d) (d < outer ? runs : length) *= sizes[d];
    parallel_range(runs, work * static_cast<double>(length), [&](int64_t first, int64_t last) {
      for (int64_t run = first; run < last; ++run) {
        std::array<int64_t, count> offsets{};
        int64_t left = run;
        for (size_t d = outer; d-- > 0;) {
          const int64_t at = left % sizes[d];
          left /= sizes[d];
          for (size_t a = 0; a < count; ++a) offsets[a] += at * strides[a][d];
        }
        body(offsets);
      }
    });
  }

  // Calls body(offsets, rows, length) for blocks of about `most` elements: of `rows` whole runs of the innermost
  // dimension, which are neighbours along the next dimension, or of one piece of a run.
  template <class Body>
  void for_each_block(int64_t most, double work, const Body& body) const {
    const size_t last = sizes.size() - 1;
    const int64_t run = sizes[last], rows = last > 0 ? sizes[last - 1] : 1;
    const int64_t length = std::min(run, most), together = std::min(rows, std::max<int64_t>(1, most / run));
    const int64_t pieces = (run + length - 1) / length, cuts = (rows + together - 1) / together;
    int64_t outer = 1;
    for (size_t d = 0; d + 1 < last; ++d) outer *= sizes[d];
    const auto each = [&](int64_t item) {
      const int64_t first = item % pieces * length, row = item / pieces % cuts * together;
      std::array<int64_t, count> offsets{};
      int64_t left = item / pieces / cuts;
      for (size_t d = last; d-- > 1;) {
        for (size_t a = 0; a < count; ++a) offsets[a] += left % sizes[d - 1] * strides[a][d - 1];
        left /= sizes[d - 1];
      }
      for (size_t a = 0; a < count; ++a) {
        offsets[a] += first * strides[a][last] + (last > 0 ? row * strides[a][last - 1] : 0);
      }
      body(offsets, std::min(together, rows - row), std::min(length, run - first));
    };
    parallel_range(outer * cuts * pieces, work * static_cast<double>(together * length),
                   [&](int64_t first, int64_t last_item) {
                     for (int64_t item = first; item < last_item; ++item) each(item);
                   });
  }
};

// Dimensions in the order in which a value lies in memory.
inline std::vector<size_t> memory_order(size_t rank, bool channels_last) {
  std::vector<size_t> order;
  for (size_t d = 0; d < rank; ++d) {
    if (!channels_last || d != 1) order.push_back(d);
  }
  if (channels_last) order.push_back(1);
  return order;
}

constexpr double kCopyWork = 4;   // moving an element costs as much as so many floating-point operations
constexpr int64_t kBlock = 1024;  // elements that are moved or computed together, in L1

// to = from, over arrays of these sizes and strides. The order of the dimensions is that of `to` in memory.
template <class T>
void copy_array(const T* from, const Ints& from_strides, T* to, const Ints& to_strides, const Ints& sizes,
                const std::vector<size_t>& order) {
  for (const int64_t size : sizes) {
    if (size == 0) return;
  }
  const Loops<2> loops(sizes, {from_strides, to_strides}, order);
  const Ints &source = loops.strides[0], &target = loops.strides[1];
  const size_t last = loops.sizes.size() - 1;
  const int64_t length = loops.sizes[last];
  const auto& kernels = elementwise_kernels().get<T>();
  if (source[last] == 1 && target[last] == 1) {
    return loops.for_each_block(kBlock, kCopyWork, [&](const auto& at, int64_t rows, int64_t some) {
      const size_t d = last > 0 ? last - 1 : 0;
      kernels.copy_runs(from + at[0], source[d], rows, some, to + at[1], target[d]);
    });
  }
  if (last > 0 && target[last] == 1 && source[last - 1] == 1) {  // a transposition of matrices
    return loops.for_each_run(2, kCopyWork, [&](const auto& at) {
      kernels.transpose(from + at[0], source[last], length, loops.sizes[last - 1], to + at[1], target[last - 1]);
    });
  }
  loops.for_each_run(1, kCopyWork, [&](const auto& at) {
    for (int64_t i = 0; i < length; ++i) to[at[1] + i * target[last]] = from[at[0] + i * source[last]];
  });
}

// An operand of combine_arrays: an array, and an activation of its elements. The stride is 0 along a dimension along
// which the operand is broadcast.
template <class T>
struct Operand {
  const T* from;
  Ints strides;
  Activation activation = kIdentity;

  bool is_activated() const { return activation.kind != ActivationKind::identity; }
};

constexpr int64_t kShortRun = 64;  // elements; so few take less time to be copied than a call of a kernel does

// Returns a block's elements of an operand one behind the other: in their own memory if they lie so there, else copied
// to `block` (kBlock elements). step: elements from a row to the next. within: elements from one element of a row to
// the next, which is 1, or 0 where one element stands for the whole row.
template <class T>
const T* elements_of_block(const Operand<T>& operand, int64_t offset, int64_t step, int64_t within, int64_t rows,
                           int64_t length, T* block) {
  const T* from = operand.from + offset;
  if (within == 0) {
    for (int64_t row = 0; row < rows; ++row) std::fill_n(block + row * length, length, from[row * step]);
    from = block;
  } else if (rows > 1 && step != length) {
    elementwise_kernels().get<T>().copy_runs(from, step, rows, length, block, length);
    from = block;
  }
  if (!operand.is_activated()) return from;
  mlp_kernels().elementwise.get<T>().activate(operand.activation, from, block, rows * length);
  return block;
}

// to = activation(a op b), over arrays of these sizes and strides. The order of the dimensions is that of `to`, which
// is dense, in memory.
template <class T>
void combine_arrays(BinaryKind kind, const Operand<T>& a, const Operand<T>& b, const Activation& activation, T* to,
                    const Ints& to_strides, const Ints& sizes, const std::vector<size_t>& order) {
  for (const int64_t size : sizes) {
    if (size == 0) return;
  }
  const auto& kernels = elementwise_kernels().get<T>();
  const auto& mlp = mlp_kernels().elementwise.get<T>();
  const Loops<3> loops(sizes, {a.strides, b.strides, to_strides}, order);
  const size_t last = loops.sizes.size() - 1;
  const int64_t length = loops.sizes[last], a_step = loops.strides[0][last], b_step = loops.strides[1][last];
  const bool activates = a.is_activated() || b.is_activated(), finishes = activation.kind != ActivationKind::identity;
  const double work = activates || finishes ? kActivationWork : kCopyWork;
  const bool is_short = last > 0 && length < kShortRun && a_step <= 1 && b_step <= 1;
  if ((a_step == 1 && b_step == 1) || is_short) {
    const size_t d = last > 0 ? last - 1 : 0;
    return loops.for_each_block(kBlock, work, [&](const auto& at, int64_t rows, int64_t some) {
      const Scratch<T> a_block(kBlock), b_block(kBlock);
      const T* const left = elements_of_block(a, at[0], loops.strides[0][d], a_step, rows, some, a_block.get());
      const T* const right = elements_of_block(b, at[1], loops.strides[1][d], b_step, rows, some, b_block.get());
      kernels.binary(kind, left, 1, right, 1, rows * some, to + at[2]);
      if (finishes) mlp.activate(activation, to + at[2], to + at[2], rows * some);
    });
  }
  if (activates) {  // an operand that is broadcast, or lies across the result
    int64_t elements = 1;
    for (const int64_t size : sizes) elements = checked_product(elements, size);
    const Scratch<T> whole(checked_product(2, elements));
    Operand<T> dense[2] = {a, b};
    for (int i = 0; i < 2; ++i) {
      if (!dense[i].is_activated()) continue;
      T* const copy = whole.get() + i * elements;
      copy_array(dense[i].from, dense[i].strides, copy, to_strides, sizes, order);
      activate(dense[i].activation, copy, elements, copy);
      dense[i] = {copy, to_strides};
    }
    return combine_arrays(kind, dense[0], dense[1], activation, to, to_strides, sizes, order);
  }
  loops.for_each_run(1, work, [&](const auto& at) {
    // An operand of another format than the result lies across the run.
    const Scratch<T> a_run(a_step > 1 ? length : 0), b_run(b_step > 1 ? length : 0);
    const auto in_a_run = [length](const T* from, int64_t step, T* run) {
      if (step <= 1) return from;
      for (int64_t i = 0; i < length; ++i) run[i] = from[i * step];
      return static_cast<const T*>(run);
    };
    kernels.binary(kind, in_a_run(a.from + at[0], a_step, a_run.get()), std::min<int64_t>(a_step, 1),
                   in_a_run(b.from + at[1], b_step, b_run.get()), std::min<int64_t>(b_step, 1), length, to + at[2]);
    if (finishes) mlp.activate(activation, to + at[2], to + at[2], length);
  });
}

// to = condition is not 0 ? a : b, over arrays of these sizes and strides. The order of the dimensions is that of `to`,
// which is dense, in memory.
template <class T>
void choose_arrays(const std::array<const T*, 3>& from, const std::array<Ints, 3>& strides, T* to,
                   const Ints& to_strides, const Ints& sizes, const std::vector<size_t>& order) {
  for (const int64_t size : sizes) {
    if (size == 0) return;
  }
  const auto& kernels = elementwise_kernels().get<T>();
  const Loops<4> loops(sizes, {strides[0], strides[1], strides[2], to_strides}, order);
  const int64_t length = loops.sizes.back();
  loops.for_each_run(1, kCopyWork, [&](const auto& at) {
    std::array<const T*, 3> runs;
    std::array<int64_t, 3> steps;
    const Scratch<T> copies(3 * length);
    for (size_t i = 0; i < 3; ++i) {
      const int64_t step = loops.strides[i].back();
      runs[i] = from[i] + at[i];
      steps[i] = std::min<int64_t>(step, 1);
      if (step <= 1) continue;
      T* const copy = copies.get() + static_cast<int64_t>(i) * length;  // of elements that lie across the run
      for (int64_t e = 0; e < length; ++e) copy[e] = runs[i][e * step];
      runs[i] = copy;
    }
    kernels.where(runs[0], runs[1], runs[2], steps.data(), length, to + at[3]);
  });
}

// to = from op number, or number op from, for `count` elements.
template <class T>
void combine_with_number(BinaryKind kind, const T* from, const T& number, bool reverses, int64_t count, T* to) {
  const auto& kernels = elementwise_kernels().get<T>();
  parallel_range(count, kCopyWork, [&](int64_t first, int64_t last) {
    const T *const a = reverses ? &number : from + first, *const b = reverses ? from + first : &number;
    kernels.binary(kind, a, reverses ? 0 : 1, b, reverses ? 1 : 0, last - first, to + first);
  });
}

// How long it takes to move a value that is cut along a dimension, in multiply-adds of vectors. The value is moved in
// runs; a run has the elements of that dimension and of all dimensions inside it.
template <class T>
double moving_cost(const ValueType& value, size_t dim) {
  constexpr double kRun = 8;  // what a run takes in addition to its elements
  int64_t length = 1;
  bool inside = false;
  for (const size_t d : memory_order(value.sizes.size(), value.channels_last())) {
    inside = inside || d == dim;
    if (inside) length *= std::max<int64_t>(value.sizes[d], 1);
  }
  const double lanes = static_cast<double>(conv_kernels().get<T>().machine.vector_bytes) / sizeof(T);
  const double count = static_cast<double>(value.count()), runs = count / static_cast<double>(length);
  return runs * (kRun + std::ceil(static_cast<double>(length) / lanes) * tuned::kCopy);
}

// Sizes as torch broadcasts them. Raises where they do not go together.
inline Ints broadcast_sizes(const Ints& a, const Ints& b) {
  Ints result = a.size() >= b.size() ? a : b;
  const Ints& other = a.size() >= b.size() ? b : a;
  const size_t ahead = result.size() - other.size();
  for (size_t d = 0; d < other.size(); ++d) {
    int64_t& size = result[ahead + d];
    FASTNN_CHECK(size == other[d] || size == 1 || other[d] == 1, "sizes ", to_string(a), " and ", to_string(b),
                 " cannot be broadcast");
    if (size == 1) size = other[d];
  }
  return result;
}

// The strides of an array that is broadcast to `rank` dimensions: 0 along those in which it has one element.
template <class Numbers>
Ints broadcast_strides(const Numbers& own, const Numbers& sizes, size_t rank) {
  Ints strides(rank, 0);
  const size_t ahead = rank - own.size();
  for (size_t d = 0; d < own.size(); ++d) strides[ahead + d] = sizes[d] == 1 ? 0 : own[d];
  return strides;
}
inline Ints broadcast_strides(const ValueType& value, size_t rank) {
  return broadcast_strides(value.strides(), value.sizes, rank);
}

}  // namespace fastnn
