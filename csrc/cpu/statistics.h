// Batch statistics of whole tensors. To be included after foreach_isa.h, whose vector code includes moments_kernels.h.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/memory.h"
#include "cpu/moments.h"
#include "cpu/parallel.h"
#include "dispatch.h"

namespace pixnorm {

// n images of c channels of `pixels` pixels.
struct Activations {
  int64_t n, c, pixels;
  bool channels_last;
};

// Gathers the moments of a tensor chunk by chunk, `per_chunk` images each, from image 0 on.
template <class T>
class Statistics {
 public:
  Statistics(const Activations& s, int64_t per_chunk)
      : s_(s),
        per_chunk_(per_chunk),
        runs_(s.channels_last ? ceil_div(per_chunk * s.pixels, kRun) : per_chunk),
        moments_(ceil_div(s.n, per_chunk) * runs_ * s.c) {}

  void add(const T* tensor, int64_t n0, int64_t n1) {
    const T* data = tensor + n0 * s_.c * s_.pixels;
    Moments* moments = moments_.data() + n0 / per_chunk_ * runs_ * s_.c;
    const int64_t pixels = (n1 - n0) * s_.pixels;
    if (s_.channels_last) {
      const auto kernel = PIXNORM_BY_ISA(moments_by_channel<T>);
      parallel_for(0, ceil_div(pixels, kRun), 1, [&](int64_t begin, int64_t end) {
        const Buffer<acc_t<T>> scratch(3 * s_.c);
        for (int64_t run = begin; run < end; ++run) {
          kernel(data + run * kRun * s_.c, std::min(kRun, pixels - run * kRun), s_.c, scratch.data(),
                 moments + run * s_.c);
        }
      });
    } else {
      const auto kernel = PIXNORM_BY_ISA(moments_of<T>);
      parallel_for(0, (n1 - n0) * s_.c, ceil_div(1 << 14, s_.pixels), [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; ++plane) {
          moments[plane] = kernel(data + plane * s_.pixels, s_.pixels);
        }
      });
    }
  }

  void finish(acc_t<T>* mean, acc_t<T>* var) const {
    parallel_for(0, s_.c, 16, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        Moments total{0, 0};
        double count = 0;
        for (int64_t n0 = 0; n0 < s_.n; n0 += per_chunk_) {
          const Moments* moments = moments_.data() + n0 / per_chunk_ * runs_ * s_.c + c;
          int64_t pixels = std::min(per_chunk_, s_.n - n0) * s_.pixels;
          for (; pixels > 0; moments += s_.c) {
            const int64_t run = std::min(pixels, s_.channels_last ? kRun : s_.pixels);
            merge(total, count, *moments, run);
            count += run;
            pixels -= run;
          }
        }
        mean[c] = static_cast<acc_t<T>>(total.mean);
        var[c] = static_cast<acc_t<T>>(total.m2 / count);
      }
    });
  }

 private:
  static constexpr int64_t kRun = 512;  // pixels of channels_last that are summed at a time; in NCHW, a plane
  const Activations s_;
  const int64_t per_chunk_, runs_;
  std::vector<Moments> moments_;
};

}  // namespace pixnorm
