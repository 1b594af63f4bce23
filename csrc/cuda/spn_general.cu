// SPN with 1x1 or 5x5 taps, or with one mask for all channels (Table 7 of the paper), on NVIDIA GPUs. Simpler than the
// kernels of spn.cu, and not tuned: a thread owns one column and computes the masks of its neighbours itself.
//
// A thread walks down a strip with the (2 kReach + 1)² pixels around its own in registers. No block straddles two
// samples. Backward: d_beta (with an activation), the sums of the taps' gradients, dq, what the sums finish, dx and dp.

#include "cuda/instances.cuh"
#include "cuda/spn_general_work.cuh"
#include "tensor.h"

namespace pixnorm::spn {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 128;
// Minimum resident blocks per SM of the walks: told none, the compiler spills to reach a power of 2 of registers.
template <class T>
constexpr int kWalkBlocks = std::is_same_v<T, double> ? 2 : 3;

// ---- y, d_beta, or dx and dp: what takes gamma and beta ----

enum class Wanted { kY, kDBeta, kDx };

template <class T, int U, int K>
__global__ void __launch_bounds__(kThreads, kWalkBlocks<T>)
    spn_general_walk_kernel(const GeneralCall<T> call, Wanted wanted) {
  using A = acc_t<T>;
  using S = Stencil<K, U>;
  const Shape& s = call.shape;
  const Worker<T> worker(call);
  const Channel<T> channel = worker.statistics();
  const Taps<T, K> taps(worker);
  if (!worker.channel) return;
  const bool own_mask = call.masks == s.c;
  A row[2], means[kMeans] = {};
  for (int of = 0; of < 2; ++of) row[of] = call.row(of, worker.sample, worker.c);
  for (int i = 0; wanted == Wanted::kDx && i < kMeans; ++i) means[i] = call.means[int64_t{worker.c} * kMeans + i];
  const A weight = call.mask_weight[call.mask_in_group(worker.group, worker.c)];

  for (unsigned item = worker.first; item < call.items; item += worker.step) {
    const int w = item % s.w, top = item / s.w * call.rows, end = min(top + call.rows, s.h);
    MasksAround<T, S::kSide> masks;
    for (int h = top - S::kReach; h < top + S::kReach; ++h) masks.enter(worker, channel, h, w);
    for (int h = top; h < end; ++h) {
      masks.enter(worker, channel, h + S::kReach, w);
      const T x = call.x[worker.at(h, w)];
      const A x_hat = (static_cast<A>(x) - channel.mean) * channel.rstd;
      A dy_gamma = 0;
#pragma unroll
      for (int ab = 0; ab < U * U; ++ab) {
        const int a = ab / U, b = ab % U;
        A affine[2];
#pragma unroll
        for (int of = 0; of < 2; ++of) {
          affine[of] = row[of] + taps.inside(of, U * h + a, U * w + b, U * s.h, U * s.w);
#pragma unroll
          for (int k = 0; k < S::kTaps; ++k) {
            affine[of] = fma(taps.tap(of, k), masks.at[S::under(a, k / K)][S::under(b, k % K)], affine[of]);
          }
        }
        A value = fma(affine[0], x_hat, affine[1]);
        const int64_t at = worker.template at_output<U>(h, w, a, b);
        if (wanted == Wanted::kY) {
          if (call.activated) activate(value, call.slope);
          call.y[at] = static_cast<T>(value);
        } else if (wanted == Wanted::kDBeta) {
          A d_beta = static_cast<A>(call.dy[at]);
          activate_gradient(value, d_beta, call.slope);
          call.d_beta[at] = static_cast<T>(d_beta);
        } else {
          dy_gamma = fma(static_cast<A>(call.d_beta[at]), affine[0], dy_gamma);
        }
      }
      if (wanted != Wanted::kDx) continue;
      const int64_t at = worker.at(h, w), by_channel = worker.plane_by_channel() + h * s.w + w;
      const A dx = channel.rstd * (dy_gamma - fma(x_hat, means[kMeanGx], means[kMeanG]));
      call.dx[at] = static_cast<T>(dx);
      if (!call.channels_last) call.x_copy[by_channel] = x;
      if (own_mask) {
        const A p_hat = (worker.p(h, w) - channel.mask_mean) * channel.mask_rstd;
        const A dp = channel.mask_rstd * (weight * call.dm[at] - fma(p_hat, means[kMeanQp], means[kMeanQ]));
        call.dp[call.channels_last ? at : by_channel] = static_cast<T>(dp);
      }
    }
  }
}

// ---- the sums of the taps' gradients ----

// Of gamma (blockIdx.z = 0) or beta, for each tap: Σ d v over the pixels below it, and Σ d over the outputs for which
// it is inside the image.
template <class T, int U, int K>
__global__ void __launch_bounds__(kThreads, kWalkBlocks<T>) spn_general_sums_kernel(const GeneralCall<T> call) {
  using A = acc_t<T>;
  using S = Stencil<K, U>;
  const Shape& s = call.shape;
  const Worker<T> worker(call);
  const Channel<T> channel = worker.statistics();
  const bool of_gamma = blockIdx.z == 0;
  A sums[2 * S::kTaps] = {}, interior = 0;  // interior: over outputs for which all taps are inside
  for (unsigned item = worker.first; item < call.items; item += worker.step) {
    const int w = item % s.w, top = item / s.w * call.rows, end = min(top + call.rows, s.h);
    MasksAround<T, S::kSide> masks;
    for (int h = top - S::kReach; h < top + S::kReach; ++h) masks.enter(worker, channel, h, w);
    for (int h = top; h < end; ++h) {
      masks.enter(worker, channel, h + S::kReach, w);
      const A factor = of_gamma ? (static_cast<A>(call.x[worker.at(h, w)]) - channel.mean) * channel.rstd : A(1);
      const bool border = !worker.inside(h - S::kReach, w - S::kReach) || !worker.inside(h + S::kReach, w + S::kReach);
#pragma unroll
      for (int ab = 0; ab < U * U; ++ab) {
        const int a = ab / U, b = ab % U;
        const A d = factor * static_cast<A>(call.d_beta[worker.template at_output<U>(h, w, a, b)]);
        if (!border) interior += d;
#pragma unroll
        for (int k = 0; k < S::kTaps; ++k) {
          const int i = S::under(a, k / K), j = S::under(b, k % K);
          sums[k] = fma(d, masks.at[i][j], sums[k]);
          if (border && worker.inside(h + i - S::kReach, w + j - S::kReach)) sums[S::kTaps + k] += d;
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < S::kTaps; ++k) sums[S::kTaps + k] += interior;
  worker.write(sums, call.sums + (2 * worker.part() + blockIdx.z) * 2 * S::kTaps);
}

// ---- the gradient of the mask ----

template <class T, int U, int K>
__global__ void __launch_bounds__(kThreads, kWalkBlocks<T>) spn_general_mask_kernel(const GeneralCall<T> call) {
  using A = acc_t<T>;
  using S = Stencil<K, U>;
  constexpr int kSide = S::kSide;
  const Shape& s = call.shape;
  const Worker<T> worker(call);
  const Channel<T> channel = worker.statistics();
  const Taps<T, K> taps(worker);
  const bool own_mask = call.masks == s.c;
  A sums[2] = {};  // Σ dq, Σ dq p̂
  for (unsigned item = worker.first; item < call.items; item += worker.step) {
    const int w = item % s.w, top = item / s.w * call.rows, end = min(top + call.rows, s.h);
    A x_hat[kSide][kSide] = {}, d_beta[U * U][kSide][kSide] = {};  // of the pixels around
    const auto enter = [&](int h) {
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          const int column = w + j - S::kReach;
          const bool here = worker.inside(h, column);
          if (i < kSide - 1) {
            x_hat[i][j] = x_hat[i + 1][j];
          } else {
            x_hat[i][j] = here ? (static_cast<A>(call.x[worker.at(h, column)]) - channel.mean) * channel.rstd : A(0);
          }
#pragma unroll
          for (int ab = 0; ab < U * U; ++ab) {
            if (i < kSide - 1) {
              d_beta[ab][i][j] = d_beta[ab][i + 1][j];
            } else {
              const int64_t at = worker.template at_output<U>(h, column, ab / U, ab % U);
              d_beta[ab][i][j] = here ? static_cast<A>(call.d_beta[at]) : A(0);
            }
          }
        }
      }
    };
    for (int h = top - S::kReach; h < top + S::kReach; ++h) enter(h);
    for (int h = top; h < end; ++h) {
      enter(h + S::kReach);
      A dm = 0;
#pragma unroll
      for (int k = 0; k < S::kTaps; ++k) {
        const A tap_gamma = taps.tap(0, k), tap_beta = taps.tap(1, k);
#pragma unroll
        for (int ab = 0; ab < U * U; ++ab) {
          const int i = S::over(ab / U, k / K), j = S::over(ab % U, k % K);
          dm = fma(d_beta[ab][i][j], fma(tap_gamma, x_hat[i][j], tap_beta), dm);
        }
      }
      if (own_mask) {
        const A p = worker.p(h, w);
        dm *= Mask<T>::derivative(channel.mask(p));
        sums[0] += dm;
        sums[1] = fma(dm, (p - channel.mask_mean) * channel.mask_rstd, sums[1]);
      }
      call.dm[worker.at(h, w)] = dm;
    }
  }
  if (own_mask) worker.write(sums, call.mask_sums + 2 * worker.part());
}

// ---- what the sums finish ----

// A block for each channel of a sample. The first sample of a group adds up the parts of all of the group's samples.
template <class T>
__global__ void __launch_bounds__(kThreads) spn_general_finish_kernel(const GeneralCall<T> call) {
  using A = acc_t<T>;
  const Shape& s = call.shape;
  const int sample = blockIdx.x / s.c, c = blockIdx.x - sample * s.c, thread = threadIdx.x;
  const int taps = call.kernel_size * call.kernel_size, each = 2 * taps, group = call.group_of(sample);
  A* const total = shared_memory<A>();
  A* const of_means = total + 2 * each;
  A* const share = call.shares + (int64_t{c} * s.n + sample) * kMeans;
  if (thread < kMeans) share[thread] = 0;
  const int64_t first = int64_t{c} * call.parts;
  bool later = false;
  for (int other = thread; other < sample; other += blockDim.x) later = later || call.group_of(other) == group;
  if (!__syncthreads_or(later)) {
    const auto sum = [&](const A* from, int count, int i) {
      A result = 0;
      for (int part = 0; part < call.parts; ++part) {
        if (call.group_of(part / call.splits) == group) result += from[(first + part) * count + i];
      }
      return result;
    };
    for (int i = thread; i < 2 * each; i += blockDim.x) total[i] = sum(call.sums, 2 * each, i);
    __syncthreads();
    const int channel = call.in_group(group, c);
    for (int i = thread; i < each; i += blockDim.x) {
      const int of = i / taps, k = i % taps, at = channel * taps + k;
      const A inside = total[of * each + taps + k];
      const A with_mask = Mask<T>::kScale * total[of * each + k] + Mask<T>::kShift * inside;
      const A with_inverse = inside - with_mask;
      of_means[i] = call.taps[0][at] * with_mask + call.taps[1][at] * with_inverse;
      call.d_taps[2 * of].set(at, with_mask);
      call.d_taps[2 * of + 1].set(at, with_inverse);
    }
    __syncthreads();
    if (thread < 2) {
      A result = 0;
      for (int k = 0; k < taps; ++k) result += of_means[thread * taps + k];
      share[thread == 0 ? kMeanGx : kMeanG] = call.mean(result);
    } else if (thread < 4 && call.masks == s.c) {
      const bool of_bias = thread == 2;
      const A result = sum(call.mask_sums, 2, of_bias ? 0 : 1);
      (of_bias ? call.d_mask_bias : call.d_mask_weight).set(channel, result);
      share[of_bias ? kMeanQ : kMeanQp] = call.mean(call.mask_weight[channel] * result);
    }
    __syncthreads();
  }
  if (thread >= 2) return;
  A result = 0;
  for (int split = 0; split < call.splits; ++split) {
    const int64_t part = first + sample * call.splits + split;
    result += call.sums[(2 * part + thread) * each + taps + taps / 2];  // the middle tap is inside for all outputs
  }
  if (call.d_rows[thread].data) call.d_rows[thread].set(int64_t{sample} * s.c + c, result);
  share[thread == 0 ? kMeanGx : kMeanG] += call.mean(call.row(0, sample, c) * result);
}

// A warp for each mean of a channel.
template <class T>
__global__ void __launch_bounds__(kMeans* kWarp) spn_bwd_add_means_kernel(const BackwardCall<T> call) {
  const int lane = threadIdx.x % kWarp, mean = threadIdx.x / kWarp;
  const acc_t<T>* const shares = call.shares + int64_t{blockIdx.x} * call.shape.n * kMeans + mean;
  acc_t<T> total = 0;
  for (int n = lane; n < call.shape.n; n += kWarp) total += shares[n * kMeans];
  total = warp_sum(total);
  if (lane == 0) call.means[blockIdx.x * kMeans + mean] = total;
}

// ---- one mask for all channels ----

template <class T>
__device__ Channel<T> one_mask(const GeneralCall<T>& call, int sample) {
  Channel<T> result;
  result.set(call, call.group_of(sample), 0, 1, call.used[2][0], call.used[3][0]);
  return result;
}

// dq from the channels' shares of dm, and its sums. The grid is (samples, splits).
template <class T>
__global__ void __launch_bounds__(kThreads) spn_one_mask_sums_kernel(const GeneralCall<T> call) {
  using A = acc_t<T>;
  const int channels = call.shape.c, pixels = call.shape.pixels(), sample = blockIdx.x;
  const Channel<T> mask = one_mask(call, sample);
  const int64_t plane = int64_t{sample} * pixels, step = call.channels_last ? 1 : pixels;
  A sums[2] = {};
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < pixels; i += gridDim.y * blockDim.x) {
    const A* const dm = call.dm + plane * channels + (call.channels_last ? int64_t{i} * channels : i);
    A total = 0;
    for (int c = 0; c < channels; ++c) total += dm[c * step];
    const A p = static_cast<A>(call.p[plane + i]);
    const A dq = total * Mask<T>::derivative(mask.mask(p));
    call.dq[plane + i] = dq;
    sums[0] += dq;
    sums[1] = fma(dq, (p - mask.mask_mean) * mask.mask_rstd, sums[1]);
  }
  write_sums<false>(sums, true, shared_memory<A>(), call.mask_sums + 2 * (int64_t{sample} * gridDim.y + blockIdx.y));
}

// One block: the gradients of the mask's affine, of each group, and the means of w dq and w dq p̂.
template <class T>
__global__ void __launch_bounds__(kThreads) spn_one_mask_finish_kernel(const GeneralCall<T> call) {
  using A = acc_t<T>;
  A means[2] = {};
  for (int group = threadIdx.x; group < call.groups; group += blockDim.x) {
    A sums[2] = {};
    bool absent = true;
    for (int sample = 0; sample < call.shape.n; ++sample) {
      if (call.group_of(sample) != group) continue;
      absent = false;
      const A* const from = call.mask_sums + 2 * int64_t{sample} * call.splits;
      for (int split = 0; split < call.splits; ++split) sums[0] += from[2 * split], sums[1] += from[2 * split + 1];
    }
    call.d_mask_bias.set(group, sums[0]);
    call.d_mask_weight.set(group, sums[1]);
    if (absent) continue;  // its weight may be NaN
    for (int i = 0; i < 2; ++i) means[i] = fma(call.mask_weight[group], sums[i], means[i]);
  }
  for (int i = 0; i < 2; ++i) {
    const A total = block_sum(means[i], shared_memory<A>());
    if (threadIdx.x == 0) call.means[int64_t{call.shape.c} * kMeans + i] = call.mean(total);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) spn_one_mask_apply_kernel(const GeneralCall<T> call) {
  using A = acc_t<T>;
  const int pixels = call.shape.pixels(), sample = blockIdx.x;
  const Channel<T> mask = one_mask(call, sample);
  const A weight = call.mask_weight[call.group_of(sample)];
  const A* const means = call.means + int64_t{call.shape.c} * kMeans;  // after those of the channels
  const int64_t plane = int64_t{sample} * pixels;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < pixels; i += gridDim.y * blockDim.x) {
    const A p_hat = (static_cast<A>(call.p[plane + i]) - mask.mask_mean) * mask.mask_rstd;
    call.dp[plane + i] =
        static_cast<T>(mask.mask_rstd * (weight * call.dq[plane + i] - fma(p_hat, means[1], means[0])));
  }
}

// ---- launches ----

// Sets the plan of a call and returns the launch of its walks, without shared memory.
template <class T>
Launch plan(GeneralCall<T>& call, bool channels_last, cudaStream_t stream) {
  const Shape& s = call.shape;
  constexpr int kStrip = 16, kTargetBlocks = 1 << 11;
  call.channels_last = channels_last;
  call.channels = channels_last ? kWarp : 1;
  call.blocks = ceil_div(s.c, call.channels);
  call.rows = std::min(s.h, kStrip);
  const int items = s.w * ceil_div(s.h, call.rows);
  call.items = items;
  int threads = channels_last ? kThreads : kWarp;
  while (!channels_last && threads < std::min(items, kThreads)) threads *= 2;
  const int rounds = ceil_div(items, threads / (channels_last ? kWarp : 1));
  const int64_t blocks = int64_t{call.blocks} * s.n;
  STD_TORCH_CHECK(int64_t{s.c} * s.n <= INT_MAX, "pixnorm: more than 2^31 planes");
  call.splits = std::clamp(static_cast<int>((kTargetBlocks + blocks - 1) / blocks), 1, std::min(rounds, 64));
  call.parts = s.n * call.splits;
  return {dim3(static_cast<unsigned>(blocks), call.splits), dim3(threads), 0, stream};
}

// f(Int<U>, Int<K>)
template <class F>
void dispatch_stencil(int kernel_size, int64_t upsample, const F& f) {
  dispatch_bool(upsample == 2, [&](auto twice) {
    constexpr Int<twice() ? 2 : 1> u{};
    kernel_size == 1 ? f(u, Int<1>{}) : kernel_size == 3 ? f(u, Int<3>{}) : f(u, Int<5>{});
  });
}

template <class T>
Launch with_numbers(Launch how, int numbers) {
  how.shared_bytes = numbers * sizeof(acc_t<T>);
  return how;
}

}  // namespace

