// Vector code of SPN. Lanes are channels, in both layouts. A block of kBlock channels of an image is processed row by
// row, with three rows of the mask (in backward also of dγ and dβ) in a ring buffer [pixel][channel] that stays in L1
// or L2. So borders are whole vectors, and tiny planes cost no more per pixel than large ones. Activations are read and
// written in bands of rows, transposed and upcast on the way. Reading channels_last in place is slower: its pixels are
// often a power of two apart, and conflict in a few sets of L1.
//
// With the normalised projection p̂: m = sigmoid(w p̂ + b) and γ = m ⊛ (w_γ - w_γ*) + K, where K sums the taps of w_γ*
// inside the image, one of nine values per channel. 1 - m is never formed.

#include "cpu/convert_kernels.h"
#include "cpu/moments_kernels.h"
#include "cpu/rows.h"

using spn::kTaps;
using spn::Params;
using spn::Shape;
using spn::Tile;

// ---- per-channel values ----

template <class A>
struct BlockParams {
  A mean[kBlock], rstd[kBlock], mask_mean[kBlock], mask_rstd[kBlock], mask_weight[kBlock], mask_bias[kBlock];
  A mean_g[kBlock], mean_gx[kBlock], mean_q[kBlock], mean_qp[kBlock];
  A tap[2][kTaps][kBlock];  // [gamma, beta]: w - w*
  // K, indexed by whether there is a row above (1) and below (2): in the interior, and corrections at the left and
  // right border.
  A inside[2][4][kBlock], at_left[2][4][kBlock], at_right[2][4][kBlock];
  A phase[2][2][2][4][kBlock];  // [gamma, beta][row phase][column phase]: taps merged by pixel of x, 2x2

  void set(const Params<A>& params, int64_t c0, int channels, int64_t upsample) {
    // Absent channels are all zero, including rstd, so that nothing overflows.
    __builtin_memset(this, 0, sizeof(*this));
    const auto copy = [&](const A* from, A* to) {
      if (from) __builtin_memcpy(to, from + c0, channels * sizeof(A));
    };
    copy(params.mean, mean), copy(params.rstd, rstd), copy(params.mask_mean, mask_mean);
    copy(params.mask_rstd, mask_rstd), copy(params.mask_weight, mask_weight), copy(params.mask_bias, mask_bias);
    copy(params.mean_g, mean_g), copy(params.mean_gx, mean_gx), copy(params.mean_q, mean_q);
    copy(params.mean_qp, mean_qp);
    for (int of = 0; of < 2; ++of) {
      for (int c = 0; c < channels; ++c) {
        const A* w = params.taps[2 * of] + (c0 + c) * kTaps;
        const A* w_inv = params.taps[2 * of + 1] + (c0 + c) * kTaps;
        for (int k = 0; k < kTaps; ++k) tap[of][k][c] = w[k] - w_inv[k];
        for (int rows = 0; rows < 4; ++rows) {
          A column[3];
          for (int kx = 0; kx < 3; ++kx) {
            column[kx] = w_inv[3 + kx] + (rows & 1 ? w_inv[kx] : 0) + (rows & 2 ? w_inv[6 + kx] : 0);
          }
          inside[of][rows][c] = column[0] + column[1] + column[2];
          at_left[of][rows][c] = -column[0];
          at_right[of][rows][c] = -column[2];
        }
      }
      if (upsample == 2) {
        // Tap row ky of output row 2h + a falls on row h + (a + ky - 1 >> 1) of x, that is on row h - 1 + a for tap row
        // 0 (a = 0) or tap rows 0 and 1 (a = 1), and on row h + a for the others.
        for (int a = 0; a < 2; ++a) {
          for (int b = 0; b < 2; ++b) {
            for (int k = 0; k < kTaps; ++k) {
              A* merged = phase[of][a][b][2 * (k / 3 > a) + (k % 3 > b)];
              for (int c = 0; c < kBlock; ++c) merged[c] += tap[of][k][c];
            }
          }
        }
      }
    }
  }
};

// Bit 0: row h - 1 exists; bit 1: row h + 1 exists.
PIXNORM_INLINE int neighbours(int64_t h, int64_t height) { return (h > 0) | (h < height - 1) << 1; }

// Calls body(n, w) for groups of n pixels of [w, width), then for what remains with n / 2, and so on.
template <int n, class Body>
PIXNORM_INLINE void for_pixels(int64_t width, const Body& body, int64_t w = 0) {
  for (; w + n <= width; w += n) body(std::integral_constant<int, n>{}, w);
  if constexpr (n > 1) for_pixels<n / 2>(width, body, w);
}

// Vectors whose sigmoids are found side by side, to hide the latency of a chain of 20 operations.
constexpr int kSigmoids = PIXNORM_ISA == PIXNORM_ISA_AVX512 ? 8 : 4;

