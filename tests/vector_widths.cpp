// Runs SPN's vector code with vectors of 16 and of 64 bytes on the same inputs: the arithmetic is the same lane by
// lane, so the results must be bitwise equal. This tests the width of AVX-512 on machines without it.

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

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
}  // namespace pixnorm::short_vectors
#undef PIXNORM_VECTOR_BYTES
#define PIXNORM_VECTOR_BYTES 64
namespace pixnorm::long_vectors {
#include "cpu/vec.h"
// in this order
#include "cpu/spn_kernels.h"
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

template <class T, int U>
bool same_bits(bool channels_last, int64_t c, int64_t h, int64_t w) {
  using A = acc_t<T>;
  const spn::Shape s{2, c, h, w, U, channels_last, Activation(0.25)};
  const int64_t count = s.n * s.image();
  const auto x = random_values<T>(count), p = random_values<T>(count), dy = random_values<T>(count * U * U);
  std::vector<A> of_channels[10], taps[4];
  for (auto& v : of_channels) v = random_values<A>(c);
  for (auto& v : taps) v = random_values<A>(c * spn::kTaps);
  const auto* v = of_channels;
  const spn::Params<A> params{v[0].data(),
                              v[1].data(),
                              v[2].data(),
                              v[3].data(),
                              v[4].data(),
                              v[5].data(),
                              {taps[0].data(), taps[1].data(), taps[2].data(), taps[3].data()},
                              v[6].data(),
                              v[7].data(),
                              v[8].data(),
                              v[9].data()};
  std::vector<A> scratch(1 << 20);
  std::vector<T> y[2];
  std::vector<A> dx[2], dp[2], sums[2];
  for (int i = 0; i < 2; ++i) {
    y[i].resize(count * U * U), dx[i].resize(count), dp[i].resize(count);
    sums[i].resize(s.blocks() * spn::kSums * kBlock);
    const spn::Tile tile{0, s.n, 0, h};
    const auto forward = i ? long_vectors::forward<T, U> : short_vectors::forward<T, U>;
    const auto reduce = i ? long_vectors::backward_reduce<T, U> : short_vectors::backward_reduce<T, U>;
    const auto apply = i ? long_vectors::backward_apply<T, U> : short_vectors::backward_apply<T, U>;
    for (int64_t block = 0; block < s.blocks(); ++block) {
      A* to = sums[i].data() + block * spn::kSums * kBlock;
      forward(s, params, tile, block, scratch.data(), x.data(), p.data(), y[i].data());
      reduce(s, params, tile, block, scratch.data(), x.data(), p.data(), dy.data(), to);
      apply(s, params, tile, block, scratch.data(), x.data(), p.data(), dy.data(), dx[i].data(), dp[i].data(), 0);
    }
    for (int64_t absent = c; absent < s.blocks() * kBlock; ++absent) {  // undefined
      for (int k = 0; k < spn::kSums; ++k) sums[i][(absent / kBlock * spn::kSums + k) * kBlock + absent % kBlock] = 0;
    }
  }
  const int64_t different =
      differences(y[0], y[1]) + differences(dx[0], dx[1]) + differences(dp[0], dp[1]) + differences(sums[0], sums[1]);
  if (different)
    std::printf("%ld values differ: channels_last %d, C %ld, H %ld, W %ld, upsample %d\n", long(different),
                channels_last, long(c), long(h), long(w), U);
  return different == 0;
}

}  // namespace
}  // namespace pixnorm

int main() {
  bool same = true;
  for (const bool channels_last : {false, true}) {
    for (const int64_t c : {3, 16, 20, 40}) {
      for (const int64_t w : {1, 7, 16, 33}) {
        same = pixnorm::same_bits<float, 1>(channels_last, c, 5, w) && same;
        same = pixnorm::same_bits<pixnorm::BFloat16, 2>(channels_last, c, 5, w) && same;
      }
    }
  }
  return same ? 0 : 1;
}
