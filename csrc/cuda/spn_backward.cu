// SPN on NVIDIA GPUs, backward: reduce, then apply. What both do for a row is one function.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/spn_backward_sums.cuh"
#include "cuda/spn_call.cuh"

namespace pixnorm::spn {
namespace {

// ---- kernels ----

constexpr int kFinishThreads = 256;

template <class T>
__global__ void __launch_bounds__(kFinishThreads) spn_bwd_finish_kernel(const BackwardCall<T> call) {
  finish_channel(call, blockIdx.x, true, shared_memory<acc_t<T>>(), call.means + int64_t{blockIdx.x} * kMeans);
}

// Rows of a strip, backward: the same walk for both kernels.
//
// With z_k, the sum of dγ (or dβ) over the outputs whose tap k falls on a pixel of x: dm = Σ w_k z_k, and the gradient
// of w_k is Σ m z_k. Without upsampling z_k is one output. With it, it is a box of 2x2, and the box of a row of x that
// reaches up is the one that reaches down from the row above.
template <class T, int V, int U, bool kChannelsLast, bool kActivated, bool kApply>
__device__ __forceinline__ void backward(const BackwardCall<T>& call) {
  using A = acc_t<T>;
  constexpr bool kNeedGamma = kApply || kActivated;
  constexpr int kExchanged = U == 2 ? 4 : 2;
  using TableHere = Table<T, U, kChannelsLast>;
  using Exchange = Neighbours<A, kExchanged, kChannelsLast>;
  const Shape& s = call.shape;
  const Plan& plan = call.plan;
  Place<V, kChannelsLast> place(s, plan);
  A* const memory = shared_memory<A>();
  A* const after_table = memory + TableHere::kNumbers;
  // Where the sums fill the registers that 16 warps can have, the taps stay in shared memory, and p is read twice.
  constexpr bool kSpareRegisters = kApply || !kChannelsLast || std::is_same_v<T, double>;
  Affine<T, V, U, kChannelsLast, kSpareRegisters> affine{TableHere(memory, place.lane_channel), {}};
  Exchange neighbours(after_table, place.position, plan.positions);

  Channel<T> channel{};
  A means[kMeans] = {};
  if (place.channel) {
    channel.set(call, place.c, call.used[0][place.c], call.used[1][place.c], call.used[2][place.c],
                call.used[3][place.c]);
  }
  // Inside the loop neither x̂ nor p̂ are needed: rstd is in the taps of gamma, or comes to the sums at the end.
  affine.table.fill(call, place.lane_channel, channel.rstd);
  if constexpr (kApply && !kChannelsLast) {
    A* const scratch = after_table + kMeans;
    finish_channel(call, place.c, blockIdx.y == 0, scratch, after_table);
  }
  __syncthreads();
  affine.take_taps();
  if constexpr (kApply) {
    const A* const from = kChannelsLast ? call.means + int64_t{place.c} * kMeans : after_table;
    for (int i = 0; place.channel && i < kMeans; ++i) means[i] = from[i];
  }
  // dx = dy γ rstd - (x - mean) dx_slope - dx_shift, and likewise dp from dq and p.
  const A dp_scale = place.channel ? call.mask_weight[place.c] * channel.mask_rstd : A(0);
  const A dx_slope = channel.rstd * channel.rstd * means[kMeanGx], dx_shift = channel.rstd * means[kMeanG];
  const A dp_slope = dp_scale * channel.mask_rstd * means[kMeanQp], dp_shift = dp_scale * means[kMeanQ];

  A sums[kApply ? 1 : kSums] = {};
  const int pixel = kChannelsLast ? s.c : 1;
  const bool whole = plan.rows >= s.h;
  const bool activated = kActivated && call.activated;
  using XRow = Row<T, V, kChannelsLast>;
  using YRow = Row<T, U * V, kChannelsLast>;
  // Apply goes through the strips the other way, from those that reduce has left in the L2 cache.
  const int rounds = ceil_div(plan.strips, plan.groups), step = kApply ? -static_cast<int>(gridDim.y) : gridDim.y;
  for (int round = kApply ? rounds - 1 - blockIdx.y : blockIdx.y; round >= 0 && round < rounds; round += step) {
    place.enter(round * plan.groups + place.group, s, plan);
    const int64_t base = place.base(s, 1);
    const T* const x = call.x + base;
    const T* const p = call.p + base;
    const T* const dy = call.dy + place.base(s, U);
    const auto inside = [&](int h) { return place.inside && h >= 0 && h < s.h; };
    const auto owned = [&](int h) { return place.owns && h >= place.row && h < place.row + plan.rows && h < s.h; };
    const auto load_x = [&](XRow& row, const T* from, int h) {
      load(row, from + (h * s.w + place.column) * pixel, s.c);
    };

    // Row t of p arrives, row h = t - 1 of x and dy is worked on, and with it row h - 1 of dm is complete.
    XRow p_next{}, p_rows[kSpareRegisters ? 3 : 1] = {}, x_next{};  // p_rows: up to row t
    YRow dy_next[U] = {};
    A mask[3][V + 2] = {};                // rows h - 1, h, t
    A dm[2][V] = {};                      // rows h - 1, h, as far as they are known
    A above[2][U == 2 ? 2 * V : 1] = {};  // with upsampling: the last row of dγ and dβ of row h - 1 of x
    const int begin = whole ? 0 : activated ? -2 : -1;
    if (inside(place.row + begin)) load_x(p_next, p, place.row + begin);
    for (int i = begin; i <= plan.rows + 1; ++i) {
      const int t = place.row + i, h = t - 1;
      slide<A, V>(mask);
      constexpr int kLast = kSpareRegisters ? 2 : 0;
#pragma unroll
      for (int row = 0; row < kLast; ++row) p_rows[row] = p_rows[row + 1];
      p_rows[kLast] = p_next;
      if (i <= plan.rows && inside(t + 1)) load_x(p_next, p, t + 1);
      {
        A values[V];
        unpack(p_rows[kLast], values);
#pragma unroll
        for (int j = 0; j < V; ++j) mask[2][j + 1] = inside(t) ? channel.mask(values[j]) : A(0);
        if constexpr (kNeedGamma) {
          const A first[1] = {mask[2][1]}, last[1] = {mask[2][V]};
          A left[1], right[1];
          neighbours.exchange(first, last, left, right);
          mask[2][0] = left[0], mask[2][V + 1] = right[0];
        }
      }

      const XRow x_row = x_next;
      YRow dy_rows[U];
#pragma unroll
      for (int a = 0; a < U; ++a) dy_rows[a] = dy_next[a];
      const bool here = inside(h);
      if (i >= -1 && i <= plan.rows && inside(t)) {
        load_x(x_next, x, t);
#pragma unroll
        for (int a = 0; a < U; ++a) load(dy_next[a], dy + ((U * t + a) * U * s.w + U * place.column) * pixel, s.c);
      }
      if (i < (whole ? 1 : 0)) continue;

      // dβ = dy (where ReLU lets it through) and dγ = dy x̂ (here without rstd)
      A centred[V], d[2][U][U * V], d_gamma_sum[V] = {};
      unpack(x_row, centred);
      if constexpr (kApply && !kChannelsLast) {
        if (owned(h)) {
          T* const to = call.x_copy + (int64_t{place.c} * s.n + place.n) * s.pixels();
          store(to + h * s.w + place.column, x_row.vec);
        }
      }
#pragma unroll
      for (int j = 0; j < V; ++j) centred[j] -= channel.mean;
#pragma unroll
      for (int a = 0; a < U; ++a) {
        unpack(dy_rows[a], d[1][a]);
        if constexpr (kNeedGamma) {
          A gamma[U * V];
          affine.template row<0>(a, h, s.h, place.first, place.last, mask, gamma);
          if (activated) {
            A beta[U * V];
            affine.template row<1>(a, h, s.h, place.first, place.last, mask, beta);
#pragma unroll
            for (int j = 0; j < U * V; ++j) {
              activate_gradient(fma(gamma[j], centred[j / U], beta[j]), d[1][a][j], call.slope);
            }
          }
#pragma unroll
          for (int j = 0; j < U * V; ++j) d_gamma_sum[j / U] = fma(d[1][a][j], gamma[j], d_gamma_sum[j / U]);
        }
#pragma unroll
        for (int j = 0; j < U * V; ++j) {
          if (!here) d[1][a][j] = 0;
          d[0][a][j] = here ? d[1][a][j] * centred[j / U] : A(0);
        }
      }

      if constexpr (kApply) {
        if (owned(h)) {
          A dx[V];
#pragma unroll
          for (int j = 0; j < V; ++j) {
            dx[j] = d_gamma_sum[j] - fma(centred[j], dx_slope, dx_shift);
          }
          store<kChannelsLast, V>(call.dx + base + (h * s.w + place.column) * pixel, dx, s.c);
        }
      } else if (owned(h)) {
#pragma unroll
        for (int of = 0; of < 2; ++of) {
          A* const sum = sums + of * kSumsOf;
#pragma unroll
          for (int a = 0; a < U; ++a) {
            const A(&row)[U * V] = d[of][a];
            A all = row[0];
#pragma unroll
            for (int j = 1; j < U * V; ++j) all += row[j];
            const A left = place.first ? row[0] : A(0), right = place.last ? row[U * V - 1] : A(0);
            sum[kAll] += all, sum[kLeft] += left, sum[kRight] += right;
            if (U * h + a == 0) sum[kTop] += all, sum[kTopLeft] += left, sum[kTopRight] += right;
            if (U * h + a == U * s.h - 1) sum[kBottom] += all, sum[kBottomLeft] += left, sum[kBottomRight] += right;
          }
        }
      }

      // The owned part of the mask; rows h - 1, h, t.
      A own_mask[3][V];
      if constexpr (!kApply) {
#pragma unroll
        for (int row = 0; row < 3; ++row) {
          const bool own = owned(h - 1 + row);
#pragma unroll
          for (int j = 0; j < V; ++j) own_mask[row][j] = own ? mask[row][j + 1] : A(0);
        }
      }
      const auto meet = [&](int of, int ky, int kx, int row, int j, A z, A& dm_of_row) {
        dm_of_row = fma(affine.tap(of, ky * 3 + kx), z, dm_of_row);
        if constexpr (!kApply) {
          A& sum = sums[of * kSumsOf + kWithMask + ky * 3 + kx];
          sum = fma(own_mask[row][j], z, sum);
        }
      };
      A dm_next[V] = {};
      if constexpr (U == 1) {
        const A first[2] = {d[0][0][0], d[1][0][0]}, last[2] = {d[0][0][V - 1], d[1][0][V - 1]};
        A left[2], right[2];
        neighbours.exchange(first, last, left, right);
#pragma unroll
        for (int of = 0; of < 2; ++of) {
#pragma unroll
          for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
              // The output whose tap kx falls on column j.
              const int from = j + 1 - kx;
              const A z = from < 0 ? left[of] : from >= V ? right[of] : d[of][0][from < 0 || from >= V ? 0 : from];
              meet(of, 0, kx, 0, j, z, dm[0][j]);
              meet(of, 1, kx, 1, j, z, dm[1][j]);
              meet(of, 2, kx, 2, j, z, dm_next[j]);
            }
          }
        }
      } else {
        // Pairs of rows: the last of row h - 1 with the first of row h, and both of row h.
        A pairs[2][2][2 * V];
        A first[4], last[4], left[4], right[4];
#pragma unroll
        for (int of = 0; of < 2; ++of) {
#pragma unroll
          for (int j = 0; j < 2 * V; ++j) {
            pairs[of][0][j] = above[of][j] + d[of][0][j];
            pairs[of][1][j] = d[of][0][j] + d[of][1][j];
            above[of][j] = d[of][1][j];
          }
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            first[2 * of + pair] = pairs[of][pair][0];
            last[2 * of + pair] = pairs[of][pair][2 * V - 1];
          }
        }
        neighbours.exchange(first, last, left, right);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int of = i / 2, pair = i % 2;
          const A(&row)[2 * V] = pairs[of][pair];
          A between[V + 1];  // boxes that straddle columns j - 1 and j
          between[0] = left[i] + row[0];
          between[V] = row[2 * V - 1] + right[i];
#pragma unroll
          for (int j = 1; j < V; ++j) between[j] = row[2 * j - 1] + row[2 * j];
#pragma unroll
          for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const A z = kx == 0 ? between[j + 1] : kx == 1 ? row[2 * j] + row[2 * j + 1] : between[j];
              if (pair == 0) {
                meet(of, 0, kx, 0, j, z, dm[0][j]);
                meet(of, 2, kx, 1, j, z, dm[1][j]);
              } else {
                meet(of, 1, kx, 1, j, z, dm[1][j]);
              }
            }
          }
        }
      }

      if (owned(h - 1)) {
        A values[V];
        XRow p_row = p_rows[0];
        if constexpr (!kSpareRegisters) load_x(p_row, p, h - 1);
        unpack(p_row, values);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A p_centred = values[j] - channel.mask_mean;
          const A dq = dm[0][j] * Mask<T>::derivative(mask[0][j + 1]);
          if constexpr (kApply) {
            values[j] = fma(dp_scale, dq, -fma(p_centred, dp_slope, dp_shift));
          } else {
            sums[kSumQ] += dq;
            sums[kSumQp] = fma(dq, p_centred, sums[kSumQp]);
          }
        }
        if constexpr (kApply) {
          const int64_t to = kChannelsLast ? base : (int64_t{place.c} * s.n + place.n) * s.pixels();
          store<kChannelsLast, V>(call.dp + to + ((h - 1) * s.w + place.column) * pixel, values, s.c);
        }
      }
