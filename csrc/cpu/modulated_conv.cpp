// The pass of spatially modulated convolution on the CPU: x · s, and the sums of s² that each tap sees. Tensors,
// threads and the order of sums; modulated_conv_kernels.h has the arithmetic.
//
// Work is cut by shape alone and sums are added in a fixed order, so results do not depend on the number of threads.

#include "cpu/modulated_conv.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "dispatch.h"

#define PIXNORM_VECTOR_CODE "cpu/modulated_conv_kernels.h"
#include "cpu/foreach_isa.h"

namespace pixnorm::modulated_conv {
namespace {

// The classes of an axis, from the op's argument (taps, size): how often each tap sees each row.
struct Classes {
  std::vector<int32_t> of, border;
  std::vector<float> seen;
  int64_t taps;

  Classes(const Tensor& counts, int64_t size) : of(size, 0) {
    STD_TORCH_CHECK(counts.dim() == 2 && counts.size(1) == size, "pixnorm: counts of rows or columns: wrong shape");
    taps = counts.size(0);
    const std::vector<float> times = to_vector<float>(counts);
    for (int64_t i = 0; i < size; ++i) {
      bool once = true;
      for (int64_t tap = 0; tap < taps; ++tap) once = once && times[tap * size + i] == 1;
      if (once) continue;
      border.push_back(static_cast<int32_t>(i));
      of[i] = static_cast<int32_t>(border.size());
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      seen.push_back(1);
      for (const int32_t i : border) seen.push_back(times[tap * size + i]);
    }
  }

  Axis axis() const {
    return {static_cast<int64_t>(of.size()),
            taps,
            static_cast<int64_t>(border.size()) + 1,
            of.data(),
            border.data(),
            seen.data()};
  }
};

struct Call {
  int64_t n, c, h, w;
  MemoryFormat layout;
  Classes rows, columns;
  Image image;
  int64_t part_rows, parts;  // of an image in channels_last
  int64_t grain;             // planes that are worth a thread

  Call(const Tensor& x, const Tensor& style_map, const Tensor& row_counts, const Tensor& column_counts)
      : n(x.size(0)),
        c(x.size(1)),
        h(x.size(2)),
        w(x.size(3)),
        layout(layout_of(x)),
        rows(row_counts, h),
        columns(column_counts, w),
        image{rows.axis(), columns.axis(), c} {
    check_sizes(style_map, "style_map", {n, c, h, w});
    check_same_dtype(style_map, "style_map", x);
    constexpr int64_t kPixels = 256, kGrain = 1 << 14;
    part_rows = std::clamp<int64_t>(kPixels / std::max<int64_t>(w, 1), 1, std::max<int64_t>(h, 1));
    parts = ceil_div(h, part_rows);
    grain = ceil_div(kGrain, std::max<int64_t>(image.pixels(), 1));
  }

  bool channels_last() const { return layout == MemoryFormat::ChannelsLast; }

  // Calls f(begin, end) for all planes, some at a time: so many that products by class and tap are vector code.
  template <class F>
  void for_planes(const F& f) const {
    constexpr int64_t kPlanes = 64;
    const int64_t together = std::clamp<int64_t>(grain, 1, kPlanes);
    parallel_for(0, ceil_div(n * c, together), ceil_div(grain, together), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i * together, std::min((i + 1) * together, n * c));
    });
  }

  // Calls f(sample, begin, end, part) for all runs of rows.
  template <class F>
  void for_rows(const F& f) const {
    parallel_for(0, n * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % parts * part_rows;
        f(i / parts, first, std::min(first + part_rows, h), i % parts);
      }
    });
  }
};

template <class T>
void forward(const Call& call, const T* x, const T* s, T* y, acc_t<T>* sums) {
  using A = acc_t<T>;
  const Image& image = call.image;
  const int64_t classes = image.classes(), taps = image.taps(), of_image = call.c * image.pixels();
  const auto of_taps = PIXNORM_BY_ISA(sums_of_taps<A, double>);
  if (!call.channels_last()) {
    const auto kernel = PIXNORM_BY_ISA(scale_plane<T>);
    call.for_planes([&](int64_t begin, int64_t end) {
      const int64_t planes = end - begin;
      const Buffer<double> by_class(classes * planes), scratch(image.columns.classes * planes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * image.pixels();
        kernel(image, x + at, s + at, y + at, by_class.data() + i - begin, planes);
      }
      of_taps(image, planes, by_class.data(), scratch.data(), sums + begin * taps);
    });
    return;
  }
  const int64_t numbers = classes * call.c;
  const Buffer<A> partial(call.n * call.parts * numbers);
  const auto kernel = PIXNORM_BY_ISA(scale_rows<T>);
  call.for_rows([&](int64_t n, int64_t begin, int64_t end, int64_t part) {
    const int64_t at = n * of_image + begin * call.w * call.c;
    kernel(image, begin, end, x + at, s + at, y + at, partial.data() + (n * call.parts + part) * numbers);
  });
  parallel_for(0, call.n, 1, [&](int64_t begin, int64_t end) {
    const Buffer<double> total(numbers), scratch(image.columns.classes * call.c);
    for (int64_t n = begin; n < end; ++n) {
      std::fill_n(total.data(), numbers, 0.0);
      for (int64_t part = 0; part < call.parts; ++part) {
        const A* const from = partial.data() + (n * call.parts + part) * numbers;
        for (int64_t i = 0; i < numbers; ++i) total[i] += from[i];
      }
      of_taps(image, call.c, total.data(), scratch.data(), sums + n * call.c * taps);
    }
  });
}

