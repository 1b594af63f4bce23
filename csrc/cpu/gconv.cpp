// GConv's mixing on the CPU: y = u + W (s u) + b, and its gradients; the algebra is in pixnorm/ops/gconv.py.
//
// Images are processed in chunks that stay in cache from pass to pass. With at least as many pixels as channels, each
// sample gets its own weight W diag(s), and y is u plus one product. With fewer pixels that weight would be larger than
// u; then s u is formed instead, and multiplied by W (in channels_last, in one product for all samples).

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/gemm.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "dispatch.h"

#define PIXNORM_VECTOR_CODE "cpu/gconv_kernels.h"
#include "cpu/foreach_isa.h"

namespace pixnorm::gconv {
namespace {

struct Shape {
  int64_t images, n, pixels;
  bool channels_last;

  int64_t image() const { return n * pixels; }
  bool weights_of_samples() const { return pixels >= n; }

  // So that weights stay in cache, too.
  int64_t images_per_chunk(size_t element) const {
    const int64_t weights = weights_of_samples() ? 2 * n * n : 0;
    return pixnorm::images_per_chunk(images, std::max(image(), weights), element);
  }
};

Shape shape_of(const Tensor& u) {
  STD_TORCH_CHECK(u.dim() == 4, "pixnorm: u must have 4 dimensions");
  const int64_t pixels = u.size(2) * u.size(3);
  // One-pixel planes are dense in both formats; channels_last needs only one product for all samples.
  return {u.size(0), u.size(1), pixels, pixels == 1 || layout_of(u) == MemoryFormat::ChannelsLast};
}

constexpr int64_t kChannels = baseline::kMostSums;  // per piece in channels_last: a cache line or two

// Some channels of an image, as a matrix: rows are channels in NCHW, pixels in channels_last.
struct Piece {
  int64_t image, channel, rows, columns;
  int64_t at, stride;
};

// Calls f(piece) for all pieces of some images, in parallel.
template <class F>
void for_pieces(const Shape& s, int64_t images, const F& f) {
  constexpr int64_t kElements = 1 << 13;
  const int64_t channels = s.channels_last ? kChannels : std::clamp<int64_t>(kElements / s.pixels, 1, s.n);
  const int64_t pieces = ceil_div(s.n, channels);
  const int64_t grain = ceil_div(kElements, channels * s.pixels);
  parallel_for(0, images * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / pieces, channel = i % pieces * channels, count = std::min(channels, s.n - channel);
      if (s.channels_last) {
        f(Piece{image, channel, s.pixels, count, image * s.image() + channel, s.n});
      } else {
        f(Piece{image, channel, count, s.pixels, image * s.image() + channel * s.pixels, s.pixels});
      }
    }
  });
}

#define PIXNORM_BY_LAYOUT(function, ...) \
  (s.channels_last ? PIXNORM_BY_ISA(function<T, false>)(__VA_ARGS__) : PIXNORM_BY_ISA(function<T, true>)(__VA_ARGS__))

// W diag(s) per image, (images, n, n).
template <class T>
void make_weights(const Shape& s, int64_t images, const T* w, const acc_t<T>* scales, T* out) {
  constexpr int64_t kRows = 32;
  const int64_t pieces = ceil_div(s.n, kRows);
  parallel_for(0, images * pieces, ceil_div(1 << 13, kRows * s.n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / pieces, j = i % pieces * kRows;
      PIXNORM_BY_ISA(weights_of_sample<T>)(w, scales + image * s.n, out + image * s.n * s.n, s.n, j,
                                           std::min(j + kRows, s.n));
    }
  });
}

// A matrix per image (or per run of its pixels): (n, pixels) in NCHW, (pixels, n) in channels_last.
template <class T>
Matrices<T> by_image(const Shape& s, int64_t images, T* data, int64_t first, int64_t pixels) {
  if (s.channels_last) return {data + first * s.n, images, pixels, s.n, s.image(), s.n, 1};
  return {data + first, images, s.n, pixels, s.image(), s.pixels, 1};
}

template <class T>
Matrices<T> by_image(const Shape& s, int64_t images, T* data) {
  return by_image(s, images, data, 0, s.pixels);
}

// All images in as few matrices as possible: one in channels_last.
template <class T>
Matrices<T> together(const Shape& s, int64_t images, T* data) {
  return matrices_of(data, images, s.n, s.pixels, s.channels_last);
}

