// GConv's mixing, except for the matrix products. Vector code, compiled once per instruction set.
//
// Arrays are matrices with rows of `count` numbers, `stride` apart. In NCHW a row is a channel of an image, so
// per-channel values are per row (kPerRow). In channels_last a row is (some channels of) a pixel, and they are per
// column.

#include "cpu/convert_kernels.h"

// y = u + b and su = s u; b may be null.
template <class A, bool kPerRow>
void scale(const A* u, const A* s, const A* b, A* y, A* su, int64_t rows, int64_t count, int64_t stride) {
  constexpr int n = kLanes<A>;
  for (int64_t r = 0; r < rows; ++r, u += stride, y += stride, su += stride) {
    int64_t i = 0;
    for (; i + n <= count; i += n) {
      const Vec<A> v = load(u + i);
      store(su + i, v * (kPerRow ? broadcast(s[r]) : load(s + i)));
      store(y + i, b ? v + (kPerRow ? broadcast(b[r]) : load(b + i)) : v);
    }
    for (; i < count; ++i) {
      const int64_t c = kPerRow ? r : i;
      const A v = u[i];
      su[i] = v * s[c];
      y[i] = b ? v + b[c] : v;
    }
  }
}

// du = dy + s h, su = s u, ds = Σ u h over pixels.
template <class A, bool kPerRow>
void scale_backward(const A* u, const A* dy, const A* h, const A* s, A* du, A* su, A* ds, int64_t rows, int64_t count,
                    int64_t stride) {
  constexpr int n = kLanes<A>;
  if (!kPerRow) {
    for (int64_t i = 0; i < count; ++i) ds[i] = 0;
  }
  for (int64_t r = 0; r < rows; ++r, u += stride, dy += stride, h += stride, du += stride, su += stride) {
    Vec<A> sums{};
    A sum = 0;
    int64_t i = 0;
    for (; i + n <= count; i += n) {
      const Vec<A> scale = kPerRow ? broadcast(s[r]) : load(s + i), in = load(u + i), g = load(h + i);
      store(du + i, load(dy + i) + scale * g);
      store(su + i, scale * in);
      if (kPerRow) {
        sums += in * g;
      } else {
        store(ds + i, load(ds + i) + in * g);
      }
    }
    for (; i < count; ++i) {
      const A scale = s[kPerRow ? r : i];
      du[i] = dy[i] + scale * h[i];
      su[i] = scale * u[i];
      (kPerRow ? sum : ds[i]) += u[i] * h[i];
    }
    if (kPerRow) ds[r] = sum + sum_lanes<A>(sums);
  }
}

// y += b.
template <class A, bool kPerRow>
void add_bias(A* y, const A* b, int64_t rows, int64_t count, int64_t stride) {
  constexpr int n = kLanes<A>;
  for (int64_t r = 0; r < rows; ++r, y += stride) {
    int64_t i = 0;
    for (; i + n <= count; i += n) store(y + i, load(y + i) + (kPerRow ? broadcast(b[r]) : load(b + i)));
    for (; i < count; ++i) y[i] += b[kPerRow ? r : i];
  }
}

// sums += Σ v over pixels, for at most kMostSums channels. Short runs are summed in A, and the runs in double.
constexpr int64_t kMostSums = 1 << 5;

template <class A, bool kPerRow>
void add_sums(const A* v, double* sums, int64_t rows, int64_t count, int64_t stride) {
  constexpr int n = kLanes<A>;
  constexpr int64_t kRun = 1 << 6;
  if (kPerRow) {
    for (int64_t r = 0; r < rows; ++r, v += stride) {
      for (int64_t first = 0; first < count; first += kRun * n) {
        const int64_t end = count - first < kRun * n ? count : first + kRun * n;
        Vec<A> run{};
        int64_t i = first;
        for (; i + n <= end; i += n) run += load(v + i);
        for (; i < end; ++i) sums[r] += v[i];
        sums[r] += sum_lanes<A>(run);
      }
    }
  } else {
    for (int64_t first = 0; first < rows; first += kRun) {
      A run[kMostSums] = {};
      for (int64_t r = first; r < rows && r < first + kRun; ++r, v += stride) {
        int64_t i = 0;
        for (; i + n <= count; i += n) store(run + i, load(run + i) + load(v + i));
        for (; i < count; ++i) run[i] += v[i];
      }
      for (int64_t i = 0; i < count; ++i) sums[i] += run[i];
    }
  }
}

// Rows [j0, j1) of I + W diag(s), (n, n).
template <class A>
void weights_of_sample(const A* w, const A* s, A* out, int64_t n, int64_t j0, int64_t j1) {
  for (int64_t j = j0; j < j1; ++j) {
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) store(out + j * n + i, load(w + j * n + i) * load(s + i));
    for (; i < n; ++i) out[j * n + i] = w[j * n + i] * s[i];
    out[j * n + j] += 1;
  }
}

// to += a b, elementwise.
template <class A>
void add_product(const A* a, const A* b, A* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load(to + i) + load(a + i) * load(b + i));
  for (; i < count; ++i) to[i] += a[i] * b[i];
}
