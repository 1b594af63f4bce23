// Shared by modulate.cpp (tensors, threads) and modulate_kernels.h (vector code).
#pragma once

#include <algorithm>
#include <cstdint>

namespace pixnorm::modulate {

// An image is what is contiguous in memory and shares a statistic: in NCHW a plane of one channel, so that channel c of
// sample n is image n * C + c; in channels_last a sample with all its channels. So in both layouts channel k of image q
// has the number q * channels + k in an array (N, C).
struct Shape {
  int64_t images, channels;  // channels of an image
  int64_t h, w;              // of x; without upsampling its pixels are rows of width 1, to be cut anywhere
  int64_t upsample;
  bool channels_last;

  int64_t row() const { return w * channels; }
  int64_t elements() const { return h * row(); }
  int64_t output_elements() const { return elements() * upsample * upsample; }
};

// Of the channels of one image. Kernels of maps read no gamma and beta here.
template <class A>
struct Coefficients {
  const A *mean, *rstd;
  const A *gamma, *beta;  // gamma with its offset
  // Means of dy γ and dy γ x̂ times rstd, which centre dx.
  const A *centre, *centre_x;
  A offset;  // added to maps gamma
  A slope;   // 1 without an activation
};

// Rows [h0, h1) of x of an image; the pointers are to row 0.
template <class T>
struct Rows {
  int64_t h0, h1;
  const T *x, *gamma, *beta, *dy;
  T *y, *dx, *dgamma, *dbeta;
};

}  // namespace pixnorm::modulate
