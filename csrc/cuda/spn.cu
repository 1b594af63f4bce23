// SPN on NVIDIA GPUs, forward: statistics of x and p, then modulate. (Backward is in spn_backward.cu.)
//
// Work is cut by shape alone, and sums are added in a fixed order: the same bits on every run.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/spn_call.cuh"

namespace pixnorm::spn {
namespace {

// ---- statistics ----

// Sums about a value of one's own, so that a mean far from zero costs no digits.
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
    return m2 < 0 ? 0 : m2;  // by rounding; NaN stays
  }
};

// Statistics of parts of a channel, which add up to those of the channel by the formula for groups:
// [tensor: x, p][part][count, mean, sum of squares about it][C].
template <class A>
struct Partials {
  A* data;
  int parts, c;

  __device__ __forceinline__ A* at(int tensor, int part, int channel) const {
    return data + (int64_t{tensor * parts + part} * 3) * c + channel;
  }
  __device__ void set(int tensor, int part, int channel, A count, A mean, A m2) const {
    A* to = at(tensor, part, channel);
    to[0] = count, to[c] = mean, to[2 * c] = m2;
  }
  // Of parts [begin, end): none have count 0.
  __device__ void add_up(int tensor, int channel, int begin, int end, A& count, A& mean, A& m2) const {
    count = 0, mean = 0, m2 = 0;
    if (begin >= end) return;
    const A about = at(tensor, begin, channel)[c];
    A sum = 0;
    for (int part = begin; part < end; ++part) {
      const A* from = at(tensor, part, channel);
      count += from[0];
      sum += from[0] * (from[c] - about);
    }
    mean = about + sum / count;
    for (int part = begin; part < end; ++part) {
      const A* from = at(tensor, part, channel);
      const A d = from[c] - mean;
      m2 += fma(from[0] * d, d, from[2 * c]);
    }
  }
};

constexpr int kStatisticsThreads = 256;

template <class T>
struct StatisticsCall {
  Shape shape;
  const T *x, *p;
  Partials<acc_t<T>> partials;  // parts: splits
  int lanes;                    // channels_last: threads side by side over the channels

  // p first: the product has just written it.
  __device__ int which() const { return 1 - blockIdx.z; }
  __device__ const T* tensor() const { return which() == 0 ? x : p; }
};

// A split of the vectors of one channel: the grid is (C, splits, 2).
template <class T, int V>
__device__ void statistics_of_plane(const StatisticsCall<T>& call, acc_t<T>* scratch) {
  using A = acc_t<T>;
  constexpr int kUnroll = 4;
  const Shape& s = call.shape;
  const int c = blockIdx.x, per_plane = s.pixels() / V;
  const int64_t all = int64_t{s.n} * per_plane;
  const int64_t begin = all * blockIdx.y / gridDim.y, end = all * (blockIdx.y + 1) / gridDim.y;
  const int step = blockDim.x, step_n = step / per_plane, step_i = step % per_plane;
  const T* const data = call.tensor() + int64_t{c} * s.pixels();

  // Vector i of plane n, kept up to date without a division.
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
      if (valid[u]) load(vecs[u], data + int64_t{n} * s.c * s.pixels() + i * V);
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
  const A about = static_cast<A>(data[int64_t{begin / per_plane} * s.c * s.pixels() + begin % per_plane * V]);
  const A mean_of_mine = count ? sums.mean(mine) : about;
  const A mean = about + block_sum(mine * (mean_of_mine - about), scratch) / whole;
  const A d = mean_of_mine - mean;
  const A m2 = block_sum(count ? fma(mine * d, d, sums.squares_about_mean(mine)) : A(0), scratch);
  if (threadIdx.x == 0) call.partials.set(call.which(), blockIdx.y, c, whole, mean, m2);
}

// A split of the pixels of `lanes` x V channels: the grid is (groups of channels, splits, 2).
template <class T, int V>
__device__ void statistics_of_pixels(const StatisticsCall<T>& call, acc_t<T>* scratch) {
  using A = acc_t<T>;
  constexpr int kUnroll = V > 4 ? 2 : 4;  // registers: each of V channels has sums of its own
  const Shape& s = call.shape;
  const int lane = threadIdx.x % call.lanes, c = (blockIdx.x * call.lanes + lane) * V;
  const int64_t all = int64_t{s.n} * s.pixels();
  const int64_t begin = all * blockIdx.y / gridDim.y, end = all * (blockIdx.y + 1) / gridDim.y;
  const int team = threadIdx.x / call.lanes, teams = blockDim.x / call.lanes;
  const T* const data = call.tensor() + c;

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
    const int channel = blockIdx.x * channels + i;
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
    call.partials.set(call.which(), blockIdx.y, channel, whole, mean, m2);
  }
}

