// Modulated norm on NVIDIA GPUs, backward. reduce sums the gradients of scale and shift, finish turns the sums into the
// parameters' gradients and the means that normalisation subtracts, apply writes dx. Planes of instances that fit a
// block's registers are read once, and need none of these.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/modulate_call.cuh"

namespace pixnorm::modulate {
namespace {

// With g = (offset + γ) dy', summed over the outputs of a pixel of x, and dy' the gradient behind the activation:
// dx = rstd (g - mean(g) - x̂ mean(g x̂)). For rows g = scale Σ dy', so the means follow from the sums of dγ and dβ.
template <class T>
struct BackwardCall : Call<T> {
  using A = acc_t<T>;
  const A *mean, *var;
  const T* dy;  // apply, maps: dβ
  // Rows: Σ dy' and Σ dy' x̂; maps: Σ g and Σ g x̂. [unit of an image][2][total]. Where each plane has sums, total = N C;
  // otherwise each split of a channel: [1][2][splits][C].
  A* sums;
  int64_t total;
  bool per_plane;
  A* means;  // [2][total of the statistics]: mean(g) and mean(g x̂)
  int64_t statistics;
  A centre;  // 1 / (values per mean); 0 where the statistics were given
  T *dx, *d_gamma_map, *d_beta_map;
  Gradient<T> d_gamma, d_beta;
};

// ---- gradients of a vector ----

// Rows: g = Σ dy' over the outputs of each element, which the activation lets through together.
template <class T, int V, int U, bool kChannelsLast, int kOwn>
__device__ __forceinline__ void rows_gradient(const BackwardCall<T>& call, const Outputs<T, V, U, kChannelsLast>& dy,
                                              const acc_t<T> (&centred)[V], const acc_t<T> (&scale)[kOwn],
                                              const acc_t<T> (&shift)[kOwn], acc_t<T> (&g)[V]) {
  using A = acc_t<T>;
  using Out = Outputs<T, V, U, kChannelsLast>;
#pragma unroll
  for (int j = 0; j < V; ++j) g[j] = 0;
#pragma unroll
  for (int a = 0; a < U; ++a) {
#pragma unroll
    for (int b = 0; b < Out::kVecs; ++b) {
      A values[Out::kSize];
      unpack(dy.vecs[a][b], values);
#pragma unroll
      for (int j = 0; j < Out::kSize; ++j) g[Out::of(j)] += values[j];
    }
  }
  if (!call.activated) return;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    activate_gradient(fma(scale[j % kOwn], centred[j], shift[j % kOwn]), g[j], call.slope);
  }
}

// Maps: g = Σ (offset + γ) dy' over all outputs of Out; writes dγ and dβ.
template <class T, class Out, int V>
__device__ __forceinline__ void maps_gradient(const BackwardCall<T>& call, Out& dy, const Out& gamma, const Out& beta,
                                              const acc_t<T> (&normed)[V], int64_t at, acc_t<T> (&g)[V]) {
  using A = acc_t<T>;
  Out d_gamma;
#pragma unroll
  for (int j = 0; j < V; ++j) g[j] = 0;
#pragma unroll
  for (int a = 0; a < Out::kDown; ++a) {
#pragma unroll
    for (int b = 0; b < Out::kVecs; ++b) {
      A scale[Out::kSize], d[Out::kSize];
      unpack(gamma.vecs[a][b], scale);
      unpack(dy.vecs[a][b], d);
#pragma unroll
      for (int j = 0; j < Out::kSize; ++j) scale[j] += call.offset;
      if (call.activated) {
        A shift[Out::kSize];
        unpack(beta.vecs[a][b], shift);
#pragma unroll
        for (int j = 0; j < Out::kSize; ++j) {
          activate_gradient(fma(scale[j], normed[Out::of(j)], shift[j]), d[j], call.slope);
        }
        pack(dy.vecs[a][b], d);
      }
#pragma unroll
      for (int j = 0; j < Out::kSize; ++j) {
        g[Out::of(j)] = fma(scale[j], d[j], g[Out::of(j)]);
        d[j] *= normed[Out::of(j)];
      }
      pack(d_gamma.vecs[a][b], d);
    }
  }
  dy.write(call.plan, call.d_beta_map + at);
  d_gamma.write(call.plan, call.d_gamma_map + at);
}

template <class T, class PlaceHere, int kOwn>
__device__ __forceinline__ void take_statistics(const BackwardCall<T>& call, const PlaceHere& place,
                                                acc_t<T> (&mean)[kOwn], acc_t<T> (&rstd)[kOwn]) {
  const int first = place.statistic(call.plan);
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    mean[k] = place.channel ? call.mean[first + k] : acc_t<T>(0);
    rstd[k] = 1 / sqrt((place.channel ? call.var[first + k] : acc_t<T>(1)) + call.eps);
  }
}

