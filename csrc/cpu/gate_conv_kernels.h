// Vector code of the convolution in CBAM's spatial gate: one or two channels. Planes have zeros around them: rows are
// `pitch` apart, whole vectors may be read.

constexpr int kGateVectors = 4;

// out (channels, rows, width) = weight (channels, from, kh, kw) ⊛ padded (from, rows + kh - 1, pitch). Channels of out
// are out_plane apart.
template <class A>
void gate_correlate(const A* padded, int64_t pitch, int64_t from, const A* weight, int64_t kh, int64_t kw,
                    int64_t channels, int64_t rows, int64_t width, A* out, int64_t out_plane) {
  using V = Vec<A>;
  constexpr int n = kLanes<A>, kStep = kGateVectors * n;
  const int64_t plane = (rows + kh - 1) * pitch;
  for (int64_t o = 0; o < channels; ++o) {
    for (int64_t h = 0; h < rows; ++h) {
      for (int64_t w = 0; w < width; w += kStep) {
        V sums[kGateVectors] = {};
        const A* tap = weight + o * from * kh * kw;
        for (int64_t i = 0; i < from; ++i) {
          for (int64_t y = 0; y < kh; ++y) {
            const A* const row = padded + i * plane + (h + y) * pitch + w;
            for (int64_t x = 0; x < kw; ++x, ++tap) {
#pragma GCC unroll 4
              for (int v = 0; v < kGateVectors; ++v) sums[v] += *tap * load(row + x + v * n);
            }
          }
        }
        const int64_t live = width - w < kStep ? width - w : kStep;
        __builtin_memcpy(out + o * out_plane + h * width + w, sums, live * sizeof(A));
      }
    }
  }
}

// kTaps neighbouring taps of a row of the kernel: sums over rows of grad (rows, pitch) times those of a padded plane.
// Beyond the width grad is zero, and the plane counts as zero, too: infinity there belongs to other taps.
template <class A, int kTaps>
PIXNORM_INLINE void gate_tap_sums(const A* grad, const A* padded, int64_t pitch, int64_t rows, int64_t width, A* to) {
  constexpr int n = kLanes<A>;
  const int64_t whole = width / n * n;
  typename Lanes<bits_t<A>, n>::type lanes;
  for (int i = 0; i < n; ++i) lanes[i] = i;
  const auto inside = lanes < static_cast<bits_t<A>>(width - whole);
  Vec<A> sums[kTaps] = {};
  for (int64_t h = 0; h < rows; ++h) {
    const A *const d = grad + h * pitch, *const p = padded + h * pitch;
    for (int64_t w = 0; w < whole; w += n) {
      const Vec<A> of = load(d + w);
#pragma GCC unroll 4
      for (int x = 0; x < kTaps; ++x) sums[x] += of * load(p + w + x);
    }
    if (whole == width) continue;
    const Vec<A> of = load(d + whole);
#pragma GCC unroll 4
    for (int x = 0; x < kTaps; ++x) sums[x] += of * (inside ? load(p + whole + x) : Vec<A>{});
  }
  for (int x = 0; x < kTaps; ++x) to[x] = sum_lanes<A>(sums[x]);
}

// The gradient of a weight (1, from, kh, kw) from some rows, to `to`.
template <class A>
void gate_weight_sums(const A* grad, const A* padded, int64_t pitch, int64_t from, int64_t kh, int64_t kw, int64_t rows,
                      int64_t width, A* to) {
  const int64_t plane = (rows + kh - 1) * pitch;
  for (int64_t i = 0; i < from; ++i) {
    for (int64_t y = 0; y < kh; ++y, to += kw) {
      const A* const at = padded + i * plane + y * pitch;
      int64_t x = 0;
      for (; x + 4 <= kw; x += 4) gate_tap_sums<A, 4>(grad, at + x, pitch, rows, width, to + x);
      for (; x + 2 <= kw; x += 2) gate_tap_sums<A, 2>(grad, at + x, pitch, rows, width, to + x);
      for (; x < kw; ++x) gate_tap_sums<A, 1>(grad, at + x, pitch, rows, width, to + x);
    }
  }
}
