// Dispatch over floating-point dtypes.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace pixnorm {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;
using torch::headeronly::ScalarType;

// The type that arithmetic and reductions use: half types are upcast to float32.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr ScalarType dtype_of = std::is_same_v<T, double>     ? ScalarType::Double
                                : std::is_same_v<T, float>    ? ScalarType::Float
                                : std::is_same_v<T, BFloat16> ? ScalarType::BFloat16
                                                              : ScalarType::Half;

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the C++ type T of the dtype.
template <class F>
auto dispatch_floating(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::BFloat16:
      return f(Type<BFloat16>{});
    case ScalarType::Half:
      return f(Type<Half>{});
    default:
      STD_TORCH_CHECK(false, "pixnorm: expected float64, float32, bfloat16 or float16");
  }
}

}  // namespace pixnorm
