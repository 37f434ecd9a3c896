// What the winners' algorithm multiplies: lists of gradients that are not zero, and runs, the elements of the input
// under a conv pixel or of the weight of an output channel (WinnersPlan).
#pragma once

#include "image.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kMostRuns = 4;        // the most runs that are summed at once
constexpr int kMostRunVectors = 6;  // the most vectors of each run
constexpr int kMostAccumulators = FASTNN_VECTOR_REGISTERS * 3 / 4;

// Offsets as wide as the elements.
template <class C>
using Offset = typename IntegerOf<C>::Type;

// Whether elements E of two runs are multiplied by two gradients in one instruction: their runs are zipped with each
// other on the way, and two vectors of sums belong to each vector of theirs.
template <class E>
constexpr bool kZips = !__is_same(E, Compute<E>);

// Gradients that are not zero, and where the runs of each, of elements E, begin.
template <class E>
struct GradientList {
  const E* values;
  const Offset<Compute<E>>* offsets;
  int64_t count;
};

// Room for a list of each of `width` output channels, cut into slices: what is not zero in its gradient.
template <class E>
struct ChannelLists {
  using C = Compute<E>;

  // `entries`: the most that a list has. append_nonzero writes a whole vector behind its end.
  ChannelLists(int64_t entries, int64_t slices, int64_t width, Parts& memory)
      : room(entries + kLanes<C>),
        width(width),
        values(memory.take<E>(room * width)),
        offsets(memory.take<Offset<C>>(room * width)),
        starts(memory.take<int64_t>((slices + 1) * width)) {}

  // One slice that has no entries.
  int64_t make_empty() const {
    fill_zeros(starts, 2 * width);
    return 1;
  }

  const int64_t room, width;
  E* const values;
  Offset<C>* const offsets;
  int64_t* const starts;  // [slice][channel]: where the slice begins; at last, where the list ends
};

// Where the elements under the first conv pixel of row (z, y) begin in the window of the input that begins with the
// conv pixel `origin` along its axis.
FASTNN_INLINE int64_t place_of_row(const ConvPoolGeometry& g, const ImagePlan& image, int64_t origin, int64_t z,
                                   int64_t y) {
  const int axis = image.axis;
  return z * g.stride[0] * image.d[0] + y * g.stride[1] * image.d[1] - origin * g.stride[axis] * image.d[axis];
}

// total[r][v] += sum over the list of value x the v-th vector of the r-th run
template <int runs, int vectors, class C>
FASTNN_INLINE void accumulate_runs(const GradientList<C>& list, const C* const (&from)[runs],
                                   Vec<C> (&total)[runs][vectors]) {
  for (int64_t i = 0; i < list.count; ++i) {
    const Vec<C> value = broadcast<C>(list.values[i]);
    const int64_t offset = list.offsets[i];
#pragma GCC unroll 4
    for (int r = 0; r < runs; ++r) {
#pragma GCC unroll 6
      for (int v = 0; v < vectors; ++v) total[r][v] += value * load(from[r] + offset + v * kLanes<C>);
    }
  }
}

#if defined(FASTNN_HAS_PAIRS)
// Adds the products of two entries of the list, whose values lie side by side in `values`, or of one entry.
template <bool has_second, int runs, int vectors>
FASTNN_INLINE void accumulate_zipped(Vec<float> values, const bfloat16* const (&from)[runs], int64_t first,
                                     int64_t second, Vec<float> (&total)[runs][vectors]) {
#pragma GCC unroll 4
  for (int r = 0; r < runs; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v += 2) {
      const bfloat16* run = from[r] + v * kLanes<float>;
      Vec<float> x = load(reinterpret_cast<const bfloat16x2*>(run + first)), y = {};
      if (has_second) y = load(reinterpret_cast<const bfloat16x2*>(run + second));
      keep_in_register(x);
      keep_in_register(y);
      total[r][v] = multiply_add_pairs(values, zip_quarters_low(x, y), total[r][v]);
      total[r][v + 1] = multiply_add_pairs(values, zip_quarters_high(x, y), total[r][v + 1]);
    }
  }
}
template <int runs, int vectors>
FASTNN_INLINE void accumulate_runs(const GradientList<bfloat16>& list, const bfloat16* const (&from)[runs],
                                   Vec<float> (&total)[runs][vectors]) {
  const int64_t even = list.count / 2 * 2;
  for (int64_t i = 0; i < even; i += 2) {
    accumulate_zipped<true, runs, vectors>(broadcast_pair({list.values[i], list.values[i + 1]}), from, list.offsets[i],
                                           list.offsets[i + 1], total);
  }
  if (even < list.count) {
    accumulate_zipped<false, runs, vectors>(broadcast_pair({list.values[even], {}}), from, list.offsets[even], 0,
                                            total);
  }
}
#endif

