// Matrix products by cuBLAS, on PyTorch's handle (and so its stream and workspace).
#pragma once

#include <climits>

#include "cuda/launch.cuh"
#include "dispatch.h"

// The two functions of cuBLAS that are used here, declared by hand: a toolkit may lack cuBLAS's headers, while PyTorch
// always ships the library.
extern "C" {
int cublasGemmStridedBatchedEx(void* handle, int transa, int transb, int m, int n, int k, const void* alpha,
                               const void* a, int a_type, int lda, long long stride_a, const void* b, int b_type,
                               int ldb, long long stride_b, const void* beta, void* c, int c_type, int ldc,
                               long long stride_c, int batch, int compute_type, int algorithm);
int cublasSetMathMode(void* handle, int mode);
}

namespace pixnorm {

// A strided view of memory as a batch of matrices; batch stride 0 broadcasts one matrix.
struct Matrices {
  void* data;
  ScalarType dtype;
  int64_t batch, rows, columns;
  int64_t batch_stride, row_stride, column_stride;

  Matrices transposed() const { return {data, dtype, batch, columns, rows, batch_stride, column_stride, row_stride}; }
};

namespace cublas {

constexpr int kNotTransposed = 0, kTransposed = 1, kDefaultAlgorithm = -1;
constexpr int kDefaultMath = 0, kNoReducedPrecisionReduction = 16;
constexpr int kCompute32F = 68, kCompute32FFastTf32 = 77, kCompute64F = 70;

inline int type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 1;
    case ScalarType::Half:
      return 2;
    case ScalarType::BFloat16:
      return 14;
    default:
      return 0;
  }
}

inline int to_int(int64_t value) {
  STD_TORCH_CHECK(value <= INT_MAX, "pixnorm: a matrix is too large for cuBLAS");
  return static_cast<int>(value);
}

// cuBLAS is column-major, so to it a row-major matrix is the transpose.
struct Operand {
  int operation, leading;
};

inline Operand as_operand(const Matrices& m) {
  const bool by_rows = m.column_stride == 1 && (m.rows == 1 || m.row_stride >= m.columns);
  STD_TORCH_CHECK(by_rows || m.row_stride == 1, "pixnorm: neither rows nor columns are dense");
  if (by_rows) return {kNotTransposed, to_int(m.rows == 1 ? m.columns : m.row_stride)};
  return {kTransposed, to_int(m.columns == 1 ? m.rows : m.column_stride)};
}

}  // namespace cublas

// out = beta out + a b, batched; the rows of out must be dense.
inline void gemm(const Matrices& out, const Matrices& a, const Matrices& b, double beta, bool allow_tf32) {
  using namespace cublas;
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  // The handle's math mode carries PyTorch's TF32 flag of matrix products, and PyTorch sets it again whenever it takes
  // the handle. The projection is a convolution, so here the flag of convolutions decides. Half types always accumulate
  // in float32.
  const bool half = a.dtype == ScalarType::Half || a.dtype == ScalarType::BFloat16;
  int status = cublasSetMathMode(handle, half ? kNoReducedPrecisionReduction : kDefaultMath);
  const bool wide = out.dtype == ScalarType::Double;
  const int compute = wide                                         ? kCompute64F
                      : allow_tf32 && a.dtype == ScalarType::Float ? kCompute32FFastTf32
                                                                   : kCompute32F;
  const double alpha64 = 1, beta64 = beta;
  const float alpha32 = 1, beta32 = static_cast<float>(beta);
  // outᵀ = bᵀ aᵀ
  const Operand left = as_operand(b), right = as_operand(a), result = as_operand(out);
  STD_TORCH_CHECK(result.operation == kNotTransposed, "pixnorm: the rows of a product must be dense");
  if (status == 0) {
    status = cublasGemmStridedBatchedEx(
        handle, left.operation, right.operation, to_int(out.columns), to_int(out.rows), to_int(a.columns),
        wide ? static_cast<const void*>(&alpha64) : &alpha32, b.data, type_of(b.dtype), left.leading, b.batch_stride,
        a.data, type_of(a.dtype), right.leading, a.batch_stride, wide ? static_cast<const void*>(&beta64) : &beta32,
        out.data, type_of(out.dtype), result.leading, out.batch_stride, to_int(out.batch), compute, kDefaultAlgorithm);
  }
  STD_TORCH_CHECK(status == 0, "pixnorm: cuBLAS error ", status);
}

}  // namespace pixnorm
