// Parameters and their gradients, which may be wider than the activations.
#pragma once

#include "cuda/vec.cuh"

namespace pixnorm {

// A parameter tensor, in x's dtype or in the accumulation type.
template <class T>
struct Parameter {
  const void* data;
  bool wide;

  __device__ __forceinline__ acc_t<T> operator[](int i) const {
    return wide ? static_cast<acc_t<T>>(static_cast<const acc_t<T>*>(data)[i])
                : static_cast<acc_t<T>>(static_cast<const T*>(data)[i]);
  }

  // N elements from the i-th on, by up to 16 bytes at a time. The address must be aligned to that.
  template <int N>
  __device__ __forceinline__ void read(int64_t i, acc_t<T> (&to)[N]) const {
    using A = acc_t<T>;
    if (wide) {
      constexpr int kPart = N * sizeof(A) > 16 ? static_cast<int>(16 / sizeof(A)) : N;
#pragma unroll
      for (int part = 0; part < N / kPart; ++part) {
        Vec<A, kPart> vec;
        load(vec, static_cast<const A*>(data) + i + part * kPart);
        unpack(vec, to + part * kPart);
      }
    } else {
      Vec<T, N> vec;
      load(vec, static_cast<const T*>(data) + i);
      unpack(vec, to);
    }
  }
};

template <class T>
struct Gradient {
  void* data;
  bool wide;

  __device__ __forceinline__ void set(int64_t i, acc_t<T> value) const {
    if (wide) {
      static_cast<acc_t<T>*>(data)[i] = value;
    } else {
      static_cast<T*>(data)[i] = static_cast<T>(value);
    }
  }
};

}  // namespace pixnorm
