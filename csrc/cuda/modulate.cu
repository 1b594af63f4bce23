// Modulated norm on NVIDIA GPUs, forward: statistics, then y. Planes of instances that fit a block's registers are read
// once. modulate_backward.cu has the backward.
//
// Work is cut by shape alone and sums are added in a fixed order: every run gives the same bits.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/modulate_call.cuh"

namespace pixnorm::modulate {
namespace {

template <class T>
struct ForwardCall : Call<T> {
  using A = acc_t<T>;
  Partials<A> partials;  // of the statistics; data == nullptr: they are given
  const A *given_mean, *given_var;
  A *mean, *var;  // those used
  T* y;
};

// ---- y of a vector ----

// `centred`: x - mean. Rows: scale has the factor rstd.
template <class T, int V, int U, bool kChannelsLast, int kOwn>
__device__ __forceinline__ void write_rows(const ForwardCall<T>& call, const acc_t<T> (&centred)[V],
                                           const acc_t<T> (&scale)[kOwn], const acc_t<T> (&shift)[kOwn], T* to) {
  using A = acc_t<T>;
  using Out = Outputs<T, V, U, kChannelsLast>;
  A values[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    values[j] = fma(scale[j % kOwn], centred[j], shift[j % kOwn]);
    if (call.activated) activate(values[j], call.slope);
  }
  A wide[Out::kSize];
#pragma unroll
  for (int j = 0; j < Out::kSize; ++j) wide[j] = values[Out::of(j)];
  Out y;
#pragma unroll
  for (int a = 0; a < U; ++a) {
#pragma unroll
    for (int b = 0; b < Out::kVecs; ++b) pack(y.vecs[a][b], wide);
  }
  y.write(call.plan, to);
}

template <class T, int V, int U, bool kChannelsLast>
__device__ __forceinline__ void write_maps(const ForwardCall<T>& call, const acc_t<T> (&normed)[V],
                                           const Outputs<T, V, U, kChannelsLast>& gamma,
                                           const Outputs<T, V, U, kChannelsLast>& beta, T* to) {
  using A = acc_t<T>;
  using Out = Outputs<T, V, U, kChannelsLast>;
  Out y;
#pragma unroll
  for (int a = 0; a < U; ++a) {
#pragma unroll
    for (int b = 0; b < Out::kVecs; ++b) {
      A scale[Out::kSize], values[Out::kSize];
      unpack(gamma.vecs[a][b], scale);
      unpack(beta.vecs[a][b], values);
#pragma unroll
      for (int j = 0; j < Out::kSize; ++j) {
        values[j] = fma(call.offset + scale[j], normed[Out::of(j)], values[j]);
        if (call.activated) activate(values[j], call.slope);
      }
      pack(y.vecs[a][b], values);
    }
  }
  y.write(call.plan, to);
}

// ---- two passes ----

// Mean and reciprocal standard deviation of a thread's channels. `scratch`: prologue_numbers().
template <class T, class PlaceHere, int kOwn>
__device__ __forceinline__ void take_statistics(const ForwardCall<T>& call, const PlaceHere& place, acc_t<T>* scratch,
                                                acc_t<T> (&mean)[kOwn], acc_t<T> (&rstd)[kOwn]) {
  using A = acc_t<T>;
  const Plan& plan = call.plan;
  A var[kOwn];
#pragma unroll
  for (int k = 0; k < kOwn; ++k) mean[k] = 0, var[k] = 1;
  if (!call.partials.data) {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      if (place.channel) mean[k] = call.given_mean[place.c + k], var[k] = call.given_var[place.c + k];
    }
  } else if (!plan.view.channels_last) {
    A found[2];
    finish_statistics<1, false>(call.partials, 0, 0, place.c, true, 0, scratch, found);
    mean[0] = found[0], var[0] = found[1];
  } else {
    const int channels = plan.lanes * kOwn, lane = threadIdx.x % kWarp;
    A* const table = scratch + finish_numbers(1, plan.threads, true);
    for (int first = 0; first < channels; first += kWarp) {
      const int of_block = first + lane, c = place.c - place.lane * kOwn + of_block;
      A found[2];
      finish_statistics<1, true>(call.partials, place.set, 0, c, of_block < channels && c < plan.view.c, lane, scratch,
                                 found);
      if (threadIdx.x < kWarp && of_block < channels) table[of_block] = found[0], table[channels + of_block] = found[1];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int of_block = place.lane * kOwn + k;
      if (place.channel) mean[k] = table[of_block], var[k] = table[channels + of_block];
    }
  }
  const bool writes = place.channel && blockIdx.y == 0 && place.position == 0 && place.group == 0;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    if (writes) {
      call.mean[place.statistic(plan) + k] = mean[k];
      call.var[place.statistic(plan) + k] = var[k];
    }
    rstd[k] = 1 / sqrt(var[k] + call.eps);
  }
}

