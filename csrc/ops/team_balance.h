// Decides whether a team of threads pays (kernels/team.h), from the times of earlier calls.
#pragma once

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fastnn {

// Measures what teams have gained over one thread in calls of one kind. A core that is busy with something else may
// stop a member for milliseconds, while the others wait for it; and two logical processors may share one core. Where
// teams lose, one thread makes the calls for a while, which is longer the more often teams have lost. Times are in
// nanoseconds.
class TeamBalance {
 public:
  // The balance of this thread's calls: each thread has a pool of threads of its own. `kind` tells calls apart whose
  // steps take different times.
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

  // Whether one thread should make the next call: in a pause, or to compare.
  bool prefers_one() const {
    constexpr double kSeldom = 64;
    return pause_ > 0 || (since_one_ > 0 && since_one_ >= kSeldom * one_);
  }

  void add_one(double steps, double time) {
    const double measured = time / steps;
    // A shorter time than before is believed at once, since a disturbance can only make a call longer.
    one_ = one_ == 0 || measured < one_ ? measured : one_ + (std::min(measured, 2 * one_) - one_) / 4;
    since_one_ = 0;
    pause_ -= time;
    rested_ = true;
  }

  void add_team(double steps, double time) {
    // The most gain that is kept in mind. It is longer than a scheduler's time slice, and short enough that good slices
    // don't hide bad ones for long.
    constexpr double kMost = 4e6;
    constexpr double kWaking = 0.2e6;  // what the first call after a pause may lose
    since_one_ += time / steps;
    if (one_ == 0) return;  // in the first call the caches are cold
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
