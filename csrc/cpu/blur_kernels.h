// Vector code of the blur, which is separable. Along h, rows are weighted sums of rows, whatever a pixel is. Along w,
// neighbours are one element apart in NCHW, where vectors run over the pixels of a row, and `channels` in
// channels_last, where they run over the channels of a pixel. Small planes in NCHW are transposed to pixels of kBlock
// planes.

#include "cpu/runs.h"
#include "cpu/upsample_kernels.h"
// in this order
#include "cpu/rows.h"

using blur::Resample;
using blur::Shape;

// Weighted rows of x that make up one after filtering along h; those outside the image are left out.
template <class T>
struct Rows {
  const T* at[4];
  acc_t<T> weight[4];
  int count = 0;

  template <Resample kResample>
  static PIXNORM_INLINE Rows of(const Shape& s, const T* x, int64_t row) {
    Rows rows;
    const auto add = [&](int64_t h, int weight) __attribute__((always_inline)) {
      if (h < 0 || h >= s.h) return;
      rows.at[rows.count] = x + h * s.w * s.channels;
      rows.weight[rows.count++] = static_cast<acc_t<T>>(weight * s.factor);
    };
    if constexpr (kResample == Resample::kNone) {
      add(row - 1, 1), add(row, 2), add(row + 1, 1);
    } else if constexpr (kResample == Resample::kDown) {
      add(2 * row - 1, 1), add(2 * row, 3), add(2 * row + 1, 3), add(2 * row + 2, 1);
    } else if (row % 2 == 0) {
      add(row / 2 - 1, 1), add(row / 2, 3);
    } else {
      add(row / 2, 3), add(row / 2 + 1, 1);
    }
    return rows;
  }

  // Their elements [first, first + count).
  PIXNORM_INLINE void sum(int64_t first, int64_t elements, acc_t<T>* to) const {
    switch (count) {
      case 1:
        return sum_of<1>(first, elements, to);
      case 2:
        return sum_of<2>(first, elements, to);
      case 3:
        return sum_of<3>(first, elements, to);
      default:
        return sum_of<4>(first, elements, to);
    }
  }

 private:
  template <int kCount>
  PIXNORM_INLINE void sum_of(int64_t first, int64_t elements, acc_t<T>* to) const {
    using A = acc_t<T>;
    constexpr int n = kLanes<A>;
    const auto at_element = [&](auto zero, int64_t i) __attribute__((always_inline)) {
      using V = decltype(zero);
      V sum = read<V>(at[0] + first + i) * weight[0];
#pragma GCC unroll 4
      for (int row = 1; row < kCount; ++row) sum += read<V>(at[row] + first + i) * weight[row];
      write(to + i, sum);
    };
    int64_t i = 0;
    for (; i + n <= elements; i += n) at_element(Vec<A>{}, i);
    for (; i < elements; ++i) at_element(A(0), i);
  }
};

// Elements of two vectors in turn: the first half of the result, and with kHalf = 1 the second.
template <int kHalf, class V, int... j>
PIXNORM_INLINE V interleaved(V a, V b, std::integer_sequence<int, j...>) {
  constexpr int n = sizeof...(j);
  return __builtin_shufflevector(a, b, (kHalf * (n / 2) + j / 2 + j % 2 * n)...);
}

