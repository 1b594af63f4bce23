// Shared by modulate.cpp (tensors, threads) and modulate_kernels.h (vector code).
#pragma once

#include <cstdint>

#include "cpu/images.h"

namespace pixnorm::modulate {

// Of the channels of a piece. Kernels of maps read no gamma and beta here.
template <class A>
struct Coefficients {
  const A *mean, *rstd;
  const A *gamma, *beta;  // gamma with its offset
  // Means of dy γ and dy γ x̂ times rstd, which centre dx.
  const A *centre, *centre_x;
  A offset;  // added to maps gamma
  A slope;   // 1 without an activation
};

// A piece of an image that is contiguous in memory: in channels_last some of its rows; in NCHW the planes of some
// channels, or some rows of one plane. The pointers are to its first element.
template <class T>
struct Piece {
  int64_t channels, rows;
  const T *x, *gamma, *beta, *dy;
  T *y, *dx, *dgamma, *dbeta;
};

}  // namespace pixnorm::modulate
