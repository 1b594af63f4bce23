// Running statistics on NVIDIA GPUs: those of a layer in one launch.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/launch.cuh"
#include "running.h"

namespace pixnorm {
namespace {

constexpr int kMost = 8, kThreads = 128;

template <class T>
struct RunningCall {
  struct {
    T* running;
    const acc_t<T>* batch;
    int64_t running_step, batch_step;
    double weight;
  } of[kMost];
  int size[kMost];
  double momentum;
};

// The grid is (blocks of channels, statistics).
template <class T>
__global__ void __launch_bounds__(kThreads) update_running_kernel(const RunningCall<T> call) {
  using A = acc_t<T>;
  const auto& of = call.of[blockIdx.y];
  const int c = blockIdx.x * kThreads + threadIdx.x;
  if (c >= call.size[blockIdx.y]) return;
  T& value = of.running[c * of.running_step];
  value = static_cast<T>(moved<A>(static_cast<A>(value), of.batch[c * of.batch_step], call.momentum, of.weight));
}

void update_running(const std::vector<Tensor>& running, const std::vector<Tensor>& batch, double momentum,
                    int64_t count) {
  check_running(running, batch, count);
  STD_TORCH_CHECK(running.size() <= kMost, "pixnorm: more than ", kMost, " running statistics");
  if (running.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(running[0].get_device_index());
  dispatch_floating(running[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    RunningCall<T> call{};
    call.momentum = momentum;
    int most = 0;
    for (size_t i = 0; i < running.size(); ++i) {
      STD_TORCH_CHECK(batch[i].scalar_type() == dtype_of<A>, "pixnorm: new statistics have the wrong dtype");
      call.of[i] = {static_cast<T*>(running[i].data_ptr()), data_of<A>(batch[i]), running[i].stride(0),
                    batch[i].stride(0), weight_of(i, momentum, count)};
      call.size[i] = static_cast<int>(running[i].numel());
      most = call.size[i] > most ? call.size[i] : most;
    }
    if (most == 0) return;
    launch(update_running_kernel<T>,
           {dim3(ceil_div(most, kThreads), static_cast<unsigned>(running.size())), dim3(kThreads), 0,
            current_stream(running[0])},
           call);
  });
}

}  // namespace
}  // namespace pixnorm

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CUDA, m) { m.impl("update_running", TORCH_BOX(&pixnorm::update_running)); }
