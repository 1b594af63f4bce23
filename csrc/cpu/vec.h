// SIMD vectors of PIXNORM_VECTOR_BYTES bytes by the compiler's vector extensions. Operators work per lane, and a*b+c is
// contracted to FMA where there is one. Included by foreach_isa.h inside a namespace per instruction set.

template <class A>
constexpr int kLanes = PIXNORM_VECTOR_BYTES / sizeof(A);
template <class A, int n>
struct Lanes {
  typedef A type __attribute__((vector_size(n * sizeof(A))));
};
template <class A>
using Vec = typename Lanes<A, kLanes<A>>::type;

// Integers as wide as the float type.
template <class A>
using bits_t = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

#define PIXNORM_INLINE inline __attribute__((always_inline))

template <class To, class From>
PIXNORM_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A>
PIXNORM_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

// Unaligned.
template <class A>
PIXNORM_INLINE Vec<A> load(const A* from) {
  Vec<A> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class A>
PIXNORM_INLINE void store(A* to, Vec<A> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

#include "activation_functions.h"

// Adds to each lane j lane j ^ kDistance.
template <int kDistance, class V, int... j>
PIXNORM_INLINE V add_swapped(V v, std::integer_sequence<int, j...>) {
  return v + __builtin_shufflevector(v, v, (j ^ kDistance)...);
}

// By halves: a chain of log2(lanes) additions.
template <class A, int kDistance = kLanes<A> / 2>
PIXNORM_INLINE A sum_lanes(Vec<A> v) {
  if constexpr (kDistance > 0) {
    return sum_lanes<A, kDistance / 2>(add_swapped<kDistance>(v, std::make_integer_sequence<int, kLanes<A>>{}));
  } else {
    return v[0];
  }
}

// Loads kLanes<acc_t<T>> elements of storage type T and upcasts them.
template <class T>
PIXNORM_INLINE Vec<acc_t<T>> load_as(const T* from) {
  constexpr int n = kLanes<acc_t<T>>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    using Narrow = typename Lanes<uint16_t, n>::type;
    using Wide = typename Lanes<uint32_t, n>::type;
    Narrow narrow;
    __builtin_memcpy(&narrow, from, sizeof(narrow));
    return bit_cast<Vec<float>>(__builtin_convertvector(narrow, Wide) << 16);
  } else if constexpr (std::is_same_v<T, Half>) {
#if PIXNORM_ISA == PIXNORM_ISA_AVX512
    return bit_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif PIXNORM_ISA == PIXNORM_ISA_AVX2
    return bit_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Vec<float> v;
    for (int i = 0; i < n; ++i) v[i] = static_cast<float>(from[i]);
    return v;
#endif
  } else {
    return load(from);
  }
}

// Rounds to storage type T (to nearest, ties to even; NaN stays NaN) and stores.
template <class T>
PIXNORM_INLINE void store_as(T* to, Vec<acc_t<T>> v) {
  constexpr int n = kLanes<acc_t<T>>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    using Narrow = typename Lanes<uint16_t, n>::type;
    using Wide = typename Lanes<uint32_t, n>::type;
    const Wide bits = bit_cast<Wide>(v);
    const Wide rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Wide nan = Wide{} + 0x7fc0;
    const Narrow narrow = __builtin_convertvector(v == v ? rounded : nan, Narrow);
    __builtin_memcpy(to, &narrow, sizeof(narrow));
  } else if constexpr (std::is_same_v<T, Half>) {
#if PIXNORM_ISA == PIXNORM_ISA_AVX512
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(bit_cast<__m512>(v), 0));
#elif PIXNORM_ISA == PIXNORM_ISA_AVX2
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(bit_cast<__m256>(v), 0));
#else
    for (int i = 0; i < n; ++i) to[i] = static_cast<Half>(static_cast<float>(v[i]));
#endif
  } else {
    store(to, v);
  }
}

// Transposes a kLanes x kLanes tile in registers by exchanging off-diagonal halves, quarters, ...
template <int kDistance, class V, int... j>
PIXNORM_INLINE void exchange(V& a, V& b, std::integer_sequence<int, j...>) {
  constexpr int n = sizeof...(j);
  const V low = __builtin_shufflevector(a, b, ((j & kDistance) ? n + j - kDistance : j)...);
  b = __builtin_shufflevector(a, b, ((j & kDistance) ? n + j : j + kDistance)...);
  a = low;
}

template <class A, int kDistance = kLanes<A> / 2>
PIXNORM_INLINE void transpose(Vec<A> (&rows)[kLanes<A>]) {
  if constexpr (kDistance > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) {
      if (!(i & kDistance)) {
        exchange<kDistance>(rows[i], rows[i + kDistance], std::make_integer_sequence<int, kLanes<A>>{});
      }
    }
    transpose<A, kDistance / 2>(rows);
  }
}

// Lane j: the sum of the lanes of rows[j], with the bits of sum_lanes, for a fraction of its shuffles.
template <class A, int kDistance = kLanes<A> / 2>
PIXNORM_INLINE Vec<A> sum_each(Vec<A> (&rows)[kLanes<A>]) {
  if constexpr (kDistance > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kDistance; ++i) {
      exchange<kDistance>(rows[i], rows[i + kDistance], std::make_integer_sequence<int, kLanes<A>>{});
      rows[i] += rows[i + kDistance];
    }
    return sum_each<A, kDistance / 2>(rows);
  } else {
    return rows[0];
  }
}

