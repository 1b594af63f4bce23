// Statistics on NVIDIA GPUs: means and variances of activations, and the running ones of a layer.
//
// Work is cut by shape alone and sums are added in a fixed order: every run gives the same bits.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <climits>
#include <tuple>

#include "cuda/reduce.cuh"
#include "cuda/statistics.cuh"
#include "cuda/vec.cuh"
#include "statistics_arguments.h"

namespace pixnorm {
namespace {

// ---- partial statistics ----

// Sums of deviations from the first value: a mean far from zero costs no digits.
template <class A>
struct ShiftedSums {
  A shift = 0, sum = 0, square = 0;

  __device__ __forceinline__ void add(A value) {
    const A d = value - shift;
    sum += d;
    square = fma(d, d, square);
  }
  __device__ __forceinline__ A mean(A count) const { return shift + sum / count; }
  __device__ __forceinline__ A squares_about_mean(A count) const {
    const A m2 = square - sum * (sum / count);
    return m2 < 0 ? 0 : m2;  // rounding may leave it negative; NaN stays
  }
};

constexpr int kStatisticsThreads = 256;

template <class T>
struct StatisticsCall {
  StatisticsShape shape;
  const T *first, *second;
  Partials<acc_t<T>> partials;
  int blocks, lanes;  // of the plan

  // The second tensor first: SPN's product has just written it, and L2 may still hold it.
  __device__ int tensor() const { return gridDim.z - 1 - blockIdx.z; }
  __device__ const T* data() const { return tensor() == 0 ? first : second; }
};

// NCHW: a part of the vectors of one channel. The grid is (C, parts, tensors).
template <class T, int V>
__device__ void statistics_of_plane(const StatisticsCall<T>& call, acc_t<T>* scratch) {
  using A = acc_t<T>;
  constexpr int kUnroll = 4;
  const StatisticsShape& s = call.shape;
  const int c = blockIdx.x, per_plane = s.pixels / V;
  const int64_t all = int64_t{s.n} * per_plane;
  const int64_t begin = all * blockIdx.y / gridDim.y, end = all * (blockIdx.y + 1) / gridDim.y;
  const int step = blockDim.x, step_n = step / per_plane, step_i = step % per_plane;
  const T* const data = call.data() + int64_t{c} * s.pixels;

  // Vector i of image n, advanced without a division.
  int64_t at = begin + threadIdx.x;
  int n = static_cast<int>(at / per_plane), i = static_cast<int>(at % per_plane);
  ShiftedSums<A> sums;
  int64_t count = 0;
  while (at < end) {
    Vec<T, V> vecs[kUnroll];
    bool valid[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      valid[u] = at < end;
      if (valid[u]) load(vecs[u], data + int64_t{n} * s.c * s.pixels + i * V);
      at += step;
      n += step_n;
      i += step_i;
      if (i >= per_plane) i -= per_plane, ++n;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!valid[u]) continue;
      A values[V];
      unpack(vecs[u], values);
      if (count == 0) sums.shift = values[0];
#pragma unroll
      for (int j = 0; j < V; ++j) sums.add(values[j]);
      count += V;
    }
  }

  const A mine = static_cast<A>(count), whole = static_cast<A>((end - begin) * V);
  const A about = static_cast<A>(data[int64_t{begin / per_plane} * s.c * s.pixels + begin % per_plane * V]);
  const A mean_of_mine = count ? sums.mean(mine) : about;
  const A mean = about + block_sum(mine * (mean_of_mine - about), scratch) / whole;
  const A d = mean_of_mine - mean;
  const A m2 = block_sum(count ? fma(mine * d, d, sums.squares_about_mean(mine)) : A(0), scratch);
  if (threadIdx.x == 0) call.partials.store(call.tensor(), blockIdx.y, c, whole, mean, m2);
}

// channels_last: a part of the pixels of a group, for `lanes` * V channels. The grid is (groups * blocks of channels,
// parts, tensors).
template <class T, int V>
__device__ void statistics_of_pixels(const StatisticsCall<T>& call, acc_t<T>* scratch) {
  using A = acc_t<T>;
  constexpr int kUnroll = V > 4 ? 2 : 4;  // registers: each of V channels has sums of its own
  const StatisticsShape& s = call.shape;
  const int group = blockIdx.x / call.blocks, block = blockIdx.x % call.blocks;
  const int lane = threadIdx.x % call.lanes, c = (block * call.lanes + lane) * V;
  const int64_t all = int64_t{s.n} * s.pixels;
  const int64_t begin = all * blockIdx.y / gridDim.y, end = all * (blockIdx.y + 1) / gridDim.y;
  const int team = threadIdx.x / call.lanes, teams = blockDim.x / call.lanes;
  const T* const data = call.data() + group * all * s.c + c;

  ShiftedSums<A> sums[V];
  int64_t count = 0;
  if (c < s.c) {
    for (int64_t at = begin + team; at < end; at += kUnroll * teams) {
      Vec<T, V> vecs[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (at + u * teams < end) load(vecs[u], data + (at + u * teams) * s.c);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (at + u * teams >= end) continue;
        A values[V];
        unpack(vecs[u], values);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          if (count == 0) sums[j].shift = values[j];
          sums[j].add(values[j]);
        }
        ++count;
      }
    }
  }