// Calls body(Constant<runs>, Constant<vectors>, first run, first vector) until all runs of elements E are covered, a
// register file's worth at a time.
template <class E, class Body>
FASTNN_INLINE void for_each_register_block(int64_t runs, int64_t vectors, const Body& body) {
  constexpr int unit = kZips<E> ? 2 : 1, most_units = kMostRunVectors / unit;
  const int64_t units = vectors / unit, unit_parts = divide_up(units, most_units);
  for (int64_t part = 0; part < unit_parts; ++part) {
    const int64_t first_unit = units * part / unit_parts;
    const int64_t unit_count = units * (part + 1) / unit_parts - first_unit;
    const int64_t run_parts = divide_up(runs, smaller(kMostRuns, kMostAccumulators / (unit_count * unit)));
    for (int64_t rp = 0; rp < run_parts; ++rp) {
      const int64_t first_run = runs * rp / run_parts;
      const int64_t run_count = runs * (rp + 1) / run_parts - first_run;
      with_constant<most_units>(static_cast<int>(unit_count), [&](auto unit_constant) {
        constexpr int count = unit * decltype(unit_constant)::value;
        constexpr int most_runs = count * kMostRuns <= kMostAccumulators ? kMostRuns : kMostAccumulators / count;
        with_constant<most_runs>(static_cast<int>(run_count), [&](auto run_constant) {
          body(run_constant, Constant<count>{}, first_run, first_unit * unit);
        });
      });
    }
  }
}

// Calls body(output channel of all, its first channel in the weight, channels, place in the packed weight) for each
// block of each output channel. The weight is packed as [group][block][output channel][run][vectors x lanes].
template <class T, class Body>
FASTNN_INLINE void for_each_row_of_runs(const ConvBackward<T>& call, const Body& body) {
  const ConvPoolGeometry& g = call.geometry;
  const WinnersPlan& s = call.plan->winners;
  int64_t at = 0;
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t block = 0; block < s.blocks; ++block) {
      const int64_t first = block * s.lanes, channels = smaller(s.lanes, g.in_channels - first);
      for (int64_t o = 0; o < g.out_channels; ++o, at += s.row) body(group * g.out_channels + o, first, channels, at);
    }
  }
}

// Calls body(first tap, taps, place of the first lane) for the taps whose lanes follow each other in the runs.
template <class C, class Body>
FASTNN_INLINE void for_each_run(const WinnersPlan& s, const Body& body) {
  const int64_t size = s.vectors * kLanes<C>;
  if (s.length == size) return body(int64_t{0}, s.runs * s.columns, int64_t{0});
  for (int64_t run = 0; run < s.runs; ++run) body(run * s.columns, s.columns, run * size);
}

// Zeros stand in the unused lanes.
template <class E, class T>
void pack_runs(const ConvBackward<T>& call) {
  using C = Compute<T>;
  const ConvLayout& layout = call.weight_layout;
  const WinnersPlan& s = call.plan->winners;
  for_each_row_of_runs(call, [&](int64_t output, int64_t first, int64_t channels, int64_t at) {
    const T* from = call.weight + output * layout.n + first * layout.c;
    E* to = reinterpret_cast<E*>(call.packed) + at;
    fill_zeros(to, s.row);
    for_each_run<C>(s, [&](int64_t tap, int64_t taps, int64_t place) {
      if (layout.c != 1) return transpose_matrix(from + tap, layout.c, channels, taps, to + place, s.lanes);
      for (int64_t t = 0; t < taps; ++t) copy_run(from + (tap + t) * layout.d[2], channels, to + place + t * s.lanes);
    });
    if constexpr (kZips<E>) order_for_zip(to, s.row);
  });
}

template <class T, class C = Compute<T>>
void unpack_runs(const ConvBackward<T>& call, const C* packed, T* weight, const ConvLayout& layout) {
  const WinnersPlan& s = call.plan->winners;
  for_each_row_of_runs(call, [&](int64_t output, int64_t first, int64_t channels, int64_t at) {
    const C* from = packed + at;
    T* to = weight + output * layout.n + first * layout.c;
    for_each_run<C>(s, [&](int64_t tap, int64_t taps, int64_t place) {
      if (layout.c != 1) return transpose_matrix(from + place, s.lanes, taps, channels, to + tap, layout.c);
      for (int64_t t = 0; t < taps; ++t) copy_out(from + place + t * s.lanes, channels, to + (tap + t) * layout.d[2]);
    });
  });
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
