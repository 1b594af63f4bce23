// SPN on the CPU: tensors, GEMMs, threads and the sums over tiles. spn_kernels.h has the arithmetic per pixel.
//
// Work is cut by shape alone and partial sums are added in a fixed order, so results do not depend on the number of
// threads.

#include "cpu/spn.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/gemm.h"
#include "cpu/memory.h"
#include "cpu/moments.h"
#include "cpu/parallel.h"
#include "dispatch.h"

#define PIXNORM_VECTOR_CODE "cpu/spn_kernels.h"
#include "cpu/foreach_isa.h"
#include "cpu/statistics.h"

namespace pixnorm::spn {
namespace {

// ---- cutting the work ----

// A tile is several small images, one image, or some rows of a large one.
std::vector<Tile> tiles(const Shape& s, int64_t n0, int64_t n1) {
  constexpr int64_t kTilePixels = 2048;
  std::vector<Tile> result;
  const int64_t images = std::max<int64_t>(1, kTilePixels / s.pixels());
  const int64_t parts = std::clamp<int64_t>(s.pixels() / (2 * kTilePixels), 1, s.h);
  for (int64_t n = n0; n < n1; n += images) {
    for (int64_t part = 0; part < parts; ++part) {
      result.push_back({n, std::min(n + images, n1), s.h * part / parts, s.h * (part + 1) / parts});
    }
  }
  return result;
}

// Calls f(tile index, block, scratch) for every tile and block of channels.
template <class F>
void for_tiles(const Shape& s, const std::vector<Tile>& tiles, int64_t scratch_bytes, const F& f) {
  parallel_for(0, tiles.size() * s.blocks(), 1, [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(scratch_bytes);
    for (int64_t i = begin; i < end; ++i) f(i / s.blocks(), i % s.blocks(), scratch.data());
  });
}

// ---- the projection's GEMMs, on `count` images from a pointer ----

template <class T>
Matrices<T> as_matrices(T* data, const Shape& s, int64_t count) {
  return matrices_of(data, count, s.c, s.pixels(), s.channels_last);
}

// W, or its transpose, as it multiplies pixels.
template <class T>
PackedMatrix<T, T> packed_weight(const Shape& s, const std::vector<T>& weight, bool transposed) {
  const Matrices<const T> w{weight.data(), 1, s.c, s.c, 0, s.c, 1};
  return {transposed == s.channels_last ? w : w.transposed(), !s.channels_last};
}

// dW (+)= dp x^T
template <class T>
void add_grad_weight(const Shape& s, int64_t count, const T* dp, const T* x, acc_t<T>* dw, bool add) {
  const Matrices<acc_t<T>> out{dw, 1, s.c, s.c, 0, s.c, 1};
  const auto left = as_matrices(dp, s, count), right = as_matrices(x, s, count);
  s.channels_last ? gemm_sum<T>(out, left.transposed(), right, add) : gemm_sum<T>(out, left, right.transposed(), add);
}

// ---- arguments ----

// Parameters as given, in the order of the schema.
struct ParameterTensors {
  const Tensor &mask_projection, &mask_weight, &mask_bias;
  const Tensor* taps[4];

  void check(const Shape& s) const {
    check_sizes(mask_projection, "mask_projection", {s.c, s.c, 1, 1});
    check_sizes(mask_weight, "mask_weight", {s.c});
    check_sizes(mask_bias, "mask_bias", {s.c});
    for (const Tensor* t : taps) check_sizes(*t, "a depthwise weight", {s.c, 1, 3, 3});
  }
};

// Parameters and statistics; all upcast but the operand of matrix products.
template <class T>
struct Values {
  using A = acc_t<T>;
  std::vector<T> mask_projection;
  std::vector<A> mask_weight, mask_bias, taps[4];
  std::vector<A> mean, var, mask_mean, mask_var, rstd, mask_rstd;

  explicit Values(const ParameterTensors& given)
      : mask_projection(to_vector<T>(given.mask_projection)),
        mask_weight(to_vector<A>(given.mask_weight)),
        mask_bias(to_vector<A>(given.mask_bias)) {
    for (int i = 0; i < 4; ++i) taps[i] = to_vector<A>(*given.taps[i]);
  }

  void set_statistics(const Tensor (&given)[4]) {
    std::vector<A>* const to[4] = {&mean, &var, &mask_mean, &mask_var};
    for (int i = 0; i < 4; ++i) {
      check_sizes(given[i], "a statistic", {static_cast<int64_t>(mask_weight.size())});
      *to[i] = to_vector<A>(given[i]);
    }
  }

