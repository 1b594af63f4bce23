// Modulated norm on the CPU: tensors, threads and the order of passes. modulate_kernels.h has the arithmetic.
//
// Work is cut by shape alone and partial sums are added in a fixed order, so results do not depend on the number of
// threads.

#include "cpu/modulate.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "activation.h"
#include "check.h"
#include "cpu/memory.h"
#include "cpu/moments.h"
#include "cpu/parallel.h"
#include "dispatch.h"

#define PIXNORM_VECTOR_CODE "cpu/modulate_kernels.h"
#include "cpu/foreach_isa.h"
#include "cpu/statistics.h"

namespace pixnorm::modulate {
namespace {

using OptionalTensor = std::optional<Tensor>;

enum class Affine { kNone, kVector, kRows, kMaps };  // of gamma and beta: absent, (C,), (N, C), (N, C, H, W)

// ---- arguments ----

struct Call {
  int64_t n, c, h, w;  // of x
  MemoryFormat layout;
  Shape shape;
  Affine affine;
  double eps, offset, slope;
  bool instance;

  Call(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta, double eps, bool instance,
       double gamma_offset, int64_t upsample, std::optional<double> negative_slope)
      : eps(eps), offset(gamma_offset), instance(instance) {
    STD_TORCH_CHECK(x.dim() == 4, "pixnorm: x must be 4-D");
    STD_TORCH_CHECK(upsample == 1 || upsample == 2, "pixnorm: upsample must be 1 or 2");
    STD_TORCH_CHECK(gamma.has_value() == beta.has_value(), "pixnorm: give both gamma and beta or neither");
    const Activation activation(negative_slope);
    slope = activation.on ? activation.slope : 1;
    n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
    layout = layout_of(x);
    const bool channels_last = layout == MemoryFormat::ChannelsLast;
    shape = {channels_last ? n : n * c,
             channels_last ? c : 1,
             upsample == 1 ? h * w : h,
             upsample == 1 ? int64_t{1} : w,
             upsample,
             channels_last};
    affine = !gamma              ? Affine::kNone
             : gamma->dim() == 1 ? Affine::kVector
             : gamma->dim() == 2 ? Affine::kRows
                                 : Affine::kMaps;
    if (!gamma) return;
    for (const Tensor* t : {&*gamma, &*beta}) {
      if (affine == Affine::kVector) check_sizes(*t, "gamma or beta", {c});
      if (affine == Affine::kRows) check_sizes(*t, "gamma or beta", {n, c});
      if (affine == Affine::kMaps) {
        check_sizes(*t, "gamma or beta", {n, c, h * upsample, w * upsample});
        check_same_dtype(*t, "a map", x);
      }
      check_same_dtype(*t, "gamma or beta", *gamma);
    }
  }

  bool maps() const { return affine == Affine::kMaps; }
  int64_t statistics() const { return (instance ? n : 1) * c; }
  // Where the numbers of image q are in an array (N, C) or (C,).
  int64_t at(int64_t q, bool per_sample) const {
    return per_sample ? q * shape.channels : shape.channels_last ? 0 : q % c;
  }
};

// ---- cutting the work ----

// Images are cut into parts, and grouped into units, whose statistics depend on nothing else. If a unit fits in the L2
// cache it is resident: one thread takes it through all passes, so that memory is read once. Otherwise all threads go
// through the parts, pass by pass.
//
// A unit of batch statistics in NCHW is some channels, so that runs are long even if planes are small; a unit of
// instances is an image.
struct Plan {
  int64_t part_rows, parts, grain;
  int64_t units, together, samples, step;  // images [i * step + unit * together, ...) for each sample i of the unit
  bool resident;

