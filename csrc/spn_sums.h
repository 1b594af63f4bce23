// The per-channel sums that SPN's backward reduces, shared by the CPU and CUDA kernels.
#pragma once

#include "scalar.h"

namespace pixnorm::spn {

constexpr int kTaps = 9;

// Layout of the sums of one channel: kSumsOf sums of dγ = dy x̂ (of = 0), the same of dβ = dy (of = 1), then two for the
// mask's batch norm. kWithMask + k weights the gradient with the mask under tap k. The others sum it over all outputs,
// and over the border rows, columns and corners, which are padding to some taps.
enum Sum {
  kWithMask = 0,
  kAll = kTaps,
  kTop,
  kBottom,
  kLeft,
  kRight,
  kTopLeft,
  kTopRight,
  kBottomLeft,
  kBottomRight,
  kSumsOf
};
constexpr int kSumQ = 2 * kSumsOf, kSumQp = kSumQ + 1, kSums = kSumQp + 1;

// The sum over the outputs whose tap k lies inside the image.
template <class A>
PIXNORM_HOST_DEVICE A sum_inside(const A* sum, int k) {
  const int ky = k / 3, kx = k % 3;
  A inside = sum[kAll];
  if (ky != 1) inside -= sum[ky == 0 ? kTop : kBottom];
  if (kx != 1) inside -= sum[kx == 0 ? kLeft : kRight];
  if (ky != 1 && kx != 1)
    inside += sum[ky == 0 ? (kx == 0 ? kTopLeft : kTopRight) : (kx == 0 ? kBottomLeft : kBottomRight)];
  return inside;
}

}  // namespace pixnorm::spn
