// Shared by label_conv.cpp (tables, threads) and label_conv_kernels.h (vector code).
#pragma once

#include <cstdint>

#include "activation.h"

namespace pixnorm {

constexpr int kBlock = 16;  // channels per block: the lanes of one or more vectors

namespace label_conv {

// Labels are padded by k / 2 on every side: (N, H + k - 1, W + k - 1). Padding, and an ignored or invalid label, is
// label `classes`, whose weights are zero.
//
// A table has a row of numbers, one per output channel, for each label and entry. Entries of a label: the sum of its
// weights over all taps, over each row of taps, over each column of taps, and its weights by tap. So a pixel inside a
// segment needs one row of the table, a pixel at a straight border of segments k rows, and only one at a corner k².
struct Shape {
  int64_t n, h, w;
  int64_t classes, out;
  int k;
  Activation activation;

  int64_t pixels() const { return h * w; }
  int64_t pitch() const { return w + k - 1; }
  int64_t padded() const { return (h + k - 1) * pitch(); }
  int64_t blocks() const { return (out + kBlock - 1) / kBlock; }
  int64_t out_padded() const { return blocks() * kBlock; }
  int64_t entries() const { return int64_t{1} + 2 * k + k * k; }
  int64_t rows() const { return (classes + 1) * entries(); }
};

constexpr int kAll = 0;         // then k rows of taps, k columns, k² taps
constexpr int64_t kStrip = 64;  // pixels processed at a time

}  // namespace label_conv
}  // namespace pixnorm
