// Compiles a file of vector code once per instruction set, and picks one at run time:
//
//   #define PIXNORM_VECTOR_CODE "cpu/spn_kernels.h"
//   #include "cpu/foreach_isa.h"
//
// gives pixnorm::baseline::f, pixnorm::avx2::f and pixnorm::avx512::f for each function f of that file;
// PIXNORM_BY_ISA(f) selects one by CPU. The file may include other vector code but no ordinary headers: their inline
// functions would be compiled for AVX-512, and the linker might keep that copy for all callers.
//
// PIXNORM_BF16_CODE, if defined, names a file for the instruction sets beyond: pixnorm::bf16::f, where
// PIXNORM_HAS_BF16.

#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/isa.h"
#include "dispatch.h"
#include "scalar.h"

#define PIXNORM_ISA_BASELINE 0
#define PIXNORM_ISA_AVX2 1
#define PIXNORM_ISA_AVX512 2

#define PIXNORM_ISA PIXNORM_ISA_BASELINE
#define PIXNORM_VECTOR_BYTES 16
namespace pixnorm::baseline {
#include "cpu/vec.h"
#include PIXNORM_VECTOR_CODE
}  // namespace pixnorm::baseline
#undef PIXNORM_ISA
#undef PIXNORM_VECTOR_BYTES

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of its own undefined vectors (GCC bug 105593)
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define PIXNORM_ISA PIXNORM_ISA_AVX2
#define PIXNORM_VECTOR_BYTES 32
namespace pixnorm::avx2 {
#include "cpu/vec.h"
#include PIXNORM_VECTOR_CODE
}  // namespace pixnorm::avx2
#undef PIXNORM_ISA
#undef PIXNORM_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#define PIXNORM_ISA PIXNORM_ISA_AVX512
#define PIXNORM_VECTOR_BYTES 64
namespace pixnorm::avx512 {
#include "cpu/vec.h"
#include PIXNORM_VECTOR_CODE
}  // namespace pixnorm::avx512
#undef PIXNORM_ISA
#undef PIXNORM_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(PIXNORM_BF16_CODE) && __has_include(<amxbf16intrin.h>)
#define PIXNORM_HAS_BF16 1
#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma,f16c,prefer-vector-width=512")
#endif
#define PIXNORM_ISA PIXNORM_ISA_AVX512
#define PIXNORM_VECTOR_BYTES 64
namespace pixnorm::bf16 {
#include "cpu/vec.h"
#include PIXNORM_BF16_CODE
}  // namespace pixnorm::bf16
#undef PIXNORM_ISA
#undef PIXNORM_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#define PIXNORM_BY_ISA(...)                        \
  (cpu_isa() >= Isa::kAvx512 ? avx512::__VA_ARGS__ \
   : cpu_isa() == Isa::kAvx2 ? avx2::__VA_ARGS__   \
                             : baseline::__VA_ARGS__)
#else
#define PIXNORM_BY_ISA(...) baseline::__VA_ARGS__
#endif

#if !defined(PIXNORM_HAS_BF16)
#define PIXNORM_HAS_BF16 0
#endif