  // `bytes`: of what the passes over an image have in common.
  Plan(const Call& call, int64_t bytes) {
    const Shape& s = call.shape;
    // Sums over a part are in float32.
    constexpr int64_t kPixels = 4096, kPixelsOfAllChannels = 256;
    const int64_t pixels = s.channels_last ? kPixelsOfAllChannels : kPixels;
    part_rows = std::clamp<int64_t>(pixels / s.w, 1, s.h);
    parts = ceil_div(s.h, part_rows);
    grain = ceil_div(1 << 14, part_rows * s.row());
    constexpr int64_t kRunBytes = 1 << 12, kResidentBytes = 1 << 20, kEnoughUnits = 8;
    const bool by_channel = !call.instance && !s.channels_last;
    together = by_channel ? std::clamp<int64_t>(kRunBytes / bytes, 1, ceil_div(call.c, kEnoughUnits)) : 1;
    step = by_channel ? call.c : 1;
    samples = call.instance ? 1 : call.n;
    units = call.instance ? s.images : by_channel ? ceil_div(call.c, together) : 1;
    resident = units >= kEnoughUnits && samples * together * bytes <= kResidentBytes;
  }

  // Calls f(image) for the images of a unit.
  template <class F>
  void for_images(int64_t unit, const F& f) const {
    const int64_t first = unit * together, count = std::min(together, step - first % step);
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t j = 0; j < count; ++j) f(first + i * step + j);
    }
  }
};

// Tensors and coefficients of a call, and one step of work on them.
template <class T>
struct Work {
  using A = acc_t<T>;

  const Call& call;
  const Plan plan;
  Rows<T> tensors{};  // of image 0
  std::vector<A> mean, var, rstd, gamma, beta, centre, centre_x;

  Work(const Call& call, int64_t bytes, const OptionalTensor& given_gamma, const OptionalTensor& given_beta)
      : call(call),
        plan(call, bytes),
        mean(call.statistics()),
        var(call.statistics()),
        rstd(call.statistics()),
        centre(call.statistics()),
        centre_x(call.statistics()) {
    if (call.affine == Affine::kVector || call.affine == Affine::kRows) {
      gamma = to_vector<A>(*given_gamma);
      beta = to_vector<A>(*given_beta);
      for (A& value : gamma) value += static_cast<A>(call.offset);
    } else {
      gamma.assign(call.c, 1);
      beta.assign(call.c, 0);
    }
  }

  void set_rstd(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rstd[i] = static_cast<A>(1 / std::sqrt(var[i] + call.eps));
  }

  Coefficients<A> coefficients(int64_t q) const {
    const int64_t at = call.at(q, call.instance), row = call.at(q, call.affine == Affine::kRows);
    return {mean.data() + at,   rstd.data() + at,     gamma.data() + row,          beta.data() + row,
            centre.data() + at, centre_x.data() + at, static_cast<A>(call.offset), static_cast<A>(call.slope)};
  }

  Rows<T> rows(int64_t q, int64_t part) const {
    const int64_t at = q * call.shape.elements(), up = q * call.shape.output_elements();
    const auto moved = [](auto* t, int64_t by) { return t ? t + by : t; };
    return {part * plan.part_rows,     std::min((part + 1) * plan.part_rows, call.shape.h),
            moved(tensors.x, at),      moved(tensors.gamma, up),
            moved(tensors.beta, up),   moved(tensors.dy, up),
            moved(tensors.y, up),      moved(tensors.dx, at),
            moved(tensors.dgamma, up), moved(tensors.dbeta, up)};
  }

  // Calls f(image, part, scratch) for all parts of all images.
  template <class F>
  void for_parts(const F& f) const {
    parallel_for(0, call.shape.images * plan.parts, plan.grain, [&](int64_t begin, int64_t end) {
      const Buffer<A> scratch(baseline::scratch_of(call.shape));
      for (int64_t i = begin; i < end; ++i) f(i / plan.parts, i % plan.parts, scratch.data());
    });
  }

