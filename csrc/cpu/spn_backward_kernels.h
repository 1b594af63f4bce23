// Backward of SPN over a block of channels. Vector code, included by spn_kernels.h.

// Three stages per row h: make_mask, the mask and p̂; make_d, dβ = dy (masked by the activation) and dγ = dy x̂, and for
// kApply dx through x̂'s batch norm; make_q, the gradient dq of the output of the mask's batch norm.
//
// dm and the gradients of the taps share operands: with z_k the sum of dγ over the outputs whose tap k falls on this
// pixel, dm = Σ_k w_k z_k and dw_k = Σ m z_k.
template <class Acc, int U, bool kApply>
class BackwardBlock {
 public:
  using A = Acc;
  static int64_t scratch(int64_t w) {
    return Ring<A>::size(w, 1) * 2 + Ring<A>::size(w * U, U) * 2 + w + 4 * band_rows(w) * w + band_rows(w * U) * w * U;
  }

  BackwardBlock(Arena<A> arena, const Shape& s, const BlockParams<A>& params, const Tile& tile, const Plane<A>& x,
                const Plane<A>& p, const Plane<A>& dy, const Plane<A>& dx, const Plane<A>& dp, A* sums)
      : s_(s),
        params_(params),
        tile_(tile),
        mask_(arena, s.h, s.w),
        projection_(arena, s.h, s.w),
        d_gamma_(arena, s.h, s.w * U, U),
        d_beta_(arena, s.h, s.w * U, U),
        d_mask_(arena.pixels(s.w)),
        x_(x, s.w, end(1), arena.pixels(band_rows(s.w) * s.w)),
        p_(p, s.w, end(2), arena.pixels(band_rows(s.w) * s.w)),
        dy_(dy, s.w * U, end(1) * U, arena.pixels(band_rows(s.w * U) * s.w * U)),
        dx_(dx, s.w, tile.h0, tile.h1, arena.pixels(band_rows(s.w) * s.w)),
        dp_(dp, s.w, tile.h0, tile.h1, arena.pixels(band_rows(s.w) * s.w)),
        sums_(sums) {}

  // The rows of an image of the tile, and one more at either end, its halo; then call next_image().
  void run() {
    make_mask(tile_.h0 - 2);
    make_mask(tile_.h0 - 1);
    for (int64_t h = tile_.h0 - 1; h < tile_.h1 + 1; ++h) step(h);
  }

  void next_image() {
    x_.next_image(), p_.next_image(), dy_.next_image();
    if constexpr (kApply) dx_.next_image(), dp_.next_image();
  }

 private:
  PIXNORM_INLINE void step(int64_t h) {
    make_mask(h + 1);
    if (h >= 0 && h < s_.h) {
      if (s_.activation.on) {
        make_d<true>(h);
      } else {
        make_d<false>(h);
      }
    }
    if (h > tile_.h0) make_q(h - 1);
  }

  int64_t end(int64_t halo) const { return tile_.h1 + halo < s_.h ? tile_.h1 + halo : s_.h; }

  PIXNORM_INLINE void make_mask(int64_t h) {
    if (h < 0 || h >= s_.h) return;
    mask_row<true>(params_, p_.row(h), s_.w, mask_.row(h), projection_.row(h), [&] {
      x_.look_ahead();
      p_.look_ahead();
      for (int i = 0; i < U * U; ++i) dy_.look_ahead();
    });
  }

  PIXNORM_INLINE void add(int sum, int c, Vec<A> value) {
    A* to = sums_ + sum * kBlock + c;
    store(to, load(to) + value);
  }

