// Vector loads and stores of up to 16 bytes, conversions, and instructions that take inline PTX.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "dispatch.h"
#include "scalar.h"

#ifdef PIXNORM_CUDA_EMULATION
#include "cuda_emulation.h"
#endif

namespace pixnorm {

// ---- N consecutive elements in one load or store ----

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = unsigned short;
};
template <>
struct BitsOf<4> {
  using type = unsigned;
};
template <>
struct BitsOf<8> {
  using type = uint2;
};
template <>
struct BitsOf<16> {
  using type = uint4;
};

template <class T, int N>
struct Vec {
  using Bits = typename BitsOf<N * sizeof(T)>::type;
  Bits bits;
};

// Hardware faults on misaligned vectors; so does the emulation.
template <class T, int N>
__device__ __forceinline__ void check_alignment([[maybe_unused]] const T* at) {
#ifdef PIXNORM_CUDA_EMULATION
  cuda_emulation::check_alignment(at, N * sizeof(T));
#endif
}

template <class T, int N>
__device__ __forceinline__ void load(Vec<T, N>& to, const T* from) {
  check_alignment<T, N>(from);
  to.bits = *reinterpret_cast<const typename Vec<T, N>::Bits*>(from);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const Vec<T, N>& from) {
  check_alignment<T, N>(to);
  *reinterpret_cast<typename Vec<T, N>::Bits*>(to) = from.bits;
}

template <class T, int N>
__device__ __forceinline__ void unpack(const Vec<T, N>& from, acc_t<T>* to) {
  if constexpr (std::is_same_v<T, Half> && N > 1) {
    __half2 pairs[N / 2];
    memcpy(pairs, &from, sizeof(pairs));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 pair = __half22float2(pairs[i]);
      to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    }
  } else if constexpr (std::is_same_v<T, BFloat16> && N > 1) {
    __nv_bfloat162 pairs[N / 2];
    memcpy(pairs, &from, sizeof(pairs));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 pair = __bfloat1622float2(pairs[i]);
      to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    }
  } else {
    T elements[N];
    memcpy(elements, &from, sizeof(elements));
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = static_cast<acc_t<T>>(elements[i]);
  }
}

template <class T, int N>
__device__ __forceinline__ void pack(Vec<T, N>& to, const acc_t<T>* from) {
  if constexpr (std::is_same_v<T, Half> && N > 1) {
    __half2 pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
    memcpy(&to, pairs, sizeof(pairs));
  } else if constexpr (std::is_same_v<T, BFloat16> && N > 1) {
    __nv_bfloat162 pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    memcpy(&to, pairs, sizeof(pairs));
  } else {
    T elements[N];
#pragma unroll
    for (int i = 0; i < N; ++i) elements[i] = static_cast<T>(from[i]);
    memcpy(&to, elements, sizeof(elements));
  }
}

inline bool is_aligned(const void* data, size_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// ---- approximate instructions, with the error bounds of the PTX manual ----

// 2^x, relative error 2^-22.
__device__ __forceinline__ float ex2_approx(float x) {
#ifdef PIXNORM_CUDA_EMULATION
  return cuda_emulation::ex2_approx(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x, error 1 ulp.
__device__ __forceinline__ float rcp_approx(float x) {
#ifdef PIXNORM_CUDA_EMULATION
  return cuda_emulation::rcp_approx(x);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// tanh x, relative error 2^-11.
__device__ __forceinline__ float tanh_approx(float x) {
#ifdef PIXNORM_CUDA_EMULATION
  return cuda_emulation::tanh_approx(x);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace pixnorm