  // [team][mean, squares][channel of the block]; team t has seen every teams-th pixel from the t-th on.
  const int channels = call.lanes * V;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    A* to = scratch + team * 2 * channels + lane * V + j;
    to[0] = count ? sums[j].mean(static_cast<A>(count)) : A(0);
    to[channels] = count ? sums[j].squares_about_mean(static_cast<A>(count)) : A(0);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < channels; i += blockDim.x) {
    const int channel = block * channels + i;
    if (channel >= s.c) continue;
    const auto of_team = [&](int t) { return static_cast<A>((end - begin - t + teams - 1) / teams); };
    const A about = scratch[i], whole = static_cast<A>(end - begin);
    const int busy = static_cast<int>(end - begin < teams ? end - begin : teams);
    A sum = 0, m2 = 0;
    for (int t = 0; t < busy; ++t) sum += of_team(t) * (scratch[t * 2 * channels + i] - about);
    const A mean = about + sum / whole;
    for (int t = 0; t < busy; ++t) {
      const A d = scratch[t * 2 * channels + i] - mean;
      m2 += fma(of_team(t) * d, d, scratch[(t * 2 + 1) * channels + i]);
    }
    call.partials.store(call.tensor() * s.groups + group, blockIdx.y, channel, whole, mean, m2);
  }
}

template <class T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kStatisticsThreads, 4) statistics_kernel(const StatisticsCall<T> call) {
  if constexpr (kChannelsLast) {
    statistics_of_pixels<T, V>(call, shared_memory<acc_t<T>>());
  } else {
    statistics_of_plane<T, V>(call, shared_memory<acc_t<T>>());
  }
}

template <class T>
constexpr int kMostElements = static_cast<int>(16 / sizeof(T));  // of a load

}  // namespace

template <class T>
StatisticsPlan plan_statistics(const StatisticsShape& s, const T* first, const T* second) {
  constexpr int kMost = kMostElements<T>;
  const bool fits = (s.channels_last ? s.c : s.pixels) % kMost == 0 && is_aligned(first, 16) && is_aligned(second, 16);
  StatisticsPlan plan{fits ? kMost : 1, 1, s.c, 1, kStatisticsThreads};
  if (s.channels_last) {
    while (plan.lanes * plan.vector * sizeof(T) < 128 && plan.lanes < kWarp && plan.lanes * plan.vector < s.c)
      plan.lanes *= 2;
    plan.blocks = ceil_div(s.c, plan.lanes * plan.vector);
  }
  // Enough blocks to fill any GPU, each with enough work; but few parts to merge, above all in channels_last, where a
  // block of the next kernel merges those of 32 channels.
  constexpr int64_t kElementsOfBlock = 1 << 13;
  const int64_t pixels = int64_t{s.n} * s.pixels;
  const int64_t elements = pixels * (s.channels_last ? plan.lanes * plan.vector : 1);
  const int64_t wanted = ceil_div<int64_t>(s.channels_last ? 256 : 512, int64_t{s.groups} * plan.blocks);
  plan.parts = static_cast<int>(std::min<int64_t>({wanted, ceil_div(elements, kElementsOfBlock), kMaxParts}));
  if (!s.channels_last) {  // small planes: no idle warps
    const int64_t vectors = ceil_div<int64_t>(pixels / plan.vector, plan.parts);
    plan.threads = static_cast<int>(std::min<int64_t>(kStatisticsThreads, ceil_div<int64_t>(vectors, kWarp) * kWarp));
  }
  return plan;
}

template <class T>
void launch_statistics(const StatisticsShape& s, const StatisticsPlan& plan, const T* first, const T* second,
                       const Partials<acc_t<T>>& partials, cudaStream_t stream) {
  STD_TORCH_CHECK(int64_t{s.groups} * plan.blocks <= INT_MAX, "pixnorm: more than 2^31 groups of channels");
  const StatisticsCall<T> call{s, first, second, partials, plan.blocks, plan.lanes};
  const dim3 grid(s.groups * plan.blocks, plan.parts, second ? 2 : 1);
  const auto run = [&](auto kernel, int numbers) {
    launch(kernel, {grid, dim3(plan.threads), numbers * sizeof(acc_t<T>), stream}, call);
  };
  constexpr int kMost = kMostElements<T>;
  if (s.channels_last) {
    const int numbers = 2 * kStatisticsThreads * plan.vector;
    plan.vector > 1 ? run(statistics_kernel<T, kMost, true>, numbers) : run(statistics_kernel<T, 1, true>, numbers);
  } else {
    const int numbers = kStatisticsThreads / kWarp;
    plan.vector > 1 ? run(statistics_kernel<T, kMost, false>, numbers) : run(statistics_kernel<T, 1, false>, numbers);
  }
}