// ---- two passes ----

// The body of reduce and apply.
template <class T, int V, int U, bool kChannelsLast, bool kMaps, bool kApply>
__device__ __forceinline__ void backward(const BackwardCall<T>& call) {
  using A = acc_t<T>;
  constexpr int kRounds = U == 2 ? 1 : 2;  // vectors per round: four loads in flight of x and dy, six with maps
  // Reduce with maps has most loads, and takes outputs one by one; four (channels_last) in a loop, for registers.
  using Out = Outputs<T, V, U, kChannelsLast, kMaps && !kApply>;
  const Plan& plan = call.plan;
  Place<V, U, kChannelsLast> place(plan);
  constexpr int kOwn = decltype(place)::kOwn;
  place.take_channels(plan, blockIdx.x);
  A mean[kOwn], rstd[kOwn], slope[kOwn], level[kOwn];  // dx = rstd g - (x - mean) slope - level
  take_statistics(call, place, mean, rstd);
  if constexpr (kApply) {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const A* const means = call.means + place.statistic(plan) + k;
      level[k] = place.channel ? rstd[k] * means[0] : A(0);
      slope[k] = place.channel ? rstd[k] * rstd[k] * means[call.statistics] : A(0);
    }
  }

  Row<T, kOwn> next;
  const auto unit_of = [&](int round) { return round * plan.groups + place.group; };
  const auto load_next = [&](int round) {
    const int unit = unit_of(round);
    if constexpr (!kMaps) {
      next.set(call, place.plane(plan, unit / plan.chunks), place.channel && unit < plan.units);
    }
  };
  A sums[2 * kOwn] = {};
  load_next(blockIdx.y);
  for (int round = blockIdx.y; round * plan.groups < plan.units; round += gridDim.y) {
    const int unit = unit_of(round), begin = unit % plan.chunks * plan.chunk;
    const bool has_unit = place.channel && unit < plan.units;
    const int end = has_unit ? min(begin + plan.chunk, plan.vectors) : 0;
    place.enter(plan, unit / plan.chunks);
    const T* const x = call.x + place.x;
    T* const dx = kApply ? call.dx + place.x : nullptr;
    A scale[kOwn], shift[kOwn];
    if constexpr (!kMaps) {
#pragma unroll
      for (int k = 0; k < kOwn; ++k) scale[k] = next.scale[k] * rstd[k], shift[k] = next.shift[k];
    }
    load_next(round + gridDim.y);
    for (int i = begin + place.position; i < end; i += kRounds * plan.positions) {
      Vec<T, V> vecs[kRounds];
#pragma unroll
      for (int u = 0; u < kRounds; ++u) {
        const int at = i + u * plan.positions;
        if (at < end) load(vecs[u], x + at * plan.step);
      }
#pragma unroll(Out::kPasses == 4 ? 1 : Out::kPasses)
      for (int pass = 0; pass < Out::kPasses; ++pass) {
        Out dy[kRounds], gamma[kRounds], beta[kRounds]{};
#pragma unroll
        for (int u = 0; u < kRounds; ++u) {
          const int at = i + u * plan.positions;
          if (at >= end) continue;
          const int64_t out = place.y + Out::offset(plan, at, pass);
          dy[u].read(plan, call.dy + out);
          if constexpr (kMaps) {
            gamma[u].read(plan, call.gamma_map + out);
            if (!kApply && call.activated) beta[u].read(plan, call.beta_map + out);
          }
        }
#pragma unroll
        for (int u = 0; u < kRounds; ++u) {
          const int at = i + u * plan.positions;
          if (at >= end) continue;
          A d[V], g[V];
          unpack(vecs[u], d);
#pragma unroll
          for (int j = 0; j < V; ++j) d[j] -= mean[j % kOwn];
          if constexpr (!kMaps) {
            rows_gradient<T, V, U, kChannelsLast, kOwn>(call, dy[u], d, scale, shift, g);
          } else if constexpr (kApply) {
#pragma unroll
            for (int j = 0; j < V; ++j) g[j] = 0;
#pragma unroll
            for (int a = 0; a < U; ++a) {
#pragma unroll
              for (int b = 0; b < Out::kVecs; ++b) {
                A factor[Out::kSize], values[Out::kSize];
                unpack(gamma[u].vecs[a][b], factor);
                unpack(dy[u].vecs[a][b], values);
#pragma unroll
                for (int j = 0; j < Out::kSize; ++j) {
                  g[Out::of(j)] = fma(call.offset + factor[j], values[j], g[Out::of(j)]);
                }
              }
            }
          } else {
#pragma unroll
            for (int j = 0; j < V; ++j) d[j] *= rstd[j % kOwn];
            maps_gradient(call, dy[u], gamma[u], beta[u], d, place.y + Out::offset(plan, at, pass), g);
          }
          if constexpr (kApply) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const A factor = kMaps ? rstd[j % kOwn] : scale[j % kOwn];
              d[j] = fma(factor, g[j], -fma(d[j], slope[j % kOwn], level[j % kOwn]));
            }
            Vec<T, V> vec;
            pack(vec, d);
            store(dx + at * plan.step, vec);
          } else {
#pragma unroll
            for (int j = 0; j < V; ++j) {
              sums[j % kOwn] += g[j];
              sums[kOwn + j % kOwn] = fma(g[j], d[j], sums[kOwn + j % kOwn]);
            }
          }
        }
      }
    }
    if constexpr (!kApply) {
      const bool last = (round + static_cast<int>(gridDim.y)) * plan.groups >= plan.units;
      if (!call.per_plane && !last) continue;
      // One unit, or all that the block has seen.
      segment_sum(sums, plan.lanes, call.per_plane ? plan.positions : plan.positions * plan.groups, shared_memory<A>());
      if (place.position == 0 && (call.per_plane ? has_unit : place.channel && place.group == 0)) {
        A* const to = call.sums + (call.per_plane ? unit % plan.chunks * 2 * call.total + place.row
                                                  : int64_t{blockIdx.y} * plan.view.c + place.c);
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
          to[k] = sums[k];
          to[call.total + k] = kMaps ? sums[kOwn + k] : rstd[k] * sums[kOwn + k];
        }
      }
