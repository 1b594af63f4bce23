// SPN on NVIDIA GPUs, backward: reduce takes 38 sums per channel, apply writes dx and dp, then two GEMMs. Both kernels
// share the walk in spn_backward_walk.cuh.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/spn_backward_sums.cuh"
#include "cuda/spn_backward_walk.cuh"
#include "cuda/spn_call.cuh"
#include "cuda/spn_general.cuh"

namespace pixnorm::spn {
namespace {

// ---- kernels ----

constexpr int kFinishThreads = 256;

template <class T>
__global__ void __launch_bounds__(kFinishThreads) spn_bwd_finish_kernel(const BackwardCall<T> call) {
  finish_channel(call, blockIdx.x, 0, true, shared_memory<acc_t<T>>(), call.means + int64_t{blockIdx.x} * kMeans);
}

constexpr int kSampleThreads = 128;

template <class T>
__global__ void __launch_bounds__(kSampleThreads) spn_bwd_finish_samples_kernel(const BackwardCall<T> call) {
  const int sample = blockIdx.x / call.shape.c;
  finish_sample(call, blockIdx.x - sample * call.shape.c, sample, shared_memory<acc_t<T>>());
}

// Minimum resident blocks per SM. The 38 sums are in registers; the walk in NCHW needs more, so there 12 warps.
template <class T, bool kChannelsLast>
constexpr int kReduceBlocks = kChannelsLast || std::is_same_v<T, double> ? kBlocksAtOnce<T, kChannelsLast> : 3;

template <class T, int V, int U, bool kChannelsLast, bool kActivated>
__global__ void __launch_bounds__(kMostThreads<T, kChannelsLast>, kReduceBlocks<T, kChannelsLast>)
    spn_bwd_reduce_kernel(const BackwardCall<T> call) {
  walk_backward<T, V, U, kChannelsLast, kActivated, false>(call);
}

// 16 warps (kBlocksAtOnce), except where a thread has 8 columns of y in two rows, which take more registers.
template <class T, int V, int U, bool kChannelsLast>
constexpr int kApplyBlocks = U * U * V == 16 ? 3 : kBlocksAtOnce<T, kChannelsLast>;

template <class T, int V, int U, bool kChannelsLast>
__global__ void __launch_bounds__(kMostThreads<T, kChannelsLast>, kApplyBlocks<T, V, U, kChannelsLast>)
    spn_bwd_apply_kernel(const BackwardCall<T> call) {
  walk_backward<T, V, U, kChannelsLast, true, true>(call);
}

// Launches reduce and apply. In channels_last a kernel between them finishes the sums: a block of apply has 32 channels
// there, and would have to read a hundred kilobytes of partial sums. With groups or rows two kernels do in both
// layouts, as the means take the sums of all samples.
template <class T>
void launch_backward(BackwardCall<T> call, bool channels_last, int64_t upsample, const Tensor& x, cudaStream_t stream) {
  using A = acc_t<T>;
  dispatch_layout(channels_last, upsample, [&](auto last, auto u) {
    dispatch_columns<T, u(), last()>(
        call.shape, {call.x, call.p, call.dx, call.dp, call.x_copy}, call.dy, [&](auto columns) {
          constexpr int kExchanged = u() == 2 ? 4 : 2;
          using TableHere = Table<T, u(), last()>;
          // In channels_last with an activation, 4 columns take more registers in reduce than 16 warps per SM allow.
          constexpr bool kNarrow = last() && u() == 1 && columns() == 4;
          const auto launch_reduce = [&](auto v, auto activated) {
            Plan& plan = call.plan = make_plan<T, v(), last()>(call.shape, call.per_sample);
            if (plan.splits * plan.samples > kMaxSplits) plan.split(kMaxSplits * plan.blocks);
            call.splits = plan.splits;
            call.parts = plan.splits * plan.samples;
            const Tensor sums = empty_like(x, {call.shape.c, call.parts, kSums}, dtype_of<A>);
            call.sums = static_cast<A*>(sums.data_ptr());
            const int warps = plan.threads / kWarp;
            const int walking = TableHere::kNumbers + Neighbours<A, kExchanged, last()>::numbers(plan.threads);
            const int adding = last() ? warps / 2 * kSums * kWarp : warps * kSums;  // see write_sums
            launch(spn_bwd_reduce_kernel<T, v(), u(), last(), activated()>,
                   launch_of(plan, std::max(walking, adding) * sizeof(A), stream), call);
            return sums;
          };
          // Without an activation reduce needs neither gamma nor beta: worth an instance, but only if vectorised.
          constexpr bool kTwo = columns() > 1;
          const Tensor sums = kTwo && !call.activated ? launch_reduce(columns, Bool<!kTwo>{})
                                                      : launch_reduce(Int<kNarrow ? 2 : columns()>{}, Bool<true>{});
          const bool apart = last() || call.per_sample;
          const Tensor means = empty_like(x, {apart ? call.shape.c : 0, kMeans}, dtype_of<A>);
          call.means = apart ? static_cast<A*>(means.data_ptr()) : nullptr;
          const Tensor shares = empty_like(x, {call.shape.c, call.per_sample ? call.shape.n : 0, kMeans}, dtype_of<A>);
          if (call.per_sample) {
            call.shares = static_cast<A*>(shares.data_ptr());
            const size_t bytes = kSampleThreads / kWarp * kSums * sizeof(A);
            launch(spn_bwd_finish_samples_kernel<T>,
                   {dim3(call.shape.c * call.shape.n), dim3(kSampleThreads), bytes, stream}, call);
            launch_add_means(call, stream);
          } else if (last()) {
            const size_t bytes = kFinishThreads / kWarp * kSums * sizeof(A);
            launch(spn_bwd_finish_kernel<T>, {dim3(call.shape.c), dim3(kFinishThreads), bytes, stream}, call);
          }
          const Plan& plan = call.plan = make_plan<T, columns(), last()>(call.shape, call.per_sample);
          const int walking = TableHere::kNumbers + Neighbours<A, kExchanged, last()>::numbers(plan.threads);
          const int finishing = last() ? 0 : TableHere::kNumbers + kMeans + plan.threads / kWarp * kSums;
          launch(spn_bwd_apply_kernel<T, columns(), u(), last()>,
                 launch_of(plan, std::max(walking, finishing) * sizeof(A), stream), call);
        });
  });
}

// ---- the op ----

// dx += Wᵀ dp; in NCHW dp is (C, N, HW)
void add_grad_input(const Shape& s, bool channels_last, const Tensor& weight, const Tensor& dp, const Tensor& dx,
                    bool tf32) {
  const Matrices out = as_matrices(dx, s, channels_last);
  const Matrices w = repeated(as_matrix(weight, s), out.batch);
  Matrices in = as_matrices(dp, s, channels_last);
  if (!channels_last) in.row_stride = s.n * int64_t{s.pixels()}, in.batch_stride = s.pixels();
  channels_last ? gemm(out, in, w, 1, tf32) : gemm(out, w.transposed(), in, 1, tf32);
}

// dW = dp xᵀ; in NCHW both are (C, N, HW)
void grad_weight(const Shape& s, bool channels_last, const Tensor& dp, const Tensor& x, const Tensor& dw, bool tf32) {
  const Matrices out = as_matrix(dw, s);
  const int64_t all = s.n * int64_t{s.pixels()};
  const auto matrix = [&](const Tensor& t) {
    if (channels_last) return as_matrices(t, s, true);
    return Matrices{t.data_ptr(), t.scalar_type(), 1, t.size(1), all, 0, all, 1};
  };
  channels_last ? gemm(out, matrix(dp).transposed(), matrix(x), 0, tf32)
                : gemm(out, matrix(dp), matrix(x).transposed(), 0, tf32);
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardResult spn_bwd(const Tensor& grad_y, const Tensor& x, const Tensor& mask_projection, const Tensor& mask_weight,
                       const Tensor& mask_bias, const Tensor& gamma_weight, const Tensor& gamma_weight_inv,
                       const Tensor& beta_weight, const Tensor& beta_weight_inv,
                       const std::optional<Tensor>& gamma_bias, const std::optional<Tensor>& beta_bias,
                       const std::optional<Tensor>& index, const Tensor& p, const Tensor& mean, const Tensor& var,
                       const Tensor& mask_mean, const Tensor& mask_var, double eps, int64_t upsample,
                       std::optional<double> negative_slope, bool allow_tf32, bool training) {
  const Shape s = shape_of(x, upsample);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ParameterTensors parameters(s, mask_projection, mask_weight, mask_bias,
                                    {&gamma_weight, &gamma_weight_inv, &beta_weight, &beta_weight_inv},
                                    {&gamma_bias, &beta_bias}, index);
  check_sizes(grad_y, "grad_y", {s.n, s.c, s.h * upsample, s.w * upsample});
  check_sizes(p, "p", {s.n, parameters.masks, s.h, s.w});
  check_same_dtype(grad_y, "grad_y", x);
  check_same_dtype(p, "p", x);
  const MemoryFormat layout = layout_of(x);
  const bool channels_last = layout == MemoryFormat::ChannelsLast;
  const cudaStream_t stream = current_stream(x);
  return dispatch_floating(x.scalar_type(), [&](auto type) -> BackwardResult {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor x_dense = dense(x, layout), p_dense = dense(p, layout);
    Tensor dy_dense = dense(grad_y, layout);
    // A misaligned gradient must not change the number of columns per thread, and with it the order of sums.
    if (!channels_last && !is_aligned(dy_dense.data_ptr(), 16)) dy_dense = torch::stable::clone(dy_dense);
    const Tensor dx = empty_like(x, {s.n, s.c, s.h, s.w}, dtype_of<T>, layout);
    const ScalarType parameter_dtype = mask_weight.scalar_type();
    const int64_t groups = parameters.groups, masks = parameters.masks, k = parameters.kernel_size;
    Tensor d_projection = empty_like(x, {masks, s.c, 1, 1}, parameter_dtype);
    const auto of_groups = [&](std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> with_groups) {
      return empty_like(x, index ? with_groups : sizes, parameter_dtype);
    };
    Tensor d_mask_weight = of_groups({masks}, {groups, masks}), d_mask_bias = of_groups({masks}, {groups, masks});
    Tensor d_taps[4], d_rows[2];
    for (Tensor& t : d_taps) t = of_groups({s.c, 1, k, k}, {groups, s.c, 1, k, k});
    for (int i = 0; i < 2; ++i) {
      const auto& row = parameters.rows[i];
      d_rows[i] = row ? empty_like(x, {s.n, s.c}, row->scalar_type()) : empty_like(x, {0}, parameter_dtype);
    }
    if (s.numel() == 0 || index) {  // groups that no sample has
      for (Tensor* t : {&d_mask_weight, &d_mask_bias, &d_taps[0], &d_taps[1], &d_taps[2], &d_taps[3]}) {
        torch::stable::zero_(*t);
      }
    }
    if (s.numel() == 0) {
      for (Tensor* t : {&d_projection, &d_rows[0], &d_rows[1]}) torch::stable::zero_(*t);
    } else {
      // In NCHW, dW = Σₙ dpₙ xₙᵀ is not a single GEMM, but in (C, N, HW) it is. So apply writes dp in that order, and a
      // copy of x.
      const Tensor dp = empty_like(x, {s.n, masks, s.h, s.w}, dtype_of<T>, layout);
      const Tensor x_copy = channels_last ? x_dense : empty_like(x, {s.n, s.c, s.h, s.w}, dtype_of<T>);
      GeneralCall<T> call{};
      parameters.set_up(call, s, eps, negative_slope, x_dense, p_dense);
      call.dy = data_of<T>(dy_dense);
      call.dx = static_cast<T*>(dx.data_ptr());
      call.dp = static_cast<T*>(dp.data_ptr());
      call.x_copy = static_cast<T*>(x_copy.data_ptr());
      call.centre = training ? static_cast<A>(1.0 / (int64_t{s.n} * s.pixels())) : A(0);
      Tensor used[4];
      const Tensor* const from[4] = {&mean, &var, &mask_mean, &mask_var};
      for (int i = 0; i < 4; ++i) {
        used[i] = statistic<A>(*from[i], i < 2 ? s.c : masks);
        call.used[i] = data_of<A>(used[i]);
      }
      const bool wide = parameter_dtype == dtype_of<A>;
      call.d_mask_weight = {d_mask_weight.data_ptr(), wide};
      call.d_mask_bias = {d_mask_bias.data_ptr(), wide};
      for (int i = 0; i < 4; ++i) call.d_taps[i] = {d_taps[i].data_ptr(), wide};
      for (int i = 0; i < 2; ++i) {
        if (parameters.rows[i]) call.d_rows[i] = {d_rows[i].data_ptr(), d_rows[i].scalar_type() == dtype_of<A>};
      }
      parameters.general(s) ? launch_general_backward(call, channels_last, upsample, x, stream)
                            : launch_backward<T>(call, channels_last, upsample, x, stream);
      const Tensor weight = in_dtype(parameters.mask_projection, dtype_of<T>);
      add_grad_input(s, channels_last, weight, dp, dx, allow_tf32);
      grad_weight(s, channels_last, dp, x_copy, d_projection, allow_tf32);
    }
    return {dx,        d_projection, d_mask_weight, d_mask_bias, d_taps[0],
            d_taps[1], d_taps[2],    d_taps[3],     d_rows[0],   d_rows[1]};
  });
}

}  // namespace
}  // namespace pixnorm::spn

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CUDA, m) { m.impl("spn_bwd", TORCH_BOX(&pixnorm::spn::spn_bwd)); }