  // Calls f(unit, scratch, moments of each channel of a unit and of an image) for all units.
  template <class F>
  void for_units(const F& f) const {
    const int64_t elements = plan.samples * plan.together * call.shape.elements();
    parallel_for(0, plan.units, ceil_div(1 << 14, elements), [&](int64_t begin, int64_t end) {
      const Buffer<A> scratch(baseline::scratch_of(call.shape) + 3 * call.shape.channels);
      const Buffer<Moments> totals((plan.together + 1) * call.shape.channels);
      for (int64_t unit = begin; unit < end; ++unit) f(unit, scratch.data(), totals.data());
    });
  }

  // Calls f(image, part) for the parts of a unit.
  template <class F>
  void for_parts_of(int64_t unit, const F& f) const {
    plan.for_images(unit, [&](int64_t q) {
      for (int64_t part = 0; part < plan.parts; ++part) f(q, part);
    });
  }

  // The statistics of a unit are [first, last) of call.statistics().
  int64_t first_statistic(int64_t unit) const { return unit * plan.together * call.shape.channels; }
  int64_t last_statistic(int64_t unit) const { return std::min(first_statistic(unit + 1), call.statistics()); }
};

// f(layout, maps) with both as compile-time constants.
template <class F>
auto dispatch_kind(const Call& call, const F& f) {
  const auto with_layout = [&](auto channels_last) {
    return call.maps() ? f(channels_last, std::true_type{}) : f(channels_last, std::false_type{});
  };
  return call.shape.channels_last ? with_layout(std::true_type{}) : with_layout(std::false_type{});
}

// ---- forward ----

// The statistics of one unit. `totals` holds those of its channels, and of the channels of an image.
template <class T>
void set_statistics(Work<T>& work, int64_t unit, acc_t<T>* scratch, Moments* totals) {
  const Call& call = work.call;
  const Shape& s = call.shape;
  const int64_t pixels = s.h * s.w, first = work.first_statistic(unit), last = work.last_statistic(unit);
  Moments* const more = totals + (last - first);
  std::fill(totals, more, Moments{0, 0});
  const auto by_channel = PIXNORM_BY_ISA(moments_by_channel<T>);
  const auto of_plane = PIXNORM_BY_ISA(moments_of<T>);
  work.plan.for_images(unit, [&](int64_t q) {
    const T* x = work.tensors.x + q * s.elements();
    if (s.channels_last) {
      by_channel(x, pixels, s.channels, scratch, more);
    } else {
      more[0] = of_plane(x, pixels);
    }
    const auto before = static_cast<double>(q / work.plan.step * pixels);
    Moments* const to = totals + (call.at(q, call.instance) - first);
    for (int64_t c = 0; c < s.channels; ++c) {
      if (work.plan.samples == 1) {
        to[c] = more[c];
      } else {
        merge(to[c], before, more[c], static_cast<double>(pixels));
      }
    }
  });
  const double share = 1.0 / static_cast<double>(work.plan.samples * pixels);
  for (int64_t i = first; i < last; ++i) {
    work.mean[i] = static_cast<acc_t<T>>(totals[i - first].mean);
    work.var[i] = static_cast<acc_t<T>>(totals[i - first].m2 * share);
  }
  work.set_rstd(first, last);
}

template <class T>
void forward(Work<T>& work, bool given) {
  const Call& call = work.call;
  const auto kernel = dispatch_kind(call, [](auto channels_last, auto maps) {
    return PIXNORM_BY_ISA(forward<T, decltype(channels_last)::value, decltype(maps)::value>);
  });
  const auto normalise = [&](int64_t q, int64_t part, acc_t<T>* scratch) {
    kernel(call.shape, work.coefficients(q), work.rows(q, part), scratch);
  };
  if (!given && work.plan.resident) {
    work.for_units([&](int64_t unit, acc_t<T>* scratch, Moments* totals) {
      set_statistics(work, unit, scratch, totals);
      work.for_parts_of(unit, [&](int64_t q, int64_t part) { normalise(q, part, scratch); });
    });
    return;
  }
  if (!given) {
    Statistics<T> found({call.n, call.c, call.h * call.w, call.shape.channels_last, call.instance}, call.n);
    found.add(work.tensors.x, 0, call.n);
    found.finish(work.mean.data(), work.var.data());
  }
  work.set_rstd(0, call.statistics());
  work.for_parts(normalise);
}