#pragma unroll
      for (int k = 0; k < 2 * kOwn; ++k) sums[k] = 0;
    }
  }
}

// Minimum resident blocks per SM: 24 warps, or 16 where a thread has 8 columns, or sums for several channels.
template <class T, int V, bool kChannelsLast>
constexpr int kBackwardBlocks = std::is_same_v<T, double>            ? 1
                                : V == 8 || (kChannelsLast && V > 1) ? 2
                                                                     : 3;

template <class T, int V, int U, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T, V, kChannelsLast>)
    modulate_bwd_reduce_kernel(const BackwardCall<T> call) {
  backward<T, V, U, kChannelsLast, false, false>(call);
}

template <class T, int V, int U, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T, V, kChannelsLast>)
    modulate_bwd_reduce_maps_kernel(const BackwardCall<T> call) {
  backward<T, V, U, kChannelsLast, true, false>(call);
}

template <class T, int V, int U, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T, V, kChannelsLast>)
    modulate_bwd_apply_kernel(const BackwardCall<T> call) {
  backward<T, V, U, kChannelsLast, false, true>(call);
}

template <class T, int V, int U, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T, V, kChannelsLast>)
    modulate_bwd_apply_maps_kernel(const BackwardCall<T> call) {
  backward<T, V, U, kChannelsLast, true, true>(call);
}

constexpr int kFinishWarps = 16;