template <class A>
PIXNORM_INLINE Vec<A> min_keep_nan(Vec<A> v, A limit) {
#if PIXNORM_ISA == PIXNORM_ISA_AVX512
  if constexpr (sizeof(A) == 4) return bit_cast<Vec<A>>(_mm512_min_ps(_mm512_set1_ps(limit), bit_cast<__m512>(v)));
#endif
  return v > limit ? broadcast<A>(limit) : v;
}

template <class A>
PIXNORM_INLINE Vec<A> max_keep_nan(Vec<A> v, A limit) {
  return v < limit ? broadcast<A>(limit) : v;
}

// e^v in place, to about 1 ulp, for results in the range of normal numbers (with AVX-512 also below, or 0). v = k ln 2
// + r with |r| <= ln 2 / 2, and a Taylor series for e^r whose remainder is below half an ulp. n vectors are interleaved
// to hide the latency of the chain of dependent FMAs.
template <class A, int n>
PIXNORM_INLINE void exp(Vec<A> (&v)[n]) {
  constexpr bool kDouble = sizeof(A) == 8;
  constexpr int kDegree = kDouble ? 13 : 7;
  [[maybe_unused]] constexpr int kMantissa = kDouble ? 52 : 23;
  [[maybe_unused]] constexpr bits_t<A> kBias = kDouble ? 1023 : 127;
  constexpr A kRound = kDouble ? A(6755399441055744.0) : A(12582912.0);  // 1.5 * 2^kMantissa: adding it rounds
  constexpr A kLn2High = kDouble ? A(0x1.62e42fefa0000p-1) : A(0x1.62e400p-1);
  constexpr A kLn2Low = kDouble ? A(0x1.cf79abc9e3b3ap-40) : A(0x1.7f7d1cp-20);
  constexpr A kInverseFactorial[] = {
      A(1),        A(1),         A(1) / 2,      A(1) / 6,       A(1) / 24,       A(1) / 120,       A(1) / 720,
      A(1) / 5040, A(1) / 40320, A(1) / 362880, A(1) / 3628800, A(1) / 39916800, A(1) / 479001600, A(1) / 6227020800};
  Vec<A> power[n];
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) {
    const Vec<A> shifted = v[i] * A(1.4426950408889634) + kRound;
    const Vec<A> k = shifted - kRound;
    v[i] = (v[i] - k * kLn2High) - k * kLn2Low;
#if PIXNORM_ISA == PIXNORM_ISA_AVX512
    power[i] = k;
#else
    const auto exponent = bit_cast<Vec<bits_t<A>>>(shifted) - (bit_cast<bits_t<A>>(kRound) - kBias);
    power[i] = bit_cast<Vec<A>>(exponent << kMantissa);
#endif
  }
  Vec<A> sum[n];
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) sum[i] = v[i] * kInverseFactorial[kDegree] + kInverseFactorial[kDegree - 1];
#pragma GCC unroll 16
  for (int k = kDegree - 2; k >= 0; --k) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) sum[i] = sum[i] * v[i] + kInverseFactorial[k];
  }
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) {
#if PIXNORM_ISA == PIXNORM_ISA_AVX512
    if constexpr (kDouble) {
      v[i] = bit_cast<Vec<A>>(_mm512_scalef_pd(bit_cast<__m512d>(sum[i]), bit_cast<__m512d>(power[i])));
    } else {
      v[i] = bit_cast<Vec<A>>(_mm512_scalef_ps(bit_cast<__m512>(sum[i]), bit_cast<__m512>(power[i])));
    }
#else
    v[i] = sum[i] * power[i];
#endif
  }
}

// 1 / v, to about 1 ulp, for normal numbers whose reciprocal is normal.
template <class A>
PIXNORM_INLINE Vec<A> reciprocal(Vec<A> v) {
#if PIXNORM_ISA == PIXNORM_ISA_AVX512
  if constexpr (sizeof(A) == 4) {
    // An estimate of 14 bits and one step of Newton's method: less than half the time of a division.
    const Vec<A> estimate = bit_cast<Vec<A>>(_mm512_rcp14_ps(bit_cast<__m512>(v)));
    return estimate + estimate * (A(1) - v * estimate);
  }
#endif
  return A(1) / v;
}

// 1 / (1 + e^-v) in place; NaN stays NaN.
template <class A, int n>
PIXNORM_INLINE void sigmoid(Vec<A> (&v)[n]) {
  constexpr A kLimit = sizeof(A) == 8 ? A(708) : A(87);
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) {
    v[i] = min_keep_nan<A>(-v[i], kLimit);
    if constexpr (PIXNORM_ISA != PIXNORM_ISA_AVX512) v[i] = max_keep_nan<A>(v[i], -kLimit);
  }
  exp<A, n>(v);
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) v[i] = reciprocal<A>(A(1) + v[i]);
}
