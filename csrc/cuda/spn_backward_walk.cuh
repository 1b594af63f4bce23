// The walk down the rows of a strip that both kernels of SPN's backward share: reduce takes its sums, apply writes dx
// and dp.
//
// Let z_k be the sum of dγ (or dβ) over the outputs whose tap k falls on a given pixel of x. Then dm = Σ_k w_k z_k, and
// the gradient of w_k is Σ m z_k over the pixels. Without upsampling z_k is one output. With upsampling by 2 it is a
// 2x2 box of outputs, and the upper box of a row of x is the lower box of the row above.
#pragma once

#include "cuda/spn_backward_sums.cuh"

namespace pixnorm::spn {

template <class T, int V, int U, bool kChannelsLast, bool kActivated, bool kApply>
class BackwardWalk {
 public:
  using A = acc_t<T>;
  // In channels_last, reduce's sums fill the registers that 16 warps per SM leave a thread. There the taps stay in
  // shared memory, and p is read twice.
  static constexpr bool kSpareRegisters = kApply || !kChannelsLast || std::is_same_v<T, double>;
  static constexpr int kSumsHere = kApply ? 1 : kSums;
  using TableHere = Table<T, U, kChannelsLast>;
  using PlaceHere = Place<V, kChannelsLast>;
  using AffineHere = Affine<T, V, U, kChannelsLast, kSpareRegisters>;
  using Exchange = Neighbours<A, U == 2 ? 4 : 2, kChannelsLast>;

  __device__ __forceinline__ BackwardWalk(const BackwardCall<T>& call, PlaceHere& place, AffineHere& affine,
                                          Exchange& neighbours, Channel<T>& channel, A (&sums)[kSumsHere])
      : call_(call),
        shape_(call.shape),
        plan_(call.plan),
        activated_(kActivated && call.activated),
        place_(place),
        affine_(affine),
        neighbours_(neighbours),
        channel_(channel),
        sums_(sums) {}

  __device__ __forceinline__ void run() {
    prepare();
    // Apply takes the strips in reverse: reduce has left the last ones in L2.
    const int rounds = ceil_div(plan_.strips, plan_.groups), step = kApply ? -static_cast<int>(gridDim.y) : gridDim.y;
    for (int round = kApply ? rounds - 1 - blockIdx.y : blockIdx.y; round >= 0 && round < rounds; round += step) {
      enter(round * plan_.groups + place_.group);
      walk();
    }
    if constexpr (!kApply) write();
  }

 private:
  static constexpr bool kNeedGamma = kApply || kActivated;
  static constexpr int kRowsOfP = kSpareRegisters ? 3 : 1;
  using XRow = Row<T, V, kChannelsLast>;
  using YRow = Row<T, U * V, kChannelsLast>;

  // What moves down with the walk. Step t loads row t of p and works on row h = t - 1 of x and dy; that completes row
  // h - 1 of dm.
  struct Rows {
    XRow& p_next;
    XRow (&p)[kRowsOfP];  // the last of them is row t
    XRow& x_next;
    YRow (&dy_next)[U];
    A (&mask)[3][V + 2];                // rows h - 1, h, t, with the columns to the left and right
    A (&dm)[3][V];                      // partial sums of the same rows
    A (&above)[2][U == 2 ? 2 * V : 1];  // with upsampling: the lower row of dγ and dβ of row h - 1 of x
  };

  // Gradients at row h. [0] is dγ, without the factor rstd; [1] is dβ.
  struct Gradients {
    A centred[V];        // x - mean
    A d[2][U][U * V];    // zero outside the image
    A dy_gamma[V] = {};  // Σ dy γ over the outputs of a pixel
  };

  __device__ __forceinline__ A* after_table() const { return shared_memory<A>() + TableHere::kNumbers; }

  // ---- once per block ----

