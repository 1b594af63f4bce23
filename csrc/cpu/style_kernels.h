// Vector code of StyleGAN's epilogues.

#include "cpu/moments_kernels.h"
#include "cpu/runs.h"

// ---- up to the activation ----

template <class V>
struct StyleLayerValues {
  V demod, strength, bias;
};

template <bool kChannelsLast, bool kNoise, class T>
struct StyleLayer {
  style::Layer<acc_t<T>> layer;
  style::Piece<T> piece;

  template <class V>
  PIXNORM_INLINE V get(const acc_t<T>* of, int64_t c) const {
    return coefficient<V, kChannelsLast>(of, c);
  }

  template <class V>
  PIXNORM_INLINE StyleLayerValues<V> of_layer(int64_t c) const {
    StyleLayerValues<V> v{get<V>(layer.demod, c), {}, get<V>(layer.bias, c)};
    if constexpr (kNoise) v.strength = get<V>(layer.strength, c);
    return v;
  }

  template <class V>
  PIXNORM_INLINE V noise(int64_t p) const {
    return coefficient<V, !kChannelsLast>(piece.noise, p);
  }

  // u, of x.
  template <class V>
  PIXNORM_INLINE V preactivation(const StyleLayerValues<V>& v, V x, int64_t p) const {
    V u = x * v.demod + v.bias;
    if constexpr (kNoise) u += v.strength * noise<V>(p);
    return u;
  }
};

// Sums over a piece of the kSums sums of each channel, to to[of][channels], `step` apart. `scratch` holds kSums *
// channels numbers.
template <bool kChannelsLast, int kSums, class T, class Body>
PIXNORM_INLINE void sum_piece(const style::Piece<T>& piece, acc_t<T>* scratch, const Body& body, double* to,
                              int64_t step) {
  acc_t<T>* sums[kSums];
  for (int of = 0; of < kSums; ++of) sums[of] = scratch + of * piece.channels;
  for (int64_t i = 0; i < kSums * piece.channels; ++i) scratch[i] = 0;
  for_run<kChannelsLast, kSums, acc_t<T>>(piece.pixels, piece.channels, sums, body);
  for (int of = 0; of < kSums; ++of) {
    for (int64_t c = 0; c < piece.channels; ++c) to[of * step + c] = sums[of][c];
  }
}

// ---- StyleGAN 2: y = scale · v, where scale is gain · next_styles ----

template <class V>
struct EpilogueValues {
  StyleLayerValues<V> layer;
  V scale;
};

template <bool kChannelsLast, bool kNoise, class T>
struct EpilogueForward : StyleLayer<kChannelsLast, kNoise, T> {
  const acc_t<T>* scale;

  template <class V>
  PIXNORM_INLINE EpilogueValues<V> values(int64_t c) const {
    return {this->template of_layer<V>(c), this->template get<V>(scale, c)};
  }

  template <class V>
  PIXNORM_INLINE void at(const EpilogueValues<V>& values, int64_t i, int64_t p, V*) const {
    V v = this->preactivation(values.layer, read<V>(this->piece.x + i), p);
    activate(v, this->layer.slope);
    write<V>(this->piece.to + i, v * values.scale);
  }
};

// With d, the gradient of u, the sums of d x, d, dy v and d noise: those that demod, bias, next_styles and strength
// need.
template <bool kChannelsLast, bool kNoise, class T>
struct EpilogueBackward : EpilogueForward<kChannelsLast, kNoise, T> {
  template <class V>
  PIXNORM_INLINE void at(const EpilogueValues<V>& values, int64_t i, int64_t p, V* sums) const {
    const V x = read<V>(this->piece.x + i), dy = read<V>(this->piece.dy + i);
    const V u = this->preactivation(values.layer, x, p);
    V v = u, d = dy * values.scale;
    activate(v, this->layer.slope);
    activate_gradient(u, d, this->layer.slope);
    sums[0] += d * x;
    sums[1] += d;
    sums[2] += dy * v;
    if constexpr (kNoise) sums[3] += d * this->template noise<V>(p);
    write<V>(this->piece.to + i, d * values.layer.demod);
  }
};

template <class T, bool kChannelsLast, bool kNoise>
void style_epilogue_forward(const style::Layer<acc_t<T>>& layer, const acc_t<T>* scale, const style::Piece<T>& piece) {
  const EpilogueForward<kChannelsLast, kNoise, T> body{{layer, piece}, scale};
  for_run<kChannelsLast, acc_t<T>>(piece.pixels, piece.channels, body);
}

template <class T, bool kChannelsLast, bool kNoise>
void style_epilogue_backward(const style::Layer<acc_t<T>>& layer, const acc_t<T>* scale, const style::Piece<T>& piece,
                             acc_t<T>* scratch, double* to, int64_t step) {
  const EpilogueBackward<kChannelsLast, kNoise, T> body{{{layer, piece}, scale}};
  sum_piece<kChannelsLast, kNoise ? 4 : 3>(piece, scratch, body, to, step);
}

// ---- StyleGAN 1: y = scale · (v - mean) · rstd + shift ----

template <bool kChannelsLast, bool kNoise, class T>
struct StyleActivated : StyleLayer<kChannelsLast, kNoise, T> {
  acc_t<T>* to;

  template <class V>
  PIXNORM_INLINE StyleLayerValues<V> values(int64_t c) const {
    return this->template of_layer<V>(c);
  }

  template <class V>
  PIXNORM_INLINE void at(const StyleLayerValues<V>& values, int64_t i, int64_t p, V*) const {
    V v = this->preactivation(values, read<V>(this->piece.x + i), p);
    activate(v, this->layer.slope);
    write<V>(to + i, v);
  }
};

