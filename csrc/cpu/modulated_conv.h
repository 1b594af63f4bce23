// Shared by modulated_conv.cpp (tensors, threads) and modulated_conv_kernels.h (vector code).
#pragma once

#include <cstdint>

namespace pixnorm::modulated_conv {

// The rows (or columns) of an image by how often each tap of a kernel sees them. Class 0 is seen once by every tap: all
// but a few at the borders, each of which is a class of its own.
struct Axis {
  int64_t size, taps, classes;
  const int32_t* class_of;  // of each row
  const int32_t* border;    // border[i] is the row of class i + 1
  const float* seen;        // [taps][classes]

  // The end of the run of equal class that begins at a row.
  int64_t run_end(int64_t row) const {
    int64_t end = row + 1;
    while (end < size && class_of[end] == class_of[row]) ++end;
    return end;
  }
  bool has_inside() const { return classes - 1 < size; }
};

struct Image {
  Axis rows, columns;
  int64_t channels;

  int64_t pixels() const { return rows.size * columns.size; }
  int64_t classes() const { return rows.classes * columns.classes; }
  int64_t taps() const { return rows.taps * columns.taps; }
};

}  // namespace pixnorm::modulated_conv
