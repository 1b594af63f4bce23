// GConv's mixing, except for the matrix products. Vector code, compiled once per instruction set.
//
// Arrays are matrices with rows of `count` numbers, `stride` apart. In NCHW a row is a channel of an image, so
// per-channel values are per row (kPerRow). In channels_last a row is (some channels of) a pixel, and they are per
// column.

// su = s u.
template <class T, bool kPerRow>
void scale(const T* u, const acc_t<T>* s, T* su, int64_t rows, int64_t count, int64_t stride) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  for (int64_t r = 0; r < rows; ++r, u += stride, su += stride) {
    int64_t i = 0;
    for (; i + n <= count; i += n) {
      store_as<T>(su + i, load_as<T>(u + i) * (kPerRow ? broadcast(s[r]) : load(s + i)));
    }
    for (; i < count; ++i) su[i] = static_cast<T>(static_cast<A>(u[i]) * s[kPerRow ? r : i]);
  }
}

// du = dy + s h, su = s u, ds = Σ u h over pixels.
template <class T, bool kPerRow>
void scale_backward(const T* u, const T* dy, const T* h, const acc_t<T>* s, T* du, T* su, acc_t<T>* ds, int64_t rows,
                    int64_t count, int64_t stride) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  if (!kPerRow) {
    for (int64_t i = 0; i < count; ++i) ds[i] = 0;
  }
  for (int64_t r = 0; r < rows; ++r, u += stride, dy += stride, h += stride, du += stride, su += stride) {
    Vec<A> sums{};
    A sum = 0;
    int64_t i = 0;
    for (; i + n <= count; i += n) {
      const Vec<A> scale = kPerRow ? broadcast(s[r]) : load(s + i), in = load_as<T>(u + i), g = load_as<T>(h + i);
      store_as<T>(du + i, load_as<T>(dy + i) + scale * g);
      store_as<T>(su + i, scale * in);
      if (kPerRow) {
        sums += in * g;
      } else {
        store(ds + i, load(ds + i) + in * g);
      }
    }
    for (; i < count; ++i) {
      const A scale = s[kPerRow ? r : i], in = static_cast<A>(u[i]), g = static_cast<A>(h[i]);
      du[i] = static_cast<T>(static_cast<A>(dy[i]) + scale * g);
      su[i] = static_cast<T>(scale * in);
      (kPerRow ? sum : ds[i]) += in * g;
    }
    if (kPerRow) ds[r] = sum + sum_lanes<A>(sums);
  }
}

// sums += Σ v over pixels, for at most kMostSums channels. Short runs are summed in A, and the runs in double.
constexpr int64_t kMostSums = 1 << 5;

template <class T, bool kPerRow>
void add_sums(const T* v, double* sums, int64_t rows, int64_t count, int64_t stride) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  constexpr int64_t kRun = 1 << 6;
  if (kPerRow) {
    for (int64_t r = 0; r < rows; ++r, v += stride) {
      for (int64_t first = 0; first < count; first += kRun * n) {
        const int64_t end = count - first < kRun * n ? count : first + kRun * n;
        Vec<A> run{};
        int64_t i = first;
        for (; i + n <= end; i += n) run += load_as<T>(v + i);
        for (; i < end; ++i) sums[r] += static_cast<A>(v[i]);
        sums[r] += sum_lanes<A>(run);
      }
    }
  } else {
    for (int64_t first = 0; first < rows; first += kRun) {
      A run[kMostSums] = {};
      for (int64_t r = first; r < rows && r < first + kRun; ++r, v += stride) {
        int64_t i = 0;
        for (; i + n <= count; i += n) store(run + i, load(run + i) + load_as<T>(v + i));
        for (; i < count; ++i) run[i] += static_cast<A>(v[i]);
      }
      for (int64_t i = 0; i < count; ++i) sums[i] += run[i];
    }
  }
}

// Rows [j0, j1) of W diag(s), (n, n).
template <class T>
void weights_of_sample(const T* w, const acc_t<T>* s, T* out, int64_t n, int64_t j0, int64_t j1) {
  using A = acc_t<T>;
  for (int64_t j = j0; j < j1; ++j) {
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) store_as<T>(out + j * n + i, load_as<T>(w + j * n + i) * load(s + i));
    for (; i < n; ++i) out[j * n + i] = static_cast<T>(static_cast<A>(w[j * n + i]) * s[i]);
  }
}

// to += a b, elementwise.
template <class T>
void add_product(const acc_t<T>* a, const T* b, acc_t<T>* to, int64_t count) {
  constexpr int n = kLanes<acc_t<T>>;
  int64_t i = 0;
  for (; i + n <= count; i += n) store(to + i, load(to + i) + load(a + i) * load_as<T>(b + i));
  for (; i < count; ++i) to[i] += a[i] * static_cast<acc_t<T>>(b[i]);
}
