// PyTorch's matrix products (MKL or oneDNN) on raw memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "cpu/memory.h"

namespace pixnorm {

// A strided view of memory as a batch of matrices; batch stride 0 broadcasts one matrix.
template <class A>
struct Matrices {
  A* data;
  int64_t batch, rows, columns;
  int64_t batch_stride, row_stride, column_stride;

  Matrices transposed() const { return {data, batch, columns, rows, batch_stride, column_stride, row_stride}; }
  Matrices at(int64_t i) const { return {data + i * batch_stride, 1, rows, columns, 0, row_stride, column_stride}; }

  // 2-D for a batch of one, otherwise 3-D.
  Tensor tensor() const {
    const std::array<int64_t, 3> sizes{batch, rows, columns}, strides{batch_stride, row_stride, column_stride};
    const size_t first = batch == 1, dims = 3 - first;
    return torch::stable::from_blob(
        const_cast<std::remove_const_t<A>*>(data), {sizes.data() + first, dims}, {strides.data() + first, dims},
        torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype_of<std::remove_const_t<A>>);
  }
};

// Activations as matrices: a batch of (C, pixels) in NCHW, one (images * pixels, C) in channels_last.
template <class A>
Matrices<A> matrices_of(A* data, int64_t images, int64_t channels, int64_t pixels, bool channels_last) {
  if (channels_last) return {data, 1, images * pixels, channels, 0, channels, 1};
  return {data, images, channels, pixels, channels * pixels, pixels, 1};
}

// out = beta * out + a b, batched.
template <class A>
void gemm(const Matrices<A>& out, const Matrices<const A>& a, const Matrices<const A>& b, double beta) {
  const Tensor to = out.tensor(), left = a.tensor(), right = b.tensor();
  if (out.batch == 1) {
    TORCH_ERROR_CODE_CHECK(beta == 0 ? aoti_torch_cpu_mm_out(to.get(), left.get(), right.get())
                                     : aoti_torch_cpu_addmm_out(to.get(), to.get(), left.get(), right.get(), beta, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(beta == 0
                               ? aoti_torch_cpu_bmm_out(to.get(), left.get(), right.get())
                               : aoti_torch_cpu_baddbmm_out(to.get(), to.get(), left.get(), right.get(), beta, 1));
  }
}

}  // namespace pixnorm
