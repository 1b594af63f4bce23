// StyleGAN's epilogues on the CPU: tensors, threads and the order of passes. style_kernels.h has the arithmetic.

#include "cpu/style.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "activation.h"
#include "check.h"
#include "cpu/pieces.h"
#include "dispatch.h"

#define PIXNORM_VECTOR_CODE "cpu/style_kernels.h"
#include "cpu/foreach_isa.h"

namespace pixnorm::style {
namespace {

using OptionalTensor = std::optional<Tensor>;

// ---- arguments ----

struct Call : Batch {
  int64_t c, h, w;  // of x
  MemoryFormat layout;
  double slope;
  bool noise;

  Call(const Tensor& x, const OptionalTensor& demod, const OptionalTensor& given_noise, const OptionalTensor& strength,
       const OptionalTensor& bias, std::optional<double> negative_slope)
      : Batch{0, {}, true}, noise(given_noise.has_value()) {
    STD_TORCH_CHECK(x.dim() == 4, "pixnorm: x must be 4-D");
    STD_TORCH_CHECK(strength.has_value() == noise, "pixnorm: give both noise and noise_strength or neither");
    const Activation activation(negative_slope);
    slope = activation.on ? activation.slope : 1;
    n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
    layout = layout_of(x);
    shape = {c, h * w, 1, 1, layout == MemoryFormat::ChannelsLast};
    if (demod) check_sizes(*demod, "demod", {n, c});
    if (bias) check_sizes(*bias, "bias", {c});
    if (!noise) return;
    check_sizes(*given_noise, "noise", {given_noise->size(0) == 1 ? 1 : n, 1, h, w});
    check_same_dtype(*given_noise, "noise", x);
    check_sizes(*strength, "noise_strength", {c});
  }

  Tensor empty_image(ScalarType dtype) const { return empty({n, c, h, w}, dtype, layout); }
};

// Coefficients of channels: one row for each sample, or one for all, of a constant if there is no tensor.
template <class A>
struct Rows {
  std::vector<A> values;
  int64_t step;  // to the row of the next sample

  Rows(const OptionalTensor& t, int64_t channels, A otherwise)
      : values(t ? to_vector<A>(*t) : std::vector<A>(channels, otherwise)), step(t && t->dim() == 2 ? channels : 0) {}

  const A* of(int64_t n, int64_t c) const { return values.data() + n * step + c; }
};

// Tensors and coefficients of a call up to the activation.
template <class T>
struct Work {
  using A = acc_t<T>;

  const Call& call;
  const Plan plan;
  Tensor x, dy, noise;  // dense
  T* to;
  int64_t noise_step = 0;  // to that of the next sample
  Rows<A> demod, strength, bias;

  // `elements`: of what two passes over a channel have in common.
  Work(const Call& call, int64_t elements, const Tensor& given_x, const OptionalTensor& given_dy, const Tensor& to,
       const OptionalTensor& given_demod, const OptionalTensor& given_noise, const OptionalTensor& given_strength,
       const OptionalTensor& given_bias)
      : call(call),
        plan(call, elements, sizeof(T)),
        x(dense(given_x, call.layout)),
        to(static_cast<T*>(to.data_ptr())),
        demod(given_demod, call.c, 1),
        strength(given_strength, call.c, 0),
        bias(given_bias, call.c, 0) {
    if (given_dy) dy = dense(*given_dy, call.layout);
    if (!given_noise) return;
    noise = in_dtype(dense(*given_noise), dtype_of<A>);
    noise_step = noise.size(0) == 1 ? 0 : call.h * call.w;
  }

  Layer<A> layer(int64_t n, int64_t block) const {
    const int64_t c = block * plan.block;
    return {demod.of(n, c), strength.of(n, c), bias.of(n, c), static_cast<A>(call.slope)};
  }

  Piece<T> piece(int64_t n, int64_t block, int64_t part) const {
    const int64_t at = plan.offset(n, block, part), pixel = n * noise_step + part * plan.part_rows;
    return {plan.channels(block),
            plan.rows(part),
            data_of<T>(x) + at,
            dy.defined() ? data_of<T>(dy) + at : nullptr,
            call.noise ? data_of<A>(noise) + pixel : nullptr,
            to + at};
  }

