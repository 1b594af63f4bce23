// SPN's backward on the CPU: products, threads and the sums over tiles. spn_call.h has the arguments,
// spn_backward_kernels.h the arithmetic per pixel.

#include <torch/csrc/stable/library.h>

#include <memory>
#include <tuple>

#include "cpu/spn_call.h"

namespace pixnorm::spn {
namespace {

// dW (+)= dp x^T
template <class T>
void add_grad_weight(const Shape& s, int64_t count, const T* dp, const T* x, acc_t<T>* dw, bool add) {
  const Matrices<acc_t<T>> out{dw, 1, s.masks, s.c, 0, s.c, 1};
  const auto left = as_matrices(dp, s, count, s.masks), right = as_matrices(x, s, count, s.c);
  s.channels_last ? gemm_sum<T>(out, left.transposed(), right, add) : gemm_sum<T>(out, left, right.transposed(), add);
}

// Writes numbers of type A into a tensor of that type, or of a half type.
template <class T>
class Output {
 public:
  explicit Output(const Tensor& t) : data_(t.data_ptr()), wide_(t.scalar_type() == dtype_of<acc_t<T>>) {}
  void set(int64_t i, double value) const {
    wide_ ? void(static_cast<acc_t<T>*>(data_)[i] = static_cast<acc_t<T>>(value))
          : void(static_cast<T*>(data_)[i] = static_cast<T>(static_cast<acc_t<T>>(value)));
  }

 private:
  void* data_;
  bool wide_;
};

// Gradients of all but x. Those of groups that are not in the batch stay zero.
struct Gradients {
  Tensor mask_projection, mask_weight, mask_bias, taps[4], rows[2];

  Gradients(const Shape& s, const Arguments& given) {
    const ScalarType dtype = given.mask_weight.scalar_type();
    mask_projection = empty({s.masks, s.c, 1, 1}, dtype);
    mask_weight = torch::stable::empty_like(dense(given.mask_weight));
    mask_bias = torch::stable::empty_like(mask_weight);
    for (Tensor& t : taps) t = torch::stable::empty_like(dense(*given.taps[0]));
    for (int i = 0; i < 2; ++i) {
      rows[i] = *given.rows[i] ? empty({s.n, s.c}, (*given.rows[i])->scalar_type()) : empty({0}, dtype);
    }
  }
  void zero() const {
    for (const Tensor* t : {&mask_weight, &mask_bias, &taps[0], &taps[1], &taps[2], &taps[3]}) {
      torch::stable::zero_(const_cast<Tensor&>(*t));
    }
  }
};

// The partial sums of reduce, and where each sample finds its own: samples of a tile that are of one group share them.
template <class A>
class PartialSums {
 public:
  PartialSums(const Shape& s, Sums layout, const std::vector<Tile>& tiles, const Groups& groups)
      : layout_(layout), blocks_(s.blocks()), parts_(parts_of(s)), of_(s.n * parts_), first_(1) {
    std::vector<int32_t> in_tile(groups.slots());
    for (const Tile& tile : tiles) {
      std::fill(in_tile.begin(), in_tile.end(), -1);
      for (int64_t n = tile.n0; n < tile.n1; ++n) {
        int32_t& sums = in_tile[groups.slot[n]];
        if (sums < 0) {
          sums = static_cast<int32_t>(slot_.size());
          slot_.push_back(groups.slot[n]);
        }
        of_[n * parts_ + tile.part] = sums;
      }
      first_.push_back(static_cast<int32_t>(slot_.size()));
    }
    sums_ = std::make_unique<Buffer<A>>(slot_.size() * blocks_ * of_block());
    all_ = std::make_unique<Buffer<A>>(s.n * parts_ * blocks_ * 2 * kBlock);
  }

  void set_up(Params<A>& params) const {
    params.parts = parts_;
    params.sums_of = of_.data();
    params.sums = sums_->data();
    params.all = all_->data();
  }