int prologue_numbers(const Plan& plan, int own) {
  const bool last = plan.view.channels_last;
  return finish_numbers(1, plan.threads, last) + (last ? 2 * plan.lanes * own : 0);
}

template <class T, int V, int U, bool kChannelsLast, bool kMaps>
__device__ __forceinline__ void forward(const ForwardCall<T>& call) {
  using A = acc_t<T>;
  using Out = Outputs<T, V, U, kChannelsLast>;
  // Loads in flight per thread: four vectors of x, or two with their maps.
  constexpr int kUnroll = kMaps ? (U == 2 ? 1 : 2) : (U == 2 ? 2 : 4);
  const Plan& plan = call.plan;
  Place<V, U, kChannelsLast> place(plan);
  constexpr int kOwn = decltype(place)::kOwn;
  place.take_channels(plan, blockIdx.x);
  A mean[kOwn], rstd[kOwn];
  take_statistics(call, place, shared_memory<A>(), mean, rstd);

  // Rows are loaded one unit ahead.
  Row<T, kOwn> next;
  const auto unit_of = [&](int round) { return round * plan.groups + place.group; };
  const auto load_next = [&](int round) {
    const int unit = unit_of(round);
    if constexpr (!kMaps) {
      next.set(call, place.plane(plan, unit / plan.chunks), place.channel && unit < plan.units);
    }
  };
  load_next(blockIdx.y);
  for (int round = blockIdx.y; round * plan.groups < plan.units; round += gridDim.y) {
    const int unit = unit_of(round), begin = unit % plan.chunks * plan.chunk;
    const int end = place.channel && unit < plan.units ? min(begin + plan.chunk, plan.vectors) : 0;
    place.enter(plan, unit / plan.chunks);
    const T* const x = call.x + place.x;
    A scale[kOwn], shift[kOwn];
    if constexpr (!kMaps) {
#pragma unroll
      for (int k = 0; k < kOwn; ++k) scale[k] = next.scale[k] * rstd[k], shift[k] = next.shift[k];
    }
    load_next(round + gridDim.y);
    for (int i = begin + place.position; i < end; i += kUnroll * plan.positions) {
      Vec<T, V> vecs[kUnroll];
      Out gamma[kUnroll], beta[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = i + u * plan.positions;
        if (at >= end) continue;
        load(vecs[u], x + at * plan.step);
        if constexpr (kMaps) {
          gamma[u].read(plan, call.gamma_map + place.y + Out::offset(plan, at));
          beta[u].read(plan, call.beta_map + place.y + Out::offset(plan, at));
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = i + u * plan.positions;
        if (at >= end) continue;
        A values[V];
        unpack(vecs[u], values);
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] -= mean[j % kOwn];
        T* const y = call.y + place.y + Out::offset(plan, at);
        if constexpr (kMaps) {
#pragma unroll
          for (int j = 0; j < V; ++j) values[j] *= rstd[j % kOwn];
          write_maps<T, V, U, kChannelsLast>(call, values, gamma[u], beta[u], y);
        } else {
          write_rows<T, V, U, kChannelsLast, kOwn>(call, values, scale, shift, y);
        }
      }
    }
  }
}

// Minimum resident blocks per SM: 32 warps for rows, 24 for maps; 16 where a thread has several channels, or doubles.
template <class T, int V, bool kChannelsLast, bool kMaps>
constexpr int kForwardBlocks = std::is_same_v<T, double> || (kChannelsLast && V > 1) ? 2
                               : kMaps                                               ? 3
                                                                                     : 4;

