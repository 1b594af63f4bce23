// Per-channel means and variances of one or two tensors, in groups of images: all of a batch (G = 1, batch norm), or
// each image by itself (G = N, instance norm).
//
// Two stages, with no atomics, so that every run gives the same bits. statistics_kernel (statistics.cu) leaves partial
// statistics in memory; the kernel that needs the statistics merges those of its channels in its prologue
// (finish_statistics), which saves a launch.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "dispatch.h"
#include "scalar.h"

namespace pixnorm {

// `groups` groups of n images each; images of c channels of `pixels` pixels. In NCHW there is one group: instance norm
// of (N, C, H, W) is batch norm of its view (1, N C, H, W).
struct StatisticsShape {
  int groups, n, c, pixels;
  bool channels_last;

  static StatisticsShape batch(int n, int c, int pixels, bool channels_last) {
    return {1, n, c, pixels, channels_last};
  }
  static StatisticsShape instance(int n, int c, int pixels, bool channels_last) {
    return channels_last ? StatisticsShape{n, 1, c, pixels, true} : StatisticsShape{1, 1, n * c, pixels, false};
  }
};

// Partial statistics: [tensor, group][part][count, mean, sum of squared deviations from that mean][C]. No part
// straddles two groups. `set`: the index of tensor and group, tensor * groups + group.
template <class A>
struct Partials {
  A* data;
  int parts, c;

  __device__ __forceinline__ A* at(int set, int part, int channel) const {
    return data + (int64_t{set * parts + part} * 3) * c + channel;
  }
  __device__ void store(int set, int part, int channel, A count, A mean, A m2) const {
    A* to = at(set, part, channel);
    to[0] = count, to[c] = mean, to[2 * c] = m2;
  }
  // Merges parts [begin, end), none of which is empty, by Chan's formula.
  __device__ void merge(int set, int channel, int begin, int end, A& count, A& mean, A& m2) const {
    count = 0, mean = 0, m2 = 0;
    if (begin >= end) return;
    const A about = at(set, begin, channel)[c];
    A sum = 0;
    for (int part = begin; part < end; ++part) {
      const A* from = at(set, part, channel);
      count += from[0];
      sum += from[0] * (from[c] - about);
    }
    mean = about + sum / count;
    for (int part = begin; part < end; ++part) {
      const A* from = at(set, part, channel);
      const A d = from[c] - mean;
      m2 += fma(from[0] * d, d, from[2 * c]);
    }
  }
};

// Mean and biased variance of kSets sets, the first and every `set_stride`-th after it, for a thread's channel. Called
// by all threads of a block: each warp merges a share of the parts, and every thread gets the result. Lanes are
// channels, or all lanes of a block have one channel.
//
// `scratch` holds finish_numbers() numbers; barriers before its first use are the caller's.
template <int kSets, bool kLanesAreChannels, class A>
__device__ void finish_statistics(const Partials<A>& partials, int first_set, int set_stride, int c, bool channel,
                                  int lane_channel, A* scratch, A (&statistics)[2 * kSets]) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Partials<A> shares{scratch, warps, kLanesAreChannels ? kWarp : 1};
  // The first share is never empty.
  const int share = ceil_div(partials.parts, warps), begin = min(share * warp, partials.parts);
  const int end = channel ? min(begin + share, partials.parts) : begin;
  for (int i = 0; i < kSets; ++i) {
    A count, mean, m2;
    partials.merge(first_set + i * set_stride, c, begin, end, count, mean, m2);
    if (kLanesAreChannels || threadIdx.x % kWarp == 0) shares.store(i, warp, lane_channel, count, mean, m2);
  }
  __syncthreads();
  for (int i = 0; i < kSets; ++i) {
    A count, m2;
    shares.merge(i, lane_channel, 0, warps, count, statistics[2 * i], m2);
    statistics[2 * i + 1] = m2 / count;
  }
  __syncthreads();
}

constexpr int finish_numbers(int sets, int threads, bool lanes_are_channels) {
  return sets * 3 * (threads / kWarp) * (lanes_are_channels ? kWarp : 1);
}

// How statistics_kernel cuts its work.
struct StatisticsPlan {
  int vector;   // elements of a load
  int lanes;    // channels_last: threads side by side over channels, `vector` channels each, so runs of 128 bytes
  int blocks;   // blocks over the channels of a group
  int parts;    // of a group
  int threads;  // of a block
};

constexpr int kMaxParts = 64;  // partial results per channel that a later kernel merges

// The second tensor may be nullptr.
template <class T>
StatisticsPlan plan_statistics(const StatisticsShape& s, const T* first, const T* second);

// Launches statistics_kernel on one tensor or, where `second` is not nullptr, on two. `partials` has room for
// tensors * groups * plan.parts * 3 * C numbers.
template <class T>
void launch_statistics(const StatisticsShape& s, const StatisticsPlan& plan, const T* first, const T* second,
                       const Partials<acc_t<T>>& partials, cudaStream_t stream);

// Both stages: writes mean and variance, [tensor, group][C] each. `like`: a tensor of the device, for memory.
template <class T>
void compute_statistics(const StatisticsShape& s, const torch::stable::Tensor& like, const T* first, const T* second,
                        acc_t<T>* mean, acc_t<T>* var, cudaStream_t stream);

}  // namespace pixnorm
