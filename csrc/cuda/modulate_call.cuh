// Host side of modulated norm's kernels: arguments, and the choice of the template instance.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <climits>
#include <optional>

#include "activation.h"
#include "check.h"
#include "cuda/instances.cuh"
#include "cuda/modulate_walk.cuh"
#include "tensor.h"

namespace pixnorm::modulate {
namespace {

inline Tensor aligned(const Tensor& t) { return is_aligned(t.data_ptr(), 16) ? t : torch::stable::clone(t); }

// x, gamma and beta, checked and dense.
struct Arguments {
  int n, c, h, w, upsample;
  bool instance, channels_last;
  MemoryFormat layout;
  Tensor x;
  std::optional<Tensor> gamma, beta;
  bool rows = false, maps = false;

  Arguments(const Tensor& x_, const std::optional<Tensor>& gamma_, const std::optional<Tensor>& beta_, bool instance_,
            int64_t upsample_)
      : instance(instance_) {
    STD_TORCH_CHECK(x_.dim() == 4, "pixnorm: x must be 4-D");
    STD_TORCH_CHECK(upsample_ == 1 || upsample_ == 2, "pixnorm: upsample must be 1 or 2");
    STD_TORCH_CHECK(gamma_.has_value() == beta_.has_value(), "pixnorm: give both gamma and beta, or neither");
    // Offsets within an image of y, and indices of planes, are 32-bit; everything else is 64-bit.
    constexpr int64_t kMost = INT_MAX;
    STD_TORCH_CHECK(x_.size(1) * x_.size(2) * x_.size(3) <= kMost / (upsample_ * upsample_) &&
                        x_.size(0) * x_.size(1) <= kMost && x_.size(0) <= kMost / kMaxChunks,
                    "pixnorm: the elements of an image, or the planes, are more than 2^31");
    n = static_cast<int>(x_.size(0)), c = static_cast<int>(x_.size(1));
    h = static_cast<int>(x_.size(2)), w = static_cast<int>(x_.size(3));
    upsample = static_cast<int>(upsample_);
    layout = layout_of(x_);
    channels_last = layout == MemoryFormat::ChannelsLast;
    x = dense(x_, layout);
    if (!gamma_) return;
    STD_TORCH_CHECK(gamma_->scalar_type() == beta_->scalar_type(), "pixnorm: gamma and beta must have one dtype");
    rows = gamma_->dim() == 2, maps = gamma_->dim() == 4;
    for (const auto* given : {&*gamma_, &*beta_}) {
      if (maps) {
        check_sizes(*given, "a map", {n, c, int64_t{h} * upsample, int64_t{w} * upsample});
        check_same_dtype(*given, "a map", x);
      } else if (rows) {
        check_sizes(*given, "gamma or beta", {n, c});
      } else {
        check_sizes(*given, "gamma or beta", {c});
      }
    }
    const MemoryFormat of_affine = maps ? layout : MemoryFormat::Contiguous;
    // Misaligned ones must not change how work is cut, and with it the order of sums.
    gamma = aligned(dense(*gamma_, of_affine));
    beta = aligned(dense(*beta_, of_affine));
  }

  int64_t numel() const { return int64_t{n} * c * h * w; }
  int64_t statistics() const { return instance ? int64_t{n} * c : c; }

  template <class T>
  void set_up(Call<T>& call, double eps, double gamma_offset, std::optional<double> negative_slope) const {
    using A = acc_t<T>;
    const Activation activation(negative_slope);
    call.activated = activation.on;
    call.slope = static_cast<A>(activation.slope);
    call.eps = static_cast<A>(eps);
    call.offset = static_cast<A>(gamma_offset);
    call.x = data_of<T>(x);
    call.affine = gamma.has_value() && !maps;
    call.rows = rows;
    if (maps) {
      call.gamma_map = data_of<T>(*gamma);
      call.beta_map = data_of<T>(*beta);
    } else if (gamma) {
      const bool wide = gamma->scalar_type() == dtype_of<A>;
      STD_TORCH_CHECK(wide || gamma->scalar_type() == dtype_of<T>, "pixnorm: gamma has the wrong dtype");
      call.gamma = {gamma->data_ptr(), wide};
      call.beta = {beta->data_ptr(), wide};
    }
  }

  template <class T>
  Plan plan(int vector) const {
    return plan_for(n, c, h, w, channels_last, instance, vector, sizeof(T));
  }

  // Statistics in the accumulation dtype.
  template <class A>
  Tensor statistic(const Tensor& t) const {
    instance ? check_sizes(t, "a statistic", {n, c}) : check_sizes(t, "a statistic", {c});
    return dense(in_dtype(t, dtype_of<A>));
  }
};

// Elements of x per vector: 16 bytes of x in channels_last, of y in NCHW.
template <class T, int U, bool kChannelsLast>
constexpr int kVector = static_cast<int>(16 / sizeof(T)) / (kChannelsLast ? 1 : U);

// f(Int<V>, Int<U>, Bool<channels_last>); single elements where size or alignment rule out vectors, and for double.
// Single elements have one instance for both layouts.
template <class T, class F>
void dispatch_instance(const Arguments& in, const F& f) {
  dispatch_layout(in.channels_last, in.upsample, [&](auto last, auto u) {
    if constexpr (!std::is_same_v<T, double>) {
      constexpr int kMost = kVector<T, u(), last()>;
      const int along = last() ? in.c : u() == 2 ? in.w : in.h * in.w;
      if (along % kMost == 0 && is_aligned(in.x.data_ptr(), kMost * sizeof(T))) return f(Int<kMost>{}, u, last);
    }
    f(Int<1>{}, u, Bool<true>{});
  });
}

inline Launch launch_of(const Plan& plan, int blocks, size_t shared_bytes, cudaStream_t stream) {
  return {dim3(blocks, plan.splits), dim3(plan.threads), shared_bytes, stream};
}

}  // namespace
}  // namespace pixnorm::modulate
