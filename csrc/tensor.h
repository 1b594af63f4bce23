// What every backend asks of a tensor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <initializer_list>

#include "dispatch.h"

namespace pixnorm {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

inline bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1) {
      if (t.stride(dim) != expected) return false;
      expected *= t.size(dim);
    }
  }
  return true;
}

// The layout that a 4-D tensor is worked on in: its own if it is dense in one of the two, else NCHW (at one copy).
inline MemoryFormat layout_of(const Tensor& t) {
  return !t.is_contiguous() && is_channels_last(t) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// On the device of another tensor.
inline Tensor empty_like(const Tensor& other, std::initializer_list<int64_t> sizes, ScalarType dtype,
                         MemoryFormat layout = MemoryFormat::Contiguous) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype, std::nullopt, other.device(), std::nullopt, layout);
}

template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

}  // namespace pixnorm
