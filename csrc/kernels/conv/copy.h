// Input and output: copies bands of the input with zeros for their padding, and writes pooled pixels in the output's
// memory format.
#pragma once

#include "../../simd/transpose.h"
#include "pool.h"

namespace fastnn {
namespace FASTNN_ISA {

// Copies `count` elements that lie side by side, converting them.
template <class From, class To>
FASTNN_INLINE void copy_run(const From* from, int64_t count, To* to) {
  if constexpr (sizeof(From) == sizeof(To)) {
    __builtin_memcpy(to, from, count * sizeof(To));
  } else {
    using C = Compute<From>;
    int64_t i = 0;
    for (; i + kLanes<C> <= count; i += kLanes<C>) store(to + i, load(from + i));
    if (i < count) store_up_to<To>(to + i, load_up_to<From>(from + i, count - i), count - i);
  }
}
// Copies `count` columns of a row, so that columns `apart` from each other lie side by side: to[place(i)] = from[i],
// where place(i + apart) is place(i) + 1.
template <class T, class C, class Place>
void part_columns(const T* from, int64_t count, int64_t apart, C* to, const Place& place) {
  if (apart == 1) return copy_run(from, count, to + place(0));
  if (apart == 2) {
    for (int64_t first = 0; first < 2; ++first) {
      C* const at = to + place(first);
      for (int64_t i = first; i < count; i += 2 * kLanes<C>) {
        store_up_to<C>(at + i / 2, load_every_second_up_to(from + i, count - i), (count - i + 1) / 2);
      }
    }
    return;
  }
  const int64_t rows = count / apart;
  transpose_to_places(from, apart, rows, rows, apart, to, place);
  for (int64_t i = 0; i < count % apart; ++i) to[place(i) + rows] = to_compute(from[rows * apart + i]);
}

template <class E>
FASTNN_INLINE void fill_zeros(E* to, int64_t count) {
  if (count > 0) __builtin_memset(static_cast<void*>(to), 0, count * sizeof(E));
}

// The part of `extent` positions from `first` on that lies within [0, size): [first, last), counted from `first`.
FASTNN_INLINE Inside overlap(int64_t first, int64_t extent, int64_t size) {
  const int64_t begin = smaller(extent, larger(0, -first));
  return {begin, larger(begin, smaller(extent, size - first))};
}

// Copies the columns of a row that lie inside the input, by `write(to, first column, count)`, with zeros beside them.
template <class E, class Write>
FASTNN_INLINE void copy_row(bool is_inside, Inside columns, int64_t extent, int64_t pixel, E* to, const Write& write) {
  if (!is_inside) return fill_zeros(to, extent * pixel);
  fill_zeros(to, columns.first * pixel);
  if (columns.last > columns.first) write(to + columns.first * pixel, columns.first, columns.last - columns.first);
  fill_zeros(to + columns.last * pixel, (extent - columns.last) * pixel);
}

// Calls body(slice, row, is inside, offset in the input) for each input row under a band that strides do not skip.
template <class Body>
FASTNN_INLINE void for_each_input_row(const ConvPoolGeometry& g, const ConvLayout& layout, const BandPlan& plan,
                                      const Band& band, const Body& body) {
  for (int64_t d = 0; d < plan.input[0]; ++d) {
    for (int64_t h = 0; h < plan.input[1]; ++h) {
      if (!g.meets(0, d) || !g.meets(1, h)) continue;
      const int64_t z = band.input[0] + d, y = band.input[1] + h;
      const bool inside = z >= 0 && z < g.input[0] && y >= 0 && y < g.input[1];
      body(d, h, inside, inside ? z * layout.d[0] + y * layout.d[1] : 0);
    }
  }
}

#if defined(FASTNN_HAS_PAIRS)
// Zips two rows of numbers into one row of pairs. `odd` may be null, which stands for zeros.
FASTNN_INLINE void copy_pairs(const bfloat16* even, const bfloat16* odd, int64_t count, bfloat16x2* to) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const int64_t left = count - i;
    const Vec<float> x = load_up_to<bfloat16>(even + i, left);
    const Vec<float> y = odd ? load_up_to<bfloat16>(odd + i, left) : Vec<float>{};
    store_up_to<float>(reinterpret_cast<float*>(to + i), zip_pairs(x, y), left);
  }
}
#endif