template <class T, int V, int U, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T, V, kChannelsLast, false>)
    modulate_fwd_kernel(const ForwardCall<T> call) {
  forward<T, V, U, kChannelsLast, false>(call);
}

template <class T, int V, int U, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T, V, kChannelsLast, true>)
    modulate_fwd_maps_kernel(const ForwardCall<T> call) {
  forward<T, V, U, kChannelsLast, true>(call);
}

// ---- planes that stay in registers ----

constexpr int kHeld = 8;            // vectors per thread
constexpr int kMostResident = 512;  // threads per block, which then hold 128x128 pixels in float32

// Without upsampling: with it, x is the smaller part of what must move.
template <class T, int V, bool kChannelsLast, bool kMaps>
__device__ __forceinline__ void forward_resident(const ForwardCall<T>& call) {
  using A = acc_t<T>;
  using Out = Outputs<T, V, 1, kChannelsLast>;
  const Plan& plan = call.plan;
  Place<V, 1, kChannelsLast> place(plan);
  constexpr int kOwn = decltype(place)::kOwn;
  place.take_channels(plan, blockIdx.x * plan.groups + place.group);
  place.enter(plan, 0);
  const int end = place.channel ? plan.vectors : 0;
  const T* const x = call.x + place.x;

  Vec<T, V> vecs[kHeld], first{};
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    const int at = place.position + u * plan.positions;
    if (at < end) load(vecs[u], x + at * plan.step);
  }
  if (place.channel) load(first, x);
  Row<T, kOwn> row;
  if constexpr (!kMaps) row.set(call, place.row, place.channel);

  // Deviations from the first pixel: a mean far from zero costs no digits.
  A about[V], mean[kOwn] = {}, rstd[kOwn] = {};
  unpack(first, about);
  const auto for_each = [&](auto f) {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if (place.position + u * plan.positions >= end) continue;
      A values[V];
      unpack(vecs[u], values);
      f(u, values);
    }
  };
  const A count = static_cast<A>(plan.view.pixels);
  for_each([&](int, const A(&values)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) mean[j % kOwn] += values[j] - about[j % kOwn];
  });
  segment_sum(mean, plan.lanes, plan.positions, shared_memory<A>());
#pragma unroll
  for (int k = 0; k < kOwn; ++k) mean[k] = about[k] + mean[k] / count;
  for_each([&](int, const A(&values)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const A d = values[j] - mean[j % kOwn];
      rstd[j % kOwn] = fma(d, d, rstd[j % kOwn]);
    }
  });
  segment_sum(rstd, plan.lanes, plan.positions, shared_memory<A>());
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const A var = rstd[k] / count;
    if (place.channel && place.position == 0) {
      call.mean[place.row + k] = mean[k];
      call.var[place.row + k] = var;
    }
    rstd[k] = 1 / sqrt(var + call.eps);
    if constexpr (!kMaps) row.scale[k] *= rstd[k];
  }

  for_each([&](int u, A(&values)[V]) {
    const int64_t at = place.y + Out::offset(plan, place.position + u * plan.positions);
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] -= mean[j % kOwn];
    if constexpr (kMaps) {
      Out gamma, beta;
      gamma.read(plan, call.gamma_map + at);
      beta.read(plan, call.beta_map + at);
#pragma unroll
      for (int j = 0; j < V; ++j) values[j] *= rstd[j % kOwn];
      write_maps<T, V, 1, kChannelsLast>(call, values, gamma, beta, call.y + at);
    } else {
      write_rows<T, V, 1, kChannelsLast, kOwn>(call, values, row.scale, row.shift, call.y + at);
    }
  });
}

template <class T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kMostResident) modulate_fwd_resident_kernel(const ForwardCall<T> call) {
  forward_resident<T, V, kChannelsLast, false>(call);
}

template <class T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kMostResident) modulate_fwd_resident_maps_kernel(const ForwardCall<T> call) {
  forward_resident<T, V, kChannelsLast, true>(call);
}

