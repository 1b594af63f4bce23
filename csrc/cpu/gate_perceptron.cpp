// The two linear layers of CBAM's channel gate on the CPU. PyTorch's products have other bits with other numbers of
// threads; those of gemm.h do not.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/gemm.h"
#include "dispatch.h"

namespace pixnorm::gate {
namespace {

// hidden = relu(fc1(pooled)), of the maxima and the means of each sample: (N, 2, R).
template <class A>
struct Layers {
  int64_t n, c, r;
  Tensor pooled, fc1, fc2;  // (N, 2, C), (R, C), (C, R)
  Buffer<A> hidden;

  Layers(const Tensor& given, const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight)
      : n(given.size(0)),
        c(fc1_weight.size(1)),
        r(fc1_weight.size(0)),
        pooled(dense(given)),
        fc1(dense(fc1_weight)),
        fc2(dense(fc2_weight)),
        hidden(2 * n * r) {
    STD_TORCH_CHECK(c > 0 && r > 0, "pixnorm: expected at least one channel and one hidden unit");
    check_sizes(given, "pooled", {n, 2, c});
    check_sizes(fc1_weight, "fc1_weight", {r, c});
    check_sizes(fc1_bias, "fc1_bias", {r});
    check_sizes(fc2_weight, "fc2_weight", {c, r});
    for (const Tensor* t : {&fc1_weight, &fc1_bias, &fc2_weight}) check_same_dtype(*t, "a parameter", given);
    if (n == 0) return;
    const std::vector<A> bias = for_columns(fc1_bias, 1);
    gemm<A, A>(matrix(hidden.data(), 2 * n, r), of(pooled, 2 * n, c), of(fc1, r, c).transposed(),
               {nullptr, nullptr, bias.data()});
    for (int64_t i = 0; i < 2 * n * r; ++i) hidden[i] = hidden[i] < 0 ? 0 : hidden[i];  // NaN stays
  }

  template <class T>
  static Matrices<T> matrix(T* data, int64_t rows, int64_t columns) {
    return {data, 1, rows, columns, 0, columns, 1};
  }
  static Matrices<const A> of(const Tensor& t, int64_t rows, int64_t columns) {
    return matrix(data_of<A>(t), rows, columns);
  }

  // What gemm may add to columns.
  static std::vector<A> for_columns(const Tensor& t, A factor) {
    std::vector<A> values = to_vector<A>(t);
    for (A& value : values) value *= factor;
    values.resize(values.size() + kBeyondColumns);
    return values;
  }

  // The second layer is linear, so it takes the sum of both: (N, R).
  std::vector<A> sum_of_hidden() const {
    std::vector<A> sums(n * r);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < r; ++j) sums[i * r + j] = hidden[2 * i * r + j] + hidden[(2 * i + 1) * r + j];
    }
    return sums;
  }
};

// The sum of what the perceptron makes of maxima and of means: (N, C).
Tensor gate_perceptron_fwd(const Tensor& pooled, const Tensor& fc1_weight, const Tensor& fc1_bias,
                           const Tensor& fc2_weight, const Tensor& fc2_bias) {
  return dispatch_floating(pooled.scalar_type(), [&](auto type) {
    using A = acc_t<typename decltype(type)::type>;
    STD_TORCH_CHECK(pooled.scalar_type() == dtype_of<A>, "pixnorm: expected float32 or float64");
    const Layers<A> layers(pooled, fc1_weight, fc1_bias, fc2_weight);
    const int64_t n = layers.n, c = layers.c, r = layers.r;
    check_sizes(fc2_bias, "fc2_bias", {c});
    check_same_dtype(fc2_bias, "fc2_bias", pooled);
    const Tensor logits = empty({n, c}, dtype_of<A>);
    if (n == 0) return logits;
    const std::vector<A> sums = layers.sum_of_hidden(), bias = Layers<A>::for_columns(fc2_bias, 2);
    gemm<A, A>(layers.matrix(static_cast<A*>(logits.data_ptr()), n, c), layers.matrix(sums.data(), n, r),
               layers.of(layers.fc2, c, r).transposed(), {nullptr, nullptr, bias.data()});
    return logits;
  });
}

// factor times the sums over rows.
template <class A>
void sum_rows(const A* from, int64_t rows, int64_t columns, double factor, const Tensor& to) {
  std::vector<double> sums(columns);
  for (int64_t i = 0; i < rows * columns; ++i) sums[i % columns] += from[i];
  auto* const out = static_cast<A*>(to.data_ptr());
  for (int64_t j = 0; j < columns; ++j) out[j] = static_cast<A>(factor * sums[j]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_perceptron_grad(const Tensor& grad, const Tensor& pooled,
                                                                        const Tensor& fc1_weight,
                                                                        const Tensor& fc1_bias,
                                                                        const Tensor& fc2_weight) {
  return dispatch_floating(pooled.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> {
    using A = acc_t<typename decltype(type)::type>;
    STD_TORCH_CHECK(pooled.scalar_type() == dtype_of<A>, "pixnorm: expected float32 or float64");
    const Layers<A> layers(pooled, fc1_weight, fc1_bias, fc2_weight);
    const int64_t n = layers.n, c = layers.c, r = layers.r;
    check_sizes(grad, "grad_logits", {n, c});
    check_same_dtype(grad, "grad_logits", pooled);
    const Tensor of_pooled = empty({n, 2, c}, dtype_of<A>), of_fc1 = empty({r, c}, dtype_of<A>),
                 of_bias1 = empty({r}, dtype_of<A>), of_fc2 = empty({c, r}, dtype_of<A>),
                 of_bias2 = empty({c}, dtype_of<A>);
    if (n == 0) {
      for (const Tensor* t : {&of_fc1, &of_bias1, &of_fc2, &of_bias2}) torch::stable::fill_(*t, 0);
      return {of_pooled, of_fc1, of_bias1, of_fc2, of_bias2};
    }
    const auto out = [&](const Tensor& t, int64_t rows, int64_t columns) {
      return layers.matrix(static_cast<A*>(t.data_ptr()), rows, columns);
    };
    const Tensor dense_grad = dense(grad);
    const auto d = layers.of(dense_grad, n, c);
    const Buffer<A> of_sums(n * r), of_hidden(2 * n * r);
    gemm<A, A>(layers.matrix(of_sums.data(), n, r), d, layers.of(layers.fc2, c, r));
    for (int64_t i = 0; i < 2 * n * r; ++i) {
      of_hidden[i] = layers.hidden[i] <= 0 ? 0 : of_sums[i / (2 * r) * r + i % r];
    }
    const Matrices<const A> dh{of_hidden.data(), 1, 2 * n, r, 0, r, 1};
    gemm<A, A>(out(of_pooled, 2 * n, c), dh, layers.of(layers.fc1, r, c));
    gemm<A, A>(out(of_fc1, r, c), dh.transposed(), layers.of(layers.pooled, 2 * n, c));
    const std::vector<A> sums = layers.sum_of_hidden();
    gemm<A, A>(out(of_fc2, c, r), d.transposed(), layers.matrix(sums.data(), n, r));
    sum_rows(dh.data, 2 * n, r, 1, of_bias1);
    sum_rows(d.data, n, c, 2, of_bias2);
    return {of_pooled, of_fc1, of_bias1, of_fc2, of_bias2};
  });
}

}  // namespace
}  // namespace pixnorm::gate

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) {
  m.impl("gate_perceptron_fwd", TORCH_BOX(&pixnorm::gate::gate_perceptron_fwd));
  m.impl("gate_perceptron_grad", TORCH_BOX(&pixnorm::gate::gate_perceptron_grad));
}
