// Statistics on the CPU: means and variances of activations, and the running ones of a layer.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/moments.h"
#include "statistics_arguments.h"

#define PIXNORM_VECTOR_CODE "cpu/moments_kernels.h"
#include "cpu/foreach_isa.h"
#include "cpu/statistics.h"

namespace pixnorm {
namespace {

std::tuple<Tensor, Tensor> statistics(const std::vector<Tensor>& tensors, bool instance) {
  const StatisticsInput in(tensors);
  return dispatch_floating(in.tensors[0].scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor mean = statistics_result<A>(in, instance), var = statistics_result<A>(in, instance);
    if (in.tensors[0].numel() == 0) return {mean, var};
    const Activations s{in.n, in.c, in.pixels, in.channels_last, instance};
    for (int64_t i = 0; i < in.count(); ++i) {
      Statistics<T> found(s, in.n);
      found.add(data_of<T>(in.tensors[i]), 0, in.n);
      const int64_t offset = i * s.groups() * s.c;
      found.finish(static_cast<A*>(mean.data_ptr()) + offset, static_cast<A*>(var.data_ptr()) + offset);
    }
    return {mean, var};
  });
}

void update_running(const std::vector<Tensor>& running, const std::vector<Tensor>& batch, double momentum,
                    int64_t count) {
  check_running(running, batch, count);
  for (size_t i = 0; i < running.size(); ++i) {
    dispatch_floating(running[i].scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      using A = acc_t<T>;
      STD_TORCH_CHECK(batch[i].scalar_type() == dtype_of<A>, "pixnorm: new statistics have the wrong dtype");
      T* const to = static_cast<T*>(running[i].data_ptr());
      const A* const from = data_of<A>(batch[i]);
      const int64_t step = running[i].stride(0), from_step = batch[i].stride(0);
      for (int64_t c = 0; c < running[i].numel(); ++c) {
        T& value = to[c * step];
        value = static_cast<T>(
            moved<A>(static_cast<A>(value), from[c * from_step], momentum, weight_of(i, momentum, count)));
      }
    });
  }
}

}  // namespace
}  // namespace pixnorm

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) {
  m.impl("statistics", TORCH_BOX(&pixnorm::statistics));
  m.impl("update_running", TORCH_BOX(&pixnorm::update_running));
}