// ---- the op ----

template <class T>
void launch_forward(const Arguments& in, ForwardCall<T> call, bool given, cudaStream_t stream) {
  using A = acc_t<T>;
  dispatch_instance<T>(in, [&](auto vector, auto u, auto last) {
    constexpr int V = vector(), kOwn = last() ? V : 1;
    Plan& plan = call.plan = in.plan<T>(V);
    if constexpr (V > 1 && u() == 1) {
      if (in.instance && cut_resident(plan, V, kHeld, kMostResident, sizeof(T))) {
        const auto kernel =
            in.maps ? modulate_fwd_resident_maps_kernel<T, V, last()> : modulate_fwd_resident_kernel<T, V, last()>;
        const size_t bytes = sum_numbers(kOwn, plan) * sizeof(A);
        launch(kernel, launch_of(plan, ceil_div(plan.units, plan.groups), bytes, stream), call);
        return;
      }
      plan = in.plan<T>(V);
    }
    // A block in channels_last merges the statistics of many channels, so there are fewer of them.
    cut(plan, V, in.channels_last ? 1 << 10 : 1 << 11, USHRT_MAX);
    Tensor partials;
    if (!given) {
      const StatisticsPlan cut_statistics = plan_statistics<T>(plan.view, call.x, nullptr);
      partials = empty_like(in.x, {plan.view.groups, cut_statistics.parts, 3, plan.view.c}, dtype_of<A>);
      call.partials = {static_cast<A*>(partials.data_ptr()), cut_statistics.parts, plan.view.c};
      launch_statistics<T>(plan.view, cut_statistics, call.x, nullptr, call.partials, stream);
    }
    const auto kernel = in.maps ? modulate_fwd_maps_kernel<T, V, u(), last()> : modulate_fwd_kernel<T, V, u(), last()>;
    const size_t bytes = given ? 0 : prologue_numbers(plan, kOwn) * sizeof(A);
    launch(kernel, launch_of(plan, plan.view.groups * plan.blocks, bytes, stream), call);
  });
}

std::tuple<Tensor, Tensor, Tensor> modulate_fwd(const Tensor& x, const std::optional<Tensor>& gamma,
                                                const std::optional<Tensor>& beta, const std::optional<Tensor>& mean,
                                                const std::optional<Tensor>& var, double eps, bool instance,
                                                double gamma_offset, int64_t upsample,
                                                std::optional<double> negative_slope) {
  const bool given = mean.has_value();
  STD_TORCH_CHECK(var.has_value() == given, "pixnorm: give both statistics or neither");
  STD_TORCH_CHECK(!given || !instance, "pixnorm: only batch statistics can be given");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Arguments in(x, gamma, beta, instance, upsample);
  return dispatch_floating(x.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor y = empty_like(x, {in.n, in.c, in.h * upsample, in.w * upsample}, dtype_of<T>, in.layout);
    Tensor used[2], statistics[2];
    for (Tensor& t : used) {
      t = instance ? empty_like(x, {in.n, in.c}, dtype_of<A>) : empty_like(x, {in.c}, dtype_of<A>);
    }
    if (given) statistics[0] = in.statistic<A>(*mean), statistics[1] = in.statistic<A>(*var);
    if (in.numel() == 0) {
      for (int i = 0; i < 2; ++i) given ? torch::stable::copy_(used[i], statistics[i]) : torch::stable::zero_(used[i]);
      return {y, used[0], used[1]};
    }
    ForwardCall<T> call{};
    in.set_up(call, eps, gamma_offset, negative_slope);
    call.mean = static_cast<A*>(used[0].data_ptr());
    call.var = static_cast<A*>(used[1].data_ptr());
    call.y = static_cast<T*>(y.data_ptr());
    if (given) call.given_mean = data_of<A>(statistics[0]), call.given_var = data_of<A>(statistics[1]);
    launch_forward(in, call, given, current_stream(x));
    return {y, used[0], used[1]};
  });
}

}  // namespace
}  // namespace pixnorm::modulate

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CUDA, m) { m.impl("modulate_fwd", TORCH_BOX(&pixnorm::modulate::modulate_fwd)); }
