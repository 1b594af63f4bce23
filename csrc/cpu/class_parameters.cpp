// The parameters of the classes of a batch on the CPU, see pixnorm/ops/class_parameters.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "dispatch.h"

namespace pixnorm::class_parameters {
namespace {

constexpr int kKernels = 4;

struct Shape {
  int64_t groups, classes, masks, channels, size;  // kernels are size x size

  int64_t taps() const { return size * size; }
};

// Two tables of the mask, four kernels and their scale.
using Learnt = std::array<Tensor, 3 + kKernels>;
constexpr int kScale = 2 + kKernels;

Shape shape_of(const Tensor& classes, const Learnt& learnt) {
  STD_TORCH_CHECK(classes.dim() == 1 && classes.scalar_type() == ScalarType::Long,
                  "pixnorm: classes must be 1-D, of int64");
  STD_TORCH_CHECK(learnt[0].dim() == 2 && learnt[2].dim() == 4, "pixnorm: tables must be 2-D, kernels 4-D");
  const Shape s{classes.size(0), learnt[0].size(0), learnt[0].size(1), learnt[2].size(0), learnt[2].size(2)};
  STD_TORCH_CHECK(s.size == 1 || s.size == 3 || s.size == 5, "pixnorm: kernels must be of size 1, 3 or 5");
  for (int i = 0; i < kScale; ++i) {
    if (i < 2) {
      check_sizes(learnt[i], "a table", {s.classes, s.masks});
    } else {
      check_sizes(learnt[i], "a kernel", {s.channels, 1, s.size, s.size});
    }
    check_same_dtype(learnt[i], "a parameter", learnt[kScale]);
  }
  check_sizes(learnt[kScale], "kernel_scale", {s.classes, kKernels, s.channels});
  return s;
}

std::vector<int64_t> to_indices(const Shape& s, const Tensor& classes) {
  const Tensor from = dense(classes);
  const int64_t* data = data_of<int64_t>(from);
  for (int64_t g = 0; g < s.groups; ++g) {
    STD_TORCH_CHECK(data[g] >= 0 && data[g] < s.classes, "pixnorm: classes must be in [0, ", s.classes, ")");
  }
  return {data, data + s.groups};
}

template <size_t n>
std::array<Tensor, n> made_dense(std::array<Tensor, n> tensors) {
  for (Tensor& t : tensors) t = dense(t);
  return tensors;
}

template <class T>
T* to(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

using Formed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Formed class_parameters_fwd(const Tensor& classes, const Tensor& mask_weight, const Tensor& mask_bias,
                            const Tensor& gamma, const Tensor& gamma_inv, const Tensor& beta, const Tensor& beta_inv,
                            const Tensor& scale, const Tensor& shift) {
  const Learnt learnt{mask_weight, mask_bias, gamma, gamma_inv, beta, beta_inv, scale};
  const Shape s = shape_of(classes, learnt);
  check_sizes(shift, "kernel_shift", {s.classes, kKernels, s.channels});
  check_same_dtype(shift, "kernel_shift", scale);
  const std::vector<int64_t> of_group = to_indices(s, classes);
  return dispatch_floating(scale.scalar_type(), [&](auto type) -> Formed {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const auto rows = [&] { return empty({s.groups, s.masks}, dtype_of<T>); };
    const auto kernels = [&] { return empty({s.groups, s.channels, 1, s.size, s.size}, dtype_of<T>); };
    const std::array<Tensor, kScale> formed{rows(), rows(), kernels(), kernels(), kernels(), kernels()};
    const Learnt from = made_dense(learnt);
    const Tensor shifts = dense(shift);
    for (int i = 0; i < 2; ++i) {
      for (int64_t g = 0; g < s.groups; ++g) {
        std::copy_n(data_of<T>(from[i]) + of_group[g] * s.masks, s.masks, to<T>(formed[i]) + g * s.masks);
      }
    }
    parallel_for(0, kKernels * s.groups, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t kernel = i / s.groups, g = i % s.groups;
        const int64_t row = (of_group[g] * kKernels + kernel) * s.channels;
        const T *weight = data_of<T>(from[2 + kernel]), *scales = data_of<T>(from[kScale]) + row;
        T* out = to<T>(formed[2 + kernel]) + g * s.channels * s.taps();
        for (int64_t c = 0; c < s.channels; ++c) {
          const A by = scales[c], plus = data_of<T>(shifts)[row + c];
          for (int64_t tap = 0; tap < s.taps(); ++tap) *out++ = static_cast<T>(by * static_cast<A>(*weight++) + plus);
        }
      }
    });
    return {formed[0], formed[1], formed[2], formed[3], formed[4], formed[5]};
  });
}

// The groups of class k are order[first[k]] to order[first[k + 1]], in their own order.
struct Groups {
  std::vector<int64_t> first, order;

