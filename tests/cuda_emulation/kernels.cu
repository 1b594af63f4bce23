// Small kernels, each for one property of the emulation; some are deliberately wrong.

#include <cooperative_groups.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <map>
#include <string>

#include "cuda/launch.cuh"

namespace emulator_test {

using pixnorm::shared_memory;

constexpr unsigned kAll = 0xffffffffu;

// data: numbers to read and write, of the test's size; n: a parameter of the test.
using Kernel = void (*)(float* data, int n);

__device__ int thread_in_block() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
__device__ int block_in_grid() { return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z); }
__device__ int thread_in_grid() {
  return block_in_grid() * static_cast<int>(blockDim.x * blockDim.y * blockDim.z) + thread_in_block();
}

// ---- positions and order ----

__global__ void positions(float* data, int) { data[thread_in_grid()] = thread_in_grid(); }

// The position of each thread in the execution order.
__global__ void order(float* data, int) {
  int* const counter = reinterpret_cast<int*>(data);
  data[1 + thread_in_grid()] = atomicAdd(counter, 1);
}

// ---- warps ----

__global__ void shfl(float* data, int n) {
  const int i = thread_in_grid(), width = n;
  data[i] = __shfl_sync(kAll, i, i + 1, width);
  data[i + blockDim.x] = static_cast<float>(__shfl_up_sync(kAll, static_cast<double>(i), 2, width));
  data[i + 2 * blockDim.x] = static_cast<float>(__shfl_down_sync(kAll, static_cast<unsigned long long>(i), 3, width));
  data[i + 3 * blockDim.x] = __shfl_xor_sync(kAll, static_cast<float>(i), 5, width);
}

// Two halves of a warp, each with its own shuffles.
__global__ void shfl_of_a_part(float* data, int) {
  const int i = threadIdx.x;
  if (i < 16) {
    for (int k = 0; k < 3; ++k) data[i] += __shfl_xor_sync(0x0000ffffu, i, 1);
  } else {
    data[i] = __shfl_sync(0xffff0000u, i, 16);
  }
}

__global__ void votes(float* data, int n) {
  const int i = threadIdx.x;
  data[i] = __popc(__ballot_sync(kAll, i < n));
  data[i + 32] = __any_sync(kAll, i < n);
  data[i + 64] = __all_sync(kAll, i < n);
  data[i + 96] = __syncthreads_count(i < n);
  data[i + 128] = __syncthreads_or(i < n);
  data[i + 160] = __syncthreads_and(i < n);
}