template <class T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kStatisticsThreads, 4) spn_statistics_kernel(const StatisticsCall<T> call) {
  if constexpr (kChannelsLast) {
    statistics_of_pixels<T, V>(call, shared_memory<acc_t<T>>());
  } else {
    statistics_of_plane<T, V>(call, shared_memory<acc_t<T>>());
  }
}

// How the threads of a block lie over the channels of a channels_last tensor: `lanes` with `vector` channels each, runs
// of 128 bytes.
struct StatisticsPlan {
  int vector, lanes, blocks, splits;
};

template <class T>
StatisticsPlan statistics_plan(const Shape& s, bool channels_last, const T* x, const T* p) {
  constexpr int kMost = static_cast<int>(16 / sizeof(T));
  const bool fits = (channels_last ? s.c : s.pixels()) % kMost == 0 && is_aligned(x, 16) && is_aligned(p, 16);
  StatisticsPlan plan{fits ? kMost : 1, 1, s.c, 1};
  if (channels_last) {
    while (plan.lanes * plan.vector * sizeof(T) < 128 && plan.lanes < kWarp && plan.lanes * plan.vector < s.c)
      plan.lanes *= 2;
    plan.blocks = ceil_div(s.c, plan.lanes * plan.vector);
  }
  // Blocks enough for any GPU, each with enough to do; but few to add up, above all where a block adds up 32 channels.
  constexpr int64_t kElementsOfBlock = 1 << 13;
  const int64_t elements = int64_t{s.n} * s.pixels() * (channels_last ? plan.lanes * plan.vector : 1);
  const int64_t wanted = ceil_div<int64_t>(channels_last ? 256 : 512, plan.blocks);
  plan.splits = static_cast<int>(std::min<int64_t>({wanted, ceil_div(elements, kElementsOfBlock), kMaxSplits}));
  return plan;
}

template <class T>
void launch_statistics(StatisticsCall<T> call, const StatisticsPlan& plan, bool channels_last, cudaStream_t stream) {
  call.lanes = plan.lanes;
  dispatch_bool(channels_last, [&](auto last) {
    dispatch_bool(plan.vector > 1, [&](auto vectors) {
      constexpr int kVector = vectors() ? static_cast<int>(16 / sizeof(T)) : 1;
      const int numbers = last() ? 2 * kStatisticsThreads * kVector : kStatisticsThreads / kWarp;
      launch(spn_statistics_kernel<T, kVector, last()>,
             {dim3(plan.blocks, plan.splits, 2), dim3(kStatisticsThreads), numbers * sizeof(acc_t<T>), stream}, call);
    });
  });
}

// ---- forward modulate ----

template <class T>
struct ForwardCall : Call<T> {
  using A = acc_t<T>;
  Partials<A> partials;  // data == nullptr: the statistics are given
  const A* given[4];     // mean, var, mask_mean, mask_var
  A* used[4];
  T* y;
};

// Mean and biased variance of x and of p, of a thread's channel; by all threads of the block, each warp a share of the
// parts.
template <bool kChannelsLast, class A>
__device__ void finish_statistics(const Partials<A>& partials, int c, bool channel, int lane_channel, A* scratch,
                                  A (&statistics)[4]) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Partials<A> shares{scratch, warps, kChannelsLast ? kWarp : 1};
  // The first share is never empty.
  const int share = ceil_div(partials.parts, warps), begin = min(share * warp, partials.parts);
  const int end = channel ? min(begin + share, partials.parts) : begin;
  for (int tensor = 0; tensor < 2; ++tensor) {
    A count, mean, m2;
    partials.add_up(tensor, c, begin, end, count, mean, m2);
    if (kChannelsLast || threadIdx.x % kWarp == 0) shares.set(tensor, warp, lane_channel, count, mean, m2);
  }
  __syncthreads();
  for (int tensor = 0; tensor < 2; ++tensor) {
    A count, m2;
    shares.add_up(tensor, lane_channel, 0, warps, count, statistics[2 * tensor], m2);
    statistics[2 * tensor + 1] = m2 / count;
  }
  __syncthreads();
}