// Adds the partial sums; the gradients of rows, and the means. Lanes are channels, warps share `images` images of
// `chunks` parts each. The grid is blocks of 32 channels.
template <class T>
__global__ void __launch_bounds__(kFinishWarps* kWarp)
    modulate_bwd_finish_kernel(const BackwardCall<T> call, int images, int chunks) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, channels = call.plan.channels;
  const int c = blockIdx.x * kWarp + lane;
  const bool instance = call.statistics != channels;
  const auto mean = [&](A sum) { return call.centre == 0 ? A(0) : sum * call.centre; };  // 0 even if the sum is NaN
  A totals[4] = {};  // of both sums, and of both times the scale
  for (int n = warp; c < channels && n < images; n += kFinishWarps) {
    const int64_t i = int64_t{n} * channels + c;
    A sums[2] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
      for (int k = 0; k < 2; ++k) sums[k] += call.sums[(int64_t{chunk} * 2 + k) * call.total + i];
    }
    const A scale = call.affine ? call.offset + call.gamma[call.rows ? static_cast<int>(i) : c] : A(1);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      totals[k] += sums[k];
      totals[2 + k] = fma(scale, sums[k], totals[2 + k]);
      if (instance && call.means) call.means[k * call.statistics + i] = mean(scale * sums[k]);
    }
    if (call.rows) call.d_beta.set(i, sums[0]), call.d_gamma.set(i, sums[1]);
  }
  A* const scratch = shared_memory<A>();
#pragma unroll
  for (int k = 0; k < 4; ++k) scratch[(warp * 4 + k) * kWarp + lane] = totals[k];
  __syncthreads();
  if (warp > 0 || c >= channels) return;
  for (int other = 1; other < kFinishWarps; ++other) {
#pragma unroll
    for (int k = 0; k < 4; ++k) totals[k] += scratch[(other * 4 + k) * kWarp + lane];
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (!instance && call.means) call.means[k * call.statistics + c] = mean(totals[2 + k]);
  }
  if (call.affine && !call.rows) call.d_beta.set(c, totals[0]), call.d_gamma.set(c, totals[1]);
}

// ---- planes that stay in registers ----

constexpr int kHeld = 4;  // vectors per thread, of x and of g

// Most threads per block. 1024 leave a thread 64 registers: enough for 4 columns, which then hold 128x128 pixels.
template <int V, bool kChannelsLast>
constexpr int kMostResident = V == 4 && !kChannelsLast ? 1024 : 512;

template <class T, int V, bool kChannelsLast, bool kMaps>
__device__ __forceinline__ void backward_resident(const BackwardCall<T>& call) {
  using A = acc_t<T>;
  using Out = Outputs<T, V, 1, kChannelsLast>;
  const Plan& plan = call.plan;
  Place<V, 1, kChannelsLast> place(plan);
  constexpr int kOwn = decltype(place)::kOwn;
  place.take_channels(plan, blockIdx.x * plan.groups + place.group);
  place.enter(plan, 0);
  const int end = place.channel ? plan.vectors : 0;
  const auto vector = [&](int u) { return place.position + u * plan.positions; };

  Vec<T, V> vecs[kHeld];
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    if (vector(u) < end) load(vecs[u], call.x + place.x + vector(u) * plan.step);
  }
  // Rows: all loads are in flight together. Maps have more.
  constexpr int kAhead = kMaps ? 1 : kHeld;
  Out dy[kAhead];
  if constexpr (kAhead > 1) {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if (vector(u) < end) dy[u].read(plan, call.dy + place.y + Out::offset(plan, vector(u)));
    }
  }
  A mean[kOwn], rstd[kOwn], scale[kOwn], shift[kOwn];
  Row<T, kOwn> row;
  if constexpr (!kMaps) row.set(call, place.row, place.channel);
  take_statistics(call, place, mean, rstd);
  if constexpr (!kMaps) {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) scale[k] = row.scale[k] * rstd[k], shift[k] = row.shift[k];
  }

  A g[kHeld][V], sums[2 * kOwn] = {};
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    if (vector(u) >= end) continue;
    const int64_t at = place.y + Out::offset(plan, vector(u));
    A d[V];
    unpack(vecs[u], d);