// out = M in, plus a matrix like it and a number per channel (each may be null).
template <class T>
void multiply(const Shape& s, const Matrices<T>& out, const Matrices<const T>& m, const Matrices<const T>& in,
              const T* addend = nullptr, const acc_t<T>* bias = nullptr) {
  s.channels_last ? gemm<T, T>(out, in, m.transposed(), {addend, nullptr, bias})
                  : gemm<T, T>(out, m, in, {addend, bias, nullptr});
}

// out = left rightᵀ, reduced over pixels.
template <class T>
void multiply_transposed(const Shape& s, const Matrices<acc_t<T>>& out, const Matrices<const T>& left,
                         const Matrices<const T>& right) {
  s.channels_last ? gemm(out, left.transposed(), right) : gemm(out, left, right.transposed());
}

// An (n, n) matrix per image.
template <class T>
Matrices<const T> squares(const Shape& s, const T* data, int64_t images) {
  return {data, images, s.n, s.n, s.n * s.n, s.n, 1};
}

// W, or its transpose, as it multiplies all pixels; nothing where samples have weights of their own.
template <class T>
std::optional<PackedMatrix<T, T>> weight_of_all(const Shape& s, const T* w, bool transposed) {
  if (s.weights_of_samples()) return std::nullopt;
  const Matrices<const T> matrix{w, 1, s.n, s.n, 0, s.n, 1};
  return std::make_optional<PackedMatrix<T, T>>(transposed == s.channels_last ? matrix : matrix.transposed(),
                                                !s.channels_last);
}

template <class T>
void forward(const Shape& s, const T* u, const std::vector<acc_t<T>>& scales, const T* w,
             const std::vector<acc_t<T>>& bias, T* y) {
  using A = acc_t<T>;
  const int64_t per_chunk = s.images_per_chunk(sizeof(T));
  const A* const b = bias.empty() ? nullptr : bias.data();
  const auto weight = weight_of_all(s, w, false);
  for_large_items(ceil_div(s.images, per_chunk), [&](int64_t begin, int64_t end) {
    const Buffer<T> scratch(per_chunk * (s.weights_of_samples() ? s.n * s.n : s.image()));
    for (int64_t first = begin * per_chunk; first < std::min(end * per_chunk, s.images); first += per_chunk) {
      const int64_t images = std::min(per_chunk, s.images - first);
      const T* const in = u + first * s.image();
      T* const out = y + first * s.image();
      const A* const scale_of = scales.data() + first * s.n;
      if (s.weights_of_samples()) {
        make_weights(s, images, w, scale_of, scratch.data());
        multiply<T>(s, by_image(s, images, out), squares<T>(s, scratch.data(), images), by_image(s, images, in), in, b);
      } else {
        for_pieces(s, images, [&](const Piece& p) {
          PIXNORM_BY_LAYOUT(scale, in + p.at, scale_of + p.image * s.n + p.channel, scratch.data() + p.at, p.rows,
                            p.columns, p.stride);
        });
        weight->multiply(together(s, images, out), together<const T>(s, images, scratch.data()),
                         s.channels_last ? Addends<T>{in, nullptr, b} : Addends<T>{in, b, nullptr});
      }
    }
  });
}

template <class A>
struct Gradients {
  std::vector<A> scales, w;
  std::vector<double> bias;
};

// From G = dY Uᵀ per image, (images, n, n): dW += G diag(s), and ds = column sums of G ⊙ W.
template <class T, class A>
void reduce_weights(const Shape& s, int64_t images, const A* g, const T* w, const A* scales, A* dw, A* d_scales) {
  const int64_t of_image = s.n * s.n;
  parallel_for(0, s.n, ceil_div(1 << 13, images * s.n), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t image = 0; image < images; ++image) {
        PIXNORM_BY_ISA(add_product<A>)(g + image * of_image + j * s.n, scales + image * s.n, dw + j * s.n, s.n);
      }
    }
  });
  constexpr int64_t kColumns = 32;
  const int64_t pieces = ceil_div(s.n, kColumns);
  std::fill_n(d_scales, images * s.n, A(0));
  parallel_for(0, images * pieces, ceil_div(1 << 13, kColumns * s.n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / pieces, c = i % pieces * kColumns, count = std::min(kColumns, s.n - c);
      for (int64_t j = 0; j < s.n; ++j) {
        PIXNORM_BY_ISA(add_product<T>)(g + image * of_image + j * s.n + c, w + j * s.n + c, d_scales + image * s.n + c,
                                       count);
      }
    }
  });
}

