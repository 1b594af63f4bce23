// Vector code of x · s with the sums of s² that the taps of a kernel see, and of its gradient.
//
// Sums are by class of rows and of columns, [rows.classes][columns.classes]. Those that a tap sees are a combination of
// them, and so is the gradient at a pixel of what its class gets from the taps: both are small products.

#include "cpu/runs.h"

using modulated_conv::Axis;
using modulated_conv::Image;

// ---- x · s and its gradient at one vector, or one element ----

template <class V, class T>
PIXNORM_INLINE V scale_at(const T* x, const T* s, T* y) {
  const V style = read<V>(s);
  write<V>(y, read<V>(x) * style);
  return style * style;
}

// `weight` is twice the gradient of the class's sum.
template <class V, class T>
PIXNORM_INLINE void gradients_at(const T* dy, const T* x, const T* s, V weight, T* dx, T* ds) {
  const V d = read<V>(dy), style = read<V>(s);
  write<V>(dx, d * style);
  write<V>(ds, d * read<V>(x) + style * weight);
}

// ---- NCHW: a plane, whose sums or weights of classes are `stride` numbers apart ----

template <class T>
void scale_plane(const Image& image, const T* x, const T* s, T* y, double* sums, int64_t stride) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int n = kLanes<A>, kWays = 4;
  constexpr int64_t kRun = 4096;  // sums over a run are in A
  const int64_t pixels = image.pixels(), width = image.columns.size, classes = image.columns.classes;
  double total = 0;
  for (int64_t first = 0; first < pixels; first += kRun) {
    const int64_t end = first + kRun < pixels ? first + kRun : pixels;
    V sum[kWays] = {};
    int64_t i = first;
    for (; i + kWays * n <= end; i += kWays * n) {
#pragma GCC unroll 4
      for (int way = 0; way < kWays; ++way) {
        const int64_t at = i + way * n;
        sum[way] += scale_at<V>(x + at, s + at, y + at);
      }
    }
    for (; i + n <= end; i += n) sum[0] += scale_at<V>(x + i, s + i, y + i);
    A tail = 0;
    for (; i < end; ++i) tail += scale_at<A>(x + i, s + i, y + i);
    total += sum_lanes<A>(V((sum[0] + sum[1]) + (sum[2] + sum[3]))) + tail;
  }
  for (int64_t i = 0; i < image.classes(); ++i) sums[i * stride] = 0;
  // The few at the borders once more, from cache; what is left of the total is inside.
  const auto square = [&](int64_t i) __attribute__((always_inline)) {
    const A style = read<A>(s + i);
    return style * style;
  };
  for (int64_t column = 1; column < classes; ++column) {
    const int64_t w = image.columns.border[column - 1];
    for (int64_t h = 0; h < image.rows.size; ++h) {
      sums[(image.rows.class_of[h] * classes + column) * stride] += square(h * width + w);
    }
  }
  double inside = total;
  for (int64_t column = 1; column < classes; ++column) inside -= sums[column * stride];
  for (int64_t row = 1; row < image.rows.classes; ++row) {
    const int64_t h = image.rows.border[row - 1];
    double in_row = 0;
    for (int64_t w = 0; w < width; ++w) {
      if (image.columns.class_of[w] == 0) in_row += square(h * width + w);
    }
    double* const of_row = sums + row * classes * stride;
    of_row[0] = in_row;
    for (int64_t column = 0; column < classes; ++column) inside -= of_row[column * stride];
  }
  if (inside != inside) {  // of infinities at the border nothing can be subtracted
    inside = 0;
    for (int64_t i = 0; i < pixels; ++i) {
      if (image.rows.class_of[i / width] == 0 && image.columns.class_of[i % width] == 0) inside += square(i);
    }
  }
  const bool any = image.rows.has_inside() && image.columns.has_inside();
  sums[0] = !any || inside < 0 ? 0 : inside;  // NaN stays
}

template <class T>
void scale_plane_backward(const Image& image, const T* dy, const T* x, const T* s, const acc_t<T>* weights,
                          int64_t stride, T* dx, T* ds) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int n = kLanes<A>;
  const int64_t width = image.columns.size, classes = image.columns.classes;
  for (int64_t h = 0; h < image.rows.size;) {
    const int64_t end_row = image.rows.run_end(h);
    const A* const of_row = weights + image.rows.class_of[h] * classes * stride;
    const int64_t end = end_row * width;
    int64_t i = h * width;
    const V inside = broadcast<A>(of_row[0]);
#pragma GCC unroll 2
    for (; i + n <= end; i += n) gradients_at<V>(dy + i, x + i, s + i, inside, dx + i, ds + i);
    for (; i < end; ++i) gradients_at<A>(dy + i, x + i, s + i, of_row[0], dx + i, ds + i);
    for (; h < end_row; ++h) {
      for (int64_t column = 1; column < classes; ++column) {
        const int64_t at = h * width + image.columns.border[column - 1];
        gradients_at<A>(dy + at, x + at, s + at, of_row[column * stride], dx + at, ds + at);
      }
    }
  }
}

// ---- channels_last: some rows of an image ----

