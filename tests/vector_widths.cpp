// Runs SPN's vector code and that of matrix products with vectors of 16 and of 64 bytes on the same inputs: the
// arithmetic is the same lane by lane, so the results must be bitwise equal. This tests the width of AVX-512 on
// machines without it.

#include <torch/headeronly/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/moments.h"
#include "cpu/spn.h"
#include "dispatch.h"
#include "scalar.h"

#define PIXNORM_ISA_BASELINE 0
#define PIXNORM_ISA_AVX2 1
#define PIXNORM_ISA_AVX512 2
#define PIXNORM_ISA PIXNORM_ISA_BASELINE
#define PIXNORM_VECTOR_BYTES 16
namespace pixnorm::short_vectors {
#include "cpu/vec.h"
// in this order
#include "cpu/spn_kernels.h"
// and the products
#include "cpu/gemm_kernels.h"
}  // namespace pixnorm::short_vectors
#undef PIXNORM_VECTOR_BYTES
#define PIXNORM_VECTOR_BYTES 64
namespace pixnorm::long_vectors {
#include "cpu/vec.h"
// in this order
#include "cpu/spn_kernels.h"
// and the products
#include "cpu/gemm_kernels.h"
}  // namespace pixnorm::long_vectors

namespace pixnorm {
namespace {

template <class T>
std::vector<T> random_values(int64_t count) {
  std::vector<T> values(count);
  for (T& v : values) v = static_cast<T>((std::rand() % 2001 - 1000) / 500.0f);
  return values;
}

template <class T>
int64_t differences(const std::vector<T>& a, const std::vector<T>& b) {
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += std::memcmp(&a[i], &b[i], sizeof(T)) != 0;
  return count;
}

// Two samples of different groups.
template <class T, int K, int U>
bool same_bits(bool channels_last, int64_t c, int64_t h, int64_t w) {
  using A = acc_t<T>;
  const spn::Shape s{2, c, h, w, U, c, channels_last, Activation(0.25)};
  const int64_t count = s.n * s.image(), blocks = s.blocks();
  const auto x = random_values<T>(count), p = random_values<T>(count), dy = random_values<T>(count * U * U);
  std::vector<A> of_channels[8], rows[2];
  for (auto& v : of_channels) v = random_values<A>(c);
  for (auto& v : rows) v = random_values<A>(s.n * blocks * kBlock);
  const auto* v = of_channels;
  const auto parameters = random_values<A>(s.n * blocks * (4 * K * K + 2) * kBlock);
  const int32_t of_sample[2] = {0, 1};
  constexpr int kSums = spn::Sums{K}.count();
  std::vector<A> scratch(1 << 20);
  std::vector<T> y[2], dx[2], dp[2];
  std::vector<A> sums[2], all[2];
  for (int i = 0; i < 2; ++i) {
    y[i].resize(count * U * U), dx[i].resize(count), dp[i].resize(count);
    sums[i].resize(s.n * blocks * kSums * kBlock), all[i].resize(s.n * blocks * 2 * kBlock);
    const int64_t table_bytes = i ? sizeof(long_vectors::Table<A, K, U>) : sizeof(short_vectors::Table<A, K, U>);
    std::vector<char> tables(s.n * blocks * table_bytes);
    const auto fill = i ? long_vectors::fill_table<A, K, U> : short_vectors::fill_table<A, K, U>;
    for (int64_t table = 0; table < s.n * blocks; ++table) {
      fill(parameters.data() + table * (4 * K * K + 2) * kBlock, tables.data() + table * table_bytes);
    }
    const spn::Params<A> params{v[0].data(),     v[1].data(), v[2].data(), v[3].data(),
                                tables.data(),   table_bytes, of_sample,   {rows[0].data(), rows[1].data()},
                                blocks * kBlock, 1,           of_sample,   sums[i].data(),
                                all[i].data(),   nullptr,     v[4].data(), v[5].data(),
                                v[6].data(),     v[7].data()};
    const spn::Tile tile{0, s.n, 0, h, 0};
    const auto forward = i ? long_vectors::forward<T, K, U> : short_vectors::forward<T, K, U>;
    const auto reduce = i ? long_vectors::backward_reduce<T, K, U> : short_vectors::backward_reduce<T, K, U>;
    const auto apply = i ? long_vectors::backward_apply<T, K, U> : short_vectors::backward_apply<T, K, U>;
    for (int64_t block = 0; block < blocks; ++block) {
      forward(s, params, tile, block, scratch.data(), x.data(), p.data(), y[i].data());
      reduce(s, params, tile, block, scratch.data(), x.data(), p.data(), dy.data());
      apply(s, params, tile, block, scratch.data(), x.data(), p.data(), dy.data(), dx[i].data(), dp[i].data(), 0);
    }
    for (std::vector<A>* of : {&sums[i], &all[i]}) {  // those of absent channels are undefined
      for (size_t at = 0; at < of->size(); ++at) {
        const int64_t each = of == &all[i] ? 2 : kSums;
        if (int64_t(at) / (each * kBlock) % blocks * kBlock + int64_t(at) % kBlock >= c) (*of)[at] = 0;
      }
    }
  }
  const int64_t different = differences(y[0], y[1]) + differences(dx[0], dx[1]) + differences(dp[0], dp[1]) +
                            differences(sums[0], sums[1]) + differences(all[0], all[1]);
  if (different)
    std::printf("%ld values differ: channels_last %d, C %ld, H %ld, W %ld, K %d, upsample %d\n", long(different),
                channels_last, long(c), long(h), long(w), K, U);
  return different == 0;
}

// A matrix by its rows or by its columns, with gaps between them.
template <class A>
struct Matrix {
  int64_t stride, depth_stride;
  std::vector<A> data;

