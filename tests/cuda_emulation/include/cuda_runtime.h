// Replaces CUDA's header of this name: the device language as C++ functions.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>  // not cmath: CUDA has the overloads for float without std::
#include <vector_functions.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_emulation.h"

#define __launch_bounds__(...)

// Of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// --- launches

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  const std::tuple<P...> parameters(std::forward<A>(arguments)...);
  return cuda_emulation::launch(*config, reinterpret_cast<const void*>(kernel),
                                [&] { std::apply(kernel, parameters); });
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cuda_emulation::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// --- barriers

inline void __syncthreads(cuda_emulation::Site site = cuda_emulation::Site::here()) {
  cuda_emulation::barrier(cuda_emulation::Op::kSyncthreads, false, site);
}

inline int __syncthreads_or(int predicate, cuda_emulation::Site site = cuda_emulation::Site::here()) {
  return cuda_emulation::barrier(cuda_emulation::Op::kSyncthreadsOr, predicate, site) > 0;
}

inline int __syncthreads_and(int predicate, cuda_emulation::Site site = cuda_emulation::Site::here()) {
  return cuda_emulation::barrier(cuda_emulation::Op::kSyncthreadsAnd, predicate, site) ==
         blockDim.x * blockDim.y * blockDim.z;
}

inline int __syncthreads_count(int predicate, cuda_emulation::Site site = cuda_emulation::Site::here()) {
  return static_cast<int>(cuda_emulation::barrier(cuda_emulation::Op::kSyncthreadsCount, predicate, site));
}

inline void __syncwarp(unsigned mask = 0xffffffff, cuda_emulation::Site site = cuda_emulation::Site::here()) {
  cuda_emulation::vote(cuda_emulation::Op::kSyncwarp, mask, false, site);
}

inline void __threadfence() { cuda_emulation::preempt(); }

// --- votes and shuffles

inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_emulation::Site site = cuda_emulation::Site::here()) {
  return cuda_emulation::vote(cuda_emulation::Op::kBallot, mask, predicate, site);
}

inline int __any_sync(unsigned mask, int predicate, cuda_emulation::Site site = cuda_emulation::Site::here()) {
  return cuda_emulation::vote(cuda_emulation::Op::kAny, mask, predicate, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, cuda_emulation::Site site = cuda_emulation::Site::here()) {
  return cuda_emulation::vote(cuda_emulation::Op::kAll, mask, predicate, site) == mask;
}

namespace cuda_emulation {

template <class T>
T exchange(Op op, unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "no shuffle takes this type");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(op, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The first lane of this lane's segment.
inline unsigned segment(int width) {
  if (width <= 0 || width > warpSize || (width & (width - 1))) fail("a shuffle of width %d", width);
  return lane() & ~(width - 1u);
}

}  // namespace cuda_emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              cuda_emulation::Site site = cuda_emulation::Site::here()) {
  const unsigned from = cuda_emulation::segment(width) + (source & (width - 1));
  return cuda_emulation::exchange(cuda_emulation::Op::kShfl, mask, value, from, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 cuda_emulation::Site site = cuda_emulation::Site::here()) {
  const unsigned lane = cuda_emulation::lane(), first = cuda_emulation::segment(width);
  const unsigned from = lane - first < delta % warpSize ? lane : lane - delta % warpSize;
  return cuda_emulation::exchange(cuda_emulation::Op::kShflUp, mask, value, from, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   cuda_emulation::Site site = cuda_emulation::Site::here()) {
  const unsigned lane = cuda_emulation::lane(), end = cuda_emulation::segment(width) + width;
  const unsigned from = lane + delta % warpSize < end ? lane + delta % warpSize : lane;
  return cuda_emulation::exchange(cuda_emulation::Op::kShflDown, mask, value, from, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  cuda_emulation::Site site = cuda_emulation::Site::here()) {
  const unsigned lane = cuda_emulation::lane(), end = cuda_emulation::segment(width) + width;
  const unsigned other = lane ^ (lane_mask % warpSize);  // may be in an earlier segment, not in a later one
  return cuda_emulation::exchange(cuda_emulation::Op::kShflXor, mask, value, other < end ? other : lane, site);
}

// --- integer atomics; there are none on floats, whose sums would depend on the order

#define CUDA_EMULATION_ATOMIC(NAME, RESULT)                                      \
  template <class T>                                                             \
  T NAME(T* address, std::common_type_t<T> value) {                              \
    static_assert(std::is_integral_v<T>, "only integers have atomic functions"); \
    cuda_emulation::preempt();                                                   \
    const T old = *address;                                                      \
    *address = RESULT;                                                           \
    return old;                                                                  \
  }
CUDA_EMULATION_ATOMIC(atomicAdd, old + value)
CUDA_EMULATION_ATOMIC(atomicSub, old - value)
CUDA_EMULATION_ATOMIC(atomicMin, old < value ? old : value)
CUDA_EMULATION_ATOMIC(atomicMax, old > value ? old : value)
CUDA_EMULATION_ATOMIC(atomicAnd, old& value)
CUDA_EMULATION_ATOMIC(atomicOr, old | value)
CUDA_EMULATION_ATOMIC(atomicXor, old ^ value)
CUDA_EMULATION_ATOMIC(atomicExch, value)
CUDA_EMULATION_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef CUDA_EMULATION_ATOMIC

template <class T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  static_assert(std::is_integral_v<T>, "only integers have atomic functions");
  cuda_emulation::preempt();
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}

// --- arithmetic and loads

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

using std::max;
using std::min;
