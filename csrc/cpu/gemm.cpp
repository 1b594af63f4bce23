// Matrix products: how they are cut and given to threads. The arithmetic is in gemm_kernels.h.
//
// Work is cut by shape alone and sums are added in a fixed order, so results do not depend on the number of threads.

#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/memory.h"
#include "cpu/parallel.h"

#define PIXNORM_VECTOR_CODE "cpu/gemm_kernels.h"
#include "cpu/foreach_isa.h"

namespace pixnorm {
namespace {

// Rows of a, and columns of b if it is transposed.
template <class A>
Operand<A> operand(const Matrices<const A>& a) {
  return {a.data, a.row_stride, a.column_stride, a.columns, a.batch_stride};
}

// Packing costs a few per cent where each number is used a hundred times. What lies well is not packed: neighbours
// whose depths are near (pages, and sets of a cache), or, of the left one, depths side by side whose rows do not share
// sets.
template <class A>
Use use_of(const Operand<A>& o, int64_t depth, bool left, int64_t columns) {
  constexpr int64_t kNear = 256, kSameSets = 2048, size = sizeof(A);
  bool well = false;
  if (depth <= o.run) {
    if (o.stride == 1) {
      well = o.depth_stride * size <= kNear && (left || columns % PIXNORM_BY_ISA(kLanes<A>) == 0);
    } else if (o.depth_stride == 1) {
      well = left && o.stride * size % kSameSets != 0;
    }
  }
  return well ? Use::kInPlace : Use::kPack;
}

template <class A>
int64_t scratch_size(const GemmBlock& largest) {
  return PIXNORM_BY_ISA(right_scratch_size<A>)() + PIXNORM_BY_ISA(left_size<A>)(largest);
}

// out (+)= left right, where matrices of a batch lie so far apart. Cut by rows or columns of out.
template <class A>
void multiply_in_cuts(const Matrices<A>& out, const Operand<A>& left, int64_t left_stride, const Operand<A>& right,
                      int64_t right_stride, int64_t depth, bool by_rows, int64_t cut_length, bool add) {
  const int64_t length = by_rows ? out.rows : out.columns, cuts = ceil_div(length, cut_length);
  const auto block = [&](int64_t cut) {
    const int64_t begin = cut * cut_length, end = std::min(begin + cut_length, length);
    return by_rows ? GemmBlock{begin, end, 0, out.columns, 0, depth} : GemmBlock{0, out.rows, begin, end, 0, depth};
  };
  const int64_t work = cut_length * depth * std::min(out.rows, out.columns);
  parallel_for(0, out.batch * cuts, ceil_div(1 << 18, work), [&](int64_t begin, int64_t end) {
    const Buffer<A> scratch(scratch_size<A>(block(0)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / cuts;
      Operand<A> l = left, r = right;
      l.data += n * left_stride, r.data += n * right_stride;
      PIXNORM_BY_ISA(multiply_block<A>)(block(i % cuts), l, r, out.data + n * out.batch_stride, out.row_stride, add,
                                        scratch.data());
    }
  });
}

constexpr int64_t kCut = 128;

GemmBlock on_one_side(bool left, int64_t rows, int64_t columns) {
  return left ? GemmBlock{0, rows, 0, 0, 0, columns} : GemmBlock{0, 0, 0, columns, 0, rows};
}

template <class A>
int64_t packed_size(const GemmBlock& g, bool left) {
  return left ? PIXNORM_BY_ISA(left_size<A>)(g) : PIXNORM_BY_ISA(right_size<A>)(g);
}

}  // namespace

template <class A>
PackedMatrix<A>::PackedMatrix(const Matrices<const A>& matrix, bool on_left)
    : on_left_(on_left),
      whole_(on_one_side(on_left, matrix.rows, matrix.columns)),
      operand_(operand(on_left ? matrix : matrix.transposed())),
      packed_(PIXNORM_BY_ISA(steps_of)(whole_) * packed_size<A>(whole_, on_left)) {
  const int64_t size = packed_size<A>(whole_, on_left), steps = PIXNORM_BY_ISA(steps_of)(whole_);
  const int64_t parts = on_left ? PIXNORM_BY_ISA(tiles_of)(whole_) : PIXNORM_BY_ISA(panels_of<A>)(whole_);
  const auto pack = on_left ? PIXNORM_BY_ISA(pack_left<A>) : PIXNORM_BY_ISA(pack_right<A>);
  parallel_for(0, steps * parts, ceil_div(1 << 14, size / parts), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack(whole_, operand_, i / parts, i % parts, packed_.data() + i / parts * size);
    }
  });
  operand_.use = Use::kPacked;
  operand_.packed = packed_.data();
}

