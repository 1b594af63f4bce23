// How the kernels of modulated norm stream through their tensors, and the work of a thread on a vector.
//
// Both layouts share the code. A thread owns vectors of V elements of x: V columns of one channel in NCHW, V channels
// of one pixel in channels_last. Single elements (V = 1) need no code per layout: only strides differ.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/parameter.cuh"
#include "cuda/reduce.cuh"
#include "cuda/statistics.cuh"
#include "cuda/vec.cuh"
#include "dispatch.h"

namespace pixnorm::modulate {

#include "activation_functions.h"

// Exact quotients of 0 <= i < 2^31, without a division.
struct Divisor {
  unsigned multiplier, shift;

  static Divisor of(unsigned by) {
    unsigned shift = 31;
    while (uint64_t{1} << (shift - 31) < by) ++shift;
    return {static_cast<unsigned>(((uint64_t{1} << shift) + by - 1) / by), shift};
  }
  __device__ __forceinline__ int quotient(int i) const {
    return static_cast<int>(uint64_t{static_cast<unsigned>(i)} * multiplier >> shift);
  }
};

// ---- mapping of threads to vectors ----

// A unit is a part of the vectors that one image has in one channel (NCHW), or in the `lanes` * V channels of a block
// (channels_last). `positions` threads share it, and a block processes `groups` units at a time. lanes, positions and
// groups are powers of two.
struct Plan {
  StatisticsShape view;  // the images whose statistics are shared, and their channels
  int channels;          // C
  int64_t planes;        // N C
  int vectors;           // of a whole image
  int row;               // vectors, of a row of x
  Divisor by_row;
  int step;  // elements between a thread's vectors i and i + 1
  int lanes, positions, groups;
  int blocks;           // over the channels of a group of statistics
  int chunks, chunk;    // units of an image, and the vectors of one
  int units;            // of a group of statistics
  int threads, splits;  // the grid is (groups of statistics * blocks, splits of their units)
};

constexpr int kThreads = 256;   // most per block, where statistics are known
constexpr int kMaxChunks = 64;  // units of an image: partial sums that a later kernel adds up

inline int power_of_two(int64_t least) {
  int p = 1;
  while (p < least) p *= 2;
  return p;
}

// What does not depend on the kernel. `vector`: V.
inline Plan plan_for(int n, int c, int h, int w, bool channels_last, bool instance, int vector, size_t itemsize) {
  Plan plan{};
  const auto view = instance ? StatisticsShape::instance : StatisticsShape::batch;
  plan.view = view(n, c, h * w, channels_last);
  plan.channels = c;
  plan.planes = int64_t{n} * c;
  plan.row = channels_last ? w : w / vector;
  plan.vectors = h * plan.row;
  if (!channels_last && w % vector != 0) plan.vectors = h * w / vector;  // without upsampling rows do not matter
  plan.by_row = Divisor::of(std::max(plan.row, 1));
  plan.step = channels_last ? c : vector;
  plan.lanes = 1;
  if (channels_last) {  // runs of 128 bytes
    while (plan.lanes < kWarp && plan.lanes * vector * itemsize < 128 && plan.lanes * vector < c) plan.lanes *= 2;
  }
  return plan;
}

inline void cut_channels(Plan& plan, int vector) {
  plan.blocks = ceil_div(plan.view.c, plan.view.channels_last ? plan.lanes * vector : 1);
}

// Cuts the work for about `target_blocks` blocks, of which each has a prologue. `most_splits`: bounds the sums that a
// later kernel adds up.
inline void cut(Plan& plan, int vector, int target_blocks, int most_splits) {
  cut_channels(plan, vector);
  const int most = kThreads / plan.lanes;
  // Small units: a thread per vector, so that neighbouring threads read neighbouring memory. Others: four vectors.
  plan.positions = 1;
  while (plan.positions < std::min(plan.vectors, most) && (plan.positions < 16 || plan.positions * 4 < plan.vectors))
    plan.positions *= 2;
  const int64_t of_group = int64_t{plan.view.groups} * plan.blocks;
  plan.chunks = 1;
  while (plan.chunks < kMaxChunks && of_group * plan.view.n * plan.chunks < 1 << 10 &&
         plan.vectors / (2 * plan.chunks) >= 4 * plan.positions)
    plan.chunks *= 2;
  plan.chunk = ceil_div(plan.vectors, plan.chunks);
  plan.chunks = ceil_div(plan.vectors, plan.chunk);
  plan.units = plan.view.n * plan.chunks;
  plan.groups = 1;
  while (plan.lanes * plan.positions * plan.groups < kWarp ||
         (plan.lanes * plan.positions * plan.groups < kThreads && plan.groups < plan.units))
    plan.groups *= 2;
  plan.threads = plan.lanes * plan.positions * plan.groups;
  const int rounds = ceil_div(plan.units, plan.groups);
  const int most_of_group = static_cast<int>(
      std::clamp<int64_t>(ceil_div<int64_t>(target_blocks, of_group), 1, std::min(rounds, most_splits)));
  plan.splits = ceil_div(rounds, ceil_div(rounds, most_of_group));
}

// Cuts instances for blocks of up to `most_threads` that read whole planes into registers, `held` vectors per thread.
// False if they do not fit.
inline bool cut_resident(Plan& plan, int vector, int held, int most_threads, size_t itemsize) {
  plan.positions = std::max(power_of_two(ceil_div(plan.vectors, held)), std::min(power_of_two(plan.vectors), 16));
  while (plan.lanes > 1 && plan.lanes * plan.positions > most_threads) plan.lanes /= 2;
  const int run = plan.lanes * vector;  // elements, in channels_last: at least the 32 bytes of a DRAM access
  if (plan.view.channels_last && run * itemsize < 32 && run < plan.channels) return false;
  if (plan.lanes * plan.positions > most_threads) return false;
  cut_channels(plan, vector);
  plan.chunks = 1, plan.chunk = plan.vectors;
  plan.units = plan.view.groups * plan.blocks;
  plan.groups = 1;
  while (plan.lanes * plan.positions * plan.groups < kWarp ||
         (plan.lanes * plan.positions * plan.groups < kThreads / 2 && plan.groups < plan.units))
    plan.groups *= 2;
  plan.threads = plan.lanes * plan.positions * plan.groups;
  plan.splits = 1;
  return true;
}

// The position of a thread in its block; after take_channels() its channels, after enter() its images.
template <int V, int U, bool kChannelsLast>
struct Place {
  static constexpr int kOwn = kChannelsLast ? V : 1;  // channels

