// Vector code of SPN. Lanes are channels, in both layouts. A block of kBlock channels of an image is processed row by
// row, with the rows of the mask that a stencil needs (in backward also of dγ and dβ) in a ring buffer [pixel][channel]
// that stays in L1 or L2. So borders are whole vectors, and tiny planes cost no more per pixel than large ones.
// Activations are read and written in bands of rows, transposed and upcast on the way. Reading channels_last in place
// is slower: its pixels are often a power of two apart, and conflict in a few sets of L1.
//
// With the normalised projection p̂: m = sigmoid(w p̂ + b) and γ = m ⊛ (w_γ - w_γ*) + K, where K sums the taps of w_γ*
// inside the image, one of a few values per channel. 1 - m is never formed.
//
// Template arguments: K, the size of kernels (1, 3, 5), and U, upsampling (1, 2).

#include "cpu/convert_kernels.h"
#include "cpu/rows.h"

using spn::Params;
using spn::Shape;
using spn::Sums;
using spn::Tile;

// ---- per-channel values ----

// How far kernels reach, in pixels of y and of x.
template <int K, int U>
struct Reach {
  static constexpr int kOfY = K / 2, kOfX = (kOfY + U - 1) / U, kRows = 2 * kOfX + 1;
  // With U == 2, tap row ky of output row 2h + a falls on row h + ((a + ky - kOfY) >> 1) of x: on kMerged rows from
  // h + first(a) on.
  static constexpr int kMerged = kOfY + 1;
  static constexpr int first(int a) { return (a - kOfY) >> 1; }
};

// Kernels and mask affine of a group.
template <class A, int K, int U>
struct Table {
  using R = Reach<K, U>;
  static constexpr int kEdge = R::kOfY > 0 ? R::kOfY : 1, kClasses = (R::kOfY + 1) * (R::kOfY + 1);
  A mask_weight[kBlock], mask_bias[kBlock];
  A tap[2][K * K][kBlock];  // [gamma, beta]: w - w*
  // The constant K, by how many rows there are above and below (`row_class`): in the interior, and corrections of the
  // columns at the left and right border, by their distance from it.
  A inside[2][kClasses][kBlock], at_left[2][kClasses][kEdge][kBlock], at_right[2][kClasses][kEdge][kBlock];
  A phase[2][2][2][U == 2 ? R::kMerged * R::kMerged : 1][kBlock];  // [.][row phase][column phase]: taps by pixel of x

  // See Kernels::fill_table.
  void set(const A* rows) {
    __builtin_memset(this, 0, sizeof(*this));
    const auto row = [&](int i) { return rows + i * kBlock; };
    __builtin_memcpy(mask_weight, row(4 * K * K), sizeof(mask_weight));
    __builtin_memcpy(mask_bias, row(4 * K * K + 1), sizeof(mask_bias));
    for (int of = 0; of < 2; ++of) {
      const int weight = 2 * of * K * K, inverse = weight + K * K;
      for (int k = 0; k < K * K; ++k) add(tap[of][k], row(weight + k), row(inverse + k));
      for (int above = 0; above <= R::kOfY; ++above) {
        for (int below = 0; below <= R::kOfY; ++below) {
          const int rows_inside = above * (R::kOfY + 1) + below;
          for (int ky = R::kOfY - above; ky <= R::kOfY + below; ++ky) {
            for (int kx = 0; kx < K; ++kx) {
              const A* const w = row(inverse + ky * K + kx);
              add(inside[of][rows_inside], w);
              for (int column = 0; column < R::kOfY - kx; ++column) subtract(at_left[of][rows_inside][column], w);
              for (int column = 0; column < kx - R::kOfY; ++column) subtract(at_right[of][rows_inside][column], w);
            }
          }
        }
      }
      if constexpr (U == 2) {
        for (int a = 0; a < 2; ++a) {
          for (int b = 0; b < 2; ++b) {
            for (int k = 0; k < K * K; ++k) {
              const int i = ((a + k / K - R::kOfY) >> 1) - R::first(a), j = ((b + k % K - R::kOfY) >> 1) - R::first(b);
              add(phase[of][a][b][i * R::kMerged + j], tap[of][k]);
            }
          }
        }
      }
    }
  }

 private:
  static PIXNORM_INLINE void add(A* to, const A* value) {
    for (int c = 0; c < kBlock; c += kLanes<A>) store(to + c, load(to + c) + load(value + c));
  }
  static PIXNORM_INLINE void add(A* to, const A* value, const A* less) {
    for (int c = 0; c < kBlock; c += kLanes<A>) store(to + c, load(value + c) - load(less + c));
  }
  static PIXNORM_INLINE void subtract(A* to, const A* value) {
    for (int c = 0; c < kBlock; c += kLanes<A>) store(to + c, load(to + c) - load(value + c));
  }
};

