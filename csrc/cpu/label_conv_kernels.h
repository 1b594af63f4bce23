// Vector code of the convolution of a label map. Lanes are output channels: rows of the table are added to the pixels
// of a strip, which then is transposed to NCHW; backward transposes the gradient and adds its pixels to rows of a
// table.

#include "cpu/rows.h"

using label_conv::kStrip;
using label_conv::Shape;

// Lists the rows of the table that make up a pixel; returns their number. `labels` points to the pixel's top left
// neighbour. kSize is k, or 0 for a k that is not known at compile time.
template <int kSize>
PIXNORM_INLINE int table_rows(const Shape& s, const int32_t* labels, int32_t* rows) {
  const int k = kSize ? kSize : s.k;
  const int64_t pitch = s.pitch();
  const auto entries = static_cast<int32_t>(1 + 2 * k + k * k);
  bool by_row = true, by_column = true, first_column_uniform = true;
#pragma GCC unroll 3
  for (int i = 0; i < k; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < k; ++j) {
      const int32_t label = labels[i * pitch + j];
      by_row &= label == labels[i * pitch];
      by_column &= label == labels[j];
    }
    first_column_uniform &= labels[i * pitch] == labels[0];
  }
  if (by_row) {
    if (first_column_uniform) {
      rows[0] = labels[0] * entries + label_conv::kAll;
      return 1;
    }
    for (int i = 0; i < k; ++i) rows[i] = labels[i * pitch] * entries + 1 + i;
    return k;
  }
  if (by_column) {
    for (int j = 0; j < k; ++j) rows[j] = labels[j] * entries + 1 + k + j;
    return k;
  }
  for (int i = 0; i < k; ++i) {
    for (int j = 0; j < k; ++j) rows[i * k + j] = labels[i * pitch + j] * entries + 1 + 2 * k + i * k + j;
  }
  return k * k;
}

// Calls body(pixel of the strip, table rows, their number) for `count` pixels from pixel `first` of an image on.
template <class Body>
PIXNORM_INLINE void for_strip(const Shape& s, const int32_t* labels, int64_t first, int64_t count, int32_t* rows,
                              const Body& body) {
  int64_t h = first / s.w, w = first % s.w;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* corner = labels + h * s.pitch() + w;
    body(i, rows, s.k == 3 ? table_rows<3>(s, corner, rows) : table_rows<0>(s, corner, rows));
    if (++w == s.w) w = 0, ++h;
  }
}

// Pixels [first, first + count) of an image. Every pixel is a row of the table, or a sum of rows, which is kept in
// `sums`, [pixel][channel]; `values` points to it. Then some channels at a time are transposed to y in registers.
template <class T>
void label_forward(const Shape& s, const acc_t<T>* table, const int32_t* labels, int64_t first, int64_t count, T* y,
                   acc_t<T>* sums, const acc_t<T>** values, int32_t* rows) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  const int64_t width = s.out_padded();
  const A slope = s.activation.on ? static_cast<A>(s.activation.slope) : A(1);
  for_strip(s, labels, first, count, rows,
            [&](int64_t pixel, const int32_t* list, int size) __attribute__((always_inline)) {
              if (size == 1) {
                values[pixel] = table + list[0] * width;
                return;
              }
              values[pixel] = sums;
              for (int64_t c = 0; c < width; c += n) {
                Vec<A> sum = load(table + list[0] * width + c);
                for (int i = 1; i < size; ++i) sum += load(table + list[i] * width + c);
                activate(sum, slope);
                store(sums + c, sum);
              }
              sums += width;
            });
  // The lines of a tile lie a plane apart, which the hardware prefetcher sees late.
  constexpr int64_t kAhead = 2 * 64 / sizeof(T);
  for (int64_t c = 0; c < s.out; c += n) {
    T* const to = y + c * s.pixels() + first;
    const int live = s.out - c < n ? static_cast<int>(s.out - c) : n;
    int64_t i = 0;
    for (; i + n <= count; i += n) {
      Vec<A> tile[n];
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) tile[l] = load(values[i + l] + c);
      transpose<A>(tile);
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) {
        if (l < live) {
          store_as<T>(to + l * s.pixels() + i, tile[l]);
          __builtin_prefetch(to + l * s.pixels() + i + kAhead, 1);
        }
      }
    }
    for (; i < count; ++i) {
      for (int l = 0; l < live; ++l) to[l * s.pixels() + i] = static_cast<T>(values[i][c + l]);
    }
  }
}

// Adds the gradients of such pixels, of kBlocks blocks of channels from `block` on, to a table
// [row][kBlocks][kBlock] and to their sums [kBlocks][kBlock]. `strip` holds 2 * kBlocks blocks, of dy and y; y is null
// without an activation.
template <class T, int kBlocks>
void label_backward(const Shape& s, const int32_t* labels, int64_t first, int64_t count, const T* dy,
                    bool channels_last, const T* y, int64_t image, int64_t block, acc_t<T>* table, acc_t<T>* sums,
                    acc_t<T>* strip, int32_t* rows) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>, kVectors = kBlocks * kBlock / n, kEach = kBlock / n;
  const int64_t blocks = s.blocks() - block < kBlocks ? s.blocks() - block : kBlocks;
  const auto slope = static_cast<A>(s.activation.slope);
  for (int64_t b = 0; b < blocks; ++b) {
    A* const to = strip + b * kStrip * kBlock;
    const Plane<A> of_dy = plane_of<T>(dy, channels_last, s.out, s.pixels(), image, block + b);
    of_dy.read(of_dy, first, count, to);
    if (!y) continue;
    A* const of_y = strip + (kBlocks + b) * kStrip * kBlock;
    const Plane<A> plane = plane_of<T>(y, false, s.out, s.pixels(), image, block + b);
    plane.read(plane, first, count, of_y);
    for (int64_t i = 0; i < count * kBlock; i += n) {
      Vec<A> d = load(to + i);
      activate_gradient(load(of_y + i), d, slope);
      store(to + i, d);
    }
  }
  // The next strip: its lines lie a plane apart, which the hardware prefetcher does not see.
  constexpr int64_t kLine = 64 / sizeof(T), kLines = kStrip / kLine, kPerPixel = kBlocks * kBlock * kLines / kStrip;
  const int64_t next = (image * s.out + block * kBlock) * s.pixels() + first + kStrip;
  const auto look_ahead = [&](int64_t pixel) __attribute__((always_inline)) {
    for (int64_t line = pixel * kPerPixel; line < (pixel + 1) * kPerPixel; ++line) {
      const int64_t at = next + line / kLines * s.pixels() + line % kLines * kLine;
      if (!channels_last) __builtin_prefetch(dy + at);
      if (y) __builtin_prefetch(y + at);
    }
  };
  Vec<A> total[kVectors] = {};
  for_strip(s, labels, first, count, rows,
            [&](int64_t pixel, const int32_t* list, int size) __attribute__((always_inline)) {
              look_ahead(pixel);
              Vec<A> d[kVectors];
#pragma GCC unroll 16
              for (int v = 0; v < kVectors; ++v) {
                d[v] = load(strip + (v / kEach * kStrip + pixel) * kBlock + v % kEach * n);
                total[v] += d[v];
              }
              for (int i = 0; i < size; ++i) {
                A* row = table + list[i] * int64_t{kBlocks * kBlock};
#pragma GCC unroll 16
                for (int v = 0; v < kVectors; ++v) store(row + v * n, load(row + v * n) + d[v]);
              }
            });
  for (int v = 0; v < kVectors; ++v) store(sums + v * n, load(sums + v * n) + total[v]);
}