#pragma unroll
    for (int j = 0; j < V; ++j) d[j] -= mean[j % kOwn];
    Out& of_vector = dy[kAhead > 1 ? u : 0];
    if constexpr (kAhead == 1) of_vector.read(plan, call.dy + at);
    if constexpr (kMaps) {
      Out gamma, beta{};
      gamma.read(plan, call.gamma_map + at);
      if (call.activated) beta.read(plan, call.beta_map + at);
#pragma unroll
      for (int j = 0; j < V; ++j) d[j] *= rstd[j % kOwn];
      maps_gradient(call, of_vector, gamma, beta, d, at, g[u]);
    } else {
      rows_gradient<T, V, 1, kChannelsLast, kOwn>(call, of_vector, d, scale, shift, g[u]);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      sums[j % kOwn] += g[u][j];
      sums[kOwn + j % kOwn] = fma(g[u][j], d[j], sums[kOwn + j % kOwn]);
    }
  }
  segment_sum(sums, plan.lanes, plan.positions, shared_memory<A>());

  A slope[kOwn], level[kOwn];
  const bool writes = !kMaps && place.channel && place.position == 0;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const A d_beta = sums[k], d_gamma = kMaps ? sums[kOwn + k] : rstd[k] * sums[kOwn + k];
    if (writes && call.sums) call.sums[place.row + k] = d_beta, call.sums[call.total + place.row + k] = d_gamma;
    if (writes && call.rows) call.d_beta.set(place.row + k, d_beta), call.d_gamma.set(place.row + k, d_gamma);
    if constexpr (kMaps) scale[k] = rstd[k];
    level[k] = scale[k] * d_beta * call.centre;  // for rows g is without their scale
    slope[k] = scale[k] * rstd[k] * d_gamma * call.centre;
  }
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    if (vector(u) >= end) continue;
    A d[V];
    unpack(vecs[u], d);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      d[j] = fma(scale[j % kOwn], g[u][j], -fma(d[j] - mean[j % kOwn], slope[j % kOwn], level[j % kOwn]));
    }
    Vec<T, V> vec;
    pack(vec, d);
    store(call.dx + place.x + vector(u) * plan.step, vec);
  }
}

template <class T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kMostResident<V, kChannelsLast>)
    modulate_bwd_resident_kernel(const BackwardCall<T> call) {
  backward_resident<T, V, kChannelsLast, false>(call);
}

template <class T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kMostResident<V, kChannelsLast>)
    modulate_bwd_resident_maps_kernel(const BackwardCall<T> call) {
  backward_resident<T, V, kChannelsLast, true>(call);
}

// ---- the op ----

template <class T>
void launch_finish(const BackwardCall<T>& call, int images, int chunks, cudaStream_t stream) {
  constexpr size_t kBytes = kFinishWarps * 4 * kWarp * sizeof(acc_t<T>);
  launch(modulate_bwd_finish_kernel<T>,
         {dim3(ceil_div(call.plan.channels, kWarp)), dim3(kFinishWarps * kWarp), kBytes, stream}, call, images, chunks);
}

template <class T>
void launch_backward(const Arguments& in, BackwardCall<T> call, cudaStream_t stream) {
  using A = acc_t<T>;
  dispatch_instance<T>(in, [&](auto vector, auto u, auto last) {
    constexpr int V = vector(), kOwn = last() ? V : 1;
    Plan& plan = call.plan = in.plan<T>(V);
    if constexpr (V > 1 && u() == 1) {
      if (in.instance && cut_resident(plan, V, kHeld, kMostResident<V, last()>, sizeof(T))) {
        Tensor sums;
        call.total = plan.planes;
        if (call.affine && !call.rows) {
          sums = empty_like(in.x, {2, plan.planes}, dtype_of<A>);
          call.sums = static_cast<A*>(sums.data_ptr());
        }
        const auto kernel =
            in.maps ? modulate_bwd_resident_maps_kernel<T, V, last()> : modulate_bwd_resident_kernel<T, V, last()>;
        const size_t bytes = sum_numbers(2 * kOwn, plan) * sizeof(A);
        launch(kernel, launch_of(plan, ceil_div(plan.units, plan.groups), bytes, stream), call);
        if (call.sums) launch_finish(call, in.n, 1, stream);
        return;
      }
      plan = in.plan<T>(V);
    }
    // Sums of planes where parameters or statistics have rows, otherwise of a block's share of a channel.
    call.per_plane = in.rows || in.instance;
    cut(plan, V, 1 << 11, call.per_plane ? USHRT_MAX : kMaxChunks);
    const int images = call.per_plane ? in.n : plan.splits, chunks = call.per_plane ? plan.chunks : 1;
    call.total = int64_t{images} * in.c;
    const Tensor sums = empty_like(in.x, {chunks, 2, call.total}, dtype_of<A>);
    const Tensor means = empty_like(in.x, {2, call.statistics}, dtype_of<A>);
    call.sums = static_cast<A*>(sums.data_ptr());
    call.means = static_cast<A*>(means.data_ptr());
    const int blocks = plan.view.groups * plan.blocks;
    const auto reduce =
        in.maps ? modulate_bwd_reduce_maps_kernel<T, V, u(), last()> : modulate_bwd_reduce_kernel<T, V, u(), last()>;
    launch(reduce, launch_of(plan, blocks, sum_numbers(2 * kOwn, plan) * sizeof(A), stream), call);
    launch_finish(call, images, chunks, stream);
    const auto apply =
        in.maps ? modulate_bwd_apply_maps_kernel<T, V, u(), last()> : modulate_bwd_apply_kernel<T, V, u(), last()>;
    if (in.maps) call.dy = call.d_beta_map;
    cut(plan, V, 1 << 11, USHRT_MAX);
    launch(apply, launch_of(plan, blocks, 0, stream), call);
  });
}

