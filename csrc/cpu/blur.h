// Shared by blur.cpp (tensors, threads) and blur_kernels.h (vector code).
#pragma once

#include <algorithm>
#include <cstdint>

namespace pixnorm {

constexpr int kBlock = 16;  // channels per block: the lanes of one or more vectors

namespace blur {

enum class Resample { kNone, kUp, kDown };

// Images in channels_last, or planes in NCHW, from which one is made. A step is what both have in common: `in` pixels
// of a row before and `out` after. The last step of an odd width after upsampling has one pixel, and no pixel before.
struct Shape {
  int64_t h, w, out_h, out_w;
  int64_t channels;  // of a pixel: 1 in NCHW
  Resample resample;
  double factor;  // by which the weights, small integers, are multiplied

  int64_t in() const { return resample == Resample::kDown ? 2 : 1; }
  int64_t out() const { return resample == Resample::kUp ? 2 : 1; }
  int64_t steps() const { return (out_w + out() - 1) / out(); }
};

}  // namespace blur
}  // namespace pixnorm