template <class T, int V, int U, bool kChannelsLast>
__global__ void __launch_bounds__(kMostThreads<T, kChannelsLast>, kBlocksAtOnce<T, kChannelsLast>)
    spn_fwd_modulate_kernel(const ForwardCall<T> call) {
  using A = acc_t<T>;
  const Shape& s = call.shape;
  const Plan& plan = call.plan;
  Place<V, kChannelsLast> place(s, plan);
  A* const memory = shared_memory<A>();
  using TableHere = Table<T, U, kChannelsLast>;
  Affine<T, V, U, kChannelsLast, U == 1> affine{TableHere(memory, place.lane_channel), {}};
  Neighbours<A, 1, kChannelsLast> neighbours(memory + TableHere::kNumbers, place.position, plan.positions);

  Channel<T> channel{};
  A statistics[4] = {0, 1, 0, 1};
  if (call.partials.data) {
    finish_statistics<kChannelsLast>(call.partials, place.c, place.channel, place.lane_channel,
                                     memory + TableHere::kNumbers, statistics);
  } else if (place.channel) {
    for (int i = 0; i < 4; ++i) statistics[i] = call.given[i][place.c];
  }
  if (place.channel) {
    if (blockIdx.y == 0 && place.position == 0 && place.group == 0) {
      for (int i = 0; i < 4; ++i) call.used[i][place.c] = statistics[i];
    }
    channel.set(call, place.c, statistics[0], statistics[1], statistics[2], statistics[3]);
  }
  // y = gamma x̂ + beta = (rstd gamma) (x - mean) + beta
  affine.table.fill(call, place.lane_channel, channel.rstd);
  __syncthreads();
  affine.take_taps();

  const int pixel = kChannelsLast ? s.c : 1;  // stride
  const bool whole = plan.rows >= s.h;
  for (int round = blockIdx.y; round * plan.groups < plan.strips; round += gridDim.y) {
    place.enter(round * plan.groups + place.group, s, plan);
    const int64_t base = place.base(s, 1);
    const T* const x = call.x + base;
    const T* const p = call.p + base;
    T* const y = call.y + place.base(s, U);

    Row<T, V, kChannelsLast> p_next{}, x_row{};
    const auto inside = [&](int h) { return place.inside && h >= 0 && h < s.h; };
    const auto load_row = [&](Row<T, V, kChannelsLast>& row, const T* from, int h) {
      load(row, from + (h * s.w + place.column) * pixel, s.c);
    };
    A mask[3][V + 2] = {};
    const int begin = whole ? 0 : -1;
    if (inside(place.row + begin)) load_row(p_next, p, place.row + begin);
    for (int i = begin; i <= plan.rows; ++i) {
      // The mask of row t arrives; then that before it is complete.
      const int t = place.row + i, h = t - 1;
      slide<A, V>(mask);
      {
        const Row<T, V, kChannelsLast> p_row = p_next;
        if (i < plan.rows && inside(t + 1)) load_row(p_next, p, t + 1);
        A values[V];
        unpack(p_row, values);
#pragma unroll
        for (int j = 0; j < V; ++j) mask[2][j + 1] = inside(t) ? channel.mask(values[j]) : A(0);
        const A first[1] = {mask[2][1]}, last[1] = {mask[2][V]};
        A left[1], right[1];
        neighbours.exchange(first, last, left, right);
        mask[2][0] = left[0], mask[2][V + 1] = right[0];
      }
      const Row<T, V, kChannelsLast> x_of_h = x_row;
      if (i >= 0 && i < plan.rows && place.owns && t < s.h) load_row(x_row, x, t);
      if (i < 1 || !place.owns || h >= s.h) continue;

      A d[V];
      unpack(x_of_h, d);
#pragma unroll
      for (int j = 0; j < V; ++j) d[j] -= channel.mean;
#pragma unroll
      for (int a = 0; a < U; ++a) {
        A gamma[U * V], result[U * V];
        affine.template row<0>(a, h, s.h, place.first, place.last, mask, gamma);
        affine.template row<1>(a, h, s.h, place.first, place.last, mask, result);
#pragma unroll
        for (int j = 0; j < U * V; ++j) {
          result[j] = fma(gamma[j], d[j / U], result[j]);
          if (call.activated) activate(result[j], call.slope);
        }
        store<kChannelsLast, U * V>(y + ((U * h + a) * U * s.w + U * place.column) * pixel, result, s.c);
      }
    }
  }
}

