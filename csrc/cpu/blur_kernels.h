// Vector code of the blur, which is separable: along h, rows are weighted sums of rows, kept in registers; along w,
// neighbours are added.
//
// In channels_last vectors run over the channels of a pixel, and neighbours are other vectors. In NCHW they run over
// the pixels of a row, and neighbours are vectors shifted by one. Small planes in NCHW, whose rows are shorter than
// vectors, are transposed to pixels of kBlock planes, and are then as in channels_last.

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

  // The sum at an element.
  template <class V, int kCount>
  PIXNORM_INLINE V sum(int64_t i) const {
    V total = read<V>(at[0] + i) * weight[0];
#pragma GCC unroll 4
    for (int row = 1; row < kCount; ++row) total += read<V>(at[row] + i) * weight[row];
    return total;
  }
};

// Calls f(count) with it as a compile-time constant.
template <class F>
PIXNORM_INLINE void with_count(int count, const F& f) {
  if (count == 1) f(std::integral_constant<int, 1>{});
  if (count == 2) f(std::integral_constant<int, 2>{});
  if (count == 3) f(std::integral_constant<int, 3>{});
  if (count == 4) f(std::integral_constant<int, 4>{});
}

// An element and its neighbour: after upsampling one of the two pixels on either side of their border, but for a
// factor.
template <class A, class V>
PIXNORM_INLINE V three_to_one(V here, V beside) {
  return here * A(3) + beside;
}

// ---- channels_last ----

// kWays vectors of the channels of a row, from channel c on; all of its pixels.
template <class V, Resample kResample, int kCount, int kWays, class T, class To>
PIXNORM_INLINE void filter_channels(const Shape& s, const Rows<T>& rows, int64_t c, To* y) {
  using A = acc_t<T>;
  struct Pixel {
    V at[kWays];
  };
  constexpr int n = sizeof(V) / sizeof(A);
  const auto along_h = [&](int64_t w) __attribute__((always_inline)) {
    Pixel pixel{};
    if (w < s.w) {
#pragma GCC unroll 4
      for (int i = 0; i < kWays; ++i) pixel.at[i] = rows.template sum<V, kCount>(w * s.channels + c + i * n);
    }
    return pixel;
  };
  const auto put = [&](int64_t w, const auto& value) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < kWays; ++i) write<V>(y + w * s.channels + c + i * n, value(i));
  };
  Pixel before{}, here = along_h(0), after;
  const auto left = [&](int i) __attribute__((always_inline)) { return three_to_one<A>(here.at[i], before.at[i]); };
  const auto right = [&](int i) __attribute__((always_inline)) { return three_to_one<A>(here.at[i], after.at[i]); };
  const auto middle = [&](int i) __attribute__((always_inline)) {
    return V(here.at[i] * A(2) + (before.at[i] + after.at[i]));
  };
  for (int64_t step = 0; step < s.steps(); ++step) {
    if constexpr (kResample == Resample::kDown) {
      const Pixel second = along_h(2 * step + 1);
      after = along_h(2 * step + 2);
      put(step, [&](int i) { return V(left(i) + three_to_one<A>(second.at[i], after.at[i])); });
      before = second;
    } else {
      after = along_h(step + 1);
      if constexpr (kResample == Resample::kNone) {
        put(step, middle);
      } else {
        put(2 * step, left);
        if (2 * step + 1 < s.out_w) put(2 * step + 1, right);
      }
      before = here;
    }
    here = after;
  }
}

// ---- NCHW ----

// Elements of two vectors in turn: the first half of the result, and with kHalf = 1 the second.
template <int kHalf, class V, int... j>
PIXNORM_INLINE V interleaved(V a, V b, std::integer_sequence<int, j...>) {
  constexpr int n = sizeof...(j);
  return __builtin_shufflevector(a, b, (kHalf * (n / 2) + j / 2 + j % 2 * n)...);
}

// The last element of a vector and then the others of the next one; the first of that after the others of a vector.
template <class V, int... j>
PIXNORM_INLINE V shifted_right(V before, V here, std::integer_sequence<int, j...>) {
  return __builtin_shufflevector(before, here, (int{sizeof...(j)} - 1 + j)...);
}