  int lane, position, group;
  int set, c;    // group of statistics; first channel in it
  bool channel;  // whether c < C
  int row;       // first of its rows of parameters, the index of its plane: image * C + channel
  int64_t x, y;  // offsets of the image's first vector

  __device__ explicit Place(const Plan& plan) {
    const unsigned thread = threadIdx.x, lanes = plan.lanes, positions = plan.positions;
    lane = thread & (lanes - 1);
    const unsigned rest = lanes == 1 ? thread : thread / lanes;
    position = rest & (positions - 1);
    group = rest / positions;
  }

  __device__ void take_channels(const Plan& plan, int block) {
    set = block / plan.blocks;
    c = (block % plan.blocks * plan.lanes + lane) * kOwn;
    channel = set < plan.view.groups && c < plan.view.c;
  }

  // Index of its first channel's statistics.
  __device__ int statistic(const Plan& plan) const { return set * plan.view.c + c; }

  // `image`: in its group of statistics.
  __device__ int plane(const Plan& plan, int image) const {
    return static_cast<int>((int64_t{set} * plan.view.n + image) * plan.view.c + c);
  }
  __device__ void enter(const Plan& plan, int image) {
    const StatisticsShape& v = plan.view;
    const int64_t before = (int64_t{set} * v.n + image) * v.c;
    row = plane(plan, image);
    x = before * v.pixels + (v.channels_last ? c : int64_t{c} * v.pixels);
    y = v.channels_last ? before * v.pixels * (U * U) + c : x * (U * U);
  }
};

// ---- outputs of a vector of x ----

// The U x U outputs of each element, in vectors; or (kOne) one of these vectors, in kPasses passes.
template <class T, int V, int U, bool kChannelsLast, bool kOne = false>
struct Outputs {
  static constexpr int kAcross = kChannelsLast ? U : 1, kSize = kChannelsLast ? V : U * V;
  static constexpr int kDown = kOne ? 1 : U, kVecs = kOne ? 1 : kAcross, kPasses = kOne ? U * kAcross : 1;
  Vec<T, kSize> vecs[kDown][kVecs];

