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

// The same for k x k taps, in an order of its own. For gamma (of = 0) and beta (of = 1): k² sums of the gradient times
// the mask under a tap; then the gradient summed over the pixels of `edge`; last Σ dq and Σ dq p̂.
//
// An output lies in edge(ky, kx) if tap row ky falls outside the image there and so does tap column kx. For the middle
// row (column), which never does, all rows (columns) count, so that edge(k / 2, k / 2) is the sum over all outputs.
struct Sums {
  int k;

  constexpr int taps() const { return k * k; }
  constexpr int each() const { return 2 * taps(); }
  constexpr int with_mask(int of, int tap) const { return of * each() + tap; }
  constexpr int edge(int of, int ky, int kx) const { return of * each() + taps() + ky * k + kx; }
  constexpr int all(int of) const { return edge(of, k / 2, k / 2); }
  constexpr int q() const { return 2 * each(); }
  constexpr int qp() const { return q() + 1; }
  constexpr int count() const { return qp() + 1; }
};

}  // namespace pixnorm::spn