  int64_t scratch() const { return baseline::style_scratch_of(call.shape.channels_last, plan.block, plan.part_rows); }
};

// f(layout, noise) with both as compile-time constants.
template <class F>
auto dispatch_kind(const Call& call, const F& f) {
  const auto with_layout = [&](auto channels_last) {
    return call.noise ? f(channels_last, std::true_type{}) : f(channels_last, std::false_type{});
  };
  return call.shape.channels_last ? with_layout(std::true_type{}) : with_layout(std::false_type{});
}

#define PIXNORM_KERNEL(name)                                                                \
  dispatch_kind(work.call, [](auto channels_last, auto noise) {                             \
    return PIXNORM_BY_ISA(name<T, decltype(channels_last)::value, decltype(noise)::value>); \
  })

// The gradient of rows; empty if they are absent.
template <class A>
Tensor gradient(const OptionalTensor& of, const Tensor& x, const std::vector<A>& values) {
  if (!of) return empty({0}, x.scalar_type());
  const Tensor to =
      of->dim() == 2 ? empty({of->size(0), of->size(1)}, of->scalar_type()) : empty({of->size(0)}, of->scalar_type());
  copy_to(values, to);
  return to;
}

// ---- StyleGAN 2 ----

// gain · next_styles.
template <class A>
Rows<A> scale_of(const Call& call, const OptionalTensor& next_styles, double gain) {
  if (next_styles) check_sizes(*next_styles, "next_styles", {call.n, call.c});
  Rows<A> scale(next_styles, call.c, 1);
  for (A& value : scale.values) value *= static_cast<A>(gain);
  return scale;
}

Tensor style_epilogue_fwd(const Tensor& x, const OptionalTensor& demod, const OptionalTensor& noise,
                          const OptionalTensor& noise_strength, const OptionalTensor& bias,
                          const OptionalTensor& next_styles, std::optional<double> negative_slope, double gain) {
  const Call call(x, demod, noise, noise_strength, bias, negative_slope);
  return dispatch_floating(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor y = call.empty_image(dtype_of<T>);
    if (x.numel() == 0) return y;
    const Work<T> work(call, call.shape.pixels(), x, {}, y, demod, noise, noise_strength, bias);
    const Rows<A> scale = scale_of<A>(call, next_styles, gain);
    const auto kernel = PIXNORM_KERNEL(style_epilogue_forward);
    work.plan.template for_pieces<A>(0, [&](int64_t n, int64_t block, int64_t part, A*) {
      kernel(work.layer(n, block), scale.of(n, block * work.plan.block), work.piece(n, block, part));
    });
    return y;
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients style_epilogue_bwd(const Tensor& grad_y, const Tensor& x, const OptionalTensor& demod,
                             const OptionalTensor& noise, const OptionalTensor& noise_strength,
                             const OptionalTensor& bias, const OptionalTensor& next_styles,
                             std::optional<double> negative_slope, double gain) {
  const Call call(x, demod, noise, noise_strength, bias, negative_slope);
  check_sizes(grad_y, "grad_y", {call.n, call.c, call.h, call.w});
  check_same_dtype(grad_y, "grad_y", x);
  return dispatch_floating(x.scalar_type(), [&](auto type) -> Gradients {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor dx = call.empty_image(dtype_of<T>);
    const auto gradients = [&](const std::vector<A>& of_demod, const std::vector<A>& of_strength,
                               const std::vector<A>& of_bias, const std::vector<A>& of_next) -> Gradients {
      return {dx, gradient(demod, x, of_demod), gradient(noise_strength, x, of_strength), gradient(bias, x, of_bias),
              gradient(next_styles, x, of_next)};
    };
    if (x.numel() == 0) {
      const std::vector<A> of_samples(call.statistics()), of_all(call.c);
      return gradients(of_samples, of_all, of_all, of_samples);
    }
    const Work<T> work(call, 2 * call.shape.pixels(), x, grad_y, dx, demod, noise, noise_strength, bias);
    const Rows<A> scale = scale_of<A>(call, next_styles, gain);
    const Sums sums(work.plan, noise ? 4 : 3);
    const auto kernel = PIXNORM_KERNEL(style_epilogue_backward);
    work.plan.template for_pieces<A>(work.scratch(), [&](int64_t n, int64_t block, int64_t part, A* scratch) {
      const int64_t c = block * work.plan.block;
      kernel(work.layer(n, block), scale.of(n, c), work.piece(n, block, part), scratch, sums.of(n, part, 0) + c,
             call.c);
    });
    auto totals = noise ? add_sums<A>(sums, {true, false, true, false}) : add_sums<A>(sums, {true, false, true});
    for (A& value : totals[2]) value *= static_cast<A>(gain);
    return gradients(totals[0], noise ? totals[3] : totals[1], totals[1], totals[2]);
  });
}

// ---- StyleGAN 1 ----

// The statistics of v and what follows from them, (N, C).
template <class T>
struct Normalisation {
  using A = acc_t<T>;

  const Work<T>& work;
  const double eps;
  std::vector<A> mean, var, rstd, centre, centre_v;
  Rows<A> scale, shift;

  Normalisation(const Work<T>& work, double eps, const Tensor& given_scale, const OptionalTensor& given_shift)
      : work(work),
        eps(eps),
        mean(work.call.statistics()),
        var(mean.size()),
        rstd(mean.size()),
        centre(mean.size()),
        centre_v(mean.size()),
        scale(given_scale, work.call.c, 0),
        shift(given_shift, work.call.c, 0) {
    for (A& value : scale.values) value += 1;
  }

  void set_rstd(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rstd[i] = static_cast<A>(1 / std::sqrt(var[i] + eps));
  }

  // From the moments of each part, [image][part][channels].
  void set_statistics(const Moments* moments, int64_t n, int64_t c0, int64_t c1) {
    const int64_t channels = work.call.c;
    constexpr int64_t kChannels = 64;
    for (int64_t c = c0; c < c1; c += kChannels) {
      const int64_t size = std::min(kChannels, c1 - c), at = n * channels + c;
      Moments total[kChannels] = {};
      int64_t count = 0;
      for (int64_t part = 0; part < work.plan.parts; ++part) {
        const int64_t pixels = work.plan.rows(part);
        merge(total, count, moments + (n * work.plan.parts + part) * channels + c, pixels, size);
        count += pixels;
      }
      for (int64_t i = 0; i < size; ++i) {
        mean[at + i] = static_cast<A>(total[i].mean);
        var[at + i] = static_cast<A>(total[i].m2 < 0 ? 0 : total[i].m2 / count);  // rounding; NaN stays
      }
    }
    set_rstd(n * channels + c0, n * channels + c1);
  }

  // From the sums of dy and dy v̂.
  void set_centre(const Sums& sums, int64_t n, int64_t c0, int64_t c1) {
    const double share = 1.0 / static_cast<double>(work.call.shape.pixels());
    for (int64_t c = c0; c < c1; ++c) {
      double total[2] = {};
      for (int64_t part = 0; part < work.plan.parts; ++part) {
        for (int of = 0; of < 2; ++of) total[of] += sums.of(n, part, of)[c];
      }
      centre[n * work.call.c + c] = static_cast<A>(total[0] * share);
      centre_v[n * work.call.c + c] = static_cast<A>(total[1] * share);
    }
  }

  Norm<A> norm(int64_t n, int64_t block) const {
    const int64_t c = block * work.plan.block, at = n * work.call.c + c;
    return {mean.data() + at, rstd.data() + at,   scale.of(n, c),
            shift.of(n, c),   centre.data() + at, centre_v.data() + at};
  }
};

template <class T>
Tensor statistic(const Call& call, const std::vector<acc_t<T>>& values) {
  const Tensor t = empty({call.n, call.c}, dtype_of<acc_t<T>>);
  copy_to(values, t);
  return t;
}

std::tuple<Tensor, Tensor, Tensor> style_norm_fwd(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                                  const OptionalTensor& noise, const OptionalTensor& noise_strength,
                                                  const OptionalTensor& bias, double negative_slope, double eps) {
  const Call call(x, {}, noise, noise_strength, bias, negative_slope);
  check_sizes(scale, "scale", {call.n, call.c});
  check_sizes(shift, "shift", {call.n, call.c});
  return dispatch_floating(x.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor y = call.empty_image(dtype_of<T>);
    if (x.numel() == 0) {
      const std::vector<A> zeros(call.statistics());
      return {y, statistic<T>(call, zeros), statistic<T>(call, zeros)};
    }
    const Work<T> work(call, call.shape.pixels(), x, {}, y, {}, noise, noise_strength, bias);
    const Plan& plan = work.plan;
    Normalisation<T> normalisation(work, eps, scale, shift);
    const Buffer<Moments> moments(call.n * plan.parts * call.c);
    const auto reduce_kernel = PIXNORM_KERNEL(style_norm_moments);
    const auto apply_kernel = PIXNORM_KERNEL(style_norm_forward);
    plan.reduce_and_apply<A>(
        work.scratch(),
        [&](int64_t n, int64_t block, int64_t part, A* scratch) {
          Moments* const to = moments.data() + (n * plan.parts + part) * call.c + block * plan.block;
          reduce_kernel(work.layer(n, block), work.piece(n, block, part), scratch, to);
        },
        [&](int64_t n, int64_t c0, int64_t c1) { normalisation.set_statistics(moments.data(), n, c0, c1); },
        [&](int64_t n, int64_t block, int64_t part, A*) {
          apply_kernel(work.layer(n, block), normalisation.norm(n, block), work.piece(n, block, part));
        });
    return {y, statistic<T>(call, normalisation.mean), statistic<T>(call, normalisation.var)};
  });
}

Gradients style_norm_bwd(const Tensor& grad_y, const Tensor& x, const Tensor& scale, const OptionalTensor& noise,
                         const OptionalTensor& noise_strength, const OptionalTensor& bias, const Tensor& mean,
                         const Tensor& var, double negative_slope, double eps) {
  const Call call(x, {}, noise, noise_strength, bias, negative_slope);
  check_sizes(scale, "scale", {call.n, call.c});
  check_sizes(grad_y, "grad_y", {call.n, call.c, call.h, call.w});
  check_same_dtype(grad_y, "grad_y", x);
  for (const Tensor* t : {&mean, &var}) check_sizes(*t, "a statistic", {call.n, call.c});
  return dispatch_floating(x.scalar_type(), [&](auto type) -> Gradients {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor dx = call.empty_image(dtype_of<T>);
    const auto gradients = [&](const std::vector<A>& of_scale, const std::vector<A>& of_shift,
                               const std::vector<A>& of_strength, const std::vector<A>& of_bias) -> Gradients {
      return {dx, gradient(scale, x, of_scale), gradient(scale, x, of_shift), gradient(noise_strength, x, of_strength),
              gradient(bias, x, of_bias)};
    };
    if (x.numel() == 0) {
      const std::vector<A> of_samples(call.statistics()), of_all(call.c);
      return gradients(of_samples, of_samples, of_all, of_all);
    }
    const Work<T> work(call, 2 * call.shape.pixels(), x, grad_y, dx, {}, noise, noise_strength, bias);
    const Plan& plan = work.plan;
    Normalisation<T> normalisation(work, eps, scale, {});
    normalisation.mean = to_vector<A>(mean), normalisation.var = to_vector<A>(var);
    normalisation.set_rstd(0, call.statistics());
    const Sums of_norm(plan, 2), of_layer(plan, noise ? 2 : 1);
    const auto pass = [&](const auto& kernel, const Sums& sums) {
      return [&, kernel](int64_t n, int64_t block, int64_t part, A* scratch) {
        kernel(work.layer(n, block), normalisation.norm(n, block), work.piece(n, block, part), scratch,
               sums.of(n, part, 0) + block * plan.block, call.c);
      };
    };
    plan.reduce_and_apply<A>(
        work.scratch(), pass(PIXNORM_KERNEL(style_norm_reduce), of_norm),
        [&](int64_t n, int64_t c0, int64_t c1) { normalisation.set_centre(of_norm, n, c0, c1); },
        pass(PIXNORM_KERNEL(style_norm_apply), of_layer));
    const auto of_rows = add_sums<A>(of_norm, {true, true});
    const auto totals = noise ? add_sums<A>(of_layer, {false, false}) : add_sums<A>(of_layer, {false});
    return gradients(of_rows[1], of_rows[0], totals.back(), totals[0]);
  });
}

}  // namespace
}  // namespace pixnorm::style

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) {
  m.impl("style_epilogue_fwd", TORCH_BOX(&pixnorm::style::style_epilogue_fwd));
  m.impl("style_epilogue_bwd", TORCH_BOX(&pixnorm::style::style_epilogue_bwd));
  m.impl("style_norm_fwd", TORCH_BOX(&pixnorm::style::style_norm_fwd));
  m.impl("style_norm_bwd", TORCH_BOX(&pixnorm::style::style_norm_bwd));
}
