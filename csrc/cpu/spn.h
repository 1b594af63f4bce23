// Shared by the host code (spn_call.h: arguments, threads) and the vector code (spn_kernels.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "activation.h"
#include "dispatch.h"
#include "spn_sums.h"

namespace pixnorm {

constexpr int kBlock = 16;  // channels per block: the lanes of one or more vectors

namespace spn {

struct Shape {
  int64_t n, c, h, w;  // of x; y is `upsample` times as high and wide
  int64_t upsample;
  int64_t masks;  // channels of p: c, or 1 for all
  bool channels_last;
  Activation activation;

  int64_t pixels() const { return h * w; }
  int64_t image() const { return c * h * w; }
  int64_t blocks() const { return (c + kBlock - 1) / kBlock; }
  bool one_mask() const { return masks != c; }
};

// All but activations, upcast.
template <class A>
struct Params {
  // (C,); those of one mask are repeated.
  const A *mean, *rstd, *mask_mean, *mask_rstd;
  // Tables of kernels and mask affine, one per slot (a group that is in the batch) and block of channels.
  const char* tables;
  int64_t table_bytes;
  const int32_t* slot;  // by sample
  // Added to γ and β: by sample, padded to whole blocks of channels. Stride 0: all have the same.
  const A* rows[2];
  int64_t row_stride;
  // Backward, reduce: sums by sample and part, [blocks][Sums::count()][kBlock]; samples of a group may share them. What
  // is summed for each sample, Σ dγ and Σ dβ, is [sample and part][blocks][2][kBlock]. One mask: its gradient,
  // [blocks][N, pixels].
  int64_t parts;
  const int32_t* sums_of;
  A *sums, *all, *d_mask;
  // Backward, apply: per-channel means of dy γ, dy γ x̂, dp̂ and dp̂ p̂, which centre the gradients of the batch norms
  // (zero for given statistics).
  const A *mean_g, *mean_gx, *mean_q, *mean_qp;
};

// Rows [h0, h1) of x in images [n0, n1). Where an image is cut into parts, of one image.
struct Tile {
  int64_t n0, n1, h0, h1, part;
};

// The vector code for one size of kernels and upsampling, of the instruction set of this CPU: one tile of one block of
// channels. Each gets scratch of its own.
template <class T>
struct Kernels {
  using A = acc_t<T>;
  int64_t table_bytes;
  // From 4 k² rows of kBlock numbers, the taps of gamma_weight, gamma_weight_inv, beta_weight and beta_weight_inv, and
  // one each of mask_weight and mask_bias.
  void (*fill_table)(const A* rows, void* table);
  int64_t (*forward_scratch)(const Shape&);
  int64_t (*backward_scratch)(const Shape&);
  void (*forward)(const Shape&, const Params<A>&, const Tile&, int64_t block, void* scratch, const T* x, const T* p,
                  T* y);
  void (*reduce)(const Shape&, const Params<A>&, const Tile&, int64_t block, void* scratch, const T* x, const T* p,
                 const T* dy);
  // dx and dp begin with image first_n.
  void (*apply)(const Shape&, const Params<A>&, const Tile&, int64_t block, void* scratch, const T* x, const T* p,
                const T* dy, T* dx, T* dp, int64_t first_n);
};

// In a file for each size, which takes a minute to compile.
template <class T>
Kernels<T> kernels_of_1(int64_t upsample);
template <class T>
Kernels<T> kernels_of_3(int64_t upsample);
template <class T>
Kernels<T> kernels_of_5(int64_t upsample);

}  // namespace spn
}  // namespace pixnorm
