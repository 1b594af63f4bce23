// Shared by style.cpp (tensors, threads) and style_kernels.h (vector code).
#pragma once

#include <cstdint>

#include "cpu/images.h"
#include "dispatch.h"

namespace pixnorm::style {

// Coefficients of the channels of a piece. The activation gets u = demod · x + strength · noise + bias.
template <class A>
struct Layer {
  const A *demod, *strength, *bias;
  A slope;  // 1 without an activation
};

// What becomes of v, the result of the activation: StyleGAN 1 normalises it.
template <class A>
struct Norm {
  const A *mean, *rstd;
  const A *scale, *shift;  // scale with its offset
  // Means of dy and dy v̂, which centre the gradient of v.
  const A *centre, *centre_v;
};

// A piece of an image that is contiguous in memory: in channels_last some of its pixels; in NCHW the planes of some
// channels, or some pixels of one plane. The pointers are to its first element, and that to the noise to its first
// pixel.
template <class T>
struct Piece {
  int64_t channels, pixels;
  const T *x, *dy;
  const acc_t<T>* noise;
  T* to;  // y or dx
};

}  // namespace pixnorm::style
