// Matrix products on raw memory.
#pragma once

#include <cstdint>

#include "cpu/memory.h"

namespace pixnorm {

// A strided view of memory as a batch of matrices; batch stride 0 broadcasts one matrix.
template <class A>
struct Matrices {
  A* data;
  int64_t batch, rows, columns;
  int64_t batch_stride, row_stride, column_stride;

  Matrices transposed() const { return {data, batch, columns, rows, batch_stride, column_stride, row_stride}; }
};

// Activations as matrices: a batch of (C, pixels) in NCHW, one (images * pixels, C) in channels_last.
template <class A>
Matrices<A> matrices_of(A* data, int64_t images, int64_t channels, int64_t pixels, bool channels_last) {
  if (channels_last) return {data, 1, images * pixels, channels, 0, channels, 1};
  return {data, images, channels, pixels, channels * pixels, pixels, 1};
}

// out = a b, or with `add` out + a b, batched. Rows of out are contiguous.
template <class A>
void gemm(const Matrices<A>& out, const Matrices<const A>& a, const Matrices<const A>& b, bool add);

// The same, summed over the batch of a and b; out is one matrix.
template <class A>
void gemm_sum(const Matrices<A>& out, const Matrices<const A>& a, const Matrices<const A>& b, bool add);

// out += `count` matrices of its size, which lie one after the other; in their order.
template <class A>
void add_matrices(const Matrices<A>& out, const A* parts, int64_t count);

// ---- what gemm.cpp (threads) and gemm_kernels.h (vector code) share ----

// How a kernel gets at an operand: a block packs what it needs, or all was packed before, or it lies well.
enum class Use { kPack, kPacked, kInPlace };

// Rows of a or columns of b, by depth. Each `run` of depths lies run_stride after the one before: pixels of images.
template <class A>
struct Operand {
  const A* data;
  int64_t stride, depth_stride, run, run_stride;
  Use use = Use::kPack;
  const A* packed = nullptr;

  const A* at(int64_t i, int64_t k) const { return data + i * stride + k / run * run_stride + k % run * depth_stride; }
};

// What one thread multiplies at a time: rows [m0, m1) by columns [n0, n1), summed over depths [k0, k1).
struct GemmBlock {
  int64_t m0, m1, n0, n1, k0, k1;
};

// A matrix that multiplies many, packed once.
template <class A>
class PackedMatrix {
 public:
  // Stands on the left of its products, or on the right.
  PackedMatrix(const Matrices<const A>& matrix, bool on_left);

  // out (+)= this times the others, or the others times this; batched.
  void multiply(const Matrices<A>& out, const Matrices<const A>& others, bool add) const;

 private:
  const bool on_left_;
  const GemmBlock whole_;
  Operand<A> operand_;
  const Buffer<A> packed_;
};

}  // namespace pixnorm
