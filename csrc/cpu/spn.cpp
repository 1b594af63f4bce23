// SPN's forward on the CPU: products and threads. spn_call.h has the arguments, spn_kernels.h the arithmetic per pixel.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/moments.h"
#include "cpu/spn_call.h"

#define PIXNORM_VECTOR_CODE "cpu/moments_kernels.h"
#include "cpu/foreach_isa.h"
#include "cpu/statistics.h"

namespace pixnorm::spn {
namespace {

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
void forward(const Shape& s, Values<T>& values, double eps, bool batch_statistics, const T* x, T* p, T* y) {
  using A = acc_t<T>;
  const int64_t per_chunk = images_per_chunk(s.n, s.image(), sizeof(T));
  Statistics<T> of_x({s.n, s.c, s.pixels(), s.channels_last}, per_chunk);
  Statistics<T> of_p({s.n, s.masks, s.pixels(), s.channels_last && !s.one_mask()}, per_chunk);
  const PackedMatrix<T, T> weight = packed_weight(s, values.mask_projection, false);
  for_large_items(ceil_div(s.n, per_chunk), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * per_chunk; n < std::min(end * per_chunk, s.n); n += per_chunk) {
      const int64_t count = std::min(per_chunk, s.n - n);
      T* const p_chunk = p + n * s.masks * s.pixels();
      if (batch_statistics) of_x.add(x, n, n + count);
      weight.multiply(as_matrices(p_chunk, s, count, s.masks), as_matrices(x + n * s.image(), s, count, s.c));
      if (batch_statistics) of_p.add(p, n, n + count);
    }
  });
  if (batch_statistics) {
    of_x.finish(values.mean.data(), values.var.data());
    of_p.finish(values.mask_mean.data(), values.mask_var.data());
  }

  const Params<A> params = values.params(eps);
  const std::vector<Tile> cut = tiles(s, 0, s.n);
  for_tiles(s, cut, values.kernels.forward_scratch(s), [&](int64_t tile, int64_t block, void* scratch) {
    values.kernels.forward(s, params, cut[tile], block, scratch, x, p, y);
  });
}

ForwardResult spn_fwd(const Tensor& x, const Tensor& mask_projection, const Tensor& mask_weight,
                      const Tensor& mask_bias, const Tensor& gamma_weight, const Tensor& gamma_weight_inv,
                      const Tensor& beta_weight, const Tensor& beta_weight_inv, const OptionalTensor& gamma_bias,
                      const OptionalTensor& beta_bias, const OptionalTensor& index, const OptionalTensor& mean,
                      const OptionalTensor& var, const OptionalTensor& mask_mean, const OptionalTensor& mask_var,
                      double eps, int64_t upsample, std::optional<double> negative_slope, bool) {
  const Shape s = shape_of(x, mask_projection, upsample, negative_slope);
  const Arguments arguments(mask_projection, mask_weight, mask_bias, gamma_weight, gamma_weight_inv, beta_weight,
                            beta_weight_inv, gamma_bias, beta_bias, index);
  arguments.check(s);
  const bool given = mean.has_value();
  STD_TORCH_CHECK(var.has_value() == given && mask_mean.has_value() == given && mask_var.has_value() == given,
                  "pixnorm: give all four statistics or none");
  const MemoryFormat layout = layout_of(x);
  return dispatch_floating(x.scalar_type(), [&](auto type) -> ForwardResult {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor x_dense = dense(x, layout);
    const Tensor y = empty({s.n, s.c, s.h * upsample, s.w * upsample}, dtype_of<T>, layout);
    const Tensor p = empty({s.n, s.masks, s.h, s.w}, dtype_of<T>, s.one_mask() ? MemoryFormat::Contiguous : layout);
    Values<T> values(s, arguments);
    if (given) values.set_statistics({*mean, *var, *mask_mean, *mask_var});
    if (x.numel() > 0) {
      forward<T>(s, values, eps, !given, data_of<T>(x_dense), static_cast<T*>(p.data_ptr()),
                 static_cast<T*>(y.data_ptr()));
    }
    Tensor used[4];
    const std::vector<A>* const from[4] = {&values.mean, &values.var, &values.mask_mean, &values.mask_var};
    for (int i = 0; i < 4; ++i) {
      copy_to(*from[i], used[i] = empty({static_cast<int64_t>(from[i]->size())}, dtype_of<A>));
    }
    return {y, p, used[0], used[1], used[2], used[3]};
  });
}

}  // namespace
}  // namespace pixnorm::spn

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) { m.impl("spn_fwd", TORCH_BOX(&pixnorm::spn::spn_fwd)); }