template <class T>
Tensor statistic(const Call& call, const std::vector<acc_t<T>>& values) {
  constexpr ScalarType dtype = dtype_of<acc_t<T>>;
  const Tensor t = call.instance ? empty({call.n, call.c}, dtype) : empty({call.c}, dtype);
  copy_to(values, t);
  return t;
}

using Result = std::tuple<Tensor, Tensor, Tensor>;

Result modulate_fwd(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
                    const OptionalTensor& mean, const OptionalTensor& var, double eps, bool instance,
                    double gamma_offset, int64_t upsample, std::optional<double> negative_slope) {
  const Call call(x, gamma, beta, eps, instance, gamma_offset, upsample, negative_slope);
  const bool given = mean.has_value();
  STD_TORCH_CHECK(var.has_value() == given, "pixnorm: give both statistics or neither");
  STD_TORCH_CHECK(!(given && instance), "pixnorm: statistics of instances are not given");
  return dispatch_floating(x.scalar_type(), [&](auto type) -> Result {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor x_dense = dense(x, call.layout);
    const Tensor y = empty({call.n, call.c, call.h * upsample, call.w * upsample}, dtype_of<T>, call.layout);
    if (x.numel() == 0) {
      const std::vector<A> zeros(call.statistics());
      return {y, statistic<T>(call, given ? to_vector<A>(*mean) : zeros),
              statistic<T>(call, given ? to_vector<A>(*var) : zeros)};
    }
    Work<T> work(call, call.shape.elements() * sizeof(T), gamma, beta);
    work.tensors.x = data_of<T>(x_dense);
    work.tensors.y = static_cast<T*>(y.data_ptr());
    Tensor maps[2];
    if (call.maps()) {
      maps[0] = dense(*gamma, call.layout), maps[1] = dense(*beta, call.layout);
      work.tensors.gamma = data_of<T>(maps[0]), work.tensors.beta = data_of<T>(maps[1]);
    }
    if (given) {
      check_sizes(*mean, "mean", {call.c});
      check_sizes(*var, "var", {call.c});
      work.mean = to_vector<A>(*mean), work.var = to_vector<A>(*var);
    }
    forward(work, given);
    return {y, statistic<T>(call, work.mean), statistic<T>(call, work.var)};
  });
}

// ---- backward ----

// Partial sums of each part of each image, [image][part][2][channels].
struct Sums {
  const Call& call;
  const Plan& plan;
  Buffer<double> data;

  Sums(const Call& call, const Plan& plan)
      : call(call), plan(plan), data(call.shape.images * plan.parts * 2 * call.shape.channels) {}

  double* of(int64_t q, int64_t part) const { return data.data() + (q * plan.parts + part) * 2 * call.shape.channels; }
};

// For channels [c0, c1) of the images of a unit, the means of dy γ and dy γ x̂ (times rstd). For rows these follow from
// the sums of dy and dy x̂, which are the gradients of β and γ.
template <class T>
void set_centre(Work<T>& work, const Sums& sums, int64_t unit, int64_t c0, int64_t c1) {
  using A = acc_t<T>;
  const Call& call = work.call;
  const Shape& s = call.shape;
  const bool per_sample = call.affine == Affine::kRows;
  const int64_t first = work.first_statistic(unit), count = work.last_statistic(unit) - first;
  constexpr int64_t kOnStack = 128;
  double on_stack[2 * kOnStack];
  std::vector<double> on_heap(count > kOnStack ? 2 * count : 0);
  double* const total = count > kOnStack ? on_heap.data() : on_stack;
  std::fill(total, total + 2 * count, 0.0);
  work.for_parts_of(unit, [&](int64_t q, int64_t part) {
    const A* gamma = work.gamma.data() + call.at(q, per_sample);
    const double* from = sums.of(q, part);
    double* to = total + 2 * (call.at(q, call.instance) - first);
    for (int64_t c = c0; c < c1; ++c) {
      to[2 * c] += gamma[c] * from[c];
      to[2 * c + 1] += gamma[c] * from[s.channels + c];
    }
  });
  const double share = 1.0 / static_cast<double>(work.plan.samples * s.h * s.w);
  for (int64_t i = first; i < first + count; ++i) {
    if (s.channels > 1 && (i - first < c0 || i - first >= c1)) continue;
    work.centre[i] = static_cast<A>(total[2 * (i - first)] * share * work.rstd[i]);
    work.centre_x[i] = static_cast<A>(total[2 * (i - first) + 1] * share * work.rstd[i]);
  }
}

