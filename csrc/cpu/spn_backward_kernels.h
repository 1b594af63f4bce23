// Backward of SPN over a block of channels. Vector code, included by spn_kernels.h.

// Three stages per row h: make_mask, the mask and p̂; make_d, dβ = dy (masked by the activation) and dγ = dy x̂, and for
// kApply dx through x̂'s batch norm; make_q, the gradient dq of the output of the mask's batch norm.
//
// dm and the gradients of the taps share operands: with z_k the sum of dγ over the outputs whose tap k falls on this
// pixel, dm = Σ_k w_k z_k and dw_k = Σ m z_k.
template <class Acc, int K, int U, bool kApply>
class BackwardBlock {
 public:
  using A = Acc;
  using R = Reach<K, U>;
  using SampleHere = Sample<A, K, U>;
  static int64_t scratch(int64_t w) {
    return MaskRing::size(w, 1) * 2 + GradientRing::size(w * U, U) * 2 + w + 4 * band_rows(w) * w +
           band_rows(w * U) * w * U;
  }

  BackwardBlock(Arena<A> arena, const Shape& s, const Params<A>& params, const Channels<A>& channels, const Tile& tile,
                int64_t block, const Plane<A>& x, const Plane<A>& p, const Plane<A>& dy, const Plane<A>& dx,
                const Plane<A>& dp)
      : s_(s),
        params_(params),
        channels_(channels),
        tile_(tile),
        block_(block),
        mask_(arena, s.h, s.w),
        projection_(arena, s.h, s.w),
        d_gamma_(arena, s.h, s.w * U, U),
        d_beta_(arena, s.h, s.w * U, U),
        d_mask_(arena.pixels(s.w)),
        x_(x, s.w, end(R::kOfX), arena.pixels(band_rows(s.w) * s.w)),
        p_(p, s.w, end(2 * R::kOfX), arena.pixels(band_rows(s.w) * s.w)),
        dy_(dy, s.w * U, end(R::kOfX) * U, arena.pixels(band_rows(s.w * U) * s.w * U)),
        dx_(dx, s.w, tile.h0, tile.h1, arena.pixels(band_rows(s.w) * s.w)),
        dp_(dp, s.w, tile.h0, tile.h1, arena.pixels(band_rows(s.w) * s.w)),
        n_(tile.n0) {}

  // The rows of an image of the tile, and the halo at either end; then call next_image().
  void run(const SampleHere& sample) {
    if constexpr (!kApply) {
      const int64_t part = n_ * params_.parts + tile_.part, blocks = s_.blocks();
      sums_ = params_.sums + (params_.sums_of[part] * blocks + block_) * kSums.count() * kBlock;
      all_ = params_.all + (part * blocks + block_) * 2 * kBlock;
    }
    for (int64_t h = tile_.h0 - 2 * R::kOfX; h < tile_.h0; ++h) make_mask(sample, h);
    for (int64_t h = tile_.h0 - R::kOfX; h < tile_.h1 + R::kOfX; ++h) step(sample, h);
  }

  void next_image() {
    x_.next_image(), p_.next_image(), dy_.next_image();
    if constexpr (kApply) {
      dx_.next_image();
      if (!s_.one_mask()) dp_.next_image();
    }
    ++n_;
  }

 private:
  static constexpr Sums kSums{K};
  using MaskRing = Ring<A, R::kRows, R::kOfX>;
  using GradientRing = Ring<A, R::kRows, R::kOfY>;

  PIXNORM_INLINE void step(const SampleHere& sample, int64_t h) {
    make_mask(sample, h + R::kOfX);
    if (h >= 0 && h < s_.h) {
      if (s_.activation.on) {
        make_d<true>(sample, h);
      } else {
        make_d<false>(sample, h);
      }
    }
    if (h - R::kOfX >= tile_.h0) make_q(sample, h - R::kOfX);
  }

  int64_t end(int64_t halo) const { return tile_.h1 + halo < s_.h ? tile_.h1 + halo : s_.h; }

  PIXNORM_INLINE void make_mask(const SampleHere& sample, int64_t h) {
    if (h < 0 || h >= s_.h) return;
    mask_row<true>(channels_, *sample.table, p_.row(h), s_.w, mask_.row(h), projection_.row(h), [&] {
      x_.look_ahead();
      p_.look_ahead();
      for (int i = 0; i < U * U; ++i) dy_.look_ahead();
    });
  }

  PIXNORM_INLINE static void add(A* to, Vec<A> value) { store(to, load(to) + value); }
  PIXNORM_INLINE void add(int sum, int c, Vec<A> value) { add(sums_ + sum * kBlock + c, value); }