template <class A, int K, int U>
void fill_table(const A* rows, void* table) {
  static_cast<Table<A, K, U>*>(table)->set(rows);
}

// Statistics of the channels of a block.
template <class A>
struct Channels {
  A mean[kBlock], rstd[kBlock], mask_mean[kBlock], mask_rstd[kBlock];
  A mean_g[kBlock], mean_gx[kBlock], mean_q[kBlock], mean_qp[kBlock];

  void set(const Params<A>& params, int64_t c0, int channels) {
    // Absent channels are all zero, including rstd, so that nothing overflows.
    __builtin_memset(this, 0, sizeof(*this));
    const auto copy = [&](const A* from, A* to) {
      if (from) __builtin_memcpy(to, from + c0, channels * sizeof(A));
    };
    copy(params.mean, mean), copy(params.rstd, rstd), copy(params.mask_mean, mask_mean);
    copy(params.mask_rstd, mask_rstd), copy(params.mean_g, mean_g), copy(params.mean_gx, mean_gx);
    copy(params.mean_q, mean_q), copy(params.mean_qp, mean_qp);
  }
};

// What depends on the sample.
template <class A, int K, int U>
struct Sample {
  const Table<A, K, U>* table;
  const A* row[2];  // added to γ and β

  PIXNORM_INLINE Sample(const Params<A>& params, int64_t blocks, int64_t n, int64_t block) {
    table =
        reinterpret_cast<const Table<A, K, U>*>(params.tables + (params.slot[n] * blocks + block) * params.table_bytes);
    for (int of = 0; of < 2; ++of) row[of] = params.rows[of] + n * params.row_stride + block * kBlock;
  }
  // γ (of = 0) or β in the interior of a row, but for the mask.
  PIXNORM_INLINE Vec<A> constant(int of, int row_class, int c) const {
    return load(table->inside[of][row_class] + c) + load(row[of] + c);
  }
};

// How many rows a stencil finds above and below row h, at most K / 2 each.
template <int K>
PIXNORM_INLINE int row_class(int64_t h, int64_t height) {
  constexpr int R = K / 2;
  const int64_t above = h < R ? h : R, below = height - 1 - h < R ? height - 1 - h : R;
  return static_cast<int>(above * (R + 1) + below);
}

// Calls body(n, w) for groups of n pixels of [w, width), then for what remains with n / 2, and so on.
template <int n, class Body>
PIXNORM_INLINE void for_pixels(int64_t width, const Body& body, int64_t w = 0) {
  for (; w + n <= width; w += n) body(std::integral_constant<int, n>{}, w);
  if constexpr (n > 1) for_pixels<n / 2>(width, body, w);
}

// Vectors whose sigmoids are found side by side, to hide the latency of a chain of 20 operations.
constexpr int kSigmoids = PIXNORM_ISA == PIXNORM_ISA_AVX512 ? 8 : 4;