  // The element of x that output j of a vector belongs to.
  static constexpr int of(int j) { return kChannelsLast ? j : j / U; }

  // From the image's first output to those of vector i.
  static __device__ __forceinline__ int offset(const Plan& plan, int i) {
    return U == 1 ? i * plan.step : U * (i + plan.by_row.quotient(i) * plan.row) * plan.step;
  }
  // The same in a pass.
  static __device__ __forceinline__ int offset(const Plan& plan, int i, int pass) {
    return offset(plan, i) + (pass / kAcross * U * plan.row + pass % kAcross) * plan.step;
  }

  __device__ __forceinline__ void read(const Plan& plan, const T* from) {
#pragma unroll
    for (int a = 0; a < kDown; ++a) {
#pragma unroll
      for (int b = 0; b < kVecs; ++b) load(vecs[a][b], from + (a * U * plan.row + b) * plan.step);
    }
  }
  __device__ __forceinline__ void write(const Plan& plan, T* to) const {
#pragma unroll
    for (int a = 0; a < kDown; ++a) {
#pragma unroll
      for (int b = 0; b < kVecs; ++b) store(to + (a * U * plan.row + b) * plan.step, vecs[a][b]);
    }
  }
};

// ---- arguments ----

template <class T>
struct Call {
  using A = acc_t<T>;
  Plan plan;
  bool affine, rows;  // whether there are gamma and beta; (N, C) rather than (C,). Maps: neither.
  bool activated;
  A slope, eps, offset;
  const T* x;
  Parameter<T> gamma, beta;       // rows
  const T *gamma_map, *beta_map;  // maps
};

// Scale and shift of a thread's channels in one image, for rows.
template <class T, int kOwn>
struct Row {
  acc_t<T> scale[kOwn], shift[kOwn];

  __device__ __forceinline__ void set(const Call<T>& call, int row, bool channel) {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) scale[k] = 1, shift[k] = 0;
    if (!channel || !call.affine) return;
    const int first = call.rows ? row : row % call.plan.channels;
    call.gamma.template read<kOwn>(first, scale);
    call.beta.template read<kOwn>(first, shift);
#pragma unroll
    for (int k = 0; k < kOwn; ++k) scale[k] += call.offset;
  }
};

// ---- sums over threads ----

// Adds up over `width` threads of each lane: those whose indices differ by multiples of `lanes` below lanes * width,
// both powers of two. Called by all threads of a block; each gets the sums. `scratch`: sum_numbers(K, ...).
template <int K, class A>
__device__ __forceinline__ void segment_sum(A (&values)[K], int lanes, int width, A* scratch) {
  const int span = lanes * width;
  for (int offset = lanes; offset < min(span, kWarp); offset *= 2) {
#pragma unroll
    for (int i = 0; i < K; ++i) values[i] += __shfl_xor_sync(kAllLanes, values[i], offset);
  }
  if (span <= kWarp) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = span / kWarp;
  __syncthreads();
  if (lane < lanes) {
#pragma unroll
    for (int i = 0; i < K; ++i) scratch[(warp * K + i) * lanes + lane] = values[i];
  }
  __syncthreads();
  const A* const from = scratch + (warp & -warps) * K * lanes + (lane & (lanes - 1));
#pragma unroll
  for (int i = 0; i < K; ++i) {
    values[i] = 0;
    for (int w = 0; w < warps; ++w) values[i] += from[(w * K + i) * lanes];
  }
}

inline int sum_numbers(int sums, const Plan& plan) { return ceil_div(plan.threads, kWarp) * sums * plan.lanes; }

}  // namespace pixnorm::modulate
