// The activation after a normalisation: none, or leaky ReLU (ReLU has slope 0). activation_functions.h has the
// arithmetic.
#pragma once

#include <optional>

namespace pixnorm {

// From the op's `negative_slope` argument: None means no activation.
struct Activation {
  bool on;
  double slope;

  explicit Activation(std::optional<double> negative_slope)
      : on(negative_slope.has_value()), slope(negative_slope.value_or(0)) {}
};

}  // namespace pixnorm
