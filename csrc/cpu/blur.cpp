// The blur on the CPU: tensors and threads. blur_kernels.h has the arithmetic.

#include "cpu/blur.h"

#include <torch/csrc/stable/library.h>

#include "check.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "dispatch.h"

#define PIXNORM_VECTOR_CODE "cpu/blur_kernels.h"
#include "cpu/foreach_isa.h"

namespace pixnorm::blur {
namespace {

// f(resample) with it as a compile-time constant.
template <class F>
auto dispatch_resample(Resample resample, const F& f) {
  switch (resample) {
    case Resample::kUp:
      return f(std::integral_constant<Resample, Resample::kUp>{});
    case Resample::kDown:
      return f(std::integral_constant<Resample, Resample::kDown>{});
    default:
      return f(std::integral_constant<Resample, Resample::kNone>{});
  }
}

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

// Images in channels_last, or planes in NCHW; large ones in parts of some rows.
template <class T>
void blur_images(const Shape& s, bool channels_last, int64_t images, const T* x, T* y) {
  const auto kernel = dispatch_resample(s.resample, [&](auto resample) {
    constexpr Resample kResample = decltype(resample)::value;
    return channels_last ? PIXNORM_BY_ISA(blur_rows<T, kResample, true, T>)
                         : PIXNORM_BY_ISA(blur_rows<T, kResample, false, T>);
  });
  const int64_t row = s.w * s.channels, out_row = s.out_w * s.channels;
  const int64_t part = std::clamp<int64_t>(kGrain / out_row, 1, s.out_h), parts = ceil_div(s.out_h, part);
  parallel_for(0, images * parts, ceil_div(kGrain, part * out_row), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / parts, top = i % parts * part;
      kernel(s, x + image * s.h * row, top, std::min(top + part, s.out_h), y + image * s.out_h * out_row);
    }
  });
}

template <class T>
void blur_small_planes(Shape s, int64_t planes, const T* x, T* y) {
  s.channels = kBlock;
  const auto kernel = dispatch_resample(
      s.resample, [](auto resample) { return PIXNORM_BY_ISA(blur_planes<T, decltype(resample)::value>); });
  const int64_t before = s.h * s.w * kBlock, after = s.out_h * s.out_w * kBlock;
  parallel_for(0, ceil_div(planes, kBlock), ceil_div(kGrain, after), [&](int64_t begin, int64_t end) {
    const Buffer<acc_t<T>> scratch(before + after);
    for (int64_t block = begin; block < end; ++block) {
      kernel(s, x, planes, block, y, scratch.data(), scratch.data() + before);
    }
  });
}

Tensor blur(const Tensor& x, Resample resample, int64_t out_h, int64_t out_w, double factor) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const MemoryFormat layout = layout_of(x);
  const bool channels_last = layout == MemoryFormat::ChannelsLast;
  const Shape s{h, w, out_h, out_w, channels_last ? c : 1, resample, factor};
  return dispatch_floating(x.scalar_type(), [&](auto type) -> Tensor {
    using T = typename decltype(type)::type;
    const Tensor x_dense = dense(x, layout), y = empty({n, c, out_h, out_w}, dtype_of<T>, layout);
    if (y.numel() == 0) return y;
    const T* const from = data_of<T>(x_dense);
    T* const to = static_cast<T*>(y.data_ptr());
    constexpr int64_t kShortRow = 16, kSmallPlane = 1024;  // a vector; pixels of kBlock planes fit the L2 cache
    if (channels_last) {
      blur_images(s, true, n, from, to);
    } else if (std::min(w, out_w) < kShortRow && std::max(h * w, out_h * out_w) <= kSmallPlane) {
      blur_small_planes(s, n * c, from, to);
    } else {
      blur_images(s, false, n * c, from, to);
    }
    return y;
  });
}

void check_options(int64_t up, int64_t down) {
  STD_TORCH_CHECK((up == 1 || up == 2) && (down == 1 || down == 2) && up * down <= 2,
                  "pixnorm: up and down must be 1 or 2, and not both 2");
}

// With weights of 1, 2, 1 per dimension without a change of resolution, else 1 and 3.
Tensor blur2d_fwd(const Tensor& x, int64_t up, int64_t down) {
  STD_TORCH_CHECK(x.dim() == 4, "pixnorm: x must be 4-D");
  check_options(up, down);
  const int64_t h = x.size(2) * up / down, w = x.size(3) * up / down;
  if (down == 2) return blur(x, Resample::kDown, h, w, 1.0 / 64);
  return blur(x, up == 2 ? Resample::kUp : Resample::kNone, h, w, 1.0 / 16);
}

Tensor blur2d_bwd(const Tensor& grad_y, int64_t up, int64_t down, int64_t h, int64_t w) {
  check_options(up, down);
  STD_TORCH_CHECK(grad_y.dim() == 4, "pixnorm: grad_y must be 4-D");
  STD_TORCH_CHECK(down == 1 || std::min(h, w) > 1, "pixnorm: x must be 2x2 or larger");
  check_sizes(grad_y, "grad_y", {grad_y.size(0), grad_y.size(1), h * up / down, w * up / down});
  if (down == 2) return blur(grad_y, Resample::kUp, h, w, 1.0 / 64);
  return blur(grad_y, up == 2 ? Resample::kDown : Resample::kNone, h, w, 1.0 / 16);
}

}  // namespace
}  // namespace pixnorm::blur

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) {
  m.impl("blur2d_fwd", TORCH_BOX(&pixnorm::blur::blur2d_fwd));
  m.impl("blur2d_bwd", TORCH_BOX(&pixnorm::blur::blur2d_bwd));
}