  Params<A> params(double eps) {
    const auto reciprocal_root = [eps](const std::vector<A>& v) {
      std::vector<A> result(v.size());
      std::transform(v.begin(), v.end(), result.begin(), [eps](A x) { return static_cast<A>(1 / std::sqrt(x + eps)); });
      return result;
    };
    rstd = reciprocal_root(var);
    mask_rstd = reciprocal_root(mask_var);
    return {mean.data(),
            rstd.data(),
            mask_mean.data(),
            mask_rstd.data(),
            mask_weight.data(),
            mask_bias.data(),
            {taps[0].data(), taps[1].data(), taps[2].data(), taps[3].data()},
            nullptr,
            nullptr,
            nullptr,
            nullptr};
  }
};

Shape shape_of(const Tensor& x, int64_t upsample, std::optional<double> negative_slope) {
  STD_TORCH_CHECK(x.dim() == 4, "pixnorm: x must be 4-D");
  STD_TORCH_CHECK(upsample == 1 || upsample == 2, "pixnorm: upsample must be 1 or 2");
  const bool channels_last = layout_of(x) == MemoryFormat::ChannelsLast;
  return {x.size(0), x.size(1), x.size(2), x.size(3), upsample, channels_last, Activation(negative_slope)};
}

// ---- forward ----

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T, int U>
void forward(const Shape& s, Values<T>& values, double eps, bool batch_statistics, const T* x, T* p, T* y) {
  using A = acc_t<T>;
  const int64_t per_chunk = images_per_chunk(s.n, s.image(), sizeof(T));
  const Activations shape{s.n, s.c, s.pixels(), s.channels_last};
  Statistics<T> of_x(shape, per_chunk), of_p(shape, per_chunk);
  const PackedMatrix<T, T> weight = packed_weight(s, values.mask_projection, false);
  for_large_items(ceil_div(s.n, per_chunk), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * per_chunk; n < std::min(end * per_chunk, s.n); n += per_chunk) {
      const int64_t count = std::min(per_chunk, s.n - n);
      if (batch_statistics) of_x.add(x, n, n + count);
      weight.multiply(as_matrices(p + n * s.image(), s, count), as_matrices(x + n * s.image(), s, count));
      if (batch_statistics) of_p.add(p, n, n + count);
    }
  });
  if (batch_statistics) {
    for (std::vector<A>* v : {&values.mean, &values.var, &values.mask_mean, &values.mask_var}) v->resize(s.c);
    of_x.finish(values.mean.data(), values.var.data());
    of_p.finish(values.mask_mean.data(), values.mask_var.data());
  }

  const Params<A> params = values.params(eps);
  const auto kernel = PIXNORM_BY_ISA(forward<T, U>);
  const std::vector<Tile> cut = tiles(s, 0, s.n);
  for_tiles(s, cut, baseline::block_scratch<baseline::ForwardBlock<A, U>>(s),
            [&](int64_t tile, int64_t block, void* scratch) { kernel(s, params, cut[tile], block, scratch, x, p, y); });
}

ForwardResult spn_fwd(const Tensor& x, const Tensor& mask_projection, const Tensor& mask_weight,
                      const Tensor& mask_bias, const Tensor& gamma_weight, const Tensor& gamma_weight_inv,
                      const Tensor& beta_weight, const Tensor& beta_weight_inv, const std::optional<Tensor>& mean,
                      const std::optional<Tensor>& var, const std::optional<Tensor>& mask_mean,
                      const std::optional<Tensor>& mask_var, double eps, int64_t upsample,
                      std::optional<double> negative_slope, bool) {
  const Shape s = shape_of(x, upsample, negative_slope);
  const ParameterTensors parameters{
      mask_projection, mask_weight, mask_bias, {&gamma_weight, &gamma_weight_inv, &beta_weight, &beta_weight_inv}};
  parameters.check(s);
  const bool given = mean.has_value();
  STD_TORCH_CHECK(var.has_value() == given && mask_mean.has_value() == given && mask_var.has_value() == given,
                  "pixnorm: give all four statistics or none");
  const MemoryFormat layout = layout_of(x);
  return dispatch_floating(x.scalar_type(), [&](auto type) -> ForwardResult {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor x_dense = dense(x, layout);
    const Tensor y = empty({s.n, s.c, s.h * upsample, s.w * upsample}, dtype_of<T>, layout);
    const Tensor p = empty({s.n, s.c, s.h, s.w}, dtype_of<T>, layout);
    Values<T> values(parameters);
    if (given) {
      values.set_statistics({*mean, *var, *mask_mean, *mask_var});
    } else {
      values.mean = values.var = values.mask_mean = values.mask_var = std::vector<A>(s.c);
    }
    if (x.numel() > 0) {
      const auto run = upsample == 2 ? forward<T, 2> : forward<T, 1>;
      run(s, values, eps, !given, data_of<T>(x_dense), static_cast<T*>(p.data_ptr()), static_cast<T*>(y.data_ptr()));
    }
    Tensor used[4];
    const std::vector<A>* const from[4] = {&values.mean, &values.var, &values.mask_mean, &values.mask_var};
    for (int i = 0; i < 4; ++i) copy_to(*from[i], used[i] = empty({s.c}, dtype_of<A>));
    return {y, p, used[0], used[1], used[2], used[3]};
  });
}

