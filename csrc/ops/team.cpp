#include "../kernels/team.h"

#include <sched.h>

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
  __asm__ volatile("yield");
#endif
}

// Some tens of microseconds of looking, longer than a round takes: after that there may be more threads than
// processors, and the one waited for needs this one.
template <class Condition>
void wait_until(const Condition& holds) {
  constexpr int kLooks = 1000;
  for (int looks = 0; !holds(); looks < kLooks ? ++looks : looks) {
    looks < kLooks ? pause() : static_cast<void>(sched_yield());
  }
}

// A plan: the round's number, and how many members it has.
constexpr int64_t kSizes = 1 << 16;
int64_t plan_of(int64_t round, int64_t size) {
  return round * kSizes + size;
}

}  // namespace

Team::Team(int64_t most) : most_(std::min(most, kMost)), come_{0}, over_{0}, plan_{{plan_of(0, 1)}, {0}} {
  for (int64_t i = 0; i < most_; ++i) begins_[i].value = finished_[i].value = 0;
}

Member::Member(Team& team) : team_(&team), index_(__atomic_fetch_add(&team.come_.value, 1, __ATOMIC_ACQ_REL)) {
  if (index_ == 0) return;
  if (index_ < team.most_) {
    wait_until([&] { return get(team.begins_[index_].value) > 0 || get(team.over_.value) > 0; });
    begins_ = get(team.begins_[index_].value);
  }
  if (begins_ == 0) index_ = -1;
  size_ = 0;
}

Member::~Member() {
  if (team_ && index_ == 0) set(team_->over_.value, 1);
}

void Member::end_round_of_team() {
  Team& team = *team_;
  ++round_;
  if (round_ < begins_) return;
  // The leader writes a plan two rounds after the last of the same parity, which all members have read by then.
  int64_t& plan = team.plan_[round_ % 2].value;
  if (index_ == 0) {
    set(plan, plan_of(round_, std::min(get(team.come_.value), team.most_)));
  } else {
    if (round_ > begins_) set(team.finished_[index_].value, round_);
    wait_until([&] { return get(plan) / kSizes == round_; });
  }
  for (int64_t other = 1; other < size_; ++other) {
    wait_until([&] { return get(team.finished_[other].value) >= round_; });
  }
  const int64_t size = get(plan) % kSizes;
  if (index_ == 0) {  // newcomers begin when all others have finished the round before
    for (int64_t newcomer = size_; newcomer < size; ++newcomer) set(team.begins_[newcomer].value, round_);
  }
  size_ = size;
}

}  // namespace fastnn
