// Matrix products on raw memory.
#pragma once

#include <cstdint>

#include "cpu/memory.h"
#include "dispatch.h"

namespace pixnorm {

// A strided view of memory as a batch of matrices; batch stride 0 broadcasts one matrix.
template <class T>
struct Matrices {
  T* data;
  int64_t batch, rows, columns;
  int64_t batch_stride, row_stride, column_stride;

  Matrices transposed() const { return {data, batch, columns, rows, batch_stride, column_stride, row_stride}; }
};

// Activations as matrices: a batch of (C, pixels) in NCHW, one (images * pixels, C) in channels_last.
template <class T>
Matrices<T> matrices_of(T* data, int64_t images, int64_t channels, int64_t pixels, bool channels_last) {
  if (channels_last) return {data, 1, images * pixels, channels, 0, channels, 1};
  return {data, images, channels, pixels, channels * pixels, pixels, 1};
}

// What is added to a product: a matrix that lies like out, and may be out; and numbers of rows or of columns.
template <class O>
struct Addends {
  const O* matrix = nullptr;
  const acc_t<O>*of_rows = nullptr, *of_columns = nullptr;

  // Of the part of out from some row and column on.
  Addends at(int64_t row, int64_t column, int64_t row_stride) const {
    return {matrix ? matrix + row * row_stride + column : nullptr, of_rows ? of_rows + row : nullptr,
            of_columns ? of_columns + column : nullptr};
  }
};

// out = a b + addends, batched. Rows of out are contiguous. Sums are of type acc_t<T>, and rounded once if that is not
// the type of out.
template <class T, class O>
void gemm(const Matrices<O>& out, const Matrices<const T>& a, const Matrices<const T>& b, Addends<O> add = {});

// out (+)= a b, summed over the batch of a and b; out is one matrix.
template <class T>
void gemm_sum(const Matrices<acc_t<T>>& out, const Matrices<const T>& a, const Matrices<const T>& b, bool add);

// out += `count` matrices of its size, which lie one after the other; in their order.
template <class A>
void add_matrices(const Matrices<A>& out, const A* parts, int64_t count);

// ---- what gemm.cpp (threads) and the vector code share ----

// How a kernel gets at an operand: a block packs what it needs, or all was packed before, or it lies well.
enum class Use { kPack, kPacked, kInPlace };

// Rows of a or columns of b, by depth. Each `run` of depths lies run_stride after the one before: pixels of images.
template <class T>
struct Operand {
  const T* data;
  int64_t stride, depth_stride, run, run_stride;
  Use use = Use::kPack;
  const void* packed = nullptr;

  const T* at(int64_t i, int64_t k) const { return data + i * stride + k / run * run_stride + k % run * depth_stride; }
};

// What one thread multiplies at a time: rows [m0, m1) by columns [n0, n1), summed over depths [k0, k1).
struct GemmBlock {
  int64_t m0, m1, n0, n1, k0, k1;
};

// How kernels take an operand: whether it is read in place, and how it is packed otherwise, by pieces of which each
// goes to its place in `bytes`.
template <class T>
struct Packing {
  bool (*lies_well)(const Operand<T>&, int64_t depth, int64_t columns);
  int64_t (*pieces)(const GemmBlock&);
  int64_t (*bytes)(const GemmBlock&);
  void (*pack)(const GemmBlock&, const Operand<T>&, int64_t piece, void* to);
};

// The kernels of an instruction set.
template <class T, class O>
struct GemmKernels {
  Packing<T> left, right;
  int64_t (*scratch_bytes)(const GemmBlock&);
  // out = a b + addends, of a block of it; what is to be packed here goes into scratch.
  void (*multiply)(const GemmBlock&, const Operand<T>& a, const Operand<T>& b, O* out, int64_t out_stride,
                   const Addends<O>&, void* scratch);
};

// Kernels read whole vectors of Addends::of_columns, up to this many numbers beyond.
constexpr int64_t kBeyondColumns = 32;

// A matrix that multiplies many, packed once.
template <class T, class O>
class PackedMatrix {
 public:
  // Stands on the left of its products, or on the right.
  PackedMatrix(const Matrices<const T>& matrix, bool on_left);

  // out = this times the others, or the others times this, plus addends; see gemm.
  void multiply(const Matrices<O>& out, const Matrices<const T>& others, Addends<O> add = {}) const;

 private:
  const bool on_left_;
  const int64_t depth_;
  Operand<T> operand_;
  Buffer<char> packed_;
};

}  // namespace pixnorm