template <class T>
void launch_general_forward(GeneralCall<T> call, bool channels_last, int64_t upsample, cudaStream_t stream) {
  const Launch walk = plan(call, channels_last, stream);
  dispatch_stencil(call.kernel_size, upsample, [&](auto u, auto k) {
    const int table = Taps<T, k()>::kEntries * call.channels;
    launch(spn_general_walk_kernel<T, u(), k()>, with_numbers<T>(walk, table), call, Wanted::kY);
  });
}

template <class T>
void launch_general_backward(GeneralCall<T> call, bool channels_last, int64_t upsample, const Tensor& like,
                             cudaStream_t stream) {
  using A = acc_t<T>;
  const Launch walk = plan(call, channels_last, stream);
  const Shape& s = call.shape;
  const bool own_mask = call.masks == s.c;
  const int warps = walk.block.x / kWarp, each = 2 * call.kernel_size * call.kernel_size;
  const auto memory = [&](std::initializer_list<int64_t> sizes) { return empty_like(like, sizes, dtype_of<A>); };
  const auto data = [](const Tensor& t) { return static_cast<A*>(t.data_ptr()); };
  const Tensor d_beta = empty_like(like, {call.activated ? s.numel() * upsample * upsample : 0}, dtype_of<T>);
  const Tensor dm = memory({s.n, s.c, s.h, s.w}), dq = memory({own_mask ? 0 : int64_t{s.n} * s.pixels()});
  const Tensor sums = memory({s.c, call.parts, 2, each}), mask_sums = memory({own_mask ? s.c : 1, call.parts, 2});
  const Tensor shares = memory({s.c, s.n, kMeans}), means = memory({s.c + 1, kMeans});  // the last one: of one mask
  call.dm = data(dm), call.dq = data(dq), call.sums = data(sums), call.mask_sums = data(mask_sums);
  call.shares = data(shares), call.means = data(means);
  call.d_beta = call.activated ? static_cast<T*>(d_beta.data_ptr()) : const_cast<T*>(call.dy);
  dispatch_stencil(call.kernel_size, upsample, [&](auto u, auto k) {
    const int table = Taps<T, k()>::kEntries * call.channels;
    const auto adding = [&](int count) { return channels_last ? warps / 2 * count * kWarp : warps * count; };
    if (call.activated) {
      launch(spn_general_walk_kernel<T, u(), k()>, with_numbers<T>(walk, table), call, Wanted::kDBeta);
    }
    Launch twice = with_numbers<T>(walk, adding(each));
    twice.grid.z = 2;
    launch(spn_general_sums_kernel<T, u(), k()>, twice, call);
    launch(spn_general_mask_kernel<T, u(), k()>, with_numbers<T>(walk, std::max(table, adding(2))), call);
    const Launch finish{dim3(s.c * s.n), dim3(kThreads), 3 * each * sizeof(A), stream};
    launch(spn_general_finish_kernel<T>, finish, call);
    launch_add_means<T>(call, stream);
    if (!own_mask) {
      const Launch pixels{dim3(s.n, call.splits), dim3(kThreads), 2 * kThreads / kWarp * sizeof(A), stream};
      launch(spn_one_mask_sums_kernel<T>, pixels, call);
      launch(spn_one_mask_finish_kernel<T>, {dim3(1), dim3(kThreads), kThreads / kWarp * sizeof(A), stream}, call);
      launch(spn_one_mask_apply_kernel<T>, pixels, call);
    }
    launch(spn_general_walk_kernel<T, u(), k()>, with_numbers<T>(walk, table), call, Wanted::kDx);
  });
}

template <class T>
void launch_add_means(const BackwardCall<T>& call, cudaStream_t stream) {
  launch(spn_bwd_add_means_kernel<T>, {dim3(call.shape.c), dim3(kMeans * kWarp), 0, stream}, call);
}

#define PIXNORM_INSTANTIATE(T)                                                                       \
  template void launch_general_forward(GeneralCall<T>, bool, int64_t, cudaStream_t);                 \
  template void launch_general_backward(GeneralCall<T>, bool, int64_t, const Tensor&, cudaStream_t); \
  template void launch_add_means(const BackwardCall<T>&, cudaStream_t);
PIXNORM_INSTANTIATE(double)
PIXNORM_INSTANTIATE(float)
PIXNORM_INSTANTIATE(BFloat16)
PIXNORM_INSTANTIATE(Half)
#undef PIXNORM_INSTANTIATE

}  // namespace pixnorm::spn