// G = dY Uᵀ per image, (images, n, n). Long sums over pixels lose digits in float32, so runs are accumulated in double.
template <class T>
void gradients_of_weights(const Shape& s, int64_t images, const T* dy, const T* u, acc_t<T>* g) {
  using A = acc_t<T>;
  constexpr int64_t kRun = 1 << 10;
  const int64_t count = images * s.n * s.n;
  const Buffer<double> sums(s.pixels > kRun ? count : 0);
  for (int64_t pixel = 0; pixel < s.pixels; pixel += kRun) {
    const int64_t pixels = std::min(kRun, s.pixels - pixel);
    const auto left = by_image(s, images, dy, pixel, pixels), right = by_image(s, images, u, pixel, pixels);
    const Matrices<A> out{g, images, s.n, s.n, s.n * s.n, s.n, 1};
    multiply_transposed<T>(s, out, left, right);
    if (s.pixels <= kRun) return;
    for_elements(count, [&](int64_t i, int64_t end) {
      for (; i < end; ++i) sums[i] = (pixel == 0 ? 0 : sums[i]) + g[i];
    });
  }
  for_elements(count, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) g[i] = static_cast<A>(sums[i]);
  });
}

template <class T>
void backward(const Shape& s, const T* grad_y, const T* u, const std::vector<acc_t<T>>& scales, const T* w, T* grad_u,
              Gradients<acc_t<T>>& gradients) {
  using A = acc_t<T>;
  // Runs of chunks are given to threads, and each adds up its part of dW and db; there are not so many that the parts
  // are larger than u.
  constexpr int64_t kMostRuns = 16;
  const int64_t per_chunk = s.images_per_chunk(sizeof(A)), chunks = ceil_div(s.images, per_chunk);
  const int64_t runs = std::clamp<int64_t>(s.images * s.pixels / s.n, 1, std::min(chunks, kMostRuns));
  const int64_t of_weight = s.n * s.n, of_bias = gradients.bias.size();
  std::vector<A> parts((runs - 1) * of_weight);
  std::vector<double> bias_parts((runs - 1) * of_bias);
  const auto weight = weight_of_all(s, w, true);
  for_large_items(runs, [&](int64_t begin, int64_t end) {
    const Buffer<A> g(s.weights_of_samples() ? per_chunk * of_weight : 0);
    const Buffer<T> scratch(per_chunk * (s.weights_of_samples() ? of_weight : s.image()));
    const Buffer<T> scaled(s.weights_of_samples() ? 0 : per_chunk * s.image());
    for (int64_t run = begin; run < end; ++run) {
      A* const dw = run == 0 ? gradients.w.data() : parts.data() + (run - 1) * of_weight;
      double* const db = run == 0 ? gradients.bias.data() : bias_parts.data() + (run - 1) * of_bias;
      const int64_t last = std::min(chunks * (run + 1) / runs * per_chunk, s.images);
      for (int64_t first = chunks * run / runs * per_chunk; first < last; first += per_chunk) {
        const int64_t images = std::min(per_chunk, last - first);
        const T* const in = u + first * s.image();
        const T* const dy = grad_y + first * s.image();
        T* const du = grad_u + first * s.image();
        const A* const scale_of = scales.data() + first * s.n;
        A* const d_scales = gradients.scales.data() + first * s.n;
        if (s.weights_of_samples()) {
          gradients_of_weights(s, images, dy, in, g.data());
          reduce_weights(s, images, g.data(), w, scale_of, dw, d_scales);
          make_weights(s, images, w, scale_of, scratch.data());
          multiply<T>(s, by_image(s, images, du), squares<T>(s, scratch.data(), images).transposed(),
                      by_image(s, images, dy), dy);
        } else {
          const auto left = together(s, images, dy), right = together<const T>(s, images, scaled.data());
          weight->multiply(together(s, images, scratch.data()), left);
          for_pieces(s, images, [&](const Piece& p) {
            const int64_t of_channel = p.image * s.n + p.channel;
            PIXNORM_BY_LAYOUT(scale_backward, in + p.at, dy + p.at, scratch.data() + p.at, scale_of + of_channel,
                              du + p.at, scaled.data() + p.at, d_scales + of_channel, p.rows, p.columns, p.stride);
          });
          const Matrices<A> sum{dw, 1, s.n, s.n, 0, s.n, 1};
          s.channels_last ? gemm_sum<T>(sum, left.transposed(), right, true)
                          : gemm_sum<T>(sum, left, right.transposed(), true);
        }
        // Images in turn, so that each sum belongs to one thread.
        for (int64_t i = 0; i < (of_bias ? images : 0); ++i) {
          for_pieces(s, 1, [&](const Piece& p) {
            PIXNORM_BY_LAYOUT(add_sums, dy + i * s.image() + p.at, db + p.channel, p.rows, p.columns, p.stride);
          });
        }
      }
    }
  });
  add_matrices<A>({gradients.w.data(), 1, s.n, s.n, 0, s.n, 1}, parts.data(), runs - 1);
  for (int64_t i = 0; i < (runs - 1) * of_bias; ++i) gradients.bias[i % of_bias] += bias_parts[i];
}

