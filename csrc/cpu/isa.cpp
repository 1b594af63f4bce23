#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pixnorm {
namespace {

Isa detect() {
#if defined(__x86_64__)
  unsigned a, b, c = 0, d;
  __get_cpuid(1, &a, &b, &c, &d);
  const bool f16c = c & bit_F16C;  // __builtin_cpu_supports("f16c") is missing in some compilers
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

Isa allowed() {
  const char* value = std::getenv("PIXNORM_CPU_CAPABILITY");
  if (value == nullptr) return Isa::kAvx512;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (isa_name(isa) == std::string(value)) return isa;
  }
  throw std::invalid_argument("PIXNORM_CPU_CAPABILITY must be 'baseline', 'avx2' or 'avx512', got '" +
                              std::string(value) + "'");
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = std::min(detect(), allowed());
  return isa;
}

const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline"; }

}  // namespace pixnorm
