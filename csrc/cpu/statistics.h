// Means and variances of whole tensors, per channel or per sample and channel. To be included after foreach_isa.h,
// whose vector code includes moments_kernels.h.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/memory.h"
#include "cpu/moments.h"
#include "cpu/parallel.h"
#include "dispatch.h"

namespace pixnorm {

// n images of c channels of `pixels` pixels, and how they are grouped: all n together (batch norm), or each by itself
// (instance norm).
struct Activations {
  int64_t n, c, pixels;
  bool channels_last;
  bool instance = false;

  int64_t groups() const { return instance ? n : 1; }
};

// Partial moments of a tensor, and the statistics that follow from them. A tensor may arrive in chunks of `per_chunk`
// images, in order from image 0.
//
// The images of a chunk that belong to one group are a span: the whole chunk, or one image of it. Spans are cut into
// runs, so that no run straddles two groups: kRun pixels in channels_last, a plane in NCHW.
template <class T>
class Statistics {
 public:
  Statistics(const Activations& s, int64_t per_chunk)
      : s_(s),
        span_(s.instance ? 1 : per_chunk),
        runs_(s.channels_last ? ceil_div(span_ * s.pixels, kRun) : span_),
        moments_(ceil_div(s.n, span_) * runs_ * s.c) {}

  // Images [n0, n1): a chunk.
  void add(const T* tensor, int64_t n0, int64_t n1) {
    const T* data = tensor + n0 * s_.c * s_.pixels;
    Moments* moments = moments_.data() + n0 / span_ * runs_ * s_.c;
    if (s_.channels_last) {
      const auto kernel = PIXNORM_BY_ISA(moments_by_channel<T>);
      const int64_t pixels = (n1 - n0) * s_.pixels, spans = ceil_div(n1 - n0, span_);
      parallel_for(0, spans * runs_, 1, [&](int64_t begin, int64_t end) {
        const Buffer<acc_t<T>> scratch(3 * s_.c);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = i / runs_ * span_ * s_.pixels + i % runs_ * kRun;
          const int64_t span_end = std::min((i / runs_ + 1) * span_ * s_.pixels, pixels);
          if (first >= span_end) continue;  // the last chunk may be shorter
          kernel(data + first * s_.c, std::min(kRun, span_end - first), s_.c, scratch.data(), moments + i * s_.c);
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

  // (groups, C) each; the variance is biased.
  void finish(acc_t<T>* mean, acc_t<T>* var) const {
    const int64_t group_images = s_.n / s_.groups();
    parallel_for(0, s_.groups() * s_.c, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / s_.c * group_images, last = first + group_images;
        Moments total{0, 0};
        double count = 0;
        for (int64_t n = first; n < last; n += span_) {
          const Moments* moments = moments_.data() + n / span_ * runs_ * s_.c + i % s_.c;
          int64_t pixels = std::min(span_, last - n) * s_.pixels;
          for (; pixels > 0; moments += s_.c) {
            const int64_t run = std::min(pixels, s_.channels_last ? kRun : s_.pixels);
            merge(total, count, *moments, run);
            count += run;
            pixels -= run;
          }
        }
        mean[i] = static_cast<acc_t<T>>(total.mean);
        var[i] = static_cast<acc_t<T>>(total.m2 / count);
      }
    });
  }

 private:
  static constexpr int64_t kRun = 512;  // pixels of channels_last that are reduced at a time
  const Activations s_;
  const int64_t span_, runs_;
  std::vector<Moments> moments_;
};

}  // namespace pixnorm
