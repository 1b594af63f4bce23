// Kernels with the names of SPN's, each with a fault that a check must find; the last has none.

template <class T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(256) statistics_kernel(const float* x, float* sum, int count) {
  float mine = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += 16 * 256) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if constexpr (kChannelsLast) {
        const float4 four = reinterpret_cast<const float4*>(x)[i + u * 256];
        mine += four.x * four.y + four.z * four.w;
      } else {
        mine += x[i + u * 256];  // one load in flight
      }
    }
  }
  sum[threadIdx.x] = mine;
}

// An array indexed by a value read from memory is in local memory.
template <class T, int V, int U, bool kChannelsLast>
__global__ void __launch_bounds__(128) spn_fwd_modulate_kernel(const int* index, float* y, int count) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = y[i * count];
  for (int i = 0; i < count; ++i) values[index[i] % 64] += i;
  for (int i = 0; i < 64; ++i) y[i * count] = values[i];
}

// More live values than the registers of 1024 threads hold.
template <class T, int V, int U, bool kChannelsLast, bool kRelu>
__global__ void __launch_bounds__(1024) spn_bwd_reduce_kernel(const float* x, float* y, int count) {
  float values[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) values[i] = x[i * 1024 + threadIdx.x];
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int j = 0; j < 96; ++j) values[j] = values[j] * values[(j + 1) % 96] + i;
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = values[i];
}

// 48 KB of shared memory for one warp.
template <class T, int V, int U, bool kChannelsLast>
__global__ void __launch_bounds__(32) spn_bwd_apply_kernel(const float* x, float* y, int count) {
  __shared__ float values[12 * 1024];
  for (int i = threadIdx.x; i < count; i += 32) values[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += 32) y[i] = values[count - i];
}

template __global__ void statistics_kernel<float, 4, false>(const float*, float*, int);
template __global__ void spn_fwd_modulate_kernel<float, 4, 1, false>(const int*, float*, int);
template __global__ void spn_bwd_reduce_kernel<float, 4, 1, false, false>(const float*, float*, int);
template __global__ void spn_bwd_apply_kernel<float, 4, 1, false>(const float*, float*, int);
template __global__ void statistics_kernel<float, 4, true>(const float*, float*, int);