// Computes a row of m and, if kKeep, of p̂. Calls look_ahead() once per pixel.
template <bool kKeep, class A, class LookAhead>
PIXNORM_INLINE void mask_row(const BlockParams<A>& params, const A* p, int64_t width, A* mask, A* p_hat,
                             const LookAhead& look_ahead) {
  for (int c = 0; c < kBlock; c += kLanes<A>) {
    const Vec<A> mean = load(params.mask_mean + c), rstd = load(params.mask_rstd + c);
    const Vec<A> weight = load(params.mask_weight + c), bias = load(params.mask_bias + c);
    for_pixels<kSigmoids>(width, [&](auto pixels, int64_t w) __attribute__((always_inline)) {
      constexpr int n = decltype(pixels)::value;
      Vec<A> m[n];
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) {
        m[i] = (load(p + (w + i) * kBlock + c) - mean) * rstd;
        if constexpr (kKeep) store(p_hat + (w + i) * kBlock + c, m[i]);
        m[i] = m[i] * weight + bias;
      }
      if (c == 0) {
        for (int i = 0; i < n; ++i) look_ahead();
      }
      sigmoid<A, n>(m);
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) store(mask + (w + i) * kBlock + c, m[i]);
    });
  }
}

// γ and β of kPixels * U outputs: those of output row U h + a above pixels w, w + 1, ... of row h. Lanes are channels
// c, c + 1, ... `mask` is rows h - 1, h, h + 1 of m.
template <int U, int kPixels, class A>
PIXNORM_INLINE void affine(const BlockParams<A>& params, const A* const (&mask)[3], int a, int64_t w, int64_t width,
                           int row_neighbours, int c, Vec<A> (&gamma)[kPixels * U], Vec<A> (&beta)[kPixels * U]) {
  gamma[0] = load(params.inside[0][row_neighbours] + c);
  beta[0] = load(params.inside[1][row_neighbours] + c);
#pragma GCC unroll 8
  for (int i = 1; i < kPixels * U; ++i) {
    gamma[i] = gamma[0];
    beta[i] = beta[0];
  }
  if (w == 0) {
    gamma[0] += load(params.at_left[0][row_neighbours] + c);
    beta[0] += load(params.at_left[1][row_neighbours] + c);
  }
  if (w + kPixels == width) {
    gamma[kPixels * U - 1] += load(params.at_right[0][row_neighbours] + c);
    beta[kPixels * U - 1] += load(params.at_right[1][row_neighbours] + c);
  }
  if constexpr (U == 1) {
#pragma GCC unroll 9
    for (int k = 0; k < kTaps; ++k) {
      const Vec<A> gamma_tap = load(params.tap[0][k] + c), beta_tap = load(params.tap[1][k] + c);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) {
        const Vec<A> m = load(mask[k / 3] + (w + i + k % 3 - 1) * kBlock + c);
        gamma[i] += gamma_tap * m;
        beta[i] += beta_tap * m;
      }
    }
  } else {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
#pragma GCC unroll 2
      for (int b = 0; b < 2; ++b) {
        const Vec<A> gamma_tap = load(params.phase[0][a][b][k] + c), beta_tap = load(params.phase[1][a][b][k] + c);
#pragma GCC unroll 8
        for (int i = 0; i < kPixels; ++i) {
          const Vec<A> m = load(mask[k / 2 + a] + (w + i + k % 2 - 1 + b) * kBlock + c);
          gamma[2 * i + b] += gamma_tap * m;
          beta[2 * i + b] += beta_tap * m;
        }
      }
    }
  }
}

// Block `block` of image n, of a tensor `scale` times as high and wide as x.
template <class T>
PIXNORM_INLINE Plane<acc_t<T>> plane(const T* tensor, const Shape& s, int64_t scale, int64_t n, int64_t block) {
  return plane_of(tensor, s.channels_last, s.c, s.pixels() * scale * scale, n, block);
}

// ---- forward ----

template <class Acc, int U>
class ForwardBlock {
 public:
  using A = Acc;
  static int64_t scratch(int64_t w) { return Ring<A>::size(w, 1) + 2 * band_rows(w) * w + band_rows(w * U) * w * U; }

  ForwardBlock(Arena<A> arena, const Shape& s, const BlockParams<A>& params, const Tile& tile, const Plane<A>& x,
               const Plane<A>& p, const Plane<A>& y)
      : s_(s),
        params_(params),
        tile_(tile),
        mask_(arena, s.h, s.w),
        x_(x, s.w, tile.h1, arena.pixels(band_rows(s.w) * s.w)),
        p_(p, s.w, tile.h1 < s.h ? tile.h1 + 1 : s.h, arena.pixels(band_rows(s.w) * s.w)),
        y_(y, s.w * U, tile.h0 * U, tile.h1 * U, arena.pixels(band_rows(s.w * U) * s.w * U)) {}

  // The rows of an image of the tile; then call next_image().
  void run() {
    make_mask(tile_.h0 - 1);
    make_mask(tile_.h0);
    for (int64_t h = tile_.h0; h < tile_.h1; ++h) step(h);
  }

  void next_image() { x_.next_image(), p_.next_image(), y_.next_image(); }