template <class A>
void PackedMatrix<A>::multiply(const Matrices<A>& out, const Matrices<const A>& others, bool add) const {
  const int64_t depth = whole_.k1;
  if (on_left_) {
    Operand<A> right = operand(others.transposed());
    right.use = use_of(right, depth, false, out.columns);
    multiply_in_cuts(out, operand_, 0, right, others.batch_stride, depth, false, kCut, add);
  } else {
    Operand<A> left = operand(others);
    left.use = use_of(left, depth, true, out.columns);
    multiply_in_cuts(out, left, others.batch_stride, operand_, 0, depth, true, kCut, add);
  }
}

// Many rows or columns: cut there; the other operand, if it is one for all, is packed once.
template <class A>
void gemm(const Matrices<A>& out, const Matrices<const A>& a, const Matrices<const A>& b, bool add) {
  const bool by_rows = (out.batch == 1 || a.batch_stride != 0) && out.rows > out.columns;
  const bool one_for_all = out.batch == 1 || (by_rows ? b : a).batch_stride == 0;
  if (one_for_all && (out.batch > 1 || (by_rows ? out.rows : out.columns) > kCut)) {
    return PackedMatrix<A>(by_rows ? b : a, !by_rows).multiply(out, by_rows ? a : b, add);
  }
  Operand<A> left = operand(a), right = operand(b.transposed());
  left.use = use_of(left, a.columns, true, out.columns), right.use = use_of(right, a.columns, false, out.columns);
  // Where each matrix of a batch is multiplied by another one, each cut packs it again.
  constexpr int64_t kLongCut = 512;
  multiply_in_cuts(out, left, a.batch_stride, right, b.batch_stride, a.columns, by_rows, kLongCut, add);
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

template <class A>
void gemm_sum(const Matrices<A>& out, const Matrices<const A>& a, const Matrices<const A>& b, bool add) {
  constexpr int64_t kPieceDepth = 1024, kMostPieces = 16, kRows = 128, kTasks = 8;
  const int64_t depth = a.batch * a.columns, pieces = std::clamp<int64_t>(depth / kPieceDepth, 1, kMostPieces);
  const int64_t cuts = std::clamp<int64_t>(std::min(kTasks / pieces, out.rows / kRows), 1, kTasks);
  const int64_t count = out.rows * out.columns;
  Operand<A> left = operand(a), right = operand(b.transposed());
  left.use = use_of(left, depth, true, out.columns), right.use = use_of(right, depth, false, out.columns);
  const auto block = [&](int64_t i) {
    const int64_t piece = i / cuts, cut = i % cuts;
    return GemmBlock{out.rows * cut / cuts, out.rows * (cut + 1) / cuts, 0,
                     out.columns,           depth * piece / pieces,      depth * (piece + 1) / pieces};
  };
  // The first piece goes to its place, the others into parts that are added to it.
  const Buffer<A> parts((pieces - 1) * count);
  const GemmBlock largest{0, ceil_div(out.rows, cuts), 0, out.columns, 0, ceil_div(depth, pieces)};
  parallel_for(0, pieces * cuts, 1, [&](int64_t begin, int64_t end) {
    const Buffer<A> scratch(scratch_size<A>(largest));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t piece = i / cuts;
      A* const to = piece == 0 ? out.data : parts.data() + (piece - 1) * count;
      PIXNORM_BY_ISA(multiply_block<A>)(block(i), left, right, to, piece == 0 ? out.row_stride : out.columns,
                                        piece == 0 && add, scratch.data());
    }
  });
  add_matrices(out, parts.data(), pieces - 1);
}

#define PIXNORM_INSTANTIATE(A)                                                                             \
  template class PackedMatrix<A>;                                                                          \
  template void add_matrices<A>(const Matrices<A>&, const A*, int64_t);                                    \
  template void gemm<A>(const Matrices<A>&, const Matrices<const A>&, const Matrices<const A>&, bool);     \
  template void gemm_sum<A>(const Matrices<A>&, const Matrices<const A>&, const Matrices<const A>&, bool);
PIXNORM_INSTANTIATE(float)
PIXNORM_INSTANTIATE(double)

}  // namespace pixnorm