#pragma unroll
      for (int j = 0; j < V; ++j) dm[0][j] = dm[1][j], dm[1][j] = dm_next[j];
    }
  }
  if constexpr (!kApply) {
#pragma unroll
    for (int i = 0; i < kSumsOf; ++i) sums[i] *= channel.rstd;
    sums[kSumQp] *= channel.mask_rstd;
    write_sums<A, kChannelsLast>(sums, place.c, place.channel, memory, call.sums, call.splits);
  }
}

// 38 sums are registers too: in NCHW, where a walk takes more of them, 12 warps.
template <class T, bool kChannelsLast>
constexpr int kReduceBlocks = kChannelsLast || std::is_same_v<T, double> ? kBlocksAtOnce<T, kChannelsLast> : 3;

template <class T, int V, int U, bool kChannelsLast, bool kActivated>
__global__ void __launch_bounds__(kMostThreads<T, kChannelsLast>, kReduceBlocks<T, kChannelsLast>)
    spn_bwd_reduce_kernel(const BackwardCall<T> call) {
  backward<T, V, U, kChannelsLast, kActivated, false>(call);
}

// 16 warps, as kBlocksAtOnce says, but where a thread has 8 columns of y in two rows: they take more registers.
template <class T, int V, int U, bool kChannelsLast>
constexpr int kApplyBlocks = U * U * V == 16 ? 3 : kBlocksAtOnce<T, kChannelsLast>;