  Matrix(int64_t count, int64_t depth, bool by_depth)
      : stride(by_depth ? 1 : depth + 2),
        depth_stride(by_depth ? count + 3 : 1),
        data(random_values<A>((count - 1) * stride + (depth - 1) * depth_stride + 1)) {}

  A at(int64_t i, int64_t k) const { return data[i * stride + k * depth_stride]; }
  Operand<A> operand(bool in_place) const {
    return {data.data(), stride, depth_stride, 7, 7 * depth_stride, in_place ? Use::kInPlace : Use::kPack};
  }
};

// A product by short and by long vectors has the same bits, and is right: also where 0 meets infinity, where out holds
// NaN and is not to be read, and beside its last column.
template <class T, class O>
bool product(int64_t rows, int64_t columns, int64_t depth) {
  using A = acc_t<T>;
  const auto coin = [] { return std::rand() % 2 == 0; };
  Matrix<T> a(rows, depth, coin()), b(columns, depth, coin());
  a.data[0] = 0;
  if (coin()) b.data[0] = std::numeric_limits<T>::infinity();
  constexpr bool kMayLie = std::is_same_v<T, A>;
  const bool add = coin(), b_in_place = kMayLie && b.stride == 1 && columns % long_vectors::kLanes<A> == 0 && coin();
  const Operand<T> left = a.operand(kMayLie && coin()), right = b.operand(b_in_place);
  const GemmBlock whole{0, rows, 0, columns, 0, depth};
  const int64_t out_stride = columns + 1;
  std::vector<O> before = random_values<O>(rows * out_stride), out[2];
  if (!add) before.assign(before.size(), std::numeric_limits<O>::quiet_NaN());
  const std::vector<A> of_rows = random_values<A>(rows), of_columns = random_values<A>(columns + kBeyondColumns);
  const bool add_of_rows = coin(), add_of_columns = !add_of_rows && coin();
  static std::vector<double> scratch(1 << 20);
  for (int i = 0; i < 2; ++i) {
    out[i] = before;
    const auto multiply = i ? long_vectors::multiply_block<T, O> : short_vectors::multiply_block<T, O>;
    const Addends<O> addends{add ? out[i].data() : nullptr, add_of_rows ? of_rows.data() : nullptr,
                             add_of_columns ? of_columns.data() : nullptr};
    multiply(whole, left, right, out[i].data(), out_stride, addends, scratch.data());
  }
  int64_t wrong = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const double matrix = add ? static_cast<double>(before[r * out_stride + c]) : 0;
      const double bias = add_of_rows ? of_rows[r] : add_of_columns ? of_columns[c] : 0;
      double sum = matrix + bias, size = std::abs(matrix) + std::abs(bias);
      for (int64_t k = 0; k < depth; ++k) {
        const double term = static_cast<double>(a.at(r, k)) * static_cast<double>(b.at(c, k));
        sum += term;
        size += std::abs(term);
      }
      const double is = out[0][r * out_stride + c], error = std::abs(is - sum);
      const double rounding = std::is_same_v<O, A> ? 0 : std::numeric_limits<O>::epsilon() * std::abs(sum);
      wrong += std::isfinite(sum) ? !(error <= 8 * std::numeric_limits<A>::epsilon() * size + rounding)
                                  : !(std::isnan(sum) ? std::isnan(is) : is == sum);
    }
    wrong += std::memcmp(&out[0][r * out_stride + columns], &before[r * out_stride + columns], sizeof(O)) != 0;
  }
  const int64_t different = differences(out[0], out[1]);
  if (wrong || different)
    std::printf("product %ld x %ld x %ld: %ld wrong, %ld differ\n", long(rows), long(columns), long(depth), long(wrong),
                long(different));
  return !wrong && !different;
}

}  // namespace
}  // namespace pixnorm

int main() {
  bool same = true;
  for (int64_t rows = 1; rows <= 14; ++rows) {
    for (const int64_t columns : {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100}) {
      for (const int64_t depth : {1, 2, 7, 16, 33, 600}) {
        same = pixnorm::product<float, float>(rows, columns, depth) && same;
        same = pixnorm::product<double, double>(rows, columns, depth) && same;
        same = pixnorm::product<pixnorm::BFloat16, pixnorm::BFloat16>(rows, columns, depth) && same;
        same = pixnorm::product<pixnorm::Half, float>(rows, columns, depth) && same;
      }
    }
  }
  for (const bool channels_last : {false, true}) {
    for (const int64_t c : {3, 16, 20, 40}) {
      for (const int64_t w : {1, 7, 16, 33}) {
        same = pixnorm::same_bits<float, 3, 1>(channels_last, c, 5, w) && same;
        same = pixnorm::same_bits<pixnorm::BFloat16, 3, 2>(channels_last, c, 5, w) && same;
        same = pixnorm::same_bits<float, 5, 2>(channels_last, c, 5, w) && same;
        same = pixnorm::same_bits<float, 1, 1>(channels_last, c, 5, w) && same;
      }
    }
  }
  return same ? 0 : 1;
}