void check(const Shape& s, const Tensor& u, const Tensor& scales, const Tensor& mix_weight) {
  check_sizes(scales, "s", {s.images, s.n});
  check_sizes(mix_weight, "mix_weight", {s.n, s.n});
  check_same_dtype(scales, "s", u);
  check_same_dtype(mix_weight, "mix_weight", u);
}

Tensor gconv_mix_fwd(const Tensor& u, const Tensor& scales, const Tensor& mix_weight, const std::optional<Tensor>& bias,
                     bool) {
  const Shape s = shape_of(u);
  check(s, u, scales, mix_weight);
  if (bias) {
    check_sizes(*bias, "bias", {s.n});
    check_same_dtype(*bias, "bias", u);
  }
  const MemoryFormat layout = layout_of(u);
  const Tensor y = empty({s.images, s.n, u.size(2), u.size(3)}, u.scalar_type(), layout);
  if (u.numel() == 0) return y;
  const Tensor u_dense = dense(u, layout);
  const Tensor w = dense(mix_weight);
  dispatch_floating(u.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    forward<T>(s, data_of<T>(u_dense), to_vector<A>(scales), data_of<T>(w),
               bias ? to_vector<A>(*bias) : std::vector<A>{}, static_cast<T*>(y.data_ptr()));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gconv_mix_bwd(const Tensor& grad_y, const Tensor& u, const Tensor& scales,
                                                         const Tensor& mix_weight, bool has_bias, bool) {
  const Shape s = shape_of(u);
  check(s, u, scales, mix_weight);
  check_sizes(grad_y, "grad_y", {s.images, s.n, u.size(2), u.size(3)});
  check_same_dtype(grad_y, "grad_y", u);
  const MemoryFormat layout = layout_of(u);
  const Tensor grad_u = empty({s.images, s.n, u.size(2), u.size(3)}, u.scalar_type(), layout);
  const Tensor u_dense = dense(u, layout), dy_dense = dense(grad_y, layout), w = dense(mix_weight);
  return dispatch_floating(u.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    Gradients<A> gradients{std::vector<A>(s.images * s.n), std::vector<A>(s.n * s.n),
                           std::vector<double>(has_bias ? s.n : 0)};
    if (u.numel() > 0) {
      backward<T>(s, data_of<T>(dy_dense), data_of<T>(u_dense), to_vector<A>(scales), data_of<T>(w),
                  static_cast<T*>(grad_u.data_ptr()), gradients);
    }
    const auto tensor = [&](const auto& v, std::initializer_list<int64_t> sizes) {
      const Tensor t = empty(sizes, dtype_of<T>);
      copy_to(v, t);
      return t;
    };
    return {grad_u, tensor(gradients.scales, {s.images, s.n}), tensor(gradients.w, {s.n, s.n}),
            tensor(gradients.bias, {static_cast<int64_t>(gradients.bias.size())})};
  });
}

}  // namespace
}  // namespace pixnorm::gconv

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) {
  m.impl("gconv_mix_fwd", TORCH_BOX(&pixnorm::gconv::gconv_mix_fwd));
  m.impl("gconv_mix_bwd", TORCH_BOX(&pixnorm::gconv::gconv_mix_bwd));
}
