// Whether a team of threads pays (kernels/team.h), by how the calls before went.
#pragma once

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fastnn {

// What teams have gained against one thread in calls of one kind, as measured. A core that is busy elsewhere runs a
// member only now and then, for milliseconds each, and as long the others wait for it; and two processors may be one
// core. Then calls are left to one thread for a while, the longer the more often teams have lost. Times in nanoseconds.
class TeamBalance {
 public:
  // Of this thread's calls, whose pool of threads is its own. `kind` tells those apart that take different times a
  // step.
  static TeamBalance& of(double kind) {
    constexpr uint64_t kKept = 16;
    static thread_local TeamBalance kept[kKept];
    uint64_t bits;
    std::memcpy(&bits, &kind, sizeof(bits));
    TeamBalance& balance = kept[bits * 0x9e3779b97f4a7c15 >> 60];
    static_assert(kKept == 1 << 4, "as many as the bits of the index above");
    if (balance.kind_ != kind) {
      balance = TeamBalance();
      balance.kind_ = kind;
    }
    return balance;
  }

  // Whether the next call should do without a team: in a pause, or for a comparison.
  bool prefers_one() const {
    constexpr double kSeldom = 64;
    return pause_ > 0 || (since_one_ > 0 && since_one_ >= kSeldom * one_);
  }

  void add_one(double steps, double time) {
    const double measured = time / steps;
    // Below what it was, it is believed at once: a call may be disturbed, but not sped up.
    one_ = one_ == 0 || measured < one_ ? measured : one_ + (std::min(measured, 2 * one_) - one_) / 4;
    since_one_ = 0;
    pause_ -= time;
    rested_ = true;
  }

  void add_team(double steps, double time) {
    // Longer than a slice of time that a scheduler gives to a thread, so that good slices don't hide bad ones.
    constexpr double kMost = 4e6;
    constexpr double kWaking = 0.2e6;  // what the first call after a pause may lose
    since_one_ += time / steps;
    if (one_ == 0) return;  // the first call, of cold caches
    gained_ = std::min(gained_ + one_ * steps - time, kMost);
    if (gained_ == kMost) longer_ = kShortest;
    if (gained_ < (rested_ ? -kWaking : 0)) {
      pause_ = -gained_ * longer_;
      longer_ = std::min(2 * longer_, kLongest);
      gained_ = 0;
    }
    rested_ = false;
  }

 private:
  static constexpr double kShortest = 1, kLongest = 64;

  double kind_ = 0;
  bool rested_ = false;        // whether one thread made the call before
  double one_ = 0;             // a step by one thread, or 0 before the first
  double since_one_ = 0;       // a step of each call since then
  double gained_ = 0;          // by all calls since the last pause
  double pause_ = 0;           // to be spent by one thread
  double longer_ = kShortest;  // how much longer than what was lost the next pause is
};

inline double now_in_nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) * 1e9 + static_cast<double>(now.tv_nsec);
}

}  // namespace fastnn