  template <bool kActivated>
  PIXNORM_INLINE void make_d(const SampleHere& sample, int64_t h) {
    const bool own = h >= tile_.h0 && h < tile_.h1;
    const A* mask[R::kRows];
    for (int i = 0; i < R::kRows; ++i) mask[i] = mask_.row(h - R::kOfX + i);
    const A* x = x_.row(h);
    A* dx = kApply && own ? dx_.row(h) : nullptr;
    const A slope = static_cast<A>(s_.activation.slope);
    for (int a = 0; a < U; ++a) {
      const A* dy = dy_.row(h * U + a);
      A *d_gamma = d_gamma_.row(h, a), *d_beta = d_beta_.row(h, a);
      const int rows = row_class<K>(h * U + a, s_.h * U);
      for (int c = 0; c < kBlock; c += kLanes<A>) {
        const Vec<A> mean = load(channels_.mean + c), rstd = load(channels_.rstd + c);
        const Vec<A> mean_g = load(channels_.mean_g + c), mean_gx = load(channels_.mean_gx + c);
        const Vec<A> constant[2] = {sample.constant(0, rows, c), sample.constant(1, rows, c)};
        Vec<A> all_gamma{}, all_beta{};
        for_pixels<4 / U>(s_.w, [&](auto pixels, int64_t w) __attribute__((always_inline)) {
          constexpr int n = decltype(pixels)::value;
          Vec<A> gamma[n * U], beta[n * U], gradient[n];
          if constexpr (kApply || kActivated) {
            affine<n>(*sample.table, mask, a, w, s_.w, rows, constant, c, gamma, beta);
          }
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
    add(all_ + of * kBlock + c, all);
    if constexpr (K > 1) {
      const int64_t height = s_.h * U, width = s_.w * U;
      Vec<A> edge[K];  // sums over the columns that tap column kx does not reach
      edge[R::kOfY] = all;
#pragma GCC unroll 2
      for (int i = 0; i < R::kOfY; ++i) {
        Vec<A> left{}, right{};
        for (int64_t w = 0; w < R::kOfY - i && w < width; ++w) {
          left += load(row + w * kBlock + c);
          right += load(row + (width - 1 - w) * kBlock + c);
        }
        edge[i] = left;
        edge[K - 1 - i] = right;
      }
      for (int ky = 0; ky < K; ++ky) {
        if (ky < R::kOfY ? h >= R::kOfY - ky : h < height - (ky - R::kOfY)) {
          if (ky != R::kOfY) continue;
        }
        for (int kx = 0; kx < K; ++kx) {
          if (ky != R::kOfY || kx != R::kOfY) add(kSums.edge(of, ky, kx), c, edge[kx]);
        }
      }
    }
  }

  // The rows of outputs whose tap row ky falls on row h. For U == 2 there are two, and the caller adds them.
  PIXNORM_INLINE static void rows_under(const GradientRing& ring, int64_t h, int ky, const A* (&rows)[U]) {
#pragma GCC unroll 2
    for (int i = 0; i < U; ++i) {
      const int64_t output = U * h + R::kOfY - ky + i;
      rows[i] = ring.row(U == 1 ? output : output >> 1, U == 1 ? 0 : output & 1);
    }
  }

  // z_k of pixel w, for the taps of a tap row.
  PIXNORM_INLINE static void sums_under(const A* const (&rows)[U], int64_t w, int c, Vec<A> (&z)[K]) {
    if constexpr (U == 1) {
#pragma GCC unroll 5
      for (int kx = 0; kx < K; ++kx) z[kx] = load(rows[0] + (w + R::kOfY - kx) * kBlock + c);
    } else {
      Vec<A> column[K + 1];  // outputs 2w - K / 2 ...
#pragma GCC unroll 6
      for (int i = 0; i <= K; ++i) {
        const int64_t at = (2 * w - R::kOfY + i) * kBlock + c;
        column[i] = load(rows[0] + at) + load(rows[1] + at);
      }
#pragma GCC unroll 5
      for (int kx = 0; kx < K; ++kx) z[kx] = column[K - 1 - kx] + column[K - kx];
    }
  }

  // Writes dm of row h to d_mask_, and accumulates Σ m z_k.
  PIXNORM_INLINE void reduce_taps(const SampleHere& sample, int64_t h, int c) {
    const A* mask = mask_.row(h);
    for (int ky = 0; ky < K; ++ky) {
      const A *gamma_rows[U], *beta_rows[U];
      rows_under(d_gamma_, h, ky, gamma_rows);
      rows_under(d_beta_, h, ky, beta_rows);
      Vec<A> gamma_tap[K], beta_tap[K], d_gamma_tap[K] = {}, d_beta_tap[K] = {};
#pragma GCC unroll 5
      for (int kx = 0; kx < K; ++kx) {
        gamma_tap[kx] = load(sample.table->tap[0][K * ky + kx] + c);
        beta_tap[kx] = load(sample.table->tap[1][K * ky + kx] + c);
      }
      for (int64_t w = 0; w < s_.w; ++w) {
        Vec<A> z_gamma[K], z_beta[K];
        sums_under(gamma_rows, w, c, z_gamma);
        sums_under(beta_rows, w, c, z_beta);
        const Vec<A> m = load(mask + w * kBlock + c);
        Vec<A> from_gamma = ky == 0 ? Vec<A>{} : load(d_mask_ + w * kBlock + c), from_beta{};
#pragma GCC unroll 5
        for (int kx = 0; kx < K; ++kx) {
          d_gamma_tap[kx] += m * z_gamma[kx];
          d_beta_tap[kx] += m * z_beta[kx];
          from_gamma += gamma_tap[kx] * z_gamma[kx];
          from_beta += beta_tap[kx] * z_beta[kx];
        }
        store(d_mask_ + w * kBlock + c, from_gamma + from_beta);
      }
#pragma GCC unroll 5
      for (int kx = 0; kx < K; ++kx) {
        add(kSums.with_mask(0, K * ky + kx), c, d_gamma_tap[kx]);
        add(kSums.with_mask(1, K * ky + kx), c, d_beta_tap[kx]);
      }
    }
  }

  // dm of pixels w, w + 1, ... of row h.
  template <int n>
  PIXNORM_INLINE void mask_gradient(const SampleHere& sample, int64_t h, int64_t w, int c, Vec<A> (&d_mask)[n]) {
    Vec<A> from_beta[n];
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) d_mask[i] = from_beta[i] = Vec<A>{};
#pragma GCC unroll 5
    for (int ky = 0; ky < K; ++ky) {
      const A *gamma_rows[U], *beta_rows[U];
      rows_under(d_gamma_, h, ky, gamma_rows);
      rows_under(d_beta_, h, ky, beta_rows);
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) {
        Vec<A> z_gamma[K], z_beta[K];
        sums_under(gamma_rows, w + i, c, z_gamma);
        sums_under(beta_rows, w + i, c, z_beta);
#pragma GCC unroll 5
        for (int kx = 0; kx < K; ++kx) {
          d_mask[i] += load(sample.table->tap[0][K * ky + kx] + c) * z_gamma[kx];
          from_beta[i] += load(sample.table->tap[1][K * ky + kx] + c) * z_beta[kx];
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) d_mask[i] += from_beta[i];
  }

  PIXNORM_INLINE void make_q(const SampleHere& sample, int64_t h) {
    if constexpr (kApply) {
      if (!s_.one_mask()) apply_mask(sample, h);
    } else {
      for (int c = 0; c < kBlock; c += kLanes<A>) {
        reduce_taps(sample, h, c);
        if (!s_.one_mask()) reduce_mask(h, c);
      }
      if (s_.one_mask()) add_channels(h);
    }
  }

  PIXNORM_INLINE void apply_mask(const SampleHere& sample, int64_t h) {
    const A *mask = mask_.row(h), *projection = projection_.row(h);
    A* dp = dp_.row(h);
    for (int c = 0; c < kBlock; c += kLanes<A>) {
      const Vec<A> mean_q = load(channels_.mean_q + c), mean_qp = load(channels_.mean_qp + c);
      const Vec<A> weight = load(sample.table->mask_weight + c), rstd = load(channels_.mask_rstd + c);
      for_pixels<4 / U>(s_.w, [&](auto pixels, int64_t w) __attribute__((always_inline)) {
        constexpr int n = decltype(pixels)::value;
        Vec<A> d_mask[n];
        mask_gradient<n>(sample, h, w, c, d_mask);
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) {
          const int64_t at = (w + i) * kBlock + c;
          const Vec<A> m = load(mask + at), d_p_hat = d_mask[i] * m * (A(1) - m) * weight;
          store(dp + at, rstd * (d_p_hat - mean_q - load(projection + at) * mean_qp));
        }
      });
    }
    dp_.done(h);
  }

  PIXNORM_INLINE void reduce_mask(int64_t h, int c) {
    const A *mask = mask_.row(h), *projection = projection_.row(h);
    Vec<A> sum_q{}, sum_qp{};
    for (int64_t w = 0; w < s_.w; ++w) {
      const int64_t at = w * kBlock + c;
      const Vec<A> m = load(mask + at), dq = load(d_mask_ + at) * m * (A(1) - m);
      sum_q += dq;
      sum_qp += dq * load(projection + at);
    }
    add(kSums.q(), c, sum_q);
    add(kSums.qp(), c, sum_qp);
  }

  // One mask: this block's share of its gradient.
  PIXNORM_INLINE void add_channels(int64_t h) {
    const int64_t rest = s_.c - block_ * kBlock;
    const int channels = static_cast<int>(rest < kBlock ? rest : kBlock);
    A* const to = params_.d_mask + (block_ * s_.n + n_) * s_.pixels() + h * s_.w;
    for (int64_t w = 0; w < s_.w; ++w) {
      A total = 0;
      for (int c = 0; c < channels; ++c) total += d_mask_[w * kBlock + c];
      to[w] = total;
    }
  }

  const Shape& s_;
  const Params<A>& params_;
  const Channels<A>& channels_;
  const Tile tile_;
  const int64_t block_;
  MaskRing mask_, projection_;
  GradientRing d_gamma_, d_beta_;
  A* d_mask_;
  RowReader<A> x_, p_, dy_;
  RowWriter<A> dx_, dp_;
  int64_t n_;  // the image
  A *sums_ = nullptr, *all_ = nullptr;
};
