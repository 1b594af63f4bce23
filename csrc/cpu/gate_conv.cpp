// The convolution of CBAM's spatial gate on the CPU, 2 channels to 1. oneDNN takes several times as long for so few
// channels, and its bits depend on the number of threads. gate_conv_kernels.h has the arithmetic.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "dispatch.h"

#define PIXNORM_VECTOR_CODE "cpu/gate_conv_kernels.h"
#include "cpu/foreach_isa.h"

namespace pixnorm::gate {
namespace {

// Images are cut into bands of rows, by shape alone; each is copied between zeros.
struct Convolution {
  static constexpr int64_t kRows = 16;

  int64_t n, h, w, kh, kw, bands, pitch;

  Convolution(const Tensor& pooled, const Tensor& weight) {
    STD_TORCH_CHECK(pooled.dim() == 4 && weight.dim() == 4, "pixnorm: expected 4-D tensors");
    n = pooled.size(0), h = pooled.size(2), w = pooled.size(3);
    kh = weight.size(2), kw = weight.size(3);
    STD_TORCH_CHECK(kh % 2 == 1 && kw % 2 == 1, "pixnorm: expected an odd kernel");
    check_sizes(weight, "weight", {1, 2, kh, kw});
    check_sizes(pooled, "pooled", {n, 2, h, w});
    check_same_dtype(weight, "weight", pooled);
    STD_TORCH_CHECK(h * w > 0, "pixnorm: expected at least one pixel");
    bands = ceil_div(h, kRows);
    constexpr int64_t kLongest = 64;  // elements that a kernel takes at a time
    pitch = ceil_div(w, kLongest) * kLongest + kw;
  }

  int64_t rows(int64_t band) const { return std::min(kRows, h - band * kRows); }
  int64_t padded_size(int64_t channels) const { return channels * (kRows + kh - 1) * pitch; }

  // Rows of a band and those around it, of all channels of an image.
  template <class A>
  void pad(const A* image, int64_t channels, int64_t band, int64_t above, int64_t left, A* to) const {
    const int64_t total = rows(band) + 2 * above;
    std::fill(to, to + channels * total * pitch, A(0));
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t y = 0; y < total; ++y) {
        const int64_t from = band * kRows + y - above;
        if (from < 0 || from >= h) continue;
        const A* const row = image + (i * h + from) * w;
        std::copy(row, row + w, to + (i * total + y) * pitch + left);
      }
    }
  }

  // Calls f(image, band, scratch) for all bands.
  template <class A, class F>
  void for_bands(int64_t scratch_size, const F& f) const {
    constexpr int64_t kGrain = 1 << 15;
    parallel_for(0, n * bands, ceil_div(kGrain, 2 * kh * kw * kRows * w), [&](int64_t begin, int64_t end) {
      const Buffer<A> scratch(scratch_size);
      for (int64_t i = begin; i < end; ++i) f(i / bands, i % bands, scratch.data());
    });
  }
};

template <class F>
auto dispatch_sums(ScalarType dtype, const F& f) {
  return dispatch_floating(dtype, [&](auto type) {
    using A = acc_t<typename decltype(type)::type>;
    STD_TORCH_CHECK(dtype == dtype_of<A>, "pixnorm: expected float32 or float64");
    return f(Type<A>{});
  });
}

Tensor gate_conv_fwd(const Tensor& given, const Tensor& given_weight) {
  const Convolution conv(given, given_weight);
  return dispatch_sums(given.scalar_type(), [&](auto type) {
    using A = typename decltype(type)::type;
    const Tensor pooled = dense(given), weight = dense(given_weight);
    const Tensor z = empty({conv.n, 1, conv.h, conv.w}, dtype_of<A>);
    auto* const to = static_cast<A*>(z.data_ptr());
    const auto kernel = PIXNORM_BY_ISA(gate_correlate<A>);
    const int64_t pixels = conv.h * conv.w;
    conv.for_bands<A>(conv.padded_size(2), [&](int64_t n, int64_t band, A* padded) {
      conv.pad(data_of<A>(pooled) + 2 * n * pixels, 2, band, conv.kh / 2, conv.kw / 2, padded);
      kernel(padded, conv.pitch, 2, data_of<A>(weight), conv.kh, conv.kw, 1, conv.rows(band), conv.w,
             to + n * pixels + band * conv.kRows * conv.w, pixels);
    });
    return z;
  });
}

std::tuple<Tensor, Tensor> gate_conv_grad(const Tensor& grad_z, const Tensor& given, const Tensor& given_weight) {
  const Convolution conv(given, given_weight);
  check_sizes(grad_z, "grad_z", {conv.n, 1, conv.h, conv.w});
  check_same_dtype(grad_z, "grad_z", given);
  return dispatch_sums(given.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor> {
    using A = typename decltype(type)::type;
    const Tensor pooled = dense(given), weight = dense(given_weight), grad = dense(grad_z);
    const Tensor of_pooled = empty({conv.n, 2, conv.h, conv.w}, dtype_of<A>),
                 of_weight = empty({1, 2, conv.kh, conv.kw}, dtype_of<A>);
    const int64_t pixels = conv.h * conv.w, taps = 2 * conv.kh * conv.kw;
    std::vector<A> turned(data_of<A>(weight), data_of<A>(weight) + taps);  // the adjoint's, (2, 1, kh, kw)
    std::reverse(turned.begin(), turned.begin() + taps / 2);
    std::reverse(turned.begin() + taps / 2, turned.end());
    const Buffer<A> sums(conv.n * conv.bands * taps);
    auto* const to = static_cast<A*>(of_pooled.data_ptr());
    const auto correlate = PIXNORM_BY_ISA(gate_correlate<A>);
    const auto weight_sums = PIXNORM_BY_ISA(gate_weight_sums<A>);
    conv.for_bands<A>(conv.padded_size(3), [&](int64_t n, int64_t band, A* scratch) {
      const int64_t rows = conv.rows(band);
      const A* const d = data_of<A>(grad) + n * pixels;
      A* const of_grad = scratch + conv.padded_size(2);
      conv.pad(d, 1, band, conv.kh / 2, conv.kw / 2, of_grad);
      correlate(of_grad, conv.pitch, 1, turned.data(), conv.kh, conv.kw, 2, rows, conv.w,
                to + 2 * n * pixels + band * conv.kRows * conv.w, pixels);
      conv.pad(data_of<A>(pooled) + 2 * n * pixels, 2, band, conv.kh / 2, conv.kw / 2, scratch);
      conv.pad(d, 1, band, 0, 0, of_grad);
      weight_sums(of_grad, scratch, conv.pitch, 2, conv.kh, conv.kw, rows, conv.w,
                  sums.data() + (n * conv.bands + band) * taps);
    });
    auto* const of_taps = static_cast<A*>(of_weight.data_ptr());
    for (int64_t tap = 0; tap < taps; ++tap) {
      double total = 0;
      for (int64_t i = 0; i < conv.n * conv.bands; ++i) total += sums[i * taps + tap];
      of_taps[tap] = static_cast<A>(total);
    }
    return {of_pooled, of_weight};
  });
}

}  // namespace
}  // namespace pixnorm::gate

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) {
  m.impl("gate_conv_fwd", TORCH_BOX(&pixnorm::gate::gate_conv_fwd));
  m.impl("gate_conv_grad", TORCH_BOX(&pixnorm::gate::gate_conv_grad));
}
