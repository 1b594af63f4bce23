// Sums over lanes and warps, in a fixed order.
#pragma once

#include "cuda/launch.cuh"

namespace pixnorm {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// The sum over the block, returned to every thread. `scratch` holds one A per warp; a barrier must separate this call
// from its last use.
template <class A>
__device__ __forceinline__ A block_sum(A value, A* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) value += scratch[warp];
  __syncthreads();
  return value;
}

// Reduce-scatter of K values over a warp by recursive halving: about K shuffles instead of 5 K. Afterwards values[i] of
// a lane is sum number first + i, for i < count, where {first, count} = scattered<K>(lane).
template <int K, int kOffset = kWarp / 2, class A>
__device__ __forceinline__ void warp_sum_scatter(A* values) {
  if constexpr (kOffset > 0) {
    constexpr int kHalf = (K + 1) / 2;
    const bool upper = threadIdx.x & kOffset;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const A high = kHalf + i < K ? values[kHalf + i < K ? kHalf + i : 0] : A(0);
      const A sent = upper ? values[i] : high;
      values[i] = (upper ? high : values[i]) + __shfl_xor_sync(kAllLanes, sent, kOffset);
    }
    warp_sum_scatter<kHalf, kOffset / 2>(values);
  }
}

struct Scattered {
  int first, count;
};

template <int K>
__device__ __forceinline__ Scattered scattered(int lane) {
  Scattered range{0, K};
  int slots = K;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    slots = (slots + 1) / 2;
    if (lane & offset) {
      range.first += slots;
      range.count -= slots;
    } else if (range.count > slots) {
      range.count = slots;
    }
  }
  return range;
}

}  // namespace pixnorm