// Filters `steps` steps of a row along w; `end` is where the row of y ends. `from` has a pixel more on either side.
template <Resample kResample, bool kChannelsLast, class A, class To>
PIXNORM_INLINE void filter_along_w(const A* from, int64_t steps, int64_t channels, To* to, const To* end) {
  using V = Vec<A>;
  constexpr int n = kLanes<A>;
  const int64_t c = kChannelsLast ? channels : 1;
  // Three quarters of an element and one of its neighbour on this side, but for a factor.
  const auto left = [&](auto zero, const A* at) __attribute__((always_inline)) {
    using Number = decltype(zero);
    return Number(read<Number>(at) * A(3) + read<Number>(at - c));
  };
  const auto right = [&](auto zero, const A* at) __attribute__((always_inline)) {
    using Number = decltype(zero);
    return Number(read<Number>(at) * A(3) + read<Number>(at + c));
  };
  if constexpr (kResample == Resample::kNone) {
    const auto filter = [&](auto zero, int64_t i) __attribute__((always_inline)) {
      using Number = decltype(zero);
      const Number sides = read<Number>(from + i - c) + read<Number>(from + i + c);
      write<Number>(to + i, read<Number>(from + i) * A(2) + sides);
    };
    int64_t i = 0;
    for (; i + n <= steps * c; i += n) filter(V{}, i);
    for (; i < steps * c; ++i) filter(A(0), i);
  } else if constexpr (kChannelsLast) {
    const auto filter = [&](auto zero, int64_t i, To* target, bool both) __attribute__((always_inline)) {
      if constexpr (kResample == Resample::kDown) {
        write(target, decltype(zero)(left(zero, from + i) + right(zero, from + i + c)));
      } else {
        write(target, left(zero, from + i));
        if (both) write(target + c, right(zero, from + i));
      }
    };
    constexpr int kIn = kResample == Resample::kDown ? 2 : 1, kOut = kResample == Resample::kUp ? 2 : 1;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t first = step * kIn * c;
      To* const target = to + step * kOut * c;
      const bool both = end - target > c;
      int64_t i = 0;
      for (; i + n <= c; i += n) filter(V{}, first + i, target + i, both);
      for (; i < c; ++i) filter(A(0), first + i, target + i, both);
    }
  } else {
    constexpr auto kIndices = std::make_integer_sequence<int, n>{};
    int64_t i = 0;
    if constexpr (kResample == Resample::kDown) {
      for (; i + n <= steps; i += n) {
        const A *const a = from + 2 * i, *const b = a + n;
        const V evens = every_other<0>(left(V{}, a), left(V{}, b), kIndices);
        write<V>(to + i, evens + every_other<1>(right(V{}, a), right(V{}, b), kIndices));
      }
      for (; i < steps; ++i) write<A>(to + i, left(A(0), from + 2 * i) + right(A(0), from + 2 * i + 1));
    } else {
      for (; i + n <= steps && end - (to + 2 * i) >= 2 * n; i += n) {
        const V a = left(V{}, from + i), b = right(V{}, from + i);
        write<V>(to + 2 * i, interleaved<0>(a, b, kIndices));
        write<V>(to + 2 * i + n, interleaved<1>(a, b, kIndices));
      }
      for (; i < steps; ++i) {
        write<A>(to + 2 * i, left(A(0), from + i));
        if (end - (to + 2 * i) > 1) write<A>(to + 2 * i + 1, right(A(0), from + i));
      }
    }
  }
}

// Rows [begin, end) of an image of y. x and y point to their images.
template <Resample kResample, bool kChannelsLast, class T, class To>
PIXNORM_INLINE void filter_rows(const Shape& s, const T* x, int64_t begin, int64_t end, To* y, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const int64_t c = kChannelsLast ? s.channels : 1, pitch = s.pitch(), strip = s.strip(), band = s.band();
  for (int64_t top = begin; top < end; top += band) {
    const int64_t bottom = top + band < end ? top + band : end;
    for (int64_t step = 0; step < s.steps(); step += strip) {
      const int64_t steps = s.steps() - step < strip ? s.steps() - step : strip;
      // The pixels of x that these need, as far as there are such.
      const int64_t before = step * s.in() - 1, after = (step + steps) * s.in() + 1;
      const int64_t first = before < 0 ? 0 : before, last = after < s.w ? after : s.w;
      for (int64_t row = top; row < bottom; ++row) {
        A* const to = scratch + (row - top) * pitch;
        for (int64_t i = 0; i < (first - before) * c; ++i) to[i] = 0;
        for (int64_t i = (last - before) * c; i < (after - before) * c; ++i) to[i] = 0;
        Rows<T>::template of<kResample>(s, x, row).sum(first * c, (last - first) * c, to + (first - before) * c);
      }
      for (int64_t row = top; row < bottom; ++row) {
        To *const of_row = y + row * s.out_w * c, *const row_end = of_row + s.out_w * c;
        filter_along_w<kResample, kChannelsLast>(scratch + (row - top) * pitch + c, steps, c,
                                                 of_row + step * s.out() * c, row_end);
      }
    }
  }
}

template <class T, Resample kResample, bool kChannelsLast>
void blur_rows(const Shape& s, const T* x, int64_t begin, int64_t end, T* y, acc_t<T>* scratch) {
  filter_rows<kResample, kChannelsLast>(s, x, begin, end, y, scratch);
}

// A block of `total` small planes in NCHW. `before` and `after` hold them as [pixel][kBlock].
template <class T, Resample kResample>
void blur_planes(const Shape& s, const T* x, int64_t total, int64_t block, T* y, acc_t<T>* before, acc_t<T>* after,
                 acc_t<T>* scratch) {
  using A = acc_t<T>;
  const int64_t pixels = s.h * s.w, out_pixels = s.out_h * s.out_w;
  const Plane<A> of_x = plane_of<T>(x, false, total, pixels, 0, block);
  const Plane<A> of_y = plane_of<T>(y, false, total, out_pixels, 0, block);
  of_x.read(of_x, 0, pixels, before);
  filter_rows<kResample, true>(s, before, 0, s.out_h, after, scratch);
  of_y.write(of_y, 0, out_pixels, after);
}