template <class T>
void backward(const Call& call, const T* dy, const acc_t<T>* grad_sums, const T* x, const T* s, T* dx, T* ds) {
  using A = acc_t<T>;
  const Image& image = call.image;
  const int64_t classes = image.classes(), taps = image.taps(), of_image = call.c * image.pixels();
  const auto of_classes = PIXNORM_BY_ISA(weights_of_classes<A>);
  if (!call.channels_last()) {
    const auto kernel = PIXNORM_BY_ISA(scale_plane_backward<T>);
    call.for_planes([&](int64_t begin, int64_t end) {
      const int64_t planes = end - begin;
      const Buffer<A> weights(classes * planes), scratch(image.rows.taps * planes);
      of_classes(image, planes, grad_sums + begin * taps, scratch.data(), weights.data());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * image.pixels();
        kernel(image, dy + at, x + at, s + at, weights.data() + i - begin, planes, dx + at, ds + at);
      }
    });
    return;
  }
  const int64_t numbers = classes * call.c;
  const Buffer<A> weights(call.n * numbers);
  parallel_for(0, call.n, 1, [&](int64_t begin, int64_t end) {
    const Buffer<A> scratch(image.rows.taps * call.c);
    for (int64_t n = begin; n < end; ++n) {
      of_classes(image, call.c, grad_sums + n * call.c * taps, scratch.data(), weights.data() + n * numbers);
    }
  });
  const auto kernel = PIXNORM_BY_ISA(scale_rows_backward<T>);
  call.for_rows([&](int64_t n, int64_t begin, int64_t end, int64_t) {
    const int64_t at = n * of_image + begin * call.w * call.c;
    kernel(image, begin, end, dy + at, x + at, s + at, weights.data() + n * numbers, dx + at, ds + at);
  });
}

template <class T>
T* to(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

std::tuple<Tensor, Tensor> spatial_scale_fwd(const Tensor& x, const Tensor& style_map, const Tensor& rows,
                                             const Tensor& columns) {
  STD_TORCH_CHECK(x.dim() == 4, "pixnorm: x must be 4-D");
  const Call call(x, style_map, rows, columns);
  return dispatch_floating(x.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor from = dense(x, call.layout), styles = dense(style_map, call.layout);
    const Tensor y = empty({call.n, call.c, call.h, call.w}, dtype_of<T>, call.layout);
    const Tensor sums = empty({call.n, call.c, call.rows.taps, call.columns.taps}, dtype_of<A>);
    if (x.numel() == 0) {
      torch::stable::fill_(sums, 0);
    } else {
      forward(call, data_of<T>(from), data_of<T>(styles), to<T>(y), to<A>(sums));
    }
    return {y, sums};
  });
}

std::tuple<Tensor, Tensor> spatial_scale_bwd(const Tensor& grad_y, const Tensor& grad_sums, const Tensor& x,
                                             const Tensor& style_map, const Tensor& rows, const Tensor& columns) {
  STD_TORCH_CHECK(x.dim() == 4, "pixnorm: x must be 4-D");
  const Call call(x, style_map, rows, columns);
  check_sizes(grad_y, "grad_y", {call.n, call.c, call.h, call.w});
  check_same_dtype(grad_y, "grad_y", x);
  check_sizes(grad_sums, "grad_sums", {call.n, call.c, call.rows.taps, call.columns.taps});
  return dispatch_floating(x.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    STD_TORCH_CHECK(grad_sums.scalar_type() == dtype_of<A>, "pixnorm: grad_sums has the wrong dtype");
    const Tensor dy = dense(grad_y, call.layout), from = dense(x, call.layout), styles = dense(style_map, call.layout);
    const Tensor of_sums = dense(grad_sums);
    const Tensor dx = empty({call.n, call.c, call.h, call.w}, dtype_of<T>, call.layout);
    Tensor ds = empty({call.n, call.c, call.h, call.w}, dtype_of<T>, call.layout);
    if (x.numel() > 0) {
      backward(call, data_of<T>(dy), data_of<A>(of_sums), data_of<T>(from), data_of<T>(styles), to<T>(dx), to<T>(ds));
    }
    return {dx, dense(ds, layout_of(style_map))};
  });
}

}  // namespace
}  // namespace pixnorm::modulated_conv

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) {
  m.impl("spatial_scale_fwd", TORCH_BOX(&pixnorm::modulated_conv::spatial_scale_fwd));
  m.impl("spatial_scale_bwd", TORCH_BOX(&pixnorm::modulated_conv::spatial_scale_bwd));
}
