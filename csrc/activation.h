// What follows a normalisation: nothing, or a leaky ReLU; ReLU is the one of slope 0. The arithmetic is in
// activation_functions.h.
#pragma once

#include <optional>

namespace pixnorm {

// As ops tell it: none, or the slope for negative values.
struct Activation {
  bool on;
  double slope;

  explicit Activation(std::optional<double> negative_slope)
      : on(negative_slope.has_value()), slope(negative_slope.value_or(0)) {}
};

}  // namespace pixnorm
