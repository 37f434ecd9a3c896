// Arrays of any strides: arithmetic, copies and reductions go through the dimensions of values in the longest runs that
// the formats allow.
#pragma once

#include <array>
#include <cmath>
#include <cstring>

#include "../kernels/conv/machine.h"
#include "../kernels/conv/problem.h"
#include "../kernels/elementwise.h"
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

constexpr double kCopyWork = 4;  // moving an element costs as much as so many floating-point operations

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
  if (source[last] == 1 && target[last] == 1) {
    return loops.for_each_run(1, kCopyWork, [&](const auto& at) {
      std::memcpy(to + at[1], from + at[0], static_cast<size_t>(length) * sizeof(T));
    });
  }
  if (last > 0 && target[last] == 1 && source[last - 1] == 1) {  // a transposition of matrices
    const auto& kernels = elementwise_kernels().get<T>();
    return loops.for_each_run(2, kCopyWork, [&](const auto& at) {
      kernels.transpose(from + at[0], source[last], length, loops.sizes[last - 1], to + at[1], target[last - 1]);
    });
  }
  loops.for_each_run(1, kCopyWork, [&](const auto& at) {
    for (int64_t i = 0; i < length; ++i) to[at[1] + i * target[last]] = from[at[0] + i * source[last]];
  });
}

// to = a op b, over arrays of these sizes and strides; an operand that is broadcast along a dimension has the stride 0
// there. The order of the dimensions is that of `to` in memory.
template <class T>
void combine_arrays(BinaryKind kind, const T* a, const Ints& a_strides, const T* b, const Ints& b_strides, T* to,
                    const Ints& to_strides, const Ints& sizes, const std::vector<size_t>& order) {
  const auto& kernels = elementwise_kernels().get<T>();
  const Loops<3> loops(sizes, {a_strides, b_strides, to_strides}, order);
  const size_t last = loops.sizes.size() - 1;
  const int64_t length = loops.sizes[last], a_step = loops.strides[0][last], b_step = loops.strides[1][last];
  loops.for_each_run(1, 1, [&](const auto& at) {
    // An operand of another format than the result lies across the run.
    const Scratch<T> a_run(a_step > 1 ? length : 0), b_run(b_step > 1 ? length : 0);
    const auto in_a_run = [length](const T* from, int64_t step, T* run) {
      if (step <= 1) return from;
      for (int64_t i = 0; i < length; ++i) run[i] = from[i * step];
      return static_cast<const T*>(run);
    };
    kernels.binary(kind, in_a_run(a + at[0], a_step, a_run.get()), std::min<int64_t>(a_step, 1),
                   in_a_run(b + at[1], b_step, b_run.get()), std::min<int64_t>(b_step, 1), length, to + at[2]);
  });
}

// to = from op number, or number op from, for `count` elements.
template <class T>
void combine_with_number(BinaryKind kind, const T* from, const T& number, bool reverses, int64_t count, T* to) {
  const auto& kernels = elementwise_kernels().get<T>();
  parallel_range(count, 1, [&](int64_t first, int64_t last) {
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

// The strides of a value where it is broadcast to `rank` dimensions: 0 along those in which it has one element.
inline Ints broadcast_strides(const ValueType& value, size_t rank) {
  const Ints own = value.strides();
  Ints strides(rank, 0);
  const size_t ahead = rank - own.size();
  for (size_t d = 0; d < own.size(); ++d) strides[ahead + d] = value.sizes[d] == 1 ? 0 : own[d];
  return strides;
}

}  // namespace fastnn
