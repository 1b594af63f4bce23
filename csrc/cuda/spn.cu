// SPN on NVIDIA GPUs, forward: the projection p = W x, statistics of x and p, then modulate. spn_backward.cu has the
// backward.
//
// Work is cut by shape alone and sums are added in a fixed order: every run gives the same bits.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/spn_call.cuh"
#include "cuda/spn_general.cuh"
#include "cuda/statistics.cuh"

namespace pixnorm::spn {
namespace {

// ---- forward modulate ----

template <class T>
struct ForwardCall : Call<T> {
  using A = acc_t<T>;
  Partials<A> partials;  // sets 0 and 1 are x and p; data == nullptr: the statistics are given
  const A* given[4];     // mean, var, mask_mean, mask_var
  A* used[4];
  T* y;
};

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
    finish_statistics<2, kChannelsLast>(call.partials, 0, 1, place.c, place.channel, place.lane_channel,
                                        memory + TableHere::kNumbers, statistics);
  } else if (place.channel) {
    for (int i = 0; i < 4; ++i) statistics[i] = call.given[i][place.c];
  }
  if (place.channel) {
    if (blockIdx.y == 0 && place.sample == 0 && place.position == 0 && place.group == 0) {
      for (int i = 0; i < 4; ++i) call.used[i][place.c] = statistics[i];
    }
    channel.set(call, call.in_group(call.group_of(place.sample), place.c), statistics[0], statistics[1], statistics[2],
                statistics[3]);
  }
  // y = gamma x̂ + beta = (rstd gamma) (x - mean) + beta
  affine.table.fill(call, place, channel.rstd);
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
      // Load row t of p and compute its mask; with it, row h = t - 1 has all three rows of the stencil.
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
      call.plan = make_plan<T, columns(), last()>(call.shape, call.per_sample);
      using TableHere = Table<T, u(), last()>;
      const int walking = Neighbours<acc_t<T>, 1, last()>::numbers(call.plan.threads);
      const int finishing = finish_numbers(2, call.plan.threads, last());
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
                      const Tensor& beta_weight, const Tensor& beta_weight_inv, const std::optional<Tensor>& gamma_bias,
                      const std::optional<Tensor>& beta_bias, const std::optional<Tensor>& index,
                      const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                      const std::optional<Tensor>& mask_mean, const std::optional<Tensor>& mask_var, double eps,
                      int64_t upsample, std::optional<double> negative_slope, bool allow_tf32) {
  const Shape s = shape_of(x, upsample);
  const bool given = mean.has_value();
  STD_TORCH_CHECK(var.has_value() == given && mask_mean.has_value() == given && mask_var.has_value() == given,
                  "pixnorm: give all four statistics or none");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ParameterTensors parameters(s, mask_projection, mask_weight, mask_bias,
                                    {&gamma_weight, &gamma_weight_inv, &beta_weight, &beta_weight_inv},
                                    {&gamma_bias, &beta_bias}, index);
  const MemoryFormat layout = layout_of(x);
  const bool channels_last = layout == MemoryFormat::ChannelsLast;
  const cudaStream_t stream = current_stream(x);
  return dispatch_floating(x.scalar_type(), [&](auto type) -> ForwardResult {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor x_dense = dense(x, layout);
    const Tensor y = empty_like(x, {s.n, s.c, s.h * upsample, s.w * upsample}, dtype_of<T>, layout);
    const Tensor p = empty_like(x, {s.n, parameters.masks, s.h, s.w}, dtype_of<T>, layout);
    Tensor used[4], statistics[4];
    for (int i = 0; i < 4; ++i) used[i] = empty_like(x, {i < 2 ? s.c : parameters.masks}, dtype_of<A>);
    if (given) {
      const Tensor* const from[4] = {&*mean, &*var, &*mask_mean, &*mask_var};
      for (int i = 0; i < 4; ++i) statistics[i] = statistic<A>(*from[i], i < 2 ? s.c : parameters.masks);
    }
    if (s.numel() == 0) {
      for (int i = 0; i < 4; ++i) given ? torch::stable::copy_(used[i], statistics[i]) : torch::stable::zero_(used[i]);
      return {y, p, used[0], used[1], used[2], used[3]};
    }

    project(s, channels_last, in_dtype(parameters.mask_projection, dtype_of<T>), x_dense, p, allow_tf32);
    if (parameters.general(s)) {
      GeneralCall<T> call{};
      parameters.set_up(call, s, eps, negative_slope, x_dense, p);
      call.y = static_cast<T*>(y.data_ptr());
      const auto data = [&](int i) { return static_cast<A*>(used[i].data_ptr()); };
      for (int i = 0; i < 4; ++i) {
        if (given) torch::stable::copy_(used[i], statistics[i]);
        call.used[i] = data(i);
      }
      for (int i = 0; !given && i < 4; i += 2) {  // of x, of p
        const int c = i == 0 ? s.c : call.masks;
        compute_statistics(StatisticsShape::batch(s.n, c, s.pixels(), channels_last), x, i == 0 ? call.x : call.p,
                           static_cast<const T*>(nullptr), data(i), data(i + 1), stream);
      }
      launch_general_forward(call, channels_last, upsample, stream);
      return {y, p, used[0], used[1], used[2], used[3]};
    }
    ForwardCall<T> call{};
    parameters.set_up(call, s, eps, negative_slope, x_dense, p);
    call.y = static_cast<T*>(y.data_ptr());
    for (int i = 0; i < 4; ++i) {
      call.used[i] = static_cast<A*>(used[i].data_ptr());
      if (given) call.given[i] = data_of<A>(statistics[i]);
    }
    Tensor partials;
    if (!given) {
      const auto shape = StatisticsShape::batch(s.n, s.c, s.pixels(), channels_last);
      const StatisticsPlan plan = plan_statistics(shape, call.x, call.p);
      partials = empty_like(x, {2, plan.parts, 3, s.c}, dtype_of<A>);
      call.partials = {static_cast<A*>(partials.data_ptr()), plan.parts, s.c};
      launch_statistics(shape, plan, call.x, call.p, call.partials, stream);
    }
    launch_forward(call, channels_last, upsample, stream);
    return {y, p, used[0], used[1], used[2], used[3]};
  });
}

}  // namespace
}  // namespace pixnorm::spn

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CUDA, m) { m.impl("spn_fwd", TORCH_BOX(&pixnorm::spn::spn_fwd)); }