template <class T>
void backward(Work<T>& work, const Sums& sums, bool centred) {
  const Call& call = work.call;
  const Plan& plan = work.plan;
  const auto reduce_kernel = dispatch_kind(call, [](auto channels_last, auto maps) {
    return PIXNORM_BY_ISA(backward_reduce<T, decltype(channels_last)::value, decltype(maps)::value>);
  });
  const auto apply_kernel = dispatch_kind(call, [](auto channels_last, auto maps) {
    return PIXNORM_BY_ISA(backward_apply<T, decltype(channels_last)::value, decltype(maps)::value>);
  });
  const auto reduce = [&](int64_t q, int64_t part, acc_t<T>* scratch) {
    reduce_kernel(call.shape, work.coefficients(q), work.rows(q, part), scratch, sums.of(q, part));
  };
  const auto apply = [&](int64_t q, int64_t part, acc_t<T>* scratch) {
    apply_kernel(call.shape, work.coefficients(q), work.rows(q, part), scratch);
  };
  if (!centred) {
    work.for_parts([&](int64_t q, int64_t part, acc_t<T>* scratch) {
      reduce(q, part, scratch);
      apply(q, part, scratch);
    });
  } else if (plan.resident) {
    work.for_units([&](int64_t unit, acc_t<T>* scratch, Moments*) {
      work.for_parts_of(unit, [&](int64_t q, int64_t part) { reduce(q, part, scratch); });
      set_centre(work, sums, unit, 0, call.shape.channels);
      work.for_parts_of(unit, [&](int64_t q, int64_t part) { apply(q, part, scratch); });
    });
  } else {
    work.for_parts(reduce);
    constexpr int64_t kChannels = 64;
    const int64_t blocks = ceil_div(call.shape.channels, kChannels);
    parallel_for(0, plan.units * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c0 = i % blocks * kChannels;
        set_centre(work, sums, i / blocks, c0, std::min(c0 + kChannels, call.shape.channels));
      }
    });
    work.for_parts(apply);
  }
}

// The gradients of rows or vectors: gradients[0] of gamma, [1] of beta.
template <class A>
void add_sums(const Sums& sums, std::vector<A> (&gradients)[2]) {
  const Call& call = sums.call;
  const Shape& s = call.shape;
  const bool per_sample = call.affine == Affine::kRows;
  for (std::vector<A>& gradient : gradients) gradient.assign((per_sample ? call.n : 1) * call.c, 0);
  parallel_for(0, call.c, 16, [&](int64_t begin, int64_t end) {
    for (int of = 0; of < 2; ++of) {
      std::vector<double> total(end - begin, 0);
      for (int64_t n = 0; n < call.n; ++n) {
        for (int64_t c = begin; c < end; ++c) {
          const int64_t q = s.channels_last ? n : n * call.c + c, channel = s.channels_last ? c : 0;
          double& sum = total[c - begin];
          for (int64_t part = 0; part < sums.plan.parts; ++part) sum += sums.of(q, part)[of * s.channels + channel];
          if (per_sample) {
            gradients[1 - of][n * call.c + c] = static_cast<A>(sum);
            sum = 0;
          }
        }
      }
      if (!per_sample) std::copy(total.begin(), total.end(), gradients[1 - of].begin() + begin);
    }
  });
}

