// The convolution of a label map on the CPU: tables, threads and the sums of the weight's gradient.
// label_conv_kernels.h has the arithmetic.
//
// Work is cut by shape alone and partial sums are added in a fixed order, so results do not depend on the number of
// threads.

#include "cpu/label_conv.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "dispatch.h"

#define PIXNORM_VECTOR_CODE "cpu/label_conv_kernels.h"
#include "cpu/foreach_isa.h"

namespace pixnorm::label_conv {
namespace {

Shape shape_of(const Tensor& labels, const Tensor& weight, std::optional<double> negative_slope) {
  STD_TORCH_CHECK(labels.dim() == 3 && labels.scalar_type() == ScalarType::Long,
                  "pixnorm: labels must be 3-D, of int64");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
                  "pixnorm: weight must be (O, L, k, k) with odd k");
  return {labels.size(0),
          labels.size(1),
          labels.size(2),
          weight.size(1),
          weight.size(0),
          static_cast<int>(weight.size(2)),
          Activation(negative_slope)};
}

// The padded labels.
Buffer<int32_t> pad(const Shape& s, const Tensor& labels, int64_t ignore) {
  const Tensor given = dense(labels);
  const auto* from = static_cast<const int64_t*>(given.data_ptr());
  const auto nothing = static_cast<int32_t>(s.classes);
  const int64_t margin = s.k / 2, height = s.h + s.k - 1;
  Buffer<int32_t> padded(s.n * s.padded());
  parallel_for(0, s.n * height, ceil_div(1 << 15, s.pitch()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / height, h = i % height - margin;
      int32_t* to = padded.data() + i * s.pitch();
      std::fill(to, to + s.pitch(), nothing);
      if (h < 0 || h >= s.h) continue;
      for (int64_t w = 0; w < s.w; ++w) {
        const int64_t label = from[(n * s.h + h) * s.w + w];
        if (label != ignore && label >= 0 && label < s.classes) to[margin + w] = static_cast<int32_t>(label);
      }
    }
  });
  return padded;
}

// Calls f(entry) for the entries of a label that contain a tap.
template <class F>
void for_entries_of(const Shape& s, int tap, const F& f) {
  f(kAll);
  f(1 + tap / s.k);
  f(1 + s.k + tap % s.k);
  f(1 + 2 * s.k + tap);
}

// [label][entry][O], padded with zeros. The bias is part of the central tap, that of `classes` too. The sum over all
// taps is a pixel of y, behind the activation.
template <class T>
Buffer<acc_t<T>> make_table(const Shape& s, const Tensor& weight, const std::optional<Tensor>& bias) {
  using A = acc_t<T>;
  const Tensor given = dense(weight);
  const T* from = data_of<T>(given);
  const std::vector<A> shift = bias ? to_vector<A>(*bias) : std::vector<A>(s.out, 0);
  const int taps = s.k * s.k;
  const int64_t width = s.out_padded();
  Buffer<A> table(s.rows() * width);
  parallel_for(0, s.classes + 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t label = begin; label < end; ++label) {
      A* const rows = table.data() + label * s.entries() * width;
      std::fill(rows, rows + s.entries() * width, A(0));
      for (int tap = 0; tap < taps; ++tap) {
        const bool with_bias = bias && tap == taps / 2;
        if (label == s.classes && !with_bias) continue;
        A* const own = rows + (1 + 2 * s.k + tap) * width;
        for (int64_t o = 0; o < s.out; ++o) {
          own[o] = (label < s.classes ? static_cast<A>(from[(o * s.classes + label) * taps + tap]) : A(0)) +
                   (with_bias ? shift[o] : A(0));
        }
        for_entries_of(s, tap, [&](int64_t entry) {
          A* const to = rows + entry * width;
          if (to == own) return;
          for (int64_t o = 0; o < s.out; ++o) to[o] += own[o];
        });
      }
      if (!s.activation.on) continue;
      for (int64_t o = 0; o < s.out; ++o) {
        baseline::activate(rows[kAll * width + o], static_cast<A>(s.activation.slope));
      }
    }
  });
  return table;
}

Tensor label_conv_fwd(const Tensor& labels, const Tensor& weight, const std::optional<Tensor>& bias, int64_t ignore,
                      std::optional<double> negative_slope) {
  const Shape s = shape_of(labels, weight, negative_slope);
  if (bias) {
    check_sizes(*bias, "bias", {s.out});
    check_same_dtype(*bias, "bias", weight);
  }
  return dispatch_floating(weight.scalar_type(), [&](auto type) -> Tensor {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor y = empty({s.n, s.out, s.h, s.w}, dtype_of<T>);
    if (y.numel() == 0) return y;
    const Buffer<int32_t> padded = pad(s, labels, ignore);
    const Buffer<A> table = make_table<T>(s, weight, bias);
    const auto kernel = PIXNORM_BY_ISA(label_forward<T>);
    T* const to = static_cast<T*>(y.data_ptr());
    // Long runs of y, of sums that fit in the L2 cache.
    constexpr int64_t kSums = 1 << 17, kLongest = 1024;
    const int64_t strip = std::clamp(kSums / s.out_padded(), kStrip, kLongest), strips = ceil_div(s.pixels(), strip);
    parallel_for(0, s.n * strips, 1, [&](int64_t begin, int64_t end) {
      const Buffer<A> sums(strip * s.out_padded());
      const Buffer<const A*> values(strip);
      const Buffer<int32_t> rows(s.k * s.k);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / strips, first = i % strips * strip;
        kernel(s, table.data(), padded.data() + n * s.padded(), first, std::min(strip, s.pixels() - first),
               to + n * s.out * s.pixels(), sums.data(), values.data(), rows.data());
      }
    });
    return y;
  });
}

