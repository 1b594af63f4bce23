// Vector code of modulated norm. Vectors run over contiguous memory in both layouts: over the pixels of a plane in
// NCHW, where coefficients are broadcast, and over the channels of a pixel in channels_last.
//
// Upsampling is a step before or after the same loops, on a band of rows in L1. Rows γ and β are constant over the four
// copies of a pixel, so y is computed at the resolution of x and copied, and dy is summed over the copies first. Maps
// are not, so x is copied first, and dx summed last.

#include "cpu/convert_kernels.h"
#include "cpu/moments_kernels.h"

using modulate::Coefficients;
using modulate::Rows;
using modulate::Shape;

// ---- vectors and, for remainders, scalars: V is Vec<A> or A ----

template <class V, class T>
PIXNORM_INLINE V read(const T* from) {
  if constexpr (std::is_arithmetic_v<V>) {
    return static_cast<V>(*from);
  } else {
    return load_as<T>(from);
  }
}

template <class V, class T>
PIXNORM_INLINE void write(T* to, V value) {
  if constexpr (std::is_arithmetic_v<V>) {
    *to = static_cast<T>(value);
  } else {
    store_as<T>(to, value);
  }
}

template <class V, bool kChannelsLast, class A>
PIXNORM_INLINE V coefficient(const A* of, int64_t c) {
  if constexpr (kChannelsLast || std::is_arithmetic_v<V>) {
    return read<V>(of + c);
  } else {
    return broadcast<A>(*of);
  }
}

// Visits the elements of a run of pixels: values<V>(c) gives the coefficients of channels from c on, at(values, i,
// sums) processes the elements from i on and adds to two sums. Sums are those of each channel, [2][channels]; they are
// added in a fixed order.
template <bool kChannelsLast, bool kSums, class A, class Body>
PIXNORM_INLINE void for_run(int64_t pixels, int64_t channels, A* sums, const Body& body) {
  using V = Vec<A>;
  constexpr int n = kLanes<A>, kWays = 4;
  if constexpr (kChannelsLast) {
    int64_t p = 0;
    const auto visit = [&](auto ways) __attribute__((always_inline)) {
      constexpr int kPixels = decltype(ways)::value;
      int64_t c = 0;
      for (; c + n <= channels; c += n) {
        const auto values = body.template values<V>(c);
        V sum[2] = {};
#pragma GCC unroll 4
        for (int i = 0; i < kPixels; ++i) body.at(values, (p + i) * channels + c, sum);
        if constexpr (kSums) {
          store(sums + c, load(sums + c) + sum[0]);
          store(sums + channels + c, load(sums + channels + c) + sum[1]);
        }
      }
      for (; c < channels; ++c) {
        const auto values = body.template values<A>(c);
        A sum[2] = {};
        for (int i = 0; i < kPixels; ++i) body.at(values, (p + i) * channels + c, sum);
        if constexpr (kSums) {
          sums[c] += sum[0];
          sums[channels + c] += sum[1];
        }
      }
    };
    for (; p + kWays <= pixels; p += kWays) visit(std::integral_constant<int, kWays>{});
    for (; p < pixels; ++p) visit(std::integral_constant<int, 1>{});
  } else {
    const auto values = body.template values<V>(0);
    V sum[kWays][2] = {};
    int64_t i = 0;
    for (; i + kWays * n <= pixels; i += kWays * n) {
#pragma GCC unroll 4
      for (int way = 0; way < kWays; ++way) body.at(values, i + way * n, sum[way]);
    }
    for (; i + n <= pixels; i += n) body.at(values, i, sum[0]);
    A tail[2] = {};
    if (i < pixels) {
      const auto scalars = body.template values<A>(0);
      for (; i < pixels; ++i) body.at(scalars, i, tail);
    }
    if constexpr (kSums) {
      for (int of = 0; of < 2; ++of) {
        sums[of] += sum_lanes<A>((sum[0][of] + sum[1][of]) + (sum[2][of] + sum[3][of])) + tail[of];
      }
    }
  }
}