  // Statistics, taps and, for apply, the coefficients of dx and dp.
  __device__ __forceinline__ void prepare() {
    const int c = place_.c;
    const int in_group = call_.in_group(call_.group_of(place_.sample), c);
    if (place_.channel)
      channel_.set(call_, in_group, call_.used[0][c], call_.used[1][c], call_.used[2][c], call_.used[3][c]);
    // The loop needs neither x̂ nor p̂: rstd is folded into the taps of gamma, or multiplies the sums at the end.
    affine_.table.fill(call_, place_, channel_.rstd);
    if constexpr (kApply && !kChannelsLast) {
      if (!call_.means) finish_channel(call_, c, 0, blockIdx.y == 0, after_table() + kMeans, after_table());
    }
    __syncthreads();
    affine_.take_taps();
    if constexpr (kApply) {
      A means[kMeans] = {};
      const A* const from = kChannelsLast || call_.means ? call_.means + int64_t{c} * kMeans : after_table();
      for (int i = 0; place_.channel && i < kMeans; ++i) means[i] = from[i];
      dp_scale_ = place_.channel ? call_.mask_weight[in_group] * channel_.mask_rstd : A(0);
      dx_slope_ = channel_.rstd * channel_.rstd * means[kMeanGx];
      dx_shift_ = channel_.rstd * means[kMeanG];
      dp_slope_ = channel_.mask_rstd * channel_.mask_rstd * means[kMeanQp];
      dp_shift_ = channel_.mask_rstd * means[kMeanQ];
    }
  }

  __device__ __forceinline__ void write() {
#pragma unroll
    for (int i = 0; i < kSumsOf; ++i) sums_[i] *= channel_.rstd;
    sums_[kSumQp] *= channel_.mask_rstd;
    const int64_t part = int64_t{place_.c} * call_.parts + place_.sample * call_.splits + blockIdx.y;
    write_sums<kChannelsLast>(sums_, place_.channel, shared_memory<A>(), call_.sums + part * kSums);
  }

  // ---- once per strip ----

  __device__ __forceinline__ void enter(int strip) {
    place_.enter(strip, shape_, plan_);
    base_ = place_.base(shape_, 1);
    x_ = call_.x + base_;
    p_ = call_.p + base_;
    dy_ = call_.dy + place_.base(shape_, U);
  }

  __device__ __forceinline__ bool inside(int h) const { return place_.inside && h >= 0 && h < shape_.h; }
  __device__ __forceinline__ bool owned(int h) const {
    return place_.owns && h >= place_.row && h < place_.row + plan_.rows && h < shape_.h;
  }
  // Of this thread's first column in row h.
  __device__ __forceinline__ int offset(int h) const {
    return (h * shape_.w + place_.column) * (kChannelsLast ? shape_.c : 1);
  }
  __device__ __forceinline__ void load_x(XRow& row, const T* from, int h) const {
    load(row, from + offset(h), shape_.c);
  }
  __device__ __forceinline__ void load_dy(YRow& row, int a, int h) const {
    const int pixel = kChannelsLast ? shape_.c : 1;
    load(row, dy_ + ((U * h + a) * U * shape_.w + U * place_.column) * pixel, shape_.c);
  }
  // The strip's plane in a (C, N, HW) copy.
  __device__ __forceinline__ int64_t plane_by_channel() const {
    return (int64_t{place_.c} * shape_.n + place_.n) * shape_.pixels();
  }

