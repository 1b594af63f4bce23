// Matrix products: how they are cut and given to threads. The arithmetic is in gemm_kernels.h and, where the CPU
// has products of bfloat16, in gemm_bf16_kernels.h.
//
// Work is cut by shape alone and sums are added in a fixed order, so results do not depend on the number of threads.

#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/memory.h"
#include "cpu/parallel.h"

#define PIXNORM_VECTOR_CODE "cpu/gemm_kernels.h"
#define PIXNORM_BF16_CODE "cpu/gemm_bf16_kernels.h"
#include "cpu/foreach_isa.h"

namespace pixnorm {
namespace {

template <class T, class O>
GemmKernels<T, O> kernels_of_cpu() {
#if PIXNORM_HAS_BF16
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (cpu_isa() == Isa::kAmx) return bf16::kernels<O, true>();
    if (cpu_isa() == Isa::kAvx512Bf16) return bf16::kernels<O, false>();
  }
#endif
  return PIXNORM_BY_ISA(kernels<T, O>)();
}

// Rows of a, and columns of b if it is transposed.
template <class T>
Operand<T> operand(const Packing<T>& packing, const Matrices<const T>& a, int64_t depth, int64_t columns) {
  Operand<T> o{a.data, a.row_stride, a.column_stride, a.columns, a.batch_stride};
  if (packing.lies_well(o, depth, columns)) o.use = Use::kInPlace;
  return o;
}

// Rows or columns of out that are multiplied at a time: fewer, where the other operand is packed for all.
constexpr int64_t kCut = 128, kLongCut = 512;

// out = left right + addends, batched: cut by rows or columns of out.
template <class T, class O>
void multiply_in_cuts(const GemmKernels<T, O>& kernels, const Matrices<O>& out, const Operand<T>& left,
                      int64_t left_stride, const Operand<T>& right, int64_t right_stride, int64_t depth, bool by_rows,
                      int64_t cut_length, Addends<O> add) {
  const int64_t length = by_rows ? out.rows : out.columns, cuts = ceil_div(length, cut_length);
  const auto block = [&](int64_t cut) {
    const int64_t begin = cut * cut_length, end = std::min(begin + cut_length, length);
    return by_rows ? GemmBlock{begin, end, 0, out.columns, 0, depth} : GemmBlock{0, out.rows, begin, end, 0, depth};
  };
  const Buffer<acc_t<O>> of_columns(add.of_columns ? out.columns + kBeyondColumns : 0);
  if (add.of_columns) {
    std::fill_n(std::copy_n(add.of_columns, out.columns, of_columns.data()), kBeyondColumns, acc_t<O>(0));
    add.of_columns = of_columns.data();
  }
  const int64_t work = cut_length * depth * std::min(out.rows, out.columns);
  parallel_for(0, out.batch * cuts, ceil_div(1 << 18, work), [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(kernels.scratch_bytes(block(0)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / cuts;
      Operand<T> l = left, r = right;
      Addends<O> added = add;
      l.data += n * left_stride, r.data += n * right_stride;
      if (add.matrix) added.matrix += n * out.batch_stride;
      kernels.multiply(block(i % cuts), l, r, out.data + n * out.batch_stride, out.row_stride, added, scratch.data());
    }
  });
}

template <class T, class O>
const GemmKernels<T, O>& kernels_for() {
  static const GemmKernels<T, O> kernels = kernels_of_cpu<T, O>();
  return kernels;
}

}  // namespace

template <class T, class O>
PackedMatrix<T, O>::PackedMatrix(const Matrices<const T>& matrix, bool on_left)
    : on_left_(on_left), depth_(on_left ? matrix.columns : matrix.rows), packed_(0) {
  const Packing<T>& packing = on_left ? kernels_for<T, O>().left : kernels_for<T, O>().right;
  const GemmBlock whole =
      on_left ? GemmBlock{0, matrix.rows, 0, 0, 0, depth_} : GemmBlock{0, 0, 0, matrix.columns, 0, depth_};
  const int64_t bytes = packing.bytes(whole), pieces = packing.pieces(whole);
  operand_ = operand(packing, on_left ? matrix : matrix.transposed(), depth_, matrix.columns);
  packed_ = Buffer<char>(bytes);
  parallel_for(0, pieces, ceil_div(1 << 16, bytes / pieces), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) packing.pack(whole, operand_, i, packed_.data());
  });
  operand_.use = Use::kPacked;
  operand_.packed = packed_.data();
}

template <class T, class O>
void PackedMatrix<T, O>::multiply(const Matrices<O>& out, const Matrices<const T>& others, Addends<O> add) const {
  const GemmKernels<T, O>& kernels = kernels_for<T, O>();
  if (on_left_) {
    const Operand<T> right = operand(kernels.right, others.transposed(), depth_, out.columns);
    multiply_in_cuts(kernels, out, operand_, 0, right, others.batch_stride, depth_, false, kCut, add);
  } else {
    const Operand<T> left = operand(kernels.left, others, depth_, out.columns);
    multiply_in_cuts(kernels, out, left, others.batch_stride, operand_, 0, depth_, true, kCut, add);
  }
}