template <class T>
void launch_forward(ForwardCall<T> call, bool channels_last, int64_t upsample, cudaStream_t stream) {
  dispatch_layout(channels_last, upsample, [&](auto last, auto u) {
    dispatch_columns<T, u(), last()>(call.shape, {call.x, call.p}, call.y, [&](auto columns) {
      call.plan = make_plan<T, columns(), last()>(call.shape);
      using TableHere = Table<T, u(), last()>;
      const int walking = Neighbours<acc_t<T>, 1, last()>::numbers(call.plan.threads);
      const int finishing = 2 * 3 * call.plan.threads / kWarp * TableHere::kChannels;  // see finish_statistics
      const size_t bytes = (TableHere::kNumbers + std::max(walking, finishing)) * sizeof(acc_t<T>);
      launch(spn_fwd_modulate_kernel<T, columns(), u(), last()>, launch_of(call.plan, bytes, stream), call);
    });
  });
}

// ---- the op ----

void project(const Shape& s, bool channels_last, const Tensor& weight, const Tensor& x, const Tensor& p, bool tf32) {
  const Matrices in = as_matrices(x, s, channels_last), out = as_matrices(p, s, channels_last);
  const Matrices w = repeated(as_matrix(weight, s), in.batch);
  channels_last ? gemm(out, in, w.transposed(), 0, tf32) : gemm(out, w, in, 0, tf32);
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult spn_fwd(const Tensor& x, const Tensor& mask_projection, const Tensor& mask_weight,
                      const Tensor& mask_bias, const Tensor& gamma_weight, const Tensor& gamma_weight_inv,
                      const Tensor& beta_weight, const Tensor& beta_weight_inv, const std::optional<Tensor>& mean,
                      const std::optional<Tensor>& var, const std::optional<Tensor>& mask_mean,
                      const std::optional<Tensor>& mask_var, double eps, int64_t upsample,
                      std::optional<double> negative_slope, bool allow_tf32) {
  const Shape s = shape_of(x, upsample);
  const bool given = mean.has_value();
  STD_TORCH_CHECK(var.has_value() == given && mask_mean.has_value() == given && mask_var.has_value() == given,
                  "pixnorm: give all four statistics or none");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ParameterTensors parameters(s, mask_projection, mask_weight, mask_bias,
                                    {&gamma_weight, &gamma_weight_inv, &beta_weight, &beta_weight_inv});
  const MemoryFormat layout = layout_of(x);
  const bool channels_last = layout == MemoryFormat::ChannelsLast;
  const cudaStream_t stream = current_stream(x);
  return dispatch_floating(x.scalar_type(), [&](auto type) -> ForwardResult {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor x_dense = dense(x, layout);
    const Tensor y = empty_like(x, {s.n, s.c, s.h * upsample, s.w * upsample}, dtype_of<T>, layout);
    const Tensor p = empty_like(x, {s.n, s.c, s.h, s.w}, dtype_of<T>, layout);
    Tensor used[4], statistics[4];
    for (Tensor& t : used) t = empty_like(x, {s.c}, dtype_of<A>);
    if (given) {
      const Tensor* const from[4] = {&*mean, &*var, &*mask_mean, &*mask_var};
      for (int i = 0; i < 4; ++i) statistics[i] = statistic<A>(*from[i], s);
    }
    if (s.numel() == 0) {
      for (int i = 0; i < 4; ++i) given ? torch::stable::copy_(used[i], statistics[i]) : torch::stable::zero_(used[i]);
      return {y, p, used[0], used[1], used[2], used[3]};
    }

    project(s, channels_last, in_dtype(parameters.mask_projection, dtype_of<T>), x_dense, p, allow_tf32);
    ForwardCall<T> call{};
    parameters.set_up(call, s, eps, negative_slope, x_dense, p);
    call.y = static_cast<T*>(y.data_ptr());
    for (int i = 0; i < 4; ++i) {
      call.used[i] = static_cast<A*>(used[i].data_ptr());
      if (given) call.given[i] = data_of<A>(statistics[i]);
    }
    Tensor partials;
    if (!given) {
      const StatisticsPlan plan = statistics_plan(s, channels_last, call.x, call.p);
      partials = empty_like(x, {2, plan.splits, 3, s.c}, dtype_of<A>);
      call.partials = {static_cast<A*>(partials.data_ptr()), plan.splits, s.c};
      launch_statistics(StatisticsCall<T>{s, call.x, call.p, call.partials, 0}, plan, channels_last, stream);
    }
    launch_forward(call, channels_last, upsample, stream);
    return {y, p, used[0], used[1], used[2], used[3]};
  });
}

}  // namespace
}  // namespace pixnorm::spn

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CUDA, m) { m.impl("spn_fwd", TORCH_BOX(&pixnorm::spn::spn_fwd)); }
