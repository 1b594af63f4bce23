// Included before each source of pixnorm: its kernels for CUDA become kernels for the CPU, of ops of another library.
#pragma once

#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(library##_emulated, CPU, m, C10_UID)
