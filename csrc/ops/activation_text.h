// Activations as text, the form in which operators and programs take them: a name of the table, and, where its
// parameters are not the defaults, their values in parentheses: "relu", "leaky_relu(0.2)", "softplus(2.0,20.0)".
#pragma once

#include <charconv>
#include <cmath>
#include <cstring>

#include "../simd/activation.h"

namespace fastnn {

// Reads one activation from `at` and moves `at` behind it. Returns false where the text names no activation.
inline bool read_activation(const char*& at, const char* end, Activation& activation) {
  const char* const name = at;
  while (at != end && *at != '(' && *at != '|' && *at != ' ' && *at != ';') ++at;
  const size_t length = static_cast<size_t>(at - name);
  for (const ActivationEntry& entry : kActivations) {
    if (entry.length != length || std::memcmp(entry.name, name, length) != 0) continue;
    activation.kind = static_cast<ActivationKind>(&entry - kActivations);
    for (int i = 0; i < kMostActivationParameters; ++i) activation.parameters[i] = entry.parameters[i].value;
    if (at == end || *at != '(') return true;
    for (int i = 0; i < kMostActivationParameters && entry.parameters[i].name && *at != ')'; ++i) {
      const std::from_chars_result read = std::from_chars(at + 1, end, activation.parameters[i]);
      at = read.ptr;
      if (read.ec != std::errc() || at == end || !std::isfinite(activation.parameters[i])) return false;
      if (*at != ',' && *at != ')') return false;
    }
    if (*at != ')') return false;
    ++at;
    return true;
  }
  return false;
}

}  // namespace fastnn