// ---- backward ----

// Gradients of the parameters, and the means that centre the gradients of x̂ and p̂.
template <class A>
struct Gradients {
  std::vector<A> mask_projection, mask_weight, mask_bias, taps[4];
  std::vector<A> mean_g, mean_gx, mean_q, mean_qp;

  explicit Gradients(const Shape& s) : mask_projection(s.c * s.c), mask_weight(s.c), mask_bias(s.c) {
    for (std::vector<A>& t : taps) t.resize(s.c * kTaps);
    for (std::vector<A>* v : {&mean_g, &mean_gx, &mean_q, &mean_qp}) v->resize(s.c);
  }

  // From the kSums sums of one channel.
  void set(int64_t c, const double* sums, const Params<A>& params, double centre) {
    double d_bn[2] = {0, 0};  // Σ dy γ x̂ and Σ dy γ, from the gradients of the taps
    for (int of = 0; of < 2; ++of) {
      const double* sum = sums + of * kSumsOf;
      for (int k = 0; k < kTaps; ++k) {
        const double with_mask = sum[kWithMask + k], with_inverse = sum_inside(sum, k) - with_mask;
        const int64_t i = c * kTaps + k;
        taps[2 * of][i] = static_cast<A>(with_mask);
        taps[2 * of + 1][i] = static_cast<A>(with_inverse);
        d_bn[of] += params.taps[0][i] * with_mask + params.taps[1][i] * with_inverse;
      }
    }
    mask_bias[c] = static_cast<A>(sums[kSumQ]);
    mask_weight[c] = static_cast<A>(sums[kSumQp]);
    mean_g[c] = static_cast<A>(d_bn[1] * centre);
    mean_gx[c] = static_cast<A>(d_bn[0] * centre);
    mean_q[c] = static_cast<A>(sums[kSumQ] * centre);
    mean_qp[c] = static_cast<A>(sums[kSumQp] * centre);
  }
};

