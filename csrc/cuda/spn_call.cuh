// Host side of SPN's kernels: arguments, choice of the template instance, matrices.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <climits>
#include <initializer_list>
#include <optional>

#include "activation.h"
#include "check.h"
#include "cuda/gemm.cuh"
#include "cuda/instances.cuh"
#include "cuda/spn_walk.cuh"
#include "tensor.h"

namespace pixnorm::spn {
namespace {

// ---- arguments ----

inline Shape shape_of(const Tensor& x, int64_t upsample) {
  STD_TORCH_CHECK(x.dim() == 4, "pixnorm: x must be 4-D");
  STD_TORCH_CHECK(upsample == 1 || upsample == 2, "pixnorm: upsample must be 1 or 2");
  // Offsets within an image of y, the number of strips and matrix sizes are 32-bit; everything else is 64-bit.
  constexpr int64_t kMost = INT_MAX;
  STD_TORCH_CHECK(
      x.size(1) * x.size(2) * x.size(3) <= kMost / (upsample * upsample) && x.size(0) * x.size(2) * x.size(3) <= kMost,
      "pixnorm: an image, or the pixels of a channel, are more than 2^31");
  return {static_cast<int>(x.size(0)), static_cast<int>(x.size(1)), static_cast<int>(x.size(2)),
          static_cast<int>(x.size(3))};
}

// Parameters in the order of the schema, dense.
struct ParameterTensors {
  Tensor mask_projection, mask_weight, mask_bias, taps[4];
  std::optional<Tensor> rows[2], index;
  int64_t groups, masks, kernel_size;

  ParameterTensors(const Shape& s, const Tensor& projection, const Tensor& weight, const Tensor& bias,
                   std::array<const Tensor*, 4> kernels, std::array<const std::optional<Tensor>*, 2> row_tensors,
                   const std::optional<Tensor>& sample_groups)
      : mask_projection(dense(projection)), mask_weight(dense(weight)), mask_bias(dense(bias)) {
    masks = projection.dim() > 0 && projection.size(0) == 1 ? 1 : s.c;
    kernel_size = kernels[0]->dim() > 0 ? kernels[0]->size(-1) : 0;
    STD_TORCH_CHECK(kernel_size == 1 || kernel_size == 3 || kernel_size == 5, "pixnorm: kernel sizes are 1, 3 and 5");
    check_sizes(projection, "mask_projection", {masks, s.c, 1, 1});
    groups = sample_groups && weight.dim() > 0 ? weight.size(0) : 1;
    const auto check = [&](const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
      sample_groups ? check_sizes_of_groups(t, name, groups, sizes) : check_sizes(t, name, sizes);
    };
    check(weight, "mask_weight", {masks});
    check(bias, "mask_bias", {masks});
    for (int i = 0; i < 4; ++i) {
      check(*kernels[i], "a depthwise weight", {s.c, 1, kernel_size, kernel_size});
      taps[i] = dense(*kernels[i]);
    }
    for (int i = 0; i < 2; ++i) {
      if (!*row_tensors[i]) continue;
      check_sizes(**row_tensors[i], "a row", {s.n, s.c});
      rows[i] = dense(**row_tensors[i]);
    }
    if (sample_groups) {
      STD_TORCH_CHECK(sample_groups->scalar_type() == ScalarType::Long, "pixnorm: index must be of int64");
      check_sizes(*sample_groups, "index", {s.n});
      STD_TORCH_CHECK(groups > 0, "pixnorm: there is no group");
      index = dense(*sample_groups);
    }
    STD_TORCH_CHECK(
        groups * s.c * kernel_size * kernel_size <= INT_MAX && (!per_sample() || int64_t{s.n} * s.c <= INT_MAX),
        "pixnorm: a parameter has more than 2^31 elements");
  }

  bool per_sample() const { return index || rows[0] || rows[1]; }
  // Whether spn_general.cu has the kernels.
  bool general(const Shape& s) const { return kernel_size != 3 || masks != s.c; }

