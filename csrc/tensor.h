// Tensor helpers for all devices.
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

// The memory format that kernels use for a 4-D tensor: its own if it is dense. Otherwise NCHW, which costs a copy.
// Tensors that are dense in both formats (C == 1) count as contiguous.
inline MemoryFormat layout_of(const Tensor& t) {
  return !t.is_contiguous() && is_channels_last(t) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// The tensor in the given format, without a copy if it already is. (contiguous() would also notice, but that call takes
// a microsecond.)
inline Tensor dense(const Tensor& t, MemoryFormat layout = MemoryFormat::Contiguous) {
  const bool already = layout == MemoryFormat::ChannelsLast ? is_channels_last(t) : t.is_contiguous();
  return already ? t : torch::stable::contiguous(t, layout);
}

inline Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
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