// Copies the input under a band of one image, in elements E, as DirectPlan describes.
template <class E, class T>
void copy_band(const ConvCall<T>& call, const DirectPlan& plan, const Band& band, int64_t image, E* copy) {
  constexpr bool pairs = __is_same(E, bfloat16x2);
  const ConvPoolGeometry& g = call.geometry;
  const ConvLayout& layout = call.input_layout;
  const int64_t (&extent)[3] = plan.band.input;
  const Inside columns = overlap(band.input[2], extent[2], g.input[2]);
  const T* const from = call.input + image * layout.n + band.group * g.in_channels * layout.c;
  const auto for_each_row = [&](const auto& body) {
    for_each_input_row(g, layout, plan.band, band, [&](int64_t d, int64_t h, bool inside, int64_t at) {
      body(inside, from + at + band.input[2] * layout.d[2], copy + d * plan.step[0] + h * plan.step[1]);
    });
  };
  if (plan.channels_last && layout.d[2] == 1) {  // the input is contiguous and is transposed
    for_each_row([&](bool inside, const T* row, E* to) {
      copy_row(inside, columns, extent[2], plan.step[2], to, [&](E* at, int64_t first, int64_t count) {
        if constexpr (pairs) {
#if defined(FASTNN_HAS_PAIRS)
          for (int64_t x = 0; x < count; ++x) at[x * plan.step[2] + plan.channels - 1] = {};
          bfloat16* const numbers = reinterpret_cast<bfloat16*>(at);
          transpose_matrix(row + first, layout.c, g.in_channels, count, numbers, 2 * plan.step[2]);
#endif
        } else {
          transpose_matrix(row + first, layout.c, g.in_channels, count, at, plan.step[2]);
        }
      });
    });
    return;
  }
  if (!plan.channels_last) {
    for (int64_t c = 0; c < plan.channels; ++c) {
      for_each_row([&](bool inside, const T* row, E* to) {
        copy_row(inside, columns, extent[2], 1, to + c * plan.channel_step, [&](E* at, int64_t first, int64_t count) {
          const T* source = row + (pairs ? 2 * c : c) * layout.c + first * layout.d[2];
          if constexpr (pairs) {
#if defined(FASTNN_HAS_PAIRS)
            copy_pairs(source, 2 * c + 1 < g.in_channels ? source + layout.c : nullptr, count, at);
#endif
          } else {
            copy_run(source, count, at);
          }
        });
      });
    }
    return;
  }
  const bool whole = plan.step[2] * (pairs ? 2 : 1) == g.in_channels && layout.d[2] == g.in_channels;
  for_each_row([&](bool inside, const T* row, E* to) {
    copy_row(inside, columns, extent[2], plan.step[2], to, [&](E* at, int64_t first, int64_t count) {
      const T* source = row + first * layout.d[2];
      if constexpr (pairs) {
        if (whole) return __builtin_memcpy(static_cast<void*>(at), source, count * g.in_channels * sizeof(T)), void();
        for (int64_t x = 0; x < count; ++x, source += layout.d[2], at += plan.step[2]) {
          at[plan.channels - 1] = {};
          __builtin_memcpy(static_cast<void*>(at), source, g.in_channels * sizeof(T));
        }
      } else {
        if (whole) return copy_run(source, count * g.in_channels, at);
        for (int64_t x = 0; x < count; ++x) copy_run(source + x * layout.d[2], g.in_channels, at + x * plan.step[2]);
      }
    });
  });
}

// ---- the way out ------------------------------------------------------------------------------------------------

template <class C, class T>
FASTNN_INLINE void copy_out(const C* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<C>) store_up_to<T>(to + i, load_up_to<C>(from + i, count - i), count - i);
}
FASTNN_INLINE void copy_out(const uint8_t* from, int64_t count, uint8_t* to) {
  if (count > 0) __builtin_memcpy(to, from, count);
}

// ReLU and argmaxes of conv pixels, in any order, where each conv pixel is a window. `to` may be `from`.
template <class T>
void rectify(const T* from, int64_t count, T* to, uint8_t* winners) {
  using C = Compute<T>;
  for (int64_t i = 0; i < count; i += kLanes<C>) {
    const int64_t left = smaller(kLanes<C>, count - i);
    const Vec<C> value = relu(load_up_to<T>(from + i, left));
    store_up_to<T>(to + i, value, left);
    if (!winners) continue;
    uint8_t places[kLanes<C>];
    store_winners<C>(value, number<C>(0), left == kLanes<C> ? winners + i : places);
    if (left < kLanes<C>) copy_out(places, left, winners + i);
  }
}

// to = function(from + addend) for `count` elements. addend may be null, and `from` may be `to`.
template <class T, class Function>
FASTNN_INLINE void finish_by(const Function& function, const T* from, const T* addend, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<Compute<T>>) {
    const int64_t left = count - i;
    Vec<Compute<T>> x = load_up_to<T>(from + i, left);
    if (addend) x += load_up_to<T>(addend + i, left);
    store_up_to<T>(to + i, function(x), left);
  }
}
template <class T>
void finish_run(const Activation& activation, const T* from, const T* addend, int64_t count, T* to) {
  with_activation<Compute<T>>(activation, [&](auto function) { finish_by(function, from, addend, count, to); });
}

