// Running statistics on the CPU.

#include "running.h"

#include <torch/csrc/stable/library.h>

namespace pixnorm {
namespace {

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

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) { m.impl("update_running", TORCH_BOX(&pixnorm::update_running)); }
