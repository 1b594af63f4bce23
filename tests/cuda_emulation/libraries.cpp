// The parts of a CUDA build of PyTorch that the host code uses: stream, device guard, cuBLAS.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "dispatch.h"

namespace {

using pixnorm::BFloat16;
using pixnorm::Half;
using torch::stable::Tensor;

enum Status { kSuccess = 0, kNotInitialized = 1, kInvalidValue = 7, kNotSupported = 15 };
enum Type { k32F = 0, k64F = 1, k16F = 2, k16BF = 14 };
enum Compute { kCompute32F = 68, kCompute64F = 70, kCompute32FFastTf32 = 77 };
enum Math { kDefaultMath = 0, kTf32Math = 1, kNoReducedPrecisionReduction = 16 };  // the last one is a flag

int handle;  // its address is the handle
int math_mode = kDefaultMath;

template <class F>
void with_type(int type, const F& f) {
  switch (type) {
    case k64F:
      return f(double{});
    case k16F:
      return f(Half{});
    case k16BF:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

// Rounds to nearest with 10 bits of mantissa (TF32).
float to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7f800000) != 0x7f800000) bits = (bits + 0x1000) & ~uint32_t{0x1fff};
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// A column-major matrix; `transposed`: row-major.
struct Operand {
  const void* data;
  int type, leading;
  long long stride;
  bool transposed;
  int64_t rows, columns;

  bool valid() const { return leading >= std::max<int64_t>(1, transposed ? columns : rows); }
};

// A copy of matrix number i of the batch as a tensor.
template <class S>
Tensor read(const Operand& m, int64_t i, bool tf32, std::vector<S>& memory) {
  memory.resize(m.rows * m.columns);
  const int64_t inner = m.transposed ? m.columns : m.rows, outer = m.transposed ? m.rows : m.columns;
  with_type(m.type, [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(m.data) + i * m.stride;
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t j = 0; j < inner; ++j) {
        const S value = static_cast<S>(data[o * m.leading + j]);
        memory[o * inner + j] = tf32 ? to_tf32(static_cast<float>(value)) : value;
      }
    }
  });
  const std::array<int64_t, 2> sizes{m.rows, m.columns};
  const std::array<int64_t, 2> strides{m.transposed ? m.columns : 1, m.transposed ? 1 : m.rows};
  return torch::stable::from_blob(memory.data(), {sizes.data(), 2}, {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), pixnorm::dtype_of<S>);
}

template <class S>
void multiply(const Operand& a, const Operand& b, const Operand& c, void* out, int batch, double alpha, double beta,
              bool tf32) {
  std::vector<S> a_memory, b_memory, product_memory;
  for (int64_t i = 0; i < batch; ++i) {
    const Tensor left = read(a, i, tf32, a_memory), right = read(b, i, tf32, b_memory);
    product_memory.assign(c.rows * c.columns, 0);
    const std::array<int64_t, 2> sizes{c.rows, c.columns}, strides{1, c.rows};
    const Tensor product =
        torch::stable::from_blob(product_memory.data(), {sizes.data(), 2}, {strides.data(), 2},
                                 torch::stable::Device(torch::headeronly::DeviceType::CPU), pixnorm::dtype_of<S>);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(product.get(), left.get(), right.get()));
    with_type(c.type, [&](auto type) {
      using T = decltype(type);
      T* to = static_cast<T*>(out) + i * c.stride;
      for (int64_t column = 0; column < c.columns; ++column) {
        for (int64_t row = 0; row < c.rows; ++row) {
          T& element = to[column * c.leading + row];
          const S value = static_cast<S>(alpha) * product_memory[column * c.rows + row];
          element = static_cast<T>(beta == 0 ? value : value + static_cast<S>(beta) * static_cast<S>(element));
        }
      }
    });
  }
}

bool supported(int compute, int a, int b, int c) {
  if (a != b) return false;
  switch (compute) {
    case kCompute64F:
      return a == k64F && c == k64F;
    case kCompute32FFastTf32:
      return a == k32F && c == k32F;
    case kCompute32F:
      return (a == k32F && c == k32F) || ((a == k16F || a == k16BF) && (c == a || c == k32F));
    default:
      return false;
  }
}

}  // namespace

extern "C" {

int cublasSetMathMode(void* given, int mode) {
  if (given != &handle) return kNotInitialized;
  if ((mode & ~(kTf32Math | kNoReducedPrecisionReduction)) != 0) return kInvalidValue;
  math_mode = mode;
  return kSuccess;
}

int cublasGemmStridedBatchedEx(void* given, int transa, int transb, int m, int n, int k, const void* alpha,
                               const void* a, int a_type, int lda, long long stride_a, const void* b, int b_type,
                               int ldb, long long stride_b, const void* beta, void* c, int c_type, int ldc,
                               long long stride_c, int batch, int compute_type, int algorithm) {
  if (given != &handle) return kNotInitialized;
  const Operand left{a, a_type, lda, stride_a, transa != 0, m, k}, right{b, b_type, ldb, stride_b, transb != 0, k, n};
  const Operand out{c, c_type, ldc, stride_c, false, m, n};
  const auto operation = [](int trans) { return trans == 0 || trans == 1; };
  if (m < 0 || n < 0 || k < 0 || batch < 0 || !operation(transa) || !operation(transb) || !left.valid() ||
      !right.valid() || !out.valid() || !alpha || !beta) {
    return kInvalidValue;
  }
  if (!supported(compute_type, a_type, b_type, c_type) || algorithm != -1) return kNotSupported;
  if (m == 0 || n == 0 || batch == 0) return kSuccess;
  if (!c || (k > 0 && (!a || !b)) || (batch > 1 && stride_c < static_cast<long long>(ldc) * (n - 1) + m)) {
    return kInvalidValue;
  }
  if (compute_type == kCompute64F) {
    multiply<double>(left, right, out, c, batch, *static_cast<const double*>(alpha), *static_cast<const double*>(beta),
                     false);
  } else {
    const bool tf32 = a_type == k32F && (compute_type == kCompute32FFastTf32 || (math_mode & kTf32Math) != 0);
    multiply<float>(left, right, out, c, batch, *static_cast<const float*>(alpha), *static_cast<const float*>(beta),
                    tf32);
  }
  return kSuccess;
}

// As after torch.backends.cuda.matmul.allow_tf32 = True, from which PyTorch sets the mode on every call.
AOTITorchError torch_get_current_cuda_blas_handle(void** result) {
  math_mode = kTf32Math;
  *result = &handle;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** result) {
  *result = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* result) {
  *result = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_device_guard_set_index(DeviceGuardHandle, int32_t) { return AOTI_TORCH_SUCCESS; }

}  // extern "C"
