// What the op update_running is given, on every device.
#pragma once

#include <vector>

#include "check.h"
#include "dispatch.h"
#include "scalar.h"
#include "tensor.h"

namespace pixnorm {

inline void check_running(const std::vector<Tensor>& running, const std::vector<Tensor>& batch, int64_t count) {
  STD_TORCH_CHECK(running.size() == batch.size(), "pixnorm: as many running as new statistics");
  STD_TORCH_CHECK(count > 1, "pixnorm: an unbiased variance needs more than 1 value");
  for (size_t i = 0; i < running.size(); ++i) {
    check_sizes(batch[i], "a new statistic", {running[i].numel()});
    check_same_dtype(running[i], "a running statistic", running[0]);
    check_same_dtype(batch[i], "a new statistic", batch[0]);
    STD_TORCH_CHECK(running[i].dim() == 1, "pixnorm: statistics must be vectors");
  }
}

// The weight of new statistic i: of means and biased variances in turn.
inline double weight_of(size_t i, double momentum, int64_t count) {
  return i % 2 ? momentum * (static_cast<double>(count) / static_cast<double>(count - 1)) : momentum;
}

// In the dtype that statistics are reduced in.
template <class A>
PIXNORM_HOST_DEVICE A moved(A running, A batch, double momentum, double weight) {
  return static_cast<A>(1 - momentum) * running + static_cast<A>(weight) * batch;
}

}  // namespace pixnorm
