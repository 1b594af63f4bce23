// Modulated norm on the CPU: tensors, threads and the order of passes. modulate_kernels.h has the arithmetic.

#include "cpu/modulate.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "activation.h"
#include "check.h"
#include "cpu/pieces.h"
#include "dispatch.h"

#define PIXNORM_VECTOR_CODE "cpu/modulate_kernels.h"
#include "cpu/foreach_isa.h"
#include "cpu/statistics.h"

namespace pixnorm::modulate {
namespace {

using OptionalTensor = std::optional<Tensor>;

enum class Affine { kNone, kVector, kRows, kMaps };  // of gamma and beta: absent, (C,), (N, C), (N, C, H, W)

// ---- arguments ----

struct Call : Batch {
  int64_t c, h, w;  // of x
  MemoryFormat layout;
  Affine affine;
  double eps, offset, slope;

  Call(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta, double eps, bool instance,
       double gamma_offset, int64_t upsample, std::optional<double> negative_slope)
      : Batch{0, {}, instance}, eps(eps), offset(gamma_offset) {
    STD_TORCH_CHECK(x.dim() == 4, "pixnorm: x must be 4-D");
    STD_TORCH_CHECK(upsample == 1 || upsample == 2, "pixnorm: upsample must be 1 or 2");
    STD_TORCH_CHECK(gamma.has_value() == beta.has_value(), "pixnorm: give both gamma and beta or neither");
    const Activation activation(negative_slope);
    slope = activation.on ? activation.slope : 1;
    n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
    layout = layout_of(x);
    shape = {c, upsample == 1 ? h * w : h, upsample == 1 ? int64_t{1} : w, upsample,
             layout == MemoryFormat::ChannelsLast};
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
  bool per_sample() const { return affine == Affine::kRows; }
};

// Tensors and coefficients of a call, and one step of work on them.
template <class T>
struct Work {
  using A = acc_t<T>;

  const Call& call;
  const Plan plan;
  Piece<T> tensors{};
  std::vector<A> mean, var, rstd, gamma, beta, centre, centre_x;

  Work(const Call& call, int64_t elements, const OptionalTensor& given_gamma, const OptionalTensor& given_beta)
      : call(call),
        plan(call, elements, sizeof(T)),
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

  Coefficients<A> coefficients(int64_t n, int64_t block) const {
    const int64_t c0 = block * plan.block;
    const int64_t at = (call.instance ? n * call.c : 0) + c0, row = (call.per_sample() ? n * call.c : 0) + c0;
    return {mean.data() + at,   rstd.data() + at,     gamma.data() + row,          beta.data() + row,
            centre.data() + at, centre_x.data() + at, static_cast<A>(call.offset), static_cast<A>(call.slope)};
  }

  Piece<T> piece(int64_t n, int64_t block, int64_t part) const {
    const int64_t at = plan.offset(n, block, part), up = at * call.shape.upsample * call.shape.upsample;
    const auto moved = [](auto* t, int64_t by) { return t ? t + by : t; };
    return {plan.channels(block),      plan.rows(part),         moved(tensors.x, at), moved(tensors.gamma, up),
            moved(tensors.beta, up),   moved(tensors.dy, up),   moved(tensors.y, up), moved(tensors.dx, at),
            moved(tensors.dgamma, up), moved(tensors.dbeta, up)};
  }