  // Zeroes those that a tile adds to.
  void zero(const Tile& tile, int64_t i, int64_t block) const {
    for (int64_t sums = first_[i]; sums < first_[i + 1]; ++sums) std::fill_n(at(sums, block), of_block(), A(0));
    for (int64_t n = tile.n0; n < tile.n1; ++n) std::fill_n(all(n, tile.part, block), 2 * kBlock, A(0));
  }

  // Of a block of channels: sums by slot, [slots][layout.count()][kBlock], and Σ dγ and Σ dβ by sample, [N][2][kBlock].
  void total(const Groups& groups, int64_t block, double* by_slot, double* by_sample) const {
    const int64_t size = of_block(), samples = groups.slot.size();
    std::fill_n(by_slot, groups.slots() * size, 0.0);
    std::fill_n(by_sample, samples * 2 * kBlock, 0.0);
    for (size_t i = 0; i < slot_.size(); ++i) add(at(i, block), size, by_slot + slot_[i] * size);
    for (int64_t n = 0; n < samples; ++n) {
      double* const to = by_sample + n * 2 * kBlock;
      for (int64_t part = 0; part < parts_; ++part) add(all(n, part, block), 2 * kBlock, to);
      for (int of = 0; of < 2; ++of) {
        add(to + of * kBlock, kBlock, by_slot + groups.slot[n] * size + layout_.all(of) * kBlock);
      }
    }
  }

 private:
  template <class From>
  static void add(const From* from, int64_t count, double* to) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  }
  int64_t of_block() const { return layout_.count() * kBlock; }
  A* at(int64_t sums, int64_t block) const { return sums_->data() + (sums * blocks_ + block) * of_block(); }
  A* all(int64_t n, int64_t part, int64_t block) const {
    return all_->data() + ((n * parts_ + part) * blocks_ + block) * 2 * kBlock;
  }

  const Sums layout_;
  const int64_t blocks_, parts_;
  std::vector<int32_t> of_, slot_, first_;  // by sample and part; by sums; by tile
  std::unique_ptr<Buffer<A>> sums_, all_;
};

// Per-channel means that centre the gradients of x̂ and p̂.
template <class A>
struct Means {
  std::vector<A> g, gx, q, qp;

