// Argument checks in C++. The public Python functions check first, with better messages; these guard against direct
// calls of the ops.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>

namespace pixnorm {

inline void check_sizes(const torch::stable::Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  bool equal = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) equal = equal && t.size(dim++) == size;
  STD_TORCH_CHECK(equal, "pixnorm: ", name, " has the wrong shape");
}

// The same of a tensor whose first dimension is one of groups.
inline void check_sizes_of_groups(const torch::stable::Tensor& t, const char* name, int64_t groups,
                                  std::initializer_list<int64_t> sizes) {
  bool equal = t.dim() == static_cast<int64_t>(sizes.size()) + 1 && t.size(0) == groups;
  int64_t dim = 1;
  for (const int64_t size : sizes) equal = equal && t.size(dim++) == size;
  STD_TORCH_CHECK(equal, "pixnorm: ", name, " has the wrong shape");
}

inline void check_same_dtype(const torch::stable::Tensor& t, const char* name, const torch::stable::Tensor& other) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), "pixnorm: ", name, " has the wrong dtype");
}

}  // namespace pixnorm