  template <bool kActivated>
  PIXNORM_INLINE void make_d(int64_t h) {
    const bool own = h >= tile_.h0 && h < tile_.h1;
    const A* const mask[3] = {mask_.row(h - 1), mask_.row(h), mask_.row(h + 1)};
    const A* x = x_.row(h);
    A* dx = kApply && own ? dx_.row(h) : nullptr;
    const A slope = static_cast<A>(s_.activation.slope);
    for (int a = 0; a < U; ++a) {
      const A* dy = dy_.row(h * U + a);
      A *d_gamma = d_gamma_.row(h, a), *d_beta = d_beta_.row(h, a);
      const int row_neighbours = neighbours(h * U + a, s_.h * U);
      for (int c = 0; c < kBlock; c += kLanes<A>) {
        const Vec<A> mean = load(params_.mean + c), rstd = load(params_.rstd + c);
        const Vec<A> mean_g = load(params_.mean_g + c), mean_gx = load(params_.mean_gx + c);
        Vec<A> all_gamma{}, all_beta{};
        for_pixels<4 / U>(s_.w, [&](auto pixels, int64_t w) __attribute__((always_inline)) {
          constexpr int n = decltype(pixels)::value;
          Vec<A> gamma[n * U], beta[n * U], gradient[n];
          if constexpr (kApply || kActivated) affine<U, n>(params_, mask, a, w, s_.w, row_neighbours, c, gamma, beta);
#pragma GCC unroll 8
          for (int i = 0; i < n * U; ++i) {
            const Vec<A> x_hat = (load(x + (w + i / U) * kBlock + c) - mean) * rstd;
            Vec<A> d = load(dy + (w * U + i) * kBlock + c);
            if constexpr (kActivated) activate_gradient<Vec<A>>(gamma[i] * x_hat + beta[i], d, slope);
            const Vec<A> dx_hat = d * x_hat;
            store(d_beta + (w * U + i) * kBlock + c, d);
            store(d_gamma + (w * U + i) * kBlock + c, dx_hat);
            if constexpr (kApply) {
              // The U * U outputs of a pixel accumulate; the first also subtracts the means.
              if (i % U == 0) gradient[i / U] = a == 0 ? -mean_g - x_hat * mean_gx : Vec<A>{};
              gradient[i / U] += d * gamma[i];
            } else {
              all_gamma += dx_hat;
              all_beta += d;
            }
          }
          if constexpr (kApply) {
            if (own) {
#pragma GCC unroll 4
              for (int i = 0; i < n; ++i) {
                A* to = dx + (w + i) * kBlock + c;
                store(to, a == 0 ? gradient[i] * rstd : load(to) + gradient[i] * rstd);
              }
            }
          }
        });
        if constexpr (!kApply) {
          if (own) {
            add_borders(0, c, h * U + a, all_gamma, d_gamma);
            add_borders(1, c, h * U + a, all_beta, d_beta);
          }
        }
      }
    }
    if (kApply && own) dx_.done(h);
  }

  // `row` is output row h, and `all` its sum.
  PIXNORM_INLINE void add_borders(int of, int c, int64_t h, Vec<A> all, const A* row) {
    const int base = of * spn::kSumsOf;
    const Vec<A> left = load(row + c), right = load(row + (s_.w * U - 1) * kBlock + c);
    add(base + spn::kAll, c, all);
    add(base + spn::kLeft, c, left);
    add(base + spn::kRight, c, right);
    if (h == 0) {
      add(base + spn::kTop, c, all);
      add(base + spn::kTopLeft, c, left);
      add(base + spn::kTopRight, c, right);
    }
    if (h == s_.h * U - 1) {
      add(base + spn::kBottom, c, all);
      add(base + spn::kBottomLeft, c, left);
      add(base + spn::kBottomRight, c, right);
    }
  }

  // The rows of outputs whose tap row ky falls on row h. For U == 2 there are two, and the caller adds them.
  PIXNORM_INLINE static void rows_under(const Ring<A>& ring, int64_t h, int ky, const A* (&rows)[2]) {
    if constexpr (U == 1) {
      rows[0] = rows[1] = ring.row(h + 1 - ky);
    } else {
      rows[0] = ky == 2 ? ring.row(h - 1, 1) : ring.row(h, ky == 0);
      rows[1] = ky == 2 ? ring.row(h, 0) : ky == 0 ? ring.row(h + 1, 0) : ring.row(h, 1);
    }
  }

