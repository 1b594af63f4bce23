// Vector code of modulated norm.
//
// Upsampling is a step before or after the same loops, on a band of rows in L1. Rows γ and β are constant over the four
// copies of a pixel, so y is computed at the resolution of x and copied, and dy is summed over the copies first. Maps
// are not, so x is copied first, and dx summed last.

#include "cpu/convert_kernels.h"
#include "cpu/moments_kernels.h"
#include "cpu/runs.h"
#include "cpu/upsample_kernels.h"

using modulate::Coefficients;
using modulate::Piece;

// ---- gradients of y, as fold() reads them ----

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
  PIXNORM_INLINE void at(const RowValues<V>& v, int64_t i, int64_t, V*) const {
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
  PIXNORM_INLINE void at(const RowValues<V>& v, int64_t i, int64_t, V* sums) const {
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
  PIXNORM_INLINE void at(const RowValues<V>& v, int64_t i, int64_t, V*) const {
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
  PIXNORM_INLINE void at(const MapValues<V>& v, int64_t i, int64_t, V*) const {
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
  PIXNORM_INLINE void at(const MapValues<V>& v, int64_t i, int64_t, V* sums) const {
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
  PIXNORM_INLINE void at(const MapValues<V>& v, int64_t i, int64_t, V*) const {
    const V x_hat = (read<V>(x + i) - v.mean) * v.rstd;
    write<V>(dx + i, scaled.template at<V>(i) * v.rstd - (x_hat * v.centre_x + v.centre));
  }
};

// ---- entry points: a piece of an image ----

constexpr int64_t kBandElements = 1024;  // of x: four times as many at the resolution of y

inline int64_t band_of(const ImageShape& s) { return s.row() < kBandElements ? kBandElements / s.row() : 1; }

// Elements of scratch: sums, and with upsampling a band of pixels at either resolution and vectors more.
inline int64_t scratch_of(const ImageShape& s) {
  return 2 * s.channels + (s.upsample == 2 ? 4 * band_of(s) * s.row() : 0) + 64;
}

template <class T>
PIXNORM_INLINE T* moved(T* from, int64_t by) {
  return from ? from + by : from;
}

// Calls body(coefficients, band, first channel, elements of x from the band to the piece's end) for bands, which are
// pieces of the piece: some rows of an image or a plane, or several whole planes.
template <bool kChannelsLast, class T, class Body>
PIXNORM_INLINE void for_bands(const ImageShape& s, const Coefficients<acc_t<T>>& k, const Piece<T>& piece,
                              const Body& body) {
  const int64_t rows = band_of(s), planes = rows < piece.rows ? 1 : rows / piece.rows;
  const int64_t together = kChannelsLast ? piece.channels : planes;
  const int64_t elements = piece.rows * s.w * piece.channels;
  for (int64_t c = 0; c < piece.channels; c += together) {
    const Coefficients<acc_t<T>> of_band{k.mean + c,   k.rstd + c,     k.gamma + c, k.beta + c,
                                         k.centre + c, k.centre_x + c, k.offset,    k.slope};
    for (int64_t h = 0; h < piece.rows; h += rows) {
      const int64_t at = c * piece.rows * s.w + h * s.row(), up = 4 * at;
      body(of_band,
           Piece<T>{piece.channels - c < together ? piece.channels - c : together,
                    piece.rows - h < rows ? piece.rows - h : rows, moved(piece.x, at), moved(piece.gamma, up),
                    moved(piece.beta, up), moved(piece.dy, up), moved(piece.y, up), moved(piece.dx, at),
                    moved(piece.dgamma, up), moved(piece.dbeta, up)},
           c, elements - at);
    }
  }
}

// Rows of expand() and fold(): in NCHW those of all planes.
template <bool kChannelsLast, class T>
PIXNORM_INLINE int64_t rows_of(const Piece<T>& band) {
  return kChannelsLast ? band.rows : band.channels * band.rows;
}

template <class T, bool kChannelsLast, bool kMaps>
void forward(const ImageShape& s, const Coefficients<acc_t<T>>& k, const Piece<T>& piece, acc_t<T>* scratch) {
  using A = acc_t<T>;
  if (s.upsample == 1) {
    const int64_t pixels = piece.rows * s.w;
    if constexpr (kMaps) {
      const MapForward<kChannelsLast, T, T> body{{k}, piece.x, piece.gamma, piece.beta, piece.y};
      for_run<kChannelsLast, A>(pixels, piece.channels, body);
    } else {
      const RowForward<kChannelsLast, T, T> body{{k}, piece.x, piece.y};
      for_run<kChannelsLast, A>(pixels, piece.channels, body);
    }
    return;
  }
  for_bands<kChannelsLast>(
      s, k, piece, [&](const auto& k, const auto& band, int64_t, int64_t readable) __attribute__((always_inline)) {
        const int64_t rows = rows_of<kChannelsLast>(band), pixels = band.rows * s.w;
        if constexpr (kMaps) {
          expand<kChannelsLast, A>(band.x, readable, rows, s.w, band.channels, scratch);
          const MapForward<kChannelsLast, T, A> body{{k}, scratch, band.gamma, band.beta, band.y};
          for_run<kChannelsLast, A>(4 * pixels, band.channels, body);
        } else {
          const RowForward<kChannelsLast, T, A> body{{k}, band.x, scratch};
          for_run<kChannelsLast, A>(pixels, band.channels, body);
          expand<kChannelsLast, A>(scratch, band.channels * pixels + kLanes<A>, rows, s.w, band.channels, band.y);
        }
      });
}

// Writes the sums over the piece of d and d x̂ (maps: of d γ and d γ x̂) of each channel to to[0] and to[1], where d is
// dy masked by the activation. Maps: also writes their gradients.
template <class T, bool kChannelsLast, bool kMaps>
void backward_reduce(const ImageShape& s, const Coefficients<acc_t<T>>& k, const Piece<T>& piece, acc_t<T>* scratch,
                     double* const (&to)[2]) {
  using A = acc_t<T>;
  A* const sums[2] = {scratch, scratch + piece.channels};
  A* const folded = scratch + 2 * piece.channels;
  for (int64_t c = 0; c < 2 * piece.channels; ++c) scratch[c] = 0;
  if (s.upsample == 1) {
    const int64_t pixels = piece.rows * s.w;
    if constexpr (kMaps) {
      const MapReduce<kChannelsLast, T, T> body{{k},      piece.x,      piece.gamma, piece.beta,
                                                piece.dy, piece.dgamma, piece.dbeta};
      for_run<kChannelsLast, 2>(pixels, piece.channels, sums, body);
    } else {
      const RowReduce<kChannelsLast, T, T> body{{k}, piece.x, piece.dy};
      for_run<kChannelsLast, 2>(pixels, piece.channels, sums, body);
    }
  } else {
    for_bands<kChannelsLast>(
        s, k, piece, [&](const auto& k, const auto& band, int64_t c, int64_t readable) __attribute__((always_inline)) {
          A* const of_band[2] = {sums[0] + c, sums[1] + c};
          const int64_t rows = rows_of<kChannelsLast>(band), pixels = band.rows * s.w;
          if constexpr (kMaps) {
            expand<kChannelsLast, A>(band.x, readable, rows, s.w, band.channels, folded);
            const MapReduce<kChannelsLast, T, A> body{{k},     folded,      band.gamma, band.beta,
                                                      band.dy, band.dgamma, band.dbeta};
            for_run<kChannelsLast, 2>(4 * pixels, band.channels, of_band, body);
          } else {
            fold<kChannelsLast>(Plain<T>{band.dy}, rows, s.w, band.channels, folded);
            const RowReduce<kChannelsLast, T, A> body{{k}, band.x, folded};
            for_run<kChannelsLast, 2>(pixels, band.channels, of_band, body);
          }
        });
  }
  for (int of = 0; of < 2; ++of) {
    for (int64_t c = 0; c < piece.channels; ++c) to[of][c] = sums[of][c];
  }
}

// dx, centred. Maps: after backward_reduce has written dβ.
template <class T, bool kChannelsLast, bool kMaps>
void backward_apply(const ImageShape& s, const Coefficients<acc_t<T>>& k, const Piece<T>& piece, acc_t<T>* scratch) {
  using A = acc_t<T>;
  if (s.upsample == 1) {
    const int64_t pixels = piece.rows * s.w;
    if constexpr (kMaps) {
      const Scaled<T> scaled{piece.dbeta, piece.gamma, k.offset};
      const MapApply<kChannelsLast, T, Scaled<T>> body{{k}, piece.x, scaled, piece.dx};
      for_run<kChannelsLast, A>(pixels, piece.channels, body);
    } else {
      const RowApply<kChannelsLast, T, T> body{{k}, piece.x, piece.dy, piece.dx};
      for_run<kChannelsLast, A>(pixels, piece.channels, body);
    }
    return;
  }
  for_bands<kChannelsLast>(
      s, k, piece, [&](const auto& k, const auto& band, int64_t, int64_t) __attribute__((always_inline)) {
        const int64_t rows = rows_of<kChannelsLast>(band), pixels = band.rows * s.w;
        if constexpr (kMaps) {
          fold<kChannelsLast>(Scaled<T>{band.dbeta, band.gamma, k.offset}, rows, s.w, band.channels, scratch);
          const MapApply<kChannelsLast, T, Plain<A>> body{{k}, band.x, Plain<A>{scratch}, band.dx};
          for_run<kChannelsLast, A>(pixels, band.channels, body);
        } else {
          fold<kChannelsLast>(Plain<T>{band.dy}, rows, s.w, band.channels, scratch);
          const RowApply<kChannelsLast, T, A> body{{k}, band.x, scratch, band.dx};
          for_run<kChannelsLast, A>(pixels, band.channels, body);
        }
      });
}
