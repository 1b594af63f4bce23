// Shared by spn.cpp (tensors, GEMMs, threads) and spn_kernels.h (vector code).
#pragma once

#include <algorithm>
#include <cstdint>

#include "activation.h"
#include "spn_sums.h"

namespace pixnorm {

constexpr int kBlock = 16;  // channels per block: the lanes of one or more vectors

namespace spn {

struct Shape {
  int64_t n, c, h, w;  // of x; y is `upsample` times as high and wide
  int64_t upsample;
  bool channels_last;
  Activation activation;

  int64_t pixels() const { return h * w; }
  int64_t image() const { return c * h * w; }
  int64_t blocks() const { return (c + kBlock - 1) / kBlock; }
};

// Per-channel inputs, upcast. taps[0..3] are the depthwise weights gamma, gamma_inv, beta and beta_inv, each (C, 9).
template <class A>
struct Params {
  const A *mean, *rstd, *mask_mean, *mask_rstd, *mask_weight, *mask_bias;
  const A* taps[4];
  // Backward apply: per-channel means of dy γ, dy γ x̂, dq and dq p̂, which centre the gradients of the batch norms (zero
  // for given statistics).
  const A *mean_g, *mean_gx, *mean_q, *mean_qp;
};

// Rows [h0, h1) of x in images [n0, n1).
struct Tile {
  int64_t n0, n1, h0, h1;
};

}  // namespace spn
}  // namespace pixnorm
