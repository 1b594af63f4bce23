// Nearest upsampling by 2: copies of pixels, and sums over the copies. Vector code, compiled once per instruction set,
// to be included after runs.h.

// The first half of a vector, each element twice.
template <class V, int... j>
PIXNORM_INLINE V doubled(V v, std::integer_sequence<int, j...>) {
  return __builtin_shufflevector(v, v, (j / 2)...);
}

// Elements 2 j + kOdd of two vectors.
template <int kOdd, class V, int... j>
PIXNORM_INLINE V every_other(V a, V b, std::integer_sequence<int, j...>) {
  return __builtin_shufflevector(a, b, (2 * j + kOdd)...);
}

// Rows of w pixels of which a vector has several, and w divides it: all that a vector becomes is a few shuffles.
template <int w>
struct ShortRows {
  // Quarter q of the copies of a vector of pixels.
  template <int q, class V, int... j>
  static PIXNORM_INLINE V expand(V v, std::integer_sequence<int, j...>) {
    constexpr int n = sizeof...(j);
    return __builtin_shufflevector(v, v, ((q * n + j) / (4 * w) * w + (q * n + j) % (2 * w) / 2)...);
  }
  // Sums over pairs of rows of two vectors of copies.
  template <class V, int... j>
  static PIXNORM_INLINE V add_rows(V a, V b, std::integer_sequence<int, j...>) {
    return __builtin_shufflevector(a, b, (j / (2 * w) * 4 * w + j % (2 * w))...) +
           __builtin_shufflevector(a, b, (j / (2 * w) * 4 * w + 2 * w + j % (2 * w))...);
  }
};

// Calls f(ShortRows<w>) if rows of w pixels are such.
template <class A, class F>
PIXNORM_INLINE void if_short(int64_t w, const F& f) {
  constexpr int n = kLanes<A>;
  if (w == n / 2) f(ShortRows<n / 2>{});
  if constexpr (n >= 4) {
    if (w == n / 4) f(ShortRows<n / 4>{});
  }
}

// Copies `rows` rows of width w to twice as many of width 2 w. Vectors may write beyond their row, into rows that
// follow, but not beyond the last; and read beyond it, up to `readable` elements.
template <bool kChannelsLast, class A, class From, class To>
PIXNORM_INLINE void expand(const From* from, int64_t readable, int64_t rows, int64_t w, int64_t channels, To* to) {
  using V = Vec<A>;
  constexpr int n = kLanes<A>;
  const int64_t row = w * channels;
  if constexpr (kChannelsLast) {
    for (int64_t p = 0; p < rows * w; ++p) {
      To* const top = to + (4 * (p / w) * w + 2 * (p % w)) * channels;
      const From* const pixel = from + p * channels;
      const auto copy = [&](auto value, int64_t c) __attribute__((always_inline)) {
        write(top + c, value), write(top + channels + c, value);
        write(top + 2 * row + c, value), write(top + 2 * row + channels + c, value);
      };
      int64_t c = 0;
      for (; c + n <= channels; c += n) copy(read<V>(pixel + c), c);
      for (; c < channels; ++c) copy(read<A>(pixel + c), c);
    }
  } else {
    constexpr auto kIndices = std::make_integer_sequence<int, n>{};
    To* const end = to + 4 * rows * w;
    int64_t h = 0;
    if_short<A>(w, [&](auto of) __attribute__((always_inline)) {
      using Short = decltype(of);
      for (; (h + n / w) <= rows; h += n / w) {
        const V v = read<V>(from + h * w);
        To* const target = to + 4 * h * w;
        write<V>(target, Short::template expand<0>(v, kIndices));
        write<V>(target + n, Short::template expand<1>(v, kIndices));
        write<V>(target + 2 * n, Short::template expand<2>(v, kIndices));
        write<V>(target + 3 * n, Short::template expand<3>(v, kIndices));
      }
    });
    for (; h < rows; ++h) {
      for (int copy = 0; copy < 2; ++copy) {
        const From* source = from + h * w;
        To* target = to + (2 * h + copy) * 2 * w;
        To* const row_end = target + 2 * w;
        for (; target < row_end; source += n / 2, target += n) {
          if (end - target >= n && readable - (source - from) >= n) {
            write<V>(target, doubled(read<V>(source), kIndices));
          } else {
            const int64_t rest = row_end - target < n ? row_end - target : n;
            for (int64_t i = 0; i < rest; ++i) write<A>(target + i, read<A>(source + i / 2));
          }
        }
      }
    }
  }
}

// The inverse: sums of what `get` gives at the four copies of each pixel, for `rows` rows of w pixels. `to` has room
// for one vector more.
template <bool kChannelsLast, class A, class Get>
PIXNORM_INLINE void fold(const Get& get, int64_t rows, int64_t w, int64_t channels, A* to) {
  using V = Vec<A>;
  constexpr int n = kLanes<A>;
  const int64_t row = w * channels;
  if constexpr (kChannelsLast) {
    for (int64_t p = 0; p < rows * w; ++p) {
      const int64_t top = (4 * (p / w) * w + 2 * (p % w)) * channels;
      int64_t c = top;
      A* pixel = to + p * channels;
      for (; c + n <= top + channels; c += n, pixel += n) {
        store(pixel, (get.template at<V>(c) + get.template at<V>(c + 2 * row)) +
                         (get.template at<V>(c + channels) + get.template at<V>(c + channels + 2 * row)));
      }
      for (; c < top + channels; ++c, ++pixel) {
        *pixel = (get.template at<A>(c) + get.template at<A>(c + 2 * row)) +
                 (get.template at<A>(c + channels) + get.template at<A>(c + channels + 2 * row));
      }
    }
  } else {
    constexpr auto kIndices = std::make_integer_sequence<int, n>{};
    const int64_t end = 4 * rows * w;
    const auto add_columns = [&](V a, V b) __attribute__((always_inline)) {
      return V(every_other<0>(a, b, kIndices) + every_other<1>(a, b, kIndices));
    };
    int64_t h = 0;
    if_short<A>(w, [&](auto of) __attribute__((always_inline)) {
      using Short = decltype(of);
      for (; h + n / w <= rows; h += n / w) {
        const int64_t i = 4 * h * w;
        const V a = Short::add_rows(get.template at<V>(i), get.template at<V>(i + n), kIndices);
        const V b = Short::add_rows(get.template at<V>(i + 2 * n), get.template at<V>(i + 3 * n), kIndices);
        store(to + h * w, add_columns(a, b));
      }
    });
    for (; h < rows; ++h) {
      const int64_t top = 4 * h * w, bottom = top + 2 * w;
      for (int64_t i = 0; i < w; i += n) {
        A* target = to + h * w + i;
        if (end - (bottom + 2 * i) >= 2 * n) {
          const V a = get.template at<V>(top + 2 * i) + get.template at<V>(bottom + 2 * i);
          const V b = get.template at<V>(top + 2 * i + n) + get.template at<V>(bottom + 2 * i + n);
          store(target, add_columns(a, b));
        } else {
          for (int64_t j = i; j < w && j < i + n; ++j, ++target) {
            *target = (get.template at<A>(top + 2 * j) + get.template at<A>(bottom + 2 * j)) +
                      (get.template at<A>(top + 2 * j + 1) + get.template at<A>(bottom + 2 * j + 1));
          }
        }
      }
    }
  }
}
