#include "team.h"

#include <time.h>

#include <algorithm>

namespace fastnn {
namespace {

void set(int64_t& counter, int64_t value) {
  __atomic_store_n(&counter, value, __ATOMIC_RELEASE);
}
int64_t get(const int64_t& counter) {
  return __atomic_load_n(&counter, __ATOMIC_ACQUIRE);
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // yield takes hardly any time there
#endif
}

// Sleeps for a moment. The thread that this one waits for may be queued on this processor, where it can run, or from
// where it can be moved, only while this thread sleeps: a thread that spins or yields keeps its processor busy.
void nap() {
  const timespec moment{0, 1000};
  nanosleep(&moment, nullptr);
}

// Looks at the condition for some fifty microseconds, which is longer than most rounds take, and then sleeps between
// looks.
template <class Condition>
void wait_until(const Condition& holds) {
  constexpr int kLooks = 2000;
  for (int looks = 0; !holds(); looks < kLooks ? ++looks : looks) looks < kLooks ? pause() : nap();
}

// A plan: the round's number, and how many members it has.
constexpr int64_t kSizes = 1 << 16;
int64_t plan_of(int64_t round, int64_t size) {
  return round * kSizes + size;
}

}  // namespace

Team::Team(int64_t most) : most_(std::min(most, kMost)), come_{0}, over_{0}, plan_{{0}, {0}} {
  for (int64_t i = 0; i < most_; ++i) begins_[i].value = reached_[i].value = 0;
}

Member::Member(Team& team, int64_t expected)
    : team_(&team),
      index_(__atomic_fetch_add(&team.come_.value, 1, __ATOMIC_ACQ_REL)),
      expected_(std::min(expected, team.most_)) {
  if (index_ == 0) {
    lead();
    return;
  }
  if (index_ < team.most_) {
    wait_until([&] { return get(team.begins_[index_].value) > 0 || get(team.over_.value) > 0; });
    begins_ = get(team.begins_[index_].value);
  }
  if (begins_ == 0) index_ = -1;
  size_ = begins_ == round_ ? get(team.plan_[round_ % 2].value) % kSizes : 0;
}

void Member::lead() {
  // Members that are awake come within a microsecond. Sharing the first round with them is worth waiting for.
  constexpr int kLooks = 100;
  for (int looks = 0; looks < kLooks && get(team_->come_.value) < expected_; ++looks) pause();
  size_ = 1;
  take_in_newcomers(plan_round());
}

// The size of the round about to begin, for all to read.
int64_t Member::plan_round() {
  const int64_t size = std::min(get(team_->come_.value), team_->most_);
  set(team_->plan_[round_ % 2].value, plan_of(round_, size));
  return size;
}

void Member::take_in_newcomers(int64_t size) {
  for (; size_ < size; ++size_) set(team_->begins_[size_].value, round_);
}

Member::~Member() {
  if (!team_ || index_ != 0) return;
  set(team_->over_.value, 1);
  // The parallel region ends when all members have come. Whoever waited for that in the thread pool would spin for
  // milliseconds.
  constexpr int kNaps = 20;
  for (int i = 0; i < kNaps && get(team_->come_.value) < expected_; ++i) nap();
}

void Member::end_round_of_team() {
  ++round_;
  if (round_ < begins_) return;
  // A plan takes the place of that of two rounds before, which all members have read by then.
  const int64_t& plan = team_->plan_[round_ % 2].value;
  if (index_ == 0) {
    plan_round();
  } else {
    if (round_ > begins_) set(team_->reached_[index_].value, round_);
    wait_until([&] { return get(plan) / kSizes == round_; });
  }
  for (int64_t other = 1; other < size_; ++other) {
    wait_until([&] { return get(team_->reached_[other].value) >= round_; });
  }
  const int64_t size = get(plan) % kSizes;
  if (index_ == 0) take_in_newcomers(size);  // now that all others have finished the round before
  size_ = size;
}

}  // namespace fastnn
