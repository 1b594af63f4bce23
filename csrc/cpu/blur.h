// Shared by blur.cpp (tensors, threads) and blur_kernels.h (vector code).
#pragma once

#include <algorithm>
#include <cstdint>

namespace pixnorm {

constexpr int kBlock = 16;  // channels per block: the lanes of one or more vectors

namespace blur {

enum class Resample { kNone, kUp, kDown };

// Images, or planes, from which one is made. A step is what both have in common: the pixels of a row are `in` per step
// before and `out` after. The last step after upsampling to an odd width has one pixel, and no pixel before.
struct Shape {
  int64_t h, w, out_h, out_w;
  int64_t channels;  // of a pixel: 1 in NCHW
  Resample resample;
  double factor;  // by which the weights, small integers, are multiplied

  int64_t in() const { return resample == Resample::kDown ? 2 : 1; }
  int64_t out() const { return resample == Resample::kUp ? 2 : 1; }
  int64_t steps() const { return (out_w + out() - 1) / out(); }
  // Rows are filtered along h a band at a time, in scratch memory that stays in the L1 cache; long rows in strips of
  // some steps, with a pixel more on either side.
  static constexpr int64_t kElements = 4096;
  int64_t strip() const { return std::clamp<int64_t>(kElements / (channels * in()), 1, steps()); }
  int64_t pitch() const { return (strip() * in() + 2) * channels; }
  int64_t band() const { return std::max<int64_t>(kElements / pitch(), 1); }
  int64_t scratch() const { return band() * pitch(); }
};

}  // namespace blur
}  // namespace pixnorm
