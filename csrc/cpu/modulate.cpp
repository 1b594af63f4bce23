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
  int64_t groups() const { return instance ? n : 1; }  // of statistics
  int64_t statistics() const { return groups() * c; }
  int64_t samples() const { return instance ? 1 : n; }  // of a group
  bool per_sample() const { return affine == Affine::kRows; }
};

// ---- cutting the work ----

// Images are cut into pieces, and grouped into units, whose statistics depend on nothing else: the pieces of some
// channels of a group of samples. If a unit fits in the L2 cache it is resident: one thread takes it through all
// passes, so that memory is read once. Otherwise all threads go through the pieces, pass by pass.
//
// A piece is contiguous: in channels_last it has all channels, and in NCHW several channels only if planes are small
// and whole, so that what is done once per piece does not count.
struct Plan {
  int64_t block, blocks;      // channels of a piece
  int64_t part_rows, parts;   // rows of a piece
  int64_t grain, unit_grain;  // pieces and units that are worth a thread
  bool resident;

  // `elements`: of what the passes over a channel of an image have in common; of `element` bytes each.
  Plan(const Call& call, int64_t elements, int64_t element) {
    const Shape& s = call.shape;
    // Sums over a part are in float32.
    constexpr int64_t kPixels = 4096, kPixelsOfAllChannels = 256, kGrain = 1 << 14;
    part_rows = std::clamp<int64_t>((s.channels_last ? kPixelsOfAllChannels : kPixels) / s.w, 1, s.h);
    parts = ceil_div(s.h, part_rows);
    constexpr int64_t kRunBytes = 1 << 12, kResidentBytes = 1 << 20, kEnoughUnits = 8;
    const int64_t run = s.pixels() * s.upsample * s.upsample * element;
    const int64_t most = std::min(call.c, ceil_div(call.statistics(), kEnoughUnits));
    block = s.channels_last ? call.c : parts > 1 ? 1 : std::clamp<int64_t>(kRunBytes / run, 1, most);
    blocks = ceil_div(call.c, block);
    grain = ceil_div(kGrain, part_rows * s.w * block);
    unit_grain = ceil_div(kGrain, call.samples() * block * s.pixels());
    resident = call.groups() * blocks >= kEnoughUnits && call.samples() * block * elements * element <= kResidentBytes;
  }
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

  int64_t channels(int64_t block) const { return std::min(plan.block, call.c - block * plan.block); }

  Coefficients<A> coefficients(int64_t n, int64_t block) const {
    const int64_t c0 = block * plan.block;
    const int64_t at = (call.instance ? n * call.c : 0) + c0, row = (call.per_sample() ? n * call.c : 0) + c0;
    return {mean.data() + at,   rstd.data() + at,     gamma.data() + row,          beta.data() + row,
            centre.data() + at, centre_x.data() + at, static_cast<A>(call.offset), static_cast<A>(call.slope)};
  }

  Piece<T> piece(int64_t n, int64_t block, int64_t part) const {
    const Shape& s = call.shape;
    const int64_t h = part * plan.part_rows;
    const int64_t at = n * s.elements() + block * plan.block * s.pixels() + h * s.row();
    const int64_t up = at * s.upsample * s.upsample;
    const auto moved = [](auto* t, int64_t by) { return t ? t + by : t; };
    return {channels(block),           std::min(plan.part_rows, s.h - h),
            moved(tensors.x, at),      moved(tensors.gamma, up),
            moved(tensors.beta, up),   moved(tensors.dy, up),
            moved(tensors.y, up),      moved(tensors.dx, at),
            moved(tensors.dgamma, up), moved(tensors.dbeta, up)};
  }

  // Calls f(sample, block, part, scratch) for all pieces.
  template <class F>
  void for_pieces(const F& f) const {
    parallel_for(0, call.n * plan.blocks * plan.parts, plan.grain, [&](int64_t begin, int64_t end) {
      const Buffer<A> scratch(baseline::scratch_of(call.shape));
      for (int64_t i = begin; i < end; ++i) {
        f(i / plan.parts / plan.blocks, i / plan.parts % plan.blocks, i % plan.parts, scratch.data());
      }
    });
  }

  // Calls f(group, block, scratch, moments of each channel of the unit and of a sample of it) for all units.
  template <class F>
  void for_units(const F& f) const {
    parallel_for(0, call.groups() * plan.blocks, plan.unit_grain, [&](int64_t begin, int64_t end) {
      const Buffer<A> scratch(baseline::scratch_of(call.shape) + 3 * call.c);
      const Buffer<Moments> moments(2 * plan.block);
      for (int64_t i = begin; i < end; ++i) f(i / plan.blocks, i % plan.blocks, scratch.data(), moments.data());
    });
  }

