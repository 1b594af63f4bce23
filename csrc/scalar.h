// Scalar helpers for host and device. (Not called math.h: on the include path that would shadow <math.h>.)
#pragma once

#ifdef __CUDACC__
#define PIXNORM_HOST_DEVICE __host__ __device__
#else
#define PIXNORM_HOST_DEVICE
#endif

#ifdef _MSC_VER
#define PIXNORM_ALWAYS_INLINE __forceinline
#else
#define PIXNORM_ALWAYS_INLINE inline __attribute__((always_inline))
#endif

namespace pixnorm {

template <class I>
PIXNORM_HOST_DEVICE constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

}  // namespace pixnorm