 private:
  PIXNORM_INLINE void step(int64_t h) {
    make_mask(h + 1);
    const A* const mask[3] = {mask_.row(h - 1), mask_.row(h), mask_.row(h + 1)};
    const A* x = x_.row(h);
    for (int a = 0; a < U; ++a) {
      A* y = y_.row(h * U + a);
      if (s_.activation.on) {
        make_row<true>(h, a, mask, x, y);
      } else {
        make_row<false>(h, a, mask, x, y);
      }
      y_.done(h * U + a);
    }
  }

  PIXNORM_INLINE void make_mask(int64_t h) {
    if (h < 0 || h >= s_.h) return;
    mask_row<false>(params_, p_.row(h), s_.w, mask_.row(h), static_cast<A*>(nullptr), [&] {
      x_.look_ahead();
      p_.look_ahead();
    });
  }

  template <bool kActivated>
  PIXNORM_INLINE void make_row(int64_t h, int a, const A* const (&mask)[3], const A* x, A* y) {
    const int row_neighbours = neighbours(h * U + a, s_.h * U);
    const A slope = static_cast<A>(s_.activation.slope);
    for (int c = 0; c < kBlock; c += kLanes<A>) {
      const Vec<A> mean = load(params_.mean + c), rstd = load(params_.rstd + c);
      for_pixels<4 / U>(s_.w, [&](auto pixels, int64_t w) __attribute__((always_inline)) {
        constexpr int n = decltype(pixels)::value;
        Vec<A> gamma[n * U], beta[n * U];
        affine<U, n>(params_, mask, a, w, s_.w, row_neighbours, c, gamma, beta);
#pragma GCC unroll 8
        for (int i = 0; i < n * U; ++i) {
          const Vec<A> x_hat = (load(x + (w + i / U) * kBlock + c) - mean) * rstd;
          Vec<A> value = gamma[i] * x_hat + beta[i];
          if constexpr (kActivated) activate(value, slope);
          store(y + (w * U + i) * kBlock + c, value);
        }
      });
    }
  }

  const Shape& s_;
  const BlockParams<A>& params_;
  const Tile tile_;
  Ring<A> mask_;
  RowReader<A> x_, p_;
  RowWriter<A> y_;
};

#include "cpu/spn_backward_kernels.h"

// ---- entry points: one tile of one block of channels; `scratch` has block_scratch bytes ----

template <class Block>
int64_t block_scratch(const Shape& s) {
  using A = typename Block::A;
  return Block::scratch(s.w) * kBlock * sizeof(A) + sizeof(BlockParams<A>);
}

// Goes through the images of the tile with the Block that make(arena, block_params) returns for the first one.
template <class A, class Make>
PIXNORM_INLINE void run_block(const Shape& s, const Params<A>& params, const Tile& tile, int64_t block, void* scratch,
                              const Make& make) {
  auto* block_params = static_cast<BlockParams<A>*>(scratch);
  const int64_t c0 = block * kBlock;
  block_params->set(params, c0, static_cast<int>(s.c - c0 < kBlock ? s.c - c0 : kBlock), s.upsample);
  auto rows = make(Arena<A>{reinterpret_cast<A*>(block_params + 1)}, *block_params);
  for (int64_t n = tile.n0; n < tile.n1; ++n) {
    rows.run();
    rows.next_image();
  }
}

template <class T, int U>
void forward(const Shape& s, const Params<acc_t<T>>& params, const Tile& tile, int64_t block, void* scratch, const T* x,
             const T* p, T* y) {
  run_block(s, params, tile, block, scratch, [&](auto arena, const auto& block_params) {
    return ForwardBlock<acc_t<T>, U>(arena, s, block_params, tile, plane(x, s, 1, tile.n0, block),
                                     plane(p, s, 1, tile.n0, block), plane(y, s, U, tile.n0, block));
  });
}

// Accumulates into sums [kSums][kBlock].
template <class T, int U>
void backward_reduce(const Shape& s, const Params<acc_t<T>>& params, const Tile& tile, int64_t block, void* scratch,
                     const T* x, const T* p, const T* dy, acc_t<T>* sums) {
  run_block(s, params, tile, block, scratch, [&](auto arena, const auto& block_params) {
    return BackwardBlock<acc_t<T>, U, false>(arena, s, block_params, tile, plane(x, s, 1, tile.n0, block),
                                             plane(p, s, 1, tile.n0, block), plane(dy, s, U, tile.n0, block), {}, {},
                                             sums);
  });
}

// dx and dp begin with image first_n.
template <class T, int U>
void backward_apply(const Shape& s, const Params<acc_t<T>>& params, const Tile& tile, int64_t block, void* scratch,
                    const T* x, const T* p, const T* dy, T* dx, T* dp, int64_t first_n) {
  run_block(s, params, tile, block, scratch, [&](auto arena, const auto& block_params) {
    return BackwardBlock<acc_t<T>, U, true>(arena, s, block_params, tile, plane(x, s, 1, tile.n0, block),
                                            plane(p, s, 1, tile.n0, block), plane(dy, s, U, tile.n0, block),
                                            plane(dx, s, 1, tile.n0 - first_n, block),
                                            plane(dp, s, 1, tile.n0 - first_n, block), nullptr);
  });
}
