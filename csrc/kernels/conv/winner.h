// The argmaxes of windows, as vectors: numbers of window positions, and how they are saved.
#pragma once

#include "../../simd/vec.h"
#include "problem.h"

namespace fastnn {
namespace FASTNN_ISA {

// Numbers of window positions, in integers as wide as the values by which they are selected.
template <class C>
using Numbers = Vec<typename IntegerOf<C>::Type>;
template <class C>
FASTNN_INLINE Numbers<C> number(int64_t place) {
  return Numbers<C>{} + static_cast<typename IntegerOf<C>::Type>(place);
}

// Updates `best` and its position by the pixel at a window position; of equal pixels the first stays. `careful` keeps
// NaN, as torch's max-pool does.
template <class C, bool with_winners, bool careful>
FASTNN_INLINE void take_place(Vec<C> pixel, int64_t place, Vec<C>& best, Numbers<C>& winner) {
  if constexpr (careful) {
    const auto wins = (pixel > best) | (pixel != pixel);
    best = wins ? pixel : best;
    if (with_winners) winner = wins ? number<C>(place) : winner;
  } else {
    if (with_winners) winner = pixel > best ? number<C>(place) : winner;
    best = larger_of(pixel, best);
  }
}

template <class C>
FASTNN_INLINE void store_winners(Vec<C> best, Numbers<C> winner, uint8_t* to) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<C>)));
  const Numbers<C> place = best <= Vec<C>{} ? number<C>(kDead) : winner;
  const Bytes bytes = __builtin_convertvector(place, Bytes);
  __builtin_memcpy(to, &bytes, sizeof(bytes));
}

}  // namespace FASTNN_ISA
}  // namespace fastnn