// ---- gradient of the weight ----

// Sums of one piece of work: a segment of the pixels and a group of channels.
constexpr int kBlocks = 2, kGroup = kBlocks * kBlock;

template <class T>
void piece_sums(const Shape& s, const int32_t* padded, const T* dy, bool channels_last, const T* y, int64_t begin,
                int64_t end, int64_t group, double* sums) {
  using A = acc_t<T>;
  // Sums over many pixels would lose digits in float32, so they are emptied into float64 in time; not so often that
  // this takes longer than the sums themselves.
  constexpr int64_t kFewestStrips = 16, kMostStrips = 64;
  const int64_t numbers = (s.rows() + 1) * kGroup;
  const int64_t every = std::clamp<int64_t>(s.rows() / kStrip, kFewestStrips, kMostStrips);
  const int64_t strips = ceil_div(s.pixels(), kStrip);
  const auto kernel = PIXNORM_BY_ISA(label_backward<T, kBlocks>);
  const Buffer<A> table(numbers), strip(2 * kBlocks * kStrip * kBlock);
  const Buffer<int32_t> rows(s.k * s.k);
  std::fill(sums, sums + numbers, 0.0);
  std::fill(table.data(), table.data() + numbers, A(0));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / strips, first = i % strips * kStrip;
    kernel(s, padded + n * s.padded(), first, std::min(kStrip, s.pixels() - first), dy, channels_last, y, n,
           group * kBlocks, table.data(), table.data() + s.rows() * kGroup, strip.data(), rows.data());
    if ((i + 1 - begin) % every == 0 || i + 1 == end) {
      for (int64_t j = 0; j < numbers; ++j) {
        sums[j] += table[j];
        table[j] = 0;
      }
    }
  }
}

std::tuple<Tensor, Tensor> label_conv_grad(const Tensor& grad_y, const Tensor& labels, const Tensor& weight,
                                           const std::optional<Tensor>& y, bool has_bias, int64_t ignore,
                                           std::optional<double> negative_slope) {
  const Shape s = shape_of(labels, weight, negative_slope);
  check_sizes(grad_y, "grad_y", {s.n, s.out, s.h, s.w});
  check_same_dtype(grad_y, "grad_y", weight);
  STD_TORCH_CHECK(y.has_value() == s.activation.on, "pixnorm: y is needed with an activation, and only then");
  if (y) {
    check_sizes(*y, "y", {s.n, s.out, s.h, s.w});
    check_same_dtype(*y, "y", weight);
  }
  return dispatch_floating(weight.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::type;
    Tensor dw = empty({s.out, s.classes, s.k, s.k}, dtype_of<T>), db = empty({has_bias ? s.out : 0}, dtype_of<T>);
    if (grad_y.numel() == 0) {
      torch::stable::fill_(dw, 0);
      torch::stable::fill_(db, 0);
      return {dw, db};
    }
    const MemoryFormat layout = layout_of(grad_y);
    const Tensor dy_dense = dense(grad_y, layout), y_dense = y ? dense(*y) : dy_dense;
    const Buffer<int32_t> padded = pad(s, labels, ignore);
    constexpr int64_t kStripsPerSegment = 64, kMostSegments = 4;
    const int64_t groups = ceil_div(s.out, kGroup), strips = s.n * ceil_div(s.pixels(), kStrip);
    const int64_t segments = std::clamp<int64_t>(strips / kStripsPerSegment, 1, kMostSegments);
    const int64_t numbers = (s.rows() + 1) * kGroup;
    const Buffer<double> sums(segments * groups * numbers);
    parallel_for(0, segments * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t segment = i / groups;
        piece_sums<T>(s, padded.data(), data_of<T>(dy_dense), layout == MemoryFormat::ChannelsLast,
                      y ? data_of<T>(y_dense) : nullptr, strips * segment / segments, strips * (segment + 1) / segments,
                      i % groups, sums.data() + i * numbers);
      }
    });
    T *const to = static_cast<T*>(dw.data_ptr()), *const to_bias = static_cast<T*>(db.data_ptr());
    const int taps = s.k * s.k;
    // The sums of a segment for a label's entries, or from row s.rows() on for the bias.
    const auto at = [&](int64_t segment, int64_t group, int64_t row) {
      return sums.data() + (segment * groups + group) * numbers + row * kGroup;
    };
    parallel_for(0, groups * s.classes, 4, [&](int64_t begin, int64_t end) {
      std::vector<double> total(s.entries() * kGroup);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / s.classes, label = i % s.classes, o0 = group * kGroup;
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t segment = 0; segment < segments; ++segment) {
          const double* from = at(segment, group, label * s.entries());
          for (size_t j = 0; j < total.size(); ++j) total[j] += from[j];
        }
        for (int64_t o = 0; o < std::min<int64_t>(kGroup, s.out - o0); ++o) {
          for (int tap = 0; tap < taps; ++tap) {
            double sum = 0;
            for_entries_of(s, tap, [&](int64_t entry) { sum += total[entry * kGroup + o]; });
            to[((o0 + o) * s.classes + label) * taps + tap] = static_cast<T>(sum);
          }
        }
      }
    });
    for (int64_t o = 0; o < db.numel(); ++o) {
      double sum = 0;
      for (int64_t segment = 0; segment < segments; ++segment) sum += at(segment, o / kGroup, s.rows())[o % kGroup];
      to_bias[o] = static_cast<T>(sum);
    }
    return {dw, db};
  });
}

}  // namespace
}  // namespace pixnorm::label_conv

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) {
  m.impl("label_conv_fwd", TORCH_BOX(&pixnorm::label_conv::label_conv_fwd));
  m.impl("label_conv_grad", TORCH_BOX(&pixnorm::label_conv::label_conv_grad));
}