template <class V, int... j>
PIXNORM_INLINE V shifted_left(V here, V after, std::integer_sequence<int, j...>) {
  return __builtin_shufflevector(here, after, (1 + j)...);
}

template <Resample kResample, int kCount, class T>
PIXNORM_INLINE void filter_row(const Shape& s, const Rows<T>& rows, T* y) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int n = kLanes<A>;
  constexpr auto kIndices = std::make_integer_sequence<int, n>{};
  const auto along_h = [&](int64_t w) __attribute__((always_inline)) {
    if (w + n <= s.w) return rows.template sum<V, kCount>(w);
    V value{};
    for (int i = 0; w + i < s.w; ++i) value[i] = rows.template sum<A, kCount>(w + i);
    return value;
  };
  const auto put = [&](int64_t w, V value) __attribute__((always_inline)) {
    if (w + n <= s.out_w) return write<V>(y + w, value);
    for (int i = 0; w + i < s.out_w; ++i) write<A>(y + w + i, value[i]);
  };
  const auto left = [&](V before, V here) __attribute__((always_inline)) {
    return three_to_one<A>(here, shifted_right(before, here, kIndices));
  };
  const auto right = [&](V here, V after) __attribute__((always_inline)) {
    return three_to_one<A>(here, shifted_left(here, after, kIndices));
  };
  V before{}, here = along_h(0);
  for (int64_t step = 0; step < s.steps(); step += n) {
    if constexpr (kResample == Resample::kDown) {
      const V second = along_h(2 * step + n), after = along_h(2 * step + 2 * n);
      const V evens = every_other<0>(left(before, here), left(here, second), kIndices);
      put(step, evens + every_other<1>(right(here, second), right(second, after), kIndices));
      before = second, here = after;
    } else {
      const V after = along_h(step + n);
      if constexpr (kResample == Resample::kNone) {
        put(step, here * A(2) + (shifted_right(before, here, kIndices) + shifted_left(here, after, kIndices)));
      } else {
        const V a = left(before, here), b = right(here, after);
        put(2 * step, interleaved<0>(a, b, kIndices));
        put(2 * step + n, interleaved<1>(a, b, kIndices));
      }
      before = here, here = after;
    }
  }
}

// ---- entry points ----

// Rows [begin, end) of an image of y, or of a plane in NCHW. x and y point to the images.
template <class T, Resample kResample, bool kChannelsLast, class To>
void blur_rows(const Shape& s, const T* x, int64_t begin, int64_t end, To* y) {
  using A = acc_t<T>;
  [[maybe_unused]] constexpr int n = kLanes<A>, kWays = 4;
  for (int64_t row = begin; row < end; ++row) {
    const auto rows = Rows<T>::template of<kResample>(s, x, row);
    To* const of_row = y + row * s.out_w * s.channels;
    with_count(rows.count, [&](auto count) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
      if constexpr (kChannelsLast) {
        int64_t c = 0;
        for (; c + kWays * n <= s.channels; c += kWays * n) {
          filter_channels<Vec<A>, kResample, kCount, kWays>(s, rows, c, of_row);
        }
        for (; c + n <= s.channels; c += n) filter_channels<Vec<A>, kResample, kCount, 1>(s, rows, c, of_row);
        for (; c < s.channels; ++c) filter_channels<A, kResample, kCount, 1>(s, rows, c, of_row);
      } else {
        filter_row<kResample, kCount>(s, rows, of_row);
      }
    });
  }
}

// A block of `total` small planes in NCHW. `before` and `after` hold them as [pixel][kBlock].
template <class T, Resample kResample>
void blur_planes(const Shape& s, const T* x, int64_t total, int64_t block, T* y, acc_t<T>* before, acc_t<T>* after) {
  using A = acc_t<T>;
  const int64_t pixels = s.h * s.w, out_pixels = s.out_h * s.out_w;
  const Plane<A> of_x = plane_of<T>(x, false, total, pixels, 0, block);
  const Plane<A> of_y = plane_of<T>(y, false, total, out_pixels, 0, block);
  of_x.read(of_x, 0, pixels, before);
  blur_rows<A, kResample, true>(s, before, 0, s.out_h, after);
  of_y.write(of_y, 0, out_pixels, after);
}
