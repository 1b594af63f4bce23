// The arguments of the ops `statistics` and `update_running`, checked the same on every device.
#pragma once

#include <limits>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "scalar.h"
#include "tensor.h"

namespace pixnorm {
namespace {

// ---- statistics ----

// One or two tensors of one shape and dtype, dense in the layout of the first.
struct StatisticsInput {
  std::vector<Tensor> tensors;
  int64_t n, c, pixels;
  bool channels_last;

  explicit StatisticsInput(const std::vector<Tensor>& given) {
    STD_TORCH_CHECK(given.size() == 1 || given.size() == 2, "pixnorm: expected one or two tensors");
    const Tensor& first = given[0];
    STD_TORCH_CHECK(first.dim() == 4, "pixnorm: tensors must be 4-D");
    n = first.size(0), c = first.size(1), pixels = first.size(2) * first.size(3);
    const MemoryFormat layout = layout_of(first);
    channels_last = layout == MemoryFormat::ChannelsLast;
    for (const Tensor& t : given) {
      check_sizes(t, "a tensor", {n, c, first.size(2), first.size(3)});
      check_same_dtype(t, "a tensor", first);
      STD_TORCH_CHECK(t.device() == first.device(), "pixnorm: tensors must be on one device");
      tensors.push_back(dense(t, layout));
    }
  }

  int64_t count() const { return static_cast<int64_t>(tensors.size()); }
};

// An empty result (tensors, groups, C); NaN where there is nothing to take the mean of.
template <class A>
Tensor statistics_result(const StatisticsInput& in, bool instance) {
  Tensor t = empty_like(in.tensors[0], {in.count(), instance ? in.n : 1, in.c}, dtype_of<A>);
  if (in.n * in.pixels == 0) torch::stable::fill_(t, std::numeric_limits<double>::quiet_NaN());
  return t;
}

// ---- update_running ----

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

// The weight of new statistic i: means and biased variances alternate.
inline double weight_of(size_t i, double momentum, int64_t count) {
  return i % 2 ? momentum * (static_cast<double>(count) / static_cast<double>(count - 1)) : momentum;
}

// In the dtype that statistics are reduced in.
template <class A>
PIXNORM_HOST_DEVICE A moved(A running, A batch, double momentum, double weight) {
  return static_cast<A>(1 - momentum) * running + static_cast<A>(weight) * batch;
}

}  // namespace
}  // namespace pixnorm