// Calls body(first element, pixels, class) for runs of pixels of one class, in rows [begin, end).
template <class Body>
PIXNORM_INLINE void for_classes(const Image& image, int64_t begin, int64_t end, const Body& body) {
  for (int64_t h = begin; h < end; ++h) {
    for (int64_t w = 0; w < image.columns.size;) {
      const int64_t run = image.columns.run_end(w);
      body(((h - begin) * image.columns.size + w) * image.channels, run - w,
           image.rows.class_of[h] * image.columns.classes + image.columns.class_of[w]);
      w = run;
    }
  }
}

// Adds to sums, [classes][channels]. The pointers are to row `begin`.
template <class T>
void scale_rows(const Image& image, int64_t begin, int64_t end, const T* x, const T* s, T* y, acc_t<T>* sums) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int n = kLanes<A>, kWays = 4;
  const int64_t channels = image.channels;
  for (int64_t i = 0; i < image.classes() * channels; ++i) sums[i] = 0;
  for_classes(image, begin, end, [&](int64_t at, int64_t pixels, int64_t of) __attribute__((always_inline)) {
    A* const to = sums + of * channels;
    const auto visit = [&](auto ways) __attribute__((always_inline)) {
      constexpr int kPixels = decltype(ways)::value;
      int64_t c = 0;
      for (; c + n <= channels; c += n) {
        V sum = load(to + c);
#pragma GCC unroll 4
        for (int p = 0; p < kPixels; ++p) {
          const int64_t i = at + p * channels + c;
          sum += scale_at<V>(x + i, s + i, y + i);
        }
        store(to + c, sum);
      }
      for (; c < channels; ++c) {
        for (int p = 0; p < kPixels; ++p) {
          const int64_t i = at + p * channels + c;
          to[c] += scale_at<A>(x + i, s + i, y + i);
        }
      }
      at += kPixels * channels;
      pixels -= kPixels;
    };
    while (pixels >= kWays) visit(std::integral_constant<int, kWays>{});
    while (pixels > 0) visit(std::integral_constant<int, 1>{});
  });
}

template <class T>
void scale_rows_backward(const Image& image, int64_t begin, int64_t end, const T* dy, const T* x, const T* s,
                         const acc_t<T>* weights, T* dx, T* ds) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int n = kLanes<A>;
  const int64_t channels = image.channels;
  for_classes(image, begin, end, [&](int64_t at, int64_t pixels, int64_t of) __attribute__((always_inline)) {
    const A* const from = weights + of * channels;
    for (; pixels > 0; --pixels, at += channels) {
      int64_t c = 0;
#pragma GCC unroll 2
      for (; c + n <= channels; c += n) {
        const int64_t i = at + c;
        gradients_at<V>(dy + i, x + i, s + i, load(from + c), dx + i, ds + i);
      }
      for (; c < channels; ++c) {
        const int64_t i = at + c;
        gradients_at<A>(dy + i, x + i, s + i, from[c], dx + i, ds + i);
      }
    }
  });
}

// ---- sums by class and by tap, for `channels` channels ----

// From [classes][channels] to [channels][taps]. `scratch` has columns.classes * channels numbers.
template <class A, class S>
void sums_of_taps(const Image& image, int64_t channels, const S* by_class, S* scratch, A* by_tap) {
  const int64_t classes = image.columns.classes, taps = image.taps();
  for (int64_t a = 0; a < image.rows.taps; ++a) {
    const float* const of_rows = image.rows.seen + a * image.rows.classes;
    for (int64_t i = 0; i < classes * channels; ++i) scratch[i] = 0;
    for (int64_t row = 0; row < image.rows.classes; ++row) {
      const S seen = of_rows[row];
      const S* const from = by_class + row * classes * channels;
      if (seen != 0) {
        for (int64_t i = 0; i < classes * channels; ++i) scratch[i] += seen * from[i];
      }
    }
    for (int64_t b = 0; b < image.columns.taps; ++b) {
      const float* const of_columns = image.columns.seen + b * classes;
      for (int64_t c = 0; c < channels; ++c) {
        S sum = 0;
        for (int64_t column = 0; column < classes; ++column) {
          if (of_columns[column] != 0) sum += of_columns[column] * scratch[column * channels + c];
        }
        by_tap[c * taps + a * image.columns.taps + b] = static_cast<A>(sum);
      }
    }
  }
}

// The transpose, times 2: from [channels][taps] to [classes][channels]. `scratch` has rows.taps * channels numbers.
template <class A>
void weights_of_classes(const Image& image, int64_t channels, const A* by_tap, A* scratch, A* by_class) {
  const int64_t classes = image.columns.classes, taps = image.columns.taps;
  for (int64_t column = 0; column < classes; ++column) {
    for (int64_t a = 0; a < image.rows.taps; ++a) {
      for (int64_t c = 0; c < channels; ++c) {
        const A* const from = by_tap + (c * image.rows.taps + a) * taps;
        A sum = 0;
        for (int64_t b = 0; b < taps; ++b) sum += image.columns.seen[b * classes + column] * from[b];
        scratch[a * channels + c] = 2 * sum;
      }
    }
    for (int64_t row = 0; row < image.rows.classes; ++row) {
      A* const to = by_class + (row * classes + column) * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] = 0;
      for (int64_t a = 0; a < image.rows.taps; ++a) {
        const A seen = image.rows.seen[a * image.rows.classes + row];
        for (int64_t c = 0; c < channels; ++c) to[c] += seen * scratch[a * channels + c];
      }
    }
  }
}