std::tuple<Tensor, Tensor, Tensor> modulate_bwd(const Tensor& grad_y, const Tensor& x,
                                                const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta,
                                                const Tensor& mean, const Tensor& var, double eps, bool instance,
                                                double gamma_offset, int64_t upsample,
                                                std::optional<double> negative_slope, bool training) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Arguments in(x, gamma, beta, instance, upsample);
  check_sizes(grad_y, "grad_y", {in.n, in.c, in.h * upsample, in.w * upsample});
  check_same_dtype(grad_y, "grad_y", x);
  return dispatch_floating(x.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor dy = aligned(dense(grad_y, in.layout));
    const Tensor dx = empty_like(x, {in.n, in.c, in.h, in.w}, dtype_of<T>, in.layout);
    Tensor gradients[2];  // of gamma and beta; maps in the layout of x
    for (Tensor& t : gradients) {
      if (in.maps) {
        t = empty_like(x, {in.n, in.c, in.h * upsample, in.w * upsample}, dtype_of<T>, in.layout);
      } else if (gamma) {
        const ScalarType dtype = gamma->scalar_type();
        t = in.rows ? empty_like(x, {in.n, in.c}, dtype) : empty_like(x, {in.c}, dtype);
      } else {
        t = empty_like(x, {0}, dtype_of<T>);
      }
    }
    if (in.numel() == 0) {
      for (Tensor& t : gradients) torch::stable::zero_(t);
    } else {
      BackwardCall<T> call{};
      in.set_up(call, eps, gamma_offset, negative_slope);
      const Tensor used[2] = {in.statistic<A>(mean), in.statistic<A>(var)};
      call.mean = data_of<A>(used[0]);
      call.var = data_of<A>(used[1]);
      call.statistics = in.statistics();
      const int64_t values = int64_t{in.h} * in.w * (instance ? 1 : in.n);
      call.centre = training || instance ? static_cast<A>(1.0 / static_cast<double>(values)) : A(0);
      call.dy = data_of<T>(dy);
      call.dx = static_cast<T*>(dx.data_ptr());
      if (in.maps) {
        call.d_gamma_map = static_cast<T*>(gradients[0].data_ptr());
        call.d_beta_map = static_cast<T*>(gradients[1].data_ptr());
      } else if (gamma) {
        const bool wide = gamma->scalar_type() == dtype_of<A>;
        call.d_gamma = {gradients[0].data_ptr(), wide};
        call.d_beta = {gradients[1].data_ptr(), wide};
      }
      launch_backward(in, call, current_stream(x));
    }
    if (in.maps) {
      gradients[0] = dense(gradients[0], layout_of(*gamma));
      gradients[1] = dense(gradients[1], layout_of(*beta));
    }
    return {dx, gradients[0], gradients[1]};
  });
}

}  // namespace
}  // namespace pixnorm::modulate

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CUDA, m) { m.impl("modulate_bwd", TORCH_BOX(&pixnorm::modulate::modulate_bwd)); }