template <class V>
struct StyleNormValues {
  StyleLayerValues<V> layer;
  V mean, rstd, scale, shift, centre, centre_v;
};

// scale and rstd in one factor. The mean is subtracted first, so that no digits are lost where it is large.
template <bool kChannelsLast, bool kNoise, class T>
struct StyleNorm : StyleLayer<kChannelsLast, kNoise, T> {
  style::Norm<acc_t<T>> norm;

  template <class V>
  PIXNORM_INLINE StyleNormValues<V> values(int64_t c) const {
    const auto get = [&](const acc_t<T>* of) __attribute__((always_inline)) { return this->template get<V>(of, c); };
    const V rstd = get(norm.rstd);
    return {this->template of_layer<V>(c),
            get(norm.mean),
            rstd,
            get(norm.scale) * rstd,
            get(norm.shift),
            get(norm.centre),
            get(norm.centre_v)};
  }
};

template <bool kChannelsLast, bool kNoise, class T>
struct StyleNormForward : StyleNorm<kChannelsLast, kNoise, T> {
  template <class V>
  PIXNORM_INLINE void at(const StyleNormValues<V>& values, int64_t i, int64_t p, V*) const {
    V v = this->preactivation(values.layer, read<V>(this->piece.x + i), p);
    activate(v, this->layer.slope);
    write<V>(this->piece.to + i, (v - values.mean) * values.scale + values.shift);
  }
};

// The sums of dy and dy v̂.
template <bool kChannelsLast, bool kNoise, class T>
struct StyleNormReduce : StyleNorm<kChannelsLast, kNoise, T> {
  template <class V>
  PIXNORM_INLINE void at(const StyleNormValues<V>& values, int64_t i, int64_t p, V* sums) const {
    V v = this->preactivation(values.layer, read<V>(this->piece.x + i), p);
    activate(v, this->layer.slope);
    const V dy = read<V>(this->piece.dy + i);
    sums[0] += dy;
    sums[1] += dy * ((v - values.mean) * values.rstd);
  }
};

// dx, and its sum and that of dx noise.
template <bool kChannelsLast, bool kNoise, class T>
struct StyleNormApply : StyleNorm<kChannelsLast, kNoise, T> {
  template <class V>
  PIXNORM_INLINE void at(const StyleNormValues<V>& values, int64_t i, int64_t p, V* sums) const {
    const V u = this->preactivation(values.layer, read<V>(this->piece.x + i), p);
    V v = u;
    activate(v, this->layer.slope);
    const V v_hat = (v - values.mean) * values.rstd;
    V d = ((read<V>(this->piece.dy + i) - values.centre) - v_hat * values.centre_v) * values.scale;
    activate_gradient(u, d, this->layer.slope);
    sums[0] += d;
    if constexpr (kNoise) sums[1] += d * this->template noise<V>(p);
    write<V>(this->piece.to + i, d);
  }
};

// Moments of v, which is in scratch for as long as they take.
template <class T, bool kChannelsLast, bool kNoise>
void style_norm_moments(const style::Layer<acc_t<T>>& layer, const style::Piece<T>& piece, acc_t<T>* scratch,
                        Moments* moments) {
  using A = acc_t<T>;
  using Body = StyleActivated<kChannelsLast, kNoise, T>;
  if constexpr (kChannelsLast) {
    A* const v = scratch + 3 * piece.channels;
    const auto run = [&](int64_t first, int64_t size) __attribute__((always_inline)) {
      style::Piece<T> of_run = piece;
      of_run.x += first * piece.channels, of_run.noise += kNoise ? first : 0;
      for_run<kChannelsLast, A>(size, piece.channels, Body{{layer, of_run}, v});
      return static_cast<const A*>(v);
    };
    moments_of_runs<A>(run, piece.pixels, piece.channels, scratch, moments);
  } else {
    for_run<kChannelsLast, A>(piece.pixels, piece.channels, Body{{layer, piece}, scratch});
    moments_of_planes<A>(scratch, piece.channels, piece.pixels, moments);
  }
}

// Elements of scratch that the kernels of a piece of so many channels and pixels need.
inline int64_t style_scratch_of(bool channels_last, int64_t channels, int64_t pixels) {
  return 4 * channels + channels * (channels_last ? kMomentsRun : pixels);
}

template <class T, bool kChannelsLast, bool kNoise>
void style_norm_forward(const style::Layer<acc_t<T>>& layer, const style::Norm<acc_t<T>>& norm,
                        const style::Piece<T>& piece) {
  const StyleNormForward<kChannelsLast, kNoise, T> body{{{layer, piece}, norm}};
  for_run<kChannelsLast, acc_t<T>>(piece.pixels, piece.channels, body);
}

template <class T, bool kChannelsLast, bool kNoise>
void style_norm_reduce(const style::Layer<acc_t<T>>& layer, const style::Norm<acc_t<T>>& norm,
                       const style::Piece<T>& piece, acc_t<T>* scratch, double* to, int64_t step) {
  const StyleNormReduce<kChannelsLast, kNoise, T> body{{{layer, piece}, norm}};
  sum_piece<kChannelsLast, 2>(piece, scratch, body, to, step);
}

template <class T, bool kChannelsLast, bool kNoise>
void style_norm_apply(const style::Layer<acc_t<T>>& layer, const style::Norm<acc_t<T>>& norm,
                      const style::Piece<T>& piece, acc_t<T>* scratch, double* to, int64_t step) {
  const StyleNormApply<kChannelsLast, kNoise, T> body{{{layer, piece}, norm}};
  sum_piece<kChannelsLast, kNoise ? 2 : 1>(piece, scratch, body, to, step);
}