// ---- nearest upsampling: copies of pixels, and sums over the copies ----

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
    for (int64_t h = 0; h < rows; ++h) {
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
    for (int64_t h = 0; h < rows; ++h) {
      const int64_t top = 4 * h * w, bottom = top + 2 * w;
      for (int64_t i = 0; i < w; i += n) {
        A* target = to + h * w + i;
        if (end - (bottom + 2 * i) >= 2 * n) {
          const V a = get.template at<V>(top + 2 * i) + get.template at<V>(bottom + 2 * i);
          const V b = get.template at<V>(top + 2 * i + n) + get.template at<V>(bottom + 2 * i + n);
          store(target, V(every_other<0>(a, b, kIndices) + every_other<1>(a, b, kIndices)));
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

template <class T>
struct Plain {
  const T* from;
  template <class V>
  PIXNORM_INLINE V at(int64_t i) const {
    return read<V>(from + i);
  }
};

// dy γ, from dβ: dy masked by the activation.
template <class T>
struct Scaled {
  const T *dbeta, *gamma;
  acc_t<T> offset;
  template <class V>
  PIXNORM_INLINE V at(int64_t i) const {
    return read<V>(dbeta + i) * (read<V>(gamma + i) + offset);
  }
};

// ---- rows γ and β ----

// rstd and γ in one factor. The mean is subtracted first, so that no digits are lost where it is large.
template <class V>
struct RowValues {
  V mean, rstd, scale, shift, centre, centre_x;
};

template <bool kChannelsLast, class A>
struct RowBody {
  Coefficients<A> k;

  template <class V>
  PIXNORM_INLINE RowValues<V> values(int64_t c) const {
    const auto get = [&](const A* of) __attribute__((always_inline)) { return coefficient<V, kChannelsLast>(of, c); };
    const V rstd = get(k.rstd);
    return {get(k.mean), rstd, get(k.gamma) * rstd, get(k.beta), get(k.centre), get(k.centre_x)};
  }
};

template <bool kChannelsLast, class T, class Y>
struct RowForward : RowBody<kChannelsLast, acc_t<T>> {
  const T* x;
  Y* y;
  template <class V>
  PIXNORM_INLINE void at(const RowValues<V>& v, int64_t i, V (&)[2]) const {
    V value = (read<V>(x + i) - v.mean) * v.scale + v.shift;
    activate(value, this->k.slope);
    write<V>(y + i, value);
  }
};

template <bool kChannelsLast, class T, class DY>
struct RowReduce : RowBody<kChannelsLast, acc_t<T>> {
  const T* x;
  const DY* dy;
  template <class V>
  PIXNORM_INLINE void at(const RowValues<V>& v, int64_t i, V (&sums)[2]) const {
    const V deviation = read<V>(x + i) - v.mean;
    V d = read<V>(dy + i);
    activate_gradient(V(deviation * v.scale + v.shift), d, this->k.slope);
    sums[0] += d;
    sums[1] += d * (deviation * v.rstd);
  }
};

template <bool kChannelsLast, class T, class DY>
struct RowApply : RowBody<kChannelsLast, acc_t<T>> {
  const T* x;
  const DY* dy;
  T* dx;
  template <class V>
  PIXNORM_INLINE void at(const RowValues<V>& v, int64_t i, V (&)[2]) const {
    const V deviation = read<V>(x + i) - v.mean;
    V d = read<V>(dy + i);
    activate_gradient(V(deviation * v.scale + v.shift), d, this->k.slope);
    write<V>(dx + i, d * v.scale - (deviation * v.rstd * v.centre_x + v.centre));
  }
};

// ---- maps γ and β ----

template <class V>
struct MapValues {
  V mean, rstd, centre, centre_x;
};

template <bool kChannelsLast, class A>
struct MapBody {
  Coefficients<A> k;

  template <class V>
  PIXNORM_INLINE MapValues<V> values(int64_t c) const {
    const auto get = [&](const A* of) __attribute__((always_inline)) { return coefficient<V, kChannelsLast>(of, c); };
    return {get(k.mean), get(k.rstd), get(k.centre), get(k.centre_x)};
  }
};

template <bool kChannelsLast, class T, class X>
struct MapForward : MapBody<kChannelsLast, acc_t<T>> {
  const X* x;
  const T *gamma, *beta;
  T* y;
  template <class V>
  PIXNORM_INLINE void at(const MapValues<V>& v, int64_t i, V (&)[2]) const {
    const V x_hat = (read<V>(x + i) - v.mean) * v.rstd;
    V value = (read<V>(gamma + i) + this->k.offset) * x_hat + read<V>(beta + i);
    activate(value, this->k.slope);
    write<V>(y + i, value);
  }
};

template <bool kChannelsLast, class T, class X>
struct MapReduce : MapBody<kChannelsLast, acc_t<T>> {
  const X* x;
  const T *gamma, *beta, *dy;
  T *dgamma, *dbeta;
  template <class V>
  PIXNORM_INLINE void at(const MapValues<V>& v, int64_t i, V (&sums)[2]) const {
    const V x_hat = (read<V>(x + i) - v.mean) * v.rstd, scale = read<V>(gamma + i) + this->k.offset;
    V d = read<V>(dy + i);
    activate_gradient(V(scale * x_hat + read<V>(beta + i)), d, this->k.slope);
    write<V>(dbeta + i, d);
    write<V>(dgamma + i, d * x_hat);
    const V scaled = d * scale;
    sums[0] += scaled;
    sums[1] += scaled * x_hat;
  }
};

// `scaled` is dy γ.
template <bool kChannelsLast, class T, class Get>
struct MapApply : MapBody<kChannelsLast, acc_t<T>> {
  const T* x;
  Get scaled;
  T* dx;
  template <class V>
  PIXNORM_INLINE void at(const MapValues<V>& v, int64_t i, V (&)[2]) const {
    const V x_hat = (read<V>(x + i) - v.mean) * v.rstd;
    write<V>(dx + i, scaled.template at<V>(i) * v.rstd - (x_hat * v.centre_x + v.centre));
  }
};

// ---- entry points: some rows of an image ----

constexpr int64_t kBandElements = 1024;  // of x: four times as many at the resolution of y

inline int64_t band_of(const Shape& s) { return s.row() < kBandElements ? kBandElements / s.row() : 1; }

// Elements of scratch: sums, and with upsampling a band of pixels at either resolution and one vector more.
inline int64_t scratch_of(const Shape& s) {
  return 2 * s.channels + (s.upsample == 2 ? 4 * band_of(s) * s.row() : 0) + 64;
}

// Calls body(first row, rows) for bands of rows.
template <class T, class Body>
PIXNORM_INLINE void for_bands(const Shape& s, const Rows<T>& rows, const Body& body) {
  const int64_t band = band_of(s);
  for (int64_t h = rows.h0; h < rows.h1; h += band) body(h, rows.h1 - h < band ? rows.h1 - h : band);
}

template <class T, bool kChannelsLast, bool kMaps>
void forward(const Shape& s, const Coefficients<acc_t<T>>& k, const Rows<T>& rows, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const int64_t row = s.row();
  A* const none = nullptr;
  if (s.upsample == 1) {
    const int64_t at = rows.h0 * row, pixels = (rows.h1 - rows.h0) * s.w;
    if constexpr (kMaps) {
      const MapForward<kChannelsLast, T, T> body{{k}, rows.x + at, rows.gamma + at, rows.beta + at, rows.y + at};
      for_run<kChannelsLast, false>(pixels, s.channels, none, body);
    } else {
      const RowForward<kChannelsLast, T, T> body{{k}, rows.x + at, rows.y + at};
      for_run<kChannelsLast, false>(pixels, s.channels, none, body);
    }
    return;
  }
  for_bands(s, rows, [&](int64_t h, int64_t count) __attribute__((always_inline)) {
    const T* x = rows.x + h * row;
    const int64_t up = 4 * h * row;
    if constexpr (kMaps) {
      expand<kChannelsLast, A>(x, (rows.h1 - h) * row, count, s.w, s.channels, scratch);
      const MapForward<kChannelsLast, T, A> body{{k}, scratch, rows.gamma + up, rows.beta + up, rows.y + up};
      for_run<kChannelsLast, false>(4 * count * s.w, s.channels, none, body);
    } else {
      const RowForward<kChannelsLast, T, A> body{{k}, x, scratch};
      for_run<kChannelsLast, false>(count * s.w, s.channels, none, body);
      expand<kChannelsLast, A>(scratch, count * row + kLanes<A>, count, s.w, s.channels, rows.y + up);
    }
  });
}

// Writes the sums over these rows of d and d x̂ (maps: of d γ and d γ x̂) of each channel, [2][channels], where d is dy
// masked by the activation. Maps: also writes their gradients.
template <class T, bool kChannelsLast, bool kMaps>
void backward_reduce(const Shape& s, const Coefficients<acc_t<T>>& k, const Rows<T>& rows, acc_t<T>* scratch,
                     double* to) {
  using A = acc_t<T>;
  const int64_t row = s.row();
  A *const sums = scratch, *const band = scratch + 2 * s.channels;
  for (int64_t c = 0; c < 2 * s.channels; ++c) sums[c] = 0;
  if (s.upsample == 1) {
    const int64_t at = rows.h0 * row, pixels = (rows.h1 - rows.h0) * s.w;
    if constexpr (kMaps) {
      const MapReduce<kChannelsLast, T, T> body{{k},          rows.x + at,      rows.gamma + at, rows.beta + at,
                                                rows.dy + at, rows.dgamma + at, rows.dbeta + at};
      for_run<kChannelsLast, true>(pixels, s.channels, sums, body);
    } else {
      const RowReduce<kChannelsLast, T, T> body{{k}, rows.x + at, rows.dy + at};
      for_run<kChannelsLast, true>(pixels, s.channels, sums, body);
    }
  } else {
    for_bands(s, rows, [&](int64_t h, int64_t count) __attribute__((always_inline)) {
      const T* x = rows.x + h * row;
      const int64_t up = 4 * h * row;
      if constexpr (kMaps) {
        expand<kChannelsLast, A>(x, (rows.h1 - h) * row, count, s.w, s.channels, band);
        const MapReduce<kChannelsLast, T, A> body{
            {k}, band, rows.gamma + up, rows.beta + up, rows.dy + up, rows.dgamma + up, rows.dbeta + up};
        for_run<kChannelsLast, true>(4 * count * s.w, s.channels, sums, body);
      } else {
        fold<kChannelsLast>(Plain<T>{rows.dy + up}, count, s.w, s.channels, band);
        const RowReduce<kChannelsLast, T, A> body{{k}, x, band};
        for_run<kChannelsLast, true>(count * s.w, s.channels, sums, body);
      }
    });
  }
  for (int64_t c = 0; c < 2 * s.channels; ++c) to[c] = sums[c];
}

// dx, centred. Maps: after backward_reduce has written dβ.
template <class T, bool kChannelsLast, bool kMaps>
void backward_apply(const Shape& s, const Coefficients<acc_t<T>>& k, const Rows<T>& rows, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const int64_t row = s.row();
  A* const none = nullptr;
  if (s.upsample == 1) {
    const int64_t at = rows.h0 * row, pixels = (rows.h1 - rows.h0) * s.w;
    if constexpr (kMaps) {
      const Scaled<T> scaled{rows.dbeta + at, rows.gamma + at, k.offset};
      const MapApply<kChannelsLast, T, Scaled<T>> body{{k}, rows.x + at, scaled, rows.dx + at};
      for_run<kChannelsLast, false>(pixels, s.channels, none, body);
    } else {
      const RowApply<kChannelsLast, T, T> body{{k}, rows.x + at, rows.dy + at, rows.dx + at};
      for_run<kChannelsLast, false>(pixels, s.channels, none, body);
    }
    return;
  }
  for_bands(s, rows, [&](int64_t h, int64_t count) __attribute__((always_inline)) {
    const int64_t at = h * row, up = 4 * at;
    if constexpr (kMaps) {
      fold<kChannelsLast>(Scaled<T>{rows.dbeta + up, rows.gamma + up, k.offset}, count, s.w, s.channels, scratch);
      const MapApply<kChannelsLast, T, Plain<A>> body{{k}, rows.x + at, Plain<A>{scratch}, rows.dx + at};
      for_run<kChannelsLast, false>(count * s.w, s.channels, none, body);
    } else {
      fold<kChannelsLast>(Plain<T>{rows.dy + up}, count, s.w, s.channels, scratch);
      const RowApply<kChannelsLast, T, A> body{{k}, rows.x + at, scratch, rows.dx + at};
      for_run<kChannelsLast, false>(count * s.w, s.channels, none, body);
    }
  });
}