  __device__ __forceinline__ void walk() {
    const bool whole = plan_.rows >= shape_.h;  // no rows above or below the strip
    const int begin = whole ? 0 : activated_ ? -2 : -1;
    XRow p_next{}, p_rows[kRowsOfP] = {}, x_next{};
    YRow dy_next[U] = {};
    A mask[3][V + 2] = {}, dm[3][V] = {}, above[2][U == 2 ? 2 * V : 1] = {};
    Rows rows{p_next, p_rows, x_next, dy_next, mask, dm, above};
    if (inside(place_.row + begin)) load_x(rows.p_next, p_, place_.row + begin);
    for (int i = begin; i <= plan_.rows + 1; ++i) {
      const int t = place_.row + i, h = t - 1;
      advance_mask(rows, t, i <= plan_.rows);
      const XRow x_row = rows.x_next;
      YRow dy_rows[U];
#pragma unroll
      for (int a = 0; a < U; ++a) dy_rows[a] = rows.dy_next[a];
      if (i >= -1 && i <= plan_.rows && inside(t)) {
        load_x(rows.x_next, x_, t);
#pragma unroll
        for (int a = 0; a < U; ++a) load_dy(rows.dy_next[a], a, t);
      }
      if (i < (whole ? 1 : 0)) continue;

      if constexpr (kApply && !kChannelsLast) {
        if (owned(h)) store(call_.x_copy + plane_by_channel() + h * shape_.w + place_.column, x_row.vec);
      }
      Gradients g;
      find_gradients(g, rows, x_row, dy_rows, h);
      if (owned(h)) {
        if constexpr (kApply) {
          store_dx(g, h);
        } else {
          add_borders(g, h);
        }
      }
      if constexpr (U == 1) {
        meet_outputs(rows, g, h);
      } else {
        meet_boxes(rows, g, h);
      }
      if (owned(h - 1)) finish_mask_row(rows, h - 1);
#pragma unroll
      for (int j = 0; j < V; ++j) rows.dm[0][j] = rows.dm[1][j], rows.dm[1][j] = rows.dm[2][j], rows.dm[2][j] = 0;
    }
  }

  // ---- once per row ----

  // Takes row t of p and computes its mask; starts the load of row t + 1.
  __device__ __forceinline__ void advance_mask(Rows& rows, int t, bool load_next) {
    slide<A, V>(rows.mask);
#pragma unroll
    for (int row = 0; row < kRowsOfP - 1; ++row) rows.p[row] = rows.p[row + 1];
    rows.p[kRowsOfP - 1] = rows.p_next;
    if (load_next && inside(t + 1)) load_x(rows.p_next, p_, t + 1);
    A values[V];
    unpack(rows.p[kRowsOfP - 1], values);
    A(&mask)[V + 2] = rows.mask[2];
#pragma unroll
    for (int j = 0; j < V; ++j) mask[j + 1] = inside(t) ? channel_.mask(values[j]) : A(0);
    if constexpr (kNeedGamma) {
      const A first[1] = {mask[1]}, last[1] = {mask[V]};
      A left[1], right[1];
      neighbours_.exchange(first, last, left, right);
      mask[0] = left[0], mask[V + 1] = right[0];
    }
  }

  // dβ = dy, as far as the activation lets it through, and dγ = dy x̂.
  __device__ __forceinline__ void find_gradients(Gradients& g, const Rows& rows, const XRow& x_row,
                                                 const YRow (&dy_rows)[U], int h) const {
    const bool here = inside(h);
    unpack(x_row, g.centred);
#pragma unroll
    for (int j = 0; j < V; ++j) g.centred[j] -= channel_.mean;
#pragma unroll
    for (int a = 0; a < U; ++a) {
      A(&d_gamma)[U * V] = g.d[0][a], (&d_beta)[U * V] = g.d[1][a];
      unpack(dy_rows[a], d_beta);
      if constexpr (kNeedGamma) {
        A gamma[U * V];
        affine_.template row<0>(a, h, shape_.h, place_.first, place_.last, rows.mask, gamma);
        if (activated_) {
          A beta[U * V];
          affine_.template row<1>(a, h, shape_.h, place_.first, place_.last, rows.mask, beta);
#pragma unroll
          for (int j = 0; j < U * V; ++j) {
            activate_gradient(fma(gamma[j], g.centred[j / U], beta[j]), d_beta[j], call_.slope);
          }
        }
#pragma unroll
        for (int j = 0; j < U * V; ++j) g.dy_gamma[j / U] = fma(d_beta[j], gamma[j], g.dy_gamma[j / U]);
      }
#pragma unroll
      for (int j = 0; j < U * V; ++j) {
        if (!here) d_beta[j] = 0;
        d_gamma[j] = here ? d_beta[j] * g.centred[j / U] : A(0);
      }
    }
  }

