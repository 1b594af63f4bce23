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
  A* sums;     // [C][samples of the plan][splits of reduce][kSums]
  int splits;  // of reduce
  int parts;   // samples of the plan x splits
  A* shares;   // per sample: [C][N][kMeans], what each adds to the means
  A* means;    // [C][kMeans]; nullptr: apply computes them
  A centre;    // 1 / (N H W), or 0 where the statistics were given
  T *dx, *dp;  // for NCHW, dp is written as (C, N, HW): then dW is a single GEMM
  T* x_copy;   // NCHW: x as (C, N, HW), for the same GEMM
  Gradient<T> d_mask_weight, d_mask_bias, d_taps[4], d_rows[2];

  // Given statistics: no centring, even if a sum is NaN.
  __device__ __forceinline__ A mean(A sum) const { return centre == 0 ? A(0) : sum * centre; }
};

// Per-channel means of dy γ, dy γ x̂, w dq and w dq p̂ (w: mask_weight), which centre the gradients of the batch norms.
enum Mean { kMeanG, kMeanGx, kMeanQ, kMeanQp, kMeans };

// Adds up a channel's partial sums of the samples of a group; computes what they add to its means and, if `write`, the
// gradients of the group's parameters. Called by all threads of a block. `scratch` holds kSums numbers per warp.
// `means` is valid after the next barrier.
template <class T>
__device__ void finish_channel(const BackwardCall<T>& call, int c, int group, bool write, acc_t<T>* scratch,
                               acc_t<T>* means) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const A* const sums = call.sums + int64_t{c} * call.parts * kSums;
  const int in_group = call.in_group(group, c);
  for (int i = lane; i < kSums; i += kWarp) {
    A total = 0;
    for (int part = warp; part < call.parts; part += warps) {
      if (!call.index || call.group_of(part / call.splits) == group) total += sums[int64_t{part} * kSums + i];
    }
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
    const int i = in_group * kTaps + k;
    d_bn = call.taps[0][i] * with_mask + call.taps[1][i] * with_inverse;
    if (write) {
      call.d_taps[2 * of].set(i, with_mask);
      call.d_taps[2 * of + 1].set(i, with_inverse);
    }
  }
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) d_bn += __shfl_xor_sync(kAllLanes, d_bn, offset);
  if (k == 0) means[of == 0 ? kMeanGx : kMeanG] = call.mean(d_bn);
  if (lane == 0) {
    const A weight = call.mask_weight[in_group];
    means[kMeanQ] = call.mean(weight * scratch[kSumQ]);
    means[kMeanQp] = call.mean(weight * scratch[kSumQp]);
    if (write) {
      call.d_mask_bias.set(in_group, scratch[kSumQ]);
      call.d_mask_weight.set(in_group, scratch[kSumQp]);
    }
  }
}

// What a sample adds to a channel's means, and the gradients of its rows. The first sample of a group stands for all of
// the group's. Called by all threads of a block, with scratch as above.
template <class T>
__device__ void finish_sample(const BackwardCall<T>& call, int c, int sample, acc_t<T>* scratch) {
  using A = acc_t<T>;
  A* const share = call.shares + (int64_t{c} * call.shape.n + sample) * kMeans;
  if (threadIdx.x < kMeans) share[threadIdx.x] = 0;
  const int group = call.group_of(sample);
  bool later = false;
  for (int other = threadIdx.x; other < sample; other += blockDim.x) later = later || call.group_of(other) == group;
  if (!__syncthreads_or(later)) {
    finish_channel(call, c, group, true, scratch, share);
    __syncthreads();
  }
  const int of = threadIdx.x;
  if (of >= 2) return;
  A total = 0;
  const A* const sums = call.sums + (int64_t{c} * call.parts + sample * call.splits) * kSums;
  for (int split = 0; split < call.splits; ++split) total += sums[split * kSums + of * kSumsOf + kAll];
  if (call.d_rows[of].data) call.d_rows[of].set(int64_t{sample} * call.shape.c + c, total);
  share[of == 0 ? kMeanGx : kMeanG] += call.mean(call.row(0, sample, c) * total);
}

// Reduces the sums over the block and writes them where finish_channel reads them.
template <bool kChannelsLast, int kCount, class A>
__device__ void write_sums(A (&sums)[kCount], bool channel, A* scratch, A* to) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if constexpr (kChannelsLast) {
    // Lanes are channels: reduce over warps only.
    for (int half = warps / 2; half > 0; half /= 2) {
      A* const mine = scratch + (warp % half) * kCount * kWarp + lane;
      __syncthreads();
      if (warp >= half && warp < 2 * half) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) mine[i * kWarp] = sums[i];
      }
      __syncthreads();
      if (warp < half) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[i] += mine[i * kWarp];
      }
    }
    if (warp == 0 && channel) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) to[i] = sums[i];
    }
  } else {
    warp_sum_scatter<kCount>(sums);
    const Scattered range = scattered<kCount>(lane);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ceil_div(kCount, kWarp); ++i) {
      if (i < range.count) scratch[warp * kCount + range.first + i] = sums[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kCount; i += blockDim.x) {
      A total = 0;
      for (int w = 0; w < warps; ++w) total += scratch[w * kCount + i];
      to[i] = total;
    }
  }
}

}  // namespace pixnorm::spn
