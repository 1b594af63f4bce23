#pragma once

namespace pixnorm {

// Instruction sets of the CPU kernels. One build has code for all of them. kAvx2: with FMA and F16C; kAvx512: F, BW, VL
// and DQ. The last two differ from it in products of bfloat16 only; kAvx512Bf16 is used where it is faster, or named.
enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best that this CPU has, limited by the environment variable PIXNORM_CPU_CAPABILITY. Throws std::invalid_argument
// if its value is not one of the names below. Cached by the first call that succeeds.
Isa cpu_isa();

// "baseline", "avx2", "avx512", "avx512_bf16" or "amx".
const char* isa_name(Isa isa);

}  // namespace pixnorm