  // dx = dy γ rstd - (x - mean) dx_slope - dx_shift; rstd is in γ.
  __device__ __forceinline__ void store_dx(const Gradients& g, int h) const {
    A dx[V];
#pragma unroll
    for (int j = 0; j < V; ++j) dx[j] = g.dy_gamma[j] - fma(g.centred[j], dx_slope_, dx_shift_);
    store<kChannelsLast, V>(call_.dx + base_ + offset(h), dx, shape_.c);
  }

  // The sums of dγ and dβ over all outputs, and over those at each border.
  __device__ __forceinline__ void add_borders(const Gradients& g, int h) {
#pragma unroll
    for (int of = 0; of < 2; ++of) {
      A* const sum = sums_ + of * kSumsOf;
#pragma unroll
      for (int a = 0; a < U; ++a) {
        const A(&row)[U * V] = g.d[of][a];
        A all = row[0];
#pragma unroll
        for (int j = 1; j < U * V; ++j) all += row[j];
        const A left = place_.first ? row[0] : A(0), right = place_.last ? row[U * V - 1] : A(0);
        sum[kAll] += all, sum[kLeft] += left, sum[kRight] += right;
        if (U * h + a == 0) sum[kTop] += all, sum[kTopLeft] += left, sum[kTopRight] += right;
        if (U * h + a == U * shape_.h - 1) sum[kBottom] += all, sum[kBottomLeft] += left, sum[kBottomRight] += right;
      }
    }
  }

  // Rows h - 1, h, h + 1 of the mask, zero where this strip does not own them: its factor in the taps' gradients.
  struct OwnMask {
    A rows[3][V];
  };

  __device__ __forceinline__ OwnMask own_mask(const Rows& rows, int h) const {
    OwnMask own{};
    if constexpr (!kApply) {
#pragma unroll
      for (int row = 0; row < 3; ++row) {
        const bool mine = owned(h - 1 + row);
#pragma unroll
        for (int j = 0; j < V; ++j) own.rows[row][j] = mine ? rows.mask[row][j + 1] : A(0);
      }
    }
    return own;
  }

  // Adds z of tap (ky, kx) at column j of row h - 1 + row: w z to dm, and m z to the tap's gradient.
  __device__ __forceinline__ void meet(Rows& rows, const OwnMask& own, int of, int ky, int kx, int row, int j, A z) {
    rows.dm[row][j] = fma(affine_.tap(of, ky * 3 + kx), z, rows.dm[row][j]);
    if constexpr (!kApply) {
      A& sum = sums_[of * kSumsOf + kWithMask + ky * 3 + kx];
      sum = fma(own.rows[row][j], z, sum);
    }
  }

