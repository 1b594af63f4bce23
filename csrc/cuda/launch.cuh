// Kernel launches, and dynamic shared memory.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#ifdef PIXNORM_CUDA_EMULATION
#include "cuda_emulation.h"
#endif

namespace pixnorm {

constexpr int kWarp = 32;

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // clear it, or a later call would report it again
  STD_TORCH_CHECK(error == cudaSuccess, "pixnorm: CUDA error: ", cudaGetErrorString(error));
}

// PyTorch's current stream on the tensor's device.
inline cudaStream_t current_stream(const torch::stable::Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

// The only place that launches kernels: <<<>>> would not compile in the emulation (tests/cuda_emulation).
template <class... P>
void launch(void (*kernel)(P...), const Launch& how, const P&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  if (how.shared_bytes >= 48 << 10) {  // above that it is opt-in
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared_bytes)));
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <class A>
__device__ __forceinline__ A* shared_memory() {
#ifdef PIXNORM_CUDA_EMULATION
  return static_cast<A*>(cuda_emulation::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<A*>(memory);
#endif
}

}  // namespace pixnorm
