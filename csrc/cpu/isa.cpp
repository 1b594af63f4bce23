#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pixnorm {
namespace {

// Linux saves the registers of tiles only for processes that have asked for it, and gives the permission to all of
// their threads.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The best that this CPU has, of those up to a limit.
Isa detect(Isa limit) {
#if defined(__x86_64__)
  unsigned a, b, c = 0, d;
  __get_cpuid(1, &a, &b, &c, &d);
  const bool f16c = c & bit_F16C;  // __builtin_cpu_supports("f16c") is missing in some compilers
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!avx2 || limit < Isa::kAvx2) return Isa::kBaseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512 || limit < Isa::kAvx512) return Isa::kAvx2;
  constexpr unsigned kBf16 = 1 << 5, kTiles = 1 << 24 | 1 << 22;  // AMX-TILE and AMX-BF16
  const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & kBf16;
  if (!bf16 || limit < Isa::kAvx512Bf16) return Isa::kAvx512;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles;
  if (tiles && limit >= Isa::kAmx && may_use_tiles()) return Isa::kAmx;
  // Intel's vectors multiply bfloat16 at half the speed of float32, AMD's at twice.
  return limit == Isa::kAvx512Bf16 || __builtin_cpu_is("amd") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  (void)limit, (void)may_use_tiles;
  return Isa::kBaseline;
#endif
}

constexpr Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

Isa allowed() {
  const char* value = std::getenv("PIXNORM_CPU_CAPABILITY");
  if (value == nullptr) return Isa::kAmx;
  for (Isa isa : kAll) {
    if (isa_name(isa) == std::string(value)) return isa;
  }
  throw std::invalid_argument(
      "PIXNORM_CPU_CAPABILITY must be 'baseline', 'avx2', 'avx512', 'avx512_bf16' or 'amx', got '" +
      std::string(value) + "'");
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect(allowed());
  return isa;
}

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

}  // namespace pixnorm
