// SPN on the CPU: what forward and backward share, the arguments and how the work is cut.
//
// Work is cut by shape alone and partial sums are added in a fixed order, so results do not depend on the number of
// threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/gemm.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/spn.h"
#include "dispatch.h"

namespace pixnorm::spn {

using OptionalTensor = std::optional<Tensor>;

// ---- cutting the work ----

constexpr int64_t kTilePixels = 2048;

// Parts of an image: of rows, if it is large.
inline int64_t parts_of(const Shape& s) { return std::clamp<int64_t>(s.pixels() / (2 * kTilePixels), 1, s.h); }

// A tile is several small images, one image, or some rows of a large one.
inline std::vector<Tile> tiles(const Shape& s, int64_t n0, int64_t n1) {
  std::vector<Tile> result;
  const int64_t images = std::max<int64_t>(1, kTilePixels / s.pixels()), parts = parts_of(s);
  for (int64_t n = n0; n < n1; n += images) {
    for (int64_t part = 0; part < parts; ++part) {
      result.push_back({n, std::min(n + images, n1), s.h * part / parts, s.h * (part + 1) / parts, part});
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

// ---- the projection's products, on `count` images from a pointer ----

template <class T>
Matrices<T> as_matrices(T* data, const Shape& s, int64_t count, int64_t channels) {
  return matrices_of(data, count, channels, s.pixels(), s.channels_last);
}

// W, or its transpose, as it multiplies pixels.
template <class T>
PackedMatrix<T, T> packed_weight(const Shape& s, const std::vector<T>& weight, bool transposed) {
  const Matrices<const T> w{weight.data(), 1, s.masks, s.c, 0, s.c, 1};
  return {transposed == s.channels_last ? w : w.transposed(), !s.channels_last};
}

// ---- arguments ----

// Groups of samples. Only those that are in the batch get tables and sums: each has a slot.
struct Groups {
  int64_t count;
  std::vector<int32_t> slot;   // by sample
  std::vector<int64_t> group;  // by slot

  Groups(const Shape& s, const OptionalTensor& index, int64_t count) : count(count), slot(s.n) {
    if (!index) {
      group.push_back(0);
      return;
    }
    check_sizes(*index, "index", {s.n});
    STD_TORCH_CHECK(index->scalar_type() == ScalarType::Long, "pixnorm: index must be int64");
    const Tensor dense_index = dense(*index);
    const int64_t* const data = data_of<int64_t>(dense_index);
    std::vector<int32_t> slots(count, -1);
    for (int64_t n = 0; n < s.n; ++n) {
      STD_TORCH_CHECK(data[n] >= 0 && data[n] < count, "pixnorm: index out of range");
      if (slots[data[n]] < 0) {
        slots[data[n]] = static_cast<int32_t>(group.size());
        group.push_back(data[n]);
      }
      slot[n] = slots[data[n]];
    }
  }
  int64_t slots() const { return group.size(); }
};

// The parameters, in the order of the schema.
struct Arguments {
  const Tensor &mask_projection, &mask_weight, &mask_bias;
  const Tensor* taps[4];
  const OptionalTensor* rows[2];
  const OptionalTensor& index;

  Arguments(const Tensor& mask_projection, const Tensor& mask_weight, const Tensor& mask_bias,
            const Tensor& gamma_weight, const Tensor& gamma_weight_inv, const Tensor& beta_weight,
            const Tensor& beta_weight_inv, const OptionalTensor& gamma_bias, const OptionalTensor& beta_bias,
            const OptionalTensor& index)
      : mask_projection(mask_projection),
        mask_weight(mask_weight),
        mask_bias(mask_bias),
        taps{&gamma_weight, &gamma_weight_inv, &beta_weight, &beta_weight_inv},
        rows{&gamma_bias, &beta_bias},
        index(index) {}

  int64_t size() const { return taps[0]->size(-1); }
  int64_t groups() const { return index ? mask_weight.size(0) : 1; }

  void check(const Shape& s) const {
    const int64_t k = size();
    STD_TORCH_CHECK(k == 1 || k == 3 || k == 5, "pixnorm: the kernel size must be 1, 3 or 5");
    STD_TORCH_CHECK(s.masks == s.c || s.masks == 1, "pixnorm: there must be one mask, or one for each channel");
    check_sizes(mask_projection, "mask_projection", {s.masks, s.c, 1, 1});
    for (const Tensor* t : {&mask_weight, &mask_bias}) {
      index ? check_sizes(*t, "the mask's affine", {groups(), s.masks})
            : check_sizes(*t, "the mask's affine", {s.masks});
    }
    for (const Tensor* t : taps) {
      index ? check_sizes(*t, "a depthwise weight", {groups(), s.c, 1, k, k})
            : check_sizes(*t, "a depthwise weight", {s.c, 1, k, k});
      check_same_dtype(*t, "a depthwise weight", mask_weight);
    }
    check_same_dtype(mask_bias, "mask_bias", mask_weight);
    for (const OptionalTensor* row : rows) {
      if (*row) check_sizes(**row, "gamma_bias or beta_bias", {s.n, s.c});
    }
  }
};

inline Shape shape_of(const Tensor& x, const Tensor& mask_projection, int64_t upsample,
                      std::optional<double> negative_slope) {
  STD_TORCH_CHECK(x.dim() == 4 && mask_projection.dim() == 4, "pixnorm: x and mask_projection must be 4-D");
  STD_TORCH_CHECK(upsample == 1 || upsample == 2, "pixnorm: upsample must be 1 or 2");
  const bool channels_last = layout_of(x) == MemoryFormat::ChannelsLast;
  return {x.size(0),     x.size(1),
          x.size(2),     x.size(3),
          upsample,      mask_projection.size(0),
          channels_last, Activation(negative_slope)};
}

template <class T>
Kernels<T> kernels_of(int64_t size, int64_t upsample) {
  return size == 1 ? kernels_of_1<T>(upsample) : size == 3 ? kernels_of_3<T>(upsample) : kernels_of_5<T>(upsample);
}

// Parameters and statistics as the vector code takes them.
template <class T>
class Values {
 public:
  using A = acc_t<T>;
  const Kernels<T> kernels;
  const Groups groups;
  const std::vector<T> mask_projection;
  std::vector<A> mean, var, mask_mean, mask_var;  // (C) and (masks), as in the schema

  Values(const Shape& s, const Arguments& given)
      : kernels(kernels_of<T>(given.size(), s.upsample)),
        groups(s, given.index, given.groups()),
        mask_projection(to_vector<T>(given.mask_projection)),
        mean(s.c),
        var(s.c),
        mask_mean(s.masks),
        mask_var(s.masks),
        s_(s),
        size_(static_cast<int>(given.size())),
        taps_(size_ * size_),
        tables_(groups.slots() * s.blocks() * kernels.table_bytes),
        params_{} {
    for (int i = 0; i < 4; ++i) dense_[i] = dense(*given.taps[i]);
    dense_[4] = dense(given.mask_weight);
    dense_[5] = dense(given.mask_bias);
    parallel_for(0, groups.slots() * s.blocks(), 8, [&](int64_t begin, int64_t end) {
      std::vector<A> rows((4 * taps_ + 2) * kBlock);
      for (int64_t i = begin; i < end; ++i) {
        read(i / s.blocks(), i % s.blocks(), rows.data());
        kernels.fill_table(rows.data(), tables_.data() + i * kernels.table_bytes);
      }
    });
    params_.tables = tables_.data();
    params_.table_bytes = kernels.table_bytes;
    params_.slot = groups.slot.data();
    // Padded to whole blocks.
    const int64_t padded = s.blocks() * kBlock;
    const bool any = *given.rows[0] || *given.rows[1];
    params_.row_stride = any ? padded : 0;
    for (int of = 0; of < 2; ++of) {
      rows_[of].resize(any ? s.n * padded : padded);
      params_.rows[of] = rows_[of].data();
      if (!*given.rows[of]) continue;
      const std::vector<A> row = to_vector<A>(**given.rows[of]);
      for (int64_t n = 0; n < s.n; ++n) {
        std::copy_n(row.data() + n * s.c, s.c, rows_[of].data() + n * padded);
      }
    }
  }

  // The taps and mask affine of a slot's group, of a block of channels: see Kernels::fill_table. Absent channels are 0.
  void read(int64_t slot, int64_t block, A* rows) const {
    std::fill_n(rows, (4 * taps_ + 2) * kBlock, A(0));
    const int64_t group = groups.group[slot], c0 = block * kBlock, channels = std::min<int64_t>(kBlock, s_.c - c0);
    dispatch_floating(dense_[0].scalar_type(), [&](auto type) {
      using P = typename decltype(type)::type;
      for (int i = 0; i < 4; ++i) {
        const P* const from = data_of<P>(dense_[i]) + (group * s_.c + c0) * taps_;
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t k = 0; k < taps_; ++k) rows[(i * taps_ + k) * kBlock + c] = static_cast<A>(from[c * taps_ + k]);
        }
      }
      for (int i = 0; i < 2; ++i) {
        const P* const from = data_of<P>(dense_[4 + i]) + group * s_.masks;
        for (int64_t c = 0; c < channels; ++c) {
          rows[(4 * taps_ + i) * kBlock + c] = static_cast<A>(from[s_.one_mask() ? 0 : c0 + c]);
        }
      }
    });
  }

  void set_statistics(const Tensor (&given)[4]) {
    std::vector<A>* const to[4] = {&mean, &var, &mask_mean, &mask_var};
    for (int i = 0; i < 4; ++i) {
      check_sizes(given[i], "a statistic", {static_cast<int64_t>(to[i]->size())});
      *to[i] = to_vector<A>(given[i]);
    }
  }

  // With the statistics as they are now.
  Params<A> params(double eps) {
    const auto reciprocal_root = [eps](const std::vector<A>& v) {
      std::vector<A> result(v.size());
      std::transform(v.begin(), v.end(), result.begin(), [eps](A x) { return static_cast<A>(1 / std::sqrt(x + eps)); });
      return result;
    };
    rstd_ = reciprocal_root(var);
    mask_rstd_ = reciprocal_root(mask_var);
    mask_mean_ = mask_mean;
    for (std::vector<A>* v : {&mask_mean_, &mask_rstd_}) v->resize(s_.c, (*v)[0]);
    params_.mean = mean.data();
    params_.rstd = rstd_.data();
    params_.mask_mean = mask_mean_.data();
    params_.mask_rstd = mask_rstd_.data();
    return params_;
  }

  const std::vector<A>& rows(int of) const { return rows_[of]; }
  int64_t row_stride() const { return params_.row_stride; }
  int size() const { return size_; }
  int64_t taps() const { return taps_; }

 private:
  const Shape& s_;
  const int size_;  // of kernels
  const int64_t taps_;
  const Buffer<char> tables_;
  std::vector<A> rows_[2], rstd_, mask_mean_, mask_rstd_;
  Tensor dense_[6];
  Params<A> params_;
};

}  // namespace pixnorm::spn