  // In elements.
  int64_t scratch() const { return baseline::scratch_of(call.shape); }
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

// The statistics of one unit. `moments` holds those of its channels, and of the channels of a sample.
template <class T>
void set_statistics(Work<T>& work, int64_t group, int64_t block, acc_t<T>* scratch, Moments* moments) {
  const Call& call = work.call;
  const ImageShape& s = call.shape;
  const int64_t pixels = s.pixels(), samples = call.samples(), channels = work.plan.channels(block);
  Moments* const more = moments + channels;
  const auto by_channel = PIXNORM_BY_ISA(moments_by_channel<T>);
  const auto of_planes = PIXNORM_BY_ISA(moments_of_planes<T>);
  for (int64_t i = 0; i < samples; ++i) {
    const T* x = work.piece(group * samples + i, block, 0).x;
    Moments* const to = i == 0 ? moments : more;
    if (s.channels_last) {
      by_channel(x, pixels, channels, scratch, to);
    } else {
      of_planes(x, channels, pixels, to);
    }
    if (i > 0) merge(moments, static_cast<double>(i * pixels), more, static_cast<double>(pixels), channels);
  }
  const double share = 1.0 / static_cast<double>(samples * pixels);
  const int64_t first = group * call.c + block * work.plan.block;
  for (int64_t c = 0; c < channels; ++c) {
    work.mean[first + c] = static_cast<acc_t<T>>(moments[c].mean);
    work.var[first + c] = static_cast<acc_t<T>>(moments[c].m2 * share);
  }
  work.set_rstd(first, first + channels);
}

template <class T>
void forward(Work<T>& work, bool given) {
  using A = acc_t<T>;
  const Call& call = work.call;
  const auto kernel = dispatch_kind(call, [](auto channels_last, auto maps) {
    return PIXNORM_BY_ISA(forward<T, decltype(channels_last)::value, decltype(maps)::value>);
  });
  const auto normalise = [&](int64_t n, int64_t block, int64_t part, A* scratch) {
    kernel(call.shape, work.coefficients(n, block), work.piece(n, block, part), scratch);
  };
  if (!given && work.plan.resident) {
    const int64_t scratch_size = work.scratch() + 3 * call.c;
    work.plan.template for_units<A>(scratch_size, [&](int64_t group, int64_t block, A* scratch, Moments* moments) {
      set_statistics(work, group, block, scratch, moments);
      work.plan.for_pieces_of(group, [&](int64_t n, int64_t part) { normalise(n, block, part, scratch); });
    });
    return;
  }
  if (!given) {
    Statistics<T> found({call.n, call.c, call.h * call.w, call.shape.channels_last, call.instance}, call.n);
    found.add(work.tensors.x, 0, call.n);
    found.finish(work.mean.data(), work.var.data());
  }
  work.set_rstd(0, call.statistics());
  work.plan.template for_pieces<A>(work.scratch(), normalise);
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
    Work<T> work(call, call.shape.pixels(), gamma, beta);
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

// For channels [c0, c1) of a group, the means of dy γ and dy γ x̂ (times rstd). For rows these follow from the sums of
// dy and dy x̂, which are the gradients of β and γ.
template <class T>
void set_centre(Work<T>& work, const Sums& sums, int64_t group, int64_t c0, int64_t c1) {
  using A = acc_t<T>;
  const Call& call = work.call;
  const double share = 1.0 / static_cast<double>(call.samples() * call.shape.pixels());
  constexpr int64_t kChannels = 64;
  for (; c0 < c1; c0 += kChannels) {
    const int64_t channels = std::min(kChannels, c1 - c0), first = group * call.c + c0;
    double total[2][kChannels] = {};
    work.plan.for_pieces_of(group, [&](int64_t n, int64_t part) {
      const A* gamma = work.gamma.data() + (call.per_sample() ? n * call.c : 0) + c0;
      for (int of = 0; of < 2; ++of) {
        const double* from = sums.of(n, part, of) + c0;
        for (int64_t c = 0; c < channels; ++c) total[of][c] += gamma[c] * from[c];
      }
    });
    for (int64_t c = 0; c < channels; ++c) {
      work.centre[first + c] = static_cast<A>(total[0][c] * share * work.rstd[first + c]);
      work.centre_x[first + c] = static_cast<A>(total[1][c] * share * work.rstd[first + c]);
    }
  }
}

template <class T>
void backward(Work<T>& work, const Sums& sums, bool centred) {
  using A = acc_t<T>;
  const Call& call = work.call;
  const Plan& plan = work.plan;
  const auto reduce_kernel = dispatch_kind(call, [](auto channels_last, auto maps) {
    return PIXNORM_BY_ISA(backward_reduce<T, decltype(channels_last)::value, decltype(maps)::value>);
  });
  const auto apply_kernel = dispatch_kind(call, [](auto channels_last, auto maps) {
    return PIXNORM_BY_ISA(backward_apply<T, decltype(channels_last)::value, decltype(maps)::value>);
  });
  const auto reduce = [&](int64_t n, int64_t block, int64_t part, A* scratch) {
    const int64_t c0 = block * plan.block;
    reduce_kernel(call.shape, work.coefficients(n, block), work.piece(n, block, part), scratch,
                  {sums.of(n, part, 0) + c0, sums.of(n, part, 1) + c0});
  };
  const auto apply = [&](int64_t n, int64_t block, int64_t part, A* scratch) {
    apply_kernel(call.shape, work.coefficients(n, block), work.piece(n, block, part), scratch);
  };
  if (!centred) {
    plan.for_pieces<A>(work.scratch(), [&](int64_t n, int64_t block, int64_t part, A* scratch) {
      reduce(n, block, part, scratch);
      apply(n, block, part, scratch);
    });
    return;
  }
  const auto centre = [&](int64_t group, int64_t c0, int64_t c1) { set_centre(work, sums, group, c0, c1); };
  plan.reduce_and_apply<A>(work.scratch(), reduce, centre, apply);
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
    const int64_t in_both = call.h * call.w + (call.maps() ? 2 : 1) * height * width;
    Work<T> work(call, in_both, gamma, beta);
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
    const Sums sums(work.plan, 2);
    backward(work, sums, training || instance);
    if (call.maps()) {
      // Gradients have the layout of their maps.
      for (int i = 0; i < 2; ++i) gradients[i] = dense(gradients[i], layout_of(i == 0 ? *gamma : *beta));
    } else if (call.affine != Affine::kNone) {
      const auto totals = add_sums<A>(sums, {call.per_sample(), call.per_sample()});
      for (int i = 0; i < 2; ++i) copy_to(totals[1 - i], gradients[i]);
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