// Finishes `count` pixels of `channels` channels that have been written to the output from `at` on: adds the addend and
// activates the sums, while they are in cache. The register tiles leave that to this second pass, since each of them
// would be needed once for every activation.
template <class T>
FASTNN_SHARED void finish_rows(const ConvCall<T>& call, int64_t at, int64_t channels, int64_t count) {
  if (!call.finishes()) return;
  const ConvLayout& layout = call.output_layout;
  const bool by_rows = layout.d[2] == 1, joins = by_rows ? layout.c == count : layout.d[2] == channels;
  int64_t runs = by_rows ? channels : count, length = by_rows ? count : channels;
  const int64_t step = by_rows ? layout.c : layout.d[2];
  if (joins) {
    length *= runs;
    runs = 1;
  }
  with_activation<Compute<T>>(call.activation, [&](auto function) {
    for (int64_t r = 0; r < runs; ++r) {
      T* const to = call.output + at + r * step;
      finish_by(function, to, call.addend ? call.addend + at + r * step : nullptr, length, to);
    }
  });
}

// Writes `count` pixels of `channels` channels, [pixel][pitch], to the output, which has channels last, from `at` on:
// kept between the bounds, and finished.
template <class T, class C>
FASTNN_SHARED void write_finished(const ConvCall<T>& call, int64_t at, int64_t channels, int64_t count, const C* from,
                                  int64_t pitch, const Bounds<C>& bounds) {
  const Vec<C> least = broadcast<C>(bounds.least), most = broadcast<C>(bounds.most);
  with_activation<C>(call.finishes() ? call.activation : kIdentity, [&](auto function) {
    for (int64_t x = 0; x < count; ++x) {
      const C* const pixel = from + x * pitch;
      const int64_t place = at + x * call.output_layout.d[2];
      for (int64_t c = 0; c < channels; c += kLanes<C>) {
        const int64_t left = channels - c;
        Vec<C> sums = smaller_of(most, larger_of(least, load(pixel + c)));  // the pitch is whole vectors
        if (call.addend) sums += load_up_to<T>(call.addend + place + c, left);
        store_up_to<T>(call.output + place + c, function(sums), left);
      }
    }
  });
}

// Writes `channels` channels of `count` pooled pixels, [pixel][pitch], to the output from `at` on. bounds: what the
// pixels must still be kept between, or null.
template <class T, class C>
void write_pixels(const ConvCall<T>& call, int64_t at, int64_t channels, int64_t count, C* from, const uint8_t* winners,
                  int64_t pitch, const Bounds<C>* bounds) {
  const ConvLayout& layout = call.output_layout;
  if (layout.d[2] != 1 && bounds) return write_finished(call, at, channels, count, from, pitch, *bounds);
  if (bounds && call.bounds_sums()) {
    const C* const place = from;
    pool_windows<C>({&place, 1, pitch, pitch, count, pitch / kLanes<C>, *bounds}, from, nullptr);
  }
  if (layout.d[2] == 1) {
    transpose_matrix(from, pitch, count, channels, call.output + at, layout.c);
    if (call.winners) transpose_matrix(winners, pitch, count, channels, call.winners + at, layout.c);
    return finish_rows(call, at, channels, count);
  }
  for (int64_t x = 0; x < count; ++x) {
    copy_out(from + x * pitch, channels, call.output + at + x * layout.d[2]);
    if (call.winners) copy_out(winners + x * pitch, channels, call.winners + at + x * layout.d[2]);
  }
  finish_rows(call, at, channels, count);
}

// Writes `count` pooled pixels of `channels` channels, [channel][pitch], to the output from `at` on.
template <class T, class C>
void write_rows(const ConvCall<T>& call, int64_t at, int64_t channels, int64_t count, const C* from,
                const uint8_t* winners, int64_t pitch) {
  const ConvLayout& layout = call.output_layout;
  if (layout.d[2] != 1) {
    transpose_matrix(from, pitch, channels, count, call.output + at, layout.d[2]);
    if (call.winners) transpose_matrix(winners, pitch, channels, count, call.winners + at, layout.d[2]);
    return finish_rows(call, at, channels, count);
  }
  for (int64_t c = 0; c < channels; ++c) {
    copy_out(from + c * pitch, count, call.output + at + c * layout.c);
    if (call.winners) copy_out(winners + c * pitch, count, call.winners + at + c * layout.c);
  }
  finish_rows(call, at, channels, count);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