// Many rows or columns: cut there; the other operand, if it is one for all, is packed once.
template <class T, class O>
void gemm(const Matrices<O>& out, const Matrices<const T>& a, const Matrices<const T>& b, Addends<O> add) {
  const bool by_rows = (out.batch == 1 || a.batch_stride != 0) && out.rows > out.columns;
  const bool one_for_all = out.batch == 1 || (by_rows ? b : a).batch_stride == 0;
  if (one_for_all && (out.batch > 1 || (by_rows ? out.rows : out.columns) > kCut)) {
    return PackedMatrix<T, O>(by_rows ? b : a, !by_rows).multiply(out, by_rows ? a : b, add);
  }
  // Where each matrix of a batch is multiplied by another one, each cut packs it again.
  const GemmKernels<T, O>& kernels = kernels_for<T, O>();
  multiply_in_cuts(kernels, out, operand(kernels.left, a, a.columns, out.columns), a.batch_stride,
                   operand(kernels.right, b.transposed(), a.columns, out.columns), b.batch_stride, a.columns, by_rows,
                   kLongCut, add);
}

template <class A>
void add_matrices(const Matrices<A>& out, const A* parts, int64_t count) {
  if (count == 0) return;
  parallel_for(0, out.rows, ceil_div(1 << 14, (count + 1) * out.columns), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      PIXNORM_BY_ISA(add_parts<A>)(parts + r * out.columns, count, out.rows * out.columns,
                                   out.data + r * out.row_stride, out.columns);
    }
  });
}

template <class T>
void gemm_sum(const Matrices<acc_t<T>>& out, const Matrices<const T>& a, const Matrices<const T>& b, bool add) {
  using A = acc_t<T>;
  constexpr int64_t kPieceDepth = 1024, kMostPieces = 16, kRows = 128, kTasks = 8;
  const GemmKernels<T, A>& kernels = kernels_for<T, A>();
  const int64_t depth = a.batch * a.columns, pieces = std::clamp<int64_t>(depth / kPieceDepth, 1, kMostPieces);
  const int64_t cuts = std::clamp<int64_t>(std::min(kTasks / pieces, out.rows / kRows), 1, kTasks);
  const int64_t count = out.rows * out.columns;
  const Operand<T> left = operand(kernels.left, a, depth, out.columns);
  const Operand<T> right = operand(kernels.right, b.transposed(), depth, out.columns);
  const auto block = [&](int64_t i) {
    const int64_t piece = i / cuts, cut = i % cuts;
    return GemmBlock{out.rows * cut / cuts, out.rows * (cut + 1) / cuts, 0,
                     out.columns,           depth * piece / pieces,      depth * (piece + 1) / pieces};
  };
  // The first piece goes to its place, the others into parts that are added to it.
  const Buffer<A> parts((pieces - 1) * count);
  const GemmBlock largest{0, ceil_div(out.rows, cuts), 0, out.columns, 0, ceil_div(depth, pieces)};
  parallel_for(0, pieces * cuts, 1, [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(kernels.scratch_bytes(largest));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t piece = i / cuts;
      A* const to = piece == 0 ? out.data : parts.data() + (piece - 1) * count;
      kernels.multiply(block(i), left, right, to, piece == 0 ? out.row_stride : out.columns,
                       {piece == 0 && add ? to : nullptr}, scratch.data());
    }
  });
  add_matrices(out, parts.data(), pieces - 1);
}

#define PIXNORM_INSTANTIATE(T)                                                                                  \
  template class PackedMatrix<T, T>;                                                                            \
  template void gemm<T, T>(const Matrices<T>&, const Matrices<const T>&, const Matrices<const T>&, Addends<T>); \
  template void gemm_sum<T>(const Matrices<acc_t<T>>&, const Matrices<const T>&, const Matrices<const T>&, bool);
template void add_matrices<float>(const Matrices<float>&, const float*, int64_t);
template void add_matrices<double>(const Matrices<double>&, const double*, int64_t);
PIXNORM_INSTANTIATE(float)
PIXNORM_INSTANTIATE(double)
PIXNORM_INSTANTIATE(BFloat16)
PIXNORM_INSTANTIATE(Half)
template void gemm<BFloat16, float>(const Matrices<float>&, const Matrices<const BFloat16>&,
                                    const Matrices<const BFloat16>&, Addends<float>);
template void gemm<Half, float>(const Matrices<float>&, const Matrices<const Half>&, const Matrices<const Half>&,
                                Addends<float>);

}  // namespace pixnorm