  explicit Means(int64_t c) : g(c), gx(c), q(c), qp(c) {}
};

// Writes the gradients of kernels, mask affine and rows of a block of channels; finds its means.
template <class T>
void finish_block(const Shape& s, const Values<T>& values, const PartialSums<acc_t<T>>& partial, Sums layout,
                  int64_t block, double centre, const Gradients& gradients, Means<acc_t<T>>& means) {
  using A = acc_t<T>;
  const Groups& groups = values.groups;
  const int64_t slots = groups.slots(), taps = layout.taps(), size = layout.count() * kBlock;
  const int64_t c0 = block * kBlock, channels = std::min<int64_t>(kBlock, s.c - c0);
  const Buffer<double> by_slot(slots * size), by_sample(s.n * 2 * kBlock);
  partial.total(groups, block, by_slot.data(), by_sample.data());

  double d_g[kBlock] = {}, d_gx[kBlock] = {}, d_p_hat[kBlock] = {}, d_p_hat_p[kBlock] = {};
  std::vector<A> rows((4 * taps + 2) * kBlock);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t group = groups.group[slot];
    const double* const sums = by_slot.data() + slot * size;
    const auto sum = [&](int i) { return sums + i * kBlock; };
    values.read(slot, block, rows.data());
    for (int of = 0; of < 2; ++of) {
      const Output<T> to(gradients.taps[2 * of]), to_inverse(gradients.taps[2 * of + 1]);
      double* const d_bn = of == 0 ? d_gx : d_g;  // Σ dy γ x̂ and Σ dy γ, from the gradients of the taps
      for (int k = 0; k < taps; ++k) {
        const int ky = k / layout.k, kx = k % layout.k, middle = layout.k / 2;
        const A *const weight = rows.data() + k * kBlock, *const weight_inv = weight + taps * kBlock;
        for (int64_t c = 0; c < channels; ++c) {
          double inside = sum(layout.all(of))[c];
          if (ky != middle) inside -= sum(layout.edge(of, ky, middle))[c];
          if (kx != middle) inside -= sum(layout.edge(of, middle, kx))[c];
          if (ky != middle && kx != middle) inside += sum(layout.edge(of, ky, kx))[c];
          const double with_mask = sum(layout.with_mask(of, k))[c], with_inverse = inside - with_mask;
          const int64_t i = (group * s.c + c0 + c) * taps + k;
          to.set(i, with_mask);
          to_inverse.set(i, with_inverse);
          d_bn[c] += weight[c] * with_mask + weight_inv[c] * with_inverse;
        }
      }
    }
    if (s.one_mask()) continue;
    const Output<T> d_weight(gradients.mask_weight), d_bias(gradients.mask_bias);
    const A* const weight = rows.data() + 4 * taps * kBlock;
    for (int64_t c = 0; c < channels; ++c) {
      const double q = sum(layout.q())[c], qp = sum(layout.qp())[c];
      d_bias.set(group * s.c + c0 + c, q);
      d_weight.set(group * s.c + c0 + c, qp);
      d_p_hat[c] += weight[c] * q;
      d_p_hat_p[c] += weight[c] * qp;
    }
  }
  for (int of = 0; of < 2; ++of) {
    if (gradients.rows[of].numel() > 0) {
      const Output<T> to(gradients.rows[of]);
      for (int64_t n = 0; n < s.n; ++n) {
        for (int64_t c = 0; c < channels; ++c) to.set(n * s.c + c0 + c, by_sample[(n * 2 + of) * kBlock + c]);
      }
    }
    double* const d_bn = of == 0 ? d_gx : d_g;
    const int64_t stride = values.row_stride();
    for (int64_t n = 0; stride > 0 && n < s.n; ++n) {
      const A* const row = values.rows(0).data() + n * stride + c0;
      for (int64_t c = 0; c < channels; ++c) d_bn[c] += row[c] * by_sample[(n * 2 + of) * kBlock + c];
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    means.g[c0 + c] = static_cast<A>(d_g[c] * centre);
    means.gx[c0 + c] = static_cast<A>(d_gx[c] * centre);
    means.q[c0 + c] = static_cast<A>(d_p_hat[c] * centre);
    means.qp[c0 + c] = static_cast<A>(d_p_hat_p[c] * centre);
  }
}

// One mask for all channels. From the shares of its gradient, [blocks][N, pixels]: the gradients of its affine and of
// p.
template <class T>
void finish_one_mask(const Shape& s, const Values<T>& values, const Params<acc_t<T>>& params, acc_t<T>* shares,
                     const T* p, double centre, const Gradients& gradients, T* dp) {
  using A = acc_t<T>;
  const Groups& groups = values.groups;
  const int64_t pixels = s.pixels(), all = s.n * pixels;
  const A mean = params.mask_mean[0], rstd = params.mask_rstd[0];
  std::vector<A> weight(groups.slots()), bias(groups.slots()), rows((4 * values.taps() + 2) * kBlock);
  for (int64_t slot = 0; slot < groups.slots(); ++slot) {
    values.read(slot, 0, rows.data());
    weight[slot] = rows[4 * values.taps() * kBlock];
    bias[slot] = rows[(4 * values.taps() + 1) * kBlock];
  }
  std::vector<double> q(s.n), qp(s.n);
  A* const dq = shares;  // the first block's place
  parallel_for(0, s.n, ceil_div(1 << 12, pixels), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t slot = groups.slot[n];
      for (int64_t i = n * pixels; i < (n + 1) * pixels; ++i) {
        A d_mask = shares[i];
        for (int64_t block = 1; block < s.blocks(); ++block) d_mask += shares[block * all + i];
        const A p_hat = (static_cast<A>(p[i]) - mean) * rstd;
        const A m = 1 / (1 + std::exp(-(p_hat * weight[slot] + bias[slot])));
        dq[i] = d_mask * m * (1 - m);
        q[n] += dq[i];
        qp[n] += dq[i] * p_hat;
      }
    }
  });
  std::vector<double> q_of(groups.slots()), qp_of(groups.slots());
  for (int64_t n = 0; n < s.n; ++n) q_of[groups.slot[n]] += q[n], qp_of[groups.slot[n]] += qp[n];
  const Output<T> d_weight(gradients.mask_weight), d_bias(gradients.mask_bias);
  double mean_q = 0, mean_qp = 0;
  for (int64_t slot = 0; slot < groups.slots(); ++slot) {
    d_bias.set(groups.group[slot], q_of[slot]);
    d_weight.set(groups.group[slot], qp_of[slot]);
    mean_q += weight[slot] * q_of[slot];
    mean_qp += weight[slot] * qp_of[slot];
  }
  const A shift = static_cast<A>(mean_q * centre), slope = static_cast<A>(mean_qp * centre);
  parallel_for(0, s.n, ceil_div(1 << 14, pixels), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * pixels; i < end * pixels; ++i) {
      const A p_hat = (static_cast<A>(p[i]) - mean) * rstd;
      dp[i] = static_cast<T>(rstd * (weight[groups.slot[i / pixels]] * dq[i] - shift - p_hat * slope));
    }
  });
}

