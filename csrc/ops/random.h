// The numbers of torch's generator on the CPU, drawn by ourselves: the same numbers, in a fifth of the time that torch
// takes to draw them one by one. (Where torch draws them by a library of Intel's, they are others, and torch draws
// them.)
//
// The generator is a Mersenne Twister. M. Matsumoto and T. Nishimura, "Mersenne Twister: A 623-dimensionally
// equidistributed uniform pseudo-random number generator", ACM TOMACS 8 (1998).
#pragma once

#include <functional>

#include "tensor.h"

namespace fastnn {

// Fills `count` elements with `value`, with this probability, and zeros, as torch's bernoulli_ does. Returns false, and
// draws nothing, where torch has to draw.
template <class T>
bool draw_as_torch(double probability, T value, int64_t count, T* to);

// Calls draw(state) with the state of torch's generator, and stores the state that this leaves. Meanwhile no other
// thread may do the same.
using WithRandomState = void (*)(const std::function<void(uint8_t* state)>& draw);
void set_random_state_holder(WithRandomState holder);

}  // namespace fastnn
