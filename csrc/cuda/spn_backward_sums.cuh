// The 38 sums per channel of SPN's backward: how blocks write partial sums, and how they are finished.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/spn_walk.cuh"
#include "spn_sums.h"

namespace pixnorm::spn {

template <class T>
struct BackwardCall : Call<T> {
  using A = acc_t<T>;
  const A* used[4];
  const T* dy;
  A* sums;     // [C][splits of reduce][kSums]
  int splits;  // of reduce
  A* means;    // [C][4], see Means; channels_last
  A centre;    // 1 / (N H W), or 0 where the statistics were given
  T *dx, *dp;  // for NCHW, dp is written as (C, N, HW): then dW is a single GEMM
  T* x_copy;   // NCHW: x as (C, N, HW), for the same GEMM
  Gradient<T> d_mask_weight, d_mask_bias, d_taps[4];
};

// Per-channel means of dy γ, dy γ x̂, dq and dq p̂, which centre the gradients of the batch norms.
enum Mean { kMeanG, kMeanGx, kMeanQ, kMeanQp, kMeans };

// Adds up the partial sums of a channel; computes its means and, if `write`, the gradients of its parameters. Called by
// all threads of a block. `scratch` holds kSums numbers per warp. `means` is valid after the next barrier.
template <class T>
__device__ void finish_channel(const BackwardCall<T>& call, int c, bool write, acc_t<T>* scratch, acc_t<T>* means) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const A* const sums = call.sums + int64_t{c} * call.splits * kSums;
  for (int i = lane; i < kSums; i += kWarp) {
    A total = 0;
    for (int split = warp; split < call.splits; split += warps) total += sums[split * kSums + i];
    scratch[warp * kSums + i] = total;
  }
  __syncthreads();
  if (warp > 0) return;
  for (int i = lane; i < kSums; i += kWarp) {
    for (int other = 1; other < warps; ++other) scratch[i] += scratch[other * kSums + i];
  }
  __syncwarp();
  // Half a warp for gamma and half for beta; one lane per tap.
  const int of = lane / 16, k = lane % 16;
  A d_bn = 0;  // Σ dy γ x̂ and Σ dy γ, from the gradients of the taps
  if (k < kTaps) {
    const A* const sum = scratch + of * kSumsOf;
    const A inside = sum_inside(sum, k);
    const A with_mask = Mask<T>::kScale * sum[kWithMask + k] + Mask<T>::kShift * inside;
    const A with_inverse = inside - with_mask;
    const int i = c * kTaps + k;
    d_bn = call.taps[0][i] * with_mask + call.taps[1][i] * with_inverse;
    if (write) {
      call.d_taps[2 * of].set(i, with_mask);
      call.d_taps[2 * of + 1].set(i, with_inverse);
    }
  }
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) d_bn += __shfl_xor_sync(kAllLanes, d_bn, offset);
  // Given statistics: no centring, even if a sum is NaN.
  const auto mean = [&](A sum) { return call.centre == 0 ? A(0) : sum * call.centre; };
  if (k == 0) means[of == 0 ? kMeanGx : kMeanG] = mean(d_bn);
  if (lane == 0) {
    means[kMeanQ] = mean(scratch[kSumQ]);
    means[kMeanQp] = mean(scratch[kSumQp]);
    if (write) {
      call.d_mask_bias.set(c, scratch[kSumQ]);
      call.d_mask_weight.set(c, scratch[kSumQp]);
    }
  }
}

// Reduces the sums over the block and writes them where finish_channel reads them.
template <class A, bool kChannelsLast>
__device__ void write_sums(A (&sums)[kSums], int c, bool channel, A* scratch, A* to, int splits) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if constexpr (kChannelsLast) {
    // Lanes are channels: reduce over warps only.
    for (int half = warps / 2; half > 0; half /= 2) {
      A* const mine = scratch + (warp % half) * kSums * kWarp + lane;
      __syncthreads();
      if (warp >= half && warp < 2 * half) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) mine[i * kWarp] = sums[i];
      }
      __syncthreads();
      if (warp < half) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] += mine[i * kWarp];
      }
    }
    if (warp == 0 && channel) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) to[(int64_t{c} * splits + blockIdx.y) * kSums + i] = sums[i];
    }
  } else {
    warp_sum_scatter<kSums>(sums);
    const Scattered range = scattered<kSums>(lane);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ceil_div(kSums, kWarp); ++i) {
      if (i < range.count) scratch[warp * kSums + range.first + i] = sums[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kSums; i += blockDim.x) {
      A total = 0;
      for (int w = 0; w < warps; ++w) total += scratch[w * kSums + i];
      to[(int64_t{c} * splits + blockIdx.y) * kSums + i] = total;
    }
  }
}

}  // namespace pixnorm::spn