  // z_k of pixel w, for the three taps of a tap row.
  PIXNORM_INLINE static void sums_under(const A* const (&rows)[2], int64_t w, int c, Vec<A> (&z)[3]) {
    if constexpr (U == 1) {
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) z[kx] = load(rows[0] + (w + 1 - kx) * kBlock + c);
    } else {
      Vec<A> column[4];  // outputs 2w - 1 .. 2w + 2
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t at = (2 * w - 1 + i) * kBlock + c;
        column[i] = load(rows[0] + at) + load(rows[1] + at);
      }
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) z[kx] = column[2 - kx] + column[3 - kx];
    }
  }

  // Writes dm of row h to d_mask_, and accumulates Σ m z_k.
  PIXNORM_INLINE void reduce_taps(int64_t h, int c) {
    const A* mask = mask_.row(h);
    for (int ky = 0; ky < 3; ++ky) {
      const A *gamma_rows[2], *beta_rows[2];
      rows_under(d_gamma_, h, ky, gamma_rows);
      rows_under(d_beta_, h, ky, beta_rows);
      Vec<A> gamma_tap[3], beta_tap[3], d_gamma_tap[3] = {}, d_beta_tap[3] = {};
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) {
        gamma_tap[kx] = load(params_.tap[0][3 * ky + kx] + c);
        beta_tap[kx] = load(params_.tap[1][3 * ky + kx] + c);
      }
      for (int64_t w = 0; w < s_.w; ++w) {
        Vec<A> z_gamma[3], z_beta[3];
        sums_under(gamma_rows, w, c, z_gamma);
        sums_under(beta_rows, w, c, z_beta);
        const Vec<A> m = load(mask + w * kBlock + c);
        Vec<A> from_gamma = ky == 0 ? Vec<A>{} : load(d_mask_ + w * kBlock + c), from_beta{};
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) {
          d_gamma_tap[kx] += m * z_gamma[kx];
          d_beta_tap[kx] += m * z_beta[kx];
          from_gamma += gamma_tap[kx] * z_gamma[kx];
          from_beta += beta_tap[kx] * z_beta[kx];
        }
        store(d_mask_ + w * kBlock + c, from_gamma + from_beta);
      }
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) {
        add(spn::kWithMask + 3 * ky + kx, c, d_gamma_tap[kx]);
        add(spn::kSumsOf + spn::kWithMask + 3 * ky + kx, c, d_beta_tap[kx]);
      }
    }
  }

  // dm of pixels w, w + 1, ... of row h.
  template <int n>
  PIXNORM_INLINE void mask_gradient(int64_t h, int64_t w, int c, Vec<A> (&d_mask)[n]) {
    Vec<A> from_beta[n];
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) d_mask[i] = from_beta[i] = Vec<A>{};
#pragma GCC unroll 3
    for (int ky = 0; ky < 3; ++ky) {
      const A *gamma_rows[2], *beta_rows[2];
      rows_under(d_gamma_, h, ky, gamma_rows);
      rows_under(d_beta_, h, ky, beta_rows);
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) {
        Vec<A> z_gamma[3], z_beta[3];
        sums_under(gamma_rows, w + i, c, z_gamma);
        sums_under(beta_rows, w + i, c, z_beta);
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) {
          d_mask[i] += load(params_.tap[0][3 * ky + kx] + c) * z_gamma[kx];
          from_beta[i] += load(params_.tap[1][3 * ky + kx] + c) * z_beta[kx];
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) d_mask[i] += from_beta[i];
  }

  PIXNORM_INLINE void make_q(int64_t h) {
    const A *mask = mask_.row(h), *projection = projection_.row(h);
    if constexpr (kApply) {
      A* dp = dp_.row(h);
      for (int c = 0; c < kBlock; c += kLanes<A>) {
        const Vec<A> mean_q = load(params_.mean_q + c), mean_qp = load(params_.mean_qp + c);
        const Vec<A> scale = load(params_.mask_weight + c) * load(params_.mask_rstd + c);
        for_pixels<4 / U>(s_.w, [&](auto pixels, int64_t w) __attribute__((always_inline)) {
          constexpr int n = decltype(pixels)::value;
          Vec<A> d_mask[n];
          mask_gradient<n>(h, w, c, d_mask);
#pragma GCC unroll 4
          for (int i = 0; i < n; ++i) {
            const int64_t at = (w + i) * kBlock + c;
            const Vec<A> m = load(mask + at), dq = d_mask[i] * m * (A(1) - m);
            store(dp + at, scale * (dq - mean_q - load(projection + at) * mean_qp));
          }
        });
      }
      dp_.done(h);
    } else {
      for (int c = 0; c < kBlock; c += kLanes<A>) {
        reduce_taps(h, c);
        Vec<A> sum_q{}, sum_qp{};
        for (int64_t w = 0; w < s_.w; ++w) {
          const int64_t at = w * kBlock + c;
          const Vec<A> m = load(mask + at), dq = load(d_mask_ + at) * m * (A(1) - m);
          sum_q += dq;
          sum_qp += dq * load(projection + at);
        }
        add(spn::kSumQ, c, sum_q);
        add(spn::kSumQp, c, sum_qp);
      }
    }
  }

  const Shape& s_;
  const BlockParams<A>& params_;
  const Tile tile_;
  Ring<A> mask_, projection_, d_gamma_, d_beta_;
  A* d_mask_;
  RowReader<A> x_, p_, dy_;
  RowWriter<A> dx_, dp_;
  A* sums_;
};
