// Threads that take the steps of one call together, a round a step, inside a single parallel region.
//
// A team consists of the threads that have arrived. The first thread leads: it begins almost at once, and in each round
// takes in the threads that have arrived since. So no thread waits for one that is still asleep, busy elsewhere or
// never started, and a thread that arrives when all is done has nothing to do. In every round the members divide the
// work anew, each does its part, and none begins the next round before all have finished this one.
//
// Results must not depend on which thread computed what: divide only work whose results are the same by any thread.
#pragma once

#include <stdint.h>

namespace fastnn {

struct Share {
  int64_t first, last;

  __attribute__((always_inline)) bool empty() const { return first >= last; }
};

class Team {
 public:
  static constexpr int64_t kMost = 32;

  explicit Team(int64_t most);
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

 private:
  friend class Member;
  // Each counter has 128 bytes for itself, because processors fetch lines of 64 bytes two at a time.
  struct alignas(128) Counter {
    int64_t value;
  };

  const int64_t most_;
  Counter come_;  // threads
  Counter over_;  // whether the leader has finished
  // Rounds count from 1.
  Counter plan_[2];         // the members of a round and its number, for rounds of each parity; written by the leader
  Counter begins_[kMost];   // the first round of a member; written by the leader
  Counter reached_[kMost];  // the round that a member has come to; written by itself
};

// A thread's place in a team, to be made and used by that thread alone.
class Member {
 public:
  // A member of a team of one.
  Member() = default;
  // Waits until the team takes this thread in, or has finished without it. `expected` threads should arrive, including
  // this one.
  Member(Team& team, int64_t expected);
  Member(const Member&) = delete;
  Member& operator=(const Member&) = delete;
  ~Member();

  int64_t index() const { return index_; }
  // Whether there is something to do. All members go through the same rounds from the first on; one that was taken in
  // later has an empty share until then.
  bool joined() const { return index_ >= 0; }
  // This member's part of `count` things in this round.
  __attribute__((always_inline)) Share share(int64_t count) const {
    if (size_ == 1) return {0, count};
    if (size_ == 0) return {0, 0};
    return {count * index_ / size_, count * (index_ + 1) / size_};
  }
  // What the others have written in this round may be read after it.
  __attribute__((always_inline)) void end_round() {
    if (team_) end_round_of_team();
  }

 private:
  void lead();
  int64_t plan_round();
  void take_in_newcomers(int64_t size);
  void end_round_of_team();

  Team* team_ = nullptr;
  int64_t index_ = 0;
  int64_t expected_ = 1;
  int64_t round_ = 1;
  int64_t begins_ = 0;  // the round in which it was taken in
  int64_t size_ = 1;    // members of this round, or 0 before `begins_`
};

}  // namespace fastnn
