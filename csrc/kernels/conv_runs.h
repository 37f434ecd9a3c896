// What backward works on: lists of gradients that are not zero, and runs, the elements of the input under a conv pixel
// or of the weight of an output channel.
#pragma once

#include "conv_block_image.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int kEnoughVectors = 4;  // under a pixel, for sums that do not wait for each other
constexpr int kMostRuns = 4;
constexpr int kMostRunVectors = 6;
constexpr int kMostAccumulators = FASTNN_VECTOR_BYTES == 64 ? 24 : 12;

// Offsets as wide as the elements.
template <class C>
using Offset = typename IntegerOf<C>::Type;

// Gradients that are not zero, and where the runs of each, of elements E, begin.
template <class E>
struct GradientList {
  const E* values;
  const Offset<Compute<E>>* offsets;
  int64_t count;
};

// The runs under a conv pixel: one a row of the kernel.
struct RunShape {
  int64_t lanes;    // channels of a block
  int64_t blocks;   // of a group
  int64_t runs;     // under a conv pixel
  int64_t length;   // elements of a run
  int64_t vectors;  // that hold one
  int64_t row;      // elements of all runs of one output channel: runs x vectors x L
};

template <class E>
RunShape run_shape(const ConvPoolGeometry& g) {
  using C = Compute<E>;
  RunShape s;
  s.runs = g.kernel[0] * g.kernel[1];
  const int64_t least = kSumVectors<E> * kLanes<C>;
  const int64_t most = larger(least, kLanes<C> * divide_up(kEnoughVectors, smaller(kEnoughVectors, g.taps())));
  const int64_t parts = divide_up(g.in_channels, most);
  s.lanes = parts == 1 && !kZipsRuns<E> ? g.in_channels : round_up(divide_up(g.in_channels, parts), least);
  s.blocks = divide_up(g.in_channels, s.lanes);
  s.length = s.lanes * g.kernel[2];
  s.vectors = divide_up(s.length, kLanes<C>);
  s.row = s.runs * s.vectors * kLanes<C>;
  return s;
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

#if defined(__AVX512F__)
// Adds what two entries give, whose values lie side by side in `values`, or one.
template <bool has_second, int runs, int vectors>
FASTNN_INLINE void accumulate_zipped(Vec<float> values, const bfloat16* const (&from)[runs], int64_t first,
                                     int64_t second, Vec<float> (&total)[runs][vectors]) {
#pragma GCC unroll 4
  for (int r = 0; r < runs; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v += 2) {
      const bfloat16* run = from[r] + v * kLanes<float>;
      Vec<float> x = load_numbers<bfloat16x2>(run + first), y = {};
      if (has_second) y = load_numbers<bfloat16x2>(run + second);
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
  constexpr int unit = kSumVectors<E>, most_units = kMostRunVectors / unit;
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

// Calls body(element of its first lane in an output channel's runs, offset in the weight) for each kernel position.
template <class C, class Body>
FASTNN_INLINE void for_each_run_tap(const ConvPoolGeometry& g, const RunShape& s, const ConvLayout& weight,
                                    const Body& body) {
  for (int64_t d = 0; d < g.kernel[0]; ++d) {
    for (int64_t h = 0; h < g.kernel[1]; ++h) {
      for (int64_t w = 0; w < g.kernel[2]; ++w) {
        body((d * g.kernel[1] + h) * s.vectors * kLanes<C> + w * s.lanes,
             d * weight.d[0] + h * weight.d[1] + w * weight.d[2]);
      }
    }
  }
}

// The channels of a block that an output channel of joined groups reads: where they are in the block and in the weight.
struct OwnChannels {
  int64_t in_block, in_weight, count;
};

FASTNN_INLINE OwnChannels own_channels(const ConvPoolGeometry& g, const RunShape& s, int64_t joined, int64_t block,
                                       int64_t o) {
  const int64_t channels = g.in_channels / joined, group = o / (g.out_channels / joined) * channels;
  const int64_t first = block * s.lanes;
  const int64_t begin = larger(first, group), end = smaller(first + s.lanes, group + channels);
  return {begin - first, begin - group, larger(0, end - begin)};
}

// Whether the taps of a channel lie side by side both in the weight and in its runs.
template <class C>
bool taps_are_rows(const ConvPoolGeometry& g, const RunShape& s, const ConvLayout& weight) {
  const bool joined = (g.kernel[1] == 1 || weight.d[1] == g.kernel[2]) &&
                      (g.kernel[0] == 1 || weight.d[0] == g.kernel[1] * g.kernel[2]);
  return joined && weight.d[2] == 1 && weight.c != 1 && (s.runs == 1 || s.length == s.vectors * kLanes<C>);
}

// weight -> [group][block][output channel][run][vectors x lanes], zeros in the unused lanes
template <class E, class T>
void pack_runs(const ConvPoolBackward<T>& call) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const RunShape s = run_shape<E>(g);
  const ConvLayout& layout = call.weight_layout;
  E* to = reinterpret_cast<E*>(call.packed);
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t block = 0; block < s.blocks; ++block) {
      for (int64_t o = 0; o < g.out_channels; ++o, to += s.row) {
        const OwnChannels own = own_channels(g, s, call.joined, block, o);
        const T* from = call.weight + (group * g.out_channels + o) * layout.n + own.in_weight * layout.c;
        fill_zeros(to, s.row);
        if (own.count == 0) continue;
        if (taps_are_rows<C>(g, s, layout)) {
          transpose_matrix(from, layout.c, own.count, g.taps(), to + own.in_block, s.lanes);
        } else {
          for_each_run_tap<C>(g, s, layout, [&](int64_t element, int64_t tap) {
            copy_run(from + tap, layout.c, own.count, to + element + own.in_block);
          });
        }
        if constexpr (kZipsRuns<E>) order_for_zip(to, s.row);
      }
    }
  }
}

template <class E, class T>
void unpack_runs(const ConvPoolBackward<T>& call, const Compute<T>* from, T* to, const ConvLayout& layout) {
  using C = Compute<T>;
  const ConvPoolGeometry& g = call.geometry;
  const RunShape s = run_shape<E>(g);
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t block = 0; block < s.blocks; ++block) {
      for (int64_t o = 0; o < g.out_channels; ++o, from += s.row) {
        const OwnChannels own = own_channels(g, s, call.joined, block, o);
        const C* source = from + own.in_block;
        T* target = to + (group * g.out_channels + o) * layout.n + own.in_weight * layout.c;
        if (own.count == 0) continue;
        if (taps_are_rows<C>(g, s, layout)) {
          transpose_matrix(source, s.lanes, g.taps(), own.count, target, layout.c);
          continue;
        }
        for_each_run_tap<C>(g, s, layout, [&](int64_t element, int64_t tap) {
          for (int64_t c = 0; c < own.count; ++c) target[tap + c * layout.c] = from_compute<T>(source[element + c]);
        });
      }
    }
  }
}

template <class T>
void store_computed(const Compute<T>* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_compute<T>(from[i]);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