template <class T, int V, int U, bool kChannelsLast>
__global__ void __launch_bounds__(kMostThreads<T, kChannelsLast>, kApplyBlocks<T, V, U, kChannelsLast>)
    spn_bwd_apply_kernel(const BackwardCall<T> call) {
  backward<T, V, U, kChannelsLast, true, true>(call);
}

// Reduce and apply; in between, in channels_last, a kernel that adds up the sums: there a block of apply has 32
// channels, and would read a hundred kilobytes for it.
template <class T>
void launch_backward(BackwardCall<T> call, bool channels_last, int64_t upsample, const Tensor& x, cudaStream_t stream) {
  using A = acc_t<T>;
  dispatch_layout(channels_last, upsample, [&](auto last, auto u) {
    dispatch_columns<T, u(), last()>(
        call.shape, {call.x, call.p, call.dx, call.dp, call.x_copy}, call.dy, [&](auto columns) {
          constexpr int kExchanged = u() == 2 ? 4 : 2;
          using TableHere = Table<T, u(), last()>;
          // In channels_last with ReLU, reduce would need more registers than 16 warps can have.
          constexpr bool kNarrow = last() && u() == 1 && columns() == 4;
          const auto launch_reduce = [&](auto v, auto activated) {
            Plan& plan = call.plan = make_plan<T, v(), last()>(call.shape);
            if (plan.splits > kMaxSplits) plan.split(kMaxSplits * plan.blocks);
            call.splits = plan.splits;
            const Tensor sums = empty_like(x, {call.shape.c, call.splits, kSums}, dtype_of<A>);
            call.sums = static_cast<A*>(sums.data_ptr());
            const int warps = plan.threads / kWarp;
            const int walking = TableHere::kNumbers + Neighbours<A, kExchanged, last()>::numbers(plan.threads);
            const int adding = last() ? warps / 2 * kSums * kWarp : warps * kSums;  // see write_sums
            launch(spn_bwd_reduce_kernel<T, v(), u(), last(), activated()>,
                   launch_of(plan, std::max(walking, adding) * sizeof(A), stream), call);
            return sums;
          };
          // Where it matters, a kernel of its own for a layer without ReLU, which needs no gamma and beta here.
          constexpr bool kTwo = columns() > 1;
          const Tensor sums = kTwo && !call.activated ? launch_reduce(columns, Bool<!kTwo>{})
                                                      : launch_reduce(Int<kNarrow ? 2 : columns()>{}, Bool<true>{});
          const Tensor means = empty_like(x, {last() ? call.shape.c : 0, kMeans}, dtype_of<A>);
          call.means = static_cast<A*>(means.data_ptr());
          if (last()) {
            const size_t bytes = kFinishThreads / kWarp * kSums * sizeof(A);
            launch(spn_bwd_finish_kernel<T>, {dim3(call.shape.c), dim3(kFinishThreads), bytes, stream}, call);
          }
          const Plan& plan = call.plan = make_plan<T, columns(), last()>(call.shape);
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
    return channels_last ? as_matrices(t, s, true) : Matrices{t.data_ptr(), t.scalar_type(), 1, s.c, all, 0, all, 1};
  };
  channels_last ? gemm(out, matrix(dp).transposed(), matrix(x), 0, tf32)
                : gemm(out, matrix(dp), matrix(x).transposed(), 0, tf32);
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardResult spn_bwd(const Tensor& grad_y, const Tensor& x, const Tensor& mask_projection, const Tensor& mask_weight,
                       const Tensor& mask_bias, const Tensor& gamma_weight, const Tensor& gamma_weight_inv,
                       const Tensor& beta_weight, const Tensor& beta_weight_inv, const Tensor& p, const Tensor& mean,
                       const Tensor& var, const Tensor& mask_mean, const Tensor& mask_var, double eps, int64_t upsample,
                       std::optional<double> negative_slope, bool allow_tf32, bool training) {
  const Shape s = shape_of(x, upsample);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ParameterTensors parameters(s, mask_projection, mask_weight, mask_bias,
                                    {&gamma_weight, &gamma_weight_inv, &beta_weight, &beta_weight_inv});
  check_sizes(grad_y, "grad_y", {s.n, s.c, s.h * upsample, s.w * upsample});
  check_sizes(p, "p", {s.n, s.c, s.h, s.w});
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
    // Any gradient may begin at an odd address; it shall not decide how x is cut into columns, and so the order of
    // sums.
    if (!channels_last && !is_aligned(dy_dense.data_ptr(), 16)) dy_dense = torch::stable::clone(dy_dense);
    const Tensor dx = empty_like(x, {s.n, s.c, s.h, s.w}, dtype_of<T>, layout);
    const ScalarType parameter_dtype = mask_weight.scalar_type();
    Tensor d_projection = empty_like(x, {s.c, s.c, 1, 1}, parameter_dtype);
    Tensor d_mask_weight = empty_like(x, {s.c}, parameter_dtype), d_mask_bias = empty_like(x, {s.c}, parameter_dtype);
    Tensor d_taps[4];
    for (Tensor& t : d_taps) t = empty_like(x, {s.c, 1, 3, 3}, parameter_dtype);
    if (s.numel() == 0) {
      for (Tensor* t : {&d_projection, &d_mask_weight, &d_mask_bias, &d_taps[0], &d_taps[1], &d_taps[2], &d_taps[3]}) {
        torch::stable::zero_(*t);
      }
    } else {
      // For the weight's gradient NCHW is no single matrix; (C, N, HW) is. dp need not be anything else, and apply,
      // which reads x, writes it so too.
      const Tensor dp = empty_like(x, {s.n, s.c, s.h, s.w}, dtype_of<T>, layout);
      const Tensor x_copy = channels_last ? x_dense : empty_like(x, {s.n, s.c, s.h, s.w}, dtype_of<T>);
      BackwardCall<T> call{};
      parameters.set_up(call, s, eps, negative_slope, x_dense, p_dense);
      call.dy = data_of<T>(dy_dense);
      call.dx = static_cast<T*>(dx.data_ptr());
      call.dp = static_cast<T*>(dp.data_ptr());
      call.x_copy = static_cast<T*>(x_copy.data_ptr());
      call.centre = training ? static_cast<A>(1.0 / (int64_t{s.n} * s.pixels())) : A(0);
      Tensor used[4];
      const Tensor* const from[4] = {&mean, &var, &mask_mean, &mask_var};
      for (int i = 0; i < 4; ++i) {
        used[i] = statistic<A>(*from[i], s);
        call.used[i] = data_of<A>(used[i]);
      }
      const bool wide = parameter_dtype == dtype_of<A>;
      call.d_mask_weight = {d_mask_weight.data_ptr(), wide};
      call.d_mask_bias = {d_mask_bias.data_ptr(), wide};
      for (int i = 0; i < 4; ++i) call.d_taps[i] = {d_taps[i].data_ptr(), wide};
      launch_backward(call, channels_last, upsample, x, stream);
      const Tensor weight = in_dtype(parameters.mask_projection, dtype_of<T>);
      add_grad_input(s, channels_last, weight, dp, dx, allow_tf32);
      grad_weight(s, channels_last, dp, x_copy, d_projection, allow_tf32);
    }
    return {dx, d_projection, d_mask_weight, d_mask_bias, d_taps[0], d_taps[1], d_taps[2], d_taps[3]};
  });
}

}  // namespace
}  // namespace pixnorm::spn

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CUDA, m) { m.impl("spn_bwd", TORCH_BOX(&pixnorm::spn::spn_bwd)); }