template <bool kRight>
__global__ void syncwarp(float* data, int) {
  float* const shared = shared_memory<float>();
  shared[threadIdx.x] = threadIdx.x;
  if (kRight) __syncwarp();
  data[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// ---- barriers ----

// Sums of neighbours, n times over.
template <bool kRight>
__global__ void syncthreads(float* data, int n) {
  float* const shared = shared_memory<float>();
  float value = threadIdx.x;
  for (int k = 0; k < n; ++k) {
    shared[threadIdx.x] = value;
    __syncthreads();
    value += shared[(threadIdx.x + 1) % blockDim.x];
    if (kRight) __syncthreads();  // otherwise a neighbour may already have written its next value
  }
  data[threadIdx.x] = value;
}

__global__ void divergent_barrier(float*, int) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_without_some(float*, int n) {
  if (static_cast<int>(threadIdx.x) < n) return;
  __syncthreads();
}

__global__ void shfl_without_some(float*, int n) {
  if (static_cast<int>(threadIdx.x) < n) return;
  __shfl_xor_sync(kAll, 1, 1);
}

__global__ void shfl_and_barrier(float*, int) {
  if (threadIdx.x == 0) __syncthreads();
  __shfl_xor_sync(kAll, 1, 1);
}

__global__ void shfl_outside_the_mask(float*, int) {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 16);
}

__global__ void shfl_of_others(float*, int) { __shfl_sync(0xffffu, 1, 0); }

__global__ void shfl_of_a_strange_width(float*, int n) { __shfl_sync(kAll, 1, 0, n); }

// ---- memory ----

__global__ void read_shared(float* data, int) { data[thread_in_grid()] = shared_memory<float>()[threadIdx.x]; }

__global__ void write_shared(float*, int n) {
  if (threadIdx.x == 0) shared_memory<float>()[n] = 1;
}

__global__ void write_global(float* data, int n) {
  if (threadIdx.x == 0) data[n] = 1;
}

__global__ void read_global(float* data, int n) {
  if (threadIdx.x == 0) data[0] = data[n];
}

__global__ void read_vector(float* data, int n) {
  if (threadIdx.x == 0) data[0] = reinterpret_cast<const float4*>(data + n)->x;
}

__global__ void atomics(float* data, int) {
  int* const numbers = reinterpret_cast<int*>(data);
  const int i = thread_in_grid();
  atomicAdd(numbers, i);
  atomicMax(numbers + 1, i);
  atomicOr(numbers + 2, 1 << i % 8);
  atomicCAS(numbers + 3, 0, i + 1);
  atomicInc(reinterpret_cast<unsigned*>(numbers) + 4, 2u);
}

// ---- clusters ----

// Each block reads the shared memory of the next one of its cluster.
template <bool kWait>
__global__ void cluster(float* data, int) {
  const auto group = cooperative_groups::this_cluster();
  float* const shared = shared_memory<float>();
  shared[threadIdx.x] = thread_in_grid();
  if (kWait) group.sync();
  const float* const other = group.map_shared_rank(shared, (group.block_rank() + 1) % group.num_blocks());
  data[thread_in_grid()] = other[threadIdx.x];
  group.sync();
}

__global__ void cluster_left_early(float* data, int) {
  const auto group = cooperative_groups::this_cluster();
  float* const shared = shared_memory<float>();
  shared[threadIdx.x] = 1;
  group.sync();
  if (group.block_rank() == 0) return;
  for (int k = 0; k < 1000; ++k) __threadfence();
  data[threadIdx.x] = group.map_shared_rank(shared, 0)[threadIdx.x];
}

// ---- approximations ----

__global__ void approximations(float* data, int n) {
  const int i = thread_in_grid();
  const float x = data[i];
  data[i] = n == 0   ? cuda_emulation::tanh_approx(x)
            : n == 1 ? cuda_emulation::ex2_approx(x)
                     : cuda_emulation::rcp_approx(x);
}

const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> all = {
      {"positions", positions},
      {"order", order},
      {"shfl", shfl},
      {"shfl_of_a_part", shfl_of_a_part},
      {"votes", votes},
      {"syncwarp", syncwarp<true>},
      {"no_syncwarp", syncwarp<false>},
      {"syncthreads", syncthreads<true>},
      {"no_syncthreads", syncthreads<false>},
      {"divergent_barrier", divergent_barrier},
      {"barrier_without_some", barrier_without_some},
      {"shfl_without_some", shfl_without_some},
      {"shfl_and_barrier", shfl_and_barrier},
      {"shfl_outside_the_mask", shfl_outside_the_mask},
      {"shfl_of_others", shfl_of_others},
      {"shfl_of_a_strange_width", shfl_of_a_strange_width},
      {"read_shared", read_shared},
      {"write_shared", write_shared},
      {"write_global", write_global},
      {"read_global", read_global},
      {"read_vector", read_vector},
      {"atomics", atomics},
      {"cluster", cluster<true>},
      {"no_cluster_sync", cluster<false>},
      {"cluster_left_early", cluster_left_early},
      {"approximations", approximations},
  };
  return all;
}

using Sizes = std::vector<int64_t>;

void run(std::string name, torch::stable::Tensor data, int64_t n, Sizes grid, Sizes block, int64_t shared_bytes,
         Sizes cluster) {
  const auto dims = [](const Sizes& s) {
    return dim3(static_cast<unsigned>(s[0]), static_cast<unsigned>(s[1]), static_cast<unsigned>(s[2]));
  };
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster[0]);
  attribute.val.clusterDim.y = static_cast<unsigned>(cluster[1]);
  attribute.val.clusterDim.z = static_cast<unsigned>(cluster[2]);
  cudaLaunchConfig_t config{};
  config.gridDim = dims(grid);
  config.blockDim = dims(block);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  pixnorm::check_cuda(
      cudaLaunchKernelEx(&config, kernels().at(name), static_cast<float*>(data.data_ptr()), static_cast<int>(n)));
}

}  // namespace emulator_test

STABLE_TORCH_LIBRARY(emulator_test_emulated, m) {
  m.def("run(str kernel, Tensor(a!) data, int n, int[] grid, int[] block, int shared_bytes, int[] cluster) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(emulator_test, CUDA, m) { m.impl("run", TORCH_BOX(&emulator_test::run)); }
