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

// [tensor: x, p][split][count, mean, sum of squares about it][C]
template <class A>
struct Partials {
  A* data;
  int splits, c;

  __device__ __forceinline__ A* at(int tensor, int split, int channel) const {
    return data + (int64_t{tensor * splits + split} * 3) * c + channel;
  }
  __device__ void set(int tensor, int split, int channel, A count, A mean, A m2) const {
    A* to = at(tensor, split, channel);
    to[0] = count, to[c] = mean, to[2 * c] = m2;
  }
  // Mean and biased variance of a channel, by the formula for groups.
  __device__ void finish(int tensor, int channel, A& mean, A& var) const {
    const A about = at(tensor, 0, channel)[c];
    A count = 0, sum = 0, m2 = 0;
    for (int split = 0; split < splits; ++split) {
      const A* from = at(tensor, split, channel);
      count += from[0];
      sum += from[0] * (from[c] - about);
    }
    mean = about + sum / count;
    for (int split = 0; split < splits; ++split) {
      const A* from = at(tensor, split, channel);
      const A d = from[c] - mean;
      m2 += fma(from[0] * d, d, from[2 * c]);
    }
    var = m2 / count;
  }
};

constexpr int kStatisticsThreads = 256;

template <class T>
struct StatisticsCall {
  Shape shape;
  const T *x, *p;
  Partials<acc_t<T>> partials;
  int lanes;  // channels_last: threads side by side over the channels

  __device__ const T* tensor() const { return blockIdx.z == 0 ? x : p; }
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
  if (threadIdx.x == 0) call.partials.set(blockIdx.z, blockIdx.y, c, whole, mean, m2);
}

// A split of the pixels of `lanes` x V channels: the grid is (groups of channels, splits, 2).
template <class T, int V>
__device__ void statistics_of_pixels(const StatisticsCall<T>& call, acc_t<T>* scratch) {
  using A = acc_t<T>;
  constexpr int kUnroll = 4;
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
    call.partials.set(blockIdx.z, blockIdx.y, channel, whole, mean, m2);
  }
}

template <class T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kStatisticsThreads, 3) spn_statistics_kernel(const StatisticsCall<T> call) {
  if constexpr (kChannelsLast) {
    statistics_of_pixels<T, V>(call, shared_memory<acc_t<T>>());
  } else {
    statistics_of_plane<T, V>(call, shared_memory<acc_t<T>>());
  }
}

template <class T>
void launch_statistics(StatisticsCall<T> call, bool channels_last, cudaStream_t stream) {
  using A = acc_t<T>;
  constexpr int kMost = static_cast<int>(16 / sizeof(T));
  const Shape& s = call.shape;
  const bool fits = (channels_last ? s.c : s.pixels()) % kMost == 0 && is_aligned(call.x, 16) && is_aligned(call.p, 16);
  dispatch_bool(channels_last, [&](auto last) {
    dispatch_bool(fits, [&](auto vectors) {
      constexpr int kVector = vectors() ? kMost : 1;
      int blocks = s.c, threads = kStatisticsThreads, numbers = kStatisticsThreads / kWarp;
      if (last()) {
        call.lanes = 1;
        while (call.lanes < kWarp && call.lanes * kVector < s.c) call.lanes *= 2;
        blocks = ceil_div(s.c, call.lanes * kVector);
        numbers = 2 * threads * kVector;
      }
      launch(spn_statistics_kernel<T, kVector, last()>,
             {dim3(blocks, call.partials.splits, 2), dim3(threads), numbers * sizeof(A), stream}, call);
    });
  });
}

