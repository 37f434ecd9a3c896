// The table of optimizers of torch.optim: the settings of their groups, and what they keep for a parameter.
// fastnn/training_numbers.py reads the table from the extension.
//
// An optimizer is added in two places: a row here, and its formulas in optimizer_updates.h.
#pragma once

#include <stdint.h>

namespace fastnn {

// The numbers by which one parameter is updated in one step: the settings of its group, and what follows from them in
// this step.
struct UpdateNumbers {
  // Settings of the group, by torch's names: beta1 and beta2 are its betas. A setting that is false is 0, and one that
  // is true is not.
  double lr, weight_decay, maximize, momentum, dampening, nesterov, beta1, beta2, eps, amsgrad, decoupled_weight_decay;
  double alpha, centered, lr_decay, momentum_decay;
  // Of this step.
  double step;                                 // counted from 1
  double scale;                                // factor of the gradient: below 1 to clip it, negative to maximize
  bool is_first;                               // SGD: momentum begins with the gradient itself
  double first_correction, second_correction;  // Adam, NAdam, Adamax: 1 - beta^step
  double mu, next_mu, mu_product;              // NAdam: momentum now and in the next step, and the product so far
};

struct OptimizerSetting {
  const char* name;
  double UpdateNumbers::* place;
};

// A number that an optimizer keeps for each parameter, in a tensor: `step`, and what follows from it.
struct OptimizerNumber {
  const char* name;
  double initial;
};

// A tensor that an optimizer keeps for a parameter. It has the parameter's size, and zeros at first.
struct OptimizerState {
  const char* name;
  const char* setting;  // the setting that asks for it, or null where it is always kept
};

constexpr int kMostSettings = 8, kMostStates = 3, kMostNumbers = 2;

// Each list ends at the first element without a name.
struct OptimizerEntry {
  const char* name;  // of the class in torch.optim
  OptimizerSetting settings[kMostSettings];
  OptimizerNumber numbers[kMostNumbers];
  OptimizerState states[kMostStates];
};

enum class OptimizerKind : int64_t { sgd, adam, rmsprop, adagrad, adamax, nadam, count };

#define FASTNN_SETTING(name) {#name, &UpdateNumbers::name}

// One entry per kind, in the order of the kinds.
constexpr OptimizerEntry kOptimizers[] = {
    {"SGD",
     {FASTNN_SETTING(lr), FASTNN_SETTING(weight_decay), FASTNN_SETTING(maximize), FASTNN_SETTING(momentum),
      FASTNN_SETTING(dampening), FASTNN_SETTING(nesterov)},
     {},
     {{"momentum_buffer", "momentum"}}},
    {"Adam",
     {FASTNN_SETTING(lr), FASTNN_SETTING(weight_decay), FASTNN_SETTING(maximize), FASTNN_SETTING(beta1),
      FASTNN_SETTING(beta2), FASTNN_SETTING(eps), FASTNN_SETTING(amsgrad), FASTNN_SETTING(decoupled_weight_decay)},
     {{"step", 0}},
     {{"exp_avg", nullptr}, {"exp_avg_sq", nullptr}, {"max_exp_avg_sq", "amsgrad"}}},
    {"RMSprop",
     {FASTNN_SETTING(lr), FASTNN_SETTING(weight_decay), FASTNN_SETTING(maximize), FASTNN_SETTING(alpha),
      FASTNN_SETTING(eps), FASTNN_SETTING(momentum), FASTNN_SETTING(centered)},
     {{"step", 0}},
     {{"square_avg", nullptr}, {"grad_avg", "centered"}, {"momentum_buffer", "momentum"}}},
    {"Adagrad",
     {FASTNN_SETTING(lr), FASTNN_SETTING(weight_decay), FASTNN_SETTING(maximize), FASTNN_SETTING(lr_decay),
      FASTNN_SETTING(eps)},
     {{"step", 0}},
     {{"sum", nullptr}}},
    {"Adamax",
     {FASTNN_SETTING(lr), FASTNN_SETTING(weight_decay), FASTNN_SETTING(maximize), FASTNN_SETTING(beta1),
      FASTNN_SETTING(beta2), FASTNN_SETTING(eps)},
     {{"step", 0}},
     {{"exp_avg", nullptr}, {"exp_inf", nullptr}}},
    {"NAdam",
     {FASTNN_SETTING(lr), FASTNN_SETTING(weight_decay), FASTNN_SETTING(maximize), FASTNN_SETTING(beta1),
      FASTNN_SETTING(beta2), FASTNN_SETTING(eps), FASTNN_SETTING(momentum_decay),
      FASTNN_SETTING(decoupled_weight_decay)},
     {{"step", 0}, {"mu_product", 1}},
     {{"exp_avg", nullptr}, {"exp_avg_sq", nullptr}}},
};

#undef FASTNN_SETTING
static_assert(sizeof(kOptimizers) / sizeof(OptimizerEntry) == static_cast<uint64_t>(OptimizerKind::count));

}  // namespace fastnn