template <class T, int U>
void backward(const Shape& s, Values<T>& values, Gradients<acc_t<T>>& gradients, double eps, bool training, const T* dy,
              const T* x, const T* p, T* dx) {
  using A = acc_t<T>;
  Params<A> params = values.params(eps);

  const std::vector<Tile> cut = tiles(s, 0, s.n);
  const int64_t sums_per_tile = s.blocks() * kSums * kBlock;
  std::vector<A> sums(cut.size() * sums_per_tile);
  const auto reduce = PIXNORM_BY_ISA(backward_reduce<T, U>);
  for_tiles(s, cut, baseline::block_scratch<baseline::BackwardBlock<A, U, false>>(s),
            [&](int64_t tile, int64_t block, void* scratch) {
              A* to = sums.data() + tile * sums_per_tile + block * kSums * kBlock;
              reduce(s, params, cut[tile], block, scratch, x, p, dy, to);
            });

  const double centre = training ? 1.0 / (s.n * s.pixels()) : 0;
  parallel_for(0, s.c, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double total[kSums] = {};
      for (size_t tile = 0; tile < cut.size(); ++tile) {
        const A* from = sums.data() + tile * sums_per_tile + c / kBlock * kSums * kBlock + c % kBlock;
        for (int i = 0; i < kSums; ++i) total[i] += from[i * kBlock];
      }
      gradients.set(c, total, params, centre);
    }
  });
  params.mean_g = gradients.mean_g.data();
  params.mean_gx = gradients.mean_gx.data();
  params.mean_q = gradients.mean_q.data();
  params.mean_qp = gradients.mean_qp.data();

  // dp is never stored whole: each chunk is consumed while it is in cache. Runs of chunks are given to threads, and
  // each adds up its part of dW; there are not so many that the parts are larger than x.
  constexpr int64_t kMostRuns = 16;
  const auto apply = PIXNORM_BY_ISA(backward_apply<T, U>);
  const PackedMatrix<T, T> weight = packed_weight(s, values.mask_projection, true);
  const int64_t per_chunk = images_per_chunk(s.n, s.image(), sizeof(T)), chunks = ceil_div(s.n, per_chunk);
  const int64_t runs = std::clamp<int64_t>(s.n * s.pixels() / s.c, 1, std::min(chunks, kMostRuns));
  const int64_t of_weight = s.c * s.c;
  const Buffer<A> parts((runs - 1) * of_weight);
  for_large_items(runs, [&](int64_t begin, int64_t end) {
    const Buffer<T> dp(per_chunk * s.image());
    for (int64_t i = begin; i < end; ++i) {
      A* const dw = i == 0 ? gradients.mask_projection.data() : parts.data() + (i - 1) * of_weight;
      const int64_t first = chunks * i / runs * per_chunk, last = std::min(chunks * (i + 1) / runs * per_chunk, s.n);
      for (int64_t n = first; n < last; n += per_chunk) {
        const int64_t count = std::min(per_chunk, last - n);
        const T* const x_chunk = x + n * s.image();
        T* const dx_chunk = dx + n * s.image();
        const std::vector<Tile> chunk = tiles(s, n, n + count);
        for_tiles(s, chunk, baseline::block_scratch<baseline::BackwardBlock<A, U, true>>(s),
                  [&](int64_t tile, int64_t block, void* scratch) {
                    apply(s, params, chunk[tile], block, scratch, x, p, dy, dx_chunk, dp.data(), n);
                  });
        weight.multiply(as_matrices(dx_chunk, s, count), as_matrices<const T>(dp.data(), s, count), {dx_chunk});
        add_grad_weight<T>(s, count, dp.data(), x_chunk, dw, n > first);
      }
    }
  });
  add_matrices<A>({gradients.mask_projection.data(), 1, s.c, s.c, 0, s.c, 1}, parts.data(), runs - 1);
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardResult spn_bwd(const Tensor& grad_y, const Tensor& x, const Tensor& mask_projection, const Tensor& mask_weight,
                       const Tensor& mask_bias, const Tensor& gamma_weight, const Tensor& gamma_weight_inv,
                       const Tensor& beta_weight, const Tensor& beta_weight_inv, const Tensor& p, const Tensor& mean,
                       const Tensor& var, const Tensor& mask_mean, const Tensor& mask_var, double eps, int64_t upsample,
                       std::optional<double> negative_slope, bool, bool training) {
  const Shape s = shape_of(x, upsample, negative_slope);
  const ParameterTensors parameters{
      mask_projection, mask_weight, mask_bias, {&gamma_weight, &gamma_weight_inv, &beta_weight, &beta_weight_inv}};
  parameters.check(s);
  check_sizes(grad_y, "grad_y", {s.n, s.c, s.h * upsample, s.w * upsample});
  check_sizes(p, "p", {s.n, s.c, s.h, s.w});
  check_same_dtype(grad_y, "grad_y", x);
  check_same_dtype(p, "p", x);
  const MemoryFormat layout = layout_of(x);
  return dispatch_floating(x.scalar_type(), [&](auto type) -> BackwardResult {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor x_dense = dense(x, layout), p_dense = dense(p, layout);
    const Tensor dy_dense = dense(grad_y, layout);
    const Tensor dx = empty({s.n, s.c, s.h, s.w}, dtype_of<T>, layout);
    Values<T> values(parameters);
    values.set_statistics({mean, var, mask_mean, mask_var});
    Gradients<A> gradients(s);
    if (x.numel() > 0) {
      const auto run = upsample == 2 ? backward<T, 2> : backward<T, 1>;
      run(s, values, gradients, eps, training, data_of<T>(dy_dense), data_of<T>(x_dense), data_of<T>(p_dense),
          static_cast<T*>(dx.data_ptr()));
    }
    const auto tensor = [&](const std::vector<A>& v, std::initializer_list<int64_t> sizes) {
      const Tensor t = empty(sizes, mask_weight.scalar_type());
      copy_to(v, t);
      return t;
    };
    return {dx,
            tensor(gradients.mask_projection, {s.c, s.c, 1, 1}),
            tensor(gradients.mask_weight, {s.c}),
            tensor(gradients.mask_bias, {s.c}),
            tensor(gradients.taps[0], {s.c, 1, 3, 3}),
            tensor(gradients.taps[1], {s.c, 1, 3, 3}),
            tensor(gradients.taps[2], {s.c, 1, 3, 3}),
            tensor(gradients.taps[3], {s.c, 1, 3, 3})};
  });
}

}  // namespace
}  // namespace pixnorm::spn

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) {
  m.impl("spn_fwd", TORCH_BOX(&pixnorm::spn::spn_fwd));
  m.impl("spn_bwd", TORCH_BOX(&pixnorm::spn::spn_bwd));
}