  template <class T>
  void set_up(Call<T>& call, const Shape& s, double eps, std::optional<double> negative_slope, const Tensor& x,
              const Tensor& p) const {
    call.shape = s;
    const Activation activation(negative_slope);
    call.activated = activation.on;
    call.slope = static_cast<acc_t<T>>(activation.slope);
    call.eps = static_cast<acc_t<T>>(eps);
    call.x = data_of<T>(x);
    call.p = data_of<T>(p);
    const auto parameter = [](const Tensor& t) {
      const bool wide = t.scalar_type() == dtype_of<acc_t<T>>;
      STD_TORCH_CHECK(wide || t.scalar_type() == dtype_of<T>, "pixnorm: a parameter has the wrong dtype");
      return Parameter<T>{t.data_ptr(), wide};
    };
    call.mask_weight = parameter(mask_weight);
    call.mask_bias = parameter(mask_bias);
    for (int i = 0; i < 4; ++i) call.taps[i] = parameter(taps[i]);
    for (int i = 0; i < 2; ++i) call.rows[i] = rows[i] ? parameter(*rows[i]) : Parameter<T>{};
    call.index = index ? data_of<int64_t>(*index) : nullptr;
    call.groups = static_cast<int>(groups);
    call.masks = static_cast<int>(masks);
    call.kernel_size = static_cast<int>(kernel_size);
    call.per_sample = per_sample();
  }
};

// A vector of statistics in the accumulation dtype.
template <class A>
Tensor statistic(const Tensor& t, int64_t channels) {
  check_sizes(t, "a statistic", {channels});
  return dense(in_dtype(t, dtype_of<A>));
}

// ---- choice of the template instance ----

constexpr int kMaxSplits = 64;  // partial sums per channel (or one per sample) that a later kernel adds up

// Columns of x per thread: in NCHW 16 bytes of y, or one column where width or alignment rule that out.
template <class T, int U, bool kChannelsLast>
constexpr int kColumns = std::is_same_v<T, double> ? 1
                         : kChannelsLast           ? 4 / U
                                                   : static_cast<int>(16 / sizeof(T)) / U;

template <class T, int U, bool kChannelsLast, class F>
void dispatch_columns(const Shape& s, std::initializer_list<const void*> like_x, const void* like_y, const F& f) {
  constexpr int kMost = kColumns<T, U, kChannelsLast>;
  bool fits = s.w % kMost == 0;
  if (!kChannelsLast) {
    for (const void* data : like_x) fits = fits && is_aligned(data, kMost * sizeof(T));
    fits = fits && is_aligned(like_y, U * kMost * sizeof(T));
  }
  kMost > 1 && fits ? f(Int<kMost>{}) : f(Int<1>{});
}

inline Launch launch_of(const Plan& plan, size_t shared_bytes, cudaStream_t stream) {
  return {dim3(plan.blocks * plan.samples, plan.splits), dim3(plan.threads), shared_bytes, stream};
}

// ---- operands of the projection's GEMMs ----

// Activations, or masks, as matrices: a batch of (C, HW) in NCHW, one (N HW, C) in channels_last.
inline Matrices as_matrices(const Tensor& t, const Shape& s, bool channels_last) {
  const int64_t pixels = s.pixels(), c = t.size(1);
  if (channels_last) return {t.data_ptr(), t.scalar_type(), 1, s.n * pixels, c, 0, c, 1};
  return {t.data_ptr(), t.scalar_type(), s.n, c, pixels, c * pixels, pixels, 1};
}

inline Matrices as_matrix(const Tensor& weight, const Shape& s) {
  return {weight.data_ptr(), weight.scalar_type(), 1, weight.size(0), s.c, 0, s.c, 1};
}

inline Matrices repeated(Matrices m, int64_t batch) {
  m.batch = batch;
  return m;
}

}  // namespace
}  // namespace pixnorm::spn