  // U == 1: row h of outputs meets the three rows of x under its taps.
  __device__ __forceinline__ void meet_outputs(Rows& rows, const Gradients& g, int h) {
    const OwnMask own = own_mask(rows, h);
    const A first[2] = {g.d[0][0][0], g.d[1][0][0]}, last[2] = {g.d[0][0][V - 1], g.d[1][0][V - 1]};
    A left[2], right[2];
    neighbours_.exchange(first, last, left, right);
#pragma unroll
    for (int of = 0; of < 2; ++of) {
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const int from = j + 1 - kx;  // the output whose tap kx falls on column j
          const A z = from < 0 ? left[of] : from >= V ? right[of] : g.d[of][0][from < 0 || from >= V ? 0 : from];
#pragma unroll
          for (int ky = 0; ky < 3; ++ky) meet(rows, own, of, ky, kx, ky, j, z);
        }
      }
    }
  }

  // U == 2: the boxes of outputs between rows h - 1 and h, then those of row h.
  __device__ __forceinline__ void meet_boxes(Rows& rows, const Gradients& g, int h) {
    const OwnMask own = own_mask(rows, h);
    A pairs[2][2][2 * V];  // [dγ, dβ][box]: sums of two rows of outputs
    A first[4], last[4], left[4], right[4];
#pragma unroll
    for (int of = 0; of < 2; ++of) {
#pragma unroll
      for (int j = 0; j < 2 * V; ++j) {
        pairs[of][0][j] = rows.above[of][j] + g.d[of][0][j];
        pairs[of][1][j] = g.d[of][0][j] + g.d[of][1][j];
        rows.above[of][j] = g.d[of][1][j];
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        first[2 * of + pair] = pairs[of][pair][0];
        last[2 * of + pair] = pairs[of][pair][2 * V - 1];
      }
    }
    neighbours_.exchange(first, last, left, right);
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
            meet(rows, own, of, 0, kx, 0, j, z);
            meet(rows, own, of, 2, kx, 1, j, z);
          } else {
            meet(rows, own, of, 1, kx, 1, j, z);
          }
        }
      }
    }
  }

  // Row h of dm is complete (it is dm[0]): from it dq, and then dp or the sums of dq and dq p̂.
  __device__ __forceinline__ void finish_mask_row(const Rows& rows, int h) {
    A values[V];
    XRow p_row = rows.p[0];
    if constexpr (!kSpareRegisters) load_x(p_row, p_, h);
    unpack(p_row, values);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const A p_centred = values[j] - channel_.mask_mean;
      const A dq = rows.dm[0][j] * Mask<T>::derivative(rows.mask[0][j + 1]);
      if constexpr (kApply) {
        values[j] = fma(dp_scale_, dq, -fma(p_centred, dp_slope_, dp_shift_));
      } else {
        sums_[kSumQ] += dq;
        sums_[kSumQp] = fma(dq, p_centred, sums_[kSumQp]);
      }
    }
    if constexpr (kApply) {
      store<kChannelsLast, V>(call_.dp + (kChannelsLast ? base_ : plane_by_channel()) + offset(h), values, shape_.c);
    }
  }

  const BackwardCall<T>& call_;
  const Shape& shape_;
  const Plan& plan_;
  const bool activated_;
  PlaceHere& place_;
  AffineHere& affine_;
  Exchange& neighbours_;
  Channel<T>& channel_;
  A (&sums_)[kSumsHere];
  A dp_scale_, dx_slope_, dx_shift_, dp_slope_, dp_shift_;  // see prepare

  // Of the strip:
  int64_t base_;
  const T *x_, *p_, *dy_;
};

// The body of both kernels. The state of the walk is in variables of their own and not in one object: arrays are
// indexed by loop variables until loops are unrolled, which would keep such an object in memory, scalars and all,
// through the compiler's first passes. (Main loops were up to 8% longer.)
template <class T, int V, int U, bool kChannelsLast, bool kActivated, bool kApply>
__device__ __forceinline__ void walk_backward(const BackwardCall<T>& call) {
  using A = acc_t<T>;
  using Walk = BackwardWalk<T, V, U, kChannelsLast, kActivated, kApply>;
  using TableHere = typename Walk::TableHere;
  A* const memory = shared_memory<A>();
  typename Walk::PlaceHere place(call.shape, call.plan);
  typename Walk::AffineHere affine{TableHere(memory, place.lane_channel), {}};
  typename Walk::Exchange neighbours(memory + TableHere::kNumbers, place.position, call.plan.positions);
  Channel<T> channel{};
  A sums[Walk::kSumsHere] = {};
  Walk(call, place, affine, neighbours, channel, sums).run();
}

}  // namespace pixnorm::spn
