// What all steps of a training have in common: the parameters, the optimizer's state and the program. They are bound
// once, since passing them at each call, often thirty tensors, takes a microsecond for each ten.
//
// Python knows a bound step by a number, which is never used again once the step is released.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>

#include "../ops/operators.h"

namespace fastnn {

// The arguments of fastnn::bind_training_step. They never change.
struct BoundStep {
  TensorList parameters, state;
  std::string program;
  OptionalTensor weight;
  Ints layout;
};

class BoundSteps {
 public:
  static int64_t add(BoundStep step) {
    BoundSteps& all = instance();
    const std::lock_guard<std::mutex> lock(all.mutex_);
    all.steps_.emplace(++all.last_, std::make_shared<const BoundStep>(std::move(step)));
    return all.last_;
  }
  static std::shared_ptr<const BoundStep> find(int64_t number) {
    BoundSteps& all = instance();
    const std::lock_guard<std::mutex> lock(all.mutex_);
    const auto found = all.steps_.find(number);
    FASTNN_CHECK(found != all.steps_.end(), "bound_training_step: no step is bound to ", number);
    return found->second;
  }
  // Calls that are running keep the step alive until they end.
  static void release(int64_t number) {
    std::shared_ptr<const BoundStep> last;  // declared first: its tensors are freed after the lock is released
    BoundSteps& all = instance();
    const std::lock_guard<std::mutex> lock(all.mutex_);
    const auto found = all.steps_.find(number);
    if (found == all.steps_.end()) return;
    last = std::move(found->second);
    all.steps_.erase(found);
  }

 private:
  static BoundSteps& instance();  // never destroyed, because libtorch may be destroyed before

  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const BoundStep>> steps_;
  int64_t last_ = 0;
};

// Forgets what fastnn::network_with_pass has left under this number for backward.
void forget_pass(int64_t number);

}  // namespace fastnn