Result modulate_bwd(const Tensor& grad_y, const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
                    const Tensor& mean, const Tensor& var, double eps, bool instance, double gamma_offset,
                    int64_t upsample, std::optional<double> negative_slope, bool training) {
  const Call call(x, gamma, beta, eps, instance, gamma_offset, upsample, negative_slope);
  const int64_t height = call.h * upsample, width = call.w * upsample;
  check_sizes(grad_y, "grad_y", {call.n, call.c, height, width});
  check_same_dtype(grad_y, "grad_y", x);
  for (const Tensor* t : {&mean, &var}) {
    STD_TORCH_CHECK(t->numel() == call.statistics(), "pixnorm: a statistic has the wrong shape");
  }
  return dispatch_floating(x.scalar_type(), [&](auto type) -> Result {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor x_dense = dense(x, call.layout), dy_dense = dense(grad_y, call.layout);
    const Tensor dx = empty({call.n, call.c, call.h, call.w}, dtype_of<T>, call.layout);
    Tensor maps[2], gradients[2];
    for (int i = 0; i < 2; ++i) {
      const OptionalTensor& given = i == 0 ? gamma : beta;
      if (call.maps()) {
        maps[i] = dense(*given, call.layout);
        gradients[i] = empty({call.n, call.c, height, width}, dtype_of<T>, call.layout);
      } else if (call.affine == Affine::kRows) {
        gradients[i] = empty({call.n, call.c}, given->scalar_type());
      } else {
        gradients[i] =
            empty({call.affine == Affine::kVector ? call.c : 0}, given ? given->scalar_type() : x.scalar_type());
      }
    }
    if (x.numel() == 0) {
      for (Tensor& gradient : gradients) torch::stable::fill_(gradient, 0);
      return {dx, gradients[0], gradients[1]};
    }
    // Both passes read x and dy; of maps x, gamma and the gradient of beta.
    const int64_t in_both = call.shape.elements() + (call.maps() ? 2 : 1) * call.shape.output_elements();
    Work<T> work(call, in_both * sizeof(T), gamma, beta);
    work.tensors.x = data_of<T>(x_dense);
    work.tensors.dy = data_of<T>(dy_dense);
    work.tensors.dx = static_cast<T*>(dx.data_ptr());
    if (call.maps()) {
      work.tensors.gamma = data_of<T>(maps[0]);
      // Only an activation needs beta. Without one the slope is 1 and any map does: gamma is in cache.
      work.tensors.beta = call.slope == 1 ? work.tensors.gamma : data_of<T>(maps[1]);
      work.tensors.dgamma = static_cast<T*>(gradients[0].data_ptr());
      work.tensors.dbeta = static_cast<T*>(gradients[1].data_ptr());
    }
    work.mean = to_vector<A>(mean), work.var = to_vector<A>(var);
    work.set_rstd(0, call.statistics());
    const Sums sums(call, work.plan);
    backward(work, sums, training || instance);
    if (call.maps()) {
      // Gradients have the layout of their maps.
      for (int i = 0; i < 2; ++i) gradients[i] = dense(gradients[i], layout_of(i == 0 ? *gamma : *beta));
    } else if (call.affine != Affine::kNone) {
      std::vector<A> values[2];
      add_sums(sums, values);
      for (int i = 0; i < 2; ++i) copy_to(values[i], gradients[i]);
    }
    return {dx, gradients[0], gradients[1]};
  });
}

}  // namespace
}  // namespace pixnorm::modulate

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) {
  m.impl("modulate_fwd", TORCH_BOX(&pixnorm::modulate::modulate_fwd));
  m.impl("modulate_bwd", TORCH_BOX(&pixnorm::modulate::modulate_bwd));
}