  Groups(int64_t classes, const std::vector<int64_t>& of_group) : first(classes + 1), order(of_group.size()) {
    for (const int64_t k : of_group) ++first[k + 1];
    for (int64_t k = 0; k < classes; ++k) first[k + 1] += first[k];
    std::vector<int64_t> next(first);
    for (size_t g = 0; g < of_group.size(); ++g) order[next[of_group[g]]++] = static_cast<int64_t>(g);
  }
};

template <class T>
void add_rows(const Shape& s, const Groups& groups, const T* grad, T* grad_table) {
  std::vector<acc_t<T>> total(s.masks);
  for (int64_t k = 0; k < s.classes; ++k) {
    std::fill(total.begin(), total.end(), 0);
    for (int64_t i = groups.first[k]; i < groups.first[k + 1]; ++i) {
      for (int64_t c = 0; c < s.masks; ++c) total[c] += static_cast<acc_t<T>>(grad[groups.order[i] * s.masks + c]);
    }
    std::transform(total.begin(), total.end(), grad_table + k * s.masks, [](auto v) { return static_cast<T>(v); });
  }
}

// The gradients of one kernel, and of its rows in the tables, for channels [begin, end).
template <class T, int kTaps>
void backward(const Shape& s, const Groups& groups, int64_t kernel, int64_t begin, int64_t end, const T* grad,
              const T* weight, const T* scale, T* grad_weight, T* grad_scale, T* grad_shift) {
  using A = acc_t<T>;
  const int64_t count = end - begin;
  std::vector<double> of_weight(count * kTaps);
  std::vector<A> of_scale(count), of_shift(count);
  for (int64_t k = 0; k < s.classes; ++k) {
    const int64_t row = (k * kKernels + kernel) * s.channels + begin;
    std::fill(of_scale.begin(), of_scale.end(), A(0));
    std::fill(of_shift.begin(), of_shift.end(), A(0));
    for (int64_t i = groups.first[k]; i < groups.first[k + 1]; ++i) {
      const T* from = grad + (groups.order[i] * s.channels + begin) * kTaps;
      for (int64_t c = 0; c < count; ++c) {
        const A by = scale[row + c];
        A by_weight = 0, sum = 0;
        for (int64_t tap = 0; tap < kTaps; ++tap) {
          const A d = from[c * kTaps + tap];
          by_weight += d * static_cast<A>(weight[(begin + c) * kTaps + tap]);
          sum += d;
          of_weight[c * kTaps + tap] += d * by;
        }
        of_scale[c] += by_weight;
        of_shift[c] += sum;
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      grad_scale[row + c] = static_cast<T>(of_scale[c]);
      grad_shift[row + c] = static_cast<T>(of_shift[c]);
    }
  }
  for (int64_t i = 0; i < count * kTaps; ++i) grad_weight[begin * kTaps + i] = static_cast<T>(of_weight[i]);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients class_parameters_grad(const Tensor& grad_mask_weight, const Tensor& grad_mask_bias, const Tensor& grad_gamma,
                                const Tensor& grad_gamma_inv, const Tensor& grad_beta, const Tensor& grad_beta_inv,
                                const Tensor& classes, const Tensor& mask_weight, const Tensor& mask_bias,
                                const Tensor& gamma, const Tensor& gamma_inv, const Tensor& beta,
                                const Tensor& beta_inv, const Tensor& scale) {
  const Learnt learnt{mask_weight, mask_bias, gamma, gamma_inv, beta, beta_inv, scale};
  const std::array<Tensor, kScale> grads{grad_mask_weight, grad_mask_bias, grad_gamma,
                                         grad_gamma_inv,   grad_beta,      grad_beta_inv};
  const Shape s = shape_of(classes, learnt);
  for (int i = 0; i < kScale; ++i) {
    if (i < 2) {
      check_sizes(grads[i], "a gradient", {s.groups, s.masks});
    } else {
      check_sizes(grads[i], "a gradient", {s.groups, s.channels, 1, s.size, s.size});
    }
    check_same_dtype(grads[i], "a gradient", scale);
  }
  const Groups groups(s.classes, to_indices(s, classes));
  return dispatch_floating(scale.scalar_type(), [&](auto type) -> Gradients {
    using T = typename decltype(type)::type;
    const auto table = [&] { return empty({s.classes, s.masks}, dtype_of<T>); };
    const auto kernel = [&] { return empty({s.channels, 1, s.size, s.size}, dtype_of<T>); };
    const auto kernel_table = [&] { return empty({s.classes, kKernels, s.channels}, dtype_of<T>); };
    const std::array<Tensor, kScale> found{table(), table(), kernel(), kernel(), kernel(), kernel()};
    const Tensor found_scale = kernel_table(), found_shift = kernel_table();
    const Learnt given = made_dense(learnt);
    const auto from = made_dense(grads);
    for (int i = 0; i < 2; ++i) add_rows(s, groups, data_of<T>(from[i]), to<T>(found[i]));
    const auto of_channels = s.size == 1 ? &backward<T, 1> : s.size == 3 ? &backward<T, 9> : &backward<T, 25>;
    constexpr int64_t kChannels = 64;
    const int64_t blocks = ceil_div(s.channels, kChannels);
    parallel_for(0, kKernels * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t which = i / blocks, c = i % blocks * kChannels;
        of_channels(s, groups, which, c, std::min(c + kChannels, s.channels), data_of<T>(from[2 + which]),
                    data_of<T>(given[2 + which]), data_of<T>(given[kScale]), to<T>(found[2 + which]),
                    to<T>(found_scale), to<T>(found_shift));
      }
    });
    return {found[0], found[1], found[2], found[3], found[4], found[5], found_scale, found_shift};
  });
}

}  // namespace
}  // namespace pixnorm::class_parameters

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) {
  m.impl("class_parameters_fwd", TORCH_BOX(&pixnorm::class_parameters::class_parameters_fwd));
  m.impl("class_parameters_grad", TORCH_BOX(&pixnorm::class_parameters::class_parameters_grad));
}
