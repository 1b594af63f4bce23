#pragma once

namespace pixnorm {

// The vector instructions that the CPU kernels may use. One build holds code for all of them.
enum class Isa { kBaseline, kAvx2, kAvx512 };  // kAvx2: with FMA and F16C; kAvx512: F, BW, VL and DQ

// The best that this machine has, or less if the environment variable PIXNORM_CPU_CAPABILITY says so.
// Throws std::invalid_argument if that is none of the names below. Settled by the first call that returns.
Isa cpu_isa();

// "baseline", "avx2" or "avx512".
const char* isa_name(Isa isa);

}  // namespace pixnorm
