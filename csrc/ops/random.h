// The numbers of torch's generator on the CPU, drawn by ourselves: the same numbers, in a tenth of the time that torch
// takes to draw them one by one. (Where torch draws them by a library of Intel's, they are others, and torch draws
// them.)
//
// The generator is a Mersenne Twister. M. Matsumoto and T. Nishimura, "Mersenne Twister: A 623-dimensionally
// equidistributed uniform pseudo-random number generator", ACM TOMACS 8 (1998).
#pragma once

#include "tensor.h"

namespace fastnn {

// Fills `count` elements with `value`, with this probability, and zeros, as torch's bernoulli_ does, from the state
// that this thread has been lent (random.cpp). Returns false, and draws nothing, where it has been lent none.
template <class T>
bool draw_from_lent_state(double probability, T value, int64_t count, T* to);

// Ends the loan of this thread's state. Returns whether any number has been drawn from it.
bool take_back_random_state();

}  // namespace fastnn
