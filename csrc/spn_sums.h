// What SPN's kernels on every device share: the sums of backward, and what follows from them.
#pragma once

#include "scalar.h"

namespace pixnorm::spn {

constexpr int kTaps = 9;

// What backward reduce sums per channel. `of` is 0 for the sums of dγ = dy x̂ (gamma's), 1 for those of dβ = dy.
// kWithMask + k: with the mask under tap k. The rest, over the output: all, and what a tap that reaches over an edge
// misses.
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

// Of one `of`: the sum over the outputs whose tap k lies inside the image.
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