// Computes a row of m and, if kKeep, of p̂. Calls look_ahead() once per pixel.
template <bool kKeep, class A, class Tables, class LookAhead>
PIXNORM_INLINE void mask_row(const Channels<A>& channels, const Tables& table, const A* p, int64_t width, A* mask,
                             A* p_hat, const LookAhead& look_ahead) {
  for (int c = 0; c < kBlock; c += kLanes<A>) {
    const Vec<A> mean = load(channels.mask_mean + c), rstd = load(channels.mask_rstd + c);
    const Vec<A> weight = load(table.mask_weight + c), bias = load(table.mask_bias + c);
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
// c, c + 1, ... `mask` is the rows of m around h, `constant` that of γ and β in row_class.
template <int kPixels, class A, int K, int U>
PIXNORM_INLINE void affine(const Table<A, K, U>& table, const A* const (&mask)[Reach<K, U>::kRows], int a, int64_t w,
                           int64_t width, int row_class, const Vec<A> (&constant)[2], int c,
                           Vec<A> (&gamma)[kPixels * U], Vec<A> (&beta)[kPixels * U]) {
  using R = Reach<K, U>;
#pragma GCC unroll 8
  for (int i = 0; i < kPixels * U; ++i) {
    gamma[i] = constant[0];
    beta[i] = constant[1];
  }
  if constexpr (K > 1) {
    const int64_t left = w * U, right = (width - w) * U - 1;  // columns up to the border, from output 0
    if (left < R::kOfY) {
#pragma GCC unroll 8
      for (int i = 0; i < kPixels * U; ++i) {
        if (left + i >= R::kOfY) continue;
        gamma[i] += load(table.at_left[0][row_class][left + i] + c);
        beta[i] += load(table.at_left[1][row_class][left + i] + c);
      }
    }
    if (right - (kPixels * U - 1) < R::kOfY) {
#pragma GCC unroll 8
      for (int i = 0; i < kPixels * U; ++i) {
        if (right - i >= R::kOfY) continue;
        gamma[i] += load(table.at_right[0][row_class][right - i] + c);
        beta[i] += load(table.at_right[1][row_class][right - i] + c);
      }
    }
  }
  if constexpr (U == 1) {
#pragma GCC unroll 25
    for (int k = 0; k < K * K; ++k) {
      const Vec<A> gamma_tap = load(table.tap[0][k] + c), beta_tap = load(table.tap[1][k] + c);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) {
        const Vec<A> m = load(mask[k / K] + (w + i + k % K - R::kOfY) * kBlock + c);
        gamma[i] += gamma_tap * m;
        beta[i] += beta_tap * m;
      }
    }
  } else {
#pragma GCC unroll 9
    for (int k = 0; k < R::kMerged * R::kMerged; ++k) {
#pragma GCC unroll 2
      for (int b = 0; b < 2; ++b) {
        const Vec<A> gamma_tap = load(table.phase[0][a][b][k] + c), beta_tap = load(table.phase[1][a][b][k] + c);
        const A* const row = mask[R::first(a) + R::kOfX + k / R::kMerged];
#pragma GCC unroll 8
        for (int i = 0; i < kPixels; ++i) {
          const Vec<A> m = load(row + (w + i + R::first(b) + k % R::kMerged) * kBlock + c);
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

template <class T>
PIXNORM_INLINE Plane<acc_t<T>> plane_of_mask(const T* p, const Shape& s, int64_t n, int64_t block) {
  return s.one_mask() ? plane_of_one(p, s.pixels(), n) : plane(p, s, 1, n, block);
}

// ---- forward ----

template <class Acc, int K, int U>
class ForwardBlock {
 public:
  using A = Acc;
  using R = Reach<K, U>;
  static int64_t scratch(int64_t w) { return MaskRing::size(w, 1) + 2 * band_rows(w) * w + band_rows(w * U) * w * U; }

  ForwardBlock(Arena<A> arena, const Shape& s, const Channels<A>& channels, const Tile& tile, const Plane<A>& x,
               const Plane<A>& p, const Plane<A>& y)
      : s_(s),
        channels_(channels),
        tile_(tile),
        mask_(arena, s.h, s.w),
        x_(x, s.w, tile.h1, arena.pixels(band_rows(s.w) * s.w)),
        p_(p, s.w, tile.h1 + R::kOfX < s.h ? tile.h1 + R::kOfX : s.h, arena.pixels(band_rows(s.w) * s.w)),
        y_(y, s.w * U, tile.h0 * U, tile.h1 * U, arena.pixels(band_rows(s.w * U) * s.w * U)) {}

  // The rows of an image of the tile; then call next_image().
  void run(const Sample<A, K, U>& sample) {
    for (int64_t h = tile_.h0 - R::kOfX; h < tile_.h0 + R::kOfX; ++h) make_mask(sample, h);
    for (int64_t h = tile_.h0; h < tile_.h1; ++h) step(sample, h);
  }

  void next_image() { x_.next_image(), p_.next_image(), y_.next_image(); }

 private:
  using MaskRing = Ring<A, R::kRows, R::kOfX>;

  PIXNORM_INLINE void step(const Sample<A, K, U>& sample, int64_t h) {
    make_mask(sample, h + R::kOfX);
    const A* mask[R::kRows];
    for (int i = 0; i < R::kRows; ++i) mask[i] = mask_.row(h - R::kOfX + i);
    const A* x = x_.row(h);
    for (int a = 0; a < U; ++a) {
      A* y = y_.row(h * U + a);
      if (s_.activation.on) {
        make_row<true>(sample, h, a, mask, x, y);
      } else {
        make_row<false>(sample, h, a, mask, x, y);
      }
      y_.done(h * U + a);
    }
  }

  PIXNORM_INLINE void make_mask(const Sample<A, K, U>& sample, int64_t h) {
    if (h < 0 || h >= s_.h) return;
    mask_row<false>(channels_, *sample.table, p_.row(h), s_.w, mask_.row(h), static_cast<A*>(nullptr), [&] {
      x_.look_ahead();
      p_.look_ahead();
    });
  }

  template <bool kActivated>
  PIXNORM_INLINE void make_row(const Sample<A, K, U>& sample, int64_t h, int a, const A* const (&mask)[R::kRows],
                               const A* x, A* y) {
    const int rows = row_class<K>(h * U + a, s_.h * U);
    const A slope = static_cast<A>(s_.activation.slope);
    for (int c = 0; c < kBlock; c += kLanes<A>) {
      const Vec<A> mean = load(channels_.mean + c), rstd = load(channels_.rstd + c);
      const Vec<A> constant[2] = {sample.constant(0, rows, c), sample.constant(1, rows, c)};
      for_pixels<4 / U>(s_.w, [&](auto pixels, int64_t w) __attribute__((always_inline)) {
        constexpr int n = decltype(pixels)::value;
        Vec<A> gamma[n * U], beta[n * U];
        affine<n>(*sample.table, mask, a, w, s_.w, rows, constant, c, gamma, beta);
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
  const Channels<A>& channels_;
  const Tile tile_;
  MaskRing mask_;
  RowReader<A> x_, p_;
  RowWriter<A> y_;
};

#include "cpu/spn_backward_kernels.h"

// ---- entry points: see Kernels ----

template <class Block>
int64_t block_scratch(const Shape& s) {
  using A = typename Block::A;
  return Block::scratch(s.w) * kBlock * sizeof(A) + sizeof(Channels<A>);
}

template <class A, int K, int U>
int64_t forward_scratch(const Shape& s) {
  return block_scratch<ForwardBlock<A, K, U>>(s);
}

template <class A, int K, int U>
int64_t backward_scratch(const Shape& s) {
  return block_scratch<BackwardBlock<A, K, U, false>>(s);
}

// Goes through the images of the tile with the Block that make(arena, channels) returns for the first one.
template <int K, int U, class A, class Make>
PIXNORM_INLINE void run_block(const Shape& s, const Params<A>& params, const Tile& tile, int64_t block, void* scratch,
                              const Make& make) {
  auto* channels = static_cast<Channels<A>*>(scratch);
  const int64_t c0 = block * kBlock;
  channels->set(params, c0, static_cast<int>(s.c - c0 < kBlock ? s.c - c0 : kBlock));
  auto rows = make(Arena<A>{reinterpret_cast<A*>(channels + 1)}, *channels);
  for (int64_t n = tile.n0; n < tile.n1; ++n) {
    rows.run(Sample<A, K, U>(params, s.blocks(), n, block));
    rows.next_image();
  }
}

template <class T, int K, int U>
void forward(const Shape& s, const Params<acc_t<T>>& params, const Tile& tile, int64_t block, void* scratch, const T* x,
             const T* p, T* y) {
  run_block<K, U>(s, params, tile, block, scratch, [&](auto arena, const auto& channels) {
    return ForwardBlock<acc_t<T>, K, U>(arena, s, channels, tile, plane(x, s, 1, tile.n0, block),
                                        plane_of_mask(p, s, tile.n0, block), plane(y, s, U, tile.n0, block));
  });
}

template <class T, int K, int U>
void backward_reduce(const Shape& s, const Params<acc_t<T>>& params, const Tile& tile, int64_t block, void* scratch,
                     const T* x, const T* p, const T* dy) {
  run_block<K, U>(s, params, tile, block, scratch, [&](auto arena, const auto& channels) {
    return BackwardBlock<acc_t<T>, K, U, false>(arena, s, params, channels, tile, block, plane(x, s, 1, tile.n0, block),
                                                plane_of_mask(p, s, tile.n0, block), plane(dy, s, U, tile.n0, block),
                                                Plane<acc_t<T>>{}, Plane<acc_t<T>>{});
  });
}

template <class T, int K, int U>
void backward_apply(const Shape& s, const Params<acc_t<T>>& params, const Tile& tile, int64_t block, void* scratch,
                    const T* x, const T* p, const T* dy, T* dx, T* dp, int64_t first_n) {
  run_block<K, U>(s, params, tile, block, scratch, [&](auto arena, const auto& channels) {
    return BackwardBlock<acc_t<T>, K, U, true>(
        arena, s, params, channels, tile, block, plane(x, s, 1, tile.n0, block), plane_of_mask(p, s, tile.n0, block),
        plane(dy, s, U, tile.n0, block), plane(dx, s, 1, tile.n0 - first_n, block),
        s.one_mask() ? Plane<acc_t<T>>{} : plane(dp, s, 1, tile.n0 - first_n, block));
  });
}