namespace {

constexpr int kFinishWarps = 8;

// The second stage as a kernel of its own: lanes are channels. The grid is sets * blocks of 32 channels.
template <class A>
__global__ void __launch_bounds__(kFinishWarps* kWarp)
    finish_statistics_kernel(const Partials<A> partials, int blocks, A* mean, A* var) {
  const int set = blockIdx.x / blocks, lane = threadIdx.x % kWarp, c = blockIdx.x % blocks * kWarp + lane;
  const bool channel = c < partials.c;
  A statistics[2];
  finish_statistics<1, true>(partials, set, 0, c, channel, lane, shared_memory<A>(), statistics);
  if (channel && threadIdx.x < kWarp) {
    mean[int64_t{set} * partials.c + c] = statistics[0];
    var[int64_t{set} * partials.c + c] = statistics[1];
  }
}

}  // namespace

template <class T>
void compute_statistics(const StatisticsShape& s, const Tensor& like, const T* first, const T* second, acc_t<T>* mean,
                        acc_t<T>* var, cudaStream_t stream) {
  using A = acc_t<T>;
  const StatisticsPlan plan = plan_statistics(s, first, second);
  const int64_t sets = (second ? 2 : 1) * s.groups;
  const int blocks = ceil_div(s.c, kWarp);
  STD_TORCH_CHECK(sets * std::max(plan.parts, blocks) <= INT_MAX, "pixnorm: more than 2^31 partial statistics");
  const Tensor memory = empty_like(like, {sets, plan.parts, 3, s.c}, dtype_of<A>);
  const Partials<A> partials{static_cast<A*>(memory.data_ptr()), plan.parts, s.c};
  launch_statistics(s, plan, first, second, partials, stream);
  const int threads = std::min(plan.parts, kFinishWarps) * kWarp;
  launch(
      finish_statistics_kernel<A>,
      {dim3(static_cast<unsigned>(sets) * blocks), dim3(threads), finish_numbers(1, threads, true) * sizeof(A), stream},
      partials, blocks, mean, var);
}

#define PIXNORM_INSTANTIATE(T)                                                                                         \
  template StatisticsPlan plan_statistics<T>(const StatisticsShape&, const T*, const T*);                              \
  template void launch_statistics<T>(const StatisticsShape&, const StatisticsPlan&, const T*, const T*,                \
                                     const Partials<acc_t<T>>&, cudaStream_t);                                         \
  template void compute_statistics<T>(const StatisticsShape&, const Tensor&, const T*, const T*, acc_t<T>*, acc_t<T>*, \
                                      cudaStream_t);
PIXNORM_INSTANTIATE(double)
PIXNORM_INSTANTIATE(float)
PIXNORM_INSTANTIATE(BFloat16)
PIXNORM_INSTANTIATE(Half)
#undef PIXNORM_INSTANTIATE

namespace {

// ---- the op `statistics` ----

StatisticsShape shape_of(const StatisticsInput& in, bool instance) {
  STD_TORCH_CHECK(in.n * in.c <= INT_MAX && in.pixels <= INT_MAX,
                  "pixnorm: the planes, or the pixels of one, are more than 2^31");
  const auto shape = instance ? StatisticsShape::instance : StatisticsShape::batch;
  return shape(static_cast<int>(in.n), static_cast<int>(in.c), static_cast<int>(in.pixels), in.channels_last);
}

std::tuple<Tensor, Tensor> statistics(const std::vector<Tensor>& tensors, bool instance) {
  STD_TORCH_CHECK(!tensors.empty(), "pixnorm: expected one or two tensors");
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  const StatisticsInput in(tensors);
  return dispatch_floating(in.tensors[0].scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor mean = statistics_result<A>(in, instance), var = statistics_result<A>(in, instance);
    if (in.tensors[0].numel() == 0) return {mean, var};
    const StatisticsShape s = shape_of(in, instance);
    const T* const first = data_of<T>(in.tensors[0]);
    const T* const second = in.count() == 2 ? data_of<T>(in.tensors[1]) : nullptr;
    compute_statistics(s, in.tensors[0], first, second, static_cast<A*>(mean.data_ptr()),
                       static_cast<A*>(var.data_ptr()), current_stream(in.tensors[0]));
    return {mean, var};
  });
}

// ---- the op `update_running` ----

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

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CUDA, m) {
  m.impl("statistics", TORCH_BOX(&pixnorm::statistics));
  m.impl("update_running", TORCH_BOX(&pixnorm::update_running));
}