template <class T>
void backward(const Shape& s, Values<T>& values, const Gradients& gradients, double eps, bool training, const T* dy,
              const T* x, const T* p, T* dx) {
  using A = acc_t<T>;
  const Kernels<T>& kernels = values.kernels;
  const Sums layout{values.size()};
  Params<A> params = values.params(eps);
  const std::vector<Tile> cut = tiles(s, 0, s.n);
  const PartialSums<A> partial(s, layout, cut, values.groups);
  partial.set_up(params);
  const Buffer<A> shares(s.one_mask() ? s.blocks() * s.n * s.pixels() : 0);
  params.d_mask = shares.data();
  for_tiles(s, cut, kernels.backward_scratch(s), [&](int64_t tile, int64_t block, void* scratch) {
    partial.zero(cut[tile], tile, block);
    kernels.reduce(s, params, cut[tile], block, scratch, x, p, dy);
  });

  const double centre = training ? 1.0 / (s.n * s.pixels()) : 0;
  Means<A> means(s.c);
  parallel_for(0, s.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      finish_block<T>(s, values, partial, layout, block, centre, gradients, means);
    }
  });
  params.mean_g = means.g.data();
  params.mean_gx = means.gx.data();
  params.mean_q = means.q.data();
  params.mean_qp = means.qp.data();
  const Buffer<T> dp_of_one(s.one_mask() ? s.n * s.pixels() : 0);
  if (s.one_mask()) finish_one_mask<T>(s, values, params, shares.data(), p, centre, gradients, dp_of_one.data());

  // dp is never stored whole, but for that of one mask: each chunk is consumed while it is in cache. Runs of chunks are
  // given to threads, and each adds up its part of dW; there are not so many that the parts are larger than x.
  constexpr int64_t kMostRuns = 16;
  const PackedMatrix<T, T> weight = packed_weight(s, values.mask_projection, true);
  const int64_t per_chunk = images_per_chunk(s.n, s.image(), sizeof(T)), chunks = ceil_div(s.n, per_chunk);
  const int64_t runs = std::clamp<int64_t>(s.n * s.pixels() / s.c, 1, std::min(chunks, kMostRuns));
  const int64_t of_weight = s.masks * s.c;
  std::vector<A> d_weight(of_weight);
  const Buffer<A> parts((runs - 1) * of_weight);
  for_large_items(runs, [&](int64_t begin, int64_t end) {
    const Buffer<T> dp_of_chunk(s.one_mask() ? 0 : per_chunk * s.image());
    for (int64_t i = begin; i < end; ++i) {
      A* const dw = i == 0 ? d_weight.data() : parts.data() + (i - 1) * of_weight;
      const int64_t first = chunks * i / runs * per_chunk, last = std::min(chunks * (i + 1) / runs * per_chunk, s.n);
      for (int64_t n = first; n < last; n += per_chunk) {
        const int64_t count = std::min(per_chunk, last - n);
        const T* const x_chunk = x + n * s.image();
        T* const dx_chunk = dx + n * s.image();
        T* const dp = s.one_mask() ? dp_of_one.data() + n * s.pixels() : dp_of_chunk.data();
        const std::vector<Tile> chunk = tiles(s, n, n + count);
        for_tiles(s, chunk, kernels.backward_scratch(s), [&](int64_t tile, int64_t block, void* scratch) {
          kernels.apply(s, params, chunk[tile], block, scratch, x, p, dy, dx_chunk, dp, n);
        });
        weight.multiply(as_matrices(dx_chunk, s, count, s.c), as_matrices<const T>(dp, s, count, s.masks), {dx_chunk});
        add_grad_weight<T>(s, count, dp, x_chunk, dw, n > first);
      }
    }
  });
  add_matrices<A>({d_weight.data(), 1, s.masks, s.c, 0, s.c, 1}, parts.data(), runs - 1);
  copy_to(d_weight, gradients.mask_projection);
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardResult spn_bwd(const Tensor& grad_y, const Tensor& x, const Tensor& mask_projection, const Tensor& mask_weight,
                       const Tensor& mask_bias, const Tensor& gamma_weight, const Tensor& gamma_weight_inv,
                       const Tensor& beta_weight, const Tensor& beta_weight_inv, const OptionalTensor& gamma_bias,
                       const OptionalTensor& beta_bias, const OptionalTensor& index, const Tensor& p,
                       const Tensor& mean, const Tensor& var, const Tensor& mask_mean, const Tensor& mask_var,
                       double eps, int64_t upsample, std::optional<double> negative_slope, bool, bool training) {
  const Shape s = shape_of(x, mask_projection, upsample, negative_slope);
  const Arguments arguments(mask_projection, mask_weight, mask_bias, gamma_weight, gamma_weight_inv, beta_weight,
                            beta_weight_inv, gamma_bias, beta_bias, index);
  arguments.check(s);
  check_sizes(grad_y, "grad_y", {s.n, s.c, s.h * upsample, s.w * upsample});
  check_sizes(p, "p", {s.n, s.masks, s.h, s.w});
  check_same_dtype(grad_y, "grad_y", x);
  check_same_dtype(p, "p", x);
  const MemoryFormat layout = layout_of(x);
  return dispatch_floating(x.scalar_type(), [&](auto type) -> BackwardResult {
    using T = typename decltype(type)::type;
    const Tensor x_dense = dense(x, layout);
    const Tensor p_dense = dense(p, s.one_mask() ? MemoryFormat::Contiguous : layout);
    const Tensor dy_dense = dense(grad_y, layout);
    const Tensor dx = empty({s.n, s.c, s.h, s.w}, dtype_of<T>, layout);
    Gradients g(s, arguments);
    if (x.numel() == 0) {
      for (Tensor* t : {&g.mask_projection, &g.rows[0], &g.rows[1]}) torch::stable::zero_(*t);
      g.zero();
    } else {
      Values<T> values(s, arguments);
      if (values.groups.slots() < arguments.groups()) g.zero();
      values.set_statistics({mean, var, mask_mean, mask_var});
      backward<T>(s, values, g, eps, training, data_of<T>(dy_dense), data_of<T>(x_dense), data_of<T>(p_dense),
                  static_cast<T*>(dx.data_ptr()));
    }
    return {dx,        g.mask_projection, g.mask_weight, g.mask_bias, g.taps[0],
            g.taps[1], g.taps[2],         g.taps[3],     g.rows[0],   g.rows[1]};
  });
}

}  // namespace
}  // namespace pixnorm::spn

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) { m.impl("spn_bwd", TORCH_BOX(&pixnorm::spn::spn_bwd)); }
