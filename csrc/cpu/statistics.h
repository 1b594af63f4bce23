// Means and variances of whole tensors, per channel or per sample and channel. To be included after foreach_isa.h,
// whose vector code includes moments_kernels.h.
#pragma once

#include <algorithm>

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
// runs, by shape alone: kRun pixels in channels_last, kPlaneRun of a plane or less in NCHW. No run straddles two
// groups.
template <class T>
class Statistics {
 public:
  Statistics(const Activations& s, int64_t per_chunk)
      : s_(s),
        span_(s.instance ? 1 : per_chunk),
        per_plane_(ceil_div(s.pixels, kPlaneRun)),
        runs_(s.channels_last ? ceil_div(span_ * s.pixels, kRun) : span_ * per_plane_),
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
      return;
    }
    const auto kernel = PIXNORM_BY_ISA(moments_of_planes<T>);
    const int64_t count = (n1 - n0) * per_plane_ * s_.c, grain = ceil_div(1 << 14, std::min(s_.pixels, kPlaneRun));
    parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      if (per_plane_ == 1) {
        kernel(data + begin * s_.pixels, end - begin, s_.pixels, moments + begin);
        return;
      }
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / (per_plane_ * s_.c), first = i / s_.c % per_plane_ * kPlaneRun;
        kernel(data + (image * s_.c + i % s_.c) * s_.pixels + first, 1, std::min(kPlaneRun, s_.pixels - first),
               moments + i);
      }
    });
  }

  // (groups, C) each; the variance is biased.
  void finish(acc_t<T>* mean, acc_t<T>* var) const {
    constexpr int64_t kChannels = 16;
    const int64_t images = s_.n / s_.groups(), blocks = ceil_div(s_.c, kChannels);
    parallel_for(0, s_.groups() * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / blocks, c0 = i % blocks * kChannels, channels = std::min(kChannels, s_.c - c0);
        Moments total[kChannels] = {};
        double count = 0;
        for (int64_t n = group * images; n < (group + 1) * images; n += span_) {
          const int64_t in_span = std::min(span_, (group + 1) * images - n);
          for (int64_t run = 0; run < runs_; ++run) {
            const int64_t size = run_size(run, in_span);
            if (size <= 0) break;
            merge(total, count, moments_.data() + (n / span_ * runs_ + run) * s_.c + c0, size, channels);
            count += size;
          }
        }
        for (int64_t c = 0; c < channels; ++c) {
          mean[group * s_.c + c0 + c] = static_cast<acc_t<T>>(total[c].mean);
          var[group * s_.c + c0 + c] = static_cast<acc_t<T>>(total[c].m2 / count);
        }
      }
    });
  }

 private:
  static constexpr int64_t kRun = 512;           // pixels of channels_last that are reduced at a time
  static constexpr int64_t kPlaneRun = 1 << 14;  // pixels of a plane

  // Pixels of a run of a span of `images` images; none if it lies beyond them.
  int64_t run_size(int64_t run, int64_t images) const {
    if (s_.channels_last) return std::min(kRun, images * s_.pixels - run * kRun);
    return run >= images * per_plane_ ? 0 : std::min(kPlaneRun, s_.pixels - run % per_plane_ * kPlaneRun);
  }

  const Activations s_;
  const int64_t span_, per_plane_, runs_;
  const Buffer<Moments> moments_;
};

}  // namespace pixnorm
