// What the op update_running is given, on every device.
#pragma once

#include <vector>

#include "check.h"
#include "dispatch.h"
#include "scalar.h"
#include "tensor.h"

namespace pixnorm {

inline void check_running(const std::vector<Tensor>& running, const std::vector<Tensor>& batch,
                          const std::vector<double>& corrections) {
  STD_TORCH_CHECK(running.size() == batch.size() && running.size() == corrections.size(),
                  "pixnorm: as many running as new statistics, and as many corrections");
  for (size_t i = 0; i < running.size(); ++i) {
    check_sizes(batch[i], "a new statistic", {running[i].numel()});
    check_same_dtype(running[i], "a running statistic", running[0]);
    check_same_dtype(batch[i], "a new statistic", batch[0]);
    STD_TORCH_CHECK(running[i].dim() == 1, "pixnorm: statistics must be vectors");
  }
}

// In the dtype that statistics are reduced in.
template <class A>
PIXNORM_HOST_DEVICE A moved(A running, A batch, double momentum, double correction) {
  return static_cast<A>(1 - momentum) * running + static_cast<A>(momentum * correction) * batch;
}

}  // namespace pixnorm