  // Calls f(sample, part) for the pieces of a unit.
  template <class F>
  void for_pieces_of(int64_t group, const F& f) const {
    for (int64_t n = group * call.samples(); n < (group + 1) * call.samples(); ++n) {
      for (int64_t part = 0; part < plan.parts; ++part) f(n, part);
    }
  }
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
  const Shape& s = call.shape;
  const int64_t pixels = s.pixels(), samples = call.samples(), channels = work.channels(block);
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
  const Call& call = work.call;
  const auto kernel = dispatch_kind(call, [](auto channels_last, auto maps) {
    return PIXNORM_BY_ISA(forward<T, decltype(channels_last)::value, decltype(maps)::value>);
  });
  const auto normalise = [&](int64_t n, int64_t block, int64_t part, acc_t<T>* scratch) {
    kernel(call.shape, work.coefficients(n, block), work.piece(n, block, part), scratch);
  };
  if (!given && work.plan.resident) {
    work.for_units([&](int64_t group, int64_t block, acc_t<T>* scratch, Moments* moments) {
      set_statistics(work, group, block, scratch, moments);
      work.for_pieces_of(group, [&](int64_t n, int64_t part) { normalise(n, block, part, scratch); });
    });
    return;
  }
  if (!given) {
    Statistics<T> found({call.n, call.c, call.h * call.w, call.shape.channels_last, call.instance}, call.n);
    found.add(work.tensors.x, 0, call.n);
    found.finish(work.mean.data(), work.var.data());
  }
  work.set_rstd(0, call.statistics());
  work.for_pieces(normalise);
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

// Partial sums of each part of each image, [image][part][2][channels].
struct Sums {
  const Call& call;
  const Plan& plan;
  Buffer<double> data;

  Sums(const Call& call, const Plan& plan) : call(call), plan(plan), data(call.n * plan.parts * 2 * call.c) {}

  double* of(int64_t n, int64_t part, int which) const {
    return data.data() + ((n * plan.parts + part) * 2 + which) * call.c;
  }
};

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
    work.for_pieces_of(group, [&](int64_t n, int64_t part) {
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
  const Call& call = work.call;
  const Plan& plan = work.plan;
  const auto reduce_kernel = dispatch_kind(call, [](auto channels_last, auto maps) {
    return PIXNORM_BY_ISA(backward_reduce<T, decltype(channels_last)::value, decltype(maps)::value>);
  });
  const auto apply_kernel = dispatch_kind(call, [](auto channels_last, auto maps) {
    return PIXNORM_BY_ISA(backward_apply<T, decltype(channels_last)::value, decltype(maps)::value>);
  });
  const auto reduce = [&](int64_t n, int64_t block, int64_t part, acc_t<T>* scratch) {
    const int64_t c0 = block * plan.block;
    reduce_kernel(call.shape, work.coefficients(n, block), work.piece(n, block, part), scratch,
                  {sums.of(n, part, 0) + c0, sums.of(n, part, 1) + c0});
  };
  const auto apply = [&](int64_t n, int64_t block, int64_t part, acc_t<T>* scratch) {
    apply_kernel(call.shape, work.coefficients(n, block), work.piece(n, block, part), scratch);
  };
  if (!centred) {
    work.for_pieces([&](int64_t n, int64_t block, int64_t part, acc_t<T>* scratch) {
      reduce(n, block, part, scratch);
      apply(n, block, part, scratch);
    });
  } else if (plan.resident) {
    work.for_units([&](int64_t group, int64_t block, acc_t<T>* scratch, Moments*) {
      const int64_t c0 = block * plan.block;
      work.for_pieces_of(group, [&](int64_t n, int64_t part) { reduce(n, block, part, scratch); });
      set_centre(work, sums, group, c0, c0 + work.channels(block));
      work.for_pieces_of(group, [&](int64_t n, int64_t part) { apply(n, block, part, scratch); });
    });
  } else {
    work.for_pieces(reduce);
    constexpr int64_t kChannels = 64;
    const int64_t blocks = ceil_div(call.c, kChannels);
    parallel_for(0, call.groups() * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c0 = i % blocks * kChannels;
        set_centre(work, sums, i / blocks, c0, std::min(c0 + kChannels, call.c));
      }
    });
    work.for_pieces(apply);
  }
}

// The gradients of rows or vectors: gradients[0] of gamma, [1] of beta.
template <class A>
void add_sums(const Sums& sums, std::vector<A> (&gradients)[2]) {
  const Call& call = sums.call;
  for (std::vector<A>& gradient : gradients) gradient.assign((call.per_sample() ? call.n : 1) * call.c, 0);
  parallel_for(0, call.c, 64, [&](int64_t begin, int64_t end) {
    for (int of = 0; of < 2; ++of) {
      std::vector<double> total(end - begin, 0);
      const auto give = [&](int64_t row) {
        std::copy(total.begin(), total.end(), gradients[1 - of].begin() + row * call.c + begin);
      };
      for (int64_t n = 0; n < call.n; ++n) {
        for (int64_t part = 0; part < sums.plan.parts; ++part) {
          const double* from = sums.of(n, part, of);
          for (int64_t c = begin; c < end; ++c) total[c - begin] += from[c];
        }
        if (!call.per_sample()) continue;
        give(n);
        std::fill(total.begin(), total.end(), 0.0);
      }
      if (!call.per_sample()) give(0);
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