// Splits of a channel's elements, each worth a block's while.
int statistics_splits(const Shape& s, bool channels_last) {
  constexpr int64_t kBlocks = 1 << 10, kElementsOfBlock = 1 << 13;
  const int64_t channels = channels_last ? std::min(s.c, 128) : 1;  // of a block
  const int64_t blocks = ceil_div<int64_t>(s.c, channels), elements = s.n * int64_t{s.pixels()} * channels;
  const int64_t most = std::min<int64_t>(kMaxSplits, ceil_div(elements, kElementsOfBlock));
  return static_cast<int>(std::clamp<int64_t>(ceil_div(kBlocks, 2 * blocks), 1, std::max<int64_t>(most, 1)));
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

template <class T, int V, int U, bool kChannelsLast>
__global__ void __launch_bounds__(kMostThreads<kChannelsLast>, kBlocksAtOnce<T, kChannelsLast>)
    spn_fwd_modulate_kernel(const ForwardCall<T> call) {
  using A = acc_t<T>;
  const Shape& s = call.shape;
  const Plan& plan = call.plan;
  Place<V, kChannelsLast> place(s, plan);
  A* const memory = shared_memory<A>();
  using TableHere = Table<T, U, kChannelsLast>;
  Affine<T, V, U, kChannelsLast> affine{TableHere(memory, place.lane_channel), {}};
  Neighbours<A, 1, kChannelsLast> neighbours(memory + TableHere::kNumbers, place.position, plan.positions);

  Channel<T> channel{};
  if (place.channel) {
    A statistics[4];
    if (call.partials.data) {
      call.partials.finish(0, place.c, statistics[0], statistics[1]);
      call.partials.finish(1, place.c, statistics[2], statistics[3]);
    } else {
      for (int i = 0; i < 4; ++i) statistics[i] = call.given[i][place.c];
    }
    if (blockIdx.y == 0 && place.position == 0 && place.group == 0) {
      for (int i = 0; i < 4; ++i) call.used[i][place.c] = statistics[i];
    }
    channel.set(call, place.c, statistics[0], statistics[1], statistics[2], statistics[3]);
  }
  // y = gamma x̂ + beta = (rstd gamma) (x - mean) + beta
  affine.table.fill(call, place.c, place.channel, channel.rstd);
  if constexpr (U == 1) {
    for (int k = 0; place.channel && k < kTaps; ++k) {
      affine.taps[0][k] = channel.rstd * tap_on_mask(call, 0, place.c, k);
      affine.taps[1][k] = tap_on_mask(call, 1, place.c, k);
    }
  }
  __syncthreads();

  const int stride = s.c;  // between pixels, in channels_last
  const int pixel = kChannelsLast ? s.c : 1;
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
      load(row, from + (h * s.w + place.column) * pixel, stride);
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
          if (call.relu && result[j] < 0) result[j] = 0;  // NaN stays
        }
        store<kChannelsLast, U * V>(y + ((U * h + a) * U * s.w + U * place.column) * pixel, result, stride);
      }
    }
  }
}

template <class T>
void launch_forward(ForwardCall<T> call, bool channels_last, int64_t upsample, cudaStream_t stream) {
  dispatch_layout(channels_last, upsample, [&](auto last, auto u) {
    dispatch_columns<T, u(), last()>(call.shape, {call.x, call.p}, call.y, [&](auto columns) {
      call.plan = make_plan<columns(), last()>(call.shape);
      const size_t bytes = shared_numbers<T, columns(), u(), last(), 1>(call.plan) * sizeof(acc_t<T>);
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
                      const std::optional<Tensor>& mask_var, double eps, int64_t upsample, bool relu, bool allow_tf32) {
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
    call.shape = s;
    call.relu = relu;
    call.eps = static_cast<A>(eps);
    call.x = data_of<T>(x_dense);
    call.p = data_of<T>(p);
    call.y = static_cast<T*>(y.data_ptr());
    parameters.to(call);
    const int splits = given ? 0 : statistics_splits(s, channels_last);
    const Tensor partials = empty_like(x, {2, splits, 3, s.c}, dtype_of<A>);
    for (int i = 0; i < 4; ++i) {
      call.used[i] = static_cast<A*>(used[i].data_ptr());
      if (given) call.given[i] = data_of<A>(statistics[i]);
    }
    if (!given) {
      call.partials = {static_cast<A*>(partials.data_ptr()), splits, s.c};
      launch_statistics(StatisticsCall<T>{s, call.x, call.p, call.partials, 0}, channels_last, stream);
    }
    launch_forward(call, channels_last, upsample, stream);
    return {y, p, used[0], used[1], used[2], used[3]};
  });
}

}  // namespace
}  // namespace pixnorm::spn

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CUDA, m) { m.impl("spn_fwd", TORCH_BOX(&pixnorm::spn::spn_fwd)); }
