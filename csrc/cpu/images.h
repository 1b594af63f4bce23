// Images, as the vector code sees them.
#pragma once

#include <cstdint>

namespace pixnorm {

struct ImageShape {
  int64_t channels;
  int64_t h, w;  // without upsampling pixels are rows of width 1, to be cut anywhere
  int64_t upsample;
  bool channels_last;

  int64_t pixels() const { return h * w; }
  int64_t elements() const { return channels * pixels(); }  // of an image
  int64_t row() const { return channels_last ? w * channels : w; }
};

}  // namespace pixnorm
